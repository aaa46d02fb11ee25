"""Byte-equal tokens of two vocabularies."""

import numpy as np

from gold.align.vocabulary import Int32, Vocabulary


def byte_equal_pairs(student: Vocabulary, teacher: Vocabulary) -> tuple[Int32, Int32]:
    """The ids (ids_V, ids_W) of all tokens with equal bytes, in ascending order of the student's id; no events.

    Where a vocabulary spells the same bytes with several ids, only one of them is paired:
    `Vocabulary.canonical_ids` says which. So every id occurs at most once, and swapping the two sides swaps
    the result.
    """
    ids_V = _by_bytes(student)
    ids_W = _by_bytes(teacher)
    pairs = [(index, ids_W[spelling]) for spelling, index in ids_V.items() if spelling in ids_W]
    table = np.array(sorted(pairs), np.int32).reshape(-1, 2)
    return table[:, 0].copy(), table[:, 1].copy()


def _by_bytes(vocabulary: Vocabulary) -> dict[bytes, int]:
    data, offsets = vocabulary.blob.tobytes(), vocabulary.offsets.tolist()
    own = (vocabulary.canonical_ids() == np.arange(vocabulary.size)) & ~vocabulary.event_V
    return {data[offsets[index] : offsets[index + 1]]: index for index in np.flatnonzero(own).tolist()}
