"""`python -m benchmarks objectives`: every objective on the demonstration's task, several seeds, equal prompts.

Each way starts from the same student and gets the same prompts and steps; its learning rate is the best of a few on a
seed that is used for nothing else. Runs that are done are kept in a folder and not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.record import RESULTS, device_name, write_record
from gold.demo.run import SAMPLING, TASK, CpuSeconds, DemoPlan, _heldout, _taught, make_start, make_teacher
from gold.evaluate import EvaluationPlan, evaluate
from gold.models.load import load_model
from gold.teachers.local import LocalTeacher
from gold.train.loop import Saving, distill
from gold.train.recipe import Recipe, Term

TUNING_SEED = 1000
RATES = (3e-4, 1e-3, 2e-3)
LOW_RATES = (1e-4, 3e-4, 1e-3)
TEXT_RATES = (5e-4, 1e-3)
ENOUGH = 0.9
"""Share of the teacher's accuracy whose price in completions is told."""


@dataclass(frozen=True)
class Way:
    """One way of spending the prompts."""

    terms: tuple[Term, ...]
    rates: tuple[float, ...] = RATES
    on_policy: float = 1.0
    num_generations: int = 1
    text: str = ""
    """which of the teacher's texts it learns from, where it does: "sampled" or "greedy" """
    note: str = ""


def _on(support: str, **options: Any) -> dict[str, Any]:
    return {"support": support, **options}


WAYS: dict[str, Way] = {
    "reverse_kl on bytes": Way((Term("reverse_kl"),)),
    "forward_kl on bytes": Way((Term("forward_kl"),)),
    "jsd on bytes": Way((Term("jsd"),)),
    "skew_kl on bytes": Way((Term("skew_kl"),)),
    "skew_reverse_kl on bytes": Way((Term("skew_reverse_kl"),)),
    "entropy_aware_kl on bytes, from 0.1 nats": Way((Term("entropy_aware_kl", threshold=0.1),)),
    "reverse_kl on bytes + 0.1 forward_kl": Way((Term("reverse_kl"), Term("forward_kl", weight=0.1))),
    "reverse_kl on bytes, half-life 5 bytes": Way((Term("reverse_kl", half_life=5.0),)),
    "reverse_kl on bytes, one-to-one chunks": Way((Term("reverse_kl", where="one_to_one"),), LOW_RATES),
    "forward_kl on bytes, one-to-one chunks": Way((Term("forward_kl", where="one_to_one"),), LOW_RATES),
    "forward_kl on prefixes": Way((Term("forward_kl", **_on("prefix")),)),
    "forward_kl on prefixes, one-to-one chunks": Way(
        (Term("forward_kl", **_on("prefix", where="one_to_one")),), LOW_RATES
    ),
    "reverse_kl on prefixes": Way((Term("reverse_kl", **_on("prefix")),)),
    "forward_kl on shared tokens": Way((Term("forward_kl", **_on("shared")),), LOW_RATES),
    "reverse_kl on shared tokens": Way((Term("reverse_kl", **_on("shared")),), LOW_RATES),
    "span_pg": Way((Term("span_pg"),), LOW_RATES),
    "span_pg, clip 3, baseline": Way((Term("span_pg", clip=3.0, baseline="others"),), LOW_RATES),
    "span_pg, penalty 2": Way((Term("span_pg", noncanonical_penalty=2.0),), LOW_RATES),
    "token_pg": Way((Term("token_pg"),), LOW_RATES),
    "token_pg, clip 3, baseline": Way((Term("token_pg", clip=3.0, baseline="others"),), LOW_RATES),
    "uld": Way((Term("uld"),), LOW_RATES),
    "gold": Way((Term("gold"),), LOW_RATES),
    "alm": Way((Term("alm"),), LOW_RATES),
    "x_token": Way((Term("x_token"),), LOW_RATES),
    "reverse_kl on bytes + reference_kl": Way((Term("reverse_kl"), Term("reference_kl", weight=0.1))),
    "sft on sampled teacher text": Way((Term("sft"),), TEXT_RATES, on_policy=0.0, text="sampled"),
    "sft on greedy teacher text": Way((Term("sft"),), TEXT_RATES, on_policy=0.0, text="greedy"),
    "reward": Way((Term("reward"),), LOW_RATES, num_generations=8),
    "reverse_kl on bytes + reward": Way((Term("reverse_kl"), Term("reward", weight=0.1)), num_generations=8),
}


@dataclass(frozen=True)
class Job:
    """One run: a way, a learning rate, a seed, a number of steps."""

    way: str
    lr: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        """Its name among the runs that are kept."""
        return f"{self.way} lr={self.lr:g} seed={self.seed} steps={self.steps}"


def run(job: Job, folder: Path, plan: DemoPlan) -> dict[str, Any]:
    """What came of one run: measures at the end on all held-out prompts, and a curve on some of them."""
    torch.set_num_threads(1)
    way = WAYS[job.way]
    student, teacher = load_model(folder / "student-start"), load_model(folder / "teacher")
    prompts = [replace(p, completion=None) for p in TASK.prompts("train", plan.prompts, plan.seed)]
    if way.text:
        prompts = _taught(teacher, prompts, plan.seed, greedy=way.text == "greedy")
    recipe = Recipe(
        objectives=way.terms,
        max_new_tokens=SAMPLING.max_new_tokens,
        num_generations=way.num_generations,
        prompts_per_step=48 // way.num_generations,
        on_policy=way.on_policy,
        generation_batch_size=64,
        micro_batch_size=48,
        steps=job.steps,
        seed=job.seed,
        lr=job.lr,
    )
    heldout = _heldout(plan)[: plan.watched if job.seed == TUNING_SEED else None]
    clock = CpuSeconds()
    evaluation = EvaluationPlan(
        max_new_tokens=SAMPLING.max_new_tokens, samples=0, generation_batch_size=256, micro_batch_size=128
    )
    done = distill(
        student,
        None if way.on_policy == 0.0 else teacher,
        prompts,
        recipe,
        heldout=heldout[: plan.watched],
        verifier=TASK,
        evaluation=evaluation,
        saving=Saving(evaluate_every=plan.evaluate_every),
        progress=clock,
    )
    final = evaluate(student, LocalTeacher(teacher), heldout, plan=evaluation, verifier=TASK).measures
    curve = [
        {"step": e["step"], "cpu_s": clock.spent[e["step"]], "accuracy": e["accuracy"]}
        for e in done.evaluations
    ]
    return {"job": asdict(job), "final": final, "curve": curve, "cpu_s": clock.spent[-1]}


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks objectives", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each way")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of 48 completions")
    parser.add_argument(
        "--tuning-steps", type=int, default=100, help="steps of the runs that choose a learning rate"
    )
    parser.add_argument("--prompts", type=int, default=400, help="prompts that all ways share")
    parser.add_argument("--only", nargs="*", default=list(WAYS), help="these ways alone")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/objectives"), help="where finished runs are kept"
    )
    parser.add_argument("--dry", action="store_true", help="print, and write no record")
    given = parser.parse_args(list(arguments))
    started = time.perf_counter()
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    plan = DemoPlan(prompts=given.prompts, heldout=512, start_accuracy=0.12, evaluate_every=50, watched=128)
    kept = folder / "runs.jsonl"
    found = {r["key"]: r for r in map(json.loads, kept.read_text().splitlines())} if kept.exists() else {}
    if not (folder / "teacher").is_dir():
        torch.set_num_threads(1)
        made = {"teacher": asdict(make_teacher(folder, plan)), "start": asdict(make_start(folder, plan))}
        (folder / "made.json").write_text(json.dumps(made))
    made = json.loads((folder / "made.json").read_text())

    def all_of(jobs: Sequence[Job]) -> None:
        missing = [job for job in jobs if job.key not in found]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(given.workers, mp_context=context) as pool, kept.open("a") as file:
            running = {pool.submit(run, job, folder, plan): job for job in missing}
            for n, future in enumerate(as_completed(running), start=1):
                job = running[future]
                found[job.key] = {"key": job.key, **future.result()}
                file.write(json.dumps(found[job.key]) + "\n")
                file.flush()
                accuracy = found[job.key]["final"]["accuracy"]
                print(f"{n:>4}/{len(running)} {job.key}: {accuracy:.1%}", flush=True)

    ways = [name for name in WAYS if name in given.only]
    tuning = {
        name: [Job(name, lr, TUNING_SEED, given.tuning_steps) for lr in WAYS[name].rates] for name in ways
    }
    all_of([job for jobs in tuning.values() for job in jobs])
    best = {name: max(jobs, key=lambda job: _quality(found[job.key])).lr for name, jobs in tuning.items()}
    jobs = {name: [Job(name, best[name], seed, given.steps) for seed in range(given.seeds)] for name in ways}
    all_of([job for each in jobs.values() for job in each])

    rows = [_row(name, best[name], [found[job.key] for job in jobs[name]], made) for name in ways]
    print(table(rows, made))
    if not given.dry:
        data = {"plan": asdict(plan), "steps": given.steps, "made": made, "rows": rows}
        device = device_name("cpu", 1) + f" a process, {given.workers} processes"
        command = f"python -m benchmarks objectives --seeds {given.seeds} --steps {given.steps}"
        write_record(
            "objectives", data, command=command, seconds=time.perf_counter() - started, device=device
        )
        (RESULTS / "objectives.md").write_text(table(rows, made) + "\n", encoding="utf-8")
        draw(rows, made, RESULTS / "objectives.png")
    return 0


def _quality(result: dict[str, Any]) -> tuple[float, float]:
    """Accuracy, and among equals the lower reverse KL; runs that ended in not-a-number last."""
    gap = result["final"].get("reverse_kl_per_byte", math.inf)
    return result["final"]["accuracy"], -gap if math.isfinite(gap) else -math.inf


def _row(name: str, lr: float, results: Sequence[dict[str, Any]], made: dict[str, Any]) -> dict[str, Any]:
    """One line of the table: means over seeds and how far the seeds lie apart."""

    def over(measure: str) -> list[float]:
        return [float(r["final"].get(measure, math.nan)) for r in results]

    enough = ENOUGH * made["teacher"]["accuracy"]
    reached = [next((p["step"] * 48 for p in r["curve"] if p["accuracy"] >= enough), None) for r in results]
    row: dict[str, Any] = {"name": name, "lr": lr, "accuracy": over("accuracy"), "completions_to_90": reached}
    for measure in (
        "reverse_kl_per_byte",
        "forward_kl_per_byte",
        "canonical_share",
        "length_bytes",
        "stop_rate",
    ):
        row[measure] = over(measure)
    row["cpu_s"] = [r["cpu_s"] for r in results]
    row["at_15_cpu_s"] = [_at(r["curve"], 15.0) for r in results]
    row["curves"] = [r["curve"] for r in results]
    return row


def _at(curve: Sequence[dict[str, float]], seconds: float) -> float:
    """Accuracy after that many processor seconds, from the points on either side."""
    for before, after in itertools.pairwise(curve):
        if before["cpu_s"] <= seconds <= after["cpu_s"]:
            share = (seconds - before["cpu_s"]) / max(1e-9, after["cpu_s"] - before["cpu_s"])
            return before["accuracy"] + share * (after["accuracy"] - before["accuracy"])
    return curve[-1]["accuracy"]


def table(rows: Sequence[dict[str, Any]], made: dict[str, Any]) -> str:
    """The rows as Markdown, best first."""
    head = (
        "objective",
        "right",
        "± seeds",
        "after 15 CPU s",
        "completions to 90 % of the teacher",
        "reverse KL/byte",
        "canonical",
        "bytes",
        "lr",
    )
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    lines.append(f"| *teacher* | {made['teacher']['accuracy']:.1%} |" + " |" * (len(head) - 2))
    for row in sorted(rows, key=lambda r: -mean(r["accuracy"])):
        reached = [c for c in row["completions_to_90"] if c is not None]
        price = f"{mean(reached):,.0f}" if len(reached) == len(row["completions_to_90"]) else "not reached"
        spread = stdev(row["accuracy"]) if len(row["accuracy"]) > 1 else 0.0
        lines.append(
            f"| {row['name']} | {mean(row['accuracy']):.1%} | {spread:.1%} | {mean(row['at_15_cpu_s']):.1%} | "
            f"{price} | {mean(row['reverse_kl_per_byte']):.3f} | {mean(row['canonical_share']):.0%} | "
            f"{mean(row['length_bytes']):.1f} | {row['lr']:g} |"
        )
    lines.append(f"| *start* | {made['start']['accuracy']:.1%} |" + " |" * (len(head) - 2))
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], made: dict[str, Any], path: Path) -> None:
    """Accuracy of every way, each seed a point, best first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ordered = sorted(rows, key=lambda r: mean(r["accuracy"]))
    figure: Any = Figure(figsize=(8.0, 0.26 * len(rows) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for y, row in enumerate(ordered):
        axes.barh(y, 100 * mean(row["accuracy"]), color="tab:blue", alpha=0.35)
        axes.plot([100 * a for a in row["accuracy"]], [y] * len(row["accuracy"]), "o", ms=3, color="tab:blue")
    axes.axvline(100 * made["teacher"]["accuracy"], color="0.3", ls="--", lw=1)
    axes.axvline(100 * made["start"]["accuracy"], color="0.6", ls=":", lw=1)
    axes.set_yticks(range(len(ordered)), [row["name"] for row in ordered], fontsize=8)
    axes.set(xlabel="held-out prompts answered right, % (dotted: start, dashed: teacher)", xlim=(0, 101))
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
