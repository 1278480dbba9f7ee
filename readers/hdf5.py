"""A check of HDF5 files of unknown origin before they are read."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from readers.bounded import check_memory
from runtime.errors import InputError, one_line

# Kind of HDF5 file -> groups that tell it, and the ending by which it is read.
KINDS = {
    "an AnnData file": ({"obs", "var"}, ".h5ad"),
    "a 10x file": ({"matrix"}, ".h5"),
    "an h5Seurat file": ({"assays", "cell.names"}, ".h5seurat"),
}


@contextlib.contextmanager
def readable(path, kind=".h5ad"):
    """Raise what h5py, anndata and scanpy make of a broken file, many types of errors, as one.

    Raises:
        InputError: in place of any other error of the body.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: not a readable {kind} file ({one_line(error)})") from error


def check_hdf5(path, within=()):
    """Check that an HDF5 file can be read, fits into memory and points to no other file.

    ``hdf5_probe.py`` reads it in a separate process, as a broken file can crash or hang the HDF5
    library.

    Args:
        path: the file. within: groups whose size counts; default: the whole file.

    Raises:
        InputError: the library crashes, hangs or fails; a dataset is stored in another file or
            linked from one; or the datasets, uncompressed, do not fit into memory.
    """
    program = Path(__file__).with_name("hdf5_probe.py")
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


def check_kind(path, ending):
    """Refuse an HDF5 file of another kind than its ending says, with an InputError."""
    import h5py

    with h5py.File(path) as file:
        kinds = {kind: end for kind, (groups, end) in KINDS.items() if groups <= set(file)}
    if kinds and ending not in kinds.values():
        kind, end = next(iter(kinds.items()))
        raise InputError(f"{path}: found {kind}, expected {ending}; rename it to {end}")
