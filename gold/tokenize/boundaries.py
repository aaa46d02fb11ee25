"""Where a tokenizer splits a text whatever comes next: the ends of pre-tokens that no continuation moves."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from tokenizers import AddedToken

from gold.tokenize.rewriting import byte_offsets, decode_replacing, rewriting_boundaries
from gold.tokenize.text import Bool, TokenizedText

# One continuation of every kind that pre-tokenizers tell apart; what moves most ends comes first.
_PROBES = (
    "a", "1", " ", "\n", ".", "'", "\u0301", "\ufe0f", "A", "é", "ß", "я", "中", "か", "カ", "ا", "अ", "ก", "가",
    "ª", "ʰ", "\u1161", "\u11a8", "\u0e33", "\u094d", "\u093f", "\u20dd", "\u200d", "\u200c", "\u200b", "\xad",
    "\ufeff", "٣", "½", "²", "Ⅷ", "12", "1234", "a1", "1a", "ab", "Ab", "AB", "aB", "\t", "\r", "\r\n", "\n\n",
    "\x0b", "\xa0", "\u3000", "\u2028", "\x85", "  ", "   ", " a", "  a", " 1", " \n", " .", "\n ", "\na",
    "\t\t", "\n\n\n", "'s", "'t", "'re", "'ve", "'ll", "'S", "\u2019", "\u2019s", '"', ",", "!", "?", "-", "_",
    "/", "\\", "(", ")", ":", "[", "]", "{", "}", "…", "«", "。", "、", "...", "--", ".a", ".\n", "/\n", "_a",
    "-1", "#", "@", "&", "*", "%", "+", "=", "$", "€", "^", "`", "~", "<", ">", "|", "©", "→", "🙂",
    "\U0001f3fd", "\U0001f1e9", "▁", "Ġ", "\ufffd", "\x00", "\x1b", "\u0378",
)  # fmt: skip
_FARTHEST = 512
_MEMORY = 65_536


class StableBoundaries:
    """Answers for one tokenizer, from its normaliser, its pre-tokenizer and the added tokens that it finds in text.

    `rewrite` is the normaliser as far as bytes are concerned.
    """

    def __init__(
        self,
        normalizer: Any,
        pre_tokenizer: Any,
        added: Iterable[AddedToken],
        rewrite: Callable[[str], str],
    ) -> None:
        self._normalizer, self._pre_tokenizer, self._rewrite = normalizer, pre_tokenizer, rewrite
        tokens = list(added)
        self._openings = {token.content[:n] for token in tokens for n in range(1, len(token.content))}
        self._longest_opening = max(map(len, self._openings), default=0)
        self._swallows_spaces = any(token.lstrip for token in tokens)
        self._known: dict[str, bool] = {}

    def ends(self, tokenized: TokenizedText) -> Bool:
        """For each token of a text: whether the tokenizer splits after it whatever text comes next."""
        text, replaced = decode_replacing(tokenized.data)
        # byte_of[c]: the byte of the given data at which character c of the text begins.
        byte_of = byte_offsets(text)
        if replaced is not None:
            byte_of = replaced[byte_of]
        at = np.searchsorted(byte_of, tokenized.ends)
        stable: Bool = byte_of[at] == tokenized.ends
        asked = np.unique(at[stable])
        known = np.zeros(len(byte_of), np.bool_)
        known[asked] = [self._splits_at(text, position) for position in asked.tolist()]
        stable &= known[at]
        # The last token has all that is left of the text, which may be the next one's.
        stable[-1:] &= tokenized.exact[-1:]
        return stable

    def _splits_at(self, text: str, position: int) -> bool:
        """Whether the text is split at a position (in characters) whatever comes after it."""
        if self._pre_tokenizer is None or not position:
            return False
        context = _context(text, position)
        if context is None:
            return False
        if context not in self._known:
            if len(self._known) >= _MEMORY:
                self._known.clear()
            before = self._normalized(context)
            self._known[context] = not self._may_begin_added_token(context) and all(
                self._splits_between(before, self._normalized(context + probe))
                and self._leaves_apart(context, context + probe)
                for probe in _PROBES
            )
        return self._known[context]

    def _splits_between(self, before: str, text: str) -> bool:
        if not before or not text.startswith(before):
            return False
        # Dropped white space belongs to the next token: a token ends where a pre-token does, not where one begins.
        return any(len(before) == span[1] for _, span in self._pre_tokenizer.pre_tokenize_str(text))

    def _leaves_apart(self, context: str, text: str) -> bool:
        """Whether the end of the context is not inside a span that the normaliser rewrites together."""
        rewritten = self._rewrite(text)
        at = len(context.encode())
        return rewritten == text or at in rewriting_boundaries(text, rewritten, self._rewrite)

    def _may_begin_added_token(self, context: str) -> bool:
        """Whether the context's end may begin an added token: those are found before pre-tokens."""
        if self._swallows_spaces and context[-1:].isspace():
            return True
        longest = min(self._longest_opening, len(context))
        return any(context[-length:] in self._openings for length in range(1, longest + 1))

    def _normalized(self, text: str) -> str:
        normalized: str = text if self._normalizer is None else self._normalizer.normalize_str(text)
        return normalized


def _context(text: str, at: int) -> str | None:
    """The text before a position, from white space on that has a whole word after it; None if that is far.

    Pre-tokens are found from left to right, so after a whole word they are those of the full text.
    """
    runs = 0
    for start in range(at - 1, max(at - _FARTHEST, 0), -1):
        if text[start].isspace() and not text[start - 1].isspace():
            runs += 1
            if runs == 2:
                return text[start:at]
    return text[:at] if at <= _FARTHEST else None
