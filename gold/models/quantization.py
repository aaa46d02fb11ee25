"""Weights of 4 and 8 bits (bitsandbytes): loading them, and their values as dense matrices."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from gold.errors import ModelError

KINDS = ("nf4", "int8")


def check_installed(kind: str) -> None:
    """Checks that quantized weights can be loaded.

    Raises:
        ModelError: an unknown kind, or bitsandbytes is not installed.
    """
    if kind not in KINDS:
        raise ModelError(f"unknown quantization {kind!r}; choose {' or '.join(KINDS)}")
    if find_spec("bitsandbytes") is None:
        raise ModelError(f"quantization {kind} needs bitsandbytes: pip install 'gold-distill[quantization]'")


def loading_arguments(kind: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantize the matrices of the layers while they are loaded to ``device``.

    The embeddings, the output matrix and the norms keep ``dtype``, in which the layers also compute. ``nf4`` is the
    4-bit NormalFloat with quantized constants, 4.13 bits a weight (Dettmers et al. 2305.14314, section 3); ``int8``
    has 8 bits and computes outliers of the activations in 16 bits (2208.07339).

    Raises:
        ModelError: see ``check_installed``.
    """
    from transformers import BitsAndBytesConfig

    check_installed(kind)
    if kind == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": settings, "device_map": {"": device}}


def quantization_of(lm: Any) -> str | None:
    """How a model's weights are quantized: "nf4", "int8", or the name of another method; None if they are not."""
    settings = getattr(lm.config, "quantization_config", None)
    if settings is None or not getattr(lm, "is_quantized", True):
        return None
    found = settings if isinstance(settings, dict) else settings.to_dict()
    if found.get("load_in_4bit"):
        return str(found.get("bnb_4bit_quant_type", "4 bits"))
    if found.get("load_in_8bit"):
        return "int8"
    return str(found.get("quant_method", "another method"))


def is_quantized_layer(module: nn.Module) -> bool:
    """True for a layer of bitsandbytes with 4 or 8 bits."""
    return type(module).__module__.startswith("bitsandbytes.") and hasattr(module, "weight")


def shared_state(lm: Any) -> dict[int, Any]:
    """The state of 8-bit layers by its id: it refers to their weights, which a copy of a frozen model shares."""
    states = (getattr(m, "state", None) for m in lm.modules() if is_quantized_layer(m))
    return {id(state): state for state in states if state is not None}


def keep_gradients(lm: Any) -> None:
    """Sets up quantized layers for a model that is trained in eval mode.

    On a CPU with AVX512-BF16, bitsandbytes repacks a 4-bit layer in eval mode into a form that has no gradient. Its
    8-bit layers log a line for every product of float32 or bfloat16 inputs.
    """
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast)


def _is_no_cast(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in str(record.msg)


def dense_weight(module: Any) -> Tensor:
    """The weight of a layer as the numbers that it computes with; for a layer that is not quantized its own tensor.

    Raises:
        ModelError: a layer of another quantization.
    """
    weight: Tensor = module.weight.detach()
    if not is_quantized_layer(module):
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise ModelError(
                f"a {type(module).__name__} of {weight.dtype} weights cannot be written as a matrix"
            )
        return weight
    from bitsandbytes import functional

    if (state := getattr(module.weight, "quant_state", None)) is not None:
        dense: Tensor = functional.dequantize_4bit(weight, state)
        return dense
    scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    rows: Tensor = module.state.CB if module.weight.CB is None else module.weight.CB
    return rows.float().mul_((scale.float() / 127.0)[:, None])
