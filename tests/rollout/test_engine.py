"""The seam of rollout engines: a scripted one trains a student."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import tiny_models as tiny
from support.engines import ScriptedEngine

import gold
from gold.errors import TeacherError
from gold.evaluate import EvaluationPlan

RECIPE = gold.Recipe(
    steps=3,
    prompts_per_step=2,
    num_generations=2,
    lr=1e-2,
    warmup_steps=1,
    max_new_tokens=6,
)


def scripted(student) -> ScriptedEngine:
    """Writes "7", then the stop id or, for every other request, whatever fits."""
    ids, stop = student.vocabulary.encode("7").ids.tolist(), student.vocabulary.stop_ids[0]
    return ScriptedEngine(lambda request: [*ids, stop] if request.seed[-1] % 2 else ids * 10)


def test_a_scripted_engine_trains_a_student_and_gets_its_weights_after_every_step() -> None:
    student = tiny.tiny_student()
    engine = scripted(student)
    plan = EvaluationPlan(max_new_tokens=6)
    run = gold.distill(
        student,
        tiny.tiny_teacher(),
        tiny.prompts(),
        RECIPE,
        heldout=tiny.heldout(2),
        evaluation=plan,
        engine=engine,
    )
    assert [version for version, _ in engine.pushed] == [0, 1, 2, 3]
    weights = [pushed for _, pushed in engine.pushed]
    assert "lm_head.weight" in weights[0]  # a tied matrix under each of its names
    head = [pushed["lm_head.weight"] for pushed in weights]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(head))
    assert torch.equal(head[-1], student.lm.get_output_embeddings().weight)
    # Evaluations before and after, and twelve completions in between, each of its own random stream.
    assert len(engine.requests) == 2 + 3 * 4 + 2
    training = [r for r in engine.requests if r.seed[1] != 2**31]
    assert len({r.seed for r in training}) == len(training) == 12
    assert all(r.stop_ids == student.vocabulary.stop_ids for r in engine.requests)
    assert all(record["stop_rate"] == 0.5 for record in run.steps)
    assert all(record["sampled_entropy"] == pytest.approx(1.0) for record in run.steps)


def test_an_engine_that_fails_ends_the_run_with_its_own_words() -> None:
    class Gone(ScriptedEngine):
        def generate(self, requests):
            raise TeacherError("the engine is gone")

    student, recipe = tiny.tiny_student(), RECIPE.replace(steps=1)
    with pytest.raises(TeacherError, match="after step 0: the engine is gone"):
        gold.distill(student, tiny.tiny_teacher(), tiny.prompts(), recipe, engine=Gone(lambda _: []))
