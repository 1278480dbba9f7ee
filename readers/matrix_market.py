"""Matrix Market files of counts: scipy reads them, after every line has been checked."""

import re
from dataclasses import dataclass

import scipy.io

from readers.bounded import UNREADABLE, check_memory, open_bounded
from runtime.errors import InputError, one_line, plain

LONGEST_LINE = 100_000  # bytes

# Symmetric: scipy's writer says so of any matrix that happens to be.
BANNER = re.compile(
    "%%matrixmarket matrix coordinate (integer|unsigned-integer|real) (general|symmetric)"
)

# A number; nan and inf are read, too, as check_counts names their cell and gene.
NUMBER = r"-?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf)"

# Lines of two indices and a value, and blank lines. Possessive (*+), so that nothing is kept for
# backtracking.
ENTRIES = re.compile(rf"(?:[ \t]*(?:\d+[ \t]+\d+[ \t]+{NUMBER}[ \t]*)?\r?\n)*+".encode())


@dataclass
class Header:
    """The header of a Matrix Market file: ``symmetry`` is general or symmetric."""

    symmetry: str
    n_rows: int
    n_columns: int
    n_entries: int
    n_lines: int

    def for_scipy(self):
        """A header as long as the file's, so that the line numbers in scipy's errors are right.

        The type is real: an integer of any size is read, and refused later with its cell and gene.
        """
        comments = "%\n" * (self.n_lines - 2)
        size = f"{self.n_rows} {self.n_columns} {self.n_entries}"
        return f"%%MatrixMarket matrix coordinate real {self.symmetry}\n{comments}{size}\n".encode()


class CheckedLines:
    """The stream that scipy reads: a header, and the lines that follow it in a file.

    Each line is checked, as scipy crashes on some malformed lines, and reads the beginning of
    others ("1 1 2,5" as 2).
    """

    def __init__(self, header, file):
        self.header, self.file = header.for_scipy(), file

    def read(self, size):
        """Whole lines, about a megabyte of them; scipy takes more than it asks for."""
        header, self.header = self.header, b""
        if header:
            return header
        lines = self.file.read(1 << 20) + self.file.readline(LONGEST_LINE)
        if lines and not lines.endswith(b"\n"):  # scipy crashes on a last line without
            lines += b"\n"
        end = ENTRIES.match(lines).end()
        if end < len(lines):
            line = lines[end : end + 100].split(b"\n")[0].decode("utf-8", "replace")
            raise ValueError(f"found the line {line!r}")
        return lines


def read_header(file, path):
    """Read a file (bytes) up to the end of its header.

    Raises:
        InputError: it is not a sparse matrix of integers or real numbers.
    """
    banner = " ".join(file.readline(1000).decode("ascii").lower().split())
    match = BANNER.fullmatch(banner)
    if not match:
        raise InputError(
            f"{path}: found {plain(banner)[:100]!r}, expected a sparse Matrix Market file: "
            "%%MatrixMarket matrix coordinate integer general"
        )
    line, n_lines = file.readline(LONGEST_LINE), 2
    while line.startswith(b"%") or line.isspace():
        line, n_lines = file.readline(LONGEST_LINE), n_lines + 1
    n_rows, n_columns, n_entries = map(int, line.split())
    return Header(match[2], n_rows, n_columns, n_entries, n_lines)


def check_header(header, path, shape, named_by):
    """Check a header before memory is set aside for what it says; see :func:`read_mtx`."""
    found = header.n_rows, header.n_columns
    if found != shape:
        cause = "; it looks transposed" if found == shape[::-1] else ""
        raise InputError(
            f"{path}: found {found[0]} x {found[1]}, expected {shape[0]} {named_by[0]} x "
            f"{shape[1]} {named_by[1]}{cause}"
        )
    # gzip shrinks to a thousandth at best, and an entry has six bytes at least ("1 1 1" and a line
    # break).
    if not 0 <= header.n_entries <= 1032 * path.stat().st_size // 6:
        raise InputError(
            f"{path}: its header announces {header.n_entries:,} entries, which a file of its size "
            "cannot hold"
        )
    check_memory(24 * header.n_entries, path, "its entries")


def read_mtx(path, shape, named_by):
    """Read a Matrix Market file (plain or .gz) of sparse counts as COO, float64.

    Args:
        path: of the file. shape: that it must have. named_by: what its rows and its columns are,
            and which files list them, for the message.

    Raises:
        InputError: the file is unreadable, of another kind or shape, or an entry lies outside of
            the matrix.
    """
    expected = ""
    try:
        with open_bounded(path) as file:
            header = read_header(file, path)
        check_header(header, path, shape, named_by)
        n = f"{header.n_entries:,}"
        expected = (
            f"; its header says {n} entries, expected {n} lines of three numbers, no entry outside "
            f"of the {shape[0]} x {shape[1]} matrix"
        )
        with open_bounded(path, 100_000 + 100 * header.n_entries) as file:
            read_header(file, path)
            return scipy.io.mmread(CheckedLines(header, file))
    except UNREADABLE as error:
        raise InputError(
            f"{path}: not a readable Matrix Market file ({one_line(error)}){expected}"
        ) from error
