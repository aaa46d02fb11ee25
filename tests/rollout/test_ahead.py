"""Batches that are generated before their step."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from gold.errors import CheckpointError, TeacherError
from gold.rollout.ahead import RolloutsAhead, load_generations, save_generations
from gold.rollout.engine import Generation, Request
from gold.rollout.types import Sampling


class Slow:
    """An engine that answers when it is told to, or raises."""

    def __init__(self, own_weights: bool, failure: Exception | None = None) -> None:
        self.own_weights, self.failure, self.version = own_weights, failure, 3
        self.go, self.calls = threading.Event(), 0
        self.thread: threading.Thread | None = None

    def generate(self, requests):
        self.calls, self.thread = self.calls + 1, threading.current_thread()
        assert not self.own_weights or self.go.wait(20)
        if self.failure:
            raise self.failure
        return [generation(r.seed[-1], self.version) for r in requests]

    def push(self, weights, version):
        self.version = version

    def close(self):
        pass


def generation(n: int, version: int = 0) -> Generation:
    return Generation(np.arange(n, dtype=np.int32), -np.ones(n, np.float32), bool(n % 2), version)


def requests(*places: tuple[int, int]) -> dict[tuple[int, int], Request]:
    return {place: Request((1,), (7, *place), Sampling(1.0, 1.0, 8), (0,)) for place in places}


def same(first: dict, second: dict) -> bool:
    return list(first) == list(second) and all(
        np.array_equal(a.ids, b.ids)
        and np.array_equal(a.logprobs, b.logprobs)
        and (a.stopped, a.version) == (b.stopped, b.version)
        for a, b in zip(first.values(), second.values(), strict=True)
    )


def test_an_engine_with_its_own_weights_generates_beside_the_step():
    engine = Slow(own_weights=True)
    ahead = RolloutsAhead()
    ahead.start(engine, 4, requests((0, 1), (2, 3)))
    assert engine.thread is None or engine.thread.is_alive()
    engine.go.set()
    taken = ahead.take(4)
    assert list(taken) == [(0, 1), (2, 3)]
    assert [g.ids.size for g in taken.values()] == [1, 3]
    assert engine.thread is not threading.current_thread()
    assert ahead.take(5) is None


def test_an_engine_without_its_own_weights_generates_at_once():
    engine = Slow(own_weights=False)
    ahead = RolloutsAhead()
    ahead.start(engine, 1, requests((0, 0)))
    assert (engine.calls, engine.thread) == (1, threading.current_thread())
    engine.version = 9
    assert [g.version for g in ahead.take(1).values()] == [3]


def test_a_batch_of_another_step_is_not_used():
    engine, ahead = Slow(own_weights=False), RolloutsAhead()
    ahead.start(engine, 1, requests((0, 0)))
    assert ahead.take(2) is None
    assert ahead.contents(1) == {}


def test_a_batch_is_kept_until_a_later_step_begins():
    engine, ahead = Slow(own_weights=False), RolloutsAhead()
    ahead.start(engine, 1, requests((0, 1)))
    first = ahead.take(1)
    ahead.start(engine, 2, requests((0, 2)))
    assert same(ahead.contents(1), first)
    assert list(ahead.take(2)) == [(0, 2)]
    assert ahead.contents(1) == {}


@pytest.mark.parametrize("own_weights", [True, False])
def test_a_failure_comes_out_where_the_batch_is_taken(own_weights):
    engine = Slow(own_weights, TeacherError("the engine is gone"))
    engine.go.set()
    ahead = RolloutsAhead()
    ahead.start(engine, 1, requests((0, 0)))
    ahead.wait()
    assert ahead.contents(1) == {}
    with pytest.raises(TeacherError, match="gone"):
        ahead.take(1)
    assert ahead.take(1) is None


def test_completions_survive_a_checkpoint(tmp_path):
    engine = Slow(own_weights=False)
    ahead = RolloutsAhead()
    ahead.start(engine, 5, requests((0, 0), (1, 4), (1, 2)))
    save_generations(ahead.contents(5), tmp_path / "rollouts.npz")
    again = RolloutsAhead()
    again.restore(5, load_generations(tmp_path / "rollouts.npz"))
    assert same(again.take(5), ahead.take(5))
    save_generations({}, tmp_path / "none.npz")
    assert load_generations(tmp_path / "none.npz") == {}


def test_a_broken_file_is_one_line(tmp_path):
    file = tmp_path / "rollouts.npz"
    save_generations({(0, 0): generation(3)}, file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"rollouts\.npz"):
        load_generations(file)


def test_ctrl_c_while_a_batch_is_drawn_at_once_is_not_kept_for_later():
    engine, ahead = Slow(False, KeyboardInterrupt()), RolloutsAhead()
    with pytest.raises(KeyboardInterrupt):
        ahead.start(engine, 1, requests((0, 0)))
    assert ahead.contents(1) == {}
