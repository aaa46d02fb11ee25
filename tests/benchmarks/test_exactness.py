"""The sums that byte tables and prefix targets are held against, on toy models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import oracle

from benchmarks.exactness import CanonicalModel, marginals, sampled, toy_bytes, toy_prob
from gold.bytes.trie import ByteTrie
from tests.contract.toys import ToyModel, toy_vocabulary

VOCABULARY = toy_vocabulary(["a+b", "b+ ", "ab+b"], cut=None)
SPELLED = [VOCABULARY.token_bytes(i) or None for i in range(VOCABULARY.size)]


@pytest.mark.parametrize("seed", range(4))
def test_marginals_are_the_sums_over_all_ways_to_read_a_text(seed):
    model = ToyModel(VOCABULARY, seed, never=("<junk>",))
    ids = VOCABULARY.encode("abb ab"[seed:]).ids.tolist() + VOCABULARY.encode("a").ids.tolist()
    text = VOCABULARY.decode(ids).data
    found = marginals(toy_prob(model), VOCABULARY, ByteTrie.of(VOCABULARY), ids, text, spans=[(1, 3)])

    def prob(context: tuple[int, ...]) -> torch.Tensor:
        return torch.softmax(model.row(context), -1)

    for e in range(len(text) + 1):
        expected = np.zeros(257)
        for weight, read, begin in oracle.readings(prob, SPELLED, text[:e], VOCABULARY.stop_ids):
            last = SPELLED[read[-1]]
            expected[256 if last is None else last[e - begin]] += weight
        np.testing.assert_allclose(found.next_byte[e], expected, rtol=1e-9, atol=1e-15)
    # Of text[:3] what has a token that begins at byte 0 or 1 and reaches byte 3: one letter may stand before it.
    letter = SPELLED.index(text[:1])
    along = reaching(prob(()), text[:3]) + float(prob(())[letter]) * reaching(prob((letter,)), text[1:3])
    assert found.along[1, 3] == pytest.approx(along, rel=1e-9)
    assert found.left_out.max() == 0


def reaching(prob: torch.Tensor, text: bytes) -> float:
    return sum(float(prob[v]) for v, token in enumerate(SPELLED) if token and token.startswith(text))


def test_what_is_not_followed_is_told():
    model = ToyModel(VOCABULARY, 1, never=("<junk>",))
    ids = VOCABULARY.encode("abb ab").ids.tolist()
    text, trie = VOCABULARY.decode(ids).data, ByteTrie.of(VOCABULARY)
    whole, part, none = (
        marginals(toy_prob(model), VOCABULARY, trie, ids, text, **limits)
        for limits in ({}, {"least": 0.1}, {"window": 0})
    )
    assert whole.sequences > part.sequences > none.sequences == 0
    assert whole.left_out.max() == 0
    assert part.left_out.max() > 0
    assert (part.prefix <= whole.prefix + 1e-15).all()
    assert none.other_pasts.max() < 1e-12


def test_a_canonical_model_writes_what_its_tokenizer_writes():
    model = CanonicalModel(VOCABULARY, 3, never=("<junk>",))
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = sampled(model, rng, 6)
        assert VOCABULARY.encode(VOCABULARY.decode(ids).data).ids.tolist() == ids


def test_byte_tables_of_toys_are_summed_up():
    row = toy_bytes("a b c + ab bc abc ca", "any", 4)
    assert 0 < row["share_exact"] <= row["share_exact_up_to_rest"] <= 1
    assert row["tv"]["mean"] < row["tv_last_state"]["mean"]
