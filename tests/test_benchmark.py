"""The benchmark at a small size, and its held-out likelihood."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from benchmarks import benchmark
from conftest import QUICK, make_cells, run_inside, train
from data import Reference


@pytest.mark.draws
def test_table_and_picture(tmp_path, monkeypatch):
    """One measurement in a process of its own, as all are without this test."""
    apart = benchmark.measure

    def measure(cfg, kind, n_genes, n_cells):
        if (kind, n_cells) == ("published loop", 20):
            return apart(cfg, kind, n_genes, n_cells)
        return benchmark.GENERATION[kind](n_genes, n_cells), 0.1

    monkeypatch.setattr(benchmark, "measure", measure)
    sizes = ["--n-genes", 50, "--n-cells", 20, 40, "--rounds", 1]
    done = run_inside("benchmarks/benchmark.py", *sizes, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "benchmark.csv")
    kinds = [kind for kind in benchmark.GENERATION if kind != "scVI decoder"]
    assert set(table["what"]) >= set(kinds) and set(table["cells"]) == {20, 40}
    assert (table[["seconds", "peak GB", "cells/s"]] > 0).all(axis=None)
    assert (table["cells"] / table["seconds"]).to_numpy() == pytest.approx(table["cells/s"])
    assert "times the published loop" in done.stdout and (tmp_path / "benchmark.png").exists()


def test_slope_of_known_times():
    cells = np.array([1000, 10_000, 100_000])
    table = pd.DataFrame({"what": "bulk2sc, in memory", "cells": cells, "seconds": 3e-5 * cells})
    assert benchmark.slope(table) == pytest.approx(1)
    table["seconds"] = table["seconds"] ** 2
    assert benchmark.slope(table) == pytest.approx(2)


def test_held_out_likelihood_knows_types_and_genes(tmp_path):
    """The bound is higher than for wrong cell types and for permuted genes."""
    cells = make_cells((80, 70, 60))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    settings = QUICK | {"train_encoder.py": ["--steps", 1]}
    settings["train_gmvae.py"] = [*QUICK["train_gmvae.py"], "--epochs", 16]
    train("--data", tmp_path / "cells.h5ad", "--weights", tmp_path, settings=settings)
    training, held_out = benchmark.reference(str(tmp_path / "cells.h5ad"), None)
    elbo = benchmark.our_elbo(tmp_path, training, held_out)
    held_out = held_out.cells
    assert held_out.n_obs == 42 and not set(held_out.obs_names) & set(training.cells.obs_names)
    renamed, permuted = held_out.copy(), held_out.copy()
    types = held_out.obs["cell_type"].cat
    renamed.obs["cell_type"] = pd.Categorical.from_codes((types.codes + 1) % 3, types.categories)
    permuted.X = held_out.X[:, np.random.default_rng(0).permutation(held_out.n_vars)]
    others = (Reference.of(cells) for cells in (renamed, permuted))
    wrong = [benchmark.our_elbo(tmp_path, training, cells) for cells in others]
    assert elbo > wrong[0] + 5 and elbo > wrong[1] + 20
    # A Poisson with the mean profile, without types and dispersions, scores lower.
    profile = np.asarray(training.X.sum(axis=0)).ravel() + 0.5
    x = held_out.X.toarray()
    mean = x.sum(axis=1, keepdims=True) * profile / profile.sum()
    assert elbo > scipy.stats.poisson.logpmf(x, mean).sum(axis=1).mean()
