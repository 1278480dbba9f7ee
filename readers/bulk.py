"""Bulk samples from any table that tools, R and spreadsheets write, or from ``.h5ad``.

From bytes to samples: containers (what the file is), tables (its header and numbers), bulk_table
(which are genes and samples), columns and quantifiers (which columns are samples, of which unit),
scale (whether values are on a linear scale). What could be read in two ways is refused with the
flag that settles it.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from readers.bounded import to_numbers
from readers.bulk_files import in_memory, read_any_table, source_of_memory
from readers.bulk_options import BulkOptions
from readers.bulk_table import BulkTable, find_samples
from readers.gene_names import GeneFinder, bare_id, examples, likely_cause, n_found
from readers.quantifiers import expand, sample_name
from readers.scale import FLAG, LARGEST_LOG, UNDO, check_base, describe_unit, find_scale, undo_log
from readers.tables import NO_VALUE
from runtime.errors import InputError, some

# Genes of the model that must be found: a tenth of them, or this many of a large model.
MIN_FOUND = 200

MAX_REPORTS = 3  # files, before what was printed of one is not repeated for the next

BARCODE = re.compile(r"(.*[^ACGT])?[ACGT]{12,}([-_.].*)?")

LARGE = 20e6  # bytes of a file, from which reading it takes seconds

MIN_CELLS = 50  # samples named like barcodes, for a table to be one of single cells


@dataclass
class Bulk:
    """Bulk samples in the genes of a model."""

    values: sp.csr_matrix
    """Counts, TPM or CPM (S x G), float64; a dense array will do as well."""
    measured: np.ndarray
    """Mask of the genes that were measured in all samples (G)."""
    samples: list
    """Names (S)."""
    where: str = "bulk"
    """What messages name."""

    def __repr__(self):
        return f"{len(self.samples):,} bulk samples ({some(self.samples)})"

    def dense(self):
        """The values as an array (S, G)."""
        return self.values.toarray() if sp.issparse(self.values) else self.values


def read_bulk(paths, genes, gene_ids=None, options=None):
    """Read bulk samples of one file, of several, or of a folder of quantifications.

    A gene is found by its exact name, else by its Ensembl id without version, else by a spelling
    of which there is one reading; rows or columns of the same gene are summed. Values may be
    counts, TPM or CPM, as only ratios within a sample matter.

    Args:
        paths: a path, or several; or an AnnData or DataFrame (S x genes). genes: the model's genes
            (M). gene_ids: their other names (M), "" where there is none. options: BulkOptions.

    Returns:
        Bulk, in the genes of the model (M).

    Raises:
        InputError: a file is unreadable, has too few genes of the model, is on a logarithmic scale,
            could be read in two ways, or see :func:`check_bulk`.
    """
    options = BulkOptions() if options is None else options
    gene_ids = genes if gene_ids is None else gene_ids
    finder = GeneFinder(genes, gene_ids)
    files = [paths] if in_memory(paths) else expand(as_list(paths))
    printed = set() if len(files) > MAX_REPORTS else None
    parts = [read_file(path, finder, genes, gene_ids, options, printed) for path in files]
    name_after_files(parts, files)
    X = sp.vstack([part.values for part in parts]).tocsr()
    measured = np.all([part.measured for part in parts], axis=0)
    samples = [name for part in parts for name in part.samples]
    if len(files) > 1:
        check_together(parts, measured, samples, files)
        X = X @ sp.diags_array(measured.astype(np.float64))
        X.eliminate_zeros()
    return Bulk(X.tocsr(), measured, samples, parts[0].where if len(parts) == 1 else "--bulk")


def read_file(path, finder, genes, gene_ids, options, printed=None):
    """Bulk of one file, as :func:`read_bulk`, and a report.

    printed: notes on the files before, which are not repeated; None to print all.
    """
    if not in_memory(path) and Path(path).is_file() and Path(path).stat().st_size > LARGE:
        print(f"{path}: {Path(path).stat().st_size / 1e6:,.0f} MB to read", flush=True)
    source = source_of_memory(path) if in_memory(path) else read_any_table(Path(path))
    path = source.path
    bulk = find_samples(source, finder, genes, gene_ids, options)
    bulk = check_bulk(bulk, path)
    if not options.columns:
        check_no_cells(bulk.samples, path)
    bulk.values = on_linear_scale(bulk, path, options)
    check_values(bulk, bulk.values, path)
    check_found(bulk, finder, genes, gene_ids, path)
    report(bulk, genes, gene_ids, path, printed)
    return Bulk(*sum_by_gene(bulk, len(genes)), list(bulk.samples), str(path))


def as_list(paths):
    """A path or several, as a list."""
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


def name_after_files(parts, files):
    """Name samples after their files, if each file has one sample and several call it the same."""
    names = [name for part in parts for name in part.samples]
    if len(set(names)) < len(names) == len(files):
        print(f"--bulk: samples named after their files, as several call theirs {some(set(names))}")
        for part, path in zip(parts, files, strict=True):
            part.samples = [sample_name(path)]


def check_together(parts, measured, samples, files):
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
    if not measured.any():
        raise InputError(f"--bulk: found no gene of the model that is in all of {len(files)} files")
    n_some = np.any([part.measured for part in parts], axis=0).sum() - measured.sum()
    print(
        f"--bulk: {len(samples)} bulk samples of {len(files)} files ({some(samples)})"
        + (f"; {n_some:,} genes that are not in all of them left out" if n_some else "")
    )


# ------------------------------------------------------------------------------------- values


def check_bulk(bulk, where):
    """Check values and names, and drop samples and genes that have no value at all.

    Args:
        bulk: BulkTable; values are numbers or text. where: what messages name.

    Returns:
        BulkTable; values are float64, and may still be negative. A sample without values is dropped
        only if it has no name either, as the empty columns of spreadsheets.

    Raises:
        InputError: a value is not a number or not finite; two samples have the same name; or there
            is no sample.
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
        empty = missing[filled][:, measured] & np.isin(original.astype(str), NO_VALUE)
        if (wrong == empty).all():
            raise missing_values(bulk, original, empty, where)
        raise_value(bulk, original, np.argwhere(wrong & ~empty)[0], where)
    repeated = bulk.samples[pd.Index(bulk.samples).duplicated()]
    if len(repeated):
        raise InputError(f"{where}: sample names occur more than once ({some(repeated)})")
    return bulk


def missing_values(bulk, original, empty, where):
    """The error of a table some values of which are missing.

    original: the values as the file has them (S x G). empty: which are missing (S x G).
    """
    genes, samples = bulk.genes[empty.any(axis=0)], bulk.samples[empty.any(axis=1)]
    i, j = np.argwhere(empty)[0]
    found = original[i, j]
    cure = (
        "leave out these genes (table.dropna() in pandas, na.omit in R); of merged tables give "
        "each on its own (--bulk a.csv b.csv): genes that are not in all of them are left out"
    )
    if (whole := empty.all(axis=1)).any():
        cure = f"leave out the samples without any value ({some(bulk.samples[whole])})"
    return InputError(
        f"{where}: found {found!r} (sample {bulk.samples[i]}, gene {bulk.genes[j]}), a missing "
        f"value, as are {empty.sum():,} of {empty.size:,} in {len(genes):,} of {empty.shape[1]:,} "
        f"genes and {len(samples):,} of {len(empty):,} samples ({some(samples)}); expected "
        f"numbers: {cure}"
    )


def check_no_cells(samples, where):
    """Raise an InputError if most samples are named like the barcodes of single cells."""
    barcodes = [name for name in samples if BARCODE.fullmatch(str(name))]
    if len(barcodes) >= MIN_CELLS and len(barcodes) > len(samples) / 2:
        raise InputError(
            f"{where}: found {len(samples):,} samples named like the barcodes of single cells "
            f"({some(barcodes)}), expected bulk samples: sum the cells of each sample first; if "
            "these are bulk samples, --columns names them"
        )


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
        try:
            check_base(X, options.log)
        except ValueError as error:
            raise InputError(f"--log {options.log}: {where}: {error}") from error
        bulk.notes.append(f"logarithm to base {options.log} undone, less {options.pseudocount:g}")
        return undo_log(X, options.log, options.pseudocount)
    of_model = bulk.positions >= 0
    scale = find_scale(X[:, of_model] if of_model.any() else X)
    if scale.name == "log":
        which = some([str(name) for name in bulk.samples[scale.samples]])
        part = "" if scale.samples.all() else f" in {scale.samples.sum()} samples ({which})"
        raise InputError(
            f"{where}: found values on a log scale or another transformed one{part} ({scale.why}), "
            f"expected counts, TPM or CPM; "
            + (f"--log {scale.base} undoes it" if scale.base else UNDO if X.min() < 0 else FLAG)
        )
    if scale.name in ("few", "square roots"):
        what = "square roots" if scale.name == "square roots" else "too small values for a bulk"
        raise InputError(
            f"{where}: found {what} ({scale.why}), expected counts, TPM or CPM; --log no takes the "
            "values as they are"
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
    check_not_negative(bulk, where)
    wrong = ~np.isfinite(X) | (X > 1e15)
    if wrong.any():
        raise_value(bulk, original, np.argwhere(wrong)[0], where)
    empty = samples[X.sum(axis=1) < 1e-6]
    if len(empty):
        raise InputError(
            f"{where}: {len(empty)} of {len(samples)} samples are empty ({some(empty)}), expected "
            "counts in every sample"
        )


def check_not_negative(bulk, where):
    """Raise an InputError if values (S x G) are below 0: how many, and what helps."""
    X = bulk.values
    negative = X < 0
    if not negative.any():
        return
    i, j = np.argwhere(negative)[0]
    scale, cure = " on a linear scale", ""
    cause = "as after batch correction (ComBat) or subtraction of a background"
    if X.max() <= LARGEST_LOG:
        scale, cure, cause = "", f"{UNDO}; else ", "as on a log scale or after centring"
    raise InputError(
        f"{where}: found {X[i, j]:g} (sample {bulk.samples[i]}, gene {bulk.genes[j]}), which is "
        f"negative{scale}, as are {negative.sum():,} of {X.size:,} values ({negative.mean():.1%}), "
        f"{cause}; expected counts, TPM or CPM, 0 or more: {cure}give the table as it was before, "
        "or set what is below 0 to 0"
    )


def check_found(bulk, finder, genes, gene_ids, where):
    """Check that enough genes of the model are in a table.

    Raises:
        InputError: they are not; names the likely cause.
    """
    n = n_found(bulk.positions)
    floor = max(1, min(MIN_FOUND, len(genes) // 10))
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
        ``(X, measured)``: CSR float64 (S x M), and a mask (M) of the genes that the bulk has.
    """
    rows = np.flatnonzero(bulk.positions >= 0)  # (n)
    one_hot = (np.ones(len(rows)), (rows, bulk.positions[rows]))
    S = sp.csr_matrix(one_hot, shape=(len(bulk.positions), n_genes))  # (G, M)
    measured = np.zeros(n_genes, bool)
    measured[bulk.positions[rows]] = True
    return sp.csr_matrix(bulk.values @ S), measured


def report(bulk, genes, gene_ids, path, printed=None):
    """Print what was understood: format, orientation, unit, what was left out, samples, genes."""
    n = n_found(bulk.positions)
    n_repeated = np.sum(bulk.positions >= 0) - n
    if n_repeated:
        print(f"{path}: {n_repeated:,} repeated genes summed")
    n_by_symbol = n_found(bulk.positions[[bare_id(name) is None for name in bulk.genes]])
    ways = ((n_by_symbol, "symbol"), (n - n_by_symbol, "Ensembl id"))
    ways = ", ".join(f"{number:,} by {way}" for number, way in ways if number)
    bulk.notes[0] += f"; samples {some(bulk.samples)}"
    notes = bulk.notes if printed is None else [n for n in bulk.notes[1:] if n not in printed]
    if printed is not None:
        printed.update(notes)
    for note in notes:
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
