"""Checks of raw counts and of the names of cells and genes; genes of one genome alone."""

import re
from collections import Counter

import numpy as np
import pandas as pd
import scipy.sparse as sp

from readers.barcodes import BARCODE, MIN_NAMES
from readers.gene_names import COMMON_GENES, GENOME, genome_of, without_genome
from readers.scale import LARGEST_LOG
from runtime.errors import InputError, is_plain_name, one_line, some

ENSEMBL_ID = re.compile(r"ENS[A-Z]*G\d{6,}(\.\d+)?([^A-Za-z0-9].*)?")

MOSTLY_BARE = 0.2  # of the genes without a genome in front, though others have one
MOSTLY_ONE = 0.9  # of all counts: what one genome must have for the others to be noise

STILL_WHOLE = 0.2  # share of integers among values that are no integers throughout

CORRECTED = (
    "they look like counts after removal of ambient RNA (SoupX, DecontX) or with reads shared "
    "between genes; expected raw counts (integers): round them (numpy.rint; roundToInt=TRUE in "
    "SoupX), or take the uncorrected matrix"
)

GENE_FEATURES = {"gene expression", "gex", "rna", "gene", "genes"}  # feature_types of genes


def check_counts(X, where, cells, genes):
    """Check that every stored value is a raw count.

    Args:
        X: sparse or dense matrix (N x G).
        where: what messages name, usually the file.
        cells, genes: names of the rows (N) and columns (G).

    Returns:
        X as CSR int32, repeated entries summed, without stored zeros.

    Raises:
        InputError: a value is not finite, negative, not an integer, or over 2^31 - 1; or the
            matrix has another type or shape, or indices outside of it.
    """
    # Every value, not a sample: a log-normalised layer read as counts spoils all that follows, and
    # nothing else would show it.
    if getattr(X, "dtype", np.dtype(object)).kind not in "biuf":
        dtype = getattr(X, "dtype", type(X).__name__)
        raise InputError(f"{where}: found values of type {dtype}, expected numbers")
    check_shape(X.shape, where, cells, genes)
    X = sp.csr_matrix(check_sparse(X, where))
    check_values(X, where, cells, genes)
    if not X.has_canonical_format:
        X = X.astype(np.int64)  # holds the sum of repeated entries
        X.sum_duplicates()
        check_values(X, where, cells, genes)
    X = X.astype(np.int32)
    X.eliminate_zeros()
    return X


def check_shape(shape, where, cells, genes):
    """Raise InputError unless a matrix has a row for each cell and a column for each gene."""
    if shape != (len(cells), len(genes)):
        raise InputError(
            f"{where}: found a matrix of {' x '.join(map(str, shape))}, expected "
            f"{len(cells)} cells x {len(genes)} genes"
        )


def check_sparse(X, where):
    """Return a matrix, as CSR or CSC if it is sparse, with all indices within its shape.

    Call it before any arithmetic, as an index beyond the shape would read foreign memory.

    Raises:
        InputError: an index lies outside of the shape, or the indices have another type.
    """
    if not sp.issparse(X):
        return X
    try:
        if X.format not in ("csr", "csc"):  # tocsr sums repeated entries in the matrix's type
            wide = {"f": np.float64, "i": np.int64, "u": np.int64}
            X = X.astype(wide.get(X.dtype.kind, X.dtype)).tocsr()
        X.check_format(full_check=True)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: a broken sparse matrix ({one_line(error)})") from error
    return X


def check_values(X, where, cells, genes):
    """Raise the error of :func:`check_counts` for the first stored value that is not a count."""
    values = X.data
    for wrong, problem in (
        (~np.isfinite(values), "not finite"),
        (values < 0, "negative"),
        (values != np.rint(values), "not an integer"),
        (values >= 2.0**31, "over 2147483647"),  # which float32 would round up to 2^31
    ):
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            cell = cells[np.searchsorted(X.indptr, first, side="right") - 1]
            gene = genes[X.indices[first]]
            expected = (
                "expected raw counts (integers, 0 or more), not normalised or transformed ones"
            )
            if problem == "not an integer" and are_corrected(X):
                expected = CORRECTED
            raise InputError(
                f"{where}: found {values[first]:.10g} (cell {cell}, gene {gene}), which is "
                f"{problem}, as are {wrong.sum():,} of {values.size:,} stored values; {expected}"
            )


def are_corrected(X):
    """Whether fractional values (N x G, CSR, 0 or more) are counts of which parts were taken.

    Either a good part of them are still integers; or values hardly ever repeat within a cell, cells
    have different sums, and the largest value is above any logarithm. Normalised values repeat, as
    the counts do that they are multiples of.
    """
    if np.mean(X.data == np.rint(X.data)) > STILL_WHOLE:
        return True
    rows = [X.data[X.indptr[i] : X.indptr[i + 1]] for i in range(min(X.shape[0], 100))]
    rows = [row for row in rows if len(row) > 1]
    if not rows or X.data.max() <= LARGEST_LOG:
        return False
    n_distinct = np.mean([len(np.unique(row)) / len(row) for row in rows])
    sums = np.array([row.sum() for row in rows], float)
    return n_distinct > 0.5 and sums.std() > 0.01 * sums.mean()


def check_names(names, where, what):
    """Check that names are text that every file format can store.

    Args:
        names: of genes, cells or cell types. where: what messages name. what: a name stands for.

    Raises:
        InputError: a name is not text, or has a NUL character or an unpaired surrogate.
    """
    for name in names:
        if not isinstance(name, str) or not is_plain_name(name):
            raise InputError(f"{where}: {what} {name!r} is no plain text, expected names")


def check_orientation(cells, genes, path):
    """Check that names of cells and genes do not show that a matrix is transposed.

    Args:
        cells, genes: names of the rows (N) and columns (G). path: what messages name.

    Raises:
        InputError: the rows are named as genes and the columns are not, or the reverse of barcodes.
    """
    genes_in_rows = are_genes(cells, 3) and not are_genes(genes, 1)
    barcodes_in_columns = are_mostly(genes, BARCODE) and not are_mostly(cells, BARCODE)
    if genes_in_rows or barcodes_in_columns:
        raise InputError(
            f"{path}: found {some(cells, 2)} as names of cells and {some(genes, 2)} as names of "
            "genes, expected cells x genes; it looks transposed: write it again as adata.T"
        )


def are_mostly(names, pattern):
    """Whether more than half of many names match a compiled pattern as a whole."""
    n = sum(pattern.fullmatch(str(name)) is not None for name in names)
    return n >= MIN_NAMES and 2 * n > len(names)


def are_genes(names, fewest):
    """Whether names are mostly Ensembl ids, or have at least ``fewest`` of COMMON_GENES."""
    n_common = sum(str(name).upper() in COMMON_GENES for name in names)
    return n_common >= fewest or are_mostly(names, ENSEMBL_ID)


def check_cells(adata, path):
    """Keep genes alone, and check names.

    Args:
        adata: AnnData or BackedCells, as read. path: what messages name.

    Returns:
        The same cells without other features, such as antibodies. Repeated gene symbols get the
        suffixes -1, -2, ...

    Raises:
        InputError: there are no cells or no genes; barcodes repeat; a name is not plain text; or
            see :func:`keep_genome`.
    """
    import anndata

    if adata.n_obs == 0 or adata.n_vars == 0:
        raise InputError(f"{path}: found {adata.n_obs} cells x {adata.n_vars} genes, expected some")
    if not adata.obs_names.is_unique:
        repeated = adata.obs_names[adata.obs_names.duplicated()].unique()
        raise InputError(
            f"{path}: {len(repeated)} barcodes occur more than once ({some(repeated)}), expected "
            "one cell per barcode; add the sample's name to the barcodes when joining samples"
        )
    if "feature_types" in adata.var:
        adata = keep_genes(adata, path)
    adata = keep_genome(adata, path)
    check_names(adata.var_names, path, "gene")
    check_names(adata.obs_names, path, "barcode")
    n_repeated = int(adata.var_names.duplicated().sum())
    if n_repeated:
        print(f"{path}: {n_repeated} repeated gene symbols told apart by a suffix (-1, -2, ...)")
        adata.var_names = anndata.utils.make_index_unique(adata.var_names)
    return adata


def keep_genes(adata, path):
    """Leave out features that are not genes, by ``.var["feature_types"]``, and count them.

    A feature without a type counts as a gene.

    Raises:
        InputError: no feature is a gene.
    """
    types = adata.var["feature_types"].astype(object)
    types = types.where(types.notna(), "").astype(str).str.strip()
    is_gene = types.str.lower().isin({"", *GENE_FEATURES}).to_numpy()
    if is_gene.all():
        return adata
    kinds = some([f"{n:,} {kind}" for kind, n in Counter(types[~is_gene]).most_common()], 5)
    if not is_gene.any():
        raise InputError(f"{path}: found no gene in feature_types ({kinds}), expected genes")
    print(f"{path}: {np.sum(~is_gene)} features that are not gene expression left out ({kinds})")
    return only_genes(adata, is_gene)


def only_genes(adata, mask):
    """The cells with some of their genes (mask, G) alone."""
    adata = adata[:, mask].copy()
    if hasattr(adata.X, "recount"):  # backed: totals of cells were of all features
        adata.X.recount()
    return adata


def keep_genome(adata, path):
    """Keep the genes and cells of one genome, and take its name off the genes'.

    Genes tell their genome by a prefix (``GRCh38_``), or their species by their Ensembl ids. A few
    genes that tell none stay, as spike-ins do.

    Args:
        adata: AnnData or BackedCells with ``.var["gene_ids"]``. path: what messages name.

    Raises:
        InputError: several genomes have more than a few of the counts.
    """
    pairs = list(zip(map(str, adata.var_names), map(str, adata.var["gene_ids"]), strict=True))
    genome = np.array([genome_of(a) or genome_of(b) or "" for a, b in pairs], object)  # (G)
    bare = genome == ""
    if bare.mean() > MOSTLY_BARE and any(GENOME.match(name) for name, _ in pairs):
        genome[bare] = "others"  # one species has a genome in front, another has none
    n_genes = Counter(genome[genome != ""])
    genomes = [name for name, n in n_genes.most_common() if n >= MIN_NAMES]
    if len(genomes) > 1:
        adata = keep_largest_genome(adata, genome, genomes, path)
    names = [without_genome(str(name)) for name in adata.var_names]
    prefixed = [old for new, old in zip(names, adata.var_names, strict=True) if new != old]
    if prefixed:
        print(
            f"{path}: the genome in front of {len(prefixed):,} genes taken off ({some(prefixed)})"
        )
        adata.var_names = pd.Index(names)
    adata.var["gene_ids"] = [without_genome(str(name)) for name in adata.var["gene_ids"]]
    return adata


def keep_largest_genome(adata, genome, genomes, path):
    """The genes of the genome with (nearly) all counts, and the cells that are mostly of it.

    Args:
        genome: of each gene (G), "" if unknown. genomes: names of those with many genes.

    Raises:
        InputError: none has so many.
    """
    totals = np.asarray(adata.X.sum(axis=0)).ravel()  # (G)
    counts = {name: totals[genome == name].sum() for name in genomes}
    genomes = sorted(genomes, key=counts.get, reverse=True)
    total = max(sum(counts.values()), 1)
    shares = ", ".join(f"{name} {counts[name] / total:.1%}" for name in genomes)
    first = genomes[0]
    if counts[first] < MOSTLY_ONE * total:
        raise InputError(
            f"{path}: found {len(genomes)} genomes ({shares} of the counts), expected one; write "
            "the genes of one, and the cells that are mostly of it, to an .h5ad of its own"
        )
    before = np.asarray(adata.X.sum(axis=1)).ravel()
    other = np.isin(genome, genomes[1:])
    adata = only_genes(adata, ~other)
    foreign = 2 * np.asarray(adata.X.sum(axis=1)).ravel() < before
    print(
        f"{path}: genes of {len(genomes)} genomes ({shares} of the counts); {other.sum():,} genes "
        f"that are not of {first} left out, and {foreign.sum():,} cells with most counts in them"
    )
    return adata[~foreign].copy() if foreign.any() else adata
