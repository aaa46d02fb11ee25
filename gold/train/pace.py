"""How long a run will take: a few seconds of its first step are measured before it, and scaled up.

Nothing that a run depends on changes: requests draw from the streams that they name, weights stay as they are, and
torch's generators are restored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch

from gold.activity import doing
from gold.data import Prompt
from gold.errors import DataError, GoldError
from gold.evaluate import EvaluationPlan
from gold.models.language_model import LanguageModel
from gold.rollout.engine import Generation, Request, request_for, rollout_of
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.stopping import without_stop
from gold.rollout.types import Rollout, Sampling
from gold.teachers.local import LocalTeacher
from gold.train.engine import generating
from gold.train.forecast import duration
from gold.train.metrics import device_clock
from gold.train.microbatch import ask_teachers, build_microbatches
from gold.train.setup import Setup
from gold.train.state import TrainState
from gold.train.step import accumulate_gradients, unit_counts, with_baselines

_DRAW_S, _PASS_S, _TEACHER_DRAW_S = 4.0, 2.0, 2.0
"""Seconds for which the student draws, a forward and backward pass may take, and a teacher draws, at most: about."""
_FEW = 16
"""Tokens that are drawn first."""
_SHORT_RUN_FLOPS = 1e11
"""A run of fewer operations takes seconds anywhere, and is not measured."""
_LONG_RUN_S = 600.0
_UPDATE_COPIES = 8
"""AdamW, the norm of the gradient and its clipping read and write about as much as this many copies of the weights."""


@dataclass(frozen=True)
class Speed:
    """How fast a model generates a batch: seconds of the prompts, seconds of each further token of a batch of
    ``sequences``, of which ``alone_s`` is what one sequence would take; and the probability that a token is the last.
    """

    prompt_s: float
    token_s: float
    sequences: int
    alone_s: float
    stops: float

    def seconds(self, count: int, batch: int, new_tokens: int) -> float:
        """Seconds of drawing ``count`` completions, ``batch`` at a time."""
        if not count:
            return 0.0
        full, rest = divmod(count, batch)
        sizes = [batch] * full + ([rest] if rest else [])
        return sum(self._batch_s(size, new_tokens) for size in sizes)

    def _batch_s(self, size: int, new_tokens: int) -> float:
        slope = max(0.0, self.token_s - self.alone_s) / max(1, self.sequences - 1)
        token_s = max(self.token_s + slope * (size - self.sequences), min(self.alone_s, self.token_s))
        return self.prompt_s * size / self.sequences + token_s * self.longest(size, new_tokens)

    def mean(self, new_tokens: int) -> float:
        """Expected tokens of a completion."""
        return self.longest(1, new_tokens)

    def longest(self, size: int, new_tokens: int) -> float:
        """Expected tokens of the longest of some completions, if each token is the last with probability ``stops``."""
        if self.stops <= 0.0:
            return float(new_tokens)
        ended = 1.0 - (1.0 - self.stops) ** np.arange(new_tokens)
        return float((1.0 - ended**size).sum())


@dataclass(frozen=True)
class Work:
    """What decides how long a run takes: the settings that ``Pace`` can change."""

    steps: int
    prompts_per_step: int
    num_generations: int
    max_new_tokens: int
    generation_batch_size: int
    on_policy: float
    evaluations: int
    evaluated: int
    """Prompts of an evaluation."""
    evaluation_generations: int = 1
    greedy: bool = False
    """Whether an evaluation also draws greedily, for a verifier."""
    draws: bool = True
    """Whether the student writes in each step, not before the first one alone."""

    @property
    def written(self) -> int:
        """Completions of a step that the student writes."""
        share = self.on_policy / (self.on_policy + self.num_generations * (1.0 - self.on_policy))
        return round(self.prompts_per_step * share * self.num_generations)

    @property
    def sequences(self) -> int:
        """All completions of a step."""
        return self.written + self.prompts_per_step - round(self.written / self.num_generations)


@dataclass(frozen=True)
class Pace:
    """Seconds that were measured: of drawing, and per token of prompts and completions of reading and learning."""

    student: Speed
    teachers: Sequence[Speed]
    """Of those that evaluations sample from."""
    prompt_tokens: float
    learn_s: float
    teacher_s: float
    update_s: float
    work: Work
    routed: bool = False
    """Whether each prompt has one of the teachers."""

    def step(self, work: Work) -> dict[str, float]:
        """Seconds of a step by phase."""
        tokens = work.sequences * (self.prompt_tokens + self.student.mean(work.max_new_tokens))
        written = work.written if work.draws else 0
        return {
            "rollout": self.student.seconds(written, work.generation_batch_size, work.max_new_tokens),
            "teacher": tokens * self.teacher_s,
            "student": tokens * self.learn_s,
            "update": self.update_s,
        }

    def evaluation(self, work: Work) -> float:
        """Seconds of an evaluation; a forward pass takes a third of learning."""
        if not work.evaluations:
            return 0.0
        count, batch, new = work.evaluated, work.generation_batch_size, work.max_new_tokens
        drawn = count * (work.evaluation_generations + work.greedy)
        seconds = self.student.seconds(drawn, batch, new)
        share = 1 / len(self.teachers) if self.routed else 1.0
        seconds += share * sum(each.seconds(count, batch, new) for each in self.teachers)
        texts = count * (work.evaluation_generations + share * len(self.teachers))
        tokens = texts * (self.prompt_tokens + self.student.mean(new))
        return seconds + tokens * (self.learn_s / 3 + self.teacher_s)

    def run(self, work: Work) -> float:
        """Seconds of all steps and evaluations."""
        return work.steps * sum(self.step(work).values()) + work.evaluations * self.evaluation(work)

    @property
    def expected(self) -> dict[str, float]:
        """See ``RunInfo.expected``."""
        return {**self.step(self.work), "evaluation": self.evaluation(self.work)}

    def lines(self) -> dict[str, str]:
        """What a run will take, and of a long one what would make it shorter, as named lines."""
        work, phases = self.work, self.step(self.work)
        step, whole = sum(phases.values()), self.run(work)
        said = {"rollout": "drawing", "teacher": "teacher", "student": "learning"}
        shares = ", ".join(
            f"{name} {phases[phase] / step:.0%}" for phase, name in said.items() if phases[phase]
        )
        evaluations = ""
        if work.evaluations:
            evaluations = f", {work.evaluations} evaluations of {duration(self.evaluation(work))}"
        about = (
            f"about {duration(whole)} on this machine: {work.steps:,} steps of {duration(step)} ({shares})"
        )
        found = {"time": f"{about}{evaluations}"}
        if whole >= _LONG_RUN_S and (faster := self.faster()):
            found["faster"] = "; ".join(f"{keys}: {duration(seconds)}" for keys, seconds in faster)
        return found

    def faster(self) -> list[tuple[str, float]]:
        """Changes that make the run shorter by a tenth or more, with its seconds then, the shortest first; and all of
        them."""
        whole, found = self.run(self.work), []
        kept = []
        for keys, change in _changes(self.work):
            if (seconds := self.run(change(self.work))) <= 0.9 * whole:
                found.append((keys, seconds))
                kept.append(change)
        found.sort(key=lambda each: each[1])
        if len(kept) > 1:
            changed = self.work
            for change in kept:
                changed = change(changed)
            found.append(("all of these", self.run(changed)))
        return found


Change = Callable[[Work], Work]


def _changes(work: Work) -> list[tuple[str, Change]]:
    """Single changes of a run's settings that can make it shorter: each halves something."""
    found: list[tuple[str, Change]] = []

    def halve(key: str, name: str, least: int = 1) -> None:
        if (value := getattr(work, name)) > least:
            found.append((f"{key}={value // 2}", lambda w: replace(w, **{name: getattr(w, name) // 2})))

    if work.steps > 1:
        steps, left = work.steps // 2, math.ceil(work.evaluations / 2)
        found.append((f"train.steps={steps}", lambda w: replace(w, steps=steps, evaluations=left)))
    halve("rollout.max_new_tokens", "max_new_tokens")
    halve("train.prompts_per_step", "prompts_per_step")
    halve("rollout.num_generations", "num_generations")
    if work.generation_batch_size < work.written:
        size = work.written
        found.append(
            (
                f"rollout.generation_batch_size={size}",
                lambda w: replace(w, generation_batch_size=max(1, w.written)),
            )
        )
    if work.evaluations:
        halve("evaluate.prompts", "evaluated")
    return found


Clock = Callable[[], float]


def measure(
    state: TrainState, setup: Setup, heldout: Sequence[Prompt], plan: EvaluationPlan, evaluate_every: int
) -> Pace | None:
    """The pace of the steps that are left, from about ten seconds of work.

    None with several processes or with an engine or a teacher elsewhere, which are not measured, and for a run of
    seconds.
    """
    models = [t.model for t in setup.members.values() if t.model is not None]
    if state.count > 1 or not setup.student_generates or len(models) < len(setup.members):
        return None
    recipe = setup.recipe
    tokens = recipe.steps * recipe.prompts_per_step * recipe.num_generations * recipe.max_new_tokens
    if 6.0 * tokens * sum(weight.numel() for weight in setup.student.lm.parameters()) < _SHORT_RUN_FLOPS:
        return None
    devices = {model.device for model in (setup.student, *models) if model.device.type == "cuda"}
    with doing("measuring the speed"), torch.random.fork_rng([*devices]):
        try:
            return _measured(state, setup, heldout, plan, evaluate_every)
        except GoldError:  # the run says so where it matters
            return None


def _measured(
    state: TrainState, setup: Setup, heldout: Sequence[Prompt], plan: EvaluationPlan, evaluate_every: int
) -> Pace | None:
    recipe, clock = setup.recipe, device_clock(setup.student.device)
    steps = range(state.step, recipe.steps + 1) if heldout else ()
    work = Work(
        recipe.steps - state.step,
        recipe.prompts_per_step,
        recipe.num_generations,
        recipe.max_new_tokens,
        recipe.generation_batch_size,
        recipe.on_policy,
        sum(step % evaluate_every == 0 or step == recipe.steps for step in steps),
        len(heldout),
        plan.num_generations,
        setup.verifier is not None,
        recipe.policy == "live",
    )
    numbers = setup.order.batch(state.step, recipe.prompts_per_step)
    prompts = [setup.prompts[n] for n in numbers for _ in range(recipe.num_generations)]
    asked = _requests(setup.student, prompts[: recipe.generation_batch_size], recipe.sampling)
    if not asked:
        return None
    sizes = [min(count, work.generation_batch_size) for count in (work.written, work.evaluated) if count]
    with generating(state, setup):
        student, drawn = _speed(setup.student, [request for _, request in asked], sizes, _DRAW_S, clock)
    rollouts = _rollouts(setup, asked, drawn, round(student.mean(recipe.max_new_tokens)))
    teacher_s, learn_s = _passes(state, setup, rollouts, clock)
    teachers = _writers(state, setup, heldout[: recipe.generation_batch_size], plan, clock)
    tokens = sum(len(request.prompt_ids) for _, request in asked) / len(asked)
    routed = bool(setup.routes)
    return Pace(student, teachers, tokens, learn_s, teacher_s, _update_s(state, clock), work, routed)


def _requests(
    model: LanguageModel, prompts: Sequence[Prompt], sampling: Sampling
) -> list[tuple[Prompt, Request]]:
    """Requests for the prompts that leave room for a completion."""
    found = []
    for number, prompt in enumerate(prompts):
        try:
            found.append((prompt, request_for(model, prompt, sampling, (0, 2**31, number))))
        except DataError:
            continue
    return found


def _speed(
    model: LanguageModel, requests: Sequence[Request], sizes: Sequence[int], seconds: float, clock: Clock
) -> tuple[Speed, list[Generation]]:
    """How fast a model draws these requests as one batch, and what it drew in about so many seconds; one request alone
    is measured too if the run has batches of much other ``sizes``."""
    engine, most = HuggingFaceEngine(model, len(requests)), requests[0].sampling.max_new_tokens

    def draw(chosen: Sequence[Request], new: int) -> tuple[float, int, list[Generation]]:
        chosen = [replace(r, sampling=replace(r.sampling, max_new_tokens=new)) for r in chosen]
        begun = clock()
        drawn = engine.generate(chosen)
        return clock() - begun, max(g.ids.size for g in drawn), drawn

    def token_s(chosen: Sequence[Request], first_s: float, most_s: float) -> tuple[float, list[Generation]]:
        """Seconds of each token but the first."""
        new = max(2, min(most, _FEW, int(most_s / max(first_s, 1e-9))))
        spent, longest, drawn = draw(chosen, new)
        each = (spent - first_s) / max(1, longest - 1)
        more = min(most, int(most_s / max(each, 1e-5)))
        if longest == new < more:
            spent, longest, drawn = draw(chosen, more)
            each = (spent - first_s) / max(1, longest - 1)
        return max(0.0, each), drawn

    draw(requests, 1)  # what happens once
    prompt_s = draw(requests, 1)[0]
    together, drawn = token_s(requests, prompt_s, seconds)
    count, alone = len(requests), together
    if count > 1 and any(not 2 / 3 <= size / count <= 3 / 2 for size in sizes):
        alone, _ = token_s(requests[:1], draw(requests[:1], 1)[0], seconds / 4)
    stops = sum(g.stopped for g in drawn) / sum(g.ids.size for g in drawn)
    return Speed(prompt_s, together, count, alone, stops), drawn


def _rollouts(
    setup: Setup, asked: Sequence[tuple[Prompt, Request]], drawn: Sequence[Generation], length: int
) -> list[Rollout]:
    """Completions of that length, from what was drawn, over and over."""
    found = []
    for (prompt, request), generation in zip(asked, drawn, strict=True):
        ids = without_stop(generation.ids, generation.stopped)
        ids = np.resize(ids if ids.size else setup.student.vocabulary.encode("a").ids, max(1, length))
        logprobs = np.zeros(ids.size, np.float32)
        answer = Generation(ids.astype(np.int32), logprobs, False, generation.version)
        found.append(rollout_of(setup.student, prompt, request, answer))
    return found


def _passes(
    state: TrainState, setup: Setup, rollouts: Sequence[Rollout], clock: Clock
) -> tuple[float, float]:
    """Seconds per token, of prompts and completions, of the teachers' passes, and of the student's forward and backward
    pass: of as many sequences of a microbatch as can be read in about the time there is."""
    if setup.teachers is not None:
        teachers = copy(setup.teachers)
        # Those of a cache would keep the scores.
        teachers.members = {
            name: LocalTeacher(t.model) if t.gives != "rows" and t.model is not None else t
            for name, t in setup.members.items()
        }
        setup = replace(setup, teachers=teachers)

    def passes(count: int) -> tuple[float, float]:
        begun = clock()
        microbatches, _ = build_microbatches(setup, rollouts[:count])
        if setup.needs_teacher:
            microbatches = ask_teachers(setup, microbatches)
        read = clock()
        microbatches = with_baselines(state, setup, microbatches)
        accumulate_gradients(state, setup, microbatches, unit_counts(setup, microbatches))
        return read - begun, clock() - read

    once = sum(passes(1))  # with what happens once
    most = min(len(rollouts), setup.recipe.micro_batch_size)
    count = max(1, min(most, int(_PASS_S / once)))
    taken = passes(count)
    state.zero_grad()
    tokens = sum(len(r.prompt_ids) + r.ids.size for r in rollouts[:count])
    return taken[0] / tokens, taken[1] / tokens


def _writers(
    state: TrainState, setup: Setup, heldout: Sequence[Prompt], plan: EvaluationPlan, clock: Clock
) -> list[Speed]:
    """How fast the teachers draw that evaluations sample from."""
    found: list[Speed] = []
    if any(t.gives != "rows" for t in setup.members.values()):
        return found
    for teacher in setup.members.values():
        prompts = [teacher.adapt_prompt(prompt) for prompt in heldout]
        assert teacher.model is not None
        asked = _requests(teacher.model, prompts, Sampling(max_new_tokens=plan.max_new_tokens))
        if asked:
            with generating(state, setup):
                speed, _ = _speed(
                    teacher.model, [request for _, request in asked], [], _TEACHER_DRAW_S, clock
                )
            found.append(speed)
    return found


def _update_s(state: TrainState, clock: Clock) -> float:
    """Seconds of an update, from those of copying some of the weights."""
    weights = [p for p in state.student.lm.parameters() if p.requires_grad]
    copied, begun = 0, clock()
    for weight in weights:
        weight.detach().clone()
        copied += weight.numel()
        if copied > 2**25:
            break
    whole: int = sum(weight.numel() for weight in weights)
    return _UPDATE_COPIES * (clock() - begun) * whole / copied
