"""Retokenization of each token of one vocabulary with another tokenizer, and the sparse weight matrix of X-Token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gold.align.overlap import byte_equal_pairs
from gold.errors import VocabularyError
from gold.tokenize.cache import cached_ids
from gold.tokenize.order import byte_order
from gold.tokenize.vocabulary import Int32, Int64, Vocabulary

Float64 = npt.NDArray[np.float64]
Ids = npt.NDArray[np.integer]

MOST_TOKENS = 4
"""Number of tokens of a decomposition that count, from the first."""
DECAY = 0.1
"""Weight of each token of a decomposition relative to the one before."""

# Increment when the same two vocabularies yield other decompositions: it invalidates cached files.
_VERSION = 1


@dataclass(frozen=True, eq=False)
class TokenWeights:
    """A sparse matrix from student tokens to teacher tokens: entry e is `weight_E[e]` at (`ids_V[e]`, `ids_W[e]`).

    Entries are sorted by student token, then by descending weight; those of one student token add up to 1. A student
    token without entries has no counterpart.
    """

    ids_V: Int32
    ids_W: Int32
    weight_E: Float64


def token_weights(student: Vocabulary, teacher: Vocabulary, top_k: int = 4) -> TokenWeights:
    """The initial matrix of X-Token, from the vocabularies only.

    A student token with a byte-equal teacher token has that one, with weight 1. Any other has the tokens into which the
    teacher's tokenizer splits it, token i with a weight in proportion to 0.1^i, and the teacher tokens that the
    student's tokenizer splits so that it is token i of them, weighted alike. Weights of the same entry are added; the
    `top_k` largest of a student token are kept and divided by their sum. Special tokens have no entries.

    Source: Sreenivas et al. 2605.21699, section 3.2. There strings are compared after normalisation, here bytes;
    special tokens, there matched by similar names, are left to their roles.
    """
    own_V, into_W, forth = _entries(student, teacher)
    own_W, into_V, back = _entries(teacher, student)
    equal_V, equal_W = byte_equal_pairs(student, teacher)
    ids_V: Ids = np.concatenate((own_V, into_V))
    ids_W: Ids = np.concatenate((into_W, own_W))
    other = ~np.isin(ids_V, equal_V)
    places, entry = np.unique(
        ids_V[other].astype(np.int64) * teacher.size + ids_W[other], return_inverse=True
    )
    weight_E = np.asarray(np.bincount(entry, np.concatenate((forth, back))[other], len(places)), np.float64)
    ids_V, ids_W = places // teacher.size, places % teacher.size
    # Equal weights are ordered by bytes: which entries are cut does not depend on the numbering of ids.
    order = np.lexsort((_ranks(teacher)[ids_W], -weight_E, ids_V))
    ids_V, ids_W, weight_E = ids_V[order], ids_W[order], weight_E[order]
    kept = np.arange(len(ids_V)) - np.searchsorted(ids_V, ids_V) < top_k
    ids_V, ids_W, weight_E = ids_V[kept], ids_W[kept], weight_E[kept]
    weight_E = weight_E / np.bincount(ids_V, weight_E, student.size)[ids_V]
    ids_V, ids_W = np.concatenate((equal_V, ids_V)), np.concatenate((equal_W, ids_W))
    order = np.argsort(ids_V, kind="stable")
    weight_E = np.concatenate((np.ones(len(equal_V)), weight_E))[order]
    return TokenWeights(ids_V[order].astype(np.int32), ids_W[order].astype(np.int32), weight_E)


def likeliest_pairs(weights: TokenWeights, student: Vocabulary, least: float = 0.6) -> tuple[Int32, Int32]:
    """Each student token with the teacher token of its largest weight, where that is at least `least`: (ids_V, ids_W),
    every id at most once, in ascending order of the student's id.

    If several student tokens have the same teacher token, the one with the largest weight gets it; among equal weights
    the first in byte order.

    Source: Sreenivas et al. 2605.21699, the pairs of H-KL; the threshold is that of their implementation.
    """
    first = np.searchsorted(weights.ids_V, np.unique(weights.ids_V))
    first = first[weights.weight_E[first] >= least]
    best = first[np.lexsort((_ranks(student)[weights.ids_V[first]], -weights.weight_E[first]))]
    _, winners = np.unique(weights.ids_W[best], return_index=True)
    kept = np.sort(best[winners])
    return weights.ids_V[kept], weights.ids_W[kept]


def retokenized(source: Vocabulary, target: Vocabulary) -> Int32:
    """The tokens into which the target's tokenizer splits the bytes of each token of the source: int32[size, 4].

    Only the first four tokens; −1 is padding. A row is empty for special tokens, for bytes that are not valid text on
    their own, where the target's tokens do not reproduce the bytes exactly, and where the target has a byte-equal
    token. Cached on disk under both tokenizers.
    """

    def build() -> Int32:
        equal, _ = byte_equal_pairs(source, target)
        asked = ~source.is_special
        asked[equal] = False
        rows = np.full((source.size, MOST_TOKENS), -1, np.int32)
        for index in np.flatnonzero(asked).tolist():
            try:
                tokenized = target.encode(source.token_bytes(index).decode(), at_start=False)
            except (UnicodeDecodeError, VocabularyError):
                continue
            if tokenized.exact.all() and not target.is_special[tokenized.ids].any():
                rows[index, : len(tokenized)] = tokenized.ids[:MOST_TOKENS]
        return rows.reshape(-1)

    # A fingerprint does not cover merges, on which the result depends.
    sides = [x for side in (source, target) for x in (side.fingerprint, side.tokenizer.to_str())]
    content = "\0".join([f"retokenized {_VERSION} {MOST_TOKENS}", *sides])
    return cached_ids(content, source.size * MOST_TOKENS, build).reshape(-1, MOST_TOKENS)


def _entries(source: Vocabulary, target: Vocabulary) -> tuple[Int64, Int32, Float64]:
    """Source tokens, target tokens of their decompositions, and weights, entry by entry."""
    ids_NP = retokenized(source, target)
    there = ids_NP >= 0
    weight = np.where(there, DECAY ** np.arange(MOST_TOKENS), 0.0)
    weight /= np.maximum(weight.sum(axis=1, keepdims=True), DECAY**MOST_TOKENS)
    return np.nonzero(there)[0], ids_NP[there], weight[there]


def _ranks(vocabulary: Vocabulary) -> Int32:
    """The rank of each id in byte order."""
    order, _ = byte_order(np.arange(vocabulary.size), vocabulary.offsets, vocabulary.blob)
    ranks = np.empty(vocabulary.size, np.int32)
    ranks[order] = np.arange(vocabulary.size, dtype=np.int32)
    return ranks
