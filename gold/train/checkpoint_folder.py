"""Atomic checkpoints: written to a temporary folder, listed in a manifest, renamed into place.

``TrainState.save`` writes the contents; this module knows none of them.

checkpoints/step-000010/             the files of ``TrainState.save``
checkpoints/step-000010/manifest.json  name, size and sha256 of every file; written last
checkpoints/.tmp-…                   a save or a removal in progress, or the remains of a killed one
checkpoints/.old-step-000010/        a checkpoint about to be replaced by another of the same step
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gold.errors import CheckpointError, ConfigError, GoldError
from gold.files import one_line, read_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"(?P<old>\.old-)?step-(?P<step>\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: the step after which it was taken, and its folder."""

    step: int
    path: Path


def save_checkpoint(folder: Path, step: int, writer: Callable[[Path], None], keep_last: int) -> Path:
    """The folder `folder/step-…` with everything `writer` wrote into the empty folder passed to it.

    The files are moved into place by one rename, after they and their manifest are synced to disk: a process killed at
    any moment leaves the earlier checkpoints unchanged. Then all but the newest `keep_last` are removed. Only one
    process may save at a time; remains of killed saves are removed first.

    Raises:
        CheckpointError: the disk is full or fails; partial files are removed, earlier checkpoints intact.
        ConfigError: `step` is below 0 or `keep_last` below 1.
    """
    if step < 0 or keep_last < 1:
        raise ConfigError(
            f"a save needs a step of 0 or more and keep_last of 1 or more, got {step}, {keep_last}"
        )
    final = folder / f"step-{step:06d}"
    partial = folder / f".tmp-{final.name}"
    try:
        folder.mkdir(exist_ok=True)  # not its parents: a run folder that was moved away is not recreated
        remove_leftovers(folder)
        partial.mkdir()
        writer(partial)
        _seal(partial, step)
        _put_in_place(partial, final)
    except BaseException as error:
        full = _is_full(folder, error)
        shutil.rmtree(partial, ignore_errors=True)
        if is_write_failure(error):
            what = f"the disk is full, {one_line(error)}" if full else one_line(error)
            advice = "free some space and resume" if full else "resume once the cause is gone"
            raise CheckpointError(
                f"cannot save the checkpoint of step {step} in {folder}: {what}; "
                f"earlier checkpoints are intact, {advice}"
            ) from error
        raise
    prune(folder, step, keep_last)
    return final


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files all match its manifest, None if there is no checkpoint at all, and a note on
    each newer one.

    Raises:
        CheckpointError: there are checkpoints, but none is complete.
    """
    notes: list[str] = []
    for step, path in _checkpoints(folder):
        fault = find_fault(path)
        if fault is None:
            return Checkpoint(step, path), notes
        notes.append(f"skipped the checkpoint of step {step}, {path}: {fault}")
    if notes:
        raise CheckpointError(f"no whole checkpoint in {folder}: {'; '.join(notes)}; use another folder")
    return None, notes


def newest_step(folder: Path, whole: bool = True) -> int | None:
    """The step of the newest checkpoint; None if there is none or, with `whole`, if the sizes of its files do not match
    its manifest."""
    for step, path in _checkpoints(folder):
        return step if not whole or find_fault(path, contents=False) is None else None
    return None


def find_fault(path: Path, contents: bool = True) -> str | None:
    """The first fault of a checkpoint folder by its manifest, None if there is none; without `contents` no hash is
    computed."""
    try:
        files = _read_manifest(path)
        for name, entry in files.items():
            _check_size(path / name, name, entry["bytes"])
        # Opening a named pipe among the files would block.
        for other in path.rglob("*"):
            if not (other.is_file() or other.is_dir()):
                return f"{other.relative_to(path)} is no file"
        for name, entry in files.items() if contents else ():
            if _sha256(path / name) != entry["sha256"]:
                return f"{name} does not have the content that the manifest lists"
    except CheckpointError as fault:
        return str(fault)
    except OSError as error:
        return f"{error.filename or path} cannot be read, {error.strerror or error}"
    return None


def prune(folder: Path, saved_step: int, keep_last: int) -> None:
    """Remove all but the newest `keep_last` complete checkpoints up to the one just saved.

    Later steps than the one just saved predate a resumption at an earlier step, so they are removed too.
    """
    kept = 0
    for step, path in _checkpoints(folder):
        # Sizes only: reading every byte again after each save would cost more than the save.
        if step <= saved_step and kept < keep_last and find_fault(path, contents=False) is None:
            kept += 1
            continue
        doomed = path.with_name(f".tmp-remove-{path.name}")
        # Renamed first, so that a kill during removal leaves no checkpoint that looks truncated.
        try:
            path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("the old checkpoint %s cannot be removed: %s", path, one_line(error))


def remove_leftovers(folder: Path) -> None:
    """Remove the remains of killed saves from a checkpoint folder.

    Only the saving process may call it: another cannot tell them from a save in progress.
    """
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)
    for path in folder.glob(".old-step-*"):
        final = folder / path.name.removeprefix(".old-")
        if final.exists():
            shutil.rmtree(path)
        else:  # killed between the two renames of _put_in_place
            path.rename(final)


def reach_disk(folder: Path) -> None:
    """Sync all files of a folder, the folder and its subfolders to disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _fsync(path)
    _fsync(folder)


def _seal(folder: Path, step: int) -> None:
    """Write the manifest, last of all files, and sync everything to disk."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if not path.is_dir()
    }
    manifest = {"format": FORMAT, "step": step, "files": files}
    with open(folder / MANIFEST, "x", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1)
        stream.write("\n")
    reach_disk(folder)


def _put_in_place(partial: Path, final: Path) -> None:
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        # A folder cannot be renamed over a non-empty one. Between the two renames the old one still counts.
        final.rename(old)
    partial.rename(final)
    _fsync(final.parent)
    if old.exists():
        shutil.rmtree(old)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Every checkpoint folder, complete or not, the newest step first; for equal steps, the replacement first."""
    found = []
    try:
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            # A name with thousands of digits is not a step.
            if match and path.is_dir() and len(match["step"]) < 16:
                found.append((int(match["step"]), match["old"] is None, path))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """The files that a manifest lists; CheckpointError where it is broken."""
    if not (path / MANIFEST).exists():
        raise CheckpointError(f"it has no {MANIFEST}")
    manifest = read_json(path / MANIFEST, CheckpointError)
    name = _NAME.fullmatch(path.name)
    fault = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        fault = f"is not of format {FORMAT}"
    elif name and manifest.get("step") != int(name["step"]):
        fault = "is of another step"
    elif not isinstance(files := manifest.get("files"), dict) or not all(
        isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"} for entry in files.values()
    ):
        fault = "does not list sizes and hashes"
    elif not files:
        fault = "lists no files"
    if fault:
        raise CheckpointError(f"its {MANIFEST} {fault}")
    return dict(manifest["files"])


def _check_size(file: Path, name: str, size: object) -> None:
    try:
        found = file.stat()
    except (OSError, ValueError):
        raise CheckpointError(f"{name} is missing") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{name} is no file")
    if found.st_size != size:
        raise CheckpointError(f"{name} has {found.st_size} bytes, the manifest lists {size}")


def is_write_failure(error: BaseException) -> bool:
    """Whether a writer failed because of the disk; torch and safetensors do not raise OSError for that."""
    if isinstance(error, GoldError):
        return False
    return isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError"


def _is_full(folder: Path, error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # torch says only "file write failed", so query the disk itself, before the partial files are removed.
    with contextlib.suppress(OSError):
        return "No space left" in str(error) or shutil.disk_usage(folder).free < 2**20
    return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
