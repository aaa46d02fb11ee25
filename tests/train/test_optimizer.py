"""Weights of 16 bits are trained as if they had 32: steps are not lost in their rounding, nor in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
import torch
from accelerate import Accelerator

from gold.errors import CheckpointError, ConfigError
from gold.teachers.ema import SelfTeacher
from gold.teachers.several import Teachers
from gold.train.checkpoint_folder import latest_checkpoint, save_checkpoint
from gold.train.optimizer import MasterAdamW
from gold.train.preflight import check_recipe
from gold.train.recipe import Recipe, Term
from gold.train.setup import Setup
from gold.train.state import TrainState
from gold.train.step import train_step


class Steps:
    """A state, and steps of it."""

    def __init__(self, state: TrainState, setup: Setup) -> None:
        self.state, self.setup = state, setup

    def take(self) -> dict[str, Any]:
        return train_step(self.state, self.setup).metrics

    @property
    def average(self) -> list[torch.Tensor]:
        """The weights of a teacher that averages the student."""
        model = self.state.teachers["teacher"].model
        assert model is not None
        return list(model.lm.parameters())


def steps_of(
    dtype: torch.dtype, lr: float = 1e-5, decay: float | None = None, width: int = 32, **settings: Any
) -> Steps:
    """Steps over completions of the data, so that all dtypes read the same texts."""
    student, teacher = tiny.tiny_student(width=width), tiny.tiny_teacher()
    student.lm.to(dtype)
    members: dict[str, Any] = {"teacher": teacher}
    if decay is not None:
        members = {"teacher": SelfTeacher(student, decay)}
    teachers = Teachers(members)
    recipe = Recipe(
        (Term("sft"), Term("reverse_kl")),
        max_new_tokens=10,
        on_policy=0.0,
        num_generations=1,
        prompts_per_step=4,
        warmup_steps=0,
        schedule="constant",
        lr=lr,
        **settings,
    )
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    setup = Setup.of(student, teachers, tiny.prompts(), recipe)
    return Steps(TrainState(student, teachers, recipe, accelerator), setup)


def moved(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """Share of numbers that are others."""
    pairs = list(zip(before, after, strict=True))
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a in before)


def test_nearly_all_weights_move_at_the_default_rate() -> None:
    run = steps_of(torch.bfloat16)
    before = [m.clone() for m in run.state.masters.values()]
    for _ in range(3):
        run.take()
    used = [(b, m) for b, m in zip(before, run.state.masters.values(), strict=True) if not torch.equal(b, m)]
    # Rows of tokens that no text has are given no gradient.
    table = run.state.student.lm.get_input_embeddings().weight
    used = [pair for pair in used if pair[0].shape != table.shape]
    assert moved(*map(list, zip(*used, strict=True))) > 0.99
    assert len(used) == len(before) - 2
    for weight, master in run.state.masters.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, master.bfloat16())


@pytest.mark.slow
def test_a_bfloat16_student_follows_the_float32_one() -> None:
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        run = steps_of(dtype, lr=1e-4)
        losses[dtype] = [run.take()["loss"] for _ in range(16)]
    gained = {dtype: sum(found[:4]) - sum(found[-4:]) for dtype, found in losses.items()}
    assert gained[torch.float32] > 0
    assert gained[torch.bfloat16] == pytest.approx(gained[torch.float32], rel=0.05)


def test_small_steps_add_up() -> None:
    weight = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    optimizer = MasterAdamW([weight], lr=1e-4, weight_decay=0.0)
    plain = torch.ones(8, requires_grad=True)
    other = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        weight.grad, plain.grad = torch.ones_like(weight), torch.ones_like(plain)
        optimizer.step()
        other.step()
        assert weight.grad is None
    assert torch.equal(weight, plain.bfloat16())
    assert weight[0] == 0.98828125  # 1 − 100 · 1e-4, rounded


@pytest.mark.slow  # the test of moments of 8 bits resumes one too
def test_a_resumed_run_of_16_bits_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    whole = steps_of(torch.bfloat16, decay=0.5)
    for _ in range(2):
        whole.take()
    save_checkpoint(tmp_path, whole.state.step, whole.state.save, 1)
    again = steps_of(torch.bfloat16, decay=0.5)
    checkpoint, _ = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    again.state.load(checkpoint)
    for _ in range(2):
        whole.take()
        again.take()
    for one, other in zip(whole.state.masters.values(), again.state.masters.values(), strict=True):
        assert torch.equal(one, other)
    one, other = (each.state.gather() for each in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(a, b) for a, b in zip(whole.average, again.average, strict=True))


def test_an_average_follows_the_copies() -> None:
    run = steps_of(torch.bfloat16, decay=0.5)
    before = [p.clone() for p in run.average]
    run.take()
    after = run.average
    for old, new, master in zip(before, after, run.state.masters.values(), strict=True):
        assert new.dtype == torch.float32
        assert torch.equal(new, old.lerp(master, 0.5))


def test_float16_is_refused_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"^student\.dtype: float16 cannot be trained.*float32 or bfloat16$"
    ):
        steps_of(torch.float16)


def test_the_state_of_another_dtype_is_refused() -> None:
    sixteen, thirty_two = (
        MasterAdamW([torch.ones(2, dtype=dtype, requires_grad=True)])
        for dtype in (torch.bfloat16, torch.float32)
    )
    for one, other in ((sixteen, thirty_two), (thirty_two, sixteen)):
        with pytest.raises(CheckpointError, match=r"student\.dtype"):
            one.load_state_dict(other.state_dict())
    assert sum(t.dtype == torch.float32 for t in sixteen.masters.values()) == 1
    assert not thirty_two.masters


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_moments_of_8_bits_learn_alike_and_go_on_from_a_checkpoint_bit_for_bit(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    run, other, whole = (
        steps_of(dtype, 3e-3, width=64, optimizer=kind) for kind in ("adamw8bit", "adamw8bit", "adamw")
    )
    for _ in range(3):
        loss, plain = run.take()["loss"], whole.take()["loss"]
    assert loss == pytest.approx(plain, rel=0.02)
    moments = [s["state1"] for s in run.state.optimizer.state.values()]
    assert {m.dtype for m in moments if m.numel() >= 4096} == {torch.uint8}
    save_checkpoint(tmp_path, run.state.step, run.state.save, 2)
    found, _ = latest_checkpoint(tmp_path)
    assert found is not None
    other.state.load(found)
    for _ in range(2):
        assert other.take()["loss"] == run.take()["loss"]
    for mine, theirs in zip(
        other.state.student.lm.parameters(), run.state.student.lm.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    with pytest.raises(CheckpointError, match="does not belong to this run"):
        whole.state.load(found)


def test_without_bitsandbytes_moments_of_8_bits_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gold.train.optimizer.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.optimizer: adamw8bit needs bitsandbytes: pip install"):
        check_recipe(Recipe(optimizer="adamw8bit"), tiny.prompts(), None, 1)
