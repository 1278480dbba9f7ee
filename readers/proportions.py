"""Known proportions of samples: flow cytometry, histology, or a mixture to be generated."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from readers.barcodes import check_same_start
from readers.bounded import to_amounts
from readers.bulk import NO_VALUE
from readers.lineages import lineages_in, read_lineages, read_rows
from runtime.errors import InputError, some

WHOLE = 0.02  # by which the fractions of all types of a sample may miss 1
ROUNDING = 0.01  # by which those of some types may exceed it
MAX_FRACTION = 1.5  # a value above it is a percentage
SHOWN = 40  # names of types in a message


@dataclass
class KnownProportions:
    """Fractions of cells that a file gives, of cell types or of lineages of several types."""

    path: Path
    """The file, for messages."""
    samples: list
    """Names of its rows (R)."""
    values: np.ndarray
    """Fractions (R, C); nan where they are not known. No row exceeds 1, and rows without a nan sum
    to 1 if the columns cover all types."""
    column: np.ndarray
    """Of each cell type, its own or that of its lineage (K); -1 for none."""

    def of_samples(self, names):
        """Fractions (S, C) of samples ``names`` (S), nan for those that the file lacks.

        Prints how many that are, and how many rows of the file are not used.

        Raises:
            InputError: the file has none of them, or see :func:`check_same_start`.
        """
        check_same_start(self.samples, names, self.path)
        row = pd.Index(self.samples).get_indexer([str(name).strip() for name in names])
        if (row < 0).all():
            raise InputError(
                f"{self.path}: found none of the samples ({some(names)}) among its rows "
                f"({some(self.samples)}), expected their names in its first column"
            )
        if n := np.sum(row < 0):
            print(f"{self.path}: {n:,} of {len(row):,} samples not in it, estimated from the bulk")
        if n := len(set(self.samples) - {str(name).strip() for name in names}):
            print(f"{self.path}: {n:,} of its {len(self.samples):,} rows are none of the samples")
        return np.where(row[:, None] < 0, np.nan, self.values[row])


def read_proportions(path, cell_types, lineage_file=None):
    """Read known proportions from a csv: a row for each sample, a column for each cell type.

    Values are fractions or percentages of cells, by what they are (:func:`find_unit`). Fields and
    columns that are missing are not known. A row that gives all types is normalised.

    Args:
        path: the csv, whose first column names the samples; or a DataFrame, whose index does.
            cell_types: of the model (K).
        lineage_file: a csv ``cell_type,lineage``, if the columns are lineages; types without one
            are not known.

    Returns:
        KnownProportions.

    Raises:
        InputError: the file is unreadable; samples or columns repeat; a column is neither a cell
            type nor a lineage; a value is no number of 0 or more; the unit is not clear; a row
            exceeds 1, or gives all types and does not sum to 1.
    """
    if isinstance(path, pd.DataFrame):
        rows, path = path.reset_index().astype(object), "proportions"
        rows = rows.where(rows.notna(), "").astype(str)
        rows.columns = [str(name) for name in rows.columns]
    elif not Path(path).is_file():
        raise InputError(f"{path}: no such file; expected a table of known proportions")
    else:
        rows = read_rows(path).fillna("")
    groups = names = list(cell_types)  # of each type its group; their names
    if lineage_file is not None:
        groups = read_lineages(lineage_file, cell_types, elsewhere=None)
        names = lineages_in(groups)
    text = read_text(rows, path, names, "lineages" if lineage_file else "cell types")
    expected = "a fraction, a percentage or an empty field"
    values = to_amounts(text, path, "(sample {}, {})", expected, missing=NO_VALUE)  # (R, C)
    unit = find_unit(values, text.index, path)
    column = pd.Index(text.columns).get_indexer([name or "" for name in groups])  # (K)
    fractions = check_sums(values / unit, column, text.index, unit, path)
    what = "percentages" if unit == 100 else "fractions"
    print(f"{path}: {what} of {len(text.columns)} of {len(names)} "
          f"{'lineages' if lineage_file else 'cell types'} in {len(text):,} samples")  # fmt: skip
    return KnownProportions(Path(path), list(text.index), fractions, column)


def read_text(rows, path, names, what):
    """The fields of rows of text (R x C), samples as index; what: ``names`` are, in messages."""
    table = rows.apply(lambda column: column.str.strip())
    unnamed = (table == "").all(axis=0) & (table.columns == "")  # spreadsheets leave such columns
    table = table.loc[:, ~unnamed]
    if table.shape[1] < 2 or not len(table):
        raise InputError(
            f"{path}: found {len(table)} rows and {max(table.shape[1] - 1, 0)} columns beside the "
            f"samples' names, expected a row for each sample and columns of {what}"
        )
    table = table.set_axis(table.iloc[:, 0], axis=0).iloc[:, 1:]
    for kind, index in (("columns", table.columns), ("samples", table.index)):
        if index.has_duplicates:
            twice = some(index[index.duplicated()].unique())
            raise InputError(f"{path}: found {kind} more than once ({twice}), expected each once")
    if unknown := [name for name in table if name not in names]:
        raise InputError(
            f"{path}: found the columns {some(unknown)}, which are no {what} of the model; "
            f"expected some of {some(names, SHOWN)}"
        )
    return table


def find_unit(values, samples, path):
    """What is 1 in a table (R, C): 1 for fractions, 100 for percentages.

    Percentages if any value is above MAX_FRACTION, or rows sum to around 100. A row that would be
    a tenth of what percentages are elsewhere, and more as fractions, may be of the other unit.

    Raises:
        InputError: some rows seem to be fractions and others percentages.
    """
    sums = np.nansum(values, axis=1)  # (R)
    sure = (np.nan_to_num(values) > MAX_FRACTION).any(axis=1) | (sums > 50)  # (R)
    if not sure.any():
        return 1
    known = ~np.isnan(values)
    typical = [np.median(v[k & sure] if (k & sure).any() else 0)
               for v, k in zip(values.T, known.T, strict=True)]  # fmt: skip
    expected = (known * np.array(typical)).sum(axis=1)  # (R), in per cent
    mixed = ~sure & (sums <= 1 + WHOLE) & (sums < expected / 10) & (100 * sums >= expected / 10)
    if mixed.any():
        i, j = np.argmax(mixed), np.argmax(sure)
        raise InputError(
            f"{path}: found percentages in row {samples[j]} (sum {sums[j]:g}) and what may be "
            f"fractions in row {samples[i]} (sum {sums[i]:g}), expected one unit; fractions up to "
            "1 in all rows are clear"
        )
    return 100


def check_sums(fractions, column, samples, unit, path):
    """Fractions (R, C), those of rows that sum to 1 but for rounding divided by their sums.

    column: of each type (K), -1 for none. unit: 1 or 100, as the file has them.

    Raises:
        InputError: a row exceeds 1, or gives all types and does not sum to 1.
    """
    sums = np.nansum(fractions, axis=1)  # (R)
    whole = (column >= 0).all() & ~np.isnan(fractions).any(axis=1)
    too_much = sums > 1 + np.where(whole, WHOLE, ROUNDING)
    too_little = whole & (sums < 1 - WHOLE)
    remedy = "divide by the sum, or leave out what is to be estimated"
    for wrong, expected in (
        (too_much, "at most 1 as fractions or 100 as percentages"),
        (too_little, f"{unit} as all types are given; {remedy}"),
    ):
        if wrong.any():
            i = np.argmax(wrong)
            raise InputError(
                f"{path}: found a sum of {unit * sums[i]:g} in row {samples[i]}, expected "
                f"{expected}"
            )
    rounded = whole | (sums > 1)
    if n := np.sum(rounded & (abs(sums - 1) > 1e-6)):
        print(f"{path}: {n:,} rows that do not sum to {unit} exactly normalised")
    return fractions / np.where(rounded, sums, 1)[:, None]
