"""Minutes of training on real data, excluded by default: ``python -m pytest -m slow``."""

import pandas as pd
import pytest

from conftest import ROOT, TINY, run

pytestmark = pytest.mark.slow


def evaluate(weights, *arguments):
    run("evaluate.py", "--weights", weights, "--out", weights, *arguments)
    return metrics_of(weights)


def metrics_of(weights):
    """Metrics of the generated cells, all cell types together."""
    table = pd.read_csv(weights / "evaluation.csv")
    table = table[(table["method"] == "bulk2sc") & table["cell_type"].isna()]
    return table.set_index("metric")["mean"]


def test_trainings_reproduce_the_shipped_weights(tmp_path):
    """Two minutes. Processors round differently, and training amplifies the difference."""
    for script in TINY:
        run(script, "--weights", tmp_path)
    for name in ("scGMVAE", "scDecoder", "bulkEncoder"):
        shipped, retrained = (
            pd.read_csv(folder / f"{name}_loss.csv").iloc[-1]
            for folder in (ROOT / "weights", tmp_path)
        )
        for column in shipped.index.intersection(
            ["reconstruction", "held_out_reconstruction", "kl", "held_out_pi"]
        ):
            assert retrained[column] == pytest.approx(shipped[column], rel=0.05), (name, column)
    shipped, retrained = metrics_of(ROOT / "weights"), evaluate(tmp_path)
    assert set(shipped.index) == set(retrained.index)
    # All other metrics are within 0 and 1.
    bounded = shipped.index.drop(["energy distance", "marker mean error"])
    assert (retrained - shipped)[bounded].abs().max() < 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pbmc1k_figures(tmp_path, seed):
    """Five minutes a seed, half of the cells held out."""
    data = ROOT.parent / "shared/data/pbmc1k_v3"
    if not data.is_dir():
        pytest.skip("PBMC 1K is not available (../shared/data/pbmc1k_v3)")
    flags = ["--data", data, "--seed", seed]
    run("train_gmvae.py", *flags, "--weights", tmp_path, "--held-out", 0.5)
    run("train_decoder.py", *flags, "--weights", tmp_path)
    run("train_encoder.py", *flags, "--weights", tmp_path)
    metrics = evaluate(tmp_path, *flags)
    assert 0.5 < metrics["within-type variance ratio"] < 1.5
    assert metrics["random-forest AUROC, PCs"] < 0.78
    assert metrics["random-forest AUROC, genes"] < 0.78
    assert metrics["MMD2, PCs"] < 0.005
    assert metrics["zero-fraction error"] < 0.017
    assert abs(metrics["nearest neighbour trained on, excess"]) < 0.1
    assert metrics["library-size KS"] < 0.15
    assert metrics["proportions RMSE"] < 0.045
