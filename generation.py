"""From bulk profiles to cells: encode the bulk, draw types and latents, decode counts.

    bulk -> Bulk Encoder -> k ~ π̂ -> z ~ N(μ̂_k, σ̂_k²) -> scDecoder -> counts of one cell

Also what compares bulks with the cells generated from them: fit, calibration and sums.

Notation in shape comments: S bulk samples, N cells, B cells of a chunk, G genes, K cell types,
D latent dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from data import (
    align_genes,
    apply_split,
    batch_bulks,
    batch_bulks_of_samples,
    library_size,
    load_cells,
    samples_of,
    sum_by_type,
)
from deconvolution.dwls import Signature
from deconvolution.expression import (
    Expression,
    TypeProfiles,
    calibration,
    estimate_expression,
    expected_bulk,
    mean_library,
    parts_of,
    write_expression,
)
from deconvolution.mrna_content import counts_reads, published_content
from deconvolution.proportions import (
    Proportions,
    make_proportions,
    mixtures,
    normal_interval,
    reference_composition,
)
from deconvolution.unknown import unknown_share
from models import BulkEncoder, scDecoder
from runtime.errors import InputError, some
from runtime.progress import progress
from runtime.weights import check_cell_types, check_mixture, load_model

CHUNK = 4096  # cells at a time: bounds memory, and is enough for every core
# Of the estimate by dwls.py: 0.3 to 0.6 are best for bulks of other data sets, 0 to 0.1 for
# simulated platforms.
SECOND_WEIGHT = 0.3
CONTENT_SD = 0.4  # sd of the log mRNA content of types, per sd of the log-ratios of genes
LEAST_SD = 0.005  # of a proportion
# Of the median expressed gene. Bulks that fit, thinned: the misfit is above 4 from 1.2 down, and
# below 3.3 from 1.7 up (25,000 counts over 11,000 genes are 1.5).
FEWEST_COUNTS = 1.5
MISFIT = 4  # standard deviations beyond pseudobulks of the reference from which users are warned


MODEL_FILES = ("bulkEncoder_model.pt", "scDecoder_model.pt")  # that generation reads


class Models(NamedTuple):
    """The models that generation needs, and what their files say besides."""

    encoder: BulkEncoder
    encoder_card: dict
    decoder: scDecoder
    decoder_card: dict

    def __repr__(self):
        genes, cell_types = (self.decoder_card[name] for name in ("genes", "cell_types"))
        return f"Models of {len(cell_types)} cell types ({some(cell_types)}) x {len(genes):,} genes"


def load_models(folder, device):
    """The Bulk Encoder and scDecoder of a folder of weights, and what their files say besides.

    Returns:
        Models: encoder, its card, decoder, its card.
    """
    encoder_file, decoder_file = (folder / name for name in MODEL_FILES)
    encoder, encoder_card = load_model(encoder_file, BulkEncoder, device)
    decoder, decoder_card = load_model(decoder_file, scDecoder, device)
    check_mixture(encoder_file, encoder, decoder.mu, decoder.var, decoder_file)
    return Models(encoder, encoder_card, decoder, decoder_card)


def load_weights(weights, cells, cell_types, device, fewest=2):
    """Both models of a folder, checked against the data they are to be measured on.

    Args:
        weights: folder. cells: AnnData (N). cell_types: names (K). fewest: held-out cells that
            there must be.

    Returns:
        decoder, its card, encoder, its card, and the mask of held-out cells (N).
    """
    encoder_file, decoder_file = (weights / name for name in MODEL_FILES)
    decoder, decoder_card = load_model(decoder_file, scDecoder, device)
    encoder, encoder_card = load_model(encoder_file, BulkEncoder, device)
    for file, card in ((decoder_file, decoder_card), (encoder_file, encoder_card)):
        check_cell_types(file, card, cell_types)
    check_mixture(encoder_file, encoder, decoder.mu, decoder.var, decoder_file)
    held_out = apply_split(cells, decoder_card["held_out"], decoder_file)
    if held_out.sum() < fewest:
        raise InputError(f"{decoder_file}: no cells were held out, so nothing can be measured")
    return decoder, decoder_card, encoder, encoder_card, held_out


# ------------------------------------------------------------------------- bulk to proportions


def check_filled(X, samples, where):
    """Check that every bulk has counts in some gene of the model.

    Args:
        X: CSR or dense (S x G). samples: their names (S). where: what the message names.

    Raises:
        InputError: one has none.
    """
    empty = np.flatnonzero(library_size(X) == 0)
    if len(empty):
        raise InputError(
            f"{where}: bulk {samples[empty[0]]} and {len(empty) - 1} others have no counts in any "
            "gene of the model; expected bulks of this tissue"
        )


@torch.inference_mode()
def encode_bulks(
    encoder,
    X,
    measured,
    device,
    n_halves=0,
    one_platform=False,
    second=None,
    scale=None,
    start=None,
):
    """Run the Bulk Encoder once over all bulks.

    Args:
        X: bulk profiles (S x G) in the encoder's gene order, CSR or dense. measured: mask of its
            genes that were measured (G).
        n_halves: times to run it again on a random half of the genes, for :func:`proportion_sd`.
        one_platform: whether all bulks are of one platform, other than the reference's, so that
            what they share against it can be taken off.
        second: another estimate of the proportions (S, K), which counts for ``SECOND_WEIGHT`` in
            the mean with the encoder's.
        scale: what fractions of cells are multiplied by (K), if the types' mRNA content in these
            bulks is not that in the reference; see :mod:`deconvolution.mrna_content`.
        start: proportions (S, K) that the bulks are near to, which saves most of the deconvolution.

    Returns:
        mu, var (S, K, D), pi (S, K) on ``device``; and the standard deviation of pi (S, K), None
        without halves.
    """
    rng = np.random.default_rng(0)
    genes = np.arange(len(measured))
    halves = [
        np.isin(genes, rng.permutation(np.flatnonzero(measured))[::2]) for _ in range(n_halves)
    ]
    measured, *halves = (torch.from_numpy(mask).to(device) for mask in (measured, *halves))
    parts = []
    # On CPU so few at a time that their (B, G) stay in the cache throughout the deconvolution.
    step = 256 if torch.device(device).type == "cpu" else CHUNK
    step = X.shape[0] if one_platform and X.shape[0] else step
    encode = partial(encoder, one_platform=one_platform)
    for i in range(0, max(X.shape[0], 1), step):  # without any bulk the results still have shapes
        rows = X[i : i + step].toarray() if sp.issparse(X) else X[i : i + step]
        bulk = torch.from_numpy(rows.astype(np.float32)).to(device)  # (B, G)
        near = None if start is None else start[i : i + step]
        mu, var, pi = encode(bulk, measured, start=near)
        # A thin bulk may have no count at all in half of the genes, hence 1e-9.
        again = progress(halves, "intervals of proportions", "half")
        jackknife = [encode(bulk + 1e-9, half)[2] for half in again]
        other = pi if second is None else torch.from_numpy(second[i : i + step]).to(pi)
        deviation = encoder.deviation(pi, bulk, measured) if halves else None  # (B)
        mean = pi + SECOND_WEIGHT * (other - pi)
        mean, pi, other, *jackknife = (
            rescale(part, scale) for part in (mean, pi, other, *jackknife)
        )
        of_estimator = SECOND_WEIGHT * (1 - SECOND_WEIGHT) * (pi - other) ** 2
        sd = proportion_sd(mean, pi, jackknife, of_estimator, deviation)
        parts.append((mu, var, mean, sd))
    mu, var, pi, sd = (torch.cat(part) for part in zip(*parts, strict=True))
    return mu, var, pi, sd if n_halves else None


def rescale(pi, scale):
    """Proportions (S, K) times a factor for each type (K), rows summing to 1; unchanged if None."""
    if scale is None:
        return pi
    pi = pi * torch.as_tensor(scale).to(pi)
    return pi / pi.sum(dim=1, keepdim=True)


def proportion_sd(mean, pi, jackknife, of_estimator, deviation):
    """Standard deviation of proportions m = (1 - w) π + w π', the mean of two estimates (S, K).

        sd_k² = mean_h (π_hk - π_k)² + w (1 - w) (π_k - π'_k)² + Σ_j (m_k (δ_kj - m_j))² (c d)²
                + sd_0²

    The first term, over halves h of the genes, shows how much the answer depends on which genes
    were read, and on how platform and sampled cells changed them (delete-half jackknife; Shao and
    Wu, Annals of Statistics 1989); the second, how much on the estimator. All share the mRNA
    content of the types, whose error moves the mean m like a factor for each. The farther the bulk
    is from the reference, by the robust sd d of its log-ratios, the less it is known: with c = 0.4
    and sd_0 = 0.005, 90 % intervals hold 92 % of the truths over pseudobulks of four single-cell
    sets and mixtures of sorted bulks.

    Args:
        mean, pi: (S, K). jackknife: list of (S, K). of_estimator: the second term (S, K).
            deviation: d (S).
    """
    if not jackknife:
        return torch.full_like(mean, torch.nan)
    of_genes = torch.stack([(half - pi) ** 2 for half in jackknife]).mean(dim=0)
    # Σ_j (m_k (δ_kj - m_j))² = m_k² (1 - 2 m_k + Σ_j m_j²)
    moved = mean**2 * (1 - 2 * mean + (mean**2).sum(dim=1, keepdim=True))
    of_content = moved * (CONTENT_SD * deviation[:, None]) ** 2
    return (of_genes + of_estimator + of_content + LEAST_SD**2).sqrt()


def encode_in_all_genes(encoder, bulk, measured, genes, names, where, **options):
    """:func:`encode_bulks` of bulks in the decoder's genes, checked to have counts.

    Args:
        bulk: (S x G), CSR or dense. measured: mask (G). genes: ``(decoder's, encoder's)``.
        names: of the bulks (S). where: what messages name. options: of encode_bulks.

    Raises:
        InputError: see :func:`check_filled`.
    """
    X, _ = align_genes(bulk, *genes, where, report=False)
    check_filled(X, names, where)
    measured = measured[pd.Index(genes[0]).get_indexer(genes[1])]
    return encode_bulks(encoder, X, measured, encoder.mu.device, **options)


@dataclass
class EncodedSamples:
    """What the Bulk Encoder answers for bulk samples, with the mRNA content that they call for."""

    mu: torch.Tensor
    """(S, K, D)."""
    var: torch.Tensor
    """(S, K, D)."""
    cells: torch.Tensor
    """Fractions of cells (S, K)."""
    sd: torch.Tensor
    """Their standard deviations (S, K)."""
    content: np.ndarray
    """mRNA of a cell of each type (K), on any scale: counts or picograms."""
    library: np.ndarray
    """Mean counts of a generated cell of each type (K)."""

    def mixing(self, cells=None):
        """Fractions of generated cells that would make these bulks (S, K).

        Generated cells have the reference's counts, which need not be in proportion to the mRNA of
        cells. cells: fractions of cells, where known; default the estimates.
        """
        cells = self.cells if cells is None else cells
        return rescale(cells, self.content / self.library)


def encode_samples(models, bulk, measured, names, where, mrna_content="auto", n_halves=20):
    """Encode bulk samples, and find out by whose mRNA content their cells are to be counted.

    Proportions are a weighted mean of the encoder's and of :func:`~deconvolution.dwls.dwls`, which
    reads other genes by other weights. Bulks of whole transcripts are also taken to be of one
    platform (:meth:`BulkEncoder.deconvolve_cohort`).

    Args:
        models: encoder, its card, decoder, its card. bulk: (S x G) in the decoder's genes, CSR or
            dense. measured: mask (G). names: of the bulks (S). where: what messages name.
        mrna_content: ``auto``, ``reference`` or ``published``; see :func:`choose_content`.

    Returns:
        EncodedSamples.

    Raises:
        InputError: see :func:`check_filled` and :func:`choose_content`.
    """
    encoder, card, decoder, decoder_card = models
    given = bulk, measured, (decoder_card["genes"], card["genes"]), names, where
    pi = encode_in_all_genes(encoder, *given)[2]
    library = mean_library(decoder)
    counts = np.array(card["content"]) if "content" in card else library
    as_counted = rescale(pi, counts / library)
    expected = (as_counted @ decoder.type_means()).cpu().numpy()
    dense = bulk.toarray() if sp.issparse(bulk) else bulk
    reads, why = counts_reads(dense, expected, decoder_card["genes"], measured)
    content = choose_content(mrna_content, card["cell_types"], counts, reads, why, where)
    options = {"one_platform": reads, "scale": counts / content}
    if "signature" in card:  # older files have none
        signature = Signature(**card["signature"])
        options["second"] = signature.proportions(dense, decoder_card["genes"], measured)
    mu, var, cells, sd = encode_in_all_genes(encoder, *given, n_halves=n_halves, **options)
    return EncodedSamples(mu, var, cells, sd, content, library)


def choose_content(mrna_content, cell_types, counts, reads, why, where):
    """mRNA content (K) of the cell types by which cells are counted; says which and why.

    Args:
        mrna_content: ``reference``: counts; ``published``: :func:`published_content`; ``auto``:
            published for bulks of whole transcripts, if types are known there.
        counts: mean counts of a cell of each type in the reference (K). reads, why: of
            :func:`deconvolution.mrna_content.counts_reads`. where: what messages name.

    Raises:
        InputError: ``published``, but fewer than two of the types are known there.
    """
    content, n_known = published_content(cell_types, counts)
    if mrna_content == "published" and content is None:
        raise InputError(
            f"--mrna-content published: found measurements for {n_known} of the {len(counts)} cell "
            f"types ({some(cell_types)}), expected two or more"
        )
    published = mrna_content == "published" or (mrna_content == "auto" and reads)
    if published and content is not None:
        source = f"as published, for {n_known} of {len(counts)} cell types"
    else:
        content, source = counts, "as counted in the reference"
    print(f"{where}: {why}; mRNA content of cells {source}")
    return content


def encode_batches(cfg, n_batches, encoder, genes, device, rng):
    """Sum batches of reference cells into bulks and encode them, CHUNK at a time.

    Args:
        cfg: settings of bulk2sc.py. n_batches: bulks to make. genes: the encoder's (G). rng: NumPy
            generator.

    Returns:
        iterator of mu, var (B, K, D) and pi (B, K). The reference is read at once, so that errors
        come before anything is written.
    """
    cells = load_cells(cfg, need_labels=False)
    X, measured = align_genes(cells.X, cells.var_names, genes, cfg.data)
    sample, names = samples_of(cells)
    sizes = np.bincount(sample)
    if cfg.batch_size > sizes.max():
        where = cfg.data if len(names) == 1 else "the largest of --samples"
        raise InputError(
            f"--batch-size: found {cfg.batch_size}, expected at most the {sizes.max()} cells of "
            f"{where}"
        )
    of_samples = f" of one of {len(names):,} samples" if len(names) > 1 else ""
    print(f"{n_batches:,} bulks, each the sum of {cfg.batch_size} reference cells{of_samples}")
    if small := np.sum(sizes < cfg.batch_size):
        print(f"{small:,} samples have fewer cells than that and give no bulk")
    batches = partial(batch_bulks, X)
    if len(names) > 1:
        batches = partial(batch_bulks_of_samples, X, sample)

    @torch.inference_mode()
    def compositions():
        """Proportions (S, K) of each sample's cells together, near which those of its bulks are."""
        pooled = sum_by_type(X, sample, len(names)).astype(np.float32)
        pooled = torch.from_numpy(pooled).to(device)  # (S, G)
        mask = torch.from_numpy(measured).to(pooled)
        return encoder.deconvolve(encoder.normalise(pooled, mask), mask)

    def encode():
        first, near = 0, compositions()
        for bulk, members in batches(cfg.batch_size, n_batches, rng, CHUNK):
            check_filled(bulk, range(first, first + len(bulk)), cfg.data)
            start = near[torch.from_numpy(sample[members[:, 0]]).to(device)]  # (B, K)
            yield encode_bulks(encoder, bulk, measured, device, start=start)[:3]
            first += len(bulk)

    return encode()


def encode_mixtures(encoder_card, decoder, known):
    """Mixtures of the reference's cell types, as a table of known proportions says.

    Args:
        known: readers.proportions.KnownProportions (R rows).

    Returns:
        Proportions of the R rows; and mu, var (R, K, D), the types' own moments, and pi (R, K).
    """
    composition, source = reference_composition(encoder_card)
    cell_types, library = encoder_card["cell_types"], mean_library(decoder)
    proportions = mixtures(known, cell_types, composition, library)
    pi = torch.from_numpy(proportions.cells).to(decoder.mu)
    print(f"{len(pi):,} mixtures of {pi.shape[1]} cell types")
    if n := np.sum(~proportions.known.all(axis=1)):
        print(f"{known.path}: in {n:,} of them what is not given is shared {source}")
    return proportions, [part.expand(len(pi), -1, -1) for part in (decoder.mu, decoder.var)] + [pi]


# --------------------------------------------------------------------------------- to cells


@dataclass
class Cells:
    """Generated cells, some of many."""

    counts: sp.csr_matrix
    """(B x G), int32."""
    latent: np.ndarray
    """z (B, D), float32."""
    cell_type: np.ndarray
    """Codes (B)."""
    bulk: np.ndarray
    """Index of the bulk each comes from (B)."""


@torch.inference_mode()
def generate_cells(decoder, encoded, per_bulk, generator, log_factor=None, first=0, codes=None):
    """Generate cells of bulks.

        k ~ Categorical(π̂),   z = μ̂_k + σ̂_k e   (e: shape of type k),   x ~ NB(scDecoder(z))

    Args:
        encoded: mu, var (S, K, D) and pi (S, K) of the bulks, as :func:`encode_bulks` gives them.
        per_bulk: cells of each bulk. generator: torch Generator on their device.
        log_factor: (S, G) or (S, K, G), see :class:`Expression`. first: index of the
            first bulk. codes: types of the cells of each bulk in place of a draw (per_bulk); of
            bulks that yield one cell, the types of all of these cells.

    Yields:
        Cells, CHUNK at a time.
    """
    mu, var, pi = encoded
    if codes is None:
        cell_type = draw_types(pi, per_bulk, generator)  # (S * per_bulk)
    else:
        codes = codes.to(pi.device)
        cell_type = codes.repeat(len(pi))
        if len(codes) != per_bulk:  # of all bulks
            cell_type = codes[first : first + len(pi)]
    tilt = decoder.tilt_shape(mu, var) if len(mu) else None
    for i in range(0, len(cell_type), CHUNK):
        k = cell_type[i : i + CHUNK]  # (B)
        bulk = torch.arange(i, i + len(k), device=k.device) // per_bulk  # (B)
        X, z = decode(decoder, mu[bulk, k], var[bulk, k], k, generator, log_factor, bulk, tilt)
        yield Cells(X, z, k.cpu().numpy(), first + bulk.cpu().numpy())


def draw_types(pi, per_bulk, generator):
    """Draw k ~ Categorical(pi) for each cell: pi (S, K) -> codes (S * per_bulk)."""
    if len(pi) == 0 or per_bulk == 0:
        return torch.zeros(0, dtype=torch.long, device=pi.device)
    return torch.multinomial(pi, per_bulk, replacement=True, generator=generator).flatten()


def decode(decoder, mu, var, codes, generator, log_factor=None, sample=None, tilt=None):
    """Draw one cell for each row: z of mean mu and variance var, library size, then counts.

    Args:
        mu, var: (B, D). codes: cell types (B). generator: torch Generator on their device.
        log_factor: (S, G) or (S, K, G), see :class:`Expression`, with sample: the bulk
            of each cell (B). tilt: see :meth:`models.scDecoder.tilt_shape`.

    Returns:
        ``(X, z)``: counts (B x G) CSR int32 and latents (B, D) float32.
    """
    z = decoder.sample_latent(mu, var, codes, generator, tilt, sample)  # (B, D)
    library = decoder.sample_library(codes, generator)  # (B,)
    if log_factor is not None and log_factor.dim() == 3:  # a row for each type of each sample
        sample = sample * log_factor.shape[1] + codes
        log_factor = log_factor.flatten(0, 1)  # (S K, G)
    X = decoder.sample_rows(z, library, codes, generator, log_factor, sample)  # (B x G)
    return X, z.cpu().numpy()


@torch.inference_mode()
def decode_cells(decoder, mu, var, codes, generator, log_factor=None, sample=None):
    """As :func:`decode`, of any number of cells (N), CHUNK at a time."""
    sample = torch.zeros_like(codes) if sample is None else sample
    chunks = zip(*(part.split(CHUNK) for part in (mu, var, codes, sample)), strict=True)
    parts = [decode(decoder, m, v, k, generator, log_factor, s) for m, v, k, s in chunks]
    blocks, latents = zip(*parts, strict=True)
    return sp.vstack(blocks, format="csr"), np.concatenate(latents)


def new_cells(decoder, codes, generator, log_factor=None, sample=None):
    """Counts (N x G), CSR, of cells of types ``codes`` (N) from the mixture itself, not a bulk."""
    mu, var = decoder.mu[codes], decoder.var[codes]  # (N, D)
    return decode_cells(decoder, mu, var, codes, generator, log_factor, sample)[0]


# ------------------------------------------------------- how bulk and generated cells compare


def log_cpm(bulk, measured, pseudocount):
    """log2(CPM + pseudocount) of bulks (S, G) over the measured genes (G); nan without counts."""
    part = bulk[:, measured]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log2(part / part.sum(axis=1, keepdims=True) * 1e6 + pseudocount)


def bulk_fit(bulk, expected, measured):
    """How well the reference's cell types add up to a bulk, by two measures.

    Args:
        bulk: (S, G), counts, TPM or CPM. expected: (S, G), the sum that the predicted proportions
            make. measured: mask (G) of the genes that the bulk has.

    Returns:
        ``(correlation, unexplained)``, each (S): Pearson correlation of log2(CPM + 10) over genes
        above 30 CPM in either; and the share of these genes far above what is expected (three
        robust standard deviations of the log-ratio) less the share far below. A platform moves
        genes both ways, a cell type that the reference lacks only up.
    """
    logs = (log_cpm(part, measured, pseudocount=10) for part in (bulk, expected))
    correlation, unexplained = np.full(len(bulk), np.nan), np.full(len(bulk), np.nan)
    for i, (b, e) in enumerate(zip(*logs, strict=True)):
        expressed = (b > np.log2(40)) | (e > np.log2(40))
        if expressed.sum() < 10:  # too few for either measure
            continue
        ratio = b[expressed] - e[expressed]
        ratio = ratio - np.median(ratio)
        width = 3 * 1.4826 * np.median(np.abs(ratio))
        unexplained[i] = np.mean(ratio > width) - np.mean(ratio < -width)
        correlation[i] = np.corrcoef(b[expressed], e[expressed])[0, 1]
    return correlation, unexplained


def misfit(correlation, unexplained, reference):
    """The worse of the two measures of fit (S), in standard deviations of the reference's own.

    reference: mean and sd of each on pseudobulks, as train_encoder.py saves them.
    """
    (c_mean, c_sd), (u_mean, u_sd) = reference["correlation"], reference["unexplained"]
    return np.maximum((c_mean - correlation) / c_sd, (unexplained - u_mean) / u_sd)


def counts_of_genes(bulk, expected, measured):
    """Median count (S) that the genes above 30 CPM in expectation have by a bulk's depth.

    bulk, expected: (S, G). measured: mask (G). Infinite for what is no counts, whose depth is
    unknown.
    """
    share = expected[:, measured] / expected[:, measured].sum(axis=1, keepdims=True)
    median = np.nanmedian(np.where(share > 3e-5, share, np.nan), axis=1)
    is_counts = (bulk == np.rint(bulk)).all(axis=1)
    return np.where(is_counts, bulk[:, measured].sum(axis=1) * median, np.inf)


def calibrate_to(bulk, decoder, encoder, genes):
    """log_factor (S, G) of bulks (S x G, CSR) in the decoder's genes, and pi (S, K), as tensors.

    genes: ``(decoder's, encoder's)``.
    """
    X, measured = align_genes(bulk, *genes, "the encoder", report=False)
    device = decoder.mu.device
    *encoded, _ = encode_bulks(encoder, X, measured, device)
    expected = expected_bulk(decoder, encoded)
    factor = calibration(bulk.toarray(), expected, np.ones(bulk.shape[1], bool))
    return torch.from_numpy(factor).to(device), encoded[2]


def add_to_sums(sums, counts, sample):
    """Add counts (B x G), CSR, of the cells of bulks ``sample`` (B) to the sums of bulks (S, G)."""
    bulks, member = np.unique(sample, return_inverse=True)
    shape = (len(bulks), len(sample))
    one_hot = sp.csr_matrix((np.ones(len(sample)), (member, np.arange(len(sample)))), shape)
    sums[bulks] += (one_hot @ counts).toarray()


def sum_agreement(bulk, sums, measured):
    """Pearson correlation (S) of log2(CPM + 1), each bulk against the sum of its cells.

    bulk, sums: (S, G). measured: mask (G).
    """
    logs = (log_cpm(part, measured, pseudocount=1) for part in (bulk, sums))
    with np.errstate(invalid="ignore"):  # a sample without cells reads nan
        return np.array([np.corrcoef(*pair)[0, 1] for pair in zip(*logs, strict=True)])


# ------------------------------------------------------------------------- samples of a table


def sample_proportions(names, cell_types, answer, known=None):
    """Proportions of bulk samples: what the encoder answers, its error, and what is known.

    Args:
        names: (S). cell_types: (K). answer: EncodedSamples. known: see
            :func:`deconvolution.proportions.make_proportions`.
    """
    pi, sd = (part.cpu().numpy().astype(np.float64) for part in (answer.cells, answer.sd))
    interval = normal_interval(pi, sd)
    return make_proportions(names, cell_types, pi, answer.content, interval, known)


@dataclass
class Bulks:
    """What cells are generated of: bulks as the models see them, or mixtures of cell types."""

    names: list
    """Of the samples (S)."""
    encoded: Iterable
    """Of mu, var (S', K, D) and pi (S', K), for one part of the samples after the other."""
    proportions: Proportions | None = None
    """None if they are known only when all have been encoded."""
    samples: BulkSamples | None = None
    """Of bulk samples, what tells how they fit."""
    expression: Expression | None = None
    """Of bulk samples, what their cells take of it."""
    one_cell_each: bool = False
    """Whether each yields one cell."""

    def __repr__(self):
        return f"{len(self.names):,} bulks or mixtures to generate ({some(self.names)})"


class BulkSamples:
    """The samples of --bulk, encoded, and how the reference's cell types add up to them.

    Attributes:
        names: of the samples (S). genes: the decoder's (G). bulk: (S, G) in these genes. measured:
            mask (G). proportions: of the samples, estimated or known. encoded: mu, var (S, K, D)
            and pi (S, K), the proportions of cells. mixed: the same, with proportions at which the
            reference's cells make the bulk's RNA. expected: (S, G), the sum that these make.
            profiles: TypeProfiles, expected of each type (S, K, G). sums: (S, G), of the cells
            generated so far, each at its type's weight (S, K). unknown: UnknownShare. fit: a row
            for each sample. is_shallow: mask (S) of counts too few for the fit to say anything.
            expression: Expression, once estimated, and how: ``(calibrate, platform)``. card: the
            decoder's.
    """

    def __init__(self, bulk, where, models, mrna_content="auto", known=None):
        """Args:
        bulk: of :func:`readers.bulk.read_bulk`, in all genes of the decoder: those that the encoder
            does not read still show the fit. where: what messages name. models: encoder, its card,
            decoder, its card. mrna_content: see :func:`choose_content`. known:
            readers.proportions.KnownProportions, in place of what the encoder answers.
        """
        _, encoder_card, decoder, decoder_card = models
        genes, encoder_genes = decoder_card["genes"], encoder_card["genes"]
        self.genes = genes
        bulk, self.measured, self.names = bulk
        n_read = np.isin(encoder_genes, np.array(genes)[self.measured]).sum()
        print(f"{where}: {n_read:,} of the {len(encoder_genes):,} genes the Bulk Encoder reads")
        answer = encode_samples(models, bulk, self.measured, self.names, where, mrna_content)
        self.bulk, self.decoder, self.card = bulk.toarray(), decoder, decoder_card
        self.proportions = sample_proportions(self.names, decoder_card["cell_types"], answer, known)
        cells = torch.from_numpy(self.proportions.cells).to(answer.cells)
        mixing = answer.mixing(cells)
        # A cell stands for as much of the bulk as the mRNA of its type, whatever its counts.
        self.weight = (mixing / cells.clamp(min=1e-12)).cpu().numpy()  # (S, K)
        self.encoded = [answer.mu, answer.var, cells]
        self.mixed = [answer.mu, answer.var, mixing]
        self.profiles = TypeProfiles(decoder, answer.mu, answer.var)
        self.expected = expected_bulk(decoder, self.mixed, self.profiles)
        self.sums = np.zeros(self.bulk.shape)
        self.fit = pd.DataFrame(index=self.names)
        correlation, unexplained = bulk_fit(self.bulk, self.expected, self.measured)
        self.fit["correlation"], self.fit["unexplained"] = correlation, unexplained
        reference = encoder_card.get("fit")
        self.fit["misfit"] = misfit(correlation, unexplained, reference) if reference else np.nan
        own = self.profiles.reference[0]  # (K, G), of no state
        self.expression = self.how = None
        self.unknown = unknown_share(self.bulk, self.measured, own, genes)
        self.fit["unknown"] = self.unknown.share
        self.fit["unknown_low"], self.fit["unknown_high"] = self.unknown.low, self.unknown.high
        self.is_shallow = counts_of_genes(self.bulk, self.expected, self.measured) < FEWEST_COUNTS

    def __repr__(self):
        n_types, n_genes = self.proportions.cells.shape[1], self.measured.sum()
        names = some(self.names)
        return (
            f"{len(self.names):,} bulk samples ({names}) of {n_types} cell types, {n_genes:,} genes"
        )

    def to_bulks(self):
        """Bulks of these samples, for cells to be generated."""
        self.sums[:] = 0
        parts = parts_of(len(self.names))
        encoded = [[part[rows] for part in self.encoded] for rows in parts]
        return Bulks(self.names, encoded, self.proportions, self, self.expression)

    def add(self, cells, balanced=False):
        """Add generated Cells to the sums of their samples; balanced: as many of each type."""
        weight = self.weight[cells.bulk, cells.cell_type]
        if balanced:
            weight = weight * self.proportions.cells[cells.bulk, cells.cell_type]
        weight = sp.diags_array(weight)
        add_to_sums(self.sums, weight @ cells.counts, cells.bulk)

    def compare_sums(self):
        """Add to ``fit`` how well the generated cells of each sample add up to it."""
        self.fit["agreement"] = sum_agreement(self.bulk, self.sums, self.measured)

    def estimate_expression(self, calibrate, platform):
        """:func:`deconvolution.expression.estimate_expression` of these samples."""
        bulks = self.bulk, self.measured
        return estimate_expression(
            self.decoder, self.mixed, *bulks, calibrate, platform, self.profiles
        )

    def write_expression(self, path):
        """:func:`deconvolution.expression.write_expression` of these samples, into an .h5ad."""
        write_expression(path, self.names, self.proportions.cells, self.expression, self.card)
