"""annotate.py and scType.R: each against the formula of ScType, and against one another."""

import subprocess
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from sklearn.neighbors import NearestNeighbors

import annotate
from annotate import (
    export_10x,
    name_clusters,
    read_markers,
    scale_genes,
    sctype_scores,
    shared_neighbors,
)
from conftest import (
    CELL_TYPES,
    ROOT,
    assert_one_line_error,
    make_cells,
    r_has,
    run_inside,
    without_umap,
    write_10x,
    write_10x_h5,
)
from readers.counts import read_counts
from runtime.errors import InputError

SHARED = ROOT / ".." / "shared" / "data"
PBMC1K = SHARED / "pbmc1k_v3"
SCTYPE = SHARED / "sctype" / "ScTypeDB_full.xlsx"
needs_pbmc = pytest.mark.skipif(not SCTYPE.is_file(), reason="needs ../shared/data")
R_PACKAGES = "r-base-core r-cran-seurat r-cran-openxlsx r-cran-dplyr"
needs_r = pytest.mark.skipif(
    not r_has("Seurat", "openxlsx"), reason=f"needs R with Seurat (apt-get install {R_PACKAGES})"
)


def run_r(*arguments, code=None, cwd=ROOT):
    """scType.R as a user runs it, or R code after its functions were sourced."""
    if code is None:
        command = ["Rscript", str(ROOT / "scType.R"), *map(str, arguments)]
    else:
        command = ["Rscript", "-e", f"source('{ROOT / 'scType.R'}'); {code}"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def blocks():
    """Cells of three types with a block of high genes each (see make_cells), 300 genes."""
    return make_cells((60, 50, 40), n_genes=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, blocks):
    return write_10x(tmp_path_factory.mktemp("annotate") / "cells", blocks)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Marker table of the three types, one of them in two rows, and of a type without cells."""
    sets = [[f"GENE{100 * k + i}" for i in range(12)] for k in range(3)]
    rows = [("T", t, ",".join(genes), "", "") for t, genes in zip(CELL_TYPES, sets, strict=True)]
    rows[1] = ("T", CELL_TYPES[1], ",".join(sets[1][:6]), "GENE0, GENE1", "")
    rows.append(("T", CELL_TYPES[1], ",".join(sets[1][5:]).lower(), "GENE0", ""))
    rows.append(("T", "nowhere", "GENE90,ABSENT1,GENE95", "GENE3", ""))
    rows.append(("Other", "x", "GENE1", "", ""))
    path = tmp_path_factory.mktemp("table") / "markers.csv"
    columns = [*annotate.COLUMNS, "source"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


def lineage(name):
    """B, T, NK, monocyte or the name itself, for names of ScType's table and of markers.csv."""
    name = str(name).lower()
    for words, short in (
        (("natural killer",), "NK"),
        (("monocyte",), "monocyte"),
        (("t cells", "nkt"), "T"),
        (("b cells",), "B"),
    ):
        if any(word in name for word in words):
            return short
    return name


def labels_of(path):
    return pd.read_csv(path, index_col="barcode", keep_default_na=False)["cell_type"]


def agreement(a, b, of=lambda name: name):
    """Share of the cells with a type in ``b`` that have the same type in ``a``."""
    b = b[~b.isin(["", "Unknown"])]
    return np.mean([of(x) == of(y) for x, y in zip(a.reindex(b.index), b, strict=True)])


# ---------------------------------------------------------------------------- the score


def test_score_is_that_of_the_paper():
    markers = {"a": (["G1", "G2", "ABSENT"], ["G3"]), "b": (["G2"], []), "c": (["G4"], ["G1"])}
    z = np.array([[1.0, 2.0, 3.0, 4.0], [-1.0, 0.5, 0.0, 2.0]])  # cells x genes g1 ... g4
    # G2 is a marker of two of three types: 1 - (2 - 1) / (3 - 1). G1 has the same weight where it
    # is negative; G3 is never positive.
    s = {"G1": 1.0, "G2": 0.5, "G3": 1.0, "G4": 1.0}
    expected = [
        (s["G1"] * z[:, 0] + s["G2"] * z[:, 1]) / np.sqrt(2) - z[:, 2],
        s["G2"] * z[:, 1],
        z[:, 3] - z[:, 0],
    ]
    scores = sctype_scores(z, ["g1", "g2", "g3", "g4"], markers)  # capitals or not
    np.testing.assert_allclose(scores, expected)
    # A single type: every marker counts fully.
    np.testing.assert_allclose(
        sctype_scores(z, ["G1", "G2", "x", "y"], {"a": (["G2"], [])}), z[:, [1]].T
    )


def test_cluster_under_a_quarter_of_its_cells_is_unknown():
    scores = np.array([[0.3, 0.3, 0.2, 0.2], [0.1, 0.0, 0.25, 0.3], [0.0, 0.0, 0.0, 0.9]])
    table = name_clusters(scores, ["a", "b", "c"], np.array([0, 0, 1, 1]))
    best = table[table["rank"] == 1].set_index("cluster")
    assert list(best["cell_type"]) == ["a", "c"] and list(best["score"]) == [0.6, 0.9]
    assert list(table["candidate"]) == ["a", "b", "c", "c", "b", "a"]
    weak = name_clusters(scores - 0.06, ["a", "b", "c"], np.zeros(4, int))
    assert list(weak["cell_type"]) == ["Unknown"] * 3 and weak["candidate"].iloc[0] == "a"


def test_neighbours_are_shared_as_in_the_definition():
    pcs = np.random.default_rng(0).normal(size=(30, 3))
    graph = shared_neighbors(pcs, 6).toarray()
    distance = np.linalg.norm(pcs[:, None] - pcs, axis=2)
    nearest = [set(np.argsort(row)[:6]) for row in distance]
    for i in range(30):
        for j in range(30):
            jaccard = len(nearest[i] & nearest[j]) / len(nearest[i] | nearest[j])
            expected = 0 if i == j or jaccard < 1 / 15 else jaccard
            assert graph[i, j] == pytest.approx(expected)


def test_genes_are_scaled_as_by_scanpy(blocks):
    expected = sc.pp.scale(blocks.X.toarray().astype(float), max_value=10)
    np.testing.assert_allclose(scale_genes(blocks.X), expected, atol=1e-12)
    assert (scale_genes(sp.csr_matrix(np.ones((4, 1)))) == 0).all()  # a gene that never varies


# ---------------------------------------------------------------------------- marker tables


def test_markers_of_csv_and_excel_are_the_same(tmp_path, table):
    markers = read_markers(str(table), "T")
    assert list(markers) == [*CELL_TYPES, "nowhere"]
    positive, negative = markers[CELL_TYPES[1]]  # two rows joined, without blanks and repeats
    assert positive == [f"GENE{100 + i}" for i in range(12)] and negative == ["GENE0", "GENE1"]
    pd.read_csv(table).to_excel(tmp_path / "m.xlsx", index=False)
    assert read_markers(str(tmp_path / "m.xlsx"), "T") == markers
    # A gene that is named twice in one row counts once.
    (tmp_path / "twice.csv").write_text(f'{",".join(annotate.COLUMNS)}\nT,a,"G1,G2,g1",\n')
    assert read_markers(str(tmp_path / "twice.csv"), "T") == {"a": (["G1", "G2"], [])}


def test_marker_table_is_downloaded_once(tmp_path, table, monkeypatch):
    monkeypatch.chdir(tmp_path)
    address = table.as_uri()
    first = read_markers(address, "T")
    assert (tmp_path / "markers.csv").read_bytes() == table.read_bytes()
    (tmp_path / "markers.csv").write_text(table.read_text().replace("nowhere", "elsewhere"))
    assert list(read_markers(address, "T"))[-1] == "elsewhere" and list(first)[-1] == "nowhere"
    with pytest.raises(InputError, match="could not be downloaded"):
        read_markers((tmp_path / "absent.csv").as_uri(), "T")
    assert not (tmp_path / "absent.csv").exists()


def test_markers_csv_has_sources_and_no_contradictions():
    table = pd.read_csv(ROOT / "tables/markers.csv", keep_default_na=False)
    assert list(table.columns) == [*annotate.COLUMNS, "source"] and (table["source"] != "").all()
    markers = read_markers(str(ROOT / "tables/markers.csv"), "Immune system")
    assert len(markers) >= 12
    for name, (positive, negative) in markers.items():
        assert len(positive) >= 5 and not set(positive) & set(negative), name


@pytest.mark.parametrize("script", ["annotate.py", pytest.param("scType.R", marks=needs_r)])
def test_bad_marker_tables_and_flags_end_in_one_line(tmp_path, folder, table, script):
    def fails(*arguments):
        arguments = ["--data", folder, "--out", tmp_path / "out", *arguments]
        done = run_inside(script, *arguments) if script.endswith(".py") else run_r(*arguments)
        assert not (tmp_path / "out").exists()
        return done

    done = fails("--db", table, "--tissue", "Liver")
    assert_one_line_error(done, "--tissue Liver", table, "Other, T")  # the known tissues are listed
    assert_one_line_error(fails("--db", tmp_path / "no.csv"), "no.csv", "no such file")
    (tmp_path / "bad.csv").write_text("tissueType,cellName\nT,a\n")
    assert_one_line_error(fails("--db", tmp_path / "bad.csv"), "bad.csv", "geneSymbolmore1")
    (tmp_path / "bad.xlsx").write_text("no zip")
    assert_one_line_error(fails("--db", tmp_path / "bad.xlsx"), "bad.xlsx", "not a readable")
    (tmp_path / "none.csv").write_text(f"{','.join(annotate.COLUMNS)}\nT,a,XYZ1,\n")
    assert_one_line_error(fails("--db", tmp_path / "none.csv", "--tissue", "T"), "XYZ1", "GENE")
    good = ["--db", table, "--tissue", "T"]
    assert_one_line_error(fails(*good, "--dims", 1000), "--dims", "1000", "150 cells")
    assert_one_line_error(fails(*good, "--resolution", 0), "--resolution")
    assert_one_line_error(fails(*good, "--data", tmp_path / "nowhere"), "nowhere")


# ---------------------------------------------------------------------------- whole runs


def check_run(done, out, cells):
    """The three files are written, and nearly all types are right."""
    assert done.returncode == 0, done.stderr
    labels = labels_of(out / "barcode_to_celltype.csv")
    assert list(labels.index) == list(cells.obs_names)
    assert agreement(labels, cells.obs["cell_type"]) > 0.95
    clusters = pd.read_csv(out / "clusters.csv")
    assert (clusters.groupby("cluster")["score"].diff().dropna() <= 0).all()  # best first
    assert clusters[clusters["rank"] == 1]["cells"].sum() == cells.n_obs
    assert (out / "clusters.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".")) == []
    return labels


@pytest.mark.draws
def test_annotate_names_the_cells(tmp_path, blocks, folder, table):
    arguments = ["--data", folder, "--db", table, "--tissue", "T", "--out", tmp_path / "out"]
    done = run_inside("annotate.py", *arguments)
    first = check_run(done, tmp_path / "out", blocks)
    assert "4 cell types of T; 38 of 39 markers are genes of the data" in done.stdout
    run_inside("annotate.py", *arguments)  # --out may be written to again
    assert labels_of(tmp_path / "out" / "barcode_to_celltype.csv").equals(first)


def test_scanpy_reads_the_neighbours_of_large_data(blocks):
    """Scanpy leaves these to pynndescent, whose search would take more than a minute to compile."""
    from pynndescent import PyNNDescentTransformer

    class Exact(PyNNDescentTransformer):
        def fit(self, X, compress_index=True):
            distances, indices = NearestNeighbors(n_neighbors=5).fit(X).kneighbors(X)
            self.n_samples_fit = len(X)
            graph = indices, distances
            self.index_ = SimpleNamespace(neighbor_graph=graph, compress_index=lambda: None)
            return self

    cells = sc.AnnData(blocks.X.toarray().astype(np.float32))
    sc.pp.neighbors(cells, n_neighbors=5, use_rep="X", transformer=Exact(), method="gauss")
    assert (np.diff(cells.obsp["distances"].indptr) >= 4).all()


def test_annotate_does_not_overwrite_cell_types_unasked(tmp_path, blocks, table):
    folder = write_10x(tmp_path / "cells", blocks)
    (folder / "barcode_to_celltype.csv").write_text("by hand")
    for run_it in [run_inside] + [lambda _, *a: run_r(*a)] * r_has("Seurat", "openxlsx"):
        done = run_it("annotate.py", "--data", folder, "--db", table, "--tissue", "T")
        assert_one_line_error(done, "barcode_to_celltype.csv", "--out")
    assert (folder / "barcode_to_celltype.csv").read_text() == "by hand"


@pytest.mark.parametrize("flag", ["--out", "--export"])
def test_a_folder_that_cannot_be_written_to_is_said_before_any_work(tmp_path, blocks, table, flag):
    (tmp_path / "file").write_text("")
    data = write_10x(tmp_path / "cells", blocks)
    done = run_inside("annotate.py", "--data", data, "--db", table, "--tissue", "T",
                      flag, tmp_path / "file" / "out")  # fmt: skip
    assert_one_line_error(done, tmp_path / "file" / "out", "cannot be written to")
    assert done.stdout == ""  # nothing was read


def test_symbols_may_be_the_second_name_of_a_gene(tmp_path, blocks, table):
    cells = blocks.copy()
    cells.var = pd.DataFrame({"feature_name": cells.var_names}, index=list(cells.var["gene_ids"]))
    cells.write_h5ad(tmp_path / "ids.h5ad")
    arguments = ["--data", tmp_path / "ids.h5ad", "--db", table, "--tissue", "T"]
    with without_umap():
        done = run_inside("annotate.py", *arguments, "--out", tmp_path / "out")
    check_run(done, tmp_path / "out", blocks)
    export_10x(read_counts(tmp_path / "ids.h5ad"), tmp_path / "10x")
    exported = read_counts(tmp_path / "10x")  # as scType.R would read it
    assert list(exported.var_names) == list(blocks.var_names)
    assert list(exported.var["gene_ids"]) == list(cells.var_names)


def test_exported_folder_holds_the_same_counts(tmp_path, h5ad, blocks):
    done = run_inside("annotate.py", "--data", h5ad, "--export", tmp_path / "10x")
    assert done.returncode == 0, done.stderr
    a, b = read_counts(h5ad), read_counts(tmp_path / "10x")
    assert list(a.obs_names) == list(b.obs_names) and list(a.var_names) == list(b.var_names)
    assert (a.X != b.X).nnz == 0 and list(a.var["gene_ids"]) == list(b.var["gene_ids"])
    cells = blocks.copy()
    cells.var["gene_ids"] = ""  # without ids the symbols take their place
    export_10x(cells, tmp_path / "no_ids")
    assert list(read_counts(tmp_path / "no_ids").var["gene_ids"]) == list(cells.var_names)


# ---------------------------------------------------------------------------- R


@needs_r
def test_r_names_the_cells(tmp_path, blocks, folder, table):
    out = tmp_path / "out"
    done = run_r("--data", folder, f"--db={table}", "--tissue", "T", "--out", out, "--seed", 1)
    check_run(done, out, blocks)
    assert "4 cell types of T; 38 of 39 markers are genes of the data" in done.stdout


@needs_r
def test_r_reads_the_same_from_every_format(tmp_path, blocks, folder, table):
    write_10x(tmp_path / "old", blocks, "old")
    write_10x_h5(tmp_path / "cells.h5", blocks)
    others = ["old", "cells.h5"] if r_has("hdf5r") else ["old"]
    same = [f"identical(read_counts('{tmp_path / name}'), cells)" for name in others]
    done = run_r(code=f"cells <- read_counts('{folder}'); stopifnot({', '.join(same)}); dim(cells)")
    assert done.returncode == 0 and "300 150" in done.stdout, done.stderr
    if not r_has("hdf5r"):
        done = run_r("--data", tmp_path / "cells.h5", "--db", table, "--tissue", "T")
        assert_one_line_error(done, "hdf5r", "install.packages", "apt-get install r-cran-hdf5r")


@needs_r
def test_r_and_python_scores_are_equal(tmp_path, table):
    rng = np.random.default_rng(0)
    genes = [f"GENE{i}" for i in rng.permutation(300)[:200]]
    z = pd.DataFrame(rng.normal(size=(200, 25)), index=genes)
    z.to_csv(tmp_path / "z.csv")
    code = (
        f"z <- as.matrix(read.csv('{tmp_path}/z.csv', row.names = 1));"
        f"s <- sctype_scores(z, read_markers('{table}', 'T'));"
        f"write.csv(s, '{tmp_path}/s.csv');"
        "n <- name_clusters(cluster_scores(s, rep(0:4, 5)), table(rep(0:4, 5)));"
        f"write.csv(n, '{tmp_path}/n.csv', row.names = FALSE)"
    )
    done = run_r(code=code)
    assert done.returncode == 0, done.stderr
    markers = read_markers(str(table), "T")
    expected = sctype_scores(z.T.to_numpy(), genes, markers)
    scores = pd.read_csv(tmp_path / "s.csv", index_col=0)
    assert list(scores.index) == list(markers)
    np.testing.assert_allclose(scores.to_numpy(), expected, atol=1e-9)
    named = name_clusters(expected, list(markers), np.tile(np.arange(5), 5))
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "n.csv"), named, atol=2e-3)


@needs_r
def test_r_reads_layers_of_seurat_5_and_slots_of_4():
    """Regression: the published script reads @scale.data, which Seurat 5's assays do not have."""
    code = """
    five <- list(LayerData = function(object, layer) object[[layer]],
                 GetAssayData = function(...) stop("defunct in 5"))
    four <- list(GetAssayData = function(object, slot) object[[slot]])
    stopifnot(layer_of(list(scale.data = 5), "scale.data", five) == 5,
              layer_of(list(scale.data = 4), "scale.data", four) == 4)
    set.seed(1); counts <- Matrix::rsparsematrix(30, 20, 0.5, rand.x = function(n) rpois(n, 3) + 1)
    dimnames(counts) <- list(paste0("g", 1:30), paste0("c", 1:20))
    object <- Seurat::ScaleData(Seurat::NormalizeData(Seurat::CreateSeuratObject(counts)),
                                features = rownames(counts))
    z <- layer_of(object, "scale.data")
    stopifnot(dim(z) == c(30, 20), abs(rowMeans(z)) < 1e-6)
    """
    done = run_r(code=code)
    assert done.returncode == 0, done.stderr


@needs_r
def test_r_downloads_a_marker_table_once(tmp_path, table):
    code = f"cat(names(read_markers('{table.as_uri()}', 'T')$positive), sep = ';')"
    first = run_r(code=code, cwd=tmp_path)
    assert first.stdout.splitlines()[-1] == ";".join(read_markers(str(table), "T"))
    assert "kept as markers.csv" in first.stdout
    kept = tmp_path / "markers.csv"
    kept.write_text(kept.read_text().replace("nowhere", "elsewhere"))
    assert run_r(code=code, cwd=tmp_path).stdout.endswith(";elsewhere")
    absent = (tmp_path / "absent.csv").as_uri()
    done = run_r("--db", absent, "--data", tmp_path, "--out", tmp_path / "out", cwd=tmp_path)
    assert_one_line_error(done, absent, "could not be downloaded")
    assert [p.name for p in tmp_path.iterdir()] == ["markers.csv"]


@needs_r
def test_r_looks_aliases_up_where_hgnchelper_is_installed(tmp_path, table):
    """With a stand-in for the package, whose tables are not available here."""
    package = tmp_path / "HGNChelper"
    (package / "R").mkdir(parents=True)
    (package / "DESCRIPTION").write_text("Package: HGNChelper\nVersion: 0.0.1\nTitle: T\n")
    (package / "NAMESPACE").write_text("export(checkGeneSymbols)\n")
    (package / "R" / "a.R").write_text(
        "checkGeneSymbols <- function(x) {\n"
        '  known <- c(CD20 = "MS4A1", TWO = "A1 /// B1", CD19 = "CD19")\n'
        "  data.frame(x = x, Suggested.Symbol = unname(known[x]))\n}\n"
    )
    (tmp_path / "library").mkdir()
    install = ["R", "CMD", "INSTALL", f"--library={tmp_path}/library", "--no-docs", str(package)]
    assert subprocess.run(install, capture_output=True).returncode == 0
    text = f'{",".join(annotate.COLUMNS)}\nT,a,"CD20,TWO,odd",CD19\n'
    (tmp_path / "alias.csv").write_text(text)
    show = f"m <- read_markers('{tmp_path}/alias.csv', 'T'); cat(unlist(m))"
    done = run_r(code=f".libPaths('{tmp_path}/library'); {show}")
    assert done.stdout == "MS4A1 A1 B1 ODD CD19", done.stderr
    assert run_r(code=show).stdout in ("CD20 TWO ODD CD19", done.stdout)  # as without the package


@needs_r
def test_r_bad_input_ends_in_one_line(tmp_path, blocks, table):
    folder = write_10x(tmp_path / "cells", blocks)
    good = ["--db", table, "--tissue", "T", "--out", tmp_path / "out"]

    def fails(*words, data=folder, more=()):
        assert_one_line_error(run_r("--data", data, *good, *more), *words)
        assert not (tmp_path / "out").exists()

    fails("--colour", "--tissue", more=["--colour", "red"])
    fails("--seed", "found 1.5", more=["--seed", "1.5"])
    fails("--dims", "no value", more=["--dims"])
    fails("no barcodes.tsv", data=write_10x_without(tmp_path / "a", blocks, "barcodes.tsv.gz"))
    (tmp_path / "half.csv").write_text("")
    fails("10x folder or a 10x .h5", data=tmp_path / "half.csv")
    fails(".h5ad", "--export", data=write_h5ad(tmp_path / "x.h5ad", blocks))
    normalised = write_10x(tmp_path / "b", blocks)
    text = "%%MatrixMarket matrix coordinate real general\n300 150 1\n1 1 0.5\n"
    (normalised / "matrix.mtx").write_text(text)
    (normalised / "matrix.mtx.gz").unlink()
    fails("0.5", "raw counts", data=normalised)
    (normalised / "matrix.mtx").write_text(text.replace("300", "299"))
    fails("299 x 150", "300 genes x 150", data=normalised)
    (normalised / "matrix.mtx").write_text("garbage")
    fails("matrix.mtx", "not a readable", data=normalised)
    twice = write_10x(tmp_path / "c", blocks, "old")
    lines = (twice / "barcodes.tsv").read_text().splitlines()
    (twice / "barcodes.tsv").write_text("\n".join([lines[0], *lines[:-1]]) + "\n")
    fails("1 barcodes occur more than once", lines[0], data=twice)
    done = run_r(
        code="tryCatch(need('notThere', 'this'), error = function(e) cat(conditionMessage(e)))"
    )
    assert "notThere is missing" in done.stdout and "install.packages" in done.stdout
    assert "apt-get install r-cran-notthere" in done.stdout
    done = run_r("--help")
    assert done.returncode == 0 and "--resolution 0.8" in done.stdout


def write_10x_without(folder, cells, name):
    write_10x(folder, cells)
    (folder / name).unlink()
    return folder


def write_h5ad(path, cells):
    cells.write_h5ad(path)
    return path


# ---------------------------------------------------------------------------- PBMC 1K


@pytest.fixture(scope="module")
def pbmc(tmp_path_factory):
    """Labels of PBMC 1K by script and marker table, computed on first use."""
    known = {}

    def make(script, db):
        if (script, db) not in known:
            out = tmp_path_factory.mktemp("pbmc")
            arguments = ["--data", PBMC1K, "--db", db, "--tissue", "Immune system", "--out", out]
            if script == "scType.R":
                done = run_r(*arguments)
            else:
                with without_umap():
                    done = run_inside(script, *arguments, "--method", "sctype")
            assert done.returncode == 0, done.stderr
            known[script, db] = labels_of(out / "barcode_to_celltype.csv")
        return known[script, db]

    return make


@needs_pbmc
@needs_r
def test_r_agrees_with_the_published_labels_of_pbmc1k(pbmc):
    from sklearn.metrics import adjusted_rand_score

    given = labels_of(PBMC1K / "barcode_to_celltype.csv")
    labels = pbmc("scType.R", SCTYPE).reindex(given.index)
    known = labels.notna()
    assert np.mean(labels[known] == given[known]) >= 0.9
    assert adjusted_rand_score(given[known], labels[known]) >= 0.8
    assert agreement(pbmc("scType.R", ROOT / "tables/markers.csv"), given, lineage) >= 0.95


@needs_pbmc
@needs_r
@pytest.mark.parametrize("db", [ROOT / "tables/markers.csv", SCTYPE], ids=["markers.csv", "sctype"])
def test_python_agrees_with_r_on_pbmc1k(pbmc, db):
    assert agreement(pbmc("annotate.py", db), pbmc("scType.R", db), lineage) >= 0.95


@needs_pbmc
def test_python_agrees_with_the_published_labels_of_pbmc1k(pbmc):
    given = labels_of(PBMC1K / "barcode_to_celltype.csv")
    assert agreement(pbmc("annotate.py", SCTYPE), given, lineage) >= 0.95
    assert agreement(pbmc("annotate.py", ROOT / "tables/markers.csv"), given, lineage) >= 0.95
