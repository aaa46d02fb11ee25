"""The walk over two tokenizations is the intersection of their ends, by the definition and by hand."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gold.align import chunks as chunks_module
from gold.align.chunks import Alignment, align_tokens, coverage
from gold.errors import DataError
from gold.tokenize.token_loops import _compiled
from gold.tokenize.vocabulary import TokenizedText


def tokenized(data: bytes, ends: list[int]) -> TokenizedText:
    count = len(ends)
    return TokenizedText(
        np.arange(count, dtype=np.int32), np.array(ends, np.int64), data, np.ones(count, np.bool_), 0
    )


@st.composite
def ends_of(draw: st.DrawFn, length: int) -> list[int]:
    """Ends of a tokenization of `length` bytes, with tokens of zero width; an empty text can have no token."""
    inner = draw(st.lists(st.integers(0, length), max_size=12))
    return sorted([*inner, length]) if length or draw(st.booleans()) else []


@st.composite
def two_sides(draw: st.DrawFn) -> tuple[TokenizedText, TokenizedText]:
    data = draw(st.binary(max_size=12))
    return tokenized(data, draw(ends_of(len(data)))), tokenized(data, draw(ends_of(len(data))))


def brute_force(student: TokenizedText, teacher: TokenizedText) -> list[tuple[int, int, int, int]]:
    """The chunks by their definition: the edges that both sides share, and each token looked up among them."""
    length = len(student.data)
    if length == 0:
        return [(0, len(student), 0, len(teacher))] if len(student) + len(teacher) else []
    edges = sorted({0, length} | (set(student.ends.tolist()) & set(teacher.ends.tolist())))

    def chunk_of(start: int, end: int) -> int:
        inside = [
            c
            for c, (a, b) in enumerate(pairwise(edges))
            if a <= start and (end <= b if end > start else start < b)
        ]
        return inside[0] if inside else len(edges) - 2

    members = [
        [chunk_of(a, b) for a, b in zip(side.starts.tolist(), side.ends.tolist(), strict=True)]
        for side in (student, teacher)
    ]
    chunks = []
    for c in range(len(edges) - 1):
        s, t = ([i for i, owner in enumerate(side) if owner == c] for side in members)
        chunks.append((*_range(s, members[0], c), *_range(t, members[1], c)))
    return chunks


def _range(own: list[int], members: list[int], chunk: int) -> tuple[int, int]:
    if own:
        assert own == list(range(own[0], own[-1] + 1))
        return own[0], own[-1] + 1
    before = sum(owner < chunk for owner in members)
    return before, before


@pytest.fixture(params=["python", "compiled"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs on the function as it is written and on the compiled one."""
    as_it_is = request.param == "python"
    monkeypatch.setattr(
        chunks_module, "walk", lambda function, _: function if as_it_is else _compiled(function)
    )
    return str(request.param)


def rows(alignment: Alignment) -> list[tuple[int, ...]]:
    return [tuple(row) for row in alignment.chunks.tolist()]


@given(two_sides())
def test_chunks_are_the_intersection_of_ends(sides: tuple[TokenizedText, TokenizedText]) -> None:
    assert rows(align_tokens(*sides)) == brute_force(*sides)


@given(two_sides())
def test_every_token_is_in_exactly_one_chunk_of_the_same_bytes(
    sides: tuple[TokenizedText, TokenizedText],
) -> None:
    student, teacher = sides
    alignment = align_tokens(student, teacher)
    for side, (first, last), own in (
        (student, (0, 1), alignment.chunk_S),
        (teacher, (2, 3), alignment.chunk_T),
    ):
        bounds = alignment.chunks[:, [first, last]].tolist()
        assert [i for a, b in bounds for i in range(a, b)] == list(range(len(side)))
        assert own.tolist() == [c for c, (a, b) in enumerate(bounds) for _ in range(a, b)]
        for c, (a, b) in enumerate(bounds):
            if b > a:
                assert side.ends[b - 1] == alignment.ends_C[c]
    assert alignment.ends_C[-1:].tolist() in ([len(student.data)], [])


@given(two_sides())
def test_swapping_the_sides_swaps_the_chunks(sides: tuple[TokenizedText, TokenizedText]) -> None:
    student, teacher = sides
    there, back = align_tokens(student, teacher), align_tokens(teacher, student)
    assert there.chunks[:, [2, 3, 0, 1]].tolist() == back.chunks.tolist()
    assert there.ends_C.tolist() == back.ends_C.tolist()


@given(st.lists(st.integers(1, 5), max_size=20))
def test_equal_tokenizations_give_one_chunk_per_token(widths: list[int]) -> None:
    side = tokenized(bytes(sum(widths)), np.cumsum(widths, dtype=np.int64).tolist())
    alignment = align_tokens(side, side)
    assert rows(alignment) == [(i, i + 1, i, i + 1) for i in range(len(widths))]
    assert alignment.one_to_one_C.all()


def test_zero_width_joins_the_chunk_that_starts_there_and_at_the_end_the_last() -> None:
    student, teacher = tokenized(b"abcd", [0, 2, 2, 4, 4]), tokenized(b"abcd", [1, 2, 2, 3, 4])
    assert rows(align_tokens(student, teacher)) == [(0, 2, 0, 2), (2, 5, 2, 5)]


def test_one_side_without_tokens_is_one_chunk() -> None:
    assert rows(align_tokens(tokenized(b"ab", []), tokenized(b"ab", [1, 2]))) == [(0, 0, 0, 2)]
    assert rows(align_tokens(tokenized(b"", []), tokenized(b"", []))) == []
    assert rows(align_tokens(tokenized(b"a", []), tokenized(b"a", []))) == []
    assert rows(align_tokens(tokenized(b"", [0]), tokenized(b"", []))) == [(0, 1, 0, 0)]


def test_different_texts_are_refused_with_the_place() -> None:
    with pytest.raises(DataError, match="first difference at byte 3"):
        align_tokens(tokenized(b"foobar", [6]), tokenized(b"foo bar", [7]))


def test_coverage_counts_by_hand() -> None:
    student, teacher = tokenized(b"abcdef", [1, 3, 6]), tokenized(b"abcdef", [1, 2, 3, 6])
    found = coverage(student, teacher, align_tokens(student, teacher))
    assert (found.chunks, found.one_to_one_chunks, found.largest_chunk_bytes, found.largest_chunk_tokens) == (
        3,
        2,
        3,
        3,
    )
    assert (found.student_tokens, found.teacher_tokens, found.bytes) == (2 / 3, 2 / 4, 4 / 6)
    nothing = coverage(
        tokenized(b"", []), tokenized(b"", []), align_tokens(tokenized(b"", []), tokenized(b"", []))
    )
    assert (nothing.chunks, nothing.bytes, nothing.largest_chunk_bytes) == (0, 0.0, 0)
