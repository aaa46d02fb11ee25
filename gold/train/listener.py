"""Listens to the work of a run: tells trackers how far it is, and has it left after a signal."""

from __future__ import annotations

import time
from collections.abc import Callable

from gold.activity import Activity
from gold.train.interrupt import Interrupt
from gold.train.trackers import Tracker

_EVERY_S = 0.1


class RunListener:
    """Tells ``tracker`` what is being done, at most ten times a second within a block; once there is an ``interrupt``,
    work is left after its first signal."""

    def __init__(self, tracker: Tracker, now: Callable[[], float] = time.monotonic) -> None:
        self.tracker, self.now = tracker, now
        self.interrupt: Interrupt | None = None
        self._told = now()

    @property
    def stops(self) -> bool:
        """See ``gold.activity.Listener``."""
        return self.interrupt is not None and self.interrupt.caught > 0

    def hear(self, activity: Activity) -> None:
        """See ``gold.activity.Listener``."""
        now = self.now()
        if activity.total and now - self._told < _EVERY_S:
            return
        self._told = now
        self.tracker.doing(activity)
