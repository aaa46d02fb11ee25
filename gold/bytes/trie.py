"""The byte trie of a vocabulary: the tokens with a given prefix are a range of one order."""

# mypy: allow-untyped-defs, allow-untyped-calls

from dataclasses import dataclass
from typing import Protocol, Self

import numba
import numpy as np
from numpy.typing import NDArray

from gold.tokenize.order import byte_order

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]
UInt8 = NDArray[np.uint8]


class VocabularyBytes(Protocol):
    """The part of a vocabulary that a trie needs: the bytes of every id, and which ids are not text."""

    size: int
    offsets: Int64
    blob: UInt8
    is_special: Bool
    stop_ids: tuple[int, ...]

    @property
    def dummy_prefix(self) -> bool:
        """Whether the tokenizer puts a space before a text."""
        ...


@dataclass(frozen=True, eq=False)
class ByteTrie:
    """All text tokens of a vocabulary in byte order, and the trie of their prefixes, as flat arrays.

    The tokens below node ``n`` are ``order[low[n]:high[n]]``; the bytes of the first ``own[n]`` of them are exactly the
    node's prefix. The children of ``n`` are the nodes ``first_child[n] … first_child[n] + children[n]``, by ascending
    ``byte``. Node 0 is the root, the empty prefix.
    """

    order: Int32
    low: Int32
    high: Int32
    own: Int32
    first_child: Int32
    children: Int32
    byte: UInt8
    outside: Int32
    stops: Int32
    size: int

    @classmethod
    def of(cls, vocabulary: VocabularyBytes) -> Self:
        """The trie of every text id (not special, at least one byte); ``outside`` are the other ids except the stop
        ids.

        Ids with equal bytes are adjacent, in ascending order.
        """
        offsets, blob = vocabulary.offsets, vocabulary.blob
        stops = np.array(sorted(set(vocabulary.stop_ids)), dtype=np.int32)
        is_text = (np.diff(offsets) > 0) & ~vocabulary.is_special
        is_text[stops] = False
        order, _ = byte_order(np.flatnonzero(is_text), offsets, blob)
        is_outside = ~is_text
        is_outside[stops] = False
        low, high, own, first_child, children, byte = _build_nodes(order, offsets, blob)
        outside = np.flatnonzero(is_outside).astype(np.int32)
        return cls(order, low, high, own, first_child, children, byte, outside, stops, vocabulary.size)

    def longest_tokens(self, offsets: Int64, blob: UInt8) -> Int32:
        """For every byte of another vocabulary's ``blob`` the longest token that begins there and stays within the
        other's token: its lowest id, -1 if there is none."""
        nodes = self.low, self.own, self.first_child, self.children, self.byte
        found: Int32 = _longest_tokens(self.order, *nodes, offsets, blob)
        return found


@numba.njit(cache=True, nogil=True)
def _build_nodes(order, offsets, blob):
    total = 1
    for i in order:
        total += offsets[i + 1] - offsets[i]
    low = np.empty(total, np.int32)
    high = np.empty(total, np.int32)
    own = np.zeros(total, np.int32)
    first_child = np.zeros(total, np.int32)
    children = np.zeros(total, np.int32)
    byte = np.zeros(total, np.uint8)
    low[0] = 0
    high[0] = order.size
    count = 1
    level_start = 0
    depth = 0
    while level_start < count:
        level_end = count
        for node in range(level_start, level_end):
            at = low[node]
            while at < high[node] and offsets[order[at] + 1] - offsets[order[at]] == depth:
                at += 1
            own[node] = at - low[node]
            first_child[node] = count
            while at < high[node]:
                y = blob[offsets[order[at]] + depth]
                byte[count] = y
                low[count] = at
                while at < high[node] and blob[offsets[order[at]] + depth] == y:
                    at += 1
                high[count] = at
                children[node] += 1
                count += 1
        level_start = level_end
        depth += 1
    return (
        low[:count].copy(),
        high[:count].copy(),
        own[:count].copy(),
        first_child[:count].copy(),
        children[:count].copy(),
        byte[:count].copy(),
    )


@numba.njit(cache=True, nogil=True)
def child_of(first_child, children, byte, node, y):
    """The child of ``node`` along byte ``y``, or -1."""
    lo = first_child[node]
    hi = lo + children[node]
    while lo < hi:
        mid = (lo + hi) // 2
        if byte[mid] < y:
            lo = mid + 1
        else:
            hi = mid
    if lo < first_child[node] + children[node] and byte[lo] == y:
        return lo
    return -1


@numba.njit(cache=True, nogil=True)
def _longest_tokens(order, low, own, first_child, children, byte, offsets, blob):
    found = np.full(blob.size, -1, np.int32)
    for index in range(offsets.size - 1):
        for start in range(offsets[index], offsets[index + 1]):
            node = 0
            for at in range(start, offsets[index + 1]):
                node = child_of(first_child, children, byte, node, blob[at])
                if node < 0:
                    break
                if own[node] > 0:
                    found[start] = order[low[node]]
    return found
