"""Markers: special tokens without a role, such as `<think>`, mapped between the tokenizers of two models.

`<think>` is a special token in some models, an added token in others, and plain characters in the rest; the same holds
for tool calls and turn headers. Between two models a marker counts as its text, so its probability is compared with
that of the same text on the other side. Only if both have the same marker, and the first model generated it as a
special token, does the second get its own special token: characters that only look like a special token, typed or
sampled, never become one.
"""

from collections.abc import Mapping

import numpy as np

from gold.tokenize.text import TokenizedText
from gold.tokenize.vocabulary import Vocabulary


def shared_markers(source: Vocabulary, target: Vocabulary) -> dict[int, int]:
    """For each marker that both vocabularies have: source id → target id."""
    theirs = target.markers
    return {index: theirs[content] for content, index in source.markers.items() if content in theirs}


def retokenize(
    target: Vocabulary, tokenized: TokenizedText, markers: Mapping[int, int], at_start: bool = True
) -> TokenizedText:
    """The same bytes tokenized with another vocabulary, using its markers where the source ids are in `markers`.

    The text before, between and after markers is encoded separately; `at_start` as for `Vocabulary.encode`.
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
