"""One run as one folder: its configuration, where it ran, what it measured, and its checkpoints.

config.yaml        the resolved configuration, as of the last resumption
environment.json   versions, devices, command line, start time; a further entry for every resumption, with what was
                   changed for it
inputs.json        digests of what the run was given: prompts, tokenizers, chat templates, weights (inputs.py)
template_date.txt  the day that chat templates write, where one prints the date (loop.py)
metrics.jsonl      {"kind": "train" | "eval", "step": n, …} a line
samples.jsonl      {"kind": "sample", "step": n, …} a line
checkpoints/       see gold.train.checkpoint
plots/             see gold.inspect.plots
student/           the trained student, once the run has ended
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from gold.errors import CheckpointError, ConfigError, DataError, TrainingError
from gold.files import json_value, read_bytes, read_json
from gold.train.changes import (
    Change,
    Inputs,
    config_changes,
    environment,
    environment_changes,
    input_changes,
    is_environment,
    is_inputs,
    plain,
    refused,
    told,
)
from gold.train.checkpoint import newest_step
from gold.train.trackers import Tracker
from gold.yaml_file import read_yaml

FILE_OF_KIND = {"train": "metrics.jsonl", "eval": "metrics.jsonl", "sample": "samples.jsonl"}
# What a kill may leave of a folder that was not yet a run.
_BEFORE_CONFIG = {
    *(".lock", "environment.json", "inputs.json"),
    *(".tmp-environment.json", ".tmp-inputs.json", ".tmp-config.yaml"),
}
_OWN_NAMES = (
    "config.yaml",
    "environment.json",
    "inputs.json",
    "template_date.txt",
    "metrics.jsonl",
    "samples.jsonl",
    "checkpoints",
    "plots",
    "student",
)


class _Dumper(yaml.SafeDumper):
    """YAML that readers of version 1.1 and of 1.2 understand alike."""


# The texts 1e-5 and 0.E0 are numbers in YAML 1.2, so they are quoted.
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


class RunFolder(Tracker):
    """A run's folder, to read or to write; the first write locks it against every other process.

    Only the main process of a distributed run writes. Close it, or use it in a `with` statement.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.notes: list[str] = []  # what a resumption finds changed, for people to read
        self._lock: int | None = None
        self._identity: tuple[int, int] | None = None
        self._streams: dict[str, int] = {}

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints; it exists once one was saved."""
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        """The folder of the pictures; it exists once one was drawn."""
        return self.path / "plots"

    @classmethod
    def check_new(cls, path: str | Path, overwrite: bool = False) -> None:
        """Nothing, where `create` may make a run of the folder; nothing is written.

        Raises:
            ConfigError: a run that has begun is there already, or other files, or the folder lies inside a model's.
        """
        path = Path(path)
        refuse_model_folder(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"output {path} is a file; give a folder")
        if not path.is_dir():
            return
        if _holds_run(path):
            if not overwrite and cls._has_begun(path):
                raise ConfigError(
                    f"output {path} already holds a run; resume it (--resume) or give another folder, or have it "
                    "removed (--overwrite)"
                )
            return
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
    ) -> None:
        """Nothing, where `resume` may go on with the run in the folder; nothing is written.

        Raises:
            ConfigError: the configuration differs in a key that would make it another run, or an input has another
                content; each is named. With `allow_changed` it is not raised.
            CheckpointError: no run is there, or its files cannot be read.
        """
        cls.open(path)._changes(config, inputs or {}, allow_changed)

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        overwrite: bool = False,
        inputs: Inputs | None = None,
    ) -> Self:
        """A new run folder, locked, with its configuration, environment and inputs written.

        What an earlier run wrote there is removed first, and nothing else: with `overwrite`, or where that run had not
        taken a step.

        Raises:
            ConfigError: a run that has begun is there already, or other files, or the folder lies inside a model's.
            CheckpointError: the folder cannot be written, or another process is writing it.
        """
        path = Path(path)
        cls.check_new(path, overwrite)
        run = cls(path, plain(config))
        try:
            path.mkdir(parents=True, exist_ok=True)
            run._acquire()
            if _holds_run(path):
                what = "a run" if cls._has_begun(path) else "a run that ended before its first step"
                run.notes.append(f"output {path} held {what}: it is begun anew")
            for name in _OWN_NAMES:
                entry = path / name
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
            # The configuration comes last: with it the folder is a run.
            _write_json(path / "environment.json", environment())
            _write_json(path / "inputs.json", inputs or {})
            run._write_config()
        except OSError as error:
            run.close()
            raise CheckpointError(f"cannot write the run folder {path}: {error.strerror or error}") from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """An existing run folder, to read; nothing is locked until the first write.

        Raises:
            CheckpointError: no run is there, or its configuration cannot be read.
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
        """An existing run folder to go on with, locked; the resumption, and what is changed for it, is kept in its
        environment, and the configuration and the inputs are now those that are given.

        Call `rewind` with the step of the checkpoint before anything is appended.

        Raises:
            ConfigError: as `check_resume`.
            CheckpointError: no run is there, it cannot be read or written, or another process is writing it.
        """
        run = cls.open(path)
        changes = run._changes(config, inputs or {}, allow_changed)
        try:
            run._acquire()
            file = run.path / "environment.json"
            before = read_json(file, CheckpointError) if file.exists() else {}
            if not is_environment(before):
                raise CheckpointError(
                    f"{file} is broken: it is no environment of a run; move it away and resume"
                )
            now = environment()
            lines = list(told(changes))
            run.notes = [change.note for change in environment_changes(before, now)] + lines
            if not (run.path / "inputs.json").exists():
                run.notes.append(
                    f"{run.path} has no inputs.json: prompts and models are not compared with its own"
                )
            before.setdefault("resumed", []).append({**now, **({"changed": lines} if lines else {})})
            _write_json(file, before)
            _write_json(run.path / "inputs.json", {**run._inputs(allow_changed), **(inputs or {})})
            run.config = plain(config)
            run._write_config()
        except OSError as error:
            run.close()
            raise CheckpointError(f"cannot write the run folder {path}: {error.strerror or error}") from error
        except BaseException:
            run.close()
            raise
        return run

    def _changes(self, config: Mapping[str, Any], inputs: Inputs, allow_changed: bool) -> list[Change]:
        """What differs from the run so far.

        Raises:
            ConfigError: something of it makes another run, and that is not allowed.
        """
        own = self._inputs(allow_changed)
        changes = [*config_changes(self.config, config, own), *input_changes(own, inputs)]
        if (lines := refused(changes)) and not allow_changed:
            raise ConfigError(
                f"{self.path} was started with another configuration or other inputs: {'; '.join(lines)}; resume with "
                "the old ones, give a new output, or go on all the same (--allow-changed)"
            )
        return changes

    def _inputs(self, allow_broken: bool = False) -> dict[str, Any]:
        """The run's inputs; none where it kept none."""
        file = self.path / "inputs.json"
        if not file.exists():
            return {}
        try:
            inputs = read_json(file, CheckpointError)
            if not is_inputs(inputs):
                raise CheckpointError(f"{file} is broken: it holds no digests")
        except CheckpointError as error:
            if allow_broken:
                return {}
            raise CheckpointError(f"{error}; --allow-changed goes on without comparing") from error
        return dict(inputs)

    @classmethod
    def _has_begun(cls, path: Path) -> bool:
        """Whether the run in a folder has a checkpoint, a step or a student; one that cannot be read may have."""
        run = cls(path, {})
        if (path / "student").exists() or newest_step(run.checkpoints, whole=False) is not None:
            return True
        try:
            return bool(run.records("train"))
        except CheckpointError:
            return True

    def _write_config(self) -> None:
        _replace(
            self.path / "config.yaml",
            yaml.dump(self.config, Dumper=_Dumper, sort_keys=False, allow_unicode=True),
        )

    def check_place(self) -> None:
        """Nothing, where the folder is still where it was when it was locked.

        Raises:
            CheckpointError: it was moved or removed under way.
        """
        try:
            found = os.stat(self.path)
            here = (found.st_dev, found.st_ino) == self._identity
        except OSError:
            here = False
        if self._identity is not None and not here:
            raise CheckpointError(
                f"the run folder {self.path} was moved or removed while the run went on; put it back, or give its new "
                "place as output, and resume (--resume)"
            )

    def log(self, kind: str, record: Mapping[str, Any]) -> None:
        """Write one line: `train` and `eval` to metrics.jsonl, `sample` to samples.jsonl.

        `record` needs an integer `step`. Scalars of NumPy and torch become numbers, NaN and infinities null.
        The line is handed to the system at once, so that a kill loses none; `sync` guards against power cuts.

        Raises:
            CheckpointError: the disk is full or fails (no half line stays), or the file ends in a half line.
            DataError: an unknown kind, no step, or a value that JSON cannot hold.
        """
        if kind not in FILE_OF_KIND:
            raise DataError(f"unknown kind of record {kind!r}; known are {', '.join(FILE_OF_KIND)}")
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise DataError(f"a record needs an integer step, got {step!r}")
        line = json.dumps(plain({"kind": kind, **record}), ensure_ascii=False, allow_nan=False) + "\n"
        data = line.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode("utf-8")
        stream = self._stream(FILE_OF_KIND[kind])
        self.check_place()
        size = os.fstat(stream).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(stream, data[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(stream, size)
            name = self.path / FILE_OF_KIND[kind]
            raise CheckpointError(
                f"cannot write {name} at step {step}: {error.strerror or error}; free some space and resume"
            ) from error

    def sync(self) -> None:
        """Make every line appended so far reach the disk; call it before a checkpoint is saved.

        Raises:
            CheckpointError: the disk is full or fails; some file systems say so only now.
        """
        self.check_place()
        try:
            for stream in self._streams.values():
                os.fsync(stream)
        except OSError as error:
            raise CheckpointError(
                f"cannot write the run folder {self.path}: {error.strerror or error}; free some space and resume"
            ) from error

    def rewind(self, step: int) -> list[str]:
        """Drop every line of a later step than `step`, and broken lines at the end, as a kill or a power cut leaves
        them; a note for people on each file that had some.

        Raises:
            CheckpointError: a line in the middle is broken, or the files cannot be written.
        """
        self._close_streams()
        notes = []
        try:
            self._acquire()
            for name in sorted(set(FILE_OF_KIND.values())):
                file = self.path / name
                if file.exists():
                    lines, broken = _lines(file)
                    _replace(file, "".join(line for line, record in lines if record["step"] <= step))
                    if broken:
                        notes.append(f"{file}: its last {broken:,} bytes are no whole line, and are dropped")
        except OSError as error:
            raise CheckpointError(
                f"cannot rewind the run in {self.path}: {error.strerror or error}"
            ) from error
        return notes

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of a kind, in the order written; broken lines at the end are left out.

        Raises:
            CheckpointError: a line in the middle is broken.
        """
        file = self.path / FILE_OF_KIND[kind]
        return [record for _, record in _lines(file)[0] if record["kind"] == kind] if file.exists() else []

    def close(self) -> None:
        """Let go of the files and of the lock; the folder can be opened again."""
        self._close_streams()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _acquire(self) -> None:
        if self._lock is not None:
            return
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # The system lets go of it when the process ends, however it ends: no stale lock after a kill.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 100, 0).decode("ascii", "replace").strip()
            os.close(lock)
            raise CheckpointError(
                f"another process ({holder}) is writing the run folder {self.path}; "
                "wait for it, or give another output"
            ) from error
        except OSError as error:
            # Some network file systems know no locks. The lock guards against a slip, nothing rests on it.
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                os.close(lock)
                raise
        self._lock = lock
        with contextlib.suppress(OSError):  # a full disk: the name is for people
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {platform.node()}\n".encode("ascii", "replace"), 0)
        folder = os.stat(self.path)
        self._identity = folder.st_dev, folder.st_ino

    def _stream(self, name: str) -> int:
        if name not in self._streams:
            file = self.path / name
            try:
                self._acquire()
                stream = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise CheckpointError(f"cannot write {file}: {error.strerror or error}") from error
            found = os.fstat(stream)
            fault = None
            if not stat.S_ISREG(found.st_mode):
                fault = f"cannot write {file}: it is no file"
            elif found.st_size and os.pread(stream, 1, found.st_size - 1) != b"\n":
                fault = f"{file} ends in a half-written line; resume the run (--resume)"
            if fault is not None:
                os.close(stream)
                raise CheckpointError(fault)
            self._streams[name] = stream
        return self._streams[name]

    def _close_streams(self) -> None:
        for stream in self._streams.values():
            os.close(stream)
        self._streams.clear()


def ended(path: str | Path, config: Mapping[str, Any], steps: int) -> str | None:
    """What there is to say of a run that has ended after as many steps, its student saved, and that to resume with this
    configuration would not change; None of any other.

    Raises:
        CheckpointError: the run's files cannot be read.
        TrainingError: its last steps were not applied.
    """
    if not (Path(path) / "student" / "config.json").is_file() or not _holds_run(Path(path)):
        return None
    run = RunFolder.open(path)
    if refused(config_changes(run.config, config, run._inputs())) or newest_step(run.checkpoints) != steps:
        return None
    last = run.records("train")[-1:]
    if not last or last[0]["step"] != steps:
        return None
    check_end(last[0])
    return f"the run in {path} ended after step {steps}: there is nothing to resume"


def why_bad(record: Mapping[str, Any]) -> str:
    """What a step had that was not applied, by its metrics."""
    if record.get("teacher_impossible") and not record.get("grad_norm"):
        return "no text that the teacher finds possible"
    return str(record.get("why", "a NaN or infinite loss or gradient"))


def remedy_for(record: Mapping[str, Any]) -> str:
    """What to do about a step that was not applied, by its metrics."""
    if record.get("teacher_impossible") and not record.get("grad_norm"):
        return "let the server tell what is unlikely too (gold doctor says how), or take another teacher"
    return str(record.get("remedy", "lower optimizer.lr, or look at the last lines of metrics.jsonl"))


def check_end(record: Mapping[str, Any]) -> None:
    """Nothing, where the last step of a run that has ended, of which this is the record, was applied.

    Raises:
        TrainingError: it was not, nor were those before it that are counted with it.
    """
    if bad := record.get("bad_steps"):
        raise TrainingError(
            f"step {record['step']}: the run has ended, but its last {bad} step(s) had {why_bad(record)} "
            "and were not applied; the student is that of the steps before: use it as it is, or train it anew and "
            f"{remedy_for(record)}"
        )


def refuse_model_folder(path: str | Path) -> None:
    """Nothing, where `path` is neither a model folder nor inside one.

    Raises:
        ConfigError: the folder or one above it holds a config.json beside weights or a tokenizer.
    """
    resolved = Path(path).resolve()
    patterns = (
        "*.safetensors",
        "pytorch_model*.bin",
        "*.gguf",
        "tokenizer.json",
        "tokenizer.model",
    )
    for folder in (resolved, *resolved.parents):
        if (folder / "config.json").is_file() and any(any(folder.glob(pattern)) for pattern in patterns):
            raise ConfigError(
                f"output {path} lies inside the model folder {folder}; give a folder outside of it"
            )


def _holds_run(path: Path) -> bool:
    """Whether a folder holds what `RunFolder.create` writes."""
    return (path / "config.yaml").exists() and (path / "environment.json").exists()


def _lines(file: Path) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """Every line with its record, and the number of bytes at the end that are no whole lines: those are left out."""
    data = read_bytes(file, CheckpointError, None)
    found: list[tuple[str, dict[str, Any]]] = []
    *whole, rest = data.split(b"\n")
    broken, first = len(rest), ""
    for number, raw in enumerate(whole, start=1):
        try:
            record = json_value(raw)
            if not (isinstance(record, dict) and _is_step(record.get("step")) and "kind" in record):
                raise ValueError("expected an object with kind and step")
        except ValueError as error:
            first = first or f"{file}:{number}: a broken line, {_one_line(error)}; remove it by hand"
            broken += len(raw) + 1
            continue
        if first:
            raise CheckpointError(first)
        found.append((raw.decode("utf-8") + "\n", record))
    return found, broken


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _write_json(file: Path, value: object) -> None:
    _replace(file, json.dumps(value, indent=1) + "\n")


def _replace(file: Path, text: str) -> None:
    """Put a whole new content in place of a file, or fail and leave the old one."""
    partial = file.with_name(f".tmp-{file.name}")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
