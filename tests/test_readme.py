"""README holds: its commands run as written, in order, and its links lead somewhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pandas as pd
import pytest

from annotate import export_10x
from conftest import ROOT, run, run_inside
from readers.counts import read_counts

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
# What makes each script quick. The last of two equal flags holds, so that these come after.
SMALL = {
    "train_gmvae.py": "--epochs 4 --vae-epochs 2",
    "train_decoder.py": "--epochs 2 --n-hidden 16",
    "train_encoder.py": "--epochs 20",
    "bulk2sc.py": "--n-cells 20",
    "evaluate.py": "--n-draws 1 --n-pseudobulks 5 --n-trees 5 --no-baselines",
    "make_figures.py": "--max-cells 40",
    "annotate.py": "",
    "benchmarks/benchmark.py": """--only '["bulk2sc, in memory", 50, 20]' """,
}


def commands(text):
    """The commands of a block, without comments, joined over ends of lines, parted at &&."""
    text = text.replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
    return [part.strip() for line in lines if line for part in line.split("&&")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files of the repository, and those that a reader of README is taken to have."""
    folder = tmp_path_factory.mktemp("readme") / "bulk2sc"
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "markers.csv", ROOT / "README.md"]:
        shutil.copy(path, folder)
    for name in ("weights", "benchmarks", "readers", "runtime"):
        shutil.copytree(ROOT / name, folder / name)
    rng = np.random.default_rng(0)
    cells = read_counts()  # the embedded dataset stands in for every download
    symbols = pd.read_csv(ROOT / "markers.csv")["geneSymbolmore1"].str.split(",").explode()
    genes = pd.Index(cells.var_names).union(pd.Index(symbols)).unique()
    counts = pd.DataFrame(rng.poisson(50, (len(genes), 3)), genes, ["s1", "s2", "s3"])
    counts.to_csv(folder / "my_blood_samples.csv")
    counts.to_csv(folder / "counts.csv.gz")
    fractions = pd.DataFrame({"sample": counts.columns, "T": [0.6, 0.5, 0.7], "B": [0.1, 0.2, 0.1]})
    fractions.to_csv(folder / "flow_fractions.csv", index=False)
    few = cells[rng.permutation(cells.n_obs)[:250]]  # forests of evaluate.py take their time
    export_10x(few, folder / "filtered_feature_bc_matrix")
    with tarfile.open(folder / "download.tar.gz", "w:gz") as tar:
        tar.add(folder / "filtered_feature_bc_matrix", "filtered_feature_bc_matrix")
    shutil.rmtree(folder / "filtered_feature_bc_matrix")
    return folder


def run_command(command, folder, ran):
    """Run one command as written, with what makes it small; a script's second run needs no new
    process."""
    words = shlex.split(command)
    if words[:3] == ["python3", "-m", "venv"] or words[0].endswith("/pip"):
        return  # the environment is this one
    if words[0] == "curl":
        shutil.copy(folder / "download.tar.gz", folder / words[-1].rsplit("/", 1)[1])
        return
    if words[0] in ("python", ".venv/bin/python"):
        if words[1:3] == ["-m", "pytest"]:
            return  # this very run
        assert words[1] in SMALL, f"README runs {words[1]}, which this test does not know"
        for name in {"w1", "w2"} & set(words):  # "for each seed 0, 1, 2"
            shutil.copytree(folder / "w0", folder / name, dirs_exist_ok=True)
        words = ["markers.csv" if word.startswith("https://") else word for word in words]
        words = [sys.executable, *words[1:], *shlex.split(SMALL[words[1]])]
    else:
        assert words[0] in ("tar", "mv"), f"README runs {words[0]}, which this test does not know"
    if any(words[1] in other.split() for other in ran) and words[1] in os.listdir(folder):
        done = run_inside(*words[1:], cwd=folder)
    else:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{command}\n{done.stderr[-1500:]}"
    if words[1:2] == ["annotate.py"]:  # from here on there are cell types for a map of lineages
        labels = pd.read_csv(folder / "pbmc1k_v3" / "barcode_to_celltype.csv")
        types = sorted(set(labels["cell_type"]) - {"Unknown"})
        lines = [f"{name},{'T' if 'T cells' in name else 'B'}\n" for name in types]
        (folder / "lineages.csv").write_text("cell_type,lineage\n" + "".join(lines))


def test_code_blocks_run_in_order(clone):
    ran = []
    for language, text in BLOCKS:
        if language == "bash":
            for command in commands(text):
                run_command(command, clone, ran)
                ran.append(command)
        elif language == "python":
            environment = os.environ | {"MPLBACKEND": "Agg"}
            done = subprocess.run(
                [sys.executable, "-c", text], cwd=clone, capture_output=True, text=True,
                env=environment,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-1500:]
        else:  # output and tables, not to be run
            assert language == "text", f"a block of {language or 'no language'}"
    scripts = {word for command in ran for word in command.split() if word.endswith(".py")}
    assert scripts == set(SMALL)  # README shows every script
    for name in ("generated.h5ad", "proportions.csv", "proportions.png", "figures/joint.png"):
        assert (clone / name).is_file(), name


def anchors(text):
    """What GitHub makes of headings."""
    heads = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", ["README.md", "NOTES.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)]+)\)", outside)
    for link in links:
        link = link.replace("\n", "")
        if link.startswith("#"):
            assert link[1:] in anchors(text), link
        elif not link.startswith("https://"):
            assert (ROOT / link).exists(), link
    for path in re.findall(r"`([\w/.]+\.(?:py|R|csv|md|txt|cff))`", outside):
        made = {
            "barcode_to_celltype.csv",
            "found_celltypes.csv",
            "clusters.csv",
            "proportions.csv",
            "evaluation.csv",
        }
        assert path in made or (ROOT / path).exists(), path


def test_every_flag_in_readme_exists():
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    known = {"--index-url", "--help"}  # pip's
    known |= {"--standalone", "--nproc-per-node"}  # torchrun's
    for script in SMALL:
        done = (run if "/" in script else run_inside)(script, "--help")
        known |= set(re.findall(r"--[a-z][a-z-]+", done.stdout))
    assert not flags - known
