"""`<think>` as a special token, as an added token, and as plain characters: no signal is lost between two of them, and
none is forged."""

import pickle
from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.texts import text
from support.tokenizers import BOS_ID, EOS_ID, byte_level_bpe, sentencepiece_bpe, word_piece
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from gold.align.chunks import align_tokens
from gold.align.overlap import byte_equal_pairs
from gold.align.vocabularies import VocabularyPair
from gold.bytes.plan import BytePlan
from gold.bytes.trie import ByteTrie
from gold.tokenize.vocabulary import TokenizedText, Vocabulary

MARKERS = ("<think>", "</think>")
KINDS = ("special", "added", "absent")
FAMILIES = {
    "byte-level": byte_level_bpe,
    "byte-level, digits": lambda: byte_level_bpe(digits=True, vocab_size=350),
    "byte-fallback": sentencepiece_bpe,
    "byte-fallback, space first": lambda: sentencepiece_bpe(prefix="first"),
}
PIECES = ("<think>", "the fox 24 +7", "</think>", " 31\n", "<think", ">")


@cache
def side(family: str, kind: str) -> Vocabulary:
    """A toy whose markers are of that kind, as a loaded model has it."""
    tokenizer = FAMILIES[family]()
    if kind == "special":
        tokenizer.add_special_tokens(list(MARKERS))
    elif kind == "added":
        tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in MARKERS])
    return Vocabulary.load(tokenizer, stop_ids=[EOS_ID]).with_markers()


def written(vocabulary: Vocabulary, pieces: tuple[str, ...]) -> TokenizedText:
    """What a model writes: markers by its own token where it has one, everything else as text."""
    own = {token: vocabulary.tokenizer.token_to_id(token) for token in MARKERS}
    ids: list[int] = []
    for place, piece in enumerate(pieces):
        marker = own.get(piece)
        ids += [marker] if marker is not None else vocabulary.encode(piece, at_start=place == 0).ids.tolist()
    return vocabulary.decode(ids)


def controls(vocabulary: Vocabulary, tokenized: TokenizedText) -> list[int]:
    """The special tokens among the ids of a text."""
    special = {i for i, t in vocabulary.tokenizer.get_added_tokens_decoder().items() if t.special}
    return [i for i in tokenized.ids.tolist() if i in special]


@pytest.mark.parametrize("families", list(product(FAMILIES, FAMILIES)), ids=" / ".join)
@pytest.mark.parametrize("kinds", list(product(KINDS, KINDS)), ids=" / ".join)
def test_what_the_student_marks_the_teacher_reads(kinds: tuple[str, str], families: tuple[str, str]) -> None:
    pair = VocabularyPair(*(side(family, kind) for family, kind in zip(families, kinds, strict=True)))
    mine = written(pair.student, PIECES)
    theirs = pair.to_teacher(mine)
    # Nothing is lost: the text is the same on both sides, markers in it.
    assert mine.data == theirs.data == "".join(PIECES).encode()
    assert (mine.repaired_bytes, theirs.repaired_bytes) == (0, 0)
    if pair.same:  # equal ids by bytes: the teacher scores the student's own
        assert theirs is mine
        return
    tokens = [pair.teacher.tokenizer.token_to_id(token) for token in MARKERS]
    at_marker = [i for i in theirs.ids.tolist() if i in tokens]
    if kinds == ("special", "special"):
        assert at_marker == controls(pair.teacher, theirs) == tokens
        assert len(align_tokens(mine, theirs).chunks) >= 4
    elif kinds[1] == "added":
        # One token of the teacher's, as its tokenizer finds it in any text: the last piece completes a third marker.
        assert at_marker == [*tokens, tokens[0]]
    else:
        assert at_marker == controls(pair.teacher, theirs) == []
    assert pair.to_student(theirs).data == mine.data


@pytest.mark.parametrize("kinds", list(product(KINDS, KINDS)), ids=" / ".join)
def test_characters_that_look_like_a_marker_never_become_a_special_token(kinds: tuple[str, str]) -> None:
    for family in FAMILIES:
        pair = VocabularyPair(side(family, kinds[0]), side(family, kinds[1]))
        mine = pair.student.encode("<think>a</think>")
        assert not controls(pair.student, mine)
        assert not controls(pair.teacher, pair.to_teacher(mine))
        letters = [i for c in "<think>a</think>" for i in pair.student.encode(c, at_start=False).ids.tolist()]
        assert not controls(pair.teacher, pair.to_teacher(pair.student.decode(letters)))


@given(st.data(), st.sampled_from(list(FAMILIES)), st.sampled_from(list(FAMILIES)))
def test_special_tokens_are_handed_over_and_never_made(data: st.DataObject, mine: str, theirs: str) -> None:
    kinds = data.draw(st.sampled_from(list(product(KINDS, KINDS))))
    pair = VocabularyPair(side(mine, kinds[0]), side(theirs, kinds[1]))
    ids = data.draw(st.lists(st.integers(0, pair.student.size - 1) | st.sampled_from([5, 9]), max_size=12))
    specials = list(pair.student.markers.values()) or [BOS_ID]
    ids = [specials[-i % len(specials)] if i % 3 == 0 else i for i in ids]
    tokenized = pair.student.decode(ids)
    read = pair.to_teacher(tokenized)
    assert read.data == tokenized.data
    handed = [pair.markers[i] for i in ids if i in pair.markers]
    assert controls(pair.teacher, read) == handed or pair.same
    exact = zip(read.ids.tolist(), read.starts.tolist(), read.ends.tolist(), read.exact.tolist(), strict=True)
    for index, start, end, is_exact in exact:
        assert not is_exact or pair.teacher.token_bytes(index) == read.data[start:end]


@given(st.sampled_from(list(FAMILIES)), text)
def test_text_gives_the_same_ids_with_markers_as_without(family: str, given: str) -> None:
    vocabulary = side(family, "special")
    tokenized = vocabulary.encode(given)
    assert not controls(vocabulary, tokenized)
    assert tokenized.ids.tolist() == vocabulary.without_markers().encode(given).ids.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_special_marker_and_an_added_one_are_compared_as_the_same_bytes(family: str) -> None:
    """The same tokenizer twice, `<think>` special on one side: equal rows then give equal next-byte tables."""
    pair = VocabularyPair(side(family, "special"), side(family, "added"))
    mine = written(pair.student, PIECES[:4])
    theirs = pair.to_teacher(mine)
    assert theirs.ids.tolist() == mine.ids.tolist()
    tries = ByteTrie.of(pair.student), ByteTrie.of(pair.teacher)
    plans = [
        BytePlan.of(side, trie, [tokenized], [True])
        for side, trie, tokenized in zip((pair.student, pair.teacher), tries, (mine, theirs), strict=True)
    ]
    for name in ("order", "low", "high", "own", "children", "byte", "outside", "stops"):
        assert np.array_equal(getattr(tries[0], name), getattr(tries[1], name)), name
    assert np.array_equal(plans[0].visits.node, plans[1].visits.node)
    for name in ("mass_row", "mass_position", "mass_event", "target", "supervised"):
        assert np.array_equal(getattr(plans[0], name), getattr(plans[1], name)), name


def test_markers_are_shared_tokens_by_their_bytes() -> None:
    mine, theirs = side("byte-level", "special"), side("byte-fallback", "added")
    pairs = set(zip(*(ids.tolist() for ids in byte_equal_pairs(mine, theirs)), strict=True))
    for token in MARKERS:
        assert (mine.tokenizer.token_to_id(token), theirs.tokenizer.token_to_id(token)) in pairs


def test_roles_and_tokens_without_a_row_keep_no_bytes() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens([*MARKERS, "<image>", "<pad>"])
    first = tokenizer.token_to_id("<think>")
    plain = Vocabulary(tokenizer, stop_ids=[EOS_ID, first + 1], bos_id=BOS_ID, pad_id=first + 3)
    assert plain.markers == {"<think>": first, "<image>": first + 2}
    marked = plain.with_markers(rows=first + 2)
    assert marked.token_bytes(first) == b"<think>"
    assert np.flatnonzero(marked.is_special).tolist() == [BOS_ID, EOS_ID, first + 1, first + 2, first + 3]
    assert plain.is_special[first]
    assert marked.without_markers() is plain
    assert plain.without_markers() is plain
    assert marked.with_markers() is marked
    again = marked.with_markers(rows=plain.size)
    assert again.token_bytes(first + 2) == b"<image>"
    assert again.without_markers() is plain
    assert len({v.fingerprint for v in (plain, marked, again)}) == 3
    copied = pickle.loads(pickle.dumps(marked))
    assert copied.fingerprint == marked.fingerprint
    assert copied.without_markers().fingerprint == plain.fingerprint


def test_a_vocabulary_without_markers_is_the_same_with_them() -> None:
    plain = Vocabulary.load(byte_level_bpe(), stop_ids=[EOS_ID])
    assert plain.with_markers().fingerprint == plain.fingerprint


def test_markers_of_word_pieces() -> None:
    tokenizer: Tokenizer = word_piece(pre_tokenizers.BertPreTokenizer())
    tokenizer.add_special_tokens(["[MASK]"])
    vocabulary = Vocabulary.load(tokenizer, stop_ids=[EOS_ID]).with_markers()
    mask = tokenizer.token_to_id("[MASK]")
    assert vocabulary.token_bytes(mask) == b"[MASK]"
    assert mask not in vocabulary.encode("the [MASK] dog").ids


def test_a_marker_that_the_tokenizers_merges_build_is_not_given_for_text() -> None:
    tokenizer = byte_level_bpe()
    built = tokenizer.encode("over the lazy dog", add_special_tokens=False).tokens[0]
    tokenizer.add_special_tokens([built])
    vocabulary = Vocabulary.load(tokenizer, stop_ids=[EOS_ID]).with_markers()
    assert vocabulary.token_bytes(vocabulary.markers[built]) == built.encode()
    tokenized = vocabulary.encode("over the lazy dog")
    assert vocabulary.markers[built] not in tokenized.ids
    assert tokenized.exact.all()
