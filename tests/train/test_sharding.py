"""A run sharded over any number of processes takes the steps of one process."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file
from support.processes import (
    Command,
    both,
    break_at,
    expect_no_weights,
    fail_at,
    launch,
    lines,
    read_weights,
    signal_at,
    spoil_step,
)
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import gold.run
import gold.train.step
from gold.config import Config
from gold.errors import ConfigError
from gold.train.preflight import check_recipe
from gold.train.recipe import Recipe
from gold.train.shards import FOLDER, read_shards

TOPICS = ("sums", "own", "own")
SPOILED = 3
"""The step, from 0, whose loss is NaN: in one process of a sharded run."""


def settings_of(folder: Path) -> dict[str, Any]:
    """Two teachers, one of them an average of the student; a reference; data's completions; tied embeddings. In most
    steps the processes have different numbers of microbatches, and some have none for one of the teachers."""
    prompts = [
        {"prompt": p.text, "id": p.key, "completion": p.completion, "topic": TOPICS[n % 3]}
        for n, p in enumerate(tiny.prompts(24))
    ]
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in prompts), encoding="utf-8")
    settings = tiny.run_settings(
        folder,
        folder / "unused",
        objectives=[
            {"name": "reverse_kl"},
            {"name": "sft", "weight": 0.3},
            {"name": "reference_kl", "weight": 0.1},
        ],
        rollout__on_policy=0.7,
        train__steps=5,
        train__prompts_per_step=5,
        train__micro_batch_size=3,
        train__gradient_checkpointing=True,
        train__keep_last=9,
        evaluate__every=2,
        evaluate__prompts=2,  # the third process has none
        teachers={"sums": {"path": str(folder / "teacher")}, "own": {"self": "ema", "decay": 0.9}},
        route="topic",
        data={"prompts": str(file), "heldout": str(file)},
    )
    del settings["teacher"]
    return settings


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    tiny.save_pair(folder)
    config = folder / "student" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    tiny.write_settings(folder / "run.yaml", settings_of(folder))
    return folder


@pytest.fixture(scope="module")
def alone(pair: Path) -> Path:
    """The run of one process."""
    run = pair / "alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gold.train.step, "step_loss", gold.train.step.step_loss)  # restored after
        spoil_step(SPOILED)
        gold.run.train(Config.load(pair / "run.yaml", [f"output={run}"]))
    return run


def assert_equal(run: Path, alone: Path, tolerance: float = 1e-6) -> None:
    """Metrics and evaluations, relative to their size, weights, and completions."""
    mine, theirs = lines(run, "metrics.jsonl"), lines(alone, "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in mine] == [
        (line["kind"], line["step"]) for line in theirs
    ]
    for left, right in zip(mine, theirs, strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            expected = right[name]
            if isinstance(value, float) and isinstance(expected, float):
                expected = pytest.approx(expected, rel=tolerance, abs=tolerance)
            if name not in ("why", "remedy"):  # of the main process
                assert value == expected, (left["step"], name)
    left, right = (load_file(folder / "student" / "model.safetensors") for folder in (run, alone))
    assert left.keys() == right.keys()
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < tolerance
    told = [[line["completion"] for line in lines(folder, "samples.jsonl")] for folder in (run, alone)]
    assert told[0] == told[1]


def train(pair: Path, run: Path, count: int, *arguments: str, before: Any = None, code: int = 0) -> str:
    """What the main process of a sharded run prints."""
    processes = launch(
        run.with_name(f"{run.name} {count} {code}"),
        "train",
        pair / "run.yaml",
        f"output={run}",
        "train.sharding=fsdp",
        *arguments,
        count=count,
        before=[*[None] * (count - 1), before],
    )
    codes = [process.wait(300) for process in processes]
    assert codes == [code] * count, "\n".join(process.err for process in processes)
    assert [process.out for process in processes[1:]] == [""] * (count - 1)
    return processes[0].out


def test_two_processes_then_three_take_the_steps_of_one(pair: Path, alone: Path, tmp_path: Path) -> None:
    """One of two processes has an engine that reads the weights, loads none, and gets a signal; three go on, and the
    loss of one of them is once NaN."""
    run = tmp_path / "run"
    reading = partial(both, expect_no_weights, read_weights)
    stopping = partial(both, reading, partial(signal_at, "gold.train.step:update", 3, signal.SIGINT))
    assert "interrupted after step 3; its checkpoint is kept" in train(
        pair, run, 2, before=stopping, code=130
    )
    shards = sorted(path.name for path in (run / "checkpoints" / "step-000003" / "shards").iterdir())
    assert shards == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    sizes = [(run / "checkpoints" / "step-000003" / "shards" / name).stat().st_size for name in shards[1:]]
    assert max(sizes) < 0.7 * sum(sizes)
    assert "resumed after step 3" in train(pair, run, 3, "--resume", before=partial(spoil_step, SPOILED))
    record = next(r for r in lines(run, "metrics.jsonl") if r["kind"] == "train" and r["step"] == SPOILED + 1)
    assert (record["applied"], record["grad_norm"], record["bad_steps"]) == (False, None, 1)
    assert_equal(run, alone)


@pytest.mark.parametrize(
    ("variable", "sharding", "line"),
    [
        ("DEEPSPEED", "fsdp", "accelerate's configuration asks for DeepSpeed, .* set train.sharding=fsdp"),
        (
            "MEGATRON_LM",
            "none",
            "accelerate's configuration asks for Megatron-LM, .* set train.sharding=fsdp",
        ),
        ("FSDP", "none", "accelerate's configuration asks for FSDP, .* set train.sharding=fsdp"),
        ("FSDP", "fsdp", None),
    ],
)
def test_launchers_for_other_engines_are_refused(
    variable: str, sharding: str, line: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(ConfigError, match=f"^train.sharding: {line}") if line else nullcontext():
        check_recipe(Recipe(sharding=sharding), tiny.prompts(2), None, 1)


def test_quantized_weights_are_refused_before_anything_is_loaded() -> None:
    settings = tiny.run_settings(
        Path("models"), Path("run"), student__lora={}, student__quantization="nf4", train__sharding="fsdp"
    )
    with pytest.raises(ConfigError, match=r"^train.sharding: quantized weights are not sharded: .*"):
        Config.model_validate(settings)


@pytest.mark.slow
def test_adapters_are_whole_in_three_processes_on_weights_in_shards(pair: Path, tmp_path: Path) -> None:
    """With a reference and an average that share the student's weights; one process reads the merged weights for an
    engine."""
    run, one = tmp_path / "run", tmp_path / "one"
    lora = "student.lora={rank: 4}"
    gold.run.train(Config.load(pair / "run.yaml", [f"output={one}", lora]))
    train(pair, run, 3, lora, before=read_weights)
    assert_equal(run, one)
    mine, theirs = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (run, one))
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in theirs) < 1e-6


def test_an_error_in_the_weights_which_the_first_process_reads_ends_all(pair: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pair / "student", broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    run = tmp_path / "run"
    processes = launch(
        tmp_path / "both",
        *("train", pair / "run.yaml", f"output={run}", "train.sharding=fsdp", f"student.path={broken}"),
    )
    assert [process.wait(300) for process in processes] == [1, 1]
    assert all("its logits are NaN or infinite" in process.err for process in processes)


def test_no_process_waits_for_a_first_one_that_has_failed(pair: Path, tmp_path: Path) -> None:
    processes = launch(
        tmp_path / "both",
        *("train", pair / "run.yaml", f"output={tmp_path / 'run'}", "train.sharding=fsdp"),
        before=[partial(break_at, "gold.models.load:placed_model"), None],
    )
    assert [process.wait(300) for process in processes] == [1, 1]
    assert "nobody expects this" in processes[0].err
    assert "the first process, which reads the models for all, has failed" in processes[1].err


def shards_in(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    state_dict_saver.save(dict(tensors), storage_writer=FileSystemWriter(folder / FOLDER), no_dist=True)
    return folder / FOLDER


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_shards_is_read_without_running_code(tmp_path: Path) -> None:
    folder = shards_in(tmp_path, {"student.w": torch.arange(6.0), "student.b": torch.ones(2).bfloat16()})
    found = {"student.w": torch.zeros(6), "student.b": torch.zeros(2).bfloat16()}
    read_shards(tmp_path, found)
    assert found["student.w"].tolist() == list(range(6))
    assert found["student.b"].tolist() == [1, 1]
    with pytest.raises(RuntimeError, match=r"student\.v"):
        read_shards(tmp_path, {"student.v": torch.zeros(6)})
    with pytest.raises(ValueError, match=r"student\.w"):
        read_shards(tmp_path, {"student.w": torch.zeros(7)})
    for broken in (pickle.dumps(Path), pickle.dumps([eval]), b"", pickle.dumps(torch.Tensor)):
        (folder / ".metadata").write_bytes(broken)
        with pytest.raises((pickle.UnpicklingError, EOFError)):
            read_shards(tmp_path, found)


@pytest.mark.slow
def test_checkpoints_of_any_processes_are_resumed_by_any_others(
    pair: Path, alone: Path, tmp_path: Path
) -> None:
    """Whole weights of one process, then shards of two, then one process again."""
    run = tmp_path / "run"
    command = Command(
        tmp_path / "1",
        *("train", pair / "run.yaml", f"output={run}"),
        before=partial(signal_at, "gold.train.step:update", 2, signal.SIGTERM),
    )
    assert command.wait() == 143, command.err
    train(
        pair,
        run,
        2,
        "--resume",
        before=partial(
            both,
            partial(spoil_step, SPOILED),
            partial(signal_at, "gold.train.step:update", 2, signal.SIGTERM),
        ),
        code=143,
    )  # steps 3 and 4, of which the last is spoiled
    assert (run / "checkpoints" / "step-000002" / "optimizer.pt").exists()
    assert (run / "checkpoints" / "step-000004" / "shards").exists()
    command = Command(tmp_path / "2", "train", pair / "run.yaml", f"output={run}", "--resume")
    assert command.wait() == 0, command.err
    assert_equal(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [[], ["student.dtype=bfloat16"], ["train.gradient_sync=step"]])
def test_adapters_are_resumed_by_other_numbers_of_processes(
    pair: Path, tmp_path: Path, changes: list[str]
) -> None:
    """One process, then two, then three, then one."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    changes = ["student.lora={rank: 4}", *changes]
    stopping = partial(signal_at, "gold.train.step:update", 1, signal.SIGTERM)
    command = Command(tmp_path / "1", "train", pair / "run.yaml", f"output={run}", *changes, before=stopping)
    assert command.wait() == 143, command.err
    for count in (2, 3):
        train(pair, run, count, *changes, "--resume", before=stopping, code=143)
    command = Command(tmp_path / "2", "train", pair / "run.yaml", f"output={run}", *changes, "--resume")
    assert command.wait() == 0, command.err
    gold.run.train(Config.load(pair / "run.yaml", [f"output={whole}", *changes]))
    if "student.dtype=bfloat16" in changes:
        mine, theirs = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (run, whole))
        for name, weight in theirs.items():
            assert weight.dtype == torch.float32
            torch.testing.assert_close(mine[name], weight, rtol=0.05, atol=0.02)
    else:
        assert_equal(run, whole)


@pytest.mark.slow
def test_gradients_reduced_once_a_step(pair: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(pair, run, 2, "train.gradient_sync=step", before=partial(spoil_step, SPOILED))
    assert_equal(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [["student.dtype=bfloat16"], ["train.precision=bf16"]])
def test_bfloat16(pair: Path, tmp_path: Path, changes: list[str]) -> None:
    """Weights of 16 bits with float32 copies, and float32 weights that are gathered in 16 bits: the run is resumed bit
    for bit, and near the one of one process."""
    whole, parts, one = tmp_path / "whole", tmp_path / "parts", tmp_path / "one"
    command = Command(tmp_path / "1", "train", pair / "run.yaml", f"output={one}", *changes)
    assert command.wait() == 0, command.err
    train(pair, whole, 2, *changes)
    stopping = partial(signal_at, "gold.train.step:update", 3, signal.SIGTERM)
    train(pair, parts, 2, *changes, before=stopping, code=143)
    train(pair, parts, 2, *changes, "--resume")
    assert lines(whole, "metrics.jsonl") == lines(parts, "metrics.jsonl")
    mine, same, near = (load_file(r / "student" / "model.safetensors") for r in (whole, parts, one))
    for name, weight in mine.items():
        assert torch.equal(weight, same[name])
        torch.testing.assert_close(weight.float(), near[name].float(), rtol=0.05, atol=0.02)


@pytest.mark.slow
def test_a_full_disk_ends_all_processes_with_one_line(pair: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    failing = partial(fail_at, "gold.train.checkpoint_folder:_seal", 1)
    processes = launch(
        *(tmp_path / "printed", "train", pair / "run.yaml", f"output={run}", "train.sharding=fsdp"),
        before=[failing, None],
    )
    assert [process.wait(300) for process in processes] == [1, 1]
    for process in processes:
        told = [line for line in process.err.splitlines() if line.startswith("error: ")]
        assert len(told) == 1
        assert "cannot save the checkpoint of step 2" in told[0]
        assert "No space left on device" in told[0]
        assert "Traceback" not in process.err
    assert list((run / "checkpoints").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers(pair: Path, alone: Path, tmp_path: Path, launcher: str) -> None:
    run = tmp_path / "run"
    start = {
        "torchrun": ("torch.distributed.run", "--nproc-per-node", "2", "-m"),
        "accelerate": (
            *("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--module"),
        ),
    }[launcher]
    done = subprocess.run(
        [sys.executable, "-m", *start, "gold", "train", str(pair / "run.yaml"), f"output={run}",
         "train.sharding=fsdp", "train.steps=3", "optimizer.schedule=constant"],
        capture_output=True, text=True, check=False, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one = tmp_path / "one"
    gold.run.train(
        Config.load(pair / "run.yaml", [f"output={one}", "train.steps=3", "optimizer.schedule=constant"])
    )
    assert_equal(run, one)
