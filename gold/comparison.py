"""Texts of a student and of its teachers with both sides' log-probabilities, and the divergences between them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from gold.activity import doing, report
from gold.align.batch import AlignedBatch
from gold.align.chunks import align_tokens
from gold.align.model_inputs import aligned_text, rollout_batches, student_states, teacher_logits
from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.data import Prompt
from gold.errors import DataError
from gold.evaluation_samples import Alternatives, teacher_alternatives
from gold.exact.divergence import ExactText, unresolved
from gold.exact.marginals import marginals
from gold.kernels.lm_head import token_logp
from gold.kernels.logits import LazyLogits
from gold.kernels.tables import prefix_logp
from gold.losses.types import IMPOSSIBLE, possible
from gold.models.branches import TextStates
from gold.models.hidden_states import lazy_logits
from gold.models.language_model import LanguageModel
from gold.rollout.engine import given_rollout, sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.pieces import Rows, rows_of
from gold.rollout.types import Rollout, Sampling, Seed
from gold.teachers.protocol import Teacher
from gold.teachers.several import Teachers
from gold.tokenize.chat import starts_text
from gold.tokenize.conversation import TemplateForm

if TYPE_CHECKING:
    from gold.evaluate import EvaluationPlan


@dataclass(frozen=True)
class Scored:
    """Both models' log-probabilities of one text, per student row and per teacher row, stop event last; the student's
    of the text minus the teacher's, and the number of bytes covered; the index of its prompt, and its teacher's name.
    ``bounded``: the teacher's log-probability of the text is a lower bound. ``alternatives``: of a sample that is
    recorded, the teacher's most probable tokens at each of its rows. ``exact``: the divergence of both models' next
    bytes, if it was asked for."""

    rollout: Rollout
    text: AlignedText
    logp_S: NDArray[np.float64]
    logp_T: NDArray[np.float64]
    chunks: NDArray[np.int32]
    gap_nats: float
    gap_bytes: int
    bounded: bool = False
    number: int = 0
    teacher: str = ""
    alternatives: Alternatives | None = None
    exact: ExactText | None = None

    @property
    def bytes(self) -> int:
        """The length of the text in bytes."""
        return len(self.rollout.tokenized.data)


class Comparison:
    """Texts of the student and of its teachers, scored by both."""

    def __init__(
        self, student: LanguageModel, teachers: Teachers, prompts: Sequence[Prompt], plan: EvaluationPlan
    ) -> None:
        self.student, self.teachers, self.prompts, self.plan = student, teachers, prompts, plan
        self.pairs = {
            name: VocabularyPair(student.vocabulary, t.vocabulary.with_markers())
            for name, t in teachers.members.items()
        }

    @property
    def writers(self) -> dict[str, LanguageModel] | None:
        """The teachers' models, if all are in this process and return full rows, so that they can be sampled from."""
        members = self.teachers.members
        found = {name: t.model for name, t in members.items() if t.model is not None and t.gives == "rows"}
        return found if len(found) == len(members) else None

    def rows(self, rollouts: Sequence[Rollout]) -> Rows:
        """The rows of the student's samples that are compared with the teachers; see ``gold.rollout.pieces``."""
        members, student = self.teachers.members, self.student
        forms = {
            name: TemplateForm.of(t.tokenizer, t.rendering)
            for name, t in members.items()
            if t.tokenizer is not None
        }
        opened = TemplateForm.of(student.tokenizer, student.rendering).opens_thinking
        return rows_of(
            rollouts,
            lambda rollout: [forms[name] for name in self.teachers.of(rollout.prompt) if name in forms],
            self.plan.thinking,
            opened,
        )

    def of_student(self, rollouts: Sequence[Rollout], places: Sequence[int]) -> tuple[list[Scored], int]:
        """The student's samples, and how many of them some teacher cannot score."""
        members = self.teachers.members
        logp_S = student_logp(self.student, rollouts, self.plan)
        texts = [
            {name: aligned_text(r, self.pairs[name]) for name in self.teachers.of(r.prompt)} for r in rollouts
        ]
        skipped = {
            i
            for i, (r, by) in enumerate(zip(rollouts, texts, strict=True))
            if any(members[name].misfit(r.prompt, text.teacher.ids.size) for name, text in by.items())
        }
        scored: list[Scored] = []
        recorded = self.plan.samples * self.plan.num_generations
        for name in members:
            chosen = [i for i, by in enumerate(texts) if name in by and i not in skipped]
            found = self._score(
                name,
                [rollouts[i] for i in chosen],
                [texts[i][name] for i in chosen],
                [logp_S[i] for i in chosen],
                recorded={k for k, i in enumerate(chosen) if places[i] < recorded},
            )
            scored += [
                replace(s, number=places[i] // self.plan.num_generations)
                for i, s in zip(chosen, found, strict=True)
            ]
        return scored, len(skipped)

    def of_teachers(
        self, writers: Mapping[str, LanguageModel], seeds: Sequence[Seed], numbers: Sequence[int]
    ) -> tuple[list[Scored], int]:
        """One sample of each teacher of the prompts ``numbers``, and how many do not fit a teacher's or the student's
        context."""
        scored: list[Scored] = []
        skipped = 0
        sampling = Sampling(max_new_tokens=self.plan.max_new_tokens)
        for name, model in writers.items():
            teacher, pair = self.teachers.members[name], self.pairs[name]
            graded = [n for n in numbers if name in self.teachers.of(self.prompts[n])]
            own = [n for n in graded if not teacher.misfit(self.prompts[n], sampling.max_new_tokens)]
            prompts, streams = [teacher.adapt_prompt(self.prompts[n]) for n in own], [seeds[n] for n in own]
            engine = HuggingFaceEngine(model, self.plan.generation_batch_size)
            with doing(f"{self._called(name)} draws"):
                theirs = sample(engine, model, prompts, sampling, seeds=streams)
            taught: list[tuple[int, Rollout, AlignedText]] = []
            for n, written in zip(own, theirs, strict=True):
                prompt = self.prompts[n]
                back = pair.to_student(written.tokenized, at_start=starts_text(prompt))
                try:
                    rollout = given_rollout(self.student, prompt, back, written.stopped)
                except DataError:
                    continue
                text = replace(aligned_text(rollout, pair), teacher=written.tokenized)
                taught.append((n, rollout, text))
            skipped += len(graded) - len(taught)
            rollouts, texts = [r for _, r, _ in taught], [t for _, _, t in taught]
            mine = student_logp(self.student, rollouts, self.plan)
            found = self._score(name, rollouts, texts, mine, written_by_teacher=True)
            scored += [replace(s, number=n) for (n, _, _), s in zip(taught, found, strict=True)]
        return scored, skipped

    @torch.no_grad()
    def _score(
        self,
        name: str,
        rollouts: Sequence[Rollout],
        texts: Sequence[AlignedText],
        logp_S: Sequence[StudentLogp],
        recorded: Collection[int] = (),
        written_by_teacher: bool = False,
    ) -> list[Scored]:
        """Both models' log-probabilities of each rollout, retokenized for the teacher, given the student's; of those
        ``recorded`` also the teacher's alternatives."""
        teacher, pair = self.teachers.members[name], self.pairs[name]
        found: dict[int, Scored] = {}
        for chosen in self._batches(rollouts):
            with doing(f"{self._called(name)} reads"):
                report(len(found), len(rollouts), "texts")
                logits = teacher_logits(teacher, [rollouts[i] for i in chosen], [texts[i] for i in chosen])
            for i, theirs in zip(chosen, logits, strict=True):
                rollout, text, mine = rollouts[i], texts[i], logp_S[i]
                stops = teacher.vocabulary.stop_ids
                logp_T = _event_logp(theirs, text.teacher.ids, text.stopped, stops)
                chunks = align_tokens(text.student, text.teacher).chunks
                gap = mine.events.sum() - logp_T.sum(), len(text.student.data), False
                if mine.rows is not None and not pair.same:
                    batch = AlignedBatch([text], pair, mine.rows.device, teacher.device)
                    gap = _gap_of_prefixes(batch, mine.rows, theirs)
                scored = Scored(rollout, text, mine.events, logp_T, chunks, *gap, teacher=name)
                if i in recorded:
                    best = teacher_alternatives(theirs, teacher.vocabulary)
                    scored = replace(scored, alternatives=best)
                if self.plan.branches:
                    with doing("exact divergence"):
                        report(len(found), len(rollouts), "texts")
                        exact = self.exact_text(teacher, pair, rollout, text, written_by_teacher)
                    scored = replace(scored, exact=exact)
                found[i] = scored
        return [found[i] for i in range(len(rollouts))]

    def exact_text(
        self, teacher: Teacher, pair: VocabularyPair, rollout: Rollout, text: AlignedText, forward: bool
    ) -> ExactText:
        """The divergence of the next bytes along a text; ``forward``: KL(teacher ‖ student)."""
        least, stopped = self.plan.branches, text.stopped
        prompt = rollout.prompt.for_teacher
        rows = text.student.ids.size + stopped
        states = (
            TextStates(self.student, rollout.prompt_ids, text.student.ids, rows),
            teacher.states(prompt, text.teacher, stopped),
        )
        sides = zip(
            (pair.student, pair.teacher), pair.kernel_tries, (text.student, text.teacher), states, strict=True
        )
        was_training = self.student.lm.training
        self.student.lm.eval()
        student, theirs = (
            marginals(vocabulary, trie, own, stopped, each, least) for vocabulary, trie, own, each in sides
        )
        self.student.lm.train(was_training)
        return ExactText.of(student, theirs, forward=forward, teacher_stops=bool(pair.teacher.stop_ids))

    def _called(self, name: str) -> str:
        return f"teacher {name}" if self.teachers.several else "teacher"

    def _batches(self, rollouts: Sequence[Rollout]) -> list[list[int]]:
        """Indices of the texts that a teacher is asked for together."""
        size, tokens = self.plan.micro_batch_size, self.plan.micro_batch_tokens
        if tokens is not None:
            return rollout_batches(rollouts, size, tokens)
        return [list(range(len(rollouts)))[first : first + size] for first in range(0, len(rollouts), size)]

    def reverse_kl(self, scored: Sequence[Scored]) -> dict[str, float]:
        """The reverse KL over the samples that no teacher gives probability 0, and the share of the others."""
        measures: dict[str, float] = {}
        written = [s for s in scored if (s.logp_T > IMPOSSIBLE).all()]
        if len(written) < len(scored):
            measures["impossible_share"] = 1.0 - len(written) / len(scored)
        return measures | self.divergences("reverse_kl_per_byte", written, sign=1.0)

    def divergences(self, name: str, scored: Sequence[Scored], sign: float) -> dict[str, float]:
        """The divergence over all prompts and, with several teachers, over those of each."""
        if not scored:
            return {}
        teachers = self.teachers
        weights = [teachers.weight(s.teacher) for s in scored]
        measures = self._divergence(name, scored, weights, sign)
        for teacher in teachers.members if teachers.several else ():
            if own := [s for s in scored if s.teacher == teacher]:
                measures |= self._divergence(f"{name}[{teacher}]", own, [1.0] * len(own), sign)
        return measures

    def exact_divergences(self, direction: str, scored: Sequence[Scored]) -> dict[str, float]:
        """Value and lower bound of the exact divergence; of the student's samples what is unresolved too."""
        if not self.plan.branches or not scored:
            return {}
        measures: dict[str, float] = {}
        for name, of_value in (
            (f"exact_{direction}_kl_per_byte", True),
            (f"least_{direction}_kl_per_byte", False),
        ):
            values = [
                replace(
                    s, gap_nats=float((s.exact.value if of_value else s.exact.bound).sum()), gap_bytes=s.bytes
                )
                for s in scored
                if s.exact is not None
            ]
            measures |= self.divergences(name, values, sign=1.0)
        if direction == "reverse":
            measures |= unresolved([s.exact for s in scored if s.exact is not None])
        return measures

    def _divergence(
        self, name: str, scored: Sequence[Scored], weights: Sequence[float], sign: float
    ) -> dict[str, float]:
        number = np.array([s.number for s in scored])
        weight, prompts = np.array(weights), len(self.prompts)
        gaps = sign * np.bincount(number, weight * [s.gap_nats for s in scored], prompts)
        sizes = np.bincount(number, weight * [float(s.gap_bytes) for s in scored], prompts)
        there = np.unique(number)  # without prompts of other teachers
        low, high = bootstrap_ratio(gaps[there], sizes[there], self.plan.seed)
        return {name: float(gaps.sum() / max(1.0, sizes.sum())), f"{name}_low": low, f"{name}_high": high}


def bootstrap_ratio(
    numerator: NDArray[np.float64], denominator: NDArray[np.float64], seed: int, draws: int = 1000
) -> tuple[float, float]:
    """95 % percentile interval of ``Σ numerator / Σ denominator``, items resampled with replacement; NaN where an item
    is infinite or there are fewer than two, which do not show how far items differ."""
    if numerator.size < 2 or not np.isfinite(numerator).all():
        return math.nan, math.nan
    chosen = np.random.default_rng(seed).integers(0, numerator.size, (draws, numerator.size))
    ratios = numerator[chosen].sum(1) / np.maximum(denominator[chosen].sum(1), 1.0)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def _gap_of_prefixes(
    batch: AlignedBatch, student: LazyLogits, teacher: LazyLogits
) -> tuple[float, int, bool]:
    """For a truncated text: the student's log-probability that a text begins with it, minus the teacher's; the bytes
    covered by both; whether the teacher's is only a lower bound.

    On both sides any last token that reaches or crosses the end of the text counts, not only the sampled one. Bytes
    after the last one that both cover, such as the first bytes of a character, are left out.
    """
    position, _, event = batch.path
    observed = batch.observed_path & batch.student.layout.resolved[position, event]
    known = torch.nonzero(observed)[:, 0]
    if not known.numel():
        return 0.0, 0, False
    data = batch.texts[0].student.data[: int(known[-1]) + 1]
    sides = (
        (student, batch.student.layout, batch.student.begins),
        (teacher, batch.teacher.layout, batch.teacher.begins),
    )
    mine, theirs = (prefix_logp(rows, layout, begins, data) for rows, layout, begins in sides)
    return mine - theirs, len(data), teacher.partial


@dataclass(frozen=True)
class StudentLogp:
    """The student's log-probability of each of its tokens of a text, the stop event last; for a truncated text also its
    states."""

    events: NDArray[np.float64]
    rows: LazyLogits | None


@torch.no_grad()
def student_logp(
    student: LanguageModel, rollouts: Sequence[Rollout], plan: EvaluationPlan
) -> list[StudentLogp]:
    """The student's log-probabilities of each text."""
    was_training = student.lm.training
    student.lm.eval()
    results: dict[int, StudentLogp] = {}
    for chosen in rollout_batches(rollouts, plan.micro_batch_size, plan.micro_batch_tokens):
        mine = [rollouts[i] for i in chosen]
        with doing("student reads"):
            report(len(results), len(rollouts), "texts")
            whole = lazy_logits(student.lm, student_states(student, mine))
        for i, rows in zip(chosen, whole.split([r.ids.size for r in mine]), strict=True):
            stopped = rollouts[i].stopped
            events = _event_logp(rows, rollouts[i].tokenized.ids, stopped, student.vocabulary.stop_ids)
            results[i] = StudentLogp(events, None if stopped else rows)
    student.lm.train(was_training)
    return [results[i] for i in range(len(rollouts))]


def _event_logp(
    rows: LazyLogits, ids: NDArray[np.int32], stopped: bool, stops: tuple[int, ...]
) -> NDArray[np.float64]:
    """Log-probability of each token of a text and, last, of its stop event, in nats."""
    device = rows.device
    target = np.concatenate((ids, [-1])) if stopped else ids
    log_target, log_stop = token_logp(
        rows, torch.from_numpy(target.astype(np.int64)).to(device), torch.tensor(stops, device=device)
    )
    logp = log_target.double()
    if stopped:
        logp[-1] = log_stop[-1]
    return possible(logp).cpu().numpy()
