"""The functions of api.py give what the scripts give."""

import anndata
import numpy as np
import pandas as pd
import pytest

import api
from conftest import CELL_TYPES, make_cells, refused, run_inside
from generation import CellSource
from readers.bulk_options import BulkOptions
from runtime.errors import InputError


@pytest.fixture
def bulk(tmp_path):
    """Two bulks (samples x genes) and the same as a file."""
    X = make_cells().X
    table = {"a": X[:40].sum(axis=0).A1, "b": X[40:].sum(axis=0).A1}
    table = pd.DataFrame(table, index=[f"GENE{i}" for i in range(60)]).T
    table.T.to_csv(tmp_path / "bulk.csv")
    return table, tmp_path / "bulk.csv"


def test_functions_give_what_the_script_gives(trained, bulk, tmp_path):
    """From a file, a DataFrame and an AnnData alike, with the same seed."""
    table, path = bulk
    out = tmp_path / "g.h5ad"
    done = run_inside("bulk2sc.py", "--weights", trained, "--bulk", path, "--n-cells", 25,
                      "--seed", 4, "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = anndata.read_h5ad(out)
    model = api.load(trained, "cpu")
    adata = anndata.AnnData(table.to_numpy(np.float32), None, pd.DataFrame(index=table.columns))
    adata.obs_names = table.index
    for given in (path, table, adata):
        samples = api.deconvolve(given, model)
        cells = api.generate(samples, model, n_cells=25, seed=4)
        assert (cells.X != expected.X).nnz == 0
        assert list(cells.obs["cell_type"]) == list(expected.obs["cell_type"])
        np.testing.assert_allclose(cells.obsm["X_latent"], expected.obsm["X_latent"])
        columns = ["proportion", "low", "high", "rna_fraction"]
        ours, theirs = (c.uns["proportions"][columns] for c in (cells, expected))
        np.testing.assert_allclose(ours, theirs)
        np.testing.assert_allclose(samples.fit["agreement"], expected.uns["fit"]["agreement"])
    cells.write_h5ad(tmp_path / "again.h5ad")
    assert anndata.read_h5ad(tmp_path / "again.h5ad").obs_names.is_unique


def test_generation_again_does_not_change_the_fit(trained, bulk):
    """Sums of the cells are of one generation."""
    model = api.load(trained, "cpu")
    samples = api.deconvolve(bulk[0], model)
    first = api.generate(samples, model, n_cells=30)
    fit = samples.fit["agreement"].copy()
    second = api.generate(samples, model, n_cells=30)
    assert (first.X != second.X).nnz == 0 and list(first.obs_names) == list(second.obs_names)
    pd.testing.assert_series_equal(samples.fit["agreement"], fit)
    third = api.generate(samples, model, n_cells=30, seed=1)
    assert not set(first.obs_names) & set(third.obs_names)


def test_no_cells_have_all_genes(trained, bulk):
    model = api.load(trained, "cpu")
    cells = api.generate(api.deconvolve(bulk[0], model), model, n_cells=0)
    assert cells.shape == (0, 60) and "gene_ids" in cells.var


def test_mixtures_need_no_bulk(trained):
    model = api.load(trained, "cpu")
    table = pd.DataFrame(np.eye(3), index=["x", "y", "z"], columns=CELL_TYPES)
    cells = api.generate(api.mixtures(table, model), model, n_cells=5)
    assert list(cells.obs["cell_type"]) == list(np.repeat(CELL_TYPES, 5))
    assert list(cells.obs["sample"]) == list(np.repeat(["x", "y", "z"], 5))


def test_known_proportions_take_the_place_of_estimates(trained, bulk):
    model = api.load(trained, "cpu")
    known = pd.DataFrame({CELL_TYPES[1]: [0.5]}, index=["b"])
    table = api.deconvolve(bulk[0], model, proportions=known).proportions.to_table()
    row = table[(table["sample"] == "b") & (table["cell_type"] == CELL_TYPES[1])].iloc[0]
    assert row["known"] and row["proportion"] == pytest.approx(0.5)


def test_training_from_anndata_gives_models(tmp_path):
    cells = make_cells()
    settings = {"n_genes": 40, "device": "cpu", "held_out": 0.2}
    model = api.train(cells, tmp_path / "w", epochs=2, **settings)
    assert model.cell_types == CELL_TYPES
    assert model.genes == list(cells.var_names)
    assert (tmp_path / "w" / "bulkEncoder_model.pt").is_file()
    made = api.generate(api.mixtures(pd.DataFrame({CELL_TYPES[0]: [1.0]}), model), model, 4)
    assert made.n_obs == 4 and set(made.obs["cell_type"]) == {CELL_TYPES[0]}


def test_errors_are_one_line_that_names_what_was_found(trained, bulk, tmp_path):
    model = api.load(trained, "cpu")
    table = bulk[0]
    wrong = {
        "-1": table - table.iloc[0, 0] - 1,
        "known": table.rename(columns=lambda name: f"x{name}"),
        "more than once": table.set_axis(["a", "a"], axis=0),
    }
    for words, given in wrong.items():
        with pytest.raises(InputError, match=words) as error:
            api.deconvolve(given, model)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="expected one for each of 3"):
        api.train(make_cells(), tmp_path, epochs=(1, 2))
    with pytest.raises(InputError, match="no such file"):
        api.load(tmp_path / "none")
    refused(lambda: api.load("README.md"), "README.md: found a file, expected a folder of weights")
    refused(lambda: api.Model.load(3), "folder: found 3, expected a folder of weights")
    refused(lambda: api.Model.load("weights/pbmc1k", "abacus"), "device abacus: not available")
    refused(lambda: api.Model.load("weights/pbmc1k", 3.5), "device: found 3.5, expected auto")
    refused(lambda: model.save(None), "folder: found None, expected a folder to write to")


def test_shipped_weights_are_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert api.load("weights/pbmc1k", "cpu").genes
    (tmp_path / "weights").mkdir()
    with pytest.raises(InputError, match="no such file"):  # a folder of one's own comes first
        api.load("weights", "cpu")


def test_a_series_is_one_sample(trained, bulk):
    model = api.load(trained, "cpu")
    both = api.deconvolve(bulk[0].loc[["a"]], model)
    one = api.deconvolve(bulk[0].loc["a"], model)
    assert one.names == ["a"]
    np.testing.assert_array_equal(one.proportions.cells, both.proportions.cells)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {"bulk": t.to_numpy()}, ["bulk: found ndarray of 2 x 60", "DataFrame"]),
        (lambda t: {"bulk": {"a": 1}}, ["bulk: found dict"]),
        (lambda t: {"bulk": None}, ["bulk: found None"]),
        (lambda t: {"bulk": []}, ["bulk: found list"]),
        (
            lambda t: {"bulk": t.set_axis(pd.MultiIndex.from_product([["x"], t.columns]), axis=1)},
            ["bulk: found names of genes in 2 levels (MultiIndex)"],
        ),
        (
            lambda t: {"bulk": t.set_axis(pd.MultiIndex.from_product([["x"], t.index]), axis=0)},
            ["bulk: found names of samples in 2 levels"],
        ),
        (lambda t: {"model": "weights"}, ["model: found 'weights', expected what load() gives"]),
        (lambda t: {"options": {"log": "2"}}, ["options: found dict, expected BulkOptions"]),
        (lambda t: {"calibrate": "typse"}, ["calibrate: found 'typse', expected auto, none"]),
        (lambda t: {"mrna_content": 1}, ["mrna_content: found 1"]),
        (lambda t: {"platform": "gone"}, ["platform: found 'gone'"]),
        (lambda t: {"platform": "remove"}, ["platform: found remove with calibrate auto"]),
        (lambda t: {"proportions": [0.5]}, ["proportions: found list"]),
        (lambda t: {"proportions": pd.Series([0.5])}, ["proportions: found Series of 1"]),
        (lambda t: {"options": BulkOptions(columns=("z",))}, ["columns z: found 0 columns"]),
    ],
)
def test_wrong_arguments_of_deconvolve_are_named(trained, bulk, change, words):
    given = {"bulk": bulk[0], "model": api.load(trained, "cpu")}
    refused(lambda: api.deconvolve(**(given | change(bulk[0]))), *words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n_cells": -1}, ["n_cells: found -1, expected an integer, 0 or more"]),
        ({"n_cells": 10.0}, ["n_cells: found 10.0"]),
        ({"n_cells": True}, ["n_cells: found True"]),
        ({"n_cells": "5"}, ["n_cells: found '5'"]),
        ({"n_cells": None}, ["n_cells: found None"]),
        ({"cells_per_type": 0}, ["cells_per_type: found 0, expected an integer, 1 or more"]),
        ({"seed": -1}, ["seed: found -1, expected an integer, 0 to 4294967295"]),
        ({"source": pd.DataFrame()}, ["source: found DataFrame of 0 x 0", "deconvolve()"]),
        ({"out": 3}, ["out: found 3, expected a path"]),
        ({"out": "cells.csv"}, ["out: found cells.csv", ".h5ad or .h5"]),
        ({"run": "x"}, ["run: found 'x', expected a dict with name, settings, provenance"]),
        ({"run": {"name": "x"}}, ["run: found no settings, provenance"]),
        ({"metadata": [1]}, ["metadata: found list, expected a DataFrame"]),
        (
            {"metadata": pd.DataFrame({"a": [1, 2]})},
            ["metadata: found 2 rows", "of 1 samp"],
        ),
        ({"shown": 3}, ["shown: found 3, expected plots.report.ShownCells"]),
    ],
)
def test_wrong_arguments_of_generate_are_named(trained, given, words):
    model = api.load(trained, "cpu")
    source = api.mixtures(pd.DataFrame({CELL_TYPES[0]: [1.0]}), model)
    refused(lambda: api.generate(**({"source": source, "model": model} | given)), *words)
    own = pd.DataFrame({"cell_type": ["x"]})  # a column of its own is not written over
    cells = api.generate(source, model, np.int64(2), metadata=own)
    assert list(cells.obs["cell_type"]) == [CELL_TYPES[0]] * 2
    assert list(cells.obs["bulk_cell_type"]) == ["x"] * 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cells": pd.DataFrame()}, ["cells: found DataFrame of 0 x 0, expected AnnData"]),
        ({"labels": pd.Series(["B"])}, ["labels: found Series of 1"]),
        ({"epochs": 0}, ["epochs: found 0, expected an integer, 1 or more"]),
        ({"epochs": (1, 2.5, 1)}, ["epochs: found 2.5"]),
        ({"heldout": 0.1}, ["heldout: unknown, expected settings such as", "held_out"]),
        ({"held_out": 2}, ["held_out: found 2, expected 0 or more, below 1"]),
        ({"n_genes": -5}, ["n_genes: found -5"]),
        ({"cells": "nowhere"}, ["cells: found nowhere, which is not there"]),
        ({"labels": "nothing"}, ["labels nothing: neither a file nor a column of .obs"]),
    ],
)
def test_wrong_arguments_of_train_are_named(tmp_path, given, words):
    settings = {"cells": make_cells(), "weights": tmp_path / "w", "device": "cpu"} | given
    refused(lambda: api.train(**settings), *words)
    assert not (tmp_path / "w").exists()


def test_mixtures_of_another_model_are_refused(trained):
    model, other = api.load(trained, "cpu"), api.load("weights/pbmc1k", "cpu")
    source = api.mixtures(pd.DataFrame({CELL_TYPES[0]: [1.0]}), model)
    refused(lambda: api.generate(source, other, 3), "source: made for 3 cell types", "same model")
    refused(lambda: api.mixtures(None, model), "proportions: found None, expected a DataFrame")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("n_genes", 1.5, "an integer"),  # trained on one gene
        ("held_out", "x", "a number or None"),
        ("seed", None, "an integer"),
        ("samples", ["a"], "text or None"),
        ("resume", 1, "True or False"),
    ],
)
def test_settings_of_another_type(name, value, expected, tmp_path):
    given = {name: value}
    refused(lambda: api.train("none", tmp_path, **given), f"{name}: found ", f"expected {expected}")


def test_what_functions_give_is_shown_in_a_line(trained, bulk):
    model = api.load(trained, "cpu")
    samples = api.deconvolve(bulk[0], model)
    assert repr(model) == f"Model of 3 cell types ({', '.join(CELL_TYPES)}) x 60 genes"
    assert repr(samples) == "2 bulk samples (a, b) of 3 cell types, 60 genes"
    assert repr(CellSource.of_samples(samples)) == "2 bulks or mixtures to generate (a, b)"
    assert repr(samples.proportions) == "Proportions of 3 cell types in 2 samples"
    refused(lambda: api.load(None), "weights: found None")
