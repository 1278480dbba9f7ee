"""Files written whole or not at all: to a temporary file first, moved into place at the end."""

import contextlib
import io
import os
import re
import secrets
import time
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from runtime.errors import InputError, one_line, plain
from runtime.signals import Stopped, defer_signals

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


def check_writable(folder):
    """Make a folder if needed, and check that files can be created in it.

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


# ------------------------------------------------------------------------- .h5ad, block by block


class PatientFile(io.FileIO):
    """A file for HDF5 to write to, which keeps the first error and then only pretends to write.

    The HDF5 library crashes when it cannot flush its buffers, on a full disk for example.
    """

    error = None

    def write(self, data):
        """Write all of data, or nothing once there was an error."""
        rest = memoryview(data).cast("B")
        n = len(rest)
        try:
            while len(rest) and self.error is None:
                rest = rest[super().write(rest) :]
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


class CellsWriter:
    """An .h5ad that is being written: counts block by block, then the tables beside them."""

    def __init__(self, file, sink, signals, genes):
        import anndata

        self.file, self.sink, self.signals = file, sink, signals
        empty = sp.csr_matrix((0, len(genes)), dtype=np.int32)
        anndata.io.write_elem(file, "/", anndata.AnnData(empty, var=pd.DataFrame(index=genes)))
        # 64-bit row pointers: a million cells have more than 2^31 non-zero counts. With bytes
        # shuffled, the fastest gzip level packs tighter than the default does without, in a third
        # of the time.
        options = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
        options |= {"chunks": (1 << 14,), "indptr_dtype": np.int64}
        anndata.io.write_elem(file, "X", empty, dataset_kwargs=options)
        self.X = anndata.io.sparse_dataset(file["X"])

    def append(self, counts):
        """Write the counts (B x G), CSR int32, of the next cells."""
        self.X.append(counts)
        self.sink.check()
        if self.signals:
            raise Stopped(self.signals[0])

    def write_tables(self, cells):
        """Write ``.obs``, ``.obsm`` and ``.uns`` of an AnnData of all cells without counts."""
        import anndata

        for name in ("obs", "obsm", "uns"):
            table = getattr(cells, name)
            anndata.io.write_elem(self.file, name, table if name == "obs" else dict(table))


@contextlib.contextmanager
def open_cells(path, genes):
    """Yield a :class:`CellsWriter`; the .h5ad appears whole at ``path`` or not at all.

    Memory is that of one block and of the tables. Signals wait for the end of a block, because one
    that interrupts HDF5 while it writes would crash it.

    Args:
        path: of the .h5ad. genes: names (G).
    """
    import h5py

    with (
        whole_file(path) as temporary,
        defer_signals() as signals,
        PatientFile(temporary, "r+") as sink,
    ):
        with h5py.File(sink, "w") as file:
            yield CellsWriter(file, sink, signals, genes)
        sink.check()
