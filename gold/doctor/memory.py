"""Memory per GPU of a run's steps, by part and phase, from the two config.json and the settings of the run.

Weights, gradients and the optimizer's state are counted (``gold.models.footprint``); activations, caches and 16-bit
copies are those of the models' own passes, followed on tensors without data. Estimated are the logits of the loss, and
on a GPU the driver's context and the allocator's rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
_BYTES_OF = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
_QUANTIZED_BYTES = {"nf4": 4.13 / 8, "int8": 1.0}
_CONTEXT_BYTES = 2**30
"""Of the driver and the libraries' kernels on a GPU."""
_ROUNDING = 0.05
"""What a GPU's allocator holds and cannot use, as a share of the tensors."""
_TABLE_BYTES = 16 * 2**10
"""Byte tables of a token."""


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
        return found if found in _BYTES_OF else "bfloat16"

    @property
    def width(self) -> int:
        """Bytes of a weight that is not quantized."""
        return _BYTES_OF[self.held_dtype]

    @property
    def sizes(self) -> ModelSizes:
        """Its numbers of parameters."""
        return model_sizes(self.config)

    def weight_bytes(self) -> int:
        """Bytes of its weights."""
        sizes = self.sizes
        if self.quantization is None:
            return sizes.parameters * self.width
        held = sizes.matrices * _QUANTIZED_BYTES[self.quantization]
        return int(held + (sizes.parameters - sizes.matrices) * self.width)


@dataclass(frozen=True)
class Plan:
    """The settings of a run that its memory depends on.

    Microbatches are of ``sequences`` padded to ``tokens``, of which ``new_tokens`` are generated; a step has
    ``step_sequences`` of all GPUs together. ``teachers`` are those in this process, and read ``teacher_tokens`` per
    forward pass. ``copies``: float32 or frozen copies of the student's weights beside it (averages, a reference).
    ``blocks``: of logits, held at a time by the loss. ``engine``: bytes of another program on the GPU that draws.
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
    blocks: int = 1
    wide: int = 0
    """columns of the widest vocabulary, the student's included, if a teacher is not in this process"""
    generates: bool = True
    engine: int = 0
    engine_sleeps: bool = True
    """whether it leaves the GPU between draws"""
    gpus: int = 1
    sharding: Literal["none", "fsdp"] = "none"
    gradient_sync: Literal["microbatch", "step"] = "microbatch"
    on_gpu: bool = True

    @property
    def sharded(self) -> bool:
        """Whether weights are sharded."""
        return self.sharding == "fsdp" and self.gpus > 1

    @property
    def can_shard(self) -> bool:
        """Whether the student can be sharded: not with adapters or quantized weights."""
        return self.lora is None and self.student.quantization is None

    @property
    def shards(self) -> int:
        """Processes that share a weight."""
        return self.gpus if self.sharded else 1

    @property
    def own_sequences(self) -> int:
        """Sequences of a step in one process."""
        return -(-self.step_sequences // self.gpus)

    @property
    def trained(self) -> int:
        """Weights that are trained."""
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
    if plan.on_gpu:
        held = Memory(tuple(parts))
        rounding = {phase: round(held.total(phase) * _ROUNDING) for phase in PHASES}
        parts.append(Part("CUDA context, rounding", **{p: _CONTEXT_BYTES + rounding[p] for p in PHASES}))
    return Memory(tuple(parts))


def activation_bytes(
    config: Mapping[str, Any],
    sequences: int,
    tokens: int,
    *,
    dtype: str = "float32",
    autocast: bool = False,
    checkpointing: bool = False,
    adapters: Adapters | None = None,
) -> int:
    """The most bytes that a forward and backward pass holds beside weights and gradients; estimated from the sizes in
    config.json if the pass depends on numbers, as in some mixtures of experts.

    Raises:
        ModelError: config.json gives too little.
    """
    found = _training_pass(Model("", config, dtype), sequences, tokens, autocast, checkpointing, adapters)
    return max(found.forward, found.backward)


# Parts


def _student(plan: Plan) -> list[Part]:
    student, trained, shards = plan.student, plan.trained, plan.shards
    sizes, width = student.sizes, student.width
    of_trained = width if plan.lora is None else 4
    masters = trained * 4 if of_trained == 2 else 0
    gradients = trained * of_trained
    run = _training_pass(
        student, plan.sequences, plan.tokens, plan.autocast, plan.gradient_checkpointing, plan.lora
    )
    weights = student.weight_bytes() + (trained * 4 if plan.lora is not None else 0)
    # 16-bit copies live until the forward pass is over, or as long as their layer computes.
    casts = 0 if plan.sharded else run.casts
    kept_casts = 0 if plan.gradient_checkpointing else casts
    backward = run.backward - (0 if plan.gradient_checkpointing else run.casts) + _scratch(student)
    # The gradient of a step's only microbatch grows while activations are freed.
    first = plan.own_sequences <= plan.sequences
    parts = [
        Part.always("student: weights", weights / shards),
        Part.always("student: float32 masters", masters / shards),
        Part(
            "student: gradients",
            loss=0 if first else gradients // shards,
            backward=max(0, gradients // shards - backward) if first else gradients // shards,
            # 16-bit gradients become float32 ones.
            update=(2 if of_trained == 2 else 1) * gradients // shards,
        ),
        Part.always("student: AdamW", 8 * trained / shards),
        Part.always("student: copies (average, reference)", plan.copies * student.weight_bytes() / shards),
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
        read = _reading_pass(teacher, sequences, plan.tokens, plan.autocast)
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
    whole = _reading_pass(plan.student, batch, plan.tokens, plan.autocast, cache=True)
    cache = whole.held - whole.casts
    prompt = max(1, plan.tokens - plan.new_tokens)
    read = _reading_pass(plan.student, batch, prompt, plan.autocast)
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


def _training_pass(
    model: Model, sequences: int, tokens: int, autocast: bool, checkpointing: bool, adapters: Adapters | None
) -> Pass:
    try:
        return training_pass(
            model.config,
            sequences,
            tokens,
            dtype=model.held_dtype,
            autocast=autocast and model.width == 4,
            checkpointing=checkpointing,
            adapters=adapters,
        )
    except ModelError:
        rows, wide = sequences * tokens, 2 if autocast else model.width
        layers = _number(model.config, "num_hidden_layers")
        layer = rows * _kept_of_layer(model.config) * wide
        if checkpointing:
            held = rows * _number(model.config, "hidden_size") * layers * wide
            return Pass(held, held + layer, held + layer)
        return Pass(layers * layer, layers * layer, layers * layer)


def _reading_pass(model: Model, sequences: int, tokens: int, autocast: bool, cache: bool = False) -> Pass:
    dtype, casting = model.held_dtype, autocast and model.width == 4
    try:
        return reading_pass(model.config, sequences, tokens, dtype=dtype, autocast=casting, cache=cache)
    except ModelError:
        rows, wide, config = sequences * tokens, 2 if autocast else model.width, model.config
        states = rows * _number(config, "hidden_size") * wide
        if cache:
            return Pass(rows * 2 * _keys(config) * _number(config, "num_hidden_layers") * wide, 0)
        return Pass(states, states + rows * _kept_of_layer(config) * wide // 2)


def _kept_of_layer(config: Mapping[str, Any]) -> int:
    """Numbers that a layer keeps for the backward pass, per token: fitted to Llama and Gemma."""
    hidden, inner = _number(config, "hidden_size"), _number(config, "intermediate_size")
    if experts := config.get("num_experts_per_tok"):
        inner = int(experts) * int(config.get("moe_intermediate_size") or inner)
    keys = _keys(config)
    queries = (
        keys * _number(config, "num_attention_heads") // max(1, int(config.get("num_key_value_heads") or 1))
    )
    return 9 * hidden + 4 * inner + 3 * (queries + keys)


def _keys(config: Mapping[str, Any]) -> int:
    heads = _number(config, "num_attention_heads")
    head = config.get("head_dim") or _number(config, "hidden_size") // heads
    return int(head) * int(config.get("num_key_value_heads") or heads)


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 < value < 2**40:
        raise ModelError(f"its config.json gives no {name}")
    return value
