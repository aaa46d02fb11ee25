"""Safe terminal output: names, tokens and messages in it cannot send control characters to the terminal.

All output of gold goes through here, as do the warnings and log records of other packages. Control characters (C0, DEL,
C1), line and paragraph separators, characters that change the writing direction, and lone surrogates are shown as
`\\x1b`, `\\n`, `\\u202e`. A line of text is one line on the screen.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, Any, TextIO

from gold.errors import GoldError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult

# U+200E is kept: it is harmless, and pictures use it to keep tokens in order.
_STEERS = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_STEERS_IN_LINES = re.compile(_STEERS.pattern.replace("\0-\x1f", "\0-\x09\x0b-\x1f"))


def line(text: object) -> str:
    """The text as one line without control characters."""
    return _STEERS.sub(_escape, str(text))


def lines(text: object) -> str:
    """The text with its line breaks, each line as in `line`: for multi-line texts."""
    return _STEERS_IN_LINES.sub(_escape, str(text))


def _escape(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape", "surrogatepass").decode("ascii")


def show(*texts: object, stream: TextIO | None = None, end: str = "\n") -> None:
    """Prints each text as a line, on stdout or the stream."""
    print("\n".join(map(line, texts)), file=stream, end=end, flush=True)


def show_lines(text: object, stream: TextIO | None = None) -> None:
    """Prints a multi-line text."""
    print(lines(text), file=stream, flush=True)


def show_json(value: Any, stream: TextIO | None = None) -> None:
    """Prints a value as one line of ASCII JSON."""
    print(json.dumps(value).replace("\x7f", "\\u007f"), file=stream, flush=True)


def show_error(error: object) -> None:
    """Prints each line of an error with the prefix `error:` on stderr: those of a `GoldError` are its arguments."""
    said = error.args if isinstance(error, GoldError) else (error,)
    show(*(f"error: {each}" for each in said or ("",)), stream=sys.stderr)


def show_note(text: object) -> None:
    """Prints a note on stderr."""
    show(f"gold: {text}", stream=sys.stderr)


def new_console(stream: TextIO | None = None, *, color: bool = True) -> Console:
    """A rich console for a stream (default stdout) whose texts contain no control characters and no markup."""
    from rich.console import Console, RenderHook
    from rich.segment import Segment

    class Shown:
        def __init__(self, inner: ConsoleRenderable) -> None:
            self.inner = inner

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            for segment in console.render(self.inner, options):
                yield (
                    segment if segment.control else Segment(lines(segment.text), segment.style)
                )  # rich's own controls

    class Filter(RenderHook):
        def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
            return [Shown(each) for each in renderables]

    console = Console(
        file=stream, color_system="auto" if color else None, highlight=False, emoji=False, markup=False
    )
    console.push_render_hook(Filter())
    return console


def prepare() -> None:
    """Prepares stdin, stdout and stderr if they are closed or cannot encode every character.

    It also removes control characters from the warnings, log records and tracebacks of this process.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a replaced stream
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    warnings.formatwarning = _warning
    logging.setLogRecordFactory(_Record)
    logger = logging.getLogger("gold")
    if not any(isinstance(handler, _Shown) for handler in logger.handlers):
        logger.addHandler(_Shown(logging.WARNING))


def silence() -> None:
    """Discards the unwritten output to a stdout that is closed or cannot be written."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def show_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Prints a traceback as Python would (`sys.excepthook`)."""
    show_lines("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), sys.stderr)


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return lines(super().getMessage())


class _Shown(logging.Handler):
    """Prints log records on stderr, one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        show(f"{record.levelname.lower()}: {record.getMessage()}", stream=sys.stderr)


def _warning(message: object, *_: object, **__: object) -> str:
    return f"warning: {line(message)}\n"
