"""Which rows and columns of a table are genes and which are samples."""

import re
from dataclasses import dataclass, field

import numpy as np

from readers.bounded import to_numbers
from readers.columns import (
    choose_columns,
    common_unit,
    is_identifier,
    left_out,
    named_columns,
    numbers_rows,
)
from readers.gene_names import (
    describe_kinds,
    examples,
    find_genes,
    likely_cause,
    n_found,
    second_names,
)
from readers.long_tables import find_sample_column, varies_within, widen
from readers.quantifiers import is_no_gene, no_samples, plain_name, split_words, unit_of
from readers.tables import NO_VALUE, SPACES, may_be_thousands, read_numbers
from runtime.errors import InputError, some

MAX_TEXT_ROWS = 20  # below a header: condition, donor, unit

FEW = 0.02  # of the model's genes, so few that names may need mending before they are known


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
    notes = drop_rows_of_text(source, finder)
    table, path = source.table, source.path
    is_text = text_columns(table)
    gene_column, n_rows = choose_gene_column(table, is_text, finder, options, path)
    n_columns = finder.count(table.columns[1:])
    if max(n_rows, n_columns) <= FEW * finder.n_genes:
        n_columns = n_found(finder.find(table.columns[1:])[0])
    in_rows = choose_orientation(n_rows, n_columns, finder, source, genes, gene_ids, options)
    if in_rows:
        check_features(source, gene_column, options)
        bulk = samples_in_columns(source, gene_column, is_text, finder, options)
    else:
        bulk = samples_in_rows(source, is_text, finder, options)
    bulk.notes += notes
    return bulk


def drop_rows_of_text(source, finder):
    """Take rows below the header that describe the samples out of source; returns notes.

    The last of them has text in every column in which the rows below have numbers (a condition, a
    unit), and none is a gene. If names of the header repeat, such a row may hold the samples' own.
    """
    table = source.table
    if all(dtype.kind in "iuf" for dtype in table.dtypes[1:]):
        return []
    as_text = table.iloc[: MAX_TEXT_ROWS + 20].astype(str)
    text = np.isnan(to_numbers(as_text)) & ~as_text.isin(NO_VALUE).to_numpy()  # (R', C)
    numeric = ~text[-10:].all(axis=0)
    numeric[0] = False
    if len(table) < MAX_TEXT_ROWS + 20 or not numeric.any():
        return []
    is_text = text[:MAX_TEXT_ROWS, numeric].all(axis=1)
    n = int(np.flatnonzero(is_text)[-1]) + 1 if is_text.any() else 0
    first = [str(name) for name in table.iloc[:n, 0]]
    if not n or n_found(finder.find(first)[0]) or finder.count(table.columns[1:]) > 1:
        return []
    rows = [as_text.iloc[i, np.flatnonzero(numeric)] for i in range(n)]
    notes = [
        left_out(
            [f"{name}: {some(row)}" for name, row in zip(first, rows, strict=True)],
            "rows below the header, of no gene,",
        )
    ]
    source.table, source.n_text_rows = table.iloc[n:].reset_index(drop=True), n
    if not table.columns[numeric].is_unique:
        names = next((row for row in rows if row.is_unique), None)
        if names is not None:
            columns = [str(name) for name in table.columns]
            for i, name in zip(np.flatnonzero(numeric), names, strict=True):
                columns[i] = name
            source.table = source.table.set_axis(columns, axis=1)
            notes.append("samples named by a row below the header, as names of the header repeat")
    return notes


def check_features(source, gene_column, options):
    """Refuse rows that are regions of the genome (peaks, junctions), several to a gene.

    Transcripts and exons add up to their gene, and have columns or names of their own.

    Raises:
        InputError: they are; options may name the column of genes to add them up.
    """
    table = source.table
    genes = table.iloc[:, gene_column].astype(str)
    if options.gene_column is not None or len(genes) < 200 or genes.nunique() > 0.9 * len(genes):
        return
    names = [plain_name(name) for name in table.columns]
    if any(re.search("transcript|exon|isoform|^t_(id|name)$|^tx", name) for name in names):
        return
    regions = {"start", "end", "stop"} & set(names) and {"chr", "chrom", "seqnames"} & set(names)
    other = table.iloc[:, 0].astype(str)
    regions = regions or other.str.fullmatch(r"(chr)?[0-9XYM]+[:_-]\d+[-_:]\d+.*").mean() > 0.5
    if regions:
        raise InputError(
            f"{source.path}: found several rows for a gene, each with a place in the genome "
            "(peaks, junctions or circular RNA?), expected one row for each gene; --gene-column "
            f"{table.columns[gene_column]} adds them up"
        )


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
        several_points = text.str.fullmatch(rf"\s*\d{{1,3}}([.,{SPACES}]\d{{3}})+\s*")
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
    columns = np.flatnonzero(~dropped)
    values = numbers_of(source, columns, notes)
    notes.insert(0, f"{source.format}, genes in columns")
    genes = np.array(table.columns[columns], object)
    return BulkTable(values, samples, genes, positions[columns], notes)


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
        columns, names = choose_columns(source, gene_column, is_text, options, ~outside, notes)
        values = numbers_of(source, columns, notes)
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
    """Refuse two tables side by side: a second column of genes, in another order."""
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


def numbers_of(source, columns, notes):
    """Values of columns (R x C') as numbers, or as text where some are none.

    Args:
        columns: positions of the columns (C'). notes: to add to.
    """
    table = source.table.iloc[:, columns]
    if all(dtype.kind in "iuf" for dtype in table.dtypes):
        values = table.to_numpy(np.float64)
        doubtful = [j for j in range(values.shape[1]) if may_be_thousands(values[:, j])]
        others = np.delete(values, doubtful, axis=1)
        text = source.as_text(list(columns)) if doubtful else None
        if text is None:
            return values
        if (others == np.rint(others)).all():
            numbers, note = read_numbers(text, source.path)
            notes += [note] * bool(note)
            return numbers.reshape(text.shape) if note else values
        return numbers_by_column(text, values, doubtful, source, columns, notes)
    values = table.to_numpy(object)
    text = values.astype(str)
    separated = np.char.count(text, ".") > 1
    for mark in "," + SPACES:
        separated |= np.char.find(text, mark) >= 0
    if not separated.any():
        return values
    text = source.as_text(list(columns)) if source.data is not None else text
    numbers, note = read_numbers(text, source.path)
    if note and not has_gaps(numbers, text.ravel()):
        notes.append(note)
        return numbers.reshape(text.shape)
    doubtful = np.flatnonzero(separated.any(axis=0))
    return numbers_by_column(text, values, doubtful, source, columns, notes)


def has_gaps(numbers, text):
    """Whether numbers (n) read from text (n) lack some that text has."""
    return np.isnan(numbers).sum() > np.isin(text.astype(str), NO_VALUE).sum()


def numbers_by_column(text, values, doubtful, source, columns, notes):
    """Values (R x C') in which some columns, whose numbers have separators, are read anew.

    Args:
        text: the same as text (R x C'). doubtful: which of them. columns: their positions in the
            table (C').
    """
    values = values.copy()
    for j in doubtful:
        numbers, note = read_numbers(text[:, j], source.path)
        if note and not has_gaps(numbers, text[:, j]):
            values[:, j] = numbers
            notes.append(f"{source.table.columns[columns[j]]}: {note}")
    return values
