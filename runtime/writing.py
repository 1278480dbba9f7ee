"""Files written whole or not at all."""

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
from runtime.signals import Interruption, Stopped

OLD = 3600  # seconds after which a temporary file is one that a killed run left behind


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
