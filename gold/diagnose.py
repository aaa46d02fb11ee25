"""`gold doctor` for a configuration: its pairs, judged by its own prompts, and problems that would stop a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from gold.build import (
    RunData,
    absent_teacher,
    check_model,
    graded_by,
    is_student,
    load,
    load_data,
    rendering_of,
    roles_of,
    rollout_engine,
    served_teacher,
    try_engine,
    with_cache,
)
from gold.config import Config, ModelConfig
from gold.data import Prompt
from gold.doctor.finding import Finding, Report
from gold.doctor.prompts import PromptReader, examine_prompts
from gold.doctor.report import combined, diagnose
from gold.doctor.sample import run_texts
from gold.doctor.server import compare_with_student, examine_noise, examine_server
from gold.doctor.side import Side
from gold.errors import GoldError, ModelError
from gold.losses import Need
from gold.models.language_model import LanguageModel
from gold.teachers.protocol import Teacher
from gold.teachers.several import Teachers
from gold.tokenize.chat import prompt_text
from gold.tokenize.vocabulary import Vocabulary
from gold.train.preflight import check_kept, check_recipe
from gold.train.setup import pairs_of, terms_of


def diagnose_run(
    source: Path, *, weights: bool = False, sequences: int | None = None, tokens: int | None = None
) -> Report:
    """The report on a configuration's pairs; with several teachers each check names its teacher.

    Raises:
        GoldError: as for ``gold.build.train``.
    """
    config = Config.load(source)
    data = load_data(config)
    tokens = tokens or config.rollout.max_new_tokens
    at_most = config.train.micro_batch_tokens
    sizes = sequences or (max(1, at_most // tokens) if at_most else config.train.micro_batch_size), tokens
    reports = {name: _diagnosed(config, data, name, weights, sizes) for name in config.named_teachers}
    known = [check.found for report in reports.values() for check in report.checks]
    files = [check for check in _files(config) if not any(found.endswith(check.found) for found in known)]
    files += _engine(config, data, weights)
    of_run = _of_run(config, data, {name: report.sides for name, report in reports.items()})
    report = combined(reports)
    return replace(report, checks=[*report.checks, *files, *of_run])


def _diagnosed(config: Config, data: RunData, name: str, weights: bool, sizes: tuple[int, int]) -> Report:
    """The report on the student and one teacher."""
    teacher = config.named_teachers[name]
    model: ModelConfig = config.student if teacher.kind == "self" else teacher
    prompts = graded_by(config, data, name)
    here = teacher.kind in ("self", "local")
    loaded: list[LanguageModel] = []

    def load_both() -> tuple[LanguageModel, LanguageModel | None]:
        for each in (config.student, *([model] if here else [])):
            check_model(each)
        loaded.append(load(config.student))
        return loaded[0], load(model) if here else None

    report = diagnose(
        config.student.source,
        model.source,
        roles=(roles_of(config.student), roles_of(model)),
        renderings=(rendering_of(config.student), rendering_of(model)),
        dtypes=(config.student.dtype, model.dtype),
        quantizations=(config.student.quantization, model.quantization),
        lora=config.student.lora.model_dump() if config.student.lora else None,
        texts=run_texts(prompts),
        prompt=max((prompt_text(p) for p in prompts), key=len),
        sequences=sizes[0],
        tokens=sizes[1],
        load=load_both if weights else None,
        served=not here,
    )
    if teacher.kind != "served":
        return report
    served = served_teacher(teacher)
    checks = examine_server(served, prompts)
    if all(check.status != "fail" for check in checks):
        checks += (
            compare_with_student(served, prompts, loaded[0], is_student=is_student(config, name))
            if loaded
            else [examine_noise(served, prompts)]
        )
    return replace(report, checks=[*report.checks, *checks])


def _engine(config: Config, data: RunData, weights: bool) -> list[Finding]:
    """What the probe of a run's engine finds: of a running server, and with ``weights`` of one that is started."""
    given = config.rollout.engine.vllm
    if given is None or (given.url is None and not weights):
        return []
    try:
        check_model(config.student)
        student = load(config.student)
        with rollout_engine(config, config.student) as engine:
            assert engine is not None
            try_engine(engine, student, data.train)
    except GoldError as error:
        return [Finding("rollout engine", "fail", str(error))]
    return [Finding("rollout engine", "pass", "vLLM draws from the weights that are pushed to it")]


def _files(config: Config) -> list[Finding]:
    """Models that a run would reject: missing or broken files, other kinds of models, missing devices."""
    checks = []
    for model in (config.student, *(t for t in config.named_teachers.values() if t.kind == "local")):
        try:
            check_model(model)
        except ModelError as error:
            checks.append(Finding("files", "fail", str(error)))
    return checks


@dataclass
class _Absent(Teacher):
    """A teacher that is not loaded, with the attributes that the checks of a recipe need."""

    name: str
    gives: Need
    vocabulary: Vocabulary
    device: Any = None


def _of_run(config: Config, data: RunData, sides: Mapping[str, tuple[Side, ...]]) -> list[Finding]:
    """What a run would reject or note about its objectives and prompts, from both sides' files."""
    if not all(sides.values()):
        return []  # reported by another check
    mine = next(iter(sides.values()))[0]
    named, several = config.named_teachers, len(config.named_teachers) > 1
    readers = [PromptReader("student", mine.name, mine.tokenizer, mine.marked, mine.rendering, mine.context)]
    absent: dict[str, Any] = {}
    for name, (_, side) in sides.items():
        limits = named[name].served or named[name].cache
        gives: Need = "rows" if limits is None else "tokens" if limits.top_k == 0 else "top_k"
        absent[name] = _Absent(side.name, gives, side.marked)
        role, graded = f"teacher {name}" if several else "teacher", partial(_is_graded_by, config.route, name)
        readers.append(
            PromptReader(role, side.name, side.tokenizer, side.marked, side.rendering, side.context, graded)
        )
    checks, recipe, what = [], config.recipe, "objectives"
    student = cast(LanguageModel, readers[0])  # only its vocabulary and prompts are used
    try:
        check_recipe(recipe, data.train, data.verifier, 1)
        pairs = pairs_of(student, teachers := Teachers(absent, config.mix))
        terms = terms_of(recipe, teachers, pairs)
        what = "cache"
        alone = {
            name: with_cache(teacher, absent_teacher(teacher))
            for name, teacher in named.items()
            if teacher.kind == "cache"
        }
        if any(term.objective.needs != "nothing" for term in terms):
            check_kept(Teachers(absent | alone, config.mix), student, pairs, data.train, recipe)
    except GoldError as error:
        checks.append(Finding(what, "fail", str(error)))
    return [*checks, *examine_prompts(data.train, data.heldout, readers, recipe.max_new_tokens)]


def _is_graded_by(route: str | None, name: str, prompt: Prompt) -> bool:
    return route is None or prompt.route == name
