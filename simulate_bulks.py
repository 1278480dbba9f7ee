"""Pseudobulks with known fractions, and a reference of other cells, to test deconvolution on.

    python simulate_bulks.py                                   # embedded data
    python simulate_bulks.py --data atlas.h5ad --n-bulks 50 --noise 0.5 --missing "B cells"

Half of the cells are summed into bulks; the other half is the reference, so that no method sees a
cell in both. Tables are laid out as omnideconv takes them: the bulk has genes in rows, the
fractions have samples in rows.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from data import CellSettings
from runtime.errors import InputError, some
from runtime.flags import check_least, in_groups
from runtime.script import parse_args, run_script


@in_groups(
    {
        "input": "data labels samples",
        "output": "out",
        "bulks": "n_bulks cells_per_bulk concentration noise missing",
    },
    gone={"device": "cpu"},
)
@dataclass
class Settings(CellSettings):
    """Simulate bulk samples with known fractions of cells.

    Example: python simulate_bulks.py --data atlas.h5ad --labels cell_type --n-bulks 50
    """

    weights: Path = Path("weights")
    """Folder that may have cell types which train_gmvae.py found; they are read where --labels are
    not given."""
    out: Path = Path("simulated")
    """Beginning of the names of the files: x.bulk.csv, x.fractions.csv and x.reference.h5ad."""
    n_bulks: int = 20
    """Samples to simulate."""
    cells_per_bulk: int = 1000
    """Cells in each of them, drawn with replacement."""
    concentration: float = 1.0
    """Of the Dirichlet distribution of fractions: 1 for any mixture alike, below for samples of few
    types, above for samples near to equal fractions."""
    noise: float = 0.0
    """Standard deviation of the log factor by which another platform measures each gene; the same
    in all bulks. 0.5 is moderate, 1 as far apart as single cells and whole transcripts."""
    missing: tuple[str, ...] = ()
    """Cell types that the bulks hold but the reference lacks."""

    def __post_init__(self):
        super().__post_init__()
        check_least(self, ("n_bulks", "cells_per_bulk"))
        if not 0 < self.concentration < float("inf"):
            raise InputError(f"--concentration: found {self.concentration}, expected above 0")
        if not 0 <= self.noise <= 5:
            raise InputError(f"--noise: found {self.noise}, expected 0 to 5")
        for path in files_of(self):
            if path.exists() and Path(self.data).exists() and path.samefile(self.data):
                raise InputError(f"--out {self.out}: would write {path} over the input")


def files_of(cfg):
    """Where the bulks, their fractions and the reference are written."""
    endings = ("bulk.csv", "fractions.csv", "reference.h5ad")
    return [cfg.out.with_name(f"{cfg.out.name}.{ending}") for ending in endings]


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

import numpy as np
import pandas as pd

from counts.pseudobulks import draw_pseudobulks
from data import Reference, split_cells
from runtime.device import seed_everything
from runtime.writing import check_writable, write_h5ad, write_whole


def check_types(cfg, codes, cell_types):
    """Indices of the types that the reference is to lack.

    Raises:
        InputError: one is no cell type of the data, too few are left, or a type has one cell only.
    """
    wrong = [name for name in cfg.missing if name not in cell_types]
    if wrong:
        raise InputError(
            f"--missing: found {some(wrong)}, expected cell types of {cfg.data} "
            f"({some(cell_types, 20)})"
        )
    if len(cell_types) < 2:
        raise InputError(
            f"{cfg.data}: found one cell type ({some(cell_types)}), expected two or more to mix"
        )
    if len(set(cfg.missing)) > len(cell_types) - 2:
        raise InputError(
            f"--missing: found {len(cfg.missing)} types, expected to leave two or more"
        )
    few = [name for k, name in enumerate(cell_types) if np.sum(codes == k) < 2]
    if few:
        raise InputError(
            f"{cfg.data}: found cell types with one cell ({some(few)}), expected two or more: one "
            "for the bulks, one for the reference"
        )
    return [list(cell_types).index(name) for name in cfg.missing]


def measure(bulk, noise, rng):
    """Counts (n x G) of bulks as another platform measures them.

    x_g ~ Poisson(b_g f_g),   log f_g ~ N(0, noise^2), scaled to keep each bulk's sum
    """
    if not noise:
        return np.rint(bulk).astype(np.int64)
    expected = bulk * np.exp(noise * rng.standard_normal(bulk.shape[1]))
    expected *= bulk.sum(axis=1, keepdims=True) / expected.sum(axis=1, keepdims=True)
    return rng.poisson(expected)


def main(cfg):
    check_writable(cfg.out.parent)
    rng = seed_everything(cfg.seed)
    reference = Reference.load(cfg)
    cells, codes, cell_types = reference.cells, reference.codes, reference.cell_types
    missing = check_types(cfg, codes, cell_types)
    of_bulks = split_cells(codes, 0.5, cfg.seed)  # (N)
    proportions = rng.dirichlet(np.full(len(cell_types), cfg.concentration), cfg.n_bulks)
    n_cells = np.full(cfg.n_bulks, cfg.cells_per_bulk)
    bulk, fractions = draw_pseudobulks(
        cells.X[of_bulks], codes[of_bulks], proportions, n_cells, rng
    )
    names = [f"bulk_{i + 1}" for i in range(cfg.n_bulks)]
    counts = pd.DataFrame(measure(bulk, cfg.noise, rng).T, list(cells.var_names), names)
    fractions = pd.DataFrame(fractions, names, list(cell_types))
    others = cells[~of_bulks & ~np.isin(codes, missing)].copy()
    others.obs["cell_type"] = others.obs["cell_type"].cat.remove_unused_categories()

    bulk_file, truth_file, reference_file = files_of(cfg)
    write_whole(bulk_file, partial(counts.to_csv, index_label="gene"))
    write_whole(truth_file, partial(fractions.round(6).to_csv, index_label="sample"))
    write_h5ad(reference_file, others)
    of_cells = f"{cfg.n_bulks} bulks of {cfg.cells_per_bulk:,} cells"
    print(f"wrote {bulk_file}: {len(counts):,} genes x {of_cells}")
    print(f"wrote {truth_file}: {cfg.n_bulks} bulks x {len(cell_types)} cell types")
    lacks = f", without {some(cfg.missing)}" if cfg.missing else ""
    print(f"wrote {reference_file}: {others.n_obs:,} other cells{lacks}")


if __name__ == "__main__":
    run_script(main, settings)
