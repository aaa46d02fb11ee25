"""Metrics of a step: sums over its sequences and processes, and the record computed from them."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from gold.activity import doing
from gold.align.batch import AlignedBatch
from gold.rollout.types import Rollout
from gold.teachers.several import Teachers
from gold.train.alarms import repetition
from gold.train.conversing import conversation_record
from gold.train.setup import BoundTerm


def device_clock(device: torch.device) -> Callable[[], float]:
    """A clock, in seconds, that synchronizes the device first, so that its work counts for the right phase."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


class PhaseTimer:
    """Seconds by phase: ``with timer("rollout"): …``."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the seconds of a block to the phase, and names what is being done in it."""
        started = self.now()
        try:
            with doing(phase):
                yield
        finally:
            self.seconds[phase] += self.now() - started


def rollout_sums(
    rollouts: Sequence[Rollout], kept: Sequence[Rollout], batches: Sequence[AlignedBatch]
) -> dict[str, float]:
    """Sums over the step's completions, and over ``kept``, those used for training, aligned in ``batches``."""
    sampled = [r for r in rollouts if r.sampled]
    canonical = [b.canonical_rows[b.sampled_rows] for b in batches]
    return {
        "sequences": len(rollouts),
        "tokens": sum(r.ids.size for r in rollouts),
        "bytes": sum(len(r.tokenized.data) for r in rollouts),
        "kept": len(kept),
        "sampled": len(sampled),
        "repaired": sum(t.teacher.repaired_bytes for b in batches for t in b.texts),
        "stopped": sum(r.stopped for r in sampled),
        "thinking_cut": sum(r.thinking_cut for r in sampled),
        "sampled_tokens": sum(int(r.sampled_mask.sum()) for r in sampled),
        "sampling_logprobs": sum(float(r.sampling_logprobs.sum()) for r in sampled),
        "aligned_tokens": sum(c.numel() for c in canonical),
        "canonical_tokens": sum(float(c.sum()) for c in canonical),
        "repetition": sum(repetition(r.tokenized.data) for r in sampled),
        "reward": sum(r.reward or 0.0 for r in sampled),
        "rewarded": sum(r.reward is not None for r in sampled),
    }


def step_record(
    head: Mapping[str, Any],
    sums: Mapping[str, float],
    counts: Mapping[str, float],
    terms: Sequence[BoundTerm],
    teachers: Teachers | None,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The metrics of a step. ``head`` comes first; ``counts`` are each term's units.

    A part of a loss has its own name, with the label of its term before it if another metric has that name.
    """
    record: dict[str, Any] = dict(head)
    if teachers is not None or sums["skipped_sequences"]:
        record["skipped_sequences"] = int(sums["skipped_sequences"])
    record |= {t.label: sums[t.label] / counts[t.label] for t in terms if counts[t.label]}
    rest: dict[str, Any] = {}
    if sums["logp_bytes"]:
        gap = sums["student_logp"] - sums["teacher_logp"]
        rest["sampled_reverse_kl_per_byte"] = gap / sums["logp_bytes"]
    if teachers is not None:
        rest |= _by_teacher(sums, counts, terms, teachers)
    if sampled := sums["sampled"]:
        rest["sampled_entropy"] = -sums["sampling_logprobs"] / max(1.0, sums["sampled_tokens"])
        rest["repetition"] = sums["repetition"] / sampled
        rest["stop_rate"] = sums["stopped"] / sampled
        rest["canonical_share"] = sums["canonical_tokens"] / max(1.0, sums["aligned_tokens"])
        if sums["rewarded"]:
            rest["reward_mean"] = sums["reward"] / sums["rewarded"]
    if teachers is not None:
        rest["repaired_share"] = sums["repaired"] / max(1.0, sums["bytes"])
    rest["length_tokens"] = sums["tokens"] / max(1.0, sums["sequences"])
    rest["length_bytes"] = sums["bytes"] / max(1.0, sums["sequences"])
    if sums["masked_sequences"]:
        rest["masked_sequences"] = int(sums["masked_sequences"])
    if sampled and "staleness" in sums:
        rest["staleness"] = sums["staleness"] / sampled
    if ratios := sums["ratio_tokens"]:
        rest["policy_log_ratio_abs"] = sums["log_ratio"] / ratios
        rest["policy_kl"] = sums["ratio_k3"] / ratios
        rest["policy_ratio_max"] = sums["ratio_max"]
        rest["policy_ratio_capped_share"] = sums["ratio_capped"] / ratios
    if sums["uncompared_bytes"]:
        rest["uncompared_share"] = sums["uncompared_bytes"] / max(1.0, sums["bytes"])
    if sums["thinking_cut"]:
        rest["thinking_cut_share"] = sums["thinking_cut"] / sampled
    total = sum(seconds.values())
    rest |= {f"{phase}_s": spent for phase, spent in seconds.items()}
    rest |= {"step_s": total, "tokens_per_s": sums["tokens"] / total}
    if "teacher_tokens" in sums:
        rest["teacher_tokens_per_s"] = sums["teacher_tokens"] / seconds["teacher"]
    if "teacher_retries" in sums:
        rest["teacher_retries"] = int(sums["teacher_retries"])
    if sums["teacher_impossible"]:
        rest["teacher_impossible"] = int(sums["teacher_impossible"])
    rest |= conversation_record(sums, record.keys() | rest.keys())
    taken = record.keys() | rest.keys()
    for name, (label, mean) in _parts(sums, terms).items():
        record[part_name(label, name) if name in taken else name] = mean
    return record | rest


def part_name(label: str, name: str) -> str:
    """The name under which a step adds up a part of a term's loss; no other sum has such a name."""
    return f"{label}.{name}"


def _parts(sums: Mapping[str, float], terms: Sequence[BoundTerm]) -> dict[str, tuple[str, float]]:
    """The label of the term and the mean over its unit for each part of a loss, by name. If several terms have a part
    of the same name, it is the first term's."""
    found: dict[str, tuple[str, float]] = {}
    for term in terms:
        before = part_name(term.label, "")
        for name, mean in sums.items():
            if name.startswith(before):
                found.setdefault(name.removeprefix(before), (term.label, mean))
    return found


def _by_teacher(
    sums: Mapping[str, float], counts: Mapping[str, float], terms: Sequence[BoundTerm], teachers: Teachers
) -> dict[str, Any]:
    """The metrics of each of several teachers: with routes each term, with a mix the sampled reverse KL."""
    record: dict[str, Any] = {}
    for name in teachers.routes:
        labels = [f"{t.label}[{name}]" for t in terms]
        record |= {label: sums[label] / counts[label] for label in labels if counts[label]}
    for name in teachers.members if teachers.mix and sums["logp_bytes"] else ():
        if (logp := sums.get(f"teacher_logp[{name}]")) is not None:
            gap = sums["student_logp"] - logp
            record[f"sampled_reverse_kl_per_byte[{name}]"] = gap / sums["logp_bytes"]
    return record
