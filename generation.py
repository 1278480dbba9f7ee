"""From bulk profiles to cells: encode the bulk, draw types and latents, decode counts.

    bulk -> Bulk Encoder -> k ~ π̂ -> z ~ N(μ̂_k, σ̂_k²) -> scDecoder -> counts of one cell

Also what compares bulks with the cells generated from them: fit, calibration and sums.

Notation in shape comments: S bulk samples, N cells, B cells of a chunk, G genes, K cell types,
D latent dimensions.
"""

from dataclasses import dataclass
from functools import partial

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
)
from expression import calibration, estimate_expression, expected_bulk, type_profiles
from models import BulkEncoder, scDecoder
from readers.bulk import read_bulk
from runtime.errors import InputError
from runtime.weights import check_cell_types, check_mixture, load_model

CHUNK = 4096  # cells at a time: bounds memory, and is enough for every core
MISFIT = 4  # standard deviations beyond pseudobulks of the reference from which users are warned


def load_models(folder, device):
    """The Bulk Encoder and scDecoder of a folder of weights, and what their files say besides.

    Returns:
        encoder, its card, decoder, its card.
    """
    encoder_file, decoder_file = folder / "bulkEncoder_model.pt", folder / "scDecoder_model.pt"
    encoder, encoder_card = load_model(encoder_file, BulkEncoder, device)
    decoder, decoder_card = load_model(decoder_file, scDecoder, device)
    check_mixture(encoder_file, encoder, decoder.mu, decoder.var, decoder_file)
    return encoder, encoder_card, decoder, decoder_card


def load_weights(weights, cells, cell_types, device, fewest=2):
    """Both models of a folder, checked against the data they are to be measured on.

    Args:
        weights: folder. cells: AnnData (N). cell_types: names (K). fewest: held-out cells that
            there must be.

    Returns:
        decoder, its card, encoder, its card, and the mask of held-out cells (N).
    """
    decoder_file, encoder_file = weights / "scDecoder_model.pt", weights / "bulkEncoder_model.pt"
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
def encode_bulks(encoder, X, present, device, n_halves=0):
    """Run the Bulk Encoder once over all bulks.

    Args:
        X: bulk profiles (S x G) in the encoder's gene order, CSR. present: mask (G) of the genes
            that were measured.
        n_halves: times to run it again on a random half of the genes. How far these answers lie
            from the full one shows how much it depends on which genes were read, and on how
            platform and sampled cells changed them (delete-half jackknife; Shao and Wu, Annals of
            Statistics 1989).

    Returns:
        mu, var (S, K, D), pi (S, K) on ``device``; and the standard deviation of pi (S, K), None
        without halves.
    """
    rng = np.random.default_rng(0)
    measured = np.flatnonzero(present)
    genes = np.arange(len(present))
    halves = [np.isin(genes, rng.permutation(measured)[::2]) for _ in range(n_halves)]
    present, *halves = (torch.from_numpy(mask).to(device) for mask in (present, *halves))
    parts = []
    # On CPU so few at a time that their (B, G) stay in the cache throughout the deconvolution.
    step = 256 if torch.device(device).type == "cpu" else CHUNK
    for i in range(0, max(X.shape[0], 1), step):  # without any bulk the results still have shapes
        bulk = torch.from_numpy(X[i : i + step].toarray().astype(np.float32)).to(device)  # (B, G)
        mu, var, pi = encoder(bulk, present)
        # A thin bulk may have no count at all in half of the genes, hence 1e-9.
        jackknife = [encoder(bulk + 1e-9, half)[2] for half in halves]
        square = [(other - pi) ** 2 for other in jackknife]
        sd = torch.stack(square).mean(dim=0).sqrt() if square else torch.full_like(pi, torch.nan)
        parts.append((mu, var, pi, sd))
    mu, var, pi, sd = (torch.cat(part) for part in zip(*parts, strict=True))
    return mu, var, pi, sd if n_halves else None


def encode_in_all_genes(encoder, bulk, measured, genes, names, where, n_halves=0):
    """:func:`encode_bulks` of bulks in the decoder's genes, checked to have counts.

    Args:
        bulk: (S x G), CSR or dense. measured: mask (G). genes: ``(decoder's, encoder's)``.
        names: of the bulks (S). where: what messages name.

    Raises:
        InputError: see :func:`check_filled`.
    """
    X, _ = align_genes(bulk, *genes, where, report=False)
    check_filled(X, names, where)
    present = measured[pd.Index(genes[0]).get_indexer(genes[1])]
    return encode_bulks(encoder, X, present, encoder.mu.device, n_halves)


def encode_batches(cfg, encoder, genes, device, rng):
    """Sum batches of reference cells into --n-cells bulks and encode them, CHUNK at a time.

    Args:
        genes: the encoder's (G). rng: NumPy generator.

    Returns:
        iterator of mu, var (B, K, D) and pi (B, K). The reference is read at once, so that errors
        come before anything is written.
    """
    cells = load_cells(cfg, need_labels=False)
    X, present = align_genes(cells.X, cells.var_names, genes, cfg.data)
    sample, names = samples_of(cells)
    sizes = np.bincount(sample)
    if cfg.batch_size > sizes.max():
        where = cfg.data if len(names) == 1 else "the largest of --samples"
        raise InputError(
            f"--batch-size: found {cfg.batch_size}, expected at most the {sizes.max()} cells of "
            f"{where}"
        )
    of_samples = f" of one of {len(names):,} samples" if len(names) > 1 else ""
    print(f"{cfg.n_cells:,} bulks, each the sum of {cfg.batch_size} reference cells{of_samples}")
    if small := np.sum(sizes < cfg.batch_size):
        print(f"{small:,} samples have fewer cells than that and give no bulk")
    batches = partial(batch_bulks, X)
    if len(names) > 1:
        batches = partial(batch_bulks_of_samples, X, sample)

    def encode():
        first = 0
        for bulk, _ in batches(cfg.batch_size, cfg.n_cells, rng, CHUNK):
            check_filled(bulk, range(first, first + len(bulk)), cfg.data)
            yield encode_bulks(encoder, sp.csr_matrix(bulk), present, device)[:3]
            first += len(bulk)

    return encode()


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
def generate_cells(decoder, encoded, per_bulk, generator, log_factor=None, first=0):
    """Generate cells of bulks.

        k ~ Categorical(π̂),   z = μ̂_k + σ̂_k e   (e: shape of type k),   x ~ NB(scDecoder(z))

    Args:
        encoded: mu, var (S, K, D) and pi (S, K) of the bulks, as :func:`encode_bulks` gives them.
        per_bulk: cells of each bulk. generator: torch Generator on their device.
        log_factor: (S, G) or (S, K, G), see :class:`expression.Expression`. first: index of the
            first bulk.

    Yields:
        Cells, CHUNK at a time.
    """
    mu, var, pi = encoded
    cell_type = draw_types(pi, per_bulk, generator)  # (S * per_bulk)
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
        log_factor: (S, G) or (S, K, G), see :class:`expression.Expression`, with sample: the bulk
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


def log_cpm(bulk, present, pseudocount):
    """log2(CPM + pseudocount) of bulks (S, G) over the genes present (G); nan without counts."""
    part = bulk[:, present]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log2(part / part.sum(axis=1, keepdims=True) * 1e6 + pseudocount)


def bulk_fit(bulk, expected, present):
    """How well the reference's cell types add up to a bulk, by two measures.

    Args:
        bulk: (S, G), counts, TPM or CPM. expected: (S, G), the sum that the predicted proportions
            make. present: mask (G) of the genes that the bulk has.

    Returns:
        ``(correlation, unexplained)``, each (S): Pearson correlation of log2(CPM + 10) over genes
        above 30 CPM in either; and the share of these genes far above what is expected (three
        robust standard deviations of the log-ratio) less the share far below. A platform moves
        genes both ways, a cell type that the reference lacks only up.
    """
    logs = (log_cpm(part, present, pseudocount=10) for part in (bulk, expected))
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


def calibrate_to(bulk, decoder, encoder, genes):
    """log_factor (S, G) of bulks (S x G, CSR) in the decoder's genes, and pi (S, K), as tensors.

    genes: ``(decoder's, encoder's)``.
    """
    X, present = align_genes(bulk, *genes, "the encoder", report=False)
    device = decoder.mu.device
    *encoded, _ = encode_bulks(encoder, X, present, device)
    expected = expected_bulk(decoder, encoded)
    factor = calibration(bulk.toarray(), expected, np.ones(bulk.shape[1], bool))
    return torch.from_numpy(factor).to(device), encoded[2]


def add_to_sums(sums, counts, sample):
    """Add counts (B x G), CSR, of the cells of bulks ``sample`` (B) to the sums of bulks (S, G)."""
    bulks, member = np.unique(sample, return_inverse=True)
    shape = (len(bulks), len(sample))
    one_hot = sp.csr_matrix((np.ones(len(sample)), (member, np.arange(len(sample)))), shape)
    sums[bulks] += (one_hot @ counts).toarray()


def sum_agreement(bulk, sums, present):
    """Pearson correlation (S) of log2(CPM + 1), each bulk against the sum of its cells.

    bulk, sums: (S, G). present: mask (G).
    """
    logs = (log_cpm(part, present, pseudocount=1) for part in (bulk, sums))
    with np.errstate(invalid="ignore"):  # a sample without cells reads nan
        return np.array([np.corrcoef(*pair)[0, 1] for pair in zip(*logs, strict=True)])


# ------------------------------------------------------------------------- samples of a table


class BulkSamples:
    """The samples of --bulk, encoded, and how the reference's cell types add up to them.

    Attributes:
        names: of the samples (S). bulk: (S, G) in the decoder's genes. measured: mask (G).
        encoded: mu, var (S, K, D) and pi (S, K). sd: of pi (S, K). expected: (S, G), the sum that
            pi makes. profiles: expected of each type (S, K, G). sums: (S, G), of the cells
            generated so far. fit: a row for each sample.
    """

    def __init__(self, path, encoder, encoder_card, decoder, decoder_card):
        # In all genes of the decoder: those that the encoder does not read still show the fit.
        genes, encoder_genes = decoder_card["genes"], encoder_card["genes"]
        bulk, self.measured, self.names = read_bulk(path, genes, decoder_card.get("gene_ids"))
        n_read = np.isin(encoder_genes, np.array(genes)[self.measured]).sum()
        print(f"{path}: {n_read:,} of the {len(encoder_genes):,} genes the Bulk Encoder reads")
        *self.encoded, sd = encode_in_all_genes(
            encoder, bulk, self.measured, (genes, encoder_genes), self.names, path, n_halves=20
        )
        self.bulk, self.sd, self.decoder = bulk.toarray(), sd.cpu().numpy(), decoder
        self.profiles = type_profiles(decoder, *self.encoded[:2])
        self.expected = expected_bulk(decoder, self.encoded, self.profiles)
        self.sums = np.zeros(self.bulk.shape)
        self.fit = pd.DataFrame(index=self.names)
        correlation, unexplained = bulk_fit(self.bulk, self.expected, self.measured)
        self.fit["correlation"], self.fit["unexplained"] = correlation, unexplained
        reference = encoder_card.get("fit")
        self.fit["misfit"] = misfit(correlation, unexplained, reference) if reference else np.nan

    @property
    def proportions(self):
        """pi (S, K) as a numpy array, float64."""
        return self.encoded[2].cpu().numpy().astype(np.float64)

    def add(self, cells):
        """Add generated Cells to the sums of their samples."""
        add_to_sums(self.sums, cells.counts, cells.bulk)

    def compare_sums(self):
        """Add to ``fit`` how well the generated cells of each sample add up to it."""
        self.fit["agreement"] = sum_agreement(self.bulk, self.sums, self.measured)

    def estimate_expression(self, calibrate, platform):
        """:func:`expression.estimate_expression` of these samples."""
        bulks = self.bulk, self.measured
        return estimate_expression(
            self.decoder, self.encoded, *bulks, calibrate, platform, self.profiles
        )
