"""What trackers receive of a run, and when."""

import json
from pathlib import Path

import pytest
import support.tiny_models as tiny
from support.trackers import Recorder

from gold import Recipe, distill
from gold.train.loop import Run, Saving
from gold.train.trackers import RunInfo, Trackers

RECIPE = Recipe(steps=2, prompts_per_step=2, num_generations=1, warmup_steps=0, max_new_tokens=4)


def train(seen: Recorder, output: Path, steps: int, resume: bool = False) -> None:
    saving = Saving(output, evaluate_every=2, checkpoint_every=2, resume=resume)
    student, teacher, heldout = tiny.tiny_student(), tiny.tiny_teacher(), tiny.heldout(2)
    recipe = RECIPE.replace(steps=steps)
    distill(student, teacher, tiny.prompts(4), recipe, heldout=heldout, saving=saving, trackers=[seen])


def test_a_tracker_receives_what_the_run_folder_keeps(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    train(first, tmp_path / "run", 2)
    assert first.calls == [
        "start",
        "eval",
        "sample",
        "sample",
        "train",
        "train",
        "eval",
        "sample",
        "sample",
        "finish",
    ]
    assert first.run is not None
    assert (first.run.steps, first.run.done) == (2, 0)
    assert first.run.config["recipe"]["steps"] == 2
    train(second, tmp_path / "run", 3, resume=True)
    assert second.run is not None
    assert second.run.done == 2
    assert [record["step"] for record in second.records["train"]] == [3]
    assert any("resumed after step 2" in note for note in second.notes)
    for name, kinds in (("metrics.jsonl", ("train", "eval")), ("samples.jsonl", ("sample",))):
        kept = [json.loads(line) for line in (tmp_path / "run" / name).read_text("utf-8").splitlines()]
        for kind in kinds:
            logged = [{"kind": kind, **r} for r in first.records[kind] + second.records[kind]]
            assert [line for line in kept if line["kind"] == kind] == logged


def test_a_tracker_that_fails_ends_the_run_and_is_finished(tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    seen = Recorder(fail)
    with pytest.raises(ZeroDivisionError):
        train(seen, tmp_path / "run", 2)
    assert seen.calls[-2:] == ["train", "finish"]


def test_a_run_prints_what_it_measured_and_where_it_is() -> None:
    records = [{"step": step, "reverse_kl_per_byte": value} for step, value in ((0, 0.9), (2, 0.7), (3, 0.5))]
    run = Run(tiny.tiny_student(), Path("runs/one"), [{}] * 3, records)
    first, before, after, folder, student = str(run).splitlines()
    assert "student" in first
    assert "3 steps" in first
    assert "0.9" in before
    assert "0.5" in after
    assert folder.endswith("runs/one")
    assert student.endswith("runs/one/student")
    assert str(Run(run.student, None)).count("\n") == 2


def test_several_trackers_are_one() -> None:
    one, other = Recorder(), Recorder()
    both = Trackers(one, other)
    both.start(RunInfo({}, {}, 1))
    both.log("train", {"step": 1})
    both.note("note")
    both.finish()
    assert one.calls == other.calls == ["start", "train", "finish"]
    assert one.notes == other.notes == ["note"]
