"""One run as one folder: its configuration, where it ran, what it measured, and its checkpoints.

config.yaml        the resolved configuration
environment.json   versions, devices, command line, start time; a further entry for every resume
metrics.jsonl      {"kind": "train" | "eval", "step": n, …} a line
samples.jsonl      {"kind": "sample", "step": n, …} a line
checkpoints/       see gold.checkpoint
plots/             see gold.plots
student/           the trained student, once the run has ended
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from gold.errors import CheckpointError, ConfigError, DataError

FILE_OF_KIND = {"train": "metrics.jsonl", "eval": "metrics.jsonl", "sample": "samples.jsonl"}
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "numba", "numpy")
# Keys, as patterns, that may differ between a run and its resumption: where the folder lies decides no number, nor does
# the way to a teacher's server or cache.
FREE_KEYS = (
    "output",
    *(
        f"{teacher}.{key}"
        for teacher in ("teacher", "teachers.*")
        for key in (
            "cache.path",
            *(f"served.{key}" for key in ("url", "concurrency", "timeout_s", "retries", "key_env")),
        )
    ),
)
# What a kill may leave of a folder that was not yet a run.
_BEFORE_CONFIG = {".lock", "environment.json", ".tmp-environment.json", ".tmp-config.yaml"}
_OWN_NAMES = (
    "config.yaml",
    "environment.json",
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


class RunFolder:
    """A run's folder, to read or to write; the first write locks it against every other process.

    Only the main process of a distributed run writes. Close it, or use it in a `with` statement.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.notes: list[str] = []  # what a resumption finds changed, for people to read
        self._lock: int | None = None
        self._streams: dict[str, int] = {}

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints; it exists once one was saved."""
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        """The folder of the pictures; it exists once one was drawn."""
        return self.path / "plots"

    @staticmethod
    def check_new(path: str | Path, overwrite: bool = False) -> None:
        """Nothing, where `create` may make a run of the folder; nothing is written.

        Raises:
            ConfigError: a run is there already, or other files, or the folder lies inside a model folder.
        """
        path = Path(path)
        refuse_model_folder(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"output {path} is a file; give a folder")
        if path.exists() and not overwrite:
            if (path / "config.yaml").exists():
                raise ConfigError(
                    f"output {path} already holds a run; resume it (--resume) or give another folder"
                )
            others = sorted({entry.name for entry in path.iterdir()} - _BEFORE_CONFIG)
            if others:
                held = ", ".join(others[:3])
                raise ConfigError(f"output {path} is not empty, it holds {held}; give a new or empty folder")

    @classmethod
    def check_resume(cls, path: str | Path, config: Mapping[str, Any]) -> None:
        """Nothing, where `resume` may go on with the run in the folder; nothing is written.

        Raises:
            ConfigError: the configuration differs in more than `output`; each key is named with both values.
            CheckpointError: no run is there, or its configuration cannot be read.
        """
        changes = config_changes(cls.open(path).config, config)
        if changes:
            raise ConfigError(
                f"{path} was started with another configuration: {'; '.join(changes)}; "
                "resume with the old values, or give a new output"
            )

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any], overwrite: bool = False) -> Self:
        """A new run folder, locked, with its configuration and environment written.

        With `overwrite`, what an earlier run wrote there is removed first, and nothing else.

        Raises:
            ConfigError: a run is there already, or other files, or the folder lies inside a model folder.
            CheckpointError: the folder cannot be written, or another process is writing it.
        """
        path = Path(path)
        cls.check_new(path, overwrite)
        run = cls(path, _plain(config))
        try:
            path.mkdir(parents=True, exist_ok=True)
            run._acquire()
            for name in _OWN_NAMES:
                entry = path / name
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
            # The configuration comes last: with it the folder is a run.
            _replace(path / "environment.json", json.dumps(environment(), indent=1) + "\n")
            _replace(
                path / "config.yaml",
                yaml.dump(run.config, Dumper=_Dumper, sort_keys=False, allow_unicode=True),
            )
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
        try:
            config = yaml.safe_load((path / "config.yaml").read_text("utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path} holds no run, there is no config.yaml; give a run folder"
            ) from error
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise CheckpointError(f"{path / 'config.yaml'} cannot be read: {_one_line(error)}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{path / 'config.yaml'} cannot be read: expected keys and values")
        return cls(path, config)

    @classmethod
    def resume(cls, path: str | Path, config: Mapping[str, Any]) -> Self:
        """An existing run folder to go on with, locked, the resumption noted in its environment.

        Call `rewind` with the step of the checkpoint before anything is appended.

        Raises:
            ConfigError: the configuration differs in more than `output`; each key is named with both values.
            CheckpointError: no run is there, it cannot be read or written, or another process is writing it.
        """
        cls.check_resume(path, config)
        run = cls.open(path)
        try:
            run._acquire()
            file = run.path / "environment.json"
            before: dict[str, Any] = {}
            with contextlib.suppress(FileNotFoundError, ValueError):
                before = json.loads(file.read_text("utf-8"))
            now = environment()
            run.notes = _environment_changes(before, now)
            before.setdefault("resumed", []).append(now)
            _replace(file, json.dumps(before, indent=1) + "\n")
        except OSError as error:
            run.close()
            raise CheckpointError(f"cannot write the run folder {path}: {error.strerror or error}") from error
        return run

    def append(self, kind: str, record: Mapping[str, Any]) -> None:
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
        line = json.dumps(_plain({"kind": kind, **record}), ensure_ascii=False, allow_nan=False) + "\n"
        data = line.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode("utf-8")
        stream = self._stream(FILE_OF_KIND[kind])
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
        try:
            for stream in self._streams.values():
                os.fsync(stream)
        except OSError as error:
            raise CheckpointError(
                f"cannot write the run folder {self.path}: {error.strerror or error}; free some space and resume"
            ) from error

    def rewind(self, step: int) -> None:
        """Drop every line of a later step than `step`, and a last line that a kill cut short.

        Raises:
            CheckpointError: a line in the middle is broken, or the files cannot be written.
        """
        self._close_streams()
        try:
            self._acquire()
            for name in sorted(set(FILE_OF_KIND.values())):
                file = self.path / name
                if file.exists():
                    _replace(file, "".join(line for line, record in _lines(file) if record["step"] <= step))
        except OSError as error:
            raise CheckpointError(
                f"cannot rewind the run in {self.path}: {error.strerror or error}"
            ) from error

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of a kind, in the order written; a half-written last line is left out.

        Raises:
            CheckpointError: a line in the middle is broken.
        """
        file = self.path / FILE_OF_KIND[kind]
        return [record for _, record in _lines(file) if record["kind"] == kind] if file.exists() else []

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
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {platform.node()}\n".encode("ascii", "replace"), 0)
        self._lock = lock

    def _stream(self, name: str) -> int:
        if name not in self._streams:
            self._acquire()
            stream = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            size = os.fstat(stream).st_size
            if size and os.pread(stream, 1, size - 1) != b"\n":
                os.close(stream)
                raise CheckpointError(
                    f"{self.path / name} ends in a half-written line; resume the run (--resume)"
                )
            self._streams[name] = stream
        return self._streams[name]

    def _close_streams(self) -> None:
        for stream in self._streams.values():
            os.close(stream)
        self._streams.clear()


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One `optimizer.lr was 1e-05, is 2e-05` per dotted key that differs, save those that may differ."""
    flat_old, flat_new = _flat(_plain(old)), _flat(_plain(new))
    changes = []
    for key in [*flat_old, *(key for key in flat_new if key not in flat_old)]:
        before, after = (_shown(flat[key]) if key in flat else "not set" for flat in (flat_old, flat_new))
        if before != after and not any(fnmatchcase(key, free) for free in FREE_KEYS):
            changes.append(f"{key} was {before}, is {after}")
    return changes


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


def environment() -> dict[str, Any]:
    """Versions, devices, command line and start time of this process, as JSON holds them."""
    import torch

    from gold import __version__

    versions: dict[str, str | None] = {"python": platform.python_version(), "gold": __version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    devices = [f"cpu: {_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    devices += [f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(sys.argv),
        "platform": platform.platform(),
        "versions": versions,
        "devices": devices,
    }


def _environment_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    versions = before.get("versions", {})
    notes = [
        f"started with {package} {versions[package]}, resumed with {version}"
        for package, version in now["versions"].items()
        if versions.get(package, version) != version
    ]
    if before.get("devices", now["devices"]) != now["devices"]:
        notes.append(f"started on {'; '.join(before['devices'])}, resumed on {'; '.join(now['devices'])}")
    return [f"{note}: results may differ in their last digits" for note in notes]


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every line with its record; a last line that was cut short is left out."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    # What follows the last newline, nothing or a half line, is dropped.
    found = []
    for number, raw in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(raw)
            if not (isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record):
                raise ValueError("expected an object with kind and step")
        except ValueError as error:
            raise CheckpointError(
                f"{file}:{number}: a broken line, {_one_line(error)}; remove it by hand"
            ) from error
        found.append((raw.decode("utf-8") + "\n", record))
    return found


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


def _plain(value: Any) -> Any:
    """A value as JSON and YAML hold it: lists, string keys, plain numbers; NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return _plain(value.item())
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise DataError(
        f"a record cannot hold a {type(value).__name__}; give numbers, strings, lists or mappings"
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key: {"a": {"b": 1}, "c": [{"d": 2}]} → {"a.b": 1, "c[0].d": 2}."""
    leaves: dict[str, Any] = {}
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            leaves |= _flat(entry, f"{prefix}.{key}" if prefix else key)
        return leaves
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        for place, entry in enumerate(value):
            leaves |= _flat(entry, f"{prefix}[{place}]")
        return leaves
    return {prefix: value}


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
