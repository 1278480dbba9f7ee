"""The lines of a Matrix Market file, some cells at a time."""

import io

import numpy as np
import scipy.io
import scipy.sparse as sp


def lines(indptr, indices, data, first):
    """A line "gene cell count" for each count, genes and cells numbered from 1, as bytes.

    Args:
        indptr (B + 1), indices, data: of CSR counts (B x G); indptr may start within the others.
        first: number of the first cell, from 0.
    """
    part = slice(indptr[0], indptr[-1])
    cell = first + np.repeat(np.arange(len(indptr) - 1, dtype=np.int64), np.diff(indptr))
    gene, text = indices[part].astype(np.int64), io.BytesIO()
    shape = gene.max(initial=0) + 1, cell.max(initial=0) + 1
    entries = sp.coo_array((data[part], (gene, cell)), shape)
    scipy.io.mmwrite(text, entries, symmetry="general")
    size = f"\n{shape[0]} {shape[1]} {entries.nnz}\n".encode()  # the last line of the header
    return text.getvalue().partition(size)[2]
