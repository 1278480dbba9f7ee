"""The smallest and largest inputs: each trains and generates, or ends in a one-line error."""

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from conftest import QUICK, assert_one_line_error, make_cells, run_inside, train


def generate(folder, *flags):
    """Generate twenty cells from the weights in ``folder``. Returns the finished process."""
    return run_inside(
        *("bulk2sc.py", "--weights", folder / "weights", "--out", folder / "generated.h5ad"),
        *("--n-cells", 20, *flags),
    )


def train_and_generate(folder, cells, *flags):
    """Run the three trainings on these cells, then generate twenty cells and check them."""
    cells.write_h5ad(folder / "cells.h5ad")
    paths = ["--data", folder / "cells.h5ad", "--weights", folder / "weights"]
    train(*paths, *flags, settings=QUICK)
    done = generate(folder, "--data", folder / "cells.h5ad", "--batch-size", 1)
    assert done.returncode == 0, done.stderr
    generated = anndata.read_h5ad(folder / "generated.h5ad")
    assert generated.shape == (20, cells.n_vars) and generated.X.dtype == np.int32
    assert (generated.X.data > 0).all() and np.isfinite(generated.obsm["X_latent"]).all()
    table = generated.uns["proportions"]
    sums = table.groupby("sample", observed=True)[["proportion", "rna_fraction"]].sum()
    np.testing.assert_allclose(sums, 1, rtol=1e-5)
    return generated, done


@pytest.mark.parametrize(
    "n_per_type",
    [(60,), (40, 30, 1), (1,), (1, 1), (1,) * 12],
    ids=["one type", "a type with one cell", "one cell", "two cells", "each cell its own type"],
)
def test_few_cells_or_types(tmp_path, n_per_type):
    cells = make_cells(n_per_type)
    generated, _ = train_and_generate(tmp_path, cells)
    assert set(generated.obs["cell_type"]) <= set(cells.obs["cell_type"])


def test_one_gene(tmp_path):
    train_and_generate(tmp_path, make_cells()[:, :1].copy())


def test_nearly_all_cells_held_out(tmp_path):
    train_and_generate(tmp_path, make_cells(), "--held-out", 0.99)


def test_cells_and_genes_without_counts(tmp_path, capsys):
    cells = make_cells()
    X = cells.X.toarray()
    X[:10], X[:, 5:9] = 0, 0
    cells.X = sp.csr_matrix(X)
    generated, done = train_and_generate(tmp_path, cells)
    assert "10 cells without a single count left out" in done.stdout
    assert generated.X[:, 5:9].mean() < 0.05


def test_the_largest_counts_there_are(tmp_path):
    """2^31 - 1 is accepted as a count; 2^31 is an error that names cell and gene."""
    cells = make_cells()
    X = cells.X.toarray().astype(np.int64)
    X[3, 3] = X[4, 4] = X[4, 5] = 2**31 - 1  # one cell with nearly 2^32 counts
    cells.X = X
    cells.write_h5ad(tmp_path / "cells.h5ad")
    paths = ["--data", tmp_path / "cells.h5ad", "--weights", tmp_path / "weights"]
    train(*paths, settings=QUICK)
    X[3, 3] += 1
    cells.write_h5ad(tmp_path / "cells.h5ad")
    done = run_inside("train_gmvae.py", *paths)
    assert_one_line_error(done, "2147483648", cells.obs_names[3], "GENE3", "over 2147483647")


@pytest.mark.parametrize(
    "values",
    [{7: 1e6}, {7: 1e15, 8: 1e-300}, {i: 1e-5 for i in range(60)}, {7: 1e-6}],
    ids=["one gene", "all but one nearly nothing", "small numbers", "hardly anything"],
)
def test_odd_bulks(tmp_path, trained, values):
    (tmp_path / "weights").symlink_to(trained)
    lines = ["gene,s", *(f"GENE{i},{values.get(i, 0)}" for i in range(60))]
    (tmp_path / "bulk.csv").write_text("\n".join(lines))
    done = generate(tmp_path, "--bulk", tmp_path / "bulk.csv", "--calibrate", "uniform")
    assert done.returncode == 0, done.stderr
    generated = anndata.read_h5ad(tmp_path / "generated.h5ad")
    values = generated.uns["proportions"].select_dtypes("number")
    assert generated.n_obs == 20 and np.isfinite(values).all(axis=None)


@pytest.mark.parametrize("value, words", [("1e-300", "empty"), ("1e16", "1e15"), ("inf", "inf")])
def test_bulks_beyond_measure(tmp_path, trained, value, words):
    (tmp_path / "weights").symlink_to(trained)
    lines = ["gene,s", *(f"GENE{i},{value}" for i in range(60))]
    (tmp_path / "bulk.csv").write_text("\n".join(lines))
    done = generate(tmp_path, "--bulk", tmp_path / "bulk.csv")
    assert_one_line_error(done, "bulk.csv", words)


@pytest.mark.parametrize("n", [0, 1])
def test_no_cell_and_one_cell_of_a_bulk(tmp_path, trained, n):
    (tmp_path / "weights").symlink_to(trained)
    lines = ["gene,a,b", *(f"GENE{i},{i},{60 - i}" for i in range(60))]
    (tmp_path / "bulk.csv").write_text("\n".join(lines))
    done = generate(tmp_path, "--bulk", tmp_path / "bulk.csv", "--n-cells", n)
    assert done.returncode == 0, done.stderr
    generated = anndata.read_h5ad(tmp_path / "generated.h5ad")
    assert generated.n_obs == 2 * n and list(generated.obs["sample"]) == ["a", "b"] * n


def test_more_components_than_cells(tmp_path):
    cells = make_cells((3, 2, 2))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    paths = ["--data", tmp_path / "cells.h5ad", "--weights", tmp_path / "weights"]
    done = run_inside("train_gmvae.py", *paths, *QUICK["train_gmvae.py"], "--n-types", 50)
    assert done.returncode == 1
    assert "--n-types: found 50, expected at most" in done.stderr.strip().splitlines()[-1]


def test_types_in_weights_that_the_data_lacks(tmp_path, trained):
    """Generation needs no labels; stage 3 and evaluate.py refuse the mismatch in one line."""
    (tmp_path / "weights").symlink_to(trained)
    cells = make_cells()
    cells = cells[cells.obs["cell_type"] == "B cells"].copy()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    done = generate(tmp_path, "--data", tmp_path / "cells.h5ad", "--batch-size", 5)
    assert done.returncode == 0, done.stderr
    for script in ("train_encoder.py", "evaluate.py"):
        done = run_inside(script, "--data", tmp_path / "cells.h5ad", "--weights", trained)
        assert_one_line_error(done, "expected")
