"""Accuracy along a run over what the run had cost: steps, different prompts, tokens of the student, processor time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from gold.data import Prompt
from gold.evaluate import Verifier
from gold.models.language_model import LanguageModel
from gold.prompt_order import PromptOrder
from gold.rollout.engine import completed, sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Rollout, Sampling
from gold.train.loop import distill
from gold.train.progress import Quiet
from gold.train.recipe import Recipe
from gold.train.trackers import RunInfo

COSTS = {
    "step": "optimizer steps",
    "prompts": "different prompts",
    "tokens": "student tokens",
    "cpu_s": "processor seconds",
}
"""What a point of a curve has cost; tokens are all that pass through the student, to write and to learn."""


class Curve(Quiet):
    """Accuracy of a student on ``heldout`` prompts every few steps of its runs, which cost nothing to look at.

    ``points`` have an ``accuracy`` and the ``COSTS`` so far, and for each name of ``also`` the accuracy on those
    prompts. Loading models and kernels is not counted. ``text_s`` are the processor seconds that a teacher took to
    write a text of the data: they count when a text is first used, so that a point costs what a run of its length would
    have. Further runs go on where one ended.
    """

    def __init__(
        self,
        student: LanguageModel,
        heldout: Sequence[Prompt],
        verifier: Verifier,
        max_new_tokens: int,
        every: int,
        text_s: float = 0.0,
        also: Mapping[str, Sequence[Prompt]] | None = None,
    ) -> None:
        self.student, self.every, self.cpu_s = student, every, 0.0
        self.points: list[dict[str, float]] = []
        self.step, self.tokens, self.text_s = 0, 0.0, text_s
        self.seen: set[str] = set()
        self.texts: set[int] = set()
        self._looks = {
            name: partial(accuracy, student, prompts, verifier, max_new_tokens)
            for name, prompts in {"accuracy": heldout, **(also or {})}.items()
        }
        self._since = 0.0
        self._count: Callable[[int], tuple[int, int]] | None = None

    def run(
        self,
        teacher: LanguageModel | None,
        prompts: Sequence[Prompt],
        recipe: Recipe,
        verifier: Verifier | None = None,
    ) -> None:
        """Trains the student, and follows it."""
        read = [len(self.student.prompt_ids(p)) for p in prompts]
        room = recipe.max_new_tokens
        given = [completed(self.student, p, room).ids.size if p.completion else 0 for p in prompts]
        order = PromptOrder.of(prompts, recipe.seed)

        def count(step: int) -> tuple[int, int]:
            """Counts a step's prompts and given texts; returns the tokens of the prompts to write and to learn, less
            those of given texts, and the number of sequences."""
            places = list(enumerate(order.batch(step, recipe.prompts_per_step)))
            self.seen.update(prompts[i].text or "" for _, i in places)
            written = [i for place, i in places if recipe.student_writes(step, place)]
            others = [i for place, i in places if not recipe.student_writes(step, place)]
            self.cpu_s += self.text_s * len(set(others) - self.texts)
            self.texts.update(others)
            sequences = recipe.num_generations * len(written) + len(others)
            to_write = recipe.num_generations * sum(read[i] for i in written)
            to_learn = to_write + sum(read[i] for i in others)
            return to_write + to_learn - sum(given[i] for i in others), sequences

        self._count = count
        distill(self.student, teacher, prompts, recipe, verifier=verifier, progress=self)

    def start(self, run: RunInfo) -> None:
        """Looks at the student as it starts."""
        if not self.points:
            self._point()
        self._since = time.process_time()

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Counts a step, and looks at the student if it is time to."""
        if kind != "train" or self._count is None:
            return
        self.cpu_s += time.process_time() - self._since
        self.step += 1
        tokens, sequences = self._count(record["step"] - 1)
        # Completions that the student wrote pass through it twice, given ones once.
        self.tokens += tokens + 2 * record["length_tokens"] * sequences
        if self.step % self.every == 0:
            self._point()
        self._since = time.process_time()

    def _point(self) -> None:
        self.points.append(
            {
                "step": self.step,
                "prompts": len(self.seen),
                "tokens": round(self.tokens),
                "cpu_s": round(self.cpu_s, 2),
                **{name: round(look(), 4) for name, look in self._looks.items()},
            }
        )


def ends_by_rate(jobs: Sequence[Any], results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The accuracy at the end of each job's run, by its ``way`` and its learning rate ``lr``."""
    found: dict[str, dict[str, float]] = {}
    for job, result in zip(jobs, results, strict=True):
        found.setdefault(job.way, {})[f"{job.lr:g}"] = result["curve"][-1]["accuracy"]
    return found


def best(ends: Mapping[str, float]) -> float:
    """The learning rate at which runs end best, the lowest of equals; ``ends`` are accuracies by rate."""
    return float(max(ends, key=lambda lr: (ends[lr], -float(lr))))


def accuracy(
    model: LanguageModel, prompts: Sequence[Prompt], verifier: Verifier, max_new_tokens: int
) -> float:
    """Share of prompts that a model answers right, greedily."""
    rollouts = _greedy(model, prompts, max_new_tokens)
    return sum(verifier.score(r.prompt, r.text) == 1.0 for r in rollouts if r.stopped) / len(prompts)


def answers(model: LanguageModel, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
    """The greedy answers of a model, also those without an end."""
    return [r.text for r in _greedy(model, prompts, max_new_tokens)]


def _greedy(model: LanguageModel, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Rollout]:
    seeds = [(0, n) for n in range(len(prompts))]
    sampling = Sampling(max_new_tokens, temperature=0.0)
    return list(sample(HuggingFaceEngine(model, 512), model, prompts, sampling, seeds=seeds))


def written(
    teacher: LanguageModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    *,
    each: int,
    most: int,
) -> tuple[list[Prompt], float]:
    """Prompts with texts that a teacher samples, ``each`` for a prompt but ``most`` in all, and its seconds a text.

    Where not all are wanted, which ones is random. Texts without an end are left out.
    """
    begun = time.process_time()
    every = [p for p in prompts for _ in range(each)]
    wanted = [every[i] for i in np.random.default_rng(seed).permutation(len(every))[:most]]
    seeds = [(seed, 10**6, n) for n in range(len(wanted))]
    rollouts = sample(HuggingFaceEngine(teacher, 400), teacher, wanted, sampling, seeds=seeds)
    taught = [
        replace(r.prompt, key=f"{r.prompt.key} {n}", completion=r.text)
        for n, r in enumerate(rollouts)
        if r.stopped and r.text
    ]
    return taught, (time.process_time() - begun) / len(taught)
