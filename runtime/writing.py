"""Files written whole or not at all: to a temporary file first, moved into place at the end."""

import contextlib
import io
import os
import re
import secrets
import time
from pathlib import Path

from runtime.errors import InputError, one_line, plain
from runtime.signals import defer_signals

OLD = 3600  # seconds after which a temporary file counts as left behind by a killed run


def new_temporary(path):
    """Create an empty file of a new name beside ``path``, and return its path."""
    # The suffix stays last: some writers choose the format by it.
    token = secrets.token_hex(4)
    temporary = path.with_name(f".{path.stem}.{token}.tmp{path.suffix}")
    # O_EXCL, so that a link that somebody has put there is not followed.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return temporary


def remove_left_over(path):
    """Remove the temporary files that killed runs left for ``path``."""
    stem, suffix = re.escape(path.stem), re.escape(path.suffix)
    for old in path.parent.iterdir():
        if re.fullmatch(rf"\.{stem}\.[0-9a-f]{{8}}\.tmp{suffix}", old.name):
            with contextlib.suppress(OSError):  # another run may have removed it
                if time.time() - old.lstat().st_mtime > OLD:
                    old.unlink()
                    print(f"{old}: left behind by a killed run, removed")


@contextlib.contextmanager
def whole_file(path):
    """Yield the path of a temporary file; move it to ``path`` if the body succeeds.

    Raises:
        InputError: it could not be written; what was there before is as it was.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(path)
        temporary = new_temporary(path)
        yield temporary
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


def write_whole(path, write):
    """Call ``write(temporary path)``, then move the file into place, as :func:`whole_file`."""
    with whole_file(path) as temporary:
        write(temporary)


def check_writable(folder, setting="--out"):
    """Raise InputError unless files can be created in a folder, or the folder itself.

    Args:
        folder: the path. setting: the flag that names it.
    """
    folder = Path(folder)
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    try:
        new_temporary(there / "test").unlink()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{folder}: cannot be written to ({reason}), expected a folder that can; {setting} "
            "names it"
        ) from error


def first_line(path):
    """The first line of a text file, or None if it has none."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline(1000).rstrip("\n")
    except (OSError, UnicodeDecodeError):
        return None


def has_entries(path, names):
    """Whether a file is HDF5 and has groups or datasets of all these names."""
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            return all(name in file for name in names)
    except Exception:  # whatever HDF5 says of it, it is another file
        return False


# ------------------------------------------------------------------------------------------ HDF5


class PatientFile(io.FileIO):
    """A file for HDF5 to write to, which keeps the first error and then writes to memory alone.

    The HDF5 library crashes when it cannot flush its buffers, on a full disk for example, and when
    it reads back other bytes than it wrote.
    """

    error = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.kept = []  # (position, bytes) of what was written after the error
        self.end = 0  # of the file after the error, as HDF5 sees it

    def fail(self, error):
        """Keep the error; from now on nothing reaches the disk."""
        self.error, self.end = error, os.fstat(self.fileno()).st_size

    def seek(self, offset, whence=os.SEEK_SET):
        """Move, where the end of the file is what HDF5 takes it to be."""
        if self.error is not None and whence == os.SEEK_END:
            offset, whence = self.end + offset, os.SEEK_SET
        return super().seek(offset, whence)

    def write(self, data):
        """Write all of data, or keep it in memory once there was an error."""
        rest = memoryview(data).cast("B")
        n = len(rest)
        try:
            while len(rest) and self.error is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.fail(error)
        if len(rest):
            self.kept.append((self.tell(), bytes(rest)))
            self.end = max(self.end, self.seek(len(rest), os.SEEK_CUR))
        return n

    def readinto(self, buffer):
        """Read what was written, to the disk or to memory, and zeros where nothing was."""
        view, start, n = memoryview(buffer).cast("B"), self.tell(), 0
        while n < len(view) and (read := super().readinto(view[n:])):
            n += read
        view[n:] = bytes(len(view) - n)
        for position, data in self.kept:
            first, last = max(start, position), min(start + len(view), position + len(data))
            if first < last:
                view[first - start : last - start] = data[first - position : last - position]
        self.seek(start + len(view))
        return len(view)

    def truncate(self, size=None):
        """Set the size, after an error only as HDF5 sees it."""
        if self.error is None:
            try:
                return super().truncate(size)
            except OSError as error:
                self.fail(error)
        self.end = self.tell() if size is None else size
        return self.end

    def check(self):
        """Raise the error, if there was one."""
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def open_hdf5(path):
    """Yield ``(h5py.File, its PatientFile, signals)``; the file appears whole or not at all.

    Signals wait in the list, because one that interrupts HDF5 while it writes would crash it.
    """
    import h5py

    with (
        whole_file(path) as temporary,
        defer_signals() as signals,
        PatientFile(temporary, "r+") as sink,
    ):
        with h5py.File(sink, "w") as file:
            yield file, sink, signals
        sink.check()


def write_anndata(file, table, **options):
    """Write an AnnData into an open HDF5 file, so that anndata before 0.12 reads it, too."""
    import anndata

    anndata.io.write_elem(file, "/", table, dataset_kwargs=options)
    if table.raw is None and "raw" in file:  # an empty one, whose encoding is new in 0.12
        del file["raw"]


def write_h5ad(path, table):
    """Write an AnnData whole or not at all; a full disk is an error where anndata's own crashes."""
    table.strings_to_categoricals()
    with open_hdf5(path) as (file, _, _):
        write_anndata(file, table, compression="gzip")
