"""Dampened weighted least squares (DWLS: Tsoucas et al., Nature Communications 2019).

A bulk is fitted by the mean counts of the cell types in a signature: the genes that rise most from
all other types to one. The answer for a bulk sample is a weighted mean of the Bulk Encoder's and of
this one (:func:`deconvolution.encode.encode_samples`): they read other genes by other weights, so
that their errors partly cancel. benchmarks/estimators/dwls.py measures DWLS by itself.

Notation in shape comments: S bulks, N cells, G genes, M genes of a signature, K cell types.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pandas as pd
import scipy.linalg
import scipy.optimize
import scipy.stats
import torch

from counts.genes import PROTOCOL_GENES
from data import log_normalise, sum_by_type
from runtime.progress import progress

MOST_PER_TYPE = 200  # genes of a signature

# ------------------------------------------------------------------------------- the signature


def differential_expression(X, codes, n_types):
    """Each type against all other cells: log2 fold changes and adjusted p, both (K, G).

    Fold changes are of mean counts per 10,000, with 0.1 added to both. p is Welch's, of
    log-normalised expression, adjusted over genes by Benjamini and Hochberg; 1 for a type of fewer
    than two cells.
    """
    log, n = log_normalise(X), np.bincount(codes, minlength=n_types)[:, None]
    parts = (lambda X: X, lambda X: X.power(2), np.expm1)  # expm1: counts per 10,000
    sums = [sum_by_type(log, codes, n_types, part) for part in parts]  # each (K, G)
    inside = [part / np.maximum(n, 1) for part in sums]
    outside = [(part.sum(axis=0) - part) / np.maximum(len(codes) - n, 1) for part in sums]
    change = np.log2((inside[2] + 0.1) / (outside[2] + 0.1))
    p = np.ones_like(change)
    for k in np.flatnonzero((n[:, 0] > 1) & (len(codes) - n[:, 0] > 1)):
        sd = [np.sqrt(np.maximum(part[1] - part[0] ** 2, 0)[k]) for part in (inside, outside)]
        with np.errstate(invalid="ignore", divide="ignore"):  # a gene without counts
            test = scipy.stats.ttest_ind_from_stats(
                *(inside[0][k], sd[0], n[k, 0], outside[0][k], sd[1], len(codes) - n[k, 0]),
                equal_var=False,
            )
        p[k] = scipy.stats.false_discovery_control(np.nan_to_num(test.pvalue, nan=1.0))
    return change, p


def significant_change(log2_change, p_adjusted, max_p=0.01, min_change=0.5):
    """log2 fold changes (K, G), -inf where a gene does not rise enough, or not significantly."""
    passed = (p_adjusted < max_p) & (log2_change > min_change)
    return np.where(passed, log2_change, -np.inf)


def rank_genes(change, most=MOST_PER_TYPE):
    """For each type the genes that rise, largest change first: K arrays of indices.

    change: of :func:`significant_change` (K, G).
    """
    order = np.argsort(-change, axis=1, kind="stable")[:, :most]
    return [genes[np.isfinite(own[genes])] for genes, own in zip(order, change, strict=True)]


def choose_signature(mean, change, fewest=50, most=MOST_PER_TYPE):
    """Genes of a signature: those that rise most in each type, as indices (M).

    The top n of each type, n from 50 to 200, is the one that gives the signature the lowest
    condition number (CIBERSORT: Newman et al., Nature Methods 2015; DWLS). Without any gene that
    rises, all genes.

    Args:
        mean: mean counts (K, G). change: of :func:`significant_change` (K, G).
    """
    ranked = rank_genes(change, most)
    candidates = [
        np.unique(np.concatenate([genes[:n] for genes in ranked])) for n in range(fewest, most + 1)
    ]
    usable = [genes for genes in candidates if len(genes) >= len(ranked)]
    if not usable:
        return np.arange(mean.shape[1])
    condition = [np.linalg.cond(mean[:, genes]) for genes in usable]
    return usable[int(np.argmin(condition))]


# ------------------------------------------------------------------------------ least squares


def to_proportions(weights):
    """Weights (S, K) or (K), none negative, scaled to sum to 1; uniform where all are 0."""
    total = weights.sum(axis=-1, keepdims=True)
    return np.where(total > 0, weights / np.where(total > 0, total, 1), 1 / weights.shape[-1])


def solve_nonnegative(gram, target):
    """argmin_x x' gram x - 2 x' target over x ≥ 0, with gram (K, K) and target (K)."""
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))  # so that no type's size decides
    gram = gram / np.outer(scale, scale) + 1e-10 * np.eye(len(gram))
    L = np.linalg.cholesky(gram)
    right = scipy.linalg.solve_triangular(L, target / scale, lower=True)
    return scipy.optimize.nnls(L.T, right)[0] / scale


def solve_all_nonnegative(gram, target, free):
    """:func:`solve_nonnegative` of B problems at once, with gram (B, K, K) and target (B, K).

    free: which x are above 0 (B, K), a guess; where it is wrong, problems are solved one by one.
    """
    scale = np.sqrt(np.maximum(np.einsum("bkk->bk", gram), 1e-300))
    scaled = gram / (scale[:, :, None] * scale[:, None]) + 1e-10 * np.eye(target.shape[1])
    inside = np.where(free[:, :, None] & free[:, None], scaled, np.eye(target.shape[1]))
    x = np.linalg.solve(inside, np.where(free, target / scale, 0)[:, :, None])[:, :, 0]
    slope = target / scale - (scaled @ x[:, :, None])[:, :, 0]
    x = x / scale
    for i in np.flatnonzero(((x < 0) | (~free & (slope > 0))).any(axis=1)):
        x[i] = solve_nonnegative(gram[i], target[i])
    return x


def dampened_weights(fitted, j):
    """DWLS's weights of genes (..., M): 1 / fitted², over their minimum, none above 2^j."""
    weights = 1 / np.maximum(fitted, 1e-100 * fitted.max(axis=-1, keepdims=True)) ** 2
    return np.minimum(weights / weights.min(axis=-1, keepdims=True), 2.0**j)


def choose_dampening(S, b, start, rng, n_subsets=100):
    """The exponent j of :func:`dampened_weights` that DWLS finds by cross-validation.

    For each j, weighted least squares without constraint on random halves of the genes; the j with
    the least variance of the solution, summed over types, wins. Sums over genes are made once, of
    those whose weights lie between two powers of 2.

    Args:
        S: signature (M, K). b: bulk (M). start: weights of the types (K), which give the fit.
    """
    fitted, K = S @ start, S.shape[1]
    largest = (fitted.max() / fitted[fitted > 0].min()) ** 2
    caps = 2.0 ** np.arange(max(int(np.ceil(np.log2(largest))), 1))  # (J)
    subsets = rng.random((n_subsets, len(S))).argsort(axis=1) < len(S) // 2  # (100, M)
    weights = dampened_weights(fitted, np.inf)
    order = np.argsort(weights)
    weights, subsets = weights[order], subsets[:, order].astype(float)
    products = (S[order, :, None] * np.column_stack([S, b])[order, None]).reshape(len(S), -1)
    products = np.hstack([products * weights[:, None], products])  # (M, 2 K (K + 1))
    ends = np.searchsorted(weights, caps, side="right")
    parts = zip((0, *ends), (*ends, len(S)), strict=True)
    sums = [subsets[:, first:last] @ products[first:last] for first, last in parts]
    below, above = zip(*(np.split(part, 2, axis=1) for part in sums), strict=True)
    below = list(accumulate(below))[:-1]  # (J) of (100, K (K + 1))
    above = list(accumulate(above[:0:-1]))[::-1]  # from the smallest genes on, lest they get lost
    sums = np.stack([b + cap * a for b, cap, a in zip(below, caps, above, strict=True)])
    sums = sums.reshape(len(caps), n_subsets, K, K + 1)
    gram, target = sums[..., :K], sums[..., K:]
    trace = np.trace(gram, axis1=2, axis2=3)[..., None, None]
    solution = np.linalg.solve(gram + 1e-10 * trace * np.eye(K), target)[..., 0]  # (J, 100, K)
    solution *= start.sum() / solution.sum(axis=2, keepdims=True)
    return int(np.argmin(solution.var(axis=1, ddof=1).mean(axis=1)))


def dwls(bulk, S, seed=0):
    """Proportions of cells (B, K) by dampened weighted least squares.

        min_x Σ_g w_g (b_g - (S x)_g)²,   x ≥ 0,   w_g = min(1 / (S x)_g² / its minimum, 2^j)

    Weights follow x from the unweighted solution on, in steps of a fifth, until x changes by less
    than 0.01. Bulks are scaled to 1,000 cells at first, as their own scale would set what 0.01
    means.

    Args:
        bulk: counts in the genes of the signature (B, M), any scale. S: mean counts of the types
            in them (M, K), at the natural depth of the cells, so that x are numbers of cells.
        seed: of :func:`choose_dampening`.
    """
    b = bulk / np.maximum(bulk.sum(axis=1, keepdims=True), 1e-300)  # on any scale, no overflow
    gram = np.broadcast_to(S.T @ S, (len(b), S.shape[1], S.shape[1]))
    x = solve_all_nonnegative(gram, b @ S, np.ones((len(b), S.shape[1]), bool))
    left = np.flatnonzero(x.sum(axis=1) > 0)  # bulks without any of these genes have no answer
    scale = 1000 / x[left].sum(axis=1, keepdims=True)
    b, x[left] = b[left] * scale, x[left] * scale

    def choose(n):
        return choose_dampening(S, b[n], x[left[n]], np.random.default_rng([seed, left[n]]))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        chosen = pool.map(choose, range(len(left)))
        j = list(progress(chosen, "dampened least squares", "sample", len(left)))
    j = np.array(j, float).reshape(-1, 1)
    products = (S[:, :, None] * S[:, None]).reshape(len(S), -1)  # (M, K * K)
    free = x[left] > 0
    for _ in range(1000):
        w = dampened_weights(x[left] @ S.T, j)  # (B, M)
        gram = (w @ products).reshape(len(w), *gram.shape[1:])
        found = solve_all_nonnegative(gram, (w * b) @ S, free)
        step = (found - x[left]) / 5
        x[left] += step
        moving = np.abs(step).sum(axis=1) >= 0.01
        left, b, j, free = left[moving], b[moving], j[moving], found[moving] > 0
        if not len(left):
            break
    return to_proportions(x)


# ----------------------------------------------------------------------- of the Bulk Encoder


@dataclass
class Signature:
    """What the weights of the Bulk Encoder hold for :func:`dwls`."""

    genes: list[str]
    """Names of the candidates (M): up to 200 of each type."""
    mean: torch.Tensor
    """Mean counts of the cells of each type in them (K, M)."""
    change: torch.Tensor
    """log2 fold change of each type against all other cells, -inf if not significant (K, M)."""

    def proportions(self, bulk, genes, measured):
        """Proportions of cells in bulks (S, K); None if they lack the genes for it.

        Args:
            bulk: counts (S, G), dense. genes: their names (G). measured: mask (G).
        """
        index = pd.Index(genes).get_indexer(self.genes)
        found = np.flatnonzero((index >= 0) & measured[index])
        mean, change = (part.numpy().astype(np.float64) for part in (self.mean, self.change))
        types = np.flatnonzero(np.isfinite(change[:, found]).any(axis=1))
        if len(types) < len(mean) or len(found) < 2 * len(mean):
            return None
        found = found[choose_signature(mean[:, found], change[:, found])]
        return dwls(bulk[:, index[found]], mean[:, found].T)


def make_signature(mean, X, codes, genes, several_batches):
    """Signature of training cells.

    Args:
        mean: mean counts of the types (K, G). X: counts of the cells (N x G), CSR. codes: their
            types (N). genes: symbols (G). several_batches: whether cells are of several; then
            PROTOCOL_GENES, which differ between batches as types do, are left out.
    """
    change = significant_change(*differential_expression(X, codes, len(mean)))  # (K, G)
    if several_batches:
        change[:, [bool(PROTOCOL_GENES.fullmatch(str(name))) for name in genes]] = -np.inf
    kept = np.unique(np.concatenate(rank_genes(change)))
    return Signature(
        [str(genes[g]) for g in kept],
        torch.from_numpy(mean[:, kept]).float(),
        torch.from_numpy(change[:, kept]).float(),
    )
