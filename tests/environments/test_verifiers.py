"""An environment of the package verifiers: the same turns, stop conditions and scores; of its double where it is not
installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from support import verifiers_double
from support.turns import Scripted

from gold.demo.calculator import Calculator
from gold.demo.talk import lesson, talking_student
from gold.environments import Limits
from gold.environments.calling import Caller
from gold.environments.of_verifiers import VerifiersEnvironment
from gold.errors import ConfigError, DataError
from gold.rollout.conversations import Conversations, DrawnConversation, TurnPrompts
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.tasks import load_task

STUDENT = talking_student()
PROMPTS = Calculator().prompts("train", 12, 0)
ROWS = [
    {"prompt": list(p.messages or ()), "answer": str(p.reference[0] * p.reference[1]), "info": {"n": n}}
    for n, p in enumerate(PROMPTS)
]
CALLED: list[tuple[int, int]] = []


def multiply(a: int, b: int) -> str:
    """Multiplies.

    Args:
        a: A number.
        b: A number.
    """
    CALLED.append((a, b))
    return str(a * b)


def exact(completion: list[Any], answer: str) -> float:
    assert completion[0].tool_calls or len(completion) == 1
    return float(completion[-1].content == answer)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    if importlib.util.find_spec("verifiers") is None:
        verifiers_double.install(monkeypatch)
        return verifiers_double.ToolEnv([multiply], ROWS, verifiers_double.Rubric([exact]))
    import verifiers
    from datasets import Dataset

    rubric = verifiers.Rubric(funcs=[exact])
    return verifiers.ToolEnv(tools=[multiply], dataset=Dataset.from_list(ROWS), rubric=rubric)


def drawn(adapted: VerifiersEnvironment, prompts: list[Any], *texts: str) -> DrawnConversation:
    limits = Limits(max_turns=3)
    caller = Caller(5.0)
    conversations = Conversations(STUDENT, adapted, limits, caller)
    engine = Scripted(STUDENT, list(texts))
    (found,) = conversations.draw(
        list(TurnPrompts(prompts, adapted)), [(0, 0)], Sampling(90), engine.generate
    )
    caller.close()
    return found


def test_turns_tools_and_scores_are_those_of_the_environment(environment: Any) -> None:
    adapted = VerifiersEnvironment(environment)
    assert [tool["function"]["name"] for tool in adapted.tools] == ["multiply"]
    prompt = adapted.prompts("train", 3, 0)[0]
    source = next(p for p in PROMPTS if p.messages == prompt.messages)
    call, answer = lesson(source)
    CALLED.clear()
    found = drawn(adapted, [prompt], call, answer)
    assert (found.problem, found.seen.ended, found.score) == ("", "done", 1.0)
    assert [tuple(source.reference)] == CALLED
    assert [m["role"] for m in found.seen.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.seen.messages[2]["content"] == answer
    found = drawn(adapted, [prompt], call, "1")
    assert (found.seen.ended, found.score) == ("done", 0.0)
    found = drawn(adapted, [prompt], call, call, call)
    assert (found.seen.ended, found.score) == ("max_turns", 0.0)
    assert len(CALLED) == 5


def test_a_turn_that_is_cut_and_one_without_a_call(environment: Any) -> None:
    adapted = VerifiersEnvironment(environment)
    prompt = adapted.prompts("train", 1, 0)[0]
    assert drawn(adapted, [prompt], "7").seen.ended == "done"
    caller = Caller(5.0)
    conversations = Conversations(STUDENT, adapted, Limits(max_turns=3), caller)
    turns = list(TurnPrompts([prompt], adapted))
    (found,) = conversations.draw(turns, [(0, 0)], Sampling(3), HuggingFaceEngine(STUDENT).generate)
    caller.close()
    assert (found.seen.ended, found.score, found.problem) == ("cut", 0.0, "")


def test_prompts_of_the_two_splits_are_apart(environment: Any) -> None:
    adapted = VerifiersEnvironment(environment)
    heldout = {p.key for p in adapted.prompts("heldout", 1, 0)}
    train = [p.key for p in adapted.prompts("train", 8, 0)]
    assert len(set(train)) == 8
    assert not heldout & set(train)
    assert adapted.prompts("train", 3, 0) == adapted.prompts("train", 8, 0)[:3]
    with pytest.raises(DataError, match="train prompts, 99 were asked for"):
        adapted.prompts("train", 99, 0)
    with pytest.raises(ConfigError, match="unknown split 'test'"):
        adapted.prompts("test", 1, 0)


def test_what_is_not_there_or_has_no_turns_is_one_line(environment: Any) -> None:
    with pytest.raises(ConfigError, match=r"'no_such_one' cannot be loaded: .*no_such_one"):
        load_task("verifiers", environment="no_such_one")
    with pytest.raises(ConfigError, match="object has no env_response: expected a MultiTurnEnv"):
        VerifiersEnvironment(object())


@pytest.mark.skipif(importlib.util.find_spec("verifiers") is not None, reason="it is installed")
def test_without_the_package_it_is_named() -> None:
    with pytest.raises(ConfigError, match="pip install 'verifiers"):
        load_task("verifiers", environment="wordle")
