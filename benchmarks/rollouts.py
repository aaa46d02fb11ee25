"""`python -m benchmarks rollouts`: completions of the initial student beside live ones, and completions that are cut
short kept beside left out; the demonstration's task and a real pair, with seeds.

All ways of a part start from the same student and have the same prompts. Those of the initial student are told after as
many steps as the live ones, and once more after as much processor time. Runs that are done are kept in a folder and not
repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.assets import assets_folder
from benchmarks.record import device_name, write_record
from gold.data import load_prompts, split_by_hash
from gold.demo.run import SAMPLING, TASK, DemoPlan, make_start, make_teacher
from gold.evaluate import EvaluationPlan, evaluate
from gold.models.language_model import LanguageModel
from gold.models.load import load_model
from gold.teachers.several import Teachers
from gold.train.recipe import Recipe
from gold.train.setup import Setup
from gold.train.state import TrainState
from gold.train.step import train_step, warm_up

PLAN = DemoPlan(prompts=400, heldout=512, start_accuracy=0.12)
HORIZON = 4
"""Tokens of a completion where some are to be cut: a third of the right answers have five, the stop included."""
DEMO = Recipe(
    max_new_tokens=SAMPLING.max_new_tokens,
    num_generations=1,
    prompts_per_step=48,
    generation_batch_size=64,
    micro_batch_size=48,
    schedule="constant",
    lr=2e-3,
)
PAIR = Recipe(
    max_new_tokens=24,
    num_generations=1,
    prompts_per_step=4,
    micro_batch_size=4,
    schedule="constant",
    warmup_steps=2,
    lr=5e-5,
)
SHORT = DEMO.replace(max_new_tokens=HORIZON)
PARTS: dict[str, dict[str, Recipe]] = {
    "demo": {"live": DEMO, "initial": DEMO.replace(policy="initial")},
    "pair": {"live": PAIR, "initial": PAIR.replace(policy="initial")},
    "cut": {"keep": SHORT, "mask": SHORT.replace(cut="mask")},
}
MEASURES = ("accuracy", "reverse_kl_per_byte", "forward_kl_per_byte", "bits_per_byte", "stop_rate")
WATCHED = ("staleness", "policy_log_ratio_abs", "policy_kl", "masked_sequences", "stop_rate")


class Material:
    """Models, prompts and measures of a part."""

    def __init__(self, part: str, folder: Path, given: argparse.Namespace) -> None:
        self.task = None if part == "pair" else TASK
        if part == "pair":
            self.folders = [assets_folder() / name for name in ("smollm2-135m-instruct", "gemma3-270m")]
            train, heldout = split_by_hash(load_prompts("data/openings.jsonl"), 0.2)
            self.prompts, self.heldout = train[: given.pair_prompts], heldout[: given.pair_heldout]
            self.plan = EvaluationPlan(max_new_tokens=PAIR.max_new_tokens, samples=0, micro_batch_size=4)
            self.steps = given.pair_steps
            return
        self.folders = [folder / "student-start", folder / "teacher"]
        if not self.folders[1].is_dir():
            made = {"teacher": asdict(make_teacher(folder, PLAN)), "start": asdict(make_start(folder, PLAN))}
            (folder / "made.json").write_text(json.dumps(made))
        self.prompts, self.heldout = (
            [replace(p, completion=None) for p in TASK.prompts(split, size, PLAN.seed)]
            for split, size in (("train", PLAN.prompts), ("heldout", PLAN.heldout))
        )
        self.plan = EvaluationPlan(
            max_new_tokens=SAMPLING.max_new_tokens,
            samples=0,
            generation_batch_size=256,
            micro_batch_size=128,
        )
        self.steps = given.steps

    def models(self) -> tuple[LanguageModel, Teachers]:
        """The initial student and its teacher."""
        student, teacher = (load_model(folder, dtype="float32") for folder in self.folders)
        return student, Teachers({"teacher": teacher})

    def measures(self, student: LanguageModel, teachers: Teachers) -> dict[str, float]:
        """Those of held-out prompts."""
        return evaluate(student, teachers, self.heldout, plan=self.plan, verifier=self.task).measures


def run(material: Material, recipe: Recipe, processor_s: float | None) -> list[dict[str, Any]]:
    """Steps, processor seconds and measures after ``material.steps``, and with ``processor_s`` once more after that
    time; drawing what is drawn before the first step counts."""
    student, teachers = material.models()
    setup = Setup.of(student, teachers, material.prompts, recipe)
    state = TrainState(student, teachers, recipe, Accelerator(cpu=True))
    warm_up(state, setup)
    spent, told, sums = 0.0, list[dict[str, Any]](), dict[str, float]()
    for step in count(1):
        begun = time.process_time()
        metrics = train_step(state, setup).metrics
        spent += time.process_time() - begun
        for name in WATCHED:
            sums[name] = sums.get(name, 0.0) + float(metrics.get(name, 0.0))
        enough = step >= material.steps and (processor_s is None or spent >= processor_s)
        if step == material.steps or enough:
            row = {"steps": step, "cpu_s": spent, "rollout_s": metrics["rollout_s"]}
            row["last_step"] = {name: metrics[name] for name in WATCHED if name in metrics}
            row["mean"] = {name: total / step for name, total in sums.items()}
            told.append(row | {"measures": material.measures(student, teachers)})
        if enough:
            return told
    raise AssertionError


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks rollouts", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each way")
    parser.add_argument(
        "--steps", type=int, default=200, help="of 48 completions, on the demonstration's task"
    )
    parser.add_argument("--pair-steps", type=int, default=12, help="of 4 completions, for the real pair")
    parser.add_argument("--pair-prompts", type=int, default=16)
    parser.add_argument("--pair-heldout", type=int, default=24)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/rollouts"), help="where finished runs are kept"
    )
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/results")
    given = parser.parse_args(list(arguments))
    started = time.perf_counter()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {}
    for part in given.parts:
        data[part] = measured(part, given)
        print(table(part, data[part]), flush=True)
    if given.record:
        command = " ".join(["python -m benchmarks rollouts", *arguments])
        seconds = time.perf_counter() - started
        name = f"rollouts-{given.parts[0]}" if len(given.parts) == 1 else "rollouts"
        print(write_record(name, data, command=command, seconds=seconds, device=device_name("cpu", 1)))
    return 0


def measured(part: str, given: argparse.Namespace) -> dict[str, Any]:
    """What every way of a part came to, by seed, and the measures before the first step."""
    made: dict[str, Material] = {}

    def material() -> Material:
        return made.setdefault(part, Material(part, given.folder, given))

    def kept(name: str, work: Callable[[], Any]) -> Any:
        file = given.folder / f"{part}-{name}.json"
        if not file.exists():
            file.write_text(json.dumps(work()))
        return json.loads(file.read_text())

    before = kept("before", lambda: material().measures(*material().models()))
    ways: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in PARTS[part]}
    for seed in range(given.seeds):
        for way, recipe in PARTS[part].items():
            first = ways["live"][seed][0]["cpu_s"] if recipe.policy == "initial" else None
            recipe = recipe.replace(seed=seed, steps=10**5)
            rows = kept(f"{way}-{seed}", lambda r=recipe, f=first: run(material(), r, f))  # type: ignore[misc]
            ways[way].append(rows)
            for row in rows:
                print(f"{part}, {way}, seed {seed}: {told(row)}", flush=True)
    return {"before": before, "ways": ways}


def told(row: Mapping[str, Any]) -> str:
    """A result in a line."""
    found = ", ".join(f"{name} {row['measures'][name]:.4f}" for name in MEASURES if name in row["measures"])
    return f"{row['steps']} steps, {row['cpu_s']:.0f} CPU s: {found}"


def table(part: str, data: Mapping[str, Any]) -> str:
    """The ways as Markdown: means over seeds, and how far the seeds lie apart; of differences from the first way with
    the same seed."""
    names = [name for name in MEASURES if name in data["before"]]
    first = next(iter(data["ways"]))
    lines = [f"| {part} | steps | CPU s | " + " | ".join(names) + " |", "|---|" + "---:|" * (2 + len(names))]
    start = " | ".join(f"{data['before'][name]:.3f}" for name in names)
    lines.append(f"| *before* | | | {start} |")
    for way, seeds in data["ways"].items():
        for place in range(len(seeds[0])):
            rows = [rows[place] for rows in seeds]
            cells = []
            for name in names:
                values = [row["measures"][name] for row in rows]
                less = [v - r[0]["measures"][name] for v, r in zip(values, data["ways"][first], strict=True)]
                apart = stdev(less) if len(less) > 1 else 0.0
                beside = "" if way == first else f" ({mean(less):+.3f} ± {apart:.3f})"
                cells.append(f"{mean(values):.3f}{beside}")
            steps, spent = (mean(row[name] for row in rows) for name in ("steps", "cpu_s"))
            lines.append(f"| {way} | {steps:.0f} | {spent:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)
