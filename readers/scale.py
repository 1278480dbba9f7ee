"""The scale of expression values: counts and their kin, or a logarithm, ranks and z-scores."""

from dataclasses import dataclass

import numpy as np

MIN_GENES = 200  # expressed in a sample, for its scale to be told

# Largest over median expressed gene. Of 131 RNA-seq bulks it is 380 or more on a linear scale, 7 or
# less for any logarithm, and 20 to 65 for square roots; of panels of 50 to 500 genes 7 or more.
LINEAR = 7
LINEAR_OF_ALL_GENES = 90
ALL_GENES = 5000  # expressed genes from which the second limit holds
# Logarithms of counts per 10,000 reach 20, but no logarithm of counts is above 25.
LINEAR_OF_SMALL = 60
LARGEST_LOG = 25

FEW_COUNTS = 3  # the largest value of mutations, copy numbers or calls, as of no bulk

MAX_READS = 1e10  # of one gene, in any library

UNDO = "--log 2, --log e or --log 10 undoes a logarithm"
FLAG = f"{UNDO}, --log no takes the values as they are"


@dataclass
class Scale:
    """What the values of a table are."""

    name: str
    """``counts``, ``linear``, or what is wrong: ``log``, ``ranks``, ``z-scores``, ``quantile``."""
    why: str = ""
    """For messages."""
    samples: np.ndarray | None = None
    """Mask of the samples that are not on a linear scale (S)."""
    base: str | None = None
    """Of a logarithm, if the values show it."""


def skew(x):
    """Largest over median of the positive values of a sample (G); NaN if they are too few."""
    x = x[x > 0]
    return x.max() / np.median(x) if len(x) >= MIN_GENES else np.nan


def are_few_counts(X):
    """Mask (S) of samples (S x G) of integers, half of which or more are 1 where they are not 0."""
    whole = (np.rint(X) == X).all(axis=1)
    return whole & ((X == 1).sum(axis=1) >= (X > 1).sum(axis=1))


def is_ranks(x):
    """Whether the values of a sample (G) are their own ranks, ties averaged or not."""
    n = len(x)
    if n < MIN_GENES or not 0.5 < x.max() / n <= 1.01:
        return False
    steps = np.unique(x)
    return bool(len(steps) > 0.3 * n and abs(x.mean() / x.max() - 0.5) < 0.05)


def same_quantiles(X):
    """Whether all samples (S x G) have the same values in another order."""
    if len(X) < 2 or X.shape[1] < 2 * MIN_GENES:
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
    if X.shape[1] >= MIN_GENES and X.max() <= FEW_COUNTS:
        return Scale("few", f"no value is above {X.max():.4g}")
    signs = transforms_of(X)
    if signs:
        name, why = next(iter(signs.items()))
        everywhere = np.ones(len(X), bool)
        return Scale("square roots" if name == "root" else "log", why, everywhere, name)
    if all(is_ranks(x) for x in X):
        return Scale("ranks", "values are ranks of the genes")
    skews = np.array([skew(x) for x in X])
    n_positive = (X > 0).sum(axis=1)
    limit = np.where(X.max(axis=1) < LARGEST_LOG, LINEAR_OF_SMALL, LINEAR)
    limit = np.where(n_positive >= ALL_GENES, LINEAR_OF_ALL_GENES, limit)
    transformed = (skews < limit) & ~are_few_counts(X)  # (S); NaN compares as False
    if transformed.any():
        i = int(np.flatnonzero(transformed)[0])
        return Scale(
            "log",
            f"no value is above {X[transformed].max():.4g} and the largest is {skews[i]:.2g} times "
            f"the median one; RNA-seq counts spread over a factor of hundreds",
            transformed,
        )
    if same_quantiles(X) and not are_few_counts(X).any():
        return Scale("quantile", "all samples have the same values, in another order")
    return Scale("counts" if np.array_equal(X, np.rint(X)) else "linear")


def negative_scale(X, negative):
    """The Scale of values (S x G) some of which are below 0."""
    example = f"{negative.sum():,} of {X.size:,} values are negative"
    if X.shape[1] < MIN_GENES or negative.mean() < 1e-3 or X.max() > np.log2(MAX_READS):
        return Scale("negative", example)
    by_gene = np.abs(X.mean(axis=0)) < 0.05 * np.maximum(X.std(axis=0), 1e-12)
    by_sample = np.abs(X.mean(axis=1)) < 0.05 * np.maximum(X.std(axis=1), 1e-12)
    if by_gene.mean() > 0.5 or by_sample.all():
        return Scale("z-scores", f"{example}, and means are 0")
    return Scale("log", example, negative.any(axis=1))


def transforms_of(X):
    """Transforms that X (S x G) seems to be of counts, or of CPM, and why.

    They are undone in turn: only the right one gives integers, or samples of one sum that is a
    power of ten.

    Returns:
        dict from ``root``, ``2``, ``e`` and ``10`` to a text; empty for what is on a linear scale.
    """
    X = X[:20]
    if np.array_equal(X, np.rint(X)) or X.shape[1] < MIN_GENES or X.max() > np.sqrt(MAX_READS):
        return {}
    signs = {}
    for name, (what, undo, largest) in UNDONE.items():
        if X.max() > largest:
            continue
        Y = undo(X)
        total = Y.sum(axis=1)
        power = 10 ** np.rint(np.log10(np.maximum(total, 1)))
        small = (Y > 1.5) & (Y < 30)
        if small.sum() > 50 and is_whole(Y[small]) > 0.98 and is_whole(X[small]) < 0.5:
            signs[name] = f"{what}, the values are integers"
        elif len(X) > 1 and (power > 1e3).all() and (np.abs(total / power - 1) < 2e-3).all():
            signs[name] = f"{what}, every sample has the sum {power[0]:,.0f}"
    return signs


def is_whole(x):
    """The share of values (n) that are integers, but for rounding."""
    return np.mean(np.abs(x - np.rint(x)) < 0.02)


UNDONE = {  # of each transform: for messages, its inverse, and the largest value it may have
    "root": ("squared", np.square, np.sqrt(MAX_READS)),
    "2": ("as powers of 2 less 1", lambda X: np.exp2(X) - 1, np.log2(MAX_READS)),
    "e": ("as powers of e less 1", np.expm1, np.log(MAX_READS)),
    "10": ("as powers of 10 less 1", lambda X: 10**X - 1, np.log10(MAX_READS)),
}


def check_base(X, base):
    """Check that X (S x G) may be the logarithm to a base, and is not to another one.

    Raises:
        ValueError: it is not.
    """
    largest = np.log(MAX_READS) / np.log(np.e if base == "e" else float(base))
    if X.max() > largest:
        raise ValueError(
            f"found values up to {X.max():.4g}, expected logarithms to base {base} of at most "
            f"{largest:.0f}, that of ten billion reads"
        )
    signs = transforms_of(X)
    if signs and base not in signs:
        raise ValueError(f"found values on another scale: {next(iter(signs.values()))}")


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
