"""Tools as plain text in messages, for chat templates that have no place for them."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from gold.environments.calling import called
from gold.environments.protocol import Conversation, Environment, tools_of
from gold.turns import TurnMessage

_INSTRUCTIONS = """You may call these functions, each described by a line of JSON:
<tools>
{tools}
</tools>
A call is a JSON object with its name and its arguments, between tags:
<tool_call>
{{"name": NAME, "arguments": ARGUMENTS}}
</tool_call>"""


class ToolsAsText:
    """An environment whose tools are described in the system message, and whose results are messages of the user; calls
    are text of the assistant. So every template writes them, and all bytes of a turn are common text."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools_of(environment)]
        self.instructions = _INSTRUCTIONS.format(tools="\n".join(lines))

    async def reply(self, conversation: Conversation) -> Any:
        """See ``Environment.reply``; the results of tools are one message of the user."""
        reply = await called(partial(self.environment.reply, conversation))
        if not isinstance(reply, list | tuple) or not all(isinstance(message, dict) for message in reply):
            return reply
        results = [m["content"] for m in reply if m.get("role") == "tool"]
        others: list[TurnMessage] = [m for m in reply if m.get("role") != "tool"]
        if not results:
            return reply
        content = "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)
        return [{"role": "user", "content": content}, *others]

    async def score(self, conversation: Conversation) -> float | None:
        """See ``Environment.score``."""
        score: float | None = await called(partial(self.environment.score, conversation))
        return score
