"""One optimizer step, from prompts to the update, and what a run carries from step to step."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from gold.align.batch import AlignedBatch
from gold.align.collate import aligned_batch, microbatches, misfit, read, student_states, teacher_rows
from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.data import Prompt, PromptOrder
from gold.errors import CheckpointError, ConfigError, DataError, TeacherError
from gold.evaluate import Evaluation, EvaluationPlan, Verifier, evaluate
from gold.files import read_json
from gold.kernels import backend_for
from gold.kernels.logits import GivenLogits, LazyLogits
from gold.losses import DivergenceRow, LossInputs, Need, Objective, find
from gold.losses.mixture import OtherTeacher, mixed_rows
from gold.losses.policy import means_of_others, sampled_credit
from gold.losses.table import check_one_vocabulary
from gold.models.language_model import LanguageModel
from gold.models.load import load_weights, save_model
from gold.models.states import PaddedStates, StatesModule, lazy_logits, recompute_activations
from gold.rollout.engine import RolloutEngine, completed, encode_prompt, sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Rollout, group_advantages
from gold.teachers.protocol import Teacher
from gold.teachers.several import Teachers
from gold.tokenize.vocabulary import Vocabulary
from gold.train.alarms import Alarms, repetition, why_bad
from gold.train.checkpoint import Checkpoint, latest_checkpoint
from gold.train.diagnosis import why_not_finite
from gold.train.interrupt import NAMES
from gold.train.optimizer import MasterAdamW
from gold.train.recipe import Recipe
from gold.train.run_folder import RunFolder
from gold.train.trackers import Tracker

Answer = TypeVar("Answer")
NO_ROWS = GivenLogits(torch.zeros(0, 1))
"""The student's states where they are not read."""
NEEDS: tuple[Need, ...] = typing.get_args(Need)
"""What objectives ask of a teacher, least first."""
MISSED_SHARE = 0.1
"""Above this share of bytes at which the student gives the teacher's favourite less than 1 %, a run warns."""


@dataclass(frozen=True)
class BoundTerm:
    """A term of the loss: an objective with its options, its weight, and the name of its metric."""

    objective: Objective
    weight: float
    label: str


def pairs_of(student: LanguageModel, teachers: Teachers | None) -> dict[str, VocabularyPair]:
    """The student's vocabulary beside each teacher's, by the teacher's name; beside itself where there is none."""
    mine = student.vocabulary
    if teachers is None:
        return {"": VocabularyPair(mine, mine)}
    return {name: VocabularyPair(mine, t.vocabulary.with_markers()) for name, t in teachers.members.items()}


def terms_of(
    recipe: Recipe, teachers: Teachers | None, pairs: Mapping[str, VocabularyPair]
) -> list[BoundTerm]:
    """The recipe's terms for these pairs; where all vocabularies are one, divergences go token by token.

    Raises:
        ConfigError: no term, an unknown one, or options that it cannot take.
        TeacherError: a term that needs more than a teacher gives.
    """
    terms = []
    same = all(pair.same for pair in pairs.values())
    mixed = False
    if teachers is not None and teachers.mix is not None:
        mixed = True
        # What is known of a partial row differs from teacher to teacher.
        same = same and all(t.gives == "rows" for t in teachers.members.values())
    for term in recipe.objectives:
        if not term.weight:
            continue
        row = find(term.name)
        options, label = dict(term.options), term.name
        if isinstance(row, DivergenceRow):
            options = row.moved("tokens", options) if same else row.resolve(options)
            label = f"{term.name}_{options['support']}"
        if mixed and row.needs != "nothing" and options.get("support") not in ("bytes", "tokens"):
            raise ConfigError(
                f"objective {label} cannot be taken of a mix of teachers; choose a divergence on bytes, or a route"
            )
        check_one_vocabulary(term.name, same)
        if (top_k := options.get("top_k")) is not None:
            known = min(p.student.size if same else p.shared_ids[0].size + 1 for p in pairs.values())
            if top_k > known:
                raise ConfigError(
                    f"objective {term.name}: top_k is {top_k}, and there are only {known:,} events that both "
                    "vocabularies have; lower it"
                )
        bound = row(**options)
        for teacher in teachers.members.values() if teachers else (None,):
            gives = teacher.gives if teacher else "nothing"
            if NEEDS.index(bound.needs) > NEEDS.index(gives):
                what = {
                    "tokens": "log-probabilities of given tokens",
                    "top_k": "the likeliest tokens of each row",
                    "rows": "full rows",
                }[bound.needs]
                raise TeacherError(
                    f"objective {term.name} needs {what} of a teacher, and "
                    + (f"teacher {teacher.name} gives {gives}" if teacher else "there is no teacher")
                )
        terms.append(BoundTerm(bound, term.weight, label))
    labels = [t.label for t in terms]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"objective {twice[0]} is given twice; give it once, with the sum of its weights")
    if not terms:
        raise ConfigError("no objective with a weight above 0: nothing would be learned")
    return terms


class Loop:
    """The state of a run, and what one step does to it."""

    def __init__(
        self,
        student: LanguageModel,
        teachers: Teachers | None,
        pairs: Mapping[str, VocabularyPair],
        prompts: Sequence[Prompt],
        recipe: Recipe,
        terms: Sequence[BoundTerm],
        verifier: Verifier | None,
        accelerator: Accelerator,
        engine: RolloutEngine | None = None,
    ) -> None:
        self.student, self.teachers, self.pairs, self.verifier = student, teachers, pairs, verifier
        self.prompts, self.recipe, self.terms, self.accelerator = prompts, recipe, terms, accelerator
        self.engine = engine or HuggingFaceEngine(student, recipe.generation_batch_size)
        self.order = PromptOrder(len(prompts), recipe.seed)
        self.now: Callable[[], float] = partial(_wall_s, student.device)
        self.step = 0
        self.bad_steps = 0
        self._warned: set[str] = set()
        self._impossible = ""
        self._unread = ""
        self._is_bad = False
        self._alarms = Alarms()
        if accelerator.num_processes > 1:
            student.lm.to(accelerator.device)
        self.reference: Any = None
        if any(t.objective.name == "reference_kl" for t in terms):
            # A teacher that is the student as it is now need not be held twice.
            held = teachers.frozen_copy(student.lm) if teachers else None
            self.reference = held or copy.deepcopy(student.lm).eval().requires_grad_(False)
        if recipe.gradient_checkpointing:
            recompute_activations(student.lm)
        # Policy and gradient are of one distribution: no dropout, nor whatever else is random in train mode.
        student.lm.eval()
        trained = [p for p in student.lm.parameters() if p.requires_grad]
        optimizer = MasterAdamW(
            trained, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )
        self.masters = optimizer.masters
        # The model is where it should be: a run of one process stays on the device that was asked for.
        self.module, self.optimizer = accelerator.prepare(
            StatesModule(student.lm), optimizer, device_placement=[False, False]
        )
        self.routes = teachers.routes if teachers else ()

    @property
    def _retries(self) -> int | None:
        """How often teachers have been asked again so far, None where no teacher counts that."""
        members = self.teachers.members.values() if self.teachers else ()
        counts = [teacher.retries for teacher in members]
        return sum(n for n in counts if n is not None) if any(n is not None for n in counts) else None

    def header(self) -> dict[str, str]:
        """What the run will do, in a few lines for people."""
        recipe = self.recipe
        names = ", ".join(f"{t.weight:g} × {t.label}" if t.weight != 1 else t.label for t in self.terms)
        by_token = self.teachers and any(t.label.endswith("_tokens") for t in self.terms)
        return {
            "student": f"{self.student.name} ({_told(self.student.vocabulary)}, {self.student.device}"
            f"{_own_code(self.student)})",
            **self._header_of_teachers(),
            "objective": names + (" (one vocabulary: token by token)" if by_token else ""),
            "step": f"{recipe.prompts_per_step} prompts × {recipe.num_generations}, λ = {recipe.on_policy:g}, "
            f"up to {recipe.max_new_tokens} tokens, {self.accelerator.num_processes} process(es), "
            f"precision {self.accelerator.mixed_precision}",
            "kernels": backend_for(self.student.device).__name__.rpartition(".")[2],
        }

    def _header_of_teachers(self) -> dict[str, str]:
        if self.teachers is None:
            return {"teacher": "none"}
        lines = {}
        for name, t in self.teachers.members.items():
            share = f", weight {self.teachers.weight(name):.3g}" if self.teachers.mix else ""
            own = _own_code(t.model) if t.model else ""
            line = f"{t.name} ({_told(t.vocabulary)}, {t.device}{share}{own})"
            lines[f"teacher {name}" if self.teachers.several else "teacher"] = line
        if self.teachers.several:
            mix = self.teachers.mix
            lines["teachers"] = (
                f"{mix.rule} mix of all".replace("_", "-") if mix else "each prompt has its own"
            )
        return lines

    def prepare(self) -> float:
        """Seconds until the kernels of all terms are ready, run once on a text of one letter: what a compiler has made
        of them is kept for later runs."""
        started = self.now()
        mine = self.student.vocabulary
        tokenized = mine.encode("a")
        ids = np.append(tokenized.ids, mine.stop_ids[0]).astype(np.int32)
        states = PaddedStates.of([[self.student.pad_id]], [tokenized.ids], [ids.size], 0, self.student.device)
        with torch.no_grad(), self.accelerator.autocast():
            logits = lazy_logits(self.student.lm, states).logits()
        for name, pair in self.pairs.items():
            text = AlignedText(
                ids, tokenized, pair.read(tokenized), True, sampling_logprobs=np.zeros(ids.size, np.float32)
            )
            teacher = self.teachers.members[name] if self.teachers else None
            device = teacher.device if teacher else self.student.device
            batch = AlignedBatch([text], pair, self.student.device, device)
            size = int(batch.teacher.row_starts[-1]), pair.teacher.size
            dtype = teacher.dtype if teacher else torch.float32
            inputs = LossInputs(
                batch,
                GivenLogits(logits.clone().requires_grad_(True)),
                GivenLogits(torch.zeros(size, dtype=dtype, device=device)),
                GivenLogits(logits),
            )
            for term in self.terms:
                total = term.objective(inputs).total
                # A teacher that cannot write the letter makes it infinite.
                if total.requires_grad and total.isfinite():
                    total.backward()
        return self.now() - started

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics.

        Raises:
            TeacherError: the teacher has not graded all of this step's texts; nothing has changed.
        """
        clock = _Clock(self.now)
        torch.manual_seed(int(np.random.SeedSequence([self.recipe.seed, self.step]).generate_state(1)[0]))
        with clock("rollout"):
            rollouts, unreadable = self._rollouts()
        with clock("read"):
            groups, unread = self._groups(rollouts)
            unread = [*unreadable, *unread]
        sums: dict[str, float] = defaultdict(float)
        with clock("teacher"):
            if any(t.objective.needs != "nothing" for t in self.terms):
                before = self._retries
                self._together(partial(self._ask, groups))
                told = [rows for group in groups for each in group.rows.values() for rows in each]
                sums["teacher_tokens"] = float(sum(map(len, told)))
                if before is not None:
                    sums["teacher_retries"] = float((self._retries or 0) - before)
                groups, sums["teacher_impossible"] = self._possible(groups)
        with clock("read"):
            counts = self._total(self._counts(groups))
            self._set_baselines(groups)
        self.module.eval()
        self.optimizer.zero_grad(set_to_none=True)
        if not groups:
            # The other processes wait for this one's share of the gradient.
            self.accelerator.backward(self._nothing())
        for number, group in enumerate(groups):
            states = student_states(self.student, group.rollouts)
            last = number == len(groups) - 1
            with clock("student"), contextlib.ExitStack() as stack:
                if not last:
                    stack.enter_context(self.accelerator.no_sync(self.module))
                loss, parts = self._loss(states, group, counts)
                self.accelerator.backward(loss)
            for name, value in parts.items():
                sums[name] += float(value)
        with clock("update"):
            kept = [rollout for group in groups for rollout in group.rollouts]
            writing = _writing(rollouts, kept, [group.batch for group in groups])
            writing["unread"] = len(unread)
            sums = defaultdict(float, self._total(dict(sums) | writing, apart=True))
            norm = float(
                self.accelerator.clip_grad_norm_(self.module.parameters(), self.recipe.max_grad_norm)
            )
            finite = math.isfinite(norm) and math.isfinite(sums["loss"])
            # Nothing was learned where the teacher could grade no text; the moments of the optimizer would still move.
            applied = finite and (any(counts.values()) or not sums["teacher_impossible"]) and sums["kept"] > 0
            lr = self.recipe.lr_at(self.step)
            if applied:
                for group_ in self.optimizer.param_groups:
                    group_["lr"] = lr
                self.optimizer.step()
                for teacher in self.teachers.members.values() if self.teachers else ():
                    teacher.ema_update(self.student.lm, self.masters)
            self.optimizer.zero_grad(set_to_none=True)
        update: dict[str, Any] = {"lr": lr, "grad_norm": norm, "applied": applied}
        if not finite:
            update |= self._diagnosis(groups, sums)
        # Where no text was left to be read, nothing has gone wrong either.
        self._is_bad = not applied and (not finite or sums["kept"] > 0)
        self.bad_steps = 0 if applied else self.bad_steps + self._is_bad
        self.step += 1
        self._unread = self._unread or next(iter(unread), "")
        return self._record(sums, counts, update, clock)

    def _diagnosis(self, groups: Sequence[_Group], sums: Mapping[str, float]) -> dict[str, str]:
        """Why the step's loss or gradient is not finite, as far as this process can tell."""
        why, remedy = why_not_finite(
            self.student,
            [rollout for group in groups for rollout in group.rollouts],
            {
                name: [
                    each
                    for g in groups
                    if name in g.rows
                    for each in zip(g.rollouts, g.rows[name], strict=True)
                ]
                for name in self.pairs
            },
            {term.label: sums[term.label] for term in self.terms if term.label in sums},
            self.recipe.micro_batch_size,
        )
        return {"why": why, "remedy": remedy}

    def _rollouts(self) -> tuple[list[Rollout], list[str]]:
        """This process's share of the step's completions, rewarded where there is a verifier; and, for each that there
        would be of a prompt that the student cannot read, why: of very many prompts not all are looked at before."""
        recipe = self.recipe
        chosen = list(enumerate(self.order.batch(self.step, recipe.prompts_per_step)))
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        draws: list[tuple[Prompt, tuple[int, ...]]] = []
        given: list[Rollout] = []
        unreadable: list[str] = []
        for place, index in mine:
            prompt = self.prompts[index]
            writes = recipe.student_writes(self.step, place)
            try:
                encode_prompt(self.student, prompt, recipe.max_new_tokens)
            except DataError as error:
                unreadable += [str(error)] * (recipe.num_generations if writes else 1)
                continue
            if writes:
                draws += [
                    (prompt, (recipe.seed, self.step, place, 0, n)) for n in range(recipe.num_generations)
                ]
            else:
                given.append(completed(self.student, prompt, recipe.max_new_tokens))
        drawn: list[Rollout] = []
        if draws:
            self._push()
            with self.accelerator.autocast():
                drawn = sample(
                    self.engine,
                    self.student,
                    [prompt for prompt, _ in draws],
                    recipe.sampling,
                    seeds=[seed for _, seed in draws],
                )
        if self.verifier is not None and drawn:
            verifier = self.verifier
            rewards = np.array([verifier.score(r.prompt, r.text) if r.stopped else 0.0 for r in drawn])
            scaled = group_advantages(rewards, recipe.num_generations)
            drawn = [
                replace(r, reward=float(x), advantage=float(a))
                for r, x, a in zip(drawn, rewards, scaled, strict=True)
            ]
        return drawn + given, unreadable

    def _push(self) -> None:
        """Has the engine generate with the weights as they are now."""
        if self.engine.version != self.step:
            self.engine.push(self.student.lm.state_dict(), self.step)

    def _together(self, ask: Callable[[], Answer]) -> Answer:
        """What the teacher is asked for; where one process does not get it, none goes on, since they would wait for
        each other."""
        try:
            answer, failure = ask(), None
        except TeacherError as error:
            answer, failure = None, error
        if self.anywhere(failure is not None):
            told = gather_object([str(failure or "")])  # so that each process can say why
            raise TeacherError(next(filter(None, told))) from failure
        return cast(Answer, answer)

    def _groups(self, rollouts: Sequence[Rollout]) -> tuple[list[_Group], list[str]]:
        """The rollouts in microbatches, each with one set of teachers; and why teachers cannot read the others, which
        are in none."""
        asked = self.teachers is not None and any(t.objective.needs != "nothing" for t in self.terms)
        unread: list[str] = []
        by_teachers: dict[tuple[str, ...], list[Rollout]] = {}
        for rollout in rollouts:
            names = self.teachers.of(rollout.prompt) if self.teachers else ("",)
            by_teachers.setdefault(names, []).append(rollout)
        groups = []
        for names in sorted(by_teachers):
            given: list[Rollout] = []
            read_by: dict[str, list[AlignedText]] = {name: [] for name in names}
            for rollout in by_teachers[names]:
                texts = {name: read(rollout, self.pairs[name]) for name in names}
                members = self.teachers.members if self.teachers and asked else {}
                reasons = (misfit(members[name], rollout, texts[name]) for name in names if name in members)
                if reason := next(filter(None, reasons), ""):
                    unread.append(reason)
                    continue
                given.append(rollout)
                for name, text in texts.items():
                    read_by[name].append(text)
            for chosen in microbatches(given, self.recipe.micro_batch_size):
                texts_of = {name: [every[i] for i in chosen] for name, every in read_by.items()}
                groups.append(self._group(names, [given[i] for i in chosen], texts_of))
        return groups, unread

    def _group(
        self,
        names: tuple[str, ...],
        rollouts: Sequence[Rollout],
        texts_of: Mapping[str, Sequence[AlignedText]] | None = None,
    ) -> _Group:
        """A microbatch as each of its teachers reads it; ``texts_of``: as it has been read already."""
        batches: list[AlignedBatch] = []
        for name in reversed(names):
            teacher = self.teachers.members[name] if self.teachers else None
            texts = texts_of[name] if texts_of else [read(r, self.pairs[name]) for r in rollouts]
            other_batches = tuple(reversed(batches)) if name == names[0] else ()
            batches.append(
                aligned_batch(texts, self.pairs[name], self.student.device, teacher, other_batches)
            )
        return _Group(names, rollouts, tuple(reversed(batches)))

    def _counts(self, groups: Sequence[_Group]) -> dict[str, float]:
        """How many units of each term there are, and, where prompts go to different teachers, of each teacher's."""
        counts = {t.label: 0.0 for t in self.terms}
        for name in self.routes:
            counts |= {f"{t.label}[{name}]": 0.0 for t in self.terms}
        for group in groups:
            for term in self.terms:
                count = float(term.objective.count(group.batch))
                counts[term.label] += count
                if self.routes:
                    counts[f"{term.label}[{group.names[0]}]"] += count
        return counts

    def _ask(self, groups: Sequence[_Group]) -> None:
        """Has every teacher grade what it is to grade, in one go."""
        assert self.teachers is not None
        for name, teacher in self.teachers.members.items():
            mine = [(group, group.names.index(name)) for group in groups if name in group.names]
            rollouts = [r for group, _ in mine for r in group.rollouts]
            texts = [t for group, place in mine for t in group.batches[place].texts]
            rows = iter(teacher_rows(teacher, rollouts, texts) if rollouts else [])
            for group, _ in mine:
                group.rows[name] = [next(rows) for _ in group.rollouts]

    def _set_baselines(self, groups: Sequence[_Group]) -> None:
        """What terms take off the advantages of each microbatch: a mean over the whole step, all processes' texts."""
        size = self.recipe.max_new_tokens
        for term in self.terms:
            name, options = term.objective.name, term.objective.options
            if options.get("baseline") != "others":
                continue
            credits = [sampled_credit(self._inputs(g, NO_ROWS, None), name, options) for g in groups]
            numbers = [g.batch.row_number for g in groups]
            for group, mean in zip(
                groups, means_of_others(credits, numbers, size, self._added_up), strict=True
            ):
                group.baselines[name] = mean

    def _added_up(self, sums: Tensor) -> Tensor:
        """Sums over all processes, on the CPU."""
        if self.accelerator.num_processes == 1:
            return sums
        total: Tensor = self.accelerator.reduce(sums.to(self.accelerator.device), "sum")
        return total.cpu()

    def _possible(self, groups: Sequence[_Group]) -> tuple[list[_Group], float]:
        """The groups with nothing in the place of a text to which a teacher gives probability 0, from which no loss can
        learn; and how many these are."""
        assert self.teachers is not None
        found, possible = 0, []
        for group in groups:
            lost: set[int] = set()
            for name, batch in zip(group.names, group.batches, strict=True):
                stops = batch.teacher.stops
                targets = batch.teacher.targets.split(np.diff(batch.teacher.row_starts).tolist())
                for number, (rows, target) in enumerate(zip(group.rows[name], targets, strict=True)):
                    if rows.partial and bool((rows_off := rows.impossible(target, stops)).any()):
                        lost.add(number)
                        row = int(torch.nonzero(rows_off)[0])
                        self._impossible = self._impossible or _told_impossible(
                            self.teachers.members[name], group.rollouts[number], int(target[row]), row
                        )
            found += len(lost)
            possible.append(self._without(group, lost) if lost else group)
        return possible, float(found)

    def _without(self, group: _Group, lost: set[int]) -> _Group:
        """The group with texts of no bytes in the place of those that are lost: nothing of these counts."""
        nothing = self.student.vocabulary.encode(b"")
        rollouts = [r.without_text(nothing) if n in lost else r for n, r in enumerate(group.rollouts)]
        rows = {
            name: [r.select(slice(0)) if n in lost else r for n, r in enumerate(each)]
            for name, each in group.rows.items()
        }
        return replace(self._group(group.names, rollouts), rows=rows)

    def _loss(
        self, states: PaddedStates, group: _Group, counts: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The microbatch's share of the step's loss, times the number of processes, and detached sums by name."""

        reference: LazyLogits | None = None
        if self.reference is not None:
            with torch.no_grad(), self.accelerator.autocast():
                reference = lazy_logits(self.reference, states)

        def then(rows: LazyLogits) -> tuple[Tensor, dict[str, Tensor]]:
            inputs = self._inputs(group, rows, reference)
            total = torch.zeros((), device=rows.device)
            parts: dict[str, Tensor] = {}
            for term in self.terms:
                if not counts[term.label]:
                    continue
                value = term.objective(inputs)
                share = term.weight * value.total / counts[term.label]
                total = total + share
                parts[term.label] = value.total.detach()
                for name, part in value.parts.items():
                    parts.setdefault(name, part.detach() / counts[term.label])
                for name, part in value.sequence_logp.items():
                    parts.setdefault(name, part)
            # Sums over processes need the same names in all of them.
            for name in self.routes:
                for label in [t.label for t in self.terms if t.label in parts]:
                    parts[f"{label}[{name}]"] = parts[label] if name in group.names else 0.0 * parts[label]
            parts["loss"] = total.detach()
            # A step whose terms count nothing still needs a graph, or the processes would wait for each other.
            if not total.requires_grad:
                total = total + 0.0 * rows.select(slice(1)).logits().sum()
            return total * self.accelerator.num_processes, parts

        result: tuple[Tensor, dict[str, Tensor]] = self.module(states, then)
        return result

    def _nothing(self) -> Tensor:
        """A loss of nothing, whose gradient is zero everywhere."""
        ids = np.empty(0, np.int32)
        states = PaddedStates.of(
            [[self.student.pad_id]], [ids], [1], self.student.pad_id, self.student.device
        )
        loss: Tensor = self.module(states, lambda rows: 0.0 * rows.logits().sum())
        return loss

    def _inputs(self, group: _Group, rows: LazyLogits, reference: LazyLogits | None) -> LossInputs:
        """A microbatch as its objectives see it."""
        if not group.rows:
            return LossInputs(group.batch, rows, None, reference)
        theirs = [LazyLogits.joined(group.rows[name]) for name in group.names]
        mix = self.teachers.mix if self.teachers else None
        if mix is not None and any(t.label.endswith("_bytes") for t in self.terms):
            other_teachers = tuple(
                OtherTeacher(batch, own) for batch, own in zip(group.batches[1:], theirs[1:], strict=True)
            )
            return LossInputs(group.batch, rows, theirs[0], reference, mix, other_teachers)
        # Of one vocabulary, the mixture's rows are rows like any other teacher's.
        mixed = theirs[0] if mix is None else mixed_rows(theirs, group.batch.vocabularies.student.size, mix)
        return LossInputs(group.batch, rows, mixed, reference, baselines=group.baselines)

    def _record(
        self, sums: Mapping[str, float], counts: Mapping[str, float], update: dict[str, Any], clock: _Clock
    ) -> dict[str, Any]:
        """The line of a step."""
        record: dict[str, Any] = {"step": self.step, "loss": sums["loss"], **update}
        if self.teachers is not None or sums["unread"]:
            record["unread"] = int(sums["unread"])
        record |= {t.label: sums[t.label] / counts[t.label] for t in self.terms if counts[t.label]}
        record |= {name: sums[name] for name in MEANS if name in sums}
        if sums["logp_bytes"]:
            gap = sums["student_logp"] - sums["teacher_logp"]
            record["sampled_reverse_kl_per_byte"] = gap / sums["logp_bytes"]
        record |= self._record_of_teachers(sums, counts)
        sampled = sums["sampled"]
        if sampled:
            record["sampled_entropy"] = -sums["sampling_logprobs"] / max(1.0, sums["drawn_tokens"])
            record["repetition"] = sums["repetition"] / sampled
            record["stop_rate"] = sums["stopped"] / sampled
            record["canonical_share"] = sums["canonical"] / max(1.0, sums["sampled_tokens"])
            if self.verifier is not None:
                record["reward_mean"] = sums["reward"] / sampled
        if self.teachers:
            record["repaired_share"] = sums["repaired"] / max(1.0, sums["bytes"])
        record["length_tokens"] = sums["tokens"] / max(1.0, sums["sequences"])
        record["length_bytes"] = sums["bytes"] / max(1.0, sums["sequences"])
        record["bad_steps"] = self.bad_steps
        total = sum(clock.seconds.values())
        record |= {f"{phase}_s": seconds for phase, seconds in clock.seconds.items()}
        record |= {"step_s": total, "tokens_per_s": sums["tokens"] / total}
        if "teacher_tokens" in sums:
            record["teacher_tokens_per_s"] = sums["teacher_tokens"] / clock.seconds["teacher"]
        if "teacher_retries" in sums:
            record["teacher_retries"] = int(sums["teacher_retries"])
        if sums["teacher_impossible"]:
            record["teacher_impossible"] = int(sums["teacher_impossible"])
        return record

    def _record_of_teachers(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, Any]:
        """What a step's line says of each of several teachers."""
        record: dict[str, Any] = {}
        for name in self.routes:
            record |= {
                label: sums[label] / counts[label]
                for label in (f"{t.label}[{name}]" for t in self.terms)
                if counts[label]
            }
        mixed = self.teachers and self.teachers.mix and sums["logp_bytes"]
        for name in self.teachers.members if self.teachers and mixed else ():
            if (logp := sums.get(f"teacher_logp[{name}]")) is not None:
                gap = sums["student_logp"] - logp
                record[f"sampled_reverse_kl_per_byte[{name}]"] = gap / sums["logp_bytes"]
        return record

    def warnings(self, record: Mapping[str, Any]) -> list[str]:
        """What a person should know after this step; each kind once a run."""
        found = {}
        if record.get("unread"):
            which = f", such as {self._unread}" if self._unread else ""
            found["unread"] = (
                f"step {record['step']}: {record['unread']} completions, with their prompts, are more than can be read"
                f"{which}; they are left out and counted (unread); shorten the longest prompts, or lower "
                "rollout.max_new_tokens"
            )
        if self._is_bad:
            found[f"bad {record['step']}"] = (
                f"step {record['step']}: "
                + why_bad(record).removeprefix("a ")
                + f"; the step was not applied "
                f"({self.bad_steps} in a row, {self.recipe.bad_steps_allowed} are allowed)"
            )
        if record.get("teacher_impossible"):
            found["impossible"] = (
                f"step {record['step']}: nothing is learned from {record['teacher_impossible']} texts, to which the "
                f"teacher gives probability 0 (teacher_impossible counts them){self._impossible}. Does its server cut "
                "off what is unlikely? vLLM does with --logprobs-mode processed_logprobs and a top_p or top_k"
            )
        reverse = any(t.objective.name == "reverse_kl" for t in self.terms)
        if reverse and record.get("teacher_top1_missed_share", 0.0) > MISSED_SHARE:
            missed = record["teacher_top1_missed_share"]
            found["missed"] = (
                f"step {record['step']}: at {missed:.0%} of bytes the student gives what the teacher wants "
                "most less than 1 %. Reverse KL hardly moves what the student never samples: begin with forward_kl, or "
                "add it with a small weight, or train on teacher completions first (sft, rollout.on_policy=0)"
            )
        found |= self._alarms.check(record)
        fresh = {kind: text for kind, text in found.items() if kind not in self._warned}
        self._warned |= set(fresh)
        return list(fresh.values())

    def evaluate(self, heldout: Sequence[Prompt], plan: EvaluationPlan) -> Evaluation:
        """The student as it is on the held-out prompts; every process does the same, so that all know the result."""
        look = partial(
            evaluate,
            self.student,
            self.teachers,
            heldout,
            plan=plan,
            verifier=self.verifier,
            engine=self.engine,
        )
        self._push()
        with self.accelerator.autocast():
            return self._together(look)

    def write(self, folder: Path) -> None:
        """Everything that the next step depends on; the random draws and the data's place follow from the step."""
        save_model(self.student, folder / "student")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        for name, teacher in self.teachers.members.items() if self.teachers else ():
            if (state := teacher.state()) is not None:
                torch.save(state, folder / average_file(name))
        (folder / "state.json").write_text(json.dumps({"step": self.step, "bad_steps": self.bad_steps}))

    def resume(self, checkpoints: Path, folder: RunFolder | None, tracker: Tracker) -> None:
        """The state of the newest whole checkpoint; the first step where there is none.

        Raises:
            CheckpointError: none is whole, or what it holds is not of this run; metrics that cannot be read.
            ConfigError: it is of a later step than the run is to have.
        """
        found, notes = latest_checkpoint(checkpoints)
        for note in notes:
            tracker.note(note)
        if found is None:
            tracker.note("no checkpoint yet: the run starts at its first step")
        else:
            if found.step > self.recipe.steps:
                raise ConfigError(
                    f"{found.path} is of step {found.step}, and train.steps is {self.recipe.steps}; give it at least "
                    f"{found.step} to resume"
                )
            self.step, self.bad_steps = _read_state(found)
            load_weights(self.student, found.path / "student")
            with _read_of(found.path / "optimizer.pt"):
                load_optimizer(self.optimizer, found.path / "optimizer.pt", self.student.device)
            for name, teacher in self.teachers.members.items() if self.teachers else ():
                if teacher.state() is not None:
                    with _read_of(found.path / average_file(name)):
                        load_average(teacher, found.path / average_file(name))
            tracker.note(f"resumed after step {self.step}")
        if folder:
            for note in folder.rewind(self.step if found else -1):
                tracker.note(note)
        self.accelerator.wait_for_everyone()

    def signal_anywhere(self, number: int) -> int:
        """The number of a signal that has reached any process, the same in all of them; 0 where none has."""
        counts = {str(each): float(number == each) for each in (*NAMES, 0)}
        reached = self._total(counts)
        return next((int(each) for each in NAMES if reached[str(each)]), 0)

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is up in any process: a signal may reach them in different steps, or only one of them."""
        return self._total({"flag": float(flag)})["flag"] > 0

    def _total(self, values: dict[str, float], apart: bool = False) -> dict[str, float]:
        """Sums over all processes; ``apart``: not all of them have the same names."""
        if self.accelerator.num_processes == 1:
            return values
        names = sorted(set(gather_object(list(values)))) if apart else sorted(values)
        tensor = torch.tensor(
            [values.get(n, 0.0) for n in names], dtype=torch.float64, device=self.accelerator.device
        )
        return dict(zip(names, self.accelerator.reduce(tensor, "sum").tolist(), strict=True))


def load_average(teacher: Teacher, file: Path) -> None:
    """Restores a teacher from its file in a checkpoint."""
    teacher.load_state(torch.load(file, map_location=teacher.device, weights_only=True))


def average_file(name: str) -> str:
    """The file of a checkpoint that holds the weights of a teacher that follows the student."""
    return f"teacher-{name}.pt"


def load_optimizer(optimizer: Any, file: Path, device: torch.device) -> None:
    """Takes the moments of a checkpoint; learning rates and decays stay the optimizer's own.

    Raises:
        ValueError: they are of other weights; whatever torch raises for a file that it cannot read.
    """
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(torch.load(file, map_location=device, weights_only=True))
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
        for weight in group["params"]:
            for name, value in optimizer.state.get(weight, {}).items():
                if name != "step" and isinstance(value, Tensor) and value.shape != weight.shape:
                    raise ValueError(f"it has {name} of shape {tuple(value.shape)} for {tuple(weight.shape)}")


@contextlib.contextmanager
def _read_of(file: Path) -> Iterator[None]:
    """Whatever is raised of a file that torch reads is one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{file} does not belong to this run, or is broken: {reason}") from error


def _read_state(checkpoint: Checkpoint) -> tuple[int, int]:
    """Steps taken, and how many of the last were not applied."""
    file = checkpoint.path / "state.json"
    saved = read_json(file, CheckpointError)
    counts = [saved.get(name) if isinstance(saved, dict) else None for name in ("step", "bad_steps")]
    step, bad_steps = counts
    if not (
        type(step) is int and type(bad_steps) is int and step == checkpoint.step and 0 <= bad_steps <= step
    ):
        raise CheckpointError(f"{file} is broken: it holds no state of step {checkpoint.step}")
    return step, bad_steps


@dataclass(frozen=True)
class _Group:
    """A microbatch: its teachers, its rollouts, the texts as each teacher reads them, and, once they were asked, each
    teacher's rows of every text and what policy gradients take off their advantages."""

    names: tuple[str, ...]
    rollouts: Sequence[Rollout]
    batches: tuple[AlignedBatch, ...]
    rows: dict[str, list[LazyLogits]] = field(default_factory=dict)
    baselines: dict[str, Tensor] = field(default_factory=dict)

    @property
    def batch(self) -> AlignedBatch:
        """The texts as the first teacher reads them."""
        return self.batches[0]


MEANS = (
    "teacher_top1_prob",
    "teacher_top1_missed_share",
    "unresolved_mass",
    "shared_mass",
    "teacher_unmatched_mass",
    "moved_to_sampled_mass",
    "white_space_share",
    "span_reverse_kl",
)
"""Parts of objectives that the metrics show as means over the objective's unit."""


def _told_impossible(teacher: Teacher, rollout: Rollout, token: int, row: int) -> str:
    """Which token of which text a teacher gives probability 0."""
    shown = "the end" if token < 0 else f"token {teacher.vocabulary.label(token)!r}"
    return f", that of prompt {rollout.prompt.key} for one: {shown}, number {row}, by {teacher.name}"


def _told(vocabulary: Vocabulary) -> str:
    """Size and stop tokens."""
    stops = ", ".join(vocabulary.label(i) for i in vocabulary.stop_ids) or "nothing"
    return f"{vocabulary.size:,} tokens, stops at {stops}"


def _own_code(model: LanguageModel) -> str:
    return ", runs code of its own: trust_remote_code" if model.runs_own_code else ""


def _writing(
    rollouts: Sequence[Rollout], kept: Sequence[Rollout], batches: Sequence[AlignedBatch]
) -> dict[str, float]:
    """What there is to add up about the step's completions themselves, and about those that are learned from."""
    drawn = [r for r in rollouts if r.sampled]
    own = [b.canonical_rows[b.sampled_rows] for b in batches]
    return {
        "sequences": len(rollouts),
        "tokens": sum(r.ids.size for r in rollouts),
        "bytes": sum(len(r.tokenized.data) for r in rollouts),
        "kept": len(kept),
        "sampled": len(drawn),
        "repaired": sum(t.teacher.repaired_bytes for b in batches for t in b.texts),
        "stopped": sum(r.stopped for r in drawn),
        "drawn_tokens": sum(r.ids.size for r in drawn),
        "sampling_logprobs": sum(float(r.sampling_logprobs.sum()) for r in drawn),
        "sampled_tokens": sum(o.numel() for o in own),
        "canonical": sum(float(o.sum()) for o in own),
        "repetition": sum(repetition(r.tokenized.data) for r in drawn),
        "reward": sum(r.reward or 0.0 for r in drawn),
    }


def _wall_s(device: torch.device) -> float:
    """Seconds on the clock once the device has done its work, which else would count for a later phase."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Clock:
    """Seconds by phase."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = self.now()
        try:
            yield
        finally:
            self.seconds[phase] += self.now() - started
