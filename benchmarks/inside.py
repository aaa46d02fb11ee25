"""`python -m benchmarks inside`: a real pair, trained on every byte, on one-to-one chunks alone, and ways in between.

SmolLM2-135M-Instruct learns from Gemma-3-270M with the same prompts, seeds and steps each way, so that the ways differ
only in what is compared inside the chunks in which one side has several tokens. Each seed's result is told beside that
of the first way with the same seed. Runs that are done are kept in a folder and not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.assets import assets_folder
from benchmarks.record import device_name, write_record
from gold.data import load_prompts, split_by_hash
from gold.evaluate import EvaluationPlan, evaluate
from gold.models.load import load_model
from gold.teachers.local import LocalTeacher
from gold.train.loop import distill
from gold.train.recipe import Recipe, Term
from gold.train.trackers import Tracker

STUDENT, TEACHER = "smollm2-135m-instruct", "gemma3-270m"
WAYS: dict[str, Term] = {
    "every byte": Term("reverse_kl"),
    "bytes of one-to-one chunks": Term("reverse_kl", where="one_to_one"),
    "prefixes, every state": Term("reverse_kl", support="prefix"),
    "chunk likelihoods": Term("alm"),
}
MEASURES = ("reverse_kl_per_byte", "forward_kl_per_byte", "bits_per_byte")


class _CpuSeconds(Tracker):
    """Processor seconds of the steps, evaluations left out."""

    def __init__(self) -> None:
        self.started = time.process_time()
        self.last = 0.0

    def log(self, kind: str, record: Any) -> None:
        """Notes the time of a step."""
        if kind == "train":
            self.last = time.process_time() - self.started


def run(way: str | None, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Measures on held-out prompts after the steps; without a way, before them."""
    student, teacher = (load_model(assets_folder() / name, dtype="float32") for name in (STUDENT, TEACHER))
    train, heldout = split_by_hash(load_prompts("data/openings.jsonl"), 0.2)
    heldout = heldout[: given.heldout]
    seconds = 0.0
    if way is not None:
        recipe = Recipe(
            objectives=(WAYS[way],),
            max_new_tokens=given.tokens,
            num_generations=1,
            prompts_per_step=4,
            micro_batch_size=4,
            steps=given.steps,
            warmup_steps=2,
            lr=3e-5,
            seed=seed,
        )
        clock = _CpuSeconds()
        distill(student, teacher, train, recipe, progress=clock)
        seconds = clock.last
    plan = EvaluationPlan(max_new_tokens=given.tokens, samples=0, micro_batch_size=4)
    measures = evaluate(student, LocalTeacher(teacher), heldout, plan=plan).measures
    return {"way": way, "seed": seed, "measures": measures, "cpu_s": seconds}


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks inside", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each way")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of 4 completions")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a completion")
    parser.add_argument("--heldout", type=int, default=16, help="held-out prompts")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/inside"), help="where finished runs are kept"
    )
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/results")
    given = parser.parse_args(list(arguments))
    started = time.perf_counter()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    kept = given.folder / f"{given.steps}-{given.tokens}-{given.heldout}.jsonl"
    lines = map(json.loads, kept.read_text().splitlines()) if kept.exists() else ()
    found = {(r["way"], r["seed"]): r for r in lines}
    jobs = [(None, 0), *((way, seed) for seed in range(given.seeds) for way in WAYS)]
    for way, seed in jobs:
        if (way, seed) not in found:
            found[way, seed] = run(way, seed, given)
            with kept.open("a") as file:
                file.write(json.dumps(found[way, seed]) + "\n")
        measures = found[way, seed]["measures"]
        told = ", ".join(f"{name} {measures[name]:.4f}" for name in MEASURES)
        print(f"{way or 'before'}, seed {seed}: {told}", flush=True)
    rows = [_row(way, [found[way, seed] for seed in range(given.seeds)], found) for way in WAYS]
    print("\n" + table(rows, found[None, 0]["measures"]))
    if given.record:
        data = {"before": found[None, 0]["measures"], "rows": rows}
        command = f"python -m benchmarks inside --seeds {given.seeds} --steps {given.steps} --record"
        seconds = time.perf_counter() - started
        print(write_record("inside", data, command=command, seconds=seconds, device=device_name("cpu", 1)))
    return 0


def _row(way: str, results: Sequence[dict[str, Any]], found: dict[Any, Any]) -> dict[str, Any]:
    first = next(iter(WAYS))
    row: dict[str, Any] = {"name": way, "cpu_s": [r["cpu_s"] for r in results]}
    for name in (*MEASURES, "canonical_share", "one_to_one_share"):
        row[name] = [r["measures"][name] for r in results]
    row["less_first"] = [
        r["measures"][MEASURES[0]] - found[first, r["seed"]]["measures"][MEASURES[0]] for r in results
    ]
    return row


def table(rows: Sequence[dict[str, Any]], before: dict[str, float]) -> str:
    """The rows as Markdown."""
    lines = [
        "| compared | reverse KL/byte | beside the first, same seed | forward KL/byte | bits/byte | CPU s |",
        "|---|" + "---:|" * 5,
        f"| *before* | {' | '.join(f'{before[m]:.3f}' for m in (MEASURES[0],))} | | "
        f"{before[MEASURES[1]]:.3f} | {before[MEASURES[2]]:.3f} | |",
    ]
    for row in rows:
        spread = stdev(row["less_first"]) if len(row["less_first"]) > 1 else 0.0
        lines.append(
            f"| {row['name']} | {mean(row[MEASURES[0]]):.3f} | {mean(row['less_first']):+.4f} ± {spread:.4f} | "
            f"{mean(row[MEASURES[1]]):.3f} | {mean(row[MEASURES[2]]):.3f} | {mean(row['cpu_s']):.0f} |"
        )
    return "\n".join(lines)
