"""A run that is killed at any moment and resumed ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
from processes_for_tests import Command, die_at

TIMED = ("_s", "tokens_per_s")


def records(run: Path, name: str) -> list[dict[str, Any]]:
    """Every line of a file without what a clock says."""
    lines = [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(TIMED)} for line in lines]


def weights(run: Path) -> bytes:
    return (run / "student" / "model.safetensors").read_bytes()


def assert_same(run: Path, whole: Path) -> None:
    assert records(run, "metrics.jsonl") == records(whole, "metrics.jsonl")
    assert records(run, "samples.jsonl") == records(whole, "samples.jsonl")
    assert weights(run) == weights(whole)
    assert checkpoints(run) == checkpoints(whole)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    tiny.save_pair(folder)
    settings = tiny.run_settings(
        folder,
        folder / "unused",
        objectives=[{"name": "reverse_kl"}, {"name": "sft", "weight": 0.3}],
        rollout__on_policy=0.8,
    )
    tiny.write_settings(folder / "run.yaml", settings)
    return folder


@pytest.fixture(scope="module")
def whole(pair: Path) -> Path:
    """A run that nobody interrupted."""
    run = pair / "whole"
    command = Command(pair / "printed", "train", pair / "run.yaml", f"output={run}")
    assert command.wait() == 0, command.err
    return run


def test_an_uninterrupted_run_holds_what_it_should(whole: Path) -> None:
    lines = records(whole, "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [*range(1, 9)]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 3, 6, 8]
    assert [line["step"] for line in records(whole, "samples.jsonl")] == [0, 0, 3, 3, 6, 6, 8, 8]
    assert checkpoints(whole) == ["step-000006", "step-000008"]
    # Both kinds of sequences are in it, so that both must come again.
    assert any("sft" in line for line in lines)
    assert any("stop_rate" in line for line in lines if line["kind"] == "train")


MOMENTS = {
    "in the middle of the first evaluation's lines": ("gold.run:RunFolder.append", 2),
    "in the second step's rollouts, before any checkpoint": ("gold.loop:sample", 2),
    "in the first checkpoint, half-written": ("gold.loop:save_model", 1, True),
    "in the update of step 3": ("torch.optim:AdamW.step", 1),
    "in the evaluation of step 3": ("gold.loop:evaluate", 1),
    "in the second checkpoint, before its manifest": ("gold.checkpoint:_seal", 1),
    "in the second checkpoint, before it is in place": ("gold.checkpoint:_put_in_place", 1),
    "in the third checkpoint, in place, before older ones go": ("gold.checkpoint:prune", 2),
    "in the lines of the last evaluation": ("gold.run:RunFolder.append", 4, True),
    "while the student is saved": ("gold.train:save_model", 1, True),
}


def test_killed_at_every_moment_it_ends_the_same(pair: Path, whole: Path, tmp_path: Path) -> None:
    run, resume = tmp_path / "run", []
    for moment, point in MOMENTS.items():
        command = Command(
            tmp_path / "printed" / moment,
            "train", pair / "run.yaml", f"output={run}", *resume,
            before=partial(die_at, *point),
        )  # fmt: skip
        assert command.wait() == -signal.SIGKILL, f"{moment}: {command.out}{command.err}"
        resume = ["--resume"]
    last = Command(tmp_path / "printed" / "last", "train", pair / "run.yaml", f"output={run}", "--resume")
    assert last.wait() == 0, last.err
    assert_same(run, whole)
    assert not [path for path in run.rglob("*") if path.name.startswith((".tmp", ".old"))]


def test_killed_after_its_last_checkpoint_it_removes_the_older_ones(
    pair: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = "train", pair / "run.yaml", f"output={run}"
    saves = 8 // 2
    dying = partial(die_at, "gold.checkpoint:prune", saves - 1)
    assert Command(tmp_path / "1", *arguments, before=dying).wait() == -signal.SIGKILL
    assert checkpoints(run) != checkpoints(whole)
    assert Command(tmp_path / "2", *arguments, "--resume").wait() == 0
    assert_same(run, whole)


def test_a_truncated_checkpoint_is_skipped_and_said_so(pair: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    broken = run / "checkpoints" / "step-000008" / "student" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    command = Command(tmp_path / "printed", "train", pair / "run.yaml", f"output={run}", "--resume")
    assert command.wait() == 0, command.err
    (skipped,) = [line for line in command.out.splitlines() if "skipped" in line]
    assert "step 8" in skipped
    assert "model.safetensors has" in skipped
    assert "resumed after step 6" in command.out
    assert_same(run, whole)


def test_to_resume_a_finished_run_changes_nothing(pair: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    command = Command(tmp_path / "printed", "train", pair / "run.yaml", f"output={run}", "--resume")
    assert command.wait() == 0, command.err
    assert "resumed after step 8" in command.out
    assert_same(run, whole)


def test_a_changed_configuration_is_refused_key_by_key(pair: Path, whole: Path, tmp_path: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    changes = ["train.steps=9", "objectives.1.weight=0.5"]
    command = Command(
        tmp_path, "train", pair / "run.yaml", f"output={whole}", *changes, "--resume"
    )  # fmt: skip
    assert command.wait() == 1
    (line,) = command.err.splitlines()
    assert "train.steps was 8, is 9" in line
    assert "objectives[1].weight was 0.3, is 0.5" in line
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_an_existing_run_is_not_begun_again(pair: Path, whole: Path, tmp_path: Path) -> None:
    before = weights(whole)
    command = Command(tmp_path, "train", pair / "run.yaml", f"output={whole}")
    assert command.wait() == 1
    (line,) = command.err.splitlines()
    assert "already holds a run; resume it (--resume)" in line
    assert weights(whole) == before


def test_ctrl_c_keeps_a_checkpoint_and_exits_130(pair: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # A process group of its own, as a terminal's Ctrl-C reaches one.
    with subprocess.Popen(
        [sys.executable, "-m", "gold", "train", str(pair / "run.yaml"), f"output={run}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ
        | {"OMP_NUM_THREADS": "1"},  # as the other runs: sums in another order have other last bits
    ) as process:
        metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() or b'"train"' not in metrics.read_bytes():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line.partition(":")[0] for line in err.splitlines()] == ["gold", "interrupted"]
    step = max(line["step"] for line in records(run, "metrics.jsonl"))
    assert f"interrupted after step {step}; its checkpoint is kept, resume the run with --resume" in out
    assert checkpoints(run)[-1] == f"step-{step:06d}"
    command = Command(tmp_path / "printed", "train", pair / "run.yaml", f"output={run}", "--resume")
    assert command.wait() == 0, command.err
    assert_same(run, whole)


@pytest.fixture(scope="module")
def longer(pair: Path) -> Path:
    """A run of 30 steps that nobody interrupted."""
    run = pair / "longer"
    command = Command(pair / "printed longer", "train", pair / "run.yaml", "train.steps=30", f"output={run}")
    assert command.wait() == 0, command.err
    return run


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments_it_ends_the_same(
    pair: Path, longer: Path, tmp_path: Path, seed: int
) -> None:
    moments = random.Random(seed)
    run = tmp_path / "run"
    code, tries = -signal.SIGKILL, 0
    while code != 0:
        # What was killed before it wrote its configuration is no run yet, and begins anew.
        resume = ["--resume"] if (run / "config.yaml").exists() else []
        command = Command(
            tmp_path / "printed" / str(tries),
            "train", pair / "run.yaml", "train.steps=30", f"output={run}", *resume,
        )  # fmt: skip
        # Longer and longer, so that it ends.
        time.sleep(moments.uniform(0.3, 1.2 + 0.1 * tries))
        command.process.kill()
        code = command.wait()
        assert code in (0, -signal.SIGKILL), command.err
        tries += 1
    assert tries > 3
    assert_same(run, longer)
