"""`python -m benchmarks branches`: what exact tables of the teacher make of the loss on bytes, on a real pair.

SmolLM2-135M-Instruct's completions, graded by Gemma-3-270M: its byte table as it is, and with the states behind its
tokens off the path. Beside each other stand the divergence per byte and the gradient with respect to the student's
logits; and, with ``--steps``, short runs with both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.assets import model_path
from benchmarks.branch_losses import Remembering, compared
from benchmarks.branch_tables import BranchTable, table_of
from benchmarks.claims.cells import Cells
from benchmarks.divergence import PROMPTS
from benchmarks.record import command_line, device_name, write_record
from gold.align.batch import AlignedBatch
from gold.align.model_inputs import aligned_text, student_states, teacher_logits
from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.data import Prompt
from gold.evaluate import EvaluationPlan, evaluate
from gold.exact.marginals import marginals
from gold.kernels.logits import GivenLogits, LazyLogits
from gold.kernels.tables import byte_tables
from gold.losses import OBJECTIVES, Divergence, Loss, LossInputs, Row, reverse_kl, skew_reverse_kl
from gold.losses.table import supervised_bytes
from gold.models.hidden_states import lazy_logits
from gold.models.language_model import LanguageModel
from gold.models.load import load_model
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.teachers.local import LocalTeacher
from gold.train.loop import distill
from gold.train.recipe import Recipe, Term

STUDENT, TEACHER = "smollm2-135m-instruct", "gemma3-270m"
KINDS = "English", "code", "numbers"
LEVELS = 0.1, 0.01
DIVERGENCES: Mapping[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "skew_reverse_kl": partial(skew_reverse_kl, alpha=0.1),
}


@dataclass(frozen=True)
class Gradient:
    """A cell: the gradients of a kind of text."""

    kind: str
    tokens: int


@dataclass(frozen=True)
class Run:
    """A cell: a short run."""

    way: str
    seed: int
    steps: int
    tokens: int


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks branches", description=__doc__)
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of a completion (%(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="steps of each run; 0: no runs (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each way (%(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/branches"), help="where finished parts are kept"
    )
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/results")
    given = parser.parse_args(list(arguments))
    started = time.perf_counter()
    cells = Cells(given.folder)
    gradients = cells.all(gradients_of, [Gradient(kind, given.tokens) for kind in KINDS])
    seeds = range(given.seeds if given.steps else 0)
    # In the time of the bucket's steps there is room for two thirds as many with branches.
    ways = ("bucket", given.steps), ("branches", given.steps), ("branches", round(given.steps * 2 / 3))
    jobs = [Run(way, seed, steps, given.tokens) for seed in seeds for way, steps in ways]
    jobs += [Run("start", 0, given.steps, given.tokens) for _ in seeds[:1]]
    runs = [{**asdict(job), **found} for job, found in zip(jobs, cells.all(run, jobs), strict=True)]
    print("\n".join(map(_told, gradients)), *runs, sep="\n")
    if given.record:
        data = {"student": STUDENT, "teacher": TEACHER, "cells_s": round(cells.seconds(), 1)}
        path = write_record(
            "branches",
            {**data, "gradients": gradients, "runs": runs},
            command=command_line("branches", [f"--steps={given.steps}", f"--seeds={given.seeds}"]),
            seconds=time.perf_counter() - started,
            device=device_name("cpu", 1),
        )
        print(path)
    return 0


def prompts_of(kind: str) -> list[Prompt]:
    """The prompts of a kind."""
    return [Prompt(f"{kind} {n}", text=text) for n, text in enumerate(PROMPTS[kind])]


def _models() -> tuple[LanguageModel, LanguageModel]:
    student, teacher = (
        load_model(model_path(name), device="cpu", dtype="float32") for name in (STUDENT, TEACHER)
    )
    return student, teacher


def gradients_of(job: Gradient, made: Path) -> dict[str, Any]:
    """For each divergence and level the value per byte, and the gradient beside that without branches."""
    student, model = _models()
    kind, tokens = job.kind, job.tokens
    teacher, prompts = LocalTeacher(model), prompts_of(kind)
    seeds = [(0, n) for n in range(len(prompts))]
    rollouts = sample(HuggingFaceEngine(student), student, prompts, Sampling(tokens), seeds=seeds)
    pair = VocabularyPair(student.vocabulary, teacher.vocabulary)
    texts = [aligned_text(rollout, pair) for rollout in rollouts]
    batch = AlignedBatch(texts, pair, student.device, teacher.device)
    with torch.no_grad():
        logits = lazy_logits(student.lm, student_states(student, rollouts)).logits()
        rows = LazyLogits.joined(teacher_logits(teacher, rollouts, texts))
        path, _, _ = byte_tables(rows, batch.teacher.layout)
    tables = {"none": (BranchTable(path, batch.teacher.layout.resolved, 0), 0.0)}
    for least in LEVELS:
        begun = time.process_time()
        table = followed(teacher, pair, prompts, texts, least)
        tables[str(least)] = table, time.process_time() - begun
    found: dict[str, Any] = {"kind": kind, "bytes": supervised_bytes(batch), "rows": []}
    tokens_T = sum(t.teacher.ids.size for t in texts)
    for name, divergence in DIVERGENCES.items():
        before: Tensor | None = None
        for level, (table, seconds) in tables.items():
            value, grad = _outcome(batch, logits, table, divergence)
            before = grad if before is None else before
            row = {
                "divergence": name,
                "branches": level,
                "value": value,
                "cosine": float(torch.cosine_similarity(grad.flatten(), before.flatten(), dim=0)),
                "length": float(grad.norm() / before.norm()),
                "branches_per_token": table.branches / tokens_T,
                "unresolved": float(table.logp[:, -1].exp()[batch.supervised_bytes].mean()),
                "seconds": seconds,
            }
            found["rows"].append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return found


def _outcome(
    batch: AlignedBatch, logits: Tensor, theirs: BranchTable, divergence: Divergence
) -> tuple[float, Tensor]:
    """The value per byte, and its gradient with respect to the student's logits."""
    leaf = logits.clone().requires_grad_(True)
    loss = _loss(LossInputs(batch, GivenLogits(leaf), None), theirs, divergence)
    count = supervised_bytes(batch)
    (grad,) = torch.autograd.grad(loss.total / count, leaf)
    return float(loss.total.detach()) / count, grad


def _loss(inputs: LossInputs, theirs: BranchTable, divergence: Divergence) -> Loss:
    layout = inputs.batch.student.layout
    table, _, _ = byte_tables(inputs.student, layout)
    return compared(inputs.batch, BranchTable(table, layout.resolved, 0), theirs, divergence)


def followed(
    teacher: LocalTeacher,
    pair: VocabularyPair,
    prompts: Sequence[Prompt],
    texts: Sequence[AlignedText],
    least: float,
) -> BranchTable:
    """The teacher's table with its branches."""
    each = zip(prompts, texts, strict=True)
    found = [
        marginals(
            pair.teacher,
            pair.kernel_tries[1],
            text.teacher,
            text.stopped,
            teacher.states(prompt, text.teacher, text.stopped),
            least,
        )
        for prompt, text in each
    ]
    return table_of(found)


def run(job: Run, made: Path) -> dict[str, Any]:
    """A short run on prompts of code and numbers, three of each kind, measured on the fourth."""
    student, model = _models()
    teacher = Remembering(model)
    every = [prompts_of(kind) for kind in ("code", "numbers")]
    taught, heldout = [p for kind in every for p in kind[:3]], [kind[3] for kind in every]

    def loss(inputs: LossInputs) -> Loss:
        pair, texts = inputs.batch.vocabularies, inputs.batch.texts
        asked = [p for p in teacher.prompts_of([t.teacher for t in texts]) if p is not None]
        if not asked:  # the text that warms kernels up
            asked = taught[:1]
        return _loss(inputs, followed(teacher, pair, asked, texts, 0.01), reverse_kl)

    OBJECTIVES["branches"] = Row("branches", loss, needs="rows", unit="byte", count=supervised_bytes)
    plan = EvaluationPlan(max_new_tokens=job.tokens, num_generations=4, samples=0, branches=0.01)
    recipe = Recipe(
        (Term("reverse_kl" if job.way == "bucket" else "branches"),),
        steps=job.steps,
        prompts_per_step=6,
        num_generations=1,
        micro_batch_size=6,
        max_new_tokens=job.tokens,
        lr=2e-5,
        warmup_steps=1,
        seed=job.seed,
    )
    begun = time.process_time()
    if job.way != "start":
        distill(student, teacher, taught, recipe)
    seconds = time.process_time() - begun
    found = evaluate(student, teacher, heldout, plan=plan).measures
    names = "exact_reverse_kl_per_byte", "reverse_kl_per_byte", "exact_forward_kl_per_byte", "bits_per_byte"
    return {"cpu_s": round(seconds, 1), **{n: round(found[n], 4) for n in names}}


def _told(row: Mapping[str, Any]) -> str:
    lines = (
        f"  {each['divergence']:<16} branches {each['branches']:<5} {each['value']:.4f} nats per byte, gradient: "
        f"cosine {each['cosine']:.4f}, {each['length']:.3f} times as long; {each['branches_per_token']:.2f} "
        f"branches per token, unresolved {each['unresolved']:.4f}, {each['seconds']:.1f} s"
        for each in row["rows"]
    )
    return "\n".join((f"{row['kind']}, {row['bytes']:.0f} bytes", *lines))
