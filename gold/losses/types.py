"""Input and output types of losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gold.align.batch import AlignedBatch
from gold.kernels.lm_head import token_logp
from gold.kernels.logits import LazyLogits
from gold.losses.importance import ImportanceWeights
from gold.losses.mixture import Mix, OtherTeacher

Need = Literal["nothing", "tokens", "top_k", "rows"]
"""What an objective needs from a teacher, each level including those before: nothing, log-probabilities of given
tokens, those of its k most probable tokens with the tail mass, or full rows."""


@dataclass(frozen=True)
class LossInputs:
    """One microbatch as input of a loss: the texts with their index arrays, and the models' states over them.

    ``teacher`` is None for objectives that need no teacher; ``reference``, the student before training with one row for
    each of the student's, is None for all objectives that do not need it. With a ``mix`` the teacher is the first of
    several, and ``other_teachers`` are the others, in its order. ``baselines``: for policy gradients, by name, the
    baseline subtracted from the advantage of each student row, in nats. ``importance``: weights of texts that another
    policy than the current student sampled; None: every weight is 1. ``later``: for each text that is a turn of a
    conversation, the return of the turns after it, in nats, for policy gradients whose horizon is the conversation.
    """

    batch: AlignedBatch
    student: LazyLogits
    teacher: LazyLogits | None
    reference: LazyLogits | None = None
    mix: Mix | None = None
    other_teachers: tuple[OtherTeacher, ...] = ()
    baselines: Mapping[str, Tensor] = field(default_factory=dict)
    importance: ImportanceWeights | None = None
    later: Tensor | None = None

    @property
    def teacher_rows(self) -> LazyLogits:
        """The teacher's states.

        Raises: ValueError if there are none.
        """
        if self.teacher is None:
            raise ValueError("this objective needs a teacher's rows, and the inputs have none")
        return self.teacher


@dataclass(frozen=True)
class Loss:
    """Sum of an objective over a microbatch in nats, with gradient.

    ``parts`` are sums over the same unit, without gradient, by name: the metrics of a step have the mean of each.
    ``details`` are more of them, which no metric shows. ``sequence_logp``, where the objective computes
    it, has both sides' summed log-probability of the sampled texts, including stop events, as far as both are defined,
    and the bytes of these.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    sequence_logp: Mapping[str, Tensor] = field(default_factory=dict)
    details: Mapping[str, Tensor] = field(default_factory=dict)


IMPOSSIBLE = -1e4
"""Log-probability, in nats, used for an observed event of probability 0."""


def possible(logp: Tensor) -> Tensor:
    """Log-probabilities of observed events, in nats: an event of probability 0 counts as one of e^-10000, so that a
    single one does not make all sums infinite."""
    return logp.clamp(min=IMPOSSIBLE)


@dataclass(frozen=True)
class TargetLogp:
    """One side's log-probability of each row's target event, its token or the stop, and of its single id, in nats:
    [N]."""

    event: Tensor
    target: Tensor

    @classmethod
    def of(cls, target: Tensor, stop: Tensor, is_stop: Tensor) -> TargetLogp:
        """From the log-probabilities of tokens and of the stop event; ``event`` is passed through ``possible``."""
        return cls(possible(torch.where(is_stop, stop, target)), target)


def student_target_logp(inputs: LossInputs) -> TargetLogp:
    """The student's log-probability of the tokens it wrote, with gradient."""
    batch = inputs.batch
    target, stop = token_logp(inputs.student, batch.student.targets, batch.student.stops)
    return TargetLogp.of(target, stop, batch.stop_rows)


@torch.no_grad()
def teacher_target_logp(inputs: LossInputs) -> TargetLogp:
    """The teacher's log-probability of the same texts in its own tokens, without gradient."""
    batch = inputs.batch
    target, stop = token_logp(inputs.teacher_rows, batch.teacher.targets, batch.teacher.stops)
    return TargetLogp.of(target, stop, batch.teacher.targets < 0)


def sequence_logp(batch: AlignedBatch, student: TargetLogp, teacher: TargetLogp) -> dict[str, Tensor]:
    """Sums over the spans of sampled texts of both sides' log-probability, including stop events, and their bytes.

    Tokens after the last span of a truncated text are left out: single tokens do not give the probability that the
    teacher's text continues this way, only that it continues with a token that ends there.
    """
    span_S, span_T, _ = batch.spans
    inside = span_S >= 0
    return {
        "student_logp": student.event.detach()[inside].sum(),
        "teacher_logp": teacher.event[span_T >= 0].sum(),
        "logp_bytes": batch.row_bytes[inside].sum(),
    }
