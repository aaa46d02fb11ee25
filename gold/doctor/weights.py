"""The checks that need weights: a model is its own perfect teacher, both models know the language, and how long they
take to read."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Literal

import torch

from gold.align.batch import VocabularyPair
from gold.align.collate import aligned_batch, read, student_states
from gold.data import Prompt
from gold.doctor.checks import Check
from gold.doctor.sample import JUDGED, SAMPLE
from gold.errors import GoldError
from gold.kernels import backend_for
from gold.kernels.lm_head import LazyLogits, token_logp
from gold.losses import OBJECTIVES, LossInputs
from gold.models.causal import LanguageModel, PaddedStates, rows_of
from gold.rollout.engine import completed
from gold.teachers.local import LocalTeacher
from gold.teachers.protocol import Teacher

LARGEST_SELF_KL = 1e-3
"""Fail above, in nats per byte. A divergence is of second order in rounding: 16-bit models stay below 1e-4, and two
models that can be told apart at all are above 1e-2."""
LANGUAGE_BITS = 4.0
"""Warn above, in bits per byte: a trained model needs about 1 for prose in its languages, and 8 is to know nothing."""
_LONGEST_TRIAL_S = 2.0


def examine_weights(
    student: LanguageModel, teacher: LanguageModel | None, texts: Sequence[str], sequences: int, tokens: int
) -> list[Check]:
    """Zero KL of each model with itself, bits per byte of each on the texts, seconds to read a batch; of the student
    alone where the teacher is not in this process."""
    prompts = _split(texts) or _split(SAMPLE[JUDGED])
    pair = [("student", student), *([("teacher", teacher)] if teacher else [])]
    return [_self_kl(pair, prompts), _bits(pair, prompts), _speed(pair, sequences, tokens)]


def self_divergence(model: LanguageModel, prompts: Sequence[Prompt]) -> float:
    """Reverse KL on next bytes of a model from itself as its teacher, on the prompts' completions, in nats per byte.

    The student reads all texts as one padded batch, the teacher each by itself.
    """
    return divergence(model, LocalTeacher(model, batch_tokens=1), prompts, "bytes")


def divergence(
    student: LanguageModel, teacher: Teacher, prompts: Sequence[Prompt], support: Literal["bytes", "shared"]
) -> float:
    """Reverse KL of a student from a teacher on the prompts' completions and their ends, in nats per byte."""
    pair = VocabularyPair(student.vocabulary, teacher.vocabulary)
    objective = OBJECTIVES["reverse_kl"](support=support)
    rollouts = [completed(student, prompt, 10**6) for prompt in prompts]
    texts = [read(rollout, pair) for rollout in rollouts]
    batch = aligned_batch(texts, pair, student.device, teacher)
    theirs = teacher.score(prompts, [t.teacher for t in texts], [t.stopped for t in texts])
    was_training = student.lm.training
    student.lm.eval()
    with torch.no_grad():
        mine = rows_of(student.lm, student_states(student, rollouts))
        backends = backend_for(student.device), backend_for(teacher.device)
        value = objective(LossInputs(batch, mine, LazyLogits.joined(theirs), *backends))
    student.lm.train(was_training)
    return float(value.total) / max(1, sum(len(r.tokenized.data) for r in rollouts))


@torch.no_grad()
def bits_per_byte(model: LanguageModel, prompts: Sequence[Prompt]) -> float:
    """Bits that a model needs for a byte of the prompts' completions, in its own tokens, given the prompts."""
    tokenized_texts = [model.vocabulary.encode(prompt.completion or "") for prompt in prompts]
    rows = LocalTeacher(model).score(prompts, tokenized_texts, [False] * len(prompts))
    stops = torch.tensor(model.vocabulary.stop_ids, device=model.device)
    nats = 0.0
    for states, tokenized in zip(rows, tokenized_texts, strict=True):
        target = torch.from_numpy(tokenized.ids).long().to(model.device)
        nats -= float(token_logp(states, target, stops)[0].double().sum())
    return nats / max(1, sum(len(s.data) for s in tokenized_texts)) / math.log(2)


def _self_kl(pair: Sequence[tuple[str, LanguageModel]], prompts: Sequence[Prompt]) -> Check:
    name = "zero KL"
    found = []
    worst = 0.0
    for role, model in pair:
        try:
            value = self_divergence(model, prompts)
        except GoldError as error:
            return Check(
                name, "fail", f"the {role} cannot read the texts: {error}", "give texts that it can read"
            )
        found.append(f"{role} {value:.1g}")
        worst = max(worst, abs(value)) if math.isfinite(value) else math.inf
    text = f"each model from itself, nats per byte: {', '.join(found)}"
    if worst > LARGEST_SELF_KL:
        return Check(
            name,
            "fail",
            text,
            f"it must be below {LARGEST_SELF_KL:g}: a model that answers the same text differently each time, or "
            "overflows in its dtype, can be neither taught nor teach",
        )
    return Check(name, "pass", text)


def _bits(pair: Sequence[tuple[str, LanguageModel]], prompts: Sequence[Prompt]) -> Check:
    name = "bits per byte"
    bits = {role: bits_per_byte(model, prompts) for role, model in pair}
    found = ", ".join(f"{role} {value:.2f}" for role, value in bits.items())
    lost = [role for role, value in bits.items() if not value <= LANGUAGE_BITS]
    if lost:
        return Check(
            name,
            "warn",
            found,
            f"the {' and the '.join(lost)} hardly knows these texts: are the weights and the tokenizer of one model?",
        )
    if bits.get("teacher", 0.0) > bits["student"]:
        return Check(
            name,
            "warn",
            found,
            "the student is better on these texts than its teacher: look whether it is on yours",
        )
    return Check(name, "pass", found)


def _speed(pair: Sequence[tuple[str, LanguageModel]], sequences: int, tokens: int) -> Check:
    seconds = {role: _reading_seconds(model, sequences, tokens) for role, model in pair}
    step = 3 * seconds["student"] + seconds.get("teacher", 0.0)
    found = (
        f"reading {sequences} × {tokens} tokens: "
        + ", ".join(f"{role} {taken:.1f} s" for role, taken in seconds.items())
        + f" (measured, {pair[0][1].device.type}); forward and backward about {step:.1f} s, writing not counted"
    )
    slow = [role for role, model in pair if model.device.type == "cpu" and model.lm.dtype.itemsize < 4]
    if slow:
        return Check(
            "time",
            "warn",
            found,
            f"many CPUs are slow in 16 bits: try {' and '.join(f'{role}.dtype=float32' for role in slow)}",
        )
    return Check("time", "pass", found)


@torch.no_grad()
def _reading_seconds(model: LanguageModel, sequences: int, tokens: int) -> float:
    """Seconds of a forward pass over such a batch, logits included; on a CPU, which one sequence keeps busy, of one."""
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
        float(token_logp(rows_of(model.lm, states), target, stops)[0].sum())
        seconds.append(time.perf_counter() - started)
    return min(seconds) * sequences / measured


def _split(texts: Sequence[str]) -> list[Prompt]:
    """Each text as a prompt of a few words and the completion that goes on, less those that are too short; the first
    kilobyte of all."""
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
