"""Checkpoints: whole or not there, whatever happens while they are written."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gold.errors import CheckpointError, ConfigError, ModelError
from gold.train.checkpoint_folder import (
    MANIFEST,
    find_fault,
    latest_checkpoint,
    newest_step,
    remove_leftovers,
    save_checkpoint,
)


def write_step(step: int):
    def writer(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "weights.bin").write_bytes(bytes([step % 256]) * 4000)
        (folder / "state.json").write_text(json.dumps({"step": step}))

    return writer


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir() if path.name[0] != ".")


def content_step(path: Path) -> int:
    step = json.loads((path / "state.json").read_text())["step"]
    assert (path / "model" / "weights.bin").read_bytes() == bytes([step % 256]) * 4000
    return step


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3))
def test_the_newest_is_found_and_only_the_last_are_kept(tmp_path_factory, gaps, keep_last):
    folder = tmp_path_factory.mktemp("run")
    steps = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    for step in steps:
        assert save_checkpoint(folder, step, write_step(step), keep_last) == folder / f"step-{step:06d}"
    found, notes = latest_checkpoint(folder)
    assert (found.step, content_step(found.path), notes) == (steps[-1], steps[-1], [])
    assert saved_steps(folder) == steps[-keep_last:]
    assert not list(folder.glob(".*"))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_single_damage_is_seen_and_the_one_before_is_used(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        save_checkpoint(folder, step, write_step(step), 2)
    newest = folder / "step-000002"
    name = data.draw(st.sampled_from(["model/weights.bin", "state.json", MANIFEST]))
    content = bytearray((newest / name).read_bytes())
    how = data.draw(st.sampled_from(["cut", "flip", "remove"]))
    if how == "remove":
        (newest / name).unlink()
    else:
        at = data.draw(st.integers(0, len(content) - 3))
        if how == "cut":
            del content[at:]
        else:
            content[at] ^= 0x80
        (newest / name).write_bytes(content)
    found, notes = latest_checkpoint(folder)
    assert (found.step, content_step(found.path)) == (1, 1)
    assert len(notes) == 1
    assert notes[0].startswith(f"skipped the checkpoint of step 2, {newest}: ")
    assert "\n" not in notes[0]


def test_no_checkpoint_and_no_whole_checkpoint_are_two_things(tmp_path):
    assert latest_checkpoint(tmp_path / "none") == (None, [])
    assert latest_checkpoint(tmp_path) == (None, [])
    path = save_checkpoint(tmp_path, 3, write_step(3), 1)
    (path / "state.json").write_text("")
    with pytest.raises(CheckpointError, match=r"step 3, .*state\.json has 0 bytes"):
        latest_checkpoint(tmp_path)


def spoil_manifest(**changes):
    def spoil(folder: Path) -> None:
        file = folder / MANIFEST
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def as_pipe(name: str):
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_manifest(files={}),
        spoil_manifest(files=[]),
        spoil_manifest(files={"state.json": {"bytes": "many", "sha256": 3}}),
        spoil_manifest(files={"nul\0name": {"bytes": 0, "sha256": ""}}),
        spoil_manifest(step=7),
        spoil_manifest(format=2),
        lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
        as_pipe(MANIFEST),
        as_pipe("state.json"),
        as_pipe("beside.json"),
    ],
)
def test_a_checkpoint_that_is_not_what_it_says_is_skipped(tmp_path, spoil):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, write_step(step), 2)
    spoil(tmp_path / "step-000002")
    found, notes = latest_checkpoint(tmp_path)
    assert (found.step, len(notes)) == (1, 1)
    assert "\n" not in notes[0]
    assert newest_step(tmp_path) is None
    assert newest_step(tmp_path, whole=False) == 2


def test_a_file_in_the_place_of_the_checkpoints_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="checkpoints cannot be read"):
        latest_checkpoint(tmp_path / "checkpoints")


def test_a_truncated_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, write_step(step), 2)
    (tmp_path / "step-000002" / "state.json").write_text("{")
    assert latest_checkpoint(tmp_path)[0].step == 1
    save_checkpoint(tmp_path, 2, write_step(2), 2)
    found, notes = latest_checkpoint(tmp_path)
    assert (found.step, notes) == (2, [])
    assert saved_steps(tmp_path) == [1, 2]


def test_a_broken_checkpoint_never_pushes_out_a_whole_one(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, write_step(step), 2)
    (tmp_path / "step-000002" / "state.json").unlink()
    save_checkpoint(tmp_path, 3, write_step(3), 2)
    assert saved_steps(tmp_path) == [1, 3]


@pytest.mark.parametrize("broken", [False, True])
def test_steps_after_the_one_just_saved_are_of_an_abandoned_past(tmp_path, broken):
    for step in (1, 9):
        save_checkpoint(tmp_path, step, write_step(step), 2)
    if broken:
        (tmp_path / "step-000009" / "state.json").unlink()
    save_checkpoint(tmp_path, 2, write_step(2), 2)
    assert saved_steps(tmp_path) == [1, 2]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    save_checkpoint(tmp_path, 4, write_step(4), 1)
    (tmp_path / "step-000004").rename(tmp_path / ".old-step-000004")
    found, notes = latest_checkpoint(tmp_path)
    assert (found.step, content_step(found.path), notes) == (4, 4, [])
    remove_leftovers(tmp_path)
    assert latest_checkpoint(tmp_path)[0].path == tmp_path / "step-000004"


def test_what_killed_saves_left_is_removed_at_the_next_save(tmp_path):
    (tmp_path / ".tmp-step-000001" / "model").mkdir(parents=True)
    (tmp_path / ".tmp-step-000001" / "model" / "half").write_bytes(b"x")
    assert latest_checkpoint(tmp_path) == (None, [])
    save_checkpoint(tmp_path, 1, write_step(1), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


# -- a disk that is full --


def assert_step_1_is_intact(folder: Path) -> None:
    found, notes = latest_checkpoint(folder)
    assert (found.step, content_step(found.path), notes) == (1, 1, [])
    assert [path.name for path in folder.iterdir()] == ["step-000001"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_the_earlier_checkpoint_intact(tmp_path):
    save_checkpoint(tmp_path, 1, write_step(1), 1)

    def writer(folder):
        write_step(2)(folder)
        (folder / "optimizer.bin").symlink_to("/dev/full")
        (folder / "optimizer.bin").write_bytes(b"x" * 100_000)

    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path, 2, writer, 1)
    message = str(caught.value)
    assert all(part in message for part in ("step 2", str(tmp_path), "disk is full", "intact"))
    assert "\n" not in message
    assert_step_1_is_intact(tmp_path)


@pytest.mark.parametrize("function", ["_fsync", "_seal", "_put_in_place"])
def test_a_disk_that_fills_up_at_the_very_end_is_no_different(tmp_path, monkeypatch, function):
    save_checkpoint(tmp_path, 1, write_step(1), 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"gold.train.checkpoint_folder.{function}", full)
    with pytest.raises(CheckpointError, match=r"disk is full.*intact"):
        save_checkpoint(tmp_path, 2, write_step(2), 1)
    assert_step_1_is_intact(tmp_path)


def test_a_failed_write_inside_torch_or_safetensors_is_known_for_what_it_is(tmp_path):
    pytest.importorskip("torch")
    code = f"""
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from gold.train.checkpoint_folder import save_checkpoint
from gold.errors import CheckpointError
folder = Path({str(tmp_path)!r})
save_checkpoint(folder, 1, lambda path: (path / "small").write_text("x"), 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
tensors = {{"w": torch.zeros(100_000)}}
for save in (torch.save, save_file):
    try:
        save_checkpoint(folder, 2, lambda path: save(tensors, path / "weights"), 1)
    except CheckpointError as error:
        print(error)
    print([path.name for path in folder.iterdir()])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.startswith("cannot save the checkpoint of step 2") for line in lines] == [True, False] * 2
    assert lines[1::2] == ["['step-000001']"] * 2
    assert find_fault(tmp_path / "step-000001") is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TypeError("a bug"), ModelError("cannot be saved")])
def test_other_errors_pass_and_leave_nothing_behind(tmp_path, error):
    save_checkpoint(tmp_path, 1, write_step(1), 1)

    def writer(folder):
        write_step(2)(folder)
        raise error

    with pytest.raises(type(error)):
        save_checkpoint(tmp_path, 2, writer, 1)
    assert_step_1_is_intact(tmp_path)


def test_impossible_numbers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="got 1, 0"):
        save_checkpoint(tmp_path, 1, write_step(1), 0)


# -- SIGKILL --

SAVE_FOREVER = """
import sys, json, itertools
from pathlib import Path
from gold.train.checkpoint_folder import latest_checkpoint, save_checkpoint

folder = Path(sys.argv[1])

def writer_of(step):
    def writer(path):
        (path / "model").mkdir()
        with open(path / "model" / "weights.bin", "wb") as stream:
            for _ in range(40):
                stream.write(bytes([step % 256]) * 100)
                stream.flush()
        (path / "state.json").write_text(json.dumps({"step": step}))
    return writer

found, notes = latest_checkpoint(folder)
assert not notes, notes
for step in itertools.count(0 if found is None else found.step):  # the last step comes again: it is replaced
    save_checkpoint(folder, step, writer_of(step), 2)
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_every_acknowledged_checkpoint_whole(tmp_path):
    rng = random.Random(0)
    acknowledged = -1
    for _ in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        first = child.stdout.readline()
        assert first, "the child could not resume"
        time.sleep(rng.uniform(0.0, 0.05))
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().split()
        child.wait()
        child.stdout.close()
        acknowledged = max(acknowledged, *map(int, [first, *rest]))
        found, notes = latest_checkpoint(tmp_path)
        assert notes == []
        assert found.step >= acknowledged
        assert content_step(found.path) == found.step
