from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from gold.demo import run as demo
from gold.demo.running_sums import RunningSums
from gold.errors import ConfigError, TrainingError

TINY = demo.DemoPlan(
    prompts=48,
    heldout=16,
    answers=200,
    teacher_steps=40,
    start_steps=4,
    steps=2,
    evaluate_every=1,
    watched=8,
)


class AtOnce:
    """A pool whose work is done in this process, when it is handed over."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.done: list[str] = []

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Any, *given: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*given))
        return future


def hold(out: Path) -> None:
    said: list[str] = []
    entries = demo.run_demo(out, TINY, said.append)
    assert list(entries) == ["teacher", "start", *demo.WAYS]
    for name in (
        "learning.png",
        "table.md",
        "distilled/metrics.jsonl",
        "distilled/student/model.safetensors",
    ):
        assert (out / name).stat().st_size > 0
    assert demo.table(entries).count("\n") == 7
    found = json.loads((out / demo.MARK).read_text())
    assert [p["step"] for p in found["curves"]["distilled"]] == [0, 1, 2]
    # Again into the same folder: what is there is a demonstration, and is replaced.
    demo._make_room(out)
    assert [p.name for p in out.iterdir()] == [demo.MARK]


def test_the_whole_demonstration_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ProcessPoolExecutor", AtOnce)
    hold(tmp_path / "demo")


@pytest.mark.slow
def test_the_whole_demonstration_in_small_by_two_processes(tmp_path: Path) -> None:
    hold(tmp_path / "demo")


def test_a_student_that_learned_nothing_is_an_error(tmp_path, monkeypatch, capsys):
    start = demo.Entry("start", 0.2, 0.1, 0.3, 1, 1.0)
    for low, learned in ((0.25, False), (0.31, True)):
        distilled = demo.Entry("distilled", 0.4, low, 0.5, 1, 1.0)
        monkeypatch.setattr(demo, "run_demo", lambda *_, d=distilled: {"start": start, "distilled": d})
        if learned:
            demo.main(tmp_path)
        else:
            with pytest.raises(TrainingError, match=r"not clearly more than the 20\.0%"):
                demo.main(tmp_path)
    assert "| start | 20.0% | 10.0% – 30.0% | 1 | 1 |" in capsys.readouterr().out


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is no earlier demonstration"):
        demo.run_demo(tmp_path, TINY, print)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_running_sums_are_right_and_their_splits_do_not_meet():
    task = RunningSums()
    train, heldout = task.prompts("train", 500, 0), task.prompts("heldout", 200, 1)
    assert not {p.text for p in train} & {p.text for p in heldout}
    assert len({p.text for p in train}) == 500
    assert task.prompts("train", 600, 0)[:500] == train
    for prompt in (*train, *heldout):
        first, *steps = (int(word) for word in prompt.text.split()[:-1])
        values = [first + sum(steps[: n + 1]) for n in range(len(steps))]
        assert all(task.lowest <= v <= task.highest for v in values)
        assert task.score(prompt, "".join(f" {v}" for v in values)) == 1.0
        assert task.score(prompt, "".join(f" {v}" for v in [*values[:-1], values[-1] + 1])) == 0.0
        assert task.score(prompt, prompt.completion + " ") == 0.0


@pytest.mark.parametrize(
    "options", [{"lowest": 9, "highest": 9}, {"shortest": 0}, {"largest": 0}, {"longest": 1}]
)
def test_impossible_sums_are_refused(options):
    with pytest.raises(ConfigError, match="running_sums: needs"):
        RunningSums(**options)


def test_more_sums_than_there_are_is_one_line():
    with pytest.raises(ConfigError, match="cannot make 60 different prompts"):
        RunningSums(lowest=1, highest=3, shortest=1, longest=1, largest=1).prompts("train", 60, 0)
