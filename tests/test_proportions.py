"""Known proportions, the table of proportions of cells and RNA, and its picture."""

import re

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb

from conftest import CELL_TYPES, ROOT, assert_one_line_error, make_cells, run_inside
from deconvolution.proportions import (
    Proportions,
    fix_known,
    make_proportions,
    normal_interval,
    reference_composition,
    rna_fractions,
)
from generation import Model
from plots import proportions as proportion_plots
from plots.proportions import write_proportions
from plots.style import type_colors
from readers.proportions import KnownProportions, read_proportions
from runtime.errors import InputError

B, T, NK = CELL_TYPES
NAN = np.nan
HALF = pd.DataFrame({T: [0.25, None, 0.5], B: [0.5, 0.6, None]}, ["x", "y", "z"])  # of the cells


def write(path, table):
    """Write a table of known proportions as a user does; table: a data frame, or text as it is."""
    text = table if isinstance(table, str) else table.rename_axis("sample").to_csv()
    path.write_text(text)
    return path


def read(tmp_path, table, lineages=None):
    return read_proportions(write(tmp_path / "known.csv", table), CELL_TYPES, lineages)


@pytest.fixture
def lineages(tmp_path):
    path = tmp_path / "lineages.csv"
    path.write_text(f"cell_type,lineage\n{B},lymph\n{T},lymph\n{NK},killer\n")
    return path


@pytest.fixture(scope="module")
def bulk(tmp_path_factory):
    """Three bulks, x, y and z, of the same cells."""
    path = tmp_path_factory.mktemp("bulk") / "bulk.csv"
    cells = make_cells()
    total = cells.X.sum(axis=0).A1
    pd.DataFrame({"x": total, "y": total, "z": total}, cells.var_names).to_csv(path)
    return path


def generate(out, weights, *flags):
    """Generate into ``out``; the process, the cells, and the long table as samples x types."""
    done = run_inside("bulk2sc.py", "--weights", weights, "--out", out, *flags)
    assert done.returncode == 0, done.stderr
    return done, anndata.read_h5ad(out)


def wide(cells, column):
    """A column of uns["proportions"] as (S, K)."""
    table = cells.uns["proportions"].pivot(index="sample", columns="cell_type", values=column)
    return table.to_numpy()


# ------------------------------------------------------------------------------- the numbers


def test_rna_fractions_by_hand():
    """A tenth of the cells with nine times the RNA are half of the RNA."""
    np.testing.assert_allclose(rna_fractions(np.array([[0.9, 0.1]]), np.array([1.0, 9.0])), 0.5)
    of_each = np.array([[1.0, 1.0], [3.0, 1.0]])  # content may differ between samples
    got = rna_fractions(np.full((2, 2), 0.5), of_each)
    np.testing.assert_allclose(got, [[0.5, 0.5], [0.75, 0.25]])


def test_intervals_hold_ninety_per_cent_of_a_normal_error():
    low, high = normal_interval(np.array([[0.5, 0.02, 0.99]]), np.array([[0.1, 0.1, 0.1]]))
    np.testing.assert_allclose(low, [[0.3355, 0, 0.8255]])
    np.testing.assert_allclose(high, [[0.6645, 0.1845, 1]])


def test_long_table_has_a_row_for_each_type_of_each_sample():
    pi = np.array([[0.25, 0.75], [0.5, 0.5]])
    table = make_proportions(["s2", "s1"], ["a/b", "c"], pi, np.array([3.0, 1.0])).to_table()
    assert list(table) == ["sample", "cell_type", "proportion", "low", "high", "rna_fraction"]
    assert list(table["sample"]) == ["s2", "s2", "s1", "s1"]
    assert list(table["cell_type"]) == ["a/b", "c"] * 2
    assert list(table["proportion"]) == [0.25, 0.75, 0.5, 0.5]
    np.testing.assert_allclose(table["rna_fraction"], [0.5, 0.5, 0.75, 0.25])
    assert table[["low", "high"]].isna().all(axis=None)


def test_long_table_of_many_batches_is_small():
    S, K = 100_000, 13
    pi = np.full((S, K), 1 / K, np.float32)
    names = [f"batch_{i}" for i in range(S)]
    table = make_proportions(names, [str(k) for k in range(K)], pi, np.ones(K)).to_table()
    assert len(table) == S * K and table.dtypes["proportion"] == np.float32
    assert table.memory_usage().sum() < 35 * len(table)  # bytes; 21 and the samples' names


@pytest.mark.parametrize(
    "values, column, expected, known",
    [
        ([0.6, NAN], [0, 1, -1, -1], [0.6, 0.08, 0.16, 0.16], [1, 0, 0, 0]),  # 0.4 in 1 : 2 : 2
        ([0.6, 0.4], [0, 1, -1, -1], [0.6, 0.4, 0, 0], [1, 1, 1, 1]),  # nothing is left
        ([0.7, NAN], [0, 0, 0, 1], [0.35, 0.1166667, 0.2333333, 0.3], [0, 0, 0, 1]),  # a lineage
        ([0.1, 0.7, 0.2], [0, 1, 2, -1], [0.1, 0.7, 0.2, 0], [1, 1, 1, 1]),  # 1 - 1e-16 in floats
        ([0.0, NAN], [0, 1, -1, -1], [0, 0.2, 0.4, 0.4], [1, 0, 0, 0]),  # known to be absent
        ([0.2, 0.3, 0.1], [0, 1, 2, -1], [0.2, 0.3, 0.1, 0.4], [1, 1, 1, 1]),  # one type is left
        ([NAN, NAN], [0, 0, 1, 1], [0.3, 0.1, 0.2, 0.4], [0, 0, 0, 0]),  # nothing known
    ],
)  # fmt: skip
def test_known_values_replace_estimates(values, column, expected, known):
    estimate = np.array([[0.3, 0.1, 0.2, 0.4]])
    if column[1:] == [1, -1, -1]:
        estimate = np.array([[0.5, 0.1, 0.2, 0.2]])
    low, high = estimate - 0.05, estimate + 0.05
    known_totals = np.array([values]), np.array(column)
    cells, low, high, mask = fix_known(estimate, low, high, *known_totals)
    np.testing.assert_allclose(cells, [expected], atol=1e-7)
    assert mask[0].tolist() == [bool(k) for k in known]
    assert (low[mask] == cells[mask]).all() and (high[mask] == cells[mask]).all()
    assert (low <= cells).all() and (cells <= high).all()
    assert cells.sum() == pytest.approx(1, abs=1e-12)


def test_known_absent_is_exactly_absent():
    """A type without cells must never be drawn, so 1e-17 is not enough."""
    cells, *_ = fix_known(
        np.array([[0.5, 0.3, 0.2]]), *np.zeros((2, 1, 3)), np.array([[0.1, 0.9]]),
        np.array([0, 1, -1]),
    )  # fmt: skip
    assert cells[0, 2] == 0.0


def test_types_that_the_estimate_gives_nothing_share_evenly():
    estimate = np.array([[1.0, 0.0, 0.0]])
    cells, low, high, known = fix_known(
        estimate, estimate, estimate, np.array([[0.2]]), np.array([0, -1, -1])
    )
    np.testing.assert_allclose(cells, [[0.2, 0.4, 0.4]])
    assert (low <= cells).all() and known[0].tolist() == [True, False, False]


def test_intervals_inside_a_known_lineage_stay_inside_it():
    estimate = np.array([[0.1, 0.1, 0.8]])
    cells, low, high, known = fix_known(
        estimate, estimate - 0.05, estimate + 0.15, np.array([[0.6]]), np.array([0, 0, -1])
    )
    np.testing.assert_allclose(cells, [[0.3, 0.3, 0.4]])
    np.testing.assert_allclose(low, [[0.15, 0.15, 0.4]])
    np.testing.assert_allclose(high, [[0.6, 0.6, 0.4]])  # three times 0.25 is more than all of it
    assert known[0].tolist() == [False, False, True]


def test_composition_of_the_reference_if_the_weights_hold_it():
    even, why = reference_composition({"cell_types": ["a", "b"]})
    assert list(even) == [0.5, 0.5] and "evenly" in why
    share, why = reference_composition({"cell_types": ["a", "b"], "composition": [3.0, 1.0]})
    assert list(share) == [0.75, 0.25] and "reference" in why


# ---------------------------------------------------------------------------------- the file


def test_fractions_and_percentages_say_the_same(tmp_path, capsys):
    fractions = read(tmp_path, HALF)
    assert "fractions of 2 of 3 cell types in 3 samples" in capsys.readouterr().out
    percent = read(tmp_path, HALF * 100)
    assert "percentages of 2 of 3 cell types in 3 samples" in capsys.readouterr().out
    np.testing.assert_allclose(fractions.values, percent.values)
    np.testing.assert_allclose(fractions.values, HALF.to_numpy(float))
    # Of each type its column: the file has T first.
    assert fractions.column.tolist() == percent.column.tolist() == [1, 0, -1]


def test_small_percentages_are_recognised_by_the_others(tmp_path):
    """A patient without B cells has 0.9 %; a rare type is below 1 % in most samples."""
    known = read(tmp_path, pd.DataFrame({B: [5, 0.9, 7]}, ["x", "y", "z"]))
    np.testing.assert_allclose(known.values[:, 0], [0.05, 0.009, 0.07])
    known = read(tmp_path, pd.DataFrame({B: [0.4, 0.9, 1.6]}, ["x", "y", "z"]))
    np.testing.assert_allclose(known.values[:, 0], [0.004, 0.009, 0.016])


def test_rounded_sums_are_normalised(tmp_path, capsys):
    table = pd.DataFrame({B: [33.3, 50], T: [33.3, 25], NK: [33.3, 25]}, ["x", "y"])
    known = read(tmp_path, table)
    np.testing.assert_allclose(known.values, [[1 / 3] * 3, [0.5, 0.25, 0.25]])
    assert "1 rows that do not sum to 100 exactly normalised" in capsys.readouterr().out
    known = read(tmp_path, pd.DataFrame({B: [0.605], T: [0.4]}, ["x"]))  # some types, 1.005
    assert known.values.sum() == pytest.approx(1, abs=1e-12)


def test_spreadsheet_columns_and_blanks(tmp_path):
    known = read(tmp_path, f" sample , {B} ,{T},,\n x , 0.5 ,NA,,\n,,,,\n")
    assert known.samples == ["x"] and known.column.tolist() == [0, 1, -1]
    np.testing.assert_array_equal(known.values, [[0.5, np.nan]])


def test_lineages_of_types(tmp_path, lineages, capsys):
    known = read(tmp_path, "sample,killer,lymph\nx,20,80\ny,5,\n", lineages)
    assert known.column.tolist() == [1, 1, 0]
    assert "percentages of 2 of 2 lineages" in capsys.readouterr().out
    np.testing.assert_allclose(known.values, [[0.2, 0.8], [0.05, np.nan]])


ROW = f"sample,{B},{T},{NK}\n"


@pytest.mark.parametrize(
    "text, words",
    [
        (ROW + "x,0.5,0.4,0.3\n", ["sum of 1.2", "row x", "at most 1"]),
        (ROW + "ok,1,0,0\nx,0.5,0.6,\n", ["sum of 1.1", "row x"]),
        (ROW + "x,50,60,\n", ["sum of 110", "row x", "100"]),
        (ROW + "x,0.5,0.3,0.1\n", ["sum of 0.9", "row x", "expected 1 as all types are given"]),
        (ROW + "x,50,30,10\n", ["sum of 90", "row x", "expected 100 as all types are given"]),
        (ROW + "x,500,300,100\n", ["sum of 900", "row x"]),  # numbers of cells
        (ROW + "x,50,30,20\ny,0.5,0.3,0.2\n", ["row x", "row y", "one unit"]),
        (ROW + "x,50,,\ny,0.4,,\n", ["row x", "row y", "one unit"]),
        (ROW + "x,1.2,,\n", ["sum of 1.2", "row x"]),  # neither
        (ROW + "x,-0.1,0.4,0.3\n", ["'-0.1'", "sample x", B]),
        (ROW + "x,high,0.4,0.3\n", ["'high'", "sample x", B]),
        (ROW + "x,inf,0.4,0.3\n", ["'inf'", "sample x", B]),
        (ROW + "x,1,,\nx,1,,\n", ["samples more than once", "x"]),
        (f"sample,{B},{B}\nx,1,0\n", ["columns more than once", B]),
        ("sample,B cell\nx,1\n", ["B cell", "no cell types of the model", *CELL_TYPES]),
        (ROW, ["0 rows"]),
        ("sample\nx\n", ["0 columns"]),
        ("", ["not a readable table"]),
    ],
)
def test_what_cannot_be_read(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        read(tmp_path, text)
    message = str(error.value)
    assert str(tmp_path / "known.csv") in message and "\n" not in message
    for word in words:
        assert word in message, message


def test_type_names_where_lineages_are_expected(tmp_path, lineages):
    with pytest.raises(InputError, match=re.escape("no lineages of the model; expected some of ")):
        read(tmp_path, f"sample,{B}\nx,1\n", lineages)


def test_samples_that_the_file_lacks_or_has_beyond(capsys):
    known = KnownProportions("k.csv", ["a", "b", "c"], np.arange(3.0)[:, None] / 3, np.zeros(1))
    values = known.of_samples(["c", "new", "a", "new 2"])
    np.testing.assert_allclose(values[:, 0], [2 / 3, np.nan, 0, np.nan])
    out = capsys.readouterr().out
    assert "2 of 4 samples not in it" in out and "1 of its 3 rows are none" in out
    with pytest.raises(InputError, match="found none of the samples"):
        known.of_samples(["new"])


# ---------------------------------------------------------------------------- the whole script


def test_samples_numbered_from_0_and_from_1_are_not_matched(tmp_path):
    """Rows of pandas are numbered from 0, samples without names from 1."""
    table = pd.DataFrame({B: [0.1, 0.2, 0.3]})
    known = read(tmp_path, table)
    with pytest.raises(InputError, match="known.csv: its samples are numbered from 0 on"):
        known.of_samples(["1", "2", "3", "4"])
    np.testing.assert_allclose(known.of_samples(["0", "1", "2", "3"])[:3, 0], [0.1, 0.2, 0.3])
    of_patients = read(tmp_path, table.set_axis([2, 3, 7]))  # numbers of their own
    assert of_patients.of_samples(["1", "2", "3"])[1, 0] == 0.1


def test_known_proportions_reach_table_cells_and_expression(trained, bulk, tmp_path):
    """x is of one type alone; y has a part fixed; z, not in the file, is as without it."""
    table = pd.DataFrame({B: [0, 0.6], T: [1, None], NK: [0, None]}, ["x", "y"])
    known = write(tmp_path / "known.csv", table)
    flags = ["--bulk", bulk, "--n-cells", 200]
    _, before = generate(tmp_path / "before.h5ad", trained, *flags)
    done, cells = generate(tmp_path / "g.h5ad", trained, *flags, "--known-proportions", known)
    assert "1 of 3 samples not in it" in done.stdout and "4 of 9 proportions fixed" in done.stdout
    pi, old = wide(cells, "proportion"), wide(before, "proportion")
    assert pi[0].tolist() == [0, 1, 0] and pi[1, 0] == 0.6
    np.testing.assert_allclose(pi[1, 1:], 0.4 * old[1, 1:] / old[1, 1:].sum())
    np.testing.assert_allclose(pi[2], old[2], atol=1e-6)
    fixed = wide(cells, "known").astype(bool)
    assert fixed.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert "known" not in before.uns["proportions"]
    low, high = wide(cells, "low"), wide(cells, "high")
    assert (low[fixed] == pi[fixed]).all() and (high[fixed] == pi[fixed]).all()
    assert (low[~fixed] < pi[~fixed]).all() and (pi[~fixed] < high[~fixed]).all()

    counts = pd.crosstab(cells.obs["sample"], cells.obs["cell_type"]).reindex(columns=CELL_TYPES)
    assert counts.loc["x"].fillna(0).tolist() == [0, 200, 0]
    assert counts.loc["y", B] == pytest.approx(120, abs=25)
    assert list(cells.uns["fit"].index) == ["x", "y", "z"]
    fit, old_fit = (c.uns["fit"]["correlation"] for c in (cells, before))
    assert fit["x"] < old_fit["x"] - 0.01  # the bulk is not of T cells alone
    assert fit["z"] == pytest.approx(old_fit["z"], abs=1e-5)
    expression = anndata.read_h5ad(tmp_path / "g.expression.h5ad")
    np.testing.assert_allclose(expression.obs["proportion"].to_numpy().reshape(3, 3), pi)


def test_expected_sum_is_that_of_the_known_type(trained, bulk, tmp_path):
    """With all cells of one type and --calibrate uniform, its cells alone add up to the bulk."""
    known = write(tmp_path / "known.csv", pd.DataFrame({NK: [100.0] * 3}, ["x", "y", "z"]))
    flags = ["--bulk", bulk, "--n-cells", 300, "--known-proportions", known]
    flags += ["--calibrate", "uniform"]
    _, cells = generate(tmp_path / "g.h5ad", trained, *flags)
    assert set(cells.obs["cell_type"]) == {NK}
    assert (cells.uns["fit"]["agreement"] > 0.95).all()  # 0.2 without --calibrate


def test_rna_fractions_are_those_of_the_generated_counts(trained, bulk, tmp_path):
    known = write(tmp_path / "known.csv", pd.DataFrame({B: [0.5], T: [0.3], NK: [0.2]}, ["x"]))
    flags = ["--bulk", bulk, "--n-cells", 3000, "--known-proportions", known]
    _, cells = generate(tmp_path / "g.h5ad", trained, *flags)
    of_x = cells[cells.obs["sample"] == "x"]
    total = pd.Series(of_x.X.sum(axis=1).A1).groupby(of_x.obs["cell_type"].to_numpy()).sum()
    share = (total / total.sum())[CELL_TYPES].to_numpy()
    np.testing.assert_allclose(wide(cells, "rna_fraction")[0], share, atol=0.03)
    decoder = Model.load(trained).decoder
    content = decoder.type_means().sum(dim=1).numpy()
    weight = content * [0.5, 0.3, 0.2]
    np.testing.assert_allclose(wide(cells, "rna_fraction")[0], weight / weight.sum(), atol=0.01)


def test_lineages_are_split_as_estimated(trained, bulk, tmp_path, lineages):
    known = write(tmp_path / "known.csv", "sample,lymph,killer\nx,80,20\ny,,10\nz,100,0\n")
    flags = ["--bulk", bulk, "--n-cells", 50]
    _, before = generate(tmp_path / "before.h5ad", trained, *flags)
    flags += ["--known-proportions", known, "--lineages", lineages]
    done, cells = generate(tmp_path / "g.h5ad", trained, *flags)
    assert "3 of 9 proportions fixed, 4 more share a known lineage" in done.stdout
    pi, old = wide(cells, "proportion"), wide(before, "proportion")
    np.testing.assert_allclose(pi[:, 2], [0.2, 0.1, 0])
    np.testing.assert_allclose(pi[:, 0] / pi[:, 1], old[:, 0] / old[:, 1])
    np.testing.assert_allclose(pi.sum(axis=1), 1)
    assert not (cells.obs.loc[cells.obs["sample"] == "z", "cell_type"] == NK).any()


def copy_weights(trained, folder, composition=None):
    """Weights that hold this composition of the reference, None for none as older ones."""
    folder.mkdir()
    for name in ("scDecoder", "bulkEncoder"):
        card = torch.load(trained / f"{name}_model.pt", weights_only=True)
        card.pop("composition", None)
        if composition is not None:
            card["composition"] = composition
        torch.save(card, folder / f"{name}_model.pt")
    return folder


def test_mixtures_without_bulk_or_reference(trained, tmp_path):
    """--data does not even exist. What is not given is shared evenly, and this is said."""
    weights = copy_weights(trained, tmp_path / "w")
    known = write(tmp_path / "known.csv", pd.DataFrame({T: [0.5, 1, None]}, ["a", "b", "c"]))
    out = tmp_path / "m" / "g.h5ad"
    flags = ["--known-proportions", known, "--n-cells", 400, "--data", tmp_path / "nowhere"]
    done, cells = generate(out, weights, *flags)
    assert "in 2 of them what is not given is shared evenly" in done.stdout
    np.testing.assert_allclose(
        wide(cells, "proportion"), [[0.25, 0.5, 0.25], [0, 1, 0], [1 / 3] * 3]
    )
    assert list(cells.obs["sample"]) == [*"a" * 400, *"b" * 400, *"c" * 400]
    counts = pd.crosstab(cells.obs["sample"], cells.obs["cell_type"])[CELL_TYPES]
    assert counts.loc["b"].tolist() == [0, 400, 0]
    assert counts.loc["a", T] == pytest.approx(200, abs=40)
    low = wide(cells, "low")
    assert low[1].tolist() == [0, 1, 0] and low[0, 1] == 0.5 and np.isnan(low[2]).all()
    names = {"g.h5ad", "g.proportions.csv", "g.proportions.png"}
    assert {path.name for path in out.parent.iterdir()} == names and "fit" not in cells.uns


def test_mixtures_are_the_types_own_cells(trained, tmp_path):
    """z has the moments of the mixture, and the weights' composition fills what is not given."""
    weights = copy_weights(trained, tmp_path / "w", [0.75, 0.25, 0.0])
    known = write(tmp_path / "known.csv", pd.DataFrame({NK: [0.2]}, ["a"]))
    flags = ["--known-proportions", known, "--n-cells", 4000]
    done, cells = generate(tmp_path / "g.h5ad", weights, *flags)
    assert "in the ratio of the reference's cells" in done.stdout
    np.testing.assert_allclose(wide(cells, "proportion"), [[0.6, 0.2, 0.2]])
    decoder = Model.load(trained).decoder
    z = cells.obsm["X_latent"][(cells.obs["cell_type"] == B).to_numpy()]
    mu, sd = decoder.mu[0].numpy(), decoder.var[0].sqrt().numpy()
    np.testing.assert_allclose((z.mean(axis=0) - mu) / sd, 0, atol=0.1)


@pytest.mark.parametrize("composition", [[0.5], [0.5, -0.1, 0.6], [0.0, 0.0, 0.0], "abc", [1, 1]])
def test_weights_with_another_composition_are_refused(trained, tmp_path, composition):
    weights = copy_weights(trained, tmp_path / "w", composition)
    known = write(tmp_path / "known.csv", pd.DataFrame({NK: [0.2]}, ["a"]))
    done = run_inside("bulk2sc.py", "--weights", weights, "--known-proportions", known)
    assert_one_line_error(done, "bulkEncoder_model.pt", "composition")


def test_errors_come_before_anything_is_written(trained, bulk, tmp_path):
    known = write(tmp_path / "known.csv", pd.DataFrame({B: [0.5]}, ["q"]))
    out = tmp_path / "out" / "g.h5ad"
    flags = ["--weights", trained, "--out", out, "--n-cells", 5]
    done = run_inside("bulk2sc.py", *flags, "--bulk", bulk, "--known-proportions", known)
    assert_one_line_error(done, known, "x, y, z", "q")
    done = run_inside("bulk2sc.py", *flags, "--known-proportions", tmp_path / "none.csv")
    assert_one_line_error(done, "none.csv", "no such file")
    done = run_inside("bulk2sc.py", *flags, "--lineages", known)
    assert_one_line_error(done, "--lineages", "--known-proportions")
    assert not out.parent.exists()


@pytest.mark.parametrize("name", ["g.h5ad", "g.proportions.csv", "g.fit.csv", "g.expression.h5ad"])
@pytest.mark.parametrize("flag", ["--bulk", "--known-proportions", "--data"])
def test_an_output_never_replaces_an_input(tmp_path, name, flag):
    (tmp_path / name).write_text("precious")
    (tmp_path / "link").symlink_to(name)
    for given in (name, "link"):
        done = run_inside("bulk2sc.py", "--out", tmp_path / "g.h5ad", flag, tmp_path / given)
        assert_one_line_error(done, "--out", tmp_path / given)
    assert (tmp_path / name).read_text() == "precious"


def test_shipped_truth_is_a_table_of_known_proportions(capsys):
    """examples/README.md gives it to --known-proportions."""
    path = ROOT / "examples" / "bulk_pbmc_simulated_proportions.csv"
    types = list(pd.read_csv(path, index_col=0))
    known = read_proportions(path, types)
    np.testing.assert_allclose(known.values, pd.read_csv(path, index_col=0))
    assert "fractions of 8 of 8 cell types in 4 samples" in capsys.readouterr().out


# --------------------------------------------------------------------------------- the picture


@pytest.mark.draws
@pytest.mark.parametrize("n", [1, 4, 5, 60, 61])
def test_picture_shows_every_proportion_and_its_interval(tmp_path, monkeypatch, n):
    """Widths of the bars, points and lines as drawn; names may hold TeX markup."""
    figures = []
    monkeypatch.setattr(
        proportion_plots, "write_whole_figure",
        lambda path, figure, **_: (figure.savefig(path), figures.append(figure)),
    )  # fmt: skip
    types = ["a", "_b", "c$d$", "T cells $x^$"]
    pi = np.random.default_rng(0).dirichlet(np.ones(4), n)
    known = np.zeros((n, 4), bool)
    known[:, 1] = True
    low, high = np.where(known, pi, pi - 0.01), np.where(known, pi, pi + 0.02)
    names = [f"$s^{i}" for i in range(n)]
    write_proportions(tmp_path / "p.png", Proportions(names, types, pi, low, high, pi, known))
    [figure] = figures
    bars, *panels = figure.axes
    colors = list(type_colors(types).values())
    if n <= 60:
        widths = np.array([bar.get_width() for bar in bars.patches]).reshape(4, n).T
        np.testing.assert_allclose(widths, pi)
    assert len(panels) == (n if n <= 4 else 4)
    for i, axis in enumerate(panels):
        part = (i, slice(None)) if n <= 4 else (slice(None), i)
        lines = [path.vertices[:, 0] for path in axis.collections[0].get_paths()]
        ends = np.stack([low[part], high[part]], axis=1)
        ends[known[part]] = np.nan  # a known value has no interval
        np.testing.assert_allclose(np.array(lines).reshape(-1, 2), ends)
        circles, diamonds = axis.collections[-2:]
        for points, shown in ((circles, ~known[part]), (diamonds, known[part])):
            assert sorted(points.get_offsets()[:, 0]) == pytest.approx(sorted(pi[part][shown]))
        assert axis.get_xlim()[1] >= np.nanmax(high[part])
    if n <= 4:
        faces = panels[0].collections[-1].get_facecolors()
        assert faces[0].tolist() == pytest.approx([*to_rgb(colors[1]), 1])
