"""Changes of a run's settings that make its memory fit, those first that change least of what is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gold.doctor.memory import Memory, Plan, Quantization, memory_of
from gold.errors import ModelError
from gold.models.footprint import Adapters

_LEAST = 0.01
"""Smallest share of the peak that a change must save to be proposed."""
_MOST_GPUS = 64


@dataclass(frozen=True)
class Change:
    """One change of settings, what it costs, and the memory that is needed with it and all changes before it."""

    settings: str
    cost: str
    plan: Plan
    memory: Memory


def changes_to_fit(plan: Plan, limit: int) -> list[Change]:
    """Changes in the order in which to make them, until a GPU needs at most ``limit`` bytes; all that help if it never
    does. Empty if nothing has to change.

    Raises:
        ModelError: as ``memory_of``.
    """
    found: list[Change] = []
    memory = memory_of(plan)
    for propose in _PROPOSALS:
        for settings, cost, changed in propose(plan, limit):
            if memory.peak <= limit:
                return found
            try:
                now = memory_of(changed)
            except ModelError:  # such as adapters without peft
                continue
            if now.peak < memory.peak * (1 - _LEAST):
                plan, memory = changed, now
                if found and found[-1].settings.partition("=")[0] == settings.partition("=")[0]:
                    del found[-1]  # another value of the same key
                found.append(Change(settings, cost, plan, memory))
    return found


Proposed = Iterator[tuple[str, str, Plan]]


def _checkpointing(plan: Plan, limit: int) -> Proposed:
    if not plan.gradient_checkpointing:
        changed = replace(plan, gradient_checkpointing=True)
        yield "train.gradient_checkpointing=true", "a third more time of the student's passes", changed


def _micro_batch(plan: Plan, limit: int) -> Proposed:
    sizes = _halved(plan.sequences)
    if sizes and memory_of(plan).phase in ("loss", "backward"):
        size = _largest(sizes, lambda n: replace(plan, sequences=n), limit)
        key = "train.micro_batch_size"
        if plan.by_tokens:
            key, value = "train.micro_batch_tokens", size * plan.tokens
        else:
            value = size
        yield f"{key}={value}", "the same losses, smaller matrix products", replace(plan, sequences=size)


def _generation_batch(plan: Plan, limit: int) -> Proposed:
    batch = min(plan.generation_batch, plan.own_sequences)
    if plan.generates and (sizes := _halved(batch)) and memory_of(plan).phase == "rollout":
        size = _largest(sizes, lambda n: replace(plan, generation_batch=n), limit)
        changed = replace(plan, generation_batch=size)
        yield f"rollout.generation_batch_size={size}", "slower rollouts", changed


def _teacher_batch(plan: Plan, limit: int) -> Proposed:
    if plan.teachers and memory_of(plan).phase == "teacher":
        size = max(plan.tokens, 2048)
        yield f"teacher.batch_tokens={size}", "the same scores", replace(plan, teacher_tokens=size)


def _sharding(plan: Plan, limit: int) -> Proposed:
    if plan.gpus > 1 and plan.can_shard and plan.sharding == "none":
        yield "train.sharding=fsdp", "traffic between the GPUs", replace(plan, sharding="fsdp")
    if plan.gpus > 1 and plan.gradient_sync == "step":
        yield "train.gradient_sync=microbatch", "more traffic", replace(plan, gradient_sync="microbatch")


def _quantized_teacher(plan: Plan, limit: int) -> Proposed:
    kinds: tuple[tuple[Quantization, str], ...] = (
        ("int8", "a slightly different teacher"),
        ("nf4", "a more different teacher"),
    )
    for kind, cost in kinds:
        teachers = tuple(replace(t, quantization=t.quantization or kind) for t in plan.teachers)
        if teachers != plan.teachers:
            yield f"teacher.quantization={kind}", cost, replace(plan, teachers=teachers)


def _adapters(plan: Plan, limit: int) -> Proposed:
    if plan.lora is not None:
        return
    adapted = replace(plan, lora=Adapters(rank=16), copies=0)
    if plan.student.width > 2 and plan.on_gpu:
        adapted = replace(adapted, student=replace(plan.student, dtype="bfloat16"))
        yield "student.lora={} student.dtype=bfloat16", "adapters alone are trained", adapted
    else:
        yield "student.lora={}", "adapters alone are trained", adapted


def _quantized_student(plan: Plan, limit: int) -> Proposed:
    if plan.lora is not None and plan.student.quantization is None and not plan.sharded:
        student = replace(plan.student, quantization="nf4")
        yield (
            "student.quantization=nf4",
            "a slightly different student, slower",
            replace(plan, student=student),
        )


def _served_teacher(plan: Plan, limit: int) -> Proposed:
    if plan.teachers:
        wide = max(plan.wide, *(t.sizes.rows for t in plan.teachers))
        changed = replace(plan, teachers=(), wide=wide)
        yield "teacher.served={url: …, model: …}", "GPUs of its own; its likeliest tokens only", changed


def _more_gpus(plan: Plan, limit: int) -> Proposed:
    if not plan.can_shard:
        return
    gpus = 2 * plan.gpus
    while gpus <= _MOST_GPUS:
        changed = replace(plan, gpus=gpus, sharding="fsdp")
        if gpus == _MOST_GPUS or memory_of(changed).peak <= limit:
            yield f"{gpus} GPUs with train.sharding=fsdp", f"{gpus // plan.gpus} times the GPUs", changed
            return
        gpus *= 2


_PROPOSALS: tuple[Callable[[Plan, int], Proposed], ...] = (
    *(_checkpointing, _micro_batch, _generation_batch, _teacher_batch, _sharding),
    *(_quantized_teacher, _adapters, _quantized_student, _served_teacher, _more_gpus),
)


def _halved(size: int) -> list[int]:
    """The size halved again and again, down to 1."""
    sizes = []
    while size > 1:
        size //= 2
        sizes.append(size)
    return sizes


def _largest(sizes: list[int], changed: Callable[[int], Plan], limit: int) -> int:
    """The largest size that fits, else the smallest."""
    if memory_of(changed(sizes[-1])).peak > limit:
        return sizes[-1]
    return next(size for size in sizes if memory_of(changed(size)).peak <= limit)
