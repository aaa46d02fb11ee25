"""Completions that are kept by request."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gold.errors import CheckpointError, ConfigError
from gold.rollout.completions import Completions, one_writer
from gold.rollout.engine import Generation, Request
from gold.rollout.types import Sampling

IDS = st.lists(st.integers(0, 2**20), max_size=4).map(tuple)
REQUESTS = st.builds(
    Request,
    IDS,
    IDS,
    st.builds(Sampling, st.integers(1, 9), st.sampled_from([0.7, 1.0]), st.sampled_from([0.9, 1.0])),
    IDS,
)


@st.composite
def drawn(draw: st.DrawFn) -> dict[Request, Generation]:
    found = {}
    for request in draw(st.lists(REQUESTS, max_size=6, unique=True)):
        ids = np.array(draw(st.lists(st.integers(0, 2**31 - 1), max_size=5)), np.int32)
        logprobs = np.array(
            draw(st.lists(st.floats(-100, 0, width=32), min_size=ids.size, max_size=ids.size)), np.float32
        )
        found[request] = Generation(ids, logprobs, draw(st.booleans()), draw(st.integers(0, 5)))
    return found


def same(one: Generation, other: Generation) -> bool:
    return (
        np.array_equal(one.ids, other.ids)
        and np.array_equal(one.logprobs, other.logprobs)
        and one.stopped == other.stopped
        and other.version == 0
    )


@settings(max_examples=40)
@given(st.lists(drawn(), max_size=3), drawn())
def test_what_is_kept_is_found_again_and_nothing_else(parts: list[dict], others: dict) -> None:
    with TemporaryDirectory() as name:
        kept = Completions("weights", Path(name))
        first: dict[Request, Generation] = {}
        for part in parts:
            kept.add(list(part), list(part.values()))
            first = part | first  # of repeated ones the oldest
        again = Completions("weights", Path(name))
        requests = [*first, *others]
        again.drawn |= again.read(requests)
        assert again.missing(requests) == [r for r in others if r not in first]
        assert all(same(a, b) for a, b in zip(first.values(), again.of(list(first)), strict=True))
        assert again.missing([*others, *others]) == again.missing(list(others))
        assert Completions("other weights", Path(name)).read(requests) == {}
        assert Completions("weights").read(requests) == {}


@given(REQUESTS)
def test_a_key_is_of_all_that_a_completion_depends_on(request_: Request) -> None:
    kept, sampling = Completions("weights"), request_.sampling
    others = [
        replace(request_, prompt_ids=(*request_.prompt_ids, 0)),
        replace(request_, seed=(*request_.seed, 0)),
        replace(request_, stop_ids=(*request_.stop_ids, 0)),
        replace(request_, sampling=replace(sampling, max_new_tokens=sampling.max_new_tokens + 1)),
        replace(request_, sampling=replace(sampling, temperature=0.5)),
        replace(request_, sampling=replace(sampling, top_p=0.5)),
    ]
    keys = [kept.key(each) for each in (request_, *others)] + [Completions("w").key(request_)]
    assert len(set(keys)) == len(keys)
    # No two parts run into each other.
    moved = replace(request_, prompt_ids=(1, *request_.prompt_ids), stop_ids=request_.stop_ids)
    assert kept.key(moved) != kept.key(replace(request_, stop_ids=(1, *request_.stop_ids)))


REQUEST = Request((1, 2), (0, 0, 0, 0, 0), Sampling(max_new_tokens=4), (3,))
GENERATION = Generation(np.array([5, 3], np.int32), np.array([-1, -2], np.float32), True, 7)


@pytest.mark.parametrize("damage", ["cut", "emptied", "other file", "lengths"])
def test_a_broken_file_counts_as_not_there(tmp_path: Path, damage: str, caplog) -> None:
    Completions("w", tmp_path).add([REQUEST], [GENERATION])
    (file,) = tmp_path.glob("*.npz")
    whole = file.read_bytes()
    if damage == "lengths":
        with np.load(file) as saved:
            columns = dict(saved)
        np.savez(file, **columns | {"lengths": np.array([3], np.int64)})
    else:
        file.write_bytes({"cut": whole[:-30], "emptied": b"", "other file": b"PK" + bytes(100)}[damage])
    kept = Completions("w", tmp_path)
    with caplog.at_level(logging.WARNING):
        assert kept.read([REQUEST]) == {}
    assert file.name in caplog.text
    kept.add([REQUEST], [GENERATION])
    assert len(kept.read([REQUEST])) == 1


def test_one_at_a_time_draws_into_a_folder(tmp_path: Path) -> None:
    waited, entered = threading.Event(), threading.Event()

    def second() -> None:
        with one_writer(tmp_path / "kept", waited.set):
            entered.set()

    with one_writer(tmp_path / "kept", lambda: None):
        thread = threading.Thread(target=second)
        thread.start()
        assert waited.wait(20)
        assert not entered.is_set()
    thread.join(20)
    assert entered.is_set()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="is no folder"),
        one_writer(tmp_path / "file", lambda: None),
    ):
        pass
    with (
        pytest.raises(CheckpointError, match="cannot write"),
        one_writer(tmp_path / "file" / "below", lambda: None),
    ):
        pass
    kept = Completions("w", tmp_path / "gone")
    with pytest.raises(CheckpointError, match="cannot write completions"):
        kept.add([REQUEST], [GENERATION])
    assert kept.missing([REQUEST]) == [REQUEST]
