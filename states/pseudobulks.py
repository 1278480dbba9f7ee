"""Pseudobulks that the Bulk Encoder trains on: sums of cells of known types and samples.

Notation in shape comments: N cells, B bulks of a batch, G genes, K cell types, S samples.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch

from counts.pseudobulks import draw_pseudobulks
from data import mean_counts

# Fewest and most cells of each type that a training bulk draws its cells from. Small pools make a
# type differ from bulk to bulk, as it will in cells that training never saw.
POOL = 3, 20
LOST = 0.1  # largest share of genes that another platform misses altogether


def draw_proportions(n, present, reference, rng):
    """Expected cell-type proportions (n x K) of training bulks, from sparse to even.

    A third each: Dirichlet(1), which covers the simplex evenly; Dirichlet(0.3), a few types
    dominate; and Dirichlet around the reference's own composition.

    Args:
        n: number of bulks. present: mask of the types that have cells (K). reference: their
            proportions in the reference (K).
    """
    K = len(present)
    alphas = np.stack([np.ones(K), np.full(K, 0.3), 10 * reference + 0.1])[:, present]
    proportions = np.zeros((n, K))
    for i, kind in enumerate(rng.integers(3, size=n)):
        proportions[i, present] = rng.dirichlet(alphas[kind])
    return proportions


def log_uniform(low, high, size, rng):
    """Numbers drawn evenly on a log scale."""
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


@dataclass
class BulkCells:
    """Cells that pseudobulks are drawn from, and what the encoder is to answer for each sample."""

    X: sp.csr_matrix
    """Counts (N x G), float32."""
    codes: np.ndarray
    """Cell types (N)."""
    n_types: int
    sample: np.ndarray | None = None
    """Biological samples (N); None if the reference is of one."""
    mixed: bool = True
    """Whether half of the bulks are mixtures of two samples."""
    batch: np.ndarray | None = None
    """Dataset or protocol of each cell (N); None if the reference is of one."""

    def take(self, rows):
        """The same with some of the cells."""
        sample, batch = (None if v is None else v[rows] for v in (self.sample, self.batch))
        X, codes = self.X[rows], self.codes[rows]
        return dataclasses.replace(self, X=X, codes=codes, sample=sample, batch=batch)


@dataclass
class Pseudobulks:
    """Pseudobulks and what the encoder should say of them."""

    counts: np.ndarray
    """(B, G) float32."""
    pi: np.ndarray
    """Proportions of the cells in them (B, K) float32."""

    def target(self, model, part=slice(None)):
        """mu, var and pi of these bulks or a part of them, as tensors where the model is."""
        return model.mu, model.var, torch.from_numpy(self.pi[part]).to(model.mu.device)


def draw_samples(cells, n, rng):
    """Share of each biological sample in each of n bulks (n x S): one sample, or two of them."""
    S = cells.sample.max() + 1
    filled = np.unique(cells.sample)  # samples that have cells here
    share = np.zeros((n, S))
    for i in range(n):
        pair = rng.permutation(filled)[:2]
        part = rng.random() if cells.mixed and len(pair) > 1 and rng.random() < 0.5 else 1.0
        share[i, pair[0]] = part
        if part < 1:
            share[i, pair[1]] = 1 - part
    return share


def draw_from_samples(cells, share, n_cells, pool, rng):
    """Sum cells of the samples of each bulk; each sample has a composition of its own.

    Args:
        cells: BulkCells. share: of the samples (B x S). n_cells, pool: as
            :func:`draw_pseudobulks` takes them (B).

    Returns:
        bulk (B, G) and the proportions of its cells (B, K).
    """
    (B, S), K = share.shape, cells.n_types
    group = cells.sample * K + cells.codes
    reference = np.bincount(group, minlength=S * K).reshape(S, K)
    proportions = np.zeros((B, S, K))
    for i, s in zip(*np.nonzero(share), strict=True):
        present = reference[s] > 0
        proportions[i, s] = share[i, s] * draw_proportions(
            1, present, reference[s] / reference[s].sum(), rng
        )
    proportions /= proportions.sum(axis=(1, 2), keepdims=True)
    bulk, drawn = draw_pseudobulks(
        cells.X, group, proportions.reshape(B, S * K), n_cells, rng, pool
    )
    return bulk, drawn.reshape(B, S, K).sum(axis=1)


def simulate_bulks(cells, cfg, rng, clean=False):
    """Draw a batch of bulks: composition, cells, platform factor and sequencing depth all vary.

    Args:
        cells: BulkCells. clean: no small pools of cells and no platform factors, as held-out bulks
            are drawn.

    Returns:
        Pseudobulks.
    """
    B, K = cfg.batch_size, cells.n_types
    if cells.sample is None:
        reference = np.bincount(cells.codes, minlength=K) / len(cells.codes)
        proportions = draw_proportions(B, reference > 0, reference, rng)
    else:
        share = draw_samples(cells, B, rng)
    n_cells = log_uniform(cfg.min_cells, cfg.max_cells, B, rng).astype(int)
    pool = log_uniform(*POOL, B, rng).astype(int)
    pool = None if clean else pool
    if cells.sample is None:
        bulk, pi = draw_pseudobulks(cells.X, cells.codes, proportions, n_cells, rng, pool)
    else:
        bulk, pi = draw_from_samples(cells, share, n_cells, pool, rng)
    if not clean:
        sd = rng.uniform(0, cfg.noise, (B, 1))
        bulk = bulk * np.exp(sd * rng.standard_normal(bulk.shape))
        bulk *= rng.random(bulk.shape) >= rng.uniform(0, LOST, (B, 1))
    bulk += 1e-9  # so that a bulk without any expressed gene of the model becomes a flat one
    depth = log_uniform(3e4, 3e6, (B, 1), rng)
    counts = rng.poisson(bulk / bulk.sum(axis=1, keepdims=True, dtype=np.float64) * depth)
    return Pseudobulks(counts.astype(np.float32), pi)


def concatenate(batches):
    """Pseudobulks of many."""
    parts = zip(*(dataclasses.astuple(b) for b in batches), strict=True)
    return Pseudobulks(*(np.concatenate(part) for part in parts))


def combine_batches(means):
    """Mean counts of the types over batches, each of its own depth and with types missing.

        S_kg = e^{a_k} · mean over batches b of m_bkg / t_bk,   ln t_bk ≈ a_k + d_b

    with t the totals of m, a the mRNA content of types and d the depth of batches by least squares.
    In S each batch weighs the same, however deep it is.

    Args:
        means: mean counts of each batch (K, G), rows of zeros where it lacks a type.

    Returns:
        (K, G) float64; rows of zeros for types that no batch has.
    """
    means = np.stack(means).astype(np.float64)  # (B, K, G)
    total = means.sum(axis=2)  # (B, K)
    there = total > 0
    log_total = np.where(there, np.log(np.where(there, total, 1)), 0)
    depth = np.zeros(len(means))
    for _ in range(100):  # backfitting: with types missing there is no closed form
        content = np.where(there, log_total - depth[:, None], 0).sum(axis=0)
        content = content / np.maximum(there.sum(axis=0), 1)  # (K)
        depth = np.where(there, log_total - content, 0).sum(axis=1) / there.sum(axis=1)
    profiles = means / np.where(there, total, 1)[:, :, None]
    mean = profiles.sum(axis=0) / np.maximum(there.sum(axis=0), 1)[:, None]  # (K, G)
    return mean * np.exp(content)[:, None] * there.any(axis=0)[:, None]


def mean_of_types(cells):
    """Mean counts of the cells of each type (K, G): of batches, as :func:`combine_batches`."""
    if cells.batch is None:
        return mean_counts(cells.X, cells.codes, cells.n_types)
    return combine_batches([mean for _, mean in means_of_batches(cells)])


def means_of_batches(cells):
    """list of (rows, mean counts (K, G)) of each batch of BulkCells that has cells."""
    parts = (np.flatnonzero(cells.batch == b) for b in np.unique(cells.batch))
    return [(rows, mean_counts(cells.X[rows], cells.codes[rows], cells.n_types)) for rows in parts]


def split_folds(codes, n_folds, rng):
    """Fold of each cell (N): every type is spread evenly over the folds."""
    fold = np.zeros(len(codes), int)
    for k in np.unique(codes):
        in_type = rng.permutation(np.flatnonzero(codes == k))
        fold[in_type] = (np.arange(len(in_type)) + rng.integers(n_folds)) % n_folds
    return fold


@dataclass
class Fold:
    """Cells that training bulks are drawn from, and the means they are deconvolved with."""

    cells: BulkCells
    means: torch.Tensor
    """(K, G) on the model's device."""
    other_batches: bool = False
    """Whether these are the means of other batches rather than of other cells of this one."""


def make_folds(cells, model, signature, n_folds, rng):
    """Folds of the training cells, each with the mean counts of cells that are not in it.

    Without batches a fold is a part of the cells, and the means are those of all others. With
    batches there are two of each: all its cells, with the means of the other batches, which differ
    as a foreign bulk will; and a part of its cells, with the means of its others.

    Args:
        cells: BulkCells (N). signature: mean counts of all of them (K x G).

    Returns:
        list of Fold.
    """
    if cells.batch is None:
        return split_cells_into_folds(cells, model, signature, n_folds, rng)
    folds, batches = [], means_of_batches(cells)
    for i, (rows, own) in enumerate(batches):
        of_batch = cells.take(rows)
        others = combine_batches([mean for j, (_, mean) in enumerate(batches) if j != i])
        means = fill_missing(others, signature)
        means = scale_to_content(means, own)
        folds.append(Fold(of_batch, to_signature(means, model), other_batches=True))
        own = fill_missing(own, signature)
        folds.append(split_cells_into_folds(of_batch, model, own, n_folds, rng)[0])
    return folds


def split_cells_into_folds(cells, model, signature, n_folds, rng):
    """Folds that are parts of the cells; arguments as for :func:`make_folds`."""
    fold = split_folds(cells.codes, n_folds, rng)
    folds = []
    for i in range(n_folds):
        inside, outside = fold == i, (fold != i) | (n_folds == 1)
        rest = np.flatnonzero(outside)
        means = mean_counts(cells.X[rest], cells.codes[rest], len(signature))
        lost = means.sum(axis=1) == 0
        means[lost] = signature[lost]  # a type whose only cell is in this fold
        if inside.any():
            folds.append(Fold(cells.take(np.flatnonzero(inside)), to_signature(means, model)))
    return folds


def to_signature(means, model):
    """Mean counts (K, G) as a tensor on the scale and device of the model's signature."""
    return model.scale_signature(torch.from_numpy(means).float()).to(model.mu.device)


def fill_missing(means, signature):
    """means (K, G), its types without counts taken from the signature (K, G), to its depth."""
    there = means.sum(axis=1) > 0
    depth = means[there].sum() / signature[there].sum()
    return np.where(there[:, None], means, depth * signature)


def scale_to_content(means, own):
    """means (K, G) with the totals of a batch's own types (K, G); a mean factor for those it lacks.

    Weights of genes cannot learn how much mRNA the types of a batch hold, only distort for it.
    """
    there = own.sum(axis=1) > 0
    ratio = own.sum(axis=1)[there] / means.sum(axis=1)[there]
    factor = np.full(len(means), np.exp(np.log(ratio).mean()))
    factor[there] = ratio
    return means * factor[:, None]
