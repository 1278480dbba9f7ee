"""Compare generated cells with held-out real ones, and predicted with true proportions.

    python evaluate.py                                          # are the cells good? under a minute
    python evaluate.py --data filtered_feature_bc_matrix --weights my_weights
    python evaluate.py --compare                                # beside other methods: minutes
    python evaluate.py --weights w0 --more-weights w1 w2       # mean ± std over three trainings
    python evaluate.py --bulk samples.csv --fractions measured.csv --lineages lineages.csv
    python evaluate.py --shift-data other_donor.h5ad --lineages lineages.csv --proportions-only
    python evaluate.py --samples sample --donors donor --conditions condition

Every metric is read on cells that no training has seen. Cells come from these methods:

- bulk2sc: z ~ N(mu_k, sigma_k^2) -> scDecoder, as many cells of each type as are held out
- perfect model: the ceiling on this very data set. Cells that bulk2sc generates stand for all real
  ones, training and held-out, as many of each type; and fresh ones are compared with them
- unseen real cells: half of the training cells, left out when the metrics' space is fitted
- cell-type NB: each gene negative binomial with its cell type's training mean and variance

and with --compare also from these:

- calibrated: bulk2sc.py --calibrate uniform, to the sum of the held-out cells
- other real cells: training cells in place of generated ones
- scDesign2 copula: each gene's best count distribution in its cell type, and their correlations
- published recipe: scDecoder with --pairing prior --loss mse_l1, trained here
- scVI: trained here, if scvi-tools is installed

A forest tells even the perfect model's cells from its data set's, because PCs follow the noise of
the cells they are fitted on. So AUROC is also given as its excess over the perfect model's. Below
0, cells follow the noise of the training cells or, calibrated, of the held-out ones.

Predicted proportions have their own tables: on pseudobulks of held-out cells, on the same after a
simulated change of platform (--compare), on pseudobulks of other data sets (--shift-data), and on
real bulks whose proportions were measured. Methods:

- bulk2sc, and NNLS (non-negative least squares) on the genes that the Bulk Encoder reads
- constant answer: the mean truth of these very bulks
- with --compare: DWLS, MuSiC, nu-SVR, BayesPrism and dtangle on all genes
  (deconvolution/published.py)

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

Prints what to conclude first. Writes evaluation.csv, which also has every cell type by itself, and
evaluation.png to --out.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from data import DatasetSettings
from readers.bulk_options import BulkOptions
from runtime.errors import InputError
from runtime.outputs import is_own
from runtime.script import flag, lead_with, parse_args, run_script


@lead_with(
    *("data", "labels", "weights", "out", "compare", "n_draws", "bulk", "fractions", "lineages"),
    *("samples", "donors", "conditions", "contrast"),
)
@dataclass
class Settings(DatasetSettings, BulkOptions):
    """Compare generated cells with held-out real ones, and predicted with true proportions.

    Example: python evaluate.py --data filtered_feature_bc_matrix --weights my_weights
    """

    out: Path = Path("results")
    """Folder of the results, evaluation.csv and evaluation.png; those of an earlier run are
    replaced."""
    compare: bool = False
    """Compare with other methods, too, which takes minutes: the published recipe, scDesign2, scVI
    (if installed), --calibrate uniform and the sums of its cells; for proportions six published
    methods, and bulks of a simulated other platform."""
    retrain: bool = False
    """Train stages 1 and 2 once more, on cells that the fitted model draws, and measure this *model
    trained anew*: how much realism so few cells cost even a model of the right shape."""
    n_draws: int = 3
    """Times that cells and pseudobulks are drawn from each training."""
    bulk: Path | None = None
    """Real bulk samples, read as bulk2sc.py reads them, to be compared with --fractions."""
    fractions: Path | None = None
    """Their measured fractions: a csv, first column sample, then one column for each lineage."""
    lineages: Path | None = None
    """Lineage of each cell type, as --fractions names it: a csv cell_type,lineage.
    Given alone, proportions of pseudobulks are compared by lineage, too."""
    shift_data: tuple[str, ...] = ()
    """Further single-cell data sets, of other donors or protocols, each as --data is. Proportions
    of their pseudobulks are compared by lineage; --lineages names their cell types, too."""
    shift_labels: tuple[str, ...] = ()
    """Cell types of --shift-data, each as --labels is: one for all, or one for each."""
    shift_cells: tuple[str, str] | None = None
    """Only these cells of --shift-data, COLUMN VALUE: a column of .obs, and its value in the cells
    that count. Data sets without the column count as a whole."""
    proportions_only: bool = False
    """Measure proportions alone, not cells and fold changes."""
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
        self.check_proportions()

    def check_proportions(self):
        """Check what is measured, and that what proportions are compared with is complete.

        Raises:
            InputError: it is not.
        """
        if self.proportions_only and (self.generated or self.contrasts_only):
            other = "--contrasts-only" if self.contrasts_only else "--generated"
            raise InputError(f"--proportions-only: found {other} as well, expected one of them")
        if self.retrain and (self.proportions_only or self.contrasts_only):
            other = "--proportions-only" if self.proportions_only else "--contrasts-only"
            raise InputError(f"--retrain: found {other}, expected cells to be measured")
        if len(self.shift_labels) not in (0, 1, len(self.shift_data)):
            raise InputError(
                f"--shift-labels: found {len(self.shift_labels)} for {len(self.shift_data)} "
                "--shift-data, expected one for all, or one for each"
            )
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
        needs |= {"shift_data": "lineages", "shift_labels": "shift_data"}
        needs |= {"shift_cells": "shift_data"}
        of_contrasts = ("contrast", "profiles", "reference_contrast", "contrasts_only")
        for name, needed in [*((name, "conditions") for name in of_contrasts), *needs.items()]:
            if getattr(self, name) and not getattr(self, needed):
                raise InputError(f"{flag(name)}: found no {flag(needed)}, which it needs")


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

import importlib.util
from functools import partial

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from tqdm import trange

from counts.pseudobulks import draw_test_bulks
from data import Reference, align_genes, split_cells
from deconvolution.encode import calibrate_to
from deconvolution.fit import sum_agreement
from deconvolution.samples import add_to_sums
from evaluation.baselines import ScDesign2, ScVI, draw_cell_type_nb, train_anew, train_published
from evaluation.contrasts import FEWEST_CELLS, measure_contrasts, plan_contrasts
from evaluation.metrics import (
    CONTRAST_METRICS,
    METRICS,
    CellMetrics,
    proportion_names,
    setting_of,
)
from evaluation.proportions import Methods, measure_foreign, measure_pseudobulks, plan_proportions
from generation import draw_types, new_cells
from models import MODEL_FILES, Model
from plots.training import write_evaluation
from readers.counts import read_counts
from runtime.device import pick_device, seed_everything
from runtime.writing import check_writable, write_whole

CELLS_PER_SUM = 1000  # generated cells that are added up to one bulk
PERFECT_SEED = 1_000_000  # added to the seed, for cells of the perfect model that are no others'


def load_trained(folder, reference, device, fewest=2):
    """Model of a folder of weights, and the Reference with the cells held out that it lists.

    fewest: held-out cells that there must be.

    Raises:
        InputError: the weights are of another dataset, or hold out fewer cells.
    """
    model = Model.load(folder, device)
    reference = model.split(reference)
    if len(reference.test) < fewest:
        raise InputError(
            f"{folder / MODEL_FILES[1]}: no cells were held out, so nothing can be measured"
        )
    return model, reference


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


def decode_types(model, reference, codes, generator, log_factor=None, decoder=None):
    """Counts (N x G) of cells of types ``codes`` (N) in the genes of the data, CSR.

    z of the mixture, decoded. log_factor: (1, G) in the decoder's genes, or None. decoder: in place
    of the model's.
    """
    decoder = model.decoder if decoder is None else decoder
    k = torch.as_tensor(codes, device=decoder.mu.device)
    X = new_cells(decoder, k, generator, log_factor)
    return align_genes(X, model.genes, reference.genes, "the decoder", report=False)[0]


def draw_decoded(model, reference, generator, log_factor=None, decoder=None):
    """Cells of the held-out types by :func:`decode_types`."""
    codes = reference.test_codes
    return decode_types(model, reference, codes, generator, log_factor, decoder), codes


def draw_real(reference, rng):
    """Training cells of the held-out types."""
    rows = match_types(reference.codes, reference.test_codes, reference.train, rng)
    return reference.cells.X[rows], reference.codes[rows]


def draw_nb(reference, rng):
    """Cells of the held-out types, genes negative binomial."""
    rows, target = reference.train, reference.test_codes
    return draw_cell_type_nb(reference.cells.X[rows], reference.codes[rows], target, rng), target


def draw_fitted(reference, fitted):
    """Cells of the held-out types by a baseline's model, ScDesign2 or ScVI."""
    return fitted.draw(reference.test_codes), reference.test_codes


def draw_from_file(path, generated, codes, target, rng):
    """Cells of a file of generated ones (M x G) with types codes (M), of the types ``target``."""
    rows = match_types(codes, target, np.arange(len(codes)), rng)
    if len(rows) < 2:
        raise InputError(f"{path}: found {len(rows)} cells of the held-out types")
    return generated[rows], codes[rows]


def read_generated(path, model, reference):
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
    cell_types = model.cell_types
    codes = pd.Index(cell_types).get_indexer(names)
    if (codes < 0).any():
        unknown = names[codes < 0].iloc[0]
        raise InputError(f"{path}: cell type {unknown} is not one of the model's")
    X, _ = align_genes(generated.X, generated.var_names, reference.genes, path)
    n_target = np.bincount(reference.test_codes, minlength=len(cell_types))
    n_file = np.bincount(codes, minlength=len(cell_types))
    short = {
        cell_types[k]: f"{n_file[k]} of {n_target[k]}" for k in np.flatnonzero(n_file < n_target)
    }
    if short:
        print(f"{path}: fewer cells than are held out: {short}")
    return X, codes


def calibration_to_held_out(model, reference):
    """Factors that calibrate to the sum of the held-out cells, as a logarithm (1, G)."""
    bulk = sp.csr_matrix(model.counts(reference, reference.test).sum(axis=0))
    return calibrate_to(bulk, model)[0]


def cell_methods(model, reference, cfg, rng):
    """Every method of the table, its model trained: name -> function that draws (X, codes)."""
    generator = torch.Generator(model.device).manual_seed(cfg.seed)
    methods = {}
    if cfg.generated is None:
        methods["bulk2sc"] = partial(draw_decoded, model, reference, generator)
    else:
        cells = read_generated(cfg.generated, model, reference)
        target = reference.test_codes
        methods["bulk2sc"] = partial(draw_from_file, cfg.generated, *cells, target, rng)
    if cfg.compare and cfg.generated is None:
        log_factor = calibration_to_held_out(model, reference)
        methods["calibrated"] = partial(draw_decoded, model, reference, generator, log_factor)
    if cfg.compare:
        methods["other real cells"] = partial(draw_real, reference, rng)
    methods["cell-type NB"] = partial(draw_nb, reference, rng)
    if cfg.compare:
        cells, codes = reference.cells[reference.train], reference.codes[reference.train]
        seed = model.metadata["seed"]
        print(f"{model.folder}: fitting scDesign2 and the published recipe", flush=True)
        copula = ScDesign2(cells.X, codes, seed)
        methods["scDesign2 copula"] = partial(draw_fitted, reference, copula)
        published = train_published(cfg, model.folder, model.metadata)
        methods["published recipe"] = partial(
            draw_decoded, model, reference, generator, decoder=published
        )
        if importlib.util.find_spec("scvi"):
            print(f"{model.folder}: training scVI", flush=True)
            methods["scVI"] = partial(draw_fitted, reference, ScVI(cells, codes, seed))
    return methods


# ---------------------------------------------------------------------------------- measurements
# Each returns rows (method, metric, type code or None for all types, value).


def measure_cells(model, reference, cfg, rng):
    """Every method's cells against the held-out ones, and a perfect model's."""
    cell_metrics = CellMetrics(reference.cells, reference.held_out, reference.codes, cfg.n_trees)
    methods = cell_methods(model, reference, cfg, rng)
    own_generator = torch.Generator(model.device).manual_seed(cfg.seed + PERFECT_SEED)
    rows, of_perfect = [], []
    if cfg.retrain:
        anew = retrain(model, reference, own_generator, cfg)
        anew_metrics = CellMetrics(anew[1].cells, anew[1].held_out, anew[1].codes, cfg.n_trees)
    for i in trange(cfg.n_draws, desc=f"cells of {model.folder}", unit="draw"):
        ceiling = compare_perfect(model, reference, own_generator, i, cfg)
        of_perfect += [("perfect model", *row) for row in ceiling]
        for method, draw in methods.items():
            X, codes = draw()
            real = method == "other real cells"
            values = cell_metrics.compare(X, codes, seed=i, trained_on=real)
            # The space is fitted on these real cells, too, which no generated cells can match.
            values += [] if real else excess_auroc(values, ceiling)
            rows += [(method, *row) for row in values]
        if cfg.retrain:  # against cells of the model that it was trained on
            cells = draw_decoded(*anew, own_generator)
            values = anew_metrics.compare(*cells, seed=i)
            values += excess_auroc(values, ceiling)
            of_perfect += [("model trained anew", *row) for row in values]
    print(f"{model.folder}: unseen real cells", flush=True)
    return rows + measure_left_out(reference, cfg) + of_perfect


def simulate(model, reference, generator):
    """A data set of the model's own cells, AnnData (N x G): as many of each type as real ones."""
    simulated = reference.cells.copy()
    simulated.X = decode_types(model, reference, reference.codes, generator)
    return simulated


def compare_perfect(model, reference, generator, seed, cfg):
    """Fresh cells of the model against a data set of its cells, also in the metrics' space.

    Args:
        generator: torch Generator. seed: of compare.

    Returns:
        rows of :meth:`CellMetrics.compare`.
    """
    simulated = simulate(model, reference, generator)
    cell_metrics = CellMetrics(simulated, reference.held_out, reference.codes, cfg.n_trees)
    return cell_metrics.compare(*draw_decoded(model, reference, generator), seed)


def retrain(model, reference, generator, cfg):
    """A Model that has been trained on cells of this one, and these as its Reference.

    They are split as the model's own cells were.
    """
    simulated = replace(reference, cells=simulate(model, reference, generator))
    decoder, metadata = train_anew(
        cfg, model.folder, simulated.cells, reference.codes, model.metadata
    )
    anew = replace(model, decoder=decoder, metadata=metadata)
    return anew, simulated.split_as(metadata, "the model trained anew")


def excess_auroc(values, ceiling):
    """Rows of the excess of AUROC over the perfect model's.

    values, ceiling: rows of :meth:`CellMetrics.compare`, of a method and of the perfect model.
    """
    auroc, best = ({metric: v for metric, k, v in rows if k is None} for rows in (values, ceiling))
    names = {f"random-forest AUROC, {of}": f"excess of AUROC, {of}" for of in ("PCs", "genes")}
    return [(excess, None, auroc[name] - best[name]) for name, excess in names.items()]


def measure_left_out(reference, cfg):
    """Half of the training cells, in a space that was fitted without them."""
    cells, codes, held_out = reference.cells, reference.codes, reference.held_out
    left_out = reference.train[split_cells(codes[reference.train], 0.5, cfg.seed)]
    if len(np.unique(codes[left_out])) < 2:
        return []
    kept = np.ones(cells.n_obs, dtype=bool)
    kept[left_out] = False
    cell_metrics = CellMetrics(cells[kept].copy(), held_out[kept], codes[kept], cfg.n_trees)
    values = cell_metrics.compare(cells.X[left_out], codes[left_out], cfg.seed)
    # Copying is not measured: these cells are neither generated nor part of the space.
    return [("unseen real cells", *row) for row in values if not row[0].startswith("nearest")]


def measure_sums(model, reference, cfg, rng, n=10):
    """Cells generated for n pseudobulks of held-out cells, added up again, against these bulks."""
    decoder, n_types = model.decoder, len(model.cell_types)
    X, codes = model.counts(reference, reference.test), reference.test_codes
    bulk, _ = draw_test_bulks(X, codes, n_types, n, cfg.cells_per_bulk, rng)  # (n, G)
    log_factor, pi = calibrate_to(sp.csr_matrix(bulk), model)
    generator = torch.Generator(model.device).manual_seed(cfg.seed)
    k = draw_types(pi, CELLS_PER_SUM, generator)  # (n * CELLS_PER_SUM)
    sample = torch.arange(n, device=k.device).repeat_interleave(CELLS_PER_SUM)
    rows = []
    for method, factor in (("bulk2sc", None), ("calibrated", log_factor)):
        sums = np.zeros(bulk.shape)
        add_to_sums(sums, new_cells(decoder, k, generator, factor, sample), sample.cpu().numpy())
        agreement = sum_agreement(bulk, sums, np.ones(bulk.shape[1], bool))
        rows.append((method, "sum of cells against bulk, Pearson", None, agreement.mean()))
    return rows


def measure(model, reference, plan, cfg):
    """Everything that is measured of one training; plan: of :func:`plan_proportions`."""
    methods = Methods(model, reference, cfg)
    # First, so that a file that cannot be used fails within seconds.
    rows = measure_foreign(methods, plan, cfg)
    rng = seed_everything(cfg.seed)
    if not cfg.proportions_only:
        rows += measure_cells(model, reference, cfg, rng)
        if cfg.compare and cfg.generated is None:
            print(f"{model.folder}: sums of cells", flush=True)
            for _ in range(cfg.n_draws):
                rows += measure_sums(model, reference, cfg, rng)
    return rows + measure_pseudobulks(methods, plan.lineage_of, cfg, rng)


# ----------------------------------------------------------------------------------------- tables


def summarise(table, n_weights, known=METRICS):
    """Mean and std of each metric: over trainings if there are several, else over draws.

    Args:
        table: data frame with the columns weights (or what else is to count once, as a donor),
            method, metric, cell_type, value. n_weights: how many of them there are.
        known: best possible value of each metric, in the order of the table.

    Returns:
        data frame with the columns metric, best, cell_type, method, mean, std, n.
    """
    keys = ["metric", "cell_type", "method"]
    if n_weights > 1:
        table = table.groupby([*keys, "weights"], sort=False, as_index=False)["value"].mean()
    table = table.groupby(keys, sort=False)["value"].agg(["mean", "std", "count"]).reset_index()
    order = {metric: i for i, metric in enumerate(known)}
    # Metrics of all cells first, then each type; a stable sort leaves the methods in their order.
    table = table.sort_values(
        ["cell_type", "metric"],
        key=lambda column: column.map(order) if column.name == "metric" else column,
        kind="stable",
    )
    table.insert(1, "best", table["metric"].map(known))
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
    best = dict(zip(table["metric"], table["best"], strict=True))
    wide = wide.loc[list(best), list(dict.fromkeys(table["method"]))].fillna("")
    wide.index = [f"{metric} ({value:g})" for metric, value in best.items()]
    return (wide.T if transpose else wide).to_string()


NEAR = 0.05  # excess of AUROC, what so few cells cost any model: docs/results.md


def conclude_cells(mean):
    """What to conclude of the cells, in plain words: lines. mean: of (method, metric)."""

    def read(metric, method):
        return mean.get((method, metric), np.nan)

    forests = [f"random-forest AUROC, {of}" for of in ("PCs", "genes")]
    methods = "bulk2sc", "perfect model", "cell-type NB"
    ours, perfect, simple = (np.array([read(m, method) for m in forests]) for method in methods)
    if np.isnan(perfect).any():
        return []
    said = "no more real than cells of independent genes"
    if (ours - perfect).mean() <= NEAR:
        said = "about as real as a perfect model's"
    elif ours.mean() < simple.mean():
        said = "more real than cells of independent genes, less real than a perfect model's"
    a, b, c = ("{:.2f} and {:.2f}".format(*pair) for pair in (ours, perfect, simple))
    ratio, best, worst = (f"{read('within-type variance ratio', m):.2f}" for m in methods)
    return [
        f"The cells are {said}.",
        f"  A classifier tells them from real ones with AUROC {a} (on 20 PCs and on genes; 0.5: it "
        "cannot, 1: always).",
        f"  A perfect model of this size would read {b}; independent genes (cell-type NB), {c}.",
        f"  Cells of a type vary {ratio} times as much as real ones (perfect model {best}, "
        f"cell-type NB {worst}).",
    ]


def conclude_proportions(mean):
    """What to conclude of the proportions, in plain words: lines. mean: of (method, metric)."""
    lines = []
    for _, metric in (key for key in mean.index if key[0] == "bulk2sc"):
        setting = setting_of(metric)
        if not metric.startswith("proportions RMSE") or setting.endswith("lineages"):
            continue
        methods = "bulk2sc", "NNLS", "constant answer"
        ours, nnls, constant = (mean[method, metric] for method in methods)
        said = "no better than one answer for all bulks"
        if ours < min(nnls, constant):
            said = "better than the simple answers"
        elif ours < constant:
            said = "better than one answer for all bulks, not better than NNLS"
        of = {"within": "pseudobulks of held-out cells", "shift": "a simulated other platform"}
        lines.append(
            f"Proportions of {of.get(setting, setting)} are {said}: RMSE {ours:.3f}; non-negative "
            f"least squares {nnls:.3f}, the mean truth for all bulks {constant:.3f}."
        )
    return lines


def print_conclusions(table, trainings, cfg):
    """Print what to conclude, before the numbers. table: of :func:`summarise`, all cell types."""
    mean = table.set_index(["method", "metric"])["mean"]
    n_cells = ", ".join(f"{len(reference.test):,}" for _, reference in trainings)
    print(f"\n{n_cells} held-out cells; trainings: {len(trainings)}, draws of each: {cfg.n_draws}")
    print("\n".join([*conclude_cells(mean), *conclude_proportions(mean)]) + "\n")


def print_tables(table, cfg):
    """Print the tables of cells and of proportions, all cell types together."""
    n_trainings = 1 + len(cfg.more_weights)
    over = f"{n_trainings} trainings" if n_trainings > 1 else f"{cfg.n_draws} draws"
    print(f"metric (best value), mean ± std over {over}")
    of_proportions = table["metric"].str.startswith("proportions")
    if not cfg.proportions_only:
        print(format_table(table[~of_proportions]))
    print(f"\nproportions of {cfg.n_pseudobulks} pseudobulks per draw, or of real bulks")
    print_proportions(table[of_proportions])
    if cfg.compare and not cfg.proportions_only and not importlib.util.find_spec("scvi"):
        print("scVI left out: scvi-tools is not installed (pip install scvi-tools)")


def print_proportions(table):
    """Print a table for each kind of bulks, methods in rows."""
    for setting, part in table.groupby(table["metric"].map(setting_of), sort=False):
        short = part["metric"].str.removeprefix("proportions ").str.removesuffix(f", {setting}")
        print(f"\nproportions, {setting}")
        print(format_table(part.assign(metric=short), transpose=True))


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
    rows = [row for training in trainings for row in measure_contrasts(*training, plan, cfg)]
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


def measure_all(trainings, plan, cell_types, cfg):
    """Everything about cells and proportions, of all trainings: a table of :func:`summarise`.

    plan: of :func:`plan_proportions`.
    """
    rows = []
    for training in trainings:
        rows += [(str(training[0].folder), *row) for row in measure(*training, plan, cfg)]
    if not rows:
        raise InputError(
            f"{cfg.weights}: no cells were held out, so nothing can be measured; expected "
            "--shift-data, or --bulk with --fractions"
        )
    table = pd.DataFrame(rows, columns=["weights", "method", "metric", "cell_type", "value"])
    # "" stands for all types: an empty field in the csv, and a key that groupby keeps. Others are
    # codes of types or, of proportions, names of types and lineages.
    names = {None: ""} | dict(enumerate(cell_types))
    table["cell_type"] = [names.get(key, key) for key in table["cell_type"]]
    known = dict(METRICS)
    for other in plan.others:
        known |= proportion_names(f", {other.name}")
    return summarise(table, len(trainings), known)


def check_out(folder):
    """Check, before anything is measured, that results can be written, and replace only our own.

    Raises:
        InputError: they cannot, or a file of their name is there that evaluate.py did not write.
    """
    check_writable(folder)
    table, picture = folder / "evaluation.csv", folder / "evaluation.png"
    if not is_own(table, table.name):  # a picture cannot tell by itself
        for path in filter(Path.exists, (table, picture)):
            raise InputError(
                f"{path}: found a file that is not from evaluate.py, expected another --out"
            )


def main(cfg):
    check_out(cfg.out)
    device = pick_device(cfg.device)
    reference = Reference.load(cfg)
    cell_types = reference.cell_types
    proportions, plan = plan_proportions(cfg, cell_types), None
    if cfg.conditions is not None and not cfg.proportions_only:
        plan = plan_contrasts(cfg, cell_types)
    # Bulks of other cells than the reference's need no held-out ones.
    fewest = 0 if cfg.contrasts_only or cfg.proportions_only else 2
    trainings = [
        load_trained(folder, reference, device, fewest)
        for folder in (cfg.weights, *cfg.more_weights)
    ]
    tables = []
    if plan is not None:
        table, donors = measure_states(trainings, plan, cfg)
        tables.append(table)
    if not cfg.contrasts_only:
        tables.insert(0, measure_all(trainings, proportions, cell_types, cfg))
    table = pd.concat(tables, ignore_index=True)
    overall = table[table["cell_type"] == ""]
    write_whole(cfg.out / "evaluation.csv", lambda path: table.to_csv(path, index=False))
    drawn = overall.assign(setting=overall["metric"].map(setting_of))
    write_evaluation(cfg.out / "evaluation.png", drawn)
    of_contrasts = overall["metric"].isin(CONTRAST_METRICS)
    if not cfg.contrasts_only:
        print_conclusions(overall[~of_contrasts], trainings, cfg)
        print_tables(overall[~of_contrasts], cfg)
    if plan is not None:
        print_contrasts(overall[of_contrasts], plan, donors)
    print(f"wrote evaluation.csv and evaluation.png to {cfg.out}")


if __name__ == "__main__":
    run_script(main, settings)
