"""The tokens of two vocabularies that have equal bytes."""

from __future__ import annotations

import numpy as np

from gold.tokenize.order import byte_order
from gold.tokenize.vocabulary import Int32, Vocabulary


def byte_equal_pairs(student: Vocabulary, teacher: Vocabulary) -> tuple[Int32, Int32]:
    """The ids (ids_V, ids_W) of all tokens with equal bytes, in ascending order of the student's id; no special tokens.

    If several ids of a vocabulary have the same bytes, only the one in `Vocabulary.canonical_ids` is paired. So every
    id occurs at most once, and swapping the two sides swaps the result.
    """
    ids = np.concatenate((_own_ids(student), _own_ids(teacher) + student.size))
    offsets = np.concatenate((student.offsets, teacher.offsets[1:] + student.offsets[-1]))
    order, repeats = byte_order(ids, offsets, np.concatenate((student.blob, teacher.blob)))
    # Neither side has the same bytes twice, and the student's ids come first.
    second = np.flatnonzero(repeats)
    ids_V, ids_W = order[second - 1], order[second] - np.int32(student.size)
    ascending = np.argsort(ids_V)
    return ids_V[ascending], ids_W[ascending]


def _own_ids(vocabulary: Vocabulary) -> Int32:
    """The text ids, ascending, except those with the bytes of another one."""
    ids = np.arange(vocabulary.size, dtype=np.int32)
    own: Int32 = ids[(vocabulary.canonical_ids() == ids) & ~vocabulary.is_special]
    return own
