"""What a training run does, as plain values: the part of a configuration that the training loop reads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gold.rollout.types import Sampling


@dataclass(frozen=True, init=False)
class Term:
    """One term of the loss: an objective by name, its weight, its options: ``Term("jsd", beta=0.1)``."""

    name: str
    weight: float
    options: dict[str, Any] = field(hash=False)

    def __init__(self, name: str, weight: float = 1.0, **options: Any) -> None:
        for field_, value in (("name", name), ("weight", weight), ("options", options)):
            object.__setattr__(self, field_, value)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, given the models and the prompts.

    ``on_policy`` is λ: the share of sequences that the student writes, in expectation; the others are the data's
    completions. A prompt has ``num_generations`` sequences of the student or one of the data (``student_writes``).
    ``precision``: ``auto`` is bf16 on a GPU that has it, else none.
    """

    objectives: tuple[Term, ...] = (Term("reverse_kl"),)
    sampling: Sampling = field(default_factory=Sampling)
    num_generations: int = 4
    on_policy: float = 1.0
    rollout_batch: int = 32
    steps: int = 100
    prompts_per_step: int = 8
    micro_batch_size: int = 8
    seed: int = 0
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 10
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    final_lr_share: float = 0.1
    max_grad_norm: float = 1.0
    precision: Literal["auto", "no", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    bad_steps_allowed: int = 3

    def student_writes(self, step: int, place: int) -> bool:
        """Whether the student completes the prompt at a place of a step; else its own completion is read.

        True with probability ``λ / (λ + num_generations (1 − λ))``, so that λ of the sequences are the student's: such
        a prompt has ``num_generations``, any other has one. A function of the seed, the step and the place.
        """
        share = self.on_policy / (self.on_policy + self.num_generations * (1.0 - self.on_policy))
        return bool(np.random.default_rng((self.seed, step, place, 1)).random() < share)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, then the schedule down to ``final_lr_share`` of
        ``lr`` at the last step. A function of the step alone, so there is no schedule to save."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps + 1) / max(1, self.steps - self.warmup_steps)
        left = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.lr * (self.final_lr_share + (1.0 - self.final_lr_share) * left)
