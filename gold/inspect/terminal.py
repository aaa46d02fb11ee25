"""An alignment in a terminal: both tokenizations one above the other, chunk by chunk, and a summary."""

import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from gold.inspect.view import AlignmentView, TokenizedSide, prompt_runs, summary, token_runs

_BETWEEN_TOKENS, _BETWEEN_CHUNKS, _GOES_ON = "¦", " ┃ ", "⋯"
_LABELS = ("student ", "teacher ")
_ONE_TO_ONE, _OTHER, _EVENT, _MARK = "green", "yellow", "magenta", "dim"
_LEGEND = {
    "∅": "no bytes of the text",
    "~": "other bytes than the text's",
    _GOES_ON: "goes on in the next line",
}
# Keeps tokens in order in terminals that write some scripts from right to left; it has no width.
_LEFT_TO_RIGHT = "\u200e"
# Minimum columns for a part of a chunk, however narrow the terminal.
_LEAST_ROOM = 16


def show_alignment(view: AlignmentView, console: Console) -> None:
    """Prints the prompts, if there are any, the picture and the summary of one alignment.

    Chunks are separated by `┃`, the tokens of a chunk by `¦`. White space is visible; bytes that are not a whole
    character are hexadecimal; `⟨…⟩` is a special token, `∅` another token of no width, `~` follows a token whose own
    bytes differ from the text. A chunk that is wider than the terminal continues, at the same byte on both sides, in
    the next line; a token that is split there has `⋯` at the split.
    """
    for label, side in zip(_LABELS, view.sides, strict=True):
        if side.prompt_ids is not None:
            styles = {"text": "", "mark": _MARK, "event": _EVENT}
            prompt = Text.assemble(*((run, styles[kind]) for run, kind in prompt_runs(side)))
            console.print(Text(f"{label}reads", "bold"))
            console.print(
                prompt, soft_wrap=not console.is_terminal, end="" if prompt.plain.endswith("\n") else "\n"
            )
            console.print()
    marks: set[str] = set()
    for rows in _lines(view, console.width - len(_LABELS[0])):
        for label, row in zip(_LABELS, rows, strict=True):
            row.rstrip()
            marks.update(row.plain[s.start : s.end] for s in row.spans if s.style in (_EVENT, _MARK))
            console.print(Text.assemble((label, "dim"), row), no_wrap=True, overflow="ignore", crop=False)
        console.print()
    if not marks.isdisjoint(_LEGEND):
        legend = "   ".join(f"{mark} {said}" for mark, said in _LEGEND.items() if mark in marks)
        console.print(Text(legend, "dim"))
    undrawn = [f"{view.undrawn}; --json has all of them"] if view.undrawn else []
    for line in [*undrawn, *summary(view)]:
        console.print(line, soft_wrap=not console.is_terminal)


@dataclass(frozen=True)
class _Cell:
    """Both rows of one chunk, and whether a line ends after it."""

    rows: tuple[Text, Text]
    ends_line: bool = False

    @cached_property
    def width(self) -> int:
        return max(cell_len(row.plain) for row in self.rows)


def _lines(view: AlignmentView, room: int) -> Iterator[tuple[Text, Text]]:
    """The two rows of each line of the picture, with as many cells as fit."""
    above, below, used = Text(), Text(), 0
    for cell in _cells(view, max(room, _LEAST_ROOM)):
        if used and used + len(_BETWEEN_CHUNKS) + cell.width > room:
            yield above, below
            above, below, used = Text(), Text(), 0
        for row, part in zip((above, below), cell.rows, strict=True):
            if used:
                row.append(_BETWEEN_CHUNKS, _MARK)
            row.append_text(part)
            row.append(" " * (cell.width - cell_len(part.plain)))
        used += cell.width + (len(_BETWEEN_CHUNKS) if used else 0)
        if cell.ends_line:
            yield above, below
            above, below, used = Text(), Text(), 0
    if used:
        yield above, below


def _cells(view: AlignmentView, room: int) -> Iterator[_Cell]:
    if view.bos_names:
        yield _special(view.bos_names)
    starts, ends = view.alignment.starts_C.tolist(), view.alignment.ends_C.tolist()
    for c, (s0, s1, t0, t1) in enumerate(view.alignment.chunks[: view.drawn].tolist()):
        style = _ONE_TO_ONE if s1 - s0 == t1 - t0 == 1 else _OTHER
        rows = _Row(view.student, s0, s1, style), _Row(view.teacher, t0, t1, style)
        whole = rows[0].part(starts[c], ends[c]), rows[1].part(starts[c], ends[c])
        ends_line = view.data[starts[c] : ends[c]].endswith(b"\n")
        if max(cell_len(row.plain) for row in whole) <= room or ends[c] == starts[c]:
            yield _Cell(whole, ends_line)
        else:
            yield from _folded(view.data, starts[c], ends[c], rows, room, ends_line)
    if view.stop_names:
        yield _special(view.stop_names)


def _special(names: tuple[str, str]) -> _Cell:
    return _Cell((Text(names[0], _EVENT), Text(names[1], _EVENT)))


class _Row:
    """The tokens of one side in one chunk."""

    def __init__(self, side: TokenizedSide, first: int, last: int, style: str) -> None:
        self.side, self.first, self.style = side, first, style
        self.ends = side.tokenized.ends[first:last].tolist()
        self.starts = [int(side.tokenized.ends[first - 1]) if first else 0, *self.ends][: last - first]

    def part(self, start: int, stop: int, goes_on: bool = False) -> Text:
        """The tokens within a byte range of the chunk; `goes_on`: more bytes of it follow."""
        parts: list[tuple[tuple[tuple[str, str], ...], int]] = []
        for k in range(bisect_left(self.ends, start), len(self.ends)):
            first, last = self.starts[k], self.ends[k]
            if first > stop or (first == stop and goes_on):
                break
            if first < last <= start:
                continue
            part = tuple(self._token(k, start, stop))
            if first == last and parts and parts[-1][0] == part:
                parts[-1] = part, parts[-1][1] + 1
            else:
                parts.append((part, 1))
        text = Text()
        for number, (part, count) in enumerate(parts):
            if number:
                text.append(_BETWEEN_TOKENS, _MARK)
            for run, style in part:
                text.append(run, style)
            if count > 1:
                text.append(f"×{count}", _MARK)
        if goes_on and not text.plain.endswith(_GOES_ON):
            text.append(_BETWEEN_TOKENS, _MARK)
        return text

    def _token(self, k: int, start: int, stop: int) -> Iterator[tuple[str, str]]:
        first, last = max(self.starts[k], start), min(self.ends[k], stop)
        styles = {"text": self.style, "mark": f"{_MARK} {self.style}", "event": _EVENT}
        if self.starts[k] < start:
            yield _GOES_ON, _MARK
        for run, kind in token_runs(self.side, self.first + k, first, last):
            yield run, styles[kind]
            if any(unicodedata.bidirectional(character) in ("R", "AL") for character in run):
                yield _LEFT_TO_RIGHT, styles[kind]
        if last < self.ends[k]:
            yield _GOES_ON, _MARK


def _folded(
    data: bytes, start: int, end: int, rows: tuple[_Row, _Row], room: int, ends_line: bool
) -> Iterator[_Cell]:
    """A chunk that is wider than a line, in parts that fit."""
    while start < end:
        stop = _fold(data, start, end, rows, room)
        parts = rows[0].part(start, stop, stop < end), rows[1].part(start, stop, stop < end)
        yield _Cell(parts, ends_line or stop < end)
        start = stop


def _fold(data: bytes, start: int, end: int, rows: tuple[_Row, _Row], room: int) -> int:
    """The end of the next part of a chunk: the last character that fits, or the end of a token shortly before it."""
    window = data[start : min(end, start + 4 * (room + 2))]
    widths = [
        len(character.encode("utf-8", "surrogateescape"))
        for character in window.decode("utf-8", "surrogateescape")
    ]
    stops = list(accumulate(widths, initial=start))[1:]
    if start + len(window) < end:
        del stops[-4:]  # the window may end within a character

    def too_wide(stop: int) -> bool:
        return any(cell_len(row.part(start, stop, stop < end).plain) > room for row in rows)

    last = stops[max(bisect_left(stops, True, key=too_wide) - 1, 0)]
    if last == end:
        return end
    nearest = max((row.ends[at - 1] for row in rows if (at := bisect_right(row.ends, last))), default=start)
    return nearest if nearest > (start + last) / 2 else last
