"""Streams that differ from the text: what changed is whole, what did not keeps its place."""

import sys
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.texts import data, text
from support.tokenizers import (
    byte_level_bpe,
    character_map,
    families,
    sentencepiece_bpe,
    unigram,
    with_added,
    without_bytes,
)
from tokenizers import Regex, normalizers, pre_tokenizers

from gold.align.chunks import align_tokens
from gold.errors import VocabularyError
from gold.tokenize.rewriting import compose, decode_replacing, edit_boundaries, rewriting_boundaries
from gold.tokenize.token_ends import settle_by_bytes, spans_less_missing, true_ends
from gold.tokenize.vocabulary import TokenizedText, Vocabulary

CHARACTERS = Vocabulary.load(families()["characters"])
NFC = Vocabulary.load(families()["byte-level, NFC"])


def covered(vocabulary: Vocabulary, tokenized: TokenizedText) -> list[tuple[bytes, bytes, bool]]:
    rows = zip(tokenized.ids, tokenized.starts, tokenized.ends, tokenized.exact, strict=True)
    return [(vocabulary.token_bytes(i), tokenized.data[a:b], bool(exact)) for i, a, b, exact in rows]


# Invalid UTF-8


@given(data)
def test_replaced_bytes_keep_their_place(given: bytes) -> None:
    decoded, back = decode_replacing(given)
    assert decoded == given.decode("utf-8", "replace")
    if back is None:
        assert decoded.encode() == given
        return
    stream = decoded.encode()
    assert len(back) == len(stream) + 1
    assert (back[0], back[-1]) == (0, len(given))
    known = np.flatnonzero(back >= 0)
    assert (np.diff(back[known]) > 0).all()
    for p, q in pairwise(known):
        piece, source = stream[p:q], given[back[p] : back[q]]
        assert piece == source or (
            piece == "\ufffd".encode() and source.decode("utf-8", "replace") == "\ufffd"
        )


def test_invalid_bytes_by_hand() -> None:
    tokenized = CHARACTERS.encode(b"a\xffb\xe2\x82c")
    assert covered(CHARACTERS, tokenized) == [
        (b"a", b"a", True),
        (b"\xef", b"", False),
        (b"\xbf", b"", False),
        (b"\xbd", b"\xff", False),
        (b"b", b"b", True),
        (b"\xef", b"", False),
        (b"\xbf", b"", False),
        (b"\xbd", b"\xe2\x82", False),
        (b"c", b"c", True),
    ]
    assert tokenized.repaired_bytes == 3


def test_a_replacement_character_in_the_text_is_no_repair() -> None:
    assert CHARACTERS.encode("a\ufffdb").exact.all()


def test_lone_surrogates_are_invalid_bytes() -> None:
    tokenized = CHARACTERS.encode("a\ud800")
    assert tokenized.data == b"a\xed\xa0\x80"
    assert tokenized.repaired_bytes == 3


# Normalisers


def test_composed_characters_by_hand() -> None:
    vocabulary = Vocabulary.load(byte_level_bpe(["abc"], vocab_size=258, normalizer=normalizers.NFC()))
    assert covered(vocabulary, vocabulary.encode("cafe\u0301 か\u3099s")) == [
        *[(c, c, True) for c in (b"c", b"a", b"f")],
        (b"\xc3", b"", False),
        (b"\xa9", "e\u0301".encode(), False),
        (b" ", b" ", True),
        (b"\xe3", b"", False),
        (b"\x81", b"", False),
        ("が".encode()[2:], "か\u3099".encode(), False),
        (b"s", b"s", True),
    ]


def test_a_character_is_never_cut_from_its_marks() -> None:
    # Reordering keeps the q, but the edge after it lies inside one character.
    tokenized = NFC.encode("q\u0307\u0323z")
    assert tokenized.ends[:-1].max() == 5
    assert set(tokenized.ends.tolist()) <= {0, 5, 6}


def test_what_a_normaliser_removes_belongs_to_the_next_token() -> None:
    stripped = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Replace("x", "")]
    )
    vocabulary = Vocabulary.load(byte_level_bpe(["abc"], vocab_size=258, normalizer=stripped))
    assert covered(vocabulary, vocabulary.encode("axbe\u0301cx")) == [
        (b"a", b"a", True),
        (b"b", b"xb", False),
        (b"e", "e\u0301".encode(), False),
        (b"c", b"cx", False),
    ]


@given(text)
def test_nfc_repairs_only_what_nfc_changes(given: str) -> None:
    tokenized = NFC.encode(given)
    changed = unicodedata.normalize("NFC", given) != given
    assert bool(tokenized.repaired_bytes) == changed


NORMALIZERS = {
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC": normalizers.NFKC(),
    "NFKD": normalizers.NFKD(),
    "lower case": normalizers.Lowercase(),
    "no accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "line ends": normalizers.Replace("\r\n", "\n"),
    "Strip": normalizers.Strip(),
}


@pytest.mark.parametrize("normalizer", NORMALIZERS.values(), ids=NORMALIZERS.keys())
@given(given=text)
def test_an_end_is_where_rewriting_the_text_before_it_gives_the_tokens_before_it(
    normalizer: normalizers.Normalizer, given: str
) -> None:
    rewritten = normalizer.normalize_str(given)
    back = rewriting_boundaries(given, rewritten, normalizer.normalize_str)
    bytes_given, bytes_rewritten = given.encode(), rewritten.encode()
    assert back[-1] <= len(bytes_given)
    for p in np.flatnonzero(back >= 0):
        try:
            before, rewritten_before = bytes_given[: back[p]].decode(), bytes_rewritten[:p].decode()
        except UnicodeDecodeError:  # inside a character that stayed the same
            continue
        if normalizer is not NORMALIZERS["Strip"]:
            assert normalizer.normalize_str(before) == rewritten_before


@given(text)
def test_the_same_text_decomposed_meets_at_every_word(given: str) -> None:
    """A student that decomposes text and a teacher that composes it meet outside of the changed characters."""
    words = "cafe\u0301 " + given + " e\u0301te\u0301 x"
    student, teacher = CHARACTERS.encode(words), NFC.encode(words)
    alignment = align_tokens(student, teacher)
    assert {len("cafe\u0301".encode()), len(words.encode()) - 2} <= set(alignment.ends_C.tolist())


# Bytes that the vocabulary lacks, unknown tokens, swallowed spaces


@given(text, st.binary(max_size=4))
def test_dropped_bytes_belong_to_the_next_token(given: str, lacking: bytes) -> None:
    tokenizer = without_bytes(byte_level_bpe(vocab_size=300), b"x" + lacking)
    vocabulary = Vocabulary.load(tokenizer)
    tokenized = vocabulary.encode(given)
    kept = given.encode().translate(None, b"x" + lacking)
    assert b"".join(vocabulary.token_bytes(i) for i in tokenized.ids) == kept
    if not kept:
        return
    # Each token's span is its own bytes with what was dropped before them; at the end, after them too.
    for own, span, exact in covered(vocabulary, tokenized):
        assert span.translate(None, b"x" + lacking) == own
        assert exact == (own == span)


def test_an_unknown_token_stands_on_what_it_replaces_and_is_repaired() -> None:
    vocabulary = Vocabulary.load(sentencepiece_bpe(known=range(0)))
    tokenized = vocabulary.encode("the\u2603\u2603dog")
    unknown = int(np.flatnonzero(tokenized.ids == vocabulary.unk_id)[0])
    rows = covered(vocabulary, tokenized)
    assert rows[unknown] == (b"", "\u2603\u2603".encode(), False)
    assert tokenized.repaired_bytes == 6
    assert all(exact for i, (_, _, exact) in enumerate(rows) if i != unknown)
    # From the ids alone nothing is known of it.
    assert vocabulary.decode(tokenized.ids).data == b"thedog"


def test_an_unknown_last_character_is_the_unknown_token_s() -> None:
    vocabulary = Vocabulary.load(sentencepiece_bpe(known=range(0)))
    rows = covered(vocabulary, vocabulary.encode("the\u2603"))
    assert rows[-1] == (b"", "\u2603".encode(), False)
    assert all(exact for _, _, exact in rows[:-1])


def test_swallowed_spaces_are_repaired() -> None:
    vocabulary = Vocabulary.load(with_added(byte_level_bpe()))
    assert covered(vocabulary, vocabulary.encode("a  <pause>  b")) == [
        (b"a", b"a", True),
        (b"<pause>", b"  <pause>  ", False),
        (b"b", b"b", True),
    ]


def test_unexplained_differences_without_rapidfuzz_are_one_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(VocabularyError, match="pip install rapidfuzz"):
        edit_boundaries(b"a <pause> b", b"a<pause>b")
    # What is known needs no rapidfuzz.
    assert Vocabulary.load(with_added(byte_level_bpe())).encode("a <pause> b").repaired_bytes == 9
    assert Vocabulary.load(sentencepiece_bpe(known=range(0))).encode("the \u2603 dog").repaired_bytes > 0
    assert NFC.encode(b"e\xcc\x81\xff").repaired_bytes == 4


@given(st.lists(st.tuples(st.text(max_size=3), st.text("xyz", max_size=9)), max_size=40))
def test_unexplained_deletions_are_found_whatever_their_number(pieces: list[tuple[str, str]]) -> None:
    kept = [
        f"{i * 7919 % 1000:03}{words}".translate({ord(c): None for c in "xyz"})
        for i, (words, _) in enumerate(pieces)
    ]
    given = "".join(own + lost for own, (_, lost) in zip(kept, pieces, strict=True)).encode()
    stream = "".join(kept).encode()
    back = edit_boundaries(given, stream)
    assert len(back) == len(stream) + 1
    assert (np.diff(back[back >= 0]) >= 0).all()
    for p in range(len(stream)):
        if back[p + 1] >= 0:
            assert given[back[p + 1] - 1] == stream[p]
    # Edit operations may place what is lost beside its place, but never far from it.
    starts = np.cumsum([0, *(len(own.encode()) for own in kept)])
    places = np.cumsum(
        [0, *(len((own + lost).encode()) for own, (_, lost) in zip(kept, pieces, strict=True))]
    )
    assert all(
        back[p] in (-1, *range(place - 12, place + 1)) for p, place in zip(starts, places, strict=True)
    )


def test_unexplained_differences_are_repaired_in_windows() -> None:
    given, stream = b"the quick brown fox  <pause>  jumps ", b"the quick brown fox<pause>jumps "
    once, often = edit_boundaries(given, stream), edit_boundaries(given * 400, stream * 400)
    assert (once == -1).sum() == 0
    assert often.tolist() == [0, *(p + i * len(given) for i in range(400) for p in once[1:].tolist())]


@given(text, text)
def test_any_two_streams_have_a_map(given: str, other: str) -> None:
    back = edit_boundaries(given.encode(), other.encode())
    known = back[back >= 0]
    assert len(back) == len(other.encode()) + 1
    assert (np.diff(known) >= 0).all()
    assert known[-1] <= len(given.encode())


def test_maps_compose() -> None:
    outer = np.array([0, 1, -1, 3, 5])
    inner = np.array([0, 2, 3, -1, 4])
    assert compose(inner, outer).tolist() == [0, -1, 3, -1, 5]


# Where tokens end, from where they stand and from their bytes


def ends_of(first: list[int], last: list[int], back: list[int], **options: bool) -> list[int]:
    return true_ends(np.array(first), np.array(last), np.array(back), **options).tolist()


def test_what_stands_in_a_gap_is_the_next_token_s_or_this_one_s() -> None:
    same = list(range(8))
    assert ends_of([0, 4, 6], [2, 5, 7], same) == [2, 5, 7]
    assert ends_of([0, 4, 6], [2, 5, 7], same, take_what_follows=True) == [4, 6, 7]


def test_an_end_inside_of_what_changed_is_moved_over_a_gap_or_is_none() -> None:
    back = [0, 1, -1, 3, 4, -1, 6, 7]
    assert ends_of([0, 4, 5], [2, 5, 7], back) == [3, -1, 7]
    # Tokens that overlap have no end between them.
    for take in (False, True):
        assert ends_of([0, 1, 4], [2, 4, 7], list(range(8)), take_what_follows=take) == [-1, 4, 7]


def settled(
    first: list[int], last: list[int], own: list[bytes], given: bytes, gone: bytes = b"", unknown: str = ""
) -> list[int]:
    back, stops = np.arange(len(given) + 1), np.cumsum([len(piece) for piece in own])
    ends = true_ends(np.array(first), np.array(last), back)
    text, stream = (np.frombuffer(side, np.uint8) for side in (given, b"".join(own)))
    missing = np.isin(text, np.frombuffer(gone, np.uint8))
    vague = np.array([c == "?" for c in unknown.ljust(len(own))])
    settle_by_bytes(ends, np.array(first), np.array(last), stops, stream, text, missing, vague, back)
    return ends.tolist()


def test_tokens_that_share_a_character_are_cut_by_their_bytes() -> None:
    given = "a☃b".encode()
    pieces = [b"a", b"\xe2", b"\x98", b"\x83", b"b"]
    assert settled([0, 1, 1, 1, 4], [1, 4, 4, 4, 5], pieces, given) == [1, 2, 3, 4, 5]
    # With a space that the text has or has not, and with a byte that is gone.
    assert settled([0, 1, 1, 1, 4], [1, 4, 4, 4, 5], [b" a", *pieces[1:]], given) == [1, 2, 3, 4, 5]
    assert settled([0, 1, 1], [1, 4, 4], [b"a", b" ", "☃".encode()], given[:4]) == [1, 1, 4]
    assert settled([0, 1, 1, 4], [1, 4, 4, 5], [b"a", b"\xe2", b"\x83", b"b"], given, gone=b"\x98") == [
        1,
        2,
        4,
        5,
    ]


def test_offsets_that_the_bytes_contradict_are_not_believed() -> None:
    # A model left out the x, and its record of the rest is one place behind.
    assert settled([0, 1, 2, 5], [1, 2, 3, 6], [b"a", b"b", b"c", b"d"], b"axbc d") == [1, -1, 3, 6]
    # Beside an unknown token nothing can be told of it.
    assert settled([0, 1, 2], [1, 2, 3], [b"a", b"", b""], b"axy", unknown=" ??") == [1, 2, 3]
    assert settled([0, 1, 2], [1, 2, 3], [b"a", b"", b"b"], b"axy", unknown=" ? ") == [1, -1, 3]


@pytest.mark.parametrize(
    ("unknown", "expected"),
    [("?", [(1, 7)]), ("??", [(1, 4), (4, 7)]), ("???", [(1, 4), (4, 7), (7, 7)])],
)
def test_unknown_tokens_share_what_is_gone_a_character_each(
    unknown: str, expected: list[tuple[int, int]]
) -> None:
    characters, gone = np.array([0, 1, 4, 7, 8]), np.array([False, *[True] * 6, False])
    stops = np.array([1, *[1] * len(unknown), 2])
    vague = np.array([False, *[True] * len(unknown), False])
    first, last = spans_less_missing(stops, vague, gone, characters)
    assert list(zip(first.tolist(), last.tolist(), strict=True)) == [(0, 1), *expected, (7, 8)]


def test_offsets_behind_a_normaliser_are_not_trusted() -> None:
    """A character map that removes the first character shifts the tokenizer's own offsets of all others."""
    pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    vocabulary = Vocabulary.load(unigram(pre_tokenizer, character_map()))
    for written in ("\u200bthe \u2603 dog", "\u200b½½ \u2603 dog", "ﬁ…① \u2603 dog"):
        tokenized = vocabulary.encode(written)
        dog = [vocabulary.token_bytes(i) for i in tokenized.ids].index(b" dog")
        assert tokenized.data[tokenized.starts[dog] : tokenized.ends[dog]] == b" dog"
        assert tokenized.exact[dog]
        assert (
            tokenized.data[tokenized.starts[dog - 1] : tokenized.ends[dog - 1]].strip() == "\u2603".encode()
        )


def test_white_space_and_unknown_characters_that_are_dropped_are_not_taken_for_each_other() -> None:
    pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    vocabulary = Vocabulary.load(unigram(pre_tokenizer))
    tokenized = vocabulary.encode("\u2603 ")
    # The space that is put before the text, and the unknown character; what stands behind it is dropped.
    assert [vocabulary.token_bytes(i) for i in tokenized.ids] == [b" ", b""]
    assert tokenized.ends.tolist() == [0, 4]


# The cost of long texts


def counted(normalizer: normalizers.Normalizer, given: str) -> tuple[np.ndarray, int]:
    calls = 0

    def rewrite(piece: str) -> str:
        nonlocal calls
        calls += 1
        return str(normalizer.normalize_str(piece))

    back = rewriting_boundaries(given, rewrite(given), rewrite)
    return back, calls


def test_a_text_of_marks_alone_is_rewritten_a_few_times() -> None:
    given = "e" + "\u0301" * 20_000 + "x"
    back, calls = counted(NORMALIZERS["NFC"], given)
    assert calls < 20
    assert np.unique(back).tolist() == [-1, 0, len(given.encode()) - 1, len(given.encode())]


def test_white_space_made_one_space_is_found_at_once_wherever_it_is() -> None:
    one_space = normalizers.Sequence([normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()])
    given = "".join(f"line{'  ' * (i % 9)} of code" for i in range(500)) + " " * 900
    back, calls = counted(one_space, given)
    assert calls < 400
    known = back[back >= 0]
    rewritten = one_space.normalize_str(given)
    for p in np.flatnonzero(back >= 0).tolist():
        assert given[: back[p]].split() == rewritten[:p].split() or rewritten[p - 1 : p] == " "
    assert (np.diff(known) >= 0).all()


def test_a_normaliser_that_looks_far_is_mapped_by_edit_operations() -> None:
    """What becomes of a piece depends on the whole text: no span of it is rewritten by itself as it is there."""
    given = "x" * 1500 + " the quick brown fox"

    def rewrite(piece: str) -> str:
        return piece.replace("fox", "cat") if len(piece) < len(given) else piece[:1500].upper() + piece[1500:]

    back = rewriting_boundaries(given, rewrite(given), rewrite)
    assert back[1501:].tolist() == list(range(1501, len(given) + 1))
