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
import scipy.sparse as sp
import torch
from tqdm import tqdm

from data import (
    DatasetSettings,
    align_genes,
    batch_bulks,
    library_size,
    load_cells,
    plain_settings,
    read_bulk,
    run_script,
)
from files import InputError, some, write_cells, write_whole
from models import (
    BulkEncoder,
    check_mixture,
    load_model,
    pick_device,
    scDecoder,
    seed_everything,
)
from plotting import write_proportions

MISFIT = 4  # standard deviations beyond usual bulks from which a sample is warned of
CHUNK = 4096  # cells at a time: bounds memory, and gives every core some blocks of them


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


@torch.inference_mode()
def encode_bulks(encoder, X, present, device, n_halves=0):
    """Run the encoder once over all bulks.

    Args:
        X: bulk profiles (S x G) in the encoder's gene order, CSR. present: bool (G).
        n_halves: times to run it again on a random half of the genes. How far these answers lie
            from the whole one is how much it hangs on which genes were read, and how platform and
            cells of the bulk changed them (delete-half jackknife; Shao and Wu, Annals of
            Statistics 1989).

    Returns:
        mu, var (S, K, D), pi (S, K) on ``device``; and the standard deviation of pi (S, K), None
        without halves.
    """
    rng = np.random.default_rng(0)
    at = np.flatnonzero(present)
    halves = [np.isin(np.arange(len(present)), rng.permutation(at)[::2]) for _ in range(n_halves)]
    whole, *halves = (torch.from_numpy(p).to(device) for p in (present, *halves))
    parts = []
    # On CPU so few at a time that their (B, G) stay in the cache throughout the deconvolution.
    step = 256 if torch.device(device).type == "cpu" else CHUNK
    for i in range(0, max(X.shape[0], 1), step):  # no bulk at all still has its shapes
        bulk = torch.from_numpy(X[i : i + step].toarray().astype(np.float32)).to(device)
        # The sum's floor: of a thin bulk, half of the genes may hold no count at all.
        mu, var, pi = encoder(bulk, whole)
        again = [encoder(bulk + 1e-9, half)[2] for half in halves]
        square = [(other - pi) ** 2 for other in again]
        sd = torch.stack(square).mean(dim=0).sqrt() if square else torch.full_like(pi, torch.nan)
        parts.append((mu, var, pi, sd))
    mu, var, pi, sd = (torch.cat(p) for p in zip(*parts, strict=True))
    return mu, var, pi, sd if n_halves else None


def log_cpm(bulk, present, more):
    """log2(CPM + more) of bulks (S, G) over the genes that are present (G); nan without counts."""
    part = bulk[:, present]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log2(part / part.sum(axis=1, keepdims=True) * 1e6 + more)


def expected_bulk(decoder, pi):
    """The sum (S, G), a numpy array, that proportions pi (S, K) make of each type's mean counts."""
    return (pi @ decoder.type_means()).cpu().numpy()


def bulk_fit(bulk, expected, present):
    """How far a bulk is what the reference's cell types add up to; two readings of it.

    Args:
        bulk: (S, G), counts, TPM or CPM. expected: (S, G), the sum that the predicted proportions
            make. present: bool (G), genes that the bulk has.

    Returns:
        ``(correlation, unexplained)``, each (S): Pearson correlation of log2(CPM + 10) over genes
        above 30 CPM in either; and the share of these genes that lie far above what is expected
        (three robust standard deviations of the log-ratio) less the share far below. A platform
        moves genes both ways, a cell type that the reference lacks only up.
    """
    logs = (log_cpm(part, present, 10) for part in (bulk, expected))
    correlation, unexplained = np.full(len(bulk), np.nan), np.full(len(bulk), np.nan)
    for i, (b, e) in enumerate(zip(*logs, strict=True)):
        on = (b > np.log2(40)) | (e > np.log2(40))
        if on.sum() < 10:  # too few to say anything of
            continue
        ratio = b[on] - e[on]
        ratio = ratio - np.median(ratio)
        width = 3 * 1.4826 * np.median(np.abs(ratio))
        unexplained[i] = np.mean(ratio > width) - np.mean(ratio < -width)
        correlation[i] = np.corrcoef(b[on], e[on])[0, 1]
    return correlation, unexplained


def misfit(correlation, unexplained, usual):
    """Standard deviations (S) by which the worse of the two readings is worse than usual.

    usual: mean and standard deviation of each on pseudobulks, as train_encoder.py saved them.
    """
    (c_mean, c_sd), (u_mean, u_sd) = usual["correlation"], usual["unexplained"]
    return np.maximum((c_mean - correlation) / c_sd, (unexplained - u_mean) / u_sd)


def calibration(bulk, expected, present):
    """Logarithm of the factors (S, G) float32 that turn the expected sum into the bulk.

        ln f_g = ln( (p_g + 5e-8) / (q_g + 5e-8) ), kept within ± ln 30; 0 for genes not in the bulk

    p, q: fractions of bulk and expected sum (S, G). A twentieth of a count per million, added to
    both, shrinks the factors of genes that are hardly there.
    """
    p, q = (np.where(present, part, 0.0) for part in (bulk, expected))
    p, q = (part / part.sum(axis=1, keepdims=True) + 5e-8 for part in (p, q))
    return np.where(present, np.clip(np.log(p / q), -np.log(30), np.log(30)), 0).astype(np.float32)


def add_to_sums(sums, counts, sample):
    """Add counts (B x G), CSR, of the cells of bulks ``sample`` (B) to the sums of bulks (S, G)."""
    kinds, member = np.unique(sample, return_inverse=True)
    shape = (len(kinds), len(sample))
    S = sp.csr_matrix((np.ones(len(sample)), (member, np.arange(len(sample)))), shape)
    sums[kinds] += (S @ counts).toarray()


def sum_agreement(bulk, sums, present):
    """Pearson correlation (S) of log2(CPM + 1), each bulk against the sum of its cells.

    bulk, sums (S, G); present bool (G).
    """
    logs = (log_cpm(part, present, 1) for part in (bulk, sums))
    with np.errstate(invalid="ignore"):  # a sample without cells reads nan
        return np.array([np.corrcoef(*pair)[0, 1] for pair in zip(*logs, strict=True)])


def decode_cells(decoder, mu, var, codes, generator, log_factor=None, sample=None):
    """Draw one cell for each row, all at once; see :func:`decode_blocks`.

    Args:
        mu, var: (N, D). codes: cell type of each cell (N). generator: on their device.
        log_factor: (S, G), see :func:`calibration`, with sample: the bulk of each cell (N).

    Returns:
        ``(X, z)``: counts (N x G) CSR int32 and latents (N, D) float32.
    """
    sample = torch.zeros_like(codes) if sample is None else sample
    chunks = zip(*(part.split(CHUNK) for part in (mu, var, codes, sample)), strict=True)
    blocks, latents = zip(*decode_blocks(decoder, chunks, generator, log_factor), strict=True)
    return sp.vstack(blocks, format="csr"), np.concatenate(latents)


@torch.inference_mode()
def decode_blocks(decoder, chunks, generator, log_factor=None):
    """Draw cells: z of mean mu and variance var, library size, then counts.

    Args:
        chunks: iterable of mu, var (B, D), cell types (B) and bulks (B) of the next cells.
        generator: on their device. log_factor: (S, G), see :func:`calibration`.

    Yields:
        ``(X, z)``: counts (B x G) CSR int32 and latents (B, D) float32, chunk by chunk.
    """
    for mu, var, k, sample in chunks:
        z = decoder.sample_latent(mu, var, k, generator)  # (B, D)
        library = decoder.sample_library(k, generator)  # (B,)
        X = decoder.sample_rows(z, library, k, generator, log_factor, sample)
        yield X, z.cpu().numpy()


def chunks_of_samples(mu, var, pi, per_sample, generator):
    """Chunks for :func:`decode_blocks`: ``per_sample`` cells of each bulk, types drawn by pi.

    mu, var: (S, K, D). pi: (S, K).
    """
    codes = draw_types(pi, per_sample, generator)  # (N,)
    for i in range(0, len(codes), CHUNK):
        k = codes[i : i + CHUNK]
        sample = torch.arange(i, i + len(k), device=k.device) // per_sample
        yield mu[sample, k], var[sample, k], k, sample


def chunks_of_batches(cfg, encoder, genes, device, rng, generator, said):
    """Chunks for :func:`decode_blocks`: one cell of each batch of --batch-size reference cells.

    Args:
        genes: the encoder's (G). said: list to which the proportions of each chunk (B, K) go.

    Returns:
        an iterator; the reference is read at once, so that errors come before anything is written.
    """
    cells = load_cells(cfg, need_labels=False)
    X, present = align_genes(cells.X, cells.var_names, genes, cfg.data)
    if cfg.batch_size > cells.n_obs:
        raise InputError(
            f"--batch-size: found {cfg.batch_size}, expected at most the {cells.n_obs} cells of "
            f"{cfg.data}"
        )
    print(f"{cfg.n_cells:,} bulks, each the sum of {cfg.batch_size} reference cells")

    def chunks():
        first = 0
        for bulk, _ in batch_bulks(X, cfg.batch_size, cfg.n_cells, rng, CHUNK):
            check_filled(bulk, range(first, first + len(bulk)), cfg.data)
            mu, var, pi, _ = encode_bulks(encoder, sp.csr_matrix(bulk), present, device)
            k = draw_types(pi, 1, generator)
            at = torch.arange(len(k), device=device)
            said.append(pi.cpu().numpy())
            yield mu[at, k], var[at, k], k, first + at
            first += len(k)

    return chunks()


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


def check_filled(X, samples, where):
    """Every bulk must have counts in some gene of the model.

    X: CSR or dense (S x G). samples: their names (S). where: what the message names.
    """
    empty = np.flatnonzero(library_size(X) == 0)
    if len(empty):
        raise InputError(
            f"{where}: bulk {samples[empty[0]]} and {len(empty) - 1} others have no counts in any "
            "gene of the model; expected bulks of this tissue"
        )


def proportion_table(samples, cell_types, pi, sd, fit):
    """One row per bulk: ``sample``, pi of each type, ``sd <type>``, then the columns of ``fit``.

    pi, sd (S, K); fit: data frame (S rows).
    """
    names = [*cell_types, *(f"sd {name}" for name in cell_types)]
    values = pd.DataFrame(np.hstack([pi, sd]), columns=names)
    samples = pd.Series(samples, name="sample")
    return pd.concat([samples, values, fit.reset_index(drop=True)], axis=1)


def draw_types(pi, per_sample, generator):
    """Draw k ~ Categorical(pi) for each cell: pi (S, K) -> codes (S * per_sample,)."""
    if len(pi) == 0 or per_sample == 0:
        return torch.zeros(0, dtype=torch.long, device=pi.device)
    return torch.multinomial(pi, per_sample, replacement=True, generator=generator).flatten()


if __name__ == "__main__":
    run_script(main, Settings)
