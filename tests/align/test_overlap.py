"""Pairs of tokens with equal bytes, against the obvious comparison."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers_for_tests import families, sentencepiece_bpe

from gold.align import Vocabulary, byte_equal_pairs

VOCABULARIES = {name: Vocabulary.load(tokenizer) for name, tokenizer in families().items()}
PAIRS = [(a, b) for a in list(VOCABULARIES)[::3] for b in VOCABULARIES]


def text_ids(vocabulary: Vocabulary) -> dict[bytes, list[int]]:
    ids: dict[bytes, list[int]] = {}
    for index in range(vocabulary.size):
        if not vocabulary.event_V[index]:
            ids.setdefault(vocabulary.token_bytes(index), []).append(index)
    return ids


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_pairs_are_all_tokens_with_equal_bytes(student: str, teacher: str) -> None:
    mine, theirs = VOCABULARIES[student], VOCABULARIES[teacher]
    ids_V, ids_W = byte_equal_pairs(mine, theirs)
    assert ids_V.tolist() == sorted(set(ids_V.tolist()))
    assert len(set(ids_W.tolist())) == len(ids_W)
    pairs = dict(zip(ids_V.tolist(), ids_W.tolist(), strict=True))
    assert all(mine.token_bytes(v) == theirs.token_bytes(w) for v, w in pairs.items())
    assert len(pairs) == len(text_ids(mine).keys() & text_ids(theirs).keys())


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_swapping_the_sides_swaps_the_pairs(student: str, teacher: str) -> None:
    there = byte_equal_pairs(VOCABULARIES[student], VOCABULARIES[teacher])
    back = byte_equal_pairs(VOCABULARIES[teacher], VOCABULARIES[student])
    assert set(zip(*(side.tolist() for side in there), strict=True)) == set(
        zip(*(side.tolist() for side in back[::-1]), strict=True)
    )


def test_of_several_ids_with_equal_bytes_it_is_the_one_that_text_gives() -> None:
    tokenizer = sentencepiece_bpe()
    vocabulary = Vocabulary.load(tokenizer)
    canonical = vocabulary.canonical_ids()
    a, piece = tokenizer.token_to_id("a"), tokenizer.token_to_id("<0x61>")
    assert piece < a
    assert (canonical[a], canonical[piece]) == (a, a)
    assert vocabulary.encode("a").ids.tolist() == [a]
    # A byte that begins a longer character is no text: the piece is all there is.
    lead = tokenizer.token_to_id("<0xE3>")
    assert canonical[lead] == lead
    ids_V, ids_W = byte_equal_pairs(VOCABULARIES["characters"], vocabulary)
    assert len(ids_V) == 256
    assert piece not in ids_W
    assert {a, lead} <= set(ids_W.tolist())


def test_events_are_no_pairs_and_stand_for_themselves() -> None:
    vocabulary = VOCABULARIES["characters"]
    ids_V, _ = byte_equal_pairs(vocabulary, vocabulary)
    assert ids_V.tolist() == list(range(2, 258))
    assert vocabulary.canonical_ids().tolist() == list(range(258))


def test_without_a_canonical_id_the_lowest_that_is_no_byte_piece_is_taken() -> None:
    description = json.loads(sentencepiece_bpe().to_str())
    vocab = description["model"]["vocab"]
    count = len(vocab)
    # Two tokens with equal bytes that no merge reaches: a literal space never stands in a token string of this family.
    vocab |= {"zq▁": count, "zq ": count + 1}
    vocabulary = Vocabulary.load(Tokenizer.from_str(json.dumps(description)))
    assert vocabulary.token_bytes(count) == vocabulary.token_bytes(count + 1) == b"zq "
    assert vocabulary.canonical_ids()[count + 1] == count
