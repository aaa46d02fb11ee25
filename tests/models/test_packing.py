"""Texts packed into one row have the states, losses and gradients of padded ones, or their model is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tiny_models as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.architectures import SIZE, tiny_lm

from gold.errors import ModelError
from gold.kernels.lm_head import token_logp
from gold.models.hidden_states import lazy_logits, recompute_activations
from gold.models.padding import PaddedStates, packed_batches
from gold.models.probe import check_packing
from gold.train.loop import Saving, distill
from gold.train.recipe import Recipe, Term

CPU = torch.device("cpu")
PACKED = ("llama", "mistral", "gemma3_text", "qwen3", "gpt2", "qwen3_moe")
REFUSED = ("mamba", "jamba", "rwkv", "gpt_oss", "gemma2", "bloom")


def gradients(lm: Any, states: PaddedStates, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of tokens, and the gradient of their sum."""
    lm.zero_grad(set_to_none=True)
    logp, _ = token_logp(lazy_logits(lm, states), target, torch.zeros(0, dtype=torch.int64))
    logp.sum().backward()
    grads = [p.grad.flatten() for p in lm.parameters() if p.grad is not None]
    return logp.detach(), torch.cat(grads)


@pytest.mark.parametrize("kind", PACKED)
def test_packed_texts_are_read_as_padded_ones(kind: str) -> None:
    lm = tiny_lm(kind)
    rng = np.random.default_rng(0)
    # Past the sliding windows of 8 tokens.
    texts = [rng.integers(3, SIZE, n).astype(np.int32) for n in (21, 1, 9, 30, 4)]
    prompts = [rng.integers(3, SIZE, n).tolist() for n in (3, 12, 1, 2, 25)]
    rows = [text.size for text in texts]
    target = torch.from_numpy(np.concatenate(texts).astype(np.int64))
    padded = PaddedStates.of(prompts, texts, rows, 0, CPU)
    want = gradients(lm, padded, target)
    check_packing(lm, "tiny")
    states = PaddedStates.packed(prompts, texts, rows, CPU)
    assert states.input_ids.shape == (1, sum(len(p) for p in prompts) + sum(rows))
    for again in (False, True):
        if again:
            recompute_activations(lm)
        for found, exact in zip(gradients(lm, states, target), want, strict=True):
            torch.testing.assert_close(found, exact, rtol=2e-4, atol=2e-4 * float(exact.abs().max()))
    # A model that is set up for packing reads padded texts as before.
    assert torch.equal(gradients(lm, padded, target)[0], want[0])


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_packed_is_refused_in_one_line(kind: str) -> None:
    lm = tiny_lm(kind)
    with pytest.raises(
        ModelError, match=r"^train\.packing: model tiny cannot read packed texts.*set it to false$"
    ):
        check_packing(lm, "tiny")
    ids = torch.arange(3, 9)[None]
    assert torch.equal(lm(ids).logits, tiny_lm(kind)(ids).logits)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(1, 100))
def test_packed_batches_hold_every_text_once_and_no_more_tokens(lengths: list[int], most: int) -> None:
    groups = packed_batches(lengths, most)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in group) for group in groups]
    assert all(size <= most or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    # No two groups would fit into one.
    assert all(a + b > most for n, a in enumerate(sizes) for b in sizes[:n])


def test_a_run_with_packed_texts_is_one_with_padded_ones(tmp_path: Path) -> None:
    runs = []
    for packing in (False, True):
        recipe = Recipe(
            (Term("reverse_kl"), Term("reference_kl", 0.1)), steps=2, prompts_per_step=3, num_generations=2,
            max_new_tokens=8, lr=1e-3, warmup_steps=0, micro_batch_tokens=60, packing=packing,
        )  # fmt: skip
        folder = tmp_path / str(packing)
        run = distill(tiny.tiny_student(), tiny.tiny_teacher(), tiny.prompts(), recipe, saving=Saving(folder))
        runs.append(run)
    for one, other in zip(runs[0].steps, runs[1].steps, strict=True):
        for name in ("loss", "grad_norm", "reverse_kl_bytes"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)
    weights = [torch.cat([p.flatten() for p in run.student.lm.parameters()]) for run in runs]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
    saved = json.loads((tmp_path / "True/student/config.json").read_text())
    assert saved == json.loads((tmp_path / "False/student/config.json").read_text())
