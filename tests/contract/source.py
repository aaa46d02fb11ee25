"""One source of text, written by two models in their own tokenizers' tokens: there is nothing to learn between them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.losses import Objective
from gold.tokenize.vocabulary import Vocabulary
from tests.contract.toys import aligned, inputs_of, toy_vocabulary

NEVER = -40.0
"""The logit of what a model never writes."""
PAIRS = {
    "other merges": (["a+b", "b+a", "ab+a"], ["b+a", "a+b", "ab+b"]),
    "merges and letters": (["a+b", "b+a", "ab+a"], []),
    "letters and merges": ([], ["a+b", "ab+ab", "b+b"]),
}
"""Merges of the student and of the teacher."""


@cache
def pair_of(name: str) -> VocabularyPair:
    """Two tokenizers over a and b."""
    return VocabularyPair(*(toy_vocabulary(merges, letters="ab", cut=None) for merges in PAIRS[name]))


@cache
def source(seed: int, longest: int) -> Mapping[str, float]:
    """Probabilities of all texts of a and b up to a length, each letter drawn given those before."""
    found: dict[str, float] = {}
    draws = np.random.default_rng(seed)

    def grow(text: str, probability: float) -> None:
        logits = draws.normal(size=3) - [0.7, 0.0, 0.0]
        if len(text) == longest:
            logits[1:] = -np.inf
        share = np.exp(logits - logits.max())
        share /= share.sum()
        found[text] = probability * float(share[0])
        for letter, part in zip("ab", share[1:].tolist(), strict=True):
            if part:
                grow(text + letter, probability * part)

    grow("", 1.0)
    return found


class Canonical:
    """The model that writes a source's texts as its tokenizer would, each as likely as it is."""

    def __init__(self, vocabulary: Vocabulary, texts: Mapping[str, float]) -> None:
        self.vocabulary = vocabulary
        self.ids = {x: (*vocabulary.encode(x).ids.tolist(), vocabulary.stop_ids[0]) for x in texts}
        self.mass: dict[tuple[int, ...], float] = defaultdict(float)
        for x, probability in texts.items():
            for k in range(len(self.ids[x]) + 1):
                self.mass[self.ids[x][:k]] += probability

    def row(self, context: tuple[int, ...]) -> Tensor:
        """Logits after a context."""
        logits = torch.full((self.vocabulary.size,), NEVER, dtype=torch.float64)
        for v in range(self.vocabulary.size):
            if (share := self.mass.get((*context, v), 0.0)) > 0:
                logits[v] = math.log(share / self.mass[context])
        return logits

    def rows(self, ids: tuple[int, ...]) -> Tensor:
        """Logits of the states before each of some ids."""
        return torch.stack([self.row(ids[:k]) for k in range(len(ids))])


def text_of(pair: VocabularyPair, ids: tuple[int, ...]) -> AlignedText:
    """A text that has ended."""
    return aligned(pair, list(ids))


def expected(
    objective: Objective, pair: VocabularyPair, mine: Mapping[str, float], theirs: Mapping[str, float]
) -> tuple[float, float]:
    """Expected loss per unit over all texts that the student writes, and the norm of its expected gradient per unit."""
    student, teacher = Canonical(pair.student, mine), Canonical(pair.teacher, theirs)
    value = count = 0.0
    gradient: dict[tuple[int, ...], Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    for x, probability in mine.items():
        ids = student.ids[x]
        text = text_of(pair, ids)
        rows = student.rows(ids).requires_grad_(True)
        inputs = inputs_of(
            pair, [text], rows, teacher.rows((*text.teacher.ids.tolist(), pair.teacher.stop_ids[0]))
        )
        loss = objective(inputs).total
        value += probability * float(loss.detach())
        count += probability * objective.count(inputs.batch)
        if loss.requires_grad:
            (grad,) = torch.autograd.grad(loss, rows)
            for k in range(len(ids)):
                gradient[ids[:k]] = gradient[ids[:k]] + probability * grad[k]
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
    return value / count, norm / count
