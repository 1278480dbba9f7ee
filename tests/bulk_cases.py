"""Bulk files as tools, R and spreadsheets write them, and what becomes of each.

    python tests/bulk_cases.py            # a table of all cases and what the reader did

A case is right if every gene of the model that its file holds comes out, up to a factor for each
sample, under the right samples; or if it is refused in one line that names the cause.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import sys
import threading
import zipfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

ROOT = Path(os.environ.get("BULK2SC_ROOT", Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(ROOT))

from readers import bulk as reader  # noqa: E402
from runtime.errors import InputError  # noqa: E402

CARD = Path(__file__).resolve().parent.parent / "weights" / "pbmc" / "scDecoder_model.pt"
SAMPLES = ["S1", "S2", "Patient_03", "ctrl-1"]
CASES = []
N = int(os.environ.get("NG", 1000))  # genes


@dataclass
class Case:
    """A file (or several) and what a careful person expects of its reading."""

    name: str
    make: object
    """Writes into a folder, returns the path or paths to give."""
    right: pd.DataFrame | None = None
    """Values (genes x samples) by the model's symbols; None if it is to be refused."""
    words: tuple = ()
    """Of which the refusal holds one."""
    options: dict = field(default_factory=dict)


@cache
def model():
    """Genes (symbols) and ids of weights/pbmc."""
    card = torch.load(CARD, weights_only=True)
    return card["genes"], card["gene_ids"]


@cache
def data():
    """Counts (genes x samples) of ``N`` genes of the model, with the range of RNA-seq."""
    genes, _ = model()
    rng = np.random.default_rng(0)
    chosen = sorted(rng.permutation(len(genes))[:N])
    mean = rng.lognormal(3, 2.2, N)[:, None] * rng.lognormal(0, 0.4, (N, 4))
    X = rng.negative_binomial(3, 3 / (3 + mean)) + (rng.random((N, 4)) < 0.2)
    return pd.DataFrame(X, [genes[i] for i in chosen], SAMPLES)


def ids(version=""):
    """Ensembl ids of the genes of :func:`data`."""
    known = dict(zip(*model(), strict=True))
    return [known[g] + version if known[g] else f"NOVEL{i}" for i, g in enumerate(data().index)]


def with_id():
    """:func:`data`, of genes that have an id."""
    keep = [not i.startswith("NOVEL") for i in ids()]
    return data()[keep], [i for i in ids() if not i.startswith("NOVEL")]


def write(name, content):
    """What writes one file of text or bytes."""

    def make(folder):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def right(name, content, values=None, file="bulk.csv", **options):
    """Add a case that is to be read; values default to all of :func:`data`."""
    make = content if callable(content) else write(file, content)
    CASES.append(Case(name, make, data() if values is None else values, (), options))


def refused(name, content, *words, file="bulk.csv", **options):
    """Add a case that is to be refused with one of the words."""
    make = content if callable(content) else write(file, content)
    CASES.append(Case(name, make, None, words, options))


def lines(rows, sep="\t"):
    return "\n".join(sep.join(map(str, row)) for row in rows) + "\n"


# ------------------------------------------------------------------------ layouts, names, packing


def add_layouts():
    X, known = with_id()
    names = {
        "symbols": list(X.index),
        "ids": known,
        "ids with versions": [f"{i}.{n % 17 + 1}" for n, i in enumerate(known)],
        "id|symbol": [f"{i}.3|{g}" for i, g in zip(known, X.index, strict=True)],
        "symbol_id": [f"{g}_{i}" for i, g in zip(known, X.index, strict=True)],
        "symbol|entrez": [f"{g}|{n + 1}" for n, g in enumerate(X.index)],
        "symbol (entrez)": [f"{g} ({n + 1})" for n, g in enumerate(X.index)],
        "blanks": [f" {g} " for g in X.index],
    }
    for kind, genes in names.items():
        for sep, ending in ((",", "csv"), ("\t", "tsv"), (";", "csv")):
            table = X.set_axis(genes)
            right(f"{kind}, {sep!r}, rows", table.to_csv(sep=sep), X, f"b.{ending}")
            right(f"{kind}, {sep!r}, columns", table.T.to_csv(sep=sep), X, f"b.{ending}")


def add_dialects():
    X = data()
    csv = X.to_csv(index_label="gene")
    quoted = "\n".join(
        ['"S1" "S2" "Patient_03" "ctrl-1"']
        + [
            f'"{g}" ' + " ".join(map(str, row))
            for g, row in zip(X.index, X.to_numpy(), strict=True)
        ]
    )
    right("R write.table, blanks", quoted, file="b.txt")
    right("R write.table, tabs", X.to_csv(sep="\t").removeprefix("\t"), file="b.txt")
    right("R write.csv", X.to_csv(quoting=2), file="b.csv")
    right("R write.csv2", (X / 4).to_csv(sep=";", decimal=","), file="b.csv")
    right("pandas with row numbers", X.reset_index(names="gene").to_csv())
    right(
        "pandas with row numbers and id",
        X.reset_index(names="gene").assign(n=1.5).rename(columns={"n": "length"}).to_csv(),
    )
    for n in (1, 2, 4):
        table = X.copy()
        table.insert(n, "gene", X.index)
        right(f"gene column {n + 1}", table.to_csv(index=False))
    right("CRLF", csv.replace("\n", "\r\n"))
    right("old Mac", csv.replace("\n", "\r"))
    right("byte order mark", b"\xef\xbb\xbf" + csv.encode())
    right("title above", "Supplementary Table 3. Counts of all genes\n\n" + csv)
    right("title with commas", "Counts,,,,\n,,,,\n" + csv)
    right("comments", "# made by a pipeline\n# on Monday\n" + csv)
    right("trailing separators", "\n".join(line + "," for line in csv.splitlines()) + "\n")
    right("blank lines", csv.replace("\n", "\n\n", 30))
    right(
        "empty last column and rows", "\n".join(f"{x},," for x in csv.splitlines()) + "\n,,,,,,\n"
    )
    right("GCT 1.2", f"#1.2\n{len(X)}\t4\n" + gct(X), file="b.gct")
    right("GCT 1.3", f"#1.3\n{len(X)}\t4\t1\t0\n" + gct(X), file="b.gct")
    right("no suffix", csv, file="counts")
    right(
        "sample names of numbers",
        X.set_axis(["001", "002", "10", "11"], axis=1).to_csv(),
        X.set_axis(["001", "002", "10", "11"], axis=1),
    )
    right(
        "samples A, B, F, T",
        X.set_axis(list("ABFT"), axis=1).to_csv(),
        X.set_axis(list("ABFT"), axis=1),
    )
    right("one sample", X[["S1"]].to_csv(), X[["S1"]])
    many = pd.concat([X] * 50, axis=1).set_axis([f"D{i}" for i in range(200)], axis=1)
    right("200 samples", many.to_csv(), many)
    half = X.index[: N // 4]
    doubled = pd.concat([X, X.loc[half]])
    summed = X.copy()
    summed.loc[half] *= 2
    right("repeated genes", doubled.to_csv(), summed)


def gct(X):
    table = X.copy()
    table.insert(0, "Description", X.index)
    table.index = [f"{i}.4" for i in ids()]
    return table.to_csv(sep="\t", index_label="Name")


def add_containers():
    X, csv = data(), data().to_csv()
    right("gzip", gzip.compress(csv.encode()), file="b.csv.gz")
    right("bzip2", bz2.compress(csv.encode()), file="b.csv.bz2")
    right("xz", lzma.compress(csv.encode()), file="b.csv.xz")
    right("gzip without its suffix", gzip.compress(csv.encode()), file="b.csv")
    right("UTF-16", csv.encode("utf-16"))
    umlaut = X.rename(columns={"S1": "Zürich"})
    right("Windows-1252", umlaut.to_csv().encode("cp1252"), umlaut)
    right("UTF-8 names", umlaut.to_csv(), umlaut)
    right("zip", zipped({"b.csv": csv, "__MACOSX/._b.csv": "x"}), file="b.zip")
    refused("zip of two", zipped({"a.csv": csv, "b.csv": csv}), "2 files", file="b.zip")
    for title in (False, True):
        right(f"workbook{', title above' * title}", workbook(X, title), X[:800], file="b.xlsx")
    right("workbook named csv", workbook(X, False), X[:800], file="b.csv")
    right("workbook with a sheet of notes", workbook(X, False, "notes"), X[:800], file="b.xlsx")
    refused("workbook of two tables", workbook(X, False, "more"), "2 sheets", file="b.xlsx")
    right("pipe", pipe(csv))
    heads = {
        "Parquet": b"PAR1\x15\x04",
        "Feather": b"ARROW1\0\0",
        "Zstandard": b"\x28\xb5\x2f\xfd\x04",
        "Excel": b"\xd0\xcf\x11\xe0\xa1\xb1",
        "PDF": b"%PDF-1.4\n",
        "PNG": b"\x89PNG\r\n\x1a\n",
    }
    for kind, head in heads.items():
        refused(f"format {kind}", head + bytes(range(200)) * 3, kind, "pyarrow", file="b.bin")
    refused("format R data", gzip.compress(b"X\n\0\0\0\3" + bytes(99)), "R data", file="b.rds")
    texts = {
        "web page": "<!DOCTYPE html>\n<html><body>404</body></html>",
        "JSON": '{"a": [1, 2]}',
        "FASTQ": "@r1\nACGT\n+\nIIII\n",
        "VCF": "##fileformat=VCFv4.2\n#CHROM\tPOS\n",
        "GTF": 'chr1\thavana\tgene\t11869\t14409\t.\t+\t.\tgene_id "ENSG1"\n' * 3,
        "Matrix Market": "%%MatrixMarket matrix coordinate integer general\n3 3 1\n1 1 5\n",
    }
    for kind, text in texts.items():
        refused(f"no table: {kind}", text, kind, kind.split()[0], file="b.txt")
    refused("summary of featureCounts", "Status\ta.bam\nAssigned\t5\nUnassigned_x\t3\n", "summary")
    refused("empty file", "", "header", "table")
    refused("binary", bytes(range(256)) * 20, "NUL", "UTF-8")


def zipped(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return out.getvalue()


def workbook(X, title, other=None):
    """A workbook of 800 genes, with a sheet of notes or more samples before it."""
    out = io.BytesIO()
    with pd.ExcelWriter(out) as writer:
        if other == "notes":
            pd.DataFrame({"sample": list(X), "age": 40}).to_excel(writer, sheet_name="notes")
        elif other == "more":
            X.iloc[:800].to_excel(writer, sheet_name="more")
        X.iloc[:800].to_excel(writer, sheet_name="counts", startrow=2 * title)
        if title:
            writer.sheets["counts"].cell(1, 1).value = "Table S1"
    return out.getvalue()


def pipe(text):
    def make(folder):
        path = folder / "fifo"
        os.mkfifo(path)
        threading.Thread(target=lambda: path.write_text(text), daemon=True).start()
        return path

    return make


# ------------------------------------------------------------------------------ scales, numbers


def add_scales():
    X = data().astype(float)
    cpm = X / X.sum() * 1e6
    z = cpm.pipe(np.log1p)
    sorted_mean = np.sort(X.to_numpy(), axis=0).mean(axis=1)
    quantile = X.rank(method="first").astype(int).map(lambda r: sorted_mean[r - 1])
    for name, table in {
        "CPM": cpm,
        "TPM of three decimals": cpm.round(3),
        "FPKM": cpm / 3.1,
        "normalised counts of DESeq2": X / [0.8, 1.1, 1.3, 0.9],
        "expected counts": X + 0.25 * (X > 5),
    }.items():
        for turned in (False, True):
            right(f"{name}{', columns' * turned}", (table.T if turned else table).to_csv(), table)
    logs = {
        "log2(CPM + 1)": np.log2(cpm + 1),
        "log2(TPM + 0.001)": np.log2(cpm + 0.001),
        "voom": np.log2((X + 0.5) / (X.sum() + 1) * 1e6),
        "vst": np.log2(X / [0.8, 1.1, 1.3, 0.9] + 9),
        "log10": np.log10(cpm + 1),
        "log1p": np.log1p(X / 1.3),
        "RMA": (np.log2(cpm + 8) + 1).round(3),
        "asinh": np.arcsinh(cpm),
        "UCSC Xena": np.log2(cpm + 1).round(4),
    }
    for name, table in logs.items():
        for turned in (False, True):
            text = (table.T if turned else table).to_csv()
            refused(f"{name}{', columns' * turned}", text, "log")
    refused("one sample on a log scale", X.assign(S2=np.log2(cpm["S2"] + 1)).to_csv(), "log")
    refused(
        "z-scores of genes",
        z.sub(z.mean(axis=1), axis=0).div(z.std(axis=1) + 1e-9, axis=0).to_csv(),
        "z-score",
    )
    refused("z-scores of samples", ((z - z.mean()) / z.std()).to_csv(), "z-score")
    refused("ranks", X.rank(method="first").to_csv(), "rank")
    refused("ranks with ties", X.rank().to_csv(), "rank", "log")
    refused("quantile-normalised", quantile.to_csv(), "quantile")
    refused("quantile-normalised logs", np.log2(quantile + 1).to_csv(), "log")
    right("log2 undone", logs["log2(CPM + 1)"].to_csv(), cpm, log="2")
    right("log10 undone", logs["log10"].to_csv(), cpm, log="10")
    right("log1p undone", logs["log1p"].to_csv(), X, log="e")
    right(
        "log2 with a small pseudocount",
        logs["log2(TPM + 0.001)"].to_csv(),
        cpm,
        log="2",
        pseudocount=0.001,
    )
    right("quantile-normalised, asked for", quantile.to_csv(), quantile, log="no")


def add_numbers():
    X = data()
    right("commas between thousands", X.map(lambda v: f"{v:,}").to_csv())
    points = X.map(lambda v: f"{v:,}".replace(",", "."))
    right("points between thousands", points.to_csv(sep=";"))
    right("points between thousands, tsv", points.to_csv(sep="\t"), file="b.tsv")
    german = (X / 4).map(lambda v: f"{v:,.2f}".translate(str.maketrans(",.", ".,")))
    right("German thousands and decimals", german.to_csv(sep=";"), X / 4)
    right("decimal commas, tabs", (X / 4).to_csv(sep="\t", decimal=","), X / 4, "b.tsv")
    right("scientific", (X * 1.0).map(lambda v: f"{v:.6e}").to_csv())
    right("blanks around numbers", X.map(lambda v: f" {v} ").to_csv())
    right(
        "genes without values",
        pd.concat([X, pd.DataFrame(index=["XIST", "NOGENE"])]).to_csv(na_rep="NA"),
    )
    bad = X.astype(object)
    for value, words in (
        ("-3", "-3"),
        ("n.d.", "n.d."),
        ("inf", "inf"),
        ("1e999", "1e999"),
        ("", "''"),
    ):
        table = bad.copy()
        table.iloc[7, 2] = value
        refused(f"a value {value!r}", table.to_csv(), words)
    refused("1e4002161627746957", bad.replace(bad.iloc[0, 0], "1e4002161627746957").to_csv(), "1e4")
    refused("all zero", (X * 0).to_csv(), "empty", "log")
    refused("an empty sample", X.assign(S2=0).to_csv(), "empty")
    refused(
        "repeated samples", X.set_axis(["S1", "S1", "a", "b"], axis=1).to_csv(), "more than once"
    )
    refused("header alone", "gene,S1,S2\n", "no sample", "known")
    refused("five genes", X.iloc[:5].to_csv(), "5 of the model")
    refused("few genes of a panel", X.iloc[:60].to_csv(), "60 of the model")


# ----------------------------------------------------------------------- names of genes, species


def add_names():
    X = data()
    genes = list(X.index)
    right("lower case", X.set_axis([g.lower() for g in genes]).to_csv())
    right("lower case, columns", X.set_axis([g.lower() for g in genes]).T.to_csv())
    third = [g.lower() if i % 3 == 0 else g for i, g in enumerate(genes)]
    right("a third in lower case", X.set_axis(third).to_csv())
    right("make.names", X.set_axis([g.replace("-", ".") for g in genes]).to_csv())
    right("upper case orf", X.set_axis([g.upper() if "orf" in g else g for g in genes]).to_csv())
    right(
        "genes the model lacks",
        pd.concat([X, X.set_axis([f"LINC9{i}" for i in range(N)])]).to_csv(),
    )
    right(
        "ERCC spike-ins",
        pd.concat([X, X[:90].set_axis([f"ERCC-{i:05d}" for i in range(90)])]).to_csv(),
    )
    title = [g[0] + g[1:].lower() for g in genes]
    for name, named, word in (
        ("mouse symbols", title, "mouse"),
        ("mouse ids", [f"ENSMUSG{i:011d}" for i in range(N)], "mouse"),
        ("rat ids", [f"ENSRNOG{i:011d}.2" for i in range(N)], "rat"),
        ("zebrafish ids", [f"ENSDARG{i:011d}" for i in range(N)], "zebrafish"),
        ("Entrez ids", [i + 1 for i in range(N)], "Entrez"),
        ("transcripts", [f"ENST{i:011d}.1" for i in range(N)], "transcript"),
        ("RefSeq", [f"NM_{i:06d}.3" for i in range(N)], "RefSeq"),
        ("Affymetrix probes", [f"{i + 1000}_s_at" for i in range(N)], "microarray"),
        ("Illumina probes", [f"ILMN_{i + 1000}" for i in range(N)], "microarray"),
        ("microRNAs", [f"hsa-miR-{i}-5p" for i in range(N)], "microRNA"),
        ("positions", [f"chr1:{i}-{i + 9}" for i in range(N)], "positions"),
    ):
        refused(name, X.set_axis(named).to_csv(), word)
        refused(f"{name}, columns", X.set_axis(named).T.to_csv(), word)
    alias = {"SEPT": "SEPTIN", "MARCH": "MARCHF"}
    dates = [g for g in genes if g.startswith(("SEPT", "MARCH")) and g[-1].isdigit()]
    renamed = {g: f"{g.strip('SEPTINMARCHF')}-{'Sep' if g[0] == 'S' else 'Mar'}" for g in dates}
    single = {g: d for g, d in renamed.items() if g[0] == "S" and alias}
    right("dates of Excel", X.rename(index=single).to_csv())


def add_columns():
    X = data()
    rng = np.random.default_rng(1)
    n = len(X)

    def uniform(scale=1):
        return rng.random(n) * scale

    def normal():
        return rng.normal(size=n)

    def named(names, *values):
        return dict(zip(names.split(), values, strict=True))

    rows, one = range(n), [1] * n
    biomart = "start_position end_position gene_biotype percentage_gene_gc_content chromosome_name"
    deseq = "baseMean log2FoldChange lfcSE stat pvalue padj"
    mean = X.mean(axis=1)
    columns = {
        "biomaRt": named(biomart, rows, rows, ["x"] * n, uniform(), one),
        "DESeq2": named(deseq, mean, normal(), uniform(), normal(), uniform(), uniform()),
        "edgeR": named(
            "logFC logCPM F PValue FDR", normal(), uniform(9), uniform(), uniform(), uniform()
        ),
        "limma": named(
            "logFC AveExpr t P.Value adj.P.Val B",
            *(normal(), uniform(), normal(), uniform(), uniform(), normal()),
        ),
        "lengths": {"Length": range(n), "EffectiveLength": rng.random(n) * 900},
        "Total": {"Total": X.sum(axis=1)},
        "Mean and sd": {"Mean": mean, "SD": X.std(axis=1)},
        "a sum by another name": {"all samples": X.sum(axis=1)},
        "a mean by another name": {"cohort": mean},
        "gene ids": {"entrez_id": range(n), "gene_name": X.index},
        "text": {"description": ["a gene, or so"] * n, "biotype": ["protein_coding"] * n},
    }
    for name, extra in columns.items():
        extra = pd.DataFrame({k: np.asarray(v) for k, v in extra.items()}, X.index)
        for first in (True, False):
            table = pd.concat([extra, X] if first else [X, extra], axis=1)
            right(
                f"with {name} {'before' if first else 'behind'}", table.to_csv(index_label="gene")
            )
    units = pd.DataFrame({f"{s}_{u}": X[s] * f for s in X for u, f in (("TPM", 0.3), ("count", 1))})
    right("units as suffixes", units.to_csv())
    right("TPM of several units", units.to_csv(), X, bulk_unit="tpm")
    units = pd.DataFrame(
        {f"{u}.{s}": X[s] * f for u, f in (("FPKM", 0.3), ("counts", 1)) for s in X}
    )
    right("units as prefixes", units.to_csv())
    units = pd.DataFrame(
        {f"{s} ({u})": X[s] * f for s in X for u, f in (("TPM", 0.3), ("FPKM", 2))}
    )
    right("units in brackets", units.to_csv())
    right("samples named", X.assign(extra=X["S1"] + 7).to_csv(), X, columns=tuple(SAMPLES))
    right(
        "gene column named",
        X.assign(other=[f"n{i}" for i in range(n)]).reset_index(names="sym").to_csv(index=False),
        X,
        gene_column="sym",
    )
    refused("gene column that is not there", X.to_csv(), "--gene-column", gene_column="sym")
    refused("columns that are not there", X.to_csv(), "--columns", columns=("S9",))
    square = X.iloc[:300]
    both = pd.DataFrame(rng.integers(0, 999, (300, 300)), square.index, square.index)
    half = X.iloc[:, 2:].sample(frac=1, random_state=0)
    side = pd.concat(
        [X.iloc[:, :2].reset_index(names="gene"), half.reset_index(names="Symbol")], axis=1
    )
    refused("two tables side by side", side.to_csv(index=False), "side by side")
    right(
        "samples CD4+ and CD4-",
        X.set_axis(["CD4+", "CD4-", "α", "β"], axis=1).to_csv(),
        X.set_axis(["CD4+", "CD4-", "α", "β"], axis=1),
    )
    right("raw and normalised", pd.concat([X, (X / 3).add_suffix(".norm")], axis=1).to_csv())
    right("a constant column", X.assign(Coverage=1.5).to_csv())
    right("without ids of another name", X.assign(bp=rng.permutation(10 * n)[:n]).to_csv())
    refused(
        "a sample named Total", X.set_axis(["Total", "a", "c", "d"], axis=1).to_csv(), "--columns"
    )
    quoted = X.assign(about='a 5" gene')[["about", *X]].to_csv(sep="\t", quoting=3, escapechar="\\")
    right("a quote that is not closed", quoted.replace("\\", ""), X, "b.tsv")
    refused("genes in rows and columns", both.to_csv(), "--genes-in")
    turned = X.T
    named = turned.reset_index(names="sample")
    right("sample column second", named.to_csv())
    right(
        "sample column behind a batch",
        named.assign(batch="b1")[["batch", *named]].to_csv(index=False),
    )
    meta = turned.assign(condition=["a", "b", "a", "b"], age=[30, 40, 50, 60])
    right("metadata of samples", meta[["condition", "age", *X.index]].to_csv())
    single = pd.concat([turned] * 60)
    rng = np.random.default_rng(0)
    single.index = ["".join(rng.choice(list("ACGT"), 16)) + "-1" for _ in range(len(single))]
    refused("single cells", single.to_csv(), "cells")


def add_long():
    X = data().iloc[:700]
    long = X.reset_index(names="gene").melt("gene", var_name="sample", value_name="count")
    right("long", long.to_csv(index=False), X)
    right("long, shuffled", long.sample(frac=1, random_state=0).to_csv(index=False), X)
    right("long, sample first", long[["sample", "gene", "count"]].to_csv(index=False), X)
    right("long with row numbers", long.to_csv(), X)
    right("long with units", long.assign(tpm=long["count"] / 3).to_csv(index=False), X)
    right("long with metadata", long.assign(age=40, condition="a").to_csv(index=False), X)
    right("long without zeros", long[long["count"] > 0].to_csv(index=False), X)
    right("long, tabs", long.to_csv(index=False, sep="\t"), X, "b.tsv")
    two = long.assign(other=np.random.default_rng(0).random(len(long)))
    refused("long with two values", two.to_csv(index=False), "--columns")
    right("long, column named", two.to_csv(index=False), X, columns=("count",))
    refused(
        "long with text",
        long.astype(object).replace(long["count"].iloc[0], "x").to_csv(index=False),
        "'x'",
    )


# ------------------------------------------------------------------------------- quantifiers


def star(values, strand, names=True):
    """Rows of ReadsPerGene.out.tab; strand 0 for unstranded."""
    share = {0: 0.5, 1: 0.97, 2: 0.03}[strand]
    first = np.rint(values * share).astype(int)
    rest = zip(("unmapped", "multimapping", "noFeature", "ambiguous"), (5, 5, 9, 1), strict=True)
    head = [(f"N_{name}", n, n, n) for name, n in rest] if names else []
    return head + list(zip(with_id()[1], values, first, values - first, strict=True))


HEADS = {
    "RSEM": "gene_id,transcript_id(s),length,effective_length,expected_count,TPM,FPKM",
    "Salmon": "Name,Length,EffectiveLength,TPM,NumReads",
    "kallisto": "target_id,length,eff_length,est_counts,tpm",
    "GDC": "gene_id,gene_name,gene_type,unstranded,stranded_first,stranded_second,"
    "tpm_unstranded,fpkm_unstranded,fpkm_uq_unstranded",
    "StringTie": "Gene ID,Gene Name,Reference,Strand,Start,End,Coverage,FPKM,TPM",
    "Cufflinks": "tracking_id,class_code,nearest_ref_id,gene_id,gene_short_name,tss_id,locus,"
    "length,coverage,FPKM,FPKM_conf_lo,FPKM_conf_hi,FPKM_status",
    "featureCounts": "Geneid,Chr,Start,End,Strand,Length,/data/S1.bam",
}


def under(head, rows):
    """A table of rows under one of HEADS."""
    return lines([HEADS[head].split(","), *rows])


def quantifier_files():
    """Text of each quantifier's file for one sample (values of S1): name -> (file, text)."""
    X, known = with_id()
    x, symbols = X["S1"].to_numpy(), X.index
    v = [f"{i}.{n % 9 + 1}" for n, i in enumerate(known)]
    htseq = list(zip(known, x, strict=True))
    named = [(i, g, c) for (i, c), g in zip(htseq, symbols, strict=True)]
    tail = ("no_feature", "ambiguous", "too_low_aQual", "not_aligned", "alignment_not_unique")
    tail = [(f"__{n}", 7) for n in tail]
    rsem = [
        (i, "t1,t2", 1200.5, 1000.2, c + 0.0, round(c / 3, 2), round(c / 5, 2)) for i, c in htseq
    ]
    isoform_head = ("transcript_id", "gene_id", *HEADS["RSEM"].split(",")[2:], "IsoPct")
    isoforms = [(f"ENST{n:011d}", r[0], *r[2:], 100.0) for n, r in enumerate(rsem)]
    gencode = [
        f"ENST{n:011d}.2|{i}|OTTHUMG|OTTHUMT|{g}-201|{g}|1500|protein_coding|"
        for n, (i, g) in enumerate(zip(v, symbols, strict=True))
    ]
    names = ("N_unmapped", "N_multimapping", "N_noFeature", "N_ambiguous")
    gdc = [(n, "", "", 5, 5, 5, "", "", "") for n in names]
    gdc += [
        (i, g, "protein_coding", c, c // 2, c - c // 2, c / 3, c / 4, c / 5)
        for i, g, c in zip(v, symbols, x, strict=True)
    ]

    def salmon(genes):
        return under("Salmon", [(i, 1500, 1300.5, c / 3, c) for i, c in zip(genes, x, strict=True)])

    def packed(rows):
        return gzip.compress(lines(rows).encode())

    kallisto = [(i, 1500, 1300.5, c, c / 3) for i, c in zip(gencode, x, strict=True)]
    stringtie = [(i, g, "chr1", "+", 10, 99, c / 9, c / 4, c / 3.0) for i, g, c in named]
    cufflinks = [
        (i, "-", "-", i, g, "-", "chr1:1-9", "-", "-", c / 3, 0, c, "OK") for i, g, c in named
    ]
    feature = [(i, "chr1;chr1", "1;5", "3;9", "+;+", 7, c) for i, c in htseq]
    command = '# Program:featureCounts v2.0.1; Command:"x"\n'
    star_of_gdc = "S1.rna_seq.augmented_star_gene_counts.tsv"
    return {
        "HTSeq": ("S1.htseq.counts", lines(htseq + tail)),
        "HTSeq with names": ("S1.txt", lines(named + [(n, "", c) for n, c in tail])),
        "HTSeq with header": ("S1.tsv", lines([("gene_id", "count"), *htseq, *tail])),
        "GDC HTSeq": ("S1.htseq.counts.gz", packed(zip(v, x, strict=True))),
        "GDC FPKM": ("S1.FPKM.txt.gz", packed(zip(v, x / 7, strict=True))),
        "GDC STAR": (star_of_gdc, "# gene-model: GENCODE v36\n" + under("GDC", gdc)),
        "STAR unstranded": ("S1ReadsPerGene.out.tab", lines(star(x, 0))),
        "STAR first strand": ("S1.ReadsPerGene.out.tab", lines(star(x, 1))),
        "STAR second strand": ("S1_ReadsPerGene.out.tab.gz", packed(star(x, 2))),
        "STAR without its rows": ("S1ReadsPerGene.out.tab", lines(star(x, 2, names=False))),
        "RSEM genes": ("S1.genes.results", under("RSEM", rsem)),
        "RSEM isoforms": (
            "S1.isoforms.results",
            lines([isoform_head, *isoforms]),
        ),
        "Salmon by gene": ("S1.quant.genes.sf", salmon(v)),
        "Salmon in its folder": ("S1/quant.genes.sf", salmon(known)),
        "Salmon, GENCODE": ("S1/quant.sf", salmon(gencode)),
        "kallisto, GENCODE": ("S1/abundance.tsv", under("kallisto", kallisto)),
        "StringTie": ("S1.gene_abund.tab", under("StringTie", stringtie)),
        "Cufflinks": ("S1/genes.fpkm_tracking", under("Cufflinks", cufflinks)),
        "featureCounts": ("S1.featureCounts.txt", command + under("featureCounts", feature)),
    }


def add_quantifiers():
    X, known = with_id()
    one = X[["S1"]]
    for name, (file, text) in quantifier_files().items():
        right(name, text, one, file)
    refused(
        "Salmon, bare transcripts",
        under("Salmon", [(f"ENST{n:011d}.1", 900, 700.1, c / 3, c) for n, c in enumerate(X["S1"])]),
        "transcript",
        file="S1/quant.sf",
    )
    for unit, factor in (("tpm", 1 / 3), ("fpkm", 1 / 5)):
        file, text = quantifier_files()["RSEM genes"]
        right(f"RSEM's {unit}", text, (one * factor).round(2), file, bulk_unit=unit)
    file, text = quantifier_files()["HTSeq"]
    refused(
        "a unit that is not there",
        quantifier_files()["Salmon by gene"][1],
        "fpkm",
        file="S1.sf",
        bulk_unit="fpkm",
    )
    txi = pd.concat({"abundance": X / 3, "counts": X, "length": X * 0 + 900}, axis=1)
    txi.columns = [f"{a}.{b}" for a, b in txi.columns]
    right("tximport", txi.assign(countsFromAbundance="no").set_axis(known).to_csv(), X)
    right(
        "nf-core",
        X.assign(gene_name=X.index)
        .set_axis(known)[["gene_name", *X]]
        .to_csv(sep="\t", index_label="gene_id"),
        X,
        "salmon.merged.gene_counts.tsv",
    )
    right(
        "prepDE",
        X.set_axis([f"{i}|{g}" for i, g in zip(known, X.index, strict=True)]).to_csv(
            index_label="gene_id"
        ),
        X,
        "gene_count_matrix.csv",
    )
    right(
        "cBioPortal",
        X.assign(e=range(len(X)))
        .rename(columns={"e": "Entrez_Gene_Id"})[["Entrez_Gene_Id", *X]]
        .to_csv(sep="\t", index_label="Hugo_Symbol"),
        X,
        "data_rna.txt",
    )
    tcga = pd.concat([X, X[:20].set_axis(["?"] * 20)])
    names = [f"{g}|{n + 1}" for n, g in enumerate(tcga.index)]
    right("TCGA RSEM", tcga.set_axis(names).to_csv(sep="\t", index_label="gene_id"), X, "rsem.txt")
    series = (
        "".join(f'!Series_{n}\t"x"\n' for n in ("title", "summary"))
        + "!series_matrix_table_begin\n"
    )
    log = np.log2(X / X.sum() * 1e6 + 1)
    end = "!series_matrix_table_end\n"
    refused("GEO series matrix", series + log.to_csv(sep="\t", index_label="ID_REF") + end, "log")
    right("GEO series matrix of counts", series + X.to_csv(sep="\t", index_label="ID_REF") + end, X)
    refused("GEO series matrix without a table", series + end, "table", "header")


def add_several():
    X, known = with_id()

    def several(template, give, text=None, broken=False):
        def make(folder):
            paths = []
            for s in X:
                path = folder / template.format(s)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text(X[s].to_numpy()))
                paths.append(path)
            if broken:
                paths[1].write_text("")
            return folder if give == "folder" else tuple(paths)

        return make

    def htseq(x):
        return lines([*zip(known, x, strict=True), ("__no_feature", 5)])

    def rsem(x):
        rows = [(i, "t", 9, 8.5, c, c / 3) for i, c in zip(known, x, strict=True)]
        return lines([HEADS["RSEM"].split(",")[:-1], *rows])

    def salmon(x):
        return under("Salmon", [(i, 9, 8.5, c / 3, c) for i, c in zip(known, x, strict=True)])

    kinds = {
        "HTSeq": ("{}.htseq.counts", htseq),
        "STAR": ("{}.ReadsPerGene.out.tab", lambda x: lines(star(x, 2))),
        "STAR in folders": ("{}/ReadsPerGene.out.tab", lambda x: lines(star(x, 1))),
        "RSEM": ("{}.genes.results", rsem),
        "Salmon in folders": ("{}/quant.genes.sf", salmon),
    }
    for name, (template, text) in kinds.items():
        for give in ("files", "folder"):
            right(f"several of {name}, {give}", several(template, give, text), X)
    refused("one of several is empty", several("{}.genes.results", "files", rsem, True), "S2.genes")
    refused("a folder without tables", lambda folder: folder, "folder")

    def cells(folder):
        (folder / "matrix.mtx.gz").write_bytes(b"")
        return folder

    refused("a folder of single cells", cells, "single cells")
    refused("no such file", lambda folder: folder / "none.csv", "no such file")
    refused(
        "one file twice", lambda folder: (write("a.csv", X.to_csv())(folder),) * 2, "more than once"
    )


def add_h5ad():
    X = data()

    def save(adata):
        def make(folder):
            adata.write_h5ad(folder / "b.h5ad")
            return folder / "b.h5ad"

        return make

    def bulk(values):
        return anndata.AnnData(
            np.asarray(values.T, np.float32),
            pd.DataFrame(index=list(X)),
            pd.DataFrame(index=list(X.index)),
        )

    right("h5ad", save(bulk(X)), X)
    sparse = bulk(X)
    sparse.X = sp.csr_matrix(sparse.X)
    right("h5ad, sparse", save(sparse), X)
    right("h5ad, genes in rows", save(bulk(X).T), X)
    log = np.log1p(X / X.sum() * 1e4)
    layered = bulk(log)
    layered.layers["counts"] = bulk(X).X
    right("h5ad, counts in a layer", save(layered), X)
    raw = bulk(X)
    raw.raw = raw
    raw.X = bulk(log).X
    right("h5ad, counts in raw", save(raw), X)
    refused("h5ad, logarithms alone", save(bulk(log)), "log")
    named = bulk(X)
    named.var["symbol"], named.var_names = list(X.index), [f"g{i}" for i in range(len(X))]
    right("h5ad, symbols in var", save(named), X)
    donors = bulk(X)
    donors.obs["age"] = [1, 2, 3, 4]
    right("h5ad, with metadata", save(donors), X)
    cells = anndata.concat([bulk(X)] * 30)
    rng = np.random.default_rng(0)
    cells.obs_names = ["".join(rng.choice(list("ACGT"), 16)) + "-1" for _ in range(cells.n_obs)]
    refused("h5ad of single cells", save(cells), "cells")


# ----------------------------------------------------- the same again, other data, rows of text


def add_redundant():
    X, rng = data(), np.random.default_rng(3)
    cpm = (X / X.sum() * 1e6).round(3)
    for words, other in ((("raw", "xyz"), cpm), (("A", "B"), cpm), (("all", "dedup"), X // 3)):
        twice = [X.add_suffix(f"_{words[0]}"), other.add_suffix(f"_{words[1]}")]
        refused(f"each sample twice, {words}", pd.concat(twice, axis=1).to_csv(), "2 times")
    twice = pd.concat([X.add_prefix("a."), cpm.add_prefix("b.")], axis=1)
    refused("each sample twice, words in front", twice.to_csv(), "2 times")
    replicates = {f"S{i}_rep{k}": rng.poisson(8 * X.iloc[:, i]) for i in range(3) for k in (1, 2)}
    replicates = pd.DataFrame(replicates, X.index)
    right("technical replicates", replicates.to_csv(), replicates)
    refused("sum of two samples", X.assign(both=X["S1"] + X["S2"]).to_csv(), "sum")
    lanes = {f"{c}_L{k}": rng.poisson(X[c] / 2) for c in X for k in (1, 2)}
    lanes = pd.DataFrame(lanes, X.index)
    for c in X:
        lanes[f"{c}_merged"] = lanes[f"{c}_L1"] + lanes[f"{c}_L2"]
    refused("lanes and their sums", lanes.to_csv(), "sum")
    right("sum and mean", X.assign(Pool=X.sum(axis=1), avrg=X.mean(axis=1)).to_csv(), X)
    many = pd.concat([X.add_suffix(f"_{i}") for i in range(8)], axis=1)
    many = pd.DataFrame(rng.poisson(many), many.index, many.columns)
    right("mean of many", many.assign(avrg=many.mean(axis=1)).to_csv(), many)
    right("mean as an integer", X.assign(avrg=X.mean(axis=1).round()).to_csv(), X)
    lengths = X[["S1", "S2"]].assign(bp=rng.integers(300, 9000, len(X)))
    right("lengths beside two samples", lengths.to_csv(), X[["S1", "S2"]])
    poor = X.assign(degraded=rng.permutation(X["S1"]))
    refused("a sample unlike all others", poor.to_csv(), "degraded", "--columns")
    right("a sample unlike all others, named", poor.to_csv(), poor, columns=tuple(poor))


def add_other_data():
    X, rng = data(), np.random.default_rng(4)
    peaks = X.sample(n=2 * len(X), replace=True, random_state=0)
    summed = peaks.groupby(level=0).sum()
    start = rng.integers(1000, 10**8, len(peaks))
    peaks.insert(0, "gene", peaks.index)
    for i, (name, values) in enumerate({"chr": "chr1", "start": start, "end": start + 500}.items()):
        peaks.insert(i, name, values)
    refused("peaks", peaks.to_csv(index=False), "peaks")
    named = peaks.drop(columns=["chr", "start", "end"])
    named.insert(0, "peak", [f"chr1:{s}-{s + 500}" for s in start])
    refused("peaks by name", named.to_csv(index=False), "peaks")
    right("peaks to be added up", peaks.to_csv(index=False), summed, gene_column="gene")
    exons = peaks.assign(exon_number=1)
    right("exons", exons.to_csv(index=False), summed)
    protein = (X * 1e5 + 7).add_prefix("LFQ intensity ")
    refused("proteins", protein.to_csv(index_label="Gene names"), "proteomics")
    calls = pd.DataFrame((rng.random(X.shape) < 0.05).astype(int), X.index, X.columns)
    refused("mutations", calls.to_csv(), "too small")
    refused("copy numbers", (calls + 2).to_csv(), "too small")
    beta = pd.DataFrame(rng.beta(0.5, 0.5, X.shape), X.index, X.columns)
    refused("methylation", beta.to_csv(), "too small", "log")
    refused("square roots of counts", np.sqrt(X).round(4).to_csv(), "square root")
    cpm = X / X.sum() * 1e6
    refused("square roots of CPM", np.sqrt(cpm).round(4).to_csv(), "square root")
    logs = np.log2(cpm + 1)
    refused("logarithms say their base", logs.to_csv(), "--log 2 undoes it")
    refused("logarithms of another base", logs.to_csv(), "powers of 2", log="e")
    refused("no logarithms to base 2", X.to_csv(), "expected logarithms to base 2", log="2")
    refused("no logarithms to base 10", logs.to_csv(), "base 10", log="10")


def add_text_rows():
    X = data()

    def above(*rows):
        names = [name for name, _ in rows]
        rows = pd.DataFrame([row for _, row in rows], names, X.columns)
        return pd.concat([rows, X.astype(str)]).to_csv(index_label="gene")

    condition = "condition", ["ctrl", "ctrl", "IFN", "IFN"]
    right("a row of conditions", above(condition))
    right("rows of ages and conditions", above(("age", ["44", "51", "60", "61"]), condition))
    right("a row of units", above(("", ["TPM"] * 4)))
    levels = X.set_axis(pd.MultiIndex.from_tuples([("a", c) for c in X]), axis=1)
    right("a header of two rows", levels.to_csv())
    names = ["101", "102", "103", "104"]
    right(
        "numbers as names of samples",
        X.set_axis(names, axis=1).to_csv(index_label="Gensymbol"),
        X.set_axis(names, axis=1),
    )
    for mark in ("\u00a0", "'", "\u202f", " "):
        grouped = X.map(lambda v, mark=mark: f"{v:,}".replace(",", mark))
        right(f"{mark!r} between thousands", grouped.to_csv(sep=";"))
    for mark in ",.":
        mixed, values = (X / 4).map(lambda v: f"{v:.2f}"), (X / 4).round(2)
        mixed["S2"] = X["S2"].map(lambda v, mark=mark: f"{v:,}".replace(",", mark))
        values["S2"] = X["S2"]
        right(f"{mark!r} between thousands of one sample", mixed.to_csv(sep=";"), values)
    one = X.reset_index(names="gene").assign(sample="S2")[["gene", "sample", "S2"]]
    one = one.set_axis(["gene", "sample", "count"], axis=1)
    right("one sample, named by a column", one.to_csv(index=False), X[["S2"]])
    refused("Markdown", "| gene | S1 |\n|---|---|\n| CD3E | 7 |\n", "Markdown")
    refused("dput", 'structure(list(S1 = c(1, 2)), row.names = c("CD3E", "CD4"))\n', "dput")
    for ending in ("/{}.sorted.bam", "/{}Aligned.sortedByCoord.out.bam", "/accepted_hits.bam"):
        paths = [f"/data/{c}{ending.format(c)}" for c in X]
        right(f"paths of alignments {ending}", X.set_axis(paths, axis=1).to_csv())
    barcodes = ["".join(row) for row in np.random.default_rng(5).choice(list("ACGT"), (60, 14))]
    wells = X.iloc[:, [0, 1, 2] * 20].set_axis(barcodes, axis=1)
    refused("samples named by barcodes", wells.to_csv(), "--columns")
    right("barcodes, asked for", wells.to_csv(), wells, columns=tuple(barcodes))

    def files(column):
        def make(folder):
            for c in X:
                X[[c]].set_axis([column], axis=1).to_csv(folder / f"{c}.csv")
            return [folder / f"{c}.csv" for c in X]

        return make

    for column in ("x", "V2", "value", "tumor"):
        right(f"files of one column {column}", files(column))
    raw = anndata.AnnData(np.log1p(X.T.to_numpy(float)), None, pd.DataFrame(index=X.index))
    raw.obs_names, raw.layers["raw"] = list(X), X.T.to_numpy()

    def write_raw(folder):
        raw.write_h5ad(folder / "b.h5ad")
        return folder / "b.h5ad"

    right("h5ad, counts in a layer raw", write_raw)


KINDS = (
    *(add_layouts, add_dialects, add_containers, add_scales, add_numbers, add_names, add_columns),
    *(add_long, add_quantifiers, add_several, add_h5ad, add_redundant, add_other_data),
    add_text_rows,
)


def cases_of(kind):
    """The cases that one of :data:`KINDS` adds."""
    CASES.clear()
    kind()
    return list(CASES)


def judge(case, folder):
    """``(verdict, detail)`` of what the reader makes of a case.

    Verdicts: right, refused clearly, refused unclearly, silently wrong, crash.
    """
    genes, gene_ids = model()
    options = reader.BulkOptions(**case.options) if hasattr(reader, "BulkOptions") else None
    if options is None and case.options:
        return "refused unclearly", "no such option"
    arguments = [options] if options is not None else []
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            bulk = reader.read_bulk(case.make(folder), genes, gene_ids, *arguments)
    except InputError as error:
        text = str(error)
        clear = "\n" not in text and len(text) < 700
        clear = clear and any(w.lower() in text.lower() for w in case.words)
        return ("refused clearly" if case.right is None and clear else "refused unclearly"), text
    except Exception as error:
        return "crash", f"{type(error).__name__}: {error}"
    if case.right is None:
        return "silently wrong", f"read as {len(bulk.samples)} samples"
    return compare(case.right, bulk.values, bulk.measured, bulk.samples, genes)


def compare(expected, X, present, samples, genes):
    """The verdict on what was read, against values (genes x samples)."""
    names = case_names(expected.columns)
    if sorted(case_names(samples)) != sorted(names):
        return "silently wrong", f"samples {samples[:6]}"
    expected = expected.iloc[:, [names.index(name) for name in case_names(samples)]]
    position = {gene: i for i, gene in enumerate(genes)}
    known = expected[[gene in position for gene in expected.index]]
    rows = [position[gene] for gene in known.index]
    found = X.toarray()[:, rows].T
    share = present[rows].mean()
    if share < 0.75:
        return "silently wrong", f"{share:.0%} of its genes found"
    kept = present[rows]
    a, b = found[kept], known.to_numpy(float)[kept]
    a, b = a / a.sum(axis=0), b / b.sum(axis=0)
    off = np.abs(a - b).max() / b.max()
    others = np.delete(X.toarray(), rows, axis=1).sum() / X.sum()
    if off > 2e-3 or others > 0.02:
        return "silently wrong", f"values off by {off:.3g}, {others:.1%} in other genes"
    return "right", ""


def case_names(samples):
    """Names of samples in order, without what files add behind a name."""
    return [str(name).removesuffix(".bam").split("/")[-1] for name in samples]


def main():
    import tempfile
    from collections import Counter

    counts = Counter()
    for case in [case for kind in KINDS for case in cases_of(kind)]:
        with tempfile.TemporaryDirectory() as folder:
            verdict, detail = judge(case, Path(folder))
        counts[verdict] += 1
        expected = "right" if case.right is not None else "refused clearly"
        mark = " " if verdict == expected else "*"
        why = detail[:150] if mark == "*" else ""
        print(f"{mark} {case.name:45s} {expected:16s} {verdict:18s} {why}")
    print(f"{counts.total()} cases: {dict(counts)}")


if __name__ == "__main__":
    main()
