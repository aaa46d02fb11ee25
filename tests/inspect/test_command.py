"""What `gold align` reads and prints: texts from everywhere, JSON for programs, one line for what it cannot read."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.tokenizers import BOS_ID, EOS_ID, byte_level_bpe, sentencepiece_bpe
from tokenizers import normalizers
from typer.testing import CliRunner

from gold.align.chunks import align_tokens
from gold.cli import app
from gold.errors import DataError, VocabularyError
from gold.inspect import command
from gold.inspect.command import run_align
from gold.inspect.view import AlignmentView
from gold.tokenize.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A byte-level student with a chat template, as a folder, and a byte-fallback teacher, as a file."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "student").mkdir()
    byte_level_bpe().save(str(folder / "student" / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "chat_template": TEMPLATE}
    (folder / "student" / "tokenizer_config.json").write_text(json.dumps(settings))
    sentencepiece_bpe().save(str(folder / "teacher.json"))
    return {"student": str(folder / "student"), "teacher": str(folder / "teacher.json")}


def output(text: str | None, names: dict[str, str], **options: Any) -> str:
    stream = io.StringIO()
    run_align(text, student=names["student"], teacher=names["teacher"], stream=stream, **options)
    return stream.getvalue()


def answer(text: str | None, names: dict[str, str], **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output(text, names, as_json=True, **options))
    return found


def typed(monkeypatch: pytest.MonkeyPatch, data: bytes, terminal: bool = False) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(data))
    stdin.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)


# JSON


def test_json_says_what_the_functions_say(names: dict[str, str]) -> None:
    text = "<bos>The brown dog, 12345 — é\n"
    found = answer(text, names)
    student = Vocabulary.load(names["student"]).encode(text)
    teacher = Vocabulary.load(names["teacher"]).encode(text)
    assert found["bytes"] == len(text.encode())
    for side, tokenized in (("student", student), ("teacher", teacher)):
        assert found[side] == {
            "ids": tokenized.ids.tolist(),
            "ends": tokenized.ends.tolist(),
            "repaired_bytes": 0,
        }
        assert found[side]["ends"][-1] == found["bytes"]
    assert found["chunks"] == align_tokens(student, teacher).chunks.tolist()
    assert found["repaired_bytes"] == 0
    assert "score" not in found
    assert set(found["coverage"]) >= {"student_tokens", "teacher_tokens", "bytes", "largest_chunk_bytes"}


def test_shared_tokens_are_those_whose_bytes_the_other_vocabulary_has(names: dict[str, str]) -> None:
    found = answer("The brown dog, 12345 — é 日本", names)
    sides = {side: Vocabulary.load(names[side]) for side in ("student", "teacher")}
    spelled = {side: {v.token_bytes(i) for i in range(v.size)} - {b""} for side, v in sides.items()}
    for side, other in (("student", "teacher"), ("teacher", "student")):
        ids = found[side]["ids"]
        shared = [sides[side].token_bytes(index) in spelled[other] for index in ids]
        assert found["coverage"][f"shared_{side}_tokens"] == pytest.approx(np.mean(shared))
        assert 0 < sum(shared) < len(shared)


def test_an_empty_text_is_an_empty_alignment(names: dict[str, str], tmp_path: Path) -> None:
    found = answer("", names)
    assert (found["bytes"], found["chunks"], found["student"]["ids"]) == (0, [], [])
    assert "0 chunks" in output("", names)
    assert answer(None, names, ids="")["chunks"] == []
    output("", names, html=tmp_path / "page.html")
    assert "0 chunks" in (tmp_path / "page.html").read_text()


# Files and standard input


def test_a_file_is_read_as_bytes(names: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"a\xff\r\n\x00")
    found = answer(None, names, file=file)
    assert found["bytes"] == 5
    # Both sides read U+FFFD in place of the byte that is no text.
    assert (found["student"]["repaired_bytes"], found["teacher"]["repaired_bytes"]) == (1, 1)
    assert r"\xff" in output(None, names, file=file)


@pytest.mark.parametrize("how", [{"text": None}, {"text": "-"}, {"text": None, "file": Path("-")}])
def test_standard_input_is_a_text(
    names: dict[str, str], monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    typed(monkeypatch, b"the dog\n\xff")
    assert answer(names=names, **how)["bytes"] == 9


def test_nobody_waits_for_a_text_that_is_typed(
    names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, b"", terminal=True)
    with pytest.raises(DataError, match="no text: give TEXT, --file, --jsonl, --chat or --ids, or pipe"):
        output(None, names)
    assert answer("-", names)["bytes"] == 0  # asked for


def test_one_text_at_most(names: dict[str, str], tmp_path: Path) -> None:
    for options in ({"file": tmp_path}, {"ids": "1"}, {"jsonl": tmp_path}, {"chat": tmp_path}):
        with pytest.raises(DataError, match="at most one of"):
            output("a", names, **options)


def test_a_text_that_is_too_long_is_refused_before_it_is_read(
    names: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tmp_path / "large"
    with open(large, "wb") as stream:
        stream.truncate(100_000_000)
    start = time.process_time()
    for option in ("file", "chat", "jsonl"):
        with pytest.raises(DataError, match=r"large(:1)?: .*8 MiB"):
            output(None, names, **{option: large})
    assert time.process_time() - start < 10
    monkeypatch.setattr(command, "MOST_BYTES", 2**20)
    typed(monkeypatch, b"a" * (2**20 + 1))
    with pytest.raises(DataError, match="-: more than 1 MiB"):
        output(None, names)


# JSON lines


def test_jsonl_answers_each_text(names: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"text": "the dog"}\r\n\n{"text": "\\ud83d\\ude42", "other": 1}\n{"text": "\\ud800"}\n'
    )
    answers = [json.loads(line) for line in output(None, names, jsonl=file).splitlines()]
    assert [found["bytes"] for found in answers] == [7, 4, 3]
    assert answers[0] == answer("the dog", names)
    assert answers[2]["repaired_bytes"] == 6


def test_each_line_is_answered_before_the_next_is_read(
    names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Out(io.StringIO):
        flushed = 0

        def flush(self) -> None:
            self.flushed = self.getvalue().count("\n")

    out, seen = Out(), []

    class Lines(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            seen.append(out.flushed)
            return super().readline(size)

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Lines(b'{"text": "a"}\n' * 3)))
    run_align(None, jsonl=Path("-"), stream=out, **names)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "bad", ["{", "3", '{"prompt": "a"}', '{"text": 1}', '{"text": "a"', "\xff", "[" * 100_000]
)
def test_a_bad_line_is_named(names: dict[str, str], tmp_path: Path, bad: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n' + bad.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=r"texts\.jsonl:3: ") as caught:
        output(None, names, jsonl=file)
    assert "\n" not in str(caught.value)


# The student's own ids


@pytest.mark.parametrize("given", ["40 41 42", "40,41, 42", "[40, 41, 42]", " [40,41,42]\n"])
def test_ids_are_the_student_s_own(names: dict[str, str], given: str) -> None:
    found = answer(None, names, ids=given)
    assert found["student"]["ids"] == [40, 41, 42]
    spelled = Vocabulary.load(names["student"]).decode([40, 41, 42])
    assert found["bytes"] == len(spelled.data)
    assert found["teacher"]["ids"] == Vocabulary.load(names["teacher"]).encode(spelled.data).ids.tolist()


def test_ids_need_be_neither_canonical_nor_text(names: dict[str, str]) -> None:
    student = Vocabulary.load(names["student"])
    ids = [index for byte in (b"t", b"h", b"e", b"\xf0", b"\x9f") for index in _spelling(student, byte)]
    found = answer(None, names, ids=str(ids))
    assert found["student"] == {"ids": ids, "ends": [1, 2, 3, 4, 5], "repaired_bytes": 0}
    assert found["teacher"]["repaired_bytes"] == 2


def test_events_beside_the_ids_are_no_tokens_of_the_text(names: dict[str, str]) -> None:
    student = Vocabulary.load(names["student"])
    own = student.encode("the dog").ids.tolist()
    found = answer(None, names, ids=f"{[BOS_ID, *own, EOS_ID]}")
    assert found["student"]["ids"] == own
    assert (found["student"]["bos_id"], found["student"]["stop_ids"]) == (BOS_ID, [EOS_ID])
    assert found["chunks"] == answer("the dog", names)["chunks"]
    # An event within the text stays, without a width.
    inside = answer(None, names, ids=str([*own, EOS_ID, *own]))
    assert inside["student"]["ids"] == [*own, EOS_ID, *own]
    assert "⟨<eos>⟩" in output(None, names, ids=str([*own, EOS_ID, *own]))


def test_a_marker_among_the_ids_is_the_text_that_it_looks_like(names: dict[str, str], tmp_path: Path) -> None:
    marked = {}
    for side, tokenizer in (("student", byte_level_bpe()), ("teacher", sentencepiece_bpe())):
        tokenizer.add_special_tokens(["<tool>"])
        tokenizer.save(str(tmp_path / f"{side}.json"))
        marked[side] = str(tmp_path / f"{side}.json")
    student, teacher = (Vocabulary.load(marked[side]) for side in ("student", "teacher"))
    mine, theirs = student.markers["<tool>"], teacher.markers["<tool>"]
    own = student.encode("the dog").ids.tolist()
    ids = str([*own, mine, *own])
    found = answer(None, marked, ids=ids)
    assert found["bytes"] == len("the dog<tool>the dog")
    assert theirs in found["teacher"]["ids"]
    assert [len(own), len(own) + 1] in [chunk[:2] for chunk in found["chunks"]]
    # A teacher without the marker spells it; typed, it is no marker on either side.
    other = answer(None, {**marked, "teacher": names["teacher"]}, ids=ids)
    assert (other["bytes"], other["repaired_bytes"]) == (found["bytes"], 0)
    typed = answer("the dog<tool>the dog", marked)
    assert mine not in typed["student"]["ids"]
    assert theirs not in typed["teacher"]["ids"]


def test_a_teacher_of_the_same_vocabulary_reads_the_student_s_ids(names: dict[str, str]) -> None:
    student = Vocabulary.load(names["student"])
    ids = [index for byte in (b"t", b"h", b"e") for index in _spelling(student, byte)]
    found = answer(None, {"student": names["student"], "teacher": names["student"]}, ids=str(ids))
    assert found["teacher"]["ids"] == ids
    assert found["coverage"]["one_to_one_chunks"] == 3


def _spelling(vocabulary: Vocabulary, data: bytes) -> list[int]:
    return [next(i for i in range(vocabulary.size) if vocabulary.token_bytes(i) == data)]


@pytest.mark.parametrize("bad", ["1 x", "1.5", "-1", "1;2", "{}", "99999999999", "٣"])
def test_bad_ids_are_named(names: dict[str, str], bad: str) -> None:
    with pytest.raises(DataError, match=r"--ids: .* is no id; give whole numbers"):
        output(None, names, ids=bad)


def test_ids_beyond_the_vocabulary_are_refused(names: dict[str, str]) -> None:
    with pytest.raises(VocabularyError, match="id 400000 at position 1 is outside the 400 ids"):
        output(None, names, ids="5 400000")


# Conversations

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the <eos> dog?"},
    {"role": "assistant", "content": "The dog."},
]


def conversation(tmp_path: Path, messages: Any = MESSAGES) -> Path:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps(messages))
    return file


def test_every_turn_of_the_assistant_is_aligned(names: dict[str, str], tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "12", "name": "f"},
        {"role": "assistant", "content": "The dog."},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "12"},
    ]
    out = io.StringIO()
    run_align(None, **names, chat=conversation(tmp_path, turns), as_json=True, stream=out)
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [one["bytes"] for one in found] == [len("The dog."), 2]
    before, after = (one["student"]["prompt_ids"] for one in found)
    assert len(after) > len(before)


def test_each_side_reads_its_own_template(names: dict[str, str], tmp_path: Path) -> None:
    chat = conversation(tmp_path)
    found = answer(None, names, chat=chat)
    assert found["bytes"] == len("The dog.")
    assert found["student"]["stop_ids"] == [EOS_ID]
    student = Vocabulary.load(names["student"])
    prompt = found["student"]["prompt_ids"]
    # The template's own tokens are events, the text of one in a message is not.
    assert [prompt.count(index) for index in (BOS_ID, EOS_ID)] == [2, 2]
    assert b"the <eos> dog?" in student.decode(prompt).data
    teacher = Vocabulary.load(names["teacher"])
    bos, *rest = found["teacher"]["prompt_ids"]
    assert bos == BOS_ID
    assert teacher.decode(rest).data == b"Be brief.\n\nUser: the <eos> dog?\n\nAssistant:"
    shown = output(None, names, chat=chat)
    assert "student reads\n⟨<bos>⟩system: Be brief.⟨<eos>⟩⟨<bos>⟩user: the <eos> dog?⟨<eos>⟩>\n" in shown
    assert "teacher reads\n⟨<bos>⟩Be brief.⏎\n⏎\nUser: the <eos> dog?" in shown
    page = tmp_path / "page.html"
    output(None, names, chat=chat, html=page)
    assert "<em>⟨&lt;bos&gt;⟩</em>user: the &lt;eos&gt; dog?<em>⟨&lt;eos&gt;⟩</em>" in page.read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("{}", "needs a list of"),
        ("[]", "needs a list of"),
        ('["a"]', "needs a list of"),
        ('[{"role": "user", "content": "a"}]', "ends with a message of the assistant"),
        ('[{"role": "assistant", "content": "a"}]', "is empty"),
        ('[{"role": "user", "content": "a"}, {"role": "assistant"}]', "ends with a message of the assistant"),
        ('[{"role": "usr", "content": "a"}, {"role": "assistant", "content": "a"}]', 'unknown role "usr"'),
        ('[3, {"role": "assistant", "content": "a"}]', r"messages\[0\] is"),
    ],
)
def test_a_bad_conversation_is_named(names: dict[str, str], tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "messages.json"
    file.write_text(content)
    with pytest.raises(DataError, match=rf"messages\.json: .*{said}") as caught:
        output(None, names, chat=file)
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_the_messages_is_named(names: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "strict"
    folder.mkdir()
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system messages') }}")
    with pytest.raises(DataError, match=r"strict: .*refuses the messages: no system messages"):
        output(None, {"student": str(folder), "teacher": names["teacher"]}, chat=conversation(tmp_path))


# Pages and models


def test_a_page_is_written_in_place_of_the_picture(names: dict[str, str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    shown = output("the dog", names, html=page)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "┃" not in shown
    assert shown.endswith(f"written: {page}\n")
    assert answer("the dog", names, html=page)["bytes"] == 7
    with pytest.raises(DataError, match=r"cannot be written: Is a directory"):
        output("the dog", names, html=tmp_path)
    with pytest.raises(DataError, match="--html is a page of one text"):
        output(None, names, jsonl=page, html=page)


class Scorer:
    """Halves a bit for every token, but for the first of the student."""

    def __init__(self, student: str, teacher: str) -> None:
        self.vocabularies = Vocabulary.load(student), Vocabulary.load(teacher)
        self.tokenizers = None, None

    def score(self, view: AlignmentView) -> AlignmentView:
        from dataclasses import replace

        if b"bad" in view.data:
            raise DataError("the text is bad")
        student = np.full(len(view.student), -0.5)
        student[:1] = np.nan
        teacher = np.full(len(view.teacher), -0.5)
        return AlignmentView(replace(view.student, logp_N=student), replace(view.teacher, logp_N=teacher))


def test_a_scored_text_has_its_log_probabilities(names: dict[str, str]) -> None:
    found = answer("the dog", names, load_scorer=Scorer)
    assert found["student"]["logp"] == [None, *[-0.5] * (len(found["student"]["ids"]) - 1)]
    assert found["teacher"]["logp"] == [-0.5] * len(found["teacher"]["ids"])
    assert found["score"]["scored_bytes"] < found["bytes"]
    shown = output("the dog", names, load_scorer=Scorer)
    assert "bits per byte: " in shown
    assert "reverse KL, this sample alone: " in shown
    assert f"scored: {found['score']['scored_bytes']} of 7 bytes; " in shown


def test_an_error_of_a_line_names_it(names: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "good"}\n{"text": "bad"}\n')
    with pytest.raises(DataError, match=r"texts\.jsonl:2: the text is bad"):
        output(None, names, jsonl=file, load_scorer=Scorer)


# What cannot be read is one line, and exit 1


def _broken(folder: Path) -> list[str]:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    return ["--student", str(folder), "a"]


def _slow_only(folder: Path) -> list[str]:
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return ["--student", str(folder), "a"]


def _binary_tokenizer(folder: Path) -> list[str]:
    (folder / "tokenizer.json").write_bytes(bytes(range(256)))
    return ["--student", str(folder / "tokenizer.json"), "a"]


def _unspelled(folder: Path) -> list[str]:
    tokenizer = byte_level_bpe()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.model.dropout = 0.1
    tokenizer.save(str(folder / "tokenizer.json"))
    return ["--student", str(folder), "a"]


def _bad_line(folder: Path) -> list[str]:
    (folder / "texts.jsonl").write_text('{"txt": "a"}\n')
    return ["--jsonl", str(folder / "texts.jsonl")]


def _large(folder: Path) -> list[str]:
    with open(folder / "large", "wb") as stream:
        stream.truncate(100_000_000)
    return ["--file", str(folder / "large")]


BAD = {
    "missing folder": (lambda folder: ["--student", str(folder / "none"), "a"], "no such file or folder"),
    "broken tokenizer.json": (_broken, "tokenizer.json"),
    "slow-only tokenizer": (_slow_only, "tokenizer"),
    "a family that cannot be spelled": (_unspelled, "dropout"),
    "binary tokenizer.json": (_binary_tokenizer, "tokenizer.json"),
    "missing file": (lambda folder: ["--file", str(folder / "none")], "cannot be read: No such file"),
    "folder as a file": (lambda folder: ["--file", str(folder)], "cannot be read: Is a directory"),
    "100 MB": (_large, "more than 8 MiB"),
    "a line without text": (_bad_line, ':1: needs an object with a string "text"'),
    "ids": (lambda folder: ["--ids", "1 two"], "'two' is no id"),
    "chat": (lambda folder: ["--chat", str(folder / "none")], "cannot be read: No such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_1(names: dict[str, str], tmp_path: Path, case: str) -> None:
    make, said = BAD[case]
    arguments = make(tmp_path)
    for side in ("student", "teacher"):
        if f"--{side}" not in arguments:
            arguments += [f"--{side}", names[side]]
    done = CliRunner().invoke(app, ["align", *arguments])
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


# Speed


def run_gold(arguments: list[str], then: str = "") -> float:
    """CPU seconds that a command takes in a fresh interpreter, which then runs a line more."""
    return run_python(
        f"import gold.cli, sys; sys.argv = {['gold', *arguments]}\n"
        f"try: gold.cli.main()\nexcept SystemExit as end: assert not end.code\n{then}"
    )


def run_python(program: str) -> float:
    """CPU seconds of a program in a fresh interpreter."""
    before = os.times()
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=ROOT, timeout=900)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def pair(names: dict[str, str]) -> list[str]:
    return ["--student", names["student"], "--teacher", names["teacher"]]


def test_it_is_quick(names: dict[str, str]) -> None:
    """A few times what the libraries that it cannot do without take to import, and far less than torch takes."""
    command = min(run_gold(["align", "x y" * 33, *pair(names)]) for _ in range(3))
    imports = min(run_python("import numpy, pydantic, rich, tokenizers, typer, yaml") for _ in range(3))
    assert command < 6 * imports, (command, imports)


def test_no_model_library_is_loaded(names: dict[str, str], tmp_path: Path) -> None:
    heavy = "{'torch', 'transformers', 'numba', 'matplotlib', 'huggingface_hub'}"
    page = tmp_path / "page.html"
    chat = ["--chat", str(conversation(tmp_path)), "--html", str(page)]
    run_gold(["align", "x y" * 33, *pair(names)], f"assert not {heavy} & set(sys.modules)")
    run_gold(["align", *chat, *pair(names)], f"assert not {heavy} & set(sys.modules)")
    assert page.exists()
