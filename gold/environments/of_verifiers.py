"""Environments of the package `verifiers` (https://github.com/PrimeIntellect-ai/verifiers), versions 0.1.14 to 0.3."""

from __future__ import annotations

import importlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from gold.data import Prompt
from gold.environments.calling import reason_of
from gold.environments.protocol import Conversation
from gold.errors import ConfigError, DataError
from gold.turns import TurnMessage, Written

_ROW = ("answer", "info", "task", "example_id")
_MISSING = "environments of verifiers need the package: pip install 'verifiers>=0.1.14,<0.4'"


class VerifiersEnvironment:
    """A `MultiTurnEnv` of verifiers, such as a `ToolEnv` or a `SingleTurnEnv`, as an environment and a task.

    Its own rollout loop asks a server; here the student writes, and of the environment its stop conditions, its
    `env_response` and its rubric are used, in the order of that loop. Its tools are in the prompts. A prompt's
    ``reference`` is its row of the data set (`answer`, `info`, `task`), or the answer alone.

    Args:
        environment: An object, or the name of an environment that is installed.
        arguments: Those of the environment's `load_environment`, for a name.

    Raises:
        ConfigError: the package or the environment is not there, or it has no turns.
    """

    name = "verifiers"

    def __init__(self, environment: Any, arguments: Mapping[str, Any] | None = None) -> None:
        self.environment = (
            _loaded(environment, arguments or {}) if isinstance(environment, str) else environment
        )
        for method in ("env_response", "is_completed", "rubric"):
            if not hasattr(self.environment, method):
                kind = type(self.environment).__name__
                raise ConfigError(f"environment {kind} has no {method}: expected a MultiTurnEnv of verifiers")
        package = "verifiers"
        if any(kind.__module__.startswith("verifiers.legacy") for kind in type(self.environment).__mro__):
            package = "verifiers.legacy"  # since 0.3
        self._normalized = importlib.import_module(f"{package}.utils.message_utils").normalize_messages
        # The state of an environment wants a client; it is never asked.
        self._client = importlib.import_module(f"{package}.types").ClientConfig(
            api_base_url="http://localhost:9/v1", api_key_var="GOLD_ASKS_NO_SERVER"
        )
        self.tools: tuple[Mapping[str, Any], ...] = tuple(
            {
                "type": "function",
                "function": {key: _of(tool, key) for key in ("name", "description", "parameters")},
            }
            for tool in getattr(self.environment, "tool_defs", None) or ()
        )

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """``count`` prompts of the environment's data; held out are those of its evaluation data, or if it has none one
        row in eight.

        Raises:
            ConfigError: an unknown split.
            DataError: there are not so many, or one is no conversation.
        """
        if split not in ("train", "heldout"):
            raise ConfigError(f"verifiers: unknown split {split!r}; choose train or heldout")
        heldout = split == "heldout"
        environment = self.environment
        apart = getattr(environment, "eval_dataset_source", None) is not None or (
            getattr(environment, "eval_dataset", None) is not None
        )
        rows = environment.get_eval_dataset() if apart and heldout else environment.get_dataset()
        found = [self._prompt(row, number) for number, row in enumerate(rows)]
        if not apart:
            found = [p for p in found if (zlib.crc32(repr(p.messages).encode()) % 8 == 0) is heldout]
        if len(found) < count:
            raise DataError(
                f"the environment has {len(found)} {split} prompts, {count} were asked for; ask for fewer"
            )
        found.sort(key=lambda p: zlib.crc32(f"{seed} {p.key}".encode()))
        return found[:count]

    def _prompt(self, row: Mapping[str, Any], number: int) -> Prompt:
        asked = row.get("prompt")
        if isinstance(asked, str):
            asked = [{"role": "user", "content": asked}]
        if not asked:
            raise DataError(f"row {number} of the environment's data has no prompt")
        reference = {key: row[key] for key in _ROW if row.get(key) is not None}
        return Prompt(
            f"verifiers {row.get('example_id', number)}",
            messages=tuple(_message(message) for message in asked),
            reference=json.loads(json.dumps(reference, default=str)),
        )

    async def reply(self, conversation: Conversation) -> list[TurnMessage] | None:
        """What the environment answers; None if one of its stop conditions holds, or it has given its last answer."""
        environment, state = self.environment, await self._state(conversation)
        self._add_turn(conversation, state)
        if await environment.is_completed(state):
            return None
        step = state["trajectory"][-1]
        reply = await environment.env_response([*step["prompt"], *step["completion"]], state)
        if state.get("final_env_response") is not None:
            return None
        return [_message(message) for message in reply]

    async def score(self, conversation: Conversation) -> float | None:
        """The reward of the environment's rubric; its other measures are added to the counts of the conversation."""
        environment, state = self.environment, await self._state(conversation)
        while len(state["trajectory"]) < len(conversation.turns):  # the last turn was cut, and had no reply
            self._add_turn(conversation, state)
        state["is_completed"] = True
        state["is_truncated"] = conversation.ended not in ("done", None)
        await environment.render_completion(state)
        await environment.rubric.score_rollout(state)
        await environment.cleanup(state)
        return None if state["reward"] is None else float(state["reward"])

    async def _state(self, conversation: Conversation) -> Any:
        """The environment's own state of a conversation."""
        if "verifiers" not in conversation.state:
            prompt = conversation.prompt
            told = prompt.reference
            row = dict(told) if isinstance(told, Mapping) else {"answer": told}
            row |= {"prompt": [dict(m) for m in prompt.messages or ()]}
            row = {"example_id": 0, "answer": "", "info": {}} | row
            state = await self.environment.init_state(row, self._client, "student")
            self._client = state["client"]
            changed = await self.environment.setup_state(state)
            conversation.state["verifiers"] = state if changed is None else changed
        return conversation.state["verifiers"]

    def _add_turn(self, conversation: Conversation, state: Any) -> None:
        """Adds the next turn of the student to the state."""
        number = len(state["trajectory"])
        places = [n for n, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        given = sum(message["role"] == "assistant" for message in conversation.prompt.messages or ())
        place = places[given + number]
        turn = conversation.turns[number]
        before = [_sent(message) for message in conversation.messages[:place]]
        if number:  # what the environment knows, with the ids of its calls
            last = state["trajectory"][-1]
            before = [*last["prompt"], *last["completion"], *before[len(last["prompt"]) + 1 :]]
        state["trajectory"].append(
            {
                "prompt": self._normalized(before, field_name="prompt"),
                "completion": self._normalized([_written(turn, number)], field_name="completion"),
                "response": None,
                "tokens": None,
                "reward": None,
                "advantage": None,
                "is_truncated": conversation.ended == "cut",
                "trajectory_id": state.get("trajectory_id", ""),
                "extras": {},
            }
        )


def _loaded(name: str, arguments: Mapping[str, Any]) -> Any:
    try:
        package: Any = importlib.import_module("verifiers")
    except ImportError as error:
        raise ConfigError(_MISSING) from error
    if not hasattr(package, "load_environment"):
        raise ConfigError(_MISSING)
    try:
        return package.load_environment(name, **arguments)
    except (Exception, SystemExit) as error:  # whatever the environment raises
        raise ConfigError(f"verifiers: environment {name!r} cannot be loaded: {reason_of(error)}") from error


def _of(thing: Any, key: str) -> Any:
    return thing.get(key) if isinstance(thing, Mapping) else getattr(thing, key, None)


def _message(message: Any) -> TurnMessage:
    """A message of verifiers as chat templates read it."""
    content = _of(message, "content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [_of(part, "text") for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise DataError("the environment writes a message with something else than text")
        content = "".join(parts)
    found: TurnMessage = {"role": _of(message, "role"), "content": "" if content is None else content}
    for key in ("name", "tool_call_id"):
        if _of(message, key) is not None:
            found[key] = _of(message, key)
    return found


def _sent(message: Mapping[str, Any]) -> TurnMessage:
    """A message of a conversation as verifiers reads it."""
    return {key: message[key] for key in ("role", "content", "tool_call_id") if key in message}


def _written(turn: Written, number: int) -> TurnMessage:
    """The student's turn as verifiers reads it."""
    message = turn.message()
    sent: TurnMessage = {"role": "assistant", "content": message["content"]}
    if turn.thinking is not None:
        sent["reasoning_content"] = turn.reasoning
    if turn.calls:
        sent["tool_calls"] = [
            {
                "id": f"call_{number}_{place}",
                "name": call.name,
                "arguments": json.dumps(dict(call.arguments), ensure_ascii=False),
            }
            for place, call in enumerate(turn.calls)
        ]
    return sent
