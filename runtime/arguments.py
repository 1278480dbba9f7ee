"""Arguments of the functions for Python: what they are, and errors that name them."""

import functools
import operator
import re
from contextvars import ContextVar

from runtime.errors import InputError

IN_SCRIPT = ContextVar("in_script", default=False)  # whether users gave flags, not arguments

FLAG = re.compile(r"(?<![\w./-])--([a-z]+(?:-[a-z]+)*)")


def in_user_terms(text):
    """A message with flags (``--n-cells``) in a script, with arguments (``n_cells``) elsewhere."""
    return text if IN_SCRIPT.get() else FLAG.sub(lambda match: match[1].replace("-", "_"), text)


def for_python(function):
    """Decorator: InputErrors name arguments in place of flags, unless a script runs."""

    @functools.wraps(function)
    def wrapped(*arguments, **options):
        try:
            return function(*arguments, **options)
        except InputError as error:
            raise type(error)(in_user_terms(str(error))) from error

    return wrapped


def check_type(name, value, types, expected):
    """Check the type of an argument.

    Raises:
        InputError: it has another one.
    """
    if not isinstance(value, types):
        raise InputError(f"{name}: found {describe(value)}, expected {expected}")


def describe(value):
    """What a value is, in a few words: a number or a word itself, else its type and shape."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    shape = getattr(value, "shape", None)
    of = f" of {' x '.join(map(str, shape))}" if isinstance(shape, tuple) and shape else ""
    return f"{type(value).__name__}{of}"


def check_number(name, value, least, most=None):
    """Raise InputError unless an argument is an integer from ``least`` on, and return it as int."""
    limit = f"{least} or more" if most is None else f"{least} to {most}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise InputError(f"{name}: found {describe(value)}, expected an integer, {limit}")
    return number


def check_choice(name, value, choices):
    """Raise InputError unless an argument is one of some words."""
    if not isinstance(value, str) or value not in choices:
        *others, last = choices
        expected = f"{', '.join(others)} or {last}"
        raise InputError(f"{name}: found {describe(value)}, expected {expected}")
