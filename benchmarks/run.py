"""`python -m benchmarks run CONFIG [key=value …]`: a training run, and a record of its evaluations and steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, device_name, write_record
from gold.config import Config
from gold.errors import GoldError
from gold.inspect.plots import plot_run
from gold.run import train
from gold.train.progress import Lines

KEPT = (
    "step",
    "loss",
    "sampled_reverse_kl_per_byte",
    "teacher_top1_prob",
    "teacher_top1_missed_share",
    "grad_norm",
    "length_bytes",
)
SECONDS = ("rollout_s", "align_s", "teacher_s", "student_s", "update_s", "step_s")


def main(arguments: Sequence[str]) -> int:
    """Exit status; the record is named after the configuration, its picture stands beside it."""
    if not arguments:
        print("usage: python -m benchmarks run CONFIG [key=value …]", file=sys.stderr)
        return 2
    try:
        config = Config.load(arguments[0], arguments[1:])
        started = time.perf_counter()
        run = train(config, progress=Lines(every_s=0.0))
        seconds = time.perf_counter() - started
        picture = plot_run(config.output)[0]
    except GoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    steps = run.steps
    data: dict[str, Any] = {
        "config": config.to_dict(),
        "evaluations": run.evaluations,
        "steps": [{name: step[name] for name in KEPT if name in step} for step in steps],
        "mean_seconds": {name: sum(step[name] for step in steps) / len(steps) for name in SECONDS},
    }
    name = Path(arguments[0]).stem
    path = write_record(
        name,
        data,
        command=f"python -m benchmarks run {' '.join(arguments)}",
        seconds=seconds,
        device=device_name(run.student.device.type, torch.get_num_threads()),
    )
    (RESULTS / f"{name}.png").write_bytes(picture.read_bytes())
    print(path)
    return 0
