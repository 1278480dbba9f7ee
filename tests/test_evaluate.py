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
from conftest import (
    CELL_TYPES,
    FEW,
    LINEAGES,
    MAP,
    assert_one_line_error,
    make_cells,
    means,
    read_table,
    run_inside,
    write_measured,
)
from data import Reference, log_normalise, split_cells
from deconvolution.estimators import nnls_proportions
from evaluation import cells as of_cells
from evaluation import metrics, proportions, tables
from generation import Model
from models import scDecoder
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
    rows = proportions.score(true, {"a": true}, ["B", "T"], ", set")
    value = {row[:3]: row[3] for row in rows}
    assert {row[0] for row in rows} == {"a", "constant answer"}
    assert value["a", "proportions Pearson within lineage, set", "T"] == pytest.approx(1)
    assert value["constant answer", "proportions Pearson within lineage, set", None] == 0
    rmse = np.sqrt(np.mean((true - true.mean(axis=0)) ** 2))
    assert value["constant answer", "proportions RMSE, set", None] == pytest.approx(rmse)


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
    drawn = of_cells.draw_cell_type_nb(X, codes, target, np.random.default_rng(0))
    for k in (0, 1):
        real, generated = X[codes == k].toarray(), drawn[target == k].toarray()
        np.testing.assert_allclose(generated.mean(axis=0), real.mean(axis=0), rtol=0.2, atol=0.1)
        ratio = generated.var(axis=0) / real.var(axis=0)
        assert 0.9 < np.median(ratio) < 1.1


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


def test_only_some_of_many_held_out_cells_are_compared(truth, monkeypatch, capsys):
    """Regression: distances of all pairs of 40,000 cells do not fit into memory."""
    _, reference = truth
    assert of_cells.limit_held_out(reference, 0) is reference
    monkeypatch.setattr(of_cells, "MAX_CELLS", 30)
    few = of_cells.limit_held_out(reference, 0)
    assert "30 of 130 held-out cells" in capsys.readouterr().out
    names = [set(each.cells.obs_names[each.test]) for each in (few, reference)]
    assert len(names[0]) == 30 and names[0] < names[1] and len(few.train) == len(reference.train)


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
        ceiling = of_cells.compare_perfect(*truth, generator, seed, cfg)
        found["ceiling"].append([overall(ceiling)[m] for m in list(metrics.METRICS)[:2]])
        other = replace(model, decoder=narrow), reference
        own = of_cells.compare_perfect(*other, generator, seed, cfg)
        found["narrow's own"].append([overall(own)[m] for m in list(metrics.METRICS)[:2]])
        for method, decoder in (("truth", model.decoder), ("narrow", narrow)):
            drawn = of_cells.draw_decoded(*truth, generator, decoder=decoder)
            excess = overall(of_cells.excess_auroc(space.compare(*drawn, seed), ceiling))
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
    one = tables.summarise(table, 2).iloc[0]
    assert (one["mean"], one["n"], one["best"]) == (4, 2, 0)
    assert one["std"] == pytest.approx(np.std([2, 6], ddof=1))
    assert tables.summarise(table[table.weights == "a"], 1).iloc[0]["n"] == 2


# --------------------------------------------------------------------------------- the script


@pytest.fixture
def weights(trained, tmp_path):
    """A copy of the trained weights to change."""
    return shutil.copytree(trained, tmp_path / "weights")


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
    assert "mRNA content of cells" not in done.stdout  # of sums of cells, once a draw
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
        assert_one_line_error(done, name, "no evaluation of bulk2sc, expected another --out")
        assert (tmp_path / name).read_text() == "metric,value\n"


def test_conclusions_follow_the_numbers():
    def cells(ours, perfect, simple):
        rows = {"bulk2sc": ours, "perfect model": perfect, "cell-type NB": simple}
        names = [f"random-forest AUROC, {of}" for of in ("PCs", "genes")]
        values = {(method, name): v for method, v in rows.items() for name in names}
        return tables.conclude_cells(pd.Series(values))

    assert "about as real as a perfect model's" in cells(0.68, 0.65, 0.67)[0]
    assert "less real than a perfect model's" in cells(0.73, 0.65, 0.82)[0]
    assert "no more real than cells of independent genes" in cells(0.83, 0.65, 0.82)[0]
    assert tables.conclude_cells(pd.Series({("bulk2sc", "proportions RMSE"): 0.1})) == []

    def proportions(*values, of=""):
        keys = [(m, f"proportions RMSE{of}") for m in ("bulk2sc", "NNLS", "constant answer")]
        return tables.conclude_proportions(pd.Series(values, pd.MultiIndex.from_tuples(keys)))

    assert "are better than the simple answers: RMSE 0.025" in proportions(0.025, 0.045, 0.11)[0]
    assert "not better than NNLS" in proportions(0.05, 0.045, 0.11)[0]
    (line,) = proportions(0.12, 0.045, 0.11, of=", real bulk")
    assert line.startswith("Proportions of real bulk are no better than one answer")
    assert proportions(0.1, 0.1, 0.1, of=", shift, lineages") == []


def test_real_bulk_against_measured_fractions(trained, h5ad, tmp_path, no_forests):
    where = ["--data", h5ad, "--weights", trained, "--n-draws", 2, "--n-pseudobulks", 25]
    given = [*write_measured(tmp_path), "--proportions-only", "--out", tmp_path / "e"]
    done, folder = run_inside("evaluate.py", *where, *given), tmp_path / "e"
    assert done.returncode == 0, done.stderr
    assert "11 samples with measured fractions, 1 without; 1 of" in done.stdout
    assert "columns that are no lineage left out (Unknown)" in done.stdout
    assert "Proportions of real bulk are " in done.stdout
    table = read_table(folder)
    for method in ("bulk2sc", "NNLS"):
        rows = table[(table["method"] == method) & (table["cell_type"] == "")].set_index("metric")
        mean = rows["mean"]
        assert rows.loc["proportions RMSE, real bulk", "n"] == 1  # nothing is drawn
        assert rows.loc["proportions RMSE", "n"] == 2
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
