"""A tracker that keeps what it receives."""

from collections.abc import Callable, Mapping
from typing import Any

from gold.train.trackers import RunInfo, Tracker


class Recorder(Tracker):
    """Every call in order in `calls`; `on_step` is called after each step with its record."""

    def __init__(self, on_step: Callable[[Mapping[str, Any]], None] = lambda _: None) -> None:
        self.calls: list[str] = []
        self.run: RunInfo | None = None
        self.records: dict[str, list[dict[str, Any]]] = {"train": [], "eval": [], "sample": []}
        self.notes: list[str] = []
        self.on_step = on_step

    def start(self, run: RunInfo) -> None:
        self.calls.append("start")
        self.run = run

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        self.calls.append(kind)
        self.records[kind].append(dict(record))
        if kind == "train":
            self.on_step(record)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self) -> None:
        self.calls.append("finish")
