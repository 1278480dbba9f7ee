"""Columns that repeat others: their sum or mean, or the same samples in another unit."""

import re

import numpy as np
import scipy.optimize

from runtime.errors import InputError, some

MAX_SUMS = 10  # that are looked for, among the largest columns

MIN_ROWS = 200  # for evidence from values: that they are distinct, sums, or correlate


def without_sums(values, positions, names, path):
    """Columns without those that are the sum or the mean of all others.

    Args:
        values: of each column (R). positions: of the columns. names: of the samples. path: for
            messages.

    Raises:
        InputError: a column is the sum or the mean of some others: of replicates, say.
    """
    if len(positions) < 3:
        return positions, names
    X = np.stack([values[i] for i in positions])  # (S, R)
    if X.shape[1] < max(MIN_ROWS, 2 * len(X)) or not np.isfinite(X).all():
        return positions, names
    if len(np.unique(X[:, :: X.shape[1] // MIN_ROWS], axis=0)) < len(X):
        return positions, names  # a sample several times, each the "sum" of the others
    sums = {}  # index of each sum: those of its parts
    candidates = sorted(nearly_dependent(X), key=lambda j: not is_sum_of_others(X, j))
    for j in candidates[:MAX_SUMS]:
        rest = [i for i in range(len(X)) if i != j and i not in sums]
        # A sum of sums is also one of their parts, so each may have to be left out.
        tries = [rest, *([i for i in rest if i != k] for k in candidates[:MAX_SUMS] if k in rest)]
        parts = next((p for others in tries if (p := summed_parts(X, j, others))), None)
        if parts is not None:
            sums[j] = parts
    left = [i for i in range(len(X)) if i not in sums]
    for j, parts in sums.items():
        if not set(left) <= set(parts):
            raise InputError(
                f"{path}: found a column {names[j]} that is the sum or the mean of others "
                f"({some([names[i] for i in parts])}), expected samples; --columns names them"
            )
    return [positions[i] for i in left], [names[i] for i in left]


def is_sum_of_others(X, j):
    """Whether row j of X (S x R) is the sum or the mean of all other rows."""
    others = X.sum(axis=0) - X[j]
    parts = others, others / (len(X) - 1)
    return any(np.abs(X[j] - part).max() < tolerance(X[j]) for part in parts)


def rounding(x):
    """Largest error of values (R) that were rounded as they are: half a unit of their last digit.

    Values of more than three decimals count as exact.
    """
    for digits in range(4):
        if np.allclose(x, np.round(x, digits), rtol=0, atol=1e-9):
            return 0.5 / 10**digits
    return 0.0


def nearly_dependent(X):
    """Rows of X (S x R) that a linear combination of the other rows comes close to, largest first.

    The squared distance of row i from the span of the others is 1 / (X X^T)^-1_ii.
    """
    norm = np.linalg.norm(X, axis=1)
    rows = np.flatnonzero(norm > 0)
    unit = X[rows] / norm[rows, None]
    inverse = np.linalg.inv(unit @ unit.T + 1e-13 * np.eye(len(rows)))
    residual = norm[rows] * np.sqrt(1 / np.abs(np.diag(inverse)))
    allowed = [tolerance(X[i]) * np.sqrt(X.shape[1]) for i in rows]
    near = rows[residual < 3 * np.array(allowed)]
    return [int(i) for i in near[np.argsort(-norm[near])]]


def tolerance(x):
    """How far values (R) may be from a sum that was rounded."""
    return 1.01 * rounding(x) + 1e-6 * np.abs(x).max()


def summed_parts(X, j, others):
    """Indices of at least two rows of X (S x R) whose sum or mean is row j; None if there are none.

    Args:
        others: rows that may be added up.
    """
    if len(others) < 2 or np.abs(X[j]).max() < 100 * tolerance(X[j]):
        return None
    step = max(X.shape[1] // 1000, 1)
    weights, _ = scipy.optimize.nnls(X[others][:, ::step].T, X[j, ::step])
    used = weights > 0.3 / len(others)
    if used.sum() < 2:
        return None
    weight = np.median(weights[used])
    weight = 1.0 if abs(weight - 1) < 0.1 else 1 / used.sum()
    parts = [i for i, u in zip(others, used, strict=True) if u]
    near = np.abs(weight * X[parts].sum(axis=0) - X[j]).max() < tolerance(X[j])
    return parts if near else None


def check_once(values, positions, names, path):
    """Refuse a table that has every sample several times, told apart by a word such as ``raw``.

    The same samples come again if the words name different units (integers and others, samples of
    the same sum and others), or if two columns of a sample are closer than two draws of its reads.
    """
    groups = by_word(names)
    if groups is None:
        return
    X = np.nan_to_num(np.stack([values[i] for i in positions]))  # (S, R)
    if X.shape[1] < MIN_ROWS:
        return
    kinds = [unit_signs(X[group]) for group in groups]
    first, second = X[groups[0]], X[groups[1]]
    if all(kind == kinds[0] for kind in kinds) and not are_same_reads(first, second):
        return
    pairs = [names[group[0]] for group in groups]
    raise InputError(
        f"{path}: found each sample {len(groups)} times ({some(pairs)}), in other units or after "
        "other steps, expected once; --columns names the samples"
    )


def by_word(names):
    """Groups of names (lists of indices, samples in one order) that differ by one word alone.

    The word is the first or the last of each name: S1_raw, S2_raw, S1_xyz, S2_xyz. None if names
    have no such groups of two samples or more.
    """
    for pattern in (
        r"(?P<sample>.+)[ ._:|-](?P<word>[^ ._:|-]+)",
        r"(?P<word>.+?)[ ._:|-](?P<sample>.+)",
    ):
        matches = [re.fullmatch(pattern, str(name)) for name in names]
        if not all(matches):
            continue
        words, samples = ([m[part] for m in matches] for part in ("word", "sample"))
        kinds, stems = sorted(set(words)), sorted(set(samples))
        place = {pair: i for i, pair in enumerate(zip(words, samples, strict=True))}
        full = len(place) == len(names) == len(kinds) * len(stems)
        if full and 1 < len(kinds) <= 4 and len(stems) > 1:
            return [[place[word, stem] for stem in stems] for word in kinds]
    return None


def unit_signs(X):
    """What tells the unit of samples (S x R): whether they are integers, and have the same sum."""
    total = X.sum(axis=1)
    return bool(np.array_equal(X, np.rint(X))), bool(np.ptp(total) < 1e-3 * total.mean())


def are_same_reads(X, Y):
    """Whether samples of counts (S x R) are closer than two draws of reads, whatever their depth.

    Of two Poisson draws with means m and s m, (y - s x)^2 has the mean s (s + 1) m.
    """
    s = Y.sum(axis=1, keepdims=True) / np.maximum(X.sum(axis=1, keepdims=True), 1e-300)
    expected = s * (X * s + Y)
    rows = (X > 20) & (Y > 20)
    if rows.sum() < MIN_ROWS:
        return False
    return bool(np.mean((Y - s * X)[rows] ** 2 / expected[rows]) < 0.6)
