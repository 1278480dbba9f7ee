"""The flags of a script: their groups, other names that they have or had, and ``--help``."""

import difflib
import inspect
import shlex
import sys
import textwrap
import types
from dataclasses import MISSING, fields
from typing import Literal, get_args, get_origin

import docstring_parser  # of tyro, which reads the same texts

from runtime.errors import InputError, UsageError

# What other tools of the field call a flag: both names are right in every script that has it.
SYNONYMS = {"--model": "--weights", "--reference": "--data"}
COLUMN = 26  # at which the texts of --help begin
MAX_WIDTH = 120  # of --help; longer lines are hard to read


def flag(field_name):
    """The command-line spelling of a settings field."""
    return "--" + field_name.replace("_", "-")


def check_least(settings, names, least=1):
    """Check that settings, as far as they are there and not None, are of some size or more.

    Raises:
        InputError: one is less; of several values, the least of them.
    """
    for name in names:
        found = getattr(settings, name, None)
        found = min(found, default=None) if isinstance(found, tuple) else found
        if found is not None and found < least:
            raise InputError(f"{flag(name)}: found {found}, expected {least} or more")


def check_needs(settings, **needs):
    """Check that what a setting needs is given as well: setting -> the one that it needs.

    Raises:
        InputError: it is not.
    """
    for name, needed in needs.items():
        if getattr(settings, name) and not getattr(settings, needed):
            raise InputError(f"{flag(name)}: found no {flag(needed)}, which it needs")


def in_groups(groups, renamed=None, gone=None, moved=None):
    """Class decorator of settings: the groups of their flags, and what older flags have become.

    The fields take the order of the groups.

    Args:
        groups: dict from a title of ``--help`` to the fields below it, as one text. Fields that are
            in no group are "advanced". renamed: dict from the old name of a field to its name.
        gone: dict from a former field to its last default, which is now the only value. moved:
            dict from a former field to the script that has it now.
    """

    def describe(settings_class):
        table = settings_class.__dataclass_fields__
        listed = {title: names.split() for title, names in groups.items()}
        named = [name for names in listed.values() for name in names]
        listed["advanced"] = [name for name in table if name not in named]
        order = [*named, *listed["advanced"]]
        settings_class.__dataclass_fields__ = {name: table[name] for name in order}
        settings_class.groups = listed
        settings_class.renamed, settings_class.gone = renamed or {}, gone or {}
        settings_class.moved = moved or {}
        return settings_class

    return describe


def known_flags(settings_class):
    """Every spelling that a script knows, by the flag that it stands for."""
    own = [flag(field.name) for field in fields(settings_class)]
    synonyms = {name: meant for name, meant in SYNONYMS.items() if meant in own}
    return synonyms | {name: name for name in own}


def with_current_names(settings_class, arguments):
    """The arguments, with every flag by its current name; a line on stderr for each old one.

    Raises:
        UsageError: a flag is gone, or another script's, or has no value, or stands under two names.
    """
    known = known_flags(settings_class)
    renamed = {flag(a): flag(b) for a, b in getattr(settings_class, "renamed", {}).items()}
    gone = {flag(name): value for name, value in getattr(settings_class, "gone", {}).items()}
    moved = {flag(name): to for name, to in getattr(settings_class, "moved", {}).items()}
    several = {flag(each.name) for each in fields(settings_class) if is_several(each.type)}
    current, spelling = [], {}
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        if name in gone:
            raise UsageError(f"{name}: no longer a flag (always {gone[name]}), expected none")
        if name in moved:
            raise UsageError(f"{name}: no longer a flag of this script, expected {moved[name]}")
        if name in renamed:
            print(f"note: {name} is now called {renamed[name]}", file=sys.stderr)
        given, name = name, renamed.get(name) or known.get(name)
        if name and spelling.setdefault(name, given) != given:
            raise UsageError(f"{given}: found {spelling[name]} as well, expected one of them")
        if name in several and not equals and following.startswith("--"):  # an empty $FILES
            raise UsageError(f"{name}: found no value, expected one or more")
        current.append(name + equals + value if name else argument)
    return current


def is_several(kind):
    """Whether a flag of this type takes any number of values."""
    return get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis


def unknown_flags(settings_class, tokens):
    """The error of what is no flag, with the flag that was perhaps meant."""
    names = [*known_flags(settings_class), "--help", "--version"]
    found = next((token for token in tokens if token.startswith("--")), "")
    close = difflib.get_close_matches(found.partition("=")[0].replace("_", "-"), names, 1)
    hint = f"did you mean {close[0]}?" if close else "expected the flags that --help lists"
    return UsageError(f"{' '.join(tokens)}: unknown, {hint}")


# ------------------------------------------------------------------------------------------ --help


def help_text(settings_class, program, width):
    """What ``--help`` prints, in lines of at most ``width`` letters."""
    width = max(40, min(width, MAX_WIDTH))
    texts, table = field_texts(settings_class), settings_class.__dataclass_fields__
    groups = getattr(settings_class, "groups", {"flags": list(table)})
    entries = {
        title: [describe_field(table[name], texts.get(name, "")) for name in names]
        for title, names in groups.items()
    }
    entries["help"] = [("-h, --help", "Print this."), ("--version", "Print the version.")]
    blocks = [f"usage: {program} [flags]"]
    for block in inspect.getdoc(settings_class).split("\n\n"):
        is_example = block.startswith("Example:")  # a command, to be copied whole
        blocks.append(block if is_example else "\n".join(wrap(block, width)))
    for title, pairs in entries.items():
        blocks.append("\n".join([f"{title}:", *(format_entry(*pair, width) for pair in pairs)]))
    return "\n\n".join(blocks)


def field_texts(settings_class):
    """Field -> its docstring as one paragraph; those of a class go before those it inherits."""
    texts = {}
    for each in reversed(settings_class.__mro__[:-1]):  # without object
        for found in docstring_parser.parse_from_object(each).params:
            texts[found.arg_name] = " ".join((found.description or "").split())
    return texts


def describe_field(field, text):
    """How a field is given on the command line, and what ``--help`` says of it."""
    name, value = flag(field.name), field.default
    names = [name, *(synonym for synonym, meant in SYNONYMS.items() if meant == name)]
    if value is MISSING:
        text += " (required)"
    elif value is True:
        names.append(f"--no-{name[2:]}")
        text += f" (default: {name})"
    elif value is not False and value not in (None, "", ()) and "Default: " not in text:
        text += f" (default: {shlex.join(map(str, value)) if isinstance(value, tuple) else value})"
    return f"{', '.join(names)} {metavar(field.type)}".rstrip(), text


def metavar(kind):
    """What stands for the value of a flag of a type; "" if it takes none."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "{" + ",".join(inner) + "}"
    if origin is types.UnionType:  # with None
        return metavar(inner[0])
    if is_several(kind):
        return f"{metavar(inner[0])} [{metavar(inner[0])} ...]"
    if origin is tuple:
        return " ".join(map(metavar, inner))
    return {bool: "", str: "TEXT"}.get(kind, kind.__name__.upper())


def format_entry(flags, text, width):
    """A flag and its text, the text in a column of its own."""
    lines = wrap(text, width - COLUMN)
    if len(flags) + 4 > COLUMN:
        lines.insert(0, "")
    first, *rest = lines or [""]
    lines = [f"  {flags}".ljust(COLUMN) + first, *(" " * COLUMN + line for line in rest)]
    return "\n".join(line.rstrip() for line in lines)


def wrap(text, width):
    """Lines of a paragraph; neither words, flags nor a short default are broken."""
    unbroken = text.replace("(default: ", "(default:\N{NO-BREAK SPACE}")
    lines = textwrap.wrap(unbroken, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]
