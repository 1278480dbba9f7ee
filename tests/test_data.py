"""Tests of reading counts, labels and bulks, aligning genes, splitting cells, pseudobulks."""

import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse as sp

from conftest import CELL_TYPES, refused, unpack, write_10x, write_10x_h5, write_labels
from counts import pseudobulks
from counts.genes import PROTOCOL_GENES, choose_genes, choose_marker_genes
from counts.pseudobulks import batch_bulks, draw_pseudobulks
from data import DatasetSettings, Reference, align_genes, load_cells, split_cells
from readers.bulk import read_bulk
from readers.count_checks import check_counts
from readers.counts import read_counts
from readers.labels import natural_order
from runtime.errors import InputError
from states.pseudobulks import split_folds

# ------------------------------------------------------------------------------------ counts


def test_embedded_counts_are_the_published_integers():
    adata = load_cells(DatasetSettings())
    assert adata.shape == (700, 765)
    assert adata.X.dtype == np.int32 and sp.issparse(adata.X)
    assert adata.X.max() == 259 and adata.X.min() == 0
    assert len(Reference.of(adata).cell_types) == 10
    assert set(adata.var["gene_ids"]) == {""}  # the file has none


def test_variable_genes_of_few_cells_and_one_type(capsys):
    """The trend over the genes' means, of which few cells have few, is fitted with a wide span."""
    rng = np.random.default_rng(0)
    X = sp.csr_matrix(rng.poisson(rng.gamma(0.1, 0.5, 3000), (20, 3000)).astype(np.int32))
    adata = anndata.AnnData(X, var=pd.DataFrame(index=[f"g{i}" for i in range(3000)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="singular|reciprocal|svddc"):
            scanpy.pp.highly_variable_genes(adata.copy(), flavor="seurat_v3", n_top_genes=50)
        assert len(choose_genes(adata, 50)) == 50


@pytest.mark.parametrize("layout", ["old", "new"])
def test_10x_folder_both_layouts(tmp_path, cells, layout):
    read = read_counts(write_10x(tmp_path / "10x", cells, layout))
    assert list(read.obs_names) == list(cells.obs_names)
    assert list(read.var_names) == list(cells.var_names)
    assert list(read.var["gene_ids"]) == list(cells.var["gene_ids"])
    assert (read.X != cells.X).nnz == 0


def test_10x_h5(tmp_path, cells):
    write_10x_h5(tmp_path / "cells.h5", cells)
    read = read_counts(tmp_path / "cells.h5")
    assert list(read.obs_names) == list(cells.obs_names)
    assert list(read.var["gene_ids"]) == list(cells.var["gene_ids"])
    assert (read.X != cells.X).nnz == 0


def test_h5ad_takes_counts_from_where_they_are(tmp_path, cells, capsys):
    counts = cells.X.copy()
    cells.layers["counts"] = counts
    cells.X = np.log1p(cells.X.toarray())
    cells.write_h5ad(tmp_path / "a.h5ad")
    read = read_counts(tmp_path / "a.h5ad")
    assert (counts != read.X).nnz == 0
    assert "layers['counts']" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["gene_ids", "ENSEMBL", "feature_id"])
def test_h5ad_keeps_gene_ids(tmp_path, cells, column):
    """As in real files, one gene in ten has no id, and one has the id of a transcript."""
    ids = cells.var.pop("gene_ids").astype(object)
    ids.iloc[::10] = None
    ids.iloc[1] = "ENST00000000001"
    cells.var["symbol"] = cells.var_names
    cells.var[column] = ids
    cells.write_h5ad(tmp_path / "a.h5ad")
    read = read_counts(tmp_path / "a.h5ad")
    assert list(read.var["gene_ids"]) == list(ids.fillna(""))


def test_h5ad_named_by_ids_keeps_its_symbols(tmp_path, cells):
    cells.var["feature_id"] = cells.var_names = cells.var["gene_ids"].to_numpy()
    cells.var["feature_name"] = pd.Categorical([f"GENE{i}" for i in range(cells.n_vars)])
    cells.write_h5ad(tmp_path / "a.h5ad")
    read = read_counts(tmp_path / "a.h5ad")
    assert list(read.var_names) == list(cells.var_names)
    assert list(read.var["gene_ids"]) == list(cells.var["feature_name"])


def test_h5ad_columns_without_ids_are_no_gene_ids(tmp_path, cells):
    cells.var["gene_ids"] = [f"probe {i}" for i in range(cells.n_vars)]
    cells.var["feature_id"] = range(cells.n_vars)
    cells.write_h5ad(tmp_path / "a.h5ad")
    assert set(read_counts(tmp_path / "a.h5ad").var["gene_ids"]) == {""}


def test_features_that_are_not_genes_are_left_out_and_reported(tmp_path, cells, capsys):
    folder = write_10x(tmp_path / "10x", cells)
    features = pd.read_csv(folder / "features.tsv.gz", sep="\t", header=None)
    features.loc[57:, 2] = "Antibody Capture"
    features.to_csv(folder / "features.tsv.gz", sep="\t", header=False, index=False)
    assert read_counts(folder).n_vars == 57
    assert "3 features that are not gene expression" in capsys.readouterr().out


def test_repeated_symbols_are_told_apart_and_reported(tmp_path, cells, capsys):
    cells.var_names = ["SAME", "SAME", *cells.var_names[2:]]
    read = read_counts(write_10x(tmp_path / "10x", cells))
    assert list(read.var_names[:2]) == ["SAME", "SAME-1"] and read.n_vars == cells.n_vars
    assert "1 repeated gene symbols" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "words"),
    [(-1.0, "negative"), (1.386, "not an integer"), (np.nan, "not finite"), (3e9, "2147483647")],
)
def test_every_value_is_checked_and_the_bad_one_named(value, words):
    X = sp.random(200, 50, 0.2, format="csr", random_state=0)
    X.data[:] = 3
    position = X.nnz - 2  # near the end: a check of the first values only would miss it
    X.data[position] = value
    cell = np.searchsorted(X.indptr, position, side="right") - 1
    with pytest.raises(InputError, match=words) as error:
        check_counts(X, "file.h5ad", [f"c{i}" for i in range(200)], [f"g{i}" for i in range(50)])
    assert f"cell c{cell}, gene g{X.indices[position]})" in str(error.value)
    assert "file.h5ad" in str(error.value)


def test_duplicated_barcodes_are_an_error(tmp_path, cells):
    cells.obs_names = ["TWICE", "TWICE", *cells.obs_names[2:]]
    with pytest.raises(InputError, match="TWICE"):
        read_counts(write_10x(tmp_path / "10x", cells))


def test_cells_without_counts_are_left_out_and_reported(tmp_path, cells, capsys):
    X = cells.X.tolil()
    X[3] = 0
    cells.X = X.tocsr()
    cells.write_h5ad(tmp_path / "a.h5ad")
    assert load_cells(DatasetSettings(data=tmp_path / "a.h5ad")).n_obs == cells.n_obs - 1
    assert "1 cells without a single count left out" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("header", [True, False])
def test_labels_from_csv_with_and_without_header(tmp_path, cells, header):
    folder = write_10x(tmp_path / "10x", cells)
    labels = write_labels(tmp_path / "labels.csv", cells, header)
    read = load_cells(DatasetSettings(data=folder, labels=str(labels)))
    assert list(read.obs["cell_type"]) == list(cells.obs["cell_type"])
    assert Reference.of(read).cell_types == CELL_TYPES  # the double blank survives


def test_label_order_in_the_file_does_not_matter(tmp_path, cells):
    folder = write_10x(tmp_path / "10x", cells)
    labels = write_labels(tmp_path / "labels.csv", cells[::-1].copy())
    read = load_cells(DatasetSettings(data=folder, labels=str(labels)))
    assert list(read.obs["cell_type"]) == list(cells.obs["cell_type"])


def test_label_csv_beside_the_data_is_found(tmp_path, cells):
    folder = write_10x(tmp_path / "10x", cells)
    write_labels(folder / "barcode_to_celltype.csv", cells)
    assert load_cells(DatasetSettings(data=folder)).n_obs == cells.n_obs


def test_label_csv_of_r_with_row_names(tmp_path, cells):
    folder = write_10x(tmp_path / "10x", cells)
    table = pd.DataFrame({"barcode": cells.obs_names, "cell_type": cells.obs["cell_type"].values})
    table.index += 1
    table.to_csv(tmp_path / "labels.csv")
    read = load_cells(DatasetSettings(data=folder, labels=str(tmp_path / "labels.csv")))
    assert list(read.obs["cell_type"]) == list(cells.obs["cell_type"])


def test_unknown_and_missing_labels_are_counted_and_left_out(tmp_path, cells, capsys):
    """Regression: a NaN label silently became the last type."""
    labels = cells.obs["cell_type"].astype(object)
    labels.iloc[:5] = ["Unknown", np.nan, "", None, "unassigned"]
    cells.obs["cell_type"] = labels.astype(str).where(labels.notna(), None)
    cells.write_h5ad(tmp_path / "a.h5ad")
    read = load_cells(DatasetSettings(data=tmp_path / "a.h5ad"))
    assert read.n_obs == cells.n_obs - 5
    assert "5 of 90 cells are Unknown or unlabelled and left out" in capsys.readouterr().out
    assert Reference.of(read).cell_types == CELL_TYPES
    assert list(read.obs["cell_type"]) == list(labels[read.obs_names])


def test_labels_for_other_barcodes_are_an_error(tmp_path, cells):
    folder = write_10x(tmp_path / "10x", cells)
    (tmp_path / "labels.csv").write_text("barcode,cell_type\nACGT-1,B\nTTTT-1,T\n")
    with pytest.raises(InputError, match="none of its 2 barcodes"):
        load_cells(DatasetSettings(data=folder, labels=str(tmp_path / "labels.csv")))


def test_two_labels_for_one_barcode_are_an_error(tmp_path, cells):
    folder = write_10x(tmp_path / "10x", cells)
    labels = write_labels(tmp_path / "labels.csv", cells)
    labels.write_text(labels.read_text() + f"{cells.obs_names[0]},Other\n")
    with pytest.raises(InputError, match="two different labels"):
        load_cells(DatasetSettings(data=folder, labels=str(labels)))


def test_codes_follow_numbers_not_strings():
    """Regression: with more than ten clusters, codes came out as '0', '1', '10', '2'."""
    assert natural_order(str(i) for i in range(12)) == [str(i) for i in range(12)]
    assert natural_order(["T10", "T9", "B"]) == ["B", "T9", "T10"]
    long = "9" * 5000  # int() refuses it
    assert natural_order(["1" + long, long, "1"]) == ["1", long, "1" + long]


# ---------------------------------------------------------------------- genes, split and bulks


def test_align_genes_reorders_by_name_and_reports_the_share(cells, capsys):
    wanted = [cells.var_names[7], "NOT THERE", cells.var_names[0]]
    X, present = align_genes(cells.X, cells.var_names, wanted, "cells")
    assert present.tolist() == [True, False, True]
    expected = cells.X[:, [7, 0]].toarray()
    assert (X.toarray()[:, [0, 2]] == expected).all() and X[:, 1].nnz == 0
    assert "2 of the model's 3 genes (66.7%)" in capsys.readouterr().out


def test_align_genes_without_overlap_is_an_error(cells):
    with pytest.raises(InputError, match="none of its 60 genes"):
        align_genes(cells.X, cells.var_names, ["X1", "X2"], "cells")


def test_choose_genes_keeps_the_variable_ones():
    """Fifteen genes differ fivefold between two halves of the cells, the others only by chance."""
    rng = np.random.default_rng(0)
    mean = np.tile(rng.uniform(2, 20, 1000), (300, 1))
    mean[:150, 40:55] *= 5 / 3
    mean[150:, 40:55] *= 1 / 3
    cells = anndata.AnnData(sp.csr_matrix(rng.poisson(mean).astype(np.int32)))
    cells.var_names = [f"GENE{i}" for i in range(1000)]
    assert choose_genes(cells, 1000) == list(cells.var_names)
    assert choose_genes(cells, 15) == [f"GENE{i}" for i in range(40, 55)]


def test_genes_are_chosen_from_few_cells_and_many_rare_genes():
    """Half of the genes have a single count, and so one mean, to which no trend can be fitted."""
    rng = np.random.default_rng(0)
    mean = np.tile(np.r_[rng.uniform(0.1, 5, 900), np.full(1100, 0.02)], (60, 1))
    mean[:30, :15], mean[30:, :15] = 16, 4
    X = rng.poisson(mean).astype(np.int32)
    X[:, 900:] = rng.permuted(np.eye(60, 1, dtype=np.int32).repeat(1100, axis=1), axis=0)
    cells = anndata.AnnData(sp.csr_matrix(X))
    cells.var_names = [f"GENE{i}" for i in range(2000)]
    assert choose_genes(cells, 15) == [f"GENE{i}" for i in range(15)]
    alike = cells[:, 900:].copy()
    refused(lambda: choose_genes(alike, 15), "60 cells x 1,100 genes", "expected more cells")


def test_marker_genes_are_those_that_tell_types_apart():
    """A gene that differs between types is taken before one that varies more, but within them."""
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1], 100)
    X = rng.poisson(5.0, (200, 30))
    X[:, 3] += 6 * codes  # differs between the types
    X[:, 7] = rng.permutation(X[:, 3] ** 2)  # varies more, whatever the type
    X[0, 11] += 5000  # one odd cell
    var = pd.DataFrame({"gene_ids": ""}, index=[f"g{i}" for i in range(30)])
    cells = anndata.AnnData(sp.csr_matrix(X), var=var)
    assert choose_marker_genes(cells, codes, 1) == ["g3"]
    assert choose_marker_genes(cells, codes, 40) == list(cells.var_names)
    assert len(choose_marker_genes(cells, codes, 12)) == 12
    # A ribosome's protein is not chosen, however different, be that its name or its other name.
    for name, other in (("RPL13A", ""), ("ENSG00000142541", "Rpl13a")):
        cells.var_names = [name if i == 3 else f"g{i}" for i in range(30)]
        cells.var["gene_ids"] = [other if i == 3 else "" for i in range(30)]
        assert choose_marker_genes(cells, codes, 1) != [name]
        assert name not in choose_marker_genes(cells, codes, 40)
    only = cells[:, 3].copy()  # unless there is nothing else
    assert choose_marker_genes(only, codes, 1) == ["ENSG00000142541"]


def test_protocol_genes_are_no_others():
    yes = "RPL13A RPS4Y1 RPL36AL RPL22L1 RPLP0 RPSA RPL23AP42 RPL7-1 MT-CO1 mt-Nd1 Rps27 MALAT1 FAU"
    no = "RPS6KA1 RPS6KB1 RPS19BP1 RPN1 RPP38 MRPL12 MTOR MT1X FAUX IL7R"
    assert all(map(PROTOCOL_GENES.fullmatch, yes.split()))
    assert not any(map(PROTOCOL_GENES.fullmatch, no.split()))


def test_folds_spread_every_type_evenly():
    codes = np.repeat([0, 1, 2], [41, 8, 1])
    fold = split_folds(codes, 4, np.random.default_rng(0))
    for k, n in ((0, 41), (1, 8), (2, 1)):
        sizes = np.bincount(fold[codes == k], minlength=4)
        assert sizes.sum() == n and sizes.max() - sizes.min() <= 1


def test_split_is_stratified_repeatable_and_leaves_every_type_a_cell():
    codes = np.repeat([0, 1, 2, 3], [100, 50, 1, 2])
    mask = split_cells(codes, 0.2, seed=3)
    assert [mask[codes == k].sum() for k in range(4)] == [20, 10, 0, 0]
    assert (mask == split_cells(codes, 0.2, seed=3)).all()
    assert (mask != split_cells(codes, 0.2, seed=4)).any()
    assert split_cells(codes, 0, seed=3).sum() == 0
    assert [split_cells(codes, 0.99, 0)[codes == k].all() for k in range(4)] == [False] * 4


def test_pseudobulks_are_sums_of_the_cells_they_say(cells):
    """With one distinct cell per type the sum is known exactly from the proportions."""
    codes = Reference.of(load_labels(cells)).codes
    one = np.array([np.flatnonzero(codes == k)[0] for k in range(3)])
    proportions = np.array([[1.0, 0, 0], [0.2, 0.3, 0.5]])
    rng = np.random.default_rng(0)
    bulk, drawn = draw_pseudobulks(
        cells.X[one], np.arange(3), proportions, np.array([7, 1000]), rng
    )
    assert drawn[0].tolist() == [1, 0, 0]
    np.testing.assert_allclose(drawn[1], proportions[1], atol=0.06)
    expected = (drawn * [[7], [1000]]) @ cells.X[one].toarray()
    np.testing.assert_allclose(bulk, expected, rtol=1e-4)


def test_pseudobulks_from_small_pools_repeat_few_cells():
    """With a pool of two, each type's part of a bulk is made of at most two distinct cells."""
    X, codes = sp.identity(100, format="csr"), np.repeat([0, 1], 50)  # gene i marks cell i
    rng = np.random.default_rng(0)
    proportions = np.full((20, 2), 0.5)
    bulk, _ = draw_pseudobulks(X, codes, proportions, 200, rng, pool=np.full(20, 2))
    assert bulk.sum() == 20 * 200
    for part in (bulk[:, :50], bulk[:, 50:]):
        distinct = (part > 0).sum(axis=1)
        assert distinct.max() == 2
    assert len({tuple(row) for row in bulk > 0}) > 15  # each bulk has another pool


def load_labels(cells):
    cells.obs["cell_type"] = pd.Categorical(cells.obs["cell_type"])
    return cells


def test_batch_bulks_of_large_references_are_the_same(cells, monkeypatch):
    """Small references are summed as dense matrices, others as sparse ones."""
    parts = []
    for most in (10**9, 0):
        monkeypatch.setattr(pseudobulks, "MAX_DENSE", most)
        parts.append(list(batch_bulks(cells.X, 20, 9, np.random.default_rng(0), 4)))
    for (dense, a), (sparse, b) in zip(*parts, strict=True):
        assert np.array_equal(a, b) and np.array_equal(dense, sparse)
        assert dense.dtype == sparse.dtype == np.float32


def test_batch_bulks_use_every_cell_once_per_pass(cells):
    parts = batch_bulks(cells.X, 30, 7, np.random.default_rng(0), 2)  # two at a time
    bulk, members = map(np.concatenate, zip(*parts, strict=True))
    assert bulk.shape == (7, 60) and members.shape == (7, 30)
    assert sorted(members[:3].ravel()) == list(range(90))
    np.testing.assert_array_equal(bulk[4], cells.X[members[4]].toarray().sum(axis=0))


# -------------------------------------------------------------------------------- bulk files


@pytest.fixture
def bulk_table():
    rng = np.random.default_rng(0)
    genes = [f"GENE{i}" for i in range(20)]
    return pd.DataFrame(rng.gamma(1, 50, (3, 20)), ["s1", "s 2", "s,3"], genes)


def ids_of(genes):
    return [f"ENSG{int(g.removeprefix('GENE')):011d}" for g in genes]


def check_read(path, bulk_table, gene_ids=None):
    """The file at path gives every value of the table, in the order of the model's genes."""
    genes = list(bulk_table.columns[::-1])
    X, present, samples = unpack(read_bulk(path, genes, gene_ids and gene_ids[::-1]))
    assert samples == list(bulk_table.index) and present.all()
    np.testing.assert_allclose(X.toarray(), bulk_table[genes].to_numpy())


@pytest.mark.parametrize("genes_in_rows", [True, False])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz"])
def test_bulk_in_either_orientation(tmp_path, bulk_table, capsys, genes_in_rows, suffix):
    table = bulk_table.T if genes_in_rows else bulk_table
    path = tmp_path / f"bulk.{suffix}"
    table.to_csv(path, sep="\t" if suffix == "tsv" else ",")
    check_read(path, bulk_table)
    genes = [*bulk_table.columns[12:1:-1], "ABSENT"]
    X, present, samples = unpack(read_bulk(path, genes))
    assert samples == list(bulk_table.index) and present.tolist() == [True] * 11 + [False]
    np.testing.assert_allclose(X.toarray()[:, :11], bulk_table[genes[:11]].to_numpy())
    assert X[:, 11].nnz == 0
    expected = "3 bulk samples x 20 genes; 11 of the model's 12 genes found (91.7 %: 11 by symbol)"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("short", [True, False])
def test_bulk_with_semicolons_and_byte_order_mark(tmp_path, bulk_table, short):
    """The mark is no part of the first sample's name, even if the header is a field short."""
    text = bulk_table.T.to_csv(sep=";").removeprefix(";" * short)
    (tmp_path / "bulk.csv").write_text(text, encoding="utf-8-sig")
    check_read(tmp_path / "bulk.csv", bulk_table)


@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_bulk_h5ad(tmp_path, bulk_table, genes_in_rows):
    anndata.AnnData(bulk_table.T if genes_in_rows else bulk_table).write_h5ad(tmp_path / "b.h5ad")
    check_read(tmp_path / "b.h5ad", bulk_table)


def test_bulk_h5ad_with_symbols_in_var(tmp_path, bulk_table, capsys):
    adata = anndata.AnnData(sp.csr_matrix(bulk_table.to_numpy()))
    adata.obs_names, adata.var["gene_name"] = bulk_table.index, bulk_table.columns.to_numpy()
    adata.var["n_exons"] = 3
    adata.write_h5ad(tmp_path / "bulk.h5ad")
    check_read(tmp_path / "bulk.h5ad", bulk_table)
    assert "gene names taken from column gene_name" in capsys.readouterr().out


@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_repeated_genes_of_a_bulk_are_summed(tmp_path, bulk_table, capsys, genes_in_rows):
    """By symbol, by id, by the id on the Y chromosome: whatever means GENE1 goes into it."""
    repeated = bulk_table.copy()
    expected = repeated.iloc[:, 1:5].sum(axis=1)
    symbols = list(repeated.columns)
    one = ["GENE1", "GENE1", "ENSG00000000001.3", "ENSG00000000001.3_PAR_Y"]
    repeated.columns = [symbols[0], *one, *symbols[5:]]
    (repeated.T if genes_in_rows else repeated).to_csv(tmp_path / "bulk.csv")
    X, present, _ = unpack(read_bulk(tmp_path / "bulk.csv", symbols, ids_of(symbols)))
    assert present.tolist() == [True] * 2 + [False] * 3 + [True] * 15
    np.testing.assert_allclose(X[:, [1]].toarray().ravel(), expected)
    np.testing.assert_allclose(X[:, [5]].toarray().ravel(), bulk_table["GENE5"])
    out = capsys.readouterr().out
    assert "3 repeated genes summed" in out
    assert "17 of the model's 20 genes found (85.0 %: 17 by symbol)" in out


@pytest.mark.parametrize("bulk_suffix", ["", ".7", ".12_PAR_Y", "_SYMBOL"])
@pytest.mark.parametrize("model_suffix", ["", ".2"])
def test_bulk_by_ensembl_ids(tmp_path, bulk_table, capsys, bulk_suffix, model_suffix):
    """Whatever version the bulk has and the reference had; the ids may be the names themselves."""
    ids = [i + model_suffix for i in ids_of(bulk_table.columns)]
    named = bulk_table.set_axis([i + bulk_suffix for i in ids_of(bulk_table.columns)], axis=1)
    named.T.to_csv(tmp_path / "bulk.csv")
    check_read(tmp_path / "bulk.csv", bulk_table, ids)
    check_read(tmp_path / "bulk.csv", bulk_table.set_axis(ids, axis=1))
    assert capsys.readouterr().out.count("(100.0 %: 20 by Ensembl id)") == 2


def test_bulk_by_ids_and_symbols_together(tmp_path, bulk_table, capsys):
    ids = [*ids_of(bulk_table.columns[:-1]), ""]  # the reference knows no id of its last gene
    mixed = [i if n % 4 == 0 else g for n, (i, g) in enumerate(zip(ids, bulk_table, strict=True))]
    bulk_table.set_axis(mixed, axis=1).T.to_csv(tmp_path / "bulk.csv")
    check_read(tmp_path / "bulk.csv", bulk_table, ids)
    # A model named by ids maps symbols the same way.
    read_bulk(tmp_path / "bulk.csv", ids[:-1], list(bulk_table.columns[:-1]))
    out = capsys.readouterr().out
    assert "20 genes found (100.0 %: 15 by symbol, 5 by Ensembl id)" in out
    assert "19 genes found (100.0 %: 14 by symbol, 5 by Ensembl id)" in out


def test_names_of_genes_come_before_other_names(tmp_path, bulk_table):
    """A second name that is another gene's first name belongs to that gene; case counts."""
    genes, others = ["GENE0", "GENE1", "Gene2"], ["GENE1", "GENE5", ""]
    bulk_table.to_csv(tmp_path / "bulk.csv")
    X, present, _ = unpack(read_bulk(tmp_path / "bulk.csv", genes, others))
    assert present.tolist() == [True, True, False]
    expected = bulk_table[["GENE1", "GENE5"]].sum(axis=1)
    np.testing.assert_allclose(X[:, [1]].toarray().ravel(), expected)


@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_large_bulk_by_ids_in_seconds(tmp_path, genes_in_rows):
    counts = np.random.default_rng(0).lognormal(3, 2, (100, 20000)).astype(int)
    ids = [f"ENSG{i:011d}" for i in range(20000)]
    table = pd.DataFrame(counts, [f"{i:03d}" for i in range(100)], [f"{i}.4" for i in ids])
    (table.T if genes_in_rows else table).to_csv(tmp_path / "bulk.csv")
    genes, start = [f"GENE{i}" for i in range(10000)], time.monotonic()
    X, present, samples = unpack(read_bulk(tmp_path / "bulk.csv", genes, ids[:10000]))
    assert time.monotonic() - start < 20  # a second or two; a loop over values takes minutes
    assert samples == list(table.index) and present.all()
    assert (X.toarray() == counts[:, :10000]).all()


def test_bulk_as_featurecounts_writes_it(tmp_path, bulk_table, capsys):
    """Chr and Start hold lists, or a lone number for a gene with one exon; Length is a number."""
    table = bulk_table.T.astype(object)
    exons = np.arange(20) % 3 > 0
    table.insert(0, "Chr", np.where(exons, "1;1", "1"))
    table.insert(1, "Start", np.where(exons, "100;300", "100"))
    table.insert(2, "End", np.where(exons, "200;400", "200"))
    table.insert(3, "Strand", np.where(exons, "+;+", "-"))
    table.insert(4, "Length", np.arange(500, 520))
    table.index = pd.Index(ids_of(bulk_table.columns), name="Geneid")
    head = '# Program:featureCounts v2.0.3; Command:"featureCounts" "-a" "x.gtf" "-T" "4"\n'
    (tmp_path / "counts.txt").write_text(head + table.to_csv(sep="\t"))
    check_read(tmp_path / "counts.txt", bulk_table, ids_of(bulk_table.columns))
    expected = "5 columns that are not samples left out (Chr, Start, End, Strand, Length)"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    "before", ["#1.2\n20\t3\n", "#1.2\t\t\t\t\n20\t3\t\t\t\n", "\n# a\n#b\n", ""]
)
def test_bulk_as_gct(tmp_path, bulk_table, capsys, before):
    """As GTEx exports it; the model knows symbols alone, so Description names the genes."""
    table = bulk_table.T
    table.insert(0, "Description", bulk_table.columns)
    table.index = pd.Index([f"{i}.5" for i in ids_of(bulk_table.columns)], name="Name")
    (tmp_path / "tpm.gct").write_text(before + table.to_csv(sep="\t"))
    check_read(tmp_path / "tpm.gct", bulk_table)
    out = capsys.readouterr().out
    assert "1 column that is none of the samples left out (Name)" in out
    assert "gene names taken from column Description" in out
    check_read(tmp_path / "tpm.gct", bulk_table, ids_of(bulk_table.columns))
    assert "gene names taken" not in capsys.readouterr().out  # the ids do as well


def test_header_that_begins_with_a_number_sign(tmp_path, bulk_table):
    (tmp_path / "bulk.tsv").write_text("#" + bulk_table.T.to_csv(sep="\t"))
    check_read(tmp_path / "bulk.tsv", bulk_table)


def test_bulk_with_columns_of_salmon_and_row_numbers(tmp_path, bulk_table, capsys):
    table = bulk_table.T.reset_index(names="gene_name")
    table.insert(0, "gene_id", "unknown")
    table.insert(2, "Effective_Length", 812.5)
    table.to_csv(tmp_path / "bulk.csv")
    check_read(tmp_path / "bulk.csv", bulk_table)
    out = capsys.readouterr().out
    assert "2 columns that are not samples left out (gene_id, Effective_Length)" in out
    assert "the first column numbers the rows" in out


def test_text_beside_samples_in_rows(tmp_path, bulk_table, capsys):
    """A condition of each sample is no gene; a sample's name stays as it is written."""
    bulk_table.index = ["001", "1.10", "NA"]
    table = bulk_table.copy()
    table.insert(0, "condition", ["treated", "treated", "control"])
    table.to_csv(tmp_path / "bulk.csv")
    check_read(tmp_path / "bulk.csv", bulk_table)
    expected = "1 column that is none of the genes left out (condition)"
    assert expected in capsys.readouterr().out
    bulk_table.T.to_csv(tmp_path / "bulk.csv")
    check_read(tmp_path / "bulk.csv", bulk_table)


def test_bulk_as_r_writes_it(tmp_path, bulk_table):
    """write.table(counts, sep = "\\t"): the header is one field short."""
    lines = bulk_table.T.to_csv(sep="\t").splitlines()
    lines[0] = lines[0].removeprefix("\t")
    (tmp_path / "bulk.txt").write_text("\n".join(lines) + "\n")
    check_read(tmp_path / "bulk.txt", bulk_table)


@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_genes_without_values_are_absent(tmp_path, bulk_table, capsys, genes_in_rows):
    """Empty last rows and columns, as spreadsheets leave them, are ignored."""
    table = bulk_table.astype(object)
    table["GENE3"], table["GENE4"] = "", "NA"
    lines = (table.T if genes_in_rows else table).to_csv().splitlines()
    commas = "," * (4 if genes_in_rows else 21)
    (tmp_path / "bulk.csv").write_text("\n".join([*(f"{x}," for x in lines), commas]) + "\n")
    X, present, samples = unpack(read_bulk(tmp_path / "bulk.csv", list(bulk_table.columns)))
    assert samples == list(bulk_table.index)
    assert np.flatnonzero(~present).tolist() == [3, 4]
    np.testing.assert_allclose(X[:, 5:].toarray(), bulk_table.iloc[:, 5:])
    out = capsys.readouterr().out
    assert "2 genes without any value left out" in out and "3 bulk samples x 18 genes" in out


@pytest.mark.parametrize("genes_in_rows", [True, False])
@pytest.mark.parametrize(
    ("value", "words"),
    [(-3, "found -3 "), ("", "found ''"), ("n.d.", "n.d."), (np.inf, "inf"), ("1,5", "'1,5'")],
)
def test_bad_values_in_a_bulk_are_named(tmp_path, bulk_table, value, words, genes_in_rows):
    bulk_table = bulk_table.astype(object)
    bulk_table.loc["s 2", "GENE4"] = value
    (bulk_table.T if genes_in_rows else bulk_table).to_csv(tmp_path / "bulk.csv")
    with pytest.raises(InputError, match=words) as error:
        read_bulk(tmp_path / "bulk.csv", bulk_table.columns)
    assert "(sample s 2, gene GENE4)" in str(error.value)


@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_samples_and_genes_of_text_alone_are_not_passed_over(tmp_path, bulk_table, genes_in_rows):
    """A sample in which all is NA is no annotation, nor is a gene that the model knows."""
    table = bulk_table.astype(object)
    if genes_in_rows:
        table.loc["s 2"] = "NA"
        table = table.T
    else:
        table["GENE0"] = "NA?"
    table.to_csv(tmp_path / "bulk.csv")
    with pytest.raises(InputError, match=r"found 'NA\??' \(sample s.*, gene GENE0\)"):
        read_bulk(tmp_path / "bulk.csv", bulk_table.columns)


@pytest.mark.parametrize("n_genes", [2, 20])
def test_decimal_commas_are_read_if_no_number_has_a_point(tmp_path, bulk_table, n_genes):
    table = bulk_table.iloc[:, :n_genes]
    table.T.to_csv(tmp_path / "bulk.csv", sep=";", decimal=",")
    check_read(tmp_path / "bulk.csv", table)


def test_empty_bulk_sample_is_an_error(tmp_path, bulk_table):
    bulk_table.loc["s1"] = 0
    bulk_table.to_csv(tmp_path / "bulk.csv")
    with pytest.raises(InputError, match="empty"):
        read_bulk(tmp_path / "bulk.csv", bulk_table.columns)


def test_repeated_samples_are_an_error(tmp_path, bulk_table):
    bulk_table.index = ["s1", "s2", "s1"]
    bulk_table.T.to_csv(tmp_path / "bulk.csv")
    with pytest.raises(InputError, match=r"more than once \(s1\)"):
        read_bulk(tmp_path / "bulk.csv", bulk_table.columns)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "found 0 names in its header"),
        ("gene,s1\nGENE0,1,2,3\n", "found 2 names in its header (gene, s1) and 4 fields"),
        ("gene,s1\nGENE0,1\nGENE1,1,2\n", "not a readable table"),
        ("GENE0\nGENE1\n", "found no sample"),
        ("gene,about\nGENE0,first\nGENE1,second\n", "found no sample"),
        ("sample,GENE0,GENE1\n", "found no sample"),
    ],
)
def test_tables_that_are_none(tmp_path, text, words):
    (tmp_path / "bulk.csv").write_text(text)
    with pytest.raises(InputError) as error:
        read_bulk(tmp_path / "bulk.csv", ["GENE0", "GENE1"])
    assert words in str(error.value) and "bulk.csv: " in str(error.value)


@pytest.mark.parametrize("name", ["bulk.xlsx", "BULK.XLS"])
def test_excel_files_are_to_be_exported(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="export it as csv"):
        read_bulk(tmp_path / name, ["GENE1"])


def test_few_known_genes_are_a_warning(tmp_path, bulk_table, capsys):
    bulk_table.to_csv(tmp_path / "bulk.csv")
    genes = [*bulk_table.columns[:4], *(f"OTHER{i}" for i in range(4))]
    read_bulk(tmp_path / "bulk.csv", genes, [f"ENSG{i}" for i in range(8)])
    assert capsys.readouterr().err == ""  # half of them are enough
    _, present, _ = unpack(
        read_bulk(tmp_path / "bulk.csv", genes[1:], [f"ENSG{i}" for i in range(1, 8)])
    )
    assert present.sum() == 3
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1 and "poor" in warning
    assert "expected names such as GENE1, GENE2, GENE3, ..., or ENSG1, ENSG2, ENSG3" in warning


def test_bulk_without_known_genes_is_an_error(tmp_path, bulk_table):
    bulk_table.to_csv(tmp_path / "bulk.csv")
    with pytest.raises(InputError, match=r"known to the model \(CD3E, CD19, or ENSG1, ENSG2\)"):
        read_bulk(tmp_path / "bulk.csv", ["CD3E", "CD19"], ["ENSG1", "ENSG2"])
    with pytest.raises(InputError, match=r"\(CD3E; the weights hold no ids or other names"):
        read_bulk(tmp_path / "bulk.csv", ["CD3E"])


# ------------------------------------------------------------------------------- real data


def test_pbmc1k_reads_as_described():
    folder = Path(__file__).resolve().parents[2] / "shared/data/pbmc1k_v3"
    if not folder.is_dir():
        pytest.skip("PBMC 1K is not available (../shared/data/pbmc1k_v3)")
    cells = load_cells(DatasetSettings(data=folder))
    assert cells.shape == (863, 14688) and len(Reference.of(cells).cell_types) == 8
    assert cells.var_names.is_unique


def test_ids_of_a_real_reference_name_its_genes(tmp_path, capsys):
    """GENCODE-like ids, with versions: those the reference has find their genes, and no other."""
    folder = Path(__file__).resolve().parents[2] / "shared/data/pbmc1k_v3"
    if not folder.is_dir():
        pytest.skip("PBMC 1K is not available (../shared/data/pbmc1k_v3)")
    table = pd.read_csv(folder / "features.tsv.gz", sep="\t", header=None, keep_default_na=False)
    with_id = table[table[0].str.startswith("ENSG")]
    counts = np.random.default_rng(0).lognormal(3, 2, len(with_id)).astype(int) + 1
    bulk = pd.DataFrame({"donor": counts}, index=with_id[0] + ".11")
    bulk.to_csv(tmp_path / "bulk.tsv", sep="\t")
    X, present, _ = unpack(read_bulk(tmp_path / "bulk.tsv", list(table[1]), list(table[0])))
    assert np.flatnonzero(present).tolist() == with_id.index.tolist()
    assert (X[:, with_id.index].toarray().ravel() == counts).all()
    assert "12,455 of the model's 14,688 genes found (84.8 %: 12,455 by" in capsys.readouterr().out
