"""The base class of configuration sections, and the one-line errors about their keys."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gold.errors import ConfigError, did_you_mean
from gold.other_names import KEY_OF

Key = tuple[str | int, ...]

PositiveInt = Annotated[int, Field(ge=1)]
CountInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]

RENAMED = {
    "evaluate.per_prompt": "evaluate.num_generations",
    "evaluate.sequences_per_forward": "evaluate.micro_batch_size",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "rollout.batch": "rollout.generation_batch_size",
    "rollout.per_prompt": "rollout.num_generations",
    "train.sequences_per_forward": "train.micro_batch_size",
    "recipe.clip_norm": "recipe.max_grad_norm",
    "recipe.per_prompt": "recipe.num_generations",
    "recipe.rollout_batch": "recipe.generation_batch_size",
    "recipe.sampling.max_new_tokens": "recipe.max_new_tokens",
    "recipe.sampling.temperature": "recipe.temperature",
    "recipe.sampling.top_p": "recipe.top_p",
    "recipe.sequences_per_forward": "recipe.micro_batch_size",
}
"""Dotted keys of earlier versions, and their present names; ``recipe`` holds the arguments of a Recipe."""


class Section(BaseModel):
    """A group of settings: unknown keys and values of another type are rejected; instances are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    if not TYPE_CHECKING:  # type checkers know the fields

        def __init__(self, **settings: Any) -> None:
            try:
                super().__init__(**settings)
            except ValidationError as error:
                raise ConfigError(*problem_lines(error, type(self), prefix="recipe.")) from None

        # Nested sections are validated in place, so that errors contain the full key.
        __init__.__pydantic_base_init__ = True


def problem_lines(
    error: ValidationError,
    root: type[BaseModel],
    where: Callable[[Key], str] = lambda key: "",
    prefix: str = "",
) -> list[str]:
    """One line per problem that pydantic found in settings of the type ``root``.

    ``where(key)`` is the prefix of a line: the file and line number of the key. ``prefix`` precedes the keys of
    ``root`` in ``RENAMED``.
    """
    found = (dict(each) for each in error.errors(include_url=False))
    return [line for each in found for line in _lines(each, root, where, prefix)]


_LIMITS = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "model_type": "keys and values",
    "recursion_loop": "a value that does not contain itself",
    "string_type": "text",
    "tuple_type": "a list",
}


def _lines(
    error: dict[str, Any], root: type[BaseModel], where: Callable[[Key], str], prefix: str
) -> Iterator[str]:
    key: Key = error["loc"]
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        for line in context["error"].args:
            yield f"{where(key)}{dotted(key)}: {line}"
        return
    if key and key[-1] == "[key]":
        key, text = key[:-1], "a name has letters, digits, - and _ alone"
    else:
        text = _problem(kind, context, shown(error["input"], key), key, root, prefix, error)
    yield f"{where(key)}{dotted(key) or 'configuration'}: {text}"


def _problem(
    kind: str,
    context: Mapping[str, Any],
    got: str,
    key: Key,
    root: type[BaseModel],
    prefix: str,
    error: Mapping[str, Any],
) -> str:
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return f"unknown key{_meant_key(key, root, prefix)}"
    if kind == "literal_error":
        choices = [str(choice) for choice in typing.get_args(annotation_at(root, key))]
        return f"expected {' | '.join(choices)}, got {got}{did_you_mean(error['input'], choices, '')}"
    if kind in _LIMITS:
        (limit,) = context.values()
        return f"must be {_LIMITS[kind]} {limit:g}, got {got}"
    if kind in ("too_short", "too_long"):
        return f"expected {context.get('max_length', context.get('min_length'))} values, got {got}"
    if kind == "string_pattern_mismatch":
        return f"expected auto, cpu, cuda, cuda:1, mps or xpu, got {got}"
    if kind == "string_too_short":
        return "must not be empty"
    return f"expected {_EXPECTED.get(kind, error['msg'])}, got {got}"


def dotted(key: Key) -> str:
    """A key in dotted form: ``objectives.0.weight``."""
    return ".".join(map(str, key))


_NEVER_SHOWN = {"served", "vllm", "url", "key_env"}
"""Keys whose values may be a misplaced secret of a server."""


def shown(value: Any, key: Key = ()) -> str:
    """A value as JSON, shortened."""
    if {"served", "vllm"} & set(key) and key[-1] in _NEVER_SHOWN:
        return "something else"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _meant_key(key: Key, root: type[BaseModel], prefix: str) -> str:
    """The probably intended name of an unknown key."""
    old = prefix + dotted(key)
    renamed = [new for known, new in RENAMED.items() if known == old or known.startswith(f"{old}.")]
    if renamed:
        return f"; did you mean {', '.join(new.removeprefix(prefix) for new in renamed)}?"
    here, name = list(annotation_at(root, key[:-1]).model_fields), str(key[-1])
    if theirs := KEY_OF.get(name):
        own = theirs.split(".")[-1] if prefix else theirs  # the arguments of a Recipe have no sections
        if not prefix or own in here:
            return f"; did you mean {own}?"
    if near := did_you_mean(name, here, ""):
        return near
    elsewhere = [
        known for known, *_ in keys_of(root) if known.split(".")[-1] == name and ".NAME." not in known
    ]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; known here: {', '.join(here)}"


def _plain(annotation: Any) -> Any:
    """The annotation without constraints and None."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _plain(typing.get_args(annotation)[0])
    if origin in (types.UnionType, typing.Union):
        return _plain(next(one for one in typing.get_args(annotation) if one is not type(None)))
    return annotation


def annotation_at(root: type[BaseModel], key: Key) -> Any:
    """The type of the value at a key."""
    found: Any = root
    for part in key:
        if isinstance(part, int):
            found = _plain(typing.get_args(found)[0])
        elif typing.get_origin(found) is dict:
            found = _plain(typing.get_args(found)[1])
        else:
            found = _plain(found.model_fields[part].annotation)
    return found


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key of a section and of those below it."""
    for name, field in section.model_fields.items():
        plain = _plain(field.annotation)
        listed = typing.get_origin(plain) is tuple and typing.get_args(plain)[-1] is ...
        named = typing.get_origin(plain) is dict
        inner = _plain(typing.get_args(plain)[1 if named else 0]) if listed or named else plain
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield f"{prefix}{name}", "section", "", (inner.__doc__ or "").strip()
            yield from keys_of(inner, f"{prefix}{name}.{'0.' if listed else 'NAME.' if named else ''}")
            continue
        if typing.get_origin(plain) is Literal:
            kind = " | ".join(map(str, typing.get_args(plain)))
        else:
            names = {int: "whole number", float: "number", bool: "true | false", str: "text"}
            kind = names.get(plain, "keys and values" if named else "list")
        default = (
            " (required)"
            if field.is_required()
            else f" = {shown(field.get_default(call_default_factory=True))}"
        )
        yield f"{prefix}{name}", kind, default, field.description or ""
