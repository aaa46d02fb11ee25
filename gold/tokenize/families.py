"""The bytes of every token of a tokenizer: the only module that knows `Ġ`, `▁`, `<0x0A>`, `##` and `</w>`.

What a token string stands for follows from the model and from what the tokenizer does to a text before the model sees
it: byte-level (GPT-2's alphabet, as in Qwen, Llama-3, gpt-oss), `▁` for a space (Gemma, Llama-2, T5, XLM-R) with or
without byte pieces, `##` before a token that continues a word (BERT), `</w>` behind one that ends it (CLIP), whole
words, or plain characters. Everything is read from the live `tokenizers.Tokenizer`, because a file and the tokenizer
that a library builds from it can differ.

A tokenizer that drops white space still knows where its words begin: there the space is *virtual*. A token that begins
a word stands for a space and its characters, as ` the` does elsewhere, so sampled ids read as words with spaces
between them. A token whose first character the tokenizer cuts off by itself, such as a comma or a Chinese character,
has none. With `</w>` the space is behind the word. Where neither is marked, as in BPE on words without a mark, ids do
not tell where the spaces were, and there is none.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from gold.errors import VocabularyError

MOST_IDS = 2**24
"""A vocabulary whose ids go further is refused: there is a row for each of them."""

BYTE_LEVEL = "byte-level"
BYTE_FALLBACK = "byte-fallback"

_SPACE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_FOREIGN = "\uffff"
_LONGEST_REWRITING = 1000


@dataclass(frozen=True)
class Family:
    """How one tokenizer rewrites text before its model sees it, and how its token strings stand for bytes."""

    name: str
    """For people: "byte-level", "byte-fallback", "metaspace", "word pieces", "word ends", "words", "plain", or two."""
    unk_id: int | None
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    byte_level: bool
    """Token strings are written in the byte alphabet."""
    byte_pieces: bool
    """Strings such as `<0x0A>` are bytes."""
    space: str | None
    """The character that stands for a space, if one does."""
    continuing: str
    """What the string of a token that continues a word begins with, "" for no mark."""
    ending: str
    """What the string of a token that ends a word ends with, "" for no mark."""
    drops_spaces: bool
    """The tokenizer drops white space between words."""
    word_space: Literal["before", "after"] | None
    """Where the virtual space of a word lies."""
    prefix: Literal["text", "pieces"] | None
    """Whether a space is put before a text that has none: once, or before every piece of it (a virtual one too)."""


def read_family(tokenizer: Tokenizer) -> Family:
    """The family of a live tokenizer.

    Raises: VocabularyError for a tokenizer whose tokens stand for no certain bytes.
    """
    model = tokenizer.model
    parts = _parts(tokenizer)
    normalizer, pre_tokenizer = parts["normalizer"], parts["pre_tokenizer"]
    unigram = _unigram_settings(model) if isinstance(model, models.Unigram) else None
    if unigram is None and not isinstance(model, models.BPE | models.WordPiece | models.WordLevel):
        raise VocabularyError(f"a {type(model).__name__} model cannot be spelled in bytes")
    if getattr(model, "dropout", None):
        raise VocabularyError(
            f"BPE dropout is {model.dropout}, so the same text gets other tokens at every call; "
            "set model.dropout = None on the tokenizer"
        )
    byte_level = any(_find(parts[part], "ByteLevel") for part in ("normalizer", "pre_tokenizer", "decoder"))
    pieces = unigram[1] if unigram else bool(getattr(model, "byte_fallback", False))
    space = _space(normalizer, pre_tokenizer, byte_level, pieces)
    continuing = getattr(model, "continuing_subword_prefix", None) or ""
    ending = getattr(model, "end_of_word_suffix", None) or ""
    if space is not None and ending:
        raise VocabularyError(
            f"its tokens mark both spaces ({space!r}) and the ends of words ({ending[:20]!r})"
        )
    prefix = _prefix(normalizer, pre_tokenizer, space)
    word_space: Literal["before", "after"] | None = None
    words = isinstance(model, models.WordLevel)
    drops_spaces = _drops_spaces(tokenizer, normalizer, space)
    if drops_spaces and prefix != "pieces":
        word_space = "before" if continuing or words else "after" if ending else None
    letters = (
        "byte-level"
        if byte_level
        else "byte-fallback"
        if pieces
        else "metaspace"
        if space is not None
        else ""
    )
    marks = "words" if words else "word pieces" if continuing else "word ends" if ending else ""
    unk = unigram[0] if unigram else None
    if unigram is None and model.unk_token is not None:
        unk = tokenizer.token_to_id(model.unk_token)
    return Family(
        name=", ".join(filter(None, (letters, marks))) or "plain",
        unk_id=unk,
        normalizer=normalizer,
        pre_tokenizer=pre_tokenizer,
        byte_level=byte_level,
        byte_pieces=pieces and not byte_level,
        space=space,
        continuing=continuing,
        ending=ending,
        drops_spaces=drops_spaces,
        word_space=word_space,
        prefix="pieces" if word_space == "before" else prefix,
    )


def check_growth(tokenizer: Tokenizer) -> None:
    """Nothing, where no text gets much longer before a tokenizer's model sees it; no text is read for that.

    Raises: VocabularyError for replacements one after the other that each double a text, for example.
    """
    longest = 1.0
    for step in _steps(_parts(tokenizer)["normalizer"]):
        if step["type"] == "Replace":
            shortest = len(step["pattern"].get("String", "").encode())
            longest *= max(1.0, len(step["content"].encode()) / max(shortest, 1))
    if longest > _LONGEST_REWRITING:
        raise VocabularyError(
            f"its normalizer can make a text more than {_LONGEST_REWRITING:,} times as long, which no tokenizer needs"
        )


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


def token_spellings(tokenizer: Tokenizer, family: Family, events: Collection[int]) -> list[bytes | None]:
    """The bytes of every id; None for the ids in `events`, for unused ids, and for strings that no text can give.

    Added tokens stand for their raw content, except where a vocabulary that is not byte-level has the same string
    itself: such runs of spaces are written with `▁`.
    """
    added = {
        index: token.content
        for index, token in tokenizer.get_added_tokens_decoder().items()
        if family.byte_level or tokenizer.model.token_to_id(token.content) is None
    }
    decode = _speller(tokenizer, family)
    silent = set(events)
    tokenized_texts: list[bytes | None] = []
    for index, string in enumerate(token_strings(tokenizer)):
        if string is None or index in silent:
            tokenized_texts.append(None)
        elif index in added:
            tokenized_texts.append(added[index].encode())
        else:
            tokenized_texts.append(decode(string))
    return tokenized_texts


def is_byte_piece(string: str | None) -> bool:
    """Whether a token string is a byte-fallback piece such as `<0x0A>`."""
    return string is not None and _BYTE_PIECE.fullmatch(string) is not None


def losses(tokenizer: Tokenizer, family: Family) -> Callable[[str], npt.NDArray[np.bool_]]:
    """The function that tells, for each byte of a rewritten text, whether the vocabulary has no token for it alone.

    A byte-level model leaves such a byte out (or calls it unknown), others a character that is no token and one of
    whose bytes is no piece. Of models that read words as wholes it is not known.
    """
    has = tokenizer.model.token_to_id
    if family.byte_level:
        missing = np.zeros(256, np.bool_)
        missing[[byte for symbol, byte in byte_alphabet().items() if has(symbol) is None]] = True
        return lambda text: missing[np.frombuffer(text.encode(), np.uint8)]
    pieces = {byte for byte in range(256) if family.byte_pieces and has(f"<0x{byte:02X}>") is not None}
    by_words = family.continuing or family.ending or isinstance(tokenizer.model, models.WordLevel)

    def lost(text: str) -> npt.NDArray[np.bool_]:
        spelled = {c: family.space if c == " " and family.space else c for c in set(text)}
        known = {c: has(own) is not None or pieces.issuperset(c.encode()) for c, own in spelled.items()}
        if by_words or all(known.values()):
            return np.zeros(len(text.encode()), np.bool_)
        return np.repeat([not known[c] for c in text], [len(c.encode()) for c in text])

    return lost


def character_ids(tokenizer: Tokenizer, family: Family, index: int, events: Collection[int]) -> list[int]:
    """The ids that stand for the characters of a token, one by one: what it is as text where it is an event itself.

    A character without a token of its own is unknown, once for a run of them; nothing stands for it if there is no
    unknown token. A model of whole words has no tokens for characters.
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
        if isinstance(tokenizer.model, models.WordLevel) or any(i is None or i in events for i in found):
            found = [family.unk_id]
        ids += found if found != ids[-1:] or found != [family.unk_id] else []
    return [i for i in ids if i is not None]


def text_tokenizer(
    tokenizer: Tokenizer,
    family: Family,
    events: Collection[int],
    *,
    at_start: bool = True,
    normalized: bool = False,
) -> Tokenizer:
    """A copy that shares the model and takes every text as text: no post-processor, no special tokens.

    Added tokens outside `events` still match, as they do in the original. With `at_start` false no leading
    space is put before the text where that is put there once. With `normalized` it takes a text that `normalizer_of`
    has rewritten.

    Ids of added tokens can differ from the original's: `added_ids` says how.
    """
    copy = Tokenizer(tokenizer.model)
    normalizer, pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    description = family.normalizer
    if normalized:
        description = _filtered(description, lambda part: part["type"] in ("Prepend", "ByteLevel"))
    if family.prefix == "text" and not at_start:
        description = _filtered(description, lambda part: part["type"] != "Prepend")
        pre_tokenizer = _component("pre_tokenizer", _without_prefix(family.pre_tokenizer))
    if description != family.normalizer:
        normalizer = _component("normalizer", description)
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


def normalizer_of(family: Family) -> Callable[[str], str]:
    """The normaliser as a function, less the space put before a text and the change to the byte alphabet."""
    plain = _component(
        "normalizer",
        _filtered(family.normalizer, lambda part: part["type"] not in ("Prepend", "ByteLevel")),
    )
    return (lambda text: text) if plain is None else plain.normalize_str


def rewriter(family: Family) -> Callable[[str], str]:
    """The function from a text to the text that its tokens spell, white space and unknown characters aside.

    It is `normalizer_of` with spaces for the character that stands for them, so both have the same length.
    """
    normalize, space = normalizer_of(family), family.space
    return normalize if space is None else lambda text: normalize(text).replace(space, " ")


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


def _unigram_settings(model: Any) -> tuple[int | None, bool]:
    """The id for unknown characters and whether there are byte pieces; the library shows neither."""
    state: bytes = model.__getstate__()
    unk = re.match(rb'\{"type":"Unigram","unk_id":(\d+|null)', state)
    fallback = re.search(rb'"byte_fallback":(true|false)', state[-64:])
    if unk is None or fallback is None:
        raise VocabularyError(
            "this release of tokenizers describes a Unigram model in a way that is not known"
        )
    return None if unk[1] == b"null" else int(unk[1]), fallback[1] == b"true"


def _space(
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    byte_level: bool,
    byte_pieces: bool,
) -> str | None:
    found = {node.get("replacement", _SPACE) for node in _find(pre_tokenizer, "Metaspace")}
    found |= {_SPACE for node in _find(normalizer, "Replace") if node.get("content") == _SPACE}
    steps = [*_steps(normalizer), *_steps(pre_tokenizer)]
    symbols = [at for at, step in enumerate(steps) if step["type"] == "ByteLevel"]
    if symbols and (found or len(symbols) > 1 or symbols[0] < len(_steps(normalizer)) - 1):
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
    normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None, space: str | None
) -> Literal["text", "pieces"] | None:
    prefix: Literal["text", "pieces"] | None = None
    if any(node["prepend"] in (" ", space) for node in _find(normalizer, "Prepend")):
        prefix = "text"
    for at, step in enumerate(_steps(pre_tokenizer)):
        scheme = step.get("prepend_scheme") if step["type"] == "Metaspace" else None
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            scheme = "always"
        if scheme in ("first", "always"):
            prefix = "pieces" if at and scheme == "always" else "text"
    return prefix


def _drops_spaces(tokenizer: Tokenizer, normalizer: dict[str, Any] | None, space: str | None) -> bool:
    if tokenizer.pre_tokenizer is None:
        return False
    plain = _component("normalizer", _filtered(normalizer, lambda part: part["type"] != "Prepend"))
    probe: str = "a b" if plain is None else plain.normalize_str("a b")
    kept = {at for _, span in tokenizer.pre_tokenizer.pre_tokenize_str(probe) for at in range(*span)}
    return any(character in (" ", space) and at not in kept for at, character in enumerate(probe))


def _speller(tokenizer: Tokenizer, family: Family) -> Callable[[str], bytes | None]:
    own_bytes = _byte_level_speller() if family.byte_level else _character_speller(family)
    cut_off = _cut_off(tokenizer, family) if family.word_space == "before" else None

    def decode(string: str) -> bytes | None:
        # A mark alone is text: a word that begins with it, or all of one.
        continues = bool(family.continuing) and string.startswith(family.continuing)
        continues &= string != family.continuing
        body = string.removeprefix(family.continuing) if continues else string
        ends = bool(family.ending) and body.endswith(family.ending) and body != family.ending
        own = own_bytes(body.removesuffix(family.ending) if ends else body)
        if own is None or (family.byte_pieces and is_byte_piece(string)):
            return own
        if cut_off is not None and not continues and not cut_off(own):
            return b" " + own
        return own + b" " if ends and family.word_space == "after" else own

    return decode


def _cut_off(tokenizer: Tokenizer, family: Family) -> Callable[[bytes], bool]:
    """Whether the tokenizer cuts before a token by its first character alone, so that no space is needed there."""
    normalize, pre_tokenizer = normalizer_of(family), tokenizer.pre_tokenizer

    @cache
    def is_cut(text: str) -> bool:
        return len(pre_tokenizer.pre_tokenize_str(normalize(text))) > 1

    def cut_off(own: bytes) -> bool:
        # Where letters and digits are cut apart a number still has a space before it; each of its digits has none
        # only if digits are cut from each other.
        first = own.decode("utf-8", "replace")[:1]
        return is_cut(first + first) or (not first.isalnum() and is_cut("a" + first))

    return cut_off


def _byte_level_speller() -> Callable[[str], bytes | None]:
    table = _Alphabet((ord(character), chr(byte)) for character, byte in byte_alphabet().items())

    def decode(string: str) -> bytes | None:
        try:
            return string.translate(table).encode("latin-1")
        except UnicodeEncodeError:
            return None

    return decode


class _Alphabet(dict[int, str]):
    """A translation table under which a character outside the alphabet makes the result unencodable."""

    def __missing__(self, key: int) -> str:
        return _FOREIGN


def _character_speller(family: Family) -> Callable[[str], bytes]:
    def decode(string: str) -> bytes:
        piece = _BYTE_PIECE.fullmatch(string) if family.byte_pieces and string.startswith("<0x") else None
        if piece:
            return bytes([int(piece[1], 16)])
        return (string if family.space is None else string.replace(family.space, " ")).encode()

    return decode


def _before_text(template: list[dict[str, Any]]) -> list[dict[str, Any]]:
    text = next((i for i, item in enumerate(template) if "Sequence" in item), len(template))
    return template[:text]


def _text_tokens(tokenizer: Tokenizer, events: Collection[int]) -> list[AddedToken]:
    silent = set(events)
    return [
        token for index, token in sorted(tokenizer.get_added_tokens_decoder().items()) if index not in silent
    ]


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


def _filtered(
    description: dict[str, Any] | None, keep: Callable[[dict[str, Any]], bool]
) -> dict[str, Any] | None:
    """A component's description with only the parts to keep; None if nothing is left."""
    if description is None:
        return None
    for name in ("normalizers", "pretokenizers"):
        if name in description:
            kept = [
                part for part in (_filtered(child, keep) for child in description[name]) if part is not None
            ]
            return description | {name: kept} if kept else None
    return description if keep(description) else None


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


def _steps(description: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a component in the order in which they work."""
    if description is None:
        return []
    for name in ("normalizers", "pretokenizers"):
        if name in description:
            return [step for child in description[name] for step in _steps(child)]
    return [description]


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
