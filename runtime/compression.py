"""Compression in threads, while the next cells are drawn: chunks of HDF5 datasets, members of .gz.

Both are made by zlib-ng, in the formats of zlib, which every reader takes.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from scipy.special import entr
from zlib_ng import zlib_ng

N_THREADS = 4  # as many as compress what thirty cores draw
LEVEL = 2  # the fastest with codes made for the data
RAW = -zlib_ng.MAX_WBITS  # deflate without a header
ZLIB_HEADER = b"\x78\x01"  # of a deflate stream with the largest window
SAMPLE = 4096  # bytes of a chunk whose entropy is taken
ROUNDED = 12  # bits of mantissa that are kept beside the first, an error of 0.01 %
INCOMPRESSIBLE = 7.5  # bits of entropy a byte, from which codes save less than they take


class CompressionQueue:
    """Threads that compress, and a queue of what is to be written, in the order it was given.

    Writing is left to the caller's thread: HDF5 takes one at a time, and that is where errors of
    the disk belong.
    """

    def __init__(self):
        self.pool, self.waiting = ThreadPoolExecutor(N_THREADS), deque()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown(cancel_futures=True)

    def __len__(self):
        return len(self.waiting)

    def add(self, write, compress, *arguments):
        """Start ``compress(*arguments)``; what it returns is for ``write``."""
        self.waiting.append((write, self.pool.submit(compress, *arguments)))

    def write(self, n):
        """Write the n that have waited longest."""
        for _ in range(n):
            write, compressed = self.waiting.popleft()
            write(compressed.result())


class GrowingDataset:
    """Whole numbers of 0 or more, added to the end of an HDF5 dataset of one dimension.

    Its filters, shuffle and gzip, are applied by the threads of a queue in place of HDF5.
    """

    def __init__(self, dataset, queue):
        self.dataset, self.queue = dataset, queue
        self.rest = dataset[:]  # of the last chunk, which is not full yet
        self.start = 0  # of that chunk

    def append(self, values):
        """Add values (n); they are written chunk by chunk, by the queue."""
        (size,) = self.dataset.chunks
        cut = size - len(self.rest)
        first = np.concatenate([self.rest, values[:cut]])
        *full, rest = first, *(values[i : i + size] for i in range(cut, len(values), size))
        for part in full:
            self.add_chunk(part)
        self.rest = rest.copy()  # a view would keep all values in memory
        self.dataset.resize((self.start + len(rest),))

    def finish(self):
        """Hand the last chunk to the queue."""
        if len(self.rest):
            self.add_chunk(self.rest)

    def add_chunk(self, values):
        """Hand one chunk to the queue."""
        write = partial(self.dataset.id.write_direct_chunk, (self.start,))
        self.queue.add(write, packed_chunk, values, self.dataset.dtype, *self.dataset.chunks)
        self.start += len(values)


def packed_chunk(values, dtype, size):
    """Values (n) of 0 or more, as HDF5 stores a chunk of ``size`` of ``dtype``: shuffled, zlib."""
    planes = np.zeros((dtype.itemsize, size), np.uint8)  # first the lowest byte of each number
    for i in range((int(values.max()).bit_length() + 7) // 8):
        planes[i, : len(values)] = values >> 8 * i
    low = packed_low_bytes(planes[0], len(values))
    high = packed(planes[1:], RAW, zlib_ng.Z_RLE)  # these repeat in runs if at all
    return ZLIB_HEADER + low + high + zlib_ng.adler32(planes).to_bytes(4, "big")


def packed_low_bytes(low, n):
    """Lowest bytes (size), of which n are of values: the beginning of a raw deflate stream."""
    # They hardly repeat, so codes without a search for repeats take half the time. Those of gene
    # numbers and offsets are all equally likely: no code saves anything.
    sample = low[: min(n, SAMPLE)]
    bits = entr(np.bincount(sample) / len(sample)).sum() / np.log(2)
    level = LEVEL if bits < INCOMPRESSIBLE else 0
    stream = zlib_ng.compressobj(level, zlib_ng.DEFLATED, RAW, 9, zlib_ng.Z_HUFFMAN_ONLY)
    return stream.compress(low) + stream.flush(zlib_ng.Z_SYNC_FLUSH)  # at a whole byte, not its end


def packed_floats(values, size):
    """float32 (n), rounded to ROUNDED bits of mantissa, as HDF5 stores a chunk of ``size``."""
    bits = values.view(np.uint32)
    half = np.uint32(1 << (22 - ROUNDED))
    bits = (bits + half) & ~np.uint32(2 * half - 1)  # a carry moves on to the exponent, as it must
    planes = np.zeros((4, size), np.uint8)
    planes[:, : len(values)] = bits.view(np.uint8).reshape(-1, 4).T
    return packed(planes, zlib_ng.MAX_WBITS, zlib_ng.Z_RLE)


def packed_text(text):
    """Text as a member of a .gz, without a time so that the same text gives the same bytes."""
    return packed(text, zlib_ng.MAX_WBITS + 16)


def packed(data, wbits, strategy=zlib_ng.Z_DEFAULT_STRATEGY):
    """Data in one piece, in the format that ``wbits`` stands for in zlib."""
    # With the most memory, 9, half as many codes are made as by default.
    stream = zlib_ng.compressobj(LEVEL, zlib_ng.DEFLATED, wbits, 9, strategy)
    return stream.compress(data) + stream.flush()
