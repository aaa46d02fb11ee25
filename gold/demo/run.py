"""The demonstration: a tiny student learns a task from a tiny teacher whose tokens are other than its own.

Everything is made here and runs offline: the tokenizers, the teacher, the student's poor start; then the same prompts
are spent four ways, on-policy distillation and three usual alternatives, two at a time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gold import terminal
from gold.data import Prompt
from gold.demo.models import character_tokenizer, learn_answers, tiny_model, word_tokenizer
from gold.demo.running_sums import RunningSums
from gold.errors import ConfigError, TrainingError
from gold.evaluate import EvaluationPlan, wilson
from gold.models import LanguageModel, load_model, save_model
from gold.recipe import Recipe, Term
from gold.rollout import Sampling, sample
from gold.train import Run, Saving, distill

TASK = RunningSums()
SAMPLING = Sampling(max_new_tokens=20)
MARK = "demo.json"


@dataclass(frozen=True)
class DemoPlan:
    """How much of everything the demonstration spends."""

    seed: int = 0
    prompts: int = 400
    heldout: int = 512
    answers: int = 20000
    teacher_steps: int = 1600
    teacher_accuracy: float = 0.98
    start_steps: int = 900
    start_accuracy: float = 0.12
    steps: int = 400
    evaluate_every: int = 50
    watched: int = 128


@dataclass(frozen=True)
class Entry:
    """A row of the demonstration's table. ``accuracy`` is the share of held-out prompts answered right, greedily."""

    name: str
    accuracy: float
    low: float
    high: float
    prompts: int
    seconds: float


@dataclass(frozen=True)
class Spent:
    """What came of one way of spending the prompts: its row, and accuracy over steps and seconds."""

    entry: Entry
    curve: list[dict[str, float]]


WAYS: dict[str, tuple[str, Recipe]] = {
    "distilled": (
        "on-policy distillation (reverse KL on bytes)",
        Recipe(objectives=(Term("reverse_kl"),), prompts_per_step=48, per_prompt=1, lr=1e-3),
    ),
    "kd_sampled": (
        "sequence-level KD, sampled teacher text",
        Recipe(objectives=(Term("sft"),), on_policy=0.0, prompts_per_step=48, per_prompt=1, lr=5e-4),
    ),
    "kd_greedy": (
        "sequence-level KD, greedy teacher text",
        Recipe(objectives=(Term("sft"),), on_policy=0.0, prompts_per_step=48, per_prompt=1, lr=5e-4),
    ),
    "reward_only": (
        "reward only (0/1, groups of 8)",
        Recipe(objectives=(Term("reward"),), prompts_per_step=6, per_prompt=8, lr=3e-4),
    ),
}
"""What the prompts are spent on: the name in the table, and what is particular about the recipe, the best learning
rate of a few that were tried for it among the rest."""


def main(out: Path) -> None:
    """Runs the demonstration into the folder ``out``, prints its table, and says whether the student learned.

    Raises:
        ConfigError: ``out`` holds something else.
        TrainingError: the distilled student did not clearly beat its start.
    """
    begun = time.perf_counter()
    entries = run_demo(out, DemoPlan(), say)
    terminal.show_lines(f"\n{table(entries)}\n")
    terminal.show(f"learning curves  {out / 'learning.png'}", f"run folder       {out / 'distilled'}")
    terminal.show(f"{time.perf_counter() - begun:.0f} s in all")
    start, distilled = entries["start"], entries["distilled"]
    if distilled.low <= start.high:
        raise TrainingError(
            f"the distilled student answers {distilled.accuracy:.1%} right, which is not clearly more than the "
            f"{start.accuracy:.1%} it began with"
        )


def say(text: str) -> None:
    """A line for whoever watches, at once."""
    terminal.show(text)


def run_demo(out: Path, plan: DemoPlan, say: Callable[[str], None]) -> dict[str, Entry]:
    """The whole demonstration; returns the rows of its table by name. Models, runs, curves and table stay in ``out``.

    Raises:
        ConfigError: ``out`` holds something else than an earlier demonstration.
    """
    _make_room(out)
    answered = TASK.prompts("train", 1, plan.seed)[0]
    say(f"task          {answered.text}{answered.completion}")
    # One thread to a process: models this small are not worth sharing, and threads that wait for each other spin.
    workers = min(2, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_alone) as pool:
        made = [pool.submit(function, out, plan) for function in (make_teacher, make_start)]
        entries = {"teacher": made[0].result(), "start": made[1].result()}
        say(f"\nthe same {plan.prompts} prompts, {plan.steps} steps each way:")
        spending = {name: pool.submit(spend, name, out, plan) for name in WAYS}
        spent = {name: job.result() for name, job in spending.items()}
    entries |= {name: s.entry for name, s in spent.items()}
    curves = {name: s.curve for name, s in spent.items()}
    _draw(out / "learning.png", curves, entries)
    (out / "table.md").write_text(table(entries) + "\n", encoding="utf-8")
    rows = {name: asdict(entry) for name, entry in entries.items()}
    (out / MARK).write_text(json.dumps({"plan": asdict(plan), "rows": rows, "curves": curves}, indent=1))
    return entries


def make_teacher(out: Path, plan: DemoPlan) -> Entry:
    """The teacher, which reads and writes single characters, trained on answers until it knows the task."""
    started = time.perf_counter()
    model = tiny_model(character_tokenizer(), "teacher", layers=3, seed=plan.seed)
    return _learned(model, plan, started, out, "teacher", plan.teacher_steps, plan.teacher_accuracy, skip=0)


def make_start(out: Path, plan: DemoPlan) -> Entry:
    """The student, whose tokens are whole numbers, at its poor start: training on other answers stopped early."""
    started = time.perf_counter()
    words = word_tokenizer([f"{p.text}{p.completion}" for p in TASK.prompts("train", 4000, plan.seed)])
    model = tiny_model(words, "student", layers=2, seed=plan.seed + 1)
    title = "student's cold start"
    return _learned(
        model, plan, started, out, title, plan.start_steps, plan.start_accuracy, skip=plan.answers
    )


def spend(name: str, out: Path, plan: DemoPlan) -> Spent:
    """One way of spending the prompts, from the student's start."""
    title, recipe = WAYS[name]
    student, teacher = load_model(out / "student-start"), load_model(out / "teacher")
    recipe = replace(
        recipe,
        sampling=SAMPLING,
        rollout_batch=64,
        sequences_per_forward=48,
        steps=plan.steps,
        seed=plan.seed,
    )
    started = time.perf_counter()
    # The answers are not given: a way that wants texts takes the teacher's.
    prompts = [replace(p, completion=None) for p in TASK.prompts("train", plan.prompts, plan.seed)]
    if recipe.on_policy < 1.0:
        prompts = _taught(teacher, prompts, plan.seed, greedy=name == "kd_greedy")
    heldout = _heldout(plan)
    run = distill(
        student,
        teacher if name == "distilled" else None,
        prompts,
        recipe,
        heldout=heldout[: plan.watched],
        verifier=TASK,
        evaluation=EvaluationPlan(
            max_new_tokens=SAMPLING.max_new_tokens, rollout_batch=128, sequences_per_forward=128
        ),
        saving=Saving(
            out / name, evaluate_every=plan.evaluate_every, checkpoint_every=plan.steps, keep_last=1
        ),
    )
    seconds = time.perf_counter() - started - sum(e["evaluate_s"] for e in run.evaluations)
    entry = _entry(title, student, heldout, plan.prompts, seconds)
    say(f"{title:<45} {entry.accuracy:6.1%} right, {seconds:3.0f} s")
    return Spent(entry, _curve(run))


def table(entries: dict[str, Entry]) -> str:
    """The rows as a Markdown table."""
    lines = ["| model | right | 95 % interval | prompts | seconds |", "|---|---|---|---|---|"]
    lines += [
        f"| {e.name} | {e.accuracy:.1%} | {e.low:.1%} – {e.high:.1%} | {e.prompts:,} | {e.seconds:.0f} |"
        for e in entries.values()
    ]
    return "\n".join(lines)


def _alone() -> None:
    torch.set_num_threads(1)


def _learned(
    model: LanguageModel,
    plan: DemoPlan,
    started: float,
    out: Path,
    title: str,
    steps: int,
    enough: float,
    skip: int,
) -> Entry:
    """Trains a model on ``plan.answers`` answers, the first ``skip`` left out, until it is good enough; saves it."""
    heldout = _heldout(plan)
    answers = TASK.prompts("train", skip + plan.answers, plan.seed)[skip:]
    parameters = sum(p.numel() for p in model.lm.parameters())
    shown = TASK.prompts("train", 1, plan.seed)[0].completion or ""
    tokens = "|".join(
        model.vocabulary.token_bytes(int(i)).decode() for i in model.vocabulary.encode(shown).ids
    )
    say(f"{model.name:<13} {model.vocabulary.size} tokens, {parameters:,} parameters; reads {tokens}")

    def watch(step: int) -> bool:
        right = _accuracy(model, heldout[: plan.watched])
        if step % 200 == 0:
            say(f"{model.name:<13} step {step:>4}: {right:.0%} right")
        return right >= enough

    learn_answers(model, answers, steps=steps, seed=plan.seed, every=50, watch=watch)
    seconds = time.perf_counter() - started
    save_model(model, out / ("teacher" if model.name == "teacher" else "student-start"))
    entry = _entry(title, model, heldout, plan.answers, seconds)
    say(f"{title:<45} {entry.accuracy:6.1%} right, {seconds:3.0f} s")
    return entry


def _taught(teacher: LanguageModel, prompts: Sequence[Prompt], seed: int, greedy: bool) -> list[Prompt]:
    """The prompts with the teacher's own completions: four samples of each, or the likeliest one."""
    asked = [p for p in prompts for _ in range(1 if greedy else 4)]
    sampling = replace(SAMPLING, temperature=0.0) if greedy else SAMPLING
    seeds = [(seed, 10**6, n) for n in range(len(asked))]
    rollouts = sample(teacher, asked, sampling, seeds=seeds, batch=400)
    taught = [
        replace(r.prompt, key=f"{r.prompt.key} {n}", completion=r.text)
        for n, r in enumerate(rollouts)
        if r.stopped and r.text
    ]
    if len(taught) < len(rollouts):
        say(
            f"{len(rollouts) - len(taught)} of {len(rollouts)} teacher texts are empty or have no end: left out"
        )
    return taught


def _heldout(plan: DemoPlan) -> list[Prompt]:
    return [replace(p, completion=None) for p in TASK.prompts("heldout", plan.heldout, plan.seed)]


def _accuracy(model: LanguageModel, prompts: Sequence[Prompt]) -> float:
    greedy = replace(SAMPLING, temperature=0.0)
    seeds = [(0, n) for n in range(len(prompts))]
    rollouts = sample(model, prompts, greedy, seeds=seeds, batch=256)
    return sum(TASK.score(r.prompt, r.text) for r in rollouts if r.stopped) / len(prompts)


def _entry(
    title: str, model: LanguageModel, heldout: Sequence[Prompt], prompts: int, seconds: float
) -> Entry:
    accuracy = _accuracy(model, heldout)
    low, high = wilson(round(accuracy * len(heldout)), len(heldout))
    return Entry(title, accuracy, low, high, prompts, seconds)


def _curve(run: Run) -> list[dict[str, float]]:
    seconds = {0: 0.0}
    for record in run.steps:
        seconds[record["step"]] = seconds[record["step"] - 1] + record["step_s"]
    return [
        {"step": e["step"], "seconds": seconds[e["step"]], "accuracy": e["accuracy"]} for e in run.evaluations
    ]


def _make_room(out: Path) -> None:
    """An empty folder ``out``; an earlier demonstration there is removed, anything else is not touched."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARK).is_file())):
        raise ConfigError(f"{out} exists and is no earlier demonstration; give another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).write_text(json.dumps({"plan": None}))


def _draw(path: Path, curves: dict[str, list[dict[str, float]]], entries: dict[str, Entry]) -> None:
    """Accuracy over training steps of every way, with the teacher as a line."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "the demonstration draws with matplotlib: pip install 'gold-distill[plots]'"
        ) from error
    figure: Any = Figure(figsize=(7.2, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, curve), marker in zip(curves.items(), "osD^", strict=True):
        steps, right = [p["step"] for p in curve], [100 * p["accuracy"] for p in curve]
        axes.plot(steps, right, marker=marker, ms=4, label=WAYS[name][0])
    axes.axhline(100 * entries["teacher"].accuracy, color="0.4", ls="--", lw=1, label="teacher")
    axes.set(
        xlabel="optimizer steps of 48 sequences", ylabel="held-out prompts answered right, %", ylim=(0, 101)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, framealpha=0.9)
    figure.savefig(path, dpi=150)
