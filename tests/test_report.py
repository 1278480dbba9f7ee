"""The report of a run: what it says is what the tables say, in one file that needs nothing else."""

import html
import re
import warnings
from html.parser import HTMLParser
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest

from conftest import CELL_TYPES, assert_one_line_error, make_cells, run_inside
from counts.markers import markers_of_profiles
from deconvolution.proportions import Proportions
from plots import report
from runtime.outputs import OWN_LINES


class Page(HTMLParser):
    """Text, pictures and rows of tables of a page; fails on tags that are not closed."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.sources, self.rows = [], [], [], []
        self.feed(text)
        assert not self.open, self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.sources.append(dict(attrs)["src"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)
        if self.open and self.open[-1] in ("td", "th", "code") and self.rows:
            self.rows[-1][-1] = (self.rows[-1][-1] + data).strip()


@pytest.fixture(scope="module")
def bulk(tmp_path_factory):
    """Two bulks, one of them with a name that would be markup."""
    X = make_cells().X
    table = {"a<b>&": X[:40].sum(axis=0).A1, "second": X[40:].sum(axis=0).A1}
    path = tmp_path_factory.mktemp("bulk") / "bulk.csv"
    pd.DataFrame(table, index=[f"GENE{i}" for i in range(60)]).assign(Length=9).to_csv(path)
    return path


@pytest.fixture(scope="module")
def made(trained, bulk, tmp_path_factory):
    """A page, the cells that it is about, what was printed, and the folder of all."""
    out = tmp_path_factory.mktemp("made") / "g.h5ad"
    flags = ["--report", "--weights", trained, "--bulk", bulk, "--n-cells", 40]
    done = run_inside("bulk2sc.py", *flags, "--out", out)
    assert done.returncode == 0, done.stderr
    page = out.with_name("g.report.html")
    assert f"wrote {page}" in done.stdout
    return page.read_text(), anndata.read_h5ad(out), done, out.parent


def test_report_says_what_was_read_and_made(made, trained, bulk):
    text, cells, done, _ = made
    page = Page(text)
    assert "Single cells from 2 bulk samples" in page.text and "80 generated cells" in page.text
    for line in done.stdout.splitlines():
        if line.startswith(f"{bulk}: "):  # every line of the reader
            assert " ".join(line.split()) in page.text
    assert "Length" in page.text  # left out, and said
    for warning in re.findall("warning: (.*)", done.stderr):
        assert " ".join(warning.split()) in page.text
    origin = cells.uns["bulk2sc"]
    assert origin["command"] in page.text and origin["run"] in page.text
    files = {row[1]: row[2] for row in page.rows if len(row) == 3}
    assert set(origin["files"]["sha256"]) <= set(files.values())
    assert str(trained / "scDecoder_model.pt") in files


def test_report_has_the_numbers_of_the_tables(made):
    text, cells, _, folder = made
    rows = Page(text).rows
    proportions = pd.read_csv(folder / "g.proportions.csv")
    shown = [row for row in rows if len(row) == 6 and row[1] in CELL_TYPES]
    assert len(shown) == len(proportions) == 2 * len(CELL_TYPES)
    for row, expected in zip(shown, proportions.itertuples(), strict=True):
        assert row[0] == expected.sample and row[1] == expected.cell_type
        assert row[2] == f"{expected.proportion:.1%}"
        assert row[4] == f"{expected.low:.1%} to {expected.high:.1%}"
        assert row[5] == f"{expected.rna_fraction:.1%}"
    fit = pd.read_csv(folder / "g.fit.csv")
    shown = [row for row in rows if len(row) == 7 and row[0] != "sample"]
    expected = {row.sample: f"{row.agreement:.3f}" for row in fit.itertuples()}
    assert {row[0]: row[5] for row in shown} == expected and len(shown) == len(fit)
    number = cells.obs["cell_type"].value_counts()
    counted = {row[0]: row[1] for row in rows if len(row) == 5 and row[0] in CELL_TYPES}
    assert counted == {name: f"{number[name]:,}" for name in CELL_TYPES}


def test_report_needs_no_network_and_no_script(made):
    text, *_ = made
    page = Page(text)
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert "<script" not in text and not re.findall(r'(?:src|href)="http', text)
    assert len(text) < 5e6
    assert "a<b>&" not in text and html.escape("a<b>&") in text  # names are no markup
    assert text.startswith(OWN_LINES["report.html"])  # by which a later run knows it for its own


def test_reference_is_drawn_beside_the_cells_if_data_is_given(trained, bulk, h5ad, tmp_path):
    flags = ["--report", "--weights", trained, "--bulk", bulk, "--n-cells", 20]
    flags += ["--out", tmp_path / "g.h5ad"]
    done = run_inside("bulk2sc.py", *flags, "--data", h5ad)
    assert done.returncode == 0, done.stderr
    page = Page((tmp_path / "g.report.html").read_text())
    assert f"{make_cells().n_obs} cells of the reference in one t-SNE" in page.text
    origin = anndata.read_h5ad(tmp_path / "g.h5ad").uns["bulk2sc"]["files"]
    assert str(h5ad) in set(origin["file"])
    (tmp_path / "none").mkdir()
    flags = [*flags[:-1], tmp_path / "none" / "g.h5ad", "--data", tmp_path / "missing.h5ad"]
    assert_one_line_error(run_inside("bulk2sc.py", *flags), "missing.h5ad")
    assert not list((tmp_path / "none").iterdir())  # before any work


def test_report_of_no_cells_is_written(trained, bulk, tmp_path):
    flags = ["--report", "--weights", trained, "--bulk", bulk, "--n-cells", 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # NumPy's, of means over nothing
        done = run_inside("bulk2sc.py", *flags, "--out", tmp_path / "g.h5ad")
    assert done.returncode == 0 and "could not be drawn" not in done.stderr, done.stderr
    page = Page((tmp_path / "g.report.html").read_text())
    assert "0 generated cells" in page.text and len(page.sources) == 1  # proportions alone
    assert not [row for row in page.rows if "nan" in row] and anndata.read_h5ad(
        tmp_path / "g.h5ad"
    ).shape == (0, 60)


def test_tables_alone_are_those_of_a_run_with_cells(made, trained, bulk, tmp_path):
    """All that --tables-only leaves out is cells, and what is read from them."""
    out = tmp_path / "tables" / "g.h5ad"
    flags = ["--report", "--weights", trained, "--bulk", bulk, "--tables-only"]
    done = run_inside("bulk2sc.py", *flags, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "no cells, as --tables-only asks for; so fit.csv has no agreement" in done.stdout
    names = ["proportions.csv", "proportions.png", "fit.csv", "expression.h5ad", "report.html"]
    assert {path.name for path in out.parent.iterdir()} == {f"g.{name}" for name in names}
    ours, theirs = (folder / "g.proportions.csv" for folder in (out.parent, made[3]))
    assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (pd.read_csv(folder / "g.fit.csv") for folder in (out.parent, made[3]))
    pd.testing.assert_frame_equal(ours, theirs.drop(columns="agreement"))
    ours, theirs = (
        anndata.read_h5ad(folder / "g.expression.h5ad") for folder in (out.parent, made[3])
    )
    np.testing.assert_array_equal(ours.X, theirs.X)
    page = Page((out.parent / "g.report.html").read_text())
    assert "No cells were generated" in page.text and len(page.sources) == 1
    assert "Agreement" not in page.text and "What not to do" not in page.text
    again = run_inside("bulk2sc.py", *flags, "--out", out)  # they are known for its own
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("flags", [[], ["--bulk", "x.csv", "--cells-per-type", "5"]])
def test_tables_alone_need_bulks_and_no_cells(tmp_path, flags):
    done = run_inside("bulk2sc.py", "--tables-only", *flags, "--out", tmp_path / "g.h5ad")
    assert_one_line_error(done, "--tables-only")


def many_proportions(n, n_types=12):
    """Proportions of n samples and types, with intervals."""
    pi = np.random.default_rng(0).dirichlet(np.ones(n_types), n)
    names, types = [f"sample {i}" for i in range(n)], [f"type {k}" for k in range(n_types)]
    return Proportions(names, types, pi, pi / 2, np.minimum(1.5 * pi, 1), pi)


def test_pictures_of_a_cohort_are_no_larger_than_of_a_few():
    few, many = (report.proportions_picture(many_proportions(n)) for n in (30, 1000))
    assert many.startswith("data:image/png") and len(many) < 5e5
    assert len(few) < 5e5


def test_samples_that_fit_worst_come_first():
    n = report.MAX_ROWS + 100
    misfit = np.random.default_rng(0).permutation(n) / n
    columns = dict.fromkeys(["correlation", "unknown", "unknown_low", "unknown_high"], 0.0)
    fit = pd.DataFrame(columns, index=[f"s{i}" for i in range(n)]).assign(misfit=misfit)
    unknown = SimpleNamespace(is_flagged=np.arange(n) == 7, describe=lambda i: "Neutrophils")
    samples = SimpleNamespace(fit=fit, unknown=unknown, is_shallow=np.zeros(n, bool))
    rows = report.fit_rows(samples)
    expected = [i for i in np.argsort(-misfit) if i != 7]
    assert [row["sample"] for row in rows] == [f"s{i}" for i in [7, *expected]][: report.MAX_ROWS]


def test_known_proportions_are_marked_as_given(trained, bulk, tmp_path):
    known = tmp_path / "known.csv"
    pd.DataFrame({CELL_TYPES[0]: [0.25]}, index=["second"]).to_csv(known)
    flags = ["--report", "--weights", trained, "--bulk", bulk, "--n-cells", 20]
    flags += ["--known-proportions", known]
    done = run_inside("bulk2sc.py", *flags, "--out", tmp_path / "g.h5ad")
    assert done.returncode == 0, done.stderr
    rows = Page((tmp_path / "g.report.html").read_text()).rows
    given = [row for row in rows if len(row) == 6 and row[4] == "given"]
    assert [row[:3] for row in given] == [["second", CELL_TYPES[0], "25.0%"]]


def test_markers_tell_a_type_from_the_next_and_are_no_ribosomal_genes():
    genes = ["RPS12", "MT-CO1", "CD3E", "LYZ", "ACTB", "MRPL3", "CD79A"]
    counts = np.array(
        [
            [900, 900, 60, 1, 500, 300, 0],
            [20, 10, 2, 90, 480, 10, 0],
            [20, 10, 1, 30, 490, 10, 80],
        ],
        float,
    )
    markers = markers_of_profiles(counts / counts.sum(axis=1, keepdims=True), genes)
    assert [of_type[0] for of_type in markers] == ["CD3E", "LYZ", "CD79A"]
    assert not {"RPS12", "MT-CO1", "MRPL3"} & {gene for of_type in markers for gene in of_type}


def test_shown_cells_are_spaced_over_all(monkeypatch):
    import scipy.sparse as sp

    from generation import Cells

    monkeypatch.setattr(report, "N_SHOWN", 7)
    shown, X = report.ShownCells(), sp.csr_matrix(np.arange(100)[:, None])
    shown.start(100, 1, 1)
    for i in range(0, 100, 30):
        part = np.arange(i, min(i + 30, 100))
        shown.add(Cells(X[part], part[:, None].astype(np.float32), part % 3, part // 50))
    counts, latent, codes, bulk = shown.all()
    expected = np.linspace(0, 99, 7, dtype=int)
    assert list(counts.toarray().ravel()) == list(latent.ravel()) == list(expected)
    assert list(codes) == list(expected % 3) and list(bulk) == list(expected // 50)
