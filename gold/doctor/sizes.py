"""Sizes in a config.json, and a first estimate of the memory of a step from them, without torch.

    student      parameters × 16 bytes: weights, gradients, and AdamW's two moments, in float32. With adapters 4 bytes,
                 and the adapters' parameters × 16
    teacher      parameters × bytes of its dtype
    activations  sequences × tokens × layers × (9·hidden + 4·inner + 3·(queries + keys)) × 4 bytes
    logits       6 blocks of at most 128 MiB: both sides' rows of one block, and what their gradients need

The factors of the activations were fitted to two real models (the formula gives 1.22 times what a Llama keeps for the
backward pass, 0.89 times for a Gemma). The rollout's KV cache is freed before the step, and not included. This is for
two models without a run; what a run needs is told, and decided, by `gold.doctor.memory`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gold.doctor.side import Side
from gold.errors import ModelError
from gold.files import safetensors_header

BYTES_OF = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
QUANTIZED = {"nf4": 4.127 / 8, "int8": 1.0}
"""Bytes of a quantized weight."""
_BLOCK_BYTES = 128 * 2**20
_BLOCKS = 6


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one optimizer step needs, by part; a forward pass reads ``sequences`` of ``tokens`` each."""

    sequences: int
    tokens: int
    student: int
    teacher: int
    activations: int
    logits: int
    student_parameters: int
    teacher_parameters: int
    trained_parameters: int | None = None
    """of adapters; None if all are trained"""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.student + self.teacher + self.activations + self.logits


def step_memory(
    student: Side, teacher: Side, sequences: int, tokens: int, lora: Mapping[str, Any] | None = None
) -> StepMemory | None:
    """The memory of a step with the student in float32 and the teacher as it was saved; None if a config.json lacks
    sizes that the formula needs.

    ``lora``: rank, targets and modules_to_save of the student's adapters, if they alone are trained.
    """
    mine, theirs = student.config, teacher.config
    counts = parameters(student), parameters(teacher)
    shape = _shape(mine)
    if counts[0] is None or counts[1] is None or shape is None:
        return None
    rows = sequences * tokens
    widths = [int(mine.get("vocab_size") or 0), int(theirs.get("vocab_size") or teacher.vocabulary.size)]
    adapted = None if lora is None else _adapter_parameters(shape, lora)
    saved = theirs.get("dtype") or theirs.get("torch_dtype") or "float32"
    return StepMemory(
        sequences=sequences,
        tokens=tokens,
        student=16 * counts[0] if adapted is None else 4 * counts[0] + 16 * adapted,
        teacher=counts[1] * BYTES_OF.get(str(saved), 2),
        activations=rows * shape[4] * kept_of_layer(mine) * 4,
        logits=_BLOCKS * min(_BLOCK_BYTES, rows * max(widths) * 4),
        student_parameters=counts[0],
        teacher_parameters=counts[1],
        trained_parameters=adapted,
    )


def _adapter_parameters(shape: tuple[int, int, int, int, int, int], lora: Mapping[str, Any]) -> int:
    """Parameters of low-rank adapters, and of modules that are trained whole."""
    hidden, inner, queries, keys, layers, rows = shape
    sides = {
        **dict.fromkeys(("q_proj", "o_proj"), hidden + queries),
        **dict.fromkeys(("k_proj", "v_proj"), hidden + keys),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + inner),
    }
    targets = lora.get("targets")
    chosen = set(sides) if targets is None else {str(name).rpartition(".")[2] for name in targets}
    ends = len({"lm_head", "embed_tokens"} & chosen) if targets is not None else 0
    adapters = layers * sum(sides[name] for name in chosen if name in sides) + ends * (hidden + rows)
    whole = len(
        {"lm_head", "embed_tokens"} & {str(n).rpartition(".")[2] for n in lora.get("modules_to_save") or ()}
    )
    return int(lora["rank"]) * adapters + whole * hidden * rows


def kept_of_layer(config: Mapping[str, Any]) -> int:
    """Numbers that a layer keeps for the backward pass, per token, fitted to Llama and Gemma; 0 without sizes."""
    hidden, inner = size_in(config, "hidden_size"), size_in(config, "intermediate_size")
    if experts := size_in(config, "num_experts_per_tok"):
        inner = experts * (size_in(config, "moe_intermediate_size") or inner)
    keys, heads = keys_of(config), size_in(config, "num_attention_heads")
    if not (hidden and inner and keys):
        return 0
    queries = keys * heads // (size_in(config, "num_key_value_heads") or heads)
    return 9 * hidden + 4 * inner + 3 * (queries + keys)


def keys_of(config: Mapping[str, Any]) -> int:
    """Numbers in the keys of a layer, per token; 0 if sizes are missing."""
    heads = size_in(config, "num_attention_heads")
    head = size_in(config, "head_dim") or (size_in(config, "hidden_size") // heads if heads else 0)
    return head * (size_in(config, "num_key_value_heads") or heads)


def size_in(config: Mapping[str, Any], name: str) -> int:
    """A size in a config.json; 0 if it is missing or impossible."""
    value = config.get(name)
    return value if type(value) is int and 0 < value < 2**40 else 0


def parameters(side: Side) -> int | None:
    """The number of parameters of a side's model; None if unknown.

    From the headers of its safetensors, else from config.json, assuming a dense gated transformer.
    """
    return _saved_parameters(side.folder) or _dense_parameters(side.config)


def machine_memory() -> int | None:
    """Main memory of this machine in bytes; None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _saved_parameters(folder: Path | None) -> int:
    total = 0
    for file in sorted(folder.glob("model*.safetensors")) if folder else []:
        try:
            tensors, _ = safetensors_header(file, ModelError)
        except ModelError:
            return 0  # loading the model reports the error
        total += sum(math.prod(entry["shape"]) for entry in tensors.values())
    return total


def _dense_parameters(config: Mapping[str, Any]) -> int | None:
    shape = _shape(config)
    if shape is None or any("expert" in key for key in config):
        return None
    hidden, inner, queries, keys, layers, rows = shape
    block = 2 * hidden * (queries + keys) + 3 * hidden * inner + 2 * hidden
    return layers * block + hidden + rows * hidden * (1 if config.get("tie_word_embeddings") else 2)


def _shape(config: Mapping[str, Any]) -> tuple[int, int, int, int, int, int] | None:
    """hidden, inner, queries, keys, layers, rows."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    hidden, inner, heads, layers, rows = (size_in(config, name) for name in names)
    if not (hidden and inner and heads and layers and rows):
        return None
    head = size_in(config, "head_dim") or hidden // heads
    return hidden, inner, heads * head, (size_in(config, "num_key_value_heads") or heads) * head, layers, rows
