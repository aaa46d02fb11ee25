"""A cache of index arrays in the user's cache folder, kept between runs.

Any problem with it (no folder, no write permission, a corrupt file) only costs the time to build the arrays again.
"""

import logging
import os
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gold.errors import VocabularyError
from gold.files import read_bytes

logger = logging.getLogger(__name__)

Int32 = npt.NDArray[np.int32]


def cache_folder() -> Path | None:
    """$GOLD_CACHE, None if it is empty; if it is not set, `gold` in $XDG_CACHE_HOME or ~/.cache."""
    if "GOLD_CACHE" in os.environ:
        named = os.environ["GOLD_CACHE"]
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "gold"
    except RuntimeError:  # the user has no home directory
        return None


def cached_ids(content: str, length: int, build: Callable[[], Int32]) -> Int32:
    """The result of `build`, int32[length], loaded from the cache if it holds an array for the same `content`.

    `content` identifies the array: its inputs, the algorithm and the version of the algorithm. A file holds the SHA-256
    of the content and of the array, then the array; a file that does not match is built again. Several processes may
    build at once: files are written atomically, and all processes write the same bytes.
    """
    folder = cache_folder()
    if folder is None:
        return build()
    key = sha256(content.encode())
    path = folder / f"{key.hexdigest()}.ids"
    try:
        kept = read_bytes(path, VocabularyError, 4 * length + key.digest_size)
    except VocabularyError:
        kept = b""
    array = memoryview(kept)[key.digest_size :]
    if len(array) == 4 * length and kept[: key.digest_size] == sha256(key.digest() + array).digest():
        return np.frombuffer(array, "<i4").astype(np.int32)
    ids = build()
    built = ids.astype("<i4").tobytes()
    _keep(path, sha256(key.digest() + built).digest() + built)
    return ids


def _keep(path: Path, data: bytes) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = file.name
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        logger.info("%s is not kept: %s", path, error.strerror or error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
