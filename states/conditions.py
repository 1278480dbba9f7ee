"""Conditions of samples: which two are compared."""

from runtime.errors import InputError, some


def choose_conditions(asked, known, name):
    """The two conditions to compare: those asked for, else the two there are.

    One condition alone stands on both sides: then each donor is compared with the others.

    Args:
        asked: pair or None. known: conditions there are. name: the flag, for messages.

    Raises:
        InputError: it is not clear which two, or one is not there.
    """
    if asked is None:
        if len(known) > 2:
            raise InputError(
                f"{name}: found {len(known)} conditions ({some(known, 12)}), expected {name} with "
                "two of them"
            )
        return known[0], known[-1]
    if unknown := [condition for condition in asked if condition not in known]:
        raise InputError(f"{name}: found {some(unknown)}, expected two of {some(known, 12)}")
    if asked[0] == asked[1]:
        raise InputError(f"{name}: found {asked[0]} twice, expected two conditions")
    return tuple(asked)
