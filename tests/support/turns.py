"""Environments, an engine that writes given texts, and thinking, for conversations of the pair in
``gold.demo.talk``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gold.demo.calculator import Calculator
from gold.demo.models import learn_answers, tiny_model
from gold.demo.talk import STUDENT_TEMPLATE, TEACHER_TEMPLATE, lessons, pair_tokenizer, with_template
from gold.environments.protocol import Conversation
from gold.models.language_model import LanguageModel
from gold.rollout.engine import Generation, Request
from gold.turns import TurnMessage, TurnPrompt

_THOUGHT = (
    "{% if m.reasoning_content is defined and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}"
)
THINKING = STUDENT_TEMPLATE.replace("{{ m.content }}", _THOUGHT + "{{ m.content }}")
"""The student's template, with thinking."""
OPENED = THINKING.replace("<bos>assistant\n{% endif %}", "<bos>assistant\n<think>\n{% endif %}")
"""The same, with the opening marker at the end of a prompt."""
OTHER = TEACHER_TEMPLATE.replace(
    "A:{{ m.content }}", "A:" + _THOUGHT.replace("think>", "thinking>") + "{{ m.content }}"
)
"""The teacher's template, with thinking between other markers."""


class Echo:
    """An environment that answers every turn with its length, for ``turns`` turns; the score is the share of turns that
    are not empty."""

    def __init__(self, turns: int = 2) -> None:
        self.turns = turns

    def reply(self, conversation: Conversation) -> list[TurnMessage] | None:
        if len(conversation.turns) == self.turns:
            return None
        return [{"role": "user", "content": f"{len(conversation.last.text)} characters"}]

    def score(self, conversation: Conversation) -> float:
        return sum(bool(turn.text.strip()) for turn in conversation.turns) / len(conversation.turns)


class Scripted:
    """A rollout engine that writes given texts in order, as the student's tokenizer would, each ended by a stop id."""

    def __init__(self, model: LanguageModel, texts: Sequence[str]) -> None:
        self.model, self.texts = model, list(texts)
        self.requests: list[Request] = []
        self.version, self.own_weights = 0, False

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        found = []
        for request in requests:
            self.requests.append(request)
            ids = self.model.vocabulary.encode(self.texts.pop(0)).ids
            ids = np.append(ids, request.stop_ids[0]).astype(np.int32)
            found.append(Generation(ids, np.full(ids.size, -1.0, np.float32), True, self.version))
        return found

    def push(self, weights: object, version: int) -> None:
        self.version = version

    def close(self) -> None:
        pass


def thinking_student(steps: int = 100) -> LanguageModel:
    """It thinks between the markers of ``THINKING``, for up to a dozen words, before it calls the calculator and before
    it answers."""
    turns = [
        turn
        for question in Calculator().prompts("train", 60, 3)
        for turn in _with_thoughts(lessons(question))
    ]
    texts = [turn.completion or "" for turn in turns]
    model = tiny_model(pair_tokenizer(texts), "student", layers=1, width=128, context=512, seed=1)
    student = with_template(model, THINKING)
    learn_answers(student, turns, steps=steps, batch=16)
    return student


def _with_thoughts(turns: Sequence[TurnPrompt]) -> list[TurnPrompt]:
    """Turns of one question, with as much thinking as its numbers say."""
    found: list[TurnPrompt] = []
    for turn, number in zip(turns, turns[0].reference, strict=True):
        thought = "so" + " hm" * (number % 12)
        messages = [dict(message) for message in turn.messages or ()]
        if found:
            messages[1]["reasoning_content"] = found[0].completion.split("\n")[1]
        completion = f"<think>\n{thought}\n</think>\n\n{turn.completion}"
        found.append(replace(turn, messages=tuple(messages), completion=completion))
    return found
