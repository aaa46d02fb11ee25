"""What `gold align` prints: a picture for a person, JSON for programs."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers_for_tests import byte_level_bpe, families, sentencepiece_bpe

from gold.align import Vocabulary, align_tokens
from gold.align.command import run_align
from gold.errors import DataError, VocabularyError


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A byte-level student and a byte-fallback teacher, as files."""
    folder = tmp_path_factory.mktemp("tokenizers")
    byte_level_bpe().save(str(folder / "student.json"))
    sentencepiece_bpe().save(str(folder / "teacher.json"))
    return {side: str(folder / f"{side}.json") for side in ("student", "teacher")}


def output(text: str | None, names: dict[str, str], **options: object) -> str:
    stream = io.StringIO()
    run_align(text, student=names["student"], teacher=names["teacher"], stream=stream, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def test_json_says_what_the_functions_say(names: dict[str, str]) -> None:
    text = "<bos>The brown dog, 12345 — é\n"
    found = json.loads(output(text, names, as_json=True))
    student = Vocabulary.load(names["student"]).encode(text)
    teacher = Vocabulary.load(names["teacher"]).encode(text)
    assert found["bytes"] == len(text.encode())
    for side, spelling in (("student", student), ("teacher", teacher)):
        assert found[side]["ids"] == spelling.ids.tolist()
        assert found[side]["ends"] == spelling.ends.tolist()
        assert found[side]["ends"][-1] == found["bytes"]
    assert found["chunks"] == align_tokens(student, teacher).chunks.tolist()
    assert found["repaired_bytes"] == 0
    assert set(found["coverage"]) >= {"student_tokens", "teacher_tokens", "bytes", "largest_chunk_bytes"}


def test_an_empty_text_is_an_empty_alignment(names: dict[str, str]) -> None:
    found = json.loads(output("", names, as_json=True))
    assert (found["bytes"], found["chunks"], found["student"]["ids"]) == (0, [], [])
    assert "0 chunks" in output("", names)


def test_jsonl_answers_each_text(names: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "the dog"}\n\n{"text": "\\ud83d\\ude42", "other": 1}\n{"text": "\\ud800"}\n')
    answers = [json.loads(line) for line in output(None, names, jsonl=file).splitlines()]
    assert [answer["bytes"] for answer in answers] == [7, 4, 3]
    assert answers[2]["repaired_bytes"] == 6


@pytest.mark.parametrize("bad", ["{", "3", '{"prompt": "a"}', '{"text": 1}', '{"text": "a"', "\xff"])
def test_a_bad_line_is_named(names: dict[str, str], tmp_path: Path, bad: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_bytes(b'{"text": "a"}\n\n' + bad.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=r"texts\.jsonl:3: ") as caught:
        output(None, names, jsonl=file)
    assert "\n" not in str(caught.value)


def test_a_file_is_read_as_bytes(names: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"a\xff\r\n")
    assert json.loads(output(None, names, file=file, as_json=True))["bytes"] == 4
    with pytest.raises(DataError, match="cannot be read: No such file"):
        output(None, names, file=tmp_path / "none")


def test_one_text_is_needed(names: dict[str, str], tmp_path: Path) -> None:
    for arguments in ((None, {}), ("a", {"file": tmp_path})):
        with pytest.raises(DataError, match="exactly one of"):
            output(arguments[0], names, **arguments[1])


def test_a_tokenizer_that_is_none_is_named() -> None:
    with pytest.raises(VocabularyError, match=r"none\.json"):
        output("a", {"student": "none.json", "teacher": "none.json"})


def test_the_picture_shows_both_sides_and_all_white_space(names: dict[str, str]) -> None:
    shown = output("the dog\tsat\r\n\x00 e\u0301 日", names)
    assert "\x1b" not in shown
    rows = shown.split("\n\n")[0].splitlines()
    assert [row[:8] for row in rows] == ["student ", "teacher "]
    # The edges stand one under the other.
    assert rows[0].count("┃") == rows[1].count("┃") > 5
    for mark in ("·dog", "⇥", "␍", "⏎", r"\x00"):
        assert mark in shown
    assert "22 bytes: " in shown
    assert "repaired: 0 bytes (student), 0 bytes (teacher)" in shown


def test_the_picture_marks_what_is_not_the_text_s(tmp_path: Path) -> None:
    families()["byte-level, NFC"].save(str(tmp_path / "nfc.json"))
    families()["byte-fallback, prepend"].save(str(tmp_path / "prepend.json"))
    shown = output(
        "e\u0301 x", {"student": str(tmp_path / "nfc.json"), "teacher": str(tmp_path / "prepend.json")}
    )
    assert "e\u0301~" in shown
    assert "repaired: 3 bytes (student), 0 bytes (teacher)" in shown


def test_a_long_text_is_folded_to_the_width(names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    shown = output("the quick brown fox jumps over the lazy dog " * 3, names)
    picture = [line for line in shown.splitlines() if line.startswith(("student", "teacher"))]
    assert len(picture) > 4
    assert max(map(len, picture)) <= 50


def test_colours_only_on_a_terminal(names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[32m" in output("the dog", names)
    assert "\x1b[3" not in output("the dog", names, color=False)


@pytest.mark.slow
def test_it_is_quick(names: dict[str, str]) -> None:
    program = f"from gold.align.command import run_align; run_align('x' * 100, **{names!r})"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, cwd=Path(__file__).parents[2]
        )
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1
