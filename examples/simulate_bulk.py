"""Simulate bulk samples of known composition with the decoder of weights/pbmc1k.

    python examples/simulate_bulk.py

Each sample is the sum of the counts of generated cells. Writes bulk_pbmc_simulated.csv.gz and
bulk_pbmc_simulated_proportions.csv to --out.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.script import parse_args, run_script


@dataclass
class Settings:
    """Simulate bulk samples of known composition with the decoder of weights/pbmc1k.

    Example: python examples/simulate_bulk.py --n-cells 500 --out my_folder
    """

    n_cells: int = 2000
    """Cells in each sample."""
    seed: int = 0
    """Of latents, library sizes and counts."""
    out: Path = ROOT / "examples"
    """Folder for both tables."""


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

import gzip

import numpy as np
import pandas as pd
import torch

from generation import decode_cells
from models import scDecoder
from runtime.weights import load_model

WEIGHTS = ROOT / "weights" / "pbmc1k" / "scDecoder_model.pt"
# Cell types of each sample in per cent of its cells.
COMPOSITION = pd.DataFrame(
    {
        "Classical monocytes": [30, 60, 8, 15],
        "Effector CD8+ T cells": [20, 9, 24, 9],
        "Memory B cells": [6, 3, 6, 20],
        "Memory CD4+ T cells": [12, 8, 20, 10],
        "Naive B cells": [6, 3, 5, 25],
        "Naive CD4+ T cells": [12, 8, 18, 10],
        "Naive CD8+ T cells": [8, 5, 12, 6],
        "Natural killer cells": [6, 4, 7, 5],
    },
    index=pd.Index(["balanced", "monocyte_rich", "lymphocyte_rich", "b_cell_rich"], name="sample"),
)


def simulate_bulk(decoder, n_per_type, generator):
    """Sum the counts of n_per_type (K) cells of each type. Returns counts (G), int64."""
    codes = torch.repeat_interleave(torch.arange(len(n_per_type)), torch.as_tensor(n_per_type))
    mu, var = decoder.mu[codes], decoder.var[codes]  # (N, D)
    X, _ = decode_cells(decoder, mu, var, codes, generator)  # (N, G)
    return np.asarray(X.sum(axis=0, dtype=np.int64)).ravel()


def main(cfg):
    decoder, metadata = load_model(WEIGHTS, scDecoder)
    generator = torch.Generator().manual_seed(cfg.seed)
    share = COMPOSITION[metadata["cell_types"]] / 100  # (S, K)
    n_cells = (share * cfg.n_cells).round().astype(int)
    bulks = [simulate_bulk(decoder, row, generator) for row in n_cells.to_numpy()]
    table = pd.DataFrame(dict(zip(share.index, bulks, strict=True)), index=metadata["genes"])
    table.index.name = "gene"

    # A fixed time stamp and no file name in the header: the same counts give the same file.
    text = table.to_csv(lineterminator="\n").encode()
    path = cfg.out / "bulk_pbmc_simulated.csv.gz"
    path.write_bytes(gzip.compress(text, mtime=0))
    truth = n_cells.div(n_cells.sum(axis=1), axis=0)
    truth.to_csv(cfg.out / "bulk_pbmc_simulated_proportions.csv", lineterminator="\n")
    print(f"wrote {path}: {table.shape[1]} samples x {len(table):,} genes, simulated")


if __name__ == "__main__":
    run_script(main, settings)
