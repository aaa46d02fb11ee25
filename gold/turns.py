"""Turns of a conversation: the prompt of one turn, and what the student wrote in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gold.data import Prompt
from gold.errors import DataError

CUT = "\uf8e6"
"""In a message that has been begun: where the completion begins."""

TurnMessage = dict[str, Any]
"""A message with `role` and `content`, and where it has them `tool_calls`, `reasoning_content`, `name` and
`tool_call_id`, as transformers' chat templates read them. With `keep_thinking` false, a template that has no place for
thinking does not get it as text."""

TURN_KEYS = {"tool_calls", "reasoning_content", "name", "tool_call_id"}
"""What a message may have besides its role and its content."""
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class TurnPrompt(Prompt):
    """The prompt of one turn: the conversation so far, and the tools that the student may call.

    ``given`` is the number of messages of the original prompt, to which a teacher context is added. If the turn has
    been begun, ``begun`` is its message, with ``CUT`` where the completion begins, so that every template writes what
    is before it in its own form; ``lead`` is text between the cut and the completion.

    Raises:
        DataError: no messages, or one that no template can read.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    given: int = 0
    begun: Mapping[str, Any] | None = None
    lead: str = ""

    def __post_init__(self) -> None:
        check_messages(self.messages or ())

    @property
    def for_teacher(self) -> TurnPrompt:
        """See ``Prompt.for_teacher``: the context is added to the messages of the original prompt."""
        if self.teacher_context is None:
            return self
        messages = self.messages or ()
        original = Prompt(self.key, messages=messages[: self.given], teacher_context=self.teacher_context)
        with_context = original.for_teacher.messages or ()
        return replace(
            self,
            messages=(*with_context, *messages[self.given :]),
            given=len(with_context),
            teacher_context=None,
        )


def check_messages(messages: Sequence[object]) -> None:
    """Checks that templates can read the messages.

    Raises:
        DataError: none, or one without a known role or without a text.
    """
    if not messages:
        raise DataError("a conversation needs at least one message")
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in _ROLES or not isinstance(message.get("content"), str):  # type: ignore[attr-defined]
            raise DataError(
                f'messages[{place}]: expected {{"role": {" | ".join(_ROLES)}, "content": a text}}, got {message!r:.80}'
            )
        if encodable_text(message["content"]) != message["content"]:  # type: ignore[index]
            raise DataError(
                f"messages[{place}]: its content holds half a surrogate pair, got {message!r:.80}"
            )


def texts_outside_content(message: Mapping[str, Any]) -> str:
    """Everything that a template may write of a message besides its content."""
    parts = (message.get(key) for key in ("reasoning_content", "thinking", "tool_calls", "name"))
    return "\n".join(p if isinstance(p, str) else json.dumps(p, ensure_ascii=False) for p in parts if p)


@dataclass(frozen=True)
class Call:
    """A tool call in a text; ``name_span`` and ``arguments_span`` are where its name and its arguments, as a JSON
    object, stand, as offsets of characters. ``untyped``: the values of its arguments are texts, whatever their types;
    they stand one by one between markers, and ``arguments_span`` is empty."""

    name: str
    arguments: Mapping[str, Any]
    name_span: tuple[int, int]
    arguments_span: tuple[int, int]
    untyped: bool = False


@dataclass(frozen=True)
class Written:
    """What an assistant wrote in one turn: thinking, prose, and tool calls.

    ``text`` holds bytes that are no UTF-8 as surrogates (``surrogateescape``). ``thinking`` is the range of the
    thinking without its markers, None without any; ``answer`` is where what follows it begins. ``form`` names the form
    of the tool calls, the first of which begins at ``calls_start``. ``broken``: for each call that cannot be read, the
    reason.
    """

    text: str
    thinking: tuple[int, int] | None = None
    answer: int = 0
    calls: tuple[Call, ...] = ()
    form: str | None = None
    calls_start: int | None = None
    broken: tuple[str, ...] = ()

    @property
    def reasoning(self) -> str | None:
        """The thinking, if there is any."""
        return None if self.thinking is None else _shown(self.text[slice(*self.thinking)]).strip("\n")

    @property
    def prose(self) -> str:
        """The text that is neither thinking nor a tool call."""
        return _shown(self.text[self.answer : self.calls_start]).strip()

    @property
    def shown(self) -> str:
        """The whole text; bytes that are no UTF-8 are U+FFFD."""
        return _shown(self.text)

    def message(self, thinking: bool = True) -> TurnMessage:
        """The message of the turn as chat templates read it; a turn without calls or thinking is its text.

        ``thinking`` false: thinking stays text.
        """
        start = self.answer if thinking or self.thinking is None else 0
        # A call that cannot be read is text: left out, a teacher would read an answer to a turn that says nothing.
        content = _shown(self.text[start : self.calls_start if self.calls else None])
        message: TurnMessage = {"role": "assistant", "content": content.strip() if self.calls else content}
        if thinking and self.thinking is not None:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [tool_call(call.name, call.arguments) for call in self.calls]
        return message

    @property
    def after_thinking(self) -> str:
        """The text after the thinking."""
        return _shown(self.text[self.answer :])

    @property
    def without_calls(self) -> Written:
        """The same turn, its tool calls as text."""
        return replace(self, calls=(), form=None, calls_start=None, broken=())

    def byte_offset(self, offset: int) -> int:
        """The offset in bytes of an offset in characters."""
        return len(self.text[:offset].encode("utf-8", "surrogateescape"))


def tool_call(name: str, arguments: Any) -> TurnMessage:
    """A tool call as chat templates read it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def encodable_text(text: str) -> str:
    """A text that has bytes: halves of surrogate pairs are U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


def _encodable(value: Any) -> Any:
    """A JSON value whose texts have bytes."""
    if isinstance(value, str):
        return encodable_text(value)
    if isinstance(value, Mapping):
        return {encodable_text(key): _encodable(each) for key, each in value.items()}
    return [_encodable(each) for each in value] if isinstance(value, list) else value


def _shown(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# Reading

_THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<thinking>", "</thinking>"))
_CHANNEL = re.compile(
    r"(?:<\|start\|>assistant)?<\|channel\|>(\w+)([^<]*)(?:<\|constrain\|>\w+)?<\|message\|>"
)
_DECODER = json.JSONDecoder()
_MOST_CALLS = 64
_SURROGATE = re.compile("[\ud800-\udfff]")


class _BrokenError(Exception):
    """A call that cannot be read; the message completes a sentence."""


def read_turn(data: bytes, *, opened: bool = False) -> Written:
    """What an assistant's text says: its thinking and its tool calls, in the forms of common families.

    Thinking is text between `<think>` and `</think>` (or `[THINK]`, or a channel other than the final one), where it
    begins the turn; with ``opened`` the prompt has opened it. Calls are `<tool_call>{"name": …, "arguments": {…}}
    </tool_call>` (Hermes, Qwen), `<function=NAME><parameter=KEY>VALUE</parameter></function>` (Qwen3-Coder), a turn
    that is `{"name": …, "parameters": {…}}` (Llama 3), `[TOOL_CALLS]` (Mistral), `to=functions.NAME` in a channel
    (gpt-oss), and those of DeepSeek.
    """
    text = data.decode("utf-8", "surrogateescape")
    thinking, answer = _thinking_in(text, opened)
    # A call's arguments may hold the marks of another form: the one that begins first is meant.
    read = {form: found for form, reader in _FORMS.items() if (found := reader(text, answer)) is not None}
    if not read:
        return Written(text, thinking, answer)
    form = min(read, key=lambda form: read[form][0])
    start, calls, broken = read[form]
    encodable = tuple(
        replace(call, name=encodable_text(call.name), arguments=_encodable(call.arguments)) for call in calls
    )
    return Written(text, thinking, answer, encodable, form, start, tuple(map(encodable_text, broken)))


def thinking_range(data: bytes, *, opened: bool) -> tuple[int, int | None] | None:
    """Where the thinking of a turn begins and ends, in bytes, without its markers; the end is None if it has none yet,
    and all is None without thinking."""
    text = data.decode("utf-8", "surrogateescape")
    thinking, _ = _thinking_in(text, opened)
    if thinking is None:
        return None
    first, last = (len(text[:at].encode("utf-8", "surrogateescape")) for at in thinking)
    return first, None if thinking[1] == len(text) else last


def _thinking_in(text: str, opened: bool) -> tuple[tuple[int, int] | None, int]:
    """The range of the thinking, and where what follows it begins."""
    begun = len(text) - len(text.lstrip())
    for opening, closing in _THINKING:
        starts = text.startswith(opening, begun)
        first = begun + len(opening) if starts else 0
        at = text.find(closing, first)
        if not (starts or (opened and at >= 0)):
            continue
        if at < 0:
            return (first, len(text)), len(text)
        after = at + len(closing)
        return (first, at), after + len(text[after:]) - len(text[after:].lstrip("\n"))
    if opened:
        return (0, len(text)), len(text)
    return _channels_in(text)


def _channels_in(text: str) -> tuple[tuple[int, int] | None, int]:
    """As ``_thinking_in``, for a turn in channels."""
    first = _CHANNEL.match(text)
    if first is not None and first[1] == "final":
        return None, first.end()
    if first is None or first[1] != "analysis" or "to=" in first[2]:
        return None, 0
    at = text.find("<|end|>", first.end())
    if at < 0:
        return (first.end(), len(text)), len(text)
    after = at + len("<|end|>")
    after += len("<|start|>assistant") * text.startswith("<|start|>assistant", after)
    final = _CHANNEL.match(text, after)
    if final is not None and final[1] == "final":
        after = final.end()
    return (first.end(), at), after


_Found = tuple[int, list[Call], list[str]]


def _hermes(text: str, start: int) -> _Found | None:
    return _each(text, [m.end() for m in re.finditer(r"<tool_call>\s*", text[start:])], start, "<tool_call>")


def _qwen3_coder(text: str, start: int) -> _Found | None:
    heads = list(re.compile(r"(?:<tool_call>\s*)?<function=([^>\n]+)>").finditer(text, start))
    if not heads:
        return None
    calls: list[Call] = []
    broken: list[str] = []
    for number, head in enumerate(heads[:_MOST_CALLS]):
        last = heads[number + 1].start() if number + 1 < len(heads) else len(text)
        end = text.find("</function>", head.end(), last)
        if end < 0:
            broken.append("the call has no end")
            continue
        body = text[head.end() : end]
        found = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", body, re.DOTALL)
        if len(found) != body.count("<parameter="):
            broken.append("an argument of the call has no end")
            continue
        calls.append(Call(head[1], dict(found), head.span(1), (end, end), untyped=True))
    return heads[0].start(), calls, broken


def _each(text: str, ends: Sequence[int], start: int, opening: str) -> _Found | None:
    if not ends:
        return None
    calls: list[Call] = []
    broken: list[str] = []
    after = start
    for end in ends[:_MOST_CALLS]:
        if start + end < after:  # inside the call before
            continue
        try:
            call, after = _call_at(text, start + end)
            calls.append(call)
        except _BrokenError as error:
            broken.append(str(error))
    return text.index(opening, start), calls, broken


def _llama(text: str, start: int) -> _Found | None:
    begun = re.compile(r"\s*(?:<\|python_tag\|>)?\s*").match(text, start)
    at = begun.end() if begun else start
    if not text.startswith("{", at) or '"name"' not in text[at : at + 64]:
        return None
    calls: list[Call] = []
    while True:
        try:
            call, end = _call_at(text, at)
        except _BrokenError as error:
            return (start, calls, [str(error)]) if calls or '"parameters"' in text[at:] else None
        calls.append(call)
        between = re.compile(r"\s*;\s*").match(text, end)
        if between is None or len(calls) == _MOST_CALLS:
            return start, calls, []
        at = between.end()


def _mistral(text: str, start: int) -> _Found | None:
    first = text.find("[TOOL_CALLS]", start)
    if first < 0:
        return None
    calls: list[Call] = []
    at = first
    try:
        named = re.compile(r"\[TOOL_CALLS\]\s*([^\s\[{]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
        if named.match(text, at):
            while (match := named.match(text, at)) and len(calls) < _MOST_CALLS:
                arguments, at = _value_at(text, match.end())
                calls.append(_call(match[1], match.span(1), arguments, (match.end(), at)))
            return first, calls, []
        at = re.compile(r"\[TOOL_CALLS\]\s*\[?\s*").match(text, at).end()  # type: ignore[union-attr]
        while len(calls) < _MOST_CALLS:
            call, at = _call_at(text, at)
            calls.append(call)
            between = re.compile(r"\s*,\s*").match(text, at)
            if between is None:
                break
            at = between.end()
    except _BrokenError as error:
        return first, calls, [str(error)]
    return first, calls, []


def _gptoss(text: str, start: int) -> _Found | None:
    found = [m for m in _CHANNEL.finditer(text, start) if "to=functions." in m[2]]
    if not found:
        return None
    calls: list[Call] = []
    broken: list[str] = []
    for match in found[:_MOST_CALLS]:
        name = re.compile(r"to=functions\.([^\s<]+)").search(text, match.start(), match.end())
        assert name is not None
        try:
            arguments, end = _value_at(text, match.end())
            calls.append(_call(name[1], name.span(1), arguments, (match.end(), end)))
        except _BrokenError as error:
            broken.append(str(error))
    return found[0].start(), calls, broken


def _deepseek(text: str, start: int) -> _Found | None:
    heads = list(
        re.compile(
            r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?([^\n<]+)(?:\n```json\n|<｜tool▁sep｜>)"
        ).finditer(text, start)
    )
    if not heads:
        return None
    calls: list[Call] = []
    broken: list[str] = []
    for head in heads[:_MOST_CALLS]:
        try:
            arguments, end = _value_at(text, head.end())
            calls.append(_call(head[1], head.span(1), arguments, (head.end(), end)))
        except _BrokenError as error:
            broken.append(str(error))
    opening = text.find("<｜tool▁calls▁begin｜>", start)
    return opening if opening >= 0 else heads[0].start(), calls, broken


_FORMS = {
    "qwen3-coder": _qwen3_coder,
    "hermes": _hermes,
    "mistral": _mistral,
    "gpt-oss": _gptoss,
    "deepseek": _deepseek,
    "llama3": _llama,
}


def _call(name: str, name_span: tuple[int, int], arguments: Any, span: tuple[int, int]) -> Call:
    if not isinstance(arguments, dict):
        raise _BrokenError("the arguments are no JSON object")
    return Call(name, arguments, name_span, span)


def _call_at(text: str, at: int) -> tuple[Call, int]:
    """The call in a JSON object, `{"name": …, "arguments": {…}}`, and where the object ends."""
    members, end = _members_at(text, at)
    name = members.get("name")
    arguments = members.get("arguments", members.get("parameters"))
    if name is None or not isinstance(name[0], str):
        raise _BrokenError("the call has no name")
    if arguments is None:
        raise _BrokenError("the call has no arguments")
    return _call(name[0], (name[1] + 1, name[2] - 1), arguments[0], arguments[1:]), end


def _members_at(text: str, at: int) -> tuple[dict[str, tuple[Any, int, int]], int]:
    """The members of the JSON object at an offset, each with its range, and where the object ends."""
    space = re.compile(r"\s*")

    def skipped(at: int) -> int:
        match = space.match(text, at)
        return match.end() if match else at

    if not text.startswith("{", at):
        raise _BrokenError("the call is no JSON object")
    members: dict[str, tuple[Any, int, int]] = {}
    at = skipped(at + 1)
    while not text.startswith("}", at):
        key, at = _value_at(text, at)
        at = skipped(at)
        if not (isinstance(key, str) and text.startswith(":", at)):
            raise _BrokenError("the call is no JSON")
        start = skipped(at + 1)
        value, at = _value_at(text, start)
        members[key] = value, start, at
        at = skipped(at)
        if text.startswith(",", at):
            at = skipped(at + 1)
        elif not text.startswith("}", at):
            raise _BrokenError("the call is no JSON")
    return members, at + 1


def _value_at(text: str, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        raise _BrokenError("the call is no JSON") from None
