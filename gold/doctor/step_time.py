"""Time of a step by phase, from counted operations and bytes and the rates of a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from gold.doctor.memory import Plan

_UPDATE_BYTES = 28
"""AdamW reads weight, gradient and two moments of float32, and writes the weight and the moments."""


@dataclass(frozen=True)
class Work:
    """What one GPU does in a phase: floating-point operations, and bytes of weights that it reads at least."""

    phase: str
    flops: float
    bytes: float = 0.0

    def seconds(self, tflops: float | None, bandwidth: float | None) -> float | None:
        """The longer of both at ``tflops`` and ``bandwidth`` (GB/s); None if a rate that it needs is unknown."""
        if (self.flops and not tflops) or (self.bytes and not bandwidth):
            return None
        return max(self.flops / ((tflops or 1.0) * 1e12), self.bytes / ((bandwidth or 1.0) * 1e9))


def work_of(plan: Plan) -> list[Work]:
    """The work of a step, as if all sequences were ``plan.tokens`` long: two operations a parameter and token in a
    forward pass, four in a backward pass. Attention's own products are not counted.
    """
    student = plan.student.sizes.parameters
    rows = plan.own_sequences * plan.tokens
    passes = 6 if plan.lora is None else 4  # frozen weights have no gradient of their own
    passes += 2 * plan.gradient_checkpointing
    width = 2 if plan.autocast else plan.student.width
    draws = plan.new_tokens * -(-plan.own_sequences // plan.generation_batch)
    rollout = Work("rollout", 2.0 * student * rows, float(draws) * student * width)
    return [
        *([rollout] if plan.generates and plan.each_step else []),
        *(
            [Work("teacher", 2.0 * rows * sum(t.sizes.parameters for t in plan.teachers))]
            if plan.teachers
            else []
        ),
        Work("student", float(passes) * student * rows),
        Work("update", 0.0, float(_UPDATE_BYTES) * plan.trained / plan.shards),
    ]
