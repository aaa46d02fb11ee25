"""Completions of the student as it starts: drawn once, kept, graded once."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_models as tiny
from support.engines import ScriptedEngine
from support.processes import launch

import gold
from gold import run
from gold.config import Config
from gold.errors import ConfigError, EngineError, TeacherError
from gold.evaluate import EvaluationPlan
from gold.rollout.hf import HuggingFaceEngine
from gold.teachers.absent import AbsentTeacher
from gold.teachers.cached import CachedTeacher
from gold.teachers.local import LocalTeacher
from gold.teachers.several import Teachers
from gold.train.initial import needed
from gold.train.loop import Saving
from gold.train.progress import Quiet
from gold.train.setup import Setup

# Five prompts, of which a step takes two: steps 1 to 3 are the first epoch and a part of the second.
RECIPE = gold.Recipe(
    steps=6,
    prompts_per_step=2,
    num_generations=2,
    lr=3e-3,
    warmup_steps=1,
    max_new_tokens=6,
    policy="initial",
)
PROMPTS = 5
CLOCKS = ("_s", "_per_s")


class Counting(HuggingFaceEngine):
    """The student itself; remembers every request, and the version of the weights that it was drawn with."""

    def __init__(self, student, fails_at: int | None = None) -> None:
        super().__init__(student, 4)
        self.drawn: list[tuple[object, int]] = []
        self.pushes = 0
        self.fails_at = fails_at

    def generate(self, requests):
        if self.fails_at is not None and len(self.drawn) >= self.fails_at:
            raise EngineError("the engine is gone")
        self.drawn += [(request, self.version) for request in requests]
        return super().generate(requests)

    def push(self, weights, version: int) -> None:
        self.pushes += 1
        super().push(weights, version)

    @property
    def training(self) -> list[tuple[object, int]]:
        return [(request, version) for request, version in self.drawn if request.seed[1] != 2**31]


def train(recipe: gold.Recipe = RECIPE, output: Path | None = None, teacher=None, engine=None, **given):
    student = tiny.tiny_student()
    engine = (engine or Counting)(student)
    saving = Saving(
        output,
        checkpoint_every=1,
        resume=given.pop("resume", False),
        completions=given.pop("completions", None),
    )
    run = gold.distill(
        student,
        teacher or tiny.tiny_teacher(),
        tiny.prompts(PROMPTS),
        recipe,
        engine=engine,
        saving=saving,
        evaluation=EvaluationPlan(max_new_tokens=6),
        **given,
    )
    return run, {n: w.clone() for n, w in student.lm.state_dict().items()}, engine


def untimed(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "kind" and not k.endswith(CLOCKS)} for record in records]


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_every_completion_is_drawn_once_by_the_first_weights() -> None:
    done, _, engine = train()
    assert len(engine.training) == PROMPTS * 2
    assert len({request for request, _ in engine.training}) == PROMPTS * 2
    assert {version for _, version in engine.training} == {0}
    assert [record["staleness"] for record in done.steps] == [0, 1, 2, 3, 4, 5]
    first, *later = done.steps
    assert first["policy_log_ratio_abs"] < 1e-5
    assert all(record["policy_log_ratio_abs"] > 1e-4 for record in later)
    assert "staleness" not in train(RECIPE.replace(policy="live", steps=1))[0].steps[0]


def test_no_more_is_drawn_than_the_steps_need() -> None:
    _, _, engine = train(RECIPE.replace(steps=1))
    assert len(engine.training) == 4


@pytest.mark.parametrize("objective", ["reverse_kl", pytest.param("alm", marks=pytest.mark.slow)])
def test_the_first_step_is_that_of_live_completions(objective: str) -> None:
    recipe = RECIPE.replace(steps=1, objectives=[gold.Term(objective)])
    done, weights, engine = train(recipe, heldout=tiny.heldout(2))
    live, others, there = train(recipe.replace(policy="live"), heldout=tiny.heldout(2))
    assert [request for request, _ in engine.training] == [request for request, _ in there.training]
    assert done.evaluations
    assert done.steps[0]["loss"] == live.steps[0]["loss"]
    assert done.steps[0]["grad_norm"] == live.steps[0]["grad_norm"]
    assert same(weights, others)
    assert untimed(done.evaluations) == untimed(live.evaluations)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"objectives": [gold.Term("token_pg")]}, {"num_generations": 1}])
def test_later_steps_are_others_than_live_ones(settings: dict) -> None:
    recipe = RECIPE.replace(steps=2, **settings)
    done, weights, _ = train(recipe)
    live, others, _ = train(recipe.replace(policy="live"))
    assert done.steps[0]["loss"] == pytest.approx(live.steps[0]["loss"], rel=1e-4)
    assert not same(weights, others)


def test_held_out_prompts_are_completed_by_the_student_as_it_is() -> None:
    _, _, engine = train(RECIPE.replace(steps=2), heldout=tiny.heldout(2))
    heldout = [version for request, version in engine.drawn if request.seed[1] == 2**31]
    assert sorted(set(heldout)) == [0, 2]


@pytest.mark.slow
def test_a_resumed_run_is_an_uninterrupted_one(tmp_path: Path) -> None:
    class Dies(CachedTeacher):
        def score(self, *given):
            if self.asked + self.found > 8:
                raise TeacherError("the teacher is gone")
            return super().score(*given)

    cached = CachedTeacher(LocalTeacher(tiny.tiny_teacher()), tmp_path / "scores")
    whole, weights, _ = train(output=tmp_path / "of-cache", teacher=cached)
    with pytest.raises(TeacherError, match="after step 3"):
        train(output=tmp_path / "dead", teacher=Dies(LocalTeacher(tiny.tiny_teacher()), tmp_path / "other"))
    again = CachedTeacher(LocalTeacher(tiny.tiny_teacher()), tmp_path / "other")
    resumed, others, engine = train(output=tmp_path / "dead", teacher=again, resume=True)
    assert not engine.training
    assert untimed(resumed.steps) == untimed(whole.steps)
    assert same(weights, others)


@pytest.mark.slow
def test_a_run_that_ends_while_completions_are_drawn_draws_the_rest(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("gold.train.initial.CHUNK", 3)
    whole, weights, _ = train()
    with pytest.raises(EngineError, match="the engine is gone"):
        train(output=tmp_path / "run", engine=lambda student: Counting(student, fails_at=6))
    with pytest.raises(ConfigError, match="already holds a run"):
        train(output=tmp_path / "run")
    resumed, others, engine = train(output=tmp_path / "run", resume=True)
    assert len(engine.training) == PROMPTS * 2 - 6
    assert untimed(resumed.steps) == untimed(whole.steps)
    assert same(weights, others)


@pytest.mark.slow
def test_runs_share_a_folder(tmp_path: Path, caplog) -> None:
    first, weights, _ = train(completions=tmp_path / "kept")
    second, others, engine = train(completions=tmp_path / "kept")
    assert not engine.training
    assert untimed(first.steps) == untimed(second.steps)
    assert same(weights, others)
    # One more completion for each prompt, and the others as they are.
    _, _, engine = train(RECIPE.replace(num_generations=3), completions=tmp_path / "kept")
    assert len(engine.training) == PROMPTS
    # Another seed, other lengths: other completions.
    _, _, engine = train(RECIPE.replace(seed=1), completions=tmp_path / "kept")
    assert len(engine.training) == PROMPTS * 2
    oldest = sorted((tmp_path / "kept").glob("*.npz"))[0]
    oldest.write_bytes(oldest.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        _, others, engine = train(completions=tmp_path / "kept")
    assert oldest.name in caplog.text
    assert len(engine.training) == PROMPTS * 2
    assert same(weights, others)


@pytest.mark.slow
def test_other_weights_do_not_find_them(tmp_path: Path) -> None:
    train(completions=tmp_path / "kept")
    student = tiny.tiny_student(seed=9)
    engine = Counting(student)
    gold.distill(
        student,
        tiny.tiny_teacher(),
        tiny.prompts(PROMPTS),
        RECIPE,
        engine=engine,
        saving=Saving(completions=tmp_path / "kept"),
    )
    assert len(engine.training) == PROMPTS * 2


@pytest.mark.slow
def test_a_teacher_with_a_cache_is_asked_once_for_each_text(tmp_path: Path) -> None:
    asked: Counter[tuple[str, bytes]] = Counter()

    class Asked(LocalTeacher):
        def score(self, prompts, tokenized_texts, stopped):
            asked.update((p.key, t.data) for p, t in zip(prompts, tokenized_texts, strict=True))
            return super().score(prompts, tokenized_texts, stopped)

    def cached() -> CachedTeacher:
        return CachedTeacher(Asked(tiny.tiny_teacher()), tmp_path / "scores")

    plan = {"heldout": ()}
    student = tiny.tiny_student()
    recipe = RECIPE.replace(steps=10)
    gold.distill(student, cached(), tiny.prompts(PROMPTS), recipe, **plan)
    assert len(asked) <= PROMPTS * 2
    assert set(asked.values()) == {1}
    gold.distill(
        tiny.tiny_student(),
        cached(),
        tiny.prompts(PROMPTS),
        recipe,
        saving=Saving(completions=tmp_path / "kept"),
    )
    assert set(asked.values()) == {1}
    # Now without the teacher, and without drawing.
    tiny.save_pair(tmp_path)
    alone = CachedTeacher(AbsentTeacher(tmp_path / "teacher"), tmp_path / "scores")
    student = tiny.tiny_student()
    engine = Counting(student)
    gold.distill(
        student,
        alone,
        tiny.prompts(PROMPTS),
        recipe,
        engine=engine,
        saving=Saving(completions=tmp_path / "kept"),
    )
    assert not engine.training
    assert set(asked.values()) == {1}
    with pytest.raises(TeacherError, match="lacks"):
        gold.distill(tiny.tiny_student(), alone, tiny.prompts(PROMPTS), recipe.replace(seed=3))


@pytest.mark.slow
def test_weights_are_those_of_policy_gradients_alone() -> None:
    teachers = Teachers({"teacher": tiny.tiny_teacher()})
    recipe = RECIPE.replace(objectives=[gold.Term("reverse_kl"), gold.Term("token_pg")])
    setup = Setup.of(tiny.tiny_student(), teachers, tiny.prompts(PROMPTS), recipe)
    assert [setup.weighs(term) for term in setup.terms] == [False, True]
    assert setup.importance_cap == 2.0
    kl, weights, _ = train(RECIPE)
    unweighted, others, _ = train(RECIPE.replace(importance_cap=None))
    assert same(weights, others)
    assert "policy_kl" in kl.steps[0]
    assert "policy_kl" not in unweighted.steps[0]
    assert unweighted.steps[-1]["staleness"] == 5

    pg = RECIPE.replace(objectives=[gold.Term("token_pg")], lr=3e-2)
    _, small, _ = train(pg.replace(importance_cap=1e-3))
    _, large, _ = train(pg)
    assert not same(small, large)


def test_a_prompt_has_the_streams_of_its_first_step_and_the_data_its_share() -> None:
    teachers = Teachers({"teacher": tiny.tiny_teacher()})
    student, prompts = tiny.tiny_student(), tiny.prompts(PROMPTS)
    recipe = RECIPE.replace(on_policy=0.5, steps=20)
    setup = Setup.of(student, teachers, prompts, recipe)
    for index, (step, place) in setup.first_places.items():
        assert recipe.student_writes(step, place)
        assert setup.order.batch(step, 2)[place] == index
        earlier = [
            (s, p)
            for s in range(step + 1)
            for p, i in enumerate(setup.order.batch(s, 2))
            if i == index and (s, p) < (step, place)
        ]
        assert not any(recipe.student_writes(*each) for each in earlier)
    texts = needed(student, prompts, recipe, setup.first_places)
    assert len(texts) == 2 * len(setup.first_places)
    done, _, _ = train(recipe.replace(steps=4, objectives=[gold.Term("reverse_kl"), gold.Term("sft")]))
    assert len(done.steps) == 4


def test_an_engine_gets_the_first_weights_before_it_draws_and_no_others_for_it(tmp_path: Path) -> None:
    student = tiny.tiny_student()
    ids, stop = student.vocabulary.encode("7").ids.tolist(), student.vocabulary.stop_ids[0]
    start = copy.deepcopy(student.lm.state_dict())
    engine = ScriptedEngine(lambda request: [*ids, stop])
    gold.distill(student, tiny.tiny_teacher(), tiny.prompts(PROMPTS), RECIPE, engine=engine)
    ((version, weights),) = engine.pushed
    assert version == 0
    assert all(torch.equal(weights[name], start[name]) for name in start)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"staleness": 1}, "rollout.staleness"),
        ({"on_policy": 0.0, "objectives": [gold.Term("sft")]}, "rollout.policy"),
        ({"objectives": [gold.Term("token_pg")], "importance_cap": None}, "rollout.importance_cap"),
    ],
)
def test_what_cannot_be_learned_from_them_is_refused(settings: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        train(RECIPE.replace(**settings))


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is no folder"):
        train(completions=tmp_path / "file")


@pytest.mark.slow
def test_completions_and_scores_can_be_made_ahead_of_a_run(tmp_path: Path, monkeypatch) -> None:
    tiny.save_pair(tmp_path)

    def config(output: str, **changes: object) -> Config:
        changes = {
            "rollout__policy": "initial",
            "rollout__completions": str(tmp_path / "kept"),
            "teacher__cache": {"path": str(tmp_path / "scores")},
            "train__steps": 4,
            "data__task__train": 6,
            **changes,
        }
        return Config.model_validate(tiny.run_settings(tmp_path, tmp_path / output, **changes))

    own = {"teacher__cache": {"path": str(tmp_path / "own")}, "rollout__completions": None}
    asked = run.train(config("asked", **own))
    with pytest.raises(ConfigError, match=r"rollout\.completions"):
        run.build_cache(config("run", rollout__completions=None), Quiet())
    reports: list[tuple[int, int, int]] = []
    missing = {"teacher__cache": {"path": str(tmp_path / "scores"), "missing": "stop"}}
    with pytest.raises(TeacherError, match="there is none"):
        run.train(config("early", **missing))
    (teacher,) = run.build_cache(config("run", **missing), Quiet(), lambda *told: reports.append(told))
    # Each of six prompts has two completions; equal ones are scored once.
    assert reports[-1][:2] == (12, 12)
    assert 0 < len(teacher.cache) <= 12
    run.build_cache(config("run"), Quiet(), lambda *told: reports.append(told))
    assert reports[-1] == (12, 12, 0)

    def fail(self, requests):
        assert all(request.seed[1] == 2**31 for request in requests)
        return draw(self, requests)

    draw = HuggingFaceEngine.generate
    monkeypatch.setattr(HuggingFaceEngine, "generate", fail)
    done = run.train(config("run", **missing))
    assert untimed(done.steps) == untimed(asked.steps)
    (only,) = {file.parent.name for file in tmp_path.rglob("*.npz")} - {"completions"}
    assert only == "kept"


@pytest.mark.slow
def test_completions_alone_can_be_made_ahead(tmp_path: Path) -> None:
    tiny.save_pair(tmp_path)
    settings = tiny.run_settings(
        tmp_path,
        tmp_path / "run",
        rollout__policy="initial",
        rollout__completions=str(tmp_path / "kept"),
        train__steps=1,
    )
    assert run.build_cache(Config.model_validate(settings), Quiet()) == []
    assert len(list((tmp_path / "kept").glob("*.npz"))) == 1
    settings["rollout"]["policy"] = "live"
    with pytest.raises(ConfigError, match=r"rollout\.completions"):
        Config.model_validate(settings)


@pytest.mark.slow
def test_two_processes_and_three_with_shards_learn_what_one_does(tmp_path: Path) -> None:
    tiny.save_pair(tmp_path)
    settings = tiny.run_settings(tmp_path, tmp_path / "run", train__steps=3, rollout__policy="initial")
    tiny.write_settings(tmp_path / "run.yaml", settings)
    found = []
    for count, more in ((1, []), (2, []), (3, ["train.sharding=fsdp"])):
        run = tmp_path / f"run {count}"
        processes = launch(
            tmp_path / str(count), "train", tmp_path / "run.yaml", f"output={run}", *more, count=count
        )
        assert [p.wait(300) for p in processes] == [0] * count, processes[0].err
        found.append(load_file(run / "student" / "model.safetensors"))
    for other in found[1:]:
        assert max(float((other[name] - found[0][name]).abs().max()) for name in other) < 1e-5
