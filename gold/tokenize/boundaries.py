"""Stable boundaries: positions where a tokenizer splits a text no matter how the text continues."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from tokenizers import AddedToken

from gold.tokenize.rewriting import byte_offsets, decode_replacing, rewriting_boundaries
from gold.tokenize.text import Bool, TokenizedText

# One continuation of each kind that pre-tokenizers distinguish; the ones that move most boundaries come first.
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
    """The stable boundaries of one tokenizer, given its normalizer, pre-tokenizer and added tokens.

    `rewrite` has the effect of the normalizer on the bytes of a text.
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
        """For each token of a text: True if a split after it does not depend on how the text continues."""
        text, replaced = decode_replacing(tokenized.data)
        # byte_of[c]: the byte offset, in the given data, of character c.
        byte_of = byte_offsets(text)
        if replaced is not None:
            byte_of = replaced[byte_of]
        at = np.searchsorted(byte_of, tokenized.ends)
        stable: Bool = byte_of[at] == tokenized.ends
        asked = np.unique(at[stable])
        known = np.zeros(len(byte_of), np.bool_)
        known[asked] = [self._splits_at(text, position) for position in asked.tolist()]
        stable &= known[at]
        # The last token covers all the remaining text, part of which may belong to the next token.
        stable[-1:] &= tokenized.exact[-1:]
        return stable

    def _splits_at(self, text: str, position: int) -> bool:
        """True if the text is split at a position (in characters) no matter what follows."""
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
        # Dropped white space belongs to the next token: a token ends where a pre-token ends, not where the next one
        # begins.
        return any(len(before) == span[1] for _, span in self._pre_tokenizer.pre_tokenize_str(text))

    def _leaves_apart(self, context: str, text: str) -> bool:
        """True if the end of the context is not inside a span that the normalizer rewrites as a whole."""
        rewritten = self._rewrite(text)
        at = len(context.encode())
        return rewritten == text or at in rewriting_boundaries(text, rewritten, self._rewrite)

    def _may_begin_added_token(self, context: str) -> bool:
        """True if an added token may begin at the end of the context: added tokens are matched before pre-tokens."""
        if self._swallows_spaces and context[-1:].isspace():
            return True
        longest = min(self._longest_opening, len(context))
        return any(context[-length:] in self._openings for length in range(1, longest + 1))

    def _normalized(self, text: str) -> str:
        normalized: str = text if self._normalizer is None else self._normalizer.normalize_str(text)
        return normalized


def _context(text: str, at: int) -> str | None:
    """The text before a position, from the last white space followed by a whole word; None if that is too far back.

    Pre-tokens are found from left to right, so after a whole word they equal those of the full text.
    """
    runs = 0
    for start in range(at - 1, max(at - _FARTHEST, 0), -1):
        if text[start].isspace() and not text[start - 1].isspace():
            runs += 1
            if runs == 2:
                return text[start:at]
    return text[:at] if at <= _FARTHEST else None
