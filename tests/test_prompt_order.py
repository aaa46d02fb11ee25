"""The order of prompts: without state, every prompt once per epoch or as often as its weight says."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gold.data import Prompt
from gold.errors import ConfigError
from gold.prompt_order import PromptOrder


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(1, 50), st.integers(0, 30))
def test_an_order_covers_each_prompt_once_per_epoch_whatever_the_batch(count, seed, size, first_step):
    order = PromptOrder(count, seed)
    steps = range(first_step, first_step + 2 * count // size + 3)
    stream = [i for step in steps for i in order.batch(step, size)]
    skip = -first_step * size % count
    epochs = [stream[k : k + count] for k in range(skip, len(stream) - count + 1, count)]
    assert epochs
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 99), st.integers(1, 20), st.lists(st.integers(0, 50), max_size=5))
def test_an_order_remembers_nothing(count, seed, size, detour):
    fresh = PromptOrder(count, seed).batch(7, size)
    order = PromptOrder(count, seed)
    for step in detour:
        order.batch(step, 3)
    assert order.batch(7, size) == fresh


def test_an_order_is_the_same_on_every_machine_and_differs_by_seed_and_epoch():
    assert PromptOrder(8, 0).batch(0, 16) == [0, 3, 7, 5, 1, 2, 6, 4, *PromptOrder(8, 0).batch(1, 8)]
    long = PromptOrder(100, 0)
    assert long.batch(0, 100) != long.batch(1, 100)
    assert long.batch(0, 100) != PromptOrder(100, 1).batch(0, 100)


def test_an_order_refuses_what_cannot_be():
    with pytest.raises(ConfigError, match="at least one prompt"):
        PromptOrder(0, 0)
    with pytest.raises(ConfigError, match="seed is -1"):
        PromptOrder(3, -1)
    with pytest.raises(ConfigError, match="got -1 and 4"):
        PromptOrder(3, 0).batch(-1, 4)


def test_a_kept_order_is_that_of_the_file_again_and_again():
    order = PromptOrder(3, 7, "kept")
    assert [order.batch(step, 2) for step in range(3)] == [[0, 1], [2, 0], [1, 2]]


WEIGHTS = st.lists(st.sampled_from([0.0, 0.25, 1.0, 1.0, 3.0, 1e-9, 1e9]), min_size=1, max_size=30).filter(
    any
)


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 99), st.integers(0, 5))
def test_a_prompt_is_drawn_in_every_epoch_as_often_as_its_weight_says(weights, seed, epoch):
    order = PromptOrder(len(weights), seed, weights=np.array(weights))
    counts = Counter(order.batch(epoch, len(weights)))
    for index, weight in enumerate(weights):
        expected = len(weights) * weight / sum(weights)
        assert abs(counts[index] - expected) < 1 + 1e-6
        assert weight or not counts[index]


def test_weights_are_met_over_epochs_and_equal_ones_change_nothing():
    prompts = [Prompt(str(i), "x", weight=w) for i, w in enumerate((1.0, 0.5, 0.3, 0.2))]
    counts = Counter(PromptOrder.of(prompts, 3).batch(0, 4 * 2000))
    assert [counts[i] / 2000 for i in range(4)] == pytest.approx([2, 1, 0.6, 0.4], abs=0.05)
    equal = [Prompt(str(i), "x", weight=0.3) for i in range(9)]
    assert PromptOrder.of(equal, 3).batch(1, 9) == PromptOrder(9, 3).batch(1, 9)


def test_weights_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="all weights of the prompts are 0"):
        PromptOrder.of([Prompt("a", "x", weight=0.0)], 0)
    with pytest.raises(ConfigError, match=r"data\.weight: .*set data\.order to shuffled"):
        PromptOrder(2, 0, "kept", np.ones(2))
