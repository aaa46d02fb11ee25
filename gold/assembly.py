"""What a configuration names, made: prompts, models, recipe. The last place that sees a configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gold.align.roles import Roles
from gold.chat import prompt_text
from gold.config import Config, check_data
from gold.data import Prompt, load_prompts, split_by_hash
from gold.doctor.checks import Check, Report, examine
from gold.doctor.report import diagnose
from gold.doctor.server import examine_noise, examine_server
from gold.doctor.side import Side, read_side, side_of
from gold.errors import ConfigError, ModelError
from gold.evaluate import Evaluation, EvaluationPlan, Verifier, evaluate
from gold.models import LanguageModel, check_files, load_model, pick_device
from gold.plots import plot_run
from gold.progress import Progress
from gold.recipe import Recipe, Term
from gold.rollout import Sampling
from gold.run import RunFolder
from gold.tasks import load_task
from gold.teachers.cached import CachedTeacher, UnaskedTeacher, record
from gold.teachers.local import LocalTeacher
from gold.teachers.protocol import Teacher
from gold.teachers.served import ServedTeacher
from gold.train import Run, Saving, check_output, distill

if TYPE_CHECKING:
    from gold.config import StudentConfig, TeacherConfig


@dataclass(frozen=True)
class RunData:
    """Prompts to train on, prompts held out, and what scores completions, where something does."""

    train: list[Prompt]
    heldout: list[Prompt]
    verifier: Verifier | None


def load_data(config: Config) -> RunData:
    """The prompts of a configuration; as many held out as evaluations use.

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
        train = load_prompts(data.prompts)
        if data.heldout is not None:
            heldout = load_prompts(data.heldout)
        else:
            train, heldout = split_by_hash(train, data.heldout_share)
    else:
        raise ConfigError("data: neither prompts nor task is given: name a JSONL file or a task")
    check_data(
        config,
        has_completions=all(p.completion is not None for p in train),
        has_verifier=verifier is not None,
    )
    return RunData(train, heldout[: config.evaluate.prompts], verifier)


def recipe_of(config: Config) -> Recipe:
    """The part of a configuration that decides what the training loop computes."""
    rollout, optimizer, train = config.rollout, config.optimizer, config.train
    return Recipe(
        objectives=tuple(Term(t.name, t.weight, **t.options) for t in config.objectives),
        sampling=Sampling(rollout.temperature, rollout.top_p, rollout.max_new_tokens),
        per_prompt=rollout.per_prompt,
        on_policy=rollout.on_policy,
        rollout_batch=rollout.batch,
        steps=train.steps,
        prompts_per_step=train.prompts_per_step,
        sequences_per_forward=train.sequences_per_forward,
        seed=train.seed,
        lr=optimizer.lr,
        betas=optimizer.betas,
        weight_decay=optimizer.weight_decay,
        warmup_steps=optimizer.warmup_steps,
        schedule=optimizer.schedule,
        final_lr_share=optimizer.final_lr_share,
        clip_norm=optimizer.clip_norm,
        precision=train.precision,
        gradient_checkpointing=train.gradient_checkpointing,
        bad_steps_allowed=train.bad_steps_allowed,
    )


def evaluation_of(config: Config) -> EvaluationPlan:
    """How a configuration's evaluations are run."""
    return EvaluationPlan(
        per_prompt=config.evaluate.per_prompt,
        max_new_tokens=config.rollout.max_new_tokens,
        samples=config.evaluate.samples,
        sequences_per_forward=config.evaluate.sequences_per_forward,
        rollout_batch=config.rollout.batch,
        seed=config.train.seed,
    )


def train(config: Config, *, resume: bool = False, progress: Progress | None = None) -> Run:
    """The run that a configuration describes: loads prompts and models, trains, evaluates, saves.

    Whatever can be refused without a model is refused before one is loaded.

    Raises:
        GoldError: anything in the configuration, the data or the models that cannot work; see ``distill``.
    """
    output = Path(config.output)
    check_output(output, resume, config.to_dict())
    data = load_data(config)
    student, teacher = _pair(config, config.student, data, progress)
    run = distill(
        student,
        teacher,
        data.train,
        recipe_of(config),
        heldout=data.heldout,
        verifier=data.verifier,
        evaluation=evaluation_of(config),
        saving=Saving(
            output, resume, config.evaluate.every, config.train.checkpoint_every, config.train.keep_last
        ),
        settings=config.to_dict(),
        progress=progress,
    )
    if run.is_main_process:
        _draw(output, progress)
    return run


def _draw(output: Path, progress: Progress | None) -> None:
    """The run's pictures; a machine without matplotlib is told how to get them later."""
    try:
        plot_run(output)
    except ConfigError as error:
        if progress is not None:
            progress.note(f"no pictures: {error}; then run gold plot {output}")


def evaluate_source(
    source: str | Path, overrides: Sequence[str] = (), progress: Progress | None = None
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
    trained_student, teacher = _pair(config, student, data, progress, judged=False)
    return evaluate(
        trained_student,
        teacher,
        data.heldout,
        plan=evaluation_of(config),
        verifier=data.verifier,
    )


def _pair(
    config: Config, student: StudentConfig, data: RunData, progress: Progress | None, judged: bool = True
) -> tuple[LanguageModel, Teacher]:
    """Student and teacher; ``judged``: the pair, and the server of a teacher that is served, are examined first."""
    consult = partial(_consult, config, data, progress) if judged else None
    unasked = config.teacher.cache is not None and config.teacher.cache.missing == "stop"
    if config.teacher.served is None and not unasked:
        mine, theirs = _load([student, config.teacher], progress, consult)
        return mine, _cached(config.teacher, LocalTeacher(theirs), progress)
    side = read_side("teacher", _source(config.teacher), roles_of(config.teacher))
    served = None if unasked else _served(config.teacher, side)
    teacher = _cached(config.teacher, served or _unasked(config.teacher, side), progress)
    # What a cache holds came from a server that was examined; that may be gone, and all that the run needs be there.
    later = isinstance(teacher, CachedTeacher) and len(teacher.cache) > 0
    if judged and served is not None and not later:
        _judge(config, data, examine_server(served, data.train), progress)
    of_files = file_side("student", student.path, roles_of(student))
    if consult is not None and of_files is not None:
        consult(of_files, side)
    (mine,) = _load([student], progress)
    if consult is not None and of_files is None:
        consult(side_of("student", mine.vocabulary.without_markers(), mine.tokenizer), side)
    if judged and served is not None:
        if isinstance(teacher, CachedTeacher) and later:
            teacher.before_asking = partial(_examine, served, mine, config, data, progress)
        else:
            _judge(config, data, [examine_noise(served, data.train, mine)], progress)
    return mine, teacher


def _examine(
    served: ServedTeacher, student: LanguageModel, config: Config, data: RunData, progress: Progress | None
) -> None:
    """The examination of a server, as a whole."""
    _judge(config, data, examine_server(served, data.train), progress)
    _judge(config, data, [examine_noise(served, data.train, student)], progress)


def build_cache(
    config: Config, progress: Progress, told: Callable[[int, int, int], None] = lambda *_: None
) -> CachedTeacher:
    """The teacher of a configuration, its cache holding all completions that the run's training prompts have.

    What it holds already is not asked for. ``told`` is given, time and again, how many prompts are done with, how many
    there are, and how many of the teacher's tokens and ends were asked for. The student is not looked at.

    Raises:
        GoldError: as for ``train``.
    """
    if config.teacher.cache is None:
        raise ConfigError("teacher.cache: it names no folder to build; set teacher.cache.path")
    data = load_data(config)
    given = [prompt for prompt in data.train if prompt.completion is not None]
    if not given:
        raise ConfigError(f"data: none of the {len(data.train):,} training prompts has a completion to score")
    if lacking := len(data.train) - len(given):
        progress.note(
            f"{lacking:,} of {len(data.train):,} training prompts have no completion, and are left out"
        )
    if config.teacher.served is None:
        (model,) = _load([config.teacher], progress)
        teacher = _cached(config.teacher, LocalTeacher(model), progress)
    else:
        served = _served(
            config.teacher, read_side("teacher", _source(config.teacher), roles_of(config.teacher))
        )
        _judge(
            config, data, [*examine_server(served, data.train), examine_noise(served, data.train)], progress
        )
        teacher = _cached(config.teacher, served, progress)
    assert isinstance(teacher, CachedTeacher)
    record(teacher, given, lambda done, rows: told(done, len(given), rows))
    teacher.cache.close()
    return teacher


def _served(config: TeacherConfig, side: Side) -> ServedTeacher:
    """The teacher of a configuration that names a server."""
    assert config.served is not None
    device = pick_device(config.device)
    rows = side.config.get("vocab_size")
    return ServedTeacher(
        _source(config), roles=roles_of(config), rows=rows, device=device, **config.served.model_dump()
    )


def _unasked(config: TeacherConfig, side: Side) -> UnaskedTeacher:
    """The teacher of a configuration that learns from a cache alone."""
    rows = side.config.get("vocab_size")
    return UnaskedTeacher(
        _source(config), roles=roles_of(config), rows=rows, device=pick_device(config.device)
    )


def _cached(
    config: TeacherConfig, teacher: LocalTeacher | ServedTeacher | UnaskedTeacher, progress: Progress | None
) -> Teacher:
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
        if not cached.asks:
            progress.note(
                f"cache {cache.path}: the teacher is not asked; evaluations leave out what it would say of the student"
            )
    return cached


def _source(model: StudentConfig | TeacherConfig) -> str | Path:
    """Where the files of a model are that tell of its tokenizer."""
    return Path(model.path) / model.gguf_file if model.gguf_file else model.path


def diagnose_run(
    source: Path, *, weights: bool = False, sequences: int | None = None, tokens: int | None = None
) -> Report:
    """What `gold doctor` finds of a configuration's pair, judged by its own prompts.

    Raises:
        GoldError: as for ``train``.
    """
    config = Config.load(source)
    data = load_data(config)

    def load() -> tuple[LanguageModel, LanguageModel]:
        student, teacher = _load([config.student, config.teacher], None)
        return student, teacher

    student, teacher = _source(config.student), _source(config.teacher)
    cache = config.teacher.cache
    unasked = cache is not None and cache.missing == "stop"
    served = config.teacher.served is not None and not unasked
    report = diagnose(
        student,
        teacher,
        roles=(roles_of(config.student), roles_of(config.teacher)),
        dtypes=(config.student.dtype, config.teacher.dtype),
        texts=run_texts(data.train),
        prompt=max((prompt_text(p) for p in data.train), key=len),
        sequences=sequences or config.train.sequences_per_forward,
        tokens=tokens or config.rollout.max_new_tokens,
        load=load if weights and not served and not unasked else None,
    )
    if not served:
        return report
    made = _served(config.teacher, read_side("teacher", teacher, roles_of(config.teacher)))
    checks = examine_server(made, data.train)
    if all(check.status != "fail" for check in checks):
        checks.append(examine_noise(made, data.train))
    return replace(report, checks=[*report.checks, *checks])


def run_texts(prompts: Sequence[Prompt]) -> list[str]:
    """What a run's texts look like, in 4 kB: completions of some prompts, or the prompts where there are none."""
    texts: list[str] = []
    for prompt in prompts[:: max(1, len(prompts) // 64)]:
        text = prompt.completion or prompt_text(prompt)
        room = 4096 - sum(map(len, texts))
        if room <= 0:
            break
        if text.strip():
            texts.append(text[: min(room, 512)])
    return texts


def _consult(config: Config, data: RunData, progress: Progress | None, student: Side, teacher: Side) -> None:
    """Notes what stands in the way of a pair, as far as the run minds it.

    Raises:
        ConfigError: the pair cannot be trained, and the run is to stop then.
    """
    _judge(config, data, examine(student, teacher, run_texts(data.train)).checks, progress)


def _judge(config: Config, data: RunData, checks: Sequence[Check], progress: Progress | None) -> None:
    """Notes what was found, as far as the run minds it.

    Raises:
        ConfigError: something that the run cannot go on with, and it is to stop then.
    """
    failures = [check for check in checks if check.status == "fail"]
    if config.train.doctor == "stop" and failures:
        lines = [f"{check.check}: {check.found}; {check.advice}" for check in failures]
        raise ConfigError(
            "\n".join(f"this pair cannot be trained: {line} (train.doctor=report goes on)" for line in lines)
        )
    minded = {term.name for term in config.objectives}
    minded |= {str(value) for term in config.objectives for value in term.options.values()}
    if any(prompt.messages is not None for prompt in data.train):
        minded.add("messages")
    # All processes find the same; one of them tells.
    if progress is not None and os.environ.get("RANK", "0") == "0":
        for check in checks:
            if check.status != "pass" and (not check.concerns or minded.intersection(check.concerns)):
                progress.note(f"{check.check}: {check.found}; {check.advice}")


def _load(
    models: Sequence[StudentConfig | TeacherConfig],
    progress: Progress | None,
    consult: Callable[[Side, Side], None] | None = None,
) -> list[LanguageModel]:
    """Student and teacher, or the student alone, loaded once the files and the tokenizers of all are found good."""
    sides: list[Side | None] = []
    for role, model in zip(ROLES, models, strict=False):
        check_files(model.path, gguf_file=model.gguf_file)
        try:
            pick_device(model.device)
        except ModelError as error:
            raise ModelError(f"model {model.path}: {error}") from error
        sides.append(file_side(role, model.path, roles_of(model)))
    of_files = [side for side in sides if side is not None]
    if consult is not None and len(of_files) == len(sides):
        consult(*of_files)
    loaded = []
    for model, of_file in zip(models, sides, strict=True):
        made = load_model(
            model.path,
            gguf_file=model.gguf_file,
            dtype=model.dtype,
            device=model.device,
            roles=roles_of(model),
        )
        if of_file is not None and progress is not None:
            own = made.vocabulary.without_markers()
            for difference in of_file.vocabulary.differences(own, texts=SAMPLE_TEXTS):
                progress.note(f"model {made.name}: the loaded tokenizer and its file differ: {difference}")
        loaded.append(made)
    if consult is not None and len(of_files) < len(sides):
        found = [(m.vocabulary.without_markers(), m.tokenizer) for m in loaded]
        consult(*(side_of(role, *each) for role, each in zip(ROLES, found, strict=True)))
    return loaded


def file_side(role: str, path: str | Path, roles: Roles | None = None) -> Side | None:
    """What a model folder's files tell of it, where a tokenizer.json is among them.

    Raises:
        VocabularyError: a tokenizer that cannot be spelled in bytes, or has no token of a name in ``roles``.
    """
    return read_side(role, path, roles) if (Path(path) / "tokenizer.json").is_file() else None


def roles_of(model: StudentConfig | TeacherConfig) -> Roles:
    """The special tokens that a configuration names for a model."""
    return Roles(model.roles.stop, model.roles.bos, model.roles.pad)


ROLES = ("student", "teacher")
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
