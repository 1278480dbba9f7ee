"""Published estimators of cell-type proportions, which bulk2sc is measured beside.

Each is its paper's estimator in a few lines. All read the same bulks and training cells, in all
genes that both have, and choose their own genes among these:

    NNLS, DWLS, MuSiC (with all genes, and without PROTOCOL_GENES), nu-SVR, BayesPrism, dtangle

Proportions are of cells, as the truth is. An estimator that its paper has for fractions of RNA is
divided by the mean library size of each type in the reference, and its docstring says so.

Notation in shape comments: S bulks, N cells, G genes, M genes of a signature, K cell types.
"""

from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.sparse as sp
from sklearn.svm import NuSVR
from sklearn.utils.parallel import Parallel, delayed

from counts.genes import PROTOCOL_GENES
from data import library_size, mean_counts, sum_by_type
from deconvolution.dwls import (
    choose_signature,
    differential_expression,
    dwls,
    significant_change,
    solve_nonnegative,
    to_proportions,
)

# ------------------------------------------------------------------------------- the reference


@dataclass
class Reference:
    """What the estimators know of the training cells."""

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
        """The reference of some types and genes, both indices."""
        names = ("mean", "abundance", "variance", "change")
        parts = {name: getattr(self, name)[np.ix_(types, genes)] for name in names}
        return Reference(size=self.size[types], is_protocol=self.is_protocol[genes], **parts)


def read_reference(X, codes, n_types, genes, sample=None):
    """Moments of training cells and differential expression between their types.

    Args:
        X: counts (N x G), CSR. codes: cell types (N). n_types: K. genes: symbols (G).
        sample: biological sample of each cell (N), if there are several.
    """
    mean = mean_counts(X, codes, n_types)
    return Reference(
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


# ------------------------------------------------------------------------------ least squares


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


def dwls_of_cells(bulk, reference, seed=0):
    """:func:`deconvolution.dwls.dwls` in the signature of the training cells."""
    genes = choose_signature(reference.mean, reference.change)
    return dwls(bulk[:, genes], reference.mean[:, genes].T, seed)


def music_weights(residual, x, size, variance):
    """MuSiC's weights of genes (M): 1 / (0.0001 + residual² + Σ_k (x_k size_k)² variance_kg).

    residual (M); x, size (K); variance (K, M).
    """
    return 1 / (1e-4 + residual**2 + (x * size) ** 2 @ variance)


def music(bulk, reference):
    """Weighted non-negative least squares (MuSiC: Wang et al., Nature Communications 2019).

        100 b_g / Σ_g b_g  ≈  Σ_k x_k size_k θ_kg,   weights as of :func:`music_weights`

    with θ the mean and the weights' variance that of each gene's share of the counts over the
    subjects of the reference. It is made for several; of a single one, its cells stand for them.
    Weights follow x, and the residual of the weighted problem, until proportions change by less
    than 0.01. Genes without counts in a bulk are left out, as the package does.
    """
    size, weights = reference.size, []
    for b in bulk.astype(float):
        found = b > 0
        y, variance = 100 * b[found] / b.sum(), reference.variance[:, found]
        D = (reference.abundance[:, found] * size[:, None]).T  # (M, K)
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


# ------------------------------------------------------------------------------ other estimators


def nu_svr(bulk, reference):
    """ν-support vector regression, linear (CIBERSORT: Newman et al., Nature Methods 2015).

    Signature and bulk are in CPM, each standardised as a whole; no quantile normalisation, as
    advised for RNA-seq. Genes are those of :func:`choose_signature`, so that only the estimator
    differs from DWLS (the paper's limit of q is 0.3). The paper's fractions are of RNA; here they
    are divided by the library sizes of the types.
    """
    genes = choose_signature(reference.mean, reference.change)
    X = (reference.mean / reference.size[:, None])[:, genes].T  # (M, K)
    X = (X - X.mean()) / X.std()
    fits = (delayed(fit_nu_svr)(X, y) for y in bulk[:, genes].astype(float))
    weights = np.array(Parallel(n_jobs=-1, prefer="threads")(fits))  # (S, K)
    return to_proportions(weights / reference.size)


def fit_nu_svr(X, y):
    """Weights of the types (K) in one bulk: of ν = 0.25, 0.5 and 0.75, the fit of lowest RMSE.

    Negative coefficients become 0, and the others sum to 1. X: standardised signature (M, K).
    y: bulk (M).
    """
    y = (y - y.mean()) / max(y.std(), 1e-300)
    fits = [NuSVR(nu=nu, C=1.0, kernel="linear").fit(X, y) for nu in (0.25, 0.5, 0.75)]
    weights = [to_proportions(np.maximum(fit.coef_[0], 0)) for fit in fits]
    return min(weights, key=lambda w: np.mean((X @ w - y) ** 2))


def bayesprism_fixed_point(x, phi, n_iterations=100):
    """θ (S, M): shares of the counts of bulks that come from each of M cell states.

    The fixed point of BayesPrism's Gibbs sampler (Chu et al., Nature Cancer 2022), as InstaPrism
    computes it (Hu and Chikina, Bioinformatics 2024), without the optional update of the reference:

        Z_smg = x_sg θ_sm φ_mg / Σ_m' θ_sm' φ_m'g,   θ_sm ∝ Σ_g Z_smg

    x: counts or CPM (S, G). phi: shares of genes in the counts of a state (M, G), rows summing to
    1, none of them 0.
    """
    theta = np.full((len(x), len(phi)), 1 / len(phi))
    for _ in range(n_iterations):
        theta = theta * ((x / np.maximum(theta @ phi, 1e-300)) @ phi.T)
        theta /= np.maximum(theta.sum(axis=1, keepdims=True), 1e-300)
    return theta


def positive_shares(states):
    """Counts of states (M, G) as shares; BayesPrism's pseudo.min, 1e-8, stands for 0."""
    phi = np.maximum(states / np.maximum(states.sum(axis=1, keepdims=True), 1e-300), 1e-8)
    return phi / phi.sum(axis=1, keepdims=True)


def bayesprism(bulk, reference):
    """θ of :func:`bayesprism_fixed_point`, one state per type, without PROTOCOL_GENES.

    θ are fractions of RNA; they are divided by the library sizes of the types, as BayesPrism's
    authors advise for numbers of cells.
    """
    kept = ~reference.is_protocol if not reference.is_protocol.all() else reference.is_protocol
    phi = positive_shares(reference.mean[:, kept])
    theta = bayesprism_fixed_point(bulk[:, kept].astype(float), phi)
    return to_proportions(theta / reference.mean[:, kept].sum(axis=1))


DTANGLE_GAMMA = 0.943  # of RNA-seq, as the package has it
DTANGLE_SHARE = 0.1  # of the markers of each type


def dtangle(bulk, reference):
    """Log-linear estimator from marker genes (dtangle: Hunt et al., Bioinformatics 2019).

        π_k ∝ 2^( mean over markers g of k of (y_g - η_kg) / γ ),   γ = 0.943

    with y and η log2(CPM + 1) of the bulk and of the type's cells. A gene is a marker of the type
    that it is highest in; the tenth of them with the highest ratio to the sum of all other types
    counts. γ and this tenth are the package's. π are fractions of RNA; they are divided by the
    library sizes of the types.
    """
    y, eta = (np.log2(X * 1e6 / X.sum(axis=1, keepdims=True) + 1) for X in (bulk, reference.mean))
    linear = 2**eta
    ratio = linear / np.maximum(linear.sum(axis=0) - linear, 1e-300)  # (K, G)
    is_top = ratio == ratio.max(axis=0)
    is_top &= is_top.sum(axis=0) == 1  # without ties
    weights = np.zeros((len(bulk), len(eta)))
    for k, top in enumerate(is_top):
        genes = np.flatnonzero(top)
        genes = genes[np.argsort(-ratio[k, genes], kind="stable")]
        genes = genes[: max(int(DTANGLE_SHARE * len(genes)), 1)]
        if len(genes):
            weights[:, k] = 2 ** ((y[:, genes] - eta[k, genes]).mean(axis=1) / DTANGLE_GAMMA)
    return to_proportions(weights / reference.mean.sum(axis=1))


# ------------------------------------------------------------------------------ all of them


def without_protocol(estimate, bulk, reference):
    """An estimate without PROTOCOL_GENES, or with them if there are no others."""
    kept = np.flatnonzero(~reference.is_protocol)
    if len(kept) == 0:
        return estimate(bulk, reference)
    return estimate(bulk[:, kept], reference.select(np.arange(len(reference.size)), kept))


METHODS = {
    "NNLS": lambda bulk, reference, seed: nnls_proportions(bulk, reference.mean),
    "DWLS": dwls_of_cells,
    "MuSiC": lambda bulk, reference, seed: music(bulk, reference),
    "MuSiC, no ribosomal/mitochondrial": lambda bulk, reference, seed: without_protocol(
        music, bulk, reference
    ),
    "nu-SVR": lambda bulk, reference, seed: nu_svr(bulk, reference),
    "BayesPrism": lambda bulk, reference, seed: bayesprism(bulk, reference),
    "dtangle": lambda bulk, reference, seed: dtangle(bulk, reference),
}


def deconvolve(bulk, measured, reference, seed=0, methods=None):
    """Proportions of bulks by each method.

    Args:
        bulk: counts (S, G), dense. measured: mask of the genes that were measured (G).
        reference: of the training cells, in the same genes. seed: of DWLS's cross-validation.
        methods: names; all of METHODS if None.

    Returns:
        dict: method -> proportions of cells (S, K); 0 for a type without training cells.
    """
    types = np.flatnonzero(reference.mean.any(axis=1))
    genes = np.flatnonzero(measured & reference.mean.any(axis=0))
    known, bulk = reference.select(types, genes), np.asarray(bulk)[:, genes]
    results = {}
    for name in METHODS if methods is None else methods:
        results[name] = np.zeros((len(bulk), len(reference.mean)))
        results[name][:, types] = METHODS[name](bulk, known, seed)
    return results
