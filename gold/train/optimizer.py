"""AdamW on float32 copies of weights that have 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gold.errors import CheckpointError, ConfigError

_MASTERS = "masters"


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose steps are not lost in the rounding of bfloat16.

    A bfloat16 weight has 8 significant bits: a step of less than 1/512 of it changes nothing, and at a learning rate of
    1e-5 hardly any weight moves. Such weights have a float32 copy, a master: a step is taken on the masters and rounded
    into the model, and moments are float32 too. Weights of 32 bits and more are stepped on themselves. The masters
    begin at the model's weights when the optimizer is made, and are part of its state.

    Bytes for each trained weight: 16 in float32 (weight, gradient, two moments), and in bfloat16 (2 + 2 + 4 + 8; during
    a step 2 more, for a float32 gradient). A step of masters takes the gradients away.

    Raises:
        ConfigError: a float16 weight. Its gradients underflow below 6e-8.

    Source: Micikevicius et al. 1710.03740, section 3.1.
    """

    def __init__(self, weights: Iterable[Tensor], **options: Any) -> None:
        self.trained = list(weights)
        if any(w.dtype == torch.float16 for w in self.trained):
            raise ConfigError(
                "student.dtype: float16 cannot be trained, its gradients underflow; choose float32 or bfloat16"
            )
        self.masters: dict[Tensor, Tensor] = {
            w: w.detach().float() for w in self.trained if w.dtype == torch.bfloat16
        }
        super().__init__([self.masters.get(w, w) for w in self.trained], **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step on the gradients of the model's weights."""
        for weight, master in self.masters.items():
            master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
        super().step(closure)
        for weight, master in self.masters.items():
            weight.copy_(master)
            master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of the model's weights."""
        for weight in self.trained:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, with the masters in the order of their weights."""
        return {**super().state_dict(), _MASTERS: list(self.masters.values())}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes a state over, bit for bit; the model's own weights are not touched.

        Raises:
            CheckpointError: it is of weights of another dtype.
        """
        state = dict(state_dict)
        masters = state.pop(_MASTERS, [])
        if len(masters) != len(self.masters):
            raise CheckpointError(
                f"it has float32 copies of {len(masters)} weights, and the student has {len(self.masters)} of 16 bits: "
                "student.dtype is another, or the run is of an older version; start anew"
            )
        super().load_state_dict(state)
        for own, saved in zip(self.masters.values(), masters, strict=True):
            own.copy_(saved)
