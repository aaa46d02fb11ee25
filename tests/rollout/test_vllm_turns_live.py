"""A real vLLM server (`make vllm`) and turns: thinking that is ended by a budget, conversations with a tool, and a run
that is killed and resumed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_models as tiny
from support.live_vllm import LIVE, PYTHON
from support.processes import Command, die_at, lines
from support.turns import OTHER, thinking_student

from gold.align.model_inputs import student_states
from gold.demo.calculator import Calculator
from gold.demo.talk import talking_teacher
from gold.environments import Limits
from gold.errors import EngineError
from gold.models.language_model import LanguageModel
from gold.models.load import save_model
from gold.rollout.conversations import TurnPrompts
from gold.rollout.engine import Generation, Request, sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Rollout, Sampling
from gold.rollout.vllm_process import ColocatedEngine, ServerCommand
from gold.train.loop import Run, Saving, distill
from gold.train.recipe import Recipe

pytestmark = LIVE
TASK = Calculator()
QUESTIONS = TASK.prompts("train", 8, 0)
CONTEXT = 384
# Nothing but the likeliest token is in the nucleus: both engines then write the same texts.
SURE = 1e-6
RECIPE = Recipe(
    steps=3,
    prompts_per_step=2,
    num_generations=2,
    lr=1e-3,
    warmup_steps=1,
    max_new_tokens=60,
    thinking_budget=6,
)


@pytest.fixture(scope="module")
def start() -> LanguageModel:
    return thinking_student()


@pytest.fixture
def student(start: LanguageModel) -> LanguageModel:
    """One that a test may train."""
    return LanguageModel(start.name, copy.deepcopy(start.lm), start.tokenizer, start.vocabulary)


@pytest.fixture(scope="module")
def engine(start: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ColocatedEngine]:
    folder = tmp_path_factory.mktemp("vllm")
    save_model(start, folder / "student")
    command = ServerCommand(
        str(folder / "student"), str(PYTHON), "float32", context=CONTEXT, arguments=["--enforce-eager"]
    )
    engine = ColocatedEngine(command, log=folder / "vllm.log")
    yield engine
    engine.close()


def drawn(engine: Any, model: LanguageModel, sampling: Sampling) -> list[Rollout]:
    """First turns of all questions."""
    prompts = list(TurnPrompts(QUESTIONS, TASK))
    return sample(engine, model, prompts, sampling, seeds=[(7, n) for n in range(len(prompts))])


def test_budgets_end_thinking_where_they_end_it_in_the_students_own_draws(
    engine: ColocatedEngine, student: LanguageModel
) -> None:
    engine.push(student.lm.state_dict(), 0)
    kinds = set()
    for tokens, most in ((1, 60), (4, 60), (4, 20), (9, 60), (9, 24), (30, 60), (30, 44)):
        sampling = Sampling(most, top_p=SURE, thinking_budget=tokens)
        here, there = (drawn(each, student, sampling) for each in (HuggingFaceEngine(student), engine))
        for mine, theirs in zip(here, there, strict=True):
            assert mine.ids.tolist() == theirs.ids.tolist()
            assert mine.tokenized.data == theirs.tokenized.data
            assert (mine.segments, mine.stopped) == (theirs.segments, theirs.stopped)
            kinds.add((theirs.thinking_cut, theirs.stopped))
    assert len(kinds) == 4


class Failing:
    """An engine that fails at the draws of a step."""

    own_weights = True

    def __init__(self, engine: ColocatedEngine, step: int) -> None:
        self.engine, self.step = engine, step

    version = property(lambda self: self.engine.version)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        if self.version == self.step:
            raise EngineError("the server is gone")
        return self.engine.generate(requests)

    def push(self, weights: Any, version: int) -> None:
        self.engine.push(weights, version)

    def close(self) -> None:
        pass


def test_conversations_with_a_tool_are_learned_from_and_resumed(
    engine: ColocatedEngine,
    start: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No given id is learned from; the resumed run repeats the other one, at temperature 1."""
    seen: list[Rollout] = []

    def noted(model: LanguageModel, rollouts: Sequence[Rollout], **more: Any) -> Any:
        seen.extend(rollouts)
        return student_states(model, rollouts, **more)

    monkeypatch.setattr("gold.train.step.student_states", noted)

    def run(used: Any, output: Path, resume: bool = False) -> Run:
        model = LanguageModel(start.name, copy.deepcopy(start.lm), start.tokenizer, start.vocabulary)
        return distill(
            model,
            talking_teacher(template=OTHER),
            QUESTIONS,
            RECIPE,
            environment=TASK,
            limits=Limits(max_turns=3),
            engine=used,
            saving=Saving(output, resume=resume, checkpoint_every=1),
        )

    whole = run(engine, tmp_path / "whole")
    assert all(row.sampled_mask.all() for row in seen)
    for record in whole.steps:
        assert record["thinking_cut_share"] > 0
        assert record["policy_log_ratio_abs"] < 1e-5
        assert record["turns"] > 1
        assert record["tool_calls"] > 0
    with pytest.raises(EngineError, match="after step 2: the server is gone; its checkpoint is kept"):
        run(Failing(engine, 2), tmp_path / "half")
    half = run(engine, tmp_path / "half", resume=True)
    for one, other in zip(whole.steps, half.steps, strict=True):
        for name in ("turns", "tool_calls", "length_tokens", "thinking_cut_share", "stop_rate"):
            assert one[name] == other[name], name
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_run_of_the_command_line_is_killed_and_resumed(start: LanguageModel, tmp_path: Path) -> None:
    """It ends where the run with the student's own draws ends."""
    save_model(start, tmp_path / "student")
    save_model(talking_teacher(template=OTHER), tmp_path / "teacher")
    vllm = {"python": str(PYTHON), "context": CONTEXT, "arguments": ["--enforce-eager"]}
    run = tmp_path / "run"
    settings = tiny.run_settings(
        tmp_path,
        run,
        student__dtype="float32",
        data={"task": {"name": "calculator", "train": 8, "heldout": 4}},
        environment={"max_turns": 3},
        rollout={
            "max_new_tokens": 60,
            "num_generations": 2,
            "thinking_budget": 6,
            "top_p": SURE,
            "engine": {"vllm": vllm},
        },
        train={"steps": 3, "prompts_per_step": 2, "checkpoint_every": 1},
        evaluate={"every": 3, "prompts": 4, "samples": 1},
    )
    file = tiny.write_settings(tmp_path / "run.yaml", settings)
    killed = Command(
        tmp_path / "killed", "train", file, before=partial(die_at, "gold.train.loop:train_step", 3)
    )
    assert killed.wait(600) == -9, killed.err
    resumed = Command(tmp_path / "resumed", "train", file, "--resume")
    assert resumed.wait(600) == 0, resumed.err
    other = Command(tmp_path / "other", "train", file, "rollout.engine=hf", f"output={tmp_path / 'hf'}")
    assert other.wait(600) == 0, other.err
    mine, theirs = (load_file(each / "student" / "model.safetensors") for each in (run, tmp_path / "hf"))
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], atol=2e-5, rtol=1e-4)
    told = [
        [record for record in lines(each, "metrics.jsonl") if record["kind"] == "train"]
        for each in (run, tmp_path / "hf")
    ]
    for one, another in zip(*told, strict=True):
        for name in ("turns", "tool_calls", "thinking_cut_share", "stop_rate", "length_tokens"):
            assert one.get(name) == another.get(name), (name, one["step"])
