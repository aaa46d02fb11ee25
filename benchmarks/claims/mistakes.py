"""Answers of several values that begin wrong: lessons for a teacher, and what a teacher says after them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from gold.data import Prompt

Rest = Literal["right", "follows"]
"""What comes after wrong values: the right ones all the same, or those that follow from the last value given."""
VALUE = re.compile(r" -?\d+")


def spoiled(prompts: Sequence[Prompt], seed: int, rest: Rest) -> list[Prompt]:
    """Prompts whose text has the beginning of an answer, at least one of its values wrong by up to 5; their completion
    is the rest."""
    rng = np.random.default_rng(seed)
    made = []
    for p in prompts:
        values = VALUE.findall(p.completion or "")
        cut = int(rng.integers(1, len(values)))
        wrong = rng.random(cut) < 0.5
        wrong[rng.integers(cut)] = True
        begun = [_other(value, rng) if bad else value for value, bad in zip(values[:cut], wrong, strict=True)]
        shift = int(begun[-1]) - int(values[cut - 1]) if rest == "follows" else 0
        left = "".join(f" {int(value) + shift}" for value in values[cut:])
        made.append(replace(p, text=f"{p.text}{''.join(begun)}", completion=left))
    return made


def _other(value: str, rng: np.random.Generator) -> str:
    return f" {int(value) + int(rng.integers(1, 6)) * int(rng.choice((-1, 1)))}"


def first_mistake(text: str, right: str) -> tuple[str, str, str] | None:
    """A text up to its first wrong value, that one included; the right value that belongs after it, and the one that
    follows from the wrong one.

    None where nothing is wrong, nothing belongs after it, or the text cannot be read as values.
    """
    values, wanted = VALUE.findall(text), VALUE.findall(right)
    for n, (value, want) in enumerate(zip(values, wanted, strict=False)):
        if value != want:
            begun = "".join(values[: n + 1])
            if n + 1 == len(wanted) or not text.startswith(begun):
                return None
            return begun, wanted[n + 1], f" {int(value) + int(wanted[n + 1]) - int(want)}"
    return None
