"""Proportions by bulk2sc beside published estimators, also on other platforms and data sets.

    python benchmarks/compare_proportions.py
    python benchmarks/compare_proportions.py --bulk samples.csv --fractions measured.csv \\
        --lineages lineages.csv
    python benchmarks/compare_proportions.py --shift-data other_donor.h5ad --lineages lineages.csv

Bulks are of four kinds, and each method reads the same ones:

- pseudobulks of held-out cells ("within"), and the same after a simulated change of platform
- pseudobulks of other data sets, of other donors and protocols (--shift-data), by lineage
- real bulks whose lineages were measured (--bulk, --fractions)

Methods are those of evaluate.py and every estimator in benchmarks/estimators, on all genes. Writes
evaluation.csv and evaluation.png to --out.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.settings import EvaluationSettings, MeasuredBulks, check_out
from runtime.errors import InputError
from runtime.flags import check_needs, in_groups
from runtime.script import parse_args, run_script


@in_groups(
    {
        "input": "data labels samples bulk fractions lineages shift_data shift_labels shift_cells",
        "model": "weights more_weights",
        "output": "out",
        "what is measured": "n_draws n_pseudobulks cells_per_bulk",
        "reading tables": "genes_in gene_column columns bulk_unit log pseudocount",
    }
)
@dataclass
class Settings(EvaluationSettings, MeasuredBulks):
    """Compare proportions by bulk2sc with those of published estimators.

    Example: python benchmarks/compare_proportions.py --data filtered_feature_bc_matrix --weights w0
    """

    out: Path = Path("results/proportions")
    """Folder of the results, evaluation.csv and evaluation.png; those of an earlier run are
    replaced."""
    shift_data: tuple[str, ...] = ()
    """Further single-cell data sets, of other donors or protocols, each as --data is. Proportions
    of their pseudobulks are compared by lineage; --lineages names their cell types, too."""
    shift_labels: tuple[str, ...] = ()
    """Cell types of --shift-data, each as --labels is: one for all, or one for each."""
    shift_cells: tuple[str, str] | None = None
    """Only these cells of --shift-data, COLUMN VALUE: a column of .obs, and its value in the cells
    that count. Data sets without the column count as a whole."""
    n_pseudobulks: int = 100
    """Pseudobulks per draw, proportions from Dirichlet(1)."""
    cells_per_bulk: int = 500
    """Cells in each pseudobulk."""

    def __post_init__(self):
        super().__post_init__()
        check_needs(self, shift_data="lineages", shift_labels="shift_data")
        check_needs(self, shift_cells="shift_data")
        self.check_bulks()
        if len(self.shift_labels) not in (0, 1, len(self.shift_data)):
            raise InputError(
                f"--shift-labels: found {len(self.shift_labels)} for {len(self.shift_data)} "
                "--shift-data, expected one for all, or one for each"
            )


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

import importlib

import numpy as np
import scipy.sparse as sp

from counts.pseudobulks import draw_test_bulks
from data import DatasetSettings, Reference, align_genes
from evaluation.cells import load_all
from evaluation.metrics import METRICS, proportion_names, to_lineages
from evaluation.proportions import (
    ProportionMethods,
    measure_pseudobulks,
    measure_real_bulk,
    read_truth,
    score,
)
from evaluation.tables import print_conclusions, print_proportions, table_of, write_table
from readers.bulk import Bulk
from readers.counts import read_counts
from readers.labels import natural_order
from readers.lineages import lineages_in, read_lineages
from runtime.device import seed_everything
from runtime.errors import some

BULKS_PER_PLATFORM = 20  # of those with a simulated change of platform
SHIFT_DEPTH = 2e5  # counts of each of them in the genes of the Bulk Encoder


def find_estimators():
    """The Estimators of every file in benchmarks/estimators, in the order of their files."""
    files = sorted(Path(__file__).with_name("estimators").glob("*.py"))
    modules = [importlib.import_module(f"benchmarks.estimators.{file.stem}") for file in files]
    return [estimator for module in modules for estimator in module.ESTIMATORS]


def shift_platform(bulk, rng, counted=slice(None)):
    """Expected counts of bulks (S x G) as other platforms or donors would measure them.

    Every 20 bulks share a platform: factors exp(0.6 t) of genes, with t from Student's t with 4
    degrees of freedom and the logarithm cut at ±4. Each platform also loses a tenth of the genes,
    which read 0 without being marked as absent. Rows sum to 200,000 over the genes in ``counted``;
    Poisson noise is left to the caller. The Bulk Encoder trains on another model of noise:
    log-normal, with each bulk's own sd and lost genes, and no shared platform.
    """
    n_platforms, n_genes = -(-len(bulk) // BULKS_PER_PLATFORM), bulk.shape[1]
    t = rng.standard_t(4, (n_platforms, n_genes))
    factors = np.exp(np.clip(0.6 * t, -4, 4))
    factors[rng.random(factors.shape).argsort(axis=1) < round(0.1 * n_genes)] = 0
    shifted = bulk * factors.repeat(BULKS_PER_PLATFORM, axis=0)[: len(bulk)]
    return shifted / shifted[:, counted].sum(axis=1, keepdims=True) * SHIFT_DEPTH


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
    """Read the data sets of --shift-data: dict name -> Reference.

    Raises:
        InputError: as :func:`data.load_cells` and :func:`set_names`; or --shift-cells names a
            column that no set has, or leaves no cell.
    """
    labels = cfg.shift_labels or (None,)
    labels = labels * len(cfg.shift_data) if len(labels) == 1 else labels
    sets, n_selected = {}, 0
    for name, path, label in zip(set_names(cfg), cfg.shift_data, labels, strict=True):
        try:
            sets[name] = Reference.load(DatasetSettings(data=path, labels=label), found=False)
        except InputError as error:
            raise InputError(str(error).replace("--labels", "--shift-labels")) from error
        if cfg.shift_cells and (found := find_selected(path, *cfg.shift_cells)) is not None:
            sets[name], n_selected = select_cells(sets[name].cells, found, path), n_selected + 1
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
    """Reference of the cells (AnnData) that are among the barcodes; the others are counted.

    Raises:
        InputError: none is.
    """
    chosen = cells.obs_names.isin(barcodes)
    print(f"{path}: {chosen.sum():,} of {cells.n_obs:,} labelled cells are those of --shift-cells")
    if not chosen.any():
        raise InputError(f"--shift-cells: found none of the labelled cells of {path}")
    return Reference.of(cells[chosen].copy())


def keep_shared_lineages(name, reference, lineage_of, model_lineages):
    """OtherCells of the cells whose lineage the model has; the others are counted.

    Args:
        name: of the set. reference: Reference (N). lineage_of: of each of its types.

    Raises:
        InputError: fewer than two lineages are shared.
    """
    lineage = np.array(lineage_of, dtype=object)[reference.codes]
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
        f"{len(lineage) - len(rows):,} of none of them left out"
    )
    codes = np.array([shared.index(lineage[i]) for i in rows])
    return OtherCells(name, reference.X[rows], reference.genes, codes, shared)


def measure_other_cells(methods, lineage_of, other, cfg, rng):
    """Proportions of pseudobulks of another data set, over the lineages that it shares.

    Proportions of lineages are from Dirichlet(1); within a lineage, cells are drawn at random.
    Genes that the set lacks are marked as absent. lineage_of: of the model's types (K).
    """
    where = f"--shift-data {other.name}"
    X, measured = align_genes(other.X, other.genes, methods.model.genes, where)
    n_lineages, rows = len(other.lineages), []
    for _ in range(cfg.n_draws):
        bulk, true = draw_test_bulks(
            X, other.codes, n_lineages, cfg.n_pseudobulks, cfg.cells_per_bulk, rng
        )
        results = methods.predict(Bulk(bulk, measured, range(len(bulk)), where))
        results = {
            method: to_lineages(pi, lineage_of, other.lineages) for method, pi in results.items()
        }
        rows += score(true, results, other.lineages, f", {other.name}")
    return rows


def read_sets(cfg, cell_types):
    """Lineages (K), measured fractions and OtherCells that the settings name; None, None, []."""
    if cfg.lineages is None:
        return None, None, []
    sets = read_other_cells(cfg)
    types = {name for reference in sets.values() for name in reference.cell_types}
    lineage_of, fractions = read_truth(cfg, cell_types, types)
    others = []
    for name, reference in sets.items():
        own = read_lineages(cfg.lineages, reference.cell_types, None, name)
        others.append(keep_shared_lineages(name, reference, own, lineages_in(lineage_of)))
    return lineage_of, fractions, others


def measure(model, reference, truth, cfg):
    """Everything that is measured of one model: rows (method, metric, type or lineage, value)."""
    lineage_of, fractions, others = truth
    methods = ProportionMethods(model, reference, find_estimators(), cfg.seed)
    rows = measure_real_bulk(methods, lineage_of, fractions, cfg)
    rng = np.random.default_rng(cfg.seed)
    for other in others:
        rows += measure_other_cells(methods, lineage_of, other, cfg, rng)
    rng = seed_everything(cfg.seed)
    rows += measure_pseudobulks(methods, lineage_of, cfg, rng)
    read = np.isin(model.genes, model.encoder_genes)

    def change(bulk):
        return rng.poisson(shift_platform(bulk, rng, read))

    return rows + measure_pseudobulks(methods, lineage_of, cfg, rng, ", shift", change)


def main(cfg):
    check_out(cfg.out)
    reference = Reference.load(cfg)
    truth = read_sets(cfg, reference.cell_types)
    trained = load_all(cfg, reference, min_cells=0)
    rows = []
    for model, cells in trained:
        rows += [(str(model.folder), *row) for row in measure(model, cells, truth, cfg)]
    if not rows:
        raise InputError(
            f"{cfg.weights}: no cells were held out, so nothing can be measured; expected "
            "--shift-data, or --bulk with --fractions"
        )
    known = dict(METRICS)
    for other in truth[2]:
        known |= proportion_names(f", {other.name}")
    table = table_of(rows, reference.cell_types, len(trained), known)
    overall = table[table["cell_type"] == ""]
    print_conclusions(overall, trained, cfg)
    print_proportions(overall)
    write_table(table, cfg.out)


if __name__ == "__main__":
    run_script(main, settings)
