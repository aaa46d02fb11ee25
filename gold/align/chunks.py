"""The finest cut of one text that two tokenizers both respect."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from gold.align.vocabulary import Spelling
from gold.errors import DataError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

# Up to this many tokens the walk costs less in Python than importing numba for it.
_SMALL_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class Alignment:
    """The chunks of one text: cells of the finest partition of its bytes whose edges both tokenizers share.

    `chunks[c]` is (s0, s1, t0, t1): student tokens [s0, s1) and teacher tokens [t0, t1) spell the same bytes,
    which end before byte `ends_C[c]`. `chunk_S[i]` and `chunk_T[j]` are the chunk of a token; every token is
    in exactly one.
    """

    chunks: Int32
    ends_C: Int64
    chunk_S: Int32
    chunk_T: Int32

    def __len__(self) -> int:
        return len(self.chunks)

    @property
    def starts_C(self) -> Int64:
        """The byte at which each chunk begins."""
        return np.concatenate(([0], self.ends_C[:-1])) if len(self.ends_C) else self.ends_C

    @property
    def one_to_one_C(self) -> npt.NDArray[np.bool_]:
        """Whether a chunk is one token on both sides."""
        s0, s1, t0, t1 = self.chunks.T
        ones: npt.NDArray[np.bool_] = (s1 - s0 == 1) & (t1 - t0 == 1)
        return ones


@dataclass(frozen=True)
class Coverage:
    """How finely two tokenizers agree on one text; the shares are in [0, 1], and 0 for an empty text."""

    chunks: int
    one_to_one_chunks: int
    student_tokens: float
    teacher_tokens: float
    bytes: float
    largest_chunk_bytes: int
    largest_chunk_tokens: int


def align_tokens(student: Spelling, teacher: Spelling) -> Alignment:
    """The chunks of a text that the student and the teacher spell.

        edges = {0, len} | (set(student.ends) & set(teacher.ends))

    A token of zero width belongs to the chunk that starts at its offset, at the end of the text to the last
    one. An empty text is one chunk if it has any token (events), else none.

    Raises: DataError if the two sides spell different bytes.
    """
    if student.data != teacher.data:
        at = _first_difference(student.data, teacher.data)
        raise DataError(
            f"student and teacher spell different texts: {len(student.data)} and {len(teacher.data)} bytes, "
            f"first difference at byte {at}; encode the bytes that the student spelled"
        )
    count_S, count_T = len(student.ids), len(teacher.ids)
    compiled = "numba" in sys.modules or count_S + count_T > _SMALL_TOKENS
    cut = _compiled_cut() if compiled else _cut
    chunks = np.empty((min(count_S, count_T) + 1, 4), np.int32)
    ends_C = np.empty(len(chunks), np.int64)
    chunk_S, chunk_T = np.empty(count_S, np.int32), np.empty(count_T, np.int32)
    count = cut(student.ends, teacher.ends, len(student.data), chunks, ends_C, chunk_S, chunk_T)
    return Alignment(chunks[:count], ends_C[:count], chunk_S, chunk_T)


def coverage(student: Spelling, teacher: Spelling, alignment: Alignment) -> Coverage:
    """The shares of tokens and bytes that lie in chunks of one token on both sides."""
    ones = alignment.one_to_one_C
    widths = alignment.ends_C - alignment.starts_C
    tokens = (alignment.chunks[:, 1::2] - alignment.chunks[:, 0::2]).sum(axis=1)
    count = int(ones.sum())
    return Coverage(
        chunks=len(alignment),
        one_to_one_chunks=count,
        student_tokens=count / max(len(student.ids), 1),
        teacher_tokens=count / max(len(teacher.ids), 1),
        bytes=float(widths[ones].sum()) / max(len(student.data), 1),
        largest_chunk_bytes=int(widths.max(initial=0)),
        largest_chunk_tokens=int(tokens.max(initial=0)),
    )


def _cut(
    ends_S: Int64,
    ends_T: Int64,
    length: int,
    chunks: Int32,
    ends_C: Int64,
    chunk_S: Int32,
    chunk_T: Int32,
) -> int:
    count_S, count_T = len(ends_S), len(ends_T)
    if count_S + count_T == 0:
        return 0
    i = j = edge = count = 0
    while True:
        first_i, first_j = i, j
        # Tokens of zero width at the chunk's start end where it begins, and that is no edge of it. Those of the other
        # side are passed over below, as ends before this one.
        while i < count_S and ends_S[i] <= edge:
            i += 1
        while i < count_S and j < count_T and ends_S[i] != ends_T[j]:
            if ends_S[i] < ends_T[j]:
                i += 1
            else:
                j += 1
        if i < count_S and j < count_T and ends_S[i] < length:
            edge = ends_S[i]
            i += 1
            j += 1
        else:
            edge, i, j = length, count_S, count_T
        chunks[count, 0] = first_i
        chunks[count, 1] = i
        chunks[count, 2] = first_j
        chunks[count, 3] = j
        ends_C[count] = edge
        for k in range(first_i, i):
            chunk_S[k] = count
        for k in range(first_j, j):
            chunk_T[k] = count
        count += 1
        if edge == length:
            return count


@cache
def _compiled_cut() -> Callable[..., int]:
    import numba  # half a second: short texts never need it

    compiled: Callable[..., int] = numba.njit(nogil=True, cache=True)(_cut)
    return compiled


def _first_difference(a: bytes, b: bytes) -> int:
    short = min(len(a), len(b))
    differs = np.flatnonzero(np.frombuffer(a[:short], np.uint8) != np.frombuffer(b[:short], np.uint8))
    return int(differs[0]) if len(differs) else short
