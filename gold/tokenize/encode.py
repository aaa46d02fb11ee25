"""Text to tokens: ids and the byte offset at which each token ends."""

from collections.abc import Callable, Collection
from functools import cached_property

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from gold.errors import VocabularyError
from gold.tokenize.boundaries import StableBoundaries
from gold.tokenize.components import build, rebuilt, without, without_prefix_space
from gold.tokenize.families import Family, character_ids, missing_bytes, normalizer_of
from gold.tokenize.foreign import is_panic
from gold.tokenize.rewriting import (
    NONE,
    byte_offsets,
    compose,
    decode_replacing,
    edit_boundaries,
    rewriting_boundaries,
)
from gold.tokenize.text import Bool, Int32, Int64, TokenBytes, TokenizedText, less_added_space, starts_of
from gold.tokenize.token_ends import equal_spans, settle_by_bytes, spans_less_missing, true_ends


class TextEncoder:
    """Encodes text with one tokenizer such that no text ever produces one of the `special` ids.

    `table` holds the bytes of every id. `unk_id` may be produced by text, although it is special; None if there is
    none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        family: Family,
        special: Collection[int],
        table: TokenBytes,
        unk_id: int | None,
        name: str,
    ) -> None:
        self._tokenizer, self._family, self._special, self._table = tokenizer, family, special, table
        self._unk_id, self._name = unk_id, name
        self._is_special_V = np.zeros(len(table), np.bool_)
        self._is_special_V[list(special)] = True
        self._copies: dict[tuple[bool, bool], tuple[Tokenizer, Int32 | None]] = {}
        self._plain_ids: dict[int, list[int]] = {}

    @cached_property
    def boundaries(self) -> StableBoundaries:
        """The stable boundaries of this tokenizer."""
        tokenizer, _ = self._copy(at_start=False)
        added = tokenizer.get_added_tokens_decoder().values()
        return StableBoundaries(tokenizer.normalizer, tokenizer.pre_tokenizer, added, self.rewrite)

    @cached_property
    def _normalize(self) -> Callable[[str], str]:
        return normalizer_of(self._family)

    @cached_property
    def _missing(self) -> Callable[[str], Bool]:
        return missing_bytes(self._tokenizer, self._family)

    @cached_property
    def rewrite(self) -> Callable[[str], str]:
        """Normalizes a text and puts spaces in place of the family's space character: the text that tokens cover."""
        normalize, space = self._normalize, self._family.space
        return normalize if space is None else lambda text: normalize(text).replace(space, " ")

    def ids(self, text: str, *, at_start: bool = True) -> Int32:
        """The ids of `encode`, without offsets."""
        return self._as_text(self._read(text, at_start)[0])[0]

    def encode(self, data: bytes, *, at_start: bool) -> TokenizedText:
        """See `Vocabulary.encode`."""
        given, replaced = decode_replacing(data)
        read_ids, encoding = self._read(given, at_start)
        ids, sources = self._as_text(read_ids)
        joined, stops = self._table.join(ids)
        prefix, space_after = at_start and self._family.prefix is not None, self._family.word_space == "after"
        plain = less_added_space(ids, joined, stops, data, first=prefix, last=space_after)
        if plain is not None:
            return plain
        rewritten = self.rewrite(given)
        back = rewriting_boundaries(given, rewritten, self.rewrite)
        if replaced is not None:
            back = compose(back, replaced)
        text, missing = np.frombuffer(rewritten.encode(), np.uint8), self._missing(rewritten)
        unknown = ids == self._unk_id if self._unk_id is not None else np.zeros(len(ids), np.bool_)
        kept = (text[~missing] if missing.any() else text).tobytes()
        # Where both white space and unknown characters are dropped, equal bytes do not prove equal positions.
        certain = not (self._family.drops_spaces and missing.any())
        if certain and (joined == kept or (prefix and joined == b" " + kept)):
            own_stops = np.maximum(stops - (len(joined) - len(kept)), 0)
            first, last = spans_less_missing(own_stops, unknown, missing, byte_offsets(rewritten))
        else:
            offsets = self._offsets(read_ids, encoding, given, rewritten, at_start)
            if offsets is None:
                at = edit_boundaries(text.tobytes(), joined)[stops]
                return _with_ends(ids, np.where(at >= 0, back[at], NONE), stops, joined, data, prefix)
            first, last = byte_offsets(rewritten)[offsets[sources]].T
        ends = true_ends(first, last, back, take_what_follows=space_after)
        ends[-1:] = len(data)
        own = np.frombuffer(joined, np.uint8)
        settle_by_bytes(ends, first, last, stops, own, text, missing, unknown, back)
        return _with_ends(ids, ends, stops, joined, data, prefix)

    def _copy(self, at_start: bool, normalized: bool = False) -> tuple[Tokenizer, Int32 | None]:
        """A copy that treats every text as text, and a map from its ids to the original ids (None: identity).

        It shares the model and has no post-processor and no special tokens; other added tokens still match. With
        `at_start` false, no space is added before the text if the tokenizer adds one only at the start of a sequence.
        `normalized`: the input is already normalized.
        """
        family = self._family
        kind = at_start or family.prefix != "text", normalized
        if kind in self._copies:
            return self._copies[kind]
        copy = Tokenizer(self._tokenizer.model)
        normalizer, pre_tokenizer = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        description = family.normalizer
        if normalized:
            description = rebuilt(description, lambda s: s if s["type"] in ("Prepend", "ByteLevel") else None)
        if not kind[0]:
            description = without(description, "Prepend")
            pre_tokenizer = build("pre_tokenizer", without_prefix_space(family.pre_tokenizer))
        if description != family.normalizer:
            normalizer = build("normalizer", description)
        if normalizer is not None:
            copy.normalizer = normalizer
        if pre_tokenizer is not None:
            copy.pre_tokenizer = pre_tokenizer
        added = sorted(self._tokenizer.get_added_tokens_decoder().items())
        kept = [token for index, token in added if index not in self._special]
        copy.add_tokens(kept)
        pairs = [(copy.token_to_id(t.content), self._tokenizer.token_to_id(t.content)) for t in kept]
        moved = {new: own for new, own in pairs if new is not None and own is not None and new != own}
        originals: Int32 | None = None
        if moved:
            originals = np.arange(max(len(self._table), *moved) + 1, dtype=np.int32)
            originals[list(moved)] = list(moved.values())
        self._copies[kind] = copy, originals
        return self._copies[kind]

    def _read(self, text: str, at_start: bool, normalized: bool = False) -> tuple[Int32, Encoding]:
        """The tokenizer's ids of a text, including special ones, and its `Encoding`."""
        tokenizer, originals = self._copy(at_start, normalized)
        try:
            encoding = tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:  # tokenizers raises bare Exception, and panics
            reason = " ".join(str(error).split()) if is_panic(error) else str(error)
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            what = "cannot read the text" if is_panic(error) else "has no token for a part of the text"
            raise VocabularyError(f"{self._name} {what}: {reason}") from None
        ids = np.array(encoding.ids, np.int32)
        return (ids if originals is None else originals[ids]), encoding

    def _as_text(self, ids: Int32) -> tuple[Int32, Int64]:
        """The ids with special ones replaced by the ids of their characters, and for each its index in `ids`.

        A model can produce a special id from text if its vocabulary contains the string or its merges build it.
        """
        forged = self._is_special_V[ids]
        if self._unk_id is not None:
            forged &= ids != self._unk_id
        if not forged.any():
            return ids, np.arange(len(ids))
        parts = [self._plain(i) if fake else [i] for i, fake in zip(ids.tolist(), forged, strict=True)]
        plain = [index for part in parts for index in part]
        return np.array(plain, np.int32), np.repeat(np.arange(len(ids)), [len(part) for part in parts])

    def _plain(self, index: int) -> list[int]:
        if index not in self._plain_ids:
            unknown = index == self._family.unk_id
            own = [] if unknown else character_ids(self._tokenizer, self._family, index, self._special)
            self._plain_ids[index] = [i for i in own if i == self._unk_id or not self._is_special_V[i]]
        return self._plain_ids[index]

    def _offsets(
        self, ids: Int32, encoding: Encoding, text: str, rewritten: str, at_start: bool
    ) -> npt.NDArray[np.int64] | None:
        """The character range (from, to) of each id in the rewritten text; None if unknown.

        If normalization changes the text, the rewritten text is tokenized again, because offsets after a normalizer are
        not always right. They are unknown if that gives other ids (an added token that the normalizer changes).
        """
        if rewritten != text:
            again, encoding = self._read(self._normalize(text), at_start, normalized=True)
            if not np.array_equal(ids, again):
                return None
        return np.array(encoding.offsets, np.int64).reshape(-1, 2)


def _with_ends(
    ids: Int32, ends: Int64, stops: Int64, joined: bytes, data: bytes, prefix: bool
) -> TokenizedText:
    """The tokenized data, given the end of each token in it; NONE where a token ends inside a rewritten span."""
    ends = np.maximum.accumulate(np.maximum(ends, 0))
    ends[-1:] = len(data)
    starts, firsts = starts_of(ends), starts_of(stops)
    exact = stops - firsts == ends - starts
    own, given = np.frombuffer(joined, np.uint8), np.frombuffer(data, np.uint8)
    exact[exact] = equal_spans(own, firsts[exact], given, starts[exact], (stops - firsts)[exact])
    counted = exact.copy()
    if prefix and joined[:1] == b" ":
        first = int((stops > 0).argmax())
        counted[first] |= starts[first] == 0 and joined[: stops[first]] == b" " + data[: ends[first]]
    return TokenizedText(ids, ends, data, exact, len(data) - int((ends - starts)[counted].sum()))
