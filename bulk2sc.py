"""Bulk RNA-seq in, single cells out.

    python bulk2sc.py                                          # embedded data, shipped weights
    python bulk2sc.py --bulk samples.csv --n-cells 1000        # 1,000 cells for each bulk sample
    python bulk2sc.py --proportions mixtures.csv               # 1,000 cells for each mixture

For each bulk: Bulk Encoder -> cell type k ~ proportions -> z ~ N(mu_k, sigma_k^2) -> scDecoder ->
counts of one cell. Without --bulk, each batch of --batch-size reference cells is summed into one
bulk, and each batch yields one cell. Writes one .h5ad and, of bulk samples or mixtures, tables and
a picture beside it (see README, "The output").
"""

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

from data import DatasetSettings
from readers.bulk_options import BulkOptions
from runtime.errors import InputError
from runtime.script import lead_with, parse_args, plain_settings, run_script


@lead_with(
    *("bulk", "n_cells", "out", "force", "weights", "proportions", "lineages", "mrna_content"),
    *("calibrate", "platform", "dry_run", "genes_in", "gene_column", "columns", "bulk_unit"),
    *("log", "pseudocount", "data", "batch_size"),
)
@dataclass
class Settings(DatasetSettings, BulkOptions):
    """Generate single cells from bulk RNA-seq samples.

    Example: python bulk2sc.py --bulk samples.csv --n-cells 1000
    """

    weights: Path | None = None
    """Folder of the models. Default: weights/pbmc with --bulk or --proportions, else weights."""
    bulk: tuple[Path, ...] = ()
    """Bulk samples: a table (csv, tsv, GCT, .xlsx, .h5ad; genes in rows or columns, symbols or
    Ensembl ids), several files of quantifiers, or a folder of them. Default: batches of --data."""
    n_cells: int = 1000
    """Cells to generate: for each sample of --bulk or --proportions, in all without them."""
    batch_size: int = 100
    """Reference cells that make one bulk, when there is no --bulk."""
    proportions: Path | None = None
    """Known fractions of cells, or percentages: csv, a row for each sample, a column for each cell
    type. They take the place of estimates; what is empty or missing is estimated within what is
    left. Without --bulk, the mixtures to generate."""
    lineages: Path | None = None
    """The columns of --proportions are lineages: csv cell_type,lineage. Types share the fraction of
    their lineage as estimated."""
    mrna_content: Literal["auto", "reference", "published"] = "auto"
    """By whose mRNA content cells of --bulk are counted. reference: the counts of its cells, right
    for sums of single cells; published: measurements of blood cells (mrna_content.csv); auto:
    published if the bulks are of whole transcripts, by their share of ribosomal proteins."""
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
    """The file of generated cells. Tables and pictures get its name with another ending."""
    dry_run: bool = False
    """Say how --bulk is read, and stop."""
    force: bool = False
    """Replace files that are not from bulk2sc, too; without it only its own are replaced."""

    def __post_init__(self):
        super().__post_init__()
        if self.weights is None:  # models of blood, unless the bulks are of the reference's batches
            of_samples = self.bulk or self.proportions is not None
            self.weights = Path("weights/pbmc" if of_samples else "weights")
        if self.n_cells < 0:
            raise InputError(f"--n-cells: found {self.n_cells}, expected 0 or more")
        if self.batch_size < 1:
            raise InputError(f"--batch-size: found {self.batch_size}, expected 1 or more")
        if self.calibrate != "auto" and not self.bulk:
            raise InputError("--calibrate: found no --bulk, expected bulk samples to add up to")
        if self.dry_run and not self.bulk:
            raise InputError("--dry-run: found no --bulk, expected files to say how they are read")
        if not 0 <= self.pseudocount < float("inf"):
            raise InputError(f"--pseudocount: found {self.pseudocount}, expected 0 or more")
        if self.lineages is not None and self.proportions is None:
            raise InputError("--lineages: found no --proportions, expected fractions of lineages")
        if self.out.suffix != ".h5ad":
            raise InputError(f"--out {self.out}: expected a name that ends in .h5ad")
        for given in (*self.bulk, self.proportions, self.lineages, Path(self.data)):
            if given is not None and (ending := written_over(given, self.out)):
                raise InputError(
                    f"--out {self.out}: would write {beside(self.out, ending)} over the input "
                    f"{given}, expected another name"
                )


ENDINGS = ["h5ad", "proportions.csv", "proportions.png", "fit.csv", "expression.h5ad"]  # of --out
# What tells that a file is from bulk2sc: entries of an .h5ad, possible headers of a csv.
OWN_ENTRIES = {
    "h5ad": ["uns/settings", "uns/cell_types", "uns/proportions"],
    "expression.h5ad": [
        *("obs/sample", "obs/cell_type", "obs/proportion"),
        *("layers/log2_fold_change", "layers/log2_fold_change_sd"),
    ],
}
OWN_HEADERS = {
    "proportions.csv": [
        "sample,cell_type,proportion,low,high,rna_fraction",
        "sample,cell_type,proportion,low,high,rna_fraction,known",
    ],
    "fit.csv": [
        "sample,correlation,unexplained,misfit,unknown,unknown_low,unknown_high,agreement",
    ],
}


def beside(out, ending):
    """The path of a file that is written beside --out; ending: one of ENDINGS."""
    return out.with_name(f"{out.stem}.{ending}")


def written_over(given, out):
    """The ENDING, if any, that would replace a file; a link of --out to it would be replaced."""
    for ending in ENDINGS:
        with contextlib.suppress(OSError):  # one of them is not there
            if os.path.samestat(beside(out, ending).lstat(), given.stat()):
                return ending
    return None


def is_own(path, ending):
    """Whether a file that is there is recognisably from bulk2sc; ending: one of ENDINGS."""
    if not path.is_file():  # a pipe would never answer
        return False
    if ending in OWN_ENTRIES:
        return has_entries(path, OWN_ENTRIES[ending])
    return first_line(path) in OWN_HEADERS.get(ending, [])


def check_replaced(cfg):
    """Check that every file that this run would replace is from bulk2sc; with --force, any may be.

    Raises:
        InputError: one is not, or a folder is in the way.
    """
    endings = ["h5ad"]
    if cfg.bulk or cfg.proportions is not None:
        endings += ["proportions.csv", "proportions.png"]
    if cfg.bulk:
        endings += ["fit.csv", "expression.h5ad"]
    of_own_cells = is_own(cfg.out, "h5ad")  # then what is beside it is ours as well
    for ending in endings:
        path = beside(cfg.out, ending)
        if path.is_dir():
            raise InputError(f"{path}: found a folder, expected a file or nothing at this name")
        if path.exists() and not (cfg.force or of_own_cells or is_own(path, ending)):
            raise InputError(
                f"{path}: found a file that is not from bulk2sc, expected another --out, or "
                "--force to replace it"
            )


if __name__ == "__main__":
    settings = parse_args(Settings)  # before the slow imports, so that --help answers at once

from functools import partial

import anndata
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from expression import expression_table, mean_library
from generation import (
    MISFIT,
    BulkSamples,
    encode_batches,
    encode_mixtures,
    generate_cells,
    load_models,
)
from plotting import write_proportions
from proportions import make_proportions
from readers.bulk import read_bulk
from readers.proportions import read_proportions
from runtime.device import pick_device, seed_everything
from runtime.errors import one_line, plain, some
from runtime.writing import first_line, has_entries, open_cells, write_h5ad, write_whole


class CellTable:
    """What is kept in memory of all generated cells: everything but their counts."""

    def __init__(self, n_types, n_latent):
        self.pi = [np.zeros((0, n_types), np.float32)]  # proportions of the bulks
        self.cell_type, self.bulk = [np.zeros(0, int)], [np.zeros(0, int)]
        self.latent = [np.zeros((0, n_latent), np.float32)]

    def append(self, cells):
        """Add generated Cells."""
        self.cell_type.append(cells.cell_type)
        self.bulk.append(cells.bulk)
        self.latent.append(cells.latent)

    def to_anndata(self, proportions, cfg, samples=None):
        """The tables of the output: ``.obs``, ``.obsm`` and ``.uns`` of all cells.

        Args:
            proportions: Proportions of the bulks (S). samples: BulkSamples with --bulk.
        """
        names, cell_types = proportions.names, proportions.cell_types
        bulk = np.concatenate(self.bulk)
        obs = pd.DataFrame(index=[f"cell_{i}" for i in range(len(bulk))])
        obs["sample"] = pd.Categorical.from_codes(bulk, categories=names)
        cell_type = np.concatenate(self.cell_type)
        obs["cell_type"] = pd.Categorical.from_codes(cell_type, categories=cell_types)
        cells = anndata.AnnData(obs=obs)
        cells.obsm["X_latent"] = np.concatenate(self.latent)
        cells.uns["proportions"] = proportions.to_table()
        cells.uns["samples"] = np.array(names, dtype=object)
        cells.uns["cell_types"] = np.array(cell_types, dtype=object)
        settings = plain_settings(cfg).items()
        cells.uns["settings"] = {
            k: " ".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in settings
        }
        if samples is not None:
            cells.uns["fit"] = samples.fit
            cells.obs["misfit"] = samples.fit["misfit"].to_numpy()[bulk]
        return cells


def print_cell_types(proportions, cells):
    """Print mean proportion and number of cells of each type; cells: the AnnData."""
    pi, known = proportions.cells.astype(np.float64), proportions.known
    title = "mean predicted proportion" if known is None else "mean proportion"
    table = {
        title: pi.mean(axis=0) if len(pi) else np.nan,
        "cells": np.bincount(cells.obs["cell_type"].cat.codes, minlength=pi.shape[1]),
    }
    if known is not None:
        table["samples where known"] = known.sum(axis=0)
    table = pd.DataFrame(table, index=proportions.cell_types)
    print(table.to_string(float_format="{:.3f}".format))


def print_fit(cfg, samples):
    """Print how well the reference's cell types add up to each sample; warn where they do not."""
    fit, unknown = samples.fit, samples.unknown
    n_shown = min(len(fit), 20)
    print(f"fit of {'the samples' if n_shown == len(fit) else f'the first {n_shown} samples'}:")
    print(fit.head(n_shown).to_string(float_format="{:.3f}".format))
    if unknown.is_flagged.any():
        worst = int(np.argmax(np.where(unknown.is_flagged, unknown.share, -1)))
        warn(
            f"{name_of(cfg.bulk)}: {unknown.is_flagged.sum()} of {len(fit)} samples "
            f"({some(fit.index[unknown.is_flagged])}) hold much RNA of types that the reference "
            f"lacks; in {fit.index[worst]} {unknown.share[worst]:.0%} ({unknown.describe(worst)}). "
            "Proportions are of the other cells"
        )
    unlike = fit.index[fit["misfit"] > MISFIT]
    if len(unlike):
        warn(
            f"{name_of(cfg.bulk)}: {len(unlike)} of {len(fit)} samples ({some(unlike)}) are not "
            f"what the reference's cell types add up to (misfit above {MISFIT}): another tissue, "
            "or a cell type that the reference lacks"
        )


def warn(text):
    """Print a warning in one line on stderr."""
    print(f"warning: {text}", file=sys.stderr)


def write_samples(cfg, proportions, samples=None):
    """Write the proportions of samples or mixtures beside --out and, with --bulk, their fit."""
    tables = {"proportions.csv": proportions.to_table()}
    if samples is not None:
        print_fit(cfg, samples)
        tables["fit.csv"] = samples.fit.rename_axis("sample").reset_index()
    for ending, table in tables.items():
        write_whole(beside(cfg.out, ending), partial(table.to_csv, index=False))
    written = [beside(cfg.out, ending).name for ending in tables]
    written += draw_samples(beside(cfg.out, "proportions.png"), proportions)
    print(f"wrote {', '.join(written)} to {cfg.out.parent}")


def draw_samples(path, proportions):
    """Draw the proportions; names of the files written, none with a warning if that fails."""
    try:
        write_proportions(path, proportions)
    except Exception as error:  # matplotlib, its fonts, the disk: cells and tables matter more
        warn(f"{path}: could not be drawn ({plain(one_line(error))})")
        return []
    return [path.name]


def write_expression(cfg, samples, expression, card):
    """Write what each type is expected to express in each sample, beside --out."""
    path = beside(cfg.out, "expression.h5ad")
    table = expression_table(samples.names, samples.proportions.cells, expression, card)
    write_h5ad(path, table)
    print(f"wrote {path}: {table.n_obs:,} cell types of samples x {table.n_vars:,} genes")


def name_of(bulk):
    """What messages call the files of --bulk (a tuple)."""
    return str(bulk[0]) if len(bulk) == 1 else f"--bulk ({len(bulk)} files)"


def how_to_calibrate(cfg, encoder):
    """``(calibrate, platform)`` for these weights; says what auto came to, if it is not none."""
    if cfg.calibrate != "auto":
        return cfg.calibrate, cfg.platform
    if not encoder.n_state:
        return "none", cfg.platform
    print(f"--calibrate types, --platform {cfg.platform}: the reference was of several samples")
    return "types", cfg.platform


def main(cfg):
    if not cfg.dry_run:
        check_replaced(cfg)
    rng = seed_everything(cfg.seed)
    device = pick_device(cfg.device)
    encoder, encoder_card, decoder, card = models = load_models(cfg.weights, device)
    cell_types, genes = card["cell_types"], card["genes"]
    print(f"{cfg.weights}: {len(cell_types)} cell types, {len(genes):,} genes")
    generator = torch.Generator(device).manual_seed(cfg.seed)
    known, proportions, samples, log_factor = None, None, None, None
    if cfg.proportions is not None:
        known = read_proportions(cfg.proportions, cell_types, cfg.lineages)
    if cfg.bulk:
        bulk = read_bulk(cfg.bulk, genes, card.get("gene_ids"), cfg)
        if cfg.dry_run:
            return
        samples = BulkSamples(bulk, name_of(cfg.bulk), models, cfg.mrna_content, known)
        proportions, encoded = samples.proportions, [samples.encoded]
        expression = samples.estimate_expression(*how_to_calibrate(cfg, encoder))
        log_factor = expression.log_factor
    elif known is not None:
        proportions, *encoded = encode_mixtures(encoder_card, decoder, known)
    else:
        encoded = encode_batches(cfg, encoder, encoder_card["genes"], device, rng)
    # Of batches, proportions are known when all have been encoded, and each yields one cell.
    names = [f"batch_{i}" for i in range(cfg.n_cells)] if proportions is None else proportions.names
    per_bulk = 1 if proportions is None else cfg.n_cells

    table, n_cells, first = CellTable(*decoder.mu.shape), per_bulk * len(names), 0
    bar = tqdm(total=n_cells, desc="cells", unit="cell", unit_scale=True)
    with bar, open_cells(cfg.out, genes, n_cells) as file:
        for bulks in encoded:  # mu (S, K, D), var (S, K, D), pi (S, K)
            for cells in generate_cells(decoder, bulks, per_bulk, generator, log_factor, first):
                file.append(cells.counts)
                table.append(cells)
                if samples is not None:
                    samples.add(cells)
                bar.update(len(cells.bulk))
            table.pi.append(bulks[2].cpu().numpy())
            first += len(bulks[2])
        if samples is not None:
            samples.compare_sums()
        if proportions is None:
            pi = np.concatenate(table.pi)
            proportions = make_proportions(names, cell_types, pi, mean_library(decoder))
        tables = table.to_anndata(proportions, cfg, samples)
        file.write_tables(tables)

    print_cell_types(proportions, tables)
    if samples is not None or known is not None:  # else every cell has a bulk of its own
        write_samples(cfg, proportions, samples)
    if samples is not None:
        write_expression(cfg, samples, expression, card)
    source = "mixtures" if samples is None and known is not None else "bulks"
    print(f"wrote {cfg.out}: {n_cells:,} cells x {len(genes):,} genes from {len(names):,} {source}")


if __name__ == "__main__":
    run_script(main, settings)
