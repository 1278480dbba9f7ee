"""Training in two processes of torchrun on the CPU: same result as in one, and a common end."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import scipy.sparse as sp
import torch
import torch.distributed as dist

import training
from conftest import ROOT, TINY, run_inside
from models import Dropout
from runtime import processes
from runtime.device import to_sparse
from test_interruption import FILE, UNIT, left_behind, same_weights, start_folder

# Batches that do not split evenly, and batches of one cell, of which one process gets none.
SHORT = {
    "train_gmvae.py": ["--epochs", 30, "--vae-epochs", 10, "--batch-size", 7],
    "train_decoder.py": ["--epochs", 1, "--batch-size", 1],
    "train_encoder.py": ["--steps", 26, "--batch-size", 5],
}


def arguments(script, h5ad, weights):
    return ["--data", h5ad, "--weights", weights, *TINY[script], *SHORT[script]]


def start_two(script, *flags):
    """Start a training in two processes.

    Returns:
        the process of torchrun, whose stderr is a pipe, and the process id of rank 1.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    process = subprocess.Popen(
        list(map(str, [*command, ROOT / script, *flags])),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    started = time.time()
    while time.time() < started + 60 and process.poll() is None:
        for child in psutil.Process(process.pid).children():
            try:
                if child.environ().get("LOCAL_RANK") == "1":
                    return process, child.pid
            except psutil.Error:  # still starting, or already gone
                continue
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1][-2000:])


def final_messages(process):
    """Wait for the end; returns the lines on stderr of the trainings, without torchrun's."""
    lines = process.communicate(timeout=120)[1].replace("\r", "\n").splitlines()
    return [line for line in lines if re.match(r"(error|interrupted)\b", line)]


def assert_files_close(folder, other, script):
    """The files of a stage in two folders agree up to rounding."""
    name = FILE[script][0]
    state, other_state = (
        torch.load(path / f"{name}_model.pt", weights_only=True)["state"]
        for path in (folder, other)
    )
    assert state.keys() == other_state.keys()
    for key in state:
        torch.testing.assert_close(state[key], other_state[key], rtol=1e-3, atol=1e-4, msg=key)
    curves = [pd.read_csv(path / f"{name}_loss.csv") for path in (folder, other)]
    pd.testing.assert_frame_equal(*curves, rtol=1e-4)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in other.iterdir())


@pytest.fixture
def folders(tmp_path, trained):
    """A function that makes a folder by :func:`start_folder`."""

    def make(script, name):
        (tmp_path / name).mkdir()
        return start_folder(tmp_path / name, trained, script)

    return make


@pytest.mark.parametrize(
    "script", ["train_decoder.py", pytest.param("train_encoder.py", marks=pytest.mark.slow)]
)
def test_two_processes_train_as_one(folders, h5ad, script):
    one, two = folders(script, "one"), folders(script, "two")
    assert run_inside(script, *arguments(script, h5ad, one)).returncode == 0
    process, _ = start_two(script, *arguments(script, h5ad, two))
    assert final_messages(process) == [] and process.returncode == 0
    assert_files_close(two, one, script)


@pytest.mark.slow
def test_one_that_ends_ends_both_and_resume_goes_on(folders, h5ad):
    """Rank 1 gets a signal, then is killed; both ranks end, and a single process resumes."""
    script = "train_gmvae.py"
    one, two = folders(script, "one"), folders(script, "two")
    assert run_inside(script, *arguments(script, h5ad, one)).returncode == 0
    flags = [*arguments(script, h5ad, two), "--resume", "--checkpoint-every", 0]
    checkpoint = two / "scGMVAE_checkpoint.pt"
    for number, expected in (
        (signal.SIGTERM, "interrupted (SIGTERM) at epoch "),
        (signal.SIGKILL, "error: another process of this training has ended"),
    ):
        process, rank_1 = start_two(script, *flags)
        old_time, started = checkpoint.exists() and checkpoint.stat().st_mtime_ns, time.time()
        while process.poll() is None and time.time() < started + 60:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != old_time:
                break
            time.sleep(0.01)
        os.kill(rank_1, number)
        [message] = final_messages(process)
        assert message.startswith(expected) and "--resume" in message and process.returncode == 1
        assert not (two / "scGMVAE_model.pt").exists()
        assert left_behind(two) == ["scGMVAE_checkpoint.pt"]
    assert run_inside(script, *flags).returncode == 0  # one process resumes what two began
    assert_files_close(two, one, script)


def test_one_process_says_what_went_wrong(monkeypatch):
    """Rank 0 if it fails as well; otherwise another rank, after waiting for it."""
    monkeypatch.setattr(processes, "PATIENCE", timedelta(seconds=0.2))
    store = dist.HashStore()
    assert [processes.claims_report(store, rank) for rank in (0, 1, 2)] == [True, False, False]
    store = dist.HashStore()
    assert [processes.claims_report(store, rank) for rank in (2, 0, 1)] == [True, False, False]


@pytest.mark.parametrize("n, size", [(7, 2), (1, 3), (8, 4)])
def test_parts_and_masks_make_up_the_whole_batch(monkeypatch, n, size):
    monkeypatch.setattr(Dropout, "part", None)
    x, parts = torch.randn(n, 5), []
    torch.manual_seed(0)
    whole = Dropout(0.5)(x)
    for rank in range(size):
        group = processes.ProcessGroup("cpu")
        group.rank, group.size = rank, size
        part = training.TrainingRun.part(SimpleNamespace(group=group), n)
        torch.manual_seed(0)
        parts.append(Dropout(0.5)(x[part]))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("script", TINY)
def test_losses_looked_at_late_as_on_a_gpu_change_nothing(folders, h5ad, monkeypatch, script):
    """Losses are fetched from a GPU only every 20 steps."""
    each_step, every_20 = folders(script, "each_step"), folders(script, "every_20")
    few = ["--epochs", 12, "--vae-epochs", 4] if script == "train_gmvae.py" else []
    assert run_inside(script, *arguments(script, h5ad, each_step), *few).returncode == 0
    # A property of the class, so that ``self.read_every = ...`` in the training has no effect.
    monkeypatch.setattr(
        training.TrainingRun, "read_every", property(lambda run: 20, lambda run, _: None), False
    )
    flags = [*arguments(script, h5ad, every_20), *few, "--checkpoint-every", 0]
    assert run_inside(script, *flags).returncode == 0
    assert same_weights(every_20, each_step, script)
    done = run_inside(script, *flags, "--lr", 1e18)
    assert f" diverged at {UNIT[script]} " in done.stderr.strip().splitlines()[-1]


def test_sparse_counts_become_tensors(cells):
    X = sp.csr_matrix(cells.X)
    rows = np.array([3, 1, 2])
    assert to_sparse(X, rows, "cpu").to_dense().tolist() == X[rows].toarray().tolist()
    assert to_sparse(X, rows[:0], "cpu").shape == (0, cells.n_vars)
    with_duplicates = sp.csr_matrix(([1, 2], [3, 3], [0, 2]), shape=(1, 5))
    tensor = to_sparse(with_duplicates, [0], "cpu")
    assert tensor.values().tolist() == [3] and tensor.to_dense().tolist() == [[0, 0, 0, 3, 0]]
