"""Predicted against true proportions: the part of evaluate.py that measures the Bulk Encoder.

Bulks are of four kinds, and each method reads the same ones:

- pseudobulks of held-out cells ("within")
- with --compare, the same after a simulated change of platform (", shift")
- pseudobulks of other data sets, of other donors and protocols (", NAME of the set"), by lineage
- real bulks whose lineages were measured (", real bulk")

Notation in shape comments: S bulks, N cells, G genes of the decoder, K cell types, L lineages.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from data import DatasetSettings, align_genes, codes_of, draw_test_bulks, load_cells, samples_of
from deconvolution.published import METHODS, deconvolve, nnls_proportions, read_reference
from evaluation.metrics import pearson_within, proportion_metrics, to_lineages
from generation import encode_samples
from readers.barcodes import check_same_start
from readers.bulk import read_bulk
from readers.counts import read_counts
from readers.labels import natural_order
from readers.lineages import lineages_in, read_fractions, read_lineages
from runtime.errors import InputError, some

BULKS_PER_PLATFORM = 20  # of those with a simulated change of platform
SHIFT_DEPTH = 2e5  # counts of each of them in the genes of the Bulk Encoder
NNLS = "NNLS"  # on the encoder's genes, unlike the other estimators

# ------------------------------------------------------------------------------------- methods


class Methods:
    """Every method, of one training.

    Args:
        training: as evaluate.py has it. cfg: settings; without ``compare``, NNLS is the only one
            beside bulk2sc.
    """

    def __init__(self, training, cfg):
        self.training, self.seed = training, cfg.seed
        self.profiles = training.profiles()
        self.reference = None
        if cfg.compare:
            rows, names = training.train, samples_of(training.cells)[1]
            sample = samples_of(training.cells)[0][rows] if len(names) > 1 else None
            self.reference = read_reference(
                training.decoder_counts(rows),
                training.codes[rows],
                len(training.cell_types),
                training.genes[0],
                sample,
            )

    def predict(self, bulk, measured, names, where):
        """Proportions of bulks: dict method -> (S, K).

        bulk2sc answers as bulk2sc.py does, mRNA content included. NNLS reads the encoder's genes,
        the other methods all genes.

        Args:
            bulk: counts in the decoder's genes (S, G). measured: mask (G). names: of the bulks
                (S). where: what messages name.

        Raises:
            InputError: a bulk has no counts in any gene of the encoder.
        """
        genes, encoder_genes = self.training.genes
        answer = encode_samples(self.training.models, bulk, measured, names, where, n_halves=0)
        X, _ = align_genes(sp.csr_matrix(bulk), genes, encoder_genes, where, report=False)
        read = np.isin(encoder_genes, np.array(genes)[measured])
        results = {
            "bulk2sc": answer.cells.cpu().numpy(),
            NNLS: nnls_proportions(X.toarray()[:, read], self.profiles[:, read]),
        }
        if self.reference is not None:
            peers = [name for name in METHODS if name != NNLS]
            results |= deconvolve(bulk, measured, self.reference, self.seed, peers)
        return results


def with_constant(true, predictions):
    """Predictions, and the constant answer: the mean truth (S, K) of these very bulks.

    No method can know it; what it scores needs no bulk.
    """
    return predictions | {"constant answer": np.broadcast_to(true.mean(axis=0), true.shape)}


def score(true, predictions, names, suffix, of="lineage"):
    """Rows (method, metric, type or lineage or None for all, value) of predicted proportions.

    Args:
        true: (S, K). predictions: method -> (S, K). names: of the columns (K). suffix, of: as
            :func:`evaluation.metrics.proportion_names` has them.
    """
    rows = []
    for method, predicted in with_constant(true, predictions).items():
        values = proportion_metrics(true, predicted, suffix, of)
        rows += [(method, metric, None, value) for metric, value in values.items()]
        within = zip(names, pearson_within(true, predicted), strict=True)
        rows += [
            (method, f"proportions Pearson within {of}{suffix}", name, r)
            for name, r in within
            if not np.isnan(r)
        ]
    return rows


def score_lineages(true, predictions, lineage_of, suffix):
    """:func:`score` of proportions (S, K) summed to lineages, without bulks that have none."""
    lineages = lineages_in(lineage_of)
    filled = true[:, [lineage is not None for lineage in lineage_of]].any(axis=1)
    summed = {
        method: to_lineages(pi[filled], lineage_of, lineages) for method, pi in predictions.items()
    }
    return score(to_lineages(true[filled], lineage_of, lineages), summed, lineages, suffix)


# -------------------------------------------------------------- pseudobulks of held-out cells


def shift_platform(bulk, rng, counted=slice(None)):
    """Expected counts of bulks (S x G) as other platforms or donors would measure them.

    Every 20 bulks share a platform: factors exp(0.6 t) of genes, with t from Student's t with 4
    degrees of freedom and the logarithm cut at ±4. Each platform also loses a tenth of the genes,
    which read 0 without being marked as absent. Rows sum to 200,000 over the genes in ``counted``;
    Poisson noise is left to the caller. The Bulk Encoder trains on another model of noise:
    log-normal, with each bulk's own sd, no lost genes and no shared platform.
    """
    n_platforms, n_genes = -(-len(bulk) // BULKS_PER_PLATFORM), bulk.shape[1]
    t = rng.standard_t(4, (n_platforms, n_genes))
    factors = np.exp(np.clip(0.6 * t, -4, 4))
    factors[rng.random(factors.shape).argsort(axis=1) < round(0.1 * n_genes)] = 0
    shifted = bulk * factors.repeat(BULKS_PER_PLATFORM, axis=0)[: len(bulk)]
    return shifted / shifted[:, counted].sum(axis=1, keepdims=True) * SHIFT_DEPTH


def measure_pseudobulks(methods, lineage_of, cfg, rng):
    """Proportions of pseudobulks of held-out cells, with --compare also after a change of platform.

    None, if no cells were held out. lineage_of: lineage of each type (K), or None.
    """
    training = methods.training
    if len(training.test) == 0:
        print(f"{training.folder}: no cells were held out, so no pseudobulks are made of them")
        return []
    print(f"{training.folder}: proportions of pseudobulks", flush=True)
    X, names = training.decoder_counts(training.test), training.cell_types
    read = np.isin(training.genes[0], training.genes[1])  # by the encoder
    rows = []
    for suffix in [""] * cfg.n_draws + [", shift"] * cfg.n_draws * cfg.compare:
        bulk, true = draw_test_bulks(
            X, training.test_codes, len(names), cfg.n_pseudobulks, cfg.cells_per_bulk, rng
        )
        if suffix:
            bulk = rng.poisson(shift_platform(bulk, rng, read))
        results = methods.predict(bulk, training.measured, range(len(bulk)), cfg.data)
        rows += score(true, results, names, suffix, "type")
        if lineage_of is not None:
            rows += score_lineages(true, results, lineage_of, f"{suffix}, lineages")
    return rows


# ------------------------------------------------------------------------- other data sets


@dataclass
class OtherCells:
    """Cells of another data set, of the lineages that the model has as well."""

    name: str
    """Of the file or folder, as metrics have it."""
    X: sp.csr_matrix
    """Counts (N x G), in the data set's own genes."""
    genes: list[str]
    codes: np.ndarray
    """Lineage of each cell (N)."""
    lineages: list[str]
    """Names of the lineages (L)."""


def set_names(cfg):
    """What tables call the data sets of --shift-data: the name of file or folder.

    Raises:
        InputError: two have one name, or one has that of another table.
    """
    names = [Path(path).name.removesuffix(".h5ad").removesuffix(".h5") for path in cfg.shift_data]
    taken = ["shift", "lineages", "real bulk"]
    for i, name in enumerate(names):
        if name in taken + names[:i]:
            raise InputError(
                f"--shift-data: found {name} as name of a data set, which names another table; "
                "expected file or folder names of their own"
            )
    return names


def read_other_cells(cfg):
    """Read the data sets of --shift-data: dict name -> AnnData with ``.obs["cell_type"]``.

    Raises:
        InputError: as :func:`data.load_cells` and :func:`set_names`; or --shift-cells names a
            column that no set has, or leaves no cell.
    """
    labels = cfg.shift_labels or (None,)
    labels = labels * len(cfg.shift_data) if len(labels) == 1 else labels
    sets, n_selected = {}, 0
    for name, path, label in zip(set_names(cfg), cfg.shift_data, labels, strict=True):
        try:
            sets[name] = load_cells(DatasetSettings(data=path, labels=label), found=False)
        except InputError as error:
            raise InputError(str(error).replace("--labels", "--shift-labels")) from error
        if cfg.shift_cells and (kept := find_selected(path, *cfg.shift_cells)) is not None:
            sets[name], n_selected = select_cells(sets[name], kept, path), n_selected + 1
    if cfg.shift_cells and not n_selected:
        raise InputError(
            f"--shift-cells: found no column {cfg.shift_cells[0]} in .obs of --shift-data, "
            "expected it in one of them"
        )
    return sets


def find_selected(path, column, value):
    """Barcodes of the cells with a value in a column of .obs; None if there is no such column.

    Raises:
        InputError: no cell has it.
    """
    obs = read_counts(path).obs  # load_cells leaves out columns that could be taken for samples
    if column not in obs:
        print(f"{path}: has no column {column}, so all of its cells count")
        return None
    found = obs[column].astype(str)
    if not (found == value).any():
        raise InputError(
            f"--shift-cells: found no cell with {column} {value} in {path}, expected one of "
            f"{some(natural_order(found), 8)}"
        )
    return obs.index[found == value]


def select_cells(cells, barcodes, path):
    """The cells (AnnData) that are among the barcodes; the others are counted.

    Raises:
        InputError: none is.
    """
    kept = cells.obs_names.isin(barcodes)
    print(f"{path}: {kept.sum():,} of {cells.n_obs:,} labelled cells are those of --shift-cells")
    if not kept.any():
        raise InputError(f"--shift-cells: found none of the labelled cells of {path}")
    return cells[kept].copy()


def keep_shared_lineages(name, cells, lineage_of, model_lineages):
    """OtherCells of the cells whose lineage the model has; the others are counted.

    Args:
        name: of the set. cells: AnnData (N). lineage_of: of each of its types.

    Raises:
        InputError: fewer than two lineages are shared.
    """
    codes, _ = codes_of(cells)
    lineage = np.array(lineage_of, dtype=object)[codes]
    found = lineages_in(lineage)
    shared = [name for name in model_lineages if name in found]
    if len(shared) < 2:
        raise InputError(
            f"--shift-data: found {len(shared)} lineages in {name} that the model has (its own are "
            f"{some(found)}, the model's {some(model_lineages)}), expected two or more"
        )
    rows = np.flatnonzero(np.isin(lineage, shared))
    print(
        f"{name}: {len(rows):,} cells of {len(shared)} lineages ({some(shared, 8)}), "
        f"{cells.n_obs - len(rows):,} of none of them left out"
    )
    codes = np.array([shared.index(lineage[i]) for i in rows])
    return OtherCells(name, cells.X[rows], list(cells.var_names), codes, shared)


def measure_other_cells(methods, lineage_of, other, cfg, rng):
    """Proportions of pseudobulks of another data set, over the lineages that it shares.

    Proportions of lineages are from Dirichlet(1); within a lineage, cells are drawn at random.
    Genes that the set lacks are marked as absent. lineage_of: of the model's types (K).
    """
    where = f"--shift-data {other.name}"
    X, measured = align_genes(other.X, other.genes, methods.training.genes[0], where)
    n_lineages, rows = len(other.lineages), []
    for _ in range(cfg.n_draws):
        bulk, true = draw_test_bulks(
            X, other.codes, n_lineages, cfg.n_pseudobulks, cfg.cells_per_bulk, rng
        )
        results = methods.predict(bulk, measured, range(len(bulk)), where)
        results = {
            method: to_lineages(pi, lineage_of, other.lineages) for method, pi in results.items()
        }
        rows += score(true, results, other.lineages, f", {other.name}")
    return rows


# --------------------------------------------------------------------------------- real bulks


def measure_real_bulk(methods, lineage_of, fractions, cfg):
    """Proportions of the real bulks of --bulk; nothing is drawn.

    lineage_of: lineage of each type (K). fractions: as :func:`read_fractions` gives them.

    Raises:
        InputError: as :func:`readers.bulk.read_bulk`; or no sample is in both files.
    """
    card, lineages = methods.training.decoder_card, list(fractions.columns)
    bulk, measured, samples = read_bulk(cfg.bulk, card["genes"], card.get("gene_ids"), cfg)
    check_same_start(fractions.index, samples, cfg.fractions)
    index = fractions.index.get_indexer([str(name).strip() for name in samples])
    known = index >= 0
    n = known.sum()
    if n == 0:
        raise InputError(
            f"{cfg.fractions}: none of its samples ({some(fractions.index)}) is in {cfg.bulk} "
            f"({some(samples)})"
        )
    print(
        f"{cfg.bulk}: {n} samples with measured fractions, {len(samples) - n} without; "
        f"{len(fractions) - n} of {cfg.fractions} are not in it"
    )
    bulk = bulk[np.flatnonzero(known)].toarray()
    true = to_lineages(fractions.to_numpy()[index[known]], lineages, lineages)
    results = methods.predict(bulk, measured, np.array(samples)[known], cfg.bulk)
    predictions = {method: to_lineages(pi, lineage_of, lineages) for method, pi in results.items()}
    rows = score(true, predictions, lineages, ", real bulk")
    for method, predicted in with_constant(true, predictions).items():
        r = np.corrcoef(true.ravel(), predicted.ravel())[0, 1]
        rows.append((method, "proportions Pearson, real bulk", None, r))
    return rows


# ------------------------------------------------------------------------------ all of them


@dataclass
class ProportionPlan:
    """What there is to compare predicted proportions with, read once for all trainings."""

    lineage_of: list[str | None] | None = None
    """Lineage of each cell type of the model (K)."""
    fractions: pd.DataFrame | None = None
    """Measured fractions of the lineages in real bulks (S x L)."""
    others: tuple[OtherCells, ...] = ()


def plan_proportions(cfg, cell_types):
    """Read --lineages, --fractions and --shift-data; cell_types: of the model (K)."""
    if cfg.lineages is None:
        return ProportionPlan()
    sets = read_other_cells(cfg)
    types = {name: codes_of(cells)[1] for name, cells in sets.items()}
    known = {cell_type for names in types.values() for cell_type in names}
    lineage_of = read_lineages(cfg.lineages, cell_types, known)
    lineages = lineages_in(lineage_of)
    fractions = None
    if cfg.fractions is not None:
        fractions = read_fractions(cfg.fractions, lineages, cfg.lineages)
    others = []
    for name, cells in sets.items():
        of_set = read_lineages(cfg.lineages, types[name], None, name)
        others.append(keep_shared_lineages(name, cells, of_set, lineages))
    return ProportionPlan(lineage_of, fractions, tuple(others))


def measure_foreign(methods, plan, cfg):
    """Proportions of real bulks and of other data sets: rows as of :func:`score`."""
    rows, rng = [], np.random.default_rng(cfg.seed)
    if plan.fractions is not None:
        rows += measure_real_bulk(methods, plan.lineage_of, plan.fractions, cfg)
    for other in plan.others:
        rows += measure_other_cells(methods, plan.lineage_of, other, cfg, rng)
    return rows
