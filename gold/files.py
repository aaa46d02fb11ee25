"""Reads and writes whole files (bytes, text, JSON); errors are one line that names the file."""

import contextlib
import errno
import functools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gold.errors import DataError, GoldError

MOST_BYTES = 2**28
"""Larger settings or tokenizer files are rejected; the largest published ones have an eighth of it."""

_DEEPEST = 100
_LONGEST_HEADER = 100_000_000  # of a safetensors file; the limit of its own reader
_SPACE = re.compile("[ \t\n\r]*")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path, error: type[GoldError], most: int = MOST_BYTES) -> Any:
    """The value in a JSON file; NaN and infinities are numbers, as in Python and transformers.

    Raises: `error`, in one line, for a file that cannot be read (see `read_bytes`), and for content that is not JSON,
    is nested more than 100 deep, or contains text that UTF-8 cannot encode.
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


ADAPTER_CONFIG = "adapter_config.json"
"""The settings of a folder of adapters, as peft names them."""


def adapter_base(path: str | Path, error: type[GoldError]) -> str | None:
    """The location of the base model of a folder of adapters (peft); None for any other path.

    A path in its settings that does not exist is also tried relative to the folder.

    Raises: `error`: the settings cannot be read, or name no base model or another folder of adapters.
    """
    folder = Path(os.path.expanduser(path))
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    settings = read_json_object(file, error)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base or "\0" in base:
        raise error(f"{file} names no base model; set base_model_name_or_path in it")
    if (Path(base) / ADAPTER_CONFIG).is_file():
        raise error(f"{file}: its base model {base} is a folder of adapters too; merge that one first")
    beside = folder / base
    if not Path(base).exists() and beside.is_dir():
        return str(beside.resolve())
    revision = settings.get("revision")  # of the base model, as peft reads it
    return (
        f"{base}@{revision}" if isinstance(revision, str) and revision and not Path(base).exists() else base
    )


def json_value(data: bytes | str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text; `pairs` creates objects, like Python's `object_pairs_hook`.

    Raises: ValueError (also its subclasses JSONDecodeError and UnicodeDecodeError) with a one-line reason.
    """
    text = data.removeprefix(b"\xef\xbb\xbf").decode() if isinstance(data, bytes) else data
    try:
        decoder: Any = _decoder(pairs)
        try:
            value, end = decoder.scan_once(text, 0)
        except StopIteration:
            value, end = None, -1
        if end != len(text):
            value = decoder.decode(text)  # takes white space, and names the place of an error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        if type(error) is not ValueError:  # raised by the caller's `pairs`
            raise
        raise ValueError("it has a whole number of thousands of digits") from None
    if text.count("[") + text.count("{") > _DEEPEST and _is_deep(value):
        raise ValueError("it is nested too deeply")
    return value


def json_items(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Iterator[Any]:
    """The values of a JSON array, one after the other: only one is in memory.

    Raises: ValueError as `json_value`; what the whole text is comes out at its end.
    """
    scan = _decoder(pairs).scan_once  # type: ignore[attr-defined]
    at = _SPACE.match(text, 0).end()  # type: ignore[union-attr]
    if text[at : at + 1] != "[":
        raise json.JSONDecodeError("Expecting '['", text, at)
    at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
    ended = text[at : at + 1] == "]"
    while not ended:
        try:
            value, end = scan(text, at)
        except StopIteration as stop:
            raise json.JSONDecodeError("Expecting value", text, stop.value) from None
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        except ValueError as error:
            if type(error) is not ValueError:
                raise
            raise ValueError("it has a whole number of thousands of digits") from None
        if text.count("[", at, end) + text.count("{", at, end) > _DEEPEST and _is_deep(value):
            raise ValueError("it is nested too deeply")
        yield value
        at = _SPACE.match(text, end).end()  # type: ignore[union-attr]
        ended = text[at : at + 1] == "]"
        if not ended and text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        if not ended:
            at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
    at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
    if at != len(text):
        raise json.JSONDecodeError("Extra data", text, at)


@functools.lru_cache(maxsize=8)  # a decoder takes longer to make than a short text to read
def _decoder(pairs: Callable[[list[tuple[str, Any]]], Any] | None) -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=pairs)


def read_text(path: Path, error: type[GoldError], most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file.

    Raises: `error` as `read_bytes`, and for other bytes.
    """
    try:
        return read_bytes(path, error, most).decode()
    except UnicodeDecodeError as fault:
        raise error(f"{path} is not UTF-8 text (byte {fault.start})") from None


def read_bytes(path: Path, error: type[GoldError], most: int | None = MOST_BYTES) -> bytes:
    """The content of a file, or of an open pipe passed by a shell (`/dev/fd/63`).

    Raises: `error` as `open_file`, and if it has more bytes than `most`.
    """
    try:
        with open_file(path, error) as stream:
            data = stream.read() if most is None else stream.read(most + 1)
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror or fault}") from None
    if most is not None and len(data) > most:
        raise error(f"{path} cannot be read: it has more than {most >> 20} MiB")
    return data


def open_file(path: Path, error: type[GoldError]) -> BinaryIO:
    """A file opened for reading, or an open pipe passed by a shell (`/dev/fd/63`).

    Raises: `error`, in one line, if it does not exist, is not readable, or is a folder or a named pipe, which could
    block forever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror or fault}") from None
    except ValueError:  # a name with a NUL
        raise error(f"{str(path)!r} is no name of a file") from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode) or (stat.S_ISFIFO(mode) and os.path.exists(os.path.realpath(path))):
        os.close(descriptor)
        kind = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "it is a named pipe, no file"
        raise error(f"{path} cannot be read: {kind}")
    os.set_blocking(descriptor, True)
    return open(descriptor, "rb")


def replace_text(path: Path, text: str) -> None:
    """Replaces a file atomically and syncs it to disk, or fails and keeps the old one."""
    partial = path.with_name(f".tmp-{path.name}")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def append(descriptor: int, data: bytes) -> None:
    """Appends all of the data to an open file, or fails and leaves it unchanged."""
    size = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:])
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def plain(value: Any) -> Any:
    """A value as JSON and YAML types: lists, string keys, plain numbers; NaN and infinities as None.

    Raises: DataError for anything that neither can represent.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy and torch
        return plain(value.tolist())
    raise DataError(
        f"a record cannot hold a {type(value).__name__}; give numbers, strings, lists or mappings"
    )


def one_line(error: BaseException) -> str:
    """The message of an exception in one line, or its type if it has none."""
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__


def safetensors_header(path: Path, error: type[GoldError]) -> tuple[dict[str, Any], int]:
    """The entries in the header of a safetensors file, by tensor, and the number of bytes that the file must have.

    A tensor has a dtype, a shape of integers and data_offsets; the entry `__metadata__` is dropped.

    Raises: `error`, in one line, for a file that cannot be read, or whose header is invalid or longer than the format
    allows.
    """
    with open_file(path, error) as stream:
        length = int.from_bytes(start := stream.read(8), "little")
        header = stream.read(length) if length <= _LONGEST_HEADER else b""
    if len(start) < 8 or len(header) < length:
        raise error(f"{path} is broken, it ends within its header")
    try:
        entries = json_value(header)
    except ValueError as fault:
        raise error(f"{path} is broken, its header is no JSON: {fault}") from None
    tensors: dict[str, Any] = entries if isinstance(entries, dict) else {"": None}
    tensors = {name: entry for name, entry in tensors.items() if name != "__metadata__"}
    if not all(map(_is_tensor, tensors.values())):
        raise error(f"{path} is broken, its header does not list tensors")
    return tensors, 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)


def _is_tensor(entry: Any) -> bool:
    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**63 for one in value)

    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and counts(entry.get("shape"))
        and counts(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
    )


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        level = [each for each in level if isinstance(each, dict | list)]
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
    return any(isinstance(each, dict | list) for each in level)
