"""Padding on either side, and the states that predict a completion's tokens."""

from __future__ import annotations

import numpy as np
import torch

from gold.models.padding import PaddedStates, padded

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
