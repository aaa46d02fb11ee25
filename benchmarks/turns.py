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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.claims.cells import Cells
from benchmarks.claims.figures import markdown, over_seeds, told
from benchmarks.orders import Orders
from benchmarks.record import RESULTS, command_line, device_name, write_record
from benchmarks.shop import Shop, mended_turns, right_turns
from benchmarks.shop import student as new_student
from benchmarks.shop import teacher as new_teacher
from benchmarks.stores import Stores
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
TEMPERATURE = 0.5
"""Of the student's conversations: at 1 most of the start's are noise, which a greedy student never comes to."""
TUNING_SEED = 9
DISTILLED, BOTH = "distilled", "imitation, then distilled"
IMITATION, LONGER = "imitation", "imitation for as long"
NOISY = "imitation of a teacher drawn at a higher temperature"


@dataclass(frozen=True)
class Way:
    """A way to learn: the share of its steps that imitate, before the others distil; the learning rates and numbers of
    steps that are tried; the temperature of the teacher's conversations that are imitated."""

    imitated: float
    tried: tuple[tuple[float, int], ...]
    temperature: float = 1.0


WAYS = {
    DISTILLED: Way(0.0, ((1e-3, 100), (2e-3, 100))),
    IMITATION: Way(1.0, ((1e-3, 100), (2e-3, 50), (2e-3, 100))),
    LONGER: Way(1.0, ((5e-4, 225), (1e-3, 225))),
    BOTH: Way(0.25, ((1e-3, 100), (2e-3, 100))),
}
"""A step of distillation takes over twice the time of one of imitation, so that ``LONGER`` has the time of ``BOTH``."""
STORE_WAYS = {
    DISTILLED: Way(0.0, ((1e-3, 50), (2e-3, 50))),
    IMITATION: Way(1.0, ((1e-3, 50), (2e-3, 50))),
    LONGER: Way(1.0, ((5e-4, 150), (1e-3, 150))),
    BOTH: Way(0.25, ((1e-3, 50), (2e-3, 50))),
    NOISY: Way(1.0, ((1e-3, 50), (2e-3, 50)), temperature=1.5),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment.

    ``tokens``: most of a turn. ``known`` and ``start_known``: questions whose answers teacher and start learn.
    ``recall_steps``: of the teacher on first turns alone, before the others. ``start_mistakes``: the share of mistakes
    in the conversations from which the start learns.
    """

    batch: int = 32
    tokens: int = 16
    heldout: int = 256
    samples: int = 4
    known: int = 3000
    recall_steps: int = 0
    teacher_steps: int = 800
    start_known: int = 300
    start_steps: int = 140
    start_mistakes: float = 0.0


@dataclass(frozen=True)
class Task:
    """A task of the experiment; ``environment(repairs)`` is its environment."""

    environment: Callable[..., Shop]
    sizes: Sizes
    ways: Mapping[str, Way]


TASKS = {
    "orders": Task(Orders, Sizes(), WAYS),
    "stores": Task(
        Stores,
        Sizes(tokens=24, recall_steps=600, teacher_steps=900, start_steps=240, start_mistakes=0.3),
        STORE_WAYS,
    ),
}


@dataclass(frozen=True)
class Making:
    """The making of a model: the ``teacher``, or the ``student`` that every run begins with."""

    name: str
    sizes: Sizes
    task: str


@dataclass(frozen=True)
class Run:
    """One run: a way, its learning rate, a seed, prompts and steps of ``sizes.batch`` conversations; ``repairs``: see
    ``Shop``."""

    way: str
    lr: float
    seed: int
    prompts: int
    steps: int
    sizes: Sizes
    task: str
    repairs: bool = True


def main(arguments: Sequence[str]) -> int:
    """Runs the experiment and writes its record; 1 if distillation is not ahead of imitation with every number of
    prompts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks turns", description=__doc__)
    parser.add_argument("--task", choices=list(TASKS), default="orders")
    parser.add_argument("--prompts", type=int, nargs="+", default=[50, 200], help="numbers to compare")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--ways", nargs="+", choices=list(STORE_WAYS), metavar="WAY", help="default: those of the task"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/turns"), help="where finished runs are kept"
    )
    parser.add_argument("--into", type=Path, default=RESULTS)
    given = parser.parse_args(list(arguments))
    begun = time.perf_counter()
    task = TASKS[given.task]
    cells = Cells(given.folder / given.task, given.workers)
    ways = given.ways or list(task.ways)
    data = experiment(cells, ways, given.prompts, given.seeds, task.sizes, given.task)
    print(table(data), flush=True)
    write_record(
        record_name(given.task),
        {**cells.spent(), **data},
        command=command_line("turns", arguments),
        seconds=time.perf_counter() - begun,
        device=device_name("cpu", 1) + f" a process, {given.workers} processes",
        folder=given.into,
    )
    return int(not all(ahead(data["rows"], n) for n in given.prompts))


def record_name(task: str) -> str:
    """The name of a task's record."""
    return "turns" if task == "orders" else f"turns-{task}"


def ahead(rows: Sequence[Mapping[str, Any]], prompts: int) -> bool:
    """Whether a way that distils ends ahead of all that only imitate, with so many prompts."""
    right = {row["way"]: row["right"]["mean"] for row in rows if row["prompts"] == prompts}
    distilled = [value for way, value in right.items() if way in (DISTILLED, BOTH)]
    imitated = [value for way, value in right.items() if way not in (DISTILLED, BOTH)]
    return bool(max(distilled, default=0.0) > max(imitated, default=0.0))


def experiment(
    cells: Cells,
    ways: Sequence[str],
    prompts: Sequence[int],
    seeds: int,
    sizes: Sizes = Sizes(),
    task: str = "orders",
) -> dict[str, Any]:
    """Accuracies of the teacher, of the student before, and of each way with each number of prompts and each seed."""
    teacher, start = cells.all(make, [Making(name, sizes, task) for name in ("teacher", "student")])
    few, known = min(prompts), TASKS[task].ways
    tuning = [
        Run(way, lr, TUNING_SEED, few, steps, sizes, task) for way in ways for lr, steps in known[way].tried
    ]
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
            rows.append(row | {name: [r[name] for r in each] for name in ("cpu_s", "told", "shown")})
    plain = [{**asdict(job), **found} for job, found in tried]
    for row in plain:
        del row["sizes"]
    return {
        "task": task,
        "sizes": asdict(sizes),
        "limits": dict(LIMITS),
        "teacher": teacher,
        "start": start,
        "rows": rows,
        "tried": plain,
    }


def table(data: Mapping[str, Any]) -> str:
    """The rows as Markdown, those of one number of prompts together, the best first."""
    head = [
        "",
        "prompts",
        "right",
        "a call failed",
        "of these right",
        "repairs shown",
        "rate",
        "steps",
        "CPU s",
    ]
    rows = [
        [f"*{name}*", "", f"{data[name]['right']:.1%}", f"{data[name]['failed']:.0%}", _mended(data[name])]
        for name in ("teacher", "start")
    ]
    rows += [
        [
            r["way"],
            str(r["prompts"]),
            told(r["right"]),
            f"{r['failed']['mean']:.0%}",
            _mended({name: r[name]["mean"] for name in ("failed", "mended")}),
            f"{mean(r['shown']):.1%}" if None not in r.get("shown", [None]) else "",
            f"{r['lr']:g}",
            str(r["steps"]),
            f"{mean(r['cpu_s']):.0f}",
        ]
        for r in sorted(data["rows"], key=lambda r: (r["prompts"], -r["right"]["mean"]))
    ]
    return markdown(head, [[*row, *[""] * (len(head) - len(row))] for row in rows])


def _mended(found: Mapping[str, float]) -> str:
    """The share of the conversations with a failed call that end right; nothing if hardly any has one."""
    return f"{found['mended']:.0%}" if found["failed"] >= 0.01 else ""


def make(job: Making, folder: Path) -> dict[str, Any]:
    """Trains the teacher, or the student's start; saves the model, and measures it."""
    task, sizes = TASKS[job.task].environment(), job.sizes
    if job.name == "teacher":
        model = new_teacher(task)
        known = mended_turns(task, task.known(sizes.known, 10**6), 0)
        if sizes.recall_steps:
            opening = [turn for turn in known if len(turn.messages or ()) == 1 and turn.begun is None]
            learn_answers(model, opening, steps=sizes.recall_steps, batch=48)
        learn_answers(model, known, steps=sizes.teacher_steps, batch=48)
    else:
        model = new_student(task)
        few = task.prompts("train", sizes.start_known, 10**6 + 1)
        turns = (
            [t for t in mended_turns(task, few, 2, sizes.start_mistakes) if t.begun is None]
            if sizes.start_mistakes
            else right_turns(task, few)
        )
        learn_answers(model, turns, steps=sizes.start_steps, batch=32, seed=1)
    save_model(model, folder / model.name)
    asked = task.prompts("heldout", sizes.heldout, 0)
    mended = mended_turns(task, asked[: sizes.heldout // 4], 1)
    found = measured(model, task, asked, sizes.tokens)
    return found | {"after_mistakes": right_after(model, mended, sizes.tokens)}


class Watch(CpuSeconds):
    """Also keeps how many calls failed in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[float] = []

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Keeps a step's number."""
        super().log(kind, record)
        if kind == "train":
            self.errors.append(record.get("tool_errors", 0.0))

    def told(self, batch: int) -> list[float]:
        """How many calls failed in a conversation, in each quarter of the steps."""
        bounds = [round(len(self.errors) * n / 4) for n in range(5)]
        return [round(mean(self.errors[a:b] or [0.0]) / batch, 3) for a, b in pairwise(bounds)]


def run(job: Run, folder: Path) -> dict[str, Any]:
    """Trains the student on the prompts in one way; its accuracy after that.

    ``told``: failed calls in a conversation of the student, in each quarter of the steps that distil. ``shown``: the
    share of the teacher's conversations in which a call fails and the end is right, if any are imitated.
    """
    way, sizes = TASKS[job.task].ways[job.way], job.sizes
    task = TASKS[job.task].environment(job.repairs)
    student, teacher = (load_model(folder / name) for name in ("student", "teacher"))
    prompts = task.prompts("train", job.prompts, job.seed)
    first = round(way.imitated * job.steps)
    recipe = Recipe(
        num_generations=1,
        prompts_per_step=sizes.batch,
        micro_batch_size=4 * sizes.batch,
        generation_batch_size=sizes.batch,
        max_new_tokens=sizes.tokens,
        temperature=TEMPERATURE,
        lr=job.lr,
        final_lr_share=0.0,
        seed=job.seed,
    )
    clocks, shown = [Watch()], None
    if first:
        # A step has as many of the teacher's turns as the turns of a batch of its conversations.
        drawn = lessons(teacher, task, prompts, job.seed, sizes, way.temperature)
        taught = imitated(drawn, right_alone=way.temperature > 1.0)
        shown = mean(each.score == 1.0 and each.seen.counts["tool_errors"] > 0 for each in drawn)
        given = recipe.replace(
            objectives=(Term("sft"),), on_policy=0.0, prompts_per_step=3 * sizes.batch, steps=first
        )
        distill(student, None, taught, given, progress=clocks[-1])
        clocks.append(Watch())
    if first < job.steps:
        recipe = recipe.replace(steps=job.steps - first)
        distill(student, teacher, prompts, recipe, environment=task, limits=LIMITS, progress=clocks[-1])
    whole = TASKS[job.task].environment()
    heldout = whole.prompts("heldout", sizes.heldout, int(job.seed == TUNING_SEED))
    found = measured(student, whole, heldout, sizes.tokens)
    told = clocks[-1].told(sizes.batch) if first < job.steps else None
    cpu_s = round(sum(clock.spent[-1] for clock in clocks), 1)
    return found | {"cpu_s": cpu_s, "told": told, "shown": shown}


def lessons(
    teacher: LanguageModel,
    task: Shop,
    prompts: Sequence[Prompt],
    seed: int,
    sizes: Sizes,
    temperature: float = 1.0,
) -> list[DrawnConversation]:
    """The teacher's own conversations, ``sizes.samples`` of each prompt."""
    asked = [prompt for prompt in prompts for _ in range(sizes.samples)]
    sampling = Sampling(max_new_tokens=sizes.tokens, temperature=temperature)
    return converse(teacher, task, asked, sampling, (seed, 10**6))


def imitated(conversations: Sequence[DrawnConversation], right_alone: bool = False) -> list[Prompt]:
    """The turns of conversations as prompts with completions; ``right_alone``: of those that are right in the end, but
    for calls that fail."""
    found = []
    for number, each in enumerate(conversations):
        if right_alone and each.score != 1.0:
            continue
        answers = [(r.prompt.messages or ({},))[-1].get("content", "") for r in each.rollouts[1:]]
        for r, answer in zip(each.rollouts, [*answers, ""], strict=True):
            if r.stopped and r.text and r.turn and not (right_alone and answer.startswith("error")):
                key = f"{r.prompt.key} {number} {r.turn.number}"
                found.append(replace(r.prompt, key=key, completion=r.text))
    return found


def converse(
    model: LanguageModel, task: Shop, prompts: Sequence[Prompt], sampling: Sampling, seed: tuple[int, ...]
) -> list[DrawnConversation]:
    """A conversation of each prompt by a model."""
    caller = Caller(LIMITS.timeout_s)
    conversations = Conversations(model, task, LIMITS, caller)
    seeds = [(*seed, n) for n in range(len(prompts))]
    engine = HuggingFaceEngine(model, 128)
    drawn = conversations.draw(list(TurnPrompts(prompts, task)), seeds, sampling, engine.generate)
    caller.close()
    return drawn


def right_after(model: LanguageModel, turns: Sequence[Prompt], tokens: int) -> float:
    """The share of given turns of which a model's likeliest one is the right one."""
    asked = [replace(turn, completion=None) for turn in turns]
    greedy = Sampling(max_new_tokens=tokens, temperature=0.0)
    drawn = sample(HuggingFaceEngine(model, 128), model, asked, greedy, seeds=[(0,)] * len(asked))
    return sum(d.text == turn.completion for d, turn in zip(drawn, turns, strict=True)) / len(turns)


def measured(model: LanguageModel, task: Shop, heldout: Sequence[Prompt], tokens: int) -> dict[str, Any]:
    """The share of held-out questions that a model answers right, greedily, with its 95 % interval; the share of the
    conversations with a call that failed, and of these the share that is right in the end."""
    greedy = Sampling(max_new_tokens=tokens, temperature=0.0)
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
