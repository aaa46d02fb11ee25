"""Whether a step's activations fit the device, or are to be recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gold.data import characters_of
from gold.doctor.sizes import activation_bytes, machine_memory
from gold.errors import DataError
from gold.kernels.logits import ACCELERATED, BLOCK_BYTES
from gold.models.hidden_states import decoder_layers
from gold.models.language_model import output_width
from gold.train.recipe import Recipe
from gold.train.setup import Setup
from gold.train.trackers import Tracker

_BLOCKS = 6
"""Blocks of logits in memory at the same time, as in `gold.doctor.sizes`."""


def settled(setup: Setup, tracker: Tracker, processes: int = 1) -> Recipe:
    """The recipe with ``gradient_checkpointing`` true or false; ``auto`` becomes true if the step would need more
    memory than the device has, which is noted.

    The formula is that of `gold doctor`, with the weights as loaded; sharded ones are divided among the ``processes``.
    It depends on the recipe, the models, the longest prompt and the device's whole memory, not on what is free, so that
    a resumed run decides the same.
    """
    recipe = setup.recipe
    if recipe.gradient_checkpointing != "auto":
        return recipe
    has, activations = _device_memory(setup.student.device), _activations(setup)
    needed = step_bytes(setup, processes if recipe.sharding == "fsdp" else 1)
    fits = has is None or needed <= has or not activations or not decoder_layers(setup.student.lm)
    if not fits:
        gib = [f"{size / 2**30:.1f} GiB" for size in (needed, activations, has or 0)]
        tracker.note(
            f"activations are recomputed in the backward pass: a step would need about {gib[0]} ({gib[1]} of "
            f"activations), and the device has {gib[2]}; train.gradient_checkpointing sets it"
        )
    return recipe.replace(gradient_checkpointing=not fits)


def step_bytes(setup: Setup, shards: int = 1) -> int:
    """The bytes of a step without recomputation, as far as the sizes of the student's layers are known."""
    lm = setup.student.lm
    weights = _trained_bytes(lm.parameters(), 2 if setup.recipe.optimizer == "adamw8bit" else 8)
    frozen = [t.model.lm for t in setup.members.values() if t.model is not None]
    weights += sum(_bytes(each.parameters()) for each in frozen if each.device == lm.device)
    weights += _bytes(lm.parameters()) if setup.needs_reference else 0
    block = BLOCK_BYTES * (1 if lm.device.type == "cpu" else ACCELERATED)
    return weights // shards + _activations(setup) + _BLOCKS * min(block, 4 * _rows(setup) * output_width(lm))


def _activations(setup: Setup) -> int:
    return activation_bytes(setup.student.lm.config.get_text_config().to_dict(), _rows(setup)) or 0


def _rows(setup: Setup) -> int:
    """The most tokens of a microbatch."""
    recipe, student = setup.recipe, setup.student
    if recipe.micro_batch_tokens is not None:
        return recipe.micro_batch_tokens
    longest = setup.prompts[int(characters_of(setup.prompts).argmax())]
    try:
        prompt = len(student.prompt_ids(longest))
    except DataError:
        prompt = 0
    return recipe.micro_batch_size * (prompt + recipe.max_new_tokens)


def _trained_bytes(weights: Iterable[Tensor], moments: int) -> int:
    """Bytes of weights, their gradients, moments, and float32 copies of 16-bit ones."""
    total = 0
    for weight in weights:
        width = weight.element_size()
        master = 4 if width == 2 else 0
        total += weight.numel() * (2 * width + moments + master if weight.requires_grad else width)
    return total


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _device_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_memory() if device.type == "cpu" else None
