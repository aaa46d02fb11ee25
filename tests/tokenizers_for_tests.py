"""Small tokenizers of several families, trained in the process: no downloads, the same in every run.

Each has the special tokens <bos> (id 0) and <eos> (id 1); a byte-fallback one <unk> (id 2) as well.
"""

import json
from collections.abc import Iterable
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from gold.align.spelling import byte_alphabet

BOS, EOS, UNK = "<bos>", "<eos>", "<unk>"
BOS_ID, EOS_ID = 0, 1

CORPUS = (
    "The quick brown fox jumps over the lazy dog, and then the dog sleeps in the sun.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(12, 345))\n",
    "Die Straße führt über die Brücke; l'été dernier était très chaud, n'est-ce pas?",
    "Привет, мир! Как дела сегодня? Всё хорошо, спасибо.",
    "日本語のテキストと中文文本，還有한국어 문장도 있습니다。",
    "Numbers: 1 22 333 4444 55555, 3.14159, 1,000,000 and 2024-11-22.",
    "It's what we've got; they'll say that's what you'd want. don't, can't, won't",
    "tabs\tand  double  spaces   and\r\nwindows lines\r\n",
    "🙂🙂 emoji 👩‍👩‍👧 é e\u0301 ﬁne ½ Ω",
)


def byte_level_bpe(
    corpus: Iterable[str] = CORPUS,
    vocab_size: int = 400,
    digits: bool = False,
    normalizer: Any = None,
    pattern: str | None = None,
    prefix_space: bool = False,
) -> Tokenizer:
    """Byte-level BPE; `digits` cuts every digit off by itself, `pattern` is a regular expression of pre-tokens."""
    tokenizer = Tokenizer(models.BPE())
    steps = [
        *([pre_tokenizers.Digits(individual_digits=True)] if digits else []),
        *([pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []),
        pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=pattern is None),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return _with_bos(tokenizer)


def character_level() -> Tokenizer:
    """Byte-level BPE without merges: one token per byte."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([BOS, EOS, *symbols])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    return _with_bos(tokenizer)


def sentencepiece_bpe(
    corpus: Iterable[str] = CORPUS,
    vocab_size: int = 600,
    prefix: str | None = None,
    known: range = range(256),
) -> Tokenizer:
    """BPE with `▁` for spaces and byte fallback, as Gemma (no prefix) or Llama-2 have it.

    `prefix`: "prepend" (a normaliser, as in Llama-2's file), "first" or "always" (Metaspace), or None. A character with
    a byte outside `known` that is no token itself is unknown.
    """
    pieces = [f"<0x{byte:02X}>" for byte in known]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, UNK, *pieces],
        limit_alphabet=120,
        show_progress=False,
    )
    trained.train_from_iterator(corpus, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, unk_token=UNK, fuse_unk=True, byte_fallback=True)
    )
    if prefix in ("first", "always"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    else:
        replace = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = (
            normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix == "prepend" else replace
        )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([BOS, EOS, UNK])
    return _with_bos(tokenizer)


@cache
def families() -> dict[str, Tokenizer]:
    """One tokenizer of each kind that is supported, by name."""
    lacking = byte_level_bpe(vocab_size=300)
    return {
        "byte-level": byte_level_bpe(),
        "byte-level, other merges": byte_level_bpe(CORPUS[::-2], vocab_size=330),
        "byte-level, digits": byte_level_bpe(digits=True),
        "byte-level, NFC": byte_level_bpe(normalizer=normalizers.NFC()),
        "byte-level, NFKC and lower case": byte_level_bpe(
            normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        ),
        "byte-level, groups of digits": byte_level_bpe(
            pattern=r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        "byte-level, space before": byte_level_bpe(prefix_space=True),
        "byte-level, bytes missing": without_bytes(lacking, b"x\x01\xc3\xf0 "),
        "byte-level, added tokens": with_added(byte_level_bpe()),
        "characters": character_level(),
        "byte-fallback": sentencepiece_bpe(),
        "byte-fallback, unknown characters": sentencepiece_bpe(known=range(0x20, 0xE3)),
        "byte-fallback, added tokens": with_added(sentencepiece_bpe()),
        "byte-fallback, prepend": sentencepiece_bpe(prefix="prepend"),
        "byte-fallback, metaspace first": sentencepiece_bpe(prefix="first"),
        "byte-fallback, metaspace always": sentencepiece_bpe(prefix="always", vocab_size=450),
    }


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with tokens added: one that is text (<think>), one that swallows spaces, one that is special."""
    tokenizer.add_tokens(["<think>", AddedToken("<pause>", lstrip=True, rstrip=True)])
    tokenizer.add_special_tokens(["<|turn|>"])
    return tokenizer


def without_bytes(tokenizer: Tokenizer, lacking: bytes) -> Tokenizer:
    """A byte-level tokenizer less the symbols of some bytes and every token that has them."""
    gone = {symbol for symbol, byte in byte_alphabet().items() if byte in lacking}
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    kept = [
        token
        for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])
        if not set(token) & gone
    ]
    model["vocab"] = {token: index for index, token in enumerate(kept)}
    model["merges"] = [pair for pair in model["merges"] if not set("".join(pair)) & gone]
    return Tokenizer.from_str(json.dumps(description))


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer
