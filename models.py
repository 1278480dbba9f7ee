"""The three networks and the count distributions they use.

Notation in shape comments: B batch, G genes, K cell types, D latent dimensions, S bulk samples.

- ``scGMVAE`` (stage 1): a cell's counts -> q(z|x), a Gaussian mixture over z whose component k is
  cell type k, and a decoder back to counts. The role autoCell plays in the paper (Xu et al., Cell
  Reports Methods 2023).
- ``scDecoder`` (stage 2; genVAE in the paper): z -> counts of every gene.
- ``BulkEncoder`` (stage 3): bulk profile -> mean and variance of every cell type, and proportions.
"""

import math

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from scipy.special import gammaln
from torch import nn

from data import DEPTH, library_size, sum_by_type
from deconvolution import itakura_saito
from runtime.device import in_batches, to_csr, to_sparse

LIKELIHOODS = ("nb", "zinb", "mse_l1")
MOST_IN_SHAPE = 20_000  # cells that a type's shape is fitted to; a random sample if more
MOST_IN_DISPERSION = 5_000  # cells of a type that its dispersions are fitted to
MOST_SPIKES = 5  # in a cell; with more it is taken for another kind of cell
SMALLEST_COHORT = 5  # bulks; what fewer have in common is as likely their own
PLATFORM_VAR = 0.25  # prior variance of what all bulks of a table share against the reference
TILT_PENALTY = 0.1  # keeps the parts of a cloud from going to 0 for a mean that none of them has

# ---------------------------------------------------------------------------- seed and device


@torch.no_grad()
def encode_cells(gmvae, X, rows=None, batch_size=512):
    """Posteriors of cells in eval mode, in batches: mean and variance, each (N, D), where gmvae is.

    gmvae: scGMVAE. X: counts (cells x G), CSR, in its genes. rows: the cells (N); all if None.
    """
    device, gmvae = gmvae.mu.device, gmvae.eval()
    rows = np.arange(X.shape[0]) if rows is None else rows
    return in_batches(lambda batch: gmvae.encode(to_sparse(X, batch, device)), rows, batch_size)


def mean_profile(X, rows=None):
    """Expression profile (G) of cells together: positive, sums to 1.

    Half a count is added to each gene, so that genes without counts keep a finite logarithm.

    Args:
        X: counts (N x G), CSR or backed. rows: the cells; all if None.
    """
    rows = np.arange(X.shape[0]) if rows is None else rows
    total = torch.from_numpy(sum_by_type(X, np.zeros(len(rows), int), 1, rows=rows)[0]) + 0.5
    return (total / total.sum()).float()


# ------------------------------------------------------------------------ count distributions


def nb_log_prob(x, mean, theta):
    """Log-probability of counts under the negative binomial, variance mean + mean² / theta.

        log p(x) = lnΓ(x+θ) - lnΓ(θ) - lnΓ(x+1) - θ ln(1+μ/θ) + x ln(μ/(μ+θ))

    Holds in float32 from theta = 1e-6 to 1e8: the difference of two log-gammas loses all its
    digits once theta is large, so from theta = 30 on it comes from Stirling's series with
    ``log1p`` of the small ratios instead. mean = 0 gives 0 at x = 0 and -inf elsewhere.

    Args:
        x: counts. mean, theta: > = 0 and > 0. All broadcast together.

    Returns:
        Tensor of the broadcast shape.
    """
    small = theta.clamp(max=30.0)  # each branch sees safe values only, so neither's gradient is NaN
    large = theta.clamp(min=30.0)
    log_mean = torch.log(torch.where(x > 0, mean, 1.0))  # not needed at x = 0, where mean may be 0
    by_gamma = (
        torch.lgamma(x + small) - torch.lgamma(small) - small * torch.log1p(mean / small)
    ) + x * (log_mean - torch.log(small + mean))

    def tail(z):  # Stirling: lnΓ(z) = (z - 1/2) ln z - z + ln(2π)/2 + tail(z)
        return (1 / 12 - 1 / (360 * z * z)) / z

    # With lnΓ(x+θ) - lnΓ(θ) written out, everything of order θ cancels on paper, not in float32.
    by_series = (
        (large - 0.5) * torch.log1p(x / large)
        + tail(x + large)
        - tail(large)
        - x
        - large * torch.log1p(mean / large)
    ) + x * (torch.log1p((x - mean) / (large + mean)) + log_mean)
    return torch.where(theta > 30.0, by_series, by_gamma) - torch.lgamma(x + 1.0)


class NegativeBinomialLoss(torch.autograd.Function):
    """Negative log-likelihood of sparse cells, with its gradient written out.

        L = Σ_g θ_g ln(1 + μ_g/θ_g) - Σ_{g: x_g > 0} ( ln NB(x_g; μ_g, θ_g) + θ_g ln(1 + μ_g/θ_g) ),
        μ = library · softmax(logits)

        ∂L/∂ln μ_g = θ_g (μ_g - x_g) / (μ_g + θ_g) = a_g,   ∂L/∂logit_g = a_g - softmax_g Σ_j a_j
        ∂L/∂ln θ_g = θ_g ln(1 + μ_g/θ_g) - a_g - θ_g (ψ(x_g + θ_g) - ψ(θ_g))

    Nine counts in ten are zero, so the second sum and all gamma functions are for the others alone.
    Autograd would keep and pass over a dozen tensors of (B, G); here it is three.
    """

    @staticmethod
    def forward(ctx, logits, log_theta, library, x):
        """logits (B, G), log_theta (G), library (B), x: sparse COO counts (B, G) -> L (B)."""
        cell, gene = x.indices()  # (n,) each
        theta, place = log_theta.exp(), cell * x.shape[1] + gene
        p = torch.softmax(logits, dim=-1)  # (B, G)
        # A softmax that underflows must not give mean 0, under which any count is impossible.
        ratio = (p * library[:, None]).clamp_(min=1e-10)  # μ (B, G)
        mean_n, theta_n = ratio.view(-1).index_select(0, place), theta.index_select(0, gene)
        at_zero = torch.log1p(ratio.div_(theta)).mul_(theta)  # θ ln(1 + μ/θ) (B, G)
        excess = at_zero.view(-1).index_select(0, place) + nb_log_prob(x.values(), mean_n, theta_n)
        ctx.save_for_backward(p, ratio, at_zero, theta, theta_n, x)
        return at_zero.sum(dim=1).index_add(0, cell, excess, alpha=-1)

    @staticmethod
    def backward(ctx, grad):
        """grad: of L (B)."""
        p, ratio, at_zero, theta, theta_n, x = ctx.saved_tensors
        (cell, gene), x_n = x.indices(), x.values()
        place = cell * x.shape[1] + gene
        inverse = (1 + ratio).reciprocal_()  # θ / (μ + θ) (B, G)
        scaled = x_n * inverse.view(-1).index_select(0, place)  # x θ / (μ + θ) (n,)
        a = inverse.mul_(ratio).mul_(theta)  # its part without x (B, G)
        grad_theta = grad @ (at_zero - a)  # (G)
        of_counts = scaled - theta_n * digamma_difference(x_n, theta_n)
        grad_theta.index_add_(0, gene, of_counts * grad.index_select(0, cell))
        a.view(-1).index_add_(0, place, scaled, alpha=-1)
        grad_logits = a.sub_(p * a.sum(dim=1, keepdim=True)).mul_(grad[:, None])
        return grad_logits, grad_theta, None, None


def digamma_difference(x, theta):
    """ψ(x + θ) - ψ(θ), from θ = 30 on by the asymptotic series, as :func:`nb_log_prob`."""
    small, large = theta.clamp(max=30.0), theta.clamp(min=30.0)

    def tail(z):  # ψ(z) = ln z - tail(z)
        return (1 / 2 + (1 / 12 - 1 / (120 * z * z)) / z) / z

    series = torch.log1p(x / large) + tail(large) - tail(x + large)
    return torch.where(theta > 30.0, series, torch.digamma(x + small) - torch.digamma(small))


def zinb_log_prob(x, mean, theta, dropout_logits):
    """Log-probability under the zero-inflated negative binomial.

    p(x) = π [x = 0] + (1 - π) NB(x; μ, θ),   π = sigmoid(dropout_logits)
    """
    nb = nb_log_prob(x, mean, theta)
    log_pi, log_not_pi = F.logsigmoid(dropout_logits), F.logsigmoid(-dropout_logits)
    return torch.where(x > 0, log_not_pi + nb, torch.logaddexp(log_pi, log_not_pi + nb))


def sample_nb(mean, theta, generator=None):
    """Draw negative binomial counts with variance mean + mean² / theta.

    Each is a gamma and a Poisson draw; on CPU :mod:`runtime.sampler` draws whole cells faster.

    Args:
        mean: (B, G), 0 or more. theta: broadcastable to it, positive. generator: torch Generator.

    Returns:
        Tensor (B, G) of whole numbers, in mean's dtype.
    """
    rate = torch._standard_gamma(theta.expand_as(mean), generator=generator) * (mean / theta)
    return torch.poisson(rate, generator=generator)


def sample_zinb(mean, theta, dropout_logits, generator=None):
    """Draw zero-inflated negative binomial counts; arguments as in :func:`sample_nb`."""
    counts = sample_nb(mean, theta, generator)
    keep = torch.rand(mean.shape, generator=generator, device=mean.device)
    return counts * (keep >= torch.sigmoid(dropout_logits))


# ----------------------------------------------------------------------------------- networks


class Dropout(nn.Dropout):
    """``nn.Dropout`` whose mask does not depend on the number of processes.

    Each process draws the mask of the whole batch and applies its part. ``training.TrainingRun``
    sets :attr:`part` when there are several processes.

    Attributes:
        part: size of the whole batch and the slice of it that this process computes, or None.
    """

    part = None

    def forward(self, x):
        """x: (B', H), this process's part of the batch (B, H)."""
        if self.part is None or not self.training:
            return super().forward(x)
        n, part = self.part
        return x * F.dropout(x.new_ones(n, *x.shape[1:]), self.p)[part]


def hidden_layers(sizes, dropout):
    """Linear -> LayerNorm -> ReLU -> Dropout for each step of ``sizes``."""
    layers = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
        # LayerNorm, not BatchNorm: a generated cell must not depend on the cells beside it.
        layers += [nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.ReLU(), Dropout(dropout)]
    return nn.Sequential(*layers)


class CountDecoder(nn.Module):
    """z (B, D) and library size (B) -> the distribution of counts (B, G).

    ``nb`` and ``zinb``: mean = library x softmax over genes, one dispersion per gene. ``mse_l1``
    is the published regression: a plain ReLU network whose ReLU output is the cell itself.

    Raises:
        ValueError: another likelihood.
    """

    def __init__(self, n_latent, n_hidden, n_genes, likelihood="nb", dropout=0.0):
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood {likelihood}")
        super().__init__()
        self.likelihood = likelihood
        sizes = [n_latent, *n_hidden]
        if likelihood == "mse_l1":
            layers = []
            for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
                layers += [nn.Linear(n_in, n_out), nn.ReLU()]
            self.hidden = nn.Sequential(*layers)
        else:
            self.hidden = hidden_layers(sizes, dropout)
            self.log_theta = nn.Parameter(torch.zeros(n_genes))
        self.out = nn.Linear(sizes[-1], n_genes)
        if likelihood == "zinb":
            self.dropout_logits = nn.Linear(sizes[-1], n_genes)

    @torch.no_grad()
    def start_at(self, profile, theta=1.0):
        """Initialise the decoder to give the mean profile (G, positive, sums to 1) for any z.

        From uniform expression, most steps would be spent on finding the mean. theta: the initial
        dispersion of every gene.
        """
        if self.likelihood != "mse_l1":
            self.out.weight.mul_(0.1)
            self.out.bias.copy_(profile.log())
            self.log_theta.fill_(math.log(theta))

    @property
    def theta(self):
        """Dispersion of each gene (G), positive; variance = mean + mean² / theta."""
        return self.log_theta.exp()

    def forward(self, z, library, log_factor=None):
        """Returns mean (B, G), and dropout logits (B, G) for ``zinb``, else None.

        log_factor: (B, G), added to the logarithm of each gene's mean, before the genes of a cell
        are scaled to its library size.
        """
        h = self.hidden(z)  # (B, H)
        logits = self.out(h)  # (B, G)
        if self.likelihood == "mse_l1":
            counts = F.relu(logits)
            return counts if log_factor is None else counts * log_factor.exp(), None
        if log_factor is not None:
            logits = logits + log_factor
        # A cell without counts in these genes, or a softmax that underflows, must not give mean 0,
        # under which any count is impossible.
        mean = library[:, None].clamp(min=1.0) * torch.softmax(logits, dim=-1)
        mean = mean.clamp(min=1e-10)  # (B, G)
        return mean, self.dropout_logits(h) if self.likelihood == "zinb" else None

    def loss(self, x, z, library):
        """Reconstruction loss of each cell (B), summed over genes.

        nb, zinb:  -Σ_g log p(x_g | z, library)
        mse_l1:     Σ_g (x_g - x̂_g)² + |x_g - x̂_g|      (the published loss)

        Args:
            x: counts (B, G), dense or sparse COO. z: (B, D). library: (B).
        """
        if self.likelihood == "nb":
            logits, library = self.out(self.hidden(z)), library.clamp(min=1.0)  # (B, G), (B)
            return NegativeBinomialLoss.apply(logits, self.log_theta, library, x.to_sparse())
        mean, dropout_logits = self(z, library)
        x = x.to_dense()
        if self.likelihood == "zinb":
            return -zinb_log_prob(x, mean, self.theta, dropout_logits).sum(dim=1)
        return ((x - mean) ** 2 + (x - mean).abs()).sum(dim=1)

    def sample(self, z, library, generator=None, log_factor=None, theta=None):
        """Draw whole-number counts (B, G); ``mse_l1`` has no distribution and is rounded.

        log_factor: see :meth:`forward`. theta: dispersions (B, G) to use instead, for ``nb``.
        """
        mean, dropout_logits = self(z, library, log_factor)
        if self.likelihood == "nb":
            return sample_nb(mean, self.theta if theta is None else theta, generator)
        if self.likelihood == "zinb":
            return sample_zinb(mean, self.theta, dropout_logits, generator)
        return mean.round()


def normal_kl(mean, var, prior_mean, prior_var):
    """KL(N(mean, var) || N(prior_mean, prior_var)) of diagonal normals, summed over D, the last."""
    ratio = var / prior_var
    return 0.5 * (ratio - ratio.log() + (mean - prior_mean) ** 2 / prior_var - 1).sum(dim=-1)


class scGMVAE(nn.Module):
    """Variational autoencoder whose prior is a Gaussian mixture with one component per cell type.

        q(z|x) = N(mean(x), diag var(x)),   p(z|k) = N(μ_k, diag σ_k²),   x ~ NB or ZINB(decoder(z))

    Args:
        n_genes: G. n_types: K. n_latent: D; K and D are independent.
        n_hidden: width of both hidden layers on either side (autoCell: 128-128).
        likelihood: ``nb`` or ``zinb``.
        dropout: in the hidden layers of encoder and decoder.
    """

    def __init__(self, n_genes, n_types, n_latent, n_hidden, likelihood, dropout):
        super().__init__()
        self.config = dict(
            n_genes=n_genes,
            n_types=n_types,
            n_latent=n_latent,
            n_hidden=n_hidden,
            likelihood=likelihood,
            dropout=dropout,
        )
        self.encoder = hidden_layers([n_genes, n_hidden, n_hidden], dropout)
        self.encode_mean = nn.Linear(n_hidden, n_latent)
        self.encode_var = nn.Linear(n_hidden, n_latent)
        self.decoder = CountDecoder(n_latent, [n_hidden] * 2, n_genes, likelihood, dropout)
        self.mu = nn.Parameter(torch.zeros(n_types, n_latent))
        self.log_var = nn.Parameter(torch.zeros(n_types, n_latent))

    @property
    def var(self):
        """σ_k² (K, D), positive by construction."""
        return self.log_var.exp()

    def encode(self, x):
        """q(z|x) of counts (B, G), dense or sparse: mean and variance, each (B, D)."""
        x = x.to_dense()
        library = x.sum(dim=1, keepdim=True).clamp(min=1.0)
        h = self.encoder(torch.log1p(x / library * DEPTH))  # (B, H)
        # Softplus grows linearly, so that an outlier cannot blow the variance up as exp would.
        return self.encode_mean(h), F.softplus(self.encode_var(h)) + 1e-4

    def kl(self, mean, var, codes=None):
        """KL(q(z|x) || prior) of each cell (B).

            KL = ½ Σ_d [ ln(σ²_kd / v_d) + (v_d + (m_d - μ_kd)²) / σ²_kd - 1 ]

        with k the type of the cell; without codes the prior is the standard normal.
        """
        if codes is None:
            return normal_kl(mean, var, torch.zeros_like(mean), torch.ones_like(var))
        return normal_kl(mean, var, self.mu[codes], self.var[codes])

    def mixture_kl(self, mean, var, log_weight):
        """KL of each cell (B) to the whole mixture, and responsibilities q(k|x) (B, K).

            KL = -ln Σ_k π_k exp(-KL_k),   q(k|x) = π_k exp(-KL_k) / Σ_j π_j exp(-KL_j)

        which is Σ_k q(k|x) KL_k + KL(q(k|x) || π) at its best q(k|x), as in VaDE (Jiang et al.,
        IJCAI 2017) and autoCell; KL_k is that to component k. For cells whose type is not known.

        Args:
            mean, var: (B, D). log_weight: ln π_k (K); -inf for components that are not in use.
        """
        each = normal_kl(mean[:, None], var[:, None], self.mu, self.var)  # (B, K)
        joint = log_weight - each
        return -joint.logsumexp(dim=1), joint.softmax(dim=1)

    def keep_types(self, kept):
        """Drop all components but these, in this order. kept: indices (K' of K)."""
        self.mu = nn.Parameter(self.mu.detach()[kept].clone())
        self.log_var = nn.Parameter(self.log_var.detach()[kept].clone())
        self.config["n_types"] = len(kept)

    @torch.no_grad()
    def fit_mixture(self, mean, var, codes):
        """Set μ_k, σ_k² to the moments of the cells' posteriors: the closed-form best prior.

            μ_k = E[m],   σ_k² = E[v] + Var[m]   over the cells of type k

        A type without cells keeps what it has. mean, var (N, D); codes (N).
        """
        for k in codes.unique():
            m, v = mean[codes == k], var[codes == k]
            self.mu[k] = m.mean(dim=0)
            self.log_var[k] = (v.mean(dim=0) + m.var(dim=0, unbiased=False)).log()


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
    cell, other data sets one in a hundred cells. A cell with more than MOST_SPIKES of them is
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
    far &= (np.bincount(X.row[far], minlength=X.shape[0]) <= MOST_SPIKES)[X.row]
    above = X.data[far] - np.round(mean[far]).astype(X.data.dtype)
    spikes = sp.csr_matrix((above, (X.row[far], X.col[far])), X.shape)
    lost = np.asarray(spikes.sum(axis=0), np.float64).ravel()
    return spikes, 1 - lost / np.maximum(total, 1)


def moments_of_counts(X, codes, library, n_types, seed):
    """Sums and second moments of the counts of each type, without spikes.

    Args:
        X: counts (N x G), CSR or backed. codes: their types (N). library: their totals (N) float64.
            seed: of MOST_IN_DISPERSION cells of larger types, which stand for all.

    Returns:
        ``(totals, moments, n_spikes)``: Σ x and E[x² - x] / E[l²], (K, G) float64 each, and the
        number of spikes.
    """
    rng, n_spikes = np.random.default_rng(seed), 0
    totals = sum_by_type(X, codes, n_types)
    moments = np.zeros_like(totals)
    for k in np.unique(codes):
        rows = np.flatnonzero(codes == k)
        if len(rows) > MOST_IN_DISPERSION:
            rows = np.sort(rng.choice(rows, MOST_IN_DISPERSION, replace=False))
        counts = X[rows]
        spikes, share = find_spikes(counts, library[rows])
        counts = (counts - spikes).astype(np.float64)
        pairs = np.asarray((counts.multiply(counts) - counts).sum(axis=0)).ravel()  # (G)
        moments[k] = pairs / (library[rows] ** 2).sum()
        totals[k] *= share
        n_spikes += spikes.nnz
    return totals, moments, n_spikes


class scDecoder(CountDecoder):
    """Stage 2: z -> counts of all genes, with the distributions that new cells are drawn from.

    Published shape: D -> h/2 -> h -> G. Beside the network it keeps for each cell type its Gaussian
    μ_k, σ_k²; the shape of its cells' distribution within that Gaussian (:meth:`fit_shape`); and
    its library sizes, as quantiles of their logarithm (:meth:`fit_library`).
    """

    def __init__(
        self,
        n_latent,
        n_hidden,
        n_genes,
        n_types,
        likelihood,
        dropout,
        n_components=1,
        n_quantiles=64,
    ):
        super().__init__(n_latent, [n_hidden // 2, n_hidden], n_genes, likelihood, dropout)
        self.config = dict(
            n_latent=n_latent,
            n_hidden=n_hidden,
            n_genes=n_genes,
            n_types=n_types,
            likelihood=likelihood,
            dropout=dropout,
            n_components=n_components,
            n_quantiles=n_quantiles,
        )
        self.register_buffer("mu", torch.zeros(n_types, n_latent))
        self.register_buffer("var", torch.ones(n_types, n_latent))
        # Until a shape is fitted, all components are the standard normal.
        shape = (n_types, n_components, n_latent)
        self.register_buffer("shape_weight", torch.full(shape[:2], 1 / n_components))  # (K, C)
        self.register_buffer("shape_mean", torch.zeros(shape))  # (K, C, D)
        self.register_buffer("shape_sd", torch.ones(shape))  # (K, C, D)
        self.register_buffer("log_library", torch.zeros(n_types, n_quantiles))
        # Until they are fitted (:meth:`fit_types`), the network and its dispersions decide.
        self.register_buffer("type_log_factor", torch.zeros(n_types, n_genes))
        self.register_buffer("type_log_theta", torch.zeros(n_types, n_genes))
        self.register_buffer("type_fitted", torch.zeros(n_types))

    @torch.no_grad()
    def fit_shape(self, mean, var, codes, seed):
        """Fit the distribution of each type's cells: a mixture of diagonal Gaussians.

            z = μ_k + σ_k e,   e ~ Σ_c w_kc N(m_kc, diag s_kc²),   E[e] = 0,   Var[e] = 1

        A rarer kind of cell inside a type skews its distribution, which one Gaussian cannot follow.
        Mean and variance of z remain μ_k and σ_k² whatever the shape. The mixture is fitted by EM
        to the posterior means; then the mean posterior variance is added to s², so that e is
        distributed as all posteriors together. A type with fewer than 6 cells per component gets
        fewer components.

        Args:
            mean, var: posteriors q(z|x) of the cells (N, D). codes (N). seed: of EM's start.
        """
        from sklearn.mixture import GaussianMixture

        generator = torch.Generator().manual_seed(seed)
        for k in codes.unique().tolist():
            in_type = codes == k
            if in_type.sum() < 2:  # the posterior of a single cell is N(μ_k, σ_k²) already
                continue
            if in_type.sum() > MOST_IN_SHAPE:
                of_type = torch.nonzero(in_type).flatten()
                order = torch.randperm(len(of_type), generator=generator)
                in_type = of_type[order[:MOST_IN_SHAPE]]
            e = ((mean[in_type] - self.mu[k].cpu()) / self.var[k].cpu().sqrt()).double()  # (n, D)
            noise = (var[in_type] / self.var[k].cpu()).double().mean(dim=0)  # (D)
            n = max(1, min(self.config["n_components"], len(e) // 6))
            # The floor of 0.02 σ² keeps components from collapsing onto single cells.
            fit = GaussianMixture(n, covariance_type="diag", reg_covar=0.02, n_init=3)
            fit.set_params(random_state=seed).fit(e.numpy())
            weight, m, s2 = (
                torch.as_tensor(v) for v in (fit.weights_, fit.means_, fit.covariances_)
            )
            s2 = s2 + noise
            center = weight @ m  # (D)
            scale = (weight @ (s2 + (m - center) ** 2)).sqrt()  # (D)
            self.shape_weight[k] = 0.0
            self.shape_weight[k, :n] = weight.to(self.shape_weight)
            self.shape_mean[k, :n] = ((m - center) / scale).to(self.shape_mean)
            self.shape_sd[k, :n] = (s2.sqrt() / scale).to(self.shape_sd)

    @torch.no_grad()
    def tilt_shape(self, mu, var):
        """How much of each part of a type's cloud samples have whose moments are not the type's.

        A cloud that holds control and stimulated cells is not moved as a whole: a stimulated sample
        has more of the one part. Of all weights that bring the mean of the parts to the sample's,
        those nearest to the type's own are (exponential tilting; Efron, The Annals of Statistics
        1981),

            w'_c ∝ w_c exp(λᵀ m_c),   max over λ of  λᵀ (μ̂ - μ_k) / σ_k - ln Σ_c w_c exp(λᵀ m_c)
                                                     - TILT_PENALTY / 2 ‖λ‖²

        by Newton's method. What they leave of the difference moves the cloud as a whole.

        Args:
            mu, var: of the types in each sample (S, K, D).

        Returns:
            ``(weight, center, scale)``: w' (S, K, C), and mean and sd of the parts so weighted
            (S, K, D). None if the moments are the types' own.
        """
        same = (torch.allclose(a, b, rtol=1e-4) for a, b in ((mu, self.mu), (var, self.var)))
        if all(same):
            return None
        parts = [self.tilt_weights(part) for part in mu.split(256)]  # in float64, hence not all
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def tilt_weights(self, mu):
        """As :meth:`tilt_shape`, of samples that may all have the types' own moments."""
        target = ((mu - self.mu) / self.var.sqrt()).double()  # (S, K, D)
        log_weight, m = self.shape_weight.double().log(), self.shape_mean.double()
        penalty = TILT_PENALTY * torch.eye(mu.shape[2], dtype=m.dtype, device=m.device)
        slope = torch.zeros_like(target)  # λ
        for _ in range(20):
            w = (log_weight + torch.einsum("skd,kcd->skc", slope, m)).softmax(dim=2)
            mean = torch.einsum("skc,kcd->skd", w, m)
            off = m - mean[:, :, None]  # (S, K, C, D)
            hessian = torch.einsum("skc,skcd,skce->skde", w, off, off) + penalty
            step = torch.linalg.solve(hessian, target - mean - TILT_PENALTY * slope)
            slope = slope + step.clamp(-2, 2)
        w = (log_weight + torch.einsum("skd,kcd->skc", slope, m)).softmax(dim=2)
        center = torch.einsum("skc,kcd->skd", w, m)
        square = torch.einsum("skc,kcd->skd", w, m**2 + self.shape_sd.double() ** 2)
        scale = (square - center**2).clamp(min=1e-6).sqrt()
        return tuple(part.to(mu) for part in (w, center, scale))

    def sample_latent(self, mu, var, codes, generator=None, tilt=None, sample=None):
        """Draw z (B, D) with mean mu and variance var, in the shape of each cell's type.

        mu, var (B, D), which a bulk may have moved from μ_k, σ_k²; codes (B). tilt: of
        :meth:`tilt_shape`, with sample: the row of it for each cell (B).
        """
        weight = self.shape_weight[codes] if tilt is None else tilt[0][sample, codes]  # (B, C)
        c = torch.multinomial(weight, 1, generator=generator).squeeze(1)  # (B)
        e = torch.randn(mu.shape, generator=generator, device=mu.device)  # (B, D)
        e = self.shape_mean[codes, c] + self.shape_sd[codes, c] * e
        if tilt is not None:
            e = (e - tilt[1][sample, codes]) / tilt[2][sample, codes]
        return mu + var.sqrt() * e

    @torch.no_grad()
    def fit_library(self, library, codes):
        """Keep the quantiles of log library size of each type; library (N) > 0, codes (N).

        A type without cells gets the quantiles of all cells.
        """
        level = torch.linspace(0, 1, self.log_library.shape[1], dtype=torch.float64)
        log_library = library.double().log().cpu()
        for k in range(self.log_library.shape[0]):
            in_type = log_library[codes.cpu() == k]
            in_type = in_type if len(in_type) else log_library
            self.log_library[k] = torch.quantile(in_type, level)

    def sample_library(self, codes, generator=None):
        """Draw a library size (B) for cells of types ``codes`` (B)."""
        n = self.log_library.shape[1] - 1
        u = torch.rand(codes.shape, generator=generator, device=codes.device) * n
        low = u.floor().clamp(max=n - 1).long()
        a, b = self.log_library[codes, low], self.log_library[codes, low + 1]
        return torch.exp(a + (u - low) * (b - a))

    @torch.no_grad()
    def fit_types(self, X, codes, n=1000, seed=0, shrink=False):
        """Match the mean and dispersion of each gene in each type to its cells, given new z.

            ln f_kg = ln( (Σ_i x_ig + ½) / (Σ_i l_i E[p_g] + ½) ),   then with p scaled by f
            1/θ_kg = w · max(0, E_i[x² - x] / (E_i[l²] E[p_g²]) - 1) + (1 - w) / θ_g,
            w = Σ_i x_ig / (Σ_i x_ig + 200)

        over the cells i of type k, with library sizes l and expected fractions p. Counts that stand
        far out of all others (:func:`find_spikes`) count as expected: they would move the mean and
        even more so the dispersion of everything that is drawn. A dispersion
        shared by all types makes the markers of a type too noisy in it, because it must also allow
        for the occasional cell of another type that expresses them. Only for ``nb``.

        Args:
            X: counts of the training cells (N x G), CSR or backed. codes: their types (N), a
                tensor.
            n: draws of z for each type. seed: of the draws, and of the cells that stand for large
                types (:func:`moments_of_counts`). shrink: the means of genes in types first, see
                :func:`shrink_means`.

        Returns:
            number of spikes.
        """
        if self.likelihood != "nb":
            return 0
        generator = torch.Generator(self.mu.device).manual_seed(seed)
        codes, library = codes.cpu().numpy(), library_size(X).astype(np.float64)
        *sums, n_spikes = moments_of_counts(X, codes, library, len(self.mu), seed)
        totals, moments = (torch.from_numpy(part).to(self.mu.device) for part in sums)  # (K, G)
        shrunk = shrink_means(totals) if shrink else totals
        for k in np.unique(codes):
            size, total = library[codes == k].sum(), totals[k]
            z = self.draw_latent_of_type(k, n, generator)
            fraction, _ = self.moments_of_fractions(z)
            factor = (shrunk[k] + 0.5) / (size * fraction + 0.5)
            self.type_log_factor[k] = factor.log().clamp(-math.log(10), math.log(10)).float()
            _, square = self.moments_of_fractions(z, self.type_log_factor[k])
            own = (moments[k] / square - 1).clamp(min=0)  # 1 / θ by moments (G)
            weight = total / (total + 200)  # of the type's moment against the shared dispersion
            inverse = weight * own + (1 - weight) / self.theta.double()  # (G)
            self.type_log_theta[k] = -inverse.clamp(1e-4, 1e4).log().float()
            self.type_fitted[k] = 1.0
        return n_spikes

    def moments_of_fractions(self, z, log_factor=None):
        """Means of p and p² over z (n, D), p the expected fractions of a cell's counts: (G) each.

        float64; in parts of z, as all (n, G) do not fit into a cache.
        """
        total = torch.zeros(2, self.config["n_genes"], dtype=torch.float64, device=z.device)
        for part in z.split(64):
            p, _ = self(part, torch.ones(len(part), device=z.device), log_factor)  # (b, G)
            total += torch.stack([p.sum(dim=0), p.square().sum(dim=0)])
        return total / len(z)

    def draw_latent_of_type(self, k, n, generator=None):
        """z (n, D) of n cells of type k."""
        codes = torch.full((n,), k, device=self.mu.device)
        return self.sample_latent(self.mu[codes], self.var[codes], codes, generator)

    def type_theta(self):
        """Dispersions of the genes in each type (K, G), by :meth:`fit_types` where it has run."""
        fitted = self.type_fitted[:, None] > 0  # types without cells are not
        return torch.where(fitted, self.type_log_theta, self.log_theta).exp()

    def sample_cells(self, z, library, codes, generator=None, log_factor=None):
        """Draw whole-number counts (B, G) of cells of types ``codes`` (B).

        As :meth:`sample`, with the means and dispersions of each type (:meth:`fit_types`);
        log_factor (B, G) is added to the former.
        """
        total_factor = self.type_log_factor[codes]  # (B, G)
        total_factor = total_factor if log_factor is None else total_factor + log_factor
        theta = self.type_theta()[codes] if self.likelihood == "nb" else None  # (B, G)
        return self.sample(z, library, generator, total_factor, theta)

    def sample_rows(self, z, library, codes, generator, log_factor=None, sample=None):
        """As :meth:`sample_cells`, as a CSR matrix (B, G) of int32.

        On CPU :mod:`runtime.sampler` needs no dense (B, G) of counts. log_factor: (S, G), with
        sample: the row of it for each cell (B).

        Raises:
            InputError: a count would not be finite or would be over 2^31 - 1.
        """
        if self.mu.is_cuda or self.likelihood == "mse_l1":
            factor = None if log_factor is None else log_factor[sample]
            return to_csr(self.sample_cells(z, library, codes, generator, factor))
        from runtime.sampler import sample_csr  # compiles, so only when needed

        seed = int(torch.randint(2**62, (1,), generator=generator))
        dropout, theta = None, self.type_theta()
        if self.likelihood == "zinb":
            theta = self.theta.expand(len(self.mu), -1)
            dropout = self.dropout_logits.weight, self.dropout_logits.bias
        return sample_csr(
            *(self.hidden(z), self.out.weight, self.out.bias + self.type_log_factor, theta),
            *(codes, library, seed, log_factor, sample, dropout),
        )

    @torch.no_grad()
    def type_means(self, n=500, seed=0):
        """Expected counts of a cell of each type (K, G): means over n draws of z and library."""
        generator = torch.Generator(self.mu.device).manual_seed(seed)
        means = []
        for k in range(len(self.mu)):
            z = self.draw_latent_of_type(k, n, generator)
            library = self.sample_library(torch.full((n,), k, device=z.device), generator)
            mean, dropout_logits = self(z, library, self.type_log_factor[k])  # (n, G)
            if dropout_logits is not None:
                mean = mean * torch.sigmoid(-dropout_logits)
            means.append(mean.mean(dim=0))
        return torch.stack(means)


class BulkEncoder(nn.Module):
    """Stage 3: bulk profile (S, G) -> μ̂_k, σ̂_k² (S, K, D) and proportions π̂ (S, K).

    Published shape: G -> hidden -> three heads, on a bulk that is depth-normalised and standardised
    gene by gene, so that its scale does not matter. A bulk is a sum of cells, so non-negative
    deconvolution with the cell types' mean counts (:meth:`deconvolve`) gives initial proportions,
    and the mixture initial moments. The network learns corrections:

        π̂ = softmax( ln(π_first + ε) + head(h) ),   μ̂_k = μ_k + head(h),   σ̂_k² = σ_k² exp(head(h))

    A reference of several samples also teaches how their states show in a bulk: in how far genes
    lie off what the first proportions explain (:mod:`states.directions`). With R such directions,

        t = A (ln((p + ε) / (q + ε)) - c)
        μ̂_k = μ_k + σ_k Σ_r t_r M_rk,   ln σ̂_k² = ln σ_k² + Σ_r t_r V_rk

    for a bulk's fractions p and q = π_first S, and the network corrects that in the same way.
    """

    def __init__(
        self,
        n_genes,
        n_types,
        n_latent,
        n_hidden,
        dropout,
        n_iterations=100,
        n_state=0,
        momentum=0.0,
    ):
        super().__init__()
        self.config = dict(
            n_genes=n_genes,
            n_types=n_types,
            n_latent=n_latent,
            n_hidden=n_hidden,
            dropout=dropout,
            n_iterations=n_iterations,
        )
        # Files of references without samples, and of models without momentum, stay as they were.
        self.config |= {"n_state": n_state} if n_state else {}
        self.config |= {"momentum": momentum} if momentum else {}
        self.n_state, self.momentum = n_state, momentum
        self.hidden = hidden_layers([n_genes, n_hidden], dropout)
        self.mu_head = nn.Linear(n_hidden, n_types * n_latent)
        self.var_head = nn.Linear(n_hidden, n_types * n_latent)
        self.pi_head = nn.Linear(n_hidden, n_types)
        # Heads start at zero: every bulk gets the mixture's moments, and deconvolution alone
        # decides on proportions, until the heads have learned to correct them.
        for head in (self.mu_head, self.var_head, self.pi_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.log_weight = nn.Parameter(torch.zeros(n_genes))
        self.register_buffer("mu", torch.zeros(n_types, n_latent))  # mixture it was trained for
        self.register_buffer("var", torch.ones(n_types, n_latent))
        self.register_buffer("signature", torch.full((n_types, n_genes), 1 / n_genes))
        self.register_buffer("profile", torch.full((n_genes,), 1 / n_genes))
        self.register_buffer("center", torch.zeros(n_genes))
        self.register_buffer("scale", torch.ones(n_genes))
        if n_state:
            shape = (n_state, n_types, n_latent)
            self.register_buffer("state_center", torch.zeros(n_genes))
            self.register_buffer("state_weight", torch.zeros(n_genes, n_state))  # Aᵀ
            self.register_buffer("state_share", torch.full((n_genes, n_state), 1 / n_genes))
            self.register_buffer("state_mu", torch.zeros(shape))
            self.register_buffer("state_log_var", torch.zeros(shape))

    @torch.no_grad()
    def fit_input(self, bulk, signature):
        """Set signature, mean profile and the standardisation of genes from training data.

        Args:
            bulk: training bulks (S, G), which give the centre and spread of each gene.
            signature: mean counts of the cells of each type (K, G). Not depth-normalised: a type
                with twice the mRNA weighs twice in a bulk for the same number of cells.
        """
        self.signature.copy_(self.scale_signature(signature))
        self.profile.copy_((bulk / bulk.sum(dim=1, keepdim=True)).mean(dim=0))
        x = torch.log1p(self.normalise(bulk, torch.ones_like(self.profile)) * DEPTH)
        self.center.copy_(x.mean(dim=0))
        # The floor keeps genes that hardly vary in training from dominating a bulk of another lab.
        self.scale.copy_(x.std(dim=0).clamp(min=0.1))

    @staticmethod
    def scale_signature(signature):
        """Mean counts (K, G) over the mean total of the types, which keep their mRNA content."""
        return signature / signature.sum(dim=1).mean()

    def normalise(self, bulk, measured):
        """Fractions of all counts (S, G), as if absent genes had their usual share of them.

        Otherwise a bulk that lacks highly expressed genes would read too high in all others.
        """
        share = (self.profile * measured).sum()
        total = (bulk * measured).sum(dim=1, keepdim=True)
        return bulk * measured / total * share

    @property
    def floor(self):
        """ε: a fiftieth of the mean gene, as ratios of genes with hardly any counts are noise."""
        return 0.02 / len(self.profile)

    def ratio_to(self, expected, fractions, measured):
        """ln((p + ε) / (q + ε)) of fractions p (S, G) to q, expected (S, G) on any scale."""
        q = self.normalise(expected, measured)
        ratio = torch.log((fractions + self.floor) / (q + self.floor)) * measured
        return ratio.clamp(-4, 4)

    def deviation(self, pi, bulk, measured):
        """Robust sd (S) of the log-ratios of genes of bulks (S, G) to what pi (S, K) explains."""
        measured = measured.to(bulk.dtype)
        ratio = self.ratio_to(pi @ self.signature, self.normalise(bulk, measured), measured)
        ratio = ratio[:, measured > 0]
        if ratio.shape[1] == 0:
            return ratio.new_zeros(len(ratio))
        median = ratio.median(dim=1, keepdim=True).values
        return 1.4826 * (ratio - median).abs().median(dim=1).values

    def state(self, ratio, measured):
        """t (S, R), where bulks stand along the directions in which the reference's samples differ.

        Genes that were not measured would pull t to 0, so it is divided by the share of it that the
        others usually carry. ratio: of :meth:`ratio_to` (S, G). measured: (G).
        """
        share = measured @ self.state_share  # (R)
        t = ((ratio - self.state_center) * measured) @ self.state_weight
        return t / share.clamp(min=0.25)

    def deconvolve(self, fractions, measured, signature=None, start=None, n_iterations=None):
        """Proportions of cells by :mod:`deconvolution.itakura_saito`, with learned gene weights.

        Args:
            fractions: (S, G). measured: (G). signature: (K, G), default the model's. start:
                proportions (S, K) to start from; default the same of each type. n_iterations:
                default the model's.

        Returns:
            (S, K), rows summing to 1.
        """
        S = self.signature if signature is None else signature  # (K, G)
        there = torch.nonzero(measured).flatten()  # others would only be multiplied by 0
        n = self.config["n_iterations"] if n_iterations is None else n_iterations
        weight = self.log_weight[there].exp() * measured[there]
        given = fractions[:, there], S[:, there], self.floor, n, weight
        return itakura_saito.solve(*given, start, self.momentum)

    def forward(self, bulk, measured=None, one_platform=False, start=None):
        """Args:
            bulk: (S, G), any scale, positive sums. measured: mask (G) of measured genes, default
                all. one_platform: the bulks are of one platform, and not the reference's. Their
                proportions are those of :meth:`deconvolve_cohort`, without the network's
                correction: what it learned on simulated platforms does not carry over. start:
                proportions (S, K) that the bulks are near to, so that a quarter of the updates
                will do.

        Returns:
            ``(mu, var, pi)``: (S, K, D), (S, K, D) positive, (S, K) rows summing to 1.
        """
        measured = torch.ones_like(self.profile) if measured is None else measured.to(bulk.dtype)
        fractions = self.normalise(bulk, measured)  # (S, G)
        if one_platform:
            first = self.deconvolve_cohort(fractions, measured)  # (S, K)
            mu, var, _ = self.correct(first, fractions, measured)
            return mu, var, first
        n_iterations = None if start is None else self.config["n_iterations"] // 4
        first = self.deconvolve(fractions, measured, start=start, n_iterations=n_iterations)
        return self.correct(first, fractions, measured)

    def correct(self, first, fractions, measured, signature=None):
        """What the network makes of deconvolved proportions: see :meth:`forward`.

        The network does not train the gene weights, which have a loss of their own: together they
        would leave to the network what weights can do, and it carries over to other platforms less.

        Args:
            first: of :meth:`deconvolve` (S, K). fractions: (S, G). measured: (G).
        """
        first = first.detach()
        x = (torch.log1p(fractions * DEPTH) - self.center) / self.scale
        # A gene not measured counts as average, and no gene goes far beyond what training has seen.
        h = self.hidden(x.clamp(-6, 6) * measured)  # (S, H)
        shape = (len(first), self.config["n_types"], self.config["n_latent"])
        mu, log_var = self.mu, self.var_head(h).view(shape)
        if self.n_state:
            S = self.signature if signature is None else signature  # (K, G)
            ratio = self.ratio_to(first @ S, fractions, measured)  # (S, G)
            t = self.state(ratio, measured)  # (S, R)
            mu = mu + self.var.sqrt() * torch.einsum("sr,rkd->skd", t, self.state_mu)
            log_var = log_var + torch.einsum("sr,rkd->skd", t, self.state_log_var)
        mu = mu + self.mu_head(h).view(shape)
        # Regression: unconstrained, a negative variance became NaN under the square root.
        var = self.var * torch.exp(log_var.clamp(-5, 5))
        return mu, var, torch.softmax(torch.log(first + 1e-3) + self.pi_head(h), dim=-1)

    def platform_offset(self, first, fractions, measured):
        """What all bulks of a table share against the sum of the types: log factors of genes (G).

            P_g = τ² / (τ² + e_g² / S) · median_s r_sg,   r = ln((p + ε) / (q + ε)),  τ = 0.5

        with e_g² the mean squared deviation of r_sg from its median. The mean composition of a
        cohort cannot be told from its platform, but how its samples differ can: without their
        common part, genes say so with less noise.

        Args:
            first: of :meth:`deconvolve` (S, K). fractions: (S, G). measured: (G).
        """
        r = self.ratio_to(first @ self.signature, fractions, measured)  # (S, G)
        median = r.median(dim=0).values
        error = ((r - median) ** 2).mean(dim=0)
        return median * PLATFORM_VAR / (PLATFORM_VAR + error / len(r))

    def deconvolve_cohort(self, fractions, measured):
        """:meth:`deconvolve` of bulks of one platform, whose common deviation is taken off first.

        The cohort's mean proportions stay those of :meth:`deconvolve`. (S, G), (G) -> (S, K).
        """
        first = self.deconvolve(fractions, measured)  # (S, K)
        if len(first) < SMALLEST_COHORT:
            return first
        offset = self.platform_offset(first, fractions, measured)  # (G)
        moved = ((fractions + self.floor) * torch.exp(-offset) - self.floor).clamp(min=0) * measured
        moved = moved / moved.sum(dim=1, keepdim=True) * fractions.sum(dim=1, keepdim=True)
        second = self.deconvolve(moved, measured)
        second = second * ((first.mean(dim=0) + 1e-4) / (second.mean(dim=0) + 1e-4))
        return second / second.sum(dim=1, keepdim=True)
