"""Small tokenizers of all families, trained in the process: no downloads, the same in every run.

Each has the special tokens <bos> (id 0) and <eos> (id 1); all but the byte-level BPE ones <unk> (id 2) as well.
"""

import base64
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
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

from gold.tokenize.families import byte_alphabet

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


# A character map as SentencePiece writes it, of these rules: Ａ to A, ｂ to b, ﬁ to fi, ½ to 1/2, ① to 1, e with an
# acute mark to é, か with a voicing mark to が, … to ..., the Angstrom sign to Å, q with two marks to the same in their
# canonical order; U+00A0, U+3000, tab, line feed and carriage return to a space, U+200B and U+0001 to nothing.
_CHARACTER_MAP = (
    "eNoV02dMU1EYxvGntxijgRgTPxlN+lGjlkDcYtx774ULA4Kipu5tW8GiRUXFgbNYHAjurdSF26q4t6JFxRXce/3vTX553nPfm3NO"
    "e+5VmKRwmZfTEiEFqxmyULuoq5NBmyFPjFUV60kVGtHPMOQvJ1WhF1FTCsziPrW3heQbIFmp8+hXJX1kedIZbsjFPN5Mq5w8H2Ls"
    "TjSURd9m9ksNVSbzxXNMlpJsiOWdbtbLZlyJuhYbrAGWlB2RqI06iMYS9l1QZCgQa6g+4waoC7atxmiChmBKbQ5IzcgYNEVLtEJz"
    "8DPUFu3QGm3QEZ3QHh3QFd3QGV3QE73QHT3QF/3QG30wEIPQH/xFGoKhiMVgxGEEhmE4EjAS8TmG4slRGI1EJGEsxiEZYzAeE+Ao"
    "MeQgJ2MKJmISpmMGpmIaZmMOZoLjkBtzzRcALsyDBylIxQJ4kYb5WITFSMdCLMUyZJjngBVYiUwsx2qswSpkYT02YC3WYSP88CHb"
    "PB9sQQ42YRvysBW52IGdyMd27MFe7MJuHMBB7MN+HMFRHMJhHMNxFIBXQadMQYtOkCdxFudwGmdwEZdwHhdwBVcRxGVcxw0U4Rpu"
    "4w5u4hbu4wHu4h4e4wke4hFCxRY9C7OomPopXuAlSvAcr/EGpXiFsjSLysi3eIeP+IT3+ICv+IbP+IKf+IXv+IG/+Iff+GN++TbZ"
    "7XZFKSoymg8gTglJcgT9QY8KU1WYq5ArXf8Bb0aqfw=="
)


def character_map() -> normalizers.Normalizer:
    """A normaliser of the kind that T5 and XLM-R have, with a few rules."""
    return normalizers.Precompiled(zlib.decompress(base64.b64decode(_CHARACTER_MAP)))


def of_model(model: models.Model, pre_tokenizer: Any = None, normalizer: Any = None) -> Tokenizer:
    """A tokenizer of a model that has <bos>, <eos> and <unk>."""
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens([BOS, EOS, UNK])
    return _with_bos(tokenizer)


def counted_words(pre_tokenizer: Any, normalizer: Any) -> Counter[str]:
    """How often each pre-token is in the corpus."""
    words: Counter[str] = Counter()
    for line in CORPUS:
        text = line if normalizer is None else normalizer.normalize_str(line)
        words.update(
            [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer else [text]
        )
    return words


def unigram(
    pre_tokenizer: Any, normalizer: Any = None, byte_pieces: bool = False, vocab_size: int = 300
) -> Tokenizer:
    """Unigram, as T5 and XLM-R have it, with byte pieces if asked for.

    Its pieces are the longest and most frequent of the corpus, by their counts alone: the library's own trainer gives
    other ones in every process.
    """
    special = [BOS, EOS, UNK, *(f"<0x{byte:02X}>" for byte in range(256) if byte_pieces)]
    counts: Counter[str] = Counter()
    for word, count in counted_words(pre_tokenizer, normalizer).items():
        for start in range(len(word)):
            for stop in range(start + 1, min(start + 8, len(word)) + 1):
                counts[word[start:stop]] += count
    if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel):
        counts.update(pre_tokenizers.ByteLevel.alphabet())
    ranked = sorted(counts, key=lambda piece: (len(piece) > 1, -counts[piece] * len(piece), piece))
    total = counts.total()
    scores = [(piece, math.log(counts[piece] / total)) for piece in ranked[:vocab_size]]
    model = models.Unigram([*((piece, 0.0) for piece in special), *scores], 2, byte_fallback=byte_pieces)
    return of_model(model, pre_tokenizer, normalizer)


def word_piece(pre_tokenizer: Any, normalizer: Any = None, vocab_size: int = 450) -> Tokenizer:
    """WordPiece, as BERT has it."""
    vocab, _ = merged(counted_words(pre_tokenizer, normalizer), vocab_size, continuing="##")
    return of_model(models.WordPiece(vocab, unk_token=UNK), pre_tokenizer, normalizer)


def marked_bpe(
    pre_tokenizer: Any,
    normalizer: Any = None,
    continuing: str = "",
    ending: str = "",
    initial_alphabet: Iterable[str] = (),
    vocab_size: int = 400,
) -> Tokenizer:
    """BPE with a mark before tokens that continue a word, behind tokens that end one, or with none."""
    words = counted_words(pre_tokenizer, normalizer)
    vocab, merges = merged(words, vocab_size, continuing, ending, initial_alphabet)
    marks = {"continuing_subword_prefix": continuing, "end_of_word_suffix": ending}
    marks = {name: mark for name, mark in marks.items() if mark}
    model = models.BPE(vocab=vocab, merges=merges, unk_token=UNK, **marks)
    return of_model(model, pre_tokenizer, normalizer)


def merged(
    words: Counter[str],
    vocab_size: int,
    continuing: str = "",
    ending: str = "",
    initial_alphabet: Iterable[str] = (),
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of BPE; of pairs that are equally frequent the last one in the order of strings is merged.

    The library's own trainer takes any of them where it has marks, and so another one in every process.
    """
    cut = {
        word: [
            continuing * (i > 0) + character + ending * (i == len(word) - 1)
            for i, character in enumerate(word)
        ]
        for word in words
    }
    alphabet = {*initial_alphabet, *(symbol for symbols in cut.values() for symbol in symbols)}
    vocab = dict.fromkeys([BOS, EOS, UNK, *sorted(alphabet)])
    merges = []
    while len(vocab) < vocab_size:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in cut.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            break
        first, second = best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        joined = first + second.removeprefix(continuing)
        vocab.setdefault(joined)
        for symbols in cut.values():
            at = 0
            while at < len(symbols) - 1:
                if (symbols[at], symbols[at + 1]) == best:
                    symbols[at : at + 2] = [joined]
                at += 1
    return {token: index for index, token in enumerate(vocab)}, merges


def words(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    """A vocabulary of whole words."""
    found = counted_words(pre_tokenizer, normalizer)
    vocab = {word: index for index, word in enumerate([BOS, EOS, UNK, *sorted(found)])}
    return of_model(models.WordLevel(vocab, unk_token=UNK), pre_tokenizer, normalizer)


def clip() -> Tokenizer:
    """As CLIP has it: lower case, white space made one space and dropped, `</w>` behind words in the byte alphabet."""
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    return marked_bpe(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        ),
        ending="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=700,
    )


@cache
def families() -> dict[str, Tokenizer]:
    """One tokenizer of each kind that is supported, by name."""
    return exact_families() | lossy_families()


@cache
def exact_families() -> dict[str, Tokenizer]:
    """Those whose tokens have the bytes of every text, but for what their names say."""
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
        "byte-level, unigram": unigram(pre_tokenizers.ByteLevel(add_prefix_space=False), vocab_size=400),
        "characters": character_level(),
        "byte-fallback": sentencepiece_bpe(),
        "byte-fallback, unknown characters": sentencepiece_bpe(known=range(0x20, 0xE3)),
        "byte-fallback, added tokens": with_added(sentencepiece_bpe()),
        "byte-fallback, prepend": sentencepiece_bpe(prefix="prepend"),
        "byte-fallback, metaspace first": sentencepiece_bpe(prefix="first"),
        "byte-fallback, metaspace always": sentencepiece_bpe(prefix="always", vocab_size=450),
        "byte-fallback, unigram": unigram(pre_tokenizers.Metaspace(), byte_pieces=True),
    }


@cache
def lossy_families() -> dict[str, Tokenizer]:
    """Those that drop white space, rewrite the text, or do not know every character."""
    bert = pre_tokenizers.BertPreTokenizer()
    one_space = normalizers.Replace(Regex(" {2,}"), "▁")
    return {
        "unigram": unigram(pre_tokenizers.Metaspace()),
        "unigram, character map": unigram(
            pre_tokenizers.Metaspace(),
            normalizers.Sequence([character_map(), normalizers.Strip(left=False), one_space]),
        ),
        "unigram, NFKC": unigram(
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
            normalizers.Sequence([normalizers.NFKC(), normalizers.StripAccents()]),
        ),
        "unigram, first": unigram(
            pre_tokenizers.Sequence(
                [pre_tokenizers.UnicodeScripts(), pre_tokenizers.Metaspace(prepend_scheme="first")]
            )
        ),
        "unigram, another space": unigram(pre_tokenizers.Metaspace(replacement="_"), normalizers.NFD()),
        "unigram, added tokens": with_added(unigram(pre_tokenizers.Metaspace(), character_map())),
        "sentencepiece without bytes": marked_bpe(pre_tokenizers.Metaspace(prepend_scheme="never")),
        "wordpiece, uncased": word_piece(bert, normalizers.BertNormalizer()),
        "wordpiece, cased": word_piece(
            bert, normalizers.BertNormalizer(lowercase=False, strip_accents=False)
        ),
        "wordpiece, white space": word_piece(pre_tokenizers.WhitespaceSplit()),
        "wordpiece, metaspace": word_piece(pre_tokenizers.Metaspace()),
        "wordpiece, bytes": word_piece(
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.WhitespaceSplit(),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        ),
        "wordpiece, added tokens": with_added(word_piece(bert, normalizers.BertNormalizer())),
        "words": words(pre_tokenizers.Whitespace()),
        "words, digits": words(
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Whitespace(),
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.Punctuation(),
                ]
            ),
            normalizers.Lowercase(),
        ),
        "words, bytes": words(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "word ends": clip(),
        "word ends, characters": marked_bpe(bert, normalizers.BertNormalizer(), ending="</w>"),
        "word starts": marked_bpe(pre_tokenizers.Whitespace(), continuing="##"),
        "no marks": marked_bpe(pre_tokenizers.Whitespace(), normalizers.NFC()),
        "plain": marked_bpe(None, vocab_size=150),
        "pieces with a space": marked_bpe(
            pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel()]),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
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
