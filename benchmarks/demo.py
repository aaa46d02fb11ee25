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

from benchmarks.record import RESULTS, device_name, write_record
from gold.demo.run import DemoPlan, Entry, run_demo, say


def main(arguments: Sequence[str]) -> int:
    """Exit status; the picture is that of the first seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks demo", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    given = parser.parse_args(list(arguments))
    started = time.perf_counter()
    found = over_seeds(given.seeds)
    data = {"seeds": [{name: asdict(entry) for name, entry in rows.items()} for rows in found]}
    path = write_record(
        "demo",
        {"plan": asdict(DemoPlan()), **data},
        command=f"python -m benchmarks demo --seeds {given.seeds}",
        seconds=time.perf_counter() - started,
        device=device_name("cpu", 1) + " a process, two processes",
    )
    print(f"\n{table(found)}\n\n{path}")
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
