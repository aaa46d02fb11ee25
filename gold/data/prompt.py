"""A prompt, the rules that it satisfies, and its content as a hash and as a row of bytes."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from json.encoder import encode_basestring_ascii
from typing import Any, cast

from gold.errors import DataError, did_you_mean

Message = dict[str, str]

MESSAGE_KEYS = ("role", "content")
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Prompt:
    """A prompt for a completion: a plain text, or the messages of a conversation; exactly one of the two.

    `key` is unique within its file and does not change when other lines are added or removed. `completion` is a given
    answer, for off-policy training; `reference` is any data for the verifier. `teacher_context` is added for teachers
    only: a text, or, before messages, messages. `route` names the prompt's teacher, if there are several. `weight`: how
    often it is trained on, relative to the others; see `PromptOrder`.

    Raises:
        DataError: neither or both of `text` and `messages`, an empty one, an unknown role, text that UTF-8
            cannot encode, messages as the context of a plain text, a weight that is negative or infinite.
    """

    key: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    completion: str | None = None
    reference: Any = None
    teacher_context: str | tuple[Message, ...] | None = None
    route: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise DataError("a prompt needs exactly one of a text and messages")
        if self.text is not None:
            _check_text("prompt", self.text)
        if self.messages is not None:
            _check_messages(self.messages)
        if self.completion is not None:
            _check_text("completion", self.completion, blank_is_text=True)
        if isinstance(self.teacher_context, tuple):
            if self.messages is None:
                raise DataError(
                    '"teacher_context" is a list, and the prompt is a plain text; give it as a string'
                )
            _check_turns("teacher_context", self.teacher_context)
        elif self.teacher_context is not None:
            _check_text("teacher_context", self.teacher_context)
        if not 0.0 <= self.weight < math.inf:
            raise DataError(f"its weight is {self.weight}; expected a number from 0")

    @property
    def for_teacher(self) -> "Prompt":
        """The prompt for teachers: with its teacher context, if it has one.

        The context of a plain text directly precedes it. With messages, a text is inserted before the content of the
        last user message (without one, the last message), separated by a blank line. Messages are inserted before all
        others; only a system or developer message at the beginning of the conversation stays first, merged with one of
        the same role at the beginning of the context.
        """
        context = self.teacher_context
        if context is None:
            return self
        if self.messages is None:
            return replace(self, text=f"{context}{self.text}", teacher_context=None)
        turns = list(self.messages)
        if isinstance(context, str):
            users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
            at = users[-1] if users else len(turns) - 1
            turns[at] = {**turns[at], "content": f"{context}\n\n{turns[at]['content']}"}
            return replace(self, messages=tuple(turns), teacher_context=None)
        extra, first = list(context), turns[0]
        head = [turns.pop(0)] if first["role"] in ("system", "developer") and len(turns) > 1 else []
        if head and extra[0]["role"] == first["role"]:
            head = [{**first, "content": f"{first['content']}\n\n{extra.pop(0)['content']}"}]
        return replace(self, messages=(*head, *extra, *turns), teacher_context=None)


def content_hash(prompt: Prompt) -> str:
    """The SHA-256 (hexadecimal) of the part of a prompt that models read, without its answers and key."""
    if prompt.messages is None:
        content = _quoted(prompt.text or "")
    else:
        content = ", ".join(f"[{_quoted(m['role'])}, {_quoted(m['content'])}]" for m in prompt.messages)
        content = f"[{content}]"
    return hashlib.sha256(content.encode("ascii")).hexdigest()


_quoted = encode_basestring_ascii
_encode = json.JSONEncoder(default=repr, sort_keys=True).encode


def row_of(prompt: Prompt) -> bytes:
    """A prompt as a line of JSON: the list of its fields, a weight other than 1 last."""
    p, weight = prompt, "" if prompt.weight == 1.0 else f", {_encode(prompt.weight)}"
    reference = "null" if p.reference is None else _encode(p.reference)
    row = (
        f"[{_quoted(p.key)}, {_json(p.text)}, {_json(p.messages)}, {_json(p.completion)}, {reference}, "
        f"{_json(p.teacher_context)}, {_json(p.route)}{weight}]\n"
    )
    return row.encode("ascii")


def _json(value: str | Sequence[Message] | None) -> str:
    """A text or messages as JSON: what ``_encode`` returns, in a fifth of the time."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return _quoted(value)
    turns = (f'{{"content": {_quoted(m["content"])}, "role": {_quoted(m["role"])}}}' for m in value)
    return f"[{', '.join(turns)}]"


def _check_text(name: str, text: object, blank_is_text: bool = False) -> None:
    if not isinstance(text, str):
        raise DataError(f'"{name}" is {kind_of(text)}; expected a string')
    if not text or not (blank_is_text or text.strip()):
        raise DataError(f'"{name}" is empty; expected some text')
    _check_encodable(name, text)


def _check_encodable(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(
            f'"{name}" holds half a surrogate pair, U+{code:04X} at character {error.start}'
        ) from error


def _check_turns(of: str, messages: Sequence[object]) -> None:
    if not messages:
        raise DataError(f'"{of}" is empty; expected at least one message')
    for place, message in enumerate(messages):
        name = f"{of}[{place}]"
        if not isinstance(message, dict):
            raise DataError(f'{name} is {kind_of(message)}; expected {{"role": …, "content": …}}')
        for key in message:
            if key not in MESSAGE_KEYS:
                raise DataError(f'unknown key "{key}" in {name}{did_you_mean(str(key), MESSAGE_KEYS)}')
        for key in MESSAGE_KEYS:
            if not isinstance(message.get(key), str):
                raise DataError(f'"{key}" of {name} is {kind_of(message.get(key))}; expected a string')
        if message["role"] not in ROLES:
            raise DataError(
                f'unknown role "{message["role"]}" in {name}{did_you_mean(message["role"], ROLES)}'
            )
        _check_encodable(f"{name}.content", message["content"])


def _check_messages(messages: Sequence[object]) -> None:
    _check_turns("messages", messages)
    last = cast(Message, messages[-1])
    if last["role"] == "assistant":
        raise DataError(
            'the last message is the assistant\'s; expected a turn to answer, give answers as "completion"'
        )
    if not last["content"].strip():
        raise DataError("the last message is empty; expected some text to answer")


def kind_of(value: object) -> str:
    """The name of a JSON value's type in errors."""
    if value is None:
        return "null or missing"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, bytes):
        return "binary data"
    return (
        "a string" if isinstance(value, str) else "a list" if isinstance(value, list | tuple) else "an object"
    )
