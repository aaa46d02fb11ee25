"""Environments, and an engine that writes given texts, for conversations of the pair in ``gold.demo.talk``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gold.environments.protocol import Conversation
from gold.models.language_model import LanguageModel
from gold.rollout.engine import Generation, Request
from gold.turns import TurnMessage


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
