"""Completions of the student as it starts (``rollout.policy: initial``): drawn once, before the first step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from gold.activity import doing
from gold.data import Prompt
from gold.errors import ConfigError, DataError
from gold.models.language_model import LanguageModel
from gold.rollout.ahead import Place
from gold.rollout.completions import Completions, one_writer
from gold.rollout.engine import Generation, Request, rollout_of
from gold.rollout.prompts import encode_prompt
from gold.rollout.types import Rollout
from gold.train.engine import begin_engine, generate, generating
from gold.train.microbatch import compared_rows
from gold.train.preflight import check_lengths, check_scored
from gold.train.recipe import Recipe
from gold.train.setup import Setup
from gold.train.state import TrainState

Note = Callable[[str], None]
CHUNK = 512
"""Completions that are drawn, and written to disk, at a time."""


def requests_of(student: LanguageModel, prompt: Prompt, recipe: Recipe, drawn_at: Place) -> list[Request]:
    """The requests for a prompt's completions that are drawn at a step and place.

    Raises:
        DataError: the prompt leaves no room in the student's context.
    """
    ids = encode_prompt(student, prompt, recipe.max_new_tokens)
    sampling = recipe.sampling.of(prompt)
    # The 0 distinguishes nothing; it stays because the tuple names the random stream: without it all runs would draw
    # other texts.
    return [
        Request(ids, (recipe.seed, *drawn_at, 0, n), sampling, student.vocabulary.stop_ids)
        for n in range(recipe.num_generations)
    ]


def needed(
    student: LanguageModel, prompts: Sequence[Prompt], recipe: Recipe, places: Mapping[int, Place]
) -> list[tuple[Prompt, Request]]:
    """Every completion of a run, in the order of its steps; ``places``: ``first_places`` of the run.

    A prompt's completions have the random streams of its first step, so the first step is that of a run with ``policy:
    live``; later steps with the prompt have the same completions.
    """
    found = []
    for index, place in places.items():
        prompt = prompts[index]
        try:
            requests = requests_of(student, prompt, recipe, place)
        except DataError:
            continue  # counted in its steps
        found += [(prompt, request) for request in requests]
    return found


def draw_initial(state: TrainState, setup: Setup, note: Note) -> None:
    """Reads the completions of the run, and draws the missing ones with the student as it starts. The state is that
    before the first step, and before a checkpoint is loaded.

    Raises:
        EngineError: the engine fails; what it has drawn is kept.
        TeacherError: a teacher that cannot be asked lacks scores of a completion.
    """
    kept, student = setup.completions, state.student
    assert kept is not None
    assert state.step == 0
    texts = needed(student, setup.prompts, setup.recipe, setup.first_places)
    kept.folder = kept.folder if state.accelerator.is_main_process else None

    def begin() -> None:
        prompts, new = [prompt for prompt, _ in texts], setup.recipe.max_new_tokens
        state.together(partial(check_lengths, setup.engine, student, prompts, new))
        begin_engine(state, setup)

    requests = [request for _, request in texts]
    kept.engine_begun = complete(kept, requests, begin, partial(_drawn, state, setup), note, state.from_main)
    if setup.needs_teacher and setup.teachers and not all(t.complete for t in setup.members.values()):
        rollouts = rollouts_of(student, setup.recipe, kept, texts)
        check_scored(setup.teachers, setup.pairs, compared_rows(setup, rollouts).compared)
    kept.complete = True


def complete(
    kept: Completions,
    requests: Sequence[Request],
    begin: Callable[[], None],
    generate: Callable[[Sequence[Request]], list[Generation]],
    note: Note,
    from_main: Callable[[Callable[[], dict[bytes, Generation]]], dict[bytes, Generation]] = lambda read: (
        read()
    ),
) -> bool:
    """Reads the completions of these requests, and generates and keeps the missing ones, after ``begin``; returns
    whether there were any. ``from_main``: the result of the main process, in all."""
    waiting = partial(note, f"waiting for another run, which draws completions to {kept.folder}")
    with one_writer(kept.folder, waiting):
        kept.drawn |= from_main(partial(kept.read, requests))
        missing = kept.missing(requests)
        if missing:
            begin()
            fill(kept, missing, len(requests), generate, note)
        elif kept.folder:
            note(f"the initial student's {len(requests):,} completions are kept in {kept.folder}")
    return bool(missing)


def fill(
    kept: Completions,
    missing: Sequence[Request],
    total: int,
    generate: Callable[[Sequence[Request]], list[Generation]],
    note: Note,
) -> None:
    """Draws the missing ones of ``total`` completions chunk by chunk, and keeps each chunk."""
    where = f" are kept in {kept.folder}, the others" if kept.folder and len(missing) < total else ""
    note(f"the initial student writes {len(missing):,} completions{where}")
    started = time.perf_counter()
    for first in range(0, len(missing), CHUNK):
        chunk = missing[first : first + CHUNK]
        with doing(f"initial student draws, {first:,} of {len(missing):,} done"):
            kept.add(chunk, generate(chunk))
    note(f"{len(missing):,} completions of the initial student in {time.perf_counter() - started:.0f} s")


def rollouts_of(
    student: LanguageModel, recipe: Recipe, kept: Completions, texts: Sequence[tuple[Prompt, Request]]
) -> list[Rollout]:
    """The completions as rollouts, without those that the loss leaves out."""
    drawn = zip(texts, kept.of([request for _, request in texts]), strict=True)
    rollouts = [rollout_of(student, *text, generation) for text, generation in drawn]
    return [r for r in rollouts if r.stopped or recipe.cut == "keep"]


def initial_completions(state: TrainState, setup: Setup) -> Completions:
    """The completions of a run; drawn now if its first step is taken without a run around it.

    Raises:
        ConfigError: the student is not any more what it was at its start.
    """
    kept = setup.completions
    assert kept is not None
    if not kept.complete:
        if state.step:
            raise ConfigError("rollout.policy: the initial student is gone: begin at the first step")
        draw_initial(state, setup, lambda note: None)
    return kept


def _drawn(state: TrainState, setup: Setup, requests: Sequence[Request]) -> list[Generation]:
    """Completions that all processes draw together; each gets all."""
    own = requests[state.index :: state.count]
    with generating(state, setup):
        drawn = state.together(partial(generate, setup, own))
    parts = state.gathered(drawn)
    return [parts[n % state.count][n // state.count] for n in range(len(requests))]
