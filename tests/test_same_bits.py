"""The same run, twice: every weight and every metric has the same bits, whatever lies beside it in memory."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models as tiny
import torch

from gold.recipe import Recipe, Term
from gold.rollout import Sampling
from gold.train import Saving, distill

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
        per_prompt=2,
        prompts_per_step=4,
        sequences_per_forward=8,
        rollout_batch=8,
        lr=3e-3,
        warmup_steps=1,
        sampling=Sampling(max_new_tokens=10),
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
