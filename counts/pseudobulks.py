"""Sums of cells: pseudobulks of given composition, and batches of a reference."""

import numpy as np
import scipy.sparse as sp

MAX_DENSE = 1 << 27  # counts of a reference that is summed as a dense matrix, half a GB


def draw_pseudobulks(X, codes, proportions, n_cells, rng, pool=None):
    """Sum randomly drawn cells into bulks of given expected composition.

    Cells of a type are drawn with replacement, so a rare type can fill a bulk.

    Args:
        X: counts (N x G), CSR; float32 if called often, as anything else is converted each time.
        codes: cell-type code of each cell (N).
        proportions: expected cell-type proportions of each bulk (n x K), rows summing to 1; a
            type with a positive proportion must have a cell.
        n_cells: cells per bulk (n).
        rng: numpy Generator.
        pool: number of cells of each type that a bulk draws from (n), themselves drawn at random,
            so that its types differ a little from those of the next bulk, as another donor's do.
            Default: all of them.

    Returns:
        ``(bulk, drawn)``: summed counts (n x G), float32, and the proportions of the cells that
        were really drawn (n x K), float32.
    """
    n, K = proportions.shape
    order = np.argsort(codes, kind="stable")
    size = np.bincount(codes, minlength=K)
    start = np.cumsum(size) - size
    drawn = rng.multinomial(n_cells, proportions)  # (n, K) cells of each type
    bulk_of = np.repeat(np.repeat(np.arange(n), K), drawn.ravel())
    type_of = np.repeat(np.tile(np.arange(K), n), drawn.ravel())
    if pool is None:
        within = (rng.random(len(type_of)) * size[type_of]).astype(np.int64)
    else:
        pools = (rng.random((n, K, max(pool))) * size[:, None]).astype(np.int64)
        member = (rng.random(len(type_of)) * np.asarray(pool)[bulk_of]).astype(np.int64)
        within = pools[bulk_of, type_of, member]
    cell = order[start[type_of] + within]
    S = sp.csr_matrix((np.ones(len(cell), np.float32), (bulk_of, cell)), shape=(n, len(codes)))
    bulk = np.asarray((S @ X.astype(np.float32, copy=False)).todense())
    return bulk, (drawn / np.maximum(drawn.sum(axis=1, keepdims=True), 1)).astype(np.float32)


def batch_bulks(X, batch_size, n, rng, part):
    """Sum batches of reference cells into bulks, reshuffling as often as ``n`` bulks need.

    Args:
        X: counts (N x G), CSR. batch_size: cells per bulk, at most N. n: number of bulks.
        part: how many to make at a time, which bounds the memory.

    Yields:
        ``(bulk, members)`` of the next bulks, ``part`` or what is left: summed counts (m x G)
        float32, and the cells of each (m x batch_size).
    """
    per_pass = X.shape[0] // batch_size  # a last, smaller batch is left for the next shuffle
    total = cell_sums(X)
    drawn = np.zeros((0, batch_size), np.int64)
    for first in range(0, n, part):
        m = min(part, n - first)
        n_passes = max(0, -(-(m - len(drawn)) // per_pass))
        orders = (rng.permutation(X.shape[0])[: per_pass * batch_size] for _ in range(n_passes))
        drawn = np.concatenate([drawn, *(order.reshape(per_pass, batch_size) for order in orders)])
        members, drawn = drawn[:m], drawn[m:]
        yield total(members), members


def cell_sums(X):
    """A function that sums cells of a matrix: indices (m x n) -> counts (m x G) float32.

    A reference that is small enough is made dense once, because torch sums dense rows several times
    faster than scipy multiplies sparse matrices. X: counts (N x G), CSR.
    """
    import torch

    X = X.astype(np.float32, copy=False)
    if X.shape[0] * X.shape[1] <= MAX_DENSE:
        dense = torch.from_numpy(X.toarray())
        return lambda members: torch.nn.functional.embedding_bag(
            torch.from_numpy(members), dense, mode="sum"
        ).numpy()

    def total(members):
        index = (np.repeat(np.arange(len(members)), members.shape[1]), members.ravel())
        S = sp.csr_matrix((np.ones(members.size, np.float32), index), (len(members), X.shape[0]))
        return (S @ X).toarray()

    return total


def batch_bulks_of_samples(X, sample, batch_size, n, rng, part):
    """As :func:`batch_bulks`, but all cells of a bulk are of one biological sample.

    Each bulk is of a sample drawn by its number of cells, and its cells are drawn from that sample
    without replacement. sample: of each cell (N); samples of fewer than batch_size cells are not
    drawn.
    """
    total, sizes = cell_sums(X), np.bincount(sample)
    share = np.where(sizes >= batch_size, sizes, 0) / sizes[sizes >= batch_size].sum()
    cells = [np.flatnonzero(sample == s) for s in range(len(sizes))]
    for first in range(0, n, part):
        drawn = rng.choice(len(sizes), min(part, n - first), p=share)
        members = np.stack([rng.choice(cells[s], batch_size, replace=False) for s in drawn])
        yield total(members), members


def draw_test_bulks(X, codes, n_types, n, n_cells, rng):
    """Sums of n_cells cells, proportions from Dirichlet(1): counts (n x G), proportions (n x K).

    A type that has no cell in X (N x G), codes (N), is in no bulk.
    """
    has_cells = np.isin(np.arange(n_types), codes)
    expected = np.zeros((n, n_types))
    expected[:, has_cells] = rng.dirichlet(np.ones(has_cells.sum()), n)
    return draw_pseudobulks(X, codes, expected, n_cells, rng)
