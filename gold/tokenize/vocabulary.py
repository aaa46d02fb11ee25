"""The vocabulary of one tokenizer in bytes: what every id stands for, and where the tokens of a text end."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from gold.errors import VocabularyError
from gold.tokenize.boundaries import PreTokenCuts
from gold.tokenize.families import (
    added_ids,
    character_ids,
    is_byte_piece,
    losses,
    normalizer_of,
    read_family,
    rewriter,
    text_tokenizer,
    token_spellings,
)
from gold.tokenize.foreign import foreign, is_panic
from gold.tokenize.load import open_source
from gold.tokenize.order import equal_groups
from gold.tokenize.repair import (
    NONE,
    byte_offsets,
    compose,
    decode_replacing,
    edit_boundaries,
    equal_stretches,
    rewriting_boundaries,
    settle_by_bytes,
    stretches_less_gone,
    true_ends,
)
from gold.tokenize.roles import Roles
from gold.tokenize.walks import fill_bytes, fill_ends, walk

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """The tokens of one text, laid on its bytes.

    `ends[i]` is the byte of `data` after token i; it never decreases, and the last one is len(data). Token i
    has the bytes data[starts[i]:ends[i]]; events have none, but an unknown token has the text that it replaced.
    Where a token ends inside a stretch that the tokenizer changed, its end is the last true boundary before, and the
    next token has the whole stretch.

    `exact[i]`: the token's own bytes are data[starts[i]:ends[i]]. `repaired_bytes` of the text lie in tokens
    that are not exact; a token whose only surplus is the space put before the text is not exact, but does not
    count there.
    """

    ids: Int32
    ends: Int64
    data: bytes
    exact: Bool
    repaired_bytes: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def starts(self) -> Int64:
        """The byte at which each token begins."""
        starts = np.zeros_like(self.ends)
        starts[1:] = self.ends[:-1]
        return starts


class Vocabulary:
    """The bytes of every id of a tokenizer, the roles of its special tokens, and its tokenizer for plain text.

    `offsets` (int64[size + 1]) and `blob` (uint8) hold the bytes of all ids one after the other. `is_special[id]`: the
    id is special, unknown or unused, and has no bytes. `stop_ids`, `bos_id`, `pad_id` and `unk_id` are roles. `family`
    is a name for people, such as "byte-level" or "word pieces"; `chat_template` is the source's, None without one.
    `fingerprint` is equal where all bytes and events are, in every process.
    """

    size: int
    offsets: Int64
    blob: npt.NDArray[np.uint8]
    is_special: Bool
    stop_ids: tuple[int, ...]
    bos_id: int | None
    pad_id: int | None
    unk_id: int | None
    family: str
    name: str
    chat_template: str | None

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop_ids: Iterable[int] = (),
        bos_id: int | None = None,
        pad_id: int | None = None,
        name: str = "tokenizers.Tokenizer",
        chat_template: str | None = None,
    ) -> None:
        """The vocabulary of a live tokenizer; `Vocabulary.load` finds the roles too.

        Raises: VocabularyError if the family is not supported or a stop id is no special token.
        """
        self._tokenizer = tokenizer
        self._family = read_family(tokenizer)
        self.family, self.name, self.chat_template = self._family.name, name, chat_template
        self.unk_id = self._family.unk_id
        self.stop_ids, self.bos_id, self.pad_id = (
            tuple(dict.fromkeys(int(i) for i in stop_ids)),
            bos_id,
            pad_id,
        )
        added = tokenizer.get_added_tokens_decoder()
        for index in self.stop_ids:
            if index not in added:
                raise VocabularyError(
                    f"stop id {index} of {name} is {_named(tokenizer, index)}; a stop id must be an added token, "
                    "because text must never give it: name the right ones in roles.stop, or mend eos_token_id in "
                    "generation_config.json (config.json)"
                )
        roles = {*self.stop_ids, bos_id, pad_id}
        self._events = {i for i, token in added.items() if token.special or i in roles}
        if self.unk_id is not None:
            self._events.add(self.unk_id)
        tokenized_texts = token_spellings(tokenizer, self._family, self._events)
        self.size = len(tokenized_texts)
        self.offsets = np.zeros(self.size + 1, np.int64)
        np.cumsum([len(tokenized or b"") for tokenized in tokenized_texts], out=self.offsets[1:])
        self.blob = np.frombuffer(b"".join(tokenized or b"" for tokenized in tokenized_texts), np.uint8)
        self.is_special = np.diff(self.offsets) == 0
        self._lengths_V = np.diff(self.offsets).astype(np.int32)
        # Text never gives these, whether they have bytes or not.
        self._control_V = np.zeros(self.size, np.bool_)
        self._control_V[list(self._events)] = True
        self._text_tokenizers: dict[tuple[bool, bool], tuple[Tokenizer, Int32 | None]] = {}
        # An unknown token that also ends a sequence, as some tokenizers have it, must not stand for text.
        control = self.unk_id in (*self.stop_ids, bos_id)
        self._unknown = None if control else self.unk_id
        self._plain_ids: dict[int, list[int]] = {}
        self._unmarked: Vocabulary | None = None
        self._rows: int | None = None

    @classmethod
    def load(
        cls, source: Any, stop_ids: Iterable[int] | None = None, roles: Roles | None = None
    ) -> "Vocabulary":
        """The vocabulary of whatever stands for a tokenizer: see `gold.tokenize.load.open_source`.

        `stop_ids` are further ids that end a sequence, beside those that the source names; a bare tokenizer names none.
        What `roles` names takes the place of everything found for that role.

        Raises: VocabularyError if there is no such tokenizer, or if its family is not supported.
        """
        found = open_source(source, stop_ids or (), roles)
        try:
            with foreign(found.name):
                return cls(
                    found.tokenizer,
                    stop_ids=found.stop_ids,
                    bos_id=found.bos_id,
                    pad_id=found.pad_id,
                    name=found.name,
                    chat_template=found.chat_template,
                )
        except VocabularyError as error:
            raise VocabularyError(f"{found.name}: {error}") from None

    @cached_property
    def markers(self) -> dict[str, int]:
        """The special tokens that are neither BOS, stop, pad nor unknown, by contents: `<think>` in some families."""
        roles = {*self.stop_ids, self.bos_id, self.pad_id, self.unk_id}
        added = sorted(self._tokenizer.get_added_tokens_decoder().items())
        return {t.content: i for i, t in added if t.special and t.content and i not in roles}

    def with_markers(self, rows: int | None = None) -> "Vocabulary":
        """The same vocabulary with the markers spelled by their contents instead of being events.

        What a model writes with a marker is then the text that a model without it would write, and its probability
        counts for that text. Text that looks like a marker still never gives it. Markers from id `rows` on, for which a
        model has no row, stay events.
        """
        if self._unmarked is not None:
            return self if rows is None else self._unmarked.with_markers(rows)
        spelled = [
            (i, t.encode()) for t, i in self.markers.items() if i < (self.size if rows is None else rows)
        ]
        ids = np.array([i for i, _ in spelled], np.int64)
        lengths = self._lengths_V.copy()
        lengths[ids] = [len(data) for _, data in spelled]
        other = object.__new__(Vocabulary)  # what is read of the tokenizer is the same, and not read again
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k != "fingerprint"})
        given = np.frombuffer(b"".join(data for _, data in spelled), np.uint8)
        other.blob = np.insert(self.blob, np.repeat(self.offsets[ids], lengths[ids]), given)
        other.offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
        other.is_special, other._lengths_V = lengths == 0, lengths
        other._unmarked, other._rows = self, rows
        return other

    def without_markers(self) -> "Vocabulary":
        """The same vocabulary with the markers being events, as it was loaded."""
        return self._unmarked or self

    def __repr__(self) -> str:
        return f"Vocabulary({self.name!r}, {self.family}, {self.size} ids, stops {list(self.stop_ids)})"

    def __reduce__(self) -> tuple[Any, ...]:
        roles = {
            "stop_ids": self.stop_ids,
            "bos_id": self.bos_id,
            "pad_id": self.pad_id,
            "chat_template": self.chat_template,
        }
        marked = None if self._unmarked is None else (self._rows,)
        return _vocabulary_of, (self._tokenizer, self.name, roles, marked)

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the bytes of all ids, of which are events, and of which text never gives, in hexadecimal."""
        digest = hashlib.sha256(b"gold vocabulary 1")
        for array in (self.offsets.astype("<i8"), self.blob, self.is_special, self._control_V):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def dummy_prefix(self) -> bool:
        """Whether a space is put before a text at the start of a sequence."""
        return self._family.prefix is not None

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one id, none for an event.

        Raises: VocabularyError for an id that the vocabulary does not have.
        """
        if not 0 <= index < self.size:
            raise VocabularyError(f"id {index} is outside the {self.size} ids of {self.name}")
        return self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes()

    @property
    def tokenizer(self) -> Tokenizer:
        """The live tokenizer that the vocabulary was read from; it parses special tokens, as `encode` never does."""
        return self._tokenizer

    def label(self, index: int) -> str:
        """The tokenizer's own string for an id, for people to read; its number where it has none."""
        return self._tokenizer.id_to_token(index) or f"#{index}"

    @staticmethod
    def text_of(data: bytes) -> str:
        """The text that a tokenizer is given for these bytes: UTF-8, with U+FFFD where they are invalid."""
        return data.decode("utf-8", "replace")

    def encode(self, text: str | bytes, *, at_start: bool = True) -> TokenizedText:
        """The tokens that the tokenizer gives a text, without BOS and EOS, laid on the given bytes.

        Text that looks like a special token is text. Invalid UTF-8 is U+FFFD to the tokenizer. With
        `at_start` false the text continues a sequence: no space is put before it where the family would put one
        before a text (Llama-2). An unknown token stands on the text that it replaces; what has no token at all, such
        as white space that was dropped, belongs to the next token.

        Raises: VocabularyError if the tokenizer has neither a token for a character nor an unknown token, or if
        rapidfuzz is needed and missing.
        """
        try:
            data = text.encode() if isinstance(text, str) else text
        except UnicodeEncodeError:
            data = str(text).encode("utf-8", "surrogatepass")
        given, replaced = decode_replacing(data)
        read_ids, read = self._read(given, at_start)
        ids, sources = self._as_text(read_ids)
        stream, stops = self._stream(ids)
        if stream == data:
            return TokenizedText(ids, stops, data, np.ones(len(ids), np.bool_), 0)
        prefix = at_start and self.dummy_prefix
        if prefix and len(stream) == len(data) + 1 and stream == b" " + data:
            return self._less_prefix(ids, stops, data)
        if self._family.word_space == "after" and stream == data + b" ":
            return self._less_suffix(ids, stops, data)
        rewritten = self._rewrite(given)
        back = rewriting_boundaries(given, rewritten, self._rewrite)
        if replaced is not None:
            back = compose(back, replaced)
        spelled, gone = np.frombuffer(rewritten.encode(), np.uint8), self._lost(rewritten)
        kept = (spelled[~gone] if gone.any() else spelled).tobytes()
        unknown = ids == self._unknown if self._unknown is not None else np.zeros(len(ids), np.bool_)
        # Where white space is dropped and characters are, equal bytes may still be others.
        certain = not (self._family.drops_spaces and gone.any())
        if certain and (stream == kept or (prefix and stream == b" " + kept)):
            own_stops = np.maximum(stops - (len(stream) - len(kept)), 0)
            first, last = stretches_less_gone(own_stops, unknown, gone, byte_offsets(rewritten))
        else:
            offsets = self._offsets(read_ids, read, given, rewritten, at_start)
            if offsets is None:
                at = edit_boundaries(spelled.tobytes(), stream)[stops]
                return _laid(ids, np.where(at >= 0, back[at], NONE), stops, stream, data, prefix)
            first, last = byte_offsets(rewritten)[offsets[sources]].T
        ends = true_ends(first, last, back, take_what_follows=self._family.word_space == "after")
        ends[-1:] = len(data)
        own = np.frombuffer(stream, np.uint8)
        settle_by_bytes(ends, first, last, stops, own, spelled, gone, unknown, back)
        return _laid(ids, ends, stops, stream, data, prefix)

    def ids(self, text: str, *, at_start: bool = True) -> Int32:
        """The ids of `encode(text)`, without the care for where they end."""
        return self._as_text(self._read(text, at_start)[0])[0]

    def decode(
        self, ids: Sequence[int] | npt.NDArray[Any], *, at_start: bool = True, rows: int = 0
    ) -> TokenizedText:
        """The text of any ids, canonical or not: the bytes that they stand for.

        With `at_start` the space that the family puts before a text (Llama-2, BERT) is dropped from the first token
        that has one; where spaces are behind words (CLIP) the last one is always dropped. Ids up to `rows`, the rows of
        an output matrix that is larger than the vocabulary, are events.

        Raises: VocabularyError for an id below 0, or beyond both the vocabulary and `rows`.
        """
        given = np.asarray(ids, np.int64).reshape(-1)
        outside = (given < 0) | (given >= max(self.size, rows))
        if outside.any():
            at = int(outside.argmax())
            raise VocabularyError(
                f"id {given[at]} at position {at} is outside the {max(self.size, rows)} ids of {self.name}"
            )
        kept = given.astype(np.int32)
        stream, stops = self._stream(kept)
        if at_start and self.dummy_prefix and stream[:1] == b" ":
            return self._less_prefix(kept, stops, stream[1:])
        if self._family.word_space == "after" and stream[-1:] == b" ":
            return self._less_suffix(kept, stops, stream[:-1])
        return TokenizedText(kept, stops, stream, np.ones(len(kept), np.bool_), 0)

    def ends(self, ids: Int32) -> Int64:
        """The byte at which each of the ids ends; ids beyond the vocabulary have no bytes.

        It is `decode(ids).ends` without the bytes, the check of the ids, and the care for a space put before a text.
        """
        ends = np.empty(len(ids), np.int64)
        walk(fill_ends, len(ids))(ids, self._lengths_V, ends)
        return ends

    def stable_ends(self, tokenized: TokenizedText) -> Bool:
        """For each token of a text: whether the tokenizer cuts after it whatever text comes next.

        The pre-tokenizer is asked with one continuation of every kind (letters, digits, spaces, marks,
        symbols …). An end that any of them moves, or that lies inside a character, is not hard; nor is one
        without a pre-tokenizer, and none where words have their space behind them.
        """
        if self._family.word_space == "after":
            return np.zeros(len(tokenized), np.bool_)
        text, replaced = decode_replacing(tokenized.data)
        # byte_of[c]: the byte of the given data at which character c of the text begins.
        widths = (
            [len(character.encode()) for character in text] if not text.isascii() else np.ones(len(text), int)
        )
        byte_of = np.concatenate(([0], np.cumsum(widths, dtype=np.int64)))
        if replaced is not None:
            byte_of = replaced[byte_of]
        at = np.searchsorted(byte_of, tokenized.ends)
        hard = self._cuts.hard(text, np.unique(at[byte_of[at] == tokenized.ends]).tolist())
        known = np.zeros(len(byte_of), np.bool_)
        known[hard] = True
        ends: Bool = known[at] & (byte_of[at] == tokenized.ends)
        # The last token has all that is left of the text, which may be the next one's.
        ends[-1:] &= tokenized.exact[-1:]
        return ends

    def canonical_ids(self) -> Int32:
        """For each id the one among those of equal bytes that text gives; events stand for themselves.

        Of ids with equal bytes it is the one that the tokenizer itself gives these bytes, else the lowest
        that is no byte-fallback piece, else the lowest.
        """
        canonical = np.arange(self.size, dtype=np.int32)
        for group in equal_groups(np.flatnonzero(~self.is_special), self.offsets, self.blob):
            canonical[group] = self._own_id(self.token_bytes(int(group[0])), group.tolist())
        return canonical

    def differences(self, other: "Vocabulary", limit: int = 5, texts: Iterable[str] = ()) -> list[str]:
        """One line for each way in which two vocabularies differ: sizes, ids, roles, and ids given to sample texts.

        At most `limit` ids (and as many texts) are shown, and then how many more there are. Empty if nothing
        differs.
        """
        lines = [
            f"{role}: {mine} here, {theirs} there"
            for role, mine, theirs in (
                ("size", self.size, other.size),
                ("stop ids", sorted(self.stop_ids), sorted(other.stop_ids)),
                ("BOS id", self.bos_id, other.bos_id),
                ("pad id", self.pad_id, other.pad_id),
            )
            if mine != theirs
        ]
        shared = min(self.size, other.size)
        suspects = np.arange(shared)
        if self._lengths_V[:shared].tobytes() == other._lengths_V[:shared].tobytes():
            length = int(self.offsets[shared])
            differs = np.flatnonzero(self.blob[:length] != other.blob[:length])
            suspects = np.unique(np.searchsorted(self.offsets, differs, "right") - 1)
        ids = [i for i in suspects.tolist() if self.token_bytes(i) != other.token_bytes(i)]
        lines += [
            f"id {i}: {self.token_bytes(i)!r} here, {other.token_bytes(i)!r} there" for i in ids[:limit]
        ]
        if len(ids) > limit:
            lines.append(f"and {len(ids) - limit} more ids")
        others = [line for text in texts if (line := self._other_ids(other, text))]
        lines += others[:limit]
        if len(others) > limit:
            lines.append(f"and {len(others) - limit} more texts")
        return lines

    def _other_ids(self, other: "Vocabulary", text: str) -> str | None:
        mine, theirs = self.encode(text).ids.tolist(), other.encode(text).ids.tolist()
        if mine == theirs:
            return None
        pairs = enumerate(zip(mine, theirs, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(mine), len(theirs)))
        shown = text if len(text) <= 40 else text[:40] + "…"
        return f"text {shown!r} from token {at} on: {mine[at : at + 4]} here, {theirs[at : at + 4]} there"

    @cached_property
    def _rewrite(self) -> Any:
        return rewriter(self._family)

    @cached_property
    def _normalize(self) -> Any:
        return normalizer_of(self._family)

    @cached_property
    def _lost(self) -> Any:
        return losses(self._tokenizer, self._family)

    @cached_property
    def _cuts(self) -> PreTokenCuts:
        tokenizer, _ = self._text_tokenizer(at_start=False)
        added = tokenizer.get_added_tokens_decoder().values()
        return PreTokenCuts(tokenizer.normalizer, tokenizer.pre_tokenizer, added, self._rewrite)

    def _text_tokenizer(self, at_start: bool, normalized: bool = False) -> tuple[Tokenizer, Int32 | None]:
        kind = at_start or self._family.prefix != "text", normalized
        if kind not in self._text_tokenizers:
            copy = text_tokenizer(
                self._tokenizer, self._family, self._events, at_start=kind[0], normalized=normalized
            )
            moved = added_ids(self._tokenizer, copy, self._events)
            originals: Int32 | None = None
            if moved:
                originals = np.arange(max(self.size, *moved) + 1, dtype=np.int32)
                originals[list(moved)] = list(moved.values())
            self._text_tokenizers[kind] = copy, originals
        return self._text_tokenizers[kind]

    def _read(self, text: str, at_start: bool, normalized: bool = False) -> tuple[Int32, Encoding]:
        """The ids that the tokenizer gives a text, those of events too, and its own record of where they stand."""
        tokenizer, originals = self._text_tokenizer(at_start, normalized)
        try:
            read = tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise VocabularyError(f"{self.name} has no token for a part of the text: {error}") from None
        except BaseException as error:
            if not is_panic(error):
                raise
            raise VocabularyError(
                f"{self.name} cannot read the text: {' '.join(str(error).split())}"
            ) from None
        ids = np.array(read.ids, np.int32)
        return (ids if originals is None else originals[ids]), read

    def _as_text(self, ids: Int32) -> tuple[Int32, Int64]:
        """Ids as text, and the position in `ids` that each of them comes from.

        A model can give text the id of a control token: if its vocabulary has it as a word or a piece, or if its merges
        allow that. Then the characters' own tokens stand in its place.
        """
        forged = self._control_V[ids]
        if self._unknown is not None:
            forged &= ids != self._unknown
        if not forged.any():
            return ids, np.arange(len(ids))
        pieces = [
            self._plain(index) if fake else [index] for index, fake in zip(ids.tolist(), forged, strict=True)
        ]
        plain = [index for piece in pieces for index in piece]
        return np.array(plain, np.int32), np.repeat(np.arange(len(ids)), [len(piece) for piece in pieces])

    def _plain(self, event: int) -> list[int]:
        if event not in self._plain_ids:
            own = (
                []
                if event == self.unk_id
                else character_ids(self._tokenizer, self._family, event, self._events)
            )
            self._plain_ids[event] = [i for i in own if i == self._unknown or not self._control_V[i]]
        return self._plain_ids[event]

    def _offsets(
        self, ids: Int32, read: Encoding, text: str, rewritten: str, at_start: bool
    ) -> npt.NDArray[np.int64] | None:
        """The characters (from, to) of the rewritten text that each of the ids stands on; None if that is not known.

        The tokenizer reads the rewritten text again where that is another one: its offsets are not always right behind
        a normaliser. They are not known if it gives other ids then (an added token that the normaliser changes).
        """
        if rewritten != text:
            again, read = self._read(self._normalize(text), at_start, normalized=True)
            if not np.array_equal(ids, again):
                return None
        return np.array(read.offsets, np.int64).reshape(-1, 2)

    def _stream(self, ids: Int32) -> tuple[bytes, Int64]:
        """The bytes of ids one after the other, and where each of them ends."""
        ends = self.ends(ids)
        data = np.empty(ends[-1] if len(ends) else 0, np.uint8)
        walk(fill_bytes, len(ids))(ids, ends, self.offsets, self.blob, data)
        return data.tobytes(), ends

    def _less_prefix(self, ids: Int32, stops: Int64, data: bytes) -> TokenizedText:
        """The spelling of tokens that have one space more than the text, at its start."""
        exact = np.ones(len(ids), np.bool_)
        exact[int((stops > 0).argmax())] = False
        return TokenizedText(ids, np.maximum(stops - 1, 0), data, exact, 0)

    def _less_suffix(self, ids: Int32, stops: Int64, data: bytes) -> TokenizedText:
        """The spelling of tokens that have one space more than the text, at its end."""
        exact = np.ones(len(ids), np.bool_)
        last = int((stops == stops[-1]).argmax())
        exact[last] = False
        ends = np.minimum(stops, len(data))
        return TokenizedText(ids, ends, data, exact, len(data) - int(ends[last - 1] if last else 0))

    def _own_id(self, tokenized: bytes, group: list[int]) -> int:
        try:
            ids = self.ids(tokenized.decode(), at_start=False).tolist()
        except UnicodeDecodeError:
            ids = []
        if len(ids) == 1 and ids[0] in group:
            return int(ids[0])
        return min(group, key=lambda index: (is_byte_piece(self._tokenizer.id_to_token(index)), index))


def _vocabulary_of(
    tokenizer: Tokenizer, name: str, roles: dict[str, Any], marked: tuple[int | None] | None
) -> Vocabulary:
    plain = Vocabulary(tokenizer, name=name, **roles)
    return plain if marked is None else plain.with_markers(*marked)


def _laid(ids: Int32, ends: Int64, stops: Int64, stream: bytes, data: bytes, prefix: bool) -> TokenizedText:
    """The spelling of tokens whose bytes differ from the data, by their ends (NONE where there is no true boundary)."""
    ends = np.maximum.accumulate(np.maximum(ends, 0))
    ends[-1:] = len(data)
    starts, firsts = (np.concatenate(([0], after))[:-1] for after in (ends, stops))
    exact: Bool = stops - firsts == ends - starts
    own, given = np.frombuffer(stream, np.uint8), np.frombuffer(data, np.uint8)
    exact[exact] = equal_stretches(own, firsts[exact], given, starts[exact], (stops - firsts)[exact])
    counted = exact.copy()
    if prefix and stream[:1] == b" ":
        first = int((stops > 0).argmax())
        counted[first] |= starts[first] == 0 and stream[: stops[first]] == b" " + data[: ends[first]]
    repaired = len(data) - int((ends - starts)[counted].sum())
    return TokenizedText(ids, ends, data, exact, repaired)


def _named(tokenizer: Tokenizer, index: int) -> str:
    token = tokenizer.id_to_token(index)
    return "none of its ids" if token is None else f"{token!r}, which is no added token"
