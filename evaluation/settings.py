"""Settings of every script that evaluates, and the folder that its results go to."""

from dataclasses import dataclass
from pathlib import Path

from data import DatasetSettings
from readers.bulk_options import BulkOptions
from runtime.errors import InputError
from runtime.flags import check_least, flag
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
        check_least(self, COUNTS)


@dataclass
class MeasuredBulks(BulkOptions):
    """Real bulks whose proportions were measured."""

    bulk: Path | None = None
    """Real bulk samples, read as bulk2sc.py reads them, to be compared with --fractions."""
    fractions: Path | None = None
    """Their measured fractions: a csv, first column sample, then one column for each lineage."""
    lineages: Path | None = None
    """Lineage of each cell type, as --fractions names it: a csv cell_type,lineage.
    Given alone, proportions of pseudobulks are compared by lineage, too."""

    def check_bulks(self):
        """Check that bulks, their fractions and their lineages are given together.

        Raises:
            InputError: they are not.
        """
        needed = ("bulk", "fractions", "lineages")
        missing = [flag(name) for name in needed if getattr(self, name) is None]
        if missing and not (self.bulk is self.fractions is None):
            given = " and ".join(flag(name) for name in needed if flag(name) not in missing)
            raise InputError(
                f"{given}: found no {' and no '.join(missing)}, expected --bulk, --fractions and "
                "--lineages together"
            )


def check_out(folder):
    """Check, before anything is measured, that results can be written, and replace only our own.

    Raises:
        InputError: they cannot, or a file of their name is there that no evaluation wrote.
    """
    check_writable(folder)
    table, picture = folder / "evaluation.csv", folder / "evaluation.png"
    if not is_own(table, table.name):  # a picture cannot tell by itself
        for path in filter(Path.exists, (table, picture)):
            raise InputError(
                f"{path}: found a file that is no evaluation of bulk2sc, expected another --out"
            )
