"""What bulk2sc is measured beside: for cells, and for cell types' expression in samples.

Estimators of proportions are in deconvolution.py.
"""

import contextlib
import io
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scipy.stats
import torch
from scipy.special import gammaln

from data import library_size
from deconvolution.published import bayesprism_fixed_point, positive_shares
from models import best_theta, scDecoder, scGMVAE
from runtime.device import pick_device
from runtime.errors import InputError
from runtime.weights import MIXTURE_FILES, load_model

# --------------------------------------------------------------------------------------- cells


def draw_cell_type_nb(X, codes, target, rng):
    """Draw cells of independent genes, negative binomial with the moments of their cell type.

        θ = mean² / (variance - mean);   Poisson where the variance is not above the mean

    Much as the marginals of :class:`ScDesign2` without its copula, and fitted by moments. Library
    sizes are whatever the genes add up to.

    Args:
        X: training counts (N x G), CSR. codes: their types (N). target: types of the cells to
            draw (M). rng: numpy Generator.

    Returns:
        CSR int32 (M x G).
    """
    drawn = np.zeros((len(target), X.shape[1]), dtype=np.int32)
    for k in np.unique(target):
        train = X[np.flatnonzero(codes == k)].toarray().astype(np.float64)
        rows = np.flatnonzero(target == k)
        if len(train):
            mean = train.mean(axis=0)
            overdispersion = train.var(axis=0) - mean
            theta = np.clip(mean**2 / np.maximum(overdispersion, 1e-12), 1e-6, 1e6)
            rate = rng.gamma(theta, np.maximum(mean, 1e-12) / theta, (len(rows), len(mean)))
            drawn[rows] = rng.poisson(rate)
    return sp.csr_matrix(drawn)


def train_published(cfg, weights, decoder_card):
    """Train scDecoder by the published recipe, on the same mixture and split.

    z is drawn from its type's Gaussian rather than paired with its cell, and the loss is MSE + L1
    (bulk2sc as published: Cho et al., bioRxiv 2024, doi:10.1101/2024.05.18.594837).

    Args:
        cfg: settings of the evaluation. weights: folder of the mixture. decoder_card: of the
            decoder that it is measured beside.

    Returns:
        scDecoder in eval mode.

    Raises:
        InputError: the mixture was trained on another split than the decoder.
    """
    import train_decoder  # run whole, as its script would be

    with tempfile.TemporaryDirectory() as folder:
        for name in (*MIXTURE_FILES, "scGMVAE_model.pt"):
            if (weights / name).exists():
                shutil.copy(weights / name, folder)
        settings = train_decoder.Settings(
            data=cfg.data,
            labels=cfg.labels,
            weights=Path(folder),
            seed=decoder_card["seed"],
            device=cfg.device,
            held_out=decoder_card["held_out_fraction"],
            pairing="prior",
            loss="mse_l1",
            n_hidden=700,
            epochs=40,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            train_decoder.main(settings)
        decoder, card = load_model(
            Path(folder) / "scDecoder_model.pt", scDecoder, pick_device(cfg.device)
        )
    if set(card["held_out"]) != set(decoder_card["held_out"]):
        raise InputError(
            f"{weights}: scDecoder_model.pt and the baseline hold out different cells; expected "
            "scGMVAE_model.pt of the same run beside it, or no --compare"
        )
    return decoder


KEPT_SETTINGS = (  # by a training on other cells
    *("n_genes", "n_latent", "n_hidden", "n_components", "loss", "pairing"),
    *("epochs", "vae_epochs", "batch_size", "lr", "kl_end"),
    *("dropout", "weight_decay"),
)


def train_anew(cfg, weights, simulated, codes, decoder_card):
    """Train scGMVAE and scDecoder on cells that a trained scDecoder drew (parametric bootstrap).

    The new model has the right form by construction. How much worse its cells are is therefore the
    price of a reference of this size (Efron, The Annals of Statistics 1979).

    Args:
        cfg: settings of the evaluation. weights: folder of the model that drew the cells, whose
            settings and share of held-out cells are used again. simulated: its cells, AnnData
            (N x G). codes: their types (N). decoder_card: of that model.

    Returns:
        ``(decoder, card)``: scDecoder in eval mode, and what its file says.

    Raises:
        InputError: scGMVAE_model.pt is missing, or a file has settings that cannot be used.
    """
    import train_decoder  # run whole, as their scripts would be
    import train_gmvae

    _, gmvae_card = load_model(weights / "scGMVAE_model.pt", scGMVAE)
    with tempfile.TemporaryDirectory() as folder:
        names = np.array(decoder_card["cell_types"])[codes]
        obs = pd.DataFrame({"cell_type": names}, index=simulated.obs_names)
        path = Path(folder) / "simulated.h5ad"
        anndata.AnnData(simulated.X, obs, simulated.var[[]]).write_h5ad(path)
        given = dict(data=str(path), labels="cell_type", weights=Path(folder), device=cfg.device)
        fraction = len(decoder_card["held_out"]) / len(codes)
        given |= dict(seed=decoder_card["seed"], held_out=fraction)
        for script, card in ((train_gmvae, gmvae_card), (train_decoder, decoder_card)):
            kept = {n: v for n, v in card["settings"].items() if n in KEPT_SETTINGS}
            try:
                settings = script.Settings(**given, **kept)
            except TypeError as error:
                raise InputError(f"{weights}: settings of another version ({error})") from error
            with contextlib.redirect_stdout(io.StringIO()):
                script.main(settings)
        file = Path(folder) / "scDecoder_model.pt"
        return load_model(file, scDecoder, pick_device(cfg.device))


class ScVI:
    """scVI (Lopez et al., Nature Methods 2018): 10 latent dimensions, 400 epochs.

    Args:
        cells: AnnData of training counts (N x G). codes: their types (N). seed: of training and
            draws.
    """

    def __init__(self, cells, codes, seed):
        import scvi  # optional

        scvi.settings.seed = seed
        cells = cells.copy()
        cells.X = cells.X.astype(np.float32)
        scvi.model.SCVI.setup_anndata(cells)
        self.model = scvi.model.SCVI(cells, n_latent=10)
        self.model.train(max_epochs=400, accelerator="cpu", enable_progress_bar=False)
        self.latent = self.model.get_latent_representation()  # (N, D)
        self.library, self.codes = library_size(cells.X), codes
        self.rng = np.random.default_rng(seed)

    def draw(self, target):
        """Draw cells of types ``target`` (M): counts, CSR int32 (M x G).

        z comes from the Gaussian of its type's posterior means, the library size from one of its
        type's training cells.
        """
        z = np.zeros((len(target), self.latent.shape[1]), np.float32)
        library = np.zeros((len(target), 1), np.float32)
        for k in np.unique(target):
            in_type, rows = self.codes == k, target == k
            latent = self.latent[in_type]
            z[rows] = self.rng.normal(
                latent.mean(axis=0), latent.std(axis=0), (rows.sum(), z.shape[1])
            )
            library[rows, 0] = self.rng.choice(self.library[in_type], rows.sum())
        with torch.inference_mode():
            generative = self.model.module.generative(
                torch.from_numpy(z),
                torch.from_numpy(np.log(library)),
                torch.zeros(len(target), 1, dtype=torch.long),
            )
            return sp.csr_matrix(generative["px"].sample().numpy().astype(np.int32))


# ----------------------------------------------------------------------------------- scDesign2

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


# --------------------------------------------------------- expression of cell types in samples


def bayesprism_expression(bulk, states, type_of, in_theta, n_iterations=100):
    """Counts of each cell type in each bulk: the Z of BayesPrism (Chu et al., Nature Cancer 2022).

        Z_smg = x_sg θ_sm φ_mg / Σ_m' θ_sm' φ_m'g

    over cell states m, then summed to cell types; θ of
    :func:`deconvolution.published.bayesprism_fixed_point`.

    Args:
        bulk: counts or CPM (S, G). states: summed counts of the training cells of each state
            (M, G); states without counts are left out. type_of: cell type of each state (M).
        in_theta: mask of the genes that θ is estimated from (G). n_iterations: of θ.

    Returns:
        (S, K, G) float64, K one more than the last of the types; rows of zeros for a type without
        a state.
    """
    n_types = type_of.max() + 1
    used = states.sum(axis=1) > 0
    states, type_of = states[used], type_of[used]
    phi = positive_shares(states)  # (M, G)
    share = phi[:, in_theta].sum(axis=1, keepdims=True)  # (M, 1) of a state's counts in these genes
    theta = bayesprism_fixed_point(bulk[:, in_theta], phi[:, in_theta] / share, n_iterations)
    theta = theta / share.T  # of the counts of all genes, up to a factor that ratio takes back
    ratio = bulk / np.maximum(theta @ phi, 1e-300)  # (S, G)
    Z = np.zeros((len(bulk), n_types, bulk.shape[1]))
    for k in np.unique(type_of):
        Z[:, k] = ratio * (theta[:, type_of == k] @ phi[type_of == k])
    return Z


def one_factor_expression(bulk, measured, shares, profiles):
    """Counts of each cell type in each bulk if every gene changes by one factor in all types.

        x_skg = r_sk p_kg f_sg,   f_sg = b_sg / Σ_k r_sk p_kg

    with the true shares r of the types in the counts, which no method can have for a bulk. One
    count per million is added to p, as a gene that the reference lacks has no factor otherwise.

    Args:
        bulk: b (S, G). measured: mask (G); other genes get 0. shares: r (S, K), positive, rows
            summing to 1. profiles: fractions p of the counts of each type (K, G).

    Returns:
        (S, K, G) float64.
    """
    profiles = profiles + 1e-6
    factor = np.where(measured, bulk, 0.0) / (shares @ profiles)  # (S, G)
    return shares[:, :, None] * profiles * factor[:, None]
