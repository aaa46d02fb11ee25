"""Pieces, the byte strings to which tokens of two vocabularies can be truncated, and the plan that maps both sides'
tokens to them.

A piece is a student token that is the longest prefix of some teacher token. Truncated to its longest prefix that is a
piece, every token of either vocabulary maps to one piece, so rows over two vocabularies become rows over the same
events.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np
from numpy.typing import NDArray

from gold.bytes.events import BY_PIECE, MOVED, OBSERVED, PATH, RESIDUAL, STOP, UNRESOLVED
from gold.bytes.plan import BytePlan
from gold.bytes.prefixes import longest_prefixes
from gold.bytes.trie import Bool, ByteTrie, Int32, Int64, UInt8, child_of
from gold.tokenize.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Pieces:
    """The student tokens that are the longest prefix of some teacher token: `ids[p]`, ascending, one per byte string.

    `at_S[k]` is the longest piece that begins at byte k of the student's `blob` within the token there, -1 for none;
    `at_T` likewise. A token's own piece is that at its first byte; the others are the pieces of its suffixes. `lengths`
    are in bytes; `white`: white space only.
    """

    ids: Int32
    lengths: Int64
    white: Bool
    at_S: Int32
    at_T: Int32

    @classmethod
    def of(cls, student: Vocabulary, teacher: Vocabulary) -> Pieces:
        """The pieces of two vocabularies."""
        reached = longest_prefixes(student, teacher).ids_W[~teacher.is_special]
        ids = np.unique(reached[reached >= 0]).astype(np.int32)
        number = np.full(student.size + 1, -1, np.int32)
        number[ids] = np.arange(ids.size, dtype=np.int32)
        trie = ByteTrie.of(_Only(student, ids))
        at_S, at_T = (number[trie.longest_tokens(v.offsets, v.blob)] for v in (student, teacher))
        white = np.array([not student.token_bytes(i).strip() for i in ids.tolist()], np.bool_)
        return cls(ids, np.diff(student.offsets)[ids], white, at_S, at_T)


class _Only:
    """A vocabulary in which only some ids are text."""

    stop_ids: tuple[int, ...] = ()
    dummy_prefix = False

    def __init__(self, vocabulary: Vocabulary, ids: Int32) -> None:
        self.size, self.offsets, self.blob = vocabulary.size, vocabulary.offsets, vocabulary.blob
        self.is_special: Bool = np.ones(vocabulary.size, np.bool_)
        self.is_special[ids] = False


@dataclass(frozen=True, eq=False)
class PieceRows:
    """One side of a batch: its trie and byte plan, the byte position after each row's token (-1 where the row has no
    token), the first byte of each id in the vocabulary's `blob`, and the piece at each byte of the blob."""

    trie: ByteTrie
    plan: BytePlan
    row_ends: Int64
    offsets: Int64
    piece_at: Int32

    @cached_property
    def origin(self) -> Int64:
        """The byte position at which each row would visit the root of the trie: one less than its begin if the walk
        starts after a space that is not in the text. Beyond all positions for a row without visits."""
        origin = np.full(self.plan.rows, self.plan.positions, np.int64)
        visits = self.plan.visits
        starts = visits.starts
        origin[visits.row[starts]] = visits.position[starts] - (visits.node[starts] != 0)
        return origin

    @property
    def walk(self) -> tuple[NDArray[np.generic], ...]:
        """The arrays that a walk along the visits of a row uses."""
        trie, visits = self.trie, self.plan.visits
        nodes = trie.low, trie.high, trie.first_child, trie.children, trie.byte
        return *nodes, visits.ptr, visits.node, self.origin, self.row_ends


@dataclass(frozen=True, eq=False)
class PieceRanges:
    """Which ids of which row count at which position, and as which event: ranges `low … high` of a pool of ids, by
    position.

    The pool is the text tokens in byte order, the stop ids, and all other columns of the rows; `high` -1 is its end.
    `event` is the event of the ids of a range. BY_PIECE: for each id the longest piece at its byte `depth`. MOVED: as
    BY_PIECE, in a row that is counted whole, and only for ids that begin with the sampled token. PATH: no event, but
    the probability of the sampled token. Ids at `inner_low … inner_high` begin with the sampled token. `skips`:
    excluding the row's target.

    `start[p] … start[p + 1]` are the ranges of position p. `whole[p]` is the row that begins there, every column of
    which counts by its piece at byte 0; -1 for none. `last[p]` is the last row that begins there or before. The rows
    `reach[p, 0] … reach[p, 1]` are needed for p.
    """

    low: Int64
    high: Int64
    inner_low: Int64
    inner_high: Int64
    depth: Int64
    row: Int64
    event: Int64
    skips: Bool
    start: Int64
    whole: Int64
    last: Int64
    reach: Int64


@dataclass(frozen=True, eq=False)
class PiecePlan:
    """The comparison of both sides of a batch on pieces, at byte positions at each of which a student row begins.

    Where the teacher needs several tokens for the sampled student token, `observed[p]` is the event of the sampled
    token: its own piece, or OBSERVED if it is no piece; then `short[p]` is the event it is truncated to, and tokens
    that begin with it count as OBSERVED instead. `source[p]` is the event of the first of the teacher's tokens. All are
    -1 elsewhere. `observed_white`: the sampled token is white space only.
    """

    student: PieceRanges
    teacher: PieceRanges
    observed: Int64
    short: Int64
    source: Int64
    observed_white: Bool

    @classmethod
    def of(
        cls, pieces: Pieces, student: PieceRows, teacher: PieceRows, positions: Int64, text: UInt8
    ) -> PiecePlan:
        """The plan; `text[e]` is the byte that follows position e."""
        whole_S, whole_T = (_whole_rows(side, positions) for side in (student, teacher))
        last_T = teacher.plan.position_row[positions].astype(np.int64)
        end, observed, short, source, paths = _observed(
            positions,
            whole_S,
            last_T,
            text,
            pieces.lengths,
            student.plan.target,
            student.offsets,
            student.piece_at,
            student.walk,
            teacher.plan.target,
            teacher.offsets,
            teacher.piece_at,
            teacher.walk,
        )
        split = np.where(short >= 0, end, -1)
        size = pieces.ids.size
        ranges_S = _ranges(student, positions, whole_S, split, text, size, np.empty((0, 4), np.int64))
        ranges_T = _ranges(teacher, positions, whole_T, split, text, size, paths)
        spans = zip(positions.tolist(), end.tolist(), strict=True)
        white = np.array([e > p and not text[p:e].tobytes().strip() for p, e in spans], np.bool_)
        return cls(ranges_S, ranges_T, observed, short, source, white)


def _whole_rows(side: PieceRows, positions: Int64) -> Int64:
    """The row that begins at each position at the root of the trie, the last of several; -1 for none."""
    row = side.plan.position_row[positions].astype(np.int64)
    return np.where(side.origin[row] == positions, row, -1)


def _ranges(
    side: PieceRows, positions: Int64, whole: Int64, split: Int64, text: UInt8, size: int, paths: Int64
) -> PieceRanges:
    """The ranges of one side. `split[p]`: the end of a sampled token that is a separate event, else -1."""
    trie, plan = side.trie, side.plan
    number = np.full(plan.positions, -1, np.int64)
    number[positions] = np.arange(positions.size)
    visits = plan.visits
    chosen = np.flatnonzero(number[visits.position] >= 0)
    p, row, node = number[visits.position[chosen]], visits.row[chosen], visits.node[chosen]
    starts, skips = visits.starts[chosen], visits.skips_target[chosen]
    is_whole = row == whole[p]
    inner_low, inner_high = _inner(p, node, positions, split, text, side.walk)
    low, high = trie.low[node].astype(np.int64), trie.high[node].astype(np.int64)
    own = low + trie.own[node]
    stops, outside = trie.order.size, trie.order.size + trie.stops.size
    zero = np.zeros_like(low)
    visit = np.stack((p, row, positions[p] - side.origin[row], low, high, inner_low, inner_high, zero, zero))
    parts = [np.zeros((len(visit), len(paths)), np.int64)]
    parts[0][[0, 1, 3, 4]], parts[0][7] = paths.T, PATH

    def add(chosen: Bool, low: Int64, high: Int64, event: int, skips: Bool | None = None) -> None:
        part = visit[:, chosen]
        part[3], part[4], part[7] = low[chosen], high[chosen], event
        if skips is not None:
            part[8] = skips[chosen]
        parts.append(part)

    add(~is_whole, own, high, BY_PIECE)
    add(~is_whole & (own > low), low, own, size + UNRESOLVED, skips)
    add(~is_whole & starts, zero + stops, zero + outside, size + STOP)
    add(~is_whole & starts, zero + outside, zero - 1, size + UNRESOLVED, skips)
    add(is_whole & (inner_high > inner_low), inner_low, inner_high, MOVED)
    ranges = np.concatenate(parts, axis=1)
    ranges = ranges[:, np.argsort(ranges[0], kind="stable")]
    p, row, depth, low, high, inner_low, inner_high, event, skip = ranges
    last = plan.position_row[positions].astype(np.int64)
    reach = np.stack((last, last + 1), axis=1)
    np.minimum.at(reach[:, 0], p, row)
    np.maximum.at(reach[:, 1], p, row + 1)
    start = np.searchsorted(p, np.arange(positions.size + 1))
    return PieceRanges(
        low, high, inner_low, inner_high, depth, row, event, skip.astype(np.bool_), start, whole, last, reach
    )


@numba.njit(cache=True, nogil=True)
def _below(first_child, children, byte, node, text, begin, end):
    """The node below ``node`` along the bytes ``begin … end`` of the text, or -1."""
    for e in range(begin, end):
        node = child_of(first_child, children, byte, node, text[e])
        if node < 0:
            break
    return node


@numba.njit(cache=True, nogil=True)
def _inner(p, node, positions, split, text, walk):
    """For each visit the range of tokens that continue with a sampled token that is a separate event; empty for
    none."""
    trie_low, trie_high, first_child, children, byte = walk[:5]
    low, high = np.zeros(p.size, np.int64), np.zeros(p.size, np.int64)
    for v in range(p.size):
        if split[p[v]] >= 0:
            at = _below(first_child, children, byte, node[v], text, positions[p[v]], split[p[v]])
            if at >= 0:
                low[v], high[v] = trie_low[at], trie_high[at]
    return low, high


@numba.njit(cache=True, nogil=True)
def _visit(walk, row, position):
    """The node that a row visits at a position, or -1."""
    visit_ptr, visit_node, origin = walk[5:8]
    if visit_ptr[row] == visit_ptr[row + 1]:
        return -1
    first = origin[row] + (visit_node[visit_ptr[row]] != 0)
    visit = visit_ptr[row] + position - first
    return visit_node[visit] if visit_ptr[row] <= visit < visit_ptr[row + 1] else -1


@numba.njit(cache=True, nogil=True)
def _tokens_from(walk, row, text, end):
    """The tokens that follow the text from a row's begin to ``end`` or beyond, as a range of the byte order."""
    trie_low, trie_high, first_child, children, byte = walk[:5]
    node = _visit(walk, row, end - 1)
    if node >= 0:
        node = child_of(first_child, children, byte, node, text[end - 1])
    return (trie_low[node], trie_high[node]) if node >= 0 else (0, 0)


@numba.njit(cache=True, nogil=True)
def _observed(
    positions, whole_S, last_T, text, lengths,
    target_S, offsets_S, piece_S, walk_S, target_T, offsets_T, piece_T, walk_T,
):  # fmt: skip
    """The end of the sampled token where the teacher needs several tokens, the arrays of PiecePlan there, and the
    ranges along the teacher's tokens: position, row, low, high."""
    count = positions.size
    end, observed = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    short, source = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    origin_S, ends_S, origin_T, ends_T = walk_S[7], walk_S[8], walk_T[7], walk_T[8]
    # A teacher row lies inside at most one student token.
    paths, found = np.empty((ends_T.size, 4), np.int64), 0
    for p in range(count):
        e, row = positions[p], whole_S[p]
        if row < 0 or ends_S[row] <= e:
            continue
        stop, at = ends_S[row], last_T[p]
        low, high = _tokens_from(walk_S, row, text, stop)
        if high <= low or ends_T[at] <= e or ends_T[at] >= stop:
            continue
        # The teacher's own tokens, each with exactly the bytes of the text, up to the one that reaches the end.
        before, k = found, at
        while 0 <= ends_T[k] < stop and _visit(walk_T, k, ends_T[k]) >= 0:
            k += 1
            low, high = _tokens_from(walk_T, k, text, stop)
            if high > low:
                paths[found] = p, k, low, high
                found += 1
        if found == before:
            continue
        piece = piece_S[offsets_S[target_S[row]] + e - origin_S[row]]
        first = piece_T[offsets_T[target_T[at]] + e - origin_T[at]]
        end[p] = stop
        source[p] = first if first >= 0 else lengths.size + RESIDUAL
        if piece >= 0 and lengths[piece] == stop - e:
            observed[p] = piece
        else:
            observed[p] = lengths.size + OBSERVED
            short[p] = piece if piece >= 0 else lengths.size + RESIDUAL
    return end, observed, short, source, paths[:found]
