"""`python -m benchmarks adapters`: full training, LoRA and QLoRA of a real pair, each for the same processor time.

SmolLM2-135M-Instruct learns from Gemma-3-270M with the same prompts and seeds each way; a way takes as many steps as
fit into `--budget` seconds that its process was on a processor, so that other programs do not count. The learning rate
of a way is chosen before, on a seed and held-out prompts of its own and in half the time: three rates around that of
its `WAYS`, and further ones while the best is at an end. Told are the weights of the student, the peak memory of the
process over the loaded models, the seconds of a step, and the reverse KL on held-out prompts; a quantized student is
measured as it is saved, merged into the numbers that its weights stand for, and merged into the original weights too.
Each run is a process of its own. Runs that are done are kept in a folder and not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.assets import assets_folder
from benchmarks.meter import MIB, Meter
from benchmarks.record import device_name, write_record
from gold.data import load_prompts, split_by_hash
from gold.evaluate import EvaluationPlan, evaluate
from gold.models.adapters import MergedWeights, adapter_state, add_adapters
from gold.models.language_model import LanguageModel
from gold.models.load import load_model
from gold.teachers.local import LocalTeacher
from gold.train.loop import distill
from gold.train.recipe import Recipe
from gold.train.trackers import RunInfo, Tracker

STUDENT, TEACHER = "smollm2-135m-instruct", "gemma3-270m"
# The middle of the learning rates that are tried, quantization, adapters.
WAYS: dict[str, tuple[float, str | None, bool]] = {
    "full": (1e-4, None, False),
    "LoRA": (1e-3, None, True),
    "QLoRA": (1e-3, "nf4", True),
}
_TUNING_SEED = 100
_MOST_RATES = 5


class _TimeIsOverError(Exception):
    """Ends a run."""


class _Budget(Tracker):
    """Ends a run after its processor seconds; counts steps."""

    def __init__(self, budget_s: float) -> None:
        self.budget_s, self.started, self.seconds, self.steps = budget_s, 0.0, 0.0, 0

    def start(self, run: RunInfo) -> None:
        """The clock starts once models and prompts are checked."""
        self.started = time.process_time()

    def log(self, kind: str, record: Any) -> None:
        """Notes the time of a step."""
        if kind != "train":
            return
        self.steps, self.seconds = self.steps + 1, time.process_time() - self.started
        if self.seconds + 0.5 * self.seconds / self.steps > self.budget_s:
            raise _TimeIsOverError


def student_of(way: str, seed: int) -> LanguageModel:
    """The student of a way, before training."""
    _, quantization, adapted = WAYS[way]
    model = load_model(assets_folder() / STUDENT, dtype="float32", quantization=quantization)
    return add_adapters(model, seed=seed) if adapted else model


def run(way: str, seed: int, lr: float, given: argparse.Namespace) -> dict[str, Any]:
    """What a way costs, and what it reaches."""
    torch.set_num_threads(1)
    student, teacher = student_of(way, seed), load_model(assets_folder() / TEACHER, dtype="float32")
    tuning = seed == _TUNING_SEED
    train, heldout = _prompts(given, tuning)
    recipe = Recipe(
        max_new_tokens=given.tokens, num_generations=1, prompts_per_step=4, micro_batch_size=4, steps=1000,
        warmup_steps=1, schedule="constant", lr=lr, seed=seed,
    )  # fmt: skip
    if not tuning:  # kernels are compiled, and memory is used for the first time
        distill(student, teacher, train, recipe.replace(steps=1, lr=1e-30))
    meter, budget = Meter(torch.device("cpu")), _Budget(given.budget / 2 if tuning else given.budget)
    mark = meter.start()
    with contextlib.suppress(_TimeIsOverError):
        distill(student, teacher, train, recipe, trackers=[budget])
    peak = meter.stop(mark).peak_bytes
    weights = sum(t.numel() * t.element_size() for t in student.lm.state_dict().values())
    found = {"way": way, "seed": seed, "lr": lr, "steps": budget.steps}
    found |= {"step_s": budget.seconds / max(1, budget.steps), "weights_mib": weights / MIB}
    found |= {"peak_mib": (peak or 0) / MIB}
    measured = partial(_kl, student, LocalTeacher(teacher), heldout, given)
    if not WAYS[way][2]:
        return found | {"kl": measured(student.lm)}
    merged = load_model(assets_folder() / STUDENT, dtype="float32")
    merged.lm.load_state_dict(dict(MergedWeights(student.lm)))
    found |= {"kl": measured(merged.lm)}
    if tuning or WAYS[way][1] is None:
        return found
    whole = add_adapters(load_model(assets_folder() / STUDENT, dtype="float32"))
    with torch.no_grad():
        for name, tensor in adapter_state(whole.lm).items():
            tensor.copy_(adapter_state(student.lm)[name])
    return found | {"kl_on_original_weights": measured(whole.lm)}


def before(given: argparse.Namespace) -> dict[str, Any]:
    """The held-out reverse KL of the student before training, whole and quantized."""
    torch.set_num_threads(1)
    teacher = LocalTeacher(load_model(assets_folder() / TEACHER, dtype="float32"))
    heldout, found = _prompts(given, False)[1], {}
    for way in ("full", "QLoRA"):
        student = student_of(way, 0)
        plain = load_model(assets_folder() / STUDENT, dtype="float32")
        if way != "full":
            plain.lm.load_state_dict(dict(MergedWeights(student.lm)))
        found[way] = _kl(plain, teacher, heldout, given, plain.lm)
    return {"way": "before", "seed": 0, "lr": 0.0, **found}


def _prompts(given: argparse.Namespace, tuning: bool) -> tuple[Any, Any]:
    """Prompts to train on, and held-out ones; those on which rates are chosen are others."""
    train, heldout = split_by_hash(load_prompts("data/openings.jsonl"), 0.2)
    first = given.heldout if tuning else 0
    return train, heldout[first : first + given.heldout]


def _kl(
    student: LanguageModel, teacher: LocalTeacher, heldout: Any, given: argparse.Namespace, lm: Any
) -> float:
    plan = EvaluationPlan(max_new_tokens=given.tokens, samples=0, micro_batch_size=4)
    measures = evaluate(replace(student, lm=lm), teacher, heldout, plan=plan).measures
    return float(measures["reverse_kl_per_byte"])


class Runs:
    """Runs, each in a process of its own, and the file of those that are done."""

    def __init__(self, given: argparse.Namespace, arguments: Sequence[str]) -> None:
        given.folder.mkdir(parents=True, exist_ok=True)
        self.arguments = list(arguments)
        self.kept = given.folder / f"{given.budget:g}-{given.tokens}-{given.heldout}.jsonl"
        lines = map(json.loads, self.kept.read_text().splitlines()) if self.kept.exists() else ()
        self.found: dict[Any, dict[str, Any]] = {(r["way"], r["seed"], r["lr"]): r for r in lines}

    def __call__(self, way: str, seed: int = 0, lr: float = 0.0) -> dict[str, Any]:
        """The result of a run."""
        if (way, seed, lr) not in self.found:
            one = json.dumps([way, seed, lr])
            command = [sys.executable, "-m", "benchmarks", "adapters", *self.arguments, "--one", one]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            line = ran.stdout.splitlines()[-1]
            with self.kept.open("a") as file:
                file.write(line + "\n")
            self.found[way, seed, lr] = json.loads(line)
            print(line, flush=True)
        return self.found[way, seed, lr]

    def best_rate(self, way: str) -> tuple[float, dict[str, float]]:
        """The learning rate of a way with the lowest reverse KL, and that of each rate that was tried."""
        middle = WAYS[way][0]
        powers = [-1, 0, 1]
        tried: dict[int, float] = {}
        while True:
            tried |= {p: self(way, _TUNING_SEED, _rate(middle, p))["kl"] for p in powers if p not in tried}
            best = min(tried, key=lambda p: tried[p])
            if min(tried) < best < max(tried) or len(tried) >= _MOST_RATES:
                return _rate(middle, best), {f"{_rate(middle, p):g}": tried[p] for p in sorted(tried)}
            powers = [best - 1, best + 1]


def _rate(middle: float, power: int) -> float:
    """The middle times 1, 3, 10, 30 …"""
    return float(f"{middle * 10 ** (power / 2):.0e}")


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks adapters", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each way")
    parser.add_argument("--budget", type=float, default=240.0, help="processor seconds of a run's steps")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a completion")
    parser.add_argument("--heldout", type=int, default=16, help="held-out prompts")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/adapters"), help="where finished runs are kept"
    )
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(list(arguments))
    if given.one:
        way, seed, lr = json.loads(given.one)
        print(json.dumps(before(given) if way == "before" else run(way, seed, lr, given)))
        return 0
    started, runs = time.perf_counter(), Runs(given, arguments)
    start = runs("before")
    rates = {way: runs.best_rate(way) for way in WAYS}
    rows = {way: [runs(way, seed, rates[way][0]) for seed in range(given.seeds)] for way in WAYS}
    print("\n" + table(rows, start))
    if given.record:
        command = " ".join(["python -m benchmarks adapters", *arguments])
        data = {"before": start, "rates": {way: tried for way, (_, tried) in rates.items()}, "rows": rows}
        seconds = time.perf_counter() - started
        print(write_record("adapters", data, command=command, seconds=seconds, device=device_name("cpu", 1)))
    return 0


def table(rows: dict[str, list[dict[str, Any]]], start: dict[str, Any]) -> str:
    """The ways as Markdown."""
    lines = [
        f"Reverse KL before: {start['full']:.4f}, in nf4 {start['QLoRA']:.4f} nats per byte.\n",
        "| trained | rate | weights, MiB | peak over them, MiB | s/step | steps | reverse KL/byte |",
        "|---|" + "---:|" * 6,
    ]
    for way, results in rows.items():
        kl = [r["kl"] for r in results]
        spread = f" ± {stdev(kl):.4f}" if len(kl) > 1 else ""
        means = [mean(r[name] for r in results) for name in ("weights_mib", "peak_mib", "step_s", "steps")]
        lines.append(
            f"| {way} | {results[0]['lr']:g} | {means[0]:,.0f} | {means[1]:,.0f} | {means[2]:.1f} | {means[3]:.0f} | "
            f"{mean(kl):.4f}{spread} |"
        )
    return "\n".join(lines)
