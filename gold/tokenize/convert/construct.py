"""Building blocks shared by the tokenizers of all formats."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gold.errors import VocabularyError

SPACE = "▁"


def bpe_model(vocab: Mapping[str, int], merges: Iterable[tuple[str, str]], **options: Any) -> models.BPE:
    """A BPE model.

    Raises: VocabularyError if the merges do not fit the vocabulary.
    """
    try:
        return models.BPE(vocab=dict(vocab), merges=list(merges), **options)
    except Exception as error:  # tokenizers raises bare Exception
        raise VocabularyError(f"its merges do not fit its tokens: {error}") from None


def merges_of_ranked(ranked: Iterable[str], parts: Collection[str]) -> list[tuple[str, str]]:
    """The merges of a vocabulary that only ranks its tokens: all pairs of `parts` that form a ranked token.

    A rank vocabulary merges the neighbours that form the best ranked token, the leftmost if two are equal; a list of
    merges applies the first matching pair of the list. Both give the same tokens: as long as neither neighbour was
    merged across its outer edge, the merges inside the two are those of their text alone, and while that text is merged
    into one token, it consists of two parts only once. So of all ways to split a token in two, text reaches only one,
    and the order among them never matters.
    """
    known = frozenset(parts)
    return [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def byte_level_tokenizer(model: models.Model, patterns: Sequence[str], *, nfc: bool = False) -> Tokenizer:
    """The tokenizer of a model in the byte-level alphabet; each pattern splits the result of the previous one.

    Raises: Exception for a pattern that tokenizers cannot compile.
    """
    tokenizer = Tokenizer(model)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_piece_tokenizer(vocab: Mapping[str, int], unknown: str, **normalizer: Any) -> Tokenizer:
    """BERT's tokenizer with this vocabulary; the options are those of its normalizer."""
    tokenizer = Tokenizer(models.WordPiece(vocab=dict(vocab), unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def space_decoder(*, strips: bool) -> decoders.Sequence:
    """The decoder for tokens with `▁` for a space; `strips` drops the space before a text."""
    strip = [decoders.Strip(" ", 1, 0)] if strips else []
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def add_tokens(tokenizer: Tokenizer, special: Iterable[str], others: Iterable[str] = ()) -> None:
    """Adds tokens by their strings, matched in the raw text; empty strings are skipped."""
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special if token])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in others if token])
