"""`python -m benchmarks demo [--seeds N]`: the demonstration with several seeds, its table and curves as a record."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.record import RESULTS, device_name, write_record
from gold.demo.run import DemoPlan, Entry, run_demo, say


def main(arguments: Sequence[str]) -> int:
    """Exit status; the picture is that of the first seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks demo", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    seeds = parser.parse_args(list(arguments)).seeds
    started = time.perf_counter()
    rows: list[dict[str, Entry]] = []
    for seed in range(seeds):
        say(f"\nseed {seed}")
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "demo"
            rows.append(run_demo(out, DemoPlan(seed=seed), say))
            if seed == 0:
                RESULTS.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(out / "learning.png", RESULTS / "demo.png")
    seconds = time.perf_counter() - started
    data: dict[str, Any] = {
        "plan": asdict(DemoPlan()),
        "seeds": [{name: asdict(entry) for name, entry in found.items()} for found in rows],
    }
    device = device_name("cpu", 1) + " a process, two processes"
    path = write_record(
        "demo", data, command=f"python -m benchmarks demo --seeds {seeds}", seconds=seconds, device=device
    )
    say(f"\n{table(rows)}\n\n{path}")
    return 0


def table(rows: Sequence[dict[str, Entry]]) -> str:
    """Every seed's accuracy, and the means over seeds, as a Markdown table."""
    heads = " | ".join(f"seed {n}" for n in range(len(rows)))
    lines = [f"| model | {heads} | mean | prompts | seconds |", "|---|" + "---|" * (len(rows) + 3)]
    for name, first in rows[0].items():
        entries = [found[name] for found in rows]
        right = " | ".join(f"{e.accuracy:.1%}" for e in entries)
        lines.append(
            f"| {first.name} | {right} | {mean(e.accuracy for e in entries):.1%} | {first.prompts:,} | "
            f"{mean(e.seconds for e in entries):.0f} |"
        )
    return "\n".join(lines)
