"""Bulk samples from csv, tsv, GCT or ``.h5ad``, with genes in rows or in columns."""

import csv
import itertools
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from readers.bounded import MAX_COLUMNS, UNREADABLE, open_bounded, read_table
from readers.counts import check_sparse
from readers.gene_names import bare_id, find_genes, n_found, name_map
from readers.hdf5 import check_hdf5
from runtime.errors import InputError, one_line, some

# Columns of numbers that are not samples, in the tables of featureCounts, RSEM, Salmon, biomaRt and
# others; compared in lower case.
NOT_SAMPLES = {
    *("chr", "chrom", "chromosome", "seqname", "seqnames", "start", "end", "strand", "width"),
    *("length", "gene_length", "effective_length", "effectivelength", "eff_length"),
    *("entrez", "entrezid", "entrez_id", "entrezgene", "entrezgene_id", "entrez_gene_id"),
}

NO_VALUE = ("", "NA", "NaN", "nan")  # how tables write a missing value


@dataclass
class BulkTable:
    """Bulk samples in the genes of their file.

    Attributes:
        values: (S x G), numbers or text. samples: names (S). genes: names (G).
        positions: of each gene in the model (G), -1 if the model does not have it.
    """

    values: np.ndarray
    samples: np.ndarray
    genes: np.ndarray
    positions: np.ndarray


def read_bulk(path, genes, gene_ids=None):
    """Read bulk samples: csv, tsv or GCT (plain or .gz), or ``.h5ad``; genes in rows or in columns.

    A gene is found by its exact name, else by its Ensembl id without version; rows or columns of
    the same gene are summed. Genes are taken to be where more of the model's genes are found.
    Values may be counts, TPM or CPM, as only ratios within a sample matter. Columns of annotation
    are left out; if one names more of the model's genes than the first column does, it names the
    rows.

    Args:
        path: the file. genes: the model's genes (M). gene_ids: their other names (M), "" where
            there is none.

    Returns:
        ``(X, present, samples)``: CSR float64 (S x M), a mask (M) of the genes found, and the
        names of the samples (S).

    Raises:
        InputError: the file is unreadable, has no gene of the model, or see :func:`check_bulk`.
    """
    path = Path(path)
    gene_ids = genes if gene_ids is None else gene_ids
    bulk = find_samples(read_any_table(path), genes, gene_ids, path)
    bulk = check_bulk(bulk, path)
    report(bulk, genes, gene_ids, path)
    return *sum_by_gene(bulk, len(genes)), list(bulk.samples)


# -------------------------------------------------------------------------------------- files


def read_any_table(path):
    """The table of a file as a DataFrame, in the orientation that it has there.

    Raises:
        InputError: the file is missing, unreadable or an Excel file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected bulk samples for --bulk")
    if path.suffix.lower() in (".xlsx", ".xls"):
        raise InputError(f"{path}: found an Excel file, expected a table; export it as csv")
    return (read_bulk_h5ad if path.suffix == ".h5ad" else read_bulk_csv)(path)


def read_bulk_h5ad(path):
    """The bulk samples of an ``.h5ad`` (samples x genes), with genes in rows.

    Columns of text in ``.var`` stand before the samples.
    """
    import anndata

    try:
        with warnings.catch_warnings():  # repeated genes are summed
            warnings.filterwarnings("ignore", message=".*names are not unique")
            check_hdf5(path)
            adata = anndata.read_h5ad(path)
    except InputError:
        raise
    except Exception as error:  # h5py and anndata raise many types of errors on broken files
        raise InputError(f"{path}: not a readable .h5ad file ({one_line(error)})") from error
    if adata.X is None:
        raise InputError(f"{path}: found no matrix in it, expected bulk samples in X")
    X = check_sparse(adata.X, path)
    X = X.toarray() if sp.issparse(X) else X
    text = adata.var.select_dtypes(exclude=["number", "bool"]).astype(str)
    return pd.concat([text, pd.DataFrame(X.T, adata.var_names, adata.obs_names)], axis=1)


def read_bulk_csv(path):
    """A csv, tsv or GCT as it is, with its first column as the index, and all names as text."""
    try:
        with open_bounded(path) as file:
            longest = 100 * MAX_COLUMNS  # a file without line breaks is one line
            lines = [file.readline(longest).decode("utf-8-sig") for _ in range(20)]
        lines = list(itertools.takewhile(bool, lines))  # to the end of the file
        n_skipped = find_header(lines)
        header, *below = *lines[n_skipped:], ""
        first_row = next((line for line in below if line.strip()), "")
        separator = find_separator(header, first_row)
        names, fields = (split(line, separator) for line in (header, first_row))
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable table ({one_line(error)})") from error
    if len(fields) == len(names) + 1:  # R's write.table leaves the row names without a header
        names = ["", *names]
    if not names or len(fields) > len(names):
        raise InputError(
            f"{path}: found {len(names)} names in its header ({some(names)}) and {len(fields)} "
            "fields in the line below, expected a table"
        )
    table = read_table(
        path,
        sep=separator,
        header=None,  # pandas would rename repeated columns, but repeated genes are summed
        names=range(len(names)),
        skiprows=n_skipped + 1,
        dtype={0: str},  # a sample named 001 stays 001
        low_memory=False,
        encoding="utf-8-sig",
    )
    return table.set_index(0).set_axis(names[1:], axis=1)


def find_header(lines):
    """Position of the header among a table's first lines.

    Empty lines, comments and the size of a GCT come before it. A line that begins with # is a
    comment unless it has as many fields as the next line.
    """
    i = 0
    while i < len(lines) - 1:
        line, next_line = lines[i : i + 2]
        separator = max("\t,;", key=next_line.count)
        n_separators = line.count(separator)
        is_header = next_line[:1] != "#" and 0 < n_separators == next_line.count(separator)
        if line.startswith(("#1.2", "#1.3")):  # GCT: the next line is its size
            i += 2
        elif line.strip("\t,; \r\n") and (line[0] != "#" or is_header):
            break
        else:
            i += 1
    return i


def split(line, separator):
    """The fields of a line of a csv."""
    return next(csv.reader([line], delimiter=separator), [])


def find_separator(header, row):
    """The most frequent of tab, comma and semicolon that gives two lines the same number of fields.

    The header may be a field short, as in :func:`read_bulk_csv`.
    """

    def score(separator):
        try:
            n_names, n_fields = (len(split(line, separator)) for line in (header, row))
        except csv.Error:  # the field is too long, so it is not the separator
            return False, 0
        # Equal lengths count first: names may hold more commas than there are tabs.
        return n_fields > 1 and n_fields - n_names in (0, 1), header.count(separator)

    return max("\t,;", key=score)


# --------------------------------------------------------------------------- samples and genes


def find_samples(table, genes, gene_ids, path):
    """Find the genes of a table and put the samples into rows.

    Args:
        table: of :func:`read_any_table`. genes, gene_ids: the model's (M). path: for messages.

    Returns:
        BulkTable; values are numbers or text.

    Raises:
        InputError: neither rows nor columns are genes of the model.
    """
    known = name_map(genes, gene_ids)
    in_columns = find_genes(table.columns, known)
    annotation = is_annotation(table) & (in_columns < 0)
    row_names, in_rows, named_by = find_row_names(table, annotation, known)
    genes_in_rows = n_found(in_rows) > n_found(in_columns)
    if not genes_in_rows and n_found(in_columns) == 0:
        no_ids = "; the weights hold no ids or other names of them"
        raise InputError(
            f"{path}: neither its rows ({some(table.index)}) nor its columns "
            f"({some(table.columns)}) are genes known to the model ({examples(genes, gene_ids)}"
            f"{'' if second_names(genes, gene_ids) else no_ids})"
        )
    if annotation.any():
        print(
            f"{path}: {annotation.sum():,} columns that are not "
            f"{'samples' if genes_in_rows else 'genes'} left out "
            f"({some(table.columns[annotation], 8)})"
        )
    values = table.loc[:, ~annotation].to_numpy()
    column_names = np.array(table.columns[~annotation], object)
    if not genes_in_rows:
        samples = np.array(table.index, object)
        return BulkTable(values, samples, column_names, in_columns[~annotation])
    if named_by is not None:
        print(f"{path}: gene names taken from column {named_by}")
    return BulkTable(values.T, column_names, np.array(row_names, object), in_rows)


def is_annotation(table):
    """Which columns (C) of a table cannot be samples, as a mask.

    Those are the columns named in ``NOT_SAMPLES``, and columns of text without a single number.
    """
    mask = np.array([str(name).lower() in NOT_SAMPLES for name in table.columns], bool)
    for i in np.flatnonzero([dtype.kind not in "iuf" for dtype in table.dtypes]):
        text = table.iloc[:, i].astype(str)
        # Decimal commas make a number, too: such a sample is an error, not annotation.
        numbers = pd.to_numeric(text.str.replace(",", "."), errors="coerce")
        mask[i] |= numbers.isna().all() and not text.isin(NO_VALUE).all()
    return mask


def find_row_names(table, annotation, known):
    """The names of the rows: the first column, or one of annotation that has more known genes.

    Args:
        table: of R rows and C columns. annotation: mask (C). known: see :func:`name_map`.

    Returns:
        ``(names, positions, column)``: names (R), their positions in the model (R), and the name
        of the column of annotation, None for the first column.
    """
    names, positions, named_by = table.index, find_genes(table.index, known), None
    for i in np.flatnonzero(annotation):
        column = table.iloc[:, i].astype(str)
        in_column = find_genes(column, known)
        if n_found(in_column) > n_found(positions):
            names, positions, named_by = column, in_column, table.columns[i]
    return names, positions, named_by


def second_names(genes, gene_ids):
    """The other names of genes that differ from their names."""
    return [other for gene, other in zip(genes, gene_ids, strict=True) if other not in ("", gene)]


def examples(genes, gene_ids):
    """A few names that the model knows, for messages."""
    others = second_names(genes, gene_ids)
    return some(genes) + (f", or {some(others)}" if others else "")


# ------------------------------------------------------------------------------------- values


def check_bulk(bulk, where):
    """Check values and names, and drop samples and genes that have no value at all.

    Args:
        bulk: BulkTable; values are numbers or text. where: what messages name.

    Returns:
        BulkTable; values are float64. A sample without values is dropped only if it has no name
        either, as the empty columns of spreadsheets.

    Raises:
        InputError: a value is not a number, not finite, negative or too large; a sample is empty;
            two samples have the same name; or there is no sample.
    """
    X = pd.to_numeric(bulk.values.ravel(), errors="coerce").astype(np.float64)
    X = X.reshape(bulk.values.shape)
    missing = np.isnan(X)
    filled = ~missing.all(axis=1) | (bulk.samples != "")  # (S)
    measured = ~missing.all(axis=0)  # (G)
    text = bulk.values[:, ~measured].astype(str)
    measured[~measured] = ~np.isin(text, NO_VALUE).all(axis=0)  # other text is an error
    original, left_out = bulk.values[filled][:, measured], bulk.genes[~measured]
    X = X[filled][:, measured]
    bulk = BulkTable(X, bulk.samples[filled], bulk.genes[measured], bulk.positions[measured])
    if not len(bulk.samples):
        raise InputError(f"{where}: found no sample beside the genes, expected columns of numbers")
    if (left_out != "").any():
        print(f"{where}: {np.sum(left_out != ''):,} genes without any value left out")
    check_values(bulk, original, where)
    return bulk


def check_values(bulk, original, where):
    """Raise the errors of :func:`check_bulk`; original: the values (S x G) as the file has them."""
    X, samples = bulk.values, bulk.samples
    wrong = ~np.isfinite(X) | (X < 0) | (X > 1e15)  # sums must stay finite
    if wrong.any():
        i, j = np.argwhere(wrong)[0]
        value = original[i, j]
        shown = repr(value) if isinstance(value, str) else f"{value:g}"
        raise InputError(
            f"{where}: found {shown} (sample {samples[i]}, gene {bulk.genes[j]}), expected a "
            "number: counts, TPM or CPM, 0 to 1e15"
        )
    repeated = samples[pd.Index(samples).duplicated()]
    if len(repeated):
        raise InputError(f"{where}: sample names occur more than once ({some(repeated)})")
    empty = samples[X.sum(axis=1) < 1e-6]
    if len(empty):
        raise InputError(
            f"{where}: {len(empty)} of {len(samples)} samples are empty ({some(empty)}), expected "
            "counts in every sample"
        )


def sum_by_gene(bulk, n_genes):
    """Sum the values of each gene of the model.

    Returns:
        ``(X, present)``: CSR float64 (S x M), and a mask (M) of the genes that the bulk has.
    """
    rows = np.flatnonzero(bulk.positions >= 0)  # (n)
    one_hot = (np.ones(len(rows)), (rows, bulk.positions[rows]))
    S = sp.csr_matrix(one_hot, shape=(len(bulk.positions), n_genes))  # (G, M)
    present = np.zeros(n_genes, bool)
    present[bulk.positions[rows]] = True
    return sp.csr_matrix(bulk.values @ S), present


def report(bulk, genes, gene_ids, path):
    """Print how many of the model's genes were found, and warn if they are few."""
    n = n_found(bulk.positions)
    n_repeated = np.sum(bulk.positions >= 0) - n
    if n_repeated:
        print(f"{path}: {n_repeated:,} repeated genes summed")
    n_by_symbol = n_found(bulk.positions[[bare_id(name) is None for name in bulk.genes]])
    ways = ((n_by_symbol, "symbol"), (n - n_by_symbol, "Ensembl id"))
    ways = ", ".join(f"{number:,} by {way}" for number, way in ways if number)
    print(
        f"{path}: {len(bulk.samples):,} bulk samples x {len(bulk.genes):,} genes; {n:,} of the "
        f"model's {len(genes):,} genes found ({100 * n / len(genes):.1f} %: {ways})"
    )
    if n < len(genes) / 2:
        print(
            f"warning: {path}: fewer than half of the model's genes found, so results will be "
            f"poor; expected names such as {examples(genes, gene_ids)}, found {some(bulk.genes)}",
            file=sys.stderr,
        )
