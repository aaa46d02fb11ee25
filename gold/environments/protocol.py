"""The interface of environments, and a conversation as they see it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gold.data import Prompt
from gold.errors import ConfigError
from gold.sections import Limits
from gold.turns import TurnMessage, Written

__all__ = ["CompletionVerifier", "Conversation", "Environment", "Limits", "Reply", "tools_of"]

Reply = Sequence[TurnMessage] | None


@dataclass
class Conversation:
    """A conversation as an environment sees it.

    ``messages`` begin with those of the prompt; the student's turns are among them as chat templates read them, with
    ``tool_calls`` and ``reasoning_content``. ``turns`` are what the student wrote, in order. ``state`` is the
    environment's own: it begins empty. ``seed`` names this conversation in the run; draws that follow from it alone
    repeat in a resumed run. ``counts`` are summed over the conversations of a step into its metrics. ``ended`` is why
    the conversation has ended: `done` (the environment ended it), `cut` (a turn reached the length limit), `max_turns`,
    `max_tokens`, or `error`; None while it goes on.
    """

    prompt: Prompt
    messages: list[TurnMessage]
    seed: tuple[int, ...] = ()
    turns: list[Written] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    ended: str | None = None

    @property
    def last(self) -> Written:
        """The student's last turn."""
        return self.turns[-1]

    @property
    def answer(self) -> str:
        """The student's last turn without its thinking."""
        return self.last.after_thinking


class CompletionVerifier(Protocol):
    """Scores single completions; tasks and verifiers are such."""

    def score(self, prompt: Prompt, completion: str) -> float:
        """0 to 1."""
        ...


class Environment(Protocol):
    """Answers the student's turns and scores conversations. Both methods may be coroutines; many conversations are
    under way at once, each with its own state, so that an environment keeps nothing in itself.

    An environment with an attribute ``tools``, the JSON schemas of functions, has them in the prompt of every turn; one
    with ``instructions``, a text, has that in the system message.
    """

    def reply(self, conversation: Conversation) -> Reply | Awaitable[Reply]:
        """What comes after the student's last turn: messages of the user or of tools; None ends the conversation.

        An exception ends it too, and is counted.
        """
        ...

    def score(self, conversation: Conversation) -> float | Awaitable[float | None] | None:
        """The score of a conversation that has ended, from 0 to 1; None if it has none."""
        ...


def tools_of(environment: Environment | None) -> tuple[Mapping[str, Any], ...]:
    """The schemas of an environment's tools.

    Raises:
        ConfigError: something that is no schema of a function.
    """
    tools = tuple(getattr(environment, "tools", None) or ())
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ConfigError(
                f'environment: tools[{place}] is no schema of a function, {{"type": "function", "function": {{"name": '
                f"…}}}}: {tool!r:.80}; ToolEnvironment makes schemas of functions"
            )
    return tools
