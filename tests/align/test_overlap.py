"""The maps between two vocabularies, against all pairs of tokens compared one by one."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.tokenizers import families, sentencepiece_bpe
from tokenizers import Tokenizer

from gold.align.overlap import byte_equal_pairs
from gold.bytes.prefixes import PrefixMap, longest_prefixes
from gold.tokenize.vocabulary import Vocabulary

VOCABULARIES = {name: Vocabulary.load(tokenizer) for name, tokenizer in families().items()}
NAMES = list(VOCABULARIES)
# Each family with itself, with the next one, and with one further off.
PAIRS = [(NAMES[i - step], NAMES[i]) for step in (0, 1, 5) for i in range(len(NAMES))]


@dataclass(frozen=True)
class ByteVocabulary:
    """A vocabulary of any bytes, None for a special token; of equal ids the first is canonical, or the last."""

    tokens: tuple[bytes | None, ...]
    last: bool = False
    stop_ids: tuple[int, ...] = ()
    dummy_prefix: bool = False

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def offsets(self) -> np.ndarray:
        return np.cumsum([0, *(len(token or b"") for token in self.tokens)], dtype=np.int64)

    @property
    def blob(self) -> np.ndarray:
        return np.frombuffer(b"".join(token or b"" for token in self.tokens), np.uint8)

    @property
    def is_special(self) -> np.ndarray:
        return np.array([token is None for token in self.tokens])

    @property
    def _special(self) -> list[int]:
        return np.flatnonzero(self.is_special).tolist()

    @property
    def fingerprint(self) -> str:
        return Vocabulary.fingerprint.func(self)  # type: ignore[attr-defined]

    def canonical(self, index: int) -> int:
        same = [i for i, token in enumerate(self.tokens) if token == self.tokens[index]]
        return index if self.tokens[index] is None else same[-1 if self.last else 0]

    def canonical_ids(self) -> np.ndarray:
        return np.array([self.canonical(index) for index in range(self.size)], np.int32)


# Few different bytes, among them such as are no text: most tokens begin others, and some bytes are lacking.
tokenized_texts = st.lists(
    st.sampled_from([b"a", b"b", b"\0", b"\xff", b"\xc3"]), min_size=1, max_size=9
).map(b"".join)
vocabularies: Any = st.builds(
    ByteVocabulary,
    st.lists(st.one_of(tokenized_texts, tokenized_texts, st.none()), min_size=1, max_size=12).map(tuple),
    st.booleans(),
)
ONE = ByteVocabulary((b"a",))
ALIKE = ByteVocabulary((b"a", None, b"ab", b"a", b"ab"), last=True)


def phi(student: Any, rest: bytes) -> int:
    """The longest student token that begins these bytes, −1 if there is none."""
    found = [i for i, token in enumerate(student.tokens) if token is not None and rest.startswith(token)]
    return student.canonical(max(found, key=lambda i: len(student.tokens[i]))) if found else -1


def text_ids(vocabulary: Vocabulary) -> dict[bytes, list[int]]:
    ids: dict[bytes, list[int]] = {}
    for index in range(vocabulary.size):
        if not vocabulary.is_special[index]:
            ids.setdefault(vocabulary.token_bytes(index), []).append(index)
    return ids


# Tokens of equal bytes


@given(student=vocabularies, teacher=vocabularies)
@example(student=ONE, teacher=ONE)
@example(student=ALIKE, teacher=ONE)
@example(student=ByteVocabulary((None,)), teacher=ALIKE)
def test_pairs_are_the_canonical_ids_of_equal_bytes_on_both_sides(student: Any, teacher: Any) -> None:
    pairs = [
        (v, w)
        for v, mine in enumerate(student.tokens)
        for w, theirs in enumerate(teacher.tokens)
        if mine == theirs is not None and student.canonical(v) == v and teacher.canonical(w) == w
    ]
    ids_V, ids_W = byte_equal_pairs(student, teacher)
    assert list(zip(ids_V.tolist(), ids_W.tolist(), strict=True)) == pairs
    assert ids_V.dtype == ids_W.dtype == np.int32
    back_W, back_V = byte_equal_pairs(teacher, student)
    assert sorted(zip(back_V.tolist(), back_W.tolist(), strict=True)) == pairs


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
    found = longest_prefixes(vocabulary, VOCABULARIES["characters"])
    assert found.ids_W.tolist()[2:] == [dict(zip(ids_V, ids_W, strict=True))[i] for i in range(2, 258)]


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


# Longest prefixes


def check_map(found: PrefixMap, student: Any, teacher: Any) -> None:
    """Every entry of a map, against the definition."""
    assert all(array.dtype == np.int32 for array in vars(found).values())
    assert len(found.ids_W) == len(found.prefix_bytes_W) == len(found.rest_bytes_W) == teacher.size
    for w, token in enumerate(teacher.tokens):
        whole = token or b""
        expected = -1 if token is None else phi(student, whole)
        prefix = student.tokens[expected] if expected >= 0 else b""
        assert found.ids_W[w] == expected
        assert found.prefix_bytes_W[w] == len(prefix)
        assert found.rest_bytes_W[w] == len(whole) - len(prefix)


@given(student=vocabularies, teacher=vocabularies)
@example(student=ONE, teacher=ONE)
@example(student=ONE, teacher=ALIKE)
@example(student=ALIKE, teacher=ALIKE)
@example(student=ByteVocabulary((None,)), teacher=ALIKE)
@example(student=ALIKE, teacher=ByteVocabulary((None, None)))
def test_every_token_is_mapped_to_the_longest_that_begins_it(student: Any, teacher: Any) -> None:
    found, reverse = longest_prefixes(student, teacher), longest_prefixes(teacher, student)
    check_map(found, student, teacher)
    check_map(reverse, teacher, student)
    # Equal bytes are the longest prefix of one another.
    for v, w in zip(*byte_equal_pairs(student, teacher), strict=True):
        assert (found.ids_W[w], reverse.ids_W[v]) == (v, w)


def test_a_map_by_hand() -> None:
    student = ByteVocabulary((b"h", b"he", None, b"lo"))
    teacher = ByteVocabulary((b"hello", b"lo", b"help", b"o", None, b"heh"))
    found = longest_prefixes(student, teacher)
    assert found.ids_W.tolist() == [1, 3, 1, -1, -1, 1]
    assert found.prefix_bytes_W.tolist() == [2, 2, 2, 0, 0, 2]
    assert found.rest_bytes_W.tolist() == [3, 0, 2, 1, 0, 1]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_in_itself_every_token_is_its_own_prefix(name: str) -> None:
    vocabulary = VOCABULARIES[name]
    found = longest_prefixes(vocabulary, vocabulary)
    expected = np.where(vocabulary.is_special, -1, vocabulary.canonical_ids())
    assert found.ids_W.tolist() == expected.tolist()
    assert not found.rest_bytes_W.any()


# Kept maps


def test_a_changed_vocabulary_meets_no_old_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLD_CACHE", str(tmp_path))
    student = ByteVocabulary((b"a", b"ab", None, b"b"))
    teacher = ByteVocabulary((b"abb", b"ba", None, b"aa"))
    changes = [
        (student, teacher),
        (teacher, student),
        (replace(student, tokens=(b"a", b"ba", None, b"b")), teacher),
        (replace(student, tokens=(b"a", b"ab", b"c", b"b")), teacher),
        (replace(student, tokens=(b"aa", b"b", None, b"b")), teacher),  # the same bytes, cut otherwise
        (student, replace(teacher, tokens=(b"abb", b"ba", None, b"ab"))),
        (student, replace(teacher, tokens=(b"ab", b"bba", None, b"aa"))),
    ]
    for count, (mine, theirs) in enumerate(changes, 1):
        for _ in range(2):
            check_map(longest_prefixes(mine, theirs), mine, theirs)
            assert len(list(tmp_path.iterdir())) == count


def test_a_kept_map_follows_the_canonical_ids_of_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOLD_CACHE", str(tmp_path))
    for last in (False, True):
        student = replace(ALIKE, last=last)
        check_map(longest_prefixes(student, ONE), student, ONE)
    assert len(list(tmp_path.iterdir())) == 1
