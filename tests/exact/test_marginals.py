"""Sums over a text's own tokens and over branches, beside sums over every way to read the text."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle

from gold.bytes.trie import ByteTrie
from gold.exact.divergence import ExactText
from gold.exact.marginals import marginals
from gold.kernels.layout import KernelTrie
from gold.kernels.logits import GivenLogits, TopKLogits
from gold.kernels.tables import byte_tables
from tests.contract import source
from tests.contract.toys import BranchStates, ToyModel, aligned, batch_of

NAMES = ("overlapping", "byte fallback", "characters as bytes", "a space cut off")


def spelled(vocabulary):
    return [None if vocabulary.is_special[i] else vocabulary.token_bytes(i) for i in range(vocabulary.size)]


def exact_next(model, text):
    """P(text so far, then each byte or the stop event), over every token sequence: [L + 1, 257]."""
    vocabulary = model.vocabulary
    found = np.zeros((len(text) + 1, 257))
    for e in range(len(text) + 1):
        for weight, ids, begin in oracle.readings(
            lambda c: model.logp(c).exp(), spelled(vocabulary), text[:e], vocabulary.stop_ids
        ):
            last = ids[-1]
            event = 256 if last in vocabulary.stop_ids else vocabulary.token_bytes(last)[e - begin]
            found[e, event] += weight
    return found


def random_text(vocabulary, rng, longest=4):
    """Tokens that a model may sample, canonical or not."""
    ids = [i for i in range(vocabulary.size) if not vocabulary.is_special[i]]
    return vocabulary.decode(rng.choice(ids, rng.integers(0, longest)).tolist())


def found_of(model, text, stopped, least, most=10**6):
    trie = KernelTrie(ByteTrie.of(model.vocabulary))
    states = BranchStates(model.row, text.ids, text.ids.size + stopped)
    return marginals(model.vocabulary, trie, text, stopped, states, least, most)


@settings(max_examples=12)
@given(st.sampled_from(NAMES), st.booleans(), st.integers(0, 2**32 - 1))
def test_with_all_branches_they_are_the_sums_over_every_segmentation(name, mine, seed):
    pair, rng = source.pair_of(name), np.random.default_rng(seed)
    vocabulary = pair.student if mine else pair.teacher
    model = ToyModel(vocabulary, int(rng.integers(100)))
    text = random_text(vocabulary, rng)
    found = found_of(model, text, True, 1e-12)
    truth = exact_next(model, text.data)
    assert np.exp(found.named[:, :257]) == pytest.approx(truth, abs=1e-12)
    assert np.exp(found.strict_rest).max() < 1e-12


@settings(max_examples=12)
@given(st.sampled_from(NAMES), st.integers(0, 2**32 - 1))
def test_what_is_named_grows_and_the_truth_stays_between(name, seed):
    pair, rng = source.pair_of(name), np.random.default_rng(seed)
    model = ToyModel(pair.student, int(rng.integers(100)))
    text = random_text(pair.student, rng)
    truth = exact_next(model, text.data)
    levels = (None, 0.5, 0.2, 0.05, 0.01, 1e-12)
    all_found = [found_of(model, text, True, least) for least in levels]
    for less, more in pairwise(all_found):
        assert (more.named >= less.named - 1e-12).all()
        assert (more.strict_rest <= less.strict_rest + 1e-12).all()
    for found in (*all_found, found_of(model, text, True, 1e-12, 2)):
        named = np.exp(found.named)
        assert (named[:, :257] <= truth + 1e-12).all()
        assert (named[:, :257].sum(-1) + np.exp(found.strict_rest) >= truth.sum(-1) - 1e-12).all()


@settings(max_examples=12)
@given(st.integers(0, 2**32 - 1))
def test_without_branches_they_are_the_byte_table(seed):
    pair, rng = source.pair_of("overlapping"), np.random.default_rng(seed)
    model = ToyModel(pair.student, int(rng.integers(100)), extra=2)
    text = random_text(pair.student, rng)
    ids = text.ids.tolist()
    stopped = bool(rng.random() < 0.5) or not ids
    found = found_of(model, text, stopped, None)
    whole = aligned(pair, [*ids, *pair.student.stop_ids[:stopped]])
    layout = batch_of(pair, [whole]).student.layout
    states = BranchStates(model.row, ids, len(ids) + stopped)
    table = byte_tables(states.path(), layout)[0].exp().numpy()
    at, rest = found.known, np.logaddexp(found.open, found.named[:, 257])
    events = np.concatenate((found.named[:, :257], rest[:, None]), axis=1)[at]
    share = np.exp(events - np.logaddexp.reduce(events, axis=1)[:, None])
    assert share == pytest.approx(table[at], abs=1e-12)


@settings(max_examples=12)
@given(st.integers(0, 2**32 - 1))
def test_the_bound_is_below_the_divergence_at_every_byte_and_rises(seed):
    pair, rng = source.pair_of("overlapping"), np.random.default_rng(seed)
    models = ToyModel(pair.student, int(rng.integers(100))), ToyModel(pair.teacher, int(rng.integers(100)))
    text = random_text(pair.student, rng)
    others = pair.to_teacher(text)
    truths = []
    for model in models:  # what is no text is an event too
        next_ = exact_next(model, text.data)
        outside = found_of(model, model.vocabulary.encode(text.data), True, 1e-12)
        next_ = np.concatenate((next_, np.exp(outside.named[:, 257:])), axis=1)
        truths.append(next_ / next_.sum(-1, keepdims=True))
    p, q = truths
    with np.errstate(divide="ignore", invalid="ignore"):
        truth = np.where(p > 0, p * np.log(p / q), 0.0).sum(-1)
    before = np.zeros_like(truth)
    for least in (None, 0.2, 0.03, 1e-12):
        sides = [found_of(model, own, True, least) for model, own in zip(models, (text, others), strict=True)]
        found = ExactText.of(*sides)
        assert (found.bound <= truth + 1e-9).all()
        assert (found.bound >= before - 1e-9).all()
        assert (found.bound <= found.value + 1e-9).all()
        before = found.bound
    assert found.value == pytest.approx(truth, abs=1e-9)


def test_unknown_tokens_of_partial_rows_are_in_the_rest():
    pair = source.pair_of("overlapping")
    model = ToyModel(pair.student, 3)
    text = pair.student.encode("ab")
    whole = found_of(model, text, True, 1e-12)

    class Known(BranchStates):
        def path(self):
            return partial(super().path())

        def behind(self, parents, tokens):
            return partial(super().behind(parents, tokens))

    def partial(rows):
        logp, ids = torch.log_softmax(rows.logits(), -1).topk(3, -1)
        return TopKLogits(ids, logp, pair.student.size)

    states = Known(model.row, text.ids, text.ids.size + 1)
    found = marginals(pair.student, pair.kernel_tries[0], text, True, states, 1e-12)
    assert (found.named <= whole.named + 1e-9).all()
    total = np.logaddexp.reduce(whole.named, 1)
    known = np.logaddexp(np.logaddexp.reduce(found.named, 1), found.strict_rest)
    assert (known >= total - 1e-9).all()
    assert (found.unknown > -np.inf).any()


def test_no_branch_is_longer_than_the_model_can_read():
    pair = source.pair_of("overlapping")
    model, text = ToyModel(pair.student, 3), pair.student.encode("abab")
    asked = []

    class Short(BranchStates):
        def behind(self, parents, tokens):
            rows = super().behind(parents, tokens)
            asked.extend(len(c) for c in self.contexts)
            return rows

    states = Short(model.row, text.ids, text.ids.size + 1)
    states.room = text.ids.size + 1
    found = marginals(pair.student, pair.kernel_tries[0], text, True, states, 1e-12)
    assert max(asked) == states.room < len(text.data)
    assert (found.open > -np.inf).any()


@pytest.mark.parametrize("stopped", [True, False])
def test_a_text_without_bytes(stopped):
    """Nothing follows a text that was cut off before its first byte; the stop event may follow it otherwise."""
    pair = source.pair_of("overlapping")
    sides = []
    for model in (ToyModel(pair.student, 3), ToyModel(pair.teacher, 4)):
        text = model.vocabulary.encode("")
        rows = model.states((), int(stopped))
        states = BranchStates(model.row, text.ids, 0)
        states.path = lambda rows=rows: GivenLogits(rows)
        sides.append(
            marginals(
                model.vocabulary, KernelTrie(ByteTrie.of(model.vocabulary)), text, stopped, states, 0.01
            )
        )
    found = ExactText.of(*sides)
    assert found.value.size == int(stopped)
    assert np.isfinite(found.value).all()


def test_chains_save_passes_and_change_nothing_that_is_followed(monkeypatch):
    vocabulary = source.pair_of("one merge more").student
    habit = torch.full((vocabulary.size,), -3.0, dtype=torch.float64)
    for text, logit in (("ab", 5.0), ("a", 0.0), ("b", 5.0)):
        habit[vocabulary.encode(text).ids[0]] = logit
    model, text = ToyModel(vocabulary, 0), vocabulary.encode("ab" * 12)
    monkeypatch.setattr(ToyModel, "row", lambda self, context: habit)
    chained = found_of(model, text, True, 2e-3)
    monkeypatch.setattr("gold.exact.marginals.CHAIN", 0)
    one_by_one = found_of(model, text, True, 2e-3)
    assert chained.passes < one_by_one.passes / 2
    assert chained.branches >= one_by_one.branches
    assert (chained.named >= one_by_one.named - 1e-12).all()
