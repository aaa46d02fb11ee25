"""`python -m benchmarks turns`: a conversation of two turns with a tool, distilled and imitated, three seeds.

A tiny student that seldom calls its calculator rightly learns from a teacher with another tokenizer and another chat
template, on the same prompts: from its own conversations, graded turn by turn, or by imitating the teacher's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.record import RESULTS, command_line, device_name, write_record
from gold.data import Prompt
from gold.demo.calculator import Calculator
from gold.demo.models import learn_answers
from gold.demo.talk import lessons, talking_student, talking_teacher
from gold.environments import Limits
from gold.environments.calling import Caller
from gold.evaluate import wilson
from gold.models.language_model import LanguageModel
from gold.rollout.conversations import Conversations, DrawnConversation, TurnPrompts
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.train.loop import distill
from gold.train.recipe import Recipe, Term
from gold.train.trackers import Trackers

TASK = Calculator()
LIMITS = Limits(max_turns=3)
SAMPLING = Sampling(max_new_tokens=40)


@dataclass(frozen=True)
class Plan:
    """Sizes of the experiment."""

    prompts: int = 400
    heldout: int = 256
    batch: int = 32
    steps: int = 150
    teacher_steps: int = 700
    start_steps: int = 260
    seeds: int = 3


def main(arguments: Sequence[str]) -> int:
    """Runs the experiment and writes its record; 1 if distillation is not ahead of imitation."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks turns")
    parser.add_argument("--into", default=str(RESULTS))
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    given = vars(parser.parse_args(arguments))
    into, plan = given.pop("into"), Plan(**given)
    torch.set_num_threads(1)
    begun = time.perf_counter()
    rows = experiment(plan)
    for name, row in rows.items():
        print(name, row, flush=True)
    from pathlib import Path

    seconds = time.perf_counter() - begun
    data = {"plan": asdict(plan), "rows": rows}
    command = command_line("turns", arguments)
    write_record(
        "turns", data, command=command, seconds=seconds, device=device_name("cpu"), folder=Path(into)
    )
    return int(min(rows["distilled"]["right"]) <= max(rows["imitation"]["right"]))


def experiment(plan: Plan) -> dict[str, Any]:
    """Accuracies of the teacher, of the student before, and of both ways with each seed."""
    heldout = TASK.prompts("heldout", plan.heldout, 0)
    known = [turn for prompt in TASK.prompts("train", 4000, 9) for turn in lessons(prompt)]
    teacher = talking_teacher(layers=3, width=64)
    learn_answers(teacher, known, steps=plan.teacher_steps, batch=48)
    rows: dict[str, Any] = {"teacher": measured(teacher, heldout)}
    print("teacher", rows, flush=True)
    start = talking_student(layers=2, width=64)
    learn_answers(start, known[::-1], steps=plan.start_steps, batch=32, seed=1)
    rows["start"] = measured(start, heldout)
    print("start", rows["start"], flush=True)
    weights = {name: tensor.clone() for name, tensor in start.lm.state_dict().items()}
    ways: dict[str, list[dict[str, float]]] = {"distilled": [], "imitation": []}
    for seed in range(plan.seeds):
        prompts = TASK.prompts("train", plan.prompts, seed)
        for way, found in ways.items():
            start.lm.load_state_dict(weights)
            spent = time.process_time()
            learn(way, start, teacher, prompts, plan, seed)
            found.append(measured(start, heldout) | {"cpu_s": time.process_time() - spent})
            print(way, seed, found[-1], flush=True)
    for way, each in ways.items():
        rows[way] = {key: [one[key] for one in each] for key in each[0]}
    return rows


def learn(
    way: str, student: LanguageModel, teacher: LanguageModel, prompts: Sequence[Prompt], plan: Plan, seed: int
) -> None:
    """Trains the student on the prompts in one way."""
    recipe = Recipe(
        num_generations=1,
        prompts_per_step=plan.batch,
        micro_batch_size=plan.batch,
        generation_batch_size=plan.batch,
        max_new_tokens=SAMPLING.max_new_tokens,
        steps=plan.steps,
        lr=2e-3,
        seed=seed,
    )
    quiet = Trackers()
    if way == "distilled":
        distill(student, teacher, prompts, recipe, environment=TASK, limits=LIMITS, progress=quiet)
        return
    # Each of the teacher's turns is a completion; a step has as many of them as two turns of each prompt.
    taught = [turn for n in range(4) for turn in imitated(teacher, prompts, (seed, n))]
    recipe = recipe.replace(
        objectives=(Term("sft"),), on_policy=0.0, lr=1e-3, prompts_per_step=2 * plan.batch
    )
    distill(student, None, taught, recipe, progress=quiet)


def imitated(teacher: LanguageModel, prompts: Sequence[Prompt], seed: tuple[int, int]) -> list[Prompt]:
    """The turns of the teacher's own conversations as prompts with completions."""
    drawn = converse(teacher, prompts, SAMPLING, seed, tokens=120)
    return [
        replace(r.prompt, key=f"{r.prompt.key} {seed[1]} {r.turn.number}", completion=r.text)
        for each in drawn
        for r in each.rollouts
        if r.stopped and r.text and r.turn
    ]


def converse(
    model: LanguageModel, prompts: Sequence[Prompt], sampling: Sampling, seed: tuple[int, ...], tokens: int
) -> list[DrawnConversation]:
    """A conversation of each prompt by a model."""
    sampling = replace(sampling, max_new_tokens=tokens)
    caller = Caller(LIMITS.timeout_s)
    conversations = Conversations(model, TASK, LIMITS, caller)
    seeds = [(*seed, n) for n in range(len(prompts))]
    engine = HuggingFaceEngine(model, 128)
    drawn = conversations.draw(list(TurnPrompts(prompts, TASK)), seeds, sampling, engine.generate)
    caller.close()
    return drawn


def measured(model: LanguageModel, heldout: Sequence[Prompt]) -> dict[str, float]:
    """The share of held-out questions that a model answers right, greedily, with its 95 % interval."""
    greedy = Sampling(max_new_tokens=0, temperature=0.0)
    tokens = 120 if model.name == "teacher" else SAMPLING.max_new_tokens
    drawn = converse(model, heldout, greedy, (0,), tokens)
    right = sum(each.score == 1.0 for each in drawn)
    low, high = wilson(right, len(drawn))
    return {"right": right / len(drawn), "low": low, "high": high}
