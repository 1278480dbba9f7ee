"""Raw counts of cells: the embedded set, a 10x folder, a 10x ``.h5`` or an ``.h5ad``."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from readers.bounded import read_table
from readers.gene_names import other_names
from readers.hdf5 import check_hdf5
from readers.matrix_market import read_mtx
from runtime.errors import InputError, is_plain_name, one_line, some

EMBEDDED = "pbmc68k_reduced"  # the dataset that ships inside scanpy; needs no download

EMBEDDED_LABELS = "bulk_labels"  # its column of cell types


def check_counts(X, where, cells, genes):
    """Return a CSR matrix as int32 after checking that every stored value is a raw count.

    All values are checked, not a sample: one log-normalised layer read as counts spoils
    everything downstream without another sign.

    Args:
        X: sparse or dense matrix (cells x genes).
        where: what the message names, usually the file.
        cells, genes: names of the rows and columns, for the message.

    Raises:
        InputError: a value is not finite, negative, not an integer, or over 2^31 - 1; or the
            matrix is of another kind or shape, or its indices lead outside of it.
    """
    if getattr(X, "dtype", np.dtype(object)).kind not in "biuf":
        found = getattr(X, "dtype", type(X).__name__)
        raise InputError(f"{where}: found values of type {found}, expected numbers")
    if X.shape != (len(cells), len(genes)):
        raise InputError(
            f"{where}: found a matrix of {' x '.join(map(str, X.shape))}, expected "
            f"{len(cells)} cells x {len(genes)} genes"
        )
    X = sp.csr_matrix(check_sparse(X, where))
    check_values(X, where, cells, genes)
    if not X.has_canonical_format:  # entries of one place are summed, in a type that holds the sum
        X = X.astype(np.int64)
        X.sum_duplicates()
        check_values(X, where, cells, genes)
    X = X.astype(np.int32)
    X.eliminate_zeros()
    return X


def check_sparse(X, where):
    """Return a matrix whose indices, if it is sparse, all lie within it; CSR or CSC then.

    To be called before any arithmetic: a wild index reads memory that is not the matrix's.

    Raises:
        InputError: one does not, or they are of another kind.
    """
    if not sp.issparse(X):
        return X
    try:
        if X.format not in ("csr", "csc"):  # which sums repeated entries in their own type
            wide = {"f": np.float64, "i": np.int64, "u": np.int64}
            X = X.astype(wide.get(X.dtype.kind, X.dtype)).tocsr()
        X.check_format(full_check=True)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: a broken sparse matrix ({one_line(error)})") from error
    return X


def check_values(X, where, cells, genes):
    """Raise the error of :func:`check_counts` for the first stored value that is no count."""
    values = X.data
    for wrong, what in (
        (~np.isfinite(values), "not finite"),
        (values < 0, "negative"),
        (values != np.rint(values), "not an integer"),
        (values >= 2.0**31, "over 2147483647"),  # a float32 knows no 2147483647
    ):
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            cell = cells[np.searchsorted(X.indptr, first, side="right") - 1]
            gene = genes[X.indices[first]]
            raise InputError(
                f"{where}: found {values[first]:.10g} (cell {cell}, gene {gene}), which is {what}, "
                f"as are {wrong.sum():,} of {values.size:,} stored values; expected raw counts "
                "(integers, 0 or more), not normalised or transformed ones"
            )


def check_names(names, where, what):
    """Names of genes, cells or cell types must be text that every format can hold.

    Raises:
        InputError: a name holds a NUL character or half a surrogate pair, or is no text.
    """
    for name in names:
        if not isinstance(name, str) or not is_plain_name(name):
            raise InputError(f"{where}: {what} {name!r} is no plain text, expected names")


def read_counts(path=EMBEDDED):
    """Read raw counts: the embedded set, a 10x folder, a 10x ``.h5`` or an ``.h5ad``.

    Gene symbols that occur more than once get the suffixes -1, -2, ... as scanpy does, so that
    no gene is lost.

    Returns:
        AnnData (cells x genes), ``.X`` CSR int32; ``.var["gene_ids"]`` is the other name of each
        gene: its id, or its symbol where the names are ids, or "" where the data has none.

    Raises:
        InputError: the file is missing, unreadable, of an unknown kind, or holds no raw counts.
    """
    if str(path) == EMBEDDED:
        return read_embedded()
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected counts for --data")
    read = (
        read_10x_folder
        if path.is_dir()
        else {".h5": read_10x_h5, ".h5ad": read_h5ad}.get(path.suffix)
    )
    if read is None:
        raise InputError(f"{path}: expected a 10x folder, a 10x .h5 or an .h5ad file")
    with warnings.catch_warnings():  # repeated names are reported and mended below
        warnings.filterwarnings("ignore", message=".*names are not unique")
        adata = read(path)
    return check_cells(adata, path)


def check_cells(adata, path):
    """What every reader of cells owes its caller: genes alone, and names that are told apart.

    Args:
        adata: AnnData or BackedCells, as read. path: what messages name.

    Raises:
        InputError: no cells or genes, repeated barcodes, or names that are no plain text.
    """
    import anndata

    if adata.n_obs == 0 or adata.n_vars == 0:
        raise InputError(f"{path}: found {adata.n_obs} cells x {adata.n_vars} genes, expected some")
    if not adata.obs_names.is_unique:
        twice = adata.obs_names[adata.obs_names.duplicated()].unique()
        raise InputError(
            f"{path}: {len(twice)} barcodes occur more than once ({some(twice)}), expected one "
            "cell per barcode; add the sample's name to the barcodes when joining samples"
        )
    if "feature_types" in adata.var:  # antibodies, guides and the like are not genes
        gene = (adata.var["feature_types"] == "Gene Expression").to_numpy()
        if not gene.all():
            print(f"{path}: {np.sum(~gene)} features that are not gene expression left out")
            adata = adata[:, gene].copy()
    check_names(adata.var_names, path, "gene")
    check_names(adata.obs_names, path, "barcode")
    repeated = int(adata.var_names.duplicated().sum())
    if repeated:
        print(f"{path}: {repeated} repeated gene symbols told apart by a suffix (-1, -2, ...)")
        adata.var_names = anndata.utils.make_index_unique(adata.var_names)
    return adata


def read_embedded():
    """The 700 PBMCs of 10x's 68k set that ship inside scanpy, with their integer counts restored.

    The file keeps log1p(counts / n_counts * 1e4); the inverse is exact up to float32 rounding,
    which is checked for every value before it is rounded away.

    Raises:
        InputError: a restored value is not an integer, so the installed file is another one.
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


def find_one(folder, names):
    """The first of several file names, plain or gzipped, that exists in a folder."""
    for name in names:
        for candidate in (folder / f"{name}.gz", folder / name):
            if candidate.is_file():
                return candidate
    raise InputError(f"{folder}: no {' or '.join(names)} (plain or .gz), expected a 10x folder")


def read_10x_folder(folder):
    """Read a 10x folder: ``genes.tsv`` (Cell Ranger 2) or ``features.tsv.gz`` (3 and later)."""
    import anndata

    folder = Path(folder)
    matrix_file = find_one(folder, ["matrix.mtx"])
    barcode_file = find_one(folder, ["barcodes.tsv"])
    gene_file = find_one(folder, ["features.tsv", "genes.tsv"])
    barcodes = read_table(barcode_file, sep="\t", header=None)
    genes = read_table(gene_file, sep="\t", header=None)
    X = read_mtx(matrix_file, (len(genes), len(barcodes)), (gene_file.name, barcode_file.name))
    symbols = genes.iloc[:, min(1, genes.shape[1] - 1)]  # the second column, if there are two
    var = pd.DataFrame(index=pd.Index(symbols.to_list()))
    var["gene_ids"] = genes.iloc[:, 0].to_numpy()
    if genes.shape[1] > 2:
        var["feature_types"] = genes.iloc[:, 2].to_numpy()
    obs = pd.DataFrame(index=pd.Index(barcodes.iloc[:, 0].to_list()))
    X = check_counts(X.T, matrix_file, obs.index, var.index)
    return anndata.AnnData(X, obs=obs, var=var)


def read_10x_h5(path):
    """Read a 10x ``.h5`` of Cell Ranger 2 or later."""
    import h5py
    import scanpy

    try:
        check_hdf5(path)
        adata = scanpy.read_10x_h5(path, gex_only=False)
        # The counts once more: scanpy takes int32 for float32, which is exact to 2^24 only.
        with h5py.File(path) as file:
            group = file["matrix"] if "matrix" in file else next(iter(file.values()))
            parts = group["data"][:], adata.X.indices, adata.X.indptr
        adata.X = sp.csr_matrix(parts, shape=adata.shape)
    except InputError:
        raise
    except Exception as error:  # h5py and scanpy raise many kinds on a broken or foreign file
        raise InputError(f"{path}: not a readable 10x .h5 file ({one_line(error)})") from error
    adata.X = check_counts(adata.X, path, adata.obs_names, adata.var_names)
    return adata


def read_h5ad(path):
    """Read an ``.h5ad``; counts are taken from ``layers["counts"]``, else ``X``, else ``raw.X``."""
    import anndata

    try:
        check_hdf5(path)
        source = anndata.read_h5ad(path)
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(f"{path}: not a readable .h5ad file ({one_line(error)})") from error
    places = []
    if "counts" in source.layers:
        places.append(("layers['counts']", source.layers["counts"], source.var))
    if source.X is not None:
        places.append(("X", source.X, source.var))
    if source.raw is not None:
        places.append(("raw.X", source.raw.X, source.raw.var))
    if not places:
        raise InputError(f"{path}: found no matrix in it, expected raw counts in X")
    problem = None
    for name, X, var in places:
        try:
            X = check_counts(X, f"{path} ({name})", source.obs_names, var.index)
        except InputError as error:
            problem = problem or error
            continue
        if name != "X" or problem:
            print(f"{path}: raw counts taken from {name}")
        var = pd.DataFrame({"gene_ids": other_names(var)}, index=var.index)
        return anndata.AnnData(X, obs=source.obs.copy(), var=var)
    raise problem
