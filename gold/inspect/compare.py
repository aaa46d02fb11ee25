"""Runs beside each other: their final measures, their costs, where their configurations differ, and their curves."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from gold import terminal
from gold.errors import ConfigError
from gold.files import replace_text
from gold.inspect.charts import COLOURS, PLOT, Chart, Line, line_chart, number
from gold.inspect.html import document
from gold.inspect.report import RunRecords, duration, style_and_script
from gold.inspect.series import held_out, is_number, named, training
from gold.train.resume_rules import flattened
from gold.train.run_folder import RunFolder

_ABSENT = "–"
_CURVES = ("loss", "reward_mean", "length_tokens", "stop_rate", "sampled_entropy", "tokens_per_s")


@dataclass(frozen=True)
class Comparison:
    """Several runs; ``names`` are as short as they can be told apart."""

    names: Sequence[str]
    runs: Sequence[RunRecords]

    @classmethod
    def load(cls, paths: Sequence[Path]) -> Comparison:
        """The runs of at least two folders.

        Raises: ConfigError for fewer, or the same twice; CheckpointError for one that holds no run.
        """
        found = [path.resolve() for path in paths]
        if len(found) < 2:
            raise ConfigError("compare: give at least two run folders")
        if twice := [str(path) for n, path in enumerate(found) if path in found[:n]]:
            raise ConfigError(f"compare: {twice[0]} is given twice")
        return cls(_short_names(found), [RunRecords.of(RunFolder.open(path)) for path in paths])

    def measures(self) -> dict[str, list[Mapping[str, Any] | None]]:
        """By measure, the last evaluation of each run that has it."""
        found: dict[str, list[Mapping[str, Any] | None]] = {}
        for n, run in enumerate(self.runs):
            for series in held_out(run.evals[-1:]):
                found.setdefault(series.name, [None] * len(self.runs))[n] = run.evals[-1]
        return found

    def differences(self) -> dict[str, list[Any]]:
        """The values of the keys of config.yaml that differ, by dotted key; ``_ABSENT`` where a run lacks it."""
        flat = [flattened(dict(run.config)) for run in self.runs]
        keys = dict.fromkeys(key for config in flat for key in config if key != "output")
        values = {key: [config.get(key, _ABSENT) for config in flat] for key in keys}
        return {key: each for key, each in values.items() if any(value != each[0] for value in each)}

    def rows(self) -> list[tuple[str, list[str]]]:
        """The table: the name of each row, and a cell for each run. A row whose cells are empty is a title."""
        rows = [
            (
                "steps",
                [
                    f"{run.done:,} of {run.steps:,}" if run.done < run.steps else f"{run.done:,}"
                    for run in self.runs
                ],
            ),
            ("time in steps and evaluations", [duration(run.seconds) for run in self.runs]),
            ("tokens per s", [number(_mean_speed(run)) for run in self.runs]),
        ]
        if measures := self.measures():
            rows.append(("last evaluation", []))
            rows.append(
                ("step", [f"{run.evals[-1]['step']:,}" if run.evals else _ABSENT for run in self.runs])
            )
        for name, records in measures.items():
            rows.append((named(name), [_cell(record, name) for record in records]))
        if differences := self.differences():
            rows.append(("configuration", []))
        rows += [
            (key, [value if isinstance(value, str) else json.dumps(value) for value in values])
            for key, values in differences.items()
        ]
        return rows

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "runs": [
                {
                    "name": name,
                    "steps": run.done,
                    "planned_steps": run.steps,
                    "seconds": run.seconds,
                    "last_evaluation": dict(run.evals[-1]) if run.evals else None,
                }
                for name, run in zip(self.names, self.runs, strict=True)
            ],
            "configuration": self.differences(),
        }

    def charts(self) -> list[tuple[str, list[Chart]]]:
        """Curves of all runs in one chart for each measure, by group."""
        place, groups = 0, []
        evals = [{s.name: s for s in held_out(run.evals)} for run in self.runs]
        trains = [{s.name: s for s in training(run.trains, _CURVES)} for run in self.runs]
        last = max((run.done for run in self.runs), default=0)
        for title, members in (("Held out", evals), ("Training", trains)):
            charts = []
            for name in dict.fromkeys(name for each in members for name in each):
                lines = [
                    Line.of(each[name], label, n % COLOURS)
                    for n, (label, each) in enumerate(zip(self.names, members, strict=True))
                    if name in each
                ]
                values = {value for line in lines for _, value in line.points if math.isfinite(value)}
                if len(values) > 1 and any(len(line.points) > 1 for line in lines):
                    series = next(each[name] for each in members if name in each)
                    charts.append(line_chart(series.title, series.unit, lines, place, last))
                    place += 1
            groups.append((title, charts))
        return groups


def run_compare(paths: Sequence[Path], html: Path | None = None, as_json: bool = False) -> None:
    """Prints the table, or writes a page with the table and the curves.

    Raises: as `Comparison.load`; ConfigError for a page that cannot be written.
    """
    found = Comparison.load(paths)
    if html is not None:
        try:
            replace_text(html, compare_page(found))
        except OSError as error:
            raise ConfigError(f"cannot write {html}: {error.strerror or error}") from error
    if as_json:
        terminal.show_json(found.to_json())
    elif html is not None:
        terminal.show(html)
    else:
        terminal.show(*_table(found))


def compare_page(found: Comparison) -> str:
    """The page, as HTML: the table, and the curves of all runs over one another."""
    groups = found.charts()
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in found.names)
    span = len(found.names) + 1
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{_html_cell(cell)}</td>" for cell in cells)}</tr>'
        if cells
        else f'<tr class="title"><th scope="colgroup" colspan="{span}">{escape(name)}</th></tr>'
        for name, cells in found.rows()
    )
    sections = "".join(
        f'<section><h2>{title}</h2><div class="charts">{"".join(chart.html for chart in charts)}</div></section>'
        for title, charts in groups
        if charts
    )
    body = (
        f'<header><h1>{escape(" · ".join(found.names))}</h1></header><main><div class="wide">'
        "<table><thead><tr><th></th>"
        f"{names}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="still">In brackets 95 % intervals.</p>{sections}</main>'
        '<aside id="details" aria-live="polite" hidden></aside>'
    )
    style, script = style_and_script()
    data = {
        "charts": [chart.data for _, charts in groups for chart in charts],
        "plot": PLOT,
        "samples": [],
        "running": False,
    }
    return document(" · ".join(found.names), style, body, script, data)


def _table(found: Comparison) -> list[str]:
    """The lines of the table; where it is wider than the terminal, each run's values are lines of their own."""
    rows = found.rows()
    first = max(len(name) for name, _ in rows) + 2
    widths = [
        max(len(name), *(len(cells[n]) for _, cells in rows if cells)) for n, name in enumerate(found.names)
    ]
    if first + sum(widths) + 2 * len(widths) > shutil.get_terminal_size((10_000, 24)).columns:
        lines = []
        for name, cells in rows:
            lines += [name, *(f"  {run}: {cell}" for run, cell in zip(found.names, cells, strict=False))]
        return lines

    def row(name: str, cells: Sequence[str]) -> str:
        return (
            name.ljust(first) + "  ".join(c.rjust(w) for c, w in zip(cells, widths, strict=False))
        ).rstrip()

    lines = [row("", found.names)]
    for name, cells in rows:
        lines += [row(name, cells)] if cells else ["", name]
    return lines


def _html_cell(cell: str) -> str:
    value, bracket, interval = cell.partition(" (")
    return escape(value) + (f' <span class="unit">({escape(interval)}</span>' if bracket else "")


def _cell(record: Mapping[str, Any] | None, name: str) -> str:
    if record is None or not is_number(record.get(name)):
        return _ABSENT
    low, high = record.get(f"{name}_low"), record.get(f"{name}_high")
    said = number(float(record[name]))
    if is_number(low) and is_number(high):
        said += f" ({number(float(low))} – {number(float(high))})"  # type: ignore[arg-type]
    return said


def _mean_speed(run: RunRecords) -> float:
    """Tokens per second over all steps."""
    steps = [r for r in run.trains if is_number(r.get("tokens_per_s")) and is_number(r.get("step_s"))]
    seconds = sum(float(r["step_s"]) for r in steps)
    return (
        sum(float(r["tokens_per_s"]) * float(r["step_s"]) for r in steps) / seconds if seconds else math.nan
    )


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths, with as many parts as it takes to tell them apart."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
