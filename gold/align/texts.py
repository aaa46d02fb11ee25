"""One completion in both sides' tokens, and its states, chunks and spans shared by both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gold.align.chunks import align_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gold.align.vocabularies import VocabularyPair
    from gold.tokenize.vocabulary import TokenizedText, Vocabulary


@dataclass(frozen=True)
class AlignedText:
    """One completion: the student's ids as sampled, and its bytes in both sides' tokens.

    ``ids`` ends with the stop id if the text ``stopped``; the tokenized texts never contain it. ``sampled``: which ids
    the student wrote, one flag for all or one for each. ``advantage`` is the task reward relative to its group.
    ``sampling_logprobs`` is the log-probability with which each id was sampled, if known. ``at_start``: the text begins
    a sequence, as in ``Vocabulary.encode``.
    """

    ids: NDArray[np.int32]
    student: TokenizedText
    teacher: TokenizedText
    stopped: bool
    sampled: bool | NDArray[np.bool_] = True
    advantage: float = 0.0
    sampling_logprobs: NDArray[np.float32] | None = None
    at_start: bool = True

    @property
    def sampled_mask(self) -> NDArray[np.bool_]:
        """Which ids the student wrote."""
        return np.broadcast_to(self.sampled, self.ids.shape)


class TextAlignment:
    """The chunks, states and spans of one text, by row of that text; a text that stopped has one row more than tokens.

    With one vocabulary every token is a chunk, and every row a state and a span.
    """

    def __init__(self, text: AlignedText, vocabularies: VocabularyPair) -> None:
        self.text, self.vocabularies = text, vocabularies
        self.tokens = align_tokens(text.student, text.teacher)

    def chunks(self) -> tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.bool_]]:
        """Chunk of each student row and of each teacher row, and which chunks are one token on both sides. The stop
        event is a chunk by itself."""
        chunk_S, chunk_T, single = self.tokens.chunk_S, self.tokens.chunk_T, self.tokens.one_to_one_C
        if self.vocabularies.same:
            chunk_S = chunk_T = np.arange(len(self.text.student), dtype=np.int32)
            single = np.ones(chunk_S.size, np.bool_)
        if self.text.stopped:
            chunk_S, chunk_T = (np.append(c, single.size) for c in (chunk_S, chunk_T))
            single = np.append(single, True)
        return chunk_S, chunk_T, single

    def one_to_one_bytes(self) -> NDArray[np.bool_]:
        """Which byte positions lie in one-to-one chunks, or at the end of the text."""
        inside = np.zeros(len(self.text.student.data) + 1, np.bool_)
        chunks = np.repeat(self.tokens.one_to_one_C, self.tokens.ends_C - self.tokens.starts_C)
        inside[: chunks.size] = chunks  # a text without tokens on both sides has no chunk
        inside[-1] = True
        return inside

    def states(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Rows of both sides that have read the same bytes, how many bytes, and whether a one-to-one chunk (or the end
        of the text) follows: the start of every chunk, and the end of a text that stopped."""
        text, tokens = self.text, self.tokens
        # A teacher without tokens for a text has only the state before its stop event.
        count = len(tokens) if text.teacher.ids.size or text.stopped else 0
        rows_S, rows_T = (tokens.chunks[:count, i].astype(np.int64) for i in (0, 2))
        single = tokens.one_to_one_C[:count]
        if self.vocabularies.same:
            rows_S = rows_T = np.arange(text.student.ids.size)
            single = np.ones(text.student.ids.size, np.bool_)
        offsets = text.student.starts[rows_S]
        if text.stopped:
            rows_S, rows_T = np.append(rows_S, len(text.student)), np.append(rows_T, len(text.teacher))
            offsets, single = np.append(offsets, len(text.student.data)), np.append(single, True)
        return rows_S, rows_T, offsets, single

    def spans(self) -> tuple[NDArray[np.integer], NDArray[np.integer], int]:
        """Span of each student row, of each teacher row (−1: in none), and the number of spans.

        A span ends at the next stable boundary of the teacher, which is a token boundary whatever text follows, so its
        end is known when the student reaches it; the stop event ends the last one. In no span are: text after the last
        stable boundary if the text did not stop, text whose bytes the teacher's tokens do not reproduce exactly, and
        texts of a data set, which are not sampled.
        """
        text, tokens = self.text, self.tokens
        if text.ids.size and not text.sampled_mask.any():
            none_S, none_T = (np.full(len(side) + text.stopped, -1) for side in (text.student, text.teacher))
            return none_S, none_T, 0
        if self.vocabularies.same:
            rows = np.arange(len(text.student) + text.stopped)
            return rows, rows, rows.size
        teacher = self.vocabularies.teacher
        last = tokens.chunks[:, 3] - 1
        ends = np.append(teacher.stable_ends(text.teacher), False)[last]  # −1: no teacher token yet
        span_C = np.cumsum(ends) - ends
        closed = int(ends.sum())
        span_C = np.where((span_C < closed) | text.stopped, span_C, -1)
        span_S, span_T = span_C[tokens.chunk_S], span_C[tokens.chunk_T]
        if text.stopped:
            final = int(span_C[-1]) if span_C.size and not ends[-1] else closed
            span_S, span_T = np.append(span_S, final), np.append(span_T, final)
            closed = final + 1
        left_out = np.zeros(closed + 1, np.bool_)  # the last is for −1
        left_out[span_T[: len(text.teacher)][~_spelled(teacher, text.teacher)]] = True
        left_out[-1] = True
        return np.where(left_out[span_S], -1, span_S), np.where(left_out[span_T], -1, span_T), closed


def _spelled(teacher: Vocabulary, tokenized: TokenizedText) -> NDArray[np.bool_]:
    """Which of the teacher's tokens have exactly the bytes of the text; true for tokens of zero width, and for a space
    that its tokenizer adds around a text."""
    if not tokenized.repaired_bytes:
        return np.ones(len(tokenized), np.bool_)
    from gold.bytes.plan import behind_space

    exact, _ = behind_space(teacher, tokenized)
    spelled: NDArray[np.bool_] = exact | (tokenized.starts == tokenized.ends)
    return spelled


def canonical_tokens(vocabulary: Vocabulary, tokenized: TokenizedText, at_start: bool) -> NDArray[np.bool_]:
    """Which tokens of a text its tokenizer would produce; at the end of a text that ends inside a character all count
    as such, since the rest is unknown."""
    own = vocabulary.encode(tokenized.data, at_start=at_start)
    tokens = set(zip(own.starts.tolist(), own.ends.tolist(), own.ids.tolist(), strict=True))
    unfinished = _unfinished(tokenized.data)
    rows = zip(tokenized.starts.tolist(), tokenized.ends.tolist(), tokenized.ids.tolist(), strict=True)
    return np.array([row in tokens or row[1] > unfinished for row in rows], np.bool_)


def _unfinished(data: bytes) -> int:
    """The byte at which an incomplete final character begins; the data's length if there is none."""
    for back, byte in enumerate(reversed(data[-3:]), 1):
        if byte >= 0xC0:
            width = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if width > back else len(data)
        if byte < 0x80:
            break
    return len(data)
