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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from gold.alarms import Alarms, repetition
from gold.align.vocabulary import Vocabulary
from gold.aligned import AlignedBatch, VocabularyPair
from gold.checkpoint import latest_checkpoint
from gold.data import Prompt, PromptOrder
from gold.errors import ConfigError, TeacherError
from gold.evaluate import Evaluation, EvaluationPlan, Verifier, evaluate
from gold.kernels import backend_for
from gold.kernels.linear import Rows
from gold.losses import DivergenceRow, Need, Objective, View, find
from gold.models import (
    LanguageModel,
    PaddedStates,
    StatesModule,
    load_weights,
    recompute_activations,
    rows_of,
    save_model,
)
from gold.progress import Progress
from gold.reading import aligned_batch, microbatches, read, student_states, teacher_rows
from gold.recipe import Recipe
from gold.rollout import Rollout, advantages, completed, sample
from gold.run import RunFolder
from gold.teachers.protocol import Teacher

Answer = TypeVar("Answer")
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


def terms_of(recipe: Recipe, teacher: Teacher | None, pair: VocabularyPair) -> list[BoundTerm]:
    """The recipe's terms for this pair; where both vocabularies are one, divergences go token by token.

    Raises:
        ConfigError: no term, an unknown one, or options that it cannot take.
        TeacherError: a term that needs more than the teacher gives.
    """
    terms = []
    for term in recipe.objectives:
        if not term.weight:
            continue
        row = find(term.name)
        options, label = dict(term.options), term.name
        if isinstance(row, DivergenceRow):
            options = row.moved("tokens", options) if pair.same else row.resolve(options)
            label = f"{term.name}_{options['support']}"
        if row.own_vocabulary and not pair.same:
            raise ConfigError(
                f"objective {term.name} compares models that share one vocabulary, and these do not; "
                "choose a divergence on bytes, which needs none in common"
            )
        if (top_k := options.get("top_k")) is not None:
            known = pair.student.size if pair.same else pair.shared_ids[0].size + 1
            if top_k > known:
                raise ConfigError(
                    f"objective {term.name}: top_k is {top_k}, and there are only {known:,} events that both "
                    "vocabularies have; lower it"
                )
        bound = row(**options)
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
        teacher: Teacher | None,
        pair: VocabularyPair,
        prompts: Sequence[Prompt],
        recipe: Recipe,
        terms: Sequence[BoundTerm],
        verifier: Verifier | None,
        accelerator: Accelerator,
    ) -> None:
        self.student, self.teacher, self.pair, self.verifier = student, teacher, pair, verifier
        self.prompts, self.recipe, self.terms, self.accelerator = prompts, recipe, terms, accelerator
        self.order = PromptOrder(len(prompts), recipe.seed)
        self.now: Callable[[], float] = partial(_wall_s, student.device)
        self.step = 0
        self.bad_steps = 0
        self._warned: set[str] = set()
        self._alarms = Alarms()
        if accelerator.num_processes > 1:
            student.lm.to(accelerator.device)
        self.reference: Any = None
        if any(t.objective.name == "reference_kl" for t in terms):
            self.reference = copy.deepcopy(student.lm).eval().requires_grad_(False)
        if recipe.gradient_checkpointing:
            recompute_activations(student.lm)
        trained = [p for p in student.lm.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        # The model is where it should be: a run of one process stays on the device that was asked for.
        self.module, self.optimizer = accelerator.prepare(
            StatesModule(student.lm), optimizer, device_placement=[False, False]
        )
        self.backend = backend_for(student.device)
        self.teacher_backend = backend_for(teacher.device) if teacher else self.backend

    def header(self) -> dict[str, str]:
        """What the run will do, in a few lines for people."""
        recipe = self.recipe
        names = ", ".join(f"{t.weight:g} × {t.label}" if t.weight != 1 else t.label for t in self.terms)
        return {
            "student": f"{self.student.name} ({_told(self.student.vocabulary)}, {self.student.device})",
            "teacher": f"{self.teacher.name} ({_told(self.teacher.vocabulary)}, {self.teacher.device})"
            if self.teacher
            else "none",
            "objective": names
            + (" (one vocabulary: token by token)" if self.teacher and self.pair.same else ""),
            "step": f"{recipe.prompts_per_step} prompts × {recipe.per_prompt}, λ = {recipe.on_policy:g}, "
            f"up to {recipe.sampling.max_new_tokens} tokens, {self.accelerator.num_processes} process(es), "
            f"precision {self.accelerator.mixed_precision}",
            "kernels": self.backend.__name__.rpartition(".")[2],
        }

    def advance(self) -> dict[str, Any]:
        """One optimizer step; returns its metrics.

        Raises:
            TeacherError: the teacher has not graded all of this step's texts; nothing has changed.
        """
        clock = _Clock(self.now)
        torch.manual_seed(int(np.random.SeedSequence([self.recipe.seed, self.step]).generate_state(1)[0]))
        with clock("rollout"):
            rollouts = self._rollouts()
        with clock("read"):
            texts = [read(r, self.pair) for r in rollouts]
            groups = microbatches(rollouts, self.recipe.sequences_per_forward)
            batches = [
                aligned_batch([texts[i] for i in g], self.pair, self.student.device, self.teacher)
                for g in groups
            ]
            counts = self._total(
                {t.label: float(sum(t.objective.count(b) for b in batches)) for t in self.terms}
            )
        needs_teacher = self.teacher is not None and any(t.objective.needs != "nothing" for t in self.terms)
        with clock("teacher"):
            rows: list[Rows | None] = [None] * len(rollouts)
            if needs_teacher and self.teacher:
                rows = list(self._together(partial(teacher_rows, self.teacher, rollouts, texts)))
        sums: dict[str, float] = defaultdict(float)
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        for number, (group, batch) in enumerate(zip(groups, batches, strict=True)):
            states = student_states(self.student, [rollouts[i] for i in group])
            last = number == len(groups) - 1
            with clock("student"), contextlib.ExitStack() as stack:
                if not last:
                    stack.enter_context(self.accelerator.no_sync(self.module))
                theirs = [r for i in group if (r := rows[i]) is not None]
                loss, parts = self._loss(states, batch, Rows.joined(theirs) if theirs else None, counts)
                self.accelerator.backward(loss)
            for name, value in parts.items():
                sums[name] += float(value)
        with clock("update"):
            sums = defaultdict(float, self._total(dict(sums) | _writing(rollouts, batches)))
            norm = float(self.accelerator.clip_grad_norm_(self.module.parameters(), self.recipe.clip_norm))
            applied = math.isfinite(norm) and math.isfinite(sums["loss"])
            lr = self.recipe.lr_at(self.step)
            if applied:
                for group_ in self.optimizer.param_groups:
                    group_["lr"] = lr
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps = 0 if applied else self.bad_steps + 1
        self.step += 1
        return self._record(sums, counts, {"lr": lr, "grad_norm": norm, "applied": applied}, clock)

    def _rollouts(self) -> list[Rollout]:
        """This process's share of the step's completions, rewarded where there is a verifier."""
        recipe = self.recipe
        chosen = list(enumerate(self.order.batch(self.step, recipe.prompts_per_step)))
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        draws: list[tuple[Prompt, tuple[int, ...]]] = []
        given: list[Rollout] = []
        for place, index in mine:
            prompt = self.prompts[index]
            coin = np.random.default_rng((recipe.seed, self.step, place, 1)).random()
            if coin < recipe.on_policy:
                draws += [(prompt, (recipe.seed, self.step, place, 0, n)) for n in range(recipe.per_prompt)]
            else:
                given.append(completed(self.student, prompt, recipe.sampling.max_new_tokens))
        drawn: list[Rollout] = []
        if draws:
            with self.accelerator.autocast():
                drawn = sample(
                    self.student,
                    [prompt for prompt, _ in draws],
                    recipe.sampling,
                    seeds=[seed for _, seed in draws],
                    batch=recipe.rollout_batch,
                )
        if self.verifier is not None and drawn:
            verifier = self.verifier
            rewards = np.array([verifier.score(r.prompt, r.text) if r.stopped else 0.0 for r in drawn])
            scaled = advantages(rewards, recipe.per_prompt)
            drawn = [r.rewarded(float(x), float(a)) for r, x, a in zip(drawn, rewards, scaled, strict=True)]
        return drawn + given

    def _together(self, ask: Callable[[], Answer]) -> Answer:
        """What the teacher is asked for; where one process does not get it, none goes on, since they would wait for
        each other."""
        try:
            answer, failure = ask(), None
        except TeacherError as error:
            answer, failure = None, error
        if self.anywhere(failure is not None):
            raise failure or TeacherError("the teacher has failed in another process")
        return cast(Answer, answer)

    def _loss(
        self, states: PaddedStates, batch: AlignedBatch, teacher: Rows | None, counts: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The microbatch's share of the step's loss, times the number of processes, and detached sums by name."""

        reference: Rows | None = None
        if self.reference is not None:
            with torch.no_grad(), self.accelerator.autocast():
                reference = rows_of(self.reference, states)

        def then(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
            view = View(batch, rows, teacher, self.backend, self.teacher_backend, reference)
            total = rows.hidden_ND.new_zeros((), dtype=torch.float32)
            parts: dict[str, Tensor] = {}
            for term in self.terms:
                if not counts[term.label]:
                    continue
                value = term.objective(view)
                share = term.weight * value.total / counts[term.label]
                total = total + share
                parts[term.label] = value.total.detach()
                for name, part in value.parts.items():
                    parts.setdefault(name, part.detach() / counts[term.label])
                for name, part in value.sequence_logp.items():
                    parts.setdefault(name, part)
            parts["loss"] = total.detach()
            # A step whose terms count nothing still needs a graph, or the processes would wait for each other.
            if not total.requires_grad:
                total = total + 0.0 * rows.head(rows.hidden_ND[:1]).sum()
            return total * self.accelerator.num_processes, parts

        result: tuple[Tensor, dict[str, Tensor]] = self.module(states, then)
        return result

    def _record(
        self, sums: Mapping[str, float], counts: Mapping[str, float], update: dict[str, Any], clock: _Clock
    ) -> dict[str, Any]:
        """The line of a step."""
        record: dict[str, Any] = {"step": self.step, "loss": sums["loss"], **update}
        record |= {t.label: sums[t.label] / counts[t.label] for t in self.terms if counts[t.label]}
        record |= {name: sums[name] for name in MEANS if name in sums}
        if "student_logp" in sums and sums["sampled_bytes"]:
            record["sampled_reverse_kl_per_byte"] = (sums["student_logp"] - sums["teacher_logp"]) / sums[
                "sampled_bytes"
            ]
        sampled = sums["sampled"]
        if sampled:
            record |= {name: sums[name] / sampled for name in ("sampler_logp", "repetition")}
            record["stop_rate"] = sums["stopped"] / sampled
            record["canonical_share"] = sums["canonical"] / max(1.0, sums["sampled_tokens"])
            if self.verifier is not None:
                record["reward_mean"] = sums["reward"] / sampled
        record["length_tokens"] = sums["tokens"] / max(1.0, sums["sequences"])
        record["length_bytes"] = sums["bytes"] / max(1.0, sums["sequences"])
        record["bad_steps"] = self.bad_steps
        total = sum(clock.seconds.values())
        record |= {f"{phase}_s": seconds for phase, seconds in clock.seconds.items()}
        record |= {"step_s": total, "tokens_per_s": sums["tokens"] / total}
        return record

    def warnings(self, record: Mapping[str, Any]) -> list[str]:
        """What a person should know after this step; each kind once a run."""
        found = {}
        if not record["applied"]:
            found[f"bad {record['step']}"] = (
                f"step {record['step']}: NaN or infinite loss or gradient; the step was not applied "
                f"({self.bad_steps} in a row, {self.recipe.bad_steps_allowed} are allowed)"
            )
        reverse = any(t.objective.name == "reverse_kl" for t in self.terms)
        if reverse and record.get("missed", 0.0) > MISSED_SHARE:
            found["missed"] = (
                f"step {record['step']}: at {record['missed']:.0%} of bytes the student gives what the teacher wants "
                "most less than 1 %. Reverse KL hardly moves what the student never samples: begin with forward_kl, or "
                "add it with a small weight, or train on teacher completions first (sft, rollout.on_policy=0)"
            )
        found |= self._alarms.check(record)
        fresh = {kind: text for kind, text in found.items() if kind not in self._warned}
        self._warned |= set(fresh)
        return list(fresh.values())

    def evaluate(self, heldout: Sequence[Prompt], plan: EvaluationPlan) -> Evaluation:
        """The student as it is on the held-out prompts; every process does the same, so that all know the result."""
        look = partial(evaluate, self.student, self.teacher, heldout, plan=plan, verifier=self.verifier)
        with self.accelerator.autocast():
            return self._together(look)

    def write(self, folder: Path) -> None:
        """Everything that the next step depends on; the random draws and the data's place follow from the step."""
        save_model(self.student, folder / "student")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        (folder / "state.json").write_text(json.dumps({"step": self.step, "bad_steps": self.bad_steps}))

    def resume(self, checkpoints: Path, folder: RunFolder | None, progress: Progress) -> None:
        """The state of the newest whole checkpoint; the first step where there is none."""
        found, notes = latest_checkpoint(checkpoints)
        for note in notes:
            progress.note(note)
        if found is None:
            progress.note("no checkpoint yet: the run starts at its first step")
        else:
            load_weights(self.student, found.path / "student")
            state = torch.load(
                found.path / "optimizer.pt", map_location=self.student.device, weights_only=True
            )
            self.optimizer.load_state_dict(state)
            saved = json.loads((found.path / "state.json").read_text())
            self.step, self.bad_steps = saved["step"], saved["bad_steps"]
            progress.note(f"resumed after step {self.step}")
        if folder:
            folder.rewind(self.step if found else -1)
        self.accelerator.wait_for_everyone()

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is up in any process: a signal may reach them in different steps, or only one of them."""
        return self._total({"flag": float(flag)})["flag"] > 0

    def _total(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        names = sorted(values)
        tensor = torch.tensor([values[n] for n in names], dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(names, self.accelerator.reduce(tensor, "sum").tolist(), strict=True))


MEANS = ("wanted", "missed", "rest", "shared_mass", "residual", "observed", "white_space", "span_reverse_kl")
"""Parts of objectives that the metrics show as means over the objective's unit."""


def _told(vocabulary: Vocabulary) -> str:
    """Size and stop tokens."""
    stops = ", ".join(vocabulary.label(i) for i in vocabulary.stop_ids) or "nothing"
    return f"{vocabulary.size:,} tokens, stops at {stops}"


def _writing(rollouts: Sequence[Rollout], batches: Sequence[AlignedBatch]) -> dict[str, float]:
    """What there is to add up about the step's completions themselves."""
    drawn = [r for r in rollouts if r.sampled]
    own = [b.canonical_rows[b.sampled_rows] for b in batches]
    return {
        "sequences": len(rollouts),
        "tokens": sum(r.ids.size for r in rollouts),
        "bytes": sum(len(r.spelling.data) for r in rollouts),
        "sampled": len(drawn),
        "sampled_bytes": sum(len(r.spelling.data) for r in drawn),
        "stopped": sum(r.stopped for r in drawn),
        "sampler_logp": sum(float(r.logp.sum()) for r in drawn),
        "sampled_tokens": sum(o.numel() for o in own),
        "canonical": sum(float(o.sum()) for o in own),
        "repetition": sum(repetition(r.spelling.data) for r in drawn),
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
