"""Sampled texts as both models see them, and the index arrays that a loss needs of a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gold.align.chunks import align_tokens
from gold.align.decomposition import TokenWeights, likeliest_pairs, token_weights
from gold.align.overlap import byte_equal_pairs
from gold.bytes.pieces import PiecePlan, PieceReading, Pieces
from gold.bytes.plan import BytePlan, ByteTrie, behind_space
from gold.kernels.layout import STOP_EVENT, ByteLayout
from gold.kernels.projection import PieceBatch, PieceSide
from gold.kernels.shared import SharedEvents
from gold.tokenize.markers import retokenize, shared_markers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gold.tokenize.vocabulary import TokenizedText, Vocabulary


@dataclass(frozen=True)
class AlignedText:
    """One completion: the student's ids as sampled, both sides' spellings of its bytes, and what is known of it.

    ``ids`` holds the stop id last where the text ``stopped``; the tokenized texts never do. ``sampled``: which ids the
    student wrote, one flag for all or one for each. ``advantage`` is the task reward relative to its group.
    ``sampling_logprobs`` is the log-probability that each id was drawn with, where that is known. ``at_start``: it
    begins a sequence, as in ``Vocabulary.encode``.
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


@dataclass(frozen=True)
class VocabularyPair:
    """Two vocabularies and what follows from them alone: tries, byte-equal tokens, whether they are one."""

    student: Vocabulary
    teacher: Vocabulary

    @cached_property
    def same(self) -> bool:
        """Whether the teacher can score the student's own ids, see ``Vocabulary.same_as``."""
        return self.student.same_as(self.teacher)

    @cached_property
    def student_trie(self) -> ByteTrie:
        """The student's byte trie."""
        return ByteTrie.of(self.student)

    @cached_property
    def teacher_trie(self) -> ByteTrie:
        """The teacher's byte trie."""
        return self.student_trie if self.same else ByteTrie.of(self.teacher)

    @cached_property
    def shared_ids(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Pairs of byte-equal text tokens, as two arrays of ids."""
        return byte_equal_pairs(self.student, self.teacher)

    @cached_property
    def pieces(self) -> Pieces:
        """The byte strings that both vocabularies can be cut back to."""
        return Pieces.of(self.student, self.teacher)

    @cached_property
    def token_weights(self) -> TokenWeights:
        """Which teacher tokens each student token counts as, where the two are not compared by bytes."""
        return token_weights(self.student, self.teacher)

    @cached_property
    def relaxed_ids(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Pairs of tokens of which one counts mostly as the other, as two arrays of ids."""
        return likeliest_pairs(self.token_weights, self.student)

    @cached_property
    def markers(self) -> dict[int, int]:
        """For each marker of the student that the teacher has too: the teacher's id of it."""
        return shared_markers(self.student, self.teacher)

    def read(self, tokenized: TokenizedText, *, at_start: bool = True) -> TokenizedText:
        """The teacher's own reading of a text that the student spelled; the same ids where the vocabularies are one."""
        return tokenized if self.same else retokenize(self.teacher, tokenized, self.markers, at_start)

    def read_back(self, tokenized: TokenizedText, *, at_start: bool = True) -> TokenizedText:
        """The student's own reading of a text that the teacher spelled."""
        back = {theirs: mine for mine, theirs in self.markers.items()}
        return tokenized if self.same else retokenize(self.student, tokenized, back, at_start)


class AlignedBatch:
    """A microbatch of texts and, on demand, the index arrays of each support, on the devices of the two models.

    Rows are model states, all texts concatenated: a text of n tokens has rows 0 … n − 1, row k predicting token k, and
    one more for the stop event if it stopped.

    ``other_batches``: the same texts as further teachers read them, where they are compared with all as one; a byte is
    supervised where all of them say what comes next.
    """

    def __init__(
        self,
        texts: Sequence[AlignedText],
        vocabularies: VocabularyPair,
        device: torch.device,
        teacher_device: torch.device | None = None,
        other_batches: Sequence[AlignedBatch] = (),
    ) -> None:
        self.texts = tuple(texts)
        self.vocabularies = vocabularies
        self.device = device
        self.teacher_device = teacher_device or device
        self.other_batches = tuple(other_batches)
        self._alignments = [align_tokens(t.student, t.teacher) for t in self.texts]

    @property
    def bytes(self) -> int:
        """Bytes of all texts."""
        return sum(len(t.student.data) for t in self.texts)

    @property
    def tokens(self) -> int:
        """Student tokens of all texts, stop ids included."""
        return sum(len(t.ids) for t in self.texts)

    @cached_property
    def row_starts(self) -> NDArray[np.int64]:
        """First student row of each text, and the number of rows last."""
        return _starts([t.student.ids.size + t.stopped for t in self.texts])

    @cached_property
    def teacher_row_starts(self) -> NDArray[np.int64]:
        """First teacher row of each text, and the number of rows last."""
        return _starts([t.teacher.ids.size + t.stopped for t in self.texts])

    @cached_property
    def row_text(self) -> Tensor:
        """Text of each student row."""
        return torch.from_numpy(np.repeat(np.arange(len(self.texts)), np.diff(self.row_starts))).to(
            self.device
        )

    @cached_property
    def target_S(self) -> Tensor:
        """The sampled id of each student row, the stop id included."""
        return _ids([t.ids for t in self.texts], self.device)

    @cached_property
    def target_T(self) -> Tensor:
        """The teacher's token of each teacher row; −1 where the row predicts the stop event."""
        stop = np.array([-1], np.int32)
        parts = [np.concatenate((t.teacher.ids, stop)) if t.stopped else t.teacher.ids for t in self.texts]
        return _ids(parts, self.teacher_device)

    @cached_property
    def stops_S(self) -> Tensor:
        """The student's stop ids."""
        return torch.tensor(self.vocabularies.student.stop_ids, dtype=torch.int64, device=self.device)

    @cached_property
    def stops_T(self) -> Tensor:
        """The teacher's stop ids."""
        return torch.tensor(self.vocabularies.teacher.stop_ids, dtype=torch.int64, device=self.teacher_device)

    @cached_property
    def stop_rows(self) -> Tensor:
        """Which student rows predict the stop event."""
        stop = np.zeros(int(self.row_starts[-1]), np.bool_)
        stop[[int(end) - 1 for end, t in zip(self.row_starts[1:], self.texts, strict=True) if t.stopped]] = (
            True
        )
        return torch.from_numpy(stop).to(self.device)

    @cached_property
    def row_number(self) -> Tensor:
        """The number of each student row in its own text, from 0."""
        parts = [np.arange(n) for n in np.diff(self.row_starts)]
        return _ids(parts, self.device)

    @cached_property
    def row_bytes(self) -> Tensor:
        """The bytes of the token of each student row; 0 for stop events."""
        widths = [np.append(t.student.ends - t.student.starts, [0] * t.stopped) for t in self.texts]
        return _ids(widths, self.device)

    @cached_property
    def sampled_row_mask(self) -> Tensor:
        """Which student rows belong to texts that the student wrote."""
        masks = [t.sampled_mask for t in self.texts]
        return _ids(masks, self.device).bool()

    @cached_property
    def sampled_rows(self) -> Tensor:
        """Student rows of texts that the student wrote, ascending."""
        return torch.nonzero(self.sampled_row_mask)[:, 0]

    @cached_property
    def sampling_logprobs(self) -> Tensor:
        """The log-probability that each student row's id was drawn with; 0 for ids of a data set.

        Raises: ValueError if a sampled text does not have it.
        """
        parts = []
        for text in self.texts:
            if text.sampled_mask.any() and text.sampling_logprobs is None:
                raise ValueError("importance weights need the log-probabilities that the ids were drawn with")
            parts.append(
                np.zeros(len(text.ids)) if text.sampling_logprobs is None else text.sampling_logprobs
            )
        joined = np.concatenate(parts).astype(np.float64) if parts else np.empty(0)
        return torch.from_numpy(joined).to(self.device)

    @cached_property
    def canonical_rows(self) -> Tensor:
        """Whether the token of each student row is one that the student's tokenizer itself puts there; stops are."""
        student = self.vocabularies.student
        parts = [
            np.append(canonical_tokens(student, t.student, t.at_start), [True] * t.stopped)
            for t in self.texts
        ]
        joined = np.concatenate(parts) if parts else np.empty(0)
        return torch.from_numpy(joined.astype(np.bool_)).to(self.device)

    # bytes

    @cached_property
    def position_starts(self) -> NDArray[np.int64]:
        """First byte position of each text, and the number of positions last: a text has one more than bytes."""
        return _starts([len(t.student.data) + 1 for t in self.texts])

    @cached_property
    def begins_S(self) -> NDArray[np.int64]:
        """The byte position at which each student row begins."""
        return self._begins([t.student for t in self.texts])

    @cached_property
    def begins_T(self) -> NDArray[np.int64]:
        """The byte position at which each teacher row begins."""
        return self._begins([t.teacher for t in self.texts])

    def _begins(self, tokenized_texts: Sequence[TokenizedText]) -> NDArray[np.int64]:
        parts = []
        for first, tokenized, text in zip(self.position_starts, tokenized_texts, self.texts, strict=False):
            starts = np.append(tokenized.starts, len(tokenized.data)) if text.stopped else tokenized.starts
            parts.append(starts + first)
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    @cached_property
    def byte_offsets(self) -> Tensor:
        """The offset of each byte position in its own text."""
        return _ids([np.arange(n) for n in np.diff(self.position_starts)], self.device)

    @cached_property
    def one_to_one_bytes(self) -> Tensor:
        """Which byte positions lie in chunks of one token on both sides, or at the end of a text."""
        parts = []
        for text, alignment in zip(self.texts, self._alignments, strict=True):
            inside = np.zeros(len(text.student.data) + 1, np.bool_)
            chunks = np.repeat(alignment.one_to_one_C, alignment.ends_C - alignment.starts_C)
            inside[: chunks.size] = chunks  # a text that neither side has a token for has no chunk
            inside[-1] = True
            parts.append(inside)
        joined = np.concatenate(parts) if parts else np.empty(0, np.bool_)
        return torch.from_numpy(joined).to(self.device)

    @cached_property
    def path(self) -> tuple[Tensor, Tensor, Tensor]:
        """The events that did happen: at which byte position, by which student row, which event of a byte table."""
        positions, rows, events = [], [], []
        for b, text in enumerate(self.texts):
            data, first = np.frombuffer(text.student.data, np.uint8), int(self.position_starts[b])
            widths = text.student.ends - text.student.starts
            row = np.repeat(np.arange(len(widths)), widths)
            data = data[: row.size]  # of a text that the student has no token for, nothing was written
            if text.stopped:
                data, row = np.append(data.astype(np.int64), STOP_EVENT), np.append(row, len(widths))
            positions.append(first + np.arange(data.size))
            rows.append(row + self.row_starts[b])
            events.append(data)
        return _ids(positions, self.device), _ids(rows, self.device), _ids(events, self.device)

    @cached_property
    def observed_path(self) -> Tensor:
        """For each event of ``path`` whether the teacher says how likely it is: not inside a stretch that its tokens do
        not spell exactly, nor a byte that none of them has, nor the stop event of a teacher without stop ids."""
        position, _, event = (x.to(self.teacher_device) for x in self.path)
        told = self.layout_T.resolved[position, event]
        if not self.vocabularies.teacher.stop_ids:
            told = told & (event != STOP_EVENT)
        return told.to(self.device)

    @cached_property
    def observed_rows(self) -> Tensor:
        """The student rows of sampled texts of whose every event the teacher says how likely it is."""
        untold = torch.zeros_like(self.sampled_row_mask)
        untold[self.path[1][~self.observed_path]] = True
        return self.sampled_row_mask & ~untold

    @cached_property
    def layout_S(self) -> ByteLayout:
        """The student's byte layout."""
        pair = self.vocabularies
        stopped = [t.stopped for t in self.texts]
        plan = BytePlan.of(pair.student, pair.student_trie, [t.student for t in self.texts], stopped)
        return ByteLayout.of(_columns(pair.student_trie), _columns(plan), pair.student.size, self.device)

    @cached_property
    def layout_T(self) -> ByteLayout:
        """The teacher's byte layout."""
        pair = self.vocabularies
        stopped = [t.stopped for t in self.texts]
        plan = BytePlan.of(pair.teacher, pair.teacher_trie, [t.teacher for t in self.texts], stopped)
        return ByteLayout.of(
            _columns(pair.teacher_trie), _columns(plan), pair.teacher.size, self.teacher_device
        )

    @cached_property
    def supervised_bytes(self) -> Tensor:
        """Byte positions where both sides say what comes next, ascending."""
        known = self.layout_S.supervised
        for batch in (self, *self.other_batches):
            known = known & batch.layout_T.supervised.to(self.device)
        return torch.nonzero(known)[:, 0]

    # pieces

    @cached_property
    def row_positions(self) -> tuple[Tensor, Tensor]:
        """At which byte positions a row of the student begins, and one of the teacher, both sides being supervised."""
        begins = []
        for layout in (self.layout_S, self.layout_T):
            plan = layout.plan
            at = np.zeros(layout.positions, np.bool_)
            at[plan["mass_position"][plan["mass_ptr"][:-1]][plan["visit_starts"]]] = True
            begins.append(torch.from_numpy(at).to(self.device))
        both = torch.zeros_like(begins[0])
        both[self.supervised_bytes] = True
        return begins[0] & both, begins[1] & both

    def piece_batch(self, positions: Tensor) -> PieceBatch:
        """What both sides are compared on at the given byte positions, ascending; a student row begins at each."""
        pair, pieces = self.vocabularies, self.vocabularies.pieces
        student, teacher = (
            PieceReading(trie, BytePlan(**layout.plan), ends, vocabulary.offsets, piece_at)
            for trie, layout, ends, vocabulary, piece_at in (
                (pair.student_trie, self.layout_S, self._row_ends("student"), pair.student, pieces.at_S),
                (pair.teacher_trie, self.layout_T, self._row_ends("teacher"), pair.teacher, pieces.at_T),
            )
        )
        text = np.frombuffer(b"".join(t.student.data + b"\0" for t in self.texts), np.uint8)
        plan = PiecePlan.of(pieces, student, teacher, positions.cpu().numpy(), text)
        size = pieces.ids.size
        arrays = plan.observed, plan.short, plan.source, plan.observed_white, pieces.white
        return PieceBatch(
            PieceSide(_columns(plan.student), self.layout_S, pieces.at_S, student.offsets, size),
            PieceSide(_columns(plan.teacher), self.layout_T, pieces.at_T, teacher.offsets, size),
            *(torch.from_numpy(a).to(self.device) for a in arrays),
        )

    def _row_ends(self, side: str) -> NDArray[np.int64]:
        """The byte position after the token of each row of a side; −1 for stop events."""
        parts = []
        for first, text in zip(self.position_starts, self.texts, strict=False):
            ends = getattr(text, side).ends + first
            parts.append(np.append(ends, -1) if text.stopped else ends)
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    # states

    @cached_property
    def synced_states(self) -> tuple[Tensor, Tensor]:
        """Rows of both sides that have read the same bytes: the start of every chunk, and the end of a text that
        stopped. Where both vocabularies are one: every row."""
        mine, theirs, _, _ = self._synced
        return _ids(mine, self.device), _ids(theirs, self.teacher_device)

    @cached_property
    def synced_offsets(self) -> Tensor:
        """The number of bytes that each of the synced states has read of its text."""
        return _ids(self._synced[2], self.device)

    @cached_property
    def synced_one_to_one(self) -> Tensor:
        """Whether what follows each synced state is a chunk of one token on both sides, or the text's end."""
        return _ids(self._synced[3], self.device).bool()

    @cached_property
    def _synced(self) -> tuple[list[NDArray[np.int64]], ...]:
        """Student rows, teacher rows, offsets and whether a one-to-one chunk follows, of the synced states by text."""
        found: tuple[list[NDArray[np.int64]], ...] = ([], [], [], [])
        for b, (text, alignment) in enumerate(zip(self.texts, self._alignments, strict=True)):
            # A teacher that has no token for a text is in no state but the one before its stop event.
            count = len(alignment) if text.teacher.ids.size or text.stopped else 0
            rows_S, rows_T = (alignment.chunks[:count, i].astype(np.int64) for i in (0, 2))
            single = alignment.one_to_one_C[:count]
            if self.vocabularies.same:
                rows_S = rows_T = np.arange(text.student.ids.size)
                single = np.ones(text.student.ids.size, np.bool_)
            offsets = text.student.starts[rows_S]
            if text.stopped:
                rows_S, rows_T = (
                    np.append(r, s.ids.size) for r, s in ((rows_S, text.student), (rows_T, text.teacher))
                )
                offsets, single = np.append(offsets, len(text.student.data)), np.append(single, True)
            columns = (rows_S + self.row_starts[b], rows_T + self.teacher_row_starts[b], offsets, single)
            for parts, column in zip(found, columns, strict=True):
                parts.append(column.astype(np.int64))
        return found

    @cached_property
    def shared_events(self) -> SharedEvents:
        """Byte-equal tokens and the stop event; where both vocabularies are one, every id."""
        pair = self.vocabularies
        if pair.same:
            every = np.arange(pair.student.size)
            none = torch.empty(0, dtype=torch.int64)
            return SharedEvents(
                _ids([every], self.device),
                _ids([every], self.teacher_device),
                none.to(self.device),
                none.to(self.teacher_device),
                everything=True,
            )
        ids_V, ids_W = pair.shared_ids
        return SharedEvents(
            _ids([ids_V], self.device), _ids([ids_W], self.teacher_device), self.stops_S, self.stops_T
        )

    # chunks and spans

    @cached_property
    def chunk_index(self) -> tuple[Tensor, Tensor, int, Tensor]:
        """Chunk of each student row and of each teacher row, the number of chunks, and which of them are one token on
        both sides. The stop event is a chunk of its own; where both vocabularies are one, every token is."""
        mine: list[NDArray[np.int64]] = []
        theirs: list[NDArray[np.int64]] = []
        single: list[NDArray[np.bool_]] = []
        chunks = 0
        for text, alignment in zip(self.texts, self._alignments, strict=True):
            chunk_S, chunk_T, one = alignment.chunk_S, alignment.chunk_T, alignment.one_to_one_C
            if self.vocabularies.same:
                chunk_S = chunk_T = np.arange(text.student.ids.size, dtype=np.int32)
                one = np.ones(chunk_S.size, np.bool_)
            if text.stopped:
                chunk_S, chunk_T = (np.append(c, one.size) for c in (chunk_S, chunk_T))
                one = np.append(one, True)
            mine.append(chunk_S.astype(np.int64) + chunks)
            theirs.append(chunk_T.astype(np.int64) + chunks)
            single.append(one)
            chunks += one.size
        return (
            _ids(mine, self.device),
            _ids(theirs, self.teacher_device),
            chunks,
            _ids(single, self.device).bool(),
        )

    @cached_property
    def spans(self) -> tuple[Tensor, Tensor, int]:
        """Span of each student row, of each teacher row (−1: in none), and the number of spans.

        A span is a run of chunks up to the next edge where the teacher cuts whatever text comes next, so that its end
        is known when the student reaches it; the stop event ends the last one. What follows the last such edge of a
        text that did not stop is in no span, nor is one of which the teacher's tokens do not spell every byte, nor a
        text of a data set: nobody sampled it. Where both vocabularies are one, every row is a span.
        """
        mine: list[NDArray[np.int64]] = []
        theirs: list[NDArray[np.int64]] = []
        spans = 0
        for text, alignment in zip(self.texts, self._alignments, strict=True):
            if text.ids.size and not text.sampled_mask.any():
                mine.append(np.full(text.student.ids.size + text.stopped, -1))
                theirs.append(np.full(text.teacher.ids.size + text.stopped, -1))
                continue
            if self.vocabularies.same:
                rows = np.arange(text.student.ids.size + text.stopped) + spans
                mine.append(rows)
                theirs.append(rows)
                spans += rows.size
                continue
            hard = self.vocabularies.teacher.stable_ends(text.teacher)
            last = alignment.chunks[:, 3] - 1
            ends = np.append(hard, False)[last]  # a chunk before the teacher's first token ends nowhere
            span_C = np.cumsum(ends) - ends
            closed = int(ends.sum())
            span_C = np.where((span_C < closed) | text.stopped, span_C, -1)
            span_S, span_T = span_C[alignment.chunk_S], span_C[alignment.chunk_T]
            if text.stopped:
                final = int(span_C[-1]) if span_C.size and not ends[-1] else closed
                span_S, span_T = np.append(span_S, final), np.append(span_T, final)
                closed = final + 1
            untold = np.zeros(closed + 1, np.bool_)  # the last is that of −1
            untold[span_T[: text.teacher.ids.size][~self._spelled(text.teacher)]] = True
            untold[-1] = True
            mine.append(np.where(untold[span_S], -1, span_S + spans))
            theirs.append(np.where(untold[span_T], -1, span_T + spans))
            spans += closed
        return _ids(mine, self.device), _ids(theirs, self.teacher_device), spans

    def _spelled(self, reading: TokenizedText) -> NDArray[np.bool_]:
        """Which tokens of the teacher's reading are the bytes that they stand on; those without width are nothing by
        themselves, and a space that its tokenizer puts around a text is no fault."""
        if not reading.repaired_bytes:
            return np.ones(len(reading), np.bool_)
        exact, _ = behind_space(self.vocabularies.teacher, reading)
        spelled: NDArray[np.bool_] = exact | (reading.starts == reading.ends)
        return spelled


def canonical_tokens(vocabulary: Vocabulary, tokenized: TokenizedText, at_start: bool) -> NDArray[np.bool_]:
    """Which tokens of a text are those that its own tokenizer puts there; the last ones, where the text ends inside a
    character, count as such, since nobody knows the rest."""
    own = vocabulary.encode(tokenized.data, at_start=at_start)
    tokens = set(zip(own.starts.tolist(), own.ends.tolist(), own.ids.tolist(), strict=True))
    unfinished = _unfinished(tokenized.data)
    rows = zip(tokenized.starts.tolist(), tokenized.ends.tolist(), tokenized.ids.tolist(), strict=True)
    return np.array([row in tokens or row[1] > unfinished for row in rows], np.bool_)


def _unfinished(data: bytes) -> int:
    """Where the character begins that the end of the data cuts off; the data's length if it cuts none."""
    for back, byte in enumerate(reversed(data[-3:]), 1):
        if byte >= 0xC0:
            width = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if width > back else len(data)
        if byte < 0x80:
            break
    return len(data)


def _columns(arrays: object) -> dict[str, NDArray[np.generic]]:
    return {f.name: getattr(arrays, f.name) for f in fields(arrays)}  # type: ignore[arg-type]


def _starts(counts: list[int]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


def _ids(parts: Sequence[NDArray[np.generic]], device: torch.device) -> Tensor:
    joined = np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
    return torch.from_numpy(joined).to(device)
