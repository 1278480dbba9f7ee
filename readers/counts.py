"""Raw counts of cells: the embedded dataset, a 10x folder, a 10x ``.h5`` or an ``.h5ad``."""

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

EMBEDDED = "pbmc68k_reduced"  # the dataset that ships with scanpy; needs no download

EMBEDDED_LABELS = "bulk_labels"  # its column of cell types

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
            raise InputError(
                f"{where}: found {values[first]:.10g} (cell {cell}, gene {gene}), which is "
                f"{problem}, as are {wrong.sum():,} of {values.size:,} stored values; expected raw "
                "counts (integers, 0 or more), not normalised or transformed ones"
            )


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


def check_cells(adata, path):
    """Keep genes alone, and check names.

    Args:
        adata: AnnData or BackedCells, as read. path: what messages name.

    Returns:
        The same cells without other features, such as antibodies. Repeated gene symbols get the
        suffixes -1, -2, ...

    Raises:
        InputError: there are no cells or no genes; barcodes repeat; or a name is not plain text.
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
        is_gene = (adata.var["feature_types"] == "Gene Expression").to_numpy()
        if not is_gene.all():
            print(f"{path}: {np.sum(~is_gene)} features that are not gene expression left out")
            adata = adata[:, is_gene].copy()
    check_names(adata.var_names, path, "gene")
    check_names(adata.obs_names, path, "barcode")
    n_repeated = int(adata.var_names.duplicated().sum())
    if n_repeated:
        print(f"{path}: {n_repeated} repeated gene symbols told apart by a suffix (-1, -2, ...)")
        adata.var_names = anndata.utils.make_index_unique(adata.var_names)
    return adata


# ------------------------------------------------------------------------------- file formats


def read_counts(path=EMBEDDED):
    """Read raw counts: the embedded dataset, a 10x folder, a 10x ``.h5`` or an ``.h5ad``.

    Gene symbols that occur more than once get the suffixes -1, -2, ... as in scanpy, so that no
    gene is lost.

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
        raise InputError(f"{path}: no such file or folder; expected counts for --data")
    readers = {".h5": read_10x_h5, ".h5ad": read_h5ad}
    read = read_10x_folder if path.is_dir() else readers.get(path.suffix)
    if read is None:
        raise InputError(f"{path}: expected a 10x folder, a 10x .h5 or an .h5ad file")
    with warnings.catch_warnings():  # check_cells reports repeated names and adds suffixes
        warnings.filterwarnings("ignore", message=".*names are not unique")
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


def find_one(folder, names):
    """The first of several file names, gzipped or plain, that exists in a folder.

    Raises:
        InputError: there is none.
    """
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
    symbols = genes.iloc[:, min(1, genes.shape[1] - 1)]  # a lone column has the symbols
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
    """Read an ``.h5ad``; counts are ``layers["counts"]``, else ``X``, else ``raw.X``."""
    import anndata

    try:
        check_hdf5(path)
        source = anndata.read_h5ad(path)
    except InputError:
        raise
    except Exception as error:  # as in read_10x_h5
        raise InputError(f"{path}: not a readable .h5ad file ({one_line(error)})") from error
    matrices = []
    if "counts" in source.layers:
        matrices.append(("layers['counts']", source.layers["counts"], source.var))
    if source.X is not None:
        matrices.append(("X", source.X, source.var))
    if source.raw is not None:
        matrices.append(("raw.X", source.raw.X, source.raw.var))
    X, var = first_counts(matrices, check_counts, source.obs_names, path)
    return anndata.AnnData(X, obs=source.obs.copy(), var=var)


def first_counts(matrices, check, cells, path):
    """The first matrix of an ``.h5ad`` that holds raw counts.

    Args:
        matrices: iterable of (name, matrix, table of its genes). check: called as
            :func:`check_counts`; returns the counts. cells: names (N). path: of the file.

    Returns:
        The counts (N x G), and a table (G rows) of ``gene_ids`` as in :func:`read_counts`.

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
        return X, pd.DataFrame({"gene_ids": other_names(var)}, index=var.index)
    raise problem or InputError(f"{path}: found no matrix in it, expected raw counts in X")
