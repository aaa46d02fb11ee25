"""What a turn says: thinking, prose and tool calls, in the forms of common families."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.templates import FAMILIES, turn_of

from gold.data import Prompt
from gold.errors import DataError
from gold.turns import TurnPrompt, read_turn

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-99, 99)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text("ab ", max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.text("abc_", min_size=1, max_size=4), VALUES, max_size=3)
WORDS = st.text("ab cé\n", max_size=12).map(str.strip)
FORMS = {
    "chatml": "hermes",
    "llama3": "llama3",
    "mistral": "mistral",
    "gpt-oss": "gpt-oss",
    "qwen3": "hermes",
    "qwen3-coder": "qwen3-coder",
}


@given(st.sampled_from(sorted(FORMS)), st.none() | WORDS, WORDS, ARGUMENTS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_a_family_writes_is_read(name, thinking, prose, arguments, indented) -> None:
    called = json.dumps(arguments, ensure_ascii=False, indent=1 if indented else None)
    text = turn_of(name, thinking, "" if name == "llama3" else prose, ("add_2", called))
    found = read_turn(text.encode())
    assert found.form == FORMS[name]
    assert not found.broken
    (call,) = found.calls
    assert call.name == text[slice(*call.name_span)] == "add_2"
    if call.untyped:
        told = {k: v if isinstance(arguments[k], str) else json.loads(v) for k, v in call.arguments.items()}
        assert told == arguments
        assert text[slice(*call.arguments_span)] == ""
    else:
        assert json.loads(text[slice(*call.arguments_span)]) == dict(call.arguments) == arguments
    assert (found.reasoning is None) == (thinking is None)
    if thinking is not None:
        assert text[slice(*found.thinking)].strip() == thinking
    if name in ("chatml", "qwen3", "qwen3-coder", "mistral"):
        assert found.prose == prose


@given(st.binary(max_size=60))
@settings(max_examples=100)
def test_any_bytes_are_a_turn(data) -> None:
    found = read_turn(data)
    assert found.text.encode("utf-8", "surrogateescape") == data
    assert found.byte_offset(len(found.text)) == len(data)


@given(st.binary(max_size=6), st.sampled_from(["", "\\ud83d", "\\udc80"]), st.booleans())
@settings(max_examples=60)
def test_what_templates_read_of_a_turn_has_bytes(odd, escape, inside) -> None:
    """Bytes that are no UTF-8, and halves of surrogate pairs that JSON can write, in names, arguments and reasons."""
    call = json.dumps({"name": "f<>", "arguments": {"k<>": ["<>"]} if inside else 3})
    text = b"<tool_call>" + call.encode().replace(b"<>", odd + escape.encode()) + b"</tool_call>"
    found = read_turn(text)
    assert found.text.encode("utf-8", "surrogateescape") == text
    json.dumps([found.message(), found.broken, found.shown], ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<tool_call>{"name": "f", "arguments": {"a": 1}', "no JSON"),
        ('<tool_call>{"arguments": {}}</tool_call>', "no name"),
        ('<tool_call>{"name": "f"}</tool_call>', "no arguments"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "no JSON object"),
        ("<tool_call>f(1)</tool_call>", "no JSON object"),
        ("<tool_call><function=f><parameter=a>1</parameter>", "no end"),
        ("<function=f><parameter=a>1</function>", "an argument of the call has no end"),
        ("[TOOL_CALLS]f[ARGS]{1}", "no JSON"),
        ('<tool_call>{"name": "f", "arguments": ' + '{"a":' * 3000, "no JSON"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(text, reason) -> None:
    found = read_turn(text.encode())
    assert not found.calls
    assert len(found.broken) == 1
    assert reason in found.broken[0]
    assert found.message() == {"role": "assistant", "content": text}


def test_several_calls_are_read_in_order_and_braces_alone_are_text() -> None:
    text = "".join(
        f'<tool_call>{{"name": "f{n}", "arguments": {{"a": {n}}}}}</tool_call>\n' for n in range(3)
    )
    assert [call.name for call in read_turn(text.encode()).calls] == ["f0", "f1", "f2"]
    assert read_turn(b'{"a": 1}').calls == ()
    assert read_turn(b"{").form is None


@pytest.mark.parametrize("mark", ["<function=g>", "[TOOL_CALLS]g[ARGS]{}", "<tool_call>"])
@pytest.mark.parametrize("name", sorted(set(FORMS) - {"qwen3-coder"}))
def test_marks_of_another_form_in_an_argument_are_text(name, mark) -> None:
    found = read_turn(turn_of(name, None, "", ("f", json.dumps({"a": mark}))).encode())
    assert (found.form, found.broken) == (FORMS[name], ())
    assert [(call.name, dict(call.arguments)) for call in found.calls] == [("f", {"a": mark})]


def test_thinking_that_a_template_opened_and_thinking_without_end() -> None:
    opened = read_turn(b"hm\n</think>\n\n4", opened=True)
    assert (opened.reasoning, opened.text[opened.answer :]) == ("hm", "4")
    assert read_turn(b"hm\n</think>\n\n4").thinking is None
    endless = read_turn(b"<think>on and on")
    assert endless.reasoning == "on and on"
    assert endless.answer == len(endless.text)


def test_a_teacher_context_stays_at_the_original_prompt() -> None:
    asked = {"role": "user", "content": "q"}
    later = ({"role": "assistant", "content": "a"}, {"role": "user", "content": "more"})
    prompt = TurnPrompt("k", messages=(asked, *later), given=1, teacher_context="hint")
    original = Prompt("k", messages=(asked,), teacher_context="hint").for_teacher
    assert prompt.for_teacher.messages == (*original.messages, *later)
    assert prompt.for_teacher.for_teacher == prompt.for_teacher


@pytest.mark.parametrize(
    "messages",
    [
        (),
        ({"role": "robot", "content": "x"},),
        ({"role": "user", "content": None},),
        (3,),
        ({"role": "user", "content": "\ud83d"},),
    ],
)
def test_messages_that_no_template_can_read_are_refused(messages) -> None:
    with pytest.raises(DataError, match="message"):
        TurnPrompt("k", messages=messages)


def test_every_family_has_a_template() -> None:
    assert set(FORMS) | {"gemma"} == set(FAMILIES)
