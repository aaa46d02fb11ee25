"""Weights for texts of an older policy, against sums over all texts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import oracle
from torch import Tensor

from gold.align.vocabularies import VocabularyPair
from gold.kernels.logits import GivenLogits
from gold.losses import OBJECTIVES, Objective
from gold.losses.importance import ImportanceWeights
from tests.contract.toys import ToyModel, aligned, batch_of, inputs_of, toy_vocabulary

STUDENT = toy_vocabulary(["a+b"], letters="ab", cut=None)
LETTERS = toy_vocabulary([], letters="ab", cut=None)
LONGER = toy_vocabulary(["b+a"], letters="ab", cut=None)
LONGEST = 2


def models() -> tuple[ToyModel, ToyModel]:
    """The student now, and as it was when it sampled."""
    now = ToyModel(STUDENT, 1, longest=LONGEST, requires_grad=True, never=("<junk>",))
    before = ToyModel(STUDENT, 5, longest=LONGEST, scale=0.5, never=("<junk>",))
    return now, before


def expected_gradient(
    objective: Objective, pair: VocabularyPair, policy: ToyModel, student: ToyModel, cap: float | None
) -> list[Tensor]:
    """The gradient of the expected loss over all texts of ``policy``, weighted if there is a cap."""
    teacher = ToyModel(pair.teacher, 2)
    total = torch.zeros((), dtype=torch.float64)
    for ids, logp in oracle.sequences(policy.logp, STUDENT.stop_ids, LONGEST + 1):
        rows = [policy.logp(ids[:k])[v].item() for k, v in enumerate(ids)]
        text = aligned(pair, list(ids), sampling_logprobs=np.array(rows))
        inputs = inputs_of(pair, [text], student, teacher)
        if cap is not None:
            weights = ImportanceWeights.of(inputs.batch, inputs.student, cap)
            inputs = replace(inputs, importance=weights)
        total = total + logp.detach().exp() * objective(inputs).total
    leaves = list(student.rows.values())
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def distance(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest difference of two gradients."""
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def three(
    name: str, pair: VocabularyPair, **options: object
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The expected gradients: of the student's own texts, of older texts with weights, and without."""
    now, before = models()
    objective = OBJECTIVES[name](**options)
    for ids, _ in oracle.sequences(before.logp, STUDENT.stop_ids, LONGEST + 1):
        now.states(ids, len(ids))  # all states exist before they are differentiated
    own = expected_gradient(objective, pair, now, now, None)
    return (
        own,
        expected_gradient(objective, pair, before, now, np.inf),
        expected_gradient(objective, pair, before, now, None),
    )


@pytest.mark.parametrize(
    ("name", "options", "teacher"),
    [
        ("reverse_kl", {}, LETTERS),
        ("forward_kl", {}, LETTERS),
        ("reverse_kl", {"half_life": 1.5}, LETTERS),
        ("reverse_kl", {"support": "shared"}, LETTERS),
        ("reverse_kl", {"support": "prefix"}, LETTERS),
        ("reverse_kl", {"support": "tokens"}, STUDENT),
        ("gkd", {}, STUDENT),
        ("reference_kl", {}, STUDENT),
    ],
    ids=str,
)
def test_without_a_cap_divergences_of_older_texts_have_the_gradient_of_the_students_own(
    name, options, teacher
):
    """Exact where the teacher's tokens up to a state do not depend on what the student writes after it."""
    own, weighted, plain = three(name, VocabularyPair(STUDENT, teacher), **options)
    assert distance(own, weighted) < 1e-9
    assert distance(own, plain) > 1e-3


def test_retokenised_text_is_corrected_up_to_what_follows_the_state():
    """A teacher's token that crosses a state depends on the text after it, which the older policy wrote."""
    own, weighted, plain = three("reverse_kl", VocabularyPair(STUDENT, LONGER))
    assert 1e-9 < distance(own, weighted) < 0.5 * distance(own, plain)


@pytest.mark.parametrize("name", ["opd", "span_pg"])
def test_policy_gradients_are_corrected_in_the_token_but_not_in_the_state(name):
    """The first token of a text has no state before it: its share of the gradient is that of the student's own texts,
    where the advantage depends on the token alone; later tokens keep a bias, smaller than without weights."""
    pair = VocabularyPair(STUDENT, STUDENT)
    own, weighted, plain = three(name, pair)
    assert distance(own[:1], weighted[:1]) < 1e-9
    assert distance(own[:1], plain[:1]) > 1e-3
    assert 1e-9 < distance(own, weighted) < distance(own, plain)


def test_weights_are_products_of_ratios_up_to_the_cap():
    pair = VocabularyPair(STUDENT, LETTERS)
    texts = [aligned(pair, [*STUDENT.encode(t).ids.tolist(), STUDENT.stop_ids[0]]) for t in ("abb", "", "b")]
    texts.append(aligned(pair, STUDENT.encode("aab").ids.tolist()))
    batch = batch_of(pair, texts)
    log_ratio = torch.linspace(-0.5, 0.7, batch.tokens, dtype=torch.float64)
    weights = ImportanceWeights(log_ratio, 1.4)
    state, position = [], []
    row = 0
    for text in texts:
        before, at = 0.0, [0.0] * (len(text.student.data) + 1)
        ends = [*text.student.ends.tolist(), *([len(text.student.data)] * text.stopped)]
        starts = [*text.student.starts.tolist(), *([len(text.student.data)] * text.stopped)]
        for k in range(len(text.ids)):
            state.append(before)
            before += float(log_ratio[row])
            for p in range(starts[k] + 1, ends[k] + 1):
                at[p] = before
            row += 1
        position += at
    capped = [min(float(np.exp(x)), 1.4) for x in state]
    assert 1.4 in capped
    torch.testing.assert_close(weights.of_states(batch), torch.tensor(capped, dtype=torch.float64))
    expected = torch.tensor(np.minimum(np.exp(position), 1.4))
    torch.testing.assert_close(weights.of_positions(batch), expected)
    torch.testing.assert_close(weights.of_tokens(), log_ratio.exp().clamp(max=1.4))


def test_texts_of_the_current_weights_have_weight_one():
    pair, (now, _) = VocabularyPair(STUDENT, LETTERS), models()
    ids = [*STUDENT.encode("ab").ids.tolist(), STUDENT.stop_ids[0]]
    logp = np.array([now.logp(ids[:k])[v].item() for k, v in enumerate(ids)])
    inputs = inputs_of(pair, [aligned(pair, ids, sampling_logprobs=logp)], now, ToyModel(LETTERS, 2))
    weights = ImportanceWeights.of(inputs.batch, inputs.student, 2.0)
    assert float(weights.log_ratio.abs().max()) < 1e-12
    statistics = weights.statistics(inputs.batch)
    assert float(statistics["ratio_k3"]) < 1e-12
    assert float(statistics["ratio_max"]) == pytest.approx(1.0)
    assert float(statistics["ratio_capped"]) == 0


def test_statistics_of_a_batch_without_rows():
    pair = VocabularyPair(STUDENT, LETTERS)
    batch = batch_of(pair, [aligned(pair, [])])
    empty = ImportanceWeights.of(batch, GivenLogits(torch.zeros(0, STUDENT.size)), 2.0)
    assert float(empty.statistics(batch)["ratio_tokens"]) == 0
    assert empty.of_positions(batch).tolist() == [1.0]
