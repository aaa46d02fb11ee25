"""Accuracy over the number of prompts: on-policy distillation, imitation of the teacher's texts, a reward alone.

The task, the teacher and the start are the demonstration's. The learning rate is constant after its warm-up, so that
the beginning of a run is a shorter run: one curve gives the accuracy after as many steps, and after as much processor
time, as distillation took.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.claims.cells import Given
from benchmarks.claims.curves import Curve, written
from benchmarks.claims.figures import at_cost, canvas, markdown, over_seeds, save, told
from gold.demo.run import SAMPLING, TASK, DemoPlan, make_start, make_teacher
from gold.models.load import load_model
from gold.train.recipe import Recipe, Term

TUNING_SEED = 9
COMPLETIONS = 48
"""Completions a step, in every way."""

_EACH = Recipe(
    num_generations=1,
    prompts_per_step=COMPLETIONS,
    micro_batch_size=COMPLETIONS,
    generation_batch_size=64,
    max_new_tokens=SAMPLING.max_new_tokens,
    schedule="constant",
)


@dataclass(frozen=True)
class Way:
    """One way of using the prompts; ``length``: its steps for one of distillation, to spend as much time or more."""

    title: str
    recipe: Recipe
    rates: tuple[float, ...]
    length: float = 1.0


WAYS = {
    "distilled": Way("on-policy distillation (reverse KL on bytes)", _EACH, (2e-4, 5e-4, 1e-3)),
    "imitated": Way(
        "sequence-level KD, four sampled texts a prompt",
        _EACH.replace(objectives=(Term("sft"),), on_policy=0.0),
        (2e-4, 5e-4, 1e-3),
        2.5,
    ),
    "rewarded": Way(
        "reward only (groups of 8)",
        _EACH.replace(objectives=(Term("reward"),), prompts_per_step=COMPLETIONS // 8, num_generations=8),
        (3e-5, 1e-4, 3e-4),
        1.8,
    ),
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything is spent; ``steps`` are those of distillation."""

    numbers: tuple[int, ...] = (100, 1000, 10000)
    steps: int = 200
    every: int = 50
    heldout: int = 512
    tuning_prompts: int = 1000
    tuning_steps: int = 100
    answers: int = 20000
    teacher_steps: int = 1600
    start_steps: int = 900


SMALL = Sizes((20, 40), 4, 2, 16, 20, 2, 200, 10, 10)


@dataclass(frozen=True)
class Models:
    """The teacher and the start that every run shares."""

    answers: int
    teacher_steps: int
    start_steps: int
    heldout: int


@dataclass(frozen=True)
class Job:
    """One run: a way, its prompts, a learning rate, a seed."""

    way: str
    prompts: int
    lr: float
    seed: int
    steps: int
    every: int
    heldout: int


def make(job: Models, made: Path) -> dict[str, float]:
    """Makes the teacher and the start; returns their accuracies."""
    plan = DemoPlan(
        answers=job.answers,
        teacher_steps=job.teacher_steps,
        start_steps=job.start_steps,
        heldout=job.heldout,
        watched=min(128, job.heldout),
    )
    return {"teacher": make_teacher(made, plan).accuracy, "start": make_start(made, plan).accuracy}


def work(job: Job, made: Path) -> dict[str, Any]:
    """The curve of one run; a seed has its own prompts."""
    way = WAYS[job.way]
    student, teacher = load_model(made / "student-start"), load_model(made / "teacher")
    prompts = [replace(p, completion=None) for p in TASK.prompts("train", job.prompts, 100 + job.seed)]
    text_s = 0.0
    if way.recipe.on_policy == 0.0:
        most = job.steps * COMPLETIONS
        prompts, text_s = written(teacher, prompts, SAMPLING, job.seed, each=4, most=most)
    heldout = [replace(p, completion=None) for p in TASK.prompts("heldout", job.heldout, 0)]
    curve = Curve(student, heldout, TASK, SAMPLING.max_new_tokens, job.every, text_s)
    recipe = way.recipe.replace(steps=job.steps, seed=job.seed, lr=job.lr)
    curve.run(teacher if job.way == "distilled" else None, prompts, recipe, TASK)
    return {"curve": curve.points}


def measure(given: Given) -> dict[str, Any]:
    """Rates on a seed apart, then every way with every number of prompts."""
    sizes = SMALL if given.small else Sizes()
    models = Models(sizes.answers, sizes.teacher_steps, sizes.start_steps, sizes.heldout)
    made = given.cells.all(make, [models])[0]
    rates = _rates(given, sizes)
    jobs = [
        Job(name, number, rates[name], seed, *_lengths(way, sizes), sizes.heldout)
        for seed in range(given.seeds)
        for name, way in WAYS.items()
        for number in sizes.numbers
    ]
    found = dict(zip(jobs, given.cells.all(work, jobs), strict=True))
    rows = [
        {
            "way": name,
            "prompts": number,
            "curves": [r["curve"] for job, r in found.items() if (job.way, job.prompts) == (name, number)],
        }
        for name in WAYS
        for number in sizes.numbers
    ]
    return {"sizes": asdict(sizes), "made": made, "rates": rates, "rows": [_small(row) for row in rows]}


def _lengths(way: Way, sizes: Sizes, share: float = 1.0) -> tuple[int, int]:
    """Steps of a run, and how many of them lie between two looks."""
    return round(way.length * sizes.steps * share), round(way.length * sizes.every)


def _rates(given: Given, sizes: Sizes) -> dict[str, float]:
    """The rate of each way that is best on average over the second half of a short run, on a seed apart."""
    jobs = [
        Job(
            name,
            sizes.tuning_prompts,
            lr,
            TUNING_SEED,
            round(way.length * sizes.tuning_steps),
            round(way.length * sizes.tuning_steps / 2),
            sizes.heldout,
        )
        for name, way in WAYS.items()
        for lr in way.rates
    ]
    ends = [mean(p["accuracy"] for p in r["curve"][1:]) for r in given.cells.all(work, jobs)]
    best = sorted(zip(ends, jobs, strict=True), key=lambda pair: pair[0])
    return {job.way: job.lr for _, job in best}


def _small(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what neither the table nor the picture needs."""
    kept = "step", "cpu_s", "accuracy"
    return {**row, "curves": [[{name: p[name] for name in kept} for p in c] for c in row["curves"]]}


def compared(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each way and number of prompts, accuracy after as many steps and as much time as distillation took."""
    rows = {(row["way"], row["prompts"]): row["curves"] for row in data["rows"]}
    steps = data["sizes"]["steps"]
    found = []
    for (way, number), curves in rows.items():
        spent = mean(curve[-1]["cpu_s"] for curve in rows["distilled", number])
        found.append(
            {
                "way": way,
                "prompts": number,
                "spent": spent,
                "enough": all(curve[-1]["cpu_s"] >= spent for curve in curves) or way == "distilled",
                "cpu_s": mean(at_cost(curve, "step", steps, "cpu_s") for curve in curves),
                "steps": over_seeds([at_cost(curve, "step", steps) for curve in curves]),
                "time": over_seeds([at_cost(curve, "cpu_s", spent) for curve in curves]),
                "best": over_seeds([max(p["accuracy"] for p in curve) for curve in curves]),
            }
        )
    return found


def table(data: Mapping[str, Any]) -> str:
    """A way and a number of prompts a line."""
    steps = data["sizes"]["steps"]
    head = (
        "way",
        "prompts",
        f"right after {steps:,} steps",
        "CPU s",
        "right in distillation's time",
        "of CPU s",
        "best on the way",
    )
    lines = []
    for row in compared(data):
        same = row["way"] == "distilled"
        after = told(row["steps"] if same else row["time"]) + ("" if row["enough"] else " (its end)")
        lines.append(
            (
                WAYS[row["way"]].title,
                f"{row['prompts']:,}",
                told(row["steps"]),
                f"{row['cpu_s']:.0f}",
                after,
                f"{row['spent']:.0f}",
                told(row["best"]),
            )
        )
    made = data["made"]
    lines += [(f"*{name}*", "", f"{made[name]:.1%}", "", "", "", "") for name in ("teacher", "start")]
    return markdown(head, lines)


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Accuracy over the number of prompts, after as many steps and in as much time."""
    figure, axes = canvas(2)
    found = compared(data)
    titles = {"steps": f"after {data['sizes']['steps']:,} steps", "time": "in as much processor time"}
    for ax, (which, title) in zip(axes[0], titles.items(), strict=True):
        for (name, way), marker in zip(WAYS.items(), "osD", strict=True):
            mine = [row for row in found if row["way"] == name]
            ax.errorbar(
                [row["prompts"] for row in mine],
                [100 * row[which]["mean"] for row in mine],
                [100 * (row[which]["half"] or 0.0) for row in mine],
                marker=marker,
                ms=4,
                capsize=3,
                label=way.title,
            )
        ax.axhline(100 * data["made"]["teacher"], color="0.3", ls="--", lw=1)
        ax.axhline(100 * data["made"]["start"], color="0.6", ls=":", lw=1)
        ax.set(xscale="log", xlabel="prompts", ylim=(0, 101), title=title)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("held-out prompts right, %")
    axes[0][0].legend(fontsize=7)
    save(figure, path)
