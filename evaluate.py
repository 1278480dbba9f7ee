"""Compare generated cells with held-out real ones, and predicted with true proportions.

    python evaluate.py
    python evaluate.py --data filtered_feature_bc_matrix --weights my_weights
    python evaluate.py --weights w0 --more-weights w1 w2       # mean ± std over three trainings
    python evaluate.py --bulk samples.csv --fractions measured.csv --lineages lineages.csv
    python evaluate.py --samples sample --donors donor --conditions condition

Every metric is read on cells that no training has seen. Cells come from these methods:

- bulk2sc: z ~ N(mu_k, sigma_k^2) -> scDecoder, as many cells of each type as are held out
- calibrated: the same with bulk2sc.py --calibrate, to the sum of the held-out cells
- other real cells: training cells in place of generated ones
- unseen real cells: half of the training cells, left out when the metrics' space is fitted
- cell-type NB: each gene negative binomial with its cell type's training mean and variance
- published recipe: scDecoder with --pairing prior --loss mse_l1, trained here
- scVI: trained here, if scvi-tools is installed

Predicted proportions have their own table, beside NNLS, non-negative least squares: on pseudobulks
of held-out cells, on the same after a simulated change of platform, and on real bulks whose
proportions were measured.

With --conditions, fold changes between two conditions inside cell types have a third table: of
cells generated for the bulks of held-out donors, against the donors' own cells or --profiles. If
the profiles are of samples that the reference does not have, their mixtures are the bulks. Methods:

- bulk2sc: cells of the encoded bulk, calibrated as by --calibrate types; with no calibration;
  calibrated uniformly; and expected profiles in place of cells
- constant answer: cells of the types' own moments
- one factor per gene: the training cells' profiles of types, each gene times one factor in all
  types that makes them sum to the bulk at the true proportions
- BayesPrism Z: counts allotted to cell states, which are the reference's types by condition
- training cells of the condition; decoder, moments of the condition; another donor's profiles:
  what is expected without the bulk

Beside them a null, bulks of one sample's cells that differ in proportions alone; and random forests
that tell generated cells from the sample's own.

Writes evaluation.csv, which also has every cell type by itself, and evaluation.png to --weights.
"""

from dataclasses import dataclass
from pathlib import Path

from data import DatasetSettings
from runtime.errors import InputError
from runtime.script import flag, lead_with, parse_args, run_script


@lead_with(
    *("data", "labels", "weights", "baselines", "n_draws", "bulk", "fractions", "lineages"),
    *("samples", "donors", "conditions", "contrast"),
)
@dataclass
class Settings(DatasetSettings):
    """Compare generated cells with held-out real ones, and predicted with true proportions.

    Example: python evaluate.py --data filtered_feature_bc_matrix --weights my_weights
    """

    baselines: bool = True
    """Measure the baselines, too; --no-baselines saves their training."""
    n_draws: int = 3
    """Times that cells and pseudobulks are drawn from each training."""
    bulk: Path | None = None
    """Real bulk samples, read as bulk2sc.py reads them, to be compared with --fractions."""
    fractions: Path | None = None
    """Their measured fractions: a csv, first column sample, then one column for each lineage."""
    lineages: Path | None = None
    """Lineage of each cell type, as --fractions names it: a csv cell_type,lineage.
    Given alone, proportions of pseudobulks are compared by lineage, too."""
    generated: Path | None = None
    """An .h5ad of generated cells to measure, as bulk2sc.py writes it. Default: generate them."""
    more_weights: tuple[Path, ...] = ()
    """Further weights folders, of other seeds; mean and std are then over trainings."""
    n_pseudobulks: int = 100
    """Pseudobulks of held-out cells per draw, proportions from Dirichlet(1)."""
    cells_per_bulk: int = 500
    """Cells in each pseudobulk."""
    n_trees: int = 300
    """Trees of each random forest, the slowest of the metrics."""
    donors: str | None = None
    """Donor of each cell, given as --samples is. Default: each sample is a donor of its own."""
    conditions: str | None = None
    """Condition of each cell, given as --samples is. With it, fold changes between two conditions
    inside cell types are measured."""
    contrast: tuple[str, str] | None = None
    """The two conditions, A B: changes are from A to B. Default: the two there are."""
    profiles: Path | None = None
    """True expression of cell types in samples: a csv (.gz), genes in rows, by symbol in a column
    symbol or else the first. Default: the held-out cells' own sums."""
    profile_table: Path | None = None
    """What each column of --profiles is: a csv column,sample,donor,condition,cell_type."""
    profile_types: Path | None = None
    """Which cell types make each type of --profiles: a csv cell_type,profile_type. Default: they
    have the same names."""
    mixing: tuple[float, ...] = ()
    """Dirichlet parameters, in the order of the types in --profile-types, by which each sample's
    profiles are mixed to a bulk if the reference does not have these samples. Default: 5 each."""
    reference_contrast: tuple[str, str] | None = None
    """Conditions of the reference's cells that stand for A and B in the baselines, where those of
    --profiles have other names."""
    cells_per_sample: int = 3000
    """Cells generated for each bulk whose fold changes are measured."""
    contrasts_only: bool = False
    """Measure fold changes alone, not cells and proportions."""

    def __post_init__(self):
        super().__post_init__()
        counts = ("n_draws", "n_pseudobulks", "cells_per_bulk", "n_trees", "cells_per_sample")
        for name in counts:
            if (found := getattr(self, name)) < 1:
                raise InputError(f"{flag(name)}: found {found}, expected 1 or more")
        self.check_needed()
        if self.generated is not None and self.more_weights:
            raise InputError("--generated: one file of cells, expected no --more-weights with it")
        needed = ("bulk", "fractions", "lineages")
        missing = [flag(name) for name in needed if getattr(self, name) is None]
        if missing and not (self.bulk is self.fractions is None):
            given = " and ".join(flag(name) for name in needed if flag(name) not in missing)
            raise InputError(
                f"{given}: found no {' and no '.join(missing)}, expected --bulk, --fractions and "
                "--lineages together"
            )

    def check_needed(self):
        """Check that what a setting needs is given as well.

        Raises:
            InputError: it is not.
        """
        needs = {"donors": "samples", "conditions": "samples"}
        needs |= {"profiles": "profile_table", "profile_table": "profiles"}
        needs |= dict.fromkeys(("profile_types", "mixing"), "profiles")
        of_contrasts = ("contrast", "profiles", "reference_contrast", "contrasts_only")
        for name, needed in [*((name, "conditions") for name in of_contrasts), *needs.items()]:
            if getattr(self, name) and not getattr(self, needed):
                raise InputError(f"{flag(name)}: found no {flag(needed)}, which it needs")


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

import importlib.util
from functools import partial

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from tqdm import trange

from baselines import ScVI, draw_cell_type_nb, predict_proportions, train_published
from contrasts import FEWEST_CELLS, measure_contrasts, plan_contrasts
from data import (
    align_genes,
    codes_of,
    draw_test_bulks,
    load_cells,
    mean_counts,
    split_cells,
)
from generation import (
    add_to_sums,
    calibrate_to,
    check_filled,
    draw_types,
    load_weights,
    new_cells,
    sum_agreement,
)
from metrics import (
    CONTRAST_METRICS,
    METRICS,
    CellMetrics,
    proportion_metrics,
    to_lineages,
)
from models import BulkEncoder, scDecoder
from plotting import write_evaluation
from readers.bulk import read_bulk
from readers.counts import read_counts
from readers.lineages import lineages_in, read_fractions, read_lineages
from runtime.device import pick_device, seed_everything
from runtime.errors import some
from runtime.writing import write_whole

BULKS_PER_PLATFORM = 20  # of those with a simulated change of platform
SHIFT_DEPTH = 2e5  # counts of each of them
CELLS_PER_SUM = 1000  # generated cells that are added up to one bulk


@dataclass
class Training:
    """One training: its models, and the real cells it was trained on and held out."""

    folder: Path
    cells: anndata.AnnData
    """Counts of all real cells (N x G)."""
    codes: np.ndarray
    """Their cell types (N)."""
    decoder: scDecoder
    decoder_card: dict
    """What the decoder's file holds beside the weights: genes, cell types, seed, split."""
    encoder: BulkEncoder
    encoder_card: dict
    held_out: np.ndarray
    """Mask of the cells that no training has seen (N)."""

    def __post_init__(self):
        self.test, self.train = np.flatnonzero(self.held_out), np.flatnonzero(~self.held_out)
        self.test_codes = self.codes[self.test]
        self.genes = self.decoder_card["genes"], self.encoder_card["genes"]
        self.cell_types = self.decoder_card["cell_types"]

    def decoder_counts(self, rows):
        """Counts of real cells in the decoder's genes, CSR."""
        names = self.cells.var_names
        X, _ = align_genes(self.cells.X[rows], names, self.genes[0], "the decoder", report=False)
        return X

    def encoder_counts(self, rows):
        """Counts of real cells in the encoder's genes, CSR, and a mask of the genes they have."""
        names = self.cells.var_names
        return align_genes(self.cells.X[rows], names, self.genes[1], "the encoder", report=False)

    def profiles(self):
        """Mean counts of the training cells of each type in the encoder's genes (K, G)."""
        X, _ = self.encoder_counts(self.train)
        return mean_counts(X, self.codes[self.train], len(self.cell_types))


# ------------------------------------------------------------------------------ ways to draw cells


def match_types(codes, target, pool, rng):
    """Draw cells, as many of each type as in ``target`` or, of a type with fewer, all of them.

    codes: cell types (N). target: types to draw (M). pool: indices of the cells to draw from.

    Returns:
        indices (M or fewer).
    """
    drawn = []
    for k, n in zip(*np.unique(target, return_counts=True), strict=True):
        drawn.append(rng.permutation(pool[codes[pool] == k])[:n])
    return np.concatenate(drawn)


def draw_decoded(training, decoder, generator, log_factor=None):
    """Cells of the held-out types: z of the mixture, decoded. log_factor: (1, G) or None."""
    k = torch.as_tensor(training.test_codes, device=decoder.mu.device)
    X = new_cells(decoder, k, generator, log_factor)
    names = list(training.cells.var_names)
    X, _ = align_genes(X, training.genes[0], names, "the decoder", report=False)
    return X, training.test_codes


def draw_real(training, rng):
    """Training cells of the held-out types."""
    rows = match_types(training.codes, training.test_codes, training.train, rng)
    return training.cells.X[rows], training.codes[rows]


def draw_nb(training, rng):
    """Cells of the held-out types, genes negative binomial."""
    rows, target = training.train, training.test_codes
    return draw_cell_type_nb(training.cells.X[rows], training.codes[rows], target, rng), target


def draw_scvi(training, model):
    """Cells of the held-out types by scVI."""
    return model.draw(training.test_codes), training.test_codes


def draw_from_file(path, generated, codes, target, rng):
    """Cells of a file of generated ones (M x G) with types codes (M), of the types ``target``."""
    rows = match_types(codes, target, np.arange(len(codes)), rng)
    if len(rows) < 2:
        raise InputError(f"{path}: found {len(rows)} cells of the held-out types")
    return generated[rows], codes[rows]


def read_generated(path, training):
    """Read an .h5ad of generated cells.

    Returns:
        counts (M x G) in the genes of the data, cell types (M).

    Raises:
        InputError: unreadable, no ``cell_type``, a type that the model does not know, or values
            that are not counts.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; bulk2sc.py makes it")
    generated = read_counts(path)
    if "cell_type" not in generated.obs:
        raise InputError(f"{path}: has no column cell_type, expected cells by bulk2sc.py")
    names = generated.obs["cell_type"].astype(str)
    cell_types = training.cell_types
    codes = pd.Index(cell_types).get_indexer(names)
    if (codes < 0).any():
        unknown = names[codes < 0].iloc[0]
        raise InputError(f"{path}: cell type {unknown} is not one of the model's")
    X, _ = align_genes(generated.X, generated.var_names, list(training.cells.var_names), path)
    n_target = np.bincount(training.test_codes, minlength=len(cell_types))
    n_file = np.bincount(codes, minlength=len(cell_types))
    short = {
        cell_types[k]: f"{n_file[k]} of {n_target[k]}" for k in np.flatnonzero(n_file < n_target)
    }
    if short:
        print(f"{path}: fewer cells than are held out: {short}")
    return X, codes


def calibration_to_held_out(training):
    """Factors that calibrate to the sum of the held-out cells, as a logarithm (1, G)."""
    bulk = sp.csr_matrix(training.decoder_counts(training.test).sum(axis=0))
    log_factor, _ = calibrate_to(bulk, training.decoder, training.encoder, training.genes)
    return log_factor


def cell_methods(training, cfg, rng):
    """Every method of the table, its model trained: name -> function that draws (X, codes)."""
    decoder = training.decoder
    generator = torch.Generator(decoder.mu.device).manual_seed(cfg.seed)
    methods = {}
    if cfg.generated is None:
        log_factor = calibration_to_held_out(training)
        methods["bulk2sc"] = partial(draw_decoded, training, decoder, generator)
        methods["calibrated"] = partial(draw_decoded, training, decoder, generator, log_factor)
    else:
        cells = read_generated(cfg.generated, training)
        target = training.test_codes
        methods["bulk2sc"] = partial(draw_from_file, cfg.generated, *cells, target, rng)
    methods["other real cells"] = partial(draw_real, training, rng)
    if cfg.baselines:
        methods["cell-type NB"] = partial(draw_nb, training, rng)
        published = train_published(cfg, training.folder, training.decoder_card)
        methods["published recipe"] = partial(draw_decoded, training, published, generator)
        if importlib.util.find_spec("scvi"):
            rows, seed = training.train, training.decoder_card["seed"]
            model = ScVI(training.cells[rows], training.codes[rows], seed)
            methods["scVI"] = partial(draw_scvi, training, model)
    return methods


# ---------------------------------------------------------------------------------- measurements
# Each returns rows (method, metric, type code or None for all types, value).


def measure_cells(training, cfg, rng):
    """Every method's cells against the held-out ones."""
    cell_metrics = CellMetrics(training.cells, training.held_out, training.codes, cfg.n_trees)
    methods = cell_methods(training, cfg, rng)
    rows = []
    for i in trange(cfg.n_draws, desc=f"cells of {training.folder}", unit="draw"):
        for method, draw in methods.items():
            X, codes = draw()
            trained_on = method == "other real cells"
            values = cell_metrics.compare(X, codes, seed=i, trained_on=trained_on)
            rows += [(method, *row) for row in values]
    return rows + measure_left_out(training, cfg)


def measure_left_out(training, cfg):
    """Half of the training cells, in a space that was fitted without them."""
    cells, codes, held_out = training.cells, training.codes, training.held_out
    left_out = training.train[split_cells(codes[training.train], 0.5, cfg.seed)]
    if len(np.unique(codes[left_out])) < 2:
        return []
    kept = np.ones(cells.n_obs, dtype=bool)
    kept[left_out] = False
    cell_metrics = CellMetrics(cells[kept].copy(), held_out[kept], codes[kept], cfg.n_trees)
    values = cell_metrics.compare(cells.X[left_out], codes[left_out], cfg.seed)
    # Copying is not measured: these cells are neither generated nor part of the space.
    return [("unseen real cells", *row) for row in values if not row[0].startswith("nearest")]


def measure_sums(training, cfg, rng, n=10):
    """Cells generated for n pseudobulks of held-out cells, added up again, against these bulks."""
    decoder, n_types = training.decoder, len(training.decoder.mu)
    X, codes = training.decoder_counts(training.test), training.test_codes
    bulk, _ = draw_test_bulks(X, codes, n_types, n, cfg.cells_per_bulk, rng)  # (n, G)
    log_factor, pi = calibrate_to(sp.csr_matrix(bulk), decoder, training.encoder, training.genes)
    generator = torch.Generator(decoder.mu.device).manual_seed(cfg.seed)
    k = draw_types(pi, CELLS_PER_SUM, generator)  # (n * CELLS_PER_SUM)
    sample = torch.arange(n, device=k.device).repeat_interleave(CELLS_PER_SUM)
    rows = []
    for method, factor in (("bulk2sc", None), ("calibrated", log_factor)):
        sums = np.zeros(bulk.shape)
        add_to_sums(sums, new_cells(decoder, k, generator, factor, sample), sample.cpu().numpy())
        agreement = sum_agreement(bulk, sums, np.ones(bulk.shape[1], bool))
        rows.append((method, "sum of cells against bulk, Pearson", None, agreement.mean()))
    return rows


def shift_platform(bulk, rng):
    """Expected counts of bulks (S x G) as other platforms or donors would measure them.

    Every 20 bulks share a platform: factors exp(0.6 t) of genes, with t from Student's t with 4
    degrees of freedom and the logarithm cut at ±4. Each platform also loses a tenth of the genes,
    which read 0 without being marked as absent. Rows sum to 200,000; Poisson noise is left to the
    caller. The Bulk Encoder trains on another model of noise: log-normal, with each bulk's own sd,
    no lost genes and no shared platform.
    """
    n_platforms, n_genes = -(-len(bulk) // BULKS_PER_PLATFORM), bulk.shape[1]
    t = rng.standard_t(4, (n_platforms, n_genes))
    factors = np.exp(np.clip(0.6 * t, -4, 4))
    factors[rng.random(factors.shape).argsort(axis=1) < round(0.1 * n_genes)] = 0
    shifted = bulk * factors.repeat(BULKS_PER_PLATFORM, axis=0)[: len(bulk)]
    return shifted / shifted.sum(axis=1, keepdims=True) * SHIFT_DEPTH


def measure_proportions(training, lineage_of, cfg, rng):
    """Proportions of pseudobulks of held-out cells, plain and after a change of platform.

    lineage_of: lineage of each type (K), or None.
    """
    X, present = training.encoder_counts(training.test)
    profiles = training.profiles()
    rows = []
    for suffix in [""] * cfg.n_draws + [", shift"] * cfg.n_draws:
        bulk, true = draw_test_bulks(
            X, training.test_codes, len(profiles), cfg.n_pseudobulks, cfg.cells_per_bulk, rng
        )
        if suffix:
            bulk = rng.poisson(shift_platform(bulk, rng))
        methods = predict_proportions(training.encoder, bulk, present, profiles)
        for method, predicted in methods.items():
            values = proportion_metrics(true, predicted, suffix)
            if lineage_of is not None:
                values |= lineage_metrics(true, predicted, lineage_of, suffix)
            rows += [(method, metric, None, value) for metric, value in values.items()]
    return rows


def lineage_metrics(true, predicted, lineage_of, suffix):
    """dict: metric -> value, of proportions (S, K) summed to lineages.

    Bulks without a cell of any lineage are left out.
    """
    lineages = lineages_in(lineage_of)
    has_lineage = [lineage is not None for lineage in lineage_of]
    filled = true[:, has_lineage].any(axis=1)
    pair = (to_lineages(pi[filled], lineage_of, lineages) for pi in (true, predicted))
    return proportion_metrics(*pair, f"{suffix}, lineages")


def measure_real_bulk(training, lineage_of, fractions, cfg):
    """Proportions of the real bulks of --bulk; nothing is drawn.

    lineage_of: lineage of each type (K). fractions: as :func:`read_fractions` gives them.

    Raises:
        InputError: as :func:`readers.bulk.read_bulk`; or no sample is in both files.
    """
    card, lineages = training.encoder_card, list(fractions.columns)
    bulk, present, samples = read_bulk(cfg.bulk, card["genes"], card.get("gene_ids"))
    index = fractions.index.get_indexer([str(name).strip() for name in samples])
    measured = index >= 0
    n = measured.sum()
    if n == 0:
        raise InputError(
            f"{cfg.fractions}: none of its samples ({some(fractions.index)}) is in {cfg.bulk} "
            f"({some(samples)})"
        )
    print(
        f"{cfg.bulk}: {n} samples with measured fractions, {len(samples) - n} without; "
        f"{len(fractions) - n} of {cfg.fractions} are not in it"
    )
    bulk = bulk[np.flatnonzero(measured)]
    check_filled(bulk, np.array(samples)[measured], cfg.bulk)
    true = to_lineages(fractions.to_numpy()[index[measured]], lineages, lineages)
    rows = []
    methods = predict_proportions(training.encoder, bulk.toarray(), present, training.profiles())
    for method, pi in methods.items():
        predicted = to_lineages(pi, lineage_of, lineages)
        values = proportion_metrics(true, predicted, ", real bulk")
        correlation = np.corrcoef(true.ravel(), predicted.ravel())[0, 1]
        values["proportions Pearson, real bulk"] = correlation
        rows += [(method, metric, None, value) for metric, value in values.items()]
    return rows


def measure(training, lineage_of, fractions, cfg):
    """Everything that is measured of one training."""
    rows = []
    if cfg.bulk is not None:  # first, so that a file that cannot be used fails within seconds
        rows += measure_real_bulk(training, lineage_of, fractions, cfg)
    rng = seed_everything(cfg.seed)
    rows += measure_cells(training, cfg, rng)
    if cfg.generated is None:
        for _ in range(cfg.n_draws):
            rows += measure_sums(training, cfg, rng)
    return rows + measure_proportions(training, lineage_of, cfg, rng)


# ----------------------------------------------------------------------------------------- tables


def summarise(table, n_weights):
    """Mean and std of each metric: over trainings if there are several, else over draws.

    Args:
        table: data frame with the columns weights (or what else is to count once, as a donor),
            method, metric, cell_type, value. n_weights: how many of them there are.

    Returns:
        data frame with the columns metric, best, cell_type, method, mean, std, n.
    """
    keys = ["metric", "cell_type", "method"]
    if n_weights > 1:
        table = table.groupby([*keys, "weights"], sort=False, as_index=False)["value"].mean()
    table = table.groupby(keys, sort=False)["value"].agg(["mean", "std", "count"]).reset_index()
    order = {metric: i for i, metric in enumerate(METRICS)}
    # Metrics of all cells first, then each type; a stable sort leaves the methods in their order.
    table = table.sort_values(
        ["cell_type", "metric"],
        key=lambda column: column.map(order) if column.name == "metric" else column,
        kind="stable",
    )
    table.insert(1, "best", table["metric"].map(METRICS))
    return table.rename(columns={"count": "n"}).reset_index(drop=True)


def format_table(table, transpose=False):
    """Mean ± std as printed: a row for each metric with its best value, a column for each method.

    table: of :func:`summarise`, the rows of all cell types together. transpose: a row for each
    method instead.
    """
    text = [
        f"{mean:.4f}" + ("" if np.isnan(std) else f" ± {std:.4f}")
        for mean, std in zip(table["mean"], table["std"], strict=True)
    ]
    wide = table.assign(text=text).pivot(index="metric", columns="method", values="text")
    metrics = [metric for metric in METRICS if metric in wide.index]
    wide = wide.loc[metrics, list(dict.fromkeys(table["method"]))].fillna("")
    wide.index = [f"{metric} ({METRICS[metric]:g})" for metric in metrics]
    return (wide.T if transpose else wide).to_string()


def print_tables(table, cfg):
    """Print the tables of cells and of proportions, all cell types together."""
    n_trainings = 1 + len(cfg.more_weights)
    over = f"{n_trainings} trainings" if n_trainings > 1 else f"{cfg.n_draws} draws"
    print(f"metric (best value), mean ± std over {over}")
    of_proportions = table["metric"].str.startswith("proportions")
    print(format_table(table[~of_proportions]))
    print(f"\nproportions of {cfg.n_pseudobulks} pseudobulks per draw, beside least squares")
    print(format_table(table[of_proportions]))
    if cfg.baselines and not importlib.util.find_spec("scvi"):
        print("scVI left out: scvi-tools is not installed (pip install scvi-tools)")


def print_contrasts(table, plan, donors):
    """Print the table of fold changes, all cell types together; methods in rows, as there are many.

    donors: names of those measured.
    """
    a, b = plan.conditions
    between = f"from {a} to {b}" if a != b else "between donors"
    over = f"{len(donors)} donors" if len(donors) > 1 else f"draws of donor {donors[0]}"
    print(f"\nfold changes {between} inside cell types (best value), mean ± std over {over}")
    print(format_table(table, transpose=True))


def measure_states(trainings, plan, cfg):
    """Everything about fold changes, of all trainings together.

    Returns:
        table of :func:`summarise`, over donors if there are several; and their names.
    """
    rows = [row for training in trainings for row in measure_contrasts(training, plan, cfg)]
    if not rows:
        raise InputError(
            f"--conditions {cfg.conditions}: found no cell type with {FEWEST_CELLS} cells in "
            "held-out samples of both conditions, expected more cells, other held-out donors, or "
            "--profiles"
        )
    # Mean and std are over donors, whichever training they were held out from.
    table = pd.DataFrame(rows, columns=["weights", "method", "metric", "cell_type", "value"])
    donors = list(dict.fromkeys(table["weights"]))
    return summarise(table, len(donors)), donors


def measure_all(trainings, lineage_of, fractions, cell_types, cfg):
    """Everything about cells and proportions, of all trainings: a table of :func:`summarise`."""
    rows = []
    for training in trainings:
        measured = measure(training, lineage_of, fractions, cfg)
        rows += [(str(training.folder), *row) for row in measured]
    table = pd.DataFrame(rows, columns=["weights", "method", "metric", "cell_type", "value"])
    # "" stands for all types: an empty field in the csv, and a key that groupby keeps.
    table["cell_type"] = table["cell_type"].map(dict(enumerate(cell_types))).fillna("")
    return summarise(table, len(trainings))


def main(cfg):
    device = pick_device(cfg.device)
    cells = load_cells(cfg)
    codes, cell_types = codes_of(cells)
    lineage_of = fractions = plan = None
    if cfg.lineages is not None:
        lineage_of = read_lineages(cfg.lineages, cell_types)
    if cfg.fractions is not None:
        fractions = read_fractions(cfg.fractions, lineages_in(lineage_of), cfg.lineages)
    if cfg.conditions is not None:
        plan = plan_contrasts(cfg, cells, cell_types)
    fewest = 0 if cfg.contrasts_only else 2  # bulks mixed from profiles need no held-out cells
    trainings = [
        Training(folder, cells, codes, *load_weights(folder, cells, cell_types, device, fewest))
        for folder in (cfg.weights, *cfg.more_weights)
    ]
    tables = []
    if plan is not None:
        table, donors = measure_states(trainings, plan, cfg)
        tables.append(table)
    if not cfg.contrasts_only:
        tables.insert(0, measure_all(trainings, lineage_of, fractions, cell_types, cfg))
    table = pd.concat(tables, ignore_index=True)
    overall = table[table["cell_type"] == ""]
    write_whole(cfg.weights / "evaluation.csv", lambda path: table.to_csv(path, index=False))
    write_evaluation(cfg.weights / "evaluation.png", overall)
    of_contrasts = overall["metric"].isin(CONTRAST_METRICS)
    if not cfg.contrasts_only:
        print_tables(overall[~of_contrasts], cfg)
    if plan is not None:
        print_contrasts(overall[of_contrasts], plan, donors)
    n_cells = ", ".join(str(len(training.test)) for training in trainings)
    print(f"wrote evaluation.csv and evaluation.png to {cfg.weights}: {n_cells} held-out cells")


if __name__ == "__main__":
    run_script(main, settings)
