"""Runs with an environment: rewards of conversations, returns of later turns, refusals, and resumptions."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import tiny_models as tiny
from support.processes import Command, launch, lines
from support.server import ModelServer, served
from support.turns import Echo, Scripted
from support.vllm_server import VLLMServer, engine_on

from gold.demo.calculator import Calculator
from gold.demo.models import learn_answers
from gold.demo.talk import OTHER_TEMPLATE, lesson, talking_student, talking_teacher
from gold.environments import Limits, ToolEnvironment
from gold.environments.calling import Caller
from gold.environments.text import ToolsAsText
from gold.errors import ConfigError, DataError
from gold.evaluate import EvaluationPlan, evaluate
from gold.models.load import save_model
from gold.rollout.conversations import Conversations, TurnPrompts
from gold.rollout.types import Sampling, Turn
from gold.teachers import CachedTeacher, LocalTeacher
from gold.train.conversing import advantages_of, as_prompts, conversed, later_returns
from gold.train.loop import Saving, distill
from gold.train.recipe import Recipe, Term
from gold.turns import read_turn

TASK = Calculator()
PROMPTS = TASK.prompts("train", 8, 0)
SMALL = Recipe(steps=2, prompts_per_step=2, num_generations=2, max_new_tokens=8, lr=1e-3)


@given(st.lists(st.none() | st.floats(0, 1), min_size=3, max_size=12), st.sampled_from([1, 2, 3]))
@settings(max_examples=50)
def test_advantages_are_of_the_scored_conversations_of_a_group(scores, group) -> None:
    scores = scores[: len(scores) // group * group]
    found = advantages_of(scores, group)
    for first in range(0, len(scores), group):
        own = [x for x in scores[first : first + group] if x is not None]
        for n in range(first, first + group):
            deviation = np.std(own) if own else 0.0
            if scores[n] is None or deviation <= 1e-8:
                assert found[n] == 0.0
            else:
                assert found[n] == pytest.approx((scores[n] - np.mean(own)) / deviation)


def drawn(texts, prompts=PROMPTS[:1]):
    student, caller = talking_student(), Caller(5.0)
    found = Conversations(student, TASK, Limits(), caller)
    engine = Scripted(student, texts)
    seeds = [(0, n) for n in range(len(prompts))]
    return found.draw(list(TurnPrompts(prompts, TASK)), seeds, Sampling(90), engine.generate)


def test_a_score_is_the_reward_of_the_last_turn_and_the_advantage_of_all() -> None:
    call, answer = lesson(PROMPTS[0])
    found = conversed(drawn([call, "wrong", answer], [PROMPTS[0], PROMPTS[0]]), 2)
    # The first round draws both first turns: a call, and an answer without one; the second the right answer.
    assert [r.turn.conversation for r in found.rollouts] == [0, 0, 1]
    assert [r.reward for r in found.rollouts] == [None, 1.0, 0.0]
    assert [r.advantage for r in found.rollouts] == [1.0, 1.0, -1.0]
    assert found.sums["turns"] == 3
    assert found.sums["count.tool_calls"] == 1
    assert found.sums["ended.done"] == 2


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 4)), max_size=9),
    st.integers(1, 4),
)
@settings(max_examples=30, deadline=None)
def test_later_returns_are_sums_over_what_follows(places, size) -> None:
    base = drawn(["1"])[0].rollouts[0]
    places = list(dict.fromkeys(places))
    rollouts = [
        replace(base, turn=Turn(number, read_turn(b""), talk), prompt_ids=(0,) * length)
        for talk, number, length in places
    ]
    values = [float(2**n) for n in range(len(rollouts))]
    parts = [slice(n, n + size) for n in range(0, len(rollouts), size)]
    found = [
        x for each in later_returns([rollouts[p] for p in parts], [values[p] for p in parts]) for x in each
    ]
    for (talk, *at), value in zip(places, found, strict=True):
        later = [v for (t, *p), v in zip(places, values, strict=True) if t == talk and p > at]
        assert value == sum(later)


@pytest.mark.slow
def test_a_run_of_conversations_resumes_bit_for_bit(tmp_path) -> None:
    recipe = SMALL.replace(
        steps=4, objectives=(Term("reverse_kl"), Term("reward"), Term("token_pg", horizon="conversation"))
    )

    def run(output, resume=False):
        return distill(
            talking_student(),
            talking_teacher(template=OTHER_TEMPLATE),
            PROMPTS,
            recipe,
            environment=Echo(3),
            heldout=TASK.prompts("heldout", 3, 0),
            evaluation=EvaluationPlan(max_new_tokens=8, samples=2),
            saving=Saving(output, resume=resume, evaluate_every=2, checkpoint_every=2, keep_last=9),
        )

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "student")
    newest = max((tmp_path / "half" / "checkpoints").iterdir(), key=lambda path: path.name)
    shutil.rmtree(newest)
    half = run(tmp_path / "half", resume=True)
    assert [known(record) for record in half.steps] == [known(record) for record in whole.steps]
    assert whole.steps[-1]["turns"] >= 1
    lines = (tmp_path / "whole" / "samples.jsonl").read_text("utf-8").splitlines()
    assert {"prompt", "completion", "turn", "chunks"} <= json.loads(lines[0]).keys()


def known(record):
    """The metrics of a step that do not depend on the clock."""
    return {name: value for name, value in record.items() if name != "kind" and not name.endswith("_s")}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("data/openings.jsonl", "got the text 'data/openings.jsonl'; gold.load_prompts reads a file"),
        (Path("a.jsonl"), "got the text 'a.jsonl'"),
        ([1, 2], "got 1"),
        (["a", {"prompt": "b"}], "all of one kind, got {'prompt': 'b'}"),
        ([{"prompt": "b"}, "a"], "all of one kind, got {'prompt': 'b'}"),
    ],
)
def test_what_is_no_prompt_is_one_line(given, told) -> None:
    with pytest.raises(DataError, match=f"^prompts: .*{re.escape(told)}"):
        as_prompts(given, None)


def test_prompts_of_a_generator_are_those_of_a_list() -> None:
    assert as_prompts((text for text in "ab"), None) == as_prompts(["a", "b"], None)


def test_a_model_is_not_its_own_teacher() -> None:
    model = talking_student()
    with pytest.raises(ConfigError, match="student and teacher are one model: load it twice"):
        distill(model, model, PROMPTS, SMALL)


def test_a_folder_may_be_a_text() -> None:
    saving = Saving("runs/a", completions="b")  # type: ignore[arg-type]
    assert (saving.output, saving.kept_in) == (Path("runs/a"), Path("b"))
    assert Saving("runs/a").kept_in == Path("runs/a/completions")  # type: ignore[arg-type]


class Counts(Echo):
    def score(self, conversation):
        conversation.counts.update(loss=1, kind=2, turns=3, bad_steps=4, mine=5)


def test_counts_named_as_metrics_are_beside_them(tmp_path) -> None:
    recipe, saving = SMALL.replace(steps=1), Saving(tmp_path / "run")
    run = distill(talking_student(), talking_teacher(), PROMPTS, recipe, environment=Counts(), saving=saving)
    each = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (step,) = [record for record in each if "mine" in record]
    assert (step["kind"], step["turns"], step["bad_steps"]) == ("train", 1.0, 0)
    assert step["loss"] == run.steps[0]["loss"] != 4.0
    counted = [step[f"environment.{name}"] for name in ("loss", "kind", "turns", "bad_steps")]
    assert [*counted, step["mine"]] == [4.0, 8.0, 12.0, 16.0, 20.0]


class Failing(Echo):
    def score(self, conversation):
        raise KeyError("gone")


def test_an_evaluation_warns_of_conversations_that_fail(caplog) -> None:
    student = talking_student()
    conversations = Conversations(student, Failing(), Limits(), Caller(5.0))
    found = evaluate(
        student, None, PROMPTS[:2], plan=EvaluationPlan(max_new_tokens=8), conversations=conversations
    )
    assert "score" not in found.measures
    assert "2 of 2 conversations of an evaluation were ended by an error of the environment" in caplog.text
    assert f"such as prompt {PROMPTS[0].key}: KeyError: gone" in caplog.text


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None, "1"])
def test_a_verifier_that_scores_no_number_is_one_line(score) -> None:
    verifier, asked = type("Odd", (), {"score": lambda *given: score}), PROMPTS[:4]
    model = talking_student()
    stopping = Scripted(model, ["a"] * 99)
    for run in (
        lambda: distill(model, talking_teacher(), asked, SMALL, verifier=verifier(), engine=stopping),
        lambda: evaluate(model, None, asked, verifier=verifier(), engine=stopping),
    ):
        with pytest.raises(
            DataError, match=r"prompt .*: the verifier scored .*; expected a number from 0 to 1$"
        ):
            run()


def test_bad_combinations_are_one_line() -> None:
    student, teacher = talking_student(), talking_teacher()
    with pytest.raises(ConfigError, match=r"rollout\.staleness: turns of a conversation"):
        distill(student, teacher, PROMPTS, SMALL.replace(staleness=1), environment=TASK)
    student.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="does not write tools or calls; give it another"):
        distill(student, teacher, PROMPTS, SMALL, environment=TASK)
    assert ToolsAsText(ToolEnvironment([])).instructions


@pytest.mark.slow
def test_a_cache_keeps_the_scores_of_turns_by_their_conversation(tmp_path) -> None:
    def run() -> tuple[list[dict[str, object]], CachedTeacher]:
        teacher = CachedTeacher(LocalTeacher(talking_teacher()), tmp_path / "cache")
        found = distill(
            talking_student(), teacher, PROMPTS, SMALL, environment=Echo(3), limits=Limits(max_turns=3)
        )
        teacher.cache.close()
        return [known(record) for record in found.steps], teacher

    (first, asking), (second, knowing) = run(), run()
    assert asking.asked > 0
    assert (knowing.asked, knowing.found > 0) == (0, True)
    assert first == second


@pytest.mark.slow
def test_a_served_teacher_scores_turns_as_one_in_this_process_does(tmp_path) -> None:
    teacher = talking_teacher()
    save_model(teacher, tmp_path / "teacher")
    recipe = SMALL.replace(objectives=(Term("alm"),), steps=1)
    with ModelServer(teacher) as server:
        remote = served(tmp_path / "teacher", server.url)
        runs = [
            distill(talking_student(), each, PROMPTS, recipe, environment=Echo(3), limits=Limits(max_turns=3))
            for each in (remote, LocalTeacher(teacher))
        ]
    mine, theirs = (run.steps[0] for run in runs)
    assert mine["alm"] == pytest.approx(theirs["alm"], rel=1e-4)
    assert mine["turns"] == theirs["turns"]


def brief_student():
    """It has learned to end its turns after a word or two."""
    student = talking_student()
    learn_answers(
        student, [replace(p, completion=text) for p in PROMPTS for text in ("ok", "yes no")], steps=110
    )
    return student


@pytest.mark.slow
def test_two_processes_with_shards_hold_the_conversations_of_one(tmp_path) -> None:
    """Conversations of unlike numbers of turns, so that one process waits for the other's draws."""
    for model in (brief_student(), talking_teacher(template=OTHER_TEMPLATE)):
        save_model(model, tmp_path / model.name)
    (tmp_path / "tries.py").write_text(
        "class Tries:\n"
        "    def reply(self, conversation):\n"
        "        if len(conversation.turns) > len(conversation.messages[0]['content']) % 3:\n"
        "            return None\n"
        "        return [{'role': 'user', 'content': 'more'}]\n\n"
        "    def score(self, conversation):\n"
        "        return len(conversation.turns) / 3\n"
    )
    lines_of_data = [
        {"prompt": p.messages[0]["content"] + "?" * n, "id": p.key} for n, p in enumerate(PROMPTS)
    ]
    for line in lines_of_data:
        line["messages"] = [{"role": "user", "content": line.pop("prompt")}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of_data))
    changes = {"rollout__max_new_tokens": 8, "train__steps": 3, "train__prompts_per_step": 3}
    settings_of_run = tiny.run_settings(
        tmp_path,
        tmp_path / "unused",
        data={"prompts": str(tmp_path / "prompts.jsonl"), "heldout": str(tmp_path / "prompts.jsonl")},
        environment={"name": f"{tmp_path / 'tries.py'}:Tries", "max_turns": 3},
        **changes,
    )
    tiny.write_settings(tmp_path / "run.yaml", settings_of_run)
    one, two = tmp_path / "one", tmp_path / "two"
    command = Command(tmp_path / "1", "train", tmp_path / "run.yaml", f"output={one}")
    assert command.wait(300) == 0, command.err
    processes = launch(tmp_path / "2", "train", tmp_path / "run.yaml", f"output={two}", "train.sharding=fsdp")
    assert [p.wait(300) for p in processes] == [0, 0], processes[0].err
    mine, theirs = (load_file(run / "student" / "model.safetensors") for run in (two, one))
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5
    told = [[r["turns"] for r in lines(run, "metrics.jsonl") if r["kind"] == "train"] for run in (one, two)]
    assert told[0] == pytest.approx(told[1])
    assert max(told[0]) > 1


@pytest.mark.slow
def test_turns_are_drawn_from_a_server() -> None:
    student = brief_student()
    with VLLMServer(student, context=256) as server:
        engine = engine_on(server)
        run = distill(
            student,
            talking_teacher(),
            PROMPTS,
            SMALL,
            environment=Echo(3),
            limits=Limits(max_turns=3),
            engine=engine,
        )
        engine.close()
        asked = [body for path, body in server.calls if path == "/inference/v1/generate"]
        assert not server.violations
    assert run.steps[-1]["turns"] > 1
    assert run.steps[-1]["policy_log_ratio_abs"] < 1e-3
    assert len({len(body["token_ids"]) for body in asked}) > 2
