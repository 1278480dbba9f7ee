"""README and docs/ hold true: their commands run as written, in order, and their links work."""

import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from annotate import export_10x
from benchmarks import benchmark, compare_cells
from conftest import FOLDERS, ROOT, run_inside, without_umap
from readers.counts import read_counts

# Pages with commands, in the order in which they run.
GUIDES = [
    "README.md",
    "docs/your-data.md",
    "docs/samples.md",
    "docs/large-data.md",
    "docs/results.md",
    "docs/figures.md",
    "docs/speed.md",
    "examples/README.md",
]
# Pages that stand alone, each with its own commands and one python block behind them.
ALONE = [
    "docs/python.md",
    "docs/tutorial-cohort.md",
    "docs/tutorial-tissue.md",
    "docs/tutorial-benchmark.md",
]
PAGES = sorted(
    {*GUIDES, "CHANGELOG.md", "tests/README.md"}
    | {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}


def blocks_of(name):
    """``(language, text)`` of the code blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", TEXTS[name], flags=re.DOTALL | re.MULTILINE)


BLOCKS = [block for name in GUIDES for block in blocks_of(name)]
# What makes each script quick. If a flag is given twice the last one wins, so these come last.
SMALL = {
    "train.py": "--epochs 4 2 20",
    "train_gmvae.py": "--epochs 4 --vae-epochs 2",
    "train_decoder.py": "--epochs 2 --n-hidden 16",
    "train_encoder.py": "--steps 20",
    "bulk2sc.py": "--n-cells 20",
    "evaluate.py": "--n-draws 1 --n-pseudobulks 5 --n-trees 5",
    "benchmarks/compare_cells.py": "",  # only its flags; test_comparisons.py runs it
    "benchmarks/compare_states.py": "--n-draws 1 --n-trees 5 --cells-per-sample 200",
    "make_figures.py": "--max-cells 40",
    "annotate.py": "",
    "simulate_bulks.py": "--n-bulks 6",
    "benchmarks/benchmark.py": "",  # only its flags; it runs in test_benchmark.py
    "examples/simulate_bulk.py": "",
}
# Shown, but their data cannot be had here, or they run in another test.
NOT_RUN = [
    "benchmarks/compare_proportions.py",
    "examples/pbmc_reference.py",
    "examples/cellxgene.py",
]


def commands(text):
    """The commands of a block without comments; continued lines are joined, && separates."""
    text = text.replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
    return [part.strip() for line in lines if line for part in line.split("&&")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files of the repository, and those that a reader is assumed to have."""
    folder = tmp_path_factory.mktemp("readme") / "bulk2sc"
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "README.md"]:
        shutil.copy(path, folder)
    for name in ("weights", "benchmarks", "examples", "tables", *FOLDERS):
        shutil.copytree(ROOT / name, folder / name)
    rng = np.random.default_rng(0)
    cells = read_counts()  # the embedded dataset stands in for every download
    symbols = pd.read_csv(ROOT / "tables/markers.csv")["geneSymbolmore1"].str.split(",").explode()
    genes = pd.Index(cells.var_names).union(pd.Index(symbols)).unique()
    mean = rng.lognormal(3, 2, (len(genes), 1))  # as far apart as in RNA-seq
    counts = pd.DataFrame(rng.poisson(mean, (len(genes), 3)), genes, ["s1", "s2", "s3"])
    counts.to_csv(folder / "counts.csv.gz")
    fractions = pd.DataFrame({"sample": counts.columns, "T": [0.6, 0.5, 0.7], "B": [0.1, 0.2, 0.1]})
    fractions.to_csv(folder / "flow_fractions.csv", index=False)
    few = cells[rng.permutation(cells.n_obs)[:250]].copy()  # evaluate.py's forests are slow
    few.obs["cell_type"] = few.obs["bulk_labels"]
    cells.obs["cell_type"] = cells.obs["bulk_labels"]
    cells.obs["donor"] = np.array(["d1", "d2", "d3"])[np.arange(cells.n_obs) % 3]
    cells.obs["condition"] = np.array(["control", "treated"])[np.arange(cells.n_obs) // 3 % 2]
    cells.obs["sample"] = cells.obs["donor"] + "_" + cells.obs["condition"]
    cells.write_h5ad(folder / "atlas.h5ad")
    export_10x(few, folder / "filtered_feature_bc_matrix")
    with tarfile.open(folder / "download.tar.gz", "w:gz") as tar:
        tar.add(folder / "filtered_feature_bc_matrix", "filtered_feature_bc_matrix")
    shutil.rmtree(folder / "filtered_feature_bc_matrix")
    return folder


def run_command(command, folder):
    """Run one command as written, but small, and Python within this process."""
    words = shlex.split(command)
    if words[:3] == ["python3", "-m", "venv"] or words[0].endswith("/pip"):
        return  # the environment is this one
    if words[0] == "curl":
        shutil.copy(folder / "download.tar.gz", folder / words[-1].rsplit("/", 1)[1])
        return
    if words[0] in ("python", ".venv/bin/python"):
        if words[1:3] == ["-m", "pytest"]:
            return  # this very run
        assert words[1] in SMALL, f"the pages run {words[1]}, unknown to this test"
        for name in {"w1", "w2"} & set(words):  # "for each seed 0, 1, 2"
            shutil.copytree(folder / "w0", folder / name, dirs_exist_ok=True)
        words = ["tables/markers.csv" if word.startswith("https://") else word for word in words]
        words += shlex.split(SMALL[words[1]])
        with (
            mock.patch.object(benchmark, "main", lambda cfg: None),
            mock.patch.object(compare_cells, "main", lambda cfg: None),
            without_umap(),
        ):
            done = run_inside(*words[1:], cwd=folder, as_written="cohort.h5ad" in words)
    else:
        assert words[0] in ("tar", "mv"), f"the pages run {words[0]}, unknown to this test"
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{command}\n{done.stderr[-1500:]}"
    if words[1:2] == ["annotate.py"]:  # from here on lineages of its cell types are needed
        labels = pd.read_csv(folder / "pbmc1k_v3" / "barcode_to_celltype.csv")
        types = sorted(set(labels["cell_type"]) - {"Unknown"})
        lines = [f"{name},{'T' if 'T cells' in name else 'B'}\n" for name in types]
        (folder / "lineages.csv").write_text("cell_type,lineage\n" + "".join(lines))


def run_python(text, folder):
    """Run a block of Python within this process; returns what it prints."""
    text = text.replace("epochs=(15, 15, 60)", "epochs=(2, 2, 4)")
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        exec(text, {"__name__": "__main__"})
    return out.getvalue()


@pytest.mark.parametrize("name", ALONE)
def test_page_runs_alone(clone, name):
    printed = ""
    for language, text in blocks_of(name):
        if language == "bash":
            for command in commands(text):
                run_command(command, clone)
        elif language == "python":
            printed += run_python(text, clone)
        else:
            assert language == "text", f"a block of {language or 'no language'}"
    if name == "docs/tutorial-benchmark.md":  # its method follows the samples
        assert float(re.search(r"within types: (\S+)", printed)[1]) > 0.4
    if name == "docs/tutorial-cohort.md":  # no difference was put in
        assert "Empty DataFrame" in printed and "p = " in printed
        assert (clone / "cohort.report.html").is_file()


def test_code_blocks_run_in_order(clone):
    ran = []
    for language, text in BLOCKS:
        if language == "bash":
            for command in commands(text):
                run_command(command, clone)
                ran.append(command)
        elif language == "python":
            run_python(text, clone)
        else:  # output and tables, not to be run; R runs in test_formats.py
            assert language in ("text", "r"), f"a block of {language or 'no language'}"
    alone = [text for name in ALONE for language, text in blocks_of(name) if language == "bash"]
    ran += [command for text in alone for command in commands(text)]
    scripts = {word for command in ran for word in command.split() if word.endswith(".py")}
    assert scripts == set(SMALL)  # the pages show every script
    endings = ["h5ad", "proportions.csv", "proportions.png", "fit.csv", "expression.h5ad"]
    for name in (*(f"generated.{ending}" for ending in endings), "figures/joint.png"):
        assert (clone / name).is_file(), name
    # The example bulk is what its script writes, up to rounding on another machine.
    again, shipped = (
        pd.read_csv(folder / "examples" / "bulk_pbmc_simulated.csv.gz", index_col=0)
        for folder in (clone, ROOT)
    )
    assert again.index.equals(shipped.index) and again.columns.equals(shipped.columns)
    np.testing.assert_allclose(again.sum(), shipped.sum(), rtol=0.01)


def anchors(text):
    """What GitHub makes of headings."""
    heads = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    folder = (ROOT / name).parent
    outside = re.sub(r"^```.*?^```$", "", TEXTS[name], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)]+)\)", outside):
        link = link.replace("\n", "")
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link
    for path in re.findall(r"`([\w/.]+\.(?:py|R|csv|md|txt|cff))`", outside):
        generated = {f"generated.{table}.csv" for table in ("proportions", "fit")}
        generated |= {"barcode_to_celltype.csv", "found_celltypes.csv", "clusters.csv", "cells.csv"}
        generated.add("evaluation.csv")
        assert path in generated or (ROOT / path).exists() or (folder / path).exists(), path


def help_of(script):
    """What --help prints."""
    if "/" not in script:
        return run_inside(script, "--help").stdout
    out = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [script, "--help"]),
        contextlib.redirect_stdout(out),
        pytest.raises(SystemExit),
    ):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return out.getvalue()


def test_every_flag_in_the_pages_exists():
    pages = "\n".join(text for name, text in TEXTS.items() if name != "CHANGELOG.md")
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", pages))
    known = {"--index-url", "--help"}  # pip's
    known |= {"--universal", "--python-version", "--no-annotate"}  # uv's
    known |= {"--standalone", "--nproc-per-node"}  # torchrun's
    for script in [*SMALL, *NOT_RUN]:
        known |= set(re.findall(r"--[a-z][a-z-]+", help_of(script)))
    assert flags <= known, flags - known
