"""Trackers of other projects: what their clients are given, and that none of them ends a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import support.tiny_models as tiny
from support.trackers import Recorder

from gold import Config, Recipe, distill
from gold.errors import ConfigError
from gold.train import tracking_clients
from gold.train.loop import Saving
from gold.train.run_folder import RunFolder
from gold.train.trackers import RunInfo, Tracker
from gold.train.tracking_clients import CLIENTS, Client, check_clients

CONFIG = {"optimizer": {"lr": 1e-3}, "objectives": [{"name": "reverse_kl"}], "data": {"prompts": None}}
SAMPLE = {
    "prompt": "1 | 2\n<b>",
    "completion": "abcd",
    "stopped": True,
    "chunks": [{"text": "abcd", "student": -1.0, "teacher": -3.0}],
}


def feed(client: Client, first: int = 0) -> None:
    """Two evaluations with a step between them."""
    client.start(RunInfo(CONFIG, {"student": "s"}, 2, first))
    for step in (first, first + 1):
        if step > first:
            client.log("train", {"step": step, "loss": 0.5, "applied": True, "why": "text"})
        client.log("eval", {"step": step, "reverse_kl_per_byte": 1.0 / (1 + step), "accuracy[b]": None})
        client.log("sample", {"step": step, **SAMPLE})
        client.log("sample", {"step": step, **SAMPLE, "chunks": [], "completion": ""})
    client.finish()


class Double(Client):
    """Keeps what it is told."""

    package = "json"

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self.calls: list[Any] = []

    def begin(self, config: Any, done: int) -> None:
        self.calls.append(("begin", config, done))

    def metrics(self, values: Any, step: int) -> None:
        self.calls.append(("metrics", values, step))

    def table(self, rows: Any, step: int) -> None:
        self.calls.append(("table", rows, step))

    def end(self) -> None:
        self.calls.append(("end",))


def test_a_client_gets_configuration_numbers_and_one_table_per_evaluation() -> None:
    client = Double()
    feed(client)
    rows = lambda step: [[step, "1 | 2\n<b>", "abcd", True, 0.5], [step, "1 | 2\n<b>", "", True, None]]  # noqa: E731
    assert client.calls == [
        (
            "begin",
            {
                "optimizer.lr": 1e-3,
                "objectives[0].name": "reverse_kl",
                "data.prompts": None,
                "header.student": "s",
            },
            0,
        ),
        ("metrics", {"eval/reverse_kl_per_byte": 1.0}, 0),
        ("table", rows(0), 0),
        ("metrics", {"train/loss": 0.5, "train/applied": 1.0}, 1),
        ("metrics", {"eval/reverse_kl_per_byte": 0.5}, 1),
        ("table", rows(1), 1),
        ("end",),
    ]


def test_the_id_of_a_run_is_kept_with_it(tmp_path: Path) -> None:
    first = Double(tmp_path).kept_id()
    assert Double(tmp_path).kept_id() == first
    assert Double(tmp_path).kept_id("another") == "another"
    assert Double(tmp_path).kept_id() == "another"
    assert Double().kept_id() != first


def test_what_clients_keep_of_a_run_is_removed_with_it(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", {}).close()
    client = CLIENTS["tensorboard"](tmp_path / "run")
    feed(client)
    client.kept_id()
    assert {"tensorboard", "trackers.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    RunFolder.create(tmp_path / "run", {}, overwrite=True).close()
    assert not {"tensorboard", "trackers.json"} & {path.name for path in (tmp_path / "run").iterdir()}


# Event files of TensorBoard, read by its own reader


def test_tensorboard_reads_what_a_run_and_its_resumption_wrote(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    feed(CLIENTS["tensorboard"](tmp_path))
    feed(CLIENTS["tensorboard"](tmp_path), first=1)
    read = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    read.Reload()
    kl = [(event.step, event.value) for event in read.Scalars("eval/reverse_kl_per_byte")]
    assert kl == [(0, 1.0), (1, 0.5), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert [event.value for event in read.Scalars("train/loss")] == [0.5, 0.5]
    texts = {
        tag: [bytes(each.tensor_proto.string_val[0]).decode() for each in read.Tensors(f"{tag}/text_summary")]
        for tag in ("config", "samples")
    }
    assert "| optimizer.lr | 0.001 |" in texts["config"][0]
    assert "| 0 | 1 \\| 2⏎&lt;b> | abcd | True | 0.5 |" in texts["samples"][0]


# Doubles of the clients that are not part of an installation for development


class Called:
    """Notes every call of an attribute by name."""

    def __init__(self, calls: list[Any], name: str, result: Any = None) -> None:
        self.calls, self.name, self.result = calls, name, result

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls.append((self.name, arguments, options))
        return self.result


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_a_run_that_can_go_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(log=Called(calls, "log"), finish=Called(calls, "finish"))
    module = SimpleNamespace(init=Called(calls, "init", run), Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, name, module)
    for variable in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    feed(CLIENTS[name](tmp_path))
    feed(CLIENTS[name](tmp_path), first=1)
    begun = [options for called, _, options in calls if called == "init"]
    assert begun[0]["project"] == "gold"
    assert begun[0]["name"] == tmp_path.name
    assert begun[0]["resume"] == "allow"
    assert begun[0].get("id") == begun[1].get("id")
    logged = [(arguments[0], options["step"]) for called, arguments, options in calls if called == "log"]
    assert logged[0] == ({"eval/reverse_kl_per_byte": 1.0}, 0)
    assert logged[1][0]["samples"][1][0][2] == "abcd"
    assert calls[-1][0] == "finish"


def test_mlflow_gets_a_run_that_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    started = SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    names = ("set_experiment", "log_params", "log_metrics", "log_dict", "end_run")
    module = SimpleNamespace(
        start_run=Called(calls, "start_run", started), **{name: Called(calls, name) for name in names}
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    feed(CLIENTS["mlflow"](tmp_path))
    feed(CLIENTS["mlflow"](tmp_path), first=1)
    begun = [options for called, _, options in calls if called == "start_run"]
    assert [options["run_id"] for options in begun] == [None, "r1"]
    (params,) = [arguments[0] for called, arguments, _ in calls if called == "log_params"]
    assert params["objectives.0.name"] == "reverse_kl"
    assert [arguments[1] for called, arguments, _ in calls if called == "log_dict"][:2] == [
        "samples/step-000000.json",
        "samples/step-000001.json",
    ]


# The real clients, where they are installed; none needs a network


OFFLINE = {
    "wandb": {"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    "trackio": {"TRACKIO_DIR": "trackio"},
    "mlflow": {"MLFLOW_TRACKING_URI": "file:mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLINE)
def test_the_real_client_writes_offline(name: str, tmp_path: Path) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[2:]; import train.test_tracking_clients as t\n"
        "for first in (0, 1): t.feed(t.CLIENTS[sys.argv[1]](Path('run')), first)"
    )
    (tmp_path / "run").mkdir()
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(tests), str(tests.parent)],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), **OFFLINE[name]},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert written - {"run"} or any((tmp_path / "run" / "wandb").rglob("*.wandb"))


# None ends a run


class Failing(Double):
    """Raises at a method, once it is called."""

    at = ""

    def begin(self, config: Any, done: int) -> None:
        self._fail("begin")

    def metrics(self, values: Any, step: int) -> None:
        self._fail("metrics")

    def end(self) -> None:
        self._fail("end")

    def _fail(self, where: str) -> None:
        self.calls.append(where)
        if where == self.at:
            raise OSError("no network\nat all")


def run(tmp_path: Path, *trackers: Tracker | str) -> Any:
    recipe = Recipe(steps=1, prompts_per_step=2, num_generations=1, warmup_steps=0, max_new_tokens=4)
    student, teacher = tiny.tiny_student(), tiny.tiny_teacher()
    return distill(
        student,
        teacher,
        tiny.prompts(4),
        recipe,
        heldout=tiny.heldout(2),
        saving=Saving(tmp_path / "run"),
        trackers=trackers,
    )


@pytest.mark.parametrize("at", ["begin", "metrics", "end"])
def test_a_client_that_fails_is_dropped_with_one_note(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, made = Recorder(), []

    class Here(Failing):
        def __init__(self, folder: Path | None) -> None:
            super().__init__(folder)
            self.at = at
            made.append(self)

    monkeypatch.setitem(CLIENTS, "wandb", Here)
    done = run(tmp_path, "wandb", seen)
    assert len(done.steps) == 1
    assert (tmp_path / "run" / "student" / "config.json").is_file()
    notes = [note for note in seen.notes if "tracker wandb" in note]
    assert notes == ["tracker wandb failed, and the run goes on without it: no network at all"]
    assert made[0].calls[-1] == at
    assert made[0].folder == tmp_path / "run"
    kept = [json.loads(line) for line in (tmp_path / "run" / "notes.jsonl").read_text("utf-8").splitlines()]
    assert notes[0] in [line.get("text") for line in kept]


def test_a_client_that_is_not_there_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_clients.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match="mlflow needs a package that is not installed: pip install mlflow-skinny"
    ):
        run(tmp_path, "mlflow")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"there is no tensorbord; .*did you mean tensorboard"):
        check_clients(["tensorbord"])


def test_a_configuration_names_its_trackers(tmp_path: Path) -> None:
    settings = tiny.run_settings(tmp_path, tmp_path / "run", train__trackers=["tensorboard", "wandb"])
    assert Config.model_validate(settings).train.trackers == ("tensorboard", "wandb")
    settings["train"]["trackers"] = ["comet"]
    with pytest.raises(ConfigError, match=r"train\.trackers\.0: expected tensorboard \| wandb"):
        Config.model_validate(settings)
