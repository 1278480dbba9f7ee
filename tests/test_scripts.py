"""The real scripts: the whole pipeline, regressions of the published code, and bad input."""

import dataclasses
import importlib
import re
import shutil

import anndata
import matplotlib.colors
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import generation
import train_encoder
import train_gmvae
from conftest import (
    CELL_TYPES,
    QUICK,
    TINY,
    assert_one_line_error,
    make_cells,
    run,
    run_inside,
    train,
    train_apart,
    write_10x,
    write_labels,
)
from deconvolution.fit import MISFIT
from models import scGMVAE
from plots.style import type_colors
from runtime.errors import InputError
from runtime.flags import COLUMN, help_text
from runtime.script import parse_args
from runtime.version import VERSION
from runtime.weights import load_model
from states import pseudobulks

TRAININGS = list(TINY)
GENES = [f"GENE{i}" for i in range(60)]
SCRIPTS = [*TRAININGS, "bulk2sc.py", "evaluate.py"]


def card(weights, name):
    return torch.load(weights / f"{name}_model.pt", weights_only=True)


def generate(out, *arguments, call=run_inside):
    """Cells by bulk2sc.py; call: run, for a process of its own, which takes seconds to start."""
    done = call("bulk2sc.py", "--out", out, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return anndata.read_h5ad(out)


# --------------------------------------------------------------------------- whole pipeline


def test_trainings_write_what_they_say(trained):
    names = {p.name for p in trained.iterdir()}
    expected = {"gmm_mu_c.pt", "gmm_var_c.pt"}
    for model in ("scGMVAE", "scDecoder", "bulkEncoder"):
        expected |= {f"{model}_model.pt", f"{model}_loss.csv", f"{model}_loss.png"}
    assert names == expected
    assert torch.load(trained / "gmm_mu_c.pt", weights_only=True).shape == (1, 5, 3)  # D = 5, K = 3
    for model in ("scGMVAE", "scDecoder", "bulkEncoder"):
        assert card(trained, model)["cell_types"] == CELL_TYPES
    for model, epochs in (("scGMVAE", 60), ("scDecoder", 60)):
        curve = pd.read_csv(trained / f"{model}_loss.csv")
        assert curve["epoch"].tolist() == list(range(1, epochs + 1))  # no extra epoch
        assert curve["reconstruction"].iloc[-1] < curve["reconstruction"].iloc[0]


def test_encoder_reports_three_losses_close_to_zero(trained):
    """mu and var start at the moments of the mixture, pi at a nearly converged deconvolution."""
    curve = pd.read_csv(trained / "bulkEncoder_loss.csv")
    for name in ("mu", "var", "held_out_mu", "held_out_var"):
        assert curve[name].iloc[-1] < 0.1
    assert curve["pi"].iloc[-1] < 0.02 and curve["held_out_pi"].iloc[-1] < 0.02


def test_no_stage_trains_on_a_held_out_cell(trained):
    """One split, chosen by stage 1, stratified, the same in all three files."""
    cells = make_cells()
    cards = [card(trained, m) for m in ("scGMVAE", "scDecoder", "bulkEncoder")]
    assert cards[0]["held_out"] == cards[1]["held_out"] == cards[2]["held_out"]
    held_out = cells.obs.loc[cards[0]["held_out"], "cell_type"].value_counts()
    assert held_out[CELL_TYPES].tolist() == [8, 6, 4]


def test_generated_file(trained, h5ad, tmp_path):
    out = generate(tmp_path / "g.h5ad", "--data", h5ad, "--weights", trained, "--n-cells", 50,
                   "--batch-size", 30)  # fmt: skip
    assert out.shape == (50, 60) and list(out.var_names) == [f"GENE{i}" for i in range(60)]
    assert sp.issparse(out.X) and out.X.format == "csr" and out.X.dtype == np.int32
    assert out.X.min() >= 0 and out.X.sum() > 0
    assert out.obs["sample"].nunique() == 50  # each batch yields one cell
    assert list(out.obs["cell_type"].cat.categories) == list(out.uns["cell_types"]) == CELL_TYPES
    assert out.obsm["X_latent"].shape == (50, 5)
    table = out.uns["proportions"]
    assert list(table["sample"]) == list(np.repeat(out.uns["samples"], 3))
    assert list(table["cell_type"]) == CELL_TYPES * 50
    for column in ("proportion", "rna_fraction"):
        sums = table.groupby("sample", observed=True)[column].sum()
        np.testing.assert_allclose(sums, 1, rtol=1e-5)
    assert out.uns["settings"]["n_cells"] == 50


def test_same_seed_same_cells_and_another_seed_others(trained, h5ad, tmp_path):
    """Two processes with the same weights and seed generate identical cells."""
    a, b, c = (
        generate(tmp_path / f"{i}.h5ad", "--data", h5ad, "--weights", trained, "--n-cells", 40,
                 "--batch-size", 30, "--seed", seed, call=call)
        for i, (seed, call) in enumerate(((1, run), (1, run), (2, run_inside)))
    )  # fmt: skip
    assert (a.X != b.X).nnz == 0 and (a.obsm["X_latent"] == b.obsm["X_latent"]).all()
    assert list(a.obs["cell_type"]) == list(b.obs["cell_type"])
    assert (a.X != c.X).nnz > 0


def test_training_repeats_to_the_bit(h5ad, trained, tmp_path):
    """Stages 2 and 3 in a new process; test_interruption.py has stage 1."""
    weights = tmp_path / "w"
    shutil.copytree(trained, weights)
    models = ("scDecoder", "bulkEncoder")
    for model in models:
        (weights / f"{model}_model.pt").unlink()
    train_apart("--data", h5ad, "--weights", weights, stages=tuple(TRAININGS[1:]))
    for model in models:
        first, second = card(trained, model)["state"], card(weights, model)["state"]
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("n_cells", [0, 1, 499, 1500])
def test_every_cell_is_saved_whatever_their_number(trained, h5ad, tmp_path, n_cells):
    """Regression: only every 500th generated cell was saved, and fewer than 500 crashed."""
    out = generate(
        tmp_path / "g.h5ad", "--data", h5ad, "--weights", trained,
        "--n-cells", n_cells, "--batch-size", 20,
    )  # fmt: skip
    assert out.n_obs == n_cells == len(out.obs_names.unique())


def test_batch_size_is_used(trained, h5ad, tmp_path):
    """Regression: --batch_size was ignored."""
    spread = []
    for size in (2, 60):
        out = generate(
            tmp_path / "g.h5ad", "--data", h5ad, "--weights", trained,
            "--n-cells", 60, "--batch-size", size,
        )  # fmt: skip
        by_type = out.uns["proportions"].groupby("cell_type", observed=True)["proportion"]
        spread.append(by_type.std().mean())
    assert spread[0] > 2 * spread[1]  # bulks of two cells differ more than bulks of sixty


def test_bulk_file_gives_n_cells_per_sample_of_its_composition(trained, tmp_path):
    """A sample of a single cell type yields cells of that type; sample names are kept."""
    cells = make_cells()
    table = pd.DataFrame(
        {t: cells[cells.obs["cell_type"] == t].X.sum(axis=0).A1 for t in CELL_TYPES},
        index=cells.var_names,
    )
    table.columns = ["donor B", "donor T", "donor NK"]
    table.to_csv(tmp_path / "bulk.tsv", sep="\t")
    out = generate(
        tmp_path / "g.h5ad", "--bulk", tmp_path / "bulk.tsv", "--weights", trained, "--n-cells", 70
    )
    assert out.obs["sample"].value_counts(sort=False).to_dict() == dict.fromkeys(table.columns, 70)
    assert list(out.uns["samples"]) == list(table.columns)
    counts = pd.crosstab(out.obs["sample"], out.obs["cell_type"])
    assert (np.diag(counts.loc[table.columns, CELL_TYPES]) > 50).all(), counts
    repeated = generate(
        tmp_path / "h.h5ad", "--bulk", tmp_path / "bulk.tsv", "--weights", trained, "--n-cells", 70
    )
    assert (out.X != repeated.X).nnz == 0


@pytest.mark.parametrize("chunk", [1, 64, 10_000])
def test_cells_that_come_in_chunks_keep_their_bulk_and_type(trained, tmp_path, monkeypatch, chunk):
    """Each cell has the right sample and cell type, whatever the chunk size."""
    monkeypatch.setattr(generation, "CHUNK", chunk)
    cells = make_cells()
    pure = [cells[cells.obs["cell_type"] == t].X.sum(axis=0).A1 for t in CELL_TYPES]
    table = pd.DataFrame(dict(zip("abc", pure, strict=True)), index=cells.var_names)
    table.to_csv(tmp_path / "bulk.csv")
    flags = ["--bulk", tmp_path / "bulk.csv", "--weights", trained, "--n-cells", 100]
    done = run_inside("bulk2sc.py", *flags, "--out", tmp_path / "g.h5ad")
    assert done.returncode == 0, done.stderr
    out = anndata.read_h5ad(tmp_path / "g.h5ad", backed="r")
    assert list(out.obs["sample"]) == [*"a" * 100, *"b" * 100, *"c" * 100]
    X = out.X[:]
    assert X.format == "csr" and X.shape == (300, 60) and X.dtype == np.int32
    X.check_format(full_check=True)
    for name, bulk in zip(CELL_TYPES, pure, strict=True):  # counts match the label
        generated = X[(out.obs["cell_type"] == name).to_numpy()].sum(axis=0).A1
        assert np.corrcoef(np.log1p(generated), np.log1p(bulk))[0, 1] > 0.9
    out.file.close()


@pytest.mark.draws
def test_proportions_beside_the_cells(trained, h5ad, tmp_path):
    """Tables and picture of the samples are written with --bulk, and agree with the cells' file."""
    table = pd.DataFrame({"007": make_cells()[:40].X.sum(axis=0).A1, "b$1": 1}, index=GENES)
    table.to_csv(tmp_path / "bulk.csv")
    out = tmp_path / "generated" / "g.h5ad"
    cells = generate(out, "--bulk", tmp_path / "bulk.csv", "--weights", trained, "--n-cells", 3)
    written = pd.read_csv(out.parent / "g.proportions.csv", dtype={"sample": str})
    values = ["proportion", "low", "high", "rna_fraction"]
    assert list(written) == ["sample", "cell_type", *values]
    assert list(written["sample"]) == ["007"] * 3 + ["b$1"] * 3
    assert list(written["cell_type"]) == CELL_TYPES * 2
    pd.testing.assert_frame_equal(
        cells.uns["proportions"].astype({"sample": str, "cell_type": str}),
        written.astype({"sample": str, "cell_type": str}),
        check_index_type=False,
    )
    assert (written["low"] <= written["proportion"]).all()
    assert (written["proportion"] <= written["high"]).all()
    pi = written["proportion"].to_numpy().reshape(2, 3)
    assert (pi[0] != pi[1]).all()
    fit = pd.read_csv(out.parent / "g.fit.csv", dtype={"sample": str}, index_col="sample")
    assert {"correlation", "unexplained", "misfit", "agreement"} <= set(fit)
    assert list(fit.index) == list(cells.uns["fit"].index) == ["007", "b$1"]
    np.testing.assert_allclose(cells.uns["fit"], fit)
    misfit = cells.obs.groupby("sample", observed=True)["misfit"]
    assert (misfit.nunique() == 1).all()
    np.testing.assert_allclose(misfit.first()[["007", "b$1"]], fit["misfit"])
    assert matplotlib.image.imread(out.parent / "g.proportions.png").std() > 0.01

    endings = ("proportions.csv", "proportions.png", "fit.csv", "expression.h5ad")
    names = {"g.h5ad", *(f"g.{ending}" for ending in endings)}
    assert {p.name for p in out.parent.iterdir()} == names  # no temporary file left
    flags = ["--data", h5ad, "--weights", trained, "--out", tmp_path / "batches" / "g.h5ad"]
    batches = generate(flags[-1], *flags[:-2], "--n-cells", 5, "--batch-size", 20)
    assert len(batches.uns["proportions"]) == 5 * 3 and "fit" not in batches.uns
    assert [p.name for p in (tmp_path / "batches").iterdir()] == ["g.h5ad"]


def test_colours_of_cell_types_are_stable_and_differ():
    types = [f"type {k}" for k in range(45)]
    colors = type_colors(types)
    assert len(set(list(colors.values())[:40])) == 40 and len(colors) == 45
    assert type_colors(types[:3]) == {t: colors[t] for t in types[:3]}


def test_bulk_by_ensembl_ids_gives_the_cells_of_its_symbols(trained, tmp_path):
    """The encoder's file holds the reference's ids; a file without them matches symbols only."""
    cells, files = make_cells(), [tmp_path / "symbols.csv", tmp_path / "ids.tsv"]
    assert card(trained, "bulkEncoder")["gene_ids"] == list(cells.var["gene_ids"])
    table = pd.DataFrame({"1": cells.X[:50].sum(axis=0).A1, "2": cells.X[50:].sum(axis=0).A1})
    table.set_axis(cells.var_names).to_csv(files[0])
    table.insert(0, "Length", 1000)
    table.set_axis(cells.var["gene_ids"] + ".3").to_csv(files[1], sep="\t")
    out = [
        generate(tmp_path / "g.h5ad", "--bulk", f, "--weights", trained, "--n-cells", 5)
        for f in files
    ]
    assert (out[0].X != out[1].X).nnz == 0 and list(out[1].uns["samples"]) == ["1", "2"]

    shutil.copytree(trained, tmp_path / "w")
    for model in ("scDecoder", "bulkEncoder"):
        without_ids = torch.load(tmp_path / "w" / f"{model}_model.pt", weights_only=True)
        del without_ids["gene_ids"]
        torch.save(without_ids, tmp_path / "w" / f"{model}_model.pt")
    flags = ["--weights", tmp_path / "w", "--n-cells", 5, "--out", tmp_path / "g.h5ad"]
    done = run_inside("bulk2sc.py", "--bulk", files[0], *flags)
    assert "2 bulk samples x 60 genes; 60 of the model's 60 genes found" in done.stdout
    assert (anndata.read_h5ad(tmp_path / "g.h5ad").X != out[0].X).nnz == 0
    done = run_inside("bulk2sc.py", "--bulk", files[1], *flags)
    assert_one_line_error(done, files[1], "ENSG00000000000.3", "no ids")


def test_bulks_that_do_not_belong_are_warned_of(trained, tmp_path):
    """Gene-shuffled bulks raise a warning; sums of the reference's cells do not."""
    rng = np.random.default_rng(0)
    cells = make_cells()
    sums = {f"own {i}": cells.X[rng.permutation(90)[:60]].sum(axis=0).A1 for i in range(4)}
    table = pd.DataFrame(sums, index=cells.var_names)
    table["strange 1"], table["strange 2"] = (rng.permutation(table["own 0"]) for _ in range(2))
    table.to_csv(tmp_path / "bulk.csv")
    done = run_inside(
        "bulk2sc.py", "--bulk", tmp_path / "bulk.csv", "--weights", trained,
        "--n-cells", 2, "--out", tmp_path / "g.h5ad",
    )  # fmt: skip
    fit = pd.read_csv(tmp_path / "g.fit.csv", index_col="sample")
    assert (fit.loc[list(sums), "misfit"] < 3).all(), fit
    assert (fit.loc[["strange 1", "strange 2"], "misfit"] > MISFIT).all(), fit
    assert "2 of 6 samples (strange 1, strange 2) are not" in done.stderr


def test_calibrated_cells_add_up_to_their_bulk(trained, tmp_path):
    """Even on a platform that scales each gene by a different factor."""
    rng = np.random.default_rng(0)
    cells = make_cells()
    bulk = cells.X.sum(axis=0).A1 * rng.lognormal(0, 0.5, cells.n_vars)
    pd.DataFrame({"a": bulk}, index=cells.var_names).to_csv(tmp_path / "bulk.csv")
    agreement, totals = [], []
    for extra in ([], ["--calibrate", "uniform"]):
        out = generate(
            tmp_path / "g.h5ad", "--bulk", tmp_path / "bulk.csv", "--weights", trained,
            "--n-cells", 1000, *extra,
        )  # fmt: skip
        agreement.append(out.uns["fit"].loc["a", "agreement"])
        totals.append(out.X.sum(axis=1).A1.mean())
    assert agreement[0] < 0.97 and agreement[1] > 0.99
    assert totals[0] == pytest.approx(totals[1], rel=0.05)  # cells keep their library sizes


def test_generated_cells_vary_within_a_type(trained, h5ad, tmp_path):
    """Regression: with z unrelated to x, every generated cell of a type was the same cell."""
    out = generate(
        tmp_path / "g.h5ad", "--data", h5ad, "--weights", trained,
        "--n-cells", 600, "--batch-size", 60,
    )  # fmt: skip
    real = make_cells()
    for cell_type in CELL_TYPES[:2]:
        a, b = (x[x.obs["cell_type"] == cell_type].X.toarray().astype(float) for x in (out, real))
        a, b = (np.log1p(v / v.sum(1, keepdims=True) * 1e4) for v in (a, b))
        assert 0.75 < a.var(axis=0).sum() / b.var(axis=0).sum() < 1.33
        assert np.median(out.X.sum(axis=1).A1) == pytest.approx(
            np.median(real.X.sum(1).A1), rel=0.2
        )


def test_labels_follow_their_cells_however_the_data_is_ordered(trained, h5ad):
    """Regression: batch positions indexed unshuffled labels while the loader shuffled."""
    cells = anndata.read_h5ad(h5ad)
    model, metadata = load_model(trained / "scGMVAE_model.pt", scGMVAE)
    mean, _ = model.encode(torch.from_numpy(cells[:, metadata["genes"]].X.toarray()).float())
    codes = cells.obs["cell_type"].map(CELL_TYPES.index).to_numpy()
    # If labels were shuffled against cells, the three components would coincide.
    nearest = torch.cdist(mean, model.mu).argmin(dim=1).numpy()
    assert (nearest == codes).mean() > 0.9


def test_more_than_ten_types_given_as_numbers(tmp_path):
    """Regression: codes followed sorted strings, '0', '1', '10', '2'."""
    cells = make_cells(n_per_type=(12,) * 12, n_genes=72)
    cells.obs["leiden"] = cells.obs["cell_type"].str.removeprefix("type ")
    cells.write_h5ad(tmp_path / "a.h5ad")
    flags = ["--data", tmp_path / "a.h5ad", "--labels", "leiden", "--weights", tmp_path / "w"]
    train(*flags, settings=QUICK)
    for model in ("scGMVAE", "scDecoder", "bulkEncoder"):
        assert card(tmp_path / "w", model)["cell_types"] == [str(i) for i in range(12)]
    out = generate(tmp_path / "g.h5ad", "--data", tmp_path / "a.h5ad", "--weights", tmp_path / "w",
                   "--n-cells", 30, "--batch-size", 50)  # fmt: skip
    assert len(out.uns["proportions"]) == 30 * 12


def test_10x_folder_with_label_csv_from_end_to_end(tmp_path):
    folder = write_10x(tmp_path / "10x", make_cells(), "old")
    labels = write_labels(tmp_path / "labels.csv", make_cells(), header=False)
    for script, flags in QUICK.items():
        given = ["--data", folder, "--labels", labels, "--weights", tmp_path / "w", *flags]
        done = run_inside(script, *given)
        assert done.returncode == 0, done.stderr
    out = generate(tmp_path / "g.h5ad", "--data", folder, "--weights", tmp_path / "w",
                   "--n-cells", 5, "--batch-size", 20)  # fmt: skip
    assert out.n_obs == 5
    where = ["--data", folder, "--labels", labels, "--weights", tmp_path / "w"]
    small = ["--n-draws", 2, "--n-pseudobulks", 5, "--n-trees", 5, "--out", tmp_path / "e"]
    done = run_inside("evaluate.py", *where, *small)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "e" / "evaluation.csv")
    assert "within-type variance ratio" in done.stdout
    assert set(table["method"]) >= {"bulk2sc", "perfect model", "cell-type NB", "NNLS"}
    assert np.isfinite(table["mean"]).all() and set(table["n"]) == {1, 2}


def test_nothing_held_out(tmp_path, h5ad):
    """All cells are trained on, and evaluate.py reports why it cannot run."""
    flags = ["--data", h5ad, "--weights", tmp_path]
    train(*flags, settings=QUICK, train_gmvae=["--held-out", 0])
    assert card(tmp_path, "bulkEncoder")["held_out"] == []
    assert_one_line_error(run_inside("evaluate.py", *flags), "no cells were held out")


# ------------------------------------------------------------------------- autoCell and names


@pytest.mark.parametrize(
    "arguments", [[], ["--pairing", "prior", "--loss", "mse_l1"], ["--loss", "zinb"]]
)
def test_decoder_from_autocell_files_alone(tmp_path, h5ad, arguments):
    """autoCell saves two files of shape (1, D, K); D need not equal K."""
    for name, low in (("gmm_mu_c.pt", 0.0), ("gmm_var_c.pt", 0.5)):
        torch.save(torch.rand(1, 4, 3) + low, tmp_path / name)
    flags = ["--data", h5ad, "--weights", tmp_path]
    done = run_inside("train_decoder.py", *flags, *QUICK["train_decoder.py"], *arguments)
    assert "components taken as cell types: 0 = B cells; " in done.stdout
    done = run_inside("train_encoder.py", *flags, *QUICK["train_encoder.py"])
    assert done.returncode == 0, done.stderr
    out = generate(tmp_path / "g.h5ad", "--data", h5ad, "--weights", tmp_path, "--n-cells", 30,
                   "--batch-size", 20)  # fmt: skip
    assert out.obsm["X_latent"].shape == (30, 4)
    assert card(tmp_path, "scDecoder")["pairing"] == "prior"
    assert len(card(tmp_path, "scDecoder")["held_out"]) == 18


def test_posterior_pairing_needs_the_gmvae(tmp_path, h5ad):
    for name in ("gmm_mu_c.pt", "gmm_var_c.pt"):
        torch.save(torch.rand(1, 4, 3) + 0.5, tmp_path / name)
    flags = ["--data", h5ad, "--weights", tmp_path]
    done = run_inside("train_decoder.py", *flags, "--pairing", "posterior")
    assert_one_line_error(done, "scGMVAE_model.pt", "train_gmvae.py")


def test_zinb_from_end_to_end(tmp_path, h5ad):
    zinb = ["--loss", "zinb"]
    flags = ["--data", h5ad, "--weights", tmp_path]
    train(*flags, settings=QUICK, train_gmvae=zinb, train_decoder=zinb)
    out = generate(tmp_path / "g.h5ad", "--data", h5ad, "--weights", tmp_path, "--n-cells", 20,
                   "--batch-size", 20)  # fmt: skip
    assert out.X.sum() > 0


# ------------------------------------------------------------------------------- bad input


def broken(tmp_path, cells, kind):
    X = cells.X.astype(np.float64)
    if kind == "normalised":
        X.data = np.log1p(X.data)
    elif kind == "negative":
        X.data[-1] = -2
    else:
        X.data[-1] = np.nan
    cells.X = X
    cells.write_h5ad(tmp_path / f"{kind}.h5ad")
    return tmp_path / f"{kind}.h5ad"


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_data_is_a_one_line_error(script, trained, tmp_path):
    done = run_inside(script, "--data", tmp_path / "nowhere", "--weights", trained)
    assert_one_line_error(done, tmp_path / "nowhere", "no such file")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["normalised", "negative", "not finite"])
def test_counts_that_are_not_counts(script, kind, trained, tmp_path):
    path = broken(tmp_path, make_cells(), kind)
    before = sorted(p.name for p in trained.iterdir())
    done = run_inside(script, "--data", path, "--weights", trained, cwd=tmp_path)
    assert_one_line_error(done, path, "expected raw counts")
    assert sorted(p.name for p in trained.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_wrong_barcodes_are_a_one_line_error(tmp_path, h5ad):
    (tmp_path / "labels.csv").write_text("barcode,cell_type\nAAA-1,B\nCCC-1,T\n")
    done = run_inside("train_gmvae.py", "--data", h5ad, "--labels", tmp_path / "labels.csv",
               "--weights", tmp_path / "w")  # fmt: skip
    assert_one_line_error(done, "labels.csv", "AAA-1", "CELL")
    assert not (tmp_path / "w").exists()


def test_labels_that_are_nowhere(tmp_path, h5ad):
    done = run_inside("train_gmvae.py", "--data", h5ad, "--labels", "leiden")
    assert_one_line_error(done, "leiden", "neither a file nor a column")


def test_no_shared_genes(trained, tmp_path):
    cells = make_cells()
    cells.var_names = [f"MOUSE{i}" for i in range(cells.n_vars)]
    cells.write_h5ad(tmp_path / "m.h5ad")
    out = tmp_path / "g.h5ad"
    flags = ["--weights", trained, "--out", out]
    done = run_inside("bulk2sc.py", "--data", tmp_path / "m.h5ad", *flags)
    assert_one_line_error(done, "m.h5ad", "none of its 60 genes")
    pd.DataFrame({"s1": [1, 2]}, index=["MOUSE1", "MOUSE2"]).to_csv(tmp_path / "bulk.csv")
    done = run_inside("bulk2sc.py", "--bulk", tmp_path / "bulk.csv", *flags)
    assert_one_line_error(done, "bulk.csv", "MOUSE1")
    assert not out.exists()


def test_empty_bulk(trained, tmp_path):
    table = pd.DataFrame({"s1": [1, 2], "void": [0, 0]}, index=["GENE1", "GENE2"])
    table.to_csv(tmp_path / "bulk.csv")
    done = run_inside("bulk2sc.py", "--bulk", tmp_path / "bulk.csv", "--weights", trained,
               cwd=tmp_path)  # fmt: skip
    assert_one_line_error(done, "bulk.csv", "void", "empty")
    assert [p.name for p in tmp_path.iterdir()] == ["bulk.csv"]


@pytest.mark.parametrize("name", ["bulkEncoder_model.pt", "scDecoder_model.pt"])
def test_truncated_weights(trained, h5ad, tmp_path, name):
    shutil.copytree(trained, tmp_path / "w")
    file = tmp_path / "w" / name
    file.write_bytes(file.read_bytes()[:5000])
    done = run_inside("bulk2sc.py", "--data", h5ad, "--weights", tmp_path / "w", "--out",
               tmp_path / "g.h5ad")  # fmt: skip
    assert_one_line_error(done, name, "not a readable weights file")
    assert not (tmp_path / "g.h5ad").exists()


def test_weights_of_another_dataset(trained, h5ad, tmp_path):
    """Weights of other cell types, of other cells, or of two runs are one-line errors."""
    cells = make_cells()
    cells.obs["cell_type"] = cells.obs["cell_type"].replace("B cells", "A new name")
    cells.write_h5ad(tmp_path / "types.h5ad")
    for script in TRAININGS[1:]:
        done = run_inside(script, "--data", tmp_path / "types.h5ad", "--weights", trained)
        assert_one_line_error(done, "_model.pt", "expected weights of this dataset")
    cells = make_cells()
    cells.obs_names = "OTHER" + cells.obs_names
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for script in (*TRAININGS[1:], "evaluate.py"):
        done = run_inside(script, "--data", tmp_path / "cells.h5ad", "--weights", trained)
        assert_one_line_error(done, "_model.pt", "expected weights of this dataset")
    shutil.copytree(trained, tmp_path / "w")
    for script, seed in (("train_gmvae.py", 9), ("train_decoder.py", 0)):
        given = ["--data", h5ad, "--weights", tmp_path / "w", *QUICK[script], "--seed", seed]
        done = run_inside(script, *given)
        assert done.returncode == 0, done.stderr
    done = run_inside("bulk2sc.py", "--data", h5ad, "--weights", tmp_path / "w", cwd=tmp_path)
    assert_one_line_error(done, "bulkEncoder_model.pt", "another Gaussian mixture")


def test_held_out_cannot_change_between_stages(trained, h5ad):
    done = run_inside("train_decoder.py", "--data", h5ad, "--weights", trained, "--held-out", 0.5)
    assert_one_line_error(done, "--held-out 0.5", "0.2")


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("train_gmvae.py", ["--epochs", 0], "--epochs: found 0"),
        ("bulk2sc.py", ["--bulk"], "--bulk: found no value"),  # of an empty variable of the shell
        ("bulk2sc.py", ["--bulk", "--n-cells", 5], "--bulk: found no value"),
        ("train_gmvae.py", ["--held-out", 1.5], "--held-out: found 1.5"),
        ("train_gmvae.py", ["--loss", "poisson"], "--loss: found poisson"),
        ("train_gmvae.py", ["--vae-epochs", 999], "--vae-epochs"),
        ("train_gmvae.py", ["--kl-end", -1], "--kl-end: found -1"),
        ("evaluate.py", ["--n-draws", 0], "--n-draws"),
        ("evaluate.py", ["--generated", "g.h5ad", "--more-weights", "w1"], "--generated"),
        ("train_decoder.py", ["--pairing", "none"], "--pairing: found none"),
        ("train_decoder.py", ["--loss", "l3"], "--loss: found l3"),
        ("train_decoder.py", ["--lr", 0], "--lr: found 0"),
        ("train_encoder.py", ["--noise", -1], "--noise: found -1"),
        ("train_encoder.py", ["--steps", 0], "--steps: found 0"),
        ("train_encoder.py", ["--min-cells", 9, "--max-cells", 8], "--max-cells: found 9 to 8"),
        ("bulk2sc.py", ["--platform", "none"], "--platform: found none, expected keep or remove"),
        ("train_decoder.py", ["--n-components", 0], "--n-components: found 0"),
        ("bulk2sc.py", ["--calibrate", "uniform"], "--calibrate: found no --bulk"),
        ("bulk2sc.py", ["--n-cells", -1], "--n-cells: found -1"),
        ("bulk2sc.py", ["--out", "cells.csv"], "ends in .h5ad"),
        ("bulk2sc.py", ["--batch-size", 701], "at most the 700 cells"),
        ("bulk2sc.py", ["--device", "abacus"], "--device abacus"),
        ("bulk2sc.py", ["--seed", -1], "--seed: found -1"),
        ("benchmarks/benchmark.py", ["--n_cells=0"], "--n-cells: found 0, expected 1 or more"),
        ("examples/cellxgene.py", ["--cells", "README.md"], "README.md: not a readable .h5ad"),
    ],
)
def test_settings_out_of_range(script, arguments, words):
    assert_one_line_error(run_inside(script, *arguments), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--no-such-flag", 1], ["--no-such-flag", "unknown, expected the flags"]),
        (["--n-cell", 5], ["--n-cell 5", "unknown, did you mean --n-cells?"]),
        (["--known_proportion=x.csv"], ["did you mean --known-proportions?"]),
        (["one", "two"], ["one two", "unknown"]),
        (["--n-cells", "many"], ["--n-cells", "many"]),
        (["--n-cells"], ["--n-cells: found no value, expected an integer"]),
        (["--format"], ["--format: found no value, expected one of png, pdf, svg"]),
        (["--seed", 1.5], ["--seed: found 1.5, expected an integer"]),
        (["--pseudocount=x"], ["--pseudocount: found x, expected a number"]),
        (["--cells-per-type", "x"], ["--cells-per-type: found x, expected an integer"]),
        (["--model", "a", "--weights", "b"], ["--weights: found --model as well, expected one"]),
        (["train.py", "--epochs", 3], ["--epochs: found 3, expected 3 values, each an integer"]),
        (["train.py", "--epochs", 1, 2, "x"], ["--epochs: found 1 2 x, expected 3 values"]),
        (
            ["benchmarks/compare_states.py", "--contrast", "A"],
            ["--contrast: found A, expected 2 values, each text"],
        ),
        (["examples/pbmc_reference.py"], ["found no --sets and no --annotations, expected"]),
    ],
)
def test_command_line_that_cannot_be_parsed_is_one_line(arguments, words):
    """Regression: in the words of the parser, or without the name of what is missing."""
    arguments = arguments if str(arguments[0]).endswith(".py") else ["bulk2sc.py", *arguments]
    done = run_inside(*arguments)
    assert_one_line_error(done, *words)
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("script", "name"),
    [("train_gmvae", "loss"), ("train_decoder", "loss"), ("train_decoder", "pairing")],
)
def test_choices_hold_for_edited_settings_too(script, name):
    """The dataclass may be edited, or filled by another program; no command line checks it then."""
    with pytest.raises(InputError, match=f"^--{name}: found none, expected "):
        importlib.import_module(script).Settings(**{name: "none"})


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_flag_is_an_error_and_help_lists_all(script):
    done = run_inside(script, "--no-such-flag", 1)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    help_text = run_inside(script, "--help").stdout
    for name in ("--data", "--labels", "--weights", "--seed", "--device"):
        assert name in help_text


GONE = [
    *(("train_gmvae.py", name) for name in ("kl_start", "thin")),
    *(("train_encoder.py", name) for name in ("min_pool", "max_pool", "lost", "folds")),
]


@pytest.mark.parametrize(("script", "name"), GONE)
def test_flag_that_is_gone_is_a_one_line_error(script, name):
    """It says the value that always holds now, which is the constant's."""
    gone = importlib.import_module(script.removesuffix(".py")).Settings.gone
    done = run_inside(script, f"--{name.replace('_', '-')}", 1)
    assert_one_line_error(done, f"no longer a flag (always {gone[name]})")
    assert done.returncode == 2
    constants = {"kl_start": train_gmvae.KL_START, "thin": train_gmvae.THIN}
    constants |= dict(zip(("min_pool", "max_pool"), pseudobulks.POOL, strict=True))
    constants |= {"lost": pseudobulks.LOST, "folds": train_encoder.N_FOLDS}
    assert gone[name] == constants[name]


def read_flags(monkeypatch, settings_class, *arguments):
    """Settings of a command line."""
    monkeypatch.setattr("sys.argv", ["script.py", *arguments])
    return parse_args(settings_class)


@pytest.mark.parametrize(
    ("script", "old", "new", "value"),
    [
        ("bulk2sc", "--proportions", "known_proportions", "mix.csv"),
        ("train_encoder", "--batches", "batch_key", "batch"),
        ("train_encoder", "--epochs", "steps", "7"),
    ],
)
def test_old_name_of_a_flag_goes_on_working(monkeypatch, capsys, script, old, new, value):
    """One line on stderr says the new name; an underscore or an equals sign is no matter."""
    settings_class = importlib.import_module(script).Settings
    line = f"note: {old} is now called --{new.replace('_', '-')}\n"
    for given in ([old, value], [f"{old}={value}"]):
        settings = read_flags(monkeypatch, settings_class, "--samples", "sample", *given)
        assert str(getattr(settings, new)) == value
        assert capsys.readouterr().err == line
    read_flags(monkeypatch, settings_class, "--samples=s", f"--{new}", value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("script", [*SCRIPTS, "train.py", "make_figures.py", "annotate.py"])
def test_no_argument_gives_the_defaults(monkeypatch, script):
    """Regression: a script without any argument ended in a traceback."""
    settings_class = importlib.import_module(script.removesuffix(".py")).Settings
    assert read_flags(monkeypatch, settings_class) == settings_class()


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_of_other_tools_are_understood(monkeypatch, capsys, script):
    settings_class = importlib.import_module(script.removesuffix(".py")).Settings
    settings = read_flags(monkeypatch, settings_class, "--model", "m", "--reference=r.h5ad")
    assert str(settings.weights) == "m" and settings.data == "r.h5ad"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_version(monkeypatch, capsys, script):
    settings_class = importlib.import_module(script.removesuffix(".py")).Settings
    with pytest.raises(SystemExit) as end:
        read_flags(monkeypatch, settings_class, "--version")
    assert not end.value.code and capsys.readouterr().out == f"bulk2sc {VERSION}\n"


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_wrapped_once(script, columns):
    """Each text fills its lines, and no number is broken at its comma. Regression: "3,"."""
    settings_class = importlib.import_module(script.removesuffix(".py")).Settings
    width, page = min(columns, 120), help_text(settings_class, script, columns)
    indent, last = " " * COLUMN, ""
    for line in page.splitlines():
        if indent == last[:COLUMN] == line[:COLUMN] != "" and line[COLUMN] != " ":
            word = re.match(r"\(default: \S+|\S+", line.strip())[0]
            assert len(last) + 1 + len(word) > width, f"{last}\n{line}"
        assert len(line) <= width or line.startswith("Example: ") or " " not in line.strip(), line
        last = line
    assert not re.search(r"\d,\n +\d{3}\b", page) and "{None}" not in page
    for field in dataclasses.fields(settings_class):  # each once, in a group
        assert len(re.findall(rf"^  --{field.name.replace('_', '-')}\b(?!-)", page, re.M)) == 1
    assert re.search("^advanced:$", page, re.M)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_importable_without_running(script):
    module = importlib.import_module(script.removesuffix(".py"))
    assert callable(module.main) and module.Settings()


def test_unwritable_output_is_a_one_line_error(trained, h5ad, tmp_path):
    (tmp_path / "a file").write_text("")
    out = tmp_path / "a file" / "g.h5ad"
    done = run_inside("bulk2sc.py", "--data", h5ad, "--weights", trained, "--n-cells", 3,
               "--batch-size", 20, "--out", out)  # fmt: skip
    assert_one_line_error(done, tmp_path / "a file", "cannot be written to")
    assert done.stdout == ""  # before anything is read


def test_a_platform_is_refused_where_it_would_be_ignored(trained, tmp_path):
    flags = ["--weights", trained, "--bulk", tmp_path / "bulk.csv", "--platform", "remove"]
    for calibrate in ("none", "uniform"):
        done = run_inside("bulk2sc.py", *flags, "--calibrate", calibrate)
        assert_one_line_error(done, "--platform", f"--calibrate {calibrate}", "types")
    cells = make_cells()
    pd.DataFrame({"a": cells.X.sum(axis=0).A1}, cells.var_names).to_csv(tmp_path / "bulk.csv")
    done = run_inside("bulk2sc.py", *flags, "--out", tmp_path / "g.h5ad")  # auto is none here
    assert_one_line_error(done, "--platform", "none for these weights, of one sample")
    assert not (tmp_path / "g.h5ad").exists()


# -------------------------------------------------------------------------- shipped weights


def test_shipped_weights_generate_from_the_default(tmp_path):
    """README's first command."""
    done = run_inside("bulk2sc.py", "--out", tmp_path / "generated.h5ad")
    assert done.returncode == 0, done.stderr
    out = anndata.read_h5ad(tmp_path / "generated.h5ad")
    assert out.shape == (1000, 765)
    assert "1,000 cells x 765 genes" in done.stdout
    assert len(out.uns["cell_types"]) == 10
