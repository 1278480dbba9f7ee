"""By what a checkpoint knows that data and earlier weights are still the same."""

import hashlib

import numpy as np
import scipy.sparse as sp
import torch

from readers.backed import BackedCounts


def digest(*parts):
    """A fingerprint (hex) of arrays, tensors, sparse matrices and lists or dicts of such.

    By it a checkpoint knows whether the data and the earlier stages are still the same.
    """
    code = hashlib.blake2b(digest_size=16)

    def add(part):
        if isinstance(part, BackedCounts):
            part = part.fingerprint
        if sp.issparse(part):
            part = [part.indptr.astype(np.int64), part.indices.astype(np.int64), part.data]
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().numpy()
        if isinstance(part, dict):
            part = [x for item in part.items() for x in item]
        if isinstance(part, list):
            code.update(f"[{len(part)}]".encode())
            for one in part:
                add(one)
        elif isinstance(part, np.ndarray):
            code.update(f"{part.dtype}{part.shape}".encode())
            code.update(np.ascontiguousarray(part).data)
        else:
            text = str(part).encode("utf-8", "surrogateescape")
            code.update(f"{len(text)}:".encode() + text)

    for part in parts:
        add(part)
    return code.hexdigest()
