"""AdamW on float32 master copies of 16-bit weights, with moments of 32 or 8 bits; see ``optimizer_of``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from gold.errors import CheckpointError, ConfigError

Kind = Literal["adamw", "adamw8bit"]
_MASTERS = "masters"


class _WithMasters(torch.optim.Optimizer):
    """An optimizer whose updates are not lost in bfloat16 rounding, mixed into one that computes them.

    A bfloat16 weight has 8 significant bits: an update of less than 1/512 of it changes nothing, and at a learning rate
    of 1e-5 hardly any weight moves. Such weights have a float32 copy, a master: an update is applied to the masters and
    rounded into the model, and moments are float32 too. Weights of 32 bits and more are updated directly. The masters
    are copied from the model when the optimizer is created, and are part of its state.

    Bytes for each trained weight: 16 in float32 (weight, gradient, two moments), and in bfloat16 (2 + 2 + 4 + 8; during
    a step 2 more, for a float32 gradient); with moments of 8 bits 6 less. A step with masters clears the gradients.

    Raises:
        ConfigError: a float16 weight. Its gradients underflow below 6e-8.

    Source: Micikevicius et al. 1710.03740, section 3.1.
    """

    moment: str
    """Name of the first moment in the state of a weight."""

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
        """One optimizer step from the gradients of the model's weights."""
        for weight, master in self.masters.items():
            master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
        super().step(closure)
        for weight, master in self.masters.items():
            weight.copy_(master)
            master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the model's weights."""
        for weight in self.trained:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, with the masters in the order of their weights."""
        return {**super().state_dict(), _MASTERS: list(self.masters.values())}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state, bit for bit; the model's own weights are unchanged.

        Raises:
            CheckpointError: it is for weights of another dtype, or of another kind of optimizer.
        """
        state = dict(state_dict)
        masters = state.pop(_MASTERS, [])
        if len(masters) != len(self.masters):
            raise CheckpointError(
                f"it has float32 copies of {len(masters)} weights, and the student has {len(self.masters)} of 16 bits: "
                "student.dtype is another, or the run is of an older version; start anew"
            )
        names = {name for kept in state["state"].values() for name in kept}
        for kept in state["state"].values():  # bitsandbytes saves the moments in a dictionary within
            names.update(name for inner in kept.values() if isinstance(inner, dict) for name in inner)
        if names and self.moment not in names:
            raise CheckpointError("it has the moments of another optimizer: train.optimizer is another")
        super().load_state_dict(state)
        for own, saved in zip(self.masters.values(), masters, strict=True):
            own.copy_(saved)


class MasterAdamW(_WithMasters, torch.optim.AdamW):
    """torch's AdamW, which has float32 moments for float32 weights."""

    moment = "exp_avg"


def optimizer_of(kind: Kind, weights: Iterable[Tensor], **options: Any) -> _WithMasters:
    """The optimizer of that name for the weights; both decay weights in the same way.

    ``adamw8bit`` keeps the two moments in 8 bits, in blocks of 256 with a common scale; of weights with fewer than
    4,096 elements in 32 bits.

    Raises:
        ConfigError: bitsandbytes is not installed; see also ``MasterAdamW``.

    Source: Dettmers et al. 2110.02861.
    """
    if kind == "adamw":
        return MasterAdamW(weights, **options, fused=True)
    check_installed(kind)
    import bitsandbytes

    optimizers: Any = bitsandbytes.optim
    of_8_bits: Any = type("MasterAdamW8bit", (_WithMasters, optimizers.AdamW8bit), {"moment": "state1"})
    found: _WithMasters = of_8_bits(weights, **options)
    return found


def check_installed(kind: Kind) -> None:
    """Checks that the package of an optimizer is installed.

    Raises:
        ConfigError: it is not.
    """
    if kind == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "train.optimizer: adamw8bit needs bitsandbytes: pip install 'gold-distill[quantization]', or set it to "
            "adamw"
        )
