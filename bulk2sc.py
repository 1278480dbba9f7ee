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

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from tqdm import tqdm

from data import (
    DatasetSettings,
    InputError,
    align_genes,
    batch_bulks,
    library_size,
    load_cells,
    plain_settings,
    read_bulk,
    run_script,
    write_whole,
)
from models import (
    BulkEncoder,
    check_mixture,
    load_model,
    pick_device,
    scDecoder,
    seed_everything,
)
from plotting import write_proportions

CHUNK = 1024  # cells decoded at a time; bounds memory, and is large enough for the matrix product


@dataclass
class Settings(DatasetSettings):
    bulk: Path | None = None
    """Bulk samples: csv, tsv or GCT (genes in rows or columns, symbols or Ensembl ids) or .h5ad.
    Default: batches of --data."""
    n_cells: int = 1000
    """Cells to generate: for each bulk sample with --bulk, in all without it."""
    batch_size: int = 100
    """Reference cells that make one bulk, when there is no --bulk."""
    out: Path = Path("generated.h5ad")
    """The file of generated cells; proportions of --bulk are written to the same folder."""

    def __post_init__(self):
        super().__post_init__()
        if self.n_cells < 0:
            raise InputError(f"--n-cells: found {self.n_cells}, expected 0 or more")
        if self.batch_size < 1:
            raise InputError(f"--batch-size: found {self.batch_size}, expected 1 or more")
        if self.out.suffix != ".h5ad":
            raise InputError(f"--out {self.out}: expected a name that ends in .h5ad")


@torch.inference_mode()
def encode_bulks(encoder, X, present, device):
    """Run the encoder once over all bulks.

    Args:
        X: bulk profiles (S x G) in the encoder's gene order, CSR. present: bool (G).

    Returns:
        mu, var (S, K, D), pi (S, K) and the standard deviation of pi (S, K), on ``device``.
    """
    present = torch.from_numpy(present).to(device)
    parts = [
        encoder(torch.from_numpy(X[i : i + CHUNK].toarray().astype(np.float32)).to(device), present)
        for i in range(0, max(X.shape[0], 1), CHUNK)  # no bulk at all still has its shapes
    ]
    mu, var, pi = (torch.cat(p) for p in zip(*parts, strict=True))
    return mu, var, pi, torch.zeros_like(pi)


@torch.inference_mode()
def decode_cells(decoder, mu, var, codes, generator, progress=False):
    """Draw one cell for each row: z of mean mu and variance var, library size, then counts.

    Args:
        mu, var: (N, D). codes: cell type of each cell (N). generator: on their device.

    Returns:
        ``(X, z)``: counts (N x G) CSR int32 and latents (N, D) float32.
    """
    blocks, latents = [], []
    starts = range(0, len(codes), CHUNK)
    for i in tqdm(starts, desc="cells", unit="chunk", disable=not progress):
        m, v, k = (t[i : i + CHUNK] for t in (mu, var, codes))
        z = decoder.sample_latent(m, v, k, generator)  # (B, D)
        library = decoder.sample_library(k, generator)  # (B,)
        counts = decoder.sample(z, library, generator)  # (B, G)
        blocks.append(to_csr(counts))
        latents.append(z.cpu().numpy())
    n_genes, n_latent = decoder.config["n_genes"], mu.shape[1]
    blocks = blocks or [sp.csr_matrix((0, n_genes), dtype=np.int32)]
    latents = latents or [np.zeros((0, n_latent), np.float32)]
    return sp.vstack(blocks, format="csr"), np.concatenate(latents)


def to_csr(counts):
    """Dense whole numbers (B, G) as a CSR matrix of int32."""
    return sp.csr_matrix(counts.cpu().numpy().astype(np.int32))


def find_bulks(cfg, genes, gene_ids, rng):
    """The bulks to generate from, in the encoder's gene order; gene_ids as for read_bulk.

    Returns:
        ``(X, present, samples, per_sample)``: CSR (S x G), genes the data has (G), sample names,
        and cells to generate for each.
    """
    if cfg.bulk is not None:
        X, present, samples = read_bulk(cfg.bulk, genes, gene_ids)
        return X, present, samples, cfg.n_cells
    cells = load_cells(cfg, need_labels=False)
    X, present = align_genes(cells.X, cells.var_names, genes, cfg.data)
    if cfg.batch_size > cells.n_obs:
        raise InputError(
            f"--batch-size: found {cfg.batch_size}, expected at most the {cells.n_obs} cells of "
            f"{cfg.data}"
        )
    bulk, _ = batch_bulks(X, cfg.batch_size, cfg.n_cells, rng)
    print(f"{cfg.n_cells:,} bulks, each the sum of {cfg.batch_size} reference cells")
    return sp.csr_matrix(bulk), present, [f"batch_{i}" for i in range(cfg.n_cells)], 1


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

    genes, gene_ids = encoder_card["genes"], encoder_card.get("gene_ids")  # older files have none
    X, present, samples, per_sample = find_bulks(cfg, genes, gene_ids, rng)
    check_filled(X, samples, cfg.bulk or cfg.data)
    mu, var, pi, sd = encode_bulks(encoder, X, present, device)  # (S, K, D) twice, (S, K) twice

    generator = torch.Generator(device).manual_seed(cfg.seed)
    sample = torch.arange(len(samples), device=device).repeat_interleave(per_sample)  # (N,)
    codes = draw_types(pi, per_sample, generator)  # (N,)
    counts, latent = decode_cells(
        decoder, mu[sample, codes], var[sample, codes], codes, generator, progress=True
    )
    pi, sd, codes, sample = (t.cpu().numpy() for t in (pi, sd, codes, sample))

    obs = pd.DataFrame(index=[f"cell_{i}" for i in range(len(codes))])
    obs["sample"] = pd.Categorical.from_codes(sample, categories=samples)
    obs["cell_type"] = pd.Categorical.from_codes(codes, categories=cell_types)
    generated = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=decoder_card["genes"]))
    generated.obsm["X_latent"] = latent
    # An array and two lists of names: cell-type names such as "CD4+/CD25" cannot be hdf5 keys.
    generated.uns["proportions"] = pi
    generated.uns["proportions_sd"] = sd
    generated.uns["samples"] = np.array(samples, dtype=object)
    generated.uns["cell_types"] = np.array(cell_types, dtype=object)
    generated.uns["settings"] = {k: str(v) for k, v in plain_settings(cfg).items()}
    write_whole(cfg.out, lambda path: generated.write_h5ad(path, compression="gzip"))

    table = pd.DataFrame(
        {
            "mean predicted proportion": pi.mean(axis=0) if len(pi) else np.nan,
            "cells": np.bincount(codes, minlength=len(cell_types)),
        },
        index=cell_types,
    )
    print(table.to_string(float_format="{:.3f}".format))
    if cfg.bulk is not None:  # without it every cell has a bulk of its own: no table to read
        folder = cfg.out.parent
        proportions = proportion_table(samples, cell_types, pi, sd)
        write_whole(folder / "proportions.csv", lambda path: proportions.to_csv(path, index=False))
        write_proportions(folder / "proportions.png", pi, samples, cell_types)
        print(f"wrote proportions.csv and proportions.png to {folder}")
    print(
        f"wrote {cfg.out}: {counts.shape[0]:,} cells x {counts.shape[1]:,} genes from "
        f"{len(samples):,} bulks"
    )


def check_filled(X, samples, where):
    """Every bulk must have counts in some gene of the model.

    X: CSR (S x G). samples: their names (S). where: what the message names.
    """
    empty = np.flatnonzero(library_size(X) == 0)
    if len(empty):
        raise InputError(
            f"{where}: bulk {samples[empty[0]]} and {len(empty) - 1} others have no counts in any "
            "gene of the model; expected bulks of this tissue"
        )


def proportion_table(samples, cell_types, pi, sd):
    """One row per bulk: ``sample``, pi of each cell type, then ``sd <type>``; pi, sd (S, K)."""
    values = pd.DataFrame(
        np.hstack([pi, sd]), columns=[*cell_types, *(f"sd {name}" for name in cell_types)]
    )
    return pd.concat([pd.Series(samples, name="sample"), values], axis=1)


def draw_types(pi, per_sample, generator):
    """Draw k ~ Categorical(pi) for each cell: pi (S, K) -> codes (S * per_sample,)."""
    if len(pi) == 0 or per_sample == 0:
        return torch.zeros(0, dtype=torch.long, device=pi.device)
    return torch.multinomial(pi, per_sample, replacement=True, generator=generator).flatten()


if __name__ == "__main__":
    run_script(main, Settings)
