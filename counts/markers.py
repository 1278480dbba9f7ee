"""Marker genes of cell types, chosen in three ways for three uses.

By test of a type against all others, as Seurat and scanpy do, for metrics that compare with them.
By test against the nearest type, for pictures, where a gene that two types share marks neither.
And by fold change between profiles, for the report, which has the model's profiles and no cells.
"""

import numpy as np
import pandas as pd
import scipy.sparse as sp

from counts.genes import HOUSEKEEPING

MIN_TO_COMPARE = 3  # cells of a type that markers of others are compared with
MIN_WITH_MARKERS = 10  # cells of a type with markers; with fewer, chance chooses them
MIN_FRACTION = 0.1  # of a type's cells that have counts of its marker
MIN_RATIO = 1.3  # of its mean log-expression there to that in any other type
MIN_T = 2.0  # Welch's t against the nearest type: not by chance alone
PSEUDOCOUNT = 50  # CPM, so that a gene that hardly any cell shows is no marker
MIN_LOG2_CHANGE = 0.5  # between the profiles of a type and of the nearest one


def is_housekeeping(genes):
    """Mask of the genes (G) that HOUSEKEEPING names, which mark no type."""
    return np.array([bool(HOUSEKEEPING.match(name)) for name in genes], bool)


def markers_by_test(log, codes, n):
    """The n genes that mark each cell type, by t-test of its cells against all others.

    Args:
        log: AnnData of log-normalised cells (N x G). codes: cell types (N). Types of fewer than two
            cells have none.

    Returns:
        dict: type code -> gene indices.
    """
    import scanpy

    log = log.copy()
    log.obs["code"] = pd.Categorical(codes.astype(str))
    size = pd.Series(codes).value_counts()
    groups = [str(k) for k in size.index if size[k] > 1]
    if log.obs["code"].nunique() < 2 or not groups:
        return {}
    scanpy.tl.rank_genes_groups(log, "code", groups=groups, method="t-test", n_genes=n)
    names = log.uns["rank_genes_groups"]["names"]
    return {int(k): log.var_names.get_indexer(names[k]) for k in names.dtype.names}


def markers_of_one_type(log, codes, n_types, genes, n=2):
    """Genes that mark one cell type alone: the most specific ones, at most n for each type.

    A gene is ranked by Welch's t of the type's cells against those of the type that comes nearest,
    so it is above every other type. None is a housekeeping gene, or one that most cells of most
    types have.

    Args:
        log: log-normalised counts (N x G), CSR. codes: cell types (N), 0 to n_types - 1. genes:
            names (G).

    Returns:
        list (K) of gene indices; empty for a type of too few cells, or without such a gene.
    """
    size = np.bincount(codes, minlength=n_types)
    is_compared = size >= MIN_TO_COMPARE
    if is_compared.sum() < 2:
        return [[] for _ in range(n_types)]
    entries = np.ones(len(codes)), (codes, np.arange(len(codes)))
    one_hot = sp.csr_matrix(entries, shape=(n_types, len(codes)))
    n_cells = np.maximum(size, 1)[:, None]
    mean, square, fraction = (
        (one_hot @ X).toarray() / n_cells for X in (log, log.multiply(log).tocsr(), log > 0)
    )  # (K, G) each
    error = np.maximum(square - mean**2, 1e-6) / np.maximum(n_cells - 1, 1)
    is_common = (fraction[is_compared] > 0.5).mean(axis=0) > 0.5
    is_allowed = ~is_housekeeping(genes) & ~is_common
    markers = []
    for k in range(n_types):
        others = is_compared & (np.arange(n_types) != k)
        t = (mean[k] - mean[others]) / np.sqrt(error[k] + error[others])  # (K', G)
        is_above = mean[k] >= MIN_RATIO * mean[others].max(axis=0)
        is_frequent = fraction[k] >= MIN_FRACTION
        score = np.where(is_allowed & is_above & is_frequent, t.min(axis=0), -np.inf)
        best = np.argsort(-score, kind="stable")[:n] if size[k] >= MIN_WITH_MARKERS else []
        markers.append([g for g in best if score[g] > MIN_T])
    return markers


def markers_of_profiles(profiles, genes, n=3):
    """Genes that tell each type's profile from that of the type next to it.

        specificity of g for k = log2 (x_kg + 50) - log2 (max_{j != k} x_jg + 50),     x in CPM

    Args:
        profiles: fractions of a cell's counts (K, G). genes: names (G).

    Returns:
        list of K lists of at most n gene names, best first; none below MIN_LOG2_CHANGE.
    """
    x = np.log2(profiles * 1e6 + PSEUDOCOUNT)
    x[:, is_housekeeping(genes)] = 0
    markers = []
    for k in range(len(x)):
        others = np.delete(x, k, axis=0)
        specificity = x[k] - (others.max(axis=0) if len(others) else np.log2(PSEUDOCOUNT))
        best = np.argsort(-specificity, kind="stable")[:n]
        markers.append([genes[g] for g in best if specificity[g] > MIN_LOG2_CHANGE])
    return markers
