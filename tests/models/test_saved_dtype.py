"""A student is written in the dtype of the files that it came from, and trained in another."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import support.tiny_models as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gold.config import Config
from gold.models.load import load_model, save_model
from gold.models.rounding import AsInFile, file_dtype, in_dtype, rounded
from gold.run import evaluate_source, train


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


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**99), max_value=2.0**99)


@given(st.lists(FINITE, min_size=1, max_size=50))
def test_a_rounded_weight_is_a_neighbour_of_its_own_wherever_it_is(values: list[float]) -> None:
    weight = torch.tensor(values, dtype=torch.float32)
    found = in_dtype(weight, torch.bfloat16)
    low = (weight.view(torch.int32) & -0x10000).view(torch.float32)
    high = ((weight.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert bool(((found.float() == low) | (found.float() == high)).all())
    assert torch.equal(in_dtype(found.float(), torch.bfloat16), found)  # what bfloat16 can represent is kept
    for n in range(len(values)):
        assert torch.equal(in_dtype(weight[n : n + 1], torch.bfloat16), found[n : n + 1])


def test_small_updates_are_kept_on_average_and_lost_by_rounding_to_the_nearest() -> None:
    torch.manual_seed(0)
    before = torch.randn(1 << 18).mul(0.1).bfloat16().float()
    spacing = before.sign() * torch.exp2(torch.floor(torch.log2(before.abs())) - 7)
    for share in (0.02, 0.1, 0.3, 0.9):
        after = before + share * spacing
        moved = (in_dtype(after, torch.bfloat16).float() - before) / spacing
        assert float(moved.mean()) == pytest.approx(share, abs=0.01)
        assert torch.equal(after.bfloat16().float(), before + round(share) * spacing)


def test_infinities_and_nan_are_kept() -> None:
    odd = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 3.4e38])
    assert torch.equal(in_dtype(odd, torch.bfloat16)[:2].float(), odd[:2])
    assert bool(in_dtype(odd, torch.bfloat16)[2].isnan())
    assert torch.equal(in_dtype(odd, torch.bfloat16)[3:5].float(), odd[3:5])


def test_a_model_is_as_in_its_file_for_a_while(tmp_path: Path) -> None:
    model = load_model(source(tmp_path / "a", torch.bfloat16, tied=True), dtype="float32", device="cpu")
    with torch.no_grad():
        for weight in model.lm.parameters():
            weight.add_(1e-4 * torch.randn_like(weight))
    before = {name: tensor.clone() for name, tensor in model.lm.state_dict().items()}
    save_model(model, tmp_path / "b", dtype=file_dtype(model))
    written = load_model(tmp_path / "b", dtype="float32", device="cpu").lm.state_dict()
    with AsInFile(model.lm, torch.bfloat16):
        assert all(torch.equal(tensor, written[name]) for name, tensor in model.lm.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.lm.state_dict().items())
    with AsInFile(model.lm, None):
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.lm.state_dict().items())


def test_a_run_keeps_float32_in_its_checkpoints_and_measures_the_student_that_it_writes(
    tmp_path: Path,
) -> None:
    tiny.save_pair(tmp_path)
    source(tmp_path / "student", torch.bfloat16)
    few = {"train__steps": 2, "evaluate__prompts": 2, "data__task__heldout": 2, "data__task__train": 8}
    config = Config.model_validate(tiny.run_settings(tmp_path, tmp_path / "run", **few))
    run = train(config)
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "student" / "model.safetensors")
    written = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert written.keys() == kept.keys()
    for name, tensor in kept.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(written[name], in_dtype(tensor, torch.bfloat16))
    assert any(not torch.equal(written[name].float(), tensor) for name, tensor in kept.items())
    measured = evaluate_source(tmp_path / "run").measures
    both = measured.keys() & run.evaluations[-1].keys()
    assert "reverse_kl_per_byte" in both
    assert {name: run.evaluations[-1][name] for name in both} == pytest.approx(
        {name: measured[name] for name in both}, rel=1e-6
    )
