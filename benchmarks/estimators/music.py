"""MuSiC: weighted non-negative least squares, with all genes and without PROTOCOL_GENES."""

import numpy as np

from deconvolution.dwls import solve_nonnegative, to_proportions
from deconvolution.estimators import Estimator


def music_weights(residual, x, size, variance):
    """MuSiC's weights of genes (M): 1 / (0.0001 + residual² + Σ_k (x_k size_k)² variance_kg).

    residual (M); x, size (K); variance (K, M).
    """
    return 1 / (1e-4 + residual**2 + (x * size) ** 2 @ variance)


def music(bulk, statistics):
    """Weighted non-negative least squares (MuSiC: Wang et al., Nature Communications 2019).

        100 b_g / Σ_g b_g  ≈  Σ_k x_k size_k θ_kg,   weights as of :func:`music_weights`

    with θ the mean and the weights' variance that of each gene's share of the counts over the
    subjects of the statistics. It is made for several; of a single one, its cells stand for them.
    Weights follow x, and the residual of the weighted problem, until proportions change by less
    than 0.01. Genes without counts in a bulk are left out, as the package does.
    """
    size, weights = statistics.size, []
    for b in bulk.astype(float):
        found = b > 0
        y, variance = 100 * b[found] / b.sum(), statistics.variance[:, found]
        D = (statistics.abundance[:, found] * size[:, None]).T  # (M, K)
        x = solve_nonnegative(D.T @ D, D.T @ y)
        residual, before = y - D @ x, None
        for _ in range(1000):
            w = music_weights(residual, x, size, variance)
            x = solve_nonnegative(D.T @ (w[:, None] * D), D.T @ (w * y))
            residual = np.sqrt(w) * (y - D @ x)
            p = to_proportions(x)
            if before is not None and np.abs(p - before).sum() < 0.01:
                break
            before = p
        weights.append(x)
    return to_proportions(np.array(weights))


def music_without_protocol(bulk, statistics):
    """:func:`music` without PROTOCOL_GENES, or with them if there are no others."""
    genes = np.flatnonzero(~statistics.is_protocol)
    if len(genes) == 0:
        return music(bulk, statistics)
    return music(bulk[:, genes], statistics.select(np.arange(len(statistics.size)), genes))


PAPER = "Wang et al., Nature Communications 2019"
ESTIMATORS = [
    Estimator("MuSiC", PAPER, lambda bulk, statistics, seed: music(bulk, statistics)),
    Estimator(
        "MuSiC, no ribosomal/mitochondrial",
        PAPER,
        lambda bulk, statistics, seed: music_without_protocol(bulk, statistics),
    ),
]
