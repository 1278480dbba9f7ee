"""Fingerprints of data and weights, by which a resumed run checks that they have not changed."""

import hashlib

import numpy as np
import scipy.sparse as sp
import torch

from readers.backed import BackedCounts


def digest(*parts):
    """Hash (hex) of arrays, tensors, sparse or backed matrices, and lists and dicts of them."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        update(hasher, part)
    return hasher.hexdigest()


def update(hasher, part):
    """Add one part to a hash, with its type and length so that no two inputs look the same."""
    if isinstance(part, BackedCounts):
        part = part.fingerprint
    if sp.issparse(part):
        part = [part.indptr.astype(np.int64), part.indices.astype(np.int64), part.data]
    if isinstance(part, torch.Tensor):
        part = part.detach().cpu().numpy()
    if isinstance(part, dict):
        part = [x for item in part.items() for x in item]
    if isinstance(part, list):
        hasher.update(f"[{len(part)}]".encode())
        for element in part:
            update(hasher, element)
    elif isinstance(part, np.ndarray):
        hasher.update(f"{part.dtype}{part.shape}".encode())
        hasher.update(np.ascontiguousarray(part).data)
    else:
        text = str(part).encode("utf-8", "surrogateescape")
        hasher.update(f"{len(text)}:".encode() + text)
