"""Warnings about a run: skipped data, steps not applied, and slow drift of metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gold.errors import TrainingError

WINDOW = 5
"""Number of steps averaged at the start and at the end."""
LENGTH_FACTOR = 3.0
"""Factor by which the length may differ from the start before a run warns."""
REPETITION_SHARE = 0.5
"""Share of repeated n-grams above which a run warns, if it has also more than doubled since the start."""
ENTROPY_FACTOR = 10.0
"""Factor by which nats per sampled token may fall from the start. A student that learns well loses half of them."""
CANONICAL_LOSS = 0.1
"""Largest drop of the share of canonical tokens from the start."""
UNRESOLVED_SHARE, UNRESOLVED_FACTOR = 0.1, 2.0
"""Share of the teacher's probability after a byte of which the next byte is unresolved, above which a run warns if it
has grown by this factor since the start: all of it counts as one event."""
NGRAM_BYTES = 8
"""Bytes of an n-gram; it is repeated if the same text contained it before."""
MISSED_SHARE = 0.1
"""Share of bytes at which the student gives the teacher's most probable byte less than 1 %, above which a run warns."""


def repetition(data: bytes) -> float:
    """Share of the text's byte n-grams that occurred in it before; 0 for a text without n-grams."""
    ngrams = [data[i : i + NGRAM_BYTES] for i in range(len(data) - NGRAM_BYTES + 1)]
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


class Warnings:
    """The warnings of a run, each kind once."""

    def __init__(self, bad_steps_allowed: int, bad_steps: int = 0, *, reverse_kl: bool = True) -> None:
        self.allowed, self.bad_steps, self.reverse_kl = bad_steps_allowed, bad_steps, reverse_kl
        self._drift = Drift()
        self._shown: set[str] = set()

    def after(self, record: Mapping[str, Any], examples: Mapping[str, str]) -> list[str]:
        """The messages after this step; ``examples`` of skipped items, by metric."""
        found = {}
        if count := record.get("skipped_sequences"):
            example = examples.get("skipped_sequences")
            found["skipped"] = (
                f"{count} completions do not fit a model's context behind their prompts"
                f"{f', such as {example}' if example else ''}; they are left out and counted (skipped_sequences); "
                "shorten the longest prompts, or lower rollout.max_new_tokens"
            )
        if record["bad_steps"] > self.bad_steps:
            found[f"bad {record['step']}"] = (
                f"{why_bad(record).removeprefix('a ')}; the step was not applied ({record['bad_steps']} in a row, "
                f"{self.allowed} are allowed)"
            )
        self.bad_steps = record["bad_steps"]
        if count := record.get("teacher_impossible"):
            found["impossible"] = (
                f"nothing is learned from {count} texts, to which the teacher gives probability 0 "
                f"(teacher_impossible counts them){examples.get('teacher_impossible', '')}. Does its server cut off "
                "what is unlikely? vLLM does with --logprobs-mode processed_logprobs and a top_p or top_k"
            )
        if share := record.get("ended_error_share"):
            found["environment"] = (
                f"{share:.0%} of the conversations were ended by an error of the environment (ended_error_share), for "
                f"one {examples.get('ended_error_share')}"
            )
        missed = record.get("teacher_top1_missed_share", 0.0)
        if self.reverse_kl and missed > MISSED_SHARE:
            found["missed"] = (
                f"at {missed:.0%} of bytes the student gives the teacher's likeliest byte less than 1 %. "
                "Reverse KL hardly moves what the student never samples: begin with forward_kl, or add it with a "
                "small weight, or train on teacher completions first (sft, rollout.on_policy=0)"
            )
        found |= self._drift.check(record)
        fresh = {kind: text for kind, text in found.items() if kind not in self._shown}
        self._shown |= set(fresh)
        return [f"step {record['step']}: {text}" for text in fresh.values()]


class Drift:
    """Compares the last steps of a run with its first ones."""

    def __init__(self) -> None:
        self._first: dict[str, list[float]] = {}
        self._last: dict[str, list[float]] = {}

    def check(self, record: Mapping[str, Any]) -> dict[str, str]:
        """Messages on drifted metrics, by kind; empty during the first ``WINDOW`` steps."""
        found: dict[str, str] = {}
        for name in (
            *("length_bytes", "repetition", "sampled_entropy", "canonical_share"),
            "teacher_unresolved_mass",
        ):
            if name not in record:
                continue
            first, last = self._first.setdefault(name, []), self._last.setdefault(name, [])
            if len(first) < WINDOW:
                first.append(float(record[name]))
            last[:] = [*last[-WINDOW + 1 :], float(record[name])]
            if len(first) == WINDOW:
                found |= _drifted(name, sum(first) / WINDOW, sum(last) / WINDOW)
        return found


def _drifted(name: str, before: float, now: float) -> dict[str, str]:
    if name == "length_bytes" and max(now, 1.0) > LENGTH_FACTOR * max(before, 1.0):
        return {
            "length": f"completions have {now:.0f} bytes, at the start {before:.0f}: does the student learn to stop? "
            "Look at stop_rate, and at the stop ids of both sides (gold doctor)"
        }
    if name == "length_bytes" and LENGTH_FACTOR * max(now, 1.0) < before:
        return {
            "length": f"completions have {now:.0f} bytes, at the start {before:.0f}: a loss that falls while texts "
            "get short measures the wrong thing; look at samples.jsonl"
        }
    if name == "repetition" and now > REPETITION_SHARE and now > 2 * before:
        return {
            "repetition": f"{now:.0%} of what completions say repeats itself, at the start {before:.0%}; lower the "
            "learning rate, or hold the student with reference_kl"
        }
    if name == "sampled_entropy" and ENTROPY_FACTOR * now < before:
        return {
            "entropy": f"a sampled token carries {now:.2g} nats, at the start {before:.2g}: the student soon writes "
            "one text only; add forward_kl or reference_kl, or take a jsd"
        }
    if name == "canonical_share" and now < before - CANONICAL_LOSS:
        return {
            "canonical": f"{now:.0%} of the sampled tokens are those that the tokenizer gives their text, at the "
            f"start {before:.0%}; give the policy gradient a noncanonical_penalty, or add reverse_kl"
        }
    if name == "teacher_unresolved_mass" and now > max(UNRESOLVED_SHARE, UNRESOLVED_FACTOR * before):
        return {
            "unresolved": f"{now:.0%} of what the teacher expects after a byte is unresolved, at the start "
            f"{before:.0%}: the student goes where its loss sees little of the teacher. Look at samples.jsonl, and at "
            "the exact divergence of gold eval; add forward_kl on teacher completions, or a span_pg term"
        }
    return {}


def why_bad(record: Mapping[str, Any]) -> str:
    """The reason why a step was not applied, from its metrics."""
    if record.get("teacher_impossible") and not record.get("grad_norm"):
        return "no text that the teacher finds possible"
    return str(record.get("why", "a NaN or infinite loss or gradient"))


def remedy_for(record: Mapping[str, Any]) -> str:
    """The advice about a step that was not applied, from its metrics."""
    if record.get("teacher_impossible") and not record.get("grad_norm"):
        return "let the server tell what is unlikely too (gold doctor says how), or take another teacher"
    return str(record.get("remedy", "lower optimizer.lr, or look at the last lines of metrics.jsonl"))


def check_end(record: Mapping[str, Any]) -> None:
    """Checks that the last step of a finished run, given by its record, was applied.

    Raises:
        TrainingError: it was not; the message gives the number of bad steps at the end, and the reason.
    """
    if bad := record.get("bad_steps"):
        raise TrainingError(
            f"step {record['step']}: the run has ended, but its last {bad} step(s) had {why_bad(record)} "
            "and were not applied; the student is that of the steps before: use it as it is, or train it anew and "
            f"{remedy_for(record)}"
        )
