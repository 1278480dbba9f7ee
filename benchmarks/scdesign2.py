"""scDesign2: each gene's best count distribution in its cell type, coupled by a Gaussian copula."""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import scipy.stats
from scipy.special import gammaln

from distributions.fits import best_theta

POISSON = 1e8  # θ from which a negative binomial is a Poisson distribution
FEWEST_IN_COPULA = 10  # cells of a type, below which correlations say nothing


@dataclass
class Marginals:
    """Distribution of each gene (G): 0 with probability π, else negative binomial.

    Variance of the latter mean + mean² / θ; Poisson is θ = ``POISSON``.
    """

    zero: np.ndarray
    """π (G)."""
    mean: np.ndarray
    """Of the negative binomial (G)."""
    theta: np.ndarray
    """θ (G)."""

    def of(self, genes):
        """Marginals of some genes, a mask (G)."""
        return Marginals(self.zero[genes], self.mean[genes], self.theta[genes])

    def cdf(self, x):
        """P(count ≤ x): x (n, G), -1 allowed -> (n, G)."""
        nb = scipy.stats.nbinom.cdf(x, self.theta, self.theta / (self.theta + self.mean))
        return np.where(x < 0, 0.0, self.zero + (1 - self.zero) * nb)

    def quantile(self, u):
        """The smallest counts whose cdf is u or more: u (n, G) within 0 and 1 -> (n, G)."""
        u = np.maximum(u - self.zero, 0) / (1 - self.zero)
        x = scipy.stats.nbinom.ppf(u, self.theta, self.theta / (self.theta + self.mean))
        return np.maximum(x, 0)  # ppf(0) is -1

    def draw(self, n, rng):
        """Counts of n cells whose genes are independent (n, G)."""
        shape = n, len(self.mean)
        x = rng.negative_binomial(self.theta, self.theta / (self.theta + self.mean), shape)
        return x * (rng.random(shape) >= self.zero)


def fit_marginals(X):
    """Marginals of genes in the cells of one type, as scDesign2 chooses and fits them.

    Poisson where the variance is not above the mean, else negative binomial; either zero-inflated
    where the likelihood-ratio test of π = 0 has p < 0.05. All by maximum likelihood. Genes seen in
    fewer than two cells count as not expressed.

    Args:
        X: counts (n x G), CSC.

    Returns:
        Marginals.
    """
    counts = CountsOfGenes(X)
    expressed = counts.n_positive >= min(2, counts.n_cells)
    plain, of_plain = fit_plain(counts)
    inflated, of_inflated = fit_inflated(counts)
    # False where it is not a number: a count in no cell or in every one.
    better = 2 * (of_inflated - of_plain) > scipy.stats.chi2.isf(0.05, 1)
    better &= (inflated.zero > 0) & (inflated.zero < 1)
    return Marginals(
        np.where(expressed & better, inflated.zero, 0.0),
        np.where(expressed, np.where(better, inflated.mean, plain.mean), 0.0),
        np.where(better, inflated.theta, plain.theta),
    )


def fit_plain(counts):
    """Marginals with π = 0 and their log-likelihoods (G), of CountsOfGenes."""
    n, mean = counts.n_cells, counts.total / counts.n_cells
    theta = best_theta(lambda theta: counts.log_likelihood(mean, theta, n))
    theta = np.where(counts.overdispersed, theta, POISSON)
    plain = Marginals(np.zeros_like(mean), mean, theta)
    return plain, counts.log_likelihood(mean, theta, n)


def fit_inflated(counts):
    """Marginals with free π and their log-likelihoods (G), of CountsOfGenes.

    With free π the zeros say nothing about the counts above 0, which are fitted alone. π is then
    what the zeros call for; π <= 0 if that is less than the negative binomial has.
    """
    theta = np.where(counts.overdispersed, best_theta(counts.log_likelihood_above_zero), POISSON)
    mean, seen = counts.mean_above_zero(theta), counts.n_positive / counts.n_cells
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = 1 - seen / (1 - probability_of_zero(mean, theta))
        of_zeros = counts.n_cells * (seen * np.log(seen) + (1 - seen) * np.log(1 - seen))
    return Marginals(zero, mean, theta), counts.log_likelihood_above_zero(theta) + of_zeros


def probability_of_zero(mean, theta):
    """Of the negative binomial."""
    return np.exp(-theta * np.log1p(mean / theta))


class CountsOfGenes:
    """Likelihoods of negative binomials of genes (G), from the counts above 0 of n cells.

    Args:
        X: counts (n x G), CSC.
    """

    def __init__(self, X):
        self.n_cells, self.n_genes = X.shape
        X.eliminate_zeros()
        self.n_positive = np.diff(X.indptr)  # cells with a count (G)
        self.value = X.data.astype(np.float64)  # counts above 0 of one gene after the other
        self.gene = np.repeat(np.arange(self.n_genes), self.n_positive)  # the gene of each
        self.total = self.sum(self.value)
        self.log_factorials = self.sum(gammaln(self.value + 1))
        mean = self.total / self.n_cells
        self.overdispersed = self.sum(self.value**2) / self.n_cells - mean**2 > mean  # mask (G)

    def sum(self, values):
        """Sum of the values of each gene's counts above 0: (G)."""
        return np.bincount(self.gene, values, minlength=self.n_genes)

    def log_likelihood(self, mean, theta, n):
        """Of n cells, those with a count and others without (G).

        mean (G); theta, n: (G) or a number.
        """
        theta = np.broadcast_to(theta, self.n_genes)
        gammas = self.sum(gammaln(self.value + theta[self.gene])) - self.n_positive * gammaln(theta)
        log_share = -np.log1p(theta / np.maximum(mean, 1e-300))  # ln(μ / (μ + θ))
        at_zero = -theta * np.log1p(mean / theta)
        return gammas - self.log_factorials + self.total * log_share + n * at_zero

    def log_likelihood_above_zero(self, theta):
        """Of the counts above 0, given that they are above 0, at the best mean: (G)."""
        mean = self.mean_above_zero(theta)
        with np.errstate(divide="ignore", invalid="ignore"):
            above = self.n_positive * np.log1p(-probability_of_zero(mean, theta))
        return self.log_likelihood(mean, theta, self.n_positive) - above

    def mean_above_zero(self, theta):
        """μ (G) with μ / (1 - P(0)) = m, the mean of the counts above 0; by Newton's method."""
        m = self.total / np.maximum(self.n_positive, 1)
        mean = m
        for _ in range(12):  # convex, and from above, so that no step goes too far
            slope = 1 - m * np.exp(-(theta + 1) * np.log1p(mean / theta))
            step = (mean - m * (1 - probability_of_zero(mean, theta))) / np.maximum(slope, 1e-9)
            mean = np.maximum(mean - step, 1e-9)
        return mean


class ScDesign2:
    """scDesign2 (Sun et al., Genome Biology 2021): a Gaussian copula of the genes of each type.

        u = F(x - 1) + v (F(x) - F(x - 1)),  v ~ U(0, 1);   R = cor(Φ⁻¹(u)) over the type's cells
        new cells:  Φ⁻¹(u) ~ N(0, R),   x = F⁻¹(u)

    with F of :func:`fit_marginals`. Genes without a count in 80 % of the cells or more are drawn
    independently, and so are all genes of types with fewer than ``FEWEST_IN_COPULA`` cells, which
    is ours. Library sizes are whatever the genes add up to.

    Args:
        X: training counts (N x G), CSR. codes: their types (N). seed: of fit and draws.
    """

    def __init__(self, X, codes, seed):
        self.rng, self.n_genes = np.random.default_rng(seed), X.shape[1]
        self.types = {k: self.fit_type(X[np.flatnonzero(codes == k)]) for k in np.unique(codes)}

    def fit_type(self, X):
        """Fit one type with counts X (n x G), CSR.

        Returns:
            its Marginals; mask of the genes in the copula (G); and their standardised normal
            scores (n, P), whose correlations are R.
        """
        X = X.tocsc()
        n = X.shape[0]
        marginals = fit_marginals(X)
        joint = np.diff(X.indptr) > 0.2 * n
        if n < FEWEST_IN_COPULA:
            joint[:] = False
        x, of_joint = X[:, np.flatnonzero(joint)].toarray(), marginals.of(joint)
        low, high = of_joint.cdf(x - 1), of_joint.cdf(x)
        u = low + self.rng.random(x.shape) * (high - low)
        score = scipy.stats.norm.ppf(u.clip(1e-5, 1 - 1e-5))
        score -= score.mean(axis=0)
        return marginals, joint, score / score.std(axis=0, ddof=1)

    def draw(self, target):
        """Draw cells of types ``target`` (M): counts, CSR int32 (M x G); none of unseen types."""
        drawn = np.zeros((len(target), self.n_genes), dtype=np.int32)
        for k in np.intersect1d(target, list(self.types)):
            marginals, joint, score = self.types[k]
            rows = np.flatnonzero(target == k)
            cells = marginals.draw(len(rows), self.rng)
            # Weighted sums of n scores have their correlations, however few cells for the genes.
            weight = self.rng.standard_normal((len(rows), len(score))) / np.sqrt(len(score) - 1)
            u = scipy.stats.norm.cdf(weight @ score)
            cells[:, joint] = marginals.of(joint).quantile(u)
            drawn[rows] = cells
        return sp.csr_matrix(drawn)
