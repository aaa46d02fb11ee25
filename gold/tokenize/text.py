"""Tokenized text with byte ranges, and the table of bytes of every id."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gold.tokenize.token_loops import fill_bytes, fill_ends, walk

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """The tokens of a text, with the byte range of each.

    Token i covers `data[starts[i]:ends[i]]`; `ends` never decreases and its last value is `len(data)`. Special tokens
    cover nothing, except an unknown token, which covers the text that it replaced. Where the tokenizer rewrote the text
    (NFC, lower case) a token may end inside a rewritten span: then it ends at the boundary before the span, and
    the next token covers the whole span.

    `exact[i]`: the token's own bytes equal the bytes that it covers. `repaired_bytes` counts the bytes under inexact
    tokens; a token that differs only by the space that the tokenizer adds before a text is inexact but not counted.

    >>> import numpy as np
    >>> text = TokenizedText(np.array([7, 3], np.int32), np.array([2, 5]), b"it is", np.array([True, True]), 0)
    >>> text.data[text.starts[1] : text.ends[1]]
    b' is'
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
        """The byte offset at which each token begins."""
        return starts_of(self.ends)


def starts_of(ends: Int64) -> Int64:
    """The starts of consecutive ranges, given their ends."""
    starts = np.zeros_like(ends)
    starts[1:] = ends[:-1]
    return starts


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The bytes of every id: `blob[offsets[i]:offsets[i + 1]]` for id i, empty if it is special or unused."""

    offsets: Int64
    blob: npt.NDArray[np.uint8]
    lengths_V: Int32

    @classmethod
    def of(cls, contents: Sequence[bytes | None]) -> "TokenBytes":
        """The table from the bytes of each id in order; None counts as empty."""
        lengths = np.array([len(data or b"") for data in contents], np.int32)
        offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))
        return cls(offsets, np.frombuffer(b"".join(data or b"" for data in contents), np.uint8), lengths)

    def __len__(self) -> int:
        return len(self.lengths_V)

    def __getitem__(self, index: int) -> bytes:
        return self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def with_contents(self, contents: dict[int, bytes]) -> "TokenBytes":
        """The same table with bytes for the given ids, which had none."""
        ids = np.array(sorted(contents), np.int64)
        lengths = self.lengths_V.copy()
        lengths[ids] = [len(contents[i]) for i in ids.tolist()]
        given = np.frombuffer(b"".join(contents[i] for i in ids.tolist()), np.uint8)
        blob = np.insert(self.blob, np.repeat(self.offsets[ids], lengths[ids]), given)
        return TokenBytes(np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths))), blob, lengths)

    def ends(self, ids: Int32) -> Int64:
        """The byte offset at which each of the ids ends; ids beyond the table have no bytes."""
        ends = np.empty(len(ids), np.int64)
        walk(fill_ends, len(ids))(ids, self.lengths_V, ends)
        return ends

    def join(self, ids: Int32) -> tuple[bytes, Int64]:
        """The concatenated bytes of the ids, and the offset at which each ends."""
        ends = self.ends(ids)
        data = np.empty(ends[-1] if len(ends) else 0, np.uint8)
        walk(fill_bytes, len(ids))(ids, ends, self.offsets, self.blob, data)
        return data.tobytes(), ends


def less_added_space(
    ids: Int32, joined: bytes, stops: Int64, data: bytes, *, first: bool, last: bool
) -> TokenizedText | None:
    """The tokens on `data` if their bytes, `joined`, equal the data; None if they differ.

    With `first` they may have one extra space before the data, with `last` one after it.
    """
    exact = np.ones(len(ids), np.bool_)
    if joined == data:
        return TokenizedText(ids, stops, data, exact, 0)
    if len(joined) != len(data) + 1:
        return None
    if first and joined == b" " + data:
        exact[int((stops > 0).argmax())] = False
        return TokenizedText(ids, np.maximum(stops - 1, 0), data, exact, 0)
    if last and joined == data + b" ":
        at = int((stops == stops[-1]).argmax())
        exact[at] = False
        ends = np.minimum(stops, len(data))
        return TokenizedText(ids, ends, data, exact, len(data) - int(ends[at - 1] if at else 0))
    return None
