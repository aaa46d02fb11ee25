"""The command line in processes that start at once: forked from one that has loaded torch and done nothing else."""

from __future__ import annotations

import errno
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

TIMED = ("_s", "tokens_per_s")
"""Ends of names of metrics that differ from run to run."""

# The server imports these once; a fresh interpreter would need ten seconds each time.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["gold.run", "gold.cli", "gold.demo.running_sums", "transformers.models.llama.modeling_llama"]
)


class Command:
    """``gold`` with arguments, in a process of its own; what it prints goes to files."""

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        words = [str(a) for a in arguments]
        self.process: ForkServerProcess = _CONTEXT.Process(
            target=_main, args=(folder, words, dict(environment or {}), before)
        )
        self.process.start()

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return _read(self.folder / "out")

    @property
    def err(self) -> str:
        """What it has printed on stderr so far."""
        return _read(self.folder / "err")

    def kill(self) -> None:
        """SIGKILL; a process that has ended already is left as it is."""
        self.process.kill()
        self.wait()

    def wait(self, seconds: float = 900.0) -> int:
        """The exit code; minus the signal's number where a signal ended it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {seconds} s:\n{self.out}\n{self.err}")
        return self.process.exitcode


def launch(
    folder: Path,
    *arguments: object,
    count: int = 2,
    before: Sequence[Any] = (),
    each: Sequence[str] = (),
) -> list[Command]:
    """The processes that `accelerate launch --cpu --num_processes 2` would start; ``each`` has one argument more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [
        Command(
            folder / str(rank),
            *arguments,
            *each[rank : rank + 1],
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            before=before[rank] if before else None,
        )
        for rank in range(count)
    ]


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a file of a run, without what took how long."""
    read = [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(TIMED)} for line in read]


def _main(
    folder: Path, words: list[str], environment: dict[str, str], before: Callable[[], None] | None
) -> None:
    os.environ.update(environment)
    for name, descriptor in (("out", 1), ("err", 2)):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    import torch

    torch.set_num_threads(1)
    import gold.run
    from gold.cli import main

    gold.run.plot_run = lambda _: []  # takes longer than the run
    sys.argv = ["gold", *words]
    if before is not None:
        before()
    main()


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def die_at(target: str, call: int = 1, after: bool = False) -> None:
    """From now on this process kills itself when ``module:name.of.function`` is called for the ``call``-th time, before
    or after the function has done its work."""
    owner, name = find(target)
    real = getattr(owner, name)
    calls = 0

    def dying(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls < call:
            return real(*arguments, **options)
        if after:
            real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a killed process goes on")

    setattr(owner, name, dying)


def signal_at(target: str, call: int, number: int) -> None:
    """From now on a signal reaches this process when ``module:name.of.function`` is called for the ``call``-th time."""
    owner, name = find(target)
    real = getattr(owner, name)
    calls = 0

    def signalled(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    setattr(owner, name, signalled)


def fail_at(target: str, call: int = 1) -> None:
    """From now on the ``call``-th and later calls of ``module:name.of.function`` find the disk full."""
    owner, name = find(target)
    real = getattr(owner, name)
    calls = 0

    def failing(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls < call:
            return real(*arguments, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    setattr(owner, name, failing)


def find(target: str) -> tuple[object, str]:
    """The owner and the name of ``module:name.of.function``."""
    module, _, path = target.partition(":")
    owner: object = importlib.import_module(module)
    *above, name = path.split(".")
    for part in above:
        owner = getattr(owner, part)
    return owner, name


def spoil_step(step: int) -> None:
    """From now on the loss of this process is NaN in the step after ``step`` steps."""
    import gold.train.step as module

    real = module.step_loss

    def spoiled(state: Any, *arguments: Any) -> Any:
        total, parts = real(state, *arguments)
        return total * (float("nan") if state.step == step else 1.0), parts

    module.step_loss = spoiled


def read_weights() -> None:
    """From now on the rollout engine of this process reads all weights pushed to it, and the first ones again."""
    from gold.rollout.hf import HuggingFaceEngine

    real = HuggingFaceEngine.push

    def push(self: HuggingFaceEngine, weights: Mapping[str, Any], version: int) -> None:
        for name in [*weights, *list(weights)[:2]]:
            assert type(weights[name]).__name__ in ("Tensor", "Parameter")
        real(self, weights, version)

    HuggingFaceEngine.push = push  # type: ignore[method-assign]


def both(one: Callable[[], None], other: Callable[[], None]) -> None:
    """Calls both."""
    one()
    other()


def expect_no_weights() -> None:
    """From now on a run of this process fails unless its models have no contents when it begins."""
    import gold.run

    real = gold.run.distill

    def distilled(student: Any, teachers: Any, *arguments: Any, **options: Any) -> Any:
        models = [student, *(t.model for t in teachers.members.values())]
        assert {p.device.type for model in models for p in model.lm.parameters()} == {"meta"}
        return real(student, teachers, *arguments, **options)

    gold.run.distill = distilled


def break_at(target: str) -> None:
    """From now on ``module:name.of.function`` raises an error that nobody expects."""
    owner, name = find(target)

    def broken(*arguments: object, **options: object) -> object:
        raise RuntimeError("nobody expects this")

    setattr(owner, name, broken)
