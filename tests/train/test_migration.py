"""A run folder of an earlier version resumes once its names are those of this one."""

import json
from pathlib import Path

import pytest
import support.tiny_models as tiny
import yaml

from dev.migrate_run import METRICS, migrate, renamed
from gold.config import Config
from gold.errors import ConfigError
from gold.run import train
from gold.schema import RENAMED
from gold.train.trackers import Trackers

OLD = Path(__file__).parent / "run_of_old_names"


def test_a_run_of_old_names_resumes(tmp_path: Path) -> None:
    tiny.save_pair(tmp_path)
    run = tmp_path / "run"
    file = tiny.write_settings(
        tmp_path / "run.yaml", tiny.run_settings(tmp_path, run, train__steps=2, evaluate__prompts=6)
    )
    train(Config.load(file), progress=Trackers())
    now = {name: (run / name).read_text("utf-8") for name in ("config.yaml", "metrics.jsonl")}
    for old in OLD.iterdir():  # as the earlier version wrote them for the same settings
        (run / old.name).write_text(old.read_text("utf-8").replace("PAIR", str(tmp_path)), "utf-8")
    longer = Config.load(file, ["train.steps=3"])
    with pytest.raises(ConfigError, match=r"optimizer\.max_grad_norm was not set"):
        train(longer, resume=True, progress=Trackers())
    assert "optimizer.clip_norm -> optimizer.max_grad_norm" in migrate(run)
    expected = yaml.safe_load(now["config.yaml"])
    # The defaults of the earlier version.
    expected["data"]["heldout_share"], expected["train"]["gradient_checkpointing"] = 0.1, False
    assert yaml.safe_load((run / "config.yaml").read_text()) == expected
    for ours, theirs in zip(
        lines(now["metrics.jsonl"]), lines((run / "metrics.jsonl").read_text()), strict=True
    ):
        assert ours.keys() >= theirs.keys()
    assert "clip_norm" in (run / "config.yaml.before-migration").read_text()
    assert migrate(run) == []
    train(longer, resume=True, progress=Trackers())
    steps = [line["step"] for line in lines((run / "metrics.jsonl").read_text()) if line["kind"] == "train"]
    assert steps == [1, 2, 3]


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_key_is_renamed_where_it_stands() -> None:
    old = {"recipe": {"sampling": {"top_p": 0.5}, "clip_norm": 2}, "rollout": {"batch": 3, "top_p": 1}}
    new, told = renamed(old)
    assert new == {
        "recipe": {"top_p": 0.5, "max_grad_norm": 2},
        "rollout": {"generation_batch_size": 3, "top_p": 1},
    }
    assert told == [
        f"{key} -> {RENAMED[key]}"
        for key in RENAMED
        if key in ("recipe.clip_norm", "rollout.batch", "recipe.sampling.top_p")
    ]
    assert renamed(new) == (new, [])
    terms = {"recipe": {"objectives": [{"name": "reverse_kl", "options": {"rest": "drop"}}]}}
    assert renamed(terms)[0] == {"recipe": {"objectives": [{"name": "reverse_kl", "unshared": "drop"}]}}


def test_new_metric_names_are_no_old_ones() -> None:
    assert not METRICS.keys() & set(METRICS.values())
