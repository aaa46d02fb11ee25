"""The bytes support on tokenizers of every spelled family: odd bytes, odd segmentations, dummy spaces."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.kernel_inputs import FORCED
from support.tokenizers import byte_level_bpe, character_level, sentencepiece_bpe

from gold.align.batch import AlignedBatch
from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.bytes.events import STOP_EVENT
from gold.demo.models import character_tokenizer
from gold.kernels import logits as lazy
from gold.kernels import tables
from gold.kernels.logits import GivenLogits, HeadLogits, LazyLogits, TopKLogits
from gold.kernels.tables import byte_tables
from gold.losses import OBJECTIVES, Loss, LossInputs
from gold.losses.mixture import Mix, OtherTeacher
from gold.tokenize.vocabulary import Vocabulary

CPU = torch.device("cpu")


VOCABULARIES = {
    "bpe": Vocabulary.load(byte_level_bpe(), stop_ids=[1]),
    "digits": Vocabulary.load(byte_level_bpe(digits=True, vocab_size=350), stop_ids=[1]),
    "characters": Vocabulary.load(character_level(), stop_ids=[1]),
    "fallback": Vocabulary.load(sentencepiece_bpe(), stop_ids=[1]),
    "dummy space": Vocabulary.load(sentencepiece_bpe(prefix="prepend"), stop_ids=[1]),
}
NAMES = sorted(VOCABULARIES)


def aligned_text(pair: VocabularyPair, ids: list[int], stopped: bool) -> AlignedText:
    tokenized = pair.student.decode(ids)
    whole = np.array([*ids, 1] if stopped else ids, np.int32)
    return AlignedText(whole, tokenized, pair.to_teacher(tokenized), stopped)


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
    rows, rows_T = int(batch.student.row_starts[-1]), int(batch.teacher.row_starts[-1])
    logits = states(rows, pair.student.size, 1).requires_grad_(True)
    inputs = LossInputs(
        batch,
        GivenLogits(logits),
        GivenLogits(states(rows_T, pair.teacher.size, 2)),
    )
    loss = OBJECTIVES["reverse_kl"]()(inputs)
    assert torch.isfinite(loss.total)
    assert (loss.total > 0) == bool(batch.supervised_bytes.numel())
    # Every byte that both sides spell exactly is compared, and the stop event.
    if batch.texts[0].teacher.exact.all() and not pair.teacher.dummy_prefix:
        assert batch.supervised_bytes.numel() == batch.bytes + stopped
    if loss.total.requires_grad and logits.numel():
        (grad,) = torch.autograd.grad(loss.total, logits)
        assert torch.isfinite(grad).all()


@settings(max_examples=30)
@given(st.data(), st.sampled_from([None, 3]), st.booleans(), st.integers(1, 5))
def test_a_text_in_stretches_has_the_same_loss(data, top_k, several, block_rows):
    """Wherever it is cut: special ids, stretches that a side does not spell, tokens that run across, told or not."""
    mine, *theirs = (VOCABULARIES[data.draw(st.sampled_from(NAMES))] for _ in range(3))
    pair, other = (VocabularyPair(mine, teacher) for teacher in theirs)
    token = st.integers(0, pair.student.size - 1).filter(lambda i: i != 1).map(lambda i: [i])
    words = st.sampled_from(["the dog", " then", "s 123", "é"]).map(lambda w: mine.encode(w).ids.tolist())
    ids = st.lists(token | words, max_size=8).map(lambda parts: [i for part in parts for i in part])
    drawn = data.draw(st.lists(st.tuples(ids, st.booleans()), max_size=3))
    batch, other_batches = (
        AlignedBatch([aligned_text(each, ids, stopped) for ids, stopped in drawn], each, CPU)
        for each in (pair, other)
    )
    logits = states(int(batch.student.row_starts[-1]), pair.student.size, 1).requires_grad_(True)

    def teacher(read: AlignedBatch, seed: int) -> LazyLogits:
        found = states(int(read.teacher.row_starts[-1]), read.vocabularies.teacher.size, seed)
        # What was written is mostly told, so that inside a token both what is told and what is not counts.
        found += 4 * torch.nn.functional.one_hot(read.teacher.targets.clamp(min=0), found.shape[1])
        if top_k is None or not len(found):
            return GivenLogits(found)
        logp, ids = torch.log_softmax(found, dim=-1).topk(top_k, dim=-1)
        return TopKLogits(ids, logp, found.shape[1])

    mix = {
        "mix": Mix("linear", {"a": 0.5, "b": 0.5}),
        "other_teachers": (OtherTeacher(other_batches, teacher(other_batches, 3)),),
    }
    inputs = LossInputs(batch, GivenLogits(logits), teacher(batch, 2), **(mix if several else {}))

    def found() -> tuple[Loss, list[torch.Tensor]]:
        loss = OBJECTIVES["reverse_kl"]()(inputs)
        wanted = loss.total.requires_grad and logits.numel()
        return loss, list(torch.autograd.grad(loss.total, logits)) if wanted else []

    whole, gradient = found()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "BLOCK_BYTES", 4 * pair.student.size * block_rows)
        parts, gradient_of_parts = found()
    for one, all_of_it in ((parts.parts, whole.parts), (parts.sequence_logp, whole.sequence_logp)):
        torch.testing.assert_close(dict(one), dict(all_of_it))
    torch.testing.assert_close([parts.total, *gradient_of_parts], [whole.total, *gradient])


def test_a_frozen_matrix_is_put_in_order_once_for_all_stretches_of_a_text(monkeypatch):
    pair = VocabularyPair(VOCABULARIES["digits"], VOCABULARIES["bpe"])
    ids = pair.student.encode("the dog, the 123 dogs and the dog's 45 " * 2).ids.tolist()
    batch = AlignedBatch([aligned_text(pair, ids, True)], pair, CPU)
    logits = states(int(batch.student.row_starts[-1]), pair.student.size, 1).float().requires_grad_(True)
    matrix = states(pair.teacher.size, 8, 2).float()
    hidden = states(int(batch.teacher.row_starts[-1]), 8, 3).float()
    copies = []

    def reordered(columns: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        copies.append(matrix[columns])
        return lambda states: states @ copies[-1].T

    teacher = HeadLogits(hidden, lambda states: states @ matrix.T, pair.teacher.size, reordered=reordered)
    inputs = LossInputs(batch, GivenLogits(logits), teacher)
    monkeypatch.setattr(lazy, "BLOCK_BYTES", 4 * pair.student.size * 5)
    plain = OBJECTIVES["reverse_kl"]()(inputs)
    assert not copies
    monkeypatch.setattr(tables, "SCATTERED", {"cpu"})
    in_order = OBJECTIVES["reverse_kl"]()(inputs)
    assert len(copies) == 1
    torch.testing.assert_close(in_order.total, plain.total)
    torch.testing.assert_close(dict(in_order.sequence_logp), dict(plain.sequence_logp))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["The dog, 123!", "déjà 日本 🙂", " two  spaces", ""])
def test_a_model_agrees_with_itself_whatever_the_tokenizer(name, text):
    pair = VocabularyPair(VOCABULARIES[name], VOCABULARIES[name])
    one = aligned_text(pair, pair.student.encode(text).ids.tolist(), True)
    batch = AlignedBatch([one], pair, CPU)
    logits = GivenLogits(states(len(one.ids), pair.student.size, 3))
    loss = OBJECTIVES["reverse_kl"]()(LossInputs(batch, logits, logits))
    assert batch.supervised_bytes.numel() == len(text.encode()) + 1
    assert abs(loss.total.item()) < 1e-12


@pytest.mark.parametrize("name", ["bpe", "fallback"])
@pytest.mark.parametrize("backend", FORCED, indirect=True)
def test_tables_are_the_definition_on_a_whole_vocabulary(name, backend):
    vocabulary = VOCABULARIES[name]
    pair = VocabularyPair(vocabulary, vocabulary)
    one = aligned_text(pair, vocabulary.encode("the dog's 12 é").ids.tolist(), True)
    batch = AlignedBatch([one], pair, CPU)
    logits = states(len(one.ids), vocabulary.size + 3, 4)
    table, _, _ = byte_tables(GivenLogits(logits), batch.student.layout)
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


def test_a_text_of_no_bytes_and_no_end_asks_nothing_of_a_teacher_that_tells_some_tokens_only():
    pair = VocabularyPair(VOCABULARIES["bpe"], VOCABULARIES["characters"])
    texts = [aligned_text(pair, pair.student.encode("a").ids.tolist(), True), aligned_text(pair, [0], False)]
    batch = AlignedBatch(texts, pair, CPU)
    assert batch.teacher.row_starts.tolist() == [0, 2, 2]
    logits = states(3, pair.student.size, 1).requires_grad_(True)
    ids = batch.teacher.targets.clamp(min=0)[:, None]
    teacher = TopKLogits(ids, torch.full((2, 1), -0.5), pair.teacher.size)
    loss = OBJECTIVES["reverse_kl"]()(LossInputs(batch, GivenLogits(logits), teacher))
    (grad,) = torch.autograd.grad(loss.total, logits)
    assert torch.isfinite(grad).all()
    assert not grad[2].any()


def test_a_text_that_neither_side_has_a_token_for_is_no_row_and_no_chunk():
    """The letter that kernels are compiled with is one, for models whose vocabulary is only digits."""
    digits = Vocabulary.load(character_tokenizer(), stop_ids=[2])
    pair = VocabularyPair(digits, digits)
    tokenized = digits.encode("a")
    batch = AlignedBatch(
        [AlignedText(np.array([2], np.int32), tokenized, pair.to_teacher(tokenized), True)], pair, CPU
    )
    assert batch.one_to_one_bytes.tolist() == [False, True]
    _, row, event = batch.path
    assert (row.tolist(), event.tolist()) == ([0], [STOP_EVENT])
