"""Records of a run as JSON lines: written as whole lines, read up to a broken end."""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gold.errors import CheckpointError, DataError
from gold.files import json_value, one_line, plain, read_bytes

FILE_OF_KIND = {
    "train": "metrics.jsonl",
    "eval": "metrics.jsonl",
    "sample": "samples.jsonl",
    "start": "notes.jsonl",
    "note": "notes.jsonl",
}


def record_line(kind: str, record: Mapping[str, Any]) -> bytes:
    """The line of a record. NumPy and torch scalars become numbers, NaN and infinities null.

    Raises:
        DataError: an unknown kind, no integer `step`, or a value that JSON cannot represent.
    """
    if kind not in FILE_OF_KIND:
        raise DataError(f"unknown kind of record {kind!r}; known are {', '.join(FILE_OF_KIND)}")
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise DataError(f"a record needs an integer step, got {step!r}")
    line = json.dumps(plain({"kind": kind, **record}), ensure_ascii=False, allow_nan=False) + "\n"
    return line.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode("utf-8")


def read_lines(file: Path) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """Every line with its record, and the number of bytes up to the end of the last whole line.

    Raises:
        CheckpointError: a broken line before a whole one.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    *whole, rest = read_bytes(file, CheckpointError, None).split(b"\n")
    broken, first = len(rest), ""
    for number, raw in enumerate(whole, start=1):
        try:
            record = json_value(raw)
            if not (isinstance(record, dict) and _is_step(record.get("step")) and "kind" in record):
                raise ValueError("expected an object with kind and step")
        except ValueError as error:
            first = first or f"{file}:{number}: a broken line, {one_line(error)}; remove it by hand"
            broken += len(raw) + 1
            continue
        if first:
            raise CheckpointError(first)
        found.append((raw.decode("utf-8") + "\n", record))
    return found, broken


def open_to_append(file: Path) -> int:
    """The descriptor of a file of records, created if missing.

    Raises:
        CheckpointError: it is not a file, or its last line is incomplete.
    """
    stream = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    found = os.fstat(stream)
    fault = None
    if not stat.S_ISREG(found.st_mode):
        fault = f"cannot write {file}: it is no file"
    elif found.st_size and os.pread(stream, 1, found.st_size - 1) != b"\n":
        fault = f"{file} ends in a half-written line; resume the run (--resume)"
    if fault is not None:
        os.close(stream)
        raise CheckpointError(fault)
    return stream


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
