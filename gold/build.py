"""What a configuration names, made: prompts, models, recipe. The last place that sees a configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gold.cache.store import find_origin
from gold.config import Config, TeacherConfig
from gold.data import Prompt, load_prompts, split_by_hash
from gold.doctor.checks import examine_pair
from gold.doctor.finding import Finding, Report, judge
from gold.doctor.prompts import PromptReader, examine_prompts, notes_of, raise_refused
from gold.doctor.report import combined, diagnose
from gold.doctor.sample import run_texts
from gold.doctor.server import compare_with_student, examine_noise, examine_server
from gold.doctor.side import Side, read_side
from gold.errors import ConfigError, GoldError, ModelError
from gold.evaluate import Evaluation, EvaluationPlan, Verifier, evaluate
from gold.inspect.plots import plot_run
from gold.losses import Need, find
from gold.models.files import check_files
from gold.models.language_model import LanguageModel
from gold.models.load import load_model, pick_device
from gold.tasks import load_task
from gold.teachers.absent import AbsentTeacher
from gold.teachers.cached import CachedTeacher, record
from gold.teachers.ema import SelfTeacher
from gold.teachers.local import LocalTeacher
from gold.teachers.protocol import Teacher
from gold.teachers.served import ServedTeacher
from gold.teachers.several import Teachers, check_routes
from gold.tokenize.chat import prompt_text
from gold.tokenize.compare import differences
from gold.tokenize.roles import Roles
from gold.tokenize.templates import Rendering
from gold.tokenize.vocabulary import Vocabulary
from gold.train.changes import Inputs
from gold.train.checkpoint import latest_checkpoint
from gold.train.checks import check_kept, check_recipe, pin_date, read_date, readers_of
from gold.train.inputs import of_files, of_prompts
from gold.train.loop import Run, Saving, check_output, distill
from gold.train.recipe import Recipe
from gold.train.run_folder import RunFolder
from gold.train.setup import pairs_of, terms_of
from gold.train.state import average_file, load_average
from gold.train.trackers import Tracker

if TYPE_CHECKING:
    from gold.config import StudentConfig


@dataclass(frozen=True)
class RunData:
    """Prompts to train on, prompts held out, of which evaluations use the first, and what scores completions, where
    something does."""

    train: list[Prompt]
    all_heldout: list[Prompt]
    evaluated: int
    verifier: Verifier | None

    @property
    def heldout(self) -> list[Prompt]:
        """The prompts of evaluations."""
        return self.all_heldout[: self.evaluated]


def load_data(config: Config) -> RunData:
    """The prompts of a configuration.

    Raises:
        DataError: a file that is missing or has a bad line.
        ConfigError: a task that is unknown, or data that the objectives cannot be trained on.
    """
    data = config.data
    verifier: Verifier | None = None
    if data.task is not None:
        task = load_task(data.task.name, **data.task.options)
        verifier = task
        train = task.prompts("train", data.task.train, data.task.seed)
        heldout = task.prompts("heldout", data.task.heldout, data.task.seed)
    elif data.prompts is not None:
        train = load_prompts(data.prompts, route=config.route)
        if data.heldout is not None:
            heldout = load_prompts(data.heldout, route=config.route)
        else:
            train, heldout = split_by_hash(train, data.heldout_share)
    else:
        raise ConfigError("data: neither prompts nor task is given: name a JSONL file or a task")
    check_recipe(config.recipe, train, verifier, 1)
    if config.teacher is not None and config.teacher.self is not None:
        _check_context(config.recipe, train)
    if config.route is not None:
        check_routes([*train, *heldout], config.teachers)
        if idle := sorted(config.teachers.keys() - {p.route for p in train}):
            raise ConfigError(
                f"teachers.{idle[0]}: no prompt to train on has it as its {config.route}: leave it out"
            )
    return RunData(train, heldout, config.evaluate.prompts, verifier)


def _check_context(recipe: Recipe, prompts: Sequence[Prompt]) -> None:
    """Nothing, unless the student is its own teacher and both see the same prompts."""
    grades = all(find(term.name).needs != "nothing" for term in recipe.objectives if term.weight)
    if grades and not any(p.teacher_context is not None for p in prompts):
        raise ConfigError(
            "teacher.self: the student would learn from itself what it knows already: give prompts a "
            "teacher_context, or name another teacher"
        )


def evaluation_of(config: Config) -> EvaluationPlan:
    """How a configuration's evaluations are run."""
    return EvaluationPlan(
        num_generations=config.evaluate.num_generations,
        max_new_tokens=config.rollout.max_new_tokens,
        samples=config.evaluate.samples,
        micro_batch_size=config.evaluate.micro_batch_size,
        generation_batch_size=config.rollout.generation_batch_size,
        seed=config.train.seed,
    )


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changed: bool = False,
    progress: Tracker | None = None,
) -> Run:
    """The run that a configuration describes: loads prompts and models, trains, evaluates, saves; see ``Saving``.

    Whatever can be refused without a model is refused before one is loaded.

    Raises:
        GoldError: anything in the configuration, the data or the models that cannot work; see ``distill``.
    """
    output = Path(config.output)
    saving = Saving(
        output,
        resume,
        config.evaluate.every,
        config.train.checkpoint_every,
        config.train.keep_last,
        overwrite,
        allow_changed,
    )
    check_output(saving, config.to_dict(), {})  # before anything is read
    data = load_data(config)
    inputs = inputs_of(config, data)
    check_output(saving, config.to_dict(), inputs)
    student, teachers = _models(config, config.student, data, progress)
    # What came from the Hub just now was not here before.
    known = inputs_of(config, data, inputs)
    run = distill(
        student,
        teachers,
        data.train,
        config.recipe,
        heldout=data.heldout,
        verifier=data.verifier,
        evaluation=evaluation_of(config),
        saving=saving,
        settings=config.to_dict(),
        inputs=known,
        progress=progress,
    )
    if run.is_main_process:
        _draw(output, progress)
    return run


def inputs_of(config: Config, data: RunData, known: Inputs | None = None) -> dict[str, Mapping[str, Any]]:
    """The digests of a configuration's prompts and of those models' files that are here; those that are known already
    are not read again."""
    found: dict[str, Mapping[str, Any]] = dict(known or {})
    source = config.data
    if not found:
        made = f"task {source.task.name}" if source.task is not None else str(source.prompts)
        found["training prompts"] = of_prompts(data.train, made)
        found["held-out prompts"] = of_prompts(data.all_heldout, source.heldout or made)
    models: dict[str, StudentConfig | TeacherConfig] = {"student": config.student}
    for name, teacher in config.named_teachers.items():
        if teacher.self is None:
            models[f"teachers.{name}" if config.teachers else "teacher"] = teacher
    for name, model in models.items():
        apart = isinstance(model, TeacherConfig) and (model.served is not None or _is_unasked(model))
        if name not in found and (digests := of_files(_path(model), model.gguf_file, weights=not apart)):
            found[name] = digests
    return found


def _draw(output: Path, progress: Tracker | None) -> None:
    """The run's pictures; a machine without matplotlib is told how to get them later."""
    try:
        plot_run(output)
    except ConfigError as error:
        if progress is not None:
            progress.note(f"no pictures: {error}; then run gold plot {output}")


def evaluate_source(
    source: str | Path, overrides: Sequence[str] = (), progress: Tracker | None = None
) -> Evaluation:
    """The student of a configuration, or the trained student of a run folder, on the held-out prompts.

    Raises:
        GoldError: as for ``train``.
    """
    folder = Path(source)
    trained: Path | None = None
    if folder.is_dir():
        if "recipe" in RunFolder.open(folder).config:
            raise ConfigError(
                f"{folder}: the run was made from Python, and its config.yaml names no data; give a configuration with "
                f"student.path={folder / 'student'}"
            )
        config = Config.load(folder / "config.yaml", overrides)
        trained = folder / "student"
        if not trained.is_dir():
            raise ConfigError(
                f"{folder}: the run has no student yet; resume it to its end, or give its configuration"
            )
    else:
        config = Config.load(folder, overrides)
    data = load_data(config)
    student = config.student
    if trained is not None and not any(o.startswith("student.") for o in overrides):
        student = student.model_copy(update={"path": str(trained), "gguf_file": None})
    trained_student, teachers = _models(config, student, data, progress, judged=False)
    pin_date(trained_student, teachers, read_date(folder) if trained is not None else None)
    room = evaluation_of(config).max_new_tokens
    checks = examine_prompts([], data.heldout, readers_of(trained_student, teachers), room)
    raise_refused(checks)
    if progress is not None:
        for note in notes_of(checks):
            progress.note(note)
    if trained is not None:
        for name, teacher in teachers.members.items():
            if teacher.state() is None:
                continue
            checkpoint, _ = latest_checkpoint(folder / "checkpoints")
            if checkpoint is None:
                raise ConfigError(f"{folder}: no checkpoint holds the weights that teacher {name} came to")
            load_average(teacher, checkpoint.path / average_file(name))
    return evaluate(
        trained_student,
        teachers,
        data.heldout,
        plan=evaluation_of(config),
        verifier=data.verifier,
    )


def _models(
    config: Config, student: StudentConfig, data: RunData, progress: Tracker | None, judged: bool = True
) -> tuple[LanguageModel, Teachers]:
    """Student and teachers; ``judged``: each pair, and the server of a teacher that is served, are examined first."""
    named = config.named_teachers
    graded = {name: _graded_by(data, config, name) for name in named}
    consult = {name: partial(_consult, config, graded[name], progress, name) for name in named}
    apart = {name: t for name, t in named.items() if t.served is not None or _is_unasked(t)}
    local = {name: t for name, t in named.items() if t.self is None and name not in apart}
    sides: dict[str, Side] = {}
    served: dict[str, ServedTeacher] = {}
    members: dict[str, Teacher] = {}
    for name, teacher in apart.items():
        sides[name] = side = read_side("teacher", _source(teacher), roles_of(teacher), rendering_of(teacher))
        if _is_unasked(teacher):
            members[name] = _cached(teacher, _unasked(teacher, side), progress)
            continue
        served[name] = _served(teacher, side)
        members[name] = _cached(teacher, served[name], progress)
        if judged and not _is_kept(members[name]):
            _judge(config, graded[name], examine_server(served[name], graded[name]), progress, name)
    if sides:
        check_files(_path(student), gguf_file=student.gguf_file)
    of_files = file_side("student", student.path, roles_of(student), rendering_of(student)) if sides else None
    for name, side in sides.items():
        if judged and of_files is not None:
            consult[name](of_files, side)
    mine, loaded = _load(student, local, progress, consult if judged else {})
    for name, side in sides.items():
        if judged and of_files is None:
            own = mine.vocabulary.without_markers()
            consult[name](Side("student", own, mine.tokenizer, rendering=mine.rendering), side)
    for name, server in served.items() if judged else ():
        kept = members[name]
        if isinstance(kept, CachedTeacher) and _is_kept(kept):
            kept.check_before_asking(partial(_examine, config, graded[name], progress, name, server, mine))
        else:
            _judge(config, graded[name], _compared(config, graded[name], name, server, mine), progress, name)
    members |= {name: _cached(named[name], LocalTeacher(model), progress) for name, model in loaded.items()}
    for name, teacher in named.items():
        if teacher.self is not None:
            # The one that the run began with, whatever student is looked at.
            origin = mine if student == config.student else _load(config.student, {}, None, {})[0]
            members[name] = SelfTeacher(origin, teacher.decay if teacher.self == "ema" else 1.0)
    weights = {name: t.weight for name, t in config.teachers.items()} if config.mix else None
    return mine, Teachers({name: members[name] for name in named}, config.mix, weights)


def _is_unasked(config: TeacherConfig) -> bool:
    """Whether a teacher's cache is all that there is of it."""
    return config.cache is not None and config.cache.missing == "stop"


def _is_kept(teacher: Teacher) -> bool:
    """Whether a teacher's cache holds something. That came from a server that was examined, which may be gone, and all
    that the run needs be there."""
    return isinstance(teacher, CachedTeacher) and len(teacher.cache) > 0


def _examine(
    config: Config,
    prompts: Sequence[Prompt],
    progress: Tracker | None,
    name: str,
    served: ServedTeacher,
    student: LanguageModel,
) -> None:
    """The examination of a server, as a whole."""
    _judge(config, prompts, examine_server(served, prompts), progress, name)
    _judge(config, prompts, _compared(config, prompts, name, served, student), progress, name)


def _compared(
    config: Config, prompts: Sequence[Prompt], name: str, served: ServedTeacher, student: LanguageModel
) -> list[Finding]:
    """A server's answers compared with the student's; where both have the same files, it serves the student."""
    sources = {os.path.realpath(_source(model)) for model in (config.student, config.named_teachers[name])}
    return compare_with_student(served, prompts, student, is_student=len(sources) == 1)


def build_cache(
    config: Config, progress: Tracker, told: Callable[[int, int, int], None] = lambda *_: None
) -> list[CachedTeacher]:
    """The teachers of a configuration that have a cache, which holds all completions of their training prompts now.

    What it holds already is not asked for. ``told`` is given, time and again, how many of a teacher's prompts are done
    with, how many there are, and how many of its tokens and ends were asked for. The student is not looked at.

    Raises:
        GoldError: as for ``train``.
    """
    named = {name: t for name, t in config.named_teachers.items() if t.cache is not None}
    if not named:
        raise ConfigError("teacher.cache: it names no folder to build; set teacher.cache.path")
    data = load_data(config)
    given = {name: [p for p in _graded_by(data, config, name) if p.completion is not None] for name in named}
    if not any(given.values()):
        raise ConfigError(f"data: none of the {len(data.train):,} training prompts has a completion to score")
    if lacking := sum(p.completion is None for p in data.train):
        progress.note(
            f"{lacking:,} of {len(data.train):,} training prompts have no completion, and are left out"
        )
    built = []
    for name, teacher in named.items():
        if teacher.served is None:
            cached = _cached(teacher, LocalTeacher(_load(teacher, {}, progress, {})[0]), progress)
        else:
            prompts = _graded_by(data, config, name)
            side = read_side("teacher", _source(teacher), roles_of(teacher), rendering_of(teacher))
            served = _served(teacher, side)
            checks = [*examine_server(served, prompts), examine_noise(served, prompts)]
            _judge(config, prompts, checks, progress, name)
            cached = _cached(teacher, served, progress)
        assert isinstance(cached, CachedTeacher)
        if unread := record(cached, given[name], partial(_tell, told, len(given[name]))):
            progress.note(
                f"{len(unread):,} of {len(given[name]):,} completions are left out, as in a run: {unread[0]}"
            )
        cached.cache.close()
        built.append(cached)
    return built


def _tell(told: Callable[[int, int, int], None], count: int, done: int, rows: int) -> None:
    told(done, count, rows)


def _graded_by(data: RunData, config: Config, name: str) -> list[Prompt]:
    """The training prompts that a teacher grades, as it reads them."""
    return [p.for_teacher for p in data.train if config.route is None or p.route == name]


def _served(config: TeacherConfig, side: Side) -> ServedTeacher:
    """The teacher of a configuration that names a server."""
    assert config.served is not None
    device = pick_device(config.device)
    rows = side.config.get("vocab_size")
    return ServedTeacher(
        _source(config),
        roles=roles_of(config),
        template_kwargs=config.template_kwargs,
        rows=rows,
        device=device,
        **config.served.model_dump() | {"context": config.served.context or side.context},
    )


def _unasked(config: TeacherConfig, side: Side) -> AbsentTeacher:
    """The teacher of a configuration that learns from a cache alone."""
    rows = side.config.get("vocab_size")
    return AbsentTeacher(
        _source(config),
        roles=roles_of(config),
        template_kwargs=config.template_kwargs,
        rows=rows,
        context=side.context,
        device=pick_device(config.device),
    )


def _cached(config: TeacherConfig, teacher: Teacher, progress: Tracker | None) -> Teacher:
    """A teacher behind its cache, where the configuration names one."""
    cache = config.cache
    if cache is None:
        return teacher
    cached = CachedTeacher(teacher, cache.path, top_k=cache.top_k, revision=cache.revision)
    # All processes find the same; one of them tells.
    if progress is not None and os.environ.get("RANK", "0") == "0":
        if damage := cached.cache.damage:
            progress.note(
                f"cache {cache.path}: {len(damage)} of its parts are damaged or cut short; what they held counts as "
                "missing; gold cache verify names them"
            )
        if not cached.complete:
            progress.note(
                f"cache {cache.path}: the teacher is not asked; evaluations leave out what it would say of the student"
            )
    return cached


def _path(model: StudentConfig | TeacherConfig) -> str:
    """Where a model is that has weights of its own."""
    assert model.path is not None
    return model.path


def _source(model: StudentConfig | TeacherConfig) -> str | Path:
    """Where the files of a model are that tell of its tokenizer."""
    return Path(_path(model)) / model.gguf_file if model.gguf_file else _path(model)


def diagnose_run(
    source: Path, *, weights: bool = False, sequences: int | None = None, tokens: int | None = None
) -> Report:
    """What `gold doctor` finds of a configuration's pairs, judged by its own prompts; of several teachers each check
    says whose it is.

    Raises:
        GoldError: as for ``train``.
    """
    config = Config.load(source)
    data = load_data(config)
    sizes = sequences or config.train.micro_batch_size, tokens or config.rollout.max_new_tokens
    reports = {name: _diagnosed(config, data, name, weights, sizes) for name in config.named_teachers}
    known = [check.found for report in reports.values() for check in report.checks]
    files = [check for check in _files(config) if not any(found.endswith(check.found) for found in known)]
    of_run = _of_run(config, data, {name: r.sides for name, r in reports.items()})
    report = combined(reports)
    return replace(report, checks=[*report.checks, *files, *of_run])


def _files(config: Config) -> list[Finding]:
    """What a run would refuse of the models that it loads: files that are missing, broken or another kind's, devices
    that are not there."""
    here = [t for t in config.named_teachers.values() if not (t.self or t.served or _is_unasked(t))]
    checks = []
    models: list[StudentConfig | TeacherConfig] = [config.student, *here]
    for model in models:
        try:
            check_files(_path(model), gguf_file=model.gguf_file)
            pick_device(model.device)
        except ModelError as error:
            checks.append(Finding("files", "fail", str(error)))
    return checks


@dataclass
class _Absent(Teacher):
    """A teacher as far as a run asks about it before it is loaded."""

    name: str
    gives: Need
    vocabulary: Vocabulary
    device: Any = None


def _of_run(config: Config, data: RunData, sides: Mapping[str, tuple[Side, ...]]) -> list[Finding]:
    """What a run would refuse of its objectives and prompts, and what it would say of them; by both sides' files."""
    if not all(sides.values()):
        return []  # which is a failure of its own
    mine = next(iter(sides.values()))[0]
    named, several = config.named_teachers, len(config.named_teachers) > 1
    readers = [PromptReader("student", mine.name, mine.tokenizer, mine.marked, mine.rendering, mine.context)]
    absent: dict[str, Any] = {}
    for name, (_, side) in sides.items():
        teacher = named[name]
        kept = teacher.served or teacher.cache
        gives: Need = "rows" if kept is None else "tokens" if kept.top_k == 0 else "top_k"
        absent[name] = _Absent(side.name, gives, side.marked)
        graded = partial(_is_graded_by, config.route, name)
        role = f"teacher {name}" if several else "teacher"
        reader = PromptReader(
            role, side.name, side.tokenizer, side.marked, side.rendering, side.context, graded
        )
        readers.append(reader)
    checks = []
    recipe, student = (
        config.recipe,
        cast(LanguageModel, readers[0]),
    )  # as far as its vocabulary and prompts go
    what = "objectives"
    try:
        check_recipe(recipe, data.train, data.verifier, 1)
        pairs = pairs_of(student, teachers := Teachers(absent, config.mix))
        terms = terms_of(recipe, teachers, pairs)
        what = "cache"
        unasked = {name: teacher for name, teacher in named.items() if _is_unasked(teacher)}
        alone = {name: _cached(t, _unasked(t, sides[name][1]), None) for name, t in unasked.items()}
        if any(term.objective.needs != "nothing" for term in terms):
            check_kept(Teachers(absent | alone, config.mix), student, pairs, data.train, recipe)
    except GoldError as error:
        checks.append(Finding(what, "fail", str(error)))
    return [*checks, *examine_prompts(data.train, data.heldout, readers, recipe.max_new_tokens)]


def _is_graded_by(route: str | None, name: str, prompt: Prompt) -> bool:
    return route is None or prompt.route == name


def _diagnosed(config: Config, data: RunData, name: str, weights: bool, sizes: tuple[int, int]) -> Report:
    """What is found of the student and one teacher."""
    model: StudentConfig | TeacherConfig = config.named_teachers[name]
    unasked = _is_unasked(config.named_teachers[name])
    served = None if unasked else config.named_teachers[name].served
    if config.named_teachers[name].self is not None:
        model = config.student
    prompts = _graded_by(data, config, name)

    here = served is None and not unasked
    loaded: list[LanguageModel] = []

    def load() -> tuple[LanguageModel, LanguageModel | None]:
        student, others = _load(config.student, {name: model} if here else {}, None, {})
        loaded.append(student)
        return student, others.get(name)

    report = diagnose(
        _source(config.student),
        _source(model),
        roles=(roles_of(config.student), roles_of(model)),
        renderings=(rendering_of(config.student), rendering_of(model)),
        dtypes=(config.student.dtype, model.dtype),
        texts=run_texts(prompts),
        prompt=max((prompt_text(p) for p in prompts), key=len),
        sequences=sizes[0],
        tokens=sizes[1],
        load=load if weights else None,
        served=not here,
    )
    if served is None:
        return report
    assert isinstance(model, TeacherConfig)
    made = _served(model, read_side("teacher", _source(model), roles_of(model), rendering_of(model)))
    checks = examine_server(made, prompts)
    if all(check.status != "fail" for check in checks):
        checks += (
            _compared(config, prompts, name, made, loaded[0]) if loaded else [examine_noise(made, prompts)]
        )
    return replace(report, checks=[*report.checks, *checks])


def _consult(
    config: Config,
    prompts: Sequence[Prompt],
    progress: Tracker | None,
    name: str,
    student: Side,
    teacher: Side,
) -> None:
    """Notes what stands in the way of a pair, as far as the run minds it.

    Raises:
        ConfigError: the pair cannot be trained, and the run is to stop then.
    """
    _judge(config, prompts, examine_pair(student, teacher, run_texts(prompts)).checks, progress, name)


def _judge(
    config: Config, prompts: Sequence[Prompt], checks: Sequence[Finding], progress: Tracker | None, name: str
) -> None:
    """Notes the findings about a teacher that concern the run.

    Raises:
        ConfigError: a failed check, where the run is to stop then.
    """
    concerns = {term.name for term in config.objectives}
    concerns |= {str(value) for term in config.objectives for value in term.options.values()}
    concerns |= {"messages" for prompt in prompts if prompt.messages is not None}
    whose = f"teacher {name}: " if config.teachers else ""
    notes = judge(checks, concerns, stop=config.train.doctor == "stop", whose=whose)
    # All processes find the same; one of them shows it.
    if progress is not None and os.environ.get("RANK", "0") == "0":
        for note in notes:
            progress.note(note)


def _load(
    student: StudentConfig | TeacherConfig,
    teachers: Mapping[str, StudentConfig | TeacherConfig],
    progress: Tracker | None,
    consult: Mapping[str, Callable[[Side, Side], None]],
) -> tuple[LanguageModel, dict[str, LanguageModel]]:
    """Student (or any one model) and teachers, loaded once the files and the tokenizers of all are found good.

    Each pair that there is somebody to consult about is examined, by the files where they tell enough.
    """
    models = {"": student, **teachers}
    sides: dict[str, Side | None] = {}
    for name, model in models.items():
        path = _path(model)
        check_files(path, gguf_file=model.gguf_file)
        try:
            pick_device(model.device)
        except ModelError as error:
            raise ModelError(f"model {path}: {error}") from error
        role = "teacher" if name else "student"
        sides[name] = file_side(role, path, roles_of(model), rendering_of(model))
    mine = sides[""]
    for name, ask in consult.items():
        if mine is not None and (theirs := sides.get(name)) is not None:
            ask(mine, theirs)
    loaded: dict[str, LanguageModel] = {}
    for name, model in models.items():
        loaded[name] = made = load_model(
            _path(model),
            gguf_file=model.gguf_file,
            dtype=model.dtype,
            device=model.device,
            roles=roles_of(model),
            trust_remote_code=model.trust_remote_code,
            template_kwargs=model.template_kwargs,
        )
        if (of_file := sides[name]) is not None and progress is not None:
            own = made.vocabulary.without_markers()
            for difference in differences(of_file.vocabulary, own, texts=SAMPLE_TEXTS):
                progress.note(f"model {made.name}: the loaded tokenizer and its file differ: {difference}")
    for name, ask in consult.items():
        if name in teachers and (mine is None or sides[name] is None):
            both = zip(("student", "teacher"), (loaded[""], loaded[name]), strict=True)
            ask(
                *(
                    Side(role, m.vocabulary.without_markers(), m.tokenizer, rendering=m.rendering)
                    for role, m in both
                )
            )
    return loaded.pop(""), loaded


def file_side(
    role: str, path: str | Path, roles: Roles | None = None, rendering: Rendering | None = None
) -> Side | None:
    """What a model folder's files tell of it, where a tokenizer.json is among them.

    Raises:
        VocabularyError: a tokenizer that cannot be spelled in bytes, or has no token of a name in ``roles``.
    """
    there = (Path(path) / "tokenizer.json").is_file()
    return read_side(role, path, roles, rendering) if there else None


def roles_of(model: StudentConfig | TeacherConfig) -> Roles:
    """The special tokens that a configuration names for a model."""
    return Roles(model.roles.stop, model.roles.bos, model.roles.pad)


def rendering_of(model: StudentConfig | TeacherConfig) -> Rendering:
    """What a configuration gives to a model's chat template; the day is that of its cache, where it has one."""
    cache = model.cache if isinstance(model, TeacherConfig) else None
    origin = find_origin(cache.path) if cache is not None else None
    day = date.fromisoformat(origin.date) if origin is not None and origin.date else None
    return Rendering(dict(model.template_kwargs), day)


SAMPLE_TEXTS = (
    "Hello, world!",
    " leading space",
    "1234 + 5 = 1239",
    "déjà vu — naïve",
    "a\n\n  b\tc",
    "漢字かな 😀",
    "▁x",
)
"""Texts on which two tokenizers are compared."""
