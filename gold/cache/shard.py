"""One append-only file of a score cache: its origin, records, and an end marker once it is closed."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import date
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import numpy as np

from gold.errors import TeacherError
from gold.files import json_value, open_file

SHARD_BYTES = 2**30
"""A shard larger than this is followed by a new one."""
_SHARD = b"gold scores 1\n"
_ORIGIN = struct.Struct("<II")
_MARK = b"\xf6row"
_END = b"\xf6end"
_RECORD = struct.Struct("<4s16sIII")
_CRC = struct.Struct("<I")
_RECORD_BYTES = _RECORD.size + _CRC.size
_ENDING = _END + _CRC.pack(crc32(_END))

Bytes = mmap.mmap | bytes


@dataclass(frozen=True)
class Origin:
    """The teacher, weights and vocabulary of the scores in a cache.

    ``teacher`` is its name, for display, and ``date`` the day, as 2026-11-29, that a chat template which prints the
    date wrote into all its prompts, None if not stored. The others identify the scores: ``revision`` the weights,
    ``vocabulary`` (a fingerprint) the tokens, and ``top_k`` the number of observed tokens of each row in addition to
    the one of the text.
    """

    teacher: str
    revision: str
    vocabulary: str
    top_k: int
    date: str | None = None

    @cached_property
    def digest(self) -> bytes:
        """The SHA-256 of the fields that identify the scores."""
        return sha256(json.dumps([self.revision, self.vocabulary, self.top_k]).encode()).digest()

    def key(self, prompt: Sequence[int], ids: Sequence[int], stopped: bool) -> bytes:
        """The key of a text: 16 bytes of the SHA-256 of all that its scores depend on.

        ``prompt`` are the teacher's ids of the prompt, ``ids`` its own tokens of the text's bytes, ``stopped`` whether
        the end of the text is scored.
        """
        numbers = np.array([len(prompt), stopped, *prompt, *ids], "<i4")
        return sha256(self.digest + numbers.tobytes()).digest()[:16]


@dataclass(frozen=True)
class Damage:
    """Bytes ``start`` to ``end`` of a shard that are not an intact record, and the reason."""

    shard: Path
    start: int
    end: int
    what: str

    def __str__(self) -> str:
        return f"{self.shard}: bytes {self.start:,} to {self.end:,}: {self.what}"


@dataclass(frozen=True, slots=True)
class Record:
    """The location of the scores of a text, and their checksum."""

    shard: Shard
    start: int
    length: int
    rows: int
    crc: int

    def read(self) -> bytes | None:
        """The scores; None if they are damaged.

        Raises: TeacherError if the file can no longer be read.
        """
        data = self.shard.pread(self.length, self.start)
        return data if crc32(data) == self.crc else None

    @property
    def damage(self) -> Damage:
        """The whole record as a damaged range."""
        start, end = self.start - _RECORD_BYTES, self.start + self.length
        return Damage(self.shard.path, start, end, "a record whose checksum is another")


class Shard:
    """A shard opened for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def pread(self, length: int, start: int) -> bytes:
        """Up to ``length`` bytes from ``start`` on; not memory-mapped, since the file may be truncated meanwhile.

        Raises: TeacherError if it cannot be read.
        """
        if self._file is None:
            self._file = open_file(self.path, TeacherError)
            weakref.finalize(self, self._file.close)
        try:
            return os.pread(self._file.fileno(), length, start)
        except OSError as error:
            raise TeacherError(f"{self.path} cannot be read: {why(error)}") from error

    def walk(self) -> Iterator[Origin | Damage | tuple[bytes, Record]]:
        """The contents of the file in order: the origin, records by key, and damaged ranges.

        Raises: TeacherError if it cannot be read, or is not a file.
        """
        with open_file(self.path, TeacherError) as file:
            try:
                size = os.fstat(file.fileno()).st_size
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            except OSError as error:
                raise TeacherError(f"{self.path} cannot be read: {why(error)}") from error
        origin, at = _read_origin(data)
        if origin is not None:
            yield origin
        while at < len(data):
            if _ends(data, at):
                return
            record = self._record(data, at)
            if record is not None:
                yield data[at + 4 : at + 20], record
                at = record.start + record.length
                continue
            after = at + 1
            while after < len(data) and not _ends(data, after) and self._record(data, after) is None:
                after = min(
                    f for f in (data.find(_MARK, after + 1), data.find(_END, after + 1), len(data)) if f >= 0
                )
            if after == len(data):
                break
            yield Damage(self.path, at, after, "no record")
            at = after
        yield Damage(self.path, at, len(data), "cut short, or its writer was killed or is still writing")

    def _record(self, data: Bytes, at: int) -> Record | None:
        """The record that begins at a byte; None if there is none or it is incomplete."""
        start = at + _RECORD_BYTES
        if start > len(data) or data[at : at + 4] != _MARK:
            return None
        _, _, length, rows, crc = _RECORD.unpack_from(data, at)
        if _CRC.unpack_from(data, at + _RECORD.size)[0] != crc32(data[at : at + _RECORD.size]):
            return None
        return Record(self, start, length, rows, crc) if start + length <= len(data) else None

    def origin(self) -> Origin | None:
        """The origin of its scores; None if it cannot be read."""
        return _read_origin(self.pread(2**16, 0))[0]


class ShardWriter:
    """A new shard in a folder, to which only this process appends.

    Its end marker is written by ``close``, or when the writer is collected or the process ends.

    Raises: OSError if it cannot be written.
    """

    def __init__(self, folder: Path, origin: Origin) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path, self._file = _create(folder)
        text = json.dumps(asdict(origin), ensure_ascii=False).encode()
        try:
            _append(self._file, _SHARD + _ORIGIN.pack(len(text), crc32(text)) + text)
        except OSError:
            os.close(self._file)
            path.unlink(missing_ok=True)
            raise
        self.shard = Shard(path)
        self.close = weakref.finalize(self, _finish, self._file)

    @property
    def full(self) -> bool:
        """True if the next records go to a new shard."""
        return os.fstat(self._file).st_size >= SHARD_BYTES

    def append(self, records: Sequence[tuple[bytes, int, bytes]]) -> dict[bytes, Record]:
        """Appends the scores of texts (key, number of rows, bytes), all or nothing; returns the records by key.

        Raises: OSError if they cannot be written.
        """
        end = os.fstat(self._file).st_size
        parts, written = [], {}
        for key, rows, data in records:
            crc = crc32(data)
            head = _RECORD.pack(_MARK, key, len(data), rows, crc)
            parts += [head, _CRC.pack(crc32(head)), data]
            written[key] = Record(self.shard, end + _RECORD_BYTES, len(data), rows, crc)
            end += _RECORD_BYTES + len(data)
        _append(self._file, b"".join(parts))
        return written


def why(error: OSError | ValueError) -> str:
    """The message of a system error, without the path."""
    return getattr(error, "strerror", None) or str(error)


def _ends(data: Bytes, at: int) -> bool:
    """True if a shard's end marker begins at a byte."""
    return at + len(_ENDING) == len(data) and data[at:] == _ENDING


def _read_origin(data: Bytes) -> tuple[Origin | None, int]:
    """The origin at the start of a shard, and the offset of its records; None and 0 if it cannot be read."""
    start = len(_SHARD) + _ORIGIN.size
    if len(data) < start or data[: len(_SHARD)] != _SHARD:
        return None, 0
    length, crc = _ORIGIN.unpack_from(data, len(_SHARD))
    text = data[start : start + length]
    if len(text) != length or crc32(text) != crc:
        return None, 0
    try:
        origin = Origin(**json_value(text))
        if origin.date is not None:
            date.fromisoformat(origin.date)
    except (TypeError, ValueError):
        return None, 0
    kinds = [type(value) for value in astuple(origin)[:4]]
    if kinds != [str, str, str, int] or not 0 <= origin.top_k < 2**31:
        return None, 0
    return origin, start + length


def _create(folder: Path) -> tuple[Path, int]:
    """A new file with the next number; two processes that start at once get different ones."""
    number = max((int(p.stem) for p in folder.glob("*.scores") if p.stem.isdecimal()), default=-1)
    while True:
        path = folder / f"{(number := number + 1):06d}.scores"
        with contextlib.suppress(FileExistsError):
            return path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)


def _append(file: int, data: bytes) -> None:
    """Appends to a file, all or nothing."""
    size = os.fstat(file).st_size
    try:
        written = 0
        while written < len(data):
            written += os.write(file, data[written:])
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file, size)
        raise


def _finish(file: int) -> None:
    """Writes a shard's end marker, syncs and closes it; without the marker it counts as truncated."""
    with contextlib.suppress(OSError):
        _append(file, _ENDING)
        os.fsync(file)
    os.close(file)
