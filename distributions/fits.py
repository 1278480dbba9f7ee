"""Means and dispersions of genes, as fitted to the counts of cells.

Notation in shape comments: n cells of one type, N cells, G genes, K cell types.
"""

import math

import numpy as np
import scipy.sparse as sp
import torch
from scipy.special import gammaln

from data import sum_by_type

MAX_IN_DISPERSION = 5_000  # cells of a type that its dispersions are fitted to
MAX_SPIKES = 5  # in a cell; with more it is taken for another kind of cell


def mean_profile(X, rows=None):
    """Expression profile (G) of cells together: positive, sums to 1.

    Half a count is added to each gene, so that genes without counts keep a finite logarithm.

    Args:
        X: counts (N x G), CSR or backed. rows: the cells; all if None.
    """
    rows = np.arange(X.shape[0]) if rows is None else rows
    total = torch.from_numpy(sum_by_type(X, np.zeros(len(rows), int), 1, rows=rows)[0]) + 0.5
    return (total / total.sum()).float()


def best_theta(log_likelihood, low=1e-3, high=1e3, n=40):
    """θ of each gene at which ``log_likelihood(θ)`` (G) is highest: (G).

    On a grid of n logarithms, then at the vertex of the parabola through the best point and its
    neighbours.
    """
    grid = np.linspace(np.log(low), np.log(high), n)
    values = np.nan_to_num(np.stack([log_likelihood(np.exp(t)) for t in grid]), nan=-np.inf)
    best = values.argmax(axis=0).clip(1, len(grid) - 2)
    left, middle, right = (np.take_along_axis(values, (best + i)[None], 0)[0] for i in (-1, 0, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        offset = 0.5 * (right - left) / (2 * middle - left - right)
    offset = np.nan_to_num(offset).clip(-1, 1)
    return np.exp(grid[best] + offset * (grid[1] - grid[0]))


def fit_dispersion(X, library):
    """Dispersion φ = 1/θ of each gene (G) over cells of one type, by maximum likelihood.

        x_ig ~ NB(l_i q_g, 1/φ_g),   q_g = (Σ_i x_ig + ½) / Σ_i l_i

    Cells without a count enter through the means of 32 groups of similar library size.

    Args:
        X: counts (n x G), CSR. library: their totals (n) float64.

    Returns:
        float64, 1e-3 to 30.
    """
    q = (np.asarray(X.sum(axis=0), np.float64).ravel() + 0.5) / library.sum()  # (G)
    X = X.tocoo()
    mean = library[X.row] * q[X.col]  # of the counts that are not zero
    groups = np.array_split(np.sort(library), min(32, len(library)))
    size = np.array([len(group) for group in groups])
    expected = np.array([group.mean() for group in groups])[:, None] * q  # (groups, G)

    def log_likelihood(theta):
        of_counts = gammaln(X.data + theta) - gammaln(theta) - X.data * np.log(theta + mean)
        at_zero = -theta * (size @ np.log1p(expected / theta))
        return at_zero + np.bincount(X.col, of_counts, minlength=X.shape[1])

    return 1 / best_theta(log_likelihood, 1 / 30, 1e3, n=24)


def find_spikes(X, library):
    """Counts far above all others of their gene in a cell type: errors, or a single odd cell.

        x_ig > μ_ig + 10 (1 + sd_ig),   μ_ig = l_i q_g,   sd² = μ + φ_g μ²

    with φ by maximum likelihood, which a single count hardly moves. pbmc3k has nearly one in each
    cell, other data sets one in a hundred cells. A cell with more than MAX_SPIKES of them is
    taken for another kind of cell, and keeps its counts.

    Args:
        X: counts of one type (n x G), CSR. library: their totals (n) float64.

    Returns:
        ``(spikes, share)``: by how much they exceed their rounded expectation (n x G), CSR; and the
        share of each gene's counts that remains without this excess (G).
    """
    dispersion = fit_dispersion(X, library)
    total = np.asarray(X.sum(axis=0), np.float64).ravel()  # (G)
    X = X.tocoo()
    mean = library[X.row] * (total / library.sum())[X.col]
    spread = np.sqrt(mean + dispersion[X.col] * mean**2)
    far = X.data > mean + 10 * (1 + spread)
    far &= (np.bincount(X.row[far], minlength=X.shape[0]) <= MAX_SPIKES)[X.row]
    above = X.data[far] - np.round(mean[far]).astype(X.data.dtype)
    spikes = sp.csr_matrix((above, (X.row[far], X.col[far])), X.shape)
    lost = np.asarray(spikes.sum(axis=0), np.float64).ravel()
    return spikes, 1 - lost / np.maximum(total, 1)


def moments_of_counts(X, codes, library, n_types, seed):
    """Sums and second moments of the counts of each type, without spikes.

    Args:
        X: counts (N x G), CSR or backed. codes: their types (N). library: their totals (N) float64.
            seed: of MAX_IN_DISPERSION cells of larger types, which stand for all.

    Returns:
        ``(totals, moments, n_spikes)``: Σ x and E[x² - x] / E[l²], (K, G) float64 each, and the
        number of spikes.
    """
    rng, n_spikes = np.random.default_rng(seed), 0
    totals = sum_by_type(X, codes, n_types)
    moments = np.zeros_like(totals)
    for k in np.unique(codes):
        rows = np.flatnonzero(codes == k)
        if len(rows) > MAX_IN_DISPERSION:
            rows = np.sort(rng.choice(rows, MAX_IN_DISPERSION, replace=False))
        counts = X[rows]
        spikes, share = find_spikes(counts, library[rows])
        counts = (counts - spikes).astype(np.float64)
        pairs = np.asarray((counts.multiply(counts) - counts).sum(axis=0)).ravel()  # (G)
        moments[k] = pairs / (library[rows] ** 2).sum()
        totals[k] *= share
        n_spikes += spikes.nnz
    return totals, moments, n_spikes


def shrink_means(totals):
    """Counts of genes in types (K, G) as they are expected in other cells: empirical Bayes.

        m_kg ~ Gamma(α_g, mean m_g),   E[m_kg | x_kg] = (x_kg + α_g) / (n_k + α_g / m_g)

    with x_kg the counts, n_k their sum over genes, m_g the share of a gene in all counts, and α_g
    from how much more the types differ than counting explains. A gene that no cell of a rare type
    showed is not one that the type lacks, the less so the more alike the types are in it.

    Returns:
        (K, G), n_k times these expectations, rescaled to sum to n_k.
    """
    x = totals.double()
    n = x.sum(dim=1, keepdim=True)  # (K, 1)
    m = (x.sum(dim=0) / n.sum()).clamp(min=1e-12)  # (G)
    excess = ((x - n * m) ** 2 - n * m).sum(dim=0) / ((n * m) ** 2).sum(dim=0)  # 1 / α_g
    alpha = 1 / excess.clamp(0.01, 20)
    mean = (x + alpha) / (n + alpha / m)
    return mean / mean.sum(dim=1, keepdim=True) * n


def fit_log_factor(total, expected):
    """ln of what brings the expected counts of genes in a type (G) to those of its cells.

        ln f_g = ln( (Σ_i x_ig + ½) / (Σ_i l_i E[p_g] + ½) ),   f_g from 1/10 to 10

    Args:
        total: Σ_i x_ig over the type's cells (G). expected: Σ_i l_i E[p_g] with library sizes l and
            the fractions p of cells that are drawn (G).
    """
    return ((total + 0.5) / (expected + 0.5)).log().clamp(-math.log(10), math.log(10))


def fit_log_theta(ratio, total, theta):
    """ln θ of the genes in a type (G): between its cells' moments and the dispersion of all types.

        1/θ_kg = w · max(0, r_g - 1) + (1 - w) / θ_g,   w = Σ_i x_ig / (Σ_i x_ig + 200)

    Args:
        ratio: r, E_i[x² - x] / (E_i[l²] E[p_g²]) (G). total: Σ_i x_ig over the type's cells (G).
            theta: θ_g of all types (G).
    """
    weight = total / (total + 200)
    inverse = weight * (ratio - 1).clamp(min=0) + (1 - weight) / theta
    return -inverse.clamp(1e-4, 1e4).log()
