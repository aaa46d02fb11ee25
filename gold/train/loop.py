"""A training run: the loop, evaluations, checkpoints and the run folder around it."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object

from gold.align.collate import misfit, read
from gold.align.vocabularies import VocabularyPair
from gold.data import Prompt, PromptOrder
from gold.doctor.prompts import PromptReader, examine_prompts, notes_of, raise_refused
from gold.errors import CheckpointError, ConfigError, DataError, GoldError, TeacherError, TrainingError
from gold.evaluate import EvaluationPlan, Verifier
from gold.models.language_model import LanguageModel
from gold.models.load import load_model, save_model
from gold.rollout.engine import RolloutEngine, completed
from gold.teachers.protocol import Teacher
from gold.teachers.several import Teachers
from gold.tokenize.templates import Rendering
from gold.train.alarms import check_end, remedy_for, why_bad
from gold.train.changes import Inputs
from gold.train.checkpoint import is_write_failure, prune, reach_disk, remove_leftovers, save_checkpoint
from gold.train.inputs import of_run
from gold.train.interrupt import Interrupt, ended_by
from gold.train.progress import Lasting, Quiet
from gold.train.recipe import Recipe, problems
from gold.train.run_folder import RunFolder
from gold.train.step import Loop, pairs_of, terms_of
from gold.train.trackers import RunInfo, Tracker, Trackers

DATE_FILE = "template_date.txt"
"""Of a run folder: the day that chat templates write, where one of them prints the date."""


@dataclass(frozen=True)
class Saving:
    """Where a run keeps what it makes, and how often it looks up from training.

    ``overwrite`` removes the run that is in ``output``. ``allow_changed`` resumes it although a key or an input differs
    that makes it another run; what differs is kept in its environment.json.
    """

    output: Path | None = None
    resume: bool = False
    evaluate_every: int = 50
    checkpoint_every: int = 50
    keep_last: int = 2
    overwrite: bool = False
    allow_changed: bool = False


@dataclass
class Run:
    """What came of a training run: the trained student, every step's metrics, every evaluation, the run folder, which
    the main process alone has written."""

    student: LanguageModel
    folder: Path | None
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    is_main_process: bool = True


def distill(
    student: LanguageModel | str | Path,
    teacher: Teacher | Teachers | LanguageModel | str | Path | None,
    prompts: Sequence[Prompt | str],
    recipe: Recipe = Recipe(),  # noqa: B008  (frozen)
    *,
    heldout: Sequence[Prompt | str] = (),
    verifier: Verifier | None = None,
    evaluation: EvaluationPlan | None = None,
    saving: Saving = Saving(),
    settings: Mapping[str, Any] | None = None,
    inputs: Inputs | None = None,
    progress: Tracker | None = None,
    trackers: Sequence[Tracker] = (),
    engine: RolloutEngine | None = None,
) -> Run:
    """Trains ``student``, in place, on its own completions of ``prompts``, graded by ``teacher``; returns the run.

    Each step draws prompts, lets the student complete them, has the teacher read the same bytes in its own tokens and
    template, and takes one optimizer step on the recipe's objectives, each divided by the count of its unit in the
    whole step over all processes. With ``saving.output`` the run is a folder that can be resumed; every random draw
    is a function of the seed, the step and the sequence's number, so a resumed run repeats an uninterrupted one.

    Args:
        student: a model, or where to load one from.
        teacher: likewise, or anything that scores texts as a teacher does; None where no objective needs one.
        heldout: prompts of the evaluations before, during and after; none, no evaluation.
        verifier: scores completions, for the ``reward`` objective and for accuracy.
        settings: what ``config.yaml`` of the run folder holds; the recipe, where it is left out.
        inputs: what ``inputs.json`` of the run folder holds, see ``gold.train.inputs``; digests of what is given, where
            it is left out.
        progress: what a person sees of the run; notes on stderr, where it is left out.
        trackers: further receivers of every metric and note, see ``gold.train.trackers``.
        engine: generates the completions with the weights that it is given after every step; the student itself, where
            it is left out.

    Raises:
        ConfigError: objectives that the teacher, the data or the number of processes cannot serve.
        DataError: no prompts, or one that does not fit.
        TrainingError: too many steps in a row without a finite loss and gradient, a checkpoint is kept; or the last
            ones, however few, everything is kept.
        TeacherError: the teacher cannot be had any more; a checkpoint is kept.
        CheckpointError: a run folder that cannot be written or resumed.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written; SystemExit with 143 or 129 after SIGTERM or
            SIGHUP.
    """
    prompts, heldout = _prompts(prompts), _prompts(heldout)
    student = load_model(student) if isinstance(student, (str, Path)) else student
    teacher = load_model(teacher) if isinstance(teacher, (str, Path)) else teacher
    teachers = teacher if isinstance(teacher, Teachers | None) else Teachers({"teacher": teacher})
    accelerator = _accelerator(recipe.precision, student.device)
    # All processes do and find the same; one of them logs.
    tracker = Trackers(*([Lasting(progress or Quiet()), *trackers] if accelerator.is_main_process else []))
    evaluation = evaluation or EvaluationPlan(
        max_new_tokens=recipe.max_new_tokens, generation_batch_size=recipe.generation_batch_size
    )
    pairs = pairs_of(student, teachers)
    terms = terms_of(recipe, teachers, pairs)
    check_recipe(recipe, prompts, verifier, accelerator.num_processes)
    kept_date = read_date(saving.output) if saving.output and saving.resume else None
    day = pin_date(student, teachers, kept_date, accelerator)
    readers = readers_of(student, teachers)
    room = max(recipe.max_new_tokens, evaluation.max_new_tokens)
    checks = examine_prompts(prompts, heldout, readers, room)
    raise_refused(checks)
    for note in notes_of(checks):
        tracker.note(note)
    if any(t.objective.needs != "nothing" for t in terms):
        check_kept(teachers, student, pairs, prompts, recipe)
    loop = Loop(student, teachers, pairs, prompts, recipe, terms, verifier, accelerator, engine)
    run = Run(student, saving.output, is_main_process=accelerator.is_main_process)
    with contextlib.ExitStack() as stack:
        stack.callback(student.lm.eval)
        folder: RunFolder | None = None
        arguments = {r.role: dict(r.rendering.arguments) for r in readers if r.rendering.arguments}
        settings = settings or {
            "recipe": recipe.model_dump(mode="json"),
            "student": student.name,
            "teacher": _names(teachers),
            **({"template_kwargs": arguments} if arguments else {}),
        }
        if saving.output and accelerator.is_main_process:
            inputs = of_run(student, teachers, prompts, heldout) if inputs is None else inputs
            folder = stack.enter_context(_open_folder(saving, settings, inputs, tracker))
            tracker.members.append(folder)
            if any(check.check == "date" for check in checks):
                _write_date(folder.path, day)
        accelerator.wait_for_everyone()
        if saving.output and saving.resume:
            loop.resume(saving.output / "checkpoints", folder, tracker)
            if folder and loop.step == recipe.steps:
                # What was killed between its last save and what that removes.
                remove_leftovers(folder.checkpoints)
                prune(folder.checkpoints, loop.step, saving.keep_last)
        if folder:
            run.steps, run.evaluations = folder.records("train"), folder.records("eval")
        stack.callback(tracker.finish)
        tracker.start(RunInfo(settings, loop.header(), recipe.steps, loop.step))
        if (seconds := loop.prepare()) > 1.0:
            tracker.note(f"kernels compiled in {seconds:.0f} s; cached for later runs")
        interrupt = stack.enter_context(Interrupt())

        def look() -> None:
            """An evaluation after the current step."""
            if not heldout:
                return
            started = time.perf_counter()
            result = loop.evaluate(heldout, evaluation)
            record = {"step": loop.step, **result.measures, "evaluate_s": time.perf_counter() - started}
            run.evaluations.append(record)
            tracker.log("eval", record)
            for sample in result.samples:
                tracker.log("sample", {"step": loop.step, **sample})

        def keep() -> None:
            """A checkpoint after the current step."""
            if saving.output:
                if folder:
                    folder.sync()
                    save_checkpoint(folder.checkpoints, loop.step, loop.write, saving.keep_last)
                accelerator.wait_for_everyone()

        def due() -> bool:
            """Whether an evaluation belongs after the current step."""
            return loop.step % saving.evaluate_every == 0 or loop.step == recipe.steps

        def stop(error: GoldError) -> NoReturn:
            """Ends a run whose teacher is gone, or that has met a text it cannot use, the steps so far kept."""
            if not isinstance(error, TeacherError) and accelerator.num_processes > 1:
                raise error  # the others know nothing of it, and would wait
            keep()
            raise type(error)(
                f"after step {loop.step}: {error}"
                + ("; its checkpoint is kept, go on with --resume" if saving.output else "")
            ) from error

        # A resumed run has looked before its checkpoint was saved, unless its teacher was gone.
        looked = any(record["step"] == loop.step for record in run.evaluations)
        if loop.anywhere(accelerator.is_main_process and due() and not looked):
            try:
                look()
            except TeacherError as error:
                stop(error)
            if number := loop.signal_anywhere(interrupt.caught):
                tracker.note(
                    f"interrupted {f'after step {loop.step}' if loop.step else 'before the first step'}"
                )
                raise ended_by(number)
        while loop.step < recipe.steps:
            try:
                record = loop.train_step()
            except GoldError as error:
                stop(error)
            run.steps.append(record)
            tracker.log("train", record)
            for warning in loop.warnings(record):
                tracker.note(warning)
            last = loop.step == recipe.steps
            if due():
                try:
                    look()
                except TeacherError as error:
                    stop(error)
            interrupted = loop.signal_anywhere(interrupt.caught)
            hopeless = loop.bad_steps > recipe.bad_steps_allowed
            if loop.step % saving.checkpoint_every == 0 or last or interrupted or hopeless:
                keep()
            if interrupted:
                kept = "; its checkpoint is kept, resume the run with --resume" if saving.output else ""
                tracker.note(f"interrupted after step {loop.step}{kept}")
                raise ended_by(interrupted)
            if hopeless:
                raise TrainingError(
                    f"step {loop.step}: {loop.bad_steps} steps in a row had {why_bad(record)} "
                    f"and were not applied; {remedy_for(record)}"
                    + (
                        f"; the checkpoint of step {loop.step} is kept, and goes on from there with --resume "
                        "--allow-changed"
                        if saving.output
                        else ""
                    )
                )
        if folder:
            folder.check_place()
            _save_student(student, folder.path)
        accelerator.wait_for_everyone()
        last_record = run.steps[-1] if run.steps else {}
        check_end(last_record | {"step": loop.step, "bad_steps": loop.bad_steps})
    return run


def check_output(saving: Saving, settings: Mapping[str, Any], inputs: Inputs) -> None:
    """Nothing, where a run can begin in this folder, or the run in it can go on with these settings and inputs.

    Raises:
        ConfigError: the folder lies in a model's, holds another run or other files, or was begun with others.
        CheckpointError: ``resume`` without a run.
    """
    assert saving.output is not None
    if saving.resume and saving.overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite removes it; give one of them")
    if saving.resume:
        RunFolder.check_resume(saving.output, settings, inputs, saving.allow_changed)
    elif saving.allow_changed:
        raise ConfigError("--allow-changed is for a run that goes on; give --resume too, or leave it out")
    else:
        RunFolder.check_new(saving.output, saving.overwrite)


def _prompts(given: Sequence[Prompt | str]) -> list[Prompt]:
    """Plain strings as prompts, numbered."""
    return [Prompt(key=str(n), text=p) if isinstance(p, str) else p for n, p in enumerate(given)]


def check_recipe(
    recipe: Recipe, prompts: Sequence[Prompt], verifier: Verifier | None, processes: int
) -> None:
    """Nothing, where the recipe can be trained on these prompts.

    Raises:
        DataError: no prompts, or none with the completions that the recipe needs.
        ConfigError: settings that do not go together.
    """
    if not prompts:
        raise DataError("no prompts to train on; give at least one")
    if recipe.prompts_per_step < processes:
        raise ConfigError(
            f"train.prompts_per_step is {recipe.prompts_per_step} for {processes} processes; each needs at least one"
        )
    if recipe.on_policy < 1.0 and (lacking := [p.key for p in prompts if p.completion is None]):
        raise DataError(
            f"prompt {lacking[0]} (one of {len(lacking)}) has no completion, and rollout.on_policy is "
            f"{recipe.on_policy:g}; give every prompt one, or set it to 1"
        )
    if found := list(problems(recipe, has_verifier=verifier is not None)):
        raise ConfigError(*found)


def readers_of(student: LanguageModel, teachers: Teachers | None) -> list[PromptReader]:
    """Who reads prompts: the student, and the teachers that have a tokenizer here."""
    readers = [
        PromptReader(
            "student", student.name, student.tokenizer, student.vocabulary, student.rendering, student.context
        )
    ]
    for name, teacher in teachers.members.items() if teachers else ():
        if teacher.tokenizer is None:
            continue
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
            )
        )
    return readers


def _grades(teachers: Teachers | None, name: str, prompt: Prompt) -> bool:
    return teachers is not None and name in teachers.of(prompt)


def pin_date(
    student: LanguageModel,
    teachers: Teachers | None,
    kept: date | None = None,
    accelerator: Accelerator | None = None,
) -> date:
    """The day that all chat templates which print the date write from now on: the one that a run has kept, else the one
    that its teacher's cache began on, else today. What a cache holds is read by the day of that cache in any case."""
    members = list(teachers.members.values()) if teachers else []
    day = kept or next((t.pinned_date for t in members if t.pinned_date), None) or date.today()
    if accelerator is not None and accelerator.num_processes > 1:
        day = gather_object([day])[0]  # midnight may be between two processes
    student.rendering.pin_day(day)
    # Those with a day of their own last: a model may stand behind several.
    for teacher in sorted(members, key=lambda t: t.pinned_date is not None):
        teacher.pin_date(day)
    return day


def read_date(folder: Path) -> date | None:
    """The day that a run's templates write, where it has kept one.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = folder / DATE_FILE
    try:
        return date.fromisoformat(file.read_text("utf-8").strip()) if file.exists() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} holds no day such as 2026-11-29: {error}") from error


def _write_date(folder: Path, day: date) -> None:
    try:
        (folder / DATE_FILE).write_text(f"{day.isoformat()}\n", "utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {folder / DATE_FILE}: {error.strerror or error}") from error


def check_kept(
    teachers: Teachers | None,
    student: LanguageModel,
    pairs: Mapping[str, VocabularyPair],
    prompts: Sequence[Prompt],
    recipe: Recipe,
) -> None:
    """Nothing, unless a run that reads completions alone will miss some in a cache behind which there is nobody.

    Raises:
        TeacherError: it will; the message says how many.
    """
    members = teachers.members if teachers else {}
    unasked = {n: t for n, t in members.items() if not t.complete}
    if teachers is None or not unasked or recipe.on_policy > 0:
        return
    order = PromptOrder(len(prompts), recipe.seed)
    steps = (order.batch(step, recipe.prompts_per_step) for step in range(recipe.steps))
    needed = [prompts[i] for i in sorted(set().union(*steps))]
    for name, teacher in unasked.items():
        mine = [p for p in needed if name in teachers.of(p)]
        given = [completed(student, p, recipe.max_new_tokens) for p in mine]
        texts = [read(rollout, pairs[name]) for rollout in given]
        kept = [
            (r.prompt.for_teacher, t) for r, t in zip(given, texts, strict=True) if not misfit(teacher, r, t)
        ]
        teacher.check_kept([p for p, _ in kept], [t.teacher for _, t in kept], [t.stopped for _, t in kept])


def _names(teachers: Teachers | None) -> Any:
    """What a run folder says of the teachers that a run from Python had."""
    if teachers is None:
        return None
    if not teachers.several:
        return next(t.name for t in teachers.members.values())
    names = {name: t.name for name, t in teachers.members.items()}
    return {**names, **({"mix": asdict(teachers.mix)} if teachers.mix else {})}


def _accelerator(precision: str, device: torch.device) -> Accelerator:
    # Accelerate keeps the precision of a process's first run for good; a later run may want another.
    AcceleratorState._reset_state()
    return Accelerator(cpu=device.type == "cpu", mixed_precision=_precision(precision, device))


def _precision(wanted: str, device: torch.device) -> str:
    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"


def _open_folder(saving: Saving, settings: Mapping[str, Any], inputs: Inputs, tracker: Tracker) -> RunFolder:
    assert saving.output is not None
    if saving.resume:
        folder = RunFolder.resume(saving.output, settings, inputs, saving.allow_changed)
    else:
        folder = RunFolder.create(saving.output, settings, saving.overwrite, inputs)
    for note in folder.notes:
        tracker.note(note)
    return folder


def _save_student(student: LanguageModel, folder: Path) -> None:
    """The student in ``folder/student``, whole or not there."""
    final, partial = folder / "student", folder / ".tmp-student"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_model(student, partial)
        reach_disk(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not is_write_failure(error):
            raise
        raise CheckpointError(
            f"cannot save the student in {final}: {getattr(error, 'strerror', None) or error}; the last checkpoint "
            "holds it, free some space and resume"
        ) from error
