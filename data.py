"""The dataset: its settings, its cells, and which of them are held out.

Cells travel through the project as a :class:`Reference`.
"""

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from readers.backed import BackedCounts, read_backed
from readers.count_checks import check_names
from readers.counts import EMBEDDED, read_counts
from readers.labels import LABEL_FILE, natural_order, read_labels, type_columns
from readers.samples import GROUPS, read_samples
from runtime.errors import InputError, some
from runtime.flags import check_least, flag
from runtime.script import check_settings

if TYPE_CHECKING:  # slow to import, and --help has to answer at once
    import anndata

CHUNK = 4096  # cells of a matrix that are in memory at a time, as floats
TABLES = Path(__file__).with_name("tables")  # of published data
DEPTH = 1e4  # counts per cell or bulk after depth normalisation, as scanpy has it


@dataclass
class CellSettings:
    """What every script needs to know about the dataset; edit here for your own."""

    data: str = EMBEDDED
    """Reference cells: a 10x folder (matrix.mtx), a 10x .h5 or an .h5ad with raw counts. A folder
    above just one 10x folder will do, and one of several .mtx files in a folder names its matrix.
    """
    labels: str | None = None
    """Cell types: a column of .obs, a barcode,cell_type csv or tsv, or FILE:COLUMN for one column
    of a larger table. Default: barcode_to_celltype.csv beside the data, the column cell_type (if it
    holds names, not numbers), or the embedded dataset's own labels."""
    samples: str | None = None
    """Biological sample of each cell (donor x condition): a column of .obs, a barcode,sample csv or
    FILE:COLUMN. Default: all cells are of one sample."""
    weights: Path = Path("weights")
    """Folder of the models, which the trainings write and the other scripts read."""
    seed: int = 0
    """Seed of every random draw; on CPU the same seed gives the same result."""

    def __post_init__(self):
        check_settings(self)
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed: found {self.seed}, expected 0 to 4294967295")


@dataclass
class DatasetSettings(CellSettings):
    """And where its models are run."""

    device: str = "auto"
    """auto (CUDA if there is one, else CPU), cpu, cuda or cuda:N."""


@dataclass
class RunSettings(DatasetSettings):
    """What train.py shares with the three trainings."""

    held_out: float | None = None
    """Fraction of the cells of each type kept out of all training; with --samples, fraction of the
    donors. Chosen once, by the first training (0.2 if not given), saved with the models, and read
    back by the later ones."""
    donors: str | None = None
    """Donor of each cell, given as --samples is: samples of one donor are held out together.
    Default: each sample is a donor of its own."""
    held_out_donors: tuple[str, ...] = ()
    """Donors kept out of all training, by name, in place of a fraction of them."""
    conditions: str | None = None
    """Condition of each cell (treatment, disease), given as --samples is. What samples of the other
    conditions differ from the baseline by is what bulks can have of their state."""
    baseline: tuple[str, ...] = ()
    """Conditions that a bulk reads as which shows nothing else, such as control; the second is for
    batches without the first, and so on. Default: the most common one."""
    batch_key: str | None = None
    """Dataset or protocol of each cell, given as --samples is. What batches differ by at their
    baselines is no state, and the Bulk Encoder learns from it how platforms differ."""
    resume: bool = False
    """Go on with an interrupted run from its checkpoint in --weights, and end as it would have; a
    run that has ended is left as it is."""
    backed: bool = False
    """Leave the counts in the .h5ad and read them block by block, for references larger than
    memory. Variable genes and pseudobulks then come from as many cells as fit into 0.4 GB."""
    checkpoint_every: float = 60
    """Seconds between checkpoints; a run that is killed loses no more training than this."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.checkpoint_every < float("inf"):
            found = self.checkpoint_every
            raise InputError(f"--checkpoint-every: found {found}, expected 0 or more seconds")
        if self.held_out is not None and not 0 <= self.held_out < 1:
            raise InputError(f"--held-out: found {self.held_out}, expected 0 or more, below 1")
        for name in ("donors", "held_out_donors", "conditions", "batch_key"):
            if getattr(self, name) and self.samples is None:
                raise InputError(f"{flag(name)}: found no --samples, expected them as well")
        if self.baseline and self.conditions is None:
            raise InputError("--baseline: found no --conditions, expected them as well")
        if self.held_out_donors and self.held_out is not None:
            raise InputError("--held-out-donors: found --held-out as well, expected one of them")


@dataclass
class TrainingSettings(RunSettings):
    """What the three trainings share; each adds how long it takes, its batches and its rate."""

    n_genes: int = 2000
    """Highly variable genes that scGMVAE and the Bulk Encoder read (scDecoder writes all genes)."""
    batch_size: int | None = None
    lr: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        check_least(self, ("n_genes", "epochs", "steps", "batch_size"))
        if not 0 < self.lr < float("inf"):
            raise InputError(f"--lr: found {self.lr}, expected a positive number")
        for name, low, high in (("dropout", 0, 1), ("weight_decay", 0, np.inf)):
            found = getattr(self, name, 0)  # not every training has them
            if not low <= found < high:
                raise InputError(
                    f"{flag(name)}: found {found}, expected {low} or more, below {high}"
                )


def shipped(path):
    """A path, or what bulk2sc ships under this name if nothing is there in the current folder."""
    path = Path(path)
    beside = Path(__file__).resolve().parent / path
    return beside if not path.exists() and beside.exists() else path


def library_size(X):
    """Total counts of each cell (N) of a matrix (N x G), sparse or backed."""
    return np.asarray(X.sum(axis=1)).ravel()


def sum_by_type(X, codes, n_types, function=lambda X: X, rows=None):
    """Sums over the cells of each type (K x G), float64; exact, as all summands are integers.

    Args:
        X: counts (N x G), CSR or backed. codes: types of these cells (n). function: of the counts
            (CSR), applied first. rows: the cells (n); all (N) if None.
    """
    rows = np.arange(X.shape[0]) if rows is None else rows
    total = np.zeros((n_types, X.shape[1]))
    for i in range(0, len(rows), CHUNK):  # a backed matrix is never in memory as a whole
        chunk, k = X[rows[i : i + CHUNK]], codes[i : i + CHUNK]
        one_hot = (np.ones(len(k)), (k, np.arange(len(k))))
        S = sp.csr_matrix(one_hot, shape=(n_types, len(k)))  # (K, n)
        total += (S @ function(chunk.astype(np.float64))).toarray()
    return total


def mean_counts(X, codes, n_types):
    """Mean counts of the cells of each type (K x G), float64; a type without cells gets zeros."""
    size = np.bincount(codes, minlength=n_types)
    return sum_by_type(X, codes, n_types) / np.maximum(size, 1)[:, None]


@dataclass
class Reference:
    """Single cells, what is known of each, and which of them no training sees."""

    cells: "anndata.AnnData"
    """Raw counts (N x G), CSR int32, or a BackedCells; ``.obs`` has sample, donor, condition and
    batch as far as the settings give them."""
    codes: np.ndarray | None = None
    """Cell types (N) int64: type k is component k of the mixture. None without labels."""
    cell_types: list | None = None
    """Their names (K), the name-to-code map of the run."""
    held_out: np.ndarray | None = None
    """Mask (N); None before the cells are split."""
    held_out_fraction: float = 0.0

    def __repr__(self):
        types = "" if self.cell_types is None else f" of {len(self.cell_types)} cell types"
        return f"Reference of {self.cells.n_obs:,} cells{types} x {self.cells.n_vars:,} genes"

    @classmethod
    def load(cls, settings, need_labels=True, found=True):
        """Read the cells that settings name; see :func:`load_cells`."""
        cells = load_cells(settings, need_labels, found)
        return cls.of(cells) if need_labels else cls(cells)

    @classmethod
    def of(cls, cells):
        """Labelled cells, whose codes are those of ``.obs["cell_type"]``, a categorical."""
        reference = cls(cells, cell_types=list(cells.obs["cell_type"].cat.categories))
        reference.codes = reference.codes_in("cell_type")
        return reference

    X = property(lambda self: self.cells.X, doc="Counts (N x G).")
    genes = property(lambda self: list(self.cells.var_names), doc="Names (G).")
    train = property(lambda self: np.flatnonzero(~self.held_out), doc="Indices of training cells.")
    test = property(lambda self: np.flatnonzero(self.held_out), doc="Indices of held-out cells.")
    test_codes = property(lambda self: self.codes[self.held_out], doc="Types of held-out cells.")
    has_samples = property(lambda self: "sample" in self.cells.obs)

    @cached_property
    def samples(self):
        """Names of the biological samples (S); without any, all cells are of one."""
        return list(self.cells.obs["sample"].cat.categories) if self.has_samples else ["all cells"]

    @cached_property
    def sample(self):
        """Codes of the sample of each cell (N) int64."""
        return self.codes_in("sample") if self.has_samples else np.zeros(self.cells.n_obs, np.int64)

    @cached_property
    def batch(self):
        """Codes of the batch of each cell (N) int64; None if there is one or none is given."""
        if "batch" not in self.cells.obs or self.cells.obs["batch"].nunique() == 1:
            return None
        return self.codes_in("batch")

    def codes_in(self, column):
        """Codes (N) int64 of a categorical column of ``.obs``."""
        return self.cells.obs[column].cat.codes.to_numpy().astype(np.int64)

    def by_sample(self, codes):
        """Codes (S) of the samples, of codes of cells (N) that are the same in all of a sample."""
        result = np.zeros(len(self.samples), np.int64)
        result[self.sample] = codes
        return result

    @property
    def names(self):
        """Sample, donor and, if given, condition and batch of each cell, lists (N) for digests."""
        known = ("sample", "donor", "condition", "batch")
        columns = [name for name in known if name in self.cells.obs]
        return [list(self.cells.obs[name].astype(str)) for name in columns]

    @property
    def metadata(self):
        """What each model's file keeps of the cells that it was trained on."""
        return {
            "cell_types": self.cell_types,
            "held_out": list(self.cells.obs_names[self.held_out]),
            "held_out_fraction": self.held_out_fraction,
        }

    def counts(self, genes, where, rows=None, report=False):
        """Counts of some cells (n x M) in a model's genes, and the mask (M) of those that it has.

        where: what messages name. rows: the cells, all if None. report: print how many of the genes
        it has, unless it is all.
        """
        X = self.X if rows is None else self.X[rows]  # all rows of a backed matrix stay on disk
        return align_genes(X, self.cells.var_names, genes, where, report)

    def split(self, settings, metadata=None, where=None):
        """Hold cells out, as settings say or as an earlier stage's file does.

        Args:
            settings: with ``held_out``, ``held_out_donors`` and ``seed``. metadata: what that file
                says, or None. where: the file.

        Raises:
            InputError: see :func:`choose_held_out`.
        """
        self.held_out, self.held_out_fraction = choose_held_out(
            self.cells, self.codes, settings, metadata, where
        )

    def subset(self, rows):
        """A Reference of some of the cells, in memory, of the same cell types."""
        return replace(
            self,
            cells=self.cells[rows].copy(),
            codes=self.codes[rows],
            held_out=self.held_out[rows],
        )

    def split_as(self, metadata, where):
        """The same cells with those held out that a model's file lists.

        Raises:
            InputError: see :func:`apply_split`.
        """
        return replace(self, held_out=apply_split(self.cells, metadata["held_out"], where))


def load_cells(settings, need_labels=True, found=True):
    """Read the reference: counts, and cell types in ``.obs["cell_type"]``.

    Unlabelled cells are counted and left out; so are cells without a single count. Without
    ``need_labels`` all cells with counts stay, and labels may be absent altogether. With ``found``
    the cell types that train_gmvae.py found without labels are the labels, if it wrote any.

    Returns:
        AnnData, with ``settings.backed`` a BackedCells; ``.obs["cell_type"]`` is categorical, its
        categories in natural order. ``.uns["source"]`` holds the path.

    Raises:
        InputError: see :func:`read_counts` and :func:`read_labels`; or no cell has a label.
    """
    backed = getattr(settings, "backed", False)  # a flag of the trainings alone
    adata = read_backed(settings.data) if backed else read_counts(settings.data)
    empty = library_size(adata.X) == 0
    if empty.any():
        print(f"{settings.data}: {empty.sum():,} cells without a single count left out")
        barcodes = list(adata.obs_names)
        adata = adata[~empty].copy()
        adata.uns["barcodes"] = barcodes  # which tables by barcode may still have
    if adata.n_obs == 0:
        raise InputError(f"{settings.data}: every count is zero, expected raw counts")
    adata.uns["source"] = str(settings.data)
    samples = read_samples(adata, settings)  # before columns of .obs are written
    if need_labels:
        adata = label_cells(adata, settings, settings.weights if found else None)
    else:
        print(f"{settings.data}: {adata.n_obs:,} cells x {adata.n_vars:,} genes")
    adata.uns.pop("barcodes", None)
    # Columns of these names would read as the samples of --samples, which are not given.
    names = ("sample", *GROUPS.values())
    adata.obs = adata.obs.drop(columns=[name for name in names if name in adata.obs])
    return adata if samples is None else add_samples(adata, samples, settings)


def report_names(adata):
    """Print how many genes have both a symbol and an id, as bulks may name them by either."""
    pairs = zip(adata.var_names, adata.var["gene_ids"], strict=True)
    single = [name for name, other in pairs if other in ("", name)]
    n, n_genes = adata.n_vars - len(single), adata.n_vars
    rest = f"; bulks must name {'the others' if n else 'genes'} as the data does ({some(single)})"
    rest = rest if single else ""
    print(f"{adata.uns['source']}: {n:,} of {n_genes:,} genes have a symbol and an id{rest}")


def add_samples(adata, samples, settings):
    """Keep the cells that have a sample, in ``.obs["sample"]``; the others are counted.

    Args:
        adata: AnnData or BackedCells. samples: of :func:`readers.samples.read_samples`, with a row
            for each of its cells, and maybe others.

    Returns:
        adata with categorical columns ``sample`` and ``donor``, and ``condition`` where known.

    Raises:
        InputError: no cell is left.
    """
    samples = samples.loc[adata.obs_names]
    known = samples["sample"].notna().to_numpy()
    if not known.any():
        raise InputError(f"--samples {settings.samples}: found no labelled cell with a sample")
    if not known.all():
        print(
            f"{settings.samples}: {np.sum(~known):,} of {adata.n_obs:,} cells have no sample and "
            "are left out"
        )
        adata, samples = adata[known].copy(), samples[known]
        if "cell_type" in adata.obs:  # a type may have lost all of its cells
            left = natural_order(adata.obs["cell_type"].astype(str))
            adata.obs["cell_type"] = adata.obs["cell_type"].cat.set_categories(left)
    for column in samples:
        names = natural_order(samples[column])
        check_names(names, settings.samples, column)
        adata.obs[column] = pd.Categorical(samples[column], categories=names)
    plural = {column: f"{column}s" for column in samples} | {"batch": "batches"}
    n = (f"{samples[column].nunique():,} {plural[column]}" for column in samples)
    print(f"{settings.data}: {', '.join(n)}")
    return adata


def label_cells(adata, settings, weights):
    """Keep the labelled cells, their type in ``.obs["cell_type"]``; the others are counted.

    Args:
        adata: AnnData or BackedCells. weights: folder that may hold found cell types, or None.

    Raises:
        InputError: see :func:`load_cells`.
    """
    labels = read_labels(adata, settings.data, settings.labels, weights)
    if labels is None:
        there = f", such as {some(named)}" if (named := type_columns(adata)) else ""
        raise InputError(
            f"{settings.data}: no cell types found; give --labels (a {LABEL_FILE} or a column of "
            f".obs{there}), made with scType.R, annotate.py or any other tool; or let "
            "train_gmvae.py find them, by --n-types"
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


# ------------------------------------------------------------------ genes and split


def align_genes(X, genes, wanted, where, report=True):
    """Reorder the columns of a matrix to a model's genes, by name; absent genes become zero.

    Args:
        X: CSR, dense or backed (n x G).
        genes: names of X's columns (G).
        wanted: the model's genes (M).
        where: what messages name.

    Returns:
        ``(X', measured)``: CSR or backed (n x M) and a boolean mask (M) of the genes that X has.

    Raises:
        InputError: not one gene is shared.
    """
    index = pd.Index(genes).get_indexer(wanted)  # (M), -1 where absent
    measured = index >= 0
    if not measured.any():
        raise InputError(
            f"{where}: none of its {len(genes):,} genes ({some(genes)}) is known to the model "
            f"({some(wanted)}); expected the gene names that the model was trained on"
        )
    if report and not measured.all():
        print(
            f"{where}: has {measured.sum():,} of the model's {len(wanted):,} genes "
            f"({measured.mean():.1%})"
        )
    # A selection matrix keeps sparse sparse: column j of S picks gene index[j].
    S = sp.csr_matrix(
        (np.ones(measured.sum(), X.dtype), (index[measured], np.flatnonzero(measured))),
        shape=(len(genes), len(wanted)),
    )
    if not isinstance(X, BackedCounts):
        X = sp.csr_matrix(X)
    return X @ S, measured


def log_normalise(X, dtype=np.float64):
    """log1p of counts per 10,000 by scanpy, the only log-normalisation of the project.

    Args:
        X: counts (N x G), CSR or dense. dtype: of the result; scanpy's default is float32.

    Returns:
        As X (N x G), in ``dtype``; a cell without counts stays all zero.
    """
    import anndata
    import scanpy

    cells = anndata.AnnData(X.astype(dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some cells have zero counts")  # they stay zero
        scanpy.pp.normalize_total(cells, target_sum=DEPTH)
    scanpy.pp.log1p(cells)
    return cells.X


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


def draw_donors(order, n, table):
    """The first n donors in an order, passing over those that training cannot do without.

    table: cells of each donor (index) and type (columns).
    """
    chosen, left = [], table.sum()
    for name in order:
        if len(chosen) < n and (left > table.loc[name]).all():
            chosen.append(name)
            left = left - table.loc[name]
    return chosen


def split_donors(cells, codes, settings):
    """Boolean mask (N) of the cells of held-out donors: those named, else a fraction of them.

    Of several donors at least one is held out unless the fraction is 0, and never all. Drawn are
    donors without whom each cell type still has cells; if all of them are needed, none is.

    Args:
        cells: with ``.obs["donor"]``. codes: cell types (N). settings: with ``held_out``,
            ``held_out_donors`` and ``seed``.

    Raises:
        InputError: a name is no donor's, or no cell (of some type) would be left for training.
    """
    donor = cells.obs["donor"].astype(str).to_numpy()
    donors = natural_order(donor)
    chosen = list(dict.fromkeys(settings.held_out_donors))
    if unknown := [name for name in chosen if name not in donors]:
        raise InputError(
            f"--held-out-donors: found {some(unknown)}, expected names of donors, which are "
            f"{some(donors, 12)}"
        )
    if not chosen:
        fraction = 0.2 if settings.held_out is None else settings.held_out
        n = min(max(round(fraction * len(donors)), int(fraction > 0)), len(donors) - 1)
        order = np.random.default_rng(settings.seed).permutation(donors)
        chosen = draw_donors(order, n, pd.crosstab(donor, codes))
    mask = np.isin(donor, chosen)
    if len(lost := np.setdiff1d(codes, codes[~mask])):
        cell_type = "any type"  # none is known yet
        if codes.any():
            cell_type = cells.obs["cell_type"].iloc[np.flatnonzero(codes == lost[0])[0]]
        raise InputError(
            f"--held-out-donors: every cell of {cell_type} is of the held-out donors "
            f"({some(chosen)}), expected some of each cell type for training"
        )
    return mask


def choose_held_out(cells, codes, settings, metadata=None, where=None):
    """Mask (N) of held-out cells and their fraction: as an earlier stage saved it, or drawn now.

    With several donors whole donors are held out (:func:`split_donors`), else a fraction of the
    cells of each type.

    Args:
        cells: AnnData (N cells). codes: cell types (N). settings: with ``held_out`` and ``seed``.
        metadata: what an earlier stage's file says besides its weights, or None. where: the file.

    Raises:
        InputError: the file belongs to other cells, or the settings contradict it.
    """
    by_donor = "donor" in cells.obs and cells.obs["donor"].nunique() > 1
    if metadata is None:
        if by_donor:
            mask = split_donors(cells, codes, settings)
            names = natural_order(cells.obs["donor"][mask].astype(str))
            n_donors = cells.obs["donor"].nunique()
            print(f"held out: {len(names)} of {n_donors} donors ({some(names, 12)})")
            return mask, float(mask.mean())
        fraction = 0.2 if settings.held_out is None else settings.held_out
        return split_cells(codes, fraction, settings.seed), fraction
    fraction = metadata["held_out_fraction"]
    if settings.held_out not in (None, fraction) and not by_donor:
        raise InputError(
            f"--held-out {settings.held_out:g}: {where} was trained with {fraction:g} of the cells "
            "held out; expected the same, or none given, or stage 1 trained again"
        )
    mask = apply_split(cells, metadata["held_out"], where)
    if by_donor and (settings.held_out_donors or settings.held_out is not None):
        asked = split_donors(cells, codes, settings)
        same = (asked == mask).all()
        if not settings.held_out_donors:  # another seed draws other donors, but as many
            same = len(set(cells.obs["donor"][asked])) == len(set(cells.obs["donor"][mask]))
        if not same:
            raise InputError(
                f"{where} was trained with other donors held out; expected the same, or none "
                "given, or stage 1 trained again"
            )
    return mask, fraction
