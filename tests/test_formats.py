"""Outputs of bulk2sc.py as the next tool takes them: scanpy, Seurat, concatenation."""

import gzip
import hashlib
import io
import subprocess
import time
import zlib
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.io
import scipy.sparse as sp

from conftest import CELL_TYPES, ROOT, assert_one_line_error, make_cells, r_has, run_inside
from readers.counts import read_counts
from runtime import cell_writers, compression, matrix_market
from runtime.cell_writers import open_cells
from runtime.errors import InputError


@pytest.fixture
def bulk(tmp_path):
    """A table of two bulks in the genes of the trained model."""
    X = make_cells().X
    table = {"a": X[:40].sum(axis=0).A1, "b": X[40:].sum(axis=0).A1}
    path = tmp_path / "bulk.csv"
    pd.DataFrame(table, index=[f"GENE{i}" for i in range(60)]).to_csv(path)
    return path


def generate(trained, bulk, out, *flags, n_cells=30):
    given = ["--weights", trained, "--bulk", bulk, "--out", out, "--n-cells", n_cells]
    done = run_inside("bulk2sc.py", *given, *flags)
    assert done.returncode == 0, done.stderr
    return done


# ------------------------------------------------------------------------------------------ .h5ad


def test_h5ad_says_what_it_holds_and_where_it_is_from(trained, bulk, tmp_path):
    generate(trained, bulk, tmp_path / "g.h5ad", "--columns", "a", "b")
    cells = anndata.read_h5ad(tmp_path / "g.h5ad")
    assert cells.uns["X_name"] == "counts" and (cells.X.data == np.rint(cells.X.data)).all()
    assert cells.obs["synthetic"].dtype == bool and cells.obs["synthetic"].all()
    assert list(cells.var.columns) == ["gene_ids", "feature_types"]
    assert len(cells.uns["cell_type_colors"]) == len(CELL_TYPES)
    settings = cells.uns["settings"]
    assert settings["n_cells"] == 30 and settings["pseudocount"] == 1.0
    assert list(settings["columns"]) == ["a", "b"]
    assert not {"data", "labels", "batch_size", "proportions"} & set(settings)  # not used
    origin = cells.uns["bulk2sc"]
    files = origin["files"].set_index("file")
    for path in (bulk, trained / "scDecoder_model.pt", trained / "bulkEncoder_model.pt"):
        assert files.loc[str(path), "sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert origin["command"].startswith(f"python bulk2sc.py --bulk {bulk}")
    assert all(name.startswith(f"{origin['run']}_") for name in cells.obs_names)


def test_h5ad_has_no_encoding_that_older_anndata_lacks(trained, bulk, tmp_path):
    """Regression: an empty raw, whose encoding is new in 0.12, made 0.11 refuse the whole file."""
    known = {"anndata", "array", "categorical", "csr_matrix", "dataframe", "dict"}
    known |= {"numeric-scalar", "string", "string-array"}  # as of anndata 0.8
    generate(trained, bulk, tmp_path / "g.h5ad")
    for name in ("g.h5ad", "g.expression.h5ad"):
        found = []
        with h5py.File(tmp_path / name) as file:
            file.visititems(lambda _, element, into=found: into.append(dict(element.attrs)))
        assert {attrs["encoding-type"] for attrs in found if "encoding-type" in attrs} <= known


def test_command_of_an_output_makes_it_again(trained, bulk, tmp_path):
    generate(trained, bulk, tmp_path / "g.h5ad", "--seed", 3, "--calibrate", "uniform")
    cells = anndata.read_h5ad(tmp_path / "g.h5ad")
    python, script, *flags = cells.uns["bulk2sc"]["command"].split()
    assert (python, script) == ("python", "bulk2sc.py")
    (tmp_path / "g.h5ad").unlink()
    done = run_inside(script, *flags)
    assert done.returncode == 0, done.stderr
    again = anndata.read_h5ad(tmp_path / "g.h5ad")
    assert (again.X != cells.X).nnz == 0 and list(again.obs_names) == list(cells.obs_names)


def test_two_runs_concatenate(trained, bulk, tmp_path):
    """Regression: names of cells started at cell_0 in each of them."""
    runs = []
    for seed in (0, 1, 1):
        path = tmp_path / f"{len(runs)}.h5ad"
        generate(trained, bulk, path, "--seed", seed)
        runs.append(anndata.read_h5ad(path))
    assert list(runs[1].obs_names) == list(runs[2].obs_names)  # the same run, under another name
    both = anndata.concat(runs[:2], label="run", merge="same", uns_merge="same")
    assert both.obs_names.is_unique and both.n_obs == 2 * runs[0].n_obs
    both.write_h5ad(tmp_path / "both.h5ad")
    again = anndata.read_h5ad(tmp_path / "both.h5ad")
    assert (again.X != both.X).nnz == 0 and list(again.var["gene_ids"]) == list(
        both.var["gene_ids"]
    )
    assert list(again.obs["cell_type"].cat.categories) == CELL_TYPES


def test_metadata_of_bulk_samples_is_carried_over(trained, bulk, tmp_path):
    table = pd.read_csv(bulk, index_col=0).T
    obs = pd.DataFrame(
        {
            "age": [40, 51],
            "bmi": [21.5, np.nan],
            "arm": pd.Categorical(["x", "y"]),
            "note": pd.Categorical([None, "late"]),
            "sample": ["p", "q"],
        },
        table.index,
    )
    source = anndata.AnnData(table.to_numpy(np.float32), obs, pd.DataFrame(index=table.columns))
    source.write_h5ad(tmp_path / "bulk.h5ad")
    done = generate(trained, tmp_path / "bulk.h5ad", tmp_path / "g.h5ad")
    assert "renamed to bulk_<name>: sample" in done.stdout
    cells = anndata.read_h5ad(tmp_path / "g.h5ad")
    of_b = cells.obs[cells.obs["sample"] == "b"]
    assert len(of_b) == 30 and set(of_b["age"]) == {51} and set(of_b["arm"]) == {"y"}
    assert set(of_b["bulk_sample"]) == {"q"} and of_b["bmi"].isna().all()
    assert set(of_b["note"]) == {"late"}
    assert cells.obs.loc[cells.obs["sample"] == "a", "note"].isna().all()


def test_scanpy_tutorial_runs_on_an_output(trained, bulk, tmp_path):
    """Quality control, normalisation, genes, PCA, neighbours, clusters, UMAP and markers."""
    generate(trained, bulk, tmp_path / "g.h5ad", n_cells=60)
    cells = sc.read_h5ad(tmp_path / "g.h5ad")
    assert cells.X.indices.dtype == cells.X.indptr.dtype  # regression: scanpy failed at once
    cells.layers["counts"] = cells.X.copy()
    sc.pp.calculate_qc_metrics(cells, inplace=True, percent_top=(20,))
    sc.pp.filter_genes(cells, min_cells=3)
    sc.pp.normalize_total(cells)
    sc.pp.log1p(cells)
    sc.pp.highly_variable_genes(cells, n_top_genes=30)
    sc.pp.pca(cells, n_comps=10)
    sc.pp.neighbors(cells)
    sc.tl.leiden(cells, flavor="igraph", n_iterations=2)
    sc.tl.umap(cells, maxiter=20)
    sc.tl.rank_genes_groups(cells, "cell_type", method="wilcoxon")
    sc.pl.umap(cells, color=["cell_type", "leiden"], show=False)
    assert list(cells.uns["cell_type_colors"]) == list(
        anndata.read_h5ad(tmp_path / "g.h5ad").uns["cell_type_colors"]
    )


# -------------------------------------------------------------------------------------------- 10x


@pytest.mark.parametrize("name", ["cells.h5", "cells"])
def test_10x_formats_hold_the_same_cells(trained, bulk, tmp_path, name):
    generate(trained, bulk, tmp_path / "g.h5ad")
    expected = anndata.read_h5ad(tmp_path / "g.h5ad")
    path = tmp_path / name
    generate(trained, bulk, path)
    read = sc.read_10x_h5(path) if path.suffix else sc.read_10x_mtx(path)
    for cells in (read, read_counts(path)):  # scanpy's reader and bulk2sc's own
        assert (cells.X != expected.X).nnz == 0
        assert list(cells.obs_names) == list(expected.obs_names)
        assert list(cells.var_names) == list(expected.var_names)
    assert set(read.var["feature_types"]) == {"Gene Expression"}
    beside = path if path.is_dir() else tmp_path
    prefix = "" if path.is_dir() else "cells."
    table = pd.read_csv(beside / f"{prefix}cells.csv", index_col="cell")
    assert list(table.index) == list(expected.obs_names)
    assert list(table["cell_type"]) == list(expected.obs["cell_type"])
    for ending in ("proportions.csv", "fit.csv", "expression.h5ad", "proportions.png"):
        assert (beside / f"{prefix}{ending}").is_file()


def test_10x_features_have_ids_where_there_are_any(tmp_path):
    genes, ids = ["CD3E", "NOVEL"], ["ENSG00000198851", ""]
    X = sp.csr_matrix([[3, 0], [0, 2], [0, 0]], dtype=np.int32)
    names = pd.DataFrame(index=["r_0", "r_1", "r_2"])
    for path in (tmp_path / "x", tmp_path / "x.h5"):
        with open_cells(path, genes, ids, 3) as file:
            file.append(X[:2])
            file.append(X[2:])
            file.write_tables(anndata.AnnData(obs=names))
        read = sc.read_10x_h5(path) if path.suffix else sc.read_10x_mtx(path)
        assert list(read.var["gene_ids"]) == ["ENSG00000198851", "NOVEL"]
        assert (read.X.toarray() == X.toarray()).all() and list(read.obs_names) == list(names.index)
    text = gzip.decompress((tmp_path / "x" / "matrix.mtx.gz").read_bytes()).decode()
    assert text.startswith("%%MatrixMarket matrix coordinate integer general\n%")
    assert text.splitlines()[2:] == ["2 3 2", "1 1 3", "2 2 2"]


def test_large_h5ad_has_long_indices_of_both_kinds(tmp_path):
    """More than 2^31 counts need 64 bits; then both are, as scipy expects."""
    X = sp.csr_matrix(np.eye(3, dtype=np.int32))
    with open_cells(tmp_path / "x.h5ad", list("abc"), None, 2**30) as file:
        file.append(X)
        file.append(X)
        file.write_tables(anndata.AnnData(obs=pd.DataFrame(index=list("uvwxyz"))))
    cells = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert cells.X.indices.dtype == cells.X.indptr.dtype == np.int64
    cells.X.eliminate_zeros()
    assert (cells.X.toarray() == np.vstack([np.eye(3)] * 2)).all()


@pytest.mark.parametrize("name", ["new", "old"])
def test_failed_10x_folder_leaves_nothing(tmp_path, name):
    (tmp_path / "old").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError), open_cells(tmp_path / name, ["g"], None, 2) as file:
        file.append(sp.csr_matrix([[1]], dtype=np.int32))
        raise InputError("stop")
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------- compression

FORMATS = {"cells.h5ad": anndata.read_h5ad, "cells.h5": sc.read_10x_h5, "cells": sc.read_10x_mtx}
N_GENES = 30


def write_blocks(path, blocks, n_cells=None):
    """Write blocks of counts (B x N_GENES) as the cells of a file."""
    n = sum(block.shape[0] for block in blocks)
    with open_cells(path, [f"g{i}" for i in range(N_GENES)], n_cells=n_cells) as file:
        for block in blocks:
            file.append(block)
        file.write_tables(anndata.AnnData(obs=pd.DataFrame(index=[f"c{i}" for i in range(n)])))


def random_blocks(sizes, rng, density=0.3):
    """Counts of up to 2^31 - 1, most of them small; every third cell has none."""
    blocks = []
    for n in sizes:
        X = rng.poisson(density, (n, N_GENES)) * 2 ** rng.choice([0, 0, 0, 8, 17, 24], (n, N_GENES))
        X[rng.random((n, N_GENES)) < 0.01] = 2**31 - 1
        X[::3] = 0
        blocks.append(sp.csr_matrix(X.astype(np.int32)))
    return blocks


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cell_writers, "CHUNK", 8)
    monkeypatch.setattr(cell_writers, "CELLS", 5)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sizes", [(), (0,), (4,), (40, 0, 1, 23), (7,) * 9])
def test_counts_read_back_across_chunks_and_blocks(tmp_path, small_chunks, name, sizes):
    """Of no cells, of cells without counts and of the largest counts, by readers of others."""
    blocks = random_blocks(sizes, np.random.default_rng(0))
    expected = sp.vstack([sp.csr_matrix((0, N_GENES), dtype=np.int32), *blocks], format="csr")
    write_blocks(tmp_path / name, blocks, n_cells=sum(sizes))
    if name == "cells" and not sum(sizes):  # scanpy reads no empty table of cells
        read = scipy.io.mmread(tmp_path / name / "matrix.mtx.gz").T
        assert read.shape == expected.shape and read.nnz == 0
        return
    cells = FORMATS[name](tmp_path / name)
    assert cells.shape == expected.shape
    assert (cells.X.toarray().astype(np.float32) == expected.toarray().astype(np.float32)).all()
    if name != "cells":  # exactly so: scanpy reads the folder as float32
        with h5py.File(tmp_path / name) as file:
            group = file["X" if name.endswith("h5ad") else "matrix"]
            for part in ("data", "indices", "indptr"):
                assert (group[part][:] == getattr(expected, part)).all()
    else:
        text = gzip.decompress((tmp_path / name / "matrix.mtx.gz").read_bytes())
        counts = scipy.io.mmread(io.BytesIO(text))
        assert (counts.T.tocsr() != expected).nnz == 0
        assert (np.diff(counts.col) >= 0).all()  # sorted by cell


@pytest.mark.parametrize("n_counts", [7, 8, 9, 16])
def test_edges_of_chunks(tmp_path, small_chunks, n_counts):
    """A last chunk that is nearly, exactly and just over full, in one block and count by count."""
    row = sp.csr_matrix(np.arange(1, n_counts + 1, dtype=np.int32), shape=(1, n_counts))
    row.resize(1, N_GENES)
    one_by_one = [sp.csr_matrix(([i + 1], [i], [0, 1]), (1, N_GENES), np.int32) for i in range(20)]
    for blocks in ([row], one_by_one[:n_counts]):
        write_blocks(tmp_path / "x.h5ad", blocks)
        expected = sp.vstack(blocks, format="csr")
        assert (expected != anndata.read_h5ad(tmp_path / "x.h5ad").X).nnz == 0
        with h5py.File(tmp_path / "x.h5ad") as file:
            data = file["X/data"]
            assert data.shape == (n_counts,) and data.id.get_num_chunks() == -(-n_counts // 8)


CHUNKS = {
    "all lengths of number": [0, 1, 255, 256, 65535, 65536, 2**31 - 1, 5],
    "counts": np.random.default_rng(0).negative_binomial(1, 0.4, 5000),
    "gene numbers": np.random.default_rng(0).integers(0, 15_000, 5000),  # no code saves anything
}


@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("spare", [0, 20])
def test_chunks_are_what_the_filters_of_hdf5_make(tmp_path, name, dtype, spare):
    """The bytes before gzip are the same, so any reader of shuffle and gzip takes them."""
    values = np.array(CHUNKS[name], dtype)
    size = len(values) + spare
    options = cell_writers.COMPRESSION | {"chunks": (size,), "maxshape": (None,)}
    with h5py.File(tmp_path / "x.h5", "w") as file:
        data = file.create_dataset("x", data=values, **options)
        mask, chunk = data.id.read_direct_chunk((0,))
        assert mask == 0
        ours = compression.packed_chunk(values, np.dtype(dtype), size)
        assert zlib.decompress(ours) == zlib.decompress(chunk)
        assert len(ours) < 1.02 * len(chunk) + 20
        data.id.write_direct_chunk((0,), ours)
        assert (data[:] == values).all()


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_do_not_depend_on_the_threads(tmp_path, small_chunks, monkeypatch, name):
    """Chunks that are finished in another order are written in the same."""
    blocks = random_blocks((20, 30), np.random.default_rng(1))

    def content():
        write_blocks(tmp_path / name, blocks)
        files = sorted((tmp_path / name).iterdir()) if name == "cells" else [tmp_path / name]
        return [path.read_bytes() for path in files]

    monkeypatch.setattr(compression, "N_THREADS", 1)
    expected, rng = content(), np.random.default_rng(2)
    monkeypatch.setattr(compression, "N_THREADS", 8)

    def delayed(function):
        def wait_and_call(*arguments):
            time.sleep(rng.choice([0, 0.003]))
            return function(*arguments)

        return wait_and_call

    for function in ("packed_chunk", "packed_text"):
        monkeypatch.setattr(compression, function, delayed(getattr(compression, function)))
    assert content() == expected


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()])
def test_error_of_a_thread_leaves_nothing(tmp_path, small_chunks, monkeypatch, name, error):
    """It is raised where cells are given, at the latest with the tables."""
    calls = []

    def fail(*_):
        calls.append(0)
        raise error

    monkeypatch.setattr(compression, "packed_chunk", fail)
    monkeypatch.setattr(cell_writers, "packed_lines", fail)
    expected = InputError if isinstance(error, OSError) else MemoryError
    for n_blocks in (1, 3):
        blocks = random_blocks((20,) * n_blocks, np.random.default_rng(1))
        with pytest.raises(expected, match=None if expected is MemoryError else "No space left"):
            write_blocks(tmp_path / name, blocks)
        assert not list(tmp_path.iterdir())
    assert calls


@pytest.mark.parametrize("name", FORMATS)
def test_at_most_two_blocks_are_in_memory(tmp_path, small_chunks, name):
    """Of many blocks, all but the last have been written when a block has been given."""
    blocks = random_blocks((20,) * 6, np.random.default_rng(1))
    with open_cells(tmp_path / name, [f"g{i}" for i in range(N_GENES)]) as file:
        waiting = []
        for block in blocks:
            file.append(block)
            waiting.append(len(file.queue))
        n_chunks = max(2 * (block.nnz // 8 + 1) + 4 for block in blocks)
        assert 0 < max(waiting) <= n_chunks and max(waiting) < 2 * min(waiting)
        names = pd.DataFrame(index=[f"c{i}" for i in range(120)])
        file.write_tables(anndata.AnnData(obs=names))
        assert len(file.queue) == 0


def test_lines_of_a_matrix_are_those_of_scipy():
    """Of numbers of every length, from the middle of the counts, numbered on."""
    rng = np.random.default_rng(0)
    for greatest in (1, 9, 10, 99, 100, 2**31 - 1):
        X = sp.csr_matrix(rng.integers(0, greatest, (12, N_GENES), endpoint=True).astype(np.int32))
        for first in (0, 1, 89, 10**9):
            text = matrix_market.lines(X.indptr[2:], X.indices, X.data, first)
            rows = sp.coo_array(X[2:])
            expected = np.stack([rows.col + 1, rows.row + first + 1, rows.data], axis=1)
            assert (np.loadtxt(io.BytesIO(text), dtype=np.int64, ndmin=2) == expected).all()
            assert text.count(b"\n") == len(expected) and b"  " not in text
    empty = np.zeros(0, np.int32)
    assert matrix_market.lines(np.zeros(4, np.int32), empty, empty, 5) == b""


@pytest.mark.parametrize("name", ["cells.h5", "cells"])
def test_10x_files_of_others_are_replaced_only_by_force(trained, bulk, tmp_path, name):
    path = tmp_path / name
    if path.suffix:
        path.write_bytes(b"precious")
    else:
        path.mkdir()
        (path / "matrix.mtx.gz").write_bytes(b"precious")
    flags = ["--weights", trained, "--bulk", bulk, "--out", path, "--n-cells", 3]
    assert_one_line_error(run_inside("bulk2sc.py", *flags), path, "not from bulk2sc", "--force")
    done = run_inside("bulk2sc.py", *flags, "--force")
    assert done.returncode == 0, done.stderr
    done = run_inside("bulk2sc.py", *flags, "--n-cells", 4)  # now they are its own
    assert done.returncode == 0, done.stderr
    assert read_counts(path).n_obs == 8


def test_file_in_the_way_of_a_folder_is_said_before_any_work(trained, bulk, tmp_path):
    (tmp_path / "cells").write_text("precious")
    flags = ["--weights", trained, "--bulk", bulk, "--out", tmp_path / "cells", "--force"]
    done = run_inside("bulk2sc.py", *flags)
    assert_one_line_error(done, tmp_path / "cells", "found a file, expected a folder")
    assert not done.stdout and (tmp_path / "cells").read_text() == "precious"


def test_checksums_are_of_every_file_of_a_folder(trained, bulk, tmp_path):
    table = pd.read_csv(bulk, index_col=0)
    (tmp_path / "samples").mkdir()
    for name in table:
        table[[name]].to_csv(tmp_path / "samples" / f"{name}.counts.csv", header=["count"])
    generate(trained, tmp_path / "samples", tmp_path / "g.h5ad", n_cells=2)
    files = anndata.read_h5ad(tmp_path / "g.h5ad").uns["bulk2sc"]["files"]
    of_bulk = files[files["role"] == "bulk"].set_index("file")["sha256"]
    assert len(of_bulk) == 2
    for path, expected in of_bulk.items():
        assert expected == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_out_of_another_ending_is_refused():
    assert_one_line_error(run_inside("bulk2sc.py", "--out", "x.loom"), "x.loom", ".h5ad", ".h5")


# ---------------------------------------------------------------------------- cells of each type


def test_cells_per_type_are_balanced(trained, bulk, h5ad, tmp_path):
    """Of bulks, of mixtures and of batches of the reference."""
    mixture = pd.DataFrame({CELL_TYPES[0]: [0.9, 0.1]}, index=["x", "y"])
    mixture.to_csv(tmp_path / "mix.csv")
    given = {
        "bulk": ["--bulk", bulk],
        "mixtures": ["--known-proportions", tmp_path / "mix.csv"],
        "batches": ["--data", h5ad, "--batch-size", 20],
    }
    for name, flags in given.items():
        out = tmp_path / f"{name}.h5ad"
        done = run_inside("bulk2sc.py", "--weights", trained, *flags, "--cells-per-type", 7,
                          "--out", out)  # fmt: skip
        assert done.returncode == 0, done.stderr
        cells = anndata.read_h5ad(out)
        if name != "batches":
            assert (pd.crosstab(cells.obs["sample"], cells.obs["cell_type"]) == 7).all(axis=None)
        assert (cells.obs["cell_type"].value_counts() == (7 if name == "batches" else 14)).all()
    proportions = anndata.read_h5ad(tmp_path / "mixtures.h5ad").uns["proportions"]
    assert proportions["proportion"].iloc[0] == pytest.approx(0.9)  # as given, whatever is drawn


def test_balanced_cells_add_up_to_the_bulk_at_its_proportions(trained, bulk, tmp_path):
    """The agreement of their sum is as that of cells in proportion."""
    agreement = {}
    for flags in (("--n-cells", 900), ("--cells-per-type", 300)):
        generate(trained, bulk, tmp_path / "g.h5ad", *flags)
        agreement[flags[0]] = anndata.read_h5ad(tmp_path / "g.h5ad").uns["fit"]["agreement"]
    a, b = agreement.values()
    assert np.abs(a - b).max() < 0.02 and (b > 0.9).all()


def test_cells_per_type_has_to_be_positive():
    done = run_inside("bulk2sc.py", "--cells-per-type", 0)
    assert_one_line_error(done, "--cells-per-type: found 0")


# ------------------------------------------------------------------------------------------ Seurat


def test_seurat_takes_an_output_to_a_umap(trained, bulk, tmp_path):
    """The snippet of docs/your-data.md as it stands there."""
    if not r_has("Seurat"):
        pytest.skip("needs R with Seurat")
    generate(trained, bulk, tmp_path / "generated", n_cells=60)
    text = (ROOT / "docs" / "your-data.md").read_text()
    snippet = next(part for part in text.split("```r\n")[1:]).split("```")[0]
    snippet = snippet.replace("npcs = 30", "npcs = 10").replace("1:30", "1:10")  # of 60 genes
    snippet += '\nstopifnot(ncol(cells) == 120, "umap" %in% Reductions(cells))\n'
    snippet += "stopifnot(length(unique(cells$cell_type)) > 1, all(cells$synthetic == 'True'))\n"
    done = subprocess.run(
        ["Rscript", "-e", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "Rplots.pdf").stat().st_size > 3000


# ---------------------------------------------------------------------------------------- CELLxGENE


def test_cellxgene_example_has_what_the_schema_asks_for(tmp_path):
    """cellxgene-schema 7.1.2 says is_valid=True of such a file; it needs an older anndata."""
    ids = [f"ENSG{i:011d}" for i in range(58)] + ["", "ENSG00000000003"]
    cells = anndata.AnnData(make_cells().X[:40].copy())
    cells.var = pd.DataFrame({"gene_ids": ids}, index=[f"G{i}" for i in range(60)])
    cells.obs["sample"] = pd.Categorical(["a", "b"] * 20)
    cells.obs["cell_type"] = pd.Categorical(["Naive B cells"] * 30 + ["Platelets"] * 10)
    cells.write_h5ad(tmp_path / "g.h5ad")
    (tmp_path / "retired.txt").write_text("ENSG00000000007\n")
    flags = ["--cells", tmp_path / "g.h5ad", "--out", tmp_path / "x.h5ad"]
    done = run_inside("examples/cellxgene.py", *flags, "--retired", tmp_path / "retired.txt")
    assert done.returncode == 0, done.stderr
    made = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert made.var_names.str.fullmatch(r"ENSG\d{11}").all() and made.var_names.is_unique
    assert made.n_vars == 57 and "ENSG00000000007" not in made.var_names
    kept = [ids.index(name) for name in made.var_names]
    counts = made.raw.X
    assert counts.dtype == np.float32 and (counts != cells.X[:, kept]).nnz == 0
    assert set(made.obs["cell_type_ontology_term_id"]) == {"CL:0000788", "CL:0000233"}
    assert not made.obs["is_primary_data"].any() and set(made.obs["donor_id"]) == {"a", "b"}
    for name in ("assay", "tissue", "disease", "sex", "development_stage"):
        assert f"{name}_ontology_term_id" in made.obs
    cells.obs["cell_type"] = cells.obs["cell_type"].cat.rename_categories({"Platelets": "Blobs"})
    cells.write_h5ad(tmp_path / "g.h5ad")
    done = run_inside("examples/cellxgene.py", *flags)
    assert_one_line_error(done, "without a term", "Blobs")
