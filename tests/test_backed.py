"""Tests of ``--backed``: counts that stay in their .h5ad and are read block by block."""

import shutil
import signal

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from conftest import QUICK, assert_one_line_error, make_cells, run_inside, train
from data import (
    Reference,
    TrainingSettings,
    align_genes,
    library_size,
    load_cells,
    mean_counts,
    sum_by_type,
)
from distributions.fits import mean_profile
from readers import backed
from readers.backed import sample_in_memory
from runtime.weights import load_tensors
from test_interruption import same_weights, stop_at

STAGES = ("train_gmvae.py", "train_decoder.py", "train_encoder.py")
MODELS = ("scGMVAE", "scDecoder", "bulkEncoder")


@pytest.fixture
def many():
    """More cells than one block holds, one of them without a label."""
    cells = make_cells((260, 240, 150), n_genes=40)
    cells.obs.loc[cells.obs_names[7], "cell_type"] = "Unknown"
    return cells


def write(path, cells, form="sparse"):
    """Write an .h5ad with the counts in one of the places where they are looked for."""
    cells = cells.copy()
    log = cells.X.astype(np.float32)
    log.data = np.log1p(log.data)
    if form == "dense":
        cells.X = cells.X.toarray()
    elif form == "layer":
        cells.layers["counts"], cells.X = cells.X, log
    elif form == "raw":
        cells.raw, cells.X = cells, log
    elif form == "csc":
        cells.X = sp.csc_matrix(cells.X)
    cells.write_h5ad(path, compression="gzip")
    return path


def load(path, **settings):
    return load_cells(TrainingSettings(data=str(path), **settings))


def small_buffer(monkeypatch, block=32, n_blocks=3):
    """Make blocks and buffer so small that a few hundred cells fill the buffer many times."""
    monkeypatch.setattr(backed, "BLOCK", block)
    monkeypatch.setattr(backed, "BUFFER", n_blocks * block * 8 * 40)  # of 40 genes, all expressed


@pytest.mark.parametrize("form", ["sparse", "dense", "layer", "raw"])
def test_cells_are_those_in_memory(tmp_path, monkeypatch, many, form):
    small_buffer(monkeypatch)
    path = write(tmp_path / "cells.h5ad", many, form)
    on_disk, in_memory = load(path, backed=True), load(path)
    assert list(on_disk.obs_names) == list(in_memory.obs_names) and on_disk.n_obs == many.n_obs - 1
    assert (on_disk.var == in_memory.var).all(axis=None)
    codes, same = Reference.of(on_disk).codes, Reference.of(in_memory)
    assert (codes == same.codes).all() and Reference.of(on_disk).cell_types == same.cell_types
    assert (library_size(on_disk.X) == library_size(in_memory.X)).all()
    assert (mean_counts(on_disk.X, codes, 3) == mean_counts(in_memory.X, codes, 3)).all()
    rows = np.random.default_rng(0).permutation(on_disk.n_obs)[:200]
    assert (on_disk.X[rows] != in_memory.X[rows]).nnz == 0
    assert on_disk.X[rows[:0]].shape == (0, on_disk.n_vars)
    assert (on_disk.X.only(rows)[np.arange(9)] != in_memory.X[rows[:9]]).nnz == 0
    assert (mean_profile(on_disk.X, rows) == mean_profile(in_memory.X[rows])).all()
    wanted = [*on_disk.var_names[[5, 3, 30]], "absent"]
    genes = [
        align_genes(cells.X, cells.var_names, wanted, path)[0] for cells in (on_disk, in_memory)
    ]
    assert genes[0].shape == genes[1].shape and (genes[0][rows] != genes[1][rows]).nnz == 0
    assert (on_disk[:, [4, 2]].X[rows] != in_memory.X[rows][:, [4, 2]]).nnz == 0


def test_an_epoch_reads_each_block_once_and_mixes_the_file(tmp_path, monkeypatch, many):
    small_buffer(monkeypatch)
    X = load(write(tmp_path / "cells.h5ad", many), backed=True).X
    read, kept = [], []
    really = backed.BackedCounts.read
    monkeypatch.setattr(backed.BackedCounts, "read", lambda X, n: (read.append(n), really(X, n))[1])
    rows = np.flatnonzero(np.arange(X.shape[0]) % 5)
    rng = np.random.default_rng(0)
    order = X.shuffled(rows, rng)
    assert sorted(order) == list(rows)
    assert (order != X.shuffled(rows, rng)).any()
    n_blocks = X.file_row[-1] // 32 + 1
    for batch in np.array_split(order, 60):
        X[batch]
        kept.append(len(X.blocks))
    assert sorted(read) == list(range(n_blocks)) and max(kept) == X.n_kept < n_blocks / 4
    # All the blocks of a bufferful take part from the first batch on, and they are not neighbours.
    first = np.unique(X.file_row[order[: X.n_kept * 20]] // 32)
    assert len(first) == X.n_kept and np.diff(first).max() > 1


def test_what_fits_is_shuffled_as_in_memory(tmp_path, many):
    X = load(write(tmp_path / "cells.h5ad", many), backed=True).X
    rows = np.arange(3, X.shape[0])
    order = np.random.default_rng(1).permutation(rows)
    assert (X.shuffled(rows, np.random.default_rng(1)) == order).all()


def test_samples_keep_rare_types(tmp_path, monkeypatch):
    cells = make_cells((3000, 1500, 20), n_genes=12)
    path = write(tmp_path / "cells.h5ad", cells)
    on_disk = load(path, backed=True)
    monkeypatch.setattr(backed, "BUFFER", 1000 * on_disk.X.cell_bytes)
    codes = Reference.of(on_disk).codes
    sample, rows = sample_in_memory(on_disk, codes, np.random.default_rng(0), "genes")
    assert list(np.bincount(codes[rows])) == [664, 500, 20]
    in_memory = load(path)
    assert (in_memory.X[rows] != sample.X).nnz == 0 and list(sample.obs_names) == list(
        in_memory.obs_names[rows]
    )
    assert sample_in_memory(in_memory, codes, None, "genes")[0] is in_memory


def test_sums_over_types_are_exact(many):
    codes = np.arange(many.n_obs) % 3
    pairs = sum_by_type(many.X, codes, 4, lambda X: X.multiply(X) - X)
    dense = many.X.toarray().astype(np.int64)
    expected = [(dense[codes == k] * (dense[codes == k] - 1)).sum(axis=0) for k in range(4)]
    assert (pairs == expected).all() and not pairs[3].any()


def tensors(folder):
    return [load_tensors(folder / f"{name}_model.pt", name)["state"] for name in MODELS]


def test_trainings_are_those_in_memory(tmp_path, many):
    """All cells fit into one bufferful here, so the weights are equal to the bit."""
    path = write(tmp_path / "cells.h5ad", many)
    for folder, flags in (("memory", []), ("file", ["--backed"])):
        train("--data", path, "--weights", tmp_path / folder, *flags, settings=QUICK)
    for a, b in zip(tensors(tmp_path / "memory"), tensors(tmp_path / "file"), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_trainings_with_a_small_buffer(tmp_path, monkeypatch):
    """More cells than the buffer holds: the losses are about those of cells in memory.

    Two types, which always part; whether three do within so few steps hinges on chance.
    """
    path = write(tmp_path / "cells.h5ad", make_cells((340, 310), n_genes=40))
    settings = QUICK | {STAGES[0]: [*QUICK[STAGES[0]], "--epochs", 12]}  # enough to settle
    train("--data", path, "--weights", tmp_path / "memory", settings=settings)
    small_buffer(monkeypatch)
    for script in STAGES:
        where = ["--data", path, "--weights", tmp_path / "file", "--backed"]
        done = run_inside(script, *where, *settings[script])
        assert done.returncode == 0, done.stderr
        if script == "train_encoder.py":
            assert "pseudobulks: from " in done.stdout and " of 650 cells" in done.stdout
    for name in MODELS[:2]:
        memory, file = (loss_curve(tmp_path / folder, name) for folder in ("memory", "file"))
        assert file[-1] == pytest.approx(memory[-1], rel=0.02) and memory[-1] < 0.9 * memory[0]
        assert (file != memory).any()  # other batches, or nothing was compared
    card = load_tensors(tmp_path / "file" / "bulkEncoder_model.pt", "weights")
    decoder = load_tensors(tmp_path / "file" / "scDecoder_model.pt", "weights")
    assert card["held_out"] == decoder["held_out"]


def loss_curve(folder, name):
    """Training loss per cell of each epoch (E)."""
    return np.genfromtxt(folder / f"{name}_loss.csv", delimiter=",", names=True)["reconstruction"]


def test_stopped_run_resumes_to_the_same_weights(tmp_path, monkeypatch, many):
    """Within an epoch, of which some bufferfuls were read."""
    small_buffer(monkeypatch)
    where = ["--data", write(tmp_path / "cells.h5ad", many), "--backed", "--weights"]
    gmvae, decoder = STAGES[:2]
    assert run_inside(gmvae, *where, tmp_path / "one", *QUICK[gmvae]).returncode == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert run_inside(decoder, *where, tmp_path / "one", *QUICK[decoder]).returncode == 0
    resume = [*where, tmp_path / "two", *QUICK[decoder], "--resume"]
    with monkeypatch.context() as patch:
        stop_at(patch, signal.SIGTERM, 100)
        assert run_inside(decoder, *resume).returncode == 128 + signal.SIGTERM
    assert run_inside(decoder, *resume).returncode == 0
    assert same_weights(tmp_path / "two", tmp_path / "one", decoder)


# ------------------------------------------------------------------------------------ bad input


def refused(path, *words, tmp_path):
    done = run_inside("train_gmvae.py", "--data", path, "--weights", tmp_path / "w", "--backed")
    assert_one_line_error(done, *words)
    assert not list((tmp_path / "w").glob("*.pt"))


def test_only_an_h5ad_can_be_backed(tmp_path):
    refused("pbmc68k_reduced", "--backed", "expected an .h5ad", tmp_path=tmp_path)


def test_counts_kept_gene_by_gene(tmp_path, many):
    path = write(tmp_path / "cells.h5ad", many, "csc")
    refused(path, path, "CSC", "expected CSR", tmp_path=tmp_path)


def test_no_counts(tmp_path, many):
    many.X = many.X.astype(np.float32)
    many.X.data[-1] = 0.5
    path = write(tmp_path / "cells.h5ad", many)
    refused(path, "found 0.5", many.obs_names[-1], "expected raw counts", tmp_path=tmp_path)


def broken(path, many, change):
    write(path, many)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


@pytest.mark.parametrize(
    ("name", "position", "value"),
    [("indptr", 5, 10**9), ("indptr", -1, 3), ("indptr", 0, 4), ("indices", 100, 10**6)],
)
def test_an_index_beyond_the_matrix(tmp_path, many, name, position, value):
    def change(file):
        values = file["X"][name][()]
        values[position] = value
        file["X"][name][...] = values

    path = broken(tmp_path / "cells.h5ad", many, change)
    refused(path, path, "broken sparse matrix", tmp_path=tmp_path)


def test_no_matrix_at_all(tmp_path, many):
    def change(file):
        del file["X"]

    path = broken(tmp_path / "cells.h5ad", many, change)
    refused(path, path, "no matrix", tmp_path=tmp_path)


def test_a_block_that_is_too_large(tmp_path, monkeypatch, many):
    path = write(tmp_path / "cells.h5ad", many)
    monkeypatch.setattr(backed, "BUFFER", 1e4)
    refused(path, path, "can only be read at once", tmp_path=tmp_path)


def test_an_h5ad_without_cells(tmp_path):
    path = tmp_path / "none.h5ad"
    anndata.AnnData(sp.csr_matrix((0, 5), dtype=np.int32)).write_h5ad(path)
    refused(path, path, "found 0 cells", tmp_path=tmp_path)


@pytest.mark.parametrize("rows", [[], [5, 300, 2, 299]])
def test_rows_read_once_are_those_of_the_file(tmp_path, many, rows):
    path, asked = write(tmp_path / "cells.h5ad", many), rows[::-1][:3]
    cells = backed.read_backed(path)
    try:
        for X in (many.X.tocsr(), cells.X):
            kept = backed.RowsInMemory(X, np.array(rows, int))
            assert np.array_equal(kept[np.array(asked, int)].toarray(), many.X[asked].toarray())
    finally:
        cells.X.close()
