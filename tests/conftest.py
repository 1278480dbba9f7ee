"""Synthetic cells small enough to train on in seconds, and a way to run the real scripts."""

import contextlib
import gzip
import importlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import anndata
import hypothesis
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from filelock import FileLock

# One thread for each of the tests that run side by side; read when torch is imported. Numba's, too:
# its first parallel loop (in scanpy's neighbours) gives OpenMP, and with it torch, as many as it
# has itself, and two trainings of two threads each on two cores take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from readers import backed, bulk, counts, hdf5_probe  # noqa: E402  not an installed package
from runtime.script import parse_args, run_script  # noqa: E402

CELL_TYPES = ["B cells", "CD4+/CD25 T", "Natural killer  cells"]  # slash, two blanks: real names


def make_cells(n_per_type=(40, 30, 20), n_genes=60, seed=0):
    """Negative binomial cells of a few types, each with a block of marker genes of its own."""
    names = CELL_TYPES if len(n_per_type) == 3 else [f"type {k}" for k in range(len(n_per_type))]
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(len(n_per_type)), n_per_type)
    profile = rng.gamma(1.0, 1.0, (len(n_per_type), n_genes))
    block = n_genes // len(n_per_type)
    for k in range(len(n_per_type)):
        profile[k, k * block : k * block + block // 2] *= 8
    profile /= profile.sum(axis=1, keepdims=True)
    mean = profile[codes] * rng.lognormal(6, 0.3, len(codes))[:, None]
    X = rng.poisson(mean * rng.gamma(5, 1 / 5, mean.shape)).astype(np.int32)
    obs = pd.DataFrame(index=[f"CELL{i:03d}-1" for i in range(len(codes))])
    obs["cell_type"] = np.array(names)[codes]
    order = rng.permutation(len(codes))  # types are not sorted, as in real data
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)])
    var["gene_ids"] = [f"ENSG{i:011d}" for i in range(n_genes)]
    return anndata.AnnData(sp.csr_matrix(X), obs=obs, var=var)[order].copy()


def write_10x(folder, adata, layout="new"):
    """Write a 10x folder by hand, so that the reader is not tested against a writer of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"ENSG{i:011d}\t{g}" for i, g in enumerate(adata.var_names)]
    if layout == "new":
        rows = [r + "\tGene Expression" for r in rows]
    names = {
        "matrix.mtx": None,
        "barcodes.tsv": "\n".join(adata.obs_names) + "\n",
        ("features.tsv" if layout == "new" else "genes.tsv"): "\n".join(rows) + "\n",
    }
    for name, text in names.items():
        if text is None:
            scipy.io.mmwrite(folder / name, sp.coo_matrix(adata.X.T).astype(np.int32))
            text = (folder / name).read_text()
            (folder / name).unlink()
        if layout == "new":
            with gzip.open(folder / f"{name}.gz", "wt") as file:
                file.write(text)
        else:
            (folder / name).write_text(text)
    return folder


def write_10x_h5(path, adata, layout="new"):
    """The layout of Cell Ranger 3, or 2 (a group named by the genome, and no kinds of features)."""
    import h5py

    X = sp.csc_matrix(adata.X.T)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if layout == "new" else "GRCh38")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(X, name)
        group["shape"] = np.array(X.shape)
        group["barcodes"] = np.array(adata.obs_names, dtype="S")
        if layout == "old":
            group["genes"] = np.array(adata.var["gene_ids"], dtype="S")
            group["gene_names"] = np.array(adata.var_names, dtype="S")
            return
        features = group.create_group("features")
        features["name"] = np.array(adata.var_names, dtype="S")
        features["id"] = np.array(adata.var["gene_ids"], dtype="S")
        features["feature_type"] = np.array(["Gene Expression"] * adata.n_vars, dtype="S")
        features["genome"] = np.array(["GRCh38"] * adata.n_vars, dtype="S")


def write_labels(path, adata, header=True):
    lines = ["barcode,cell_type"] * header
    lines += [f"{b},{t}" for b, t in zip(adata.obs_names, adata.obs["cell_type"], strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(script, *arguments, cwd=ROOT, check=True):
    """Run one of the project's scripts as a user does; returns the finished process."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=600, env=environment
    )
    if check:
        assert done.returncode == 0, done.stderr[-2000:]
    return done


def run_inside(script, *arguments, cwd=ROOT):
    """As :func:`run`, but within this process: for the many ways to fail, which need no new one."""
    module = importlib.import_module(script.removesuffix(".py"))
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    code = 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", [script, *map(str, arguments)]),
    ):
        os.chdir(cwd)
        try:
            run_script(module.main, parse_args(module.Settings))
        except SystemExit as exit_:
            code = exit_.code
        finally:
            os.chdir(before)
    if isinstance(code, str):  # what the interpreter does with sys.exit("message")
        code, err = 1, io.StringIO(err.getvalue() + code + "\n")
    return subprocess.CompletedProcess(script, code or 0, out.getvalue(), err.getvalue())


def assert_one_line_error(done, *words):
    """The process failed with a single line on stderr that names what is wrong."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert str(word) in lines[0], f"{word!r} not in {lines[0]!r}"


# Random inputs of test_properties.py: the same ones each time, so that only a change makes a test
# fail; HYPOTHESIS_PROFILE=long looks at many more, new ones each time.
hypothesis.settings.register_profile(
    "default", derandomize=True, deadline=None, print_blob=True, max_examples=20
)
hypothesis.settings.register_profile("long", deadline=None, print_blob=True, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Batches of eight: ninety cells must give enough steps for the means and dispersions to settle.
TINY = {
    "train_gmvae.py": [
        *("--epochs", 60, "--vae-epochs", 20, "--batch-size", 8, "--n-hidden", 32, "--n-latent", 5)
    ],
    "train_decoder.py": ["--epochs", 60, "--batch-size", 8, "--n-hidden", 32],
    "train_encoder.py": ["--epochs", 200, "--batch-size", 32, "--n-hidden", 64, "--lr", 2e-3],
}


# For tests that look at shapes and files, not at what was learned.
QUICK = TINY | {
    "train_gmvae.py": [*TINY["train_gmvae.py"], "--epochs", 6, "--vae-epochs", 2],
    "train_decoder.py": [*TINY["train_decoder.py"], "--epochs", 6],
    "train_encoder.py": [*TINY["train_encoder.py"], "--epochs", 20],
}


def train(*where, settings=TINY, **extra):
    """Run the three trainings within this process; extra: further flags by the script's stem."""
    for script, own in settings.items():
        more = extra.get(script.removesuffix(".py"), [])
        done = run_inside(script, *where, *own, *more)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(autouse=True)
def hdf5_in_this_process(request, monkeypatch):
    """HDF5 files are looked through right here, half a second faster each.

    The scripts' own processes, test_untrusted.py and test_fuzz.py do it as it is meant.
    """
    if request.path.stem != "test_untrusted":
        for module in (counts, bulk, backed):
            monkeypatch.setattr(module, "check_hdf5", hdf5_probe.look_through)


@pytest.fixture
def cells():
    return make_cells()


@pytest.fixture(scope="session")
def h5ad(tmp_path_factory):
    """A file of synthetic cells with labels in .obs["cell_type"]."""
    path = tmp_path_factory.mktemp("data") / "cells.h5ad"
    make_cells().write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, h5ad, worker_id):
    """A weights folder made by the three real scripts with tiny settings.

    Made by the first of the pytest workers that needs it; each has a copy of its own.
    """
    weights, own = tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("weights")
    weights = (weights if worker_id == "master" else weights.parent) / "trained"
    with FileLock(f"{weights}.lock"):
        if not (weights / "bulkEncoder_loss.png").exists():  # the last file of the last stage
            for script, settings in TINY.items():
                run(script, "--data", h5ad, "--weights", weights, *settings)
    shutil.copytree(weights, own, dirs_exist_ok=True)
    return own
