"""The training loop: steps, evaluations, checkpoints, signals, and the run folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator

from gold.activity import Stopped, doing, listening
from gold.data import Prompt
from gold.doctor.prompts import PromptReader, examine_prompts, notes_of, raise_refused
from gold.environments.protocol import Environment, Limits
from gold.errors import ConfigError, EngineError, GoldError, TeacherError, TrainingError
from gold.evaluate import EvaluationPlan, Verifier, evaluate
from gold.inspect.report import ReportFile
from gold.models.language_model import LanguageModel
from gold.models.load import load_model
from gold.rollout.engine import RolloutEngine
from gold.teachers.protocol import Teacher
from gold.teachers.several import Teachers
from gold.train.activations import settled
from gold.train.alarms import Warnings, check_end, remedy_for, why_bad
from gold.train.checkpoint_folder import latest_checkpoint, prune, remove_leftovers
from gold.train.conversing import as_prompts, check_conversations, plan_of
from gold.train.engine import begin_engine, push_weights
from gold.train.header import header, settings_of
from gold.train.initial import draw_initial
from gold.train.input_digests import of_run
from gold.train.interrupt import NAMES, Interrupt, ended_by
from gold.train.listener import RunListener
from gold.train.pace import Pace, measure
from gold.train.preflight import (
    accelerator_of,
    check_kept,
    check_lengths,
    check_recipe,
    pack_texts,
    pin_date,
    read_date,
    readers_of,
    write_date,
)
from gold.train.progress import Lasting, Quiet, evaluation_line
from gold.train.recipe import Recipe
from gold.train.resume_rules import Inputs
from gold.train.run_folder import RunFolder
from gold.train.saving import CheckpointWriter, as_written, save_student
from gold.train.saving import Saving as Saving
from gold.train.setup import Setup
from gold.train.state import TrainState
from gold.train.step import train_step, warm_up
from gold.train.trackers import Guarded, RunInfo, Tracker, Trackers
from gold.train.tracking_clients import check_clients, with_clients


@dataclass(repr=False)
class Run:
    """The result of a training run: the trained student, every step's metrics, every evaluation, and the run folder,
    which only the main process has written."""

    student: LanguageModel
    folder: Path | None
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    is_main_process: bool = True

    def __repr__(self) -> str:
        lines = [f"Run of {self.student.name}, {len(self.steps):,} steps"]
        lines += [evaluation_line(each) for each in (*self.evaluations[:1], *self.evaluations[1:][-1:])]
        lines += [] if self.evaluations else ["no held-out prompts were evaluated"]
        if self.folder is None:
            lines += ["not saved: the student is in memory alone"]
        else:
            lines += [f"folder   {self.folder}", f"student  {self.folder / 'student'}"]
        return "\n".join(lines)


def distill(
    student: LanguageModel | str | Path,
    teacher: Teacher | Teachers | LanguageModel | str | Path | None,
    prompts: Sequence[Prompt | str | Mapping[str, Any]],
    recipe: Recipe = Recipe(),  # noqa: B008  (frozen)
    *,
    heldout: Sequence[Prompt | str | Mapping[str, Any]] = (),
    verifier: Verifier | None = None,
    evaluation: EvaluationPlan | None = None,
    saving: Saving = Saving(),  # noqa: B008  (frozen)
    settings: Mapping[str, Any] | None = None,
    inputs: Inputs | None = None,
    progress: Tracker | None = None,
    trackers: Sequence[Tracker | str] = (),
    engine: RolloutEngine | None = None,
    estimate: bool = False,
    environment: Environment | None = None,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
) -> Run:
    """Trains ``student``, in place, on its own completions of ``prompts``, scored by ``teacher``; returns the run.

    Each step draws prompts, samples completions from the student, has the teacher score the same bytes in its own
    tokens and template, and takes one optimizer step on the recipe's objectives, each divided by the count of its unit
    in the whole step over all processes. With ``saving.output`` the run is a folder that can be resumed; every random
    draw is a function of the seed, the step and the sequence's index, so a resumed run repeats an uninterrupted one.

    Args:
        student: a model, or where to load one from.
        prompts: those of ``gold.load_prompts``, texts, or rows that it would read, such as a ``datasets.Dataset``.
        teacher: likewise, or anything with a teacher's interface; None if no objective needs one.
        heldout: prompts of the evaluations before, during and after training; if empty, no evaluation.
        verifier: scores completions, for the ``reward`` objective and for accuracy.
        settings: contents of ``config.yaml`` in the run folder; default: the recipe.
        inputs: contents of ``inputs.json``, see ``gold.train.input_digests``; default: digests of the arguments.
        progress: shows the run to a person; default: notes on stderr.
        trackers: more receivers of all metrics and notes, see ``gold.train.trackers``, or their names, ``CLIENTS``.
        engine: generates completions, and is closed by the caller; default: ``generate`` on the student itself.
        estimate: measures for about ten seconds how long the run will take, and shows that in its header.
        environment: answers the student's turns, within ``limits``, and scores conversations instead of the verifier.

    Raises:
        GoldError: models, data or settings that do not go together; a teacher that stopped answering, or too many
            steps in a row without a finite loss and gradient (a checkpoint is kept).
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written; SystemExit with 143 or 129 after SIGTERM or
            SIGHUP.
    """
    check_clients(trackers)
    student = load_model(student) if isinstance(student, (str, Path)) else student
    teacher = load_model(teacher) if isinstance(teacher, (str, Path)) else teacher
    teachers = teacher if isinstance(teacher, Teachers | None) else Teachers({"teacher": teacher})
    given = as_prompts(prompts, environment)
    others: dict[str, Any] = {"verifier": verifier, "environment": environment, "limits": limits}
    setup = Setup.of(student, teachers, given, recipe, engine, saving.kept_in, **others)
    accelerator = accelerator_of(recipe.precision, student.device)
    # All processes run the checks with the same result; one of them logs.
    members = [Lasting(progress or Quiet()), *with_clients(trackers, saving.output)]
    tracker = Trackers(*(members if accelerator.is_main_process else []))
    measured = as_prompts(heldout, environment), evaluation or plan_of(recipe)
    with listening(listener := RunListener(tracker)):
        return _run(setup, accelerator, *measured, saving, settings, inputs, tracker, listener, estimate)


def _run(
    setup: Setup,
    accelerator: Accelerator,
    heldout: Sequence[Prompt],
    evaluation: EvaluationPlan,
    saving: Saving,
    settings: Mapping[str, Any] | None,
    inputs: Inputs | None,
    tracker: Trackers,
    listener: RunListener,
    estimate: bool,
) -> Run:
    """Checks, opens the folder or resumes the checkpoint, trains, and saves the trained student."""
    student, teachers, recipe = setup.student, setup.teachers, setup.recipe
    check_recipe(recipe, setup.prompts, setup.verifier or setup.environment, accelerator.num_processes)
    kept_day = read_date(saving.output) if saving.output and saving.resume else None
    day = pin_date(student, teachers, kept_day, accelerator)
    readers = readers_of(student, teachers)
    told = () if settings is None else ("context",)  # by a configuration's checks, before models were loaded
    prints_date = _check_prompts(setup, heldout, readers, evaluation.max_new_tokens, tracker, told)
    if setup.needs_teacher:
        check_kept(teachers, student, setup.pairs, setup.prompts, recipe)
    if saving.output and accelerator.is_main_process and inputs is None:
        inputs = of_run(student, teachers, setup.prompts, heldout)
    pack_texts(recipe, student, teachers)
    own = settled(setup, tracker, accelerator.num_processes)
    state = TrainState(student, teachers, own, accelerator, keep_reference=setup.needs_reference)
    run = Run(student, saving.output, is_main_process=accelerator.is_main_process)
    with contextlib.ExitStack() as stack:
        stack.callback(student.lm.eval)
        settings = settings or settings_of(setup, readers)
        folder: RunFolder | None = None
        if saving.output and accelerator.is_main_process:
            assert inputs is not None
            folder = stack.enter_context(_open_folder(saving, settings, inputs, tracker))
            tracker.add(folder)
            tracker.add(Guarded(ReportFile(folder), "report.html"))
            if prints_date:
                write_date(folder.path, day)
        accelerator.wait_for_everyone()
        _restore(state, setup, saving, folder, tracker)
        if folder:
            run.steps, run.evaluations = folder.records("train"), folder.records("eval")
        stack.callback(tracker.finish)
        every = saving.evaluate_every
        pace = partial(measure, heldout=heldout, plan=evaluation, evaluate_every=every) if estimate else None
        _begin(state, setup, settings, every if heldout else 0, tracker, pace)
        interrupt = listener.interrupt = stack.enter_context(Interrupt())
        writer = CheckpointWriter(state, saving.output, folder, saving.keep_last)
        stack.callback(writer.close)
        _Training(state, setup, saving, heldout, evaluation, writer, tracker, interrupt, run).all_steps()
        if folder:
            folder.check_place()
        if saving.output:
            save_student(state, folder)
        accelerator.wait_for_everyone()
        last_record = run.steps[-1] if run.steps else {}
        check_end(last_record | {"step": state.step, "bad_steps": state.bad_steps})
    return run


def _begin(
    state: TrainState,
    setup: Setup,
    settings: Mapping[str, Any],
    evaluate_every: int,
    tracker: Tracker,
    pace_of: Callable[[TrainState, Setup], Pace | None] | None,
) -> None:
    """Prepares the kernels, measures the pace, and shows what the run is."""
    with doing("preparing the kernels"):
        seconds = warm_up(state, setup)
    if seconds > 1.0:
        tracker.note(f"kernels compiled in {seconds:.0f} s; cached for later runs")
    steps = setup.recipe.steps
    pace = pace_of(state, setup) if pace_of and state.step < steps else None
    lines = header(state, setup) | (pace.lines() if pace else {})
    expected = pace.expected if pace else {}
    tracker.start(RunInfo(settings, lines, steps, state.step, evaluate_every, expected))
    if setup.uncorrected:
        tracker.note(setup.uncorrected)


def pace_of(
    student: LanguageModel,
    teachers: Teachers | None,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    heldout: Sequence[Prompt],
    plan: EvaluationPlan,
    evaluate_every: int,
    verifier: Verifier | None = None,
) -> Pace | None:
    """The pace of a run that is not begun; see ``gold.train.pace.measure``."""
    setup = Setup.of(student, teachers, prompts, recipe, verifier=verifier)
    accelerator = accelerator_of(recipe.precision, student.device)
    own = settled(setup, Quiet())
    state = TrainState(student, teachers, own, accelerator, keep_reference=setup.needs_reference)
    warm_up(state, setup)
    return measure(state, setup, heldout, plan, evaluate_every)


@dataclass
class _Training:
    """The steps of a run with its evaluations and checkpoints, until its last step, a signal or an error."""

    state: TrainState
    setup: Setup
    saving: Saving
    heldout: Sequence[Prompt]
    plan: EvaluationPlan
    writer: CheckpointWriter
    tracker: Tracker
    interrupt: Interrupt
    run: Run
    saved: int = 0
    """The step of the last checkpoint; 0 without one: nothing is saved before the first step."""

    def all_steps(self) -> None:
        """Trains up to the last step."""
        self.saved = self.state.step
        try:
            self._all_steps()
        except Stopped:
            self.leave(self.signal_in_any_process())

    def _all_steps(self) -> None:
        state, recipe = self.state, self.setup.recipe
        for prompts, new in (
            (self.setup.prompts, recipe.max_new_tokens),
            (self.heldout, self.plan.max_new_tokens),
        ):
            state.together(partial(check_lengths, self.setup.engine, state.student, prompts, new))
        kept = self.setup.completions
        if state.step or kept is None or not kept.engine_begun:
            begin_engine(state, self.setup)
        self.first_evaluation()
        warnings = Warnings(
            recipe.bad_steps_allowed,
            state.bad_steps,
            reverse_kl=any(t.objective.name == "reverse_kl" for t in self.setup.terms),
        )
        while state.step < recipe.steps:
            try:
                with doing("step"):
                    record, examples = train_step(state, self.setup)
            except GoldError as error:
                self.stop(error)
            self.run.steps.append(record)
            self.tracker.log("train", record)
            for warning in warnings.after(record, examples):
                self.tracker.note(warning)
            if self.is_evaluation_due:
                self.evaluate()
            signal = self.signal_in_any_process()
            hopeless = state.bad_steps > recipe.bad_steps_allowed
            due = state.step % self.saving.checkpoint_every == 0 or state.step == recipe.steps
            if due or hopeless:
                self.writer.save(wait=bool(signal) or hopeless or state.step == recipe.steps)
                self.saved = state.step
            if signal:
                self.leave(signal)
            if hopeless:
                self.give_up(record)

    def first_evaluation(self) -> None:
        """The evaluation before the first step; a resumed run has it already, unless its teacher failed."""
        state = self.state
        done = any(record["step"] == state.step for record in self.run.evaluations)
        if not state.any_process(self.run.is_main_process and self.is_evaluation_due and not done):
            return
        self.evaluate()
        if signal := self.signal_in_any_process():
            self.leave(signal)

    @property
    def is_evaluation_due(self) -> bool:
        """Whether an evaluation follows the current step."""
        step = self.state.step
        return step % self.saving.evaluate_every == 0 or step == self.setup.recipe.steps

    def evaluate(self) -> None:
        """An evaluation after the current step, after the last one of the student as it will be written; the processes
        share it, and all know the result."""
        if not self.heldout:
            return
        state, setup, started = self.state, self.setup, time.perf_counter()
        look = partial(evaluate, state.student, setup.teachers, self.heldout, plan=self.plan)
        look = partial(look, verifier=setup.verifier, conversations=setup.conversations)
        is_last = self.saving.output is not None and state.step == setup.recipe.steps
        try:
            with as_written(state) if is_last else contextlib.nullcontext():
                push_weights(state, setup.engine)
                with doing("evaluation"), state.accelerator.autocast(), state.whole_student():
                    result = look(engine=setup.engine, processes=state)
        except (TeacherError, EngineError) as error:
            self.stop(error)
        record = {"step": state.step, **result.measures, "evaluate_s": time.perf_counter() - started}
        self.run.evaluations.append(record)
        self.tracker.log("eval", record)
        for sample in result.samples:
            self.tracker.log("sample", {"step": state.step, **sample})

    def leave(self, signal: int) -> NoReturn:
        """Ends the run after a signal, saved as it was after its last whole step."""
        step = self.state.step
        self.state.abandon()
        if step != self.saved:
            self.writer.save(wait=True)
        self.writer.wait()
        kept = "; its checkpoint is kept, resume the run with --resume" if self.saving.output and step else ""
        self.tracker.note(f"interrupted {f'after step {step}' if step else 'before the first step'}{kept}")
        raise ended_by(signal)

    def stop(self, error: GoldError) -> NoReturn:
        """Saves the steps so far and ends a run whose teacher or engine failed, or that met a text it cannot use."""
        if not isinstance(error, TeacherError | EngineError) and self.state.accelerator.num_processes > 1:
            raise error  # the others did not fail, and would wait for this process
        self.writer.save(wait=True)
        kept = "; its checkpoint is kept, go on with --resume" if self.saving.output else ""
        raise type(error)(f"after step {self.state.step}: {error}{kept}") from error

    def give_up(self, record: Mapping[str, Any]) -> NoReturn:
        """Ends a run after too many steps in a row that were not applied."""
        step = self.state.step
        kept = (
            f"; the checkpoint of step {step} is kept, and goes on from there with --resume --allow-changed"
            if self.saving.output
            else ""
        )
        raise TrainingError(
            f"step {step}: {self.state.bad_steps} steps in a row had {why_bad(record)} and were not applied; "
            f"{remedy_for(record)}{kept}"
        )

    def signal_in_any_process(self) -> int:
        """The number of a signal caught in any process, the same in all of them; 0 if there is none."""
        caught = self.interrupt.caught
        reached = self.state.sum({str(int(each)): float(caught == each) for each in NAMES})
        return next((int(each) for each in NAMES if reached[str(int(each))]), 0)


def _check_prompts(
    setup: Setup,
    heldout: Sequence[Prompt],
    readers: Sequence[PromptReader],
    evaluated_tokens: int,
    tracker: Tracker,
    told: Sequence[str] = (),
) -> bool:
    """Refuses prompts that a side cannot encode, and notes anomalies, except those of checks that are ``told`` already;
    returns whether a chat template prints the date."""
    room = max(setup.recipe.max_new_tokens, evaluated_tokens)
    with doing("checking the prompts"):
        checks = examine_prompts(setup.prompts, heldout, readers, room)
    raise_refused(checks)
    said = notes_of([check for check in checks if check.check not in told])
    for note in [*check_conversations(setup), *said]:
        tracker.note(note)
    return any(check.check == "date" for check in checks)


def _restore(
    state: TrainState, setup: Setup, saving: Saving, folder: RunFolder | None, tracker: Tracker
) -> None:
    """Draws what the student writes before it is trained, and goes on from a checkpoint."""
    if setup.recipe.policy == "initial":
        draw_initial(state, setup, tracker.note)
    if saving.output and saving.resume:
        _resume(state, saving, setup.recipe.steps, folder, tracker)


def _resume(
    state: TrainState, saving: Saving, steps: int, folder: RunFolder | None, tracker: Tracker
) -> None:
    """Restores the newest complete checkpoint; starts at the first step if there is none.

    Raises:
        CheckpointError: none is complete, its contents are not of this run, or metrics cannot be read.
        ConfigError: it is of a later step than the run's last.
    """
    assert saving.output is not None
    # Reading a checkpoint whole, to compare its digests, takes long; one process does it.
    found, notes = state.from_main(partial(latest_checkpoint, saving.output / "checkpoints"))
    for note in notes:
        tracker.note(note)
    if found is None:
        tracker.note("no checkpoint yet: the run starts at its first step")
    else:
        if found.step > steps:
            raise ConfigError(
                f"{found.path} is of step {found.step}, and train.steps is {steps}; give it at least {found.step} to "
                "resume"
            )
        state.load(found)
        tracker.note(f"resumed after step {state.step}")
    for note in folder.rewind(state.step if found else -1) if folder else ():
        tracker.note(note)
    state.accelerator.wait_for_everyone()
    if folder and state.step == steps:
        # Remains of a process killed between its last save and the pruning.
        remove_leftovers(folder.checkpoints)
        prune(folder.checkpoints, state.step, saving.keep_last)


def check_output(saving: Saving, settings: Mapping[str, Any], inputs: Inputs) -> None:
    """Checks that a run can begin in this folder, or that its run can be resumed with these settings and inputs.

    Raises:
        ConfigError: the folder is inside a model's, holds another run or other files, or its run has refused changes.
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


def _open_folder(saving: Saving, settings: Mapping[str, Any], inputs: Inputs, tracker: Tracker) -> RunFolder:
    assert saving.output is not None
    if saving.resume:
        folder = RunFolder.resume(saving.output, settings, inputs, saving.allow_changed)
    else:
        folder = RunFolder.create(saving.output, settings, saving.overwrite, inputs)
    for note in folder.notes:
        tracker.note(note)
    return folder
