"""Completions that are drawn one step ahead, and the weights that correct for it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny_models as tiny
from support.engines import ScriptedEngine

import gold
from gold.errors import ConfigError, EngineError
from gold.evaluate import EvaluationPlan
from gold.rollout.hf import HuggingFaceEngine
from gold.teachers.several import Teachers
from gold.train.loop import Saving
from gold.train.setup import Setup

RECIPE = gold.Recipe(
    steps=4, prompts_per_step=2, num_generations=2, lr=3e-3, warmup_steps=1, max_new_tokens=6, staleness=1
)
CLOCKS = ("_s", "_per_s")


class CopyEngine(HuggingFaceEngine):
    """Generates with a copy of the student, which gets its weights by ``push`` alone."""

    def __init__(self, student, noise: float = 0.0) -> None:
        super().__init__(replace(student, lm=copy.deepcopy(student.lm)))
        self.own_weights, self.noise = True, noise

    def push(self, weights, version: int) -> None:
        self.model.lm.load_state_dict(weights)
        with torch.no_grad():
            for weight in self.model.lm.parameters():
                weight.add_(self.noise * torch.ones_like(weight).cumsum(-1).sin())
        super().push(weights, version)


def train(recipe: gold.Recipe, engine=None, output: Path | None = None, **saving: object):
    student = tiny.tiny_student()
    engine = engine(student) if engine else None
    saving = Saving(output=output, checkpoint_every=1, **saving) if output else Saving()
    run = gold.distill(
        student,
        tiny.tiny_teacher(),
        tiny.prompts(),
        recipe,
        engine=engine,
        saving=saving,
        heldout=tiny.heldout(2),
        evaluation=EvaluationPlan(max_new_tokens=6),
    )
    return run, {n: w.clone() for n, w in student.lm.state_dict().items()}


def untimed(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "kind" and not k.endswith(CLOCKS)} for record in records]


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_completions_are_those_of_the_weights_before_the_last_update() -> None:
    run, _ = train(RECIPE)
    assert [record.get("staleness") for record in run.steps] == [0, 1, 1, 1]
    first, *later = run.steps
    assert first["policy_log_ratio_abs"] < 1e-5
    assert all(record["policy_log_ratio_abs"] > 1e-4 for record in later)
    assert all(record["policy_ratio_max"] > 1.001 for record in later)
    assert all(0 < record["policy_kl"] < 0.1 for record in later)
    on_time, _ = train(RECIPE.replace(staleness=0))
    assert on_time.steps[0]["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert "staleness" not in on_time.steps[1]


def test_an_engine_that_draws_beside_the_step_draws_the_same() -> None:
    here, weights = train(RECIPE)
    beside, other = train(RECIPE, CopyEngine)
    assert untimed(here.steps) == untimed(beside.steps)
    assert untimed(here.evaluations) == untimed(beside.evaluations)
    assert same(weights, other)
    assert all(record["engine_idle_s"] >= 0 for record in beside.steps)


def test_a_resumed_run_learns_from_the_completions_that_were_under_way(tmp_path: Path) -> None:
    class Dies(CopyEngine):
        """It fails in the third step, when that step's completions are there already."""

        def push(self, weights, version: int) -> None:
            if version == 2:
                raise EngineError("the engine is gone")
            super().push(weights, version)

    whole, weights = train(RECIPE, CopyEngine, tmp_path / "whole")
    with pytest.raises(EngineError, match="after step 2: the engine is gone"):
        train(RECIPE, Dies, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "rollouts.npz").exists()
    resumed, other = train(RECIPE, CopyEngine, tmp_path / "run", resume=True)
    assert untimed(resumed.steps) == untimed(whole.steps)
    assert resumed.steps[-1]["staleness"] == 1
    assert same(weights, other)
    assert not list((tmp_path / "whole").glob("checkpoints/step-000004/rollouts.npz"))


def test_an_engine_in_another_precision_is_corrected_and_watched() -> None:
    recipe = RECIPE.replace(staleness=0)
    plain, weights = train(recipe)
    exact, copied = train(recipe, CopyEngine)
    assert all(record["policy_log_ratio_abs"] < 1e-5 for record in exact.steps)
    assert all(torch.allclose(weights[n], copied[n], atol=1e-4) for n in weights)
    noisy, _ = train(recipe, lambda student: CopyEngine(student, 1e-3))
    assert noisy.steps[0]["policy_log_ratio_abs"] > 1e-4
    unweighted, _ = train(recipe.replace(importance_cap=None), lambda student: CopyEngine(student, 1e-3))
    assert "policy_kl" not in unweighted.steps[0]
    assert "policy_kl" not in plain.steps[0]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, None),
        ({"importance_cap": None}, None),
        ({"temperature": 0.7}, "rollout.temperature"),
        ({"top_p": 0.9}, "rollout.top_p"),
        ({"objectives": [gold.Term("uld")]}, "uld"),
    ],
)
def test_completions_without_weights_are_named(settings: dict, named: str | None) -> None:
    student, recipe = tiny.tiny_student(), RECIPE.replace(staleness=0, **settings)
    teachers = Teachers({"teacher": tiny.tiny_teacher()})
    line = Setup.of(student, teachers, tiny.prompts(), recipe, CopyEngine(student)).uncorrected
    assert (line is None) if named is None else named in line
    assert Setup.of(student, teachers, tiny.prompts(), recipe).uncorrected is None


def test_completions_cut_short_can_be_left_out() -> None:
    recipe = RECIPE.replace(staleness=0, steps=2, max_new_tokens=3)
    keep, _ = train(recipe)
    mask, _ = train(recipe.replace(cut="mask"))
    assert "masked_sequences" not in keep.steps[0]
    expected = round((1 - mask.steps[0]["stop_rate"]) * 4)
    assert expected
    assert mask.steps[0]["masked_sequences"] == expected


def test_an_engine_that_fails_ahead_ends_the_run_where_its_batch_is_needed() -> None:
    class Fails(ScriptedEngine):
        own_weights = True

        def generate(self, requests):
            if requests and requests[0].seed[1] == 2:
                raise EngineError("the engine is gone")
            return super().generate(requests)

    student = tiny.tiny_student()
    ids = student.vocabulary.encode("7").ids.tolist()
    engine = Fails(lambda _: [*ids, student.vocabulary.stop_ids[0]])
    with pytest.raises(EngineError, match="after step 2: the engine is gone"):
        gold.distill(student, tiny.tiny_teacher(), tiny.prompts(), RECIPE, engine=engine)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"temperature": 0.7}, "rollout.temperature"),
        ({"top_p": 0.9}, "rollout.top_p"),
        ({"objectives": [gold.Term("uld")]}, "rollout.staleness"),
    ],
)
def test_what_has_no_weights_is_refused(settings: dict, key: str) -> None:
    student = tiny.tiny_student()
    with pytest.raises(ConfigError, match=key):
        gold.distill(student, tiny.tiny_teacher(), tiny.prompts(), RECIPE.replace(**settings))
