"""The error whose message is the one line that users see, and how that line is worded."""


class InputError(Exception):
    """Something the user gave cannot be used; the message is the one line the user sees."""


class UsageError(InputError):
    """The command line itself cannot be parsed."""


def plain(text):
    """Text as one line that a terminal shows as it is: names may hold line breaks or escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def some(names, limit=3):
    """The first few of many names, for a message."""
    names = list(names)
    return ", ".join(map(plain, names[:limit])) + (", ..." if len(names) > limit else "")


def one_line(error):
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_plain_name(text):
    """Whether a text has no NUL character and can be written as UTF-8."""
    if "\0" in text:
        return False
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        return False
    return True
