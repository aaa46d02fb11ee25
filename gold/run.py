"""The commands that run a configuration: train, evaluate, build a cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from gold.activity import doing, listening
from gold.align.model_inputs import aligned_text
from gold.build import (
    build_models,
    cached_teacher,
    check_model,
    evaluation_of,
    examiner_of,
    file_side,
    inputs_of,
    load,
    note_to,
    rollout_engine,
    served_teacher,
    try_engine,
)
from gold.build_data import RunData, graded_by, load_data
from gold.config import Config, EvaluateConfig, StudentConfig
from gold.doctor.prompts import examine_prompts, notes_of, raise_refused
from gold.errors import ConfigError, did_you_mean
from gold.evaluate import Evaluation, evaluate
from gold.harness import Scores, check_tasks, run_tasks
from gold.hub import prepare_push, push
from gold.inspect.plots import plot_run
from gold.models.language_model import LanguageModel
from gold.models.load import load_model
from gold.prompt_order import PromptOrder
from gold.rollout.conversations import Conversations
from gold.rollout.engine import Generation, Request
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.thinking import within_budgets
from gold.rollout.types import Rollout
from gold.teachers.cached import CachedTeacher, record, record_texts
from gold.teachers.local import LocalTeacher
from gold.teachers.served import ServedTeacher
from gold.teachers.several import Teachers
from gold.train.checkpoint_folder import latest_checkpoint
from gold.train.initial import complete, needed, rollouts_of
from gold.train.listener import RunListener
from gold.train.loop import Run, Saving, check_output, distill
from gold.train.microbatch import compared_rows
from gold.train.preflight import accelerator_of, pin_date, read_date, readers_of
from gold.train.run_folder import RunFolder
from gold.train.setup import Setup, completions_of, first_places
from gold.train.state import load_average
from gold.train.trackers import Tracker, Trackers
from gold.train.tracking_clients import check_clients

BRANCHES = 0.01
"""``evaluate.branches`` of `gold eval` where it is not given, and every branch costs no request to a server."""


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changed: bool = False,
    progress: Tracker | None = None,
) -> Run:
    """Runs a configuration: loads prompts and models, trains, evaluates, saves; see ``Saving``.

    All checks that need no model come before a model is loaded.

    Raises:
        GoldError: anything in the configuration, the data or the models that cannot work; see ``distill``.
    """
    check_clients(config.train.trackers or ())
    output, settings = Path(config.output), config.to_dict()
    every, keep = config.train.checkpoint_every, config.train.keep_last
    kept = Path(config.rollout.completions) if config.rollout.completions else None
    saving = Saving(output, resume, config.evaluate.every, every, keep, overwrite, allow_changed, kept)
    check_output(saving, settings, {})  # before reading anything
    if config.push_to_hub is not None and os.environ.get("RANK", "0") == "0":
        prepare_push(config.push_to_hub.id, config.push_to_hub.private)
    data = _data_of(config, progress)
    inputs = inputs_of(config, data)
    check_output(saving, settings, inputs)
    with listening(_listener(progress)):
        student, teachers = build_models(config, config.student, data, progress, trained=True)
    with rollout_engine(config, config.student, output / "vllm.log") as engine:
        run = distill(
            student,
            teachers,
            data.train,
            config.recipe,
            heldout=data.heldout,
            verifier=data.verifier,
            evaluation=evaluation_of(config),
            saving=saving,
            settings=settings,
            inputs=inputs_of(config, data, inputs),  # files just downloaded from the Hub
            progress=progress,
            trackers=config.train.trackers or (),
            engine=engine,
            estimate=progress is not None,
            environment=data.environment,
            limits=config.limits,
        )
    if run.is_main_process:
        _draw(output, progress)
        if config.push_to_hub is not None:
            note_to(progress)(f"pushed the student: {push(output / 'student', config.push_to_hub.id)}")
    return run


def _data_of(config: Config, progress: Tracker | None) -> RunData:
    """The prompts of a configuration, their notes shown."""
    data = load_data(config)
    for note in data.notes:
        note_to(progress)(note)
    return data


def evaluate_source(
    source: str | Path, overrides: Sequence[str] = (), progress: Tracker | None = None
) -> Evaluation:
    """Evaluates the student of a configuration, or the trained student of a run folder, on the held-out prompts.

    Raises:
        GoldError: as for ``train``.
    """
    folder = Path(source)
    is_run = folder.is_dir()
    if is_run:
        _check_trained(folder)
    config = Config.load(folder / "config.yaml" if is_run else folder, overrides)
    with listening(_listener(progress)):
        return _evaluated(config, folder if is_run else None, overrides, progress)


def _evaluated(
    config: Config, run: Path | None, overrides: Sequence[str], progress: Tracker | None
) -> Evaluation:
    """The evaluation of a configuration's student, or of that of a ``run``."""
    data, plan = _data_of(config, progress), evaluation_of(config)
    student = config.student
    if run is not None and not any(o.startswith("student.") for o in overrides):
        # Its adapters are merged into its weights, which are not quantized.
        merged = {
            "path": str(run / "student"),
            "revision": None,
            "gguf_file": None,
            "lora": None,
            "quantization": None,
        }
        student = student.model_copy(update=merged)
    model, teachers = build_models(config, student, data, progress, examined=False)
    if config.evaluate.branches is None and teachers and all(t.model for t in teachers.members.values()):
        plan = replace(plan, branches=BRANCHES)
    pin_date(model, teachers, read_date(run) if run is not None else None)
    with doing("checking the prompts"):
        checks = examine_prompts([], data.heldout, readers_of(model, teachers), plan.max_new_tokens)
    raise_refused(checks)
    for note in notes_of(checks):
        note_to(progress)(note)
    if run is not None:
        _load_averages(run, teachers)
    with rollout_engine(config, student) as engine:
        if engine is not None:
            try_engine(engine, model, data.heldout, plan.max_new_tokens)
        with doing("evaluation"):
            return evaluate(
                model,
                teachers,
                data.heldout,
                plan=plan,
                verifier=data.verifier,
                engine=engine,
                conversations=Conversations.of(model, data.environment, config.limits),
            )


def _listener(progress: Tracker | None) -> RunListener:
    """Shows what is being done before a run begins; of several processes in the first one."""
    shown = progress is not None and os.environ.get("RANK", "0") == "0"
    return RunListener(progress if shown and progress is not None else Trackers())


def evaluate_tasks(
    source: str,
    tasks: str,
    overrides: Sequence[str] = (),
    task_path: Path | None = None,
    limit: int | None = None,
    chat: bool = False,
    note: Callable[[str], None] = lambda note: None,
) -> dict[str, Scores]:
    """The scores on tasks of lm-eval, whose names have commas between them: of a run's student ``before`` and
    ``after``, of the ``student`` of a configuration, or of a model's folder or Hub id; one model is in memory at a
    time.

    Raises:
        GoldError: a model that cannot be loaded; see also ``check_tasks`` and ``run_tasks``.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    known = check_tasks(names, task_path)
    folder, found = Path(source), {}
    is_run = (folder / "config.yaml").is_file()
    batch_size = EvaluateConfig().micro_batch_size
    loaders: dict[str, Callable[[], LanguageModel]] = {"student": partial(load_model, source, dtype="auto")}
    if is_run and "recipe" in RunFolder.open(folder).config:
        loaders = {"after": lambda: load_model(_student_of(folder, note), dtype="auto")}
    elif is_run or folder.is_file():
        config = Config.load(folder / "config.yaml" if is_run else folder, overrides)
        batch_size = config.evaluate.micro_batch_size
        start = partial(load, _without_adapters(config.student))
        loaders = {"student": start}
        if is_run:
            after = _without_adapters(config.student, str(_student_of(folder, note)))
            loaders = {"before": start, "after": partial(load, after)}
    for name, loader in loaders.items():
        note(f"{name}: {', '.join(names)}")
        found[name] = run_tasks(loader(), names, known, batch_size=batch_size, limit=limit, chat=chat)
    return found


def build_cache(
    config: Config, progress: Tracker, report: Callable[[int, int, int], None] = lambda *_: None
) -> list[CachedTeacher]:
    """The configuration's teachers with a cache, after storing all completions of their training prompts.

    With ``rollout.policy: initial`` the student, which is otherwise not needed, first writes its completions, to
    ``rollout.completions``. Texts already in a cache are not scored again. ``report(texts, done, rows)`` is called
    repeatedly: a teacher's number of texts, how many of them are done, and the number of requested rows.

    Raises:
        GoldError: as for ``train``.
    """
    named = {name: t for name, t in config.named_teachers.items() if t.cache is not None}
    if not named and config.rollout.policy == "live":
        raise ConfigError("teacher.cache: it names no folder to build; set teacher.cache.path")
    data = _data_of(config, progress)
    if config.rollout.policy == "initial":
        drawn = draw_and_grade(config, data, progress, report)
        if config.rollout.on_policy == 1 or not drawn:
            return drawn
    given = {name: [p for p in graded_by(config, data, name) if p.completion is not None] for name in named}
    if not any(given.values()):
        raise ConfigError(f"data: none of the {len(data.train):,} training prompts has a completion to score")
    note = note_to(progress)
    if lacking := sum(p.completion is None for p in data.train):
        note(f"{lacking:,} of {len(data.train):,} training prompts have no completion, and are left out")
    built = []
    for name, teacher in named.items():
        if teacher.cache is None:
            continue
        source: LocalTeacher | ServedTeacher
        if teacher.served is None:
            check_model(teacher)
            model = load(teacher, note, file_side("teacher", teacher))
            source = LocalTeacher(model, batch_tokens=teacher.batch_tokens)
        else:
            source, examiner = served_teacher(teacher), examiner_of(config, data, name, note)
            examiner.examine_server(source)
            examiner.examine_noise(source)
        cached = cached_teacher(teacher.cache, source, note)
        count = len(given[name])
        if unread := record(cached, given[name], partial(report, count)):
            note(f"{len(unread):,} of {count:,} completions are left out, as in a run: {unread[0]}")
        cached.cache.close()
        built.append(cached)
    return built


def draw_and_grade(
    config: Config, data: RunData, progress: Tracker, report: Callable[[int, int, int], None]
) -> list[CachedTeacher]:
    """The configuration's teachers with a cache, after the initial student has written all completions of the run to
    ``rollout.completions``, and these teachers have scored them.

    Raises:
        GoldError: as for ``train``.
    """
    note = note_to(progress)
    if config.rollout.completions is None:
        raise ConfigError(
            "rollout.completions: it names no folder for the initial student's completions, which other runs read; set "
            "it"
        )
    cached = [name for name, t in config.named_teachers.items() if t.cache is not None]
    teachers: Teachers | None = None
    if cached:
        student, teachers = build_models(_all_asked(config), config.student, data, progress)
    else:
        check_model(config.student)
        student = load(config.student, note, file_side("student", config.student), config.train.seed)
    pin_date(student, teachers)
    rollouts = _drawn(config, data, student, note)
    if teachers is None:
        return []
    setup = Setup.of(student, teachers, data.train, config.recipe)
    rows = compared_rows(setup, rollouts).compared
    built = []
    for name in cached:
        teacher = cast(CachedTeacher, teachers.members[name])
        own = [r for r in rows if name in teachers.of(r.prompt)]
        pair = setup.pairs[name]
        aligned = ((r.prompt.for_teacher, aligned_text(r, pair)) for r in own)
        scored = ((prompt, text.teacher, text.stopped) for prompt, text in aligned)
        if unread := record_texts(teacher, scored, partial(report, len(own))):
            note(f"{len(unread):,} of {len(own):,} completions are left out, as in a run: {unread[0]}")
        teacher.cache.close()
        built.append(teacher)
    return built


def _drawn(
    config: Config, data: RunData, student: LanguageModel, note: Callable[[str], None]
) -> list[Rollout]:
    """The completions of a run that the student writes as it starts; missing ones are drawn."""
    recipe = config.recipe
    places = first_places(PromptOrder.of(data.train, recipe.seed, recipe.order), recipe)
    texts = needed(student, data.train, recipe, places)
    kept = completions_of(student, Path(config.rollout.completions or ""))
    accelerator = accelerator_of(recipe.precision, student.device)
    with rollout_engine(config, config.student) as server:
        engine = server or HuggingFaceEngine(student, recipe.generation_batch_size)

        def begin() -> None:
            if server is not None:
                try_engine(server, student, data.train, recipe.max_new_tokens)

        def generate(requests: Sequence[Request]) -> list[Generation]:
            with accelerator.autocast():
                return within_budgets(student, engine.generate)(requests)

        complete(kept, [request for _, request in texts], begin, generate, note)
    return rollouts_of(student, recipe, kept, texts)


def _all_asked(config: Config) -> Config:
    """The configuration with teachers that are asked for what their caches lack."""

    def asked(teacher: Any) -> Any:
        cache = teacher.cache and teacher.cache.model_copy(update={"missing": "ask"})
        return teacher.model_copy(update={"cache": cache})

    teachers = {name: asked(teacher) for name, teacher in config.teachers.items()}
    return config.model_copy(
        update={"teacher": config.teacher and asked(config.teacher), "teachers": teachers}
    )


def speakers(
    source: str | Path, only: Sequence[str] = (), note: Callable[[str], None] = lambda note: None
) -> dict[str, LanguageModel]:
    """The models of a run to talk with: its student, its teachers in this process, and ``start``, the student that it
    began with. A model's folder or Hub id is the student alone. ``only`` names those to load.

    The student of a run that has not ended is that of its newest checkpoint.

    Raises:
        ConfigError: a name in ``only`` that the source does not have.
        GoldError: a model that cannot be loaded.
    """
    folder = Path(source)
    if not (folder / "config.yaml").is_file():
        _check_only(only, ["student"])
        return {"student": load_model(source)}
    if "recipe" in RunFolder.open(folder).config:
        _check_only(only, ["student"])
        note(f"{folder}: the run was made from Python; its config.yaml has no way to load teacher and start")
        return {"student": load_model(_student_of(folder, note))}
    config = Config.load(folder / "config.yaml")
    loaders: dict[str, Callable[[], LanguageModel]] = {}
    loaders["student"] = lambda: load(_without_adapters(config.student, str(_student_of(folder, note))))
    for name, teacher in config.named_teachers.items():
        if teacher.kind == "local":
            loaders[name] = partial(load, teacher)
        elif not only:
            note(f"{name} is not a model in this process, and is left out")
    loaders["start"] = lambda: load(_without_adapters(config.student))
    _check_only(only, list(loaders))
    found = {}
    for name, loader in loaders.items():
        if not only or name in only:
            note(f"loading {name}")
            found[name] = loader()
    if (day := read_date(folder)) is not None:
        for model in found.values():
            model.rendering.pin_day(day)
    return found


def _check_only(only: Sequence[str], known: Sequence[str]) -> None:
    for name in only:
        if name not in known:
            raise ConfigError(f"--only {name}: there is {', '.join(known)}{did_you_mean(name, known, '')}")


def _student_of(folder: Path, note: Callable[[str], None]) -> Path:
    """The folder of a run's student, or of that in its newest checkpoint."""
    if (folder / "student").is_dir():
        return folder / "student"
    checkpoint, _ = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"{folder}: the run has no checkpoint yet")
    note(f"the run has not ended: its student is that of step {checkpoint.step}")
    return checkpoint.path / "student"


def _without_adapters(student: StudentConfig, path: str | None = None) -> StudentConfig:
    """The student without new adapters, or as it was saved in a folder, where no weights are quantized."""
    changed = (
        {} if path is None else {"path": path, "revision": None, "gguf_file": None, "quantization": None}
    )
    return student.model_copy(update={"lora": None, **changed})


def _draw(output: Path, progress: Tracker | None) -> None:
    """Draws the run's curves; without matplotlib, notes how to draw them later."""
    try:
        plot_run(output)
    except ConfigError as error:
        note_to(progress)(f"no pictures: {error}; then run gold plot {output}")


def _check_trained(folder: Path) -> None:
    """Checks that a run folder contains a configuration and a trained student."""
    if "recipe" in RunFolder.open(folder).config:
        raise ConfigError(
            f"{folder}: the run was made from Python, and its config.yaml names no data; give a configuration with "
            f"student.path={folder / 'student'}"
        )
    if not (folder / "student").is_dir():
        raise ConfigError(
            f"{folder}: the run has no student yet; resume it to its end, or give its configuration"
        )


def _load_averages(folder: Path, teachers: Teachers) -> None:
    """Loads the weights of EMA teachers from the last checkpoint of a run."""
    for name, teacher in teachers.members.items():
        if teacher.state() is None:
            continue
        checkpoint, _ = latest_checkpoint(folder / "checkpoints")
        if checkpoint is None:
            raise ConfigError(f"{folder}: no checkpoint holds the weights of teacher {name}")
        load_average(teacher, checkpoint.path, name)
