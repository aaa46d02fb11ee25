"""Last hidden states of a causal model on padded texts, and logits computed from them on demand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from gold.errors import ModelError
from gold.kernels.logits import HeadLogits, LazyLogits, SummedWeight, leaf_of, linear
from gold.models.language_model import backbone, output_matrix, output_width, without_adapters
from gold.models.packing import packed_pass
from gold.models.padding import PaddedStates

_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def lazy_logits(lm: Any, states: PaddedStates) -> LazyLogits:
    """The model's logits at the chosen positions: one forward pass now, the output matrix on demand."""
    more = {} if states.position_ids is None else {"position_ids": states.position_ids}
    with states_only(lm), packed_pass(states.lengths) as packed:
        output = backbone(lm)(
            input_ids=states.input_ids,
            attention_mask=states.attention_mask,
            use_cache=False,
            **more,
            **packed,
        )
    hidden = output.last_hidden_state.to(
        states.input_ids.device
    )  # of layers on several devices, the last one's
    return head_logits(lm, hidden[states.sequence, states.position])


class StatesModule(nn.Module):
    """A causal model whose forward pass passes its states to a function and returns the function's result.

    The loss is computed inside ``forward``, so that wrappers which shard or reduce parameters see every use of the
    output matrix.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, states: PaddedStates, then: Callable[[LazyLogits], Any]) -> Any:
        """``then(lazy_logits(lm, states))``."""
        return then(lazy_logits(self.lm, states))


@contextlib.contextmanager
def states_only(lm: Any) -> Iterator[None]:
    """A context in which the model returns only its states, and no optional outputs of its configuration.

    An auxiliary loss of its routers, for example, fails if a mask is longer than the tokens.
    """
    wanted = {"output_router_logits": False, "output_hidden_states": False, "return_dict": True}
    config = without_adapters(lm).config
    text_config = config.get_text_config()
    changed = []
    for each in (config,) if text_config is config else (config, text_config):
        for name, value in wanted.items():
            if getattr(each, name, value) != value:
                changed.append((each, name, getattr(each, name)))
                setattr(each, name, value)
    try:
        yield
    finally:
        for each, name, value in changed:
            setattr(each, name, value)


class _Head:
    """The output matrix of a model, then its scale and soft cap: hidden states → logits."""

    def __init__(self, lm: Any) -> None:
        model = without_adapters(lm)
        config = model.config.get_text_config()
        self.matrix = output_matrix(lm)
        self.trained = {name: p for name, p in self.matrix.named_parameters() if p.requires_grad}
        self.cap = next(filter(None, (getattr(config, name, None) for name in _SOFT_CAPS)), None)
        self.multiply = getattr(config, "logit_scale", None)
        self.divide = getattr(config, "logits_scaling", None)

    def __call__(self, hidden: Tensor, *weights: Tensor | SummedWeight) -> Tensor:
        """The logits, with ``weights`` in place of the trained parameters of the matrix, if given."""
        given = dict(zip(self.trained, weights, strict=True)) if weights else {}
        if "weight" in given and type(self.matrix) is nn.Linear:
            return self.finish(linear(hidden, given["weight"], given.get("bias", self.matrix.bias)))
        tensors = {name: leaf_of(weight) for name, weight in given.items()}
        logits = functional_call(self.matrix, tensors, (hidden,)) if given else self.matrix(hidden)
        return self.finish(logits.to(hidden.device))

    def finish(self, logits: Tensor) -> Tensor:
        out = None if torch.is_grad_enabled() else logits  # without gradient: no memory for a second copy
        if self.multiply:
            logits = torch.mul(logits, self.multiply, out=out)
        if self.divide:
            logits = torch.div(logits, self.divide, out=out)
        if self.cap:
            logits = torch.div(logits, self.cap, out=out)
            logits = torch.mul(torch.tanh(logits, out=out), self.cap, out=out)
        return logits

    def into(self, hidden: Tensor, out: Tensor) -> Tensor:
        across = self.matrix.weight.T
        if self.matrix.bias is None:
            return self.finish(torch.mm(hidden, across, out=out))
        return self.finish(torch.addmm(self.matrix.bias, hidden, across, out=out))

    def reordered(self, columns: Tensor) -> Callable[[Tensor], Tensor]:
        weight = self.matrix.weight[columns]
        bias = None if self.matrix.bias is None else self.matrix.bias[columns]
        return lambda hidden: self.finish(functional.linear(hidden, weight, bias))


def head_logits(lm: Any, hidden_ND: Tensor) -> LazyLogits:
    """Rows with exactly the model's own logits: last hidden states, output matrix, then scale and soft cap."""
    head = _Head(lm)
    matrix = head.matrix
    # A weight sharded over processes is complete only while its module runs.
    plain = type(matrix) is nn.Linear and not head.trained and not hasattr(matrix, "_hf_hook")
    here = plain and type(matrix.weight.data) is Tensor and matrix.weight.device == hidden_ND.device
    reusing = here and matrix.weight.dtype == hidden_ND.dtype and not torch.is_autocast_enabled("cpu")
    return HeadLogits(
        hidden_ND,
        head,
        output_width(lm),
        weights=tuple(head.trained.values()),
        reordered=head.reordered if here else None,
        into=head.into if reusing and hidden_ND.device.type == "cpu" else None,
    )


def decoder_layers(lm: Any) -> list[nn.Module]:
    """The model's repeated layers, of nested ones the outermost; empty for an architecture that does not mark them."""
    inside: set[nn.Module] = set()
    layers: list[nn.Module] = []
    for layer in without_adapters(lm).modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer not in inside:
            inside.update(layer.modules())
            layers.append(layer)
    return layers


def recompute_activations(lm: Any) -> None:
    """Enables activation checkpointing in the model's layers: less memory, more time.

    It does not use transformers' own switch, which works only in train mode, where dropout is active.

    Raises:
        ModelError: it has no layers that support this.
    """
    layers = decoder_layers(lm)
    for layer in layers:
        own = layer.forward
        if not (isinstance(own, partial) and own.func is _recomputed):
            layer.forward = partial(_recomputed, own)
    if not layers:
        raise ModelError(
            f"train.gradient_checkpointing: {type(without_adapters(lm)).__name__} has no layers whose activations can "
            "be recomputed; set it to false"
        )


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
