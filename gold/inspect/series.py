"""The numbers of a run as series over its steps, and their names for people."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

Records = Sequence[Mapping[str, Any]]

FIRST = ("accuracy", "score", "reverse_kl_per_byte", "forward_kl_per_byte", "bits_per_byte")
"""Measures that come first, in this order; the others follow in the order of the run."""
_UNITS = {"nats": "nats", "bits": "bits", "bytes": "bytes", "s": "s", "mib": "MiB", "tokens": "tokens"}
_NAMES = {"tokens_per_s": ("speed", "tokens/s"), "lr": ("learning rate", "")}


@dataclass
class Series:
    """One measure over the steps, held-out or in training; `band`: the lower and upper ends of its interval."""

    name: str
    title: str
    unit: str
    points: Sequence[tuple[int, float]]
    held_out: bool
    band: tuple[list[float], list[float]] | None = None

    @property
    def steps(self) -> list[int]:
        """The steps at which it was measured."""
        return [step for step, _ in self.points]

    @property
    def values(self) -> list[float]:
        """Its values, NaN where it had none."""
        return [value for _, value in self.points]

    @property
    def finite(self) -> list[float]:
        """Its values that are numbers."""
        return [value for value in self.values if math.isfinite(value)]


def held_out(evals: Records) -> list[Series]:
    """Every numeric measure of the evaluations, except times and the ends of intervals, with its interval if it has
    one."""
    measures = {name: None for record in evals for name, value in record.items() if is_number(value)}
    names = [
        name
        for name in measures
        if name != "step"
        and not name.endswith("_s")
        and not (name.endswith(("_low", "_high")) and name.rpartition("_")[0] in measures)
    ]
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    found = []
    for name in names:
        series = of_records(evals, name, held_out=True)
        low, high = (of_records(evals, name + end, held_out=True) for end in ("_low", "_high"))
        if low.steps == high.steps == series.steps:
            series.band = low.values, high.values
        found.append(series)
    return found


def training(trains: Records, names: Sequence[str] | None = None) -> list[Series]:
    """The named metrics of the steps that a run has; without names all numbers."""
    if names is None:
        names = list({name: None for record in trains for name, value in record.items() if is_number(value)})
    found = [of_records(trains, name, held_out=False) for name in names if name != "step"]
    return [series for series in found if series.points]


def of_records(records: Records, name: str, held_out: bool) -> Series:
    """A measure of the records that have it; NaN for null, so that a line breaks."""
    title, unit = words(name)
    points: list[tuple[int, float]] = []
    if any(is_number(record.get(name)) for record in records):
        having = (record for record in records if name in record)
        points = sorted(
            {r["step"]: float(r[name]) if is_number(r[name]) else math.nan for r in having}.items()
        )
    return Series(name, title, unit, points, held_out)


def is_number(value: object) -> bool:
    """Whether a value of a record can be drawn; an integer beyond the range of floats cannot."""
    return type(value) in (int, float) and abs(cast(float, value)) <= sys.float_info.max


def words(name: str) -> tuple[str, str]:
    """A measure's name for display, and its unit: reverse_kl_per_byte → ("reverse KL", "nats per byte")."""
    if name in _NAMES:
        return _NAMES[name]
    base, _, per = name.partition("_per_")
    stem, _, last = base.rpartition("_")
    unit = ""
    if stem and last in _UNITS:
        base, unit = stem, _UNITS[last]
    elif stem and last == "kl":
        unit = "nats"
    elif per:  # bits_per_byte: the unit is the measure
        base, unit, per = name, "", ""
    if per:
        unit = f"{unit} per {per.replace('_', ' ')}"
    return re.sub(r"\bkl\b", "KL", base.replace("_", " ").replace("/", " ")), unit


def named(name: str) -> str:
    """A measure's name with its unit, for tables."""
    return ", ".join(filter(None, words(name)))


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the finite values of up to `width` steps around each; NaN if there is none."""
    around = (values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values)))
    finite = ([value for value in near if math.isfinite(value)] for near in around)
    return [sum(near) / len(near) if near else math.nan for near in finite]
