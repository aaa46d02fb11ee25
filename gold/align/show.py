"""An alignment for a person: both tokenizations one under the other, chunk by chunk, and what they have in common."""

import unicodedata
from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from gold.align.chunks import Alignment, coverage
from gold.align.vocabulary import Spelling

_VISIBLE = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
_BETWEEN_TOKENS, _BETWEEN_CHUNKS = "|", " ┃ "
_LABELS = ("student ", "teacher ")


def show_alignment(student: Spelling, teacher: Spelling, alignment: Alignment, console: Console) -> None:
    """Prints the picture and the summary of one alignment.

    Chunks stand between `┃`, the tokens of a chunk between `|`. White space is visible; bytes that are no character by
    themselves are hexadecimal; `∅` is a token of no width, `~` one whose own bytes are not those of the text.
    """
    for rows in _lines(student, teacher, alignment, console.width):
        for label, row in zip(_LABELS, rows, strict=True):
            console.print(Text.assemble((label, "dim"), row), no_wrap=True, overflow="ignore", crop=False)
        console.print()
    for line in _summary(student, teacher, alignment):
        console.print(line, highlight=False, soft_wrap=True)


def _lines(
    student: Spelling, teacher: Spelling, alignment: Alignment, width: int
) -> Iterator[tuple[Text, Text]]:
    """The two rows of each line of the picture, as many chunks in a line as there is room for."""
    room = width - len(_LABELS[0])
    above, below, used = Text(), Text(), 0
    plain = _pieces(student), _pieces(teacher)
    for s0, s1, t0, t1 in alignment.chunks.tolist():
        cells = _BETWEEN_TOKENS.join(plain[0][s0:s1]), _BETWEEN_TOKENS.join(plain[1][t0:t1])
        wide = max(map(cell_len, cells))
        if used and used + len(_BETWEEN_CHUNKS) + wide > room:
            yield above, below
            above, below, used = Text(), Text(), 0
        style = "green" if s1 - s0 == t1 - t0 == 1 else "yellow"
        for row, cell in zip((above, below), cells, strict=True):
            if used:
                row.append(_BETWEEN_CHUNKS, "dim")
            row.append(cell, style)
            row.append(" " * (wide - cell_len(cell)))
        used += wide + (len(_BETWEEN_CHUNKS) if used else 0)
    if used:
        above.rstrip()
        below.rstrip()
        yield above, below


def _pieces(spelling: Spelling) -> list[str]:
    rows = zip(spelling.starts.tolist(), spelling.ends.tolist(), spelling.exact.tolist(), strict=True)
    return [
        (_visible(spelling.data[start:end]) if end > start else "∅") + ("" if exact else "~")
        for start, end, exact in rows
    ]


def _visible(data: bytes) -> str:
    text = data.decode("utf-8", "backslashreplace")
    shown = [
        _VISIBLE.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode("ascii"))
        for c in text
    ]
    joined = unicodedata.category(text[0]).startswith("M")
    return ("◌" if joined else "") + "".join(shown)


def _summary(student: Spelling, teacher: Spelling, alignment: Alignment) -> list[str]:
    found = coverage(student, teacher, alignment)
    return [
        f"{len(student.data)} bytes: {len(student)} student tokens, {len(teacher)} teacher tokens, "
        f"{found.chunks} chunks",
        f"one token on both sides: {found.one_to_one_chunks} chunks = {found.student_tokens:.0%} of the student's "
        f"tokens, {found.teacher_tokens:.0%} of the teacher's, {found.bytes:.0%} of the bytes",
        f"largest chunk: {found.largest_chunk_bytes} bytes, {found.largest_chunk_tokens} tokens on both sides together",
        f"repaired: {student.repaired_bytes} bytes (student), {teacher.repaired_bytes} bytes (teacher)",
    ]
