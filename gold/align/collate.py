"""Rollouts, read by both models: from what the student wrote to microbatches of aligned texts and teacher states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gold.align.batch import AlignedBatch
from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.kernels.logits import LazyLogits
from gold.models.language_model import LanguageModel
from gold.models.states import PaddedStates
from gold.rollout.types import Rollout
from gold.teachers.protocol import Teacher
from gold.tokenize.chat import begins_anew


def read(rollout: Rollout, vocabularies: VocabularyPair) -> AlignedText:
    """The rollout with the teacher's own reading of the same bytes."""
    anew = begins_anew(rollout.prompt)
    return AlignedText(
        rollout.ids,
        rollout.tokenized,
        vocabularies.read(rollout.tokenized, at_start=anew),
        rollout.stopped,
        rollout.sampled_mask,
        rollout.advantage,
        rollout.sampling_logprobs if rollout.sampled else None,
        anew,
    )


def microbatches(rollouts: Sequence[Rollout], size: int) -> list[list[int]]:
    """Indices of the rollouts in groups of at most ``size``, texts of like length together, longest first."""
    order = sorted(
        range(len(rollouts)), key=lambda i: (-len(rollouts[i].prompt_ids) - rollouts[i].ids.size, i)
    )
    return [order[first : first + size] for first in range(0, len(order), size)]


def aligned_batch(
    texts: Sequence[AlignedText],
    vocabularies: VocabularyPair,
    student: torch.device,
    teacher: Teacher | None,
    other_batches: Sequence[AlignedBatch] = (),
) -> AlignedBatch:
    """A microbatch on the devices of both models; ``other_batches``: as further teachers read it."""
    return AlignedBatch(texts, vocabularies, student, teacher.device if teacher else None, other_batches)


def student_states(model: LanguageModel, rollouts: Sequence[Rollout]) -> PaddedStates:
    """The student's states over the rollouts' own ids: one per sampled id, the stop id included."""
    return PaddedStates.of(
        [r.prompt_ids for r in rollouts],
        [r.tokenized.ids for r in rollouts],
        [r.ids.size for r in rollouts],
        model.pad_id,
        model.device,
    )


def misfit(teacher: Teacher, rollout: Rollout, text: AlignedText) -> str:
    """Why the teacher cannot score a rollout after its prompt, "" where it can."""
    return teacher.misfit(rollout.prompt, text.teacher.ids.size)


def teacher_rows(
    teacher: Teacher, rollouts: Sequence[Rollout], texts: Sequence[AlignedText]
) -> list[LazyLogits]:
    """The teacher's rows for each text, in its own tokens and template."""
    prompts = [r.prompt.for_teacher for r in rollouts]
    return teacher.score(prompts, [t.teacher for t in texts], [t.stopped for t in texts])
