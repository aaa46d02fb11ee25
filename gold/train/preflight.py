"""Checks before a run: recipe, prompts, the date of chat templates, a cache's contents."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object

from gold.align.model_inputs import aligned_text
from gold.align.vocabularies import VocabularyPair
from gold.data import Prompt, examined, lacking_completion
from gold.doctor.prompts import PromptReader, limits_of
from gold.errors import CheckpointError, ConfigError, DataError
from gold.models.first_process import from_first
from gold.models.language_model import LanguageModel
from gold.models.packing import allow_packing
from gold.models.probe import check_packing
from gold.prompt_order import PromptOrder
from gold.rollout.engine import ProbedEngine, RolloutEngine, completed
from gold.rollout.prompts import encode_prompt
from gold.rollout.types import Rollout
from gold.teachers.several import Teachers
from gold.tokenize.templates import Rendering
from gold.train.optimizer import check_installed
from gold.train.recipe import Recipe, problems

DATE_FILE = "template_date.txt"
"""File of a run folder with the date that chat templates print, if one of them prints the date."""


def accelerator_of(precision: str, device: torch.device) -> Accelerator:
    """The accelerator of a run, which knows its processes and its precision."""
    # Accelerate keeps the precision of a process's first run; a later run may need another.
    AcceleratorState._reset_state()
    # gold shards itself (``train.sharding``); accelerate and transformers read this too.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision)


def check_recipe(recipe: Recipe, prompts: Sequence[Prompt], verifier: object | None, processes: int) -> None:
    """Checks that the recipe can be trained on these prompts.

    Raises:
        DataError: no prompts, or none with the completions that the recipe needs.
        ConfigError: settings that do not go together.
    """
    if not prompts:
        raise DataError("no prompts to train on; give at least one")
    check_launcher(recipe)
    if recipe.prompts_per_step < processes:
        raise ConfigError(
            f"train.prompts_per_step is {recipe.prompts_per_step} for {processes} processes; each needs at least one"
        )
    if recipe.on_policy < 1.0 and (lacking := lacking_completion(prompts)):
        raise DataError(
            f"prompt {lacking[0].key} (one of {len(lacking)}) has no completion, and rollout.on_policy is "
            f"{recipe.on_policy:g}; give every prompt one, or set it to 1"
        )
    check_installed(recipe.optimizer)
    if found := list(problems(recipe, has_verifier=verifier is not None)):
        raise ConfigError(*found)


def pack_texts(recipe: Recipe, student: LanguageModel, teachers: Teachers | None) -> None:
    """Sets up the student and the teachers in this process as ``train.packing`` says.

    Raises:
        ModelError: one of them cannot read packed texts.
    """
    members = list(teachers.members.values()) if teachers else []
    if recipe.packing:
        for model in (student, *(t.model for t in members if t.model is not None)):
            trial = partial(check_packing, model.lm, model.name)
            if model.shards_on is None:
                trial()
            else:
                from_first(trial)
                allow_packing(model.lm)
    for teacher in members:
        if teacher.model is not None:
            teacher.packed = recipe.packing


def check_launcher(recipe: Recipe) -> None:
    """Checks what the configuration of ``accelerate launch`` asks for.

    Raises:
        ConfigError: an engine other than FSDP, or FSDP without ``train.sharding``.
    """
    for name in ("DeepSpeed", "Megatron-LM"):
        if _launched_with(f"ACCELERATE_USE_{name.upper().replace('-', '_')}"):
            raise ConfigError(
                f"train.sharding: accelerate's configuration asks for {name}, whose engine steps after every "
                "microbatch, also where a gradient is not finite; take it out, and set train.sharding=fsdp (FSDP2)"
            )
    if _launched_with("ACCELERATE_USE_FSDP") and recipe.sharding != "fsdp":
        raise ConfigError(
            "train.sharding: accelerate's configuration asks for FSDP, and this is none; set train.sharding=fsdp, or "
            "take FSDP out of accelerate's"
        )


def _launched_with(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def readers_of(student: LanguageModel, teachers: Teachers | None) -> list[PromptReader]:
    """The encoders of prompts: the student, and the teachers with a local tokenizer."""
    readers = [
        PromptReader(
            "student",
            student.name,
            student.tokenizer,
            student.vocabulary,
            student.rendering,
            student.context,
            limits=_limits(student),
        )
    ]
    for name, teacher in teachers.members.items() if teachers else ():
        if teacher.tokenizer is not None:
            readers.append(
                PromptReader(
                    f"teacher {name}" if teachers and teachers.several else "teacher",
                    teacher.name,
                    teacher.tokenizer,
                    teacher.vocabulary,
                    teacher.rendering or Rendering(),
                    teacher.context,
                    partial(_grades, teachers, name),
                    teacher.adapt_prompt,
                    _limits(teacher.model) if teacher.model is not None else {},
                )
            )
    return readers


def _limits(model: LanguageModel) -> dict[int, tuple[str, str]]:
    return limits_of(model.tokenizer, model.lm.config.get_text_config().to_dict())


def _grades(teachers: Teachers | None, name: str, prompt: Prompt) -> bool:
    return teachers is not None and name in teachers.of(prompt)


def pin_date(
    student: LanguageModel,
    teachers: Teachers | None,
    kept: date | None = None,
    accelerator: Accelerator | None = None,
) -> date:
    """The date that all chat templates print from now on: that of the resumed run, else the date of a teacher's cache,
    else today. A cached teacher's templates always use the date of its cache."""
    members = list(teachers.members.values()) if teachers else []
    day = kept or next((t.pinned_date for t in members if t.pinned_date), None) or date.today()
    if accelerator is not None and accelerator.num_processes > 1:
        day = gather_object([day])[0]  # processes may start on different sides of midnight
    student.rendering.pin_day(day)
    # Members with a pinned date last: several may share one model.
    for teacher in sorted(members, key=lambda t: t.pinned_date is not None):
        teacher.pin_date(day)
    return day


def read_date(folder: Path) -> date | None:
    """The date that a run's templates print, if it is stored.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = folder / DATE_FILE
    try:
        return date.fromisoformat(file.read_text("utf-8").strip()) if file.exists() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} holds no date such as 2026-11-29: {error}") from error


def write_date(folder: Path, day: date) -> None:
    """Stores the date for a resumption.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        (folder / DATE_FILE).write_text(f"{day.isoformat()}\n", "utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {folder / DATE_FILE}: {error.strerror or error}") from error


def check_lengths(
    engine: RolloutEngine | None, student: LanguageModel, prompts: Sequence[Prompt], max_new_tokens: int
) -> None:
    """Checks that an engine with a context of its own has room for the prompts that the student has room for; of very
    many prompts, for some drawn ones and the longest.

    Raises:
        EngineError: it has not.
    """
    if not isinstance(engine, ProbedEngine):
        return
    longest = 0
    for prompt in examined(prompts):
        with contextlib.suppress(DataError):  # skipped in the run
            longest = max(longest, len(encode_prompt(student, prompt, max_new_tokens)))
    if longest:
        engine.check_length(longest, max_new_tokens)


def check_kept(
    teachers: Teachers | None,
    student: LanguageModel,
    pairs: Mapping[str, VocabularyPair],
    prompts: Sequence[Prompt],
    recipe: Recipe,
) -> None:
    """Checks that a cache without a model contains everything that a run on the data's completions will request.

    Raises:
        TeacherError: it does not; the message gives the number of missing entries.
    """
    if teachers is None or recipe.on_policy > 0 or all(t.complete for t in teachers.members.values()):
        return
    order = PromptOrder.of(prompts, recipe.seed, recipe.order)
    steps = (order.batch(step, recipe.prompts_per_step) for step in range(recipe.steps))
    needed = [prompts[i] for i in sorted(set().union(*steps))]
    check_scored(teachers, pairs, [completed(student, p, recipe.max_new_tokens) for p in needed])


def check_scored(
    teachers: Teachers, pairs: Mapping[str, VocabularyPair], rollouts: Sequence[Rollout]
) -> None:
    """Checks that caches without a model have the scores of these texts.

    Raises:
        TeacherError: one has not; the message gives the number of missing entries.
    """
    for name, teacher in teachers.members.items():
        if teacher.complete:
            continue
        given = [r for r in rollouts if name in teachers.of(r.prompt)]
        texts = [aligned_text(rollout, pairs[name]) for rollout in given]
        kept = [
            (r.prompt.for_teacher, t)
            for r, t in zip(given, texts, strict=True)
            if not teacher.misfit(r.prompt, t.teacher.ids.size)
        ]
        teacher.check_kept([p for p, _ in kept], [t.teacher for _, t in kept], [t.stopped for _, t in kept])
