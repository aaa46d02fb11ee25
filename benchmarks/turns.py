"""`python -m benchmarks turns`: a conversation of two turns with a tool, distilled and imitated, three seeds.

A tiny student that seldom calls its calculator rightly learns from a teacher with another tokenizer and another chat
template, on the same prompts: from its own conversations, graded turn by turn, or by imitating the teacher's. Each
way's learning rate is chosen on a seed apart; finished runs are kept in a folder and not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.claims.cells import Cells
from benchmarks.claims.figures import markdown, over_seeds, told
from benchmarks.record import RESULTS, command_line, device_name, write_record
from gold.data import Prompt
from gold.demo.calculator import Calculator
from gold.demo.models import learn_answers
from gold.demo.run import CpuSeconds
from gold.demo.talk import lessons, talking_student, talking_teacher
from gold.environments import Limits
from gold.environments.calling import Caller
from gold.evaluate import wilson
from gold.models.language_model import LanguageModel
from gold.models.load import load_model, save_model
from gold.rollout.conversations import Conversations, DrawnConversation, TurnPrompts
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.train.loop import distill
from gold.train.recipe import Recipe, Term

TASK = Calculator()
LIMITS = Limits(max_turns=3)
SAMPLING = Sampling(max_new_tokens=40)
TOKENS = {"teacher": 120, "student": SAMPLING.max_new_tokens}
TUNING_SEED = 9
DISTILLED, IMITATION = "distilled", "imitation"
WAYS: dict[str, tuple[Term, tuple[float, ...]]] = {
    DISTILLED: (Term("reverse_kl"), (2e-3, 4e-3)),
    IMITATION: (Term("sft"), (1e-3, 2e-3, 4e-3)),
}
"""The loss of each way, and the learning rates that are tried for it."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment."""

    batch: int = 32
    heldout: int = 256
    teacher_steps: int = 700
    start_steps: int = 130


@dataclass(frozen=True)
class Run:
    """One run: a way, its learning rate, a seed, prompts and steps of ``sizes.batch`` conversations."""

    way: str
    lr: float
    seed: int
    prompts: int
    steps: int
    sizes: Sizes = Sizes()


def main(arguments: Sequence[str]) -> int:
    """Runs the experiment and writes its record; 1 if distillation is not ahead of imitation with every number of
    prompts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks turns", description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 400], help="numbers to compare")
    parser.add_argument("--steps", type=int, default=120, help="of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/turns"), help="where finished runs are kept"
    )
    parser.add_argument("--into", type=Path, default=RESULTS)
    given = parser.parse_args(list(arguments))
    begun = time.perf_counter()
    cells = Cells(given.folder, given.workers)
    data = experiment(cells, given.ways, given.prompts, given.steps, given.seeds)
    print(table(data), flush=True)
    write_record(
        "turns",
        data,
        command=command_line("turns", arguments),
        seconds=time.perf_counter() - begun,
        device=device_name("cpu", 1) + f" a process, {given.workers} processes",
        folder=given.into,
    )
    rows = data["rows"]
    best = {
        n: max(r["right"]["mean"] for r in rows if r["prompts"] == n and r["way"] != "imitation")
        for n in given.prompts
    }
    return int(any(best[r["prompts"]] <= r["right"]["mean"] for r in rows if r["way"] == "imitation"))


def experiment(
    cells: Cells, ways: Sequence[str], prompts: Sequence[int], steps: int, seeds: int
) -> dict[str, Any]:
    """Accuracies of the teacher, of the student before, and of each way with each number of prompts and each seed."""
    made = cells.all(make, [Sizes()])[0]
    tuning = [Run(way, lr, TUNING_SEED, n, steps) for way in ways for n in prompts for lr in WAYS[way][1]]
    best: dict[tuple[str, int], tuple[float, float]] = {}
    for job, found in zip(tuning, cells.all(run, tuning), strict=True):
        place = job.way, job.prompts
        best[place] = max(best.get(place, (-1.0, 0.0)), (found["right"], job.lr))
    rows: list[dict[str, Any]] = []
    for (way, n), (_, lr) in best.items():
        each = cells.all(run, [Run(way, lr, seed, n, steps) for seed in range(seeds)])
        row = {"way": way, "prompts": n, "lr": lr, "right": over_seeds([r["right"] for r in each])}
        rows.append(row | {"cpu_s": [r["cpu_s"] for r in each]})
    return {"sizes": asdict(Sizes()), "steps": steps, **made, "rows": rows}


def table(data: dict[str, Any]) -> str:
    """The rows as Markdown."""
    rows = [
        ["*teacher*", "", f"{data['teacher']['right']:.1%}", "", ""],
        ["*start*", "", f"{data['start']['right']:.1%}", "", ""],
    ]
    rows += [
        [
            r["way"],
            str(r["prompts"]),
            told(r["right"]),
            f"{r['lr']:g}",
            f"{sum(r['cpu_s']) / len(r['cpu_s']):.0f}",
        ]
        for r in sorted(data["rows"], key=lambda r: (r["prompts"], -r["right"]["mean"]))
    ]
    return markdown(["", "prompts", "right", "learning rate", "CPU s"], rows)


def make(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Trains the teacher and the student's start, saves them, and measures both."""
    heldout = TASK.prompts("heldout", sizes.heldout, 0)
    known = [turn for prompt in TASK.prompts("train", 4000, 9) for turn in lessons(prompt)]
    teacher = talking_teacher(layers=3, width=64)
    learn_answers(teacher, known, steps=sizes.teacher_steps, batch=48)
    start = talking_student(layers=2, width=64)
    learn_answers(start, known[::-1], steps=sizes.start_steps, batch=32, seed=1)
    for model in (teacher, start):
        save_model(model, folder / model.name)
    return {
        "teacher": measured(teacher, heldout, TOKENS["teacher"]),
        "start": measured(start, heldout, TOKENS["student"]),
    }


def run(job: Run, folder: Path) -> dict[str, float]:
    """Trains the student on the prompts in one way; its accuracy after that."""
    student, teacher = (load_model(folder / name) for name in ("student", "teacher"))
    prompts = TASK.prompts("train", job.prompts, job.seed)
    recipe = Recipe(
        objectives=(WAYS[job.way][0],),
        num_generations=1,
        prompts_per_step=job.sizes.batch,
        micro_batch_size=job.sizes.batch,
        generation_batch_size=job.sizes.batch,
        max_new_tokens=SAMPLING.max_new_tokens,
        steps=job.steps,
        lr=job.lr,
        seed=job.seed,
    )
    clock = CpuSeconds()
    if job.way == IMITATION:
        # Each of the teacher's turns is a completion; a step has as many of them as two turns of each prompt.
        taught = [turn for n in range(4) for turn in imitated(teacher, prompts, (job.seed, n))]
        recipe = recipe.replace(on_policy=0.0, prompts_per_step=2 * job.sizes.batch)
        distill(student, None, taught, recipe, progress=clock)
    else:
        distill(student, teacher, prompts, recipe, environment=TASK, limits=LIMITS, progress=clock)
    heldout = TASK.prompts("heldout", job.sizes.heldout, int(job.seed == TUNING_SEED))
    return measured(student, heldout, TOKENS["student"]) | {"cpu_s": clock.spent[-1]}


def imitated(teacher: LanguageModel, prompts: Sequence[Prompt], seed: tuple[int, int]) -> list[Prompt]:
    """The turns of the teacher's own conversations as prompts with completions."""
    drawn = converse(teacher, prompts, SAMPLING, seed, TOKENS["teacher"])
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


def measured(model: LanguageModel, heldout: Sequence[Prompt], tokens: int) -> dict[str, float]:
    """The share of held-out questions that a model answers right, greedily, with its 95 % interval."""
    greedy = Sampling(max_new_tokens=0, temperature=0.0)
    drawn = converse(
        model, heldout, greedy, (0,), TOKENS["teacher" if model.name == "teacher" else "student"]
    )
    right = sum(each.score == 1.0 for each in drawn)
    low, high = wilson(right, len(drawn))
    return {"right": right / len(drawn), "low": low, "high": high}
