"""Fold changes inside cell types: metrics, profiles, baselines; and compare_states.py on donors."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from benchmarks import compare_states, state_methods, state_truth
from conftest import (
    CELL_TYPES,
    OF_SAMPLES,
    QUICK,
    assert_one_line_error,
    make_cells,
    run_inside,
    train,
)
from data import Reference
from evaluation import metrics
from readers import profiles
from runtime.errors import InputError
from states import conditions

SHORT = ["B", "T", "NK"]  # profiled types, one for each of CELL_TYPES
RAISED = slice(12, 18)  # genes that the treatment raises sixfold in B cells

# ------------------------------------------------------------------------------------- metrics


@pytest.fixture
def pair():
    """Profiles A and B (K, G) in CPM, of three types that change in different genes."""
    rng = np.random.default_rng(0)
    a = rng.lognormal(5, 0.5, (3, 200))  # all above 30 CPM
    change = rng.normal(0, 0.3, 200) + np.zeros((3, 200))
    for k in range(3):
        change[k, 20 * k : 20 * k + 20] += 3
    return a, (a + 10) * 2**change - 10 + 1e-9


def of_fold_changes(a, change):
    """Profiles whose fold changes from a are as given."""
    return (a + 10) * 2**change - 10


def test_exact_fold_changes_are_perfect(pair):
    overall, by_type, n_left_out = metrics.fold_change_metrics(*pair, *pair)
    assert overall == pytest.approx(dict.fromkeys(overall, 1))
    assert set(overall) == {m for m in metrics.METRICS if m.startswith("fold change ")}
    assert by_type["fold change Pearson"] == pytest.approx(np.ones(3))
    assert n_left_out == 0
    scaled = [part * 1.5 + 5 for part in pair]  # pseudocounts scale with it
    assert metrics.fold_changes(*scaled) == pytest.approx(metrics.fold_changes(*pair))


def test_no_change_scores_zero_and_attenuation_costs_concordance(pair):
    a, _ = pair
    assert set(metrics.fold_change_metrics(*pair, a, a)[0].values()) == {0.0}
    half = of_fold_changes(a, metrics.fold_changes(*pair) / 2)
    overall = metrics.fold_change_metrics(*pair, a, half)[0]
    assert overall["fold change Pearson"] == pytest.approx(1)
    assert overall["fold change specific"] == pytest.approx(1)
    assert overall["fold change concordance"] < 0.85


def test_specific_asks_for_the_right_type(pair):
    """The same change in all types, or the right ones in the wrong types."""
    a, _ = pair
    change = metrics.fold_changes(*pair)
    same = of_fold_changes(a, np.tile(change.mean(axis=0), (3, 1)))
    overall = metrics.fold_change_metrics(*pair, a, same)[0]
    assert overall["fold change Pearson"] > 0.5
    assert overall["fold change specific"] == 0
    wrong = of_fold_changes(a, change[[1, 2, 0]])
    assert metrics.fold_change_metrics(*pair, a, wrong)[0]["fold change specific"] < 0


def test_missing_types_are_left_out_and_low_genes_do_not_count(pair):
    a, b = (part.copy() for part in pair)
    a[:, 100:], b[:, 100:] = 1, 29  # no more than 30 in either
    predicted = a.copy(), b.copy()
    predicted[1][:, 100:] = 0
    predicted[0][2] = np.nan
    overall, by_type, n_left_out = metrics.fold_change_metrics(a, b, *predicted)
    assert n_left_out == 1 and np.isnan(by_type["fold change Pearson"][2])
    assert overall["fold change concordance"] == pytest.approx(1)
    b[1] = np.nan  # one type alone has nothing to be specific against
    overall, _, n_left_out = metrics.fold_change_metrics(a, b, *predicted)
    assert n_left_out == 2 and np.isnan(overall["fold change specific"])
    nothing = np.full_like(a, np.nan)
    overall, _, n_left_out = metrics.fold_change_metrics(a, b, nothing, nothing)
    assert n_left_out == 3 and np.isnan(list(overall.values())).all()


def test_false_changes_are_shares_of_expressed_genes():
    a = np.array([[100.0, 100, 100, 10], [10, 10, 10, 10], [np.nan] * 4])
    b = np.array([[100.0, 200, 60, 40], [20, 30, 10, 10], [60.0] * 4])
    share = metrics.false_changes(a, b)  # 110 / 70 is above 2^0.5, 10 and 40 are not expressed
    assert share[0] == pytest.approx(2 / 3) and np.isnan(share[1:]).all()


# ------------------------------------------------------------------------------------- readers

TABLE = "column,sample,donor,condition,cell_type\n"


def write_profiles(folder, text="gene_id,symbol,x,y\nE1,A,1,2\nE2,B,3,0\n", table=TABLE):
    lines = "x,s1,d1,c1,B\ny,s1,d1,c1,T\n" if table == TABLE else ""
    (folder / "profiles.csv").write_text(text)
    (folder / "table.csv").write_text(table + lines)
    return folder / "profiles.csv", folder / "table.csv"


def test_profiles_are_matched_by_symbol_and_the_first_of_a_gene_counts(tmp_path, capsys):
    text = "gene_id,symbol,x,y,z\nE1,A,1,2,9\nE2,,3,0,9\nE3,A,5,5,9\nE4,ALIEN,7,7,9\nE5,B,4,6,9\n"
    read = profiles.read_profiles(*write_profiles(tmp_path, text))
    rows, positions = read.match_genes(["B", "C", "A"], None)
    assert dict(zip(positions, read.values[0, rows], strict=True)) == {2: 1, 0: 4}
    assert list(read.table["cell_type"]) == ["B", "T"]
    printed = capsys.readouterr().out
    assert "2 columns that" in printed  # gene_id and z
    assert "1 without a name, 1 of a gene that comes before, 1 of other genes" in printed
    with pytest.raises(InputError, match="none of its genes .A, , A, ....? is known to the model"):
        read.match_genes(["C"], None)


def test_profiles_without_a_column_of_symbols_are_named_by_the_first(tmp_path):
    read = profiles.read_profiles(*write_profiles(tmp_path, "gene,x,y\nA,1,2\n\nB,3,0\n"))
    assert list(read.genes) == ["A", "B"]
    assert read.values.tolist() == [[1, 3], [2, 0]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": "symbol,x\nA,1\n"}, "profiles.csv: has no column y, which .*table.csv names"),
        ({"text": "symbol,x,y\nA,1,many\n"}, "found 'many' .gene A, column y., expected a number"),
        ({"text": "symbol,x,y\nA,1,-2\n"}, "found '-2' .gene A, column y."),
        ({"text": "symbol,x,y\nA,1,0\n"}, "1 profiles are all zero .y."),
        ({"text": "symbol,x,y,x\nA,1,1,1\n"}, "profiles.csv: columns there twice .x."),
        ({"text": ""}, "not a readable table"),
        ({"table": "column,sample\nx,s1\n"}, "table.csv: found the columns column, sample"),
        ({"table": TABLE + "x,s1,d1,,B\n"}, "found no condition for 1 profiles .x."),
        ({"table": TABLE + "x,s1,d1,c,B\nx,s2,d1,c,B\n"}, "columns there twice .x."),
        ({"table": TABLE + "x,s1,d1,c,B\ny,s1,d1,c,B\n"}, "cell types of a sample there twice"),
        ({"table": TABLE + "x,s1,d1,c,B\ny,s1,d2,c,T\n"}, "several donors of sample s1"),
        ({"table": TABLE + "\n"}, "found no profile"),
    ],
)
def test_profiles_that_cannot_be_used(tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        profiles.read_profiles(*write_profiles(tmp_path, **change))


def test_types_of_profiles(tmp_path, capsys):
    path = tmp_path / "types.csv"
    path.write_text("cell_type,profile_type\nB 2,B\nT,T cells\nB 1,B\nMartian,T\nNK,absent\n")
    types, type_of = profiles.read_profile_types(path, ["B 1", "B 2", "NK", "T"], ["T cells", "B"])
    assert types == ["B", "T cells"] and type_of == ["B", "B", None, "T cells"]
    printed = capsys.readouterr().out
    assert "1 cell types that the model does not know left out (Martian)" in printed
    assert "2 types without a profile left out (T, absent)" in printed
    types, type_of = profiles.read_profile_types(None, ["B", "NK"], ["NK", "T"])
    assert types == ["NK"] and type_of == [None, "NK"]
    assert "1 profiled types left out (T)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cell_type,type\nB,B\n", "found the columns cell_type, type, expected cell_type and"),
        ("cell_type,profile_type\nB,B\nB,T\n", "two profiled types .B."),
        ("cell_type,profile_type\nMartian,B\n", "found no cell type of the model .B, T."),
        (None, "--profile-types: found none, and no profiled type .x. is a cell type"),
    ],
)
def test_types_of_profiles_that_cannot_be_used(tmp_path, text, words):
    path = tmp_path / "types.csv" if text else None
    if text:
        path.write_text(text)
    with pytest.raises(InputError, match=words):
        profiles.read_profile_types(path, ["B", "T"], ["B", "T"] if text else ["x"])


# ----------------------------------------------------------------------------------- baselines


def test_bayesprism_recovers_known_states_of_a_noise_free_mixture():
    rng = np.random.default_rng(0)
    states = rng.gamma(0.5, 1.0, (5, 300))
    states[4] = 0  # a state without cells is none
    type_of = np.array([0, 1, 0, 1, 1])
    theta = np.array([[0.6, 0.1, 0.0, 0.3, 0], [0.1, 0.2, 0.5, 0.2, 0]])
    parts = theta[:, :, None] * states / np.maximum(states.sum(axis=1, keepdims=True), 1)
    bulk = 1e6 * parts.sum(axis=1)
    in_theta = np.arange(300) < 250
    bulk[0, 250:] *= 3  # what is not in θ does not move it, but is allotted all the same
    Z = state_methods.bayesprism_expression(bulk, states, type_of, in_theta, 2000)
    assert Z.sum(axis=1) == pytest.approx(bulk, rel=1e-6)
    for k in (0, 1):
        expected = 1e6 * parts[:, type_of == k].sum(axis=1)
        assert Z[:, k, :250] == pytest.approx(expected[:, :250], rel=0.02, abs=30)
    assert Z[0, :, 250:].sum() == pytest.approx(bulk[0, 250:].sum())


def test_one_factor_adds_up_to_the_bulk_and_is_the_same_in_all_types():
    rng = np.random.default_rng(0)
    p, bulk = rng.dirichlet(np.ones(50), 3), rng.gamma(1.0, 100, (2, 50))
    shares, measured = rng.dirichlet(np.ones(3), 2), np.arange(50) > 5
    x = state_methods.one_factor_expression(bulk, measured, shares, p)
    assert x.sum(axis=1)[:, measured] == pytest.approx(bulk[:, measured])
    factor = x / (shares[:, :, None] * (p + 1e-6))
    assert factor == pytest.approx(np.repeat(factor[:, :1], 3, axis=1))
    assert (x[:, :, ~measured] == 0).all()


def test_types_are_merged_and_samples_averaged_where_they_have_a_type():
    sums = np.array([[[1.0, 1], [2, 0], [0, 0]]])  # (1, K, G)
    member = np.array([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])  # (K, T)
    merged = state_truth.merge_types(sums, member)
    assert merged[0, 0] == pytest.approx([0.75e6, 0.25e6]) and np.isnan(merged[0, 1:]).all()
    two = np.array([[[1.0, 3], [np.nan, np.nan]], [[3.0, 3], [np.nan, np.nan]]])
    mean = state_truth.average_samples(two)
    assert mean[0].tolist() == [2, 3] and np.isnan(mean[1]).all()


def test_which_samples_are_compared():
    samples = pd.DataFrame(
        {"donor": ["d1", "d1", "d2", "d3"], "condition": ["x", "y", "x", "y"]},
        index=["s1", "s2", "s3", "s4"],
    )

    def names(samples, conditions):
        paired = state_truth.is_paired(samples, conditions)
        found = state_truth.list_contrasts(samples, conditions, paired)
        return [(donor, list(samples.index[a]), list(samples.index[b])) for donor, a, b in found]

    assert names(samples, ("x", "y")) == [("d1", ["s1"], ["s2"])]
    # No donor has both: each one of y against all of x.
    assert names(samples.iloc[[0, 2, 3]], ("x", "y")) == [("d3", ["s1", "s3"], ["s4"])]
    # One condition: each donor against the others.
    assert names(samples.iloc[[0, 2]], ("x", "x")) == [
        ("d1", ["s3"], ["s1"]),
        ("d2", ["s1"], ["s3"]),
    ]
    for asked, known, expected in (
        (None, ["x", "y"], ("x", "y")),
        (None, ["x"], ("x", "x")),
        (("y", "x"), ["x", "y", "z"], ("y", "x")),
    ):
        assert conditions.choose_conditions(asked, known, "--contrast") == expected
    for asked, known, words in (
        (None, ["x", "y", "z"], "found 3 conditions .x, y, z., expected --contrast"),
        (("x", "w"), ["x", "y"], "found w, expected two of x, y"),
        (("x", "x"), ["x", "y"], "found x twice"),
    ):
        with pytest.raises(InputError, match=f"--contrast: {words}"):
            conditions.choose_conditions(asked, known, "--contrast")


def test_halves_of_real_cells_have_the_same_number_and_share_no_cell():
    codes = np.repeat([0, 1], [9, 5])
    counts = sp.csr_matrix(np.eye(14) * 1000)
    seen = []
    reference = SimpleNamespace(codes=codes)
    model = SimpleNamespace(counts=lambda _, rows: seen.append(rows) or counts[rows])
    n_cells, rng = np.array([4, 0]), np.random.default_rng(0)
    share = compare_states.halves_share(model, reference, np.arange(14), n_cells, rng)
    assert [len(rows) for rows in seen] == [4, 4] and len(set(np.concatenate(seen))) == 8
    assert share[0] == 1 and np.isnan(share[1])  # every gene in one half alone


# ---------------------------------------------------------------------------------- the script


@pytest.mark.parametrize(
    "flags",
    [
        ["--conditions", "c"],
        ["--donors", "d"],
        ["--samples", "s", "--contrast", "a", "b"],
        ["--samples", "s", "--profiles", "p.csv"],
        ["--samples", "s", "--conditions", "c", "--profiles", "p.csv"],
        ["--samples", "s", "--conditions", "c", "--profile-table", "p.csv"],
        ["--samples", "s", "--conditions", "c", "--mixing", 1, 2],
        ["--samples", "s", "--conditions", "c", "--cells-per-sample", 0],
    ],
)
def test_flags_of_contrasts_need_each_other(flags):
    last = [f for f in flags if str(f).startswith("--")][-1]
    assert_one_line_error(run_inside("benchmarks/compare_states.py", *flags), last, "found")


def make_donors():
    """Cells of four donors, half of them treated, which raises genes in B cells alone."""
    cells = make_cells((240, 200, 180))
    rank = cells.obs.groupby("cell_type").cumcount().to_numpy() % 8
    cells.obs["donor"] = [f"d{i // 2}" for i in rank]
    cells.obs["condition"] = np.array(["control", "treated"])[rank % 2]
    cells.obs["sample"] = cells.obs["donor"] + "_" + cells.obs["condition"]
    X = cells.X.toarray()
    is_b = (cells.obs["cell_type"] == CELL_TYPES[0]).to_numpy()
    X[is_b & (rank % 2 == 1), RAISED] *= 6
    cells.X = sp.csr_matrix(X)
    cells.obs.iloc[:10, cells.obs.columns.get_loc("cell_type")] = "Unknown"
    return cells


@pytest.fixture(scope="module")
def donors(tmp_path_factory):
    """Flags of a reference of four donors, and its weights, from which two are held out."""
    folder = tmp_path_factory.mktemp("donors")
    make_donors().write_h5ad(folder / "cells.h5ad")
    where = ["--data", folder / "cells.h5ad", "--weights", folder / "weights"]
    where += ["--samples", "sample", "--donors", "donor", "--conditions", "condition"]
    settings = {script: [*flags, "--batch-size", 32] for script, flags in QUICK.items()}
    train(*where, settings=settings, train_gmvae=["--held-out-donors", "d0", "d1"])
    return where


FAST = ["--n-draws", 1, "--cells-per-sample", 400]


@pytest.fixture
def evaluated(donors, tmp_path, monkeypatch):
    """A function that runs compare_states.py on these donors: what it prints and writes."""
    monkeypatch.setattr(compare_states, "random_forest_auroc", lambda *_: 0.5)  # the slowest by far
    out = tmp_path / "evaluation"

    def evaluate_donors(*flags):
        where = [*donors, "--out", out]
        done = run_inside("benchmarks/compare_states.py", *where, *FAST, *flags)
        if done.returncode:
            return done, None
        table = pd.read_csv(out / "evaluation.csv", keep_default_na=False, na_values=["nan"])
        return done, table.set_index(["metric", "cell_type", "method"])["mean"].astype(float)

    return evaluate_donors


def test_evaluate_compares_cells_of_unseen_donors(evaluated):
    """The truth is the held-out cells; genes change in B cells alone."""
    done, value = evaluated()
    assert done.returncode == 0, done.stderr
    assert "4 test samples, 2 donors whose treated is compared with control of the same" in (
        done.stdout
    )
    assert "fold changes from control to treated inside cell types" in done.stdout
    assert "mean ± std over 2 donors" in done.stdout and "proportions of" not in done.stdout
    generated = set(state_methods.GENERATED)
    baseline = {"one factor per gene", "BayesPrism Z", "another donor's profiles"}
    baseline |= {"training cells of the condition", "decoder, states of the condition"}
    overall = value.xs("", level="cell_type")
    assert set(overall["fold change Pearson"].index) == generated | baseline | {
        state_methods.EXPECTED
    }
    assert set(overall["false changes, same state"].index) == {
        *(*generated, state_methods.EXPECTED, "real cells, two halves")
    }
    assert set(overall.index.levels[0]) == set(metrics.CONTRAST_METRICS)
    of_b = value["fold change Pearson"].loc[CELL_TYPES[0]]
    for method in ("bulk2sc", "one factor per gene", "BayesPrism Z", "another donor's profiles"):
        assert of_b[method] > 0.5, method
    assert abs(of_b["constant answer"]) < 0.4
    null = overall["false changes, same state"]
    assert null[state_methods.EXPECTED] < 0.15 < null["real cells, two halves"]


def write_truth(folder, samples, factor=1.0):
    """Files of profiles of each type in samples ``(name, donor, condition)``; flags."""
    cells = make_donors()
    labels = cells.obs["cell_type"]
    columns, rows = {}, []
    for name, donor, condition in samples:
        for k, cell_type in enumerate(CELL_TYPES):
            profile = cells.X[(labels == cell_type).to_numpy()].mean(axis=0).A1.copy()
            if condition in ("treated", "sick") and k == 0:
                profile[RAISED] *= 6
            columns[f"{name}|{SHORT[k]}"] = profile * factor
            rows.append((f"{name}|{SHORT[k]}", name, donor, condition, SHORT[k]))
    table = pd.DataFrame(columns, index=pd.Index(cells.var_names, name="symbol"))
    table.iloc[2:].to_csv(folder / "truth.csv.gz")  # without two of the model's genes
    names = TABLE.strip().split(",")
    pd.DataFrame(rows, columns=names).to_csv(folder / "table.csv", index=False)
    types = pd.DataFrame({"cell_type": CELL_TYPES, "profile_type": SHORT})
    types.to_csv(folder / "types.csv", index=False)
    return [
        *("--profiles", folder / "truth.csv.gz", "--profile-table", folder / "table.csv"),
        *("--profile-types", folder / "types.csv"),
    ]


def test_evaluate_against_profiles_of_the_reference_samples(evaluated, tmp_path):
    own = [(f"d{i}_{c}", f"d{i}", c) for i in (0, 2) for c in ("control", "treated")]
    done, value = evaluated(*write_truth(tmp_path, own))
    assert done.returncode == 0, done.stderr
    assert "no profile of 2 held-out samples (d1_control, d1_treated)" in done.stdout
    assert "58 genes, 3 cell types" in done.stdout
    of_b = value["fold change Pearson"].loc["B"]
    assert of_b["another donor's profiles"] > 0.9 and of_b["training cells of the condition"] > 0.7
    done, _ = evaluated(*write_truth(tmp_path, [("d0_control", "d0", "treated")]))
    assert_one_line_error(done, "table.csv", "condition of sample d0_control is treated", "control")
    done, _ = evaluated(*write_truth(tmp_path, own[2:]))
    assert_one_line_error(done, "truth.csv.gz", "no profile of the held-out samples")
    done, _ = evaluated(*write_truth(tmp_path, own), "--mixing", 1, 1, 1)
    assert_one_line_error(done, "--mixing", "profiles of other samples")


def test_evaluate_mixes_profiles_of_other_samples_to_bulks(evaluated, tmp_path):
    others = [("p1 before", "p1", "healthy"), ("p1 after", "p1", "sick"), ("p2", "p2", "other")]
    flags = write_truth(tmp_path, others, factor=50)
    asked = ["--contrast", "healthy", "sick"]
    done, value = evaluated(*flags, *asked, "--reference-contrast", "control", "treated")
    assert done.returncode == 0, done.stderr
    assert "3 test samples, 1 donors whose sick is compared with healthy" in done.stdout
    assert "mean ± std over draws of donor p1" in done.stdout
    of_b = value["fold change Pearson"].loc["B"]
    assert of_b["one factor per gene"] > 0.8 and of_b["bulk2sc"] > 0.5
    assert of_b["training cells of the condition"] > 0.7
    assert "another donor's profiles" not in of_b
    assert "real cells, two halves" not in value["false changes, same state"].loc[""]
    done, value = evaluated(*flags, *asked, "--mixing", 5, 2, 1)
    assert done.returncode == 0 and "reference has no healthy and no sick" in done.stdout
    assert "training cells of the condition" not in value["fold change Pearson"].loc["B"]
    done, _ = evaluated(*flags)
    assert_one_line_error(done, "--contrast", "3 conditions (healthy, other, sick)")
    for mixing, words in (([5, 2], "found 2 numbers, expected 3"), ([5, 2, 0], "positive")):
        done, _ = evaluated(*flags, *asked, "--mixing", *mixing)
        assert_one_line_error(done, "--mixing", words)


def test_whole_samples_must_be_held_out():
    cells = make_donors()
    cells.obs["sample"] = cells.obs["sample"].astype("category")
    model = SimpleNamespace(folder=Path("w"))
    reference = Reference(cells, held_out=np.zeros(cells.n_obs, bool))
    with pytest.raises(InputError, match="scDecoder_model.pt: found no sample, expected whole"):
        state_truth.held_out_samples(model, reference)
    reference.held_out[:5] = True
    with pytest.raises(InputError, match="samples held out in part"):
        state_truth.held_out_samples(model, reference)
    reference.held_out = (cells.obs["donor"] == "d3").to_numpy()
    assert state_truth.held_out_samples(model, reference) == ["d3_control", "d3_treated"]


def test_no_type_has_enough_cells(trained_samples, sample_h5ad, tmp_path):
    """Twelve cells of a type in a sample are too few to be a truth."""
    done = run_inside(
        "benchmarks/compare_states.py", "--data", sample_h5ad, *OF_SAMPLES,
        "--conditions", "treatment",
        "--weights", trained_samples, "--out", tmp_path / "evaluation",
    )  # fmt: skip
    assert_one_line_error(done, "--conditions treatment", "20 cells", "--profiles")
    assert not any(tmp_path.iterdir())  # nothing half-written
