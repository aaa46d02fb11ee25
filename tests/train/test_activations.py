"""Activations are recomputed where a step would not fit the device, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import support.tiny_models as tiny
from support.trackers import Recorder

from gold.teachers import LocalTeacher
from gold.teachers.several import Teachers
from gold.train.activations import settled, step_bytes
from gold.train.recipe import Recipe
from gold.train.setup import Setup


def of(**settings: Any) -> Setup:
    recipe = Recipe(max_new_tokens=10, **settings)
    teachers = Teachers({"teacher": LocalTeacher(tiny.tiny_teacher())})
    return Setup.of(tiny.tiny_student(), teachers, tiny.prompts(), recipe)


def test_where_memory_is_enough_nothing_is_recomputed() -> None:
    notes = Recorder()
    assert settled(of(), notes).gradient_checkpointing is False
    assert settled(of(gradient_checkpointing=True), notes).gradient_checkpointing is True
    assert not notes.notes


@pytest.mark.parametrize(("setting", "decided"), [("auto", True), (False, False)])
def test_what_would_not_fit_is_recomputed_and_told(
    monkeypatch: pytest.MonkeyPatch, setting: Any, decided: bool
) -> None:
    monkeypatch.setattr("gold.train.activations.machine_memory", lambda: 2**20)
    notes = Recorder()
    assert settled(of(gradient_checkpointing=setting), notes).gradient_checkpointing is decided
    assert ["activations are recomputed" in note for note in notes.notes] == [True] * decided


def test_the_estimate_follows_the_tokens_the_optimizer_and_the_shards() -> None:
    plain = step_bytes(of(micro_batch_tokens=1000))
    trained = sum(p.numel() for p in tiny.tiny_student().lm.parameters())
    assert plain - step_bytes(of(micro_batch_tokens=1000, optimizer="adamw8bit")) == 6 * trained
    assert step_bytes(of(micro_batch_tokens=2000)) > plain > step_bytes(of(micro_batch_size=1))
    assert plain - step_bytes(of(micro_batch_tokens=1000), shards=2) > 8 * trained
