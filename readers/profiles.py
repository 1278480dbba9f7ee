"""Measured expression of cell types in samples: sorted bulk, or pseudobulks of many cells."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from readers.bounded import to_amounts
from readers.gene_names import find_genes, name_map
from readers.labels import clean_label
from readers.lineages import check_once, read_rows
from runtime.errors import InputError, some

TABLE_COLUMNS = ["column", "sample", "donor", "condition", "cell_type"]  # of --profile-table
LARGEST = 1e15  # of a value, so that sums stay finite


@dataclass
class Profiles:
    """Profiles of n cell types in samples, over the R rows of a file."""

    path: object
    """The file."""
    genes: np.ndarray
    """Names of the rows (R), text; "" where there is none."""
    values: np.ndarray
    """(n, R) float64, 0 or more."""
    table: pd.DataFrame
    """What each profile is: TABLE_COLUMNS (n rows)."""

    def match_genes(self, genes, gene_ids):
        """Find the rows in a model's genes, by name or id; of rows of one gene the first.

        Args:
            genes: the model's (G). gene_ids: their other names (G), or None.

        Returns:
            ``(rows, positions)``: rows of this file (P) and where their genes are in ``genes`` (P).

        Raises:
            InputError: no gene is shared.
        """
        found = find_genes(self.genes, name_map(genes, genes if gene_ids is None else gene_ids))
        known = np.flatnonzero(found >= 0)
        positions, first = np.unique(found[known], return_index=True)
        if not len(positions):
            raise InputError(
                f"{self.path}: none of its genes ({some(self.genes)}) is known to the model "
                f"({some(genes)})"
            )
        print(
            f"{self.path}: {len(positions):,} of its {len(self.genes):,} rows are genes of the "
            f"model; left out: {np.sum(self.genes == ''):,} without a name, "
            f"{len(known) - len(positions):,} of a gene that comes before, "
            f"{np.sum((found < 0) & (self.genes != '')):,} of other genes"
        )
        return known[first], positions


def read_profiles(path, table_path):
    """Read profiles (--profiles) and what each is (--profile-table).

    Args:
        path: csv, plain or .gz: genes in rows, named by the column ``symbol`` or else by the first;
            profiles in the other columns, of which those that the table does not name are left out
            and counted. table_path: csv with TABLE_COLUMNS.

    Returns:
        Profiles.

    Raises:
        InputError: a file is unreadable, see :func:`read_profile_table`, the table names a column
            that the profiles do not have, or a value is not a number of 0 or more.
    """
    table = read_profile_table(table_path)
    rows = read_rows(path)
    names = rows["symbol"] if "symbol" in rows else rows.iloc[:, 0]
    check_once(rows.columns, path, "columns")
    missing = [column for column in table["column"] if column not in rows]
    if missing:
        raise InputError(
            f"{path}: has no column {some(missing)}, which {table_path} names; found "
            f"{some(rows.columns, 8)}"
        )
    left_out = rows.columns.difference([*table["column"], names.name], sort=False)
    if len(left_out):
        print(f"{path}: {len(left_out)} columns that {table_path} does not name left out")
    values = to_values(rows[list(table["column"])], names, path)
    return Profiles(path, names.str.strip().to_numpy(object), values, table)


def read_profile_table(path):
    """Read what each profile is from a csv with TABLE_COLUMNS, names cleaned as labels are.

    Returns:
        data frame of text, a row for each profile.

    Raises:
        InputError: the file is unreadable or has other columns; a field is empty; a column, or a
            cell type of a sample, is there twice; or a sample has two donors or conditions.
    """
    table = read_rows(path)
    missing = [name for name in TABLE_COLUMNS if name not in table]
    if missing or table.columns.has_duplicates:
        raise InputError(
            f"{path}: found the columns {some(table.columns, 8)}, expected each of "
            f"{', '.join(TABLE_COLUMNS)} once"
        )
    table = table[TABLE_COLUMNS].map(clean_label).reset_index(drop=True)
    if not len(table):
        raise InputError(f"{path}: found no profile, expected a line for each")
    for name in TABLE_COLUMNS:
        empty = table["column"][table[name].isna()]
        if len(empty):
            raise InputError(
                f"{path}: found no {name} for {len(empty)} profiles ({some(empty)}), expected one "
                "for each"
            )
    check_once(table["column"], path, "columns")
    check_once(table["sample"] + " " + table["cell_type"], path, "cell types of a sample")
    for name in ("donor", "condition"):
        several = table.groupby("sample")[name].nunique() > 1
        if several.any():
            raise InputError(
                f"{path}: found several {name}s of sample {several.index[several][0]}, expected one"
            )
    return table


def to_values(text, genes, path):
    """Numbers (n, R) of the columns of a table of text (R rows).

    Raises:
        InputError: a value is not a number of 0 or more, or a column is all zero.
    """
    expected = f"a number, 0 to {LARGEST:g}"
    text = text.set_axis(genes)
    values = to_amounts(text, path, "(gene {}, column {})", expected, LARGEST)  # (R, n)
    empty = text.columns[values.sum(axis=0) == 0]
    if len(empty):
        raise InputError(f"{path}: {len(empty)} profiles are all zero ({some(empty)})")
    return values.T


def read_profile_types(path, cell_types, profiled):
    """Read which of a model's cell types make each profiled type.

    Args:
        path: csv ``cell_type,profile_type``; None: profiled types are named as the model's.
        cell_types: of the model (K). profiled: types that there are profiles of.

    Returns:
        ``(types, type_of)``: the profiled types that are compared (T), in the order of the file,
        and that of each cell type (K), None where there is none.

    Raises:
        InputError: the file is unreadable or has other columns, gives a cell type two profiled
            types, or no type is left.
    """
    if path is None:
        given = {name: name for name in cell_types if name in profiled}
        if not given:
            raise InputError(
                f"--profile-types: found none, and no profiled type ({some(profiled)}) is a cell "
                f"type of the model ({some(cell_types)}); expected a csv cell_type,profile_type"
            )
    else:
        given = read_given_types(path)
    unknown = [name for name in given if name not in cell_types]
    absent = [name for name in dict.fromkeys(given.values()) if name not in profiled]
    for names, what in (
        (unknown, "cell types that the model does not know"),
        (absent, "types without a profile"),
    ):
        if names:
            print(f"{path}: {len(names)} {what} left out ({some(names)})")
    given = {k: t for k, t in given.items() if k not in unknown and t not in absent}
    if not given:
        raise InputError(
            f"{path}: found no cell type of the model ({some(cell_types)}) with a profiled type "
            f"({some(profiled)})"
        )
    types = list(dict.fromkeys(given.values()))
    rest = [name for name in profiled if name not in types]
    if rest:
        print(f"{path or '--profiles'}: {len(rest)} profiled types left out ({some(rest, 8)})")
    return types, [given.get(name) for name in cell_types]


def read_given_types(path):
    """Dict from cell type to profiled type, in the order of the csv.

    Raises:
        InputError: see :func:`read_profile_types`.
    """
    table = read_rows(path)
    if sorted(table.columns) != ["cell_type", "profile_type"]:
        raise InputError(
            f"{path}: found the columns {some(table.columns)}, expected cell_type and profile_type"
        )
    table = table.map(clean_label).dropna().drop_duplicates()
    repeated = table["cell_type"][table["cell_type"].duplicated()]
    if len(repeated):
        raise InputError(f"{path}: cell types with two profiled types ({some(repeated)})")
    return dict(zip(table["cell_type"], table["profile_type"], strict=True))
