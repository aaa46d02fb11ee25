"""Files that others wrote, read whole: bytes, text and JSON. What cannot be used is one line that names the file."""

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gold.errors import GoldError

MOST_BYTES = 2**28
"""A longer file of settings or of a tokenizer is refused; the longest that are published have an eighth of it."""

_DEEPEST = 100
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path, error: type[GoldError], most: int = MOST_BYTES) -> Any:
    """The value in a JSON file; NaN and infinities are numbers, as Python and transformers write them.

    Raises: `error`, in one line, for a file that cannot be read (see `read_bytes`), and for what is no JSON, is nested
    more than 100 deep, or holds text that UTF-8 cannot.
    """
    data = read_bytes(path, error, most)
    try:
        value = json_value(data)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(f"{path} is no JSON: it holds half a surrogate pair") from None
    except UnicodeDecodeError as fault:
        raise error(f"{path} is not UTF-8 text (byte {fault.start})") from None
    except ValueError as fault:
        raise error(f"{path} is no JSON: {fault}") from None
    return value


def read_json_object(path: Path, error: type[GoldError], most: int = MOST_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises: `error`, as `read_json`, and for another kind of value.
    """
    value = read_json(path, error, most)
    if not isinstance(value, dict):
        raise error(f"{path} holds no JSON object")
    return value


def json_value(data: bytes | str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text; `pairs` makes the objects, as `object_pairs_hook` of Python's reader.

    Raises: ValueError with a reason of one line, whatever is wrong; JSONDecodeError and UnicodeDecodeError are ones.
    """
    text = data.decode() if isinstance(data, bytes) else data
    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        if type(error) is not ValueError:  # the caller's `pairs` refuses them
            raise
        raise ValueError("it has a whole number of thousands of digits") from None
    if text.count("[") + text.count("{") > _DEEPEST and _is_deep(value):
        raise ValueError("it is nested too deeply")
    return value


def read_text(path: Path, error: type[GoldError], most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file.

    Raises: `error` as `read_bytes`, and for other bytes.
    """
    try:
        return read_bytes(path, error, most).decode()
    except UnicodeDecodeError as fault:
        raise error(f"{path} is not UTF-8 text (byte {fault.start})") from None


def read_bytes(path: Path, error: type[GoldError], most: int | None = MOST_BYTES) -> bytes:
    """The content of a file, or of an open pipe that a shell names (`/dev/fd/63`).

    Raises: `error`, in one line, if there is none, if it may not be read, is a folder or a named pipe, which could
    keep the reader waiting for ever, or has more bytes than `most`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror or fault}") from None
    except ValueError:  # a name with a NUL
        raise error(f"{str(path)!r} is no name of a file") from None
    try:
        with open(descriptor, "rb") as stream:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISFIFO(mode) and os.path.exists(os.path.realpath(path)):
                raise error(f"{path} cannot be read: it is a named pipe, no file")
            os.set_blocking(descriptor, True)
            data = stream.read() if most is None else stream.read(most + 1)
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror or fault}") from None
    if most is not None and len(data) > most:
        raise error(f"{path} cannot be read: it has more than {most >> 20} MiB")
    return data


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return any(isinstance(item, dict | list) for item in level)
