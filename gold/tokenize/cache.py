"""Index arrays that are kept between runs in the user's cache folder.

Whatever is wrong there (no folder, no right to write, a broken file) costs the time to build them again, nothing else.
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
    """The folder that $GOLD_CACHE names, none if that is empty; without it `gold` in $XDG_CACHE_HOME or ~/.cache."""
    if "GOLD_CACHE" in os.environ:
        named = os.environ["GOLD_CACHE"]
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "gold"
    except RuntimeError:  # a user without a home
        return None


def cached_ids(content: str, length: int, build: Callable[[], Int32]) -> Int32:
    """What `build` returns, int32[length], read from the cache folder where it was kept for the same content.

    `content` says of what the array is made, by which rule, and in which version of it. A file holds the SHA-256 of
    the content and of the array, and the array; one that does not is built again. Several processes may build at once:
    a file appears whole, and is the same whoever wrote it.
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
