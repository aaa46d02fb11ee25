"""Sizes of a model and of its passes, from config.json alone: counted on a model without data, nothing is loaded.

Parameters are counted on torch's meta device. Passes run on fake tensors, which have shapes and no numbers, while every
allocation is followed: attention, norms and mixed precision are the model's own. Layers are alike, so two models of few
layers are run, and what a layer adds is multiplied.
"""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from gold.errors import ModelError
from gold.models.adapters import add_adapters
from gold.models.hidden_states import recompute_activations, states_only
from gold.models.language_model import LanguageModel, backbone

_FEW = 2, 4
"""Layers of the models that are run."""
_NOT_SIZES = (
    *("model_type", "architectures", "auto_map", "quantization_config", "transformers_version"),
    *("dtype", "torch_dtype", "_name_or_path", "attn_implementation"),
)


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of parameters, tied ones once.

    ``matrices``: those of linear layers except the output matrix, which quantization holds in fewer bits. ``table``:
    those of the embeddings, ``head``: those of the output matrix (0 if tied). ``layer``: the largest layer.
    """

    parameters: int
    matrices: int
    table: int
    head: int
    layer: int
    layers: int
    hidden: int
    rows: int

    @property
    def output(self) -> int:
        """Parameters of the output matrix, tied or not."""
        return self.hidden * self.rows


@dataclass(frozen=True)
class Adapters:
    """LoRA of a student."""

    rank: int
    targets: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pass:
    """Bytes of a forward pass, and of the backward pass after it, without weights and their gradients.

    ``held``: at the end of the forward pass, where the loss is computed (without gradient: the states, and the cache).
    ``forward``, ``backward``: the most at any time of either. ``casts``: of ``held``, 16-bit copies of weights that
    autocast makes.
    """

    held: int
    forward: int
    backward: int = 0
    casts: int = 0


@lru_cache(maxsize=16)
def _sizes(config: _Frozen) -> ModelSizes:
    with torch.device("meta"):
        lm = _model(config.settings)
    layers = [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer)]
    table, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    linear = [m for m in lm.modules() if isinstance(m, nn.Linear) and m is not head]
    rows, hidden = table.weight.shape
    return ModelSizes(
        parameters=sum(p.numel() for p in lm.parameters()),
        matrices=sum(m.weight.numel() for m in linear),
        table=table.weight.numel(),
        head=0 if head is None or head.weight is table.weight else head.weight.numel(),
        layer=max((sum(p.numel() for p in m.parameters()) for m in layers), default=0),
        layers=len(layers),
        hidden=hidden,
        rows=rows if head is None else head.weight.shape[0],
    )


def model_sizes(config: Mapping[str, Any]) -> ModelSizes:
    """The numbers of parameters of the model of a config.json (its text part).

    Raises:
        ModelError: transformers has no model of that kind, or cannot build it from these settings.
    """
    with _as_model_error("its config.json"):
        return _sizes(_Frozen(config))


def trained_parameters(config: Mapping[str, Any], adapters: Adapters) -> int:
    """The number of weights of adapters on the model of a config.json.

    Raises:
        ModelError: as ``model_sizes``; or no layer has the name of a target.
    """
    with _as_model_error("adapters on its config.json"):
        counts = [_trained(_Frozen(_shortened(config, layers)), adapters) for layers in _few(config)]
        return _extended(counts, config)


@lru_cache(maxsize=64)
def _trained(config: _Frozen, adapters: Adapters) -> int:
    with torch.device("meta"):
        lm = _adapted(_model(config.settings), adapters)
    return sum(p.numel() for p in lm.parameters() if p.requires_grad)


def training_pass(
    config: Mapping[str, Any],
    sequences: int,
    tokens: int,
    *,
    dtype: str = "float32",
    autocast: bool = False,
    checkpointing: bool = False,
    adapters: Adapters | None = None,
) -> Pass:
    """Bytes of a forward and backward pass over padded sequences, from the embeddings to the last states, in one
    process that has all weights.

    Raises:
        ModelError: the model cannot be built, or its pass depends on numbers.
    """
    key = sequences, tokens, dtype, autocast, checkpointing, adapters
    with _as_model_error("a training pass of its config.json"):
        return _of_all_layers(config, partial(_training_pass, key))


def reading_pass(
    config: Mapping[str, Any],
    sequences: int,
    tokens: int,
    *,
    dtype: str = "float32",
    autocast: bool = False,
    cache: bool = False,
) -> Pass:
    """Bytes of a forward pass without gradient; with ``cache``, that keeps keys and values for generation.

    Raises:
        ModelError: as ``training_pass``.
    """
    key = sequences, tokens, dtype, autocast, cache
    with _as_model_error("a pass of its config.json"):
        return _of_all_layers(config, partial(_reading_pass, key))


# Passes


@lru_cache(maxsize=256)
def _training_pass(key: tuple[Any, ...], config: _Frozen) -> Pass:
    sequences, tokens, dtype, autocast, checkpointing, adapters = key
    with _fake_model(config, dtype, adapters) as lm:
        if checkpointing:
            recompute_activations(lm)
        if adapters is None:
            # The table's gradient is as large as many layers, and would hide what each of them adds.
            table = lm.get_input_embeddings()
            table.register_forward_hook(lambda _, __, out: torch.zeros_like(out).requires_grad_())
        for weight in lm.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(_drop_gradient)
        live = _Live(lm)
        with live:
            with _autocast(autocast):
                total = _states(lm, sequences, tokens).sum()
                held, forward, casts = live.held, live.peak, live.casts
            live.peak = 0
            total.backward()
        return Pass(held, forward, live.peak, casts)


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None


@lru_cache(maxsize=256)
def _reading_pass(key: tuple[Any, ...], config: _Frozen) -> Pass:
    sequences, tokens, dtype, autocast, cache = key
    with _fake_model(config, dtype, None) as lm, torch.no_grad():
        live = _Live(lm)
        with live, _autocast(autocast):
            output = _states(lm, sequences, tokens, cache)
            found = Pass(live.held, live.peak, casts=live.casts)
        del output
        return found


def _states(lm: Any, sequences: int, tokens: int, cache: bool = False) -> Any:
    """The last states; with ``cache``, the cache alone."""
    ids = torch.zeros(sequences, tokens, dtype=torch.int64)
    with states_only(lm):
        output = backbone(lm)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=cache)
    return output.past_key_values if cache else output.last_hidden_state


class _Live(TorchDispatchMode):
    """Follows the bytes of all tensors that are made inside it, until they are freed."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = self.casts = 0
        self._known = {t.untyped_storage()._cdata for t in (*lm.parameters(), *lm.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        cast_of_weight = func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), cast_of_weight)
        return out

    def _add(self, storage: Any, cast_of_weight: bool) -> None:
        if (key := storage._cdata) in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.held += size
        self.casts += size * cast_of_weight
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._freed, key, size, cast_of_weight)

    def _freed(self, key: int, size: int, cast_of_weight: bool) -> None:
        self._known.discard(key)
        self.held -= size
        self.casts -= size * cast_of_weight


# Models without data


class _Frozen:
    """A config.json that can be a key of a cache."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings, self._key = settings, repr(sorted(settings.items(), key=lambda item: item[0]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _model(settings: Mapping[str, Any], dtype: str = "float32") -> Any:
    kind = settings.get("model_type")
    if not isinstance(kind, str):
        raise ModelError("it names no model_type")
    known = {name: value for name, value in settings.items() if name not in _NOT_SIZES}
    config = AutoConfig.for_model(kind, **copy.deepcopy(known))
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


@contextmanager
def _fake_model(config: _Frozen, dtype: str, adapters: Adapters | None) -> Iterator[Any]:
    with torch.device("meta"):
        lm = _model(config.settings, dtype)
        lm = lm if adapters is None else _adapted(lm, adapters)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made: dict[int, Any] = {}
        for module in lm.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and tensor.is_meta:
                        if id(tensor) not in made:
                            made[id(tensor)] = _on_cpu(tensor)
                        held[name] = made[id(tensor)]
        yield lm


def _on_cpu(tensor: Tensor) -> Tensor:
    fake = torch.empty_like(tensor, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _adapted(lm: Any, adapters: Adapters) -> Any:
    model = LanguageModel("its config.json", lm, None, cast(Any, None))
    return add_adapters(
        model, rank=adapters.rank, targets=adapters.targets, modules_to_save=adapters.modules_to_save
    ).lm


def _autocast(wanted: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if wanted else nullcontext()


def _of_all_layers(config: Mapping[str, Any], run: Callable[[_Frozen], Pass]) -> Pass:
    found = [run(_Frozen(_shortened(config, layers))) for layers in _few(config)]
    return Pass(
        *(_extended([getattr(p, n) for p in found], config) for n in ("held", "forward", "backward", "casts"))
    )


def _few(config: Mapping[str, Any]) -> list[int]:
    """Numbers of layers to run: all, if they are few."""
    layers = _layers(config)
    return [layers] if layers <= _FEW[1] else list(_FEW)


def _extended(values: list[int], config: Mapping[str, Any]) -> int:
    """The value for all layers, from those of few."""
    if len(values) == 1:
        return values[0]
    each = (values[1] - values[0]) / (_FEW[1] - _FEW[0])
    return round(values[0] + each * (_layers(config) - _FEW[0]))


def _layers(config: Mapping[str, Any]) -> int:
    value = config.get("num_hidden_layers", config.get("n_layer"))
    if type(value) is not int or value < 1:
        raise ModelError("it gives no num_hidden_layers")
    return value


def _shortened(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The configuration of a model with fewer layers."""
    total = _layers(config)
    short = {k: v[:layers] if isinstance(v, list) and len(v) == total else v for k, v in config.items()}
    return short | {"num_hidden_layers" if "num_hidden_layers" in config else "n_layer": layers}


@contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    """Any error as one line, and no warnings of libraries about models that are never used."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        log = logging.getLogger("transformers")
        level = log.level
        stack.callback(log.setLevel, level)
        log.setLevel(logging.ERROR)
        try:
            yield
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise ModelError(f"{what}: {reason}") from error
