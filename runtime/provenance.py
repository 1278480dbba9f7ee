"""Where an output comes from: version, command, and checksums of what was read."""

import hashlib
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd

from runtime.cell_writers import FOLDER_FILES
from runtime.flags import flag
from runtime.script import as_utf8
from runtime.version import VERSION

MAX_FILES = 1000  # of a folder

# What a 10x folder may hold of counts.
MATRICES = {*FOLDER_FILES, "matrix.mtx", "barcodes.tsv", "features.tsv", "genes.tsv"}


def checksum(path):
    """SHA-256 (hex) of a file, "" for what is none: a pipe, say, which can be read only once."""
    path = Path(path)
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_read(roles):
    """Table of the files that a run reads, with their checksums.

    Args:
        roles: dict from a role (``bulk``, ``weights``) to paths; of a folder, those files in it
            that hold the counts of cells, or else all.

    Returns:
        DataFrame with columns role, file, sha256.
    """
    rows = []
    for role, paths in roles.items():
        for path in map(Path, paths):
            files = [path]
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.is_file())[:MAX_FILES]
                files = [p for p in inside if p.name in MATRICES] or inside
            rows += [(role, as_utf8(str(file)), checksum(file)) for file in files]
    return pd.DataFrame(rows, columns=["role", "file", "sha256"], dtype=object)


def typed(settings, left_out=()):
    """Settings as a dict of values that an .h5ad can hold, in order; without those that are None.

    Tuples become arrays of text, paths text. left_out: names of fields without a bearing.
    """
    values = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in left_out or value is None or value == ():
            continue
        if isinstance(value, tuple):
            value = np.array([as_utf8(str(v)) for v in value], dtype=object)
        elif isinstance(value, (str, Path)):
            value = as_utf8(str(value))
        values[field.name] = value
    return values


def command_of(settings, script):
    """The command line that gives these settings: those that are not the defaults."""
    words = ["python", script]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(flag(field.name) if value else f"--no-{field.name.replace('_', '-')}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [flag(field.name), *(as_utf8(str(v)) for v in values)]
    return " ".join(map(shlex.quote, words))


def run_name(settings, files, contents, aside):
    """A short name (hex) of a run: the same for the same settings, weights and input.

    Args:
        settings: dict of :func:`typed`. files: of :func:`files_read`. contents: hash of what was
            read from elsewhere than files. aside: settings that change no cell, such as paths.
    """
    parts = [VERSION, contents]
    parts += [f"{k}={list(np.atleast_1d(v))}" for k, v in settings.items() if k not in aside]
    parts += list(files["role"] + files["sha256"])
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
