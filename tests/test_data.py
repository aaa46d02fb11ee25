"""Prompts: every bad line named, splits that never move, an order without state."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gold.data import Prompt, PromptOrder, content_hash, load_prompts, split_by_hash
from gold.errors import ConfigError, DataError

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)


def written(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), "utf-8")
    return path


# -- the order --


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(1, 50), st.integers(0, 30))
def test_an_order_covers_each_prompt_once_per_epoch_whatever_the_batch(count, seed, size, first_step):
    order = PromptOrder(count, seed)
    steps = range(first_step, first_step + 2 * count // size + 3)
    stream = [i for step in steps for i in order.batch(step, size)]
    skip = -first_step * size % count
    epochs = [stream[k : k + count] for k in range(skip, len(stream) - count + 1, count)]
    assert epochs
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 99), st.integers(1, 20), st.lists(st.integers(0, 50), max_size=5))
def test_an_order_remembers_nothing(count, seed, size, detour):
    fresh = PromptOrder(count, seed).batch(7, size)
    order = PromptOrder(count, seed)
    for step in detour:
        order.batch(step, 3)
    assert order.batch(7, size) == fresh


def test_an_order_is_the_same_on_every_machine_and_differs_by_seed_and_epoch():
    assert PromptOrder(8, 0).batch(0, 16) == [0, 3, 7, 5, 1, 2, 6, 4, *PromptOrder(8, 0).batch(1, 8)]
    long = PromptOrder(100, 0)
    assert long.batch(0, 100) != long.batch(1, 100)
    assert long.batch(0, 100) != PromptOrder(100, 1).batch(0, 100)


def test_an_order_refuses_what_cannot_be():
    with pytest.raises(ConfigError, match="at least one prompt"):
        PromptOrder(0, 0)
    with pytest.raises(ConfigError, match="seed is -1"):
        PromptOrder(3, -1)
    with pytest.raises(ConfigError, match="got -1 and 4"):
        PromptOrder(3, 0).batch(-1, 4)


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


BAD_LINES = [
    ("{", "JSON"),
    ("[1]", "a list"),
    ('"x"', "a string"),
    ({}, "neither"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "both"),
    ({"promt": "a"}, "did you mean prompt?"),
    ({"prompt": "a", "zzz": 1}, "completion, id"),
    ({"prompt": 3}, '"prompt" is a number'),
    ({"prompt": ""}, '"prompt" is empty'),
    ({"prompt": " \n"}, '"prompt" is empty'),
    ({"prompt": "a", "completion": ""}, '"completion" is empty'),
    ({"prompt": "a", "completion": ["b"]}, '"completion" is a list'),
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
    ({"messages": [{"role": "user", "content": "a", "contents": "b"}]}, '"contents" in messages[0]'),
    ({"messages": [{"role": "user", "content": " "}]}, "last message"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "assistant"),
]


@pytest.mark.parametrize(("line", "expected"), BAD_LINES)
def test_a_bad_line_is_one_clear_line(tmp_path, line, expected):
    with pytest.raises(DataError) as caught:
        load_prompts(written(tmp_path, {"prompt": "good"}, line))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'prompts.jsonl'}:2: ")
    assert expected in message
    assert "\n" not in message


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
