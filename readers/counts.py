"""Raw counts of cells: the embedded dataset, a 10x folder, a 10x ``.h5`` or an ``.h5ad``."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from readers.bounded import no_file
from readers.count_checks import check_cells, check_counts, check_orientation
from readers.gene_names import other_names
from readers.hdf5 import check_hdf5, check_kind, readable
from readers.tenx import read_10x_folder, read_10x_h5
from runtime.errors import InputError, one_line, some

EMBEDDED = "pbmc68k_reduced"  # the dataset that ships with scanpy; needs no download

EMBEDDED_LABELS = "bulk_labels"  # its column of cell types

COUNT_LAYERS = ("counts", "raw_counts", "raw")  # of an .h5ad, the first one that holds raw counts

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
    if ending not in OTHER_FORMATS:
        return InputError(f"{path}: {expected}")
    what, remedy = OTHER_FORMATS[ending]
    return InputError(f"{path}: found {what}, {expected}; {remedy}")


def is_zarr(path):
    """Whether a folder is a zarr store."""
    inside = (".zgroup", ".zattrs", "zarr.json")
    return path.suffix.lower() == ".zarr" or any((path / name).exists() for name in inside)


def read_counts(path=EMBEDDED):
    """Read raw counts: the embedded dataset, a 10x folder, a 10x ``.h5`` or an ``.h5ad``.

    A 10x folder may also be given by its ``.mtx`` file, or by a folder above it, see
    :func:`readers.tenx.find_10x`. Gene symbols that occur more than once get the suffixes -1, -2,
    ... as in scanpy, so that no gene is lost.

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


def read_h5ad(path):
    """Read an ``.h5ad``; counts are in a layer of COUNT_LAYERS, else ``X``, else ``raw.X``."""
    import anndata
    import h5py

    with readable(path):
        check_hdf5(path)
        check_kind(path, ".h5ad")
        source = anndata.read_h5ad(path)
        with h5py.File(path) as file:
            obs = name_factors(source.obs.copy(), file, path)
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
            :func:`readers.count_checks.check_counts`; returns the counts. cells: names (N).
        path: of the file. layers: names of all layers of the file, for the message.

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
        except Exception as error:  # h5py and anndata raise many types on broken files
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
