"""The picture in a terminal: all of the text on both rows, in columns, within the width."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from support.texts import data
from support.tokenizers import BOS_ID, EOS_ID, byte_level_bpe, sentencepiece_bpe
from support.views import view_of

from gold.inspect import view as view_module
from gold.inspect.command import run_align
from gold.inspect.terminal import _lines, show_alignment
from gold.inspect.view import AlignmentView, TokenizedSide, visible
from gold.tokenize.vocabulary import Vocabulary

PAIRS = [
    ("byte-level", "byte-fallback"),
    ("byte-level, NFC", "characters"),
    ("characters", "byte-fallback, prepend"),
    ("byte-level, NFKC and lower case", "byte-fallback, unknown characters"),
]


def picture(view: AlignmentView, width: int = 80) -> str:
    out = io.StringIO()
    show_alignment(view, Console(file=out, width=width, highlight=False, emoji=False, markup=False))
    return out.getvalue()


def rows(shown: str) -> list[tuple[str, str]]:
    """The rows of each line, without their labels."""
    lines = [line[8:] for line in shown.splitlines() if line.startswith(("student ", "teacher "))]
    return list(zip(lines[::2], lines[1::2], strict=True))


def own_text(row: Text) -> str:
    """What a row says of the text itself: no separators, no names."""
    beside = sorted((s.start, s.end) for s in row.spans if s.style in ("dim", "magenta"))
    edges = [0, *(edge for span in beside for edge in span), len(row.plain)]
    return "".join(row.plain[a:b] for a, b in list(pairwise(edges))[::2]).replace("\u200e", "")


def columns(row: Text) -> list[int]:
    """The cells at which chunks are separated."""
    return [cell_len(row.plain[: s.start]) for s in row.spans if row.plain[s.start : s.end] == " ┃ "]


@settings(max_examples=60)
@given(data, st.sampled_from(PAIRS), st.integers(40, 100))
def test_both_rows_show_the_whole_text_in_columns(text: bytes, pair: tuple[str, str], room: int) -> None:
    view = view_of(text, *pair)
    lines = list(_lines(view, room))
    for line in lines:
        assert columns(line[0]) == columns(line[1])
        assert all(cell_len(row.plain.rstrip()) <= room for row in line)
    for side, place in zip(view.sides, (0, 1), strict=True):
        ends = side.tokenized.ends.tolist()
        expected = "".join(
            run for a, b in pairwise([0, *ends]) for run, _ in visible(side.tokenized.data[a:b])
        )
        found = "".join(own_text(line[place]).rstrip(" ") for line in lines)
        assert found.replace("◌", "").replace(" ", "") == expected.replace("◌", "")


@settings(max_examples=60)
@given(st.text("ab日é\u0301🙂 ", min_size=1, max_size=60), st.integers(20, 60))
def test_a_wide_chunk_goes_on_at_the_same_byte_of_both_rows(text: str, room: int) -> None:
    # Nothing but the end of the text is an edge of both.
    student = view_of(text, "characters", "characters").student
    tokenized = student.tokenized
    keep = tokenized.ends[::-7][::-1]
    other = replace(tokenized, ids=tokenized.ids[: len(keep)], ends=keep, exact=tokenized.exact[: len(keep)])
    inner = replace(tokenized, ends=tokenized.ends.copy())
    inner.ends[:-1] -= inner.ends[:-1] % 7 == len(tokenized.data) % 7
    view = AlignmentView(replace(student, tokenized=inner), replace(student, tokenized=other))
    for above, below in _lines(view, room):
        assert max(cell_len(above.plain.rstrip()), cell_len(below.plain.rstrip())) <= max(room, 24)
        a, b = (bytes_of(own_text(row)) for row in (above, below))
        assert a.replace(b" ", b"") == b.replace(b" ", b"")


def bytes_of(shown: str) -> bytes:
    """The bytes that a shown text of this test stands for; only hexadecimal ones have a backslash."""
    parts = shown.replace("◌", "").split("\\x")
    tail = [bytes([int(part[:2], 16)]) + part[2:].encode() for part in parts[1:]]
    return parts[0].encode() + b"".join(tail)


def test_a_chunk_wider_than_the_terminal() -> None:
    text = "xyz" * 30
    view = view_of(text, "characters", "characters")
    tokenized = view.student.tokenized
    ends = [*range(4, 90, 4), 90]
    fours = replace(
        tokenized,
        ids=tokenized.ids[: len(ends)],
        ends=tokenized.ends[[e - 1 for e in ends]],
        exact=tokenized.exact[: len(ends)],
    )
    one = replace(tokenized, ids=tokenized.ids[:1], ends=tokenized.ends[-1:], exact=tokenized.exact[:1])
    shown = picture(
        AlignmentView(replace(view.student, tokenized=fours), replace(view.student, tokenized=one)), 40
    )
    assert rows(shown) == [
        ("xyzx¦yzxy¦zxyz¦xyzx¦yzxy¦zxyz¦", "xyzxyzxyzxyzxyzxyzxyzxyz⋯"),
        ("xyzx¦yzxy¦zxyz¦xyzx¦yzxy¦zxyz¦", "⋯xyzxyzxyzxyzxyzxyzxyzxyz⋯"),
        ("xyzx¦yzxy¦zxyz¦xyzx¦yzxy¦zxyz¦", "⋯xyzxyzxyzxyzxyzxyzxyzxyz⋯"),
        ("xyzx¦yzxy¦zxyz¦xyzx¦yz", "⋯xyzxyzxyzxyzxyzxyz"),
    ]
    assert "⋯ goes on in the next line" in shown


def test_a_chunk_goes_on_after_whole_characters() -> None:
    text = "a" + "\u0301" * 300 + "b" * 80
    side = view_of(text, "characters", "characters").student
    whole = replace(
        side.tokenized,
        ids=side.tokenized.ids[:1],
        ends=side.tokenized.ends[-1:],
        exact=side.tokenized.exact[:1],
    )
    view = AlignmentView(replace(side, tokenized=whole), replace(side, tokenized=whole))
    assert "\\x" not in picture(view)


def test_the_picture_shows_both_sides_and_all_white_space() -> None:
    shown = picture(view_of("the dog\tsat\r\n\x00 e\u0301 日"))
    assert "\x1b" not in shown
    assert [len(set(map(columns_of, pair))) for pair in rows(shown)] == [1, 1]
    for mark in ("·dog", "⇥", "␍", "⏎", r"\x00"):
        assert mark in shown
    assert "22 bytes: " in shown
    assert "repaired: 0 bytes (student), 0 bytes (teacher)" in shown
    assert "no bytes of the text" not in shown


def columns_of(row: str) -> tuple[int, ...]:
    widths = list(accumulate(map(cell_len, row), initial=0))
    return tuple(widths[i] for i, character in enumerate(row) if character == "┃")


def test_the_picture_marks_what_is_not_the_text_s() -> None:
    shown = picture(view_of("e\u0301 x", "byte-level, NFC", "byte-fallback, prepend"))
    assert "e\u0301~" in shown
    assert "~ other bytes than the text's" in shown
    assert "repaired: 3 bytes (student), 0 bytes (teacher)" in shown
    # A text that has such a mark needs no legend.
    assert "other bytes" not in picture(view_of("a ~ b"))


def test_each_line_of_the_text_begins_a_line_of_the_picture() -> None:
    shown = rows(picture(view_of("def f():\n    return 1\n")))
    assert len(shown) == 2
    assert [above.endswith("⏎") for above, _ in shown] == [True, True]


def test_columns_are_counted_in_cells() -> None:
    shown = rows(picture(view_of("日本語 🙂 x " * 4), width=60))
    assert len(shown) > 1
    for above, below in shown:
        assert columns_of(above) == columns_of(below)
        assert max(cell_len(above), cell_len(below)) <= 52


def test_scripts_from_right_to_left_keep_the_order_of_tokens() -> None:
    text = "שלום עולם"
    hebrew = Vocabulary(byte_level_bpe([text] * 3, 320))
    side = TokenizedSide("hebrew", hebrew, hebrew.encode(text), 1.0)
    ((above, _),) = rows(picture(AlignmentView(side, side)))
    assert above == " ┃ ".join(f"{word}\u200e" for word in ("שלום", "·עולם"))
    assert "\u200e" not in picture(view_of("the dog"))


def test_events_stand_beside_the_text_and_repeated_ones_are_counted() -> None:
    view = view_of("a", bos_id=BOS_ID, stop_ids=(EOS_ID,))
    assert rows(picture(view))[0] == ("⟨<bos>⟩ ┃ a ┃ ⟨<eos>⟩",) * 2
    assert rows(picture(AlignmentView(view.student, replace(view.teacher, bos_id=None))))[0][1].startswith(
        "–       ┃"
    )
    vocabulary = view.student.vocabulary
    pads = replace(view.student, tokenized=vocabulary.decode([*view.student.tokenized.ids, *[EOS_ID] * 12]))
    assert rows(picture(AlignmentView(pads, view.teacher)))[0][0] == "⟨<bos>⟩ ┃ a¦⟨<eos>⟩×12 ┃ ⟨<eos>⟩"
    inside = vocabulary.decode([vocabulary.encode(c).ids[0] if c else EOS_ID for c in ("a", "", "b")])
    two = view_of("ab", "characters", "characters")
    shown = rows(picture(AlignmentView(replace(view.student, tokenized=inside), two.teacher)))
    assert shown[0] == ("⟨<bos>⟩ ┃ a ┃ ⟨<eos>⟩¦b ┃ ⟨<eos>⟩", "–       ┃ a ┃ b         ┃ –")


def test_of_a_long_text_the_beginning_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "DRAWN_BYTES", 40)
    view = view_of("the dog sleeps. " * 100)
    shown = picture(view)
    drawn = sum(len(above.replace(" ┃ ", "").replace("¦", "")) for above, _ in rows(shown))
    assert 40 <= drawn < 60
    assert f"the picture ends at byte {drawn} of 1600; --json has all of them" in shown
    assert "1600 bytes: " in shown


# Colours


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    byte_level_bpe().save(str(folder / "student.json"))
    sentencepiece_bpe().save(str(folder / "teacher.json"))
    return {side: str(folder / f"{side}.json") for side in ("student", "teacher")}


def output(text: str, names: dict[str, str], **options: object) -> str:
    stream = io.StringIO()
    run_align(text, stream=stream, **names, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def test_colours_only_where_they_are_wanted(names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in output("the dog", names)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[32m" in output("the dog", names)
    assert "\x1b" not in output("the dog", names, color=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in output("the dog", names)


def test_an_encoding_that_lacks_a_character_is_no_obstacle(names: dict[str, str]) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1", write_through=True)
    run_align("日 dog", stream=stream, **names)
    assert rb"\u65e5" in raw.getvalue()


@pytest.mark.parametrize("width", [80, 50])
def test_a_real_terminal(names: dict[str, str], width: int) -> None:
    own, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    arguments = [sys.executable, "-m", "gold", "align", "--student", names["student"]]
    arguments += ["--teacher", names["teacher"], "the quick brown fox jumps over 日本 " * 5]
    process = subprocess.Popen(
        arguments,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm-256color"},
        cwd=Path(__file__).parents[2],
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(own, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(own)
    assert process.wait(60) == 0
    shown = Text.from_ansi(written.decode().replace("\r\n", "\n"))
    assert "\x1b[32m" in written.decode()
    lines = shown.plain.splitlines()
    assert max(map(cell_len, lines)) <= width
    assert len([line for line in lines if line.startswith("student ")]) > 3
