"""The same rows in any format and under any convention are the same prompts; what cannot be read is one line."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from gold.data import Prompt, load_prompts, row_of
from gold.data import tables as tables_module
from gold.errors import ConfigError, DataError
from gold.files import json_items

Rows = list[dict[str, Any]]
Writer = Callable[[Path, Rows], Path]

UGLY = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ['a,"b"\n', "\r\n x;\t'", "[1]", "\u2028\ufeff", "caf\u00e9 \U0001f600", "null", " \x00a", "007"]
)
TEXTS = UGLY.filter(str.strip)


@pytest.fixture(scope="module", autouse=True)
def no_disk_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`datasets` keeps what it prepares in a folder of this run, and shows no bars."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield


def as_json_lines(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8", newline="")
    return path


def as_json(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows, indent=1), "utf-8")
    return path


def as_gzip(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(as_json_lines(folder, rows).read_bytes()))
    return path


def as_csv(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.csv"
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(names)
        for row in rows:
            values = [row.get(name) for name in names]
            writer.writerow([json.dumps(v) if isinstance(v, list) else v for v in values])
    return path


def as_parquet(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def as_saved(folder: Path, rows: Rows) -> Path:
    path = folder / "saved"
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


FORMATS: list[Writer] = [as_json_lines, as_json, as_gzip, as_csv, as_parquet]


def read(source: Any, **options: Any) -> list[bytes]:
    return [row_of(prompt) for prompt in load_prompts(source, **options)]


# -- formats --


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(TEXTS, st.none() | UGLY.filter(bool), st.none() | UGLY.filter(bool)), min_size=1, max_size=6
    )
)
def test_plain_rows_are_the_same_prompts_in_every_format(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("formats")
    made = [
        {"prompt": text, "completion": answer, "reference": reference, "id": f"{n} {text}"}
        for n, (text, answer, reference) in enumerate(rows)
    ]
    expected = [row_of(Prompt(m["id"], m["prompt"], None, m["completion"], m["reference"])) for m in made]
    for write in FORMATS:
        assert read(write(folder, made)) == expected, write.__name__
    assert read(made) == expected


# -- conventions --


def turns(
    system: str | None, text: str, answer: str | None, name: str = "role", value: str = "content"
) -> Rows:
    roles = ("system", "user", "assistant") if name == "role" else ("system", "human", "gpt")
    given = zip(roles, (system, text, answer), strict=True)
    return [{name: role, value: content} for role, content in given if content is not None]


def parts(messages: Rows) -> Rows:
    return [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]


Case = tuple[str | None, str, str | None]
CONVENTIONS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "messages": lambda c: {"messages": turns(*c)},
    "parts": lambda c: {"messages": parts(turns(*c))},
    "messages and a completion": lambda c: {"messages": turns(*c[:2], None), "completion": c[2]},
    "a system column": lambda c: {"system": c[0], "messages": turns(None, *c[1:])},
    "ShareGPT": lambda c: {"conversations": turns(*c, "from", "value")},
    "TRL": lambda c: {
        "prompt": turns(*c[:2], None),
        "completion": turns(None, None, c[2]) or None,  # type: ignore[arg-type]
    },
    "Alpaca": lambda c: {"instruction": c[1], "input": "", "output": c[2] or "", "system": c[0]},
    "question": lambda c: {"question": c[1], "answer": c[2], "system": c[0]},
}


@settings(deadline=None, max_examples=12)
@given(
    st.lists(
        st.tuples(st.none() | TEXTS, TEXTS, st.none() | UGLY.filter(bool)),
        min_size=1,
        max_size=4,
    )
)
def test_a_conversation_is_the_same_prompt_under_every_convention(tmp_path_factory, cases):
    folder = tmp_path_factory.mktemp("conventions")
    expected = read([{"messages": turns(s, t, None), "completion": a} for s, t, a in cases])
    for name, convention in CONVENTIONS.items():
        rows = [convention(case) for case in cases]
        assert read(rows) == expected, name
        for write in FORMATS:
            if write is as_csv and name == "TRL":
                continue  # a cell is a text: a prompt that looks like a list stays one
            assert read(write(folder, rows)) == expected, (name, write.__name__)


def test_every_field_of_a_row_that_needs_no_interpretation_is_as_before(tmp_path):
    rows = [
        {"prompt": "a", "id": 7, "reference": {"b": [1, None]}, "completion": "c", "teacher_context": "d"}
    ]
    assert read(as_json_lines(tmp_path, rows)) == [b'["7", "a", null, "c", {"b": [1, null]}, "d", null]\n']


def test_an_input_follows_its_instruction_after_a_blank_line():
    (prompt,) = load_prompts([{"instruction": "Add.", "input": "1 + 1", "output": "2"}])
    assert prompt.messages == ({"role": "user", "content": "Add.\n\n1 + 1"},)
    assert prompt.completion == "2"


def test_parts_are_joined_by_a_line_break():
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}, "c"]
    (prompt,) = load_prompts([{"messages": [{"role": "user", "content": content}]}])
    assert prompt.messages == ({"role": "user", "content": "a\nb\nc"},)


def test_empty_answers_are_none_and_counted(caplog):
    with caplog.at_level(logging.WARNING, "gold"):
        prompts = load_prompts([{"question": "a", "answer": ""}, {"question": "b", "answer": "c"}])
    assert [p.completion for p in prompts] == [None, "c"]
    (record,) = caplog.records
    assert "1 of 2 rows have an empty answer" in record.getMessage()


# -- maps --


def test_a_map_gives_columns_the_names_that_are_understood(tmp_path):
    rows = [{"problem": "p", "solution": "s", "meta": {"gold": {"answer": 4}}, "prompt": "no", "answer": "n"}]
    as_text = {"prompt": "problem", "completion": "solution", "reference": "meta.gold.answer"}
    as_turn = {"question": "problem", "answer": "solution", "reference": "meta.gold.answer"}
    for write in (as_json_lines, as_json, as_parquet):
        (prompt,) = load_prompts(write(tmp_path, rows), map=as_text)
        assert (prompt.text, prompt.completion, prompt.reference) == ("p", "s", 4)
        (prompt,) = load_prompts(write(tmp_path, rows), map=as_turn)
        assert prompt.messages == ({"role": "user", "content": "p"},)
        assert (prompt.completion, prompt.reference) == ("s", 4)


def test_a_map_chooses_between_two_prompts_and_leaves_columns_out():
    rows = [{"prompt": "a", "messages": turns(None, "b", "c"), "id": None}, {"prompt": "a", "id": 1.5}]
    with pytest.raises(DataError, match=r'row 1: got both "prompt" and "messages"'):
        load_prompts(rows[:1])
    assert load_prompts(rows[:1], map={"prompt": "prompt"})[0].text == "a"
    assert load_prompts(rows[:1], map={"messages": "messages"})[0].completion == "c"
    with pytest.raises(DataError, match='row 1: "id" is a number'):
        load_prompts(rows[1:])
    assert len(load_prompts(rows[1:], map={"id": None})) == 1


def test_a_map_that_does_not_fit_is_one_line():
    with pytest.raises(ConfigError, match="did you mean prompt"):
        load_prompts([{"a": "b"}], map={"promt": "a"})
    with pytest.raises(ConfigError, match="prompt and question would both be the prompt"):
        load_prompts([{"a": "b"}], map={"prompt": "a", "question": "a"})
    with pytest.raises(DataError, match=r'row 1: no column "txt".*did you mean text'):
        load_prompts([{"text": "b"}], map={"prompt": "txt"})


# -- notes --


@pytest.mark.parametrize("write", FORMATS)
def test_columns_that_are_not_read_are_one_note(tmp_path, caplog, write):
    rows = [{"prompt": "a", "completions": "b", "zzz": "c"}, {"prompt": "b", "completions": "b", "zzz": "d"}]
    with caplog.at_level(logging.WARNING, "gold"):
        facts = load_prompts(write(tmp_path, rows)).facts
    (record,) = caplog.records
    assert "columns that are not read: completions; did you mean completion?, zzz" in record.getMessage()
    assert facts.used == ("prompt",)


def test_keys_of_messages_that_are_not_read_are_noted(caplog):
    message = {"role": "user", "content": "a", "weight": None, "name": "Ann"}
    with caplog.at_level(logging.WARNING, "gold"):
        load_prompts([{"messages": [message]}])
    assert [r.getMessage().partition("read: ")[2] for r in caplog.records] == ["messages[].name"]


# -- rows that are refused --

BAD_ROWS = [
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "of type image"),
    ({"messages": [{"role": "user", "content": [3]}]}, "content[0] is a number"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [{"x": "1"}]}]}, "tool_calls"),
    ({"conversations": [{"from": "alien", "value": "a"}]}, 'unknown role "alien"'),
    ({"conversations": [{"from": "human"}]}, '"value" of conversations[0]'),
    ({"conversations": "no list"}, '"conversations" is a string'),
    ({"messages": "[{'role': 'user'}]"}, "pandas"),
    ({"messages": turns(None, "a", "b"), "completion": "c"}, "both"),
    ({"prompt": turns(None, "a", None), "completion": turns(None, "b", "c")}, "user, assistant"),
    ({"system": "a", "messages": turns("b", "c", None)}, "another system message"),
    ({"instruction": "a", "question": "b"}, '"instruction" and "question"'),
    ({"question": "a", "answer": {"value": "b"}}, '"answer" is an object'),
    ({"text": "a"}, "its columns are text"),
    ({"question": None}, '"question" is null or empty'),
]


@pytest.mark.parametrize(("row", "expected"), BAD_ROWS)
def test_a_bad_row_is_one_clear_line(tmp_path, row, expected):
    good = {"messages": turns(None, "good", None)}
    for source, place in (
        (as_json_lines(tmp_path, [good, row]), f"{tmp_path}/rows.jsonl:2: "),
        (as_json(tmp_path, [good, row]), f"{tmp_path}/rows.json: row 2: "),
        ([good, row], "the rows: row 2: "),
    ):
        with pytest.raises(DataError) as caught:
            load_prompts(source)
        message = str(caught.value)
        assert message.startswith(place)
        assert expected in message
        assert "\n" not in message


BAD_FILES = [
    ("a.csv", b"prompt,id\na,1\nb\n", "row 2: it has 1 values"),
    ("a.csv", b"prompt,prompt\na,1\n", "row 0: the header is prompt,prompt"),
    ("a.csv", b'prompt\n"a\n', "row 1: not CSV"),
    ("a.csv", b"prompt\na\ncaf\xe9\n", "row 2: not UTF-8, byte 0xe9"),
    ("a.csv", b"prompt\n", "no prompts in it"),
    ("a.json", b'[{"prompt": "a"},\n {"prompt": "b" "c"}]', "a.json:2: not JSON"),
    ("a.json", b'[{"prompt": "a"}, 3]', "row 2: got a number"),
    ("a.json", b'[{"prompt": "a"}, {"prompt": "b", "prompt": "c"}]', 'row 2: key "prompt" is given twice'),
    ("a.json", b'[{"prompt": "a"}', "a.json:1: not JSON"),
    ("a.json", b'[{"prompt": "a"}] x', "Extra data"),
    ("a.json", b'[{"prompt":\n "\xff"}]', "a.json:2: not UTF-8, byte 0xff"),
    ("a.json", b"[]", "no prompts in it"),
    ("a.parquet", b"PAR1 and no more", "no parquet file"),
    ("a.parquet", b"something else", "no parquet file"),
    ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 100, mtime=0)[:20], "cannot be read"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd....", "zstd"),
    ("a.xlsx", b"PK\x03\x04....", "spreadsheet"),
    ("a.arrow", b"ARROW1....", "an Arrow file"),
    ("a.txt", b"Once upon a time\n", "a.txt:1: not JSON"),
]


@pytest.mark.parametrize(("name", "content", "expected"), BAD_FILES)
def test_a_file_of_another_kind_is_one_clear_line(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_prompts(tmp_path / name)
    assert expected in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3)))
def test_the_items_of_an_array_are_those_of_the_whole_text(value):
    for text in (json.dumps([value, value]), f" [\n{json.dumps(value)}\t]\r\n", "[ ]"):
        assert list(json_items(text)) == json.loads(text)


@given(st.text(st.sampled_from('[]{},:"1 \n'), max_size=8))
def test_a_text_has_items_exactly_where_it_is_an_array(text):
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    try:
        found = list(json_items(text))
    except ValueError:
        found = None
    assert found == (expected if isinstance(expected, list) else None)


# -- tables --


def test_a_table_gives_other_types_as_json(tmp_path):
    import datetime
    from decimal import Decimal

    day = datetime.datetime(2026, 11, 30, 12)
    rows = [{"prompt": "a", "reference": {"at": day, "sum": Decimal("1.50"), "all": [day]}}]
    (prompt,) = load_prompts(as_parquet(tmp_path, rows))
    assert prompt.reference == {"at": "2026-11-30T12:00:00", "sum": "1.50", "all": ["2026-11-30T12:00:00"]}


def test_the_columns_of_a_table_that_are_not_read_are_not_loaded(tmp_path):
    table = pa.table({"prompt": ["a", "b"], "image": [b"\xff", None], "w": [1.0, 0.5]})
    parquet.write_table(table, tmp_path / "a.parquet")
    prompts = load_prompts(tmp_path / "a.parquet", weight="w")
    assert [p.weight for p in prompts] == [1.0, 0.5]
    assert prompts.facts.ignored == ("image",)
    with pytest.raises(DataError, match='row 1: "prompt" is binary data'):
        load_prompts([{"prompt": b"a"}])


ROWS = [{"prompt": f"{n}"} for n in range(5)]


def test_saved_data_sets_have_splits_and_slices(tmp_path):
    alone = as_saved(tmp_path, ROWS)
    assert read(alone) == read(ROWS)
    assert load_prompts(alone).facts.revision
    assert read(datasets.load_from_disk(str(alone))) == read(ROWS)
    both = datasets.DatasetDict({name: datasets.load_from_disk(str(alone)) for name in ("train", "test")})
    both.save_to_disk(str(tmp_path / "both"))
    for split in (None, "test", "train[:9]"):
        assert read(tmp_path / "both", split=split) == read(ROWS)
    assert read(tmp_path / "both", split="test[1:3]") == read(ROWS[1:3])
    with pytest.raises(DataError, match="has no split tset; did you mean test"):
        load_prompts(tmp_path / "both", split="tset")
    with pytest.raises(DataError, match="split 'a b' is none"):
        load_prompts(tmp_path / "both", split="a b")


def test_a_folder_of_data_files_is_read_as_datasets_reads_it(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for part in range(2):
        table = pa.Table.from_pylist(ROWS[part * 2 : part * 2 + 2])
        parquet.write_table(table, folder / f"train-0000{part}-of-00002.parquet")
    parquet.write_table(pa.Table.from_pylist(ROWS[4:]), folder / "test-00000-of-00001.parquet")
    assert read(folder) == read(ROWS[:4])
    assert read(folder, split="train[1:3]") == read(ROWS[1:3])
    assert read(folder, split="test") == read(ROWS[4:])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=re.escape(str(empty))):
        load_prompts(empty)


def test_what_a_source_does_not_have_is_refused(tmp_path):
    file = as_json_lines(tmp_path, ROWS)
    with pytest.raises(DataError, match="is a file, which has no split"):
        load_prompts(file, split="train")
    with pytest.raises(DataError, match="is a folder, which has no revision"):
        load_prompts(as_saved(tmp_path, ROWS), revision="main")


def test_without_the_extra_a_table_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_module, "find_spec", lambda name: None)
    for source in (as_parquet(tmp_path, ROWS), as_saved(tmp_path, ROWS), "nobody/nothing"):
        with pytest.raises(DataError, match=r"pip install 'gold-distill\[data\]'"):
            load_prompts(source)
    for write in (as_json_lines, as_json, as_csv):
        assert read(write(tmp_path, ROWS)) == read(ROWS)


def test_a_folder_names_the_files_that_are_not_read_and_the_one_that_is_broken(tmp_path, caplog, capfd):
    folder = tmp_path / "mixed"
    folder.mkdir()
    as_json_lines(folder, ROWS)
    as_csv(folder, ROWS).rename(folder / "more.csv")
    for name in ("README.md", "notes.txt", "dataset_infos.json"):
        (folder / name).write_text("{}")
    read(folder)
    assert [r.getMessage() for r in caplog.records] == [
        f"{folder}: not read: more.csv; in a folder `datasets` reads the files of one format, or those named for splits"
    ]
    (folder / "broken.jsonl").write_text('{"prompt": "b"\n')
    with pytest.raises(DataError, match=re.escape(f"from file '{folder / 'broken.jsonl'}'")) as caught:
        load_prompts(folder)
    assert "<class" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_two_columns_of_one_name_are_refused(tmp_path):
    file = tmp_path / "twice.parquet"
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["prompt", "prompt"]), file)
    with pytest.raises(DataError, match="several columns named prompt; give each a name of its own"):
        load_prompts(file)
