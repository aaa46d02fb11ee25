"""Whether what is published works: the archives are built, looked into, installed, and used as the README says.

    python -m benchmarks release                              # with this Python, in a new environment
    python -m benchmarks release --python python3.12 --python python3.13
    python -m benchmarks release --environment FOLDER         # in an environment that has the dependencies already

The wheel is installed into an empty environment with the versions of constraints.txt, in a folder whose name has
spaces, and the commands run there with two tiny models, from a working directory outside of the checkout. Everything
comes from the package registry, torch too: where that has no build for CPUs, one with CUDA of several gigabytes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.record import RESULTS, command_line, device_name, write_record

ROOT = Path(__file__).resolve().parent.parent
# What a source archive must hold, by the beginning of a path, and what must not be in any archive.
IN_SOURCES = (
    *("gold/cli.py", "tests/test_cli.py", "tests/support/", "docs/", "benchmarks/", "configs/", "examples/"),
    *("data/", "LICENSE", "README.md", "CONTRIBUTING.md", "constraints.txt", "pyproject.toml", "Makefile"),
)
IN_WHEEL = ("gold/cli.py", "gold/py.typed", "gold/starters/", "gold/kernels/", "gold_distill-")
NOWHERE = ("assets/", "runs/", ".venv", "shared/")
_MODELS = """
import sys
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from gold.demo.models import SPECIAL, tiny_model
from gold.models.load import save_model

for seed, (name, size) in enumerate((("student", 300), ("teacher", 400))):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the other weather is better than the last, said the brother"], trainer)
    model = tiny_model(tokenizer, name, layers=1, width=32, seed=seed)
    model.lm.config.max_position_embeddings = 2048
    save_model(model, Path(sys.argv[1]) / name)
"""


@dataclass(frozen=True)
class Ran:
    """A command that was run as a user runs it."""

    command: str
    seconds: float
    status: int


def main(arguments: Sequence[str]) -> int:
    """Checks what would be published; exit status 1 if something is missing or a command fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks release", description=__doc__)
    parser.add_argument("--python", action="append", metavar="EXE", help="interpreter; repeatable")
    parser.add_argument("--environment", metavar="FOLDER", help="an environment with the dependencies")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/release.json")
    given = parser.parse_args(list(arguments))
    began, found, faults = time.perf_counter(), [], []
    with tempfile.TemporaryDirectory(prefix="release of gold ") as folder:
        place = Path(folder)
        archives = build(place)
        for archive in archives:
            names = names_in(archive)
            print(f"{archive.name}: {len(names)} files, {archive.stat().st_size / 1e6:.1f} MB")
            faults += [f"{archive.name}: {fault}" for fault in missing(archive.name, names)]
        wheel = next(archive for archive in archives if archive.suffix == ".whl")
        pythons = given.python or ([] if given.environment else [sys.executable])
        environments = [*pythons, *([given.environment] if given.environment else [])]
        for number, name in enumerate(environments):
            ready = Path(name).resolve() if name == given.environment else None
            python = install(wheel, name, ready, place / f"environment {number}")
            version = _output(python, "import platform; print(platform.python_version())")
            print(f"Python {version}")
            ran = list(walk(python, place / f"work place {number}"))
            found.append({"python": version, "commands": [asdict(each) for each in ran]})
            faults += [
                f"Python {version}: {each.command}: exit status {each.status}" for each in ran if each.status
            ]
    for fault in faults:
        print(f"fault: {fault}")
    if given.record:
        command = command_line("release", arguments)
        seconds = time.perf_counter() - began
        print(write_record("release", {"faults": faults, "runs": found}, command=command, seconds=seconds,
                           device=device_name(), folder=RESULTS))  # fmt: skip
    return 1 if faults else 0


def build(place: Path) -> list[Path]:
    """The source archive and the wheel, built from the checkout by the build backend alone."""
    tools = _environment(sys.executable, place / "tools")
    _call(tools, "-m", "pip", "install", "--quiet", "build")
    _call(tools, "-m", "build", "--outdir", str(place / "dist"), str(ROOT))
    return sorted((place / "dist").iterdir())


def names_in(archive: Path) -> list[str]:
    """The paths of the files in an archive, those of a source archive without its own folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.namelist()
    with tarfile.open(archive) as sources:
        return [member.name.partition("/")[2] for member in sources.getmembers() if member.isfile()]


def missing(archive: str, names: Sequence[str]) -> list[str]:
    """What an archive lacks or must not hold, in words."""
    wanted = IN_WHEEL if archive.endswith(".whl") else IN_SOURCES
    lacking = [f"has no {start}" for start in wanted if not any(name.startswith(start) for name in names)]
    return lacking + [f"holds {name}" for name in names if name.startswith(NOWHERE)]


def install(wheel: Path, python: str, ready: Path | None, place: Path) -> Path:
    """The interpreter of an environment with the wheel: a new one with its dependencies, or the one that is ready."""
    if ready is not None:
        found = ready / "bin" / "python"
        _call(found, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel))
        return found
    found = _environment(python, place)
    _call(found, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(wheel))
    return found


def walk(python: Path, place: Path) -> Iterator[Ran]:
    """Runs the README's commands one after another in a new folder, until one fails."""
    place.mkdir()
    _call(python, "-c", _MODELS, "models", cwd=place)
    few = ["train.steps=1", "train.prompts_per_step=2", "rollout.max_new_tokens=8", "evaluate.prompts=2"]
    pair, chat = ["--student", "models/student", "--teacher", "models/teacher"], place / "a chat"
    commands: list[tuple[Path, list[str]]] = [
        (place, ["--version"]),
        (place, ["--help"]),
        (place, ["objectives"]),
        (place, ["align", *pair, "hello, world"]),
        (place, ["init", "chat", "a chat", *pair]),
        (chat, ["doctor", "run.yaml"]),
        (chat, ["train", "run.yaml", *few]),
        (chat, ["train", "run.yaml", *few, "train.seed=1", "output=runs/second"]),
        (chat, ["report", "runs/first"]),
        (chat, ["compare", "runs/first", "runs/second"]),
        (chat, ["chat", "runs/first", "--prompt", "Hello", "--max-new-tokens", "4"]),
        (chat, ["eval", "runs/first"]),
    ]
    for folder, arguments in commands:
        began = time.perf_counter()
        done = subprocess.run(
            [python.parent / "gold", *arguments],
            cwd=folder,
            env=_clean(),
            capture_output=True,
            text=True,
            check=False,
        )
        ran = Ran(f"gold {' '.join(arguments)}", round(time.perf_counter() - began, 2), done.returncode)
        print(f"  {ran.seconds:6.1f} s  {ran.command}")
        yield ran
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
            return


def _environment(python: str, place: Path) -> Path:
    subprocess.run([python, "-m", "venv", str(place)], check=True)
    return place / "bin" / "python"


def _clean() -> dict[str, str]:
    """This process's environment without what leads to the checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def _call(python: Path, *arguments: str, cwd: Path | None = None) -> None:
    subprocess.run([python, *arguments], cwd=cwd or ROOT.parent, env=_clean(), check=True)


def _output(python: Path, code: str) -> str:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
