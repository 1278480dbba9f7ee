"""Tests of the single-cell reference as people have it: read right, or refused in one line."""

import gzip
import os
import shutil

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from conftest import make_cells, refused, write_10x, write_10x_h5, write_labels
from data import DatasetSettings, Reference, TrainingSettings, library_size, load_cells
from readers import tenx
from readers.backed import read_backed
from readers.count_checks import check_orientation
from readers.counts import COUNT_LAYERS, read_counts
from readers.labels import is_type_name, read_label_csv


def load(path, **settings):
    return load_cells(DatasetSettings(data=str(path), **settings))


def write(path, cells):
    cells.write_h5ad(path)
    return path


def real_barcodes(n, seed=0):
    """Barcodes of 16 letters without a number, all different."""
    letters = np.random.default_rng(seed).choice(list("ACGT"), (n, 16))
    return ["".join(row) for row in letters]


@pytest.fixture
def pbmc():
    """The synthetic cells, with barcodes such as 10x's."""
    cells = make_cells()
    cells.obs_names = [f"{b}-1" for b in real_barcodes(cells.n_obs)]
    return cells


# ------------------------------------------------------------- columns of numbers for cell types

CODES = {
    "int": lambda codes: codes,
    "float": lambda codes: codes.astype(float),
    "text": lambda codes: codes.astype(str).astype(object),
    "text of floats": lambda codes: codes.astype(float).astype(str).astype(object),
    "categorical": lambda codes: pd.Categorical(codes.astype(str)),
    "missing": lambda codes: np.where(codes == 1, np.nan, codes),
}


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("backed", [False, True])
def test_numbers_found_as_cell_types_are_refused(tmp_path, cells, kind, backed):
    codes = pd.factorize(cells.obs["cell_type"])[0]
    cells.obs["cell_type"] = CODES[kind](codes)
    path = write(tmp_path / "a.h5ad", cells)
    settings = TrainingSettings(data=str(path), backed=backed)
    words = ["column cell_type", "numbers such as 0", "expected names", "--labels cell_type", "csv"]
    refused(lambda: load_cells(settings), path, *words)
    settings.labels = "cell_type"  # asked for by name
    read = load_cells(settings)
    assert Reference.of(read).cell_types[0] in ("0", "0.0")
    assert read.n_obs == (np.sum(codes != 1) if kind == "missing" else cells.n_obs)


def test_one_name_among_numbers_is_no_column_of_codes(tmp_path, cells):
    cells.obs["cell_type"] = ["B2", *["3"] * (cells.n_obs - 1)]
    assert Reference.of(load(write(tmp_path / "a.h5ad", cells))).cell_types == ["3", "B2"]


def test_numbers_in_the_csv_beside_the_data_are_refused(tmp_path, cells):
    folder = write_10x(tmp_path / "10x", cells)
    cells.obs["cell_type"] = np.arange(cells.n_obs) % 4
    labels = write_labels(folder / "barcode_to_celltype.csv", cells)
    refused(lambda: load(folder), labels, "numbers such as 0, 1, 2", f"--labels {labels}")
    assert Reference.of(load(folder, labels=str(labels))).cell_types == ["0", "1", "2", "3"]


def as_seurat_disk(path, cells, first=0, link=False):
    """Write factors as SeuratDisk does: codes in .obs, names in obs/__categories."""
    names, codes = np.unique(cells.obs["cell_type"], return_inverse=True)
    cells.obs["cell_type"] = codes + first
    cells.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["obs"].attrs["encoding-version"] = "0.1.0"
        for name in ("obs/cell_type", "obs/_index"):
            for attribute in ("encoding-type", "encoding-version"):
                file[name].attrs.pop(attribute)
        group = file["obs"].create_group("__categories")
        group.create_dataset("cell_type", data=[*names], dtype=h5py.string_dtype())
        if link:
            file["obs/cell_type"].attrs["categories"] = group["cell_type"].ref
    return path


@pytest.mark.parametrize("read", [read_counts, read_backed])
@pytest.mark.parametrize(("first", "link"), [(0, True), (0, False), (1, False)])
def test_factors_of_old_files_get_their_names(tmp_path, cells, capsys, read, first, link):
    expected = dict(zip(cells.obs_names, cells.obs["cell_type"], strict=True))
    path = as_seurat_disk(tmp_path / "a.h5ad", cells, first, link)
    obs = read(path).obs
    assert dict(zip(obs.index, obs["cell_type"], strict=True)) == expected
    assert ("names of cell_type taken from obs/__categories" in capsys.readouterr().out) != link


def test_factors_that_may_begin_at_0_or_1_stay_codes(tmp_path, cells):
    """Without a cell of code 0 or of the last code, both fit: the numbers are refused."""
    path = as_seurat_disk(tmp_path / "a.h5ad", cells, first=1)
    with h5py.File(path, "r+") as file:
        del file["obs/__categories/cell_type"]
        names = ["A", "B", "C", "D"]
        file["obs/__categories"].create_dataset("cell_type", data=names, dtype=h5py.string_dtype())
    refused(lambda: load(path), "numbers such as 1, 2, 3")


# -------------------------------------------------------------------- barcodes of two files


def labels_for(path, cells, rename):
    cells.obs_names = [rename(b, i) for i, b in enumerate(cells.obs_names)]
    return write_labels(path, cells)


MENDED = {
    "no number in the file": (lambda b, i: b, lambda b, i: b[:-2]),
    "no number in the data": (lambda b, i: b[:-2], lambda b, i: b),
    "points as R writes them": (lambda b, i: b, lambda b, i: b.replace("-", ".")),
    "scanpy's number of the batch": (lambda b, i: f"{b}-{i % 2}", lambda b, i: b),
    "Seurat's number of the sample": (lambda b, i: b, lambda b, i: f"{b}_1"),
    "a sample in the file": (lambda b, i: b, lambda b, i: f"sample1_{b}"),
    "a sample in the data": (lambda b, i: f"sample1#{b}", lambda b, i: b),
    "a sample at the end": (lambda b, i: f"{b}-ctrl", lambda b, i: b),
    "a sample, and no number": (lambda b, i: f"s1:{b}", lambda b, i: b[:-2]),
    "blanks": (lambda b, i: b, lambda b, i: f"  {b} "),
}


SYNTHETIC = [case for case in MENDED if "Seurat" not in case and "at the end" not in case]


@pytest.mark.parametrize(
    ("case", "names"), [*((c, "10x") for c in MENDED), *((c, "synthetic") for c in SYNTHETIC)]
)
def test_barcodes_written_in_another_way_are_matched(tmp_path, pbmc, cells, capsys, case, names):
    """CELL000-1_1 may be anything, but where a barcode is one, what is around it is known."""
    cells = pbmc if names == "10x" else cells
    in_data, in_file = MENDED[case]
    labels = labels_for(tmp_path / "labels.csv", cells[::-1].copy(), in_file)
    cells.obs_names = [in_data(b, len(cells) - 1 - i) for i, b in enumerate(cells.obs_names)]
    cells.obs_names = [str(name) for name in cells.obs_names]
    read = read_label_csv(labels, cells.obs_names)
    assert list(read.index) == list(cells.obs_names)
    assert list(read) == list(cells.obs["cell_type"])
    out = capsys.readouterr().out
    assert (f"{labels}: 90 of 90 barcodes match with" in out) == (case != "blanks")
    assert out.count("\n") <= 1


@pytest.mark.parametrize("foreign", [0, 30])
def test_what_does_not_match_is_still_counted(tmp_path, pbmc, capsys, foreign):
    """Labels of two thirds of the cells, and of other cells, without -1."""
    lines = [f"{b[:-2]},{t}" for b, t in zip(pbmc.obs_names, pbmc.obs["cell_type"], strict=True)]
    lines = lines[:60] + [f"{b},B" for b in real_barcodes(foreign, seed=5)]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    labels = read_label_csv(tmp_path / "labels.csv", pbmc.obs_names)
    assert labels.notna().sum() == 60 and labels.iloc[:60].notna().all()
    out = capsys.readouterr().out
    assert "60 of 90 barcodes match without the number at the end of the data's" in out
    assert "no label for 30 of 90 cells" in out
    assert (f"{foreign} labels are for barcodes" in out) == (foreign > 0)


def test_two_cells_that_become_one_are_refused(tmp_path, pbmc):
    bare = [b[:-2] for b in pbmc.obs_names]
    (tmp_path / "labels.csv").write_text("".join(f"{b},B\n" for b in bare))
    two_samples = [*pbmc.obs_names, f"{bare[3]}-2"]
    words = ["none of its 90 barcodes", "1 barcodes then", f"{bare[3]}-1, {bare[3]}-2"]
    refused(lambda: read_label_csv(tmp_path / "labels.csv", two_samples), *words)
    (tmp_path / "labels.csv").write_text("".join(f"{b},B\n" for b in two_samples))
    refused(lambda: read_label_csv(tmp_path / "labels.csv", bare), "labels.csv", *words[1:])
    refused(lambda: read_label_csv(tmp_path / "labels.csv", [f"x_{b}" for b in bare]), *words[1:])


@pytest.mark.parametrize(
    ("in_data", "in_file", "words"),
    [
        (lambda b, i: b, lambda b, i: f"s{i % 2}_{b}", ["names of 2 samples", "s0_"]),
        (lambda b, i: f"s1_{b}", lambda b, i: f"s2_{b}", ["sample's name", "s2_", "s1_"]),
        (lambda b, i: b, lambda b, i: b.replace("-1", "-7"), ["number at their end (-7, -1)"]),
    ],
)
def test_barcodes_that_differ_in_more_are_refused_by_their_cause(
    tmp_path, pbmc, in_data, in_file, words
):
    bare = list(pbmc.obs_names)
    labels = labels_for(tmp_path / "labels.csv", pbmc, in_file)
    data = [in_data(b, i) for i, b in enumerate(bare)]
    refused(lambda: read_label_csv(labels, data), labels, "none of its 90", data[0], *words)


def test_few_barcodes_in_common_are_chance(tmp_path, pbmc):
    """Two samples share some barcodes of the same list; their cells have nothing in common."""
    others = [f"{b}-1" for b in real_barcodes(88, seed=7)]
    names = [*pbmc.obs_names[:2], *others]
    (tmp_path / "labels.csv").write_text("".join(f"{b},B\n" for b in names))
    refused(lambda: read_label_csv(tmp_path / "labels.csv", pbmc.obs_names), "only 2 of its 90")
    # A file of two labels is no such case.
    (tmp_path / "labels.csv").write_text("".join(f"{b},B\n" for b in names[:2]))
    assert read_label_csv(tmp_path / "labels.csv", pbmc.obs_names).notna().sum() == 2


# ------------------------------------------------------------------------ files of labels

QUOTED, PLAIN = '"{}"{}"{}"', "{}{}{}"


@pytest.mark.parametrize("separator", [",", "\t", ";", " "])
@pytest.mark.parametrize("quoted", [True, False])
@pytest.mark.parametrize(
    "header",
    [None, "barcode cluster", "cell annotation", "index celltype", " Cell_Type", "x", "CB Ident"],
)
def test_two_columns_as_tools_write_them(tmp_path, pbmc, capsys, separator, quoted, header):
    """The header may be missing, a field short (write.table) or begin empty (write.csv)."""
    names = {"B cells": "B", "CD4+/CD25 T": "T, CD4; a", "Natural killer  cells": "NK"}
    if not quoted:  # then a name may not hold what parts the fields
        names["CD4+/CD25 T"] = "T" if separator == " " else "T|CD4"
    types = [names[t] for t in pbmc.obs["cell_type"]]
    form = QUOTED if quoted else PLAIN
    lines = [form.format(b, separator, t) for b, t in zip(pbmc.obs_names, types, strict=True)]
    if header == "x":
        lines = [form[:3].strip("{") and ('"x"' if quoted else "x"), *lines]
    elif header is not None:
        first, _, second = header.partition(" ")
        if separator == " " and not quoted and not first:
            first = '""'
        lines = [form.format(first, separator, second), *lines]
    (tmp_path / "labels.txt").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    assert list(read_label_csv(tmp_path / "labels.txt", pbmc.obs_names)) == types
    assert capsys.readouterr().out == ""  # no header was taken for a label


def meta_data(cells, **columns):
    """As Seurat's meta.data."""
    table = pd.DataFrame({"orig.ident": "p", "nCount_RNA": 7}, index=cells.obs_names)
    return table.assign(seurat_clusters=np.arange(len(table)) % 4, **columns)


@pytest.mark.parametrize(
    "name",
    ["cell_type", "CellType", "cell.type", "Annotation", "labels", "cluster names"]
    + ["predicted.celltype.l2", "cell_type_major", "majority_voting", "predicted_labels"],
)
@pytest.mark.parametrize("separator", [",", "\t"])
def test_one_column_known_for_types_is_taken_from_many(tmp_path, pbmc, capsys, name, separator):
    table = meta_data(pbmc, **{name: pbmc.obs["cell_type"]})
    path = tmp_path / "meta.csv"
    table.to_csv(path, sep=separator)
    assert list(read_label_csv(path, pbmc.obs_names)) == list(pbmc.obs["cell_type"])
    said = f"{path}: cell_type taken from column {name}\n"
    assert capsys.readouterr().out == (said if name != "cell_type" else "")


def test_numbers_of_rows_are_no_barcodes(tmp_path, cells):
    """R's row numbers, without a column of barcodes, say nothing about cell_1 or 1-1."""
    lines = [f"{i},{t}" for i, t in enumerate(cells.obs["cell_type"])]
    (tmp_path / "labels.csv").write_text("\n".join([",cell_type", *lines]))
    for form in ("cell_{}", "{}-1", "s:{}"):
        names = [form.format(i) for i in range(90)]
        refused(lambda names=names: read_label_csv(tmp_path / "labels.csv", names), "none of its")


def numbered_table(path, numbers, column="cell_type", values=("B", "T")):
    """A table of R or pandas, whose cells have the numbers of rows for names."""
    lines = [f"{i},{values[k % 2]}" for k, i in enumerate(numbers)]
    path.write_text("\n".join([f",{column}", *lines]))
    return str(path)


@pytest.mark.parametrize(
    ("in_data", "in_file", "form"),
    [
        (range(90), range(1, 91), "{}"),
        (range(1, 91), range(90), "{}"),
        (range(90), range(1, 60), "{}"),  # of some cells, by whose count?
        (range(90), range(5, 60), "{}"),
        (range(5, 95), range(200), "{}"),
        (range(90), range(1, 91), "cell_{}"),
    ],
)
@pytest.mark.parametrize("setting", ["labels", "samples", "donors"])
def test_other_numbers_of_rows_are_refused(tmp_path, cells, in_data, in_file, form, setting):
    cells.obs_names = [form.format(i) for i in in_data]
    cells.obs["sample"] = "s"
    path = write(tmp_path / "cells.h5ad", cells)
    given = {"samples": "sample"} if setting == "donors" else {}
    column = {"labels": "cell_type"}.get(setting, setting.removesuffix("s"))
    numbers = [form.format(i) for i in in_file]
    given[setting] = numbered_table(tmp_path / "table.csv", numbers, column, ("s", "s"))
    settings = TrainingSettings(data=str(path), **given)
    refused(lambda: load_cells(settings), "table.csv", "numbers in place of barcodes", ".obs")


@pytest.mark.parametrize(
    ("in_data", "in_file"),
    [
        (range(90), range(89, -1, -1)),
        (range(1, 91), range(1, 91)),
        (range(1000, 1180, 2), range(1000, 1090, 2)),  # ids of a machine
    ],
)
def test_the_same_numbers_are_names_of_cells(tmp_path, cells, in_data, in_file):
    cells.obs_names = [str(i) for i in in_data]
    path = write(tmp_path / "cells.h5ad", cells)
    labels = numbered_table(tmp_path / "table.csv", in_file)
    read = load(path, labels=labels).obs["cell_type"]
    expected = dict(zip(map(str, in_file), ["B", "T"] * 45, strict=False))
    assert read.to_dict() == expected


@pytest.mark.parametrize("numbers", [range(90), range(1, 90)])
def test_tables_of_numbers_may_have_cells_that_are_left_out(tmp_path, cells, numbers):
    """The first cell has no counts; annotate.py leaves it out of its table, others do not."""
    X = cells.X.toarray()
    X[0] = 0
    cells.X, cells.obs_names = sp.csr_matrix(X), [str(i) for i in range(90)]
    path = write(tmp_path / "cells.h5ad", cells)
    labels = numbered_table(tmp_path / "table.csv", numbers)
    read = load(path, labels=labels, samples=labels)
    assert read.n_obs == 89 and read.obs["cell_type"].iloc[0] == (
        "T" if len(numbers) == 90 else "B"
    )
    assert "barcodes" not in read.uns


def test_empty_rows_and_columns_of_spreadsheets(tmp_path, pbmc, capsys):
    rows = [f"{b};{t};;" for b, t in zip(pbmc.obs_names, pbmc.obs["cell_type"], strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["Cells;Ident;;", *rows, ";;;", ";;;"]))
    labels = read_label_csv(tmp_path / "labels.csv", pbmc.obs_names)
    assert list(labels) == list(pbmc.obs["cell_type"]) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("barcode,cell_type\n{0},T, CD4\n{1},B\n", ["2 names in its header", "3 fields", "quote"]),
        ("{0},B\n{1},T, CD4\n", ["found 3 columns"]),
        ("{0},B\n{1},T\n{2},T, CD4\n", ["not a readable table"]),
        ("{0}\n{1}\n", ["found one column", "barcode and cell_type"]),
        ("{0},s1,B\n{1},s1,T\n", ["found 3 columns", "expected two, or a header with barcode"]),
    ],
)
def test_tables_whose_rows_do_not_fit_are_refused(tmp_path, pbmc, text, words):
    (tmp_path / "labels.csv").write_text(text.format(*pbmc.obs_names))
    refused(lambda: read_label_csv(tmp_path / "labels.csv", pbmc.obs_names), "labels.csv", *words)


def test_other_alphabets_are_no_header(tmp_path):
    (tmp_path / "labels.csv").write_text("細胞一,B\n細胞二,T\n")
    refused(lambda: read_label_csv(tmp_path / "labels.csv", ["a", "b"]), "none of its 2 barcodes")
    assert list(read_label_csv(tmp_path / "labels.csv", ["細胞二", "細胞一"])) == ["T", "B"]


def test_names_of_columns_that_are_no_types():
    names = ["nCount_RNA", "orig.ident", "seurat_clusters", "cell", "cell_id", "barcode", "donor"]
    names += [
        "predicted.celltype.l2.score",
        "cluster",
        "phenotype_id",
        "type",
        "cell_type_ontology_term_id",
    ]
    assert not [name for name in names if is_type_name(name)]


def test_columns_that_leave_a_choice_are_listed_and_can_be_named(tmp_path, pbmc):
    types = pbmc.obs["cell_type"]
    table = meta_data(pbmc, celltype=types, annotation=types.str.upper(), tissue="blood")
    path, data = tmp_path / "meta:1.csv", write_10x(tmp_path / "10x", pbmc)
    table.to_csv(path)
    words = ["nCount_RNA", "celltype, annotation may all be meant", f"--labels {path}:COLUMN"]
    refused(lambda: load(data, labels=str(path)), path, *words)
    read = load(data, labels=f"{path}:annotation")
    assert list(read.obs["cell_type"]) == list(types.str.upper())
    assert list(load(data, labels=f"{path}:CellType").obs["cell_type"]) == list(types)
    numbers = load(data, labels=f"{path}:seurat_clusters")  # asked for by name
    assert Reference.of(numbers).cell_types == ["0", "1", "2", "3"]
    samples = load(data, labels=f"{path}:celltype", samples=f"{path}:tissue")
    assert set(samples.obs["sample"]) == {"blood"}
    refused(lambda: load(data, labels=f"{path}:nothing"), "a column nothing", "seurat_clusters")
    table[["orig.ident", "nCount_RNA", "tissue"]].to_csv(path)
    refused(lambda: load(data, labels=str(path)), "tissue", "barcode and cell_type", ":COLUMN")
    refused(lambda: load(data, labels=f"{tmp_path}/none.csv:x"), "neither a file nor a column")


@pytest.mark.parametrize("name", ["celltype", "cell_type"])
def test_numbers_in_a_column_that_was_not_named_are_refused(tmp_path, pbmc, name):
    meta_data(pbmc, **{name: np.arange(90) % 3}).to_csv(path := tmp_path / "meta.csv")
    words = [f"column {name}", "numbers such as 0, 1, 2", f"--labels {path}:{name}"]
    refused(lambda: read_label_csv(path, pbmc.obs_names), path, *words)
    assert set(read_label_csv(path, pbmc.obs_names, chosen=name)) == {"0", "1", "2"}


def test_barcodes_are_found_in_any_column(tmp_path, pbmc):
    """Row names with the sample, and a column of barcodes without, or the other way round."""
    types = list(pbmc.obs["cell_type"])
    table = pd.DataFrame({"a": [f"s1_{b}" for b in pbmc.obs_names], "id": pbmc.obs_names})
    table.assign(celltype=types).to_csv(tmp_path / "labels.csv", index=False)
    assert list(read_label_csv(tmp_path / "labels.csv", pbmc.obs_names)) == types
    assert list(read_label_csv(tmp_path / "labels.csv", table["a"])) == types


@pytest.mark.parametrize("missing", ["", "NA", "nan", "NaN", "N/A", " unknown ", "None"])
def test_missing_labels_and_blanks_around_names(tmp_path, pbmc, capsys, missing):
    types = [f"  {t} " for t in pbmc.obs["cell_type"]]
    types[:4] = [missing] * 4
    lines = [f'{b},"{t}"' for b, t in zip(pbmc.obs_names, types, strict=True)]
    lines += [f"{pbmc.obs_names[9]},{types[9].strip()}"]  # the same label, without blanks
    (tmp_path / "labels.csv").write_text("\r\n".join(lines), encoding="utf-8-sig")
    data = write_10x(tmp_path / "10x", pbmc)
    read = load(data, labels=str(tmp_path / "labels.csv"))
    assert list(read.obs["cell_type"]) == list(pbmc.obs["cell_type"][4:])
    assert "4 of 90 cells are Unknown or unlabelled and left out" in capsys.readouterr().out


def test_label_files_that_are_no_text(tmp_path, cells):
    (tmp_path / "labels.xlsx").write_bytes(b"PK\x03\x04\0\0")
    refused(lambda: read_label_csv(tmp_path / "labels.xlsx", cells.obs_names), ".xlsx", "csv")
    (tmp_path / "labels.csv").write_text("\n\n")
    refused(lambda: read_label_csv(tmp_path / "labels.csv", cells.obs_names), "labels.csv")


def test_columns_with_other_names_are_named_where_none_is_found(tmp_path, cells):
    cells.obs = cells.obs.rename(columns={"cell_type": "celltype.l1"}).assign(n_genes=3)
    path = write(tmp_path / "a.h5ad", cells)
    refused(lambda: load(path), path, "no cell types found", "such as celltype.l1)")


# ------------------------------------------------------------------------------------ folders


def prefixed(folder, cells, prefix, layout="new"):
    """A 10x matrix as GEO has it, each file with the name of the sample in front."""
    written = write_10x(folder / "unnamed", cells, layout)
    for path in list(written.iterdir()):
        path.rename(folder / f"{prefix}{path.name}")
    written.rmdir()


@pytest.mark.parametrize(
    "below",
    ["outs/filtered_feature_bc_matrix", "filtered_gene_bc_matrices/hg19", "a/b/c", ".hidden/../a"],
)
def test_the_one_10x_folder_below_is_read(tmp_path, cells, capsys, below):
    (tmp_path / "data").mkdir()
    if "hidden" in below:
        write_10x(tmp_path / "data/.hidden", cells[:5].copy())
        below = "a"
    write_10x(tmp_path / "data" / below, cells)
    (tmp_path / "data/web_summary.html").touch()
    read = read_counts(tmp_path / "data")
    assert (read.X != cells.X).nnz == 0 and list(read.obs_names) == list(cells.obs_names)
    out = capsys.readouterr().out
    assert out == f"{tmp_path / 'data'}: the one 10x folder below it is read, {below}\n"


def test_labels_beside_the_matrix_below_are_found(tmp_path, cells):
    folder = write_10x(tmp_path / "outs/matrix", cells)
    write_labels(folder / "barcode_to_celltype.csv", cells)
    assert list(load(tmp_path).obs["cell_type"]) == list(cells.obs["cell_type"])
    cells.obs["cell_type"] = "B"
    write_labels(tmp_path / "barcode_to_celltype.csv", cells)  # as annotate.py writes it
    assert Reference.of(load(tmp_path)).cell_types == ["B"]


def test_a_10x_folder_itself_comes_before_those_below(tmp_path, cells, capsys):
    folder = write_10x(tmp_path / "10x", cells)
    write_10x(folder / "old", cells[:5].copy())
    assert read_counts(folder).n_obs == 90 and capsys.readouterr().out == ""


def test_several_10x_folders_below_are_refused_by_name(tmp_path, cells):
    for name in ("filtered_feature_bc_matrix", "raw_feature_bc_matrix"):
        write_10x(tmp_path / "outs" / name, cells)
    words = ["2 matrices", "outs/filtered_feature_bc_matrix, outs/raw_feature_bc_matrix"]
    example = tmp_path / "outs/filtered_feature_bc_matrix"
    refused(lambda: read_counts(tmp_path), tmp_path, *words, f"--data {example}")
    refused(lambda: read_counts(tmp_path / "outs"), "raw_feature_bc_matrix")
    assert read_counts(example).n_obs == 90


def test_folders_too_deep_or_without_a_matrix(tmp_path, cells):
    write_10x(tmp_path / "a/b/c/d", cells)
    refused(lambda: read_counts(tmp_path), tmp_path, "no matrix.mtx", "expected a 10x folder")
    assert read_counts(tmp_path / "a").n_obs == 90
    (tmp_path / "a/b/c/d/barcodes.tsv.gz").unlink()
    refused(lambda: read_counts(tmp_path / "a/b/c/d"), "no barcodes.tsv (plain or .gz)")


@pytest.mark.parametrize("name", ["cells.h5", "cells.h5ad"])
def test_a_folder_with_one_file_of_cells_names_it(tmp_path, cells, name):
    (tmp_path / name).touch()
    (tmp_path / "molecule_info.h5").touch()
    refused(lambda: read_counts(tmp_path), tmp_path, f"--data {tmp_path / name}")
    write_10x(tmp_path / "10x", cells)
    refused(lambda: read_counts(tmp_path), "2 matrices", name, "10x")
    shutil.move(tmp_path / name, tmp_path / "10x")
    refused(lambda: read_counts(tmp_path), "2 matrices", f"10x/{name}")


def test_folders_that_may_not_be_listed_are_passed_over(tmp_path, cells, monkeypatch):
    write_10x(tmp_path / "10x", cells)
    write_10x(tmp_path / "closed", cells)
    listdir = os.listdir

    def closed(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", closed)
    assert read_counts(tmp_path).n_obs == 90
    with pytest.raises(PermissionError):  # one line in the scripts
        read_counts(tmp_path / "closed")
    monkeypatch.setattr(tenx, "MAX_FOLDERS", 0)
    refused(lambda: read_counts(tmp_path), tmp_path, "more than 0 folders below")


def test_a_file_that_repeats_the_folder_is_no_other_matrix(tmp_path, cells):
    write_10x(tmp_path / "filtered_feature_bc_matrix", cells)
    (tmp_path / "filtered_feature_bc_matrix.h5").touch()
    assert read_counts(tmp_path).n_obs == 90
    (tmp_path / "raw_feature_bc_matrix.h5").touch()
    refused(lambda: read_counts(tmp_path), "2 matrices", "raw_feature_bc_matrix.h5")


@pytest.mark.parametrize("prefix", ["GSM123_", "GSM123_sample.", "GSM123-"])
@pytest.mark.parametrize("layout", ["old", "new"])
def test_files_named_by_geo_are_read(tmp_path, cells, prefix, layout):
    (tmp_path / "geo").mkdir()
    prefixed(tmp_path / "geo", cells, prefix, layout)
    read = read_counts(tmp_path / "geo")
    assert (read.X != cells.X).nnz == 0 and list(read.obs_names) == list(cells.obs_names)


def test_several_samples_of_geo_are_refused_and_can_be_named(tmp_path, cells):
    geo = tmp_path / "geo"
    geo.mkdir()
    prefixed(geo, cells[:50].copy(), "GSM1_ctrl_")
    prefixed(geo, cells[50:].copy(), "GSM2_ifn_")
    names = "GSM1_ctrl_matrix.mtx.gz, GSM2_ifn_matrix.mtx.gz"
    refused(lambda: read_counts(geo), geo, "2 10x matrices", names, f"--data {geo}/GSM1")
    assert list(read_counts(geo / "GSM2_ifn_matrix.mtx.gz").obs_names) == list(cells.obs_names[50:])
    refused(lambda: read_counts(tmp_path), "GSM1_ctrl_matrix.mtx.gz, GSM2_ifn_matrix.mtx.gz")


def test_files_that_share_no_prefix_are_read_if_there_is_one_of_each(tmp_path, cells):
    folder = write_10x(tmp_path / "geo", cells)
    (folder / "matrix.mtx.gz").rename(folder / "GSM1_sample_matrix.mtx.gz")
    (folder / "features.tsv.gz").rename(folder / "GSM1_features.tsv.gz")
    assert (read_counts(folder).X != cells.X).nnz == 0
    shutil.copy(folder / "GSM1_features.tsv.gz", folder / "GSM2_features.tsv.gz")
    refused(lambda: read_counts(folder), "several features.tsv", "GSM1_feat", "GSM2_features")


def test_a_matrix_file_means_its_folder(tmp_path, cells):
    folder = write_10x(tmp_path / "10x", cells)
    (folder / "._matrix.mtx.gz").write_bytes(b"left by a Mac")
    write_labels(folder / "barcode_to_celltype.csv", cells)
    read = load(folder / "matrix.mtx.gz")
    assert list(read.obs["cell_type"]) == list(cells.obs["cell_type"])
    shutil.move(folder / "matrix.mtx.gz", folder / "counts.mtx.gz")
    assert (read_counts(folder / "counts.mtx.gz").X != cells.X).nnz == 0


def test_plain_and_gzipped_files_mixed(tmp_path, cells):
    """Cell Ranger 2's genes.tsv, the matrix gzipped by hand."""
    folder = write_10x(tmp_path / "10x", cells, "old")
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        file.write((folder / "matrix.mtx").read_bytes())
    (folder / "matrix.mtx").unlink()
    read = read_counts(folder)
    assert (read.X != cells.X).nnz == 0 and list(read.var_names) == list(cells.var_names)


def test_a_transposed_10x_matrix_is_named_as_such(tmp_path, cells):
    folder = write_10x(tmp_path / "10x", cells)
    other = write_10x(tmp_path / "other", cells.T.copy())
    shutil.copy(other / "matrix.mtx.gz", folder)
    refused(lambda: read_counts(folder), "matrix.mtx.gz", "found 90 x 60", "looks transposed")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cells.loom", ["a loom file", "read_loom"]),
        ("cells.rds", ["an R object", "write10xCounts"]),
        ("cells.RData", ["an R object"]),
        ("cells.h5Seurat", ["an h5Seurat file", "write10xCounts"]),
        ("cells.csv", ["a table of text", "read_csv"]),
        ("cells.txt.gz", ["a table of text"]),
        ("cells.h5ad.gz", ["a packed file", "gunzip"]),
        ("GSE1_RAW.tar", ["an archive", "unpack"]),
        ("cells.tar.gz", ["an archive", "unpack"]),
        ("cells.parquet", []),
        ("cells", []),
    ],
)
def test_other_formats_are_named_with_their_conversion(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"0")
    expected = "expected a 10x folder, a 10x .h5 or an .h5ad file"
    refused(lambda: read_counts(tmp_path / name), tmp_path / name, expected, *words)


def test_hdf5_files_with_the_ending_of_another_kind(tmp_path, cells):
    cells.write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "a.h5ad").rename(tmp_path / "a.h5")
    refused(lambda: read_counts(tmp_path / "a.h5"), "an AnnData file", "rename it to .h5ad")
    write_10x_h5(tmp_path / "b.h5ad", cells)
    refused(lambda: read_counts(tmp_path / "b.h5ad"), "a 10x file", "rename it to .h5")
    with h5py.File(tmp_path / "c.h5ad", "w") as file:
        file["cell.names"] = [1]
        file.create_group("assays")
    refused(lambda: read_counts(tmp_path / "c.h5ad"), "an h5Seurat file")


def test_a_zarr_store_is_a_folder_of_another_kind(tmp_path):
    (tmp_path / "cells.zarr").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store/.zgroup").touch()
    for name in ("cells.zarr", "store"):
        refused(lambda name=name: read_counts(tmp_path / name), name, "a zarr store", "read_zarr")


# ---------------------------------------------------------------------------- transposed .h5ad

GENES = ["ACTB", "B2M", "MALAT1", "CD3E", "LYZ"]


def real_genes(kind, n):
    if kind == "ids":
        return [f"ENSG{i:011d}.{i % 9}" for i in range(n)]
    names = [*GENES, *(f"AL{i:06d}.1" for i in range(n - len(GENES)))]
    return [name.title() for name in names] if kind == "mouse" else names


@pytest.mark.parametrize("genes", ["ids", "symbols", "mouse", "GENE"])
@pytest.mark.parametrize("barcodes", ["10x", "sample", "CELL"])
@pytest.mark.parametrize("read", [read_counts, read_backed])
def test_a_transposed_h5ad_is_refused(tmp_path, pbmc, read, genes, barcodes):
    if genes != "GENE":
        pbmc.var_names = real_genes(genes, pbmc.n_vars)
    if barcodes != "10x":
        pbmc.obs_names = [
            f"s1_{b}_2" if barcodes == "sample" else f"CELL{i}-1"
            for i, b in enumerate(pbmc.obs_names)
        ]
    right = read(write(tmp_path / "right.h5ad", pbmc))
    assert (right.n_obs, right.n_vars) == (90, 60)
    turned = pbmc.T.copy()
    turned.X = sp.csr_matrix(turned.X)
    path = write(tmp_path / "transposed.h5ad", turned)
    if (genes, barcodes) == ("GENE", "CELL"):  # no evidence
        assert read(path).n_obs == 60
    else:
        refused(lambda: read(path), path, "looks transposed", "adata.T", "cells x genes")


def test_normalised_and_transposed_is_named_by_what_mends_it(tmp_path, pbmc):
    pbmc.X = np.log1p(pbmc.X.toarray())
    path = write(tmp_path / "a.h5ad", pbmc.T.copy())
    refused(lambda: read_counts(path), "looks transposed")


@pytest.mark.parametrize(
    ("cells", "genes"),
    [
        ([str(i) for i in range(50)], real_genes("symbols", 40)),
        ([str(i) for i in range(50)], [str(i) for i in range(40)]),
        (real_genes("symbols", 50), real_genes("ids", 40)),  # named by what was knocked out
        (real_genes("symbols", 50), real_genes("mouse", 40)),
        (real_barcodes(50), real_barcodes(40, seed=3)),
        (["CD3E", "B2M", *(f"cell {i}" for i in range(48))], [f"g{i}" for i in range(40)]),
        (["GATTACAGATTACA-1"], ["ACTB"]),
        ([f"CELL{i}-1" for i in range(50)], [*real_barcodes(25), *(f"g{i}" for i in range(30))]),
    ],
)
def test_honest_names_raise_no_alarm(cells, genes):
    check_orientation(cells, genes, "file")


# ---------------------------------------------------------------------------- where counts are


@pytest.mark.parametrize("read", [read_counts, read_backed])
@pytest.mark.parametrize("layer", COUNT_LAYERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_counts_in_a_layer_come_before_normalised_values(
    tmp_path, cells, capsys, read, layer, dtype
):
    counts = cells.X.copy()
    cells.layers[layer] = counts.astype(dtype)
    cells.X = sp.csr_matrix(np.log1p(counts.toarray()))
    got = read(write(tmp_path / "a.h5ad", cells)).X[np.arange(90)]
    assert got.dtype == np.int32 and (got != counts).nnz == 0
    assert f"raw counts taken from layers['{layer}']" in capsys.readouterr().out


@pytest.mark.parametrize("read", [read_counts, read_backed])
def test_raw_has_genes_of_its_own(tmp_path, cells, capsys, read):
    """X holds the variable genes, normalised; raw holds all, in another order."""
    raw = cells[:, ::-1].copy()
    few = cells[:, 10:30].copy()
    few.X = sp.csr_matrix(np.log1p(few.X.toarray()))
    few.raw = raw
    got = read(write(tmp_path / "a.h5ad", few))
    assert list(got.var_names) == list(raw.var_names)
    assert list(got.var["gene_ids"]) == list(raw.var["gene_ids"])
    assert (got.X[np.arange(90)] != raw.X).nnz == 0
    assert "raw counts taken from raw.X" in capsys.readouterr().out


def test_an_h5ad_without_counts_anywhere_is_refused(tmp_path, cells):
    cells.X = cells.X.astype(float) * 0.7
    cells.layers["raw_counts"] = cells.X.copy()
    cells.raw = cells
    path = write(tmp_path / "a.h5ad", cells)
    refused(lambda: read_counts(path), "layers['raw_counts']", "not an integer", "raw counts")


@pytest.mark.parametrize("read", [read_counts, read_backed])
def test_layers_that_are_not_looked_at_are_named(tmp_path, cells, read):
    cells.layers["umis"] = cells.X.copy()
    cells.X = cells.X.astype(float) * 0.7
    path = write(tmp_path / "a.h5ad", cells)
    refused(lambda: read(path), "(X)", "not an integer", "name it 'counts'", "(umis)")


# ------------------------------------------------------------------------ features of other kinds


def with_antibodies(cells, names=("Gene Expression", "Antibody Capture")):
    """The last six features are antibodies, whose counts are far above those of genes."""
    cells.var["feature_types"] = [names[0]] * 54 + [names[1]] * 6
    cells.X = sp.csr_matrix(cells.X.toarray() * np.array([1] * 54 + [1000] * 6))
    return cells


def write_multimodal(path, cells, kind):
    """As a 10x folder, a 10x .h5 or an .h5ad with the counts in X, a layer or raw."""
    if kind == "10x":
        folder = write_10x(path / "10x", cells)
        types = cells.var["feature_types"]
        rows = [f"ENSG{i:011d}\t{g}\t{t}" for i, (g, t) in enumerate(types.items())]
        with gzip.open(folder / "features.tsv.gz", "wt") as file:
            file.write("\n".join(rows) + "\n")
        return folder
    if kind == "h5":
        write_10x_h5(path / "cells.h5", cells)
        with h5py.File(path / "cells.h5", "r+") as file:
            del file["matrix/features/feature_type"]
            file["matrix/features/feature_type"] = np.array(cells.var["feature_types"], "S")
        return path / "cells.h5"
    counts = cells.X.astype(float)
    if kind != "X":
        if kind == "raw":
            cells.raw = anndata.AnnData(counts, obs=cells.obs, var=cells.var[["gene_ids"]])
        else:
            cells.layers["counts"] = counts
        cells.X = counts * 0.3
    return write(path / "cells.h5ad", cells)


@pytest.mark.parametrize(
    ("kind", "backed"),
    [
        ("10x", False),
        ("h5", False),
        *((k, b) for k in ("X", "layer", "raw") for b in (False, True)),
    ],
)
def test_only_genes_of_several_modalities_are_used(tmp_path, cells, capsys, kind, backed):
    cells = with_antibodies(cells)
    expected = cells.X[:, :54]
    path = write_multimodal(tmp_path, cells, kind)
    read = read_backed(path) if backed else read_counts(path)
    assert list(read.var_names) == list(cells.var_names[:54])
    assert (read.X[np.arange(90)] != expected).nnz == 0
    assert (library_size(read.X) == expected.sum(axis=1).A1).all()
    said = "6 features that are not gene expression left out (6 Antibody Capture)"
    assert said in capsys.readouterr().out


def test_other_words_for_genes_and_no_word_at_all(tmp_path, cells, capsys):
    cells.var["feature_types"] = ["GEX"] * 50 + [np.nan] * 6 + ["ADT"] * 3 + ["ATAC"]
    assert read_counts(write(tmp_path / "a.h5ad", cells)).n_vars == 56
    assert "4 features that are not gene expression left out (3 ADT, 1 ATAC)" in (
        capsys.readouterr().out
    )
    cells.var["feature_types"] = "Peaks"
    refused(lambda: read_counts(write(tmp_path / "a.h5ad", cells)), "no gene", "60 Peaks")


# ------------------------------------------------------------------------------ names of genes


def named_by_ids(cells, column):
    """The cells with Ensembl ids for names and symbols in a column, among other columns."""
    symbols = real_genes("symbols", cells.n_vars)
    ids = [f"ENSG{i:011d}" for i in range(cells.n_vars)]
    others = {"biotype": "protein_coding", "chromosome": "chr1", "length": 900, "id": ids}
    cells.var = pd.DataFrame({**others, column: symbols}, index=ids)
    return cells, symbols


@pytest.mark.parametrize("read", [read_counts, read_backed])
@pytest.mark.parametrize(
    "column",
    [
        *("feature_name", "gene_short_name", "hgnc_symbol", "gene_names", "Symbol", "features"),
        "a column of mine",
    ],
)
@pytest.mark.parametrize("place", ["X", "raw"])
def test_symbols_are_found_by_what_a_column_holds(tmp_path, cells, read, column, place):
    """Also where the counts are in raw, whose genes have no columns."""
    cells, symbols = named_by_ids(cells, column)
    if place == "raw":
        cells.raw = anndata.AnnData(cells.X, obs=cells.obs, var=cells.var[[]])
        cells.X = cells.X * 0.3
    got = read(write(tmp_path / "a.h5ad", cells))
    assert list(got.var_names) == list(cells.var_names)
    assert list(got.var["gene_ids"]) == symbols


def test_a_usual_name_comes_before_another_column_of_symbols(tmp_path, cells):
    cells, symbols = named_by_ids(cells, "symbol")
    cells.var.insert(0, "former", [f"{s}P1" if s not in GENES else s for s in symbols])
    assert list(read_counts(write(tmp_path / "a.h5ad", cells)).var["gene_ids"]) == symbols


def test_columns_that_name_no_genes_are_passed_over(tmp_path, cells):
    cells, _ = named_by_ids(cells, "gene_name")
    cells.var["gene_name"] = "pseudogene"
    assert set(read_counts(write(tmp_path / "a.h5ad", cells)).var["gene_ids"]) == {""}


def test_ids_in_any_column_and_genes_that_are_numbered(tmp_path, cells):
    cells, symbols = named_by_ids(cells, "features")
    ids = list(cells.var_names)
    by_symbol = cells.copy()
    by_symbol.var = pd.DataFrame({"accession": ids}, index=symbols)
    assert list(read_counts(write(tmp_path / "a.h5ad", by_symbol)).var["gene_ids"]) == ids
    cells.var_names = [str(i) for i in range(cells.n_vars)]
    assert list(read_counts(write(tmp_path / "b.h5ad", cells)).var["gene_ids"]) == symbols


def with_genomes(cells, share, n_mouse_cells=0):
    """Human genes, and 25 of mouse with a share of each cell's counts; some cells are of mouse."""
    X = cells.X.toarray()
    n = np.maximum(X.sum(axis=1) * share / (1 - share), 0)
    mouse = np.random.default_rng(0).poisson(np.repeat(n[:, None] / 25, 25, axis=1))
    mouse[:n_mouse_cells] = 20
    X[:n_mouse_cells] = X[:n_mouse_cells] > 5
    names = [f"GRCh38_{name}" for name in cells.var_names] + [f"mm10___Gene{i}" for i in range(25)]
    ids = [f"GRCh38_{name}" for name in cells.var["gene_ids"]]
    ids += [f"mm10___ENSMUSG{i:011d}" for i in range(25)]
    var = pd.DataFrame({"gene_ids": ids}, index=names)
    return anndata.AnnData(sp.csr_matrix(np.hstack([X, mouse])), obs=cells.obs, var=var)


@pytest.mark.parametrize("read", [read_counts, read_backed])
def test_genes_of_another_genome_are_left_out(tmp_path, cells, capsys, read):
    """One per cent of the counts is of mouse, as are three cells."""
    path = write(tmp_path / "a.h5ad", with_genomes(cells, 0.01, n_mouse_cells=3))
    got = read(path)
    assert list(got.var_names) == list(cells.var_names)
    assert list(got.var["gene_ids"]) == list(cells.var["gene_ids"])
    assert list(got.obs_names) == list(cells.obs_names[3:])
    assert (got.X[np.arange(87)] != cells.X[3:]).nnz == 0
    assert (library_size(got.X) == cells.X[3:].sum(axis=1).A1).all()
    out = capsys.readouterr().out
    assert "25 genes that are not of GRCh38 left out, and 3 cells" in out
    assert "the genome in front of 60 genes taken off (GRCh38_GENE0" in out


@pytest.mark.parametrize("read", [read_counts, read_backed])
def test_a_mixture_of_species_is_refused_until_one_is_chosen(tmp_path, cells, read):
    mixed = with_genomes(cells, 0.4)
    path = write(tmp_path / "a.h5ad", mixed)
    refused(lambda: read(path), path, "2 genomes (GRCh38 59.9%", "mm10", "expected one")
    write(path, mixed[:, mixed.var_names.str.startswith("GRCh38")].copy())
    assert list(read(path).var_names) == list(cells.var_names)


def test_species_are_told_by_ids_alone_and_another_one_is_read(tmp_path, cells):
    mixed = with_genomes(cells, 0.4)
    mixed.var.index = [name.split("_")[-1] for name in mixed.var["gene_ids"]]
    path = write(tmp_path / "a.h5ad", mixed)
    refused(lambda: read_counts(path), "2 genomes (human", "mouse")
    mouse = mixed[:, 60:].copy()
    assert read_counts(write(path, mouse)).n_vars == 25


def test_genes_without_a_genome_in_front_beside_others(tmp_path, cells):
    """Of another species if they are many, spike-ins if they are few."""
    mixed = with_genomes(cells, 0.4)
    mixed.var = mixed.var[[]]
    mixed.var_names = [name.removeprefix("GRCh38_") for name in mixed.var_names]
    path = write(tmp_path / "a.h5ad", mixed)
    refused(lambda: read_counts(path), "2 genomes (others 59.9%, mm10 40.1%")
    few = mixed[:, 50:].copy()
    few.var_names = [f"hg19_{n}" if i > 2 else f"ERCC-{i}" for i, n in enumerate(few.var_names)]
    few.var_names = [name.replace("hg19_mm10___", "hg19_") for name in few.var_names]
    read = read_counts(write(path, few))
    assert list(read.var_names[:4]) == ["ERCC-0", "ERCC-1", "ERCC-2", "GENE53"]


def test_a_10x_h5_of_two_genomes_is_named(tmp_path, cells):
    path = tmp_path / "a.h5"
    write_10x_h5(path, cells, "old")
    with h5py.File(path, "r+") as file:
        file.copy("GRCh38", "mm10")
    refused(lambda: read_counts(path), path, "2 genomes (GRCh38, mm10)", "genome='GRCh38'")


# -------------------------------------------------------------------- folders of other counters


def write_other(folder, cells, tool):
    """The files of kallisto-bustools or Parse: cells in rows."""
    folder.mkdir(parents=True)
    X, ids, names = sp.coo_matrix(cells.X), cells.var["gene_ids"], cells.var_names
    if tool == "Parse":
        scipy.io.mmwrite(folder / "count_matrix.mtx", X)
        genes = pd.DataFrame({"gene_id": ids, "gene_name": names, "genome": "hg38"})
        genes.to_csv(folder / "all_genes.csv", index=False)
        obs = pd.DataFrame({"bc_wells": cells.obs_names, "sample": cells.obs["cell_type"]})
        obs.to_csv(folder / "cell_metadata.csv", index=False)
        return
    scipy.io.mmwrite(folder / "cells_x_genes.mtx", X)
    parts = {"barcodes": cells.obs_names, "genes": ids}
    parts |= {"genes.names": names} if tool == "kb with names" else {}
    for part, lines in parts.items():
        (folder / f"cells_x_genes.{part}.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("tool", ["kb", "kb with names", "Parse"])
@pytest.mark.parametrize("given", ["folder", "above", "file"])
def test_folders_of_other_counters_are_read(tmp_path, cells, capsys, tool, given):
    folder = tmp_path / "run" / "counts"
    write_other(folder, cells, tool)
    mtx = next(folder.glob("*.mtx"))
    got = read_counts({"folder": folder, "above": tmp_path / "run", "file": mtx}[given])
    assert (got.X != cells.X).nnz == 0 and list(got.obs_names) == list(cells.obs_names)
    names = cells.var["gene_ids"] if tool == "kb" else cells.var_names
    assert list(got.var_names) == list(names)
    assert list(got.var["gene_ids"]) == list(cells.var["gene_ids"])
    assert "cells x genes, as kallisto-bustools and Parse" in capsys.readouterr().out
    if tool == "Parse":
        assert set(load(folder, labels="sample").obs["cell_type"]) == set(cells.obs["cell_type"])


def test_a_matrix_of_another_counter_that_is_turned_is_refused(tmp_path, cells):
    write_other(tmp_path / "kb", cells, "kb")
    scipy.io.mmwrite(tmp_path / "kb/cells_x_genes.mtx", sp.coo_matrix(cells.X.T))
    words = ["found 60 x 90", "90 barcodes (cells_x_genes.barcodes.txt) x 60 genes", "transposed"]
    refused(lambda: read_counts(tmp_path / "kb"), *words)


def test_other_counters_and_broken_links_are_named(tmp_path, cells):
    (tmp_path / "fry/alevin").mkdir(parents=True)
    for name in ("quants_mat.mtx", "quants_mat_rows.txt", "quants_mat_cols.txt"):
        (tmp_path / "fry/alevin" / name).touch()
    for folder in (tmp_path / "fry", tmp_path / "fry/alevin"):
        refused(lambda folder=folder: read_counts(folder), "alevin-fry", "pyroe.load_fry")
    folder = write_10x(tmp_path / "10x", cells)
    (folder / "matrix.mtx.gz").rename(tmp_path / "there")
    (folder / "matrix.mtx.gz").symlink_to(tmp_path / "there")
    assert read_counts(folder).n_obs == 90
    (tmp_path / "there").unlink()
    refused(lambda: read_counts(folder), folder / "matrix.mtx.gz", "link", "which is not there")
    (tmp_path / "a.h5ad").symlink_to(tmp_path / "nothing.h5ad")
    for read in (read_counts, read_backed):
        refused(
            lambda read=read: read(tmp_path / "a.h5ad"), "link to", "nothing.h5ad, which is not"
        )


# ------------------------------------------------------------------------------ fractional counts


def corrected(cells):
    """As SoupX leaves them: less a share of the profile of the soup."""
    X = cells.X.toarray().astype(float)
    soup = X.sum(axis=0) / X.sum()
    return np.maximum(X - 0.1 * X.sum(axis=1, keepdims=True) * soup, 0)


def per_10k(X):
    return X / X.sum(axis=1, keepdims=True) * 1e4


@pytest.mark.parametrize("read", [read_counts, read_backed])
@pytest.mark.parametrize(
    ("change", "is_corrected"),
    [
        (corrected, True),
        (lambda c: c.X.toarray() * np.where(np.arange(60) % 2, 1, 0.7), True),  # reads shared
        (lambda c: per_10k(c.X.toarray()), False),
        (lambda c: np.log1p(per_10k(c.X.toarray())), False),
        (lambda c: np.log1p(corrected(c)), False),
        (lambda c: per_10k(corrected(c)) * 100, False),  # as TPM
    ],
)
def test_counts_less_ambient_rna_are_told_from_normalised_ones(
    tmp_path, cells, read, change, is_corrected
):
    path = tmp_path / "a.h5ad"
    changed = cells.copy()
    changed.X = sp.csr_matrix(change(cells))
    write(path, changed)
    cause = "removal of ambient RNA" if is_corrected else "not normalised or transformed ones"
    refused(lambda: read(path), path, "not an integer", "expected raw counts", cause)
    changed.X = sp.csr_matrix(np.rint(changed.X.toarray()))
    if is_corrected:  # what is advised is read
        assert read(write(path, changed)).n_obs == 90
