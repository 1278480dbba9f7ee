"""References of several batches: profiles at one depth, and folds of other batches' profiles."""

import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from conftest import OF_SAMPLES, assert_one_line_error, run_inside
from counts.genes import choose_marker_genes, choose_state_genes
from data import Reference
from models import BulkEncoder
from runtime.weights import load_model
from states.moments import SampleMoments, relative_to_batches
from states.pseudobulks import BulkCells, combine_batches, make_folds, mean_of_types

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
    """GENE2 differs between the samples only as they are of different batches."""
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


def test_moments_relative_to_batches_keep_what_samples_of_a_batch_differ_by():
    """By hand: batch 0 has two samples of 10 and 30 cells, batch 1 one, and a type is missing."""
    n_cells = np.array([[10, 0], [30, 5], [20, 5]])
    mu = np.array([[[1.0], [9.0]], [[5.0], [2.0]], [[40.0], [7.0]]])  # (S, K, D)
    var = np.array([[[1.0], [9.0]], [[3.0], [4.0]], [[8.0], [4.0]]])
    of_types = np.array([[10.0], [20.0]]), np.array([[2.0], [6.0]])
    found = relative_to_batches(SampleMoments(n_cells, mu, var), np.array([0, 0, 1]), *of_types)
    # The mean of batch 0 is 4 and its variance 2.5; the sample without cells has the type's.
    expected = [[[10 + 1 - 4], [20]], [[10 + 5 - 4], [20]], [[10], [20]]]
    np.testing.assert_allclose(found.mu, expected)
    np.testing.assert_allclose(found.var, [[[0.8], [6]], [[2.4], [6]], [[2], [6]]])


def test_held_out_samples_are_relative_to_their_batch_in_training():
    training = SampleMoments(np.array([[10], [0]]), np.ones((2, 1, 1)), np.ones((2, 1, 1)))
    held_out = SampleMoments(np.array([[0], [4]]), np.full((2, 1, 1), 3.0), np.full((2, 1, 1), 2.0))
    of_types = np.zeros((1, 1)), np.ones((1, 1))
    found = relative_to_batches(held_out, np.array([0, 0]), *of_types, training)
    assert found.mu[1, 0, 0] == 2 and found.var[1, 0, 0] == 2
    alone = relative_to_batches(held_out, np.array([0, 1]), *of_types, training)
    assert alone.mu[1, 0, 0] == 0 and alone.var[1, 0, 0] == 1


def test_an_encoder_of_several_batches(trained_samples, sample_h5ad, tmp_path):
    """Its network leaves proportions alone, and its file holds composition and mRNA content."""
    cells = anndata.read_h5ad(sample_h5ad)
    batch = cells.obs["donor"].isin(["d1", "d2"]).map({True: "v2", False: "v3"})
    pd.DataFrame({"batch": batch}).to_csv(tmp_path / "batches.csv", index_label="barcode")
    weights = tmp_path / "weights"
    shutil.copytree(trained_samples, weights)  # others read what is trained there
    flags = ["--data", sample_h5ad, "--weights", weights, *OF_SAMPLES]
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
