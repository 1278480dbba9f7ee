"""Tables of text as tools, R and spreadsheets write them: header, separator and numbers."""

import csv
import io
import itertools
import re

import numpy as np
import pandas as pd

from readers.bounded import MAX_COLUMNS, UNREADABLE, to_numbers
from readers.gene_names import bare_id
from runtime.errors import InputError, one_line, some

NO_VALUE = ("", "NA", "NaN", "nan", "N/A", "NULL", "null")  # how tables write a missing value

SEPARATORS = "\t,;"

N_HEAD = 60  # lines among which the header is looked for

# Words by which columns of genes or samples are called, unlike genes themselves.
NAMES_OF_GENES = {
    *("gene", "genes", "geneid", "genename", "symbol", "symbols", "id", "ids", "name", "names"),
    *("x", "ensembl", "hugo", "hgnc", "entrez", "probe", "probes", "transcript", "target"),
    *("feature", "row", "rows", "rownames", "tracking", "ref", "gen", "sample", "samples"),
    *("unnamed", "index"),
}

SPACES = " '\u2019\u00a0\u2009\u202f"  # marks that can only stand between thousands

MIN_GROUPED = 30  # numbers with a thousands separator that settle how the others are read


def clean_lines(data):
    """The same text with line feeds, and without what GEO's series matrices have around a table."""
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if data.startswith(b"!"):
        data = b"\n".join(line for line in data.split(b"\n") if not line.startswith(b"!"))
    return data


def read_text_table(data, where, text=False):
    """A table of text as it stands: a DataFrame (R x C) with a name for every column.

    The first column is text, all others are what pandas takes them for.

    Args:
        data: UTF-8 bytes. where: for messages. text: whether all columns stay text.

    Returns:
        the table, and whether its first line was a row of numbers rather than a header; columns are
        then named by their position.

    Raises:
        InputError: it is no table, or too wide.
    """
    try:
        head = io.BytesIO(data)
        longest = 100 * MAX_COLUMNS  # a file without line breaks is one line
        lines = [head.readline(longest).decode("utf-8", "replace") for _ in range(N_HEAD)]
        lines = list(itertools.takewhile(bool, lines))  # to the end of the file
        check_width(lines, where)
        n_skipped = find_header(lines)
        header, *below = *lines[n_skipped:], ""
        first_row = next((line for line in below if line.strip()), "")
        separator = find_separator(header, first_row)
        names, fields = (split(line, separator) for line in (header, first_row))
    except UNREADABLE as error:
        raise InputError(f"{where}: not a readable table ({one_line(error)})") from error
    headerless = is_row_of_numbers(names) and (not fields or is_row_of_numbers(fields))
    if headerless:
        names = ["gene", *(str(i) for i in range(1, len(names)))]
    elif len(fields) == len(names) + 1:  # R's write.table leaves the row names without a header
        names = ["", *names]
    if not names or len(fields) > len(names):
        raise InputError(
            f"{where}: found {len(names)} names in its header ({some(names)}) and {len(fields)} "
            "fields in the line below, expected a table"
        )
    decimal = find_decimal(lines[n_skipped + 1 :], separator)
    options = {"decimal": decimal, "dtype": str if text else {0: str}}  # 001 stays 001
    options |= find_quoting(data, separator, names, where)
    table = parse(data, where, separator, names, n_skipped + (not headerless), options)
    return table.set_axis(names, axis=1), headerless


def find_quoting(data, separator, names, where):
    """How quotes are to be read: as letters, where some are not closed on their line (5" in text).

    Raises:
        InputError: they are not in a csv, whose fields may hold commas.
    """
    quoted = [name for name in names if name]
    if quoted and all(len(n) > 1 and n[0] == n[-1] == "'" for n in quoted):
        names[:] = [name.strip("'") for name in names]
        return {"quotechar": "'"}
    odd = [line for line in data.split(b"\n") if line.count(b'"') % 2] if b'"' in data else []
    if not odd:
        return {}
    if separator != "\t":
        raise InputError(
            f"{where}: found a quote that is not closed on its line "
            f"({odd[0][:60].decode('utf-8', 'replace')!r}), expected a table; write it without "
            "quotes in text"
        )
    names[:] = [name.strip('"') for name in names]
    return {"quoting": csv.QUOTE_NONE}


def find_decimal(lines, separator):
    """The decimal mark: a comma if numbers have commas that group nothing, and none has a point."""
    if separator == ",":
        return "."
    fields = [f.strip() for line in lines for f in split(line, separator)[1:] if line.strip()]
    if any(re.fullmatch(r"-?\d*\.\d+", f) for f in fields):
        return "."
    commas = [f for f in fields if re.fullmatch(r"-?\d+,\d+", f)]
    return "," if any(len(f.split(",")[1]) != 3 or f[:2] == "0," for f in commas) else "."


def check_width(lines, where):
    """Refuse lines of more than MAX_COLUMNS fields."""
    n = 1 + max((line.count(sep) for line in lines for sep in SEPARATORS), default=0)
    if n > MAX_COLUMNS:
        raise InputError(f"{where}: found {n:,} columns or more, expected at most {MAX_COLUMNS:,}")


def parse(data, where, separator, names, n_skipped, options):
    """The lines of a table below its header, columns named 0 to C - 1."""
    options = {"sep": separator, "header": None, "names": range(len(names))} | options
    if separator == " ":
        options["sep"], options["skipinitialspace"] = r"\s+", True
    try:
        return pd.read_csv(
            io.BytesIO(data),
            **options,  # pandas would rename repeated columns, but repeated genes are summed
            skiprows=n_skipped,
            low_memory=False,
            float_precision="round_trip",  # the default crashes on 1e4002161627746957
            encoding="utf-8",
            keep_default_na=False,
        )
    except UNREADABLE as error:
        raise InputError(f"{where}: not a readable table ({one_line(error)})") from error


def is_row_of_numbers(fields):
    """Whether a line is one of values: a gene, perhaps another name of it, and numbers alone."""
    if len(fields) < 2 or is_number(fields[0]) or not fields[0].strip():
        return False
    first = fields[0].strip()
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", first).lower())
    n_text = 2 if bare_id(first) else 1  # HTSeq may write a symbol behind the id
    rest = fields[n_text:] if len(fields) > n_text else fields[1:]
    # A header may name samples by numbers, but then its first field is the name of a column.
    named = set(words) & NAMES_OF_GENES or re.search(
        "gene|symbol|probe|ensembl|feature", first, re.I
    )
    return not named and all(map(is_number, rest))


def is_number(field):
    """Whether a field is a finite number."""
    try:
        return bool(np.isfinite(float(field)))
    except ValueError:
        return False


def find_header(lines):
    """Position of the header among a table's first lines.

    Empty lines, comments, titles and the size of a GCT come before it. A line that begins with # is
    a comment unless it has as many fields as the next line. A title is a line of one field above
    one of several.
    """
    i = 0
    while i < len(lines) - 1:
        line, next_line = lines[i : i + 2]
        separator = max(SEPARATORS, key=next_line.count)
        n_separators = line.count(separator)
        is_header = next_line[:1] != "#" and 0 < n_separators == next_line.count(separator)
        if line.startswith(("#1.2", "#1.3")):  # GCT: the next line is its size
            i += 2
        elif is_title(line, lines[i + 1 : i + 4]):
            i += 1
        elif line.strip("\t,; \r\n") and (line[0] != "#" or is_header):
            break
        else:
            i += 1
    return i


def is_title(line, below):
    """Whether a line has one field that is not empty, and lines below it have several."""
    n_fields = [sum(bool(f.strip()) for f in line.split(sep)) for sep in SEPARATORS]
    if max(n_fields) != 1:
        return False
    rows = [row for row in below if row.strip()]
    counts = [[sum(map(bool, row.split(sep))) for row in rows] for sep in SEPARATORS]
    return any(len(n_fields) > 1 and min(n_fields[-2:]) > 2 for n_fields in counts)


def split(line, separator):
    """The fields of a line of a csv."""
    if separator == " ":
        return next(csv.reader([line.strip()], delimiter=" ", skipinitialspace=True), [])
    return next(csv.reader([line], delimiter=separator), [])


def find_separator(header, row):
    """The most frequent separator that gives two lines the same number of fields.

    Tab, comma or semicolon; blanks, as R's write.table writes, where none of them is there. The
    header may be a field short, as in :func:`read_text_table`.
    """

    def score(separator):
        try:
            n_names, n_fields = (len(split(line, separator)) for line in (header, row))
        except csv.Error:  # the field is too long, so it is not the separator
            return False, 0
        # Equal lengths count first: names may hold more commas than there are tabs.
        return n_fields > 1 and n_fields - n_names in (0, 1), header.count(separator)

    best = max(SEPARATORS, key=score)
    if not any(separator in header + row for separator in SEPARATORS) and score(" ")[0]:
        return " "
    return best


# ------------------------------------------------------------------------------------- numbers


def read_numbers(text, where):
    """Numbers of columns of text (n) that are written with separators, if all show how.

    ``1,234`` or ``1.234`` are thousands where every number has its points or commas at thousands,
    and decimals where one has not.

    Returns:
        float64 with NaN for what is no number, and what was found, "" for nothing special.

    Raises:
        InputError: too few numbers show which of the two is meant.
    """
    values = pd.Series(text.ravel()).astype(str).str.strip()
    spaced = values.str.contains(rf"^-?\d{{1,3}}(?:[{SPACES}]\d{{3}})+(?:[.,]\d+)?$")
    if spaced.any():
        mark = re.sub(r"[\d.,-]", "", values[spaced].iloc[0])[0]
        without = values.where(~spaced, values.str.replace(f"[{SPACES}]", "", regex=True))
        mended, note = read_numbers(without.to_numpy(), where)
        return mended, "; ".join(
            filter(None, [f"{spaced.sum():,} numbers with {mark!r} between thousands", note])
        )
    plain = to_numbers(values)
    numbers = values[~values.isin(NO_VALUE)]
    for grouping, decimal in ((",", "."), (".", ",")):
        g, d = re.escape(grouping), re.escape(decimal)
        with_group = numbers.str.contains(rf"^-?\d{{1,3}}(?:{g}\d{{3}})+(?:{d}\d+)?$")
        n = int(with_group.sum())
        if n == 0:
            continue
        in_groups = with_group | numbers.str.contains(rf"^-?\d{{1,3}}(?:{d}\d+)?$")
        if not in_groups.mean() > 0.999:
            continue
        if numbers.str.contains(rf"^-?0{g}").any():  # 0.123 groups nothing
            continue
        both = numbers.str.contains(d).any()
        if n / len(numbers) > 0.99 and not both:  # no number below 1,000: these may be decimals
            if grouping == ".":
                continue
            n = 0
        if n < MIN_GROUPED and not both:
            example = numbers[with_group].iloc[0]
            raise InputError(
                f"{where}: found {example!r}, which may be thousands or decimals, as may "
                "others; expected numbers without separators of thousands"
            )
        mended = values.str.replace(grouping, "", regex=False).str.replace(
            decimal, ".", regex=False
        )
        return to_numbers(mended), (f"{n:,} numbers with {grouping!r} between thousands")
    comma = numbers.str.contains(r"^-?\d+,\d+(?:[eE][-+]?\d+)?$")
    no_group = numbers.str.contains(r"^-?(?:0,\d+|\d+,(?:\d{1,2}|\d{4,}))$").any()
    if no_group and comma.sum() >= MIN_GROUPED and not numbers.str.contains(".", regex=False).any():
        mended = values.str.replace(",", ".", regex=False)
        return to_numbers(mended), (f"{comma.sum():,} numbers with decimal commas")
    return plain, ""


def may_be_thousands(X):
    """Whether parsed values (n) may be thousands with a point: at most three decimals, none < 1."""
    x = X[np.isfinite(X) & (X != 0)]
    fraction = x != np.rint(x)
    if fraction.sum() < MIN_GROUPED or (np.abs(x) < 1).any() or (np.abs(x) >= 1000).any():
        return False
    return bool(np.allclose(x * 1000, np.rint(x * 1000), rtol=0, atol=1e-6))
