"""From the command line to ``main(settings)``, and from any failure to one line on stderr."""

import contextlib
import io
import os
import shutil
import sys
import time
from dataclasses import fields
from functools import partial
from itertools import takewhile
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Literal, get_args, get_origin

import tyro
from tyro import _errors as tyro_errors

from runtime.arguments import IN_SCRIPT, describe
from runtime.errors import InputError, UsageError, one_line, plain
from runtime.flags import flag, help_text, is_several, unknown_flags, with_current_names
from runtime.signals import Stopped, catch_signals, end_at_signals
from runtime.version import VERSION


def plain_settings(settings):
    """Settings as a dict of plain values, in the order of their definition, to be saved."""
    classes = reversed(type(settings).__mro__)
    names = dict.fromkeys(n for c in classes for n in getattr(c, "__annotations__", ()))
    values = {name: getattr(settings, name) for name in names}
    # A NumPy scalar, which torch.load(weights_only=True) does not read.
    values = {k: v.item() if hasattr(v, "item") else v for k, v in values.items()}
    values = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
    return {k: as_utf8(v) if isinstance(v, str) else v for k, v in values.items()}


def as_utf8(text):
    """Text that a file can hold: of a name on the command line, bytes may be no UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class Tee(io.TextIOBase):
    """A stream that passes on what it gets and keeps its lines, but for those of progress bars."""

    def __init__(self, stream, lines):
        self.stream, self.lines, self.rest = stream, lines, ""

    def write(self, text):
        *whole, self.rest = (self.rest + text).split("\n")
        self.lines += [line for line in whole if line.strip() and "\r" not in line]
        return self.stream.write(text)

    def flush(self):
        self.stream.flush()

    def __getattr__(self, name):  # encoding, isatty, fileno: as of the stream itself
        return getattr(self.stream, name)


@contextlib.contextmanager
def recorded():
    """Yield a list that gets every line which the body prints on stdout and stderr."""
    lines = []
    out, err = Tee(sys.stdout, lines), Tee(sys.stderr, lines)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield lines


# Types of settings -> values that they take, and what these are called.
KINDS = {
    bool: (bool, "True or False"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    str: ((str, Path), "text"),
    Path: ((str, Path), "a path"),
    type(None): (type(None), "None"),
}


def check_settings(settings):
    """Check the values of settings made in Python by their types, which Python itself does not.

    Raises:
        InputError: a value is of another type, or none of the choices.
    """
    for field in fields(settings):
        value, kind = getattr(settings, field.name), field.type
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise wrong_choice(flag(field.name), value, get_args(kind))
            continue
        kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        known = [KINDS.get(each, ((tuple, list), "several values")) for each in kinds]
        is_flag = isinstance(value, bool) and bool not in kinds  # True is an integer to Python
        if is_flag or not any(isinstance(value, types) for types, _ in known):
            expected = " or ".join(name for _, name in known)
            raise InputError(f"{flag(field.name)}: found {describe(value)}, expected {expected}")


def wrong_choice(name, value, choices):
    """The error of a value that is none of the choices."""
    *others, last = choices
    return InputError(f"{name}: found {value}, expected {', '.join(others)} or {last}")


def raise_in_one_line(settings_class, arguments, event):
    """Raise what tyro would print as a box of several lines.

    Args:
        arguments: of the command line, flags by their current names. event: a parse error of tyro.

    Raises:
        InputError: a value is none of the choices. UsageError: anything else.
    """
    names = getattr(getattr(event, "argument", None), "lowered", None)
    name = names.name_or_flags[-1] if names else "command line"
    if isinstance(event, tyro_errors.InvalidChoice):
        raise wrong_choice(name, event.value, event.choices)
    if isinstance(event, tyro_errors.UnrecognizedArgs):
        raise unknown_flags(settings_class, event.tokens)
    if isinstance(event, tyro_errors.MissingArgs):
        missing = [each.arg.lowered.name_or_flags[-1] for each in event.missing_arguments]
        raise UsageError(f"found no {' and no '.join(missing)}, expected a value of each")
    for field in fields(settings_class):
        if flag(field.name) == name:
            found = " ".join(values_of(name, arguments)) or "no value"
            raise UsageError(f"{name}: found {found}, expected {expected_of(field.type)}")
    raise UsageError(f"{name}: {one_line(getattr(event, 'message', 'see --help'))}")


def values_of(name, arguments):
    """What the command line gives after the last flag of this name."""
    places = [i for i, argument in enumerate(arguments) if argument.partition("=")[0] == name]
    _, equals, value = arguments[places[-1]].partition("=")
    rest = arguments[places[-1] + 1 :]
    following = takewhile(lambda argument: not argument.startswith("--"), rest)
    return [value] * bool(equals) + list(following)


def expected_of(kind):
    """What a flag of a type takes, in words."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    kinds = [each for each in get_args(kind) or (kind,) if each not in (type(None), Ellipsis)]
    if get_origin(kind) is tuple:
        n = "one or more" if is_several(kind) else len(kinds)
        return f"{n} values, each {KINDS[kinds[0]][1]}"
    if isinstance(kind, UnionType):
        return " or ".join(map(expected_of, kinds))
    return KINDS[kind][1]


@contextlib.contextmanager
def silence():
    """Print nothing."""
    with (
        open(os.devnull, "w") as devnull,
        contextlib.redirect_stdout(devnull),
        contextlib.redirect_stderr(devnull),
    ):
        yield


@contextlib.contextmanager
def errors_in_one_line():
    """Turn what goes wrong into one line on stderr and an exit status.

    1 for bad input, a full disk or too little memory; 2 for an unusable command line; 128 + its
    number for a signal.
    """
    try:
        with catch_signals():
            yield
    except UsageError as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        sys.exit(2)
    except InputError as error:  # printed on exit, when a progress bar has ended its line
        sys.exit(f"error: {plain(error)}")
    except OSError as error:  # no such file, no permission, disk full, in the system's own words
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {plain(where)}{plain(error.strerror or error)}")
    except MemoryError as error:
        sys.exit(f"error: not enough memory ({plain(error) or 'none left'})")
    except RuntimeError as error:  # torch's way of saying so, on CPU and on a GPU
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        sys.exit(f"error: not enough memory ({plain(one_line(error))}); a smaller --batch-size?")
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)


class Listener(io.FileIO):
    """stdout or stderr that takes all, also when nobody reads on, as behind ``| head``."""

    def write(self, data):
        """Write, if that is possible: no message is worth the files of a run."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def safe_stream(stream):
    """A text stream in place of stdout or stderr, which fails at no letter and at no reader."""
    if stream is None:  # closed by the caller, as by ``2>&-``
        return open(os.devnull, "w")
    try:
        number = stream.fileno()
    except (OSError, AttributeError):  # of a test or a notebook, in memory
        return stream
    binary = io.BufferedWriter(Listener(number, "w", closefd=False))
    by_line = stream.line_buffering or stream.write_through  # a terminal, or python -u
    return io.TextIOWrapper(binary, stream.encoding, "backslashreplace", line_buffering=by_line)


def prepare_process():
    """Make what the caller left to this process harmless: its streams, its matplotlib, Ctrl-C."""
    sys.stdout, sys.stderr = safe_stream(sys.stdout), safe_stream(sys.stderr)
    # Before any import of matplotlib: a notebook's backend, inherited, fails in a process without.
    os.environ["MPLBACKEND"] = "Agg"
    end_at_signals()  # the slow imports follow


def expand_home(argument):
    """An argument with its ``~`` as the home folder, also that of ``--flag=~/x``, unlike shells."""
    name, equals, value = argument.partition("=") if argument[:2] == "--" else ("", "", argument)
    if value == "~" or value.startswith("~/"):
        value = os.path.expanduser(value)
    return name + equals + value


def read_command_line(settings_class):
    """Settings from the command line; ``--help`` and ``--version`` are answered, and end it.

    Raises:
        InputError: a flag or its value cannot be used.
    """
    arguments = [expand_home(argument) for argument in sys.argv[1:]]
    if {"-h", "--help"} & set(arguments):
        width = shutil.get_terminal_size().columns
        print(help_text(settings_class, Path(sys.argv[0]).name, width))
        sys.exit()
    if "--version" in arguments:
        print(f"bulk2sc {VERSION}")
        sys.exit()
    arguments = with_current_names(settings_class, arguments)
    with tyro_errors.on_parse_error(partial(raise_in_one_line, settings_class, arguments)):
        return tyro.cli(settings_class, args=arguments)


def parse_args(settings_class):
    """Settings from the command line; with ``torchrun`` the first process alone reports errors.

    Exits after ``--help``, and in one line on stderr when a flag or its value cannot be used.
    """
    # Of a script that has a process of its own, not one that is imported or run in a notebook.
    if settings_class.__module__ == "__main__" and "IPython" not in sys.modules:
        prepare_process()
    with errors_in_one_line():
        if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0":
            return read_command_line(settings_class)
        try:
            with silence():
                return read_command_line(settings_class)
        except (InputError, SystemExit) as end:
            time.sleep(1)  # torchrun ends all processes as soon as the first one has ended
            sys.exit(getattr(end, "code", 1))


def run_script(main, settings):
    """Run ``main(settings)``; what goes wrong ends in one line, see :func:`errors_in_one_line`."""
    with errors_in_one_line():
        token = IN_SCRIPT.set(True)
        try:
            main(settings)
        finally:
            IN_SCRIPT.reset(token)
