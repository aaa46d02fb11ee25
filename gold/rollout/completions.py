"""Completions that are drawn once: kept by request, in memory and in a folder that resumptions and other runs read."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gold.errors import CheckpointError, ConfigError
from gold.rollout.engine import Generation, Request

logger = logging.getLogger(__name__)

KEY_BYTES = 16
_SUFFIX = ".npz"


@dataclass
class Completions:
    """Completions by request, of one student's weights.

    The same request with the same weights draws the same ids, so a folder that holds other requests, or none, changes
    the time that a run takes and not its result. ``weights``: a digest of the weights that draw. A part of the folder
    is one file, written as a whole; one that is broken counts as not there.
    """

    weights: str
    folder: Path | None = None
    drawn: dict[bytes, Generation] = field(default_factory=dict)
    complete: bool = False
    """Whether these are all that the run needs."""
    engine_begun: bool = False
    """Whether the engine has the weights that drew some of them."""

    def key(self, request: Request) -> bytes:
        """16 bytes of the SHA-256 of all that a completion depends on: prompt, stop ids, sampling, seed, weights."""
        sampling = request.sampling
        head = f"{self.weights} {sampling.max_new_tokens} {sampling.temperature!r} {sampling.top_p!r}"
        if sampling.thinking_budget is not None:
            head += f" {sampling.thinking_budget}"
        parts = (request.prompt_ids, request.stop_ids, request.seed)
        numbers = [n for part in parts for n in (len(part), *part)]
        return sha256(head.encode() + np.array(numbers, "<i8").tobytes()).digest()[:KEY_BYTES]

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """The requests without a completion in memory, in order; of equal ones the first."""
        keyed: dict[bytes, Request] = {}
        for request in requests:
            keyed.setdefault(self.key(request), request)
        return [request for key, request in keyed.items() if key not in self.drawn]

    def of(self, requests: Sequence[Request]) -> list[Generation]:
        """The completion of each request; KeyError if one was not drawn."""
        return [self.drawn[self.key(request)] for request in requests]

    def read(self, requests: Sequence[Request]) -> dict[bytes, Generation]:
        """The completions of these requests that the folder holds, by key; of repeated ones that of the oldest file."""
        wanted = {self.key(request) for request in requests}
        found: dict[bytes, Generation] = {}
        for file in _parts(self.folder) if self.folder else ():
            for key, generation in _content(file).items():
                if key in wanted:
                    found.setdefault(key, generation)
        return found

    def add(self, requests: Sequence[Request], generations: Sequence[Generation]) -> None:
        """Keeps completions, with a folder on disk too: they are synced when this returns.

        Raises:
            CheckpointError: the folder cannot be written; nothing is kept.
        """
        # The steps since they were drawn are counted from the weights of a run's start.
        new = {self.key(r): replace(g, version=0) for r, g in zip(requests, generations, strict=True)}
        if self.folder is not None and new:
            _write(self.folder, new)
        self.drawn |= new


@contextlib.contextmanager
def one_writer(folder: Path | None, wait: Callable[[], None]) -> Iterator[None]:
    """A context that one process of this machine at a time is in: others would draw the same completions once more.
    ``wait`` is called if another one is.

    Raises:
        ConfigError: the folder is a file.
        CheckpointError: it cannot be created.
    """
    if folder is None:
        yield
        return
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"rollout.completions: {folder} is no folder; name one, new or not")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            logger.info("%s is not locked: %s", folder, error.strerror)
        yield
    finally:
        os.close(lock)


def columns_of(generations: Sequence[Generation]) -> dict[str, Any]:
    """Completions as arrays, to be saved together."""
    return {
        "lengths": np.array([g.ids.size for g in generations], np.int64),
        "ids": np.concatenate([g.ids for g in generations]) if generations else np.zeros(0, np.int32),
        "logprobs": np.concatenate([g.logprobs for g in generations])
        if generations
        else np.zeros(0, np.float32),
        "stopped": np.array([g.stopped for g in generations], np.bool_),
        "versions": np.array([g.version for g in generations], np.int64),
        "given": np.array([g.given or (-1, -1) for g in generations], np.int64).reshape(-1, 2),
    }


def generations_of(saved: Mapping[str, NDArray[Any]]) -> list[Generation]:
    """The completions of ``columns_of``.

    Raises: KeyError or ValueError for other arrays.
    """
    lengths = saved["lengths"]
    ends = np.cumsum(lengths)[:-1]
    # Files of earlier versions have no given ids.
    given = saved["given"].tolist() if "given" in saved else [(-1, -1)] * len(lengths)
    if lengths.sum() != len(saved["ids"]) or len(saved["ids"]) != len(saved["logprobs"]):
        raise ValueError("its lengths are not those of its ids")
    columns = (
        np.split(saved["ids"].astype(np.int32), ends),
        np.split(saved["logprobs"].astype(np.float32), ends),
        saved["stopped"].tolist(),
        saved["versions"].tolist(),
        [(first, last) if first >= 0 else None for first, last in given],
    )
    # Of no completions ``split`` makes one part.
    return [Generation(*each) for each in zip(*columns, strict=True)] if lengths.size else []


def _parts(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob(f"*{_SUFFIX}") if not file.name.startswith("."))


def _content(file: Path) -> dict[bytes, Generation]:
    """The completions of a part; of a broken one none, which is logged."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as saved:
            keys = saved["keys"].reshape(-1, KEY_BYTES)
            each = zip(keys.astype(np.uint8), generations_of(saved), strict=True)
            return {key.tobytes(): generation for key, generation in each}
    except Exception as error:
        logger.warning("%s is broken, and counts as not there: %s", file, error)
        return {}


def _write(folder: Path, drawn: Mapping[bytes, Generation]) -> None:
    keys = np.frombuffer(b"".join(drawn), np.uint8).reshape(-1, KEY_BYTES)
    final = folder / f"{time.time_ns():020d}-{secrets.token_hex(4)}{_SUFFIX}"
    half = folder / f".{final.name}"
    try:
        with half.open("wb") as file:
            np.savez(file, keys=keys, **columns_of(list(drawn.values())))
            file.flush()
            os.fsync(file.fileno())
        half.replace(final)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write completions to {folder}: {error.strerror or error}; free some space and resume"
        ) from error
