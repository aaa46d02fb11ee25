"""Weights of a sharded model that the first process alone has read (``LanguageModel.shards_on``): each process gets its
part of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gold.models.first_process import is_first


@dataclass(frozen=True)
class _Place:
    """A parameter or buffer, and the modules that have it: several, where weights are tied."""

    owners: list[tuple[nn.Module, str]]
    is_buffer: bool

    @property
    def tensor(self) -> Tensor:
        owner, name = self.owners[0]
        found = owner._buffers[name] if self.is_buffer else owner._parameters[name]
        assert found is not None
        return found

    def put(self, tensor: Tensor) -> None:
        for owner, name in self.owners:
            if self.is_buffer:
                owner._buffers[name] = tensor
            else:
                owner._parameters[name] = tensor  # type: ignore[assignment]


@contextlib.contextmanager
def arriving(model: nn.Module, device: torch.device, group: dist.ProcessGroup) -> Iterator[None]:
    """A context in which a model is sharded whose weights the first process has in main memory and no other has. At
    its end they are on ``device``: of each weight the part of this process, or all of one that is not sharded.

    One weight at a time is whole there. All processes enter it.
    """
    places = _places(model)
    # Sharding moves the first process's own, and frees what belongs to others.
    held = [place.tensor.detach() if is_first() else None for place in places]
    shapes = [(place.tensor.shape, place.tensor.dtype) for place in places]
    yield
    for number, (place, (shape, dtype)) in enumerate(zip(places, shapes, strict=True)):
        source, held[number] = held[number], None
        whole = torch.empty(shape, dtype=dtype, device=device) if source is None else source.to(device)
        whole = whole.contiguous()
        dist.broadcast(whole.reshape(-1).view(torch.uint8), src=0, group=group)  # any type of number
        now = place.tensor
        if isinstance(now, DTensor):
            if now.device.type == "meta":
                part = distribute_tensor(whole, now.device_mesh, now.placements, src_data_rank=None)
                place.put(nn.Parameter(part.clone(), requires_grad=now.requires_grad))
        elif place.is_buffer:
            place.put(whole)
        elif now.device != device:
            place.put(nn.Parameter(whole, requires_grad=now.requires_grad))


def _places(model: nn.Module) -> list[_Place]:
    found: dict[int, _Place] = {}
    for owner in model.modules():
        for is_buffer, tensors in ((False, owner._parameters), (True, owner._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    found.setdefault(id(tensor), _Place([], is_buffer)).owners.append((owner, name))
    return list(found.values())
