"""Faults of alignment that other toolkits ship or shipped, each on a small case of its own."""

import json

import numpy as np
import pytest
from support.tokenizers import (
    BOS_ID,
    byte_level_bpe,
    character_level,
    families,
    sentencepiece_bpe,
    unigram,
    word_piece,
)
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from gold.align.chunks import align_tokens
from gold.align.overlap import byte_equal_pairs
from gold.tokenize.compare import differences
from gold.tokenize.families import byte_alphabet
from gold.tokenize.vocabulary import Vocabulary

BYTE_LEVEL = Vocabulary.load(byte_level_bpe())
BYTE_FALLBACK = Vocabulary.load(sentencepiece_bpe())
CHARACTERS = Vocabulary.load(character_level())


def test_one_accent_does_not_disturb_its_neighbours() -> None:
    """Token strings instead of bytes: one "é" left 2 of 12 tokens aligned."""
    text = "the été of the dog and the fox"
    student, teacher = BYTE_LEVEL.encode(text), BYTE_FALLBACK.encode(text)
    alignment = align_tokens(student, teacher)
    shared = set(student.ends.tolist()) & set(teacher.ends.tolist())
    assert alignment.ends_C.tolist() == sorted(shared)
    assert {len("the été of".encode()), len("the été of the".encode())} <= shared


def test_a_space_is_a_byte_like_any_other() -> None:
    """Spaces stripped before the comparison: "foobar" was fully aligned with "foo bar"."""
    ids_V, ids_W = byte_equal_pairs(BYTE_LEVEL, BYTE_FALLBACK)
    assert all(
        BYTE_LEVEL.token_bytes(v) == BYTE_FALLBACK.token_bytes(w)
        for v, w in zip(ids_V.tolist(), ids_W.tolist(), strict=True)
    )
    spaced = {BYTE_LEVEL.token_bytes(v) for v in ids_V.tolist()}
    assert b" the" in spaced
    a, b = BYTE_LEVEL.encode("foobar"), BYTE_FALLBACK.encode("foo bar")
    assert (a.data, b.data) == (b"foobar", b"foo bar")


@pytest.mark.parametrize("name", families())
def test_foobar_is_no_foo_bar_for_any_family(name: str) -> None:
    """The same, whatever the family: a token that holds a space is never exact on a text without it."""
    vocabulary = Vocabulary.load(families()[name])
    joined, apart = vocabulary.encode("foobar"), vocabulary.encode("foo bar")
    assert (joined.data, apart.data) == (b"foobar", b"foo bar")
    for tokenized in (joined, apart):
        own = [vocabulary.token_bytes(i) for i in tokenized.ids]
        for i in np.flatnonzero(tokenized.exact).tolist():
            assert own[i] == tokenized.data[tokenized.starts[i] : tokenized.ends[i]]


def test_a_byte_fallback_student_is_aligned_too() -> None:
    """Positions instead of bytes on the SentencePiece side: no signal at all."""
    text = "the dog sleeps, 日本語"
    alignment = align_tokens(BYTE_FALLBACK.encode(text), BYTE_LEVEL.encode(text))
    assert alignment.one_to_one_C.sum() > 3
    fine = align_tokens(BYTE_FALLBACK.encode(text), CHARACTERS.encode(text))
    assert len(fine) == len(BYTE_FALLBACK.encode(text))


@pytest.mark.parametrize(
    "teacher",
    [
        unigram(pre_tokenizers.Metaspace()),
        word_piece(pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()),
    ],
    ids=["unigram", "wordpiece"],
)
def test_a_teacher_of_another_family_gives_a_signal_at_every_word(teacher: Tokenizer) -> None:
    """Token strings with spaces stripped, or positions: nothing, or all in one group."""
    text = "the dog and the fox and the dog"
    student, read = BYTE_LEVEL.encode(text), Vocabulary.load(teacher).encode(text)
    words = {len(" ".join(text.split()[: k + 1])) for k in range(8)}
    assert words <= set(align_tokens(student, read).ends_C.tolist())
    assert read.repaired_bytes == 0


def test_bos_on_one_side_changes_no_chunk_but_joins_the_first() -> None:
    """BOS on one side turned a whole sequence into one group."""
    text = "the dog and the fox"
    ids = BYTE_LEVEL.encode(text).ids
    without, beside = BYTE_LEVEL.decode(ids), BYTE_LEVEL.decode(np.concatenate(([BOS_ID], ids)))
    teacher = BYTE_FALLBACK.encode(text)
    plain, shifted = align_tokens(without, teacher), align_tokens(beside, teacher)
    assert plain.ends_C.tolist() == shifted.ends_C.tolist()
    assert shifted.chunks[0].tolist() == [0, plain.chunks[0, 1] + 1, *plain.chunks[0, 2:]]


def test_rows_are_not_late() -> None:
    """Rows taken one position late: two equal models had a loss of 0.333."""
    tokenized = BYTE_LEVEL.encode("the quick brown fox")
    alignment = align_tokens(tokenized, tokenized)
    assert alignment.chunk_S.tolist() == alignment.chunk_T.tolist() == list(range(len(tokenized)))
    assert alignment.ends_C.tolist() == tokenized.ends.tolist()


def test_canonical_characters_are_never_paired_as_if_equal() -> None:
    """Offsets of a normaliser paired か with が: a token that is not the text's bytes is never exact."""
    teacher = Vocabulary.load(byte_level_bpe(normalizer=normalizers.NFC()))
    text = "か\u3099か"
    read = teacher.encode(text)
    assert read.exact.sum() == (read.starts >= len("か\u3099".encode())).sum()
    assert len("か".encode()) not in align_tokens(CHARACTERS.encode(text), read).ends_C


def test_a_composed_teacher_keeps_every_boundary_outside_of_what_it_composes() -> None:
    """135 of 724 groups were wrong in texts that NFC changes; elsewhere the finest cut was missed."""
    teacher = Vocabulary.load(byte_level_bpe(normalizer=normalizers.NFC()))
    text = "le cafe\u0301 de la re\u0301gion, か\u3099き\u3099 か"
    read = teacher.encode(text)
    plain = Vocabulary.load(byte_level_bpe()).encode(text)
    accents = [i for i, c in enumerate(text) if c in "\u0301\u3099"]
    inside = {len(text[:i].encode()) + k for i in accents for k in range(len(text[i].encode()))}
    inside |= {len(text[: i - 1].encode()) + k for i in accents for k in range(1, len(text[i - 1].encode()))}
    assert not inside & set(read.ends.tolist())
    shared = {0} | (set(read.ends.tolist()) & set(plain.ends.tolist()))
    assert {0, *align_tokens(plain, read).ends_C.tolist()} == shared
    assert read.repaired_bytes < 40


@pytest.mark.parametrize("marks", ["e\u0301", "a\u0323\u0301", "q\u0307\u0323", "\u0301", "e" + "\u0301" * 3])
@pytest.mark.parametrize("name", families())
def test_stacked_marks_raise_nothing(name: str, marks: str) -> None:
    """Decomposed and stacked marks were an exception."""
    vocabulary = Vocabulary.load(families()[name])
    text = f"x{marks}y {marks} the dog"
    alignment = align_tokens(CHARACTERS.encode(text), vocabulary.encode(text))
    assert alignment.ends_C[-1] == len(text.encode())
    assert len(alignment) > 1


def test_the_byte_alphabet_is_the_library_s() -> None:
    """A table typed by hand agreed with GPT-2's alphabet in 5 of 54 entries."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = byte_alphabet()
    assert len(alphabet) == 256
    for code in [*range(0x80), 0xE9, 0x4E2D, 0x1F642]:
        ((symbols, _),) = level.pre_tokenize_str(chr(code))
        assert bytes(alphabet[symbol] for symbol in symbols) == chr(code).encode()


def test_a_wrong_vocabulary_of_the_same_or_a_smaller_size_is_seen() -> None:
    """A wrong vocabulary trained silently as long as it was not larger."""
    description = json.loads(byte_level_bpe().to_str())
    vocab = description["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    swapped = Vocabulary.load(Tokenizer.from_str(json.dumps(description)))
    smaller = Vocabulary.load(byte_level_bpe(vocab_size=390))
    for other in (swapped, smaller):
        assert other.fingerprint != BYTE_LEVEL.fingerprint
        assert differences(BYTE_LEVEL, other)


def test_padded_rows_are_no_tokens_and_no_error() -> None:
    """151,936 rows against 152,064 of the same family were a crash in six projects."""
    ids = BYTE_LEVEL.encode("the dog").ids
    padded = BYTE_LEVEL.decode([*ids, BYTE_LEVEL.size + 5], rows=BYTE_LEVEL.size + 64)
    assert (padded.data, padded.ends[-2:].tolist()) == (b"the dog", [7, 7])
    assert padded.exact.all()


@pytest.mark.parametrize("text", ["", "the dog"])
def test_a_second_bos_is_not_put_before_a_text(text: str) -> None:
    """The teacher was fed a BOS of its own template and one more."""
    for tokenizer in families().values():
        vocabulary = Vocabulary.load(tokenizer)
        assert BOS_ID in tokenizer.encode(text).ids
        assert BOS_ID not in vocabulary.encode(text).ids
