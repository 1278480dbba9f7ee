"""The dataset: its settings, cells, genes, split into training and held-out cells, pseudobulks.

Cells travel through the project as an ``anndata.AnnData`` with raw integer counts in ``.X``
(cells x genes, CSR, int32) and, once labelled, ``.obs["cell_type"]`` as a categorical whose
categories are the name-to-code map of the run: code k is mixture component k.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from readers.backed import BackedCounts, read_backed
from readers.counts import EMBEDDED, check_names, read_counts
from readers.labels import LABEL_FILE, natural_order, read_labels, type_columns
from readers.samples import GROUPS, read_samples
from runtime.errors import InputError, one_line, some
from runtime.flags import flag
from runtime.script import check_choices

CHUNK = 4096  # cells of a matrix that are in memory at a time, as floats
MOST_DENSE = 1 << 27  # counts of a reference that is summed as a dense matrix, half a GB
# Shares of the genes that a point of the mean-variance trend is fitted to: scanpy's, and wider ones
# for few cells, where a third of the genes has one and the same mean (a single count).
SPANS = (0.3, 0.5, 0.7, 0.9)
TABLES = Path(__file__).with_name("tables")  # of published data
DEPTH = 1e4  # counts per cell or bulk after depth normalisation, as scanpy has it


@dataclass
class DatasetSettings:
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
    """Folder the models are read from and written to."""
    seed: int = 0
    """Seed of every random draw; on CPU the same seed gives the same result."""
    device: str = "auto"
    """auto (CUDA if there is one, else CPU), cpu, cuda or cuda:N."""

    def __post_init__(self):
        check_choices(self)
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed: found {self.seed}, expected 0 to 4294967295")


@dataclass
class TrainingSettings(DatasetSettings):
    """What the three trainings share; each adds how long it takes, its batches and its rate."""

    n_genes: int = 2000
    """Highly variable genes that scGMVAE and the Bulk Encoder read (scDecoder writes all genes)."""
    held_out: float | None = None
    """Fraction of the cells of each type kept out of all training; with --samples, fraction of the
    donors. Chosen once, by the first training (0.2 if not given), saved with the models, and read
    back by the later ones."""
    donors: str | None = None
    """Donor of each cell, given as --samples is: samples of one donor are held out together.
    Default: each sample is a donor of its own."""
    held_out_donors: tuple[str, ...] = ()
    """Donors kept out of all training, by name, in place of a fraction of them."""
    batch_size: int | None = None
    lr: float = 1e-3
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
        for name in ("n_genes", "epochs", "steps", "batch_size"):
            found = getattr(self, name, None)  # a training has epochs or steps
            if found is not None and found < 1:
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
        for name in ("donors", "held_out_donors"):
            if getattr(self, name) and self.samples is None:
                raise InputError(f"{flag(name)}: found no --samples, expected samples of donors")
        if self.held_out_donors and self.held_out is not None:
            raise InputError("--held-out-donors: found --held-out as well, expected one of them")


def shipped(path):
    """A path, or what bulk2sc ships under this name if nothing is there in the current folder."""
    path = Path(path)
    beside = Path(__file__).resolve().parent / path
    return beside if not path.exists() and beside.exists() else path


# ------------------------------------------------------------------------------------ labels


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


def samples_of(adata):
    """Codes (N,) int64 of the biological sample of each cell and their names (S strings).

    Without samples, all cells are of one.
    """
    if "sample" not in adata.obs:
        return np.zeros(adata.n_obs, np.int64), ["all cells"]
    sample = adata.obs["sample"].cat
    return sample.codes.to_numpy().astype(np.int64), list(sample.categories)


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


def codes_of(adata):
    """Cell-type codes (N,) int64 and the names they stand for (K strings)."""
    cell_type = adata.obs["cell_type"].cat
    return cell_type.codes.to_numpy().astype(np.int64), list(cell_type.categories)


def donors_of(adata):
    """Code of the donor of each biological sample (S,)."""
    sample, donor = (adata.obs[name].cat.codes.to_numpy() for name in ("sample", "donor"))
    donors = np.zeros(len(adata.obs["sample"].cat.categories), np.int64)
    donors[sample] = donor
    return donors


def batches_of(adata):
    """Code of the batch of each cell (N,); None if there is one or none is given."""
    if "batch" not in adata.obs or adata.obs["batch"].nunique() == 1:
        return None
    return adata.obs["batch"].cat.codes.to_numpy().astype(np.int64)


def batches_of_samples(adata):
    """Code of the batch of each biological sample (S,); None as of :func:`batches_of`."""
    batch = batches_of(adata)
    if batch is None:
        return None
    sample, names = samples_of(adata)
    of_sample = np.zeros(len(names), np.int64)
    of_sample[sample] = batch  # cells of a sample are of one
    return of_sample


def sample_names(adata):
    """Sample, donor and, if given, batch of each cell, lists (N) for digests; none without samples.

    Conditions are not among them, as no training reads them.
    """
    names = ("sample", "donor", "batch")
    return [list(adata.obs[name].astype(str)) for name in names if name in adata.obs]


# ------------------------------------------------------------------ genes, split, pseudobulks


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


def choose_genes(adata, n_genes):
    """Names of the ``n_genes`` most variable genes, in the data's order (all, if there are fewer).

    Ranked by the variance of standardised counts around a fitted mean-variance trend (Stuart et
    al., Cell 2019; scanpy's ``seurat_v3``). It works on raw counts and, unlike the older ranking by
    dispersion, does not favour genes detected in a handful of cells. Give it training cells only.
    The first of SPANS with which the trend can be fitted is taken; few cells need a wide one.

    Raises:
        InputError: the trend cannot be fitted.
    """
    if adata.n_vars <= n_genes:
        return list(adata.var_names)
    import scanpy

    counts = adata.copy()
    counts.X = counts.X.astype(np.float32)
    for span in SPANS:
        try:
            scanpy.pp.highly_variable_genes(
                counts, flavor="seurat_v3", n_top_genes=n_genes, span=span
            )
        except ValueError as error:  # of loess: too few different means within the span
            failure = error
        else:
            return list(adata.var_names[counts.var["highly_variable"]])
    raise InputError(
        f"{n_genes:,} variable genes could not be chosen from {adata.n_obs} cells x "
        f"{adata.n_vars:,} genes ({one_line(failure)}); expected more cells"
    ) from failure


# Symbols of genes whose share of a library is the protocol's rather than the cells': proteins of
# the ribosome, the mitochondrial genome, and RNAs that stay in the nucleus (in any case, so that
# mouse is meant, too). Chu et al. (Nature Cancer 2022) leave them out of deconvolution as well.
PROTOCOL_GENES = re.compile(
    r"RP[LS]\d+(A|AL|L|X|Y)?\d*(P\d+)?(-\d+)?|RPLP[0-2]|RPSA|UBA52|FAU|MT-.+|MALAT1|NEAT1",
    re.IGNORECASE,
)

# Ribosomal, mitochondrial and housekeeping genes, which mark no cell type.
HOUSEKEEPING = re.compile(
    r"(MT-|MT(RNR|ND|CO|ATP)\d|M?RP[LS]\d|RPLP\d|RPSA|MRP[LS]|(FTL|FTH1|MALAT1|NEAT1|B2M|TMSB4X|"
    r"TMSB10|ACTB|ACTG1|EEF1A1|EEF1B2|EEF2|TPT1|GAPDH|UBC|UBB|PTMA|FAU|UBA52|TUBA1B|HSP90AB1)$)",
    re.IGNORECASE,
)


def choose_marker_genes(adata, codes, n_genes, batch=None):
    """Names of the ``n_genes`` genes that best tell the cell types apart, in the data's order.

    Ranked by the variance of log-normalised expression between types over that within them (the F
    of an analysis of variance, up to a factor), with a floor so that a gene detected in one cell
    does not rank first. Give it training cells only.

        F_g = Σ_k f_k (m_gk - m_g)² / (Σ_k f_k v_gk + 0.02)

    with f_k the share of cells of type k, m and v the mean and variance of log1p counts per 10,000.
    With batches it is the geometric mean of (F + 0.05) over them, so that genes must tell types
    apart in each, and all types of a batch count the same. ``PROTOCOL_GENES`` (by name or other
    name) are not among them, unless no others are left. codes: cell types (N). batch: of the cells
    (N), or None.
    """
    usable = ~is_protocol_gene(adata)
    if usable.any():
        adata = adata[:, usable]
    if adata.n_vars <= n_genes:
        return list(adata.var_names)
    log = log_normalise(adata.X)
    if batch is None:
        rank = type_variance(log, codes)
    else:
        parts = (np.flatnonzero(batch == b) for b in np.unique(batch))
        each = [type_variance(log[rows], codes[rows], even=True) for rows in parts]
        rank = np.log(np.stack(each) + 0.05).mean(axis=0)
    best = np.argsort(-rank, kind="stable")[:n_genes]
    return list(adata.var_names[np.sort(best)])


def is_protocol_gene(adata):
    """Mask (G) of the genes that are ``PROTOCOL_GENES`` by name or other name."""
    names = zip(adata.var_names, adata.var["gene_ids"], strict=True)
    return np.array([any(map(PROTOCOL_GENES.fullmatch, pair)) for pair in names])


def type_variance(log, codes, even=False):
    """F (G) of :func:`choose_marker_genes`; log (N x G), codes (N); even: f_k is 1 / K."""
    types, share = np.unique(codes, return_counts=True)
    share = share[:, None] / len(codes)  # (K, 1)
    if even:
        share = np.full_like(share, 1 / len(types))
    parts = [log[np.flatnonzero(codes == k)] for k in types]
    mean = np.stack([np.asarray(p.mean(axis=0)).ravel() for p in parts])  # (K, G)
    square = np.stack([np.asarray(p.multiply(p).mean(axis=0)).ravel() for p in parts])
    between = (share * (mean - (share * mean).sum(axis=0)) ** 2).sum(axis=0)
    within = (share * (square - mean**2)).sum(axis=0)
    return between / (within + 0.02)


def choose_state_genes(adata, codes, sample, n_genes, batch=None):
    """Names of the ``n_genes`` genes that differ most between samples inside the cell types.

        F_g = Σ_sk n_sk ( (m_skg - m_kg)² - v_skg / n_sk ) / Σ_sk n_sk (v_skg + 0.02)

    over samples s and types k with two cells or more, with m and v the mean and variance of log1p
    counts per 10,000; what sampled cells alone would differ by is taken off. ``PROTOCOL_GENES`` are
    not among them. Give it training cells only.

    Args:
        codes, sample: type and sample of each cell (N). batch: of each cell (N), or None; with
            batches m_kg is the mean in the sample's batch.
    """
    log = log_normalise(adata.X)
    above, below = np.zeros(adata.n_vars), np.zeros(adata.n_vars)
    group = codes if batch is None else codes * (batch.max() + 1) + batch
    for k in np.unique(group):
        of_type = np.flatnonzero(group == k)
        mean = np.asarray(log[of_type].mean(axis=0)).ravel()
        for s in np.unique(sample[of_type]):
            part = log[of_type[sample[of_type] == s]]
            if (n := part.shape[0]) < 2:
                continue
            m = np.asarray(part.mean(axis=0)).ravel()
            v = np.asarray(part.multiply(part).mean(axis=0)).ravel() - m**2
            above += n * (m - mean) ** 2 - v
            below += n * (v + 0.02)
    F = np.where(is_protocol_gene(adata), -np.inf, above / np.maximum(below, 1e-9))
    best = np.argsort(-F, kind="stable")[:n_genes]
    return list(adata.var_names[np.sort(best[F[best] > 0])])


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


def choose_held_out(cells, codes, settings, card=None, where=None):
    """Mask (N) of held-out cells and their fraction: as an earlier stage saved it, or drawn now.

    With several donors whole donors are held out (:func:`split_donors`), else a fraction of the
    cells of each type.

    Args:
        cells: AnnData (N cells). codes: cell types (N). settings: with ``held_out`` and ``seed``.
        card: what an earlier stage's file says besides its weights, or None. where: that file.

    Raises:
        InputError: the file belongs to other cells, or the settings contradict it.
    """
    by_donor = "donor" in cells.obs and cells.obs["donor"].nunique() > 1
    if card is None:
        if by_donor:
            mask = split_donors(cells, codes, settings)
            names = natural_order(cells.obs["donor"][mask].astype(str))
            n_donors = cells.obs["donor"].nunique()
            print(f"held out: {len(names)} of {n_donors} donors ({some(names, 12)})")
            return mask, float(mask.mean())
        fraction = 0.2 if settings.held_out is None else settings.held_out
        return split_cells(codes, fraction, settings.seed), fraction
    fraction = card["held_out_fraction"]
    if settings.held_out not in (None, fraction) and not by_donor:
        raise InputError(
            f"--held-out {settings.held_out:g}: {where} was trained with {fraction:g} of the cells "
            "held out; expected the same, or none given, or stage 1 trained again"
        )
    mask = apply_split(cells, card["held_out"], where)
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
        pool: number of cells of each type that a bulk draws from (n), themselves drawn at random,
            so that its types differ a little from those of the next bulk, as another donor's do.
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
    total = cell_sums(X)
    drawn = np.zeros((0, batch_size), np.int64)
    for first in range(0, n, part):
        m = min(part, n - first)
        n_passes = max(0, -(-(m - len(drawn)) // per_pass))
        orders = (rng.permutation(X.shape[0])[: per_pass * batch_size] for _ in range(n_passes))
        drawn = np.concatenate([drawn, *(order.reshape(per_pass, batch_size) for order in orders)])
        members, drawn = drawn[:m], drawn[m:]
        yield total(members), members


def cell_sums(X):
    """A function that sums cells of a matrix: indices (m x n) -> counts (m x G) float32.

    A reference that is small enough is made dense once, because torch sums dense rows several times
    faster than scipy multiplies sparse matrices. X: counts (N x G), CSR.
    """
    import torch

    X = X.astype(np.float32, copy=False)
    if X.shape[0] * X.shape[1] <= MOST_DENSE:
        dense = torch.from_numpy(X.toarray())
        return lambda members: torch.nn.functional.embedding_bag(
            torch.from_numpy(members), dense, mode="sum"
        ).numpy()

    def total(members):
        index = (np.repeat(np.arange(len(members)), members.shape[1]), members.ravel())
        S = sp.csr_matrix((np.ones(members.size, np.float32), index), (len(members), X.shape[0]))
        return (S @ X).toarray()

    return total


def batch_bulks_of_samples(X, sample, batch_size, n, rng, part):
    """As :func:`batch_bulks`, but all cells of a bulk are of one biological sample.

    Each bulk is of a sample drawn by its number of cells, and its cells are drawn from that sample
    without replacement. sample: of each cell (N); samples of fewer than batch_size cells are not
    drawn.
    """
    total, sizes = cell_sums(X), np.bincount(sample)
    share = np.where(sizes >= batch_size, sizes, 0) / sizes[sizes >= batch_size].sum()
    cells = [np.flatnonzero(sample == s) for s in range(len(sizes))]
    for first in range(0, n, part):
        drawn = rng.choice(len(sizes), min(part, n - first), p=share)
        members = np.stack([rng.choice(cells[s], batch_size, replace=False) for s in drawn])
        yield total(members), members


# ------------------------------------------------------------------------------ bulk samples


def draw_test_bulks(X, codes, n_types, n, n_cells, rng):
    """Sums of n_cells cells, proportions from Dirichlet(1): counts (n x G), proportions (n x K).

    A type that has no cell in X (N x G), codes (N), is in no bulk.
    """
    has_cells = np.isin(np.arange(n_types), codes)
    expected = np.zeros((n, n_types))
    expected[:, has_cells] = rng.dirichlet(np.ones(has_cells.sum()), n)
    return draw_pseudobulks(X, codes, expected, n_cells, rng)
