"""Where a tokenizer cuts a text whatever comes next: the ends of pre-tokens that no continuation moves."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tokenizers import AddedToken

from gold.tokenize.repair import rewriting_boundaries

# One continuation of every kind that pre-tokenizers tell apart; what moves most ends comes first.
_PROBES = (
    *(
        "a",
        "1",
        " ",
        "\n",
        ".",
        "'",
        "\u0301",
        "\ufe0f",
        "A",
        "é",
        "ß",
        "я",
        "中",
        "か",
        "カ",
        "ا",
        "अ",
        "ก",
        "가",
        "ª",
        "ʰ",
    ),
    *(
        "\u1161",
        "\u11a8",
        "\u0e33",
        "\u094d",
        "\u093f",
        "\u20dd",
        "\u200d",
        "\u200c",
        "\u200b",
        "\u00ad",
        "\ufeff",
    ),
    *("٣", "½", "²", "Ⅷ", "12", "1234", "a1", "1a", "ab", "Ab", "AB", "aB"),
    *(
        "\t",
        "\r",
        "\r\n",
        "\n\n",
        "\v",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\u0085",
        "  ",
        "   ",
        " a",
        "  a",
        " 1",
        " \n",
    ),
    *(" .", "\n ", "\na", "\t\t", "\n\n\n"),
    *(
        "'s",
        "'t",
        "'re",
        "'ve",
        "'ll",
        "'S",
        "\u2019",
        "\u2019s",
        '"',
        ",",
        "!",
        "?",
        "-",
        "_",
        "/",
        "\\",
        "(",
        ")",
        ":",
    ),
    *(
        "[",
        "]",
        "{",
        "}",
        "…",
        "«",
        "。",
        "、",
        "...",
        "--",
        ".a",
        ".\n",
        "/\n",
        "_a",
        "-1",
        "#",
        "@",
        "&",
        "*",
        "%",
    ),
    *(
        "+",
        "=",
        "$",
        "€",
        "^",
        "`",
        "~",
        "<",
        ">",
        "|",
        "©",
        "→",
        "🙂",
        "\U0001f3fd",
        "\U0001f1e9",
        "▁",
        "Ġ",
        "\ufffd",
    ),
    *("\x00", "\x1b", "\u0378"),
)
_FARTHEST = 512
_MEMORY = 65_536


class PreTokenCuts:
    """Answers for one tokenizer, from its normaliser, its pre-tokenizer and the added tokens that it finds in text.

    `rewrite` is what the normaliser makes of a text as far as bytes are concerned.
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
        self._openings = {
            token.content[:length] for token in tokens for length in range(1, len(token.content))
        }
        self._longest_opening = max(map(len, self._openings), default=0)
        self._swallows_spaces = any(token.lstrip for token in tokens)
        self._known: dict[str, bool] = {}

    def hard(self, text: str, positions: Sequence[int]) -> list[int]:
        """Those of the positions (in characters) at which the tokenizer cuts whatever text comes after them."""
        if self._pre_tokenizer is None:
            return []
        return [at for at in positions if at > 0 and self._cuts_after(_context(text, at))]

    def _cuts_after(self, context: str | None) -> bool:
        if context is None:
            return False
        if context not in self._known:
            if len(self._known) >= _MEMORY:
                self._known.clear()
            before = self._normalized(context)
            self._known[context] = not self._may_begin_added_token(context) and all(
                self._cuts_between(before, self._normalized(context + probe))
                and self._leaves_apart(context, context + probe)
                for probe in _PROBES
            )
        return self._known[context]

    def _cuts_between(self, before: str, text: str) -> bool:
        if not before or not text.startswith(before):
            return False
        # Where white space is dropped it belongs to the next token: a token ends where a piece does, not at its start.
        return any(len(before) == span[1] for _, span in self._pre_tokenizer.pre_tokenize_str(text))

    def _leaves_apart(self, context: str, text: str) -> bool:
        """Whether the place after the context is none inside of what the normaliser rewrites together."""
        rewritten = self._rewrite(text)
        at = len(context.encode())
        return rewritten == text or at in rewriting_boundaries(text, rewritten, self._rewrite)

    def _may_begin_added_token(self, context: str) -> bool:
        """Whether the next text could make an added token of the context's end: those are found before pre-tokens."""
        if self._swallows_spaces and context[-1:].isspace():
            return True
        longest = min(self._longest_opening, len(context))
        return any(context[-length:] in self._openings for length in range(1, longest + 1))

    def _normalized(self, text: str) -> str:
        normalized: str = text if self._normalizer is None else self._normalizer.normalize_str(text)
        return normalized


def _context(text: str, at: int) -> str | None:
    """The text before a position, from a run of white space on that has a whole word after it; None if that is far.

    Pre-tokens are found from left to right, so after a whole word they are those of the full text.
    """
    runs = 0
    for start in range(at - 1, max(at - _FARTHEST, 0), -1):
        if text[start].isspace() and not text[start - 1].isspace():
            runs += 1
            if runs == 2:
                return text[start:at]
    return text[:at] if at <= _FARTHEST else None
