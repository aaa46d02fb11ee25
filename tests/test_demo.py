from __future__ import annotations

import contextlib
import json
from concurrent.futures import Future
from dataclasses import replace
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


def hold(out: Path, plan: demo.DemoPlan, said: list[str]) -> None:
    entries = demo.run_demo(out, plan, said.append)
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
    for way in demo.WAYS:
        curve = found["curves"][way]
        assert [p["step"] for p in curve] == [0, 1, 2]
        assert 0.0 <= curve[0]["cpu_s"] < curve[1]["cpu_s"] < curve[2]["cpu_s"] == entries[way].cpu_s
        # As much for each: only what tells right from wrong differs.
        assert (entries[way].prompts, entries[way].sequences) == (plan.prompts, 2 * demo.BATCH)
    start = entries["start"]
    assert (start.prompts, start.sequences) == (plan.answers, plan.start_steps * demo.ANSWERS_PER_STEP)
    # Again into the same folder: what is there is a demonstration, and is replaced.
    demo._make_room(out)
    assert [p.name for p in out.iterdir()] == [demo.MARK]


def test_the_whole_demonstration_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr(demo, "BATCH", demo.BATCH // 8)
    ways = {
        name: replace(way, recipe=way.recipe.replace(prompts_per_step=way.recipe.prompts_per_step // 8))
        for name, way in demo.WAYS.items()
    }
    monkeypatch.setattr(demo, "WAYS", ways)
    hold(tmp_path / "demo", replace(TINY, teacher_steps=8), [])


@pytest.mark.slow
def test_the_whole_demonstration_in_small_by_two_processes(tmp_path: Path) -> None:
    hold(tmp_path / "demo", TINY, [])


def entry(name: str, low: float, right: float, high: float) -> demo.Entry:
    return demo.Entry(name, right, low, high, "right answers", 1, 2, 1.0)


@pytest.mark.parametrize(
    ("low", "right", "high", "line"),
    [
        (0.85, 0.87, 0.9, r"87\.0% right, less than 90% of its teacher's 97\.0%"),
        (0.79, 0.88, 0.9, r"not clearly, .* more than KD: 86\.0% \(85\.0% to 87\.0%\)"),
        (0.868, 0.88, 0.9, r"not clearly, .* more than KD: 86\.0% \(85\.0% to 87\.0%\)"),
        (0.875, 0.885, 0.9, r"not clearly, by 3 points"),
        (0.88, 0.89, 0.9, None),
    ],
)
def test_what_the_demonstration_holds_itself_to(
    low: float, right: float, high: float, line: str | None, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    entries = {
        "teacher": entry("teacher", 0.95, 0.97, 0.98),
        "start": entry("start", 0.1, 0.2, 0.3),
        "distilled": entry("distilled", low, right, high),
        "kd_greedy": entry("KD", 0.85, 0.86, 0.87),
    }
    monkeypatch.setattr(demo, "run_demo", lambda *_: entries)
    with pytest.raises(TrainingError, match=line) if line else contextlib.nullcontext():
        demo.main(tmp_path)
    # The table is shown either way.
    assert "| start | 20.0% | 10.0% – 30.0% | right answers | 1 | 2 | 1 |" in capsys.readouterr().out


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
