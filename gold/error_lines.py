"""Errors that are not bugs of gold, as lines for people."""

from __future__ import annotations

import errno

from gold.errors import GoldError

# System errors that are not bugs: no space, no permission, no such name, too many open files.
_SYSTEM_ERRORS = {
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EMFILE", "ENFILE", "ENOMEM"),
        *("EACCES", "EPERM", "ENAMETOOLONG", "ELOOP"),
    )
}


def line_of(error: BaseException) -> object | None:
    """The message of an error that is not a bug of gold; None for one that may be."""
    if isinstance(error, GoldError):
        return error
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, str) else None
    if isinstance(error, OSError):
        if error.errno not in _SYSTEM_ERRORS:
            return None
        return f"cannot write or read {error.filename or 'standard output'}: {error.strerror}"
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in str(error):
        reason = " ".join(str(error).split())[:200]
        keys = "train.micro_batch_size, evaluate.micro_batch_size and rollout.generation_batch_size"
        return f"out of memory{f': {reason}' if reason else ''}; {keys} say how much is held at a time"
    if kind == "PanicException":  # from a Rust library; not an Exception
        return f"a tokenizer failed in the library that runs it: {' '.join(str(error).split())[:300]}"
    return None
