"""The figures of merit themselves: identical, shifted, permuted and copied cells."""

import shutil

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats
from sklearn.datasets import make_blobs

import evaluate
from conftest import assert_one_line_error, make_cells, run, run_inside
from data import codes_of, split_cells


@pytest.fixture(scope="module")
def figures():
    """Figures of 300 synthetic cells, half held out, and what made them."""
    cells = make_cells((120, 100, 80))
    cells.obs["cell_type"] = cells.obs["cell_type"].astype("category")
    codes, _ = codes_of(cells)
    held_out = split_cells(codes, 0.5, 0)
    return evaluate.CellFigures(cells, held_out, codes), cells, codes, held_out


def whole(rows):
    return {figure: value for figure, k, value in rows if k is None}


def compare(figures, X, codes, **options):
    return whole(figures[0].compare(sp.csr_matrix(X), codes, 0, **options))


def other_half(figures):
    _, cells, codes, held_out = figures
    return cells.X[np.flatnonzero(~held_out)], codes[~held_out]


@pytest.fixture(scope="module")
def read_of_other_half(figures):
    return compare(figures, *other_half(figures), trained_on=True)


def test_other_real_half_reads_as_good_as_it_gets(read_of_other_half):
    read = read_of_other_half
    assert 0.35 < read["random-forest AUROC, PCs"] < 0.62
    assert 0.35 < read["random-forest AUROC, genes"] < 0.62
    assert abs(read["MMD2, PCs"]) < 0.01
    assert 0.7 < read["within-type variance ratio"] < 1.4
    assert read["macro-F1, generated to real"] > 0.95
    assert read["fold-change correlation"] > 0.95
    assert abs(read["energy distance"]) < 0.2
    assert set(read) == {f for f in evaluate.BEST if not f.startswith("proportions")}


def test_the_held_out_cells_themselves_read_perfect(figures):
    _, cells, codes, held_out = figures
    read = compare(figures, cells.X[np.flatnonzero(held_out)], codes[held_out])
    for figure in ("gene-gene correlation RMSE", "zero-fraction error", "library-size KS",
                   "marker mean error", "marker fraction error"):  # fmt: skip
        assert read[figure] == pytest.approx(0, abs=1e-9), figure
    assert read["within-type variance ratio"] == pytest.approx(1)
    assert read["fold-change correlation"] == pytest.approx(1)
    assert read["nearest neighbour trained on, excess"] < -0.3  # they are copies of unseen cells


def test_permuted_labels_are_noticed_where_labels_count_and_only_there(figures, read_of_other_half):
    X, codes = other_half(figures)
    right = read_of_other_half
    wrong = compare(figures, X, np.random.default_rng(0).permutation(codes), trained_on=True)
    assert wrong["macro-F1, generated to real"] < 0.6 < right["macro-F1, generated to real"]
    assert wrong["fold-change correlation"] < 0.5
    assert wrong["energy distance"] > 10 * abs(right["energy distance"])
    assert wrong["marker mean error"] > 3 * right["marker mean error"]
    assert wrong["within-type variance ratio"] > 1.5 * right["within-type variance ratio"]
    for figure in ("MMD2, PCs", "zero-fraction error", "library-size KS"):
        assert wrong[figure] == right[figure], figure


def test_shifted_cells_are_noticed(figures):
    X, codes = other_half(figures)
    loud = X.toarray() * 3
    loud[:, :5] += 50
    read = compare(figures, loud, codes)
    assert read["random-forest AUROC, PCs"] > 0.95 and read["random-forest AUROC, genes"] > 0.95
    assert read["library-size KS"] > 0.6
    assert read["MMD2, PCs"] > 0.05  # the other real half reads below 0.01
    assert read["zero-fraction error"] > 0


def test_mean_cells_have_no_variance_and_independent_genes_no_correlation(figures):
    X, codes = other_half(figures)
    means = np.stack([X[codes == k].toarray().mean(axis=0) for k in range(3)])
    read = compare(figures, np.rint(means[codes] * 10).astype(int), codes)
    assert read["within-type variance ratio"] < 1e-6
    assert read["random-forest AUROC, genes"] > 0.99
    dense = X.toarray()
    rng = np.random.default_rng(0)
    shuffled = np.stack([rng.permutation(column) for column in dense.T], axis=1)
    log = [figures[0].log(sp.csr_matrix(X), np.arange(60)) for X in (dense, shuffled)]
    real = figures[0].log(figures[1].X, np.arange(60))
    together, apart = (evaluate.correlation_rmse(real, made) for made in log)
    assert apart > 2 * together


def test_copies_of_training_cells_are_found(figures, read_of_other_half):
    """All nearest neighbours of copies are training cells; of unseen cells about half are."""
    X, codes = other_half(figures)
    copied = compare(figures, X, codes)["nearest neighbour trained on, excess"]
    assert copied == pytest.approx(1 - figures[0].expected_share)
    assert copied > 0.3
    assert abs(read_of_other_half["nearest neighbour trained on, excess"]) < 0.15


def test_energy_distance_and_mmd_against_closed_forms():
    """One dimension: scipy gives the root of the energy distance; one normal against another."""
    rng = np.random.default_rng(0)
    grid = scipy.stats.norm.ppf((np.arange(1500) + 0.5) / 1500)  # normal without sampling noise
    a, b = (rng.permutation(grid)[:, None] + m for m in (0, 0.7))
    expected = scipy.stats.energy_distance(a[:, 0], b[:, 0]) ** 2
    assert evaluate.energy_distance(a, b) == pytest.approx(expected, rel=0.02)
    assert abs(evaluate.energy_distance(a[:700], a[700:])) < 0.02
    assert abs(evaluate.mmd2(a[:700], a[700:])) < 0.003
    # Gaussian kernel of variance w/2: E k = sqrt(w/(w+4)) exp(-m²/(w+4)), m the distance of means.
    d = np.abs(np.subtract.outer(np.r_[a, b][:, 0], np.r_[a, b][:, 0])) ** 2
    w = np.median(d[d > 0])
    closed = 2 * np.sqrt(w / (w + 4)) * (1 - np.exp(-(0.7**2) / (w + 4)))
    assert evaluate.mmd2(a, b) == pytest.approx(closed, rel=0.03)


def test_forest_and_variance_on_known_blobs():
    X, y = make_blobs(400, centers=[[0, 0], [10, 10]], random_state=0)
    half = np.arange(400) % 2 == 0
    assert evaluate.random_forest_auroc(X[half], X[~half], 0) == pytest.approx(0.5, abs=0.1)
    assert evaluate.random_forest_auroc(X[y == 0], X[y == 1], 0) > 0.999
    centre = np.stack([X[y == k].mean(axis=0) for k in (0, 1)])[y]
    wider = centre + (X - centre) * np.sqrt([2.0, 3.0])[y][:, None]
    ratios = evaluate.within_type_variance_ratio(X, y, wider, y)
    assert ratios == pytest.approx({0: 2, 1: 3})


def test_concordance_and_nnls():
    t = np.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    assert evaluate.concordance(t, t) == pytest.approx(1)
    assert evaluate.concordance(t, t[:, ::-1]) == pytest.approx(-1)
    assert evaluate.concordance(t, t + 0.3) < 0.8  # a constant bias costs, unlike in Pearson's
    profiles = np.random.default_rng(0).gamma(1.0, 1.0, (2, 50))
    assert evaluate.nnls_proportions(t @ profiles, profiles) == pytest.approx(t)


def test_cell_type_nb_has_the_moments_of_the_type():
    cells = make_cells((400, 300, 20))
    X, codes = cells.X, cells.obs["cell_type"].astype("category").cat.codes.to_numpy()
    wanted = np.repeat([0, 1], 4000)
    made = evaluate.draw_cell_type_nb(X, codes, wanted, np.random.default_rng(0))
    for k in (0, 1):
        own, got = X[codes == k].toarray(), made[wanted == k].toarray()
        np.testing.assert_allclose(got.mean(axis=0), own.mean(axis=0), rtol=0.2, atol=0.1)
        ratio = got.var(axis=0) / own.var(axis=0)
        assert 0.9 < np.median(ratio) < 1.1


def test_summary_is_over_trainings_where_there_are_several():
    rows = [(w, "bulk2sc", "MMD2, PCs", "", v) for w, v in zip("aabb", (1, 3, 5, 7), strict=True)]
    table = pd.DataFrame(rows, columns=["weights", "method", "figure", "cell_type", "value"])
    one = evaluate.summarise(table, 2).iloc[0]
    assert (one["mean"], one["n"], one["best"]) == (4, 2, 0)
    assert one["std"] == pytest.approx(np.std([2, 6], ddof=1))
    assert evaluate.summarise(table[table.weights == "a"], 1).iloc[0]["n"] == 2


# --------------------------------------------------------------------------------- the script

FEW = ["--n-draws", 1, "--n-pseudobulks", 5]


@pytest.fixture
def weights(trained, tmp_path):
    """A copy of the trained weights to write results into."""
    return shutil.copytree(trained, tmp_path / "weights")


def test_evaluate_measures_every_method_and_type(weights, h5ad):
    done = run("evaluate.py", "--data", h5ad, "--weights", weights, *FEW)
    table = pd.read_csv(weights / "evaluation.csv", keep_default_na=False, na_values=["nan"])
    assert set(table["method"]) >= {
        "bulk2sc", "other real cells", "unseen real cells", "cell-type NB", "published recipe",
        "NNLS",
    }  # fmt: skip
    assert set(table["figure"]) == set(evaluate.BEST)
    assert table["cell_type"].nunique() == 4  # three types, and all together
    for figure in evaluate.BEST:
        assert figure in done.stdout
    assert matplotlib.image.imread(weights / "evaluation.png").std() > 0.01
    value = table[table["cell_type"] == ""].set_index(["method", "figure"])["mean"].astype(float)
    # Regression: unpaired z leaves no variation within a type.
    published = value["published recipe", "within-type variance ratio"]
    assert published < 0.1 < value["bulk2sc", "within-type variance ratio"]


def test_evaluate_generated_file_and_several_weights(weights, h5ad, tmp_path):
    where = ["--data", h5ad, "--weights", weights]
    out = tmp_path / "g.h5ad"
    run("bulk2sc.py", *where, "--n-cells", 200, "--batch-size", 30, "--out", out)
    done = run_inside("evaluate.py", *where, *FEW, "--generated", out, "--no-baselines")
    assert done.returncode == 0, done.stderr
    assert "cell-type NB" not in done.stdout
    other = shutil.copytree(weights, tmp_path / "other")
    done = run_inside("evaluate.py", *where, *FEW, "--no-baselines", "--more-weights", other)
    assert done.returncode == 0, done.stderr
    assert "over 2 trainings" in done.stdout
    table = pd.read_csv(weights / "evaluation.csv")
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
    strange = make_cells()
    strange.obs["cell_type"] = "Martian"
    strange.write_h5ad(tmp_path / "strange.h5ad")
    done = run_inside("evaluate.py", *where, "--generated", tmp_path / "strange.h5ad")
    assert_one_line_error(done, "strange.h5ad", "Martian")
