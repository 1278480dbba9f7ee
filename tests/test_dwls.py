"""The Bulk Encoder's second estimate of proportions: its signature, and the mean of both."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from conftest import ROOT, assert_one_line_error, make_cells, run_inside
from data import mean_counts
from deconvolution import dwls
from deconvolution.encode import encode_samples, proportion_sd
from generation import Model
from readers.bulk import Bulk

GENES = [f"GENE{i}" for i in range(300)]


@pytest.fixture(scope="module")
def cells():
    """Counts (N x G), CSR, types (N) and mean counts of the types (K, G)."""
    cells = make_cells((60, 50, 40), n_genes=len(GENES), seed=1)
    codes = cells.obs["cell_type"].astype("category").cat.codes.to_numpy().astype(np.int64)
    X = sp.csr_matrix(cells.X)
    return X, codes, mean_counts(X, codes, 3)


@pytest.fixture(scope="module")
def bulks(cells):
    """True proportions (S, K) and noise-free bulks (S, G)."""
    true = np.random.default_rng(0).dirichlet(np.full(3, 2.0), 6)
    return true, true @ cells[2] * 500


def make(cells, genes=GENES, several_batches=False):
    X, codes, mean = cells
    return dwls.make_signature(mean, X, codes, genes, several_batches)


def test_signature_holds_the_genes_that_rise_most_in_each_type(cells):
    X, codes, mean = cells
    signature = make(cells)
    change = dwls.significant_change(*dwls.differential_expression(X, codes, 3))
    best = [GENES[g] for g in change.argmax(axis=1)]
    assert set(best) <= set(signature.genes) < set(GENES)
    kept = [GENES.index(name) for name in signature.genes]
    torch.testing.assert_close(signature.mean, torch.from_numpy(mean[:, kept]).float())
    assert torch.isfinite(signature.change).any(dim=0).all()


def test_signature_finds_proportions_in_any_order_of_genes(cells, bulks):
    true, bulk = bulks
    signature, measured = make(cells), np.ones(len(GENES), bool)
    found = signature.proportions(bulk, GENES, measured)
    assert found == pytest.approx(true, abs=1e-3)
    order = np.random.default_rng(0).permutation(len(GENES))
    again = signature.proportions(bulk[:, order], [GENES[g] for g in order], measured)
    assert again == pytest.approx(found)


def test_genes_that_were_not_measured_are_not_read(cells, bulks):
    true, bulk = bulks
    measured = np.random.default_rng(0).random(len(GENES)) < 0.7
    garbage = np.where(measured, bulk, 1e9)
    found = make(cells).proportions(garbage, GENES, measured)
    assert found == pytest.approx(true, abs=1e-3)


def test_problems_are_solved_together_as_one_by_one():
    """Whatever was guessed of which are 0."""
    rng = np.random.default_rng(0)
    A, target = rng.gamma(1, 1, (40, 30, 6)), rng.normal(1, 3, (40, 6))
    gram = A.transpose(0, 2, 1) @ A
    expected = np.stack([dwls.solve_nonnegative(*each) for each in zip(gram, target, strict=True)])
    for free in (np.ones((40, 6), bool), expected > 0, rng.random((40, 6)) < 0.5):
        found = dwls.solve_all_nonnegative(gram, target, free)
        np.testing.assert_allclose(found, expected, atol=1e-8)


def test_the_answer_of_a_bulk_does_not_depend_on_those_after_it():
    rng = np.random.default_rng(0)
    S = rng.gamma(0.5, 1, (80, 4)) + 1e-3
    bulk = rng.poisson(rng.dirichlet(np.ones(4), 9) @ S.T * 50)
    bulk[4] = 0
    every = dwls.dwls(bulk, S)
    np.testing.assert_allclose(dwls.dwls(bulk[:6], S), every[:6], atol=1e-9)
    np.testing.assert_array_equal(every[4], 0.25)  # of a bulk without counts


def test_no_second_estimate_without_genes_of_every_type(cells, bulks):
    signature = make(cells)
    of_one = [name for name, c in zip(signature.genes, signature.change[1], strict=True) if c > 0]
    measured = ~np.isin(GENES, of_one)
    assert signature.proportions(bulks[1], GENES, measured) is None
    assert signature.proportions(bulks[1], [f"X{g}" for g in GENES], measured) is None


def test_genes_of_the_protocol_are_left_out_of_several_batches(cells):
    best = [GENES.index(name) for name in make(cells).genes[:2]]
    genes = list(GENES)
    genes[best[0]], genes[best[1]] = "RPL3", "MT-CO1"
    assert {"RPL3", "MT-CO1"} <= set(make(cells, genes).genes)
    assert not {"RPL3", "MT-CO1"} & set(make(cells, genes, several_batches=True).genes)


def test_a_reference_of_one_type_has_no_signature(cells):
    X, codes, mean = cells
    signature = dwls.make_signature(mean[:1], X, np.zeros_like(codes), GENES, False)
    assert signature.genes == [] and signature.mean.shape == (1, 0)
    measured = np.ones(len(GENES), bool)
    assert signature.proportions(mean[:1], GENES, measured) is None


def test_error_of_the_mean_by_hand():
    pi, other = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    halves = [torch.tensor([[0.6, 0.4]]), torch.tensor([[0.5, 0.5]])]
    of_estimator = 0.5 * 0.5 * (pi - other) ** 2
    sd = proportion_sd((pi + other) / 2, pi, halves, of_estimator, torch.tensor([0.5]))
    content = 0.7 * 0.3 * 2**0.5 * 0.4 * 0.5  # m_1 m_2 for both j
    expected = (0.1**2 / 2 + 0.2**2 + content**2 + 0.005**2) ** 0.5
    torch.testing.assert_close(sd, torch.full((1, 2), expected))
    assert proportion_sd(pi, pi, [], of_estimator, torch.tensor([0.5])).isnan().all()


def test_bulks_get_the_mean_of_both_estimates():
    model = Model.load(ROOT / "weights" / "pbmc1k")
    decoder, card = model.decoder, model.encoder_metadata
    rng = np.random.default_rng(0)
    pi = rng.dirichlet(np.ones(len(decoder.mu)), 4)
    bulk = rng.poisson(pi @ decoder.type_means().numpy() * rng.lognormal(0, 0.3, 14688)) + 0.0
    measured, names = np.ones(bulk.shape[1], bool), list("abcd")

    def ask(metadata, mrna_content):
        asked = replace(model, encoder_metadata=metadata)
        return encode_samples(asked, Bulk(bulk, measured, names), mrna_content)

    alone = {name: value for name, value in card.items() if name != "signature"}
    second = dwls.Signature(**card["signature"])
    for content in ("reference", "published"):
        both, first = ask(card, content), ask(alone, content)
        other = second.proportions(bulk, model.genes, measured)
        scale = np.array(card["content"]) / both.content  # from cells by counts to cells by mRNA
        counted = first.cells.numpy() / scale
        mean = 0.7 * counted / counted.sum(axis=1, keepdims=True) + 0.3 * other
        mean = mean * scale / (mean * scale).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(both.cells, mean, atol=1e-5)
        assert (both.cells - first.cells).abs().max() > 0.005
        torch.testing.assert_close(both.mu, first.mu)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("genes", ["A", "A"]),
        ("mean", torch.tensor([[-1.0, 1.0]] * 3)),
        ("mean", torch.ones(2, 2)),
        ("change", torch.full((3, 2), torch.nan)),
        ("change", [[1.0, 2.0]] * 3),
    ],
)
def test_weights_with_a_broken_signature_are_refused(trained, tmp_path, name, value):
    for file in trained.glob("*.pt"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "bulkEncoder_model.pt"
    content = torch.load(path, weights_only=True)
    good = {"genes": ["A", "B"], "mean": torch.ones(3, 2), "change": torch.ones(3, 2)}
    content["signature"] = good | {name: value}
    torch.save(content, path)
    done = run_inside("bulk2sc.py", "--weights", tmp_path, "--n-cells", 5)
    assert_one_line_error(done, "bulkEncoder_model.pt", "signature")
