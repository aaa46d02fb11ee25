"""`python -m benchmarks branches`: what exact tables of the teacher make of the loss on bytes, on a real pair.

Completions of SmolLM2-135M-Instruct or of Gemma-3-270M, graded by the other: its byte table as it is, and with the
states behind its tokens off the path. Beside each other stand the divergence per byte and the gradient with respect to
the student's logits; and, with ``--steps``, short runs with both, which begin with the student as it is or, with
``--after``, as so many steps of today's objective leave it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks.assets import model_path
from benchmarks.branch_losses import Remembering, clipped_reverse_kl, compared
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
from gold.models.load import load_model, save_model
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.teachers.local import LocalTeacher
from gold.train.loop import distill
from gold.train.recipe import Recipe, Term

MODELS = "smollm2-135m-instruct", "gemma3-270m"
KINDS = "English", "code", "numbers"
LEVELS = 0.1, 0.01
WAYS = "bucket", "branches"
DIVERGENCES: Mapping[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "skew_reverse_kl": partial(skew_reverse_kl, alpha=0.1),
    "clipped_reverse_kl": partial(clipped_reverse_kl, clip=3.0),
}
FIRST_SEED = 100
"""Of the steps before a late start."""


@dataclass(frozen=True)
class Start:
    """A cell: the student that runs begin with, after ``after`` steps of today's objective; and its measures."""

    student: str
    after: int
    tokens: int


@dataclass(frozen=True)
class Gradient:
    """A cell: the gradients of a kind of text that a start writes."""

    kind: str
    start: Start


@dataclass(frozen=True)
class Run:
    """A cell: a short run."""

    way: str
    seed: int
    steps: int
    start: Start


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks branches", description=__doc__)
    parser.add_argument(
        "--student", choices=MODELS, default=MODELS[0], help="the other teaches (%(default)s)"
    )
    parser.add_argument("--after", type=int, default=0, help="steps before all else (%(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of a completion (%(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="steps of each run; 0: no runs (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each way (%(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/branches"), help="where finished parts are kept"
    )
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/results")
    given = parser.parse_args(list(arguments))
    begun = time.perf_counter()
    cells, start = Cells(given.folder), Start(given.student, given.after, given.tokens)
    data: dict[str, Any] = {**asdict(start), "teacher": _teacher_of(given.student)}
    (data["start"],) = cells.all(begin, [start])
    data["gradients"] = cells.all(gradients_of, [Gradient(kind, start) for kind in KINDS])
    data["runs"] = runs(cells, start, given.steps, given.seeds) if given.steps else []
    data |= cells.spent()
    print(told(data))
    if given.record:
        name = (
            "branches" + ("" if given.student == MODELS[0] else "-gemma3") + ("-late" if given.after else "")
        )
        path = write_record(
            name,
            data,
            command=command_line("branches", [each for each in arguments if each != "--record"]),
            seconds=time.perf_counter() - begun,
            device=device_name("cpu", 1),
        )
        print(path)
    return 0


def runs(cells: Cells, start: Start, steps: int, seeds: int) -> list[dict[str, Any]]:
    """Runs of every way in so many steps, and of branches in as many as fit into the processor time of the bucket."""
    jobs = [Run(way, seed, steps, start) for seed in range(seeds) for way in WAYS]
    found = cells.all(run, jobs)
    spent = {way: mean(f["cpu_s"] for j, f in zip(jobs, found, strict=True) if j.way == way) for way in WAYS}
    fewer = max(1, round(steps * spent["bucket"] / spent["branches"]))
    shorter = [Run("branches", seed, fewer, start) for seed in range(seeds)]
    every = zip([*jobs, *shorter], [*found, *cells.all(run, shorter)], strict=True)
    return [{"way": job.way, "seed": job.seed, "steps": job.steps, **outcome} for job, outcome in every]


def _teacher_of(student: str) -> str:
    return MODELS[1 - MODELS.index(student)]


def prompts_of(kind: str) -> list[Prompt]:
    """The prompts of a kind."""
    return [Prompt(f"{kind} {n}", text=text) for n, text in enumerate(PROMPTS[kind])]


def _named(start: Start) -> str:
    return f"{start.student}-{start.after}-{start.tokens}"


def _models(start: Start, made: Path) -> tuple[LanguageModel, LanguageModel]:
    """The student of a start, and its teacher."""
    before = made / _named(start) if start.after else model_path(start.student)
    student, teacher = (
        load_model(path, device="cpu", dtype="float32")
        for path in (before, model_path(_teacher_of(start.student)))
    )
    return student, teacher


def begin(job: Start, made: Path) -> dict[str, Any]:
    """Makes the student of a start, and measures it."""
    student, teacher = _models(replace(job, after=0), made)
    if job.after:
        recipe = _recipe(Run("bucket", FIRST_SEED, job.after, job))
        distill(student, LocalTeacher(teacher), _prompts()[0], recipe)
        save_model(student, made / _named(job))
    return _measured(student, LocalTeacher(teacher), job.tokens)


def gradients_of(job: Gradient, made: Path) -> dict[str, Any]:
    """For each divergence and level the value per byte, and the gradient beside that without branches."""
    student, model = _models(job.start, made)
    kind, tokens = job.kind, job.start.tokens
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
    student, model = _models(job.start, made)
    teacher = Remembering(model)
    taught, _ = _prompts()

    def loss(inputs: LossInputs) -> Loss:
        pair, texts = inputs.batch.vocabularies, inputs.batch.texts
        asked = [p for p in teacher.prompts_of([t.teacher for t in texts]) if p is not None]
        if not asked:  # the text that warms kernels up
            asked = taught[:1]
        return _loss(inputs, followed(teacher, pair, asked, texts, 0.01), reverse_kl)

    OBJECTIVES["branches"] = Row("branches", loss, needs="rows", unit="byte", count=supervised_bytes)
    begun = time.process_time()
    distill(student, teacher, taught, _recipe(job))
    seconds = time.process_time() - begun
    return {"cpu_s": round(seconds, 1), **_measured(student, teacher, job.start.tokens)}


def _prompts() -> tuple[list[Prompt], list[Prompt]]:
    """Those that are trained on, and those that are measured on."""
    every = [prompts_of(kind) for kind in ("code", "numbers")]
    return [p for kind in every for p in kind[:3]], [kind[3] for kind in every]


def _recipe(job: Run) -> Recipe:
    return Recipe(
        (Term("reverse_kl" if job.way == "bucket" else "branches"),),
        steps=job.steps,
        prompts_per_step=6,
        num_generations=1,
        micro_batch_size=6,
        max_new_tokens=job.start.tokens,
        lr=2e-5,
        warmup_steps=1,
        seed=job.seed,
    )


def _measured(student: LanguageModel, teacher: LocalTeacher, tokens: int) -> dict[str, float]:
    plan = EvaluationPlan(max_new_tokens=tokens, num_generations=4, samples=0, branches=0.01)
    found = evaluate(student, teacher, _prompts()[1], plan=plan).measures
    names = "exact_reverse_kl_per_byte", "reverse_kl_per_byte", "exact_forward_kl_per_byte", "bits_per_byte"
    return {n: round(found[n], 4) for n in names}


def told(data: Mapping[str, Any]) -> str:
    """The gradients and the runs as lines."""
    lines = [f"{data['student']} ← {data['teacher']}, after {data['after']} steps: {data['start']}"]
    return "\n".join([*lines, *map(_told, data["gradients"]), *map(str, data["runs"])])


def _told(row: Mapping[str, Any]) -> str:
    lines = (
        f"  {each['divergence']:<16} branches {each['branches']:<5} {each['value']:.4f} nats per byte, gradient: "
        f"cosine {each['cosine']:.4f}, {each['length']:.3f} times as long; {each['branches_per_token']:.2f} "
        f"branches per token, unresolved {each['unresolved']:.4f}, {each['seconds']:.1f} s"
        for each in row["rows"]
    )
    return "\n".join((f"{row['kind']}, {row['bytes']:.0f} bytes", *lines))
