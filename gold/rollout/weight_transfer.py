"""How the student's weights reach a vLLM server: by file, or with vLLM's own transfer engines (nccl, ipc)."""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import secrets
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from gold.errors import ConfigError, EngineError, GoldError
from gold.http import Call, Server, is_near

_DEV_MODE = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"
SHARED_MEMORY = Path("/dev/shm")


class SyncClient:
    """vLLM's calls for weight updates, as its trainer engines expect them (``VLLMWeightSyncClient``).

    No call is repeated by itself: after a failure the whole update is begun again.
    """

    def __init__(self, server: Server, backend: str) -> None:
        self.server, self.backend, self.weight_version = server, backend, ""

    def post(self, path: str, **body: Any) -> Any:
        """The answer of the server; EngineError if there is none."""
        advice = {404: _DEV_MODE}
        # The server's own error is more exact than a second attempt in the middle of an update.
        call = Call(path, body, lambda answer: answer, advice=advice, retried=False)
        return self.server.ask([call])[0]

    def get(self, path: str) -> Any:
        """The answer of the server; EngineError if there is none."""
        call = Call(path, {}, lambda answer: answer, advice={404: _DEV_MODE}, method="GET")
        return self.server.ask([call])[0]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connects the workers with the trainer."""
        try:
            self.post("/init_weight_transfer_engine", init_info=init_info)
        except EngineError as error:
            if "answers 500" not in str(error):
                raise
            raise EngineError(
                f'{error}; start it with --weight-transfer-config \'{{"backend": "{self.backend}"}}\''
                + (
                    " and --worker-extension-cls gold.rollout.vllm_extension.WorkerExtension"
                    if self.backend == FileTransfer.backend
                    else ""
                )
            ) from error

    def start_weight_update(self) -> None:
        """Begins an update; one that was begun and not finished is ended first."""
        try:
            self.post("/start_weight_update")
        except EngineError:
            self.post("/finish_weight_update")
            self.post("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Has the workers receive weights."""
        several = isinstance(update_info, list)
        infos = [_as_json(info) for info in (update_info if isinstance(update_info, list) else [update_info])]
        self.post("/update_weights", update_info=infos if several else infos[0])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Ends an update, and names the weights."""
        self.post("/finish_weight_update", weight_version=weight_version or self.weight_version)

    def shutdown_weight_transfer_engine(self) -> None:
        """Disconnects the workers."""
        self.post("/shutdown_weight_transfer_engine")


def _as_json(info: Mapping[str, Any]) -> dict[str, Any]:
    """An update as JSON: handles of GPU memory are pickled, as vLLM's own client does."""
    handles = info.get("ipc_handles")
    if handles is None:
        return dict(info)
    rest = {name: value for name, value in info.items() if name != "ipc_handles"}
    return rest | {"ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode()}


def _own_address(url: str) -> tuple[str, int]:
    """The address of this machine as a server sees it, and a free port."""
    host = urlsplit(url).hostname or "localhost"
    address = "127.0.0.1"
    if not is_near(url):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
            probe.connect((host, 9))
            address = probe.getsockname()[0]
    with socket.create_server((address, 0)) as free:
        return address, free.getsockname()[1]


@contextlib.contextmanager
def _errors_of(backend: str) -> Iterator[None]:
    """Converts any error of vLLM's engines to one line."""
    try:
        yield
    except GoldError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise EngineError(f"weights could not be sent with {backend}: {reason}") from error


class WeightTransfer(Protocol):
    """Brings weights into a paused server."""

    backend: str
    """The name in vLLM's ``--weight-transfer-config``."""

    def connect(self, client: SyncClient) -> None:
        """Connects with the server's workers; called before the first ``send`` and after one that failed."""
        ...

    def send(self, client: SyncClient, weights: Mapping[str, Tensor]) -> None:
        """A whole update: starts it, sends all weights, finishes it."""
        ...

    def disconnect(self, client: SyncClient) -> None:
        """Frees what ``connect`` made; the server may be gone."""
        ...


def near_folder() -> Path:
    """Shared memory, or the folder for temporary files where there is none."""
    return SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())


class FileTransfer:
    """Weights as a safetensors file in a folder that the server reads too; default: shared memory, else the folder for
    temporary files. ``gold.rollout.vllm_extension`` is its side of vLLM's workers."""

    backend = "gold_file"

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else near_folder()
        self.is_given = folder is not None

    def connect(self, client: SyncClient) -> None:
        """See ``WeightTransfer.connect``."""
        if not self.is_given and not is_near(client.server.url):
            raise EngineError(
                f"server {client.server.url}: it is on another machine, and cannot read {self.folder} here; name a "
                "folder that both can open in rollout.engine.vllm.folder, or use transfer: nccl"
            )
        client.init_weight_transfer_engine({})

    def send(self, client: SyncClient, weights: Mapping[str, Tensor]) -> None:
        """See ``WeightTransfer.send``."""
        # A new file each time: workers may still map the last one into memory.
        path = self.folder / f"gold-{os.getpid()}-{secrets.token_hex(6)}.safetensors"
        try:
            save(weights, path)
            client.start_weight_update()
            client.update_weights({"path": str(path.absolute())})
            client.finish_weight_update()
        finally:
            path.unlink(missing_ok=True)

    def disconnect(self, client: SyncClient) -> None:
        """See ``WeightTransfer.disconnect``."""


def save(weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes weights as a safetensors file that only this user can read; tied ones under each of their names.

    Raises:
        EngineError: the folder does not exist, or is full.
    """
    from safetensors.torch import save_file

    seen: set[int] = set()
    copies = {}
    for name, weight in weights.items():
        copy = weight.detach().cpu().contiguous()
        if copy.untyped_storage().data_ptr() in seen:  # the format has no shared tensors
            copy = copy.clone()
        seen.add(copy.untyped_storage().data_ptr())
        copies[name] = copy
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        save_file(copies, path)
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise EngineError(
            f"weights cannot be written to {path}: {reason}; name another folder in rollout.engine.vllm.folder"
        ) from error


class _Meta(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource:
    """The weights of the current push, in the form of vLLM's ``WeightSource``: metadata, and pairs in the same order.
    Unlike vLLM's ``ModuleSource`` it has tied matrices under each of their names."""

    def __init__(self) -> None:
        self.weights: Mapping[str, Tensor] = {}

    def metadata(self) -> list[_Meta]:
        """Name, dtype and shape of each weight."""
        return [_Meta(name, weight.dtype, tuple(weight.shape)) for name, weight in self.weights.items()]

    def held_names(self) -> None:
        """None: all of them."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, weight.detach()) for name, weight in self.weights.items())


class OwnTransfer:
    """vLLM's own trainer engines on GPUs, driven by vLLM's own code, which must be installed here too: ``nccl`` for a
    server on other GPUs than the trainer's, ``ipc`` for one on the same GPU."""

    def __init__(self, backend: str) -> None:
        self.backend, self._source = backend, WeightSource()
        self._engine: Any = None

    def connect(self, client: SyncClient) -> None:
        """See ``WeightTransfer.connect``."""
        try:
            from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise ConfigError(
                f"rollout.engine.vllm.transfer: {self.backend} needs vLLM beside the trainer too ({error}): pip "
                "install 'gold-distill[vllm]', or use transfer: file"
            ) from error
        info: Any
        if self.backend == "ipc":
            info = IPCTrainerInitInfo(rank=0)
        else:
            workers = client.get("/get_world_size")["world_size"]
            address, port = _own_address(client.server.url)
            info = NCCLTrainerInitInfo(
                master_address=address, master_port=port, world_size=workers + 1, rank=0
            )
        with _errors_of(self.backend):
            self._engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._source)

    def send(self, client: SyncClient, weights: Mapping[str, Tensor]) -> None:
        """See ``WeightTransfer.send``."""
        assert self._engine is not None
        self._source.weights = weights
        try:
            with _errors_of(self.backend):
                self._engine.send_weights()
        finally:
            self._source.weights = {}

    def disconnect(self, client: SyncClient) -> None:
        """See ``WeightTransfer.disconnect``."""
        engine, self._engine = self._engine, None
        if engine is not None:
            with _errors_of(self.backend):
                engine.shutdown()
            client.shutdown_weight_transfer_engine()


def transfer_of(name: str, folder: str | Path | None = None) -> WeightTransfer:
    """The transfer of that name: file, nccl or ipc.

    Raises:
        ConfigError: an unknown name.
    """
    if name == "file":
        return FileTransfer(folder)
    if name not in ("nccl", "ipc"):
        raise ConfigError(f"transfer: expected file, nccl or ipc, got {name!r}")
    return OwnTransfer(name)
