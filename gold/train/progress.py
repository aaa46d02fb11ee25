"""What a person sees of a run while it goes on."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TextIO

from gold import terminal

SHOWN = (
    ("reverse_kl_per_byte", "reverse KL/byte", "{:.4f}"),
    ("impossible_share", "left out", "{:.0%}"),
    ("forward_kl_per_byte", "forward KL/byte", "{:.4f}"),
    ("bits_per_byte", "bits/byte", "{:.3f}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("stop_rate", "stopped", "{:.0%}"),
    ("length_bytes", "bytes", "{:.1f}"),
)


class Progress(Protocol):
    """Told of everything that happens in a run, as it happens."""

    def running(
        self, header: Mapping[str, str], steps: int, done: int
    ) -> contextlib.AbstractContextManager[Any]:
        """Around the whole run."""
        ...

    def step(self, record: Mapping[str, Any]) -> None:
        """After a step, with its metrics."""
        ...

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """After an evaluation, with its measures."""
        ...

    def note(self, text: str) -> None:
        """Something a person should know."""
        ...


class Quiet:
    """Shows nothing but notes, on stderr."""

    @contextlib.contextmanager
    def running(self, header: Mapping[str, str], steps: int, done: int) -> Iterator[None]:
        """See ``Progress.running``."""
        yield

    def step(self, record: Mapping[str, Any]) -> None:
        """See ``Progress.step``."""

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """See ``Progress.evaluation``."""

    def note(self, text: str) -> None:
        """See ``Progress.note``."""
        terminal.show_note(text)


class Silent(Quiet):
    """Shows nothing at all."""

    def note(self, text: str) -> None:
        """See ``Progress.note``."""


class Lasting:
    """Another progress, and nothing at all once nobody can see it any more: its terminal was closed, or what it was
    piped into has ended. A run goes on, or keeps what it has, all the same."""

    def __init__(self, inner: Progress) -> None:
        self.inner, self.ended = inner, False

    @contextlib.contextmanager
    def _seen(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            self.ended = True
            terminal.silence()  # what is left to be written would be an error again when the program ends

    @contextlib.contextmanager
    def running(self, header: Mapping[str, str], steps: int, done: int) -> Iterator[None]:
        """See ``Progress.running``."""
        stack = contextlib.ExitStack()
        with self._seen():
            stack.enter_context(self.inner.running(header, steps, done))
        try:
            yield
        except BaseException:
            with self._seen():
                stack.__exit__(*sys.exc_info())
            raise
        with self._seen():
            stack.close()

    def step(self, record: Mapping[str, Any]) -> None:
        """See ``Progress.step``."""
        if not self.ended:
            with self._seen():
                self.inner.step(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """See ``Progress.evaluation``."""
        if not self.ended:
            with self._seen():
                self.inner.evaluation(record)

    def note(self, text: str) -> None:
        """See ``Progress.note``."""
        if not self.ended:
            with self._seen():
                self.inner.note(text)


class Lines(Quiet):
    """A header, a line now and then, a line per evaluation: for logs and pipes."""

    def __init__(self, stream: TextIO | None = None, every: int = 10) -> None:
        self.stream, self.every, self.steps = stream or sys.stdout, every, 0

    @contextlib.contextmanager
    def running(self, header: Mapping[str, str], steps: int, done: int) -> Iterator[None]:
        """See ``Progress.running``."""
        self.steps = steps
        for name, value in header.items():
            self._print(f"{name:>10}  {value}")
        yield

    def step(self, record: Mapping[str, Any]) -> None:
        """See ``Progress.step``."""
        if record["step"] % self.every == 0 or record["step"] == self.steps:
            self._print(step_line(record, self.steps))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """See ``Progress.evaluation``."""
        self._print(evaluation_line(record))

    def note(self, text: str) -> None:
        """See ``Progress.note``."""
        self._print(f"note: {text}")

    def _print(self, text: str) -> None:
        terminal.show(text, stream=self.stream)


class Live(Lines):
    """A bar that moves on a terminal, evaluations above it."""

    def __init__(self) -> None:
        super().__init__()
        self.console = terminal.new_console()
        self._bar: Any = None
        self._task: Any = None

    @contextlib.contextmanager
    def running(self, header: Mapping[str, str], steps: int, done: int) -> Iterator[None]:
        """See ``Progress.running``."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.text import Text

        self.steps = steps
        for name, value in header.items():
            self.console.print(Text.assemble((f"{name:>10}", "bold"), f"  {terminal.line(value)}"))
        columns = (
            BarColumn(24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
        )
        with Progress(*columns, console=self.console, transient=True) as self._bar:
            self._task = self._bar.add_task("", total=steps, completed=done)
            yield
        self._bar = None

    def step(self, record: Mapping[str, Any]) -> None:
        """See ``Progress.step``."""
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=step_summary(record))

    def _print(self, text: str) -> None:
        self.console.print(terminal.line(text))


def for_terminal() -> Progress:
    """A moving bar where stdout is a terminal, plain lines elsewhere."""
    return Live() if sys.stdout.isatty() else Lines()


def step_summary(record: Mapping[str, Any]) -> str:
    """The few numbers of a step that fit beside a bar."""
    parts = [f"loss {record['loss']:.4f}", f"{record['length_bytes']:.0f} bytes"]
    if "reward_mean" in record:
        parts.append(f"reward {record['reward_mean']:.2f}")
    parts += [f"{record['tokens_per_s']:.0f} tokens/s", f"{record['step_s']:.2f} s"]
    if "teacher_retries" in record:  # of a server; a teacher in this process never has any
        parts.append(f"teacher {record['teacher_tokens_per_s']:.0f} tokens/s")
    if record.get("teacher_retries"):
        parts.append(f"{record['teacher_retries']} retries")
    return "  ".join(parts)


def step_line(record: Mapping[str, Any], steps: int) -> str:
    """A step in a line."""
    return f"step {record['step']:>5}/{steps}  {step_summary(record)}"


def evaluation_line(record: Mapping[str, Any]) -> str:
    """An evaluation in a line."""
    shown = [f"{label} {form.format(record[name])}" for name, label, form in SHOWN if name in record]
    return f"held out, step {record['step']}:  " + "  ".join(shown)
