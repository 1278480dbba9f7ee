"""Cells of a sample: clouds of its state, shrunk means, what is allotted to types, the output."""

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from conftest import (
    CELL_TYPES,
    ROOT,
    TREATED_EVERYWHERE,
    TREATED_HERE,
    assert_one_line_error,
    make_sample_bulks,
    make_sample_cells,
    run_inside,
)
from deconvolution import expression
from deconvolution.expression import (
    SHARED,
    Allotment,
    SampleProfiles,
    calibration,
    estimate_expression,
    expected_bulk,
    type_profiles,
)
from distributions.fits import shrink_means
from generation import Model, generate_cells
from models import scDecoder
from states.reading import StateProfiles
from states.weights import ReferenceStates

# ------------------------------------------------------------------------------ clouds of states

N_CLOUDS, N_PARTS, N_LATENT = 3, 4, 3


def cloud_model():
    """Model of three types and of four samples in two batches; most cells of each are in one part.

    The first sample of either batch is its baseline.
    """
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    decoder = scDecoder(N_LATENT, 32, 60, N_CLOUDS, "nb", 0.0, n_components=N_PARTS)
    decoder.out.weight.data *= 3  # so that genes follow the latent
    decoder.log_theta.data.fill_(3.0)
    decoder.log_library.fill_(float(np.log(20_000)))
    weight = rng.dirichlet(np.full(N_PARTS, 4), N_CLOUDS)  # (K, C)
    mean, var = rng.normal(0, 1, (N_CLOUDS, N_PARTS, N_LATENT)), rng.gamma(4, 0.05, N_LATENT)
    mean -= np.einsum("kc,kcd->kd", weight, mean)[:, None]
    scale = np.sqrt(np.einsum("kc,kcd->kd", weight, mean**2) + var)[:, None]  # (K, 1, D)
    parts = {"shape_weight": weight, "shape_mean": mean / scale}
    parts["shape_sd"] = np.broadcast_to(np.sqrt(var) / scale, mean.shape)
    parts["mu"], parts["var"] = rng.normal(0, 2, (2, N_CLOUDS, N_LATENT))
    parts["var"] = parts["var"] ** 2 + 0.1
    for name, value in parts.items():
        getattr(decoder, name).copy_(torch.tensor(np.ascontiguousarray(value)))
    states = ReferenceStates(
        samples=["a", "b", "c", "d"],
        conditions=["control", "treated"] * 2,
        batches=["v2", "v2", "v3", "v3"],
        baseline=["control"],
        n_cells=torch.full((4, N_CLOUDS), 60.0),
        weight=(0.8 * torch.eye(4) + 0.05)[:, None].expand(-1, N_CLOUDS, -1),
    )
    card = {"genes": [f"GENE{i}" for i in range(60)], "cell_types": CELL_TYPES}
    return Model(None, decoder.eval(), card, card | {"states": vars(states)})


def test_moments_of_weights_are_those_of_latents_drawn_with_them():
    """Those of the type for its own weights, of one part for that part alone."""
    decoder, n = cloud_model().decoder, 20_000
    alone = torch.eye(N_PARTS)[1].expand(N_CLOUDS, -1)
    weight = torch.stack([decoder.shape_weight, alone, (decoder.shape_weight + alone) / 2])
    mu, var = decoder.moments_of_weights(weight)  # (S, K, D)
    torch.testing.assert_close(mu[0], decoder.mu)
    torch.testing.assert_close(var[0], decoder.var)
    part = decoder.shape_mean[:, 1], decoder.shape_sd[:, 1] ** 2
    torch.testing.assert_close(mu[1], decoder.mu + decoder.var.sqrt() * part[0])
    torch.testing.assert_close(var[1], decoder.var * part[1])
    sample, codes = (torch.from_numpy(v.ravel()) for v in np.indices((3, N_CLOUDS, n))[:2])
    nowhere = torch.full((len(codes), N_LATENT), torch.nan)  # with weights of no effect
    generator = torch.Generator().manual_seed(0)
    z = decoder.sample_latent(nowhere, nowhere, codes, generator, weight, sample)
    z = z.view(3, N_CLOUDS, n, N_LATENT)
    torch.testing.assert_close((z.mean(dim=2) - mu) / var.sqrt(), 0 * mu, atol=0.04, rtol=0)
    torch.testing.assert_close(z.var(dim=2) / var, torch.ones_like(var), atol=0.06, rtol=0)


def cells_of_states(model, share, per_bulk, log_factor=None):
    """Fractions of all counts in generated cells of each type in each bulk (S, K, G)."""
    parts = torch.from_numpy(model.states.mix(share))
    pi = torch.full((len(share), N_CLOUDS), 1 / N_CLOUDS)
    encoded = [*model.decoder.moments_of_weights(parts), pi, parts]
    sums, generator = np.zeros((len(share), N_CLOUDS, 60)), torch.Generator().manual_seed(0)
    for cells in generate_cells(model.decoder, encoded, per_bulk, generator, log_factor):
        np.add.at(sums, (cells.bulk, cells.cell_type), cells.counts.toarray())
    return sums / sums.sum(axis=2, keepdims=True)


def test_profiles_of_states_are_those_of_their_cells():
    """Cells are drawn from a state's own parts, and moved to the platform of all baselines."""
    model = cloud_model()
    share = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.3]])  # of samples b and d
    profiles = SampleProfiles(model, 4, share)
    found = profiles[:]
    assert profiles.shape == found.shape == (4, N_CLOUDS, 60) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=2), 1, rtol=1e-5)
    np.testing.assert_allclose(found[:1], profiles.reference, rtol=1e-5)  # no state
    np.testing.assert_allclose(profiles[2:3], found[2:3], rtol=1e-5)
    log_factor = profiles.log_factor(slice(0, 4), profiles[0:4])
    assert not log_factor[0].any()
    error, plain = (
        abs(np.log((cells_of_states(model, share, 3000, factor) + 1e-4) / (found + 1e-4)))
        for factor in (torch.from_numpy(log_factor), None)
    )
    assert error.mean() < 0.05
    assert (plain[1:3].mean(axis=(1, 2)) > 2 * error[1:3].mean(axis=(1, 2))).all()
    # Whose own batch's baseline is that of all has nothing of a platform.
    own = model.states.states
    model.states = StateProfiles(replace(own, batches=["v2"] * 4), model.states.parts)
    own = SampleProfiles(model, 4, share)
    assert abs(own.log_factor(slice(0, 4), own[0:4])).max() < 1e-4


def test_expected_sums_are_of_the_states():
    """Of the types' own clouds, where samples have their weights."""
    model = cloud_model()
    decoder, pi = model.decoder, torch.tensor([[0.2, 0.3, 0.5]])
    expected = expected_bulk(decoder, pi)
    np.testing.assert_allclose(expected, pi @ decoder.type_means(), rtol=1e-5)
    own = replace(model.states.states, weight=decoder.shape_weight.expand(4, -1, -1))
    parts = model.states.parts
    for states, share, alike in ((own, [0.5, 0.5], True), (model.states.states, [0, 1], False)):
        model.states = StateProfiles(states, parts)
        found = expected_bulk(decoder, pi, SampleProfiles(model, 1, np.array([share], float)))
        assert found.sum() == pytest.approx(expected.sum(), rel=0.01)
        assert np.allclose(found, expected, rtol=0.2) == alike


@pytest.mark.parametrize("calibrate", ["none", "uniform", "types"])
def test_expression_of_some_samples_is_that_of_all(calibrate, monkeypatch):
    """Whether all bulks fit into memory or not; and cells add up as the calibration says."""
    model, rng = cloud_model(), np.random.default_rng(0)
    share = rng.dirichlet(np.ones(3), 5)[:, :2]
    profiles, pi = SampleProfiles(model, 5, share), torch.full((5, 3), 1 / 3)
    platform = rng.lognormal(0, 0.5, 60)
    bulk = rng.poisson(expected_bulk(model.decoder, pi, profiles) * platform).astype(float)
    given = pi, bulk, ALL_GENES[:60], profiles, calibrate
    whole = estimate_expression(model.decoder, *given)
    monkeypatch.setattr(expression, "SAMPLES_AT_A_TIME", 2)
    part = whole.part(slice(0, 5))
    for name in ("profiles", "log_fold_change", "sd", "log_factor"):
        expected, found = getattr(part, name), getattr(whole, name)
        assert found.shape == (5, 3, 60)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (part.sd > 0).all() == (calibrate == "types")
    one_state = estimate_expression(model.decoder, *given[:3], SampleProfiles(model, 5), calibrate)
    assert (one_state.log_factor is None) == (calibrate == "none")
    cells = cells_of_states(model, share, 3000, part.log_factor)
    np.testing.assert_allclose(cells, part.profiles, rtol=0.3, atol=1e-3)
    of_bulk = bulk / bulk.sum(axis=1, keepdims=True)
    off = np.sqrt(np.mean(np.log(part.profiles.mean(axis=1) / of_bulk) ** 2))
    assert off > 0.25 if calibrate == "none" else off < 0.05
    moved = np.log(profiles[:] / profiles.reference)  # the platform is no change
    if calibrate != "uniform":
        assert np.sqrt(np.mean((part.log_fold_change - moved) ** 2)) < 0.3


# --------------------------------------------------------------------------------- shrunk means


def test_counts_of_rare_types_are_shrunk_and_markers_of_large_ones_are_not():
    rng = np.random.default_rng(0)
    share = np.tile(rng.gamma(5, 1, 50), (4, 1))  # alike in all types
    share[0, :5] *= 10  # markers of a large type
    share /= share.sum(axis=1, keepdims=True)
    totals = rng.poisson(share * np.array([[200_000], [100_000], [100_000], [400]]))
    everywhere = int(np.argmin(share[3, 10:])) + 10
    totals[3, everywhere] = 0  # by chance not seen in the rare type
    shrunk = shrink_means(torch.from_numpy(totals)).numpy()
    np.testing.assert_allclose(shrunk.sum(axis=1), totals.sum(axis=1))
    expected = share[3, everywhere] * totals[3].sum()
    assert shrunk[3, everywhere] > 0.5 * expected > 0.5
    np.testing.assert_allclose(shrunk[0, :5], totals[0, :5], rtol=0.02)
    error = [np.sum((part[3] / part[3].sum() - share[3]) ** 2) for part in (shrunk, totals)]
    assert error[0] < error[1]


def test_means_of_a_type_without_counts_are_zero():
    totals = torch.tensor([[10.0, 20.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
    shrunk = shrink_means(totals)
    assert torch.isfinite(shrunk).all() and (shrunk[1] == 0).all() and (shrunk[:, 2] < 1e-9).all()


# ------------------------------------------------------------- what is allotted to the cell types

N_SAMPLES, N_TYPES, N_GENES = 6, 3, 90
OWN = slice(0, 8)  # genes of type 0 alone, of which half of the samples have four times as much
EVERYWHERE = np.r_[20:30, 50:60, 80:90]  # genes of all types
RAISED = np.arange(N_SAMPLES) >= 3
ALL_GENES = np.ones(N_GENES, bool)


def simulate_bulks(platform=0.0, depth=1e6, seed=0):
    """Bulks of three types whose expression is known, some with more of the genes OWN.

    platform: sd of a factor of each gene that all bulks share.

    Returns:
        bulk (S, G), weight (S, K), profiles (S, K, G).
    """
    rng = np.random.default_rng(seed)
    profile = rng.gamma(2, 1, (N_TYPES, N_GENES))
    for k in range(N_TYPES):
        of_type = slice(30 * k, 30 * k + 20)
        profile[:, of_type] *= 1e-3
        profile[k, of_type] *= 1e3
    profile /= profile.sum(axis=1, keepdims=True)
    change = np.ones((N_SAMPLES, N_TYPES, N_GENES))
    change[RAISED, 0, OWN] = 4
    weight = rng.dirichlet(np.full(N_TYPES, 20), N_SAMPLES)
    mean = np.einsum("sk,skg->sg", weight, profile * change)
    mean *= np.exp(platform * rng.standard_normal(N_GENES))
    bulk = rng.poisson(mean / mean.sum(axis=1, keepdims=True) * depth)
    return bulk, weight, np.broadcast_to(profile, change.shape)


def allot(*parts, **options):
    """Mean and sd of what is allotted to each type of all samples (S, K, G), and the platform."""
    allotment = Allotment(*parts, **options)
    return *allotment.changes(slice(None)), allotment.P


@pytest.mark.parametrize("platform", [0.0, 1.0])
def test_a_change_of_one_types_own_genes_lands_in_that_type(platform):
    """Others follow a little, as types often change together, but express hardly any of it."""
    bulk, weight, profiles = simulate_bulks(platform)
    delta, *_ = allot(bulk, weight, profiles, ALL_GENES)
    change = delta[RAISED].mean(axis=0) - delta[~RAISED].mean(axis=0)  # (K, G)
    assert 0.8 * np.log(4) < change[0, OWN].mean() < 1.1 * np.log(4)
    assert (change[0, OWN] > change[1:, OWN]).all()
    counts = weight[:, :, None] * profiles * np.expm1(delta)
    counts = counts[RAISED][:, :, OWN].sum(axis=(0, 2))  # that are added to each type
    assert counts[0] > 0.95 * counts.sum()
    assert abs(change[:, EVERYWHERE]).mean() < 0.15


def test_a_factor_that_all_bulks_share_is_the_platforms():
    bulk, weight, profiles = simulate_bulks(platform=1.0)
    rest = np.arange(N_GENES) >= 20  # not those that the samples differ in, nor near them
    cohort, *_ = allot(bulk, weight, profiles, ALL_GENES, "remove")
    none, *_ = allot(bulk, weight, profiles, ALL_GENES, "none")
    assert np.sqrt(np.mean(cohort[:, :, rest] ** 2)) < 0.1
    assert np.sqrt(np.mean(none[:, :, rest] ** 2)) > 0.5
    # Without a platform, what all bulks share is taken for their own.
    bulk, weight, profiles = simulate_bulks()
    one_state = np.flatnonzero(RAISED)
    parts = bulk[one_state], weight[one_state], profiles[one_state], ALL_GENES
    assert allot(*parts, "none")[0][:, 0, OWN].mean() > 0.8 * np.log(4)
    assert abs(allot(*parts, "remove")[0][:, 0, OWN].mean()) < 0.6 * np.log(4)


def test_of_one_bulk_most_is_taken_for_the_platforms():
    bulk, weight, profiles = simulate_bulks(platform=1.0)
    last = slice(N_SAMPLES - 1, N_SAMPLES)
    one = bulk[last], weight[last], profiles[last], ALL_GENES
    cohort, sd, _ = allot(*one)
    none, sd_of_none, _ = allot(*one, "none")
    assert abs(cohort).mean() < 0.5 * abs(none).mean()
    assert (sd[0, 0, OWN] > 2 * sd_of_none[0, 0, OWN]).all()


def test_uncertainty_is_smallest_where_a_type_gives_the_counts():
    bulk, weight, profiles = simulate_bulks(depth=1e7)
    measured = np.arange(N_GENES) != 85
    for platform in ("remove", "none"):
        _, sd, _ = allot(bulk, weight, profiles, measured, platform)
        prior = sd[0, 0, 85]  # of a gene of which nothing is known
        assert (sd > 0).all() and sd.max() < 1.1 * prior and (sd[:, :, 85] == prior).all()
        for k in range(N_TYPES):
            of_type = slice(30 * k, 30 * k + 20)
            others = [j for j in range(N_TYPES) if j != k]
            assert (sd[:, [k], of_type] < sd[:, others, of_type]).all()
    deep, thin = (allot(*simulate_bulks(depth=depth), ALL_GENES, "none")[1] for depth in (1e7, 1e5))
    assert (deep[:, 0, OWN] < thin[:, 0, OWN]).all()


def draw_changes(rng, n, n_genes):
    """Changes of sd 1 of each gene in each type (n, K, G), as far shared by types as is assumed."""
    common, own = rng.standard_normal((n, 1, n_genes)), rng.standard_normal((n, N_TYPES, n_genes))
    return np.sqrt(SHARED) * common + np.sqrt(1 - SHARED) * own


def simulate_prior(sample_sd, platform_sd=0.0, n_samples=12, n_genes=600, seed=0):
    """Bulks, weights, profiles, and changes that are drawn as the model assumes, if of that sd."""
    rng = np.random.default_rng(seed)
    profile = rng.gamma(1, 1, (N_TYPES, n_genes))
    profile /= profile.sum(axis=1, keepdims=True)
    truth = sample_sd * draw_changes(rng, n_samples, n_genes)
    of_platform = platform_sd * draw_changes(rng, 1, n_genes)
    weight = rng.dirichlet(np.full(N_TYPES, 5), n_samples)
    mean = np.einsum("sk,skg->sg", weight, profile * np.exp(truth + of_platform))
    bulk = rng.poisson(mean / mean.sum(axis=1, keepdims=True) * 1e7)
    return bulk, weight, np.broadcast_to(profile, truth.shape), truth


@pytest.mark.parametrize(("platform", "platform_sd"), [("none", 0.0), ("remove", 0.7)])
def test_stated_uncertainty_is_the_spread_of_the_truth(platform, platform_sd):
    """68 % lie within one sd, and 95 % within two."""
    bulk, weight, profiles, truth = simulate_prior(expression.SAMPLE_SD, platform_sd)
    delta, sd, _ = allot(bulk, weight, profiles, np.ones(bulk.shape[1], bool), platform)
    error = delta - truth
    error -= np.median(error, axis=(1, 2), keepdims=True)  # fractions know no common factor
    assert 0.6 < np.mean(abs(error) < sd) < 0.76
    assert 0.91 < np.mean(abs(error) < 2 * sd) < 0.98
    assert np.mean(error**2) < 0.5 * np.mean(truth**2)  # that of no change at all


def test_how_much_platforms_differ_is_read_from_the_bulks():
    rng = np.random.default_rng(0)
    S, G = 8, 500
    share = rng.dirichlet(np.full(N_TYPES, 2), (S, G)).transpose(0, 2, 1)  # (S, K, G)
    v = np.full((S, G), 0.05)
    for sd in expression.PLATFORM_SDS:
        ratio = (share * sd * draw_changes(rng, 1, G)).sum(axis=1)
        ratio += np.sqrt(v) * rng.standard_normal((S, G))
        assert expression.choose_platform_sd(ratio, share, v) == sd
        assert expression.choose_platform_sd(ratio[:1], share[:1], v[:1]) == sd


def of_types(sd):
    """Covariance of a change between the cell types, as it is before any bulk is seen."""
    return sd**2 * (SHARED * np.ones((N_TYPES, N_TYPES)) + (1 - SHARED) * np.eye(N_TYPES))


def test_platform_is_the_posterior_of_a_linear_model():
    """Against the joint covariance of all bulks, written out for one gene.

    The evidence is the density of the ratios, up to a constant.
    """
    rng = np.random.default_rng(0)
    ratio, v = rng.normal(0, 1, (4, 1)), rng.gamma(2, 0.1, (4, 1))
    share = rng.dirichlet(np.ones(N_TYPES), 4)[:, :, None]  # (S, K, 1)
    W, off = share[:, :, 0], []
    for sd in (0.3, 1.5):
        mean, covariance, evidence = expression.platform_posterior(ratio, share, v, sd)
        of_bulks = np.diag(v[:, 0]) + W @ of_types(sd) @ W.T
        gain = of_types(sd) @ W.T @ np.linalg.inv(of_bulks)
        np.testing.assert_allclose(mean[:, 0], gain @ ratio[:, 0])
        np.testing.assert_allclose(covariance[0], of_types(sd) - gain @ W @ of_types(sd))
        density = scipy.stats.multivariate_normal(np.zeros(4), of_bulks).logpdf(ratio[:, 0])
        off.append(evidence[0] - density)
    assert off[0] == pytest.approx(off[1])


def test_changes_covary_between_types_and_along_the_state():
    rng = np.random.default_rng(1)
    share, moved = rng.dirichlet(np.ones(N_TYPES), 2)[:, :, None], rng.normal(0, 1, (2, N_TYPES, 1))
    Cw, wCw = expression.covary(share, moved)
    for s in range(2):
        w, m = share[s, :, 0], moved[s, :, 0]
        C = of_types(expression.SAMPLE_SD) + expression.STATE_ERROR**2 * np.outer(m, m)
        np.testing.assert_allclose(Cw[s, :, 0], C @ w)
        np.testing.assert_allclose(wCw[s, 0], w @ C @ w)


def test_what_a_state_underestimates_goes_to_the_type_that_it_moves():
    """Genes of all types, which the state raises in one; their bulks show more of it."""
    bulk, weight, profiles = simulate_prior(0.02)[:3]
    genes = np.arange(0, bulk.shape[1], 20)
    raised, state = profiles.copy(), profiles.copy()
    raised[::2, 1, genes] *= 3
    state[::2, 1, genes] *= 2
    bulk = np.random.default_rng(0).poisson(np.einsum("sk,skg->sg", weight, raised) * 1e7)
    measured = np.ones(bulk.shape[1], bool)
    change, blind = (
        allot(bulk, weight, state, measured, "none", m)[0][::2][:, :, genes].mean(axis=(0, 2))
        for m in (profiles[:1], None)
    )  # (K)
    assert 0 < change[1] < np.log(1.5)
    beyond, beyond_blind = (part[1] - max(part[0], part[2]) for part in (change, blind))
    assert beyond > 1.2 * beyond_blind > 0  # who does not know what the state has moved


def test_genes_that_are_not_measured_are_left_alone():
    bulk, weight, profiles = simulate_bulks()
    measured = np.arange(N_GENES) % 3 > 0
    delta, sd, _ = allot(bulk, weight, profiles, measured)
    assert not delta[:, :, ~measured].any() and len(np.unique(sd[:, :, ~measured])) == 1
    assert sd[:, :, measured].min() < 0.5 * sd[0, 0, 0]  # which is the prior's
    assert delta[:, :, measured].any(axis=(0, 1)).all()
    nothing = np.where(measured, bulk, 12345)  # whatever stands there
    np.testing.assert_array_equal(allot(nothing, weight, profiles, measured)[0], delta)


@pytest.mark.parametrize("platform", ["remove", "none"])
def test_equal_bulks_get_equal_changes_whatever_their_scale(platform):
    """The sum of a bulk only says how well it is counted, from 100,000 on."""
    bulk, weight, profiles = simulate_bulks()
    twice = [np.concatenate([part, part[:1]]) for part in (bulk, weight, profiles)]
    delta, sd, _ = allot(*twice, ALL_GENES, platform)
    np.testing.assert_allclose(delta[0], delta[-1], atol=1e-6)
    np.testing.assert_allclose(sd[0], sd[-1], atol=1e-6)
    delta, scaled, again = (
        allot(bulk * scale, weight, profiles, ALL_GENES, platform)[0] for scale in (1, 1e3, 1e6)
    )
    np.testing.assert_allclose(scaled, delta, atol=0.1)
    np.testing.assert_allclose(again, scaled, atol=0.001)
    thin, fractions = (
        allot(bulk * scale, weight, profiles, ALL_GENES, platform)[0] for scale in (0.05, 1e-6)
    )
    np.testing.assert_allclose(thin, fractions, atol=1e-6)
    heavier = allot(bulk, 7 * weight, profiles, ALL_GENES, platform)[0]
    np.testing.assert_allclose(heavier, delta, atol=1e-5)


def test_changes_stay_within_bounds():
    bulk, weight, profiles = simulate_bulks()
    wild = bulk.copy()
    wild[0, :5], wild[1, 40:] = 10**12, 0
    for platform in ("remove", "none"):
        delta, sd, _ = allot(wild, weight, profiles, ALL_GENES, platform)
        assert np.isfinite(delta).all() and np.isfinite(sd).all()
        assert abs(delta).max() <= np.log(30) + 1e-6


def test_uniform_factors_turn_the_expected_sum_into_the_bulk():
    bulk, weight, profiles = simulate_bulks(platform=0.5)
    expected = np.einsum("sk,skg->sg", weight, profiles)
    measured = np.arange(N_GENES) != 7
    factor = calibration(bulk, expected, measured)
    assert factor.shape == bulk.shape and not factor[:, 7].any()
    calibrated = expected[:, measured] * np.exp(factor[:, measured])
    expected_share = bulk[:, measured] / bulk[:, measured].sum(axis=1, keepdims=True)
    calibrated /= calibrated.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(calibrated, expected_share, atol=1e-5)


# ------------------------------------------------------------------------------- from the weights


def test_profiles_of_types_are_those_of_their_generated_cells(trained_samples):
    decoder = Model.load(trained_samples).decoder
    profiles = type_profiles(decoder)
    np.testing.assert_allclose(profiles.sum(axis=1), 1, rtol=1e-5)
    codes = torch.arange(3).repeat_interleave(2000)
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        z = decoder.sample_latent(decoder.mu[codes], decoder.var[codes], codes, generator)
        X = decoder.sample_cells(z, torch.full((6000,), 5000.0), codes, generator)
    share = X.view(3, 2000, -1).mean(dim=1).numpy() / 5000
    np.testing.assert_allclose(share, profiles, rtol=0.2, atol=1e-3)


def test_the_platform_is_read_from_some_of_many_bulks(monkeypatch):
    bulk, weight, profiles, _ = simulate_prior(0.1, 0.7, n_samples=60)
    measured = np.ones(bulk.shape[1], bool)
    every = allot(bulk, weight, profiles, measured)
    monkeypatch.setattr(expression, "N_PLATFORM_BULKS", 20)
    some = allot(bulk, weight, profiles, measured)
    assert some[0].shape == every[0].shape
    assert np.sqrt(np.mean((some[0] - every[0]) ** 2)) < 0.3 * np.sqrt(np.mean(every[0] ** 2))
    assert np.sqrt(np.mean((some[2] - every[2]) ** 2)) < 0.3 * np.sqrt(np.mean(every[2] ** 2))


def test_each_cell_takes_the_factors_of_its_own_type_and_sample(trained_samples):
    """A gene is raised in each type of each sample, or one in all types of a sample."""
    decoder = Model.load(trained_samples).decoder
    mu, var = (part.expand(2, 3, -1) for part in (decoder.mu, decoder.var))
    encoded = mu, var, torch.full((2, 3), 1 / 3)
    by_type, by_sample = torch.zeros(2, 3, 60), torch.zeros(2, 60)
    for s, k in np.ndindex(2, 3):
        by_type[s, k, 3 * s + k] = by_sample[s, s] = float(np.log(30))

    def shares(log_factor):  # of each gene in cells of each type in each sample (S, K, G)
        generator, sums = torch.Generator().manual_seed(0), np.zeros((2, 3, 60))
        for cells in generate_cells(decoder, encoded, 600, generator, log_factor):
            np.add.at(sums, (cells.bulk, cells.cell_type), cells.counts.toarray())
        return (sums + 1) / sums.sum(axis=2, keepdims=True)

    plain = shares(None)
    for log_factor, raised in (
        (by_type, by_type),
        (by_sample, by_sample[:, None].expand(2, 3, 60)),
    ):
        ratio = shares(log_factor) / plain
        raised = raised.numpy() > 0
        assert (ratio[raised] > 2).all() and (ratio[~raised & (plain > 0.002)] < 1.5).all()


@pytest.fixture(scope="module")
def bulk_csv(tmp_path_factory):
    """The sums of all cells of each of the eight samples."""
    path = tmp_path_factory.mktemp("bulk") / "bulk.csv"
    make_sample_bulks(make_sample_cells()).to_csv(path)
    return path


def generate(out, bulk, weights, *flags):
    """Run bulk2sc.py; returns what it printed, the generated cells and the expression."""
    done = run_inside(
        "bulk2sc.py", "--bulk", bulk, "--weights", weights, "--out", out, "--n-cells", 300, *flags
    )
    assert done.returncode == 0, done.stderr[-2000:]
    table = anndata.read_h5ad(out.with_name(f"{out.stem}.expression.h5ad"))
    return done.stdout, anndata.read_h5ad(out), table


def treated_against_control(table):
    """log2 of the change of each type of each donor (4, K, G), by the table of expression."""
    change = pd.DataFrame(
        table.layers["log2_fold_change"], index=[table.obs["sample"], table.obs["cell_type"]]
    )
    names = [f"d{i}" for i in range(1, 5)]
    return np.stack(
        [
            [
                change.loc[(f"{name} treated", k)] - change.loc[(f"{name} control", k)]
                for k in CELL_TYPES
            ]
            for name in names
        ]
    )


def generated_profiles(cells):
    """Shares of the counts in generated cells of each type in each sample, by both names."""
    X = cells.X.toarray()
    table = pd.DataFrame(X, columns=cells.var_names)
    sums = table.groupby([cells.obs["sample"].to_numpy(), cells.obs["cell_type"].to_numpy()]).sum()
    return sums.div(sums.sum(axis=1), axis=0)


@pytest.mark.parametrize("calibrate", ["auto", "none", "uniform"])
def test_expression_of_each_type_in_each_sample(trained_samples, bulk_csv, tmp_path, calibrate):
    """What treatment raises in one type shows there, in the unseen donor d4 as well."""
    text, cells, table = generate(
        tmp_path / "g.h5ad", bulk_csv, trained_samples, "--calibrate", calibrate
    )
    assert ("--calibrate types, --platform keep: " in text) == (calibrate == "auto")
    assert "g.expression.h5ad: 24 cell types of samples x 60 genes" in text
    assert table.shape == (24, 60) and list(table.var_names) == [f"GENE{i}" for i in range(60)]
    assert list(table.var["gene_ids"][:2]) == ["ENSG00000000000", "ENSG00000000001"]
    samples = list(cells.uns["samples"])
    assert list(table.obs["sample"]) == list(np.repeat(samples, 3))
    assert list(table.obs["cell_type"]) == CELL_TYPES * 8
    np.testing.assert_allclose(table.obs["proportion"], cells.uns["proportions"]["proportion"])
    assert set(table.layers) == {"log2_fold_change", "log2_fold_change_sd"}
    for values in (table.X, *table.layers.values()):
        assert values.dtype == np.float32 and np.isfinite(values).all()
    assert (table.X >= 0).all() and table.obs_names.is_unique
    assert (table.layers["log2_fold_change_sd"] > 0).all() == (calibrate == "auto")

    change = treated_against_control(table)  # (4, K, G)
    here = change[:, :, TREATED_HERE].mean(axis=2)
    assert (here[:, 0] > 1).all() and (here[:, 1:] < here[:, [0]] - 1).all()
    assert (change[:, :, TREATED_EVERYWHERE].mean(axis=2) > 1).all()
    # The cells are as the table says. 300 of a sample are few of a type, hence means over genes.
    profiles = generated_profiles(cells)
    for name in ("d4 control", "d4 treated"):
        for k in CELL_TYPES:
            expected = table[(table.obs["sample"] == name) & (table.obs["cell_type"] == k)].X[0]
            expected = expected / expected.sum()
            error = profiles.loc[(name, k)].to_numpy() - expected
            assert abs(error).sum() < 0.15, (name, k)


def test_expected_counts_have_the_library_sizes_of_the_types(trained_samples, bulk_csv, tmp_path):
    _, cells, table = generate(tmp_path / "g.h5ad", bulk_csv, trained_samples)
    expected = table.X.sum(axis=1).reshape(8, 3)
    np.testing.assert_allclose(expected, np.tile(expected[:1], (8, 1)), rtol=1e-4)
    total = cells.X.sum(axis=1).A1
    for k, name in enumerate(CELL_TYPES):
        of_type = total[(cells.obs["cell_type"] == name).to_numpy()]
        assert of_type.mean() == pytest.approx(expected[0, k], rel=0.1)


def test_platform_is_left_out_or_not(trained_samples, bulk_csv, tmp_path):
    """A factor of 30 that all bulks share in one gene: cells show it, or do not."""
    bulk = pd.read_csv(bulk_csv, index_col=0)
    bulk.loc["GENE30"] = 30 * bulk.loc["GENE30"]
    bulk.to_csv(tmp_path / "bulk.csv")
    share = {}
    for platform in ("remove", "keep"):
        flags = ["--calibrate", "types", "--platform", platform]
        _, cells, table = generate(
            tmp_path / "g.h5ad", tmp_path / "bulk.csv", trained_samples, *flags
        )
        share[platform] = cells[:, "GENE30"].X.sum() / cells.X.sum()
        # Shared by all bulks, it is no change of theirs.
        assert abs(table[:, "GENE30"].layers["log2_fold_change"].mean()) < 1
    of_bulk = bulk.loc["GENE30"].sum() / bulk.to_numpy().sum()
    assert share["keep"] == pytest.approx(of_bulk, rel=0.2) and share["remove"] < of_bulk / 10


def test_without_states_nothing_changes_unless_asked(tmp_path):
    """The shipped weights are of one sample; bulks of them that differ in proportions alone."""
    rng = np.random.default_rng(0)
    model = Model.load(ROOT / "weights")
    decoder, card = model.decoder, model.metadata
    means = decoder.type_means().numpy()
    bulk = rng.dirichlet(np.ones(len(means)), 3) @ means * 1000
    path = tmp_path / "bulk.csv"
    pd.DataFrame(bulk.T, index=card["genes"], columns=["a", "b", "c"]).to_csv(path)
    for calibrate in ("auto", "none"):
        text, _, table = generate(
            tmp_path / "g.h5ad", path, ROOT / "weights", "--calibrate", calibrate
        )
        assert "--calibrate types" not in text
        assert abs(table.layers["log2_fold_change"]).max() < 1e-4
        assert not table.layers["log2_fold_change_sd"].any()
    text, _, table = generate(tmp_path / "g.h5ad", path, ROOT / "weights", "--calibrate", "types")
    assert abs(table.layers["log2_fold_change"]).max() > 1e-3
    assert (table.layers["log2_fold_change_sd"] > 0).all()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--calibrate"], ["--calibrate", "found no value"]),
        (["--calibrate", "all"], ["--calibrate: found all", "uniform or types"]),
        (["--platform", "other"], ["--platform: found other", "keep or remove"]),
    ],
)
def test_calibration_that_is_none_is_a_one_line_error(bulk_csv, tmp_path, flags, words):
    done = run_inside("bulk2sc.py", "--bulk", bulk_csv, "--out", tmp_path / "g.h5ad", *flags)
    assert_one_line_error(done, *words)
    assert list(tmp_path.iterdir()) == []
