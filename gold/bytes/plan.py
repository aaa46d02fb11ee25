"""The byte trie of a vocabulary, and the plan that turns a model's rows into next-byte distributions along one text.

A language model over tokens is also a language model over bytes. At byte offset ``e`` of a text whose tokens are known,
the probability of the next byte is a ratio of two sums over tokens that agree with the text so far: tokens that start
at the last token boundary, and longer ones that start at an earlier boundary and would have run across it (the *cover*
terms). Which tokens these are depends on the vocabulary and the text alone, never on the model; this module finds them
once, as index arrays, and the kernels then only add probabilities.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numba
import numpy as np
from numpy.typing import NDArray

from gold.tokenize.order import byte_order

STOP_EVENT = 256
"""Column of the stop event in a table of byte events; columns 0..255 are the bytes."""
REST_EVENT = 257
"""Column of everything that names no next byte: a token that could end here, a special token, a padding row."""
EVENTS = 258
"""Number of columns of a table of byte events."""

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


class SpelledVocabulary(Protocol):
    """What a trie needs of a vocabulary: the bytes of every id, and which ids are no text."""

    size: int
    offsets: Int64
    blob: NDArray[np.uint8]
    is_special: Bool
    stop_ids: tuple[int, ...]

    @property
    def dummy_prefix(self) -> bool:
        """Whether a space is put before a text."""
        ...


class SpelledText(Protocol):
    """What a plan needs of one side's spelling of a text: ids, where each ends, the text, which are exact."""

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
        """Whether a token's own bytes are its stretch of the text."""
        ...


@dataclass(frozen=True)
class ByteTrie:
    """All text tokens of a vocabulary in byte order, and the trie of their prefixes, as flat arrays.

    The tokens below node ``n`` are ``order[low[n]:high[n]]``; the first ``own[n]`` of them spell exactly the node's
    prefix. The children of ``n`` are the nodes ``first_child[n] … first_child[n] + children[n]``, by rising
    ``byte``. Node 0 is the root, the empty prefix.
    """

    order: Int32
    low: Int32
    high: Int32
    own: Int32
    first_child: Int32
    children: Int32
    byte: NDArray[np.uint8]
    outside: Int32
    stops: Int32
    size: int

    @classmethod
    def of(cls, vocabulary: SpelledVocabulary) -> "ByteTrie":
        """The trie of every id that is text (not an event, at least one byte); ``outside`` are the other ids but the
        stop ids.

        Ids that spell the same bytes stand side by side, by rising id.
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

    def below(self, prefix: bytes) -> tuple[int, int, int]:
        """Where in ``order`` the tokens begin that are ``prefix``, where the longer ones begin, and where these end.

        All three are equal where no token begins with it.
        """
        given = np.frombuffer(prefix, np.uint8)
        node = _node_of(self.first_child, self.children, self.byte, given)
        if node < 0:
            return 0, 0, 0
        low, high = int(self.low[node]), int(self.high[node])
        return low, low + int(self.own[node]), high

    def longest_tokens(self, offsets: Int64, blob: NDArray[np.uint8]) -> Int32:
        """For every byte of another vocabulary's ``blob`` the longest token that begins there and does not run over the
        end of the other's token: its lowest id, -1 if there is none.
        """
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


@dataclass(frozen=True)
class BytePlan:
    """Which masses of which row add up to which event of which byte position, for a batch of texts on one side.

    Rows are the model's states: row ``k`` of a text predicts its token ``k``; a text that stopped has one more row,
    for the stop event. Positions are byte offsets ``0 … L`` of each text, one text after the other.

    Each row visits the trie nodes along the text from where it starts; visit ``v`` yields the masses
    ``mass_ptr[v] … mass_ptr[v+1]``: first the tokens that end at this node (at the row's start: everything that is
    neither a reachable token nor a stop), then each child, and at the row's start last the stop ids.
    """

    visit_ptr: Int64
    visit_node: Int32
    visit_starts: Bool
    visit_skips_target: Bool
    mass_ptr: Int64
    mass_row: Int32
    mass_position: Int64
    mass_event: Int32
    target: Int32
    position_row: Int32
    position_text: Int32
    supervised: Bool

    @property
    def rows(self) -> int:
        """Number of model states that the plan reads."""
        return int(self.target.size)

    @property
    def positions(self) -> int:
        """Number of byte positions, the one after the last byte of each text included."""
        return int(self.supervised.size)

    @staticmethod
    def of(
        vocabulary: SpelledVocabulary, trie: ByteTrie, texts: Sequence[SpelledText], stopped: Sequence[bool]
    ) -> "BytePlan":
        """The plan of ``texts``, read through their own tokens; ``stopped[b]`` says whether the stop event follows.

        Where the tokenizer puts a space before a text that is not in its bytes, the first token is looked up behind
        that space.

        A position is supervised where some row's walk passes it: everywhere but inside stretches that the tokens do
        not spell exactly, and at the end of a text that did not stop.
        """
        parts = []
        for text, stop in zip(texts, stopped, strict=True):
            data = np.frombuffer(text.data, dtype=np.uint8)
            exact, states = behind_space(vocabulary, text)
            parts.append(
                _plan_one(
                    trie.low,
                    trie.own,
                    trie.first_child,
                    trie.children,
                    trie.byte,
                    text.ids.astype(np.int32),
                    text.ends.astype(np.int64),
                    data,
                    exact,
                    bool(stop),
                    states,
                )
            )
        return _join(parts)


def behind_space(vocabulary: SpelledVocabulary, text: SpelledText) -> tuple[Bool, int]:
    """Which tokens spell their stretch of the text, and how many states stand behind the space put before a text.

    The first token that is text has that space in surplus, or has none; events may stand before it.
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


def _join(parts: list[tuple[NDArray[np.generic], ...]]) -> BytePlan:
    """One plan of many, rows, visits, masses and positions numbered through."""
    columns = list(zip(*parts, strict=True)) if parts else [() for _ in range(11)]
    (
        visits_of_row,
        node,
        starts,
        skips,
        masses_of_visit,
        row,
        position,
        event,
        target,
        position_row,
        supervised,
    ) = columns
    rows = np.array([t.size for t in target], dtype=np.int64)
    positions = np.array([s.size for s in supervised], dtype=np.int64)
    row_shift = np.concatenate(([0], np.cumsum(rows)))
    position_shift = np.concatenate(([0], np.cumsum(positions)))

    def joined(arrays: Sequence[NDArray[np.generic]], dtype: type) -> NDArray[np.generic]:
        return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)

    def shifted(arrays: Sequence[NDArray[np.generic]], shift: Int64, dtype: type) -> NDArray[np.generic]:
        return joined([a + s for a, s in zip(arrays, shift[:-1], strict=True)], dtype)

    def pointer(counts: Sequence[NDArray[np.generic]]) -> Int64:
        return np.concatenate((np.zeros(1, np.int64), np.cumsum(joined(counts, np.int64), dtype=np.int64)))

    return BytePlan(
        visit_ptr=pointer(visits_of_row),
        visit_node=joined(node, np.int32),  # type: ignore[arg-type]
        visit_starts=joined(starts, np.bool_),  # type: ignore[arg-type]
        visit_skips_target=joined(skips, np.bool_),  # type: ignore[arg-type]
        mass_ptr=pointer(masses_of_visit),
        mass_row=shifted(row, row_shift, np.int32),  # type: ignore[arg-type]
        mass_position=shifted(position, position_shift, np.int64),  # type: ignore[arg-type]
        mass_event=joined(event, np.int32),  # type: ignore[arg-type]
        target=joined(target, np.int32),  # type: ignore[arg-type]
        position_row=shifted(position_row, row_shift, np.int32),  # type: ignore[arg-type]
        position_text=np.repeat(np.arange(len(parts), dtype=np.int32), positions),
        supervised=joined(supervised, np.bool_),  # type: ignore[arg-type]
    )


@numba.njit(cache=True, nogil=True)
def _child(first_child, children, byte, node, y):
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
def _node_of(first_child, children, byte, prefix):
    node = 0
    for y in prefix:
        node = _child(first_child, children, byte, node, y)
        if node < 0:
            break
    return node


@numba.njit(cache=True, nogil=True)
def _longest_tokens(order, low, own, first_child, children, byte, offsets, blob):
    found = np.full(blob.size, -1, np.int32)
    for index in range(offsets.size - 1):
        for start in range(offsets[index], offsets[index + 1]):
            node = 0
            for at in range(start, offsets[index + 1]):
                node = _child(first_child, children, byte, node, blob[at])
                if node < 0:
                    break
                if own[node] > 0:
                    found[start] = order[low[node]]
    return found


@numba.njit(cache=True, nogil=True)
def _plan_one(low, own, first_child, children, byte, ids, ends, data, exact, stopped, behind_space):
    """Arrays of BytePlan for one text; counts in place of pointers, numbering from 0."""
    n = ids.size
    length = data.size
    rows = n + 1 if stopped else n
    # A walk must not enter a stretch that the tokens do not spell exactly: there the text's bytes are not what the
    # model read. trusted[e] is the first such stretch's start at or after e.
    trusted = np.full(length + 1, length, np.int64)
    start = 0
    for i in range(n):
        if not exact[i] and ends[i] > start:
            trusted[start] = start
        start = ends[i]
    for e in range(length - 1, -1, -1):
        if trusted[e] != e:
            trusted[e] = trusted[e + 1]

    visits_of_row = np.zeros(rows, np.int64)
    position_row = np.full(length + 1, -1, np.int32)
    supervised = np.zeros(length + 1, np.bool_)
    target = np.full(rows, -1, np.int32)
    target[:n] = ids
    visits = 0
    masses = 0
    node = np.empty(0, np.int32)
    starts = np.empty(0, np.bool_)
    skips = np.empty(0, np.bool_)
    masses_of_visit = np.empty(0, np.int64)
    mass_row = np.empty(0, np.int32)
    mass_position = np.empty(0, np.int64)
    mass_event = np.empty(0, np.int32)
    for fill in range(2):
        if fill == 1:
            node = np.empty(visits, np.int32)
            starts = np.empty(visits, np.bool_)
            skips = np.empty(visits, np.bool_)
            masses_of_visit = np.empty(visits, np.int64)
            mass_row = np.empty(masses, np.int32)
            mass_position = np.empty(masses, np.int64)
            mass_event = np.empty(masses, np.int32)
            visits = 0
            masses = 0
        begin = 0
        clean = True
        for k in range(rows):
            if clean:
                at = 0
                if k < behind_space:
                    at = max(0, _child(first_child, children, byte, 0, 32))
                limit = trusted[begin]
                target_end = int(ends[k]) if k < n else -1
                e = begin
                while True:
                    if e == length and not stopped:
                        break
                    here = 1 + children[at] + (1 if e == begin else 0)
                    if fill == 1:
                        node[visits] = at
                        starts[visits] = e == begin
                        skips[visits] = target_end == e
                        masses_of_visit[visits] = here
                        mass_row[masses : masses + here] = k
                        mass_position[masses : masses + here] = e
                        mass_event[masses] = 257
                        for c in range(children[at]):
                            mass_event[masses + 1 + c] = byte[first_child[at] + c]
                        if e == begin:
                            mass_event[masses + here - 1] = 256
                            position_row[e] = k
                        supervised[e] = True
                        visits_of_row[k] += 1
                    visits += 1
                    masses += here
                    if e >= limit:
                        break
                    following = _child(first_child, children, byte, at, data[e])
                    if following < 0:
                        break
                    at = following
                    e += 1
            if k < n:
                # After a token that ends at no boundary of the text (it has no width, and is not spelled by it) the
                # state stands inside a stretch; nothing starts there.
                clean = exact[k] or ends[k] > begin
                begin = int(ends[k])
    last = np.int32(0)
    for e in range(length + 1):
        if position_row[e] >= 0:
            last = position_row[e]
        position_row[e] = last
    return (
        visits_of_row,
        node,
        starts,
        skips,
        masses_of_visit,
        mass_row,
        mass_position,
        mass_event,
        target,
        position_row,
        supervised,
    )
