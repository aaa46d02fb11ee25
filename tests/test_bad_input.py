"""What cannot work is one clear line on stderr and exit code 1; nothing is lost, and no model is loaded in vain."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import support.tiny_models as tiny
import torch
import yaml
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from support.command import Ended, run_gold
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import gold.build
import gold.train.checkpoint_folder
import gold.train.loop
import gold.train.microbatch
import gold.train.progress
import gold.train.saving
import gold.train.state
import gold.train.step
from gold.cli import main
from gold.errors import CheckpointError, DataError
from gold.losses import OBJECTIVES, DivergenceRow, reverse_kl
from gold.train.checkpoint_folder import Checkpoint

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    tiny.save_pair(folder)
    return folder


class Bench:
    """Both models' folders, free to be broken, and a configuration of two steps."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        self.folder, self.monkeypatch, self.capfd = folder, monkeypatch, capfd
        self.run = folder / "run"
        self.settings = tiny.run_settings(
            folder,
            self.run,
            train__steps=2,
            train__checkpoint_every=1,
            evaluate__every=2,
            evaluate__prompts=2,
        )
        self.loaded: list[str] = []
        real = gold.build.load_model

        def load_model(path: str, **options: Any) -> Any:
            self.loaded.append(Path(path).name)
            return real(path, **options)

        monkeypatch.setattr(gold.build, "load_model", load_model)

    def gold(self, command: str, *arguments: object) -> Ended:
        """Exit code, stdout and stderr of a command on the configuration."""
        file = tiny.write_settings(self.folder / "run.yaml", self.settings)
        self.loaded.clear()
        return run_gold(self.monkeypatch, self.capfd, command, file, *arguments)

    def refused(self, *arguments: object, command: str = "train") -> str:
        """The one line of a command that ends with exit code 1."""
        done = self.gold(command, *arguments)
        assert done.code == 1, (done.out, done.err)
        lines = [line for line in done.err.splitlines() if not line.startswith("gold: ")]
        assert len(lines) == 1, done.err
        assert lines[0].startswith("error: ")
        return lines[0]


@pytest.fixture
def bench(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Bench:
    for name in ("student", "teacher"):
        shutil.copytree(saved / name, tmp_path / name)
    return Bench(tmp_path, monkeypatch, capfd)


def contents(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Models


SIDES = pytest.mark.parametrize("side", ["student", "teacher"])


@SIDES
@pytest.mark.parametrize("path", ["{folder}/nowhere", "./nowhere", "runs/nowhere/student"])
def test_a_missing_model_folder(bench: Bench, side: str, path: str) -> None:
    path = path.format(folder=bench.folder)
    line = bench.refused(f"{side}.path={path}")
    assert f"model {path.removeprefix('./')}: no such folder" in line
    assert not bench.loaded
    assert not bench.run.exists()


@pytest.mark.parametrize("name", ["nowhere", "nobody/nothing"])
def test_a_name_that_is_neither_a_folder_nor_on_the_hub(bench: Bench, name: str) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("Name or service not known")

    bench.monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    line = bench.refused(f"teacher.path={name}")
    assert f"model {name}: no such folder, and the Hub cannot be asked for it: Name or service" in line

    class UnknownError(RepositoryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404 Client Error")

    def unknown(*_: Any, **__: Any) -> Any:
        raise UnknownError

    bench.monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unknown)
    line = bench.refused(f"teacher.path={name}")
    assert f"model {name}: no such folder, and no such model on the Hub" in line
    assert not bench.loaded


@SIDES
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json in it"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights in it"),
        (lambda f: os.truncate(f / "model.safetensors", 3000), "model.safetensors is broken"),
        (lambda f: (f / "model.safetensors").write_bytes(b"not at all"), "model.safetensors is broken"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is broken"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is no tokenizer"),
    ],
)
def test_a_broken_model_folder(bench: Bench, side: str, spoil: Callable[[Path], Any], told: str) -> None:
    spoil(bench.folder / side)
    line = bench.refused()
    assert told in line
    assert str(bench.folder / side) in line
    assert not bench.loaded


@SIDES
def test_a_model_folder_without_a_tokenizer(bench: Bench, side: str) -> None:
    for file in (bench.folder / side).glob("tokenizer*"):
        file.unlink()
    line = bench.refused()
    assert f"no tokenizer.json in {bench.folder / side}, nor tekken.json" in line
    assert "save one there with transformers" in line
    assert not bench.run.exists()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda w: w.pop("model.norm.weight"), "model.norm.weight"),
        (lambda w: w["lm_head.weight"].fill_(torch.nan), "its logits are NaN or infinite"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(5, 32)}), "1 of its weights have another shape"),
    ],
    ids=["missing", "not finite", "another shape"],
)
def test_weights_that_are_not_the_models(bench: Bench, spoil: Callable[[Any], Any], told: str) -> None:
    file = bench.folder / "teacher" / "model.safetensors"
    weights = load_file(file)
    spoil(weights)
    save_file(weights, file, metadata={"format": "pt"})
    line = bench.refused()
    assert told in line
    assert f"model {bench.folder / 'teacher'}" in line
    assert not bench.run.exists()


@SIDES
def test_a_tokenizer_that_cannot_be_spelled(bench: Bench, side: str) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(), pre_tokenizers.ByteLevel()]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(bench.folder / side)
    line = bench.refused()
    assert "ByteLevel" in line
    assert str(bench.folder / side) in line
    assert not bench.loaded


def test_more_ids_than_rows_of_the_output_matrix(bench: Bench) -> None:
    path = bench.folder / "student" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save(str(path))
    rows = len(load_file(bench.folder / "student" / "model.safetensors")["lm_head.weight"])
    line = bench.refused()
    assert f"{rows + 1} ids, the output matrix {rows} rows" in line
    assert not bench.loaded
    assert not bench.run.exists()


# Prompts


def give(bench: Bench, *lines: str) -> Path:
    file = bench.folder / "prompts.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    bench.settings["data"] = {"prompts": str(file), "heldout_share": 0.3}
    return file


GOOD = [json.dumps({"prompt": p.text, "id": str(n)}) for n, p in enumerate(tiny.prompts(12))]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ('{"prompt": "24"', "not JSON"),
        ('{"prompt": ""}', '"prompt" is empty'),
        ('{"prompt": "  "}', '"prompt" is empty'),
        ('{"messages": []}', '"messages" is empty'),
        ('{"promt": "24"}', "did you mean prompt"),
        ("17", "got a number"),
    ],
)
def test_a_prompts_file_with_a_bad_line(bench: Bench, bad: str, told: str) -> None:
    file = give(bench, *GOOD[:3], bad, *GOOD[3:])
    line = bench.refused()
    assert f"{file}:4: " in line
    assert told in line
    assert not bench.loaded
    assert not bench.run.exists()


def test_a_prompts_file_that_is_empty_or_missing(bench: Bench) -> None:
    file = give(bench)
    assert f"{file}: no prompts in it" in bench.refused()
    file.unlink()
    assert f"{file} cannot be read: No such file or directory" in bench.refused()
    assert not bench.loaded


def test_a_prompt_longer_than_the_context(bench: Bench) -> None:
    give(bench, *GOOD, json.dumps({"prompt": " 24" * 130, "id": "17"}))
    line = bench.refused()
    assert "prompt 17: 131 tokens and 10 new ones do not fit the 128 tokens of model" in line
    assert "rollout.max_new_tokens" in line
    assert not bench.run.exists()


def test_completions_that_are_not_there(bench: Bench) -> None:
    give(bench, *GOOD)
    assert "rollout.on_policy" in bench.refused("rollout.on_policy=0.5")
    assert not bench.loaded


# Folders and configurations


@pytest.mark.parametrize("where", ["{student}", "{student}/runs/one"])
def test_an_output_inside_a_model_folder(bench: Bench, where: str) -> None:
    before = contents(bench.folder / "student")
    output = where.format(student=bench.folder / "student")
    assert f"lies inside the model folder {bench.folder / 'student'}" in bench.refused(f"output={output}")
    assert contents(bench.folder / "student") == before
    assert not bench.loaded


def test_a_run_folder_that_is_in_use(bench: Bench) -> None:
    assert bench.gold("train").code == 0
    before = contents(bench.run)
    assert "already holds a run; resume it (--resume)" in bench.refused()
    line = bench.refused("--resume", "optimizer.lr=0.5", "rollout.num_generations=3")
    assert "optimizer.lr was 0.003, is 0.5" in line
    assert "rollout.num_generations was 2, is 3" in line
    assert not bench.loaded
    assert contents(bench.run) == before


def test_a_run_that_is_overwritten(bench: Bench) -> None:
    assert bench.gold("train").code == 0
    (bench.run / "notes.txt").write_text("mine")
    assert "give one of them" in bench.refused("--overwrite", "--resume")
    assert "give --resume too" in bench.refused("--allow-changed", "--overwrite")
    done = bench.gold("train", "--overwrite", "train.steps=1")
    assert (done.code, "held a run" in done.out) == (0, True)
    assert [path.name for path in (bench.run / "checkpoints").iterdir()] == ["step-000001"]
    assert (bench.run / "notes.txt").read_text() == "mine"


def test_nothing_to_resume(bench: Bench) -> None:
    assert f"{bench.run} holds no run" in bench.refused("--resume")
    assert not bench.loaded


def test_a_folder_of_other_things(bench: Bench) -> None:
    bench.run.mkdir()
    (bench.run / "thesis.tex").write_text("years of work")
    assert "is not empty, it holds thesis.tex" in bench.refused()
    assert contents(bench.run) == {"thesis.tex": b"years of work"}
    assert not bench.loaded


def test_a_mistyped_key_and_wrong_usage(bench: Bench) -> None:
    assert "train.step: unknown key; did you mean steps?" in bench.refused("train.step=3")
    assert bench.gold("trian").code == 2
    assert bench.gold("train", "--resum").code == 2
    assert not bench.loaded


@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_device_that_is_not_there(bench: Bench, device: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    teacher = bench.folder / "teacher"
    assert f"model {teacher}: device '{device}': torch sees no GPU" in bench.refused(
        f"teacher.device={device}"
    )
    assert not bench.loaded


def test_evaluation_of_what_is_not_there(bench: Bench) -> None:
    assert "no such folder" in bench.refused(f"student.path={bench.folder}/nowhere", command="eval")
    bench.run.mkdir()
    (bench.run / "config.yaml").write_text(yaml.safe_dump(bench.settings))
    bench.monkeypatch.setattr(sys, "argv", ["gold", "eval", str(bench.run)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "the run has no student yet" in bench.capfd.readouterr().err


# What happens on the way


def test_a_truncated_checkpoint(bench: Bench) -> None:
    assert bench.gold("train").code == 0
    last = bench.run / "checkpoints" / "step-000002"
    os.truncate(last / "optimizer.pt", 100)
    done = bench.gold("train", "--resume")
    assert done.code == 0
    assert "skipped the checkpoint of step 2" in done.out
    assert "optimizer.pt has 100 bytes" in done.out
    assert "resumed after step 1" in done.out
    for step in ("step-000001", "step-000002"):
        os.truncate(bench.run / "checkpoints" / step / "student" / "model.safetensors", 100)
    assert "no whole checkpoint in" in bench.refused("--resume")


def reseal(checkpoint: Path) -> None:
    """The manifest as the files are, whatever they hold."""
    (checkpoint / "manifest.json").unlink()
    gold.train.checkpoint_folder._seal(checkpoint, int(checkpoint.name.removeprefix("step-")))


def test_a_checkpoint_that_holds_something_else(bench: Bench) -> None:
    bench.settings["train"].update(steps=1)
    assert bench.gold("train").code == 0
    shutil.rmtree(bench.run / "student")
    (checkpoint,) = (bench.run / "checkpoints").iterdir()
    whole = contents(checkpoint)
    moments = torch.load(checkpoint / "optimizer.pt")
    for entry in moments["state"].values():
        entry["exp_avg"] = torch.zeros(3)
    spoiled: list[tuple[str, Callable[[Path], object]]] = [
        ("state.json", lambda file: file.write_text("[]")),
        ("optimizer.pt", lambda file: torch.save(moments, file)),  # of another model
        ("optimizer.pt", lambda file: torch.save(print, file)),  # which is not run
    ]
    for name, spoil in spoiled:
        spoil(checkpoint / name)
        reseal(checkpoint)
        assert f"{checkpoint / name} " in bench.refused("--resume")
        (checkpoint / name).write_bytes(whole[name])
    reseal(checkpoint)
    assert bench.gold("train", "--resume").code == 0


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", '{"step": 1}', '{"step": "1", "bad_steps": 0}', '{"step": 1.0, "bad_steps": 0}', "",
        '{"step": 2, "bad_steps": 0}', '{"step": 1, "bad_steps": -1}', '{"step": 1, "bad_steps": 9}',
        '{"step": 1, "bad_steps": null}', f'{{"step": {"9" * 5000}, "bad_steps": 0}}', "[" * 100_000, None,
    ],
)  # fmt: skip
def test_a_state_that_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json ") as caught:
        gold.train.state.read_steps(Checkpoint(1, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_run_folder_that_is_moved_under_way(bench: Bench) -> None:
    real, calls = gold.train.step.draw, iter(range(100))

    def sample(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 1:
            bench.run.rename(bench.folder / "moved")
        return real(*arguments, **options)

    with bench.monkeypatch.context() as patch:
        patch.setattr(gold.train.step, "draw", sample)
        assert "was moved or removed while the run went on" in bench.refused()
    assert not bench.run.exists()
    done = bench.gold("train", "--resume", f"output={bench.folder / 'moved'}")
    assert (done.code, "resumed after step 1" in done.out) == (0, True)


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_while_a_checkpoint_is_saved(bench: Bench) -> None:
    real, calls = gold.train.state.save_model, iter(range(100))

    def save_model(model: Any, folder: Path) -> None:
        real(model, folder)
        if next(calls) == 1:
            full()

    with bench.monkeypatch.context() as patch:
        patch.setattr(gold.train.state, "save_model", save_model)
        line = bench.refused()
    assert "cannot save the checkpoint of step 2" in line
    assert "No space left on device" in line
    assert "earlier checkpoints are intact, free some space and resume" in line
    assert [p.name for p in (bench.run / "checkpoints").iterdir()] == ["step-000001"]
    done = bench.gold("train", "--resume")
    assert (done.code, "resumed after step 1" in done.out) == (0, True)
    assert (bench.run / "student" / "model.safetensors").is_file()


def test_a_disk_that_is_full_while_metrics_are_written(bench: Bench) -> None:
    real, calls = os.write, iter(range(1000))

    def write(descriptor: int, data: bytes) -> int:
        if b'"kind"' in data and next(calls) > 3:
            full()
        return real(descriptor, data)

    with bench.monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        line = bench.refused()
    assert "metrics.jsonl" in line or "samples.jsonl" in line
    assert "No space left on device; free some space and resume" in line
    assert bench.gold("train", "--resume").code == 0


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")]
)
def test_a_disk_that_is_full_while_the_student_is_saved(bench: Bench, error: Exception) -> None:
    def save_model(*_: Any, **__: Any) -> None:
        raise error

    with bench.monkeypatch.context() as patch:
        patch.setattr(gold.train.saving, "save_model", save_model)
        assert "cannot save the student in" in bench.refused()
    assert not (bench.run / "student").exists()
    assert bench.gold("train", "--resume").code == 0
    assert (bench.run / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(bench: Bench, value: float) -> None:
    poisoned = DivergenceRow("reverse_kl", lambda logp, logq: reverse_kl(logp, logq) * value)
    bench.monkeypatch.setitem(OBJECTIVES, "reverse_kl", poisoned)
    bench.settings["train"].update(steps=9, checkpoint_every=100)
    before = load_file(bench.folder / "student" / "model.safetensors")
    line = bench.refused()
    assert "step 4: 4 steps in a row had a NaN or infinite reverse_kl_bytes and were not applied" in line
    assert "the checkpoint of step 4 is kept" in line
    after = load_file(bench.run / "checkpoints" / "step-000004" / "student" / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_loss_that_is_not_finite_at_the_end(bench: Bench) -> None:
    poisoned = DivergenceRow("reverse_kl", lambda logp, logq: reverse_kl(logp, logq) * math.nan)
    bench.monkeypatch.setitem(OBJECTIVES, "reverse_kl", poisoned)
    line = bench.refused()
    assert "step 2: the run has ended, but its last 2 step(s)" in line
    assert (bench.run / "student" / "model.safetensors").is_file()
    assert bench.refused("--resume") == line
    assert not bench.loaded


def test_a_text_that_cannot_be_used_on_the_way(bench: Bench) -> None:
    real, calls = gold.train.microbatch.teacher_logits, iter(range(100))

    def teacher_rows(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise DataError("prompt 7: it is too long")
        return real(*arguments)

    bench.settings["train"].update(checkpoint_every=9)
    with bench.monkeypatch.context() as patch:
        patch.setattr(gold.train.microbatch, "teacher_logits", teacher_rows)
        assert "after step 1: prompt 7: it is too long; its checkpoint is kept" in bench.refused()
    assert "rollout.max_new_tokens was 10, is 5" in bench.refused("--resume", "rollout.max_new_tokens=5")
    done = bench.gold("train", "--resume", "rollout.max_new_tokens=5", "--allow-changed")
    assert (done.code, "resumed after step 1" in done.out) == (0, True)


def test_a_terminal_that_is_closed_under_way(bench: Bench) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    bench.monkeypatch.setattr(gold.train.progress.terminal, "show", gone)
    bench.monkeypatch.setattr(gold.train.progress.terminal, "silence", lambda: None)
    assert bench.gold("train").code == 0
    assert (bench.run / "student" / "model.safetensors").is_file()


def test_ctrl_c_while_a_step_is_taken(bench: Bench) -> None:
    real = gold.train.step.draw

    def sample(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    bench.settings["train"].update(steps=50)
    bench.monkeypatch.setattr(gold.train.step, "draw", sample)
    done = bench.gold("train")
    assert done.code == 130
    assert done.err.splitlines()[-1] == "interrupted"
    assert "interrupted before the first step" in done.out
    assert not (bench.run / "checkpoints").exists()


def test_ctrl_c_during_the_first_evaluation(bench: Bench) -> None:
    real = gold.train.loop.evaluate

    def evaluate(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    with bench.monkeypatch.context() as patch:
        patch.setattr(gold.train.loop, "evaluate", evaluate)
        done = bench.gold("train")
    assert (done.code, "interrupted before the first step" in done.out) == (130, True)
    assert not (bench.run / "checkpoints").exists()
    done = bench.gold("train", "--resume")
    assert (done.code, "no checkpoint yet: the run starts at its first step" in done.out) == (0, True)


def test_a_second_ctrl_c_ends_at_once(bench: Bench) -> None:
    def sample(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it goes on")

    bench.monkeypatch.setattr(gold.train.step, "draw", sample)
    assert bench.gold("train").code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_models_are_loaded(bench: Bench) -> None:
    def load_model(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return None

    bench.monkeypatch.setattr(gold.build, "load_model", load_model)
    assert bench.gold("train").code == 130
    assert not bench.run.exists()
