"""The scale of expression values: counts and their kin, or a logarithm, ranks and z-scores."""

from dataclasses import dataclass

import numpy as np

FEWEST_GENES = 200  # expressed in a sample, for its scale to be told

# Largest over median expressed gene. Of 131 RNA-seq bulks it is 380 or more on a linear scale, 7 or
# less for any logarithm, and 20 to 65 for square roots; of panels of 50 to 500 genes 7 or more.
LINEAR = 7
LINEAR_OF_ALL_GENES = 90
ALL_GENES = 5000  # expressed genes from which the second limit holds
# Logarithms of counts per 10,000 reach 20, but no logarithm of counts is above 25.
LINEAR_OF_SMALL = 60
LARGEST_LOG = 25

FLAG = "--log 2, --log e or --log 10 undoes a logarithm, --log no takes the values as they are"


@dataclass
class Scale:
    """What the values of a table are."""

    name: str
    """``counts``, ``linear``, or what is wrong: ``log``, ``ranks``, ``z-scores``, ``quantile``."""
    why: str = ""
    """For messages."""
    samples: np.ndarray | None = None
    """Mask of the samples that are not on a linear scale (S)."""


def skew(x):
    """Largest over median of the positive values of a sample (G); NaN if they are too few."""
    x = x[x > 0]
    return x.max() / np.median(x) if len(x) >= FEWEST_GENES else np.nan


def is_ranks(x):
    """Whether the values of a sample (G) are their own ranks, ties averaged or not."""
    n = len(x)
    if n < FEWEST_GENES or not 0.5 < x.max() / n <= 1.01:
        return False
    steps = np.unique(x)
    return bool(len(steps) > 0.3 * n and abs(x.mean() / x.max() - 0.5) < 0.05)


def same_quantiles(X):
    """Whether all samples (S x G) have the same values in another order."""
    if len(X) < 2 or X.shape[1] < 2 * FEWEST_GENES:
        return False
    if not any((row != X[0]).mean() > 0.2 for row in X[1:]):
        return False  # the same sample several times
    first, *others = np.sort(X, axis=1)[:, X.shape[1] // 2 :]  # the lower half may all be 0
    if first[0] == first[-1]:
        return False
    near = [np.mean(np.abs(other - first) <= 1e-3 * np.abs(first)) for other in others]
    return min(near) > 0.95


def find_scale(X):
    """The Scale of values (S x G), all finite."""
    negative = X < 0
    if negative.any():
        return negative_scale(X, negative)
    if all(is_ranks(x) for x in X):
        return Scale("ranks", "values are ranks of the genes")
    skews = np.array([skew(x) for x in X])
    n_positive = (X > 0).sum(axis=1)
    limit = np.where(X.max(axis=1) < LARGEST_LOG, LINEAR_OF_SMALL, LINEAR)
    limit = np.where(n_positive >= ALL_GENES, LINEAR_OF_ALL_GENES, limit)
    transformed = skews < limit  # (S); NaN compares as False
    if transformed.any():
        i = int(np.flatnonzero(transformed)[0])
        return Scale(
            "log",
            f"no value is above {X[transformed].max():.4g} and the largest is {skews[i]:.2g} times "
            f"the median one; RNA-seq counts spread over a factor of hundreds",
            transformed,
        )
    if same_quantiles(X):
        return Scale("quantile", "all samples have the same values, in another order")
    return Scale("counts" if np.array_equal(X, np.rint(X)) else "linear")


def negative_scale(X, negative):
    """The Scale of values (S x G) some of which are below 0."""
    example = f"{negative.sum():,} of {X.size:,} values are negative"
    if X.shape[1] < FEWEST_GENES or negative.mean() < 1e-3:
        return Scale("negative", example)
    by_gene = np.abs(X.mean(axis=0)) < 0.05 * np.maximum(X.std(axis=0), 1e-12)
    by_sample = np.abs(X.mean(axis=1)) < 0.05 * np.maximum(X.std(axis=1), 1e-12)
    if by_gene.mean() > 0.5 or by_sample.all():
        return Scale("z-scores", f"{example}, and means are 0")
    return Scale("log", example, negative.any(axis=1))


def undo_log(X, base, pseudocount):
    """Values (S x G) whose logarithm, after adding a pseudocount, is X; never below 0."""
    base = np.e if base == "e" else float(base)
    with np.errstate(over="ignore"):
        return np.maximum(base**X - pseudocount, 0)


def describe_unit(X, scale):
    """What the values (S x G) seem to be, in a few words."""
    if scale.name == "counts":
        return "counts"
    total = X.sum(axis=1)
    if np.allclose(total, 1e6, rtol=1e-3):
        return "CPM or TPM (samples sum to a million)"
    return "not integers, on a linear scale (TPM, CPM, FPKM or estimated counts)"
