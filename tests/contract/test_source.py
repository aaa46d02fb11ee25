"""What divergences on policy are not: 0 between two tokenizations of one source, the gradient of their expectation."""

from __future__ import annotations

import pytest
import torch
from support import oracle

from gold.align.vocabularies import VocabularyPair
from gold.losses import OBJECTIVES
from tests.contract import source
from tests.contract.toys import ToyModel, aligned, inputs_of


@pytest.mark.parametrize(
    ("pair", "value", "share"),
    [("other merges", 0.149, 0.86), ("merges and letters", 0.039, 0.10), ("letters and merges", 0.035, 0.24)],
)
@pytest.mark.slow
def test_the_floor_of_reverse_kl_on_bytes_is_what_the_documentation_says(pair, value, share):
    """Between two writers of one source, and its expected gradient beside that towards another source."""
    mine, other = source.source(0, 4), source.source(50, 4)
    objective = OBJECTIVES["reverse_kl"]()
    floor, norm = source.expected(objective, source.pair_of(pair), mine, mine)
    _, beside = source.expected(objective, source.pair_of(pair), mine, other)
    assert floor == pytest.approx(value, abs=0.002)
    assert norm / beside == pytest.approx(share, abs=0.02)


def gradients(pair: VocabularyPair, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the expected sum of reverse KL on bytes over a student's texts: the expectation of each text's gradient, and
    the gradient of the expectation, which follows how likely the texts are too."""
    student = ToyModel(pair.student, seed, longest=2, requires_grad=True, never=("<junk>",))
    teacher = ToyModel(pair.teacher, seed + 100, never=("<junk>",))
    objective = OBJECTIVES["reverse_kl"]()
    within = across = torch.zeros((), dtype=torch.float64)
    for ids, logp in oracle.sequences(student.logp, pair.student.stop_ids, 3):
        total = objective(inputs_of(pair, [aligned(pair, list(ids))], student, teacher)).total
        within = within + logp.detach().exp() * total
        across = across + logp.exp() * total.detach()
    leaves = list(student.rows.values())
    parts = []
    for part in (within, across):
        grads = torch.autograd.grad(part, leaves, allow_unused=True)
        parts.append(
            torch.cat([torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)])
        )
    return parts[0], parts[0] + parts[1]


@pytest.mark.parametrize(
    ("pair", "seed", "cosine"),
    [
        ("other merges", 2, 0.66),
        ("merges and letters", 1, 0.43),
        ("letters and merges", 1, -0.12),
        ("letters and merges", 2, -0.54),
    ],
)
def test_the_gradient_of_a_divergence_on_policy_is_not_that_of_its_expectation(pair, seed, cosine):
    """Nothing in it says that the student comes to other states; ``token_pg`` is what says that."""
    semi, full = gradients(source.pair_of(pair), seed)
    assert float(semi @ full / (semi.norm() * full.norm())) == pytest.approx(cosine, abs=0.01)
