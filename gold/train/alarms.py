"""What goes wrong slowly: lengths that run away or collapse, repetition, lost entropy, spellings of no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gold.errors import TrainingError

WINDOW = 5
"""Steps that are averaged, at the start and now."""
LENGTH_FACTOR = 3.0
"""Longer or shorter than at the start by this factor."""
REPETITION_SHARE = 0.5
"""Share of repeated stretches above which a text says nothing new, if it was half as much at the start."""
ENTROPY_FACTOR = 10.0
"""Nats per sampled token lower than at the start by this factor. A student that learns well loses half of them."""
CANONICAL_LOSS = 0.1
"""How much lower than at the start the share of canonical tokens may be."""
STRETCH = 8
"""Bytes of a stretch that counts as repeated where the same text had it before."""


def repetition(data: bytes) -> float:
    """Share of the text's stretches of ``STRETCH`` bytes that occurred in it before; 0 for a text that has none."""
    stretches = [data[i : i + STRETCH] for i in range(len(data) - STRETCH + 1)]
    return 1.0 - len(set(stretches)) / len(stretches) if stretches else 0.0


class Alarms:
    """Compares the last steps of a run with its first ones."""

    def __init__(self) -> None:
        self._first: dict[str, list[float]] = {}
        self._last: dict[str, list[float]] = {}

    def check(self, record: Mapping[str, Any]) -> dict[str, str]:
        """What a person should know after this step, by kind; empty during the first ``WINDOW`` steps."""
        for name in ("length_bytes", "repetition", "sampled_entropy", "canonical_share"):
            if name not in record:
                continue
            first, last = self._first.setdefault(name, []), self._last.setdefault(name, [])
            if len(first) < WINDOW:
                first.append(float(record[name]))
            last[:] = [*last[-WINDOW + 1 :], float(record[name])]
        found: dict[str, str] = {}
        step = record["step"]
        for name in self._first:
            if len(self._first[name]) < WINDOW:
                continue
            before, now = (sum(values[name]) / WINDOW for values in (self._first, self._last))
            if name == "length_bytes" and max(now, 1.0) > LENGTH_FACTOR * max(before, 1.0):
                found["length"] = (
                    f"step {step}: completions have {now:.0f} bytes, at the start {before:.0f}: does the student learn "
                    "to stop? Look at stop_rate, and at the stop ids of both sides (gold doctor)"
                )
            elif name == "length_bytes" and LENGTH_FACTOR * max(now, 1.0) < before:
                found["length"] = (
                    f"step {step}: completions have {now:.0f} bytes, at the start {before:.0f}: a loss that falls "
                    "while texts get short measures the wrong thing; look at samples.jsonl"
                )
            elif name == "repetition" and now > REPETITION_SHARE and now > 2 * before:
                found["repetition"] = (
                    f"step {step}: {now:.0%} of what completions say repeats itself, at the start {before:.0%}; lower "
                    "the learning rate, or hold the student with reference_kl"
                )
            elif name == "sampled_entropy" and ENTROPY_FACTOR * now < before:
                found["entropy"] = (
                    f"step {step}: a sampled token carries {now:.2g} nats, at the start {before:.2g}: the student soon "
                    "writes one text only; add forward_kl or reference_kl, or take a jsd"
                )
            elif name == "canonical_share" and now < before - CANONICAL_LOSS:
                found["canonical"] = (
                    f"step {step}: {now:.0%} of the sampled tokens are those that the tokenizer gives their text, at "
                    f"the start {before:.0%}; give the policy gradient a noncanonical_penalty, or add reverse_kl"
                )
        return found


def why_bad(record: Mapping[str, Any]) -> str:
    """The reason why a step was not applied, by its metrics."""
    if record.get("teacher_impossible") and not record.get("grad_norm"):
        return "no text that the teacher finds possible"
    return str(record.get("why", "a NaN or infinite loss or gradient"))


def remedy_for(record: Mapping[str, Any]) -> str:
    """What to do about a step that was not applied, by its metrics."""
    if record.get("teacher_impossible") and not record.get("grad_norm"):
        return "let the server tell what is unlikely too (gold doctor says how), or take another teacher"
    return str(record.get("remedy", "lower optimizer.lr, or look at the last lines of metrics.jsonl"))


def check_end(record: Mapping[str, Any]) -> None:
    """Nothing, where the last step of an ended run, of which this is the record, was applied.

    Raises:
        TrainingError: it was not, nor were those before it that are counted with it.
    """
    if bad := record.get("bad_steps"):
        raise TrainingError(
            f"step {record['step']}: the run has ended, but its last {bad} step(s) had {why_bad(record)} "
            "and were not applied; the student is that of the steps before: use it as it is, or train it anew and "
            f"{remedy_for(record)}"
        )
