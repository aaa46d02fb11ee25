"""Token ends in a text that differs from the bytes of its tokens: normalized text, dropped or unknown characters.

The functions here work on the rewritten text B and a boundary map `back` from B to the original text A; see
`gold.tokenize.rewriting`.
"""

import numpy as np
import numpy.typing as npt

from gold.tokenize.rewriting import NONE
from gold.tokenize.text import Bool, Int64, starts_of

Bytes = npt.NDArray[np.uint8]

_WHITE = np.frombuffer(b" \t\n\v\f\r", np.uint8)


def true_ends(first: Int64, last: Int64, back: Int64, *, take_what_follows: bool = False) -> Int64:
    """The end of each token in A, NONE where it lies inside a rewritten span or inside another token.

    Token i covers B[first[i] : last[i]]; tokens may overlap and leave gaps. A token ends between the largest end of the
    tokens up to it and the smallest start of those after it: at the first boundary in that range, so that a gap belongs
    to the next token, or with `take_what_follows` at the last one, so that it belongs to this token.
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
    joined: Bytes,
    text: Bytes,
    missing: Bool,
    unknown: Bool,
    back: Int64,
) -> None:
    """Corrects in place the ends found by `true_ends`, using the bytes of the tokens (`joined`) and of B (`text`).

    Tokens without an end between them (they share a character) cover one span together. If their bytes equal those of B
    there, ignoring white space at both sides and `missing` bytes, the ends inside the span follow from the bytes. If
    they differ and no token is `unknown`, the tokenizer's offsets are wrong, and an end between two such spans becomes
    NONE.
    """
    closed = np.flatnonzero(ends != NONE)
    if not len(closed):
        return
    opened = np.concatenate(([0], closed[:-1] + 1))
    begin = np.minimum.accumulate(first[::-1])[::-1][opened]
    begin, end = _trimmed(text, begin, np.maximum(np.maximum.accumulate(last)[closed], begin))
    start, stop = _trimmed(joined, np.concatenate(([0], stops))[opened], stops[closed])
    kept_at = np.flatnonzero(~missing)
    low, high = (np.concatenate(([0], np.cumsum(~missing)))[at] for at in (begin, end))
    equal = stop - start == high - low
    equal[equal] = equal_spans(joined, start[equal], text[kept_at], low[equal], (stop - start)[equal])

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
    """Spans of a text, stripped of white space at both sides."""
    solid = np.flatnonzero(~np.isin(text, _WHITE))
    after = np.append(solid, len(text))[np.searchsorted(solid, begin)]
    begin = np.minimum(after, end)
    before = np.concatenate(([0], solid + 1))[np.searchsorted(solid, end)]
    return begin, np.maximum(before, begin)


def spans_less_missing(stops: Int64, unknown: Bool, missing: Bool, characters: Int64) -> tuple[Int64, Int64]:
    """The starts and ends of tokens in a text B, if their bytes equal B without the `missing` bytes.

    Unknown tokens (no bytes) between two others cover the missing bytes there, one character each and the last of them
    the remainder; `characters` are the byte offsets of the characters of B, and its length.
    """
    kept_at = np.flatnonzero(~missing)
    befores, afters = np.concatenate(([0], kept_at + 1)), np.append(kept_at, len(missing))
    begun, last = starts_of(stops), befores[stops]
    first = np.where(begun < stops, afters[begun], last)
    at = np.flatnonzero(unknown)
    if len(at):
        fresh = np.append(True, (np.diff(at) > 1) | (stops[at[1:]] != stops[at[:-1]]))
        rank = np.arange(len(at)) - np.maximum.accumulate(np.where(fresh, np.arange(len(at)), 0))
        low, high = befores[stops[at]], afters[stops[at]]
        character = np.searchsorted(characters, low, "right") - 1 + rank
        begins, ends = (
            np.clip(characters[np.minimum(character + k, len(characters) - 1)], low, high) for k in (0, 1)
        )
        first[at] = np.where(rank == 0, low, begins)
        last[at] = np.where(np.append(fresh[1:], True), high, ends)
    return first, last


def equal_spans(a: Bytes, first_a: Int64, b: Bytes, first_b: Int64, widths: Int64) -> Bool:
    """For each of many spans: a[first_a : first_a + width] == b[first_b : first_b + width]."""
    total = np.cumsum(widths)
    if not len(total) or not total[-1]:
        return np.ones(len(widths), np.bool_)
    inside = np.arange(total[-1]) - np.repeat(total - widths, widths)
    differs = a[np.repeat(first_a, widths) + inside] != b[np.repeat(first_b, widths) + inside]
    counts = np.concatenate(([0], np.cumsum(differs)))
    equal: Bool = counts[total] == counts[total - widths]
    return equal
