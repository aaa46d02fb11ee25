"""The merges of a BPE vocabulary that only ranks its tokens, as tiktoken's and SentencePiece's do."""

from collections.abc import Collection, Iterable


def merges_of_ranked(ranked: Iterable[str], parts: Collection[str]) -> list[tuple[str, str]]:
    """All pairs of `parts` that make up a ranked token, the first token's pairs first.

    A vocabulary of ranks merges whichever neighbours make the best ranked token, the leftmost where two are equal; a
    list of merges takes the first pair of the list. Both give the same tokens: as long as neither neighbour was merged
    across its outer edge, what happens within the two is what would happen to their text alone, and on its way to one
    token that text is in two parts only once. So of all ways to cut a token in two, text shows one, and the order among
    them never matters.
    """
    known = frozenset(parts)
    return [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
