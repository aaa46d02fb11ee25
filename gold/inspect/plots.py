"""Plots of a run's metrics."""

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from gold.errors import CheckpointError, ConfigError
from gold.inspect.series import Records, Series, held_out, running_mean, training
from gold.train.run_folder import RunFolder

# Training metrics that get a panel if a run has them: name, title, unit.
_TRAIN_PANELS = (
    ("loss", "loss", ""),
    ("reward_mean", "reward", ""),
    ("length_tokens", "completion length", "tokens"),
    ("tokens_per_s", "speed", "tokens/s"),
)
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
        _draw(panel, figure.add_subplot(rows, columns, place + 1), last)
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


def _draw(series: Series, axes: Any, last: int) -> None:
    """Draws on matplotlib axes, steps from 0 to `last` as in every other panel."""
    if series.held_out:
        axes.plot(series.steps, series.values, color=_EVAL_COLOUR, marker="o", markersize=3, linewidth=1.4)
        if series.band is not None:
            axes.fill_between(series.steps, *series.band, color=_EVAL_COLOUR, alpha=0.15, linewidth=0)
    elif len(series.finite) < 40:
        axes.plot(series.steps, series.values, color=_TRAIN_COLOUR, linewidth=1.2, marker=".", markersize=3)
    else:
        axes.plot(series.steps, series.values, color=_TRAIN_COLOUR, linewidth=0.7, alpha=0.35)
        smooth = running_mean(series.values, max(5, len(series.values) // 20))
        axes.plot(series.steps, smooth, color=_TRAIN_COLOUR, linewidth=1.4)
    axes.set_title(f"{series.title}, {'held out' if series.held_out else 'training'}", fontsize=8.5)
    axes.set_ylabel(series.unit, fontsize=8)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7.5)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(nbins=5)  # ticks take most of the time
    axes.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    axes.yaxis.get_offset_text().set_fontsize(7)


def _panels(evals: Records, trains: Records) -> list[Series]:
    """The series that get a panel."""
    return held_out(evals) + [
        replace(series, title=title, unit=unit)
        for name, title, unit in _TRAIN_PANELS
        for series in training(trains, [name])
    ]
