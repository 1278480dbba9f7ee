"""The negative binomial and its zero-inflated form, as objects and as functions.

Notation in shape comments: B cells, G genes.

An object is the distribution of the counts of cells, made of what a decoder gives for them. It has
``mean`` (B, G), ``log_prob(x)`` (B, G), ``loss(x)`` (B) and ``sample(generator)`` (B, G), as those
of scvi-tools (Gayoso et al., Nature Biotechnology 2022).
"""

import torch
import torch.nn.functional as F


class NegativeBinomial:
    """Counts with mean μ = library · softmax(logits) and variance μ + μ² / θ.

    Args:
        logits: (B, G). library: (B). log_theta: ln θ (G) or (B, G). dropout_logits: (B, G), for the
            zero-inflated form alone. log_factor: (B, G), added to the logarithm of each gene's
            mean, before the genes of a cell are scaled to its library size.
    """

    has_theta, has_dropout = True, False

    def __init__(self, logits, library, log_theta, dropout_logits=None, log_factor=None):
        self.logits = logits if log_factor is None else logits + log_factor
        self.library = library.clamp(min=1.0)  # a cell may have no counts in these genes
        self.log_theta, self.dropout_logits = log_theta, dropout_logits

    @property
    def mu(self):
        """μ (B, G); it is the mean before zeros are inflated."""
        # A softmax that underflows must not give mean 0, under which any count is impossible.
        mu = self.library[:, None] * torch.softmax(self.logits, dim=-1)
        return mu.clamp(min=1e-10)

    @property
    def theta(self):
        """θ, positive (G) or (B, G)."""
        return self.log_theta.exp()

    @property
    def mean(self):
        """Expected counts (B, G)."""
        return self.mu

    def log_prob(self, x):
        """Log-probability of counts (B, G), dense -> (B, G)."""
        return nb_log_prob(x, self.mu, self.theta)

    def loss(self, x):
        """-Σ_g log p(x_g) of each cell (B). x: counts (B, G), dense or sparse COO."""
        return NegativeBinomialLoss.apply(self.logits, self.log_theta, self.library, x.to_sparse())

    def sample(self, generator=None):
        """Draw counts (B, G)."""
        return sample_nb(self.mu, self.theta, generator)


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """A :class:`NegativeBinomial` count, or 0 with probability π = sigmoid(dropout_logits)."""

    has_dropout = True

    @property
    def mean(self):
        """(1 - π) μ (B, G)."""
        return self.mu * torch.sigmoid(-self.dropout_logits)

    def log_prob(self, x):
        """Log-probability of counts (B, G), dense -> (B, G)."""
        return zinb_log_prob(x, self.mu, self.theta, self.dropout_logits)

    def loss(self, x):
        """-Σ_g log p(x_g) of each cell (B). x: counts (B, G), dense or sparse COO."""
        return -self.log_prob(x.to_dense()).sum(dim=1)

    def sample(self, generator=None):
        """Draw counts (B, G)."""
        return sample_zinb(self.mu, self.theta, self.dropout_logits, generator)


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


# What runtime.sampler draws on a CPU; any other distribution draws by its own ``sample``.
COMPILED = (NegativeBinomial, ZeroInflatedNegativeBinomial)
