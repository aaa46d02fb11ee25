"""Two models' next tokens pushed onto the pieces that both vocabularies can be cut back to, and compared there.

Rows of logits exist for one block of positions at a time, on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gold.kernels.layout import ByteLayout, Columns
from gold.kernels.linear import Rows, bucketed, spans, summed
from gold.kernels.reference import LEAK, leaked, row_logsumexp

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

EXTRA_EVENTS = 4
"""Columns after the pieces: the stop event, the sampled token, text that begins with no piece, and the rest, last."""
STOP, OBSERVED, RESIDUAL, REST = range(EXTRA_EVENTS)
BY_PIECE, MOVED, PATH = -1, -2, -3
"""What else a run of tokens can be, besides the number of an event."""
NEVER = -1e4
"""Log-probability of a token on the path that has none: −inf would make all weights equal, this keeps their order. What
it alone reaches is not reached."""
WHITE_SHARE = 0.99
"""A target that has more than this on white space alone has nothing else."""


class PieceEvents(NamedTuple):
    """Per position the log-mass of every event, [positions, events], and that of the sampled token along this side's
    own tokens, [positions]: −inf where it is not asked for, else a part of one of the events. Not normalised."""

    joint: Tensor
    path: Tensor


@dataclass(frozen=True)
class PieceSide:
    """One side of a batch as it is pushed onto pieces.

    ``runs`` are the arrays ``low high inner_low inner_high depth row event skips start whole last reach`` of a plan,
    documented where it is made; ``piece_at``: the piece at each byte of the vocabulary, −1 for none; ``offsets``: where
    the bytes of each id begin.
    """

    runs: Mapping[str, NDArray[Any]]
    layout: ByteLayout
    piece_at: Tensor
    offsets: Tensor
    pieces: int

    @classmethod
    def of(
        cls,
        runs: Mapping[str, NDArray[Any]],
        layout: ByteLayout,
        piece_at: NDArray[Any],
        offsets: NDArray[Any],
        pieces: int,
    ) -> PieceSide:
        """The side on its layout's device."""
        at, first = (torch.from_numpy(a.astype(np.int64)).to(layout.device) for a in (piece_at, offsets))
        return cls(runs, layout, at, first, pieces)

    @property
    def events(self) -> int:
        """Number of columns."""
        return self.pieces + EXTRA_EVENTS

    def pool(self, width: int) -> Tensor:
        """Ids: text in byte order, the stop ids, and every other column of rows that are ``width`` wide."""
        trie, layout = self.layout.trie, self.layout
        parts = trie["order"], trie["stops"], layout.outside(width), np.arange(layout.size, width)
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(layout.device)

    def piece_of(self, ids: Tensor, depth: Tensor | int) -> Tensor:
        """The event that text tokens are behind their first ``depth`` bytes."""
        piece = self.piece_at[self.offsets[ids] + depth]
        return torch.where(piece >= 0, piece, self.pieces + RESIDUAL)

    def columns(self, width: int) -> Columns:
        """The event of every column of a row that begins at its position."""
        event = torch.full((width,), self.pieces + REST, device=self.layout.device)
        text = torch.from_numpy(self.layout.trie["order"].astype(np.int64)).to(self.layout.device)
        event[text] = self.piece_of(text, 0)
        event[self.layout.stops] = self.pieces + STOP
        return Columns(event, self.events)


@dataclass(frozen=True)
class PieceBatch:
    """Both sides of a batch, and for each position what was sampled: ``observed short source observed_white`` of a
    plan, documented where it is made, on the student's device; ``white``: which pieces are white space alone."""

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
    student: Rows,
    teacher: Rows,
    batch: PieceBatch,
    divergence: Callable[[Tensor, Tensor], Tensor],
    backends: tuple[ModuleType, ModuleType],
    mask_white: bool,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the divergences at each position on the events that both sides can reach there, each times its weight (1
    without one), and parts, [positions] each, without gradient.

    Parts: ``rest``, the student's mass on all else; ``residual``, the teacher's on text that begins with no piece;
    ``observed``, what was moved to the sampled token; ``white``, 1 where the target is white space alone. With
    ``mask_white`` the divergence is 0 there.
    """
    parts = "rest", "residual", "observed", "white"
    if not len(batch):
        empty = student.hidden_ND.new_zeros(0, dtype=torch.float32)
        return empty.sum(), dict.fromkeys(parts, empty)
    white = torch.nonzero(batch.white)[:, 0]
    blocks = []
    for span in spans(len(batch), min(student.block_rows, teacher.block_rows)):
        needed = needed_rows(batch.student, span)
        blocks.append((needed, (span, needed, needed_rows(batch.teacher, span))))

    def compare(block: Rows, part: tuple[slice, Tensor, Tensor]) -> tuple[Tensor, ...]:
        span, needed_S, needed_T = part
        logp, _ = _normalised(
            piece_events(block, needed_S, batch.student, batch.short, span, backends[0]).joint
        )
        with torch.no_grad():
            logq, moved = piece_target(teacher.select(needed_T), needed_T, batch, span, backends[1])
            logq, moved = logq.to(logp), moved.to(logp)
            named = logq[:, batch.student.pieces :].exp()
            only_white = logq[:, white].exp().sum(-1) + named[:, OBSERVED] * batch.observed_white[span]
            only_white = only_white > WHITE_SHARE
            apart = ((logq > NEVER / 2) & torch.isfinite(logp))[:, :-1]
            apart[:, batch.student.pieces + RESIDUAL] = False
        logp, logq = leaked(bucketed(logp, apart), LEAK), leaked(bucketed(logq, apart), LEAK)
        value = divergence(logp, logq)
        if mask_white:
            value = value.masked_fill(only_white, 0.0)
        if weight is not None:
            value = value * weight[span].to(value)
        return value.sum(), logp[:, -1].exp(), named[:, RESIDUAL], moved, only_white.to(logp)

    total, *found = summed(compare, student, blocks)
    return total, dict(zip(parts, found, strict=True))


def piece_target(
    teacher: Rows, needed: Tensor, batch: PieceBatch, span: slice, backend: ModuleType
) -> tuple[Tensor, Tensor]:
    """The teacher's log-probabilities of the events of some positions, the sampled token's own included, and the share
    that was moved to it; for ``teacher``, ``needed`` see ``piece_events``."""
    joint, path = piece_events(teacher, needed, batch.teacher, batch.short, span, backend)
    logq, norm = _normalised(joint)
    path = path - norm
    observed, source = (x[span].to(joint.device) for x in (batch.observed, batch.source))
    at = torch.nonzero(torch.isfinite(path))[:, 0]
    to, fro = observed[at], source[at]
    # Rounding, and tokens that a row does not know, may make the part larger than the whole.
    path[at] = torch.minimum(path[at], logq[at, fro])
    logq[at, fro] += torch.log1p(-torch.exp(path[at] - logq[at, fro]).nan_to_num(0.0))
    logq[at, to] = torch.logaddexp(logq[at, to], path[at])
    return logq, path.exp()


def piece_events(
    rows: Rows,
    needed: Tensor,
    side: PieceSide,
    short: Tensor,
    span: slice,
    backend: ModuleType,
) -> PieceEvents:
    """The events of the positions ``span`` of a batch; ``rows`` are its rows ``needed``.

    With ``b_k`` the byte position of row k, ``W_k`` the probability of the tokens before it relative to the last row
    that begins at e or before, r the bytes from ``b_k`` to e, and ψ(s) the longest piece that s begins with::

        joint[e, u] = Σ_{k: b_k ≤ e} W_k · π_k{tokens v = r·s, s not empty, ψ(s) = u}     u a piece; none: RESIDUAL
        joint[e, stop] = Σ_{k: b_k = e} W_k · π_k(stop)
        joint[e, rest] = Σ_k W_k · π_k{tokens equal to r but for the row's own, special tokens, padding columns}

    Of position p the tokens that go on with the sampled one and have the event ``short[p]`` are OBSERVED instead.
    """
    device, runs = rows.hidden_ND.device, side.runs
    entry = _entries(side, needed, short[span].to(device), span, rows.width)
    whole = _local(needed, runs["whole"][span], device)
    last = _local(needed, runs["last"][span], device)
    columns = side.columns(rows.width)
    target = side.layout.target[needed]
    size, positions = rows.block_rows, whole.shape[0]
    values, order, full, full_at, steps = [], [], [], [], []
    for part in spans(len(rows), size):
        first, end = part.start, part.stop
        logits = rows.select(part).logits()
        norm, step, _ = backend.row_statistics(logits, target[first:end], side.layout.stops)
        if rows.partial:
            # Of a token that is not known it is known that the others hold it.
            step = torch.where(torch.isneginf(step), logits[:, -1] - norm, step)
        steps.append(step)
        mine = torch.nonzero((entry.row >= first) & (entry.row < end))[:, 0]
        row = entry.row[mine] - first
        values.append(logits[row, entry.id[mine]] - norm[row])
        order.append(mine)
        at = torch.nonzero((whole >= first) & (whole < end))[:, 0]
        chosen = whole[at] - first
        moved = entry.moved[mine]
        if moved.any():
            logits = logits.index_put((row[moved], entry.id[mine][moved]), logits.new_tensor(-torch.inf))
        full.append(backend.column_logsumexp(logits[chosen], columns) - norm[chosen, None])
        full_at.append(at)

    # Weights in float64: their absolute values fall without bound.
    step = torch.cat(steps).double().clamp(min=NEVER)
    before = torch.cumsum(step, 0) - step
    index = torch.cat(order)
    weight = before[entry.row[index]] - before[last[entry.position[index]]]
    value = torch.cat(values)
    value = value + weight.to(value.dtype)
    position, event = entry.position[index], entry.event[index]

    is_path = event == PATH
    path = backend.segment_logsumexp(value[is_path], position[is_path], positions)
    path = path.masked_fill(path < NEVER / 2, -torch.inf)
    cells, cell = torch.unique(position[~is_path] * side.events + event[~is_path], return_inverse=True)
    joint = value.new_full((positions, side.events), -torch.inf)
    joint = joint.index_copy(0, torch.cat(full_at), torch.cat(full)).flatten()
    both = torch.cat((value[~is_path], joint[cells]))
    cell = torch.cat((cell, torch.arange(cells.shape[0], device=device)))
    joint = joint.scatter(0, cells, backend.segment_logsumexp(both, cell, cells.shape[0]))
    return PieceEvents(joint.view(positions, side.events), path)


def _normalised(joint: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that sum to one, and the logarithm of what they were divided by, 0 where that is −inf: all is rest there."""
    norm = row_logsumexp(joint)
    nothing = torch.isneginf(norm)
    norm = norm.masked_fill(nothing, 0.0)
    logp = joint - norm[:, None]
    rest = torch.where(nothing, 0.0, logp[:, -1])
    return torch.cat((logp[:, :-1], rest[:, None]), dim=-1), norm


class _Entries(NamedTuple):
    """Single tokens that count at a position: row (of those at hand), id, position (of the block), event, and whether
    it counts for the whole row's."""

    row: Tensor
    id: Tensor
    position: Tensor
    event: Tensor
    moved: Tensor


def _entries(side: PieceSide, needed: Tensor, short: Tensor, span: slice, width: int) -> _Entries:
    """The runs of some positions, token by token."""
    device, runs = side.layout.device, side.runs
    lo, hi = (int(runs["start"][p]) for p in (span.start, span.stop))

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(runs[name][lo:hi]).to(device)

    pool = side.pool(width)
    low, high = tensor("low"), tensor("high")
    size = torch.where(high < 0, pool.shape[0], high) - low
    owner = torch.repeat_interleave(size)
    member = torch.arange(owner.numel(), device=device) - (torch.cumsum(size, 0) - size)[owner] + low[owner]
    ids, kind = pool[member], tensor("event")[owner]
    counts = torch.from_numpy(np.diff(runs["start"][span.start : span.stop + 1])).to(device)
    position = torch.repeat_interleave(counts)[owner]

    named = (kind == BY_PIECE) | (kind == MOVED)
    event = kind.clone()
    event[named] = side.piece_of(ids[named], tensor("depth")[owner][named])
    inner = (member >= tensor("inner_low")[owner]) & (member < tensor("inner_high")[owner])
    inner &= named & (event == short[position])
    event = torch.where(inner, side.pieces + OBSERVED, event)
    row = tensor("row")[owner]
    kept = ~(tensor("skips")[owner] & (ids == side.layout.target[row])) & ((kind != MOVED) | inner)
    local = torch.searchsorted(needed, row)
    return _Entries(*(x[kept] for x in (local, ids, position, event, kind == MOVED)))


def needed_rows(side: PieceSide, span: slice) -> Tensor:
    """The rows that some positions need, ascending."""
    reach = side.runs["reach"][span]
    change = np.zeros(int(reach[:, 1].max()) + 1, np.int64)
    np.add.at(change, reach[:, 0], 1)
    np.add.at(change, reach[:, 1], -1)
    return torch.from_numpy(np.flatnonzero(np.cumsum(change))).to(side.layout.device)


def _local(needed: Tensor, row: NDArray[Any], device: torch.device) -> Tensor:
    """Where rows are among those needed; −1 stays −1."""
    given = torch.from_numpy(row).to(device)
    return torch.where(given >= 0, torch.searchsorted(needed, given), -1)
