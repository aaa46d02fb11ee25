"""Trackers that print a run to the terminal."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from gold import terminal
from gold.activity import Activity
from gold.train.forecast import Forecast, duration
from gold.train.trackers import Forwarding, RunInfo, Tracker

SHOWN = (
    ("reverse_kl_per_byte", "reverse KL/byte", "{:.4f}"),
    ("impossible_share", "left out", "{:.0%}"),
    ("forward_kl_per_byte", "forward KL/byte", "{:.4f}"),
    ("bits_per_byte", "bits/byte", "{:.3f}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("stop_rate", "stopped", "{:.0%}"),
    ("length_bytes", "bytes", "{:.1f}"),
)
_SAID = {
    "rollout": "drawing",
    "align": "aligning",
    "teacher": "teacher",
    "student": "learning",
    "update": "updating",
}


class Quiet(Tracker):
    """Shows only notes, on stderr."""

    def note(self, text: str) -> None:
        terminal.show_note(text)


class Lasting(Forwarding):
    """Forwards to another tracker until its terminal closes or its pipe's reader ends; the run continues."""

    def __init__(self, inner: Tracker) -> None:
        self.inner, self.ended = inner, False

    def _call(self, method: str, *arguments: Any) -> None:
        try:
            if not self.ended:
                getattr(self.inner, method)(*arguments)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            self.ended = True
            terminal.silence()  # remaining output would raise again at exit


class Status:
    """What a run is doing, how far it is and how long it still takes, in words."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.forecast: Forecast | None = None
        self.activity = Activity(("",))
        self._begun = self._phase_begun = now()

    def hear(self, activity: Activity) -> bool:
        """Notes what is being done; True if it is another task than before, or another step."""
        begins = len(activity.path) == 1 and not activity.total
        if begins:
            self._begun = self.now()
        if begins or activity.path != self.activity.path:
            self._phase_begun = self.now()
        self.activity = activity
        return begins

    @property
    def task(self) -> str:
        """The outermost name of what is being done."""
        return self.activity.path[0]

    @property
    def seconds(self) -> float:
        """Since the task began."""
        return self.now() - self._begun

    @property
    def left_s(self) -> float | None:
        """Seconds that the run still takes, as far as known."""
        whole = self.forecast.of_run() if self.forecast else None
        return None if whole is None else max(0.0, whole - (self.seconds if self.task == "step" else 0.0))

    def title(self) -> str:
        """The task alone."""
        if self.task not in ("step", "evaluation"):
            return self.task
        if self.forecast is None:
            return self.task
        step = self.forecast.step
        if self.task == "step":
            return f"step {step + 1:>5}/{self.forecast.run.steps}"
        return f"evaluation {f'after step {step}' if step else 'before the first step'}"

    def line(self) -> str:
        """The task with everything that is known about it."""
        now, parts = self.activity, []
        if phase := " ".join(_SAID.get(name, name) for name in now.path[1:]):
            parts.append(phase)
        if now.total:
            parts.append(f"{now.done:,} of {now.total:,} {now.unit}")
        if now.tokens:
            parts.append(f"{now.tokens:,} tokens")
        parts.append(f"{duration(self.seconds)} so far")
        if (left := self._of_task()) is not None:
            parts.append(f"about {duration(left)} left")
        if self.task in ("step", "evaluation") and (whole := self.left_s):
            parts.append(f"run about {duration(whole)}")
        return f"{self.title()}  {', '.join(parts)}"

    def _of_task(self) -> float | None:
        """Seconds that the step or the evaluation still takes."""
        if self.forecast is None:
            return None
        if self.task == "evaluation":
            usual = self.forecast.evaluation_s
            return None if usual is None else max(0.0, usual - self.seconds)
        phase = self.activity.path[1] if len(self.activity.path) > 1 else ""
        return self.forecast.of_step(phase, self.now() - self._phase_begun) if self.task == "step" else None


class Lines(Tracker):
    """A header, a line per evaluation, and lines of steps, for logs and pipes.

    A step has a line when it is complete, if the last line is ``every_s`` seconds old; the first and the last one have
    a line in any case. What takes long says every ``waiting_s`` seconds how far it is.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        every_s: float = 5.0,
        waiting_s: float = 30.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream, self.every_s, self.waiting_s, self.now = stream or sys.stdout, every_s, waiting_s, now
        self.status = Status(now)
        self._printed = -every_s

    def start(self, run: RunInfo) -> None:
        self.status.forecast = Forecast(run, self.now)
        for name, value in run.header.items():
            self._named(name, value)

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        if self.status.forecast is not None:
            self.status.forecast.log(kind, record)
        if kind == "train":
            self._step(record)
        elif kind == "eval":
            self._print(evaluation_line(record))

    def note(self, text: str) -> None:
        self._print(f"note: {text}")

    def doing(self, activity: Activity) -> None:
        begins = self.status.hear(activity)
        if begins and self._is_announced():
            self._print(self.status.title())
        elif self.status.seconds >= self.waiting_s and self.now() - self._printed >= self.waiting_s:
            self._print(self.status.line())

    def _is_announced(self) -> bool:
        """Whether the task that begins has a line: all but steps, and evaluations that are known to be short."""
        status = self.status
        if status.task == "evaluation" and status.forecast is not None:
            return (status.forecast.evaluation_s or self.every_s) >= self.every_s
        return status.task != "step"

    def _step(self, record: Mapping[str, Any]) -> None:
        forecast = self.status.forecast
        ends = forecast is None or record["step"] in (forecast.run.done + 1, forecast.run.steps)
        if ends or self.now() - self._printed >= self.every_s:
            steps = forecast.run.steps if forecast else 0
            self._print(f"step {record['step']:>5}/{steps}  {self._summary(record)}")

    def _summary(self, record: Mapping[str, Any]) -> str:
        whole = self.status.forecast.of_run() if self.status.forecast else None
        return step_summary(record) + (f"  about {duration(whole)} left" if whole else "")

    def _named(self, name: str, value: str) -> None:
        self._print(f"{name:>10}  {value}")

    def _print(self, text: str) -> None:
        self._printed = self.now()
        terminal.show(text, stream=self.stream)


class Live(Lines):
    """A progress bar on a terminal, everything else above it."""

    def __init__(self) -> None:
        super().__init__()
        self.console = terminal.new_console()
        self._bar: Any = None
        self._task: Any = None

    def start(self, run: RunInfo) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        super().start(run)
        columns = (BarColumn(16), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._bar.start()
        self._task = self._bar.add_task("", total=run.steps, completed=run.done)

    def doing(self, activity: Activity) -> None:
        begins = self.status.hear(activity)
        if self._bar is None:
            if begins:
                self._print(self.status.title())
        elif self.status.seconds >= 1.0 or (begins and self.status.task != "step"):
            # Of shorter steps the bar keeps showing the last one's metrics.
            self._bar.update(self._task, description=terminal.line(self.status.line()))

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def _step(self, record: Mapping[str, Any]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=self._summary(record))

    def _named(self, name: str, value: str) -> None:
        from rich.text import Text

        self.console.print(Text.assemble((f"{name:>10}", "bold"), f"  {terminal.line(value)}"))

    def _print(self, text: str) -> None:
        self.console.print(terminal.line(text))


def for_terminal(begins: str) -> Tracker:
    """A progress bar where stdout is a terminal, plain lines elsewhere; it shows what ``begins``, in one of several
    processes."""
    tracker = Lasting(Live() if sys.stdout.isatty() else Lines())
    if os.environ.get("RANK", "0") == "0":
        tracker.doing(Activity((begins,)))
    return tracker


def step_summary(record: Mapping[str, Any]) -> str:
    """A few metrics of a step, short enough for a progress bar."""
    parts = [f"loss {record['loss']:.4f}", f"{record['length_bytes']:.0f} bytes"]
    if "reward_mean" in record:
        parts.append(f"reward {record['reward_mean']:.2f}")
    parts += [f"{record['tokens_per_s']:.0f} tokens/s", f"{record['step_s']:.2f} s"]
    if "teacher_retries" in record:  # only of a server; a local teacher has none
        parts.append(f"teacher {record['teacher_tokens_per_s']:.0f} tokens/s")
    if record.get("teacher_retries"):
        parts.append(f"{record['teacher_retries']} retries")
    return "  ".join(parts)


def evaluation_line(record: Mapping[str, Any]) -> str:
    """One line on an evaluation."""
    shown = [f"{label} {form.format(record[name])}" for name, label, form in SHOWN if name in record]
    return f"held out, step {record['step']}:  " + "  ".join(shown)
