"""The run folder: written line by line, taken back exactly, guarded against being overwritten."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gold.errors import CheckpointError, ConfigError, DataError, GoldError
from gold.train.checkpoint_folder import save_checkpoint
from gold.train.resume_rules import changes
from gold.train.run_folder import RunFolder, refuse_model_folder

CONFIG = {
    "student": {"path": "a", "dtype": "float32"},
    "objectives": [{"name": "reverse_kl", "support": "bytes"}],
    "optimizer": {"lr": 1e-5, "betas": (0.9, 0.95)},
    "train": {"steps": 10, "precision": "no"},
    "output": "runs/a",
}


@pytest.fixture
def run(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        yield folder


def lines(run: RunFolder, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run.path / name).read_text("utf-8").splitlines()]


# -- rewinding --

RECORDS = st.lists(st.tuples(st.sampled_from(["train", "eval", "sample"]), st.integers(0, 8)), max_size=20)


@settings(max_examples=40, deadline=None)
@given(RECORDS, st.integers(0, 8), st.binary(max_size=20))
def test_a_rewound_run_holds_exactly_the_lines_up_to_the_step(tmp_path_factory, records, step, half):
    records = sorted(records, key=lambda record: record[1])
    with RunFolder.create(tmp_path_factory.mktemp("a") / "run", CONFIG) as run:
        for place, (kind, at) in enumerate(records):
            run.log(kind, {"step": at, "place": place, "text": "ü\n\u2028"})
        run.sync()
    for name in ("metrics.jsonl", "samples.jsonl"):  # what a kill cuts short
        with open(run.path / name, "ab") as stream:
            stream.write(half.replace(b"\n", b""))
    with RunFolder.open(run.path) as again:
        notes = [note for note in again.rewind(step) if "steps so far" in note]
        assert len(notes) == (len({at for kind, at in records if kind == "train" and at <= step}) < step)
        again.log("train", {"step": step + 1, "place": -1, "text": ""})
        kept = [r for kind in ("train", "eval", "sample") for r in again.records(kind) if r["place"] >= 0]
    expected = [(kind, at, place) for place, (kind, at) in enumerate(records) if at <= step]
    assert sorted((r["place"], r["kind"], r["step"]) for r in kept) == [(p, k, s) for k, s, p in expected]
    assert all(r["text"] == "ü\n\u2028" for r in kept)


def test_rewinding_changes_no_byte_of_the_lines_that_stay(run):
    for step in range(4):
        run.log("train", {"step": step, "loss": 1 / 3 * step})
    before = (run.path / "metrics.jsonl").read_bytes()
    run.rewind(2)
    assert (run.path / "metrics.jsonl").read_bytes() == b"".join(before.splitlines(True)[:3])


def test_appending_after_a_half_line_is_refused(run):
    run.log("train", {"step": 1})
    run.close()
    with open(run.path / "metrics.jsonl", "ab") as stream:
        stream.write(b'{"kind": "tr')
    with RunFolder.open(run.path) as again:
        assert again.records("train") == [{"kind": "train", "step": 1}]
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl.*--resume"):
            again.log("train", {"step": 2})
        again.rewind(1)
        again.log("train", {"step": 2})
        assert [r["step"] for r in again.records("train")] == [1, 2]


def test_a_broken_line_in_the_middle_is_named_not_dropped(run):
    run.log("train", {"step": 1})
    run.close()
    with open(run.path / "metrics.jsonl", "ab") as stream:
        stream.write(b'{"kind":\n{"kind": "train", "step": 2}\n')
    with (
        pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: "),
        RunFolder.open(run.path) as again,
    ):
        again.rewind(1)
    assert len((run.path / "metrics.jsonl").read_bytes().splitlines()) == 3


TAILS = st.lists(
    st.binary(max_size=30).map(lambda junk: b"\x00" + junk)
    | st.sampled_from([b"", b"{", b"null", b"[1]", b'{"kind": "train"}', b'{"kind": "train", "step": true}'])
    | st.sampled_from([b'{"kind": "train", "step": -1}', b"[" * 10_000, b"9" * 5000, b"\xff"]),
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), TAILS, st.booleans())
def test_a_broken_end_is_left_out_by_readers_and_dropped_by_a_resumption(tmp_path_factory, count, tail, cut):
    with RunFolder.create(tmp_path_factory.mktemp("a") / "run", CONFIG) as run:
        for step in range(count):
            run.log("train", {"step": step})
    file = run.path / "metrics.jsonl"
    whole = file.read_bytes() if count else b""
    junk = b"\n".join(tail) + (b"" if cut else b"\n") if tail else b""
    file.write_bytes(whole + junk)
    assert [r["step"] for r in run.records("train")] == list(range(count))
    assert file.read_bytes() == whole + junk
    with RunFolder.open(run.path) as again:
        notes = again.rewind(8)
        *cut_off, missing = notes
        assert [f"{len(junk):,} bytes" in note for note in cut_off] == ([True] if junk else [])
        assert missing == f"{file} has {count} of the 8 steps so far; the report lacks the others"
        assert file.read_bytes() == whole
        again.log("train", {"step": 9})
        assert [r["step"] for r in again.records("train")] == [*range(count), 9]


# -- lines --


def test_every_scalar_becomes_json(run):
    torch = pytest.importorskip("torch")
    record = {
        "step": 3,
        "nan": float("nan"),
        "inf": float("-inf"),
        "numpy": np.float32(0.5),
        "array": np.arange(2),
        "torch": torch.tensor(2),
        "half": "\ud800",
        "none": None,
        "path": Path("a/b"),
        "nested": {"x": (1, np.int64(2))},
    }
    run.log("train", record)
    assert lines(run) == [
        {
            "kind": "train",
            "step": 3,
            "nan": None,
            "inf": None,
            "numpy": 0.5,
            "array": [0, 1],
            "torch": 2,
            "half": "\N{REPLACEMENT CHARACTER}" * 3,
            "none": None,
            "path": "a/b",
            "nested": {"x": [1, 2]},
        }
    ]


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("trian", {"step": 1}, "trian.*train, eval, sample"),
        ("train", {}, "step, got None"),
        ("train", {"step": True}, "step, got True"),
        ("train", {"step": 1, "x": {1}}, "set"),
    ],
)
def test_what_is_no_record_is_refused(run, kind, record, message):
    with pytest.raises(DataError, match=message):
        run.log(kind, record)


def test_a_full_disk_leaves_no_half_line(run, monkeypatch):
    run.log("train", {"step": 1})
    whole = (run.path / "metrics.jsonl").read_bytes()
    write, calls = os.write, []

    def full(descriptor, data):
        calls.append(1)
        if len(calls) == 1:
            return write(descriptor, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl at step 2: No space left on device"):
        run.log("train", {"step": 2})
    assert (run.path / "metrics.jsonl").read_bytes() == whole


# -- what may be a run folder --


def test_a_new_run_holds_its_configuration_and_where_it_ran(run):
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert config == json.loads(json.dumps(CONFIG))
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["command"] == sys.argv
    assert environment["started"].endswith("+00:00")
    assert environment["devices"][0].startswith("cpu: ")
    assert environment["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(environment["versions"]) >= {
        "gold",
        "torch",
        "transformers",
        "tokenizers",
        "numba",
        "accelerate",
    }
    assert (run.checkpoints, run.plots) == (run.path / "checkpoints", run.path / "plots")


def test_text_that_looks_like_a_number_stays_text_in_either_yaml(tmp_path):
    with RunFolder.create(tmp_path / "run", {"output": "1e-5", "a": "no", "b": "010", "lr": 1e-5}) as run:
        assert RunFolder.open(run.path).config == {"output": "1e-5", "a": "no", "b": "010", "lr": 1e-5}
        assert "output: '1e-5'" in (run.path / "config.yaml").read_text()


def test_an_existing_run_is_not_overwritten_unless_asked(run):
    run.log("train", {"step": 1})
    (run.path / "notes.txt").write_text("mine")
    run.close()
    with pytest.raises(ConfigError, match="--resume"):
        RunFolder.create(run.path, CONFIG)
    with RunFolder.create(run.path, {"train": {"steps": 1}}, overwrite=True) as again:
        assert again.records("train") == []
        assert yaml.safe_load((run.path / "config.yaml").read_text()) == {"train": {"steps": 1}}
    assert (run.path / "notes.txt").read_text() == "mine"


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        RunFolder.create(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match=r"thesis\.tex is a file"):
        RunFolder.create(tmp_path / "thesis.tex", CONFIG)


def test_the_checks_alone_write_nothing(tmp_path):
    RunFolder.check_new(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError, match="holds no run"):
        RunFolder.check_resume(tmp_path / "new", CONFIG)
    RunFolder.create(tmp_path / "new", CONFIG).close()
    before = {path: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    RunFolder.check_resume(tmp_path / "new", CONFIG)
    with pytest.raises(ConfigError, match=r'train\.precision was "no", is not set'):
        RunFolder.check_resume(tmp_path / "new", CONFIG | {"train": 3})
    RunFolder.check_new(tmp_path / "new")  # it has not taken a step
    assert {path: path.read_bytes() for path in (tmp_path / "new").iterdir()} == before


def test_what_a_kill_left_before_there_was_a_run_is_no_obstacle(tmp_path):
    for name in ("environment.json", ".tmp-config.yaml", ".lock"):
        (tmp_path / name).write_text("{")
    RunFolder.create(tmp_path, CONFIG).close()
    RunFolder.resume(tmp_path, CONFIG).close()


@pytest.mark.parametrize("inside", ["", "runs", "runs/a"])
def test_a_run_inside_a_model_folder_is_refused(tmp_path, inside, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    refuse_model_folder(model / inside)  # a config.json alone is no model
    (model / "model.safetensors").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"model folder .*model"):
        RunFolder.create(Path("model") / inside, CONFIG, overwrite=True)
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_that_is_no_run_cannot_be_opened(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        RunFolder.open(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(CheckpointError, match=r"config\.yaml") as caught:
        RunFolder.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory"):
        RunFolder.create(tmp_path / "file" / "run", CONFIG)


def test_a_run_that_never_took_a_step_is_begun_anew_and_says_so(run):
    run.log("eval", {"step": 0})
    run.close()
    with RunFolder.create(run.path, CONFIG) as again:
        (note,) = again.notes
        assert "before its first step" in note
        assert again.records("eval") == []
        again.log("train", {"step": 1})
    for mark in ("metrics.jsonl", "checkpoints/step-000001/x", "student/x"):
        with pytest.raises(ConfigError, match="--overwrite"):
            RunFolder.check_new(run.path)
        (run.path / "metrics.jsonl").unlink(missing_ok=True)
        for folder in ("checkpoints", "student"):
            shutil.rmtree(run.path / folder, ignore_errors=True)
        RunFolder.check_new(run.path)
        (run.path / mark).parent.mkdir(parents=True, exist_ok=True)
        (run.path / mark).write_text('{"kind": "train", "step": 1}\n')


@pytest.mark.parametrize(
    "held", [("config.yaml", "student/x"), ("environment.json", "plots/x"), ("thesis.tex",)]
)
def test_what_is_no_run_is_not_overwritten(tmp_path, held):
    for name in held:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        RunFolder.create(tmp_path, CONFIG, overwrite=True)
    assert all((tmp_path / name).read_text() == "mine" for name in held)


def test_a_run_under_way_elsewhere_is_not_overwritten(run):
    run.log("train", {"step": 1})
    with pytest.raises(CheckpointError, match="another process"):
        RunFolder.create(run.path, CONFIG, overwrite=True)
    assert run.records("train")


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_folder_that_is_gone_is_one_line_and_nothing_is_written_elsewhere(run, tmp_path, how):
    run.log("train", {"step": 1})
    if how == "removed":
        shutil.rmtree(run.path)
    else:
        run.path.rename(tmp_path / "moved")
    if how == "replaced":
        run.path.mkdir()
    for act in (lambda: run.log("train", {"step": 2}), run.sync, run.check_place):
        with pytest.raises(CheckpointError, match="was moved or removed"):
            act()
    with pytest.raises(CheckpointError) if how != "replaced" else contextlib.nullcontext():
        save_checkpoint(run.checkpoints, 2, lambda folder: (folder / "x").write_text("x") and None, 1)
    assert run.path.exists() == (how == "replaced")
    if how != "removed":
        assert (tmp_path / "moved" / "metrics.jsonl").read_bytes().count(b"\n") == 1


SPOILED = {
    "a list": lambda file: file.write_text("[]"),
    "a number": lambda file: file.write_text("7"),
    "nothing": lambda file: file.write_text(""),
    "no JSON": lambda file: file.write_text("{"),
    "deep": lambda file: file.write_text("[" * 5_000),
    "wrong inside": lambda file: file.write_text(
        '{"versions": [], "resumed": {}, "student": 3, "devices": 1, "kind": 1}'
    ),
    "laughs": lambda file: file.write_text(
        "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    ),
    "bytes": lambda file: file.write_bytes(b"\xff\x00"),
    "a folder": lambda file: file.mkdir(),
    "a pipe": lambda file: os.mkfifo(file),
}


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "inputs.json", "metrics.jsonl", ".lock"])
def test_a_broken_file_is_one_line(run, name, how):
    run.log("train", {"step": 1})
    run.close()
    (run.path / name).unlink()
    SPOILED[how](run.path / name)
    before = sorted(path.name for path in run.path.iterdir())
    told = name
    try:
        with RunFolder.resume(run.path, CONFIG, INPUTS) as again:
            again.rewind(1)
            again.log("train", {"step": 2})
            assert again.records("train")
    except GoldError as error:
        told = str(error)
    else:
        assert name in (".lock", "metrics.jsonl")
    assert "\n" not in told
    assert name in told or name in ("config.yaml", ".lock")
    assert sorted(path.name for path in run.path.iterdir() if path.name[:4] != ".tmp") == before


# -- resuming --


def test_a_resumption_is_noted_and_output_may_have_moved(run, tmp_path):
    run.close()
    moved = run.path.rename(tmp_path / "moved")
    with RunFolder.resume(moved, CONFIG | {"output": "moved"}) as again:
        assert again.notes == []
    environment = json.loads((moved / "environment.json").read_text())
    assert len(environment["resumed"]) == 1
    environment["versions"]["torch"] = "1.0"
    (moved / "environment.json").write_text(json.dumps(environment))
    with RunFolder.resume(moved, CONFIG) as again:
        (note,) = again.notes
    assert note.startswith("started with torch 1.0, resumed with ")


def test_a_changed_configuration_names_every_key_with_both_values(run):
    run.close()
    changed = json.loads(json.dumps(CONFIG))
    changed["optimizer"]["lr"] = 2e-5
    changed["objectives"][0]["support"] = "shared"
    changed["objectives"].append({"name": "sft"})
    changed["student"].pop("dtype")
    with pytest.raises(ConfigError) as caught:
        RunFolder.resume(run.path, changed)
    for line in (
        'student.dtype was "float32", is not set',
        'objectives[0].support was "bytes", is "shared"',
        "optimizer.lr was 1e-05, is 2e-05",
        'objectives[1].name was not set, is "sft"',
    ):
        assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert RunFolder.open(run.path).config == json.loads(json.dumps(CONFIG))
    with RunFolder.resume(run.path, changed, allow_changed=True) as again:
        assert "optimizer.lr was 1e-05, is 2e-05" in again.notes
    assert RunFolder.open(run.path).config == json.loads(json.dumps(changed))
    (resumed,) = json.loads((run.path / "environment.json").read_text())["resumed"]
    assert "optimizer.lr was 1e-05, is 2e-05" in resumed["changed"]


FULL = {
    "student": {"path": "s", "device": "cpu"},
    "teacher": {"path": "t", "device": "auto", "served": {"url": "u", "top_k": 5}, "cache": {"path": "c"}},
    "data": {"prompts": "p.jsonl", "heldout": "h.jsonl", "heldout_share": None},
    "rollout": {"generation_batch_size": 8, "max_new_tokens": 10, "temperature": 1.0},
    "optimizer": {"lr": 1e-5},
    "train": {"steps": 10, "seed": 0, "checkpoint_every": 5, "micro_batch_size": 8, "precision": "no"},
    "evaluate": {"every": 50, "prompts": 8},
    "output": "o",
}
INPUTS = {
    "student": {"from": "s", "digests": {"model.safetensors": "1"}},
    "teacher": {"from": "t", "digests": {"model.safetensors": "2"}},
    "training prompts": {"from": "p.jsonl", "digests": {"prompts": "3"}},
}


def changed_at(tree: dict, key: str, value: object) -> dict:
    copy = json.loads(json.dumps(tree))
    *above, last = key.split(".")
    place = copy
    for part in above:
        place = place[part]
    place[last] = value
    return copy


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("output", "elsewhere", "free"),
        ("teacher.served.url", "v", "free"),
        ("teacher.cache.path", "d", "free"),
        ("train.steps", 20, "noted"),
        ("train.checkpoint_every", 9, "noted"),
        ("train.micro_batch_size", 4, "noted"),
        ("rollout.generation_batch_size", 4, "noted"),
        ("evaluate.every", 5, "noted"),
        ("evaluate.prompts", 4, "noted"),
        ("student.device", "cuda", "noted"),
        ("teacher.device", "cpu", "noted"),
        ("student.path", "moved", "noted"),  # its files are compared
        ("teacher.path", "moved", "noted"),
        ("data.prompts", "moved.jsonl", "noted"),
        ("data.heldout_share", 0.1, "free"),  # held-out prompts have their own file
        ("teacher.served.top_k", 3, "refused"),
        ("rollout.max_new_tokens", 5, "refused"),
        ("rollout.temperature", 0.5, "refused"),
        ("optimizer.lr", 1e-4, "refused"),
        ("train.seed", 1, "refused"),
        ("train.precision", "bf16", "refused"),
    ],
)
def test_what_may_change_at_a_resumption_is_noted_and_kept(tmp_path, key, value, kind):
    RunFolder.create(tmp_path / "run", FULL, inputs=INPUTS).close()
    new = changed_at(FULL, key, value)
    if kind == "refused":
        with pytest.raises(ConfigError, match=f"{key} was .*--allow-changed"):
            RunFolder.check_resume(tmp_path / "run", new, INPUTS)
    RunFolder.check_resume(tmp_path / "run", new, INPUTS, allow_changed=True)
    with RunFolder.resume(tmp_path / "run", new, INPUTS, allow_changed=kind == "refused") as run:
        assert [note.split(" ")[0] for note in run.notes] == ([] if kind == "free" else [key])
    (resumed,) = json.loads((run.path / "environment.json").read_text())["resumed"]
    assert ("changed" in resumed) == (kind != "free")
    RunFolder.check_resume(tmp_path / "run", new, INPUTS)  # which is now the run's own
    assert RunFolder.open(tmp_path / "run").config == new


@pytest.mark.parametrize(
    ("share", "key", "value"), [(None, "evaluate.prompts", 4), (0.2, "data.heldout_share", 0.1)]
)
def test_what_decides_which_prompts_are_held_out_may_not_change(tmp_path, share, key, value):
    given = {**FULL, "data": {"prompts": "p.jsonl", "heldout": None, "heldout_share": share}}
    RunFolder.create(tmp_path / "run", given, inputs=INPUTS).close()
    with pytest.raises(ConfigError, match=f"{key} was .*: other prompts would be held out"):
        RunFolder.check_resume(tmp_path / "run", changed_at(given, key, value), INPUTS)


def test_another_place_of_an_input_that_nobody_knows_is_another_input(tmp_path):
    RunFolder.create(tmp_path / "run", FULL, inputs={}).close()
    with pytest.raises(ConfigError, match=r"student\.path was"):
        RunFolder.check_resume(tmp_path / "run", changed_at(FULL, "student.path", "moved"), INPUTS)


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_of_other_content_is_refused_by_name_or_kept(tmp_path, name):
    RunFolder.create(tmp_path / "run", FULL, inputs=INPUTS).close()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    other = json.loads(json.dumps(INPUTS))
    (part,) = other[name]["digests"]
    other[name]["digests"] = {part: "x", "new.json": "y"}
    with pytest.raises(ConfigError) as caught:
        RunFolder.resume(tmp_path / "run", FULL, other)
    where = f"{name} {INPUTS[name]['from']}: "
    assert f"{where}{part} has changed" in str(caught.value)
    assert f"{where}new.json is new" in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    with RunFolder.resume(tmp_path / "run", FULL, other, allow_changed=True) as run:
        assert f"{where}{part} has changed" in run.notes
    assert json.loads((run.path / "inputs.json").read_text()) == other
    RunFolder.check_resume(tmp_path / "run", FULL, other)


def test_a_run_of_before_inputs_were_kept_says_that_they_are_not_compared(run):
    run.close()
    (run.path / "inputs.json").unlink()
    with RunFolder.resume(run.path, CONFIG, INPUTS) as again:
        (note,) = again.notes
    assert "no inputs.json" in note
    assert json.loads((run.path / "inputs.json").read_text()) == INPUTS


JSON = st.recursive(  # without null, which equals a key that an earlier version did not have
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), JSON), st.dictionaries(st.sampled_from("abc"), JSON))
def test_two_configurations_have_no_changes_exactly_where_they_are_equal(old, new):
    found = changes(old, new, {}, {})
    assert (found == []) == (json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True))
    assert all(change.kind == "refused" for change in found)  # none of these keys may


# -- two processes --


def test_a_second_process_is_refused_and_a_killed_one_is_not_in_the_way(run, tmp_path):
    code = f"""
import sys
from gold.train.run_folder import RunFolder
run = RunFolder.open({str(tmp_path / "run")!r})
print(len(run.records("train")))
run.log("train", {{"step": 2}})
print("written", flush=True)
sys.stdin.read()
"""
    run.log("train", {"step": 1})
    command = [sys.executable, "-c", code]
    refused = subprocess.run(command, capture_output=True, text=True, input="")
    assert refused.stdout == "1\n"
    assert f"another process (process {os.getpid()} on " in refused.stderr.splitlines()[-1]

    run.close()
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    assert [child.stdout.readline(), child.stdout.readline()] == ["1\n", "written\n"]
    with pytest.raises(CheckpointError, match=f"another process \\(process {child.pid} on "):
        RunFolder.resume(run.path, CONFIG)
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    with RunFolder.resume(run.path, CONFIG) as again:
        assert len(again.records("train")) == 2
