"""Memory that one optimizer step needs, from the sizes in two config.json.

    student      parameters × 16 bytes in float32 and bfloat16: weights, gradients, and AdamW's two moments in float32;
                 a bfloat16 weight also has a float32 copy (see gold.train.optimizer). With adapters: parameters × bytes
                 of their dtype, and the adapters' parameters × 16 bytes
    teacher      parameters × bytes of its dtype
                 quantized: 0.52 bytes (nf4) or 1 byte (int8) for the matrices of the layers, all else in its dtype
    activations  sequences × tokens × layers × (9·hidden + 4·inner + 3·(queries + keys)) × 4 bytes
    logits       6 blocks of at most 128 MiB: both sides' rows of one block, and what their gradients need

The factors of the activations were fitted to two real models (the formula gives 1.22 times what a Llama keeps for the
backward pass, 0.89 times for a Gemma). The rollout's KV cache is freed before the step, and not included.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gold.doctor.side import Side
from gold.errors import ModelError
from gold.files import safetensors_header

_BYTES_OF = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
_QUANTIZED = {"nf4": 4.127 / 8, "int8": 1.0}
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
    teachers: int = 1
    trained_parameters: int | None = None
    """of adapters; None if all are trained"""

    def plus_teachers(self, other: StepMemory) -> StepMemory:
        """The sum with the teachers of another pair of the same student, all in memory at the same time."""
        return replace(
            self,
            tokens=max(self.tokens, other.tokens),
            teacher=self.teacher + other.teacher,
            activations=max(self.activations, other.activations),
            logits=max(self.logits, other.logits),
            teacher_parameters=self.teacher_parameters + other.teacher_parameters,
            teachers=self.teachers + other.teachers,
        )

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.student + self.teacher + self.activations + self.logits


def step_memory(
    student: Side,
    teacher: Side,
    sequences: int,
    tokens: int,
    dtypes: tuple[str, str] = ("float32", "auto"),
    served: bool = False,
    quantizations: tuple[str | None, str | None] = (None, None),
    lora: Mapping[str, Any] | None = None,
) -> StepMemory | None:
    """The memory of a step; None if a config.json lacks sizes that the formula needs.

    The dtype "auto" is the one in config.json; the weights of a ``served`` teacher are not counted. ``lora``: rank,
    targets and modules_to_save of the student's adapters, if they alone are trained.
    """
    mine, theirs = student.config, teacher.config
    counts = parameters(student), 0 if served else parameters(teacher)
    shape = _shape(mine)
    if counts[0] is None or counts[1] is None or shape is None:
        return None
    rows = sequences * tokens
    widths = [int(mine.get("vocab_size") or 0), int(theirs.get("vocab_size") or teacher.vocabulary.size)]
    block = min(_BLOCK_BYTES, rows * max(widths) * 4)
    width = _bytes_of(dtypes[0], mine)
    trained = 4 * width if width >= 4 else 2 * width + 3 * 4  # weight, gradient, moments, float32 copy
    student_bytes, adapted = counts[0] * trained, None
    if lora is not None:
        adapters, whole = _adapter_parameters(shape, lora)
        adapted = adapters + whole
        student_bytes = (
            _weight_bytes(counts[0], shape, width, quantizations[0]) + adapters * 16 + whole * trained
        )
    teacher_bytes = _weight_bytes(counts[1], _shape(theirs), _bytes_of(dtypes[1], theirs), quantizations[1])
    return StepMemory(
        sequences=sequences,
        tokens=tokens,
        student=student_bytes,
        teacher=teacher_bytes,
        activations=_activations(shape, rows),
        logits=_BLOCKS * block,
        student_parameters=counts[0],
        teacher_parameters=counts[1],
        trained_parameters=adapted,
    )


def _weight_bytes(
    count: int, shape: tuple[int, int, int, int, int, int] | None, width: int, quantization: str | None
) -> int:
    """Bytes of frozen weights; quantized ones are the matrices of the layers."""
    if quantization is None or shape is None or not count:
        return count * width
    hidden, inner, queries, keys, layers, _ = shape
    matrices = min(count, layers * (2 * hidden * (queries + keys) + 3 * hidden * inner))
    return (count - matrices) * width + int(matrices * _QUANTIZED[quantization])


def _adapter_parameters(
    shape: tuple[int, int, int, int, int, int], lora: Mapping[str, Any]
) -> tuple[int, int]:
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
    return int(lora["rank"]) * adapters, whole * hidden * rows


def activation_bytes(config: Mapping[str, Any], rows: int) -> int | None:
    """Bytes that a forward pass over so many tokens keeps for its backward pass; None if sizes are missing."""
    shape = _shape(config)
    return None if shape is None else _activations(shape, rows)


def _activations(shape: tuple[int, int, int, int, int, int], rows: int) -> int:
    hidden, inner, queries, keys, layers, _ = shape
    return rows * layers * (9 * hidden + 4 * inner + 3 * (queries + keys)) * 4


def _bytes_of(dtype: str, config: Mapping[str, Any]) -> int:
    saved = config.get("dtype") or config.get("torch_dtype") or "float32"
    return _BYTES_OF.get(str(saved if dtype == "auto" else dtype), 2)


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
    hidden, inner, heads, layers, rows = (_count(config, name) for name in names)
    if not (hidden and inner and heads and layers and rows):
        return None
    head = _count(config, "head_dim") or hidden // heads
    return hidden, inner, heads * head, (_count(config, "num_key_value_heads") or heads) * head, layers, rows


def _count(config: Mapping[str, Any], name: str) -> int:
    """A size in a config.json; 0 if it is missing or impossible."""
    value = config.get(name)
    return value if type(value) is int and 0 < value < 2**40 else 0
