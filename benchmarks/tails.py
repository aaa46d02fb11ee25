"""`python -m benchmarks tails`: what a teacher that tells its likeliest tokens alone makes of the loss on bytes.

SmolLM2-135M-Instruct's completions of held-out openings, graded by Gemma-3-270M: with all of its rows, and through a
cache that keeps so many tokens of each row. Beside each other stand the reverse KL per byte and the gradient with
respect to the student's logits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.assets import assets_folder
from benchmarks.record import device_name, write_record
from gold.align.batch import AlignedBatch
from gold.align.model_inputs import aligned_text, student_states, teacher_logits
from gold.align.vocabularies import VocabularyPair
from gold.data import load_prompts, split_by_hash
from gold.kernels.logits import GivenLogits, LazyLogits, likeliest
from gold.losses import OBJECTIVES
from gold.losses.types import LossInputs
from gold.models.hidden_states import lazy_logits
from gold.models.language_model import LanguageModel
from gold.models.load import load_model
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Rollout, Sampling
from gold.teachers.cached import CachedTeacher
from gold.teachers.local import LocalTeacher

STUDENT, TEACHER = "smollm2-135m-instruct", "gemma3-270m"


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tails", description=__doc__)
    parser.add_argument("--texts", type=int, default=12, help="completions (%(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each (%(default)s)")
    parser.add_argument(
        "--top-k", type=int, nargs="+", default=[1, 5, 20, 50, 200, 1000], help="tokens told of each row"
    )
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/results")
    given = parser.parse_args(list(arguments))
    started = time.perf_counter()
    torch.set_num_threads(1)
    student, model = (load_model(assets_folder() / name, dtype="float32") for name in (STUDENT, TEACHER))
    teacher = LocalTeacher(model)
    _, heldout = split_by_hash(load_prompts("data/openings.jsonl"), 0.2)
    prompts = heldout[: given.texts]
    sampling, seeds = Sampling(max_new_tokens=given.tokens), [(0, n) for n in range(len(prompts))]
    rollouts = sample(HuggingFaceEngine(student), student, prompts, sampling, seeds=seeds)
    compared = Compared(student, teacher, rollouts)
    whole, grad, _ = compared.outcome(teacher)
    print(f"all tokens: {whole:.4f} nats per byte")
    found = []
    for top_k in given.top_k:
        with tempfile.TemporaryDirectory() as folder:
            value, other, untold = compared.outcome(CachedTeacher(teacher, folder, top_k=top_k))
        cosine = float(torch.nn.functional.cosine_similarity(other.flatten(), grad.flatten(), dim=0))
        size = float(other.norm() / grad.norm())
        found.append(
            {"top_k": top_k, "untold": untold, "reverse_kl_per_byte": value, "cosine": cosine, "size": size}
        )
        print(
            f"{top_k:>4} told: {untold:6.2%} untold, {value:.4f} nats per byte, gradient: cosine {cosine:.3f}, "
            f"{size:.2f} times as long",
            flush=True,
        )
    if given.record:
        data = {"student": STUDENT, "teacher": TEACHER, "texts": len(rollouts), "whole": whole, "told": found}
        command = " ".join(["python -m benchmarks tails", *arguments])
        seconds = time.perf_counter() - started
        print(write_record("tails", data, command=command, seconds=seconds, device=device_name("cpu", 1)))
    return 0


class Compared:
    """Completions of a student whose loss under several teachers of one vocabulary is compared."""

    def __init__(self, student: LanguageModel, teacher: LocalTeacher, rollouts: Sequence[Rollout]) -> None:
        self.student, self.rollouts = student, rollouts
        self.pair = VocabularyPair(student.vocabulary, teacher.vocabulary)
        self.texts = [aligned_text(rollout, self.pair) for rollout in rollouts]
        with torch.no_grad():
            self.logits = lazy_logits(student.lm, student_states(student, rollouts)).logits()

    def outcome(self, teacher: Any) -> tuple[float, Tensor, float]:
        """Reverse KL per byte, its gradient with respect to the student's logits, mean probability that is untold."""
        batch = AlignedBatch(self.texts, self.pair, self.student.device, teacher.device)
        theirs = LazyLogits.joined(teacher_logits(teacher, self.rollouts, self.texts))
        logits = self.logits.clone().requires_grad_(True)
        objective = OBJECTIVES["reverse_kl"]()
        loss = objective(LossInputs(batch, GivenLogits(logits), theirs))
        count = objective.count(batch)
        (grad,) = torch.autograd.grad(loss.total / count, logits)
        untold = 0.0
        if theirs.partial:
            none = torch.full((len(theirs), 1), -1)
            *_, rest = likeliest(theirs, 0, none, self.pair.teacher.size)
            untold = float(rest.exp().mean())
        return float(loss.total.detach()) / count, grad, untold
