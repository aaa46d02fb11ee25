"""What the memory of a run's steps depends on, and whether its activations are to be recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from gold.data import Prompt, characters_of
from gold.doctor.memory import Model, Plan, Quantization, device_memory, fits, memory_of
from gold.errors import DataError, ModelError
from gold.models.adapters import is_adapted
from gold.models.footprint import Adapters
from gold.models.hidden_states import decoder_layers
from gold.models.language_model import LanguageModel, output_width
from gold.models.quantization import KINDS, quantization_of
from gold.rollout.hf import HuggingFaceEngine
from gold.train.recipe import Recipe, Term
from gold.train.setup import Setup
from gold.train.trackers import Tracker

TEACHER_TOKENS = 16384
"""Tokens of a teacher's pass without `teacher.batch_tokens`."""


def plan_for(recipe: Recipe, student: Model, prompt_tokens: int, **others: Any) -> Plan:
    """The plan of a recipe for a student; ``others`` are further fields of ``Plan``."""
    tokens = prompt_tokens + recipe.max_new_tokens
    at_most = recipe.micro_batch_tokens
    return Plan(
        student,
        sequences=recipe.micro_batch_size if at_most is None else max(1, at_most // tokens),
        by_tokens=at_most is not None,
        tokens=tokens,
        new_tokens=recipe.max_new_tokens,
        step_sequences=recipe.prompts_per_step * recipe.num_generations,
        generation_batch=recipe.generation_batch_size,
        gradient_checkpointing=recipe.gradient_checkpointing is True,
        moments=2 if recipe.optimizer == "adamw8bit" else 8,
        blocks=_blocks(recipe.objectives),
        sharding=recipe.sharding,
        gradient_sync=recipe.gradient_sync,
        **others,
    )


def longest_prompt(prompts: Sequence[Prompt]) -> Prompt:
    """The prompt with most characters."""
    return prompts[int(characters_of(prompts).argmax())]


def plan_of(setup: Setup, processes: int = 1) -> Plan:
    """The plan of a run whose models are loaded, in so many processes."""
    recipe, student = setup.recipe, setup.student
    try:
        prompt = len(student.prompt_ids(longest_prompt(setup.prompts)))
    except DataError:  # left out of the run
        prompt = 0
    lm, device = student.lm, student.device
    here = [t for t in setup.members.values() if t.model is not None and t.device == device]
    models = [t.model for t in here if t.model is not None]
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return plan_for(
        recipe,
        _model(student),
        prompt,
        teachers=tuple(_model(model) for model in models if not _shares(model, student)),
        lora=_adapters(lm),
        teacher_tokens=min((t.batch_tokens or TEACHER_TOKENS for t in here), default=TEACHER_TOKENS),
        autocast=recipe.precision == "bf16" or (recipe.precision == "auto" and bf16),
        copies=int(setup.needs_reference and not is_adapted(lm)),
        wide=max(output_width(lm), *(t.vocabulary.size for t in setup.members.values()), 1),
        generates=recipe.on_policy > 0 and isinstance(setup.engine, HuggingFaceEngine),
        gpus=processes,
        on_gpu=device.type != "cpu",
        trained_weights=sum(p.numel() for p in lm.parameters() if p.requires_grad),
    )


def settled(setup: Setup, tracker: Tracker, processes: int = 1) -> Recipe:
    """The recipe with ``gradient_checkpointing`` true or false; ``auto`` becomes true if the step would need more
    memory than the device has, by the rule of `gold doctor` (``gold.doctor.memory``), which is noted.

    It depends on the recipe, the models, the longest prompt and the device's whole memory, not on what is free, so that
    a resumed run decides the same. A model whose sizes are unknown is not recomputed.
    """
    recipe = setup.recipe
    if recipe.gradient_checkpointing != "auto":
        return recipe
    has = device_memory(setup.student.device)
    if has is None or not decoder_layers(setup.student.lm):
        return recipe.replace(gradient_checkpointing=False)
    try:
        plan = plan_of(setup, processes)
        if fits(plan, has):
            return recipe.replace(gradient_checkpointing=False)
        memory = memory_of(plan)
    except ModelError:
        return recipe.replace(gradient_checkpointing=False)
    gib = [f"{size / 2**30:.1f} GiB" for size in (memory.peak, memory.of("activations"), has)]
    tracker.note(
        f"activations are recomputed in the backward pass: a step would need about {gib[0]} ({gib[1]} of "
        f"activations), and the device has {gib[2]}; train.gradient_checkpointing sets it"
    )
    return recipe.replace(gradient_checkpointing=True)


def _model(model: LanguageModel) -> Model:
    kind = quantization_of(model.lm)
    config = model.lm.config.get_text_config().to_dict()
    held = cast(Quantization, kind) if kind in KINDS else None
    return Model(model.name, config, str(model.lm.dtype), held)


def _adapters(lm: Any) -> Adapters | None:
    """The adapters of a loaded model; those that are not low-rank matrices as if they were of rank 16."""
    if not is_adapted(lm):
        return None
    found = lm.peft_config[lm.active_adapter]
    targets = getattr(found, "target_modules", None)
    names = None if targets is None or isinstance(targets, str) else tuple(sorted(targets))
    return Adapters(getattr(found, "r", 16), names, tuple(getattr(found, "modules_to_save", None) or ()))


def _shares(model: LanguageModel, student: LanguageModel) -> bool:
    """Whether a model shares its first weight with the student, as a copy with an adapter of its own does."""
    weights = (next(iter(each.lm.parameters())) for each in (model, student))
    return len({w.data_ptr() for w in weights}) == 1


def _blocks(terms: Sequence[Term]) -> int:
    """Blocks of logits that the loss holds at a time."""
    on = {str(term.options.get("support")) for term in terms if term.weight}
    return 1 if on == {"bytes"} else 4 if "prefixes" in on else 2
