"""The prompts of a configuration: training prompts, held-out prompts, and those that a teacher scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from gold.config import Config
from gold.data import LazyPrompts, Prompt, PromptFile, hold_out, load_prompts, split_by_hash
from gold.environments.adapters import environment_for
from gold.environments.protocol import Environment
from gold.errors import ConfigError
from gold.evaluate import Verifier
from gold.losses import find
from gold.rollout.conversations import TurnPrompts
from gold.tasks import load_task
from gold.teachers.several import check_routes
from gold.train.preflight import check_recipe
from gold.train.recipe import Recipe


@dataclass(frozen=True)
class RunData:
    """Training prompts, held-out prompts, of which evaluations use the first ``evaluated``, and a task's verifier;
    ``notes`` say which columns were not read; ``environment`` answers the student's turns."""

    train: Sequence[Prompt]
    all_heldout: Sequence[Prompt]
    evaluated: int
    verifier: Verifier | None
    notes: Sequence[str] = ()
    environment: Environment | None = None

    @property
    def heldout(self) -> Sequence[Prompt]:
        """The held-out prompts that evaluations use."""
        return self.all_heldout[: self.evaluated]


def load_data(config: Config) -> RunData:
    """The prompts of a configuration.

    Raises:
        DataError: a file that is missing or has a bad line.
        ConfigError: an unknown task, or data that the objectives cannot be trained on.
    """
    data = config.data
    verifier: Verifier | None = None
    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    notes: list[str] = []
    if data.task is not None:
        task = load_task(data.task.name, **data.task.options)
        verifier = task
        train = task.prompts("train", data.task.train, data.task.seed)
        heldout = task.prompts("heldout", data.task.heldout, data.task.seed)
    elif data.prompts is not None:
        train = training_prompts(config)
        notes += train.facts.notes
        given = heldout_prompts(config)
        if given is not None:
            heldout = given
            if given.facts.ignored != train.facts.ignored:
                notes += given.facts.notes
        elif data.heldout_share is not None:
            train, heldout = split_by_hash(train, data.heldout_share)
        else:
            train, heldout = hold_out(train, config.evaluate.prompts)
    else:
        raise ConfigError("data: neither prompts nor task is given: name a file or data set, or a task")
    source = config.environment.source if config.environment is not None else None
    environment = environment_for(verifier, source)
    check_recipe(config.recipe, train, verifier or environment, 1)
    if config.teacher is not None and config.teacher.kind == "self":
        _check_context(config.recipe, train)
    if config.route is not None:
        check_routes(chain(train, heldout), config.teachers)
        if idle := sorted(config.teachers.keys() - {p.route for p in train}):
            raise ConfigError(
                f"teachers.{idle[0]}: no training prompt has this name as its {config.route}: leave it out"
            )
    if environment is not None:
        train, heldout = TurnPrompts(train, environment), TurnPrompts(heldout, environment)
    return RunData(train, heldout, config.evaluate.prompts, verifier, notes, environment)


def training_prompts(config: Config) -> PromptFile:
    """All prompts of ``data.prompts``.

    Raises:
        DataError: as ``gold.data.load_prompts``.
    """
    data = config.data
    assert data.prompts is not None
    of_hub = {"subset": data.subset, "revision": data.revision, "streaming": data.streaming}
    return _read(config, data.prompts, data.split, map=data.map, **of_hub)


def heldout_prompts(config: Config) -> PromptFile | None:
    """The held-out prompts, if they have a source of their own: another, or another split of the same.

    Raises:
        DataError: as ``gold.data.load_prompts``.
    """
    data = config.data
    if data.heldout is None and data.heldout_split is None:
        return None
    same = data.heldout is None
    of_hub = {
        "subset": data.heldout_subset or (data.subset if same else None),
        "revision": data.revision if same else None,
        "streaming": data.streaming if same else False,
    }
    renamed = data.map if data.heldout_map is None else data.heldout_map
    return _read(
        config,
        data.heldout or data.prompts or "",
        data.heldout_split,
        map=renamed,
        unweighted=True,
        **of_hub,
    )


def _read(config: Config, source: str, split: str | None, **of_source: Any) -> PromptFile:
    options = {"route": config.route, "weight": config.data.weight, **of_source}
    return load_prompts(source, split=split, log_notes=False, **options)


def _check_context(recipe: Recipe, prompts: Sequence[Prompt]) -> None:
    """Rejects a student that is its own teacher on the same prompts."""
    grades = all(find(term.name).needs != "nothing" for term in recipe.objectives if term.weight)
    if grades and not any(p.teacher_context is not None for p in prompts):
        raise ConfigError(
            "teacher.self: the student would learn from itself what it knows already: give prompts a "
            "teacher_context, or name another teacher"
        )


class _ForTeacher(LazyPrompts):
    """Some of the prompts, each adapted to a teacher when it is asked for."""

    def __init__(self, prompts: Sequence[Prompt], chosen: Sequence[int]) -> None:
        self._prompts, self._chosen = prompts, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def at(self, place: int) -> Prompt:
        """The prompt of a place."""
        return self._prompts[self._chosen[place]].for_teacher


def graded_by(config: Config, data: RunData, name: str) -> Sequence[Prompt]:
    """The training prompts that a teacher scores, adapted to it."""
    if config.route is None:
        return _ForTeacher(data.train, range(len(data.train)))
    return _ForTeacher(data.train, [i for i, p in enumerate(data.train) if p.route == name])
