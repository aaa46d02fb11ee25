"""Evaluation independent of any tokenizer: the divergence of the student from its teacher, and its task performance."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from gold.activity import doing
from gold.align.texts import canonical_tokens
from gold.comparison import Comparison, Scored, student_logp
from gold.data import Prompt
from gold.errors import DataError
from gold.evaluation_samples import chunk_records
from gold.models.language_model import LanguageModel
from gold.rollout.conversations import Conversations
from gold.rollout.engine import RolloutEngine, completed, sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.pieces import Thinking
from gold.rollout.thinking import within_budgets
from gold.rollout.types import Rollout, Sampling, Seed
from gold.sections import CompletionSettings, EvaluationSettings
from gold.tasks import score_of
from gold.teachers.protocol import Teacher
from gold.teachers.several import Teachers
from gold.tokenize.chat import prompt_text, starts_text

_log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class Verifier(Protocol):
    """Scores completions of a task."""

    def score(self, prompt: Prompt, completion: str) -> float:
        """0 to 1."""
        ...


class Processes(Protocol):
    """The processes that share an evaluation: each scores some prompts, and all compute the measures of all prompts."""

    @property
    def index(self) -> int:
        """The number of this process, from 0."""
        ...

    @property
    def count(self) -> int:
        """The number of processes."""
        ...

    def together(self, ask: Callable[[], Answer]) -> Answer:
        """The result of ``ask``; an error of a teacher in one process is raised in all."""
        ...

    def gathered(self, value: Answer) -> list[Answer]:
        """The value of each process."""
        ...


class _OneProcess:
    index, count = 0, 1

    def together(self, ask: Callable[[], Answer]) -> Answer:
        return ask()

    def gathered(self, value: Answer) -> list[Answer]:
        return [value]


@dataclass(frozen=True)
class EvaluationPlan:
    """Settings of an evaluation; it samples at temperature 1, top-p 1, whatever the training settings."""

    num_generations: int = EvaluationSettings().num_generations
    max_new_tokens: int = CompletionSettings().max_new_tokens
    samples: int = EvaluationSettings().samples
    micro_batch_size: int = EvaluationSettings().micro_batch_size
    micro_batch_tokens: int | None = EvaluationSettings().micro_batch_tokens
    generation_batch_size: int = CompletionSettings().generation_batch_size
    thinking: Thinking = "compare"
    thinking_budget: int | None = None
    seed: int = 0
    branches: float = 0.0
    """The least share of a branch in exact measures, see ``gold.exact.marginals``; 0: these are not measured."""


@dataclass(frozen=True)
class Evaluation:
    """Measures by name, each present only where it is defined, and a few completions with both models'
    log-probabilities of each chunk.

    - ``reverse_kl_per_byte`` (nats; needs a teacher): Σ (log π − log q) over student samples and their stop events,
      over their bytes; ``_low`` and ``_high`` are a 95 % bootstrap interval over prompts. For a truncated sample both
      are probabilities that a text begins with it; ``bounded_share`` is present where a teacher returns only some
      tokens: the share of samples at whose end too little is known, so that they count slightly too much.
    - ``exact_reverse_kl_per_byte`` (nats; with ``EvaluationPlan.branches``): at every byte of the student's samples the
      KL divergence between both models' next bytes, over all token sequences that were followed, with an interval as
      above; ``least_reverse_kl_per_byte`` is the same with all that is unresolved as close as it can be, a lower bound.
      ``unresolved_mass`` and ``teacher_unresolved_mass``: the mean share of a byte's probability whose next byte is
      unresolved there; ``branches_per_token`` and ``teacher_branches_per_token``: states computed for it.
      ``exact_forward_kl_per_byte`` and ``least_forward_kl_per_byte``: KL(teacher ‖ student) at the bytes of teacher
      samples.
    - ``impossible_share``: samples to which a teacher gives probability 0, if any; the reverse KL, which is infinite
      with them, is over the others.
    - ``forward_kl_per_byte`` (nats; needs local teachers): the same over teacher samples, signs swapped.
    - With several teachers these are over each prompt's own, and ``…[NAME]`` over the prompts of one; with a mix they
      are the weighted mean over all, an upper bound on the divergence to the mixture itself.
    - ``bits_per_byte``: of the prompts' own completions under the student, else of the teacher's samples.
    - ``accuracy`` with a 95 % Wilson interval (needs a verifier): share of greedy completions that score 1; ``score``
      is the mean score of the samples at temperature 1.
    - ``stop_rate``, ``stop_prob`` and ``teacher_stop_prob`` (both models' probability of stopping where samples did),
      ``length_tokens``, ``length_bytes``, ``canonical_share`` (samples whose ids are the tokenizer's own for their
      text), ``one_to_one_share`` (student tokens in one-to-one chunks), ``repaired_share`` (bytes that the teacher's
      tokens do not reproduce exactly).
    - ``skipped_sequences``: texts excluded from the comparison, if any: with their prompts they do not fit the
      teacher's context, or, for its samples, the student's.
    """

    measures: dict[str, float]
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class _Texts:
    """The texts of one process's prompts. Numbers are of prompts; those of ``rollouts`` of their places, the samples of
    a prompt after one another, and of the turn of a conversation. ``taught`` is None without teachers that can be
    sampled from."""

    rollouts: dict[tuple[int, int], Rollout]
    scored: list[Scored] = field(default_factory=list)
    taught: list[Scored] | None = None
    skipped: int = 0
    given: dict[int, tuple[NDArray[np.float64], Rollout]] = field(default_factory=dict)
    rewards: dict[int, float] = field(default_factory=dict)
    solved: dict[int, bool] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[_Texts], teachers: Sequence[str]) -> _Texts:
        """The texts of all processes, in the order of one process."""

        def in_order(texts: Iterable[Scored]) -> list[Scored]:
            return sorted(texts, key=lambda text: (teachers.index(text.teacher), text.number))

        def by_number(name: str) -> Any:
            return dict(sorted(item for part in parts for item in getattr(part, name).items()))

        taught = [text for part in parts for text in part.taught or ()]
        return cls(
            by_number("rollouts"),
            in_order(text for part in parts for text in part.scored),
            None if parts[0].taught is None else in_order(taught),
            sum(part.skipped for part in parts),
            **{name: by_number(name) for name in ("given", "rewards", "solved")},
        )


def evaluate(
    student: LanguageModel,
    teacher: Teacher | Teachers | None,
    prompts: Sequence[Prompt],
    *,
    plan: EvaluationPlan = EvaluationPlan(),
    verifier: Verifier | None = None,
    engine: RolloutEngine | None = None,
    processes: Processes = _OneProcess(),  # noqa: B008  (without state)
    conversations: Conversations | None = None,
) -> Evaluation:
    """The measures of the student on held-out prompts, and some of its completions.

    With ``conversations`` these are drawn, and scored by their environment; the divergences are over all turns. Several
    ``processes`` share the prompts; each returns the measures of all.
    """
    prompts = list(prompts)
    teachers = teacher if isinstance(teacher, Teachers | None) else Teachers({"teacher": teacher})
    if teachers and not all(t.complete for t in teachers.members.values()):
        teachers = None  # a cache does not contain the student's new samples
    engine = engine or HuggingFaceEngine(student, plan.generation_batch_size)
    comparison = Comparison(student, teachers, prompts, plan) if teachers else None
    numbers = range(len(prompts))[processes.index :: processes.count]
    own = processes.together(
        partial(_texts_of, student, comparison, prompts, numbers, plan, verifier, engine, conversations)
    )
    return _measured(
        _Texts.joined(processes.gathered(own), list(teachers.members) if teachers else []),
        comparison,
        prompts,
        plan,
        teachers.routes if teachers else (),
        student,
    )


def _texts_of(
    student: LanguageModel,
    comparison: Comparison | None,
    prompts: Sequence[Prompt],
    numbers: Sequence[int],
    plan: EvaluationPlan,
    verifier: Verifier | None,
    engine: RolloutEngine,
    conversations: Conversations | None,
) -> _Texts:
    """The texts of the prompts ``numbers``, scored by both sides."""
    sampling = Sampling(plan.max_new_tokens, thinking_budget=plan.thinking_budget)
    many = plan.num_generations
    places = [number * many + n for number in numbers for n in range(many)]
    seeds = [(plan.seed, 2**31, n) for n in range(len(prompts) * many)]
    draw = _Drawing(student, engine, verifier, conversations)
    with doing("student draws"):
        drawn = draw([prompts[n // many] for n in places], sampling, [seeds[n] for n in places])
    each = [(place, r) for place, (turns, _) in zip(places, drawn, strict=True) for r in turns]
    texts = _Texts({(place, _turn_number(r)): r for place, r in each})
    if comparison is not None:
        rows = comparison.rows([r for _, r in each])
        scored, skipped = comparison.of_student(rows.compared, [each[n][0] for n in rows.numbers])
        texts = replace(texts, scored=scored, skipped=skipped)
        if comparison.writers is not None:
            taught, more = comparison.of_teachers(comparison.writers, seeds, numbers)
            texts = replace(texts, taught=taught, skipped=skipped + more)
    complete = [n for n in numbers if prompts[n].completion is not None]
    given = [completed(student, prompts[n], plan.max_new_tokens) for n in complete]
    logp = [each.events for each in student_logp(student, given, plan)]
    texts = replace(texts, given=dict(zip(complete, zip(logp, given, strict=True), strict=True)))
    rewards = {place: score for place, (_, score) in zip(places, drawn, strict=True) if score is not None}
    if rewards:
        greedy = replace(sampling, temperature=0.0)
        with doing("student answers"):
            best = draw([prompts[n] for n in numbers], greedy, [seeds[n] for n in numbers])
        solved = {n: (score or 0.0) >= 1.0 for n, (_, score) in zip(numbers, best, strict=True)}
        texts = replace(texts, rewards=rewards, solved=solved)
    return texts


@dataclass(frozen=True)
class _Drawing:
    """Draws completions or conversations: the turns of each, and its score."""

    student: LanguageModel
    engine: RolloutEngine
    verifier: Verifier | None
    conversations: Conversations | None

    def __call__(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Seed]
    ) -> list[tuple[list[Rollout], float | None]]:
        if self.conversations is not None:
            generate = within_budgets(self.student, self.engine.generate)
            found = self.conversations.draw(prompts, seeds, sampling, generate)
            if failed := [each.problem for each in found if each.problem]:
                _log.warning(
                    "%d of %d conversations of an evaluation were ended by an error of the environment, such as %s",
                    *(len(failed), len(found), failed[0]),
                )
            return [(each.rollouts, each.score) for each in found]
        rollouts = sample(self.engine, self.student, prompts, sampling, seeds=seeds)
        return [([r], self._score(r)) for r in rollouts]

    def _score(self, rollout: Rollout) -> float | None:
        if self.verifier is None:
            return None
        return verified(self.verifier, rollout)


def verified(verifier: Verifier, rollout: Rollout) -> float:
    """A verifier's score of a completion; 0 if it reached the length limit.

    Raises:
        DataError: the score is no finite number.
    """
    score = verifier.score(rollout.prompt, rollout.text) if rollout.stopped else 0.0
    try:
        return score_of(score)
    except DataError as error:
        raise DataError(f"prompt {rollout.prompt.key}: the verifier scored {error}") from None


def _measured(
    texts: _Texts,
    comparison: Comparison | None,
    prompts: Sequence[Prompt],
    plan: EvaluationPlan,
    routes: Sequence[str],
    student: LanguageModel,
) -> Evaluation:
    """The measures of the texts of all prompts; ``routes``: the groups of accuracies."""
    rollouts = list(texts.rollouts.values())
    measures = _rollout_measures(student, rollouts, plan)
    if any(r.turn is not None for r in rollouts):
        measures["turns"] = len(rollouts) / max(1, len({place for place, _ in texts.rollouts}))
    shown = {number * plan.num_generations: number for number in range(plan.samples)}
    recorded = [(shown[place], r) for (place, _), r in texts.rollouts.items() if place in shown]
    samples = [
        {"prompt": prompt_text(r.prompt), "completion": r.text, "stopped": r.stopped}
        | ({} if r.turn is None else {"turn": r.turn.number})
        for _, r in recorded
    ]
    if comparison is not None:
        measures |= comparison.reverse_kl(texts.scored) | comparison.exact_divergences(
            "reverse", texts.scored
        )
        measures |= _agreement(texts.scored)
        # Each prompt's first sample and teacher; of each turn its first piece.
        signals = {(s.number, _turn_number(s.rollout)): s for s in reversed(texts.scored)}
        for (n, rollout), line in zip(recorded, samples, strict=True):
            if (s := signals.get((n, _turn_number(rollout)))) is None:
                continue
            if comparison.teachers.several:
                line["teacher"] = s.teacher
            line["chunks"] = chunk_records(s.text, s.chunks, s.logp_S, s.logp_T, s.alternatives)
        if texts.taught is not None:
            measures |= comparison.divergences("forward_kl_per_byte", texts.taught, sign=-1.0)
            measures |= comparison.exact_divergences("forward", texts.taught)
            if texts.taught:
                measures |= _bits_per_byte(
                    [s.logp_S for s in texts.taught], [s.rollout for s in texts.taught]
                )
        if texts.skipped:
            measures["skipped_sequences"] = float(texts.skipped)
    if texts.given:
        logp, given = zip(*texts.given.values(), strict=True)
        measures |= _bits_per_byte(logp, given)
    if texts.rewards:
        measures["score"] = float(np.mean(list(texts.rewards.values())))
        measures |= _accuracies([prompts[n] for n in texts.solved], list(texts.solved.values()), routes)
    return Evaluation(measures, samples)


def _turn_number(rollout: Rollout) -> int:
    return rollout.turn.number if rollout.turn else 0


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion that holds near 0 and 1 too.

    Source: Wilson, Journal of the American Statistical Association 22 (1927), 209–212.
    """
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def _rollout_measures(
    student: LanguageModel, rollouts: Sequence[Rollout], plan: EvaluationPlan
) -> dict[str, float]:
    cut = {"thinking_cut_share": float(np.mean([r.thinking_cut for r in rollouts]))}
    canonical = [
        canonical_tokens(student.vocabulary, r.tokenized, starts_text(r.prompt)).all() for r in rollouts
    ]
    return {
        "stop_rate": float(np.mean([r.stopped for r in rollouts])),
        "length_tokens": float(np.mean([r.ids.size for r in rollouts])),
        "length_bytes": float(np.mean([len(r.tokenized.data) for r in rollouts])),
        "canonical_share": float(np.mean(canonical)),
        **(cut if plan.thinking_budget is not None else {}),
    }


def _accuracies(prompts: Sequence[Prompt], solved: Sequence[bool], routes: Sequence[str]) -> dict[str, float]:
    """The share of prompts that are solved, over all of them and over those of each route, with 95 % intervals."""
    groups = {"accuracy": list(solved)}
    for name in routes:
        groups[f"accuracy[{name}]"] = [ok for p, ok in zip(prompts, solved, strict=True) if p.route == name]
    measures: dict[str, float] = {}
    for name, group in groups.items():
        if group:
            low, high = wilson(sum(group), len(group))
            measures |= {name: sum(group) / len(group), f"{name}_low": low, f"{name}_high": high}
    return measures


def _agreement(scored: Sequence[Scored]) -> dict[str, float]:
    single = sum(
        int(((np.diff(s.chunks[:, :2]) == 1) & (np.diff(s.chunks[:, 2:]) == 1)).sum()) for s in scored
    )
    tokens = sum(s.text.student.ids.size for s in scored)
    size = sum(s.bytes for s in scored)
    stopped = [s for s in scored if s.text.stopped]
    if not scored:
        return {}
    measures = {
        "one_to_one_share": single / max(1, tokens),
        "repaired_share": sum(s.text.teacher.repaired_bytes for s in scored) / max(1, size),
    }
    if any(s.bounded for s in scored):
        measures["bounded_share"] = sum(s.bounded for s in scored) / len(scored)
    if stopped:
        measures["stop_prob"] = float(np.mean([math.exp(s.logp_S[-1]) for s in stopped]))
        measures["teacher_stop_prob"] = float(np.mean([math.exp(s.logp_T[-1]) for s in stopped]))
    return measures


def _bits_per_byte(logp: Sequence[NDArray[np.float64]], rollouts: Sequence[Rollout]) -> dict[str, float]:
    nats = -sum(float(x.sum()) for x in logp)
    size = sum(len(r.tokenized.data) for r in rollouts)
    return {"bits_per_byte": nats / max(1, size) / math.log(2)}
