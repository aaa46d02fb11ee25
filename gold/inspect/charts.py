"""Line charts as SVG, for pages: their colours are the page's, and a script may read values off them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from gold.inspect.series import Series, running_mean

WIDTH, HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 8, 24
_MOST_POINTS = 300
"""Points of a line; a longer one is drawn as means of neighbouring steps, with their range."""
_LOG_FROM = 300.0
"""Ratio of the largest to the smallest value from which a scale is logarithmic."""
COLOURS = 8
"""Number of colours of lines, the classes `c0` to `c7`."""


@dataclass(frozen=True)
class Line:
    """One line of a chart; ``label`` is empty where it is the only one. Its colour is one of ``COLOURS``."""

    points: Sequence[tuple[float, float]]
    label: str = ""
    colour: int = 0
    band: tuple[Sequence[float], Sequence[float]] | None = None
    marked: bool = False

    @classmethod
    def of(cls, series: Series, label: str = "", colour: int = 0) -> Line:
        """The line of a series; points of evaluations are marked."""
        return cls(series.points, label, colour, series.band, series.held_out)


@dataclass(frozen=True)
class Chart:
    """A chart's HTML, and its values for the script: per line its label, colour, steps, values and band."""

    html: str
    data: dict[str, Any]


def line_chart(title: str, unit: str, lines: Sequence[Line], place: int, steps: int = 0) -> Chart:
    """Values over steps from 0 to at least ``steps``; ``place`` is the chart's index in the script's data."""
    lines = [_thinned(line) for line in lines]
    last = max([float(steps), *(x for line in lines for x, _ in line.points)])
    axis = _Axis.of([v for line in lines for v in _drawn_values(line)])
    parts = [_grid(axis, last)]
    for line in lines:
        parts += _drawn(line, axis, last)
    data = {"last": last, "lines": [_line_data(line) for line in lines]}
    note = "log scale" if axis.log else ""
    return Chart(_figure(title, unit, "".join(parts), place, note, _legend(lines), _ends(lines)), data)


def stacked_chart(title: str, unit: str, lines: Sequence[Line], place: int, steps: int = 0) -> Chart:
    """As ``line_chart``, with the lines' values on top of one another; all have the same steps."""
    lines = [_thinned(line) for line in lines]
    last = max([float(steps), *(x for line in lines for x, _ in line.points)])
    below = [0.0] * len(lines[0].points)
    areas: list[tuple[Line, list[float], list[float]]] = []
    for line in lines:
        above = [b + max(0.0, v) for b, (_, v) in zip(below, line.points, strict=True)]
        areas.append((line, below, above))
        below = above
    axis = _Axis.of([0.0, *below], log=False)
    parts = [_grid(axis, last)]
    for line, low, high in areas:
        x = [point[0] for point in line.points]
        parts.append(f'<path class="area c{line.colour}" d="{_region(x, low, high, axis, last)}"/>')
    data = {"last": last, "lines": [_line_data(line) for line in lines]}
    return Chart(_figure(title, unit, "".join(parts), place, "stacked", _legend(lines), ""), data)


def number(value: float) -> str:
    """A value in few characters."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size and (size >= 1e6 or size < 1e-3):
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    text = f"{value:.3g}" if size < 0.1 else f"{value:,.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float], log: bool | None = None) -> _Axis:
        finite = [v for v in values if math.isfinite(v)] or [0.0]
        low, high = min(finite), max(finite)
        if log is None:
            log = low > 0 and high / low > _LOG_FROM
        if log:
            return cls(math.log10(low) - 0.05, math.log10(high) + 0.05, True)
        pad = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
        bottom = low - pad
        return cls(0.0 if bottom < 0 <= low else bottom, high + pad, False)

    def y(self, value: float) -> float:
        """The height of a value in the picture."""
        value = math.log10(value) if self.log else value
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def ticks(self) -> list[float]:
        """Round values along the axis."""
        if self.log:
            return [10.0**e for e in range(math.ceil(self.low), math.floor(self.high) + 1)]
        return _round_values(self.low, self.high, 4)


def _round_values(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _x(step: float, last: float) -> float:
    return _LEFT + step / max(last, 1.0) * (WIDTH - _LEFT - _RIGHT)


def _grid(axis: _Axis, last: float) -> str:
    parts = []
    for value in axis.ticks():
        y = axis.y(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>'
        )
    steps = sorted({round(v) for v in _round_values(0.0, max(last, 1.0), 5)})
    for step in steps:
        x = _x(step, last)
        anchor = "end" if x > WIDTH - 24 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{step:,}</text>')
    return "".join(parts)


def _drawn(line: Line, axis: _Axis, last: float) -> Iterator[str]:
    x, values = [p[0] for p in line.points], [p[1] for p in line.points]
    if line.band is not None:
        yield f'<path class="band c{line.colour}" d="{_region(x, *line.band, axis, last)}"/>'
    smooth = not line.marked and line.band is None and len(values) >= 40
    yield f'<path class="line c{line.colour}{" raw" if smooth else ""}" d="{_path(x, values, axis, last)}"/>'
    if smooth:
        mean = running_mean(values, max(5, len(values) // 20))
        yield f'<path class="line c{line.colour}" d="{_path(x, mean, axis, last)}"/>'
    if line.marked:
        for step, value in line.points:
            if math.isfinite(value):
                yield f'<circle class="c{line.colour}" cx="{_x(step, last):.1f}" cy="{axis.y(value):.1f}" r="2.5"/>'


def _path(x: Sequence[float], values: Sequence[float], axis: _Axis, last: float) -> str:
    """The line through all values, broken where there is none; a value alone is a dot."""
    parts, drawing = [], False
    for step, value in zip(x, values, strict=True):
        if not math.isfinite(value):
            drawing = False
            continue
        place = f"{_x(step, last):.1f} {axis.y(value):.1f}"
        parts.append(f"L{place}" if drawing else f"M{place}h0")
        drawing = True
    return "".join(parts)


def _region(x: Sequence[float], low: Sequence[float], high: Sequence[float], axis: _Axis, last: float) -> str:
    """The regions between two lines, one for each run of steps at which both are known."""
    parts: list[str] = []
    run: list[tuple[float, float, float]] = []
    for step, a, b in [*zip(x, low, high, strict=True), (0.0, math.nan, math.nan)]:
        if math.isfinite(a) and math.isfinite(b):
            run.append((_x(step, last), axis.y(a), axis.y(b)))
            continue
        if run:
            there = [f"{left:.1f} {top:.1f}" for left, _, top in run]
            back = [f"{left:.1f} {bottom:.1f}" for left, bottom, _ in reversed(run)]
            parts.append(f"M{'L'.join([*there, *back])}Z")
        run = []
    return "".join(parts)


def _drawn_values(line: Line) -> list[float]:
    return [value for _, value in line.points] + [v for end in line.band or () for v in end]


def _thinned(line: Line) -> Line:
    """The line with at most ``_MOST_POINTS`` points."""
    size = math.ceil(len(line.points) / _MOST_POINTS)
    if size <= 1:
        return line
    points, low, high = [], [], []
    for first in range(0, len(line.points), size):
        near = line.points[first : first + size]
        finite = [value for _, value in near if math.isfinite(value)]
        points.append((near[-1][0], sum(finite) / len(finite) if finite else math.nan))
        low.append(min(finite, default=math.nan))
        high.append(max(finite, default=math.nan))
    return Line(points, line.label, line.colour, (low, high), marked=False)


def _line_data(line: Line) -> dict[str, Any]:
    def told(values: Sequence[float]) -> list[str]:
        return [number(value) for value in values]

    found: dict[str, Any] = {
        "label": line.label,
        "colour": line.colour,
        "steps": [x for x, _ in line.points],
        "values": told([v for _, v in line.points]),
    }
    if line.band is not None:
        found |= {"low": told(line.band[0]), "high": told(line.band[1])}
    return found


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    named = "".join(f'<span class="key c{line.colour}">{escape(line.label)}</span>' for line in lines)
    return f'<p class="keys">{named}</p>'


def _ends(lines: Sequence[Line]) -> str:
    """The first and last value of the only line."""
    finite = [v for _, v in lines[0].points if math.isfinite(v)] if len(lines) == 1 else []
    return f"{number(finite[0])} → {number(finite[-1])}" if len(finite) > 1 else ""


def _figure(title: str, unit: str, content: str, place: int, note: str, legend: str, ends: str) -> str:
    said = ", ".join(filter(None, (unit, note)))
    return (
        f'<figure class="chart" data-chart="{place}"><figcaption><b>{escape(title)}</b> '
        f'<span class="unit">{escape(said)}</span> <output>{ends}</output></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(title, quote=True)} '
        f'over steps{": " + ends if ends else ""}">{content}'
        f'<line class="cross" x1="-9" x2="-9" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/></svg>{legend}</figure>\n'
    )


PLOT = {"left": _LEFT, "right": WIDTH - _RIGHT, "width": WIDTH}
"""Where the plotted part of a chart is, for the script."""
