"""Counts that stay in their ``.h5ad``, for references larger than memory (``--backed``).

anndata reads blocks of consecutive cells, and up to BUFFER bytes of blocks are kept (a bufferful).
An epoch takes the blocks in random order, one bufferful at a time, and the cells of a bufferful in
random order. Each block is thus read once per epoch, and a batch still mixes cells from all over
the file. A matrix that fits into one bufferful is shuffled as it would be in memory, and gives the
same results to the bit.
"""

import hashlib
import warnings
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from readers.bounded import no_file
from readers.count_checks import check_cells, check_counts, check_orientation, check_shape
from readers.counts import COUNT_LAYERS, first_counts, name_factors, with_columns
from readers.hdf5 import check_hdf5, readable
from runtime.errors import InputError, one_line

BLOCK = 256  # cells

BUFFER = 4e8  # bytes of blocks kept of each matrix; a training reads up to two


class BackedCounts:
    """A matrix of counts (N x G) in a file; the rows that are asked for come as CSR int32.

    Every block is checked when it is read: all values must be raw counts, as in
    :func:`readers.count_checks.check_counts`.

    Attributes:
        shape: (N, G). library: total counts of each cell over all genes of the file (N), int64.
        fingerprint: hash (hex) of the file's counts and the choice of rows.
    """

    dtype = np.dtype(np.int32)

    def __init__(self, source, where, cells, genes):
        """Read all counts once.

        Args:
            source: a 2-d h5py dataset, or a sparse dataset of anndata.
            where: what messages name. cells, genes: names of the file's rows and columns.

        Raises:
            InputError: the source is not a matrix of raw counts, or is not stored cell by cell.
        """
        self.source, self.where, self.cells, self.genes = source, where, cells, genes
        self.select = None  # (genes of the file x G), which genes to take
        self.file_row = np.arange(len(cells))  # (N)
        check_layout(source, where, cells, genes)
        self.blocks = OrderedDict()  # number -> CSR, the most recently used last
        hasher, library, n_stored = hashlib.blake2b(digest_size=16), [np.zeros(0, np.int64)], 0
        for number in range(-(-len(cells) // BLOCK)):
            X = self.read(number)
            for part in (np.diff(X.indptr), X.indices, X.data):
                hasher.update(part.astype(np.int64).data)
            library.append(np.asarray(X.sum(axis=1, dtype=np.int64)).ravel())
            n_stored += X.nnz
        self.library = np.concatenate(library)
        self.fingerprint = hasher.hexdigest()
        # Bytes of a cell: values and indices of 4 bytes each.
        self.cell_bytes = 8 * max(1, n_stored / max(1, len(cells)))
        self.n_kept = max(1, int(BUFFER / (self.cell_bytes * BLOCK)))

    @property
    def shape(self):
        n_genes = len(self.genes) if self.select is None else self.select.shape[1]
        return len(self.file_row), n_genes

    def read(self, number):
        """Read a block of the file as CSR and check its counts; it is not kept."""
        rows = slice(number * BLOCK, min((number + 1) * BLOCK, len(self.cells)))
        try:
            X = self.source[rows]
        except Exception as error:  # h5py and anndata raise many types of errors on broken files
            raise InputError(f"{self.where}: not readable ({one_line(error)})") from error
        X = check_counts(X, self.where, self.cells[rows], self.genes)
        return X if self.select is None else sp.csr_matrix(X @ self.select)

    def block(self, number):
        """A block as CSR, from memory if it is kept, else from the file."""
        if number not in self.blocks:
            while len(self.blocks) >= self.n_kept:
                self.blocks.popitem(last=False)
            self.blocks[number] = self.read(number)
        self.blocks.move_to_end(number)
        return self.blocks[number]

    def __getitem__(self, rows):
        """Rows (n) in any order, as CSR (n x G) in memory."""
        block_of_row, row_in_block = np.divmod(self.file_row[rows], BLOCK)  # (n)
        n = len(block_of_row)
        if n == 0:
            return sp.csr_matrix((0, self.shape[1]), dtype=np.int32)
        size, indices, values = np.zeros(n, np.int64), [None] * n, [None] * n
        # Kept blocks first, before others replace them: a batch may lie across two bufferfuls.
        for number in sorted(np.unique(block_of_row), key=lambda number: number not in self.blocks):
            X = self.block(number)
            for i in np.flatnonzero(block_of_row == number):
                start, end = X.indptr[row_in_block[i] : row_in_block[i] + 2]
                # Copies, as views would keep the whole block in memory.
                size[i] = end - start
                indices[i], values[i] = X.indices[start:end].copy(), X.data[start:end].copy()
        indptr = np.concatenate([[0], np.cumsum(size)])
        parts = (np.concatenate(values), np.concatenate(indices), indptr)
        return sp.csr_matrix(parts, shape=(n, self.shape[1]))

    def close(self):
        """Close the file; nothing can be read afterwards."""
        getattr(self.source, "group", self.source).file.close()

    def __matmul__(self, select):
        """Choose genes with a matrix of zeros and ones (G x G'); the counts stay in the file."""
        return self.only(select=select)

    def only(self, rows=None, select=None):
        """The same counts restricted to some rows or genes; they stay in the file.

        Args:
            rows: indices or mask. select: (G x G'), zeros and ones; a matrix, so that a gene that
                the file lacks can be a column of zeros.
        """
        view = object.__new__(BackedCounts)
        view.__dict__ |= self.__dict__
        view.blocks = OrderedDict()
        if rows is not None:
            view.file_row, view.library = self.file_row[rows], self.library[rows]
            hasher = hashlib.blake2b(self.fingerprint.encode(), digest_size=16)
            hasher.update(view.file_row.astype(np.int64).data)
            view.fingerprint = hasher.hexdigest()
        if select is not None:
            view.select = select if self.select is None else self.select @ select
        return view

    def recount(self):
        """Take the totals of cells over the chosen genes alone; reads all counts again."""
        rows = (
            np.arange(i, min(i + BLOCK, len(self.file_row))) for i in range(0, self.shape[0], BLOCK)
        )
        totals = [np.asarray(self[r].sum(axis=1, dtype=np.int64)).ravel() for r in rows]
        self.library = np.concatenate([np.zeros(0, np.int64), *totals])

    def sum(self, axis):
        """Total counts, int64: of each gene (G) for axis 0, of each cell (N) for axis 1.

        A cell's total is over all genes of the file, as its library size is.
        """
        if axis == 1:
            return self.library
        chunks = np.array_split(np.arange(self.shape[0]), -(-self.shape[0] // 4096))
        return sum(np.asarray(self[rows].sum(axis=0, dtype=np.int64)).ravel() for rows in chunks)

    def shuffled(self, rows, rng):
        """Rows in random order, one bufferful of blocks after the other."""
        block_of_row = self.file_row[rows] // BLOCK
        numbers = np.unique(block_of_row)
        if len(numbers) <= self.n_kept:
            return rng.permutation(rows)
        numbers = rng.permutation(numbers)
        starts = range(0, len(numbers), self.n_kept)
        bufferfuls = [np.isin(block_of_row, numbers[i : i + self.n_kept]) for i in starts]
        return np.concatenate([rng.permutation(rows[in_buffer]) for in_buffer in bufferfuls])


def check_layout(source, where, cells, genes):
    """Check how a matrix is stored, before blocks of it are read.

    Raises:
        InputError: it has another shape, is stored gene by gene, is broken, or has parts over
            BUFFER bytes that can only be read as a whole.
    """
    import h5py

    check_shape(source.shape, where, cells, genes)
    if isinstance(source, h5py.Dataset):
        datasets, block_bytes = [source], BLOCK * len(genes) * source.dtype.itemsize
    else:
        if source.format != "csr":
            raise InputError(
                f"{where}: --backed reads cell by cell, found a matrix kept gene by gene (CSC); "
                "expected CSR (adata.X = adata.X.tocsr() before writing)"
            )
        datasets = [source.group["data"], source.group["indices"]]
        indptr = source.group["indptr"][()].astype(np.int64)  # (N + 1)
        if len(indptr) != len(cells) + 1 or indptr[0] or (np.diff(indptr) < 0).any():
            raise InputError(f"{where}: a broken sparse matrix (its cells are not in order)")
        if {len(dataset) for dataset in datasets} != {indptr[-1]}:
            raise InputError(f"{where}: a broken sparse matrix (its cells reach beyond its values)")
        block_starts = np.append(indptr[:-1:BLOCK], indptr[-1])
        block_bytes = 8 * int(np.diff(block_starts).max(initial=0))
    chunk_bytes = [int(np.prod(d.chunks)) * d.dtype.itemsize for d in datasets if d.chunks]
    largest = max(block_bytes, *chunk_bytes, 0)
    if largest > BUFFER:
        raise InputError(
            f"{where}: found {largest / 1e9:.1f} GB that can only be read at once, expected at "
            f"most {BUFFER / 1e9:.1f} GB; written again by anndata it has smaller chunks"
        )


class RowsInMemory:
    """Some rows of a matrix, read once, for those who ask for them again and again.

    Args:
        X: counts (N x G), CSR or backed. rows: of it.
    """

    def __init__(self, X, rows):
        self.rows, self.X = pd.Index(rows), X[rows]

    def __getitem__(self, rows):
        """Counts of some of these rows, by their positions in the whole matrix, CSR."""
        return self.X[self.rows.get_indexer(rows)]


class BackedCells:
    """The part of AnnData that the trainings use, with counts that stay in the file.

    Attributes:
        X: BackedCounts (N x G). obs, var: tables of cells (N) and genes (G). uns: a dict.
    """

    def __init__(self, X, obs, var, uns=None):
        self.X, self.obs, self.var, self.uns = X, obs, var, dict(uns or {})

    n_obs = property(lambda self: len(self.obs))
    n_vars = property(lambda self: len(self.var))
    obs_names = property(lambda self: self.obs.index)

    @property
    def var_names(self):
        return self.var.index

    @var_names.setter
    def var_names(self, names):
        self.var.index = names

    def __getitem__(self, which):
        """Some cells, or some cells and genes, by mask or index; their counts stay in the file."""
        rows, genes = which if isinstance(which, tuple) else (which, slice(None))
        select = None
        if not isinstance(genes, slice):
            genes = np.arange(self.n_vars)[genes]
            one_hot = (np.ones(len(genes), np.int32), (genes, np.arange(len(genes))))
            select = sp.csr_matrix(one_hot, shape=(self.n_vars, len(genes)))
        X = self.X.only(None if isinstance(rows, slice) else rows, select)
        obs = self.obs if isinstance(rows, slice) else self.obs.iloc[np.arange(self.n_obs)[rows]]
        return BackedCells(X, obs.copy(), self.var.iloc[genes].copy(), self.uns)

    def copy(self):
        return self


def read_backed(path):
    """Open an ``.h5ad``; counts are in a layer of COUNT_LAYERS, else ``X``, else ``raw.X``.

    Returns:
        BackedCells; ``.var["gene_ids"]`` as in :func:`readers.counts.read_counts`.

    Raises:
        InputError: the file is unreadable, or has no raw counts that are stored cell by cell.
    """
    import h5py

    if Path(path).suffix != ".h5ad":
        raise InputError(f"--backed: found {path}, expected an .h5ad file for --data")
    path = Path(path)
    if not path.exists():
        raise no_file(path, "counts for --data", "file or folder")
    with readable(path):
        check_hdf5(path, within=("obs", "var", "raw/var"))
        file = h5py.File(path, "r")
    try:
        return check_cells(open_counts(file, path), path)
    except BaseException:
        file.close()
        raise


def open_counts(file, path):
    """The first matrix of raw counts in an open ``.h5ad``, with its tables, as BackedCells."""
    from anndata.io import read_elem

    with readable(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*without encoding metadata")
        obs, var = read_elem(file["obs"]), read_elem(file["var"])
        obs = name_factors(obs, file, path)
        places = [(f"layers/{name}", f"layers['{name}']", var) for name in COUNT_LAYERS]
        places.append(("X", "X", var))
        if "raw/X" in file:
            places.append(("raw/X", "raw.X", with_columns(read_elem(file["raw/var"]), var)))
    check_orientation(obs.index, var.index, path)
    matrices = [(shown, name, genes) for name, shown, genes in places if name in file]
    layers = list(file.get("layers", ()))
    X, var = first_counts(matrices, partial(open_matrix, file), obs.index, path, layers)
    return BackedCells(X, obs, var)


def open_matrix(file, name, where, cells, genes):
    """The BackedCounts of a dataset or a group of an HDF5 file, by its name there."""
    import h5py
    from anndata.io import sparse_dataset

    source = file[name]
    if not isinstance(source, h5py.Dataset):
        source = sparse_dataset(source)
    return BackedCounts(source, where, cells, genes)


def sample_in_memory(cells, codes, rng, what):
    """Draw as many cells as fit into BUFFER, and read them into memory.

    The draw is random within each type and keeps at least 500 cells of it, or all if there are
    fewer, so that rare types are not lost.

    Args:
        cells: AnnData, which is returned as it is, or BackedCells. codes: cell types (N).
        rng: numpy's. what: the sample is for, for the message.

    Returns:
        AnnData, and the positions (n) of its cells among all cells, ascending.
    """
    import anndata

    rows = np.arange(cells.n_obs)
    if not isinstance(cells, BackedCells):
        return cells, rows
    limit = int(BUFFER / cells.X.cell_bytes)
    if cells.n_obs > limit:
        rows = sample_by_type(codes, limit, rng)
        print(f"{what}: from {len(rows):,} of {cells.n_obs:,} cells, drawn at random by type")
    X = cells.X.only()[rows]  # a new view, whose blocks are not kept
    sample = anndata.AnnData(X, obs=cells.obs.iloc[rows].copy(), var=cells.var.copy())
    sample.uns |= cells.uns
    return sample, rows


def sample_by_type(codes, n, rng):
    """Positions of about n cells, ascending: the same fraction of each type, but at least 500."""
    chosen = []
    for k in np.unique(codes):
        rows = np.flatnonzero(codes == k)
        n_rows = min(len(rows), max(500, round(n * len(rows) / len(codes))))
        chosen.append(rng.choice(rows, n_rows, replace=False))
    return np.sort(np.concatenate(chosen))
