"""Bulk samples: csv, tsv, GCT or ``.h5ad``, genes in rows or in columns."""

import csv
import itertools
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from readers.bounded import MOST_COLUMNS, UNREADABLE, open_bounded, read_table
from readers.counts import check_sparse
from readers.gene_names import bare_id, find_genes, n_found, name_map
from readers.hdf5 import check_hdf5
from runtime.errors import InputError, one_line, some

# Columns of numbers that stand beside the samples in tables of featureCounts, RSEM, Salmon, biomaRt
# and their like (in any case).
NOT_SAMPLES = {
    *("chr", "chrom", "chromosome", "seqname", "seqnames", "start", "end", "strand", "width"),
    *("length", "gene_length", "effective_length", "effectivelength", "eff_length"),
    *("entrez", "entrezid", "entrez_id", "entrezgene", "entrezgene_id", "entrez_gene_id"),
}

NO_VALUE = ("", "NA", "NaN", "nan")  # how tables write a cell in which nothing stands


def read_bulk_h5ad(path):
    """Bulk samples of an ``.h5ad`` (samples x genes) as a table like :func:`read_bulk_csv`'s.

    Genes are in rows; columns of text in ``.var`` stand beside the samples.
    """
    import anndata

    try:
        with warnings.catch_warnings():  # repeated genes are summed
            warnings.filterwarnings("ignore", message=".*names are not unique")
            check_hdf5(path)
            adata = anndata.read_h5ad(path)
    except InputError:
        raise
    except Exception as error:  # h5py and anndata raise many kinds on a broken file
        raise InputError(f"{path}: not a readable .h5ad file ({one_line(error)})") from error
    if adata.X is None:
        raise InputError(f"{path}: found no matrix in it, expected bulk samples in X")
    X = check_sparse(adata.X, path)
    X = X.toarray() if sp.issparse(X) else X
    text = adata.var.select_dtypes(exclude=["number", "bool"]).astype(str)
    return pd.concat([text, pd.DataFrame(X.T, adata.var_names, adata.obs_names)], axis=1)


def header_line(lines):
    """Which of a table's first lines is its header: no empty line, comment or size of a GCT.

    A line that begins with # is a comment unless it has as many fields as the line after it.
    """
    at = 0
    while at < len(lines) - 1:
        line, after = lines[at : at + 2]
        mark = max("\t,;", key=after.count)
        header = after[:1] != "#" and 0 < line.count(mark) == after.count(mark)
        if line.startswith(("#1.2", "#1.3")):  # GCT: the line after it holds its size
            at += 2
        elif line.strip("\t,; \r\n") and (line[0] != "#" or header):
            break
        else:
            at += 1
    return at


def read_bulk_csv(path):
    """A csv, tsv or GCT as it stands: the first column is the index, and all names are text."""
    try:
        with open_bounded(path) as file:
            longest = 100 * MOST_COLUMNS  # a file without line breaks is one line
            lines = [file.readline(longest).decode("utf-8-sig") for _ in range(20)]
        lines = list(itertools.takewhile(bool, lines))  # to the end of the file
        skip = header_line(lines)
        first, *below = *lines[skip:], ""
        below = next((line for line in below if line.strip()), "")

        def fields(mark):
            return [next(csv.reader([s], delimiter=mark), []) for s in (first, below)]

        def fit(mark):  # names may hold more commas than there are tabs
            try:
                header, row = map(len, fields(mark))
            except csv.Error:  # a field that is too long: another mark parts it
                return False, 0
            return row > 1 and row - header in (0, 1), first.count(mark)

        separator = max("\t,;", key=fit)
        header, row = fields(separator)
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable table ({one_line(error)})") from error
    if len(row) == len(header) + 1:  # R's write.table gives the row names no header
        header = ["", *header]
    if not header or len(row) > len(header):
        raise InputError(
            f"{path}: found {len(header)} names in its header ({some(header)}) and {len(row)} "
            "fields in the line below, expected a table"
        )
    table = read_table(
        path,
        sep=separator,
        header=None,  # pandas would rename repeated columns, but repeated genes are to be summed
        names=range(len(header)),
        skiprows=skip + 1,
        dtype={0: str},  # a sample named 001 stays 001
        low_memory=False,
        encoding="utf-8-sig",
    )
    return table.set_index(0).set_axis(header[1:], axis=1)


def is_annotation(table):
    """Which columns (C) of a bulk table tell something else than a sample's values, as a mask.

    Those named in ``NOT_SAMPLES``, and those of text without a single number.
    """
    mask = np.array([str(name).lower() in NOT_SAMPLES for name in table.columns], bool)
    for i in np.flatnonzero([dtype.kind not in "iuf" for dtype in table.dtypes]):
        text = table.iloc[:, i].astype(str)
        # Commas read as points: a sample with decimal commas must not pass for text.
        numbers = pd.to_numeric(text.str.replace(",", "."), errors="coerce")
        mask[i] |= numbers.isna().all() and not text.isin(NO_VALUE).all()
    return mask


def check_bulk(values, where, samples, names):
    """The values of bulk samples as numbers, without the rows and columns that hold nothing.

    Args:
        values: (S x G), numbers or text. where: what messages name. samples (S), names (G):
            arrays of names; a nameless sample without values is none, as spreadsheets leave them.

    Returns:
        ``(X, filled, measured)``: float64 values of the samples ``filled`` (mask S) in the genes
        ``measured`` (mask G), those with a value in any sample.

    Raises:
        InputError: a value is not a number, not finite or negative; a sample is empty or none
            there; or two share a name.
    """
    X = pd.to_numeric(values.ravel(), errors="coerce").reshape(values.shape).astype(np.float64)
    nothing = np.isnan(X)
    filled = ~nothing.all(axis=1) | (samples != "")
    measured = ~nothing.all(axis=0)
    measured[~measured] = ~np.isin(values[:, ~measured].astype(str), NO_VALUE).all(axis=0)
    X, values = (a[filled][:, measured] for a in (X, values))
    samples, left_out, names = samples[filled], names[~measured], names[measured]
    if not len(samples):
        raise InputError(f"{where}: found no sample beside the genes, expected columns of numbers")
    if (left_out != "").any():
        print(f"{where}: {np.sum(left_out != ''):,} genes without any value left out")
    wrong = ~np.isfinite(X) | (X < 0) | (X > 1e15)  # a sum must stay a number, too
    if wrong.any():
        sample, gene = (int(i[0]) for i in np.nonzero(wrong))
        found = values[sample, gene]
        raise InputError(
            f"{where}: found {repr(found) if isinstance(found, str) else f'{found:g}'} (sample "
            f"{samples[sample]}, gene {names[gene]}), expected a number: counts, TPM or CPM, 0 to "
            "1e15"
        )
    twice = samples[pd.Index(samples).duplicated()]
    if len(twice):
        raise InputError(f"{where}: sample names occur more than once ({some(twice)})")
    empty = samples[X.sum(axis=1) < 1e-6]
    if len(empty):
        raise InputError(
            f"{where}: {len(empty)} of {len(samples)} samples are empty ({some(empty)}), expected "
            "counts in every sample"
        )
    return X, filled, measured


def read_bulk(path, genes, gene_ids=None):
    """Read bulk samples: csv, tsv or GCT (plain or .gz), or ``.h5ad``; genes in rows or in columns.

    A gene is found by its exact name, else by its Ensembl id without version; names of the same
    gene are summed. The orientation is the one in which more genes are found. Values may be
    counts, TPM or CPM: only ratios within a sample matter. Columns of annotation are left out;
    the one that names more of the model's genes than the first column does names the rows.

    Args:
        genes: the model's genes (M). gene_ids: their other names (M), "" where there is none.

    Returns:
        ``(X, present, samples)``: CSR float64 (samples x M), a mask (M) of the genes found, and
        the names of the samples.

    Raises:
        InputError: unreadable, no known gene, or as :func:`check_bulk`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected bulk samples for --bulk")
    if path.suffix.lower() in (".xlsx", ".xls"):
        raise InputError(f"{path}: found an Excel file, expected a table; export it as csv")
    table = (read_bulk_h5ad if path.suffix == ".h5ad" else read_bulk_csv)(path)
    gene_ids = genes if gene_ids is None else gene_ids
    known = name_map(genes, gene_ids)
    names, by_column = table.index, find_genes(table.columns, known)
    extra = is_annotation(table) & (by_column < 0)
    by_row, named_by = find_genes(names, known), None
    for i in np.flatnonzero(extra):
        column = table.iloc[:, i].astype(str)
        at = find_genes(column, known)
        if n_found(at) > n_found(by_row):
            names, by_row, named_by = column, at, table.columns[i]
    in_rows = n_found(by_row) > n_found(by_column)

    others = [o for gene, o in zip(genes, gene_ids, strict=True) if o not in ("", gene)]
    expected = some(genes) + (f", or {some(others)}" if others else "")
    if not in_rows and n_found(by_column) == 0:
        no_ids = "" if others else "; the weights hold no ids or other names of them"
        raise InputError(
            f"{path}: neither its rows ({some(table.index)}) nor its columns "
            f"({some(table.columns)}) are genes known to the model ({expected}{no_ids})"
        )
    if extra.any():
        print(
            f"{path}: {extra.sum():,} columns that are not {'samples' if in_rows else 'genes'} "
            f"left out ({some(table.columns[extra], 8)})"
        )
    values, columns = table.loc[:, ~extra].to_numpy(), table.columns[~extra]
    if in_rows:
        values, samples, at = values.T, columns, by_row
        if named_by is not None:
            print(f"{path}: gene names taken from column {named_by}")
    else:
        names, samples, at = columns, table.index, by_column[~extra]
    names, samples = np.array(names, object), np.array(samples, object)
    X, filled, measured = check_bulk(values, path, samples, names)
    samples, names, at = list(samples[filled]), names[measured], at[measured]

    use = np.flatnonzero(at >= 0)
    n, n_by_symbol = n_found(at), n_found(at[[bare_id(name) is None for name in names]])
    if len(use) > n:
        print(f"{path}: {len(use) - n:,} repeated genes summed")
    ways = ((n_by_symbol, "symbol"), (n - n_by_symbol, "Ensembl id"))
    ways = ", ".join(f"{number:,} by {way}" for number, way in ways if number)
    print(
        f"{path}: {len(samples):,} bulk samples x {len(names):,} genes; {n:,} of the model's "
        f"{len(genes):,} genes found ({100 * n / len(genes):.1f} %: {ways})"
    )
    if n < len(genes) / 2:
        print(
            f"warning: {path}: fewer than half of the model's genes found, so results will be "
            f"poor; expected names such as {expected}, found {some(names)}",
            file=sys.stderr,
        )
    S = sp.csr_matrix((np.ones(len(use)), (use, at[use])), shape=(len(at), len(genes)))
    present = np.zeros(len(genes), bool)
    present[at[use]] = True
    return sp.csr_matrix(X @ S), present, samples
