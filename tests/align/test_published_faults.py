"""Faults of alignment that other toolkits ship or shipped, each on a small case of its own."""

import numpy as np
from tokenizers import normalizers
from tokenizers_for_tests import BOS_ID, byte_level_bpe, character_level, sentencepiece_bpe

from gold.align import Vocabulary, align_tokens, byte_equal_pairs

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


def test_a_byte_fallback_student_is_aligned_too() -> None:
    """Positions instead of bytes on the SentencePiece side: no signal at all."""
    text = "the dog sleeps, 日本語"
    alignment = align_tokens(BYTE_FALLBACK.encode(text), BYTE_LEVEL.encode(text))
    assert alignment.one_to_one_C.sum() > 3
    fine = align_tokens(BYTE_FALLBACK.encode(text), CHARACTERS.encode(text))
    assert len(fine) == len(BYTE_FALLBACK.encode(text))


def test_bos_on_one_side_changes_no_chunk_but_joins_the_first() -> None:
    """BOS on one side turned a whole sequence into one group."""
    text = "the dog and the fox"
    ids = BYTE_LEVEL.encode(text).ids
    without, beside = BYTE_LEVEL.spell(ids), BYTE_LEVEL.spell(np.concatenate(([BOS_ID], ids)))
    teacher = BYTE_FALLBACK.encode(text)
    plain, shifted = align_tokens(without, teacher), align_tokens(beside, teacher)
    assert plain.ends_C.tolist() == shifted.ends_C.tolist()
    assert shifted.chunks[0].tolist() == [0, plain.chunks[0, 1] + 1, *plain.chunks[0, 2:]]


def test_rows_are_not_late() -> None:
    """Rows taken one position late: two equal models had a loss of 0.333."""
    spelling = BYTE_LEVEL.encode("the quick brown fox")
    alignment = align_tokens(spelling, spelling)
    assert alignment.chunk_S.tolist() == alignment.chunk_T.tolist() == list(range(len(spelling)))
    assert alignment.ends_C.tolist() == spelling.ends.tolist()


def test_canonical_characters_are_never_paired_as_if_equal() -> None:
    """Offsets of a normaliser paired か with が: a token that is not the text's bytes is never exact."""
    teacher = Vocabulary.load(byte_level_bpe(normalizer=normalizers.NFC()))
    text = "か\u3099か"
    read = teacher.encode(text)
    assert read.exact.sum() == (read.starts >= len("か\u3099".encode())).sum()
    assert len("か".encode()) not in align_tokens(CHARACTERS.encode(text), read).ends_C
