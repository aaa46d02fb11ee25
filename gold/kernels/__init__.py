"""Arrays and tensors only: sums of probabilities over token sets, chunk sums, byte tables.

Every back end holds the same function names: ``reference`` (plain torch, any device) and ``cpu`` (numba).
``backend_for`` says which one runs for a device; asking for one that cannot run there is an error.
"""

from types import ModuleType

import torch

from gold.errors import ConfigError
from gold.kernels import cpu, reference

BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu}


def backend_for(device: torch.device, name: str | None = None) -> ModuleType:
    """The back end for tensors on ``device``: numba on a CPU, plain torch elsewhere; or the one asked for.

    Raises:
        ConfigError: an unknown name, or a back end that does not run on this device.
    """
    if name is None:
        name = "cpu" if device.type == "cpu" else "reference"
    if name not in BACKENDS:
        raise ConfigError(f"unknown kernel back end {name!r}: choose one of {', '.join(sorted(BACKENDS))}")
    if name == "cpu" and device.type != "cpu":
        raise ConfigError(f"kernel back end 'cpu' cannot run on device {device}: choose 'reference'")
    return BACKENDS[name]
