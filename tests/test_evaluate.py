"""The metrics on identical, shifted, permuted and copied cells; and evaluate.py as a script."""

import copy
import shutil
from dataclasses import replace

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.sparse as sp
import scipy.stats
import torch
from sklearn.datasets import make_blobs

import evaluate
import generation
from conftest import CELL_TYPES, assert_one_line_error, make_cells, run_inside
from data import Reference, log_normalise, split_cells
from deconvolution.published import METHODS, nnls_proportions
from evaluation import baselines, metrics
from evaluation import proportions as proportion_tests
from models import Model, scDecoder
from readers import lineages
from runtime.errors import InputError


@pytest.fixture(scope="module")
def fitted():
    """CellMetrics of 300 synthetic cells, half of them held out; and these cells."""
    cells = make_cells((120, 100, 80))
    cells.obs["cell_type"] = cells.obs["cell_type"].astype("category")
    codes = Reference.of(cells).codes
    held_out = split_cells(codes, 0.5, 0)
    return metrics.CellMetrics(cells, held_out, codes, n_trees=30), cells, codes, held_out


# Metrics of cells and proportions; test_contrasts.py has those of donors that no training has seen.
MEASURED = [m for m in metrics.METRICS if m not in metrics.CONTRAST_METRICS]


def overall(rows):
    return {metric: value for metric, k, value in rows if k is None}


def compare(fitted, X, codes, **options):
    return overall(fitted[0].compare(sp.csr_matrix(X), codes, 0, **options))


def other_half(fitted):
    _, cells, codes, held_out = fitted
    return cells.X[np.flatnonzero(~held_out)], codes[~held_out]


@pytest.fixture(scope="module")
def values_of_other_half(fitted):
    return compare(fitted, *other_half(fitted), trained_on=True)


def test_the_other_half_of_the_real_cells_is_as_good_as_it_gets(values_of_other_half):
    values = values_of_other_half
    assert 0.35 < values["random-forest AUROC, PCs"] < 0.62
    assert 0.35 < values["random-forest AUROC, genes"] < 0.62
    assert abs(values["MMD2, PCs"]) < 0.01
    assert 0.7 < values["within-type variance ratio"] < 1.4
    assert values["macro-F1, generated to real"] > 0.95
    assert values["fold-change correlation"] > 0.95
    assert abs(values["energy distance"]) < 0.2
    # Of bulks, or of two CellMetrics.
    others = ("proportions", "sum of cells", "excess of AUROC")
    assert set(values) == {m for m in MEASURED if not m.startswith(others)}
    assert 0.85 < values["fold-change slope"] < 1.15


def test_the_held_out_cells_themselves_are_perfect(fitted):
    _, cells, codes, held_out = fitted
    values = compare(fitted, cells.X[np.flatnonzero(held_out)], codes[held_out])
    for metric in ("gene-gene correlation RMSE", "zero-fraction error", "library-size KS",
                   "marker mean error", "marker fraction error"):  # fmt: skip
        assert values[metric] == pytest.approx(0, abs=1e-9), metric
    assert values["within-type variance ratio"] == pytest.approx(1)
    assert values["fold-change correlation"] == pytest.approx(1)
    assert values["nearest neighbour trained on, excess"] < -0.3  # copies of held-out cells


def test_permuted_labels_change_the_metrics_that_use_labels_alone(fitted, values_of_other_half):
    X, codes = other_half(fitted)
    right = values_of_other_half
    wrong = compare(fitted, X, np.random.default_rng(0).permutation(codes), trained_on=True)
    assert wrong["macro-F1, generated to real"] < 0.6 < right["macro-F1, generated to real"]
    assert wrong["fold-change correlation"] < 0.5
    assert wrong["energy distance"] > 10 * abs(right["energy distance"])
    assert wrong["marker mean error"] > 3 * right["marker mean error"]
    assert wrong["within-type variance ratio"] > 1.5 * right["within-type variance ratio"]
    for metric in ("MMD2, PCs", "zero-fraction error", "library-size KS"):
        assert wrong[metric] == right[metric], metric


def test_shifted_cells_are_detected(fitted):
    X, codes = other_half(fitted)
    loud = X.toarray() * 3
    loud[:, :5] += 50
    values = compare(fitted, loud, codes)
    assert values["random-forest AUROC, PCs"] > 0.95 and values["random-forest AUROC, genes"] > 0.95
    assert values["library-size KS"] > 0.6
    assert values["MMD2, PCs"] > 0.05  # the other half of the real cells is below 0.01
    assert values["zero-fraction error"] > 0


def test_mean_cells_have_no_variance_and_independent_genes_no_correlation(fitted):
    X, codes = other_half(fitted)
    means = np.stack([X[codes == k].toarray().mean(axis=0) for k in range(3)])
    values = compare(fitted, np.rint(means[codes] * 10).astype(int), codes)
    assert values["within-type variance ratio"] < 1e-6
    assert values["random-forest AUROC, genes"] > 0.99
    dense = X.toarray()
    rng = np.random.default_rng(0)
    shuffled = np.stack([rng.permutation(column) for column in dense.T], axis=1)
    log = [log_normalise(sp.csr_matrix(X)).toarray() for X in (dense, shuffled)]
    real = log_normalise(fitted[1].X).toarray()
    intact, independent = (metrics.correlation_rmse(real, generated) for generated in log)
    assert independent > 2 * intact


def test_copies_of_training_cells_are_detected(fitted, values_of_other_half):
    """All nearest neighbours of copies are training cells; of held-out cells about half are."""
    X, codes = other_half(fitted)
    copied = compare(fitted, X, codes)["nearest neighbour trained on, excess"]
    assert copied == pytest.approx(1 - fitted[0].expected_share)
    assert copied > 0.3
    assert abs(values_of_other_half["nearest neighbour trained on, excess"]) < 0.15


def test_energy_distance_and_mmd_against_closed_forms():
    """One dimension: scipy gives the root of the energy distance; one normal against another."""
    rng = np.random.default_rng(0)
    grid = scipy.stats.norm.ppf((np.arange(1500) + 0.5) / 1500)  # normal without sampling noise
    a, b = (rng.permutation(grid)[:, None] + m for m in (0, 0.7))
    expected = scipy.stats.energy_distance(a[:, 0], b[:, 0]) ** 2
    assert metrics.energy_distance(a, b) == pytest.approx(expected, rel=0.02)
    assert abs(metrics.energy_distance(a[:700], a[700:])) < 0.02
    assert abs(metrics.mmd2(a[:700], a[700:])) < 0.003
    # Gaussian kernel of variance w/2: E k = sqrt(w/(w+4)) exp(-m²/(w+4)), m the distance of means.
    d = np.abs(np.subtract.outer(np.r_[a, b][:, 0], np.r_[a, b][:, 0])) ** 2
    w = np.median(d[d > 0])
    closed = 2 * np.sqrt(w / (w + 4)) * (1 - np.exp(-(0.7**2) / (w + 4)))
    assert metrics.mmd2(a, b) == pytest.approx(closed, rel=0.03)


def test_forest_and_variance_on_known_blobs():
    X, y = make_blobs(400, centers=[[0, 0], [10, 10]], random_state=0)
    half = np.arange(400) % 2 == 0
    assert metrics.random_forest_auroc(X[half], X[~half], 0, 50) == pytest.approx(0.5, abs=0.1)
    assert metrics.random_forest_auroc(X[y == 0], X[y == 1], 0, 50) > 0.999
    centre = np.stack([X[y == k].mean(axis=0) for k in (0, 1)])[y]
    wider = centre + (X - centre) * np.sqrt([2.0, 3.0])[y][:, None]
    ratios = metrics.within_type_variance_ratio(X, y, wider, y)
    assert ratios == pytest.approx({0: 2, 1: 3})


def draw_attenuated(keep, n_per_type, rng, n_genes=1000):
    """Cells of three types, log fold changes times ``keep``: counts (N x G), CSR; types (N)."""
    change = np.random.default_rng(0).normal(0, 1, (3, n_genes))  # the same in every call
    change[:, ::2] = 0
    profile = np.exp(keep * change)
    codes = np.repeat([0, 1, 2], n_per_type)
    mean = (
        profile[codes] / profile.sum(axis=1)[codes, None] * rng.lognormal(8, 0.3, (len(codes), 1))
    )
    return sp.csr_matrix(rng.poisson(mean * rng.gamma(2, 1 / 2, mean.shape))), codes


def test_slope_of_fold_changes_is_one_for_fresh_cells_and_lower_for_attenuated_ones():
    """Also with few cells, of which least squares makes an attenuated slope of perfect cells."""
    rng = np.random.default_rng(0)
    sizes = (12, 8, 6)
    slopes, least_squares, attenuated, noisy = [], [], [], []
    for seed in range(8):
        real, fresh, other = (draw_attenuated(keep, sizes, rng) for keep in (1, 1, 0.6))
        slopes.append(list(metrics.fold_change_slopes(*real, *fresh, seed).values()))
        attenuated.append(list(metrics.fold_change_slopes(*real, *other, seed).values()))
        rows = [np.flatnonzero(real[1] == k) for k in range(3)]
        a, b = (metrics.type_changes(X, rows) for X, _ in (real, fresh))
        least_squares.append((a * b).sum(axis=1) / (a * a).sum(axis=1))
        noise = rng.permutation(real[0].toarray().T).T  # fold changes of other genes
        noisy.append(
            list(metrics.fold_change_slopes(*real, sp.csr_matrix(noise), real[1], 0).values())
        )
    assert np.mean(slopes, axis=0) == pytest.approx(np.ones(3), abs=0.06)
    assert (np.mean(least_squares, axis=0) < 0.85).all()
    assert np.mean(attenuated, axis=0) == pytest.approx(np.full(3, 0.6), abs=0.08)
    assert np.mean(noisy, axis=0) == pytest.approx(np.zeros(3), abs=0.06)


def test_slope_of_fold_changes_needs_cells_of_two_types():
    X, codes = draw_attenuated(1, (12, 8, 5), np.random.default_rng(0))
    assert set(metrics.fold_change_slopes(X, codes, X, codes, 0)) == {0, 1}  # halves of two cells
    few = np.r_[0:12, 12:14, 20:25]  # two of the second type, on one side alone
    assert set(metrics.fold_change_slopes(X, codes, X[few], codes[few], 0)) == {0}
    assert metrics.fold_change_slopes(X[:12], codes[:12], X, codes, 0) == {}


def test_concordance_and_nnls():
    t = np.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    assert metrics.concordance(t, t) == pytest.approx(1)
    assert metrics.concordance(t, t[:, ::-1]) == pytest.approx(-1)
    assert metrics.concordance(t, t + 0.3) < 0.8  # a constant bias costs, unlike in Pearson's
    profiles = np.random.default_rng(0).gamma(1.0, 1.0, (2, 50))
    assert nnls_proportions(t @ profiles, profiles) == pytest.approx(t)


def test_lineages_are_summed_and_renormalised():
    proportions = np.array([[0.1, 0.2, 0.3, 0.4], [0.0, 0.5, 0.5, 0.0], [0, 0, 0, 1]])
    summed = metrics.to_lineages(proportions, ["T", "B", "T", None], ["B", "T"])
    assert summed == pytest.approx(np.array([[1 / 3, 2 / 3], [0.5, 0.5], [0.5, 0.5]]))  # last: none
    # Measured fractions are treated likewise: a column that is no lineage is left out.
    summed = metrics.to_lineages(np.array([[30.0, 10, 99]]), ["T", "B", "Unknown"], ["B", "T"])
    assert summed == pytest.approx(np.array([[0.25, 0.75]]))


def test_proportion_metrics_of_perfect_wrong_and_permuted_predictions():
    true = np.random.default_rng(0).dirichlet(np.ones(4), 50)
    perfect = metrics.proportion_metrics(true, true, ", shift")
    assert perfect == pytest.approx({
        "proportions RMSE, shift": 0, "proportions CCC, shift": 1, "proportions MAE, shift": 0,
        "proportions Pearson within lineage, shift": 1,
    })  # fmt: skip
    assert set(perfect) == set(metrics.proportion_names(", shift"))
    wrong = list(metrics.proportion_metrics(true, true[:, [1, 2, 3, 0]], "").values())
    assert wrong[0] > 0.2 and wrong[1] < 0.3 and wrong[2] > 0.15
    a, b = np.array([[0.2, 0.8]]), np.array([[0.5, 0.5]])
    assert metrics.proportion_metrics(a, b, "")["proportions RMSE"] == pytest.approx(0.3)
    a, b = np.array([[0.2, 0.8], [0.5, 0.5]]), np.array([[0.6, 0.4], [0.5, 0.5]])
    assert metrics.proportion_metrics(a, b, "")["proportions MAE"] == pytest.approx(0.2)


def test_pearson_within_lineages_sees_what_concordance_over_all_entries_does_not():
    rng = np.random.default_rng(0)
    true = rng.dirichlet([60.0, 25, 10, 5], 40)
    mean = np.broadcast_to(true.mean(axis=0), true.shape)
    constant = metrics.proportion_metrics(true, mean, "")
    assert constant["proportions CCC"] > 0.95  # it knows which lineages are common
    assert constant["proportions Pearson within lineage"] == 0
    other = rng.permutation(true)
    expected = [np.corrcoef(t, p)[0, 1] for t, p in zip(true.T, other.T, strict=True)]
    assert metrics.pearson_within(true, other) == pytest.approx(np.array(expected))
    steady = true.copy()
    steady[:, 2] = 0.1  # a truth that does not vary has no correlation
    within = metrics.pearson_within(steady, other)
    assert np.isnan(within[2]) and np.isfinite(within[[0, 1, 3]]).all()
    values = metrics.proportion_metrics(steady, other, "", "type")
    assert values["proportions Pearson within type"] == pytest.approx(np.nanmean(within))
    assert np.isnan(
        metrics.proportion_metrics(mean, other, "")["proportions Pearson within lineage"]
    )


def test_scores_have_every_lineage_and_the_constant_answer():
    true = np.array([[0.2, 0.8], [0.6, 0.4], [0.4, 0.6]])
    rows = proportion_tests.score(true, {"a": true}, ["B", "T"], ", set")
    value = {row[:3]: row[3] for row in rows}
    assert {row[0] for row in rows} == {"a", "constant answer"}
    assert value["a", "proportions Pearson within lineage, set", "T"] == pytest.approx(1)
    assert value["constant answer", "proportions Pearson within lineage, set", None] == 0
    rmse = np.sqrt(np.mean((true - true.mean(axis=0)) ** 2))
    assert value["constant answer", "proportions RMSE, set", None] == pytest.approx(rmse)


def test_shifted_bulks_share_factors_within_a_platform_and_lose_a_tenth_of_genes():
    rng = np.random.default_rng(0)
    bulk = rng.gamma(2.0, 100.0, (45, 1000))  # three platforms, the last of five bulks
    shifted = proportion_tests.shift_platform(bulk, rng)
    assert shifted.sum(axis=1) == pytest.approx(2e5)
    ratio = shifted / bulk
    platform = np.arange(45) // 20
    for p in range(3):
        factors = ratio[platform == p]
        lost = factors[0] == 0
        assert lost.sum() == 100
        # The same up to the depth of each bulk.
        factors = factors[:, ~lost] / factors[:, ~lost].mean(axis=1, keepdims=True)
        assert factors == pytest.approx(np.tile(factors[0], (len(factors), 1)))
        assert ((ratio[platform == p] == 0) == lost).all()
        spread = np.log(factors[0])
        assert 0.6 < spread.std() < 1.1  # 0.6 sqrt(2), Student's t with 4 degrees of freedom
        assert np.ptp(spread) <= 8 + 1e-9
    first, second = ratio[0], ratio[20]
    assert ((first == 0) & (second == 0)).sum() < 40  # another tenth; about 10 are shared
    both = (first > 0) & (second > 0)
    assert abs(np.corrcoef(np.log(first[both]), np.log(second[both]))[0, 1]) < 0.15


MAP = "cell_type,lineage\n"


def test_lineage_file(tmp_path, capsys):
    """Names are cleaned as labels are; what is left out, and what is unknown, is reported."""
    path = tmp_path / "map.csv"
    path.write_text(
        f"\ufeff{MAP} Natural killer  cells , NK\nMartian,T\n\nB cells,B\nB cells,B\nCD4,\n,\n",
        encoding="utf-8",
    )
    assert lineages.read_lineages(path, [*CELL_TYPES, "CD4"]) == ["B", None, "NK", None]
    printed = capsys.readouterr().out
    assert "2 cell types without a lineage left out (CD4+/CD25 T, CD4)" in printed
    assert "1 cell types that the model does not know (Martian)" in printed
    # One file may name the cell types of several data sets.
    lineages.read_lineages(path, CELL_TYPES, elsewhere={"Martian", "CD4"})
    assert "does not know" not in capsys.readouterr().out
    assert lineages.read_lineages(path, ["Martian", "CD4", "B cells"], None, "set") == [
        *("T", None, "B")
    ]
    printed = capsys.readouterr().out
    assert "1 cell types of set without a lineage left out (CD4)" in printed
    assert "does not know" not in printed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("type,lineage\nB cells,B\n", "found the columns type, lineage, expected cell_type"),
        (MAP + "B cells,B\nB cells,T\n", "two different lineages .B cells."),
        (MAP + "Natural killer cells,NK\n", "none of its 1 cell types"),  # one blank of two
        (MAP + "B cells,B\nCD4+/CD25 T,B\n", "found 1 lineages"),
        (MAP + "T, helper,T\nB cells,B\n", "not a readable table"),
        ("", "not a readable table"),
    ],
)
def test_lineage_files_that_cannot_be_used(tmp_path, text, words):
    (tmp_path / "map.csv").write_text(text)
    with pytest.raises(InputError, match=f"map.csv: .*{words}"):
        lineages.read_lineages(tmp_path / "map.csv", CELL_TYPES)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sample,B\ns1,0.5\n", "no column T, which map.csv names"),
        ("sample,B,T\ns1,0.5,many\n", "found 'many' .sample s1, T."),
        ("sample,B,T\ns1,0.5,\n", "found '' .sample s1, T."),
        ("sample,B,T\ns1,0.5,0.5\ns2,-0.1,1\n", "found '-0.1' .sample s2, B."),
        ("sample,B,T\ns1,0.5,0.5\ns1,0.1,1\n", "samples there twice .s1."),
        ("sample,B,T,B\ns1,0.5,0.5,0.1\n", "columns there twice .B."),
        ("sample,B,T,Unknown\ns1,0,0,1\n", "1 samples .s1. have nothing of B, T"),
    ],
)
def test_fractions_that_cannot_be_used(tmp_path, text, words):
    (tmp_path / "f.csv").write_text(text)
    with pytest.raises(InputError, match=f"f.csv: .*{words}"):
        lineages.read_fractions(tmp_path / "f.csv", ["B", "T"], "map.csv")


def test_cell_type_nb_has_the_moments_of_the_type():
    cells = make_cells((400, 300, 20))
    X, codes = cells.X, cells.obs["cell_type"].astype("category").cat.codes.to_numpy()
    target = np.repeat([0, 1], 4000)
    drawn = baselines.draw_cell_type_nb(X, codes, target, np.random.default_rng(0))
    for k in (0, 1):
        real, generated = X[codes == k].toarray(), drawn[target == k].toarray()
        np.testing.assert_allclose(generated.mean(axis=0), real.mean(axis=0), rtol=0.2, atol=0.1)
        ratio = generated.var(axis=0) / real.var(axis=0)
        assert 0.9 < np.median(ratio) < 1.1


@pytest.mark.parametrize("zero", [0.0, 0.4])
@pytest.mark.parametrize("theta", [0.5, baselines.POISSON])
def test_marginals_are_found_with_their_parameters(zero, theta):
    """Poisson or negative binomial, zero-inflated or not, as the likelihood says."""
    mean = np.array([0.5, 2, 6])
    true = baselines.Marginals(np.full(3, zero), mean, np.full(3, theta))
    drawn = true.draw(20_000, np.random.default_rng(0))
    found = baselines.fit_marginals(sp.csc_matrix(drawn))
    assert found.zero == pytest.approx(true.zero, abs=0.04)
    assert found.mean == pytest.approx(true.mean, rel=0.1)
    if theta < 1:
        assert found.theta == pytest.approx(true.theta, rel=0.15)
    else:  # zeros overdisperse a Poisson, so that its θ is found rather than infinite
        assert (found.theta > 20).all()
    x = np.arange(8)[:, None]
    counted = np.stack([(drawn <= i).mean(axis=0) for i in range(8)])
    assert found.cdf(x) == pytest.approx(counted, abs=0.015)
    assert (found.cdf(x - 1)[0] == 0).all()
    middle = (found.cdf(x - 1) + found.cdf(x)) / 2
    reached = middle < 1 - 1e-9
    assert (found.quantile(middle) == x)[reached].all()


def test_marginals_have_the_highest_likelihood():
    """Against a general optimiser, of few cells; rare genes and genes of every cell included."""
    rng = np.random.default_rng(2)
    X = rng.negative_binomial(1.5, 1.5 / (1.5 + 4), (60, 30)) * (rng.random((60, 30)) > 0.3)
    X[:, 0], X[:, 1], X[:, 2] = 0, np.arange(60) == 5, np.arange(60) + 3
    found = baselines.fit_marginals(sp.csc_matrix(X))
    assert found.mean[0] == found.mean[1] == found.zero[2] == 0  # in one cell: not expressed
    assert 5 < (found.zero > 0).sum() < 30
    plain = baselines.fit_marginals(sp.csc_matrix(rng.negative_binomial(1.5, 0.3, (60, 300))))
    assert 0 < (plain.zero > 0).mean() < 0.1  # p < 0.05, and one-sided
    for g in range(2, 30):

        def loss(parameters, x=X[:, g], inflated=found.zero[g] > 0):
            mean, theta = np.exp(parameters[:2])
            pi = inflated / (1 + np.exp(-parameters[2]))
            pmf = (1 - pi) * scipy.stats.nbinom.pmf(x, theta, theta / (theta + mean))
            return -np.log(pmf + pi * (x == 0)).sum()

        own = np.log([found.mean[g], found.theta[g], (found.zero[g] + 1e-12) / (1 - found.zero[g])])
        best = scipy.optimize.minimize(
            loss, [1, 0, 0], method="Nelder-Mead", options={"maxiter": 900}
        )
        assert loss(own) < best.fun + 0.02, g


def test_copula_keeps_the_correlations_that_independent_genes_lose():
    """Also different ones in each type. Rare genes and small types have none."""
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], [400, 400, 6])
    factor = rng.lognormal(0, 0.8, (806, 1))
    mean = np.full((806, 4), 8.0)
    mean[codes != 1, :2] *= factor[codes != 1]
    mean[codes == 1, 1:3] *= factor[codes == 1]
    mean[:, 3:] = 0.1 * factor
    X, target = sp.csr_matrix(rng.poisson(mean)), np.repeat([0, 1, 2, 3], 1500)
    copula = baselines.ScDesign2(X, codes, 0).draw(target).toarray()
    independent = baselines.draw_cell_type_nb(X, codes, target, rng).toarray()

    def correlations(counts, of):
        return np.corrcoef(np.log1p(counts[of]), rowvar=False)

    for k, pair in ((0, (0, 1)), (1, (1, 2))):
        real = correlations(X.toarray(), codes == k)
        drawn = correlations(copula, target == k)
        assert real[pair] > 0.6 and drawn[pair] == pytest.approx(real[pair], abs=0.08)
        assert abs(correlations(independent, target == k)[pair]) < 0.1
        drawn[pair] = drawn[pair[::-1]] = 0
        assert np.abs(drawn - np.eye(4)).max() < 0.15
        for moment in (np.mean, np.var):
            truth = moment(X[codes == k].toarray(), axis=0)
            assert moment(copula[target == k], axis=0) == pytest.approx(truth, rel=0.3)
    small = np.corrcoef(copula[target == 2][:, :2], rowvar=False)
    assert abs(small[0, 1]) < 0.1
    assert copula[target == 2].mean() > 3 and copula[target == 3].sum() == 0
    again = baselines.ScDesign2(X, codes, 0).draw(target).toarray()
    assert (again == copula).all()


# ----------------------------------------------------------------------------- the perfect model


@pytest.fixture(scope="module")
def truth():
    """Model and Reference: the decoder drew the 260 cells, half of them held out."""
    torch.manual_seed(0)
    decoder = scDecoder(3, 16, 80, 3, "nb", 0.0).eval()
    with torch.no_grad():
        decoder.start_at(torch.distributions.Gamma(0.5, 1.0).sample((80,)) + 0.01, theta=3.0)
        decoder.out.weight.mul_(60)
    decoder.mu.copy_(torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2]]))
    decoder.log_library.fill_(7.0)
    decoder.requires_grad_(False)
    cells = make_cells((100, 90, 70), n_genes=80)
    codes = cells.obs["cell_type"].astype("category").cat.codes.to_numpy().astype(int)
    generator = torch.Generator().manual_seed(5)
    cells.X = generation.new_cells(decoder, torch.as_tensor(codes), generator)
    card = {"genes": list(cells.var_names), "cell_types": CELL_TYPES}
    reference = Reference(cells, codes, CELL_TYPES, split_cells(codes, 0.5, 0))
    return Model(None, decoder, card, card), reference


def test_ceiling_is_what_the_truth_reads_and_worse_models_exceed_it(truth):
    """The truth's fresh cells have no excess; those of a model without variation in types have.

    The worse model's own ceiling is no higher, as its cells are compared with cells of its own.
    """
    model, reference = truth
    cfg, before = evaluate.Settings(n_trees=20), reference.cells.copy()
    generator = torch.Generator().manual_seed(1)
    space = metrics.CellMetrics(reference.cells, reference.held_out, reference.codes, 20)
    narrow = copy.deepcopy(model.decoder)
    narrow.var.fill_(1e-6)
    names = ["excess of AUROC, PCs", "excess of AUROC, genes"]
    found = {"ceiling": [], "narrow's own": [], "truth": [], "narrow": []}
    for seed in range(2):
        ceiling = evaluate.compare_perfect(*truth, generator, seed, cfg)
        found["ceiling"].append([overall(ceiling)[m] for m in list(metrics.METRICS)[:2]])
        other = replace(model, decoder=narrow), reference
        own = evaluate.compare_perfect(*other, generator, seed, cfg)
        found["narrow's own"].append([overall(own)[m] for m in list(metrics.METRICS)[:2]])
        for method, decoder in (("truth", model.decoder), ("narrow", narrow)):
            drawn = evaluate.draw_decoded(*truth, generator, decoder=decoder)
            excess = overall(evaluate.excess_auroc(space.compare(*drawn, seed), ceiling))
            assert list(excess) == names
            found[method].append(list(excess.values()))
    mean = {method: np.mean(values, axis=0) for method, values in found.items()}
    for method in ("ceiling", "narrow's own"):
        assert mean[method] == pytest.approx(np.full(2, 0.5), abs=0.15), method
    assert mean["truth"] == pytest.approx(np.zeros(2), abs=0.1)
    assert (mean["narrow"] > 0.15).all()
    assert abs(reference.cells.X - before.X).nnz == 0  # the data stay as they are


def test_summary_is_over_trainings_where_there_are_several():
    rows = [(w, "bulk2sc", "MMD2, PCs", "", v) for w, v in zip("aabb", (1, 3, 5, 7), strict=True)]
    table = pd.DataFrame(rows, columns=["weights", "method", "metric", "cell_type", "value"])
    one = evaluate.summarise(table, 2).iloc[0]
    assert (one["mean"], one["n"], one["best"]) == (4, 2, 0)
    assert one["std"] == pytest.approx(np.std([2, 6], ddof=1))
    assert evaluate.summarise(table[table.weights == "a"], 1).iloc[0]["n"] == 2


# --------------------------------------------------------------------------------- the script

FEW = ["--n-draws", 1, "--n-pseudobulks", 5, "--n-trees", 5]


@pytest.fixture
def weights(trained, tmp_path):
    """A copy of the trained weights to change."""
    return shutil.copytree(trained, tmp_path / "weights")


def read_table(folder):
    return pd.read_csv(folder / "evaluation.csv", keep_default_na=False, na_values=["nan"])


def means(table):
    """Mean by method and metric, of all types together."""
    return table[table["cell_type"] == ""].set_index(["method", "metric"])["mean"].astype(float)


@pytest.mark.draws
def test_by_default_cells_and_proportions_beside_their_ceilings(trained, h5ad, tmp_path):
    """What to conclude comes first. Nothing is written to the weights, and twice to results/."""
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    flags = ["--data", h5ad, "--weights", trained, *FEW]
    done = run_inside("evaluate.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in trained.iterdir()} == before
    folder = tmp_path / "results"
    assert {path.name for path in folder.iterdir()} == {"evaluation.csv", "evaluation.png"}
    table = read_table(folder)
    of_cells = {"bulk2sc", "perfect model", "unseen real cells", "cell-type NB"}
    assert set(table["method"]) == of_cells | {"NNLS", "constant answer"}
    left_out = (", lineages", ", shift", ", real bulk", "sum of cells against bulk, Pearson")
    assert set(table["metric"]) == {m for m in MEASURED if not m.endswith(left_out)}
    said = done.stdout.index("18 held-out cells; trainings: 1, draws of each: 1\nThe cells are ")
    auroc = means(table)["bulk2sc", "random-forest AUROC, PCs"]
    assert f"AUROC {auroc:.2f} and " in done.stdout
    assert said < done.stdout.index("Proportions of pseudobulks of held-out cells are ")
    assert done.stdout.index("RMSE") < done.stdout.index("metric (best value)")
    assert matplotlib.image.imread(folder / "evaluation.png").std() > 0.01
    again = run_inside("evaluate.py", *flags, "--proportions-only", cwd=tmp_path)
    assert again.returncode == 0 and "The cells are" not in again.stdout
    assert "NNLS" in set(read_table(folder)["method"]) and len(read_table(folder)) < len(table)


def test_results_replace_no_other_files(trained, h5ad, tmp_path):
    flags = ["--data", h5ad, "--weights", trained, "--out"]
    (tmp_path / "file").write_text("")
    done = run_inside("evaluate.py", *flags, tmp_path / "file")
    assert_one_line_error(done, tmp_path / "file", "expected a folder")
    for name in ("evaluation.png", "evaluation.csv"):
        (tmp_path / name).write_text("metric,value\n")
        done = run_inside("evaluate.py", *flags, tmp_path)
        assert_one_line_error(done, name, "not from evaluate.py, expected another --out")
        assert (tmp_path / name).read_text() == "metric,value\n"


def test_conclusions_follow_the_numbers():
    def cells(ours, perfect, simple):
        rows = {"bulk2sc": ours, "perfect model": perfect, "cell-type NB": simple}
        names = [f"random-forest AUROC, {of}" for of in ("PCs", "genes")]
        values = {(method, name): v for method, v in rows.items() for name in names}
        return evaluate.conclude_cells(pd.Series(values))

    assert "about as real as a perfect model's" in cells(0.68, 0.65, 0.67)[0]
    assert "less real than a perfect model's" in cells(0.73, 0.65, 0.82)[0]
    assert "no more real than cells of independent genes" in cells(0.83, 0.65, 0.82)[0]
    assert evaluate.conclude_cells(pd.Series({("bulk2sc", "proportions RMSE"): 0.1})) == []

    def proportions(*values, of=""):
        keys = [(m, f"proportions RMSE{of}") for m in ("bulk2sc", "NNLS", "constant answer")]
        return evaluate.conclude_proportions(pd.Series(values, pd.MultiIndex.from_tuples(keys)))

    assert "are better than the simple answers: RMSE 0.025" in proportions(0.025, 0.045, 0.11)[0]
    assert "not better than NNLS" in proportions(0.05, 0.045, 0.11)[0]
    (line,) = proportions(0.12, 0.045, 0.11, of=", real bulk")
    assert line.startswith("Proportions of real bulk are no better than one answer")
    assert proportions(0.1, 0.1, 0.1, of=", shift, lineages") == []


@pytest.fixture(scope="module")
def compared(trained, h5ad, tmp_path_factory):
    """A run beside all other methods, also on real bulks: what it printed, and its folder."""
    folder = tmp_path_factory.mktemp("compared")
    flags = ["--n-draws", 2, "--n-pseudobulks", 25, "--n-trees", 5, "--compare"]
    flags += [*write_measured(folder), "--out", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "CELLS_PER_SUM", 300)
        patch.setattr(evaluate, "write_evaluation", lambda *_: None)  # half of the time
        done = run_inside("evaluate.py", "--data", h5ad, "--weights", trained, *flags)
    assert done.returncode == 0, done.stderr
    return done, folder


def test_evaluate_compares_every_method_and_type(compared):
    done, folder = compared
    table = read_table(folder)
    assert set(table["method"]) >= {
        "bulk2sc", "calibrated", "other real cells", "unseen real cells", "cell-type NB",
        "scDesign2 copula", "perfect model", "published recipe", "constant answer",
        *METHODS,
    }  # fmt: skip
    assert set(table["metric"]) == set(MEASURED)
    assert set(table["cell_type"]) == {"", *CELL_TYPES, *LINEAGES}
    cells, *proportions = done.stdout.partition("metric (best")[2].split("\nproportions, ")
    for metric in MEASURED:
        assert metrics.setting_of(metric) or metric in cells
    assert "NNLS" not in cells
    assert [text.split("\n")[0] for text in proportions] == [
        *("within", "lineages", "shift", "shift, lineages", "real bulk")
    ]
    for text in proportions:
        assert all(name in text for name in ("RMSE (0)", "CCC (1)", "Pearson within"))
        assert all(f"\n{name} " in text for name in ("bulk2sc", *METHODS))
    value = means(table)
    of_cells = {m for m in MEASURED if not metrics.setting_of(m)}
    without = {m for m in of_cells if m.startswith(("excess", "sum"))}
    assert set(value["perfect model"].index) == of_cells - without
    for of in ("PCs", "genes"):
        ceiling = value["perfect model", f"random-forest AUROC, {of}"]
        for method in ("bulk2sc", "scDesign2 copula"):
            excess = value[method, f"random-forest AUROC, {of}"] - ceiling
            assert value[method, f"excess of AUROC, {of}"] == pytest.approx(excess)
    of_real = table[table["method"].str.endswith("real cells")]
    assert not of_real["metric"].str.startswith("excess").any()
    # Regression: unpaired z leaves no variation within a type.
    published = value["published recipe", "within-type variance ratio"]
    assert published < 0.1 < value["bulk2sc", "within-type variance ratio"]
    plain, calibrated = (
        value[method, "sum of cells against bulk, Pearson"] for method in ("bulk2sc", "calibrated")
    )
    assert plain < calibrated <= 1


def test_real_bulk_against_measured_fractions(compared):
    done, folder = compared
    assert "11 samples with measured fractions, 1 without; 1 of" in done.stdout
    assert "columns that are no lineage left out (Unknown)" in done.stdout
    assert "Proportions of real bulk are " in done.stdout
    table = read_table(folder)
    for method in ("bulk2sc", "NNLS"):
        rows = table[(table["method"] == method) & (table["cell_type"] == "")].set_index("metric")
        mean = rows["mean"]
        assert rows.loc["proportions RMSE, real bulk", "n"] == 1  # nothing is drawn
        assert rows.loc["proportions RMSE, shift", "n"] == 2
        assert mean["proportions RMSE, real bulk"] < 0.15
        assert mean["proportions CCC, real bulk"] > 0.85
        assert mean["proportions Pearson, real bulk"] > 0.9
        assert mean["proportions CCC, lineages"] > 0.8
        assert mean["proportions Pearson within lineage, real bulk"] > 0.9
    within = table[table["metric"] == "proportions Pearson within lineage, real bulk"]
    assert set(within["cell_type"]) == {"", *LINEAGES}


def test_evaluate_generated_file_and_several_weights(weights, h5ad, tmp_path, no_forests):
    where = ["--data", h5ad, "--weights", weights]
    cells, out = tmp_path / "g.h5ad", ["--out", tmp_path / "e"]
    done = run_inside("bulk2sc.py", *where, *("--n-cells", 200, "--batch-size", 30, "--out", cells))
    assert done.returncode == 0, done.stderr
    done = run_inside("evaluate.py", *where, *FEW, *out, "--generated", cells)
    assert done.returncode == 0, done.stderr
    other = shutil.copytree(weights, tmp_path / "other")
    done = run_inside("evaluate.py", *where, *FEW, *out, "--more-weights", other)
    assert done.returncode == 0, done.stderr
    assert "over 2 trainings" in done.stdout
    table = pd.read_csv(tmp_path / "e" / "evaluation.csv")
    assert set(table[table["method"] == "bulk2sc"]["n"]) == {2}


def test_model_trained_anew(weights, h5ad, no_forests, monkeypatch):
    """It is measured on cells of its model, whose settings and split it takes."""
    retrain, kept = evaluate.retrain, []

    def retrain_and_keep(model, reference, *arguments):
        kept.extend([(model, reference), retrain(model, reference, *arguments)])
        return kept[1]

    monkeypatch.setattr(evaluate, "retrain", retrain_and_keep)
    out = weights.parent / "e"
    where = ["--data", h5ad, "--weights", weights, "--retrain", "--out", out]
    done = run_inside("evaluate.py", *where, *FEW)
    assert done.returncode == 0, done.stderr
    table = means(read_table(out))
    anew = table["model trained anew"]
    assert set(anew.index) == set(table["perfect model"].index) | {
        "excess of AUROC, PCs", "excess of AUROC, genes",
    }  # fmt: skip
    assert anew["fold-change correlation"] > 0.5
    (model, reference), (anew, simulated) = kept
    assert anew.decoder.config == model.decoder.config
    for name in ("epochs", "lr", "n_components", "seed"):
        assert anew.metadata["settings"][name] == model.metadata["settings"][name]
    of_types = [np.bincount(cells.test_codes) for cells in (reference, simulated)]
    assert (of_types[0] == of_types[1]).all()
    assert not any(
        torch.equal(a, b)
        for a, b in zip(anew.decoder.parameters(), model.decoder.parameters(), strict=True)
    )
    # What it learned from are cells of the model, not the real ones.
    assert abs(simulated.X - reference.X).nnz > 0
    assert (simulated.cells.obs_names == reference.cells.obs_names).all()
    (weights / "scGMVAE_model.pt").unlink()
    assert_one_line_error(run_inside("evaluate.py", *where, *FEW), "scGMVAE_model.pt")
    done = run_inside("evaluate.py", *where, "--proportions-only")
    assert_one_line_error(done, "--retrain", "--proportions-only")


def test_evaluate_refuses_what_is_not_generated_cells(trained, h5ad, tmp_path):
    where = ["--data", h5ad, "--weights", trained]
    missing = run_inside("evaluate.py", *where, "--generated", tmp_path / "none.h5ad")
    assert_one_line_error(missing, "none.h5ad", "bulk2sc.py")
    cells = make_cells()
    del cells.obs["cell_type"]
    cells.write_h5ad(tmp_path / "untyped.h5ad")
    untyped = run_inside("evaluate.py", *where, "--generated", tmp_path / "untyped.h5ad")
    assert_one_line_error(untyped, "untyped.h5ad", "cell_type")
    unknown = make_cells()
    unknown.obs["cell_type"] = "Martian"
    unknown.write_h5ad(tmp_path / "strange.h5ad")
    done = run_inside("evaluate.py", *where, "--generated", tmp_path / "strange.h5ad")
    assert_one_line_error(done, "strange.h5ad", "Martian")


@pytest.mark.parametrize("given", ["bulk", "fractions", "bulk fractions", "bulk lineages",
                                   "fractions lineages"])  # fmt: skip
def test_bulk_fractions_and_lineages_go_together(given):
    flags = [f"--{name}" for name in given.split()]
    missing = {"--bulk", "--fractions", "--lineages"} - set(flags)
    done = run_inside("evaluate.py", *(a for flag in flags for a in (flag, "file.csv")))
    given = done.stderr.split(": found")[0]
    assert_one_line_error(done, *(f"no {flag}" for flag in missing), "together")
    assert all(flag in given for flag in flags)


LINEAGES = ["B", "T and NK"]


def write_measured(folder):
    """Files of 12 bulks of known composition, of their fractions, and of the lineages.

    Bulks are of another platform. Fractions are in percent, beside a column that is no lineage;
    they lack one bulk and have another instead. Returns flags.
    """
    cells, rng = make_cells(seed=0), np.random.default_rng(5)
    is_b = (cells.obs["cell_type"] == CELL_TYPES[0]).to_numpy()
    share = np.linspace(0, 1, 12)
    profile = np.stack([cells.X[mask].toarray().mean(axis=0) for mask in (is_b, ~is_b)])
    profile *= rng.lognormal(0, 0.2, profile.shape[1])
    bulk = pd.DataFrame(
        np.stack([share, 1 - share], axis=1) @ profile,
        index=[f"donor {i}" for i in range(12)],
        columns=cells.var_names,
    )
    bulk.iloc[:, 5:].T.to_csv(folder / "bulk.csv")  # without five of the model's genes
    fractions = pd.DataFrame({"T and NK": 70 * (1 - share), "Unknown": 30, "B": 70 * share})
    fractions = fractions.set_axis(bulk.index).rename({"donor 3": "nobody"})
    fractions.iloc[::-1].to_csv(folder / "fractions.csv", index_label="sample")
    names = [f" {CELL_TYPES[0]},B", f"{CELL_TYPES[1]},T and NK", f"{CELL_TYPES[2]} ,T and NK"]
    (folder / "map.csv").write_text(MAP + "\n".join(names) + "\n")
    return [
        *("--bulk", folder / "bulk.csv", "--fractions", folder / "fractions.csv"),
        *("--lineages", folder / "map.csv"),
    ]


@pytest.fixture
def measured(tmp_path):
    """:func:`write_measured` in a folder of the test."""
    return write_measured(tmp_path)


@pytest.fixture
def no_forests(monkeypatch):
    """Without the slowest metric by far and the picture, where a test does not need them."""
    monkeypatch.setattr(metrics, "random_forest_auroc", lambda *_: 0.5)
    monkeypatch.setattr(evaluate, "write_evaluation", lambda *_: None)


def test_swapped_fractions_score_badly(trained, h5ad, measured):
    """Columns are swapped in the file. Also what --lineages alone measures."""
    swapped = pd.read_csv(measured[3]).rename(columns={"B": "T and NK", "T and NK": "B"})
    swapped.to_csv(measured[3], index=False)
    paths = {"bulk": measured[1], "fractions": measured[3], "lineages": measured[5]}
    cfg = evaluate.Settings(
        data=h5ad, weights=trained, n_draws=1, n_pseudobulks=5, compare=True, **paths
    )
    model, reference = evaluate.load_trained(trained, Reference.load(cfg), "cpu")
    plan = proportion_tests.plan_proportions(cfg, model.cell_types)
    methods = proportion_tests.Methods(model, reference, cfg)
    rows = proportion_tests.measure_foreign(methods, plan, cfg)
    values = {(method, metric.split()[1]): v for method, metric, key, v in rows if key is None}
    for method in ("bulk2sc", "DWLS", "NNLS"):
        assert values[method, "Pearson"] < -0.8 and values[method, "RMSE,"] > 0.4
    lineage_of = plan.lineage_of
    for given, left_out in ((lineage_of, ("real bulk",)), (None, ("real bulk", "lineages"))):
        rng = np.random.default_rng(0)
        rows = proportion_tests.measure_pseudobulks(methods, given, cfg, rng)
        expected = {m for m in metrics.METRICS if m.startswith("proportions")}
        assert {row[1] for row in rows} == {m for m in expected if not m.endswith(left_out)}


@pytest.fixture
def other_donors(tmp_path):
    """A data set of two of the model's types and one of its own, and a csv of lineages for both.

    It lacks five of the model's genes. Half of its cells are treated, and in these the labels of B
    and T cells are exchanged.
    """
    cells = make_cells((60, 50, 40), seed=0)[:, 5:].copy()
    names = {CELL_TYPES[0]: "B", CELL_TYPES[1]: "T", CELL_TYPES[2]: "Platelets"}
    kind = cells.obs["cell_type"].map(names)
    treated = (kind.groupby(kind).cumcount() % 2 == 1).to_numpy()
    wrong = {"B": "T", "T": "B", "Platelets": "Platelets"}
    cells.obs["kind"] = np.where(treated, kind.map(wrong), kind)
    cells.obs["condition"] = np.where(treated, "treated", "control")
    cells.write_h5ad(tmp_path / "donors.h5ad")
    rows = [f"{CELL_TYPES[0]},B cells", f"{CELL_TYPES[1]},T cells", f"{CELL_TYPES[2]},NK cells"]
    (tmp_path / "all.csv").write_text(MAP + "\n".join([*rows, "B,B cells", "T,T cells"]) + "\n")
    return [
        *("--shift-data", tmp_path / "donors.h5ad", "--shift-labels", "kind"),
        *("--lineages", tmp_path / "all.csv"),
    ]


def test_pseudobulks_of_other_donors(trained, h5ad, other_donors, tmp_path, no_forests):
    flags = ["--data", h5ad, "--weights", trained, *FEW[:2], "--n-pseudobulks", 20]
    flags += ["--proportions-only", *other_donors, "--out", tmp_path]
    done = run_inside("evaluate.py", *flags, "--shift-cells", "condition", "control", "--compare")
    assert done.returncode == 0, done.stderr
    assert "75 of 150 labelled cells are those of --shift-cells" in done.stdout
    assert "donors: 55 cells of 2 lineages (B cells, T cells), 20 of none" in done.stdout
    assert "1 cell types of donors without a lineage left out (Platelets)" in done.stdout
    assert "does not know" not in done.stdout
    assert "has 55 of the model's 60 genes" in done.stdout
    assert "random-forest" not in done.stdout  # cells are not measured
    table = read_table(tmp_path)
    table = table[table["metric"].str.endswith(", donors")]
    assert set(table["metric"]) == set(metrics.proportion_names(", donors"))
    assert set(table["cell_type"]) == {"", "B cells", "T cells"}
    value = means(table)
    for method in ("bulk2sc", "NNLS", "DWLS", "MuSiC", "nu-SVR", "BayesPrism"):
        assert value[method, "proportions CCC, donors"] > 0.9, method
    # All cells: half of them with wrong labels.
    done = run_inside("evaluate.py", *flags)
    assert done.returncode == 0, done.stderr
    value = means(read_table(tmp_path))
    assert value["bulk2sc", "proportions CCC, donors"] < 0.6
    assert value["bulk2sc", "proportions CCC, lineages"] > 0.9


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shift-data", "{0}"], ("--shift-data", "no --lineages")),
        (["--shift-cells", "condition", "x"], ("--shift-cells", "no --shift-data")),
        (["--proportions-only", "--generated", "g.h5ad"], ("--proportions-only", "--generated")),
        (
            ["--shift-data", "{0}", "{0}", "--lineages", "{1}"],
            ("found donors as name", "names of their own"),
        ),
        (
            ["--shift-data", "{0}", "--shift-labels", "a", "b", "--lineages", "{1}"],
            ("--shift-labels", "found 2 for 1"),
        ),
        (
            ["--shift-data", "{0}", "--shift-labels", "nothing", "--lineages", "{1}"],
            ("--shift-labels nothing", "column of .obs"),
        ),
        (
            ["--shift-data", "{0}", "--lineages", "{1}", "--shift-cells", "batch", "1"],
            ("no column batch",),
        ),
        (
            ["--shift-data", "{0}", "--lineages", "{1}", "--shift-cells", "condition", "1"],
            ("no cell with condition 1", "expected one of control, treated"),
        ),
        (
            ["--shift-data", "{0}", "--shift-labels", "condition", "--lineages", "{1}"],
            ("none of its 5 cell types", "one of donors's"),
        ),
    ],
)
def test_other_donors_that_cannot_be_used(trained, h5ad, other_donors, flags, words):
    paths = other_donors[1], other_donors[5]
    flags = [flag.format(*paths) for flag in flags]
    where = ["--data", h5ad, "--weights", trained]
    assert_one_line_error(run_inside("evaluate.py", *where, *flags), *words)


def test_samples_of_other_names_and_bulks_of_other_genes(trained, h5ad, measured, tmp_path):
    where = ["--data", h5ad, "--weights", trained]
    (tmp_path / "other.csv").write_text("sample,B,T and NK\npatient,0.5,0.5\n")
    given = [*measured[:3], tmp_path / "other.csv", *measured[4:]]
    done = run_inside("evaluate.py", *where, *given)
    assert_one_line_error(done, "other.csv", "patient", "bulk.csv", "donor 0")
    (tmp_path / "empty.csv").write_text("gene,donor 0\nGENE1,0\nALIEN,5\n")
    done = run_inside("evaluate.py", *where, "--bulk", tmp_path / "empty.csv", *measured[2:])
    assert_one_line_error(done, "empty.csv", "1 of the model's 60 genes")
    missing = run_inside("evaluate.py", *where, "--lineages", tmp_path / "none.csv")
    assert_one_line_error(missing, "none.csv", "no such file")
