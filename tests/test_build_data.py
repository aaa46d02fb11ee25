"""The prompts of a configuration, wherever they come from; their digests and those of models; what may change."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import support.tiny_models as tiny
from pyarrow import parquet
from support.command import Ended, run_gold

from gold.build import inputs_of
from gold.build_data import load_data
from gold.config import Config
from gold.errors import ConfigError, DataError
from gold.train.resume_rules import changes

ROWS = [{"problem": p.text, "solution": " 31", "level": str(n)} for n, p in enumerate(tiny.prompts(16))]
PLAIN = [{"prompt": row["problem"], "completion": row["solution"]} for row in ROWS]
MAP = {"prompt": "problem", "completion": "solution"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "plain.json").write_text(json.dumps(PLAIN))
    with open(tmp_path / "rows.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return tmp_path


def configured(folder: Path, **data: Any) -> Config:
    settings = tiny.run_settings(folder, folder / "run")
    return Config.model_validate(settings | {"data": data})


def test_every_source_makes_the_same_run(folder: Path) -> None:
    found = []
    for name, renamed in (("rows.parquet", MAP), ("rows.csv", MAP), ("plain.json", {})):
        data = load_data(config := configured(folder, prompts=str(folder / name), map=renamed))
        inputs = inputs_of(config, data)
        found.append([inputs[f"{part} prompts"]["digests"] for part in ("training", "held-out")])
        assert [note.partition("read: ")[2] for note in data.notes] == (["level"] if renamed else [])
    assert found[0] == found[1] == found[2]


def test_held_out_prompts_have_a_source_and_a_map_of_their_own(folder: Path) -> None:
    files = {"prompts": str(folder / "rows.parquet"), "heldout": str(folder / "plain.json"), "map": MAP}
    data = load_data(configured(folder, **files, heldout_map={}))
    assert [p.text for p in data.all_heldout] == [p.text for p in data.train]
    assert len(data.notes) == 1
    with pytest.raises(DataError, match=r'plain\.json: row 1: no column "problem"'):
        load_data(configured(folder, **files))
    same = {"prompts": files["prompts"], "heldout": str(folder / "rows.csv"), "map": MAP}
    assert len(load_data(configured(folder, **same)).notes) == 1
    with pytest.raises(DataError, match="is a file, which has no split"):
        load_data(configured(folder, prompts=files["prompts"], map=MAP, heldout_split="test"))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"map": {"promt": "a"}}, "data.map: promt is no column that is understood; did you mean prompt?"),
        ({"map": {"prompt": "a", "messages": "b"}}, "data.map: prompt and messages would both be the prompt"),
        ({"weight": "question"}, "data.weight: question has another meaning"),
        ({"prompts": None, "task": {"name": "running_sums"}, "split": "a"}, "data.split: prompts of a task"),
    ],
)
def test_keys_that_do_not_go_together(folder: Path, data: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(folder, **({"prompts": "p.jsonl"} | data))
    assert told in str(caught.value)


def test_the_base_model_of_adapters_is_an_input(folder: Path) -> None:
    tiny.save_pair(folder)
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../student"}))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    settings = tiny.run_settings(folder, folder / "run") | {"data": {"prompts": str(folder / "plain.json")}}
    settings["student"] = {"path": str(adapter)}
    config = Config.model_validate(settings)
    before = inputs_of(config, data := load_data(config))
    assert "model.safetensors (weights)" in before["student base model"]["digests"]
    (folder / "student" / "generation_config.json").write_text("{}")
    found = changes({}, {}, before, inputs_of(config, data))
    assert [(change.kind, "generation_config.json" in change.text) for change in found] == [("refused", True)]
    # A run of a version that did not compare it goes on.
    older = {name: entry for name, entry in before.items() if name != "student base model"}
    assert not changes({}, {}, older, inputs_of(config, data))


def test_other_places_of_the_same_prompts_are_noted() -> None:
    inputs = {"training prompts": {"from": "p", "digests": {}}, "student": {"from": "s", "digests": {}}}
    old = {"data": {"prompts": "p", "map": {}, "streaming": False}, "student": {"path": "s"}}
    new = {
        "data": {"prompts": "q", "map": {"prompt": "a"}, "split": "train", "streaming": True},
        "student": {"path": "t", "revision": "v2"},
    }
    assert {change.kind for change in changes(old, new, inputs, inputs)} == {"noted"}
    assert {change.kind for change in changes(old, new, {}, {})} == {"refused"}
    earlier = {"data": {"prompts": "p"}, "student": {"path": "s"}}
    assert not changes(earlier, old, inputs, inputs)


@pytest.mark.slow
def test_a_run_goes_on_with_its_prompts_in_another_format(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny.save_pair(folder)
    settings = tiny.run_settings(folder, folder / "run", train__steps=1, evaluate__prompts=2)
    settings["data"] = {"prompts": str(folder / "rows.parquet"), "map": MAP}
    file = tiny.write_settings(folder / "run.yaml", settings)

    def gold(*arguments: object) -> Ended:
        return run_gold(monkeypatch, capfd, "train", file, *arguments)

    done = gold()
    assert done.code == 0, done.err
    assert done.out.count("columns that are not read: level") == 1
    done = gold("--resume", f"data.prompts={folder}/plain.json", "data.map={}", "train.steps=2")
    assert done.code == 0, done.err
    assert "data.map.prompt was" in done.out
    (folder / "plain.json").write_text(json.dumps(PLAIN[1:]))
    done = gold("--resume", f"data.prompts={folder}/plain.json", "data.map={}", "train.steps=3")
    assert (done.code, "content has changed" in done.err) == (1, True)
