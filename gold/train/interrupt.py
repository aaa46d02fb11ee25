"""Signals that end a run: the step under way is left, and the one before it is saved first."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class Interrupt:
    """Stores the number of the first Ctrl-C, SIGTERM or SIGHUP in `caught`, so that the run can be saved; the second
    ends the program. A signal ignored at process start, as under `nohup`, stays ignored."""

    def __init__(self) -> None:
        self.caught = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in NAMES:
            before = signal.getsignal(number)
            # Only the main thread may set handlers; in other threads signals are left to the caller.
            with contextlib.suppress(ValueError):
                if before is not signal.SIG_IGN and before is not None:
                    signal.signal(number, self._catch)
                    self._before[number] = before
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            for each in self._before:
                signal.signal(each, signal.SIG_DFL)
            raise ended_by(number)
        self.caught = number
        if os.environ.get("RANK", "0") != "0":  # one of several processes, all of which Ctrl-C reaches
            return
        # The signal may arrive while a stream is in use; the raw descriptor still accepts a line, if it has a reader.
        line = f"gold: {NAMES[signal.Signals(number)]}: the run is saved and ends; a second signal ends it at once\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())


def ended_by(number: int) -> BaseException:
    """The exception for a signal's default exit: KeyboardInterrupt, or SystemExit with 128 plus the signal's number."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
