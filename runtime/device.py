"""Seeds, devices, and the way between sparse counts and dense tensors."""

import random

import numpy as np
import scipy.sparse as sp
import torch

from runtime.errors import InputError


def seed_everything(seed):
    """Seed Python, NumPy and PyTorch; returns a NumPy generator for the data side."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def pick_device(name):
    """``auto`` is CUDA if there is one, else CPU; anything else is taken as torch names it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here, expected auto or cpu") from error
    return device


def in_batches(function, rows, batch_size):
    """What a function of rows (N) returns, a tuple of tensors (B, ...), for all of them (N, ...).

    Put into their places at once: small results kept one by one between large tensors that come and
    go leave the memory in pieces too small for these, gigabytes of them after a million cells.
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


def to_dense(X, rows, device):
    """Rows of a CSR count matrix as a float32 tensor (B, G); the only place sparse ends."""
    own = X[rows]
    if torch.device(device).type != "cuda":
        return torch.from_numpy(own.astype(np.float32).toarray()).to(device)
    return from_csr(own, device)


def from_csr(X, device):
    """A CSR count matrix as a float32 tensor (B, G), made dense on the device.

    Nine counts in ten are zero, which need not be sent to a GPU; from pinned memory the rest is
    sent while the GPU is still at work on the step before.
    """

    def send(part):
        part = torch.from_numpy(part)
        pinned = part.pin_memory() if torch.device(device).type == "cuda" else part
        return pinned.to(device, non_blocking=True)

    at = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr)) * X.shape[1] + X.indices
    flat = torch.zeros(X.shape[0] * X.shape[1], device=device)
    # Added, not put: a matrix may hold several entries of one place.
    return flat.index_add_(0, send(at), send(X.data).float()).view(X.shape)


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
