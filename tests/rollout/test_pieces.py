"""Pieces: every sampled id is in one row, a row's bytes are what both sides write, and its prompt ends on the same."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.templates import family, turn_of

from gold.rollout.pieces import pieces_of, rows_of
from gold.rollout.types import Rollout, Segment, Turn
from gold.tokenize.chat import prompt_ids
from gold.tokenize.conversation import TemplateForm
from gold.turns import TurnPrompt, read_turn

NAMES = ("chatml", "llama3", "mistral", "gpt-oss", "qwen3", "qwen3-coder")
FORMS = {name: TemplateForm.of(family(name)[1]) for name in NAMES}
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
WORD = st.text("ab cé\n", max_size=8).map(str.strip)


def rollout_of(name, text, stopped=True, tools=(TOOL,)):
    vocabulary, _ = family(name)
    tokenized = vocabulary.decode(vocabulary.tokenizer.encode(text, add_special_tokens=False).ids)
    ids = np.append(tokenized.ids, [vocabulary.stop_ids[0]] * stopped).astype(np.int32)
    prompt = TurnPrompt("k", messages=({"role": "user", "content": "q"},), tools=tools, given=1)
    turn = Turn(0, read_turn(tokenized.data) if tools else read_turn(tokenized.data).without_calls)
    segments = (Segment(0, ids.size, True),)
    logprobs = -np.arange(ids.size, dtype=np.float32)
    return Rollout(prompt, (7, 8), ids, logprobs, tokenized, stopped, segments, turn=turn)


@given(
    st.sampled_from(NAMES),
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=2),
    st.none() | WORD,
    WORD,
    st.none() | st.integers(0, 999),
    st.sampled_from(["compare", "mask"]),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_sampled_id_is_in_exactly_one_row(
    name, teachers, thinking, prose, argument, mode, stopped
) -> None:
    call = None if argument is None else ("add", json.dumps({"a": argument}))
    text = turn_of(name, thinking, "" if call and name in ("llama3", "gpt-oss") else prose, call)
    rollout = rollout_of(name, text, stopped)
    rows = rows_of([rollout], lambda r: [FORMS[t] for t in teachers], mode)
    # Slow reconstruction: where each row begins follows from its prompt.
    seen = np.zeros(rollout.ids.size, int)
    compared = np.zeros(rollout.ids.size, bool)
    for row in [*rows.compared, *rows.others]:
        first = len(row.prompt_ids) - 2
        assert row.prompt_ids == (7, 8, *rollout.ids[:first].tolist())
        assert np.array_equal(row.ids, rollout.ids[first : first + row.ids.size])
        assert np.array_equal(row.sampling_logprobs, rollout.sampling_logprobs[first : first + row.ids.size])
        assert row.tokenized.ids.size == row.ids.size - row.stopped
        assert row.tokenized.data == b"".join(
            rollout.tokenized.data[s:e]
            for s, e in list(zip(rollout.tokenized.starts, rollout.tokenized.ends, strict=True))[
                first : first + row.tokenized.ids.size
            ]
        )
        seen[first : first + row.ids.size] += 1
        compared[first : first + row.ids.size] |= any(row is each for each in rows.compared)
    assert (seen == 1).all()
    assert rows.numbers == [0] * len(rows.compared)
    # And which are compared follows from the text: all of it where both write it alike.
    forms = [FORMS[t] for t in teachers]
    alike = all(f.calls == FORMS[name].calls for f in forms) or call is None
    marked = [f.thinking for f in forms if f.thinking is not None]
    same = (
        thinking is None
        or (mode == "compare" and all(m == FORMS[name].thinking for m in marked))
        or not marked
    )
    if alike and same and (mode == "compare" or thinking is None):
        assert compared.all()
    if thinking and mode == "mask":
        hidden = text[: text.index(thinking) + len(thinking)].encode()
        assert not compared[: len([e for e in rollout.tokenized.ends if e <= len(hidden)])].any()


def compared_bytes(name, teacher, text, mode="compare"):
    rows = rows_of([rollout_of(name, text)], lambda r: [FORMS[teacher]], mode)
    _, tokenizer = family(teacher)
    vocabulary, _ = family(teacher)
    shown = []
    for row in rows.compared:
        prompt = vocabulary.tokenizer.decode(prompt_ids(tokenizer, row.prompt), skip_special_tokens=False)
        shown.append((prompt.rpartition("q")[2], row.tokenized.data.decode(), row.stopped))
    return shown


def test_a_call_in_another_form_is_compared_by_its_name_and_its_arguments() -> None:
    text = 'so\n<tool_call>\n{"name": "add", "arguments": {"a": 12}}\n</tool_call>'
    assert compared_bytes("chatml", "mistral", text) == [
        ("[/INST]", "so\n", False),
        ("[/INST]so[TOOL_CALLS]", "add", False),
        ("[/INST]so[TOOL_CALLS]add[ARGS]", '{"a": 12}', False),
    ]
    ((_, whole, stopped),) = compared_bytes("chatml", "qwen3", text)
    assert (whole, stopped) == (text, True)
    # Arguments between markers, on either side, are no JSON.
    assert compared_bytes("chatml", "qwen3-coder", text)[1:] == [
        ("<|im_end|>\n<|im_start|>assistant\nso\n<tool_call>\n<function=", "add", False)
    ]
    text = "so\n<tool_call>\n<function=add>\n<parameter=a>\n12\n</parameter>\n</function>\n</tool_call>"
    assert compared_bytes("qwen3-coder", "mistral", text)[1:] == [("[/INST]so[TOOL_CALLS]", "add", False)]
    ((_, whole, stopped),) = compared_bytes("qwen3-coder", "qwen3-coder", text)
    assert (whole, stopped) == (text, True)


def test_thinking_is_compared_in_the_teachers_own_markers_or_masked() -> None:
    text = "<think>\nhm\n</think>\n\n4"
    head = "<|end|><|start|>assistant<|channel|>analysis<|message|>"
    final = "<|end|><|start|>assistant<|channel|>final<|message|>"
    assert compared_bytes("qwen3", "gpt-oss", text) == [
        (head, "\nhm\n", False),
        (f"{head}hm{final}", "4", True),
    ]
    assert compared_bytes("qwen3", "gpt-oss", text, "mask") == [(f"{head}hm{final}", "4", True)]
    opening = "<|im_end|>\n<|im_start|>assistant\n"
    # A teacher without thinking reads it as text, or not at all.
    assert compared_bytes("qwen3", "chatml", text) == [(opening, text, True)]
    assert compared_bytes("qwen3", "chatml", text, "mask") == [(opening, "4", True)]
    assert compared_bytes("qwen3", "qwen3", text) == [(opening, text, True)]
    assert compared_bytes("chatml", "qwen3", "4") == [(opening, "4", True)]


def test_without_tools_a_call_is_text() -> None:
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 12}}\n</tool_call>'
    rows = rows_of([rollout_of("chatml", text, tools=())], lambda r: [FORMS["mistral"]], "compare")
    assert [row.tokenized.data.decode() for row in rows.compared] == [text]


def test_a_turn_that_is_all_thinking_has_nothing_to_compare_but_its_end() -> None:
    (piece,) = pieces_of(read_turn(b"<think>\non and on"), [FORMS["qwen3"]], "mask")
    assert (piece.start, piece.end, piece.ends) == (17, 17, True)
