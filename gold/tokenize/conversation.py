"""Token ids of conversations of several turns: what the student sampled is never tokenized again.

The prompt of a turn is what the chat template renders for the conversation so far, with the sampled ids of earlier
turns in their places: the template is rendered with a placeholder for each sampled text, the text between placeholders
is tokenized, and the sampled ids stand for the placeholders. A template that only appends is prefix-preserving: the ids
of a turn's prompt and of its text begin the prompt of the next turn. One that strips thinking from earlier turns is
followed: the ids of the thinking are left out, and those of the answer stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from gold.errors import DataError
from gold.tokenize.chat import (
    PlainText,
    encodable,
    has_chat_template,
    prompt_text,
    special_strings,
    text_ids,
    transcript_ids,
    with_one_bos,
)
from gold.tokenize.templates import Rendering, rendered, template_of
from gold.turns import CUT, TurnMessage, TurnPrompt, Written, read_turn, texts_outside_content, tool_call

_PLACED = re.compile("([\uf8e2\uf8e4][\ue000-\ue0ff]{4}\uf8e3)")
_ARGUMENTS_CUT = re.compile(r"\{\s*\"" + CUT)


def _placed(place: int, thinking: bool = False) -> str:
    """The placeholder of what was sampled at a place: of the answer, or of the thinking."""
    number = "".join(chr(0xE000 + byte) for byte in place.to_bytes(4, "big"))
    return f"{chr(0xF8E4 if thinking else 0xF8E2)}{number}\uf8e3"


@dataclass(frozen=True)
class PromptIds:
    """The ids of a turn's prompt; ``text`` is its rendering with placeholders, and ``opening`` the end of it that opens
    the assistant's turn. ``appended``: the prompt and the ids of the turn before are its beginning."""

    ids: tuple[int, ...]
    text: str
    opening: str
    appended: bool = True


@dataclass(frozen=True)
class SampledTurn:
    """What the student sampled in a turn: its ids without the stop id, the byte at which each ends, its text, and the
    prompt before it."""

    ids: NDArray[np.int32]
    ends: NDArray[np.int64]
    written: Written
    prompt: PromptIds

    def after(self, offset: int, form: PlainText) -> list[int]:
        """The ids of the text from a byte on; a token that this byte is inside of is replaced by those of its rest."""
        if not offset:
            return [int(index) for index in self.ids]
        first = int(np.searchsorted(self.ends, offset, side="left")) + 1
        first = min(first, self.ids.size)
        while first < self.ids.size and self.ends[first] <= offset:
            first += 1
        data = self.written.text.encode("utf-8", "surrogateescape")
        rest = data[offset : int(self.ends[first - 1]) if first else 0]
        return [*(form.ids(rest.decode("utf-8", "replace")) if rest else []), *self.ids[first:].tolist()]


def conversation_ids(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    sampled: Mapping[int, SampledTurn],
    *,
    stops: Sequence[str] = (),
    tools: Sequence[Mapping[str, Any]] = (),
    rendering: Rendering | None = None,
) -> PromptIds:
    """The ids before the next turn of the assistant; ``sampled`` are the turns among ``messages`` that the student
    wrote, by place, and ``stops`` the strings of its stop ids.

    Raises:
        DataError: the template rejects the messages, drops a sampled turn, or writes it in another form than the
            student.
    """
    failure: DataError | None = None
    # A template may refuse the raw text of a tool call, or put it into another channel: then it gets the call itself.
    for structured in (False, True) if any(s.written.calls for s in sampled.values()) else (False,):
        placed = {
            place: _placeholder(tokenizer, place, s.written, structured) for place, s in sampled.items()
        }
        given = [placed.get(place, message) for place, message in enumerate(messages)]
        try:
            return _joined(tokenizer, given, sampled, stops, tools, rendering, structured)
        except DataError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _placeholder(tokenizer: Any, place: int, written: Written, structured: bool) -> Mapping[str, Any]:
    answer, thinking = _placed(place), _placed(place, thinking=True)
    message: TurnMessage = {"role": "assistant", "content": answer}
    key = thinking_key(tokenizer) if written.thinking is not None else None
    if key == "content":
        message["content"] = f"<think>\n{thinking}\n</think>\n\n{answer}"
    elif key is not None:
        message[key] = thinking
    if structured and written.calls:
        last = len(written.calls) - 1
        message["content"] = message["content"].removesuffix(answer)
        message["tool_calls"] = [
            tool_call(call.name, {answer: 0} if number == last else dict(call.arguments))
            for number, call in enumerate(written.calls)
        ]
    return message


def thinking_key(tokenizer: Any) -> str | None:
    """Where a chat template reads thinking: `reasoning_content`, `thinking`, or the content of a message, from which it
    strips it; None if it does not know of any."""
    template = template_of(tokenizer) or ""
    if "reasoning_content" in template:
        return "reasoning_content"
    if re.search(r"\w(\.|\[[\"'])thinking\b", template):
        return "thinking"
    return "content" if "</think>" in template else None


def _joined(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    sampled: Mapping[int, SampledTurn],
    stops: Sequence[str],
    tools: Sequence[Mapping[str, Any]],
    rendering: Rendering | None,
    structured: bool,
) -> PromptIds:
    raw = thinking_key(tokenizer) is None
    form: PlainText
    if not has_chat_template(tokenizer):
        text, form, opening = _transcript(messages), _Transcript(tokenizer), "Assistant:"
    else:

        def render(given: Sequence[Mapping[str, Any]], opened: bool = True) -> str:
            styled = adapted(tokenizer, given)
            return rendered(tokenizer, styled, rendering, add_generation_prompt=opened, tools=tools)

        text, form = encodable(tokenizer, messages, render)
        closed, plain = render(messages, False), form.plain(text)
        opening = plain[len(closed) :] if plain.startswith(closed) else ""
    ids: list[int] = []
    before, whole, thought, after = "", "", None, None
    appended = True
    for number, part in enumerate(_PLACED.split(text)):
        if number % 2 == 0:
            if after is not None and structured and sampled[after].written.calls:
                part = _from_turn_end(part, form, stops)
            before, whole, after = before + part, whole + part, None
            continue
        place = int.from_bytes(bytes(ord(c) - 0xE000 for c in part[1:-1]), "big")
        if part[0] == "\uf8e4":
            thought = before, whole
        else:
            turn, kept = sampled[place], thought is not None
            whole_text = kept or raw or turn.written.thinking is None
            inside = kept or (structured and bool(turn.written.calls))
            head, first, follows = _head(turn, form, *(thought or (before, whole)), whole_text, inside)
            ids += form.ids(head) if head else []
            ids += turn.after(first, form)
            appended = appended and follows
            before, thought, after = "", None, place
        whole += part
    if missing := [place for place in sampled if _placed(place) not in text]:
        raise DataError(f"the model's chat template drops messages[{missing[0]}], which the student wrote")
    ids += form.ids(before) if before else []
    if not has_chat_template(tokenizer):
        ids = [*transcript_ids(tokenizer, ""), *ids]
    return PromptIds(tuple(with_one_bos(tokenizer, ids)), form.plain(text), opening, appended)


def _head(
    turn: SampledTurn, form: PlainText, before: str, whole: str, whole_text: bool, inside: bool
) -> tuple[str, int, bool]:
    """The template's text before a sampled turn, without what the turn itself contains; the byte at which the turn's
    ids begin; and whether all of them follow the prompt after which they were sampled.

    ``whole_text``: all of the turn is kept, else what follows its thinking; ``inside``: what the template writes
    between its opening of the turn and the placeholder is certainly of the turn.
    """
    written, opening = turn.written, turn.prompt.opening
    first = 0 if whole_text else written.answer
    plain = form.plain(whole)
    follows = plain.startswith(turn.prompt.text)
    if follows:
        wrapper = plain[len(turn.prompt.text) :]
    else:
        plain = form.plain(before)
        at = plain.rfind(opening) if opening else -1
        wrapper = plain[at + len(opening) :] if at >= 0 else ""
    kept = len(before)
    while len(form.plain(before[kept:])) < len(wrapper):
        kept -= 1
    head = before[:kept]
    if inside or not wrapper.strip():
        return head, written.byte_offset(first), follows and not first
    if first and written.text[:first].endswith(wrapper):
        return head, written.byte_offset(first - len(wrapper)), False
    if not first and written.text.startswith(wrapper):
        return head, 0, follows
    if written.calls:
        raise DataError(
            f"the model's chat template writes the tool call of a turn after {wrapper[-40:]!r}, the student did not"
        )
    return before, written.byte_offset(first), False


def _from_turn_end(part: str, form: PlainText, stops: Sequence[str]) -> str:
    """The text from the token that ends a turn."""
    for at in range(len(part)):
        if any(stop and form.plain(part[at : at + len(stop)]).startswith(stop) for stop in stops):
            return part[at:]
    raise DataError("the model's chat template writes no stop token after a tool call")


class _Transcript(PlainText):
    """Encodes a plain transcript, in which special tokens are text."""

    def ids(self, text: str) -> list[int]:
        """See ``PlainText.ids``."""
        return text_ids(self._tokenizer, text)


def _transcript(messages: Sequence[Mapping[str, Any]]) -> str:
    return prompt_text(TurnPrompt("", messages=tuple(_with_thinking(message, None) for message in messages)))


# What a template writes

_NAME, _KEY, _VALUE, _RESULT = (
    "NameOfTheFunction",
    "KeyOfTheArgument",
    "ValueOfTheArgument",
    "ResultOfTheCall",
)
_THOUGHT, _ANSWER, _QUESTION = "ThoughtOfTheAssistant", "AnswerOfTheAssistant", "QuestionOfTheUser"
_ASKED: TurnMessage = {"role": "user", "content": _QUESTION}
_ARGUMENTS = re.compile(rf'\{{\s*"{_KEY}"\s*:\s*"{_VALUE}"\s*\}}')
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A function.",
        "parameters": {
            "type": "object",
            "properties": {_KEY: {"type": "string", "description": "An argument."}},
            "required": [_KEY],
        },
    },
}


@dataclass(frozen=True)
class TemplateForm:
    """What a chat template writes of a conversation with tools.

    ``tools``: their descriptions; ``results``: what they return; ``calls``: the form of its tool calls, None if it
    writes none; ``json_arguments``: their arguments are JSON objects. ``thinking``: the text before and after the
    thinking of a turn, None if it writes none. ``strips``: it leaves thinking out of earlier turns. ``opening``: the
    text with which it opens a turn of the assistant.
    """

    tools: bool = False
    results: bool = False
    calls: str | None = None
    thinking: tuple[str, str] | None = None
    strips: bool = False
    opening: str = ""
    json_arguments: bool = True

    @property
    def lacking(self) -> str:
        """What of a conversation with tools the template does not write; "" if nothing."""
        needed = {"tools": self.tools, "their results": self.results, "calls": self.calls}
        return " or ".join(what for what, there in needed.items() if not there)

    @property
    def opens_thinking(self) -> bool:
        """Whether a turn begins with thinking that the template has opened."""
        return opens_thinking(self.opening)

    @classmethod
    def of(cls, tokenizer: Any, rendering: Rendering | None = None) -> TemplateForm:
        """The form of a tokenizer's chat template, from what it writes of examples."""
        if not has_chat_template(tokenizer):
            return cls()

        def written(*messages: TurnMessage, opened: bool = False, tools: bool = False) -> str:
            styled = adapted(tokenizer, messages)
            given = (_TOOL,) if tools else ()
            try:
                return rendered(tokenizer, styled, rendering, add_generation_prompt=opened, tools=given)
            except DataError:
                return ""

        call: TurnMessage = {
            "role": "assistant",
            "content": "",
            "tool_calls": [tool_call(_NAME, {_KEY: _VALUE})],
        }
        result = {"role": "tool", "content": _RESULT, "name": _NAME}
        before = written(_ASKED, opened=True, tools=True)
        turn = written(_ASKED, call, tools=True)
        read = read_turn(turn[_shared(before, turn) :].encode()) if turn else Written("")
        complete = [c for c in read.calls if c.name == _NAME and c.arguments.get(_KEY) == _VALUE]
        thought = _thinking_of(tokenizer, written)
        asked = written(_ASKED)
        opening = written(_ASKED, opened=True)
        return cls(
            tools=_NAME in before,
            results=_RESULT in written(_ASKED, call, result, opened=True, tools=True),
            calls=read.form if complete else "other" if _VALUE in turn else None,
            json_arguments=_ARGUMENTS.search(turn) is not None or _VALUE not in turn,
            thinking=thought[0],
            strips=thought[1],
            opening=opening[len(asked) :] if opening.startswith(asked) else "",
        )


def opens_thinking(opening: str) -> bool:
    """Whether a template's opening of a turn has begun its thinking."""
    return opening.rstrip().endswith(("<think>", "[THINK]", "<thinking>"))


def _thinking_of(tokenizer: Any, written: Any) -> tuple[tuple[str, str] | None, bool]:
    key = thinking_key(tokenizer)
    if key is None:
        return None, False
    answer: TurnMessage = {"role": "assistant", "content": _ANSWER}
    if key == "content":
        answer["content"] = f"<think>\n{_THOUGHT}\n</think>\n\n{_ANSWER}"
    else:
        answer[key] = _THOUGHT
    opened, turn = written(_ASKED, opened=True), written(_ASKED, answer)
    strips = _THOUGHT not in written(_ASKED, answer, _ASKED, opened=True)
    if _THOUGHT not in turn:
        return None, strips
    before, _, rest = turn.partition(_THOUGHT)
    return (before[_shared(opened, before) :], rest.partition(_ANSWER)[0]), strips


def _shared(one: str, other: str) -> int:
    """The length of the longest common beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


_Style = tuple[bool, bool]
_STYLES: WeakKeyDictionary[Any, dict[str, _Style]] = WeakKeyDictionary()


def adapted(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[TurnMessage]:
    """The messages as a chat template takes them: thinking where it reads it, the arguments of tool calls as an object
    or as JSON text, and no content beside a call instead of an empty one."""
    key = thinking_key(tokenizer) if any("reasoning_content" in message for message in messages) else None
    found = [_with_thinking(message, key) for message in messages]
    if not any(message.get("tool_calls") for message in messages):
        return found
    known = _STYLES.setdefault(tokenizer, {})
    template = template_of(tokenizer) or ""
    if template not in known:
        known[template] = next(filter(lambda s: _takes(tokenizer, s), _CALL_STYLES), _CALL_STYLES[0])
    return [_styled(message, known[template]) for message in found]


def _with_thinking(message: Mapping[str, Any], key: str | None) -> TurnMessage:
    changed = dict(message)
    keep = changed.pop("keep_thinking", True)
    if (thinking := changed.pop("reasoning_content", None)) is None:
        return changed
    if key == "content" or (key is None and keep):
        changed["content"] = f"<think>\n{thinking}\n</think>\n\n{changed['content']}"
    elif key is not None:
        changed[key] = thinking
    return changed


_CALL_STYLES: tuple[_Style, ...] = ((False, False), (True, False), (False, True), (True, True))


def _takes(tokenizer: Any, style: _Style) -> bool:
    call: TurnMessage = {"role": "assistant", "content": "", "tool_calls": [tool_call(_NAME, {_KEY: _VALUE})]}
    try:
        text = rendered(tokenizer, [_ASKED, _styled(call, style)], tools=[_TOOL])
    except DataError:
        return False
    return _VALUE in text and f'\\"{_VALUE}' not in text


def _styled(message: Mapping[str, Any], style: _Style) -> TurnMessage:
    if not message.get("tool_calls"):
        return dict(message)
    as_text, without_content = style
    changed = dict(message)
    if as_text:
        changed["tool_calls"] = [
            tool_call(c["function"]["name"], json.dumps(c["function"]["arguments"], ensure_ascii=False))
            for c in message["tool_calls"]
        ]
    if without_content and not message["content"]:
        changed["content"] = None
    return changed


# Prompts that begin a turn in a template's own form


def turn_prompt_ids(tokenizer: Any, prompt: TurnPrompt, rendering: Rendering | None = None) -> list[int]:
    """The ids of the prompt of a turn, up to where its completion begins.

    Raises:
        DataError: the template rejects the messages or does not write the part of the turn that has been begun.
    """
    if not has_chat_template(tokenizer):
        begun = (
            "" if prompt.begun is None else adapted(tokenizer, [prompt.begun])[0]["content"].partition(CUT)[0]
        )
        return transcript_ids(tokenizer, f"{_transcript(prompt.messages or ())}{begun}{prompt.lead}")
    text, form = encodable(
        tokenizer, prompt.messages or (), lambda messages: turn_text(tokenizer, messages, prompt, rendering)
    )
    ids = form.ids(text)
    begun = (
        "" if prompt.begun is None else f"{prompt.begun['content']}\n{texts_outside_content(prompt.begun)}"
    )
    if special := special_strings(tokenizer, [begun]):
        raise DataError(
            f"the turn that has been begun contains {special[0]!r}, a special token of the model, as text"
        )
    return with_one_bos(tokenizer, [*ids, *(text_ids(tokenizer, prompt.lead) if prompt.lead else [])])


def turn_text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    prompt: TurnPrompt,
    rendering: Rendering | None = None,
) -> str:
    """The rendered messages with the beginning of the assistant's turn, up to where the completion begins."""
    begun = prompt.begun
    if begun is None:
        styled = adapted(tokenizer, messages)
        return rendered(tokenizer, styled, rendering, add_generation_prompt=True, tools=prompt.tools)
    text = rendered(tokenizer, adapted(tokenizer, [*messages, begun]), rendering, tools=prompt.tools)
    match = _ARGUMENTS_CUT.search(text)
    at = match.start() if match else text.find(CUT)
    if at < 0:
        raise DataError("the model's chat template does not write the begun turn of the assistant")
    return text[:at]
