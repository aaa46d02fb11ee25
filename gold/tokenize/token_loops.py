"""Single passes over the tokens of a text: plain Python, or compiled by numba if it is loaded or the text is long."""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

# Up to this many tokens, Python (some microseconds per token) is faster than importing numba.
_SMALL_TOKENS = 1 << 15


def walk(function: Callable[..., Any], tokens: int) -> Callable[..., Any]:
    """The Python or compiled version of a function below, whichever is faster for this many tokens."""
    return _compiled(function) if tokens > _SMALL_TOKENS or "numba" in sys.modules else function


def fill_ends(ids: Int32, lengths_V: Int32, ends: Int64) -> None:
    """Writes the byte offset at which each token ends; an id beyond `lengths_V` has no bytes."""
    size, total = len(lengths_V), 0
    for i in range(len(ids)):
        if ids[i] < size:
            total += lengths_V[ids[i]]
        ends[i] = total


def fill_bytes(ids: Int32, ends: Int64, offsets: Int64, blob: UInt8, data: UInt8) -> None:
    """Writes the concatenated bytes of the tokens."""
    at = 0
    for i in range(len(ids)):
        if ends[i] > at:
            shift = offsets[ids[i]] - at
            for k in range(at, ends[i]):
                data[k] = blob[shift + k]
            at = ends[i]


def fill_chunks(ends_S: Int64, ends_T: Int64, length: int, chunks: Int32, ends_C: Int64) -> int:
    """Writes the chunks of `gold.align.chunks.Alignment` and returns their number.

    The arrays must have room for one chunk more than the shorter side has tokens; at least one side has a token.
    """
    count_S, count_T = len(ends_S), len(ends_T)
    i = j = count = edge = 0
    chunks[0, 0] = chunks[0, 2] = 0
    # Branch-free in the ends: which side ends first is as good as random, and a misprediction costs more than writing a
    # chunk again.
    while i < count_S and j < count_T:
        end_S, end_T = ends_S[i], ends_T[j]
        i += end_S <= end_T
        j += end_T <= end_S
        # Of tokens that end at the same byte the first ends the chunk; the others, of zero width, begin the next one,
        # or at the end of the text belong to the last one.
        shared = (end_S == end_T) & (end_S > edge) & (end_S < length)
        chunks[count, 1], chunks[count, 3], ends_C[count] = i, j, end_S
        chunks[count + 1, 0], chunks[count + 1, 2] = i, j
        count += shared
        edge = end_S if shared else edge
    chunks[count, 1], chunks[count, 3], ends_C[count] = count_S, count_T, length
    return count + 1


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import numba

    compiled: Callable[..., Any] = numba.njit(nogil=True, cache=True)(function)
    return compiled
