"""Texts packed into one row without padding, of which attention reads each alone.

A packed forward pass has one row of all texts, positions that begin at 0 in each, and the keyword ``packed_lengths``,
which transformers' models hand on to the attention function of their configuration. That function, registered here,
calls transformers' own for each text; everything else in a layer sees one row. Without the keyword it is transformers'
own, so that a model set up for packing generates and reads padded texts as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gold.errors import ModelError
from gold.models.language_model import without_adapters

_NAME = "gold_packed"
_NOT_BY_TEXT = ("softcap", "s_aux", "position_bias")
"""Arguments of attention that are not computed text by text."""
_is_packed: ContextVar[bool] = ContextVar("is_packed", default=False)


def allow_packing(lm: Any) -> None:
    """Sets up a model for packed texts; whether its results are right is for ``probe.check_packing`` to find out.

    Raises:
        ModelError: its attention is not torch's own, or has chunks.
    """
    model = without_adapters(lm)
    config = model.config.get_text_config()
    kind, attention = type(model).__name__, config._attn_implementation
    if attention == _NAME or attention.startswith("flash_attention"):  # it finds the texts by their positions
        return
    if attention != "sdpa":
        raise ModelError(f"{kind} has {attention} attention, and texts are packed for torch's own (sdpa)")
    if getattr(config, "attention_chunk_size", None):
        raise ModelError(f"{kind} has attention in chunks")
    model.set_attn_implementation(_NAME)


def forbid_packing(lm: Any) -> None:
    """Takes ``allow_packing`` back."""
    model = without_adapters(lm)
    if model.config.get_text_config()._attn_implementation == _NAME:
        model.set_attn_implementation("sdpa")


@contextlib.contextmanager
def packed_pass(lengths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A context in which a model makes no masks for a pass over texts of these lengths in one row, and the arguments of
    that pass; without lengths nothing."""
    if not lengths:
        yield {}
        return
    token = _is_packed.set(True)
    try:
        yield {"packed_lengths": list(lengths)}
    finally:
        _is_packed.reset(token)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of all heads, [B, N, heads, D], in a packed pass of each text alone."""
    lengths = options.pop("packed_lengths", None)
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if given := [name for name in _NOT_BY_TEXT if options.get(name) is not None]:
        raise ModelError(f"attention with {given[0]} is not computed text by text")
    if "sliding_window" not in options and getattr(module.config, "sliding_window", None):
        raise ModelError("its layers do not name the sliding window of its configuration")
    options["is_causal"] = True
    window = options.get("sliding_window")
    parts = []
    for q, k, v in zip(*(each.split(lengths, 2) for each in (query, key, value)), strict=True):
        mask = _window_mask(q.shape[2], window, q.device) if window and q.shape[2] > window else None
        parts.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(parts, 1), None


def _window_mask(size: int, window: int, device: torch.device) -> Tensor:
    """True where a token sees another: itself and the ``window − 1`` before it."""
    at = torch.arange(size, device=device)
    back = at[:, None] - at[None, :]
    return ((back >= 0) & (back < window))[None, None]


def _mask(*arguments: Any, **options: Any) -> Any:
    return None if _is_packed.get() else sdpa_mask(*arguments, **options)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
