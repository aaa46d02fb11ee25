"""Weights in fewer bits than they were trained in, without losing what small updates add up to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gold.models.language_model import LanguageModel


def file_dtype(model: LanguageModel) -> torch.dtype | None:
    """The dtype of the files that a model was loaded from, if it is narrower than the one in memory."""
    saved = model.saved_dtype
    return saved if saved is not None and saved.itemsize < model.lm.dtype.itemsize else None


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in a narrower dtype.

    From float32 to bfloat16 it is rounded up with the probability at which the mean is the weight itself, by a
    pseudo-random number that is a function of the weight's own bits: a weight has the same result wherever and in
    whichever shard it is. Weights that bfloat16 can represent, infinities and NaN are kept. Other dtypes take the
    nearest number.

    A weight that was bfloat16 and has moved by less than half the distance to the next such number, as most do at small
    learning rates, would be moved back by rounding to the nearest; on average over many weights this rounding keeps all
    of their movement.

    Source: stochastic rounding as in Gupta et al. 1502.02551, section 3, with a hash for its random numbers.
    """
    if dtype != torch.bfloat16 or weight.dtype != torch.float32:
        return weight.to(dtype)
    bits = weight.detach().contiguous().view(torch.int32)
    noise = bits * 0x2C1B3C6D  # products wrap
    noise = (noise ^ (noise >> 15)) * 0x297A2D39
    noise = (noise >> 9) & 0xFFFF
    up = ((bits + noise) & -0x10000).view(torch.float32)
    return torch.where(up.isfinite() & weight.isfinite(), up, weight).to(dtype)


def rounded(lm: Any, weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict of a model in main memory, its parameters ``in_dtype``; tied ones stay tied.

    Buffers keep their dtype, as do parameters that the architecture keeps in float32.
    """
    rounds = {name for name, _ in _narrowed(lm)}
    done: dict[tuple[int, torch.Size], Tensor] = {}
    found = {}
    for name, tensor in weights.items():
        place = tensor.data_ptr(), tensor.shape
        if place not in done:
            tensor = tensor.detach()
            done[place] = (in_dtype(tensor, dtype) if name in rounds else tensor).to("cpu")
        found[name] = done[place]
    return found


class AsInFile:
    """A context in which a model in memory has the weights that its file will have, as ``rounded``; then it has its own
    again, bit for bit, kept in main memory meanwhile."""

    def __init__(self, lm: Any, dtype: torch.dtype | None) -> None:
        self.lm, self.dtype = lm, dtype
        self._kept: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def __enter__(self) -> None:
        if self.dtype is None:
            return
        for weight in dict.fromkeys(weight for _, weight in _narrowed(self.lm)):
            own = weight.to_local() if isinstance(weight, DTensor) else weight.detach()
            self._kept.append((own, own.to("cpu", copy=True)))
            own.copy_(in_dtype(own, self.dtype))

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for own, kept in self._kept:
            own.copy_(kept)
        self._kept.clear()


def _narrowed(lm: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters that are rounded, tied ones under each of their names."""
    kept = {*(lm._keep_in_fp32_modules or ()), *(lm._keep_in_fp32_modules_strict or ())}
    for name, weight in lm.named_parameters(remove_duplicate=False):
        if weight.is_floating_point() and not kept & set(name.split(".")):
            yield name, weight
