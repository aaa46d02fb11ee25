"""`python -m benchmarks informed`: teachers that see more than the student, and teachers of two families, three seeds.

1. A tiny student learns running sums from itself: as its own teacher it reads the reference solution in front of the
   prompt. Beside it: the same without the solution, the moving average in place of fixed weights, and supervised
   training on the same solutions.
2. A tiny student learns two tasks from two teachers with tokenizers of their own, each of which knows one of them:
   routed, mixed, and from either alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from benchmarks.record import RESULTS, device_name, write_record
from gold.data import Prompt
from gold.demo.models import learn_answers, tiny_model, word_tokenizer
from gold.demo.run import SAMPLING, TASK, DemoPlan, make_teacher
from gold.evaluate import wilson
from gold.models.language_model import LanguageModel
from gold.models.load import load_model, save_model
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.teachers import LocalTeacher, SelfTeacher, Teacher, Teachers
from gold.train.loop import distill
from gold.train.recipe import Recipe, Term
from gold.train.trackers import Trackers

SUMS, TURNED = "sums", "turned"


class Reversals:
    """Numbers to be written in reverse order: `` 12 45 33 =`` → `` 33 45 12``."""

    name = "reversals"

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """``count`` different prompts; the last number says on which side one is, so that no prompt is on both."""
        rng = np.random.default_rng((seed, split == "heldout", 7))
        made: dict[str, Prompt] = {}
        while len(made) < count:
            values = [int(v) for v in rng.integers(10, 50, int(rng.integers(3, 6)))]
            if (sum(values) % 8 == 0) is (split == "heldout"):
                text = "".join(f" {v}" for v in values) + " ="
                answer = "".join(f" {v}" for v in reversed(values))
                made.setdefault(text, Prompt(text.strip(), text=text, completion=answer, reference=answer))
        return list(made.values())

    def score(self, prompt: Prompt, completion: str) -> float:
        """1 where it is right, else 0."""
        return float(completion == prompt.reference)


TASKS: dict[str, Any] = {SUMS: TASK, TURNED: Reversals()}


@dataclass(frozen=True)
class Plan:
    """How much of everything is spent."""

    steps: int = 120
    prompts: int = 400
    heldout: int = 256
    answers: int = 20000
    lr: float = 1e-3
    text_lr: float = 1e-3
    decay: float = 0.99


def answered(name: str, split: str, count: int, seed: int) -> list[Prompt]:
    """Prompts of a task with their solutions, which only teachers are told, and routed by the task's name."""
    prompts = TASKS[name].prompts(split, count, seed)
    return [replace(p, teacher_context=f"{p.reference} =", route=name) for p in prompts]


def accuracy(model: LanguageModel, prompts: Sequence[Prompt], told: bool = False) -> float:
    """Share of prompts answered right, greedily; ``told``: behind the solution, as a teacher reads them."""
    asked = [p.for_teacher if told else p for p in prompts]
    found = sample(
        HuggingFaceEngine(model, 256),
        model,
        asked,
        replace(SAMPLING, temperature=0.0),
        seeds=[(0,)] * len(asked),
    )
    return mean(float(r.stopped and r.text == r.prompt.reference) for r in found)


def made(folder: Path, name: str, make: Callable[[], LanguageModel]) -> LanguageModel:
    """The model that is kept under a name, made where there is none yet."""
    if not (folder / name / "config.json").is_file():
        save_model(make(), folder / name)
    return load_model(folder / name)


def reader(plan: Plan) -> LanguageModel:
    """A student that is poor at sums and copies a solution that stands in front of the prompt."""
    asked = answered(SUMS, "train", plan.answers, 1)
    words = word_tokenizer([f"{p.text}{p.completion}" for p in asked[:4000]])
    model = tiny_model(words, "reader", layers=2, seed=1)
    texts = [p.for_teacher if n % 2 else p for n, p in enumerate(asked)]
    watched = answered(SUMS, "heldout", 128, 0)

    def enough(step: int) -> bool:
        plain, told = accuracy(model, watched), accuracy(model, watched, told=True)
        print(f"reader    step {step:>4}: {plain:.0%} alone, {told:.0%} with the solution", flush=True)
        return told > 0.9 or plain > 0.3

    learn_answers(model, texts, steps=1500, every=100, watch=enough)
    return model


def beginner(plan: Plan) -> LanguageModel:
    """A student that is poor at both tasks."""
    asked = {name: answered(name, "train", plan.answers, 1) for name in TASKS}
    words = word_tokenizer([f"{p.text}{p.completion}" for ps in asked.values() for p in ps[:2000]])
    model = tiny_model(words, "beginner", layers=2, seed=1)
    watched = {name: answered(name, "heldout", 128, 0) for name in TASKS}

    def until(name: str, share: float) -> Callable[[int], bool]:
        def enough(step: int) -> bool:
            right = {task: accuracy(model, ps) for task, ps in watched.items()}
            print(
                f"beginner  step {step:>4}: {right[SUMS]:.0%} of sums, {right[TURNED]:.0%} turned", flush=True
            )
            return right[name] > share

        return enough

    # Sums take far longer to learn, so they come first.
    learn_answers(model, asked[SUMS], steps=1500, every=50, watch=until(SUMS, 0.15))
    learn_answers(model, list(chain(*asked.values())), steps=1500, every=10, watch=until(TURNED, 0.1))
    return model


def turner(plan: Plan) -> LanguageModel:
    """A teacher of reversals, whose tokens are pieces of numbers."""
    asked = answered(TURNED, "train", plan.answers, 0)
    pieces = word_tokenizer([f"{p.text}{p.completion}" for p in asked[:400]], 60)
    model = tiny_model(pieces, "turner", layers=3, seed=0)
    watched = answered(TURNED, "heldout", 128, 0)

    def enough(step: int) -> bool:
        right = accuracy(model, watched)
        print(f"turner    step {step:>4}: {right:.0%} turned", flush=True)
        return right > 0.98

    learn_answers(model, asked, steps=1600, every=100, watch=enough)
    return model


def trained(
    student: LanguageModel,
    teacher: Teacher | Teachers | None,
    prompts: Sequence[Prompt],
    plan: Plan,
    seed: int,
    term: str = "reverse_kl",
    steps: int | None = None,
) -> LanguageModel:
    """The student after a run; without a teacher it learns the prompts' own completions."""
    recipe = Recipe(
        (Term(term if teacher is not None else "sft"),),
        max_new_tokens=SAMPLING.max_new_tokens,
        num_generations=1,
        on_policy=0.0 if teacher is None else 1.0,
        prompts_per_step=48,
        micro_batch_size=48,
        generation_batch_size=64,
        steps=steps or plan.steps,
        seed=seed,
        lr=plan.text_lr if teacher is None else plan.lr,
    )
    distill(student, teacher, prompts, recipe, progress=Trackers())
    return student


def of_itself(folder: Path, plan: Plan, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy on held-out sums after each way of learning from the solutions of the same prompts."""
    prompts = answered(SUMS, "train", plan.prompts, 0)
    heldout = answered(SUMS, "heldout", plan.heldout, 0)
    found = {}

    def note(name: str, model: LanguageModel) -> None:
        found[name] = {SUMS: accuracy(model, heldout)}
        print(f"seed {seed}  {name:<42} {found[name][SUMS]:6.1%}", flush=True)

    start = load_model(folder / "reader")
    if seed == 0:
        note("start", start)
        found["start, told the solution"] = {SUMS: accuracy(start, heldout, told=True)}
        print(found["start, told the solution"], flush=True)
    for name, decay, told in (
        ("itself, told the solution, frozen", 1.0, True),
        (f"itself, told the solution, average {plan.decay:g}", plan.decay, True),
        ("itself, told nothing, frozen", 1.0, False),
    ):
        student = load_model(folder / "reader")
        given = prompts if told else [replace(p, teacher_context=None) for p in prompts]
        # Told nothing, it is its own teacher from the first step on: the gradient is 0 at every one.
        steps = None if told else 5
        teacher = SelfTeacher(student, decay)
        note(name, trained(student, teacher, given, plan, seed, term="forward_kl", steps=steps))
    note("supervised on the solutions", trained(load_model(folder / "reader"), None, prompts, plan, seed))
    return found


def of_two(folder: Path, plan: Plan, seed: int) -> dict[str, dict[str, float]]:
    """Accuracy on both tasks after learning from two teachers in each way."""
    prompts = list(
        chain(*zip(*(answered(name, "train", plan.prompts // 2, 0) for name in TASKS), strict=True))
    )
    prompts = [replace(p, teacher_context=None, completion=None) for p in prompts]
    heldout = {name: answered(name, "heldout", plan.heldout, 0) for name in TASKS}
    found = {}

    def note(name: str, model: LanguageModel) -> None:
        found[name] = {task: accuracy(model, held) for task, held in heldout.items()}
        shown = ", ".join(f"{share:.1%} {task}" for task, share in found[name].items())
        print(f"seed {seed}  {name:<42} {shown}", flush=True)

    adder, turner_ = (LocalTeacher(load_model(folder / name)) for name in ("teacher", "turner"))
    if seed == 0:
        note("start", load_model(folder / "beginner"))
        note("teacher of sums (characters)", adder.model)
        note("teacher of reversals (pieces of numbers)", turner_.model)
    members: dict[str, Teacher] = {SUMS: adder, TURNED: turner_}
    ways: dict[str, Teacher | Teachers] = {
        "each prompt its own teacher": Teachers(members),
        "linear mix": Teachers(members, "linear"),
        "log-linear mix": Teachers(members, "log_linear"),
        "the teacher of sums alone": adder,
        "the teacher of reversals alone": turner_,
    }
    for name, teacher in ways.items():
        note(name, trained(load_model(folder / "beginner"), teacher, prompts, plan, seed))
    return found


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks informed", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each way")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/informed"), help="where models and runs are kept"
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="these alone")
    parser.add_argument("--dry", action="store_true", help="print, and write no record")
    given = parser.parse_args(list(arguments))
    torch.set_num_threads(1)
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    plan, started = Plan(), time.process_time()
    parts: dict[str, Any] = {}
    for part in given.parts:
        needed, run = PARTS[part]
        for name in needed:
            if name == "teacher" and not (folder / name).is_dir():
                make_teacher(folder, DemoPlan())
            elif name != "teacher":
                made(folder, name, partial(MODELS[name], plan))
        kept = folder / f"{part}.jsonl"
        runs = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
        for seed in range(len(runs), given.seeds):
            runs.append(run(folder, plan, seed))
            with kept.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
        parts[part] = rows(runs[: given.seeds], plan)
        print(f"\n{table(parts[part])}\n")
    if not given.dry:
        chosen = "" if given.parts == list(PARTS) else f" --parts {' '.join(given.parts)}"
        write_record(
            "informed",
            {"plan": asdict(plan), **parts},
            command=f"python -m benchmarks informed --seeds {given.seeds}{chosen}",
            seconds=time.process_time() - started,
            device=device_name("cpu", 1) + ", processor seconds",
        )
        text = "\n\n".join(table(part) for part in parts.values())
        (RESULTS / "informed.md").write_text(f"{text}\n", encoding="utf-8")
    return 0


MODELS: dict[str, Callable[[Plan], LanguageModel]] = {
    "reader": reader,
    "turner": turner,
    "beginner": beginner,
}
PARTS: dict[str, tuple[tuple[str, ...], Callable[[Path, Plan, int], dict[str, dict[str, float]]]]] = {
    "itself": (("reader",), of_itself),
    "two": (("teacher", "turner", "beginner"), of_two),
}
"""The models that each part needs, and what it runs for a seed."""


def rows(runs: Sequence[dict[str, dict[str, float]]], plan: Plan) -> list[dict[str, Any]]:
    """Each way's accuracies, seed by seed, their mean, and the 95 % interval of the held-out prompts of all seeds."""
    found = []
    for name in dict.fromkeys(chain(*runs)):
        tasks: dict[str, Any] = {}
        for task in next(run[name] for run in runs if name in run):
            shares = [run[name][task] for run in runs if name in run]
            # Seeds share their held-out prompts: the interval is that of one seed's number of prompts.
            low, high = wilson(round(mean(shares) * plan.heldout), plan.heldout)
            tasks[task] = {"seeds": shares, "mean": mean(shares), "low": low, "high": high}
        found.append({"name": name, "accuracy": tasks})
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    tasks = list(found[0]["accuracy"])
    lines = [
        f"| way | {' | '.join(f'{task}, right (95 %) | seeds' for task in tasks)} |",
        "|---|" + "---|---|" * len(tasks),
    ]
    for row in found:
        cells = []
        for task in tasks:
            a = row["accuracy"][task]
            cells.append(f"{a['mean']:.1%} ({a['low']:.1%} – {a['high']:.1%})")
            cells.append(", ".join(f"{share:.1%}" for share in a["seeds"]))
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)
