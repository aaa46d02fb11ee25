"""Runs of an experiment that are kept one by one: what is done is read, what is missing is run in processes."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gold.demo.run import one_thread

Job = Any
"""A frozen dataclass of plain values that determine a run, sizes included: another value is another cell."""


@dataclass(frozen=True)
class Given:
    """What a part is run with: its cells, how many seeds, and whether sizes are tiny."""

    cells: Cells
    seeds: int
    small: bool


class Cells:
    """The cells of one part, in ``folder``: `cells.jsonl`, and `made/` for models that several of them begin with."""

    def __init__(self, folder: Path, workers: int = 1) -> None:
        self.folder, self.workers = folder, workers
        self.made = folder / "made"
        self.made.mkdir(parents=True, exist_ok=True)
        self._file = folder / "cells.jsonl"
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        self._found = {_key(row["job"]): row for row in map(json.loads, lines)}
        self._used: dict[str, float | None] = {}

    def all(
        self, work: Callable[[Any, Path], Mapping[str, Any]], jobs: Sequence[Job]
    ) -> list[dict[str, Any]]:
        """What ``work(job, folder of made models)`` returned for every job, in their order; it must be JSON.

        Missing ones are run ``workers`` at a time, each in a fresh process of one thread; with 0 workers, here.
        """
        told = {_key(_named(job)): job for job in jobs}
        missing = {key: job for key, job in told.items() if key not in self._found}
        with self._file.open("a", encoding="utf-8") as file:
            for n, (key, result, cpu_s) in enumerate(self._run(work, missing), start=1):
                row = {"job": json.loads(key), "cpu_s": cpu_s, "result": result}
                self._found[key] = json.loads(json.dumps(row))
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(f"{n:>4}/{len(missing)} {cpu_s:5.0f} s  {missing[key]}", flush=True)
        rows = [self._found[key] for key in told]
        self._used |= {key: self._found[key]["cpu_s"] for key in told}
        by_key = dict(zip(told, rows, strict=True))
        return [by_key[_key(_named(job))]["result"] for job in jobs]

    def _run(
        self, work: Callable[[Any, Path], Mapping[str, Any]], missing: Mapping[str, Job]
    ) -> Iterator[tuple[str, dict[str, Any], float]]:
        """The key, the result and the processor seconds of each job, as they come."""
        if self.workers == 0:
            for key, job in missing.items():
                yield key, *_timed(work, job, self.made)
        elif missing:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([work.__module__])  # imported once, not by every cell
            with ProcessPoolExecutor(
                self.workers, mp_context=context, initializer=one_thread, max_tasks_per_child=1
            ) as pool:
                running = {pool.submit(_timed, work, job, self.made): key for key, job in missing.items()}
                for future in as_completed(running):
                    yield running[future], *future.result()

    def spent(self) -> dict[str, float]:
        """``cells_s``: processor seconds of the cells that were asked for, whenever they ran; left out if a cell does
        not tell its own, as those that were put back from a record."""
        known = [value for value in self._used.values() if value is not None]
        return {"cells_s": round(sum(known), 1)} if len(known) == len(self._used) else {}


def _timed(
    work: Callable[[Any, Path], Mapping[str, Any]], job: Job, made: Path
) -> tuple[dict[str, Any], float]:
    begun = time.process_time()
    result = dict(work(job, made))
    return result, round(time.process_time() - begun, 2)


def _named(job: Job) -> dict[str, Any]:
    return {"kind": type(job).__qualname__, **asdict(job)}


def _key(named: Mapping[str, Any]) -> str:
    return json.dumps(named, sort_keys=True)
