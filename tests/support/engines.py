"""A rollout engine without a model: it answers with the texts that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from gold.rollout.engine import Generation, Request


class ScriptedEngine:
    """Answers each request with ``script(request)``, ids that end with a stop id or are cut off, and notes what it is
    asked, pushed and told to close."""

    def __init__(self, script: Callable[[Request], Sequence[int]]) -> None:
        self.script, self.version, self.closed = script, -1, False
        self.own_weights = False
        self.requests: list[Request] = []
        self.pushed: list[tuple[int, dict[str, Tensor]]] = []

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """See ``RolloutEngine.generate``."""
        self.requests += requests
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Generation:
        ids = np.array(self.script(request)[: request.sampling.max_new_tokens], np.int32)
        stopped = bool(ids.size and ids[-1] in request.stop_ids)
        return Generation(ids, np.full(ids.size, -1.0, np.float32), stopped, self.version)

    def push(self, weights: Mapping[str, Tensor], version: int) -> None:
        """See ``RolloutEngine.push``."""
        self.pushed.append((version, {name: weight.clone() for name, weight in weights.items()}))
        self.version = version

    def close(self) -> None:
        """See ``RolloutEngine.close``."""
        self.closed = True
