"""Training settings: the sections of a configuration that determine what the training loop computes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from gold.errors import ConfigError, did_you_mean
from gold.schema import (
    CountInt,
    Decay,
    NonNegative,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    Text,
    shown,
)
from gold.sections import CompletionSettings

if TYPE_CHECKING:
    from gold.rollout.types import Sampling


Names = Annotated[tuple[Text, ...], Field(strict=False)]


class Term(Section):
    """One term of the loss; besides these keys the objective's own options: `gold objectives` lists them."""

    model_config = ConfigDict(extra="allow")

    name: Text = "reverse_kl"
    """objective to minimise"""
    weight: NonNegative = 1.0
    """factor of this term"""

    def __init__(self, name: str = "reverse_kl", weight: float = 1.0, **options: Any) -> None:
        super().__init__(**{"name": name, "weight": weight, **options})

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @property
    def options(self) -> dict[str, Any]:
        """The objective's own options."""
        return dict(self.__pydantic_extra__ or {})

    def resolved(self) -> Term:
        """The term with all options of its objective, defaults included.

        Raises:
            ConfigError: an unknown objective or option, or a value that the option cannot take; begins with the key.
        """
        from gold.losses import find

        try:
            row = find(self.name)
        except ConfigError as error:
            raise ConfigError(f"name: {error}") from None
        for option in self.options:
            if option not in row.arguments and (meant := did_you_mean(option, Term.model_fields, "")):
                raise ConfigError(f"{option}: unknown key{meant}")
        return Term(self.name, self.weight, **row.resolve(self.options))


class Order(Section):
    """The order of the prompts."""

    order: Literal["shuffled", "kept"] = "shuffled"
    """shuffled: anew for every epoch; kept: as in the file, again and again"""


class Rollout(CompletionSettings):
    """How the student generates."""

    temperature: PositiveFloat = 1.0
    """sampling temperature"""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """nucleus sampling: the smallest set of tokens with this mass"""
    num_generations: PositiveInt = 4
    """completions per prompt"""
    on_policy: Share = 1.0
    """λ: expected share of sequences that the student writes; the rest are the data's completions, one per prompt"""
    policy: Literal["live", "initial"] = "live"
    """which student writes: as it is at each step; or as it starts, once for each prompt, before the first step"""
    staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """1: a step's completions are generated while the step before is learned from, with the weights before it"""
    importance_cap: PositiveFloat | None = 2.0
    """largest importance weight of completions that an engine or older weights drew; null: no weights"""
    cut: Literal["keep", "mask"] = "keep"
    """completions that reach the length limit: learned from, or left out of the loss"""
    thinking: Literal["compare", "mask"] = "compare"
    """thinking of the student: compared with the teacher in the teacher's own markers, or left out"""
    thinking_budget: PositiveInt | None = None
    """most tokens of thinking in a turn, after which it is ended for the student, in evaluations too; null: no limit"""


class Optimizer(Section):
    """AdamW and its schedule."""

    lr: PositiveFloat = 1e-5
    """highest learning rate"""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.95)
    """decay rates of AdamW's two moments"""
    weight_decay: NonNegative = 0.0
    """decoupled weight decay"""
    warmup_steps: CountInt = 10
    """steps of linear warm-up"""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """decay after the warm-up"""
    final_lr_share: Share = 0.1
    """learning rate of the last step, as a share of `lr`"""
    max_grad_norm: PositiveFloat = 1.0
    """largest norm of the gradient"""


def _boolean_or_auto(value: Any) -> Any:
    if isinstance(value, bool) or value == "auto":
        return value
    raise ValueError(f"expected true or false, or auto, got {shown(value)}")


BooleanOrAuto = Annotated[bool | Literal["auto"], BeforeValidator(_boolean_or_auto)]


class Training(Section):
    """The training loop."""

    steps: PositiveInt = 100
    """optimizer steps"""
    prompts_per_step: PositiveInt = 8
    """prompts per optimizer step"""
    micro_batch_size: PositiveInt = 8
    """sequences per forward and backward pass; the rest is accumulated"""
    micro_batch_tokens: PositiveInt | None = None
    """instead of micro_batch_size: most tokens per forward and backward pass, prompts and padding included"""
    packing: bool = False
    """texts of a pass of the student, a reference and teachers in one row without padding: a little less time"""
    seed: CountInt = 0
    """seed of prompt order and sampling"""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """mixed precision; auto: bf16 on a GPU that has it, else none"""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit: moments of 8 bits (bitsandbytes), 6 bytes per weight less"""
    gradient_checkpointing: BooleanOrAuto = "auto"
    """recompute activations in the backward pass: less memory, a third more time; auto: if they would not fit else"""
    sharding: Literal["none", "fsdp"] = "none"
    """with several processes, each has whole models, or shards of the weights and the optimizer's state (FSDP2)"""
    gradient_sync: Literal["microbatch", "step"] = "microbatch"
    """with fsdp, reduce gradients after every microbatch, or once a step, with whole weights and gradients meanwhile"""
    bad_steps_allowed: CountInt = 3
    """steps in a row with NaN or infinite loss or gradient before training stops"""


class LoRA(Section):
    """Low-rank adapters (peft) that are trained instead of the student's own weights; {} for the defaults."""

    rank: PositiveInt = 16
    """rank r of an adapter; a matrix becomes W + alpha / r · B A"""
    alpha: PositiveFloat = 32.0
    """scale of the adapters, divided by the rank"""
    targets: Names | None = None
    """names of the layers that get one, such as [q_proj, v_proj]; null: every linear layer except the output matrix"""
    modules_to_save: Names = ()
    """names of modules whose own weights are trained too, such as [lm_head]"""


Objectives = Annotated[tuple[Term, ...], Field(strict=False)]


class Recipe(Training, Optimizer, Rollout, Order):
    """All settings that determine what a run computes, given the models and the prompts: ``Recipe(steps=200,
    lr=3e-5)``.

    The arguments are the keys of a configuration's sections `rollout`, `optimizer` and `train`, its `objectives`, and
    `order`, its `data.order`.
    A prompt has ``num_generations`` sequences of the student or one of the data (``student_writes``).

    Raises:
        ConfigError: an unknown argument or a value that it cannot take.
    """

    objectives: Objectives = Field(default=(Term(),), kw_only=False)

    if not TYPE_CHECKING:

        def __init__(self, objectives: Sequence[Term] = (Term(),), **settings: Any) -> None:
            super().__init__(objectives=objectives, **settings)

        __init__.__pydantic_base_init__ = True

    def replace(self, **changes: Any) -> Recipe:
        """The recipe with other values for some arguments."""
        return Recipe(**{**dict(self), **changes})

    @property
    def sampling(self) -> Sampling:
        """The sampling parameters of completions."""
        from gold.rollout.types import Sampling

        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.thinking_budget)

    def student_writes(self, step: int, place: int) -> bool:
        """Whether the student completes prompt ``place`` of a step; else the data's completion is used.

        True with probability ``λ / (λ + num_generations (1 − λ))``, so that λ of the sequences are the student's: such
        a prompt has ``num_generations``, any other has one. A function of the seed, the step and the place.
        """
        if self.on_policy == 1:
            return True
        import numpy as np  # imported here: configurations need no numpy

        share = self.on_policy / (self.on_policy + self.num_generations * (1.0 - self.on_policy))
        return bool(np.random.default_rng((self.seed, step, place, 1)).random() < share)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, then the schedule down to ``final_lr_share`` of
        ``lr`` at the last step. A function of the step only, so there is no scheduler state."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps + 1) / max(1, self.steps - self.warmup_steps)
        left = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.lr * (self.final_lr_share + (1.0 - self.final_lr_share) * left)


def problems(recipe: Recipe, has_verifier: bool) -> Iterator[str]:
    """One line for each setting of a recipe that its objectives cannot be trained with; a line begins with the key."""
    from gold.losses import find

    active = {term.name: term.options for term in recipe.objectives if term.weight}
    if recipe.optimizer == "adamw8bit" and recipe.sharding == "fsdp":
        yield "train.optimizer: moments of 8 bits are not sharded: set it to adamw, or train.sharding to none"
    if not active:
        yield "objectives: none has a weight above 0: nothing would be learned"
    if recipe.staleness and recipe.importance_cap is not None:
        for key, value in (("temperature", recipe.temperature), ("top_p", recipe.top_p)):
            if value != 1:
                yield (
                    f"rollout.{key}: importance weights of older completions compare probabilities at 1: set it to 1, "
                    f"rollout.staleness to 0, or rollout.importance_cap to null, got {value:g}"
                )
    if recipe.policy == "initial" and recipe.staleness:
        yield (
            "rollout.staleness: completions of the initial student are drawn before the first step, and none later: "
            "set it to 0, or rollout.policy to live"
        )
    if recipe.policy == "initial" and recipe.on_policy == 0:
        yield "rollout.policy: with rollout.on_policy at 0 the student writes nothing: set it to live"
    for name in sorted(active):
        row = find(name)
        if row.needs_verifier and not has_verifier:
            yield f"objectives: {name} needs a verifier: train on a task (data.task), or leave {name} out"
        if row.needs_verifier and recipe.num_generations == 1:
            yield (
                f"rollout.num_generations: {name} compares completions of one prompt: it needs at least 2, got 1"
            )
        if name == "sft" and recipe.on_policy == 1:
            yield f"rollout.on_policy: {name} learns the data's completions, and at 1 none is used: set it below 1"
        if recipe.staleness and recipe.importance_cap is not None and not row.weighted:
            yield (
                f"rollout.staleness: {name} has no importance weights for completions of older weights: set it to 0, "
                "or rollout.importance_cap to null"
            )
        if not row.on_policy:
            continue
        weighted = recipe.importance_cap is not None or active[name].get("importance_cap") is not None
        if recipe.policy == "initial" and not weighted:
            yield (
                f"rollout.importance_cap: {name} is a policy gradient, and on completions of the initial student it "
                "needs importance weights: give a cap, or set rollout.policy to live"
            )
        if recipe.on_policy == 0:
            yield f"rollout.on_policy: {name} needs completions that the student writes, got 0"
        if recipe.top_p != 1:
            yield (
                f"rollout.top_p: {name} is a policy gradient over all tokens, and importance weights cannot recover "
                f"tokens that are never sampled: set it to 1, got {recipe.top_p:g}"
            )
        if recipe.temperature != 1 and active[name].get("importance_cap") is None:
            yield (
                f"rollout.temperature: {name} is a policy gradient at temperature 1: set it to 1, or give the "
                f"objective an importance_cap, got {recipe.temperature:g}"
            )
