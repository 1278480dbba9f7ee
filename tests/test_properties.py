"""Properties that hold for any input: random tables, names, labels and parameters, each compared
with a simple reference. HYPOTHESIS_PROFILE=long tries many more of them."""

import contextlib
import csv
import functools
import gzip
import io
import itertools
import math
import re
import tempfile
from pathlib import Path

import anndata
import mpmath
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scipy.stats
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from conftest import write_10x, write_10x_h5
from counts.pseudobulks import batch_bulks, draw_pseudobulks
from data import DatasetSettings, Reference, align_genes, load_cells, split_cells
from distributions.negative_binomial import (
    NegativeBinomialLoss,
    nb_log_prob,
    sample_nb,
    zinb_log_prob,
)
from models import BulkEncoder, scDecoder, scGMVAE
from readers.bulk import read_bulk
from readers.count_checks import check_counts
from readers.counts import read_counts
from readers.labels import clean_label, natural_order, read_label_csv
from runtime.errors import InputError
from runtime.weights import load_mixture, load_model, save_mixture, save_model

TOP = 2**31 - 1
SEEDS = st.integers(0, 2**32 - 1)
# For tests that write files and read them: tens of milliseconds for each example.
fewer = settings(max_examples=min(settings().max_examples, 500))


@contextlib.contextmanager
def folder():
    """As tmp_path, but a new one for each example."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def captured(function, *arguments):
    """The result of a call, and what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        result = function(*arguments)
    return result, out.getvalue()


def numbered(letter, n):
    return [f"{letter}{i}" for i in range(n)]


# ---------------------------------------------------------------------------- reading counts

INTEGERS = [np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
DTYPES = [*INTEGERS, np.dtype("float32"), np.dtype("float64"), np.dtype(bool)]


def whole_numbers(dtype):
    """Counts that a dtype holds exactly."""
    if dtype.kind == "b":
        return st.integers(0, 1)
    if dtype == np.float32:  # the last one is the float32 before 2^31
        return st.integers(0, 5) | st.integers(0, 2**24) | st.just(2**31 - 128)
    top = TOP if dtype == np.float64 else min(TOP, np.iinfo(dtype).max)
    return st.integers(0, 5) | st.integers(0, top) | st.just(top)


@st.composite
def stored_counts(draw, dtypes=DTYPES, repeats=True):
    """A matrix as it may lie in a file: entries (row, column, value), zeros and repeats too.

    Returns ``(shape, dtype, entries, total)``; total is the sum of the entries, as Python
    integers.
    """
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    entry = st.tuples(
        st.integers(0, shape[0] - 1), st.integers(0, shape[1] - 1), whole_numbers(dtype)
    )
    # A sum of two booleans in one place has no meaning.
    unique = None if repeats and dtype.kind != "b" else lambda e: e[:2]
    entries = draw(st.lists(entry, max_size=12, unique_by=unique))
    total = np.zeros(shape, object)
    for i, j, value in entries:
        total[i, j] += value
    return shape, dtype, entries, total


def as_matrix(form, shape, dtype, entries):
    """The entries as they are, in a form of scipy's, or dense where none is repeated."""
    rows, columns, values = (
        np.array([e[i] for e in entries], t) for i, t in ((0, int), (1, int), (2, dtype))
    )
    if form == "dense":
        X = np.zeros(shape, dtype)
        X[rows, columns] = values
        return X
    if form == "coo":
        return sp.coo_matrix((values, (rows, columns)), shape=shape)
    major, minor, n = (rows, columns, shape[0]) if form == "csr" else (columns, rows, shape[1])
    order = np.argsort(major, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(major, minlength=n))])
    matrix = sp.csr_matrix if form == "csr" else sp.csc_matrix
    return matrix((values[order], minor[order], starts), shape=shape)


def as_cells(X):
    obs, var = (pd.DataFrame(index=numbered(c, n)) for c, n in zip("cg", X.shape, strict=True))
    var["gene_ids"] = [f"ENSG{i:011d}" for i in range(len(var))]
    return anndata.AnnData(X, obs=obs, var=var)


def write_mtx(path, shape, dtype, entries):
    field = "integer" if dtype.kind in "iub" else "real"
    lines = [
        f"%%MatrixMarket matrix coordinate {field} general",
        f"{shape[1]} {shape[0]} {len(entries)}",  # genes x cells
        *(f"{j + 1} {i + 1} {value}" for i, j, value in entries),
    ]
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.write("\n".join(lines) + "\n")


FILES = ["old", "new", "old h5", "new h5", "h5ad dense", "h5ad csr", "h5ad csc"]


def write_counts(where, file, shape, dtype, entries):
    """Write the entries as one of FILES; returns what ``--data`` is given."""
    if file in ("old", "new"):
        write_10x(where / "10x", as_cells(sp.csr_matrix(shape, dtype=np.int32)), file)
        suffix = ".gz" if file == "new" else ""
        write_mtx(where / "10x" / f"matrix.mtx{suffix}", shape, dtype, entries)
        return where / "10x"
    if file in ("old h5", "new h5"):
        adata = as_cells(as_matrix("csr", shape, dtype, entries))
        write_10x_h5(where / "cells.h5", adata, file.removesuffix(" h5"))
        return where / "cells.h5"
    adata = as_cells(as_matrix(file.removeprefix("h5ad "), shape, dtype, entries))
    adata.write_h5ad(where / "cells.h5ad")
    return where / "cells.h5ad"


def check_or_refuse(read, total):
    """Either the very sums, or, where one is over 2^31 - 1, an error that names such a place."""
    too_large = [f"(cell c{i}, gene g{j})" for i, j in np.argwhere(total > TOP)]
    if too_large:
        with pytest.raises(InputError) as error:
            read()
        assert any(place in str(error.value) for place in too_large)
        return
    X = read()
    assert X.format == "csr" and X.dtype == np.int32 and X.has_canonical_format
    assert (X.data != 0).all()
    assert X.toarray().tolist() == total.tolist()


def one_place(dtype, *values):
    """As stored_counts, of a single place with these values."""
    entries = [(0, 0, value) for value in values]
    return (1, 1), np.dtype(dtype), entries, np.array([[sum(values)]], object)


@given(stored_counts(), st.sampled_from(["coo", "csr", "csc"]))
@example(one_place("uint8", 200, 200), "coo")
@example(one_place("uint8", 200, 200), "csr")
@example(one_place("int32", TOP, TOP, TOP), "csr")
@example(one_place("float32", 2**31), "csr")
@example(one_place("float32", 2**24, 1), "coo")
def test_checked_counts_are_the_sums_of_all_entries(stored, form):
    *stored, total = stored
    names = numbered("c", total.shape[0]), numbered("g", total.shape[1])
    check_or_refuse(lambda: check_counts(as_matrix(form, *stored), "file", *names), total)


@fewer
@given(stored_counts(), st.sampled_from(FILES))
@example(one_place("int32", 2**24 + 1), "old h5")
@example(one_place("int32", 2**24 + 1), "new h5")
def test_counts_are_read_as_they_were_written(stored, file):
    *stored, total = stored
    assume("dense" not in file or len({e[:2] for e in stored[2]}) == len(stored[2]))
    with folder() as where:
        path = write_counts(where, file, *stored)

        def read():
            adata = read_counts(path)
            assert list(adata.obs_names) == numbered("c", total.shape[0])
            assert list(adata.var_names) == numbered("g", total.shape[1])
            return adata.X

        check_or_refuse(read, total)


@fewer
@given(stored_counts(repeats=False), st.sampled_from(["X", "layers", "raw"]))
def test_counts_of_an_h5ad_are_found_wherever_they_are(stored, place):
    *stored, total = stored
    with folder() as where:
        adata = as_cells(as_matrix("csr", *stored))
        if place == "layers":
            adata.layers["counts"] = adata.X.copy()
        elif place == "raw":
            adata.raw = adata.copy()
        if place != "X":
            adata.X = total.astype(np.float64) + 0.5
        adata.write_h5ad(where / "cells.h5ad")
        X = read_counts(where / "cells.h5ad").X
    assert X.toarray().tolist() == total.tolist()


def bad_values(dtype):
    if dtype.kind == "f":
        odd = st.floats(0.0625, 1e6, width=32).filter(lambda v: v != int(v))
        bad = st.sampled_from([-1, -0.5, np.nan, np.inf, -np.inf, 2**31, 3e9, 1e30])
        return (odd | bad).map(lambda v: float(dtype.type(v)))
    bottom, top = np.iinfo(dtype).min, np.iinfo(dtype).max
    bad = [st.integers(bottom, -1)] if bottom else []
    bad += [st.integers(TOP + 1, top), st.just(TOP + 1)] if top > TOP else []
    return st.one_of(bad)


@fewer
@given(st.data(), st.sampled_from(FILES))
def test_any_bad_value_is_refused_with_its_cell_and_gene(data, file):
    dtypes = [d for d in DTYPES if d not in (np.uint8, np.uint16, bool)]  # those hold no bad value
    shape, dtype, entries, _ = data.draw(stored_counts(dtypes, repeats=False))
    assume(entries)
    position = data.draw(st.integers(0, len(entries) - 1))
    i, j, _ = entries[position]
    entries[position] = i, j, data.draw(bad_values(dtype))
    with folder() as where:
        path = write_counts(where, file, shape, dtype, entries)
        with pytest.raises(InputError, match=rf"\(cell c{i}, gene g{j}\)") as error:
            read_counts(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# -------------------------------------------------------------------------------------- names

# NUL ends a string in HDF5, and half of a surrogate pair is no text.
ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
ODD = ["=1+1", " a", "a ", "a\tb", "a\nb", "a\r\nb", 'a"b', '"', "'", "a,b", "a;b", "NA", "nan", ""]
ODD += ["None", "1", "01", "1e5", "ENSG00000000001", "A", "A-1", "A-1-1", "\ufeff", "#", "barcode"]
TEXT = ANY_TEXT | st.sampled_from(ODD)
NO_NAMES = ["", "unknown", "unassigned", "nan", "na", "n/a", "none", "null"]
LABELS = TEXT | st.sampled_from(["Unknown", " UNASSIGNED ", "B", "T 2", "T 10"])


def expected_labels(barcodes, labels):
    """Those that name a type, without outer blanks."""
    pairs = ((b, t.strip()) for b, t in zip(barcodes, labels, strict=True))
    return {b: t for b, t in pairs if t.lower() not in NO_NAMES}


def check_labels(settings, expected):
    """load_cells gives these labels (by barcode), and codes that stand for the same names."""
    if not expected:
        with pytest.raises(InputError, match="found no cell with a cell type"):
            captured(load_cells, settings)
        return
    adata, _ = captured(load_cells, settings)
    assert list(adata.obs_names) == list(expected)
    assert list(adata.obs["cell_type"]) == list(expected.values())
    codes, names = Reference.of(adata).codes, Reference.of(adata).cell_types
    assert codes.dtype == np.int64 and len(set(names)) == len(names)
    assert [names[k] for k in codes] == list(expected.values())
    assert set(names) == set(expected.values()) and names == natural_order(names)


@fewer
@given(st.data())
def test_any_text_survives_an_h5ad(data):
    barcodes = data.draw(st.lists(TEXT, min_size=1, max_size=6, unique=True))
    genes = data.draw(st.lists(TEXT, min_size=1, max_size=6, unique=True))
    labels = data.draw(st.lists(LABELS, min_size=len(barcodes), max_size=len(barcodes)))
    adata = as_cells(sp.csr_matrix(np.ones((len(barcodes), len(genes)), np.int32)))
    adata.obs_names, adata.var_names = barcodes, genes
    adata.obs["cell_type"] = labels
    with folder() as where:
        adata.write_h5ad(where / "cells.h5ad")
        read = read_counts(where / "cells.h5ad")
        assert list(read.obs_names) == barcodes and list(read.var_names) == genes
        expected = expected_labels(barcodes, labels)
        check_labels(DatasetSettings(str(where / "cells.h5ad"), "cell_type"), expected)


# A field of a 10x table may hold anything but what parts fields and lines, or quotes them.
FIELDS = st.text(st.characters(codec="utf-8", exclude_characters='\0\t\n\r"'), min_size=1).filter(
    lambda text: text.strip()  # a line of blanks alone is none
)


@fewer
@given(
    st.lists(FIELDS, min_size=1, max_size=5, unique=True),
    st.lists(FIELDS, min_size=1, max_size=5, unique=True),
    st.sampled_from(["old", "new"]),
)
def test_names_of_a_10x_folder_are_read_as_they_are(barcodes, genes, layout):
    adata = as_cells(sp.csr_matrix(np.ones((len(barcodes), len(genes)), np.int32)))
    adata.obs_names, adata.var_names = barcodes, genes
    with folder() as where:
        read = read_counts(write_10x(where / "10x", adata, layout))
    assert list(read.obs_names) == barcodes and list(read.var_names) == genes


@fewer
@given(st.data())
def test_any_text_survives_a_quoted_label_csv(data):
    barcodes = data.draw(st.lists(TEXT, min_size=1, max_size=6, unique=True))
    labels = data.draw(st.lists(LABELS, min_size=len(barcodes), max_size=len(barcodes)))
    adata = as_cells(sp.csr_matrix(np.ones((len(barcodes), 1), np.int32)))
    adata.obs_names = barcodes
    with folder() as where:
        adata.write_h5ad(where / "cells.h5ad")
        with open(where / "labels.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
            table.writerow(["barcode", "cell_type"])
            table.writerows(zip(barcodes, labels, strict=True))
        given_files = str(where / "cells.h5ad"), str(where / "labels.csv")
        check_labels(DatasetSettings(*given_files), expected_labels(barcodes, labels))


@fewer
@given(
    st.lists(st.sampled_from(["A", "A-1", "A-1-1", "A-2", "B", ""]) | TEXT, min_size=1),
    st.sampled_from(["h5ad", "h5", "10x"]),
)
@pytest.mark.filterwarnings("ignore:.*names are not unique", "ignore:Suffix used")
def test_repeated_names_get_suffixes_and_no_gene_is_lost(genes, file):
    plain = [re.sub(r"[^A-Za-z0-9-]", "x", g) or "x" for g in genes]  # for the two 10x formats
    genes = genes if file == "h5ad" else plain
    counts = np.arange(1, len(genes) + 1)  # gene i is known by its count
    adata = as_cells(sp.csr_matrix(counts[None].astype(np.int32)))
    adata.var_names = genes
    with folder() as where:
        path = where / ("cells" if file == "10x" else f"cells.{file}")
        if file == "h5ad":
            adata.write_h5ad(path)
        else:
            (write_10x_h5 if file == "h5" else write_10x)(path, adata)
        read, out = captured(read_counts, path)
    names = list(read.var_names)
    assert read.X.toarray().ravel().tolist() == counts.tolist()
    assert len(set(names)) == len(names) == len(genes)
    seen = set()
    for name, gene in zip(names, genes, strict=True):
        first = gene not in seen
        assert name == gene if first else re.fullmatch(re.escape(gene) + r"-\d+", name)
        seen.add(gene)
    n_repeated = len(genes) - len(set(genes))
    assert (f": {n_repeated} repeated gene symbols" in out) == (n_repeated > 0)


@fewer
@given(st.lists(st.sampled_from(["A-1", "B-1", "C-1"]), min_size=1, max_size=8))
def test_repeated_barcodes_are_refused_and_counted(barcodes):
    adata = as_cells(sp.csr_matrix(np.ones((len(barcodes), 1), np.int32)))
    adata.obs_names = barcodes
    repeated = {b for b in barcodes if barcodes.count(b) > 1}
    assume(repeated)
    with folder() as where:
        path = write_10x(where / "10x", adata)
        with pytest.raises(InputError, match=f": {len(repeated)} barcodes occur more than once"):
            read_counts(path)


# ------------------------------------------------------------------------------ aligning genes

GENES = st.lists(st.text("AB1-", max_size=3), min_size=1, max_size=8, unique=True)


@given(GENES, GENES, st.sampled_from(DTYPES), st.booleans(), SEEDS)
def test_align_genes_is_a_look_up_by_name(genes, wanted, dtype, dense, seed):
    rng = np.random.default_rng(seed)
    top = 2 if dtype.kind == "b" else 100
    X = rng.integers(0, top, (3, len(genes))).astype(dtype)
    if not set(genes) & set(wanted):
        with pytest.raises(InputError, match="known to the model"):
            align_genes(X, genes, wanted, "cells")
        return
    column = {g: X[:, j].tolist() for j, g in enumerate(genes)}
    expected = [column.get(g, [0] * len(X)) for g in wanted]
    form = np.asarray if dense else sp.csr_matrix
    (aligned, present), out = captured(align_genes, form(X), genes, wanted, "cells")
    assert aligned.toarray().T.tolist() == expected and aligned.dtype == dtype
    assert present.tolist() == [g in column for g in wanted]
    assert ("the model's" in out) == (not present.all())
    sums = [sum(column[g]) for g in wanted if g in column]
    assert np.asarray(aligned.sum(axis=0)).ravel()[present].tolist() == sums
    order = rng.permutation(len(genes))
    shuffled, _ = align_genes(form(X[:, order]), [genes[i] for i in order], wanted, "c", False)
    assert (shuffled.toarray() == aligned.toarray()).all()


# -------------------------------------------------------------------------------------- labels

NUMBERED = st.text("019aB -\u00b2\u0663", max_size=6)  # a superscript is no digit, an Arabic 3 is


def compare_naturally(a, b):
    """Run by run of digits or other characters: numbers by value, and before anything else."""
    runs = [
        [(d, "".join(run)) for d, run in itertools.groupby(name, str.isdecimal)] for name in (a, b)
    ]
    for (a_digits, x), (b_digits, y) in zip(*runs, strict=False):
        if a_digits != b_digits:
            return -1 if a_digits else 1
        x, y = (int(x), int(y)) if a_digits else (x, y)
        if x != y:
            return -1 if x < y else 1
    if len(runs[0]) != len(runs[1]):
        return len(runs[0]) - len(runs[1])
    return (a > b) - (a < b)  # 01 and 1


@example((["1", "01", "a1", "a01"], ["a01", "01", "a1", "1"]))
@given(
    st.lists(NUMBERED | ANY_TEXT, max_size=8).flatmap(
        lambda v: st.tuples(st.just(v), st.permutations(v))
    )
)
def test_natural_order_is_one_order_whatever_comes_first(both):
    names, shuffled = both
    ordered = natural_order(names)
    assert ordered == sorted(set(names), key=functools.cmp_to_key(compare_naturally))
    assert ordered == natural_order(shuffled) == natural_order(ordered[::-1])
    for a, b in itertools.combinations(ordered, 2):
        assert natural_order([b, a]) == [a, b]  # whatever else is there


@given(LABELS | st.integers() | st.floats() | st.sampled_from([None, pd.NA, np.nan, True]))
def test_clean_label_is_text_without_outer_blanks_or_none(label):
    cleaned = clean_label(label)
    missing = label is None or label is pd.NA or str(label).strip().lower() in NO_NAMES
    assert cleaned == (None if missing else str(label).strip())
    assert clean_label(cleaned) == cleaned


@given(st.data(), st.booleans())
def test_label_csv_in_any_order_with_more_or_fewer_rows(data, header):
    """Repeated rows are no contradiction; the numbers that are printed are the true ones."""
    barcodes = numbered("c", data.draw(st.integers(1, 8)))
    names = st.sampled_from(["B", "T, CD4+", "NK  cells", "Unknown"])
    rows = data.draw(st.dictionaries(st.sampled_from([*barcodes, "x1", "x2"]), names, min_size=1))
    lines = [*rows.items(), *data.draw(st.lists(st.sampled_from([*rows.items()]), max_size=3))]
    lines = data.draw(st.permutations(lines))
    if header:  # then further columns may stand between
        lines = [("barcode", "n", "cell_type"), *((b, 7, t) for b, t in lines)]
    with folder() as where:
        pd.DataFrame(lines).to_csv(where / "labels.csv", header=False, index=False)
        if not set(rows) & set(barcodes):
            with pytest.raises(InputError, match=f"none of its {len(rows)} barcodes"):
                read_label_csv(where / "labels.csv", barcodes)
            return
        labels, out = captured(read_label_csv, where / "labels.csv", barcodes)
    assert list(labels.index) == barcodes
    labels = [None if pd.isna(t) else t for t in labels]
    assert labels == [rows.get(b) for b in barcodes]
    without, foreign = len(set(barcodes) - set(rows)), len(set(rows) - set(barcodes))
    assert re.findall(r"no label for (\d+) of (\d+)", out) == [
        (str(without), str(len(barcodes)))
    ] * (without > 0)
    assert re.findall(r"(\d+) labels are for", out) == [str(foreign)] * (foreign > 0)


@given(st.lists(st.tuples(st.sampled_from(["c0", "c1", "c2"]), st.sampled_from("BTN"))))
def test_barcodes_with_several_labels_are_counted(rows):
    several = {b for b, t in rows for c, u in rows if b == c and t != u}
    assume(several)
    with folder() as where:
        pd.DataFrame(rows).to_csv(where / "labels.csv", header=False, index=False)
        with pytest.raises(InputError, match=f": {len(several)} barcodes have two different"):
            read_label_csv(where / "labels.csv", ["c0", "c1", "c2"])


@fewer
@given(st.data())
def test_load_cells_keeps_labelled_cells_with_counts(data):
    """Codes and names agree, and what is left out is counted."""
    n = data.draw(st.integers(1, 8))
    labels = data.draw(st.lists(LABELS | st.none(), min_size=n, max_size=n))
    totals = data.draw(st.lists(st.sampled_from([0, 1, 7]), min_size=n, max_size=n))
    adata = as_cells(sp.csr_matrix(np.array(totals, np.int32)[:, None]))
    adata.obs["label"] = pd.Categorical(labels) if data.draw(st.booleans()) else labels
    adata.obs["label"] = adata.obs["label"].astype(object).astype("category")
    full = {f"c{i}": labels[i] or "" for i in range(n) if totals[i]}
    with folder() as where:
        adata.write_h5ad(where / "cells.h5ad")
        given_labels = DatasetSettings(data=str(where / "cells.h5ad"), labels="label")
        if not full:
            with pytest.raises(InputError, match="every count is zero"):
                captured(load_cells, given_labels)
            return
        expected = expected_labels(full, full.values())
        check_labels(given_labels, expected)
        if expected:
            _, out = captured(load_cells, given_labels)
            n_empty, n_unknown = n - len(full), len(full) - len(expected)
            assert (f" {n_empty} cells without a single count" in out) == (n_empty > 0)
            assert (f" {n_unknown} of {len(full)} cells are Unknown" in out) == (n_unknown > 0)


# ------------------------------------------------------------------------ split and pseudobulks


@given(st.data(), SEEDS)
def test_pseudobulks_are_sums_of_the_cells_that_were_drawn(data, seed):
    """Behind the genes stands a column for each cell, so that a bulk shows which cells it has."""
    rng = np.random.default_rng(seed)
    size = np.array(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5)))
    assume(size.sum())
    n, K, N = data.draw(st.integers(1, 4)), len(size), size.sum()
    codes = rng.permutation(np.repeat(np.arange(K), size))
    weight = rng.gamma(0.5, 1, (n, K)) * (size > 0) + 1e-9 * (size > 0)
    proportions = weight / weight.sum(axis=1, keepdims=True)
    n_cells = np.array(data.draw(st.lists(st.integers(0, 500), min_size=n, max_size=n)))
    pool = data.draw(st.none() | st.lists(st.integers(1, 5), min_size=n, max_size=n))
    X = sp.csr_matrix(np.hstack([rng.integers(0, 50, (N, 3)), np.eye(N, dtype=int)]))
    bulk, drawn = draw_pseudobulks(X, codes, proportions, n_cells, rng, pool)
    assert bulk.shape == (n, 3 + N) and bulk.dtype == np.float32 and drawn.dtype == np.float32
    times = bulk[:, 3:]  # (n, N): how often each cell was drawn
    assert (times.sum(axis=1) == n_cells).all()
    assert (bulk[:, :3] == times @ X[:, :3].toarray()).all()
    of_type = np.stack([times[:, codes == k].sum(axis=1) for k in range(K)], axis=1)
    np.testing.assert_allclose(drawn, of_type / np.maximum(n_cells, 1)[:, None], rtol=1e-6)
    np.testing.assert_allclose(drawn.sum(axis=1), n_cells > 0, rtol=1e-6)
    assert (drawn[:, size == 0] == 0).all()
    if pool is not None:
        distinct = [[(row[codes == k] > 0).sum() for k in range(K)] for row in times]
        assert (np.max(distinct, axis=1) <= pool).all()


@given(st.integers(1, 6), st.integers(1, 1000), SEEDS)
def test_one_cell_of_each_type_makes_a_bulk_predictable(K, n_cells, seed):
    rng = np.random.default_rng(seed)
    cells, codes = rng.integers(0, 100, (K, 7)), rng.permutation(K)
    proportions = rng.dirichlet(np.full(K, 0.5), 3)
    X = sp.csr_matrix(cells[codes])
    bulk, drawn = draw_pseudobulks(X, codes, proportions, np.full(3, n_cells), rng)
    times = np.rint(drawn.astype(float) * n_cells).astype(int)
    assert (times.sum(axis=1) == n_cells).all() and (bulk == times @ cells).all()
    whole, drawn = draw_pseudobulks(X, codes, np.eye(K), np.full(K, n_cells), rng)
    assert (whole == n_cells * cells).all() and (drawn == np.eye(K)).all()


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 300), st.integers(1, 300), SEEDS)
def test_batch_bulks_sum_their_members_and_use_a_cell_once_a_pass(N, batch_size, n, part, seed):
    batch_size = min(batch_size, N)
    rng = np.random.default_rng(seed)
    X = rng.integers(0, 1000, (N, 3)).astype(np.int32)
    parts = batch_bulks(sp.csr_matrix(X), batch_size, n, rng, part)
    bulk, members = map(np.concatenate, zip(*parts, strict=True))
    assert bulk.shape == (n, 3) and bulk.dtype == np.float32 and members.shape == (n, batch_size)
    assert (bulk == X[members].sum(axis=1)).all()
    per_pass = N // batch_size
    for first in range(0, n, per_pass):
        once = members[first : first + per_pass].ravel()
        assert len(set(once)) == len(once) and set(once) <= set(range(N))


@given(
    st.dictionaries(st.integers(0, 20), st.integers(1, 60), min_size=1, max_size=5),
    st.floats(0, 1, exclude_max=True),
    SEEDS,
)
def test_split_takes_its_fraction_of_each_type_and_leaves_one_cell(size, held_out, seed):
    codes = np.repeat([*size], [*size.values()])
    codes = np.random.default_rng(seed).permutation(codes)
    mask = split_cells(codes, held_out, seed)
    assert mask.dtype == bool and (mask == split_cells(codes, held_out, seed)).all()
    for k, n in size.items():
        held = mask[codes == k].sum()
        assert held < n
        assert abs(held - held_out * n) <= 0.5 + 1e-9 or held == n - 1 < held_out * n


# -------------------------------------------------------------------------------- distributions


def powers(low, high):
    return st.floats(low, high).map(lambda e: 10.0**e)


COUNTS = st.integers(0, 10) | st.integers(0, 10**6)
MEANS = st.just(0.0) | powers(-10, 6)
THETAS = powers(-6, 8) | st.sampled_from([30.0, 29.999999, 30.000001])


def points(counts=COUNTS, means=MEANS, thetas=THETAS):
    return st.lists(st.tuples(counts, means, thetas), min_size=1, max_size=20)


def tensors(rows, dtype):
    return [torch.tensor(column, dtype=dtype) for column in zip(*rows, strict=True)]


def fifty_digits(x, mean, theta):
    """The log-probability of one count, exact; scipy's loses digits where theta is large."""
    with mpmath.workdps(50):
        x, m, t = (mpmath.mpf(float(v)) for v in (x, mean, theta))
        if not m:
            return -np.inf if x else 0.0
        choose = mpmath.loggamma(x + t) - mpmath.loggamma(t) - mpmath.loggamma(x + 1)
        return float(choose - t * mpmath.log1p(m / t) + x * mpmath.log(m / (t + m)))


@given(points(means=st.just(0.0) | powers(-3, 6), thetas=powers(-6, 4)))
def test_nb_agrees_with_scipy(rows):
    x, mean, theta = tensors(rows, torch.float64)
    ours = nb_log_prob(x, mean, theta).numpy()
    m, t = mean.numpy(), theta.numpy()
    expected = scipy.stats.nbinom.logpmf(x.numpy(), t, t / (t + m))
    np.testing.assert_allclose(ours, expected, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@given(rows=points())
def test_nb_is_exact_up_to_rounding(dtype, tolerance, rows):
    """Errors are those of the terms, of order x ln x, which nearly cancel."""
    x, mean, theta = tensors(rows, dtype)
    ours = nb_log_prob(x, mean, theta).double().numpy()
    x = x.double().numpy()
    exact = np.array([fifty_digits(*row) for row in zip(x, mean, theta, strict=True)])
    none = np.isinf(exact)
    assert (ours[none] == exact[none]).all() and (ours[~none] < 0.1).all()
    scale = np.abs(exact[~none]) + (x * np.log1p(x))[~none] + 1
    assert (np.abs(ours[~none] - exact[~none]) / scale < tolerance).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@given(B=st.integers(1, 4), G=st.integers(1, 6), data=st.data())
def test_nb_loss_of_cells_is_the_sum_of_all_genes(dtype, tolerance, B, G, data):
    """And its gradients are finite, whatever the logits."""
    theta = torch.tensor(data.draw(st.lists(THETAS, min_size=G, max_size=G)), dtype=dtype)
    entry = st.tuples(st.just(0) | COUNTS, st.floats(-40, 40))
    rows = data.draw(st.lists(entry, min_size=B * G, max_size=B * G))
    x, logits = (torch.tensor(v, dtype=dtype).view(B, G) for v in zip(*rows, strict=True))
    library = torch.tensor(data.draw(st.lists(st.floats(1, 1e5), min_size=B, max_size=B))).to(x)
    mean = (library[:, None] * logits.softmax(dim=1)).clamp(min=1e-10)
    log_theta = theta.log()
    expected = nb_log_prob(x, mean, log_theta.exp())
    size = (expected.abs() + x * torch.log1p(x) + 1).sum(dim=1)
    leaves = [v.requires_grad_() for v in (logits, log_theta)]
    loss = NegativeBinomialLoss.apply(*leaves, library, x.to_sparse())
    assert ((loss + expected.sum(dim=1)).abs() <= tolerance * size).all()
    loss.sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(rows=points())
def test_nb_gradients_are_finite(dtype, rows):
    """A mean of zero has one only where the count is zero, too."""
    x, mean, theta = tensors(rows, dtype)
    mean = torch.where(x > 0, mean.clamp(min=1e-10), mean)
    logits = torch.linspace(-40, 40, len(x), dtype=dtype)
    for function in (nb_log_prob, lambda *v: zinb_log_prob(*v, logits)):
        m, t = mean.clone().requires_grad_(), theta.clone().requires_grad_()
        function(x, m, t).sum().backward()
        assert torch.isfinite(m.grad).all() and torch.isfinite(t.grad).all()


@given(points(), st.floats(-50, 50))
def test_zinb_is_a_mixture_of_zeros_and_nb(rows, logit):
    x, mean, theta = tensors(rows, torch.float64)
    ours = zinb_log_prob(x, mean, theta, torch.tensor(logit, dtype=torch.float64)).numpy()
    exact = np.array([fifty_digits(*row) for row in zip(x, mean, theta, strict=True)])
    log_pi, log_not_pi = scipy.special.log_expit([logit, -logit])
    expected = np.where(x == 0, np.logaddexp(log_pi, log_not_pi + exact), log_not_pi + exact)
    x = x.numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9 * (1 + x * np.log1p(x)).max())


# Counts that are written out to 5000 leave next to nothing of these.
@given(st.just(0.0) | powers(-3, 1.7), powers(-1, 4), st.floats(-30, 30))
def test_zinb_sums_to_one(mean, theta, logit):
    x = torch.arange(5000, dtype=torch.float64)
    parameters = torch.tensor([mean, theta, logit], dtype=torch.float64)
    tail = scipy.stats.nbinom.sf(4999, theta, theta / (theta + mean)) * scipy.special.expit(-logit)
    assert zinb_log_prob(x, *parameters).exp().sum() + tail == pytest.approx(1, abs=1e-9)


@fewer
@given(st.just(0.0) | powers(-4, 5), powers(-1, 8), SEEDS)
def test_sampled_counts_are_negative_binomial(mean, theta, seed):
    n = 4000
    generator = torch.Generator().manual_seed(seed)
    draws = sample_nb(torch.full((n, 1), mean), torch.tensor([theta]), generator)
    assert draws.shape == (n, 1) and draws.dtype == torch.float32
    draws = draws.double().numpy().ravel()
    assert (draws >= 0).all() and (draws == np.rint(draws)).all()
    if mean == 0:
        assert (draws == 0).all()
        return
    variance = mean + mean**2 / theta
    assert abs(draws.mean() - mean) <= 8 * math.sqrt(variance / n)
    # Fourth central moment of a negative binomial: 3 + 6 / theta + 1 / variance, times variance².
    spread = math.sqrt((2 + 6 / theta + 1 / variance) / n)
    assert abs(draws.var() / variance - 1) <= 8 * spread
    # No distribution strays further from its own sample than this once in 10^12 times (Massart).
    values, times = np.unique(draws, return_counts=True)
    exact = scipy.stats.nbinom.cdf(values, theta, theta / (theta + mean))
    far = math.sqrt(math.log(2e12) / (2 * n))
    assert np.abs(np.cumsum(times) / n - exact).max() < far


def test_sampled_counts_keep_the_tail_of_a_small_theta():
    """Where theta is tiny, a handful of very large counts makes the whole mean."""
    n, mean, theta, large = 4_000_000, 8.0, 1e-6, 20_000
    means = torch.full((n // 100, 100), mean)
    draws = sample_nb(means, torch.tensor(theta), torch.Generator().manual_seed(0))
    n_large = int((draws > large).sum())
    p = scipy.stats.nbinom.sf(large, theta, theta / (theta + mean))
    assert scipy.stats.binomtest(n_large, n, p).pvalue > 1e-6


# ---------------------------------------------------------------------------------- bulk files

# Without separators, which have a separate test below.
SAMPLES = st.text(st.characters(codec="utf-8", exclude_characters="\0\t\n\r,;"), max_size=5).map(
    lambda text: f"s {text}"
)


@st.composite
def bulks(draw):
    """A model's genes and ids, a table (samples x its genes), and the matrix to be read.

    Returns ``(genes, gene_ids, table, expected, present)``. Genes of the table are the model's, by
    symbol, id or id and version, once or more than once, and others that the model does not know.
    """
    genes = draw(
        st.lists(st.text("AB09-._", min_size=1, max_size=4), min_size=1, max_size=7, unique=True)
    )
    numbers = draw(st.permutations(range(len(genes))))
    gene_ids = ["" if draw(st.integers(0, 4)) == 0 else f"ENSG{i:011d}" for i in numbers]
    by = draw(st.sampled_from(["symbol", "id", "version", "any"]))
    known = [(i, "symbol") for i in range(len(genes)) if by in ("symbol", "any")]
    known += [
        (i, way)
        for i in range(len(genes))
        for way in ("id", "version")
        if gene_ids[i] and by in (way, "any")
    ]
    assume(known)
    columns = draw(st.lists(st.sampled_from(known), min_size=1, max_size=10))
    columns += [(None, "other")] * draw(st.integers(0, 2))
    columns = draw(st.permutations(columns))
    spelled = []
    for j, (i, way) in enumerate(columns):
        version = f".{draw(st.integers(1, 20))}" if way == "version" else ""
        names = {"symbol": lambda i: genes[i], "other": lambda i: None}
        name = names.get(way, lambda i: gene_ids[i])(i)
        spelled.append(f"unknown {j}" if name is None else name + version)
    samples = draw(st.lists(SAMPLES, min_size=1, max_size=4, unique=True))
    rng = np.random.default_rng(draw(SEEDS))
    values = rng.gamma(0.5, 10 ** rng.uniform(-2, 6), (len(samples), len(columns)))
    values *= rng.random(values.shape) < 0.7
    values = np.rint(values) if draw(st.booleans()) else values
    values[:, 0] += 1  # no sample is empty
    expected, present = np.zeros((len(samples), len(genes))), [False] * len(genes)
    for j, (i, _) in enumerate(columns):
        if i is not None:
            expected[:, i] += values[:, j]
            present[i] = True
    return genes, gene_ids, pd.DataFrame(values, samples, spelled), expected, present


def write_bulk(path, table, form):
    """Write a table (samples x genes) in one of the forms that are read."""
    if form.endswith("h5ad"):
        anndata.AnnData(table.T if form == "turned h5ad" else table).write_h5ad(path)
    elif form == "gct":
        turned = table.T.rename_axis("Name")
        turned.insert(0, "Description", "a gene")
        head = f"#1.2\n{table.shape[1]}\t{table.shape[0]}\n"
        path.write_text(head + turned.to_csv(sep="\t"), encoding="utf-8")
    else:
        table = table if form.startswith("turned") else table.T
        table.to_csv(path, sep="\t" if form.endswith("tsv") else ",")
        if form == "R tsv":  # write.table gives the column of names no header
            text = path.read_text(encoding="utf-8")
            path.write_text(text.removeprefix("\t"), encoding="utf-8")


BULK_FORMS = ["csv", "tsv", "csv.gz", "turned csv", "turned tsv", "turned csv.gz"]
BULK_FORMS += ["gct", "h5ad", "turned h5ad", "R tsv"]


@fewer
@given(bulks(), st.sampled_from(BULK_FORMS))
@pytest.mark.filterwarnings("ignore:.*names are not unique")
def test_a_bulk_reads_the_same_from_every_form(bulk, form):
    genes, gene_ids, table, expected, present = bulk
    with folder() as where:
        path = where / f"bulk.{form.rsplit(' ')[-1]}"
        write_bulk(path, table, form)
        read, out = captured(read_bulk, path, genes, gene_ids)
    assert read.samples == list(table.index) and read.measured.tolist() == present
    np.testing.assert_allclose(read.dense(), expected, rtol=1e-12)
    known = table.columns[[not name.startswith("unknown") for name in table.columns]]
    n = len(known) - sum(present)
    assert (f" {n} repeated genes summed" in out) == (n > 0)
    assert f"{sum(present)} of the model's {len(genes)} genes found" in out


@fewer
@given(
    st.lists(
        st.text("ab,;\t ", min_size=1).map(lambda t: f"s{t}s"), min_size=1, max_size=3, unique=True
    ),
    st.sampled_from(["csv", "tsv", "turned csv", "turned tsv", "gct"]),
)
def test_names_of_samples_may_hold_separators(samples, form):
    genes = numbered("GENE", 5)
    table = pd.DataFrame(np.arange(1.0, 5 * len(samples) + 1).reshape(-1, 5), samples, genes)
    with folder() as where:
        path = where / f"bulk.{form.rsplit(' ')[-1]}"
        write_bulk(path, table, form)
        read, _ = captured(read_bulk, path, genes)
    assert read.samples == samples and read.measured.all()
    assert (read.dense() == table.to_numpy()).all()


@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 5), SEEDS)
def test_proportions_do_not_change_with_the_scale_of_a_sample(S, G, K, seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = BulkEncoder(G, K, 3, 8, dropout=0.1).eval()
    model.fit_input(
        *(torch.tensor(rng.gamma(1, 50, (n, G)) + 1, dtype=torch.float32) for n in (S + 1, K))
    )
    torch.nn.init.normal_(model.pi_head.weight, std=0.1)
    bulk = torch.tensor(rng.gamma(0.5, 100, (S, G)) + 0.01, dtype=torch.float32)
    present = torch.tensor(rng.random(G) < 0.8)
    present[0] = True
    scale = torch.tensor(10 ** rng.uniform(-4, 4, (S, 1)), dtype=torch.float32)
    with torch.inference_mode():
        first, again = (model(x, present) for x in (bulk, bulk * scale))
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first[2].sum(dim=1), torch.ones(S))


# ------------------------------------------------------------------------------- files of models

WIDTHS = st.integers(1, 6)


@st.composite
def models(draw):
    """One of the three networks, of any size, with random weights."""
    G, K, D, H = (draw(WIDTHS) for _ in range(4))
    dropout = draw(st.sampled_from([0.0, 0.1, 0.5]))
    torch.manual_seed(draw(SEEDS))
    model_class = draw(st.sampled_from([scGMVAE, scDecoder, BulkEncoder]))
    if model_class is scGMVAE:
        model = scGMVAE(G, K, D, H, draw(st.sampled_from(["nb", "zinb"])), dropout)
    elif model_class is scDecoder:
        likelihood = draw(st.sampled_from(["nb", "zinb", "mse_l1"]))
        sizes = draw(WIDTHS), draw(st.integers(2, 6))
        model = scDecoder(D, 2 * H, G, K, likelihood, dropout, *sizes)
    else:
        model = BulkEncoder(G, K, D, H, dropout, draw(WIDTHS))
    state = {name: torch.rand(value.shape) + 0.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def outputs(model):
    """All that a network gives for some fixed input, as a flat list."""
    n, c = 4, model.config
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 9, (n, c["n_genes"]), generator=generator) + 1.0
    z = torch.randn((n, c["n_latent"]), generator=generator)
    codes = torch.arange(n) % c["n_types"]
    with torch.inference_mode():
        if isinstance(model, scGMVAE):
            mean, var = model.encode(x)
            return [mean, var, model.kl(mean, var, codes), *model.decoder(z, x.sum(dim=1))]
        if isinstance(model, scDecoder):
            library = model.sample_library(codes, generator)
            cells = model.sample_cells(z, library, codes, generator)
            return [*model(z, library), library, cells, model.type_means(3)]
        return [*model(x)]


@fewer
@given(models(), st.data())
def test_a_saved_model_is_the_same_again(model, data):
    c = model.config
    genes, types = (
        data.draw(st.lists(TEXT, min_size=n, max_size=n, unique=True))
        for n in (c["n_genes"], c["n_types"])
    )
    card = {"genes": genes, "cell_types": types, "epoch": 3}
    card |= {"held_out": [], "held_out_fraction": 0.2}
    seed = data.draw(SEEDS)
    with folder() as where:
        save_model(where / "model.pt", model, DatasetSettings(seed=seed), **card)
        assert [p.name for p in where.iterdir()] == ["model.pt"]
        again, read = load_model(where / "model.pt", type(model))
    assert not again.training and again.config == c and type(again) is type(model)
    assert read["seed"] == seed and read["settings"]["seed"] == seed
    assert {name: read[name] for name in card} == card
    state = model.state_dict()
    assert list(again.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    for first, second in zip(outputs(model), outputs(again), strict=True):
        assert (first is None and second is None) or torch.equal(first, second)


@given(WIDTHS, WIDTHS, st.sampled_from([torch.float32, torch.float64]), SEEDS)
def test_a_mixture_reads_the_same_in_both_layouts(K, D, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn((K, D), generator=generator, dtype=dtype)
    var = torch.rand((K, D), generator=generator, dtype=dtype) + 0.01
    with folder() as where:
        save_mixture(where, mu, var)
        assert torch.load(where / "gmm_mu_c.pt", weights_only=True).shape == (1, D, K)
        ours = load_mixture(where, K)
        for name, value in (("gmm_mu_c.pt", mu), ("gmm_var_c.pt", var)):
            torch.save(value, where / name)  # K x D
        plain = load_mixture(where, K)
        with pytest.raises(InputError, match="expected 1 x D x"):
            load_mixture(where, K + 1)
    for read in (ours, plain):
        for value, expected in zip(read, (mu, var), strict=True):
            assert value.dtype == torch.float32 and torch.equal(value, expected.float())
