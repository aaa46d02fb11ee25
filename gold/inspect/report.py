"""A run as one HTML page: what it was asked to do, what it measured, and what the student wrote."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from gold.errors import CheckpointError
from gold.files import replace_text
from gold.inspect.charts import COLOURS, PLOT, Chart, Line, line_chart, number, stacked_chart
from gold.inspect.html import document, shades
from gold.inspect.samples import SampleList
from gold.inspect.series import Records, Series, held_out, is_number, named, training
from gold.train.run_folder import RunFolder, config_text
from gold.train.trackers import RunInfo, Tracker

REPORT = "report.html"
_HERE = Path(__file__).parent

# Metrics of a step that come first, in this order; the others follow in the order of the run.
_TRAINING = ("loss", "sampled_reverse_kl_per_byte", "reward_mean", "lr", "grad_norm", "stop_rate")
_LENGTHS = ("length_tokens", "length_bytes", "sampled_entropy", "repetition")
_SPEED = ("tokens_per_s", "teacher_tokens_per_s", "step_s")
_ALARM = re.compile(r"step \d+: ")
_MOST_CHANGES = 8


@dataclass(frozen=True)
class RunRecords:
    """What a run folder holds of a run. ``starts`` has one record for each time the run was started, with its header
    and its number of steps."""

    name: str
    config: Mapping[str, Any]
    trains: Records
    evals: Records
    samples: Records
    notes: Records
    starts: Records

    @classmethod
    def of(cls, run: RunFolder) -> RunRecords:
        """The records of a run folder.

        Raises: CheckpointError for a file that cannot be read.
        """
        kinds = (run.records(kind) for kind in ("train", "eval", "sample", "note", "start"))
        return cls(run.path.resolve().name, run.config, *kinds)

    @property
    def steps(self) -> int:
        """The number of steps that the run is to take."""
        known = self.starts[-1].get("steps") if self.starts else None
        section = self.config.get("recipe", self.config.get("train", {}))
        return int(known or (section.get("steps") if isinstance(section, dict) else None) or self.done)

    @property
    def done(self) -> int:
        """The last step that was taken."""
        return max((int(record["step"]) for record in self.trains), default=0)

    @property
    def seconds(self) -> float:
        """The time in steps and evaluations."""
        times: list[Any] = [r.get("step_s") for r in self.trains]
        times += [r.get("evaluate_s") for r in self.evals]
        return sum((float(t) for t in times if is_number(t)), 0.0)


class ReportFile(Tracker):
    """Keeps report.html of a run folder up to date: written at the start, with every evaluation and at the end."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self._due = folder, False

    def start(self, run: RunInfo) -> None:
        """See ``Tracker``."""
        self._write()

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """See ``Tracker``; the samples of an evaluation follow its measures, and are in the page with the next step."""
        if kind == "eval" or (kind == "train" and self._due):
            self._write()
        self._due = kind == "sample"

    def finish(self) -> None:
        """See ``Tracker``."""
        self._write(running=False)

    def _write(self, running: bool = True) -> None:
        write_report(self.folder, running=running)


def write_report(run: RunFolder | str | Path, running: bool = False) -> Path:
    """Writes report.html into a run's folder, from the files that are there, and returns its path.

    Raises:
        CheckpointError: there is no run, its files cannot be read, or the page cannot be written.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    path = folder.path / REPORT
    content = report(RunRecords.of(folder), datetime.now().astimezone(), running)
    try:
        replace_text(path, content)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def report(run: RunRecords, written: datetime, running: bool = False) -> str:
    """The page, as HTML. A page of a ``running`` run reads itself again from time to time."""
    groups = chart_groups(run)
    samples = SampleList(run.samples)
    body = f"""\
<header>
<h1>{escape(run.name)}</h1>
{_state(run, written, running)}
{_header(run)}
</header>
<main>
{_alarms(run)}
{_changes(run)}
{_charts(groups)}
{samples.html()}
{_notes(run)}
{_configuration(run)}
</main>
<aside id="details" aria-live="polite" hidden></aside>"""
    charts = [chart.data for _, members, _ in groups for chart in members]
    data = {"charts": charts, "plot": PLOT, "samples": samples.data, "running": running}
    style, script = style_and_script()
    return document(f"{run.name} – gold", style, body, script, data)


def style_and_script() -> tuple[str, str]:
    """CSS and JavaScript of pages with charts and samples."""
    style = (_HERE / "report.css").read_text(encoding="utf-8") + shades("h", "heat") + shades("l", "cool")
    return style, (_HERE / "report.js").read_text(encoding="utf-8")


# Charts

Group = tuple[str, list[Chart], list[str]]


def chart_groups(run: RunRecords) -> list[Group]:
    """Title, charts, and a line for each measure that has no chart because it did not change, of each group."""
    groups: list[Group] = []
    place = 0
    everything = {series.name: series for series in training(run.trains)}
    timed = [name for name in everything if name.endswith("_s")]
    steps = [name for name in (*_TRAINING, *_LENGTHS) if name in everything]
    steps += [name for name in everything if name not in (*steps, *timed) and not _is_copy(name, everything)]
    phases = [name for name in timed if name.removesuffix("_s") not in ("step", *_per_second(timed))]
    for title, members in (
        ("Held out", held_out(run.evals)),
        ("Training", [everything[name] for name in steps]),
        ("Speed", [everything[name] for name in _SPEED if name in everything]),
    ):
        charts, still = [], []
        for series in members:
            if is_still(series):
                still += [f"{series.title} {number(value)}" for value in series.finite[:1]]
                continue
            charts.append(line_chart(series.title, series.unit, [Line.of(series)], place, run.steps))
            place += 1
        if title == "Speed" and phases and len(everything[phases[0]].points) > 1:
            charts.append(_phase_chart([everything[name] for name in phases], place, run.steps))
            place += 1
        groups.append((title, charts, still))
    return groups


def _phase_chart(phases: Sequence[Series], place: int, steps: int) -> Chart:
    shared = sorted({step for series in phases for step in series.steps})
    lines = []
    for n, series in enumerate(phases):
        known = dict(series.points)
        values = [known.get(step, 0.0) for step in shared]
        points = [
            (float(step), v if math.isfinite(v) else 0.0) for step, v in zip(shared, values, strict=True)
        ]
        lines.append(Line(points, series.title, n % COLOURS))
    return stacked_chart("seconds by phase", "s", lines, place, steps)


def _per_second(names: Iterable[str]) -> list[str]:
    return [name.removesuffix("_s") for name in names if name.endswith("_per_s")]


def _is_copy(name: str, everything: Mapping[str, Series]) -> bool:
    """Whether a metric is the loss under the name of its only term."""
    loss = everything.get("loss")
    if loss is None or name == "loss" or everything[name].steps != loss.steps:
        return False
    pairs = zip(everything[name].values, loss.values, strict=True)
    return all(math.isclose(a, b, rel_tol=1e-5) or math.isnan(a) for a, b in pairs)


def is_still(series: Series) -> bool:
    """Whether a chart of the series would show nothing: fewer than two values, or the same value throughout."""
    return len(series.finite) < 2 or max(series.finite) == min(series.finite)


def _charts(groups: Sequence[Group]) -> str:
    parts = []
    for title, charts, still in groups:
        if not charts and not still:
            continue
        unchanged = (
            f'<p class="still">Constant, or measured once: {escape(", ".join(still))}.</p>' if still else ""
        )
        drawn = "".join(chart.html for chart in charts)
        parts.append(f'<section><h2>{title}</h2><div class="charts">{drawn}</div>{unchanged}</section>')
    return "\n".join(parts)


# Measures


def _changes(run: RunRecords) -> str:
    """The measures of the first and the last evaluation, those first that changed most."""
    if not run.evals:
        return ""
    first, last = run.evals[0], run.evals[-1]
    if first is last:
        rows = "".join(
            f"<tr><th scope=row>{escape(named(series.name))}</th><td>{_with_interval(first, series.name)}</td></tr>"
            for series in held_out(run.evals)
        )
        return (
            f'<section><h2>Step {first["step"]}</h2><div class="wide"><table>{rows}</table></div></section>'
        )
    found = sorted(_changed(held_out([first, last]), first, last), key=lambda one: -one[0])
    rows = "".join(row for _, row in found[:_MOST_CHANGES])
    return (
        '<section><h2>What changed most</h2><div class="wide"><table><thead><tr><th></th>'
        f'<th scope="col">step {first["step"]}</th><th scope="col">step {last["step"]}</th>'
        f'<th scope="col">change</th></tr></thead><tbody>{rows}</tbody></table></div>'
        '<p class="still">In brackets 95 % intervals; ● where those of the first and the last evaluation do not '
        "overlap.</p></section>"
    )


def _changed(
    members: Sequence[Series], first: Mapping[str, Any], last: Mapping[str, Any]
) -> Iterator[tuple[float, str]]:
    """How much each measure changed, relative to the larger value, and its row."""
    for series in members:
        name = series.name
        if not (is_number(first.get(name)) and is_number(last.get(name))) or first[name] == last[name]:
            continue
        change = last[name] - first[name]
        relative = abs(change) / max(abs(first[name]), abs(last[name]))
        apart = _apart(first, last, name)
        sign = "+" if change > 0 else ""
        yield (
            relative + (1.0 if apart else 0.0),
            f"<tr><th scope=row>{escape(named(series.name))}</th><td>{_with_interval(first, name)}</td>"
            f"<td>{_with_interval(last, name)}</td><td>{sign}{number(change)}{' ●' if apart else ''}</td></tr>",
        )


def _apart(first: Mapping[str, Any], last: Mapping[str, Any], name: str) -> bool:
    ends = [record.get(f"{name}{end}") for record in (first, last) for end in ("_low", "_high")]
    if not all(is_number(end) for end in ends):
        return False
    return bool(ends[1] < ends[2] or ends[3] < ends[0])  # type: ignore[operator]


def _with_interval(record: Mapping[str, Any], name: str) -> str:
    value, low, high = (record.get(name + end) for end in ("", "_low", "_high"))
    if not is_number(value):
        return "–"
    said = number(float(value))  # type: ignore[arg-type]
    if is_number(low) and is_number(high):
        said += f' <span class="unit">({number(float(low))} – {number(float(high))})</span>'  # type: ignore[arg-type]
    return said


# The rest of the page


def _state(run: RunRecords, written: datetime, running: bool) -> str:
    seconds = run.seconds
    state = "running" if running else "finished" if run.done >= run.steps > 0 else "not running"
    follow = '<label id="follow" hidden><input type="checkbox" checked> follow</label>' if running else ""
    return (
        f'<p class="state"><span>step {run.done:,} of {run.steps:,}, {state}</span> '
        f"<span>{duration(seconds)} in steps and evaluations</span> "
        f"<span>written {written.strftime('%Y-%m-%d %H:%M:%S %Z')}</span> {follow}</p>"
    )


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _header(run: RunRecords) -> str:
    header = run.starts[-1].get("header") if run.starts else None
    if not isinstance(header, dict):
        return ""
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in header.items())
    return f"<dl>{rows}</dl>"


def _alarms(run: RunRecords) -> str:
    """The warnings of the last run of the steps; each step's once, also if the run was resumed before it."""
    alarms = list(dict.fromkeys(str(n.get("text")) for n in run.notes if _ALARM.match(str(n.get("text")))))
    if not alarms:
        return ""
    rows = "".join(f"<li>{escape(text)}</li>" for text in alarms)
    return f'<section class="alarms"><h2>Alarms</h2><ul>{rows}</ul></section>'


def _notes(run: RunRecords) -> str:
    others = [note for note in run.notes if not _ALARM.match(str(note.get("text")))]
    if not others:
        return ""
    parts = [
        f"<dt>step {step}</dt>" + "".join(f"<dd>{escape(str(note.get('text')))}</dd>" for note in group)
        for step, group in groupby(others, key=lambda note: note["step"])
    ]
    return f"<section><h2>Notes</h2><dl>{''.join(parts)}</dl></section>"


def _configuration(run: RunRecords) -> str:
    return (
        "<section><h2>Configuration</h2><details><summary>config.yaml</summary>"
        f"<pre>{escape(config_text(run.config))}</pre></details></section>"
    )
