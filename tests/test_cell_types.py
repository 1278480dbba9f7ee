"""cell_types.py and annotate.py --method refined: each cell by its own transcripts."""

import re

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import annotate
from annotate import COLUMNS, read_markers
from annotation import cell_types
from annotation.cell_types import agreement, is_doublet, read_cell_types, type_cells
from conftest import ROOT, assert_one_line_error, run_inside, without_umap
from data import log_normalise
from readers.labels import read_label_csv
from runtime.errors import InputError

SHARED = ROOT / ".." / "shared" / "data"
ZHENG = SHARED / "zheng_facs" / "zheng_facs.h5ad"
PBMC3K = SHARED / "pbmc3k" / "pbmc3k.h5ad"
TISSUE = "Immune system"
TYPES = read_cell_types(ROOT / "tables/cell_types.csv", TISSUE)

SIZES = {
    "Naive CD4+ T cells": 110,
    "Naive CD8+ T cells": 70,
    "B cells": 70,
    "Natural killer cells": 60,
    "Monocytes": 70,
}
N_DOUBLETS, N_FOREIGN = 12, 25


def ancestors(name):
    """The cell type and its parents."""
    out = []
    while name:
        out.append(TYPES[name])
        name = TYPES[name].parent
    return out


def profile_of(name, genes, base, rng_of):
    """Expression of a type (G, sums to 1): its markers, and genes that it moves beside them.

    A lineage doubles 40 other genes. Below it, 15 are up by 40 %.
    """
    profile = base.copy()
    for cell_type in ancestors(name):
        n, factor = (15, 1.4) if cell_type.parent else (40, 2)
        moved = rng_of[cell_type.name].choice(np.flatnonzero(base), n, replace=False)
        profile[moved] *= factor
        profile[np.isin(genes, cell_type.positive)] += 4e-4 if cell_type.own_markers else 2e-3
    return profile / profile.sum()


def immune_cells(sizes, seed=0, n_doublets=0, n_foreign=0):
    """Poisson cells of cell_types.csv's types, of a type without markers, and doublets.

    Many CD4 and CD8 T cells have no co-receptor, and they share clusters.
    """
    rng = np.random.default_rng(seed)
    markers = sorted({g for t in TYPES.values() for g in t.positive})
    genes = [*markers, *(f"OTHER{i}" for i in range(600))]
    base = np.r_[np.zeros(len(markers)), rng.gamma(1.0, 1.0, 600)]
    base /= base.sum()
    profiles = []
    for name in sizes:
        fixed = {t: np.random.default_rng([seed, i]) for i, t in enumerate(TYPES)}
        profiles.append(profile_of(name, genes, base, fixed))
    profiles.append(np.where(np.arange(len(genes)) >= len(genes) - 100, 5 * base, base))
    kinds = np.repeat([*sizes, "foreign"], [*sizes.values(), n_foreign])
    depth = rng.lognormal(np.log(1500), 0.2, len(kinds))
    codes = pd.Index([*sizes, "foreign"]).get_indexer(kinds)
    X = rng.poisson(np.array(profiles)[codes] * depth[:, None])
    for _ in range(n_doublets):
        pair = [rng.choice(np.flatnonzero(kinds == name)) for name in ("B cells", "Monocytes")]
        X, kinds = np.vstack([X, X[pair].sum(axis=0)]), np.append(kinds, "doublet")
    order = rng.permutation(len(X))
    obs = pd.DataFrame({"kind": kinds[order]}, index=[f"c{i}" for i in range(len(X))])
    return anndata.AnnData(
        sp.csr_matrix(X[order].astype(np.int32)), obs=obs, var=pd.DataFrame(index=genes)
    )


def typed(cells, types=TYPES):
    log = sp.csr_matrix(log_normalise(cells.X))
    genes = pd.Index(cells.var_names).str.upper()
    return type_cells(sp.csr_matrix(cells.X), log, genes, types, None, 0)


def read_result(out):
    return pd.read_csv(out / "barcode_to_celltype.csv", index_col="barcode", keep_default_na=False)


@pytest.fixture(scope="module", autouse=True)
def quick_picture():
    with without_umap():
        yield


def lineage_of(kind):
    return TYPES[kind].lineage if kind in TYPES else "Unknown"


@pytest.fixture(scope="module")
def cells():
    return immune_cells(SIZES, n_doublets=N_DOUBLETS, n_foreign=N_FOREIGN)


@pytest.fixture(scope="module")
def results(tmp_path_factory, cells):
    """Output folder and run of each method."""
    path = tmp_path_factory.mktemp("immune") / "cells.h5ad"
    cells.write_h5ad(path)
    runs = {}
    for method in ("refined", "sctype"):
        out = path.parent / method
        arguments = ["--data", path, "--out", out, "--resolution", 0.1]  # T cells: one cluster
        done = run_inside("annotate.py", *arguments, "--method", method)
        assert done.returncode == 0, done.stderr
        runs[method] = out, done
    return runs


# --------------------------------------------------------------------------- whole runs


def test_mixed_clusters_are_split(cells, results):
    """CD4 and CD8 T cells share clusters, and most carry neither co-receptor."""
    out, _ = results["refined"]
    labels = read_result(out)
    kind = cells.obs["kind"]
    is_t = kind.str.contains("CD4|CD8")
    own = cells[is_t, ["CD4", "CD40LG", "CD8A", "CD8B"]].X.toarray().sum(axis=1)
    assert np.mean(own == 0) > 0.1
    sctype = labels["sctype"][is_t]
    majority = pd.crosstab(sctype, kind[is_t]).max(axis=1).sum() / is_t.sum()
    decided = is_t & (labels["cell_type"] != "Unknown")
    right = labels["lineage"][decided] == kind[decided].map(lineage_of)
    assert decided.sum() > 0.75 * is_t.sum()
    assert right.mean() > 0.95 and right.mean() > majority + 0.1


def test_lineages_are_found_and_the_rest_is_unknown(cells, results):
    labels = read_result(results["refined"][0])
    kind = cells.obs["kind"]
    for name in ("B cells", "Natural killer cells", "Monocytes"):
        assert (labels["lineage"][kind == name] == name).mean() > 0.95, name
    unknown = labels["cell_type"] == "Unknown"
    assert unknown[kind == "foreign"].mean() > 0.8 and unknown[kind == "doublet"].mean() > 0.5
    assert (labels["confidence"][kind == "foreign"] < 0.8).mean() > 0.8


def test_columns_are_complete_and_trainings_read_them(cells, results):
    out, done = results["refined"]
    labels = read_result(out)
    columns = ["cell_type", "confidence", "lineage", "ontology_id", "ontology_term", "sctype"]
    assert list(labels.columns) == columns and list(labels.index) == list(cells.obs_names)
    assert labels["confidence"].between(0, 1).all()
    known = labels["cell_type"] != "Unknown"
    expected = [TYPES[name].ontology_id for name in labels["cell_type"][known]]
    assert list(labels["ontology_id"][known]) == expected
    assert (labels["ontology_id"][~known] == "").all()
    read = read_label_csv(out / "barcode_to_celltype.csv", cells.obs_names)
    assert list(read) == list(labels["cell_type"])
    renamed = (known & (labels["cell_type"] != labels["sctype"])).sum()
    undecided = (~known & (labels["sctype"] != "Unknown")).sum()
    said = re.search(r"transcripts: (\d+) of \d+ renamed, \d+ .* (\d+) undecided", done.stdout)
    assert list(map(int, said.groups())) == [renamed, undecided]


def test_method_sctype_writes_the_names_of_the_clusters_alone(results):
    labels = read_result(results["sctype"][0])
    assert list(labels.columns) == ["cell_type"]
    assert list(labels["cell_type"]) == list(read_result(results["refined"][0])["sctype"])
    clusters = [(out / "clusters.csv").read_bytes() for out, _ in results.values()]
    assert clusters[0] == clusters[1] and "renamed" not in results["sctype"][1].stdout


def test_other_marker_tables_keep_the_names_of_the_clusters(tmp_path, cells, results):
    table = pd.read_csv(ROOT / "tables/markers.csv", keep_default_na=False)[COLUMNS]
    table["cellName"] = table["cellName"].replace("B cells", "Pre-B cells")
    table.to_csv(tmp_path / "m.csv", index=False)
    path = results["refined"][0].parent / "cells.h5ad"
    done = run_inside("annotate.py", "--data", path, "--db", tmp_path / "m.csv", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cell_types.csv: no lineage of Pre-B cells of Immune system; cells keep" in done.stdout
    assert list(read_result(tmp_path).columns) == ["cell_type"]


def test_bad_tables_and_settings_end_in_one_line(tmp_path, results):
    path = results["refined"][0].parent / "cells.h5ad"

    def fails(text, *words, more=()):
        (tmp_path / "t.csv").write_text(text)
        arguments = ["--data", path, "--out", tmp_path / "out", "--types", tmp_path / "t.csv"]
        assert_one_line_error(run_inside("annotate.py", *arguments, *more), *words)
        assert not (tmp_path / "out").exists()

    header = ",".join(cell_types.COLUMNS)
    row = f"{TISSUE},a,,a,CL:1,a,G1,,"
    fails("tissueType,cellName\n", "t.csv", "no column parent")
    fails(f"{header}\n{row}\n{row}\n", "a of Immune system", "two rows")
    fails(f"{header}\n{row.replace('a,,a', 'a,b,a')}\n", "parent b", "no row")
    fails(f"{header}\n{row.replace('a,,a', 'a,a,a')}\n", "a is its own ancestor", "tree")
    mixed = f"{header}\n{row}\n{row.replace(',a,', ',b,', 1)}1\n"
    fails(mixed, "of a, b some have ownMarkers", "all or none")
    fails(f"{header}\n{row}x\n", "ownMarkers of a is x", "whole number")
    fails(f"{header}\n{row}\n", "--min-confidence", "found 2", more=["--min-confidence", "2"])


# --------------------------------------------------------------------------- the method


def test_one_type_alone_is_named_and_capitals_do_not_matter():
    alone = typed(immune_cells({"B cells": 60}))
    assert set(alone["cell_type"]) == {"B cells"}
    cells = immune_cells(SIZES)
    mouse = cells.copy()
    mouse.var_names = [g.capitalize() for g in cells.var_names]
    pd.testing.assert_frame_equal(typed(cells), typed(mouse))


def test_few_cells_and_absent_markers_are_no_error():
    cells = immune_cells(SIZES)
    few = typed(cells[:12].copy())
    assert len(few) == 12 and few["confidence"].between(0, 1).all()
    none = typed(cells[:, cells.var_names.str.startswith("OTHER")].copy())
    assert set(none["cell_type"]) == {"Unknown"} and (none["confidence"] == 0).all()
    # Without the co-receptors, T cells stay T cells.
    no_receptor = [g for g in cells.var_names if g not in ("CD4", "CD40LG", "CD8A", "CD8B")]
    named = typed(cells[:, no_receptor].copy())
    is_t = cells.obs["kind"].str.contains("CD4|CD8").to_numpy()
    assert (named["cell_type"][is_t] == "T cells").mean() > 0.95


def test_doublets_are_those_with_the_counts_of_two_types():
    rng = np.random.default_rng(0)
    means = np.array([[10.0, 0.1], [0.1, 10.0]])
    R = np.eye(2)[np.repeat([0, 1], 200)]
    counts = rng.poisson(R @ means).astype(float)
    counts[:3] = [[5, 5], [6, 4], [0, 0]]
    found = is_doublet(counts, np.ones(400), R)
    assert list(found[:3]) == [True, True, False] and found.sum() <= 4


def test_views_agree_only_if_one_tells_the_other():
    rng = np.random.default_rng(0)
    R = np.eye(2)[rng.integers(0, 2, 400)]
    counts = rng.poisson(1 + 5 * R).astype(float)
    noise = rng.normal(size=R.shape)
    assert agreement(R + 0.1 * noise, counts, np.ones(400), R).min() > 0.9
    assert agreement(noise, counts, np.ones(400), R).max() < cell_types.MIN_AGREEMENT


def test_table_knows_the_types_of_markers_csv():
    table = pd.read_csv(ROOT / "tables/cell_types.csv", keep_default_na=False)
    assert list(table.columns) == [*cell_types.COLUMNS, "source"] and (table["source"] != "").all()
    assert table["ontologyId"].str.fullmatch(r"CL:\d{7}").all() and table["ontologyId"].is_unique
    assert (table["ontologyTerm"] != "").all()
    assert set(read_markers(str(ROOT / "tables/markers.csv"), TISSUE)) <= set(TYPES)
    for name, cell_type in TYPES.items():
        assert cell_type.lineage in TYPES and cell_type.lineage in {t.name for t in ancestors(name)}
        assert not set(cell_type.positive) & set(cell_type.negative), name
    with pytest.raises(InputError, match="no such file"):
        read_cell_types(ROOT / "absent.csv", TISSUE)


# --------------------------------------------------------------------------- real cells

SORTED = {  # population of the sort -> lineage
    "CD19+ B": "B cells",
    "CD34+": "Blood progenitor cells",
    "CD56+ NK": "Natural killer cells",
    "CD14+ Monocyte": "Monocytes",
    "CD8+ Cytotoxic T": "CD8+ T cells",
    "CD8+/CD45RA+ Naive Cytotoxic": "CD8+ T cells",
    "CD4+ T Helper2": "CD4+ T cells",
    "CD4+/CD45RO+ Memory": "CD4+ T cells",
    "CD4+/CD25 T Reg": "CD4+ T cells",
    "CD4+/CD45RA+/CD25- Naive T": "CD4+ T cells",
}


def annotated(path, out):
    """Labels by annotate.py, and the cell types that the file gives."""
    done = run_inside("annotate.py", "--data", path, "--out", out)
    assert done.returncode == 0, done.stderr
    return read_result(out), anndata.read_h5ad(path, backed="r").obs["cell_type"].astype(str)


@pytest.mark.skipif(not ZHENG.is_file(), reason="needs ../shared/data/zheng_facs")
def test_sorted_populations_get_their_lineage(tmp_path):
    labels, population = annotated(ZHENG, tmp_path)
    truth = population.map(SORTED)
    decided = labels["cell_type"] != "Unknown"
    assert decided.mean() > 0.93
    lineage, truth = labels["lineage"][decided], truth[decided]
    assert (lineage == truth).mean() >= 0.965
    merged = [a.replace({"CD4+ T cells": "T", "CD8+ T cells": "T"}) for a in (lineage, truth)]
    assert (merged[0] == merged[1]).mean() >= 0.97
    both = lineage.isin(["CD4+ T cells", "CD8+ T cells"]) & truth.isin(lineage.unique())
    for name, floor in (("CD4+ T cells", 0.96), ("CD8+ T cells", 0.95)):
        called = both & (lineage == name) & truth.isin(["CD4+ T cells", "CD8+ T cells"])
        assert (truth[called] == name).mean() >= floor, name


@pytest.mark.skipif(not PBMC3K.is_file(), reason="needs ../shared/data/pbmc3k")
def test_pbmc3k_gets_the_lineages_of_its_tutorial(tmp_path):
    labels, tutorial = annotated(PBMC3K, tmp_path)
    words = {"B": "B cells", "NK": "Natural killer cells", "Platelet": "Platelets"}
    words |= {"CD14+ Mono": "Monocytes", "FCGR3A+ Mono": "Monocytes", "DC": "Dendritic cells"}
    words |= dict.fromkeys(["Naive CD4 T", "Memory CD4 T", "CD8 T"], "T")
    truth = tutorial.map(words)
    lineage = labels["lineage"].replace({"CD4+ T cells": "T", "CD8+ T cells": "T"})
    counted = truth.notna() & (lineage != "Unknown")
    assert counted.mean() > 0.88 and (lineage == truth)[counted].mean() >= 0.97
    naive = tutorial == "Naive CD4 T"
    assert (labels["cell_type"][naive] == "Effector CD8+ T cells").mean() < 0.1  # ScType: 17 %
    cells = anndata.read_h5ad(PBMC3K)
    cd8 = cells[:, ["CD8A", "CD8B"]].X.toarray().sum(axis=1) > 0
    assert cd8[labels["lineage"] == "CD4+ T cells"].mean() < 0.06
    assert cd8[labels["lineage"] == "CD8+ T cells"].mean() > 0.7


def test_types_of_few_cells_are_unknown_and_reported(capsys):
    cell_type = pd.Series(["T cells"] * 12 + ["Platelets"] * 3 + ["Unknown"] * 2)
    kept = annotate.leave_out_rare(cell_type, 10)
    assert list(kept) == ["T cells"] * 12 + ["Unknown"] * 5
    assert "3 Platelets" in capsys.readouterr().out
    assert list(annotate.leave_out_rare(cell_type, 3)) == list(cell_type)


def test_regression_of_a_single_class_says_nothing():
    """A handful of cells may leave one class to the cells that a fold trains on."""
    pcs = np.random.default_rng(0).normal(size=(30, 4))
    R = np.tile([0.0, 1.0], (30, 1))
    assert (cell_types.regression_view(pcs, R, 0) == 0).all()
    R[7] = [1.0, 0.0]  # in the fold that holds it out, the others are of one class
    view = cell_types.regression_view(pcs, R, 0)
    assert np.isfinite(view).all() and (view[7] == 0).all()
