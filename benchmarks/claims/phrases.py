"""Phrases of Python's manual, and tiny models that continue them in characters or in pieces of words.

What comes next is uncertain, and a piece may begin another one: both are so of real models, and not of a task with one
right answer, whose models leave next to nothing unresolved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from benchmarks.claims.gym import tokenizer_of
from gold.data import Prompt
from gold.demo.models import learn_answers, tiny_model
from gold.models.load import load_model, save_model

GIVEN, WRITTEN = 3, 4
"""Words of a prompt, and of its completion."""
MERGES: Mapping[str, int] = {"characters": 0, "pieces": 300}
MAX_NEW_TOKENS: Mapping[str, int] = {"characters": 40, "pieces": 20}
CONTEXT = 160
load = load_model


@cache
def phrases(split: str) -> list[Prompt]:
    """All phrases of a split, with their completions, in an order by chance; no words are in both."""
    words = [w for text in topics.values() for w in re.findall(r"\b[a-z]{1,8}\b", text)]
    cut = len(words) * 9 // 10
    words = words[:cut] if split == "train" else words[cut:]
    size = GIVEN + WRITTEN
    found: dict[str, Prompt] = {}
    for first in range(0, len(words) - size, 3):
        given = "".join(f" {w}" for w in words[first : first + GIVEN])
        rest = "".join(f" {w}" for w in words[first + GIVEN : first + size])
        found.setdefault(given, Prompt(given.strip(), text=given, completion=rest))
    prompts = list(found.values())
    return [prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))]


def asked(prompts: list[Prompt]) -> list[Prompt]:
    """The prompts without their completions."""
    return [replace(p, completion=None) for p in prompts]


@dataclass(frozen=True)
class Model:
    """A cell: a teacher, or a student before distillation."""

    tokenizer: str
    role: str
    steps: int
    phrases: int

    @property
    def folder(self) -> str:
        """Its name among the models that are made."""
        return f"phrases-{self.role}-{self.tokenizer}"


def make(model: Model, made: Path) -> dict[str, Any]:
    """Trains a model on half of the phrases, the student on the other half, and saves it."""
    every = phrases("train")[: model.phrases]
    half = len(every) // 2
    teacher = model.role == "teacher"
    tokens = tokenizer_of([f"{p.text}{p.completion}" for p in every], MERGES[model.tokenizer])
    layers, seed = (3, 0) if teacher else (2, 1)
    lm = tiny_model(tokens, model.role, layers=layers, seed=seed, context=CONTEXT)
    learn_answers(lm, every[:half] if teacher else every[half:], steps=model.steps, batch=64)
    lm.lm.eval()
    save_model(lm, made / model.folder)
    ids = lm.vocabulary.encode(every[0].completion or "").ids.tolist()
    return {
        "tokens": lm.vocabulary.size,
        "reads": "|".join(lm.vocabulary.token_bytes(i).decode() for i in ids),
    }
