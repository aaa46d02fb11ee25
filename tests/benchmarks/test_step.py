"""A whole step by phase: what adds up, what is recorded, and TRL's trainer where it is installed; tiny models."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from support.tiny_models import prompts, tiny_student, tiny_teacher, write_prompts

from benchmarks import gpu, peers, step
from benchmarks.meter import Meter, Sample
from benchmarks.step import PHASES, Size, Step
from gold.data import load_prompts
from gold.models.language_model import LanguageModel
from gold.models.load import save_model

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Tiny models in the place of the published ones, prompts that they can read."""
    models = {"SmolLM2-135M": tiny_student(), "Gemma-3-270M": tiny_teacher()}
    for name, model in models.items():
        save_model(model, tmp_path / name)
        model.tokenizer.name_or_path = str(tmp_path / name)

    def model_of(name: str, device: torch.device, layers: int | None) -> LanguageModel:
        return models[name]

    monkeypatch.setattr(step, "model_of", model_of)
    monkeypatch.setattr(step, "PROMPTS", write_prompts(tmp_path / "prompts.jsonl", prompts(6)))
    return tmp_path


def without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", dict)


def test_a_step_is_the_sum_of_its_phases(tiny: Path) -> None:
    size = Size(3, 6, 2, None, math.inf)
    student, teacher = (step.model_of(name, CPU, None) for name in step.PAIRS[0])
    ours = step.GoldSteps(student, teacher, load_prompts(step.PROMPTS)[:3], size, Meter(CPU))
    before = [p.detach().clone() for p in student.lm.parameters()]
    found = ours.step()
    assert set(found.seconds) == set(PHASES)
    assert sum(found.seconds.values()) == pytest.approx(found.whole_s)
    assert min(found.seconds.values()) >= 0
    assert 3 <= found.tokens <= 18
    assert any(not torch.equal(a, b) for a, b in zip(before, student.lm.parameters(), strict=True))


def test_what_no_phase_counted_is_the_update() -> None:
    made = step._step({"rollout": 1.0, "student": 2.0}, Sample(3.5, 7), 10)
    assert made.seconds == {"rollout": 1.0, "align": 0.0, "teacher": 0.0, "student": 2.0, "update": 0.5}
    one = step.summary("x", [made, Step(made.seconds, 4.5, 2**20, 20)])
    assert one.whole_s.median == 4.0
    assert one.share["rollout"] == 0.25
    assert (one.tokens, one.peak_mib) == (15.0, 1.0)


def test_our_steps_are_recorded_where_trl_is_not(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_trl(monkeypatch)
    sizes = ["--pairs", "0", "--prompts", "2", "--new-tokens", "4", "--steps", "2"]
    assert step.main(["--device", "cpu", *sizes, "--record", "--into", str(tiny / "into")]) == 0
    record = json.loads((tiny / "into" / "step-cpu-4.json").read_text())
    (pair,) = record["data"]["pairs"]
    (ours,) = pair["trainers"]
    assert (ours["name"], ours["steps"], pair["note"]) == ("gold", 2, "TRL is not installed")
    printed = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in printed[2:]}) == 1
    with pytest.raises(SystemExit):
        step.main(["--device", "cpu", "--pairs", "9"])
    assert "error: --pairs: choose of 0: SmolLM2-135M" in capsys.readouterr().err


def test_no_step_is_begun_after_its_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_trl(monkeypatch)
    found = step.measure(*step.PAIRS[0], CPU, Size(2, 4, 5, None, time.perf_counter()))
    assert found.trainers[0].steps == 1


def test_trl_takes_turns_with_us(tiny: Path) -> None:
    pytest.importorskip("trl.experimental.gold", exc_type=ImportError)
    found = step.measure(*step.PAIRS[0], CPU, Size(2, 4, 2, None, math.inf))
    ours, theirs = found.trainers
    assert (ours.steps, theirs.steps) == (2, 2)
    assert theirs.seconds["rollout"].median > 0
    assert theirs.seconds["teacher"].median > 0
    assert theirs.seconds["student"].median > 0
    assert found.times_gold is not None
    assert theirs.tokens >= 2


def test_random_models_of_published_shapes_have_these_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in step.SHAPES.values():
        assert (
            shape.settings["hidden_size"] % shape.settings["num_attention_heads"] == 0
            or "head_dim" in shape.settings
        )
    assert {name for pair in step.PAIRS for name in pair} <= set(step.SHAPES)


def test_the_parts_take_less_than_nine_minutes_together() -> None:
    for dry in (False, True):
        parts = gpu.parts_of(dry, Path("x"))
        assert [part.name for part in parts] == ["tests", "loss", "step"]
        assert sum(part.budget_s + gpu.GRACE_S for part in parts) < 540


def test_a_part_ends_well_or_not_or_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "GRACE_S", 1)

    def run(code: str, budget_s: int = 20, *, told: bool = False) -> gpu.Ended:
        return gpu.run_part(gpu.Part("x", ("-S", "-c", code), budget_s, told), tmp_path / "log")

    done = run("import sys; print(sys.argv[1:])", told=True)
    assert (done.says, done.printed()) == ("done", "['--budget', '20']")
    assert run("raise SystemExit(3)").says == "failed (3)"
    stopped = run("import time; print('begun', flush=True); time.sleep(60)", 0)
    assert (stopped.says, stopped.printed()) == ("stopped", "begun")
    assert stopped.seconds < 30
    assert "x: stopped, 1 s" in capsys.readouterr().out


def test_what_a_machine_lacks_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.main([])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error == "error: torch sees no GPU on this machine; --dry tries the same code on a CPU\n"
    monkeypatch.setenv("GOLD_ASSETS", str(tmp_path))
    assert "smollm2-135m-instruct" in gpu.missing(True)
    monkeypatch.setitem(sys.modules, "benchmarks.loss", None)
    assert "is not installed" in gpu.missing(True)
