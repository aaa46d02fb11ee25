"""The map from the tokens of one vocabulary to their longest prefixes among the tokens of another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gold.bytes.trie import ByteTrie, Int32
from gold.tokenize.cache import cached_ids
from gold.tokenize.vocabulary import Vocabulary

# Increment when the same two vocabularies yield other maps: it invalidates cached files.
_VERSION = 1


@dataclass(frozen=True, eq=False)
class PrefixMap:
    """φ(w): for every teacher token w its longest prefix that is a student token, as index arrays.

    `ids_W[w]` is φ(w), −1 for special tokens and where no student token is a prefix of w; of ids with equal bytes it is
    the canonical one. `prefix_bytes_W[w]` is the length of φ(w), 0 for none, and `rest_bytes_W[w]` that of the
    remaining bytes.
    """

    ids_W: Int32
    prefix_bytes_W: Int32
    rest_bytes_W: Int32


def longest_prefixes(student: Vocabulary, teacher: Vocabulary) -> PrefixMap:
    """φ from the teacher's vocabulary to the student's; with the sides swapped, the reverse.

    Cached on disk (`gold.tokenize.cache`) under both fingerprints. `Vocabulary.canonical_ids` is applied after loading:
    it depends on more than the bytes.
    """

    def build() -> Int32:
        return ByteTrie.of(student).longest_tokens(teacher.offsets, teacher.blob)

    content = f"longest prefixes {_VERSION} {student.fingerprint} {teacher.fingerprint}"
    lowest_at = cached_ids(content, len(teacher.blob), build)
    lowest_W = np.append(lowest_at, -1)[np.where(teacher.is_special, -1, teacher.offsets[:-1])]
    ids_W = np.append(student.canonical_ids(), np.int32(-1))[lowest_W]
    lengths_V, lengths_W = (np.diff(v.offsets).astype(np.int32) for v in (student, teacher))
    prefix_bytes_W = np.append(lengths_V, np.int32(0))[ids_W]
    return PrefixMap(ids_W, prefix_bytes_W, lengths_W - prefix_bytes_W)
