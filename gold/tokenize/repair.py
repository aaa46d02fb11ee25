"""Where the tokens of a text end in it, when the bytes that they stand for are not the text's.

That is so because invalid UTF-8 was replaced, because a normaliser rewrote the text (NFC, lower case), because white
space was dropped or a space put in, or because a character is unknown. The rewriting is replayed and mapped
(`rewriting_boundaries`). In the rewritten text each end is looked for among the places that are none of the
rewriting's inside (`true_ends`), and held against the bytes (`settle_by_bytes`). Edit operations, in windows between
equal runs, are for what none of this explains.

A *boundary map* from a text B to a text A is an int64 array of len(B) + 1, in bytes: the position in A that lies
between the same two pieces of content as position p in B, or -1 where p is inside a stretch that changed. It
never decreases, and where A has content that B lacks it names the position before that, so that the next
token takes it.
"""

import codecs
import threading
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from gold.errors import VocabularyError

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.uint32]

NONE = -1
"""No true boundary: inside a stretch that changed."""

# What a normaliser changes together is short; up to the first number of pieces all lengths are tried.
_SHORT_STRETCH, _LONGEST_STRETCH = 64, 1024
_RESUMED = 4
_FIRST_WINDOW = 48
_ANCHOR = 8
_NEUTRAL = "a"
_WHITE = np.frombuffer(b" \t\n\v\f\r", np.uint8)


def decode_replacing(data: bytes) -> tuple[str, Int64 | None]:
    """`data.decode("utf-8", "replace")`, and the boundary map from that text's bytes to `data`, None if they are equal.

    Every U+FFFD put in stands for the invalid bytes that it replaced.
    """
    spans: list[tuple[int, int]] = []
    _replaced.spans = spans
    text = data.decode("utf-8", "gold-replace")
    if not spans:
        return text, None
    starts, stops = np.array(spans, np.int64).T
    # A replacement is three bytes long, where the data has `stop - start`.
    shifts = np.cumsum(stops - starts - 3)
    text_starts = starts - np.concatenate(([0], shifts[:-1]))
    back = np.arange(len(data) - int(shifts[-1]) + 1)
    back[text_starts[0] + 3 :] += np.repeat(shifts, np.diff(np.append(text_starts + 3, len(back))))
    back[text_starts + 1] = back[text_starts + 2] = NONE
    return text, back


def compose(inner: Int64, outer: Int64) -> Int64:
    """The boundary map from C to A, of the maps from C to B (`inner`) and from B to A (`outer`)."""
    return np.where(inner >= 0, outer[inner], NONE)


def true_ends(first: Int64, last: Int64, back: Int64, *, take_what_follows: bool = False) -> Int64:
    """The end of each token in A, NONE where it lies inside a stretch that changed or inside another token.

    Token i stands on B[first[i] : last[i]], where it may overlap others and leave gaps; `back` maps B to A. It ends
    anywhere from where all tokens up to it have ended to where the first one after it begins: at the first of these
    places that is a boundary, so that what stands in a gap belongs to the next token, or with `take_what_follows` at
    the last, so that it belongs to this one.
    """
    if not len(first):
        return first
    places = np.arange(len(back))
    earliest = np.maximum.accumulate(last)
    latest = np.append(np.minimum.accumulate(first[::-1])[::-1][1:], len(back) - 1)
    if take_what_follows:
        at = np.maximum.accumulate(np.where(back >= 0, places, 0))[latest]
    else:
        at = np.minimum.accumulate(np.where(back >= 0, places, len(back))[::-1])[::-1][earliest]
    found = (earliest <= at) & (at <= latest)
    return np.where(found, back[np.where(found, at, 0)], NONE)


def settle_by_bytes(
    ends: Int64,
    first: Int64,
    last: Int64,
    stops: Int64,
    stream: Bytes,
    text: Bytes,
    gone: Bool,
    unknown: Bool,
    back: Int64,
) -> None:
    """Corrects the ends that `true_ends` found, by the bytes of the tokens and those of the text B.

    A run of tokens without an end between them (they share a character) stands for a stretch of the stream: from the
    stop of the token before it to its last one's. Where that is what B has, white space at its sides and bytes that are
    `gone` aside, the tokens inside are cut by their bytes. Where it is not, and it is not `unknown` either, the
    tokenizer's account of it is wrong, and so is an end that only such a run vouches for.
    """
    closed = np.flatnonzero(ends != NONE)
    if not len(closed):
        return
    opened = np.concatenate(([0], closed[:-1] + 1))
    begin = np.minimum.accumulate(first[::-1])[::-1][opened]
    begin, end = _trimmed(text, begin, np.maximum(np.maximum.accumulate(last)[closed], begin))
    start, stop = _trimmed(stream, np.concatenate(([0], stops))[opened], stops[closed])
    kept_at = np.flatnonzero(~gone)
    low, high = (np.concatenate(([0], np.cumsum(~gone)))[at] for at in (begin, end))
    equal = stop - start == high - low
    equal[equal] = equal_stretches(stream, start[equal], text[kept_at], low[equal], (stop - start)[equal])

    counts = np.where(equal, closed - opened, 0)
    tokens = np.arange(counts.sum()) + np.repeat(opened - np.cumsum(counts) + counts, counts)
    inside = stops[tokens] - np.repeat(start, counts)
    at = np.repeat(begin, counts)
    later = inside > 0
    at[later] = kept_at[np.minimum((np.repeat(low, counts) + inside)[later], len(kept_at)) - 1] + 1

    vague = np.logical_or.reduceat(unknown, opened)
    vouched = equal[:-1] | equal[1:] | (vague[:-1] & vague[1:])
    ends[tokens] = back[at]
    ends[closed[:-1][~vouched]] = NONE


def _trimmed(text: Bytes, begin: Int64, end: Int64) -> tuple[Int64, Int64]:
    """Stretches of a text less the white space at their sides."""
    solid = np.flatnonzero(~np.isin(text, _WHITE))
    after = np.append(solid, len(text))[np.searchsorted(solid, begin)]
    begin = np.minimum(after, end)
    before = np.concatenate(([0], solid + 1))[np.searchsorted(solid, end)]
    return begin, np.maximum(before, begin)


def stretches_less_gone(stops: Int64, unknown: Bool, gone: Bool, characters: Int64) -> tuple[Int64, Int64]:
    """Where tokens begin and end in a text B, if their bytes are B's less those that are `gone`.

    The unknown tokens (no bytes) between two others stand on what is gone there, a character each, and the last of them
    on all that is left; `characters` are the bytes at which those of B begin, and its length.
    """
    kept_at = np.flatnonzero(~gone)
    befores, afters = np.concatenate(([0], kept_at + 1)), np.append(kept_at, len(gone))
    begun = np.concatenate(([0], stops[:-1]))
    last = befores[stops]
    first = np.where(begun < stops, afters[begun], last)
    at = np.flatnonzero(unknown)
    if len(at):
        fresh = np.append(True, (np.diff(at) > 1) | (stops[at[1:]] != stops[at[:-1]]))
        rank = np.arange(len(at)) - np.maximum.accumulate(np.where(fresh, np.arange(len(at)), 0))
        low, high = befores[stops[at]], afters[stops[at]]
        character = np.searchsorted(characters, low, "right") - 1 + rank
        ends = [
            np.clip(characters[np.minimum(character + k, len(characters) - 1)], low, high) for k in (0, 1)
        ]
        first[at] = np.where(rank == 0, low, ends[0])
        last[at] = np.where(np.append(fresh[1:], True), high, ends[1])
    return first, last


def equal_stretches(a: Bytes, first_a: Int64, b: Bytes, first_b: Int64, widths: Int64) -> Bool:
    """Whether a[first_a : first_a + width] == b[first_b : first_b + width], for each of many stretches."""
    total = np.cumsum(widths)
    if not len(total) or not total[-1]:
        return np.ones(len(widths), np.bool_)
    inside = np.arange(total[-1]) - np.repeat(total - widths, widths)
    differs = a[np.repeat(first_a, widths) + inside] != b[np.repeat(first_b, widths) + inside]
    counts = np.concatenate(([0], np.cumsum(differs)))
    equal: Bool = counts[total] == counts[total - widths]
    return equal


def byte_offsets(text: str) -> Int64:
    """The byte at which each character of a text begins, and its length in bytes last."""
    return _byte_offsets(_codes(text))


class _Replaced(threading.local):
    spans: list[tuple[int, int]]


_replaced = _Replaced()


def _replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    _replaced.spans.append((error.start, error.end))
    return "\ufffd", error.end


codecs.register_error("gold-replace", _replace)


def rewriting_boundaries(text: str, rewritten: str, rewrite: Callable[[str], str]) -> Int64:
    """The boundary map, in bytes, from `rewritten = rewrite(text)` to the text.

    What becomes of each character with its marks is asked once. Where these answers one after the other are not the
    rewritten text, it takes the shortest stretch whose rewriting is what follows. It never cuts before a character
    that combines with the one before it, unless that is left as it was or rewritten by itself.
    """
    if text == rewritten:
        return np.arange(len(text.encode()) + 1)
    units = _Units(text, rewrite)
    a, b = _codes(text), _codes(rewritten)
    back = np.full(len(b) + 1, NONE, np.int64)
    back[0] = 0
    if units.rewritten == rewritten:
        units.map_to(back, 0, len(units), 0)
    else:
        _replay(units, text, rewritten, a, b, back)
    return _in_bytes(back, a, b)


class _Units:
    """A text in pieces that a normaliser rewrites one by one, as far as a piece alone can tell."""

    def __init__(self, text: str, rewrite: Callable[[str], str]) -> None:
        self.text, self._rewrite = text, rewrite
        self._known: dict[tuple[str, bool, bool], str] = {}
        joining = [c for c in set(text) if _joins(c)]
        pieces: list[str] = list(text)
        if joining:
            starts = np.flatnonzero(~np.isin(_codes(text), [ord(c) for c in joining])[1:]) + 1
            bounds = [0, *starts.tolist(), len(text)]
            pieces = [text[i:j] for i, j in pairwise(bounds)]
        answers = {piece: self.rewrite(piece) for piece in set(pieces)}
        if joining:
            # Marks that are left apart from their character, as they were or rewritten, are pieces of their own.
            for character in set("".join(piece for piece in answers if len(piece) > 1)):
                answers.setdefault(character, self.rewrite(character))
            split = {
                piece
                for piece, answer in answers.items()
                if len(piece) > 1
                and all(answers[c] for c in piece)
                and "".join(answers[c] for c in piece) == answer
            }
            pieces = [part for piece in pieces for part in (piece if piece in split else (piece,))]
        self.rewritten = "".join(map(answers.__getitem__, pieces))
        self.codes = _codes(self.rewritten)
        # starts[k]: the character of the text at which piece k begins; at[k]: where its rewriting begins.
        self.starts = _sums(np.fromiter(map(len, pieces), np.int64, len(pieces)))
        self.at = _sums(np.fromiter((len(answers[piece]) for piece in pieces), np.int64, len(pieces)))

    @cached_property
    def start(self) -> list[int]:
        """`starts` as a list."""
        starts: list[int] = self.starts.tolist()
        return starts

    @cached_property
    def place(self) -> list[int]:
        """`at` as a list."""
        place: list[int] = self.at.tolist()
        return place

    def rewrite(self, stretch: str, *, begins: bool = False, ends: bool = False) -> str:
        """What becomes of a stretch of the text, which is the beginning or the end of it or neither."""
        key = stretch, begins, ends
        known = self._known.get(key)
        if known is None:
            # Between two letters, for what is done at the ends of a text alone (white space stripped) is not done here.
            left, right = ("" if begins else _NEUTRAL), ("" if ends else _NEUTRAL)
            known = self._rewrite(left + stretch + right)
            if len(known) >= len(left + right) and known.startswith(left) and known.endswith(right):
                known = known[len(left) : len(known) - len(right)]
            else:
                known = self._rewrite(stretch)
            if len(stretch) <= _SHORT_STRETCH:
                self._known[key] = known
        return known

    def __len__(self) -> int:
        return len(self.starts) - 1

    def map_to(self, back: Int64, first: int, last: int, shift: int) -> None:
        """Maps the ends of pieces [first, last), whose rewritings stand `shift` further on in the rewritten text."""
        ends, source = self.at[first + 1 : last + 1], self.starts[first + 1 : last + 1]
        seen = ends > self.at[first:last]
        back[ends[seen] + shift] = source[seen]


def _sums(widths: Int64) -> Int64:
    return np.concatenate(([0], np.cumsum(widths)))


def _replay(units: _Units, text: str, rewritten: str, a: Codes, b: Codes, back: Int64) -> None:
    """Fills the boundary map in characters, where the pieces one by one are not the rewritten text."""
    k = j = 0
    while k < len(units) or j < len(b):
        first = k
        at = units.place[k]
        run = _equal_run(units.codes, b, at, j)
        # The first piece that begins behind the equal run, or the one in which it ends.
        k = max(bisect_right(units.place, at + run) - 1, first)
        if units.place[k] == at + run:
            k = max(bisect_left(units.place, at + run), first)
        if at + run == units.at[-1] and j + run == len(b):
            k = len(units)
        shift = j - at
        units.map_to(back, first, k, shift)
        j = units.place[k] + shift
        if k == len(units) and j == len(b):
            break
        found = _rewritten_stretch(units, rewritten, first, k, j, fitting=True)
        found = found or _rewritten_stretch(units, rewritten, first, k, j, fitting=False)
        if found is None:
            i, j = _edit_to_a_piece(units, text, rewritten, a, b, int(units.starts[k]), j, back)
            k = int(np.searchsorted(units.starts, i))
            continue
        k, begin, j = found
        back[begin + 1 : j + 1] = NONE
        if j > begin:
            back[j] = units.starts[k]


def _rewritten_stretch(
    units: _Units, rewritten: str, first: int, k: int, j: int, *, fitting: bool
) -> tuple[int, int, int] | None:
    """The shortest stretch around piece k, none of it before `first`, whose rewriting is what stands in its place.

    Piece k belongs at rewritten[j]. If `fitting`, the next piece must be what follows. The answer is the piece after
    the stretch, and where its rewriting begins and ends; None if there is no such stretch.
    """
    starts, at, count = units.start, units.place, len(units)

    def attempt(behind: int, ahead: int) -> tuple[int, int, int] | None:
        begun, ended = k - behind, min(k + ahead, count)
        if begun < first or begun == ended:
            return None
        begin = j - (at[k] - at[begun])
        stretch = units.text[starts[begun] : starts[ended]]
        piece = units.rewrite(stretch, begins=begun == 0, ends=ended == count)
        end = begin + len(piece)
        if not rewritten.startswith(piece, begin) or _joins(rewritten[end : end + 1]):
            return None
        if fitting:
            fits = units.rewritten[at[ended] : at[ended] + 1] == rewritten[end : end + 1]
        else:
            fits = (ended == count) == (end == len(rewritten)) or not piece
        return (ended, begin, end) if fits else None

    # Mostly something is left out, such as spaces behind a space: the rest of both is the same from a later piece on.
    resumed = units.rewritten.find(rewritten[j : j + _RESUMED], at[k], at[k] + _LONGEST_STRETCH)
    later = bisect_left(at, resumed) if resumed >= 0 else k
    for behind in range(3 if fitting and later > k else 0):
        found = attempt(behind, later - k)
        if found is not None:
            return found
    ahead, failed = 1, 0
    while True:
        for behind in range(3):
            found = attempt(behind, ahead)
            while found is not None and ahead - failed > 1:
                middle = (failed + ahead) // 2
                shorter = attempt(behind, middle)
                found, ahead, failed = (
                    (found, ahead, middle) if shorter is None else (shorter, middle, failed)
                )
            if found is not None:
                return found
        if k + ahead >= count or ahead >= _LONGEST_STRETCH:
            return None
        ahead, failed = (ahead + 1 if ahead < _SHORT_STRETCH else 2 * ahead), ahead


def _edit_to_a_piece(
    units: _Units, text: str, rewritten: str, a: Codes, b: Codes, i: int, j: int, back: Int64
) -> tuple[int, int]:
    """Maps text[i:] to rewritten[j:] as equal or edited characters up to the start of a later piece; returns where."""
    start = i
    while i < len(a) or j < len(b):
        run = _equal_run(a, b, i, j)
        edges = units.starts[np.searchsorted(units.starts, max(i, start + 1)) :]
        step = min(run, int(edges[0]) - i) if len(edges) else run
        back[j + 1 : j + step + 1] = np.arange(i + 1, i + step + 1)
        i, j = i + step, j + step
        if len(edges) and i == edges[0]:
            break
        if i < len(a) or j < len(b):
            i, j = _edit(text, rewritten, i, j, back)
    return i, j


def _joins(character: str) -> bool:
    """Whether a character may combine with the one before it; "" does not."""
    if character < "\u0300":
        return False
    return (
        unicodedata.category(character).startswith("M")
        or "\u1160" <= character <= "\u11ff"  # Hangul vowels and finals
        or "\ud7b0" <= character <= "\ud7ff"
        or character in "\uff9e\uff9f"  # half-width voicing marks
    )


def edit_boundaries(expected: bytes, stream: bytes) -> Int64:
    """The boundary map, in bytes, from a stream to the expected bytes, which differ from it for no known reason.

    Raises: VocabularyError if rapidfuzz, which finds the edit operations, is not installed.
    """
    # Invalid bytes become one character each, so that no valid character is cut.
    text_a, text_b = (side.decode("utf-8", "surrogateescape") for side in (expected, stream))
    a, b = _codes(text_a), _codes(text_b)
    back = np.full(len(b) + 1, NONE, np.int64)
    back[0] = i = j = 0
    while i < len(a) or j < len(b):
        run = _equal_run(a, b, i, j)
        back[j + 1 : j + run + 1] = np.arange(i + 1, i + run + 1)
        i, j = i + run, j + run
        if i < len(a) or j < len(b):
            i, j = _edit(text_a, text_b, i, j, back)
    return _in_bytes(back, a, b)


def _edit(text_a: str, text_b: str, i: int, j: int, back: Int64) -> tuple[int, int]:
    """Maps the stretch of b that begins at j by edit operations, up to the next long equal run; returns where that is.

    The window doubles until it holds such a run or the rest of both texts.
    """
    try:
        from rapidfuzz.distance import Levenshtein  # only unexplained differences need it
    except ImportError:
        raise VocabularyError(
            f"the tokens spell {text_b[j : j + 12]!r} where the text has {text_a[i : i + 12]!r}, and rapidfuzz, "
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
    """The equal runs of a window up to the start of the first long one, or all of them where both texts end."""
    found = []
    for block in blocks:
        anchor = block.size >= _ANCHOR
        found.append((block.a, block.b, 0 if anchor else block.size))
        if anchor:
            return found
    return found if at_end else None


def _in_bytes(back: Int64, a: Codes, b: Codes) -> Int64:
    """The boundary map in bytes of one in characters; a character that stayed the same keeps the places inside it."""
    at_a, at_b = _byte_offsets(a), _byte_offsets(b)
    known = back >= 0
    in_bytes = np.full(at_b[-1] + 1, NONE, np.int64)
    in_bytes[at_b[known]] = at_a[back[known]]
    # A character between two boundaries is the one before the second, if any is; before it something may be left out.
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
    return np.concatenate(([0], np.cumsum(widths)))


def _equal_run(a: Codes, b: Codes, i: int, j: int) -> int:
    """The length of the equal run that begins at a[i] and b[j]."""
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
