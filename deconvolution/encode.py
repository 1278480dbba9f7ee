"""From bulk samples to what the Bulk Encoder says of them, counted in cells.

Notation in shape comments: S bulk samples, G genes, K cell types, D latent dimensions.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from data import align_genes, library_size
from deconvolution.dwls import Signature
from deconvolution.expression import calibration, expected_bulk, mean_library
from deconvolution.mrna_content import counts_reads, published_content
from runtime.errors import InputError, some
from runtime.progress import progress
from states.reading import StateReading

CHUNK = 4096  # bulks at a time on a GPU
# Of the estimate by dwls.py: 0.3 to 0.6 are best for bulks of other data sets, 0 to 0.1 for
# simulated platforms.
SECOND_WEIGHT = 0.3
CONTENT_SD = 0.4  # sd of the log mRNA content of types, per sd of the log-ratios of genes
MIN_SD = 0.005  # of a proportion


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
    return (of_genes + of_estimator + of_content + MIN_SD**2).sqrt()


def encode(model, bulk, **options):
    """:func:`encode_bulks` of a Bulk in the model's genes, checked to have counts.

    Args:
        model: Model. bulk: Bulk (S). options: of encode_bulks.

    Raises:
        InputError: see :func:`check_filled`.
    """
    genes = model.genes, model.encoder_genes
    X, _ = align_genes(bulk.values, *genes, bulk.where, report=False)
    check_filled(X, bulk.samples, bulk.where)
    measured = bulk.measured[pd.Index(genes[0]).get_indexer(genes[1])]
    return encode_bulks(model.encoder, X, measured, model.device, **options)


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
    states: StateReading | None = None
    """None without states of the reference's samples."""

    def mixing(self, cells=None):
        """Fractions of generated cells that would make these bulks (S, K).

        Generated cells have the reference's counts, which need not be in proportion to the mRNA of
        cells. cells: fractions of cells, where known; default the estimates.
        """
        cells = self.cells if cells is None else cells
        return rescale(cells, self.content / self.library)


def encode_samples(model, bulk, mrna_content="auto", n_halves=20):
    """Encode bulk samples, and find out by whose mRNA content their cells are to be counted.

    Proportions are a weighted mean of the encoder's and of :func:`~deconvolution.dwls.dwls`, which
    reads other genes by other weights. Bulks of whole transcripts are also taken to be of one
    platform (:meth:`BulkEncoder.deconvolve_cohort`).

    Args:
        model: Model. bulk: Bulk (S) in its genes.
        mrna_content: ``auto``, ``reference`` or ``published``; see :func:`choose_content`.

    Returns:
        EncodedSamples.

    Raises:
        InputError: see :func:`check_filled` and :func:`choose_content`.
    """
    metadata, library = model.encoder_metadata, mean_library(model.decoder)
    pi = encode(model, bulk)[2]
    counts = np.array(metadata["content"]) if "content" in metadata else library
    as_counted = rescale(pi, counts / library)
    expected = (as_counted @ model.decoder.type_means()).cpu().numpy()
    values = bulk.dense()
    reads, why = counts_reads(values, expected, model.genes, bulk.measured)
    content = choose_content(mrna_content, model.cell_types, counts, reads, why, bulk.where)
    options = {"one_platform": reads, "scale": counts / content}
    if "signature" in metadata:  # older files have none
        signature = Signature(**metadata["signature"])
        options["second"] = signature.proportions(values, model.genes, bulk.measured)
    mu, var, cells, sd = encode(model, bulk, n_halves=n_halves, **options)
    encoded = EncodedSamples(mu, var, cells, sd, content, library)
    if model.states is not None:
        weight = encoded.mixing().cpu().double().numpy() * library
        encoded.states = model.states.read(values, bulk.measured, weight)
    return encoded


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


def calibrate_to(bulk, model):
    """log_factor (S, G) of counts (S x G), CSR, in a model's genes, and pi (S, K), tensors."""
    genes = model.genes, model.encoder_genes
    X, measured = align_genes(bulk, *genes, "the encoder", report=False)
    *encoded, _ = encode_bulks(model.encoder, X, measured, model.device)
    expected = expected_bulk(model.decoder, encoded[2])
    factor = calibration(bulk.toarray(), expected, np.ones(bulk.shape[1], bool))
    return torch.from_numpy(factor).to(model.device), encoded[2]
