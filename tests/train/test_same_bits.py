"""The same run, twice: every weight and every metric has the same bits, whatever lies beside it in memory."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tiny_models as tiny
import torch
from support.processes import Command

from gold.train.loop import Saving, distill
from gold.train.recipe import Recipe, Term

TIMED = ("_s", "tokens_per_s")
TERMS = [
    ("reverse_kl", {}),
    ("jsd", {"support": "shared"}),
    ("forward_kl", {"support": "prefix"}),
    ("gold", {}),
    ("span_pg", {}),
    ("sft", {}),
]
"""Every kernel that trains on rows has a part in it."""

_KEPT: list[object] = []


def scatter(seed: int) -> None:
    """Takes memory of many sizes and gives half of it back, so that what comes next lies elsewhere."""
    draw = random.Random(seed)
    taken: list[object] = [bytearray(draw.randrange(1, 60_000)) for _ in range(1500)]
    taken += [np.empty(draw.randrange(1, 9000), np.float32) for _ in range(1500)]
    taken += [torch.empty(draw.randrange(1, 9000)) for _ in range(500)]
    draw.shuffle(taken)
    _KEPT[:] = taken[::2]


def told(record: dict[str, Any]) -> str:
    """A step without what a clock says, and without its kind, which only the lines of a file name."""
    return json.dumps(
        {k: v for k, v in record.items() if k != "kind" and not k.endswith(TIMED)}, sort_keys=True
    )


def test_in_one_process(tmp_path: Path) -> None:
    """Also from a checkpoint on."""
    recipe = Recipe(
        objectives=tuple(Term(name, 0.3, **options) for name, options in TERMS),
        steps=3,
        on_policy=0.7,
        num_generations=2,
        prompts_per_step=4,
        micro_batch_size=8,
        generation_batch_size=8,
        lr=3e-3,
        warmup_steps=1,
        max_new_tokens=10,
    )
    models = tiny.tiny_student, tiny.tiny_teacher
    kept = Saving(output=tmp_path / "whole", checkpoint_every=1, keep_last=9)
    resumed = replace(kept, output=tmp_path / "resumed", resume=True)
    found = set()
    for seed, saving in enumerate((kept, Saving(), resumed)):
        if saving.resume:
            shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
            for later in ("step-000002", "step-000003"):
                shutil.rmtree(tmp_path / "resumed" / "checkpoints" / later)
        scatter(seed)
        student, teacher = (model() for model in models)
        run = distill(student, teacher, tiny.prompts(), recipe, verifier=tiny.TASK, saving=saving)
        weights = b"".join(p.detach().numpy().tobytes() for p in run.student.lm.parameters())
        found.add((weights, *map(told, run.steps)))
    assert len(found) == 1


@pytest.mark.slow
def test_in_five_processes(tmp_path: Path) -> None:
    tiny.save_pair(tmp_path)
    settings = tiny.run_settings(
        tmp_path,
        tmp_path / "unused",
        objectives=[{"name": name, "weight": 0.3, **options} for name, options in TERMS],
        rollout__on_policy=0.7,
        train__steps=2,
        train__checkpoint_every=9,
        evaluate__every=2,
        evaluate__prompts=3,
    )
    file = tiny.write_settings(tmp_path / "run.yaml", settings)
    runs = [tmp_path / str(n) for n in range(5)]
    commands = [
        Command(tmp_path / f"{run.name} printed", "train", file, f"output={run}", before=partial(scatter, n))
        for n, run in enumerate(runs)
    ]
    assert [command.wait() for command in commands] == [0] * 5, commands[0].err
    found = set()
    for run in runs:
        lines = [
            told(json.loads(line))
            for name in ("metrics.jsonl", "samples.jsonl")
            for line in (run / name).read_text(encoding="utf-8").splitlines()
        ]
        found.add(((run / "student" / "model.safetensors").read_bytes(), *lines))
    assert len(found) == 1
