"""How long a run still takes: seconds of its last steps and evaluations, times those that are left."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from gold.train.trackers import RunInfo

PHASES = ("rollout", "align", "teacher", "student", "update")
"""The phases of a step, in order; a record has the seconds of each as ``rollout_s`` and so on."""
_STEPS = 16


class Forecast:
    """The seconds that a run, and a step of it, still takes; None until enough is known.

    A step counts with everything up to the next one, such as a checkpoint, but for evaluations.
    """

    def __init__(self, run: RunInfo, now: Callable[[], float] = time.monotonic) -> None:
        self.run, self.now, self.step = run, now, run.done
        expected = dict(run.expected)
        self._evaluation: float | None = expected.pop("evaluation", None)
        self._steps: deque[float] = deque([sum(expected.values())] if expected else [], _STEPS)
        self._phases: deque[Mapping[str, float]] = deque([expected] if expected else [], _STEPS)
        self._is_expected = bool(expected)
        self._mark = now()

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """A record of the run, as trackers receive them."""
        if kind == "train":
            if self._is_expected:
                self._steps.clear()
                self._phases.clear()
                self._is_expected = False
            self._steps.append(self.now() - self._mark)
            self._phases.append({name: float(record.get(f"{name}_s", 0.0)) for name in PHASES})
            self.step = record["step"]
        elif kind == "eval":
            self._evaluation = float(record.get("evaluate_s", 0.0))
        if kind in ("train", "eval"):
            self._mark = self.now()

    @property
    def evaluation_s(self) -> float | None:
        """Seconds of an evaluation: of the last one, or as expected."""
        return self._evaluation

    @property
    def step_s(self) -> float | None:
        """Seconds of a step: the median of the last ones, or as expected."""
        return statistics.median(self._steps) if self._steps else None

    def of_step(self, phase: str, seconds: float) -> float | None:
        """Seconds that the step under way still takes, which has been in this phase for ``seconds``."""
        if not self._phases or phase not in PHASES:
            return None
        usual = {name: statistics.median(each.get(name, 0.0) for each in self._phases) for name in PHASES}
        later = PHASES[PHASES.index(phase) + 1 :]
        return max(0.0, usual[phase] - seconds) + sum(usual[name] for name in later)

    def of_run(self) -> float | None:
        """Seconds from the end of the last step to the end of the run."""
        if self.step_s is None or self.step >= self.run.steps:
            return None if self.step_s is None else 0.0
        seconds = (self.run.steps - self.step) * self.step_s
        if self._evaluation is not None and self.run.evaluate_every:
            every = self.run.evaluate_every
            left = self.run.steps // every - self.step // every + bool(self.run.steps % every)
            seconds += left * self._evaluation
        return seconds


def duration(seconds: float) -> str:
    """Seconds for people, to two digits: `0.05 s`, `8.5 s`, `40 s`, `2.5 min`, `12 min`, `7 h 20 min`, `3 d 4 h`."""
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds >= 0.1 else f"{seconds:.2f} s"
    if seconds < 570:
        return f"{seconds / 60:.1f} min"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h" + (f" {minutes} min" if minutes else "")
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d" + (f" {hours} h" if hours else "")
