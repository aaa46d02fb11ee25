"""Where the boundaries of a token stream lie in the given text, when the two differ.

A tokenizer's tokens spell a *stream* of bytes. It can differ from the given bytes because invalid UTF-8 was replaced,
because a normaliser rewrote the text (Qwen's NFC), because the vocabulary lacks a byte or a character, or because a
space was put before the text. Each of these steps is replayed and mapped exactly; only a stream that is still not
explained (added tokens that swallow spaces) is compared by edit operations, in windows between equal runs.

A *boundary map* from a stream B to a text A is an int64 array of len(B) + 1: the position in A that lies
between the same two pieces of content as position p in B, or -1 where p is inside a stretch that changed. It
never decreases, and where A has content that B lacks it names the position before that, so that the next
token takes it.
"""

import codecs
import threading
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from gold.errors import VocabularyError

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]
Codes = npt.NDArray[np.uint32]

_INSIDE = -1
# What a normaliser does to one piece concerns a character and its marks; a longer stretch is something else.
_LONGEST_PIECE = 64
_FIRST_WINDOW = 48
_ANCHOR = 8


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
    back[text_starts + 1] = back[text_starts + 2] = _INSIDE
    return text, back


def stream_boundaries(
    stream: bytes, text: str, rewrite: Callable[[str], str], lost: Callable[[str], Bool], prefix: bool
) -> Int64:
    """The boundary map from a token stream to the UTF-8 bytes of the text that was tokenized.

    `rewrite` is what the tokenizer does to a piece of text, `lost` tells which bytes of a rewritten text its vocabulary
    has no token for, `prefix` is whether it put a space before the text.

    Raises: VocabularyError if edit operations are needed and rapidfuzz is not installed.
    """
    rewritten = rewrite(text)
    expected = rewritten.encode()
    back = _boundaries_of_rewriting(text, rewritten, rewrite)
    gone = lost(rewritten)
    if gone.any():
        expected = np.frombuffer(expected, np.uint8)[~gone].tobytes()
        # Position p is the end of the p-th byte that was kept.
        back = back[np.concatenate(([0], np.flatnonzero(~gone) + 1))]
    if prefix and stream[:1] == b" ":
        expected, back = b" " + expected, np.concatenate(([0], back))
    if expected != stream:
        back = compose(_boundaries_by_edits(expected, stream), back)
    return back


def compose(inner: Int64, outer: Int64) -> Int64:
    """The boundary map from C to A, of the maps from C to B (`inner`) and from B to A (`outer`)."""
    return np.where(inner >= 0, outer[inner], _INSIDE)


def partners(back: Int64) -> Int64:
    """For each piece of B its own place in A, -1 for one that was put in or lies inside a stretch that changed.

    It is the place just before the boundary that follows the piece, if no piece before has it. Whether the content
    there is the same is for the caller to compare.
    """
    taken = np.maximum.accumulate(back[:-1])
    return np.where(back[1:] > taken, back[1:] - 1, _INSIDE)


class _Replaced(threading.local):
    spans: list[tuple[int, int]]


_replaced = _Replaced()


def _replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    _replaced.spans.append((error.start, error.end))
    return "\ufffd", error.end


codecs.register_error("gold-replace", _replace)


def _boundaries_of_rewriting(text: str, rewritten: str, rewrite: Callable[[str], str]) -> Int64:
    """The boundary map, in bytes, from a rewritten text to the text.

    Between equal runs it takes the shortest stretch whose rewriting is what follows, and it never cuts before
    a character that combines with the one before it.
    """
    if text == rewritten:
        return np.arange(len(text.encode()) + 1)
    a, b = _codes(text), _codes(rewritten)
    back = np.full(len(b) + 1, _INSIDE, np.int64)
    back[0] = i = j = 0
    while i < len(a) or j < len(b):
        first_i = i
        run = _equal_run(a, b, i, j)
        back[j + 1 : j + run + 1] = np.arange(i + 1, i + run + 1)
        i, j = i + run, j + run
        if i == len(a) and j == len(b):
            break
        while i > first_i and (_joins(text, i) or _joins(rewritten, j)):
            back[j] = _INSIDE
            i, j = i - 1, j - 1
        piece = _rewritten_piece(text, rewritten, i, j, rewrite)
        if piece is None:
            i, j = _edit(text, rewritten, i, j, back)
        else:
            i, j = i + piece[0], j + piece[1]
            if piece[1]:
                back[j] = i
    return _in_bytes(back, a, b)


def _rewritten_piece(
    text: str, rewritten: str, i: int, j: int, rewrite: Callable[[str], str]
) -> tuple[int, int] | None:
    """The lengths of the shortest stretches at text[i] and rewritten[j] of which one is rewritten to the other."""
    for end in range(i + 1, min(i + _LONGEST_PIECE, len(text)) + 1):
        if _joins(text, end):
            continue
        piece = rewrite(text[i:end])
        stop = j + len(piece)
        whole = (end == len(text)) == (stop == len(rewritten)) or not piece
        if whole and rewritten.startswith(piece, j) and not _joins(rewritten, stop):
            return end - i, len(piece)
    return None


def _joins(text: str, at: int) -> bool:
    """Whether the character there may combine with the one before it."""
    if at >= len(text) or text[at] < "\u0300":
        return False
    character = text[at]
    return (
        unicodedata.category(character).startswith("M")
        or "\u1160" <= character <= "\u11ff"  # Hangul vowels and finals
        or "\ud7b0" <= character <= "\ud7ff"
        or character in "\uff9e\uff9f\u200d"  # half-width voicing marks, zero-width joiner
    )


def _boundaries_by_edits(expected: bytes, stream: bytes) -> Int64:
    """The boundary map, in bytes, from a stream to the expected bytes, which differ from it for no known reason."""
    # Invalid bytes become one character each, so that no valid character is cut.
    text_a, text_b = (side.decode("utf-8", "surrogateescape") for side in (expected, stream))
    a, b = _codes(text_a), _codes(text_b)
    back = np.full(len(b) + 1, _INSIDE, np.int64)
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
    in_bytes = np.full(at_b[-1] + 1, _INSIDE, np.int64)
    in_bytes[at_b[known]] = at_a[back[known]]
    partner = partners(back)
    same = np.flatnonzero(partner >= 0)
    same = same[a[partner[same]] == b[same]]
    widths = np.diff(at_b)
    for inside in (1, 2, 3):
        wide = same[widths[same] > inside]
        in_bytes[at_b[wide] + inside] = at_a[partner[wide]] + inside
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
