"""Tokenizers from ranked byte strings and a pre-tokenization pattern: tiktoken encodings, Mistral's `tekken.json`."""

import base64
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from gold.errors import VocabularyError
from gold.tokenize.convert.construct import add_tokens, bpe_model, byte_level_tokenizer, merges_of_ranked
from gold.tokenize.families import MOST_IDS, byte_alphabet
from gold.tokenize.foreign import first_line

_PARTS_OF_PATTERN = re.compile(
    r"(?P<escaped>\\[pP]\{[^}]*\}|\\.)|(?P<possessive>\{\d+(?:,\d*)?\}\+)(?P<last>(?=[|)])|\Z)?"
    r"|(?P<flags>\(\?[a-z-]*[a-hj-z][a-z-]*[:)])|.",
    re.DOTALL,
)
_PROBES = (
    "Hello, world! It's 12345 o'clock\n\n  and  I'LL go.\r\n",
    "naïve café — ÀÉÎ Привет, мир! 日本語の文 한국어 עברית",
    "def f(x):\n\treturn x**2  # ¿qué?\n\n\n",
    "   \t \n 3.14159 ½ ² \u00a0x\u2028y 🙂👩\u200d👩\u200d👧 e\u0301\u0323",
    " camelCaseHTTPServer __init__ ../path/to//file?x=1&y=2 ",
)
_TEKKEN_ROLES = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
# Names, in the order of ids, that the first versions of the file do not list.
_OLD_NAMES = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
    "[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] "
    "[TOOL_CONTENT]"
)
_OLD_SPECIAL: list[dict[str, Any]] = [
    {"rank": rank, "token_str": token} for rank, token in enumerate(_OLD_NAMES.split())
]


def ranked_tokenizer(
    ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int], first_id: int = 0
) -> Tokenizer:
    """The tokenizer of ranked byte strings; id = `first_id` + rank, and the given ids for the special tokens.

    Raises: VocabularyError for a pattern that tokenizers cannot reproduce, and for a special token with the same text
    as another token.
    """
    symbol_of = {byte: symbol for symbol, byte in byte_alphabet().items()}
    ranked = sorted(ranks, key=ranks.__getitem__)
    strings = ["".join([symbol_of[byte] for byte in token]) for token in ranked]
    vocab = {string: first_id + ranks[token] for string, token in zip(strings, ranked, strict=True)}
    for token, index in special.items():
        if vocab.setdefault(token, index) != index:
            raise VocabularyError(
                f"its special token {token!r} with id {index} is written like the token with id {vocab[token]}, which "
                "tokenizers cannot tell apart"
            )
    model = bpe_model(vocab, merges_of_ranked(strings, strings), ignore_merges=True)
    translated = oniguruma(pattern)
    try:
        tokenizer = byte_level_tokenizer(model, [translated])
    except Exception as error:  # tokenizers raises bare Exception
        raise VocabularyError(f"its pattern {pattern!r} cannot be used by tokenizers: {error}") from None
    add_tokens(tokenizer, sorted(special, key=special.__getitem__))
    return tokenizer


def oniguruma(pattern: str) -> str:
    """The equivalent of a tiktoken pattern in the regex dialect of `tokenizers`.

    There `$` and `^` match at every line, `{m,n}+` repeats instead of being possessive, and flags other than `i`
    differ.

    Raises: VocabularyError for a pattern without an equivalent.
    """
    parts, classes = [], 0
    for found in _PARTS_OF_PATTERN.finditer(pattern):
        part = found.group()
        if part in "[]":
            classes += 1 if part == "[" else -1
        if not classes:
            # At the end of an alternative nothing follows that could need backtracking.
            if found["flags"] or (found["possessive"] and found["last"] is None):
                raise VocabularyError(f"its pattern has {part!r}, which tokenizers reads differently")
            part = {"$": r"\z", "^": r"\A"}.get(part, part[:-1] if found["possessive"] else part)
        parts.append(part)
    return "".join(parts)


def is_encoding(source: Any) -> bool:
    """True if an object is a tiktoken encoding."""
    return all(hasattr(source, name) for name in ("_mergeable_ranks", "_pat_str", "_special_tokens"))


def encoding_tokenizer(encoding: Any, special: Mapping[str, int] | None = None) -> Tokenizer:
    """The tokenizer of a `tiktoken.Encoding`, compared with it on a few texts.

    `special` are special tokens with the first ids, before all others; None: those of the encoding.

    Raises: VocabularyError if it cannot be converted, or tokenizes one of the texts differently.
    """
    first = 0 if special is None else len(special)
    special = encoding._special_tokens if special is None else special
    tokenizer = ranked_tokenizer(encoding._mergeable_ranks, encoding._pat_str, special, first)
    for text in _PROBES:
        expected = [first + i for i in encoding.encode_ordinary(text)]
        if tokenizer.encode(text, add_special_tokens=False).ids != expected:
            raise VocabularyError(f"converted for tokenizers it reads {text!r} differently")
    return tokenizer


def named_encoding(name: str) -> Any:
    """The tiktoken encoding of that name, such as `o200k_base`.

    Raises: VocabularyError without the library, for an unknown name, and if its ranks are not available.
    """
    try:
        import tiktoken
    except ImportError:
        raise VocabularyError(f"tiktoken:{name} needs the package tiktoken: pip install tiktoken") from None
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise VocabularyError(f"tiktoken has no encoding {name!r}; it has {known}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # any error of the download
        raise VocabularyError(f"tiktoken cannot fetch the ranks of {name}: {first_line(error)}") from None


def is_tekken(content: Any) -> bool:
    """True if a JSON value is a `tekken.json`."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("vocab"), list)
        and isinstance(content.get("config"), dict)
        and "default_num_special_tokens" in content["config"]
    )


def tekken_tokenizer(content: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a `tekken.json`: special tokens have the first ids, and get a name if they have none.

    Raises: VocabularyError if it is broken.
    """
    try:
        config = content["config"]
        count = _count(config["default_num_special_tokens"])
        size = _count(config["default_vocab_size"]) - count
        named = content.get("special_tokens") or _OLD_SPECIAL
        special = {str(token["token_str"]): _count(token["rank"]) for token in named}
        taken = set(special.values())
        special |= {f"<SPECIAL_{i}>": i for i in range(count) if i not in taken}
        ranks = {base64.b64decode(t["token_bytes"]): _count(t["rank"]) for t in content["vocab"][:size]}
        pattern = str(config["pattern"])
    except (KeyError, TypeError, ValueError) as error:
        raise VocabularyError(f"it is a broken tekken.json: {repr(error)[:200]}") from None
    return ranked_tokenizer(ranks, pattern, special, first_id=count)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MOST_IDS:
        raise ValueError(f"{str(value)[:40]!r} is no id and no number of ids")
    return value


def tekken_roles(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids by role, bos, eos and pad, of a tokenizer from `tekken.json`, whose special tokens have fixed names."""
    named = {role: tokenizer.token_to_id(token) for role, token in _TEKKEN_ROLES.items()}
    return {role: index for role, index in named.items() if index is not None}
