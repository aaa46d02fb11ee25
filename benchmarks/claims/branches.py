"""Training on exact next-byte tables, beside the bucket: on tiny models that cut their texts in different places.

Two directions: a student of characters learns from a teacher of words, whose tables alone have branches, and a student
of words from a teacher of characters, where the student's have them, with their gradient. All ways begin with the same
student, get the same prompts and steps, and have the better of two rates (by the log-ratio of held-out samples), chosen
for each kind of way on a seed that is used for nothing else. The rate is constant after its warm-up, so that a point of
a curve is what a run of that length would have been: ways are compared at equal steps, and at the processor time that
the bucket took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.branch_losses import Branched, Remembering, clipped_reverse_kl
from benchmarks.claims.cells import Given
from benchmarks.claims.figures import at_cost, canvas, markdown, over_seeds, save, told
from benchmarks.claims.pair_models import Model, Sizes, heldout, loaded, make, measures, train_prompts
from gold.data import Prompt
from gold.demo.run import SAMPLING
from gold.evaluate import EvaluationPlan, evaluate
from gold.losses import Divergence, reverse_kl, skew_reverse_kl
from gold.models.language_model import LanguageModel
from gold.teachers.local import LocalTeacher
from gold.train.loop import distill
from gold.train.progress import Quiet
from gold.train.recipe import Recipe, Term
from gold.train.trackers import RunInfo

DIRECTIONS = {
    "characters from words": ("characters", "words"),
    "words from characters": ("words", "characters"),
}
"""Tokenizers of student and teacher."""
CLIP = 3.0


@dataclass(frozen=True)
class Way:
    """One way: a term of gold, or with branches above ``least`` a divergence, or without one `token_pg`; ``like``: the
    way whose rate it takes."""

    title: str
    term: Term | None = None
    least: float = 0.0
    divergence: Divergence | None = None
    like: str = ""


_SKEWED = partial(skew_reverse_kl, alpha=0.1)
WAYS = {
    "bucket": Way("bucket (today)", Term("reverse_kl")),
    "bucket_skew": Way(
        "bucket, skewed reverse KL, α = 0.1", Term("skew_reverse_kl", alpha=0.1), like="bucket"
    ),
    "branches_10": Way("branches above 10 %", least=0.1, divergence=reverse_kl, like="branches_1"),
    "branches_1": Way("branches above 1 %", least=0.01, divergence=reverse_kl),
    "branches_skew": Way(
        "branches above 1 %, skewed reverse KL", least=0.01, divergence=_SKEWED, like="branches_1"
    ),
    "branches_clip": Way(
        "branches above 1 %, ratios clipped at 3 nats",
        least=0.01,
        divergence=clipped_reverse_kl,
        like="branches_1",
    ),
    "policy": Way("`token_pg`, clip 3, baseline", Term("token_pg", clip=CLIP, baseline="others")),
    "policy_branches": Way("the same, branches above 1 %", least=0.01, like="policy"),
}
TUNING_SEED = 9


@dataclass(frozen=True)
class Plan:
    """How much of everything is spent."""

    models: Sizes
    rates: tuple[float, ...]
    steps: int
    tuning_steps: int
    every: int
    batch: int
    watched: int
    exact: int
    """Held-out prompts of the exact divergence."""
    ways: tuple[str, ...] = tuple(WAYS)
    directions: tuple[str, ...] = tuple(DIRECTIONS)


PLAN = Plan(Sizes(20_000, 1600, 900, 1500, 384), (2e-4, 5e-4), 60, 25, 30, 48, 192, 64)
SMALL = Plan(
    *(Sizes(200, 4, 4, 16, 16), (1e-3,), 2, 1, 1, 4, 8, 4),
    ways=("bucket", "branches_10", "branches_1", "policy", "policy_branches"),
)


@dataclass(frozen=True)
class Run:
    """A cell: a way in a direction, a learning rate, a seed, and how long and how often looked at."""

    way: str
    direction: str
    lr: float
    seed: int
    steps: int
    every: int
    batch: int
    watched: int
    exact: int
    models: Sizes


def measure(given: Given) -> dict[str, Any]:
    """Rates on a seed apart, then every way in every direction."""
    plan, seeds = (SMALL, 1) if given.small else (PLAN, given.seeds)
    sides, best = {}, {}
    for direction in plan.directions:
        mine, theirs = DIRECTIONS[direction]
        models = [Model(mine, "student", plan.models), Model(theirs, "teacher", plan.models)]
        sides[direction] = dict(zip(("student", "teacher"), given.cells.all(make, models), strict=True))
        tried = [
            _run(plan, way, direction, lr, TUNING_SEED, plan.tuning_steps)
            for way in plan.ways
            if not WAYS[way].like
            for lr in plan.rates
        ]
        tuned = list(zip(tried, given.cells.all(run, tried), strict=True))
        for way in plan.ways:
            like = WAYS[way].like or way
            best[way, direction] = min((quality(f), job.lr) for job, f in tuned if job.way == like)[1]
    jobs = [
        _run(plan, way, direction, best[way, direction], seed, plan.steps)
        for seed in range(seeds)
        for direction in plan.directions
        for way in plan.ways
    ]
    done = list(zip(jobs, given.cells.all(run, jobs), strict=True))
    rows = [
        _row(way, direction, lr, [f for job, f in done if (job.way, job.direction) == (way, direction)])
        for (way, direction), lr in best.items()
    ]
    starts = {
        direction: next(found["curve"][0] for job, found in done if job.direction == direction)
        for direction in plan.directions
    }
    return {"plan": asdict(plan), "sides": sides, "starts": starts, "rows": rows}


def _run(plan: Plan, way: str, direction: str, lr: float, seed: int, steps: int) -> Run:
    tuning = seed == TUNING_SEED
    exact, every = (0, steps) if tuning else (plan.exact, plan.every)
    return Run(way, direction, lr, seed, steps, every, plan.batch, plan.watched, exact, plan.models)


def quality(result: Mapping[str, Any]) -> float:
    """The divergence at the end, which chooses a rate: what all ways are to lower."""
    return float(result["curve"][-1]["reverse_kl_per_byte"])


def _row(way: str, direction: str, lr: float, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    curves = [{name: [p[name] for p in r["curve"]] for name in r["curve"][0]} for r in results]
    row: dict[str, Any] = {"way": way, "direction": direction, "lr": lr, "curves": curves}
    for name in ("exact_reverse_kl_per_byte", "branches", "teacher_branches"):
        row[name] = over_seeds([r[name] for r in results])
    return row


class Watched(Quiet):
    """A student's accuracy and divergence every few steps of a run, over the processor seconds of its steps."""

    def __init__(self, every: int, look: Callable[[], dict[str, float]]) -> None:
        self.every, self.look, self.step, self.cpu_s = every, look, 0, 0.0
        self.points: list[dict[str, float]] = []
        self._since = 0.0

    def start(self, run: RunInfo) -> None:
        """Looks at the student as it starts."""
        self._point()

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Counts a step."""
        if kind != "train":
            return
        self.cpu_s += time.process_time() - self._since
        self.step += 1
        if self.step % self.every == 0:
            self._point()
        self._since = time.process_time()

    def _point(self) -> None:
        self.points.append({"step": self.step, "cpu_s": round(self.cpu_s, 2), **self.look()})
        self._since = time.process_time()


def run(job: Run, made: Path) -> dict[str, Any]:
    """Trains the student of a direction in one way, and follows it."""
    mine, theirs = DIRECTIONS[job.direction]
    student, teacher = loaded(f"student-{mine}", made), loaded(f"teacher-{theirs}", made)
    way, remembering = WAYS[job.way], Remembering(teacher)
    branched = Branched(student, remembering, way.least)
    term = way.term or Term(job.way)
    if way.divergence is not None:
        branched.add(job.way, way.divergence)
    elif way.term is None:
        branched.add_policy(job.way, CLIP)
    recipe = Recipe(
        objectives=(term,),
        max_new_tokens=SAMPLING.max_new_tokens,
        num_generations=1,
        prompts_per_step=job.batch,
        micro_batch_size=job.batch,
        generation_batch_size=64,
        schedule="constant",
        steps=job.steps,
        seed=job.seed,
        lr=job.lr,
    )
    prompts = heldout(job.models)
    watched = Watched(job.every, lambda: _looked(student, teacher, prompts[: job.watched]))
    distill(student, remembering, train_prompts(job.models), recipe, progress=watched)
    found: dict[str, Any] = {"curve": watched.points}
    texts = job.steps * job.batch
    for name, side in (("branches", 0), ("teacher_branches", 1)):
        found[name] = round(sum(each[side] for each in branched.branches) / texts, 3)
    return found | _exact(student, teacher, prompts[: job.exact])


def _looked(student: LanguageModel, teacher: LanguageModel, prompts: Sequence[Prompt]) -> dict[str, float]:
    found = measures(student, teacher, prompts)
    return {name: found[name] for name in ("accuracy", "reverse_kl_per_byte", "stop_rate")}


def _exact(student: LanguageModel, teacher: LanguageModel, prompts: Sequence[Prompt]) -> dict[str, float]:
    if not prompts:
        return {}
    plan = EvaluationPlan(max_new_tokens=SAMPLING.max_new_tokens, samples=0, branches=0.01)
    found = evaluate(student, LocalTeacher(teacher), prompts, plan=plan).measures
    return {"exact_reverse_kl_per_byte": round(found["exact_reverse_kl_per_byte"], 4)}


def compared(data: Mapping[str, Any], direction: str) -> list[dict[str, Any]]:
    """For each way of a direction its measures at equal steps, and at the processor time that the bucket took for all
    its steps, seed by seed; ``cost`` is the ratio of processor times of a step."""
    rows = {row["way"]: row for row in data["rows"] if row["direction"] == direction}
    spent = mean(curve["cpu_s"][-1] for curve in rows["bucket"]["curves"])
    found = []
    for way, row in rows.items():
        curves = [_points(c) for c in row["curves"]]
        ends = {
            name: over_seeds([c[-1][name] for c in curves]) for name in ("accuracy", "reverse_kl_per_byte")
        }
        equal = {
            f"{name}_at_equal_time": over_seeds([at_cost(c, "cpu_s", spent, name) for c in curves])
            for name in ends
        }
        found.append({"way": way, "cost": mean(c[-1]["cpu_s"] for c in curves) / spent, **ends, **equal})
    return found


def _points(columns: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def table(data: Mapping[str, Any]) -> str:
    """A table for each direction."""
    parts = []
    head = (
        *("way", "rate", "right", "KL per byte", "exact KL per byte", "time of a step"),
        *("right at equal time", "KL per byte at equal time"),
    )
    for direction, start in data["starts"].items():
        rows = {row["way"]: row for row in data["rows"] if row["direction"] == direction}
        lines = [
            (
                WAYS[each["way"]].title,
                f"{rows[each['way']]['lr']:g}",
                told(each["accuracy"]),
                told(each["reverse_kl_per_byte"], ".3f"),
                told(rows[each["way"]]["exact_reverse_kl_per_byte"], ".3f"),
                f"×{each['cost']:.1f}",
                told(each["accuracy_at_equal_time"]),
                told(each["reverse_kl_per_byte_at_equal_time"], ".3f"),
            )
            for each in compared(data, direction)
        ]
        title = (
            f"{direction}: the start has {start['accuracy']:.1%} and {start['reverse_kl_per_byte']:.3f} nats per "
            f"byte, the teacher {data['sides'][direction]['teacher']['accuracy']:.1%}"
        )
        parts.append(f"{title}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Accuracy and divergence, means over seeds, over processor seconds; a row for each direction."""
    measured = {"accuracy": "right", "reverse_kl_per_byte": "KL per byte, nats"}
    figure, axes = canvas(len(measured), len(data["starts"]), (4.6, 3.2))
    for line, direction in zip(axes, data["starts"], strict=True):
        for ax, (name, title) in zip(line, measured.items(), strict=True):
            for row in (r for r in data["rows"] if r["direction"] == direction):
                means = [
                    [mean(values) for values in zip(*(c[n] for c in row["curves"]), strict=True)]
                    for n in ("cpu_s", name)
                ]
                ax.plot(*means, lw=1.3, marker="o", ms=3, label=WAYS[row["way"]].title)
            ax.set(xlabel="processor seconds", ylabel=f"{direction}: {title}")
            ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=6)
    save(figure, path)
