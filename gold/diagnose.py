"""`gold doctor` for a configuration: its pairs, judged by its own prompts, and problems that would stop a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from gold.doctor.conversations import examine_conversations
from gold.doctor.finding import Finding, Report
from gold.doctor.memory import Model, Plan, device_memory, fits
from gold.doctor.memory_table import Hardware, examine_memory, measured
from gold.doctor.prompts import examine_prompts, readers_of_sides
from gold.doctor.report import combined, diagnose
from gold.doctor.sample import run_texts
from gold.doctor.server import compare_with_student, examine_noise, examine_server
from gold.doctor.side import Side
from gold.errors import DataError, GoldError, ModelError
from gold.losses import Need
from gold.models.footprint import Adapters
from gold.models.language_model import LanguageModel
from gold.models.pretrained import pick_device
from gold.rollout.thinking import check_thinking_budget
from gold.teachers.protocol import Teacher
from gold.teachers.several import Teachers
from gold.tokenize.chat import prompt_text
from gold.tokenize.vocabulary import Vocabulary
from gold.train.activations import TEACHER_TOKENS, longest_prompt, plan_for
from gold.train.loop import pace_of
from gold.train.preflight import check_kept, check_lengths, check_recipe
from gold.train.recipe import Recipe
from gold.train.setup import pairs_of, terms_of

_NO_MODEL = Model("", {})


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
    also the memory that the run needs on it by part, instead of the check of this machine's.

    Raises:
        GoldError: as for ``gold.build.train``.
    """
    config = Config.load(source, overrides)
    data, recipe = load_data(config), config.recipe
    if tokens is not None:
        recipe = recipe.replace(max_new_tokens=tokens)
    if sequences is not None:
        recipe = recipe.replace(micro_batch_size=sequences, micro_batch_tokens=None)
    loaded = _Loaded()
    sizes = plan_for(recipe, _NO_MODEL, 0)
    reports = {
        name: _diagnosed(config, data, name, weights, (sizes.sequences, sizes.tokens), loaded)
        for name in config.named_teachers
    }
    known = [check.found for report in reports.values() for check in report.checks]
    files = [check for check in _files(config) if not any(found.endswith(check.found) for found in known)]
    files += _engine(config, data, weights)
    sides = {name: each.sides for name, each in reports.items()}
    report = combined(reports)
    duration = _duration(config, data, loaded) if not any(each.failures for each in reports.values()) else []
    read = [Finding("data", "pass", note) for note in data.notes]
    of_run = _of_run(config, data, sides)
    report = replace(report, checks=[*report.checks, *files, *read, *of_run, *duration])
    if hardware is None:
        return _with_memory_here(report, config, data, recipe, sides)
    if not all(sides.values()):
        return report
    if loaded.models:
        hardware = measured(hardware, loaded.models["student"], sizes.sequences, sizes.tokens)
    found = examine_memory(plan_of(config, data, recipe, sides, hardware), hardware)
    return replace(report, checks=[*report.checks, found.finding()], of_run=found)


def _with_memory_here(
    report: Report, config: Config, data: RunData, recipe: Recipe, sides: Mapping[str, tuple[Side, ...]]
) -> Report:
    """The report with a check of the memory of this machine's device."""
    try:
        if not all(sides.values()):
            raise ModelError("its tokenizers cannot be read")
        if silent := [side.name for side in _of_models(config, sides) if not side.config]:
            raise ModelError(f"no config.json of {' and '.join(silent)}")
        device = pick_device(config.student.device)
        if (there := device_memory(device)) is None:
            raise ModelError(f"device {device.type} does not tell how much it has")
        hardware = Hardware(there, on_gpu=device.type != "cpu")
        check = examine_memory(plan_of(config, data, recipe, sides, hardware), hardware).finding()
    except ModelError as error:
        return replace(report, unchecked=[*report.unchecked, f"memory: {error}"])
    return replace(report, checks=[*report.checks, check])


def _of_models(config: Config, sides: Mapping[str, tuple[Side, ...]]) -> list[Side]:
    """The sides whose weights a run loads."""
    mine = next(iter(sides.values()))[0]
    return [mine, *(sides[name][1] for name, t in config.named_teachers.items() if t.kind == "local")]


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
    recipe: Recipe,
    sides: Mapping[str, tuple[Side, ...]],
    hardware: Hardware,
) -> Plan:
    """What the memory of a run depends on."""
    mine = next(iter(sides.values()))[0]
    given, named = config.student, config.named_teachers
    lora = (
        None
        if given.lora is None
        else Adapters(given.lora.rank, given.lora.targets, given.lora.modules_to_save)
    )
    student = Model(mine.name, mine.config, given.dtype, given.quantization)
    teachers = [
        Model(sides[n][1].name, sides[n][1].config, t.dtype, t.quantization) if t.kind == "local" else student
        for n, t in named.items()
        if t.kind == "local" or (t.kind == "self" and lora is None)
    ]
    reference = any(term.name == "reference_kl" and term.weight for term in config.objectives)
    batches = [t.batch_tokens or TEACHER_TOKENS for t in named.values() if t.kind in ("local", "self")]
    engine = config.rollout.engine.vllm
    try:
        prompt = len(mine.prompt_ids(longest_prompt(data.train)))
    except DataError:  # another check tells
        prompt = 0
    plan = plan_for(
        recipe,
        student,
        prompt,
        teachers=tuple(teachers),
        lora=lora,
        teacher_tokens=min(batches, default=TEACHER_TOKENS),
        autocast=recipe.precision == "bf16" or (recipe.precision == "auto" and hardware.on_gpu),
        copies=int(reference and lora is None),
        wide=max(side[1].config.get("vocab_size") or side[1].vocabulary.size for side in sides.values()),
        generates=engine is None and recipe.on_policy > 0,
        each_step=recipe.policy == "live",
        engine=round(_share(engine.arguments) * hardware.memory) if engine and engine.url is None else 0,
        engine_sleeps=engine is None or engine.sleep != 0,
        gpus=hardware.gpus,
        on_gpu=hardware.on_gpu,
    )
    if recipe.gradient_checkpointing == "auto" and not fits(plan, hardware.memory):
        return replace(plan, gradient_checkpointing=True)
    return plan


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
        texts=run_texts(prompts),
        prompt=max((prompt_text(p) for p in prompts), key=len),
        sequences=sizes[0],
        tokens=sizes[1],
        load=load_both if weights else None,
        served=not here,
        memory=False,
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
    read = {name: side for name, (_, side) in sides.items()}
    readers = readers_of_sides(mine, read, route=config.route, several=several)
    absent: dict[str, Any] = {}
    for name, (_, side) in sides.items():
        limits = named[name].served or named[name].cache
        gives: Need = "rows" if limits is None else "tokens" if limits.top_k == 0 else "top_k"
        absent[name] = _Absent(side.name, gives, side.marked)
    checks, recipe, what = [], config.recipe, "objectives"
    student = cast(LanguageModel, readers[0])  # only its vocabulary and prompts are used
    try:
        check_thinking_budget(student, recipe.thinking_budget, recipe.max_new_tokens)
        check_recipe(recipe, data.train, data.verifier or data.environment, 1)
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
    checks += examine_prompts(data.train, data.heldout, readers, recipe.max_new_tokens)
    if data.environment is not None:
        checks += examine_conversations(data.train[0], readers, data.environment, recipe.thinking)
    return checks
