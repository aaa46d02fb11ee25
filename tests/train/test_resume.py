"""A run that is ended at any moment and resumed ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import support.tiny_models as tiny
import torch
from support.processes import Command, die_at, find

import gold.build
import gold.run
from gold.cli import main
from gold.config import Config
from gold.models.load import load_model, save_model
from gold.train.recipe import Recipe
from gold.train.resume_rules import MAY_CHANGE, flattened

TIMED = ("_s", "tokens_per_s")
STEPS = 4


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
    assert not [path for path in run.rglob("*") if path.name.startswith((".tmp", ".old"))]


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
        train__steps=STEPS,
        train__keep_last=1,
        evaluate__prompts=2,
    )
    tiny.write_settings(folder / "run.yaml", settings)
    return folder


class Gold:
    """`gold train` in this process, with a configuration and a run folder."""

    def __init__(self, file: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.file, self.run, self.capsys = file, run, capsys

    def __call__(self, *arguments: str) -> SimpleNamespace:
        """Exit code, stdout and stderr."""
        self.capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["gold", "train", str(self.file), f"output={self.run}", *arguments])
            with pytest.raises(SystemExit) as ended:
                main()
        printed = self.capsys.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=printed.out, err=printed.err)


@pytest.fixture
def train(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Gold:
    return Gold(pair / "run.yaml", tmp_path / "run", capsys)


# Kills


MOMENTS: dict[str, tuple[str, int, bool]] = {
    "in the middle of the first evaluation's lines": ("gold.train.run_folder:RunFolder.log", 2, False),
    "in the second step's rollouts, before any checkpoint": ("gold.train.step:draw", 2, False),
    "in the first checkpoint, half-written": ("gold.train.state:save_model", 1, True),
    "in the update of step 3": ("torch.optim:AdamW.step", 3, False),
    "in the evaluation of step 3": ("gold.train.loop:evaluate", 2, False),
    "in the second checkpoint, before its manifest": ("gold.train.checkpoint_folder:_seal", 2, False),
    "in the second checkpoint, before it is in place": (
        "gold.train.checkpoint_folder:_put_in_place",
        2,
        False,
    ),
    "in the second checkpoint, in place, before the older one goes": (
        "gold.train.checkpoint_folder:prune",
        2,
        False,
    ),
    "in the lines of the last evaluation": ("gold.train.run_folder:RunFolder.log", 11, True),
    "while the student is saved": ("gold.train.saving:save_model", 1, True),
}
QUICK = {
    "in the first checkpoint, half-written",
    "while the student is saved",
}


@pytest.fixture(scope="module")
def whole(pair: Path) -> Iterator[Path]:
    """A run that nobody interrupted; beside it `moments`, copies of its folder as a kill at each would leave it."""
    run, drawn = pair / "whole", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gold.run, "plot_run", drawn.append)
        for moment, (target, call, after) in MOMENTS.items():
            owner, name = find(target)
            copy = partial(shutil.copytree, run, pair / "moments" / moment)
            patch.setattr(owner, name, _copying(getattr(owner, name), copy, call, after))
        gold.run.train(Config.load(pair / "run.yaml", [f"output={run}"]))
    assert drawn == [run]
    assert sorted(path.name for path in (pair / "moments").iterdir()) == sorted(MOMENTS)
    return run


def _copying(real: Any, copy: Callable[[], Any], call: int, after: bool) -> Any:
    calls = 0

    def copying(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        mine = calls == call
        if mine and not after:
            copy()
        result = real(*arguments, **options)
        if mine and after:
            copy()
        return result

    return copying


def test_an_uninterrupted_run_holds_what_it_should(whole: Path) -> None:
    lines = records(whole, "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [*range(1, STEPS + 1)]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 3, 4]
    assert [line["step"] for line in records(whole, "samples.jsonl")] == [0, 0, 3, 3, 4, 4]
    assert checkpoints(whole) == ["step-000004"]
    # Both kinds of sequences are in it, so that both must come again.
    assert any("sft" in line for line in lines)
    assert any("stop_rate" in line for line in lines if line["kind"] == "train")


@pytest.mark.parametrize(
    "moment",
    [moment if moment in QUICK else pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS],
)
def test_killed_at_any_moment_it_ends_the_same(
    pair: Path, whole: Path, tmp_path: Path, train: Gold, moment: str
) -> None:
    shutil.copytree(pair / "moments" / moment, tmp_path / "run")
    done = train("--resume")
    assert done.code == 0, done.err
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_the_same(pair: Path, whole: Path, tmp_path: Path) -> None:
    """Real processes, each of which dies further on."""
    run, resume = tmp_path / "run", []
    chain = [
        *list(MOMENTS.values())[:3],
        ("torch.optim:AdamW.step", 1, False),
        ("gold.train.checkpoint_folder:prune", 1, False),
    ]
    for number, point in enumerate(chain):
        command = Command(
            tmp_path / f"printed {number}",
            "train", pair / "run.yaml", f"output={run}", *resume,
            before=partial(die_at, *point),
        )  # fmt: skip
        assert command.wait() == -signal.SIGKILL, f"{point}: {command.out}{command.err}"
        resume = ["--resume"]
    last = Command(tmp_path / "printed", "train", pair / "run.yaml", f"output={run}", "--resume")
    assert last.wait() == 0, last.err
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
        time.sleep(moments.uniform(0.3, 1.2 + 0.3 * tries))
        command.process.kill()
        code = command.wait()
        assert code in (0, -signal.SIGKILL), command.err
        tries += 1
    assert_same(run, longer)


# Signals


@pytest.fixture
def _own_signals() -> Iterator[None]:
    """Whoever started the tests may have had them ignore signals."""
    given = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in given.items()}
    yield
    assert {number: signal.getsignal(number) for number in given} == given
    for number, handler in before.items():
        signal.signal(number, handler)


def signalled(monkeypatch: pytest.MonkeyPatch, target: str, call: int, *numbers: int) -> list[None]:
    """Has signals reach this process when a function is called for the ``call``-th time; one item for each call."""
    owner, name = find(target)
    real, calls = getattr(owner, name), list[None]()

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return real(*arguments, **options)

    send = partial(_send, numbers)
    monkeypatch.setattr(owner, name, _copying(counted, send, call, False))
    return calls


def _send(numbers: tuple[int, ...]) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.usefixtures("_own_signals")
@pytest.mark.parametrize(
    ("number", "code", "target", "call"),
    [
        # The evaluation and a step draw less.
        pytest.param(signal.SIGTERM, 143, "gold.rollout.hf:_Draw.__call__", 45, marks=pytest.mark.slow),
        (signal.SIGINT, 130, "gold.train.microbatch:teacher_logits", 4),
        pytest.param(signal.SIGTERM, 143, "gold.train.step:step_loss", 4, marks=pytest.mark.slow),
        (signal.SIGHUP, 129, "gold.evaluate:Comparison.of_student", 2),
        pytest.param(signal.SIGTERM, 143, "gold.train.step:update", 3, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, "gold.comparison:teacher_logits", 3, marks=pytest.mark.slow),
        # Of step 2: noted once it is saved.
        pytest.param(signal.SIGINT, 130, "gold.train.checkpoint_folder:_seal", 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_keeps_a_checkpoint_and_the_run_goes_on_the_same(
    whole: Path, tmp_path: Path, train: Gold, number: int, code: int, target: str, call: int
) -> None:
    """It is called no more: what it belongs to is left, and the state is that after the last whole step."""
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        calls = signalled(patch, target, call, number)
        done = train()
    assert len(calls) == call
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    step = max(line["step"] for line in records(run, "metrics.jsonl") if line["kind"] == "train")
    assert f"interrupted after step {step}; its checkpoint is kept" in done.out
    assert checkpoints(run) == [f"step-{step:06d}"]
    assert train("--resume").code == 0
    assert_same(run, whole)


@pytest.mark.usefixtures("_own_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(tmp_path: Path, train: Gold, number: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, "gold.train.step:draw", 1, number, number)
        assert train().code == 128 + number
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert [line["step"] for line in records(tmp_path / "run", "metrics.jsonl")] == [0]


# What there is to resume


def test_a_truncated_checkpoint_is_skipped_and_said_so(
    pair: Path, whole: Path, tmp_path: Path, train: Gold
) -> None:
    run = tmp_path / "run"
    shutil.copytree(pair / "moments" / "in the second checkpoint, in place, before the older one goes", run)
    broken = run / "checkpoints" / "step-000004" / "student" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    done = train("--resume")
    assert done.code == 0, done.err
    (skipped,) = [line for line in done.out.splitlines() if "skipped" in line]
    assert "step 4" in skipped
    assert "model.safetensors has" in skipped
    assert "resumed after step 2" in done.out
    assert_same(run, whole)


def test_to_resume_a_finished_run_is_one_line_and_loads_nothing(
    whole: Path, tmp_path: Path, train: Gold, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    monkeypatch.setattr(gold.build, "load_model", None)
    monkeypatch.setattr(gold.run, "load_data", None)
    done = train("--resume")
    assert (done.code, done.err, len(done.out.splitlines())) == (0, "", 1)
    assert "ended after step 4" in done.out
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_goes_on_to_more_steps_and_says_so(whole: Path, tmp_path: Path, train: Gold) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    done = train("--resume", "train.steps=5", "train.keep_last=2", "evaluate.every=100")
    assert done.code == 0, done.err
    assert "note: train.steps was 4, is 5" in done.out
    assert checkpoints(run) == ["step-000004", "step-000005"]
    assert weights(run) != weights(whole)
    assert "steps: 5" in (run / "config.yaml").read_text()
    assert "train.steps was 4, is 5" in (run / "environment.json").read_text()
    done = train("--resume", "train.steps=3")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "is of step 5, and train.steps is 3" in done.err


def spoil_teacher(pair: Path) -> None:
    model = load_model(pair / "teacher")
    with torch.no_grad():
        model.lm.model.norm.weight[3] += 1.0
    save_model(model, pair / "teacher")


def spoil_template(pair: Path) -> None:
    (pair / "student" / "chat_template.jinja").write_text("{{ messages }}")


def spoil_prompts(pair: Path) -> None:
    tiny.write_prompts(pair / "prompts.jsonl", tiny.prompts(30, seed=6))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_teacher, "model.safetensors (weights) has changed"),
        pytest.param(spoil_template, "chat_template.jinja (chat template) is new", marks=pytest.mark.slow),
        pytest.param(spoil_prompts, "prompts.jsonl: content has changed", marks=pytest.mark.slow),
    ],
)
def test_what_was_replaced_between_stop_and_resumption_is_named_and_refused(
    pair: Path, tmp_path: Path, train: Gold, monkeypatch: pytest.MonkeyPatch, spoil: Any, told: str
) -> None:
    for name in ("student", "teacher"):
        shutil.copytree(pair / name, tmp_path / name)
    file = tiny.write_prompts(tmp_path / "prompts.jsonl", tiny.prompts(30))
    settings = tiny.run_settings(
        tmp_path, tmp_path / "run", data={"prompts": str(file), "heldout_share": 0.3}, train__steps=1,
        evaluate__every=100, evaluate__prompts=1,
    )  # fmt: skip
    train.file = tiny.write_settings(tmp_path / "run.yaml", settings)
    assert train().code == 0
    spoil(tmp_path)
    loaded: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(gold.build, "load_model", loaded.append)
        done = train("--resume", "train.steps=2")
    assert (done.code, len(done.err.splitlines()), loaded) == (1, 1, [])
    assert told in done.err
    done = train("--resume", "train.steps=2", "--allow-changed")
    assert done.code == 0, done.err
    assert told in done.out
    assert told in json.loads((tmp_path / "run" / "environment.json").read_text())["resumed"][0]["changed"][1]
    assert train("--resume", "train.steps=2").code == 0


def test_the_keys_that_may_change_are_keys() -> None:
    served = {"path": "t", "served": {"url": "http://x", "model": "m"}, "cache": {"path": "c"}}
    engine = {"vllm": {"url": "http://x"}}
    settings = tiny.run_settings(Path("a"), Path("b"), teacher=served, rollout__engine=engine)
    keys = {
        **flattened(Config.model_validate(settings).to_dict()),
        **flattened(Recipe().model_dump(), "recipe"),
    }
    assert [pattern for pattern in MAY_CHANGE if not any(fnmatchcase(key, pattern) for key in keys)] == []
