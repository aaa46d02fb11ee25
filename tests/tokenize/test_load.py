"""Wherever a tokenizer comes from, it gives the ids of the original, and tells the roles of its special tokens."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from support.texts import text
from support.tokenizer_files import (
    byte_level_gguf,
    description,
    listed,
    merge_scores,
    ranks_of,
    sentencepiece_model,
    tekken,
    write_gguf,
)
from support.tokenizers import CORPUS, byte_level_bpe, sentencepiece_bpe, unigram, with_added, word_piece
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from benchmarks.assets import gguf_path, tokenizer_path
from gold.errors import VocabularyError
from gold.tokenize.convert.gguf import read_metadata
from gold.tokenize.convert.tiktoken import oniguruma
from gold.tokenize.load import open_source
from gold.tokenize.roles import Roles
from gold.tokenize.vocabulary import Vocabulary

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s"
)
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# Beside what the property tests make: long runs, and words over and over, as merges meet them.
TEXTS = (
    *CORPUS,
    *("a" + " " * n + "b" for n in (2, 15, 16, 31, 32, 33, 64, 99)),
    *("\n" * n + "x" + "\t" * n for n in (2, 7, 31, 33)),
    "a" * 50 + "ab" * 20 + "-" * 33 + "=" * 17,
    "1234567 12 3.14159 ٣٤٥ Ⅷ ½ ²",
    "I'LL don't 'ſ it'S l'été",
    "<s></s><unk><0x0A> ▁▁ ▁ [INST] <|im_end|> <|endoftext|> Ġ </w> ##ing",
    "日本語のテキスト 한국어 हिन्दी עברית ﬁ Å",
    "e\u0301 q\u0307\u0323 か\u3099 \x00\x1b\u200b\u2028\ufeff\U00050000",
    "path/to//file?x=1&y=2 __init__ camelCaseHTTPServer </div>\r\n  \r\n",
)


def ids(tokenizer: Tokenizer, given: str) -> list[int]:
    """The ids of a text; what looks like a special token is text."""
    before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    found: list[int] = tokenizer.encode(given, add_special_tokens=False).ids
    tokenizer.encode_special_tokens = before
    return found


# Small tokenizers, written to each format and read back

Pair = tuple[Tokenizer, Tokenizer]


def gguf_pairs(folder: Path) -> Iterator[tuple[str, Pair]]:
    """By name: a tokenizer, and what is read of the GGUF file that describes it."""
    qwen = byte_level_bpe(pattern=LLAMA3.replace("{1,3}", ""), normalizer=normalizers.NFC())
    added = byte_level_bpe()
    added.add_tokens(["<think>", "the dog"])
    added.add_special_tokens(["<|turn|>"])
    for name, pre, tokenizer in (
        ("gpt-2", "gpt-2", byte_level_bpe()),
        ("smollm", "smollm", byte_level_bpe(digits=True)),
        ("llama-bpe", "llama-bpe", byte_level_bpe(pattern=LLAMA3)),
        ("qwen2", "qwen2", qwen),
        ("added", "gpt-2", added),
    ):
        path = byte_level_gguf(folder / f"{name}.gguf", description(tokenizer), pre)
        yield name, (tokenizer, open_source(path).tokenizer)
    for prefix in (None, "prepend"):
        tokenizer = sentencepiece_bpe(prefix=prefix)
        spec = description(tokenizer)
        path = write_gguf(
            folder / f"llama {prefix}.gguf",
            "llama",
            *listed(spec),
            scores=merge_scores(spec),
            add_space_prefix=prefix is not None,
        )
        yield f"llama, {prefix}", (tokenizer, open_source(path).tokenizer)
    pieces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer = unigram(pre_tokenizers.Metaspace(prepend_scheme="never"), normalizers.Sequence(pieces))
    path = write_gguf(
        folder / "t5.gguf",
        "t5",
        *unigram_lists(tokenizer),
        scores=unigram_scores(tokenizer),
        add_space_prefix=True,
    )
    yield "t5", (float32(tokenizer), open_source(path).tokenizer)
    tokenizer = word_piece(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())
    tokens, kinds = listed(description(tokenizer))
    marked = [
        t if kind != 1 else t.removeprefix("##") if t.startswith("##") else f"▁{t}"
        for t, kind in zip(tokens, kinds, strict=True)
    ]
    ids_of_bert = {"unknown_token_id": 2, "bos_token_id": 0, "seperator_token_id": 1}
    path = write_gguf(folder / "bert.gguf", "bert", marked, kinds, **ids_of_bert)
    yield "bert", (tokenizer, open_source(path).tokenizer)


def float32(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with its scores as both formats keep them."""
    spec = description(tokenizer)
    spec["model"]["vocab"] = [[piece, float(np.float32(score))] for piece, score in spec["model"]["vocab"]]
    return Tokenizer.from_str(json.dumps(spec))


def unigram_lists(tokenizer: Tokenizer) -> tuple[list[str], list[int]]:
    tokens, kinds = listed(description(tokenizer))
    return tokens, [2 if token == "<unk>" else kind for token, kind in zip(tokens, kinds, strict=True)]


def unigram_scores(tokenizer: Tokenizer) -> list[float]:
    return [score for _, score in description(tokenizer)["model"]["vocab"]]


def model_pairs(folder: Path) -> Iterator[tuple[str, Pair]]:
    """By name: a tokenizer, and what is read of the SentencePiece model that describes it."""
    for prefix in (None, "prepend"):
        tokenizer = sentencepiece_bpe(prefix=prefix)
        spec = description(tokenizer)
        tokens, kinds = listed(spec)
        path = folder / f"{prefix}.model"
        switches = {"add_dummy_prefix": int(prefix is not None), "remove_extra_whitespaces": 0}
        path.write_bytes(sentencepiece_model(tokens, merge_scores(spec), kinds, False, **switches))
        yield f"BPE model, {prefix}", (tokenizer, open_source(path).tokenizer)
    pieces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer = unigram(pre_tokenizers.Metaspace(prepend_scheme="never"), normalizers.Sequence(pieces))
    path = folder / "unigram.model"
    lists = unigram_lists(tokenizer)
    path.write_bytes(
        sentencepiece_model(lists[0], unigram_scores(tokenizer), lists[1], True, remove_extra_whitespaces=0)
    )
    yield "unigram model", (float32(tokenizer), open_source(path).tokenizer)


def older_pairs(folder: Path) -> Iterator[tuple[str, Pair]]:
    """By name: a tokenizer, and what is read of its folder with older files."""
    for name, tokenizer, config in (
        ("GPT2Tokenizer", byte_level_bpe(), {"eos_token": "<eos>"}),
        ("", byte_level_bpe(), None),
        (
            "Qwen2Tokenizer",
            byte_level_bpe(pattern=LLAMA3.replace("{1,3}", ""), normalizer=normalizers.NFC()),
            {"added_tokens_decoder": {"1": {"content": "<eos>", "special": True}}},
        ),
        (
            "BertTokenizer",
            word_piece(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(lowercase=False)),
            {"unk_token": "<unk>", "do_lower_case": False},
        ),
    ):
        sub = folder / f"older {name}"
        sub.mkdir()
        if name == "BertTokenizer":
            tokens, _ = listed(description(tokenizer))
            (sub / "vocab.txt").write_text("\n".join(tokens) + "\n", "utf-8")
        else:
            tokenizer.model.save(str(sub))
        if config is not None:
            (sub / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **config}))
        yield f"folder of {name or 'no class'}", (tokenizer, open_source(sub).tokenizer)


@cache
def pairs() -> dict[str, Pair]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {**dict(gguf_pairs(folder)), **dict(model_pairs(folder)), **dict(older_pairs(folder))}


def check_ids(given: str) -> None:
    for name, (original, read) in pairs().items():
        if name in ("t5", "unigram model") and any(token in given for token in ("<bos>", "<eos>", "<unk>")):
            # The original takes a text that looks like one of them for the token itself.
            assert not {0, 1} & set(ids(read, given)), name
        else:
            assert ids(read, given) == ids(original, given), name


@given(text)
def test_a_tokenizer_written_and_read_back_gives_the_same_ids(given: str) -> None:
    check_ids(given)


@pytest.mark.parametrize("given", TEXTS)
def test_long_runs_and_known_words_give_the_same_ids(given: str) -> None:
    check_ids(given)


def test_every_id_is_kept() -> None:
    for name, (original, read) in pairs().items():
        assert read.get_vocab() == original.get_vocab(), name
        own = {t.content: t.special for t in original.get_added_tokens_decoder().values()}
        found = {t.content: t.special for t in read.get_added_tokens_decoder().values()}
        if "folder" not in name:
            assert found == own, name


# Ranks


def encoding(pattern: str, vocab_size: int = 420) -> tiktoken.Encoding:
    ranks = ranks_of(description(byte_level_bpe(vocab_size=vocab_size)))
    special = {"<|endoftext|>": len(ranks), "<|endofprompt|>": len(ranks) + 3}
    return tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


ENCODINGS = {
    pattern: (made := encoding(pattern), open_source(made).tokenizer) for pattern in (LLAMA3, CL100K, O200K)
}


@given(st.sampled_from(list(ENCODINGS)), text)
def test_a_tiktoken_encoding_gives_the_same_ids(pattern: str, given: str) -> None:
    original, read = ENCODINGS[pattern]
    assert ids(read, given) == original.encode_ordinary(given)


@pytest.mark.parametrize("pattern", ENCODINGS)
def test_a_tiktoken_encoding_gives_the_same_ids_of_long_runs(pattern: str) -> None:
    original, read = ENCODINGS[pattern]
    for case in TEXTS:
        assert ids(read, case) == original.encode_ordinary(case)


def test_the_roles_of_an_encoding() -> None:
    found = open_source(encoding(O200K))
    assert found.name == "tiktoken toy"
    assert found.stop_ids == (found.tokenizer.token_to_id("<|endoftext|>"),)
    vocabulary = Vocabulary.load(encoding(O200K))
    assert vocabulary.token_bytes(vocabulary.size - 2) == b""  # a hole between the special tokens
    assert vocabulary.encode("<|endoftext|>").repaired_bytes == 0
    assert not vocabulary.is_special[vocabulary.encode("<|endoftext|>").ids].any()


def test_patterns_are_said_in_the_dialect_of_tokenizers() -> None:
    assert oniguruma(r"a{1,3}+|b$|[^$]|\$|\p{L}++|^c") == r"a{1,3}|b\z|[^$]|\$|\p{L}++|\Ac"
    for pattern, part in ((r"a{1,3}+b", "{1,3}+"), (r"(?m:a$)", "(?m:"), (r"(?s).", "(?s)")):
        with pytest.raises(VocabularyError, match=re.escape(f"its pattern has '{part}'")):
            oniguruma(pattern)


def test_an_encoding_that_is_read_differently_is_refused() -> None:
    made = encoding(LLAMA3)
    other = SimpleNamespace(
        name="other",
        _pat_str=r"\s+|\S+",
        _mergeable_ranks=made._mergeable_ranks,
        _special_tokens={},
        encode_ordinary=made.encode_ordinary,
    )
    with pytest.raises(VocabularyError, match=r"^tiktoken other: .* differently"):
        open_source(other)


def test_a_special_token_written_like_another_token_is_refused() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256}
    made = tiktoken.Encoding("x", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"ab": 300})
    with pytest.raises(VocabularyError, match=r"special token 'ab' with id 300 .* id 256"):
        open_source(made)


def test_an_encoding_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding(O200K))
    found = open_source("tiktoken:o200k_base")
    assert (found.name, found.stop_ids) == ("tiktoken:o200k_base", open_source(encoding(O200K)).stop_ids)
    with pytest.raises(VocabularyError, match=r"'o200k'.*o200k_base"):
        open_source("tiktoken:o200k")

    def offline(name: str) -> Any:
        raise ConnectionError("Name or service not known\nat length")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(VocabularyError, match=r"o200k_base: Name or service not known$"):
        open_source("tiktoken:o200k_base")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(VocabularyError, match="pip install tiktoken"):
        open_source("tiktoken:o200k_base")


def tekken_files(folder: Path) -> tuple[Path, tiktoken.Encoding]:
    made = encoding(O200K)
    path = folder / "tekken.json"
    content = tekken(made._mergeable_ranks, O200K, ["<unk>", "<s>", "</s>", "[INST]", "<pad>"], 20)
    path.write_text(json.dumps(content))
    return path, made


def test_tekken_json(tmp_path: Path) -> None:
    path, original = tekken_files(tmp_path)
    for source in (path, tmp_path):
        found = open_source(source)
        assert (found.bos_id, found.stop_ids, found.pad_id) == (1, (2,), 4)
        assert found.tokenizer.token_to_id("<SPECIAL_19>") == 19
        for case in TEXTS:
            assert ids(found.tokenizer, case) == [20 + i for i in original.encode_ordinary(case)]
    renamed = path.rename(tmp_path / "model.json")
    with pytest.raises(VocabularyError, match=r"model\.json"):
        open_source(renamed)


def test_a_tekken_json_that_lists_no_special_tokens_has_those_of_the_first_ones(tmp_path: Path) -> None:
    path, _ = tekken_files(tmp_path)
    content = json.loads(path.read_text())
    del content["special_tokens"]
    path.write_text(json.dumps(content))
    found = open_source(path)
    assert (found.bos_id, found.stop_ids, found.pad_id) == (1, (2,), 11)
    assert found.tokenizer.token_to_id("[TOOL_CONTENT]") == 19
    del content["vocab"][3]["token_bytes"]
    path.write_text(json.dumps(content))
    with pytest.raises(VocabularyError, match=r"tekken\.json: .*'token_bytes'"):
        open_source(path)


def test_objects_of_mistral_common(tmp_path: Path) -> None:
    _, made = tekken_files(tmp_path)
    special = [{"rank": i, "token_str": t} for i, t in enumerate(("<unk>", "<s>", "</s>", "<pad>"))]
    inner = SimpleNamespace(_model=made, _all_special_tokens=special)
    for source in (inner, SimpleNamespace(instruct_tokenizer=SimpleNamespace(tokenizer=inner))):
        found = open_source(source)
        assert (found.bos_id, found.stop_ids, found.pad_id) == (1, (2,), 3)
        assert ids(found.tokenizer, TEXTS[0]) == [4 + i for i in made.encode_ordinary(TEXTS[0])]
    tokenizer = sentencepiece_bpe()
    spec = description(tokenizer)
    tokens, kinds = listed(spec)
    proto = sentencepiece_model(
        tokens, merge_scores(spec), kinds, False, add_dummy_prefix=0, remove_extra_whitespaces=0
    )
    inner = SimpleNamespace(_model=SimpleNamespace(serialized_model_proto=lambda: proto))
    found = open_source(
        SimpleNamespace(tokenizer=SimpleNamespace(instruct_tokenizer=SimpleNamespace(tokenizer=inner)))
    )
    assert (found.bos_id, found.stop_ids) == (0, (1,))
    assert ids(found.tokenizer, TEXTS[0]) == ids(tokenizer, TEXTS[0])


# What GGUF files say of roles, and what of them cannot be used


@cache
def toy() -> dict[str, Any]:
    return description(with_added(byte_level_bpe()))


def test_the_roles_of_a_gguf_file(tmp_path: Path) -> None:
    turn = next(t["id"] for t in toy()["added_tokens"] if t["content"] == "<|turn|>")
    template = "{% for m in messages %}{{ m.content + '<|turn|>' }}{% endfor %}"
    path = byte_level_gguf(
        tmp_path / "m.gguf",
        toy(),
        "gpt-2",
        bos_token_id=0,
        eos_token_id=1,
        padding_token_id=0xFFFFFFFF,
        add_bos_token=True,
        chat_template=template,
    )
    found = open_source(path)
    assert (found.bos_id, found.stop_ids, found.pad_id) == (0, (1, turn), None)
    assert found.chat_template == template
    assert found.tokenizer.encode("a").ids[0] == 0
    assert open_source(tmp_path).stop_ids == found.stop_ids
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    assert open_source(tmp_path).stop_ids == (1, 0, turn)
    vocabulary = Vocabulary.load(tmp_path)
    assert vocabulary.encode("a<think>").ids[-1] == vocabulary.tokenizer.token_to_id("<think>")
    assert not vocabulary.is_special[vocabulary.encode("<|turn|><bos>").ids].any()


def test_unused_tokens_of_a_gguf_file_have_no_string(tmp_path: Path) -> None:
    spec = json.loads(json.dumps(toy()))
    spec["added_tokens"].append(
        {**spec["added_tokens"][0], "id": len(listed(spec)[0]) + 5, "content": "<late>"}
    )
    vocabulary = Vocabulary.load(byte_level_gguf(tmp_path / "m.gguf", spec, "gpt-2"))
    assert vocabulary.is_special[vocabulary.size - 6 : vocabulary.size - 1].all()
    assert vocabulary.encode("[PAD410]").repaired_bytes == 0


def test_a_gguf_file_with_the_whole_tokenizer_in_it(tmp_path: Path) -> None:
    tokenizer = byte_level_bpe(pattern=r"\S+|\s+")
    path = tmp_path / "m.gguf"
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_string("tokenizer.huggingface.json", tokenizer.to_str())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert open_source(path).tokenizer.to_str() == tokenizer.to_str()


def test_gemma_4_has_merges_in_place_of_scores(tmp_path: Path) -> None:
    original = sentencepiece_bpe()
    spec = description(original)
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    path = write_gguf(
        tmp_path / "m.gguf", "gemma4", *listed(spec), merges=merges, unknown_token_id=2, bos_token_id=0
    )
    found = open_source(path)
    assert found.tokenizer.encode("a").ids[0] == 0
    for line in (line for case in TEXTS for line in case.split("\n")):
        assert ids(found.tokenizer, line) == ids(original, line), line


def test_the_parts_of_a_split_gguf_file_are_one(tmp_path: Path) -> None:
    byte_level_gguf(tmp_path / "m-00001-of-00002.gguf", toy(), "gpt-2")
    write_gguf(tmp_path / "m-00002-of-00002.gguf", "none", ["a"], [1])
    assert open_source(tmp_path).tokenizer.get_vocab_size() == len(listed(toy())[0])
    byte_level_gguf(tmp_path / "other.gguf", toy(), "gpt-2")
    with pytest.raises(VocabularyError, match=r"m-00001-of-00002.gguf, other.gguf"):
        open_source(tmp_path)


def without(**keys: Any) -> Callable[[Path], Any]:
    spec = listed(toy())
    return lambda path: write_gguf(path, keys.pop("model", "gpt2"), *spec, **keys)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (without(merges=["a b"]), r"pre-tokenizer \(tokenizer.ggml.pre\) is none, as files from before May 2024"),
        (without(pre="new", merges=["a b"]), "is 'new', which is not known here; give the model's tokenizer.json"),
        (without(pre="gpt-2"), "it lists no merges"),
        (without(pre="gpt-2", merges=["ab"]), "no pair: 'ab'"),
        (without(pre="gpt-2", merges=["€ ¤"]), "its merges do not fit its tokens"),
        (without(model="rwkv"), "'rwkv'"),
        (without(model="llama", scores=[0.5]), r"its tokenizer.ggml.scores are not \d+ numbers"),
        (without(model="gemma4"), "neither scores nor merges"),
        (lambda p: write_gguf(p, "gpt2", [], []), "it holds no tokenizer"),
        (lambda p: write_gguf(p, "gpt2", ["a", "a"], [1, 1], pre="gpt-2", merges=["a a"]), "0 and 1 are the same"),
        (lambda p: p.write_bytes(b""), "is a broken GGUF file"),
        (lambda p: p.write_bytes(b"ELF" + bytes(90)), "is no GGUF file"),
        (lambda p: p.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(90)), "of another byte order"),
        (lambda p: p.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(90)), "GGUF file of version 1"),
        (lambda p: cut(p, 30), "is a broken GGUF file"),
        (lambda p: cut(p, 5000), "is a broken GGUF file"),
    ],
)  # fmt: skip
def test_a_gguf_file_that_cannot_be_used(tmp_path: Path, write: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    for source in (path, tmp_path):
        with pytest.raises(VocabularyError, match=message) as caught:
            open_source(source)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def cut(path: Path, size: int) -> None:
    data = byte_level_gguf(path, toy(), "gpt-2").read_bytes()
    path.write_bytes(data[:size])


@given(st.binary(max_size=200), st.integers(0, 2000), st.integers(0, 200))
def test_a_damaged_gguf_file_is_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    data = good_gguf(tmp_path_factory.getbasetemp())
    path.write_bytes(data[:at] + noise + data[at + length :])
    try:
        open_source(path)
    except VocabularyError as error:
        assert "\n" not in str(error)  # noqa: PT017


@cache
def good_gguf(folder: Path) -> bytes:
    return byte_level_gguf(folder / "good.gguf", toy(), "gpt-2").read_bytes()


# Files and folders that are none


def small(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda f: f / "none" / "of" / "them", "no such file or folder"),
    "missing file": (lambda f: f / "m.gguf", "no such file or folder"),
    "empty folder": (lambda f: f, "no tokenizer.json in .*, nor tekken.json, a GGUF file, tokenizer.model"),
    "empty file": (lambda f: small(f, t__json="") / "t.json", "t.json is no JSON"),
    "binary": (
        lambda f: small(f, tokenizer__json=bytes(range(256)) * 9),
        r"^[^:]*tokenizer\.json is not UTF-8 text \(byte 128\)$",
    ),
    "no JSON": (lambda f: small(f, tokenizer__json='{"a": '), "tokenizer.json is no JSON"),
    "a list": (lambda f: small(f, tokenizer__json="[1, 2]"), 'is JSON, but has no "model"'),
    "another JSON": (lambda f: small(f, tokenizer__json='{"a": 1}'), 'is JSON, but has no "model"'),
    "a future model": (lambda f: small(f, tokenizer__json='{"model": {"type": "New"}}'), "that tokenizers can read"),
    "broken settings": (lambda f: small(f, tokenizer_config__json="{"), "tokenizer_config.json is no JSON"),
    "settings of another kind": (lambda f: small(f, generation_config__json="[]"), "holds no JSON object"),
    "broken pieces": (lambda f: small(f, tokenizer__model=b"\x0a\xff\x01"), "model is no SentencePiece model"),
    "ranks": (lambda f: small(f, tokenizer__model=b"IQ== 0\nIg== 1\n"), "model is no SentencePiece model"),
    "words as pieces": (lambda f: small(f, t__model=word_model()) / "t.model", "of a kind that is not read here"),
    "T5's pieces": (
        lambda f: small(f, tokenizer__model=b"", tokenizer_config__json='{"tokenizer_class": "T5TokenizerFast"}'),
        "tokenizer.model .*T5Tokenizer",
    ),
    "another class": (
        lambda f: small(f, vocab__json="{}", merges__txt="", tokenizer_config__json='{"tokenizer_class": "X"}'),
        "vocab.json .*X",
    ),
    "marks at the ends": (lambda f: small(f, vocab__json='{"a</w>": 0}', merges__txt=""), "marks at the ends of words"),
    "no ids": (lambda f: small(f, vocab__json='{"a": "b"}', merges__txt=""), "vocab.json is no vocabulary"),
    "no pair": (lambda f: small(f, vocab__json='{"a": 0}', merges__txt="#version\na b c\n"), "merges.txt:2: exp"),
    "foreign pair": (lambda f: small(f, vocab__json='{"a": 0}', merges__txt="x y"), "merges do not fit its tokens"),
    "no unknown": (lambda f: small(f, vocab__txt="a\nb\n"), r"vocab.txt has no unknown token '\[UNK\]'"),
}  # fmt: skip


def word_model() -> bytes:
    data = bytearray(sentencepiece_model(["a"], [0.0], [1], unigram=True))
    data[data.index(b"\x18\x01\xc8")] += 0  # the field that says unigram
    return bytes(data).replace(b"\x18\x01\xc8", b"\x18\x03\xc8")


@pytest.mark.parametrize("case", BROKEN)
def test_a_source_that_is_none_is_an_error_of_one_line(tmp_path: Path, case: str) -> None:
    make, message = BROKEN[case]
    if "settings" in case:
        byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(VocabularyError, match=message) as caught:
        open_source(make(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_an_object_that_is_no_tokenizer_is_refused() -> None:
    slow = type("SlowTokenizer", (), {"vocab_file": "x.model"})()
    with pytest.raises(VocabularyError, match="SlowTokenizer"):
        open_source(slow)


def test_settings_of_a_folder_that_contradict_its_files(tmp_path: Path) -> None:
    byte_level_bpe().model.save(str(tmp_path))
    (tmp_path / "added_tokens.json").write_text('{"<new>": 400}')
    found = open_source(tmp_path)
    assert found.tokenizer.token_to_id("<new>") == 400
    (tmp_path / "added_tokens.json").write_text('{"<new>": 900}')
    with pytest.raises(VocabularyError, match=r"'<new>'.* 900 .* 400 "):
        open_source(tmp_path)


def test_a_folder_of_gpt_2_ends_with_its_only_special_token(tmp_path: Path) -> None:
    vocab = {
        token: i for i, token in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n".replace("h e\n", ""))
    found = open_source(tmp_path)
    assert (found.bos_id, found.stop_ids) == (0, (0,))
    assert found.tokenizer.get_added_tokens_decoder()[0].special


# Roles that a user names


def test_named_roles_take_the_place_of_those_found(tmp_path: Path) -> None:
    tokenizer = with_added(byte_level_bpe())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    turn = tokenizer.token_to_id("<|turn|>")
    assert open_source(tmp_path, stop_ids=[0]).stop_ids == (1, 0)
    found = open_source(tmp_path, stop_ids=[0], roles=Roles(stop=("<|turn|>",), bos="<eos>", pad="<bos>"))
    assert (found.stop_ids, found.bos_id, found.pad_id) == ((turn,), 1, 0)
    vocabulary = Vocabulary.load(tmp_path, stop_ids=[0], roles=Roles(stop=("<|turn|>", "<think>")))
    assert vocabulary.stop_ids == (turn, tokenizer.token_to_id("<think>"))
    assert (vocabulary.bos_id, vocabulary.is_special[list(vocabulary.stop_ids)].all()) == (0, True)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (
            Roles(stop=["<|turnn|>"]),
            r"^roles.stop: .* '<\|turnn\|>'; did you mean '<\|turn\|>'",
        ),
        (
            Roles(bos="[CLS]"),
            r"^roles.bos: .* '\[CLS\]'",
        ),
        (Roles(pad=""), "^roles.pad: .* has no token ''"),
        (Roles(stop=["a"]), "stop id .* is 'a', which is no added token"),
    ],
)
def test_a_role_for_a_token_that_is_not_there(roles: Roles, message: str) -> None:
    with pytest.raises(VocabularyError, match=message):
        Vocabulary.load(with_added(byte_level_bpe()), roles=roles)


# Fresh interpreters


def test_loading_tokenizer_files_loads_no_model_library(tmp_path: Path) -> None:
    tekken_files(tmp_path)
    byte_level_gguf(tmp_path / "m.gguf", toy(), "gpt-2", chat_template="{{ messages }}")
    code = (
        "import sys\nfrom gold import Vocabulary\n"
        f"for name in ('m.gguf', 'tekken.json'): Vocabulary.load({str(tmp_path)!r} + '/' + name)\n"
        "heavy = {'torch', 'transformers', 'gguf', 'tiktoken', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Real ones

GGUF_TWINS = {"qwen3": "qwen2", "llama3_1": "llama-bpe", "deepseek_v3": "deepseek-v3", "gpt4o": "gpt-4o"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.assets(name)) for name in GGUF_TWINS])
def test_a_real_byte_level_tokenizer_written_as_gguf_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    folder = tokenizer_path(name)
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    path = byte_level_gguf(tmp_path / "m.gguf", spec, GGUF_TWINS[name])
    original, read = Tokenizer.from_file(str(folder / "tokenizer.json")), open_source(path).tokenizer
    for case in TEXTS:
        assert ids(read, case) == ids(original, case), case


@pytest.mark.assets("llama2")
def test_llama_2_written_as_gguf_and_as_sentencepiece_gives_the_same_ids(tmp_path: Path) -> None:
    spec = json.loads((tokenizer_path("llama2") / "tokenizer.json").read_text("utf-8"))
    tokens, kinds = listed(spec)
    scores = [-1e9 if set(token) == {"▁"} else -float(i) for i, token in enumerate(tokens)]
    path = write_gguf(tmp_path / "m.gguf", "llama", tokens, kinds, scores=scores)
    (tmp_path / "tokenizer.model").write_bytes(
        sentencepiece_model(tokens, scores, kinds, False, add_dummy_prefix=1, remove_extra_whitespaces=0)
    )
    original = Tokenizer.from_file(str(tokenizer_path("llama2") / "tokenizer.json"))
    for source in (path, tmp_path / "tokenizer.model"):
        read = open_source(source).tokenizer
        for case in TEXTS:
            assert ids(read, case) == ids(original, case), case


@pytest.mark.slow
@pytest.mark.assets("gemma3-270m", "gemma3")
def test_gemmas_gguf_file_gives_the_ids_of_its_tokenizer() -> None:
    read = open_source(gguf_path("gemma3-270m"))
    original = Tokenizer.from_file(str(tokenizer_path("gemma3") / "tokenizer.json"))
    assert (read.bos_id, read.stop_ids, read.pad_id) == (2, (1,), 0)
    for case in (*TEXTS, *("x" + " " * n + "y" for n in range(70))):
        assert ids(read.tokenizer, case) == ids(original, case), case


@pytest.mark.assets("smollm2-135m-instruct")
def test_smollm2s_gguf_file_cuts_digits_apart() -> None:
    read = open_source(gguf_path("smollm2-135m-instruct"))
    original = Tokenizer.from_file(str(tokenizer_path("smollm2-135m-instruct") / "tokenizer.json"))
    assert len(ids(read.tokenizer, "12345")) == 5
    assert [read.tokenizer.id_to_token(i) for i in read.stop_ids] == ["<|im_end|>"]
    for case in TEXTS:
        assert ids(read.tokenizer, case) == ids(original, case), case
    assert "tokenizer.ggml.tokens" in read_metadata(gguf_path("smollm2-135m-instruct"))


@pytest.mark.slow
@pytest.mark.assets("gpt4o")
def test_real_ranks_give_the_ids_of_tiktoken_and_of_their_tokenizer_json() -> None:
    spec = json.loads((tokenizer_path("gpt4o") / "tokenizer.json").read_text("utf-8"))
    special = {token["content"]: token["id"] for token in spec["added_tokens"]}
    spec["model"]["vocab"] = {t: i for t, i in spec["model"]["vocab"].items() if t not in special}
    from gold.tokenize.families import byte_alphabet

    alphabet = byte_alphabet()
    ranks = {bytes(alphabet[c] for c in token): i for token, i in spec["model"]["vocab"].items()}
    made = tiktoken.Encoding("o200k", pat_str=O200K, mergeable_ranks=ranks, special_tokens=special)
    original, read = (
        Tokenizer.from_file(str(tokenizer_path("gpt4o") / "tokenizer.json")),
        open_source(made).tokenizer,
    )
    for case in TEXTS:
        assert ids(read, case) == made.encode_ordinary(case) == ids(original, case), case
