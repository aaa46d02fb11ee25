"""The finest partition of one text into chunks, by the token boundaries that two tokenizers share."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from gold.errors import DataError
from gold.tokenize.token_loops import Int32, Int64, fill_chunks, walk
from gold.tokenize.vocabulary import TokenizedText


@dataclass(frozen=True, eq=False)
class Alignment:
    """The chunks of one text: cells of the finest partition of its bytes by boundaries that both tokenizers share.

    `chunks[c]` is (s0, s1, t0, t1): student tokens [s0, s1) and teacher tokens [t0, t1) have the same bytes, which end
    before byte `ends_C[c]`. Every token is in exactly one chunk.
    """

    chunks: Int32
    ends_C: Int64

    def __len__(self) -> int:
        return len(self.chunks)

    @cached_property
    def chunk_S(self) -> Int32:
        """The chunk of each student token."""
        return _owners(self.chunks[:, 0:2])

    @cached_property
    def chunk_T(self) -> Int32:
        """The chunk of each teacher token."""
        return _owners(self.chunks[:, 2:4])

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
    """How finely two tokenizations of one text agree; the shares are in [0, 1], and 0 for an empty text."""

    chunks: int
    one_to_one_chunks: int
    student_tokens: float
    teacher_tokens: float
    bytes: float
    largest_chunk_bytes: int
    largest_chunk_tokens: int


def align_tokens(student: TokenizedText, teacher: TokenizedText) -> Alignment:
    """The chunks of a text tokenized by the student and the teacher.

        edges = {0, len} | (set(student.ends) & set(teacher.ends))

    A token of zero width belongs to the chunk that starts at its offset, at the end of the text to the last one. An
    empty text is one chunk if it has any token (special tokens), else none.

    Raises: DataError if the bytes of the two sides differ.
    """
    if student.data != teacher.data:
        at = _first_difference(student.data, teacher.data)
        raise DataError(
            f"the tokens of student and teacher have different bytes: {len(student.data)} and {len(teacher.data)}, "
            f"first difference at byte {at}; encode the bytes that the student spelled"
        )
    return chunks_of(student.ends, teacher.ends, len(student.data))


def chunks_of(ends_S: Int64, ends_T: Int64, length: int) -> Alignment:
    """The chunks of a text of `length` bytes from the token ends of both sides, as in `align_tokens`."""
    count_S, count_T = len(ends_S), len(ends_T)
    chunks = np.empty((min(count_S, count_T) + 1, 4), np.int32)
    ends_C = np.empty(len(chunks), np.int64)
    count = 0
    if count_S + count_T:
        count = walk(fill_chunks, count_S + count_T)(ends_S, ends_T, length, chunks, ends_C)
    return Alignment(chunks[:count], ends_C[:count])


def coverage(student: TokenizedText, teacher: TokenizedText, alignment: Alignment) -> Coverage:
    """The shares of tokens and bytes in one-to-one chunks."""
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


def _owners(ranges: Int32) -> Int32:
    return np.repeat(np.arange(len(ranges), dtype=np.int32), ranges[:, 1] - ranges[:, 0])


def _first_difference(a: bytes, b: bytes) -> int:
    short = min(len(a), len(b))
    differs = np.flatnonzero(np.frombuffer(a[:short], np.uint8) != np.frombuffer(b[:short], np.uint8))
    return int(differs[0]) if len(differs) else short
