"""The bytes support on tokenizers of every spelled family: odd bytes, odd segmentations, dummy spaces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import byte_level_bpe, character_level, sentencepiece_bpe

from gold.align import Vocabulary, paths
from gold.aligned import AlignedBatch, AlignedText, VocabularyPair
from gold.kernels import BACKENDS, layout
from gold.kernels.linear import Rows, byte_tables
from gold.losses import OBJECTIVES, View
from tests import oracle
from tests.kernels.rows_for_kernels import FORCED

CPU = torch.device("cpu")


def test_both_rooms_number_the_events_alike():
    """The plan of a text and the kernels that read it may not import each other."""
    for name in ("EVENTS", "STOP_EVENT", "REST_EVENT"):
        assert getattr(paths, name) == getattr(layout, name)


VOCABULARIES = {
    "bpe": Vocabulary.load(byte_level_bpe(), stop_ids=[1]),
    "digits": Vocabulary.load(byte_level_bpe(digits=True, vocab_size=350), stop_ids=[1]),
    "characters": Vocabulary.load(character_level(), stop_ids=[1]),
    "fallback": Vocabulary.load(sentencepiece_bpe(), stop_ids=[1]),
    "dummy space": Vocabulary.load(sentencepiece_bpe(prefix="prepend"), stop_ids=[1]),
}
NAMES = sorted(VOCABULARIES)


def aligned_text(pair: VocabularyPair, ids: list[int], stopped: bool) -> AlignedText:
    spelling = pair.student.spell(ids)
    whole = np.array([*ids, 1] if stopped else ids, np.int32)
    return AlignedText(whole, spelling, pair.read(spelling), stopped)


def states(count: int, width: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(st.sampled_from(NAMES), st.sampled_from(NAMES), st.data(), st.booleans())
def test_any_ids_of_any_pair_give_finite_losses_and_gradients(mine, theirs, data, stopped):
    """Sampled ids need be neither canonical nor valid UTF-8, and may hold special tokens."""
    pair = VocabularyPair(VOCABULARIES[mine], VOCABULARIES[theirs])
    token = st.integers(0, pair.student.size - 1).filter(lambda i: i != 1)
    ids = data.draw(st.lists(token, max_size=8))
    batch = AlignedBatch([aligned_text(pair, ids, stopped)], pair, CPU)
    rows, rows_T = int(batch.row_starts[-1]), int(batch.teacher_row_starts[-1])
    logits = states(rows, pair.student.size, 1).requires_grad_(True)
    backend = BACKENDS["cpu"]
    view = View(
        batch, Rows.of_logits(logits), Rows.of_logits(states(rows_T, pair.teacher.size, 2)), backend, backend
    )
    loss = OBJECTIVES["reverse_kl"]()(view)
    assert torch.isfinite(loss.total)
    assert (loss.total > 0) == bool(batch.supervised_bytes.numel())
    # Every byte that both sides spell exactly is compared, and the stop event.
    if batch.texts[0].teacher.exact.all() and not pair.teacher.dummy_prefix:
        assert batch.supervised_bytes.numel() == batch.bytes + stopped
    if loss.total.requires_grad and logits.numel():
        (grad,) = torch.autograd.grad(loss.total, logits)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["The dog, 123!", "déjà 日本 🙂", " two  spaces", ""])
def test_a_model_agrees_with_itself_whatever_the_tokenizer(name, text):
    pair = VocabularyPair(VOCABULARIES[name], VOCABULARIES[name])
    one = aligned_text(pair, pair.student.encode(text).ids.tolist(), True)
    batch = AlignedBatch([one], pair, CPU)
    logits = Rows.of_logits(states(len(one.ids), pair.student.size, 3))
    loss = OBJECTIVES["reverse_kl"]()(View(batch, logits, logits, BACKENDS["cpu"], BACKENDS["cpu"]))
    assert batch.supervised_bytes.numel() == len(text.encode()) + 1
    assert abs(loss.total.item()) < 1e-12


@pytest.mark.parametrize("name", ["bpe", "fallback"])
@pytest.mark.parametrize("backend", FORCED)
def test_tables_are_the_definition_on_a_whole_vocabulary(name, backend):
    vocabulary = VOCABULARIES[name]
    pair = VocabularyPair(vocabulary, vocabulary)
    one = aligned_text(pair, vocabulary.encode("the dog's 12 é").ids.tolist(), True)
    batch = AlignedBatch([one], pair, CPU)
    logits = states(len(one.ids), vocabulary.size + 3, 4)
    table, _, _ = byte_tables(Rows.of_logits(logits), batch.layout_S, BACKENDS[backend])
    spelled = [vocabulary.token_bytes(i) or None for i in range(vocabulary.size)]
    expected = oracle.byte_table(spelled, [1], logits, one.student.ids.tolist(), one.student.data, True)
    torch.testing.assert_close(table.exp(), expected, rtol=1e-9, atol=1e-14)


def test_a_text_that_begins_with_a_dummy_space_is_supervised_from_its_first_byte():
    pair = VocabularyPair(VOCABULARIES["dummy space"], VOCABULARIES["bpe"])
    one = aligned_text(pair, pair.student.encode("the dog").ids.tolist(), True)
    assert one.student.data == b"the dog"
    batch = AlignedBatch([one], pair, CPU)
    assert batch.supervised_bytes.tolist() == list(range(8))


def test_a_special_token_before_the_dummy_space_changes_nothing():
    vocabulary = VOCABULARIES["dummy space"]
    pair = VocabularyPair(vocabulary, VOCABULARIES["bpe"])
    ids = vocabulary.encode("the dog").ids.tolist()
    batch = AlignedBatch([aligned_text(pair, [0, *ids], True)], pair, CPU)
    assert batch.texts[0].student.data == b"the dog"
    assert batch.supervised_bytes.tolist() == list(range(8))


def test_a_stretch_that_the_teacher_does_not_spell_is_left_out_and_what_follows_is_not():
    """An invalid byte is U+FFFD to the teacher: the byte before it is compared, the ones after it again."""
    pair = VocabularyPair(VOCABULARIES["characters"], VOCABULARIES["bpe"])
    by_byte = {pair.student.token_bytes(i): i for i in range(pair.student.size)}
    data = b"ab\xc3\xa9\xe3\x81 c"
    one = aligned_text(pair, [by_byte[bytes([b])] for b in data], True)
    assert one.student.data == data
    batch = AlignedBatch([one], pair, CPU)
    # Position 4 predicts the first invalid byte; 5 lies inside the stretch; 6 follows it.
    assert batch.supervised_bytes.tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
