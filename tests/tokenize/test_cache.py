"""Arrays kept between runs: never trusted where they are not whole, never needed."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from gold.tokenize.cache import cache_folder, cached_ids

IDS = np.arange(-1, 9, dtype=np.int32)


def kept(content: str = "one", ids: np.ndarray = IDS) -> int:
    """How often the array had to be built, which is checked to be what comes back."""
    built = []

    def build() -> np.ndarray:
        built.append(1)
        return ids

    for _ in range(2):
        found = cached_ids(content, len(ids), build)
        assert found.dtype == np.int32
        assert found.tolist() == ids.tolist()
    return len(built)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GOLD_CACHE", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


def test_an_array_is_built_once_for_its_content_and_length(folder: Path) -> None:
    assert kept() == 1
    assert kept() == 0
    assert kept("two", IDS[::-1]) == 1
    assert kept("two", IDS[:3]) == 1
    assert kept("none", IDS[:0]) == 1
    assert kept("none", IDS[:0]) == 0
    assert len(list(folder.iterdir())) == 3


def test_a_file_that_is_not_whole_is_built_again(folder: Path) -> None:
    kept()
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    broken = [whole[:length] for length in range(len(whole))] + [whole + b"\0", whole[4:] + whole[:4]]
    broken += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    for content in broken:
        path.write_bytes(content)
        assert kept() == 1
        assert path.read_bytes() == whole


def test_a_file_under_another_name_is_not_taken(folder: Path) -> None:
    kept()
    (path,) = folder.iterdir()
    kept("two", IDS[::-1])
    (other,) = set(folder.iterdir()) - {path}
    shutil.copy(path, other)
    assert kept("two", IDS[::-1]) == 1


def test_without_a_place_to_write_arrays_are_built_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place in ("", str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        monkeypatch.setenv("GOLD_CACHE", place)
        assert kept() == 2
    monkeypatch.setenv("GOLD_CACHE", str(tmp_path / "cache"))
    kept()
    (path,) = (tmp_path / "cache").iterdir()
    path.unlink()
    path.mkdir()
    assert kept() == 2
    assert [*(tmp_path / "cache").iterdir()] == [path]


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("GOLD_CACHE", str(tmp_path))
    assert kept() == 2


@pytest.mark.parametrize("failing", ["write", "replace"])
def test_a_failed_write_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if failing == "replace":
        monkeypatch.setattr(os, "replace", full)
    else:
        monkeypatch.setattr("tempfile._TemporaryFileWrapper.write", full, raising=False)
    assert kept() == 2
    assert not list(folder.iterdir())


def test_the_folder_is_the_one_named_else_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLD_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("GOLD_CACHE", "")
    assert cache_folder() is None
    monkeypatch.delenv("GOLD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "gold"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert cache_folder() == tmp_path / "home" / ".cache" / "gold"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None
