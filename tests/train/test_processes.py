"""Two processes with one global batch take the steps of one process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import support.tiny_models as tiny
import torch
from safetensors.torch import load_file
from support.processes import Command, die_at, fail_at, launch, lines, signal_at
from support.server import ModelServer

import gold.run
from gold.config import Config

OBJECTIVES = [{"name": "reverse_kl"}, {"name": "sft", "weight": 0.3}, {"name": "reward", "weight": 0.1}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    tiny.save_pair(folder)
    settings = tiny.run_settings(
        folder,
        folder / "unused",
        objectives=OBJECTIVES,
        rollout__on_policy=0.7,
        train__steps=3,
        train__prompts_per_step=5,  # does not divide by two: the counts of the processes differ
        train__micro_batch_size=3,
        train__gradient_checkpointing=True,
        train__keep_last=9,
        evaluate__every=2,
        evaluate__prompts=2,
    )
    tiny.write_settings(folder / "run.yaml", settings)
    return folder


@pytest.fixture(scope="module")
def alone(pair: Path) -> Path:
    run = pair / "alone"
    gold.run.train(Config.load(pair / "run.yaml", [f"output={run}"]))
    return run


def assert_near(run: Path, alone: Path) -> None:
    mine, theirs = lines(run, "metrics.jsonl"), lines(alone, "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in mine] == [
        (line["kind"], line["step"]) for line in theirs
    ]
    for left, right in zip(mine, theirs, strict=True):
        assert left.pop("kind") == right.pop("kind")
        assert left == pytest.approx(right, rel=1e-3, abs=1e-5), left["step"]
    left, right = (load_file(folder / "student" / "model.safetensors") for folder in (run, alone))
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(
            value, right[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    # The same completions, character by character.
    told = [[line["completion"] for line in lines(folder, "samples.jsonl")] for folder in (run, alone)]
    assert told[0] == told[1]


@pytest.mark.slow  # the next test takes all these steps too, in two runs
def test_two_processes_take_the_steps_of_one(pair: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main, other = launch(tmp_path / "printed", "train", pair / "run.yaml", f"output={run}")
    assert main.wait() == 0, main.err
    assert other.wait() == 0, other.err
    assert "2 process(es)" in main.out
    assert main.err == ""
    assert (other.out, other.err) == ("", "")  # one of them tells
    assert_near(run, alone)


@pytest.mark.parametrize(
    ("target", "call"),
    [
        ("gold.train.step:step_loss", 3),  # of one or two in each step
        pytest.param("gold.rollout.hf:_Draw.__call__", 50, marks=pytest.mark.slow),
        pytest.param("gold.train.microbatch:teacher_logits", 2, marks=pytest.mark.slow),
        pytest.param("gold.train.step:update", 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_that_reaches_one_process_stops_both_and_they_resume_to_the_steps_of_one(
    pair: Path, alone: Path, tmp_path: Path, target: str, call: int
) -> None:
    run = tmp_path / "run"
    stopping = partial(signal_at, target, call, signal.SIGTERM)
    main, other = launch(tmp_path / "1", "train", pair / "run.yaml", f"output={run}", before=[None, stopping])
    assert (main.wait(), other.wait()) == (143, 143), main.err + other.err
    stopped = re.search(r"interrupted (after step \d); its checkpoint is kept", main.out)
    assert stopped, main.out
    assert main.err == ""
    assert other.err == ""  # one of them tells
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-00000{stopped[1][-1]}"]
    main, other = launch(tmp_path / "2", "train", pair / "run.yaml", f"output={run}", "--resume")
    assert (main.wait(), other.wait()) == (0, 0), main.err + other.err
    assert "2 process(es)" in main.out
    assert f"resumed {stopped[1]}" in main.out
    assert main.err == ""
    assert (other.out, other.err) == ("", "")  # one of them tells
    assert_near(run, alone)


@pytest.mark.slow
def test_a_killed_process_leaves_what_both_resume(pair: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    dying = partial(die_at, "gold.train.checkpoint_folder:prune", 1)
    main, other = launch(tmp_path / "1", "train", pair / "run.yaml", f"output={run}", before=[dying, None])
    assert main.wait() == -signal.SIGKILL
    other.kill()  # as the launcher does
    main, other = launch(tmp_path / "2", "train", pair / "run.yaml", f"output={run}", "--resume")
    assert (main.wait(), other.wait()) == (0, 0), main.err + other.err
    assert "resumed after step 2" in main.out
    assert_near(run, alone)


def test_an_error_of_one_process_ends_both(pair: Path, tmp_path: Path) -> None:
    failing = partial(fail_at, "gold.train.checkpoint_folder:_seal", 1)
    main, other = launch(
        tmp_path / "printed", "train", pair / "run.yaml", f"output={tmp_path / 'run'}", before=[failing, None]
    )
    assert main.wait() == 1
    assert "No space left on device" in main.err
    assert other.wait() != 0


@pytest.mark.slow
def test_a_server_that_one_process_loses_stops_both(pair: Path, tmp_path: Path) -> None:
    """Each says why, the steps so far are kept, and the run goes on when the server is back."""
    run, model = tmp_path / "run", tiny.tiny_teacher()
    with ModelServer(model) as steady, ModelServer(model) as failing:
        there = {"url": steady.url, "model": "tiny", "top_k": 5, "retries": 0}
        settings = tiny.run_settings(
            pair, run, teacher={"path": str(pair / "teacher"), "served": there, "device": "cpu"},
            train__steps=3, train__checkpoint_every=9, evaluate__every=9, evaluate__prompts=1,
        )  # fmt: skip
        file = tiny.write_settings(tmp_path / "run.yaml", settings)
        # 13 requests of the probe, 1 of the evaluation, 4 of each step.
        failing.faults = lambda n: "500" if n >= 13 + 1 + 4 else None
        urls = [f"teacher.served.url={server.url}" for server in (steady, failing)]
        processes = launch(tmp_path / "1", "train", file, each=urls)
        line = f"error: after step 1: server {failing.url}: answers 500: CUDA error; no usable answer after 1 attempt; "
        for process in processes:
            assert process.wait() == 1
            assert [said for said in process.err.splitlines() if said.startswith("error: ")] == [
                f"{line}its checkpoint is kept, go on with --resume"
            ]
            assert "Traceback" not in process.err
        assert (run / "checkpoints" / "step-000001").is_dir()
        processes = launch(tmp_path / "2", "train", file, "--resume")
        assert [process.wait() for process in processes] == [0, 0], processes[0].err
    assert lines(run, "metrics.jsonl")[-1]["step"] == 3


@pytest.mark.slow
def test_two_processes_with_several_teachers_an_average_and_a_cache(pair: Path, tmp_path: Path) -> None:
    """Five prompts to two teachers and two processes: in some steps a process has none for one of them."""
    topics = ["sums", "own", "own"] * 8
    lines_ = [
        {"prompt": p.text, "id": p.key, "topic": name, "teacher_context": f"{p.reference} ="}
        for p, name in zip(tiny.prompts(24), topics, strict=True)
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines_), encoding="utf-8")
    settings = tiny.run_settings(
        pair, tmp_path / "unused", train__steps=4, train__prompts_per_step=5, train__micro_batch_size=3
    )
    del settings["teacher"]
    kept = {"path": str(pair / "teacher"), "cache": {"path": str(tmp_path / "cache"), "top_k": 8}}
    settings |= {
        "data": {"prompts": str(file), "heldout": str(file)},
        "teachers": {"sums": kept, "own": {"self": "ema", "decay": 0.9}},
        "route": "topic",
    }
    path = tiny.write_settings(tmp_path / "run.yaml", settings)
    runs = tmp_path / "alone", tmp_path / "run", tmp_path / "again"
    command = Command(
        tmp_path / "0", "train", path, f"output={runs[0]}", f"teachers.sums.cache.path={tmp_path / 'other'}"
    )
    assert command.wait() == 0, command.err
    for run in runs[1:]:  # the second finds all texts of the first in the cache
        main, other = launch(tmp_path / f"{run.name} printed", "train", path, f"output={run}")
        assert (main.wait(), other.wait()) == (0, 0), main.err + other.err
        assert_near(run, runs[0])
    assert len(list((tmp_path / "cache").glob("*"))) > 1


@pytest.mark.slow
def test_accelerate_launch(pair: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *(
                "--cpu",
                "--num_processes",
                "2",
                "--num_cpu_threads_per_process",
                "1",
                "--mixed_precision",
                "no",
            ),
            *("--num_machines", "1", "--dynamo_backend", "no", "--module"),
            *("gold", "train", str(pair / "run.yaml"), f"output={run}"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert_near(run, alone)
