"""Ways to compare two models across tokenizers, each trained for the same steps on three pairs of tiny models.

A pair differs in one respect: the student's tokens are longer than the teacher's, or shorter, or the student cuts
numbers into digits which the teacher does not. All ways (`benchmarks.claims.ways`) begin with the same student and get
the same prompts and steps; each has the best of the middle two of four learning rates and the one beyond the better,
chosen on a seed that is used for nothing else. Rows of TRL are its own GOLD trainer from the same start, in the
environment that `make bench-peers` makes.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.claims import debiased
from benchmarks.claims.cells import Given
from benchmarks.claims.curves import written
from benchmarks.claims.figures import canvas, markdown, over_seeds, save, told
from benchmarks.claims.pair_models import (
    MEASURES,
    Model,
    Sizes,
    heldout,
    keep,
    kept,
    loaded,
    make,
    measures,
    train_prompts,
)
from benchmarks.claims.ways import TRL, WAYS
from gold.demo.run import SAMPLING, TASK, CpuSeconds
from gold.losses import OBJECTIVES
from gold.train.loop import Saving, distill
from gold.train.recipe import Recipe, Term

PAIRS = {
    "longer student tokens": ("words", "characters"),
    "longer teacher tokens": ("characters", "words"),
    "digits split by the student": ("digits", "numbers"),
}
"""Tokenizers of student and teacher."""


PEERS = Path(__file__).resolve().parents[2] / ".venv-peers" / "bin" / "python"
RATES = 2e-5, 5e-5, 2e-4, 1e-3
TUNING_SEED, WATCHED = 9, 192
"""A seed that chooses rates alone, on so many held-out prompts."""


@dataclass(frozen=True)
class Run:
    """A cell: a way, a pair, a learning rate, a seed, so many steps of ``batch`` completions."""

    way: str
    pair: str
    lr: float
    seed: int
    steps: int
    batch: int
    sizes: Sizes


@dataclass(frozen=True)
class Texts:
    """A cell: texts that the pair's teacher samples for the prompts, ``each`` for one."""

    pair: str
    sizes: Sizes
    each: int = 4


@dataclass(frozen=True)
class Start:
    """A cell: a pair's student before training."""

    pair: str
    sizes: Sizes


def measure(given: Given) -> dict[str, Any]:
    """What each way made of each pair's student."""
    sizes, steps, batch = Sizes(20_000, 1600, 900, 400, 384), 30, 48
    ways, seeds, pairs = [*WAYS, *TRL], given.seeds, list(PAIRS)
    if given.small:
        sizes, steps, batch = Sizes(200, 4, 4, 16, 16), 2, 4
        ways, seeds, pairs = [ways[0], "ALM as published, λ 0"], 1, pairs[2:]
    if not PEERS.is_file():
        ways = [way for way in ways if way not in TRL]
    sides: dict[str, Any] = {}
    rows = []
    for pair in pairs:
        mine, theirs = PAIRS[pair]
        models = [Model(mine, "student", sizes), Model(theirs, "teacher", sizes)]
        sides[pair] = dict(zip(("student", "teacher"), given.cells.all(make, models), strict=True))
        (sides[pair]["start"],) = given.cells.all(begin, [Start(pair, sizes)])
        (sides[pair]["texts"],) = given.cells.all(write, [Texts(pair, sizes)])
        plan: dict[str, Any] = {"steps": steps, "batch": batch, "sizes": sizes}
        best, tried = chosen(given, ways, pair, plan)
        last = [Run(way, pair, best[way], seed, **plan) for way in ways for seed in range(seeds)]
        done = list(zip(last, given.cells.all(run, last), strict=True))
        for way in ways:
            found = [result for job, result in done if job.way == way]
            rows.append({**row(way, pair, best[way], found), "tried": tried[way]})
    told_plan = {"steps": steps, "batch": batch, "rates": list(RATES), **asdict(sizes)}
    return {"plan": told_plan, "pairs": sides, "rows": rows}


def chosen(
    given: Given, ways: Sequence[str], pair: str, plan: Mapping[str, Any]
) -> tuple[dict[str, float], dict[str, dict[str, float | None]]]:
    """Each way's rate, and the accuracy at each that was tried: the two in the middle, then the one beyond the
    better."""

    def tried(wanted: Sequence[tuple[str, float]]) -> None:
        jobs = [Run(way, pair, lr, TUNING_SEED, **plan) for way, lr in wanted]
        for job, result in zip(jobs, given.cells.all(run, jobs), strict=True):
            found[job.way][job.lr] = result

    found: dict[str, dict[float, dict[str, Any]]] = {way: {} for way in ways}
    lowest, low, high, highest = RATES
    tried([(way, lr) for way in ways for lr in (low, high)])
    tried([(way, lowest if _best(found[way]) == low else highest) for way in ways])
    accuracies = {
        way: {f"{lr:g}": result.get("accuracy") for lr, result in sorted(each.items())}
        for way, each in found.items()
    }
    return {way: _best(each) for way, each in found.items()}, accuracies


def _best(found: Mapping[float, Mapping[str, Any]]) -> float:
    return max((quality(result), lr) for lr, result in found.items())[1]


def quality(result: Mapping[str, Any]) -> tuple[float, float]:
    """Accuracy, and among equals the lower divergence; failures last."""
    return result.get("accuracy", -1.0), -result.get("reverse_kl_per_byte", 0.0)


def row(way: str, pair: str, lr: float, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A line of the table: measures over seeds, or why there are none."""
    told_row: dict[str, Any] = {"way": way, "pair": pair, "lr": lr}
    if errors := [result["error"] for result in results if "error" in result]:
        return {**told_row, "error": errors[0]}
    for name in (*MEASURES, "cpu_s"):
        told_row[name] = over_seeds([result[name] for result in results])
    return told_row


def begin(job: Start, made: Path) -> dict[str, float]:
    """The measures of the pair's student as it is."""
    mine, theirs = PAIRS[job.pair]
    return measures(loaded(f"student-{mine}", made), loaded(f"teacher-{theirs}", made), heldout(job.sizes))


def write(job: Texts, made: Path) -> dict[str, float]:
    """Keeps the teacher's texts; returns how many there are, and the share of right ones."""
    _, theirs = PAIRS[job.pair]
    teacher, prompts = loaded(f"teacher-{theirs}", made), train_prompts(job.sizes)
    taught, _ = written(teacher, prompts, SAMPLING, 0, each=job.each, most=job.each * len(prompts))
    keep(taught, made / f"texts-{theirs}.json")
    right = [TASK.score(prompt, prompt.completion or "") for prompt in taught]
    return {"texts": len(taught), "right": round(sum(right) / len(right), 4)}


def run(job: Run, made: Path) -> dict[str, Any]:
    """Trains the pair's student, and measures it on all held-out prompts."""
    OBJECTIVES[debiased.ROW.name] = debiased.ROW  # for this run alone
    try:
        return _run(job, made)
    finally:
        del OBJECTIVES[debiased.ROW.name]


def _run(job: Run, made: Path) -> dict[str, Any]:
    mine, theirs = PAIRS[job.pair]
    sides, texts = (f"student-{mine}", f"teacher-{theirs}"), made / f"texts-{theirs}.json"
    watched = WATCHED if job.seed == TUNING_SEED else None
    if job.way in TRL:
        told_job = {"sides": sides, "made": str(made), "texts": str(texts), "watched": watched}
        return trl({**asdict(job), **told_job}, TRL[job.way])
    student, teacher = (loaded(side, made) for side in sides)
    way = WAYS[job.way]
    recipe = recipe_of(way.terms, job.batch, job.steps, job.seed, job.lr)
    recipe = recipe.replace(on_policy=way.own, top_p=way.top_p)
    prompts = train_prompts(job.sizes) if way.own == 1.0 else kept(texts)
    grader = None if way.terms == (Term("sft"),) else teacher
    clock = CpuSeconds()
    distill(student, grader, prompts, recipe, saving=Saving(), progress=clock)
    return {**measures(student, teacher, heldout(job.sizes)[:watched]), "cpu_s": round(clock.spent[-1], 2)}


def recipe_of(terms: Sequence[Term], batch: int, steps: int, seed: int, lr: float) -> Recipe:
    """Steps of ``batch`` completions, one of each prompt."""
    return Recipe(
        objectives=tuple(terms),
        max_new_tokens=SAMPLING.max_new_tokens,
        num_generations=1,
        prompts_per_step=batch,
        micro_batch_size=batch,
        generation_batch_size=64,
        steps=steps,
        seed=seed,
        lr=lr,
    )


def trl(job: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The same by TRL's trainer, in its own environment; where it fails, its error."""
    told_job = json.dumps({**job, "options": options})
    done = subprocess.run(
        [str(PEERS), "-m", "benchmarks.claims.trl_gold", told_job],
        cwd=PEERS.parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def table(data: Mapping[str, Any]) -> str:
    """A table for each pair, best first."""
    parts = []
    head = ("right", "reverse KL/byte", "bytes", "stopped", "CPU s", "lr")
    for pair, sides in data["pairs"].items():
        rows = sorted(
            (row for row in data["rows"] if row["pair"] == pair),
            key=lambda row: -row["accuracy"]["mean"] if "accuracy" in row else 1.0,
        )
        lines = [_line(row) for row in rows]
        start = [*_line(row("*start*", pair, 0.0, [{**sides["start"], "cpu_s": 0.0}]))[:5], "", ""]
        teacher = ["*teacher*", f"{sides['teacher']['accuracy']:.1%}", *[""] * 5]
        title = f"{pair}: `{sides['student']['reads']}` ← `{sides['teacher']['reads']}`".replace("|", "·")
        parts.append(markdown([title, *head], [teacher, *lines, start]))
    return "\n\n".join(parts)


def _line(row: Mapping[str, Any]) -> list[str]:
    if "error" in row:
        return [row["way"], f"failed: {row['error']}".replace("|", "/"), *[""] * 5]
    return [
        row["way"],
        told(row["accuracy"]),
        told(row["reverse_kl_per_byte"], ".2f"),
        told(row["length_bytes"], ".1f"),
        told(row["stop_rate"], ".0%"),
        f"{row['cpu_s']['mean']:.0f}",
        f"{row['lr']:g}",
    ]


def draw(data: Mapping[str, Any], path: Path) -> None:
    """For each pair the accuracy of every way: mean, interval, and each seed."""
    ways = list(dict.fromkeys(row["way"] for row in data["rows"]))[::-1]
    columns = len(data["pairs"])
    names = 0.07 * max(map(len, ways))  # the room of their labels, in inches
    figure, axes = canvas(columns=columns, size=(2.6 + names / columns, 0.3 * len(ways) + 1.4))
    for ax, (pair, sides) in zip(axes[0], data["pairs"].items(), strict=True):
        found = {
            row["way"]: row["accuracy"] for row in data["rows"] if row["pair"] == pair and "accuracy" in row
        }
        for y, way in enumerate(ways):
            if way not in found:
                ax.text(1, y, "failed", fontsize=7, va="center")
                continue
            value = found[way]
            half = 100 * (value["half"] or 0.0)
            ax.barh(y, 100 * value["mean"], color="tab:blue", alpha=0.35, xerr=half, ecolor="0.3")
            ax.plot(
                [100 * seed for seed in value["seeds"]],
                [y] * len(value["seeds"]),
                "o",
                ms=3,
                color="tab:blue",
            )
        ax.axvline(100 * sides["teacher"]["accuracy"], color="0.3", ls="--", lw=1)
        ax.axvline(100 * sides["student"]["accuracy"], color="0.6", ls=":", lw=1)
        ax.set_yticks(range(len(ways)), ways if ax is axes[0][0] else [""] * len(ways), fontsize=8)
        ax.set(xlim=(0, 101), xlabel="answered right, %")
        ax.set_title(pair, fontsize=9)
        ax.grid(axis="x", alpha=0.3)
    save(figure, path)
