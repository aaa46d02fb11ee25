"""The weights of one vocabulary's tokens in another's, against the rule spelled out token by token."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizers import families

from gold.align.decomposition import likeliest_pairs, retokenized, token_weights
from gold.align.overlap import byte_equal_pairs
from gold.tokenize.vocabulary import Vocabulary
from tests.contract.toys import toy_vocabulary

LETTERS = "abc "


def letters(count: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(LETTERS), min_size=count, max_size=count)


@st.composite
def vocabularies(draw: st.DrawFn) -> Vocabulary:
    """A few merges, each of two tokens that are there by then."""
    tokens, merges = list(LETTERS), []
    for _ in range(draw(st.integers(0, 6))):
        left, right = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if left + right not in tokens:
            merges.append(f"{left}+{right}")
            tokens.append(left + right)
    return toy_vocabulary(merges, letters=LETTERS, cut=None, shuffle=draw(st.integers(0, 3)))


def cut(vocabulary: Vocabulary, data: bytes) -> list[bytes]:
    return [vocabulary.token_bytes(i) for i in vocabulary.encode(data.decode(), at_start=False).ids.tolist()]


def slow_weights(student: Vocabulary, teacher: Vocabulary, top_k: int = 4) -> dict[bytes, dict[bytes, float]]:
    """The rule, token by token, in bytes: no id decides anything."""
    mine, theirs = (
        {v.token_bytes(i) for i in range(v.size) if not v.is_special[i]} for v in (student, teacher)
    )
    weights: dict[bytes, dict[bytes, float]] = defaultdict(lambda: defaultdict(float))
    for token in mine - theirs:
        parts = cut(teacher, token)[:4]
        total = sum(0.1**i for i in range(len(parts)))
        for i, part in enumerate(parts):
            weights[token][part] += 0.1**i / total
    for token in theirs - mine:
        parts = cut(student, token)[:4]
        total = sum(0.1**i for i in range(len(parts)))
        for i, part in enumerate(parts):
            weights[part][token] += 0.1**i / total
    result = {token: {token: 1.0} for token in mine & theirs}
    for token in mine - theirs:
        kept = sorted(weights[token].items(), key=lambda item: (-round(item[1], 12), item[0]))[:top_k]
        result[token] = {part: weight / sum(w for _, w in kept) for part, weight in kept}
    return result


def in_bytes(student: Vocabulary, teacher: Vocabulary, top_k: int = 4) -> dict[bytes, dict[bytes, float]]:
    found = token_weights(student, teacher, top_k)
    rows: dict[bytes, dict[bytes, float]] = defaultdict(dict)
    for v, w, weight in zip(found.ids_V.tolist(), found.ids_W.tolist(), found.weight_E.tolist(), strict=True):
        rows[student.token_bytes(v)][teacher.token_bytes(w)] = weight
    return dict(rows)


@settings(max_examples=20, deadline=None)
@given(vocabularies(), vocabularies(), st.integers(1, 5))
def test_weights_are_the_rule(student: Vocabulary, teacher: Vocabulary, top_k: int) -> None:
    found, expected = in_bytes(student, teacher, top_k), slow_weights(student, teacher, top_k)
    assert found.keys() == expected.keys()
    for token, row in expected.items():
        assert found[token] == pytest.approx(row, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(vocabularies(), vocabularies())
def test_every_text_token_has_weights_that_add_up_to_one(student: Vocabulary, teacher: Vocabulary) -> None:
    weights = token_weights(student, teacher)
    total = np.bincount(weights.ids_V, weights.weight_E, student.size)
    assert total[~student.is_special] == pytest.approx(1.0)
    assert (total[student.is_special] == 0).all()
    assert (np.diff(weights.ids_V) >= 0).all()
    for token in np.unique(weights.ids_V):
        assert (np.diff(weights.weight_E[weights.ids_V == token]) <= 1e-15).all()


@settings(max_examples=20, deadline=None)
@given(vocabularies(), vocabularies())
def test_relaxed_pairs_hold_the_byte_equal_ones_and_every_id_once(
    student: Vocabulary, teacher: Vocabulary
) -> None:
    ids_V, ids_W = likeliest_pairs(token_weights(student, teacher), student)
    assert len(set(ids_V.tolist())) == len(set(ids_W.tolist())) == len(ids_V)
    pairs = set(zip(ids_V.tolist(), ids_W.tolist(), strict=True))
    assert pairs >= set(zip(*(x.tolist() for x in byte_equal_pairs(student, teacher)), strict=True))


def test_a_number_counts_mostly_as_its_first_digit() -> None:
    student = toy_vocabulary(["2+0", "20+1"], letters="012", cut=None)
    teacher = toy_vocabulary([], letters="012", cut=None)
    row = in_bytes(student, teacher)[b"201"]
    assert row == pytest.approx({b"2": 1 / 1.11, b"0": 0.1 / 1.11, b"1": 0.01 / 1.11})
    # The digit itself has its first place already.
    assert len(likeliest_pairs(token_weights(student, teacher), student)[0]) == 3
    # From the digits' side nothing is left to say: each has an equal of its own.
    assert in_bytes(teacher, student) == {bytes([d]): {bytes([d]): 1.0} for d in b"012"}


def test_bytes_that_are_no_text_and_bytes_that_are_missing_have_no_weights() -> None:
    """Half a character cannot be tokenized, and a letter that the other side lacks is not spelled: nothing is made
    up."""
    student, teacher = (Vocabulary.load(families()[n]) for n in ("byte-level", "byte-level, bytes missing"))
    weights = token_weights(student, teacher)
    for missing in (b"\xc3", b"x", b"\x01"):
        (token,) = (i for i in range(student.size) if student.token_bytes(i) == missing)
        assert token not in weights.ids_V


@pytest.mark.parametrize(
    "name",
    ["byte-level", "byte-fallback", "byte-fallback, metaspace first", "byte-level, NFKC and lower case"],
)
def test_pieces_are_the_first_tokens_of_an_exact_spelling(name: str) -> None:
    source, target = (Vocabulary.load(families()[n]) for n in ("byte-level, other merges", name))
    cuts = retokenized(source, target)
    equal, _ = byte_equal_pairs(source, target)
    found = 0
    for token, row in enumerate(cuts.tolist()):
        row = [i for i in row if i >= 0]
        if row:
            found += 1
            data = source.token_bytes(token)
            assert token not in equal
            assert data.startswith(b"".join(map(target.token_bytes, row)))
            assert row == target.encode(data.decode(), at_start=False).ids[:4].tolist()
    assert found > 5
