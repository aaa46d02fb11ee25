"""What differs between a run and its resumption, and which of it would make it another run.

A change is *free* (it decides nothing that the run holds), *noted* (the run goes on, and says so), or *refused* (the
steps to come would not be those of the run that was begun).
"""

import contextlib
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

from gold.errors import DataError
from gold.version import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "numba", "numpy")
DIGITS = "results may differ in their last digits"

Inputs = Mapping[str, Mapping[str, Any]]
"""What a run was given, by name ("student", "training prompts"): `from`, where it was, and `digests` by part."""

_SCHEDULE = "the learning rate goes on along the schedule of the new number"
_MEASURED = "evaluations before and after are not over the same completions"
# Keys, as patterns, of a configuration and of a run from Python, and what a note says of a change; nothing: it is free.
# Where the folder lies decides no number, nor does the way to a teacher's server or cache.
MAY_CHANGE: dict[str, str | None] = {
    "output": None,
    "teacher*.cache.path": None,
    **{f"teacher*.served.{key}": None for key in ("url", "concurrency", "timeout_s", "retries", "key_env")},
    "teacher*.cache.missing": "",
    "train.checkpoint_every": "",
    "train.keep_last": "",
    "train.doctor": "",
    "train.bad_steps_allowed": "",
    "recipe.bad_steps_allowed": "",
    "train.steps": _SCHEDULE,
    "recipe.steps": _SCHEDULE,
    "evaluate.every": "",
    "evaluate.samples": "",
    "evaluate.prompts": _MEASURED,
    "evaluate.num_generations": _MEASURED,
    "evaluate.micro_batch_size": DIGITS,
    # Other batches are other sums.
    "rollout.generation_batch_size": DIGITS,
    "recipe.generation_batch_size": DIGITS,
    "train.micro_batch_size": DIGITS,
    "recipe.micro_batch_size": DIGITS,
    "train.gradient_checkpointing": DIGITS,
    "recipe.gradient_checkpointing": DIGITS,
    "student.trust_remote_code": "",
    "teacher*.trust_remote_code": "",
    "student.device": DIGITS,
    "teacher*.device": DIGITS,
}
# Where an input lies, and its name among the inputs, if that is not the key's own: content is compared, so it may move.
_PLACES = {"data.prompts": "training prompts", "data.heldout": "held-out prompts"}


@dataclass(frozen=True)
class Change:
    """A difference, told in a line, and what follows from it: None, another run; nothing, the run alone."""

    told: str
    follows: str | None = None
    free: bool = False

    @property
    def note(self) -> str:
        """The line for people."""
        return f"{self.told}: {self.follows}" if self.follows else self.told


def config_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], inputs: Inputs | None = None
) -> list[Change]:
    """One `optimizer.lr was 1e-05, is 2e-05` per dotted key that differs. `inputs`: what is known of the old run's."""
    flat_old, flat_new = _flat(plain(old)), _flat(plain(new))
    changes = []
    for key in [*flat_old, *(key for key in flat_new if key not in flat_old)]:
        before, after = (_shown(flat[key]) if key in flat else "not set" for flat in (flat_old, flat_new))
        if before == after:
            continue
        told = f"{key} was {before}, is {after}"
        rule = next((pattern for pattern in MAY_CHANGE if fnmatchcase(key, pattern)), None)
        if rule is not None:
            follows = MAY_CHANGE[rule]
            changes.append(Change(told, follows or "", free=follows is None))
        elif _PLACES.get(key, key.removesuffix(".path")) in (inputs or {}):
            changes.append(Change(told, "what it holds is compared"))
        else:
            changes.append(Change(told))
    return changes


def input_changes(old: Inputs, new: Inputs) -> list[Change]:
    """One line per part of an input that has another content than the run was begun with; what only one side knows of
    is not compared."""
    changes = []
    for name in [name for name in old if name in new]:
        before, after = old[name]["digests"], new[name]["digests"]
        for part in [*before, *(part for part in after if part not in before)]:
            if before.get(part) == after.get(part):
                continue
            how = (
                "has changed"
                if part in before and part in after
                else "is gone"
                if part in before
                else "is new"
            )
            changes.append(Change(f"{name} {new[name]['from']}: {part} {how}"))
    return changes


def environment_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """One line per version that differs, and one for other devices."""
    versions, devices = before.get("versions", {}), before.get("devices", now["devices"])
    told = [
        f"started with {package} {versions[package]}, resumed with {version}"
        for package, version in now["versions"].items()
        if versions.get(package, version) != version
    ]
    if devices != now["devices"]:
        told.append(f"started on {'; '.join(devices)}, resumed on {'; '.join(now['devices'])}")
    return [Change(line, DIGITS) for line in told]


def environment() -> dict[str, Any]:
    """Versions, devices, command line and start time of this process, as JSON holds them."""
    import torch

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


def is_environment(value: object) -> bool:
    """Whether a value read from JSON has the shape of `environment`, with the resumptions beside it."""
    if not isinstance(value, dict):
        return False
    versions, devices = value.get("versions", {}), value.get("devices", [])
    return (
        isinstance(versions, dict)
        and isinstance(devices, list)
        and all(isinstance(device, str) for device in devices)
        and isinstance(value.get("resumed", []), list)
    )


def is_inputs(value: object) -> bool:
    """Whether a value read from JSON has the shape of inputs."""
    return isinstance(value, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("from"), str)
        and isinstance(entry.get("digests"), dict)
        and all(isinstance(digest, str) for digest in entry["digests"].values())
        for entry in value.values()
    )


def plain(value: Any) -> Any:
    """A value as JSON and YAML hold it: lists, string keys, plain numbers; NaN and infinities as None.

    Raises:
        DataError: there is something in it that neither holds.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return plain(value.item())
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise DataError(
        f"a record cannot hold a {type(value).__name__}; give numbers, strings, lists or mappings"
    )


def refused(changes: Sequence[Change]) -> list[str]:
    """The lines of those that make another run."""
    return [change.told for change in changes if change.follows is None and not change.free]


def told(changes: Sequence[Change]) -> Iterator[str]:
    """The lines of all but those that decide nothing."""
    return (change.note for change in changes if not change.free)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
