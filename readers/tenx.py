"""Counts of cells as 10x writes them: a folder around ``matrix.mtx``, or an ``.h5``."""

import os

import pandas as pd
import scipy.sparse as sp

from readers.bounded import read_table
from readers.count_checks import check_counts
from readers.hdf5 import check_hdf5, check_kind, readable
from readers.matrix_market import read_mtx
from runtime.errors import InputError, some

# What a 10x matrix consists of -> endings of the files' names, the preferred one first. Those of
# kallisto-bustools (cells_x_genes.*) and of Parse (DGE.mtx before version 1.1) come last.
PARTS = {
    "matrix.mtx": ("count_matrix.mtx", "DGE.mtx", "matrix.mtx", ".mtx"),
    "barcodes.tsv": ("barcodes.tsv", ".barcodes.txt", "cell_metadata.csv"),
    "features.tsv or genes.tsv": ("features.tsv", "genes.tsv", ".genes.txt", "all_genes.csv"),
}

# Files of counters whose folders are not read -> what wrote them, and how to convert them.
OTHER_COUNTERS = {
    "quants_mat_rows.txt": (
        "alevin-fry",
        "pyroe.load_fry(folder).write_h5ad('cells.h5ad') converts it",
    ),
    "quants_mat.gz": ("alevin", "in R, tximport reads it; write its counts as a 10x folder"),
    "output.bus": ("kallisto bus", "bustools count (or kb count) makes a folder that is read"),
}

MAX_LEVELS, MAX_FOLDERS = 3, 5000  # below --data, in which a 10x folder is looked for


def find_parts(folder):
    """Files of 10x matrices in a folder, by what precedes ``matrix.mtx`` in a name.

    Returns:
        prefix -> part -> path. The prefix is "" as Cell Ranger names them, or as GEO does
        "GSM123_". Gzipped files come before plain ones, features.tsv before genes.tsv.
    """
    files = [folder / name for name in names_in(folder) if os.path.isfile(folder / name)]
    found = {}
    for part, endings in PARTS.items():
        for ending in endings:
            for path in sorted(files, key=lambda path: path.suffix != ".gz"):
                name = path.name.removesuffix(".gz")
                if ending == next(filter(name.endswith, endings), None):
                    prefix = name.removesuffix(ending)
                    found.setdefault(prefix, {}).setdefault(part, path)
    return found


def whole_matrices(groups):
    """Those of :func:`find_parts` that have all parts, as a list of part -> path."""
    return [parts for parts in groups.values() if len(parts) == len(PARTS)]


def only_matrix(folder, groups):
    """The one 10x matrix of a folder, part -> path.

    Raises:
        InputError: there are several, or a part is missing.
    """
    whole = whole_matrices(groups)
    if len(whole) > 1:
        matrices = [parts["matrix.mtx"] for parts in whole]
        raise InputError(
            f"{folder}: found {len(whole)} 10x matrices ({some([m.name for m in matrices], 12)}), "
            f"expected one; name its file, such as --data {matrices[0]}"
        )
    return whole[0] if whole else only_files(folder, groups)


def only_files(folder, groups):
    """The one file of each part in a folder whose files share no prefix.

    Raises:
        InputError: a part has no file, or several.
    """
    chosen = {}
    for part in PARTS:
        paths = [parts[part] for parts in groups.values() if part in parts]
        if not paths:
            raise InputError(
                f"{folder}: no {part} (plain or .gz), expected a 10x folder{why_not(folder)}"
            )
        if len(paths) > 1:
            names = some([path.name for path in paths], 12)
            raise InputError(f"{folder}: found several {part} ({names}), expected one 10x matrix")
        chosen[part] = paths[0]
    return chosen


def why_not(folder):
    """Why a folder, or one in it, holds no 10x matrix, for messages; "" if that is not known."""
    below = subfolders(folder)
    for place in (folder, *below, *(deeper for b in below for deeper in subfolders(b))):
        for name in names_in(place):
            path = place / name
            if os.path.islink(path) and not os.path.exists(path):
                return f"; {path} is a link to {os.readlink(path)}, which is not there"
            if name in OTHER_COUNTERS:
                tool, remedy = OTHER_COUNTERS[name]
                return f"; found the output of {tool}: {remedy}"
    return ""


def folders_below(folder):
    """All folders up to MAX_LEVELS below a folder, without hidden ones.

    Raises:
        InputError: there are more than MAX_FOLDERS.
    """
    found, level = [], [folder]
    for _ in range(MAX_LEVELS):
        level = [below for above in level for below in subfolders(above)]
        found += level
        if len(found) > MAX_FOLDERS:
            raise InputError(
                f"{folder}: no matrix.mtx in it, and more than {MAX_FOLDERS:,} folders below; "
                "expected a 10x folder"
            )
    return found


def subfolders(folder):
    """Folders in a folder, without hidden ones, in order of their names."""
    paths = [folder / name for name in names_in(folder) if name[0] != "_"]
    return [path for path in paths if os.path.isdir(path)]


def names_in(folder):
    """Names in a folder in order, without hidden ones; none if we may not list it."""
    try:
        return sorted(name for name in os.listdir(folder) if name[0] != ".")
    except OSError:
        return []


def find_10x(path):
    """Files of the one 10x matrix that a path means.

    Args:
        path: a 10x folder, a folder above just one (up to MAX_LEVELS), or a ``.mtx`` file.

    Returns:
        part -> path, with the keys of PARTS.

    Raises:
        InputError: none is there, or several are.
    """
    if not path.is_dir():
        groups = find_parts(path.parent)
        for parts in whole_matrices(groups):
            if parts["matrix.mtx"].name.removesuffix(".gz") == path.name.removesuffix(".gz"):
                return parts | {"matrix.mtx": path}
        others = {prefix: dict(parts) for prefix, parts in groups.items()}
        for parts in others.values():
            parts.pop("matrix.mtx", None)
        return only_files(path.parent, others | {path: {"matrix.mtx": path}})
    os.listdir(path)  # an error if we may not; folders below are passed over then
    groups = find_parts(path)
    if any("matrix.mtx" in parts for parts in groups.values()):
        return only_matrix(path, groups)
    folders = folders_below(path)
    below = [folder for folder in folders if whole_matrices(find_parts(folder))]
    files = [file for folder in (path, *folders) for file in matrix_files(folder, below)]
    if len(below) == 1 and not files:
        return only_matrix(below[0], find_parts(below[0]))
    if below + files:
        raise several_matrices(path, below, files)
    return only_matrix(path, groups)


def matrix_files(folder, below):
    """``.h5ad`` files and 10x ``.h5`` files in a folder, but for those that repeat a 10x folder.

    below: 10x folders that were found.
    """
    paths = [folder / name for name in names_in(folder) if "molecule_info" not in name]
    paths = [path for path in paths if path.suffix.lower() in (".h5", ".h5ad")]
    return [path for path in paths if path.with_suffix("") not in below]


def several_matrices(folder, below, files):
    """The error of a folder that is no 10x folder, but has matrices in it."""
    found = below + files
    names = some([path.relative_to(folder) for path in found], 12)
    if len(found) == 1:
        return InputError(
            f"{folder}: found a folder with {names}, expected the file: --data {files[0]}"
        )
    example = next((path for path in found if "filtered" in path.name), found[0])
    return InputError(
        f"{folder}: found {len(found)} matrices in it ({names}), expected one; name it, such as "
        f"--data {example}"
    )


def read_10x_folder(folder):
    """Read a 10x folder: ``genes.tsv`` (Cell Ranger 2) or ``features.tsv.gz`` (3 and later).

    Args:
        folder: a Path, see :func:`find_10x`.
    """
    import anndata

    matrix_file, barcode_file, gene_file = find_10x(folder).values()
    if folder.is_dir() and matrix_file.parent != folder:
        below = matrix_file.parent.relative_to(folder)
        print(f"{folder}: the one 10x folder below it is read, {below}")
    obs, var = read_barcodes(barcode_file), read_genes(gene_file)
    sides = [(len(var), f"genes ({gene_file.name})"), (len(obs), f"barcodes ({barcode_file.name})")]
    cells_first = not barcode_file.name.removesuffix(".gz").endswith(".tsv")
    if cells_first:
        print(f"{matrix_file}: cells x genes, as kallisto-bustools and Parse write them")
    shape, names = zip(*sides[::-1] if cells_first else sides, strict=True)
    X = read_mtx(matrix_file, shape, names)
    X = check_counts(X if cells_first else X.T, matrix_file, obs.index, var.index)
    return anndata.AnnData(X, obs=obs, var=var)


def read_barcodes(path):
    """Table of the cells (N rows): of Parse with what its csv says of each, else empty."""
    if path.name.removesuffix(".gz").endswith(".csv"):
        table = read_table(path)
        return table.set_index(table.columns[0])
    barcodes = read_table(path, sep="\t", header=None).iloc[:, 0]
    return pd.DataFrame(index=pd.Index(barcodes.to_list()))


def read_genes(path):
    """Table of the genes (G rows) by symbol, with ``gene_ids`` and perhaps ``feature_types``."""
    if path.name.removesuffix(".gz").endswith(".csv"):
        table = read_table(path).iloc[:, :2]  # gene_id, gene_name, genome
    else:
        table = read_table(path, sep="\t", header=None)
    names_file = path.with_name(path.name.replace(".genes.txt", ".genes.names.txt"))
    if names_file != path and names_file.is_file():
        table[1] = read_table(names_file, sep="\t", header=None).iloc[:, 0]
    ids, symbols = table.iloc[:, 0], table.iloc[:, min(1, table.shape[1] - 1)]
    symbols = symbols.where(symbols != "", ids)  # a lone column has the symbols
    var = pd.DataFrame(index=pd.Index(symbols.to_list()))
    var["gene_ids"] = ids.to_numpy()
    if table.shape[1] > 2:
        var["feature_types"] = table.iloc[:, 2].to_numpy()
    return var


def check_one_genome(path):
    """Raise InputError unless a 10x file of Cell Ranger 2 has the matrix of one genome."""
    import h5py

    with h5py.File(path) as file:
        genomes = [name for name, group in file.items() if "barcodes" in group]
    if len(genomes) > 1:
        raise InputError(
            f"{path}: found a 10x file of Cell Ranger 2 with {len(genomes)} genomes "
            f"({some(genomes)}), expected one; scanpy.read_10x_h5(file, genome={genomes[0]!r})"
            ".write_h5ad('cells.h5ad') takes the cells of one"
        )


def read_10x_h5(path):
    """Read a 10x ``.h5`` of Cell Ranger 2 or later."""
    import h5py
    import scanpy

    with readable(path, "10x .h5"):
        check_hdf5(path)
        check_kind(path, ".h5")
        check_one_genome(path)
        adata = scanpy.read_10x_h5(path, gex_only=False)
        # scanpy reads int32 as float32, which is exact only to 2^24, so counts are read again.
        with h5py.File(path) as file:
            group = file["matrix"] if "matrix" in file else next(iter(file.values()))
            parts = group["data"][:], adata.X.indices, adata.X.indptr
        adata.X = sp.csr_matrix(parts, shape=adata.shape)
    adata.X = check_counts(adata.X, path, adata.obs_names, adata.var_names)
    return adata
