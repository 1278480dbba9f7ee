"""Biological samples of the reference's cells: which sample, from whom, under which condition."""

import pandas as pd

from readers.labels import read_column
from runtime.errors import InputError, some
from runtime.flags import flag

# Setting -> what it says of each sample.
GROUPS = {"donors": "donor", "conditions": "condition", "batch_key": "batch"}


def read_samples(adata, settings):
    """Read the sample of each cell, and what the settings say of the samples.

    Args:
        adata: AnnData or BackedCells (N cells). settings: with ``samples``; ``donors``,
            ``conditions`` and ``batch_key`` where the script has them.

    Returns:
        data frame (N) with the columns sample, donor (the sample itself if no donors are given)
        and, if they are given, condition and batch; missing where a cell has no sample. None
        without ``settings.samples``.

    Raises:
        InputError: a source is neither a file nor a column, no cell has a sample, or the cells of
            one sample have several donors, conditions or batches, or none.
    """
    source = getattr(settings, "samples", None)
    if source is None:
        return None
    sample = read_column(adata, source, "--samples", "sample")
    if sample.isna().all():
        raise InputError(f"--samples {source}: found no cell with a sample")
    table = pd.DataFrame({"sample": sample, "donor": sample})
    for setting, column in GROUPS.items():
        if (source := getattr(settings, setting, None)) is not None:
            table[column] = read_column(adata, source, flag(setting), column)
            check_one_each(table[["sample", column]].dropna(subset="sample"), setting, source)
    return table


def check_one_each(table, setting, source):
    """Check that the cells of a sample agree in a second column.

    Raises:
        InputError: they have several values there, or none.
    """
    sample, values = table["sample"], table.iloc[:, 1]
    if values.isna().any():
        names = sample[values.isna()].unique()
        raise InputError(
            f"{flag(setting)} {source}: found none for cells of {len(names)} samples "
            f"({some(names)}), expected one for each sample"
        )
    n_values = values.groupby(sample).nunique()
    if (n_values > 1).any():
        names = n_values.index[n_values > 1]
        found = values[sample == names[0]].unique()
        raise InputError(
            f"{flag(setting)} {source}: found several ({some(found)}) in sample {names[0]}, "
            "expected one for each sample"
        )
