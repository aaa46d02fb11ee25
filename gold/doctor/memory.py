"""Memory per GPU of a run's steps, by part and phase, from the two config.json and the settings of the run.

Weights, gradients and the optimizer's state are counted (``gold.models.footprint``); activations, caches and 16-bit
copies are those of the models' own passes, followed on tensors without data. Estimated are the logits of the loss, and
on a GPU the driver's context and the allocator's rounding. `gold doctor` of a run and ``gradient_checkpointing: auto``
(`gold.train.activations`) both decide by it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from gold.doctor.sizes import BYTES_OF, QUANTIZED, kept_of_layer, keys_of, machine_memory, size_in
from gold.errors import ModelError
from gold.kernels.logits import ACCELERATED, BLOCK_BYTES
from gold.models.footprint import (
    Adapters,
    ModelSizes,
    Pass,
    model_sizes,
    reading_pass,
    trained_parameters,
    training_pass,
)

Quantization = Literal["nf4", "int8"]
PHASES = ("rollout", "teacher", "loss", "backward", "update")
KINDS = ("student", "activations", "logits", "teacher", "rollouts", "device")
_KIND_OF = {
    "gathered for a time": "student",
    "CUDA context, rounding": "device",
    "libraries, rounding": "device",
}
_CONTEXT_BYTES = 2**30
"""Of the driver and the libraries' kernels on a GPU."""
_ROUNDING = 0.05
"""What a GPU's allocator holds and cannot use, as a share of the tensors."""
_CPU_BYTES, _CPU_16_BIT_BYTES = 80 * 2**20, 100 * 2**20
"""Buffers of a CPU's libraries, and what they hold more for products of 16-bit matrices; measured, by `python -m
benchmarks memory`."""
_CPU_ROUNDING = 0.03
_TABLE_BYTES = 16 * 2**10
"""Byte tables of a token."""
_BEYOND_DOUBT = 0.25
"""Share of a memory below which a rough estimate is enough."""


@dataclass(frozen=True)
class Model:
    """A model of a plan: the text part of its config.json, and how it is held. ``name`` is for display."""

    name: str
    config: Mapping[str, Any] = field(hash=False)
    dtype: str = "float32"
    quantization: Quantization | None = None

    @property
    def held_dtype(self) -> str:
        """The dtype of its weights."""
        saved = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        found = str(saved if self.dtype == "auto" else self.dtype).removeprefix("torch.")
        return found if found in BYTES_OF else "bfloat16"

    @property
    def width(self) -> int:
        """Bytes of a weight that is not quantized."""
        return BYTES_OF[self.held_dtype]

    @property
    def sizes(self) -> ModelSizes:
        """Its numbers of parameters."""
        return model_sizes(self.config)

    def weight_bytes(self) -> int:
        """Bytes of its weights."""
        sizes = self.sizes
        if self.quantization is None:
            return sizes.parameters * self.width
        held = sizes.matrices * QUANTIZED[self.quantization]
        return int(held + (sizes.parameters - sizes.matrices) * self.width)


@dataclass(frozen=True)
class Plan:
    """The settings of a run that its memory depends on.

    Microbatches are of ``sequences`` padded to ``tokens``, of which ``new_tokens`` are generated; a step has
    ``step_sequences`` of all GPUs together. ``teachers`` are those in this process, and read ``teacher_tokens`` per
    forward pass. ``copies``: float32 or frozen copies of the student's weights beside it (averages, a reference).
    ``blocks``: of logits, held at a time by the loss. ``engine``: bytes of another program on the GPU that draws.
    ``moments``: bytes of a trained weight's two moments, 2 with ``train.optimizer: adamw8bit``. ``rough``: passes are
    estimated from the sizes in config.json, not followed.
    """

    student: Model
    teachers: tuple[Model, ...] = ()
    lora: Adapters | None = None
    sequences: int = 8
    by_tokens: bool = False
    """whether ``sequences`` follows from train.micro_batch_tokens"""
    tokens: int = 256
    new_tokens: int = 128
    step_sequences: int = 32
    teacher_tokens: int = 16384
    generation_batch: int = 32
    gradient_checkpointing: bool = False
    autocast: bool = True
    copies: int = 0
    moments: int = 8
    blocks: int = 1
    wide: int = 0
    """columns of the widest vocabulary, the student's included, if a teacher is not in this process"""
    generates: bool = True
    each_step: bool = True
    """whether in each step, not before the first one alone"""
    engine: int = 0
    engine_sleeps: bool = True
    """whether it leaves the GPU between draws"""
    gpus: int = 1
    sharding: Literal["none", "fsdp"] = "none"
    gradient_sync: Literal["microbatch", "step"] = "microbatch"
    on_gpu: bool = True
    trained_weights: int | None = None
    """their number, if the model is loaded"""
    rough: bool = False

    @property
    def sharded(self) -> bool:
        """Whether weights are sharded."""
        return self.sharding == "fsdp" and self.gpus > 1

    @property
    def can_shard(self) -> bool:
        """Whether the student can be sharded: not with quantized weights."""
        return self.student.quantization is None

    @property
    def shards(self) -> int:
        """Processes that share a weight."""
        return self.gpus if self.sharded else 1

    @property
    def read_first(self) -> int:
        """Bytes of the models that the first process reads into its main memory to share them out: none that every
        process reads."""
        if not self.sharded:
            return 0
        models = self.teachers if self.lora is not None else (self.student, *self.teachers)
        return sum(model.weight_bytes() for model in models if model.quantization is None)

    @property
    def own_sequences(self) -> int:
        """Sequences of a step in one process."""
        return -(-self.step_sequences // self.gpus)

    @property
    def trained(self) -> int:
        """Weights that are trained."""
        if self.trained_weights is not None:
            return self.trained_weights
        if self.lora is None:
            return int(self.student.sizes.parameters)
        return trained_parameters(self.student.config, self.lora)


@dataclass(frozen=True)
class Part:
    """Bytes of one part in each phase of a step: ``loss`` is the end of the student's forward pass."""

    name: str
    rollout: int = 0
    teacher: int = 0
    loss: int = 0
    backward: int = 0
    update: int = 0

    @classmethod
    def always(cls, name: str, size: float) -> Part:
        """A part that is there in all phases."""
        return cls(name, *[round(size)] * len(PHASES))

    @property
    def kind(self) -> str:
        """What it belongs to, one of ``KINDS``."""
        first = self.name.split()[0].rstrip(":")
        return first if first in KINDS else _KIND_OF.get(self.name, "rollouts")

    @property
    def most(self) -> int:
        """Its bytes in the phase where they are most."""
        return max(int(getattr(self, phase)) for phase in PHASES)


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU, by part."""

    parts: tuple[Part, ...]

    def total(self, phase: str) -> int:
        """Bytes of a phase."""
        return sum(getattr(part, phase) for part in self.parts)

    @property
    def phase(self) -> str:
        """The phase that needs most."""
        return max(PHASES, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes of that phase."""
        return self.total(self.phase)

    def of(self, name: str) -> int:
        """Bytes of a part, in the phase where they are most; 0 without it."""
        return sum(part.most for part in self.parts if part.name == name)


def memory_of(plan: Plan) -> Memory:
    """The memory that a step needs on each GPU.

    Raises:
        ModelError: the parameters of a model cannot be counted.
    """
    parts = [*_student(plan), *_teachers(plan), _logits(plan), *_rollouts(plan)]
    parts = [part for part in parts if part.most]
    held = Memory(tuple(parts))
    if plan.on_gpu:
        name, constant, share = "CUDA context, rounding", _CONTEXT_BYTES, _ROUNDING
    else:
        name, share = "libraries, rounding", _CPU_ROUNDING
        constant = _CPU_BYTES + (_CPU_16_BIT_BYTES if plan.student.width < 4 else 0)
    parts.append(Part(name, **{p: constant + round(held.total(p) * share) for p in PHASES}))
    return Memory(tuple(parts))


def fits(plan: Plan, limit: int) -> bool:
    """Whether each GPU needs at most ``limit`` bytes; passes are followed only where a rough estimate leaves doubt.

    Raises:
        ModelError: as ``memory_of``.
    """
    with contextlib.suppress(ModelError):
        if memory_of(replace(plan, rough=True)).peak < limit * _BEYOND_DOUBT:
            return True
    return memory_of(plan).peak <= limit


def device_memory(device: torch.device) -> int | None:
    """Bytes of a device's memory, whatever is free of it; None if nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_memory() if device.type == "cpu" else None


# Parts


def _student(plan: Plan) -> list[Part]:
    student, trained = plan.student, plan.trained
    # Adapters are whole in every process.
    shards = plan.shards if plan.lora is None else 1
    sizes, width = student.sizes, student.width
    of_trained = width if plan.lora is None else 4
    masters = trained * 4 if of_trained == 2 else 0
    gradients = trained * of_trained
    run = _training_pass(plan)
    weights = student.weight_bytes() / plan.shards + (trained * 4 if plan.lora is not None else 0)
    # 16-bit copies live until the forward pass is over, or as long as their layer computes.
    casts = 0 if plan.sharded else run.casts
    kept_casts = 0 if plan.gradient_checkpointing else casts
    backward = run.backward - (0 if plan.gradient_checkpointing else run.casts) + _scratch(student)
    # The gradient of a step's only microbatch grows while activations are freed.
    first = plan.own_sequences <= plan.sequences
    parts = [
        Part.always("student: weights", weights),
        Part.always("student: float32 masters", masters / shards),
        Part(
            "student: gradients",
            loss=0 if first else gradients // shards,
            backward=max(0, gradients // shards - backward) if first else gradients // shards,
            # 16-bit gradients become float32 ones.
            update=(2 if of_trained == 2 else 1) * gradients // shards,
        ),
        Part.always("student: AdamW", plan.moments * trained / shards),
        Part.always(
            "student: copies (average, reference)", plan.copies * student.weight_bytes() / plan.shards
        ),
        Part("student: 16-bit copies", _cast_bytes(plan), loss=casts, backward=kept_casts),
        Part("activations", loss=max(run.held, run.forward) - run.casts, backward=backward),
    ]
    if plan.gpus > 1 and not plan.sharded:
        parts.append(Part.always("student: gradients in transit", gradients))
    if plan.sharded:
        parts.append(_gathered(plan, sizes))
    return parts


def _cast_bytes(plan: Plan) -> int:
    """16-bit copies of trained float32 weights, which autocast keeps through a generation."""
    if not (plan.generates and plan.autocast and plan.student.width == 4) or plan.lora or plan.sharded:
        return 0
    return 2 * (plan.student.sizes.matrices + plan.student.sizes.output)


def _gathered(plan: Plan, sizes: ModelSizes) -> Part:
    """Weights and gradients that are whole for a time: two layers, and embeddings with the output matrix."""
    wide = 2 if plan.autocast else plan.student.width
    layers = min(2, sizes.layers) * sizes.layer
    root = sizes.parameters - sizes.layers * sizes.layer
    if plan.gradient_sync == "step":
        weights, gradients = sizes.parameters * wide, sizes.parameters * 4 + sizes.layer * wide
    else:
        # A whole gradient has the dtype of the weights that computed it, and is reduced in float32.
        weights, gradients = (layers + root) * wide, (layers + root) * wide + layers * 4
    if plan.lora is not None:
        gradients = 0
    of_teachers = sum(
        min(2, t.sizes.layers) * t.sizes.layer * t.width for t in plan.teachers if t.quantization is None
    )
    rollout = sizes.parameters * wide if plan.generates else 0
    return Part("gathered for a time", rollout, of_teachers, weights, weights + gradients)


def _teachers(plan: Plan) -> list[Part]:
    parts = []
    for number, teacher in enumerate(plan.teachers, 1):
        sizes = teacher.sizes
        weights: float = teacher.weight_bytes()
        if plan.sharded and teacher.quantization is None:
            in_layers = sizes.layers * sizes.layer * teacher.width
            weights = weights - in_layers + in_layers / plan.shards
        which = "teacher" if len(plan.teachers) == 1 else f"teacher {number}"
        rows = plan.own_sequences * plan.tokens
        states = rows * sizes.hidden * (2 if plan.autocast else teacher.width)
        sequences = max(1, min(plan.own_sequences, plan.teacher_tokens // plan.tokens))
        read = _reading_pass(plan, teacher, sequences, plan.tokens)
        parts += [
            Part.always(f"{which}: weights", weights),
            Part(
                f"{which}: activations",
                teacher=states + read.forward - read.casts + _scratch(teacher),
                loss=states,
            ),
        ]
        if plan.on_gpu:
            # The output matrix is put into the order of bytes.
            parts.append(Part(f"{which}: output matrix in byte order", loss=sizes.output * teacher.width))
    return parts


def _logits(plan: Plan) -> Part:
    sizes = plan.student.sizes
    rows = plan.sequences * plan.tokens
    widest = max([plan.wide, sizes.rows, *(t.sizes.rows for t in plan.teachers)])
    block = min(BLOCK_BYTES * (ACCELERATED if plan.on_gpu else 1), rows * widest * 4)
    head = 0
    if plan.lora is None or "lm_head" in plan.lora.modules_to_save:
        # Its gradient is summed in float32, and autocast makes a 16-bit copy.
        head = sizes.output * (4 + (2 if plan.autocast and plan.student.width == 4 else 0))
    loss = plan.blocks * block + head + rows * _TABLE_BYTES
    return Part("logits of a block", loss=loss, backward=head)


def _rollouts(plan: Plan) -> list[Part]:
    if not plan.generates:
        awake = [Part.always("rollout engine", plan.engine)]
        return [Part("rollout engine", rollout=plan.engine)] if plan.engine_sleeps else awake
    batch = min(plan.generation_batch, plan.own_sequences)
    whole = _reading_pass(plan, plan.student, batch, plan.tokens, cache=True)
    cache = whole.held - whole.casts
    prompt = max(1, plan.tokens - plan.new_tokens)
    read = _reading_pass(plan, plan.student, batch, prompt)
    # Probabilities and their sums, in float32 and float64, of one token of each sequence.
    drawing = batch * plan.student.sizes.rows * 32
    return [
        Part("KV cache of generation", rollout=cache),
        Part("generation", rollout=read.forward - read.casts + drawing + _scratch(plan.student)),
    ]


def _scratch(model: Model) -> int:
    """The largest quantized matrix, as numbers."""
    return 0 if model.quantization is None else model.sizes.layer // 3 * model.width


# Passes


def _training_pass(plan: Plan) -> Pass:
    model, checkpointing = plan.student, plan.gradient_checkpointing
    if not plan.rough:
        with contextlib.suppress(ModelError):
            return training_pass(
                model.config,
                plan.sequences,
                plan.tokens,
                dtype=model.held_dtype,
                autocast=plan.autocast and model.width == 4,
                checkpointing=checkpointing,
                adapters=plan.lora,
            )
    rows, wide = plan.sequences * plan.tokens, 2 if plan.autocast else model.width
    layers = _number(model.config, "num_hidden_layers")
    layer = rows * _kept(model.config) * wide
    if checkpointing:
        held = rows * _number(model.config, "hidden_size") * layers * wide
        return Pass(held, held + layer, held + layer)
    return Pass(layers * layer, layers * layer, layers * layer)


def _reading_pass(plan: Plan, model: Model, sequences: int, tokens: int, cache: bool = False) -> Pass:
    dtype, casting = model.held_dtype, plan.autocast and model.width == 4
    if not plan.rough:
        with contextlib.suppress(ModelError):
            return reading_pass(model.config, sequences, tokens, dtype=dtype, autocast=casting, cache=cache)
    rows, wide, config = sequences * tokens, 2 if plan.autocast else model.width, model.config
    states = rows * _number(config, "hidden_size") * wide
    if cache:
        return Pass(rows * 2 * keys_of(config) * _number(config, "num_hidden_layers") * wide, 0)
    return Pass(states, states + rows * _kept(config) * wide // 2)


def _kept(config: Mapping[str, Any]) -> int:
    for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
        _number(config, name)
    return kept_of_layer(config)


def _number(config: Mapping[str, Any], name: str) -> int:
    """A size in a config.json.

    Raises:
        ModelError: it is not there.
    """
    if not (value := size_in(config, name)):
        raise ModelError(f"its config.json gives no {name}")
    return value
