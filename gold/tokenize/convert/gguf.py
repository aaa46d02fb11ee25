"""Reads the tokenizer of a GGUF file from its metadata, without weights and without a package that would list them."""

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors

from gold.errors import VocabularyError
from gold.files import open_file
from gold.tokenize.convert.construct import (
    SPACE,
    add_tokens,
    bpe_model,
    merges_of_ranked,
    space_decoder,
    word_piece_tokenizer,
)
from gold.tokenize.convert.gguf_pretokenizers import BOS_FIRST, known_words, named_byte_level
from gold.tokenize.convert.sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Pieces,
    tokenizer_of,
)

# The struct format of each value type; 8 is a string, 9 an array.
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip

_KEY = "tokenizer.ggml."
# Default ids by role, for files of each kind that do not name them.
_DEFAULT_IDS: dict[str, dict[str, int]] = {
    "llama": {"bos": 1, "eos": 2},
    "bert": {"bos": 101, "seperator": 102, "padding": 0},
    "t5": {"eos": 1, "padding": 0},
}


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file by key: numbers, strings, arrays of numbers, lists of strings.

    Raises: VocabularyError if it is no GGUF file, of another byte order or version, or ends too early.
    """
    try:
        with (
            open_file(path, VocabularyError) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if data[:4] != b"GGUF":
                raise VocabularyError(f"{path} is no GGUF file")
            (version,) = struct.unpack_from("<I", data, 4)
            if version not in (2, 3):
                raise VocabularyError(
                    f"{path} is a GGUF file of version {version}, or of another byte order; versions 2 and 3 are read"
                )
            return _values(data)
    except VocabularyError:
        raise
    except OSError as error:
        raise VocabularyError(f"{path} cannot be read: {error.strerror}") from None
    except (KeyError, ValueError, OverflowError, RecursionError, struct.error):
        raise VocabularyError(f"{path} is a broken GGUF file: its metadata ends too early") from None


def _values(data: mmap.mmap) -> dict[str, Any]:
    size, at = len(data), 24
    (count,) = struct.unpack_from("<Q", data, 16)
    number, long = struct.Struct("<I").unpack_from, struct.Struct("<Q").unpack_from

    def string() -> str:
        nonlocal at
        start = at + 8
        at = start + long(data, at)[0]
        if at > size:
            raise ValueError("a string ends behind the file")
        return data[start:at].decode()

    def value(kind: int) -> Any:
        nonlocal at
        if kind == 8:
            return string()
        if kind == 9:
            inner, length = number(data, at)[0], long(data, at + 4)[0]
            at += 12
            if inner not in _SCALARS:
                return [value(inner) for _ in range(length)]
            array = np.frombuffer(data, _SCALARS[inner], length, at).copy()
            at += array.nbytes
            return array
        scalar = np.frombuffer(data, _SCALARS[kind], 1, at)[0]
        at += scalar.nbytes
        return scalar.item()

    values = {}
    for _ in range(count):
        key = string()
        kind = number(data, at)[0]
        at += 4
        values[key] = value(kind)
    return values


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in the metadata of a GGUF file, with its BOS in front of texts if they say so.

    Raises: VocabularyError if there is none, or one that cannot be built from the metadata.
    """
    if isinstance(whole := metadata.get("tokenizer.huggingface.json"), str):
        try:
            return Tokenizer.from_str(whole)
        except Exception as error:  # tokenizers raises bare Exception
            raise VocabularyError(
                f"its tokenizer.huggingface.json cannot be read: {str(error)[:200]}"
            ) from None
    fields = _Fields(metadata)
    kind, name = fields.get("model"), fields.get("pre")
    if kind == "gpt2":
        tokenizer = _byte_level(fields, name)
    elif kind == "gemma4" or (kind == "llama" and fields.get("scores") is None):
        tokenizer = _merged_pieces(fields)
    elif kind in ("llama", "t5"):
        charsmap = fields.get("precompiled_charsmap")
        tokenizer = tokenizer_of(
            Pieces(
                fields.tokens,
                fields.numbers("scores", 0),
                fields.kinds,
                unigram=kind == "t5",
                charsmap=b"" if charsmap is None else np.asarray(charsmap).tobytes(),
                squeezes=bool(fields.get("remove_extra_whitespaces", False)),
                space_first=bool(fields.get("add_space_prefix", kind == "llama")),
            )
        )
    elif kind == "bert":
        tokenizer = _word_pieces(fields)
    else:
        raise VocabularyError(
            f"its tokenizer is of a kind that is not read here, {kind!r}; give the model's tokenizer.json"
        )
    bos = fields.roles.get("bos")
    puts_bos = fields.get("add_bos_token", kind in ("llama", "bert", "gemma4") or name in BOS_FIRST)
    if bos is not None and puts_bos:
        token = tokenizer.id_to_token(bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[token, "$A"], special_tokens=[(token, bos)]
        )
    return tokenizer


def role_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """The ids in GGUF metadata by role: bos, eos, eot, eom, padding, seperator (this spelling), unknown, mask.

    Ids beyond the vocabulary are skipped.
    """
    size = len(metadata.get(f"{_KEY}tokens", ()))
    defaults = _DEFAULT_IDS.get(str(metadata.get(f"{_KEY}model")), {})
    named = {
        role: metadata.get(f"{_KEY}{role}_token_id", defaults.get(role))
        for role in ("bos", "eos", "eot", "eom", "padding", "seperator", "unknown", "mask")
    }
    return {role: index for role, index in named.items() if isinstance(index, int) and 0 <= index < size}


class _Fields:
    """The fields of GGUF metadata below `tokenizer.ggml.`, with the tokens by id and their kinds."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        tokens = self.get("tokens")
        if not isinstance(self.get("model"), str) or not isinstance(tokens, list) or not tokens:
            raise VocabularyError("it holds no tokenizer (no tokenizer.ggml.model, no tokenizer.ggml.tokens)")
        self.tokens: list[str] = tokens
        self.roles = role_ids(metadata)
        self.kinds: list[int] = self.numbers("token_type", NORMAL)

    def get(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(_KEY + name, default)

    def numbers(self, name: str, default: int) -> list[Any]:
        """A list with one number per token."""
        found, count = self.get(name), len(self.tokens)
        if found is None:
            return [default] * count
        if not isinstance(found, np.ndarray) or len(found) != count:
            raise VocabularyError(f"its {_KEY}{name} are not {count} numbers, one for each token")
        return list(found.tolist())

    def merges(self) -> list[tuple[str, str]] | None:
        found = self.get("merges")
        if not isinstance(found, list):
            return None
        cuts = [merge.find(" ", 1) for merge in found]
        if min(cuts, default=1) < 0:
            raise VocabularyError(f"its {_KEY}merges have one that is no pair: {found[cuts.index(-1)]!r}")
        return [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(found, cuts, strict=True)]

    def vocab(self) -> dict[str, int]:
        """The ids of the used tokens by their strings."""
        vocab: dict[str, int] = {}
        for index, token in enumerate(self.tokens):
            if token and self.kinds[index] != UNUSED and vocab.setdefault(token, index) != index:
                raise VocabularyError(f"its tokens {vocab[token]} and {index} are the same, {token!r}")
        return vocab

    def of_kind(self, *kinds: int) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.kinds, strict=True) if kind in kinds]

    def with_added(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with its special and user-defined tokens added."""
        add_tokens(tokenizer, self.of_kind(UNKNOWN, CONTROL), self.of_kind(USER_DEFINED))
        return tokenizer


def _byte_level(fields: _Fields, name: str | None) -> Tokenizer:
    if not known_words(name):
        known = (
            "none, as files from before May 2024" if name is None else f"{name!r}, which is not known here"
        )
        raise VocabularyError(
            f"the name of its pre-tokenizer (tokenizer.ggml.pre) is {known}; give the model's tokenizer.json"
        )
    merges = fields.merges()
    if merges is None:
        if name != "kimi-k2":
            raise VocabularyError("it lists no merges (tokenizer.ggml.merges)")
        ranked = fields.of_kind(NORMAL)
        merges = merges_of_ranked(ranked, ranked)
    return fields.with_added(named_byte_level(fields.vocab(), merges, str(name)))


def _merged_pieces(fields: _Fields) -> Tokenizer:
    """Tokens with `▁` and byte fallback as in SentencePiece, but with merges; text is split at lines (Gemma 4)."""
    merges = fields.merges()
    if merges is None:
        raise VocabularyError("it has neither scores nor merges (tokenizer.ggml.scores, .merges)")
    unknown = fields.roles.get("unknown")
    tokenizer = Tokenizer(
        bpe_model(
            fields.vocab(),
            merges,
            unk_token=None if unknown is None else fields.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
    tokenizer.decoder = space_decoder(strips=False)
    return fields.with_added(tokenizer)


def _word_pieces(fields: _Fields) -> Tokenizer:
    # The file marks tokens that begin a word, BERT those that continue one.
    fields.tokens = pieces = [
        token if kind in (UNKNOWN, CONTROL) or (token.startswith("[") and token.endswith("]"))
        else token[1:] if token.startswith(SPACE) else f"##{token}"
        for token, kind in zip(fields.tokens, fields.kinds, strict=True)
    ]  # fmt: skip
    unknown = fields.roles.get("unknown", 100)
    lowers = bool(fields.get("normalizer.lowercase", True))
    strips = bool(fields.get("normalizer.strip_accents", lowers))
    unk_token = pieces[unknown] if unknown < len(pieces) else "[UNK]"
    tokenizer = word_piece_tokenizer(fields.vocab(), unk_token, lowercase=lowers, strip_accents=strips)
    # Older files do not mark their special tokens.
    for index in fields.roles.values():
        if pieces[index].startswith("["):
            fields.kinds[index] = CONTROL
    return fields.with_added(tokenizer)
