"""Divergences on a support: the events on which two models that do not share a vocabulary can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gold.aligned import AlignedBatch
from gold.kernels.linear import Rows, SharedEvents, byte_tables, filled_byte_tables, shared_divergence, summed
from gold.kernels.tables import common_events
from gold.losses.divergences import Divergence, form_of, reverse_kl
from gold.losses.mixture import FurtherTeacher
from gold.losses.view import Loss, View, sequence_logp

Where = Literal["everywhere", "one_to_one"]
HalfLife = Annotated[float, Field(gt=0)]
TopK = Annotated[int, Field(ge=1)]


def bytes_divergence(
    view: View, divergence: Divergence, *, where: Where = "everywhere", half_life: HalfLife | None = None
) -> Loss:
    """Divergence between next-byte distributions at every byte of the texts, and at the stop event.

    Each model's rows become one table of byte events on their own; a row is compared on the events that both sides
    resolve, all else being one more event. What a teacher that gives its likeliest tokens alone leaves untold is taken
    to be as the student has it, without gradient: there is nothing to learn from it.

    Several teachers are one distribution: the mixture of their tables, on the events that all of them resolve.
    """
    batch = view.batch
    at, weight = byte_positions(batch, where), fading(batch.byte_offsets, half_life)
    teachers = (FurtherTeacher(batch, view.teacher_rows, view.teacher_backend), *view.further)

    def compare(block: Rows, texts: slice) -> tuple[Tensor, ...]:
        layout, place = batch.layout_S.texts(texts.start, texts.stop), _span(batch.position_starts, texts)
        table, log_target, log_stop = byte_tables(block, layout, view.backend, keep=True)
        here = at[(at >= place.start) & (at < place.stop)] - place.start
        resolved = layout.resolved[here]
        positions, _, events = batch.path
        inside = (positions >= place.start) & (positions < place.stop)
        path = positions[inside] - place.start, events[inside]
        sides = [_teacher_side(teacher, texts, path, here, table.detach()) for teacher in teachers]
        resolved_T = sides[0].resolved
        for side in sides[1:]:
            resolved_T = resolved_T & side.resolved
        logp = common_events(table[here], resolved, resolved_T)
        # Leaked before they are mixed, so that there is always an event that all of them allow.
        tables = [common_events(side.logq, resolved_T, resolved) for side in sides]
        logq = tables[0] if view.mix is None else view.mix.of(tables)
        value = divergence(logp, logq) * weight[place][here].to(logp)
        wanted = logp.gather(1, logq.argmax(-1, keepdim=True))[:, 0].exp()
        scores = (x for side in sides for x in side.scores)
        return value.sum(), wanted, logp[:, -1].exp(), log_target, log_stop, *scores

    blocks = [(_span(batch.row_starts, texts), texts) for texts in _text_blocks(batch, view.student)]
    total, wanted, rest, *scores = summed(compare, view.student, blocks)
    parts = {"wanted": wanted.sum(), "missed": (wanted < 0.01).sum(), "rest": rest.sum()}
    mine, *theirs = zip(scores[::2], scores[1::2], strict=True)
    if view.mix is None:
        return Loss(total, parts, sequence_logp(batch, mine, theirs[0]))
    logp_of_texts: dict[str, Tensor] = {}
    for (name, share), teacher, side in zip(view.mix.weights.items(), teachers, theirs, strict=True):
        found = sequence_logp(teacher.batch, mine, side)
        logp_of_texts["student_logp"] = found["student_logp"]
        logp_of_texts[f"teacher_logp[{name}]"] = found["teacher_logp"]
        logp_of_texts["teacher_logp"] = logp_of_texts.get("teacher_logp", 0.0) + share * found[
            "teacher_logp"
        ].to(rest)
    return Loss(total, parts, logp_of_texts)


def _text_blocks(batch: AlignedBatch, rows: Rows) -> list[slice]:
    """As many whole texts at a time as a block of rows holds, or one that is longer."""
    blocks, first = [], 0
    for last in range(1, len(batch.texts) + 1):
        if last == len(batch.texts) or batch.row_starts[last + 1] - batch.row_starts[first] > rows.block_rows:
            blocks.append(slice(first, last))
            first = last
    return blocks or [slice(0, 0)]


def _span(starts: NDArray[np.int64], texts: slice) -> slice:
    """From where the first of some texts begins to where the last one ends."""
    return slice(int(starts[texts.start]), int(starts[texts.stop]))


@dataclass(frozen=True)
class _TeacherSide:
    """A teacher's byte table at some positions, which events it resolves there, and its log-probabilities of its own
    tokens and of the stop event, [N] each."""

    logq: Tensor
    resolved: Tensor
    scores: tuple[Tensor, Tensor]


@torch.no_grad()
def _teacher_side(
    teacher: FurtherTeacher, texts: slice, path: tuple[Tensor, Tensor], here: Tensor, mine: Tensor
) -> _TeacherSide:
    layout = teacher.batch.layout_T.texts(texts.start, texts.stop)
    rows = teacher.rows.select(_span(teacher.batch.teacher_row_starts, texts))
    if rows.partial:
        log_path = mine.new_zeros(len(mine)).index_put(path[:1], mine[path])
        filling = (x.to(layout.device) for x in (mine, log_path))
        table, *scores = filled_byte_tables(rows, layout, teacher.backend, *filling)
    else:
        table, *scores = byte_tables(rows, layout, teacher.backend)
    logq = table.to(mine)[here]
    resolved = layout.resolved.to(mine.device)[here]
    if rows.partial:
        resolved = resolved & torch.isfinite(logq)  # of what is all told, only what is told
    return _TeacherSide(logq, resolved, (scores[0], scores[1]))


def states_divergence(
    view: View,
    divergence: Divergence,
    *,
    rest: Literal["bucket", "renormalise"] = "bucket",
    top_k: TopK | None = None,
    top_k_of: Literal["student", "teacher"] = "teacher",
    where: Where = "everywhere",
    half_life: HalfLife | None = None,
) -> Loss:
    """Divergence between next-token distributions at states that have read the same bytes, on the tokens that both
    vocabularies have and the stop event; ``rest``: what else there is is one more event (``bucket``) or is conditioned
    away (``renormalise``). ``top_k``: only that many of these events, the likeliest of one side in each row, are told
    apart. Where both vocabularies are one this is the plain token-level objective of GKD.

    Source: Agarwal et al. 2306.13649, equation 2, for the plain form.
    """
    rows_S, rows_T, offsets = state_rows(view.batch, where)
    total, mass = shared_divergence(
        view.student.select(rows_S),
        view.teacher_rows.select(rows_T),
        view.batch.shared_events,
        form_of(divergence) or divergence,
        view.backend,
        renormalise=rest == "renormalise",
        top_k=top_k,
        top_k_of_teacher=top_k_of == "teacher",
        weight_N=None if half_life is None else fading(offsets, half_life),
    )
    return Loss(total, {"shared_mass": mass.sum()})


def reference_kl(view: View) -> Loss:
    """Reverse KL, token by token, from the student to what it was before training: a leash, whatever the teacher says.

    At every state of texts that the student wrote; padding rows of the output matrix included, as both have them.
    """
    batch = view.batch
    if view.reference is None:
        raise ValueError("reference_kl needs the student's rows before training, and the view has none")
    rows = batch.sampled_rows
    every = torch.arange(view.student.width, device=batch.device)
    none = every[:0]
    total, _ = shared_divergence(
        view.student.select(rows),
        view.reference.select(rows),
        SharedEvents(every, every, none, none, everything=True),
        form_of(reverse_kl) or reverse_kl,
        view.backend,
        renormalise=False,
    )
    return Loss(total)


def byte_positions(batch: AlignedBatch, where: Where = "everywhere") -> Tensor:
    """The byte positions that are compared, ascending: all that both sides supervise, or those of them that lie in
    chunks of one token on both sides, and the stop events."""
    at = batch.supervised_bytes
    return at if where == "everywhere" else at[batch.one_to_one_bytes[at]]


def state_rows(batch: AlignedBatch, where: Where = "everywhere") -> tuple[Tensor, Tensor, Tensor]:
    """Rows of both sides that have read the same bytes, and how many bytes of the text those are; ``one_to_one``: only
    where the next token is a chunk by itself on both sides, or the text ends."""
    rows_S, rows_T = batch.synced_states
    offsets, single = batch.synced_offsets, batch.synced_one_to_one
    if where == "everywhere":
        return rows_S, rows_T, offsets
    return rows_S[single], rows_T[single.to(rows_T.device)], offsets[single]


def fading(offset: Tensor, half_life: float | None) -> Tensor:
    """The weight of each position of a text: half as much every ``half_life`` bytes; 1 where that is None."""
    if half_life is None:
        return torch.ones_like(offset, dtype=torch.float64)
    return torch.exp2(-offset.double() / half_life)
