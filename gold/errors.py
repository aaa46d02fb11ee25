"""All exceptions that gold raises on purpose.

A message states the fact, the value, its place, and what to do. Inner code states the fact; the outermost function
that knows the item adds "prompt 17, rollout 3:". The command line prints the message as one line and exits with code 1;
an error with several problems has one argument, and one line, for each.
"""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(got: object, known: Iterable[str], otherwise: str | None = None) -> str:
    """The suffix of an error about an unknown name: `; did you mean seed?`.

    If no known name is close: ``otherwise``, by default all of them.
    """
    names = sorted(known)
    near = get_close_matches(str(got), names, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known are {', '.join(names)}" if otherwise is None else otherwise


class GoldError(Exception):
    """Base of every error that gold raises on purpose."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class ConfigError(GoldError, ValueError):
    """A configuration that is unknown, mistyped, or impossible."""


class VocabularyError(GoldError, ValueError):
    """A tokenizer that cannot be read, or whose tokens have no well-defined bytes."""


class DataError(GoldError, ValueError):
    """A prompts file, a task, or an input text that cannot be used."""


class ModelError(GoldError, RuntimeError):
    """A model that cannot be loaded, run, or saved."""


class TeacherError(GoldError, RuntimeError):
    """A teacher that cannot provide what the objective needs."""


class EngineError(GoldError, RuntimeError):
    """A rollout engine that does not answer, or whose answers cannot be trained on."""


class CheckpointError(GoldError, RuntimeError):
    """A checkpoint or run folder that cannot be written, read, or resumed."""


class TrainingError(GoldError, RuntimeError):
    """A training run that cannot continue."""
