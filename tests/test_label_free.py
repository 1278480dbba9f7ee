"""Training without labels, and mixture files whose components are in any order."""

import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import read_h5ad
from sklearn.metrics import adjusted_rand_score

from conftest import (
    CELL_TYPES,
    QUICK,
    ROOT,
    TINY,
    assert_one_line_error,
    make_cells,
    run_inside,
    write_10x,
    write_labels,
)
from models import BulkEncoder, normal_kl, scDecoder, scGMVAE
from readers.labels import FOUND_FILE
from runtime.weights import MIXTURE_FILES, load_model
from train_gmvae import choose_mixture, name_types


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    """A file of synthetic cells of three types, without labels."""
    cells = make_cells()
    del cells.obs["cell_type"]
    path = tmp_path_factory.mktemp("unlabelled") / "cells.h5ad"
    cells.write_h5ad(path)
    return path


def find_types(data, weights, *arguments, settings=TINY):
    flags = ["--data", data, "--weights", weights]
    done = run_inside("train_gmvae.py", *flags, *settings["train_gmvae.py"], *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def read_found_types(weights):
    """Cell types that train_gmvae.py found, by barcode."""
    table = pd.read_csv(weights / FOUND_FILE, index_col="barcode")
    return table["cell_type"]


def test_from_counts_without_labels_to_cells(tmp_path, unlabelled):
    find_types(unlabelled, tmp_path, "--n-types", 3)
    assigned, true = read_found_types(tmp_path), make_cells().obs["cell_type"]
    assert set(assigned) == {"type 1", "type 2", "type 3"}
    assert list(assigned.index) == list(true.index)  # with the held-out cells
    assert adjusted_rand_score(true, assigned) > 0.9
    for script in ("train_decoder.py", "train_encoder.py", "bulk2sc.py"):
        arguments = QUICK.get(script, ["--n-cells", 60, "--batch-size", 20])
        out = ["--out", tmp_path / "out.h5ad"] if script == "bulk2sc.py" else []
        done = run_inside(script, "--data", unlabelled, "--weights", tmp_path, *arguments, *out)
        assert done.returncode == 0, done.stderr[-2000:]
        if script != "bulk2sc.py":  # reports where its cell types come from
            assert "cell types found by train_gmvae.py" in done.stdout
    assert set(read_h5ad(tmp_path / "out.h5ad").obs["cell_type"].cat.categories) == set(assigned)


def test_without_labels_the_run_repeats_and_gives_way_to_labels(tmp_path, unlabelled, h5ad):
    for name in ("a", "b"):
        find_types(unlabelled, tmp_path / name, "--n-types", 0, settings=QUICK)
    for name in ("gmm_mu_c.pt", "gmm_var_c.pt"):
        a, b = (torch.load(tmp_path / x / name, weights_only=True) for x in "ab")
        assert torch.equal(a, b)
    assert read_found_types(tmp_path / "a").equals(read_found_types(tmp_path / "b"))
    _, card = load_model(tmp_path / "a" / "scGMVAE_model.pt", scGMVAE)
    assert card["cell_types"] == sorted(set(read_found_types(tmp_path / "a")))
    # A new training with labels removes the found types.
    find_types(h5ad, tmp_path / "a", settings=QUICK)
    assert not (tmp_path / "a" / FOUND_FILE).exists()
    done = run_inside("train_gmvae.py", "--data", unlabelled, "--weights", tmp_path / "c")
    assert_one_line_error(done, "no cell types found", "--n-types")
    assert not (tmp_path / "c").exists()


def test_found_types_are_matched_to_labels(tmp_path, h5ad):
    done = find_types(h5ad, tmp_path, "--n-types", 4)
    assigned, true = read_found_types(tmp_path), make_cells().obs["cell_type"]
    assert "adjusted Rand index with the labels" in done.stdout
    named = assigned.isin(CELL_TYPES)
    assert named.mean() > 0.7 and (assigned[named] == true[named]).mean() > 0.9
    assert set(assigned[~named]) <= {"type 1", "type 2", "type 3", "type 4"}
    # Later stages prefer the types of the weights to the labels of the data.
    arguments = ["--data", h5ad, "--weights", tmp_path, *TINY["train_decoder.py"], "--epochs", 1]
    done = run_inside("train_decoder.py", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]


def test_labels_of_the_data_survive_weights_in_their_folder(tmp_path):
    """Regression: found types had the label file's name, and a later run removed that file."""
    folder = write_10x(tmp_path / "cells", make_cells())
    labels = write_labels(folder / "barcode_to_celltype.csv", make_cells())
    text = labels.read_text()
    for arguments in (["--n-types", 2], []):
        find_types(folder, folder, *arguments, settings=QUICK)
        assert labels.read_text() == text
        assert (folder / FOUND_FILE).exists() == bool(arguments)


def test_names_of_found_types():
    codes = np.repeat([0, 1, 2, 3], [6, 5, 4, 3])
    labels = pd.Series(["a"] * 6 + ["b"] * 3 + ["a"] * 2 + ["a"] * 4 + ["type 4", None, None])
    names, table = name_types(codes, labels)
    # The third is all "a", a name the first has taken; only one cell of the fourth has a label.
    assert names == ["a", "b", "type 3", "type 4"]
    assert list(table["cells"]) == [6, 5, 4, 3]
    assert list(table["its share"]) == pytest.approx([1, 0.6, 1, 1])
    assert name_types(codes, None)[0] == ["type 1", "type 2", "type 3", "type 4"]
    labels = pd.Series(["type 2"] * 18)  # a label that looks like a found type's name
    assert name_types(codes, labels)[0] == ["type 2", "type 2 (found)", "type 3", "type 4"]


def test_bic_chooses_the_number_of_types():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(4, 5)) * 10
    codes = np.repeat(np.arange(4), 60)
    mixing = rng.normal(size=(5, 5)) * 0.3 + np.eye(5)  # correlated within a type
    mean = torch.from_numpy(centers[codes] + rng.normal(size=(240, 5)) @ mixing)
    chosen, weight = choose_mixture(mean, 0, 0)
    assert adjusted_rand_score(codes, chosen) == 1 and weight == pytest.approx([0.25] * 4)
    assert len(choose_mixture(mean, 6, 0)[1]) == 6


def test_more_types_than_cells_is_an_error(tmp_path, unlabelled):
    arguments = ["--data", unlabelled, "--weights", tmp_path / "w", *TINY["train_gmvae.py"]]
    done = run_inside("train_gmvae.py", *arguments, "--n-types", 80)
    assert "--n-types: found 80, expected at most the 72 cells" in done.stderr
    assert done.returncode != 0 and not (tmp_path / "w").exists()
    assert_one_line_error(run_inside("train_gmvae.py", "--n-types", -1), "--n-types", "-1")
    # As many types as cells: the number of types that end up empty is reported.
    done = find_types(unlabelled, tmp_path, "--n-types", 72, settings=QUICK)
    kept = read_found_types(tmp_path).nunique()
    assert f"{72 - kept} of 72 types ended without a training cell" in done.stdout


def test_mixture_kl_is_the_best_bound():
    """It equals sum_k q(k|x) KL_k + KL(q(k|x) || pi), and the returned q minimises that."""
    torch.manual_seed(0)
    model = scGMVAE(20, 3, 4, 8, "nb", 0.0)
    model.mu.data, model.log_var.data = torch.randn(3, 4), torch.randn(3, 4) * 0.3
    mean, var = torch.randn(7, 4), torch.rand(7, 4) + 0.2
    weight = torch.tensor([0.5, 0.3, 0.2])
    kl, q = model.mixture_kl(mean, var, weight.log())
    component_kl = torch.stack([model.kl(mean, var, torch.full((7,), k)) for k in range(3)], dim=1)

    def bound(q):
        return (q * (component_kl + q.log() - weight.log())).sum(dim=1)

    torch.testing.assert_close(kl, bound(q))
    other_q = torch.softmax(q.log() + 0.3 * torch.randn(7, 3), dim=1)
    assert (bound(other_q) > kl).all()
    # A component of weight zero adds nothing, and its parameters get no gradient.
    kl, q = model.mixture_kl(mean, var, torch.tensor([0.0, -torch.inf, -torch.inf]))
    torch.testing.assert_close(kl, component_kl[:, 0])
    kl.sum().backward()
    assert torch.isfinite(model.mu.grad).all() and (model.mu.grad[1:] == 0).all()
    # The closed form for one-dimensional normals.
    kl_1d = normal_kl(*(torch.tensor([x]) for x in (1.0, 4.0, 0.0, 1.0)))
    assert kl_1d.item() == pytest.approx(0.5 * (4 - np.log(4) + 1 - 1))


# ------------------------------------------------------------------------ order of components


@pytest.fixture
def external_mixture(tmp_path):
    """The mixture of the shipped weights as two files, without scGMVAE_model.pt."""
    for name in MIXTURE_FILES:
        shutil.copy(ROOT / "weights" / name, tmp_path)
    return tmp_path


def test_order_of_foreign_components_is_said_and_checked(external_mixture):
    flags = ["--weights", external_mixture, "--epochs", 1]

    def correlation(done):
        assert done.returncode == 0, done.stderr[-2000:]
        line = next(x for x in done.stdout.splitlines() if "correlation" in x)
        return float(line.split()[-1])

    done = run_inside("train_decoder.py", *flags)
    original = correlation(done)
    assert original > 0.7 and "warning" not in done.stderr
    listing = next(line for line in done.stdout.splitlines() if " 0 = " in line)
    types = [part.split(" = ")[1] for part in listing.split("cell types: ")[1].split("; ")]
    # Permute the components in both files.
    order = np.random.default_rng(0).permutation(len(types))
    for name in MIXTURE_FILES:
        value = torch.load(external_mixture / name, weights_only=True)
        torch.save(value[:, :, order].contiguous(), external_mixture / name)
    done = run_inside("train_decoder.py", *flags)
    assert correlation(done) < original - 0.2
    warning = next(line for line in done.stderr.splitlines() if "warning" in line)
    suggested = shlex.split(warning.split("--components ")[1])
    names = [types[k] for k in order]
    # T cells lie so close together that distances do not tell their types apart.
    merged = [
        ["T" if name.startswith(("CD4+", "CD8+")) else name for name in part]
        for part in (suggested, names)
    ]
    assert sorted(suggested) == sorted(names)
    assert np.mean(np.array(merged[0]) == merged[1]) > 0.6  # by chance 0.3
    # The search finds an order that fits the distances as well as the right one does.
    assert float(warning.split(" it is ")[1].split(":")[0]) >= original - 0.01
    done = run_inside("train_decoder.py", *flags, "--components", *names)
    assert correlation(done) == original and "warning" not in done.stderr
    assert f"0 = {names[0]}; 1 = {names[1]}; " in done.stdout
    # Stage 3 takes the order of components from stage 2.
    done = run_inside("train_encoder.py", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    decoder, card = load_model(external_mixture / "scDecoder_model.pt", scDecoder)
    assert [card["cell_types"][k] for k in np.argsort(card["components"])] == names
    encoder, _ = load_model(external_mixture / "bulkEncoder_model.pt", BulkEncoder)
    assert torch.equal(encoder.mu, decoder.mu)
    done = run_inside(
        "bulk2sc.py", "--weights", external_mixture, "--out", external_mixture / "out.h5ad"
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_bad_components_end_in_one_line(external_mixture, trained, h5ad):
    done = run_inside(
        "train_decoder.py", "--weights", external_mixture, "--components", "Dendritic", "x"
    )
    assert_one_line_error(done, "--components", "x not among", "CD56+ NK")
    done = run_inside(
        "train_decoder.py", "--weights", external_mixture, "--components", *["Dendritic"] * 10
    )
    assert_one_line_error(done, "--components", "10 (1 different)", "each of the 10")
    done = run_inside(
        "train_decoder.py", "--data", h5ad, "--weights", trained, "--components", *CELL_TYPES
    )
    assert_one_line_error(done, "--components", "scGMVAE_model.pt")
    assert not (external_mixture / "scDecoder_model.pt").exists()


def test_barcodes_that_do_not_match_are_counted_and_shown(tmp_path, unlabelled):
    cells = make_cells()
    write_labels(tmp_path / "labels.csv", cells)
    text = (tmp_path / "labels.csv").read_text().replace("-1,", "-7,")
    (tmp_path / "labels.csv").write_text(text)
    arguments = ["--data", unlabelled, "--labels", tmp_path / "labels.csv"]
    done = run_inside("train_gmvae.py", *arguments)
    first = [line.split(",")[0] for line in text.splitlines()[1:3]]
    assert_one_line_error(done, "none of its 90 barcodes", *first, *cells.obs_names[:2])
