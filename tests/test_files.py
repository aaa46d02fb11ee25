"""What others wrote, read whole or refused in one line: JSON and YAML of every bad kind, and what is no file."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gold.errors import ConfigError, DataError
from gold.files import json_value, read_bytes, read_json, read_json_object, read_text
from gold.yaml_file import parse_yaml, read_yaml

Reader = Callable[[Path], Any]


def json_of(path: Path) -> Any:
    return read_json(path, DataError)


def yaml_of(path: Path) -> Any:
    return read_yaml(path, DataError)


READERS = pytest.mark.parametrize("read", [json_of, yaml_of])


def refused(read: Reader, path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    line = str(caught.value)
    assert str(path) in line
    assert "\n" not in line
    assert len(line) < 400 + len(str(path))
    return line


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b"\0\0\0\0",
        b"[" * 100_000,
        b"[" * 400 + b"]" * 400,
        b'{"a":' * 101 + b"1" + b"}" * 101,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\\ud800"}',
        b"{'a': 1}",
    ],
)
def test_bad_json_is_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    refused(json_of, tmp_path / "a.json")


@pytest.mark.parametrize(
    "text",
    [
        b"a: [",
        b"\xff\xfe",
        b"\0",
        b"[" * 500,
        b"- " * 3000 + b"x",
        b"a: " + b"[" * 150 + b"]" * 150,
        b"a: " + b"9" * 5000,
        b"a: !!int x",
        b"a: !!timestamp 2001-99-99",
        b"a: !!timestamp x",
        b"a: !!float x",
        b'a: "x\\0"',
        b"a: !!python/object/apply:os.system [true]",
        b"a: &a [*a]",
        b"a: &a {b: *a}",
        b"? [a]\n: 1",
        b"a: 1\na: 2",
        LAUGHS.encode(),
        b"".join(b"a%d: &a%d [%s]\n" % (i, i, b"*a%d" % (i - 1) if i else b"x") for i in range(300)),
    ],
)
def test_bad_yaml_is_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.yaml").write_bytes(text)
    refused(yaml_of, tmp_path / "a.yaml")


def test_aliases_that_are_used_are_read() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: *x", "here", ConfigError) == (
        {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1}},
        {("a",): 1, ("a", "b"): 1, ("c",): 2, ("c", "b"): 1, ("d",): 3, ("d", "b"): 1},
    )


@READERS
@given(data=st.binary(max_size=60) | st.text("{}[]\"',:-&*!?|>#\n ab10.\\u", max_size=60).map(str.encode))
def test_whatever_a_file_holds_it_is_read_or_refused(
    read: Reader, tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        read(path)


@READERS
def test_what_is_no_file_is_one_line(read: Reader, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "folder", "loop", "pipe", "x" * 5000, "pipe/below"):
        assert "cannot be read" in refused(read, tmp_path / name)
    with pytest.raises(DataError, match="no name of a file"):
        read(Path("a\0b"))


def test_a_file_that_is_too_long_is_refused_and_an_endless_one_ends(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b" " * 11)
    with pytest.raises(DataError, match="more than"):
        read_bytes(tmp_path / "long", DataError, 10)
    assert read_bytes(tmp_path / "long", DataError, None) == b" " * 11
    with pytest.raises(DataError, match="more than"):
        read_bytes(Path("/dev/zero"), DataError, 10)


def test_a_pipe_that_a_shell_opened_is_read() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 0.05; echo '{\"a\": 1}'"], stdout=subprocess.PIPE) as echo:
        assert echo.stdout is not None
        assert read_json(Path(f"/dev/fd/{echo.stdout.fileno()}"), DataError) == {"a": 1}


def test_values_come_back_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1e30, NaN, "é", "\\ud83d\\ude00"]}', "utf-8")
    assert read_text(path, DataError) == path.read_text("utf-8")
    big, nan, *texts = read_json_object(path, DataError)["a"]
    assert (big, texts) == (1e30, ["é", "😀"])
    assert nan != nan
    path.write_text("[1]")
    with pytest.raises(DataError, match="no JSON object"):
        read_json_object(path, DataError)


def test_a_refusal_of_the_caller_goes_through() -> None:
    def never(pairs: list[tuple[str, Any]]) -> Any:
        raise DataError("no objects here")

    with pytest.raises(DataError, match="no objects here"):
        json_value("{}", never)
