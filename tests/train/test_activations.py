"""Activations are recomputed where a step would not fit the device, and nowhere else, as the doctor says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
from support.trackers import Recorder

from gold.build import build_models
from gold.build_data import load_data
from gold.config import Config
from gold.diagnose import plan_of as doctors_plan
from gold.doctor.memory import memory_of
from gold.doctor.memory_table import Hardware
from gold.doctor.side import read_side
from gold.teachers import LocalTeacher
from gold.teachers.several import Teachers
from gold.train.activations import plan_of, settled
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
    monkeypatch.setattr("gold.doctor.memory.machine_memory", lambda: 2**20)
    notes = Recorder()
    assert settled(of(gradient_checkpointing=setting), notes).gradient_checkpointing is decided
    assert ["activations are recomputed" in note for note in notes.notes] == [True] * decided


def test_the_plan_follows_the_tokens_the_optimizer_and_the_processes() -> None:
    plain = plan_of(of(micro_batch_tokens=1000))
    trained = sum(p.numel() for p in tiny.tiny_student().lm.parameters())
    assert (plain.trained, plain.moments, plain.by_tokens) == (trained, 8, True)
    assert plan_of(of(micro_batch_tokens=1000, optimizer="adamw8bit")).moments == 2
    sizes = [memory_of(replace(plan_of(of(micro_batch_size=n)), rough=True)).peak for n in (1, 2)]
    assert sizes[0] < sizes[1]
    assert plan_of(of(sharding="fsdp"), 2).shards == 2


@pytest.mark.parametrize(
    "changes",
    [(), ("train.micro_batch_tokens=500", "train.optimizer=adamw8bit"), ("student.lora.rank=4",)],
    ids=["", "tokens, 8 bits", "LoRA"],
)
def test_the_doctor_and_a_run_have_one_plan(tmp_path: Path, changes: tuple[str, ...]) -> None:
    tiny.save_pair(tmp_path)
    file = tiny.write_settings(tmp_path / "run.yaml", tiny.run_settings(tmp_path, tmp_path / "run"))
    config = Config.load(file, changes)
    data, there = load_data(config), Hardware(2**40, on_gpu=False)
    sides = {
        "teacher": (read_side("student", tmp_path / "student"), read_side("teacher", tmp_path / "teacher"))
    }
    told = doctors_plan(config, data, config.recipe, sides, there)
    student, teachers = build_models(config, config.student, data, None, examined=False)
    run = plan_of(Setup.of(student, teachers, data.train, config.recipe, verifier=data.verifier))
    assert memory_of(replace(told, rough=True)) == memory_of(replace(run, rough=True))
