"""Labels of cells, from a csv by barcode or a column of ``.obs``: type, sample, donor."""

import csv
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd

from readers.barcodes import BARCODE, check_row_numbers, match_barcodes
from readers.bounded import MAX_COLUMNS, open_bounded, read_table, to_numbers
from readers.counts import EMBEDDED, EMBEDDED_LABELS
from readers.tenx import find_10x
from runtime.errors import InputError, one_line, plain, some

LABEL_FILE = "barcode_to_celltype.csv"  # as scType.R names it

# Written by train_gmvae.py if there are no labels. Its name differs from LABEL_FILE, as --weights
# may be the folder of the data.
FOUND_FILE = "found_celltypes.csv"

LABEL_COLUMN = "cell_type"  # of .obs, used if --labels is not given

# Cells with one of these labels, in upper or lower case, count as unlabelled.
NO_LABEL = {"", "unknown", "unassigned", "nan", "na", "n/a", "none", "null"}

# Usual names of columns, as plain_header writes them. Clusters are not among them, as they are
# mostly numbers.
CELL_NAMES = {"", "barcode", "barcodes", "cell", "cells", "cellid", "cellids", "cellbarcode"}
CELL_NAMES |= {"cellbarcodes", "cellname", "cellnames", "index", "unnamed0", "rowname", "rownames"}
CELL_NAMES |= {"rn", "barcodeid", "cb"}
TYPE_NAMES = re.compile(
    "(predicted|author|manual|final|major|minor|main|broad|fine|coarse|sub|inferred|original|"
    "singler|azimuth|celltypist|sctype|seurat)*"
    "(cell(sub)?types?(name|label|annotation)?s?|(cell)?(annotation|label)s?|cluster(name|label|"
    "annotation)s?|majorityvoting|customclassif|classifications?)"
    "(l?[0-9]|level[0-9]|major|minor|main|broad|fine|coarse|manual|final|author|predicted)?"
)


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


# --------------------------------------------------------------------------- files of labels


def read_label_csv(path, barcodes, column="cell_type", chosen=None, setting="--labels", every=None):
    """Read ``barcode,cell_type``: a csv, tsv or table of R, with or without a header line.

    Args:
        path: the file; more columns are allowed, see :func:`select_label_columns`.
        barcodes: of the data (N). column: what the file gives of each cell.
        chosen: name of the column to take, or None. setting: the flag, for the messages.
        every: barcodes of the file that the data is from, if some of its cells are left out by now.

    Returns:
        Series of labels (N, str), indexed by the data's barcodes; missing where there is none.

    Raises:
        InputError: no barcode of the file is in the data, or one has two different labels; it is
            not clear which column is meant; or see :func:`match_barcodes` and
            :func:`check_row_numbers`.
    """
    table = read_label_table(path)
    table = select_label_columns(table, path, barcodes, column, chosen, setting)
    table = table.drop_duplicates()
    same = table.assign(label=table[column].map(clean_label)).duplicated(["barcode", "label"])
    table = table[~same.to_numpy()]
    repeated = table["barcode"][table["barcode"].duplicated()].unique()
    if len(repeated):
        raise InputError(
            f"{path}: {len(repeated)} barcodes have two different labels ({some(repeated)})"
        )
    check_row_numbers(table["barcode"], barcodes, barcodes if every is None else every, path)
    labels = match_barcodes(table.set_index("barcode")[column], pd.Index(barcodes), path)
    labelled = pd.Index(barcodes).isin(labels.index)  # (N)
    if not labelled.all():
        print(f"{path}: no label for {np.sum(~labelled):,} of {len(barcodes):,} cells")
    n_foreign = int((~labels.index.isin(barcodes)).sum())
    if n_foreign:
        print(f"{path}: {n_foreign:,} labels are for barcodes that the data does not have")
    return labels.reindex(barcodes)


def read_label_table(path):
    """Read a table of text (R x C) without a header of its own; a header is its first row.

    Fields are parted by what follows the first one: tab, comma or semicolon, else blanks. A header
    that is one field short, as by R's write.table, gets an empty one in front.

    Raises:
        InputError: it is no readable table of text, or its rows are longer than its header.
    """
    if path.suffix.lower() in (".xlsx", ".xls", ".rds", ".rdata"):
        raise InputError(
            f"{path}: found a {path.suffix} file, expected a table of text such as csv"
        )
    with open_bounded(path) as file:
        lines = [file.readline(100 * MAX_COLUMNS).decode("utf-8", "replace") for _ in range(20)]
    lines[0] = lines[0].removeprefix("\ufeff")
    separator = find_label_separator(lines)
    try:
        rows = csv.reader(lines, delimiter=separator, skipinitialspace=separator == " ")
        sizes = [len(row) for row in rows if row][:2]
    except csv.Error as error:
        raise InputError(f"{path}: not a readable table ({one_line(error)})") from error
    options = {"sep": separator, "header": None, "skipinitialspace": separator == " "}
    if sizes:
        options["names"] = range(max(sizes))
    table = read_table(path, **options).fillna("")
    filled = table != ""  # spreadsheets leave empty rows and columns behind
    rows = filled.any(axis=1)
    table = table.loc[rows if rows.sum() > 1 else slice(None), filled.any() | (table.columns < 2)]
    if table.empty:
        raise InputError(f"{path}: not a readable table (no lines in it)")
    if len(sizes) == 2 and sizes[0] == sizes[1] - 1 and len(table) > 1:
        if first := table.iloc[0, 0].strip() if is_cell_name(table.iloc[0, 0]) else "":
            raise InputError(
                f"{path}: found {sizes[0]} names in its header ({plain(first)}, ...) and "
                f"{sizes[1]} fields below, expected as many; quote labels that hold a separator"
            )
        table.iloc[0] = ["", *table.iloc[0, :-1]]
    return table.reset_index(drop=True)


def find_label_separator(lines):
    """What follows the first field in the first line that shows it; a comma if none does."""
    for line in lines:
        if match := re.match(r'\s*"(?:[^"]|"")*"(?: *([\t,;])|( ))', line):
            return match[1] or match[2]
        if match := re.match(r'[^"\t,;]*([\t,;])', line):
            return match[1]
    parts = [line.split() for line in lines if line.strip()]
    return " " if parts and len(parts[-1]) > 1 else ","


def plain_header(name):
    """A header's field in lower case, without blanks and punctuation."""
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def select_label_columns(
    table, path, barcodes, column="cell_type", chosen=None, setting="--labels"
):
    """The columns ``barcode`` and ``cell_type`` (or another) of a table, without its header.

    The barcodes are in the column that shares most with the data. Labels are in the chosen column,
    or in that of this name, or in the only other one, or in the only one with a name that columns
    of cell types have (TYPE_NAMES).

    Args:
        table: of text (R x C), its header, if any, in the first row. path: for messages.
        barcodes, column, chosen, setting: as in :func:`read_label_csv`.

    Raises:
        InputError: it is not clear which columns these are.
    """
    header = [str(name).strip() for name in table.iloc[0]]
    lower = [name.lower() for name in header]
    target = column if chosen is None else chosen.lower()
    if lower.count("barcode") == 1 and lower.count(target) == 1:
        position, has_header = lower.index("barcode"), True
    else:
        position = find_barcode_column(table, barcodes, lower)
        has_header = is_header(header, table, position, barcodes, column, chosen)
    others = [i for i in range(table.shape[1]) if i != position]
    where = choose_label_column(table, header if has_header else None, others, column, chosen)
    if not others:
        raise InputError(f"{path}: found one column, expected two: barcode and {column}")
    if where is None:
        names = some(header if has_header else [f"column {i + 1}" for i in others], 30)
        known = [header[i] for i in others if has_header and is_type_name(header[i])]
        several = f"; {some(known, 8)} may all be meant" if column == "cell_type" and known else ""
        wanted = f"a column {chosen}" if chosen else f"two, or a header with barcode and {column}"
        raise InputError(
            f"{path}: found {table.shape[1]} columns ({names}), expected {wanted}{several}; name "
            f"the column by {setting} {path}:COLUMN"
        )
    if table.shape[1] > 2 and chosen is None:
        name = header[where]
        if lower[where] != column:
            print(f"{path}: {column} taken from column {plain(name)}")
        if column == "cell_type":
            settle = f"{setting} {path}:{name}"
            refuse_numbers(table.iloc[1:, where], f"{path}: column {name}", settle)
    return table.iloc[int(has_header) :, [position, where]].set_axis(["barcode", column], axis=1)


def find_barcode_column(table, barcodes, header):
    """Position of the column that shares most names with the data, or that looks most like it.

    Looks at up to 2000 rows. header: the first row in lower case.
    """
    rows = np.unique(np.linspace(0, len(table) - 1, 2000).astype(int))
    known = set(barcodes)
    cores = {match["core"] for match in map(BARCODE.fullmatch, known) if match}

    def score(i):
        names = [name.strip() for name in table.iloc[rows, i].unique()]
        n_plain = sum(name in known for name in names)
        matches = map(BARCODE.fullmatch, names)
        n_core = sum(match is not None and match["core"] in cores for match in matches)
        return n_plain, n_core, header[i] in ("barcode", "barcodes"), is_cell_name(header[i]), -i

    return max(range(table.shape[1]), key=score)


def is_header(header, table, position, barcodes, column, chosen):
    """Whether the first row of a table names its columns.

    position: of the barcodes. Other arguments: as in :func:`select_label_columns`.
    """
    first = header[position]
    if first in set(barcodes):
        return False
    others = [i for i in range(len(header)) if i != position]
    wanted = column if chosen is None else chosen
    if is_cell_name(first) or wanted.lower() in [header[i].lower() for i in others]:
        return any(header)
    named = [i for i in others if column == "cell_type" and is_type_name(header[i])]
    if any(header[i] not in set(table.iloc[1:, i]) for i in named):  # no label, as "type 1" is
        return True
    below = table.iloc[1:200, position]
    n_barcodes = sum(BARCODE.fullmatch(name.strip()) is not None for name in below)
    return BARCODE.fullmatch(first) is None and 2 * n_barcodes > len(below)


def is_cell_name(name):
    """Whether a header's field is a usual name of a column of barcodes."""
    return plain_header(name) in CELL_NAMES and bool(name.strip()) == bool(plain_header(name))


def is_type_name(name):
    """Whether a header's field is a usual name of a column of cell types."""
    return TYPE_NAMES.fullmatch(plain_header(name)) is not None


def choose_label_column(table, header, others, column, chosen):
    """Position of the labels among the columns ``others``; None if it is not clear.

    header: names of all columns, or None. Other arguments: as in :func:`select_label_columns`.
    """
    if header is None:
        return others[0] if len(others) == 1 and chosen is None else None
    if chosen is not None:
        exact = [i for i in others if header[i] == chosen]
        same = exact or [i for i in others if header[i].lower() == chosen.lower()]
        return same[0] if len(same) == 1 else None
    same = [i for i in others if header[i].lower() == column]
    if same:
        return same[0] if len(same) == 1 else None
    others = [i for i in others if not (is_cell_name(header[i]) and counts_rows(table.iloc[1:, i]))]
    if len(others) == 1:
        return others[0]
    known = [i for i in others if is_type_name(header[i])] if column == "cell_type" else []
    return known[0] if len(known) == 1 else None


def counts_rows(values):
    """Whether a column of text (R) holds the rows' numbers, from 0 or 1."""
    numbers = to_numbers(values)
    return bool(len(numbers)) and any(
        np.array_equal(numbers, np.arange(first, first + len(numbers))) for first in (0, 1)
    )


# -------------------------------------------------------------------------- labels of all cells


def refuse_numbers(values, what, settle):
    """Refuse labels that are whole numbers alone, where the user did not ask for them by name.

    Args:
        values: labels, missing ones too. what: the file and column. settle: the flag that takes
            them as they are.

    Raises:
        InputError: all labels that are there are whole numbers.
    """
    labels = natural_order(label for label in map(clean_label, values) if label)
    if labels and all(re.fullmatch(r"[-+]?[0-9]+(\.0*)?", label) for label in labels):
        raise InputError(
            f"{what} holds numbers such as {some(labels)} (codes of a factor, or clusters), "
            f"expected names of cell types; {settle} takes the numbers as they are, or give a csv "
            "with names by --labels"
        )


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
    if labels is not None:
        return read_column(adata, labels, "--labels", "cell_type")
    labels = default_labels(adata, data)
    if labels is None:
        return None
    series = read_column(adata, labels, "--labels", "cell_type")
    what = f"{data}: column {labels} of .obs" if labels in adata.obs else labels
    refuse_numbers(series, what, f"--labels {labels}")
    return series


def read_column(adata, source, setting, column):
    """Read a text for each cell (N, str or None), a Series in the order of ``adata.obs_names``.

    Args:
        adata: AnnData or BackedCells. source: a column of ``.obs``, a table by barcode, or
            FILE:COLUMN, a column of such a table. setting: the flag that names it, for the message.
            column: of the table, if it has a header.

    Raises:
        InputError: the source is neither a file nor a column of ``.obs``.
    """
    path, chosen = split_source(source)
    if source in adata.obs:
        series = adata.obs[source].astype(object)
    elif path.is_file():
        every = adata.uns.get("barcodes")
        series = read_label_csv(path, adata.obs_names, column, chosen, setting, every)
    else:
        columns = f"has {some(adata.obs.columns, 8)}" if len(adata.obs.columns) else "is empty"
        raise InputError(
            f"{setting} {source}: neither a file nor a column of .obs, which {columns}"
        )
    return series.map(clean_label).astype(object)


def split_source(source):
    """The path and the column of FILE:COLUMN; the whole text and None, if no such file exists."""
    source = str(source)
    if not Path(source).is_file():
        for match in re.finditer(":", source):
            path, chosen = source[: match.start()], source[match.end() :]
            if chosen and Path(path).is_file():
                return Path(path), chosen
    return Path(source), None


def type_columns(adata):
    """Columns of ``.obs`` with a usual name of a column of cell types, for messages."""
    return [str(name) for name in adata.obs.columns if is_type_name(name)]


def default_labels(adata, data):
    """Where labels are if the user does not say: a csv or a column of ``.obs``, or None.

    In this order: the column of the embedded dataset, LABEL_FILE in the folder of the data or that
    of its matrix, LABEL_COLUMN.
    """
    if str(data) == EMBEDDED:
        return EMBEDDED_LABELS
    data = Path(data)
    folders = [data, find_10x(data)["matrix.mtx"].parent] if data.is_dir() else [data.parent]
    for folder in folders:
        if (folder / LABEL_FILE).is_file():
            return str(folder / LABEL_FILE)
    return LABEL_COLUMN if LABEL_COLUMN in adata.obs else None
