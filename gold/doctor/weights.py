"""Checks that need weights: KL of a model from itself, bits per byte of texts, time of a forward pass."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from gold.align.batch import AlignedBatch
from gold.align.model_inputs import aligned_text, student_states
from gold.align.vocabularies import VocabularyPair
from gold.data import Prompt
from gold.doctor.finding import Check, Finding, failure, passed, run_checks, warning
from gold.doctor.sample import JUDGED, SAMPLE
from gold.errors import GoldError
from gold.kernels.lm_head import token_logp
from gold.kernels.logits import LazyLogits
from gold.losses import OBJECTIVES, LossInputs
from gold.models.hidden_states import lazy_logits
from gold.models.language_model import LanguageModel
from gold.models.padding import PaddedStates
from gold.rollout.engine import completed
from gold.teachers.local import LocalTeacher
from gold.teachers.protocol import Teacher

LARGEST_SELF_KL = 1e-3
"""Fail above, in nats per byte. A divergence is of second order in rounding errors: 16-bit models stay below 1e-4, two
different models are above 1e-2.
"""
LANGUAGE_BITS = 4.0
"""Warn above, in bits per byte: a trained model needs about 1 for prose in its languages, a uniform one 8."""
_LONGEST_TRIAL_S = 2.0


@dataclass(frozen=True)
class _Trial:
    models: Mapping[str, LanguageModel]  # by role
    prompts: Sequence[Prompt]
    sequences: int
    tokens: int


def examine_weights(
    student: LanguageModel, teacher: LanguageModel | None, texts: Sequence[str], sequences: int, tokens: int
) -> list[Finding]:
    """Findings: KL of each model from itself, bits per byte of each on the texts, seconds to read a batch.

    Only the student is checked if the teacher is not in this process.
    """
    prompts = _split(texts) or _split(SAMPLE[JUDGED])
    models = {"student": student, **({"teacher": teacher} if teacher else {})}
    return run_checks(WEIGHT_CHECKS, _Trial(models, prompts, sequences, tokens))


def self_divergence(model: LanguageModel, prompts: Sequence[Prompt]) -> float:
    """Reverse KL on next bytes of a model from itself as its teacher, on the prompts' completions, in nats per byte.

    The student reads all texts as one padded batch, the teacher one at a time.
    """
    return divergence(model, LocalTeacher(model, batch_tokens=1), prompts, "bytes")


def divergence(
    student: LanguageModel, teacher: Teacher, prompts: Sequence[Prompt], support: Literal["bytes", "shared"]
) -> float:
    """Reverse KL(student ‖ teacher) on the prompts' completions and their ends, in nats per byte."""
    pair = VocabularyPair(student.vocabulary, teacher.vocabulary)
    objective = OBJECTIVES["reverse_kl"](support=support)
    rollouts = [completed(student, prompt, 10**6) for prompt in prompts]
    texts = [aligned_text(rollout, pair) for rollout in rollouts]
    batch = AlignedBatch(texts, pair, student.device, teacher.device)
    theirs = teacher.score(prompts, [t.teacher for t in texts], [t.stopped for t in texts])
    was_training = student.lm.training
    student.lm.eval()
    with torch.no_grad():
        mine = lazy_logits(student.lm, student_states(student, rollouts))
        value = objective(LossInputs(batch, mine, LazyLogits.joined(theirs)))
    student.lm.train(was_training)
    return float(value.total) / max(1, sum(len(r.tokenized.data) for r in rollouts))


@torch.no_grad()
def bits_per_byte(model: LanguageModel, prompts: Sequence[Prompt]) -> float:
    """Bits per byte of the prompts' completions given the prompts, in the model's own tokens."""
    texts = [model.vocabulary.encode(prompt.completion or "") for prompt in prompts]
    stops = torch.tensor(model.vocabulary.stop_ids, device=model.device)
    nats = 0.0
    for logits, text in zip(
        LocalTeacher(model).score(prompts, texts, [False] * len(texts)), texts, strict=True
    ):
        target = torch.from_numpy(text.ids).long().to(model.device)
        nats -= float(token_logp(logits, target, stops)[0].double().sum())
    return nats / max(1, sum(len(text.data) for text in texts)) / math.log(2)


def _self_kl(trial: _Trial) -> Finding:
    values = {}
    for role, model in trial.models.items():
        try:
            values[role] = self_divergence(model, trial.prompts)
        except GoldError as error:
            return failure(f"the {role} cannot read the texts: {error}", "give texts that it can read")
    shown = ", ".join(f"{role} {value:.1g}" for role, value in values.items())
    found = f"KL of each model from itself, nats per byte: {shown}"
    if all(abs(value) <= LARGEST_SELF_KL for value in values.values()):
        return passed(found)
    return failure(
        found,
        f"it must be below {LARGEST_SELF_KL:g}: a model whose answers to the same text differ, or overflow in its "
        "dtype, can neither learn nor teach",
    )


def _bits(trial: _Trial) -> Finding:
    bits = {role: bits_per_byte(model, trial.prompts) for role, model in trial.models.items()}
    found = ", ".join(f"{role} {value:.2f}" for role, value in bits.items())
    if lost := [role for role, value in bits.items() if not value <= LANGUAGE_BITS]:
        who = " and the ".join(lost)
        return warning(
            found, f"the {who} hardly knows these texts: do weights and tokenizer belong to one model?"
        )
    if bits.get("teacher", 0.0) > bits["student"]:
        return warning(
            found, "the student predicts these texts better than its teacher: check whether it does yours"
        )
    return passed(found)


def _speed(trial: _Trial) -> Finding:
    seconds = {role: forward_seconds(m, trial.sequences, trial.tokens) for role, m in trial.models.items()}
    step = 3 * seconds["student"] + seconds.get("teacher", 0.0)
    found = (
        f"a forward pass over {trial.sequences} × {trial.tokens} tokens: "
        + ", ".join(f"{role} {taken:.1f} s" for role, taken in seconds.items())
        + f" (measured, {trial.models['student'].device.type}); forward and backward about {step:.1f} s, without "
        "generation"
    )
    slow = [r for r, m in trial.models.items() if m.device.type == "cpu" and m.lm.dtype.itemsize < 4]
    if slow:
        dtypes = " and ".join(f"{role}.dtype=float32" for role in slow)
        return warning(found, f"many CPUs are slow in 16 bits: try {dtypes}")
    return passed(found)


@torch.no_grad()
def forward_seconds(model: LanguageModel, sequences: int, tokens: int) -> float:
    """Seconds of a forward pass over such a batch, logits included.

    A CPU, which one sequence keeps busy, is measured with one.
    """
    measured = 1 if model.device.type == "cpu" else sequences
    tokens = min(tokens, model.context)
    ids = torch.full((measured, tokens), model.pad_id, device=model.device)
    sequence = torch.arange(measured, device=model.device).repeat_interleave(tokens)
    position = torch.arange(tokens, device=model.device).repeat(measured)
    states = PaddedStates(ids, torch.ones_like(ids), sequence, position)
    target = torch.zeros_like(position)
    stops = torch.tensor(model.vocabulary.stop_ids, device=model.device)
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < _LONGEST_TRIAL_S:
        started = time.perf_counter()
        float(token_logp(lazy_logits(model.lm, states), target, stops)[0].sum())
        seconds.append(time.perf_counter() - started)
    return min(seconds) * sequences / measured


def _split(texts: Sequence[str]) -> list[Prompt]:
    """Each text as a prompt of a few words and its completion, except too short ones, up to 1 kB in total."""
    prompts: list[Prompt] = []
    room = 1024
    for text in texts:
        text = text[:room]
        at = text.find(" ", min(12, len(text) // 2))
        at = len(text) // 2 if at < 0 else at
        if text[:at].strip():
            prompts.append(Prompt(str(len(prompts)), text[:at], completion=text[at:]))
            room -= len(text)
    return prompts


WEIGHT_CHECKS: tuple[Check[_Trial], ...] = (
    Check("self KL", "Is the divergence of each model from itself zero?", _self_kl),
    Check("bits per byte", "Does each model know these texts, the teacher better than the student?", _bits),
    Check("time", "How long does a forward pass take?", _speed),
)
