"""What estimates proportions from bulks and training cells: one interface for all estimators.

An :class:`Estimator` is a function with the name and the paper that tables show. Proportions are of
cells, as the truth is. An estimator that its paper has for fractions of RNA divides by the mean
library size of each type, and its docstring says so.

Notation in shape comments: S bulks, N cells, G genes, K cell types.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse as sp

from counts.genes import PROTOCOL_GENES
from data import library_size, mean_counts, sum_by_type
from deconvolution.dwls import differential_expression, significant_change, to_proportions


class Estimator(NamedTuple):
    """Proportions (S, K) of bulks (S, G), counts, by ``estimate(bulk, statistics, seed)``."""

    name: str
    paper: str
    estimate: Callable


@dataclass
class TypeStatistics:
    """What estimators know of the training cells: K types, G genes."""

    mean: np.ndarray
    """Mean counts of the cells of each type (K, G)."""
    size: np.ndarray
    """Mean library size of each type over all genes (K), which stands for its content of mRNA."""
    abundance: np.ndarray
    """Mean over subjects of each gene's share of the counts (K, G)."""
    variance: np.ndarray
    """Variance over subjects of that share (K, G)."""
    change: np.ndarray
    """log2 fold change of each type against all other cells, -inf if not significant (K, G)."""
    is_protocol: np.ndarray
    """Mask of PROTOCOL_GENES (G)."""

    def select(self, types, genes):
        """The statistics of some types and genes, both indices."""
        names = ("mean", "abundance", "variance", "change")
        parts = {name: getattr(self, name)[np.ix_(types, genes)] for name in names}
        return TypeStatistics(size=self.size[types], is_protocol=self.is_protocol[genes], **parts)


def type_statistics(X, codes, n_types, genes, sample=None):
    """Moments of training cells and differential expression between their types.

    Args:
        X: counts (N x G), CSR. codes: cell types (N). n_types: K. genes: symbols (G).
        sample: biological sample of each cell (N), if there are several.
    """
    mean = mean_counts(X, codes, n_types)
    return TypeStatistics(
        mean,
        mean.sum(axis=1),
        *moments_of_shares(X, codes, n_types, sample),
        significant_change(*differential_expression(X, codes, n_types)),
        np.array([bool(PROTOCOL_GENES.fullmatch(str(name))) for name in genes]),
    )


def moments_of_shares(X, codes, n_types, sample=None):
    """Mean and variance over subjects of each gene's share of a type's counts, both (K, G).

    Subjects are biological samples if every type is in two or more, else single cells.
    """
    if sample is not None:
        pair, index = np.unique(np.stack([codes, sample]), axis=1, return_inverse=True)
        if (np.bincount(pair[0])[np.unique(codes)] > 1).all():
            X, codes = sp.csr_matrix(sum_by_type(X, index.ravel(), pair.shape[1])), pair[0]
    share = sp.csr_matrix(X.multiply(1 / np.maximum(library_size(X), 1)[:, None]))
    n = np.bincount(codes, minlength=n_types)[:, None]
    mean = mean_counts(share, codes, n_types)  # (K, G)
    square = mean_counts(share.power(2), codes, n_types)
    return mean, np.maximum(square - mean**2, 0) * n / np.maximum(n - 1, 1)


def nnls_proportions(bulk, profiles):
    """Proportions (S, K) by non-negative least squares on mean count profiles.

        b_s / Σ_g b_sg  ≈  Σ_k w_sk p_k,   w ≥ 0,   rows of w then scaled to sum to 1

    The usual baseline of deconvolution (Abbas et al., PLoS ONE 2009; among the best bulk methods
    of Avila Cobos et al., Nature Communications 2020).

    bulk (S, G) and profiles (K, G): counts. Profiles keep the natural depth of their cells, so that
    weights are numbers of cells.
    """
    weights = np.stack([scipy.optimize.nnls(profiles.T, b / b.sum())[0] for b in bulk])
    return to_proportions(weights)


NNLS = Estimator(
    "NNLS",
    "Abbas et al., PLoS ONE 2009",
    lambda bulk, statistics, seed: nnls_proportions(bulk, statistics.mean),
)


def estimate_all(bulk, measured, statistics, estimators, seed=0):
    """Proportions of bulks by several estimators.

    Args:
        bulk: counts (S, G), dense. measured: mask (G). statistics: TypeStatistics of the training
            cells, in the same genes. estimators: some Estimators. seed: of those that draw.

    Returns:
        dict: name -> proportions of cells (S, K); 0 for a type without training cells.
    """
    types = np.flatnonzero(statistics.mean.any(axis=1))
    genes = np.flatnonzero(measured & statistics.mean.any(axis=0))
    known, bulk = statistics.select(types, genes), np.asarray(bulk)[:, genes]
    results = {}
    for name, _, estimate in estimators:
        results[name] = np.zeros((len(bulk), len(statistics.mean)))
        results[name][:, types] = estimate(bulk, known, seed)
    return results
