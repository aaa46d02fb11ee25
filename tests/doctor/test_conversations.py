"""What the doctor says of conversations: how each side reads one, and what of it is compared."""

from __future__ import annotations

import pytest
from support.templates import family

from gold.data import Prompt
from gold.demo.calculator import Calculator
from gold.doctor.conversations import examine_conversations
from gold.doctor.prompts import PromptReader
from gold.environments.text import ToolsAsText
from gold.tokenize.templates import Rendering

ASKED = Prompt("k", messages=({"role": "user", "content": "6 * 7"},), reference=[6, 7])


def reader(role: str, name: str) -> PromptReader:
    vocabulary, tokenizer = family(name)
    return PromptReader(role, name, tokenizer, vocabulary, Rendering(), None)


def found(student: str, teacher: str, environment=None, thinking="compare"):
    readers = [reader("student", student), reader("teacher", teacher)]
    return examine_conversations(ASKED, readers, environment or Calculator(), thinking)


CALL = '<tool_call>⏎{"name": "multiply", "arguments": {"a": 1, "b": 1}}⏎</tool_call>'


def test_sides_that_write_alike_are_compared_byte_by_byte() -> None:
    shown, kept, compared = found("chatml", "qwen3")
    assert [f.status for f in (shown, kept, compared)] == ["pass"] * 3
    assert f"⟦{CALL}⟧" in shown.found
    assert "only appends" in kept.found
    assert compared.found.endswith(f"assistant⏎⟦{CALL}⟧: every byte is compared")


def test_what_is_written_in_another_form_is_shown_with_what_is_left() -> None:
    _, _, compared = found("chatml", "mistral")
    assert compared.status == "warn"
    assert '[ARGS]⟦{"a": 1, "b": 1}⟧' in compared.found
    assert "[TOOL_CALLS]⟦multiply⟧" in compared.found


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_a_template_that_strips_thinking_is_named(name) -> None:
    _, kept, *_ = found(name, name)
    assert kept.status == "warn"
    assert "leaves thinking out of earlier turns" in kept.found


def test_a_template_without_tools_fails_unless_they_are_text() -> None:
    assert [f.status for f in found("chatml", "gemma", ToolsAsText(Calculator()))][
        -1
    ] == "fail"  # a system message
    assert all(f.status == "pass" for f in found("llama3", "mistral", ToolsAsText(Calculator())))
    assert "fail" in [f.status for f in found("gemma", "gemma")]
