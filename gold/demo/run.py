"""The demonstration: a tiny student learns a task from a tiny teacher with another tokenizer.

Everything is created here and runs offline: the tokenizers, the teacher, the weak initial student; then the same
prompts are used in four ways, on-policy distillation and three usual alternatives, in two parallel processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
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
from gold.models.language_model import LanguageModel
from gold.models.load import load_model, save_model
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.train.loop import Saving, distill
from gold.train.progress import Quiet
from gold.train.recipe import Recipe, Term
from gold.train.trackers import RunInfo

TASK = RunningSums()
SAMPLING = Sampling(max_new_tokens=20)
MARK = "demo.json"
BATCH = 128
"""Completions per step, in every way."""
ANSWERS_PER_STEP = 48


@dataclass(frozen=True)
class DemoPlan:
    """The sizes and numbers of steps of the demonstration."""

    seed: int = 0
    prompts: int = 2000
    heldout: int = 1024
    answers: int = 20000
    teacher_steps: int = 1600
    teacher_accuracy: float = 0.98
    start_steps: int = 900
    start_accuracy: float = 0.25
    steps: int = 500
    evaluate_every: int = 100
    watched: int = 128


@dataclass(frozen=True)
class Entry:
    """A row of the demonstration's table.

    ``accuracy`` is the share of held-out prompts answered right, greedily, with its 95 % interval; ``sequences`` counts
    the completions that the model was trained on, over ``prompts`` different prompts; ``cpu_s`` is the processor time
    of the training, without evaluations where they change nothing.
    """

    name: str
    accuracy: float
    low: float
    high: float
    learned_from: str
    prompts: int
    sequences: int
    cpu_s: float


@dataclass(frozen=True)
class Spent:
    """The result of one way: its row, and accuracy over steps and processor seconds."""

    entry: Entry
    curve: list[dict[str, float]]


@dataclass(frozen=True)
class Way:
    """One way of using the prompts: its title in the table, the texts it trains on, and its recipe."""

    title: str
    learned_from: str
    recipe: Recipe


_EACH = Recipe(
    num_generations=1,
    prompts_per_step=BATCH,
    micro_batch_size=BATCH,
    generation_batch_size=BATCH,
    max_new_tokens=SAMPLING.max_new_tokens,
)
_IMITATION = _EACH.replace(objectives=(Term("sft"),), on_policy=0.0, lr=1e-3)
_REWARD = _EACH.replace(objectives=(Term("reward"),), prompts_per_step=BATCH // 8, num_generations=8, lr=3e-4)
WAYS = {
    "distilled": Way(
        "on-policy distillation (reverse KL on bytes)",
        "its own texts, graded by the teacher",
        _EACH.replace(lr=2e-3),
    ),
    "kd_sampled": Way("sequence-level KD, sampled", "the teacher's texts, four samples a prompt", _IMITATION),
    "kd_greedy": Way("sequence-level KD, greedy", "the teacher's likeliest texts", _IMITATION),
    "reward_only": Way("reward only (groups of 8)", "its own texts, right or wrong", _REWARD),
}
"""The compared ways, each at the best of a few learning rates that were tried for it on another seed."""

ASKING = "distilled", "kd_sampled", "kd_greedy"
"""The ways that need a teacher."""

SHARE, AHEAD = 0.9, 0.03
"""The required result: distillation reaches this share of its teacher's accuracy and is this far ahead of every other
way, and its interval lies above theirs.
"""


def main(out: Path) -> None:
    """Runs the demonstration in the folder ``out``, prints its table, and whether it shows the required result.

    Raises:
        ConfigError: ``out`` contains something else.
        TrainingError: the distilled student is too far below its teacher or not clearly ahead of the other ways.
    """
    begun = time.perf_counter()
    entries = run_demo(out, DemoPlan(), say)
    terminal.show_lines(f"\n{table(entries)}\n")
    terminal.show(f"learning curves  {out / 'learning.png'}", f"run folder       {out / 'distilled'}")
    terminal.show(f"{time.perf_counter() - begun:.0f} s in all")
    check(entries)


def check(entries: Mapping[str, Entry]) -> None:
    """Checks that the distilled student meets ``SHARE`` and ``AHEAD``, compared with its teacher and every other way.

    Raises:
        TrainingError: it does not.
    """
    teacher, distilled = entries["teacher"], entries["distilled"]
    if distilled.accuracy < SHARE * teacher.accuracy:
        raise TrainingError(
            f"the distilled student answers {distilled.accuracy:.1%} right, less than {SHARE:.0%} of its teacher's "
            f"{teacher.accuracy:.1%}"
        )
    for other in (e for name, e in entries.items() if name not in ("teacher", "distilled")):
        if distilled.accuracy < other.accuracy + AHEAD or distilled.low <= other.high:
            raise TrainingError(
                f"the distilled student answers {distilled.accuracy:.1%} right ({distilled.low:.1%} to "
                f"{distilled.high:.1%}), which is not clearly, by {100 * AHEAD:.0f} points and beyond both intervals, "
                f"more than {other.name}: {other.accuracy:.1%} ({other.low:.1%} to {other.high:.1%})"
            )


def say(text: str) -> None:
    """Prints a line at once."""
    terminal.show(text)


def run_demo(out: Path, plan: DemoPlan, say: Callable[[str], None]) -> dict[str, Entry]:
    """Runs the whole demonstration; returns the rows of its table by name.

    Models, runs, curves and table are saved in ``out``.

    Raises:
        ConfigError: ``out`` contains something other than an earlier demonstration.
    """
    _make_room(out)
    answered = TASK.prompts("train", 1, plan.seed)[0]
    say(f"task          {answered.text}{answered.completion}")
    say(f"each way      {plan.prompts:,} prompts, {plan.steps} steps of {BATCH} completions")
    # One thread per process: models this small gain nothing from more, and waiting threads spin.
    workers = min(2, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=one_thread) as pool:
        teacher, start = (pool.submit(make, out, plan) for make in (make_teacher, make_start))
        spending: dict[str, Future[Spent]] = {}
        # Ways without a teacher need not wait for it.
        for made, asking in ((start, False), (teacher, True)):
            made.result()
            spending |= {
                name: pool.submit(spend, name, out, plan) for name in WAYS if (name in ASKING) is asking
            }
        entries = {"teacher": teacher.result(), "start": start.result()}
        spent = {name: spending[name].result() for name in WAYS}
    entries |= {name: s.entry for name, s in spent.items()}
    curves = {name: s.curve for name, s in spent.items()}
    _draw(out / "learning.png", curves, entries)
    (out / "table.md").write_text(table(entries) + "\n", encoding="utf-8")
    rows = {name: asdict(entry) for name, entry in entries.items()}
    (out / MARK).write_text(json.dumps({"plan": asdict(plan), "rows": rows, "curves": curves}, indent=1))
    return entries


def make_teacher(out: Path, plan: DemoPlan) -> Entry:
    """The teacher, whose tokens are single characters, trained on answers until it knows the task."""
    model = tiny_model(character_tokenizer(), "teacher", layers=3, seed=plan.seed)
    return _learned(model, plan, out, "teacher", plan.teacher_steps, plan.teacher_accuracy, skip=0)


def make_start(out: Path, plan: DemoPlan) -> Entry:
    """The weak initial student, whose tokens are whole numbers: training on other answers, stopped early."""
    words = word_tokenizer([f"{p.text}{p.completion}" for p in TASK.prompts("train", 4000, plan.seed)])
    model = tiny_model(words, "student", layers=2, seed=plan.seed + 1)
    title = "student's cold start"
    return _learned(model, plan, out, title, plan.start_steps, plan.start_accuracy, skip=plan.answers)


def spend(name: str, out: Path, plan: DemoPlan) -> Spent:
    """Runs one way of using the prompts, from the initial student."""
    way = WAYS[name]
    student = load_model(out / "student-start")
    teacher = load_model(out / "teacher") if name in ASKING else None
    recipe = way.recipe.replace(steps=plan.steps, seed=plan.seed)
    clock = CpuSeconds()
    # The answers are removed: a way that needs texts uses the teacher's.
    prompts = [replace(p, completion=None) for p in TASK.prompts("train", plan.prompts, plan.seed)]
    if teacher and recipe.on_policy < 1.0:
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
            max_new_tokens=SAMPLING.max_new_tokens, generation_batch_size=128, micro_batch_size=128
        ),
        saving=Saving(
            out / name, evaluate_every=plan.evaluate_every, checkpoint_every=plan.steps, keep_last=1
        ),
        progress=clock,
    )
    sequences = plan.steps * recipe.prompts_per_step * recipe.num_generations
    entry = _entry(way.title, student, heldout, way.learned_from, plan.prompts, sequences, clock.spent[-1])
    curve = [
        {"step": e["step"], "cpu_s": clock.spent[e["step"]], "accuracy": e["accuracy"]}
        for e in run.evaluations
    ]
    return Spent(entry, curve)


class CpuSeconds(Quiet):
    """Processor seconds of this process after each step, without evaluations.

    Time before the run counts towards the step of the first evaluation.
    """

    def __init__(self) -> None:
        self.spent, self._since = [0.0], time.process_time()

    def start(self, run: RunInfo) -> None:
        """Counts the time before the run."""
        self.spent[0] = time.process_time() - self._since

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Counts a step, or excludes an evaluation."""
        if kind == "train":
            self.spent.append(self.spent[-1] + time.process_time() - self._since)
        self._since = time.process_time()


def table(entries: dict[str, Entry]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| model | right | 95 % interval | learned from | prompts | completions | CPU s |",
        "|---" * 7 + "|",
    ]
    lines += [
        f"| {e.name} | {e.accuracy:.1%} | {e.low:.1%} – {e.high:.1%} | {e.learned_from} | {e.prompts:,} | "
        f"{e.sequences:,} | {e.cpu_s:.0f} |"
        for e in entries.values()
    ]
    return "\n".join(lines)


def one_thread() -> None:
    """Limits a worker process to one thread."""
    torch.set_num_threads(1)


def _learned(
    model: LanguageModel,
    plan: DemoPlan,
    out: Path,
    title: str,
    steps: int,
    enough: float,
    skip: int,
) -> Entry:
    """Trains a model on ``plan.answers`` answers, without the first ``skip``, until it is good enough; saves it."""
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

    started = time.process_time()
    taken = learn_answers(
        model, answers, steps=steps, batch=ANSWERS_PER_STEP, seed=plan.seed, every=50, watch=watch
    )
    cpu_s = time.process_time() - started
    save_model(model, out / ("teacher" if model.name == "teacher" else "student-start"))
    return _entry(title, model, heldout, "right answers", plan.answers, taken * ANSWERS_PER_STEP, cpu_s)


def _taught(teacher: LanguageModel, prompts: Sequence[Prompt], seed: int, greedy: bool) -> list[Prompt]:
    """The prompts with the teacher's own completions: four samples of each, or the greedy one."""
    asked = [p for p in prompts for _ in range(1 if greedy else 4)]
    sampling = replace(SAMPLING, temperature=0.0) if greedy else SAMPLING
    seeds = [(seed, 10**6, n) for n in range(len(asked))]
    rollouts = sample(HuggingFaceEngine(teacher, 400), teacher, asked, sampling, seeds=seeds)
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
    rollouts = sample(HuggingFaceEngine(model, 256), model, prompts, greedy, seeds=seeds)
    return sum(TASK.score(r.prompt, r.text) for r in rollouts if r.stopped) / len(prompts)


def _entry(
    title: str,
    model: LanguageModel,
    heldout: Sequence[Prompt],
    learned_from: str,
    prompts: int,
    sequences: int,
    cpu_s: float,
) -> Entry:
    accuracy = _accuracy(model, heldout)
    low, high = wilson(round(accuracy * len(heldout)), len(heldout))
    say(f"{title:<45} {accuracy:6.1%} right, {cpu_s:3.0f} CPU s")
    return Entry(title, accuracy, low, high, learned_from, prompts, sequences, cpu_s)


def _make_room(out: Path) -> None:
    """Creates an empty folder ``out``: an earlier demonstration is removed, any other content is an error."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARK).is_file())):
        raise ConfigError(f"{out} exists and is no earlier demonstration; give another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).write_text(json.dumps({"plan": None}))


def _draw(path: Path, curves: dict[str, list[dict[str, float]]], entries: dict[str, Entry]) -> None:
    """Plots the accuracy over training steps of every way, with the teacher as a line."""
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
        axes.plot(steps, right, marker=marker, ms=4, label=WAYS[name].title)
    axes.axhline(100 * entries["teacher"].accuracy, color="0.4", ls="--", lw=1, label="teacher")
    axes.set(
        xlabel=f"optimizer steps of {BATCH} completions",
        ylabel="held-out prompts answered right, %",
        ylim=(0, 101),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, framealpha=0.9)
    figure.savefig(path, dpi=150)
