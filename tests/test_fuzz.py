"""Fuzzing of the readers: a randomly broken file is read, or refused in one line that names it.

A normal test run has 50 cases, ``python -m pytest -m slow tests/test_fuzz.py`` 12,000. A case
depends on its number alone: ``python tests/test_fuzz.py 123`` runs and shows number 123.
"""

import faulthandler
import gzip
import importlib
import io
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from unittest import mock

import anndata
import numpy as np
import pandas as pd
import psutil
import pytest
import torch

import annotate
import training
from conftest import ROOT, make_cells, run_inside, write_10x, write_10x_h5, write_labels
from data import DatasetSettings, TrainingSettings, load_cells
from distributions.fits import mean_profile
from generation import Model
from models import BulkEncoder, scDecoder, scGMVAE
from readers import lineages
from readers.bulk import read_bulk
from runtime.errors import InputError, plain, some
from runtime.weights import load_mixture, load_model

SECONDS = 30  # time limit of a case
MEMORY = 3 << 30  # bytes that the cases may add to the process
TOKENS = [
    *(b"\0", b"-1", b"-", b"nan", b"inf", b"1e308", b"1e-308", b"0.5", b"99999999999999999999"),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b"\n", b"\r", b"\t", b",", b";", b"#", b" ", b"%"),
    *(b"=cmd|' /C calc'!A0", "Zürich".encode("latin-1"), "\u2028".encode(), b"\x1b[31m", b"/"),
    *(b"../../../etc/passwd", b"4294967296", b"2147483648", b"0", b"1#2.3", b"NA", b"Unknown"),
]


# ------------------------------------------------------------------------------ valid files


def prepare(folder):
    """Write a small valid file of every format that is read; returns the folder of weights."""
    cells = make_cells((12, 10, 8), n_genes=24)
    cells.obs["sample"] = [f"s{i % 5}" for i in range(cells.n_obs)]
    cells.obs["condition"] = [f"c{i % 5 % 2}" for i in range(cells.n_obs)]
    prepare_cells(folder, cells)
    prepare_bulks(folder)
    prepare_tables(folder, sorted(set(cells.obs["cell_type"])))
    return prepare_weights(folder)


def prepare_cells(folder, cells):
    (folder / "new").mkdir()
    write_10x(folder / "new", cells)
    write_10x(folder / "old", cells, layout="old")
    write_labels(folder / "new" / "barcode_to_celltype.csv", cells)
    write_labels(folder / "old" / "barcode_to_celltype.csv", cells)
    write_10x_h5(folder / "cells.h5", cells)
    write_labels(folder / "labels.csv", cells)
    cells.write_h5ad(folder / "sparse.h5ad")
    dense = anndata.AnnData(np.log1p(cells.X.toarray()), obs=cells.obs, var=cells.var)
    dense.layers["counts"] = cells.X.toarray()
    dense.write_h5ad(folder / "dense.h5ad", compression="gzip")


def prepare_bulks(folder):
    cells = make_cells((2, 1, 1), n_genes=24)
    cells.write_h5ad(folder / "bulk.h5ad")
    bulk = cells.to_df().T
    bulk.to_csv(folder / "bulk.csv")
    bulk.to_csv(folder / "bulk.tsv.gz", sep="\t")
    gct = bulk.rename_axis("Name")
    gct.insert(0, "Description", "na")
    text = f"#1.2\n{bulk.shape[0]}\t{bulk.shape[1]}\n" + gct.to_csv(sep="\t")
    (folder / "bulk.gct").write_text(text)


def prepare_tables(folder, types):
    rows = [["Blood", t, "GENE1,GENE2", "GENE3"] for t in ("B cells", "T cells")]
    table = pd.DataFrame(rows, columns=annotate.COLUMNS)
    table.to_csv(folder / "markers.csv", index=False)
    table.to_excel(folder / "markers.xlsx", index=False)
    (folder / "lineages.csv").write_text(
        "cell_type,lineage\n" + "".join(f"{t},L{i}\n" for i, t in enumerate(types))
    )
    lines = ["sample," + ",".join(types)]
    lines += [f"s{i},0.5,0.3,0.2" for i in range(4)]
    (folder / "fractions.csv").write_text("\n".join(lines) + "\n")


def prepare_weights(folder):
    """Train small models; returns the folder, in which the checkpoints are left."""
    weights = folder / "weights"
    tiny = {
        "train_gmvae.py": ["--n-hidden", 4, "--n-latent", 3, "--epochs", 2, "--vae-epochs", 1],
        "train_decoder.py": ["--n-hidden", 4, "--epochs", 2],
        "train_encoder.py": ["--n-hidden", 4, "--steps", 2, "--batch-size", 4],
    }
    for script, flags in tiny.items():
        where = ["--data", folder / "sparse.h5ad", "--weights", weights]
        where += ["--samples", "sample", "--conditions", "condition"]
        with mock.patch.object(training.TrainingRun, "remove_checkpoint"):
            done = run_inside(script, *where, *flags)
        assert done.returncode == 0, done.stderr
    return weights


# -------------------------------------------------------------------------------- mutations


def mutate(data, rng):
    """Change bytes in one to three random ways; returns them and a description."""
    changes = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data, change = mutate_once(data, rng)
        changes.append(change)
    return data, "; ".join(changes)


def mutate_once(data, rng):
    """Change bytes in one random way; returns them and a description."""
    n = len(data)
    a, b = sorted(int(i) for i in rng.integers(0, n + 1, 2))
    b = min(b, a + int(2 ** rng.uniform(0, 12)))
    way = rng.integers(9)
    if way == 0:
        return data[:a], f"cut at {a} of {n}"
    if way in (1, 2) and n:
        flipped = bytearray(data)
        bits = rng.integers(0, 8 * n, int(2 ** rng.uniform(0, 4)))
        for bit in bits:
            flipped[bit // 8] ^= 1 << (bit % 8)
        return bytes(flipped), f"{len(bits)} bits flipped"
    if way == 3:
        return data[:a] + rng.bytes(b - a) + data[b:], f"noise in {a}:{b}"
    if way == 4:
        return data[:a] + data[b:], f"{a}:{b} removed"
    if way == 5:
        return data[:b] + data[a:b] + data[b:], f"{a}:{b} doubled"
    if way == 6:
        c = int(rng.integers(0, n + 1))
        return data[:c] + data[a:b] + data[c:], f"{a}:{b} copied to {c}"
    token = TOKENS[rng.integers(len(TOKENS))]
    n_replaced = len(token) * int(rng.integers(2))
    return data[:a] + token + data[a + n_replaced :], f"{token!r} at {a}"


def mutate_file(path, rng):
    """Change a file in place, or what is compressed in it; returns a description."""
    data = path.read_bytes()
    inside = rng.random() < 0.6
    if inside and data[:2] == b"\x1f\x8b":
        changed, change = mutate(gzip.decompress(data), rng)
        path.write_bytes(gzip.compress(changed))
        return f"unpacked: {change}"
    if inside and zipfile.is_zipfile(path):
        return mutate_archive(path, rng)
    changed, change = mutate(data, rng)
    path.write_bytes(changed)
    return change


def mutate_archive(path, rng):
    """Change a file in a zip archive; returns a description."""
    with zipfile.ZipFile(path) as file:
        packed = {name: file.read(name) for name in file.namelist()}
    names = list(packed)
    # Mostly the pickle, if there is one: tensors are only numbers.
    name = next((n for n in names if n.endswith("data.pkl")), names[rng.integers(len(names))])
    name = name if rng.random() < 0.6 else names[rng.integers(len(names))]
    packed[name], change = mutate(packed[name], rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for packed_name, content in packed.items():
            file.writestr(packed_name, content)
    path.write_bytes(buffer.getvalue())
    return f"{name}: {change}"


# ---------------------------------------------------------------------------------- targets


def use_model(path, model_class):
    model, card = load_model(path, model_class)
    with torch.inference_mode():
        if model_class is scGMVAE:
            model.encode(torch.ones(2, card["config"]["n_genes"]))
        elif model_class is scDecoder:
            k = torch.zeros(2, dtype=torch.long)
            z = model.sample_latent(model.mu[k], model.var[k], k)
            model.sample_cells(z, model.sample_library(k), k)
            states = Model(None, model, {}, card).states
            states.read(np.ones((1, 24)), np.ones(24, bool), np.ones((1, 3)))
        else:
            model(torch.ones(2, card["config"]["n_genes"]))


MODELS = {
    "scGMVAE_model.pt": scGMVAE,
    "scDecoder_model.pt": scDecoder,
    "bulkEncoder_model.pt": BulkEncoder,
}


def resume(path, sound):
    """Resume from a checkpoint, as its training does at the start."""
    name = path.name.removesuffix("_checkpoint.pt")
    script = {"scGMVAE": "train_gmvae", "scDecoder": "train_decoder"}.get(name, "train_encoder")
    card = torch.load(sound, weights_only=True)
    changed = {"data", "weights", "resume"}
    settings = {name: value for name, value in card["settings"].items() if name not in changed}
    cfg = importlib.import_module(script).Settings(**settings, weights=path.parent, resume=True)
    model, _ = load_model(sound.with_name(f"{name}_model.pt"), MODELS[f"{name}_model.pt"])
    fast = {"scGMVAE": ["mu", "log_var", "decoder.log_theta"], "scDecoder": ["log_theta"]}
    fast["bulkEncoder"] = ["log_weight"]
    fast = [model.get_parameter(p) for p in fast.get(name, [])]
    plan = training.Plan(2, 1, cfg.batch_size or 32, cfg.lr)
    optimizer, schedule = training.two_rate_optimizer(model, fast, plan, cfg.weight_decay)
    rng = np.random.default_rng(0)
    run = training.TrainingRun(name, cfg, plan, model, optimizer, schedule, rng, card["made_from"])
    assert run.resumed


GENES = [f"GENE{i}" for i in range(24)]
TYPES = ["B cells", "CD4+/CD25 T", "Natural killer  cells"]


def read_blocks(path):
    """Read cells several times from an open file, as the trainings do with --backed."""
    cells = load_cells(TrainingSettings(data=str(path), backed=True))
    try:
        cells.X[np.arange(cells.n_obs)[::-1]]
        mean_profile(cells.X)
    finally:
        cells.X.close()


def read(path, sound):
    """Read the file ``path`` as the scripts do; ``sound`` is the same file before the change."""
    name = path.name
    if path.parent.name in ("new", "old"):
        load_cells(DatasetSettings(data=str(path.parent)))
    elif name == "labels.csv":
        load_cells(DatasetSettings(data=str(sound.with_name("sparse.h5ad")), labels=str(path)))
    elif name in ("cells.h5", "sparse.h5ad", "dense.h5ad"):
        labels = str(sound.with_name("labels.csv"))
        load_cells(DatasetSettings(data=str(path), labels=labels if name == "cells.h5" else None))
        if name != "cells.h5":
            read_blocks(path)
    elif name.startswith("bulk."):
        read_bulk(path, GENES, [f"ENSG{i:011d}" for i in range(24)])
    elif name.startswith("markers."):
        annotate.read_markers(str(path), "Blood")
    elif name == "lineages.csv":
        lineages.read_lineages(path, TYPES)
    elif name == "fractions.csv":
        lineages.read_fractions(path, TYPES, "lineages.csv")
    elif name in MODELS:
        use_model(path, MODELS[name])
    elif name.endswith("_checkpoint.pt"):
        resume(path, sound)
    else:
        load_mixture(path.parent, 3)


def run_case(number, originals, names, folder):
    """Run one case.

    Returns:
        ``(change, outcome)``: what was changed, and "read" or the line that the user sees.

    Raises:
        Exception: any that ``run_script`` would not turn into a line.
    """
    rng = np.random.default_rng([number, 7])
    name = names[rng.integers(len(names))]
    path = folder / name
    for other in filter(Path.is_file, path.parent.iterdir()):  # undo the last case
        other.write_bytes((originals / other.relative_to(folder)).read_bytes())
    change = f"{name}: {mutate_file(path, rng)}"
    try:
        read(path, originals / name)
    except (InputError, OSError) as error:
        line = plain(error)
        assert line.strip(), "an empty message"
        known = (path.name, path.parent.name, path.with_suffix("").name, "--tissue")
        assert any(word in line for word in known), f"{line} does not name the file"
        return change, line
    return change, "read"


def run_cases(numbers):
    """Run cases in this process; print the number of each before it starts."""
    with tempfile.TemporaryDirectory() as top:
        originals, folder = Path(top) / "sound", Path(top) / "changed"
        originals.mkdir()
        prepare(originals)
        names = []
        for path in sorted(originals.rglob("*")):
            if path.is_file() and path.suffix not in (".png",) and "loss" not in path.name:
                names.append(str(path.relative_to(originals)))
                target = folder / names[-1]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        for name in names:  # all are read before any change
            read(folder / name, originals / name)
        before = psutil.Process().memory_info().rss
        faulthandler.enable()
        for number in numbers:
            print(f"\ncase {number}", flush=True)
            signal.alarm(SECONDS)  # kills the process
            change, outcome = run_case(number, originals, names, folder)
            signal.alarm(0)
            print(f"\ndone {number} | {change} | {outcome}", flush=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert peak < before + MEMORY, f"a peak of {peak / 1e9:.1f} GB"


def fuzz(first, n):
    """Run n cases in a separate process; returns their outcomes."""
    command = [sys.executable, __file__, f"{first}:{first + n}"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, cwd=ROOT
    )
    started = re.findall(r"^case (\d+)$", done.stdout, re.MULTILINE)
    assert done.returncode == 0, (
        f"python tests/test_fuzz.py {started[-1] if started else first}: ended with "
        f"{done.returncode}\n{done.stderr[-3000:]}"
    )
    outcomes = re.findall(r"^done \d+ \| (.*) \| (.*)$", done.stdout, re.MULTILINE)
    assert len(outcomes) == n
    return [outcome for _, outcome in outcomes]


def check_outcomes(outcomes):
    """Return the share that was read; all or nothing would mean that nothing was tested."""
    share = sum(outcome == "read" for outcome in outcomes) / len(outcomes)
    assert 0.05 < share < 0.9, some(outcomes)
    return share


def test_broken_files_are_read_or_refused():
    check_outcomes(fuzz(0, 50))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 13000, 1000))
def test_broken_files_by_the_thousand(first):
    """A thousand cases take some minutes."""
    share = check_outcomes(fuzz(first, 1000))
    print(f"cases {first} to {first + 999}: {share:.0%} read, the others refused in one line")


if __name__ == "__main__":
    span = [int(n) for n in sys.argv[1].split(":")]
    run_cases(range(*span) if len(span) == 2 else span)
