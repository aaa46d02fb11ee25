"""The vocabulary of one tokenizer: the bytes of every id, its special tokens, text to ids and ids to text."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from gold.errors import VocabularyError
from gold.tokenize.encode import TextEncoder
from gold.tokenize.families import is_byte_piece, read_family, token_contents
from gold.tokenize.foreign import foreign
from gold.tokenize.load import open_source
from gold.tokenize.order import equal_groups
from gold.tokenize.roles import Roles
from gold.tokenize.text import Bool, Int32, Int64, TokenBytes, TokenizedText, less_added_space

__all__ = ["Bool", "Int32", "Int64", "TokenizedText", "Vocabulary"]


class Vocabulary:
    """The bytes of every id of a tokenizer, the roles of its special tokens, and its tokenizer for plain text.

    `offsets` (int64[size + 1]) and `blob` (uint8) hold the concatenated bytes of all ids. `is_special[id]`: the id is a
    special token, unknown or unused, and has no bytes. `stop_ids`, `bos_id`, `pad_id` and `unk_id` are roles. `family`
    is a name for display, such as "byte-level" or "word pieces"; `chat_template` is the source's, None without one.
    """

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
        """The vocabulary of a tokenizer object; `Vocabulary.load` finds the roles too.

        Raises: VocabularyError if the family is not supported or a stop id is no added token.
        """
        family = read_family(tokenizer)
        self.tokenizer, self.name, self.chat_template = tokenizer, name, chat_template
        self.family, self._family, self.unk_id = family.name, family, family.unk_id
        self.stop_ids = tuple(dict.fromkeys(int(i) for i in stop_ids))
        self.bos_id, self.pad_id = bos_id, pad_id
        added = tokenizer.get_added_tokens_decoder()
        for index in self.stop_ids:
            if index not in added:
                token = tokenizer.id_to_token(index)
                named = "none of its ids" if token is None else f"{token!r}, which is no added token"
                raise VocabularyError(
                    f"stop id {index} of {name} is {named}; a stop id must be an added token, "
                    "because text must never give it: name the right ones in roles.stop, or mend eos_token_id in "
                    "generation_config.json (config.json)"
                )
        roles = {*self.stop_ids, bos_id, pad_id}
        special = {i for i, token in added.items() if token.special or i in roles}
        if self.unk_id is not None:
            special.add(self.unk_id)
        self._special = frozenset(special)
        table = TokenBytes.of(token_contents(tokenizer, family, self._special))
        # An unknown token that also ends or begins a sequence must not be produced by text.
        unk_id = None if self.unk_id in (*self.stop_ids, bos_id) else self.unk_id
        self._encoder = TextEncoder(tokenizer, family, self._special, table, unk_id, name)
        self._unmarked: Vocabulary | None = None
        self._rows: int | None = None
        self._set_table(table)

    def _set_table(self, table: TokenBytes) -> None:
        self._table, self.size, self.offsets, self.blob = table, len(table), table.offsets, table.blob
        self.is_special: Bool = table.lengths_V == 0

    @classmethod
    def load(
        cls, source: Any, stop_ids: Iterable[int] | None = None, roles: Roles | None = None
    ) -> "Vocabulary":
        """The vocabulary of a path, a Hub id or an object: see `gold.tokenize.load.open_source`.

        `stop_ids` are added to the stop ids that the source names; a bare tokenizer names none. A role in `roles`
        replaces everything found for that role.

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

    def __repr__(self) -> str:
        return f"Vocabulary({self.name!r}, {self.family}, {self.size} ids, stops {list(self.stop_ids)})"

    def __reduce__(self) -> tuple[Any, ...]:
        roles = {name: getattr(self, name) for name in ("stop_ids", "bos_id", "pad_id", "chat_template")}
        markers = None if self._unmarked is None else (self._rows,)
        return _unpickled, (self.tokenizer, self.name, roles, markers)

    # Special tokens and bytes

    @cached_property
    def markers(self) -> dict[str, int]:
        """Markers: special tokens that are neither BOS, stop, pad nor unknown (`<think>` in some families)."""
        roles = {*self.stop_ids, self.bos_id, self.pad_id, self.unk_id}
        added = sorted(self.tokenizer.get_added_tokens_decoder().items())
        return {t.content: i for i, t in added if t.special and t.content and i not in roles}

    def with_markers(self, rows: int | None = None) -> "Vocabulary":
        """The same vocabulary with the contents of the markers as their bytes.

        A marker that a model generates then counts as the text that a model without it would generate, and so does its
        probability. Text that looks like a marker still never produces it. Markers with ids from `rows` on, for which a
        model has no output row, keep no bytes.
        """
        if self._unmarked is not None:
            return self if rows is None else self._unmarked.with_markers(rows)
        last = self.size if rows is None else rows
        other = object.__new__(Vocabulary)  # shares everything derived from the tokenizer
        other.__dict__.update({k: v for k, v in self.__dict__.items() if k != "fingerprint"})
        other._set_table(
            self._table.with_contents({i: text.encode() for text, i in self.markers.items() if i < last})
        )
        other._unmarked, other._rows = self, rows
        return other

    def without_markers(self) -> "Vocabulary":
        """The same vocabulary, its markers without bytes, as it was loaded."""
        return self._unmarked or self

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 (hexadecimal) of all bytes, of which ids are special, and of which ids text never produces.

        It is the same for equal vocabularies in every process.
        """
        never_V = np.zeros(self.size, np.bool_)
        never_V[list(self._special)] = True
        digest = hashlib.sha256(b"gold vocabulary 1")
        for array in (self.offsets.astype("<i8"), self.blob, self.is_special, never_V):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def dummy_prefix(self) -> bool:
        """True if a space is added before a text at the start of a sequence."""
        return self._family.prefix is not None

    @property
    def space_after_words(self) -> bool:
        """True if a token that ends a word includes the space after it (CLIP)."""
        return self._family.word_space == "after"

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one id; empty for a special token.

        Raises: VocabularyError for an id that the vocabulary does not have.
        """
        if not 0 <= index < self.size:
            raise VocabularyError(f"id {index} is outside the {self.size} ids of {self.name}")
        return self._table[index]

    def label(self, index: int) -> str:
        """The tokenizer's string for an id, for display; the id as a number if it has none."""
        return self.tokenizer.id_to_token(index) or f"#{index}"

    # Text to ids

    def encode(self, text: str | bytes, *, at_start: bool = True) -> TokenizedText:
        """The tokens of a text, without BOS and EOS, with their ranges in the given bytes.

        Text that looks like a special token is text. Invalid UTF-8 is passed to the tokenizer as U+FFFD. With
        `at_start` false the text continues a sequence: no space is added before it even if the family adds one before a
        text (Llama-2). An unknown token covers the text that it replaces; text without any token, such as dropped white
        space, belongs to the next token.

        Raises: VocabularyError if the tokenizer has neither a token for a character nor an unknown token, or if
        rapidfuzz is needed and missing.
        """
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return self._encoder.encode(data, at_start=at_start)

    def stable_ends(self, tokenized: TokenizedText) -> Bool:
        """For each token of a text: True if it ends at a stable boundary (a split there whatever text follows).

        The pre-tokenizer is tried with one continuation of each kind (letters, digits, spaces, marks, symbols …). An
        end that one of them moves, or that lies inside a character, is not stable. Without a pre-tokenizer, or if words
        include the space after them, no end is stable.
        """
        if self.space_after_words:
            return np.zeros(len(tokenized), np.bool_)
        return self._encoder.boundaries.ends(tokenized)

    def canonical_ids(self) -> Int32:
        """For each id: the canonical id among those with equal bytes; special tokens map to themselves.

        It is the id that the tokenizer itself gives for these bytes, else the lowest one that is no byte-fallback
        token, else the lowest one.
        """
        canonical = np.arange(self.size, dtype=np.int32)
        for group in equal_groups(np.flatnonzero(~self.is_special), self.offsets, self.blob):
            canonical[group] = self._canonical(group.tolist())
        return canonical

    def _canonical(self, group: list[int]) -> int:
        try:
            ids = self._encoder.ids(self._table[group[0]].decode(), at_start=False).tolist()
        except UnicodeDecodeError:
            ids = []
        if len(ids) == 1 and ids[0] in group:
            return int(ids[0])
        return min(group, key=lambda index: (is_byte_piece(self.tokenizer.id_to_token(index)), index))

    def same_as(self, other: "Vocabulary") -> bool:
        """True if every id has the same bytes in both and the stop ids are the same: one can score the other's ids."""
        return self.fingerprint == other.fingerprint and set(self.stop_ids) == set(other.stop_ids)

    # Ids to text

    def decode(
        self, ids: Sequence[int] | npt.NDArray[Any], *, at_start: bool = True, rows: int = 0
    ) -> TokenizedText:
        """The text of any ids, canonical or not: their concatenated bytes.

        With `at_start` the space that the family adds before a text (Llama-2, BERT) is dropped from the first token
        that has one; if spaces follow words (CLIP), the last space is always dropped. Ids up to `rows`, the rows of an
        output matrix larger than the vocabulary, have no bytes.

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
        joined, stops = self._table.join(kept)
        first, last = at_start and self.dummy_prefix and joined[:1] == b" ", self.space_after_words
        data = joined[1:] if first else joined.removesuffix(b" ") if last else joined
        tokenized = less_added_space(kept, joined, stops, data, first=first, last=last)
        assert tokenized is not None
        return tokenized

    def ends(self, ids: Int32) -> Int64:
        """The byte offset at which each of the ids ends; ids beyond the vocabulary have no bytes.

        It is `decode(ids).ends` without the bytes, the check of the ids, and the handling of an added space.
        """
        return self._table.ends(ids)


def _unpickled(
    tokenizer: Tokenizer, name: str, roles: dict[str, Any], markers: tuple[int | None] | None
) -> Vocabulary:
    plain = Vocabulary(tokenizer, name=name, **roles)
    return plain if markers is None else plain.with_markers(*markers)
