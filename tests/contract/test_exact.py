"""Clause 8a of evaluations: the divergence between two sources of text, whatever tokens they are written in."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.contract import source

FAST = ("overlapping", "byte fallback", "characters as bytes", "letters and merges")
EVERY = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in source.PAIRS]
ALL = 1e-9
"""The least share of a branch with which nothing is left out that a toy ever writes."""


@pytest.mark.parametrize("name", EVERY)
def test_one_source_in_two_tokenizers_is_at_zero(name):
    texts = source.texts_of(name, 0, 3)
    for least in (None, 0.3, ALL):
        value, bound = source.exact_divergence(name, texts, texts, least)
        assert bound == pytest.approx(0.0, abs=1e-9)
    assert value == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_two_sources_are_at_their_true_divergence_and_never_below_the_bound(name):
    mine, theirs = source.texts_of(name, 0, 3), source.texts_of(name, 50, 3)
    true = source.true_kl(mine, theirs)
    bounds = [source.exact_divergence(name, mine, theirs, least)[1] for least in (None, 0.2)]
    value, last = source.exact_divergence(name, mine, theirs, ALL)
    assert value == pytest.approx(true, abs=1e-6)
    assert [*bounds, last] == sorted([*bounds, last])
    assert last <= true + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", source.PAIRS)
@pytest.mark.parametrize("seeds", [(0, 50), (1, 51), (2, 1)])
def test_the_bound_rises_with_every_branch(name, seeds):
    mine, theirs = (source.texts_of(name, seed) for seed in seeds)
    true = source.true_kl(mine, theirs)
    levels = (None, 0.7, 0.4, 0.2, 0.1, 0.03, 0.01, ALL)
    bounds = [source.exact_divergence(name, mine, theirs, least)[1] for least in levels]
    assert all(below <= above + 1e-12 for below, above in pairwise(bounds))
    assert bounds[-1] == pytest.approx(true, abs=1e-6)
    assert bounds[-1] <= true + 1e-9
