"""The networks' shapes and invariances, and the files they are saved in."""

import copy
import math

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.sparse as sp
import scipy.stats
import torch

from conftest import make_cells
from data import DatasetSettings, Reference
from deconvolution.encode import encode_bulks
from deconvolution.expression import calibration
from deconvolution.fit import bulk_fit, misfit, sum_agreement
from deconvolution.samples import add_to_sums
from distributions.fits import find_spikes, fit_dispersion, mean_profile
from generation import decode_cells
from models import BulkEncoder, scDecoder, scGMVAE
from runtime.errors import InputError
from runtime.weights import load_mixture, load_model, save_mixture, save_model
from states.weights import fit_states
from train_encoder import encoder_losses

G, K, D = 40, 3, 7  # all different, so that swapped axes fail


def decoder(likelihood="nb"):
    return scDecoder(D, 32, G, K, likelihood, dropout=0.1).eval()


def encoder():
    return BulkEncoder(G, K, D, 16, dropout=0.1).eval()


def save(path, model):
    card = dict(
        genes=[f"g{i}" for i in range(G)],
        cell_types=["a", "b", "c"],
        held_out=["cell 1"],
        held_out_fraction=0.2,
        epoch=3,
    )
    save_model(path, model, DatasetSettings(seed=5), **card)
    return card


# ---------------------------------------------------------------------------------- scGMVAE


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_gmvae_with_more_latents_than_types_and_fewer(likelihood):
    """Regression: the published code works only when K = D."""
    for n_types, n_latent in ((3, 7), (12, 2), (1, 1)):
        model = scGMVAE(G, n_types, n_latent, 16, likelihood, 0.1)
        x = torch.poisson(torch.full((5, G), 3.0))
        mean, var = model.encode(x)
        assert mean.shape == var.shape == (5, n_latent) and (var > 0).all()
        codes = torch.arange(5) % n_types
        assert model.kl(mean, var, codes).shape == (5,)
        assert model.decoder.loss(x, mean, x.sum(1)).shape == (5,)
        assert model.mu.shape == model.var.shape == (n_types, n_latent)


def test_kl_matches_torch_distributions():
    torch.manual_seed(0)
    model = scGMVAE(G, K, D, 16, "nb", 0.0)
    model.mu.data.normal_()
    model.log_var.data.normal_()
    mean, var, codes = torch.randn(6, D), torch.rand(6, D) + 0.1, torch.tensor([0, 1, 2, 2, 1, 0])
    q = torch.distributions.Normal(mean, var.sqrt())
    for labels, prior in (
        (codes, torch.distributions.Normal(model.mu[codes], model.var[codes].sqrt())),
        (None, torch.distributions.Normal(torch.zeros(6, D), torch.ones(6, D))),
    ):
        expected = torch.distributions.kl_divergence(q, prior).sum(1)
        torch.testing.assert_close(model.kl(mean, var, labels), expected, rtol=1e-4, atol=1e-5)


def test_fitted_mixture_is_the_best_prior():
    """The closed form has a lower mean KL than nearby mixtures."""
    torch.manual_seed(0)
    model = scGMVAE(G, K, D, 16, "nb", 0.0)
    mean, var, codes = torch.randn(90, D) * 3, torch.rand(90, D), torch.arange(90) % K
    model.fit_mixture(mean, var, codes)
    best = model.kl(mean, var, codes).mean()
    for parameter in (model.mu, model.log_var):
        for step in (-0.05, 0.05):
            parameter.data += step
            assert model.kl(mean, var, codes).mean() > best
            parameter.data -= step


def test_encoding_does_not_depend_on_the_cells_beside_it():
    model = scGMVAE(G, K, D, 16, "nb", 0.1).eval()
    x = torch.poisson(torch.full((5, G), 3.0))
    torch.testing.assert_close(model.encode(x)[0][2], model.encode(x[2:3])[0][0])


# -------------------------------------------------------------------------------- scDecoder


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "mse_l1"])
def test_decoder_draws_counts(likelihood):
    """Regression: the published output was the ReLU of a regression, not counts."""
    x = decoder(likelihood).sample(torch.randn(9, D), torch.full((9,), 500.0))
    assert x.shape == (9, G) and (x >= 0).all() and torch.equal(x, x.round())


def test_decoder_mean_adds_up_to_the_library_size():
    """Regression: generated cells had about 40 counts where real ones have thousands."""
    model = decoder()
    mean, _ = model(torch.randn(4, D), torch.tensor([10.0, 500.0, 6000.0, 1e5]))
    torch.testing.assert_close(mean.sum(1), torch.tensor([10.0, 500.0, 6000.0, 1e5]))
    draws = model.sample(torch.randn(4000, D), torch.full((4000,), 6000.0))
    assert draws.sum(1).mean().item() == pytest.approx(6000, rel=0.05)


def test_published_loss_is_sums_of_squares_and_absolutes():
    model = decoder("mse_l1")
    x, z = torch.poisson(torch.full((3, G), 2.0)), torch.randn(3, D)
    error = x - model(z, x.sum(1))[0]
    expected = (error.pow(2) + error.abs()).sum(1)
    torch.testing.assert_close(model.loss(x, z, x.sum(1)), expected)


def test_library_sizes_follow_their_own_cell_type():
    torch.manual_seed(0)
    codes = torch.arange(3000) % K
    library = torch.exp(torch.randn(3000) * 0.4 + torch.tensor([5.0, 7.0, 9.0])[codes])
    model = decoder()
    model.fit_library(library, codes)
    drawn = model.sample_library(codes, torch.Generator().manual_seed(0))
    for k in range(K):
        for q in (0.1, 0.5, 0.9):
            sampled, real = drawn[codes == k].quantile(q), library[codes == k].quantile(q)
            assert sampled.item() == pytest.approx(real.item(), rel=0.1)
    assert drawn.max() <= library.max() * 1.001 and drawn.min() >= library.min() * 0.999


def test_untrained_decoder_starts_at_the_mean_profile():
    cells = make_cells(n_genes=G)
    model = decoder()
    profile = mean_profile(cells.X)
    model.start_at(profile)
    mean, _ = model(torch.zeros(1, D), torch.ones(1))
    assert np.corrcoef(mean[0].detach().log(), profile.log())[0, 1] > 0.99


def test_latents_are_drawn_in_the_shape_of_each_type():
    """A rare subpopulation of a type is drawn at its observed frequency."""
    torch.manual_seed(0)
    mean = torch.cat([0.5 * torch.randn(200, D), torch.randn(200, D), torch.randn(5, D)])
    mean[:40, 0] += 4  # a fifth of type 0 is a separate subpopulation
    var, codes = torch.full_like(mean, 0.05), torch.tensor([0] * 200 + [1] * 200 + [2] * 5)
    model = scDecoder(D, 32, G, K, "nb", 0.0, n_components=3)
    for k in range(K):
        of_type = mean[codes == k]
        model.mu[k], model.var[k] = of_type.mean(0), 0.05 + of_type.var(0, unbiased=False)
    model.fit_shape(mean, var, codes, seed=0)

    # The shape has exactly the mean and variance of a standard normal.
    weight = model.shape_weight[:, :, None]
    first = (weight * model.shape_mean).sum(1)
    second = (weight * (model.shape_sd**2 + model.shape_mean**2)).sum(1)
    torch.testing.assert_close(first, torch.zeros(K, D), atol=1e-5, rtol=0)
    torch.testing.assert_close(second, torch.ones(K, D), atol=1e-5, rtol=0)
    # Five cells are too few for more than one component.
    assert model.shape_weight[2].tolist() == [1, 0, 0]

    # The draws follow the moments of the bulk, not those of the type.
    n = 20_000
    mu, var = torch.full((n, D), 3.0), torch.full((n, D), 4.0)
    for k, expected in ((0, 0.2), (1, 0.115), (2, 0.115)):
        z = model.sample_latent(mu, var, torch.full((n,), k))
        torch.testing.assert_close(z.mean(0), torch.full((D,), 3.0), atol=0.08, rtol=0)
        torch.testing.assert_close(z.std(0), torch.full((D,), 2.0), atol=0.08, rtol=0)
        # The subpopulation lies around 1.9 sd; 11.5 % of a normal distribution lie beyond 1.2 sd.
        beyond = (z[:, 0] > 3 + 1.2 * 2).float().mean().item()
        assert beyond == pytest.approx(expected, abs=0.03)


def test_groups_of_cells_share_no_parts_and_samples_have_weights_of_their_group():
    """Of three samples, the third is of another group and half of it in a second cluster."""
    rng = np.random.default_rng(0)
    sample = np.repeat([0, 1, 2], 60)
    codes = np.repeat([0, 1, 2], [179, 1, 0])  # of the second type there is one cell alone
    group = (sample == 2).astype(int)
    mean = torch.from_numpy(rng.normal(0, 0.5, (180, D))).float()
    mean[sample == 2, 0] += 6
    mean[150:, 1] += 6
    model = scDecoder(D, 32, G, K, "nb", 0.0, n_components=2)
    model.mu[0], model.var[0] = mean.mean(dim=0), 0.1 + mean.var(dim=0)
    given = mean, torch.full((180, D), 0.1), torch.from_numpy(codes), 0
    plain = copy.deepcopy(model)
    assert torch.equal(plain.fit_shape(*given) >= 0, torch.tensor([[1, 1], [0, 0], [0, 0]]) > 0)
    owner = model.fit_shape(*given, torch.from_numpy(group))
    assert owner.tolist() == [[0, 0, 1, 1], [-1] * 4, [-1] * 4]
    assert model.config["n_components"] == 4 == model.shape_weight.shape[1]
    weight, center = model.shape_weight, model.shape_mean[0, :, 0]
    torch.testing.assert_close(weight.sum(dim=1), torch.ones(K))
    assert center[:2].max() < 0 < center[2:].min()  # each group's parts are where its cells are
    torch.testing.assert_close(weight[0] @ model.shape_mean[0], torch.zeros(D), atol=1e-5, rtol=0)

    names = pd.Categorical.from_codes(sample, ["a", "b", "c"])
    obs = pd.DataFrame({"sample": names, "condition": np.array(["x", "y"])[group]})
    cells = anndata.AnnData(np.zeros((180, 1)), obs=obs.set_axis([str(i) for i in range(180)]))
    reference = Reference(cells, codes, ["k", "l", "m"], np.zeros(180, bool))
    states = fit_states(model, mean, reference, group, owner, ["x"])
    assert (states.samples, states.conditions) == (["a", "b", "c"], ["x", "x", "y"])
    assert states.n_cells.tolist() == [[60, 0, 0], [60, 0, 0], [59, 1, 0]]
    torch.testing.assert_close(states.weight.sum(dim=2), torch.ones(3, K))
    of_type = states.weight[:, 0]
    assert of_type[:2, :2].sum(dim=1).min() > 0.95 < of_type[2, 2:].sum()
    assert of_type[2, 2:].tolist() == pytest.approx([0.5, 0.5], abs=0.05)


@pytest.mark.parametrize("n_components", [1, 3])
def test_without_a_fitted_shape_latents_are_gaussian(n_components):
    torch.manual_seed(0)
    model = scDecoder(D, 32, G, K, "nb", 0.0, n_components=n_components)
    codes = torch.arange(9000) % K
    z = model.sample_latent(torch.ones(9000, D), torch.full((9000, D), 4.0), codes)
    assert scipy.stats.kstest(z[:, 0].numpy(), "norm", (1, 2)).pvalue > 1e-3


# ------------------------------------------------------------------------------ Bulk Encoder


def test_encoder_shapes_positive_variance_and_proportions():
    """Regression: an unconstrained variance gave NaN under the square root."""
    model = encoder()
    for scale in (1e-3, 1.0, 1e9):
        bulk = torch.rand(5, G) * scale
        bulk[0, 1:] = 0  # all mass on one gene
        mu, var, pi = model(bulk)
        assert mu.shape == var.shape == (5, K, D) and pi.shape == (5, K)
        assert (var > 0).all() and torch.isfinite(mu).all() and torch.isfinite(var.sqrt()).all()
        torch.testing.assert_close(pi.sum(1), torch.ones(5))


def fitted_encoder(seed=0):
    """An encoder fitted to the input statistics of bulks of three random cell types."""
    generator = torch.Generator().manual_seed(seed)
    signature = torch.rand(K, G, generator=generator) ** 3 * torch.tensor([[1.0], [2.0], [0.5]])
    proportions = torch.distributions.Dirichlet(torch.ones(K)).sample((300,))
    model = encoder()
    model.fit_input(proportions @ signature, signature)
    return model, signature


def test_encoder_ignores_the_scale_of_a_bulk():
    """Regression: the published encoder took raw sums, so its output depended on depth."""
    model, signature = fitted_encoder()
    bulk = torch.rand(4, K) @ signature
    for a, b in zip(model(bulk), model(bulk * 1e4), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_absent_genes_leave_the_others_as_they_were():
    """Genes missing from a bulk count as average, not as zero."""
    model, signature = fitted_encoder()
    bulk = torch.rand(50, K) @ signature
    present = torch.ones(G)
    present[signature.mean(dim=0).argsort()[-5:]] = 0  # highest expressed: a third of all counts
    whole = model.normalise(bulk, torch.ones(G))[:, present > 0]
    cut = model.normalise(bulk * present, present)[:, present > 0]
    assert ((cut / whole).mean(dim=0) - 1).abs().max() < 0.1
    # Values in the absent columns are ignored.
    for a, b in zip(model(bulk, present), model(bulk * present, present), strict=True):
        assert torch.equal(a, b)


def test_untrained_encoder_solves_the_noise_free_mixture():
    """Proportions of cells, whose types differ fourfold in mRNA, agree with scipy's NNLS."""
    model, signature = fitted_encoder()
    true = torch.distributions.Dirichlet(torch.ones(K)).sample((20,))
    bulk = true @ signature
    _, _, pi = model(bulk)
    torch.testing.assert_close(pi, true, rtol=0, atol=0.03)
    model.config["n_iterations"] = 5000
    estimates = model.deconvolve(model.normalise(bulk, torch.ones(G)), torch.ones(G))
    for b, estimate in zip(bulk, estimates, strict=True):
        exact = scipy.optimize.nnls(signature.T.double().numpy(), b.double().numpy())[0]
        np.testing.assert_allclose(estimate.detach(), exact / exact.sum(), atol=2e-3)


def noisy_mixtures(n):
    """Bulks (n, 300) of K similar types on another platform, their proportions, and an encoder."""
    rng = np.random.default_rng(0)
    signature = rng.lognormal(0, 1.5, 300) * rng.lognormal(0, 0.3, (K, 300))
    true = rng.dirichlet(np.ones(K), n)
    bulk = true @ signature * rng.lognormal(0, 0.1, (n, 300))
    model = BulkEncoder(300, K, D, 16, 0.1).eval()
    model.fit_input(*(torch.tensor(part).float() for part in (true @ signature, signature)))
    return model.normalise(torch.tensor(bulk).float(), torch.ones(300)), true, model


def test_momentum_comes_as_far_in_a_third_of_the_updates():
    fractions, true, model = noisy_mixtures(50)
    every, errors = torch.ones(300), {}
    with torch.no_grad():
        plain = model.deconvolve(fractions, every)
        for momentum in (0.0, 0.7):
            model.momentum = momentum
            few = model.deconvolve(fractions, every, n_iterations=34)
            errors[momentum] = (few - plain).abs().max().item()
    assert errors[0.7] < 0.03 and errors[0.0] > 0.15
    assert np.sqrt(np.mean((plain.numpy() - true) ** 2)) < 0.05


def test_bulks_near_the_start_need_few_updates():
    """As those of the paper's mode, which start at the composition of their sample's cells."""
    fractions, _, model = noisy_mixtures(200)
    model.config["n_iterations"], model.momentum = 34, 0.7
    every = torch.ones(300)
    with torch.no_grad():
        whole = model.deconvolve(fractions, every)
        near = (whole - whole[0]).abs().amax(dim=1) < 0.1
        assert near.sum() > 5
        warm = model(fractions[near], start=whole[:1].expand(near.sum(), -1))[2]
        apart = (warm - model(fractions[near])[2]).abs().max()
        even = model.deconvolve(fractions[near], every, n_iterations=8)
    assert apart < 0.06 and (even - whole[near]).abs().max() > 2 * apart


def test_deconvolution_stands_gene_wise_factors():
    """A platform effect scales each gene; least squares follow the few highest expressed ones."""
    rng = np.random.default_rng(0)
    n_genes = 300
    signature = rng.lognormal(0, 1.5, (K, n_genes))
    model = BulkEncoder(n_genes, K, D, 16, 0.1).eval()
    true = rng.dirichlet(np.ones(K), 50)
    bulk = true @ signature * rng.lognormal(0, 0.8, n_genes)
    model.fit_input(torch.tensor(true @ signature).float(), torch.tensor(signature).float())
    all_genes = torch.ones(n_genes)
    with torch.no_grad():
        estimate = model.deconvolve(
            model.normalise(torch.tensor(bulk).float(), all_genes), all_genes
        ).numpy()
    least_squares = np.stack([scipy.optimize.nnls(signature.T, b)[0] for b in bulk])
    least_squares /= least_squares.sum(axis=1, keepdims=True)
    assert np.abs(estimate - true).mean() < 0.5 * np.abs(least_squares - true).mean()


def test_halves_of_the_genes_tell_how_sure_the_proportions_are():
    """Halves of the genes agree on noise-free bulks, not on noisy ones; pi does not change."""
    model, signature = fitted_encoder()
    true = torch.distributions.Dirichlet(torch.ones(K)).sample((50,))
    clean = (true @ signature).numpy()
    noisy = clean * np.random.default_rng(0).lognormal(0, 0.5, clean.shape)
    spread = []
    for bulk in (clean, noisy):
        X, present = sp.csr_matrix(bulk), np.ones(G, bool)
        _, _, pi, sd = encode_bulks(model, X, present, "cpu", n_halves=20)
        assert torch.equal(pi, encode_bulks(model, X, present, "cpu")[2])
        spread.append(sd.mean().item())
    assert 5 * spread[0] < spread[1]
    # The sd matches the true error within a factor of two.
    error = (pi - true).square().mean().sqrt().item()
    assert 0.5 < error / sd.square().mean().sqrt().item() < 2


# Profiles of three types (K, 400), and bulks mixed from them (30, 400).
PROFILES = np.random.default_rng(0).lognormal(5, 1.5, (K, 400))
MIXED = np.random.default_rng(1).dirichlet(np.ones(K), 30) @ PROFILES
ALL = np.ones(400, bool)


def test_fit_tells_a_missing_type_from_another_platform():
    """A platform effect lowers the correlation; a missing type leaves a part unexplained."""
    rng = np.random.default_rng(2)
    noise = rng.lognormal(0, 0.5, 400) * rng.lognormal(0, 0.1, MIXED.shape)
    # A type that the reference lacks.
    missing_type = np.where(rng.random(400) < 0.1, 20, 0.1) * PROFILES.mean(axis=0)
    bulks = {
        "same": MIXED * rng.lognormal(0, 0.1, MIXED.shape),
        "platform": MIXED * noise,
        "missing": (MIXED + missing_type) * noise,
        "shuffled": rng.permuted(MIXED, axis=1),
    }
    fits = {name: bulk_fit(bulk, MIXED, ALL) for name, bulk in bulks.items()}
    correlation, unexplained = ({n: r[i].mean() for n, r in fits.items()} for i in (0, 1))
    assert correlation["same"] > 0.95 > correlation["platform"] > 0.7 > 0.3
    assert abs(correlation["shuffled"]) < 0.3
    assert max(abs(unexplained["same"]), abs(unexplained["platform"])) < 0.02
    assert unexplained["missing"] > 0.04
    # The misfit is the worse of the two, in standard deviations of the reference.
    reference = {"correlation": [0.9, 0.1], "unexplained": [0.0, 0.01]}
    assert misfit(0.5, 0.0, reference) == pytest.approx(4) == misfit(0.9, 0.04, reference)
    # Neither the scale nor the values of unmeasured genes matter.
    measured = np.arange(400) < 300
    masked = np.where(measured, MIXED * noise * 1e3, 7.0)
    fit = bulk_fit(masked, MIXED, measured)
    np.testing.assert_allclose(fit, bulk_fit(masked[:, :300], MIXED[:, :300], measured[:300]))
    assert np.isnan(bulk_fit(MIXED, MIXED, np.arange(400) < 5)[0]).all()  # too few genes


def test_calibration_turns_the_expected_sum_into_the_bulk():
    rng = np.random.default_rng(3)
    bulk = MIXED * rng.lognormal(0, 0.5, 400)
    bulk[:, 0], bulk[:, 1], bulk[:, 2] = 0, MIXED[:, 1] * 30, 5.0  # lost; too high; not measured
    present = np.arange(400) != 2
    factor = calibration(bulk, MIXED, present)
    assert factor.dtype == np.float32 and np.abs(factor).max() == pytest.approx(np.log(30))
    assert (factor[:, 0] == -np.float32(np.log(30))).all() and (factor[:, 2] == 0).all()
    rest = np.arange(3, 400)
    ratio = (MIXED * np.exp(factor))[:, rest] / bulk[:, rest]
    assert (ratio.std(axis=1) / ratio.mean(axis=1)).max() < 0.02  # up to the depth


def test_sum_agreement_is_of_each_sample_with_its_own_cells():
    rng = np.random.default_rng(4)
    sample = np.repeat([0, 1, 2], [40, 60, 0])
    cells = sp.csr_matrix(rng.poisson(MIXED[sample] / 200))
    sums = np.zeros((3, 400))
    for rows in (slice(0, 25), slice(25, 100)):  # added up block by block
        add_to_sums(sums, cells[rows], sample[rows])
    agreement = sum_agreement(MIXED[:3] * 7, sums, ALL)
    log_cpm = [
        np.log2(x / x.sum() * 1e6 + 1)
        for x in (MIXED[1], np.asarray(cells[40:].sum(axis=0)).ravel())
    ]
    assert agreement[1] == pytest.approx(np.corrcoef(*log_cpm)[0, 1])
    assert agreement[1] > 0.9 and np.isnan(agreement[2])  # the third has no cells


def test_log_factor_scales_genes_and_keeps_the_library_size():
    model = decoder()
    z, library = torch.randn(4, D), torch.full((4,), 500.0)
    factor = torch.zeros(4, G)
    factor[:, 3] = math.log(5)
    (plain, _), (scaled, _) = model(z, library), model(z, library, factor)
    torch.testing.assert_close(scaled.sum(1), library)
    ratio = scaled / plain
    torch.testing.assert_close(ratio[:, 3] / ratio[:, 4], torch.full((4,), 5.0))


def test_means_and_dispersions_of_each_type_are_those_of_its_cells():
    """Two types with the same means, and dispersions theta that differ tenfold."""
    rng = np.random.default_rng(5)
    codes = np.repeat([0, 1], 3000)
    rate = np.linspace(2, 30, G) * 10 / G
    theta = np.where(codes == 0, 2.0, 20.0)[:, None]
    X = sp.csr_matrix(rng.poisson(rate * rng.gamma(theta, 1 / theta, (6000, G))).astype(np.int32))
    torch.manual_seed(1)  # with some random weights, a thousand draws of z give a poor mean
    model = decoder()
    library, codes = torch.from_numpy(np.asarray(X.sum(1)).ravel()), torch.from_numpy(codes)
    model.fit_library(library, codes)
    model.fit_types(X, codes)
    for k in (0, 1):
        type_codes = torch.full((3000,), k)
        generated, _ = decode_cells(
            model, model.mu[type_codes], model.var[type_codes], type_codes, torch.Generator()
        )
        real, generated = (x.toarray().astype(float) for x in (X[codes.numpy() == k], generated))
        np.testing.assert_allclose(generated.mean(0), real.mean(0), rtol=0.15)
        assert generated.var(0).mean() / real.var(0).mean() == pytest.approx(1, abs=0.25)
    ratio = model.type_log_theta[1] - model.type_log_theta[0]
    assert ratio.median().item() > math.log(3)
    # A type without cells keeps the network's means and dispersions.
    assert model.type_fitted.tolist() == [1, 1, 0]
    z, size, third = torch.randn(5, D), torch.full((5,), 300.0), torch.full((5,), 2)
    draws = [
        sample(torch.Generator().manual_seed(1))
        for sample in (
            lambda g: model.sample_cells(z, size, third, g),
            lambda g: model.sample(z, size, g),
        )
    ]
    assert torch.equal(*draws)


def negative_binomial_cells(n, theta, rng):
    """Counts (n, 4) of genes with shares of .1 to .5, dispersion 1/theta, and library sizes (n)."""
    library = rng.lognormal(4, 0.4, n)
    mean = library[:, None] * np.array([0.01, 0.1, 0.39, 0.5])
    return rng.poisson(mean * rng.gamma(theta, 1 / theta, mean.shape)).astype(np.int32), library


@pytest.mark.parametrize("theta", [0.3, 2.0, 30.0])
def test_dispersions_by_maximum_likelihood(theta):
    X, library = negative_binomial_cells(4000, theta, np.random.default_rng(0))
    phi = fit_dispersion(sp.csr_matrix(X), library)
    np.testing.assert_allclose(phi[1:], 1 / theta, rtol=0.15)
    # As scipy finds it, given the same means.
    mean = library * (X[:, 1].sum() + 0.5) / library.sum()
    best = scipy.optimize.minimize_scalar(
        lambda t: -scipy.stats.nbinom(np.exp(t), 1 / (1 + mean * np.exp(-t))).logpmf(X[:, 1]).sum(),
        bounds=(-3, 6), method="bounded",
    )  # fmt: skip
    assert np.log(phi[1]) == pytest.approx(-best.x, abs=0.1)


def test_spikes_are_found_and_nothing_else():
    rng = np.random.default_rng(1)
    X, library = negative_binomial_cells(3000, 2.0, rng)
    assert find_spikes(sp.csr_matrix(X), library)[0].nnz == 0
    spiked = X.copy()
    spiked[7, 0], spiked[8, 0], spiked[9, 1] = 60, 45, 200
    spikes, share = find_spikes(sp.csr_matrix(spiked), library)
    assert set(zip(*spikes.nonzero(), strict=True)) == {(7, 0), (8, 0), (9, 1)}
    assert (np.abs((spiked - spikes.toarray()).mean(axis=0) - X.mean(axis=0)) < 0.05).all()
    left = share * spiked.sum(axis=0)
    np.testing.assert_allclose(left, (spiked - spikes.toarray()).sum(axis=0))


def test_cell_of_another_kind_has_no_spikes():
    """Of genes that a single cell of a type expresses, as a rarer kind of cell would."""
    X = np.random.default_rng(2).poisson(0.02, (500, 40)).astype(np.int32)
    library = np.full(500, 100.0)
    for n, expected in ((3, 3), (12, 0)):
        cells = X.copy()
        cells[5, :n] = 80
        assert find_spikes(sp.csr_matrix(cells), library)[0].nnz == expected


def test_single_counts_far_out_do_not_move_what_is_drawn():
    """Regression: dispersions by moments, so that one count in a thousand cells emptied others."""
    rng, codes = np.random.default_rng(5), torch.zeros(1000, dtype=torch.long)
    X = rng.poisson(np.full(G, 1.0), (1000, G)).astype(np.int32)
    spiked = X.copy()
    spiked[np.arange(20), np.arange(20) % G] = 70
    models = []
    for counts in (X, spiked):
        torch.manual_seed(1)
        model = decoder()
        found = model.fit_types(sp.csr_matrix(counts), codes)
        models.append(model)
    assert found == 20
    clean, other = models
    difference = other.type_log_factor[0] - clean.type_log_factor[0]
    assert difference.abs().max() < 0.05
    assert (other.type_theta()[0] / clean.type_theta()[0]).log().abs().median() < 0.3


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_type_means_are_those_of_drawn_cells(likelihood):
    torch.manual_seed(0)
    model = decoder(likelihood)
    model.fit_library(torch.linspace(500, 2000, 90), torch.arange(90) % K)
    model.mu.normal_()
    k = torch.full((6000,), 1)
    generated, _ = decode_cells(model, model.mu[k], model.var[k], k, torch.Generator())
    drawn, expected = np.asarray(generated.mean(axis=0)).ravel(), model.type_means(4000)[1].numpy()
    np.testing.assert_allclose(drawn.sum(), expected.sum(), rtol=0.03)
    np.testing.assert_allclose(drawn, expected, rtol=0.2, atol=0.2)


def test_each_encoder_loss_answers_to_its_own_head_alone():
    """Regression: the published variance loss added the L1 of mu."""
    target = torch.randn(K, D), torch.rand(K, D), torch.rand(5, K)
    exact = [target[0].expand(5, K, D), target[1].expand(5, K, D), target[2]]
    assert all(loss == 0 for loss in encoder_losses(exact, target).values())
    for i, name in enumerate(("mu", "var", "pi")):
        moved = [value + 0.5 * (i == j) for j, value in enumerate(exact)]
        losses = encoder_losses(moved, target)
        expected = {"mu": 0.0, "var": 0.0, "pi": 0.0}
        expected[name] = 0.25 if name == "pi" else 0.75  # 0.5 squared, plus 0.5
        assert {n: loss.item() for n, loss in losses.items()} == pytest.approx(expected, abs=1e-6)


def test_all_bulks_go_through_the_encoder_once_and_without_gradients(monkeypatch):
    """Regression: a full encoder pass over the dataset for each cell, with gradients kept."""
    model, signature = fitted_encoder()
    passes = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *a, **options: passes.append(len(a[0])) or forward(*a, **options)
    )
    bulks = sp.csr_matrix((torch.rand(1000, K) @ signature).numpy())
    mu, var, pi, sd = encode_bulks(model, bulks, np.ones(G, bool), "cpu")
    assert sum(passes) == 1000
    cells = torch.arange(30)
    X, z = decode_cells(decoder(), mu[cells, 0], var[cells, 0], cells % K, torch.Generator())
    assert sum(passes) == 1000 and X.shape == (30, G) and z.shape == (30, D)
    assert sd is None
    assert not any(t.requires_grad for t in (mu, var, pi))


# ------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("make", [decoder, encoder, lambda: scGMVAE(G, K, D, 16, "zinb", 0.1)])
def test_saved_model_rebuilds_itself(tmp_path, make):
    model = make().eval()
    for parameter in model.parameters():
        parameter.data.normal_()
    card = save(tmp_path / "model.pt", model)
    torch.load(tmp_path / "model.pt", weights_only=True)  # plain tensors, numbers and strings
    loaded, loaded_card = load_model(tmp_path / "model.pt", type(model))
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert {k: loaded_card[k] for k in card} == card and loaded_card["seed"] == 5
    assert not loaded.training
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]  # no temporary file left


def test_loaded_decoder_draws_the_same_cells(tmp_path):
    model = decoder()
    save(tmp_path / "m.pt", model)
    loaded, _ = load_model(tmp_path / "m.pt", scDecoder)
    draws = [
        m.sample(torch.ones(5, D), torch.full((5,), 300.0), torch.Generator().manual_seed(1))
        for m in (model, loaded)
    ]
    assert torch.equal(*draws)


def test_unusable_weights_are_one_line_errors(tmp_path):
    path = tmp_path / "model.pt"
    with pytest.raises(InputError, match="no such file; train_decoder.py"):
        load_model(path, scDecoder)
    save(path, decoder())
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a readable weights file"):
            load_model(path, scDecoder)
    path.write_bytes(whole)
    with pytest.raises(InputError, match="found scDecoder, expected a BulkEncoder"):
        load_model(path, BulkEncoder)
    card = torch.load(path, weights_only=True)
    for key, value, words in (
        ("version", 99, "format version 99"),
        ("genes", ["g0"], "do not fit together"),
        ("gene_ids", ["ENSG0"], "do not fit together"),
        ("config", card["config"] | {"n_genes": G + 1}, "do not fit together"),
        ("state", card["state"] | {"out.bias": torch.full((G,), torch.nan)}, "not finite"),
        # Finite, but means and counts drawn from them are not.
        ("state", card["state"] | {"out.bias": torch.full((G,), 1e20)}, "out of range"),
        ("state", card["state"] | {"type_log_theta": torch.full((K, G), 99.0)}, "out of range"),
    ):
        torch.save(card | {key: value}, path)
        with pytest.raises(InputError, match=words):
            load_model(path, scDecoder)


def test_states_of_samples_are_checked(tmp_path):
    path, states = tmp_path / "model.pt", {"samples": ["s", "t"], "conditions": ["x", "y"]}
    states |= {"batches": ["all"] * 2, "baseline": ["x"], "n_cells": torch.ones(2, K)}
    states["weight"] = torch.ones(2, K, 1)
    save(path, decoder())
    card = torch.load(path, weights_only=True)
    torch.save(card | {"states": states}, path)
    assert load_model(path, scDecoder)[1]["states"].keys() == states.keys()
    for wrong in (
        "all", {}, states | {"more": 1}, {k: v for k, v in states.items() if k != "batches"},
        states | {"samples": ["s"]}, states | {"samples": ["s", "s"]},
        states | {"conditions": [1, 2]}, states | {"baseline": "x"},
        states | {"weight": torch.ones(2, K, 2)}, states | {"weight": torch.ones(2, K, 1) / 2},
        states | {"weight": torch.ones(2, K, 1).double()},
        states | {"n_cells": torch.full((2, K), torch.nan)},
        states | {"n_cells": torch.full((2, K), -1.0)}, states | {"n_cells": torch.ones(K, 2)},
        {name: value[:0] for name, value in states.items()},
    ):  # fmt: skip
        torch.save(card | {"states": wrong}, path)
        with pytest.raises(InputError, match="do not fit together"):
            load_model(path, scDecoder)


def test_states_that_a_bulk_encoder_of_an_earlier_version_had_are_left_out(tmp_path, capsys):
    """Moments are those of the types, as its heads corrected what states gave."""
    path, model = tmp_path / "model.pt", encoder()
    model.mu.normal_()
    save(path, model)
    card = torch.load(path, weights_only=True)
    card["config"]["n_state"] = 4
    card["state"]["state_mu"] = torch.ones(4, K, D)
    torch.save(card, path)
    loaded, _ = load_model(path, BulkEncoder)
    assert "train again for states" in capsys.readouterr().out
    bulk = torch.rand(5, G)
    mu, var, pi = loaded(bulk)
    torch.testing.assert_close(mu, model.mu.expand(5, -1, -1))
    torch.testing.assert_close(var, model.var.expand(5, -1, -1))
    torch.testing.assert_close(pi, model(bulk)[2])


def test_weights_never_run_code(tmp_path):
    """A pickle that would execute on load is refused."""
    import pickle

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "model.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(InputError, match="not a readable weights file"):
        load_model(tmp_path / "model.pt", scDecoder)
    assert not (tmp_path / "ran").exists()


def test_mixture_in_autocell_layout_and_as_k_by_d(tmp_path):
    mu, var = torch.randn(K, D), torch.rand(K, D) + 0.1
    save_mixture(tmp_path, mu, var)
    assert torch.load(tmp_path / "gmm_mu_c.pt", weights_only=True).shape == (1, D, K)
    for loaded, written in zip(load_mixture(tmp_path, K), (mu, var), strict=True):
        torch.testing.assert_close(loaded, written)
    # As autoCell saves it: a parameter
    torch.save(torch.nn.Parameter(mu.T[None]), tmp_path / "gmm_mu_c.pt")
    torch.save(var, tmp_path / "gmm_var_c.pt")
    for loaded, written in zip(load_mixture(tmp_path, K), (mu, var), strict=True):
        torch.testing.assert_close(loaded, written)
        assert not loaded.requires_grad


@pytest.mark.parametrize(
    ("mu", "var", "words"),
    [
        (torch.randn(K + 1, D), torch.ones(K + 1, D), "4 x 7|\\(4, 7\\)"),
        (torch.randn(K, D), torch.ones(K, D + 1), "mu is"),
        (torch.randn(K, D), -torch.ones(K, D), "variance of -1"),
        (torch.full((K, D), torch.nan), torch.ones(K, D), "not finite"),
        ([1, 2], torch.ones(K, D), "expected a tensor"),
    ],
)
def test_unusable_mixtures_are_one_line_errors(tmp_path, mu, var, words):
    torch.save(mu, tmp_path / "gmm_mu_c.pt")
    torch.save(var, tmp_path / "gmm_var_c.pt")
    with pytest.raises(InputError, match=words):
        load_mixture(tmp_path, K)
