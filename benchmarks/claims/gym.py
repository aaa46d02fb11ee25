"""Tasks of reasoning-gym in short plain text, and tiny models with different tokenizers for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gold.data import Prompt
from gold.demo.models import SPECIAL, learn_answers, tiny_model
from gold.models.language_model import LanguageModel
from gold.tasks import ReasoningGym


@dataclass(frozen=True)
class Plain:
    """A task of reasoning-gym whose question is the part that changes, `` 1 + 6 - 9 =``, and whose answer is `` -2``.

    Questions, splits and the verifier are reasoning-gym's; an answer without its full score counts as wrong. With
    ``steps`` a sum is worked out, `` 7 -2``: as many values as the question has terms after the first, the last of
    which is the answer; questions with a term above ``largest`` are left out.
    """

    name: str
    field: str
    options: tuple[tuple[str, int], ...]
    max_new_tokens: int
    steps: bool = False
    largest: int | None = None

    @property
    def gym(self) -> ReasoningGym:
        """The task that makes the questions and knows the answers."""
        return ReasoningGym(self.name, **dict(self.options))

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """``count`` different prompts; no prompt is in both splits, for any seeds."""
        found = self.gym.prompts(split, count if self.largest is None else _DRAWN * (count + 20), seed)
        if self.largest is not None:
            found = [p for p in found if max(map(abs, _terms(p.reference))) <= self.largest][:count]
        if len(found) < count:
            raise ValueError(f"{self.name}: {len(found)} questions of {count} have small terms alone")
        return [
            Prompt(
                p.key,
                text=f" {p.reference['metadata'][self.field]} =",
                completion=_worked(p.reference) if self.steps else f" {p.reference['answer']}",
                reference=p.reference,
            )
            for p in found
        ]

    def score(self, prompt: Prompt, completion: str) -> float:
        """1 for an answer that reasoning-gym scores 1, else 0."""
        if self.steps:
            values = completion.split(" ")[1:]
            if len(values) != len(_terms(prompt.reference)) - 1:
                return 0.0
            completion = values[-1]
        return float(_verifier(self).score(prompt, completion) == 1.0)


_DRAWN = 9
"""Questions that are drawn for one with small terms, more than there are on average."""


def _terms(reference: Any) -> list[int]:
    """The terms of a sum with their signs."""
    first, *rest = reference["metadata"]["expression"].split()
    return [int(first), *(int(f"{sign}{term}") for sign, term in zip(rest[::2], rest[1::2], strict=True))]


def _worked(reference: Any) -> str:
    """The value of a sum after each of its terms but the first."""
    return "".join(f" {value}" for value in list(accumulate(_terms(reference)))[1:])


_VERIFIERS: dict[Plain, ReasoningGym] = {}


def _verifier(task: Plain) -> ReasoningGym:
    return _VERIFIERS.setdefault(task, task.gym) if task not in _VERIFIERS else _VERIFIERS[task]


TASKS = {
    "worked_sum": Plain(
        "chain_sum",
        "expression",
        (("min_terms", 4), ("max_terms", 4), ("min_digits", 1), ("max_digits", 1)),
        16,
        steps=True,
        largest=5,
    ),
    "spell_backward": Plain("spell_backward", "word", (("min_word_len", 3), ("max_word_len", 4)), 8),
}


def tokenizer_of(texts: Sequence[str], merges: int) -> Tokenizer:
    """Byte-level BPE with the characters of ``texts`` and up to ``merges`` merges learned from them, within words."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words: Any = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "merged_with_next"), byte_level])
    symbols = {symbol for text in texts for symbol in byte_level.pre_tokenize_str(text)[0][0]}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    size = len(SPECIAL) + len(symbols) + merges
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), show_progress=False, initial_alphabet=sorted(symbols)
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = ("<bos>", tokenizer.token_to_id("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return tokenizer


def learned(
    tokenizer: Tokenizer,
    name: str,
    layers: int,
    answers: Sequence[Prompt],
    *,
    steps: int,
    seed: int,
    every: int,
    enough: Callable[[LanguageModel], bool],
) -> LanguageModel:
    """A tiny model that was trained on answers until it is good enough."""
    model = tiny_model(tokenizer, name, layers=layers, seed=seed, context=64)
    learn_answers(model, answers, steps=steps, batch=64, every=every, watch=lambda _: enough(model))
    model.lm.eval()
    return model


def asked(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts without their answers."""
    return [replace(p, completion=None) for p in prompts]
