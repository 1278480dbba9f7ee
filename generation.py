"""From bulk profiles to cells: encode the bulk, draw types and latents, decode counts.

    bulk -> Bulk Encoder -> k ~ π̂ -> z ~ N(μ̂_k, σ̂_k²) -> scDecoder -> counts of one cell

Notation in shape comments: S bulk samples, N cells, B cells of a chunk, G genes, K cell types,
D latent dimensions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch

from counts.pseudobulks import batch_bulks, batch_bulks_of_samples
from data import Reference, sum_by_type
from deconvolution.encode import check_filled, encode_bulks
from deconvolution.expression import (
    Expression,
    mean_library,
    part_profiles,
    parts_of,
)
from deconvolution.proportions import Proportions, mixtures, reference_composition
from deconvolution.samples import BulkSamples
from models import BulkEncoder, scDecoder
from runtime.arguments import check_type, for_python
from runtime.device import pick_device
from runtime.errors import InputError, some
from runtime.weights import check_cell_types, check_mixture, load_model, save_tensors
from states.reading import StateProfiles, normalise, states_of

MODEL_FILES = ("bulkEncoder_model.pt", "scDecoder_model.pt")
CHUNK = 4096  # cells at a time: bounds memory, and is enough for every core


@dataclass(eq=False)
class Model:
    """What generation needs: Bulk Encoder and scDecoder, and what their files say besides."""

    encoder: BulkEncoder
    decoder: scDecoder
    encoder_metadata: dict
    """``genes``, ``cell_types``, ``settings`` and more."""
    metadata: dict
    """The same of scDecoder, which has all genes."""
    folder: Path | None = None
    """Of the files."""

    genes = property(lambda self: self.metadata["genes"], doc="Names (G), scDecoder's.")
    gene_ids = property(lambda self: self.metadata.get("gene_ids"), doc="Their other names (G).")
    encoder_genes = property(lambda self: self.encoder_metadata["genes"])
    cell_types = property(lambda self: self.metadata["cell_types"], doc="Names (K).")
    device = property(lambda self: self.decoder.mu.device)

    @cached_property
    def states(self):
        """StateProfiles of the reference's samples; None if it was of one."""
        states = states_of(self.metadata)
        if states is None:
            return None
        return StateProfiles(states, normalise(part_profiles(self.decoder).cpu().numpy()))

    def __repr__(self):
        K, G = len(self.cell_types), len(self.genes)
        return f"Model of {K} cell types ({some(self.cell_types)}) x {G:,} genes"

    @classmethod
    @for_python
    def load(cls, folder, device="cpu"):
        """Read the files of a folder of weights.

        Raises:
            InputError: see :func:`runtime.weights.load_model`; or they are not of one training, or
                an argument has another type.
        """
        check_type("folder", folder, (str, Path), "a folder of weights")
        check_type("device", device, (str, torch.device), "auto, cpu, cuda or cuda:N")
        if Path(folder).is_file():
            raise InputError(f"{folder}: found a file, expected a folder of weights")
        device = pick_device(device)
        encoder_file, decoder_file = (Path(folder) / name for name in MODEL_FILES)
        encoder, encoder_metadata = load_model(encoder_file, BulkEncoder, device)
        decoder, metadata = load_model(decoder_file, scDecoder, device)
        check_mixture(encoder_file, encoder, decoder.mu, decoder.var, decoder_file)
        return cls(encoder, decoder, encoder_metadata, metadata, Path(folder))

    def split(self, reference):
        """A Reference with those cells held out that the files list.

        Raises:
            InputError: its cell types or its cells are not those of the training.
        """
        encoder_file, decoder_file = (self.folder / name for name in MODEL_FILES)
        check_cell_types(decoder_file, self.metadata, reference.cell_types)
        check_cell_types(encoder_file, self.encoder_metadata, reference.cell_types)
        return reference.split_as(self.metadata, decoder_file)

    def counts(self, reference, rows):
        """Counts of some cells of a Reference (n x G), CSR, in all genes of the model."""
        return reference.counts(self.genes, "the model", rows)[0]

    def save(self, folder):
        """Write the files that :meth:`load` reads."""
        check_type("folder", folder, (str, Path), "a folder to write to")
        networks = (self.encoder, self.encoder_metadata), (self.decoder, self.metadata)
        for name, (network, metadata) in zip(MODEL_FILES, networks, strict=True):
            state = {key: value.detach().cpu() for key, value in network.state_dict().items()}
            save_tensors(Path(folder) / name, metadata | {"state": state})


def encode_batches(cfg, n_batches, model, rng):
    """Sum batches of reference cells into bulks and encode them, CHUNK at a time.

    Args:
        cfg: settings of bulk2sc.py. n_batches: bulks to make. model: Model. rng: NumPy generator.

    Returns:
        iterator of mu, var (B, K, D) and pi (B, K). The reference is read at once, so that errors
        come before anything is written.
    """
    reference = Reference.load(cfg, need_labels=False)
    X, measured = reference.counts(model.encoder_genes, cfg.data, report=True)
    sample, names = reference.sample, reference.samples
    encoder, device = model.encoder, model.device
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


def encode_mixtures(model, known):
    """Mixtures of the reference's cell types, as a table of known proportions says.

    Args:
        known: readers.proportions.KnownProportions (R rows).

    Returns:
        Proportions of the R rows; and mu, var (R, K, D), the types' own moments, and pi (R, K).
    """
    decoder = model.decoder
    composition, source = reference_composition(model.encoder_metadata)
    proportions = mixtures(known, model.cell_types, composition, mean_library(decoder))
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
        encoded: mu, var (S, K, D) and pi (S, K) of the bulks, as :func:`encode_bulks` gives them;
            with states also the weights of the parts of each type's cloud (S, K, C).
        per_bulk: cells of each bulk. generator: torch Generator on their device.
        log_factor: (S, G) or (S, K, G), see :class:`Expression`. first: index of the
            first bulk. codes: types of the cells of each bulk in place of a draw (per_bulk); of
            bulks that yield one cell, the types of all of these cells.

    Yields:
        Cells, CHUNK at a time.
    """
    mu, var, pi, *weight = encoded
    if codes is None:
        cell_type = draw_types(pi, per_bulk, generator)  # (S * per_bulk)
    else:
        codes = codes.to(pi.device)
        cell_type = codes.repeat(len(pi))
        if len(codes) != per_bulk:  # of all bulks
            cell_type = codes[first : first + len(pi)]
    weight = weight[0] if weight else None
    for i in range(0, len(cell_type), CHUNK):
        k = cell_type[i : i + CHUNK]  # (B)
        bulk = torch.arange(i, i + len(k), device=k.device) // per_bulk  # (B)
        X, z = decode(decoder, mu[bulk, k], var[bulk, k], k, generator, log_factor, bulk, weight)
        yield Cells(X, z, k.cpu().numpy(), first + bulk.cpu().numpy())


def draw_types(pi, per_bulk, generator):
    """Draw k ~ Categorical(pi) for each cell: pi (S, K) -> codes (S * per_bulk)."""
    if len(pi) == 0 or per_bulk == 0:
        return torch.zeros(0, dtype=torch.long, device=pi.device)
    return torch.multinomial(pi, per_bulk, replacement=True, generator=generator).flatten()


def decode(decoder, mu, var, codes, generator, log_factor=None, sample=None, weight=None):
    """Draw one cell for each row: z of mean mu and variance var, library size, then counts.

    Args:
        mu, var: (B, D). codes: cell types (B). generator: torch Generator on their device.
        log_factor: (S, G) or (S, K, G), see :class:`Expression`, with sample: the bulk
            of each cell (B). weight: see :meth:`models.scDecoder.sample_latent`.

    Returns:
        ``(X, z)``: counts (B x G) CSR int32 and latents (B, D) float32.
    """
    z = decoder.sample_latent(mu, var, codes, generator, weight, sample)  # (B, D)
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


@dataclass
class CellSource:
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

    def parts(self):
        """Index of the first bulk, mu, var (S', K, D) and pi (S', K), and log_factor, by parts."""
        first = 0
        for encoded in self.encoded:
            rows = slice(first, first + len(encoded[2]))
            log_factor = None if self.expression is None else self.expression.part(rows).log_factor
            yield first, encoded, log_factor
            first = rows.stop

    @classmethod
    def of_samples(cls, samples):
        """Cells of BulkSamples, whose sums begin anew."""
        samples.sums[:] = 0
        parts = parts_of(len(samples.names))
        encoded = [[part[rows] for part in samples.encoded] for rows in parts]
        return cls(samples.names, encoded, samples.proportions, samples, samples.expression)
