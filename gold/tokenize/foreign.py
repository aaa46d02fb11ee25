"""Guards calls of tokenizer libraries on user files: errors and panics become one line that names the file."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from gold.errors import GoldError, VocabularyError

_REDIRECTED = threading.RLock()


@contextmanager
def foreign(name: str, kinds: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """A context for calls of `tokenizers` on the contents of the named file.

    The library itself prints panics at length, so stderr is discarded in this context.

    Raises: VocabularyError for a panic, for a bare `Exception`, which the library raises otherwise, and for `kinds`.
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
    """True for a panic of a Rust library, which is not a subclass of `Exception`."""
    return type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _without_stderr() -> Iterator[None]:
    with _REDIRECTED:
        with suppress(AttributeError, OSError, ValueError):
            sys.stderr.flush()
        try:
            kept = os.dup(2)
        except OSError:  # no such file descriptor
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
