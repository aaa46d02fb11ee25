"""Where a run is saved; writes its checkpoints, those of a sharded run while training goes on, and its student."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from gold.errors import CheckpointError
from gold.files import one_line
from gold.models.adapters import is_adapted, save_adapters
from gold.models.language_model import LanguageModel
from gold.models.load import copy_processors, save_model
from gold.models.rounding import AsInFile, file_dtype
from gold.rollout.ahead import Place
from gold.rollout.engine import Generation
from gold.train.checkpoint_folder import is_write_failure, reach_disk, save_checkpoint
from gold.train.model_card import model_card
from gold.train.run_folder import COMPLETIONS, RunFolder
from gold.train.shards import Snapshot
from gold.train.state import TrainState, write_steps

_OF_ADAPTER = "They are of the adapter on its base model; these weights are the sum of both, rounded once."


@dataclass(frozen=True)
class Saving:
    """Where a run is saved, and how often it evaluates and saves.

    ``overwrite`` removes an existing run in ``output``. ``allow_changed`` resumes it despite refused changes of keys or
    inputs; they are recorded in its environment.json. ``completions``: folder for those of the initial student
    (``policy="initial"``), which runs can share; default: one in ``output``.
    """

    output: Path | None = None
    resume: bool = False
    evaluate_every: int = 50
    checkpoint_every: int = 50
    keep_last: int = 2
    overwrite: bool = False
    allow_changed: bool = False
    completions: Path | None = None

    def __post_init__(self) -> None:
        for name in ("output", "completions"):  # a text is a path too
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(given))

    @property
    def kept_in(self) -> Path | None:
        """Folder for the initial student's completions, if they are kept."""
        return self.completions or (self.output / COMPLETIONS if self.output else None)


class CheckpointWriter:
    """Writes the checkpoints of a run to ``output/checkpoints``; without ``output`` none.

    Those of a run with whole weights are written by the main process, which has the run's ``folder``, while all wait.
    In a sharded run every process copies its shards to main memory, and a thread of each writes them; the main
    process's then completes the checkpoint. An error of such a write is raised by the next ``save`` or ``wait``.
    """

    def __init__(
        self, state: TrainState, output: Path | None, folder: RunFolder | None, keep_last: int
    ) -> None:
        self.state, self.folder, self.keep_last = state, folder, keep_last
        self.place = output / "checkpoints" if output else None
        self._thread: threading.Thread | None = None
        self._failure = ""

    def save(self, wait: bool) -> None:
        """A checkpoint of the current state; with ``wait`` it is complete on return. All processes call it.

        Raises:
            CheckpointError: it cannot be written, or an earlier one could not be.
        """
        if self.place is None:
            return
        state = self.state
        self.wait()
        ahead = state.completions_ahead()
        if self.folder:
            self.folder.sync()
        if state.sharding:
            work = partial(self._write, state.snapshot(), self.place, state.step, state.bad_steps, ahead)
            self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
            self._thread.start()
        elif self.folder:
            write = partial(state.save, ahead=ahead)
            save_checkpoint(self.folder.checkpoints, state.step, write, self.keep_last)
        if wait:
            self.wait()
        if wait or not state.sharding:
            state.accelerator.wait_for_everyone()

    def wait(self) -> None:
        """Waits for the write in progress.

        Raises:
            CheckpointError: it failed, in any process.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure:  # the same in all processes
            raise CheckpointError(self._failure)

    def close(self) -> None:
        """Waits for the write in progress for a minute at most, whatever its result: the run has ended already."""
        if self._thread is not None:
            self._thread.join(60.0)

    def _write(
        self, snapshot: Snapshot, place: Path, step: int, bad_steps: int, ahead: Mapping[Place, Generation]
    ) -> None:
        """One write, in the thread of each process: the main one creates the folder and tells the others, all write
        their shards, the main one completes the checkpoint and tells the others; or tells them why not."""

        def tell(failure: str = "", folder: Path = place) -> tuple[str, Path]:
            message = [(failure, folder)]
            dist.broadcast_object_list(message, src=0, group=snapshot.group)
            return message[0]

        def writer(folder: Path) -> None:
            write_steps(folder, step, bad_steps, ahead)
            tell("", folder)
            snapshot.write(folder)

        failure = ""
        try:
            if self.state.accelerator.is_main_process:
                try:
                    save_checkpoint(place, step, writer, self.keep_last)
                except Exception as error:
                    failure = str(error)
                tell(failure)
                return
            failure, folder = tell()
            if not failure:
                with contextlib.suppress(Exception):  # raised in the main process too, which says why
                    snapshot.write(folder)
                failure, _ = tell()
        except Exception as error:  # another process is gone
            failure = failure or f"cannot save the checkpoint of step {step} in {place}: {one_line(error)}"
        finally:
            self._failure = failure


def as_written(state: TrainState) -> contextlib.AbstractContextManager[None]:
    """A context in which the student's weights are those that ``save_student`` writes; all processes enter it.

    Those of a student with adapters are not changed: what is rounded is their sum with the base model's.
    """
    student = state.student
    return AsInFile(student.lm, None if is_adapted(student.lm) else file_dtype(student))


def save_student(state: TrainState, folder: RunFolder | None) -> None:
    """Writes the trained student to ``student/`` of its run, before it its adapter to ``adapter/``, each with a model
    card and atomically; all processes call it, the main one with the run's folder.

    The student's weights have the dtype of the files that it was loaded from, if that is narrower than the one in
    memory.

    Raises:
        CheckpointError: it cannot be written; partial files are removed.
    """
    with state.weights_at_hand():
        weights = state.whole_on_main()
        if folder is not None:
            _write_student(state.student, weights, folder)


def _write_student(student: LanguageModel, weights: Mapping[str, Tensor] | None, folder: RunFolder) -> None:
    adapted, dtype = is_adapted(student.lm), file_dtype(student)

    def write_adapter(place: Path) -> None:
        save_adapters(student.lm, place)
        _write_card(folder, place, adapter=True)

    def write_student(place: Path) -> None:
        save_model(student, place, weights, dtype)
        copy_processors(student, place)
        _write_card(folder, place, note=_OF_ADAPTER if adapted else "")

    if adapted:
        _put(write_adapter, folder.path / "adapter")
    _put(write_student, folder.path / "student")


def _write_card(run: RunFolder, place: Path, adapter: bool = False, note: str = "") -> None:
    (place / "README.md").write_text(model_card(run, adapter=adapter, note=note), encoding="utf-8")


def _put(writer: Callable[[Path], None], final: Path) -> None:
    """Has a folder written, and moved into place."""
    begun = final.with_name(f".tmp-{final.name}")
    shutil.rmtree(begun, ignore_errors=True)
    try:
        writer(begun)
        reach_disk(begun)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(begun, final)
    except Exception as error:
        shutil.rmtree(begun, ignore_errors=True)
        if not is_write_failure(error):
            raise
        raise CheckpointError(
            f"cannot save the student in {final}: {getattr(error, 'strerror', None) or error}; the last checkpoint "
            "holds it, free some space and resume"
        ) from error
