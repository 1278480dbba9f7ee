"""Cells of bulk2sc beside those of other methods, trained here on the same cells. Takes minutes.

    python benchmarks/compare_cells.py
    python benchmarks/compare_cells.py --data pbmc1k_v3 --weights w0 --more-weights w1 w2

Beside the methods of evaluate.py:

- calibrated: bulk2sc.py --calibrate uniform, to the sum of the held-out cells; its cells follow the
  noise of these
- other real cells: training cells in place of generated ones
- scDesign2 copula: each gene's best count distribution in its cell type, and their correlations
- published recipe: scDecoder with --pairing prior --loss mse_l1, trained here
- scVI: trained here, if scvi-tools is installed

Also how well the cells of bulk2sc add up to their bulk, plain and calibrated. Writes evaluation.csv
and evaluation.png to --out.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.settings import EvaluationSettings, check_out
from runtime.flags import in_groups
from runtime.script import parse_args, run_script


@in_groups(
    {
        "input": "data labels samples",
        "model": "weights more_weights",
        "output": "out",
        "what is measured": "n_draws retrain n_trees cells_per_bulk",
    }
)
@dataclass
class Settings(EvaluationSettings):
    """Compare cells of bulk2sc with those of other methods.

    Example: python benchmarks/compare_cells.py --data filtered_feature_bc_matrix --weights w0
    """

    out: Path = Path("results/cells")
    """Folder of the results, evaluation.csv and evaluation.png; those of an earlier run are
    replaced."""
    retrain: bool = False
    """Train stages 1 and 2 once more, on cells that the fitted model draws, and measure this *model
    trained anew*: how much realism so few cells cost even a model of the right shape."""
    n_trees: int = 300
    """Trees of each random forest, the slowest of the metrics."""
    cells_per_bulk: int = 500
    """Cells in each pseudobulk whose generated cells are added up again."""


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

import importlib.util
from functools import partial

import numpy as np
import scipy.sparse as sp
import torch

from benchmarks.scdesign2 import ScDesign2
from benchmarks.trained import ScVI, train_anew, train_published
from counts.pseudobulks import draw_test_bulks
from data import Reference
from deconvolution.encode import calibrate_to
from deconvolution.fit import sum_agreement
from deconvolution.samples import add_to_sums
from evaluation.cells import (
    PERFECT_SEED,
    REAL,
    compare_perfect,
    draw_decoded,
    excess_auroc,
    limit_held_out,
    load_all,
    match_types,
    measure_cells,
    simulate,
    tool_methods,
)
from evaluation.metrics import CellMetrics
from evaluation.tables import print_cells, table_of, write_table
from generation import draw_types, new_cells
from runtime.device import seed_everything

CELLS_PER_SUM = 1000  # generated cells that are added up to one bulk


def draw_real(reference, rng):
    """Training cells of the held-out types."""
    rows = match_types(reference.codes, reference.test_codes, reference.train, rng)
    return reference.cells.X[rows], reference.codes[rows]


def draw_fitted(reference, baseline):
    """Cells of the held-out types by a baseline's model, ScDesign2 or ScVI."""
    return baseline.draw(reference.test_codes), reference.test_codes


def all_methods(model, reference, cfg, rng):
    """Every method, its model trained: name -> function that draws counts (N x G) and types (N)."""
    methods = tool_methods(model, reference, cfg, rng)
    generator = torch.Generator(model.device).manual_seed(cfg.seed)
    held_out = sp.csr_matrix(model.counts(reference, reference.test).sum(axis=0))
    log_factor, _ = calibrate_to(held_out, model)  # (1, G)
    methods["calibrated"] = partial(draw_decoded, model, reference, generator, log_factor)
    methods[REAL] = partial(draw_real, reference, rng)
    cells, codes = reference.cells[reference.train], reference.codes[reference.train]
    seed = model.metadata["seed"]
    print(f"{model.folder}: fitting scDesign2 and the published recipe", flush=True)
    methods["scDesign2 copula"] = partial(draw_fitted, reference, ScDesign2(cells.X, codes, seed))
    published = train_published(cfg, model.folder, model.metadata)
    methods["published recipe"] = partial(
        draw_decoded, model, reference, generator, decoder=published
    )
    if importlib.util.find_spec("scvi"):
        print(f"{model.folder}: training scVI", flush=True)
        scvi = ScVI(cells, codes, seed, cfg.device)
        methods["scVI"] = partial(draw_fitted, reference, scvi)
    return methods


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


def measure_retrained(model, reference, cfg):
    """Cells of a model trained anew, against those that it was trained on."""
    generator = torch.Generator(model.device).manual_seed(cfg.seed + PERFECT_SEED)
    anew, simulated = retrain(model, reference, generator, cfg)
    space = CellMetrics(simulated.cells, simulated.held_out, simulated.codes, cfg.n_trees)
    rows = []
    for i in range(cfg.n_draws):
        ceiling = compare_perfect(model, reference, generator, i, cfg)
        values = space.compare(*draw_decoded(anew, simulated, generator), seed=i)
        values += excess_auroc(values, ceiling)
        rows += [("model trained anew", *row) for row in values]
    return rows


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


def measure(model, reference, cfg):
    """Everything that is measured of one model: rows (method, metric, type, value)."""
    # First, so that a missing file is said at once.
    rows = measure_retrained(model, reference, cfg) if cfg.retrain else []
    rng = seed_everything(cfg.seed)
    methods = all_methods(model, reference, cfg, rng)
    rows += measure_cells(model, reference, methods, cfg)
    print(f"{model.folder}: sums of cells", flush=True)
    return rows + [
        row for _ in range(cfg.n_draws) for row in measure_sums(model, reference, cfg, rng)
    ]


def main(cfg):
    check_out(cfg.out)
    reference = Reference.load(cfg)
    trained, rows = load_all(cfg, reference), []
    for model, cells in trained:
        compared = limit_held_out(cells, cfg.seed)
        rows += [(str(model.folder), *row) for row in measure(model, compared, cfg)]
    table = table_of(rows, reference.cell_types, len(trained))
    print_cells(table[table["cell_type"] == ""], cfg)
    if not importlib.util.find_spec("scvi"):
        print("scVI left out: scvi-tools is not installed (pip install scvi-tools)")
    write_table(table, cfg.out)


if __name__ == "__main__":
    run_script(main, settings)
