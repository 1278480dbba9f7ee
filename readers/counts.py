"""Raw counts of cells: the embedded dataset, a 10x folder, a 10x ``.h5`` or an ``.h5ad``."""

import os
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from readers.bounded import no_file, read_table
from readers.gene_names import COMMON_GENES, GENOME, genome_of, other_names, without_genome
from readers.hdf5 import check_hdf5
from readers.matrix_market import read_mtx
from readers.scale import LARGEST_LOG
from runtime.errors import InputError, is_plain_name, one_line, some

EMBEDDED = "pbmc68k_reduced"  # the dataset that ships with scanpy; needs no download

EMBEDDED_LABELS = "bulk_labels"  # its column of cell types

COUNT_LAYERS = ("counts", "raw_counts", "raw")  # of an .h5ad, the first one that holds raw counts

# A barcode of a cell, with the name of a sample before or behind it, if any.
BARCODE = re.compile(
    r"(?P<prefix>.*[^A-Za-z0-9])?(?P<core>[ACGT]{10,})"
    r"(?P<number>[-._]\d+)?(?P<rest>[^A-Za-z0-9].*)?"
)

ENSEMBL_ID = re.compile(r"ENS[A-Z]*G\d{6,}(\.\d+)?([^A-Za-z0-9].*)?")

MIN_NAMES = 20  # Ensembl ids or barcodes that are evidence of what an axis is

MOSTLY_BARE = 0.2  # of the genes without a genome in front, though others have one
MOSTLY_ONE = 0.9  # of all counts: what one genome must have for the others to be noise

STILL_WHOLE = 0.2  # share of integers among values that are no integers throughout

CORRECTED = (
    "they look like counts after removal of ambient RNA (SoupX, DecontX) or with reads shared "
    "between genes; expected raw counts (integers): round them (numpy.rint; roundToInt=TRUE in "
    "SoupX), or take the uncorrected matrix"
)

GENE_FEATURES = {"gene expression", "gex", "rna", "gene", "genes"}  # feature_types of genes

# ------------------------------------------------------------------------------------ checks


def check_counts(X, where, cells, genes):
    """Check that every stored value is a raw count.

    Args:
        X: sparse or dense matrix (N x G).
        where: what messages name, usually the file.
        cells, genes: names of the rows (N) and columns (G).

    Returns:
        X as CSR int32, repeated entries summed, without stored zeros.

    Raises:
        InputError: a value is not finite, negative, not an integer, or over 2^31 - 1; or the
            matrix has another type or shape, or indices outside of it.
    """
    # Every value, not a sample: a log-normalised layer read as counts spoils all that follows, and
    # nothing else would show it.
    if getattr(X, "dtype", np.dtype(object)).kind not in "biuf":
        dtype = getattr(X, "dtype", type(X).__name__)
        raise InputError(f"{where}: found values of type {dtype}, expected numbers")
    check_shape(X.shape, where, cells, genes)
    X = sp.csr_matrix(check_sparse(X, where))
    check_values(X, where, cells, genes)
    if not X.has_canonical_format:
        X = X.astype(np.int64)  # holds the sum of repeated entries
        X.sum_duplicates()
        check_values(X, where, cells, genes)
    X = X.astype(np.int32)
    X.eliminate_zeros()
    return X


def check_shape(shape, where, cells, genes):
    """Check that a matrix has a row for each cell and a column for each gene.

    Raises:
        InputError: it does not.
    """
    if shape != (len(cells), len(genes)):
        raise InputError(
            f"{where}: found a matrix of {' x '.join(map(str, shape))}, expected "
            f"{len(cells)} cells x {len(genes)} genes"
        )


def check_sparse(X, where):
    """Return a matrix, as CSR or CSC if it is sparse, with all indices within its shape.

    Call it before any arithmetic, as an index beyond the shape would read foreign memory.

    Raises:
        InputError: an index lies outside of the shape, or the indices have another type.
    """
    if not sp.issparse(X):
        return X
    try:
        if X.format not in ("csr", "csc"):  # tocsr sums repeated entries in the matrix's type
            wide = {"f": np.float64, "i": np.int64, "u": np.int64}
            X = X.astype(wide.get(X.dtype.kind, X.dtype)).tocsr()
        X.check_format(full_check=True)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: a broken sparse matrix ({one_line(error)})") from error
    return X


def check_values(X, where, cells, genes):
    """Raise the error of :func:`check_counts` for the first stored value that is not a count."""
    values = X.data
    for wrong, problem in (
        (~np.isfinite(values), "not finite"),
        (values < 0, "negative"),
        (values != np.rint(values), "not an integer"),
        (values >= 2.0**31, "over 2147483647"),  # which float32 would round up to 2^31
    ):
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            cell = cells[np.searchsorted(X.indptr, first, side="right") - 1]
            gene = genes[X.indices[first]]
            expected = (
                "expected raw counts (integers, 0 or more), not normalised or transformed ones"
            )
            if problem == "not an integer" and are_corrected(X):
                expected = CORRECTED
            raise InputError(
                f"{where}: found {values[first]:.10g} (cell {cell}, gene {gene}), which is "
                f"{problem}, as are {wrong.sum():,} of {values.size:,} stored values; {expected}"
            )


def are_corrected(X):
    """Whether fractional values (N x G, CSR, 0 or more) are counts of which parts were taken.

    Either a good part of them are still integers; or values hardly ever repeat within a cell, cells
    have different sums, and the largest value is above any logarithm. Normalised values repeat, as
    the counts do that they are multiples of.
    """
    if np.mean(X.data == np.rint(X.data)) > STILL_WHOLE:
        return True
    rows = [X.data[X.indptr[i] : X.indptr[i + 1]] for i in range(min(X.shape[0], 100))]
    rows = [row for row in rows if len(row) > 1]
    if not rows or X.data.max() <= LARGEST_LOG:
        return False
    n_distinct = np.mean([len(np.unique(row)) / len(row) for row in rows])
    sums = np.array([row.sum() for row in rows], float)
    return n_distinct > 0.5 and sums.std() > 0.01 * sums.mean()


def check_names(names, where, what):
    """Check that names are text that every file format can store.

    Args:
        names: of genes, cells or cell types. where: what messages name. what: a name stands for.

    Raises:
        InputError: a name is not text, or has a NUL character or an unpaired surrogate.
    """
    for name in names:
        if not isinstance(name, str) or not is_plain_name(name):
            raise InputError(f"{where}: {what} {name!r} is no plain text, expected names")


def check_orientation(cells, genes, path):
    """Check that names of cells and genes do not show that a matrix is transposed.

    Args:
        cells, genes: names of the rows (N) and columns (G). path: what messages name.

    Raises:
        InputError: the rows are named as genes and the columns are not, or the reverse of barcodes.
    """
    genes_in_rows = are_genes(cells, 3) and not are_genes(genes, 1)
    barcodes_in_columns = are_mostly(genes, BARCODE) and not are_mostly(cells, BARCODE)
    if genes_in_rows or barcodes_in_columns:
        raise InputError(
            f"{path}: found {some(cells, 2)} as names of cells and {some(genes, 2)} as names of "
            "genes, expected cells x genes; it looks transposed: write it again as adata.T"
        )


def are_mostly(names, pattern):
    """Whether more than half of many names match a compiled pattern as a whole."""
    n = sum(pattern.fullmatch(str(name)) is not None for name in names)
    return n >= MIN_NAMES and 2 * n > len(names)


def are_genes(names, fewest):
    """Whether names are mostly Ensembl ids, or have at least ``fewest`` of COMMON_GENES."""
    n_common = sum(str(name).upper() in COMMON_GENES for name in names)
    return n_common >= fewest or are_mostly(names, ENSEMBL_ID)


def check_cells(adata, path):
    """Keep genes alone, and check names.

    Args:
        adata: AnnData or BackedCells, as read. path: what messages name.

    Returns:
        The same cells without other features, such as antibodies. Repeated gene symbols get the
        suffixes -1, -2, ...

    Raises:
        InputError: there are no cells or no genes; barcodes repeat; a name is not plain text; or
            see :func:`keep_genome`.
    """
    import anndata

    if adata.n_obs == 0 or adata.n_vars == 0:
        raise InputError(f"{path}: found {adata.n_obs} cells x {adata.n_vars} genes, expected some")
    if not adata.obs_names.is_unique:
        repeated = adata.obs_names[adata.obs_names.duplicated()].unique()
        raise InputError(
            f"{path}: {len(repeated)} barcodes occur more than once ({some(repeated)}), expected "
            "one cell per barcode; add the sample's name to the barcodes when joining samples"
        )
    if "feature_types" in adata.var:
        adata = keep_genes(adata, path)
    adata = keep_genome(adata, path)
    check_names(adata.var_names, path, "gene")
    check_names(adata.obs_names, path, "barcode")
    n_repeated = int(adata.var_names.duplicated().sum())
    if n_repeated:
        print(f"{path}: {n_repeated} repeated gene symbols told apart by a suffix (-1, -2, ...)")
        adata.var_names = anndata.utils.make_index_unique(adata.var_names)
    return adata


def keep_genes(adata, path):
    """Leave out features that are not genes, by ``.var["feature_types"]``, and count them.

    A feature without a type counts as a gene.

    Raises:
        InputError: no feature is a gene.
    """
    types = adata.var["feature_types"].astype(object)
    types = types.where(types.notna(), "").astype(str).str.strip()
    is_gene = types.str.lower().isin({"", *GENE_FEATURES}).to_numpy()
    if is_gene.all():
        return adata
    kinds = some([f"{n:,} {kind}" for kind, n in Counter(types[~is_gene]).most_common()], 5)
    if not is_gene.any():
        raise InputError(f"{path}: found no gene in feature_types ({kinds}), expected genes")
    print(f"{path}: {np.sum(~is_gene)} features that are not gene expression left out ({kinds})")
    return only_genes(adata, is_gene)


def only_genes(adata, mask):
    """The cells with some of their genes (mask, G) alone."""
    adata = adata[:, mask].copy()
    if hasattr(adata.X, "recount"):  # backed: totals of cells were of all features
        adata.X.recount()
    return adata


def keep_genome(adata, path):
    """Keep the genes and cells of one genome, and take its name off the genes'.

    Genes tell their genome by a prefix (``GRCh38_``), or their species by their Ensembl ids. A few
    genes that tell none stay, as spike-ins do.

    Args:
        adata: AnnData or BackedCells with ``.var["gene_ids"]``. path: what messages name.

    Raises:
        InputError: several genomes have more than a few of the counts.
    """
    pairs = list(zip(map(str, adata.var_names), map(str, adata.var["gene_ids"]), strict=True))
    genome = np.array([genome_of(a) or genome_of(b) or "" for a, b in pairs], object)  # (G)
    bare = genome == ""
    if bare.mean() > MOSTLY_BARE and any(GENOME.match(name) for name, _ in pairs):
        genome[bare] = "others"  # one species has a genome in front, another has none
    n_genes = Counter(genome[genome != ""])
    genomes = [name for name, n in n_genes.most_common() if n >= MIN_NAMES]
    if len(genomes) > 1:
        adata = keep_largest_genome(adata, genome, genomes, path)
    names = [without_genome(str(name)) for name in adata.var_names]
    prefixed = [old for new, old in zip(names, adata.var_names, strict=True) if new != old]
    if prefixed:
        print(
            f"{path}: the genome in front of {len(prefixed):,} genes taken off ({some(prefixed)})"
        )
        adata.var_names = pd.Index(names)
    adata.var["gene_ids"] = [without_genome(str(name)) for name in adata.var["gene_ids"]]
    return adata


def keep_largest_genome(adata, genome, genomes, path):
    """The genes of the genome with (nearly) all counts, and the cells that are mostly of it.

    Args:
        genome: of each gene (G), "" if unknown. genomes: names of those with many genes.

    Raises:
        InputError: none has so many.
    """
    of_gene = np.asarray(adata.X.sum(axis=0)).ravel()  # (G)
    counts = {name: of_gene[genome == name].sum() for name in genomes}
    genomes = sorted(genomes, key=counts.get, reverse=True)
    total = max(sum(counts.values()), 1)
    shares = ", ".join(f"{name} {counts[name] / total:.1%}" for name in genomes)
    first = genomes[0]
    if counts[first] < MOSTLY_ONE * total:
        raise InputError(
            f"{path}: found {len(genomes)} genomes ({shares} of the counts), expected one; write "
            "the genes of one, and the cells that are mostly of it, to an .h5ad of its own"
        )
    before = np.asarray(adata.X.sum(axis=1)).ravel()
    other = np.isin(genome, genomes[1:])
    adata = only_genes(adata, ~other)
    foreign = 2 * np.asarray(adata.X.sum(axis=1)).ravel() < before
    print(
        f"{path}: genes of {len(genomes)} genomes ({shares} of the counts); {other.sum():,} genes "
        f"that are not of {first} left out, and {foreign.sum():,} cells with most counts in them"
    )
    return adata[~foreign].copy() if foreign.any() else adata


# ------------------------------------------------------------------------------- file formats


# Other formats, by their ending: what they are, and how to convert them.
WRITE_10X = "in R, write its counts as a 10x folder (DropletUtils::write10xCounts)"
FROM_TABLE = "scanpy.read_csv(file).T.write_h5ad('cells.h5ad') converts genes x cells"
OTHER_FORMATS = {
    ".loom": ("a loom file", "scanpy.read_loom(file).write_h5ad('cells.h5ad') converts it"),
    ".h5seurat": ("an h5Seurat file", WRITE_10X),
    ".h5mu": ("a MuData file", "mudata.read_h5mu(file).mod['rna'].write_h5ad('cells.h5ad') does"),
    ".zarr": ("a zarr store", "anndata.read_zarr(file).write_h5ad('cells.h5ad') converts it"),
    **dict.fromkeys((".rds", ".rda", ".rdata", ".qs"), ("an R object", WRITE_10X)),
    **dict.fromkeys((".csv", ".tsv", ".txt", ".tab"), ("a table of text", FROM_TABLE)),
    **dict.fromkeys((".xlsx", ".xls"), ("an Excel file", "export it as csv; " + FROM_TABLE)),
    **dict.fromkeys((".tar", ".tgz", ".zip"), ("an archive", "unpack it and give what is in it")),
    ".gz": ("a packed file", "unpack it with gunzip"),
}


def other_format(path):
    """The error of a path to ``--data`` that is in none of the formats that are read."""
    endings = [suffix.lower() for suffix in path.suffixes] or [""]
    if path.is_dir():
        ending = ".zarr"
    elif endings[-1] == ".gz" and endings[:-1] and endings[-2] in OTHER_FORMATS:
        ending = endings[-2]
    else:
        ending = endings[-1]
    expected = "expected a 10x folder, a 10x .h5 or an .h5ad file"
    what, how = OTHER_FORMATS.get(ending, (None, None))
    return InputError(f"{path}: found {what}, {expected}; {how}" if what else f"{path}: {expected}")


def is_zarr(path):
    """Whether a folder is a zarr store."""
    inside = (".zgroup", ".zattrs", "zarr.json")
    return path.suffix.lower() == ".zarr" or any((path / name).exists() for name in inside)


def read_counts(path=EMBEDDED):
    """Read raw counts: the embedded dataset, a 10x folder, a 10x ``.h5`` or an ``.h5ad``.

    A 10x folder may also be given by its ``.mtx`` file, or by a folder above it, see
    :func:`find_10x`. Gene symbols that occur more than once get the suffixes -1, -2, ... as in
    scanpy, so that no gene is lost.

    Returns:
        AnnData (N x G), ``.X`` CSR int32; ``.var["gene_ids"]`` is the second name of each gene:
        its id, or its symbol if genes are named by id, or "" if the data has none.

    Raises:
        InputError: the file is missing, unreadable, of an unknown format, or has no raw counts.
    """
    if str(path) == EMBEDDED:
        return read_embedded()
    path = Path(path)
    if not path.exists():
        raise no_file(path, "counts for --data", "file or folder")
    readers = {".h5": read_10x_h5, ".h5ad": read_h5ad}
    is_folder = path.is_dir() or path.name.lower().endswith((".mtx", ".mtx.gz"))
    read = read_10x_folder if is_folder else readers.get(path.suffix.lower())
    if read is None or (path.is_dir() and is_zarr(path)):
        raise other_format(path)
    with warnings.catch_warnings():  # check_cells reports repeated names and adds suffixes
        warnings.filterwarnings("ignore", message=".*names are not unique")
        warnings.filterwarnings("ignore", message=".*without encoding metadata")  # old, but sound
        adata = read(path)
    return check_cells(adata, path)


def read_embedded():
    """The 700 PBMCs of the 10x 68k set that ship with scanpy, with their counts restored.

    The file stores log1p(counts / n_counts * 1e4). The inverse is exact up to float32 rounding;
    every value is checked before it is rounded.

    Raises:
        InputError: a restored value is not an integer, so scanpy ships other data.
    """
    import anndata
    import scanpy

    source = scanpy.datasets.pbmc68k_reduced()
    X = sp.csr_matrix(source.raw.X, dtype=np.float64)
    X.data = np.expm1(X.data)
    X = sp.diags(source.obs["n_counts"].to_numpy(float) / 1e4) @ X
    X = sp.csr_matrix(X)
    counts = np.rint(X.data)
    error = np.abs(X.data - counts)
    if error.max() > 0.1 or (error > 1e-3 * X.data).any():
        raise InputError(f"{EMBEDDED}: the counts in the installed scanpy could not be restored")
    X.data = counts
    obs = source.obs[[EMBEDDED_LABELS]].copy()
    var = pd.DataFrame({"gene_ids": ""}, index=source.raw.var_names.astype(str))
    X = check_counts(X, EMBEDDED, obs.index, var.index)
    return anndata.AnnData(X, obs=obs, var=var)


# ------------------------------------------------------------------------------- 10x folders

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
                tool, how = OTHER_COUNTERS[name]
                return f"; found the output of {tool}: {how}"
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
    cells_first = not is_tsv(barcode_file)
    if cells_first:
        print(f"{matrix_file}: cells x genes, as kallisto-bustools and Parse write them")
    shape, names = zip(*sides[::-1] if cells_first else sides, strict=True)
    X = read_mtx(matrix_file, shape, names)
    X = check_counts(X if cells_first else X.T, matrix_file, obs.index, var.index)
    return anndata.AnnData(X, obs=obs, var=var)


def is_tsv(path):
    """Whether a file, gzipped or not, is a tsv."""
    return path.name.removesuffix(".gz").endswith(".tsv")


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


# ---------------------------------------------------------------------------------- HDF5 files


# Kind of HDF5 file -> groups that tell it, and the ending by which it is read.
KINDS = {
    "an AnnData file": ({"obs", "var"}, ".h5ad"),
    "a 10x file": ({"matrix"}, ".h5"),
    "an h5Seurat file": ({"assays", "cell.names"}, ".h5seurat"),
}


def check_kind(path, ending):
    """Check that an HDF5 file is not of another kind than its ending says.

    Raises:
        InputError: it is.
    """
    import h5py

    with h5py.File(path) as file:
        kinds = {kind: end for kind, (groups, end) in KINDS.items() if groups <= set(file)}
    if kinds and ending not in kinds.values():
        kind, end = next(iter(kinds.items()))
        raise InputError(f"{path}: found {kind}, expected {ending}; rename it to {end}")


def check_one_genome(path):
    """Check that a 10x file of Cell Ranger 2 has the matrix of one genome.

    Raises:
        InputError: it has several.
    """
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

    try:
        check_hdf5(path)
        check_kind(path, ".h5")
        check_one_genome(path)
        adata = scanpy.read_10x_h5(path, gex_only=False)
        # scanpy reads int32 as float32, which is exact only to 2^24, so counts are read again.
        with h5py.File(path) as file:
            group = file["matrix"] if "matrix" in file else next(iter(file.values()))
            parts = group["data"][:], adata.X.indices, adata.X.indptr
        adata.X = sp.csr_matrix(parts, shape=adata.shape)
    except InputError:
        raise
    except Exception as error:  # h5py and scanpy raise many types of errors on broken files
        raise InputError(f"{path}: not a readable 10x .h5 file ({one_line(error)})") from error
    adata.X = check_counts(adata.X, path, adata.obs_names, adata.var_names)
    return adata


def read_h5ad(path):
    """Read an ``.h5ad``; counts are in a layer of COUNT_LAYERS, else ``X``, else ``raw.X``."""
    import anndata
    import h5py

    try:
        check_hdf5(path)
        check_kind(path, ".h5ad")
        source = anndata.read_h5ad(path)
        with h5py.File(path) as file:
            obs = name_factors(source.obs.copy(), file, path)
    except InputError:
        raise
    except Exception as error:  # as in read_10x_h5
        raise InputError(f"{path}: not a readable .h5ad file ({one_line(error)})") from error
    check_orientation(source.obs_names, source.var_names, path)
    layers = [name for name in COUNT_LAYERS if name in source.layers]
    matrices = [(f"layers['{name}']", source.layers[name], source.var) for name in layers]
    if source.X is not None:
        matrices.append(("X", source.X, source.var))
    if source.raw is not None:
        matrices.append(("raw.X", source.raw.X, with_columns(source.raw.var, source.var)))
    X, var = first_counts(matrices, check_counts, source.obs_names, path, source.layers)
    return anndata.AnnData(X, obs=obs, var=var)


def with_columns(raw_var, var):
    """A table of the genes of ``raw.X``, with the columns that ``var`` alone has, by gene."""
    missing = [column for column in var if column not in raw_var]
    if not missing:
        return raw_var
    known = var.loc[~var.index.duplicated(), missing].astype(object)
    return raw_var.assign(**known.reindex(raw_var.index).set_axis(raw_var.index))


def name_factors(obs, file, path):
    """Give names to columns of codes, where an old file keeps the names in ``obs/__categories``.

    anndata reads those that it has linked itself; SeuratDisk leaves the link out. Codes begin at 0,
    or at 1 if that alone fits; where both fit, they stay codes.

    Args:
        obs: table of cells (N), changed in place. file: open h5py file. path: for the message.

    Returns:
        The table.
    """
    names_of = file.get("obs/__categories", {})
    named = []
    for column in names_of:
        if column not in obs or obs[column].dtype.kind not in "iuf":
            continue
        names = pd.Index(names_of[column].asstr()[()].ravel())
        codes = obs[column].fillna(-1).to_numpy()
        if (codes != np.rint(codes)).any() or not len(names) or not names.is_unique:
            continue
        lowest, highest = codes[codes >= 0].min(initial=len(names)), codes.max(initial=-1)
        first = {0: 0, 1: 1}.get(int(lowest))
        if codes.min(initial=0) < -1 or first is None or highest - first >= len(names):
            continue
        if first == 1 and highest < len(names):  # it may also be that no cell has the first name
            continue
        codes = np.where(codes < 0, -1, codes - first).astype(int)
        obs[column] = pd.Categorical.from_codes(codes, names)
        named.append(column)
    if named:
        print(f"{path}: names of {some(named, 12)} taken from obs/__categories")
    return obs


def first_counts(matrices, check, cells, path, layers=()):
    """The first matrix of an ``.h5ad`` that holds raw counts.

    Args:
        matrices: iterable of (name, matrix, table of its genes). check: called as
            :func:`check_counts`; returns the counts. cells: names (N). path: of the file.
        layers: names of all layers of the file, for the message.

    Returns:
        The counts (N x G), and a table (G rows) of ``gene_ids`` as in :func:`read_counts`, and of
        ``feature_types`` if there are some.

    Raises:
        InputError: what is wrong with the first matrix, if none holds raw counts.
    """
    problem = None
    for name, X, var in matrices:
        where = f"{path} ({name})"
        try:
            X = check(X, where, cells, var.index)
        except InputError as error:
            problem = problem or error
            continue
        except Exception as error:  # as in read_10x_h5
            raise InputError(f"{where}: not readable ({one_line(error)})") from error
        if name != "X" or problem:
            print(f"{path}: raw counts taken from {name}")
        table = pd.DataFrame({"gene_ids": other_names(var)}, index=var.index)
        if "feature_types" in var:
            table["feature_types"] = var["feature_types"].to_numpy()
        return X, table
    problem = problem or f"{path}: found no matrix in it, expected raw counts in X"
    others = [name for name in layers if name not in COUNT_LAYERS]
    hint = f"; if a layer holds them, name it 'counts' ({some(others, 8)})" if others else ""
    raise InputError(f"{problem}{hint}")
