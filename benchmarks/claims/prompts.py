"""Accuracy over the number of prompts: on-policy distillation, imitation of the teacher's texts, a reward alone.

The task, the teacher and the start are the demonstration's. Every run is one that a user would start: its rate falls
over its own length. Imitation has more steps, so that it takes about as much processor time as distillation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.claims.cells import Given
from benchmarks.claims.curves import Curve, answers, best, ends_by_rate, written
from benchmarks.claims.figures import canvas, markdown, over_seeds, save, told
from gold.data import Prompt
from gold.demo.run import SAMPLING, TASK, DemoPlan, make_start, make_teacher
from gold.models.language_model import LanguageModel
from gold.models.load import load_model
from gold.train.recipe import Recipe, Term

TUNING_SEED = 9
COMPLETIONS = 48
"""Completions a step, in every way."""
RARE = 0.01
"""A share of new additions below this is too small to tell how many of them are right."""

_EACH = Recipe(
    num_generations=1,
    prompts_per_step=COMPLETIONS,
    micro_batch_size=COMPLETIONS,
    generation_batch_size=64,
    max_new_tokens=SAMPLING.max_new_tokens,
)
_IMITATION = _EACH.replace(objectives=(Term("sft"),), on_policy=0.0)
_REWARD = _EACH.replace(objectives=(Term("reward"),), prompts_per_step=COMPLETIONS // 8, num_generations=8)


@dataclass(frozen=True)
class Way:
    """One way of using the prompts; ``length``: its steps for one of distillation.

    ``rates`` are those that are tried with a number of prompts of ``Sizes.tuned``. ``numbers``: with how many
    prompts it is run; none: with all numbers.
    """

    title: str
    recipe: Recipe
    rates: Mapping[int, tuple[float, ...]]
    length: float = 1.0
    numbers: tuple[int, ...] = ()


WAYS = {
    "distilled": Way(
        "on-policy distillation (reverse KL on bytes)",
        _EACH,
        {
            100: (3e-6, 1e-5, 3e-5, 1e-4),
            400: (1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
            2000: (5e-4, 1e-3, 2e-3, 4e-3),
            10000: (5e-4, 1e-3, 2e-3, 4e-3),
        },
    ),
    "imitated": Way(
        "sequence-level KD, about as much time",
        _IMITATION,
        {
            100: (3e-6, 1e-5, 3e-5, 1e-4),
            400: (1e-5, 3e-5, 1e-4),
            2000: (5e-4, 1e-3, 2e-3, 4e-3),
            10000: (5e-4, 1e-3, 2e-3, 4e-3),
        },
        2.25,
    ),
    "rewarded": Way("reward only (groups of 8)", _REWARD, {100: (1e-4, 3e-4)}, numbers=(100,)),
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything is spent; ``steps`` are those of distillation.

    Rates are found with each number of prompts in ``tuned``; other numbers have those of the largest one below.
    """

    numbers: tuple[int, ...] = (100, 400, 2000, 10000)
    tuned: tuple[int, ...] = (100, 400, 2000, 10000)
    steps: int = 400
    looks: int = 10
    heldout: int = 512
    watched: int = 256
    tuning_share: float = 0.625
    answers: int = 20000
    teacher_steps: int = 1600
    start_steps: int = 900


SMALL = Sizes((100, 120), (100,), 4, 2, 16, 8, 0.5, 200, 10, 10)


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
    looks: int
    heldout: int
    watched: int


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
    """The curve of one run, and which additions are right before and after it; a seed has its own prompts."""
    way = WAYS[job.way]
    student, teacher = load_model(made / "student-start"), load_model(made / "teacher")
    own = TASK.prompts("train", job.prompts, 100 + job.seed)
    prompts, text_s = _asked(own), 0.0
    if way.recipe.on_policy == 0.0:
        most = job.steps * COMPLETIONS
        prompts, text_s = written(teacher, prompts, SAMPLING, job.seed, each=4, most=most)
    heldout = _asked(TASK.prompts("heldout", job.heldout, 0))
    reported = {p.key for p in heldout}
    others = TASK.prompts("heldout", 2 * job.watched, TUNING_SEED)
    watched = [p for p in _asked(others) if p.key not in reported][: job.watched]
    also = {"watched": watched, "own": _asked(own)[: job.watched]}
    every = max(1, job.steps // job.looks)
    curve = Curve(student, heldout, TASK, SAMPLING.max_new_tokens, every, text_s, also)
    recipe = way.recipe.replace(steps=job.steps, seed=job.seed, lr=job.lr)
    before = additions(student, heldout, own)
    curve.run(teacher if job.way == "distilled" else None, prompts, recipe, TASK)
    return {"curve": curve.points, "before": before, "after": additions(student, heldout, own)}


def _asked(prompts: Sequence[Prompt]) -> list[Prompt]:
    return [replace(p, completion=None) for p in prompts]


def additions(student: LanguageModel, heldout: Sequence[Prompt], own: Sequence[Prompt]) -> dict[str, float]:
    """Shares of right additions in held-out prompts, of those that the right answers of ``own`` prompts have too, and
    of the others; and which share of the additions those prompts have.

    An addition is a value and a step, `` 24`` and `` +7``. It counts where every value before it is right.
    """
    known = {addition for p in own for addition in _additions(p)}
    right: Counter[bool] = Counter()
    all_: Counter[bool] = Counter()
    asked_for: list[bool] = []
    for prompt, text in zip(heldout, answers(student, heldout, SAMPLING.max_new_tokens), strict=True):
        values = text.split()
        asked_for += [addition in known for addition in _additions(prompt)]
        for n, (addition, value) in enumerate(zip(_additions(prompt), prompt.reference.split(), strict=True)):
            all_[addition in known] += 1
            if values[n : n + 1] != [value]:
                break
            right[addition in known] += 1
    return {
        "known": right[True] / max(1, all_[True]),
        "new": right[False] / max(1, all_[False]),
        "share": mean(asked_for),
    }


def _additions(prompt: Prompt) -> list[tuple[str, str]]:
    first, *steps = (prompt.text or "").removesuffix(" =").split()
    return list(zip([first, *prompt.reference.split()], steps, strict=False))


def measure(given: Given) -> dict[str, Any]:
    """Rates on a seed apart, with some numbers of prompts; then every way with its numbers of prompts."""
    sizes = SMALL if given.small else Sizes()
    models = Models(sizes.answers, sizes.teacher_steps, sizes.start_steps, sizes.heldout)
    made = given.cells.all(make, [models])[0]
    tried = _tried(given, sizes)
    rates = {number: {name: best(ends) for name, ends in ways.items()} for number, ways in tried.items()}
    jobs = [
        _job(name, number, rates[str(_tuned(sizes, number))][name], seed, sizes)
        for seed in range(given.seeds)
        for number in sizes.numbers
        for name, way in WAYS.items()
        if number in (way.numbers or sizes.numbers)
    ]
    found = list(zip(jobs, given.cells.all(work, jobs), strict=True))
    rows = [
        _row(name, number, mine)
        for name in WAYS
        for number in sizes.numbers
        if (mine := [pair for pair in found if (pair[0].way, pair[0].prompts) == (name, number)])
    ]
    return {"sizes": asdict(sizes), "made": made, "rates": rates, "tried": tried, "rows": rows}


def _tuned(sizes: Sizes, number: int) -> int:
    """The number of prompts whose rates a number has."""
    return max(n for n in sizes.tuned if n <= number)


def _job(name: str, number: int, lr: float, seed: int, sizes: Sizes, share: float = 1.0) -> Job:
    steps = round(WAYS[name].length * sizes.steps * share)
    return Job(name, number, lr, seed, steps, sizes.looks, sizes.heldout, sizes.watched)


def _tried(given: Given, sizes: Sizes) -> dict[str, dict[str, dict[str, float]]]:
    """For each number of prompts in ``tuned``, each way and each rate where a shorter run ends, on a seed apart."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for number in sizes.tuned:
        jobs = [
            _job(name, number, lr, TUNING_SEED, sizes, sizes.tuning_share)
            for name, way in WAYS.items()
            for lr in way.rates.get(number, ())
        ]
        found[str(number)] = ends_by_rate(jobs, given.cells.all(work, jobs))
    return found


def _row(name: str, number: int, found: Sequence[tuple[Job, Mapping[str, Any]]]) -> dict[str, Any]:
    """What the table and the picture need of the runs of a way with a number of prompts, seed by seed."""
    results = [result for _, result in found]
    kept = "step", "cpu_s", "accuracy", "watched", "own"
    return {
        "way": name,
        "prompts": number,
        "steps": found[0][0].steps,
        "lr": found[0][0].lr,
        "curves": [{n: [p[n] for p in r["curve"]] for n in kept} for r in results],
        "before": [_rounded(r["before"]) for r in results],
        "after": [_rounded(r["after"]) for r in results],
    }


def _rounded(shares: Mapping[str, float]) -> dict[str, float]:
    return {name: round(share, 4) for name, share in shares.items()}


def summed(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A row's measures over seeds.

    ``stopped`` is the accuracy at the look that is best on the other held-out prompts, the first of equals. ``new`` is
    left out where hardly any addition is new.
    """
    curves = row["curves"]
    values = {
        "cpu_s": [c["cpu_s"][-1] for c in curves],
        "end": [c["accuracy"][-1] for c in curves],
        "stopped": [c["accuracy"][c["watched"].index(max(c["watched"]))] for c in curves],
        "own": [c["own"][-1] for c in curves],
        "known": [a["known"] for a in row["after"]],
    }
    if all(a["share"] < 1 - RARE for a in row["after"]):
        values["new"] = [a["new"] for a in row["after"]]
    return {name: over_seeds(found) for name, found in values.items()}


def table(data: Mapping[str, Any]) -> str:
    """A way and a number of prompts a line, the numbers together."""
    head = (
        "way",
        "prompts",
        "steps",
        "rate",
        "CPU s",
        "right at its end",
        "stopped early",
        "right on its own prompts",
        "additions known",
        "new",
    )
    lines = []
    for row in sorted(data["rows"], key=lambda row: row["prompts"]):
        found = summed(row)
        lines.append(
            (
                WAYS[row["way"]].title,
                f"{row['prompts']:,}",
                f"{row['steps']:,}",
                f"{row['lr']:g}",
                f"{found['cpu_s']['mean']:.0f}",
                *(told(found[name]) for name in ("end", "stopped", "own", "known")),
                told(found["new"]) if "new" in found else "–",
            )
        )
    made = data["made"]
    before = [b for row in data["rows"] for b in row["before"] if b["share"] < 1 - RARE]
    ends = [f"{mean(b[name] for b in before):.1%}" if before else "–" for name in ("known", "new")]
    lines.append(("*start*", "", "", "", "", f"{made['start']:.1%}", "", "", *ends))
    lines.append(("*teacher*", "", "", "", "", f"{made['teacher']:.1%}", *[""] * 4))
    return markdown(head, lines)


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Accuracy over the number of prompts, at the end of the runs and stopped early."""
    figure, axes = canvas(2)
    titles = {"end": "at the end of a run", "stopped": "stopped at its best look"}
    for ax, (which, title) in zip(axes[0], titles.items(), strict=True):
        for (name, way), marker in zip(WAYS.items(), "osD", strict=True):
            mine = [row for row in data["rows"] if row["way"] == name]
            found = [summed(row)[which] for row in mine]
            ax.errorbar(
                [row["prompts"] for row in mine],
                [100 * value["mean"] for value in found],
                [100 * (value["half"] or 0.0) for value in found],
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
