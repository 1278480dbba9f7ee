"""Files of bulk samples as tables: what the file is by its bytes, unpacked and parsed."""

import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from readers.bounded import no_file, read_excel
from readers.containers import (
    REMEDIES,
    is_pipe,
    name_of_format,
    read_source,
    to_utf8,
)
from readers.count_checks import check_sparse
from readers.counts import COUNT_LAYERS
from readers.hdf5 import check_hdf5, readable
from readers.tables import clean_lines, read_text_table
from runtime.errors import InputError, one_line, some

IN_MEMORY = Path("bulk")  # what messages call samples that come from no file


@dataclass
class Source:
    """A table as its file has it.

    Attributes:
        path: the file. table: DataFrame (R x C), the first column text. format: in a few words.
        headerless: whether the columns have no names of their own. text: the same table with all
            columns as text, made when it is asked for.
    """

    path: Path
    table: pd.DataFrame
    format: str
    headerless: bool = False
    data: bytes | None = None
    n_text_rows: int = 0

    def as_text(self, i):
        """The columns i (a list) as text, as the file has them; None if it is no text file."""
        if self.data is None:
            return None
        table, _ = read_text_table(self.data, self.path, text=True)
        return table.iloc[self.n_text_rows :, i].to_numpy(object)


def read_any_table(path):
    """The Source of a file or a pipe, in the orientation that it has there.

    Raises:
        InputError: the file is missing, unreadable, or of a format that holds no table.
    """
    try:
        head = b""
        if not is_pipe(path):  # a pipe can be opened only once
            with open(path, "rb") as file:
                head = file.read(8)
    except FileNotFoundError as error:
        raise no_file(path, "bulk samples for --bulk") from error
    except OSError as error:
        raise InputError(f"{path}: not a readable table ({one_line(error)})") from error
    if head.startswith(b"\x89HDF") or path.suffix == ".h5ad":
        return read_bulk_h5ad(path)
    data, packing = read_source(path)
    kind = name_of_format(data)
    if kind in ("Parquet", "Feather"):
        return Source(path, read_columnar(data, kind, path), kind)
    if kind is not None:
        remedy = REMEDIES.get(kind, "export it as csv")
        raise InputError(f"{path}: found a file of format {kind}, expected a table; {remedy}")
    if data.startswith(b"PK\x03\x04"):
        return Source(path, read_workbook(data, path), "Excel")
    data, encoding = to_utf8(data, path)
    check_text(data, path)
    data = clean_lines(data)
    table, headerless = read_text_table(data, path)
    details = [packing] * bool(packing) + [encoding] * (encoding != "UTF-8")
    name = f"text table ({', '.join(details)})" if details else "text table"
    return Source(path, table, name, headerless, data)


def check_text(data, path):
    """Refuse text that is no table of expression, by how it begins.

    Raises:
        InputError: it is a web page, reads, variants or the like.
    """
    head = data[:2000].lstrip()
    kinds = {
        "a web page": head[:1] == b"<",
        "JSON": head[:1] in (b"{", b"["),
        "a VCF of variants": head.startswith(b"##fileformat=VCF"),
        "sequencing reads (FASTQ)": re.match(rb"@[^\n]*\n[ACGTN]+\n\+", head) is not None,
        "sequences (FASTA)": re.match(rb">[^\n]*\n[ACGTNacgtn]+\n", head) is not None,
        "a Matrix Market matrix of single cells": head.startswith(b"%%MatrixMarket"),
        "a GTF or GFF of genes": re.search(
            rb"^[^\t\n]+\t[^\t\n]+\t(gene|transcript|exon|mRNA|CDS)\t\d+\t\d+\t", head, re.M
        )
        is not None,
        "a Markdown table": re.match(rb"\|[^\n]*\|\s*\n\|[ :|-]+\n", head) is not None,
        "an R object as text (dput)": head.startswith(b"structure("),
        "a printed tibble": head.startswith(b"# A tibble"),
        "featureCounts' summary": re.match(rb"Status\t[^\n]*\n(Assigned|Unassigned)", head)
        is not None,
    }
    for kind, found in kinds.items():
        if found:
            raise InputError(f"{path}: found {kind}, not a readable table of genes and samples")


def read_columnar(data, kind, path):
    """The table of a Parquet or Feather file, if pandas can read it here.

    Raises:
        InputError: it cannot.
    """
    reader = pd.read_parquet if kind == "Parquet" else pd.read_feather
    try:
        table = reader(io.BytesIO(data))
    except ImportError as error:
        raise InputError(
            f"{path}: found a file of format {kind}, which takes the package pyarrow; install it "
            "or export the table as csv"
        ) from error
    except Exception as error:  # pyarrow raises errors of its own
        raise InputError(f"{path}: not a readable table ({one_line(error)})") from error
    if not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index()
    first = table.columns[0]
    return table.astype({first: str}).set_axis([str(name) for name in table.columns], axis=1)


def read_workbook(data, path):
    """The sheet of a workbook that holds the table, through the same reader as text.

    Raises:
        InputError: it is unreadable, too large when unpacked, or several sheets may be the table.
    """
    try:
        sheets = read_excel(io.BytesIO(data), sheet_name=None, header=None, dtype=object)
    except Exception as error:
        raise InputError(
            f"{path}: not a readable Excel file ({one_line(error)}); export it as csv"
        ) from error
    most = max((len(sheet) for sheet in sheets.values()), default=0)
    large = [n for n, sheet in sheets.items() if min(sheet.shape) > 1 and len(sheet) > most / 2]
    if len(large) != 1:
        raise InputError(
            f"{path}: found {len(large)} sheets that may be the table of samples "
            f"({some(large or list(sheets))}), expected one; export it as csv"
        )
    if len(sheets) > 1:
        print(f"{path}: sheet {large[0]} read, the largest of {len(sheets)}")
    text = sheets[large[0]].map(lambda value: "" if pd.isna(value) else as_text(value))
    return read_text_table(text.to_csv(sep="\t", header=False, index=False).encode(), path)[0]


def as_text(value):
    """A cell of a workbook as text; a date as spreadsheets show the gene that became one."""
    if hasattr(value, "strftime"):
        return f"{value.day}-{value.strftime('%b')}"
    return str(value)


def read_bulk_h5ad(path):
    """The bulk samples of an ``.h5ad`` (samples x genes), with genes in rows.

    Counts are taken from ``layers["counts"]`` or ``raw.X`` where X is none, as for ``--data``.
    Columns of text in ``.var`` stand before the samples.
    """
    import anndata
    import h5py

    with readable(path):
        check_hdf5(path)
        with h5py.File(path, "r") as file:
            if "matrix" in file and "barcodes" in file["matrix"]:
                raise InputError(
                    f"{path}: found a 10x matrix of single cells, expected bulk samples; for a "
                    "reference it is --data"
                )
        with warnings.catch_warnings():  # repeated genes are summed
            warnings.filterwarnings("ignore", message=".*names are not unique")
            warnings.simplefilter("ignore", FutureWarning)  # of files by older versions
            adata = anndata.read_h5ad(path)
    return source_of(adata, path)


def in_memory(bulk):
    """Whether bulk samples are no path but an AnnData or a DataFrame."""
    return isinstance(bulk, pd.DataFrame) or hasattr(bulk, "obs_names")


def source_of_memory(bulk):
    """The Source of an AnnData or a DataFrame (samples x genes).

    Raises:
        InputError: it holds no matrix, or too large values.
    """
    if not isinstance(bulk, pd.DataFrame):
        return source_of(bulk, IN_MEMORY)
    table = bulk.T.rename_axis(None)
    table.columns = [str(name) for name in table.columns]
    table.insert(0, "", table.index.astype(str), allow_duplicates=True)
    return Source(IN_MEMORY, table.reset_index(drop=True), "DataFrame")


def source_of(adata, path):
    """The Source of an AnnData; see :func:`read_bulk_h5ad`."""
    X, var, place = matrix_of(adata, path)
    X = check_sparse(X, path)
    X = X.toarray() if sp.issparse(X) else np.asarray(X)
    text = var.select_dtypes(exclude=["number", "bool"]).astype(str)
    table = pd.concat(
        [
            pd.DataFrame({"": var.index.astype(str)}),
            text.reset_index(drop=True),
            pd.DataFrame(X.T, columns=[str(name) for name in adata.obs_names]),
        ],
        axis=1,
    )
    return Source(path, table, f"{'AnnData' if path is IN_MEMORY else '.h5ad'}, {place}")


def matrix_of(adata, path):
    """``(matrix, its .var, name)`` of the counts of an AnnData; X if none is of integers.

    Raises:
        InputError: it holds no matrix.
    """
    layers = [name for name in COUNT_LAYERS if name in adata.layers]
    places = [(f"layers[{name!r}]", adata.layers[name], adata.var) for name in layers]
    places.append(("X", adata.X, adata.var))
    if adata.raw is not None:
        places.append(("raw.X", adata.raw.X, adata.raw.var))
    places = [place for place in places if place[1] is not None]
    if not places:
        raise InputError(f"{path}: found no matrix in it, expected bulk samples in X")
    for name, X, var in places:
        values = X.data if sp.issparse(X) else np.asarray(X)
        if values.dtype.kind in "biuf" and np.all(values == np.rint(values)) and values.size:
            return X, var, name
    name, X, var = next((place for place in places if place[0] == "X"), places[0])
    return X, var, name


def read_sample_metadata(paths, samples):
    """What an ``.h5ad`` of bulks says of its samples.

    Args:
        paths: of --bulk. samples: names as they were read (S).

    Returns:
        DataFrame (S x columns of text, numbers or categories), or None if there is none: for
        tables, for several files, and for an ``.h5ad`` whose samples have no columns.
    """
    import anndata

    if len(paths) != 1 or Path(paths[0]).is_dir() or is_pipe(Path(paths[0])):
        return None
    with open(paths[0], "rb") as file:
        if file.read(8)[:4] != b"\x89HDF":
            return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = anndata.read_h5ad(paths[0], backed="r")
    frames = [adata.obs, adata.var]
    adata.file.close()
    frame = next((f for f in frames if set(samples) <= set(f.index) and f.index.is_unique), None)
    if frame is None or not frame.shape[1]:
        return None
    frame = frame.loc[list(samples)].copy()
    for name, column in frame.items():
        if not pd.api.types.is_numeric_dtype(column):  # categories are what every .h5ad can hold
            frame[name] = column.astype(object).map(str, na_action="ignore").astype("category")
    return frame
