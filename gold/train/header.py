"""The header of a run: what it trains, from whom, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gold.doctor.prompts import PromptReader
from gold.kernels import backend_for
from gold.models.adapters import describe, is_adapted
from gold.models.language_model import LanguageModel
from gold.models.quantization import quantization_of
from gold.rollout.engine import DescribedEngine
from gold.teachers.several import Teachers
from gold.tokenize.vocabulary import Vocabulary
from gold.train.setup import Setup
from gold.train.state import TrainState


def header(state: TrainState, setup: Setup) -> dict[str, str]:
    """Summary of the run in a few named lines."""
    recipe, student, teachers = setup.recipe, state.student, setup.teachers
    terms = ", ".join(f"{t.weight:g} × {t.label}" if t.weight != 1 else t.label for t in setup.terms)
    by_token = teachers and any(t.label.endswith("_tokens") for t in setup.terms)
    lines = {
        "student": f"{student.name} ({_described(student.vocabulary)}, {student.device}"
        f"{_quantized(student)}{_own_code(student)})"
    }
    for name, t in teachers.members.items() if teachers else ():
        share = f", weight {teachers.weight(name):.3g}" if teachers and teachers.mix else ""
        own = _quantized(t.model) + _own_code(t.model) if t.model else ""
        key = f"teacher {name}" if teachers and teachers.several else "teacher"
        lines[key] = f"{t.name} ({_described(t.vocabulary)}, {t.device}{share}{own})"
    if is_adapted(student.lm):
        lines["adapter"] = describe(student.lm)
    if teachers is None:
        lines["teacher"] = "none"
    elif teachers.several:
        rule = teachers.mix.rule.replace("_", "-") if teachers.mix else ""
        lines["teachers"] = f"{rule} mix of all" if rule else "each prompt has its own"
    return {
        **lines,
        **({"rollouts": setup.engine.description} if isinstance(setup.engine, DescribedEngine) else {}),
        "objective": terms + (" (one vocabulary: token by token)" if by_token else ""),
        "step": f"{recipe.prompts_per_step} prompts × {recipe.num_generations}, λ = {recipe.on_policy:g}, "
        f"{'completions of the initial student, ' if recipe.policy == 'initial' else ''}"
        f"up to {recipe.max_new_tokens} tokens, {state.accelerator.num_processes} process(es), "
        f"precision {state.accelerator.mixed_precision}",
        "kernels": backend_for(student.device).__name__.rpartition(".")[2],
    }


def _described(vocabulary: Vocabulary) -> str:
    """Size and stop tokens."""
    stops = ", ".join(vocabulary.label(i) for i in vocabulary.stop_ids) or "nothing"
    return f"{vocabulary.size:,} tokens, stops at {stops}"


def _quantized(model: LanguageModel) -> str:
    kind = quantization_of(model.lm)
    return f", {kind}" if kind else ""


def _own_code(model: LanguageModel) -> str:
    return ", runs code of its own: trust_remote_code" if model.runs_own_code else ""


def settings_of(setup: Setup, readers: Sequence[PromptReader]) -> dict[str, Any]:
    """The config.yaml of a run from Python."""
    arguments = {r.role: dict(r.rendering.arguments) for r in readers if r.rendering.arguments}
    return {
        "recipe": setup.recipe.model_dump(mode="json"),
        "student": setup.student.name,
        "teacher": _names(setup.teachers),
        **({"template_kwargs": arguments} if arguments else {}),
    }


def _names(teachers: Teachers | None) -> Any:
    if teachers is None:
        return None
    if not teachers.several:
        return next(t.name for t in teachers.members.values())
    names = {name: t.name for name, t in teachers.members.items()}
    return {**names, **({"mix": asdict(teachers.mix)} if teachers.mix else {})}
