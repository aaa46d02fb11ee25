"""What each way costs for the same accuracy: distillation, imitation, one after the other, a reward, and mixes.

Two tasks of reasoning-gym (`benchmarks.claims.gym`); the teacher's tokens are characters, the student's pieces of
words. In a worked sum a wrong value spoils those after it, so that the student's own errors matter.
Every way begins with the same weak student. Rates fall over a run, so a point of a curve is what this run had cost, and
a run planned to be that short might have got there sooner. Texts that a teacher writes cost its processor time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.claims.cells import Given
from benchmarks.claims.curves import COSTS, Curve, accuracy, best, ends_by_rate, written
from benchmarks.claims.figures import canvas, cost_of, markdown, over_seeds, save, told
from benchmarks.claims.gym import TASKS, asked, learned, tokenizer_of
from gold.models.language_model import LanguageModel
from gold.models.load import load_model, save_model
from gold.rollout.types import Sampling
from gold.train.recipe import Recipe, Term

TUNING_SEED = 9
COMPLETIONS = 48
LEVELS = 0.6, 0.8
"""Shares of the teacher's accuracy whose cost is told."""
TEXTS = 2
"""Texts that the teacher samples for each prompt, for the ways that learn from them."""

_EACH = Recipe(
    num_generations=1,
    prompts_per_step=COMPLETIONS,
    micro_batch_size=COMPLETIONS,
    generation_batch_size=64,
)
_TEXTS = _EACH.replace(objectives=(Term("sft"),), on_policy=0.0)
_GROUPS = _EACH.replace(prompts_per_step=COMPLETIONS // 8, num_generations=8)


@dataclass(frozen=True)
class Way:
    """One way: its recipe, the rates that are tried on each task (none: those found for ``like``), and its steps for
    one of distillation.

    ``first``: the share of its steps that imitates the teacher's texts before the recipe.
    """

    title: str
    recipe: Recipe
    rates: tuple[float, ...] = ()
    length: float = 1.0
    first: float = 0.0
    like: str = "opd"

    @property
    def has_texts(self) -> bool:
        """Whether the teacher writes."""
        return self.recipe.on_policy < 1.0 or self.first > 0

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher grades."""
        return any(term.name not in ("sft", "reward") for term in self.recipe.objectives)


WAYS = {
    "opd": Way("on-policy distillation (reverse KL on bytes)", _EACH, (1e-3, 2e-3, 4e-3, 8e-3)),
    "sft": Way("SFT on the teacher's texts", _TEXTS, (1e-3, 2e-3, 4e-3, 8e-3), 2.0),
    "sft_opd": Way("SFT, then on-policy distillation", _EACH, first=0.25),
    "gkd_forward": Way(
        "GKD, λ = 0.5, forward KL", _EACH.replace(objectives=(Term("forward_kl"),), on_policy=0.5)
    ),
    "opd_reward": Way(
        "on-policy distillation + 0.1 reward (groups of 8)",
        _GROUPS.replace(objectives=(Term("reverse_kl"), Term("reward", weight=0.1))),
        (2e-4, 5e-4),
        0.5,
    ),
    "reward": Way(
        "reward only (groups of 8)", _GROUPS.replace(objectives=(Term("reward"),)), (1e-4, 3e-4), 0.5
    ),
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything is spent; ``steps`` are those of distillation, ``answers`` those of each task."""

    tasks: tuple[str, ...] = ("worked_sum", "spell_backward")
    ways: tuple[str, ...] = tuple(WAYS)
    prompts: int = 2000
    steps: int = 400
    every: int = 25
    heldout: int = 256
    tuning_share: float = 0.625
    answers: tuple[int, ...] = (5000, 2400)
    teacher_steps: int = 1500
    start_steps: int = 400
    teacher_accuracy: float = 0.98
    start_accuracy: float = 0.25


SMALL = Sizes(("spell_backward",), ("opd", "sft", "sft_opd", "reward"), 40, 4, 2, 16, 0.5, (100,), 4, 4)
MERGES = 30
"""Merges of the student's tokenizer, at most."""


@dataclass(frozen=True)
class Models:
    """The teacher and the start of a task."""

    task: str
    answers: int
    heldout: int
    teacher_steps: int
    start_steps: int
    teacher_accuracy: float
    start_accuracy: float


@dataclass(frozen=True)
class Job:
    """One run: a task, a way, its learning rate and that of imitation before it, a seed."""

    task: str
    way: str
    lr: float
    first_lr: float
    seed: int
    prompts: int
    steps: int
    every: int
    heldout: int


def make(job: Models, made: Path) -> dict[str, Any]:
    """Makes a task's teacher, and the start from half of its answers; returns their accuracies and sizes."""
    task = TASKS[job.task]
    answers = task.prompts("train", job.answers, 0)
    heldout = asked(task.prompts("heldout", job.heldout, 0))
    texts = [f"{p.text}{p.completion}" for p in answers]
    half = job.answers // 2
    found: dict[str, Any] = {}
    for name, merges, layers, taught, steps, enough in (
        ("teacher", 0, 3, answers, job.teacher_steps, job.teacher_accuracy),
        ("start", MERGES, 2, answers[half:], job.start_steps, job.start_accuracy),
    ):

        def watch(model: LanguageModel, enough: float = enough) -> bool:
            return accuracy(model, heldout, task, task.max_new_tokens) >= enough

        tokens = tokenizer_of(texts, merges)
        every = 100 if name == "teacher" else 20
        model = learned(
            tokens,
            name,
            layers,
            taught,
            steps=steps,
            seed=0 if name == "teacher" else 1,
            every=every,
            enough=watch,
        )
        save_model(model, made / f"{job.task}-{name}")
        found[name] = accuracy(model, heldout, task, task.max_new_tokens)
        found[f"{name}_tokens"] = model.vocabulary.size
        found[f"{name}_parameters"] = sum(p.numel() for p in model.lm.parameters())
    return found


def work(job: Job, made: Path) -> dict[str, Any]:
    """The curve of one run; a seed has its own prompts."""
    task, way = TASKS[job.task], WAYS[job.way]
    student, teacher = load_model(made / f"{job.task}-start"), load_model(made / f"{job.task}-teacher")
    prompts = asked(task.prompts("train", job.prompts, 100 + job.seed))
    heldout = asked(task.prompts("heldout", job.heldout, 0))
    recipe = way.recipe.replace(max_new_tokens=task.max_new_tokens, seed=job.seed, lr=job.lr)
    first = round(way.first * job.steps)
    taught, text_s = prompts, 0.0
    if way.has_texts:
        steps = first or job.steps * (1.0 - recipe.on_policy)
        most = round(steps * COMPLETIONS)
        taught, text_s = written(
            teacher, prompts, Sampling(task.max_new_tokens), job.seed, each=TEXTS, most=most
        )
    curve = Curve(student, heldout, task, task.max_new_tokens, job.every, text_s)
    if first:
        imitated = _TEXTS.replace(
            max_new_tokens=task.max_new_tokens, seed=job.seed, lr=job.first_lr, steps=first
        )
        curve.run(None, taught, imitated)
        taught = prompts
    recipe = recipe.replace(steps=job.steps - first)
    curve.run(teacher if way.has_teacher else None, taught, recipe, task)
    return {"curve": curve.points}


def measure(given: Given) -> dict[str, Any]:
    """Rates on a seed apart, then every way on every task."""
    sizes = SMALL if given.small else Sizes()
    models = [
        Models(
            task,
            answers,
            sizes.heldout,
            sizes.teacher_steps,
            sizes.start_steps,
            sizes.teacher_accuracy,
            sizes.start_accuracy,
        )
        for task, answers in zip(sizes.tasks, sizes.answers, strict=True)
    ]
    made = dict(zip(sizes.tasks, given.cells.all(make, models), strict=True))
    tried = {task: _tried(given, sizes, task) for task in sizes.tasks}
    rates = {task: {way: best(ends) for way, ends in ways.items()} for task, ways in tried.items()}
    jobs = [
        _job(sizes, task, way, rates[task], seed)
        for seed in range(given.seeds)
        for task in sizes.tasks
        for way in sizes.ways
    ]
    found = list(zip(jobs, given.cells.all(work, jobs), strict=True))
    rows = [
        {
            "task": task,
            "way": way,
            "curves": [_columns(r["curve"]) for j, r in found if (j.task, j.way) == (task, way)],
        }
        for task in sizes.tasks
        for way in sizes.ways
    ]
    return {"sizes": asdict(sizes), "made": made, "rates": rates, "tried": tried, "rows": rows}


def _job(sizes: Sizes, task: str, way: str, rates: Mapping[str, float], seed: int, share: float = 1.0) -> Job:
    length = WAYS[way].length
    return Job(
        task,
        way,
        rates[way] if WAYS[way].rates else rates[WAYS[way].like],
        rates["sft"] if WAYS[way].first else 0.0,
        seed,
        sizes.prompts,
        round(length * sizes.steps * share),
        round(length * sizes.every),
        sizes.heldout,
    )


def _tried(given: Given, sizes: Sizes, task: str) -> dict[str, dict[str, float]]:
    """For each way and each of its rates where a shorter run on a task ends, on a seed apart."""
    jobs = [
        _job(sizes, task, way, {way: lr}, TUNING_SEED, sizes.tuning_share)
        for way in sizes.ways
        for lr in WAYS[way].rates
    ]
    return ends_by_rate(jobs, given.cells.all(work, jobs))


def _columns(curve: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """A curve as lists, which take less room."""
    return {name: [p[name] for p in curve] for name in curve[0]}


def _points(columns: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def prices(data: Mapping[str, Any], task: str, level: float) -> dict[str, dict[str, list[float | None]]]:
    """For each way and cost, seed by seed, what a share of the teacher's accuracy took; None if it was not reached."""
    wanted = level * data["made"][task]["teacher"]
    return {
        row["way"]: {c: [cost_of(_points(curve), c, wanted) for curve in row["curves"]] for c in COSTS}
        for row in data["rows"]
        if row["task"] == task
    }


def _price(values: Sequence[float | None], base: Sequence[float | None]) -> str:
    """A mean over seeds and its ratio to distillation's, each where all seeds have one."""
    reached = [v for v in values if v is not None]
    if len(reached) < len(values):
        return f"{len(reached)} of {len(values)} seeds" if reached else "–"
    based = [v for v in base if v is not None]
    ratio = f" (×{mean(reached) / mean(based):.2f})" if len(based) == len(base) and mean(based) > 0 else ""
    return f"{mean(reached):,.0f}{ratio}"


def table(data: Mapping[str, Any]) -> str:
    """A table for each task and level: what each way had cost when it reached it, and the ratio to distillation."""
    parts = []
    for task in data["sizes"]["tasks"]:
        made = data["made"][task]
        rows = {row["way"]: row for row in data["rows"] if row["task"] == task}
        ends = {w: told(over_seeds([c["accuracy"][-1] for c in row["curves"]])) for w, row in rows.items()}
        for level in LEVELS:
            found = prices(data, task, level)
            head = ("way", *COSTS.values(), "at its end", "after steps")
            lines = [
                (
                    WAYS[way].title,
                    *(_price(costs[c], found["opd"][c]) for c in COSTS),
                    ends[way],
                    f"{rows[way]['curves'][0]['step'][-1]:,}",
                )
                for way, costs in found.items()
            ]
            title = (
                f"{task}: to {level:.0%} of the teacher's accuracy, which is {made['teacher']:.1%}; "
                f"the start has {made['start']:.1%}"
            )
            parts.append(f"{title}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Accuracy, the mean over seeds, over each cost; a row for each task."""
    tasks = data["sizes"]["tasks"]
    figure, axes = canvas(len(COSTS), len(tasks), (3.9, 3.2))
    for line, task in zip(axes, tasks, strict=True):
        rows = [row for row in data["rows"] if row["task"] == task]
        for ax, (cost, title) in zip(line, COSTS.items(), strict=True):
            for row in rows:
                means = [
                    [mean(values) for values in zip(*(c[name] for c in row["curves"]), strict=True)]
                    for name in (cost, "accuracy")
                ]
                ax.plot(means[0], [100 * a for a in means[1]], lw=1.3, label=WAYS[row["way"]].title)
            ax.axhline(100 * data["made"][task]["teacher"], color="0.3", ls="--", lw=1)
            ax.set(xlabel=title, ylim=(0, 101))
            ax.grid(alpha=0.3)
        line[0].set_ylabel(f"{task}: right, %")
    axes[0][0].legend(fontsize=6)
    save(figure, path)
