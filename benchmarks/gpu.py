"""`python -m benchmarks gpu`: on a machine with a GPU, its tests, `loss` and `step`, in one call of nine minutes.

Every part runs in a process of its own that is told when to begin nothing new, and is stopped some time after that;
what it had recorded by then is kept. The tables come last. TRL and Liger are measured where they are installed beside
this package.

    python -m benchmarks gpu                  # records in benchmarks/results
    python -m benchmarks gpu --into FOLDER    # or in another folder, with what each part has printed
    python -m benchmarks gpu --dry            # the same code with tiny sizes on a CPU; keeps no record
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from benchmarks.record import RESULTS

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 40
"""How long after its time a part is stopped: what it does by then may still end."""
MARK = "mark.gpu"
TOKENIZERS = ("smollm2-135m-instruct", "llama3_1", "qwen3", "gemma3")


@dataclass(frozen=True)
class Part:
    """What runs, and how long. ``told``: it takes its time as an option, ``--budget``."""

    name: str
    arguments: tuple[str, ...]
    budget_s: int
    told: bool = True


def parts_of(dry: bool, into: Path) -> list[Part]:
    """All parts; together with what they may be late under nine minutes."""
    # Reading all the other tests would take longer than these.
    marked = [
        str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text("utf-8")
    ]
    tests = [Part("tests", ("-m", "pytest", "-q", "-m", "gpu", *marked), 110, told=False)] if marked else []
    kept = ("--record", "--into", str(into))
    if not dry:
        return [
            *tests,
            Part("loss", ("-m", "benchmarks", "loss", "--device", "cuda", "--limit", "10", *kept), 190),
            Part("step", ("-m", "benchmarks", "step", "--device", "cuda", *kept), 110),
        ]
    few = ("--pairs", "3", "--tokens", "16", "--hidden", "16", "--rounds", "1", "--seconds", "1")
    tiny = ("--prompts", "2", "--new-tokens", "6", "--steps", "1", "--layers", "1")
    return [
        *tests,
        Part("loss", ("-m", "benchmarks", "loss", "--device", "cpu", *few, *kept), 190),
        Part("step", ("-m", "benchmarks", "step", "--device", "cpu", "--pairs", "1", *tiny, *kept), 110),
    ]


def main(arguments: Sequence[str]) -> int:
    """Exit status: 1 where a part fails or is stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, nothing recorded")
    parser.add_argument("--into", type=Path, help="folder for the records")
    given = parser.parse_args(list(arguments))
    if problem := missing(given.dry):
        parser.exit(1, f"error: {problem}\n")
    with tempfile.TemporaryDirectory() as scratch:
        into = given.into or (Path(scratch) if given.dry else RESULTS)
        logs = given.into or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        ended = [run_part(part, logs / f"gpu-{part.name}.log") for part in parts_of(given.dry, into)]
        for one in ended:
            print(f"\n{'=' * 20} {one.part.name}: {one.says}, {one.seconds:.0f} s\n\n{one.printed()}")
        records = sorted(path for path in into.glob("*.json") if path.stat().st_mtime >= STARTED)
        print("\n" + "\n".join(f"recorded: {path}" for path in records))
    return int(any(one.says != "done" for one in ended))


STARTED = time.time()


def missing(dry: bool) -> str:
    """What this machine lacks, in a line; empty where there is all that is needed."""
    try:
        torch = import_module("torch")
        for name in ("benchmarks.loss", "benchmarks.step", "pytest"):
            import_module(name)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed; the GPU benchmarks need the package's requirements and pytest"
    if not dry and not torch.cuda.is_available():
        return "torch sees no GPU on this machine; --dry tries the same code on a CPU"
    assets = import_module("benchmarks.assets")
    for name in TOKENIZERS:
        try:
            assets.tokenizer_path(name)
        except assets.AssetError as error:
            return str(error)
    return ""


@dataclass(frozen=True)
class Ended:
    """How a part ended: `done`, with which status it failed, or that it was stopped."""

    part: Part
    says: str
    seconds: float
    log: Path

    def printed(self) -> str:
        """What it has printed: of tests the end."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join(lines[-15:] if self.part.name == "tests" else lines)


def run_part(part: Part, log: Path) -> Ended:
    """Runs one part to its end, or until its time and ``GRACE_S`` are over."""
    budget = ("--budget", str(part.budget_s)) if part.told else ()
    started = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *part.arguments, *budget],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            status = process.wait(part.budget_s + GRACE_S)
            # Nothing that is marked so: no test has failed.
            says = "done" if status == 0 or (part.name == "tests" and status == 5) else f"failed ({status})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            says = "stopped"
    seconds = time.monotonic() - started
    print(f"{part.name}: {says}, {seconds:.0f} s", flush=True)
    return Ended(part, says, seconds, log)
