"""vLLM's side of weight transfer through a file: vLLM's workers load it with ``--worker-extension-cls``.

It imports torch, safetensors and vLLM only, so that vLLM's own environment needs no other package of gold's, and this
file can be copied there under any name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

BACKEND = "gold_file"
"""The value of ``backend`` in vLLM's ``--weight-transfer-config``."""


@dataclass
class FileInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing has to be agreed on."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The safetensors file with the new weights, by their names in a checkpoint."""

    path: str


class FileTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):  # type: ignore[misc]
    """Loads weights from a safetensors file, as a checkpoint is loaded, into the running model."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo
    supports_draft_weight_update = False
    _begun = False

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Does nothing: a file needs no connection."""

    def start_weight_update(self) -> None:
        """Prepares every layer to be loaded again. An update that was begun and not finished is ended first: its layers
        would count their new weights twice."""
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        if self._begun:
            finalize_layerwise_reload(self.model, self.model_config)
        self._begun = True
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Loads the file."""
        with safe_open(update_info.path, framework="pt", device="cpu") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def finish_weight_update(self) -> None:
        """Finishes the layers."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        self._begun = False

    def shutdown(self) -> None:
        """Does nothing."""


class WorkerExtension:
    """Adds nothing to a worker: naming it in ``--worker-extension-cls`` loads this module there, which registers the
    back end before the worker asks for it."""


def _register(factory: Any) -> None:
    if BACKEND not in factory._registry:
        factory.register_engine(BACKEND, FileTransferEngine)


_register(WeightTransferEngineFactory)
