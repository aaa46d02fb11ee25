"""A skill and a table of facts for tiny models: what the claims about recovery and divergences are measured on.

The skill is the demonstration's running sums: prompts without end, answers that are computed. A fact is a made-up name
with a made-up answer: nothing but the table says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import mean
from typing import Any

import numpy as np

from gold.data import Prompt
from gold.demo.models import ALPHABET, character_tokenizer, learn_answers, tiny_model, word_tokenizer
from gold.demo.run import SAMPLING, TASK
from gold.models.language_model import LanguageModel
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.train.trackers import Tracker

SKILL, KNOWLEDGE = "skill", "knowledge"
LETTERS = "abdefgiklmnoprstuvz"
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


@dataclass(frozen=True)
class Facts:
    """``count`` made-up facts, another table for each seed: `` bakori is`` → `` lumi 37``."""

    count: int
    seed: int

    name = "facts"

    def prompts(self, form: str = " {} is", known: slice = slice(None)) -> list[Prompt]:
        """A question for each fact, or for those of a slice, with its answer."""
        rng = np.random.default_rng((self.seed, 11))
        found: dict[str, str] = {}
        while len(found) < self.count:
            name = "".join(rng.choice(SYLLABLES, 3))
            found.setdefault(name, f" {''.join(rng.choice(SYLLABLES, 2))} {rng.integers(10, 50)}")
        asked = [(form.format(name), answer) for name, answer in list(found.items())[known]]
        return [Prompt(text.strip(), text=text, completion=a, reference=a) for text, a in asked]


def sums(split: str, count: int, seed: int) -> list[Prompt]:
    """Prompts of the skill, with their answers."""
    return TASK.prompts(split, count, seed)


def unanswered(prompts: Sequence[Prompt], route: str | None = None) -> list[Prompt]:
    """The prompts without their answers, for the teacher of that name."""
    return [replace(p, completion=None, route=route) for p in prompts]


def whole_numbers(seed: int, layers: int = 2, width: int = 64) -> LanguageModel:
    """A model without training whose tokens are numbers, and syllables or pieces of them."""
    texts = [f"{p.text}{p.completion}" for p in chain(sums("train", 2000, 0), Facts(400, 10**6).prompts())]
    return tiny_model(word_tokenizer(texts, 220), "student", layers=layers, width=width, seed=seed)


def characters(seed: int, layers: int = 3, width: int = 64) -> LanguageModel:
    """A model without training whose tokens are characters."""
    return tiny_model(
        character_tokenizer(ALPHABET + LETTERS), "teacher", layers=layers, width=width, seed=seed
    )


def answers_of(model: LanguageModel, prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """The prompts with what a model writes for them, one sample each; those without an end, or empty, are left out."""
    seeds = [(seed, 10**6, n) for n in range(len(prompts))]
    found = sample(HuggingFaceEngine(model, 256), model, prompts, SAMPLING, seeds=seeds)
    return [replace(r.prompt, completion=r.text) for r in found if r.stopped and r.text]


def learn_until(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    watched: Sequence[Prompt],
    enough: float,
    steps: int,
    seed: int,
    every: int = 100,
) -> None:
    """Supervised training on the prompts' answers until that share of ``watched`` is right, or the steps are taken."""

    def watch(step: int) -> bool:
        return right(model, watched) >= enough

    learn_answers(model, prompts, steps=steps, batch=64, seed=seed, every=every, watch=watch)
    model.lm.eval()


def right(model: LanguageModel, prompts: Sequence[Prompt]) -> float:
    """Share of prompts answered right and ended, greedily."""
    greedy = replace(SAMPLING, temperature=0.0)
    found = sample(HuggingFaceEngine(model, 256), model, prompts, greedy, seeds=[(0,)] * len(prompts))
    return float(np.mean([r.stopped and r.text == r.prompt.reference for r in found]))


def mean_curve(curves: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """The curves' mean at each of their points."""
    return [
        {of: round(mean(point[of] for point in points), 4) for of in points[0]}
        for points in zip(*curves, strict=True)
    ]


class Watching(Tracker):
    """Measures of the student every few steps of a run, the first before it: greedy answers, nothing else is drawn."""

    def __init__(self, measure: Callable[[], Mapping[str, float]], every: int) -> None:
        self.measure, self.every = measure, every
        self.curve: list[dict[str, float]] = []

    def start(self, run: Any) -> None:
        """Measures the student before the run."""
        self.curve.append({"step": 0, **self.measure()})

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Measures the student after every few steps."""
        if kind == "train" and record["step"] % self.every == 0:
            self.curve.append({"step": record["step"], **self.measure()})
