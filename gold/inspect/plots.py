"""Plots of a run's metrics."""

import contextlib
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from gold.errors import CheckpointError, ConfigError
from gold.train.run_folder import RunFolder

# Training metrics that get a panel if a run has them: name, title, unit.
_TRAIN_PANELS = (
    ("loss", "loss", ""),
    ("reward_mean", "reward", ""),
    ("length_tokens", "completion length", "tokens"),
    ("tokens_per_s", "speed", "tokens/s"),
)
# Measures that come first, in this order; the others follow in the order of the run.
_FIRST = ("accuracy", "score", "reverse_kl_per_byte", "forward_kl_per_byte", "bits_per_byte")
_UNITS = {"nats": "nats", "bits": "bits", "bytes": "bytes", "s": "s", "mib": "MiB", "tokens": "tokens"}
_TRAIN_COLOUR = "#4269d0"
_EVAL_COLOUR = "#d0652f"


def plot_run(run_dir: str | Path) -> list[Path]:
    """Draws the metrics of a run over its steps; returns the written files, `plots/learning.png` in the run's folder.

    Every numeric measure of the held-out evaluations, except times, gets a panel; of the training steps, the loss, the
    reward, the completion length and the tokens per second, if present. A measure `x` that comes with `x_low` and
    `x_high` is drawn with that band. Null, NaN and infinite values are gaps.

    Raises:
        ConfigError: matplotlib is not installed.
        CheckpointError: there is no run, it has no metrics yet, or the picture cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'gold-distill[plots]'") from error
    run = RunFolder.open(run_dir)
    panels = _panels(run.records("eval"), run.records("train"))
    if not panels:
        raise CheckpointError(f"{run.path} has no metrics yet; let it run a step, then plot")

    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    # A Figure without pyplot: no global state is changed, and no display is needed.
    figure = Figure(figsize=(3.4 * columns + 0.4, 2.5 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(run.path.resolve().name, fontsize=10)
    last = max(step for panel in panels for step in panel.steps)
    for place, panel in enumerate(panels):
        panel.draw(figure.add_subplot(rows, columns, place + 1), last)
    path = run.plots / "learning.png"
    partial = path.with_name(".tmp-learning.png")
    try:
        run.plots.mkdir(exist_ok=True)
        figure.savefig(partial, dpi=150, format="png", metadata={"Software": None})
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    return [path]


@dataclass
class _Panel:
    """One measure over the steps, held-out or in training; `band`: the lower and upper ends of its interval."""

    title: str
    unit: str
    points: Sequence[tuple[int, float]]
    held_out: bool
    band: tuple[list[float], list[float]] | None = None

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.points]

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.points]

    def draw(self, axes: Any, last: int) -> None:
        """Draws on matplotlib axes, steps from 0 to `last` as in every other panel."""
        if self.held_out:
            axes.plot(self.steps, self.values, color=_EVAL_COLOUR, marker="o", markersize=3, linewidth=1.4)
            if self.band is not None:
                axes.fill_between(self.steps, *self.band, color=_EVAL_COLOUR, alpha=0.15, linewidth=0)
        elif sum(map(math.isfinite, self.values)) < 40:
            axes.plot(self.steps, self.values, color=_TRAIN_COLOUR, linewidth=1.2, marker=".", markersize=3)
        else:
            axes.plot(self.steps, self.values, color=_TRAIN_COLOUR, linewidth=0.7, alpha=0.35)
            smooth = _running_mean(self.values, max(5, len(self.values) // 20))
            axes.plot(self.steps, smooth, color=_TRAIN_COLOUR, linewidth=1.4)
        axes.set_title(f"{self.title}, {'held out' if self.held_out else 'training'}", fontsize=8.5)
        axes.set_ylabel(self.unit, fontsize=8)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7.5)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(nbins=5)  # ticks take most of the time
        axes.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
        axes.yaxis.get_offset_text().set_fontsize(7)


def _panels(evals: Sequence[dict[str, Any]], trains: Sequence[dict[str, Any]]) -> list[_Panel]:
    measures = {name: None for record in evals for name, value in record.items() if _is_number(value)}
    # Without bounds of intervals and times of evaluations.
    names = [
        name
        for name in measures
        if name != "step"
        and not name.endswith("_s")
        and not (name.endswith(("_low", "_high")) and name.rpartition("_")[0] in measures)
    ]
    names.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    panels = []
    for name in names:
        title, unit = _words(name)
        panel = _Panel(title, unit, _points(evals, name), held_out=True)
        low, high = (
            _Panel(title, unit, _points(evals, name + end), held_out=True) for end in ("_low", "_high")
        )
        if low.steps == high.steps == panel.steps:
            panel.band = low.values, high.values
        panels.append(panel)
    for name, title, unit in _TRAIN_PANELS:
        if points := _points(trains, name):
            panels.append(_Panel(title, unit, points, held_out=False))
    return panels


def _points(records: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Step and value of every record that has the measure; NaN for null, so that the line breaks."""
    if not any(_is_number(record.get(name)) for record in records):
        return []
    having = (record for record in records if name in record)
    return sorted({r["step"]: float(r[name]) if _is_number(r[name]) else math.nan for r in having}.items())


def _is_number(value: object) -> bool:
    # An integer beyond the range of floats counts as infinite.
    return type(value) in (int, float) and abs(cast(float, value)) <= sys.float_info.max


def _words(name: str) -> tuple[str, str]:
    """A measure's name for display, and its unit: reverse_kl_per_byte → ("reverse KL", "nats per byte")."""
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


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the finite values of up to `width` steps around each; NaN if there is none."""
    around = (values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values)))
    finite = ([value for value in near if math.isfinite(value)] for near in around)
    return [sum(near) / len(near) if near else math.nan for near in finite]
