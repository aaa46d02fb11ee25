"""Plain Python functions as tools that the student calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from gold.environments.calling import called
from gold.environments.protocol import CompletionVerifier, Conversation
from gold.errors import ConfigError
from gold.turns import Call, TurnMessage, encodable_text

Tool = Callable[..., Any]


class ToolEnvironment:
    """Runs the tool calls of the student's turns and returns their results; a turn without calls ends the conversation.

    ``tools`` are functions, synchronous or not, whose schemas follow from their type hints and their docstrings, in
    Google's form, as in transformers. A call that cannot be read, of an unknown tool, with arguments that the function
    does not take, or whose function raises, has the error as its result and is counted. The score is the
    ``verifier``'s, of the last turn without its thinking; a conversation that did not end by itself scores 0.

    Raises:
        ConfigError: a function without docstring or type hints, or two of one name.
    """

    def __init__(self, tools: Sequence[Tool], verifier: CompletionVerifier | None = None) -> None:
        self.functions: dict[str, Tool] = {}
        self.tools: tuple[Mapping[str, Any], ...] = tuple(map(schema_of, tools))
        self.verifier = verifier
        for function, schema in zip(tools, self.tools, strict=True):
            name = schema["function"]["name"]
            if name in self.functions:
                raise ConfigError(f"environment.tools: there are two functions {name}; rename one")
            self.functions[name] = function

    async def reply(self, conversation: Conversation) -> list[TurnMessage] | None:
        """The result of each call of the last turn; None if it has no calls."""
        turn = conversation.last
        if not (turn.calls or turn.broken):
            return None
        conversation.counts["tool_calls"] += len(turn.calls) + len(turn.broken)
        found = []
        for call in turn.calls:
            result, failed = await self._result(call)
            conversation.counts["tool_errors"] += failed
            found.append({"role": "tool", "name": call.name, "content": result})
        for reason in turn.broken:
            conversation.counts["tool_errors"] += 1
            found.append({"role": "tool", "name": "", "content": f"error: {reason}"})
        return found

    def score(self, conversation: Conversation) -> float | None:
        """See ``Environment.score``."""
        if self.verifier is None:
            return None
        if conversation.ended != "done":
            return 0.0
        return self.verifier.score(conversation.prompt, conversation.answer)

    async def _result(self, call: Call) -> tuple[str, bool]:
        """The result of a call as text, and whether it failed."""
        function = self.functions.get(call.name)
        if function is None:
            known = ", ".join(self.functions)
            return f"error: there is no tool {call.name!r}; the tools are {known}", True
        try:
            arguments = self._typed(call) if call.untyped else call.arguments
            return _text(await called(partial(function, **arguments))), False
        except Exception as error:
            what = " ".join(str(error).split()) or "it failed"
            return encodable_text(f"error: {type(error).__name__}: {what}"), True

    def _typed(self, call: Call) -> dict[str, Any]:
        """The arguments of a call whose values are texts: those that its schema wants as something else are JSON, and
        where it wants either, what is no JSON is a text."""
        schema = next(t["function"] for t in self.tools if t["function"]["name"] == call.name)
        known = schema["parameters"].get("properties", {})
        return {key: _value(value, known.get(key, {})) for key, value in call.arguments.items()}


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    """A value between markers, as its schema wants it."""
    kinds = [each.get("type") for each in schema.get("anyOf", [schema])]
    kinds = [kind for each in kinds for kind in (each if isinstance(each, list) else [each])]
    if set(kinds) == {"string"}:
        return text
    try:
        return json.loads(text)
    except ValueError:
        if {"string", None} & set(kinds):
            return text
        raise


def _text(result: Any) -> str:
    return encodable_text(
        result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    )


def schema_of(function: Tool) -> dict[str, Any]:
    """The JSON schema of a function, from its type hints and its docstring.

    Raises:
        ConfigError: it lacks one of them.
    """
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        schema: dict[str, Any] = get_json_schema(function)
    except Exception as error:  # transformers' own errors, and those of broken type hints
        name = getattr(function, "__name__", repr(function))
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"environment.tools: {name} has no schema: {reason}; give it type hints, and a docstring that describes "
            "each argument under Args:"
        ) from None
    # The description of what a function returns is of no template.
    schema["function"].pop("return", None)
    return schema
