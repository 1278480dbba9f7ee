"""Bulk RNA-seq in, single cells out.

    python bulk2sc.py                                          # embedded data, shipped weights
    python bulk2sc.py --bulk samples.csv --n-cells 1000        # 1,000 cells for each bulk sample

For each bulk: Bulk Encoder -> cell type k ~ proportions -> z ~ N(mu_k, sigma_k^2) -> scDecoder ->
counts of one cell. Without --bulk, each batch of --batch-size reference cells is summed into one
bulk, and each batch yields one cell. Writes one .h5ad and, with --bulk, proportions.csv and
proportions.png beside it (see README, "The output").
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from data import DatasetSettings, align_genes
from generation import (
    MISFIT,
    add_to_sums,
    bulk_fit,
    calibration,
    check_filled,
    chunks_of_batches,
    chunks_of_samples,
    decode_blocks,
    encode_bulks,
    expected_bulk,
    misfit,
    sum_agreement,
)
from models import BulkEncoder, scDecoder
from plotting import write_proportions
from readers.bulk import read_bulk
from runtime.device import pick_device, seed_everything
from runtime.errors import InputError, some
from runtime.script import plain_settings, run_script
from runtime.weights import check_mixture, load_model
from runtime.writing import write_cells, write_whole


@dataclass
class Settings(DatasetSettings):
    bulk: Path | None = None
    """Bulk samples: csv, tsv or GCT (genes in rows or columns, symbols or Ensembl ids) or .h5ad.
    Default: batches of --data."""
    n_cells: int = 1000
    """Cells to generate: for each bulk sample with --bulk, in all without it."""
    batch_size: int = 100
    """Reference cells that make one bulk, when there is no --bulk."""
    calibrate: bool = False
    """Scale each gene's mean so that the cells of a sample add up to its bulk (needs --bulk). The
    factors are the platform's, too: leave it off for cells like the reference's."""
    out: Path = Path("generated.h5ad")
    """The file of generated cells; proportions of --bulk are written to the same folder."""

    def __post_init__(self):
        super().__post_init__()
        if self.n_cells < 0:
            raise InputError(f"--n-cells: found {self.n_cells}, expected 0 or more")
        if self.batch_size < 1:
            raise InputError(f"--batch-size: found {self.batch_size}, expected 1 or more")
        if self.calibrate and self.bulk is None:
            raise InputError("--calibrate: found no --bulk, expected bulk samples to add up to")
        if self.out.suffix != ".h5ad":
            raise InputError(f"--out {self.out}: expected a name that ends in .h5ad")


def main(cfg):
    import anndata

    rng = seed_everything(cfg.seed)
    device = pick_device(cfg.device)
    encoder_file = cfg.weights / "bulkEncoder_model.pt"
    decoder_file = cfg.weights / "scDecoder_model.pt"
    encoder, encoder_card = load_model(encoder_file, BulkEncoder, device)
    decoder, decoder_card = load_model(decoder_file, scDecoder, device)
    check_mixture(encoder_file, encoder, decoder.mu, decoder.var, decoder_file)
    cell_types = decoder_card["cell_types"]

    genes, n_types = encoder_card["genes"], len(cell_types)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    log_factor, sums, said = None, None, []
    if cfg.bulk is None:
        n_cells, samples = cfg.n_cells, [f"batch_{i}" for i in range(cfg.n_cells)]
        chunks = chunks_of_batches(cfg, encoder, genes, device, rng, generator, said)
    else:
        # All genes of the decoder, of which the encoder reads some: the others show how it fits.
        all_genes = decoder_card["genes"]
        whole, measured, samples = read_bulk(cfg.bulk, all_genes, decoder_card.get("gene_ids"))
        n_cells = cfg.n_cells * len(samples)
        X, _ = align_genes(whole, all_genes, genes, cfg.bulk, report=False)
        present = measured[pd.Index(all_genes).get_indexer(genes)]
        print(f"{cfg.bulk}: {present.sum():,} of the {len(genes):,} genes the Bulk Encoder reads")
        check_filled(X, samples, cfg.bulk)
        mu, var, pi, sd = encode_bulks(encoder, X, present, device, 20)  # (S, K, D), ..., (S, K)
        whole = whole.toarray()  # (S, G)
        expected = expected_bulk(decoder, pi)  # (S, G)
        fit = pd.DataFrame(index=samples)
        fit["correlation"], fit["unexplained"] = bulk_fit(whole, expected, measured)
        usual = encoder_card.get("fit")
        fit["misfit"] = misfit(fit["correlation"], fit["unexplained"], usual) if usual else np.nan
        if cfg.calibrate:
            log_factor = torch.from_numpy(calibration(whole, expected, measured)).to(device)
        chunks = chunks_of_samples(mu, var, pi, cfg.n_cells, generator)
        sums, sd = np.zeros(whole.shape), sd.cpu().numpy()
        said.append(pi.cpu().numpy())

    # Of all cells, but for their counts, which go to the file as they come.
    codes, of_bulk, latents = [np.zeros(0, int)], [np.zeros(0, int)], []

    def noted(chunks):
        for chunk in chunks:
            for column, values in ((codes, chunk[2]), (of_bulk, chunk[3])):
                column.append(values.cpu().numpy())
            yield chunk

    def counts():
        for X, z in decode_blocks(decoder, noted(chunks), generator, log_factor):
            if sums is not None:
                add_to_sums(sums, X, of_bulk[-1])
            latents.append(z)
            yield X
            bar.update(len(z))

    def describe():
        sample = np.concatenate(of_bulk)
        obs = pd.DataFrame(index=[f"cell_{i}" for i in range(n_cells)])
        obs["sample"] = pd.Categorical.from_codes(sample, categories=samples)
        obs["cell_type"] = pd.Categorical.from_codes(np.concatenate(codes), categories=cell_types)
        cells = anndata.AnnData(obs=obs)
        none = np.zeros((0, decoder.mu.shape[1]), np.float32)
        cells.obsm["X_latent"] = np.concatenate([none, *latents])
        # An array and two lists of names: cell-type names such as "CD4+/CD25" cannot be hdf5 keys.
        cells.uns["proportions"] = np.concatenate([np.zeros((0, n_types), np.float32), *said])
        cells.uns["samples"] = np.array(samples, dtype=object)
        cells.uns["cell_types"] = np.array(cell_types, dtype=object)
        cells.uns["settings"] = {k: str(v) for k, v in plain_settings(cfg).items()}
        if cfg.bulk is not None:
            fit["agreement"] = sum_agreement(whole, sums, measured)
            cells.uns["proportions_sd"] = sd
            cells.uns["fit"] = fit
            cells.obs["misfit"] = fit["misfit"].to_numpy()[sample]
        return cells

    with tqdm(total=n_cells, desc="cells", unit="cell", unit_scale=True) as bar:
        write_cells(cfg.out, counts(), decoder_card["genes"], describe)

    pi, codes = np.concatenate([np.zeros((0, n_types)), *said]), np.concatenate(codes)
    table = pd.DataFrame(
        {
            "mean predicted proportion": pi.mean(axis=0) if len(pi) else np.nan,
            "cells": np.bincount(codes, minlength=n_types),
        },
        index=cell_types,
    )
    print(table.to_string(float_format="{:.3f}".format))
    if cfg.bulk is not None:  # without it every cell has a bulk of its own: no table to read
        folder = cfg.out.parent
        proportions = proportion_table(samples, cell_types, pi, sd, fit)
        write_whole(folder / "proportions.csv", lambda path: proportions.to_csv(path, index=False))
        write_proportions(folder / "proportions.png", pi, samples, cell_types)
        shown = min(len(fit), 20)
        print(f"fit of {'the samples' if shown == len(fit) else f'the first {shown} samples'}:")
        print(fit.head(shown).to_string(float_format="{:.3f}".format))
        strange = fit.index[fit["misfit"] > MISFIT]
        if len(strange):
            print(
                f"warning: {cfg.bulk}: {len(strange)} of {len(fit)} samples ({some(strange)}) are "
                f"not what the reference's cell types add up to (misfit above {MISFIT}): another "
                "tissue, or a cell type that the reference lacks",
                file=sys.stderr,
            )
        print(f"wrote proportions.csv and proportions.png to {folder}")
    print(
        f"wrote {cfg.out}: {n_cells:,} cells x {len(decoder_card['genes']):,} genes from "
        f"{len(samples):,} bulks"
    )


def proportion_table(samples, cell_types, pi, sd, fit):
    """One row per bulk: ``sample``, pi of each type, ``sd <type>``, then the columns of ``fit``.

    pi, sd (S, K); fit: data frame (S rows).
    """
    names = [*cell_types, *(f"sd {name}" for name in cell_types)]
    values = pd.DataFrame(np.hstack([pi, sd]), columns=names)
    samples = pd.Series(samples, name="sample")
    return pd.concat([samples, values, fit.reset_index(drop=True)], axis=1)


if __name__ == "__main__":
    run_script(main, Settings)
