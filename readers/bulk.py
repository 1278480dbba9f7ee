"""Bulk samples from any table that tools, R and spreadsheets write, or from ``.h5ad``.

From bytes to samples: containers (what the file is), tables (its header and numbers), this module
(genes, samples and units), quantifiers (whose columns they are), scale (whether values are on a
linear scale). What could be read in two ways is refused with the flag that settles it.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from readers.bounded import to_numbers
from readers.bulk_files import read_any_table
from readers.bulk_options import BulkOptions
from readers.columns import (
    choose_columns,
    common_unit,
    is_identifier,
    left_out,
    named_columns,
    numbers_rows,
)
from readers.gene_names import (
    GeneFinder,
    bare_id,
    describe_kinds,
    find_genes,
    likely_cause,
    n_found,
)
from readers.long_tables import find_sample_column, varies_within, widen
from readers.quantifiers import expand, is_no_gene, no_samples, split_words, unit_of
from readers.scale import FLAG, describe_unit, find_scale, undo_log
from readers.tables import (
    NO_VALUE,
    may_be_thousands,
    read_numbers,
)
from runtime.errors import InputError, some

# Genes of the model that must be found: a tenth of them, or this many of a large model.
FEWEST_FOUND = 200

FEW = 0.02  # of the model's genes, so few that names may need mending before they are known

FEWEST_ROWS = 50  # for a column that is the sum of the others not to be so by chance

BARCODE = re.compile(r"(.*[^ACGT])?[ACGT]{12,}([-_.].*)?")

FEWEST_CELLS = 50  # samples named like barcodes, for a table to be one of single cells


@dataclass
class BulkTable:
    """Bulk samples in the genes of their file.

    Attributes:
        values: (S x G), numbers or text. samples: names (S). genes: names (G).
        positions: of each gene in the model (G), -1 if the model does not have it.
        notes: lines for the report: what was understood, mended and left out.
    """

    values: np.ndarray
    samples: np.ndarray
    genes: np.ndarray
    positions: np.ndarray
    notes: list[str] = field(default_factory=list)


def read_bulk(paths, genes, gene_ids=None, options=None):
    """Read bulk samples of one file, of several, or of a folder of quantifications.

    A gene is found by its exact name, else by its Ensembl id without version, else by a spelling
    of which there is one reading; rows or columns of the same gene are summed. Values may be
    counts, TPM or CPM, as only ratios within a sample matter.

    Args:
        paths: a path, or several. genes: the model's genes (M). gene_ids: their other names (M), ""
            where there is none. options: BulkOptions.

    Returns:
        ``(X, present, samples)``: CSR float64 (S x M), a mask (M) of the genes found in all files,
        and the names of the samples (S).

    Raises:
        InputError: a file is unreadable, has too few genes of the model, is on a logarithmic scale,
            could be read in two ways, or see :func:`check_bulk`.
    """
    options = BulkOptions() if options is None else options
    gene_ids = genes if gene_ids is None else gene_ids
    finder = GeneFinder(genes, gene_ids)
    files = expand([paths] if isinstance(paths, (str, Path)) else paths)
    parts = [read_file(path, finder, genes, gene_ids, options, len(files)) for path in files]
    X = sp.vstack([part[0] for part in parts]).tocsr()
    present = np.all([part[1] for part in parts], axis=0)
    samples = [name for part in parts for name in part[2]]
    if len(files) > 1:
        check_together(parts, present, samples, files)
        X = X @ sp.diags_array(present.astype(np.float64))
        X.eliminate_zeros()
    return X.tocsr(), present, samples


def read_file(path, finder, genes, gene_ids, options, n_files):
    """``(X, present, samples)`` of one file, as :func:`read_bulk`, and a report."""
    source = read_any_table(Path(path))
    bulk = find_samples(source, finder, genes, gene_ids, options)
    bulk = check_bulk(bulk, path)
    bulk.values = on_linear_scale(bulk, path, options)
    check_values(bulk, bulk.values, path)
    check_found(bulk, finder, genes, gene_ids, path)
    report(bulk, genes, gene_ids, path, brief=n_files > 3)
    return *sum_by_gene(bulk, len(genes)), list(bulk.samples)


def check_together(parts, present, samples, files):
    """Check that files can stand beside each other, and say what only some of them have.

    Raises:
        InputError: two samples have the same name, or no gene is in all files.
    """
    counts = Counter(samples)
    repeated = [name for name, n in counts.items() if n > 1]
    if repeated:
        raise InputError(
            f"--bulk: sample names occur more than once in {len(files)} files ({some(repeated)}), "
            "expected files or folders named after their samples"
        )
    if not present.any():
        raise InputError(f"--bulk: found no gene of the model that is in all of {len(files)} files")
    n_some = np.any([part[1] for part in parts], axis=0).sum() - present.sum()
    print(
        f"--bulk: {len(samples)} bulk samples of {len(files)} files ({some(samples)})"
        + (f"; {n_some:,} genes that are not in all of them left out" if n_some else "")
    )


# --------------------------------------------------------------------------- samples and genes


def find_samples(source, finder, genes, gene_ids, options):
    """Find the genes of a table and put the samples into rows.

    Args:
        source: Source. finder: GeneFinder of the model. genes, gene_ids: the model's (M), for
            messages. options: BulkOptions.

    Returns:
        BulkTable; values are numbers or text.

    Raises:
        InputError: neither rows nor columns are genes of the model, or both may be.
    """
    table, path = source.table, source.path
    is_text = text_columns(table)
    gene_column, n_rows = choose_gene_column(table, is_text, finder, options, path)
    n_columns = finder.count(table.columns[1:])
    if max(n_rows, n_columns) <= FEW * finder.n_genes:
        n_columns = n_found(finder.find(table.columns[1:])[0])
    in_rows = choose_orientation(n_rows, n_columns, finder, source, genes, gene_ids, options)
    if in_rows:
        return samples_in_columns(source, gene_column, is_text, finder, options)
    return samples_in_rows(source, is_text, finder, options)


def text_columns(table):
    """Mask (C) of the columns that hold text without a single number; the first may be either."""
    mask = np.zeros(table.shape[1], bool)
    for i, dtype in enumerate(table.dtypes):
        if dtype.kind in "iuf":
            continue
        text = table.iloc[:, i].astype(str)
        if i == 0 and table.shape[1] > 1:
            mask[i] = np.isnan(to_numbers(text)).any()
            continue
        # Decimal commas make a number, too.
        numbers = to_numbers(text.str.replace(",", ".").str.strip())
        several_points = text.str.fullmatch(r"\s*\d{1,3}([.,]\d{3})+\s*")
        # ="12", '12 or 12 reads: to be named as no numbers rather than passed over as annotation.
        several_points |= text.str.fullmatch(r"[=\"' ]*\d[\d.,]*[\"']?( [a-z]+)?")
        mask[i] = (np.isnan(numbers) & ~several_points).all() and not text.isin(NO_VALUE).all()
    return mask


def choose_gene_column(table, is_text, finder, options, path):
    """Position of the column that names the genes of rows, and how many of the model it finds.

    Raises:
        InputError: the column that options name is not there.
    """
    names = [str(name) for name in table.columns]
    if options.gene_column is not None:
        if names.count(options.gene_column) != 1:
            raise InputError(
                f"--gene-column {options.gene_column}: found {names.count(options.gene_column)} "
                f"columns of this name in {path} ({some(names, 8)}), expected one"
            )
        i = names.index(options.gene_column)
        return i, n_found(finder.find(table.iloc[:, i].astype(str))[0])
    columns = [0, *(int(i) for i in np.flatnonzero(is_text) if i)]
    for count in (finder.count, lambda names: n_found(finder.find(names)[0])):
        n = [count(table.iloc[:, i].astype(str)) for i in columns]
        best = int(np.argmax(n))
        if n[best] > FEW * finder.n_genes:
            break  # hardly any are known as they stand, so names are mended
    return columns[best], n[best]


def choose_orientation(n_rows, n_columns, finder, source, genes, gene_ids, options):
    """Whether genes are in rows; by options, else by where more of the model's genes are found.

    Args:
        n_rows, n_columns: number of the model's genes found there.

    Raises:
        InputError: there are none, or about as many in both.
    """
    if options.genes_in != "auto" or options.gene_column is not None:
        return options.genes_in != "columns"
    table, path = source.table, source.path
    if n_rows == n_columns == 0:
        names = max((list(table.iloc[:, 0]), list(table.columns[1:])), key=len)
        cause = likely_cause(names, finder)
        no_ids = "; the weights hold no ids or other names of them"
        raise InputError(
            f"{path}: neither its rows ({some(table.iloc[:, 0])}) nor its columns "
            f"({some(table.columns[1:])}) are genes known to the model "
            f"({examples(genes, gene_ids)}{'' if second_names(genes, gene_ids) else no_ids})"
            + (f": {cause}" if cause else "")
        )
    if min(n_rows, n_columns) > 0.5 * max(n_rows, n_columns) and min(n_rows, n_columns) > 1:
        raise InputError(
            f"{path}: found {n_rows:,} genes of the model in rows and {n_columns:,} in columns, "
            "expected them in one; --genes-in rows or --genes-in columns settles it"
        )
    return n_rows > n_columns


def samples_in_rows(source, is_text, finder, options):
    """BulkTable of a table whose columns are genes."""
    table = source.table
    positions, kinds = finder.find(table.columns)
    is_gene = positions >= 0
    name_column, notes = choose_name_column(source, is_text & ~is_gene)
    if is_gene[0] and name_column == 0:
        name_column = None
    dropped = is_text & ~is_gene
    unknown = np.flatnonzero(~is_gene)
    dropped[unknown] |= ~holds_expression(table.iloc[:, unknown])
    dropped |= no_samples(table.columns) & ~is_gene
    dropped[0] |= not is_gene[0] or name_column == 0
    if name_column is not None:
        dropped[name_column] = True
    names = [n for i, n in enumerate(table.columns) if dropped[i] and i not in (0, name_column)]
    if names:
        notes.append(left_out(names, "columns that are not genes"))
    if kinds:
        notes.append(f"gene names mended: {describe_kinds(kinds)}")
    if name_column is None:
        samples = np.array([str(i) for i in range(1, len(table) + 1)], object)
        notes.append("samples are numbered, as no column names them")
    else:
        samples = table.iloc[:, name_column].astype(str).to_numpy(object)
    kept = np.flatnonzero(~dropped)
    values = numbers_of(source, kept, notes)
    notes.insert(0, f"{source.format}, genes in columns")
    return BulkTable(values, samples, np.array(table.columns[kept], object), positions[kept], notes)


def holds_expression(table):
    """Mask of the columns (C) that are numbers of 0 or more alone; metadata of samples may not."""
    mask = np.zeros(table.shape[1], bool)
    is_number = np.array([dtype.kind in "iuf" for dtype in table.dtypes], bool)
    for columns in (np.flatnonzero(is_number), *([i] for i in np.flatnonzero(~is_number))):
        X = to_numbers(table.iloc[:, columns])
        mask[columns] = (np.isfinite(X) & (X >= 0)).all(axis=0)
    return mask


def choose_name_column(source, is_text):
    """Column that names the samples in rows: the first, unless it only numbers them.

    Returns:
        its position, None if there is none; and notes.
    """
    table = source.table
    first = table.iloc[:, 0].astype(str).str.strip()
    others = [i for i in np.flatnonzero(is_text) if i and table.iloc[:, i].is_unique]
    if not numbers_rows(first) and (first.is_unique or not others):
        return 0, []
    if others:
        named = [i for i in others if re.search("sample|name|id", str(table.columns[i]), re.I)]
        best = (named or others)[0]
        return best, [f"sample names taken from column {table.columns[best]}"]
    header = str(table.columns[0])
    return (0 if header or len(first) < 2 else None), []


def samples_in_columns(source, gene_column, is_text, finder, options):
    """BulkTable of a table whose rows are genes.

    Raises:
        InputError: see :func:`choose_columns` and :func:`choose_value_column`.
    """
    table = source.table
    genes = table.iloc[:, gene_column].astype(str)
    notes = [f"{source.format}, genes in rows"]
    if gene_column:
        notes.append(f"gene names taken from column {table.columns[gene_column]}")
    check_one_list(source, gene_column, is_text, finder)
    outside = is_no_gene(genes) | is_no_gene(table.iloc[:, 0].astype(str))
    if outside.any():
        notes.append(left_out(list(table.iloc[:, 0][outside]), "rows that count no genes"))
    by = find_sample_column(table, genes, is_text, gene_column, source.path)
    if by is None:
        kept, names = choose_columns(source, gene_column, is_text, options, ~outside, notes)
        values = numbers_of(source, kept, notes)
    else:
        sample = table.iloc[:, by].astype(str)
        i = choose_value_column(source, is_text, sample, {by, gene_column}, options)
        notes.append(f"a long table: samples by column {table.columns[by]}")
        notes[-1] += f", values by {table.columns[i]}"
        genes, names, values = widen(genes, sample, numbers_of(source, [i], notes), source, notes)
        outside = is_no_gene(genes)
    rows = np.flatnonzero(~outside)
    genes = np.asarray(genes, object)[rows]
    positions, kinds = finder.find(genes)
    if kinds:
        notes.append(f"gene names mended: {describe_kinds(kinds)}")
    return BulkTable(values[rows].T, np.array(names, object), genes, positions, notes)


def check_one_list(source, gene_column, is_text, finder):
    """Refuse two tables side by side: a second column of genes, in another order.

    Raises:
        InputError: there is one.
    """
    table = source.table
    first = find_genes(table.iloc[:, gene_column].astype(str), finder.known)
    for i in np.flatnonzero(is_text):
        if i in (0, gene_column):
            continue
        second = find_genes(table.iloc[:, i].astype(str), finder.known)
        both = (first >= 0) & (second >= 0)
        if both.sum() > 0.3 * len(table) and (first != second)[both].mean() > 0.2:
            raise InputError(
                f"{source.path}: columns {table.columns[gene_column]} and {table.columns[i]} name "
                "different genes in the same rows, expected one list of genes: two tables side by "
                "side are to be split"
            )


def choose_value_column(source, is_text, sample, others, options):
    """Position of the column of values in a long table.

    Args:
        sample: of each row (R). others: positions of the columns of genes and samples.

    Raises:
        InputError: several columns may hold them, or options name one that is not there.
    """
    table, path = source.table, source.path
    columns = [str(name) for name in table.columns]
    no_sample = no_samples(columns)
    if options.columns:
        return named_columns(columns, options.columns, path)[0][0]
    possible = [
        i
        for i in np.flatnonzero(~is_text)
        if i not in others
        and not no_sample[i]
        and varies_within(table, i, sample)
        and not is_identifier(to_numbers(table.iloc[:, i]))
    ]
    split = [split_words(columns[i]) for i in possible]
    units = {unit_of(words): i for i, (_, words) in zip(possible, split, strict=True) if words}
    if len(possible) > 1 and len(units) == len(possible):
        return int(units[common_unit({"": units}, options.bulk_unit, path)])
    if len(possible) != 1:
        raise InputError(
            f"{path}: found a long table with {len(possible)} columns of values "
            f"({some([columns[i] for i in possible])}) beside genes and samples, expected one; "
            "--columns names it"
        )
    return int(possible[0])


def numbers_of(source, kept, notes):
    """Values of columns (R x C') as numbers, or as text where some are none.

    Args:
        kept: positions of the columns (C'). notes: to add to.
    """
    table = source.table.iloc[:, kept]
    is_number = [dtype.kind in "iuf" for dtype in table.dtypes]
    if all(is_number):
        values = table.to_numpy(np.float64)
        columns = [j for j in range(values.shape[1]) if may_be_thousands(values[:, j])]
        if not columns:
            return values
        whole = np.delete(values, columns, axis=1)
        if (whole != np.rint(whole)).any():  # others have decimals, and so have these
            return values
        text = source.as_text(list(kept))
        if text is None:
            return values
        numbers, note = read_numbers(text, source.path)
        if not note:
            return values
        notes.append(note)
        return numbers.reshape(text.shape)
    values = table.to_numpy(object)
    text = values.astype(str)
    has_separator = np.char.find(text.astype(str), ",") >= 0
    has_separator |= np.char.count(text.astype(str), ".") > 1
    if not has_separator.any():
        return values
    text = source.as_text(list(kept)) if source.data is not None else text
    numbers, note = read_numbers(text, source.path)
    if not note or np.isnan(numbers).mean() > np.isin(text.astype(str), NO_VALUE).mean() + 1e-9:
        return values
    notes.append(note)
    return numbers.reshape(text.shape)


def second_names(genes, gene_ids):
    """The other names of genes that differ from their names."""
    return [other for gene, other in zip(genes, gene_ids, strict=True) if other not in ("", gene)]


def examples(genes, gene_ids):
    """A few names that the model knows, for messages."""
    others = second_names(genes, gene_ids)
    return some(genes) + (f", or {some(others)}" if others else "")


# ------------------------------------------------------------------------------------- values


def check_bulk(bulk, where):
    """Check values and names, and drop samples and genes that have no value at all.

    Args:
        bulk: BulkTable; values are numbers or text. where: what messages name.

    Returns:
        BulkTable; values are float64, and may still be negative. A sample without values is dropped
        only if it has no name either, as the empty columns of spreadsheets.

    Raises:
        InputError: a value is not a number or not finite; two samples have the same name; samples
            are single cells; or there is no sample.
    """
    X = to_numbers(bulk.values)
    missing = np.isnan(X)
    filled = ~missing.all(axis=1) | (bulk.samples != "")  # (S)
    measured = ~missing.all(axis=0)  # (G)
    text = bulk.values[:, ~measured].astype(str)
    measured[~measured] = ~np.isin(text, NO_VALUE).all(axis=0)  # other text is an error
    original, left = bulk.values[filled][:, measured], bulk.genes[~measured]
    X = X[filled][:, measured]
    parts = bulk.samples[filled], bulk.genes[measured], bulk.positions[measured], bulk.notes
    bulk = BulkTable(X, *parts)
    if not len(bulk.samples) or not len(bulk.genes):
        raise InputError(f"{where}: found no sample beside the genes, expected columns of numbers")
    if (left != "").any():
        print(f"{where}: {np.sum(left != ''):,} genes without any value left out")
    wrong = ~np.isfinite(X) | (X > 1e15)  # sums must stay finite
    if wrong.any():
        raise_value(bulk, original, np.argwhere(wrong)[0], where)
    repeated = bulk.samples[pd.Index(bulk.samples).duplicated()]
    if len(repeated):
        raise InputError(f"{where}: sample names occur more than once ({some(repeated)})")
    barcodes = [name for name in bulk.samples if BARCODE.fullmatch(str(name))]
    if len(barcodes) >= FEWEST_CELLS and len(barcodes) > len(bulk.samples) / 2:
        raise InputError(
            f"{where}: found {len(bulk.samples):,} samples named like the barcodes of single cells "
            f"({some(barcodes)}), expected bulk samples; sum the cells of each sample first"
        )
    return bulk


def raise_value(bulk, original, place, where):
    """Raise the error of a value; original: as the file has them (S x G); place: row and column."""
    i, j = place
    value = original[i, j]
    shown = repr(value) if isinstance(value, str) else f"{value:g}"
    raise InputError(
        f"{where}: found {shown} (sample {bulk.samples[i]}, gene {bulk.genes[j]}), expected a "
        "number: counts, TPM or CPM, 0 to 1e15"
    )


def on_linear_scale(bulk, where, options):
    """Values (S x G) on a linear scale, as they are or by undoing a logarithm.

    Raises:
        InputError: they seem to be on another scale, and options do not say so.
    """
    X = bulk.values
    if options.log == "no":
        return X
    if options.log != "auto":
        bulk.notes.append(f"logarithm to base {options.log} undone, less {options.pseudocount:g}")
        return undo_log(X, options.log, options.pseudocount)
    of_model = bulk.positions >= 0
    scale = find_scale(X[:, of_model] if of_model.any() else X)
    if scale.name == "log":
        which = some([str(name) for name in bulk.samples[scale.samples]])
        part = "" if scale.samples.all() else f" in {scale.samples.sum()} samples ({which})"
        raise InputError(
            f"{where}: found values on a log scale or another transformed one{part} ({scale.why}), "
            f"expected counts, TPM or CPM; {FLAG}"
        )
    if scale.name in ("z-scores", "ranks"):
        raise InputError(
            f"{where}: found {scale.name} ({scale.why}), which do not give the counts back; "
            "expected counts, TPM or CPM (a log scale can be undone with --log)"
        )
    if scale.name == "quantile":
        raise InputError(
            f"{where}: found quantile-normalised samples ({scale.why}), expected counts, TPM or "
            "CPM; --log no takes the values as they are"
        )
    bulk.notes[0] += f", {describe_unit(X, scale)}"
    return X


def check_values(bulk, original, where):
    """Raise an error for values below 0, too large ones, or empty samples."""
    X, samples = bulk.values, bulk.samples
    wrong = ~np.isfinite(X) | (X < 0) | (X > 1e15)
    if wrong.any():
        raise_value(bulk, original, np.argwhere(wrong)[0], where)
    empty = samples[X.sum(axis=1) < 1e-6]
    if len(empty):
        raise InputError(
            f"{where}: {len(empty)} of {len(samples)} samples are empty ({some(empty)}), expected "
            "counts in every sample"
        )


def check_found(bulk, finder, genes, gene_ids, where):
    """Check that enough genes of the model are in a table.

    Raises:
        InputError: they are not; names the likely cause.
    """
    n = n_found(bulk.positions)
    floor = max(1, min(FEWEST_FOUND, len(genes) // 10))
    if n >= floor:
        n_other = finder.n_in_other_case(bulk.genes[bulk.positions < 0])
        if n_other <= max(n, 100):
            return
    cause = likely_cause(bulk.genes, finder)
    raise InputError(
        f"{where}: found {n:,} of the model's {len(genes):,} genes among its {len(bulk.genes):,} "
        f"({some(bulk.genes)}), expected {floor:,} or more, with names such as "
        f"{examples(genes, gene_ids)}" + (f": {cause}" if cause else "")
    )


def sum_by_gene(bulk, n_genes):
    """Sum the values of each gene of the model.

    Returns:
        ``(X, present)``: CSR float64 (S x M), and a mask (M) of the genes that the bulk has.
    """
    rows = np.flatnonzero(bulk.positions >= 0)  # (n)
    one_hot = (np.ones(len(rows)), (rows, bulk.positions[rows]))
    S = sp.csr_matrix(one_hot, shape=(len(bulk.positions), n_genes))  # (G, M)
    present = np.zeros(n_genes, bool)
    present[bulk.positions[rows]] = True
    return sp.csr_matrix(bulk.values @ S), present


def report(bulk, genes, gene_ids, path, brief=False):
    """Print what was understood: format, orientation, unit, what was left out, samples, genes."""
    n = n_found(bulk.positions)
    n_repeated = np.sum(bulk.positions >= 0) - n
    if n_repeated:
        print(f"{path}: {n_repeated:,} repeated genes summed")
    n_by_symbol = n_found(bulk.positions[[bare_id(name) is None for name in bulk.genes]])
    ways = ((n_by_symbol, "symbol"), (n - n_by_symbol, "Ensembl id"))
    ways = ", ".join(f"{number:,} by {way}" for number, way in ways if number)
    bulk.notes[0] += f"; samples {some(bulk.samples)}"
    for note in [] if brief else bulk.notes:
        print(f"{path}: {note}")
    print(
        f"{path}: {len(bulk.samples):,} bulk samples x {len(bulk.genes):,} genes; {n:,} of the "
        f"model's {len(genes):,} genes found ({100 * n / len(genes):.1f} %: {ways})"
    )
    if n < len(genes) / 2:
        print(
            f"warning: {path}: fewer than half of the model's genes found, so results will be "
            f"poor; expected names such as {examples(genes, gene_ids)}, found {some(bulk.genes)}",
            file=sys.stderr,
        )
