"""Cell-type labels: a csv by barcode or a column of ``.obs``."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from readers.bounded import read_table
from readers.counts import EMBEDDED, EMBEDDED_LABELS
from runtime.errors import InputError, some

LABEL_FILE = "barcode_to_celltype.csv"  # what scType.R writes

# What train_gmvae.py writes without labels. Another name, as --weights may be the data's folder.
FOUND_FILE = "found_celltypes.csv"

LABEL_COLUMN = "cell_type"  # looked for in .obs when --labels is not given

# Cells with one of these names (in any case) are unlabelled.
NO_LABEL = {"", "unknown", "unassigned", "nan", "na", "n/a", "none", "null"}


def natural_order(names):
    """Sort names so that '2' comes before '10', as people number their clusters.

    Regression: sorted as strings, codes came out as '0', '1', '10', '2'.
    """

    def key(name):
        parts = re.split(r"(\d+)", name)  # odd positions are the runs of digits
        return [(int(p), "") if i % 2 else (-1, p) for i, p in enumerate(parts)], name

    return sorted(set(names), key=key)


def clean_label(label):
    """A label as text without outer blanks, or None for missing, Unknown and their like."""
    if label is None or (isinstance(label, float) and np.isnan(label)) or label is pd.NA:
        return None
    label = str(label).strip()
    return None if label.lower() in NO_LABEL else label


def read_label_csv(path, barcodes):
    """Read ``barcode,cell_type`` with or without a header line.

    Args:
        path: the csv; further columns are allowed when the header names ``barcode`` and
            ``cell_type``.
        barcodes: the data's barcodes.

    Returns:
        Series of labels (str or None) indexed by the data's barcodes; None where there is none.

    Raises:
        InputError: no barcode of the file is in the data, or one has two different labels.
    """
    table = read_table(path, header=None)
    head = [str(c).strip().lower() for c in table.iloc[0]]
    if "barcode" in head and "cell_type" in head:
        table = table.iloc[1:, [head.index("barcode"), head.index("cell_type")]]
    elif table.shape[1] == 2:
        # Any other header is a row whose "barcode" no cell has, so it labels nothing.
        header = head[0] in ("barcode", "barcodes", "cell", "cell_id", "index", "")
        table = table.iloc[int(header) :]
    else:
        raise InputError(
            f"{path}: found {table.shape[1]} columns ({some(head)}), expected two, or a header "
            "with barcode and cell_type"
        )
    table.columns = ["barcode", "cell_type"]
    table = table.drop_duplicates()
    twice = table["barcode"][table["barcode"].duplicated()].unique()
    if len(twice):
        raise InputError(f"{path}: {len(twice)} barcodes have two different labels ({some(twice)})")
    given = table.set_index("barcode")["cell_type"]
    found = pd.Index(barcodes).isin(given.index)
    if not found.any():
        raise InputError(
            f"{path}: none of its {len(given)} barcodes ({some(given.index, 2)}) is in the data "
            f"({some(barcodes, 2)}); expected the barcodes of --data"
        )
    if not found.all():
        print(f"{path}: no label for {np.sum(~found):,} of {len(barcodes):,} cells")
    foreign = int((~given.index.isin(barcodes)).sum())
    if foreign:
        print(f"{path}: {foreign:,} labels are for barcodes that the data does not have")
    return given.reindex(barcodes)


def read_labels(adata, data, labels, weights=None):
    """Cell-type labels of every cell, by the rules in :class:`DatasetSettings`.

    Args:
        weights: folder that may hold the cell types that train_gmvae.py found without labels; they
            come before those of the data, as the models were trained on them.

    Returns:
        Series (str or None) in the order of ``adata.obs_names``, or None when ``labels`` is None
        and there are none to be found.

    Raises:
        InputError: ``labels`` is neither a file nor a column of ``.obs``.
    """
    if labels is None and weights is not None and (Path(weights) / FOUND_FILE).is_file():
        labels = str(Path(weights) / FOUND_FILE)
        print(f"{labels}: cell types found by train_gmvae.py")
    if labels is None:
        beside = Path(data) / LABEL_FILE if Path(data).is_dir() else Path(data).parent / LABEL_FILE
        if str(data) == EMBEDDED:
            labels = EMBEDDED_LABELS
        elif beside.is_file():
            labels = str(beside)
        elif LABEL_COLUMN in adata.obs:
            labels = LABEL_COLUMN
        else:
            return None
    if labels in adata.obs:
        series = adata.obs[labels].astype(object)
    elif Path(labels).is_file():
        series = read_label_csv(Path(labels), adata.obs_names)
    else:
        columns = f"has {some(adata.obs.columns, 8)}" if len(adata.obs.columns) else "is empty"
        raise InputError(f"--labels {labels}: neither a file nor a column of .obs, which {columns}")
    return series.map(clean_label).astype(object)
