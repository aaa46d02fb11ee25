"""A vLLM server that gold starts for a run, in a process of its own, which ends with the run however that ends."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gold.activity import doing, report
from gold.errors import EngineError
from gold.http import Call
from gold.rollout import weight_transfer
from gold.rollout.engine import Generation, Request
from gold.rollout.vllm import VLLMEngine

# Between gold and vLLM, so that vLLM ends also where gold is killed, and leaves no files: its standard input ends then.
# The server has processes of its own, which are in its group.
_WATCH = """
import contextlib, os, shutil, signal, subprocess, sys, threading
folder, *words = sys.argv[1:]
child = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
def end_with_parent():
    sys.stdin.buffer.read()
    child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
threading.Thread(target=end_with_parent, daemon=True).start()
code = child.wait()
with contextlib.suppress(ProcessLookupError):
    os.killpg(child.pid, signal.SIGKILL)
shutil.rmtree(folder, ignore_errors=True)
os._exit(code & 255)
"""
_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
}
_CPU_DEFAULTS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
_EXTENSION = "gold_vllm_extension"
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that --max-lora-rank takes."""
_ENDS_IN_S = 30.0


@dataclass(frozen=True)
class ServerCommand:
    """How a server is started: with which interpreter, for which model folder or Hub id, and further ``arguments`` of
    vLLM's. ``context`` is the longest sequence in tokens; None: the model's own. ``lora_rank``: the largest
    rank of adapters that it takes."""

    model: str
    python: str = sys.executable
    dtype: str = "auto"
    context: int | None = None
    sleeps: bool = False
    trust_remote_code: bool = False
    lora_rank: int | None = None
    revision: str | None = None
    arguments: Sequence[str] = ()

    def words(self, name: str, port: int, backend: str) -> list[str]:
        """The command; the server is reached from this machine alone."""
        words = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
        words += [] if self.revision is None else ["--revision", self.revision]
        words += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
        words += ["--dtype", self.dtype, "--generation-config", "vllm", "--enable-scale-out"]
        words += ["--logprobs-mode", "processed_logprobs"]
        words += ["--weight-transfer-config", f'{{"backend": "{backend}"}}']
        if backend == weight_transfer.FileTransfer.backend:
            words += ["--worker-extension-cls", f"{_EXTENSION}.WorkerExtension"]
        if self.context is not None:
            words += ["--max-model-len", str(self.context)]
        words += ["--enable-sleep-mode"] * self.sleeps + ["--trust-remote-code"] * self.trust_remote_code
        if self.lora_rank is not None:
            rank = next((rank for rank in _LORA_RANKS if rank >= self.lora_rank), self.lora_rank)
            words += ["--enable-lora", "--max-lora-rank", str(rank)]
        return [*words, *self.arguments]


class ColocatedEngine(VLLMEngine):
    """A ``VLLMEngine`` on a server of its own on this machine, which it starts at its first use and ends in ``close``.

    ``log``: the file for what the server prints; default: a temporary one, which is kept if the server fails.
    ``options`` are those of ``VLLMEngine``.
    """

    def __init__(
        self, command: ServerCommand, *, log: str | Path | None = None, start_s: float = 900.0, **options: Any
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        super().__init__(f"http://127.0.0.1:{self.port}", **options)
        self.command, self.start_s = command, start_s
        self.folder = Path(tempfile.mkdtemp(prefix="gold-vllm-", dir=weight_transfer.near_folder()))
        if self._folder is None:  # so that a run that is killed in a push leaves no weights
            self._folder = self.folder
            if isinstance(self.transfer, weight_transfer.FileTransfer):
                self.transfer.folder = self.folder
        own = Path(tempfile.gettempdir()) / f"gold-vllm-{os.getpid()}-{self.port}.log"
        self.log = Path(log) if log is not None else own
        self._own_log: Path | None = None if log is not None else own
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the server and waits until it answers.

        Raises:
            EngineError: it ends before it does, or takes more than ``start_s``.
        """
        if self.process is not None:
            return
        # A copy, since vLLM's environment may have no gold, and must not find the other packages of this one.
        source = Path(weight_transfer.__file__).with_name("vllm_extension.py")
        shutil.copy(source, self.folder / f"{_EXTENSION}.py")
        paths = [str(self.folder), os.environ.get("PYTHONPATH", "")]
        environment = {**_CPU_DEFAULTS, **os.environ, **_ENVIRONMENT}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if self.transfer.backend == "ipc":
            environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        words = self.command.words(self.model, self.port, self.transfer.backend)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _WATCH, str(self.folder), *words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for gold, which then ends it
            )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + self.start_s
        call = Call("/v1/models", {}, lambda answer: answer, method="GET", retried=False)
        with doing("starting vLLM"):
            while time.monotonic() < deadline:
                report(0, 0, "")  # a connection that is refused reports nothing
                self._check_alive()
                with contextlib.suppress(EngineError):
                    self.server.ask([call])
                    return
                time.sleep(0.2)
        self._own_log = None
        self.close()
        raise EngineError(
            f"vLLM does not answer {self.start_s:.0f} s after it was started; its log is {self.log}"
        )

    def _check_alive(self) -> None:
        if self.process is not None and (code := self.process.poll()) is not None:
            self._own_log = None
            raise EngineError(
                f"vLLM ended with exit code {code}: {_last_error(self.log)}; its log is {self.log}"
            )

    def learn_context(self) -> int:
        """See ``VLLMEngine.learn_context``."""
        self.start()
        return super().learn_context()

    def push(self, weights: Mapping[str, Tensor], version: int) -> None:
        """See ``VLLMEngine.push``."""
        self.start()
        with self._death_named():
            super().push(weights, version)

    def push_adapter(self, weights: Mapping[str, Tensor], version: int, config: Mapping[str, Any]) -> None:
        """See ``AdapterEngine.push_adapter``."""
        self.start()
        with self._death_named():
            super().push_adapter(weights, version, config)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """See ``VLLMEngine.generate``."""
        with self._death_named():
            return super().generate(requests)

    @contextlib.contextmanager
    def _death_named(self) -> Any:
        """An error of a server that has ended says so."""
        try:
            yield
        except EngineError:
            self._check_alive()
            raise

    def close(self) -> None:
        """Ends the server, and removes its temporary files."""
        process, self.process = self.process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(_ENDS_IN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._connected = False
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._own_log is not None:
            self._own_log.unlink(missing_ok=True)


def _last_error(log: Path) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w*(Error|Exception): |No module named|error: ", line)]
    line = (errors or lines or ["it printed nothing"])[-1]
    return line if len(line) <= 300 else f"{line[:299]}…"
