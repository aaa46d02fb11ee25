"""The plan that maps a model's rows to next-byte distributions along given texts.

A language model over tokens is also a language model over bytes. At byte offset ``e`` of a text with known tokens, the
probability of the next byte is a ratio of two sums over tokens that agree with the text so far: tokens that start at
the last token boundary, and longer ones that start at an earlier boundary and cross it (the *cover* terms). These token
sets depend on the vocabulary and the text only, not on the model; this module computes them once, as index arrays, and
the kernels then only add probabilities.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numba
import numpy as np
from numpy.typing import NDArray

from gold.bytes.events import STOP_EVENT, UNRESOLVED_EVENT
from gold.bytes.trie import Bool, ByteTrie, Int32, Int64, UInt8, VocabularyBytes, child_of


class TextTokens(Protocol):
    """A tokenized text, as far as a plan needs it."""

    @property
    def ids(self) -> Int32:
        """Token ids."""
        ...

    @property
    def ends(self) -> Int64:
        """Byte offset after each token."""
        ...

    @property
    def data(self) -> bytes:
        """The text."""
        ...

    @property
    def exact(self) -> Bool:
        """Whether a token's own bytes are its span of the text."""
        ...


@dataclass(frozen=True, eq=False)
class Visits:
    """The trie nodes that rows visit along the text: row k has the visits ``ptr[k] … ptr[k + 1]``.

    Visit v yields the masses ``mass_ptr[v] … mass_ptr[v + 1]``: first the tokens that end at its node (at the row's
    start also all ids that are neither text nor stop), then each child, and at the row's start last the stop ids.
    ``skips_target``: the first of these excludes the row's own token, which the next row accounts for.
    """

    ptr: Int64
    node: Int32
    position: Int64
    starts: Bool
    skips_target: Bool
    mass_ptr: Int64

    @cached_property
    def row(self) -> Int64:
        """The row of each visit."""
        return np.repeat(np.arange(self.ptr.size - 1), np.diff(self.ptr))

    @cached_property
    def reach(self) -> Int64:
        """The last byte position that each row visits; −1 for a row without visits."""
        reach = np.full(self.ptr.size - 1, -1)
        some = np.diff(self.ptr) > 0
        reach[some] = self.position[self.ptr[1:][some] - 1]
        return reach

    def within(self, rows: slice, positions: slice) -> tuple[Visits, slice | NDArray[np.intp]]:
        """The visits of some rows at some positions, rows and masses renumbered from 0, and the indices of these
        masses."""
        first, last = self.ptr[[rows.start, rows.stop]].tolist()
        ptr, here = self.ptr[rows.start : rows.stop + 1] - first, slice(first, last)
        masses = np.diff(self.mass_ptr[first : last + 1])
        kept: slice | NDArray[np.intp] = slice(*self.mass_ptr[[first, last]].tolist())
        inside = (self.position[here] >= positions.start) & (self.position[here] < positions.stop)
        chosen: slice | NDArray[np.intp] = here
        if not inside.all():
            ptr = np.concatenate(([0], np.cumsum(inside)))[ptr]
            kept = self.mass_ptr[first] + np.flatnonzero(np.repeat(inside, masses))
            chosen, masses = first + np.flatnonzero(inside), masses[inside]
        node, position = self.node[chosen], self.position[chosen]
        starts, skips = self.starts[chosen], self.skips_target[chosen]
        return Visits(ptr, node, position, starts, skips, _starts(masses)), kept


@dataclass(frozen=True, eq=False)
class BytePlan:
    """For a batch of texts on one side, which masses of which row add up to which event of which byte position.

    Rows are model states: row ``k`` of a text predicts its token ``k``; a text that stopped has one more row, for the
    stop event. Positions are the byte offsets ``0 … L`` of each text, concatenated. ``target``: the id of each row, −1
    for the stop event. ``position_row``: the last row that begins at or before each position.
    """

    visits: Visits
    mass_row: Int32
    mass_position: Int64
    mass_event: Int32
    target: Int32
    position_row: Int32
    position_text: Int32
    supervised: Bool

    @property
    def rows(self) -> int:
        """Number of model states of the plan."""
        return int(self.target.size)

    @property
    def positions(self) -> int:
        """Number of byte positions, including the one after the last byte of each text."""
        return int(self.supervised.size)

    @classmethod
    def of(
        cls, vocabulary: VocabularyBytes, trie: ByteTrie, texts: Sequence[TextTokens], stopped: Sequence[bool]
    ) -> BytePlan:
        """The plan of ``texts`` in their own tokens; ``stopped[b]``: whether the stop event follows text b.

        If the tokenizer puts a space before a text that is not in its bytes, the walk of the first token starts after
        that space.

        A position is supervised if some row's walk passes it: everywhere except inside spans whose bytes the tokens do
        not reproduce exactly, and at the end of a text that did not stop.
        """
        lengths = [len(t.data) for t in texts]
        starts = _starts(np.array(lengths, np.int64) + 1)
        parts = [
            _rows(vocabulary, trie, text, bool(stop), int(first))
            for text, stop, first in zip(texts, stopped, starts, strict=False)
        ]
        columns = zip(*parts, strict=True) if parts else [[np.empty(0, np.int64)]] * 6
        data = np.frombuffer(b"".join(text.data + b"\0" for text in texts), np.uint8)
        first_rows = _starts([p[0].size for p in parts])[:-1]
        return cls._of(trie, data, starts, first_rows, *(np.concatenate(x) for x in columns))

    @classmethod
    def off_path(
        cls,
        vocabulary: VocabularyBytes,
        trie: ByteTrie,
        texts: Sequence[TextTokens],
        stopped: Sequence[bool],
        text: Int64,
        begins: Int64,
    ) -> BytePlan:
        """The plan of other states that have read the beginning of one of the texts, ``begins`` bytes each of that with
        the number ``text``, by other tokens than its own; they have no target, and skip none."""
        lengths = np.array([len(t.data) for t in texts], np.int64)
        starts = _starts(lengths + 1)
        limit = np.empty_like(begins)
        for number, each in enumerate(texts):
            of = text == number
            if of.any():
                limit[of] = _limit(each, behind_space(vocabulary, each)[0], begins[of])
        last = lengths[text] - ~np.asarray(stopped, np.bool_)[text]
        data = np.frombuffer(b"".join(t.data + b"\0" for t in texts), np.uint8)
        first, nowhere = starts[text], np.full(begins.size, -1)
        walk = first + begins, nowhere - 1, np.zeros(begins.size, np.int64), first + limit, first + last
        return cls._of(trie, data, starts, np.zeros(lengths.size, np.int64), nowhere, *walk)

    @classmethod
    def _of(
        cls,
        trie: ByteTrie,
        data: UInt8,
        starts: Int64,
        first_rows: Int64,
        target: Int64,
        begin: Int64,
        end: Int64,
        root: Int64,
        limit: Int64,
        last: Int64,
    ) -> BytePlan:
        """The plan of rows, each with what ``_rows`` returns; ``starts`` are the first positions of the texts in
        ``data``, and the number of positions."""
        walk = trie.first_child, trie.children, trie.byte, data, begin, root, limit, last
        ptr = _starts(_walk_rows(*walk, begin, np.empty(0, np.int32)))
        node = np.empty(ptr[-1], np.int32)
        _walk_rows(*walk, ptr, node)
        row = np.repeat(np.arange(begin.size), np.diff(ptr))
        position = begin[row] + np.arange(node.size) - ptr[row]
        first_visit = position == begin[row]
        masses = 1 + trie.children[node] + first_visit
        visits = Visits(ptr, node, position, first_visit, end[row] == position, _starts(masses))
        position_row = np.zeros(int(starts[-1]), np.int32)
        position_row[starts[:-1]] = first_rows
        position_row[position[first_visit]] = row[first_visit]  # the last of several rows that begin there
        supervised = np.zeros(position_row.size, np.bool_)
        supervised[position] = True
        event = np.empty(visits.mass_ptr[-1], np.int32)
        _fill_events(trie.first_child, trie.children, trie.byte, node, first_visit, visits.mass_ptr, event)
        return cls(
            visits,
            np.repeat(row.astype(np.int32), masses),
            np.repeat(position, masses),
            event,
            target.astype(np.int32),
            np.maximum.accumulate(position_row),
            np.repeat(np.arange(starts.size - 1, dtype=np.int32), np.diff(starts)),
            supervised,
        )


def behind_space(vocabulary: VocabularyBytes, text: TextTokens) -> tuple[Bool, int]:
    """Which tokens have exactly the bytes of their span, and how many states follow the space put before a text.

    The first text token has that space in addition to its span, or no space; special tokens may precede it.
    """
    exact = text.exact.astype(np.bool_, copy=True)
    if not vocabulary.dummy_prefix:
        return exact, 0
    for i, token in enumerate(text.ids.tolist()):
        low, high = (vocabulary.offsets[token : token + 2]).tolist() if token < vocabulary.size else (0, 0)
        if high > low:
            if exact[i] or vocabulary.blob[low:high].tobytes() != b" " + text.data[: text.ends[i]]:
                return exact, 0
            exact[i] = True
            return exact, i + 1
    return exact, 0


def _rows(
    vocabulary: VocabularyBytes, trie: ByteTrie, text: TextTokens, stopped: bool, first: int
) -> tuple[NDArray[np.int64], ...]:
    """For each row of a text that begins at position ``first``: id, position before and after its token, the node where
    its walk begins, the position at which the walk must end, and the last position it may visit (before the first: no
    walk)."""
    exact, spaced = behind_space(vocabulary, text)
    ends, length = text.ends.astype(np.int64), len(text.data)
    begin = np.concatenate(([0], ends))
    wide = ends > begin[:-1]
    limit = _limit(text, exact, begin)
    # No walk begins after an inexact token of zero width: that state is inside an inexact span.
    begins = np.concatenate(([True], exact | wide))
    last = np.where(begins, length if stopped else length - 1, -1)
    root = np.zeros(begin.size, np.int64)
    root[:spaced] = max(0, child_of(trie.first_child, trie.children, trie.byte, 0, 32))
    target, end = np.append(text.ids, -1), np.append(ends, -1 - first)
    rows = slice(ends.size + stopped)
    return (
        target[rows],
        begin[rows] + first,
        end[rows] + first,
        root[rows],
        limit[rows] + first,
        last[rows] + first,
    )


def _limit(text: TextTokens, exact: Bool, begin: Int64) -> Int64:
    """The position at which a walk that begins at ``begin`` must end: it must not enter a span whose bytes the tokens
    do not reproduce exactly, since the model did not read the text's bytes there."""
    starts = np.concatenate(([0], text.ends.astype(np.int64)[:-1]))
    inexact = np.append(starts[: exact.size][~exact & (text.ends > starts[: exact.size])], len(text.data))
    limit: Int64 = inexact[np.searchsorted(inexact, begin)]
    return limit


def _starts(counts: Sequence[int] | NDArray[np.integer]) -> Int64:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))


@numba.njit(cache=True, nogil=True)
def _walk_rows(first_child, children, byte, data, begin, root, limit, last, ptr, node):
    """Number of nodes that each row visits along the text; they are written to ``node``, unless that is empty."""
    counts = np.zeros(begin.size, np.int64)
    for k in range(begin.size):
        at, e = root[k], begin[k]
        while e <= last[k]:
            if node.size:
                node[ptr[k] + counts[k]] = at
            counts[k] += 1
            if e >= limit[k]:
                break
            at = child_of(first_child, children, byte, at, data[e])
            if at < 0:
                break
            e += 1
    return counts


@numba.njit(cache=True, nogil=True)
def _fill_events(first_child, children, byte, node, starts, mass_ptr, event):
    for v in range(node.size):
        m, at = mass_ptr[v], node[v]
        event[m] = UNRESOLVED_EVENT
        for c in range(children[at]):
            event[m + 1 + c] = byte[first_child[at] + c]
        if starts[v]:
            event[mass_ptr[v + 1] - 1] = STOP_EVENT
