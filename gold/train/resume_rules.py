"""Comparison of a run's settings and inputs with those at resumption.

A change is *free* (it affects no result of the run), *noted* (the run continues with a note), or *refused* (the next
steps would not be those of the original run).
"""

import contextlib
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from gold.errors import ConfigError
from gold.files import plain
from gold.version import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "numba", "numpy")

Inputs = Mapping[str, Mapping[str, Any]]
"""Inputs of a run by name ("student", "training prompts"): `from`, the location, and `digests` by part."""

_DIGITS = "results may differ in their last digits"
_SCHEDULE = "the learning rate goes on along the schedule of the new number"
_MEASURED = "evaluations before and after are not over the same completions"
# Key patterns, of a configuration and of a run from Python, with the note on a change; None: the change is free. The
# folder's location affects no result, nor does the access to a teacher's server or cache.
MAY_CHANGE: dict[str, str | None] = {
    "output": None,
    "push_to_hub*": None,
    "data.heldout_share": None,  # of a run whose held-out prompts have their own file or task
    "teacher*.cache.path": None,
    "rollout.completions": None,
    **{f"teacher*.served.{key}": None for key in ("url", "concurrency", "timeout_s", "retries", "key_env")},
    **{
        f"rollout.engine.vllm.{key}": None
        for key in (
            *("url", "model", "transfer", "folder", "concurrency", "timeout_s", "retries", "key_env"),
            *("adapters", "sleep", "python", "context", "arguments"),
        )
    },
    "rollout.engine.vllm*": "other completions from the same seed",
    "teacher*.cache.missing": "",
    "train.checkpoint_every": "",
    "train.keep_last": "",
    "train.doctor": "",
    "train.trackers*": "",
    "evaluate.every": "",
    "evaluate.samples": "",
    "evaluate.prompts": _MEASURED,
    "evaluate.num_generations": _MEASURED,
    "evaluate.branches": "",
    "evaluate.micro_batch_size": _DIGITS,
    "evaluate.micro_batch_tokens": _DIGITS,
    "teacher*.batch_tokens": _DIGITS,
    # Other batch sizes change the order of summation.
    "rollout.generation_batch_size": _DIGITS,
    "recipe.generation_batch_size": _DIGITS,
    **{
        f"{section}.{key}": note
        for section in ("train", "recipe")
        for key, note in (
            ("steps", _SCHEDULE),
            ("bad_steps_allowed", ""),
            ("micro_batch_size", _DIGITS),
            ("micro_batch_tokens", _DIGITS),
            ("packing", _DIGITS),
            ("gradient_checkpointing", _DIGITS),
            ("sharding", _DIGITS),
            ("gradient_sync", _DIGITS),
        )
    },
    **{f"{side}.trust_remote_code": "" for side in ("student", "teacher*")},
    **{
        f"{side}.{key}": _DIGITS
        for side in ("student", "teacher*")
        for key in ("device", "attn_implementation")
    },
    "teacher*.device_map": _DIGITS,
}
# Keys that earlier versions did not have, with the value, as JSON, by which they acted.
_LATER = {
    f"{section}.{key}": value
    for sections, key, value in (
        ("data recipe", "order", '"shuffled"'),
        ("data", "map", "{}"),
        ("data", "streaming", "false"),
        ("rollout recipe", "policy", '"live"'),
        ("rollout recipe", "staleness", "0"),
        ("rollout recipe", "importance_cap", "2.0"),
        ("rollout recipe", "cut", '"keep"'),
        ("rollout recipe", "thinking", '"compare"'),
        ("train recipe", "sharding", '"none"'),
        ("train recipe", "gradient_sync", '"microbatch"'),
        ("train recipe", "optimizer", '"adamw"'),
        ("train recipe", "packing", "false"),
    )
    for section in sections.split()
}
# Keys of input locations with the input's name, if that is not the key itself: contents are compared, so files may
# move.
_PLACES = {
    **{
        f"data.{key}": "training prompts"
        for key in ("prompts", "map", "split", "subset", "revision", "streaming")
    },
    **{
        f"data.{key}": "held-out prompts"
        for key in ("heldout", "heldout_split", "heldout_subset", "heldout_map")
    },
}
_OF_PLACE = re.compile(r"^(data\.\w*map)\..*|(.*)\.(path|revision)$")


@dataclass(frozen=True)
class Change:
    """A difference in one line, and its consequence for the run."""

    text: str
    kind: Literal["free", "noted", "refused"]


def changes(
    old: Mapping[str, Any], new: Mapping[str, Any], old_inputs: Inputs, new_inputs: Inputs
) -> list[Change]:
    """One `optimizer.lr was 1e-05, is 2e-05` per dotted key of a configuration that differs, and one line per part of
    an input whose contents differ; inputs that only one side has are not compared."""
    flat_old, flat_new = flattened(plain(old)), flattened(plain(new))
    found = []
    for key in [*flat_old, *(key for key in flat_new if key not in flat_old)]:
        before, after = (
            json.dumps(flat[key], ensure_ascii=False) if key in flat else "not set"
            for flat in (flat_old, flat_new)
        )
        later = {before, after} == {"null", "not set"} or (before == "not set" and after == _LATER.get(key))
        if before != after and not later:
            text = f"{key} was {before}, is {after}"
            if key in _splits(flat_new):
                found.append(Change(f"{text}: other prompts would be held out", "refused"))
            else:
                found.append(_config_change(key, text, old_inputs))
    for name in [name for name in old_inputs if name in new_inputs]:
        had, has = old_inputs[name]["digests"], new_inputs[name]["digests"]
        for part in [*had, *(part for part in has if part not in had)]:
            if had.get(part) != has.get(part):
                how = "is new" if part not in had else "is gone" if part not in has else "has changed"
                found.append(Change(f"{name} {new_inputs[name]['from']}: {part} {how}", "refused"))
    return found


def _splits(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that decide which prompts are held out; of a flat configuration."""
    own = any(config.get(f"data.{key}") is not None for key in ("heldout", "heldout_split"))
    if own or not isinstance(config.get("data.prompts"), str):
        return ()
    share = "data.heldout_share"
    return (share, "evaluate.prompts") if config.get(share) is None else (share,)


def _config_change(key: str, text: str, inputs: Inputs) -> Change:
    for pattern, note in MAY_CHANGE.items():
        if fnmatchcase(key, pattern):
            return Change(f"{text}: {note}" if note else text, "free" if note is None else "noted")
    place = _OF_PLACE.sub(r"\1\2", key) if key not in _PLACES else key
    if _PLACES.get(place, place) in inputs:
        return Change(f"{text}: its content is compared", "noted")
    return Change(text, "refused")


def refuse_changes(found: Sequence[Change], folder: Path) -> None:
    """Checks that no change is refused.

    Raises:
        ConfigError: some are; it names each.
    """
    if lines := [change.text for change in found if change.kind == "refused"]:
        raise ConfigError(
            f"{folder} was started with another configuration or other inputs: {'; '.join(lines)}; resume with "
            "the old ones, give a new output, or go on all the same (--allow-changed)"
        )


def environment_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line per version that differs, and one for other devices."""
    versions, devices = before.get("versions", {}), before.get("devices", now["devices"])
    lines = [
        f"started with {package} {versions[package]}, resumed with {version}: {_DIGITS}"
        for package, version in now["versions"].items()
        if versions.get(package, version) != version
    ]
    if devices != now["devices"]:
        lines.append(f"started on {'; '.join(devices)}, resumed on {'; '.join(now['devices'])}: {_DIGITS}")
    return lines


def environment() -> dict[str, Any]:
    """Versions, devices, command line and start time of this process, as a JSON object."""
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
    """Whether a value read from JSON has the shape of `environment`, with the list `resumed`."""
    if not isinstance(value, dict):
        return False
    devices = value.get("devices", [])
    return (
        isinstance(value.get("versions", {}), dict)
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


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key: {"a": {"b": 1}, "c": [{"d": 2}]} → {"a.b": 1, "c[0].d": 2}."""
    if isinstance(value, dict) and value:
        below = {f"{prefix}.{key}" if prefix else key: entry for key, entry in value.items()}
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        below = {f"{prefix}[{place}]": entry for place, entry in enumerate(value)}
    else:
        return {prefix: value}
    return {key: leaf for start, entry in below.items() for key, leaf in flattened(entry, start).items()}
