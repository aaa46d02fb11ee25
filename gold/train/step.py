"""One optimizer step, from top to bottom: prompts, rollouts, alignment, teachers, losses, update, metrics."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gold.activity import report
from gold.align.batch import AlignedBatch
from gold.align.model_inputs import student_states
from gold.align.texts import AlignedText
from gold.data import Prompt
from gold.errors import DataError
from gold.evaluate import verified
from gold.kernels.logits import GivenLogits, LazyLogits
from gold.losses import LossInputs
from gold.losses.importance import ImportanceWeights
from gold.losses.policy import means_of_others, returns_of_texts, sampled_credit
from gold.models.hidden_states import lazy_logits
from gold.models.padding import PaddedStates
from gold.rollout.ahead import Place
from gold.rollout.conversations import Conversations
from gold.rollout.engine import Generation, Request, completed, rollout_of
from gold.rollout.types import Rollout, group_advantages
from gold.teachers.several import Teachers
from gold.train.conversing import Conversed, conversed, later_returns
from gold.train.diagnosis import why_not_finite
from gold.train.engine import generate, generating, push_weights
from gold.train.initial import initial_completions, requests_of
from gold.train.metrics import PhaseTimer, device_clock, part_name, rollout_sums, step_record
from gold.train.microbatch import (
    Microbatch,
    ask_teachers,
    build_microbatches,
    compared_rows,
    drop_impossible,
    loss_inputs,
)
from gold.train.setup import Setup
from gold.train.state import TrainState

NO_LOGITS = GivenLogits(torch.zeros(0, 1))
"""Placeholder for the student's logits where they are not used."""


class StepReport(NamedTuple):
    """The metrics of a step, and for each metric of skipped items one example for messages."""

    metrics: dict[str, Any]
    examples: dict[str, str]


def train_step(state: TrainState, setup: Setup) -> StepReport:
    """Takes one optimizer step and returns its metrics.

    Raises:
        TeacherError: a teacher could not score all of this step's texts; no state has changed.
        Stopped: a listener asked to leave the step (``gold.activity``); no state has changed but the gradient.
    """
    recipe = setup.recipe
    timer = PhaseTimer(setup.now or device_clock(state.student.device))
    state.push_s = 0.0
    # gold draws from the streams that requests name, never from torch's global generator. Engines, teachers, losses and
    # model code from outside gold may use that; seeded for each step, it repeats in a resumed run.
    torch.manual_seed(int(np.random.SeedSequence([recipe.seed, state.step]).generate_state(1)[0]))
    with timer("rollout"):
        rollouts, skipped, talk = generate_rollouts(state, setup)
    with timer("align"):
        used = [r for r in rollouts if r.stopped or not r.sampled or setup.recipe.cut == "keep"]
        rows = compared_rows(setup, used)
        microbatches, misfits = build_microbatches(setup, rows.compared, rows.others * setup.learns_alone)
        skipped += misfits
    with timer("teacher"):
        microbatches, sums, impossible = query_teachers(state, setup, microbatches)
    with timer("align"):
        # This sum needs the same names in all processes: those of unit_counts follow from the setup alone.
        counts = state.sum(unit_counts(setup, microbatches))
        microbatches = with_baselines(state, setup, with_returns(setup, microbatches))
    with timer("student"):
        sums |= accumulate_gradients(state, setup, microbatches, counts)
    with timer("update"):
        kept = [rollout for m in microbatches for rollout in m.rollouts]
        sums |= rollout_sums(rollouts, kept, [m.batch for m in microbatches])
        sums |= talk.sums
        sums["uncompared_bytes"] = sum(len(r.tokenized.data) for r in rows.others)
        sums["skipped_sequences"] = len(skipped)
        sums["masked_sequences"] = len(rollouts) - len(used)
        if setup.importance_cap is not None or recipe.policy == "initial":
            sums["staleness"] = sum(state.step - r.policy_version for r in rollouts if r.sampled)
        # A process without texts lacks some of these names.
        largest = state.largest(sums.pop("ratio_max", 0.0))
        sums = defaultdict(float, state.sum(sums, ragged=True), ratio_max=largest)
        head = {"step": state.step + 1, "loss": sums["loss"], **update(state, setup, sums, counts)}
        finite = math.isfinite(head["grad_norm"]) and math.isfinite(sums["loss"])
        if not finite:
            head |= diagnosis(state, setup, microbatches, sums)
        # A step is applied if it is finite, kept a text and did not lose all texts to a teacher that gives them
        # probability 0; a step that is not applied is bad, unless it is finite and kept no text.
        bad = not head["applied"] and (not finite or sums["kept"] > 0)
        state.bad_steps = 0 if head["applied"] else state.bad_steps + bad
        state.step += 1
    if setup.engine.own_weights:
        head["push_s"] = state.push_s
        if recipe.staleness:
            head["engine_idle_s"] = state.ahead.idle_s
    metrics = step_record(head, sums, counts, setup.terms, setup.teachers, timer.seconds)
    examples = {
        "skipped_sequences": next(iter(skipped), ""),
        "teacher_impossible": impossible,
        "ended_error_share": talk.problem,
    }
    return StepReport(metrics | {"bad_steps": state.bad_steps}, examples)


class StepPrompts(NamedTuple):
    """This process's share of a step's prompts: ``requests`` for the completions that the student writes, by place,
    with their ``prompts``; the data's completions, ``given``; for each skipped prompt, which leaves the student no
    room, the reason; and whether any process has requests. Very large prompt sets are not fully checked before a run.
    """

    requests: dict[Place, Request]
    prompts: list[Prompt]
    given: list[Rollout]
    skipped: list[str]
    student_writes: bool


def choose_prompts(state: TrainState, setup: Setup, step: int) -> StepPrompts:
    """The prompts of a step, a function of the seed and the step."""
    recipe, accelerator = setup.recipe, state.accelerator
    chosen = list(enumerate(setup.order.batch(step, recipe.prompts_per_step)))
    student_writes = any(recipe.student_writes(step, place) for place, _ in chosen)
    found = StepPrompts({}, [], [], [], student_writes)
    for place, index in chosen[accelerator.process_index :: accelerator.num_processes]:
        prompt = setup.prompts[index]
        count = recipe.num_generations if recipe.student_writes(step, place) else 0
        drawn_at = setup.first_places[index] if count and recipe.policy == "initial" else (step, place)
        try:
            requests = requests_of(state.student, prompt, recipe, drawn_at)
        except DataError as error:
            found.skipped.extend([str(error)] * max(1, count))
            continue
        if not count:
            found.given.append(completed(state.student, prompt, recipe.max_new_tokens))
        for n in range(count):
            found.requests[place, n] = requests[n]
            found.prompts.append(prompt)
    return found


def generate_rollouts(state: TrainState, setup: Setup) -> tuple[list[Rollout], list[str], Conversed]:
    """This process's share of the step's rollouts, with rewards if there is a verifier; for each skipped prompt the
    reason; and the conversations of a run with an environment."""
    recipe, chosen = setup.recipe, choose_prompts(state, setup, state.step)
    if setup.conversations is not None:
        talk = converse(state, setup, setup.conversations, chosen)
        return talk.rollouts + chosen.given, chosen.skipped, talk
    if recipe.policy == "initial":
        drawn = initial_completions(state, setup).of(list(chosen.requests.values()))
    else:
        drawn = draw_ahead(state, setup, chosen) if recipe.staleness else draw(state, setup, chosen)
    pairs = zip(chosen.prompts, chosen.requests.values(), drawn, strict=True)
    sampled = [rollout_of(state.student, prompt, request, answer) for prompt, request, answer in pairs]
    if (verifier := setup.verifier) is not None and sampled:
        rewards = np.array([verified(verifier, r) for r in sampled])
        scaled = group_advantages(rewards, recipe.num_generations)
        each = zip(sampled, rewards, scaled, strict=True)
        sampled = [replace(r, reward=float(x), advantage=float(a)) for r, x, a in each]
    return sampled + chosen.given, chosen.skipped, Conversed()


def converse(state: TrainState, setup: Setup, conversations: Conversations, chosen: StepPrompts) -> Conversed:
    """The step's conversations by the student's current weights."""
    if not chosen.student_writes:
        return Conversed()
    push_weights(state, setup.engine)  # in all processes, also in one that has nothing to draw

    def drawn_together(requests: Sequence[Request]) -> list[Generation]:
        return state.together(partial(generate, setup, requests))

    seeds = [request.seed for request in chosen.requests.values()]
    with generating(state, setup):
        drawn = conversations.draw(
            chosen.prompts, seeds, setup.recipe.sampling, drawn_together, any_process=state.any_process
        )
    return conversed(drawn, setup.recipe.num_generations)


def draw(state: TrainState, setup: Setup, chosen: StepPrompts) -> list[Generation]:
    """Completions by the student's current weights."""
    if not chosen.student_writes:
        return []
    push_weights(state, setup.engine)  # in all processes, also in one that has nothing to draw
    with generating(state, setup):
        return state.together(partial(generate, setup, list(chosen.requests.values())))


def draw_ahead(state: TrainState, setup: Setup, chosen: StepPrompts) -> list[Generation]:
    """Completions that were started a step ago, with the weights before the last update; starts those of the next step.
    The first step of a run has none, and draws its own."""
    found = state.together(partial(state.ahead.take, state.step))
    if not state.any_process(found is None or found.keys() != chosen.requests.keys()):
        drawn = [(found or {})[place] for place in chosen.requests]
    else:
        drawn = draw(state, setup, chosen)
    if state.step + 1 < setup.recipe.steps:
        following = choose_prompts(state, setup, state.step + 1)
        if following.student_writes:
            push_weights(state, setup.engine)
        with generating(state, setup):
            begin = partial(state.ahead.start, setup.engine, state.step + 1, following.requests)
            state.together(partial(begin, partial(generate, setup)))
    return drawn


def query_teachers(
    state: TrainState, setup: Setup, microbatches: list[Microbatch]
) -> tuple[list[Microbatch], dict[str, float], str]:
    """The microbatches with the teachers' logits, counts for the metrics, and a text of probability 0, if any.

    Raises:
        TeacherError: a teacher fails, in any of the processes.
    """
    teachers = setup.teachers
    if teachers is None or not setup.needs_teacher:
        return microbatches, {}, ""
    retries = _retries(teachers)
    microbatches = state.together(partial(ask_teachers, setup, microbatches))
    rows = sum(len(logits) for m in microbatches for each in m.teacher_logits.values() for logits in each)
    sums = {"teacher_tokens": float(rows)}
    if retries is not None:
        sums["teacher_retries"] = float((_retries(teachers) or 0) - retries)
    microbatches, impossible = drop_impossible(setup, microbatches)
    return microbatches, sums | {"teacher_impossible": float(impossible.count)}, impossible.example


def _retries(teachers: Teachers) -> int | None:
    counts = [n for teacher in teachers.members.values() if (n := teacher.retries) is not None]
    return sum(counts) if counts else None


def unit_counts(setup: Setup, microbatches: Sequence[Microbatch]) -> dict[str, float]:
    """This process's count of units of each term, and, if prompts have different teachers, of each teacher's."""
    counts = {t.label: 0.0 for t in setup.terms}
    for name in setup.routes:
        counts |= {f"{t.label}[{name}]": 0.0 for t in setup.terms}
    for microbatch in microbatches:
        for term in setup.terms:
            if not setup.applies(term, microbatch.has_teacher):
                continue
            count = float(term.objective.count(microbatch.batch))
            counts[term.label] += count
            if setup.routes and microbatch.has_teacher:
                counts[f"{term.label}[{next(iter(microbatch.batches))}]"] += count
    return counts


def with_returns(setup: Setup, microbatches: list[Microbatch]) -> list[Microbatch]:
    """The microbatches with the return of the turns after each rollout, if an objective counts it."""
    if not any(term.objective.options.get("horizon") == "conversation" for term in setup.terms):
        return microbatches
    taught = [m for m in microbatches if m.has_teacher]
    returns = [returns_of_texts(loss_inputs(setup, m, NO_LOGITS)).tolist() for m in taught]
    later = later_returns([m.rollouts for m in taught], returns)
    found = iter(torch.tensor(each, dtype=torch.float64) for each in later)
    return [replace(m, later=next(found)) if m.has_teacher else m for m in microbatches]


def with_baselines(state: TrainState, setup: Setup, microbatches: list[Microbatch]) -> list[Microbatch]:
    """The microbatches with the baselines of their advantages: means over the whole step and all processes."""
    for term in setup.terms:
        name, options = term.objective.name, term.objective.options
        if options.get("baseline") != "others":
            continue
        taught = [m for m in microbatches if m.has_teacher]
        inputs = [loss_inputs(setup, m, NO_LOGITS) for m in taught]
        credits = [sampled_credit(each, name, options) for each in inputs]
        numbers = [m.batch.row_number for m in taught]
        means = iter(means_of_others(credits, numbers, setup.recipe.max_new_tokens, state.sum_tensor))
        microbatches = [
            replace(m, baselines={**m.baselines, name: next(means)}) if m.has_teacher else m
            for m in microbatches
        ]
    return microbatches


def accumulate_gradients(
    state: TrainState, setup: Setup, microbatches: Sequence[Microbatch], counts: Mapping[str, float]
) -> dict[str, float]:
    """Accumulates the gradient of the step's loss; returns this process's share of the loss and of its parts."""
    sums: dict[str, float] = defaultdict(float)
    state.module.eval()
    state.zero_grad()
    passes = state.passes(len(microbatches))
    for number in range(1, passes + 1):
        report(number - 1, passes, "microbatches")
        parts: dict[str, Tensor] = {}
        with state.accumulating(last=number == passes):
            if number > len(microbatches):
                total = state.no_loss()
            else:
                microbatch = microbatches[number - 1]
                states = student_states(state.student, microbatch.rollouts, packed=setup.recipe.packing)
                reference = state.reference_logits(states)
                loss = partial(step_loss, state, setup, microbatch, counts, reference)
                total, parts = state.loss(states, loss)
            state.may_stop(last=number == passes)
            state.accelerator.backward(total)
        largest = max(sums["ratio_max"], float(parts.pop("ratio_max", 0.0)))
        for name, value in parts.items():
            sums[name] += float(value)
        sums["ratio_max"] = largest
    return sums


def step_loss(
    state: TrainState,
    setup: Setup,
    microbatch: Microbatch,
    counts: Mapping[str, float],
    reference: LazyLogits | None,
    student_logits: LazyLogits,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The microbatch's share of the step's loss, times the number of processes, and detached sums by name."""
    inputs = loss_inputs(setup, microbatch, student_logits, reference)
    if setup.importance_cap is not None:
        weights = ImportanceWeights.of(microbatch.batch, student_logits, setup.importance_cap)
        inputs = replace(inputs, importance=weights)
    total = torch.zeros((), device=student_logits.device)
    # Three units: a term's own sum, divided by its count in the record; parts and the loss, shares of a mean, divided
    # here; sequence_logp, sums in nats and bytes, divided by one another in the record.
    parts: dict[str, Tensor] = {}
    unweighted = replace(inputs, importance=None)
    for term in setup.terms:
        if not counts[term.label] or not setup.applies(term, microbatch.has_teacher):
            continue
        value = term.objective.loss(inputs if setup.weighs(term) else unweighted)
        total = total + term.weight * value.total / counts[term.label]
        parts[term.label] = value.total.detach()
        for name, part in value.parts.items():
            parts[part_name(term.label, name)] = part.detach() / counts[term.label]
        for name, part in value.sequence_logp.items():
            parts.setdefault(name, part)
    # A microbatch has the teacher of one route; the terms of the others get 0 from it.
    for name in setup.routes:
        for label in [t.label for t in setup.terms if t.label in parts]:
            parts[f"{label}[{name}]"] = parts[label] if name in microbatch.batches else 0.0 * parts[label]
    parts["loss"] = total.detach()
    if inputs.importance is not None:
        parts |= inputs.importance.statistics(microbatch.batch)
    # A step without counted units still needs a graph, or the other processes would wait.
    if not total.requires_grad:
        total = total + 0.0 * student_logits.select(slice(1)).logits().sum()
    # Counts are of all processes, so the gradient is the sum over processes; DistributedDataParallel averages instead.
    return total * state.accelerator.num_processes, parts


def update(
    state: TrainState, setup: Setup, sums: Mapping[str, float], counts: Mapping[str, float]
) -> dict[str, Any]:
    """The optimizer step, skipped if the loss or gradient is not finite or nothing was counted: the moments of the
    optimizer would still move."""
    norm = state.clip_gradient(setup.recipe.max_grad_norm)
    finite = math.isfinite(norm) and math.isfinite(sums["loss"])
    applied = finite and (any(counts.values()) or not sums["teacher_impossible"]) and sums["kept"] > 0
    lr = setup.recipe.lr_at(state.step)
    if applied:
        state.update(lr)
    state.zero_grad()
    return {"lr": lr, "grad_norm": norm, "applied": applied}


def diagnosis(
    state: TrainState, setup: Setup, microbatches: Sequence[Microbatch], sums: Mapping[str, float]
) -> dict[str, str]:
    """Why the step's loss or gradient is not finite, as far as this process can determine."""
    scored = {
        name: [
            pair
            for m in microbatches
            if name in m.teacher_logits
            for pair in zip(m.rollouts, m.teacher_logits[name], strict=True)
        ]
        for name in setup.pairs
    }
    terms = {t.label: sums[t.label] for t in setup.terms if t.label in sums}
    with state.whole_student():
        why, remedy = why_not_finite(state.student, [m.rollouts for m in microbatches], scored, terms)
    return {"why": why, "remedy": remedy}


def warm_up(state: TrainState, setup: Setup) -> float:
    """Runs every term once on a text of one letter, so that its kernels are compiled and cached; returns the seconds
    taken."""
    now = setup.now or device_clock(state.student.device)
    started = now()
    student = state.student
    tokenized = student.vocabulary.encode("a")
    ids = np.append(tokenized.ids, student.vocabulary.stop_ids[0]).astype(np.int32)
    states = PaddedStates.of([[student.pad_id]], [tokenized.ids], [ids.size], 0, student.device)
    with torch.no_grad(), state.accelerator.autocast(), state.whole_student():
        logits = lazy_logits(student.lm, states).logits()
    for name, pair in setup.pairs.items():
        logprobs = np.zeros(ids.size, np.float32)
        text = AlignedText(ids, tokenized, pair.to_teacher(tokenized), True, sampling_logprobs=logprobs)
        teacher = setup.teachers.members[name] if setup.teachers else None
        device, dtype = (teacher.device, teacher.dtype) if teacher else (student.device, torch.float32)
        batch = AlignedBatch([text], pair, student.device, device)
        size = int(batch.teacher.row_starts[-1]), pair.teacher.size
        inputs = LossInputs(
            batch,
            GivenLogits(logits.clone().requires_grad_(True)),
            GivenLogits(torch.zeros(size, dtype=dtype, device=device)),
            GivenLogits(logits),
        )
        for term in setup.terms:
            total = term.objective.loss(inputs).total
            # Infinite if a teacher has no token for the letter.
            if total.requires_grad and total.isfinite():
                total.backward()
    return now() - started
