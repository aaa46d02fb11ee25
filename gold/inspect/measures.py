"""The measures of an evaluation as lines for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_UNITS = {
    "_kl_per_byte": "nats/byte",
    "bits_per_byte": "bits/byte",
    "_tokens": "tokens",
    "_bytes": "bytes",
    "_sequences": "sequences",
}
_SHARES = ("_share", "_mass", "_rate", "_prob", "accuracy")


def measure_lines(measures: Mapping[str, float]) -> Iterator[str]:
    """Each measure on a line: its name, its value with its unit (shares in %), and its 95 % interval if it has one.

    The measures of one teacher's prompts, such as ``accuracy[NAME]``, have the units of their kind.
    """
    names = [n for n in measures if not (n.endswith(("_low", "_high")) and n.rpartition("_")[0] in measures)]
    width = max(map(len, names), default=0)
    for name in names:
        kind = name.partition("[")[0]
        unit = next((unit for end, unit in _UNITS.items() if kind.endswith(end)), "")
        scale, unit = (100.0, "%") if kind.endswith(_SHARES) else (1.0, unit)
        digits = 1 if unit in ("%", "tokens", "bytes") else 0 if unit == "sequences" else 4
        value, low, high = (
            f"{scale * measures[name + end]:.{digits}f}" if _is_known(measures, name, end) else None
            for end in ("", "_low", "_high")
        )
        line = f"{name:<{width}} {value:>10} {unit:<9}"
        yield (line if low is None else f"{line}  95 %: {low} to {high}").rstrip()


def _is_known(measures: Mapping[str, float], name: str, end: str) -> bool:
    """Whether there is such a measure; the end of an interval that could not be computed is none."""
    value = measures.get(name + end)
    return value is not None and not (end and math.isnan(value))


def task_lines(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """A table of the scores of some models, by name, on tasks: a line for each metric, with its standard error."""
    rows: list[list[str]] = [["task", "metric", *scores]]
    first = next(iter(scores.values()))
    rows += [
        [task, metric, *(_score(found[task][metric]) for found in scores.values())]
        for task, metrics in first.items()
        for metric in metrics
    ]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(_cells(row, widths)).rstrip()


def _cells(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for n, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if n < 2 else cell.rjust(width)


def _score(found: Mapping[str, float | None]) -> str:
    error = found["stderr"]
    return f"{found['value']:.4f}" + (f" ± {error:.4f}" if error is not None else "")
