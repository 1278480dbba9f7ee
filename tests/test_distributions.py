"""Log-probabilities against scipy, and samplers against the distributions they draw from."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from distributions.negative_binomial import (
    NegativeBinomial,
    NegativeBinomialLoss,
    ZeroInflatedNegativeBinomial,
    nb_log_prob,
    sample_nb,
    sample_zinb,
    zinb_log_prob,
)

COUNTS = [0, 1, 2, 5, 30, 259, 5000, 100_000]
MEANS = [1e-8, 1e-3, 0.3, 1.0, 17.0, 900.0, 1e5]
THETAS = [1e-6, 1e-2, 0.5, 3.0, 29.9, 30.1, 1e3, 1e4, 1e6, 1e8]
GRID = np.array(list(itertools.product(COUNTS, MEANS, THETAS)))


def scipy_nb(x, mean, theta):
    """Log-probability of the negative binomial, in scipy's parametrisation.

    scipy loses digits at theta >= 1e6, where p = theta / (theta + mean) is close to 1. Such values
    are compared with :func:`mp_nb`.
    """
    return scipy.stats.nbinom.logpmf(x, theta, theta / (theta + mean))


def mp_nb(x, mean, theta):
    """Log-probability of the negative binomial, computed with fifty digits."""
    mp = pytest.importorskip("mpmath").mp
    mp.dps = 50
    x, m, t = mp.mpf(float(x)), mp.mpf(float(mean)), mp.mpf(float(theta))
    return float(
        mp.loggamma(x + t)
        - mp.loggamma(t)
        - mp.loggamma(x + 1)
        + t * mp.log(t / (t + m))
        + x * mp.log(m / (t + m))
    )


def test_nb_log_prob_matches_scipy():
    x, mean, theta = GRID[(GRID[:, 2] <= 1e4) & (GRID[:, 1] >= 1e-3)].T
    ours = nb_log_prob(*(torch.tensor(v) for v in (x, mean, theta))).numpy()
    np.testing.assert_allclose(ours, scipy_nb(x, mean, theta), rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_nb_log_prob_holds_at_extremes(dtype, rtol):
    """The error is at most rounding in terms of order x ln x, even at theta = 1e8."""
    x, mean, theta = (torch.tensor(v, dtype=dtype) for v in GRID.T)
    ours = nb_log_prob(x, mean, theta).double().numpy()
    exact = np.array([mp_nb(*row) for row in zip(x, mean, theta, strict=True)])
    scale = np.abs(exact) + x.double().numpy() * np.log1p(x.double().numpy()) + 1
    assert np.isfinite(ours).all()
    assert (np.abs(ours - exact) / scale).max() < rtol


def autograd_loss(logits, log_theta, library, x):
    """What NegativeBinomialLoss is, with gradients by autograd."""
    mean = library[:, None] * torch.softmax(logits, dim=1)
    return -nb_log_prob(x.to_dense(), mean, log_theta.exp()).sum(dim=1)


def test_nb_loss_of_whole_cells_is_the_sum_over_genes():
    """Values and written gradients, also for a cell without counts and for θ from 0.01 to 1e6."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(6, 40, generator=generator, dtype=torch.float64)
    library = torch.tensor([1.0, 50, 300, 1000, 5000, 20_000], dtype=torch.float64)
    x = torch.poisson(library[:, None] * logits.softmax(dim=1), generator=generator)
    x[2] = 0
    log_theta = torch.logspace(-2, 6, 40, dtype=torch.float64).log()
    results, weight = [], torch.arange(1.0, 7.0, dtype=torch.float64)
    for loss in (NegativeBinomialLoss.apply, autograd_loss):
        leaves = [v.clone().requires_grad_() for v in (logits, log_theta)]
        value = loss(*leaves, library, x.to_sparse())
        (weight * value).sum().backward()  # cells of different weight
        results.append((value.detach(), *(leaf.grad for leaf in leaves)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-7)


def test_nb_with_large_theta_is_poisson():
    x = torch.arange(20.0)
    mean = torch.tensor(4.0)
    ours = nb_log_prob(x, mean, torch.tensor(1e8))
    np.testing.assert_allclose(ours, scipy.stats.poisson.logpmf(x, 4.0), atol=2e-5)


def test_nb_log_prob_at_mean_zero():
    x, zero = torch.tensor([0.0, 1.0]), torch.tensor(0.0)
    for theta in (0.5, 1e5):
        assert nb_log_prob(x, zero, torch.tensor(theta)).tolist() == [0.0, -np.inf]


def test_nb_gradients_are_finite_at_extremes():
    x, mean, theta = (torch.tensor(v, dtype=torch.float32) for v in GRID.T)
    mean.requires_grad_()
    theta.requires_grad_()
    nb_log_prob(x, mean, theta).sum().backward()
    assert torch.isfinite(mean.grad).all() and torch.isfinite(theta.grad).all()
    mean = torch.zeros(3, requires_grad=True)
    theta = torch.tensor([0.5, 30.0, 1e5], requires_grad=True)
    nb_log_prob(torch.zeros(3), mean, theta).sum().backward()
    torch.testing.assert_close(mean.grad, -torch.ones(3))
    assert torch.isfinite(mean.grad).all() and torch.isfinite(theta.grad).all()


def test_nb_gradient_is_right():
    x = torch.tensor([0.0, 3.0, 40.0], dtype=torch.float64)
    mean = torch.tensor([0.5, 2.0, 60.0], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([0.2, 5.0, 300.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, t: nb_log_prob(x, m, t), (mean, theta))


@pytest.mark.parametrize("logit", [-40.0, -3.0, 0.0, 2.0, 40.0])
def test_zinb_log_prob_matches_scipy(logit):
    x, mean, theta = GRID[(GRID[:, 2] <= 1e4) & (GRID[:, 1] >= 1e-3)].T
    ours = zinb_log_prob(
        *(torch.tensor(v) for v in (x, mean, theta)), torch.tensor(logit, dtype=torch.float64)
    ).numpy()
    log_pi, log_not = scipy.special.log_expit(logit), scipy.special.log_expit(-logit)
    nb = scipy_nb(x, mean, theta) + log_not
    expected = np.where(x == 0, np.logaddexp(log_pi, nb), nb)
    np.testing.assert_allclose(ours, expected, rtol=1e-8, atol=1e-7)


def test_zinb_probabilities_sum_to_one_and_use_the_prediction():
    """Regression: the published ZINB loss did not depend on the predicted mean."""
    x = torch.arange(400, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    for mean in (0.5, 8.0):
        log_p = zinb_log_prob(x, mean * one, 2 * one, -one)
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    near, far = (zinb_log_prob(8 * one, m * one, 2 * one, -one) for m in (8.0, 800.0))
    assert near > far


@pytest.mark.parametrize(
    ("mean", "theta"),
    [(0.05, 0.2), (0.9, 1e6), (3.0, 0.05), (7.9, 2.0), (8.1, 2.0), (60.0, 0.7), (500.0, 1e5)],
)
def test_sampler_draws_the_negative_binomial(mean, theta):
    """Chi-squared over bins of at least 20 expected draws, on both sides of the switch at 8."""
    n = 40_000
    generator = torch.Generator().manual_seed(1)
    draws = sample_nb(torch.full((n // 100, 100), mean), torch.tensor(theta), generator)
    draws = draws.numpy().astype(int).ravel()
    distribution = scipy.stats.nbinom(theta, theta / (theta + mean))
    edges = np.unique(distribution.ppf(np.linspace(0.001, 0.999, 40)))
    probability = np.diff(np.concatenate([[0], distribution.cdf(edges), [1]]))
    observed = np.bincount(np.searchsorted(edges, draws), minlength=len(edges) + 1)
    keep = probability * n >= 20
    observed = np.append(observed[keep], observed[~keep].sum())
    expected = np.append(probability[keep], probability[~keep].sum()) * n
    if expected[-1] < 20:  # too few to test
        observed, expected = (
            observed[:-1],
            expected[:-1] * observed[:-1].sum() / expected[:-1].sum(),
        )
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-4


def test_sampler_moments_zeros_and_generator():
    mean = torch.tensor([0.0, 0.2, 4.0, 40.0]).repeat(20_000, 1)
    theta = torch.tensor([1.0, 0.5, 3.0, 10.0])
    draws = sample_nb(mean, theta, torch.Generator().manual_seed(0))
    assert torch.equal(draws, draws.round()) and (draws >= 0).all()
    assert (draws[:, 0] == 0).all()
    torch.testing.assert_close(draws.mean(0), mean[0], rtol=0.05, atol=0)
    torch.testing.assert_close(draws.var(0), mean[0] + mean[0] ** 2 / theta, rtol=0.1, atol=0)
    repeated = sample_nb(mean, theta, torch.Generator().manual_seed(0))
    assert torch.equal(draws, repeated)


def test_zinb_sampler_inflates_zeros():
    mean, theta = torch.full((20_000, 1), 30.0), torch.tensor([5.0])
    draws = sample_zinb(mean, theta, torch.zeros(20_000, 1), torch.Generator().manual_seed(0))
    assert (draws == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("family", [NegativeBinomial, ZeroInflatedNegativeBinomial])
def test_mean_loss_and_draws_of_an_object_are_of_one_distribution(family):
    g = torch.Generator().manual_seed(0)
    logits, dropout_logits, log_factor = (torch.randn(1, 6, generator=g) for _ in range(3))
    rows = [part.expand(20_000, -1) for part in (dropout_logits, log_factor)]
    library, log_theta = torch.full((20_000,), 60.0), torch.ones(6)
    counts = family(logits, library, log_theta, *rows)
    x = counts.sample(g)
    torch.testing.assert_close(x.mean(dim=0), counts.mean[0], rtol=0.05, atol=0.05)
    assert counts.mu[0].sum().item() == pytest.approx(60, rel=1e-5)
    expected = -counts.log_prob(x).sum(dim=1)
    torch.testing.assert_close(counts.loss(x.to_sparse()), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(counts.loss(x), counts.loss(x.to_sparse()))


def test_gradients_of_a_large_batch_repeat_to_the_bit():
    """Regression: two threads summed the gradients of dispersions in no fixed order.

    It takes some 32,000 counts a batch, which small data never has.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((64, 2000), 1.0), generator).to_sparse()
    logits, library = torch.randn(x.shape, generator=generator), torch.full((64,), 2000.0)
    gradients, old_n_threads = set(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(10):
            leaves = [logits.clone().requires_grad_(), torch.zeros(2000, requires_grad=True)]
            NegativeBinomialLoss.apply(*leaves, library, x).sum().backward()
            gradients.add(b"".join(leaf.grad.numpy().tobytes() for leaf in leaves))
    finally:
        torch.set_num_threads(old_n_threads)
    assert len(gradients) == 1
