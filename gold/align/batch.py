"""A batch of texts in both models' tokens, with the index arrays for losses, on the devices of the models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gold.align.texts import AlignedText, TextAlignment, canonical_tokens
from gold.align.vocabularies import VocabularyPair
from gold.bytes.events import STOP_EVENT
from gold.bytes.pieces import PiecePlan, PieceRows
from gold.bytes.plan import BytePlan
from gold.kernels.layout import ByteLayout, KernelTrie
from gold.kernels.projection import PieceBatch, PieceSide
from gold.kernels.shared import SharedEvents

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gold.tokenize.vocabulary import TokenizedText, Vocabulary


class BatchSide:
    """One model's side of a batch: the rows of its states, the target of each, and its byte position.

    Rows of all texts are concatenated: a text of n tokens has rows 0 … n − 1, row k predicting token k, and one more
    for the stop event if it stopped. So are byte positions: a text of L bytes has L + 1.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        trie: Callable[[], KernelTrie],
        texts: Sequence[TokenizedText],
        stopped: Sequence[bool],
        targets: Sequence[NDArray[np.int32]],
        device: torch.device,
    ) -> None:
        self.vocabulary, self.device = vocabulary, device
        self._trie, self._texts, self._stopped, self._targets = trie, texts, stopped, targets

    @cached_property
    def row_starts(self) -> NDArray[np.int64]:
        """First row of each text, then the number of rows."""
        return _starts(t.ids.size + s for t, s in zip(self._texts, self._stopped, strict=True))

    @cached_property
    def position_starts(self) -> NDArray[np.int64]:
        """First byte position of each text, then the number of positions."""
        return _starts(len(t.data) + 1 for t in self._texts)

    @cached_property
    def targets(self) -> Tensor:
        """The id that each row predicts; for the stop event the sampled stop id, −1 on the teacher's side."""
        return _ids(self._targets, self.device)

    @cached_property
    def stops(self) -> Tensor:
        """The stop ids."""
        return torch.tensor(self.vocabulary.stop_ids, dtype=torch.int64, device=self.device)

    @cached_property
    def begins(self) -> NDArray[np.int64]:
        """The byte position at which each row begins."""
        return self._positions([np.append(t.starts, len(t.data)) for t in self._texts])

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """The byte position after the token of each row; −1 for stop events."""
        ends = self._positions([np.append(t.ends, -1) for t in self._texts])
        ends[self.row_starts[1:][np.asarray(self._stopped, np.bool_)] - 1] = -1
        return ends

    def _positions(self, offsets: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Byte positions from offsets in each text, the last of which is that of its stop event."""
        parts = zip(offsets, self._stopped, self.position_starts, strict=False)
        joined = [(own if stopped else own[:-1]) + first for own, stopped, first in parts]
        return np.concatenate(joined).astype(np.int64) if joined else np.empty(0, np.int64)

    @cached_property
    def layout(self) -> ByteLayout:
        """The layout that converts rows of logits to byte tables."""
        return ByteLayout.of(self._trie(), self.plan, self.device)

    @cached_property
    def plan(self) -> BytePlan:
        """The sums of probabilities that make up the byte tables."""
        return BytePlan.of(self.vocabulary, self._trie().trie, list(self._texts), list(self._stopped))

    def pieces(self, piece_at: NDArray[np.int32]) -> PieceRows:
        """The rows with their pieces; ``piece_at``: the piece at each byte of the vocabulary."""
        return PieceRows(self._trie().trie, self.plan, self.ends, self.vocabulary.offsets, piece_at)


class AlignedBatch:
    """A microbatch of texts and, on demand, the index arrays of each support, on the devices of the two models.

    ``other_batches``: the same texts with the other teachers of a mixture; a byte is supervised where all teachers
    supervise it.
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
        self.other_batches = tuple(other_batches)
        self._alignments = [TextAlignment(t, vocabularies) for t in self.texts]
        stopped = [t.stopped for t in self.texts]
        stop = np.array([-1], np.int32)
        self.student = BatchSide(
            vocabularies.student,
            lambda: vocabularies.kernel_tries[0],
            [t.student for t in self.texts],
            stopped,
            [t.ids for t in self.texts],
            device,
        )
        self.teacher = BatchSide(
            vocabularies.teacher,
            lambda: vocabularies.kernel_tries[1],
            [t.teacher for t in self.texts],
            stopped,
            [np.concatenate((t.teacher.ids, stop[: t.stopped])) for t in self.texts],
            teacher_device or device,
        )

    @property
    def bytes(self) -> int:
        """Bytes of all texts."""
        return sum(len(t.student.data) for t in self.texts)

    @property
    def tokens(self) -> int:
        """Student tokens of all texts, including stop ids."""
        return sum(len(t.ids) for t in self.texts)

    # student rows

    @cached_property
    def row_text(self) -> Tensor:
        """Text of each student row."""
        rows = np.diff(self.student.row_starts)
        return torch.from_numpy(np.repeat(np.arange(len(self.texts)), rows)).to(self.device)

    @cached_property
    def row_number(self) -> Tensor:
        """The index of each student row in its own text, from 0."""
        return _ids([np.arange(n) for n in np.diff(self.student.row_starts)], self.device)

    @cached_property
    def row_bytes(self) -> Tensor:
        """The number of bytes of the token of each student row; 0 for stop events."""
        return _ids(
            [np.append(t.student.ends - t.student.starts, [0] * t.stopped) for t in self.texts], self.device
        )

    @cached_property
    def stop_rows(self) -> Tensor:
        """Which student rows predict the stop event."""
        return _flags(
            [np.append(np.zeros(len(t.student)), [True] * t.stopped) for t in self.texts], self.device
        )

    @cached_property
    def sampled_row_mask(self) -> Tensor:
        """Which student rows belong to texts that the student wrote."""
        return _flags([t.sampled_mask for t in self.texts], self.device)

    @cached_property
    def sampled_rows(self) -> Tensor:
        """Student rows of texts that the student wrote, ascending."""
        return torch.nonzero(self.sampled_row_mask)[:, 0]

    @cached_property
    def sampling_logprobs(self) -> Tensor:
        """The log-probability with which each student row's id was sampled; 0 for ids of a data set.

        Raises: ValueError if a sampled text does not have it.
        """
        parts = []
        for text in self.texts:
            if text.sampled_mask.any() and text.sampling_logprobs is None:
                raise ValueError("importance weights need the log-probabilities that the ids were drawn with")
            known = text.sampling_logprobs
            parts.append(np.zeros(len(text.ids)) if known is None else known)
        return _tensor(parts, np.float64, self.device)

    @cached_property
    def canonical_rows(self) -> Tensor:
        """Whether the student's tokenizer would produce the token of each student row; true for stops."""
        student = self.vocabularies.student
        return _flags(
            [
                np.append(canonical_tokens(student, t.student, t.at_start), [True] * t.stopped)
                for t in self.texts
            ],
            self.device,
        )

    # bytes

    @cached_property
    def byte_offsets(self) -> Tensor:
        """The offset of each byte position in its own text."""
        return _ids([np.arange(n) for n in np.diff(self.student.position_starts)], self.device)

    @cached_property
    def one_to_one_bytes(self) -> Tensor:
        """Which byte positions lie in one-to-one chunks, or at the end of a text."""
        return _flags([alignment.one_to_one_bytes() for alignment in self._alignments], self.device)

    @cached_property
    def path(self) -> tuple[Tensor, Tensor, Tensor]:
        """The observed events: byte position, student row, and event of the byte table."""
        positions, rows, events = [], [], []
        for b, text in enumerate(self.texts):
            data = np.frombuffer(text.student.data, np.uint8)
            widths = text.student.ends - text.student.starts
            row = np.repeat(np.arange(len(widths)), widths)
            data = data[: row.size]  # a text without student tokens has no events
            if text.stopped:
                data, row = np.append(data.astype(np.int64), STOP_EVENT), np.append(row, len(widths))
            positions.append(self.student.position_starts[b] + np.arange(data.size))
            rows.append(row + self.student.row_starts[b])
            events.append(data)
        return _ids(positions, self.device), _ids(rows, self.device), _ids(events, self.device)

    @cached_property
    def observed_path(self) -> Tensor:
        """For each event of ``path``, whether the teacher gives it a probability: not inside a span whose bytes its
        tokens do not reproduce exactly, nor for a byte that none of its tokens has, nor for the stop event of a teacher
        without stop ids."""
        position, _, event = (x.to(self.teacher.device) for x in self.path)
        observed = self.teacher.layout.resolved[position, event]
        if not self.vocabularies.teacher.stop_ids:
            observed = observed & (event != STOP_EVENT)
        return observed.to(self.device)

    @cached_property
    def observed_rows(self) -> Tensor:
        """The student rows of sampled texts to all of whose events the teacher gives a probability."""
        unobserved = torch.zeros_like(self.sampled_row_mask)
        unobserved[self.path[1][~self.observed_path]] = True
        return self.sampled_row_mask & ~unobserved

    @cached_property
    def supervised_bytes(self) -> Tensor:
        """Byte positions where both sides predict the next event, ascending."""
        known = self.student.layout.supervised
        for batch in (self, *self.other_batches):
            known = known & batch.teacher.layout.supervised.to(self.device)
        return torch.nonzero(known)[:, 0]

    # pieces

    @cached_property
    def row_positions(self) -> tuple[Tensor, Tensor]:
        """The supervised byte positions at which a student row begins, and those at which a teacher row begins."""
        both = torch.zeros(int(self.student.position_starts[-1]), dtype=torch.bool, device=self.device)
        both[self.supervised_bytes] = True
        begins = []
        for side in (self.student, self.teacher):
            visits = side.plan.visits
            at = np.zeros(side.plan.positions, np.bool_)
            at[visits.position[visits.starts]] = True
            begins.append(torch.from_numpy(at).to(self.device) & both)
        return begins[0], begins[1]

    def piece_batch(self, positions: Tensor) -> PieceBatch:
        """The inputs of the comparison on pieces at the given byte positions, ascending; a student row begins at
        each."""
        pieces = self.vocabularies.pieces
        student, teacher = self.student.pieces(pieces.at_S), self.teacher.pieces(pieces.at_T)
        text = np.frombuffer(b"".join(t.student.data + b"\0" for t in self.texts), np.uint8)
        plan = PiecePlan.of(pieces, student, teacher, positions.cpu().numpy(), text)
        columns_S, columns_T = self.vocabularies.piece_columns
        arrays = plan.observed, plan.short, plan.source, plan.observed_white, pieces.white
        return PieceBatch(
            PieceSide(plan.student, self.student.layout, columns_S),
            PieceSide(plan.teacher, self.teacher.layout, columns_T),
            *(torch.from_numpy(a).to(self.device) for a in arrays),
        )

    # states

    @cached_property
    def synced_states(self) -> tuple[Tensor, Tensor]:
        """Rows of both sides that have read the same bytes: the start of every chunk, and the end of a text that
        stopped. With one vocabulary: every row."""
        return _ids(self._synced[0], self.device), _ids(self._synced[1], self.teacher.device)

    @cached_property
    def synced_offsets(self) -> Tensor:
        """The number of bytes that each of the synced states has read of its text."""
        return _ids(self._synced[2], self.device)

    @cached_property
    def synced_one_to_one(self) -> Tensor:
        """Whether each synced state is followed by a one-to-one chunk or the text's end."""
        return _flags(self._synced[3], self.device)

    @cached_property
    def _synced(self) -> list[list[NDArray[np.integer]]]:
        found: list[list[NDArray[np.integer]]] = [[], [], [], []]
        firsts = zip(self._alignments, self.student.row_starts, self.teacher.row_starts, strict=False)
        for alignment, first_S, first_T in firsts:
            rows_S, rows_T, offsets, single = alignment.states()
            for parts, part in zip(found, (rows_S + first_S, rows_T + first_T, offsets, single), strict=True):
                parts.append(part)
        return found

    @cached_property
    def shared_events(self) -> SharedEvents:
        """Byte-equal tokens and the stop event; with one vocabulary every id."""
        pair = self.vocabularies
        if pair.same:
            every = [np.arange(pair.student.size)]
            return SharedEvents(
                _ids(every, self.device),
                _ids(every, self.teacher.device),
                _ids([], self.device),
                _ids([], self.teacher.device),
                everything=True,
            )
        ids_V, ids_W = pair.shared_ids
        return SharedEvents(
            _ids([ids_V], self.device),
            _ids([ids_W], self.teacher.device),
            self.student.stops,
            self.teacher.stops,
        )

    # chunks and spans

    @cached_property
    def chunk_index(self) -> tuple[Tensor, Tensor, int, Tensor]:
        """Chunk of each student row and of each teacher row, the number of chunks, and which of them are one-to-one.
        The stop event is a chunk by itself; with one vocabulary every token is."""
        found = [alignment.chunks() for alignment in self._alignments]
        firsts = _starts(single.size for _, _, single in found)
        return (
            _ids([c + first for (c, _, _), first in zip(found, firsts, strict=False)], self.device),
            _ids([c + first for (_, c, _), first in zip(found, firsts, strict=False)], self.teacher.device),
            int(firsts[-1]),
            _flags([single for _, _, single in found], self.device),
        )

    @cached_property
    def spans(self) -> tuple[Tensor, Tensor, int]:
        """Span of each student row, of each teacher row (−1: in none), and the number of spans, as in
        ``TextAlignment.spans``."""
        found = [alignment.spans() for alignment in self._alignments]
        firsts = _starts(count for _, _, count in found)
        mine, theirs = (
            [np.where(f[side] < 0, -1, f[side] + first) for f, first in zip(found, firsts, strict=False)]
            for side in (0, 1)
        )
        return _ids(mine, self.device), _ids(theirs, self.teacher.device), int(firsts[-1])


def _starts(counts: Iterable[int]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(list(counts), dtype=np.int64)))


def _tensor(parts: Sequence[NDArray[np.generic]], dtype: type[np.generic], device: torch.device) -> Tensor:
    joined = np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)
    return torch.from_numpy(joined).to(device)


def _ids(parts: Sequence[NDArray[np.generic]], device: torch.device) -> Tensor:
    return _tensor(parts, np.int64, device)


def _flags(parts: Sequence[NDArray[np.generic]], device: torch.device) -> Tensor:
    return _tensor(parts, np.bool_, device)
