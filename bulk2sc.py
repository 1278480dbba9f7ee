"""Bulk RNA-seq in, single cells out.

    python bulk2sc.py                                          # embedded data, shipped weights
    python bulk2sc.py --bulk samples.csv --n-cells 1000        # 1,000 cells for each bulk sample

For each bulk: Bulk Encoder -> cell type k ~ proportions -> z ~ N(mu_k, sigma_k^2) -> scDecoder ->
counts of one cell. Without --bulk, each batch of --batch-size reference cells is summed into one
bulk, and each batch yields one cell. Writes one .h5ad and, with --bulk, proportions.csv and
proportions.png beside it (see README, "The output").
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data import DatasetSettings
from runtime.errors import InputError
from runtime.script import lead_with, parse_args, plain_settings, run_script


@lead_with("bulk", "n_cells", "out", "weights", "calibrate", "platform", "data", "batch_size")
@dataclass
class Settings(DatasetSettings):
    """Generate single cells from bulk RNA-seq samples.

    Example: python bulk2sc.py --weights weights/pbmc1k --bulk samples.csv --n-cells 1000
    """

    bulk: Path | None = None
    """Bulk samples: csv, tsv or GCT (genes in rows or columns, symbols or Ensembl ids) or .h5ad.
    Default: batches of --data."""
    n_cells: int = 1000
    """Cells to generate: for each bulk sample with --bulk, in all without it."""
    batch_size: int = 100
    """Reference cells that make one bulk, when there is no --bulk."""
    calibrate: Literal["auto", "none", "uniform", "types"] = "auto"
    """What generated cells take of their bulk beyond proportions and states (needs --bulk). types:
    what a gene differs by is allotted to the cell types and to the platform; uniform: one factor
    per gene for all types, so that cells add up to their bulk, the platform's part included; none;
    auto: types if the reference was of several samples, else none."""
    platform: Literal["keep", "remove", "none"] = "keep"
    """For --calibrate types: what all bulks share against the reference is the platform's. keep:
    cells show it as the bulks do; remove: cells are as the reference's platform would measure them;
    none: there is none, as the bulks are of the reference's own platform."""
    out: Path = Path("generated.h5ad")
    """The file of generated cells; proportions of --bulk are written to the same folder."""

    def __post_init__(self):
        super().__post_init__()
        if self.n_cells < 0:
            raise InputError(f"--n-cells: found {self.n_cells}, expected 0 or more")
        if self.batch_size < 1:
            raise InputError(f"--batch-size: found {self.batch_size}, expected 1 or more")
        if self.calibrate != "auto" and self.bulk is None:
            raise InputError("--calibrate: found no --bulk, expected bulk samples to add up to")
        if self.out.suffix != ".h5ad":
            raise InputError(f"--out {self.out}: expected a name that ends in .h5ad")


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

import sys

import anndata
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from expression import expression_table
from generation import (
    MISFIT,
    BulkSamples,
    encode_batches,
    generate_cells,
    load_models,
)
from plotting import write_proportions
from runtime.device import pick_device, seed_everything
from runtime.errors import some
from runtime.writing import open_cells, write_whole


class CellTable:
    """What is kept in memory of all generated cells: everything but their counts."""

    def __init__(self, n_types, n_latent):
        self.proportions = [np.zeros((0, n_types), np.float32)]
        self.cell_type, self.bulk = [np.zeros(0, int)], [np.zeros(0, int)]
        self.latent = [np.zeros((0, n_latent), np.float32)]

    def append(self, cells):
        """Add generated Cells."""
        self.cell_type.append(cells.cell_type)
        self.bulk.append(cells.bulk)
        self.latent.append(cells.latent)

    def to_anndata(self, names, cell_types, cfg, samples=None):
        """The tables of the output: ``.obs``, ``.obsm`` and ``.uns`` of all cells.

        Args:
            names: of the bulks (S). cell_types: names (K). samples: BulkSamples with --bulk.
        """
        bulk = np.concatenate(self.bulk)
        obs = pd.DataFrame(index=[f"cell_{i}" for i in range(len(bulk))])
        obs["sample"] = pd.Categorical.from_codes(bulk, categories=names)
        cell_type = np.concatenate(self.cell_type)
        obs["cell_type"] = pd.Categorical.from_codes(cell_type, categories=cell_types)
        cells = anndata.AnnData(obs=obs)
        cells.obsm["X_latent"] = np.concatenate(self.latent)
        # An array and two lists of names: cell-type names such as "CD4+/CD25" cannot be hdf5 keys.
        cells.uns["proportions"] = np.concatenate(self.proportions)
        cells.uns["samples"] = np.array(names, dtype=object)
        cells.uns["cell_types"] = np.array(cell_types, dtype=object)
        cells.uns["settings"] = {k: str(v) for k, v in plain_settings(cfg).items()}
        if samples is not None:
            cells.uns["proportions_sd"] = samples.sd
            cells.uns["fit"] = samples.fit
            cells.obs["misfit"] = samples.fit["misfit"].to_numpy()[bulk]
        return cells


def print_cell_types(cells):
    """Print mean predicted proportion and number of cells of each type; cells: the AnnData."""
    pi = cells.uns["proportions"].astype(np.float64)
    table = {
        "mean predicted proportion": pi.mean(axis=0) if len(pi) else np.nan,
        "cells": np.bincount(cells.obs["cell_type"].cat.codes, minlength=pi.shape[1]),
    }
    table = pd.DataFrame(table, index=cells.uns["cell_types"])
    print(table.to_string(float_format="{:.3f}".format))


def proportion_table(samples, cell_types):
    """One row per bulk: ``sample``, pi of each type, ``sd <type>``, then how well it fits."""
    names = [*cell_types, *(f"sd {name}" for name in cell_types)]
    values = pd.DataFrame(np.hstack([samples.proportions, samples.sd]), columns=names)
    sample = pd.Series(samples.names, name="sample")
    return pd.concat([sample, values, samples.fit.reset_index(drop=True)], axis=1)


def write_samples(cfg, samples, cell_types):
    """Write proportions.csv and proportions.png; print how well each sample fits, and warn."""
    folder, fit = cfg.out.parent, samples.fit
    table = proportion_table(samples, cell_types)
    write_whole(folder / "proportions.csv", lambda path: table.to_csv(path, index=False))
    write_proportions(folder / "proportions.png", samples.proportions, samples.names, cell_types)
    n_shown = min(len(fit), 20)
    print(f"fit of {'the samples' if n_shown == len(fit) else f'the first {n_shown} samples'}:")
    print(fit.head(n_shown).to_string(float_format="{:.3f}".format))
    unlike = fit.index[fit["misfit"] > MISFIT]
    if len(unlike):
        print(
            f"warning: {cfg.bulk}: {len(unlike)} of {len(fit)} samples ({some(unlike)}) are "
            f"not what the reference's cell types add up to (misfit above {MISFIT}): another "
            "tissue, or a cell type that the reference lacks",
            file=sys.stderr,
        )
    print(f"wrote proportions.csv and proportions.png to {folder}")


def how_to_calibrate(cfg, encoder):
    """``(calibrate, platform)`` for these weights; says what auto came to, if it is not none."""
    if cfg.calibrate != "auto":
        return cfg.calibrate, cfg.platform
    if not encoder.n_state:
        return "none", cfg.platform
    print(f"--calibrate types, --platform {cfg.platform}: the reference was of several samples")
    return "types", cfg.platform


def write_expression(cfg, samples, expression, card):
    """Write what each type is expected to express in each sample, beside --out."""
    path = cfg.out.with_name(f"{cfg.out.stem}.expression.h5ad")
    table = expression_table(samples.names, samples.proportions, expression, card)
    write_whole(path, lambda part: table.write_h5ad(part, compression="gzip"))
    print(f"wrote {path}: {table.n_obs:,} cell types of samples x {table.n_vars:,} genes")


def main(cfg):
    rng = seed_everything(cfg.seed)
    device = pick_device(cfg.device)
    encoder, encoder_card, decoder, card = load_models(cfg.weights, device)
    cell_types, genes = card["cell_types"], card["genes"]
    generator = torch.Generator(device).manual_seed(cfg.seed)
    samples, log_factor = None, None
    if cfg.bulk is None:
        names, per_bulk = [f"batch_{i}" for i in range(cfg.n_cells)], 1
        encoded = encode_batches(cfg, encoder, encoder_card["genes"], device, rng)
    else:
        samples = BulkSamples(cfg.bulk, encoder, encoder_card, decoder, card)
        names, per_bulk, encoded = samples.names, cfg.n_cells, [samples.encoded]
        expression = samples.estimate_expression(*how_to_calibrate(cfg, encoder))
        log_factor = expression.log_factor

    table, n_cells, first = CellTable(*decoder.mu.shape), per_bulk * len(names), 0
    bar = tqdm(total=n_cells, desc="cells", unit="cell", unit_scale=True)
    with bar, open_cells(cfg.out, genes) as file:
        for bulks in encoded:  # mu (S, K, D), var (S, K, D), pi (S, K)
            for cells in generate_cells(decoder, bulks, per_bulk, generator, log_factor, first):
                file.append(cells.counts)
                table.append(cells)
                if samples is not None:
                    samples.add(cells)
                bar.update(len(cells.bulk))
            table.proportions.append(bulks[2].cpu().numpy())
            first += len(bulks[2])
        if samples is not None:
            samples.compare_sums()
        tables = table.to_anndata(names, cell_types, cfg, samples)
        file.write_tables(tables)

    print_cell_types(tables)
    if samples is not None:  # without --bulk every cell has a bulk of its own: no table to read
        write_samples(cfg, samples, cell_types)
        write_expression(cfg, samples, expression, card)
    print(f"wrote {cfg.out}: {n_cells:,} cells x {len(genes):,} genes from {len(names):,} bulks")


if __name__ == "__main__":
    run_script(main, settings)
