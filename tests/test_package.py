"""The wheel: one package, whose commands and functions work far from the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import anndata
import pytest

from conftest import FOLDERS, ROOT
from runtime.version import VERSION
from test_layout import imports_of


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the files of the project, built from a copy as by ``pip install .``."""
    source, folder = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "figures", "docs", "tests", "build", ".*cache"
    )
    shutil.copytree(ROOT, source / "bulk2sc", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", folder]
    done = subprocess.run([*command, source / "bulk2sc"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel unpacked, as in site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def run(installed, code, cwd):
    """Python code far from the checkout, which finds the unpacked wheel alone."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    cache = ROOT / "runtime" / "__pycache__"  # which git ignores
    environment |= {"CUDA_VISIBLE_DEVICES": "", "NUMBA_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def test_wheel_is_one_package(installed):
    tops = {path.name for path in installed.iterdir()}
    assert tops == {"bulk2sc", f"bulk2sc-{VERSION}.dist-info"}
    for path in ROOT.glob("*.py"):
        assert (installed / "bulk2sc" / path.name).exists() == (path.name != "setup.py")
    for name in ("tables/markers.csv", "plots/report.html", "weights/pbmc/scDecoder_model.pt"):
        assert (installed / "bulk2sc" / name).read_bytes() == (ROOT / name).read_bytes()


def test_imports_of_the_package_are_its_own(installed):
    """A user may have modules called data or models."""
    own = {path.stem for path in ROOT.glob("*.py")} | FOLDERS
    for path in (installed / "bulk2sc").rglob("*.py"):
        for module, names in imports_of(path):
            is_script = module == "bulk2sc" and names  # from bulk2sc import bulk2sc
            assert is_script or module.split(".")[0] not in own - {"bulk2sc"}, (path, module)
        assert "sys.path.insert" not in path.read_text(), path


def test_command_functions_and_errors_far_from_the_checkout(installed, tmp_path):
    for name in ("data", "models"):  # not to be taken for the package's own
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    code = (
        "import sys; from bulk2sc import cli\n"
        "sys.argv = ['bulk2sc', '--known-proportions', 'mix.csv', '--n-cells', '5']\n"
        "sys.argv += ['--no-report']\n"
        "cli.bulk2sc()\n"
        "import pandas as pd; from bulk2sc.api import generate, load, mixtures\n"
        "models = load()\n"
        "cells = generate(mixtures(pd.read_csv('mix.csv', index_col=0), models), models, 5)\n"
        "cells.write_h5ad('again.h5ad')\n"
        "sys.argv = ['x', '--bulk', 'none']\n"
        "cli.bulk2sc()\n"
    )
    (tmp_path / "mix.csv").write_text("sample,Naive B cells,Platelets\nx,0.5,0.5\ny,1,0\n")
    done = run(installed, code, tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: none: no such file")
    assert "weights/pbmc: 12 cell types" in done.stdout
    expected = anndata.read_h5ad(tmp_path / "generated.h5ad")
    assert expected.n_obs == 10
    assert (anndata.read_h5ad(tmp_path / "again.h5ad").X != expected.X).nnz == 0


def test_every_command_is_a_script(installed):
    with open(ROOT / "pyproject.toml", "rb") as file:
        commands = tomllib.load(file)["project"]["scripts"]
    page = (ROOT / "docs" / "python.md").read_text()
    for command, target in commands.items():
        assert re.search(rf"\b{command}\b(?!-)", page), command
        script = target.removeprefix("bulk2sc.cli:")
        assert command in ("bulk2sc", f"bulk2sc-{script.replace('_', '-')}")
        assert "Settings" in (ROOT / f"{script}.py").read_text()


def test_recipes_name_the_pinned_versions():
    """The conda recipe and the image install what requirements.txt does."""
    recipe = (ROOT / "package" / "meta.yaml").read_text()
    image = (ROOT / "package" / "Dockerfile").read_text()
    other = {"torch": "pytorch", "matplotlib": "matplotlib-base", "igraph": "python-igraph"}
    other["zlib-ng"] = "python-zlib-ng"
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        pin = line.split("#")[0].strip()
        if not pin or pin.startswith("-"):
            continue
        name, version = pin.split("==")
        assert f"    - {other.get(name, name)} {version}\n" in recipe, name
        assert name != "torch" or f"torch=={version}" in image
    assert f'set version = "{VERSION}"' in recipe


def test_every_requirement_is_locked():
    """constraints.txt was renewed after requirements.txt and requirements-test.txt were edited."""
    locked = (ROOT / "constraints.txt").read_text().splitlines()
    for name in ("requirements.txt", "requirements-test.txt"):
        pins = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        missing = {pin for pin in pins if pin and not pin.startswith("-")} - set(locked)
        assert not missing, (name, missing)
