"""Tiny teachers and weak students with tokenizers that differ in one respect, on the demonstration's task."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from gold.data import Prompt
from gold.demo.models import (
    ALPHABET,
    SPECIAL,
    character_tokenizer,
    learn_answers,
    tiny_model,
    word_tokenizer,
)
from gold.demo.run import ANSWERS_PER_STEP, SAMPLING, TASK
from gold.evaluate import EvaluationPlan, evaluate
from gold.models.language_model import LanguageModel
from gold.models.load import load_model, save_model
from gold.teachers.local import LocalTeacher


def words() -> Tokenizer:
    """A number or a step, with its sign and the space before it, is one token."""
    return word_tokenizer([f"{p.text}{p.completion}" for p in TASK.prompts("train", 4000, 0)])


def digits() -> Tokenizer:
    """A token for each digit; a space with the sign after it is one token."""
    return merged([("Ġ", sign) for sign in "+-="])


def numbers() -> Tokenizer:
    """A number of two digits is one token; so is every space, and every sign."""
    return merged(itertools.product("0123456789", repeat=2))


def merged(merges: Iterable[tuple[str, ...]], alphabet: str = ALPHABET) -> Tokenizer:
    """Characters, and these pairs of them as tokens too."""
    tokenizer = character_tokenizer(alphabet)
    pairs = [(first, second) for first, second in merges]
    tokens = [
        *SPECIAL,
        *sorted(set(tokenizer.get_vocab()) - set(SPECIAL)),
        *("".join(pair) for pair in pairs),
    ]
    tokenizer.model = models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=pairs)
    return tokenizer


TOKENIZERS: Mapping[str, Callable[[], Tokenizer]] = {
    "characters": character_tokenizer,
    "words": words,
    "digits": digits,
    "numbers": numbers,
}


@dataclass(frozen=True)
class Sizes:
    """How much models learn before, and prompts of the runs."""

    answers: int
    teacher_steps: int
    start_steps: int
    prompts: int
    heldout: int
    teacher_accuracy: float = 0.98
    start_accuracy: float = 0.25


@dataclass(frozen=True)
class Model:
    """A cell: a teacher, or a student before distillation, with one of ``TOKENIZERS``."""

    tokenizer: str
    role: str
    sizes: Sizes

    @property
    def folder(self) -> str:
        """Its name among the models that are made."""
        return f"{self.role}-{self.tokenizer}"


def make(model: Model, made: Path) -> dict[str, Any]:
    """Trains a model on right answers until it is good enough, saves it, and returns its accuracy."""
    teacher, sizes = model.role == "teacher", model.sizes
    layers, seed = (3, 0) if teacher else (2, 1)
    lm = tiny_model(TOKENIZERS[model.tokenizer](), model.role, layers=layers, seed=seed)
    # The student's answers are none of its teacher's.
    skip = 0 if teacher else sizes.answers
    answers = TASK.prompts("train", skip + sizes.answers, 0)[skip:]
    enough = sizes.teacher_accuracy if teacher else sizes.start_accuracy
    watched = heldout(sizes)[:128]
    steps = learn_answers(
        lm,
        answers,
        steps=sizes.teacher_steps if teacher else sizes.start_steps,
        batch=ANSWERS_PER_STEP,
        every=50,
        watch=lambda _: measures(lm, None, watched)["accuracy"] >= enough,
    )
    lm.lm.eval()
    save_model(lm, made / model.folder)
    shown = TASK.prompts("train", 1, 0)[0].completion or ""
    ids = lm.vocabulary.encode(shown).ids.tolist()
    return {
        "accuracy": measures(lm, None, heldout(sizes))["accuracy"],
        "steps": steps,
        "tokens": lm.vocabulary.size,
        "reads": "|".join(lm.vocabulary.token_bytes(i).decode() for i in ids),
    }


def heldout(sizes: Sizes) -> list[Prompt]:
    """Prompts that no model has learned from."""
    return [replace(p, completion=None) for p in TASK.prompts("heldout", sizes.heldout, 0)]


def train_prompts(sizes: Sizes) -> list[Prompt]:
    """The prompts of every run, without their answers."""
    return [replace(p, completion=None) for p in TASK.prompts("train", sizes.prompts, 0)]


def keep(texts: Sequence[Prompt], path: Path) -> None:
    """Writes prompts with completions to a file."""
    rows = [{"key": p.key, "text": p.text, "completion": p.completion} for p in texts]
    path.write_text(json.dumps(rows), encoding="utf-8")


def kept(path: Path) -> list[Prompt]:
    """What ``keep`` wrote."""
    return [Prompt(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


MEASURES = ("accuracy", "reverse_kl_per_byte", "length_bytes", "stop_rate")


def measures(
    student: LanguageModel, teacher: LanguageModel | None, prompts: Sequence[Prompt]
) -> dict[str, float]:
    """Accuracy of greedy answers; with a teacher, the divergence from it on samples, and their length and ends."""
    plan = EvaluationPlan(
        max_new_tokens=SAMPLING.max_new_tokens, samples=0, generation_batch_size=256, micro_batch_size=128
    )
    local = None if teacher is None else LocalTeacher(teacher)
    found = evaluate(student, local, prompts, plan=plan, verifier=TASK).measures
    return {name: round(float(found[name]), 4) for name in MEASURES if name in found}


def loaded(name: str, made: Path) -> LanguageModel:
    """A model that was made."""
    return load_model(made / name)
