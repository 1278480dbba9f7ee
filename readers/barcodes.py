"""Barcodes of cells: what they look like, and whether those of two files mean the same cells."""

import re

import pandas as pd

from runtime.errors import InputError, plain, some

# A barcode of a cell, with the name of a sample before or behind it, if any.
BARCODE = re.compile(
    r"(?P<prefix>.*[^A-Za-z0-9])?(?P<core>[ACGT]{10,})"
    r"(?P<number>[-._]\d+)?(?P<rest>[^A-Za-z0-9].*)?"
)

MIN_NAMES = 20  # barcodes or Ensembl ids that are evidence of what names stand for

NEARLY_NONE = 0.05  # of the barcodes: as many may be shared with other samples by chance


def core_of(name):
    """A cell's name in three parts: the sample's name around it, its barcode, and a number.

    "s1_AAACCTGAGCATGCTA-1" has the parts "s1_...", "AAACCTGAGCATGCTA" and "-1".
    """
    name = str(name)
    if match := BARCODE.fullmatch(name):
        around = match["prefix"] or "", match["rest"] or ""
        return "...".join(around) if any(around) else "", match["core"], match["number"] or ""
    prefix, core, number = re.fullmatch(r"(.*[_#:|/])?(.*?)(-\d+)?", name, re.DOTALL).groups()
    if core.isdigit() or not core:  # cell_12 is no cell 12 of a sample
        return "", name, ""
    return f"{prefix}..." if prefix else "", core, number or ""


def without_number(name):
    """A barcode without "-1" at its end."""
    return re.sub(r"(?<=.)[-._]\d+$", "", str(name))


NUMBERED = re.compile(r"(\D*)(0|[1-9]\d{0,17})")


def numbers_in(names):
    """What all names begin with, and the set of the numbers behind it; None if they are not so."""
    numbers, start = set(), None
    for name in names:
        match = NUMBERED.fullmatch(str(name).strip())
        if match is None or match[1] != (match[1] if start is None else start):
            return None
        start = match[1]
        numbers.add(int(match[2]))
    return (start, numbers) if numbers else None


def is_count(numbers):
    """Whether numbers (a set) are those of rows: all of them, from 0 or 1 on."""
    return min(numbers) in (0, 1) and max(numbers) - min(numbers) + 1 == len(numbers)


def check_same_start(names, samples, path):
    """Refuse to match samples that are numbered from 0 on one side and from 1 on the other.

    Args:
        names: of a file's samples. samples: of the data. path: of the file.
    """
    sides = [numbers_in(names), numbers_in(samples)]
    if None in sides or sides[0][0] != sides[1][0]:
        return
    first = [min(numbers) for _, numbers in sides if is_count(numbers)]
    if len(set(first)) > 1:
        raise InputError(
            f"{path}: its samples are numbered from {first[0]} on ({some(names)}), those of the "
            f"bulk from {first[1]} on ({some(samples)}), and may not be the same ones; expected "
            "the same names"
        )


def check_row_numbers(file_names, data_names, every, path):
    """Refuse to match cells by the numbers of rows, which begin at 0 in Python and at 1 in R.

    Bare numbers are those of rows where either side has all of them, from 0 or 1 on.

    Args:
        file_names, data_names: names of cells. every: those of the data with cells that were left
            out. path: of the file.

    Raises:
        InputError: both sides are numbers of rows, and not the same ones.
    """
    file, data = numbers_in(file_names), numbers_in(every)
    if file is None or data is None or file[0] != data[0]:
        return
    if file[1] in (data[1], numbers_in(data_names)[1]):
        return
    sides = [numbers for _, numbers in (file, data)]
    whole = [is_count(numbers) for numbers in sides]
    shifted = all(whole) and min(sides[0]) != min(sides[1])
    if shifted or (any(whole) and not file[0]):
        in_file, in_data = (f"{len(n):,} cells from {min(n)} to {max(n)}" for n in sides)
        raise InputError(
            f"{path}: found numbers in place of barcodes ({in_file}; in the data {in_data}), which "
            "as numbers of rows do not tell the same cells; expected barcodes, the data's own "
            "numbers, or a column of .obs"
        )


# How barcodes of a file and of the data may be made alike: what is changed, in words, and how (of
# the file, of the data). The first one that helps is taken.
READINGS = (
    ("with hyphens for points", *[lambda b: b.replace(".", "-")] * 2),
    ("without the number at the end of the file's", without_number, str),
    ("without the number at the end of the data's", str, without_number),
    ("without names of samples", *[lambda b: "".join(core_of(b)[1:])] * 2),
    ("without names of samples and numbers at the end", *[lambda b: core_of(b)[1]] * 2),
)


def match_barcodes(labels, barcodes, path):
    """Labels under the data's barcodes, where a file writes the barcodes in another way.

    Taken is what makes half of the file's barcodes, or of the data's, alike, one to one, and it is
    printed: without the number at the end ("-1") on one side, or without the name of one sample.

    Args:
        labels: Series indexed by the file's barcodes, unique. barcodes: of the data (N), an Index.
        path: of the file.

    Returns:
        Series, with the data's barcodes where they were found.

    Raises:
        InputError: (nearly) no barcode is in the data, whatever is done to it; or two become one.
    """
    bare = [b if b in barcodes else b.strip() for b in labels.index]
    if len(set(bare)) == len(bare):
        labels = labels.set_axis(bare)
    n_plain, least = int(barcodes.isin(labels.index).sum()), min(len(labels), len(barcodes))
    if n_plain and (n_plain >= NEARLY_NONE * least or least < MIN_NAMES):
        return labels
    n = f"only {n_plain}" if n_plain else "none"
    verb = "are" if n_plain > 1 else "is"
    problem = (
        f"{path}: {n} of its {len(labels)} barcodes ({some(labels.index, 2)}) {verb} in the data "
        f"({some(barcodes, 2)}); expected the barcodes of --data"
    )
    numbered = all(b.isdigit() for b in labels.index)  # rows of a table, or none at all
    for what, file_key, data_key in () if numbered else READINGS:
        keys = pd.Index(list(map(file_key, labels.index)), dtype=object)
        data_keys = pd.Index(list(map(data_key, barcodes)), dtype=object)
        in_data, found = keys.isin(data_keys), data_keys.isin(keys)  # of the file's, (N)
        if found.sum() < max(1, least / 2):
            continue
        if cause := repeats(keys[in_data], labels.index[in_data], what):
            raise InputError(f"{problem}; {cause}")
        if cause := repeats(data_keys[found], barcodes[found], what):
            raise InputError(f"{problem}; {cause}")
        if "samples" in what and (cause := conflict(labels.index[in_data], barcodes[found])):
            raise InputError(f"{problem}; {cause}")
        name_of = dict(zip(data_keys[found], barcodes[found], strict=True))
        example = f"{plain(labels.index[in_data][0])} is {plain(name_of[keys[in_data][0]])}"
        print(f"{path}: {found.sum():,} of {len(barcodes):,} barcodes match {what} ({example})")
        return labels.set_axis([name_of.get(k, b) for k, b in zip(keys, labels.index, strict=True)])
    raise InputError(problem)


def repeats(keys, barcodes, what):
    """Which barcodes become one, in a few words; "" if all stay different.

    Args:
        keys: barcodes as they are compared (n). barcodes: as they were (n). what: the change.
    """
    repeated = keys.duplicated(keep=False)
    if not repeated.any():
        return ""
    same = barcodes[keys == keys[repeated][0]]
    n = keys[repeated].nunique()
    return f"they match {what}, but {n:,} barcodes then stand for several cells ({some(same)})"


def conflict(file_names, data_names):
    """Why names of samples cannot be passed over, in a few words; "" if one side has one name.

    Args:
        file_names, data_names: barcodes that are alike without names of samples and numbers.
    """
    marks = [sorted({core_of(b)[0] for b in side}) for side in (file_names, data_names)]
    numbers = [sorted({core_of(b)[2] for b in side}) for side in (file_names, data_names)]
    sides = ("the file's", "the data's")
    if marks == [[""], [""]] or (marks[0] != [""] and marks[1] != [""]):
        if numbers[0] != numbers[1] and marks[0] == marks[1]:
            return f"they differ in the number at their end ({numbers[0][0]}, {numbers[1][0]})"
        return f"they differ in the sample's name ({marks[0][0]} and {marks[1][0]})"
    for side, names in zip(sides, marks, strict=True):
        if len(names) > 1:
            return f"{side} have names of {len(names)} samples ({some(names)}), expected the same"
    if numbers[0] != numbers[1] and "" not in (numbers[0] + numbers[1]):
        return f"they differ in the number at their end ({numbers[0][0]}, {numbers[1][0]})"
    return ""
