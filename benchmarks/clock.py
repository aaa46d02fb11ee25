"""The one clock of the benchmarks: several pieces of work in one process, in turn, on the same inputs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import quantiles


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements, and the quarters around it."""

    median: float
    low: float
    high: float


def seconds_in_turn(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds that each piece of work kept a processor busy, round by round; it must do all in the calling thread.

    Every round runs them all, each time from another one on, so that whatever else the machine does falls on all of
    them; a round before the first is not counted. Python's garbage collector waits meanwhile.
    """
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_ in range(-1, rounds):
            for name in names[max(round_, 0) % len(names) :] + names[: max(round_, 0) % len(names)]:
                started = time.thread_time()
                works[name]()
                took = time.thread_time() - started
                if round_ >= 0:
                    seconds[name].append(took)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return seconds


def spread(values: list[float]) -> Spread:
    """Median and quartiles; of a single value, that value three times."""
    low, median, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Spread(median, low, high)
