"""A run sharded over any number of processes takes the steps of one process."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
from safetensors.torch import load_file
from support.processes import launch, lines, signal_at, spoil_step

import gold.run
import gold.train.step
from gold.config import Config

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
        evaluate__prompts=4,
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
    """A signal reaches one of two processes; three go on, and the loss of one of them is once NaN."""
    run = tmp_path / "run"
    stopping = partial(signal_at, "gold.train.step:update", 3, signal.SIGINT)
    assert "interrupted after step 3; its checkpoint is kept" in train(
        pair, run, 2, before=stopping, code=130
    )
    shards = sorted(path.name for path in (run / "checkpoints" / "step-000003" / "shards").iterdir())
    assert shards == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert "resumed after step 3" in train(pair, run, 3, "--resume", before=partial(spoil_step, SPOILED))
    record = next(r for r in lines(run, "metrics.jsonl") if r["kind"] == "train" and r["step"] == SPOILED + 1)
    assert (record["applied"], record["grad_norm"], record["bad_steps"]) == (False, None, 1)
    assert_equal(run, alone)
