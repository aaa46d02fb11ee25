"""Several teachers, each with its own tokenizer and template: one for each prompt, or all for every prompt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from gold.data import Prompt
from gold.errors import ConfigError, DataError, did_you_mean
from gold.losses.mixture import Mix, Rule
from gold.models.language_model import LanguageModel
from gold.teachers.local import LocalTeacher
from gold.teachers.protocol import Teacher


class Teachers:
    """Teachers by name.

    Without ``mix`` each prompt is scored by the teacher that its ``route`` names (or by the only one). With it every
    prompt is scored by all, combined into one distribution: ``linear`` is ``Σ w q``, ``log_linear`` ``Π q^w``,
    normalised, on the events where they are compared with the student; see ``losses.mixture``. ``weights`` are equal by
    default; only their ratios count.

    Raises:
        ConfigError: no teacher; a weight for an unknown teacher, a missing weight, or one that is not above 0; weights
            without a mix.
    """

    def __init__(
        self,
        members: Mapping[str, Teacher | LanguageModel],
        mix: Rule | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if not members:
            raise ConfigError("teachers: there is none; name at least one")
        self.members: dict[str, Teacher] = {
            name: LocalTeacher(t) if isinstance(t, LanguageModel) else t for name, t in members.items()
        }
        self.mix = (
            None if mix is None else Mix(mix, _shares(self.members, weights or dict.fromkeys(members, 1.0)))
        )
        if mix is None and weights is not None:
            raise ConfigError(
                "teachers: weights need a mix; set mix to linear or log_linear, or leave them out"
            )

    @property
    def several(self) -> bool:
        """True if there is more than one."""
        return len(self.members) > 1

    @property
    def routes(self) -> tuple[str, ...]:
        """The names, if different prompts have different teachers."""
        return tuple(self.members) if self.several and self.mix is None else ()

    def of(self, prompt: Prompt) -> tuple[str, ...]:
        """The names of the teachers that score a prompt.

        Raises:
            DataError: its route names none of them; the message names its key.
        """
        if self.mix is not None or not self.several:
            return tuple(self.members)
        check_routes([prompt], self.members)
        return (str(prompt.route),)

    def weight(self, name: str) -> float:
        """The weight of a teacher; over those of one prompt the weights sum to one."""
        return 1.0 if self.mix is None else self.mix.weights[name]

    def frozen_copy(self, lm: Any) -> Any:
        """The transformers model of a fixed teacher that equals ``lm`` bit for bit; None if there is none."""
        for teacher in self.members.values():
            if teacher.model is not None and teacher.state() is None and _equal(teacher.model.lm, lm):
                return teacher.model.lm
        return None


def check_routes(prompts: Iterable[Prompt], names: Iterable[str]) -> None:
    """Checks that each prompt is routed to one of the names.

    Raises:
        DataError: the first that is not; the message names its key.
    """
    known = set(names)
    for prompt in prompts:
        if prompt.route is None:
            raise DataError(f"prompt {prompt.key}: it names no teacher; give it a route")
        if prompt.route not in known:
            raise DataError(
                f'prompt {prompt.key}: its route is "{prompt.route}", and no teacher has that name'
                f"{did_you_mean(prompt.route, known)}"
            )


def _shares(members: Mapping[str, Teacher], weights: Mapping[str, float]) -> dict[str, float]:
    if weights.keys() != members.keys():
        odd = sorted(weights.keys() ^ members.keys())[0]
        what = "no teacher has that name" if odd in weights else "it has no weight"
        raise ConfigError(f"teachers: {odd}: {what}; give each teacher a weight, or none of them")
    for name, weight in weights.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(
                f"teachers: {name}: its weight is {weight}; give a number above 0, or leave it out"
            )
    total = math.fsum(weights.values())
    return {name: weights[name] / total for name in members}


def _equal(one: Any, other: Any) -> bool:
    """True if two models have the same configuration and, bit for bit, the same weights."""
    if one is other or type(one) is not type(other) or one.config.to_dict() != other.config.to_dict():
        return False
    mine, theirs = list(one.parameters()), list(other.parameters())
    return len(mine) == len(theirs) and all(
        a is b or ((a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b))
        for a, b in zip(mine, theirs, strict=True)
    )
