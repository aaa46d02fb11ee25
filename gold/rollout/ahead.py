"""Rollouts one step ahead: a batch is generated while the batch before it is learned from."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gold.activity import Stopped, report
from gold.errors import CheckpointError
from gold.rollout.completions import columns_of, generations_of
from gold.rollout.engine import Generation, Request, RolloutEngine

Place = tuple[int, int]
"""A completion of a step: the number of its prompt in the step, and its own number among that prompt's."""
_REPORT_S = 0.2
"""Seconds after which a wait for completions is reported, and may be left."""


@dataclass(frozen=True)
class _Batch:
    places: tuple[Place, ...]
    answer: Future[list[Generation]]

    def wait(self) -> None:
        """Returns once it is complete or has failed."""
        while not wait([self.answer], timeout=_REPORT_S).done:
            report(0, len(self.places), "completions")

    def generations(self) -> dict[Place, Generation]:
        self.wait()
        return dict(zip(self.places, self.answer.result(), strict=True))


class RolloutsAhead:
    """Generates the completions of a step before that step begins, and keeps them until a later step asks for its own.

    At most one batch is under way. An engine that holds a copy of the weights (``engine.own_weights``) generates in a
    thread; any other generates in ``start``, so that the same completions are drawn by the same weights.
    ``idle_s``: seconds that the engine was without work since the last ``take``.
    """

    def __init__(self) -> None:
        self.idle_s = 0.0
        self._batches: dict[int, _Batch] = {}
        self._finished = time.perf_counter()

    def start(
        self,
        engine: RolloutEngine,
        step: int,
        requests: Mapping[Place, Request],
        generate: Callable[[Sequence[Request]], list[Generation]] | None = None,
    ) -> None:
        """Begins to generate the completions of a step with the engine's current weights, once it is idle;
        ``generate``, where it is not the engine's own, asks the engine."""
        self.wait()
        answer: Future[list[Generation]] = Future()
        self._batches[step] = _Batch(tuple(requests), answer)
        self.idle_s += time.perf_counter() - self._finished
        work = (generate or engine.generate, answer, list(requests.values()))
        if engine.own_weights:
            # A daemon: a run that is interrupted does not wait for an engine that hangs.
            threading.Thread(target=self._generate, args=work, name="rollouts", daemon=True).start()
        else:
            self._generate(*work)

    def _generate(
        self,
        generate: Callable[[Sequence[Request]], list[Generation]],
        answer: Future[list[Generation]],
        requests: Sequence[Request],
    ) -> None:
        try:
            answer.set_result(generate(requests))
        except BaseException as error:
            answer.set_exception(error)
            # Ctrl-C ends the run now, not where the batch is needed.
            if isinstance(error, Stopped) or not isinstance(error, Exception):
                raise
        self._finished = time.perf_counter()

    def wait(self) -> None:
        """Returns once the engine is idle, whether it succeeded or not."""
        for batch in self._batches.values():
            batch.wait()

    def take(self, step: int) -> dict[Place, Generation] | None:
        """The completions of a step; None if they were not started. Those of earlier steps are dropped.

        Raises:
            GoldError: any error of the engine. The batch is dropped: the next ``take`` returns None.
        """
        self._batches = {n: batch for n, batch in self._batches.items() if n >= step}
        self.idle_s = 0.0
        if step not in self._batches:
            return None
        try:
            return self._batches[step].generations()
        except Stopped:
            raise
        except BaseException:
            del self._batches[step]
            raise

    def contents(self, step: int) -> dict[Place, Generation]:
        """The completions of a step, once they are complete; empty if there are none, or the engine failed."""
        batch = self._batches.get(step)
        return {} if batch is None or batch.answer.exception() is not None else batch.generations()

    def restore(self, step: int, generations: Mapping[Place, Generation]) -> None:
        """Makes completions of an earlier process those of the step."""
        answer: Future[list[Generation]] = Future()
        answer.set_result(list(generations.values()))
        self._batches = {step: _Batch(tuple(generations), answer)}


def save_generations(generations: Mapping[Place, Generation], file: Path) -> None:
    """Writes completions to an ``.npz`` file."""
    places = np.array(list(generations), np.int64).reshape(-1, 2)
    np.savez(file, places=places, **columns_of(list(generations.values())))


def load_generations(file: Path) -> dict[Place, Generation]:
    """The completions of a file of ``save_generations``.

    Raises:
        CheckpointError: it is broken.
    """
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as saved:
            places = [(int(prompt), int(number)) for prompt, number in saved["places"].tolist()]
            return dict(zip(places, generations_of(saved), strict=True))
    except Exception as error:
        raise CheckpointError(f"{file} is broken: {error}") from error
