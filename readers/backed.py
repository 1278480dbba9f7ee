"""Counts that stay in their .h5ad and are read block by block, for references larger than memory.

The trainings read them so with ``--backed``. Blocks of consecutive cells are read by anndata, and
as many as fit into BUFFER bytes are kept. An epoch takes the blocks in random order, a bufferful at
a time, and its cells in random order from all blocks of the bufferful, so that each block is read
once an epoch and a batch still holds cells from all over the file. All that fits into one bufferful
is shuffled as it would be in memory, and gives the same results to the bit.
"""

import hashlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from readers.counts import check_cells, check_counts
from readers.gene_names import other_names
from readers.hdf5 import check_hdf5
from runtime.errors import InputError, one_line

BLOCK = 256  # cells

BUFFER = 4e8  # bytes of the blocks kept, of each of the two matrices that a training may read


class BackedCounts:
    """A matrix of counts (N x G) in a file; rows that are asked for come as CSR int32.

    Every block is checked as it is read: all values must be raw counts, as in
    :func:`readers.counts.check_counts`.

    Attributes:
        shape: (N, G). library: total counts of each cell in all genes of the file (N), int64.
        fingerprint: of the file's counts and the choice of rows, as hex.
    """

    dtype = np.dtype(np.int32)

    def __init__(self, source, where, cells, genes):
        """Read all counts once.

        Args:
            source: a 2-d h5py dataset, or what anndata makes of a sparse one.
            where: what messages name. cells, genes: names of the file's rows and columns.

        Raises:
            InputError: what stands there is not a matrix of raw counts, or not kept cell by cell.
        """
        self.source, self.where, self.cells, self.genes = source, where, cells, genes
        self.select = None  # (genes of the file x G), which genes to take
        self.file_row = np.arange(len(cells))  # (N)
        check_layout(source, where, cells, genes)
        self.blocks = OrderedDict()  # number -> CSR, the latest used last
        code, total, stored = hashlib.blake2b(digest_size=16), [], 0
        for number in range(-(-len(cells) // BLOCK)):
            X = self.read(number)
            for part in (np.diff(X.indptr), X.indices, X.data):
                code.update(part.astype(np.int64).data)
            total.append(np.asarray(X.sum(axis=1, dtype=np.int64)).ravel())
            stored += X.nnz
        self.library = np.concatenate([np.zeros(0, np.int64), *total])
        self.fingerprint = code.hexdigest()
        # Bytes of a cell: values and indices of 4 bytes each.
        self.cell_bytes = 8 * max(1, stored / max(1, len(cells)))
        self.n_kept = max(1, int(BUFFER / (self.cell_bytes * BLOCK)))

    @property
    def shape(self):
        n_genes = len(self.genes) if self.select is None else self.select.shape[1]
        return len(self.file_row), n_genes

    def read(self, number):
        """A block of the file as CSR, whatever is kept; its counts checked."""
        part = slice(number * BLOCK, min((number + 1) * BLOCK, len(self.cells)))
        try:
            X = self.source[part]
        except Exception as error:  # each kind of broken file raises something else
            raise InputError(f"{self.where}: not readable ({one_line(error)})") from error
        X = check_counts(X, self.where, self.cells[part], self.genes)
        return X if self.select is None else sp.csr_matrix(X @ self.select)

    def block(self, number):
        """A block, from those kept if it is among them."""
        if number not in self.blocks:
            while len(self.blocks) >= self.n_kept:
                self.blocks.popitem(last=False)
            self.blocks[number] = self.read(number)
        self.blocks.move_to_end(number)
        return self.blocks[number]

    def __getitem__(self, rows):
        """Rows (n) in any order, as CSR (n x G) in memory."""
        at = self.file_row[rows]
        number, within = np.divmod(at, BLOCK)
        size, indices, values = np.zeros(len(at), np.int64), [None] * len(at), [None] * len(at)
        # Each block once, those at hand first: a batch may lie across two bufferfuls.
        for one in sorted(np.unique(number), key=lambda one: one not in self.blocks):
            X = self.block(one)
            for i in np.flatnonzero(number == one):
                a, b = X.indptr[within[i] : within[i] + 2]
                # Copies: a view would keep its block in memory.
                size[i], indices[i], values[i] = b - a, X.indices[a:b].copy(), X.data[a:b].copy()
        if not len(at):
            return sp.csr_matrix((0, self.shape[1]), dtype=np.int32)
        indptr = np.concatenate([[0], np.cumsum(size)])
        parts = (np.concatenate(values), np.concatenate(indices), indptr)
        return sp.csr_matrix(parts, shape=(len(at), self.shape[1]))

    def close(self):
        """Close the file, from which nothing can be read then."""
        getattr(self.source, "group", self.source).file.close()

    def __matmul__(self, select):
        """The genes that a matrix of zeros and ones (G x G') selects; they stay in the file."""
        return self.only(select=select)

    def only(self, rows=None, select=None):
        """The same counts, some rows or genes of them, which stay in the file.

        Args:
            rows: indices or mask. select: (G x G'), zeros and ones; as a matrix, so that absent
                genes can become zero.
        """
        own = object.__new__(BackedCounts)
        own.__dict__ |= self.__dict__
        own.blocks = OrderedDict()
        if rows is not None:
            own.file_row, own.library = self.file_row[rows], self.library[rows]
            code = hashlib.blake2b(self.fingerprint.encode(), digest_size=16)
            code.update(own.file_row.astype(np.int64).data)
            own.fingerprint = code.hexdigest()
        if select is not None:
            own.select = select if self.select is None else self.select @ select
        return own

    def sum(self, axis):
        """Total counts, int64: of each gene (G) along axis 0; of each cell (N) along axis 1.

        A cell's are of all genes in the file, as its library size is.
        """
        if axis == 1:
            return self.library
        chunks = np.array_split(np.arange(self.shape[0]), -(-self.shape[0] // 4096))
        return sum(np.asarray(self[rows].sum(axis=0, dtype=np.int64)).ravel() for rows in chunks)

    def shuffled(self, rows, rng):
        """Rows in random order, those of a bufferful of blocks together."""
        number = self.file_row[rows] // BLOCK
        found = np.unique(number)
        if len(found) <= self.n_kept:
            return rng.permutation(rows)
        found = rng.permutation(found)
        starts = range(0, len(found), self.n_kept)
        together = [np.isin(number, found[i : i + self.n_kept]) for i in starts]
        return np.concatenate([rng.permutation(rows[own]) for own in together])


def check_layout(source, where, cells, genes):
    """What must hold before blocks are read from a matrix in a file.

    Raises:
        InputError: it is kept gene by gene, or its index of cells leads astray.
    """
    import h5py

    if source.shape != (len(cells), len(genes)):
        raise InputError(
            f"{where}: found a matrix of {' x '.join(map(str, source.shape))}, expected "
            f"{len(cells)} cells x {len(genes)} genes"
        )
    if isinstance(source, h5py.Dataset):
        datasets, longest = [source], BLOCK * len(genes) * source.dtype.itemsize
    else:
        if source.format != "csr":
            raise InputError(
                f"{where}: --backed reads cell by cell, found a matrix kept gene by gene (CSC); "
                "expected CSR (adata.X = adata.X.tocsr() before writing)"
            )
        datasets = [source.group["data"], source.group["indices"]]
        start = source.group["indptr"][()].astype(np.int64)  # (N + 1)
        sizes = {len(one) for one in datasets}
        if len(start) != len(cells) + 1 or start[0] or (np.diff(start) < 0).any():
            raise InputError(f"{where}: a broken sparse matrix (its cells are not in order)")
        if sizes != {start[-1]}:
            raise InputError(f"{where}: a broken sparse matrix (its cells reach beyond its values)")
        blocks = np.append(start[:-1:BLOCK], start[-1])
        longest = 8 * int(np.diff(blocks).max(initial=0))
    for dataset in datasets:
        if dataset.chunks and np.prod(dataset.chunks) * dataset.dtype.itemsize > BUFFER:
            longest = int(np.prod(dataset.chunks)) * dataset.dtype.itemsize
    if longest > BUFFER:
        raise InputError(
            f"{where}: found {longest / 1e9:.1f} GB that can only be read at once, expected at "
            f"most {BUFFER / 1e9:.1f} GB; written again by anndata it has smaller chunks"
        )


class BackedCells:
    """What the trainings need of an AnnData, the counts of which stay in the file.

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
        """Some cells, or some cells and genes; masks or indices. Their counts stay in the file."""
        rows, genes = which if isinstance(which, tuple) else (which, slice(None))
        select = None
        if not isinstance(genes, slice):
            genes = np.arange(self.n_vars)[genes]
            at = (genes, np.arange(len(genes)))
            ones = np.ones(len(genes), np.int32)
            select = sp.csr_matrix((ones, at), shape=(self.n_vars, len(genes)))
        X = self.X.only(None if isinstance(rows, slice) else rows, select)
        obs = self.obs if isinstance(rows, slice) else self.obs.iloc[np.arange(self.n_obs)[rows]]
        return BackedCells(X, obs.copy(), self.var.iloc[genes].copy(), self.uns)

    def copy(self):
        return self


def read_backed(path):
    """Open an ``.h5ad``; counts are ``layers["counts"]``, else ``X``, else ``raw.X``.

    Returns:
        BackedCells; ``.var["gene_ids"]`` as :func:`readers.counts.read_counts` has it.

    Raises:
        InputError: the file is unreadable or holds no raw counts, kept cell by cell.
    """
    import h5py

    if Path(path).suffix != ".h5ad":
        raise InputError(f"--backed: found {path}, expected an .h5ad file for --data")
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected counts for --data")
    try:
        check_hdf5(path, within=("obs", "var", "raw/var"))
        file = h5py.File(path, "r")
    except InputError:
        raise
    except Exception as error:  # each kind of broken file raises something else
        raise InputError(f"{path}: not a readable .h5ad file ({one_line(error)})") from error
    try:
        return check_cells(open_counts(file, path), path)
    except BaseException:
        file.close()
        raise


def open_counts(file, path):
    """The first matrix of raw counts in an open file, and the tables that belong to it."""
    import h5py
    from anndata.io import read_elem, sparse_dataset

    try:
        obs, var = read_elem(file["obs"]), read_elem(file["var"])
        places = [("layers/counts", "layers['counts']", var), ("X", "X", var)]
        if "raw/X" in file:
            places.append(("raw/X", "raw.X", read_elem(file["raw/var"])))
    except Exception as error:
        raise InputError(f"{path}: not a readable .h5ad file ({one_line(error)})") from error
    problem = None
    for name, shown, genes in places:
        if name not in file:
            continue
        try:
            source = file[name]
            if not isinstance(source, h5py.Dataset):
                source = sparse_dataset(source)
            X = BackedCounts(source, f"{path} ({shown})", obs.index, genes.index)
        except InputError as error:
            problem = problem or error
            continue
        except Exception as error:
            raise InputError(f"{path} ({shown}): not readable ({one_line(error)})") from error
        if name != "X" or problem:
            print(f"{path}: raw counts taken from {shown}")
        genes = pd.DataFrame({"gene_ids": other_names(genes)}, index=genes.index)
        return BackedCells(X, obs, genes)
    raise problem or InputError(f"{path}: found no matrix in it, expected raw counts in X")


def sample_in_memory(cells, codes, rng, what):
    """As many cells as fit into BUFFER, in memory; all of them where they do.

    At random, but of each type at least 500, if there are, so that rare types are not lost.

    Args:
        cells: AnnData, which is returned as it is, or BackedCells. codes: their types (N).
        what: they are for, for the message.

    Returns:
        AnnData, and the positions (n) among all cells, in order.
    """
    import anndata

    every = np.arange(cells.n_obs)
    if not isinstance(cells, BackedCells):
        return cells, every
    most = int(BUFFER / cells.X.cell_bytes)
    rows = every
    if cells.n_obs > most:
        chosen = []
        for k in np.unique(codes):
            own = np.flatnonzero(codes == k)
            n = min(len(own), max(500, round(most * len(own) / cells.n_obs)))
            chosen.append(rng.choice(own, n, replace=False))
        rows = np.sort(np.concatenate(chosen))
        print(f"{what}: from {len(rows):,} of {cells.n_obs:,} cells, drawn at random by type")
    X = cells.X.only()[rows]  # only(), so that no block is kept
    own = anndata.AnnData(X, obs=cells.obs.iloc[rows].copy(), var=cells.var.copy())
    own.uns |= cells.uns
    return own, rows
