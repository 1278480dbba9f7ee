"""Files that come from anywhere, read without trust, and files written whole or not at all.

Whatever is wrong with one ends in an :class:`InputError`, whose message is the one line that the
user sees. What a file announces (sizes, columns, entries) is compared with the memory that is free
and with what a file of its size can hold, before any memory is set aside for it. Signals are caught
so that they, too, leave no file half-written.
"""

import contextlib
import csv
import gzip
import io
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

MOST_COLUMNS = 300_000  # of a table; there are some 250,000 human transcripts
OLD = 3600  # seconds after which a temporary file is one that a killed run left behind


class InputError(Exception):
    """Something the user gave cannot be used; the message is the one line the user sees."""


def plain(text):
    """Text as one line that a terminal shows as it is: names may hold line breaks or escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def some(names, limit=3):
    """A few of many names, for a message."""
    names = [plain(n) for n in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def one_line(error):
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------------------------------ signals


class Stopped(KeyboardInterrupt):
    """A signal asked the program to end; carries its number and the line that the user sees."""

    def __init__(self, number, message="interrupted: no file was left half-written"):
        super().__init__(message)
        self.number = number


class Interruption:
    """What a signal does: it ends the program at once, or calls ``later`` while that is set."""

    later = None

    @classmethod
    def handle(cls, number, frame):
        """Raise :class:`Stopped`, which lets ``finally`` clauses remove temporary files."""
        if cls.later is None:
            raise Stopped(number)
        cls.later(number)


@contextlib.contextmanager
def catch_signals():
    """Let Ctrl-C, SIGTERM and a closed terminal go to :class:`Interruption`, then as before.

    Signals that the caller's shell has set to be ignored (nohup) stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    numbers = [getattr(signal, n, None) for n in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = {n: signal.getsignal(n) for n in numbers if n is not None}
    before = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, Interruption.handle)
        yield
    finally:
        Interruption.later = None
        for number, old in before.items():
            signal.signal(number, old)


# ------------------------------------------------------------------------------------ reading


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


def check_hdf5(path, within=()):
    """Look through an HDF5 file before it is read: what it holds must be its own and must fit.

    By ``check_hdf5.py`` in a process of its own, since a broken file can crash or hang the library.
    within: groups that will be read; default: all of the file.

    Raises:
        InputError: it does crash, hang, or end in an error; a dataset lies in other files, or is a
            link to one; or all of them together, unpacked, do not fit into memory.
    """
    program = Path(__file__).with_name("check_hdf5.py")
    seconds = 20 + os.path.getsize(path) / 1e7
    try:
        done = subprocess.run(
            [sys.executable, program, path, *within],
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"{path}: a broken HDF5 file (the library did not come to an end in {seconds:.0f} s)"
        ) from error
    if done.returncode:
        last = done.stderr.strip().splitlines() or [f"the library ended with {done.returncode}"]
        raise InputError(f"{path}: not a readable HDF5 file ({last[-1]})")
    if done.stdout.startswith("refused:"):
        raise InputError(f"{path}: {done.stdout.removeprefix('refused:').strip()}")
    check_memory(int(done.stdout), path, "its datasets")


# What reading a broken file raises; each package has its own.
UNREADABLE = (ValueError, TypeError, EOFError, OSError, OverflowError, MemoryError)
UNREADABLE += (gzip.zlib.error, csv.Error, RecursionError)


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


# ------------------------------------------------------------------------------------ writing


def new_temporary(path):
    """Create an empty file beside ``path``, of a name that was not there, and return its path."""
    # The suffix stays last: some writers choose the format by it.
    token = secrets.token_hex(4)
    temporary = path.with_name(f".{path.stem}.{token}.tmp{path.suffix}")
    # Exclusively, so that no link somebody has put there is followed.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return temporary


def remove_left_over(path):
    """Remove the temporary files that killed runs left for ``path``."""
    stem, suffix = re.escape(path.stem), re.escape(path.suffix)
    for old in path.parent.iterdir():
        if re.fullmatch(rf"\.{stem}\.[0-9a-f]{{8}}\.tmp{suffix}", old.name):
            with contextlib.suppress(OSError):  # another run has been faster
                if time.time() - old.lstat().st_mtime > OLD:
                    old.unlink()
                    print(f"{old}: left behind by a killed run, removed")


def write_whole(path, write):
    """Call ``write(temporary path)``, then move the file into place: whole or not at all.

    Raises:
        InputError: it could not be written; what was there before is as it was.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(path)
        temporary = new_temporary(path)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut may keep the new name and lose the content
        os.replace(temporary, path)
    except OSError as error:
        reason = plain(error.strerror or one_line(error))
        raise InputError(
            f"{path}: could not be written ({reason}); what was there before is untouched"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


class PatientFile(io.FileIO):
    """A file for HDF5 to write to, which keeps the first error for later and goes on as if written.

    The HDF5 library crashes when it cannot write what it still holds, on a full disk say.
    """

    error = None

    def write(self, data):
        """Write all of data, or nothing any more after an error."""
        left = memoryview(data).cast("B")
        n = len(left)
        try:
            while len(left) and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return n

    def truncate(self, size=None):
        """Set the size, unless there was an error."""
        try:
            return super().truncate(size) if self.error is None else size
        except OSError as error:
            self.error = error

    def check(self):
        """Raise the error, if there was one."""
        if self.error is not None:
            raise self.error


def write_cells(path, blocks, genes, describe):
    """Write an .h5ad whose counts come block by block, whole or not at all.

    Memory is that of one block and of what stands beside the counts. Signals wait for the end of a
    block.

    Args:
        blocks: iterable of counts (B x G), CSR int32.
        genes: names (G).
        describe: called after the last block; returns an AnnData of all cells without counts:
            their ``.obs``, ``.obsm`` and ``.uns``.
    """
    import anndata
    import h5py

    def fill(sink):
        with h5py.File(sink, "w") as file:
            none = sp.csr_matrix((0, len(genes)), dtype=np.int32)
            empty = anndata.AnnData(none, var=pd.DataFrame(index=genes))
            anndata.io.write_elem(file, "/", empty)
            # 64-bit row pointers: a million cells have more than 2^31 counts that are not zero.
            # Bytes shuffled, the fastest gzip packs tighter, in a third of the time, than its
            # usual level does without.
            options = dict(compression="gzip", compression_opts=1, shuffle=True, chunks=(1 << 14,))
            options["indptr_dtype"] = np.int64
            anndata.io.write_elem(file, "X", none, dataset_kwargs=options)
            X = anndata.io.sparse_dataset(file["X"])
            for block in blocks:
                X.append(block)
                sink.check()
                if came:
                    raise Stopped(came[0])
            cells = describe()
            for name, own in (
                ("obs", cells.obs),
                ("obsm", dict(cells.obsm)),
                ("uns", dict(cells.uns)),
            ):
                anndata.io.write_elem(file, name, own)

    came = []  # signals; one that ends HDF5 in the midst of writing would crash it

    def write(part):
        Interruption.later = came.append
        try:
            with PatientFile(part, "r+") as sink:
                fill(sink)
                sink.check()
        finally:
            Interruption.later = None
        if came:
            raise Stopped(came[0])

    write_whole(path, write)


def check_writable(folder):
    """Make a folder if needed, and see that files can be made in it.

    Raises:
        InputError: they cannot.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new_temporary(folder / "test").unlink()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{folder}: cannot be written to ({reason}), expected a folder") from error
