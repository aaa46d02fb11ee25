"""Drawn conversations: what is sampled stays as it was, limits end them, and an environment's failures are counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from support.turns import Echo, Scripted

from gold.data import Prompt
from gold.demo.calculator import Calculator
from gold.demo.talk import lesson, talking_student
from gold.environments import Limits
from gold.environments.calling import Caller
from gold.errors import DataError
from gold.rollout.conversations import Conversations, TurnPrompts, as_turn
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling

STUDENT = talking_student()
TASK = Calculator()
PROMPTS = TASK.prompts("train", 6, 0)


def draw(environment, prompts, engine, limits=None, tokens=90, **sampling):
    limits = limits or Limits()
    caller = Caller(limits.timeout_s)
    found = Conversations(STUDENT, environment, limits, caller)
    seeds = [(0, n) for n in range(len(prompts))]
    drawn = found.draw(
        list(TurnPrompts(prompts, environment)), seeds, Sampling(tokens, **sampling), engine.generate
    )
    caller.close()
    return drawn


def test_a_right_conversation_calls_the_tool_and_uses_its_result() -> None:
    call, answer = lesson(PROMPTS[0])
    engine = Scripted(STUDENT, [call, answer])
    (found,) = draw(TASK, PROMPTS[:1], engine)
    assert (found.seen.ended, found.score) == ("done", 1.0)
    assert [m["role"] for m in found.seen.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.seen.messages[2]["content"] == answer
    first, second = found.rollouts
    # Token in, token out: the ids of the first turn are in the second prompt as they were sampled, its end included.
    assert second.prompt_ids[: len(first.prompt_ids) + first.ids.size] == (
        *first.prompt_ids,
        *first.ids.tolist(),
    )
    assert [r.turn.number for r in found.rollouts] == [0, 1]
    assert second.prompt.messages == tuple(found.seen.messages[:3])


@pytest.mark.parametrize("wrong", ["34", ""])
def test_the_tool_alone_or_the_answer_alone_is_not_enough(wrong) -> None:
    call, answer = lesson(PROMPTS[0])
    for texts in ([call, wrong], [answer]):
        (found,) = draw(TASK, PROMPTS[:1], Scripted(STUDENT, texts))
        assert (found.seen.ended, found.score) == ("done", 0.0)


def test_the_student_draws_the_same_conversations_however_they_are_batched() -> None:
    engine = HuggingFaceEngine(STUDENT)
    limits = Limits(max_turns=3)
    together = draw(Echo(2), PROMPTS, engine, limits, tokens=6)
    alone = [each for n, p in enumerate(PROMPTS) for each in one_of(p, n, engine, limits)]
    for mine, theirs in zip(together, alone, strict=True):
        assert [r.ids.tolist() for r in mine.rollouts] == [r.ids.tolist() for r in theirs.rollouts]
        for before, after in zip(mine.rollouts, mine.rollouts[1:], strict=False):
            whole = (*before.prompt_ids, *before.ids.tolist())
            assert after.prompt_ids[: len(whole)] == whole


def one_of(prompt, number, engine, limits):
    caller = Caller(5.0)
    found = Conversations(STUDENT, Echo(2), limits, caller)
    drawn = found.draw([as_turn(prompt)], [(0, number)], Sampling(6), engine.generate)
    caller.close()
    return drawn


class Endless:
    def reply(self, conversation):
        return [{"role": "user", "content": "go on"}]

    def score(self, conversation):
        return None


class Long(Endless):
    def reply(self, conversation):
        return [{"role": "user", "content": "x " * 500_000}]


class Failing(Endless):
    def reply(self, conversation):
        if conversation.prompt.key == PROMPTS[1].key:
            raise KeyError("lost\nit")

    def score(self, conversation):
        return 1.0


class Odd(Endless):
    def __init__(self, reply, score=0.5):
        self.given, self.scored = reply, score

    def reply(self, conversation):
        return self.given

    def score(self, conversation):
        return self.scored


class Counting(Odd):
    def __init__(self, count):
        super().__init__(None)
        self.count = count

    def reply(self, conversation):
        conversation.counts = None if self.count is None else Counter(seen=self.count)


def test_numbers_of_other_packages_are_scores_and_counts() -> None:
    for number in (np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        counting = Counting(number)
        counting.scored = number
        (found,) = draw(counting, PROMPTS[:1], Scripted(STUDENT, ["a"]))
        assert (found.seen.ended, found.score, found.seen.counts) == ("done", 0.5, {"seen": 0.5})


def test_limits_on_turns_and_tokens_end_a_conversation() -> None:
    (found,) = draw(Endless(), PROMPTS[:1], Scripted(STUDENT, ["a"] * 9), Limits(max_turns=3))
    assert (found.seen.ended, len(found.rollouts), found.score) == ("max_turns", 3, None)
    length = len(found.rollouts[1].prompt_ids)
    (found,) = draw(Endless(), PROMPTS[:1], Scripted(STUDENT, ["a"] * 9), Limits(max_tokens=length + 90))
    assert (found.seen.ended, len(found.rollouts)) == ("max_tokens", 2)
    (found,) = draw(Long(), PROMPTS[:1], Scripted(STUDENT, ["a"] * 9))  # a megabyte
    assert (found.seen.ended, len(found.rollouts)) == ("max_tokens", 1)


def test_a_turn_that_is_cut_short_is_the_last() -> None:
    (found,) = draw(Endless(), PROMPTS[:1], HuggingFaceEngine(STUDENT), tokens=2)
    assert (found.seen.ended, len(found.rollouts)) == ("cut", 1)


def test_an_environment_that_raises_ends_its_conversation_alone() -> None:
    drawn = draw(Failing(), PROMPTS[:3], Scripted(STUDENT, ["a"] * 3))
    assert [found.seen.ended for found in drawn] == ["done", "error", "done"]
    assert [found.score for found in drawn] == [1.0, None, 1.0]
    assert drawn[1].problem == f"prompt {PROMPTS[1].key}: KeyError: lost it"
    assert len(drawn[1].rollouts) == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (Odd("text"), "expected a list of messages"),
        (Odd([]), "at least one message"),
        (Odd([{"role": "robot", "content": "x"}]), "expected"),
        (Odd([{"content": "x"}]), "expected"),
        (Odd([{"role": "user"}]), "expected"),
        (Odd([{"role": "assistant", "content": "x"}]), "a turn of the assistant"),
        (Odd(None, "high"), "expected a number"),
        (Odd(None, float("nan")), "scored nan; expected a number"),
        (Odd(None, -float("inf")), "scored -inf; expected a number"),
        (Odd(None, 10**400), "expected a number"),
        (Counting("many"), "counts Counter({'seen': 'many'}); expected finite numbers"),
        (Counting(float("nan")), "expected finite numbers"),
        (Counting(None), "counts None"),
    ],
)
def test_what_an_environment_must_not_say_is_counted_with_a_reason(environment, message) -> None:
    (found,) = draw(environment, PROMPTS[:1], Scripted(STUDENT, ["a"]))
    assert found.seen.ended == "error"
    assert message in found.problem
    assert "\n" not in found.problem


def test_instructions_stand_in_the_system_message() -> None:
    asked = Prompt("k", messages=({"role": "user", "content": "q"},), teacher_context="hint")
    with_system = replace(asked, messages=({"role": "system", "content": "s"}, *asked.messages))
    assert as_turn(asked, (), "do").messages[0] == {"role": "system", "content": "do"}
    assert as_turn(with_system, (), "do").messages[0] == {"role": "system", "content": "s\n\ndo"}
    assert as_turn(asked, (), "do").for_teacher.messages[1]["content"] == "hint\n\nq"


def test_a_plain_text_is_refused() -> None:
    with pytest.raises(DataError, match="prompt k: an environment needs conversations"):
        TurnPrompts([*PROMPTS, Prompt("k", text="q")], TASK)


def test_scripted_ids_are_of_the_students_tokenizer() -> None:
    ids = Scripted(STUDENT, ["12"]).generate([type("R", (), {"stop_ids": (2,)})])[0].ids
    assert np.array_equal(ids[:-1], STUDENT.vocabulary.encode("12").ids)
