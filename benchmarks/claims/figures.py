"""Statistics and pictures that the claims share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

T95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % points of Student's t for 0 … 9 degrees of freedom."""


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with the half width of its 95 % interval (Student's t; none for one seed), and the values."""
    half = T95[len(values) - 1] * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": mean(values), "half": half, "seeds": list(values)}


def told(value: Mapping[str, Any], form: str = ".1%") -> str:
    """A mean with its half width: ``93.1% ± 0.8``; shares in percent points."""
    if value["half"] is None:
        return format(value["mean"], form)
    half = format(value["half"], form).rstrip("%")
    return f"{value['mean']:{form}} ± {half}"


def cost_of(
    curve: Sequence[Mapping[str, float]], cost: str, level: float, of: str = "accuracy"
) -> float | None:
    """What a curve had cost when it first reached ``level``, between two points in proportion; None if it never did."""
    if curve[0][of] >= level:
        return curve[0][cost]
    for before, after in itertools.pairwise(curve):
        if after[of] >= level:
            share = (level - before[of]) / (after[of] - before[of])
            return before[cost] + share * (after[cost] - before[cost])
    return None


def at_cost(curve: Sequence[Mapping[str, float]], cost: str, spent: float, of: str = "accuracy") -> float:
    """Where a curve stood when it had cost ``spent``, between two points in proportion; after its end, its end."""
    for before, after in itertools.pairwise(curve):
        if before[cost] <= spent <= after[cost]:
            share = (spent - before[cost]) / max(1e-9, after[cost] - before[cost])
            return before[of] + share * (after[of] - before[of])
    return curve[-1][of]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column to the left, the others to the right."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def canvas(columns: int = 1, rows: int = 1, size: tuple[float, float] = (4.6, 3.4)) -> tuple[Any, Any]:
    """A figure and its axes, for files alone: no display is opened."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, path: Path) -> None:
    """Writes a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
