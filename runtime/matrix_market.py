"""The lines of a Matrix Market file, formatted by compiled code that runs beside other threads."""

import numpy as np
from numba import njit

from runtime.sampler import LOOP

u8, u32 = np.uint8, np.uint32
NEWLINE, SPACE = ord("\n"), ord(" ")


@njit(**LOOP)
def write_number(text, end, number, after):
    """Write a whole number of 0 or more, and a character after it, so that they end at ``end``.

    Returns where they start. text: uint8. number: uint32, whose division is the fastest.
    """
    end -= 1
    text[end] = after
    while True:  # the last digit first
        end -= 1
        tenth = number // u32(10)
        text[end] = u8(u32(48) + number - u32(10) * tenth)
        number = tenth
        if number == u32(0):
            return end


@njit(**LOOP)
def write_lines(text, indptr, indices, data, first):
    """Write the lines of :func:`lines` so that they end with the text; returns where they start."""
    end = text.size
    for i in range(indptr.size - 2, -1, -1):
        for e in range(indptr[i + 1] - 1, indptr[i] - 1, -1):
            end = write_number(text, end, u32(data[e]), NEWLINE)
            end = write_number(text, end, u32(first + i + 1), SPACE)
            end = write_number(text, end, u32(indices[e] + 1), SPACE)
    return end


def lines(indptr, indices, data, first):
    """A line "gene cell count" for each count, genes and cells numbered from 1, as uint8.

    Args:
        indptr (B + 1), indices, data: of CSR counts (B x G); indptr may start within the others.
        first: number of the first cell, from 0.
    """
    indptr = indptr.astype(np.int64)
    part = slice(indptr[0], indptr[-1])
    greatest = indices[part].max(initial=0) + 1, first + len(indptr) - 1, data[part].max(initial=0)
    width = sum(len(f"{number} ") for number in greatest)
    text = np.empty(width * (part.stop - part.start), np.uint8)
    return text[write_lines(text, indptr, indices, data, first) :]
