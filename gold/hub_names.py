"""Names on the Hub: `ID@revision`, and the Hub's refusals as one line."""

from __future__ import annotations

import re
from pathlib import Path

from gold.errors import ConfigError
from gold.files import one_line

_ID = r"\w[\w.-]*(?:/\w[\w.-]*)?"
_NAME = re.compile(rf"({_ID})@([^\s@]+)")
IS_ID = re.compile(rf"{_ID}(?:@[^\s@]+)?")
"""A name that the Hub can have, with or without a revision."""


def split_revision(name: str) -> tuple[str, str | None]:
    """The id and the revision of `ID@revision`; any other name as it is, without one."""
    found = _NAME.fullmatch(name)
    return (found[1], found[2]) if found else (name, None)


def named_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """The id and the revision of a name and a revision, of which one may be in the other.

    Raises:
        ConfigError: two different revisions.
    """
    name, inside = split_revision(name)
    if inside is not None and revision is not None and inside != revision:
        raise ConfigError(f"{name}@{inside}: revision {revision} is given too; keep one of the two")
    return name, revision if inside is None else inside


def with_revision(name: str, revision: str | None) -> str:
    """`ID@revision`, or the name alone without a revision.

    Raises:
        ConfigError: as ``named_revision``, or a revision of a folder or file.
    """
    if revision is not None and Path(name).expanduser().exists():
        raise ConfigError(f"{name} is a folder or file here, which has no revision; leave {revision} out")
    name, revision = named_revision(name, revision)
    return name if revision is None else f"{name}@{revision}"


def fault_line(name: str, revision: str | None, error: BaseException, *, kind: str = "model") -> str:
    """Why the Hub does not give a model or a data set, and what to do, from an error of its client."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{'' if kind == 'model' else 'datasets/'}{name}"
    if isinstance(error, GatedRepoError):
        return f"it is gated on the Hub: accept its terms at {page}, and log in (hf auth login, or HF_TOKEN)"
    if isinstance(error, RevisionNotFoundError):
        return f"it is on the Hub, but has no revision {revision!r}: {page}/commits lists them"
    where = "no such folder" if kind == "model" else "no such file or folder"
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return f"{where}, and no such {kind} on the Hub (or none that your token may read)"
    return f"{where}, and the Hub cannot be asked for it: {one_line(error)}"
