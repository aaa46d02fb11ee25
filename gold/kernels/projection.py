"""Next-token distributions of both models projected onto pieces, the units that both vocabularies can be split into,
and compared there.

Rows of logits exist for one block of positions at a time, on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gold.bytes.events import BY_PIECE, EXTRA_EVENTS, MOVED, OBSERVED, PATH, RESIDUAL, STOP, UNRESOLVED
from gold.kernels.backends import piece_masses, row_divergence, row_statistics, segment_logsumexp
from gold.kernels.layout import ByteLayout, Columns, KeptEvents, KernelTrie, Tokens
from gold.kernels.lm_head import summed
from gold.kernels.logits import LazyLogits, spans
from gold.kernels.reference import SMOOTHING, MixedKL, coarsened, divergence_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gold.bytes.pieces import PieceRanges

NEVER = -1e4
"""Log-probability of a token on the path whose probability is 0: −inf would make all weights equal, this keeps their
order. Events reached through it alone count as not reached."""
WHITE_SHARE = 0.99
"""A target with more than this share on white space counts as white space only."""


class PieceEvents(NamedTuple):
    """Per position the log-mass of every event, [positions, events], and that of the sampled token along this side's
    own tokens, [positions]: −inf where not requested, else contained in one of the events. Not normalised; where
    nothing is reached, all mass is unresolved."""

    joint: Tensor
    path: Tensor


class PieceTarget(NamedTuple):
    """A teacher's events per position: log-probabilities, [positions, events], −inf for events not reached, the
    probabilities of the last ``EXTRA_EVENTS``, and the share that was moved to the sampled token, [positions]."""

    logq: Tensor
    named: Tensor
    moved: Tensor


class PieceColumns:
    """The pieces of the columns of one side's rows, cached per device and row width.

    ``piece_at``: the piece at each byte of the vocabulary, −1 for none; ``offsets``: first byte of each id; ``pieces``:
    the number of pieces.
    """

    def __init__(
        self, trie: KernelTrie, piece_at: NDArray[np.int32], offsets: NDArray[np.int64], pieces: int
    ) -> None:
        self.pieces = pieces
        self.events = pieces + EXTRA_EVENTS
        self._trie = trie
        self._bytes = piece_at, offsets
        self._bytes_on: dict[torch.device, tuple[Tensor, ...]] = {}
        self._pools: dict[tuple[torch.device, int], Tensor] = {}
        self._columns: dict[tuple[torch.device, int], Columns] = {}

    def pool(self, device: torch.device, width: int) -> Tensor:
        """Ids: text in byte order, the stop ids, and every other column of rows ``width`` wide."""
        if (device, width) not in self._pools:
            trie = self._trie.trie
            parts = trie.order, trie.stops, self._trie.outside(width)
            self._pools[device, width] = _tensor(np.concatenate(parts), device)
        return self._pools[device, width]

    def piece_of(self, ids: Tensor, depth: Tensor | int) -> Tensor:
        """The event of text tokens after their first ``depth`` bytes."""
        if ids.device not in self._bytes_on:
            self._bytes_on[ids.device] = tuple(_tensor(array, ids.device) for array in self._bytes)
        piece_at, offsets = self._bytes_on[ids.device]
        piece = piece_at[offsets[ids] + depth]
        return torch.where(piece >= 0, piece, self.pieces + RESIDUAL)

    def columns(self, device: torch.device, width: int) -> Columns:
        """The event of every column of a row that begins at its position."""
        if (device, width) not in self._columns:
            trie = self._trie.trie
            event = torch.full((width,), self.pieces + UNRESOLVED, device=device)
            text = _tensor(trie.order, device)
            event[text] = self.piece_of(text, 0)
            event[_tensor(trie.stops, device)] = self.pieces + STOP
            self._columns[device, width] = Columns(event, self.events)
        return self._columns[device, width]


def _tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(device)


@dataclass(frozen=True)
class PieceSide:
    """One side of a batch for the projection onto pieces: which ids of which row count at which position."""

    ranges: PieceRanges
    layout: ByteLayout
    columns: PieceColumns


@dataclass(frozen=True)
class PieceBatch:
    """Both sides of a batch, and what was sampled at each position: ``observed short source observed_white`` are those
    of the plan, on the student's device; ``white``: which pieces are white space only."""

    student: PieceSide
    teacher: PieceSide
    observed: Tensor
    short: Tensor
    source: Tensor
    observed_white: Tensor
    white: Tensor

    def __len__(self) -> int:
        """Number of positions."""
        return int(self.observed.shape[0])


def piece_divergence(
    student: LazyLogits,
    teacher: LazyLogits,
    batch: PieceBatch,
    divergence: Callable[[Tensor, Tensor], Tensor],
    mask_white: bool,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over positions of the divergence on the events that both sides can reach there, each times its weight (1
    without one), and parts, [positions] each, without gradient.

    Parts: ``unresolved``, the student's mass on all other events; ``residual``, the teacher's on text that begins with
    no piece; ``observed``, the mass moved to the sampled token; ``white``, 1 where the target is white space only. With
    ``mask_white`` the divergence is 0 there.
    """
    parts = "unresolved", "residual", "observed", "white"
    if not len(batch):
        empty = torch.zeros(0, device=student.device)
        return empty.sum(), dict.fromkeys(parts, empty)
    white = torch.nonzero(batch.white)[:, 0]
    blocks = []
    for span in spans(len(batch), min(student.block_rows, teacher.block_rows)):
        needed = needed_rows(batch.student, span)
        blocks.append((needed, (span, needed, needed_rows(batch.teacher, span))))

    kept = _named_events(batch.student)
    one_device = student.device == teacher.device

    def compare(block: LazyLogits, part: tuple[slice, Tensor, Tensor]) -> tuple[Tensor, ...]:
        span, needed_S, needed_T = part
        joint, _ = piece_events(block, needed_S, batch.student, batch.short, span)
        with torch.no_grad():
            target = piece_target(teacher.select(needed_T), needed_T, batch, span)
            joint_T, named, moved = (x.to(joint) for x in target)
            only_white = joint_T[:, white].exp().sum(-1) + named[:, OBSERVED] * batch.observed_white[span]
            only_white = only_white > WHITE_SHARE
        if isinstance(divergence, MixedKL) and one_device:
            value, mass = row_divergence(
                joint, joint_T, kept, kept, divergence, smoothing=SMOOTHING, only_common=True, overwrite=True
            )
        else:
            logp, logq = coarsened(joint, kept), coarsened(joint_T, kept)
            common = torch.isfinite(logp[:, :-1]) & torch.isfinite(logq[:, :-1])
            value, mass = divergence_of(divergence, logp, logq, "bucket", SMOOTHING, common)
        if mask_white:
            value = value.masked_fill(only_white, 0.0)
        if weight is not None:
            value = value * weight[span].to(value)
        unresolved = (1.0 - SMOOTHING) * (1.0 - mass) + SMOOTHING
        return value.sum(), unresolved, named[:, RESIDUAL], moved, only_white.to(mass)

    total, *found = summed(compare, student, blocks)
    return total, dict(zip(parts, found, strict=True))


def piece_target(teacher: LazyLogits, needed: Tensor, batch: PieceBatch, span: slice) -> PieceTarget:
    """The teacher's events at some positions, with the sampled token as an event; ``teacher``, ``needed``: see
    ``piece_events``."""
    joint, path = piece_events(teacher, needed, batch.teacher, batch.short, span)
    none = torch.full((len(joint),), -1, device=joint.device)
    norm, _, _, _ = row_statistics(joint, none, none[:0])
    joint, path = joint - norm[:, None], path - norm
    joint = joint.masked_fill(joint < NEVER / 2, -torch.inf)
    observed, source = (x[span].to(joint.device) for x in (batch.observed, batch.source))
    at = torch.nonzero(torch.isfinite(path))[:, 0]
    to, fro = observed[at], source[at]
    # Rounding, and tokens unknown to a row, may make the part larger than the whole.
    path[at] = torch.minimum(path[at], joint[at, fro])
    joint[at, fro] += torch.log1p(-torch.exp(path[at] - joint[at, fro]).nan_to_num(0.0))
    joint[at, to] = torch.logaddexp(joint[at, to], path[at])
    return PieceTarget(joint, joint[:, -EXTRA_EVENTS:].exp(), path.exp())


def piece_events(
    rows: LazyLogits,
    needed: Tensor,
    side: PieceSide,
    short: Tensor,
    span: slice,
) -> PieceEvents:
    """The events of the positions ``span`` of a batch; ``rows`` are its rows ``needed``.

    With ``b_k`` the byte position of row k, ``W_k`` the probability of the tokens before it relative to the last row
    that begins at or before e, r the bytes from ``b_k`` to e, and ψ(s) the longest piece that is a prefix of s::

        joint[e, u] = Σ_{k: b_k ≤ e} W_k · π_k{tokens v = r·s, s not empty, ψ(s) = u}     u a piece; none: RESIDUAL
        joint[e, stop] = Σ_{k: b_k = e} W_k · π_k(stop)
        joint[e, unresolved] = Σ_k W_k · π_k{tokens equal to r except the row's own, special tokens, padding columns}

    At position p, tokens that continue with the sampled token and have the event ``short[p]`` are OBSERVED instead.
    """
    device, ranges = rows.device, side.ranges
    entry = _entries(side, needed, short[span].to(device), span, rows.width)
    whole = _local(needed, ranges.whole[span], device)
    last = _local(needed, ranges.last[span], device)
    columns = side.columns.columns(device, rows.width)
    target = side.layout.target[needed]
    full, full_at, values, order, steps = zip(
        *(
            _masses_of_block(rows, block, target, columns, whole, entry)
            for block in spans(len(rows), rows.block_rows)
        ),
        strict=True,
    )

    # Cumulative sums in float64: they decrease without bound.
    step = torch.cat(steps).double().clamp(min=NEVER)
    before = torch.cumsum(step, 0) - step
    index = torch.cat(order)
    weight = before[entry.row[index]] - before[last[entry.position[index]]]
    positions = whole.shape[0]
    value = torch.cat(values)
    value = value + weight.to(value.dtype)
    position, event = entry.position[index], entry.event[index]

    is_path = event == PATH
    path = segment_logsumexp(value[is_path], position[is_path], positions)
    path = path.masked_fill(path < NEVER / 2, -torch.inf)
    cell = position[~is_path] * side.columns.events + event[~is_path]
    whole_rows = full[0] if len(full) == 1 else torch.cat(full)
    given = whole_rows, torch.cat(full_at), value[~is_path], cell, positions
    joint: Tensor = _Joint.apply(*given)  # type: ignore[no-untyped-call]
    return PieceEvents(joint, path)


def _masses_of_block(
    rows: LazyLogits, block: slice, target: Tensor, columns: Columns, whole: Tensor, entry: _Entries
) -> tuple[Tensor, ...]:
    """``reference.piece_masses`` of one block of rows: the sums of whole rows and their positions, the values of single
    tokens and their indices in ``entry``, and the step of each row."""
    first, end = block.start, block.stop
    logits = rows.select(block).logits()
    mine = torch.nonzero((entry.row >= first) & (entry.row < end))[:, 0]
    at = torch.nonzero((whole >= first) & (whole < end))[:, 0]
    tokens = Tokens(entry.row[mine] - first, entry.id[mine], entry.moved[mine])
    overwrite = rows.may_overwrite(logits)
    masses, value, step = piece_masses(
        logits, target[first:end], columns, whole[at] - first, tokens, overwrite=overwrite
    )
    if rows.partial:
        # Unknown tokens of a partial row share its tail mass; such rows sum to one.
        step = torch.where(torch.isneginf(step), logits[:, -1], step)
    return masses, at, value, mine, step


class _Joint(torch.autograd.Function):
    """Rows of events with single values added to some of them: [positions, events]."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, at: Tensor, value: Tensor, cell: Tensor, positions: int) -> Tensor:
        every = full.shape[0] == positions
        joint = full.clone() if every else full.new_full((positions, full.shape[1]), -torch.inf)
        if not every:
            joint.index_copy_(0, at, full)
        cells, to = torch.unique(cell, return_inverse=True)
        parts = torch.cat((value, joint.view(-1)[cells]))
        to = torch.cat((to, torch.arange(cells.shape[0], device=cells.device)))
        whole = segment_logsumexp(parts, to, cells.shape[0])
        joint.view(-1)[cells] = whole
        joint[:, -1] = torch.where(torch.isneginf(joint.amax(-1)), 0.0, joint[:, -1])
        share = torch.exp(parts - whole[to]).masked_fill(torch.isneginf(whole[to]), 0.0)
        ctx.save_for_backward(at, cells, to, share)
        ctx.values, ctx.every = value.shape[0], every
        return joint

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        at, cells, to, share = ctx.saved_tensors
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        parts = grad.view(-1)[cells][to] * share
        grad.view(-1)[cells] = parts[ctx.values :]
        return grad if ctx.every else grad[at], None, parts[: ctx.values], None, None


def _named_events(side: PieceSide) -> KeptEvents:
    """The events of a side without RESIDUAL and UNRESOLVED."""
    ids = torch.arange(side.columns.events - 2, device=side.layout.device)
    return KeptEvents(ids, ids[:0], side.columns.events)


class _Entries(NamedTuple):
    """Single tokens that count at a position: index of the row in ``needed``, id, position within the block, event, and
    whether the token is excluded from the sums of its row."""

    row: Tensor
    id: Tensor
    position: Tensor
    event: Tensor
    moved: Tensor


def _entries(side: PieceSide, needed: Tensor, short: Tensor, span: slice, width: int) -> _Entries:
    """The ranges of some positions, expanded to tokens."""
    device, ranges = side.layout.device, side.ranges
    lo, hi = (int(ranges.start[p]) for p in (span.start, span.stop))

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(getattr(ranges, name)[lo:hi]).to(device)

    pool = side.columns.pool(device, width)
    low, high = tensor("low"), tensor("high")
    size = torch.where(high < 0, pool.shape[0], high) - low
    owner = torch.repeat_interleave(size)
    member = torch.arange(owner.numel(), device=device) - (torch.cumsum(size, 0) - size)[owner] + low[owner]
    ids, kind = pool[member], tensor("event")[owner]
    counts = torch.from_numpy(np.diff(ranges.start[span.start : span.stop + 1])).to(device)
    position = torch.repeat_interleave(counts)[owner]

    named = (kind == BY_PIECE) | (kind == MOVED)
    event = kind.clone()
    event[named] = side.columns.piece_of(ids[named], tensor("depth")[owner][named])
    inner = (member >= tensor("inner_low")[owner]) & (member < tensor("inner_high")[owner])
    inner &= named & (event == short[position])
    event = torch.where(inner, side.columns.pieces + OBSERVED, event)
    row = tensor("row")[owner]
    kept = ~(tensor("skips")[owner] & (ids == side.layout.target[row])) & ((kind != MOVED) | inner)
    local = torch.searchsorted(needed, row)
    return _Entries(*(x[kept] for x in (local, ids, position, event, kind == MOVED)))


def needed_rows(side: PieceSide, span: slice) -> Tensor:
    """The rows that some positions need, ascending."""
    reach = side.ranges.reach[span]
    change = np.zeros(int(reach[:, 1].max()) + 1, np.int64)
    np.add.at(change, reach[:, 0], 1)
    np.add.at(change, reach[:, 1], -1)
    return torch.from_numpy(np.flatnonzero(np.cumsum(change))).to(side.layout.device)


def _local(needed: Tensor, row: NDArray[Any], device: torch.device) -> Tensor:
    """Indices of rows in ``needed``; −1 stays −1."""
    given = torch.from_numpy(row).to(device)
    return torch.where(given >= 0, torch.searchsorted(needed, given), -1)
