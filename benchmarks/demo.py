"""`python -m benchmarks demo [--seeds N]`: the demonstration with several seeds, its table and curves as a record.
`python -m benchmarks demo --prompts N …`: distillation and imitation over the number of prompts, one seed."""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.record import RESULTS, device_name, write_record
from gold.demo.run import DemoPlan, Entry, make_start, make_teacher, one_thread, run_demo, say, spend

COMPARED = "distilled", "kd_sampled", "kd_greedy"


def main(arguments: Sequence[str]) -> int:
    """Exit status; the picture is that of the first seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks demo", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    which.add_argument("--prompts", type=int, nargs="+", metavar="N", help="numbers of prompts to compare")
    given = parser.parse_args(list(arguments))
    started = time.perf_counter()
    if given.prompts:
        name, command = "demo-prompts", " ".join(["--prompts", *map(str, given.prompts)])
        found = over_prompts(given.prompts)
        data: dict[str, Any] = {
            "numbers": [{name: asdict(entry) for name, entry in rows.items()} for rows in found]
        }
        shown = prompts_table(found)
    else:
        name, command = "demo", f"--seeds {given.seeds}"
        found = over_seeds(given.seeds)
        data = {"seeds": [{name: asdict(entry) for name, entry in rows.items()} for rows in found]}
        shown = table(found)
    path = write_record(
        name,
        {"plan": asdict(DemoPlan()), **data},
        command=f"python -m benchmarks demo {command}",
        seconds=time.perf_counter() - started,
        device=device_name("cpu", 1) + " a process, two processes",
    )
    print(f"\n{shown}\n\n{path}")
    return 0


def over_seeds(seeds: int) -> list[dict[str, Entry]]:
    """The demonstration's rows, seed by seed; the first one's picture becomes that of the record."""
    found = []
    for seed in range(seeds):
        say(f"seed {seed}")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "demo"
            found.append(run_demo(out, DemoPlan(seed=seed), say))
            if seed == 0:
                RESULTS.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(out / "learning.png", RESULTS / "demo.png")
    return found


def over_prompts(numbers: Sequence[int], plan: DemoPlan = DemoPlan()) -> list[dict[str, Entry]]:  # noqa: B008  (frozen)
    """Rows of the ways that are ``COMPARED``, for each number of prompts: one teacher, one start, as many steps."""
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(2, mp_context=context, initializer=one_thread) as pool,
    ):
        made = Path(folder) / "made"
        made.mkdir()
        for job in [pool.submit(make, made, plan) for make in (make_teacher, make_start)]:
            job.result()
        jobs = []
        for number in numbers:
            out = Path(folder) / str(number)
            shutil.copytree(made, out)
            its = replace(plan, prompts=number, evaluate_every=plan.steps)
            jobs.append({name: pool.submit(spend, name, out, its) for name in COMPARED})
        return [{name: job.result().entry for name, job in each.items()} for each in jobs]


def table(rows: Sequence[dict[str, Entry]]) -> str:
    """Every seed's accuracy, and the means over seeds, as a Markdown table."""
    heads = " | ".join(f"seed {n}" for n in range(len(rows)))
    lines = [
        f"| model | learned from | prompts | completions | {heads} | mean | CPU s |",
        "|---" * 4 + "|---:" * (len(rows) + 2) + "|",
    ]
    for name, first in rows[0].items():
        entries = [found[name] for found in rows]
        right = " | ".join(f"{e.accuracy:.1%}" for e in entries)
        lines.append(
            f"| {first.name} | {first.learned_from} | {first.prompts:,} | {mean(e.sequences for e in entries):,.0f} "
            f"| {right} | {mean(e.accuracy for e in entries):.1%} | {mean(e.cpu_s for e in entries):.0f} |"
        )
    return "\n".join(lines)


def prompts_table(rows: Sequence[dict[str, Entry]]) -> str:
    """Accuracy with its 95 % interval, a way a line, a number of prompts a column, as a Markdown table."""
    heads = " | ".join(f"{found['distilled'].prompts:,} prompts" for found in rows)
    lines = [f"| | {heads} |", "|---" + "|---:" * len(rows) + "|"]
    for name, first in rows[0].items():
        cells = [f"{e.accuracy:.1%} ({e.low:.1%} – {e.high:.1%})" for e in (found[name] for found in rows)]
        lines.append(f"| {first.name} | {' | '.join(cells)} |")
    return "\n".join(lines)
