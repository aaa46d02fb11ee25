"""`gold doctor` for a configuration: its pairs, judged by its own prompts, and problems that would stop a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from gold.build import (
    absent_teacher,
    check_model,
    evaluation_of,
    is_student,
    load,
    rendering_of,
    roles_of,
    rollout_engine,
    served_teacher,
    try_engine,
    with_cache,
)
from gold.build_data import RunData, graded_by, load_data
from gold.config import Config, ModelConfig
from gold.data import Prompt
from gold.doctor.finding import Finding, Report
from gold.doctor.memory import Model, Plan, memory_of
from gold.doctor.memory_table import Hardware, examine_memory, measured
from gold.doctor.prompts import PromptReader, examine_prompts
from gold.doctor.report import combined, diagnose
from gold.doctor.sample import run_texts
from gold.doctor.server import compare_with_student, examine_noise, examine_server
from gold.doctor.side import Side
from gold.errors import GoldError, ModelError
from gold.losses import Need
from gold.models.footprint import Adapters
from gold.models.language_model import LanguageModel
from gold.teachers.protocol import Teacher
from gold.teachers.several import Teachers
from gold.tokenize.chat import prompt_text
from gold.tokenize.vocabulary import Vocabulary
from gold.train.loop import pace_of
from gold.train.preflight import check_kept, check_lengths, check_recipe
from gold.train.setup import pairs_of, terms_of


def diagnose_run(
    source: Path,
    overrides: Sequence[str] = (),
    *,
    weights: bool = False,
    sequences: int | None = None,
    tokens: int | None = None,
    hardware: Hardware | None = None,
) -> Report:
    """The report on a configuration's pairs; with several teachers each check names its teacher. With ``hardware``,
    also the memory that the run needs on it, instead of the check of this machine's.

    Raises:
        GoldError: as for ``gold.build.train``.
    """
    config = Config.load(source, overrides)
    data = load_data(config)
    tokens = tokens or config.rollout.max_new_tokens
    at_most = config.train.micro_batch_tokens
    sizes = sequences or (max(1, at_most // tokens) if at_most else config.train.micro_batch_size), tokens
    loaded = _Loaded()
    reports = {name: _diagnosed(config, data, name, weights, sizes, loaded) for name in config.named_teachers}
    known = [check.found for report in reports.values() for check in report.checks]
    files = [check for check in _files(config) if not any(found.endswith(check.found) for found in known)]
    files += _engine(config, data, weights)
    of_run = _of_run(config, data, {name: report.sides for name, report in reports.items()})
    report = combined(reports)
    duration = _duration(config, data, loaded) if not any(each.failures for each in reports.values()) else []
    read = [Finding("data", "pass", note) for note in data.notes]
    report = replace(report, checks=[*report.checks, *files, *read, *of_run, *duration])
    sides = {name: each.sides for name, each in reports.items()}
    if hardware is None or not all(sides.values()):
        return report
    if loaded.models:
        hardware = measured(hardware, loaded.models["student"], *sizes)
    found = examine_memory(plan_of(config, data, sides, sizes, hardware), hardware)
    kept = [check for check in report.checks if check.check != "memory"]
    return replace(report, checks=[*kept, found.finding()], of_run=found)


@dataclass
class _Loaded:
    """The models that were loaded, the student and each teacher by its name, and the student's trained weights."""

    models: dict[str, LanguageModel] = field(default_factory=dict)
    trained: list[Any] = field(default_factory=list)

    def add(self, name: str, model: LanguageModel) -> None:
        """One more model, in place of an earlier one of that name."""
        self.models[name] = model
        if name == "student":
            self.trained = [weight for weight in model.lm.parameters() if weight.requires_grad]


def plan_of(
    config: Config,
    data: RunData,
    sides: Mapping[str, tuple[Side, ...]],
    sizes: tuple[int, int],
    hardware: Hardware,
) -> Plan:
    """What the memory of a run depends on; microbatches are of ``sizes`` sequences and new tokens."""
    mine = next(iter(sides.values()))[0]
    prompt = max((prompt_text(p) for p in data.train), key=len, default="")
    train, given, recipe = config.train, config.student, config.recipe
    lora = (
        None
        if given.lora is None
        else Adapters(given.lora.rank, given.lora.targets, given.lora.modules_to_save)
    )
    named = config.named_teachers
    here = {name: t for name, t in named.items() if t.kind == "local"}
    copies = sum(t.kind == "self" for t in named.values())
    copies += any(term.name == "reference_kl" and term.weight for term in config.objectives)
    engine = config.rollout.engine.vllm
    tokens = len(mine.vocabulary.encode(prompt)) + sizes[1]
    plan = Plan(
        Model(mine.name, mine.config, given.dtype, given.quantization),
        tuple(Model(sides[n][1].name, sides[n][1].config, t.dtype, t.quantization) for n, t in here.items()),
        lora,
        sequences=max(1, train.micro_batch_tokens // tokens) if train.micro_batch_tokens else sizes[0],
        by_tokens=train.micro_batch_tokens is not None,
        tokens=tokens,
        new_tokens=sizes[1],
        step_sequences=train.prompts_per_step * recipe.num_generations,
        teacher_tokens=min((t.batch_tokens or 16384 for t in here.values()), default=16384),
        generation_batch=config.rollout.generation_batch_size,
        gradient_checkpointing=train.gradient_checkpointing is True,
        autocast=train.precision != "no",
        copies=0 if lora else copies,
        blocks=_blocks(config),
        wide=max(side[1].config.get("vocab_size") or side[1].vocabulary.size for side in sides.values()),
        generates=engine is None and recipe.on_policy > 0,
        engine=round(_share(engine.arguments) * hardware.memory) if engine and engine.url is None else 0,
        engine_sleeps=engine is None or engine.sleep != 0,
        gpus=hardware.gpus,
        sharding=train.sharding,
        gradient_sync=train.gradient_sync,
    )
    if train.gradient_checkpointing == "auto" and memory_of(plan).peak > hardware.memory:
        return replace(plan, gradient_checkpointing=True)
    return plan


def _blocks(config: Config) -> int:
    """Blocks of logits that the loss holds at a time."""
    on = {str(term.options.get("support")) for term in config.objectives if term.weight}
    return 1 if on == {"bytes"} else 4 if "prefixes" in on else 2


def _share(arguments: Sequence[str]) -> float:
    """The share of a GPU's memory that vLLM takes."""
    name = "--gpu-memory-utilization"
    for place, argument in enumerate(arguments):
        value = argument.partition("=")[2] or "".join(arguments[place + 1 : place + 2])
        if argument.partition("=")[0] == name and value.replace(".", "", 1).isdigit():
            return float(value)
    return 0.9


def _diagnosed(
    config: Config,
    data: RunData,
    name: str,
    weights: bool,
    sizes: tuple[int, int],
    loaded: _Loaded,
) -> Report:
    """The report on the student and one teacher."""
    teacher = config.named_teachers[name]
    model: ModelConfig = config.student if teacher.kind == "self" else teacher
    prompts = graded_by(config, data, name)
    here = teacher.kind in ("self", "local")

    def load_both() -> tuple[LanguageModel, LanguageModel | None]:
        for each in (config.student, *([model] if here else [])):
            check_model(each)
        loaded.add("student", load(config.student))
        if here:
            loaded.add(name, load(model))
        return loaded.models["student"], loaded.models.get(name)

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
            compare_with_student(served, prompts, mine, is_student=is_student(config, name))
            if (mine := loaded.models.get("student")) is not None
            else [examine_noise(served, prompts)]
        )
    return replace(report, checks=[*report.checks, *checks])


def _duration(config: Config, data: RunData, loaded: _Loaded) -> list[Finding]:
    """How long the run takes, and what would make it shorter, if all its models were loaded."""
    named = config.named_teachers
    if (
        not loaded.models
        or config.rollout.engine.vllm is not None
        or not all(t.kind == "local" for t in named.values())
    ):
        return []
    weights = {name: t.weight for name, t in config.teachers.items()} if config.mix else None
    try:
        teachers = Teachers({name: loaded.models[name] for name in named}, config.mix, weights)
        for (
            weight
        ) in loaded.trained:  # the checks have used the student as a teacher too, which is not trained
            weight.requires_grad_(True)
        pace = pace_of(
            loaded.models["student"], teachers, data.train, config.recipe, data.heldout, evaluation_of(config),
            config.evaluate.every, data.verifier,
        )  # fmt: skip
    except GoldError:  # another check says so
        return []
    said = pace.lines() if pace else {}
    if not said:
        return []
    advice = f"shorter: {said['faster']}" if "faster" in said else ""
    return [Finding("duration", "pass", said["time"], advice)]


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
            check_lengths(engine, student, data.heldout, evaluation_of(config).max_new_tokens)
            try_engine(engine, student, data.train, config.recipe.max_new_tokens)
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
