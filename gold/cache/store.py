"""A folder of scores by key: append-only shards, each written by one process."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from gold.cache.shard import Damage, Origin, Record, Shard, ShardWriter, why
from gold.errors import ConfigError, TeacherError

logger = logging.getLogger(__name__)

_MERGE_BYTES = 2**24


class ScoreCache:
    """The scores in a folder, by key: those present when it was opened and those it added itself.

    Several processes may write at once: each creates its own shards. If a text is stored twice, the first counts.
    ``damage`` lists the ranges that are not intact records; the contents of a damaged record count as missing.
    """

    def __init__(self, folder: Path, origin: Origin | None, shards: Sequence[Shard] = ()) -> None:
        self.folder, self.shards = folder, list(shards)
        self.damage: list[Damage] = []
        self._records: dict[bytes, Record] = {}
        self._repeated: dict[bytes, list[Record]] = {}
        self._writer: ShardWriter | None = None
        origins: dict[bytes, Origin] = {}
        for shard in self.shards:
            for found in shard.walk():
                if isinstance(found, Damage):
                    self.damage.append(found)
                elif isinstance(found, Origin):
                    origins.setdefault(found.digest, found)
                else:
                    self._keep(*found)
        if len(origins) > 1:
            names = " and ".join(f"{o.teacher} ({o.revision}, top_k {o.top_k})" for o in origins.values())
            raise TeacherError(f"cache {folder}: holds scores of {names}; keep each in its own folder")
        known = next(iter(origins.values()), origin)
        if known is None:
            raise TeacherError(f"cache {folder}: no shard says whose scores it holds; build it again")
        self.origin = known
        if origin is not None:
            _check_origin(folder, known, origin)

    @classmethod
    def open(cls, folder: str | Path, origin: Origin | None = None) -> Self:
        """The cache in a folder, or a new one of ``origin``; nothing is written until scores are added.

        Raises:
            ConfigError: it has another teacher, revision, vocabulary or top_k.
            TeacherError: there is none and no ``origin``, it cannot be read, or it holds scores of two teachers.
        """
        folder = Path(folder)
        if os.path.lexists(folder) and not folder.is_dir():
            what = "is a link to nothing" if folder.is_symlink() and not folder.exists() else "is a file"
            raise ConfigError(f"cache {folder}: {what}; give a folder")
        shards = _shards(folder)
        if not shards and origin is None:
            raise TeacherError(f"cache {folder}: there is none; gold cache build makes one")
        return cls(folder, origin, shards)

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: object) -> bool:
        return key in self._records

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._records)

    @property
    def rows(self) -> int:
        """The number of rows of all texts: one per token, and one per end."""
        return sum(record.rows for record in self._records.values())

    @property
    def size_bytes(self) -> int:
        """The size on disk, with repeated and damaged records.

        Raises: TeacherError if it no longer exists.
        """
        try:
            return sum(shard.path.stat().st_size for shard in self.shards)
        except OSError as error:
            raise TeacherError(
                f"cache {self.folder}: {error.filename} cannot be read: {why(error)}"
            ) from error

    @property
    def repeated(self) -> int:
        """The number of records of texts that are stored more than once."""
        return sum(map(len, self._repeated.values()))

    def get(self, key: bytes, level: int = logging.WARNING) -> bytes | None:
        """The stored scores of a text; None if there are none.

        A damaged record is skipped, and logged at ``level``.
        """
        while key in self._records:
            record = self._records[key]
            data = record.read()
            if data is not None:
                return data
            self.damage.append(record.damage)
            logger.log(level, "cache %s; it counts as not there", record.damage)
            del self._records[key]
            if repeated := self._repeated.get(key):
                self._records[key] = repeated.pop(0)
        return None

    def add(self, records: Sequence[tuple[bytes, int, bytes]]) -> None:
        """Stores the scores of texts, given as key, number of rows and bytes.

        They are written when this returns, so that a kill of the process loses none; ``close`` syncs them to disk.

        Raises:
            TeacherError: the disk is full or fails; the cache is unchanged.
        """
        if not records:
            return
        try:
            if self._writer is not None and self._writer.full:
                self.close()
            if self._writer is None:
                self._writer = ShardWriter(self.folder, self.origin)
                self.shards.append(self._writer.shard)
            written = self._writer.append(records)
        except (OSError, ValueError) as error:
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            advice = "free some space" if full else "look at the folder and its rights"
            raise TeacherError(f"cache {self.folder}: cannot be written: {why(error)}; {advice}") from error
        for key, record in written.items():
            self._keep(key, record)

    def close(self) -> None:
        """Closes the current shard and syncs it to disk, as the end of the process does."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def verify(self) -> list[Damage]:
        """Every damaged range, after reading each byte of the shards; closes the cache."""
        self.close()
        every = (found for shard in self.shards for found in shard.walk())
        broken = [e[1].damage for e in every if isinstance(e, tuple) and e[1].read() is None]
        seen = {(d.shard, d.start) for d in broken}
        kept = [d for d in self.damage if (d.shard, d.start) not in seen]
        return sorted([*kept, *broken], key=lambda d: (d.shard, d.start))

    def take(self, other: ScoreCache) -> None:
        """Adds every text of another cache that this one lacks; damaged records are added to the other's ``damage``.

        Raises:
            TeacherError: one of them cannot be read or written.
        """
        waiting: list[tuple[bytes, int, bytes]] = []
        for key in [key for key in other if key not in self]:
            data = other.get(key, logging.DEBUG)  # all damage is returned
            if data is None:
                continue
            waiting.append((key, other._records[key].rows, data))
            if sum(len(entry[2]) for entry in waiting) > _MERGE_BYTES:
                self.add(waiting)
                waiting = []
        self.add(waiting)

    def _keep(self, key: bytes, record: Record) -> None:
        if key in self._records:
            self._repeated.setdefault(key, []).append(record)
        else:
            self._records[key] = record


def merge(into: str | Path, sources: Sequence[str | Path]) -> tuple[ScoreCache, list[Damage]]:
    """The cache ``into``, new or existing, with all texts of the sources added; and the damage of the sources.

    If several caches have a text, ``into`` takes precedence, then the first source.

    Raises:
        ConfigError: they have different teachers, revisions, vocabularies or top_k.
        TeacherError: a source does not exist or cannot be read; the disk is full.
    """
    origin = next(filter(None, map(find_origin, (into, *sources))), None)
    opened = [ScoreCache.open(source, origin) for source in sources]
    for source in opened:
        if not source.shards:
            raise TeacherError(f"cache {source.folder}: there is none")
    with ScoreCache.open(into, origin) as target:
        for source in opened:
            target.take(source)
    return target, [damage for source in opened for damage in source.damage]


def find_origin(folder: str | Path) -> Origin | None:
    """The origin of the scores in a folder; None if there are none or no shard names it.

    Raises: TeacherError if it cannot be read.
    """
    return next(filter(None, (shard.origin() for shard in _shards(Path(folder)))), None)


def _shards(folder: Path) -> list[Shard]:
    try:
        return [Shard(path) for path in sorted(folder.glob("*.scores"))]
    except (OSError, ValueError) as error:  # a path with a null character raises ValueError
        raise TeacherError(f"cache {folder}: cannot be read: {why(error)}") from error


def _check_origin(folder: Path, found: Origin, wanted: Origin) -> None:
    for what, advice in (
        ("vocabulary", "is it the same tokenizer?"),
        ("revision", "score its texts anew in another folder"),
        ("top_k", f"set top_k to {found.top_k}, or give another folder"),
    ):
        theirs, mine = getattr(found, what), getattr(wanted, what)
        if theirs != mine:
            if what == "vocabulary":
                theirs, mine = theirs[:12], mine[:12]
            raise ConfigError(
                f"cache {folder}: holds scores of {found.teacher} with {what} {theirs}, and this is {wanted.teacher} "
                f"with {what} {mine}; {advice}"
            )
