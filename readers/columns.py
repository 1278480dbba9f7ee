"""Which columns of a table are samples, when genes are in its rows.

A column of numbers is none if its name says so, if its values number or name the genes, if it holds
another unit of a sample that is there, if it sums up the others, or if it goes with none of them.
"""

import re
from collections import defaultdict

import numpy as np
import scipy.stats

from readers.bounded import to_numbers
from readers.quantifiers import (
    PROTEINS,
    SAMPLES,
    STRANDS,
    choose_strand,
    no_samples,
    plain_name,
    sample_name,
    split_words,
    unit_of,
    without_paths,
)
from readers.redundant import MIN_ROWS, check_once, without_sums
from runtime.errors import InputError, some

# Spearman correlation between genes: of RNA-seq samples of any two tissues above 0.5, of lengths,
# ids, positions and p-values with samples below 0.25.
UNRELATED, RELATED = 0.25, 0.5

N_ROWS = 3000  # evenly spaced, that correlations are computed on

# Names of annotation and of summaries that samples may have as well.
UNCLEAR = {
    *("total", "sum", "mean", "average", "median", "min", "max", "sd", "var", "start", "end"),
    *("position", "band", "version", "gc", "width", "length", "t", "b", "f", "p", "q", "w", "z"),
}

PREFERRED = ("counts", "plain", "tpm", "cpm", "fpkm", "normalised", "fpkm_uq", "coverage", "log")


def choose_columns(source, gene_column, is_text, options, is_gene, notes):
    """Positions and names of the columns that are samples.

    Args:
        source: readers.bulk_files.Source. gene_column: position of the genes. is_text: mask of the
            columns of text (C). options: BulkOptions. is_gene: mask of the rows that
            are genes (R). notes: to add to.

    Raises:
        InputError: a column that options name is not there, or a unit is not; or it stays open
            which columns are samples.
    """
    table, path = source.table, source.path
    columns = [str(name) for name in table.columns]
    if options.columns:
        return named_columns(columns, options.columns, path)
    numeric = [i for i in range(len(columns)) if i != gene_column and not is_text[i]]
    strands = strand_columns(source, numeric)
    if strands is not None:
        return strand_of(source, strands, is_gene, notes)
    values = {i: to_numbers(table.iloc[:, i])[is_gene] for i in numeric}
    positions = by_name(columns, numeric, values, path)
    numbered = gene_column and 0 in positions and numbers_rows(table.iloc[:, 0])
    if numbered:
        positions.remove(0)
        notes.append("the first column numbers the rows")
    positions = without_identifiers(values, positions)
    check_rna(columns, positions, path)
    positions, names = one_of_each_sample(columns, positions, options, path)
    if len(positions) > 1 and not source.headerless:
        positions, names = related(values, positions, names, path)
    if not source.headerless:
        check_once(values, positions, names, path)
    positions, names = without_sums(values, positions, names, path)
    if source.headerless or (len(positions) == 1 and not names[0]):
        stem = constant_name(table, is_text) or sample_name(path)
        if not source.headerless:
            notes.append(f"values by column {columns[positions[0]]}")
        names = [stem] if len(positions) == 1 else [f"{stem}_{columns[i]}" for i in positions]
    names = without_paths(names)
    known = {*positions, gene_column} | ({0} if numbered else set())
    dropped = [i for i in range(len(columns)) if i not in known]
    if dropped:
        notes.append(left_out([columns[i] for i in dropped], "columns that are not samples"))
    return positions, names


def by_name(columns, numeric, values, path):
    """Positions of the columns of numbers whose names do not say that they are no samples.

    Args:
        columns: names (C). numeric: positions. values: of each of them (R).

    Raises:
        InputError: a column is named as annotation or a summary (Total, start), but its values are
            those of a sample.
    """
    other = no_samples(columns)
    positions = [i for i in numeric if not other[i]]
    for i in np.flatnonzero(other):
        if i not in values or plain_name(columns[i]) not in UNCLEAR:
            continue
        if is_sample_like(values[i], [values[j] for j in positions]):
            raise InputError(
                f"{path}: found a column {columns[i]} whose values are those of a sample, though "
                "it may be annotation or a summary by its name; --columns names the samples"
            )
    return positions


def check_rna(columns, positions, path):
    """Raise an InputError if most columns (positions) hold proteins, by their names (C)."""
    proteins = [columns[i] for i in positions if PROTEINS.search(columns[i])]
    if proteins and len(proteins) > len(positions) / 2:
        raise InputError(
            f"{path}: found columns of a proteomics experiment ({some(proteins)}), expected RNA "
            "counts, TPM or CPM; --columns names the samples"
        )


def constant_name(table, is_text):
    """The sample of a table that has the same name in each row of a column of samples, or None."""
    for i in np.flatnonzero(is_text):
        if SAMPLES.search(str(table.columns[i])) and table.iloc[:, i].nunique() == 1:
            return str(table.iloc[0, i]).strip() or None
    return None


def is_sample_like(x, others):
    """Whether values (R) correlate with samples and do not sum them up; others: list of (R)."""
    if len(x) < MIN_ROWS or len(others) < 2 or np.isnan(np.stack([x, *others])).any():
        return False
    X = np.stack(others)  # (S, R)
    summaries = [X.sum(0), X.mean(0), np.median(X, 0), X.max(0), X.min(0), X.std(0)]
    summaries += [X.std(0, ddof=1), X.var(0), X.var(0, ddof=1)]
    near = [np.median(np.abs(x - s)) <= 0.01 * np.median(np.abs(s)) + 1e-9 for s in summaries]
    return not any(near) and correlation(x, others) > RELATED


def left_out(names, what):
    """A note on columns or rows that are left out."""
    if len(names) == 1:
        what = what.replace("columns that are not", "column that is none of the")
    return f"{len(names):,} {what} left out ({some(names, 8)})"


def numbers_rows(names):
    """Whether names (R) are 0 to R - 1 or 1 to R, in this order."""
    n = len(names)
    names = [str(name).strip() for name in names]
    return names in ([str(i) for i in range(n)], [str(i) for i in range(1, n + 1)])


def is_identifier(x):
    """Whether values (R) are whole numbers that hardly ever repeat: ids, positions, row numbers."""
    if len(x) < MIN_ROWS or not np.isfinite(x).all() or (x != np.rint(x)).any():
        return False
    return len(np.unique(x)) > 0.98 * len(x)


def without_identifiers(values, positions):
    """Columns without those of ids: they never repeat, and are in order or go with no sample.

    values: of each column (R). positions: of the columns; all stay if none would.
    """
    left = []
    for i in positions:
        x, others = values[i], [values[j] for j in positions if j != i]
        ordered = (np.diff(x) > 0).all() or (np.diff(x) < 0).all()
        if not (is_identifier(x) and (ordered or (others and correlation(x, others) < UNRELATED))):
            left.append(i)
    return left or positions


def correlation(x, others):
    """Median rank correlation of values (R) with some columns, a list of (R)."""
    step = max(len(x) // N_ROWS, 1)
    r = [scipy.stats.spearmanr(x[::step], other[::step]).statistic for other in others[:20]]
    return float(np.median(np.nan_to_num(r)))


def one_of_each_sample(columns, candidates, options, path):
    """Columns of one unit for each sample, of a table that has several for it.

    Args:
        columns: names (C). candidates: positions.

    Returns:
        positions, and names of the samples; "" where a column is named by its unit alone.

    Raises:
        InputError: no unit is there for all samples, or not the one that options name.
    """
    groups = defaultdict(dict)
    for i in candidates:
        sample, words = split_words(columns[i])
        groups[sample.strip()].setdefault(unit_of(words), []).append(i)
    several = [group for group in groups.values() if sum(map(len, group.values())) > 1]
    alone = "" in groups
    if not several and not alone:
        return candidates, [columns[i] for i in candidates]
    if len(groups) > 1 and len(several) < 0.5 * len(groups):
        return candidates, [columns[i] for i in candidates]
    unit = common_unit(groups, options.bulk_unit, path)
    chosen = [group[unit] for group in groups.values() if unit in group]
    unclear = next((group for group in chosen if len(group) > 1), None)
    if unclear is not None and len({columns[i] for i in unclear}) == 1:
        raise InputError(f"{path}: sample names occur more than once ({columns[unclear[0]]})")
    if unclear is not None:
        raise InputError(
            f"{path}: found {len(unclear)} columns of one sample and one unit "
            f"({some([columns[i] for i in unclear])}), expected one; --columns names the samples"
        )
    positions = sorted(group[0] for group in chosen)
    return positions, [split_words(columns[i])[0] for i in positions]


def common_unit(groups, wanted, path):
    """The unit to read: the one that is wanted, or the first of PREFERRED that all samples have.

    Args:
        groups: of each sample its units, with the positions of their columns.

    Raises:
        InputError: there is none.
    """
    found = set().union(*groups.values())
    possible = [u for u in PREFERRED if all(u in group for group in groups.values())]
    if wanted != "auto":
        possible = [unit for unit in possible if unit == wanted]
    if not possible:
        flag = "--columns names the samples" if wanted == "auto" else f"--bulk-unit {wanted}"
        raise InputError(
            f"{path}: found several units ({some(sorted(u for u in found if u))}), expected "
            f"{'one' if wanted == 'auto' else wanted} for all samples; {flag}"
        )
    return possible[0]


def related(values, positions, names, path):
    """Columns that go with the others, as samples of RNA do.

    Args:
        values: of each column (R). positions: of the columns. names: of the samples.

    Raises:
        InputError: there are two columns, and they do not; or one with many zeros does not.
    """
    X = np.stack([values[i] for i in positions])  # (S, R)
    if X.shape[1] < MIN_ROWS or np.isnan(X).mean() > 0.2:
        return positions, names
    X = np.nan_to_num(X[:, :: max(X.shape[1] // N_ROWS, 1)])
    varies = np.ptp(X, axis=1) > 0
    ranks = scipy.stats.rankdata(X, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.nan_to_num(np.corrcoef(ranks))
    np.fill_diagonal(r, np.nan)
    if len(positions) == 2:
        if varies.all() and r[0, 1] < UNRELATED:
            raise InputError(
                f"{path}: found two columns of numbers ({some(names)}) that do not go together as "
                f"samples do (rank correlation {r[0, 1]:.2f}), expected samples; --columns names "
                "them"
            )
        return positions, names
    median = np.nanmax(r, axis=1) if len(r) == 3 else np.nanmedian(r, axis=1)
    good = median >= UNRELATED
    if not good.any() or np.median(median[good]) < RELATED:
        return positions, names
    good |= ~X.any(axis=1)  # an empty sample is an error of its own
    zeros = (X == 0).mean(axis=1)  # lengths, positions and p-values have hardly any
    if (~good & (zeros > 0.01)).any():
        i = int(np.flatnonzero(~good & (zeros > 0.01))[0])
        raise InputError(
            f"{path}: found a column {names[i]} that goes with no other as samples do (rank "
            f"correlation {median[i]:.2f}), expected samples; --columns names them"
        )
    return [i for i, g in zip(positions, good, strict=True) if g], [
        name for name, g in zip(names, good, strict=True) if g
    ]


def named_columns(columns, wanted, path):
    """Positions and names of the columns that the user names.

    Raises:
        InputError: one is not there, or there several times.
    """
    wrong = [name for name in wanted if columns.count(name) != 1]
    if wrong:
        raise InputError(
            f"--columns {wrong[0]}: found {columns.count(wrong[0])} columns of this name in "
            f"{path} ({some(columns, 8)}), expected one"
        )
    return [columns.index(name) for name in wanted], list(wanted)


def strand_columns(source, candidates):
    """Positions of STAR's three columns of counts, unstranded first; None if these are others."""
    columns = [plain_name(name) for name in source.table.columns]
    if all(name in columns for name in STRANDS):
        return [columns.index(name) for name in STRANDS]
    first = source.table.iloc[:, 0].astype(str).str.strip()
    is_like_star = source.headerless and len(candidates) == 3
    rows = {"N_unmapped", "N_noFeature"} & set(first)
    named = re.search("ReadsPerGene", source.path.name, re.I) is not None
    return candidates if is_like_star and (rows or named) else None


def strand_of(source, strands, is_gene, notes):
    """The column of STAR's counts that the reads themselves speak for; one sample."""
    counts = to_numbers(source.table.iloc[:, strands])
    best, why = choose_strand(np.nan_to_num(counts[is_gene]))
    notes.append(f"counts of STAR: {why}")
    return [strands[best]], [sample_name(source.path)]
