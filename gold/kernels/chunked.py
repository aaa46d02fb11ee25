"""Comparison of chunks with several rows per side: by their last rows, scaled by the tokens before, or by mean rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gold.kernels.backends import hybrid_distance, sorted_l1
from gold.kernels.lm_head import recomputed, summed
from gold.kernels.logits import LazyLogits, spans
from gold.kernels.reference import MixedKL, finite_divergence, hybrid_of, widened
from gold.kernels.shared import Divergence, SharedEvents

FLOOR = 1e-10
"""Lower bound on the student's mean probabilities where their logarithm is taken: the mean over a chunk has no logits,
and a sum of probabilities can be 0."""


def sorted_distance(student: LazyLogits, teacher: LazyLogits) -> Tensor:
    """Sum over rows n of ``reference.sorted_l1`` of both sides' probabilities."""
    none = torch.empty(0, dtype=torch.int64)
    nothing_S, nothing_T = (none.to(rows.device) for rows in (student, teacher))
    events = SharedEvents(nothing_S, nothing_T, nothing_S, nothing_T)
    before_S, before_T = (torch.zeros(len(rows), device=rows.device) for rows in (student, teacher))
    total, _, _ = scaled_comparison(student, teacher, before_S, before_T, events, MixedKL(student=1.0), 0.0)
    return total


def scaled_comparison(
    student: LazyLogits,
    teacher: LazyLogits,
    before_S: Tensor,
    before_T: Tensor,
    events: SharedEvents,
    divergence: Divergence,
    matched_share: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.hybrid_distance`` of row n of both sides: the sum over rows, and without gradient the divergence and
    the distance of each row: two [N]. A ``MixedKL`` runs in the kernel, any other divergence in torch."""
    kept = events.kept(student.width, teacher.width)
    one_device = kept[0].ids.device == kept[1].ids.device

    def compare(block: LazyLogits, span: slice, log_S: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            logits_T = teacher.select(span).logits()
        given = logits_T, log_S, before_T[span], *kept
        logits = block.logits()
        if isinstance(divergence, MixedKL) and one_device:
            overwrite = block.may_overwrite(logits)
            found = hybrid_distance(logits, *given, divergence, matched_share, overwrite=overwrite)
        else:
            found = hybrid_of(sorted_l1, logits, *given, divergence, matched_share)
        if torch.isinf(found[0].detach()).any():
            found = hybrid_of(sorted_l1, block.logits(), *given, finite_divergence(divergence), matched_share)
        return found[0].sum(), *found[1:]

    total, matched, unmatched = summed(compare, student, _blocks(student, teacher), before_S)
    return total, matched, unmatched


@dataclass(frozen=True)
class Chunks:
    """The chunk of each row of both sides, ascending; every chunk has rows on both sides."""

    chunk_S: Tensor
    chunk_T: Tensor
    count: int


@dataclass(frozen=True)
class Projected:
    """A sparse matrix from student tokens to teacher tokens, entry e ``weight_E[e]`` at (``ids_V[e]``, ``ids_W[e]``),
    and the stop ids of both sides; the stop event maps to itself."""

    ids_V: Tensor
    ids_W: Tensor
    weight_E: Tensor
    stops_V: Tensor
    stops_W: Tensor


def projected_divergence(
    student: LazyLogits, teacher: LazyLogits, chunks: Chunks, projection: Projected, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """Sum over chunks of the divergence between mean rows, the student's projected to teacher tokens, and without
    gradient the teacher's mass on the projected tokens, [C]. Both sides are conditioned on those tokens."""
    there = projection.ids_V < student.width
    there &= (projection.ids_W < teacher.width).to(there.device)
    ids_V, weight_E = projection.ids_V[there], projection.weight_E[there]
    reached_W, column_E = torch.unique(
        projection.ids_W[there.to(projection.ids_W.device)], return_inverse=True
    )
    column_E, order = torch.sort(column_E.to(ids_V.device), stable=True)
    ids_V, weight_E = ids_V[order], weight_E[order]
    entries_W = torch.bincount(column_E, minlength=reached_W.numel())

    def compare(p_CV: Tensor, q_CW: Tensor) -> tuple[Tensor, ...]:
        entries = p_CV[:, ids_V] * weight_E.to(p_CV)
        taken = torch.segment_reduce(entries.T.contiguous(), "sum", lengths=entries_W).T
        p = torch.cat((taken, p_CV[:, projection.stops_V].sum(-1, keepdim=True)), dim=-1)
        q = torch.cat((q_CW[:, reached_W], q_CW[:, projection.stops_W].sum(-1, keepdim=True)), dim=-1).to(p)
        mass = q.sum(-1)
        p, q = (x / x.sum(-1, keepdim=True).clamp(min=FLOOR) for x in (p, q))
        return divergence(p.clamp(min=FLOOR).log(), q.log()).sum(), mass

    total, mass = _over_chunks(student, teacher, chunks, compare)
    return total, mass


def mean_comparison(
    student: LazyLogits,
    teacher: LazyLogits,
    chunks: Chunks,
    events: SharedEvents,
    divergence: Divergence,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean rows of each chunk: the divergence on the shared events plus the sorted L1 distance of all other columns,
    summed over chunks, and without gradient each of the two per chunk: two [C]."""
    kept_S, kept_T = events.kept(student.width, teacher.width)

    def compare(p_CV: Tensor, q_CW: Tensor) -> tuple[Tensor, ...]:
        (p, other_p), (q, other_q) = (
            (torch.cat((x[:, kept.ids], x[:, kept.stops].sum(-1, keepdim=True)), dim=-1), x[:, kept.left])
            for x, kept in ((p_CV, kept_S), (q_CW, kept_T))
        )
        q, other_q = q.to(p), other_q.to(p)
        matched = divergence(p.clamp(min=FLOOR).log(), q.log())
        unmatched = sorted_l1(other_p, other_q)
        return matched.sum() + unmatched.sum(), matched, unmatched

    total, matched, unmatched = _over_chunks(student, teacher, chunks, compare)
    return total, matched, unmatched


def _blocks(student: LazyLogits, teacher: LazyLogits) -> list[tuple[slice, slice]]:
    """Blocks of rows of both sides, sized for the wider one."""
    return [(span, span) for span in spans(len(student), min(student.block_rows, teacher.block_rows))]


def _over_chunks(
    student: LazyLogits,
    teacher: LazyLogits,
    chunks: Chunks,
    compare: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """``compare`` of the mean probabilities of each chunk's rows, [C, V] and [C, W], one block of chunks at a time."""
    if not chunks.count:
        p, q = (torch.zeros((0, rows.width), device=rows.device) for rows in (student, teacher))
        return compare(p, q)
    edges = torch.arange(chunks.count + 1)
    starts_S, starts_T = (
        torch.searchsorted(c, edges.to(c)).tolist() for c in (chunks.chunk_S, chunks.chunk_T)
    )
    blocks = []
    for span in spans(chunks.count, min(student.block_rows, teacher.block_rows)):
        mine, theirs = (slice(starts[span.start], starts[span.stop]) for starts in (starts_S, starts_T))
        blocks.append((mine, (span, mine, theirs)))

    def reduce(block: LazyLogits, part: tuple[slice, slice, slice]) -> tuple[Tensor, ...]:
        span, mine, theirs = part
        count = span.stop - span.start
        p = _means(block, chunks.chunk_S[mine] - span.start, count)
        with torch.no_grad():
            q = _means(teacher.select(theirs), chunks.chunk_T[theirs] - span.start, count)
        return compare(p, q)

    return summed(reduce, student, blocks)


def _means(rows: LazyLogits, chunk: Tensor, count: int) -> Tensor:
    """Mean probabilities of the rows of each chunk: [count, width]."""
    share = 1.0 / torch.bincount(chunk, minlength=count).double()
    total: Tensor | float = 0.0
    for span in spans(len(rows), rows.block_rows):

        def part(block: LazyLogits, here: Tensor = chunk[span]) -> tuple[Tensor, ...]:
            prob = torch.softmax(widened(block.logits()), dim=-1)
            weighted = prob * share[here].to(prob)[:, None]
            # Summed in row order on every device.
            return (torch.segment_reduce(weighted, "sum", lengths=torch.bincount(here, minlength=count)),)

        (added,) = recomputed(part, rows.select(span))
        total = total + added
    assert isinstance(total, Tensor)
    return total
