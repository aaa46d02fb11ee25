"""The folder of a run: its configuration, environment, metrics and checkpoints.

config.yaml        the resolved configuration, as of the last resumption
environment.json   versions, devices, command line, start time; one more entry for each resumption, with its changes
inputs.json        digests of the inputs: prompts, tokenizers, chat templates, weights (input_digests.py)
template_date.txt  the date that chat templates print, if one prints it (loop.py)
metrics.jsonl      {"kind": "train" | "eval", "step": n, …} a line
samples.jsonl      {"kind": "sample", "step": n, …} a line
notes.jsonl        {"kind": "start" | "note", "step": n, …} a line: the header of each start, and the notes
report.html        see gold.inspect.report
completions/       those of the initial student (gold.rollout.completions), if they have no folder of their own
checkpoints/       see gold.train.checkpoint_folder
trackers.json      ids of the run in other trackers (tracking_clients.py); tensorboard/ and wandb/ are theirs
plots/             see gold.inspect.plots
student/           the trained student, once the run has ended
adapter/           its adapter alone, if it has one
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from gold.errors import CheckpointError, ConfigError
from gold.files import append, plain, read_json, replace_text
from gold.train.alarms import check_end
from gold.train.checkpoint_folder import newest_step
from gold.train.records import FILE_OF_KIND, open_to_append, read_lines, record_line
from gold.train.resume_rules import (
    Change,
    Inputs,
    changes,
    environment,
    environment_changes,
    is_environment,
    is_inputs,
    refuse_changes,
)
from gold.train.trackers import RunInfo, Tracker
from gold.yaml_file import read_yaml

logger = logging.getLogger(__name__)

_FILES = (
    "config.yaml",
    "environment.json",
    "inputs.json",
    "template_date.txt",
    "metrics.jsonl",
    "samples.jsonl",
    "notes.jsonl",
    "vllm.log",
    "report.html",
    "trackers.json",
)
COMPLETIONS = "completions"
_FOLDERS = (COMPLETIONS, "checkpoints", "plots", "student", "adapter", "tensorboard", "wandb")
# Files that a process killed before config.yaml was written may leave.
_BEFORE_CONFIG = {".lock", "environment.json", "inputs.json"}
_BEFORE_CONFIG |= {".tmp-environment.json", ".tmp-inputs.json", ".tmp-config.yaml"}
_MODEL_FILES = ("*.safetensors", "pytorch_model*.bin", "*.gguf", "tokenizer.json", "tokenizer.model")


class _Dumper(yaml.SafeDumper):
    """YAML with the same meaning in versions 1.1 and 1.2."""


# The texts 1e-5 and 0.E0 are numbers in YAML 1.2, so they are quoted.
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def config_text(config: Mapping[str, Any]) -> str:
    """The text of config.yaml."""
    return yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class RunFolder(Tracker, contextlib.AbstractContextManager["RunFolder"]):
    """A run's folder, to read or to write; the first write locks it against all other processes.

    Only the main process of a distributed run writes. Close it, or use it in a `with` statement.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"
        self.config = config
        self.notes: list[str] = []  # changes found at resumption
        self._lock: int | None = None
        self._identity: tuple[int, int] | None = None
        self._streams: dict[str, int] = {}
        self._step: int | None = None  # the last one; None before the run has started
        self._early: list[str] = []  # notes before that

    @classmethod
    def check_new(cls, path: str | Path, overwrite: bool = False) -> None:
        """Checks that `create` may make a run of the folder; nothing is written.

        Raises:
            ConfigError: it holds a run that has begun, or other files, or is inside a model's folder.
        """
        path = Path(path)
        refuse_model_folder(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"output {path} is a file; give a folder")
        if _holds_run(path):
            if not overwrite and _has_begun(path):
                raise ConfigError(
                    f"output {path} already holds a run; resume it (--resume) or give another folder, or have it "
                    "removed (--overwrite)"
                )
        elif path.is_dir():
            try:
                others = sorted({entry.name for entry in path.iterdir()} - _BEFORE_CONFIG)
            except OSError as error:
                raise ConfigError(f"output {path} cannot be read: {error.strerror or error}") from error
            if others:
                held = ", ".join(others[:3])
                raise ConfigError(f"output {path} is not empty, it holds {held}; give a new or empty folder")

    @classmethod
    def check_resume(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        inputs: Inputs | None = None,
        allow_changed: bool = False,
    ) -> list[Change]:
        """Differences from the run in the folder; nothing is written.

        Raises:
            ConfigError: refused changes of keys or inputs, each named; with `allow_changed` it is not raised.
            CheckpointError: there is no run, or its files cannot be read.
        """
        run = cls.open(path)
        found = changes(run.config, config, run.inputs(allow_changed), inputs or {})
        if not allow_changed:
            refuse_changes(found, run.path)
        return found

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        overwrite: bool = False,
        inputs: Inputs | None = None,
    ) -> Self:
        """A new run folder, locked, with its configuration, environment and inputs written.

        Files of an earlier run are removed first, and nothing else: with `overwrite`, or if that run had not taken a
        step.

        Raises:
            ConfigError: as `check_new`.
            CheckpointError: the folder cannot be written, or another process is writing it.
        """
        path = Path(path)
        cls.check_new(path, overwrite)
        run = cls(path, plain(config))
        with run._closed_on_failure():
            path.mkdir(parents=True, exist_ok=True)
            run._acquire()
            if _holds_run(path):
                what = "a run" if _has_begun(path) else "a run that ended before its first step"
                run.notes.append(f"output {path} held {what}; it was removed")
            for entry in (path / name for name in _FILES + _FOLDERS):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
            run._write_state(environment(), inputs or {})
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """An existing run folder, to read; nothing is locked until the first write.

        Raises:
            CheckpointError: there is no run, or its configuration cannot be read.
        """
        path = Path(path)
        file = path / "config.yaml"
        if not file.exists():
            raise CheckpointError(f"{path} holds no run, there is no config.yaml; give a run folder")
        config, _ = read_yaml(file, CheckpointError)
        if not isinstance(config, dict):
            raise CheckpointError(f"{file} cannot be read: expected keys and values")
        return cls(path, config)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        inputs: Inputs | None = None,
        allow_changed: bool = False,
    ) -> Self:
        """An existing run folder to continue, locked, with the given configuration and inputs written, and an entry on
        the resumption in environment.json.

        Call `rewind` with the step of the checkpoint before anything is logged.

        Raises:
            ConfigError: as `check_resume`.
            CheckpointError: there is no run, it cannot be read or written, or another process is writing it.
        """
        run, found = cls.open(path), cls.check_resume(path, config, inputs, allow_changed)
        with run._closed_on_failure():
            run._acquire()
            file = run.path / "environment.json"
            before = read_json(file, CheckpointError) if file.exists() else {}
            if not is_environment(before):
                raise CheckpointError(
                    f"{file} is broken: it is no environment of a run; move it away and resume"
                )
            now = environment()
            lines = [change.text for change in found if change.kind != "free"]
            run.notes = environment_changes(before, now) + lines
            if not (run.path / "inputs.json").exists():
                run.notes.append(f"{run.path} has no inputs.json: prompts and models are not compared")
            before.setdefault("resumed", []).append({**now, **({"changed": lines} if lines else {})})
            kept = run.inputs(allow_changed)
            run.config = plain(config)
            run._write_state(before, {**kept, **(inputs or {})})
        return run

    def inputs(self, allow_broken: bool = False) -> dict[str, Any]:
        """The run's inputs; none if it stored none, or with `allow_broken` if they cannot be read.

        Raises:
            CheckpointError: they cannot be read.
        """
        file = self.path / "inputs.json"
        try:
            inputs = read_json(file, CheckpointError) if file.exists() else {}
            if not is_inputs(inputs):
                raise CheckpointError(f"{file} is broken: it holds no digests")
        except CheckpointError as error:
            if allow_broken:
                return {}
            raise CheckpointError(f"{error}; --allow-changed goes on without comparing") from error
        return dict(inputs)

    def _write_state(self, environment: object, inputs: object) -> None:
        for name, value in (("environment.json", environment), ("inputs.json", inputs)):
            replace_text(self.path / name, json.dumps(value, indent=1) + "\n")
        # The configuration comes last: its file makes the folder a run.
        replace_text(self.path / "config.yaml", config_text(self.config))

    def check_place(self) -> None:
        """Checks that the folder is still where it was locked.

        Raises:
            CheckpointError: it was moved or removed during the run.
        """
        here = None
        with contextlib.suppress(OSError):
            here = _identity(self.path)
        if self._identity not in (None, here):
            raise CheckpointError(
                f"the run folder {self.path} was moved or removed while the run went on; put it back, or give its new "
                "place as output, and resume (--resume)"
            )

    def start(self, run: RunInfo) -> None:
        """Write the header and the notes so far to notes.jsonl."""
        self._step = run.done
        self.log("start", {"step": run.done, "steps": run.steps, "header": dict(run.header)})
        for text in self._early:
            self.note(text)
        self._early.clear()

    def note(self, text: str) -> None:
        """Write a note to notes.jsonl once the run has started; one that cannot be written is left out."""
        if self._step is None:
            self._early.append(text)
            return
        with contextlib.suppress(CheckpointError):
            self.log("note", {"step": self._step, "text": text})

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Write one line: `train` and `eval` to metrics.jsonl, `sample` to samples.jsonl.

        The line is passed to the operating system at once, so that a kill loses none; `sync` protects against power
        loss.

        Raises:
            CheckpointError: the disk is full or fails (no partial line stays), or the file ends with a partial line.
            DataError: as `record_line`.
        """
        data = record_line(kind, record)
        name = FILE_OF_KIND[kind]
        if name not in self._streams:
            with _writing(self.path / name):
                self._acquire()
                self._streams[name] = open_to_append(self.path / name)
        self.check_place()
        with _writing(f"{self.path / name} at step {record['step']}", "; free some space and resume"):
            append(self._streams[name], data)
        if kind == "train":
            self._step = int(record["step"])

    def sync(self) -> None:
        """Sync every line logged so far to disk; call it before a checkpoint is saved.

        Raises:
            CheckpointError: the disk is full or fails; some file systems report it only now.
        """
        self.check_place()
        with _writing(f"the run folder {self.path}", "; free some space and resume"):
            for stream in self._streams.values():
                os.fsync(stream)

    def rewind(self, step: int) -> list[str]:
        """Drop every line of a step after `step`, and broken lines at the end, as after a kill or power loss; returns a
        note on each file that had some, and one if steps are missing.

        Raises:
            CheckpointError: a line in the middle is broken, or the files cannot be written.
        """
        self._close_streams()
        notes = []
        with _writing(f"the run folder {self.path}"):
            self._acquire()
            for file in (self.path / name for name in sorted(set(FILE_OF_KIND.values()))):
                if file.exists():
                    lines, broken = read_lines(file)
                    replace_text(file, "".join(line for line, record in lines if record["step"] <= step))
                    if broken:
                        notes.append(f"{file}: dropped {broken:,} bytes at its end that are no whole line")
            if (count := len({record["step"] for record in self.records("train")})) < step:
                file = self.path / FILE_OF_KIND["train"]
                notes.append(f"{file} has {count} of the {step} steps so far; the report lacks the others")
        return notes

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of a kind, in the order written; broken lines at the end are left out.

        Raises:
            CheckpointError: a line in the middle is broken.
        """
        file = self.path / FILE_OF_KIND[kind]
        return (
            [record for _, record in read_lines(file)[0] if record["kind"] == kind] if file.exists() else []
        )

    def close(self) -> None:
        """Close the files and release the lock; the folder can be opened again."""
        self._close_streams()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    @contextlib.contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            with _writing(f"the run folder {self.path}"):
                yield
        except BaseException:
            self.close()
            raise

    def _acquire(self) -> None:
        if self._lock is not None:
            return
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # The operating system releases it when the process ends in any way: no stale lock after a kill.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 100, 0).decode("ascii", "replace").strip()
            os.close(lock)
            raise CheckpointError(
                f"another process ({holder}) is writing the run folder {self.path}; "
                "wait for it, or give another output"
            ) from error
        except OSError as error:
            # Some network file systems have no locks. The lock only guards against mistakes.
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                os.close(lock)
                raise
            logger.info("%s is not locked: %s", self.path, error.strerror)
        self._lock = lock
        with contextlib.suppress(OSError):  # a full disk: the name is only informative
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {platform.node()}\n".encode("ascii", "replace"), 0)
        self._identity = _identity(self.path)

    def _close_streams(self) -> None:
        for stream in self._streams.values():
            os.close(stream)
        self._streams.clear()


def ended(path: str | Path, config: Mapping[str, Any], steps: int) -> str | None:
    """A line that the run has ended, if resuming it with this configuration would change nothing: it has taken as many
    steps and saved its student. None for any other run.

    Raises:
        CheckpointError: the run's files cannot be read.
        TrainingError: its last steps were not applied.
    """
    path = Path(path)
    if not (path / "student" / "config.json").is_file() or not _holds_run(path):
        return None
    run = RunFolder.open(path)
    found = changes(run.config, config, run.inputs(), {})
    last = run.records("train")[-1:]
    steps_found = newest_step(run.checkpoints), last[0]["step"] if last else None
    if any(change.kind == "refused" for change in found) or steps_found != (steps, steps):
        return None
    check_end(last[0])
    return f"the run in {path} ended after step {steps}: there is nothing to resume"


def refuse_model_folder(path: str | Path) -> None:
    """Checks that `path` is neither a model folder nor inside one.

    Raises:
        ConfigError: the folder or one above it holds a config.json together with weights or a tokenizer.
    """
    resolved = Path(path).resolve()
    for folder in (resolved, *resolved.parents):
        if (folder / "config.json").is_file() and any(any(folder.glob(pattern)) for pattern in _MODEL_FILES):
            raise ConfigError(
                f"output {path} lies inside the model folder {folder}; give a folder outside of it"
            )


def _holds_run(path: Path) -> bool:
    return (path / "config.yaml").exists() and (path / "environment.json").exists()


def _has_begun(path: Path) -> bool:
    """Whether the run in a folder has a checkpoint, a step, a student or completions; true if it cannot be read."""
    run = RunFolder(path, {})
    if any((path / COMPLETIONS).glob("*.npz")):
        return True
    if (path / "student").exists() or newest_step(run.checkpoints, whole=False) is not None:
        return True
    try:
        return bool(run.records("train"))
    except CheckpointError:
        return True


def _identity(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def _writing(what: object, advice: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {what}: {error.strerror or error}{advice}") from error
