"""Revisions of names on the Hub, and what is said where the Hub refuses: by doubles of its client, offline."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import httpx2
import huggingface_hub
import pyarrow as pa
import pytest
import support.tiny_models as tiny
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from support.command import run_gold

from gold.data import load_prompts, row_of
from gold.errors import ConfigError, DataError, GoldError, ModelError, VocabularyError
from gold.hub_names import named_revision, split_revision, with_revision
from gold.models.files import check_files
from gold.rollout.vllm_process import ServerCommand
from gold.tokenize.load import open_source
from gold.train.input_digests import of_prompts

ID = st.from_regex(r"\w[\w.-]*(/\w[\w.-]*)?", fullmatch=True).filter(lambda name: not Path(name).exists())
REVISION = st.from_regex(r"[A-Za-z0-9._/-]+", fullmatch=True)


def refusal(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    request = httpx2.Request("GET", "https://huggingface.co/x")
    return kind("first line\nsecond line", response=httpx2.Response(403, request=request))


FAULTS: list[tuple[Exception, str]] = [
    (refusal(GatedRepoError), "it is gated on the Hub: accept its terms at https://huggingface.co/"),
    (refusal(RepositoryNotFoundError), "on the Hub (or none that your token may read)"),
    (refusal(RevisionNotFoundError), "it is on the Hub, but has no revision 'v9'"),
    (OSError("Name or service not known"), "the Hub cannot be asked for it: Name or service not known"),
    (refusal(HfHubHTTPError), "the Hub cannot be asked for it: first line"),
]


@given(ID, REVISION)
def test_a_name_with_a_revision_is_taken_apart_as_it_was_put_together(name: str, revision: str) -> None:
    assert split_revision(with_revision(name, revision)) == (name, revision)
    assert named_revision(f"{name}@{revision}", revision) == (name, revision)
    assert split_revision(name) == (name, None)
    with pytest.raises(ConfigError, match="keep one of the two"):
        named_revision(f"{name}@{revision}", f"{revision}x")


@pytest.mark.parametrize("path", ["/a/b@c", "./x@y", "a/b/c@d", "a b@c", "~/m@1", "@", "a@"])
def test_a_path_has_no_revision(path: str) -> None:
    assert split_revision(path) == (path, None)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder or file here"):
        with_revision(str(tmp_path), "main")


@pytest.mark.parametrize(("fault", "told"), FAULTS)
def test_what_the_hub_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, fault: Exception, told: str
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise fault

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    calls: list[tuple[type[GoldError], Any]] = [
        (ModelError, lambda: check_files("nobody/nothing@v9")),
        (VocabularyError, lambda: open_source("nobody/nothing@v9")),
        (DataError, lambda: load_prompts("nobody/nothing@v9")),
        (DataError, lambda: load_prompts("nobody/nothing", revision="v9")),
    ]
    for kind, call in calls:
        with pytest.raises(kind) as caught:
            call()
        assert told in str(caught.value)
        assert "nobody/nothing" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_gated_model_is_refused_before_its_files_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def info(_: Any, name: str, revision: str | None = None, **__: Any) -> Any:
        asked.append((name, revision))
        return SimpleNamespace(gated="manual", sha="c" * 40)

    def check(*_: Any, **__: Any) -> None:
        raise refusal(GatedRepoError)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", check)
    with pytest.raises(ModelError, match="it is gated on the Hub"):
        check_files("somebody/model@v1")
    assert asked == [("somebody/model", "v1")]
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda *_, **__: None)
    check_files("somebody/model@v1")


def test_a_run_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny.save_pair(tmp_path)
    file = tiny.write_settings(tmp_path / "run.yaml", tiny.run_settings(tmp_path, tmp_path / "run"))
    for override, told in (
        ("student.revision=main", "student.revision: "),
        ("teacher={path: a/b@c, revision: d}", "teacher.revision: a/b@c: revision d is given too"),
        ("student.attn_implementation=a/b", "attn_implementation a/b is code on the Hub"),
        ("student.attn_implementation=nonsense", "nonsense"),
        ("teacher.device_map=cpu", "teacher.device_map: expected auto | balanced"),
        ("student.device_map=auto", "student.device_map: unknown key"),
    ):
        done = run_gold(monkeypatch, capfd, "train", file, override)
        assert done.code == 1
        lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, done.err
        assert told in lines[0]


def test_a_server_of_the_student_gets_its_revision() -> None:
    words = ServerCommand("org/model", revision="v1").words("name", 1, "file")
    assert words[words.index("--revision") + 1] == "v1"
    assert "--revision" not in ServerCommand("org/model").words("name", 1, "file")


# -- data sets --


@pytest.fixture
def on_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """somebody/sums, with two subsets and two splits, read from a folder; what was asked of the Hub."""
    folder = tmp_path / "sums"
    folder.mkdir()
    for split, first in (("train", 0), ("test", 5)):
        rows = [{"question": str(n), "answer": str(n), "level": n} for n in range(first, first + 5)]
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    asked: list[Any] = []
    real = datasets.load_dataset_builder

    def builder(name: str, subset: str | None = None, revision: str | None = None) -> Any:
        asked.append((name, subset, revision))
        return real(str(folder), cache_dir=str(tmp_path / "cache"))

    def info(_: Any, name: str, revision: str | None = None, **__: Any) -> Any:
        asked.append((name, revision))
        return SimpleNamespace(gated=False, sha="c" * 40)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda *_, **__: ["main", "hard"])
    datasets.disable_progress_bars()
    return asked


def test_a_data_set_of_the_hub_is_read_at_its_commit(on_hub: list[Any]) -> None:
    kept = load_prompts("somebody/sums@v1", subset="main", split="test")
    assert on_hub == [("somebody/sums", "v1"), ("somebody/sums", "main", "c" * 40)]
    assert [p.completion for p in kept] == [str(n) for n in range(5, 10)]
    assert kept.facts.ignored == ("level",)
    for options in ({"streaming": True}, {"revision": "v1"}):
        name = "somebody/sums" if "revision" in options else "somebody/sums@v1"
        other = load_prompts(name, subset="main", split="test", **options)  # type: ignore[arg-type]
        assert list(map(row_of, other)) == list(map(row_of, kept))
    assert of_prompts(kept, "x")["revision"] == "c" * 40
    assert len(load_prompts("somebody/sums", subset="main")) == 5
    for streaming in (False, True):
        some = load_prompts("somebody/sums", subset="main", split="train[1:3]", streaming=streaming)
        assert [p.completion for p in some] == ["1", "2"]


def test_a_subset_or_split_that_is_not_there_is_one_line(on_hub: list[Any]) -> None:
    for options, told in (
        ({}, "has the subsets main, hard: choose one"),
        ({"subset": "mian"}, "has no subset mian; did you mean main?"),
        ({"subset": "main", "split": "tests"}, "has no split tests; did you mean test?"),
    ):
        with pytest.raises(DataError, match=r"somebody/sums") as caught:
            load_prompts("somebody/sums", **options)  # type: ignore[arg-type]
        assert told in str(caught.value)


# -- models in the cache of the Hub --

_LOADED = """
import warnings; warnings.simplefilter("error")
import gold
from gold.train.input_digests import of_files
main, v2 = gold.load_model("org/tiny"), gold.load_model("org/tiny@v2", attn_implementation="eager")
assert gold.load_model("org/tiny", revision="v2").vocabulary.size == v2.vocabulary.size
other = gold.Vocabulary.load("org/tiny@v2")
print(main.vocabulary.size, v2.vocabulary.size, v2.lm.config._attn_implementation, other.size)
print(of_files("org/tiny")["revision"], of_files("org/tiny@v2")["revision"], of_files("org/tiny@v3"))
"""


@pytest.mark.slow
def test_a_revision_in_the_cache_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    tiny.save_pair(tmp_path)
    folder = tmp_path / "home" / "hub" / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    for commit, side, name in (("a" * 40, "student", "main"), ("b" * 40, "teacher", "v2")):
        shutil.copytree(tmp_path / side, folder / "snapshots" / commit)
        (folder / "refs" / name).write_text(commit)
    done = subprocess.run(
        [sys.executable, "-c", _LOADED],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    student, teacher = tiny.tiny_student(), tiny.tiny_teacher()
    sizes = f"{student.vocabulary.size} {teacher.vocabulary.size} eager {teacher.vocabulary.size}"
    assert done.stdout.splitlines() == [sizes, f"{'a' * 40} {'b' * 40} None"]
