"""Measured fractions of lineages, and the lineage of each cell type."""

import numpy as np
import pandas as pd

from readers.bounded import read_table
from readers.labels import clean_label, natural_order
from runtime.errors import InputError, some


def read_rows(path):
    """A csv as text under the names of its first line; a line with more fields is an error."""
    table = read_table(path, header=None, encoding="utf-8-sig")
    rows = table.iloc[1:].set_axis([str(name).strip() for name in table.iloc[0]], axis=1)
    return rows[(rows != "").any(axis=1)]  # spreadsheets leave lines of commas


def read_lineages(path, cell_types):
    """Lineage of each cell type (K) by a csv cell_type,lineage; None where it has none.

    Names are cleaned as labels are. Types left out are reported.

    Raises:
        InputError: unreadable, other columns, a type with two lineages, no type of the model, or
            fewer than two lineages.
    """
    table = read_rows(path)
    if sorted(table.columns) != ["cell_type", "lineage"]:
        found = some(table.columns)
        raise InputError(f"{path}: found the columns {found}, expected cell_type and lineage")
    table = table.map(clean_label).dropna(subset="cell_type").drop_duplicates()
    twice = table["cell_type"][table["cell_type"].duplicated()]
    if len(twice):
        raise InputError(f"{path}: cell types with two different lineages ({some(twice)})")
    given = dict(zip(table["cell_type"], table["lineage"], strict=True))
    unknown = [name for name in given if name not in cell_types]
    if len(unknown) == len(given):
        raise InputError(
            f"{path}: none of its {len(given)} cell types ({some(given)}) is one of the model's "
            f"({some(cell_types)})"
        )
    if unknown:
        print(f"{path}: {len(unknown)} cell types that the model does not know ({some(unknown)})")
    lineage_of = [given.get(name) for name in cell_types]
    left_out = [name for name, own in zip(cell_types, lineage_of, strict=True) if own is None]
    if left_out:
        print(f"{path}: {len(left_out)} cell types without a lineage left out ({some(left_out)})")
    if len(lineages := lineages_in(lineage_of)) < 2:
        raise InputError(f"{path}: found {len(lineages)} lineages, expected two or more")
    return lineage_of


def lineages_in(lineage_of):
    """Names of the lineages (L) of :func:`read_lineages`, in natural order."""
    return natural_order(own for own in lineage_of if own is not None)


def read_fractions(path, lineages, lineage_file):
    """Measured fractions (samples x lineages) of a csv: first column sample, then lineages.

    They may be of any scale, percentages too, as only ratios within a sample are used. Columns that
    are none of the lineages are left out and reported.

    Raises:
        InputError: unreadable, a lineage or a name is missing or there twice, a value is no number
            of 0 or more, or a sample has nothing of these lineages.
    """
    table = read_rows(path)
    samples, table = table.iloc[:, 0].astype(str).str.strip(), table.iloc[:, 1:]
    missing = [name for name in lineages if name not in table]
    if missing:
        raise InputError(
            f"{path}: has no column {some(missing)}, which {lineage_file} names as lineage; found "
            f"{some(table.columns, 8)}"
        )
    for what, names in (("columns", table.columns), ("samples", pd.Index(samples))):
        if names.has_duplicates:
            raise InputError(f"{path}: {what} there twice ({some(names[names.duplicated()])})")
    left_out = [name for name in table if name not in lineages]
    if left_out:
        print(f"{path}: {len(left_out)} columns that are no lineage left out ({some(left_out)})")
    text = table[lineages].set_axis(samples)
    values = text.apply(pd.to_numeric, errors="coerce").astype(float)
    wrong = ~(np.isfinite(values) & (values >= 0)).to_numpy()
    if wrong.any():
        i, j = (int(at[0]) for at in np.nonzero(wrong))
        raise InputError(
            f"{path}: found {text.iat[i, j]!r} (sample {values.index[i]}, {lineages[j]}), expected "
            "a number, 0 or more"
        )
    empty = values.index[values.sum(axis=1) == 0]
    if len(empty):
        raise InputError(
            f"{path}: {len(empty)} samples ({some(empty)}) have nothing of {some(lineages, 8)}"
        )
    return values
