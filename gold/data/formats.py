"""The rows of a file: JSON lines, a JSON array, CSV or parquet, recognised by content, plain or gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from gold.data.columns import Row
from gold.data.prompt import kind_of
from gold.errors import DataError
from gold.files import json_items, json_value, open_file

_END = object()
_BOM = b"\xef\xbb\xbf"
_FAULTS = (OSError, EOFError, zlib.error)
_UNREAD = {
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as CSV",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it",
    b"BZh": "compressed with bzip2; unpack it",
    b"\xfd7zX": "compressed with xz; unpack it",
    b"ARROW1": "an Arrow file; give the folder that datasets saved, or save it as parquet",
    b"\xff\xff\xff\xff": "an Arrow stream; give the folder that datasets saved, or save it as parquet",
    b"SQLi": "an SQLite file; export it as CSV",
}
DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".gz", ".txt", ".arrow")


Numbered = Generator[tuple[int, Row], None, None]
"""Rows with their numbers; closing it closes their file."""


@dataclass
class Rows:
    """The rows of a source with their numbers, read one after the other.

    ``place`` begins the line of an error, with the number of its row. ``texts``: every value is a text.
    """

    name: str
    format: str
    numbered: Numbered
    place: str = "{name}: row {number}"
    texts: bool = False
    revision: str | None = None

    def at(self, number: int) -> str:
        """The place of a row in errors."""
        return self.place.format(name=self.name, number=number)


def rows_of_file(path: Path, columns: set[str]) -> Rows:
    """The rows of a file; of parquet only the ``columns``.

    Raises:
        DataError: it cannot be read, or has none of the formats.
    """
    stream = open_file(path, DataError)
    try:
        head = _head(stream)
        if head.startswith(b"\x1f\x8b"):
            stream = cast(BinaryIO, io.BufferedReader(_Unzipped(stream)))
            head = _head(stream)
        found = _recognised(path, stream, head)
    except _FAULTS as fault:
        stream.close()
        raise DataError(f"{path} cannot be read: {_reason(fault)}") from None
    except BaseException:
        stream.close()
        raise
    if found is None:
        from gold.data.tables import rows_of_parquet

        stream.close()
        return rows_of_parquet(path, columns)
    return found


class _Unzipped(gzip.GzipFile):
    """The content of a gzip file, which is closed with it."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(fileobj=stream)
        self._stream = stream

    def close(self) -> None:
        """Close both."""
        super().close()
        self._stream.close()


def _recognised(path: Path, stream: BinaryIO, head: bytes) -> Rows | None:
    """The rows in a stream that begins with ``head``; None for parquet."""
    for magic, what in _UNREAD.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}")
    if head.startswith(b"PAR1"):
        return None
    name, start = str(path), head.removeprefix(_BOM).lstrip()[:1]
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if start == b"[":
        return Rows(name, "JSON array", _array(path, stream))
    if start != b"{" and (".csv" in suffixes or ".tsv" in suffixes):
        return Rows(name, "CSV", _csv(path, stream, "\t" if ".tsv" in suffixes else None), texts=True)
    if ".parquet" in suffixes:
        raise DataError(f"{path} is no parquet file: it does not begin with PAR1; fetch it again")
    return Rows(name, "JSON lines", _json_lines(path, stream), "{name}:{number}")


def _head(stream: BinaryIO) -> bytes:
    return cast(io.BufferedReader, stream).peek(4096)


def _reason(fault: BaseException) -> str:
    return getattr(fault, "strerror", None) or str(fault)


def _json_lines(path: Path, stream: BinaryIO) -> Numbered:
    """The objects on the lines that are not blank."""
    try:
        # A binary file is split only at b"\n", not at U+2028, which JSON strings may contain.
        with stream:
            for number, raw in enumerate(stream, start=1):
                line = raw.removeprefix(_BOM) if number == 1 else raw
                if not line.strip():
                    continue
                try:
                    row = _object_of(line.removesuffix(b"\n"))
                except DataError as error:
                    raise DataError(f"{path}:{number}: {error}") from error
                yield number, row
    except _FAULTS as fault:
        raise DataError(f"{path} cannot be read: {_reason(fault)}") from None


def _object_of(raw: bytes) -> dict[str, Any]:
    """The JSON object in a line."""
    try:
        line = json_value(raw, _refuse_repeated_keys)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8, byte 0x{raw[error.start]:02x} at column {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON, {error.msg} at column {error.colno}; expected one object per line"
        ) from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"not usable JSON, {error}") from error
    return _checked(line)


def _checked(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'got {kind_of(value)}; expected an object such as {{"prompt": "…"}}')
    return value


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    line = dict(pairs)
    if len(line) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f'key "{twice}" is given twice in one object')
    return line


def _array(path: Path, stream: BinaryIO) -> Numbered:
    """The objects of a JSON array, of which only the text is in memory as a whole."""
    raw = b""
    try:
        with stream:
            raw = stream.read()
        text = raw.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8, byte 0x{raw[error.start]:02x}") from None
    except _FAULTS as fault:
        raise DataError(f"{path} cannot be read: {_reason(fault)}") from None
    del raw
    values = json_items(text, _refuse_repeated_keys)
    for number in itertools.count(1):
        try:
            value = next(values, _END)
            if value is _END:
                return
            row = _checked(value)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}: not JSON, {error.msg} at column {error.colno} (row {number} of an array)"
            ) from None
        except DataError as error:
            raise DataError(f"{path}: row {number}: {error}") from None
        except ValueError as error:
            raise DataError(f"{path}: row {number}: not usable JSON, {error}") from None
        yield number, row


def _csv(path: Path, stream: BinaryIO, delimiter: str | None) -> Numbered:
    """The rows below the header, each value a text; an empty value is None."""
    csv.field_size_limit(sys.maxsize)  # of the module: a text may be longer than its 128 KiB
    number = 0
    try:
        with stream:
            first = stream.readline().removeprefix(_BOM)
            found = delimiter or max(",;\t", key=first.decode("utf-8", "replace").count)
            lines = (raw.decode() for raw in itertools.chain([first], stream))
            values = csv.reader(lines, delimiter=found, strict=True)
            header = next(values, [])
            if len(set(header)) < len(header) or not all(header):
                raise DataError(f"the header is {found.join(header)[:120]}; expected a name for each column")
            for row in values:
                if not row:
                    continue
                number += 1
                if len(row) != len(header):
                    raise DataError(f"it has {len(row)} values, and the header names {len(header)} columns")
                yield number, {name: value or None for name, value in zip(header, row, strict=True)}
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path}: row {number + 1}: not UTF-8, byte 0x{byte:02x}; save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: row {number + 1}: not CSV, {error}") from None
    except DataError as error:
        raise DataError(f"{path}: row {number}: {error}") from None
    except _FAULTS as fault:
        raise DataError(f"{path} cannot be read: {_reason(fault)}") from None
