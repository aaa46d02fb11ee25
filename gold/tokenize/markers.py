"""Markers, special tokens that have no role: what one model writes with its own is read by the other with its own.

`<think>` is a special token of some models, an added token of others, and plain characters to the rest; so are tool
calls, and the words that begin a turn. Between two models a marker is the text that it looks like, so that a
probability of it is compared with that of the same text on the other side, whatever that is made of there. Only where
both have the same marker, and the first wrote it as such, does the second read its own: characters that merely look
like a special token, typed or sampled, never become one.
"""

from collections.abc import Mapping

import numpy as np

from gold.tokenize.vocabulary import TokenizedText, Vocabulary


def shared_markers(source: Vocabulary, target: Vocabulary) -> dict[int, int]:
    """The ids of each marker that two vocabularies both have: by the first one's, the second one's."""
    theirs = target.markers
    return {index: theirs[content] for content, index in source.markers.items() if content in theirs}


def read_as(
    target: Vocabulary, tokenized: TokenizedText, markers: Mapping[int, int], at_start: bool = True
) -> TokenizedText:
    """A spelled text in another vocabulary's own tokens, with its own markers where those of `markers` stand.

    What is before, between and behind them is encoded on its own, as text; `at_start` as for `Vocabulary.encode`.
    """
    at = np.flatnonzero(np.isin(tokenized.ids, list(markers)) & tokenized.exact)
    if not len(at):
        return target.encode(tokenized.data, at_start=at_start)
    parts: list[TokenizedText] = []
    begin = 0
    for start, end, index in zip(tokenized.starts[at], tokenized.ends[at], tokenized.ids[at], strict=True):
        parts.append(target.encode(tokenized.data[begin:start], at_start=at_start and not parts))
        own = tokenized.data[start:end]
        marker = markers[int(index)]
        exact = target.token_bytes(marker) == own
        parts.append(
            TokenizedText(
                np.array([marker], np.int32),
                np.array([len(own)], np.int64),
                own,
                np.array([exact]),
                0 if exact else len(own),
            )
        )
        begin = int(end)
    parts.append(target.encode(tokenized.data[begin:], at_start=False))
    before = np.cumsum([0, *(len(part.data) for part in parts[:-1])])
    return TokenizedText(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.ends + start for part, start in zip(parts, before, strict=True)]),
        tokenized.data,
        np.concatenate([part.exact for part in parts]),
        sum(part.repaired_bytes for part in parts),
    )
