"""The table of objectives: name, function, what each needs from a teacher, and the unit it is normalised by.

An objective is a pure function from a microbatch to a sum, with keyword arguments as its options. The caller divides by
the count of its unit in the whole optimizer step, so that accumulation over microbatches and processes equals one large
batch. To add one, write the function and add a row.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from gold.align.batch import AlignedBatch
from gold.errors import ConfigError, did_you_mean
from gold.losses.divergences import DIVERGENCES
from gold.losses.policy import reward, span_pg, token_pg
from gold.losses.prefix import prefix_divergence, prefix_states
from gold.losses.published import (
    EXCEPTIONS,
    alm,
    gkd,
    gold_hybrid,
    opd,
    paired_positions,
    uld,
    whole_chunks,
    x_token,
)
from gold.losses.supports import (
    HalfLife,
    Where,
    byte_positions,
    bytes_divergence,
    fading,
    reference_kl,
    state_rows,
    states_divergence,
)
from gold.losses.text import sft
from gold.losses.types import Loss, LossInputs, Need

Options = dict[str, Any]
Arguments = Mapping[str, tuple[Any, Any]]
"""Type and default of each option by name."""


@dataclass(frozen=True)
class Objective:
    """An objective with its options: ``objective(inputs)`` sums over a microbatch, ``count(batch)`` is the divisor."""

    name: str
    loss: Callable[[LossInputs], Loss]
    needs: Need
    unit: str
    count: Callable[[AlignedBatch], float]
    options: Mapping[str, Any] = field(default_factory=dict)
    exceptions: Mapping[str, str] = field(default_factory=dict)
    own_vocabulary: bool = False

    def __call__(self, inputs: LossInputs) -> Loss:
        """The objective's sum over a microbatch.

        Raises: ConfigError: it needs models that share one vocabulary, and these do not.
        """
        if self.own_vocabulary:
            check_one_vocabulary(self.name, inputs.batch.vocabularies.same)
        return self.loss(inputs)


@dataclass(frozen=True)
class Row:
    """A row of the table; called with options, it returns the objective.

    ``loss(inputs, **options)`` and ``count(batch)``, in the objective's ``unit``. ``on_policy``: it learns from texts
    that the student wrote, as samples of the policy itself. ``own_vocabulary``: it needs models that share one
    vocabulary. ``needs_verifier``: it learns from scores of completions. ``weighted``: it takes importance weights
    (``LossInputs.importance``). ``exceptions``: clauses of the contract that it cannot satisfy by its nature, each with
    the reason.
    """

    name: str
    loss: Callable[..., Loss]
    needs: Need
    unit: str
    count: Callable[[AlignedBatch], float]
    on_policy: bool = False
    own_vocabulary: bool = False
    needs_verifier: bool = False
    exceptions: Mapping[str, str] = field(default_factory=dict)
    weighted: bool = True

    @property
    def arguments(self) -> Arguments:
        """Type and default of each option."""
        return arguments_of(self.loss)

    @property
    def summary(self) -> str:
        """The first sentence of the loss's docstring."""
        return _first_sentence(self.loss)

    def resolve(self, options: Mapping[str, Any]) -> Options:
        """All options, with defaults for those not given (or given as None).

        Raises: ConfigError for an unknown option, or a value that the option cannot take.
        """
        return _checked(self.name, self.arguments, options)

    def __call__(self, **options: Any) -> Objective:
        """The objective with these options."""
        resolved = self.resolve(options)
        return Objective(
            self.name,
            partial(self.loss, **resolved),
            self.needs,
            self.unit,
            self.count,
            resolved,
            self.exceptions,
            self.own_vocabulary,
        )


@dataclass(frozen=True)
class Support:
    """Events on which a divergence can compare two models.

    ``loss(inputs, divergence, **options)``; ``count(batch, **options)``. ``exceptions`` as for a row.
    """

    loss: Callable[..., Loss]
    unit: str
    count: Callable[..., float]
    exceptions: Mapping[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> Arguments:
        """Type and default of each option."""
        return arguments_of(self.loss)


@dataclass(frozen=True)
class DivergenceRow:
    """A row of the table for a divergence, available on several supports; ``bytes`` is the default."""

    name: str
    divergence: Callable[..., Any]
    exceptions: Mapping[str, str] = field(default_factory=dict)
    needs: Need = "top_k"
    on_policy: bool = False
    own_vocabulary: bool = False
    needs_verifier: bool = False
    weighted: bool = True

    @property
    def arguments(self) -> Arguments:
        """Type and default of each option; default None where it depends on the support."""
        everywhere = {
            name: (kind, None) for s in SUPPORTS.values() for name, (kind, _) in s.arguments.items()
        }
        chosen = {"support": (typing.Literal[tuple(SUPPORTS)], "bytes")}
        return {**chosen, **everywhere, **arguments_of(self.divergence, 2)}

    def _arguments_on(self, support: str) -> Arguments:
        return {**SUPPORTS[support].arguments, **arguments_of(self.divergence, 2)}

    @property
    def summary(self) -> str:
        """The first sentence of the divergence's docstring."""
        return _first_sentence(self.divergence)

    def resolve(self, options: Mapping[str, Any]) -> Options:
        """All options of the chosen support, with defaults for those not given (or given as None).

        Raises: ConfigError for an unknown option, one of another support, or a value that the option cannot take.
        """
        given = {name: value for name, value in options.items() if value is not None}
        support = _checked(self.name, self.arguments, given)["support"]
        here = self._arguments_on(support)
        for name in given:
            if name not in here and name != "support":
                owners = [s for s, other in SUPPORTS.items() if name in other.arguments and s != "tokens"]
                raise ConfigError(
                    f"{name}: belongs to support {' and '.join(owners)}, not to {support}: leave it out"
                )
        return {"support": support, **{n: given.get(n, default) for n, (_, default) in here.items()}}

    def moved(self, support: str, options: Mapping[str, Any]) -> Options:
        """The options that another support has too."""
        here = self._arguments_on(support)
        kept = {name: value for name, value in self.resolve(options).items() if name in here}
        return {**kept, "support": support}

    def __call__(self, **options: Any) -> Objective:
        """The objective with these options."""
        resolved = self.resolve(options)
        support = SUPPORTS[resolved["support"]]
        own = {name: resolved[name] for name in arguments_of(self.divergence, 2)}
        chosen = {name: resolved[name] for name in support.arguments}
        return Objective(
            self.name,
            partial(support.loss, divergence=partial(self.divergence, **own), **chosen),
            self.needs,
            support.unit,
            partial(support.count, **chosen),
            resolved,
            {**support.exceptions, **self.exceptions},
        )


def arguments_of(function: Callable[..., Any], positional: int = 0) -> dict[str, tuple[Any, Any]]:
    """The keyword-only arguments of a function, and those after ``positional`` ones."""
    kinds = typing.get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())
    chosen = [
        p for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY or (positional and i >= positional)
    ]
    for p in chosen:
        if p.name not in kinds:
            raise ConfigError(
                f"{p.name}: this argument of {function.__name__} has no type; annotate it, e.g. float"
            )
    return {p.name: (kinds[p.name], p.default) for p in chosen}


def _first_sentence(function: Callable[..., Any]) -> str:
    text = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
    return text.split(". ")[0].removesuffix(".")


_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_RENAMED = {"rest": "unshared"}
"""Former names of options."""


def _checked(objective: str, arguments: Arguments, options: Mapping[str, Any]) -> Options:
    """All arguments, with defaults for those not given."""
    for name in options:
        if name not in arguments:
            if (meant := _RENAMED.get(name)) in arguments:
                raise ConfigError(f"{name}: unknown key; did you mean {meant}?")
            known = f"; {objective} has {_listed(arguments)}"
            raise ConfigError(f"{name}: unknown key{did_you_mean(name, arguments, known)}")
    values = {name: default for name, (_, default) in arguments.items()}
    for name, value in options.items():
        if value is None:
            continue
        try:
            values[name] = TypeAdapter(arguments[name][0], config=_STRICT).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"{name}: {_problem(error)}, got {value!r}") from None
    return values


def _listed(arguments: Arguments) -> str:
    return ", ".join(arguments) or "no options"


def _problem(error: ValidationError) -> str:
    """The first problem that pydantic found with a value."""
    first = error.errors(include_url=False)[0]
    limits = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
    context = first.get("ctx", {})
    if first["type"] in limits:
        (limit,) = context.values()
        return f"must be {limits[first['type']]} {limit:g}"
    if first["type"] == "literal_error":
        return f"expected {context['expected']}"
    return first["msg"].replace("Input should be", "expected")


# Counts.


def supervised_bytes(
    batch: AlignedBatch, where: Where = "everywhere", half_life: HalfLife | None = None
) -> float:
    """Number of byte positions, including stop events, where both sides predict the next event, weighted."""
    return float(fading(batch.byte_offsets[byte_positions(batch, where)], half_life).sum())


def synced_states(
    batch: AlignedBatch, where: Where = "everywhere", half_life: HalfLife | None = None, **_: Any
) -> float:
    """Number of states at which both sides have read the same bytes, weighted."""
    return float(fading(state_rows(batch, where)[2], half_life).sum())


def span_tokens(batch: AlignedBatch) -> float:
    """Number of student tokens in spans, including stop ids."""
    return float((batch.spans[0] >= 0).sum())


def data_tokens(batch: AlignedBatch) -> float:
    """Number of student tokens of completions from a data set, including stop ids."""
    return float((~batch.sampled_row_mask).sum())


def observed_tokens(batch: AlignedBatch) -> float:
    """Number of sampled student tokens, including stop ids, to all of whose bytes the teacher gives a probability."""
    return float(batch.observed_rows.sum())


def sampled_tokens(batch: AlignedBatch) -> float:
    """Number of student tokens of sampled completions, including stop ids."""
    return float(batch.sampled_row_mask.sum())


UNRESOLVED = (
    "what is unresolved mass on one side, since a token that ends off the path leads to no state that was computed, "
    "is a named event on the other"
)
SUPPORTS: Mapping[str, Support] = {
    "bytes": Support(bytes_divergence, "byte", supervised_bytes, {"8a": UNRESOLVED}),
    "prefix": Support(prefix_divergence, "state", prefix_states, {"8a": UNRESOLVED}),
    "shared": Support(
        states_divergence,
        "state",
        synced_states,
        {
            "8a": "a token of the same bytes is not the same event on both sides, where one of them has longer tokens "
            "that begin with it"
        },
    ),
    "tokens": Support(states_divergence, "state", synced_states),
}
"""Where divergences can be taken, by name; ``tokens``, for one vocabulary, is chosen by itself."""

_ROWS: tuple[Row | DivergenceRow, ...] = (
    *(DivergenceRow(name, divergence) for name, divergence in DIVERGENCES.items()),
    Row("span_pg", span_pg, "tokens", "token", span_tokens, on_policy=True),
    Row(
        "token_pg",
        token_pg,
        "rows",
        "token",
        observed_tokens,
        on_policy=True,
        exceptions={
            "1": "an advantage holds all reward to come, which is 0 on average only; its expected gradient is 0",
            "8a": "the teacher's probability of a beginning of the text follows its tokens of the whole text",
        },
    ),
    Row("sft", sft, "nothing", "token", data_tokens),
    Row("reward", reward, "nothing", "token", sampled_tokens, on_policy=True, needs_verifier=True),
    Row("reference_kl", reference_kl, "nothing", "token", sampled_tokens),
    Row("gkd", gkd, "top_k", "state", synced_states, own_vocabulary=True),
    Row("opd", opd, "tokens", "token", sampled_tokens, on_policy=True, own_vocabulary=True),
    Row("uld", uld, "rows", "position", paired_positions, exceptions=EXCEPTIONS["uld"], weighted=False),
    Row("gold", gold_hybrid, "rows", "chunk", whole_chunks, exceptions=EXCEPTIONS["gold"], weighted=False),
    Row("alm", alm, "tokens", "chunk", whole_chunks, exceptions=EXCEPTIONS["alm"], weighted=False),
    Row("x_token", x_token, "rows", "chunk", whole_chunks, exceptions=EXCEPTIONS["x_token"], weighted=False),
)

OBJECTIVES: dict[str, Row | DivergenceRow] = {row.name: row for row in _ROWS}
"""Every objective by name."""


def find(name: str) -> Row | DivergenceRow:
    """The row of that name.

    Raises: ConfigError: there is none.
    """
    if name not in OBJECTIVES:
        raise ConfigError(f"unknown objective {name!r}{did_you_mean(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def check_one_vocabulary(name: str, same: bool) -> None:
    """Checks that the objective can compare these models.

    Raises: ConfigError: it needs models that share one vocabulary, and these do not.
    """
    if find(name).own_vocabulary and not same:
        raise ConfigError(
            f"objective {name} compares models that share one vocabulary, and these do not; "
            "choose a divergence on bytes, which needs none in common"
        )
