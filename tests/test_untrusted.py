"""Tests of hostile and broken files: refused in one line, or read as they are."""

import gzip
import subprocess
import sys
import zipfile

import anndata
import h5py
import numpy as np
import pandas as pd
import psutil
import pytest
import torch

import annotate
from conftest import (
    ROOT,
    make_cells,
    refused,
    run_inside,
    unpack,
    write_10x,
    write_10x_h5,
    write_labels,
)
from data import DatasetSettings, load_cells
from models import BulkEncoder, scDecoder, scGMVAE
from readers import bounded, hdf5
from readers.bounded import BoundedFile
from readers.bulk import read_bulk
from readers.counts import read_counts
from readers.hdf5 import check_hdf5
from readers.labels import read_label_csv
from runtime.weights import load_mixture, load_model

HEADER = "%%MatrixMarket matrix coordinate integer general\n"


# ----------------------------------------------------------------------------- Matrix Market


@pytest.fixture
def tenx(tmp_path, cells):
    return write_10x(tmp_path / "10x", cells, layout="old")


@pytest.mark.parametrize(
    "text, words",
    [
        (HEADER + "60 90 1\n1 1 5\n2 1 5\n", ["1 lines of three"]),
        (HEADER + "60 90 3\n1 1 5\n", ["header says 3"]),
        (HEADER + "60 90 999999999999\n1 1 5\n", ["announces 999,999,999,999"]),
        (HEADER + "60 90 99999999999999999999999\n1 1 5\n", ["announces"]),
        (HEADER + "4000000000 4000000000 1\n1 1 5\n", ["4000000000", "60 genes", "90 barcodes"]),
        (HEADER + "60 90 -1\n", ["-1"]),
        (HEADER + "60 90 1\n61 1 5\n", ["outside"]),
        (HEADER + "60 90 1\n1 91 5\n", ["outside"]),
        (HEADER + "60 90 1\n0 1 5\n", ["outside"]),
        (HEADER + "60 90 1\n-1 1 5\n", ["outside"]),
        (HEADER + "60 90 1\n99999999999 1 5\n", ["matrix.mtx"]),
        (HEADER + "60 90 1\n1 1 -5\n", ["negative", "GENE0"]),
        (HEADER + "60 90 1\n1 1 2.5\n", ["not an integer", "GENE0"]),
        (HEADER + "60 90 1\n1 1 nan\n", ["matrix.mtx"]),
        (HEADER + "60 90 1\n1 1 1e400\n", ["matrix.mtx"]),
        (HEADER + "60 90 2\n1 1 2147483647\n1 1 1\n", ["over 2147483647"]),
        (HEADER + "60 90 1\n1 1 99999999999999999999\n", ["over 2147483647"]),
        (HEADER + "60 90 1\n1 1\n", ["three numbers"]),
        (HEADER + "60 90 1\n1 1 5 7\n", ["three numbers"]),
        (HEADER + "60 90 1\n1 1 five\n", ["matrix.mtx"]),
        (HEADER + "60 90 1\n1 1 2,5\n", ["found the line '1 1 2,5'"]),
        (HEADER + "60 90 1\n4294967297 1 5\n", ["out of range"]),  # 1 in 32 bits
        (HEADER + "% more\n60 90 2\n1 1 5\n1 91 5\n", ["Line 5"]),
        (HEADER + "60 90 2\n1 1 5\r2 1 5\r", ["matrix.mtx"]),  # crashes scipy
        (HEADER.replace("general", "symmetric") + "60 90 1\n1 85 5\n", ["matrix.mtx"]),
        (HEADER + "60 90 0\n1 1 5\n", ["header says 0"]),
        (HEADER + "60 90\n", ["matrix.mtx"]),
        (HEADER.replace("integer", "pattern") + "60 90 1\n1 1\n", ["pattern"]),
        (HEADER.replace("integer", "complex") + "60 90 1\n1 1 5 0\n", ["complex"]),
        (HEADER.replace("coordinate", "array") + "60 90\n" + "1\n" * 5400, ["array"]),
        ("", ["matrix.mtx"]),
        ("\0" * 100, ["matrix.mtx"]),
        ("%" * 10**6, ["matrix.mtx"]),
    ],
)
def test_matrix_market_that_lies(tenx, text, words):
    (tenx / "matrix.mtx").write_text(text)
    refused(lambda: read_counts(tenx), "matrix.mtx", *words)


def test_matrix_market_as_it_may_be(tenx):
    """Comments, blank lines, tabs, Windows line breaks, repeated entries, real numbers."""
    text = (
        HEADER.replace("integer", "Real") + "% a comment\n\n60\t90   3\n1 1 5.0\n1 1 2e0\n9 9 1\n"
    )
    (tenx / "matrix.mtx").write_bytes(text.replace("\n", "\r\n").encode())
    X = read_counts(tenx).X
    assert X.sum() == 8 and X[0, 0] == 7 and X[8, 8] == 1
    (tenx / "matrix.mtx").write_text(HEADER + "60 90 0\n")
    refused(lambda: load_cells(DatasetSettings(data=str(tenx))), "every count is zero")


def test_gzip_bomb_is_not_unpacked(tenx):
    """300 kB that unpack to 300 MB of line breaks."""
    with gzip.open(tenx / "matrix.mtx.gz", "wb", compresslevel=9) as file:
        file.write((HEADER + "60 90 1\n").encode())
        for _ in range(30):
            file.write(b"\n" * 10_000_000)
    before = psutil.Process().memory_info().rss
    refused(lambda: read_counts(tenx), "matrix.mtx.gz", "more than 100,100 bytes")
    assert psutil.Process().memory_info().rss < before + 2e8


def test_bounded_file_reads_what_it_may(tmp_path):
    for name, opener in (("a.txt", open), ("a.gz", gzip.open)):
        with opener(tmp_path / name, "wb") as file:
            file.write(b"x" * 1000)
        with BoundedFile(tmp_path / name, 1000) as file:
            assert file.readall() == b"x" * 1000
        with BoundedFile(tmp_path / name, 999) as file:
            refused(file.readall, name, "more than 999 bytes")


# -------------------------------------------------------------------------------------- HDF5


def h5ad_with(path, change):
    make_cells().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def replace(group, name, value, **options):
    attributes = dict(group[name].attrs)
    del group[name]
    group.create_dataset(name, data=value, **options)
    group[name].attrs.update(attributes)


def wild_index(file):
    indices = file["X/indices"][:]
    indices[5] = 2**30
    replace(file["X"], "indices", indices)


def negative_index(file):
    indices = file["X/indices"][:]
    indices[5] = -7
    replace(file["X"], "indices", indices)


def falling_pointers(file):
    pointers = file["X/indptr"][:]
    pointers[[3, 4]] = pointers[[4, 3]]
    replace(file["X"], "indptr", pointers)


def texts(file):
    replace(file["X"], "data", np.array(["one"] * len(file["X/data"]), dtype="S"))


def huge(file):
    """Terabytes of zeros, for which nothing is stored."""
    del file["X"]
    file.create_dataset("X", (90, 10**11), dtype="f8", chunks=(90, 1000))
    file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def complex_numbers(file):
    replace(file["X"], "data", file["X/data"][:].astype(complex))


def external_link(file):
    del file["X"]
    file["X"] = h5py.ExternalLink("/etc/passwd", "/X")


def external_values(file):
    del file["X"]
    file.create_dataset("X", (90, 60), dtype="i4", external=[("/etc/passwd", 0, 21600)])


def virtual(file):
    del file["X"]
    layout = h5py.VirtualLayout((90, 60), dtype="i4")
    layout[:] = h5py.VirtualSource("other.h5", "X", shape=(90, 60))
    file.create_virtual_dataset("X", layout)


def wrong_shape(file):
    file["X"].attrs["shape"] = (90, 6)


def no_matrix(file):
    del file["X"]


@pytest.mark.parametrize(
    "change, words",
    [
        (wild_index, ["sparse matrix"]),
        (negative_index, ["sparse matrix"]),
        (falling_pointers, ["sparse matrix"]),
        (texts, []),
        (complex_numbers, ["complex128", "expected numbers"]),
        (huge, ["GB of memory"]),
        (external_link, ["X", "another file"]),
        (external_values, ["X", "another file"]),
        (virtual, ["X", "another file"]),
        (wrong_shape, []),
        (no_matrix, ["no matrix"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_h5ad_that_lies(tmp_path, change, words):
    path = h5ad_with(tmp_path / "cells.h5ad", change)
    refused(lambda: read_counts(path), path, *words)
    refused(lambda: read_bulk(path, [f"GENE{i}" for i in range(60)]), path)


def test_links_in_circles_come_to_an_end(tmp_path, cells):
    def circle(file):
        file["uns/round"] = file["uns"]
        file["uns/soft"] = h5py.SoftLink("/uns")

    path = h5ad_with(tmp_path / "cells.h5ad", circle)
    check_hdf5(path)  # anndata follows them, so reading is another matter


def test_10x_h5_with_wild_indices(tmp_path, cells):
    path = tmp_path / "cells.h5"
    write_10x_h5(path, cells)
    with h5py.File(path, "r+") as file:
        file["matrix/indices"][3] = 10**6
    refused(lambda: read_counts(path), path)


def test_hdf5_is_checked_in_a_separate_process(tmp_path, cells, monkeypatch):
    """A crash or a hang of that process becomes one line here."""
    cells.write_h5ad(path := tmp_path / "cells.h5ad")
    check_hdf5(path)
    real = subprocess.run

    def crash(command, **options):
        return real([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"], **options)

    def stand_still(command, **options):
        return real([sys.executable, "-c", "while True: pass"], **options | {"timeout": 0.2})

    for run, words in ((crash, "ended with -11"), (stand_still, "come to an end")):
        monkeypatch.setattr(hdf5.subprocess, "run", run)
        refused(lambda: check_hdf5(path), path, words)
    monkeypatch.undo()
    program = [sys.executable, ROOT / "readers/hdf5_probe.py", path]
    size = int(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    assert size >= cells.X.data.nbytes + cells.X.indices.nbytes


# ------------------------------------------------------------------------------------ tables


def test_table_with_a_million_columns(tmp_path):
    path = tmp_path / "wide.csv"
    line = ",".join(["1"] * 1_000_000)
    path.write_text("sample," + line + "\n" + "a," + line + "\n")
    refused(lambda: read_bulk(path, ["G1"]), path, "columns", "300,000")
    refused(lambda: read_label_csv(path, ["a"]), path, "1,000,001 columns", "300,000")


def test_line_without_an_end(tmp_path):
    path = tmp_path / "one_line.csv"
    path.write_bytes(b"a" * 50_000_000)
    refused(lambda: read_bulk(path, ["G1"]), path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-32"])
def test_text_that_is_not_utf8(tmp_path, cells, encoding):
    path = tmp_path / "labels.csv"
    rows = "".join(f"{b},Zürich\n" for b in cells.obs_names)
    path.write_bytes(("barcode,cell_type\n" + rows).encode(encoding))
    refused(lambda: read_label_csv(path, cells.obs_names), path)
    bulk = tmp_path / "bulk.csv"
    bulk.write_bytes("gene,Zürich\nGENE1,5\nGENE2,6\n".encode(encoding))
    if encoding == "utf-32":
        refused(lambda: read_bulk(bulk, ["GENE1", "GENE2"]), bulk)
    else:  # as spreadsheets save it: there is one reading
        X, _, samples = unpack(read_bulk(bulk, ["GENE1", "GENE2"]))
        assert samples == ["Zürich"] and X.toarray().tolist() == [[5, 6]]


def test_byte_order_mark_of_spreadsheets(tmp_path, cells):
    path = write_labels(tmp_path / "labels.csv", cells)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    labels = read_label_csv(path, cells.obs_names)
    assert list(labels) == list(cells.obs["cell_type"])


NAMES = ["=1+1", "+cmd|' /C calc'!A0", "@SUM(A1)", "two\nlines", "tab\there", 'quote"d', " blank "]
NAMES += ["\x1b[31mred", "../../etc/passwd", "$x_1$", "Ünïcødé", "a,b;c", "%s{0}", "\u2028"]


@pytest.mark.draws
def test_odd_names_are_read_as_text_and_written_as_they_are(tmp_path, cells, trained, capsys):
    """Genes, samples and cell types; messages escape what a terminal would not show."""
    types = dict(zip(sorted(set(cells.obs["cell_type"])), NAMES, strict=False))
    cells.obs["cell_type"] = cells.obs["cell_type"].map(types)
    cells.var_names = NAMES + list(cells.var_names[len(NAMES) :])
    cells.write_h5ad(tmp_path / "cells.h5ad")
    read = load_cells(DatasetSettings(data=str(tmp_path / "cells.h5ad")))
    assert list(read.var_names) == list(cells.var_names)
    assert (read.X != cells.X).nnz == 0
    assert list(read.obs["cell_type"]) == list(cells.obs["cell_type"])
    counts = np.random.default_rng(0).integers(0, 900, (60, len(NAMES)))
    bulk = pd.DataFrame(counts, [f"GENE{i}" for i in range(60)], NAMES)
    bulk.to_csv(tmp_path / "bulk.csv")
    refused(lambda: read_bulk(tmp_path / "bulk.csv", ["GENE1"]), "bulk.csv")  # by the line break
    samples = [name for name in NAMES if "\n" not in name]
    bulk[samples].to_csv(tmp_path / "bulk.csv")
    out = tmp_path / "out.h5ad"
    flags = ["--bulk", tmp_path / "bulk.csv", "--weights", trained, "--n-cells", 2, "--out", out]
    done = run_inside("bulk2sc.py", *flags)
    assert done.returncode == 0, done.stderr
    generated = anndata.read_h5ad(out)
    assert list(generated.obs["sample"].cat.categories) == samples
    table = pd.read_csv(tmp_path / "out.proportions.csv")
    assert list(table["sample"].unique()) == samples
    assert list(pd.read_csv(tmp_path / "out.fit.csv")["sample"]) == samples
    refused(lambda: read_bulk(tmp_path / "bulk.csv", ["X\n\x1b[31m"]), r"X\n\x1b[31m")


def test_names_that_no_file_can_hold(tmp_path, cells):
    path = tmp_path / "labels.csv"
    rows = "".join(f'{b},"B\0cell"\n' for b in cells.obs_names)
    path.write_text("barcode,cell_type\n" + rows)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    settings = DatasetSettings(data=str(tmp_path / "cells.h5ad"), labels=str(path))
    refused(lambda: load_cells(settings), path, "NUL")


def test_linked_input_is_followed_and_linked_output_is_not(tmp_path, cells, trained):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "link.h5ad").symlink_to("cells.h5ad")
    (tmp_path / "circle.h5ad").symlink_to("circle.h5ad")
    precious = tmp_path / "precious"
    precious.write_text("old")
    (tmp_path / "out.h5ad").symlink_to(precious)
    assert read_counts(tmp_path / "link.h5ad").n_obs == 90
    refused(lambda: read_counts(tmp_path / "circle.h5ad"), "circle.h5ad")
    flags = ["--data", tmp_path / "link.h5ad", "--weights", trained, "--n-cells", 3]
    flags += ["--batch-size", 20, "--out", tmp_path / "out.h5ad", "--force"]
    assert run_inside("bulk2sc.py", *flags).returncode == 0
    assert precious.read_text() == "old" and not (tmp_path / "out.h5ad").is_symlink()


def test_excel_bomb_and_slip(tmp_path, monkeypatch):
    """An archive that unpacks to too much is not unpacked; paths in it are not followed."""
    monkeypatch.setattr(bounded, "MAX_BYTES", 10**8)
    bomb, slip = tmp_path / "bomb.xlsx", tmp_path / "slip.xlsx"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file, file.open("a", "w") as part:
        for _ in range(11):
            part.write(bytes(10_000_000))
    refused(lambda: annotate.read_markers(str(bomb), "Blood"), bomb, "110,000,000", "100,000,000")
    with zipfile.ZipFile(bomb, "a") as file:
        file.writestr("[Content_Types].xml", "")  # what tells a workbook from other archives
    refused(lambda: read_bulk(bomb, ["G1"]), bomb, "110,000,000", "100,000,000")
    with zipfile.ZipFile(slip, "w") as file:
        file.writestr("../../slipped.txt", "out of the folder")
    refused(lambda: annotate.read_markers(str(slip), "Blood"), slip)
    assert not list(tmp_path.parent.parent.rglob("slipped.txt"))


# ----------------------------------------------------------------------------------- weights


def test_compressed_weights_are_not_unpacked(trained, tmp_path):
    path = tmp_path / "scDecoder_model.pt"
    with (
        zipfile.ZipFile(trained / path.name) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(lambda: load_model(path, scDecoder), path, "not a readable weights file")


def claims(card, name, value):
    return card | {"config": card["config"] | {name: value}}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: claims(c, "n_hidden", 10**9),  # would take terabytes
        lambda c: claims(c, "n_genes", 10**12),
        lambda c: claims(c, "n_latent", -1),
        lambda c: claims(c, "n_latent", True),
        lambda c: claims(c, "dropout", "0.2"),
        lambda c: claims(c, "likelihood", "__import__('os')"),
        lambda c: claims(c, "unheard_of", 1),
        lambda c: c | {"config": None},
        lambda c: c | {"genes": c["genes"][:-1]},
        lambda c: c | {"genes": [c["genes"][0]] * len(c["genes"])},
        lambda c: c | {"genes": [1] * len(c["genes"])},
        lambda c: c | {"genes": ["a\0b", *c["genes"][1:]]},
        lambda c: c | {"cell_types": ["same"] * len(c["cell_types"])},
        lambda c: c | {"held_out": "all of them"},
        lambda c: c | {"held_out_fraction": 7.0},
        lambda c: c | {"components": [0, 0, 1]},
        lambda c: c | {"state": c["state"] | {"mu": torch.zeros(1).expand(c["state"]["mu"].shape)}},
        lambda c: c | {"state": c["state"] | {"mu": c["state"]["mu"].double()}},
        lambda c: c | {"state": c["state"] | {"mu": c["state"]["mu"].to_sparse()}},
        lambda c: c | {"state": c["state"] | {"mu": c["state"]["mu"].to("meta")}},
        lambda c: c | {"state": c["state"] | {"mu": [[0.0]]}},
        lambda c: c | {"state": c["state"] | {"var": -c["state"]["var"]}},
        lambda c: c | {"state": c["state"] | {"shape_weight": 0 * c["state"]["shape_weight"]}},
        lambda c: c | {"state": c["state"] | {"log_library": 99 + c["state"]["log_library"]}},
        lambda c: {k: v for k, v in c.items() if k != "genes"},
    ],
)
def test_weights_that_lie(trained, tmp_path, change):
    path = tmp_path / "scDecoder_model.pt"
    torch.save(change(torch.load(trained / path.name, weights_only=True)), path)
    before = psutil.Process().memory_info().rss
    refused(lambda: load_model(path, scDecoder), path, "expected")
    assert psutil.Process().memory_info().rss < before + 2e8


@pytest.mark.parametrize("name, model_class", [("scGMVAE", scGMVAE), ("bulkEncoder", BulkEncoder)])
def test_other_models_are_checked_as_well(trained, tmp_path, name, model_class):
    path = tmp_path / f"{name}_model.pt"
    card = torch.load(trained / path.name, weights_only=True)
    first = next(iter(card["state"]))
    for wrong in (card["state"][first] * torch.nan, card["state"][first][..., None]):
        torch.save(card | {"state": card["state"] | {first: wrong}}, path)
        refused(lambda: load_model(path, model_class), path, first)
    torch.save(claims(card, "n_genes", 10**12), path)
    refused(lambda: load_model(path, model_class), path)


def test_mixture_that_claims_more_than_it_holds(tmp_path):
    for name in ("gmm_mu_c.pt", "gmm_var_c.pt"):
        torch.save(torch.ones(1).expand(3, 10**12), tmp_path / name)
    refused(lambda: load_mixture(tmp_path, 3), "gmm_mu_c.pt")
