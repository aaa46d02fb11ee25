"""`python -m benchmarks turns`: conversations with dependent tool calls, distilled and imitated, three seeds.

A tiny student that is seldom right learns from a teacher with another tokenizer and another chat template, on the same
prompts: from its own conversations, graded turn by turn; by imitating the teacher's; or by imitation and then from its
own. The learning rate and the number of steps of each way are chosen on a seed apart, with the fewest prompts; with n
times as many, runs have √n times as many steps. Finished runs are kept in a folder and not repeated.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.claims.cells import Cells
from benchmarks.claims.figures import markdown, over_seeds, told
from benchmarks.orders import Orders, mended_turns, right_turns
from benchmarks.orders import student as new_student
from benchmarks.orders import teacher as new_teacher
from benchmarks.record import RESULTS, command_line, device_name, write_record
from gold.data import Prompt
from gold.demo.models import learn_answers
from gold.demo.run import CpuSeconds
from gold.environments import Limits
from gold.environments.calling import Caller
from gold.evaluate import wilson
from gold.models.language_model import LanguageModel
from gold.models.load import load_model, save_model
from gold.rollout.conversations import Conversations, DrawnConversation, TurnPrompts
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.train.loop import distill
from gold.train.recipe import Recipe, Term

LIMITS = Limits(max_turns=6)
SAMPLING = Sampling(max_new_tokens=16)
TEMPERATURE = 0.5
"""Of the student's conversations: at 1 most of the start's are noise, which a greedy student never comes to."""
TUNING_SEED = 9
DISTILLED, BOTH = "distilled", "imitation, then distilled"
IMITATION, LONGER = "imitation", "imitation for as long"


@dataclass(frozen=True)
class Way:
    """A way to learn: the share of its steps that imitate, before the others distil; and the learning rates and numbers
    of steps that are tried."""

    imitated: float
    tried: tuple[tuple[float, int], ...]


WAYS = {
    DISTILLED: Way(0.0, ((1e-3, 100), (2e-3, 100))),
    IMITATION: Way(1.0, ((1e-3, 100), (2e-3, 50), (2e-3, 100))),
    LONGER: Way(1.0, ((5e-4, 225), (1e-3, 225))),
    BOTH: Way(0.25, ((1e-3, 100), (2e-3, 100))),
}
"""A step of distillation takes over twice the time of one of imitation, so that ``LONGER`` has the time of ``BOTH``."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment: ``known`` and ``start_known`` are questions whose answers teacher and start learn."""

    batch: int = 32
    heldout: int = 256
    samples: int = 4
    known: int = 3000
    teacher_steps: int = 800
    start_known: int = 300
    start_steps: int = 140


@dataclass(frozen=True)
class Making:
    """The making of a model: the ``teacher``, or the ``student`` that every run begins with."""

    name: str
    sizes: Sizes


@dataclass(frozen=True)
class Run:
    """One run: a way, its learning rate, a seed, prompts and steps of ``sizes.batch`` conversations; ``repairs``: see
    ``Orders``."""

    way: str
    lr: float
    seed: int
    prompts: int
    steps: int
    sizes: Sizes
    repairs: bool = True


def main(arguments: Sequence[str]) -> int:
    """Runs the experiment and writes its record; 1 if distillation is not ahead of imitation with every number of
    prompts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks turns", description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[50, 200], help="numbers to compare")
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
    data = experiment(cells, given.ways, given.prompts, given.seeds)
    print(table(data), flush=True)
    write_record(
        "turns",
        data,
        command=command_line("turns", arguments),
        seconds=time.perf_counter() - begun,
        device=device_name("cpu", 1) + f" a process, {given.workers} processes",
        folder=given.into,
    )
    return int(not all(ahead(data["rows"], n) for n in given.prompts))


def ahead(rows: Sequence[Mapping[str, Any]], prompts: int) -> bool:
    """Whether a way that distils ends ahead of all that only imitate, with so many prompts."""
    right = {row["way"]: row["right"]["mean"] for row in rows if row["prompts"] == prompts}
    distilled = [value for way, value in right.items() if WAYS[way].imitated < 1.0]
    imitated = [value for way, value in right.items() if WAYS[way].imitated == 1.0]
    return bool(max(distilled, default=0.0) > max(imitated, default=0.0))


def experiment(
    cells: Cells, ways: Sequence[str], prompts: Sequence[int], seeds: int, sizes: Sizes = Sizes()
) -> dict[str, Any]:
    """Accuracies of the teacher, of the student before, and of each way with each number of prompts and each seed."""
    teacher, start = cells.all(make, [Making(name, sizes) for name in ("teacher", "student")])
    few = min(prompts)
    tuning = [Run(way, lr, TUNING_SEED, few, steps, sizes) for way in ways for lr, steps in WAYS[way].tried]
    tried = list(zip(tuning, cells.all(run, tuning), strict=True))
    rows: list[dict[str, Any]] = []
    for way in ways:
        for n in prompts:
            own = [(found["right"], job) for job, found in tried if job.way == way]
            best = max(own, key=lambda each: each[0])[1]
            best = replace(best, prompts=n, steps=round(best.steps * math.sqrt(n / few)))
            each = cells.all(run, [replace(best, seed=seed) for seed in range(seeds)])
            row: dict[str, Any] = {"way": way, "prompts": n, "lr": best.lr, "steps": best.steps}
            row |= {name: over_seeds([r[name] for r in each]) for name in ("right", "failed", "mended")}
            rows.append(row | {"cpu_s": [r["cpu_s"] for r in each]})
    plain = [{**asdict(job), **found} for job, found in tried]
    for row in plain:
        del row["sizes"]
    return {
        "sizes": asdict(sizes),
        "limits": dict(LIMITS),
        "teacher": teacher,
        "start": start,
        "rows": rows,
        "tried": plain,
    }


def table(data: Mapping[str, Any]) -> str:
    """The rows as Markdown."""
    rows = [
        [f"*{name}*", "", f"{data[name]['right']:.1%}", f"{data[name]['failed']:.0%}", "", "", "", ""]
        for name in ("teacher", "start")
    ]
    rows += [
        [
            r["way"],
            str(r["prompts"]),
            told(r["right"]),
            f"{r['failed']['mean']:.0%}",
            f"{r['mended']['mean']:.0%}",
            f"{r['lr']:g}",
            str(r["steps"]),
            f"{sum(r['cpu_s']) / len(r['cpu_s']):.0f}",
        ]
        for r in sorted(data["rows"], key=lambda r: (r["prompts"], -r["right"]["mean"]))
    ]
    head = [
        "",
        "prompts",
        "right",
        "with a failed call",
        "of these repaired",
        "learning rate",
        "steps",
        "CPU s",
    ]
    return markdown(head, rows)


def make(job: Making, folder: Path) -> dict[str, Any]:
    """Trains the teacher, or the student's start; saves the model, and measures it."""
    task, sizes = Orders(), job.sizes
    if job.name == "teacher":
        model = new_teacher()
        known = mended_turns(task.prompts("train", sizes.known, 10**6), 0)
        learn_answers(model, known, steps=sizes.teacher_steps, batch=48)
    else:
        model = new_student()
        few = right_turns(task.prompts("train", sizes.start_known, 10**6 + 1))
        learn_answers(model, few, steps=sizes.start_steps, batch=32, seed=1)
    save_model(model, folder / model.name)
    asked = task.prompts("heldout", sizes.heldout, 0)
    mended = mended_turns(asked[: sizes.heldout // 4], 1)
    return measured(model, task, asked) | {"after_mistakes": right_after(model, mended)}


def run(job: Run, folder: Path) -> dict[str, Any]:
    """Trains the student on the prompts in one way; its accuracy after that."""
    way, sizes, task = WAYS[job.way], job.sizes, Orders(job.repairs)
    student, teacher = (load_model(folder / name) for name in ("student", "teacher"))
    prompts = task.prompts("train", job.prompts, job.seed)
    first = round(way.imitated * job.steps)
    recipe = Recipe(
        num_generations=1,
        prompts_per_step=sizes.batch,
        micro_batch_size=4 * sizes.batch,
        generation_batch_size=sizes.batch,
        max_new_tokens=SAMPLING.max_new_tokens,
        temperature=TEMPERATURE,
        lr=job.lr,
        final_lr_share=0.0,
        seed=job.seed,
    )
    clocks = [CpuSeconds()]
    if first:
        # A step has as many of the teacher's turns as the turns of a batch of its conversations.
        taught = imitated(teacher, task, prompts, job.seed, sizes.samples)
        given = recipe.replace(
            objectives=(Term("sft"),), on_policy=0.0, prompts_per_step=3 * sizes.batch, steps=first
        )
        distill(student, None, taught, given, progress=clocks[-1])
        clocks.append(CpuSeconds())
    if first < job.steps:
        recipe = recipe.replace(steps=job.steps - first)
        distill(student, teacher, prompts, recipe, environment=task, limits=LIMITS, progress=clocks[-1])
    heldout = Orders().prompts("heldout", sizes.heldout, int(job.seed == TUNING_SEED))
    found = measured(student, Orders(), heldout)
    return found | {"cpu_s": round(sum(clock.spent[-1] for clock in clocks), 1)}


def imitated(
    teacher: LanguageModel, task: Orders, prompts: Sequence[Prompt], seed: int, samples: int
) -> list[Prompt]:
    """The turns of the teacher's own conversations, so many of each prompt, as prompts with completions."""
    asked = [prompt for prompt in prompts for _ in range(samples)]
    return [
        replace(r.prompt, key=f"{r.prompt.key} {number} {r.turn.number}", completion=r.text)
        for number, each in enumerate(converse(teacher, task, asked, SAMPLING, (seed, 10**6)))
        for r in each.rollouts
        if r.stopped and r.text and r.turn
    ]


def converse(
    model: LanguageModel, task: Orders, prompts: Sequence[Prompt], sampling: Sampling, seed: tuple[int, ...]
) -> list[DrawnConversation]:
    """A conversation of each prompt by a model."""
    caller = Caller(LIMITS.timeout_s)
    conversations = Conversations(model, task, LIMITS, caller)
    seeds = [(*seed, n) for n in range(len(prompts))]
    engine = HuggingFaceEngine(model, 128)
    drawn = conversations.draw(list(TurnPrompts(prompts, task)), seeds, sampling, engine.generate)
    caller.close()
    return drawn


def right_after(model: LanguageModel, turns: Sequence[Prompt]) -> float:
    """The share of given turns of which a model's likeliest one is the right one."""
    asked = [replace(turn, completion=None) for turn in turns]
    greedy = replace(SAMPLING, temperature=0.0)
    drawn = sample(HuggingFaceEngine(model, 128), model, asked, greedy, seeds=[(0,)] * len(asked))
    return sum(d.text == turn.completion for d, turn in zip(drawn, turns, strict=True)) / len(turns)


def measured(model: LanguageModel, task: Orders, heldout: Sequence[Prompt]) -> dict[str, Any]:
    """The share of held-out questions that a model answers right, greedily, with its 95 % interval; the share of the
    conversations with a call that failed, and of these the share that is right in the end."""
    greedy = replace(SAMPLING, temperature=0.0)
    drawn = converse(model, task, heldout, greedy, (0,))
    right = [each.score == 1.0 for each in drawn]
    failed = [bool(each.seen.counts["tool_errors"]) for each in drawn]
    low, high = wilson(sum(right), len(drawn))
    mended = sum(r and f for r, f in zip(right, failed, strict=True))
    return {
        "right": sum(right) / len(drawn),
        "low": low,
        "high": high,
        "failed": sum(failed) / len(drawn),
        "mended": mended / max(1, sum(failed)),
    }
