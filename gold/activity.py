"""Long work reports how far it is, at points where it may also be stopped.

Loops over batches, tokens, requests and prompts call ``report``; blocks around them name what is being done
(``doing``). Whoever shows a run, or stops it, listens (``listening``). Without a listener nothing happens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol


class Stopped(Exception):  # noqa: N818  (no error: somebody asked for it)
    """Work that was left at a ``report`` because its listener asked for that."""


@dataclass(frozen=True)
class Activity:
    """What is being done: the names of the blocks around it, outermost first, and how much of the innermost is done.

    ``total`` is 0 where it is unknown or there is nothing to count; ``tokens`` counts what was generated so far.
    """

    path: tuple[str, ...]
    done: int = 0
    total: int = 0
    unit: str = ""
    tokens: int = 0


class Listener(Protocol):
    """Receives what is being done, often: it must be quick."""

    @property
    def stops(self) -> bool:
        """Whether work is to be left at the next point where that is possible."""
        ...

    def hear(self, activity: Activity) -> None:
        """Called at the beginning of each block and at each report."""
        ...


# Threads begin without these: what they do is neither shown nor stopped.
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_path: ContextVar[tuple[str, ...]] = ContextVar("path", default=())
_stoppable: ContextVar[bool] = ContextVar("stoppable", default=False)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """A context whose work ``listener`` hears, in place of an outer one."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextlib.contextmanager
def doing(name: str) -> Iterator[None]:
    """A context that names what is being done in it."""
    token = _path.set((*_path.get(), name))
    try:
        if (listener := _listener.get()) is not None:
            listener.hear(Activity(_path.get()))
        yield
    finally:
        _path.reset(token)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """A context in which a ``report`` may raise ``Stopped``: what it leaves behind can be dropped."""
    token = _stoppable.set(True)
    try:
        yield
    finally:
        _stoppable.reset(token)


def report(done: int, total: int, unit: str, tokens: int = 0) -> None:
    """Reports that ``done`` of ``total`` are done, in the innermost block; outside of any, nobody hears it.

    Raises:
        Stopped: the listener asks for it, within ``stoppable``.
    """
    listener = _listener.get()
    if listener is None:
        return
    if _stoppable.get() and listener.stops:
        raise Stopped
    if path := _path.get():
        listener.hear(Activity(path, done, total, unit, tokens))


def stop_asked() -> bool:
    """Whether the listener asks to leave the work."""
    listener = _listener.get()
    return listener is not None and listener.stops
