"""Adapters of a model (peft): adding, loading, saving and merging them. Only this module knows peft.

An adapted model is a ``PeftModel`` around the transformers model, whose layers it has replaced. Its trained weights are
those of the active adapter and the copies of ``modules_to_save``; the base model's own weights are frozen.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gold.errors import ModelError, did_you_mean
from gold.files import ADAPTER_CONFIG
from gold.hub_names import split_revision
from gold.models.files import ADAPTER_WEIGHTS, first_line
from gold.models.language_model import LanguageModel, saved_module, without_adapters
from gold.models.quantization import dense_weight, is_quantized_layer, quantization_of, shared_state


def check_installed() -> None:
    """Checks that adapters can be used.

    Raises:
        ModelError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise ModelError("adapters need peft: pip install 'gold-distill[lora]'")


def is_adapted(lm: Any) -> bool:
    """True for a model that peft has wrapped."""
    return hasattr(lm, "get_base_model") and hasattr(lm, "peft_config")


def check_adapters(lm: Any, name: str) -> None:
    """Checks that a model's adapters, if it has any, can be trained and merged.

    Raises:
        ModelError: adapters that are not peft's own wrapper, that add tokens instead of weights, several at once, or
            that are merged already.
    """
    if getattr(lm, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"model {name}: transformers has put adapters into it itself; wrap the plain model with "
            "peft.get_peft_model, or load the adapter's folder with gold.load_model"
        )
    if not is_adapted(lm):
        return
    active = lm.active_adapter
    if not isinstance(active, str):
        raise ModelError(f"model {name}: {len(active)} adapters are active; choose one with set_adapter")
    if lm.peft_config[active].is_prompt_learning:
        kind = lm.peft_config[active].peft_type.value
        raise ModelError(
            f"model {name}: {kind} adds virtual tokens before a text, which the loss does not see; use adapters of "
            "weights, such as LoRA"
        )
    layers = [m for m in lm.modules() if _is_tuner_layer(m)]
    if any(layer.merged for layer in layers):
        raise ModelError(f"model {name}: its adapter is merged already; call unmerge_adapter() first")
    if quantization_of(lm) and not all(_is_plain_lora(layer) for layer in layers):
        raise ModelError(f"model {name}: only plain LoRA can be merged into quantized weights")


def add_adapters(
    model: LanguageModel,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    targets: Sequence[str] | None = None,
    modules_to_save: Sequence[str] = (),
    seed: int = 0,
    base: str | None = None,
) -> LanguageModel:
    """The model with new low-rank adapters, which alone are trained: a matrix W computes W + alpha / rank · B A.

    B is 0, so that nothing changes yet; A is drawn with ``seed``. The model's layers are changed in place. Adapters on
    16-bit weights are float32. ``targets``: names of layers, by default every linear layer except the output matrix;
    ``modules_to_save``: names of modules whose own weights are trained too. Where the output matrix is the table of
    embeddings, either name trains them as one; an adapter on one of them is its alone, and unties them when merged.
    ``base``: the location that the saved adapters name
    as their base model.

    Raises:
        ModelError: peft is not installed, the model has adapters already, or no layer has such a name.

    Source: Hu et al. 2106.09685, section 4.
    """
    check_installed()
    if is_adapted(model.lm):
        raise ModelError(f"model {model.name}: it has adapters already, which are trained: leave lora out")
    from peft import LoraConfig, get_peft_model

    _check_names(model, "targets", targets or ())
    _check_names(model, "modules_to_save", modules_to_save)
    kept = {name.rpartition(".")[2] for name in modules_to_save}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number works
        target_modules=list(targets) if targets is not None else "all-linear",
        modules_to_save=list(modules_to_save) or None,
        ensure_weight_tying=bool(kept & _tied_names(model.lm)),
    )
    with _as_model_error(f"model {model.name}: its adapters"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = get_peft_model(model.lm, config)
    lm.peft_config[lm.active_adapter].base_model_name_or_path = _lasting(base or model.name)
    return replace(model, lm=lm.eval())


def load_adapters(lm: Any, folder: str, base: str, name: str) -> Any:
    """The model with the adapters of a folder or Hub id, to be trained further or used.

    Raises:
        ModelError: peft is not installed, or they do not fit.
    """
    check_installed()
    from peft import PeftModel

    with _as_model_error(f"model {name}: its adapters for {base}"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            place, revision = split_revision(folder)
            named: dict[str, Any] = {} if revision is None else {"revision": revision}
            adapted = PeftModel.from_pretrained(lm, place, is_trainable=True, **named)
        if missing := [w for w in caught if "missing adapter keys" in str(w.message)]:
            raise ValueError(first_line(missing[0].message))  # type: ignore[arg-type]
    adapted.peft_config[adapted.active_adapter].base_model_name_or_path = _lasting(base)
    check_adapters(adapted, name)
    return adapted.eval()


# State


def adapter_state(lm: Any) -> dict[str, Tensor]:
    """The adapter's weights by peft's names, sharing the model's memory."""
    from peft import get_peft_model_state_dict

    # Otherwise peft asks the Hub whether the vocabulary was extended.
    found = get_peft_model_state_dict(
        lm, _tensors_of(lm), adapter_name=lm.active_adapter, save_embedding_layers=False
    )
    return {name: tensor.detach() for name, tensor in found.items()}


def adapter_parameters(lm: Any) -> set[nn.Parameter]:
    """The parameters of the adapter, trained or not; none for a model without one."""
    if not is_adapted(lm):
        return set()
    held = {tensor.data_ptr() for tensor in adapter_state(lm).values()}
    return {p for p in lm.parameters() if p.data_ptr() in held}


def check_trained(lm: Any, name: str) -> None:
    """Checks a student: quantized weights have adapters, and an adapter holds all weights that are trained, each once.

    Raises:
        ModelError: quantized weights without an adapter; a trained weight beside it, which would not be saved; two
            trained weights that share memory, and have a gradient each.
    """
    if not is_adapted(lm):
        if (kind := quantization_of(lm)) is not None:
            raise ModelError(
                f"model {name}: its weights are quantized ({kind}) and cannot be trained; train adapters on them "
                "(student.lora={}, or gold.models.adapters.add_adapters)"
            )
        return
    places = [p.data_ptr() for p in lm.parameters() if p.requires_grad]
    if len(set(places)) < len(places):
        raise ModelError(
            f"model {name}: its embeddings and output matrix have one adapter in common, which would be updated twice; "
            "leave ensure_weight_tying out"
        )
    held = {tensor.data_ptr() for tensor in adapter_state(lm).values()}
    others = [n for n, p in lm.named_parameters() if p.requires_grad and p.data_ptr() not in held]
    if others:
        raise ModelError(
            f"model {name}: {len(others)} weights beside its adapter are trained, such as {others[0]}; name their "
            "modules in modules_to_save, or freeze them"
        )


def adapter_config(lm: Any) -> dict[str, Any]:
    """The contents of adapter_config.json: peft's settings of the adapter, and the location of its base model."""
    config = lm.peft_config[lm.active_adapter].to_dict()
    config |= {"inference_mode": True}
    config["base_model_name_or_path"] = _lasting(config.get("base_model_name_or_path") or lm.name_or_path)
    plain = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
    return {k: v for k, v in plain.items() if k != "runtime_config"}


def save_adapters(lm: Any, folder: Path) -> None:
    """Writes the adapter as a folder that peft loads: its weights, and settings that name its base model."""
    folder.mkdir(exist_ok=True)
    state, seen = {}, set[int]()
    for name, tensor in adapter_state(lm).items():
        # A safetensors file holds no two names of one tensor.
        tensor = tensor.clone() if tensor.data_ptr() in seen else tensor
        state[name] = tensor.contiguous()
        seen.add(tensor.data_ptr())
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(adapter_config(lm), indent=2, sort_keys=True, default=str)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def load_adapter_weights(lm: Any, folder: Path) -> None:
    """Copies the adapter in ``folder`` into the model in memory, bit for bit.

    Raises:
        ModelError: it cannot be read, or is of another shape.
    """
    own, file = adapter_state(lm), folder / ADAPTER_WEIGHTS
    try:
        saved = load_file(file)
    except Exception as error:
        raise ModelError(f"{file} could not be loaded: {first_line(error)}") from error
    shapes = [{n: (t.shape, t.dtype) for n, t in state.items()} for state in (own, saved)]
    if shapes[0] != shapes[1]:
        odd = sorted(n for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
        raise ModelError(
            f"{file} holds another adapter: {len(odd)} weights differ in name, shape or dtype, {odd[0]}"
        )
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def copy_of(lm: Any) -> Any:
    """A copy of a model; that of an adapted one has trained weights of its own, and shares all frozen weights."""
    if not is_adapted(lm):
        return copy.deepcopy(lm)
    shared: dict[int, Any] = {id(p): p for p in lm.parameters() if not p.requires_grad}
    return copy.deepcopy(lm, shared | shared_state(lm))


def describe(lm: Any) -> str:
    """The adapter in a few words: kind, rank, layers, number of trained weights, base model."""
    config = lm.peft_config[lm.active_adapter]
    rank = f", rank {config.r}, alpha {config.lora_alpha:g}" if hasattr(config, "lora_alpha") else ""
    named = config.target_modules
    layers = (
        named if isinstance(named, str) else ", ".join(sorted({n.rpartition(".")[2] for n in named or ()}))
    )
    kept = f"; whole: {', '.join(config.modules_to_save)}" if getattr(config, "modules_to_save", None) else ""
    trained, total = (sum(p.numel() for p in lm.parameters() if p.requires_grad), _count(lm))
    base = adapter_config(lm)["base_model_name_or_path"]
    what = f"{config.peft_type.value}{rank} on {layers}{kept}"
    return f"{what}: {trained:,} of {total:,} weights are trained; base {base}"


# Merging


class MergedWeights(Mapping[str, Tensor]):
    """The weights of the model without adapters that computes what the adapted one does, by the base model's names.

    Tied matrices have each of their names. A weight is computed when it is read, one matrix at a time; those without an
    adapter are the model's own tensors. Quantized weights become matrices of the numbers that they stand for, in the
    model's dtype. Sums are rounded once.
    """

    def __init__(self, lm: Any) -> None:
        base = without_adapters(lm)
        self._sources = dict(_sources(base, "", base.dtype))

    def __getitem__(self, name: str) -> Tensor:
        with torch.no_grad():
            return self._sources[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def merged_model(lm: Any) -> Any:
    """The transformers model with the ``MergedWeights``, on the CPU, to be saved: other buffers are missing.

    An output matrix that has come to differ from the embeddings it was tied to is no longer tied.
    """
    base = without_adapters(lm)
    weights = {name: tensor.cpu() for name, tensor in MergedWeights(lm).items()}
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    tied = _tied_names(lm, weights)
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", False) and not tied:
            part.tie_word_embeddings = False
    with torch.device("meta"):
        plain = type(base)(config)
    plain.load_state_dict(weights, assign=True)
    if tied:
        plain.tie_weights()
    plain.generation_config = base.generation_config
    if hasattr(base, "_weight_conversions"):  # the names of its files
        plain._weight_conversions = base._weight_conversions
    return plain


def _sources(
    module: nn.Module, prefix: str, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """For each weight below ``module`` its name in the base model, and how it is computed."""
    if (saved := saved_module(module)) is not None:
        yield from _sources(saved, prefix, dtype)
        return
    if _is_tuner_layer(module):
        layer: Any = module.get_base_layer()  # type: ignore[operator]
        names = ["weight", "bias"] if is_quantized_layer(layer) else list(_tensors_of(layer))
        for name in names:
            if getattr(layer, name, 0) is not None:
                yield f"{prefix}{name}", partial(_merged, module, name, dtype)
        return
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if name == "weight" and is_quantized_layer(module):
            yield f"{prefix}{name}", lambda: dense_weight(module).to(dtype)
        elif name not in module._non_persistent_buffers_set:
            yield f"{prefix}{name}", partial(torch.Tensor.detach, tensor)
    for name, child in module.named_children():
        yield from _sources(child, f"{prefix}{name}.", dtype)


def _merged(module: Any, name: str, dtype: torch.dtype) -> Tensor:
    """A weight of a layer with the active adapters added."""
    layer = module.get_base_layer()
    if module.disable_adapters:
        return dense_weight(layer) if name == "weight" else _tensors_of(layer)[name]
    if not _is_plain_lora(module):
        twin = copy.deepcopy(module)
        for each in [m for m in twin.modules() if _is_tuner_layer(m)]:
            each.merge(safe_merge=True)
        return _tensors_of(twin.get_base_layer())[name]
    if name != "weight":
        return _tensors_of(layer)[name]
    dense = dense_weight(layer)
    total = dense.double() if dense.dtype == torch.float64 else dense.float()
    for adapter in module.active_adapters:
        if adapter in module.scaling:
            total = total + module.get_delta_weight(adapter).to(total)
    return total.to(dtype if is_quantized_layer(layer) else dense.dtype)


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """What ``module.state_dict()`` holds; that call would leave sharded weights that have been gathered in shards."""
    kept: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for prefix, each in module.named_modules():
        for name, buffer in each.named_buffers(recurse=False):
            if name not in each._non_persistent_buffers_set:
                kept[f"{prefix}.{name}".lstrip(".")] = buffer
    return {name: tensor.detach() for name, tensor in kept.items()}


def _is_tuner_layer(module: Any) -> bool:
    return hasattr(module, "get_base_layer") and hasattr(module, "merged_adapters")


def _is_plain_lora(module: Any) -> bool:
    """True for LoRA that only adds a matrix to a weight: no DoRA, no bias of its own."""
    from peft.tuners.lora import LoraLayer

    return (
        isinstance(module, LoraLayer)
        and hasattr(module, "get_delta_weight")
        and not hasattr(module, "parameter_name")  # a parameter that is no layer's weight
        and not getattr(module, "lora_variant", None)
        and not any(getattr(module, "lora_bias", {}).values())
    )


# Names


def _tied_names(lm: Any, weights: Mapping[str, Tensor] | None = None) -> set[str]:
    """The last parts of the names of the embeddings and of the output matrix where both are one; else none.

    With ``weights``: where those of the two are equal.
    """
    base = without_adapters(lm)
    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        return set()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    names = [next((n for n, m in base.named_modules() if m is end), "") for end in ends]
    if weights is not None and not torch.equal(*(weights[f"{name}.weight"] for name in names)):
        return set()
    return {name.rpartition(".")[2] for name in names}


def _check_names(model: LanguageModel, key: str, given: Sequence[str]) -> None:
    """Checks that each name is the end of a module's name."""
    modules = {name: m for name, m in model.lm.named_modules() if name}
    for name in given:
        if not any(known == name or known.endswith(f".{name}") for known in modules):
            known = {
                n.rpartition(".")[2]
                for n, m in modules.items()
                if any(True for _ in m.parameters(recurse=False))
            }
            raise ModelError(
                f"student.lora.{key}: no module of {model.name} is called {name}{did_you_mean(name, known)}"
            )


def _lasting(base: str) -> str:
    """A location that holds from any folder: an absolute path, or a Hub id."""
    return str(Path(base).resolve()) if Path(base).exists() else base


def _count(lm: Any) -> int:
    """The number of weights, those of 4 bits included."""
    total = 0
    for parameter in lm.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else torch.Size(state.shape).numel()
    return total


@contextlib.contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    """Converts errors of peft to one line; its warnings concern other ways of saving."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{what} cannot be used: {first_line(error)}") from error
