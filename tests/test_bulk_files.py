"""Bulk files as tools write them are read right, or refused in one line that names the cause."""

import anndata
import numpy as np
import pandas as pd
import pytest

from bulk_cases import KINDS, cases_of, judge, model
from conftest import assert_one_line_error, make_cells, refused, run_inside, unpack
from readers import bulk
from readers.bulk import read_bulk
from readers.bulk_options import BulkOptions
from runtime.errors import InputError


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.removeprefix("add_"))
def test_bulk_files(kind, tmp_path, monkeypatch):
    finder = bulk.GeneFinder(*model())  # once for all files
    monkeypatch.setattr(bulk, "GeneFinder", lambda *_: finder)
    wrong = {}
    for n, case in enumerate(cases_of(kind)):
        folder = tmp_path / str(n)
        folder.mkdir()
        verdict, detail = judge(case, folder)
        if verdict != ("right" if case.right is not None else "refused clearly"):
            wrong[case.name] = verdict, detail
    assert not wrong


@pytest.fixture
def counts():
    """Counts of two bulks (genes x samples) in the genes of the trained model."""
    X = make_cells().X
    table = {"a": X[:40].sum(axis=0).A1, "b": X[40:].sum(axis=0).A1}
    return pd.DataFrame(table, index=[f"GENE{i}" for i in range(60)])


def test_dry_run_says_how_files_are_read_and_writes_nothing(trained, counts, tmp_path):
    path = tmp_path / "bulk.csv"
    counts.assign(Length=900, total=counts.sum(axis=1)).to_csv(path)
    out = tmp_path / "out.h5ad"
    flags = ["--weights", trained, "--bulk", path, "--out", out, "--dry-run"]
    done = run_inside("bulk2sc.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "text table, genes in rows, counts; samples a, b" in done.stdout
    assert "2 columns that are not samples left out (Length, total)" in done.stdout
    assert "60 of the model's 60 genes found" in done.stdout
    assert sorted(tmp_path.iterdir()) == [path]
    assert_one_line_error(run_inside("bulk2sc.py", "--dry-run"), "--dry-run", "--bulk")


def test_files_of_one_sample_each_make_one_run(trained, counts, tmp_path):
    files = []
    for name in counts:
        files.append(tmp_path / f"{name}.genes.results")
        table = pd.DataFrame({"length": 900.5, "expected_count": counts[name], "TPM": 1.5})
        table.to_csv(files[-1], sep="\t", index_label="gene_id")
    out = tmp_path / "g.h5ad"
    flags = ["--weights", trained, "--n-cells", 3, "--out", out]
    done = run_inside("bulk2sc.py", *flags, "--bulk", *files)
    assert done.returncode == 0, done.stderr
    assert "--bulk: 2 bulk samples of 2 files (a, b)" in done.stdout
    cells = anndata.read_h5ad(out)
    assert list(cells.obs["sample"].cat.categories) == ["a", "b"] and cells.n_obs == 6
    of_table = tmp_path / "t.h5ad"
    counts.to_csv(tmp_path / "t.csv")
    done = run_inside("bulk2sc.py", *flags[:-1], of_table, "--bulk", tmp_path / "t.csv")
    assert done.returncode == 0, done.stderr
    assert (anndata.read_h5ad(of_table).X != cells.X).nnz == 0


def test_flags_settle_what_a_table_leaves_open(trained, counts, tmp_path):
    log = tmp_path / "log.csv"
    np.log2(counts + 1).to_csv(log)
    flags = ["--weights", trained, "--n-cells", 2, "--out", tmp_path / "g.h5ad", "--bulk", log]
    done = run_inside("bulk2sc.py", *flags, "--log", 2, "--columns", "b")
    assert done.returncode == 0, done.stderr
    assert "logarithm to base 2 undone, less 1" in done.stdout
    table = pd.read_csv(tmp_path / "g.proportions.csv")
    assert list(table["sample"].unique()) == ["b"]
    wrong = run_inside("bulk2sc.py", *flags, "--log", 2, "--columns", "c")
    assert_one_line_error(wrong, "--columns c", "a, b")


def test_negative_and_missing_values_are_counted_and_the_cure_works(tmp_path):
    """As after ComBat, and as tables of different genes leave when they are merged."""
    genes = [f"GENE{i}" for i in range(300)]
    rng = np.random.default_rng(0)
    X = rng.lognormal(3, 2, 300) * rng.lognormal(0, 0.3, (4, 300))
    table = pd.DataFrame(X, index=list("abcd"), columns=genes)
    negative = table.copy()
    negative.iloc[0, :30] = -0.4
    words = ["30 of 1,200 values (2.5%)", "negative on a linear scale", "ComBat", "set what is"]
    for options in (BulkOptions(), BulkOptions(log="no")):
        refused(lambda o=options: read_bulk(negative, genes, options=o), *words)
    with pytest.raises(InputError) as error:
        read_bulk(negative, genes)
    assert "--log" not in str(error.value)  # which could not help
    assert read_bulk(negative.clip(lower=0), genes).measured.all()
    logs = np.log2(table) - 2
    with pytest.raises(InputError, match="--log 10 undoes a logarithm$"):
        read_bulk(logs, genes)

    merged = table.copy()
    merged.iloc[2:, :50] = np.nan
    words = [
        "100 of 1,200 in",
        "50 of 300 genes",
        "2 of 4 samples (c, d)",
        "dropna",
        "a.csv b.csv",
    ]
    refused(lambda: read_bulk(merged, genes), *words)
    empty = table.copy()
    empty.loc["b"] = np.nan
    refused(lambda: read_bulk(empty, genes), "leave out the samples without any value (b)")
    merged.T.to_csv(tmp_path / "merged.csv", na_rep="NA")
    refused(lambda: read_bulk(tmp_path / "merged.csv", genes), "merged.csv", *words)
    assert read_bulk(merged.dropna(axis=1), genes).measured.sum() == 250
    merged.iloc[:2].T.to_csv(tmp_path / "a.csv")
    merged.iloc[2:, 50:].T.to_csv(tmp_path / "b.csv")
    X, present, samples = unpack(read_bulk([tmp_path / "a.csv", tmp_path / "b.csv"], genes))
    assert samples == list("abcd") and present.sum() == 250


def test_samples_of_few_counts_are_called_so(trained, tmp_path, monkeypatch):
    """And not another tissue; whether a sample is of few counts is told by its genes' counts."""
    cells = make_cells()
    total = cells.X.sum(axis=0).A1
    rng = np.random.default_rng(0)
    table = {"thin": rng.multinomial(40, total / total.sum()), "deep": total}
    table["strange"] = rng.permutation(total)
    pd.DataFrame(table, index=cells.var_names).to_csv(tmp_path / "bulk.csv")
    done = run_inside("bulk2sc.py", "--weights", trained, "--bulk", tmp_path / "bulk.csv",
                      "--n-cells", 3, "--out", tmp_path / "g.h5ad")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 3 samples (thin) have few counts, from 40 on" in done.stderr
    assert "1 of 3 samples (strange) are not what" in done.stderr
    deep = pd.DataFrame(table, index=cells.var_names)[["thin"]] / 3  # no counts, of unknown depth
    deep.to_csv(tmp_path / "bulk.csv")
    done = run_inside("bulk2sc.py", "--weights", trained, "--bulk", tmp_path / "bulk.csv", "--log",
                      "no", "--n-cells", 3, "--out", tmp_path / "g.h5ad")  # fmt: skip
    assert "few counts" not in done.stderr
