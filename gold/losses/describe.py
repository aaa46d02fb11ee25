"""The table of objectives as text for `gold objectives`."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from gold.losses.table import OBJECTIVES, SUPPORTS, Arguments, DivergenceRow, arguments_of, find


def describe_objectives(name: str | None = None) -> Iterator[str]:
    """Lines on every objective, or on one: summary, what it needs from a teacher, its options and their defaults.

    Raises: ConfigError: there is no objective of that name.
    """
    rows = [find(name)] if name else list(OBJECTIVES.values())
    for row in rows:
        divergence = isinstance(row, DivergenceRow)
        own = arguments_of(row.divergence, 2) if isinstance(row, DivergenceRow) else row.arguments
        needs = "nothing" if row.needs == "nothing" else NEEDS[row.needs]
        yield f"{row.name}: {row.summary}"
        yield f"    teacher: {needs}" + ("; on any support" if divergence else "")
        yield from _options(own)
    if any(isinstance(row, DivergenceRow) for row in rows):
        yield ""
        chosen = " | ".join(s for s in SUPPORTS if s != "tokens")
        yield f"support: {chosen} (bytes); with one vocabulary: token by token"
        for support in SUPPORTS:
            if support != "tokens":
                yield f"  {support}"
                yield from _options(arguments_of(SUPPORTS[support].loss))


NEEDS = {
    "tokens": "log-probabilities of given tokens",
    "top_k": "log-probabilities of the likeliest tokens",
    "rows": "full rows",
}


def _options(arguments: Arguments) -> Iterator[str]:
    for option, (kind, default) in arguments.items():
        shown = "none" if default is None else str(default).lower() if isinstance(default, bool) else default
        yield f"    {option}: {_kind(kind)} ({shown})"


def _kind(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _kind(typing.get_args(annotation)[0])
    if origin in (types.UnionType, typing.Union):
        return _kind(next(a for a in typing.get_args(annotation) if a is not types.NoneType))
    if origin is Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    return {bool: "true | false", int: "whole number", float: "number"}.get(annotation, "text")
