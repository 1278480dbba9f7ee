"""Measured fractions of lineages, and the lineage of each cell type."""

import pandas as pd

from readers.bounded import read_table, to_amounts
from readers.labels import clean_label, natural_order
from runtime.errors import InputError, some


def read_rows(path):
    """Read a csv as text, named by its first line; a longer line is an error."""
    table = read_table(path, header=None, encoding="utf-8-sig")
    rows = table.iloc[1:].set_axis([str(name).strip() for name in table.iloc[0]], axis=1)
    return rows[(rows != "").any(axis=1)]  # spreadsheets leave lines of commas


def read_lineages(path, cell_types, elsewhere=(), whose="the model"):
    """Read the lineage of each cell type from a csv ``cell_type,lineage``.

    Names are cleaned as labels are. Cell types without a lineage are reported, and so are names of
    the file that nobody has.

    Args:
        path: the csv. cell_types: of the model or of a data set (K). elsewhere: further names that
            the file may have, of other data sets; None: any. whose: what messages call the owner of
            the cell types.

    Returns:
        list (K) of str, None for a cell type without a lineage.

    Raises:
        InputError: the file is unreadable, has other columns, gives a cell type two lineages,
            names none of the cell types, or leaves fewer than two lineages.
    """
    given = read_lineage_rows(path)
    unknown = [name for name in given if name not in cell_types]
    if len(unknown) == len(given):
        raise InputError(
            f"{path}: none of its {len(given)} cell types ({some(given)}) is one of {whose}'s "
            f"({some(cell_types)})"
        )
    strange = [] if elsewhere is None else [name for name in unknown if name not in elsewhere]
    if strange:
        print(f"{path}: {len(strange)} cell types that {whose} does not know ({some(strange)})")
    lineage_of = [given.get(name) for name in cell_types]
    left_out = [name for name in cell_types if given.get(name) is None]
    if left_out:
        owner = "" if whose == "the model" else f" of {whose}"
        print(
            f"{path}: {len(left_out)} cell types{owner} without a lineage left out "
            f"({some(left_out)})"
        )
    if len(lineages := lineages_in(lineage_of)) < 2:
        raise InputError(f"{path}: found {len(lineages)} lineages, expected two or more")
    return lineage_of


def read_lineage_rows(path):
    """dict: cell type -> lineage or None, of a csv ``cell_type,lineage``; see above."""
    table = read_rows(path)
    if sorted(table.columns) != ["cell_type", "lineage"]:
        raise InputError(
            f"{path}: found the columns {some(table.columns)}, expected cell_type and lineage"
        )
    table = table.map(clean_label).dropna(subset="cell_type").drop_duplicates()
    repeated = table["cell_type"][table["cell_type"].duplicated()]
    if len(repeated):
        raise InputError(f"{path}: cell types with two different lineages ({some(repeated)})")
    return dict(zip(table["cell_type"], table["lineage"], strict=True))


def check_once(names, path, what):
    """Raise InputError if a name is there more than once."""
    repeated = names[names.duplicated()]
    if len(repeated):
        raise InputError(f"{path}: {what} there twice ({some(repeated)})")


def lineages_in(lineage_of):
    """Names of the lineages (L) among those of :func:`read_lineages`, in natural order."""
    return natural_order(lineage for lineage in lineage_of if lineage is not None)


def read_fractions(path, lineages, lineage_file):
    """Read measured fractions from a csv: first column sample, then one column per lineage.

    They may have any scale, percentages for instance, as only ratios within a sample are used.
    Columns that are not lineages are left out and reported.

    Args:
        path: the csv. lineages: names (L). lineage_file: where they come from, for the message.

    Returns:
        DataFrame (samples x L), float64.

    Raises:
        InputError: the file is unreadable; a lineage is missing; a sample or a column is repeated;
            a value is not a number of 0 or more; or a sample has nothing of these lineages.
    """
    table = read_rows(path)
    samples, table = table.iloc[:, 0].astype(str).str.strip(), table.iloc[:, 1:]
    missing = [name for name in lineages if name not in table]
    if missing:
        raise InputError(
            f"{path}: has no column {some(missing)}, which {lineage_file} names as lineage; found "
            f"{some(table.columns, 8)}"
        )
    check_once(table.columns, path, "columns")
    check_once(samples, path, "samples")
    left_out = [name for name in table if name not in lineages]
    if left_out:
        print(f"{path}: {len(left_out)} columns that are no lineage left out ({some(left_out)})")
    return to_fractions(table[lineages].set_axis(samples), path)


def to_fractions(text, path):
    """Numbers from text (samples x L), with the checks of :func:`read_fractions`."""
    values = to_amounts(text, path, "(sample {}, {})", "a number, 0 or more")
    values = pd.DataFrame(values, text.index, text.columns)
    empty = values.index[values.sum(axis=1) == 0]
    if len(empty):
        raise InputError(
            f"{path}: {len(empty)} samples ({some(empty)}) have nothing of "
            f"{some(values.columns, 8)}"
        )
    return values
