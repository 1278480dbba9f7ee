"""What a run leaves behind, and what it leaves alone: other files, full disks, odd environments."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from conftest import ROOT, assert_one_line_error, make_cells, run_inside
from runtime import cell_writers, progress
from runtime.cell_writers import check_space, open_cells, open_tables
from runtime.errors import InputError
from runtime.script import expand_home, plain_settings
from runtime.writing import PatientFile, write_h5ad

BESIDE = ["proportions.csv", "proportions.png", "fit.csv", "expression.h5ad", "report.html"]


@pytest.fixture
def bulk(tmp_path):
    """A table of two samples whose names have letters beyond ASCII."""
    X = make_cells().X
    table = {"Spenderin Ä": X[:40].sum(axis=0).A1, "Donor β": X[40:].sum(axis=0).A1}
    table = pd.DataFrame(table, index=[f"GENE{i}" for i in range(60)])
    table.to_csv(tmp_path / "bulk.csv")
    return tmp_path / "bulk.csv"


@pytest.fixture
def flags(trained, bulk, tmp_path):
    """Of a quick run of bulk2sc.py with all its outputs."""
    out = tmp_path / "out" / "g.h5ad"
    out.parent.mkdir()
    return ["--report", "--bulk", bulk, "--weights", trained, "--n-cells", 5, "--out", out]


def start(script, *arguments, set_up=None, **environment):
    """A script in a process of its own, with Ctrl-C as in a terminal; environment: None unsets."""

    def before():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if set_up is not None:
            set_up()

    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, arguments)],
        cwd=ROOT,
        env={name: value for name, value in environment.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=before,
    )


def finish(process):
    """``(exit status, stdout, stderr)`` of a process that was started."""
    stdout, stderr = process.communicate(timeout=200)
    return process.returncode, stdout.decode(), stderr.decode()


def outputs(out):
    return sorted(p.name for p in out.parent.iterdir())


# ----------------------------------------------------------------------------------- command line


def test_home_is_expanded_as_in_a_shell(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    expected = {
        "--out=~/x.h5ad": "--out=/home/ada/x.h5ad",
        "--out=~": "--out=/home/ada",
        "~/x": "/home/ada/x",
        "~": "/home/ada",
        "--out": "--out",
        "--data=a=~/x": "--data=a=~/x",  # these are names of files
        "--data=~x": "--data=~x",
        "x~/y": "x~/y",
    }
    assert {argument: expand_home(argument) for argument in expected} == expected


def test_scripts_expand_home(trained, bulk, tmp_path, monkeypatch):
    """Regression: a folder named ~ was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(trained, tmp_path / "w")
    flags = ["--bulk=~/bulk.csv", "--weights=~/w", "--n-cells=2", "--out=~/new/g.h5ad"]
    done = run_inside("bulk2sc.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "g.h5ad").exists() and not (tmp_path / "~").exists()


def test_settings_with_bytes_of_a_name_can_be_saved():
    """A name of a file may be no UTF-8; in a C locale no letter beyond ASCII is."""
    import bulk2sc

    out = Path(os.fsdecode(b"caf\xe9") + "ü".encode().decode("ascii", "surrogateescape") + ".h5ad")
    assert plain_settings(bulk2sc.Settings(out=out))["out"] == "caf\\xe9ü.h5ad"


def test_settings_with_a_numpy_number_can_be_saved():
    """Regression: weights whose settings held one could not be read."""
    import train_gmvae

    share = plain_settings(train_gmvae.Settings(held_out=np.float64(0.25)))["held_out"]
    assert type(share) is float


# --------------------------------------------------------------------------- files of other origin


def test_own_files_are_replaced(flags):
    """Also alone, but for the picture: nothing in it tells where it is from."""
    out, names = flags[-1], {"g.h5ad", *(f"g.{ending}" for ending in BESIDE)}
    for left in (names, {"g.h5ad", "g.proportions.png"}, names - {"g.h5ad", "g.proportions.png"}):
        for name in names - left:
            (out.parent / name).unlink(missing_ok=True)
        done = run_inside("bulk2sc.py", *flags)
        assert done.returncode == 0, done.stderr
        assert set(outputs(out)) == names
    assert "3 cell types, 60 genes" in done.stdout.splitlines()[0]


def test_proportions_given_are_own_files(flags, tmp_path):
    """Their table has a column more."""
    table = pd.DataFrame({"B cells": [0.5]}, index=["a"])
    table.columns = [sorted(set(make_cells().obs["cell_type"]))[0]]
    table.to_csv(tmp_path / "known.csv")
    flags = ["--known-proportions", tmp_path / "known.csv", *flags[3:]]
    for _ in range(2):
        done = run_inside("bulk2sc.py", *flags)
        assert done.returncode == 0, done.stderr
        for name in ("g.h5ad", "g.proportions.png"):
            (flags[-1].parent / name).unlink()


def foreign_h5ad(path):
    anndata.AnnData(np.ones((3, 2)), uns={"settings": {}, "cell_types": ["a"]}).write_h5ad(path)


FOREIGN = {
    "h5ad": foreign_h5ad,
    "proportions.csv": lambda path: path.write_text("sample,B,T\na,0.5,0.5\n"),
    "proportions.png": lambda path: path.write_bytes(b"\x89PNG"),
    "fit.csv": lambda path: path.write_bytes(b"\xff\xfe\n"),
    "expression.h5ad": foreign_h5ad,
    "report.html": lambda path: path.write_text("<!doctype html><title>mine</title>"),
}


@pytest.mark.parametrize("ending", FOREIGN)
def test_other_files_are_replaced_only_by_force(flags, ending):
    """Regression: whatever was there was gone."""
    path = flags[-1].with_name(f"g.{ending}")
    FOREIGN[ending](path)
    before = path.read_bytes()
    done = run_inside("bulk2sc.py", *flags)
    assert_one_line_error(done, path, "not from bulk2sc", "--force")
    assert "genes" not in done.stdout  # no model was loaded
    assert path.read_bytes() == before and outputs(flags[-1]) == [path.name]
    done = run_inside("bulk2sc.py", *flags, "--force")
    assert done.returncode == 0 and path.read_bytes() != before, done.stderr


def test_only_files_that_this_run_writes_are_in_its_way(trained, h5ad, tmp_path):
    for ending in BESIDE:
        (tmp_path / f"g.{ending}").write_text("precious")
    out = tmp_path / "g.h5ad"
    done = run_inside("bulk2sc.py", "--data", h5ad, "--weights", trained, "--n-cells", 3,
                      "--batch-size", 20, "--out", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / f"g.{ending}").read_text() == "precious" for ending in BESIDE)


def test_what_cannot_be_replaced_is_said_before_any_work(flags):
    out = flags[-1]
    out.mkdir()
    done = run_inside("bulk2sc.py", *flags, "--force")
    assert_one_line_error(done, out, "folder")
    out.rmdir()
    os.mkfifo(out)  # reading it would wait for ever
    assert_one_line_error(run_inside("bulk2sc.py", *flags), out, "--force")


def test_force_still_replaces_no_input(tmp_path):
    (tmp_path / "g.fit.csv").write_text("precious")
    given = ["--bulk", tmp_path / "g.fit.csv", "--out", tmp_path / "g.h5ad", "--force"]
    assert_one_line_error(run_inside("bulk2sc.py", *given), "over the input", given[1])
    assert (tmp_path / "g.fit.csv").read_text() == "precious"


# -------------------------------------------------------------------------------------- full disks


WRITE = f"""
import os
import resource
import sys
sys.path.insert(0, {str(ROOT)!r})
import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from runtime.script import run_script
from runtime.cell_writers import open_cells
from runtime.writing import write_h5ad

def main(path):
    counts = np.random.default_rng(0).poisson(0.3, (200, 2000)).astype(np.int32)
    cells = anndata.AnnData(obs=pd.DataFrame(index=[f"cell_{{i}}" for i in range(800)]))
    cells.obsm["X_latent"] = np.zeros((800, 5), np.float32)
    if sys.argv[1] == "table":
        return write_h5ad(path, anndata.AnnData(counts.astype(np.float32)))
    with open_cells(path, [f"GENE{{i}}" for i in range(2000)]) as file:
        for _ in range(4):
            file.append(sp.csr_matrix(counts))
        file.write_tables(cells)

path = sys.argv[2]
for limit in map(int, sys.argv[3:]):
    if not os.fork():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        run_script(main, path)
        os._exit(0)
    print(limit, os.waitstatus_to_exitcode(os.wait()[1]), *os.listdir(os.path.dirname(path)))
"""


@pytest.mark.parametrize(
    ("kind", "limits"),
    [("cells", [700, 6_000, 33_466, 40_177, 90_000]), ("table", [700, 20_000])],
)
def test_full_disk_is_one_line_wherever_it_fills_up(tmp_path, kind, limits):
    """Regression: HDF5 crashed, with cells from 33 to 41 kB as it read back what was not there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITE, kind, tmp_path / "g.h5ad", *map(str, limits)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    # Each ends with status 1, and no file is left.
    assert done.stdout.splitlines() == [f"{limit} 1" for limit in limits], done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == len(limits)
    for line in errors:
        assert line.startswith(f"error: {tmp_path / 'g.h5ad'}: could not be written"), line
        assert "untouched" in line


def test_hdf5_reads_back_what_the_disk_did_not_take(tmp_path, monkeypatch):
    """After the first error the file is as HDF5 wrote it, though nothing more is on the disk."""
    values, limit = np.arange(5000), 20_000
    (tmp_path / "x.h5").touch()
    real = PatientFile.write

    def write(self, data):
        if self.tell() + len(memoryview(data).cast("B")) > limit and self.error is None:
            self.fail(OSError(28, "No space left on device"))
        return real(self, data)

    monkeypatch.setattr(PatientFile, "write", write)
    with PatientFile(tmp_path / "x.h5", "r+") as sink:
        with h5py.File(sink, "w") as file:
            for name in "abc":
                file.create_dataset(name, data=values, chunks=(100,), compression="gzip")
                file.flush()
        sink.seek(0)
        with h5py.File(sink, "r") as file:
            assert all((file[name][:] == values).all() for name in "abc")
        with pytest.raises(OSError, match="No space left"):
            sink.check()
    assert (tmp_path / "x.h5").stat().st_size <= limit


def test_space_is_looked_at_before_the_first_block(flags, monkeypatch):
    out = flags[-1]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cell_writers.shutil, "disk_usage", lambda folder: usage(1e9, 1e9, 100_000))
    monkeypatch.setattr(cell_writers.H5adWriter, "write_tables", None)  # never reached
    done = run_inside("bulk2sc.py", *flags, "--n-cells", 5000)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error = done.stderr.strip().splitlines()[-1]
    for words in (f"error: {out}: found 0.1 MB of free space, expected at least", "10,000 cells"):
        assert words in error
    assert not outputs(out)


@pytest.mark.parametrize("density", [0.02, 0.3, 2])
def test_estimate_of_the_size_is_a_lower_bound(tmp_path, monkeypatch, density):
    """Of rare and of frequent counts alike, without any cell's latent position."""
    X = sp.csr_matrix(np.random.default_rng(0).poisson(density, (2000, 500)).astype(np.int32))
    obs = pd.DataFrame(index=[f"cell_{i}" for i in range(X.shape[0])])
    with open_cells(tmp_path / "g.h5ad", [f"g{i}" for i in range(500)], n_cells=len(obs)) as file:
        file.append(X)
        file.write_tables(anndata.AnnData(obs=obs))
    size = (tmp_path / "g.h5ad").stat().st_size
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(cell_writers.shutil, "disk_usage", lambda folder: usage(size))
    check_space(tmp_path / "g.h5ad", X.shape[0], X)
    monkeypatch.setattr(cell_writers.shutil, "disk_usage", lambda folder: usage(size // 10))
    with pytest.raises(InputError, match="free space"):  # and not so low as to be of no use
        check_space(tmp_path / "g.h5ad", X.shape[0], X)


def test_table_is_written_as_anndata_writes_it(tmp_path):
    table = make_cells()
    table.layers["x"] = table.X.toarray()
    write_h5ad(tmp_path / "a.h5ad", table.copy())
    table.write_h5ad(tmp_path / "b.h5ad", compression="gzip")
    a, b = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in "ab")
    pd.testing.assert_frame_equal(a.obs, b.obs)
    pd.testing.assert_frame_equal(a.var, b.var)
    assert (a.X != b.X).nnz == 0 and (a.layers["x"] == b.layers["x"]).all()


# ------------------------------------------------------------------------------- odd environments


ENVIRONMENTS = {
    "ascii": {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "nonsense"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "MPLBACKEND": "module://matplotlib_inline.backend_x"},
}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_terminal_and_notebook_fail_no_run(flags, environment):
    """Letters that the terminal lacks, and a notebook's backend. Regression: tracebacks."""
    out = flags[-1].with_name("gé.h5ad")
    report, beside = ("--report", BESIDE) if environment == "C" else ("--no-report", BESIDE[:-1])
    process = start("bulk2sc.py", report, *flags[1:-1], out, **ENVIRONMENTS[environment])
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0 and b"Traceback" not in stderr, stderr
    assert b"wrote" in stdout and b"Donor \\u03b2" in stdout
    assert outputs(out) == [f"gé.{ending}" for ending in sorted(["h5ad", *beside])]
    cells = anndata.read_h5ad(out)
    assert list(cells.uns["samples"]) == ["Spenderin Ä", "Donor β"]
    assert cells.uns["settings"]["out"] == str(out)


def test_reader_who_leaves_costs_no_file(flags):
    """As behind ``| head -1``, stdout and stderr alike. Regression: Broken pipe, and no file."""
    process = start("bulk2sc.py", "--no-report", *flags[1:])
    assert process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=200) == 0
    assert outputs(flags[-1]) == sorted(f"g.{ending}" for ending in ("h5ad", *BESIDE[:-1]))


@pytest.mark.parametrize("error", [ValueError("no font\nat all"), InputError("disk"), MemoryError])
def test_picture_that_fails_is_a_warning(flags, monkeypatch, error):
    import bulk2sc

    def fail(path, *_):
        raise error

    monkeypatch.setattr(bulk2sc, "write_proportions", fail)
    monkeypatch.setattr(bulk2sc, "write_report", fail)
    done = run_inside("bulk2sc.py", *flags)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    for name in ("g.proportions.png", "g.report.html"):
        assert any(f"{name}: could not be drawn" in line for line in warnings), done.stderr
    names = [f"g.{e}" for e in ("h5ad", *BESIDE) if e not in ("proportions.png", "report.html")]
    assert outputs(flags[-1]) == sorted(names)
    assert ".png" not in done.stdout


# ------------------------------------------------------------------------- Ctrl-C before the work


def is_importing(process, module="numba"):
    """Wait until a process has mapped a library of a module."""
    while process.poll() is None:
        if module in Path(f"/proc/{process.pid}/maps").read_text():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("script", ["annotate", "bulk2sc", "train"])
def test_ctrl_c_during_the_slow_imports_is_one_line(script, tmp_path):
    """Regression: a traceback. Signals are caught from parse_args on, see test_layout.py."""
    flags = ["--data", tmp_path / "none"]
    process = start(f"{script}.py", *flags)
    assert is_importing(process, "torch" if script != "annotate" else "sklearn")
    process.send_signal(signal.SIGINT)
    code, stdout, stderr = finish(process)
    assert (code, stderr.count("\n"), stdout) == (130, 1, ""), stderr
    assert stderr.startswith("stopped by SIGINT")


def test_ignored_ctrl_c_stays_ignored(tmp_path):
    """As in the background of a shell script, or after nohup."""
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    process = start("train_gmvae.py", "--data", tmp_path / "none", set_up=ignore)
    assert is_importing(process, "torch")
    process.send_signal(signal.SIGINT)
    code, _, stderr = finish(process)
    assert code == 1 and stderr.startswith("error: ") and "none" in stderr


def test_tables_are_written_block_by_block_and_rounded(tmp_path):
    """Four digits stay; whole blocks are read by anndata as they were given."""
    rng = np.random.default_rng(0)
    tables = [rng.normal(0, 10.0 ** rng.integers(-6, 6, (12, 50))).astype(np.float32) for _ in "ab"]
    tables[0][:, :5], tables[1][3, 7] = 0, -np.float32(1) + np.float32(1e-7)
    obs, var = (pd.DataFrame(index=[f"{i}" for i in range(n)]) for n in (12, 50))
    names = ("X", "layers/a")
    path = tmp_path / "x.h5ad"
    with open_tables(path, anndata.AnnData(obs=obs, var=var), names, rows=3) as write:
        for rows in (slice(0, 6), slice(6, 9), slice(9, 12)):
            write([table[rows] for table in tables])
    found = anndata.read_h5ad(path)
    for given, read in zip(tables, (found.X, found.layers["a"]), strict=True):
        assert read.dtype == np.float32
        np.testing.assert_allclose(read, given, rtol=2**-13)
        assert np.unique(read).size > 0.9 * np.unique(given).size
    assert list(found.obs_names) == list(obs.index)


def test_progress_is_shown_of_what_takes_long_alone(capsys, monkeypatch):
    assert list(progress.progress(range(3), "work", "step")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "DELAY", 0.01)
    for _ in progress.progress(range(3), "work", "step"):
        time.sleep(0.15)
    assert "work" in capsys.readouterr().err
