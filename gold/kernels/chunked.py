"""Chunks of several rows a side compared as one: their last rows, scaled by what came before, or their mean rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from gold.kernels.linear import Rows, SharedEvents, remade, split
from gold.kernels.reference import widened

FLOOR = 1e-10
"""Mean probabilities of the student count as at least this much where their logarithm is taken: of a chunk's mean no
logits are left, and a sum of probabilities can be 0."""

Divergence = Callable[[Tensor, Tensor], Tensor]


def sorted_distance(student: Rows, teacher: Rows, backend: ModuleType) -> Tensor:
    """``reference.sorted_l1`` of the probabilities of row n of both sides: [N]."""
    values: list[Tensor] = []
    block = min(student.block_rows, teacher.block_rows)
    for first in range(0, len(student), block):

        def reduce(hidden_S: Tensor, hidden_T: Tensor) -> tuple[Tensor, ...]:
            p = torch.softmax(widened(student.head(hidden_S)), dim=-1)
            with torch.no_grad():
                q = torch.softmax(widened(teacher.head(hidden_T)), dim=-1).to(p)
            return (backend.sorted_l1(p, q),)

        span = slice(first, first + block)
        values += remade(reduce, student.hidden_ND[span], teacher.hidden_ND[span])
    return torch.cat(values) if values else student.hidden_ND.new_zeros(0, dtype=torch.float32)


def scaled_comparison(
    student: Rows,
    teacher: Rows,
    before_S: Tensor,
    before_T: Tensor,
    events: SharedEvents,
    divergence: Divergence,
    backend: ModuleType,
) -> tuple[Tensor, Tensor]:
    """Row n of both sides, times ``exp(before[n])``: the divergence on the shared events, and the sorted L1 distance of
    all other columns: two [N]."""
    kept_S, kept_T = events.kept(student.width, teacher.width)
    values: list[tuple[Tensor, ...]] = []
    block = min(student.block_rows, teacher.block_rows)
    for first in range(0, len(student), block):

        def reduce(hidden_S: Tensor, hidden_T: Tensor, log_S: Tensor, log_T: Tensor) -> tuple[Tensor, ...]:
            logp, other_p = (x + log_S[:, None] for x in split(student.head(hidden_S), kept_S))
            with torch.no_grad():
                parts = split(teacher.head(hidden_T), kept_T)
                logq, other_q = ((x + log_T.to(x)[:, None]).to(logp) for x in parts)
            return divergence(logp, logq), backend.sorted_l1(other_p.exp(), other_q.exp())

        span = slice(first, first + block)
        values.append(
            remade(reduce, student.hidden_ND[span], teacher.hidden_ND[span], before_S[span], before_T[span])
        )
    matched, unmatched = _joined(values, student)
    return matched, unmatched


@dataclass(frozen=True)
class Chunks:
    """Which chunk each row of both sides is in, ascending; every chunk has rows on both sides."""

    chunk_S: Tensor
    chunk_T: Tensor
    count: int


@dataclass(frozen=True)
class Projected:
    """A sparse matrix from student tokens to teacher tokens, entry e ``weight_E[e]`` at (``ids_V[e]``, ``ids_W[e]``),
    and the stop event of both sides, which is taken to itself."""

    ids_V: Tensor
    ids_W: Tensor
    weight_E: Tensor
    stops_V: Tensor
    stops_W: Tensor


def projected_divergence(
    student: Rows, teacher: Rows, chunks: Chunks, projection: Projected, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """Divergence per chunk between mean rows, the student's taken to the teacher's tokens, and the teacher's mass on
    those that are reached, on which both sides are conditioned: two [C]."""
    there = projection.ids_V < student.width
    there &= (projection.ids_W < teacher.width).to(there.device)
    ids_V, weight_E = projection.ids_V[there], projection.weight_E[there]
    reached_W, column_E = torch.unique(
        projection.ids_W[there.to(projection.ids_W.device)], return_inverse=True
    )
    column_E = column_E.to(ids_V.device)

    def compare(p_CV: Tensor, q_CW: Tensor) -> tuple[Tensor, ...]:
        taken = p_CV.new_zeros(p_CV.shape[0], reached_W.numel())
        taken = taken.index_add(1, column_E, p_CV[:, ids_V] * weight_E.to(p_CV))
        p = torch.cat((taken, p_CV[:, projection.stops_V].sum(-1, keepdim=True)), dim=-1)
        q = torch.cat((q_CW[:, reached_W], q_CW[:, projection.stops_W].sum(-1, keepdim=True)), dim=-1).to(p)
        mass = q.sum(-1)
        p, q = (x / x.sum(-1, keepdim=True).clamp(min=FLOOR) for x in (p, q))
        return divergence(p.clamp(min=FLOOR).log(), q.log()), mass

    value, mass = _over_chunks(student, teacher, chunks, compare)
    return value, mass


def mean_comparison(
    student: Rows,
    teacher: Rows,
    chunks: Chunks,
    events: SharedEvents,
    divergence: Divergence,
    backend: ModuleType,
) -> tuple[Tensor, Tensor]:
    """Mean rows of each chunk: the divergence on the shared events, and the sorted L1 distance of all other columns:
    two [C]."""
    kept_S, kept_T = events.kept(student.width, teacher.width)

    def compare(p_CV: Tensor, q_CW: Tensor) -> tuple[Tensor, ...]:
        (p, other_p), (q, other_q) = (
            (torch.cat((x[:, kept.ids], x[:, kept.stops].sum(-1, keepdim=True)), dim=-1), x[:, kept.left])
            for x, kept in ((p_CV, kept_S), (q_CW, kept_T))
        )
        q, other_q = q.to(p), other_q.to(p)
        return divergence(p.clamp(min=FLOOR).log(), q.log()), backend.sorted_l1(other_p, other_q)

    matched, unmatched = _over_chunks(student, teacher, chunks, compare)
    return matched, unmatched


def _over_chunks(
    student: Rows, teacher: Rows, chunks: Chunks, compare: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """``compare`` of the mean probabilities of each chunk's rows, [C, V] and [C, W], a block of chunks at a time."""
    edges = torch.arange(chunks.count + 1)
    starts_S, starts_T = (
        torch.searchsorted(c, edges.to(c)).tolist() for c in (chunks.chunk_S, chunks.chunk_T)
    )
    values: list[tuple[Tensor, ...]] = []
    block = min(student.block_rows, teacher.block_rows)
    for first in range(0, chunks.count, block):
        last = min(first + block, chunks.count)
        span_S, span_T = (slice(starts[first], starts[last]) for starts in (starts_S, starts_T))
        here_S, here_T = chunks.chunk_S[span_S] - first, chunks.chunk_T[span_T] - first

        def reduce(
            hidden_S: Tensor,
            hidden_T: Tensor,
            here_S: Tensor = here_S,
            here_T: Tensor = here_T,
            count: int = last - first,
        ) -> tuple[Tensor, ...]:
            p = _means(student, hidden_S, here_S, count)
            with torch.no_grad():
                q = _means(teacher, hidden_T, here_T, count)
            return compare(p, q)

        values.append(remade(reduce, student.hidden_ND[span_S], teacher.hidden_ND[span_T]))
    return _joined(values, student)


def _means(rows: Rows, hidden: Tensor, chunk: Tensor, count: int) -> Tensor:
    """Mean probabilities of the rows of each chunk: [count, width]."""
    share = 1.0 / torch.bincount(chunk, minlength=count).double()
    total: Tensor | float = 0.0
    for first in range(0, hidden.shape[0], rows.block_rows):
        here = chunk[first : first + rows.block_rows]

        def part(hidden: Tensor, here: Tensor = here) -> tuple[Tensor, ...]:
            prob = torch.softmax(widened(rows.head(hidden)), dim=-1)
            weighted = prob * share[here].to(prob)[:, None]
            return (prob.new_zeros(count, rows.width).index_add(0, here, weighted),)

        (added,) = remade(part, hidden[first : first + rows.block_rows])
        total = total + added
    assert isinstance(total, Tensor)
    return total


def _joined(values: list[tuple[Tensor, ...]], student: Rows) -> tuple[Tensor, ...]:
    if not values:
        empty = student.hidden_ND.new_zeros(0, dtype=torch.float32)
        return empty, empty
    return tuple(torch.cat(column) for column in zip(*values, strict=True))
