"""The bytes of token strings, rule by rule."""

import pytest
from support.tokenizers import (
    BOS_ID,
    EOS_ID,
    byte_level_bpe,
    character_level,
    sentencepiece_bpe,
    with_added,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from gold.errors import VocabularyError
from gold.tokenize.families import byte_alphabet
from gold.tokenize.vocabulary import Vocabulary


def test_the_byte_alphabet_is_what_tokenizers_writes() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in (*map(chr, range(0x250)), "中", "🙂", "\u2028"):
        written = "".join(piece for piece, _ in level.pre_tokenize_str(character))
        assert bytes(alphabet[symbol] for symbol in written) == character.encode()


def test_characters_are_bytes_in_order_of_their_symbols() -> None:
    vocabulary = Vocabulary.load(character_level())
    found = [vocabulary.token_bytes(i) for i in range(2, 258)]
    assert sorted(found) == [bytes([b]) for b in range(256)]
    assert vocabulary.is_special.tolist() == [True, True] + [False] * 256


def test_byte_fallback_pieces_are_bytes_and_lower_lines_are_spaces() -> None:
    tokenizer = sentencepiece_bpe()
    vocabulary = Vocabulary.load(tokenizer)
    assert vocabulary.token_bytes(tokenizer.token_to_id("<0x0A>")) == b"\n"
    assert vocabulary.token_bytes(tokenizer.token_to_id("<0xE3>")) == b"\xe3"
    assert vocabulary.token_bytes(tokenizer.token_to_id("▁")) == b" "
    assert vocabulary.token_bytes(tokenizer.token_to_id("▁the")) == b" the"
    # The literal text is no byte piece.
    assert len(vocabulary.encode("<0x0A>")) > 1


def test_added_tokens_are_their_raw_content_and_never_go_through_the_byte_map() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens(["Ġ▁ x｜"])
    vocabulary = Vocabulary.load(tokenizer)
    assert vocabulary.token_bytes(400) == "Ġ▁ x｜".encode()
    assert vocabulary.encode("aĠ▁ x｜b").ids[1] == 400


def test_added_tokens_in_a_byte_fallback_vocabulary_write_spaces_as_it_does() -> None:
    tokenizer = sentencepiece_bpe()
    inside, outside = "▁the", "▁outside"
    tokenizer.add_tokens([inside, outside])
    vocabulary = Vocabulary.load(tokenizer)
    assert vocabulary.token_bytes(tokenizer.token_to_id(inside)) == b" the"
    assert vocabulary.token_bytes(tokenizer.token_to_id(outside)) == outside.encode()


def test_byte_level_is_found_wherever_it_is() -> None:
    plain = byte_level_bpe()
    in_normalizer = Tokenizer(plain.model)
    in_normalizer.normalizer = normalizers.ByteLevel()
    in_decoder = Tokenizer(plain.model)
    in_decoder.decoder = decoders.ByteLevel()
    for tokenizer in (in_normalizer, in_decoder):
        vocabulary = Vocabulary.load(tokenizer)
        assert vocabulary.family == "byte-level"
        assert vocabulary.token_bytes(tokenizer.token_to_id("Ġthe")) == b" the"
    tokenized = Vocabulary.load(in_normalizer).encode("é the dog\n")
    assert tokenized.exact.all()


def test_strings_that_no_text_gives_are_special() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "a b": 2, "": 3, "日": 4}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert Vocabulary.load(tokenizer).is_special.tolist() == [False, False, True, True, True]


def test_dummy_prefix_is_dropped_at_the_start_only() -> None:
    vocabulary = Vocabulary.load(sentencepiece_bpe(prefix="prepend"))
    tokenized = vocabulary.encode("the the")
    assert [vocabulary.token_bytes(i) for i in tokenized.ids] == [b" the", b" the"]
    assert (tokenized.ends.tolist(), tokenized.exact.tolist(), tokenized.repaired_bytes) == (
        [3, 7],
        [False, True],
        0,
    )
    assert vocabulary.decode(tokenized.ids).data == b"the the"
    assert vocabulary.decode(tokenized.ids, at_start=False).data == b" the the"
    assert vocabulary.decode([BOS_ID, *tokenized.ids]).ends.tolist() == [0, 3, 7]
    assert vocabulary.encode("the the", at_start=False).exact.all()
    lone = vocabulary.encode("🙂")
    assert (vocabulary.token_bytes(lone.ids[0]), lone.ends[0], lone.exact[0]) == (b" ", 0, False)


def contents(vocabulary: Vocabulary, given: str) -> list[bytes]:
    return [vocabulary.token_bytes(i) for i in vocabulary.encode(given).ids]


def word_piece_of(*pieces: str, pre_tokenizer: object = None, normalizer: object = None) -> Tokenizer:
    vocab = {piece: index for index, piece in enumerate(("[UNK]", "[CLS]", *pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[UNK]", "[CLS]"])
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.BertPreTokenizer()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def test_a_word_stands_for_a_space_and_its_characters_and_what_continues_it_for_its_own() -> None:
    pieces = ("the", "dog", "##s", ",", "中", "cafe", "(", "##", "#")
    tokenizer = word_piece_of(*pieces, normalizer=normalizers.BertNormalizer())
    vocabulary = Vocabulary.load(tokenizer)
    assert vocabulary.family == "word pieces"
    # What the tokenizer cuts off by itself needs no space: punctuation, Chinese characters. A mark alone is text.
    assert [vocabulary.token_bytes(i) for i in range(2, 11)] == [
        *(b" the", b" dog", b"s", b",", "中".encode(), b" cafe", b"(", b"##", b"#")
    ]
    tokenized = vocabulary.encode("The dogs, 中中 CAFÉ\tcafe\u0301 the")
    rows = [
        (tokenized.data[a:b].decode(), bool(exact))
        for a, b, exact in zip(tokenized.starts, tokenized.ends, tokenized.exact, strict=True)
    ]
    assert rows == [
        *[("The", False), (" dog", True), ("s", True), (",", True), (" 中", False), ("中", True)],
        *[(" CAFÉ", False), ("\tcafe\u0301", False), (" the", True)],
    ]
    assert tokenized.repaired_bytes == 3 + 4 + 6 + 7
    assert vocabulary.decode(tokenized.ids).data == "the dogs,中中 cafe cafe the".encode()
    assert vocabulary.encode("the dogs").repaired_bytes == 0


def test_an_unknown_word_has_no_bytes_and_stands_on_its_text() -> None:
    vocabulary = Vocabulary.load(word_piece_of("the", "dog"))
    tokenized = vocabulary.encode("the ☃☃ dog")
    assert tokenized.ids.tolist() == [2, 0, 3]
    assert (tokenized.ends.tolist(), tokenized.exact.tolist()) == ([3, 10, 14], [False, False, True])
    assert (tokenized.repaired_bytes, vocabulary.decode([2, 0, 3]).data) == (7, b"the dog")


def test_words_that_only_white_space_separates_have_it_before_them_whatever_they_begin_with() -> None:
    tokenizer = word_piece_of(",", "(", "中", pre_tokenizer=pre_tokenizers.WhitespaceSplit())
    vocabulary = Vocabulary.load(tokenizer)
    assert [vocabulary.token_bytes(i) for i in range(2, 5)] == [b" ,", b" (", " 中".encode()]


def test_digits_that_are_cut_apart_have_no_space_and_numbers_have_one() -> None:
    digits = [pre_tokenizers.Digits(individual_digits=each) for each in (True, False)]
    for pre_tokenizer, expected in zip(digits, (b"12", b" 12"), strict=True):
        tokenizer = Tokenizer(models.WordLevel({"12": 0, "a": 1}, unk_token="a"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizer])
        assert Vocabulary.load(tokenizer).token_bytes(0) == expected


def test_the_end_of_a_word_is_a_space_where_white_space_is_dropped() -> None:
    vocab = {"a": 0, "a</w>": 1, "b</w>": 2, "</w>": 3}
    tokenizer = Tokenizer(models.BPE(vocab, [], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vocabulary = Vocabulary.load(tokenizer)
    assert vocabulary.family == "word ends"
    assert [vocabulary.token_bytes(i) for i in range(4)] == [b"a", b"a ", b"b ", b"</w>"]
    tokenized = vocabulary.encode("ab  a a")
    assert tokenized.ends.tolist() == [1, 4, 6, 7]
    assert tokenized.exact.tolist() == [True, False, True, False]
    again = vocabulary.decode(tokenized.ids)
    assert (again.data, again.ends.tolist(), again.exact.tolist()) == (
        b"ab a a",
        [1, 3, 5, 6],
        [True] * 3 + [False],
    )
    assert vocabulary.encode(again.data).exact.tolist() == again.exact.tolist()
    assert vocabulary.encode("ab a a ").exact.all()
    # Where white space is kept, the end of a word is none.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    assert Vocabulary.load(tokenizer).token_bytes(1) == b"a"


def test_unigram_spaces_and_byte_pieces() -> None:
    pieces = [
        ("<unk>", 0.0),
        ("▁", -3.0),
        ("▁a", -1.0),
        ("b", -2.0),
        *((f"<0x{b:02X}>", -9.0) for b in range(256)),
    ]
    for fallback, family in ((True, "byte-fallback"), (False, "metaspace")):
        tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=fallback))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        vocabulary = Vocabulary.load(tokenizer)
        assert (vocabulary.family, vocabulary.unk_id) == (family, 0)
        snow = "☃".encode()
        assert contents(vocabulary, "ab☃") == [
            b" a",
            b"b",
            *([bytes([b]) for b in snow] if fallback else [b""]),
        ]
        assert vocabulary.encode("ab☃ a").ends.tolist() == [1, 2, *([3, 4] if fallback else []), 5, 7]


def test_where_words_are_not_marked_the_ids_do_not_tell_the_spaces() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary = Vocabulary.load(tokenizer)
    assert vocabulary.family == "plain"
    tokenized = vocabulary.encode("a b")
    assert (tokenized.ends.tolist(), tokenized.repaired_bytes) == ([1, 3], 2)
    assert vocabulary.decode(tokenized.ids).data == b"ab"


def test_another_character_can_stand_for_a_space() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "_": 1, "▁": 2}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="_", prepend_scheme="never")
    assert [Vocabulary.load(tokenizer).token_bytes(i) for i in range(3)] == [b"a", b" ", "▁".encode()]


def _uncertain() -> list[tuple[str, Tokenizer]]:
    def of(pre_tokenizer: object = None, normalizer: object = None) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE({"a": 0}, []))
        if pre_tokenizer is not None:
            tokenizer.pre_tokenizer = pre_tokenizer
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        return tokenizer

    level, space = pre_tokenizers.ByteLevel(), pre_tokenizers.Metaspace()
    lower = normalizers.Sequence([normalizers.ByteLevel(), normalizers.Lowercase()])
    return [
        ("ByteLevel", of(pre_tokenizers.Sequence([level, level]))),
        ("ByteLevel", of(level, normalizers.ByteLevel())),
        ("ByteLevel", of(None, lower)),
        ("ByteLevel.*'▁'", of(pre_tokenizers.Sequence([space, level]))),
        (
            "'_' and '▁'",
            of(pre_tokenizers.Metaspace("_"), normalizers.Replace(" ", "▁")),
        ),
    ]


@pytest.mark.parametrize(("named", "tokenizer"), _uncertain(), ids=range(len(_uncertain())))
def test_uncertain_bytes_are_refused_in_one_line(named: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(VocabularyError, match=named) as caught:
        Vocabulary.load(tokenizer)
    assert "\n" not in str(caught.value)


def test_dropout_is_refused() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.model.dropout = 0.1
    with pytest.raises(VocabularyError, match=r"dropout is 0\.1"):
        Vocabulary.load(tokenizer)


def test_tokens_that_are_text_match_and_special_ones_do_not() -> None:
    tokenizer = with_added(byte_level_bpe())
    vocabulary = Vocabulary.load(tokenizer, stop_ids=[EOS_ID])
    think, turn = tokenizer.token_to_id("<think>"), tokenizer.token_to_id("<|turn|>")
    ids = vocabulary.encode("<think><|turn|><eos>").ids.tolist()
    assert ids[0] == think
    assert not {turn, EOS_ID} & set(ids)


def test_of_two_strings_with_one_id_the_same_is_taken_every_time() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"b": 0, "a": 0, "c": 1, "<x>": 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_tokens(["<x>"])
    vocabulary = Vocabulary.load(tokenizer)
    assert [vocabulary.token_bytes(i) for i in (0, 1)] == [b"a", b"<x>"]
