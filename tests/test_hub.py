"""`push_to_hub`, with a double in place of the Hub's API."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import support.tiny_models as tiny

from gold import run as commands
from gold.config import Config
from gold.errors import CheckpointError, ConfigError
from gold.hub import prepare_push, push
from gold.train.checkpoint_folder import newest_step

PUSHED = "someone/student"


class Hub:
    """Repositories in memory; ``fails`` names the method that does."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.private, self.files = fails, dict[str, bool](), dict[str, dict[str, bytes]]()

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        if self.fails == "create_repo":
            raise OSError("no right to create it")
        self.private.setdefault(repo_id, private)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        if self.fails == "upload_folder":
            raise ConnectionError("the line is cut")
        assert repo_id in self.private
        self.files[repo_id] = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def put_in_place(patch: pytest.MonkeyPatch, hub: Hub, token: str | None = "a token") -> None:
    patch.setattr(huggingface_hub, "HfApi", lambda: hub)
    patch.setattr(huggingface_hub, "get_token", lambda: token)


def settings(tmp_path: Path, **changes: Any) -> Config:
    tiny.save_pair(tmp_path)
    few = {"train__steps": 1, "evaluate__prompts": 1, "data__task__heldout": 2, "data__task__train": 8}
    return Config.model_validate(tiny.run_settings(tmp_path, tmp_path / "run", **few, **changes))


def test_the_id_alone_is_enough_and_a_new_repository_is_private() -> None:
    base = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"prompts": "p"}, "output": "o"}
    push = Config.model_validate({**base, "push_to_hub": PUSHED}).push_to_hub
    assert push is not None
    assert (push.id, push.private) == (PUSHED, True)
    with pytest.raises(ConfigError, match=r"push_to_hub\.id"):
        Config.model_validate({**base, "push_to_hub": "no-owner"})


def test_the_files_of_a_folder_are_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    put_in_place(monkeypatch, hub)
    (tmp_path / "config.json").write_text("{}")
    prepare_push(PUSHED, private=False)
    prepare_push(PUSHED, private=True)  # it is there already
    assert hub.private == {PUSHED: False}
    assert push(tmp_path, PUSHED).endswith("commit/1")
    assert hub.files[PUSHED] == {"config.json": b"{}"}


@pytest.mark.slow
def test_a_run_is_pushed_and_one_whose_push_fails_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(fails="upload_folder")
    put_in_place(monkeypatch, hub)
    config = settings(tmp_path, push_to_hub=PUSHED)
    with pytest.raises(CheckpointError) as error:
        commands.train(config)
    student = tmp_path / "run" / "student"
    assert "the line is cut" in str(error.value)
    assert f"hf upload {PUSHED} {student} ." in str(error.value)
    assert {"README.md", "model.safetensors", "config.json"} <= {file.name for file in student.iterdir()}
    assert newest_step(tmp_path / "run" / "checkpoints") == 1
    hub.fails = ""
    longer = {**config.to_dict(), "train": {**config.to_dict()["train"], "steps": 2}}
    run = commands.train(Config.model_validate(longer), resume=True)
    assert len(run.steps) == 2
    assert hub.files[PUSHED] == {file.name: file.read_bytes() for file in student.iterdir()}


@pytest.mark.parametrize(("hub", "token"), [(Hub(fails="create_repo"), "a token"), (Hub(), None)])
def test_what_cannot_be_pushed_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub, token: str | None
) -> None:
    put_in_place(monkeypatch, hub, token)
    with pytest.raises(ConfigError, match=PUSHED):
        commands.train(settings(tmp_path, push_to_hub=PUSHED))
    assert not (tmp_path / "run").exists()
