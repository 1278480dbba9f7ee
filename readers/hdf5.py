"""HDF5 files from anywhere, looked through before they are read."""

import os
import subprocess
import sys
from pathlib import Path

from readers.bounded import check_memory
from runtime.errors import InputError


def check_hdf5(path, within=()):
    """Look through an HDF5 file before it is read: what it holds must be its own and must fit.

    By ``hdf5_probe.py`` in a process of its own, since a broken file can crash or hang the library.
    within: groups that will be read; default: all of the file.

    Raises:
        InputError: it does crash, hang, or end in an error; a dataset lies in other files, or is a
            link to one; or all of them together, unpacked, do not fit into memory.
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
