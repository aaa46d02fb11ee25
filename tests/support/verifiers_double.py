"""A double of what gold uses of the package `verifiers`, and a tool environment of it."""

from __future__ import annotations

import json
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest


class ToolEnv:
    """As `verifiers.ToolEnv`: calls functions, ends with a turn without calls, and scores by a rubric."""

    def __init__(self, tools: list[Any], dataset: list[dict[str, Any]], rubric: Any) -> None:
        self.functions = {tool.__name__: tool for tool in tools}
        self.tool_defs = [
            SimpleNamespace(name=name, description="", parameters={"type": "object", "properties": {}})
            for name in self.functions
        ]
        self.dataset, self.rubric, self.cleaned = dataset, rubric, 0

    def get_dataset(self) -> list[dict[str, Any]]:
        return [{"example_id": n, **row} for n, row in enumerate(self.dataset)]

    async def init_state(self, row: dict[str, Any], client: Any, model: str) -> dict[str, Any]:
        assert not isinstance(row.get("task"), str)  # as the package does
        return {**row, "client": client, "trajectory": [], "reward": None, "final_env_response": None}

    async def setup_state(self, state: dict[str, Any]) -> None:
        state["set_up"] = True

    async def is_completed(self, state: dict[str, Any]) -> bool:
        return not state["trajectory"][-1]["completion"][-1].tool_calls

    async def env_response(self, messages: list[Any], state: dict[str, Any]) -> list[Any]:
        assert state["set_up"]
        return [
            SimpleNamespace(
                role="tool",
                tool_call_id=call.id,
                content=str(self.functions[call.name](**json.loads(call.arguments))),
            )
            for call in messages[-1].tool_calls
        ]

    async def render_completion(self, state: dict[str, Any]) -> None:
        last = state["trajectory"][-1]
        state["completion"] = [*last["prompt"], *last["completion"]][len(state["prompt"]) :]

    async def cleanup(self, state: dict[str, Any]) -> None:
        self.cleaned += 1


class Rubric:
    """As `verifiers.Rubric` with one function of a completion and an answer."""

    def __init__(self, funcs: list[Any]) -> None:
        self.funcs = funcs

    async def score_rollout(self, state: dict[str, Any]) -> None:
        state["reward"] = sum(func(state["completion"], state["answer"]) for func in self.funcs)


def install(patch: pytest.MonkeyPatch) -> None:
    """Makes the double importable as `verifiers`."""

    def normalize_messages(messages: list[Any], *, field_name: str) -> list[Any]:
        found = []
        for message in messages:
            if isinstance(message, dict):
                calls = [SimpleNamespace(**call) for call in message.get("tool_calls", ())]
                message = SimpleNamespace(**{"tool_call_id": None, **message, "tool_calls": calls})
            found.append(message)
        return found

    def load_environment(name: str, **arguments: Any) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    parts = {
        "": {"load_environment": load_environment},
        ".utils": {},
        ".utils.message_utils": {"normalize_messages": normalize_messages},
        ".types": {"ClientConfig": SimpleNamespace},
    }
    for name, members in parts.items():
        module = types.ModuleType(f"verifiers{name}")
        module.__dict__.update(members, __path__=[])
        patch.setitem(sys.modules, module.__name__, module)
