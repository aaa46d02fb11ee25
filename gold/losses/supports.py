"""Divergences on a support: the events on which models with different vocabularies can be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gold.align.batch import AlignedBatch
from gold.bytes.events import STOP_EVENT, UNRESOLVED_EVENT
from gold.kernels.layout import ByteLayout
from gold.kernels.lm_head import summed
from gold.kernels.logits import LazyLogits
from gold.kernels.reference import Unshared, finite_where_either_is, normalised
from gold.kernels.shared import SharedEvents, shared_divergence
from gold.kernels.tables import (
    byte_table,
    common_events,
    filled_table,
    in_byte_order,
    joint_table,
    row_masses,
)
from gold.losses.divergences import Divergence, form_of, reverse_kl
from gold.losses.mixture import OtherTeacher
from gold.losses.types import Loss, LossInputs, TargetLogp, possible, sequence_logp

Where = Literal["everywhere", "one_to_one"]
HalfLife = Annotated[float, Field(gt=0)]
TopK = Annotated[int, Field(ge=1)]


def bytes_divergence(
    inputs: LossInputs,
    divergence: Divergence,
    *,
    where: Where = "everywhere",
    half_life: HalfLife | None = None,
) -> Loss:
    """Divergence between next-byte distributions at every byte of the texts, and at the stop event.

    Each model's rows become a table of byte events, compared on the events that both sides resolve, with all other mass
    as one more event. The tail mass of a teacher's top k tokens is distributed like the student's own probabilities,
    without gradient. Several teachers are one distribution: the mixture of their tables, on the events that all
    resolve.
    """
    batch = inputs.batch
    at, weight = byte_positions(batch, where), _of_positions(inputs, half_life)
    teachers = [_Teacher.of(t) for t in (OtherTeacher(batch, inputs.teacher_rows), *inputs.other_teachers)]
    any_partial = any(teacher.rows.partial for teacher in teachers)

    def compare(block: LazyLogits, window: _Window) -> tuple[Tensor, ...]:
        place = window.places
        here = at[(at >= place.start) & (at < place.stop)] - place.start
        path = _path_within(batch, place)
        teacher_side = partial(_teacher_side, places=place, path=path, here=here)
        # The student's logits are kept until their gradient is computed: teachers that do not need them are computed
        # first.
        sides = [] if any_partial else list(map(teacher_side, teachers))
        mass, *mine, _ = row_masses(block, window.layout, keep=True)
        table = byte_table(mass, mine[0], window.layout)
        if any_partial:
            sides = list(map(partial(teacher_side, table_S=table.detach()), teachers))
        resolved = window.layout.resolved[here]
        resolved_T = reduce(torch.logical_and, [side.resolved for side in sides])
        logp = common_events(table[here], resolved, resolved_T)
        # Smoothed before they are mixed, so that at least one event is possible under all of them.
        tables = [common_events(side.logq.to(logp), resolved_T, resolved) for side in sides]
        logq = tables[0] if inputs.mix is None else inputs.mix.of(tables)
        logp, logq = finite_where_either_is(logp, logq)
        value = divergence(logp, logq) * weight[place][here].to(logp)
        top1 = logp.gather(1, logq.argmax(-1, keepdim=True))[:, 0].exp()
        own = (mine[0][window.own], mine[1][window.own], table[path])
        rest = logp[:, -1].exp(), torch.stack([side.rest for side in sides]).mean(0)
        return value.sum(), top1, *rest, *own, *(x for side in sides for x in side.scores)

    blocks = [(window.rows, window) for window in _windows(batch, inputs.student, teachers)]
    total, top1, unresolved, open_T, *scores = summed(compare, inputs.student, blocks)
    parts = {
        "teacher_top1_prob": top1.sum(),
        "teacher_top1_missed_share": (top1 < 0.01).sum(),
        "unresolved_mass": unresolved.sum(),
        "teacher_unresolved_mass": open_T.sum(),
    }
    mine, *theirs = zip(scores[::3], scores[1::3], scores[2::3], strict=True)
    if any_partial and inputs.mix is None:
        scored = (
            TargetLogp.of(*side[:2], at)
            for side, at in ((mine, batch.stop_rows), (theirs[0], batch.teacher.targets < 0))
        )
        return Loss(total, parts, sequence_logp(batch, *scored))
    return Loss(total, parts, _path_logp(inputs, mine[2], [side[2] for side in theirs]))


def _path_within(batch: AlignedBatch, places: slice) -> tuple[Tensor, Tensor]:
    """The observed events of some byte positions: each one's position from the first, and the event."""
    positions, _, events = batch.path
    inside = (positions >= places.start) & (positions < places.stop)
    return positions[inside] - places.start, events[inside]


def _path_logp(inputs: LossInputs, mine: Tensor, theirs: Sequence[Tensor]) -> dict[str, Tensor]:
    """As ``sequence_logp``, from the byte tables' log-probabilities of the observed events: [events of ``batch.path``]
    of the student and of each teacher. For a truncated text both are the probability that a text begins with its bytes,
    whatever token crosses its end."""
    batch = inputs.batch
    _, row, event = batch.path
    observed = batch.sampled_row_mask[row]
    for side in (batch, *(teacher.batch for teacher in inputs.other_teachers)):
        observed = observed & side.observed_path
    mine, *theirs = (possible(x.to(mine))[observed].sum() for x in (mine, *theirs))
    found = {"student_logp": mine, "logp_bytes": (event[observed] != STOP_EVENT).sum()}
    if inputs.mix is None:
        return {**found, "teacher_logp": theirs[0]}
    shares = inputs.mix.weights
    found |= {f"teacher_logp[{name}]": logp for name, logp in zip(shares, theirs, strict=True)}
    found["teacher_logp"] = torch.stack([w * x for w, x in zip(shares.values(), theirs, strict=True)]).sum()
    return found


@dataclass(frozen=True)
class _Window:
    """Byte positions compared together: the student's layout of them, the ``rows`` it needs, and which of these begin
    there."""

    places: slice
    layout: ByteLayout
    rows: slice
    own: slice


def _windows(batch: AlignedBatch, student: LazyLogits, teachers: Sequence[_Teacher]) -> list[_Window]:
    """All byte positions, in ranges that need about as many student rows as a block holds.

    A range begins where a text does or where tokens of all sides do, so that a side's table depends only on the rows
    that begin there and the few before whose tokens could cross into it.
    """
    begins = [batch.student.begins, *(teacher.begins for teacher in teachers)]
    together = reduce(np.intersect1d, begins)
    cuts = np.union1d(batch.student.position_starts, together)
    before = np.searchsorted(batch.student.begins, cuts)
    windows, at, last = [], 0, max(cuts.size - 1, 1)
    while at < last:
        room = max(1, student.block_rows - batch.student.layout.reaching(int(cuts[at]), int(before[at])))
        left = int(before[-1] - before[at])
        even = math.ceil(left / max(1, math.ceil(left / room)))
        end = max(at + 1, int(np.searchsorted(before, before[at] + even, "right")) - 1)
        places = slice(int(cuts[at]), int(cuts[min(end, cuts.size - 1)]))
        windows.append(_window(batch.student.layout, batch.student.begins, places))
        at = end
    return windows


def _window(layout: ByteLayout, begins: NDArray[np.int64], places: slice) -> _Window:
    first, last = np.searchsorted(begins, [places.start, places.stop]).tolist()
    cut, rows = layout.window(places, slice(first, last))
    return _Window(places, cut, rows, slice(first - rows.start, last - rows.start))


@dataclass(frozen=True)
class _Teacher:
    """A teacher of the texts of a batch: its rows, the byte position at which each begins, and its layout."""

    batch: AlignedBatch
    rows: LazyLogits
    begins: NDArray[np.int64]
    layout: ByteLayout

    @classmethod
    def of(cls, teacher: OtherTeacher) -> _Teacher:
        rows, layout = in_byte_order(teacher.rows, teacher.batch.teacher.layout)
        return cls(teacher.batch, rows, teacher.batch.teacher.begins, layout)


@dataclass(frozen=True)
class _TeacherSide:
    """A teacher's byte table at some positions, the events it resolves there, and its log-probabilities of its own
    tokens and of the stop event, [N] each, and of the observed events."""

    logq: Tensor
    resolved: Tensor
    scores: tuple[Tensor, Tensor, Tensor]

    @property
    def rest(self) -> Tensor:
        """The unresolved mass of each position."""
        return self.logq[:, UNRESOLVED_EVENT].exp()


@torch.no_grad()
def _teacher_side(
    teacher: _Teacher,
    places: slice,
    path: tuple[Tensor, Tensor],
    here: Tensor,
    table_S: Tensor | None = None,
) -> _TeacherSide:
    """The teacher's side at ``here`` of ``places``; partial rows need ``table_S``, the student's table."""
    window = _window(teacher.layout, teacher.begins, places)
    layout, rows = window.layout, teacher.rows.select(window.rows)
    mass, target, stop, tail = row_masses(rows, layout)
    joint = joint_table(mass, target, layout)
    if rows.partial:
        if table_S is None:
            raise ValueError("partial rows of a teacher need the student's table for their tail")
        log_path = table_S.new_zeros(len(table_S)).index_put(path[:1], table_S[path])
        filling = (x.to(layout.device) for x in (table_S, log_path))
        table = filled_table(joint, tail, layout, *filling)
    else:
        table = normalised(joint)
    logq, resolved = table.to(here.device)[here], layout.resolved.to(here.device)[here]
    if rows.partial:
        resolved = resolved & ~torch.isneginf(logq)  # without events that no known token reaches
    here_path = table[tuple(x.to(table.device) for x in path)]
    return _TeacherSide(logq, resolved, (target[window.own], stop[window.own], here_path))


def states_divergence(
    inputs: LossInputs,
    divergence: Divergence,
    *,
    unshared: Unshared = "bucket",
    top_k: TopK | None = None,
    top_k_of: Literal["student", "teacher"] = "teacher",
    where: Where = "everywhere",
    half_life: HalfLife | None = None,
) -> Loss:
    """Divergence between next-token distributions at states that have read the same bytes, on the tokens that both
    vocabularies have and the stop event.

    ``unshared``: the mass of all other tokens is one more event (``bucket``) or is conditioned away (``renormalise``).
    ``top_k``: only that many of these events, the most probable of one side in each row, stay separate. With one
    vocabulary this is the plain token-level objective of GKD.

    Source: Agarwal et al. 2306.13649, equation 2, for the plain form.
    """
    rows_S, rows_T, offsets = state_rows(inputs.batch, where)
    weight = None if half_life is None else fading(offsets, half_life)
    total, mass = shared_divergence(
        inputs.student.select(rows_S),
        inputs.teacher_rows.select(rows_T),
        inputs.batch.shared_events,
        form_of(divergence) or divergence,
        unshared=unshared,
        top_k=top_k,
        top_k_of_teacher=top_k_of == "teacher",
        weight_N=_of_states(inputs, rows_S, weight),
    )
    return Loss(total, {"shared_mass": mass.sum()})


def reference_kl(inputs: LossInputs) -> Loss:
    """Reverse KL, token by token, from the student to the student before training: a regulariser independent of the
    teacher.

    At every state of texts that the student wrote; includes padding rows of the output matrix, since both models have
    them.
    """
    batch = inputs.batch
    if inputs.reference is None:
        raise ValueError("reference_kl needs the student's rows before training, and the inputs have none")
    rows = batch.sampled_rows
    every = torch.arange(inputs.student.width, device=batch.device)
    none = every[:0]
    total, _ = shared_divergence(
        inputs.student.select(rows),
        inputs.reference.select(rows),
        SharedEvents(every, every, none, none, everything=True),
        form_of(reverse_kl) or reverse_kl,
        weight_N=_of_states(inputs, rows, None),
    )
    return Loss(total)


def _of_positions(inputs: LossInputs, half_life: float | None) -> Tensor:
    """The weight of each byte position."""
    weight = fading(inputs.batch.byte_offsets, half_life)
    return weight if inputs.importance is None else weight * inputs.importance.of_positions(inputs.batch)


def _of_states(inputs: LossInputs, rows: Tensor, weight: Tensor | None) -> Tensor | None:
    """The weight of each of the given student rows: ``weight``, times that of its state; None: all are 1."""
    if inputs.importance is None:
        return weight
    state = inputs.importance.of_states(inputs.batch)[rows]
    return state if weight is None else weight * state


def byte_positions(batch: AlignedBatch, where: Where = "everywhere") -> Tensor:
    """The byte positions that are compared, ascending: all that both sides supervise, or only those in one-to-one
    chunks, and the stop events."""
    at = batch.supervised_bytes
    return at if where == "everywhere" else at[batch.one_to_one_bytes[at]]


def state_rows(batch: AlignedBatch, where: Where = "everywhere") -> tuple[Tensor, Tensor, Tensor]:
    """Rows of both sides that have read the same bytes, and how many bytes of the text those are; ``one_to_one``: only
    where the next token is a one-to-one chunk, or the text ends."""
    rows_S, rows_T = batch.synced_states
    offsets, single = batch.synced_offsets, batch.synced_one_to_one
    if where == "everywhere":
        return rows_S, rows_T, offsets
    return rows_S[single], rows_T[single.to(rows_T.device)], offsets[single]


def fading(offset: Tensor, half_life: float | None) -> Tensor:
    """The weight of each position of a text: halved every ``half_life`` bytes; 1 where that is None."""
    if half_life is None:
        return torch.ones_like(offset, dtype=torch.float64)
    return torch.exp2(-offset.double() / half_life)
