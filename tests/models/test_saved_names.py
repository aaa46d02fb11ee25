"""Weights by the names of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.architectures import tiny_lm

from gold.errors import ModelError
from gold.models.saved_names import saved_weights


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "granitemoe"])
def test_weights_are_those_of_a_saved_checkpoint(kind: str, tmp_path: Path) -> None:
    lm = tiny_lm(kind)
    lm.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    found = saved_weights(lm, lm.state_dict())
    assert found.keys() == saved.keys() != lm.state_dict().keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_where_no_name_differs_nothing_is_read() -> None:
    class Unread(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            raise AssertionError(name)

    lm = tiny_lm("llama", tie_word_embeddings=True)
    weights = Unread(lm.state_dict())
    assert "lm_head.weight" in weights
    assert saved_weights(lm, weights) is weights


def test_weights_that_cannot_be_converted_are_one_line() -> None:
    lm = tiny_lm("mixtral")
    broken = {name: weight.reshape(-1) for name, weight in lm.state_dict().items()}
    with pytest.raises(ModelError, match="cannot be converted") as error:
        saved_weights(lm, broken)
    assert "\n" not in str(error.value)
