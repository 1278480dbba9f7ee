"""The published regression, with the interface of a distribution."""

import torch.nn.functional as F


class Regression:
    """Expected counts x̂ = ReLU(logits), fitted by squared and absolute errors.

    It is no distribution: it has no ``log_prob``, its draws are x̂ rounded, and the library size has
    no influence. Arguments as :class:`distributions.negative_binomial.NegativeBinomial` takes them.
    """

    has_theta, has_dropout = False, False

    def __init__(self, logits, library, log_theta=None, dropout_logits=None, log_factor=None):
        self.logits, self.log_factor, self.dropout_logits = logits, log_factor, dropout_logits

    @property
    def mean(self):
        """x̂ (B, G)."""
        counts = F.relu(self.logits)
        return counts if self.log_factor is None else counts * self.log_factor.exp()

    mu = mean

    def loss(self, x):
        """Σ_g (x_g - x̂_g)² + |x_g - x̂_g| of each cell (B). x: counts (B, G), dense or sparse."""
        error = x.to_dense() - self.mean
        return (error**2 + error.abs()).sum(dim=1)

    def sample(self, generator=None):
        """x̂ rounded (B, G)."""
        return self.mean.round()
