"""What the two models are given of rollouts: aligned texts, batches of similar length, padded sequences."""

from __future__ import annotations

from collections.abc import Sequence

from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.kernels.logits import LazyLogits
from gold.models.language_model import LanguageModel
from gold.models.padding import PaddedStates, packed_batches, ragged_batches
from gold.rollout.types import Rollout
from gold.teachers.protocol import Teacher
from gold.tokenize.chat import starts_text


def aligned_text(rollout: Rollout, vocabularies: VocabularyPair) -> AlignedText:
    """The rollout with the teacher's tokens of the same bytes."""
    anew = starts_text(rollout.prompt)
    return AlignedText(
        rollout.ids,
        rollout.tokenized,
        vocabularies.to_teacher(rollout.tokenized, at_start=anew),
        rollout.stopped,
        rollout.sampled_mask,
        rollout.advantage,
        rollout.sampling_logprobs if rollout.sampled else None,
        anew,
    )


def rollout_batches(
    rollouts: Sequence[Rollout], size: int, tokens: int | None = None, packed: bool = False
) -> list[list[int]]:
    """Indices of the rollouts in microbatches grouped by length, longest first: of at most ``size``, or with ``tokens``
    of any number, as long as they have no more tokens, padded to the longest or ``packed``; a single one always
    fits."""
    lengths = [len(rollout.prompt_ids) + rollout.ids.size for rollout in rollouts]
    if tokens is not None:
        return packed_batches(lengths, tokens) if packed else ragged_batches(lengths, tokens)
    order = sorted(range(len(rollouts)), key=lambda i: (-lengths[i], i))
    return [order[first : first + size] for first in range(0, len(order), size)]


def student_states(
    model: LanguageModel, rollouts: Sequence[Rollout], *, packed: bool = False
) -> PaddedStates:
    """The student's states for the rollouts' own ids: one per id, including the stop id."""
    texts = [r.prompt_ids for r in rollouts], [r.tokenized.ids for r in rollouts]
    rows = [r.ids.size for r in rollouts]
    if packed:
        return PaddedStates.packed(*texts, rows, model.device)
    return PaddedStates.of(*texts, rows, model.pad_id, model.device)


def teacher_logits(
    teacher: Teacher, rollouts: Sequence[Rollout], texts: Sequence[AlignedText]
) -> list[LazyLogits]:
    """The teacher's logits for each text, in its own tokens and template."""
    prompts = [r.prompt.for_teacher for r in rollouts]
    return teacher.score(prompts, [t.teacher for t in texts], [t.stopped for t in texts])
