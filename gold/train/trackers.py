"""Trackers receive a run's metrics: each step and each evaluation is one dict, passed to all trackers.

A tracker needs five methods; a class derived from `Tracker` inherits empty ones. The run folder (`run_folder.py`) and
the terminal (`progress.py`) are trackers; `gold.distill(..., trackers=[...])` takes more.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from gold.activity import Activity
from gold.files import one_line


@dataclass(frozen=True)
class RunInfo:
    """Information for trackers before the first step.

    `config` is the contents of config.yaml, `header` describes the run in a few named lines, `done` is the number of
    steps taken before a resumption. An evaluation follows every `evaluate_every` steps, and the last; 0: none.
    `expected`: seconds of each phase of a step, and of an "evaluation", if they were measured before the run.
    """

    config: Mapping[str, Any]
    header: Mapping[str, str]
    steps: int
    done: int = 0
    evaluate_every: int = 0
    expected: Mapping[str, float] = field(default_factory=dict)


class Tracker(Protocol):
    """Receives a run's metrics, in the main process only. An exception that it raises ends the run."""

    def start(self, run: RunInfo) -> None:
        """Called before the first step; notes may come earlier. A resumed run logs again the steps after its
        checkpoint."""
        return

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Receives a record with an integer `step`; `kind` is `train` (a step), `eval` (an evaluation's measures) or
        `sample` (one completion of an evaluation)."""
        return

    def note(self, text: str) -> None:
        """Receives a line for people: a warning, a resumption, an interruption."""
        return

    def doing(self, activity: Activity) -> None:
        """Called several times a second with what is being done, also before `start`: it must be quick. The outermost
        name of its path is "step", "evaluation", or a few words for people."""
        return

    def finish(self) -> None:
        """Called after the last step, or when the run ends early; only if it was started."""
        return


class Forwarding(Tracker):
    """A tracker whose calls all go through one method, `_call`, to another tracker."""

    def start(self, run: RunInfo) -> None:
        self._call("start", run)

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        self._call("log", kind, record)

    def note(self, text: str) -> None:
        self._call("note", text)

    def doing(self, activity: Activity) -> None:
        self._call("doing", activity)

    def finish(self) -> None:
        self._call("finish")

    def _call(self, method: str, *arguments: Any) -> None:
        raise NotImplementedError


class Guarded(Forwarding):
    """Another tracker that may fail: its first exception drops it, with one note, and the run goes on."""

    def __init__(self, inner: Tracker, name: str) -> None:
        self.inner: Tracker | None = inner
        self.name = name
        self.tell: Callable[[str], None] = lambda text: None  # set by `Trackers`

    def _call(self, method: str, *arguments: Any) -> None:
        if self.inner is None:
            return
        try:
            getattr(self.inner, method)(*arguments)
        except Exception as error:  # whatever a client raises
            self.inner = None
            self.tell(f"{self.name} failed, and the run goes on without it: {one_line(error)}")


class Trackers(Tracker):
    """Several trackers as one, called in order; without members it does nothing."""

    def __init__(self, *members: Tracker) -> None:
        self.members: list[Tracker] = []
        self._notes: list[str] = []
        for member in members:
            self.add(member)

    def add(self, member: Tracker) -> None:
        """One more member; it is told the notes so far."""
        if isinstance(member, Guarded):
            member.tell = self.note
        for text in self._notes:
            member.note(text)
        self.members.append(member)

    def start(self, run: RunInfo) -> None:
        for member in self.members:
            member.start(run)

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        for member in self.members:
            member.log(kind, record)

    def note(self, text: str) -> None:
        self._notes.append(text)
        for member in self.members:
            member.note(text)

    def doing(self, activity: Activity) -> None:
        for member in self.members:
            member.doing(activity)

    def finish(self) -> None:
        for member in self.members:
            member.finish()
