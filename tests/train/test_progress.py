"""What a run prints: when, and how long it says that it still takes."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gold.activity import Activity
from gold.train.forecast import PHASES, Forecast, duration
from gold.train.listener import RunListener
from gold.train.progress import Lines
from gold.train.trackers import RunInfo, Tracker


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def record(step: int, seconds: float) -> dict[str, Any]:
    """A step that spends half of its time on drawing."""
    phases = {"rollout_s": seconds / 2, "teacher_s": seconds / 4, "student_s": seconds / 4}
    return {"step": step, "loss": 0.5, "length_bytes": 3.0, "tokens_per_s": 1.0, "step_s": seconds, **phases}


class Printed:
    """A run that takes no time, and what it prints."""

    def __init__(self, steps: int, evaluate_every: int = 0, **options: Any) -> None:
        self.clock, self.out = Clock(), io.StringIO()
        self.lines = Lines(self.out, now=self.clock, **options)
        self.lines.start(RunInfo({}, {"student": "s"}, steps, 0, evaluate_every))

    def step(self, number: int, seconds: float) -> None:
        self.doing("step")
        self.clock.time += seconds
        self.lines.log("train", record(number, seconds))

    def doing(self, *path: str, **reached: Any) -> None:
        self.lines.doing(Activity(path, **reached))

    def new(self) -> list[str]:
        said = self.out.getvalue().splitlines()
        self.out.seek(0)
        self.out.truncate()
        return said


def test_slow_steps_have_a_line_each_and_fast_ones_one_in_five_seconds() -> None:
    slow, fast = Printed(4), Printed(1000)
    for number in range(1, 5):
        slow.step(number, 7.0)
    assert [line.split()[1] for line in slow.new()[1:]] == ["1/4", "2/4", "3/4", "4/4"]
    for number in range(1, 1001):
        fast.step(number, 0.1)
    shown = [int(line.split()[1].partition("/")[0]) for line in fast.new()[1:]]
    assert (shown[0], shown[-1]) == (1, 1000)
    assert 19 <= len(shown) <= 22


def test_a_long_step_says_how_far_it_is_every_half_minute() -> None:
    run = Printed(3)
    run.step(1, 200.0)
    run.new()
    run.doing("step")
    for second in range(100):
        run.clock.time += 1.0
        run.doing("step", "rollout", done=second // 10, total=10, unit="completions", tokens=second)
    said = run.new()
    assert len(said) == 3
    assert said[0].startswith("step     2/3  drawing, 2 of 10 completions, 29 tokens, 30 s so far")
    # Half of the 200 s of a step are drawn, the rest follows; 29 s of the drawing are over.
    assert "about 2.9 min left" in said[0]
    assert "run about 6.2 min" in said[0]


def test_evaluations_and_loading_announce_themselves() -> None:
    run = Printed(100, evaluate_every=50)
    run.new()
    run.doing("loading student s (0.3 GB)")
    run.doing("evaluation")
    assert run.new() == ["loading student s (0.3 GB)", "evaluation before the first step"]
    run.lines.log("eval", {"step": 0, "evaluate_s": 9.0})
    run.step(1, 1.0)
    run.new()
    run.doing("evaluation")
    assert run.new() == ["evaluation after step 1"]
    run.lines.log("eval", {"step": 1, "evaluate_s": 0.5})
    run.new()
    run.doing("evaluation")  # short ones are over before one has read that
    assert run.new() == []


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=30), st.integers(0, 20), st.integers(1, 40))
def test_a_forecast_of_equal_steps_is_their_number_times_their_seconds(
    seconds: list[float], left: int, every: int
) -> None:
    clock, done = Clock(), len(seconds)
    forecast = Forecast(RunInfo({}, {}, done + left, 0, every), clock)
    assert forecast.of_run() is None
    for number in range(1, done + 1):
        clock.time += seconds[0]
        forecast.log("train", record(number, seconds[0]))
    forecast.log("eval", {"step": done, "evaluate_s": 3.0})
    evaluations = sum(step % every == 0 or step == done + left for step in range(done + 1, done + left + 1))
    assert forecast.of_run() == pytest.approx(left * seconds[0] + 3.0 * evaluations)
    for phase in PHASES:
        assert (forecast.of_step(phase, 0.0) or 0.0) <= seconds[0] * (1 + 1e-9)


def test_what_is_expected_counts_until_a_step_was_taken() -> None:
    clock = Clock()
    expected = {"rollout": 6.0, "student": 4.0, "evaluation": 30.0}
    forecast = Forecast(RunInfo({}, {}, 10, 0, 5, expected), clock)
    assert forecast.of_run() == pytest.approx(10 * 10.0 + 2 * 30.0)
    assert forecast.of_step("rollout", 2.0) == pytest.approx(4.0 + 4.0)
    clock.time += 1.0
    forecast.log("train", record(1, 1.0))
    assert forecast.of_run() == pytest.approx(9 * 1.0 + 2 * 30.0)


@given(st.floats(0, 1e7))
def test_a_duration_is_right_to_a_few_percent(seconds: float) -> None:
    units = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
    words = duration(seconds).split()
    told = sum(float(n) * units[unit] for n, unit in zip(words[::2], words[1::2], strict=True))
    assert told == pytest.approx(seconds, rel=0.03, abs=0.06)


def test_a_listener_tells_beginnings_at_once_and_the_rest_ten_times_a_second() -> None:
    told: list[Activity] = []

    class Told(Tracker):
        def doing(self, activity: Activity) -> None:
            told.append(activity)

    clock = Clock()
    listener = RunListener(Told(), clock)
    for number in range(1, 101):
        listener.hear(Activity(("step",)) if number == 50 else Activity(("step",), number, 100, "texts"))
        clock.time += 0.01
    assert Activity(("step",)) in told
    assert 10 <= len(told) <= 12
    assert not listener.stops
