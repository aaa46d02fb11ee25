"""Checks of an environment's conversations: one of two turns as each side reads it, with the compared bytes marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gold.data import Prompt
from gold.doctor.finding import Finding, failure, passed, warning
from gold.doctor.prompts import PromptReader
from gold.environments.protocol import Environment
from gold.errors import DataError
from gold.rollout.conversations import as_turn
from gold.rollout.pieces import Thinking, pieces_of
from gold.tokenize.conversation import (
    SampledTurn,
    TemplateForm,
    adapted,
    conversation_ids,
    turn_text,
)
from gold.tokenize.templates import rendered
from gold.turns import TurnMessage, TurnPrompt, Written, read_turn, tool_call

_CHECK = "conversations"
_ANSWER, _RESULT = "The answer is 42.", "42"
_EXAMPLES = {"string": "x", "integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}


def examine_conversations(
    prompt: Prompt, readers: Sequence[PromptReader], environment: Environment, thinking: Thinking
) -> list[Finding]:
    """Findings about a conversation of two turns after a prompt, the first of them with a call if there are tools; the
    student is the first of the readers."""
    student, *teachers = readers
    given = as_turn(prompt, getattr(environment, "tools", ()), getattr(environment, "instructions", ""))
    for side in readers if given.tools else ():
        if lacking := TemplateForm.of(side.tokenizer, side.rendering).lacking:
            advice = "give it another template, or set environment.tool_format to text"
            return [
                Finding(
                    _CHECK, "fail", f"the chat template of the {side.role} does not write {lacking}", advice
                )
            ]
    try:
        text = _turn_of(student, given, instructed=hasattr(environment, "instructions"))
        findings = [_shown(student, given, text), *_kept(student, given, text)]
        findings += [_compared(student, teacher, given, text, thinking) for teacher in teachers]
    except DataError as error:
        findings = [
            failure(str(error), "give it another chat template, or set environment.tool_format to text")
        ]
    return [Finding(_CHECK, f.status, f.found, f.advice) for f in findings]


def _turn_of(student: PromptReader, prompt: TurnPrompt, instructed: bool) -> str:
    """A turn as the student's own template writes it."""
    messages = prompt.messages or ()
    if not prompt.tools:
        call = '<tool_call>\n{"name": "example", "arguments": {"a": 1}}\n</tool_call>'
        return call if instructed else _ANSWER
    function = prompt.tools[0]["function"]
    turn: TurnMessage = {"role": "assistant", "content": ""}
    turn["tool_calls"] = [tool_call(function["name"], _arguments(function))]
    before = turn_text(student.tokenizer, messages, prompt, student.rendering)
    styled = adapted(student.tokenizer, [*messages, turn])
    whole = rendered(student.tokenizer, styled, student.rendering, tools=prompt.tools)
    common = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    text = whole[common:]
    ends = [at for stop in _stops(student) if (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    properties = function.get("parameters", {}).get("properties", {})
    return {name: _EXAMPLES.get(str(schema.get("type")), "x") for name, schema in properties.items()}


def _stops(side: PromptReader) -> list[str]:
    return [side.vocabulary.label(index) for index in side.vocabulary.stop_ids]


def _written(prompt: TurnPrompt, text: str) -> Written:
    written = read_turn(text.encode())
    return written if prompt.tools else written.without_calls


def _shown(student: PromptReader, prompt: TurnPrompt, text: str) -> Finding:
    before = turn_text(student.tokenizer, prompt.messages or (), prompt, student.rendering)
    return passed(f"the student writes {_line(before)}⟦{_line(text, 400)}⟧")


def _kept(student: PromptReader, prompt: TurnPrompt, text: str) -> list[Finding]:
    """Whether the template keeps what was before a turn as the beginning of the next prompt."""
    messages: list[TurnMessage] = [dict(message) for message in prompt.messages or ()]
    sampled: dict[int, SampledTurn] = {}
    written = _written(prompt, text)
    kept = True
    asked: TurnMessage = {"role": "user", "content": "And now?"}
    result: TurnMessage = {
        "role": "tool",
        "name": written.calls[0].name if written.calls else "",
        "content": _RESULT,
    }
    exchanges = (written, result if written.calls else asked), (read_turn(_ANSWER.encode()), asked)
    for turn, reply in exchanges:
        ids = _ids(student, prompt, messages, sampled)
        tokens = student.vocabulary.encode(turn.text)
        sampled[len(messages)] = SampledTurn(tokens.ids, tokens.ends.astype(np.int64), turn, ids)
        messages += [turn.message(), reply]
        kept = _ids(student, prompt, messages, sampled).appended and kept
    form = TemplateForm.of(student.tokenizer, student.rendering)
    if kept and not form.strips:
        return [passed("its template only appends: the ids of a turn begin the prompt of the next one")]
    what = "leaves thinking out of earlier turns" if form.strips else "writes earlier turns anew"
    return [
        warning(
            f"the chat template of the student {what}: prompts of later turns do so too, as at inference, and keep the "
            "sampled ids of the rest",
            "a template that only appends is cheaper to serve (template_kwargs, or another chat_template.jinja)",
        )
    ]


def _ids(
    student: PromptReader,
    prompt: TurnPrompt,
    messages: Sequence[TurnMessage],
    sampled: Mapping[int, SampledTurn],
) -> Any:
    return conversation_ids(
        student.tokenizer,
        messages,
        sampled,
        stops=_stops(student),
        tools=prompt.tools,
        rendering=student.rendering,
    )


def _compared(
    student: PromptReader, teacher: PromptReader, prompt: TurnPrompt, text: str, thinking: Thinking
) -> Finding:
    """What the teacher reads of the turn; compared bytes are between ⟦ and ⟧."""
    written = _written(prompt, text)
    form = TemplateForm.of(teacher.tokenizer, teacher.rendering)
    pieces = pieces_of(written, [form], thinking)
    seen = teacher.seen(prompt)
    messages = seen.messages or ()
    assert isinstance(seen, TurnPrompt)
    if pieces is None:
        before = turn_text(teacher.tokenizer, messages, seen, teacher.rendering)
        return passed(f"the {teacher.role} reads {_line(before)}⟦{_line(text, 400)}⟧: every byte is compared")
    shown = []
    for piece in pieces:
        at = TurnPrompt("", messages=messages, tools=prompt.tools, begun=piece.begun)
        before = turn_text(teacher.tokenizer, messages, at, teacher.rendering)
        shown.append(f"{_line(before)}⟦{_line(written.text[piece.start : piece.end], 200)}⟧")
    return warning(
        f"the {teacher.role} writes calls as {form.calls}, the student as {written.form}; compared are only "
        + ", ".join(shown),
        "with environment.tool_format text both sides write them alike",
    )


def _line(text: str, most: int = 80) -> str:
    """The end of a text on one line."""
    cut = text if len(text) <= most else f"…{text[-most:]}"
    return cut.replace("\n", "⏎")
