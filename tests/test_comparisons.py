"""The scripts that compare bulk2sc with other methods: cells, proportions and their estimators."""

import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.sparse as sp
import scipy.stats
import torch

from benchmarks import compare_cells, compare_proportions, scdesign2
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
from data import Reference
from evaluation import metrics, proportions, tables
from evaluation.cells import draw_cell_type_nb, load_trained
from test_evaluate import MEASURED

METHODS = [estimator.name for estimator in compare_proportions.find_estimators()]


def test_shifted_bulks_share_factors_within_a_platform_and_lose_a_tenth_of_genes():
    rng = np.random.default_rng(0)
    bulk = rng.gamma(2.0, 100.0, (45, 1000))  # three platforms, the last of five bulks
    shifted = compare_proportions.shift_platform(bulk, rng)
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


@pytest.mark.parametrize("zero", [0.0, 0.4])
@pytest.mark.parametrize("theta", [0.5, scdesign2.POISSON])
def test_marginals_are_found_with_their_parameters(zero, theta):
    """Poisson or negative binomial, zero-inflated or not, as the likelihood says."""
    mean = np.array([0.5, 2, 6])
    true = scdesign2.Marginals(np.full(3, zero), mean, np.full(3, theta))
    drawn = true.draw(20_000, np.random.default_rng(0))
    found = scdesign2.fit_marginals(sp.csc_matrix(drawn))
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
    found = scdesign2.fit_marginals(sp.csc_matrix(X))
    assert found.mean[0] == found.mean[1] == found.zero[2] == 0  # in one cell: not expressed
    assert 5 < (found.zero > 0).sum() < 30
    plain = scdesign2.fit_marginals(sp.csc_matrix(rng.negative_binomial(1.5, 0.3, (60, 300))))
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
    copula = scdesign2.ScDesign2(X, codes, 0).draw(target).toarray()
    independent = draw_cell_type_nb(X, codes, target, rng).toarray()

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
    again = scdesign2.ScDesign2(X, codes, 0).draw(target).toarray()
    assert (again == copula).all()


@pytest.fixture(scope="module")
def compared(trained, h5ad, tmp_path_factory):
    """What the comparisons of cells and of proportions print, and the tables that they write."""
    folder = tmp_path_factory.mktemp("compared")
    where = ["--data", h5ad, "--weights", trained, "--n-draws", 2]
    of_cells = [*where, "--n-trees", 5, "--out", folder / "cells"]
    of_bulks = [*where, "--n-pseudobulks", 25, *write_measured(folder), "--out", folder / "bulks"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_cells, "CELLS_PER_SUM", 300)
        patch.setattr(tables, "write_evaluation", lambda *_: None)  # half of the time
        cells = run_inside("benchmarks/compare_cells.py", *of_cells)
        bulks = run_inside("benchmarks/compare_proportions.py", *of_bulks)
    for done in (cells, bulks):
        assert done.returncode == 0, done.stderr
    table = pd.concat([read_table(folder / "cells"), read_table(folder / "bulks")])
    return cells.stdout, bulks.stdout, table


def test_every_method_and_type_is_compared(compared):
    cells, printed, table = compared
    assert set(table["method"]) >= {
        "bulk2sc", "calibrated", "other real cells", "unseen real cells", "cell-type NB",
        "scDesign2 copula", "perfect model", "published recipe", "constant answer",
        *METHODS,
    }  # fmt: skip
    assert set(table["metric"]) == set(MEASURED)
    assert set(table["cell_type"]) == {"", *CELL_TYPES, *LINEAGES}
    for metric in MEASURED:
        assert metrics.setting_of(metric) or metric in cells
    assert "NNLS" not in cells
    proportions = printed.split("\nproportions, ")[1:]
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


def test_model_trained_anew(trained, h5ad, tmp_path, no_forests, monkeypatch):
    """It is measured on cells of its model, whose settings and split it takes."""
    retrain, kept = compare_cells.retrain, []

    def retrain_and_keep(model, reference, *arguments):
        kept.extend([(model, reference), retrain(model, reference, *arguments)])
        return kept[1]

    monkeypatch.setattr(compare_cells, "retrain", retrain_and_keep)
    weights, out = shutil.copytree(trained, tmp_path / "weights"), tmp_path / "e"
    where = ["--data", h5ad, "--weights", weights, "--retrain", "--out", out]
    few = ["--n-draws", 1, "--n-trees", 5]
    done = run_inside("benchmarks/compare_cells.py", *where, *few)
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
    done = run_inside("benchmarks/compare_cells.py", *where, *few)
    assert_one_line_error(done, "scGMVAE_model.pt")


def test_swapped_fractions_score_badly(trained, h5ad, measured):
    """Columns are swapped in the file. Also what --lineages alone measures."""
    swapped = pd.read_csv(measured[3]).rename(columns={"B": "T and NK", "T and NK": "B"})
    swapped.to_csv(measured[3], index=False)
    paths = {"bulk": measured[1], "fractions": measured[3], "lineages": measured[5]}
    cfg = compare_proportions.Settings(
        data=h5ad, weights=trained, n_draws=1, n_pseudobulks=5, **paths
    )
    model, reference = load_trained(trained, Reference.load(cfg), "cpu")
    lineage_of, fractions = proportions.read_truth(cfg, model.cell_types)
    estimators = compare_proportions.find_estimators()
    methods = proportions.ProportionMethods(model, reference, estimators)
    rows = proportions.measure_real_bulk(methods, lineage_of, fractions, cfg)
    values = {(method, metric.split()[1]): v for method, metric, key, v in rows if key is None}
    for method in ("bulk2sc", "DWLS", "NNLS"):
        assert values[method, "Pearson"] < -0.8 and values[method, "RMSE,"] > 0.4
    of_bulks = ("real bulk", "shift", "shift, lineages")
    for given, left_out in ((lineage_of, of_bulks), (None, (*of_bulks, "lineages"))):
        rng = np.random.default_rng(0)
        rows = proportions.measure_pseudobulks(methods, given, cfg, rng)
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
    flags += [*other_donors, "--out", tmp_path]
    script = "benchmarks/compare_proportions.py"
    done = run_inside(script, *flags, "--shift-cells", "condition", "control")
    assert done.returncode == 0, done.stderr
    assert "75 of 150 labelled cells are those of --shift-cells" in done.stdout
    assert "donors: 55 cells of 2 lineages (B cells, T cells), 20 of none" in done.stdout
    assert "1 cell types of donors without a lineage left out (Platelets)" in done.stdout
    assert "does not know" not in done.stdout
    assert "has 55 of the model's 60 genes" in done.stdout
    table = read_table(tmp_path)
    table = table[table["metric"].str.endswith(", donors")]
    assert set(table["metric"]) == set(metrics.proportion_names(", donors"))
    assert set(table["cell_type"]) == {"", "B cells", "T cells"}
    value = means(table)
    for method in ("bulk2sc", "NNLS", "DWLS", "MuSiC", "nu-SVR", "BayesPrism"):
        assert value[method, "proportions CCC, donors"] > 0.9, method
    # All cells: half of them with wrong labels.
    done = run_inside(script, *flags)
    assert done.returncode == 0, done.stderr
    value = means(read_table(tmp_path))
    assert value["bulk2sc", "proportions CCC, donors"] < 0.6
    assert value["bulk2sc", "proportions CCC, lineages"] > 0.9


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--shift-data D", ("--shift-data", "no --lineages")),
        ("--shift-cells condition x", ("--shift-cells", "no --shift-data")),
        ("--shift-data D D --lineages L", ("found donors as name", "names of their own")),
        ("--shift-data D --shift-labels a b --lineages L", ("--shift-labels", "found 2 for 1")),
        (
            "--shift-data D --shift-labels nothing --lineages L",
            ("--shift-labels nothing", "column of .obs"),
        ),
        ("--shift-data D --lineages L --shift-cells batch 1", ("no column batch",)),
        (
            "--shift-data D --lineages L --shift-cells condition 1",
            ("no cell with condition 1", "expected one of control, treated"),
        ),
        (
            "--shift-data D --shift-labels condition --lineages L",
            ("none of its 5 cell types", "one of donors's"),
        ),
    ],
)
def test_other_donors_that_cannot_be_used(trained, h5ad, other_donors, flags, words):
    paths = {"D": other_donors[1], "L": other_donors[5]}
    flags = [paths.get(flag, flag) for flag in flags.split()]
    where = ["--data", h5ad, "--weights", trained]
    done = run_inside("benchmarks/compare_proportions.py", *where, *flags)
    assert_one_line_error(done, *words)
