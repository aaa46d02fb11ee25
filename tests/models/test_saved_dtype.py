"""A student is written in the dtype of the files that it came from, and trained in another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import support.tiny_models as tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gold.config import Config
from gold.models.load import file_dtype, load_model, rounded, save_model
from gold.run import train


def source(folder: Path, dtype: torch.dtype, tied: bool = False) -> Path:
    """A model's folder in a dtype."""
    model = tiny.tiny_student()
    if tied:
        model.lm.config.tie_word_embeddings = True
        model.lm.tie_weights()
    model.lm.to(dtype)
    save_model(model, folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_files_are_written_as_they_were_read(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    folder = source(tmp_path / "a", dtype, tied)
    model = load_model(folder, dtype="float32", device="cpu")
    assert file_dtype(model) == dtype
    before = {name: tensor.clone() for name, tensor in model.lm.state_dict().items()}
    save_model(model, tmp_path / "b", dtype=file_dtype(model))
    files = [load_file(place / "model.safetensors") for place in (folder, tmp_path / "b")]
    assert files[0].keys() == files[1].keys()
    assert ("lm_head.weight" in files[1]) is not tied
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert all(files[1][name].dtype == dtype for name in files[1])
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()
    after = model.lm.state_dict()
    assert all(
        torch.equal(before[name], after[name]) and after[name].dtype == torch.float32 for name in before
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto")
    assert again.dtype == dtype


def test_wider_files_are_not_promised_digits_that_memory_has_not(tmp_path: Path) -> None:
    assert (
        file_dtype(load_model(source(tmp_path / "a", torch.float32), dtype="bfloat16", device="cpu")) is None
    )
    assert file_dtype(load_model(tmp_path / "a", dtype="float32", device="cpu")) is None
    assert file_dtype(tiny.tiny_student()) is None  # made in memory


def test_buffers_and_weights_that_are_kept_in_float32_keep_their_dtype() -> None:
    lm = tiny.tiny_student().lm
    lm.register_buffer("scale", torch.ones(3))
    lm._keep_in_fp32_modules = {"norm"}
    found = rounded(lm, lm.state_dict(), torch.bfloat16)
    wide = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert wide == {"scale", "model.norm.weight"}


def test_a_run_keeps_float32_in_its_checkpoints_and_writes_the_dtype_of_its_student(tmp_path: Path) -> None:
    tiny.save_pair(tmp_path)
    source(tmp_path / "student", torch.bfloat16)
    few = {"train__steps": 2, "evaluate__prompts": 1, "data__task__heldout": 2, "data__task__train": 8}
    train(Config.model_validate(tiny.run_settings(tmp_path, tmp_path / "run", **few)))
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "student" / "model.safetensors")
    with safe_open(tmp_path / "run" / "student" / "model.safetensors", "pt") as written:
        assert set(written.keys()) == set(kept)
        for name, tensor in kept.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(written.get_tensor(name), tensor.bfloat16())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in kept.values())
