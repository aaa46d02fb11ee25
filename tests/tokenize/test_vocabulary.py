"""What holds for every family: the tokens of a text cover its bytes, and nothing is lost in between."""

import json
import pickle
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.texts import data, ids_of, text
from support.tokenizers import (
    BOS_ID,
    EOS,
    EOS_ID,
    UNK,
    byte_level_bpe,
    character_level,
    exact_families,
    families,
    sentencepiece_bpe,
    with_added,
)
from tokenizers import Tokenizer, models, pre_tokenizers

from gold.align.chunks import align_tokens
from gold.errors import VocabularyError
from gold.tokenize.compare import differences
from gold.tokenize.vocabulary import TokenizedText, Vocabulary

VOCABULARIES = {name: Vocabulary.load(tokenizer) for name, tokenizer in families().items()}
any_vocabulary = st.sampled_from(list(VOCABULARIES.values()))
each_vocabulary = pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES.keys())


def check(vocabulary: Vocabulary, tokenized: TokenizedText) -> None:
    """What every tokenized text promises."""
    ends, starts = tokenized.ends.tolist(), tokenized.starts.tolist()
    assert tokenized.ids.dtype == np.int32
    assert tokenized.ends.dtype == np.int64
    assert ends == sorted(ends)
    assert ends[-1:] in ([len(tokenized.data)], [])
    for index, start, end, exact in zip(
        tokenized.ids.tolist(), starts, ends, tokenized.exact.tolist(), strict=True
    ):
        if exact:
            assert vocabulary.token_bytes(index) == tokenized.data[start:end]
    exact_bytes = sum(int(b - a) for a, b, exact in zip(starts, ends, tokenized.exact, strict=True) if exact)
    # Only a token with the space put before the text is neither exact nor counted.
    first = next((end for end in ends if end), 0)
    assert 0 <= len(tokenized.data) - tokenized.repaired_bytes - exact_bytes <= first
    if not vocabulary.dummy_prefix:
        assert tokenized.repaired_bytes == len(tokenized.data) - exact_bytes


@given(any_vocabulary, st.one_of(text, data), st.booleans())
def test_encode_lies_on_the_given_bytes(vocabulary: Vocabulary, given: str | bytes, at_start: bool) -> None:
    tokenized = vocabulary.encode(given, at_start=at_start)
    assert tokenized.data == (given.encode() if isinstance(given, str) else given)
    check(vocabulary, tokenized)


FAITHFUL = [
    name
    for name in exact_families()
    if not {"NFC", "NFKC", "missing", "unknown", "added"} & set(name.replace(",", "").split())
]


@given(st.sampled_from(FAITHFUL), text)
def test_without_rewriting_every_token_is_exact(name: str, given: str) -> None:
    vocabulary = VOCABULARIES[name]
    # Unigram takes the name of a byte piece for the piece, and that of the unknown token for it.
    tokenized = vocabulary.encode(given.replace("▁", "_").replace("<0x", "").replace(UNK, ""))
    assert tokenized.repaired_bytes == 0
    assert np.flatnonzero(~tokenized.exact).tolist() in ([], [0])
    assert tokenized.exact.all() or vocabulary.dummy_prefix


@given(any_vocabulary, text, st.booleans())
def test_text_never_becomes_a_special_token(vocabulary: Vocabulary, given: str, at_start: bool) -> None:
    ids = vocabulary.encode(given, at_start=at_start).ids
    assert set(ids[vocabulary.is_special[ids]].tolist()) <= {vocabulary.unk_id}


@each_vocabulary
@pytest.mark.parametrize("at_start", [True, False])
def test_what_looks_like_a_special_token_is_text(vocabulary: Vocabulary, at_start: bool) -> None:
    added = vocabulary.tokenizer.get_added_tokens_decoder().values()
    for name in [token.content for token in added if token.special]:
        wide = "".join(chr(ord(c) + 0xFEE0) for c in name)  # the same after NFKC
        for written in (
            name,
            f"a{name}b",
            f" {name} ",
            name * 2,
            f"{name}\n{name}",
            name.upper(),
            wide,
            f"\u200b{name}",
        ):
            tokenized = vocabulary.encode(written, at_start=at_start)
            special = tokenized.ids[vocabulary.is_special[tokenized.ids]]
            assert set(special.tolist()) <= {vocabulary.unk_id}
            assert len(tokenized)
            check(vocabulary, tokenized)
            if not len(special) and written == name:
                decoded = b"".join(vocabulary.token_bytes(i) for i in tokenized.ids)
                if tokenized.exact[1:].all():
                    assert decoded.strip() == name.encode()


@given(any_vocabulary, text)
def test_encode_gives_the_tokenizer_s_own_ids(vocabulary: Vocabulary, given: str) -> None:
    own: Tokenizer = vocabulary.tokenizer
    ids = own.encode(given, add_special_tokens=False).ids
    if {vocabulary.unk_id} >= set(np.array(ids)[vocabulary.is_special[ids]].tolist()) and UNK not in given:
        assert vocabulary.encode(given).ids.tolist() == ids


@given(st.data(), any_vocabulary, st.booleans())
def test_decode_concatenates_the_bytes_of_any_ids(
    draw: st.DataObject, vocabulary: Vocabulary, at_start: bool
) -> None:
    ids = draw.draw(ids_of(vocabulary))
    tokenized = vocabulary.decode(ids, at_start=at_start)
    joined = b"".join(vocabulary.token_bytes(i) for i in ids)
    if at_start and vocabulary.dummy_prefix:
        joined = joined.removeprefix(b" ")
    if vocabulary.family.endswith("word ends"):
        joined = joined.removesuffix(b" ")
    assert tokenized.data == joined
    assert tokenized.ids.tolist() == ids
    check(vocabulary, tokenized)


@given(st.data(), any_vocabulary, any_vocabulary)
def test_any_sampled_ids_can_be_read_by_any_other_tokenizer(
    draw: st.DataObject, student: Vocabulary, teacher: Vocabulary
) -> None:
    sampled = student.decode(draw.draw(ids_of(student)))
    read = teacher.encode(sampled.data)
    check(teacher, read)
    alignment = align_tokens(sampled, read)
    shared = {0, len(sampled.data)} | (set(sampled.ends.tolist()) & set(read.ends.tolist()))
    assert {0, *alignment.ends_C.tolist()} == (shared if len(sampled) + len(read) else {0})
    for side, own, (first, last) in ((sampled, alignment.chunk_S, (0, 1)), (read, alignment.chunk_T, (2, 3))):
        bounds = alignment.chunks[:, [first, last]].tolist()
        assert own.tolist() == [c for c, (a, b) in enumerate(bounds) for _ in range(a, b)]
        assert len(own) == len(side)
    swapped = align_tokens(read, sampled)
    assert swapped.chunks[:, [2, 3, 0, 1]].tolist() == alignment.chunks.tolist()


@given(any_vocabulary, st.one_of(text, data))
def test_equal_tokenizers_give_one_chunk_per_token(vocabulary: Vocabulary, given: str | bytes) -> None:
    tokenized = vocabulary.encode(given)
    alignment = align_tokens(tokenized, tokenized)
    assert alignment.ends_C.tolist() == sorted(
        set(tokenized.ends.tolist()) - ({0} if tokenized.data else set())
    )
    if (tokenized.ends > tokenized.starts).all():
        assert alignment.one_to_one_C.all()


MARKS = ("##", "</w>", "<0x", "▁", "_")


# What has no token at all is the next one's, and byte pieces overtake an unknown token that stands before them.
FITTING = [name for name in VOCABULARIES if not {"missing", "unknown"} & set(name.split())]


@given(st.sampled_from(FITTING), text)
def test_a_span_rewritten_by_itself_is_the_bytes_of_its_tokens(name: str, given: str) -> None:
    """Where a token lies on a text that the tokenizer changes: no span has another one's content."""
    vocabulary = VOCABULARIES[name]
    for mark in MARKS:
        given = given.replace(mark, "")
    # UnicodeScripts drops some characters that have none.
    given = "".join(c for c in given if unicodedata.category(c) not in ("Cn", "Co"))
    tokenized = vocabulary.encode(given)
    group: list[int] = []
    for i, (start, end) in enumerate(zip(tokenized.starts.tolist(), tokenized.ends.tolist(), strict=True)):
        group.append(tokenized.ids[i])
        if start == end and i < len(tokenized) - 1:
            continue  # its end lies inside of what changed: the next token has the span of both
        own, span = b"".join(map(vocabulary.token_bytes, group)), tokenized.data[start:end]
        if vocabulary.unk_id not in group:
            try:
                assert own.decode().split() == vocabulary._encoder.rewrite(span.decode()).split()
            except UnicodeDecodeError:  # part of a character that stayed the same
                assert own.strip() == span.strip()
        group = []


@given(any_vocabulary, text)
def test_encoding_and_decoding_agree(vocabulary: Vocabulary, given: str) -> None:
    encoded = vocabulary.encode(given, at_start=False)
    # A text of which the vocabulary has no byte at all has no tokens, and none that is not exact.
    if encoded.exact.all() and not encoded.repaired_bytes:
        decoded = vocabulary.decode(encoded.ids, at_start=False)
        assert (decoded.data, decoded.ends.tolist()) == (encoded.data, encoded.ends.tolist())


@given(any_vocabulary, text, text)
def test_stable_ends_stay_ends_whatever_follows(vocabulary: Vocabulary, before: str, after: str) -> None:
    tokenized = vocabulary.encode(before, at_start=False)
    stable = set(tokenized.ends[vocabulary.stable_ends(tokenized)].tolist())
    assert stable <= set(vocabulary.encode(before + after, at_start=False).ends.tolist())


def test_stable_ends_of_digits_by_hand() -> None:
    digits, groups = VOCABULARIES["byte-level, digits"], VOCABULARIES["byte-level, groups of digits"]
    tokenized = digits.encode("a 12 b")
    assert tokenized.ends[digits.stable_ends(tokenized)].tolist() == [3, 4]
    tokenized = groups.encode("a 12345 b")
    stable = {
        e
        for e, is_stable in zip(tokenized.ends.tolist(), groups.stable_ends(tokenized), strict=True)
        if is_stable
    }
    assert stable == {5}


def test_stable_ends_of_words_by_hand() -> None:
    given = "the dog, (12) x! "
    for name, expected in (
        ("wordpiece, cased", {8, 10, 13, 16}),
        # A mark that comes next would be taken off, and the character with it is the token's.
        ("wordpiece, uncased", set()),
        # A space that comes next is the word's.
        ("word ends", set()),
    ):
        vocabulary = VOCABULARIES[name]
        tokenized = vocabulary.encode(given + "a")
        assert set(tokenized.ends[vocabulary.stable_ends(tokenized)].tolist()) == expected
        # The last token has the white space behind it until a next one comes.
        cut_short = vocabulary.encode(given)
        assert not vocabulary.stable_ends(cut_short)[-1]


def test_without_a_pre_tokenizer_no_end_is_stable() -> None:
    vocabulary = VOCABULARIES["byte-fallback"]
    assert not vocabulary.stable_ends(vocabulary.encode("a 12 b. c\n\nd")).any()


def test_an_end_where_an_added_token_could_begin_is_not_stable() -> None:
    plain = Vocabulary.load(byte_level_bpe(digits=True))
    added = byte_level_bpe(digits=True)
    added.add_tokens(["1x>"])
    with_token = Vocabulary.load(added)
    tokenized = plain.encode("b1")
    assert plain.stable_ends(tokenized).tolist()[-1]
    assert not with_token.stable_ends(with_token.encode("b1")).tolist()[-1]


# Unknown characters


def test_an_unknown_token_that_ends_a_sequence_never_stands_for_text() -> None:
    """Some tokenizers have one token for both: what is unknown to them has no token."""
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "the": 1}, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([EOS])
    assert Vocabulary.load(tokenizer).encode("the <eos> dog the").ids.tolist() == [1, 0, 0, 1]
    vocabulary = Vocabulary.load(tokenizer, stop_ids=[0])
    tokenized = vocabulary.encode("the <eos> dog the")
    assert (tokenized.ids.tolist(), tokenized.ends.tolist()) == ([1, 1], [3, 17])
    assert tokenized.repaired_bytes == 14
    assert vocabulary.encode("<eos>").repaired_bytes == 5


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 0}),
        models.WordPiece({"a": 0}),
        models.Unigram([("a", -1.0)], None, byte_fallback=False),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_text_that_a_tokenizer_cannot_read_at_all_is_an_error_of_one_line(model: models.Model) -> None:
    vocabulary = Vocabulary(Tokenizer(model), name="m")
    assert vocabulary.encode("a").exact.all()
    with pytest.raises(VocabularyError, match=r"^m has no token") as caught:
        vocabulary.encode("b")
    assert "\n" not in str(caught.value)


# Roles and special tokens


def test_roles_and_special_tokens_of_a_bare_tokenizer() -> None:
    vocabulary = Vocabulary.load(sentencepiece_bpe(), stop_ids=[EOS_ID])
    assert (vocabulary.bos_id, vocabulary.stop_ids, vocabulary.pad_id, vocabulary.unk_id) == (
        BOS_ID,
        (EOS_ID,),
        None,
        2,
    )
    assert np.flatnonzero(vocabulary.is_special).tolist() == [0, 1, 2]
    assert vocabulary.token_bytes(EOS_ID) == b""
    assert vocabulary.family == "byte-fallback"


def test_an_added_token_with_a_role_is_special_even_if_it_is_not_marked_special() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens(["<end>"])
    stop = tokenizer.token_to_id("<end>")
    assert Vocabulary.load(tokenizer).encode("a<end>").ids[-1] == stop
    vocabulary = Vocabulary.load(tokenizer, stop_ids=[stop])
    assert vocabulary.is_special[stop]
    assert stop not in vocabulary.encode("a<end>").ids


def test_a_stop_id_that_text_can_give_is_refused() -> None:
    with pytest.raises(VocabularyError, match="stop id 5 "):
        Vocabulary.load(byte_level_bpe(), stop_ids=[5])


def test_a_special_token_that_merges_can_build_is_written_out() -> None:
    tokenizer = byte_level_bpe(["abab abab"] * 4, vocab_size=262)
    tokenizer.add_special_tokens(["ab"])
    vocabulary = Vocabulary.load(tokenizer)
    assert vocabulary.is_special[tokenizer.token_to_id("ab")]
    tokenized = vocabulary.encode("ab xaby")
    assert [vocabulary.token_bytes(i) for i in tokenized.ids] == [b"a", b"b", b" ", b"x", b"a", b"b", b"y"]
    assert tokenized.exact.all()


def test_the_tokenizer_is_left_as_it_was() -> None:
    tokenizer = with_added(byte_level_bpe())
    before = tokenizer.to_str()
    Vocabulary.load(tokenizer).encode("<bos> <think> x")
    assert tokenizer.to_str() == before
    assert tokenizer.encode("<eos>").ids == [BOS_ID, EOS_ID]


def test_ids_with_holes_keep_their_numbers() -> None:
    description = json.loads(byte_level_bpe().to_str())
    description["model"]["vocab"]["<end>"] = 420
    description["added_tokens"].append(
        dict(description["added_tokens"][0], id=420, content="<end>", special=False)
    )
    vocabulary = Vocabulary.load(Tokenizer.from_str(json.dumps(description)))
    assert vocabulary.size == 421
    assert vocabulary.is_special[400:420].all()
    assert vocabulary.encode("a<end>").ids[-1] == 420


def test_ids_outside_are_refused_unless_they_are_rows() -> None:
    vocabulary = VOCABULARIES["characters"]
    size = vocabulary.size
    with pytest.raises(VocabularyError, match=f"id {size} at position 1 "):
        vocabulary.decode([5, size])
    with pytest.raises(VocabularyError, match="id -1 at position 0"):
        vocabulary.decode([-1], rows=size + 10)
    tokenized = vocabulary.decode([5, size, 5], rows=size + 1)
    assert tokenized.ends.tolist() == [1, 1, 2]
    with pytest.raises(VocabularyError, match=f"id {size} is outside"):
        vocabulary.token_bytes(size)


# Sources


def test_a_folder_tells_the_roles(tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens(["<|im_end|>", "<pad>"])
    turn, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<pad>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {
        "eos_token": {"content": "<eos>"},
        "pad_token": "<pad>",
        "chat_template": "{{ m.content }}<|im_end|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS_ID, pad]}))
    vocabulary = Vocabulary.load(tmp_path)
    assert vocabulary.stop_ids == (EOS_ID, pad, turn)
    assert (vocabulary.pad_id, vocabulary.bos_id) == (pad, BOS_ID)
    assert Vocabulary.load(str(tmp_path / "tokenizer.json")).fingerprint == vocabulary.fingerprint


def test_a_hugging_face_object_tells_the_roles() -> None:
    source = SimpleNamespace(
        backend_tokenizer=character_level(),
        eos_token_id=EOS_ID,
        bos_token_id=BOS_ID,
        pad_token_id=EOS_ID,
        name_or_path="m",
    )
    vocabulary = Vocabulary.load(source)
    assert (vocabulary.stop_ids, vocabulary.bos_id, vocabulary.pad_id, vocabulary.name) == ((1,), 0, 1, "m")


def _broken(folder: Path) -> Iterator[tuple[object, str]]:
    yield folder / "none" / "of" / "them", "no such file or folder"
    yield folder / "missing.json", "no such file or folder"
    yield folder, "no tokenizer.json in"
    (folder / "bad.json").write_text("{}")
    yield folder / "bad.json", "is no tokenizer"
    other = folder / "other"
    other.mkdir()
    character_level().save(str(other / "tokenizer.json"))
    (other / "generation_config.json").write_text("[]")
    yield other, "holds no JSON object"
    (other / "generation_config.json").write_text("{")
    yield other, "is no JSON"
    yield 3, "a int has no tokenizers.Tokenizer behind it"


def test_a_source_that_is_none_is_an_error_of_one_line(tmp_path: Path) -> None:
    for source, message in _broken(tmp_path):
        with pytest.raises(VocabularyError, match=message) as caught:
            Vocabulary.load(source)
        assert "\n" not in str(caught.value)


# Comparison


def test_fingerprints_are_equal_for_equal_content_and_in_every_process() -> None:
    first, second = (Vocabulary.load(byte_level_bpe()) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != Vocabulary.load(byte_level_bpe(vocab_size=399)).fingerprint
    program = (
        "from support.tokenizers import character_level; from gold import Vocabulary; "
        "print(Vocabulary.load(character_level()).fingerprint)"
    )
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {folders}; {program}"],
        capture_output=True,
        check=True,
        text=True,
    )
    assert answer.stdout.strip() == Vocabulary.load(character_level()).fingerprint


def test_differences_name_what_differs() -> None:
    first = Vocabulary.load(byte_level_bpe())
    assert differences(first, Vocabulary.load(byte_level_bpe()), texts=["Hello world"]) == []
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens(["<end>"])
    longer = Vocabulary.load(tokenizer, stop_ids=[400])
    assert differences(first, longer) == ["size: 400 here, 401 there", "stop ids: [] here, [400] there"]
    renamed = json.loads(byte_level_bpe().to_str())
    vocab = renamed["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    other = Vocabulary.load(Tokenizer.from_str(json.dumps(renamed)))
    mine = sorted((vocab["a"], vocab["b"]))
    a = mine[0]
    assert differences(first, other, limit=1) == [
        f"id {a} is the text 'a' here, the text 'b' there",
        "and 1 more ids",
    ]
    assert differences(first, other, texts=["ab"])[2:] == [
        f"text 'ab' from token 0 on: {mine} here, {mine[::-1]} there"
    ]


@each_vocabulary
def test_a_vocabulary_survives_pickling(vocabulary: Vocabulary) -> None:
    copy = pickle.loads(pickle.dumps(vocabulary))
    assert copy.fingerprint == vocabulary.fingerprint
    assert copy.encode("Hello <think>").ids.tolist() == vocabulary.encode("Hello <think>").ids.tolist()


def test_a_name_that_is_no_path_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    character_level().save(str(tmp_path / "tokenizer.json"))
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str], revision: str | None) -> str:
        assert revision is None
        asked.append((name, allow_patterns))
        if name == "some/thing":
            return str(tmp_path)
        raise OSError("404: no such repository\nsecond line")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert Vocabulary.load("some/thing").size == 258
    assert asked[0][0] == "some/thing"
    assert "tokenizer.json" in asked[0][1]
    assert not [pattern for pattern in asked[0][1] if "safetensors" in pattern]
    with pytest.raises(VocabularyError, match=r"'no/thing'.* 404: no such repository"):
        Vocabulary.load("no/thing")
