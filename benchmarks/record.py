"""How a measurement is kept: one JSON file with what was run, on what, when, for how long, and what came out."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import gold

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "tokenizers", "numba")


def command_line(name: str, arguments: Sequence[str]) -> str:
    """The command of a benchmark, but for the folders of its record and of its finished runs."""
    kept = list(arguments)
    for option in ("--into", "--folder"):
        if option in kept:
            at = kept.index(option)
            del kept[at : at + 2]
    return " ".join(["python -m benchmarks", name, *kept])


def write_record(
    name: str, data: Mapping[str, Any], *, command: str, seconds: float, device: str, folder: Path = RESULTS
) -> Path:
    """Path of the record, `folder`/`name`.json, which replaces an older one of that name as a whole.

    ``command`` is what a reader types at the root of a checkout to measure again. ``device`` is where the work ran:
    `device_name` gives it.

    Raises:
        ValueError: a name that is no plain file name, or data that JSON cannot hold, not-a-number included.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise ValueError(f"record name {name!r}: use lower-case letters, digits, '.', '_' and '-'")
    record = {
        "name": name,
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seconds": round(seconds, 3),
        "device": device,
        "versions": versions(),
        "data": data,
    }
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    half = folder / f".{name}.json.{os.getpid()}"
    half.write_text(text, encoding="utf-8")
    half.replace(path)
    return path


def versions() -> dict[str, str]:
    """Versions that a measurement depends on, by name; a package that is not installed is `absent`."""
    found = {"python": platform.python_version(), "gold": gold.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def device_name(kind: str = "cpu", threads: int | None = None) -> str:
    """What did the work: the GPU's name for `cuda`, else the processor's, with the number of threads if given."""
    if kind.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(torch.device(kind))
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        name = models[0].strip() if models else name
    return f"{name}, {threads} thread{'s' if threads != 1 else ''}" if threads else name
