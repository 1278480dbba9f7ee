"""Matrix Market files of counts."""

import re

import numpy as np
import pandas as pd
import scipy.sparse as sp

from readers.bounded import UNREADABLE, check_memory, open_bounded
from runtime.errors import InputError, one_line, plain


def read_mtx(path, shape, named_by):
    """Read a Matrix Market file (plain or .gz) of sparse counts as COO, float64.

    Not by scipy's reader, which some malformed lines crash. All of the header is checked before
    memory is set aside for what it says.

    Args:
        path: of the file. shape: genes and barcodes that there must be. named_by: the files of
            their names, for the message.

    Raises:
        InputError: unreadable, of another kind or shape, or an entry lies outside of the matrix.
    """
    broken = f"{path}: not a readable Matrix Market file"
    # Symmetric: scipy's writer says so of a matrix that happens to be.
    number, form = "(integer|unsigned-integer|real)", "(general|symmetric)"
    try:
        with open_bounded(path) as file:
            kind = " ".join(file.readline(1000).decode("ascii").lower().split())
            if not re.fullmatch(f"%%matrixmarket matrix coordinate {number} {form}", kind):
                raise InputError(
                    f"{path}: found {plain(kind)[:100]!r}, expected a sparse Matrix Market file: "
                    "%%MatrixMarket matrix coordinate integer general"
                )
            line, skip = file.readline(100_000), 2
            while line.startswith(b"%") or line.isspace():
                line, skip = file.readline(100_000), skip + 1
            n_rows, n_columns, n_entries = map(int, line.split())
    except UNREADABLE as error:
        raise InputError(f"{broken} ({one_line(error)})") from error
    if (n_rows, n_columns) != shape:
        raise InputError(
            f"{path}: found {n_rows} x {n_columns}, expected {shape[0]} genes ({named_by[0]}) x "
            f"{shape[1]} barcodes ({named_by[1]})"
        )
    # gzip shrinks to a thousandth at best, and an entry takes six bytes at least ("1 1 1" and a
    # line break).
    if not 0 <= n_entries <= 1032 * path.stat().st_size // 6:
        raise InputError(
            f"{path}: its header announces {n_entries:,} entries, which a file of its size cannot "
            "hold"
        )
    check_memory(24 * n_entries, path, "its entries")
    row, column = np.empty((2, n_entries), np.int32)
    value, at = np.empty(n_entries), 0
    options = {"sep": r"\s+", "header": None, "names": range(4), "index_col": False}
    # A fourth number in a line must show; a third that is missing does so by itself.
    options |= {"dtype": {0: np.int32, 1: np.int32, 2: np.float64, 3: str}, "quoting": 3}
    try:
        with open_bounded(path, 100_000 + 100 * n_entries) as file:
            for _ in range(skip):
                file.readline(100_000)
            if n_entries == 0:  # pandas would find no columns
                at = bool(file.read(1000).strip())
            for part in pd.read_csv(file, chunksize=1_000_000, **options) if n_entries else ():
                end = at + len(part)
                if end > n_entries or part[2].isna().any() or part[3].notna().any():
                    raise ValueError(f"expected {n_entries:,} lines of three numbers")
                row[at:end], column[at:end], value[at:end] = part[0], part[1], part[2]
                at = end
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{broken} ({one_line(error)})") from error
    if at != n_entries:
        raise InputError(f"{path}: found {at:,} entries or more, its header says {n_entries:,}")
    for own, most in ((row, n_rows), (column, n_columns)):
        if n_entries and not (own.min() >= 1 and own.max() <= most):
            raise InputError(f"{path}: an entry lies outside of the {n_rows} x {n_columns} matrix")
    if kind.endswith("symmetric"):
        twin = row != column
        row, column = np.append(row, column[twin]), np.append(column, row[twin])
        value = np.append(value, value[twin])
    return sp.coo_matrix((value, (row - 1, column - 1)), shape=shape)
