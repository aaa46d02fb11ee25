"""The part `prompts` with 400 prompts alone, where the rate decides who is ahead; lower rates than its record's."""

from __future__ import annotations

from typing import Any

from benchmarks.claims import prompts
from benchmarks.claims.cells import Given

SIZES = prompts.Sizes(numbers=(400,), tuned=(400,))
table, draw = prompts.table, prompts.draw


def measure(given: Given) -> dict[str, Any]:
    """Both ways with 400 prompts."""
    return prompts.measure(given, SIZES)
