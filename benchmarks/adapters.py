"""`python -m benchmarks adapters`: full training, LoRA and QLoRA of a real pair, each for the same processor time.

SmolLM2-135M-Instruct learns from Gemma-3-270M with the same prompts and seeds each way; a way takes as many steps as
fit into `--budget` seconds of a processor. Told are the peak memory of the run over what the loaded models hold, the
seconds of a step, and the reverse KL on held-out prompts; a quantized student is measured as it is saved, merged into
the numbers that its weights stand for, and merged into the original weights too. Runs that are done are kept in a
folder and not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.assets import assets_folder
from benchmarks.meter import MIB, Meter
from benchmarks.record import device_name, write_record
from gold.data import load_prompts, split_by_hash
from gold.evaluate import EvaluationPlan, evaluate
from gold.models.adapters import MergedWeights, adapter_state, add_adapters, merged_model
from gold.models.language_model import LanguageModel
from gold.models.load import load_model
from gold.teachers.local import LocalTeacher
from gold.train.loop import distill
from gold.train.recipe import Recipe
from gold.train.trackers import Tracker

STUDENT, TEACHER = "smollm2-135m-instruct", "gemma3-270m"
# Learning rate, quantization, adapters.
WAYS: dict[str, tuple[float, str | None, bool]] = {
    "full": (3e-5, None, False),
    "LoRA": (3e-4, None, True),
    "QLoRA": (3e-4, "nf4", True),
}


class _TimeIsOverError(Exception):
    """Ends a run."""


class _Budget(Tracker):
    """Ends a run after its processor seconds; counts steps."""

    def __init__(self, budget_s: float) -> None:
        self.budget_s, self.started, self.seconds, self.steps = budget_s, time.process_time(), 0.0, 0

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


def run(way: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """What a way costs, and what it reaches; without a budget, where it begins."""
    student, teacher = student_of(way, seed), load_model(assets_folder() / TEACHER, dtype="float32")
    train, heldout = split_by_hash(load_prompts("data/openings.jsonl"), 0.2)
    heldout = heldout[: given.heldout]
    recipe = Recipe(
        max_new_tokens=given.tokens, num_generations=1, prompts_per_step=4, micro_batch_size=4, steps=1000,
        warmup_steps=2, schedule="constant", lr=WAYS[way][0], seed=seed,
    )  # fmt: skip
    plan = EvaluationPlan(max_new_tokens=given.tokens, samples=0, micro_batch_size=4)
    distill(
        student, teacher, train, recipe.replace(steps=1, lr=1e-30)
    )  # kernels, and the first use of memory
    meter, budget = Meter(torch.device("cpu")), _Budget(given.budget)
    mark = meter.start()
    with contextlib.suppress(_TimeIsOverError):
        distill(student, teacher, train, recipe, trackers=[budget])
    peak = meter.stop(mark).peak_bytes

    def kl(lm: Any) -> float:
        measured = evaluate(replace(student, lm=lm), LocalTeacher(teacher), heldout, plan=plan)
        return float(measured.measures["reverse_kl_per_byte"])

    weights = sum(t.numel() * t.element_size() for t in student.lm.state_dict().values())
    found = {"way": way, "seed": seed, "steps": budget.steps, "step_s": budget.seconds / max(1, budget.steps)}
    found |= {"peak_mib": (peak or 0) / MIB, "weights_mib": weights / MIB}
    if WAYS[way][1] is None:
        return found | {"kl": kl(student.lm)}
    merged = load_model(assets_folder() / STUDENT, dtype="float32")
    merged.lm.load_state_dict(dict(MergedWeights(student.lm)))
    whole = add_adapters(load_model(assets_folder() / STUDENT, dtype="float32"))
    with torch.no_grad():
        for name, tensor in adapter_state(whole.lm).items():
            tensor.copy_(adapter_state(student.lm)[name])
    return found | {"kl": kl(merged.lm), "kl_on_original_weights": kl(whole.lm)}


def before(given: argparse.Namespace) -> dict[str, float]:
    """The held-out reverse KL of the student before training, whole and quantized."""
    teacher = LocalTeacher(load_model(assets_folder() / TEACHER, dtype="float32"))
    _, heldout = split_by_hash(load_prompts("data/openings.jsonl"), 0.2)
    plan = EvaluationPlan(max_new_tokens=given.tokens, samples=0, micro_batch_size=4)
    found = {}
    for way in ("full", "QLoRA"):
        student = student_of(way, 0)
        lm = student.lm if way == "full" else merged_model(student.lm)
        if way != "full":
            plain = load_model(assets_folder() / STUDENT, dtype="float32")
            plain.lm.load_state_dict(lm.state_dict())
            student = plain
        measured = evaluate(student, teacher, heldout[: given.heldout], plan=plan).measures
        found[way] = float(measured["reverse_kl_per_byte"])
    return found


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
    given = parser.parse_args(list(arguments))
    started = time.perf_counter()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    kept = given.folder / f"{given.budget:g}-{given.tokens}-{given.heldout}.jsonl"
    lines = map(json.loads, kept.read_text().splitlines()) if kept.exists() else ()
    found = {(r["way"], r["seed"]): r for r in lines}
    jobs = [("before", 0), *((way, seed) for seed in range(given.seeds) for way in WAYS)]
    for way, seed in jobs:
        if (way, seed) not in found:
            one = {"way": way, "seed": seed, **before(given)} if way == "before" else run(way, seed, given)
            found[way, seed] = one
            with kept.open("a") as file:
                file.write(json.dumps(one) + "\n")
        print(json.dumps(found[way, seed]), flush=True)
    rows = {way: [found[way, seed] for seed in range(given.seeds)] for way in WAYS}
    print("\n" + table(rows, found["before", 0]))
    if given.record:
        command = f"python -m benchmarks adapters --seeds {given.seeds} --budget {given.budget:g} --record"
        data = {"before": found["before", 0], "rows": rows, "lr": {way: WAYS[way][0] for way in WAYS}}
        seconds = time.perf_counter() - started
        print(write_record("adapters", data, command=command, seconds=seconds, device=device_name("cpu", 1)))
    return 0


def table(rows: dict[str, list[dict[str, Any]]], start: dict[str, Any]) -> str:
    """The ways as Markdown."""
    lines = [
        f"Reverse KL before: {start['full']:.4f}, in nf4 {start['QLoRA']:.4f} nats per byte.\n",
        "| trained | weights, MiB | peak over them, MiB | s/step | steps | reverse KL/byte |",
        "|---|" + "---:|" * 5,
    ]
    for way, results in rows.items():
        kl = [r["kl"] for r in results]
        spread = f" ± {stdev(kl):.4f}" if len(kl) > 1 else ""
        means = [mean(r[name] for r in results) for name in ("weights_mib", "peak_mib", "step_s", "steps")]
        lines.append(
            f"| {way} | {means[0]:,.0f} | {means[1]:,.0f} | {means[2]:.1f} | {means[3]:.0f} | {mean(kl):.4f}{spread} |"
        )
    return "\n".join(lines)
