"""Proportions of cell types in samples: of cells and of RNA, with intervals, some of them known.

Notation in shape comments: S samples, K cell types, C columns of a table of known proportions.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

Z90 = 1.645  # standard deviations to either side that hold 90 % of a normal distribution
NOTHING = 1e-9  # what is left of 1 beside known proportions, if it is but rounding


@dataclass
class Proportions:
    """Proportions of the cell types in samples, and how sure they are."""

    names: list
    """Of the samples (S)."""
    cell_types: list
    """Names (K)."""
    cells: np.ndarray
    """Fractions of the cells (S, K), rows summing to 1."""
    low: np.ndarray
    """Lower end of their 90 % interval (S, K); nan where there is none."""
    high: np.ndarray
    """Its upper end (S, K)."""
    rna: np.ndarray
    """Fractions of the counts (S, K), rows summing to 1."""
    known: np.ndarray | None = None
    """Which were given rather than estimated (S, K); None if none could be."""

    def __repr__(self):
        return f"Proportions of {len(self.cell_types)} cell types in {len(self.names):,} samples"

    def to_table(self):
        """One long table, a row for each cell type of each sample, in this order.

        Columns: sample, cell_type, proportion, low, high, rna_fraction and, if some may be known,
        known. Names are categorical, which keeps a table of 100,000 samples small.
        """
        S, K = self.cells.shape
        sample = np.repeat(np.arange(S, dtype=np.int32), K)
        table = {
            "sample": pd.Categorical.from_codes(sample, categories=self.names),
            "cell_type": pd.Categorical.from_codes(np.tile(np.arange(K), S), self.cell_types),
            "proportion": self.cells.ravel(),
            "low": self.low.ravel(),
            "high": self.high.ravel(),
            "rna_fraction": self.rna.ravel(),
        }
        return pd.DataFrame(table if self.known is None else table | {"known": self.known.ravel()})


def make_proportions(names, cell_types, pi, content, interval=None, known=None):
    """Proportions of samples from estimates and, where there are any, known proportions.

    Args:
        names: of the samples (S). cell_types: names (K). pi: estimated fractions of cells (S, K).
        content: mean counts of a cell of each type, (K) or (S, K).
        interval: lower and upper ends of the 90 % intervals of pi, each (S, K); default none.
        known: readers.proportions.KnownProportions, which has some of the samples.

    Returns:
        Proportions.

    Raises:
        InputError: ``known`` has none of the samples.
    """
    nothing = np.broadcast_to(pi.dtype.type(np.nan), pi.shape)
    cells, mask = pi, None
    low, high = (nothing, nothing) if interval is None else interval
    if known is not None:
        values = known.of_samples(names)
        cells, low, high, mask = fix_known(cells, low, high, values, known.column)
        n_shared = np.sum(find_given(values, known.column) & ~mask)
        shared = f", {n_shared:,} more share a known lineage" if n_shared else ""
        print(f"{known.path}: {mask.sum():,} of {mask.size:,} proportions fixed{shared}")
    rna = rna_fractions(cells, content)
    return Proportions(list(names), list(cell_types), cells, low, high, rna, mask)


def normal_interval(pi, sd):
    """Ends of the 90 % intervals of proportions, each (S, K), of a normal error inside [0, 1].

    pi, sd: (S, K).
    """
    return np.clip(pi - Z90 * sd, 0, 1), np.clip(pi + Z90 * sd, 0, 1)


def rna_fractions(pi, content):
    """Fractions of the counts (S, K) that proportions of cells make.

        r_k = π_k c_k / Σ_j π_j c_j

    pi: (S, K). content: c, mean counts of a cell of each type, (K) or (S, K).
    """
    counts = pi * content
    return (counts / counts.sum(axis=1, keepdims=True)).astype(pi.dtype)


# ---------------------------------------------------------------------------- known proportions


def find_given(values, column):
    """Which types' columns have a value in which samples (S, K); see :func:`fix_known`."""
    return (column >= 0) & ~np.isnan(values)[:, column]


def fix_known(cells, low, high, values, column):
    """Put known proportions in place of estimated ones.

    Types share one pool: that of their column, whose total v is known; or else what is left, with a
    total of 1 - Σ v. In a pool the estimate decides,

        π_k = v π̂_k / Σ_{j in pool} π̂_j,

    evenly if it is all 0, and the ends of an interval are scaled alike, at most to v. A type alone
    in its pool, or in one that is empty, follows from the file: it is known.

    Args:
        cells, low, high: estimates (S, K). values: known totals (S, C), nan where not known.
        column: of each type (K), -1 for none.

    Returns:
        cells, low, high and the mask of known ones, each (S, K).
    """
    totals = np.nan_to_num(values)  # (S, C)
    left = np.maximum(1 - totals.sum(axis=1, keepdims=True), 0)  # (S, 1)
    left[left < NOTHING] = 0
    totals = np.hstack([totals, left])
    n_columns = values.shape[1]  # one more pool is what is left
    pool = np.where(find_given(values, column), column, n_columns)  # (S, K)
    total = np.take_along_axis(totals, pool, axis=1)  # of each type's pool (S, K)
    in_same = pool[:, :, None] == pool[:, None, :]  # (S, K, K)
    size = in_same.sum(axis=2)
    estimate = (in_same * cells[:, None, :]).sum(axis=2)  # of the whole pool (S, K)
    scale = total / np.where(estimate > 0, estimate, 1)
    fixed = np.where(estimate > 0, cells * scale, total / size)
    known = (size == 1) | (total == 0)
    fixed = np.where(known, total, fixed)
    ends = (np.where(known, fixed, np.clip(end * scale, 0, total)) for end in (low, high))
    return fixed, *ends, known


def mixtures(known, cell_types, composition, content):
    """Proportions of mixtures to generate, as a table says; nothing is estimated.

    Args:
        known: readers.proportions.KnownProportions (R rows). cell_types: names (K).
        composition: of the reference (K), in whose ratio types that the table lacks share what is
            left. content: mean counts of a cell of each type (K).

    Returns:
        Proportions of the R rows, without intervals but for what the table gives.
    """
    pi = np.tile(composition, (len(known.samples), 1))
    return make_proportions(known.samples, cell_types, pi, content, known=known)


def reference_composition(metadata):
    """Mean fractions of the cell types in the reference (K), and in words where they come from.

    metadata: of the Bulk Encoder, with ``cell_types`` (K) and, in newer files, ``composition`` (K).
    """
    K = len(metadata["cell_types"])
    if "composition" not in metadata:
        return np.full(K, 1 / K), "evenly, as the weights do not hold the reference's composition"
    share = np.array(metadata["composition"], np.float64)
    return share / share.sum(), "in the ratio of the reference's cells"
