"""Texts and rows of which one side has nothing to say: bytes that a teacher does not spell, texts cut inside a
character, tokens that are ruled out, rows of an output matrix that only one side has."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernel_inputs import FORCED
from support.texts import data as any_bytes
from support.tokenizers import EOS_ID, families

from gold.align.batch import AlignedBatch
from gold.align.texts import AlignedText
from gold.align.vocabularies import VocabularyPair
from gold.kernels.logits import GivenLogits
from gold.losses import DIVERGENCES, OBJECTIVES, LossInputs
from gold.tokenize.vocabulary import Vocabulary
from tests.contract.clauses import needs_one_vocabulary, variants
from tests.contract.toys import CPU, ToyModel, aligned, inputs_of, toy_vocabulary

STUDENTS = ("byte-level", "characters", "byte-fallback, prepend")
TEACHERS = (
    "byte-level, NFC",
    "byte-level, bytes missing",
    "byte-level",
    "byte-fallback",
    "byte-fallback, unknown characters",
    "wordpiece, uncased",
    "unigram, NFKC",
    "words",
    "word ends",
)
VARIANTS = dict(variants())


@cache
def vocabulary(name: str) -> Vocabulary:
    return Vocabulary.load(families()[name], stop_ids=[EOS_ID])


@cache
def pair_of(student: str, teacher: str) -> VocabularyPair:
    return VocabularyPair(vocabulary(student), vocabulary(teacher))


def cut_text(pair: VocabularyPair, text: bytes, cut: int, stopped: bool, sampled: bool) -> AlignedText:
    """The student's tokens of a text but the last ``cut``, as the teacher reads what they spell."""
    ids = pair.student.encode(text).ids
    tokenized = pair.student.decode(ids[: max(0, len(ids) - cut)])
    whole = np.append(tokenized.ids, pair.student.stop_ids[0]) if stopped else tokenized.ids
    drawn = np.full(len(whole), -1.5, np.float32)
    return AlignedText(
        whole.astype(np.int32), tokenized, pair.to_teacher(tokenized), stopped, sampled, 0.5, drawn
    )


def logits_of(rows: int, width: int, seed: int, ruled_out: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, width, generator=generator)
    gone = torch.rand(rows, width, generator=generator) < ruled_out
    gone[:, EOS_ID] = False
    return logits.masked_fill(gone, -torch.inf)


KINDS = (
    "reverse_kl/bytes",
    "reverse_kl/prefix",
    "reverse_kl/shared",
    "span_pg",
    "token_pg",
    "alm",
    "gold",
    "uld",
    "x_token",
)


@pytest.mark.parametrize(
    ("names", "examples"),
    [pytest.param(KINDS, 8, id="some"), pytest.param(tuple(VARIANTS), 60, id="all", marks=pytest.mark.slow)],
)
def test_no_text_makes_an_objective_infinite(names, examples):
    settings(max_examples=examples)(every_objective_is_finite)(names=names)


@given(
    student=st.sampled_from(STUDENTS),
    teacher=st.sampled_from(TEACHERS),
    given_texts=st.lists(
        st.tuples(any_bytes, st.integers(0, 3), st.booleans(), st.booleans()), min_size=1, max_size=2
    ),
    out_S=st.sampled_from([0.0, 0.3]),
    out_T=st.sampled_from([0.0, 0.3]),
)
def every_objective_is_finite(names, student, teacher, given_texts, out_S, out_T):
    pair = pair_of(student, teacher)
    texts = [cut_text(pair, *each) for each in given_texts]
    batch = AlignedBatch(texts, pair, CPU)
    rows, rows_T = int(batch.student.row_starts[-1]), int(batch.teacher.row_starts[-1])
    logits = logits_of(rows, pair.student.size, 1, out_S)
    logits[torch.arange(rows), batch.student.targets] = 0.0  # what was written can be
    logits_T = logits_of(rows_T, pair.teacher.size, 2, out_T)
    before = logits_of(rows, pair.student.size, 3, 0.0)
    for name in names:
        objective = VARIANTS[name]
        if needs_one_vocabulary(objective) and not pair.same:
            continue
        leaf = logits.clone().requires_grad_(True)
        inputs = LossInputs(
            batch,
            GivenLogits(leaf),
            GivenLogits(logits_T),
            GivenLogits(before),
        )
        loss = objective(inputs)
        count = objective.count(batch)
        assert math.isfinite(count), name
        found = {"total": loss.total, **loss.parts, **loss.sequence_logp, **loss.details}
        assert all(torch.isfinite(torch.as_tensor(x)).all() for x in found.values()), (name, found)
        if not loss.total.requires_grad or not leaf.numel():
            continue
        (grad,) = torch.autograd.grad(loss.total, leaf, allow_unused=True)
        assert grad is None or torch.isfinite(grad).all(), name
        if count == 0.0:
            assert float(loss.total.detach()) == 0.0, name


def test_a_cut_inside_a_character_leaves_the_rest_of_the_text_to_token_pg():
    """What the teacher cannot say is left out, token by token, and all before it is as it was."""
    pair = pair_of("byte-level", "byte-fallback")
    whole, cut = (cut_text(pair, "say it \U00050000".encode(), drop, False, True) for drop in (0, 1))
    assert cut.teacher.repaired_bytes == 3
    batch = AlignedBatch([cut], pair, CPU)
    assert batch.observed_rows.tolist() == [True] * 6 + [False] * 2
    assert AlignedBatch([whole], pair, CPU).observed_rows.all()
    assert OBJECTIVES["token_pg"]().count(batch) == 6
    logits = logits_of(8, pair.student.size, 1, 0.0).requires_grad_(True)
    rows_T = logits_of(len(cut.teacher), pair.teacher.size, 2, 0.0)
    inputs = LossInputs(batch, GivenLogits(logits), GivenLogits(rows_T))
    (grad,) = torch.autograd.grad(OBJECTIVES["token_pg"]()(inputs).total, logits)
    assert grad[:6].abs().sum(-1).min() > 0
    assert not grad[6:].any()


def test_a_span_that_the_teacher_does_not_spell_is_left_out():
    """What it says of other bytes is no probability of these."""
    pair = pair_of("characters", "words, digits")
    text = cut_text(pair, b"12 \xff 1", 0, True, True)
    batch = AlignedBatch([text], pair, CPU)
    span_S, span_T, _ = batch.spans
    assert {i for i in range(len(text.student)) if span_S[i] >= 0} == {0, 1}
    assert all(text.teacher.exact[i] for i in range(len(text.teacher)) if span_T[i] >= 0)
    assert OBJECTIVES["span_pg"]().count(batch) == int((span_S >= 0).sum())


@pytest.mark.parametrize("backend", FORCED, indirect=True)
@pytest.mark.parametrize("name", KINDS)
def test_no_objective_takes_what_is_no_number_for_nothing(name, backend):
    """A model that gives NaN is broken, and a step says so; it does not rule out what was written."""
    pair = VocabularyPair(SAME, toy_vocabulary(["b+a"]))
    texts = [aligned(pair, [*SAME.encode("ab a").ids.tolist(), SAME.stop_ids[0]])]
    for broken in (0, 1):
        models = ToyModel(pair.student, 3), ToyModel(pair.teacher, 4)
        rows = [
            m.states(s.ids, len(s.ids) + 1).float()
            for m, s in zip(models, (texts[0].student, texts[0].teacher), strict=True)
        ]
        rows[broken][:, 3] = math.nan
        assert torch.isnan(VARIANTS[name](inputs_of(pair, texts, *rows)).total)


SAME = toy_vocabulary(["a+b", "b+ ", "ab+b"], cut=None)


@pytest.mark.parametrize("backend", FORCED, indirect=True)
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_rows_that_only_one_output_matrix_has_cost_what_they_weigh(name, backend):
    """One vocabulary, matrices of different width: what lies on further rows is as good as nothing if it is small."""
    pair = VocabularyPair(SAME, SAME)
    texts = [aligned(pair, [*SAME.encode("ab a").ids.tolist(), SAME.stop_ids[0]])]
    models = ToyModel(SAME, 3), ToyModel(SAME, 4)
    rows, rows_T = (m.states(texts[0].student.ids, len(texts[0].ids)) for m in models)
    objective = OBJECTIVES[name](support="tokens")
    plain = float(objective(inputs_of(pair, texts, rows, rows_T)).total)
    for more in ((3, 0), (0, 3), (2, 3)):
        for weight, most in ((-40.0, 1e-2), (0.0, 50.0)):
            sides = (
                torch.nn.functional.pad(x, (0, n), value=weight)
                for x, n in zip((rows, rows_T), more, strict=True)
            )
            mine, theirs = sides
            mine = mine.clone().requires_grad_(True)
            value = objective(inputs_of(pair, texts, mine, theirs)).total
            assert float(value.detach()) == pytest.approx(plain, abs=most)
            assert torch.isfinite(torch.autograd.grad(value, mine)[0]).all()


@pytest.mark.parametrize("backend", FORCED, indirect=True)
@pytest.mark.parametrize("support", ["bytes", "prefix", "shared", "tokens"])
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_what_one_side_rules_out_has_a_price(name, support, backend):
    """Logits of −∞ and far below the rest, on either side, in single precision; the more likely, the dearer."""
    pair = VocabularyPair(SAME, SAME if support == "tokens" else toy_vocabulary(["a+a", "b+a", "ba+a"]))
    texts = [aligned(pair, [*SAME.encode("a a").ids.tolist(), SAME.stop_ids[0]])]
    models = ToyModel(pair.student, 3), ToyModel(pair.teacher, 4)
    b, b_T = (v.tokenizer.token_to_id("b") for v in (pair.student, pair.teacher))
    objective = OBJECTIVES[name](support=support)

    def value(gap: float, gap_T: float) -> float:
        rows = models[0].states(texts[0].student.ids, len(texts[0].ids)).float()
        rows_T = models[1].states(texts[0].teacher.ids, len(texts[0].teacher) + 1).float()
        rows[:, b] -= gap
        rows_T[:, b_T] -= gap_T
        rows.requires_grad_(True)
        total = objective(inputs_of(pair, texts, rows, rows_T)).total
        assert torch.isfinite(torch.autograd.grad(total, rows)[0]).all()
        return float(total.detach())

    near = value(0.0, 0.0)
    for gaps in ((200.0, 0.0), (0.0, 200.0), (math.inf, 0.0), (0.0, math.inf)):
        assert math.isfinite(value(*gaps))
    if name == "reverse_kl":
        assert value(0.0, math.inf) > near
    if name == "forward_kl":
        assert value(math.inf, 0.0) > near
