"""Trackers that print a run to the terminal."""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from gold import terminal
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


class Lines(Tracker):
    """A header, a line every few steps, a line per evaluation: for logs and pipes."""

    def __init__(self, stream: TextIO | None = None, every: int = 10) -> None:
        self.stream, self.every, self.steps = stream or sys.stdout, every, 0

    def start(self, run: RunInfo) -> None:
        self.steps = run.steps
        for name, value in run.header.items():
            self._print(f"{name:>10}  {value}")

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        if kind == "train":
            self._step(record)
        elif kind == "eval":
            self._print(evaluation_line(record))

    def note(self, text: str) -> None:
        self._print(f"note: {text}")

    def _step(self, record: Mapping[str, Any]) -> None:
        if record["step"] % self.every == 0 or record["step"] == self.steps:
            self._print(f"step {record['step']:>5}/{self.steps}  {step_summary(record)}")

    def _print(self, text: str) -> None:
        terminal.show(text, stream=self.stream)


class Live(Lines):
    """A progress bar on a terminal, evaluations above it."""

    def __init__(self) -> None:
        super().__init__()
        self.console = terminal.new_console()
        self._bar: Any = None
        self._task: Any = None

    def start(self, run: RunInfo) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text

        for name, value in run.header.items():
            self.console.print(Text.assemble((f"{name:>10}", "bold"), f"  {terminal.line(value)}"))
        columns = (
            BarColumn(24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
        )
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._bar.start()
        self._task = self._bar.add_task("", total=run.steps, completed=run.done)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def _step(self, record: Mapping[str, Any]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=step_summary(record))

    def _print(self, text: str) -> None:
        self.console.print(terminal.line(text))


def for_terminal() -> Tracker:
    """A progress bar where stdout is a terminal, plain lines elsewhere."""
    return Live() if sys.stdout.isatty() else Lines()


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
