"""What a file is by its first bytes, and the text in it: plain, packed, or through a pipe."""

import bz2
import gzip
import io
import lzma
import stat
import zipfile
from pathlib import Path

from readers.bounded import no_file
from runtime.errors import InputError, one_line

BLOCK = 1 << 20

PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"PK\x03\x04": "zip"}

BINARY = {  # first bytes of formats that are no text -> their names
    b"PAR1": "Parquet",
    b"ARROW1": "Feather",
    b"FEA1": "Feather",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xd0\xcf\x11\xe0": "Excel (.xls)",
    b"\x89HDF": "HDF5",
    b"%PDF": "PDF",
    b"\x89PNG": "PNG",
    b"RDX": "R data",
    b"X\n": "R data",
    b"\x93NUMPY": "NumPy",
    b"BAM\x01": "BAM",
}

# What broken archives raise.
BROKEN = (OSError, EOFError, ValueError, gzip.zlib.error, lzma.LZMAError, zipfile.BadZipFile)

REMEDIES = {
    "Zstandard": "unpack it with zstd -d",
    "Excel (.xls)": "save it as .xlsx or csv",
    "R data": "write it with write.csv in R",
    "NumPy": "expected a table with names",
    "BAM": "expected counts of genes, as featureCounts makes them",
}


def name_of_format(head):
    """Name of a binary format by the first bytes of a file; None for what may be text."""
    return next((name for magic, name in BINARY.items() if head.startswith(magic)), None)


def is_pipe(path):
    """Whether a path is a pipe or another stream that can be read only once."""
    mode = Path(path).stat().st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


def read_bounded(stream, limit, where):
    """All bytes of a stream.

    Raises:
        InputError: there are more than ``limit``.
    """
    parts, n = [], 0
    while part := stream.read(BLOCK):
        n += len(part)
        if n > limit:
            raise InputError(f"{where}: holds more than {limit:,} bytes, expected fewer")
        parts.append(part)
    return b"".join(parts)


def unpack(data, where, limit):
    """``(bytes, name of the packing)`` of gzip, bzip2, xz or zip; the name is "" for others.

    Raises:
        InputError: the archive is broken, holds several files, or more than ``limit`` bytes.
    """
    packing = next((name for magic, name in PACKED.items() if data.startswith(magic)), "")
    openers = {"gzip": gzip.GzipFile, "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}
    try:
        if packing == "zip":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if "[Content_Types].xml" in archive.namelist():
                    return data, ""  # a workbook
                with archive.open(only_member(archive, where)) as member:
                    return read_bounded(member, limit, where), packing
        if packing:
            opener = openers[packing]
            stream = (
                opener(fileobj=io.BytesIO(data)) if packing == "gzip" else opener(io.BytesIO(data))
            )
            with stream:
                return read_bounded(stream, limit, where), packing
    except (*BROKEN, RuntimeError, NotImplementedError) as error:  # zipfile: encrypted, unknown
        remedy = "; export it as csv" if packing == "zip" else ""
        raise InputError(f"{where}: not a readable table ({one_line(error)}){remedy}") from error
    return data, ""


def only_member(archive, where):
    """Name of the one file of a zip archive, without what macOS adds.

    Raises:
        InputError: there are several or none.
    """
    names = [
        name
        for name in archive.namelist()
        if not name.endswith("/") and not name.startswith("__MACOSX/")
    ]
    if len(names) != 1:
        raise InputError(f"{where}: found {len(names)} files in the archive, expected one table")
    return names[0]


def to_utf8(data, where):
    """``(UTF-8 bytes without a mark, encoding)`` of UTF-8, UTF-16 with its mark, or Windows-1252.

    Raises:
        InputError: it holds NUL or other control characters, so it is no text.
    """
    encoding = "UTF-8"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "UTF-16"
    try:
        text = data.decode("utf-8-sig" if encoding == "UTF-8" else "utf-16")
    except UnicodeDecodeError as error:
        if encoding == "UTF-16" or b"\0" in data:
            raise InputError(f"{where}: not UTF-8 text ({one_line(error)})") from error
        encoding = "Windows-1252"
        text = data.decode("cp1252", "replace")
        n_control = sum(ord(c) < 32 and c not in "\t\r\n\f" for c in text[:100_000])
        if n_control > 10 or "\ufffd" in text[:100_000]:
            raise InputError(f"{where}: not UTF-8 text ({one_line(error)})") from error
    if "\0" in text:
        raise InputError(f"{where}: holds NUL characters, expected UTF-8 text")
    if encoding == "UTF-8":
        return data.removeprefix(b"\xef\xbb\xbf"), encoding
    return text.encode(), encoding


def read_source(path, limit=None):
    """The bytes of a file or a pipe, unpacked, read once.

    Args:
        path: the file. limit: bytes before and after unpacking; default: the memory that is free.

    Returns:
        ``(bytes, name of the packing)``.

    Raises:
        InputError: it is missing, broken, or too large.
    """
    import psutil

    limit = psutil.virtual_memory().available if limit is None else limit
    try:
        with open(path, "rb") as file:
            data = read_bounded(file, limit, path)
    except FileNotFoundError as error:
        raise no_file(path, "bulk samples for --bulk") from error
    return unpack(data, path, limit)
