"""Microbatches: rollouts that go through the models together, retokenized for each of their teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from gold.align.batch import AlignedBatch
from gold.align.model_inputs import aligned_text, rollout_batches, teacher_logits
from gold.align.texts import AlignedText
from gold.kernels.logits import LazyLogits
from gold.losses import LossInputs
from gold.losses.mixture import OtherTeacher, mixed_rows
from gold.rollout.pieces import Rows, rows_of
from gold.rollout.types import Rollout
from gold.tokenize.conversation import TemplateForm
from gold.train.setup import Setup


@dataclass(frozen=True)
class Microbatch:
    """Rollouts with their texts retokenized for each teacher, by its name (several with a mix, else one; "" without a
    teacher, where terms that need one are not computed). ``teacher_logits``, once requested, are one per rollout and
    teacher; ``baselines`` are subtracted from the advantages of policy gradients, by objective;
    ``later`` are the returns of the turns after each rollout."""

    rollouts: tuple[Rollout, ...]
    batches: Mapping[str, AlignedBatch]
    teacher_logits: Mapping[str, Sequence[LazyLogits]] = field(default_factory=dict)
    baselines: Mapping[str, Tensor] = field(default_factory=dict)
    later: Tensor | None = None

    @property
    def batch(self) -> AlignedBatch:
        """The texts aligned with the first teacher's tokens."""
        return next(iter(self.batches.values()))

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher scores the texts."""
        return "" not in self.batches


def compared_rows(setup: Setup, rollouts: Sequence[Rollout]) -> Rows:
    """The rollouts as rows that can be compared with their teachers."""
    forms = partial(teacher_forms, setup)
    return rows_of(rollouts, forms, setup.recipe.thinking, setup.form.opens_thinking)


def teacher_forms(setup: Setup, rollout: Rollout) -> list[TemplateForm]:
    """What the chat templates of a rollout's teachers write."""
    names = setup.teachers.of(rollout.prompt) if setup.teachers else ()
    return [setup.forms[name] for name in names if name in setup.forms]


def build_microbatches(
    setup: Setup, rollouts: Sequence[Rollout], alone: Sequence[Rollout] = ()
) -> tuple[list[Microbatch], list[str]]:
    """The rollouts in microbatches, each with one set of teachers and retokenized for them; and for each rollout that a
    teacher cannot score, the reason. These are in no microbatch. Those ``alone`` have no teacher."""
    asked = setup.members if setup.needs_teacher else {}
    skipped: list[str] = []
    by_teachers: dict[tuple[str, ...], list[tuple[Rollout, dict[str, AlignedText]]]] = {}
    for rollout in rollouts:
        names = setup.teachers.of(rollout.prompt) if setup.teachers else ("",)
        texts = {name: aligned_text(rollout, setup.pairs[name]) for name in names}
        reasons = (asked[n].misfit(rollout.prompt, texts[n].teacher.ids.size) for n in names if n in asked)
        if reason := next(filter(None, reasons), ""):
            skipped.append(reason)
        else:
            by_teachers.setdefault(names, []).append((rollout, texts))
    for rollout in alone:
        by_teachers.setdefault(("",), []).append((rollout, {"": aligned_text(rollout, setup.own_pair)}))
    microbatches, recipe = [], setup.recipe
    for names in sorted(by_teachers):
        given = by_teachers[names]
        own = [rollout for rollout, _ in given]
        sizes = recipe.micro_batch_size, recipe.micro_batch_tokens
        for chosen in rollout_batches(own, *sizes, packed=recipe.packing):
            texts_of = {name: [given[i][1][name] for i in chosen] for name in names}
            batches = _aligned(setup, texts_of)
            microbatches.append(Microbatch(tuple(given[i][0] for i in chosen), batches))
    return microbatches, skipped


def _aligned(setup: Setup, texts_of: Mapping[str, Sequence[AlignedText]]) -> dict[str, AlignedBatch]:
    """The texts aligned with each teacher's, in the order of the names; the first refers to the others."""
    found: dict[str, AlignedBatch] = {}
    for name in reversed(list(texts_of)):
        device = setup.members[name].device if name in setup.members else None
        others = tuple(reversed(found.values())) if name == next(iter(texts_of)) else ()
        pair = setup.pairs.get(name, setup.own_pair)
        found[name] = AlignedBatch(texts_of[name], pair, setup.student.device, device, others)
    return {name: found[name] for name in texts_of}


def ask_teachers(setup: Setup, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
    """The microbatches with their teachers' logits; each teacher gets one request for all its texts of the step.

    Raises:
        TeacherError: one of them fails.
    """
    found: list[dict[str, list[LazyLogits]]] = [{} for _ in microbatches]
    for name, teacher in setup.members.items():
        own = [(m, f) for m, f in zip(microbatches, found, strict=True) if name in m.batches]
        rollouts = [r for m, _ in own for r in m.rollouts]
        texts = [t for m, _ in own for t in m.batches[name].texts]
        answers = iter(teacher_logits(teacher, rollouts, texts) if rollouts else [])
        for m, by_name in own:
            by_name[name] = list(islice(answers, len(m.rollouts)))
    return [replace(m, teacher_logits=f) for m, f in zip(microbatches, found, strict=True)]


@dataclass(frozen=True)
class Impossible:
    """The texts of a step to which a teacher gives probability 0: their number, and an example."""

    count: int
    example: str = ""


def drop_impossible(setup: Setup, microbatches: Sequence[Microbatch]) -> tuple[list[Microbatch], Impossible]:
    """The microbatches with an empty text in place of each text to which a teacher gives probability 0, since no loss
    can learn from it; and their number."""
    kept, count, example = [], 0, ""
    for microbatch in microbatches:
        lost: set[int] = set()
        for name, batch in microbatch.batches.items() if microbatch.has_teacher else ():
            targets = batch.teacher.targets.split(np.diff(batch.teacher.row_starts).tolist())
            for number, (rows, target) in enumerate(
                zip(microbatch.teacher_logits[name], targets, strict=True)
            ):
                if not rows.partial or not (mask := rows.impossible(target, batch.teacher.stops)).any():
                    continue
                lost.add(number)
                row = int(torch.nonzero(mask)[0])
                teacher, token = setup.members[name], int(target[row])
                shown = "the end" if token < 0 else f"token {teacher.vocabulary.label(token)!r}"
                key = microbatch.rollouts[number].prompt.key
                example = (
                    example or f", that of prompt {key} for one: {shown}, number {row}, by {teacher.name}"
                )
        count += len(lost)
        kept.append(_without(setup, microbatch, lost) if lost else microbatch)
    return kept, Impossible(count, example)


def _without(setup: Setup, microbatch: Microbatch, lost: set[int]) -> Microbatch:
    nothing = setup.student.vocabulary.encode(b"")
    rollouts = tuple(r.without_text(nothing) if n in lost else r for n, r in enumerate(microbatch.rollouts))
    texts_of = {name: [aligned_text(r, setup.pairs[name]) for r in rollouts] for name in microbatch.batches}
    logits = {
        name: [rows.select(slice(0)) if n in lost else rows for n, rows in enumerate(each)]
        for name, each in microbatch.teacher_logits.items()
    }
    return Microbatch(rollouts, _aligned(setup, texts_of), logits)


def loss_inputs(
    setup: Setup, microbatch: Microbatch, student_logits: LazyLogits, reference: LazyLogits | None = None
) -> LossInputs:
    """The input of the objectives for a microbatch."""
    batch = microbatch.batch
    if not microbatch.teacher_logits:
        return LossInputs(batch, student_logits, None, reference, later=microbatch.later)
    first, *others = [LazyLogits.joined(microbatch.teacher_logits[name]) for name in microbatch.batches]
    mix = setup.teachers.mix if setup.teachers else None
    other_teachers: tuple[OtherTeacher, ...] = ()
    if mix is not None and setup.mixes_bytes:
        other_teachers = tuple(map(OtherTeacher, list(microbatch.batches.values())[1:], others))
    elif mix is not None:
        # With one vocabulary the mixture's rows are ordinary teacher rows.
        first, mix = mixed_rows([first, *others], batch.vocabularies.student.size, mix), None
    return LossInputs(
        batch,
        student_logits,
        first,
        reference,
        mix,
        other_teachers,
        microbatch.baselines,
        later=microbatch.later,
    )
