"""A folder of scores by key: shards that are only ever appended to, each by the one process that began it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import mmap
import os
import stat
import struct
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import date
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Self
from zlib import crc32

import numpy as np

from gold.errors import ConfigError, TeacherError

logger = logging.getLogger(__name__)

SHARD_BYTES = 2**30
"""A shard that has grown beyond this is followed by another one."""
_SHARD = b"gold scores 1\n"
_ORIGIN = struct.Struct("<II")
_MARK = b"\xf6row"
_END = b"\xf6end"
_RECORD = struct.Struct("<4s16sIII")
_CRC = struct.Struct("<I")
_RECORD_BYTES = _RECORD.size + _CRC.size
_ENDING = _END + _CRC.pack(crc32(_END))


@dataclass(frozen=True)
class Origin:
    """Whose scores a cache holds, and of what.

    ``teacher`` is its name, for people, and ``date`` the day, as 2026-11-29, that a chat template which prints the date
    wrote into all its prompts, None where that was not kept. The rest decides: ``revision`` tells its weights from
    others', ``vocabulary`` is a fingerprint of its vocabulary, and ``top_k`` tokens of each row are known beside the
    one in the text.
    """

    teacher: str
    revision: str
    vocabulary: str
    top_k: int
    date: str | None = None

    @cached_property
    def digest(self) -> bytes:
        """The SHA-256 of what decides."""
        return sha256(json.dumps([self.revision, self.vocabulary, self.top_k]).encode()).digest()

    def key(self, prompt: Sequence[int], ids: Sequence[int], stopped: bool) -> bytes:
        """The key of a text: 16 bytes of the SHA-256 of all that its scores depend on.

        ``prompt`` is what the teacher reads before it, ``ids`` its own tokens of the text's bytes, ``stopped`` whether
        the end of the text is asked for.
        """
        numbers = np.array([len(prompt), stopped, *prompt, *ids], "<i4")
        return sha256(self.digest + numbers.tobytes()).digest()[:16]


@dataclass(frozen=True)
class Damage:
    """Bytes ``start`` to ``end`` of a shard that are no record as it was written, and what is wrong with them."""

    shard: Path
    start: int
    end: int
    what: str

    def __str__(self) -> str:
        return f"{self.shard}: bytes {self.start:,} to {self.end:,}: {self.what}"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a record's scores are, and their checksum."""

    shard: _Shard
    start: int
    length: int
    rows: int
    crc: int

    def read(self) -> bytes | None:
        """The scores, None where they are damaged.

        Raises: TeacherError if the file cannot be read any more.
        """
        try:
            data = os.pread(self.shard.opened(), self.length, self.start)
        except OSError as error:
            raise _unreadable(self.shard.path.parent, error) from error
        return data if crc32(data) == self.crc else None

    @property
    def damage(self) -> Damage:
        """The whole record as a place that is damaged."""
        start, end = self.start - _RECORD_BYTES, self.start + self.length
        return Damage(self.shard.path, start, end, "a record whose checksum is another")


class _Shard:
    """One file: a line, the origin, records, and, once it is closed, an end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def opened(self) -> int:
        """The file, open: what is read of it is read, not mapped, since it may be cut short under way."""
        if self._file is None:
            self._file = _opened(self.path)
            weakref.finalize(self, os.close, self._file)
        return self._file

    def walk(self) -> Iterator[Origin | Damage | tuple[bytes, _Place]]:
        """What is in the file, in its order: the origin, records by key, and whatever is neither.

        Raises: TeacherError if it cannot be read, or is no file.
        """
        try:
            file = _opened(self.path)
            try:
                size = os.fstat(file).st_size
                data = mmap.mmap(file, 0, access=mmap.ACCESS_READ) if size else b""
            finally:
                os.close(file)
        except OSError as error:
            raise _unreadable(self.path.parent, error) from error
        origin, at = _read_origin(data)
        if origin is not None:
            yield origin
        while at < len(data):
            if _ends(data, at):
                return
            place = self._place(data, at)
            if place is not None:
                yield data[at + 4 : at + 20], place
                at = place.start + place.length
                continue
            after = at + 1
            while after < len(data) and not _ends(data, after) and self._place(data, after) is None:
                after = min(
                    f for f in (data.find(_MARK, after + 1), data.find(_END, after + 1), len(data)) if f >= 0
                )
            if after == len(data):
                break
            yield Damage(self.path, at, after, "no record")
            at = after
        yield Damage(self.path, at, len(data), "cut short, or its writer was killed or is still writing")

    def _place(self, data: mmap.mmap | bytes, at: int) -> _Place | None:
        """The record that begins at a byte, None where there is none or not all of it."""
        start = at + _RECORD_BYTES
        if start > len(data) or data[at : at + 4] != _MARK:
            return None
        _, _, length, rows, crc = _RECORD.unpack_from(data, at)
        if _CRC.unpack_from(data, at + _RECORD.size)[0] != crc32(data[at : at + _RECORD.size]):
            return None
        return _Place(self, start, length, rows, crc) if start + length <= len(data) else None


class ScoreCache:
    """The scores in a folder, by key; opened, it knows what was there then and what it adds itself.

    Several processes may write at once: each begins shards of its own. Of a text that is there twice the first counts.
    ``damage`` is what was found that is no record; what a damaged record held counts as not there.
    """

    def __init__(self, folder: Path, origin: Origin | None, shards: Iterable[_Shard] = ()) -> None:
        self.folder = folder
        self.damage: list[Damage] = []
        self.shards = list(shards)
        self._places: dict[bytes, _Place] = {}
        self._spare: dict[bytes, list[_Place]] = {}
        self._file: int | None = None
        self._own: _Shard | None = None
        self._end: weakref.finalize[[int], ScoreCache] | None = None
        origins: dict[bytes, Origin] = {}
        for shard in self.shards:
            for found in shard.walk():
                if isinstance(found, Damage):
                    self.damage.append(found)
                elif isinstance(found, Origin):
                    origins.setdefault(found.digest, found)
                else:
                    self._take(*found)
        if len(origins) > 1:
            names = " and ".join(f"{o.teacher} ({o.revision}, top_k {o.top_k})" for o in origins.values())
            raise TeacherError(f"cache {folder}: holds scores of {names}; keep each in a folder of its own")
        known = next(iter(origins.values()), origin)
        if known is None:
            raise TeacherError(f"cache {folder}: no shard says whose scores it holds; build it again")
        self.origin = known
        if origin is not None:
            _check_origin(folder, known, origin)

    @classmethod
    def open(cls, folder: str | Path, origin: Origin | None = None) -> Self:
        """The cache in a folder, or a new one of ``origin``; nothing is written before there is something to keep.

        Raises:
            ConfigError: it is another teacher's, or of another revision, vocabulary or top_k.
            TeacherError: there is none and no ``origin``, it cannot be read, or it holds scores of two teachers.
        """
        folder = Path(folder)
        if os.path.lexists(folder) and not folder.is_dir():
            what = "is a link to nothing" if folder.is_symlink() and not folder.exists() else "is a file"
            raise ConfigError(f"cache {folder}: {what}; give a folder")
        try:
            shards = [_Shard(path) for path in sorted(folder.glob("*.scores"))]
        except (OSError, ValueError) as error:
            raise _unreadable(folder, error) from error
        if not shards and origin is None:
            raise TeacherError(f"cache {folder}: there is none; gold cache build makes one")
        return cls(folder, origin, shards)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._places)

    @property
    def rows(self) -> int:
        """Rows of all texts: one per token, and one per end."""
        return sum(place.rows for place in self._places.values())

    @property
    def size_bytes(self) -> int:
        """What is on disk, those of repeated and damaged records included.

        Raises: TeacherError if it is not there any more.
        """
        try:
            return sum(shard.path.stat().st_size for shard in self.shards)
        except OSError as error:
            raise _unreadable(self.folder, error) from error

    @property
    def repeated(self) -> int:
        """Records of texts that are there already."""
        return sum(map(len, self._spare.values()))

    def get(self, key: bytes, level: int = logging.WARNING) -> bytes | None:
        """The scores of a text as they were added; None where there are none.

        A damaged one is none, and is logged.
        """
        while key in self._places:
            place = self._places[key]
            data = place.read()
            if data is not None:
                return data
            self.damage.append(place.damage)
            logger.log(level, "cache %s; it counts as not there", place.damage)
            spare = self._spare.get(key)
            if spare:
                self._places[key] = spare.pop(0)
            else:
                del self._places[key]
        return None

    def add(self, records: Sequence[tuple[bytes, int, bytes]]) -> None:
        """Keeps the scores of texts, given as key, number of rows and bytes.

        The system has them when this returns, so that a kill loses none; ``close`` brings them to the disk.

        Raises:
            TeacherError: the disk is full or fails; the cache is as it was before.
        """
        if not records:
            return
        try:
            shard, file = self._writable()
            size = end = os.fstat(file).st_size
            parts, places = [], {}
            for key, rows, data in records:
                crc = crc32(data)
                head = _RECORD.pack(_MARK, key, len(data), rows, crc)
                parts += [head, _CRC.pack(crc32(head)), data]
                places[key] = _Place(shard, end + _RECORD_BYTES, len(data), rows, crc)
                end += _RECORD_BYTES + len(data)
            _write(file, b"".join(parts), size)
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error
        for key, place in places.items():
            self._take(key, place)

    def close(self) -> None:
        """Ends the shard that is written and brings it to the disk, as the end of the process does.

        Where that cannot be done, the scores are there, and the shard counts as one that is cut short.
        """
        if self._end is not None:
            self._end()
        self._file = self._own = self._end = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def verify(self) -> list[Damage]:
        """Every place that is not as it was written, each byte of the shards having been read; closes the cache."""
        self.close()
        every = (found for shard in self.shards for found in shard.walk())
        broken = [e[1].damage for e in every if isinstance(e, tuple) and e[1].read() is None]
        seen = {(d.shard, d.start) for d in broken}
        kept = [d for d in self.damage if (d.shard, d.start) not in seen]
        return sorted([*kept, *broken], key=lambda d: (d.shard, d.start))

    def _take(self, key: bytes, place: _Place) -> None:
        if key in self._places:
            self._spare.setdefault(key, []).append(place)
        else:
            self._places[key] = place

    def _writable(self) -> tuple[_Shard, int]:
        """The shard that this process writes, and its open file."""
        if self._file is not None and os.fstat(self._file).st_size >= SHARD_BYTES:
            self.close()
        if self._file is None or self._own is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path, file = self._begin()
            origin = json.dumps(asdict(self.origin), ensure_ascii=False).encode()
            try:
                _write(file, _SHARD + _ORIGIN.pack(len(origin), crc32(origin)) + origin, 0)
            except OSError:
                os.close(file)
                path.unlink(missing_ok=True)
                raise
            self._file, self._own, self._end = file, _Shard(path), weakref.finalize(self, _finish, file)
            self.shards.append(self._own)
        return self._own, self._file

    def _begin(self) -> tuple[Path, int]:
        """A new file with the next number; of two that begin at once, each gets its own."""
        number = max((int(p.stem) for p in self.folder.glob("*.scores") if p.stem.isdecimal()), default=-1)
        while True:
            path = self.folder / f"{(number := number + 1):06d}.scores"
            with contextlib.suppress(FileExistsError):
                return path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)

    def _unwritable(self, error: OSError | ValueError) -> TeacherError:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space" if full else "look at the folder and its rights"
        return TeacherError(f"cache {self.folder}: cannot be written: {_why(error)}; {advice}")


def merge(into: str | Path, sources: Sequence[str | Path]) -> tuple[ScoreCache, list[Damage]]:
    """The cache ``into``, new or not, with every text of the sources that it lacked; and what of them was damaged.

    Of a text that several have, that of ``into`` counts, then that of the first source.

    Raises:
        ConfigError: they are of different teachers, revisions, vocabularies or top_k.
        TeacherError: a source that is none, or cannot be read; a disk that is full.
    """
    origin = next(filter(None, map(find_origin, (into, *sources))), None)
    opened = [ScoreCache.open(source, origin) for source in sources]
    for source in opened:
        if not source.shards:
            raise TeacherError(f"cache {source.folder}: there is none")
    target = ScoreCache.open(into, origin)
    damage: list[Damage] = []
    for source in opened:
        waiting: list[tuple[bytes, int, bytes]] = []
        for key in list(source):
            if key in target:
                continue
            data = source.get(key, logging.DEBUG)  # all damage is returned
            if data is None:
                continue
            waiting.append((key, source._places[key].rows, data))
            if sum(len(entry[2]) for entry in waiting) > 2**24:
                target.add(waiting)
                waiting = []
        target.add(waiting)
        damage += source.damage
    target.close()
    return target, damage


def find_origin(folder: str | Path) -> Origin | None:
    """Whose scores a folder holds, None where there are none or no shard says it.

    Raises: TeacherError if it cannot be read.
    """
    try:
        for path in sorted(Path(folder).glob("*.scores")):
            file = _opened(path)
            try:
                found, _ = _read_origin(os.pread(file, 2**16, 0))
            finally:
                os.close(file)
            if found is not None:
                return found
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error
    return None


def _opened(path: Path) -> int:
    """A shard to be read.

    Raises: OSError if it cannot be opened, or is anything but a file: a named pipe would be waited for without end.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "is no file", str(path))
    return file


def _unreadable(folder: str | Path, error: OSError | ValueError) -> TeacherError:
    """``error`` as one of the cache; a path with a null character makes a ValueError."""
    name = getattr(error, "filename", None)
    where = f"{Path(os.fsdecode(name)).name}: " if name else ""
    return TeacherError(f"cache {folder}: cannot be read: {where}{_why(error)}")


def _why(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


def _check_origin(folder: Path, found: Origin, wanted: Origin) -> None:
    if found.digest == wanted.digest:
        return
    for what, advice in (
        ("vocabulary", "is it the same tokenizer?"),
        ("revision", "score its texts anew in another folder"),
        ("top_k", f"set top_k to {found.top_k}, or give another folder"),
    ):
        theirs, mine = getattr(found, what), getattr(wanted, what)
        if theirs != mine:
            shown = [value[:12] if what == "vocabulary" else value for value in (theirs, mine)]
            raise ConfigError(
                f"cache {folder}: holds scores of {found.teacher} with {what} {shown[0]}, and this is {wanted.teacher} "
                f"with {what} {shown[1]}; {advice}"
            )


def _ends(data: mmap.mmap | bytes, at: int) -> bool:
    """Whether a shard's end begins at a byte."""
    return at + len(_ENDING) == len(data) and data[at:] == _ENDING


def _read_origin(data: mmap.mmap | bytes) -> tuple[Origin | None, int]:
    """What a shard begins with, and where its records do; None and 0 where it cannot be read."""
    start = len(_SHARD) + _ORIGIN.size
    if len(data) < start or data[: len(_SHARD)] != _SHARD:
        return None, 0
    length, crc = _ORIGIN.unpack_from(data, len(_SHARD))
    text = data[start : start + length]
    if len(text) != length or crc32(text) != crc:
        return None, 0
    try:
        origin = Origin(**json.loads(text))
        if origin.date is not None:
            date.fromisoformat(origin.date)
    except (RecursionError, TypeError, ValueError):
        return None, 0
    kinds = [type(value) for value in astuple(origin)[:4]]
    if kinds != [str, str, str, int] or not 0 <= origin.top_k < 2**31:
        return None, 0
    return origin, start + length


def _finish(file: int) -> None:
    """Writes a shard's end, and closes it."""
    with contextlib.suppress(OSError):
        _write(file, _ENDING, os.fstat(file).st_size)
        os.fsync(file)
    os.close(file)


def _write(file: int, data: bytes, size: int) -> None:
    """Appends to a file of this size, all or nothing."""
    try:
        written = 0
        while written < len(data):
            written += os.write(file, data[written:])
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file, size)
        raise
