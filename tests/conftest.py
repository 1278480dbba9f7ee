"""Synthetic cells that train in seconds, and helpers that run the real scripts."""

import contextlib
import functools
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
from matplotlib.figure import Figure

# One thread per pytest worker; torch reads this when it is imported. Numba is limited as well: its
# first parallel loop (in scanpy's neighbours) sets OpenMP's number of threads, and so torch's.
# Two trainings of two threads each on two cores take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
# Of modules; package/ has what is in the wheel alone.
FOLDERS = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"package"}
sys.path.insert(0, str(ROOT))


from readers import backed, bulk_files, counts, hdf5_probe, tenx  # noqa: E402  not an installed package
from runtime.errors import InputError  # noqa: E402
from runtime.script import parse_args, run_script  # noqa: E402

# A slash and two spaces, as in real data.
CELL_TYPES = ["B cells", "CD4+/CD25 T", "Natural killer  cells"]


def unpack(bulk):
    """Values, mask of measured genes and samples of a Bulk."""
    return bulk.values, bulk.measured, bulk.samples


def refused(call, *words):
    """Check that the call raises an InputError of one line that has these words."""
    with pytest.raises(InputError) as error:
        call()
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert str(word) in line, f"{word!r} not in {line!r}"


def make_cells(n_per_type=(40, 30, 20), n_genes=60, seed=0):
    """Negative binomial cells of a few types, each with a separate block of marker genes."""
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
    order = rng.permutation(len(codes))  # not sorted by type, as in real data
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)])
    var["gene_ids"] = [f"ENSG{i:011d}" for i in range(n_genes)]
    return anndata.AnnData(sp.csr_matrix(X), obs=obs, var=var)[order].copy()


def write_10x(folder, adata, layout="new"):
    """Write a 10x folder line by line, independently of the code under test."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"ENSG{i:011d}\t{g}" for i, g in enumerate(adata.var_names)]
    if layout == "new":
        rows = [r + "\tGene Expression" for r in rows]
    contents = {
        "matrix.mtx": None,
        "barcodes.tsv": "\n".join(adata.obs_names) + "\n",
        ("features.tsv" if layout == "new" else "genes.tsv"): "\n".join(rows) + "\n",
    }
    for name, text in contents.items():
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
    """Write the layout of Cell Ranger 3, or of 2: a group named by genome, and no feature types."""
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


def without_report(script, arguments):
    """Flags of a script; bulk2sc.py writes its report only if --report asks for it: it is slow."""
    if script == "bulk2sc.py" and not {"--report", "--help"} & set(arguments):
        return "--no-report", *arguments
    return arguments


def run(script, *arguments, cwd=ROOT, check=True):
    """Run one of the project's scripts as a user does. Returns the finished process."""
    arguments = without_report(script, arguments)
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=600, env=environment
    )
    if check:
        assert done.returncode == 0, done.stderr[-2000:]
    return done


def run_inside(script, *arguments, cwd=ROOT, as_written=False):
    """As :func:`run`, but within this process, which saves the start-up time.

    as_written: leaves a report to the script's own default.
    """
    arguments = arguments if as_written else without_report(script, arguments)
    module = importlib.import_module(".".join(Path(script).with_suffix("").parts))
    stdout, stderr, old_folder = io.StringIO(), io.StringIO(), os.getcwd()
    code = 0
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        mock.patch.object(sys, "argv", [script, *map(str, arguments)]),
    ):
        os.chdir(cwd)
        try:
            run_script(module.main, parse_args(module.Settings))
        except SystemExit as end:
            code = end.code
        finally:
            os.chdir(old_folder)
    if isinstance(code, str):  # sys.exit("message") prints it and exits with 1
        code, stderr = 1, io.StringIO(stderr.getvalue() + code + "\n")
    return subprocess.CompletedProcess(script, code or 0, stdout.getvalue(), stderr.getvalue())


@contextlib.contextmanager
def without_umap():
    """Draw clusters by two PCs: UMAP takes ten seconds to compile. test_annotate.py draws it."""
    import scanpy as sc

    def two_pcs(cells, **_):
        cells.obsm["X_umap"] = cells.obsm["X_pca"][:, :2]

    with (
        mock.patch.object(sc.pp, "neighbors", lambda cells, **_: None),
        mock.patch.object(sc.tl, "umap", two_pcs),
    ):
        yield


@functools.cache
def r_has(*packages):
    """Whether R and these of its packages are installed; none is loaded, which takes seconds."""
    if shutil.which("Rscript") is None:
        return False
    names = ", ".join(f'"{name}"' for name in packages)
    code = f"quit(status = !all(nzchar(sapply(c({names}), \\(p) system.file(package = p)))))"
    return subprocess.run(["Rscript", "-e", code], capture_output=True).returncode == 0


def assert_one_line_error(done, *words):
    """The process failed with a single line on stderr that contains each of these words."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert str(word) in lines[0], f"{word!r} not in {lines[0]!r}"


# Random inputs of test_properties.py. They are the same in every run, so that only a change of the
# code makes a test fail. HYPOTHESIS_PROFILE=long tries many more, different ones in every run.
hypothesis.settings.register_profile(
    "default", derandomize=True, deadline=None, print_blob=True, max_examples=20
)
hypothesis.settings.register_profile("long", deadline=None, print_blob=True, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Batches of eight, so that ninety cells give enough steps for means and dispersions to converge.
TINY = {
    "train_gmvae.py": [
        *("--epochs", 60, "--vae-epochs", 20, "--batch-size", 8, "--n-hidden", 32, "--n-latent", 5),
        *("--lr", 1e-3),
    ],
    "train_decoder.py": ["--epochs", 60, "--batch-size", 8, "--n-hidden", 32, "--lr", 1e-3],
    "train_encoder.py": ["--steps", 200, "--batch-size", 32, "--n-hidden", 64, "--lr", 2e-3],
}


# For tests of shapes and files, which need no converged model.
QUICK = TINY | {
    "train_gmvae.py": [*TINY["train_gmvae.py"], "--epochs", 6, "--vae-epochs", 2],
    "train_decoder.py": [*TINY["train_decoder.py"], "--epochs", 6],
    "train_encoder.py": [*TINY["train_encoder.py"], "--steps", 20],
}


def train(*common_flags, settings=TINY, **extra):
    """Run the three trainings within this process; extra: further flags, by the script's stem."""
    for script, flags in settings.items():
        extra_flags = extra.get(script.removesuffix(".py"), [])
        done = run_inside(script, *common_flags, *flags, *extra_flags)
        assert done.returncode == 0, done.stderr[-2000:]


# Files that take longest come first, so that the two processes of the tests end together.
LONGEST = [
    *("test_readme", "test_evaluate", "test_scripts", "test_annotate", "test_outputs"),
    *("test_interruption", "test_distributed", "test_formats", "test_samples"),
]


def pytest_collection_modifyitems(items):
    names = [*LONGEST, ""]
    items.sort(key=lambda item: names.index(item.path.stem if item.path.stem in LONGEST else ""))


def train_apart(*common_flags, stages=tuple(TINY)):
    """Run :func:`train` in one new process, without what other tests have loaded into this one."""
    chosen = {stage: TINY[stage] for stage in stages}
    code = f"import sys; from conftest import train; train(*sys.argv[1:], settings={chosen})"
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, *map(str, common_flags)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(autouse=True)
def hdf5_in_this_process(request, monkeypatch):
    """Check HDF5 files within this process, half a second faster each.

    Scripts that run as separate processes, and test_untrusted.py, use the sandboxed check.
    """
    if request.path.stem != "test_untrusted":
        for module in (counts, tenx, bulk_files, backed):
            monkeypatch.setattr(module, "check_hdf5", hdf5_probe.look_through)


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Pictures are files of one blank figure, half the time of a short training, or drawn.

    The mark ``draws`` has those of a test or a file drawn.
    """
    if request.node.get_closest_marker("draws") is None:
        save = Figure.savefig
        blank = lambda figure, target, **given: save(Figure((1, 1)), target, **given | {"dpi": 9})  # noqa: E731
        monkeypatch.setattr(Figure, "savefig", blank)


@pytest.fixture
def cells():
    return make_cells()


@pytest.fixture(scope="session")
def h5ad(tmp_path_factory):
    """A file of synthetic cells with labels in .obs["cell_type"]."""
    path = tmp_path_factory.mktemp("data") / "cells.h5ad"
    make_cells().write_h5ad(path)
    return path


def train_once(name, tmp_path_factory, worker_id, train_into):
    """A copy of a weights folder that the first pytest worker to need it trains.

    name: of the shared folder. train_into: function of the folder.
    """
    shared, copy = tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("weights")
    shared = (shared if worker_id == "master" else shared.parent) / name
    with FileLock(f"{shared}.lock"):
        if not (shared / "bulkEncoder_loss.png").exists():  # the last file of the last stage
            train_into(shared)
    shutil.copytree(shared, copy, dirs_exist_ok=True)
    return copy


@pytest.fixture(scope="session")
def trained(tmp_path_factory, h5ad, worker_id):
    """A weights folder, trained by the three real scripts with tiny settings, in a new process."""

    def train_into(folder):
        train_apart("--data", h5ad, "--weights", folder)

    return train_once("trained", tmp_path_factory, worker_id, train_into)


# ------------------------------------------------------------------ references of many samples

TREATED_HERE, TREATED_EVERYWHERE = slice(10, 20), slice(50, 60)  # genes, in one type and in all


def make_sample_cells(n=12, n_donors=4, seed=0):
    """Cells of donors under two conditions, ``n`` of each type in each sample.

    Treatment raises TREATED_HERE sixfold in the first type alone, and TREATED_EVERYWHERE in all
    types. ``.obs`` has cell_type, sample ("d1 control"), donor and treatment.
    """
    rng = np.random.default_rng(seed)
    profile = rng.gamma(2.0, 1.0, (3, 60))
    for k in range(3):
        profile[k, 20 * k : 20 * k + 10] *= 8
    treated = profile.copy()
    treated[0, TREATED_HERE] *= 6
    treated[:, TREATED_EVERYWHERE] *= 6
    of_donor = rng.lognormal(0, 0.1, (n_donors, 1, 1, 60))  # (donor, condition, type, gene)
    profile = of_donor * np.stack([profile, treated])
    profile /= profile.sum(axis=3, keepdims=True)
    index = [codes.ravel() for codes in np.indices((n_donors, 2, 3, n))]
    mean = profile[tuple(index[:3])] * rng.lognormal(7, 0.3, len(index[0]))[:, None]
    X = rng.poisson(mean * rng.gamma(10, 1 / 10, mean.shape)).astype(np.int32)
    obs = pd.DataFrame(index=[f"CELL{i:03d}-1" for i in range(len(X))])
    obs["cell_type"] = np.array(CELL_TYPES)[index[2]]
    obs["donor"] = np.array([f"d{i + 1}" for i in range(n_donors)])[index[0]]
    obs["treatment"] = np.array(["control", "treated"])[index[1]]
    obs["sample"] = obs["donor"] + " " + obs["treatment"]
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(60)])
    var["gene_ids"] = [f"ENSG{i:011d}" for i in range(60)]
    return anndata.AnnData(sp.csr_matrix(X), obs=obs, var=var)[rng.permutation(len(X))].copy()


def make_sample_bulks(cells):
    """Sum of all cells of each sample: a table of genes x samples."""
    sample = cells.obs["sample"].to_numpy()
    sums = {name: cells.X[np.flatnonzero(sample == name)].sum(axis=0).A1 for name in set(sample)}
    return pd.DataFrame(sums, index=cells.var_names).sort_index(axis=1)


OF_SAMPLES = ["--samples", "sample", "--donors", "donor"]
OF_CONDITIONS = ["--conditions", "treatment", "--baseline", "control"]
# Wide and fast, so that the latent finds the treatment within a few hundred steps; at a higher
# weight of the KL, one seed in three does not find it in every type.
SMALL = {
    "train_gmvae.py": [
        *("--epochs", 24, "--vae-epochs", 12, "--batch-size", 16, "--lr", 3e-3, "--dropout", 0),
        *("--kl-end", 0.1, "--n-hidden", 128, "--n-latent", 4),
    ],
    "train_decoder.py": [
        *("--epochs", 24, "--batch-size", 16, "--lr", 3e-3, "--n-hidden", 64),
        *("--n-components", 4, "--dropout", 0),
    ],
    "train_encoder.py": ["--steps", 50, "--batch-size", 32, "--n-hidden", 32, "--lr", 1e-3],
}


@pytest.fixture(scope="session")
def sample_h5ad(tmp_path_factory):
    """A file of :func:`make_sample_cells`."""
    path = tmp_path_factory.mktemp("samples") / "cells.h5ad"
    make_sample_cells().write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def trained_samples(tmp_path_factory, sample_h5ad, worker_id):
    """As ``trained``, on a reference of eight samples; donor d4 is held out."""

    def train_into(folder):
        import train_gmvae

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_gmvae, "KL_START", 0.02)
            flags = ["--data", sample_h5ad, "--weights", folder, *OF_SAMPLES, *OF_CONDITIONS]
            train(*flags, settings=SMALL, train_gmvae=["--held-out-donors", "d4"])

    return train_once("trained_samples", tmp_path_factory, worker_id, train_into)


# ------------------------------------------------------------- files and tables of evaluations

MAP = "cell_type,lineage\n"
FEW = ["--n-draws", 1, "--n-pseudobulks", 5, "--n-trees", 5]
LINEAGES = ["B", "T and NK"]


def read_table(folder):
    return pd.read_csv(folder / "evaluation.csv", keep_default_na=False, na_values=["nan"])


def means(table):
    """Mean by method and metric, of all types together."""
    return table[table["cell_type"] == ""].set_index(["method", "metric"])["mean"].astype(float)


def write_measured(folder):
    """Files of 12 bulks of known composition, of their fractions, and of the lineages.

    Bulks are of another platform. Fractions are in percent, beside a column that is no lineage;
    they lack one bulk and have another instead. Returns flags.
    """
    cells, rng = make_cells(seed=0), np.random.default_rng(5)
    is_b = (cells.obs["cell_type"] == CELL_TYPES[0]).to_numpy()
    share = np.linspace(0, 1, 12)
    profile = np.stack([cells.X[mask].toarray().mean(axis=0) for mask in (is_b, ~is_b)])
    profile *= rng.lognormal(0, 0.2, profile.shape[1])
    bulk = pd.DataFrame(
        np.stack([share, 1 - share], axis=1) @ profile,
        index=[f"donor {i}" for i in range(12)],
        columns=cells.var_names,
    )
    bulk.iloc[:, 5:].T.to_csv(folder / "bulk.csv")  # without five of the model's genes
    fractions = pd.DataFrame({"T and NK": 70 * (1 - share), "Unknown": 30, "B": 70 * share})
    fractions = fractions.set_axis(bulk.index).rename({"donor 3": "nobody"})
    fractions.iloc[::-1].to_csv(folder / "fractions.csv", index_label="sample")
    names = [f" {CELL_TYPES[0]},B", f"{CELL_TYPES[1]},T and NK", f"{CELL_TYPES[2]} ,T and NK"]
    (folder / "map.csv").write_text(MAP + "\n".join(names) + "\n")
    return [
        *("--bulk", folder / "bulk.csv", "--fractions", folder / "fractions.csv"),
        *("--lineages", folder / "map.csv"),
    ]


@pytest.fixture
def measured(tmp_path):
    """:func:`write_measured` in a folder of the test."""
    return write_measured(tmp_path)


@pytest.fixture
def no_forests(monkeypatch):
    """Without the slowest metric by far and the picture, where a test does not need them."""
    from evaluation import metrics, tables

    monkeypatch.setattr(metrics, "random_forest_auroc", lambda *_: 0.5)
    monkeypatch.setattr(tables, "write_evaluation", lambda *_: None)
