"""References of several batches: profiles at one depth, folds of other batches, and states."""

import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from conftest import OF_SAMPLES, assert_one_line_error, refused, run_inside
from counts.genes import choose_marker_genes, choose_state_genes
from data import Reference
from deconvolution.proportions import normal_interval
from models import BulkEncoder, scDecoder
from runtime.weights import load_model
from states.pseudobulks import BulkCells, combine_batches, make_folds, mean_of_types
from states.reading import StateProfiles, filled_weights, states_of
from states.weights import ReferenceStates, choose_baseline

K, G = 3, 60


def test_batches_of_any_depth_combine_to_one_signature():
    """Profiles that differ by depth alone give the profile; a missing type does not shift it."""
    rng = np.random.default_rng(0)
    means = rng.lognormal(0, 1, (K, G)) * np.array([[1.0], [3.0], [0.5]])
    lacking = 4 * means
    lacking[1] = 0
    combined = combine_batches([means, lacking, 0.2 * means])
    ratio = combined / means
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)
    none = combine_batches([lacking, lacking])
    assert (none[1] == 0).all() and (none[[0, 2]].sum(axis=1) > 0).all()


def test_each_batch_weighs_the_same():
    """A gene that one of two batches has twice as high ends in between, whatever the depths."""
    a, b = np.ones((1, 4)), np.ones((1, 4))
    b[0, 0] = 5.0
    shares = [m / m.sum() for m in (a, b)]
    combined = combine_batches([100 * a, b])
    np.testing.assert_allclose(combined / combined.sum(), (shares[0] + shares[1]) / 2, rtol=1e-9)


def make_batches(seed=0):
    """BulkCells of two batches, the second with genes moved and without the last type."""
    rng = np.random.default_rng(seed)
    profiles = rng.lognormal(0, 1, (K, G))
    moved = profiles * rng.lognormal(0, 1, G)
    codes = np.r_[np.repeat(np.arange(K), 20), np.repeat([0, 1], 20)]
    batch = np.repeat([0, 1], [60, 40])
    rate = np.where(batch[:, None] == 0, profiles[codes], 2 * moved[codes])
    return BulkCells(sp.csr_matrix(rng.poisson(5 * rate).astype(np.float32)), codes, K, batch=batch)


def test_folds_of_batches_are_deconvolved_with_the_other_batch():
    """The means of the other batch, at this batch's content; a type that it lacks is filled in."""
    cells = make_batches()
    signature = mean_of_types(cells)
    model = BulkEncoder(G, K, 2, 4, 0.0)
    folds = make_folds(cells, model, signature, 4, np.random.default_rng(0))
    assert [fold.other_batches for fold in folds] == [True, False, True, False]
    own = cells.X[:60].toarray()
    of_first, within = folds[0], folds[1]
    assert of_first.cells.X.shape[0] == 60 and within.cells.X.shape[0] == 15
    means = of_first.means.numpy()
    for k in range(2):  # profiles of the second batch, totals of the first
        profile = cells.X[60:].toarray()[cells.codes[60:] == k].mean(axis=0)
        np.testing.assert_allclose(means[k] / means[k].sum(), profile / profile.sum(), rtol=1e-4)
    content = np.array([own[cells.codes[:60] == k].sum(axis=1).mean() for k in range(2)])
    np.testing.assert_allclose(means[1].sum() / means[0].sum(), content[1] / content[0], rtol=1e-4)
    profile = signature[2] / signature[2].sum()
    np.testing.assert_allclose(means[2] / means[2].sum(), profile, rtol=1e-4)


def test_without_batches_folds_are_parts_of_the_cells():
    cells = make_batches()
    cells.batch = None
    folds = make_folds(cells, BulkEncoder(G, K, 2, 4, 0.0), mean_of_types(cells), 4, rng())
    assert [fold.other_batches for fold in folds] == [False] * 4
    assert sum(fold.cells.X.shape[0] for fold in folds) == 100


def rng():
    return np.random.default_rng(0)


def gene_cells():
    """Two batches of two types. GENE0 tells types apart in both, GENE1 in one and GENE2 batches."""
    codes, batch = np.tile([0, 1], 100), np.repeat([0, 1], 100)
    X = np.full((200, 40), 5.0)
    X[:, 0] += 20 * codes
    X[:, 1] += 60 * codes * (batch == 0)
    X[:, 2] += 40 * batch
    X = sp.csr_matrix(rng().poisson(X).astype(np.float32))
    cells = anndata.AnnData(X, var=pd.DataFrame(index=[f"GENE{i}" for i in range(40)]))
    cells.var["gene_ids"] = ""
    return cells, codes, batch


def test_marker_genes_must_tell_types_apart_in_every_batch():
    cells, codes, batch = gene_cells()
    assert choose_marker_genes(cells, codes, 1, batch) == ["GENE0"]


def test_what_differs_between_batches_is_no_state():
    cells, codes, batch = gene_cells()
    assert "GENE2" in choose_state_genes(cells, codes, batch, 5)
    assert "GENE2" not in choose_state_genes(cells, codes, batch, 5, batch)


@pytest.mark.parametrize(("names", "found"), [(["a", "b"], [0, 1]), (["a", "a"], None)])
def test_one_batch_is_none(names, found):
    cells = anndata.AnnData(np.zeros((2, 1)))
    cells.obs["batch"] = pd.Categorical(names)
    codes = Reference(cells).batch
    assert codes is None if found is None else list(codes) == found


def test_common_deviation_of_a_cohort_is_taken_off():
    """Factors of genes shared by all bulks: samples are told apart better without them."""
    generator = torch.Generator().manual_seed(0)
    signature = torch.rand(K, 200, generator=generator) ** 3 + 0.01
    model = BulkEncoder(200, K, 2, 4, 0.0).eval()
    torch.manual_seed(0)
    true = torch.distributions.Dirichlet(torch.ones(K)).sample((30,))
    model.fit_input(true @ signature, signature)
    bulk = true @ signature * torch.exp(torch.randn(200, generator=generator))
    bulk = bulk * torch.exp(0.2 * torch.randn(bulk.shape, generator=generator))
    present = torch.ones(200)
    fractions = model.normalise(bulk, present)
    with torch.no_grad():
        alone = model.deconvolve(fractions, present)
        together = model.deconvolve_cohort(fractions, present)
    torch.testing.assert_close(together.sum(dim=1), torch.ones(30))
    correlation = [
        np.mean([np.corrcoef(true[:, k], pi[:, k])[0, 1] for k in range(K)])
        for pi in (alone, together)
    ]
    assert correlation[1] > correlation[0] and correlation[1] > 0.98
    # The mean is left as it was: what a cohort shares says nothing of its mean composition.
    torch.testing.assert_close(together.mean(dim=0), alone.mean(dim=0), atol=0.03, rtol=0)


N_TYPES, N_GENES = 2, 2000
IN_ONE, IN_ALL = slice(0, 200), slice(200, 400)  # genes that the treatment raises, by type


def platform_factor(seed, sd=1.0):
    """What another platform multiplies the genes by (G)."""
    return np.random.default_rng(seed).lognormal(0, sd, N_GENES)


def make_profiles():
    """Profiles of two types (K, G), untreated and treated."""
    control = np.random.default_rng(0).gamma(1, 1, (N_TYPES, N_GENES)) + 0.3
    treated = control.copy()
    treated[0, IN_ONE] *= 10
    treated[:, IN_ALL] *= 10
    return [values / values.sum(axis=1, keepdims=True) for values in (control, treated)]


def make_states(conditions=("control", "treated") * 2, baseline=("control",)):
    """StateProfiles of samples a and b of batch v2, and c and d of v3, each one part of a cloud."""
    platform = platform_factor(1)
    profiles = [p * f for f in (1, platform) for p in make_profiles()]
    parts = np.stack([p / p.sum(axis=1, keepdims=True) for p in profiles], axis=1)  # (K, C, G)
    weight = torch.eye(4)[:, None].expand(-1, N_TYPES, -1).clone()
    n_cells = torch.full((4, N_TYPES), 30.0)
    batches = ["v2", "v2", "v3", "v3"]
    states = ReferenceStates(
        list("abcd"), list(conditions), batches, list(baseline), n_cells, weight
    )
    return StateProfiles(states, parts)


def test_a_state_is_what_differs_from_the_baseline_of_its_own_batch():
    """Of both batches' treated samples the same, on the platform of all baselines."""
    states, (control, treated) = make_states(), make_profiles()
    assert states.states.others == [1, 3] and states.states.baseline_of("v3") == [2]
    change, expected = np.log(states.moved / states.baseline), np.log(treated / control)
    change -= np.median(change, axis=2, keepdims=True)  # fractions know no common factor
    expected -= np.median(expected, axis=1, keepdims=True)
    expressed = states.batch.min(axis=0) > 1e-4  # others are too rare to tell
    assert abs(change - expected)[:, expressed].max() < 0.3
    # Their own profiles keep the platform.
    assert np.std(np.log(states.own[1] / states.own[0])) > 0.9
    np.testing.assert_allclose(states.own[1], states.parts[:, 3])


def bulks_of(states, profiles, seed=2):
    """Ten bulks (B, G), on as many platforms, of types whose profiles are given (K, G)."""
    rng = np.random.default_rng(seed)
    pi = rng.dirichlet(np.full(N_TYPES, 5), 10)
    mean = pi @ profiles * np.stack([platform_factor(seed + 10 + i) for i in range(10)])
    bulk = rng.poisson(1e6 * mean / mean.sum(axis=1, keepdims=True))
    return bulk, pi


def test_platforms_are_no_states_and_states_are_read_on_any_platform():
    states, (control, treated) = make_states(), make_profiles()
    read = {}
    measured = np.arange(N_GENES) % 10 > 0
    for name, profiles in (
        ("none", control),
        ("other batch", states.parts[:, 2]),
        ("half", (control + treated) / 2),
        ("treated", treated),
        ("treated, other batch", states.parts[:, 3]),
    ):
        bulk, pi = bulks_of(states, profiles)
        found = states.read(np.where(measured, bulk, 12345), measured, pi)
        assert found.names == ["treated"] and found.samples == ["b", "d"]
        read[name] = found.by_condition()[:, 0]
        low, high = (end[:, 0] for end in normal_interval(found.by_condition(), found.sd))
        assert (low <= read[name]).all() and (high >= read[name]).all() and (high > low).all()
        assert (found.share >= 0).all() and (found.share.sum(axis=1) <= 1 + 1e-9).all()
        np.testing.assert_allclose(states.mix(found.share).sum(axis=2), 1, rtol=1e-5)
    assert max(read["none"].max(), read["other batch"].max()) < 0.1
    assert min(read["treated"].min(), read["treated, other batch"].min()) > 0.8
    assert 0.3 < read["half"].mean() < 0.7


def test_a_reference_of_the_baseline_alone_has_no_states():
    states = make_states(["control"] * 4)
    bulk, pi = bulks_of(states, make_profiles()[1])
    found = states.read(bulk, np.ones(N_GENES, bool), pi)
    assert found.samples == [] and found.names == [] and found.share.shape == (10, 0)
    moved, own = (states.profiles(found.share, part) for part in (states.moved, states.own))
    np.testing.assert_allclose(moved, np.broadcast_to(states.baseline, moved.shape), rtol=1e-5)
    np.testing.assert_array_equal(moved, own)
    assert states.mix(found.share).shape == (10, N_TYPES, 4)


def test_a_type_that_a_condition_lacks_is_as_the_baseline():
    """Of its own batch; of all batches where that lacks it as well."""
    states = make_states().states
    states.weight[:] = 0.25
    states.weight[0, 1], states.weight[2, 0] = torch.eye(4)[0], torch.eye(4)[2]
    states.n_cells[1, 1], states.n_cells[3, 0] = 0, 0
    states.n_cells[2:, 1] = 0
    filled = filled_weights(states)
    np.testing.assert_array_equal(filled[1, 1], np.eye(4)[0])
    np.testing.assert_array_equal(filled[3, 0], np.eye(4)[2])
    np.testing.assert_array_equal(filled[3, 1], np.eye(4)[0])
    np.testing.assert_array_equal(filled[1, 0], np.full(4, 0.25))


def test_every_batch_has_a_baseline():
    """Asked for, or the most common condition and its own most common one."""
    conditions, batches = ["x", "y", "y", "z", "w", "w"], ["v2", "v2", "v2", "v3", "v4", "v4"]
    assert choose_baseline((), conditions, batches) == ["w", "y", "z"]
    assert choose_baseline(("x", "z", "w"), conditions, batches) == ["x", "z", "w"]
    refused(lambda: choose_baseline(("q",), conditions, batches), "--baseline", "q", "w, x, y, z")
    refused(lambda: choose_baseline(("y", "w"), conditions, batches), "y w", "batch v3", "z")


def test_training_with_several_batches(trained_samples, sample_h5ad, tmp_path):
    """Clouds of batches and conditions share no parts; the network leaves proportions alone.

    The Bulk Encoder's file holds composition and mRNA content.
    """
    cells = anndata.read_h5ad(sample_h5ad)
    batch = cells.obs["donor"].isin(["d1", "d2"]).map({True: "v2", False: "v3"})
    pd.DataFrame({"batch": batch}).to_csv(tmp_path / "batches.csv", index_label="barcode")
    weights = tmp_path / "weights"
    shutil.copytree(trained_samples, weights)  # others read what is trained there
    flags = ["--data", sample_h5ad, "--weights", weights, *OF_SAMPLES]
    given = ["--batch-key", tmp_path / "batches.csv", "--conditions", "treatment"]
    done = run_inside("train_decoder.py", *flags, *given, "--epochs", 1, "--n-hidden", 8)
    assert done.returncode == 0 and "baseline: control; --baseline" in done.stdout, done.stderr
    states = states_of(load_model(weights / "scDecoder_model.pt", scDecoder)[1])
    assert states.samples == [f"d{i} {name}" for i in (1, 2, 3) for name in ("control", "treated")]
    assert states.batches == ["v2"] * 4 + ["v3"] * 2 and states.others == [1, 3, 5]
    assert states.conditions == ["control", "treated"] * 3 and (states.n_cells == 12).all()
    shared = torch.minimum(states.weight[:, None], states.weight).sum(dim=3)  # (S, S, K)
    group = np.array([0, 1, 0, 1, 2, 3])
    assert shared[group[:, None] != group].max() < 0.2 < shared[group[:, None] == group].min()
    few = ["--steps", 4, "--n-hidden", 8, "--batch-size", 16]
    done = run_inside("train_encoder.py", *flags, *few, "--batch-key", tmp_path / "batches.csv")
    assert done.returncode == 0, done.stderr
    assert "2 batches" in done.stdout
    model, card = load_model(weights / "bulkEncoder_model.pt", BulkEncoder)
    assert (model.pi_head.weight == 0).all() and (model.log_weight != 0).any()
    assert len(card["content"]) == len(card["composition"]) == K
    assert sum(card["composition"]) == pytest.approx(1)
    total = cells.X.sum(axis=1).A1[~cells.obs["donor"].isin(["d4"])].mean()
    assert np.mean(card["content"]) == pytest.approx(total, rel=0.2)
    resume = [*flags, *few, "--batch-key", tmp_path / "batches.csv", "--resume"]
    assert "nothing left to do" in run_inside("train_encoder.py", *resume).stdout
    batch[cells.obs["donor"] == "d2"] = "v3"  # edited since
    pd.DataFrame({"batch": batch}).to_csv(tmp_path / "batches.csv", index_label="barcode")
    again = run_inside("train_encoder.py", *resume)
    assert again.returncode == 0 and "other cells, labels, samples" in again.stdout


def test_batches_need_samples(sample_h5ad, tmp_path):
    flags = ["--data", sample_h5ad, "--weights", tmp_path, "--batch-key", "donor"]
    assert_one_line_error(run_inside("train_encoder.py", *flags), "--batch-key", "--samples")


def test_samples_are_of_one_batch(trained_samples, sample_h5ad):
    flags = ["--data", sample_h5ad, "--weights", trained_samples, *OF_SAMPLES]
    done = run_inside("train_encoder.py", *flags, "--batch-key", "cell_type")
    assert_one_line_error(done, "--batch-key cell_type", "several")


def test_bulks_of_another_platform_are_not_corrected_by_the_network():
    """A head that would move every answer moves those of the reference's own platform alone."""
    model = BulkEncoder(G, K, 2, 4, 0.0).eval()
    signature = torch.rand(K, G, generator=torch.Generator().manual_seed(0)) + 0.1
    model.fit_input(signature, signature)
    model.pi_head.bias.data[0] = 3.0
    bulk = torch.distributions.Dirichlet(torch.ones(K)).sample((6,)) @ signature
    fractions = model.normalise(bulk, torch.ones(G))
    with torch.no_grad():
        expected = model.deconvolve_cohort(fractions, torch.ones(G))
        torch.testing.assert_close(model(bulk, one_platform=True)[2], expected)
        assert (model(bulk)[2][:, 0] > expected[:, 0] + 0.05).all()
