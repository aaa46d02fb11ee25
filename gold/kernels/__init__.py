"""Arrays and tensors only: sums of probabilities over token sets, chunk sums, byte tables.

Every back end holds the same function names: ``reference`` (plain torch, any device), ``cpu`` (numba) and ``cuda``
(Triton). ``backend_for`` says which one runs for a device; asking for one that cannot run there is an error.
"""

import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from gold.errors import ConfigError


class _Backends(Mapping[str, ModuleType]):
    """Back ends by name, each loaded when it is asked for: compilers take their time."""

    def __getitem__(self, name: str) -> ModuleType:
        if name not in self:
            raise KeyError(name)
        return import_module(f"gold.kernels.{name}")

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)

    def __iter__(self) -> Iterator[str]:
        return iter(("cpu", "cuda", "reference"))

    def __len__(self) -> int:
        return 3


BACKENDS = _Backends()


def backend_for(device: torch.device, name: str | None = None) -> ModuleType:
    """The back end for tensors on ``device``, or the one asked for: numba on a CPU, Triton on a CUDA device where it is
    installed, plain torch elsewhere.

    Raises:
        ConfigError: an unknown name, or a back end that does not run on this device.
    """
    if name is None:
        name = device.type if device.type in BACKENDS and not why_not(device.type, device) else "reference"
    if name not in BACKENDS:
        raise ConfigError(f"unknown kernel back end {name!r}: choose one of {', '.join(BACKENDS)}")
    if fact := why_not(name, device):
        raise ConfigError(f"kernel back end {name!r} cannot run on {device}: {fact}; choose 'reference'")
    return BACKENDS[name]


def why_not(name: str, device: torch.device) -> str | None:
    """Why a back end does not run on tensors of a device; None if it does."""
    if name == "cpu" and device.type != "cpu":
        return "it is for CPUs"
    if name == "cuda":
        if find_spec("triton") is None:
            return "it needs triton, which is not installed (pip install triton)"
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if device.type != "cuda" and not interpreted:
            return "it is for CUDA devices (TRITON_INTERPRET=1 runs it on CPUs, slowly, for tests)"
    return None
