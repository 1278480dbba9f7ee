"""Are my cells good? Generated against held-out cells, predicted against true proportions.

    python evaluate.py                                          # under a minute
    python evaluate.py --data filtered_feature_bc_matrix --weights my_weights
    python evaluate.py --weights w0 --more-weights w1 w2       # mean ± std over three trainings
    python evaluate.py --bulk samples.csv --fractions measured.csv --lineages lineages.csv

Every metric is read on cells that no training has seen. Cells come from these methods:

- bulk2sc: z ~ N(mu_k, sigma_k^2) -> scDecoder, as many cells of each type as are held out
- perfect model: the ceiling on this very data set. Cells that bulk2sc generates stand for all real
  ones, training and held-out, as many of each type; and fresh ones are compared with them
- unseen real cells: half of the training cells, left out when the metrics' space is fitted
- cell-type NB: each gene negative binomial with its cell type's training mean and variance

A forest tells even the perfect model's cells from its data set's, because PCs follow the noise of
the cells they are fitted on. So AUROC is also given as its excess over the perfect model's. Below
0, cells follow the noise of the training cells.

Predicted proportions have their own tables: on pseudobulks of held-out cells, and on real bulks
whose proportions were measured. Methods:

- bulk2sc, and NNLS (non-negative least squares) on the genes that the Bulk Encoder reads
- constant answer: the mean truth of these very bulks

Prints what to conclude first. Writes evaluation.csv, which also has every cell type by itself, and
evaluation.png to --out. Other methods, platforms and data sets are compared by the scripts in
benchmarks/.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from evaluation.settings import EvaluationSettings, MeasuredBulks, check_out
from runtime.errors import InputError
from runtime.flags import in_groups
from runtime.script import parse_args, run_script

# Flags that other scripts have now.
SHIFT = ("shift_data", "shift_labels", "shift_cells")
STATES = ("donors", "conditions", "contrast", "profiles", "profile_table", "profile_types")
STATES += ("mixing", "reference_contrast", "cells_per_sample", "contrasts_only")


@in_groups(
    {
        "input": "data labels samples bulk fractions lineages generated",
        "model": "weights more_weights",
        "output": "out",
        "what is measured": "proportions_only n_draws n_pseudobulks cells_per_bulk n_trees",
        "reading tables": "genes_in gene_column columns bulk_unit log pseudocount",
    },
    moved={
        **dict.fromkeys(("compare", "retrain"), "benchmarks/compare_cells.py"),
        **dict.fromkeys(SHIFT, "benchmarks/compare_proportions.py"),
        **dict.fromkeys(STATES, "benchmarks/compare_states.py"),
    },
)
@dataclass
class Settings(EvaluationSettings, MeasuredBulks):
    """Compare generated cells with held-out real ones, and predicted with true proportions.

    Example: python evaluate.py --data filtered_feature_bc_matrix --weights my_weights
    """

    proportions_only: bool = False
    """Measure proportions alone, not cells."""
    generated: Path | None = None
    """An .h5ad of generated cells to measure, as bulk2sc.py writes it. Default: generate them."""
    n_pseudobulks: int = 100
    """Pseudobulks of held-out cells per draw, proportions from Dirichlet(1)."""
    cells_per_bulk: int = 500
    """Cells in each pseudobulk."""
    n_trees: int = 300
    """Trees of each random forest, the slowest of the metrics."""

    def __post_init__(self):
        super().__post_init__()
        if self.generated is not None and self.more_weights:
            raise InputError("--generated: one file of cells, expected no --more-weights with it")
        if self.generated is not None and self.proportions_only:
            raise InputError("--proportions-only: found --generated as well, expected one of them")
        self.check_bulks()


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

from data import Reference
from evaluation.cells import limit_held_out, load_all, measure_cells, tool_methods
from evaluation.proportions import (
    ProportionMethods,
    measure_pseudobulks,
    measure_real_bulk,
    read_truth,
)
from evaluation.tables import (
    print_cells,
    print_conclusions,
    print_proportions,
    table_of,
    write_table,
)
from runtime.device import seed_everything


def measure(model, reference, truth, cfg):
    """Everything that is measured of one model: rows (method, metric, type, value).

    truth: of :func:`read_truth`.
    """
    methods = ProportionMethods(model, reference)
    # First, so that a file that cannot be used fails within seconds.
    rows = measure_real_bulk(methods, *truth, cfg)
    rng = seed_everything(cfg.seed)
    if not cfg.proportions_only:
        compared = limit_held_out(reference, cfg.seed)
        methods_of_cells = tool_methods(model, compared, cfg, rng)
        rows += measure_cells(model, compared, methods_of_cells, cfg)
    return rows + measure_pseudobulks(methods, truth[0], cfg, rng)


def main(cfg):
    check_out(cfg.out)
    reference = Reference.load(cfg)
    truth = read_truth(cfg, reference.cell_types)
    # Bulks of other cells than the reference's need no held-out ones.
    trained = load_all(cfg, reference, min_cells=0 if cfg.proportions_only else 2)
    rows = []
    for model, cells in trained:
        rows += [(str(model.folder), *row) for row in measure(model, cells, truth, cfg)]
    if not rows:
        raise InputError(
            f"{cfg.weights}: no cells were held out, so nothing can be measured; expected "
            "--bulk with --fractions"
        )
    table = table_of(rows, reference.cell_types, len(trained))
    overall = table[table["cell_type"] == ""]
    of_proportions = overall["metric"].str.startswith("proportions")
    print_conclusions(overall, trained, cfg)
    if not cfg.proportions_only:
        print_cells(overall[~of_proportions], cfg)
    print(f"\nproportions of {cfg.n_pseudobulks} pseudobulks per draw, or of real bulks")
    print_proportions(overall[of_proportions])
    write_table(table, cfg.out)


if __name__ == "__main__":
    run_script(main, settings)
