"""The maps between two vocabularies: tokens of equal bytes, and for each token of one the longest of the other that
begins it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gold.tokenize.cache import cached_ids
from gold.tokenize.order import byte_order
from gold.tokenize.vocabulary import Int32, Vocabulary

# Raised when other maps follow from the same two vocabularies: no file of an older rule is read then.
_VERSION = 1


def byte_equal_pairs(student: Vocabulary, teacher: Vocabulary) -> tuple[Int32, Int32]:
    """The ids (ids_V, ids_W) of all tokens with equal bytes, in ascending order of the student's id; no events.

    Where a vocabulary spells the same bytes with several ids, only one of them is paired:
    `Vocabulary.canonical_ids` says which. So every id occurs at most once, and swapping the two sides swaps
    the result.
    """
    ids = np.concatenate((_own_ids(student), _own_ids(teacher) + student.size))
    offsets = np.concatenate((student.offsets, teacher.offsets[1:] + student.offsets[-1]))
    order, repeats = byte_order(ids, offsets, np.concatenate((student.blob, teacher.blob)))
    # No side has the same bytes twice, and the student's ids are given first.
    second = np.flatnonzero(repeats)
    ids_V, ids_W = order[second - 1], order[second] - np.int32(student.size)
    ascending = np.argsort(ids_V)
    return ids_V[ascending], ids_W[ascending]


@dataclass(frozen=True, eq=False)
class PrefixMap:
    """φ(w): for every teacher token w the longest student token that its bytes begin with, as index arrays.

    `ids_W[w]` is φ(w), −1 for events and where no student token begins w; of ids with equal bytes it is the canonical
    one. `prefix_bytes_W[w]` is the length of φ(w), 0 for none, and `rest_bytes_W[w]` that of what it leaves of w.
    """

    ids_W: Int32
    prefix_bytes_W: Int32
    rest_bytes_W: Int32


def longest_prefixes(student: Vocabulary, teacher: Vocabulary) -> PrefixMap:
    """φ from the teacher's vocabulary to the student's; with the sides swapped, the reverse.

    It is kept in the cache folder (`gold.tokenize.cache`), under both fingerprints. Of ids with equal bytes
    `Vocabulary.canonical_ids` is asked each time: it follows from more than the bytes.
    """

    def build() -> Int32:
        from gold.bytes.plan import ByteTrie  # numba: half a second

        return ByteTrie.of(student).longest_tokens(teacher.offsets, teacher.blob)

    content = f"longest prefixes {_VERSION} {student.fingerprint} {teacher.fingerprint}"
    lowest_at = cached_ids(content, len(teacher.blob), build)
    none = np.int32(-1)
    lowest_W = np.append(lowest_at, none)[np.where(teacher.is_special, none, teacher.offsets[:-1])]
    ids_W = np.append(student.canonical_ids(), none)[lowest_W]
    prefix_bytes_W = np.append(_lengths(student), np.int32(0))[ids_W]
    return PrefixMap(ids_W, prefix_bytes_W, _lengths(teacher) - prefix_bytes_W)


def _own_ids(vocabulary: Vocabulary) -> Int32:
    """The text ids less those that have the bytes of another one, ascending."""
    ids = np.arange(vocabulary.size, dtype=np.int32)
    own: Int32 = ids[(vocabulary.canonical_ids() == ids) & ~vocabulary.is_special]
    return own


def _lengths(vocabulary: Vocabulary) -> Int32:
    return np.diff(vocabulary.offsets).astype(np.int32)
