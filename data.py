"""Where the data is and how it is read: counts, labels, gene alignment, split, pseudobulks.

Cells travel through the project as an ``anndata.AnnData`` with raw integer counts in ``.X``
(cells x genes, CSR, int32) and, once labelled, ``.obs["cell_type"]`` as a categorical whose
categories are the one name-to-code map of the run: code k is mixture component k.
"""

import contextlib
import csv
import itertools
import os
import re
import sys
import time
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import tyro

from files import (
    MOST_COLUMNS,
    UNREADABLE,
    InputError,
    Stopped,
    catch_signals,
    check_hdf5,
    check_memory,
    one_line,
    open_bounded,
    plain,
    read_table,
    some,
)

EMBEDDED = "pbmc68k_reduced"  # the dataset that ships inside scanpy; needs no download
EMBEDDED_LABELS = "bulk_labels"  # its column of cell types
LABEL_FILE = "barcode_to_celltype.csv"  # what scType.R writes
# What train_gmvae.py writes without labels. Another name, as --weights may be the data's folder.
FOUND_FILE = "found_celltypes.csv"
LABEL_COLUMN = "cell_type"  # looked for in .obs when --labels is not given
# Cells with one of these names (in any case) are unlabelled.
NO_LABEL = {"", "unknown", "unassigned", "nan", "na", "n/a", "none", "null"}
# Where an .h5ad keeps the other name of each gene: ids of symbols, and symbols of ids.
ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl", "ENSEMBL", "feature_id")
SYMBOL_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "symbol", "gene_name")


@dataclass
class DatasetSettings:
    """What every script needs to know about the dataset; edit here for a custom one."""

    data: str = EMBEDDED
    """Reference cells: a 10x folder (matrix.mtx), a 10x .h5 or an .h5ad with raw counts."""
    labels: str | None = None
    """Cell types: a barcode,cell_type csv or a column of .obs. Default: barcode_to_celltype.csv
    beside the data, the column cell_type, or the embedded dataset's own labels."""
    weights: Path = Path("weights")
    """Folder the models are read from and written to."""
    seed: int = 0
    """Seed of every random draw; on CPU the same seed gives the same result."""
    device: str = "auto"
    """auto (CUDA if there is one, else CPU), cpu, cuda or cuda:N."""

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed: found {self.seed}, expected 0 to 4294967295")


@dataclass
class TrainingSettings(DatasetSettings):
    """What the three trainings share; each adds its own epochs, batch size and learning rate."""

    n_genes: int = 2000
    """Highly variable genes that scGMVAE and the Bulk Encoder read (scDecoder writes all genes)."""
    held_out: float | None = None
    """Fraction of the cells of each type kept out of all training. Chosen once, by the first
    training (0.2 if not given), saved with the models, and read back by the later ones."""
    epochs: int = 1
    batch_size: int = 128
    lr: float = 1e-3
    resume: bool = False
    """Go on with an interrupted run from its checkpoint in --weights, and end as it would have; a
    run that has ended is left as it is."""
    backed: bool = False
    """Leave the counts in the .h5ad and read them block by block, for more cells than fit into
    memory. Variable genes and pseudobulks then come from as many cells as fit into 0.4 GB."""
    checkpoint_every: float = 60
    """Seconds between checkpoints: killed at any moment, a run loses no more training than this."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("n_genes", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                found = getattr(self, name)
                raise InputError(f"{flag(name)}: found {found}, expected 1 or more")
        if not 0 <= self.checkpoint_every < float("inf"):
            found = self.checkpoint_every
            raise InputError(f"--checkpoint-every: found {found}, expected 0 or more seconds")
        if not 0 < self.lr < float("inf"):
            raise InputError(f"--lr: found {self.lr}, expected a positive number")
        for name, low, high in (("dropout", 0, 1), ("weight_decay", 0, np.inf)):
            found = getattr(self, name, 0)  # not every training has them
            if not low <= found < high:
                raise InputError(
                    f"{flag(name)}: found {found}, expected {low} or more, below {high}"
                )
        if self.held_out is not None and not 0 <= self.held_out < 1:
            raise InputError(f"--held-out: found {self.held_out}, expected 0 or more, below 1")


def flag(field_name):
    """The command-line spelling of a settings field."""
    return "--" + field_name.replace("_", "-")


@contextlib.contextmanager
def silence():
    """Print nothing."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def parse(settings_class):
    """Settings from the command line; of the processes of torchrun, the first says what is wrong.

    Raises:
        InputError: a value is out of range. SystemExit: after --help or an unknown flag.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0":
        return tyro.cli(settings_class)
    try:
        with silence():
            return tyro.cli(settings_class)
    except (InputError, SystemExit) as end:
        time.sleep(1)  # torchrun ends all when the first of them has ended
        sys.exit(getattr(end, "code", 1))


def run_script(main, settings_class):
    """Parse the command line, then run ``main(settings)``; what goes wrong ends in one line.

    Exit status 1 for bad input, a full disk or too little memory; 128 + its number for a signal.
    """
    try:
        with catch_signals():
            main(parse(settings_class))
    except InputError as error:
        sys.exit(f"error: {plain(error)}")
    except OSError as error:  # no such file, no permission, disk full: the system's own words do
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {plain(where)}{plain(error.strerror or error)}")
    except MemoryError as error:
        sys.exit(f"error: not enough memory ({plain(error) or 'none left'})")
    except RuntimeError as error:  # how torch says it, on CPU and on a GPU
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        sys.exit(f"error: not enough memory ({plain(one_line(error))}); a smaller --batch-size?")
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)


def plain_settings(settings):
    """Settings as a dict of plain values, to be saved with a model or a result."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


# ---------------------------------------------------------------------------- reading counts


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


def is_plain_name(text):
    """Whether a text has no NUL character and can be written as UTF-8."""
    if "\0" in text:
        return False
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_counts(path=EMBEDDED, backed=False):
    """Read raw counts: the embedded set, a 10x folder, a 10x ``.h5`` or an ``.h5ad``.

    ``backed``: the counts stay in the file, which is an ``.h5ad``.

    Gene symbols that occur more than once get the suffixes -1, -2, ... as scanpy does, so that
    no gene is lost.

    Returns:
        AnnData (cells x genes), ``.X`` CSR int32; ``.var["gene_ids"]`` is the other name of each
        gene: its id, or its symbol where the names are ids, or "" where the data has none. With
        ``backed`` a BackedCells instead.

    Raises:
        InputError: the file is missing, unreadable, of an unknown kind, or holds no raw counts.
    """
    import anndata

    if backed and Path(path).suffix != ".h5ad":
        raise InputError(f"--backed: found {path}, expected an .h5ad file for --data")
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
    if backed:
        from backed import read_backed as read
    if read is None:
        raise InputError(f"{path}: expected a 10x folder, a 10x .h5 or an .h5ad file")
    with warnings.catch_warnings():  # repeated names are reported and mended below
        warnings.filterwarnings("ignore", message=".*names are not unique")
        adata = read(path)
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


def read_mtx(path, shape, named_by):
    """Read a Matrix Market file (plain or .gz) of sparse counts as COO, float64.

    Not by scipy's reader, which some malformed lines crash. All of the header is checked before
    memory is set aside for what it says.

    Args:
        path: of the file. shape: genes and barcodes that there must be. named_by: the files of
            their names, for the message.

    Raises:
        InputError: unreadable, of another kind or shape, or an entry lies outside of the matrix.
    """
    broken = f"{path}: not a readable Matrix Market file"
    # Symmetric: scipy's writer says so of a matrix that happens to be.
    number, form = "(integer|unsigned-integer|real)", "(general|symmetric)"
    try:
        with open_bounded(path) as file:
            kind = " ".join(file.readline(1000).decode("ascii").lower().split())
            if not re.fullmatch(f"%%matrixmarket matrix coordinate {number} {form}", kind):
                raise InputError(
                    f"{path}: found {plain(kind)[:100]!r}, expected a sparse Matrix Market file: "
                    "%%MatrixMarket matrix coordinate integer general"
                )
            line, skip = file.readline(100_000), 2
            while line.startswith(b"%") or line.isspace():
                line, skip = file.readline(100_000), skip + 1
            n_rows, n_columns, n_entries = map(int, line.split())
    except UNREADABLE as error:
        raise InputError(f"{broken} ({one_line(error)})") from error
    if (n_rows, n_columns) != shape:
        raise InputError(
            f"{path}: found {n_rows} x {n_columns}, expected {shape[0]} genes ({named_by[0]}) x "
            f"{shape[1]} barcodes ({named_by[1]})"
        )
    # gzip shrinks to a thousandth at best, and an entry takes six bytes at least ("1 1 1" and a
    # line break).
    if not 0 <= n_entries <= 1032 * path.stat().st_size // 6:
        raise InputError(
            f"{path}: its header announces {n_entries:,} entries, which a file of its size cannot "
            "hold"
        )
    check_memory(24 * n_entries, path, "its entries")
    row, column = np.empty((2, n_entries), np.int32)
    value, at = np.empty(n_entries), 0
    options = {"sep": r"\s+", "header": None, "names": range(4), "index_col": False}
    # A fourth number in a line must show; a third that is missing does so by itself.
    options |= {"dtype": {0: np.int32, 1: np.int32, 2: np.float64, 3: str}, "quoting": 3}
    try:
        with open_bounded(path, 100_000 + 100 * n_entries) as file:
            for _ in range(skip):
                file.readline(100_000)
            if n_entries == 0:  # pandas would find no columns
                at = bool(file.read(1000).strip())
            for part in pd.read_csv(file, chunksize=1_000_000, **options) if n_entries else ():
                end = at + len(part)
                if end > n_entries or part[2].isna().any() or part[3].notna().any():
                    raise ValueError(f"expected {n_entries:,} lines of three numbers")
                row[at:end], column[at:end], value[at:end] = part[0], part[1], part[2]
                at = end
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{broken} ({one_line(error)})") from error
    if at != n_entries:
        raise InputError(f"{path}: found {at:,} entries or more, its header says {n_entries:,}")
    for own, most in ((row, n_rows), (column, n_columns)):
        if n_entries and not (own.min() >= 1 and own.max() <= most):
            raise InputError(f"{path}: an entry lies outside of the {n_rows} x {n_columns} matrix")
    if kind.endswith("symmetric"):
        twin = row != column
        row, column = np.append(row, column[twin]), np.append(column, row[twin])
        value = np.append(value, value[twin])
    return sp.coo_matrix((value, (row - 1, column - 1)), shape=shape)


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


def bare_id(name):
    """An Ensembl gene id without what may follow it: version, ``_PAR_Y``, ``_symbol``, ``|...``.

    Returns:
        str, or None if the name is no Ensembl gene id.
    """
    found = re.fullmatch(r"(ENS[A-Z]*G\d+)([._|].*)?", name)
    return found and found[1]


def other_names(var):
    """The other name of each gene of an ``.h5ad``: its Ensembl id, or its symbol if names are ids.

    Args:
        var: the file's ``.var`` (G), searched for ``ID_COLUMNS`` or ``SYMBOL_COLUMNS``.

    Returns:
        list of str (G), "" where there is none.
    """

    def mostly_ids(names):
        return sum(bare_id(name) is not None for name in names) > sum(map(bool, names)) / 2

    by_id = mostly_ids(list(var.index))
    for column in SYMBOL_COLUMNS if by_id else ID_COLUMNS:
        if column in var:
            names = ["" if pd.isna(name) else str(name) for name in var[column]]
            if mostly_ids(names) != by_id:  # else it says the same as the names, or something else
                return names
    return [""] * len(var)


# ------------------------------------------------------------------------------------ labels


def library_size(X):
    """Total counts of each cell (N) of a matrix (N x G), sparse or backed."""
    return X.library if is_backed(X) else np.asarray(X.sum(axis=1)).ravel()


def is_backed(X):
    """Whether a matrix is a BackedCounts, whose rows are read from the file when asked for."""
    return hasattr(X, "fingerprint")


def take(X, rows):
    """Rows of a matrix; of a backed one they stay in the file."""
    return X.only(rows) if is_backed(X) else X[rows]


def in_parts(X, most=4096):
    """All rows of a matrix, CSR or backed, some at a time: ``(positions, CSR)``."""
    for first in range(0, X.shape[0], most):
        rows = np.arange(first, min(first + most, X.shape[0]))
        yield rows, X[rows]


def sum_by_type(X, codes, n_types, function=lambda X: X):
    """Sums over the cells of each type (K x G), float64; exact, as all summands are integers.

    Args:
        X: counts (N x G), CSR or backed. codes: types (N). function: of the counts (CSR), applied
            first.
    """
    total = np.zeros((n_types, X.shape[1]))
    for rows, own in in_parts(X):
        ones = (np.ones(len(rows)), (codes[rows], np.arange(len(rows))))
        S = sp.csr_matrix(ones, shape=(n_types, len(rows)))
        total += (S @ function(own.astype(np.float64))).toarray()
    return total


def mean_counts(X, codes, n_types):
    """Mean counts of the cells of each type (K x G), float64; a type without cells gets zeros."""
    size = np.bincount(codes, minlength=n_types)
    return sum_by_type(X, codes, n_types) / np.maximum(size, 1)[:, None]


def natural_order(names):
    """Sort names so that '2' comes before '10', as people number their clusters.

    Regression: sorted as strings, codes came out as '0', '1', '10', '2'.
    """

    def key(name):
        parts = re.split(r"(\d+)", name)  # odd positions are the runs of digits
        return [(int(p), "") if i % 2 else (-1, p) for i, p in enumerate(parts)], name

    return sorted(set(names), key=key)


def clean_label(label):
    """A label as text without outer blanks, or None for missing, Unknown and their like."""
    if label is None or (isinstance(label, float) and np.isnan(label)) or label is pd.NA:
        return None
    label = str(label).strip()
    return None if label.lower() in NO_LABEL else label


def read_label_csv(path, barcodes):
    """Read ``barcode,cell_type`` with or without a header line.

    Args:
        path: the csv; further columns are allowed when the header names ``barcode`` and
            ``cell_type``.
        barcodes: the data's barcodes.

    Returns:
        Series of labels (str or None) indexed by the data's barcodes; None where there is none.

    Raises:
        InputError: no barcode of the file is in the data, or one has two different labels.
    """
    table = read_table(path, header=None)
    head = [str(c).strip().lower() for c in table.iloc[0]]
    if "barcode" in head and "cell_type" in head:
        table = table.iloc[1:, [head.index("barcode"), head.index("cell_type")]]
    elif table.shape[1] == 2:
        # Any other header is a row whose "barcode" no cell has, so it labels nothing.
        header = head[0] in ("barcode", "barcodes", "cell", "cell_id", "index", "")
        table = table.iloc[int(header) :]
    else:
        raise InputError(
            f"{path}: found {table.shape[1]} columns ({some(head)}), expected two, or a header "
            "with barcode and cell_type"
        )
    table.columns = ["barcode", "cell_type"]
    table = table.drop_duplicates()
    twice = table["barcode"][table["barcode"].duplicated()].unique()
    if len(twice):
        raise InputError(f"{path}: {len(twice)} barcodes have two different labels ({some(twice)})")
    given = table.set_index("barcode")["cell_type"]
    found = pd.Index(barcodes).isin(given.index)
    if not found.any():
        raise InputError(
            f"{path}: none of its {len(given)} barcodes ({some(given.index, 2)}) is in the data "
            f"({some(barcodes, 2)}); expected the barcodes of --data"
        )
    if not found.all():
        print(f"{path}: no label for {np.sum(~found):,} of {len(barcodes):,} cells")
    foreign = int((~given.index.isin(barcodes)).sum())
    if foreign:
        print(f"{path}: {foreign:,} labels are for barcodes that the data does not have")
    return given.reindex(barcodes)


def read_labels(adata, data, labels, weights=None):
    """Cell-type labels of every cell, by the rules in :class:`DatasetSettings`.

    Args:
        weights: folder that may hold the cell types that train_gmvae.py found without labels; they
            come before those of the data, as the models were trained on them.

    Returns:
        Series (str or None) in the order of ``adata.obs_names``, or None when ``labels`` is None
        and there are none to be found.

    Raises:
        InputError: ``labels`` is neither a file nor a column of ``.obs``.
    """
    if labels is None and weights is not None and (Path(weights) / FOUND_FILE).is_file():
        labels = str(Path(weights) / FOUND_FILE)
        print(f"{labels}: cell types found by train_gmvae.py")
    if labels is None:
        beside = Path(data) / LABEL_FILE if Path(data).is_dir() else Path(data).parent / LABEL_FILE
        if str(data) == EMBEDDED:
            labels = EMBEDDED_LABELS
        elif beside.is_file():
            labels = str(beside)
        elif LABEL_COLUMN in adata.obs:
            labels = LABEL_COLUMN
        else:
            return None
    if labels in adata.obs:
        series = adata.obs[labels].astype(object)
    elif Path(labels).is_file():
        series = read_label_csv(Path(labels), adata.obs_names)
    else:
        columns = f"has {some(adata.obs.columns, 8)}" if len(adata.obs.columns) else "is empty"
        raise InputError(f"--labels {labels}: neither a file nor a column of .obs, which {columns}")
    return series.map(clean_label).astype(object)


def load_cells(settings, need_labels=True, found=True):
    """Read the reference: counts, and cell types in ``.obs["cell_type"]``.

    Unlabelled cells are counted and left out; so are cells without a single count. Without
    ``need_labels`` all cells with counts stay, and labels may be absent altogether. ``found``: the
    cell types that train_gmvae.py found without labels count as labels, if it wrote any.

    Returns:
        AnnData, with ``settings.backed`` a BackedCells; ``.obs["cell_type"]`` is categorical, its
        categories in natural order, code k = mixture component k. ``.uns["source"]`` holds the
        path.

    Raises:
        InputError: see :func:`read_counts` and :func:`read_labels`; or no cell has a label.
    """
    adata = read_counts(settings.data, getattr(settings, "backed", False))
    empty = library_size(adata.X) == 0
    if empty.any():
        print(f"{settings.data}: {empty.sum():,} cells without a single count left out")
        adata = adata[~empty].copy()
    if adata.n_obs == 0:
        raise InputError(f"{settings.data}: every count is zero, expected raw counts")
    labels = None
    if need_labels:
        weights = settings.weights if found else None
        labels = read_labels(adata, settings.data, settings.labels, weights)
    adata.uns["source"] = str(settings.data)
    if not need_labels:
        print(f"{settings.data}: {adata.n_obs:,} cells x {adata.n_vars:,} genes")
        return adata
    if labels is None:
        raise InputError(
            f"{settings.data}: no cell types found; give --labels (a {LABEL_FILE} or a column of "
            ".obs), made with scType.R, annotate.py or any other tool; or let train_gmvae.py find "
            "them, by --n-types"
        )
    labelled = labels.notna().to_numpy()
    if not labelled.any():
        raise InputError(f"{settings.labels or settings.data}: found no cell with a cell type")
    if not labelled.all():
        print(
            f"{settings.data}: {np.sum(~labelled):,} of {adata.n_obs:,} cells are Unknown or "
            "unlabelled and left out"
        )
        adata = adata[labelled].copy()
    cell_types = natural_order(labels[labelled])
    check_names(cell_types, settings.labels or settings.data, "cell type")
    adata.obs["cell_type"] = pd.Categorical(labels[labelled], categories=cell_types)
    print(
        f"{settings.data}: {adata.n_obs:,} labelled cells x {adata.n_vars:,} genes, "
        f"{len(cell_types)} cell types"
    )
    return adata


def codes_of(adata):
    """Cell-type codes (N,) int64 and the names they stand for (K strings)."""
    cell_type = adata.obs["cell_type"].cat
    return cell_type.codes.to_numpy().astype(np.int64), list(cell_type.categories)


# ------------------------------------------------------------------ genes, split, pseudobulks


def align_genes(X, genes, wanted, where, report=True):
    """Reorder the columns of a matrix to a model's genes, by name; absent genes become zero.

    Args:
        X: CSR, dense or backed (n x G).
        genes: names of X's columns (G).
        wanted: the model's genes (M).
        where: what messages name.

    Returns:
        ``(X', present)``: CSR or backed (n x M) and a boolean mask (M) of the genes that X has.

    Raises:
        InputError: not one gene is shared.
    """
    at = pd.Index(genes).get_indexer(wanted)  # -1 where absent
    present = at >= 0
    if not present.any():
        raise InputError(
            f"{where}: none of its {len(genes):,} genes ({some(genes)}) is known to the model "
            f"({some(wanted)}); expected the gene names that the model was trained on"
        )
    if report and not present.all():
        print(
            f"{where}: has {present.sum():,} of the model's {len(wanted):,} genes "
            f"({present.mean():.1%})"
        )
    # A selection matrix keeps sparse sparse: column j of S picks gene at[j].
    S = sp.csr_matrix(
        (np.ones(present.sum(), X.dtype), (at[present], np.flatnonzero(present))),
        shape=(len(genes), len(wanted)),
    )
    if is_backed(X):
        return X.only(select=S), present
    return sp.csr_matrix(sp.csr_matrix(X) @ S), present


def choose_genes(adata, n_genes):
    """Names of the ``n_genes`` most variable genes, in the data's order (all, if there are fewer).

    By the variance of standardised counts around a fitted mean-variance trend (Stuart et al., Cell
    2019; scanpy's ``seurat_v3``): it works on raw counts and, unlike the older ranking by
    dispersion, does not favour genes seen in a handful of cells. Give it training cells only.

    Raises:
        InputError: the trend cannot be fitted.
    """
    if adata.n_vars <= n_genes:
        return list(adata.var_names)
    import scanpy

    counts = adata.copy()
    counts.X = counts.X.astype(np.float32)
    try:
        scanpy.pp.highly_variable_genes(counts, flavor="seurat_v3", n_top_genes=n_genes)
    except ValueError as error:  # loess on a handful of cells or genes
        raise InputError(
            f"--n-genes {n_genes}: variable genes could not be chosen from {adata.n_obs} cells "
            f"({one_line(error)}); expected more cells, or --n-genes {adata.n_vars} to use all"
        ) from error
    return list(adata.var_names[counts.var["highly_variable"]])


# Symbols of genes whose share of a library is the protocol's rather than the cells': proteins of
# the ribosome, the mitochondrial genome, and RNAs that stay in the nucleus (in any case, so that
# mouse is meant, too). Chu et al. (Nature Cancer 2022) leave them out of deconvolution as well.
PROTOCOL_GENES = re.compile(
    r"RP[LS]\d+(A|AL|L|X|Y)?\d*(P\d+)?(-\d+)?|RPLP[0-2]|RPSA|UBA52|FAU|MT-.+|MALAT1|NEAT1",
    re.IGNORECASE,
)


def choose_marker_genes(adata, codes, n_genes):
    """Names of the ``n_genes`` genes that tell the cell types apart best, in the data's order.

    By the variance of log-normalised expression between types over that within them (the F of an
    analysis of variance, up to a factor), with a floor so that a gene seen in one cell does not
    lead. Give it training cells only.

        F_g = Σ_k f_k (m_gk - m_g)² / (Σ_k f_k v_gk + 0.02)

    with f_k the share of cells of type k, m and v the mean and variance of log1p counts per 10,000.
    Genes by the name or the other name of ``PROTOCOL_GENES`` are not among them, unless those alone
    are left. codes: cell types (N).
    """
    names = zip(adata.var_names, adata.var["gene_ids"], strict=True)
    usable = np.array([not any(map(PROTOCOL_GENES.fullmatch, pair)) for pair in names])
    if usable.any():
        adata = adata[:, usable]
    if adata.n_vars <= n_genes:
        return list(adata.var_names)
    total = np.maximum(library_size(adata.X), 1)
    log = sp.csr_matrix(sp.diags(1e4 / total) @ adata.X)
    log.data = np.log1p(log.data)
    kinds, share = np.unique(codes, return_counts=True)
    share = share[:, None] / len(codes)  # (K, 1)
    parts = [log[np.flatnonzero(codes == k)] for k in kinds]
    mean = np.stack([np.asarray(p.mean(axis=0)).ravel() for p in parts])  # (K, G)
    square = np.stack([np.asarray(p.multiply(p).mean(axis=0)).ravel() for p in parts])
    between = (share * (mean - (share * mean).sum(axis=0)) ** 2).sum(axis=0)
    within = (share * (square - mean**2)).sum(axis=0)
    best = np.argsort(-between / (within + 0.02), kind="stable")[:n_genes]
    return list(adata.var_names[np.sort(best)])


def split_cells(codes, held_out, seed):
    """Boolean mask (N) of held-out cells: a fraction of each type, never a type's last cell."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(len(codes), bool)
    for k in np.unique(codes):
        cells = rng.permutation(np.flatnonzero(codes == k))
        mask[cells[: min(round(held_out * len(cells)), len(cells) - 1)]] = True
    return mask


def apply_split(adata, held_out_barcodes, where):
    """Mask (N) of the cells whose barcodes a model lists as held out.

    Raises:
        InputError: some of them are not in the data, so the model belongs to another dataset.
    """
    missing = pd.Index(held_out_barcodes).difference(adata.obs_names)
    if len(missing):
        raise InputError(
            f"{where}: {len(missing)} of its {len(held_out_barcodes)} held-out cells "
            f"({some(missing)}) are not in {adata.uns['source']}; expected weights of this dataset"
        )
    return adata.obs_names.isin(held_out_barcodes)


def choose_held_out(cells, codes, settings, card=None, where=None):
    """Mask (N) of held-out cells and the fraction: as an earlier stage saved it, else drawn now.

    Args:
        cells: AnnData (N cells). codes: cell types (N). settings: with ``held_out`` and ``seed``.
        card: what an earlier stage's file says besides its weights, or None. where: that file.

    Raises:
        InputError: the file belongs to other cells, or ``--held-out`` contradicts it.
    """
    if card is None:
        fraction = 0.2 if settings.held_out is None else settings.held_out
        return split_cells(codes, fraction, settings.seed), fraction
    fraction = card["held_out_fraction"]
    if settings.held_out not in (None, fraction):
        raise InputError(
            f"--held-out {settings.held_out:g}: {where} was trained with {fraction:g} of the cells "
            "held out; expected the same, or none given, or stage 1 trained again"
        )
    return apply_split(cells, card["held_out"], where), fraction


def draw_pseudobulks(X, codes, proportions, n_cells, rng, pool=None):
    """Sum randomly drawn cells into bulks of given expected composition.

    Cells of a type are drawn with replacement, so a rare type can fill a bulk.

    Args:
        X: counts (N x G), CSR; float32 if called often, as anything else is converted each time.
        codes: cell-type code of each cell (N).
        proportions: expected cell-type proportions of each bulk (n x K), rows summing to 1; a
            type with a positive proportion must have a cell.
        n_cells: cells per bulk (n).
        rng: numpy Generator.
        pool: how many cells of each type a bulk draws from (n), themselves drawn at random; its
            types then look a little different from those of the next bulk, as another donor's do.
            Default: all of them.

    Returns:
        ``(bulk, drawn)``: summed counts (n x G), float32, and the proportions of the cells that
        were really drawn (n x K), float32.
    """
    n, K = proportions.shape
    order = np.argsort(codes, kind="stable")
    size = np.bincount(codes, minlength=K)
    start = np.cumsum(size) - size
    drawn = rng.multinomial(n_cells, proportions)  # (n, K) cells of each type
    bulk_of = np.repeat(np.repeat(np.arange(n), K), drawn.ravel())
    type_of = np.repeat(np.tile(np.arange(K), n), drawn.ravel())
    if pool is None:
        within = (rng.random(len(type_of)) * size[type_of]).astype(np.int64)
    else:
        pools = (rng.random((n, K, max(pool))) * size[:, None]).astype(np.int64)
        member = (rng.random(len(type_of)) * np.asarray(pool)[bulk_of]).astype(np.int64)
        within = pools[bulk_of, type_of, member]
    cell = order[start[type_of] + within]
    S = sp.csr_matrix((np.ones(len(cell), np.float32), (bulk_of, cell)), shape=(n, len(codes)))
    bulk = np.asarray((S @ X.astype(np.float32, copy=False)).todense())
    return bulk, (drawn / np.maximum(drawn.sum(axis=1, keepdims=True), 1)).astype(np.float32)


def batch_bulks(X, batch_size, n, rng, part):
    """Sum batches of reference cells into bulks, reshuffling as often as ``n`` bulks need.

    Args:
        X: counts (N x G), CSR. batch_size: cells per bulk, at most N. n: number of bulks.
        part: how many to make at a time, which bounds the memory.

    Yields:
        ``(bulk, members)`` of the next bulks, ``part`` or what is left: summed counts (m x G)
        float32, and the cells of each (m x batch_size).
    """
    per_pass = X.shape[0] // batch_size  # a last, smaller batch is left for the next shuffle
    X = X.astype(np.float32, copy=False)
    drawn = np.zeros((0, batch_size), np.int64)
    for first in range(0, n, part):
        m = min(part, n - first)
        while len(drawn) < m:
            order = rng.permutation(X.shape[0])[: per_pass * batch_size]
            drawn = np.concatenate([drawn, order.reshape(per_pass, batch_size)])
        members, drawn = drawn[:m], drawn[m:]
        at = (np.repeat(np.arange(m), batch_size), members.ravel())
        S = sp.csr_matrix((np.ones(members.size, np.float32), at), shape=(m, X.shape[0]))
        yield (S @ X).toarray(), members


# ------------------------------------------------------------------------------ bulk samples


# Columns of numbers that stand beside the samples in tables of featureCounts, RSEM, Salmon, biomaRt
# and their like (in any case).
NOT_SAMPLES = {
    *("chr", "chrom", "chromosome", "seqname", "seqnames", "start", "end", "strand", "width"),
    *("length", "gene_length", "effective_length", "effectivelength", "eff_length"),
    *("entrez", "entrezid", "entrez_id", "entrezgene", "entrezgene_id", "entrez_gene_id"),
}
NO_VALUE = ("", "NA", "NaN", "nan")  # how tables write a cell in which nothing stands


def read_bulk_h5ad(path):
    """Bulk samples of an ``.h5ad`` (samples x genes) as a table like :func:`read_bulk_csv`'s.

    Genes are in rows; columns of text in ``.var`` stand beside the samples.
    """
    import anndata

    try:
        with warnings.catch_warnings():  # repeated genes are summed
            warnings.filterwarnings("ignore", message=".*names are not unique")
            check_hdf5(path)
            adata = anndata.read_h5ad(path)
    except InputError:
        raise
    except Exception as error:  # h5py and anndata raise many kinds on a broken file
        raise InputError(f"{path}: not a readable .h5ad file ({one_line(error)})") from error
    if adata.X is None:
        raise InputError(f"{path}: found no matrix in it, expected bulk samples in X")
    X = check_sparse(adata.X, path)
    X = X.toarray() if sp.issparse(X) else X
    text = adata.var.select_dtypes(exclude=["number", "bool"]).astype(str)
    return pd.concat([text, pd.DataFrame(X.T, adata.var_names, adata.obs_names)], axis=1)


def header_line(lines):
    """Which of a table's first lines is its header: no empty line, comment or size of a GCT.

    A line that begins with # is a comment unless it has as many fields as the line after it.
    """
    at = 0
    while at < len(lines) - 1:
        line, after = lines[at : at + 2]
        mark = max("\t,;", key=after.count)
        header = after[:1] != "#" and 0 < line.count(mark) == after.count(mark)
        if line.startswith(("#1.2", "#1.3")):  # GCT: the line after it holds its size
            at += 2
        elif line.strip("\t,; \r\n") and (line[0] != "#" or header):
            break
        else:
            at += 1
    return at


def read_bulk_csv(path):
    """A csv, tsv or GCT as it stands: the first column is the index, and all names are text."""
    try:
        with open_bounded(path) as file:
            longest = 100 * MOST_COLUMNS  # a file without line breaks is one line
            lines = [file.readline(longest).decode("utf-8-sig") for _ in range(20)]
        lines = list(itertools.takewhile(bool, lines))  # to the end of the file
        skip = header_line(lines)
        first, *below = *lines[skip:], ""
        below = next((line for line in below if line.strip()), "")

        def fields(mark):
            return [next(csv.reader([s], delimiter=mark), []) for s in (first, below)]

        def fit(mark):  # names may hold more commas than there are tabs
            try:
                header, row = map(len, fields(mark))
            except csv.Error:  # a field that is too long: another mark parts it
                return False, 0
            return row > 1 and row - header in (0, 1), first.count(mark)

        separator = max("\t,;", key=fit)
        header, row = fields(separator)
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable table ({one_line(error)})") from error
    if len(row) == len(header) + 1:  # R's write.table gives the row names no header
        header = ["", *header]
    if not header or len(row) > len(header):
        raise InputError(
            f"{path}: found {len(header)} names in its header ({some(header)}) and {len(row)} "
            "fields in the line below, expected a table"
        )
    table = read_table(
        path,
        sep=separator,
        header=None,  # pandas would rename repeated columns, but repeated genes are to be summed
        names=range(len(header)),
        skiprows=skip + 1,
        dtype={0: str},  # a sample named 001 stays 001
        low_memory=False,
        encoding="utf-8-sig",
    )
    return table.set_index(0).set_axis(header[1:], axis=1)


def is_annotation(table):
    """Which columns (C) of a bulk table tell something else than a sample's values, as a mask.

    Those named in ``NOT_SAMPLES``, and those of text without a single number.
    """
    mask = np.array([str(name).lower() in NOT_SAMPLES for name in table.columns], bool)
    for i in np.flatnonzero([dtype.kind not in "iuf" for dtype in table.dtypes]):
        text = table.iloc[:, i].astype(str)
        # Commas read as points: a sample with decimal commas must not pass for text.
        numbers = pd.to_numeric(text.str.replace(",", "."), errors="coerce")
        mask[i] |= numbers.isna().all() and not text.isin(NO_VALUE).all()
    return mask


def name_map(genes, gene_ids):
    """Every name that the genes of a model go by -> position in ``genes``.

    Names come before other names, each as it is and as :func:`bare_id`; of genes that share one,
    the first has it.
    """
    known = {}
    for names in (genes, map(bare_id, genes), gene_ids, map(bare_id, gene_ids)):
        for i, name in enumerate(names):
            if name:
                known.setdefault(name, i)
    return known


def find_genes(names, known):
    """Position of each name (G) in the model, -1 where unknown; ``known`` is a name_map."""
    return np.array([known.get(n, known.get(bare_id(n), -1)) for n in names], np.int64)


def n_found(at):
    """How many genes of the model are among the positions of :func:`find_genes`."""
    return len(np.unique(at[at >= 0]))


def check_bulk(values, where, samples, names):
    """The values of bulk samples as numbers, without the rows and columns that hold nothing.

    Args:
        values: (S x G), numbers or text. where: what messages name. samples (S), names (G):
            arrays of names; a nameless sample without values is none, as spreadsheets leave them.

    Returns:
        ``(X, filled, measured)``: float64 values of the samples ``filled`` (mask S) in the genes
        ``measured`` (mask G), those with a value in any sample.

    Raises:
        InputError: a value is not a number, not finite or negative; a sample is empty or none
            there; or two share a name.
    """
    X = pd.to_numeric(values.ravel(), errors="coerce").reshape(values.shape).astype(np.float64)
    nothing = np.isnan(X)
    filled = ~nothing.all(axis=1) | (samples != "")
    measured = ~nothing.all(axis=0)
    measured[~measured] = ~np.isin(values[:, ~measured].astype(str), NO_VALUE).all(axis=0)
    X, values = (a[filled][:, measured] for a in (X, values))
    samples, left_out, names = samples[filled], names[~measured], names[measured]
    if not len(samples):
        raise InputError(f"{where}: found no sample beside the genes, expected columns of numbers")
    if (left_out != "").any():
        print(f"{where}: {np.sum(left_out != ''):,} genes without any value left out")
    wrong = ~np.isfinite(X) | (X < 0) | (X > 1e15)  # a sum must stay a number, too
    if wrong.any():
        sample, gene = (int(i[0]) for i in np.nonzero(wrong))
        found = values[sample, gene]
        raise InputError(
            f"{where}: found {repr(found) if isinstance(found, str) else f'{found:g}'} (sample "
            f"{samples[sample]}, gene {names[gene]}), expected a number: counts, TPM or CPM, 0 to "
            "1e15"
        )
    twice = samples[pd.Index(samples).duplicated()]
    if len(twice):
        raise InputError(f"{where}: sample names occur more than once ({some(twice)})")
    empty = samples[X.sum(axis=1) < 1e-6]
    if len(empty):
        raise InputError(
            f"{where}: {len(empty)} of {len(samples)} samples are empty ({some(empty)}), expected "
            "counts in every sample"
        )
    return X, filled, measured


def read_bulk(path, genes, gene_ids=None):
    """Read bulk samples: csv, tsv or GCT (plain or .gz), or ``.h5ad``; genes in rows or in columns.

    A gene is found by its exact name, else by its Ensembl id without version; names of the same
    gene are summed. The orientation is the one in which more genes are found. Values may be
    counts, TPM or CPM: only ratios within a sample matter. Columns of annotation are left out;
    the one that names more of the model's genes than the first column does names the rows.

    Args:
        genes: the model's genes (M). gene_ids: their other names (M), "" where there is none.

    Returns:
        ``(X, present, samples)``: CSR float64 (samples x M), a mask (M) of the genes found, and
        the names of the samples.

    Raises:
        InputError: unreadable, no known gene, or as :func:`check_bulk`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected bulk samples for --bulk")
    if path.suffix.lower() in (".xlsx", ".xls"):
        raise InputError(f"{path}: found an Excel file, expected a table; export it as csv")
    table = (read_bulk_h5ad if path.suffix == ".h5ad" else read_bulk_csv)(path)
    gene_ids = genes if gene_ids is None else gene_ids
    known = name_map(genes, gene_ids)
    names, by_column = table.index, find_genes(table.columns, known)
    extra = is_annotation(table) & (by_column < 0)
    by_row, named_by = find_genes(names, known), None
    for i in np.flatnonzero(extra):
        column = table.iloc[:, i].astype(str)
        at = find_genes(column, known)
        if n_found(at) > n_found(by_row):
            names, by_row, named_by = column, at, table.columns[i]
    in_rows = n_found(by_row) > n_found(by_column)

    others = [o for gene, o in zip(genes, gene_ids, strict=True) if o not in ("", gene)]
    expected = some(genes) + (f", or {some(others)}" if others else "")
    if not in_rows and n_found(by_column) == 0:
        no_ids = "" if others else "; the weights hold no ids or other names of them"
        raise InputError(
            f"{path}: neither its rows ({some(table.index)}) nor its columns "
            f"({some(table.columns)}) are genes known to the model ({expected}{no_ids})"
        )
    if extra.any():
        print(
            f"{path}: {extra.sum():,} columns that are not {'samples' if in_rows else 'genes'} "
            f"left out ({some(table.columns[extra], 8)})"
        )
    values, columns = table.loc[:, ~extra].to_numpy(), table.columns[~extra]
    if in_rows:
        values, samples, at = values.T, columns, by_row
        if named_by is not None:
            print(f"{path}: gene names taken from column {named_by}")
    else:
        names, samples, at = columns, table.index, by_column[~extra]
    names, samples = np.array(names, object), np.array(samples, object)
    X, filled, measured = check_bulk(values, path, samples, names)
    samples, names, at = list(samples[filled]), names[measured], at[measured]

    use = np.flatnonzero(at >= 0)
    n, n_by_symbol = n_found(at), n_found(at[[bare_id(name) is None for name in names]])
    if len(use) > n:
        print(f"{path}: {len(use) - n:,} repeated genes summed")
    ways = ((n_by_symbol, "symbol"), (n - n_by_symbol, "Ensembl id"))
    ways = ", ".join(f"{number:,} by {way}" for number, way in ways if number)
    print(
        f"{path}: {len(samples):,} bulk samples x {len(names):,} genes; {n:,} of the model's "
        f"{len(genes):,} genes found ({100 * n / len(genes):.1f} %: {ways})"
    )
    if n < len(genes) / 2:
        print(
            f"warning: {path}: fewer than half of the model's genes found, so results will be "
            f"poor; expected names such as {expected}, found {some(names)}",
            file=sys.stderr,
        )
    S = sp.csr_matrix((np.ones(len(use)), (use, at[use])), shape=(len(at), len(genes)))
    present = np.zeros(len(genes), bool)
    present[at[use]] = True
    return sp.csr_matrix(X @ S), present, samples
