"""Generated cells written block by block: as .h5ad, as a 10x folder, or as a 10x .h5.

All three appear whole or not at all, and hold two blocks and the tables in memory: while one is
drawn, threads compress the one before.
"""

import contextlib
import gzip
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from runtime.errors import InputError
from runtime.signals import Stopped
from runtime.version import VERSION
from runtime.writing import open_hdf5, whole_file, write_anndata

# On disk, of generated cells; measured on .h5ad by weights, weights/pbmc and weights/pbmc1k: 1.3 to
# 1.4 for each count that is not zero, 230 and more for each cell. 10x folders take more.
BYTES_PER_COUNT, BYTES_PER_CELL = 1.0, 100

# With bytes shuffled, a fast gzip packs tighter than the default does without.
COMPRESSION = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
CHUNK = 1 << 17  # numbers that are compressed together; each chunk costs a few writes and locks
CELLS = 64  # whose lines of a 10x folder are compressed together

FOLDER_FILES = ("matrix.mtx.gz", "barcodes.tsv.gz", "features.tsv.gz")
FEATURE_TYPE = "Gene Expression"


def kind_of(path):
    """What a path of cells is to be: ``h5ad``, ``h5`` or ``folder``; None for other endings."""
    path = Path(path)
    if path.suffix in (".h5ad", ".h5"):
        return path.suffix[1:]
    return "folder" if path.is_dir() or not path.suffix else None


def check_space(path, n_cells, counts):
    """Raise InputError unless the disk can hold a file of cells, by a lower bound of its size.

    Args:
        path: of the file. n_cells: that it will hold. counts: CSR, of the first of them.
    """
    size = BYTES_PER_CELL + BYTES_PER_COUNT * counts.nnz / max(counts.shape[0], 1)
    expected = n_cells * size / 2  # half, as later cells may have fewer counts than the first
    folder = next(parent for parent in Path(path).absolute().parents if parent.is_dir())
    found = shutil.disk_usage(folder).free
    if found < expected:
        raise InputError(
            f"{path}: found {found / 1e6:,.1f} MB of free space, expected at least "
            f"{expected / 1e6:,.1f} MB for {n_cells:,} cells; what was there before is untouched"
        )


@contextlib.contextmanager
def open_cells(path, genes, gene_ids=None, n_cells=None):
    """Yield a writer of cells; what it writes appears whole at ``path`` or not at all.

    The writer has ``append(counts)``, CSR int32 (B x G) of the next cells, and at the end
    ``write_tables(cells)``, an AnnData of all cells without counts. Signals wait for the end of a
    block.

    Args:
        path: an .h5ad, a 10x .h5, or a folder. genes: names (G). gene_ids: their Ensembl ids (G),
            "" where there is none. n_cells: that will be written, if it is known, to check the free
            space before the first block.
    """
    from runtime.compression import CompressionQueue

    path = Path(path)
    gene_ids = [""] * len(genes) if gene_ids is None else list(gene_ids)
    if kind_of(path) == "folder":
        with open_folder(path) as files, CompressionQueue() as queue:
            yield FolderWriter(path, n_cells, queue, genes, gene_ids, *files)
        return
    writer = H5adWriter if path.suffix == ".h5ad" else TenxWriter
    with open_hdf5(path) as (file, sink, signals), CompressionQueue() as queue:
        yield writer(path, n_cells, queue, genes, gene_ids, file, sink, signals)


@contextlib.contextmanager
def open_tables(path, table, names, rows):
    """Yield a function that writes the next rows of dense float32 tables into an .h5ad.

    Args:
        path: of the file, which appears whole or not at all. table: AnnData (N x G) without X.
            names: of the tables in the file: ``X``, ``layers/...``. rows: of a chunk; as many, or a
            multiple, are to be written at a time.
    """
    from runtime.compression import CompressionQueue, packed_floats

    shape, chunk = table.shape, (rows, table.n_vars)
    with open_hdf5(path) as (file, sink, signals), CompressionQueue() as queue:
        write_anndata(file, table, compression="gzip")
        file.pop("X", None)
        options = COMPRESSION | {"dtype": np.float32, "chunks": chunk}
        tables = [file.create_dataset(name, shape, **options) for name in names]
        for dataset in tables:
            dataset.attrs["encoding-type"], dataset.attrs["encoding-version"] = "array", "0.2.0"
        first = 0

        def write(values):
            nonlocal first
            n_before = len(queue)
            for start in range(0, len(values[0]), rows):
                for dataset, x in zip(tables, values, strict=True):
                    add = partial(dataset.id.write_direct_chunk, (first + start, 0))
                    x = np.ascontiguousarray(x[start : start + rows], np.float32).ravel()
                    queue.add(add, packed_floats, x, rows * shape[1])
            first += len(values[0])
            queue.write(n_before)  # the part before, while threads compress this one
            sink.check()
            if signals:
                raise Stopped(signals[0])

        yield write
        queue.write(len(queue))
        sink.check()


@contextlib.contextmanager
def open_folder(path):
    """Yield three binary files for FOLDER_FILES, which move into a folder when all are written."""
    is_new = not path.exists()
    try:
        with contextlib.ExitStack() as stack:
            names = [stack.enter_context(whole_file(path / name)) for name in FOLDER_FILES]
            yield [stack.enter_context(open(name, "rb+")) for name in names]
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # something else may be in it by now
                path.rmdir()
        raise


class CellsWriter:
    """What the three formats share: free space is looked at first, and threads compress blocks."""

    def __init__(self, path, n_cells, queue):
        self.path, self.n_cells, self.queue = path, n_cells, queue
        self.n_written = self.n_counts = 0

    def append(self, counts):
        """Write the counts (B x G), CSR int32, of the next cells."""
        if self.n_cells is not None and not self.n_written:
            check_space(self.path, self.n_cells, counts)
        n_before = len(self.queue)
        self.compress(counts)
        self.queue.write(n_before)  # the block before, while threads compress this one
        self.n_written += counts.shape[0]
        self.n_counts += counts.nnz


class HDF5Writer(CellsWriter):
    """A file in HDF5: errors of the disk and signals are raised between blocks."""

    def __init__(self, path, n_cells, queue, file, sink, signals):
        super().__init__(path, n_cells, queue)
        self.file, self.sink, self.signals = file, sink, signals

    def append(self, counts):
        super().append(counts)
        self.sink.check()
        if self.signals:
            raise Stopped(self.signals[0])

    def start_matrix(self, group):
        """Begin with what is in ``data``, ``indices`` and ``indptr`` of a group."""
        from runtime.compression import GrowingDataset

        names = ("data", "indices", "indptr")
        self.matrix = [GrowingDataset(group[name], self.queue) for name in names]

    def compress(self, counts):
        indptr = counts.indptr[1:] + np.int64(self.n_counts)
        for dataset, values in zip(self.matrix, (counts.data, counts.indices, indptr), strict=True):
            dataset.append(values)

    def finish_matrix(self):
        """Write what is left of the counts."""
        for dataset in self.matrix:
            dataset.finish()
        self.queue.write(len(self.queue))
        self.sink.check()


class H5adWriter(HDF5Writer):
    """An .h5ad: counts in X, as ``uns["X_name"]`` says."""

    def __init__(self, path, n_cells, queue, genes, gene_ids, file, sink, signals):
        import anndata

        super().__init__(path, n_cells, queue, file, sink, signals)
        var = pd.DataFrame({"gene_ids": gene_ids, "feature_types": FEATURE_TYPE}, index=genes)
        var["feature_types"] = var["feature_types"].astype("category")
        self.n_genes = len(genes)
        empty = sp.csr_matrix((0, self.n_genes), dtype=np.int32)
        write_anndata(file, anndata.AnnData(empty, var=var))
        # A million cells have more than 2^31 counts. scipy wants both indices of one type.
        is_large = n_cells is None or n_cells * self.n_genes >= 2**31
        index = np.int64 if is_large else np.int32
        empty.indices, empty.indptr = empty.indices.astype(index), empty.indptr.astype(index)
        options = COMPRESSION | {"chunks": (CHUNK,), "indptr_dtype": index}
        anndata.io.write_elem(file, "X", empty, dataset_kwargs=options)
        sink.check()
        self.start_matrix(file["X"])

    def write_tables(self, cells):
        """Write ``.obs``, ``.obsm`` and ``.uns`` of an AnnData of all cells without counts."""
        import anndata

        self.finish_matrix()
        self.file["X"].attrs["shape"] = self.n_written, self.n_genes
        for name in ("obs", "obsm", "uns"):
            table = getattr(cells, name)
            anndata.io.write_elem(self.file, name, table if name == "obs" else dict(table))
            self.sink.check()


class TenxWriter(HDF5Writer):
    """A 10x .h5 as Cell Ranger 3 and later write it: genes x cells, CSC."""

    def __init__(self, path, n_cells, queue, genes, gene_ids, file, sink, signals):
        super().__init__(path, n_cells, queue, file, sink, signals)
        file.attrs["filetype"], file.attrs["version"] = "matrix", 2
        file.attrs["software_version"] = f"bulk2sc {VERSION}"
        self.group, self.n_genes = file.create_group("matrix"), len(genes)
        columns = {
            "id": [i or gene for gene, i in zip(genes, gene_ids, strict=True)],
            "name": genes,
            "feature_type": [FEATURE_TYPE] * len(genes),
            "genome": [""] * len(genes),
        }
        for name, values in columns.items():
            self.group[f"features/{name}"] = encoded(values)
        self.group["features/_all_tag_keys"] = encoded(["genome"])
        options = COMPRESSION | {"maxshape": (None,), "chunks": (CHUNK,)}
        for name, dtype in (("data", np.int32), ("indices", np.int64), ("indptr", np.int64)):
            self.group.create_dataset(name, shape=(name == "indptr",), dtype=dtype, **options)
        self.start_matrix(self.group)

    def write_tables(self, cells):
        """Write the names of all cells."""
        self.finish_matrix()
        self.group["barcodes"] = encoded(cells.obs_names)
        self.group["shape"] = np.array([self.n_genes, len(cells.obs_names)], np.int32)
        self.sink.check()


def encoded(names):
    """Names as fixed bytes, the way Cell Ranger writes them."""
    return np.array([str(name).encode() for name in names], dtype="S")


class FolderWriter(CellsWriter):
    """A 10x folder as Cell Ranger 3 and later write it: matrix, barcodes and features."""

    HEADER = 200  # bytes before the first count

    def __init__(self, path, n_cells, queue, genes, gene_ids, matrix, barcodes, features):
        from runtime.compression import packed_text

        super().__init__(path, n_cells, queue)
        self.matrix, self.barcodes, self.n_genes = matrix, barcodes, len(genes)
        rows = zip(genes, gene_ids, strict=True)
        text = "".join(f"{i or gene}\t{gene}\t{FEATURE_TYPE}\n" for gene, i in rows)
        features.write(packed_text(text.encode()))
        matrix.write(self.header())  # again at the end, when the number of counts is known

    def header(self):
        """The first lines of the matrix, always of the same length."""
        size = f"{self.n_genes} {self.n_written} {self.n_counts}\n"
        first = f"%%MatrixMarket matrix coordinate integer general\n%generated by bulk2sc {VERSION}"
        text = f"{first:{self.HEADER - 1 - len(size)}}\n{size}"
        return gzip.compress(text.encode(), compresslevel=0, mtime=0)

    def compress(self, counts):
        for i in range(0, counts.shape[0], CELLS):  # sorted by cell, as Cell Ranger sorts them
            indptr = counts.indptr[i : i + CELLS + 1]
            cells = indptr, counts.indices, counts.data, self.n_written + i
            self.queue.add(self.matrix.write, packed_lines, *cells)

    def write_tables(self, cells):
        """Write the names of all cells, and how many counts there are."""
        from runtime.compression import packed_text

        names = "".join(f"{name}\n" for name in cells.obs_names)
        self.barcodes.write(packed_text(names.encode()))
        self.queue.write(len(self.queue))
        self.matrix.seek(0)
        self.matrix.write(self.header())


def packed_lines(*cells):
    """Counts of cells as lines of a matrix, gzipped; see :func:`matrix_market.lines`."""
    from runtime.compression import packed_text
    from runtime.matrix_market import lines

    return packed_text(lines(*cells))
