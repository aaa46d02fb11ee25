"""How long a run will take: what is computed from measured seconds, and that measuring changes nothing."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.trackers import Recorder

import gold.train.pace
from gold import LocalTeacher, Recipe, Term, distill
from gold.evaluate import EvaluationPlan
from gold.teachers import Teachers
from gold.train.loop import Saving, pace_of
from gold.train.pace import Pace, Speed, Work, measure

WORK = Work(
    steps=100,
    prompts_per_step=8,
    num_generations=4,
    max_new_tokens=100,
    generation_batch_size=16,
    on_policy=1.0,
    evaluations=3,
    evaluated=24,
)
PACE = Pace(Speed(0.5, 0.1, 16, 0.02, 0.0), [], 20.0, 0.01, 0.002, 0.1, WORK)


@pytest.fixture
def _any_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also runs of seconds are measured."""
    monkeypatch.setattr(gold.train.pace, "_SHORT_RUN_FLOPS", 0.0)


works = st.builds(
    Work,
    *(st.integers(1, high) for high in (1000, 32, 8, 300, 64)),
    on_policy=st.floats(0, 1),
    evaluations=st.integers(0, 20),
    evaluated=st.integers(1, 64),
)
speeds = st.builds(
    Speed, st.floats(0, 2), st.floats(1e-3, 1), st.integers(1, 32), st.floats(1e-3, 1), st.floats(0, 1)
)


@given(st.integers(1, 8), st.integers(1, 30), st.floats(0, 0.9), st.integers(0, 5))
def test_the_longest_of_some_completions_is_that_of_drawing_them(
    size: int, new_tokens: int, stops: float, seed: int
) -> None:
    drawn, trials = random.Random(seed), 2000

    def length() -> int:
        return next((n for n in range(1, new_tokens) if drawn.random() < stops), new_tokens)

    mean = sum(max(length() for _ in range(size)) for _ in range(trials)) / trials
    speed = Speed(0.0, 1.0, 1, 1.0, stops)
    assert speed.longest(size, new_tokens) == pytest.approx(mean, abs=6 * new_tokens / trials**0.5)


@given(works, speeds, st.lists(speeds, max_size=2), st.lists(st.floats(1e-6, 0.1), min_size=3, max_size=3))
def test_what_makes_a_run_faster_does(work: Work, student: Speed, teachers: Any, seconds: Any) -> None:
    pace = Pace(student, teachers, 20.0, *seconds, work)
    whole, faster = pace.run(work), pace.faster()
    assert whole > 0
    assert sum(pace.step(work).values()) * work.steps + pace.evaluation(work) * work.evaluations == (
        pytest.approx(whole)
    )
    assert all(after <= 0.9 * whole for _, after in faster)
    single = [after for keys, after in faster if keys != "all of these"]
    assert single == sorted(single)
    if len(single) > 1:
        assert faster[-1][0] == "all of these"
    assert "time" in pace.lines()


def test_a_long_run_says_what_would_make_it_shorter() -> None:
    lines = PACE.lines()
    # 32 completions in 2 batches of 16: 2 × (0.5 + 100 × 0.1) s; 32 × 120 tokens at 0.012 s; 0.1 s.
    assert lines["time"].startswith(
        "about 1 h 54 min on this machine: 100 steps of 67 s (drawing 31%, teacher 11%, learning 57%)"
    )
    assert lines["faster"].startswith("train.steps=50: 57 min; ")
    assert "rollout.max_new_tokens=50: " in lines["faster"]
    assert "all of these: " in lines["faster"]
    assert "faster" not in replace(PACE, work=replace(WORK, steps=3)).lines()


@pytest.mark.usefixtures("_any_run")
@pytest.mark.parametrize(
    "terms",
    [
        pytest.param((Term("reverse_kl"),), marks=pytest.mark.slow),
        (Term("token_pg"), Term("reference_kl", weight=0.1)),
    ],
)
def test_a_run_whose_time_is_estimated_is_the_same_run(tmp_path: Path, terms: tuple[Term, ...]) -> None:
    recipe = Recipe(terms, steps=2, prompts_per_step=2, num_generations=2, max_new_tokens=6)
    told = {}
    for estimate in (False, True):
        seen, output = Recorder(), tmp_path / str(estimate)
        distill(
            tiny.tiny_student(), tiny.tiny_teacher(), tiny.prompts(8), recipe, heldout=tiny.heldout(2),
            saving=Saving(output), trackers=[seen], estimate=estimate,
        )  # fmt: skip
        assert seen.run is not None
        assert ("time" in seen.run.header) == estimate
        assert bool(seen.run.expected) == estimate
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
        told[estimate] = (
            [{k: v for k, v in line.items() if not k.endswith(("_s", "per_s"))} for line in lines],
            (output / "student" / "model.safetensors").read_bytes(),
        )
    assert told[True] == told[False]


@pytest.mark.usefixtures("_any_run")
def test_measuring_draws_no_random_number_and_leaves_no_gradient() -> None:
    student, teacher = tiny.tiny_student(), tiny.tiny_teacher()
    before = torch.random.get_rng_state()
    recipe = Recipe(steps=20, prompts_per_step=2, num_generations=2, max_new_tokens=6)
    pace = pace_of(
        student, Teachers({"t": LocalTeacher(teacher)}), tiny.prompts(8), recipe, tiny.heldout(3),
        EvaluationPlan(max_new_tokens=6), 5,
    )  # fmt: skip
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(weight.grad is None for weight in student.lm.parameters())
    assert pace is not None
    assert (pace.work.evaluations, pace.work.evaluated, len(pace.teachers)) == (5, 3, 1)
    assert all(seconds > 0 for seconds in pace.expected.values())


def test_what_happens_elsewhere_is_not_measured() -> None:
    class Elsewhere:
        count, step = 2, 0

    assert measure(Elsewhere(), type("S", (), {"members": {}})(), [], EvaluationPlan(), 1) is None  # type: ignore[arg-type]
