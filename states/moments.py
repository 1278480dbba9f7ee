"""What the cells of each biological sample say of its types: moments of their posteriors, shrunk.

A reference of many samples has for each sample s and type k its own mean and variance of z. A few
cells tell little of them, so they are shrunk to the type's μ_k, σ_k² (empirical Bayes).

Notation in shape comments: N cells, S samples, K cell types, D latent dimensions.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class SampleMoments:
    """Moments of z of the cells of each sample and type, float64."""

    n_cells: np.ndarray
    """(S, K)."""
    mu: np.ndarray
    """(S, K, D)."""
    var: np.ndarray
    """(S, K, D), positive."""


def sample_moments(mean, var, codes, sample, shape):
    """Raw moments of each sample and type: the closed form that scGMVAE.fit_mixture uses of types.

        μ_ks = E[m],   σ_ks² = E[v] + Var[m]   over the cells of type k in sample s

    Args:
        mean, var: of the posteriors q(z|x) (N, D). codes, sample: type and sample of each cell (N).
        shape: ``(S, K)``.

    Returns:
        SampleMoments; zeros where a sample has no cell of a type.
    """
    (S, K), D = shape, mean.shape[1]
    group = np.asarray(sample) * K + np.asarray(codes)  # (N)
    mean, var = np.asarray(mean, np.float64), np.asarray(var, np.float64)
    n = np.bincount(group, minlength=S * K)

    def average(values):  # (N, D) -> (S K, D)
        total = np.zeros((S * K, D))
        np.add.at(total, group, values)
        return total / np.maximum(n, 1)[:, None]

    mu = average(mean)
    spread = average((mean - mu[group]) ** 2)  # in two passes: squares of means would cancel
    var = average(var) + spread
    return SampleMoments(n.reshape(S, K), mu.reshape(S, K, D), var.reshape(S, K, D))


def shrink_moments(raw, mu, var):
    """Shrink the moments of samples to their types' by how few cells there are, empirical Bayes.

        μ̃_ks = μ_k + B (μ_ks - μ_k),   B = τ_k² / (τ_k² + ω_k² / n_ks)
        σ̃_ks² = ω_ks² + (1 - B) (σ_k² - ω_k²),   ω_ks² shrunk to ω_k² by n_ks against ν_k

    with ω_k² the variance within samples and τ_k² the variance between them, by the moments of an
    analysis of variance (DerSimonian and Laird, Controlled Clinical Trials 1986), each latent
    dimension by itself. σ̃² is the variance of the next cell of this sample, which allows for the
    error of μ̃; it is σ_k² where a sample has no cell. ν_k, the weight of ω_k² in cells, is
    estimated from how much the ω_ks² differ beyond what n_ks cells explain.

    Args:
        raw: SampleMoments. mu, var: of the types (K, D).

    Returns:
        SampleMoments.
    """
    n = raw.n_cells[:, :, None].astype(np.float64)  # (S, K, 1)
    total = n.sum(axis=0)  # (K, 1)
    filled = (n > 0).sum(axis=0)  # (K, 1), samples with cells of the type
    within = (n * raw.var).sum(axis=0) / np.maximum(total - filled, 1)  # (K, D)
    within = np.where(total > filled, within, var)
    between = (n * (raw.mu - mu) ** 2).sum(axis=0) - (filled - 1) * within
    freedom = total - (n**2).sum(axis=0) / np.maximum(total, 1)
    tau2 = np.where(filled > 1, np.maximum(between, 0) / np.maximum(freedom, 1e-12), 0.0)  # (K, D)
    B = np.where(n > 0, tau2 / (tau2 + within / np.maximum(n, 1) + 1e-12), 0.0)  # (S, K, D)
    weight = prior_cells(raw, within)  # (K, 1)
    own = (n * raw.var + weight * within) / np.maximum(n + weight, 1e-12)  # (S, K, D)
    spread = np.maximum(var - within, 0)  # (K, D), what the samples' means add to σ_k²
    scale = var / (within + spread)  # 1, or a little less where samples do not differ
    return SampleMoments(raw.n_cells, mu + B * (raw.mu - mu), scale * (own + (1 - B) * spread))


def prior_cells(raw, within):
    """Cells that the variance within samples of a type counts for against a sample's own (K, 1).

        E[(ω_ks² / ω_k² - 1)²] = 2 / (n_ks - 1) + 2 / ν_k

    by moments, over the samples with two cells or more and all latent dimensions.
    """
    n = raw.n_cells[:, :, None].astype(np.float64)
    usable = n > 1
    ratio = np.where(usable, raw.var * n / np.maximum(n - 1, 1) / within - 1, 0.0)
    D = raw.var.shape[2]
    excess = (ratio**2).sum(axis=(0, 2)) - D * np.where(usable, 2 / np.maximum(n - 1, 1), 0).sum(
        axis=(0, 2)
    )
    n_ratios = D * usable.sum(axis=(0, 2))
    weight = 2 * n_ratios / np.maximum(excess, 1e-12)
    return np.clip(np.where(n_ratios > 0, weight, 1e6), 1, 1e6)[:, None]


def relative_to_batches(moments, batch, mu, var, training=None):
    """Moments of samples as if all were of one batch: what batches differ by is no state.

        μ'_ks = μ_k + μ_ks - μ_kb,   σ'_ks² = σ_k² σ_ks² / σ_kb²

    with μ_kb, σ_kb² the means over the samples of batch b, weighted by cells. A bulk of another
    platform is of no batch at all, and must not be answered with one of them.

    Args:
        moments: SampleMoments (S, K, D). batch: of each sample (S). mu, var: of the types (K, D).
        training: moments that the batches' means are of, default ``moments``; as many samples.

    Returns:
        SampleMoments; the types' own where a sample or its batch has no cell.
    """
    training = moments if training is None else training
    new_mu, new_var = (np.broadcast_to(v, moments.mu.shape).copy() for v in (mu, var))
    for b in np.unique(batch):
        rows = np.flatnonzero(batch == b)
        n = training.n_cells[rows][:, :, None].astype(np.float64)  # (S_b, K, 1)
        total = n.sum(axis=0)  # (K, 1)
        mean_mu = (n * training.mu[rows]).sum(axis=0) / np.maximum(total, 1)  # (K, D)
        mean_var = (n * training.var[rows]).sum(axis=0) / np.maximum(total, 1)
        there = (moments.n_cells[rows] > 0)[:, :, None] & (total > 0)  # (S_b, K, 1)
        moved = mu + moments.mu[rows] - mean_mu
        scaled = var * moments.var[rows] / np.where(total > 0, mean_var, 1)
        new_mu[rows] = np.where(there, moved, mu)
        new_var[rows] = np.where(there, scaled, var)
    return SampleMoments(moments.n_cells, new_mu, new_var)


def describe_samples(names, moments):
    """The training samples as a model's file keeps them: names and tensors, none without cells.

    names: (S). moments: SampleMoments, shrunk.
    """
    used = np.flatnonzero(moments.n_cells.sum(axis=1))
    tensors = {
        name: torch.from_numpy(np.asarray(getattr(moments, name))[used].astype(np.float32))
        for name in ("n_cells", "mu", "var")
    }
    return {"names": [names[i] for i in used], **tensors}


def read_samples_metadata(metadata):
    """Names (S) and shrunk SampleMoments of the ``samples`` of a file; see describe_samples."""
    parts = (metadata[name].double().numpy() for name in ("n_cells", "mu", "var"))
    return metadata["names"], SampleMoments(*parts)


def mix_moments(share, moments):
    """Moments of mixtures of samples: of the cells that bulks were drawn from.

        μ = Σ_s w_s μ_s,   σ² = Σ_s w_s (σ_s² + (μ_s - μ)²)

    Args:
        share: of each sample among the cells of a type (B, S, K), summing to 1 over samples.
        moments: SampleMoments.

    Returns:
        mu, var: (B, K, D).
    """
    mu = np.einsum("bsk,skd->bkd", share, moments.mu)
    square = np.einsum("bsk,skd->bkd", share, moments.var + moments.mu**2)
    return mu, np.maximum(square - mu**2, 1e-8)
