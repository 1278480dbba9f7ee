"""Text files from anywhere, read without trust: bounded in bytes, columns and memory."""

import csv
import gzip
import io
from pathlib import Path

import pandas as pd

from runtime.errors import InputError, one_line

MOST_COLUMNS = 300_000  # of a table; there are some 250,000 human transcripts

# What reading a broken file raises; each package has its own.
UNREADABLE = (ValueError, TypeError, EOFError, OSError, OverflowError, MemoryError)

UNREADABLE += (gzip.zlib.error, csv.Error, RecursionError)


def check_memory(n_bytes, where, what):
    """What a file says that it holds must fit into the memory that is free now.

    Raises:
        InputError: it does not.
    """
    import psutil

    free = psutil.virtual_memory().available
    if n_bytes > free:
        raise InputError(
            f"{where}: {what} need {n_bytes / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free"
        )


class BoundedFile(io.RawIOBase):
    """Bytes of a plain or gzipped text file, of which no more are given out than expected.

    A few kilobytes can be unpacked to terabytes.

    Args:
        path: of the file; gzip is known by its first two bytes.
        most: bytes; default: the memory that is free now.

    Raises:
        InputError: when more are read, or one of them is NUL, which readers of text take for the
            end of a field.
    """

    def __init__(self, path, most=None):
        import psutil

        self.path = Path(path)
        self.most = psutil.virtual_memory().available if most is None else most
        self.left = self.most
        self.raw = open(path, "rb")  # noqa: SIM115  closed by close()
        zipped = self.raw.read(2) == b"\x1f\x8b"
        self.raw.seek(0)
        self.unpacked = gzip.GzipFile(fileobj=self.raw) if zipped else self.raw

    def readable(self):
        return True

    def readinto(self, buffer):
        n = self.unpacked.readinto(buffer)
        self.left -= n
        if self.left < 0:
            raise InputError(
                f"{self.path}: holds more than {self.most:,} bytes when unpacked, expected fewer"
            )
        if b"\0" in bytes(buffer[:n]):
            raise InputError(f"{self.path}: holds NUL characters, expected UTF-8 text")
        return n

    def close(self):
        if not self.closed:
            self.raw.close()
        super().close()


def open_bounded(path, most=None):
    """A :class:`BoundedFile` with a buffer, for readers that ask for a few bytes at a time."""
    return io.BufferedReader(BoundedFile(path, most), 1 << 20)


def read_table(path, **options):
    """``pandas.read_csv`` of UTF-8 text, plain or gzipped, of unknown origin.

    Columns are text by default; at most MOST_COLUMNS, and no more than fits into memory.

    Raises:
        InputError: unreadable; the message is one line and names the file.
    """
    options = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"} | options
    try:
        with open_bounded(path) as file:
            first = file.readline(100 * MOST_COLUMNS).decode("utf-8", "replace")
        mark = options.get("sep", ",")
        if (found := first.count(mark) + 1) > MOST_COLUMNS:
            raise InputError(
                f"{path}: found {found:,} columns or more, expected at most {MOST_COLUMNS:,}"
            )
        with open_bounded(path) as file:
            return pd.read_csv(file, **options)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({one_line(error)})") from error
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable table ({one_line(error)})") from error
