"""The bytes of every token of a tokenizer, by family: the only module that knows `Ġ`, `▁` and `<0x0A>`.

Two families are spelled: byte-level BPE (GPT-2's alphabet, as in Qwen, Llama-3, DeepSeek, gpt-oss, SmolLM)
and SentencePiece-style BPE with byte fallback (Gemma, Llama-2). Everything is read from the live
`tokenizers.Tokenizer`, because a file and the tokenizer that a library builds from it can differ.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from gold.errors import VocabularyError

BYTE_LEVEL = "byte-level"
BYTE_FALLBACK = "byte-fallback"

_SPACE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_FOREIGN = "\uffff"


@dataclass(frozen=True)
class Family:
    """How one tokenizer rewrites text before its model sees it, and how its token strings stand for bytes."""

    name: str
    unk_token: str | None
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    prefix: str | None
    """Where a leading space is put before a text that has none: "prepend", "metaspace", "byte-level", or None."""


def read_family(tokenizer: Tokenizer) -> Family:
    """The family of a live tokenizer.

    Raises: VocabularyError for any family but byte-level BPE and byte-fallback BPE.
    """
    model = tokenizer.model
    kind = type(model).__name__
    parts = _parts(tokenizer)
    normalizer, pre_tokenizer = parts["normalizer"], parts["pre_tokenizer"]
    byte_level = any(_find(parts[part], "ByteLevel") for part in ("normalizer", "pre_tokenizer", "decoder"))
    if not isinstance(model, models.BPE):
        raise _unsupported(f"a {'byte-level ' if byte_level else ''}{kind} tokenizer")
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        raise _unsupported(
            f"a BPE tokenizer with word-piece marks (continuing_subword_prefix="
            f"{model.continuing_subword_prefix!r}, end_of_word_suffix={model.end_of_word_suffix!r})"
        )
    if model.dropout:
        raise VocabularyError(
            f"BPE dropout is {model.dropout}, so the same text gets other tokens at every call; "
            "set model.dropout = None on the tokenizer"
        )
    if byte_level:
        spaced = any(node.get("add_prefix_space") for node in _find(pre_tokenizer, "ByteLevel"))
        return Family(
            BYTE_LEVEL, model.unk_token, normalizer, pre_tokenizer, "byte-level" if spaced else None
        )
    metaspace = _find(pre_tokenizer, "Metaspace")
    replaces = any(node.get("content") == _SPACE for node in _find(normalizer, "Replace"))
    if not model.byte_fallback:
        raise _unsupported(
            "a SentencePiece-style BPE tokenizer without byte fallback"
            if metaspace or replaces
            else "a BPE tokenizer that is neither byte-level nor byte-fallback"
        )
    if any(node.get("replacement", _SPACE) != _SPACE for node in metaspace):
        raise _unsupported(f"a Metaspace tokenizer whose space is not {_SPACE!r}")
    prefix = None
    if _find(normalizer, "Prepend"):
        prefix = "prepend"
    elif any(node.get("prepend_scheme", "always") != "never" for node in metaspace):
        prefix = "metaspace"
    return Family(BYTE_FALLBACK, model.unk_token, normalizer, pre_tokenizer, prefix)


def byte_alphabet() -> dict[str, int]:
    """The byte that each of the 256 characters of the byte-level alphabet stands for.

    Bytes that are printable in Latin-1 stand for themselves, the others follow from U+0100 in ascending
    order.
    """
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {character: ord(character) for character in characters if ord(character) < 256}
    others = [byte for byte in range(256) if byte not in set(own.values())]
    return own | dict(zip((c for c in characters if ord(c) >= 256), others, strict=True))


def token_strings(tokenizer: Tokenizer) -> list[str | None]:
    """The raw string of every id from 0 to the largest one; None for an id that no token has.

    Of several strings with one id it is the added token's, else the first in the order of strings: the vocabulary
    itself comes in another order in every process.
    """
    own = tokenizer.get_vocab(with_added_tokens=False)
    added = tokenizer.get_added_tokens_decoder()
    strings: list[str | None] = [None] * (max(max(own.values(), default=-1), max(added, default=-1)) + 1)
    for string, index in own.items():
        other = strings[index]
        strings[index] = string if other is None else min(other, string)
    for index, token in added.items():
        strings[index] = token.content
    return strings


def token_spellings(tokenizer: Tokenizer, family: Family, events: Collection[int]) -> list[bytes | None]:
    """The bytes of every id; None for the ids in `events`, for unused ids, and for strings that no text can give.

    Added tokens stand for their raw content, except where a byte-fallback vocabulary has the same string
    itself: such runs of spaces are written with `▁`.
    """
    added = {
        index: token.content
        for index, token in tokenizer.get_added_tokens_decoder().items()
        if family.name == BYTE_LEVEL or tokenizer.model.token_to_id(token.content) is None
    }
    spell = _byte_level_speller() if family.name == BYTE_LEVEL else _byte_fallback_spelling
    silent = set(events)
    spellings: list[bytes | None] = []
    for index, string in enumerate(token_strings(tokenizer)):
        if string is None or index in silent:
            spellings.append(None)
        elif index in added:
            spellings.append(added[index].encode())
        else:
            spellings.append(spell(string))
    return spellings


def is_byte_piece(string: str | None) -> bool:
    """Whether a token string is a byte-fallback piece such as `<0x0A>`."""
    return string is not None and _BYTE_PIECE.fullmatch(string) is not None


def losses(tokenizer: Tokenizer, family: Family) -> Callable[[str], npt.NDArray[np.bool_]]:
    """The function that tells, for each byte of a rewritten text, whether the vocabulary has no token for it.

    A byte-level model drops such a byte (or calls it unknown); a byte-fallback model calls a character unknown if it
    is no token and one of its bytes is no piece.
    """
    has = tokenizer.model.token_to_id
    if family.name == BYTE_LEVEL:
        missing = [byte for symbol, byte in byte_alphabet().items() if has(symbol) is None]
        return lambda text: np.isin(np.frombuffer(text.encode(), np.uint8), missing)
    pieces = {byte for byte in range(256) if has(f"<0x{byte:02X}>") is not None}

    def lost(text: str) -> npt.NDArray[np.bool_]:
        known = {
            c: has(_SPACE if c == " " else c) is not None or pieces.issuperset(c.encode()) for c in set(text)
        }
        if all(known.values()):
            return np.zeros(len(text.encode()), np.bool_)
        return np.repeat([not known[c] for c in text], [len(c.encode()) for c in text])

    return lost


def text_tokenizer(
    tokenizer: Tokenizer, family: Family, events: Collection[int], at_start: bool
) -> Tokenizer:
    """A copy that shares the model and takes every text as text: no post-processor, no special tokens.

    Added tokens outside `events` still match, as they do in the original. With `at_start` false no leading
    space is put before the text.

    Ids of added tokens can differ from the original's: `added_ids` says how.
    """
    copy = Tokenizer(tokenizer.model)
    normalizer, pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    if family.prefix is not None and not at_start:
        normalizer = _component("normalizer", without(family.normalizer, "Prepend"))
        pre_tokenizer = _component("pre_tokenizer", _without_prefix(family.pre_tokenizer))
    if normalizer is not None:
        copy.normalizer = normalizer
    if pre_tokenizer is not None:
        copy.pre_tokenizer = pre_tokenizer
    copy.add_tokens(_text_tokens(tokenizer, events))
    return copy


def added_ids(tokenizer: Tokenizer, copy: Tokenizer, events: Collection[int]) -> dict[int, int]:
    """For each id that `copy = text_tokenizer(tokenizer, …)` gives to another added token: the original's id."""
    contents = [token.content for token in _text_tokens(tokenizer, events)]
    pairs = [(copy.token_to_id(content), tokenizer.token_to_id(content)) for content in contents]
    return {
        copied: original
        for copied, original in pairs
        if copied is not None and original is not None and copied != original
    }


def rewriter(family: Family) -> Callable[[str], str]:
    """The function from a piece of text to the text that the tokens spell, dummy prefix and dropped bytes aside."""
    plain = _component("normalizer", without(family.normalizer, "Prepend", "ByteLevel"))
    spaces = family.name == BYTE_FALLBACK

    def rewrite(piece: str) -> str:
        rewritten: str = piece if plain is None else plain.normalize_str(piece)
        return rewritten.replace(_SPACE, " ") if spaces else rewritten

    return rewrite


def adds_prefix(family: Family, text: str) -> bool:
    """Whether the tokenizer puts a space before this text, if the text is the start of a sequence."""
    if family.prefix is None or not text:
        return False
    return family.prefix == "prepend" or not text.startswith((" ", _SPACE))


def leading_event(tokenizer: Tokenizer) -> int | None:
    """The id that the post-processor puts before a single text (the BOS), None if it puts none or several."""
    found = [
        [item["SpecialToken"]["id"] for item in _before_text(node.get("single", []))]
        for node in _find(_parts(tokenizer)["post_processor"], "TemplateProcessing")
    ]
    if len(found) != 1 or len(found[0]) != 1:
        return None
    index: int | None = tokenizer.token_to_id(found[0][0])
    return index


def without(description: dict[str, Any] | None, *types: str) -> dict[str, Any] | None:
    """A component's description less its parts of the given types; None if nothing is left."""
    if description is None or description["type"] in types:
        return None
    for name in ("normalizers", "pretokenizers"):
        if name in description:
            kept = [
                part for part in (without(child, *types) for child in description[name]) if part is not None
            ]
            return description | {name: kept} if kept else None
    return description


def _before_text(template: list[dict[str, Any]]) -> list[dict[str, Any]]:
    text = next((i for i, item in enumerate(template) if "Sequence" in item), len(template))
    return template[:text]


def _text_tokens(tokenizer: Tokenizer, events: Collection[int]) -> list[AddedToken]:
    silent = set(events)
    return [
        token for index, token in sorted(tokenizer.get_added_tokens_decoder().items()) if index not in silent
    ]


def _byte_level_speller() -> Callable[[str], bytes | None]:
    table = _Alphabet((ord(character), chr(byte)) for character, byte in byte_alphabet().items())

    def spell(string: str) -> bytes | None:
        try:
            return string.translate(table).encode("latin-1")
        except UnicodeEncodeError:
            return None

    return spell


class _Alphabet(dict[int, str]):
    """A translation table under which a character outside the alphabet makes the result unencodable."""

    def __missing__(self, key: int) -> str:
        return _FOREIGN


def _byte_fallback_spelling(string: str) -> bytes:
    piece = _BYTE_PIECE.fullmatch(string) if string.startswith("<0x") else None
    return bytes([int(piece[1], 16)]) if piece else string.replace(_SPACE, " ").encode()


def _parts(tokenizer: Tokenizer) -> dict[str, Any]:
    # The JSON of the whole tokenizer takes a second for a large vocabulary; an empty model has the same
    # components.
    shell = Tokenizer(models.BPE())
    try:
        for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
            component = getattr(tokenizer, name)
            if component is not None:
                setattr(shell, name, component)
        description: dict[str, Any] = json.loads(shell.to_str())
    except Exception as error:  # tokenizers raises bare Exception for components written in Python
        raise VocabularyError(f"the tokenizer's components cannot be described: {error}") from None
    return description


def _component(name: str, description: dict[str, Any] | None) -> Any:
    if description is None:
        return None
    shell = json.loads(Tokenizer(models.BPE()).to_str())
    return getattr(Tokenizer.from_str(json.dumps(shell | {name: description})), name)


def _without_prefix(description: dict[str, Any] | None) -> dict[str, Any] | None:
    if description is None:
        return None
    if "pretokenizers" in description:
        return description | {
            "pretokenizers": [_without_prefix(child) for child in description["pretokenizers"]]
        }
    if description["type"] == "ByteLevel":
        return description | {"add_prefix_space": False}
    if description["type"] == "Metaspace":
        return {k: v for k, v in description.items() if k != "add_prefix_space"} | {"prepend_scheme": "never"}
    return description


def _find(description: dict[str, Any] | None, kind: str) -> list[dict[str, Any]]:
    if description is None:
        return []
    children = [
        child
        for name in ("normalizers", "pretokenizers", "decoders", "processors")
        for child in description.get(name, [])
    ]
    own = [description] if description["type"] == kind else []
    return own + [node for child in children for node in _find(child, kind)]


def _unsupported(what: str) -> VocabularyError:
    return VocabularyError(
        f"{what} cannot be spelled in bytes yet; byte-level BPE and byte-fallback (SentencePiece-style) BPE can"
    )
