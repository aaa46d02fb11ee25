"""States behind branches of a text: read as a tree, or each with all that is before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.architectures import KINDS, tiny_lm, wrapped

from gold.models.branches import TextStates, reads_trees, window_of

TREES = ("llama", "gemma3_text", "gpt2", "qwen3", "phi3")
NO_TREES = ("mamba", "bloom")
"""A recurrent state, and positions that a mask tells."""


def rows_of(model, tree):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, model.vocabulary.size, 6).astype(np.int32)
    states = TextStates(model, [5, 6], ids, 7, tree=tree)
    found = [states.path()]
    found.append(states.behind(np.array([-1, -7, -3, 2, 3]), np.array([3, 4, 5, 6, 7])))
    found.append(states.behind(np.array([4, 0]), np.array([8, 9])))
    with torch.no_grad():
        return torch.cat([torch.log_softmax(rows.logits().double(), -1) for rows in found]).numpy()


def plainly(model):
    """Every state by a forward pass of its own."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, model.vocabulary.size, 6).tolist()
    paths = [ids[:k] for k in range(7)]
    paths += [[3], [*ids, 4], [*ids[:2], 5], [*ids[:2], 5, 6], [*ids[:2], 5, 6, 7]]
    paths += [[*ids[:2], 5, 6, 7, 8], [3, 9]]
    with torch.no_grad():
        rows = [model.lm(torch.tensor([[5, 6, *path]])).logits[0, -1] for path in paths]
    return torch.log_softmax(torch.stack(rows).double(), -1)


@pytest.mark.parametrize("kind", [*TREES, *NO_TREES])
def test_states_behind_branches_are_those_of_a_forward_pass(kind):
    model = wrapped(tiny_lm(kind))
    assert reads_trees(model) == (kind in TREES)
    for tree in (True, False) if kind in TREES else (False,):
        assert rows_of(model, tree) == pytest.approx(plainly(model).numpy(), abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_architecture_gives_other_states_than_a_forward_pass(kind):
    try:
        model = wrapped(tiny_lm(kind))
    except Exception as error:
        pytest.skip(f"no tiny model: {error}")
    assert rows_of(model, None) == pytest.approx(plainly(model).numpy(), abs=2e-3)


@pytest.mark.parametrize("kind", ["mistral"])
def test_a_text_longer_than_the_window_of_all_layers_is_read_plainly(kind):
    model = wrapped(tiny_lm(kind))
    assert window_of(model) == 8
    assert rows_of(model, None) == pytest.approx(plainly(model).numpy(), abs=2e-4)
