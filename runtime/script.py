"""From the command line to ``main(settings)``, and from any failure to one line."""

import contextlib
import os
import sys
import time
from dataclasses import fields
from pathlib import Path

import tyro

from runtime.errors import InputError, one_line, plain
from runtime.signals import Stopped, catch_signals


def flag(field_name):
    """The command-line spelling of a settings field."""
    return "--" + field_name.replace("_", "-")


@contextlib.contextmanager
def silence():
    """Print nothing."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def parse(settings_class):
    """Settings from the command line; of the processes of torchrun, the first says what is wrong.

    Raises:
        InputError: a value is out of range. SystemExit: after --help or an unknown flag.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0":
        return tyro.cli(settings_class)
    try:
        with silence():
            return tyro.cli(settings_class)
    except (InputError, SystemExit) as end:
        time.sleep(1)  # torchrun ends all when the first of them has ended
        sys.exit(getattr(end, "code", 1))


def run_script(main, settings_class):
    """Parse the command line, then run ``main(settings)``; what goes wrong ends in one line.

    Exit status 1 for bad input, a full disk or too little memory; 128 + its number for a signal.
    """
    try:
        with catch_signals():
            main(parse(settings_class))
    except InputError as error:
        sys.exit(f"error: {plain(error)}")
    except OSError as error:  # no such file, no permission, disk full: the system's own words do
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {plain(where)}{plain(error.strerror or error)}")
    except MemoryError as error:
        sys.exit(f"error: not enough memory ({plain(error) or 'none left'})")
    except RuntimeError as error:  # how torch says it, on CPU and on a GPU
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        sys.exit(f"error: not enough memory ({plain(one_line(error))}); a smaller --batch-size?")
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)


def plain_settings(settings):
    """Settings as a dict of plain values, to be saved with a model or a result."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
