"""The command line: what it hands on, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import yaml
from support.command import Ended, run_gold

import gold
from gold.cli import main
from gold.errors import DataError

RUN = {
    "student": {"path": "s"},
    "teacher": {"path": "t"},
    "data": {"prompts": "p.jsonl"},
    "output": "runs/one",
}

Call = Callable[..., Ended]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `gold` with arguments and gives its exit code, stdout and stderr."""

    monkeypatch.setenv("COLUMNS", "200")
    return partial(run_gold, monkeypatch, capsys)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Puts a function in the place of one that a command hands on to, and gives the list of its calls."""

    def replace(module: str, name: str, result: Any = None) -> list[Any]:
        calls: list[Any] = []

        def called(*arguments: object, **options: object) -> Any:
            calls.append((arguments, options))
            if isinstance(result, BaseException):
                raise result
            return result

        replaced = ModuleType(module)
        setattr(replaced, name, called)
        monkeypatch.setitem(sys.modules, module, replaced)
        return calls

    return replace


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN), encoding="utf-8")
    return path


# What is handed on


def test_train_hands_on_the_configuration(call: Call, stand_in: Any, saved: Path) -> None:
    calls = stand_in("gold.run", "train")
    assert call("train", saved, "train.steps=3", "optimizer.lr=1e-3", "--resume").code == 0
    assert call("train", "--resume", saved).code == 0
    assert call("train", saved).code == 0
    (first, second, third) = calls
    assert (first[0][0].train.steps, first[0][0].optimizer.lr) == (3, 1e-3)
    assert [options["resume"] for _, options in (first, second, third)] == [True, True, False]
    assert type(first[1]["progress"].inner).__name__ == "Lines"  # stdout is no terminal here


MEASURES = {
    "accuracy": 0.5,
    "accuracy_low": 0.25,
    "accuracy_high": 0.75,
    "stop_rate": 1.0,
    "reverse_kl_per_byte": 0.5,
}


def test_eval_hands_on_the_source_and_prints_the_measures(call: Call, stand_in: Any, saved: Path) -> None:
    found = SimpleNamespace(measures=MEASURES, samples=[{"prompt": "1 + 1"}])
    calls = stand_in("gold.run", "evaluate_source", found)
    done = call("eval", saved, "evaluate.prompts=2")
    assert [line.split() for line in done.out.splitlines()] == [
        ["accuracy", "50.0", "%", "95", "%:", "25.0", "to", "75.0"],
        ["stop_rate", "100.0", "%"],
        ["reverse_kl_per_byte", "0.5000", "nats/byte"],
    ]
    assert calls[0][0][:2] == (saved, ["evaluate.prompts=2"])
    assert json.loads(call("eval", saved, "--json").out) == {
        "measures": MEASURES,
        "samples": [{"prompt": "1 + 1"}],
    }


@pytest.mark.parametrize(
    ("arguments", "text", "options"),
    [
        (["a text", "--json"], "a text", {"as_json": True}),
        (["--", "--text"], "--text", {}),
        ([""], "", {}),
        (["-"], "-", {}),
        ([], None, {}),
        (["--jsonl", "x.jsonl"], None, {"jsonl": Path("x.jsonl")}),
        (["--file", "x.txt"], None, {"file": Path("x.txt")}),
        (["--chat", "x.json"], None, {"chat": Path("x.json")}),
        (["--ids", "-1 2"], None, {"ids": "-1 2"}),
        (["a", "--html", "x.html", "--no-color"], "a", {"html": Path("x.html"), "color": False}),
    ],
)
def test_align_hands_on_the_text(
    call: Call, stand_in: Any, arguments: list[str], text: str | None, options: dict[str, Any]
) -> None:
    calls = stand_in("gold.inspect.command", "run_align")
    assert call("align", "--student", "a", "--teacher", "b", *arguments).code == 0
    usual = {"student": "a", "teacher": "b", "as_json": False, "color": True, "load_scorer": None}
    usual |= dict.fromkeys(("file", "jsonl", "chat", "ids", "html"))
    usual["template_kwargs"] = None, None
    assert calls == [((text,), usual | options)]


def test_align_loads_models_where_it_is_to_score(call: Call, stand_in: Any) -> None:
    calls = stand_in("gold.inspect.command", "run_align")
    assert call("align", "--student", "a", "--teacher", "b", "text", "--score").code == 0
    loaded = stand_in("gold.inspect.score", "PairScorer")
    sys.modules["gold.inspect.score"].PairScorer = SimpleNamespace(load=lambda *names: loaded.append(names))  # type: ignore[attr-defined]
    calls[0][1]["load_scorer"]("a", "b")
    assert loaded == [("a", "b")]


@pytest.mark.parametrize(
    ("name", "command"),
    [("run_align", ["align", "--student", "a", "--teacher", "b", "c"]), ("train", ["train", "{saved}"])],
)
def test_the_real_functions_take_what_is_handed_on(
    call: Call, monkeypatch: pytest.MonkeyPatch, saved: Path, name: str, command: list[str]
) -> None:
    module = {"run_align": "gold.inspect.command", "train": "gold.run"}[name]
    real = create_autospec(getattr(import_module(module), name))
    monkeypatch.setattr(f"{module}.{name}", real)
    assert call(*(part.format(saved=saved) for part in command)).code == 0
    real.assert_called_once()


def test_plot_prints_the_pictures(call: Call, stand_in: Any, tmp_path: Path) -> None:
    calls = stand_in("gold.inspect.plots", "plot_run", [tmp_path / "a.png", tmp_path / "b.png"])
    done = call("plot", tmp_path)
    assert (done.code, done.out) == (0, f"{tmp_path / 'a.png'}\n{tmp_path / 'b.png'}\n")
    assert calls == [((tmp_path,), {})]


def test_report_prints_the_page(call: Call, stand_in: Any, tmp_path: Path) -> None:
    calls = stand_in("gold.inspect.report", "write_report", tmp_path / "report.html")
    done = call("report", tmp_path)
    assert (done.code, done.out) == (0, f"{tmp_path / 'report.html'}\n")
    assert calls == [((tmp_path,), {})]


def test_compare_hands_on_the_runs(call: Call, stand_in: Any) -> None:
    calls = stand_in("gold.inspect.compare", "run_compare")
    assert call("compare", "a", "b", "--html", "c.html", "--json").code == 0
    assert calls == [(([Path("a"), Path("b")], Path("c.html"), True), {})]


def test_demo_hands_on_the_folder(call: Call, stand_in: Any, tmp_path: Path) -> None:
    calls = stand_in("gold.demo.run", "main")
    assert call("demo", "--out", tmp_path).code == 0
    assert calls == [((tmp_path,), {})]


# How it ends


def test_an_error_is_one_line_and_exit_1(call: Call, stand_in: Any, saved: Path) -> None:
    stand_in("gold.run", "train", DataError("p.jsonl:3: no prompt"))
    done = call("train", saved)
    assert (done.code, done.err) == (1, "error: p.jsonl:3: no prompt\n")


def test_each_problem_of_a_configuration_is_one_line(call: Call, stand_in: Any, saved: Path) -> None:
    calls = stand_in("gold.run", "train")
    done = call("train", saved, "train.steps=0", "train.sead=1")
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines() == [
        "error: override train.steps=0: train.steps: must be >= 1, got 0",
        "error: override train.sead=1: train.sead: unknown key; did you mean seed?",
    ]
    assert not calls


def test_a_missing_file_is_one_line(call: Call, tmp_path: Path) -> None:
    done = call("train", tmp_path / "no.yaml")
    assert (done.code, done.err) == (
        1,
        f"error: {tmp_path / 'no.yaml'} cannot be read: No such file or directory\n",
    )


def test_ctrl_c_is_exit_130(call: Call, stand_in: Any, saved: Path) -> None:
    stand_in("gold.run", "train", KeyboardInterrupt())
    done = call("train", saved)
    assert (done.code, done.err) == (130, "interrupted\n")


def test_an_error_that_gold_does_not_raise_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, stand_in: Any, saved: Path
) -> None:
    stand_in("gold.run", "train", ZeroDivisionError("a bug"))
    monkeypatch.setattr(sys, "argv", ["gold", "train", str(saved)])
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main()


@pytest.mark.parametrize(
    "arguments",
    [
        *(("train",), ("trian", "x"), ("train", "x", "--resum"), ("plot",), ("demo", "extra")),
        *(
            ("eval", "x", "--limit", "5"),
            ("eval", "x", "--task-path", "y"),
            ("eval", "x", "--apply-chat-template"),
        ),
        ("chat", "x", "--plain", "--system", "Be brief."),
    ],
)
def test_wrong_usage_is_exit_2(call: Call, arguments: tuple[str, ...]) -> None:
    done = call(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err


# Help


def test_help_names_every_command(call: Call) -> None:
    done = call("--help")
    assert done.code == 0
    for command in ("align", "train", "eval", "chat", "report", "compare", "plot", "demo"):
        assert f" {command} " in done.out


def test_the_help_of_train_describes_the_keys(call: Call) -> None:
    done = call("train", "--help")
    assert done.code == 0
    assert "rollout.on_policy = 1.0" in done.out
    assert "λ" in done.out


def test_the_help_of_align_describes_the_picture_and_the_json(call: Call) -> None:
    done = call("align", "--help")
    assert done.code == 0
    for said in (
        "--ids",
        "--chat",
        "--html",
        "--score",
        "--no-color",
        '"chunks": [[s0, s1, t0, t1], …]',
        "┃",
        "∅",
    ):
        assert said in done.out


def test_version(call: Call) -> None:
    assert call("--version").out == f"gold {gold.__version__}\n"


def test_ctrl_c_while_it_is_imported_is_exit_130_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "gold", "--version"],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gold", "train", "no.yaml"],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert (done.returncode, done.stderr) == (
        1,
        "error: no.yaml cannot be read: No such file or directory\n",
    )


@pytest.mark.slow
def test_help_is_quick() -> None:
    def seconds() -> float:
        """Of the processor: the clock says how busy the machine is."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "gold", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.5
