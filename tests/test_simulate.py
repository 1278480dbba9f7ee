"""Simulated bulks have the fractions they say, and no cell that the reference has as well."""

import anndata
import numpy as np
import pandas as pd
import pytest

import simulate_bulks
from conftest import CELL_TYPES, assert_one_line_error, make_cells, run_inside


@pytest.fixture
def simulate(h5ad, tmp_path):
    def run(*flags):
        done = run_inside("simulate_bulks.py", "--data", h5ad, "--out", tmp_path / "s", *flags)
        assert done.returncode == 0, done.stderr
        bulk = pd.read_csv(tmp_path / "s.bulk.csv", index_col="gene")
        fractions = pd.read_csv(tmp_path / "s.fractions.csv", index_col="sample")
        return bulk, fractions, anndata.read_h5ad(tmp_path / "s.reference.h5ad"), done

    return run


def test_bulks_are_sums_of_cells_in_the_fractions_that_are_written(simulate):
    bulk, fractions, reference, done = simulate("--n-bulks", 5, "--cells-per-bulk", 200)
    assert bulk.shape == (60, 5) and (bulk.to_numpy() == np.rint(bulk)).all(axis=None)
    assert list(bulk.columns) == list(fractions.index) and list(fractions) == CELL_TYPES
    np.testing.assert_allclose(fractions.sum(axis=1), 1, atol=1e-5)
    assert ((fractions * 200).round(3) % 1 == 0).all(axis=None)  # of cells drawn, not expected
    cells = make_cells()
    others = cells[~cells.obs_names.isin(reference.obs_names)]
    of_type = [
        np.asarray(others[others.obs["cell_type"] == name].X.mean(axis=0)).ravel()
        for name in CELL_TYPES
    ]
    expected = 200 * fractions.to_numpy() @ np.stack(of_type)
    assert np.corrcoef(expected.ravel(), bulk.to_numpy().T.ravel())[0, 1] > 0.99
    assert f"{reference.n_obs:,} other cells" in done.stdout


def test_missing_types_are_in_the_bulks_and_not_in_the_reference(simulate):
    _, fractions, reference, done = simulate("--missing", CELL_TYPES[1], "--concentration", 5)
    assert CELL_TYPES[1] not in set(reference.obs["cell_type"])
    assert list(reference.obs["cell_type"].cat.categories) == [CELL_TYPES[0], CELL_TYPES[2]]
    assert (fractions[CELL_TYPES[1]] > 0).all() and f"without {CELL_TYPES[1]}" in done.stdout


def test_noise_is_of_genes_and_the_same_in_all_bulks():
    rng = np.random.default_rng(0)
    bulk = rng.uniform(1e5, 2e5, (30, 400))
    measured = simulate_bulks.measure(bulk, 0.5, rng)
    factor = np.log(measured / bulk)
    assert factor.mean(axis=0).std() == pytest.approx(0.5, abs=0.06)
    assert factor.std(axis=0).max() < 0.05
    np.testing.assert_allclose(measured.sum(axis=1), bulk.sum(axis=1), rtol=0.01)
    assert (simulate_bulks.measure(bulk, 0.0, rng) == np.rint(bulk)).all()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--missing", "Neutrophils"], ["--missing: found Neutrophils", CELL_TYPES[0]]),
        (["--missing", *CELL_TYPES[:2]], ["found 2 types", "two or more"]),
        (["--n-bulks", 0], ["--n-bulks: found 0"]),
        (["--noise", -1], ["--noise: found -1.0"]),
        (["--concentration", 0], ["--concentration: found 0.0"]),
        (["--device", "cpu"], ["--device: no longer a flag (always cpu)"]),
    ],
)
def test_wrong_settings_are_one_line(h5ad, tmp_path, flags, words):
    out = tmp_path / "out" / "s"
    done = run_inside("simulate_bulks.py", "--data", h5ad, "--out", out, *flags)
    assert_one_line_error(done, *words)
    assert not out.parent.exists()


def test_input_is_not_written_over(tmp_path):
    make_cells().write_h5ad(tmp_path / "s.reference.h5ad")
    flags = ["--data", tmp_path / "s.reference.h5ad", "--out", tmp_path / "s"]
    assert_one_line_error(run_inside("simulate_bulks.py", *flags), "over the input")
