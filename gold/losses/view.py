"""What a loss is given and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from gold.aligned import AlignedBatch
from gold.kernels.linear import Rows, token_logp
from gold.losses.mixture import FurtherTeacher, Mix

Need = Literal["nothing", "tokens", "top_k", "rows"]
"""What an objective asks of a teacher, each including those before: nothing, log-probabilities of given tokens, those
of its k likeliest tokens with the mass of all others, or full rows."""


@dataclass(frozen=True)
class View:
    """One microbatch as a loss sees it: the texts with their index arrays, and the models' states over them.

    ``teacher`` is None for objectives that need no teacher; ``reference``, the student before training with one row for
    each of the student's, for all but those that ask for it. With a ``mix`` the teacher is the first of several, and
    ``further`` are the others, in its order.
    """

    batch: AlignedBatch
    student: Rows
    teacher: Rows | None
    backend: ModuleType
    teacher_backend: ModuleType
    reference: Rows | None = None
    mix: Mix | None = None
    further: tuple[FurtherTeacher, ...] = ()

    @property
    def teacher_rows(self) -> Rows:
        """The teacher's states.

        Raises: ValueError if there are none.
        """
        if self.teacher is None:
            raise ValueError("this objective needs a teacher's rows, and the view has no teacher")
        return self.teacher


@dataclass(frozen=True)
class Loss:
    """Sum of an objective over a microbatch in nats, with gradient.

    ``parts`` are sums over the same unit, without gradient, by name; ``sequence_logp`` both sides' summed
    log-probability of the sampled texts, stop events included, where the objective comes across it.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    sequence_logp: Mapping[str, Tensor] = field(default_factory=dict)


def possible(logp: Tensor) -> Tensor:
    """Log-probabilities of what has happened, in nats: an event of probability 0 counts as one of e^-10000, so that a
    single one does not make all sums infinite."""
    return logp.clamp(min=-1e4)


@dataclass(frozen=True)
class Scores:
    """One side's log-probability of each row's own event, its token or the stop, and of both apart, in nats: [N]."""

    event: Tensor
    target: Tensor
    stop: Tensor


def student_scores(view: View) -> Scores:
    """The student's log-probability of what it wrote, with gradient; ``possible`` too, for texts of a data set."""
    batch = view.batch
    target, stop = (
        possible(x) for x in token_logp(view.student, batch.target_S, batch.stops_S, view.backend)
    )
    return Scores(torch.where(batch.stop_rows, stop, target), target, stop)


@torch.no_grad()
def teacher_scores(view: View) -> Scores:
    """The teacher's log-probability of the same texts in its own tokens, without gradient; what it rules out is
    ``possible`` here."""
    batch = view.batch
    target, stop = (
        possible(x)
        for x in token_logp(view.teacher_rows, batch.target_T, batch.stops_T, view.teacher_backend)
    )
    return Scores(torch.where(batch.target_T < 0, stop, target), target, stop)


def sequence_logp(
    batch: AlignedBatch, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Sums over sampled texts of both sides' log-probability, from (target, stop) of each row; stop events included."""
    parts = {}
    for name, (target, stop), is_stop, starts in (
        ("student_logp", student, batch.stop_rows, batch.row_starts),
        ("teacher_logp", teacher, batch.target_T < 0, batch.teacher_row_starts),
    ):
        logp = torch.where(is_stop, stop.detach(), target.detach())
        sums = [
            logp[int(lo) : int(hi)].sum()
            for lo, hi, text in zip(starts[:-1], starts[1:], batch.texts, strict=True)
            if text.sampled
        ]
        parts[name] = torch.stack(sums).sum() if sums else logp.new_zeros(())
    return parts
