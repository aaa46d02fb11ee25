"""Training on exact next-byte tables, beside the bucket: on tiny models that cut their texts in different places.

Two directions between characters, whose tables have next to no branches, and pieces of words: a student of characters
learns from a teacher of pieces, which alone has branches, and a student of pieces from a teacher of characters, where
the student's branches have a gradient. The texts are phrases, whose next word is uncertain: on the demonstration's
task, with one right answer, no token off the path has a share above 1 %, and all tables are the same.

All ways begin with the same student, get the same prompts and steps, and have the better of two rates (by the log-ratio
of held-out samples), chosen for each kind of way on a seed that is used for nothing else. The rate is constant after
its warm-up, so that a point of a curve is what a run of that length would have been: ways are compared at equal steps,
and at the processor time that the bucket took. Both directions also begin late: with the student that a longer run of
the bucket left, at lower rates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.branch_losses import Branched, Remembering, clipped_reverse_kl
from benchmarks.claims import pair_models
from benchmarks.claims.cells import Given
from benchmarks.claims.figures import at_cost, canvas, markdown, over_seeds, save, told
from benchmarks.claims.phrases import MAX_NEW_TOKENS, Model, asked, load, make, phrases
from gold.data import Prompt
from gold.demo.run import SAMPLING
from gold.evaluate import EvaluationPlan, evaluate
from gold.losses import Divergence, reverse_kl, skew_reverse_kl
from gold.models.language_model import LanguageModel
from gold.models.load import save_model
from gold.teachers.local import LocalTeacher
from gold.train.loop import distill
from gold.train.progress import Quiet
from gold.train.recipe import Recipe, Term
from gold.train.trackers import RunInfo


@dataclass(frozen=True)
class Direction:
    """Tokenizers of student and teacher, and whether runs begin ``late``."""

    student: str
    teacher: str
    late: bool = False


DIRECTIONS = {
    "characters from pieces": Direction("characters", "pieces"),
    "pieces from characters": Direction("pieces", "characters"),
    "characters from pieces, late": Direction("characters", "pieces", late=True),
    "pieces from characters, late": Direction("pieces", "characters", late=True),
}
CLIP = 3.0
NONE = 1.0
"""A least share that no branch has."""


@dataclass(frozen=True)
class Way:
    """One way: a term of gold, or with branches above ``least`` a divergence, or without one `token_pg`; ``like``: the
    way whose rate it takes."""

    title: str
    term: Term | None = None
    least: float = 0.0
    divergence: Divergence | None = None
    like: str = ""
    rates_by: float = 1.0
    """Factor on the rates that are tried."""


_SKEWED = partial(skew_reverse_kl, alpha=0.1)
_CLIPPED = partial(clipped_reverse_kl, clip=CLIP)
WAYS = {
    "bucket": Way("bucket (today)", Term("reverse_kl")),
    "bucket_skew": Way(
        "bucket, skewed reverse KL, α = 0.1", Term("skew_reverse_kl", alpha=0.1), like="bucket"
    ),
    "bucket_clip": Way("bucket, ratios clipped at 3 nats", least=NONE, divergence=_CLIPPED, like="bucket"),
    "branches_10": Way("branches above 10 %", least=0.1, divergence=reverse_kl, like="branches_1"),
    "branches_1": Way("branches above 1 %", least=0.01, divergence=reverse_kl),
    "branches_skew": Way(
        "branches above 1 %, skewed reverse KL", least=0.01, divergence=_SKEWED, like="branches_1"
    ),
    "branches_clip": Way(
        "branches above 1 %, ratios clipped at 3 nats", least=0.01, divergence=_CLIPPED, like="branches_1"
    ),
    "policy": Way(
        "`token_pg`, clip 3, baseline", Term("token_pg", clip=CLIP, baseline="others"), rates_by=0.1
    ),
    "policy_branches": Way("the same, branches above 1 %", least=0.01, like="policy"),
}
TUNING_SEED = 9
LATE_WAYS = "bucket", "branches_10", "branches_1", "branches_clip"
_ENDS = "", "_low", "_high"
_VALUE = [f"exact_reverse_kl_per_byte{end}" for end in _ENDS]
_LOG_RATIO = [f"reverse_kl_per_byte{end}" for end in _ENDS]


@dataclass(frozen=True)
class Plan:
    """How much of everything is spent."""

    teacher_steps: int
    student_steps: int
    phrases: int
    prompts: int
    rates: tuple[float, ...]
    late_rates: tuple[float, ...]
    late_after: int
    """Steps of the bucket before a late start."""
    steps: int
    tuning_steps: int
    every: int
    batch: int
    watched: int
    """Held-out prompts of a point of a curve."""
    exact: int
    """Held-out prompts of the exact divergence."""
    pairs: pair_models.Sizes
    """Those of the demonstration's pairs."""
    ways: tuple[str, ...] = tuple(WAYS)

    def ways_of(self, direction: str) -> list[str]:
        """The ways that are run in a direction."""
        return [way for way in self.ways if way in LATE_WAYS or not DIRECTIONS[direction].late]


PLAN = Plan(
    *(700, 120, 20_000, 1500, (3e-4, 1e-3), (1e-4,), 300, 40, 15, 10, 32, 64, 64),
    pairs=pair_models.Sizes(20_000, 1600, 900, 400, 384),
)
SMALL = Plan(
    *(4, 4, 200, 16, (1e-3,), (1e-3,), 2, 2, 1, 1, 4, 2, 1),
    pairs=pair_models.Sizes(200, 4, 4, 16, 16),
    ways=("bucket", "bucket_clip", "branches_10", "branches_1", "policy", "policy_branches"),
)


@dataclass(frozen=True)
class Counted:
    """A cell: what a student and a teacher of the demonstration's task leave unresolved."""

    student: str
    teacher: str
    sizes: pair_models.Sizes
    prompts: int


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
    prompts: int
    watched: int
    exact: int


@dataclass(frozen=True)
class Longer(Run):
    """A cell: the run of the bucket that a late start comes from."""


def measure(given: Given) -> dict[str, Any]:
    """Rates on a seed apart, then every way in every direction."""
    plan, seeds = (SMALL, 1) if given.small else (PLAN, given.seeds)
    demonstration = _demonstration(given, plan)
    sides: dict[str, Any] = {}
    best: dict[tuple[str, str], float] = {}
    for direction, pair in DIRECTIONS.items():
        if pair.late:
            early = next(n for n, d in DIRECTIONS.items() if d == replace(pair, late=False))
            rate = best["bucket", early]
            longer = _run(plan, "bucket", early, rate, TUNING_SEED, plan.late_after)
            given.cells.all(lengthen, [Longer(**asdict(longer))])
        else:
            models = [
                Model(pair.student, "student", plan.student_steps, plan.phrases),
                Model(pair.teacher, "teacher", plan.teacher_steps, plan.phrases),
            ]
            sides[direction] = dict(zip(("student", "teacher"), given.cells.all(make, models), strict=True))
        tried = [
            _run(plan, way, direction, lr * WAYS[way].rates_by, TUNING_SEED, plan.tuning_steps)
            for way in plan.ways_of(direction)
            if not WAYS[way].like
            for lr in (plan.late_rates if pair.late else plan.rates)
        ]
        tuned = list(zip(tried, given.cells.all(run, tried), strict=True))
        for way in plan.ways_of(direction):
            like = WAYS[way].like or way
            best[way, direction] = min((quality(f), job.lr) for job, f in tuned if job.way == like)[1]
    jobs = [
        _run(plan, way, direction, best[way, direction], seed, plan.steps)
        for seed in range(seeds)
        for direction in DIRECTIONS
        for way in plan.ways_of(direction)
    ]
    done = list(zip(jobs, given.cells.all(run, jobs), strict=True))
    rows = [
        _row(way, direction, lr, [f for job, f in done if (job.way, job.direction) == (way, direction)])
        for (way, direction), lr in best.items()
    ]
    begun = given.cells.all(begin, [Start(direction, plan.watched, plan.exact) for direction in DIRECTIONS])
    starts = dict(zip(DIRECTIONS, begun, strict=True))
    data = {"plan": asdict(plan), "demonstration": demonstration, "sides": sides, "starts": starts}
    return {**data, "rows": rows}


def _demonstration(given: Given, plan: Plan) -> list[dict[str, Any]]:
    """What the pairs of the demonstration's task leave unresolved."""
    pairs = [("characters", "words"), ("words", "characters")]
    for mine, theirs in pairs:
        sides = (mine, "student"), (theirs, "teacher")
        given.cells.all(pair_models.make, [pair_models.Model(*side, plan.pairs) for side in sides])
    jobs = [Counted(*pair, plan.pairs, plan.exact) for pair in pairs]
    found = given.cells.all(count, jobs)
    return [{"student": j.student, "teacher": j.teacher, **f} for j, f in zip(jobs, found, strict=True)]


def count(job: Counted, made: Path) -> dict[str, float]:
    """The measures of what is unresolved, with branches above 1 % and without."""
    student, teacher = (
        pair_models.loaded(name, made) for name in (f"student-{job.student}", f"teacher-{job.teacher}")
    )
    prompts = pair_models.heldout(job.sizes)[: job.prompts]
    found: dict[str, float] = {}
    measured: dict[str, float] = {}
    for name, least in (("without", NONE), ("with", 0.01)):
        plan = EvaluationPlan(max_new_tokens=SAMPLING.max_new_tokens, samples=0, branches=least)
        measured = evaluate(student, LocalTeacher(teacher), prompts, plan=plan).measures
        for key in (*_VALUE, "unresolved_mass", "teacher_unresolved_mass"):
            found[f"{key}_{name}"] = round(measured[key], 6)
        for key in ("branches_per_token", "teacher_branches_per_token"):
            found[f"{key}_{name}"] = round(measured[key], 4)
    return found | {key: round(measured[key], 6) for key in _LOG_RATIO}


def _run(plan: Plan, way: str, direction: str, lr: float, seed: int, steps: int) -> Run:
    tuning = seed == TUNING_SEED
    exact, every = (0, steps) if tuning else (plan.exact, plan.every)
    return Run(way, direction, lr, seed, steps, every, plan.batch, plan.prompts, plan.watched, exact)


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
    student, teacher = _sides(job.direction, made)
    way, remembering, room = WAYS[job.way], Remembering(teacher), _room(job.direction)
    branched = Branched(student, remembering, way.least)
    term = way.term or Term(job.way)
    if way.divergence is not None:
        branched.add(job.way, way.divergence)
    elif way.term is None:
        branched.add_policy(job.way, CLIP)
    recipe = _recipe(job, term)
    heldout = phrases("heldout")
    watched = Watched(job.every, lambda: _looked(student, teacher, heldout[: job.watched], room))
    prompts = asked(phrases("train")[: job.prompts])
    distill(student, remembering, prompts, recipe.replace(schedule="constant"), progress=watched)
    found: dict[str, Any] = {"curve": watched.points}
    texts = job.steps * job.batch
    for name, side in (("branches", 0), ("teacher_branches", 1)):
        found[name] = round(sum(each[side] for each in branched.branches) / texts, 3)
    return found | _exact(student, teacher, asked(heldout[: job.exact]), room)


def lengthen(job: Longer, made: Path) -> dict[str, Any]:
    """Trains the student of a direction with the bucket, at a rate that falls, and saves it for late starts."""
    student, teacher = _sides(job.direction, made)
    prompts = asked(phrases("train")[: job.prompts])
    distill(student, LocalTeacher(teacher), prompts, _recipe(job, Term("reverse_kl")))
    save_model(student, made / f"late-{DIRECTIONS[job.direction].student}")
    return {}


def _recipe(job: Run, term: Term) -> Recipe:
    return Recipe(
        objectives=(term,),
        max_new_tokens=_room(job.direction),
        num_generations=1,
        prompts_per_step=job.batch,
        micro_batch_size=job.batch,
        generation_batch_size=64,
        steps=job.steps,
        seed=job.seed,
        lr=job.lr,
    )


def _room(direction: str) -> int:
    return MAX_NEW_TOKENS[DIRECTIONS[direction].student]


@dataclass(frozen=True)
class Start:
    """A cell: a direction's student before training."""

    direction: str
    watched: int
    exact: int


def begin(job: Start, made: Path) -> dict[str, float]:
    """The measures of a direction's student as it is."""
    sides, heldout, room = _sides(job.direction, made), phrases("heldout"), _room(job.direction)
    return _looked(*sides, heldout[: job.watched], room) | _exact(*sides, asked(heldout[: job.exact]), room)


def _sides(direction: str, made: Path) -> tuple[LanguageModel, LanguageModel]:
    pair = DIRECTIONS[direction]
    student = f"late-{pair.student}" if pair.late else f"phrases-student-{pair.student}"
    return load(made / student), load(made / f"phrases-teacher-{pair.teacher}")


def _looked(
    student: LanguageModel, teacher: LanguageModel, prompts: Sequence[Prompt], room: int
) -> dict[str, float]:
    plan = EvaluationPlan(max_new_tokens=room, samples=0, generation_batch_size=256, micro_batch_size=64)
    found = evaluate(student, LocalTeacher(teacher), prompts, plan=plan).measures
    return {name: round(found[name], 4) for name in ("bits_per_byte", "reverse_kl_per_byte", "stop_rate")}


def _exact(
    student: LanguageModel, teacher: LanguageModel, prompts: Sequence[Prompt], room: int
) -> dict[str, float]:
    if not prompts:
        return {}
    plan = EvaluationPlan(max_new_tokens=room, samples=0, branches=0.01)
    found = evaluate(student, LocalTeacher(teacher), prompts, plan=plan).measures
    names = "exact_reverse_kl_per_byte", "unresolved_mass", "teacher_unresolved_mass"
    return {name: round(found[name], 4) for name in names}


def compared(data: Mapping[str, Any], direction: str) -> list[dict[str, Any]]:
    """For each way of a direction its measures at equal steps, and at the processor time that the bucket took for all
    its steps, seed by seed; ``cost`` is the ratio of processor times of a step."""
    rows = {row["way"]: row for row in data["rows"] if row["direction"] == direction}
    spent = mean(curve["cpu_s"][-1] for curve in rows["bucket"]["curves"])
    found = []
    for way, row in rows.items():
        curves = [_points(c) for c in row["curves"]]
        ends = {
            name: over_seeds([c[-1][name] for c in curves])
            for name in ("reverse_kl_per_byte", "bits_per_byte")
        }
        equal = {
            f"{name}_at_equal_time": over_seeds([at_cost(c, "cpu_s", spent, name) for c in curves])
            for name in ends
        }
        found.append({"way": way, "cost": mean(c[-1]["cpu_s"] for c in curves) / spent, **ends, **equal})
    return found


def _points(columns: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def demonstration(data: Mapping[str, Any]) -> str:
    """What the pairs of the demonstration's task leave unresolved, as a table."""
    head = (
        *(
            "student ← teacher",
            "unresolved (student, teacher)",
            "branches above 1 % a token",
            "value per byte",
        ),
        *("log-ratio per byte", "its interval is wider by"),
    )
    lines = []
    for row in data["demonstration"]:
        widths = [row[f"{low}_high{end}"] - row[f"{low}_low{end}"] for low, end in _INTERVALS]
        lines.append(
            (
                f"{row['student']} ← {row['teacher']}",
                f"{row['unresolved_mass_without']:.4%}, {row['teacher_unresolved_mass_without']:.4%}",
                f"{row['branches_per_token_with']:.1f}, {row['teacher_branches_per_token_with']:.1f}",
                f"{row['exact_reverse_kl_per_byte_with']:.3f}",
                f"{row['reverse_kl_per_byte']:.3f}",
                f"×{widths[0] / widths[1]:.1f}",
            )
        )
    return markdown(head, lines)


_INTERVALS = ("reverse_kl_per_byte", ""), ("exact_reverse_kl_per_byte", "_with")


def table(data: Mapping[str, Any]) -> str:
    """A table for each direction."""
    parts = []
    head = (
        *("way", "rate", "branches a text", "exact KL per byte", "log-ratio per byte", "bits per byte"),
        *("time of a step", "log-ratio at equal time", "bits at equal time"),
    )
    for direction, start in data["starts"].items():
        rows = {row["way"]: row for row in data["rows"] if row["direction"] == direction}
        lines = [
            (
                WAYS[each["way"]].title,
                f"{rows[each['way']]['lr']:g}",
                f"{max(rows[each['way']][name]['mean'] for name in ('branches', 'teacher_branches')):.1f}",
                told(rows[each["way"]]["exact_reverse_kl_per_byte"], ".3f"),
                told(each["reverse_kl_per_byte"], ".3f"),
                told(each["bits_per_byte"], ".3f"),
                f"×{each['cost']:.1f}",
                told(each["reverse_kl_per_byte_at_equal_time"], ".3f"),
                told(each["bits_per_byte_at_equal_time"], ".3f"),
            )
            for each in compared(data, direction)
        ]
        title = (
            f"{direction}: the start has {start['exact_reverse_kl_per_byte']:.3f} nats per byte (log-ratio "
            f"{start['reverse_kl_per_byte']:.3f}) and {start['bits_per_byte']:.3f} bits"
        )
        parts.append(f"{title}\n\n{markdown(head, lines)}")
    return "\n\n".join(parts)


def draw(data: Mapping[str, Any], path: Path) -> None:
    """The two divergences, means over seeds, over steps and over processor seconds; a row for each direction."""
    costs = {"step": "steps", "cpu_s": "processor seconds"}
    figure, axes = canvas(len(costs), len(data["starts"]), (4.6, 3.2))
    for line, direction in zip(axes, data["starts"], strict=True):
        for ax, (cost, title) in zip(line, costs.items(), strict=True):
            for row in (r for r in data["rows"] if r["direction"] == direction):
                means = [
                    [mean(values) for values in zip(*(c[n] for c in row["curves"]), strict=True)]
                    for n in (cost, "reverse_kl_per_byte")
                ]
                color = f"C{list(WAYS).index(row['way'])}"
                ax.plot(*means, color=color, lw=1.3, marker="o", ms=3, label=WAYS[row["way"]].title)
            ax.set(xlabel=title, ylabel="log-ratio a byte, nats", title=direction)
            ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=6)
    save(figure, path)
