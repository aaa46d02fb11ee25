"""Countdown of reasoning-gym in short plain text: ``5 10 7=12`` is answered `` 7-5=2 2+10=12``, in one of several ways.

Questions are drawn by reasoning-gym, with plus and minus alone, and its verifier judges the expression that the steps
make.
"""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.claims.pair_models import merged
from gold.data import Prompt
from gold.demo.models import character_tokenizer
from gold.tasks import ReasoningGym

ALPHABET = "0123456789 +-="
SIGNS = "+-"
NUMBERS, LARGEST, TARGET = 3, 30, 60
"""Numbers of a question, the largest of them, and the largest target."""
LARGEST_STEP = 99
"""The largest value of a step: every number is one token where numbers of two digits are."""
TOKENIZERS: Mapping[str, Callable[[], Tokenizer]] = {
    "digits": lambda: character_tokenizer(ALPHABET),
    "numbers": lambda: merged(itertools.product("0123456789", repeat=2), ALPHABET),
}
"""Signs and spaces are tokens of both; so are digits, and numbers of two digits are tokens of the second."""

Question = tuple[tuple[int, ...], int]
"""The numbers, smallest first, and the target."""


def gym() -> ReasoningGym:
    """The task that draws questions and judges answers."""
    return ReasoningGym(
        "countdown",
        min_numbers=NUMBERS,
        max_numbers=NUMBERS,
        min_value=1,
        max_value=LARGEST,
        min_target=1,
        max_target=TARGET,
        operators=tuple(SIGNS),
    )


def write_questions(path: Path, drawn: int) -> None:
    """Writes the different questions among so many drawn ones: an eighth are held out, by numbers and target.

    Those without a right text (`right_texts`) are left out.
    """
    entries = [p.reference["metadata"] for p in gym().prompts("train", drawn, 0)]
    found = sorted({(tuple(sorted(e["numbers"])), e["target"]) for e in entries})
    split: dict[str, list[Question]] = {"train": [], "heldout": []}
    for question in found:
        if right_texts(question):
            split["heldout" if is_held_out(question) else "train"].append(question)
    path.write_text(json.dumps(split))


def is_held_out(question: Question) -> bool:
    """Whether no model may learn from the question, nor any prompt ask it."""
    return zlib.crc32(repr(question).encode()) % 8 == 0


@cache
def all_questions() -> tuple[Question, ...]:
    """All questions of the range that have a right text and are not held out."""
    found = (
        (numbers, target)
        for numbers in itertools.combinations_with_replacement(range(1, LARGEST + 1), NUMBERS)
        for target in sorted(_texts_by_target(numbers))
        if 1 <= target <= TARGET
    )
    return tuple(question for question in found if not is_held_out(question))


@dataclass(frozen=True)
class Countdown:
    """The questions of a file, as prompts, and their verifier."""

    path: Path

    @cached_property
    def _questions(self) -> dict[str, list[Question]]:
        read = json.loads(self.path.read_text())
        return {split: [(tuple(n), target) for n, target in found] for split, found in read.items()}

    @cached_property
    def _gym(self) -> ReasoningGym:
        return gym()

    def count(self, split: str) -> int:
        """How many questions there are."""
        return len(self._questions[split])

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """``count`` different questions, or all, each with its numbers in random order, without an answer."""
        rng = np.random.default_rng((seed, zlib.crc32(split.encode())))
        questions = self._questions[split]
        return [_prompt(questions[i], rng) for i in rng.permutation(len(questions))[:count]]

    def lessons(self, count: int, seed: int) -> list[Prompt]:
        """Questions to learn from, drawn again and again among all that are not held out, each with a right text drawn
        at random."""
        rng = np.random.default_rng((seed, 1))
        found = []
        for n, i in enumerate(rng.integers(len(all_questions()), size=count)):
            question = all_questions()[i]
            texts = right_texts(question)
            found.append(_prompt(question, rng, texts[int(rng.integers(len(texts)))], f" {n}"))
        return found

    def score(self, prompt: Prompt, completion: str) -> float:
        """1 if the steps make an expression that reasoning-gym scores 1, else 0."""
        answer = expression(completion)
        return float(answer is not None and self._gym.score(prompt, answer) == 1.0)


def _prompt(
    question: Question, rng: np.random.Generator, completion: str | None = None, of: str = ""
) -> Prompt:
    numbers, target = question
    shown = [numbers[i] for i in rng.permutation(len(numbers))]
    text = f"{' '.join(map(str, shown))}={target}"
    reference = {"metadata": {"numbers": shown, "target": target}}
    return Prompt(f"{text}{of}", text=text, completion=completion, reference=reference)


def expression(completion: str) -> str | None:
    """The expression that steps make: `` 7-5=2 2+10=12`` is ``((7-5)+10)``; None if it is not made of steps.

    Only the last step counts, with what it takes from earlier ones; whether a step is right does not.
    """
    made: dict[str, str] = {}
    last = None
    for step in completion.split():
        parts = re.fullmatch(r"(\d+)([-+])(\d+)=(\d+)", step)
        if parts is None:
            return None
        left, sign, right, value = parts.groups()
        last = f"({made.pop(left, left)}{sign}{made.pop(right, right)})"
        made[value] = last
    return last


def right_texts(question: Question) -> tuple[str, ...]:
    """All right texts whose steps have whole values from 0 to `LARGEST_STEP`, sorted."""
    numbers, target = question
    return _texts_by_target(numbers).get(target, ())


@cache
def _texts_by_target(numbers: tuple[int, ...]) -> dict[int, tuple[str, ...]]:
    found: dict[int, set[str]] = {}
    for text, value in _texts(numbers):
        found.setdefault(value, set()).add(text)
    return {value: tuple(sorted(texts)) for value, texts in found.items()}


def _texts(left: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    if len(left) == 1:
        yield "", left[0]
        return
    for i, j in itertools.permutations(range(len(left)), 2):
        others = tuple(n for k, n in enumerate(left) if k not in (i, j))
        for sign, value in _values(left[i], left[j]):
            if 0 <= value <= LARGEST_STEP:
                for rest, end in _texts((*others, value)):
                    yield f" {left[i]}{sign}{left[j]}={value}{rest}", end


def _values(a: int, b: int) -> Iterator[tuple[str, int]]:
    yield from (("+", a + b), ("-", a - b))


def texts_a_question(path: Path) -> float:
    """How many right texts a held-out question has, on average."""
    found: Any = json.loads(path.read_text())["heldout"]
    return float(np.mean([len(right_texts((tuple(n), target))) for n, target in found]))
