"""The divergence of real models per byte, measured in several ways along texts that the student writes.

Part of `python -m benchmarks exactness`: the value of the objective, the log-ratio of the samples, and the exact value
with its lower bound, without branches and with those above some shares, each with its cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import torch

from benchmarks.assets import model_path
from gold.align.batch import AlignedBatch
from gold.align.model_inputs import aligned_text, teacher_logits
from gold.comparison import Comparison, bootstrap_ratio
from gold.data import Prompt
from gold.evaluate import EvaluationPlan
from gold.exact.divergence import ExactText, unresolved
from gold.losses import OBJECTIVES, LossInputs
from gold.models.branches import TextStates
from gold.models.language_model import LanguageModel
from gold.models.load import load_model
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.teachers import LocalTeacher, Teachers

PROMPTS: Mapping[str, tuple[str, ...]] = {
    "English": (
        "The history of the town begins",
        "When the rain stopped, she opened",
        "Most birds that winter here",
        "The committee could not agree on",
    ),
    "code": (
        "def mean(values):\n",
        "import os\n\nfor name in",
        "class Stack:\n    def",
        "SELECT name, count(*) FROM",
    ),
    "German": (
        "Der Bahnhof liegt",
        "Am nächsten Morgen ging",
        "Die Rechnung wurde gestern",
        "Viele Städte haben",
    ),
    "Chinese": ("今天天气很好，我们", "他打开门，看见", "这本书讲的是", "昨天晚上，妈妈"),
    "numbers": (
        "1, 2, 4, 8, 16,",
        "17 + 25 = 42\n38 + 46 =",
        "2019-03-04, 2019-03-11,",
        "3.14159 2.71828 1.41421",
    ),
}
LEVELS = (0.0, 0.01, 0.001)
"""Least shares of a branch; 0: none."""
TOKENS = {"English": 32, "code": 40, "German": 48, "Chinese": 64, "numbers": 64}
"""Sampled tokens of a text."""


def divergences(names: Sequence[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every direction between the models."""
    models = {name: load_model(model_path(name), device="cpu") for name in names}
    return [
        {"student": mine, "teacher": theirs, **direction(models[mine], models[theirs], say)}
        for mine, theirs in permutations(names, 2)
    ]


def direction(student: LanguageModel, teacher: LanguageModel, say: Callable[[str], None]) -> dict[str, Any]:
    """All texts of a student, by kind and together."""
    rows = []
    for kind, starts in PROMPTS.items():
        found = texts_of(student, teacher, kind, starts)
        rows += found
        say(f"{kind}: {sum(r['bytes'] for r in found)} bytes")
    by_kind = {kind: summary([r for r in rows if r["kind"] == kind]) for kind in PROMPTS}
    return {"all": summary(rows), "by_kind": by_kind}


@torch.no_grad()
def texts_of(
    student: LanguageModel, teacher: LanguageModel, kind: str, starts: Sequence[str]
) -> list[dict[str, Any]]:
    """What is measured of each text that the student writes behind some prompts."""
    prompts = [Prompt(key=f"{kind} {n}", text=text) for n, text in enumerate(starts)]
    seeds = [(0, n) for n in range(len(prompts))]
    sampling = Sampling(max_new_tokens=TOKENS[kind])
    rollouts = sample(HuggingFaceEngine(student), student, prompts, sampling, seeds=seeds)
    local = LocalTeacher(teacher)
    plans = [EvaluationPlan(samples=0, branches=least) for least in LEVELS]
    comparison = Comparison(student, Teachers({"teacher": local}), prompts, plans[0])
    pair = comparison.pairs["teacher"]
    scored, _ = comparison.of_student(rollouts, range(len(rollouts)))
    found = []
    for text in scored:
        rollout, aligned = text.rollout, aligned_text(text.rollout, pair)
        mine = TextStates(student, rollout.prompt_ids, aligned.student.ids, rollout.ids.size).path()
        (theirs,) = teacher_logits(local, [rollout], [aligned])
        inputs = LossInputs(AlignedBatch([aligned], pair, student.device), mine, theirs)
        objective = OBJECTIVES["reverse_kl"]()
        row: dict[str, Any] = {
            "kind": kind,
            "text": rollout.text,
            "bytes": text.bytes,
            "tokens": int(aligned.student.ids.size),
            "teacher_tokens": int(aligned.teacher.ids.size),
            "log_ratio": text.gap_nats,
            "objective": float(objective(inputs).total),
            "levels": {},
        }
        for plan in plans:
            comparison.plan = replace(plan, branches=plan.branches or 1.0)  # above 1 nothing is followed
            started = time.perf_counter()
            exact = comparison.exact_text(local, pair, rollout, aligned, False)
            row["levels"][plan.branches] = {
                "seconds": time.perf_counter() - started,
                "exact": exact,
            }
        found.append(row)
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Nats per byte over some texts, with intervals over texts; what is unresolved; seconds per 1,000 bytes."""
    sizes = np.array([row["bytes"] for row in rows], np.float64)

    def per_byte(values: Sequence[float]) -> dict[str, float]:
        low, high = bootstrap_ratio(np.array(values), sizes, 0)
        return {"value": float(sum(values) / sizes.sum()), "low": low, "high": high}

    found: dict[str, Any] = {
        "texts": len(rows),
        "bytes": int(sizes.sum()),
        "tokens": sum(row["tokens"] for row in rows),
        "teacher_tokens": sum(row["teacher_tokens"] for row in rows),
        "objective": per_byte([row["objective"] for row in rows]),
        "log_ratio": per_byte([row["log_ratio"] for row in rows]),
        "levels": {},
    }
    for least in LEVELS:
        exact: list[ExactText] = [row["levels"][least]["exact"] for row in rows]
        seconds = sum(row["levels"][least]["seconds"] for row in rows)
        found["levels"][str(least)] = {
            "value": per_byte([float(e.value.sum()) for e in exact]),
            "bound": per_byte([float(e.bound.sum()) for e in exact]),
            "seconds_per_1000_bytes": 1000 * seconds / float(sizes.sum()),
            **unresolved(exact),
        }
    return found


def report(data: Sequence[Mapping[str, Any]]) -> str:
    """The record as lines for a person."""
    lines = ["nats per byte, with 95 % intervals over texts"]
    for way in data:
        lines.append(f"{way['student']} ← {way['teacher']}")
        for name, row in [("all", way["all"]), *way["by_kind"].items()]:
            lines.append(f"  {name}: {row['bytes']} bytes of {row['texts']} texts")
            cells = [("objective", row["objective"]), ("log-ratio", row["log_ratio"])]
            cells += [(f"exact, branches ≥ {least}", each["value"]) for least, each in row["levels"].items()]
            cells += [(f"bound, branches ≥ {least}", each["bound"]) for least, each in row["levels"].items()]
            lines += [
                f"    {title:<26} {x['value']:.4f}   {x['low']:.4f} to {x['high']:.4f}" for title, x in cells
            ]
            for least, each in row["levels"].items():
                rest = f"{each['unresolved_mass']:.2g} and {each['teacher_unresolved_mass']:.2g}"
                per = f"{each['branches_per_token']:.2f} and {each['teacher_branches_per_token']:.2f}"
                seconds = f"{each['seconds_per_1000_bytes']:.1f} s per 1000 bytes"
                lines.append(f"    ≥ {least}: unresolved {rest}, branches per token {per}, {seconds}")
    return "\n".join(lines)
