"""Long tables, with a row for each gene of each sample, as tidy tools write them."""

import numpy as np
import pandas as pd

from readers.bounded import to_numbers
from readers.quantifiers import SAMPLES
from readers.tables import NO_VALUE
from runtime.errors import InputError


def find_sample_column(table, genes, is_text, gene_column, path):
    """Position of the column that names the sample of each row; None if the table is no long one.

    In a long table genes come back in every sample, and a pair of gene and sample only once.

    Args:
        table: (R x C). genes: names (R). is_text: mask of the columns of text (C). gene_column: the
            position of the genes. path: for messages.

    Raises:
        InputError: see :func:`check_wide`.
    """
    genes = genes.str.strip()
    n_genes = genes.nunique()
    if n_genes > 0.7 * len(genes) or len(genes) < 4:
        return None
    usable = []
    for i, name in enumerate(table.columns):
        if i == gene_column or not (is_text[i] or SAMPLES.search(str(name))):
            continue
        sample = table.iloc[:, i].astype(str)
        n = sample.nunique()
        repeated = (genes + "\t" + sample).duplicated().mean()
        if 1 < n < len(genes) / 2 and repeated < 0.01 and n * n_genes < 4 * len(genes):
            usable.append(i)
    if not usable:
        check_wide(table, genes, is_text, gene_column, path)
    named = [i for i in usable if SAMPLES.search(str(table.columns[i]))]
    return next(iter(named or usable), None)


def check_wide(table, genes, is_text, gene_column, path):
    """Refuse a table in which genes come back in every group of a column, as in long tables.

    Groups such as chromosomes have genes of their own, and transcripts each a row.

    Raises:
        InputError: there is such a column.
    """
    n_genes = genes.nunique()
    for i in np.flatnonzero(is_text):
        column = table.iloc[:, i].astype(str)
        if i == gene_column or not 1 < column.nunique() < len(column) / 4:
            continue
        if genes.groupby(column).nunique().median() > 0.5 * n_genes:
            raise InputError(
                f"{path}: found a long table (genes come back in each {table.columns[i]}), but no "
                "column that names the samples and gives each gene once; expected a wide table, or "
                "rows of one measure alone"
            )


def varies_within(table, i, sample):
    """Whether a column has several values in a sample, unlike what describes the sample."""
    return table.iloc[:, i].astype(str).groupby(sample).nunique().max() > 1


def widen(genes, sample, values, source, notes):
    """A long table as one of genes x samples; values of a gene that comes twice are summed.

    Args:
        genes, sample: of each row (R). values: (R, 1), numbers or text. notes: to add to.

    Returns:
        genes (G), samples (S) and values (G x S); pairs that are missing are 0.

    Raises:
        InputError: a value is no number.
    """
    text = pd.Series(values[:, 0])
    numbers = to_numbers(text)
    wrong = np.isnan(numbers) & ~text.astype(str).isin(NO_VALUE)
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise InputError(
            f"{source.path}: found {text[i]!r} (sample {sample[i]}, gene {genes[i]}), expected a "
            "number: counts, TPM or CPM, 0 to 1e15"
        )
    rows = pd.DataFrame({"gene": genes.str.strip(), "sample": sample, "value": numbers})
    wide = rows.pivot_table("value", "gene", "sample", aggfunc="sum", sort=False)
    n_missing = wide.size - len(rows.drop_duplicates(["gene", "sample"]))
    if n_missing:
        notes.append(f"{n_missing:,} missing pairs of gene and sample are 0")
    return list(wide.index), list(wide.columns), wide.fillna(0).to_numpy()
