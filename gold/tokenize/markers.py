"""Markers, special tokens without a role such as `<think>`: a model's own become the other model's own.

`<think>` is a special token of some models, an added token of others, and plain characters to the rest; so are tool
calls, and the words that begin a turn. Between two models a marker is its text, so that its probability is compared
with that of the same text on the other side. Only where both have the same marker, and the first model wrote it as
such, does the second get its own: characters that merely look like a special token, typed or sampled, never become one.
"""

from collections.abc import Mapping

import numpy as np

from gold.tokenize.text import TokenizedText
from gold.tokenize.vocabulary import Vocabulary


def shared_markers(source: Vocabulary, target: Vocabulary) -> dict[int, int]:
    """For the source's id of each marker that both vocabularies have: the target's id."""
    theirs = target.markers
    return {index: theirs[content] for content, index in source.markers.items() if content in theirs}


def retokenize(
    target: Vocabulary, tokenized: TokenizedText, markers: Mapping[int, int], at_start: bool = True
) -> TokenizedText:
    """The same bytes in another vocabulary's tokens, with its own markers where those of `markers` are.

    What is before, between and behind them is encoded by itself, as text; `at_start` as for `Vocabulary.encode`.
    """
    at = np.flatnonzero(np.isin(tokenized.ids, list(markers)) & tokenized.exact)
    if not len(at):
        return target.encode(tokenized.data, at_start=at_start)
    parts: list[TokenizedText] = []
    begin = 0
    for start, end, index in zip(tokenized.starts[at], tokenized.ends[at], tokenized.ids[at], strict=True):
        parts.append(target.encode(tokenized.data[begin:start], at_start=at_start and not parts))
        own, marker = tokenized.data[start:end], markers[int(index)]
        exact, length = target.token_bytes(marker) == own, np.array([len(own)], np.int64)
        ids = np.array([marker], np.int32)
        parts.append(TokenizedText(ids, length, own, np.array([exact]), 0 if exact else len(own)))
        begin = int(end)
    parts.append(target.encode(tokenized.data[begin:], at_start=False))
    starts = np.cumsum([0, *(len(part.data) for part in parts[:-1])])
    return TokenizedText(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.ends + start for part, start in zip(parts, starts, strict=True)]),
        tokenized.data,
        np.concatenate([part.exact for part in parts]),
        sum(part.repaired_bytes for part in parts),
    )
