"""Broken and hostile files by the thousand: each is read, or refused in one line that names it.

``python -m pytest -m slow tests/test_fuzz.py`` runs 12,000 cases; the usual run has 100. Every case
follows from its number alone; ``python tests/test_fuzz.py 123`` runs number 123 and shows it.
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
from models import BulkEncoder, mean_profile, scDecoder, scGMVAE
from readers import lineages
from readers.bulk import read_bulk
from runtime.errors import InputError, plain, some
from runtime.weights import load_mixture, load_model

SECONDS = 30  # that one case may take
MEMORY = 3 << 30  # bytes that the process may have beyond what it has at the start
TOKENS = [
    *(b"\0", b"-1", b"-", b"nan", b"inf", b"1e308", b"1e-308", b"0.5", b"99999999999999999999"),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b"\n", b"\r", b"\t", b",", b";", b"#", b" ", b"%"),
    *(b"=cmd|' /C calc'!A0", "Zürich".encode("latin-1"), "\u2028".encode(), b"\x1b[31m", b"/"),
    *(b"../../../etc/passwd", b"4294967296", b"2147483648", b"0", b"1#2.3", b"NA", b"Unknown"),
]


# ------------------------------------------------------------------------------ sound files


def prepare(folder):
    """Sound files of every kind that the project reads, small."""
    cells = make_cells((12, 10, 8), n_genes=24)
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
    bulk = make_cells((2, 1, 1), n_genes=24).to_df().T
    bulk.to_csv(folder / "bulk.csv")
    bulk.to_csv(folder / "bulk.tsv.gz", sep="\t")
    gct = bulk.rename_axis("Name")
    gct.insert(0, "Description", "na")
    text = f"#1.2\n{bulk.shape[0]}\t{bulk.shape[1]}\n" + gct.to_csv(sep="\t")
    (folder / "bulk.gct").write_text(text)
    make_cells((2, 1, 1), n_genes=24).write_h5ad(folder / "bulk.h5ad")
    rows = [["Blood", t, "GENE1,GENE2", "GENE3"] for t in ("B cells", "T cells")]
    table = pd.DataFrame(rows, columns=annotate.COLUMNS)
    table.to_csv(folder / "markers.csv", index=False)
    table.to_excel(folder / "markers.xlsx", index=False)
    types = sorted(set(cells.obs["cell_type"]))
    (folder / "lineages.csv").write_text(
        "cell_type,lineage\n" + "".join(f"{t},L{i}\n" for i, t in enumerate(types))
    )
    lines = ["sample," + ",".join(types)]
    lines += [f"s{i},0.5,0.3,0.2" for i in range(4)]
    (folder / "fractions.csv").write_text("\n".join(lines) + "\n")
    weights = folder / "weights"
    tiny = {
        "train_gmvae.py": ["--n-hidden", 4, "--n-latent", 3, "--epochs", 2, "--vae-epochs", 1],
        "train_decoder.py": ["--n-hidden", 4, "--epochs", 2],
        "train_encoder.py": ["--n-hidden", 4, "--epochs", 2, "--batch-size", 4],
    }
    for script, flags in tiny.items():
        own = ["--data", folder / "sparse.h5ad", "--weights", weights]
        finished = training.Run.finished
        training.Run.finished = lambda run: None  # leaves the checkpoint there
        try:
            done = run_inside(script, *own, *flags)
        finally:
            training.Run.finished = finished
        assert done.returncode == 0, done.stderr
    return weights


# -------------------------------------------------------------------------------- mutations


def mutate(data, rng):
    """Bytes changed in one to three ways, and the words for it."""
    words = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        n = len(data)
        a, b = sorted(int(i) for i in rng.integers(0, n + 1, 2))
        b = min(b, a + int(2 ** rng.uniform(0, 12)))
        way = rng.integers(9)
        if way == 0:
            data, word = data[:a], f"cut at {a} of {n}"
        elif way in (1, 2) and n:
            changed = bytearray(data)
            bits = rng.integers(0, 8 * n, int(2 ** rng.uniform(0, 4)))
            for bit in bits:
                changed[bit // 8] ^= 1 << (bit % 8)
            data, word = bytes(changed), f"{len(bits)} bits flipped"
        elif way == 3:
            data, word = data[:a] + rng.bytes(b - a) + data[b:], f"noise in {a}:{b}"
        elif way == 4:
            data, word = data[:a] + data[b:], f"{a}:{b} removed"
        elif way == 5:
            data, word = data[:b] + data[a:b] + data[b:], f"{a}:{b} doubled"
        elif way == 6:
            c = int(rng.integers(0, n + 1))
            data, word = data[:c] + data[a:b] + data[c:], f"{a}:{b} copied to {c}"
        else:
            token = TOKENS[rng.integers(len(TOKENS))]
            over = len(token) * int(rng.integers(2))
            data, word = data[:a] + token + data[a + over :], f"{token!r} at {a}"
        words.append(word)
    return data, "; ".join(words)


def mutate_file(path, rng):
    """Change a file in place: as it is, or what is packed in it; returns the words for it."""
    data = path.read_bytes()
    inside = rng.random() < 0.6
    if inside and data[:2] == b"\x1f\x8b":
        changed, words = mutate(gzip.decompress(data), rng)
        path.write_bytes(gzip.compress(changed))
        return f"unpacked: {words}"
    if inside and zipfile.is_zipfile(path):
        packed = {}
        with zipfile.ZipFile(path) as file:
            packed = {name: file.read(name) for name in file.namelist()}
        names = list(packed)
        # The pickle, where it is one: tensors are but numbers.
        name = next((n for n in names if n.endswith("data.pkl")), names[rng.integers(len(names))])
        name = name if rng.random() < 0.6 else names[rng.integers(len(names))]
        packed[name], words = mutate(packed[name], rng)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for name_, content in packed.items():
                file.writestr(name_, content)
        path.write_bytes(buffer.getvalue())
        return f"{name}: {words}"
    changed, words = mutate(data, rng)
    path.write_bytes(changed)
    return words


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
        else:
            model(torch.ones(2, card["config"]["n_genes"]))


MODELS = {
    "scGMVAE_model.pt": scGMVAE,
    "scDecoder_model.pt": scDecoder,
    "bulkEncoder_model.pt": BulkEncoder,
}


def resume(path, sound):
    """Take a checkpoint up, as its training does at the start."""
    name = path.name.removesuffix("_checkpoint.pt")
    script = {"scGMVAE": "train_gmvae", "scDecoder": "train_decoder"}.get(name, "train_encoder")
    card = torch.load(sound, weights_only=True)
    own = {k: v for k, v in card["settings"].items() if k not in ("data", "weights", "resume")}
    cfg = importlib.import_module(script).Settings(**own, weights=path.parent, resume=True)
    model, _ = load_model(sound.with_name(f"{name}_model.pt"), MODELS[f"{name}_model.pt"])
    fast = {"scGMVAE": ["mu", "log_var", "decoder.log_theta"], "scDecoder": ["log_theta"]}
    fast = [model.get_parameter(p) for p in fast.get(name, [])]
    optimizer, schedule = training.two_rate_optimizer(model, fast, cfg, 2, name != "scGMVAE")
    rng = np.random.default_rng(0)
    run = training.Run(name, cfg, model, optimizer, schedule, rng, card["made_from"])
    assert run.resumed


GENES = [f"GENE{i}" for i in range(24)]
TYPES = ["B cells", "CD4+/CD25 T", "Natural killer  cells"]


def read_blocks(path):
    """Read cells as the trainings do with --backed, again and again, from a file left open."""
    cells = load_cells(TrainingSettings(data=str(path), backed=True))
    try:
        cells.X[np.arange(cells.n_obs)[::-1]]
        mean_profile(cells.X)
    finally:
        cells.X.close()


def read(path, sound):
    """Read a file as the scripts do. path: of the changed one; sound: of the unchanged one."""
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
    """Run one case; returns ``(words, outcome)``, outcome "read" or the line that the user sees.

    Any other exception than those that ``run_script`` turns into a line goes through.
    """
    rng = np.random.default_rng([number, 7])
    name = names[rng.integers(len(names))]
    path = folder / name
    for other in filter(Path.is_file, path.parent.iterdir()):  # what the last case changed
        other.write_bytes((originals / other.relative_to(folder)).read_bytes())
    words = f"{name}: {mutate_file(path, rng)}"
    try:
        read(path, originals / name)
    except (InputError, OSError) as error:
        line = plain(error)
        assert line.strip(), "an empty message"
        known = (path.name, path.parent.name, path.with_suffix("").name, "--tissue")
        assert any(word in line for word in known), f"{line} does not name the file"
        return words, line
    return words, "read"


def run_cases(numbers):
    """Run cases in this process, each announced on stdout before it starts."""
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
        for name in names:  # as they are, all are read
            read(folder / name, originals / name)
        before = psutil.Process().memory_info().rss
        faulthandler.enable()
        for number in numbers:
            print(f"\ncase {number}", flush=True)
            signal.alarm(SECONDS)  # ends the process
            words, outcome = run_case(number, originals, names, folder)
            signal.alarm(0)
            print(f"\ndone {number} | {words} | {outcome}", flush=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert peak < before + MEMORY, f"a peak of {peak / 1e9:.1f} GB"


def fuzz(first, n):
    """Run n cases in a process of their own; returns their outcomes, a line for each."""
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
    """A fuzz run in which nothing is refused, or all, has not tested anything."""
    share = sum(outcome == "read" for outcome in outcomes) / len(outcomes)
    assert 0.05 < share < 0.9, some(outcomes)
    return share


def test_broken_files_are_read_or_refused():
    check_outcomes(fuzz(0, 100))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 13000, 1000))
def test_broken_files_by_the_thousand(first):
    """Some minutes each."""
    share = check_outcomes(fuzz(first, 1000))
    print(f"cases {first} to {first + 999}: {share:.0%} read, the others refused in one line")


if __name__ == "__main__":
    span = [int(n) for n in sys.argv[1].split(":")]
    run_cases(range(*span) if len(span) == 2 else span)
