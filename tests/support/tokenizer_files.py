"""Tokenizers written in the formats of other programs: GGUF, SentencePiece, tiktoken's ranks, `tekken.json`."""

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from tokenizers import Tokenizer, pre_tokenizers

from gold.tokenize.convert.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from gold.tokenize.families import byte_alphabet


def description(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as tokenizer.json has it."""
    return json.loads(tokenizer.to_str())


def listed(tokenizer: dict[str, Any]) -> tuple[list[str], list[int]]:
    """All tokens of a tokenizer.json by id, and of what kind they are; `[PAD]` where there is none."""
    vocab = tokenizer["model"]["vocab"]
    by_id = (
        {index: token for token, index in vocab.items()}
        if isinstance(vocab, dict)
        else {i: p[0] for i, p in enumerate(vocab)}
    )
    kinds = {
        index: BYTE
        if token.startswith("<0x") and len(token) == 6 and tokenizer["model"].get("byte_fallback")
        else NORMAL
        for index, token in by_id.items()
    }
    for token in tokenizer["added_tokens"]:
        by_id[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        if token["content"] == tokenizer["model"].get("unk_token"):
            kinds[token["id"]] = UNKNOWN
    size = max(by_id) + 1
    return [by_id.get(i, f"[PAD{i}]") for i in range(size)], [kinds.get(i, 5) for i in range(size)]


def merge_scores(tokenizer: dict[str, Any]) -> list[float]:
    """A score for every token of a BPE tokenizer.json: the earlier its merge, the higher."""
    tokens, _ = listed(tokenizer)
    pairs = [m if isinstance(m, list) else m.split(" ") for m in tokenizer["model"]["merges"]]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(pairs))) for token in tokens]


def write_gguf(path: Path, model: str, tokens: Sequence[str], kinds: Sequence[int], **keys: Any) -> Path:
    """A GGUF file without weights; `keys` are those below `tokenizer.ggml.`, the chat template among them."""
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(kinds))
    for key, value in keys.items():
        if key == "chat_template":
            writer.add_string("tokenizer.chat_template", value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.ggml.{key}", value)
        else:
            writer.add_array(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level_gguf(path: Path, tokenizer: dict[str, Any], pre: str, **keys: Any) -> Path:
    """A byte-level BPE tokenizer.json as GGUF."""
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    return write_gguf(path, "gpt2", *listed(tokenizer), pre=pre, merges=merges, **keys)


def sentencepiece_model(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], unigram: bool, **normalizer: int
) -> bytes:
    """A `tokenizer.model`; `normalizer` are the switches add_dummy_prefix and remove_extra_whitespaces."""

    def field(number: int, value: int | bytes) -> bytes:
        if isinstance(value, int):
            return _varint(number << 3) + _varint(value)
        return _varint(number << 3 | 2) + _varint(len(value)) + value

    pieces = b"".join(
        field(1, field(1, token.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, kind))
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    )
    trainer = field(3, 1 if unigram else 2) + field(41, 0) + field(42, 1) + field(43, (1 << 64) - 1)
    switches = {"add_dummy_prefix": 3, "remove_extra_whitespaces": 4}
    spec = b"".join(field(switches[name], value) for name, value in normalizer.items())
    return pieces + field(2, trainer) + field(3, spec)


def ranks_of(tokenizer: dict[str, Any]) -> dict[bytes, int]:
    """The byte strings of a byte-level BPE tokenizer.json, without its added tokens, ranked by their merges."""
    alphabet = byte_alphabet()
    pairs = [m if isinstance(m, list) else m.split(" ") for m in tokenizer["model"]["merges"]]
    tokens = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, pairs)])
    return {bytes(alphabet[c] for c in token): rank for rank, token in enumerate(tokens)}


def tekken(ranks: Mapping[bytes, int], pattern: str, special: Sequence[str], count: int) -> dict[str, Any]:
    """A `tekken.json` with `count` special tokens, the first of which have names."""
    return {
        "config": {
            "pattern": pattern,
            "num_vocab_tokens": len(ranks),
            "default_vocab_size": len(ranks) + count,
            "default_num_special_tokens": count,
            "version": "v11",
        },
        "special_tokens": [
            {"rank": i, "token_str": token, "is_control": True} for i, token in enumerate(special)
        ],
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for token, rank in ranks.items()
        ],
    }


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
