"""Prompts: every bad line named, splits that never move."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gold.data import (
    Prompt,
    any_messages,
    characters_of,
    content_hash,
    hold_out,
    lacking_completion,
    load_prompts,
    row_of,
    split_by_hash,
    weights_of,
)
from gold.errors import ConfigError, DataError
from gold.train.input_digests import of_prompts

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)


def written(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), "utf-8")
    return path


# -- the split --


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=30), st.integers(0, 30))
def test_adding_prompts_never_moves_another_across(texts, cut):
    def sides(some):
        prompts = [Prompt(str(i), text) for i, text in enumerate(some)]
        try:
            train, heldout = split_by_hash(prompts, 0.5)
        except DataError:
            return None
        return {p.text for p in train}, {p.text for p in heldout}

    whole, part = sides(texts), sides(texts[:cut])
    if whole and part:
        assert part[0] <= whole[0]
        assert part[1] <= whole[1]
        assert not whole[0] & whole[1]


def test_the_held_out_share_is_about_what_was_asked_for():
    prompts = [Prompt(str(i), f"prompt number {i}") for i in range(4000)]
    train, heldout = split_by_hash(prompts, 0.1)
    assert len(train) + len(heldout) == 4000
    assert 340 < len(heldout) < 460
    assert split_by_hash(prompts, 0.0) == (prompts, [])


def test_the_answer_does_not_decide_the_side():
    assert content_hash(Prompt("a", "x", completion="1")) == content_hash(Prompt("b", "x", reference=2))
    message = ({"role": "user", "content": "x"},)
    assert content_hash(Prompt("a", "x")) != content_hash(Prompt("a", messages=message))
    turned = ({"content": "x", "role": "user"},)
    assert content_hash(Prompt("a", messages=turned)) == content_hash(Prompt("a", messages=message))


def test_a_side_without_prompts_is_an_error():
    one = [Prompt("a", "x")]
    with pytest.raises(DataError, match=r"none of the 1 prompts is (held out at|left to train on)"):
        split_by_hash(one, 0.5)
    with pytest.raises(ConfigError, match=r"heldout_share is 1\.0"):
        split_by_hash(one, 1.0)


@pytest.mark.parametrize(("count", "asked", "expected"), [(1000, 64, 64), (100, 64, 20), (3, 64, 1)])
def test_as_many_are_held_out_as_an_evaluation_uses_but_most_of_few_are_trained_on(count, asked, expected):
    prompts = [Prompt(str(i), f"prompt number {i}") for i in range(count)]
    train, heldout = hold_out(prompts, asked)
    assert len(heldout) == expected
    assert sorted((*train, *heldout), key=lambda p: int(p.key)) == prompts
    # Of more prompts those with smaller hashes are held out; the others stay where they were.
    assert {p.text for p in hold_out(prompts[: count // 2 + 1], asked)[0]} - {p.text for p in heldout} <= {
        p.text for p in train
    }


def test_equal_contents_are_held_out_together():
    prompts = [Prompt(str(i), f"prompt number {i // 4}") for i in range(80)]
    train, heldout = hold_out(prompts, 6)
    assert len(heldout) == 8
    assert not {p.text for p in train} & {p.text for p in heldout}
    with pytest.raises(DataError, match="none of the 3 prompts is left to train on"):
        hold_out([Prompt(str(i), "x") for i in range(3)], 2)


# -- the file --


@settings(deadline=None)
@given(prompts=st.lists(TEXTS, min_size=1, max_size=8))
def test_texts_come_back_as_written_and_keys_are_unique(tmp_path_factory, prompts):
    path = written(tmp_path_factory.mktemp("data"), *({"prompt": text} for text in prompts))
    loaded = load_prompts(path)
    assert [p.text for p in loaded] == prompts
    assert len({p.key for p in loaded}) == len(prompts)


def test_a_key_without_id_does_not_depend_on_the_other_lines(tmp_path):
    alone = load_prompts(written(tmp_path, {"prompt": "b"}))[0].key
    among = load_prompts(written(tmp_path, {"prompt": "a"}, "", {"prompt": "b"}, {"prompt": "b"}))
    assert among[1].key == alone
    assert among[2].key == f"{alone}-2"


def test_every_field_is_read(tmp_path):
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "2+2?"}]
    path = written(
        tmp_path,
        {"messages": messages, "completion": "4", "id": 7, "reference": {"answer": [4]}},
        {"prompt": "separators \u2028 stay", "messages": None},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    chat, plain = load_prompts(path)
    assert chat == Prompt("7", None, tuple(messages), "4", {"answer": [4]})
    assert plain.text == "separators \u2028 stay"


def test_a_file_has_the_prompts_that_its_lines_make_whichever_are_chosen(tmp_path):
    turns = [{"content": "a \u2603", "role": "system"}, {"role": "user", "content": "b"}]
    lines = [
        {"prompt": "x"},
        {"prompt": "x", "to": "A", "w": 2},
        {"messages": turns, "teacher_context": turns[1:], "id": "k", "reference": {"z": [1.5], "a": None}},
        {"prompt": "y", "teacher_context": "c", "completion": "d", "w": 0.5},
    ]
    path = written(tmp_path, *({"to": "B", **line} for line in lines))
    loaded = load_prompts(path, route="to", weight="w", unweighted=True)
    key, other = content_hash(Prompt("", "x"))[:16], content_hash(Prompt("", "y"))[:16]
    made = [
        Prompt(key, "x", route="B"),
        Prompt(f"{key}-2", "x", route="A", weight=2),
        Prompt("k", None, tuple(turns), None, lines[2]["reference"], tuple(turns[1:]), "B"),
        Prompt(other, "y", completion="d", teacher_context="c", route="B", weight=0.5),
    ]
    assert list(loaded) == made
    assert loaded[1:3] == made[1:3]
    assert [loaded.row(i) for i in range(4)] == [row_of(p) for p in made]
    for told, listed in ((loaded, made), (loaded.where(np.array([False, True, True, True])), made[1:])):
        assert np.array_equal(characters_of(told), characters_of(listed))
        assert np.array_equal(weights_of(told), weights_of(listed))
        assert list(lacking_completion(told)) == lacking_completion(listed)
        assert any_messages(told) == any_messages(listed)
        assert [list(side) for side in split_by_hash(told, 0.4)] == list(split_by_hash(listed, 0.4))
        assert [list(side) for side in hold_out(told, 2)] == list(hold_out(listed, 2))
        assert of_prompts(told, "") == of_prompts(listed, "")


def test_the_row_of_a_prompt_is_the_json_of_its_fields():
    for prompt in (
        Prompt('k"', "a \u2603\n"),
        Prompt("k", "a", reference={"b": 1, "a": 2}),
        Prompt("k", "a", weight=3),
    ):
        fields = [prompt.key, prompt.text, None, None, prompt.reference, None, None]
        fields += [prompt.weight] if prompt.weight != 1 else []
        assert row_of(prompt) == json.dumps(fields, sort_keys=True).encode() + b"\n"


BAD_LINES = [
    ("{", "JSON"),
    ("[1]", "a list"),
    ('"x"', "a string"),
    ({}, "neither"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "both"),
    ({"promt": "a"}, "did you mean prompt?"),
    ({"zzz": 1}, "its columns are zzz"),
    ({"prompt": 3}, '"prompt" is a number'),
    ({"prompt": ""}, '"prompt" is empty'),
    ({"prompt": " \n"}, '"prompt" is empty'),
    ({"prompt": "a", "completion": ["b"]}, "completion[0] is a string"),
    ({"prompt": "a", "id": 1.5}, '"id" is a number'),
    ({"prompt": "a", "id": ""}, '"id"'),
    ({"prompt": "a", "teacher_context": 3}, '"teacher_context" is a number'),
    ('{"prompt": "a", "prompt": "b"}', '"prompt"'),
    ('{"prompt": "a \\ud800"}', "U+D800 at character 2"),
    ({"messages": "hi"}, '"messages" is a string'),
    ({"messages": []}, '"messages" is empty'),
    ({"messages": ["hi"]}, "messages[0] is a string"),
    ({"messages": [{"role": "user"}]}, '"content" of messages[0]'),
    ({"messages": [{"role": "usr", "content": "a"}]}, "did you mean user?"),
    ({"messages": [{"role": "user", "content": " "}]}, "last message"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "an answer alone"),
    ({"prompt": "a", "system": "b"}, '"system" goes before messages'),
]


@pytest.mark.parametrize(("line", "expected"), BAD_LINES)
def test_a_bad_line_is_one_clear_line(tmp_path, line, expected):
    with pytest.raises(DataError) as caught:
        load_prompts(written(tmp_path, {"prompt": "good"}, line))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'prompts.jsonl'}:2: ")
    assert expected in message
    assert "\n" not in message


def test_a_weight_is_a_number_from_zero(tmp_path):
    for weight, expected in (("1", "a string"), (None, "null"), (True, "a boolean"), (-1, "weight is -1")):
        with pytest.raises(DataError, match=f"jsonl:1: .*{expected}"):
            load_prompts(written(tmp_path, {"prompt": "a", "w": weight}), weight="w")
    with pytest.raises(DataError, match='"w", which is the weight, is null or missing'):
        load_prompts(written(tmp_path, {"prompt": "a"}), weight="w")


def test_a_repeated_id_names_both_lines(tmp_path):
    with pytest.raises(DataError, match=r'jsonl:3: id "a" .* line 1'):
        load_prompts(
            written(tmp_path, {"prompt": "x", "id": "a"}, {"prompt": "y"}, {"prompt": "z", "id": "a"})
        )


def test_a_file_that_is_not_utf8_names_line_and_column(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"jsonl:2: .* 0xe9 at column 16"):
        load_prompts(path)
    path.write_bytes('{"prompt": "a"}\n'.encode("utf-16"))
    with pytest.raises(DataError, match=r"jsonl:1: .* 0xff at column 1"):
        load_prompts(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"prompts\.jsonl"):
        load_prompts(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        load_prompts(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        load_prompts(tmp_path)


def test_a_prompt_made_in_code_is_held_to_the_same_rules():
    with pytest.raises(DataError, match="exactly one of a text and messages"):
        Prompt("a")
    with pytest.raises(DataError, match='"prompt" is empty'):
        Prompt("a", "")
