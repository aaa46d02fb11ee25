"""Boundary maps: which positions of a rewritten text correspond to which positions of the original text.

Tokenizers rewrite text: invalid UTF-8 is replaced, characters are composed (NFC) or lower-cased, white space is
dropped. A *boundary map* from a text B to a text A is an int64 array of len(B) + 1, in bytes: the position in A that
corresponds to position p in B, or -1 where p is inside a span that was rewritten. It never decreases. Where A has
content that B lacks, the map gives the position before that content, so that the next token covers it.

The map is found by replaying the rewriting segment by segment. Edit operations (rapidfuzz) are used only for
differences that this does not explain.
"""

import codecs
import threading
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from gold.errors import VocabularyError
from gold.tokenize.text import Int64

Codes = npt.NDArray[np.uint32]

NONE = -1
"""No boundary: inside a rewritten span."""

# Spans that a normalizer rewrites as a whole are short: up to the first number of segments every length is tried.
_SHORT_SPAN, _LONGEST_SPAN = 64, 1024
_RESUMED = 4
_FIRST_WINDOW = 48
_ANCHOR = 8
_NEUTRAL = "a"


class _Replaced(threading.local):
    spans: list[tuple[int, int]]


_replaced = _Replaced()


def _replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    _replaced.spans.append((error.start, error.end))
    return "\ufffd", error.end


codecs.register_error("gold-replace", _replace)


def decode_replacing(data: bytes) -> tuple[str, Int64 | None]:
    """`data.decode("utf-8", "replace")` and the boundary map from it to `data`, None if they are equal."""
    spans: list[tuple[int, int]] = []
    _replaced.spans = spans
    text = data.decode("utf-8", "gold-replace")
    if not spans:
        return text, None
    starts, stops = np.array(spans, np.int64).T
    # A replacement character has three bytes, the replaced data `stop - start`.
    shifts = np.cumsum(stops - starts - 3)
    text_starts = starts - np.concatenate(([0], shifts[:-1]))
    back = np.arange(len(data) - int(shifts[-1]) + 1)
    back[text_starts[0] + 3 :] += np.repeat(shifts, np.diff(np.append(text_starts + 3, len(back))))
    back[text_starts + 1] = back[text_starts + 2] = NONE
    return text, back


def compose(inner: Int64, outer: Int64) -> Int64:
    """The boundary map from C to A, from those from C to B (`inner`) and from B to A (`outer`)."""
    return np.where(inner >= 0, outer[inner], NONE)


def byte_offsets(text: str) -> Int64:
    """The byte offset of each character of a text, followed by the length in bytes."""
    return _byte_offsets(_codes(text))


def rewriting_boundaries(text: str, rewritten: str, rewrite: Callable[[str], str]) -> Int64:
    """The boundary map, in bytes, from `rewritten = rewrite(text)` to the text.

    Each character with its combining marks is first rewritten separately. Where the concatenation is not the rewritten
    text, the shortest span whose rewriting matches is taken. There is no boundary before a character that combines with
    the previous one, unless it is unchanged or rewritten by itself.
    """
    if text == rewritten:
        return np.arange(len(text.encode()) + 1)
    pieces = _Pieces(text, rewrite)
    a, b = _codes(text), _codes(rewritten)
    back = np.full(len(b) + 1, NONE, np.int64)
    back[0] = 0
    if pieces.rewritten == rewritten:
        pieces.map_to(back, 0, len(pieces), 0)
    else:
        _Replay(pieces, rewritten, a, b, back).run()
    return _in_bytes(back, a, b)


def edit_boundaries(expected: bytes, joined: bytes) -> Int64:
    """The boundary map, in bytes, from joined tokens to the expected bytes, for unexplained differences.

    Raises: VocabularyError if rapidfuzz, which finds the edit operations, is not installed.
    """
    # Each invalid byte becomes one character, so that no valid character is split.
    text_a, text_b = (side.decode("utf-8", "surrogateescape") for side in (expected, joined))
    a, b = _codes(text_a), _codes(text_b)
    back = np.full(len(b) + 1, NONE, np.int64)
    back[0] = 0
    _map_edited(text_a, text_b, a, b, 0, 0, back, np.zeros(0, np.int64))
    return _in_bytes(back, a, b)


class _Pieces:
    """A text in segments that a normalizer rewrites independently, as far as a single segment can show.

    Segment k begins at character `starts[k]` of the text, its rewriting at `at[k]` of `rewritten`.
    """

    def __init__(self, text: str, rewrite: Callable[[str], str]) -> None:
        self.text, self._rewrite = text, rewrite
        self._known: dict[tuple[str, bool, bool], str] = {}
        joining = [c for c in set(text) if _joins(c)]
        pieces: list[str] = list(text)
        if joining:
            starts = np.flatnonzero(~np.isin(_codes(text), [ord(c) for c in joining])[1:]) + 1
            pieces = [text[i:j] for i, j in pairwise([0, *starts.tolist(), len(text)])]
        new = {piece: self.rewrite(piece) for piece in set(pieces)}
        if joining:
            # Combining marks that stay separate from their character, unchanged or rewritten, are segments.
            for character in set("".join(piece for piece in new if len(piece) > 1)):
                new.setdefault(character, self.rewrite(character))
            split = {
                piece
                for piece, answer in new.items()
                if len(piece) > 1 and all(new[c] for c in piece) and "".join(new[c] for c in piece) == answer
            }
            pieces = [part for piece in pieces for part in (piece if piece in split else (piece,))]
        self.rewritten = "".join(map(new.__getitem__, pieces))
        self.starts = _sums(np.fromiter(map(len, pieces), np.int64, len(pieces)))
        self.at = _sums(np.fromiter((len(new[piece]) for piece in pieces), np.int64, len(pieces)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def rewrite(self, span: str, *, begins: bool = False, ends: bool = False) -> str:
        """The rewriting of a span of the text; `begins`, `ends`: the span is at the beginning or end of the text."""
        key = span, begins, ends
        known = self._known.get(key)
        if known is None:
            # Placed between two letters, so that rules for the ends of a text (stripping white space) do not apply.
            left, right = ("" if begins else _NEUTRAL), ("" if ends else _NEUTRAL)
            known = self._rewrite(left + span + right)
            if len(known) >= len(left + right) and known.startswith(left) and known.endswith(right):
                known = known[len(left) : len(known) - len(right)]
            else:
                known = self._rewrite(span)
            if len(span) <= _SHORT_SPAN:
                self._known[key] = known
        return known

    def map_to(self, back: Int64, first: int, last: int, shift: int) -> None:
        """Maps the ends of segments [first, last), whose rewritings are shifted by `shift` in the rewritten text."""
        ends, source = self.at[first + 1 : last + 1], self.starts[first + 1 : last + 1]
        seen = ends > self.at[first:last]
        back[ends[seen] + shift] = source[seen]


class _Replay:
    """Fills a boundary map, in characters, where the concatenated segments differ from the rewritten text."""

    def __init__(self, pieces: _Pieces, rewritten: str, a: Codes, b: Codes, back: Int64) -> None:
        self.pieces, self.rewritten, self.a, self.b, self.back = pieces, rewritten, a, b, back
        self.start: list[int] = pieces.starts.tolist()
        self.at: list[int] = pieces.at.tolist()
        self.count = len(pieces)

    def run(self) -> None:
        """Fills `back`."""
        pieces, at, codes = self.pieces, self.at, _codes(self.pieces.rewritten)
        k = j = 0
        while k < self.count or j < len(self.b):
            first, begun = k, at[k]
            run = _equal_run(codes, self.b, begun, j)
            # The first segment that begins after the equal run, or the one in which it ends.
            k = max(bisect_right(at, begun + run) - 1, first)
            if at[k] == begun + run:
                k = max(bisect_left(at, begun + run), first)
            if begun + run == at[-1] and j + run == len(self.b):
                k = self.count
            pieces.map_to(self.back, first, k, j - begun)
            j += at[k] - begun
            if k == self.count and j == len(self.b):
                break
            found = self._span(first, k, j, fitting=True) or self._span(first, k, j, fitting=False)
            if found is None:
                texts = pieces.text, self.rewritten, self.a, self.b
                i, j = _map_edited(*texts, self.start[k], j, self.back, pieces.starts)
                k = int(np.searchsorted(pieces.starts, i))
                continue
            k, begin, j = found
            self.back[begin + 1 : j + 1] = NONE
            if j > begin:
                self.back[j] = self.start[k]

    def _span(self, first: int, k: int, j: int, *, fitting: bool) -> tuple[int, int, int] | None:
        """The shortest span around segment k, not before `first`, whose rewriting matches the rewritten text there.

        Segment k belongs at rewritten[j]. With `fitting` the next segment must match too. Returns the segment after the
        span and the range of its rewriting; None if there is no such span.
        """
        # Usually something is dropped, such as repeated spaces: from a later segment on both are equal again.
        rewritten, at = self.pieces.rewritten, self.at
        resumed = rewritten.find(self.rewritten[j : j + _RESUMED], at[k], at[k] + _LONGEST_SPAN)
        later = bisect_left(at, resumed) if resumed >= 0 else k
        for behind in range(3 if fitting and later > k else 0):
            found = self._attempt(first, k, j, behind, later - k, fitting)
            if found is not None:
                return found
        ahead, failed = 1, 0
        while True:
            for behind in range(3):
                found = self._attempt(first, k, j, behind, ahead, fitting)
                while found is not None and ahead - failed > 1:
                    middle = (failed + ahead) // 2
                    shorter = self._attempt(first, k, j, behind, middle, fitting)
                    if shorter is None:
                        failed = middle
                    else:
                        found, ahead = shorter, middle
                if found is not None:
                    return found
            if k + ahead >= self.count or ahead >= _LONGEST_SPAN:
                return None
            ahead, failed = (ahead + 1 if ahead < _SHORT_SPAN else 2 * ahead), ahead

    def _attempt(
        self, first: int, k: int, j: int, behind: int, ahead: int, fitting: bool
    ) -> tuple[int, int, int] | None:
        begun, ended = k - behind, min(k + ahead, self.count)
        if begun < first or begun == ended:
            return None
        at, rewritten = self.at, self.rewritten
        begin = j - (at[k] - at[begun])
        span = self.pieces.text[self.start[begun] : self.start[ended]]
        new = self.pieces.rewrite(span, begins=begun == 0, ends=ended == self.count)
        end = begin + len(new)
        if not rewritten.startswith(new, begin) or _joins(rewritten[end : end + 1]):
            return None
        if fitting:
            fits = self.pieces.rewritten[at[ended] : at[ended] + 1] == rewritten[end : end + 1]
        else:
            fits = (ended == self.count) == (end == len(rewritten)) or not new
        return (ended, begin, end) if fits else None


def _map_edited(
    text_a: str, text_b: str, a: Codes, b: Codes, i: int, j: int, back: Int64, edges: Int64
) -> tuple[int, int]:
    """Maps text_a[i:] to text_b[j:], as equal or edited characters, up to the first of `edges` after i.

    Returns the positions reached in both.
    """
    start = i
    while i < len(a) or j < len(b):
        run = _equal_run(a, b, i, j)
        behind = edges[np.searchsorted(edges, max(i, start + 1)) :]
        step = min(run, int(behind[0]) - i) if len(behind) else run
        back[j + 1 : j + step + 1] = np.arange(i + 1, i + step + 1)
        i, j = i + step, j + step
        if len(behind) and i == behind[0]:
            break
        if i < len(a) or j < len(b):
            i, j = _edit(text_a, text_b, i, j, back)
    return i, j


def _edit(text_a: str, text_b: str, i: int, j: int, back: Int64) -> tuple[int, int]:
    """Maps text_b from j by edit operations, up to the next long equal run; returns its position in both.

    The window doubles until it contains such a run or the rest of both texts.
    """
    try:
        from rapidfuzz.distance import Levenshtein  # only for unexplained differences
    except ImportError:
        raise VocabularyError(
            f"the tokens have {text_b[j : j + 12]!r} where the text has {text_a[i : i + 12]!r}, and rapidfuzz, "
            "which would map one onto the other, is not installed; pip install rapidfuzz"
        ) from None
    window = _FIRST_WINDOW
    while True:
        a, b = text_a[i : i + window], text_b[j : j + window]
        at_end = i + window >= len(text_a) and j + window >= len(text_b)
        found = _blocks_up_to_an_anchor(Levenshtein.opcodes(a, b).as_matching_blocks(), at_end)
        if found is not None:
            break
        window *= 2
    done_a = done_b = 0
    for start_a, start_b, size in found:
        if start_b > done_b:
            back[j + start_b] = i + start_a
        back[j + start_b + 1 : j + start_b + size + 1] = i + start_a + np.arange(1, size + 1)
        done_a, done_b = start_a + size, start_b + size
    return i + done_a, j + done_b


def _blocks_up_to_an_anchor(blocks: Iterable[Any], at_end: bool) -> list[tuple[int, int, int]] | None:
    """The equal runs of a window up to the start of the first long one; all of them if both texts end."""
    found = []
    for block in blocks:
        anchor = block.size >= _ANCHOR
        found.append((block.a, block.b, 0 if anchor else block.size))
        if anchor:
            return found
    return found if at_end else None


def _joins(character: str) -> bool:
    """True if a character may combine with the previous one; False for ""."""
    if character < "\u0300":
        return False
    return (
        unicodedata.category(character).startswith("M")
        or "\u1160" <= character <= "\u11ff"  # Hangul vowels and finals
        or "\ud7b0" <= character <= "\ud7ff"
        or character in "\uff9e\uff9f"  # half-width voicing marks
    )


def _in_bytes(back: Int64, a: Codes, b: Codes) -> Int64:
    """The boundary map in bytes, from one in characters; unchanged characters keep the positions inside them."""
    at_a, at_b = _byte_offsets(a), _byte_offsets(b)
    known = back >= 0
    in_bytes = np.full(at_b[-1] + 1, NONE, np.int64)
    in_bytes[at_b[known]] = at_a[back[known]]
    # The unchanged character between two boundaries is the last one before the second; content before it may be
    # dropped.
    same = np.flatnonzero((back[:-1] >= 0) & (back[1:] > back[:-1]))
    source = back[1:][same] - 1
    same, source = (at[a[source] == b[same]] for at in (same, source))
    widths = np.diff(at_b)[same]
    for inside in (1, 2, 3):
        wide = widths > inside
        in_bytes[at_b[same[wide]] + inside] = at_a[source[wide]] + inside
    return in_bytes


def _byte_offsets(codes: Codes) -> Int64:
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    widths[(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1  # an invalid byte
    return _sums(widths)


def _sums(widths: Int64) -> Int64:
    return np.concatenate(([0], np.cumsum(widths)))


def _equal_run(a: Codes, b: Codes, i: int, j: int) -> int:
    """The length of the equal run at a[i] and b[j]."""
    run, window = 0, 64
    longest = min(len(a) - i, len(b) - j)
    while run < longest:
        stop = min(run + window, longest)
        differs = a[i + run : i + stop] != b[j + run : j + stop]
        first = int(differs.argmax())
        if differs[first]:
            return run + first
        run, window = stop, window * 2
    return run


def _codes(text: str) -> Codes:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
