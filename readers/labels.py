"""Labels of cells, from a csv by barcode or a column of ``.obs``: type, sample, donor."""

import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd

from readers.bounded import read_table
from readers.counts import EMBEDDED, EMBEDDED_LABELS
from runtime.errors import InputError, some

LABEL_FILE = "barcode_to_celltype.csv"  # as scType.R names it

# Written by train_gmvae.py if there are no labels. Its name differs from LABEL_FILE, as --weights
# may be the folder of the data.
FOUND_FILE = "found_celltypes.csv"

LABEL_COLUMN = "cell_type"  # of .obs, used if --labels is not given

# Cells with one of these labels, in upper or lower case, count as unlabelled.
NO_LABEL = {"", "unknown", "unassigned", "nan", "na", "n/a", "none", "null"}


def natural_order(names):
    """Sort names without duplicates, numbers in them by value: "T 2" comes before "T 10".

    The order does not depend on the order of the input, so that it can number the cell types.
    """

    def key(name):
        parts = re.split(r"(\d+)", name)  # odd positions are runs of digits
        # Decimal, as int() refuses numbers of more than 4300 digits.
        return [Decimal(part) if i % 2 else part for i, part in enumerate(parts)], name

    return sorted(set(names), key=key)


def clean_label(label):
    """A label as text without surrounding blanks, or None if it is missing or in NO_LABEL."""
    if label is None or (isinstance(label, float) and np.isnan(label)) or label is pd.NA:
        return None
    label = str(label).strip()
    return None if label.lower() in NO_LABEL else label


def read_label_csv(path, barcodes, column="cell_type"):
    """Read ``barcode,cell_type`` with or without a header line.

    Args:
        path: the csv; more columns are allowed if its header names ``barcode`` and the column.
        barcodes: of the data (N). column: what the csv gives of each cell.

    Returns:
        Series of labels (N, str), indexed by the data's barcodes; missing where there is none.

    Raises:
        InputError: no barcode of the file is in the data, or one has two different labels.
    """
    table = select_label_columns(read_table(path, header=None), path, column).drop_duplicates()
    repeated = table["barcode"][table["barcode"].duplicated()].unique()
    if len(repeated):
        raise InputError(
            f"{path}: {len(repeated)} barcodes have two different labels ({some(repeated)})"
        )
    labels = table.set_index("barcode")[column]
    labelled = pd.Index(barcodes).isin(labels.index)  # (N)
    if not labelled.any():
        raise InputError(
            f"{path}: none of its {len(labels)} barcodes ({some(labels.index, 2)}) is in the data "
            f"({some(barcodes, 2)}); expected the barcodes of --data"
        )
    if not labelled.all():
        print(f"{path}: no label for {np.sum(~labelled):,} of {len(barcodes):,} cells")
    n_foreign = int((~labels.index.isin(barcodes)).sum())
    if n_foreign:
        print(f"{path}: {n_foreign:,} labels are for barcodes that the data does not have")
    return labels.reindex(barcodes)


def select_label_columns(table, path, column="cell_type"):
    """The columns ``barcode`` and ``cell_type`` (or another) of a table, without its header.

    Args:
        table: the file, its header, if any, in the first row. path: for the message.

    Raises:
        InputError: it is not clear which columns these are.
    """
    header = [str(name).strip().lower() for name in table.iloc[0]]
    if "barcode" in header and column in header:
        table = table.iloc[1:, [header.index("barcode"), header.index(column)]]
    elif table.shape[1] == 2:
        # Another header is taken for a row; it labels nothing, as no cell has such a barcode.
        has_header = header[0] in ("barcode", "barcodes", "cell", "cell_id", "index", "")
        table = table.iloc[int(has_header) :]
    else:
        raise InputError(
            f"{path}: found {table.shape[1]} columns ({some(header)}), expected two, or a header "
            f"with barcode and {column}"
        )
    return table.set_axis(["barcode", column], axis=1)


def read_labels(adata, data, labels, weights=None):
    """Read the cell-type label of every cell.

    Args:
        adata: AnnData or BackedCells (N cells).
        data: the file or folder that it was read from.
        labels: a csv or a column of ``.obs``; None: see :func:`default_labels`.
        weights: folder that may hold FOUND_FILE. If ``labels`` is None, these cell types come
            before those of the data, as the models were trained on them.

    Returns:
        Series (N, str or None) in the order of ``adata.obs_names``; None if there are no labels
        and ``labels`` is None.

    Raises:
        InputError: ``labels`` is neither a file nor a column of ``.obs``.
    """
    if labels is None and weights is not None and (Path(weights) / FOUND_FILE).is_file():
        labels = str(Path(weights) / FOUND_FILE)
        print(f"{labels}: cell types found by train_gmvae.py")
    if labels is None:
        labels = default_labels(adata, data)
    if labels is None:
        return None
    return read_column(adata, labels, "--labels", "cell_type")


def read_column(adata, source, setting, column):
    """Read a text for each cell (N, str or None), a Series in the order of ``adata.obs_names``.

    Args:
        adata: AnnData or BackedCells. source: a column of ``.obs`` or a csv by barcode. setting:
            the flag that names it, for the message. column: of the csv, if it has a header.

    Raises:
        InputError: the source is neither a file nor a column of ``.obs``.
    """
    if source in adata.obs:
        series = adata.obs[source].astype(object)
    elif Path(source).is_file():
        series = read_label_csv(Path(source), adata.obs_names, column)
    else:
        columns = f"has {some(adata.obs.columns, 8)}" if len(adata.obs.columns) else "is empty"
        raise InputError(
            f"{setting} {source}: neither a file nor a column of .obs, which {columns}"
        )
    return series.map(clean_label).astype(object)


def default_labels(adata, data):
    """Where labels are if the user does not say: a csv or a column of ``.obs``, or None.

    In this order: the column of the embedded dataset, LABEL_FILE in the folder of the data,
    LABEL_COLUMN.
    """
    folder = Path(data) if Path(data).is_dir() else Path(data).parent
    if str(data) == EMBEDDED:
        return EMBEDDED_LABELS
    if (folder / LABEL_FILE).is_file():
        return str(folder / LABEL_FILE)
    return LABEL_COLUMN if LABEL_COLUMN in adata.obs else None
