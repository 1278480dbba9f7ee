"""Text files of unknown origin, read with limits on bytes, columns and memory."""

import csv
import gzip
import io
import os
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

from runtime.errors import InputError, one_line, plain

MAX_COLUMNS = 300_000  # of a table; there are about 250,000 human transcripts
MAX_BYTES = 10**9  # of a workbook when unpacked

# What broken files raise, depending on the library that reads them.
UNREADABLE = (
    *(ValueError, TypeError, EOFError, OSError, OverflowError, MemoryError, RecursionError),
    *(gzip.zlib.error, csv.Error),
)


def no_file(path, expected, what="file"):
    """The error of a path at which nothing is, or a link to nothing."""
    path = Path(path)
    if path.is_symlink():
        found = f"a link to {plain(os.readlink(path))}, which is not there"
    else:
        found = f"no such {what}"
    return InputError(f"{path}: {found}; expected {expected}")


def check_memory(n_bytes, where, what):
    """Refuse what does not fit into the memory that is free now.

    Args:
        n_bytes: size that a file claims. where: the file. what: which part of it claims that size.
    """
    import psutil

    free = psutil.virtual_memory().available
    if n_bytes > free:
        raise InputError(
            f"{where}: {what} need {n_bytes / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free"
        )


class BoundedFile(io.RawIOBase):
    """The bytes of a plain or gzipped text file, up to a limit.

    A gzip file of a few kilobytes can unpack to terabytes.

    Args:
        path: the file; gzip is recognised by its first two bytes.
        limit: bytes after unpacking; default: the memory that is free now.

    Raises:
        InputError: on reading more than the limit, or a NUL character, which text parsers take for
            the end of a field.
    """

    def __init__(self, path, limit=None):
        import psutil

        self.path = Path(path)
        self.limit = psutil.virtual_memory().available if limit is None else limit
        self.remaining = self.limit
        self.raw = open(path, "rb")  # noqa: SIM115  closed by close()
        is_gzip = self.raw.read(2) == b"\x1f\x8b"
        self.raw.seek(0)
        self.unpacked = gzip.GzipFile(fileobj=self.raw) if is_gzip else self.raw

    def readable(self):
        return True

    def readinto(self, buffer):
        n = self.unpacked.readinto(buffer)
        self.remaining -= n
        if self.remaining < 0:
            raise InputError(
                f"{self.path}: holds more than {self.limit:,} bytes when unpacked, expected fewer"
            )
        if b"\0" in bytes(buffer[:n]):
            raise InputError(f"{self.path}: holds NUL characters, expected UTF-8 text")
        return n

    def close(self):
        if not self.closed:
            self.raw.close()
        super().close()


def open_bounded(path, limit=None):
    """Open a :class:`BoundedFile` with a buffer, so that short reads are cheap."""
    return io.BufferedReader(BoundedFile(path, limit), 1 << 20)


def read_table(path, **options):
    """Read a table of UTF-8 text, plain or gzipped, with ``pandas.read_csv``.

    Args:
        path: the file. options: for pandas; columns are text unless ``dtype`` says otherwise.

    Raises:
        InputError: it is unreadable, or has more than MAX_COLUMNS columns or bytes than fit into
            memory.
    """
    options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"} | options
    try:
        with open_bounded(path) as file:
            first_line = file.readline(100 * MAX_COLUMNS).decode("utf-8", "replace")
        n_columns = first_line.count(options.get("sep", ",")) + 1
        if n_columns > MAX_COLUMNS:
            raise InputError(
                f"{path}: found {n_columns:,} columns or more, expected at most {MAX_COLUMNS:,}"
            )
        with open_bounded(path) as file:
            return pd.read_csv(file, **options)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({one_line(error)})") from error
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable table ({one_line(error)})") from error


def read_excel(source, **options):
    """Read a workbook with ``pandas.read_excel``, unless it unpacks to more than MAX_BYTES.

    Args:
        source: a path or a binary file. options: for pandas.

    Raises:
        Exception: zipfile, openpyxl and XML parsers raise many types of errors on broken files.
    """
    with zipfile.ZipFile(source) as file:
        size = sum(record.file_size for record in file.infolist())
    if size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes when unpacked, expected at most {MAX_BYTES:,}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pd.read_excel(source, **options)


def to_numbers(values):
    """Text or numbers as float64 in the same shape, NaN for what is no number.

    pandas crashes on exponents of many digits (1e4002161627746957), which here are no numbers.
    """
    values = np.asarray(values)
    if values.dtype.kind in "biuf":
        return values.astype(np.float64)
    flat = values.astype(object).ravel()
    for i, value in enumerate(flat):
        if (
            isinstance(value, str)
            and "e" in value.lower()
            and re.search(r"e[-+]?\d{4}", value, re.I)
        ):
            flat[i] = None
    numbers = pd.to_numeric(flat, errors="coerce")
    return numbers.astype(np.float64).reshape(values.shape)


def to_amounts(text, path, place, expected, largest=np.inf, missing=()):
    """Numbers (R, C) of 0 or more from a table of text, NaN for the texts in ``missing``.

    Args:
        text: DataFrame (R x C). path: the file. place: of a value in messages, such as
            ``(gene {}, column {})``. expected: in words. largest: that a number may be.

    Raises:
        InputError: a value is another one.
    """
    values = to_numbers(text)
    known = ~text.isin(missing).to_numpy()
    wrong = known & ~(np.isfinite(values) & (values >= 0) & (values <= largest))
    if wrong.any():
        i, j = np.argwhere(wrong)[0]
        where = place.format(text.index[i], text.columns[j])
        raise InputError(f"{path}: found {text.iat[i, j]!r} {where}, expected {expected}")
    return values
