"""The bytes of every token of a tokenizer: the only module that knows `Ġ`, `▁`, `<0x0A>`, `##` and `</w>`.

The bytes of a token string depend on the model and on the steps before it: byte-level (GPT-2's alphabet, as in Qwen,
Llama-3, gpt-oss), `▁` for a space (Gemma, Llama-2, T5, XLM-R) with or without byte-fallback tokens, `##` before a token
that continues a word (BERT), `</w>` after a token that ends a word (CLIP), whole words, or plain characters. Everything
is taken from the `tokenizers.Tokenizer` object, because a file and the tokenizer that a library builds from it can
differ.

A tokenizer that drops white space still knows where words begin: there the space is *virtual*. A token that begins a
word stands for a space plus its characters, like ` the` elsewhere, so sampled ids decode to words with spaces between
them. A token whose first character is always split off, such as a comma or a Chinese character, has no virtual space.
With `</w>` the space is after the word. If neither is marked, as in BPE on words without a mark, ids do not determine
the spaces, and there is no virtual space.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, models, pre_tokenizers

from gold.errors import VocabularyError
from gold.tokenize.components import Description, build, describe, steps, without

MOST_IDS = 2**24
"""Vocabularies with larger ids are rejected: there is a table row for every id up to the largest."""

BYTE_LEVEL = "byte-level"
BYTE_FALLBACK = "byte-fallback"

_SPACE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_NOT_A_BYTE = "\uffff"

Prefix = Literal["text", "pieces"]


@dataclass(frozen=True)
class Family:
    """How one tokenizer rewrites text before its model, and how its token strings map to bytes."""

    name: str
    """For display: "byte-level", "byte-fallback", "metaspace", "word pieces", "word ends", "words", "plain", or two."""
    unk_id: int | None
    normalizer: Description | None
    pre_tokenizer: Description | None
    byte_level: bool
    """Token strings use the byte-level alphabet."""
    byte_pieces: bool
    """Strings such as `<0x0A>` are bytes (byte fallback)."""
    space: str | None
    """The character that stands for a space, if any."""
    continuing: str
    """The prefix of a token that continues a word; "" for none."""
    ending: str
    """The suffix of a token that ends a word; "" for none."""
    drops_spaces: bool
    """The tokenizer drops white space between words."""
    word_space: Literal["before", "after"] | None
    """The side of a word on which the virtual space lies."""
    prefix: Prefix | None
    """Whether a space is added before a text that has none: once, or before every segment (also a virtual one)."""


def read_family(tokenizer: Tokenizer) -> Family:
    """The family of a tokenizer.

    Raises: VocabularyError if the bytes of its tokens are not well defined.
    """
    model, parts = tokenizer.model, describe(tokenizer)
    normalizer, pre_tokenizer = parts["normalizer"], parts["pre_tokenizer"]
    unigram, words = isinstance(model, models.Unigram), isinstance(model, models.WordLevel)
    if not unigram and not isinstance(model, models.BPE | models.WordPiece | models.WordLevel):
        raise VocabularyError(f"the bytes of the tokens of a {type(model).__name__} model are not known")
    if getattr(model, "dropout", None):
        raise VocabularyError(
            f"BPE dropout is {model.dropout}, so the same text gets other tokens at every call; "
            "set model.dropout = None on the tokenizer"
        )
    if unigram:
        unk_id, byte_pieces = _unigram_settings(model)
    else:
        unk_id = None if model.unk_token is None else tokenizer.token_to_id(model.unk_token)
        byte_pieces = bool(getattr(model, "byte_fallback", False))
    byte_level = any(steps(parts[part], "ByteLevel") for part in ("normalizer", "pre_tokenizer", "decoder"))
    space = _space(normalizer, pre_tokenizer, byte_level, byte_pieces)
    continuing = getattr(model, "continuing_subword_prefix", None) or ""
    ending = getattr(model, "end_of_word_suffix", None) or ""
    if space is not None and ending:
        raise VocabularyError(
            f"its tokens mark both spaces ({space!r}) and the ends of words ({ending[:20]!r})"
        )
    prefix = _prefix(normalizer, pre_tokenizer, space)
    drops_spaces = _drops_spaces(tokenizer, normalizer, space)
    word_space: Literal["before", "after"] | None = None
    if drops_spaces and prefix != "pieces":
        word_space = "before" if continuing or words else "after" if ending else None
    letters = (
        BYTE_LEVEL
        if byte_level
        else BYTE_FALLBACK
        if byte_pieces
        else "metaspace"
        if space is not None
        else ""
    )
    marks = "words" if words else "word pieces" if continuing else "word ends" if ending else ""
    return Family(
        name=", ".join(filter(None, (letters, marks))) or "plain",
        unk_id=unk_id,
        normalizer=normalizer,
        pre_tokenizer=pre_tokenizer,
        byte_level=byte_level,
        byte_pieces=byte_pieces and not byte_level,
        space=space,
        continuing=continuing,
        ending=ending,
        drops_spaces=drops_spaces,
        word_space=word_space,
        prefix="pieces" if word_space == "before" else prefix,
    )


def normalizer_of(family: Family) -> Callable[[str], str]:
    """The normalizer as a function, without the added prefix space and without the byte-level alphabet."""
    plain = build("normalizer", without(family.normalizer, "Prepend", "ByteLevel"))
    return (lambda text: text) if plain is None else plain.normalize_str


@cache
def byte_alphabet() -> dict[str, int]:
    """The byte for each of the 256 characters of the byte-level alphabet.

    Bytes that are printable in Latin-1 map to themselves, the others to U+0100 and up, in ascending order.
    """
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {character: ord(character) for character in characters if ord(character) < 256}
    others = [byte for byte in range(256) if byte not in set(own.values())]
    return own | dict(zip((c for c in characters if ord(c) >= 256), others, strict=True))


def token_contents(tokenizer: Tokenizer, family: Family, special: Collection[int]) -> list[bytes | None]:
    """The bytes of every id; None for the ids in `special`, for unused ids, and for strings that no text can produce.

    Added tokens have their raw content, unless a vocabulary that is not byte-level contains the same string: such runs
    of spaces are written with `▁`.
    """
    added = {
        index: token.content
        for index, token in tokenizer.get_added_tokens_decoder().items()
        if family.byte_level or tokenizer.model.token_to_id(token.content) is None
    }
    content_of = _content_of(tokenizer, family)
    return [
        None
        if string is None or index in special
        else added[index].encode()
        if index in added
        else content_of(string)
        for index, string in enumerate(_token_strings(tokenizer))
    ]


def _token_strings(tokenizer: Tokenizer) -> list[str | None]:
    """The string of every id; None for an unused id.

    If several strings share an id, the added token's string wins, else the first in sorted order: the iteration order
    of the vocabulary differs between processes.
    """
    own = tokenizer.get_vocab(with_added_tokens=False)
    added = tokenizer.get_added_tokens_decoder()
    last = max(max(own.values(), default=-1), max(added, default=-1))
    if last >= MOST_IDS:
        raise VocabularyError(
            f"its {len(own) + len(added):,} tokens have ids up to {last:,}; below {MOST_IDS:,} are read"
        )
    strings: list[str | None] = [None] * (last + 1)
    for string, index in own.items():
        other = strings[index]
        strings[index] = string if other is None else min(other, string)
    for index, token in added.items():
        strings[index] = token.content
    return strings


def is_byte_piece(string: str | None) -> bool:
    """True if a token string is a byte-fallback token such as `<0x0A>`."""
    return string is not None and _BYTE_PIECE.fullmatch(string) is not None


def missing_bytes(tokenizer: Tokenizer, family: Family) -> Callable[[str], npt.NDArray[np.bool_]]:
    """A function that marks each byte of a normalized text that no token covers.

    A byte-level model drops such a byte (or maps it to unknown); other models drop a character that is no token and has
    a byte without a byte-fallback token. For word-level models this is unknown.
    """
    has = tokenizer.model.token_to_id
    if family.byte_level:
        lacking = np.zeros(256, np.bool_)
        lacking[[byte for symbol, byte in byte_alphabet().items() if has(symbol) is None]] = True
        return lambda text: lacking[np.frombuffer(text.encode(), np.uint8)]
    pieces = {byte for byte in range(256) if family.byte_pieces and has(f"<0x{byte:02X}>") is not None}
    by_words = family.continuing or family.ending or isinstance(tokenizer.model, models.WordLevel)

    def missing(text: str) -> npt.NDArray[np.bool_]:
        string_of = {c: family.space if c == " " and family.space else c for c in set(text)}
        known = {c: has(own) is not None or pieces.issuperset(c.encode()) for c, own in string_of.items()}
        if by_words or all(known.values()):
            return np.zeros(len(text.encode()), np.bool_)
        return np.repeat([not known[c] for c in text], [len(c.encode()) for c in text])

    return missing


def character_ids(tokenizer: Tokenizer, family: Family, index: int, special: Collection[int]) -> list[int]:
    """The ids of the characters of a token: the encoding of a special token's string as text.

    A run of characters without tokens becomes one unknown token, or nothing if there is no unknown token. A word-level
    model has no tokens for characters.
    """
    string = tokenizer.id_to_token(index) or ""
    has = tokenizer.model.token_to_id
    ended = bool(family.ending) and string.endswith(family.ending)
    characters = string.removesuffix(family.ending) if ended else string
    ids: list[int | None] = []
    for at, character in enumerate(characters):
        own = (family.continuing if at else "") + character
        own += family.ending if ended and at == len(characters) - 1 else ""
        found = [has(own)]
        if found == [None] and family.byte_pieces:
            found = [has(f"<0x{byte:02X}>") for byte in character.encode()]
        if isinstance(tokenizer.model, models.WordLevel) or any(i is None or i in special for i in found):
            found = [family.unk_id]
        ids += found if found != ids[-1:] or found != [family.unk_id] else []
    return [i for i in ids if i is not None]


def _unigram_settings(model: Any) -> tuple[int | None, bool]:
    """The id for unknown characters and whether byte fallback is on; the library exposes neither."""
    state: bytes = model.__getstate__()
    unk = re.match(rb'\{"type":"Unigram","unk_id":(\d+|null)', state)
    fallback = re.search(rb'"byte_fallback":(true|false)', state[-64:])
    if unk is None or fallback is None:
        raise VocabularyError(
            "this release of tokenizers describes a Unigram model in a way that is not known"
        )
    return None if unk[1] == b"null" else int(unk[1]), fallback[1] == b"true"


def _space(
    normalizer: Description | None, pre_tokenizer: Description | None, byte_level: bool, byte_pieces: bool
) -> str | None:
    found = {node.get("replacement", _SPACE) for node in steps(pre_tokenizer, "Metaspace")}
    found |= {_SPACE for node in steps(normalizer, "Replace") if node.get("content") == _SPACE}
    both = [*steps(normalizer), *steps(pre_tokenizer)]
    symbols = [at for at, step in enumerate(both) if step["type"] == "ByteLevel"]
    if symbols and (found or len(symbols) > 1 or symbols[0] < len(steps(normalizer)) - 1):
        raise VocabularyError(
            "the tokenizer changes characters to bytes (ByteLevel) "
            + (f"and spaces to {min(found)!r}" if found else "and then rewrites those")
            + ", so its tokens stand for no certain bytes"
        )
    if len(found) > 1:
        raise VocabularyError(f"two characters stand for a space: {' and '.join(map(repr, sorted(found)))}")
    if found or byte_level:
        return min(found, default=None)
    return _SPACE if byte_pieces else None


def _prefix(
    normalizer: Description | None, pre_tokenizer: Description | None, space: str | None
) -> Prefix | None:
    prefix: Prefix | None = None
    if any(node["prepend"] in (" ", space) for node in steps(normalizer, "Prepend")):
        prefix = "text"
    for at, step in enumerate(steps(pre_tokenizer)):
        scheme = step.get("prepend_scheme") if step["type"] == "Metaspace" else None
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            scheme = "always"
        if scheme in ("first", "always"):
            prefix = "pieces" if at and scheme == "always" else "text"
    return prefix


def _drops_spaces(tokenizer: Tokenizer, normalizer: Description | None, space: str | None) -> bool:
    if tokenizer.pre_tokenizer is None:
        return False
    plain = build("normalizer", without(normalizer, "Prepend"))
    probe: str = "a b" if plain is None else plain.normalize_str("a b")
    kept = {at for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(probe) for at in range(*span)}
    return any(character in (" ", space) and at not in kept for at, character in enumerate(probe))


def _content_of(tokenizer: Tokenizer, family: Family) -> Callable[[str], bytes | None]:
    """The function from a token's string to its bytes; None for a string that no text produces."""
    alphabet = _Alphabet((ord(character), chr(byte)) for character, byte in byte_alphabet().items())
    cut_off = _cut_off(tokenizer, family) if family.word_space == "before" else None

    def letters(string: str) -> bytes | None:
        if family.byte_level:
            try:
                return string.translate(alphabet).encode("latin-1")
            except UnicodeEncodeError:
                return None
        piece = _BYTE_PIECE.fullmatch(string) if family.byte_pieces and string.startswith("<0x") else None
        if piece:
            return bytes([int(piece[1], 16)])
        return (string if family.space is None else string.replace(family.space, " ")).encode()

    def content(string: str) -> bytes | None:
        # A mark alone is text: a word that begins with it or consists of it.
        continues = bool(family.continuing) and string.startswith(family.continuing)
        continues &= string != family.continuing
        body = string.removeprefix(family.continuing) if continues else string
        ends = bool(family.ending) and body.endswith(family.ending) and body != family.ending
        own = letters(body.removesuffix(family.ending) if ends else body)
        if own is None or (family.byte_pieces and is_byte_piece(string)):
            return own
        if cut_off is not None and not continues and not cut_off(own):
            return b" " + own
        return own + b" " if ends and family.word_space == "after" else own

    return content


class _Alphabet(dict[int, str]):
    """A translation table that makes a string with characters outside the byte-level alphabet unencodable."""

    def __missing__(self, key: int) -> str:
        return _NOT_A_BYTE


def _cut_off(tokenizer: Tokenizer, family: Family) -> Callable[[bytes], bool]:
    """A predicate: the tokenizer always splits before this token because of its first character (no space needed)."""
    normalize, pre_tokenizer = normalizer_of(family), tokenizer.pre_tokenizer

    @cache
    def is_cut(text: str) -> bool:
        return len(pre_tokenizer.pre_tokenize_str(normalize(text))) > 1

    def cut_off(own: bytes) -> bool:
        # If letters and digits are split apart, a number still has a space before it; its digits have none only if
        # digits are split from each other.
        first = own.decode("utf-8", "replace")[:1]
        return is_cut(first + first) or (not first.isalnum() and is_cut("a" + first))

    return cut_off
