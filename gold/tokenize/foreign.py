"""Calls of libraries that others' files drive: what they raise, panics of Rust too, is a line that names the file."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from gold.errors import GoldError, VocabularyError

_REDIRECTED = threading.RLock()


@contextmanager
def foreign(name: str, kinds: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Around calls of tokenizers for what comes from a file of that name.

    A panic is printed by the library itself, at length, so stderr leads nowhere meanwhile.

    Raises: VocabularyError for a panic, for a bare `Exception`, which is all that the library has otherwise, and for
    the other `kinds`.
    """
    try:
        with _without_stderr():
            yield
    except GoldError:
        raise
    except BaseException as error:
        if not (type(error) is Exception or is_panic(error) or isinstance(error, kinds)):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise VocabularyError(f"{name}: {reason}") from None


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust has met a bug of its own; it is no `Exception`."""
    return type(error).__name__ == "PanicException"


@contextmanager
def _without_stderr() -> Iterator[None]:
    with _REDIRECTED:
        with suppress(AttributeError, OSError, ValueError):
            sys.stderr.flush()
        try:
            kept = os.dup(2)
        except OSError:  # there is none
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
