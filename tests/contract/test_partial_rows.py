"""Teachers of which only the likeliest tokens of each row are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gold.align.vocabularies import VocabularyPair
from gold.kernels.logits import GivenLogits, LazyLogits, TopKLogits
from gold.losses import DIVERGENCES, OBJECTIVES
from tests.contract.toys import ToyModel, inputs_of, random_texts, teacher_rows, toy_vocabulary

STUDENT = toy_vocabulary(["a+b", "b+ ", "ab+b"], cut=None)
TEACHER = toy_vocabulary(["a+a", "b+a", "ba+a"])
PAIR = VocabularyPair(STUDENT, TEACHER)
SAME = VocabularyPair(STUDENT, STUDENT)


def likeliest(logits: Tensor, k: int) -> LazyLogits:
    """The rows as a server would send them: the k likeliest tokens of each."""
    logp, ids = torch.log_softmax(logits, -1).topk(k, dim=-1)
    return TopKLogits(ids, logp, logits.shape[1])


def test_rows_of_the_likeliest_tokens_keep_all_mass():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = likeliest(logits, 4)
    dense = rows.logits()
    torch.testing.assert_close(dense.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    prob = torch.softmax(logits, -1)
    kept = torch.isfinite(dense[:, :9])
    assert (kept.sum(-1) == 4).all()
    torch.testing.assert_close(dense[:, :9][kept].exp(), prob[kept])
    torch.testing.assert_close(dense[:, 9].exp(), prob.masked_fill(kept, 0.0).sum(-1))
    padded = TopKLogits(torch.tensor([[3, -1]]), torch.tensor([[-0.5, 0.7]]), 9)
    (row,) = padded.logits()
    assert row.isfinite().nonzero()[:, 0].tolist() == [3, 9]


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("support", ["bytes", "shared"])
def test_all_tokens_known_is_full_rows(name, support):
    texts = random_texts(PAIR, 6, 1)
    inputs = inputs_of(PAIR, texts, ToyModel(STUDENT, 3), ToyModel(TEACHER, 4))
    rows = teacher_rows(ToyModel(TEACHER, 4), texts)
    known = replace(inputs, teacher=likeliest(rows, rows.shape[1]))
    objective = OBJECTIVES[name](support=support)
    assert float(objective(known).total) == pytest.approx(float(objective(inputs).total), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("support", ["bytes", "shared"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_fewer_tokens_give_something_finite_and_never_more_than_all(name, support, k):
    texts = random_texts(PAIR, 6, 1)
    inputs = inputs_of(PAIR, texts, ToyModel(STUDENT, 3), ToyModel(TEACHER, 4))
    logits = inputs.student.logits().requires_grad_(True)
    teacher = likeliest(teacher_rows(ToyModel(TEACHER, 4), texts), k)
    value = OBJECTIVES[name](support=support)(replace(inputs, teacher=teacher)).total
    (grad,) = torch.autograd.grad(value, logits)
    assert torch.isfinite(grad).all()
    assert value.item() >= 0
    if support == "shared" and name != "entropy_aware_kl":
        # Fewer events told apart: a coarser comparison of the same two distributions.
        whole = OBJECTIVES[name](support=support)(inputs).total
        assert value.item() <= whole.item() + 1e-9


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_equal_models_give_nothing_to_learn_from_the_likeliest_tokens(name):
    """On tokens exactly; on bytes, the tail's own first bytes are hidden: by no more than the tail's mass allows."""
    texts = random_texts(SAME, 8, 1)
    model = ToyModel(STUDENT, 3)
    inputs = inputs_of(SAME, texts, model, model)
    rows = teacher_rows(model, texts)
    exact = OBJECTIVES[name](support="tokens")(replace(inputs, teacher=likeliest(rows, 3))).total
    assert abs(float(exact)) < 1e-12
    errors = [
        float(OBJECTIVES[name]()(replace(inputs, teacher=likeliest(rows, k))).total)
        for k in (2, 5, rows.shape[1])
    ]
    assert errors[0] > errors[1] > errors[2] - 1e-12
    assert abs(errors[2]) < 1e-4


def test_what_is_not_told_is_left_to_the_student():
    """A server tells the sent token and the likeliest. Were all else outside the path, then inside a token that is not
    among the likeliest, the rest of it would seem certain: the loss is thrice the true one, the gradient half noise."""
    texts = random_texts(PAIR, 8, 1)
    logits = teacher_rows(ToyModel(TEACHER, 4), texts)
    inputs = inputs_of(PAIR, texts, ToyModel(STUDENT, 3), ToyModel(TEACHER, 4))
    logp, sent = torch.log_softmax(logits, -1), inputs.batch.teacher.targets.clamp(min=0)[:, None]
    found, ids = logp.topk(2, dim=-1)
    ids = torch.cat((sent, ids.masked_fill(ids == sent, -1)), dim=-1)
    told = TopKLogits(ids, torch.cat((logp.gather(1, sent), found), dim=-1), logits.shape[1])
    values, grads = [], []
    for seen in (inputs, replace(inputs, teacher=told)):
        mine = inputs.student.logits().detach().clone().requires_grad_(True)
        student = GivenLogits(mine)
        value = OBJECTIVES["reverse_kl"](support="bytes")(replace(seen, student=student)).total
        (grad,) = torch.autograd.grad(value, mine)
        values.append(value.item())
        grads.append(grad.flatten())
    assert 0 < values[1] < values[0]
    assert torch.cosine_similarity(*grads, dim=0) > 0.75
