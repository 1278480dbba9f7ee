"""From bulk profiles to cells: proportions, latents and counts."""

import numpy as np
import scipy.sparse as sp
import torch

from data import align_genes, apply_split, batch_bulks, library_size, load_cells
from models import BulkEncoder, scDecoder
from runtime.errors import InputError
from runtime.weights import check_cell_types, check_mixture, load_model

CHUNK = 4096  # cells at a time: bounds memory, and gives every core some blocks of them

MISFIT = 4  # standard deviations beyond usual bulks from which a sample is warned of


def load_weights(weights, cells, cell_types, device, fewest=2):
    """Both models of a folder and their cards, checked against the data, and the split (N).

    fewest: held-out cells that there must be.
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


def draw_types(pi, per_sample, generator):
    """Draw k ~ Categorical(pi) for each cell: pi (S, K) -> codes (S * per_sample,)."""
    if len(pi) == 0 or per_sample == 0:
        return torch.zeros(0, dtype=torch.long, device=pi.device)
    return torch.multinomial(pi, per_sample, replacement=True, generator=generator).flatten()


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


def new_cells(decoder, k, generator, log_factor=None, sample=None):
    """Counts (N x G), CSR, of new cells of types k (N) by the mixture itself; no bulk moves it."""
    mu, var = decoder.mu[k], decoder.var[k]
    return decode_cells(decoder, mu, var, k, generator, log_factor=log_factor, sample=sample)[0]


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


def calibrate_to(bulk, decoder, encoder, genes):
    """log_factor (S, G) of bulks (S x G, CSR) in the decoder's genes, and pi (S, K), as tensors.

    genes: ``(decoder's, encoder's)``.
    """
    X, present = align_genes(bulk, *genes, "the encoder", report=False)
    device = decoder.mu.device
    _, _, pi, _ = encode_bulks(encoder, X, present, device)
    factor = calibration(bulk.toarray(), expected_bulk(decoder, pi), np.ones(bulk.shape[1], bool))
    return torch.from_numpy(factor).to(device), pi


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
