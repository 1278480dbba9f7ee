"""Settings of every script that evaluates, and the folder that its results go to."""

from dataclasses import dataclass
from pathlib import Path

from data import DatasetSettings
from runtime.errors import InputError
from runtime.flags import flag
from runtime.outputs import is_own
from runtime.writing import check_writable

COUNTS = ("n_draws", "n_pseudobulks", "cells_per_bulk", "n_trees", "cells_per_sample")


@dataclass
class EvaluationSettings(DatasetSettings):
    """What the scripts that evaluate share."""

    out: Path = Path("results")
    """Folder of the results, evaluation.csv and evaluation.png; those of an earlier run are
    replaced."""
    more_weights: tuple[Path, ...] = ()
    """Further weights folders, of other seeds; mean and std are then over trainings."""
    n_draws: int = 3
    """Times that what is random is drawn for each training."""

    def __post_init__(self):
        super().__post_init__()
        for name in COUNTS:
            if (found := getattr(self, name, 1)) < 1:
                raise InputError(f"{flag(name)}: found {found}, expected 1 or more")

    def check_needs(self, **needs):
        """Check that what a setting needs is given as well: setting -> the one that it needs.

        Raises:
            InputError: it is not.
        """
        for name, needed in needs.items():
            if getattr(self, name) and not getattr(self, needed):
                raise InputError(f"{flag(name)}: found no {flag(needed)}, which it needs")


def check_out(folder):
    """Check, before anything is measured, that results can be written, and replace only our own.

    Raises:
        InputError: they cannot, or a file of their name is there that evaluate.py did not write.
    """
    check_writable(folder)
    table, picture = folder / "evaluation.csv", folder / "evaluation.png"
    if not is_own(table, table.name):  # a picture cannot tell by itself
        for path in filter(Path.exists, (table, picture)):
            raise InputError(
                f"{path}: found a file that is not from evaluate.py, expected another --out"
            )
