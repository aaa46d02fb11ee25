"""`gold data`: a source of prompts, or those of a configuration, with the models that will read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gold import terminal
from gold.data import load_prompts
from gold.errors import ConfigError

if TYPE_CHECKING:
    from gold.inspect.prompts import Reader, Source


def run_data(
    source: str,
    overrides: Sequence[str] = (),
    *,
    student: str | None = None,
    teachers: Sequence[str] = (),
    columns: Sequence[str] = (),
    of_source: Mapping[str, Any],
    rows: int = 3,
    as_json: bool = False,
) -> None:
    """Prints what is read of a file, folder or data set, or of those of a configuration, by the given models.

    ``columns`` are the entries of a map, ``NAME=COLUMN``; ``of_source`` further arguments of ``gold.load_prompts``.

    Raises:
        GoldError: a source or a model that cannot be read, arguments that do not go together.
    """
    from gold.inspect.prompts import Reader, Source, data_json, show_data

    if Path(source).suffix.lower() in (".yaml", ".yml"):
        given = {"--student": student, "--teacher": teachers, "--map": columns}
        given |= {f"--{name}": value for name, value in of_source.items()}
        if wrong := [name for name, value in given.items() if value]:
            raise ConfigError(
                f"{wrong[0]}: {source} is a configuration, which names it: change a key of it instead"
            )
        sources, readers = _of_run(source, overrides)
    else:
        if overrides:
            raise ConfigError(f"{overrides[0]}: changes are of a configuration, and {source} is none")
        prompts = load_prompts(source, map=_map_of(columns), log_notes=False, **of_source)
        sources, readers = [Source("prompts", prompts)], _readers(student, teachers, Reader)
    if as_json:
        terminal.show_json(data_json(sources, readers, rows))
    else:
        show_data(sources, readers, rows)


def _map_of(columns: Sequence[str]) -> dict[str, str | None]:
    """A map of `NAME=COLUMN`; without a column, as `id=`, it is not read."""
    found: dict[str, str | None] = {}
    for each in columns:
        name, equals, column = each.partition("=")
        if not equals:
            raise ConfigError(f"--map {each}: expected NAME=COLUMN, such as prompt=text")
        found[name] = column or None
    return found


def _readers(student: str | None, teachers: Sequence[str], make: type[Reader]) -> list[Reader]:
    from gold.doctor.side import read_side

    readers = [] if student is None else [make("student", read_side("student", student))]
    for number, teacher in enumerate(teachers, start=1):
        name = "teacher" if len(teachers) == 1 else f"teacher {number}"
        readers.append(make(name, read_side("teacher", teacher), attrgetter("for_teacher")))
    return readers


def _of_run(path: str, overrides: Sequence[str]) -> tuple[list[Source], list[Reader]]:
    from gold.build import reader_sides
    from gold.build_data import heldout_prompts, load_data, training_prompts
    from gold.config import Config
    from gold.environments.adapters import environment_for
    from gold.environments.protocol import tools_of
    from gold.inspect.prompts import Reader, Source
    from gold.rollout.conversations import as_turn

    config = Config.load(path, overrides)
    environment = None
    if config.data.task is not None:
        data = load_data(config)
        sources = [Source("training prompts", data.train), Source("held-out prompts", data.all_heldout)]
    else:
        sources = [Source("prompts", training_prompts(config))]
        if (heldout := heldout_prompts(config)) is not None:
            sources.append(Source("held-out prompts", heldout))
        if config.environment is not None:
            environment = environment_for(None, config.environment.source)

    def turn(prompt: Any) -> Any:
        """The prompt of a conversation's first turn, with the environment's tools and instructions."""
        return (
            prompt
            if environment is None
            else as_turn(prompt, tools_of(environment), getattr(environment, "instructions", ""))
        )

    readers = []
    for name, (side, routed) in reader_sides(config).items():
        adapt = (lambda prompt: turn(prompt).for_teacher) if side.role == "teacher" else turn
        wanted = routed

        def reads(prompt: Any, wanted: str | None = wanted) -> bool:
            return wanted is None or prompt.route == wanted

        readers.append(Reader(name, side, adapt, reads))
    return sources, readers
