"""The exact divergence of two models along one text: for `gold align --score`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from gold.align.vocabularies import VocabularyPair
from gold.exact.divergence import ExactText, unresolved
from gold.exact.marginals import marginals
from gold.inspect.view import AlignmentView, ExactScore, TokenizedSide
from gold.models.branches import TextStates
from gold.models.language_model import LanguageModel
from gold.tokenize.text import TokenizedText

LEAST = 0.01
"""The least share of a branch that is followed."""


@torch.no_grad()
def exact_score(view: AlignmentView, student: LanguageModel, teacher: LanguageModel) -> ExactScore | None:
    """The divergence of the student from the teacher at every byte of the text, and its lower bound.

    Without a prompt or BOS on both sides it begins behind the first chunk. None where nothing is left to compare.
    """
    chunks, first = view.alignment.chunks, [0, 0]
    if not all(_before(side) for side in view.sides):
        if not len(chunks):
            return None
        first = chunks[0, [1, 3]].tolist()
    stopped = all(side.stop_ids for side in view.sides)
    pair = VocabularyPair(view.student.vocabulary, view.teacher.vocabulary)
    found = []
    for model, side, skipped, trie in zip(
        (student, teacher), view.sides, first, pair.kernel_tries, strict=True
    ):
        text, before = (
            _rest(side.tokenized, skipped),
            [*_before(side), *side.tokenized.ids[:skipped].tolist()],
        )
        rows = text.ids.size + stopped
        if not rows or not before:
            return None
        states = TextStates(model, before, text.ids, rows)
        found.append(marginals(side.vocabulary, trie, text, stopped, states, LEAST))
    exact = ExactText.of(*found)
    if not exact.value.size:
        return None
    shares = unresolved([exact])
    size = max(1, len(view.data) - (int(view.student.tokenized.ends[first[0] - 1]) if first[0] else 0))
    return ExactScore(
        float(exact.value.sum()) / size,
        float(exact.bound.sum()) / size,
        shares["unresolved_mass"],
        shares["teacher_unresolved_mass"],
    )


def _before(side: TokenizedSide) -> list[int]:
    return list(side.prompt_ids or (() if side.bos_id is None else (side.bos_id,)))


def _rest(text: TokenizedText, first: int) -> TokenizedText:
    """The text without its first tokens."""
    if not first:
        return text
    begin = int(text.ends[first - 1])
    ends, exact = text.ends[first:] - begin, text.exact[first:]
    return replace(
        text, ids=text.ids[first:], ends=ends.astype(np.int64), data=text.data[begin:], exact=exact
    )
