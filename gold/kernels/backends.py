"""Kernel dispatch: numba on a CPU, Triton on a CUDA device, plain torch elsewhere.

Every back end implements the functions of ``reference`` under the same names. The functions here call the back end for
the device of their first argument.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from gold.errors import ConfigError
from gold.kernels import reference

P = ParamSpec("P")
R = TypeVar("R")

_MODULES = {"cpu": "gold.kernels.cpu", "cuda": "gold.kernels.triton", "reference": "gold.kernels.reference"}
_FORCED: ContextVar[str | None] = ContextVar("kernel back end", default=None)


class _Backends(Mapping[str, ModuleType]):
    """Back ends by name, imported on first use: importing a compiler is slow."""

    def __getitem__(self, name: str) -> ModuleType:
        return import_module(_MODULES[name])

    def __contains__(self, name: object) -> bool:
        return name in _MODULES

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


BACKENDS = _Backends()


def backend_for(device: torch.device) -> ModuleType:
    """The back end for tensors on a device: the one forced by ``use_backend``, else the fastest that runs there.

    Raises:
        ConfigError: the forced back end does not run on this device.
    """
    name = _FORCED.get()
    if name is None:
        usable = device.type in BACKENDS and not why_not(device.type, device)
        return BACKENDS[device.type if usable else "reference"]
    if fact := why_not(name, device):
        raise ConfigError(f"kernel back end {name!r} cannot run on {device}: {fact}; choose 'reference'")
    return BACKENDS[name]


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the context, in this thread, forces the back end ``name`` (for tests); None: no forcing.

    Raises:
        ConfigError: an unknown name.
    """
    if name is not None and name not in BACKENDS:
        raise ConfigError(f"unknown kernel back end {name!r}: choose one of {', '.join(BACKENDS)}")
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


def why_not(name: str, device: torch.device) -> str | None:
    """The reason why a back end does not run on tensors of a device; None if it does."""
    if name == "cpu" and device.type != "cpu":
        return "it is for CPUs"
    if name == "cuda":
        if find_spec("triton") is None:
            return "it needs triton, which is not installed (pip install triton)"
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if device.type != "cuda" and not interpreted:
            return "it is for CUDA devices (TRITON_INTERPRET=1 runs it on CPUs, slowly, for tests)"
    return None


def kernel_for(device: torch.device, definition: Callable[P, R]) -> Callable[P, R]:
    """The function of the back end for a device that implements ``definition``, a function of ``reference``; for loops,
    and for work that autograd repeats later, outside of ``use_backend``."""
    function: Callable[P, R] = getattr(backend_for(device), definition.__name__)
    return function


def _dispatched(definition: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    @wraps(definition)
    def entry(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return kernel_for(first.device, definition)(first, *args, **kwargs)

    return entry


byte_masses = _dispatched(reference.byte_masses)
row_statistics = _dispatched(reference.row_statistics)
row_divergence = _dispatched(reference.row_divergence)
hybrid_distance = _dispatched(reference.hybrid_distance)
sorted_l1 = _dispatched(reference.sorted_l1)
piece_masses = _dispatched(reference.piece_masses)
segment_logsumexp = _dispatched(reference.segment_logsumexp)
chunk_sums = _dispatched(reference.chunk_sums)
