"""The bytes of token strings, rule by rule."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers_for_tests import (
    BOS_ID,
    EOS_ID,
    byte_level_bpe,
    character_level,
    sentencepiece_bpe,
    with_added,
)

from gold.align import Vocabulary
from gold.align.spelling import byte_alphabet
from gold.errors import VocabularyError


def test_the_byte_alphabet_is_what_tokenizers_writes() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in (*map(chr, range(0x250)), "中", "🙂", "\u2028"):
        written = "".join(piece for piece, _ in level.pre_tokenize_str(character))
        assert bytes(alphabet[symbol] for symbol in written) == character.encode()


def test_characters_are_bytes_in_order_of_their_symbols() -> None:
    vocabulary = Vocabulary.load(character_level())
    spelled = [vocabulary.token_bytes(i) for i in range(2, 258)]
    assert sorted(spelled) == [bytes([b]) for b in range(256)]
    assert vocabulary.event_V.tolist() == [True, True] + [False] * 256


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
    spelling = Vocabulary.load(in_normalizer).encode("é the dog\n")
    assert spelling.exact.all()


def test_strings_that_no_text_gives_are_events() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "a b": 2, "": 3, "日": 4}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert Vocabulary.load(tokenizer).event_V.tolist() == [False, False, True, True, True]


def test_dummy_prefix_is_dropped_at_the_start_only() -> None:
    vocabulary = Vocabulary.load(sentencepiece_bpe(prefix="prepend"))
    spelling = vocabulary.encode("the the")
    assert [vocabulary.token_bytes(i) for i in spelling.ids] == [b" the", b" the"]
    assert (spelling.ends.tolist(), spelling.exact.tolist(), spelling.repaired_bytes) == (
        [3, 7],
        [False, True],
        0,
    )
    assert vocabulary.spell(spelling.ids).data == b"the the"
    assert vocabulary.spell(spelling.ids, at_start=False).data == b" the the"
    assert vocabulary.spell([BOS_ID, *spelling.ids]).ends.tolist() == [0, 3, 7]
    assert vocabulary.encode("the the", at_start=False).exact.all()
    lone = vocabulary.encode("🙂")
    assert (vocabulary.token_bytes(lone.ids[0]), lone.ends[0], lone.exact[0]) == (b" ", 0, False)


def _families_out_of_reach() -> list[tuple[str, Tokenizer]]:
    word_piece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0)], 0, byte_fallback=False))
    byte_unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, byte_fallback=False))
    byte_unigram.pre_tokenizer = pre_tokenizers.ByteLevel()
    clip = Tokenizer(models.BPE({"a</w>": 0, "a": 1}, [], end_of_word_suffix="</w>"))
    clip.pre_tokenizer = pre_tokenizers.ByteLevel()
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    bare = Tokenizer(models.BPE({"a": 0}, []))
    old = Tokenizer(models.BPE({"a": 0, "▁": 1}, []))
    old.pre_tokenizer = pre_tokenizers.Metaspace()
    return [
        ("a WordPiece tokenizer", word_piece),
        ("a Unigram tokenizer", unigram),
        ("a byte-level Unigram tokenizer", byte_unigram),
        ("word-piece marks", clip),
        ("a WordLevel tokenizer", words),
        ("neither byte-level nor byte-fallback", bare),
        ("without byte fallback", old),
    ]


@pytest.mark.parametrize(
    ("named", "tokenizer"), _families_out_of_reach(), ids=[n for n, _ in _families_out_of_reach()]
)
def test_other_families_are_refused_by_name(named: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(VocabularyError, match=f"{named}.* cannot be spelled in bytes yet"):
        Vocabulary.load(tokenizer)


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
