"""Files as they come: cut short, of another kind, with a value that no reader expects at one place."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Mutation = Callable[[Path], object]

DIGITS = "9" * 5000


def _whole(data: bytes) -> Mutation:
    return lambda path: path.write_bytes(data)


def _in_place(make: Callable[[Path], object]) -> Mutation:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


FILES: dict[str, Mutation] = {
    "missing": lambda path: path.unlink(),
    "empty": _whole(b""),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a byte less": lambda path: os.truncate(path, path.stat().st_size - 1),
    "zeros": _whole(bytes(1000)),
    "ones": _whole(b"\xff" * 1000),
    "zeros behind": lambda path: path.write_bytes(path.read_bytes() + bytes(100)),
    "not UTF-8": lambda path: path.write_bytes(path.read_bytes().replace(b"e", b"\xe9", 1)),
    "deep": _whole(b"[" * 100_000),
    "deep objects": _whole(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "null": _whole(b"null"),
    "a list": _whole(b"[]"),
    "an object": _whole(b"{}"),
    "a number": _whole(b"1"),
    "digits": _whole(DIGITS.encode()),
    "a text": _whole(b'"x"'),
    "a folder": _in_place(lambda path: path.mkdir()),
    "a pipe": _in_place(os.mkfifo),
    "a loop": _in_place(lambda path: path.symlink_to(path.name)),
}

_NUMBER = object()
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "negative": -5,
    "large": 10**20,
    "digits": _NUMBER,
    "fraction": 1.5,
    "infinite": float("inf"),
    "text": "abc",
    "nothing": "",
    "steering": "\x1b[2J\nx",
    "surrogate": "\ud800",
    "outside": "../../../etc/passwd",
    "list": [],
    "lists": [[1]],
    "object": {},
    "objects": {"a": {"b": 1}},
    "deep": json.loads("[" * 300 + "]" * 300),
}


def json_mutations(value: Any, most_items: int = 1) -> Iterator[tuple[str, str]]:
    """Names and texts of a JSON value with one place changed; of a list only the first items are."""
    for path in _paths(value, most_items):
        for name, new in VALUES.items():
            changed = copy.deepcopy(value)
            place = changed
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = "<digits>" if new is _NUMBER else new
            text = json.dumps(changed).replace('"<digits>"', DIGITS)
            yield f"{'.'.join(map(str, path))} {name}", text
        if isinstance(path[-1], str):
            changed = copy.deepcopy(value)
            place = changed
            for step in path[:-1]:
                place = place[step]
            del place[path[-1]]
            yield f"{'.'.join(map(str, path))} missing", json.dumps(changed)


def _paths(value: Any, most_items: int) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        keys: list[Any] = list(value)
        keys = keys if len(keys) <= 40 else keys[:most_items]
    elif isinstance(value, list):
        keys = list(range(min(len(value), most_items)))
    else:
        return
    for key in keys:
        yield (key,)
        for below in _paths(value[key], most_items):
            yield (key, *below)


def fresh(source: Path, target: Path) -> Path:
    """A copy of a folder to be broken."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    return target
