"""Padding on either side, and the states that predict a completion's tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from gold.models.padding import PaddedStates, batches_by_length, padded, ragged_batches

CPU = torch.device("cpu")


def test_texts_of_unlike_length_fill_one_rectangle() -> None:
    ids, mask = padded([[5, 6, 7], [8]], 0, CPU)
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    ids, mask = padded([[5, 6, 7], [8]], 0, CPU, left=True)
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])


def test_the_state_before_a_token_predicts_it() -> None:
    texts = [np.array([7, 8], np.int32), np.array([9], np.int32)]
    states = PaddedStates.of([[5, 6], [5]], texts, [3, 1], 0, CPU)
    assert states.input_ids.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    # The last prompt token predicts the first of a completion; the last token of the first text, its stop.
    assert list(zip(states.sequence.tolist(), states.position.tolist(), strict=True)) == [
        (0, 1), (0, 2), (0, 3), (1, 0),
    ]  # fmt: skip


@given(st.lists(st.integers(0, 60), max_size=30), st.integers(1, 150))
def test_batches_by_length_pad_to_no_more_tokens_than_allowed(lengths: list[int], tokens: int) -> None:
    groups = batches_by_length(lengths, tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(1, *(lengths[i] for i in group)) <= tokens
    ordered = [lengths[i] for group in groups for i in group]
    assert ordered == sorted(lengths, reverse=True)
    for group, after in pairwise(groups):  # no batch leaves out the next text that would fit
        assert (len(group) + 1) * max(1, lengths[group[0]]) > tokens or not after


@given(st.lists(st.integers(0, 60), max_size=9), st.integers(1, 150))
def test_ragged_batches_have_the_fewest_padded_tokens(lengths: list[int], tokens: int) -> None:
    groups = ragged_batches(lengths, tokens)
    ordered = sorted(lengths, reverse=True)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert [lengths[i] for group in groups for i in group] == ordered

    def cost(cut: list[list[int]]) -> float:
        if any(len(group) > 1 and len(group) * max(group) > tokens for group in cut):
            return math.inf
        return sum(len(group) * max(group) + tokens / 16 for group in cut)

    def cuts(texts: list[int]) -> Iterator[list[list[int]]]:
        if not texts:
            yield []
        for size in range(1, len(texts) + 1):
            for rest in cuts(texts[size:]):
                yield [texts[:size], *rest]

    assert cost([[lengths[i] for i in group] for group in groups]) == min(map(cost, cuts(ordered)))
