"""Seeds, devices, and the way between sparse counts and dense tensors."""

import os
import random

import numpy as np
import scipy.sparse as sp
import torch

from runtime.errors import InputError

# OMP_NUM_THREADS, else one for each core; numba and others change it while the program runs.
N_THREADS = torch.get_num_threads()
# Values in the largest tensor of a training step for each thread. Threads wait for each other
# several times a step, and as long as another program has the core of one of them.
VALUES_PER_THREAD = 1 << 20


def training_threads(n_values):
    """Threads of a training: OMP_NUM_THREADS if it is set, else as many as its tensors keep busy.

    n_values: in the largest tensor of a step.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return N_THREADS
    return min(max(n_values // VALUES_PER_THREAD, 1), N_THREADS)


def seed_everything(seed):
    """Seed Python, NumPy and PyTorch; returns a NumPy generator for the data side."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def pick_device(name):
    """The torch device of a name; ``auto`` is CUDA if there is one, else CPU.

    Raises:
        InputError: torch does not know it, or it is not available here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here, expected auto or cpu") from error
    return device


def in_batches(function, rows, batch_size):
    """Apply a function of rows (B), which returns tensors (B, ...), to all rows (N) in batches.

    Results are written into preallocated tensors (N, ...). A list of small results between large
    temporaries would fragment the heap, by gigabytes after a million cells.
    """
    results, first = None, 0
    for batch in np.array_split(rows, -(-len(rows) // batch_size)):
        parts = function(batch)
        if results is None:
            results = [part.new_empty(len(rows), *part.shape[1:]) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result[first : first + len(batch)] = part
        first += len(batch)
    return results


def to_sparse(X, rows, device):
    """Rows of a count matrix, CSR or backed, as a sparse COO tensor (B, G), float32, on a device.

    Nine counts in ten are zero and need not be sent to a GPU. From pinned memory the others are
    sent while the GPU still works on the previous step.
    """
    counts = X[rows]
    counts.sum_duplicates()  # a matrix may hold several entries of one place
    cell = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    index = torch.from_numpy(np.stack([cell, counts.indices]).astype(np.int64, copy=False))
    values = torch.from_numpy(counts.data.astype(np.float32, copy=False))
    if torch.device(device).type == "cuda":
        index, values = (
            part.pin_memory().to(device, non_blocking=True) for part in (index, values)
        )
    options = {"is_coalesced": True, "check_invariants": False}
    return torch.sparse_coo_tensor(index, values, counts.shape, **options)


def to_csr(counts):
    """Dense whole numbers (B, G) as a CSR matrix of int32.

    Raises:
        InputError: a count is not finite or over 2^31 - 1.
    """
    if not (counts < 2**31).all():
        raise InputError("the decoder draws counts that are not finite or over 2147483647")
    if counts.is_cuda:  # only what is not zero has to travel
        rows = counts.to(torch.int32).to_sparse_csr()
        parts = (rows.values(), rows.col_indices(), rows.crow_indices())
        return sp.csr_matrix(tuple(p.cpu().numpy() for p in parts), shape=tuple(counts.shape))
    return sp.csr_matrix(counts.numpy().astype(np.int32))
