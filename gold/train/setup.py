"""The setup shared by all steps of a run: models, prompts, engine, and the loss terms, checked for these."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from gold.align.vocabularies import VocabularyPair
from gold.data import Prompt
from gold.environments.protocol import Environment, Limits
from gold.errors import ConfigError, TeacherError
from gold.evaluate import Verifier
from gold.losses import DivergenceRow, Need, Objective, find
from gold.losses.table import check_one_vocabulary
from gold.models.first_process import from_first
from gold.models.language_model import LanguageModel
from gold.prompt_order import PromptOrder
from gold.rollout.completions import Completions
from gold.rollout.conversations import Conversations
from gold.rollout.engine import RolloutEngine
from gold.rollout.hf import HuggingFaceEngine
from gold.teachers.protocol import Teacher
from gold.teachers.several import Teachers
from gold.tokenize.conversation import TemplateForm
from gold.train.input_digests import of_model
from gold.train.recipe import Recipe, Term

NEEDS: tuple[Need, ...] = typing.get_args(Need)
"""What objectives need from a teacher, in increasing order."""
_MEANING: Mapping[Need, str] = {
    "tokens": "log-probabilities of given tokens",
    "top_k": "the likeliest tokens of each row",
    "rows": "full rows",
}


@dataclass(frozen=True)
class BoundTerm:
    """A term of the loss: an objective with its options, its weight, and the name of its metric."""

    objective: Objective
    weight: float
    label: str


@dataclass(frozen=True)
class Setup:
    """Everything shared by the steps of a run. ``now``: a clock to use instead of the device's. ``completions``: the
    initial student's, with ``policy: initial``."""

    student: LanguageModel
    teachers: Teachers | None
    pairs: Mapping[str, VocabularyPair]
    terms: Sequence[BoundTerm]
    prompts: Sequence[Prompt]
    recipe: Recipe
    engine: RolloutEngine
    verifier: Verifier | None = None
    now: Callable[[], float] | None = None
    environment: Environment | None = None
    limits: Limits = field(default_factory=Limits)
    completions: Completions | None = None

    @classmethod
    def of(
        cls,
        student: LanguageModel,
        teachers: Teachers | None,
        prompts: Sequence[Prompt],
        recipe: Recipe,
        engine: RolloutEngine | None = None,
        kept_in: Path | None = None,
        **others: Any,
    ) -> Setup:
        """The recipe's terms for these models; without an ``engine`` the student generates itself. ``kept_in``: folder
        for the completions of the student as it starts, which it is now.

        Raises:
            ConfigError, TeacherError: see ``terms_of``; ConfigError: the student is its own teacher.
        """
        for member in teachers.members.values() if teachers else ():
            if member.model is not None and member.model.lm is student.lm:
                raise ConfigError("student and teacher are one model: load it twice, or take a SelfTeacher")
        pairs = pairs_of(student, teachers)
        terms = terms_of(recipe, teachers, pairs)
        engine = engine or HuggingFaceEngine(student, recipe.generation_batch_size)
        kept = completions_of(student, kept_in) if recipe.policy == "initial" else None
        return cls(student, teachers, pairs, terms, prompts, recipe, engine, completions=kept, **others)

    @cached_property
    def order(self) -> PromptOrder:
        """The order in which steps draw prompts."""
        return PromptOrder.of(self.prompts, self.recipe.seed, self.recipe.order)

    @cached_property
    def first_places(self) -> dict[int, tuple[int, int]]:
        """Step and place at which the student first completes a prompt of the run, by the prompt's index."""
        return first_places(self.order, self.recipe)

    @cached_property
    def conversations(self) -> Conversations | None:
        """What draws the conversations of a run with an environment."""
        return Conversations.of(self.student, self.environment, self.limits)

    @cached_property
    def form(self) -> TemplateForm:
        """What the student's chat template writes."""
        return TemplateForm.of(self.student.tokenizer, self.student.rendering)

    @cached_property
    def forms(self) -> dict[str, TemplateForm]:
        """What each teacher's chat template writes."""
        return {
            name: TemplateForm.of(teacher.tokenizer, teacher.rendering)
            for name, teacher in self.members.items()
            if teacher.tokenizer is not None
        }

    @cached_property
    def own_pair(self) -> VocabularyPair:
        """The student's vocabulary twice, for texts without a teacher."""
        return VocabularyPair(self.student.vocabulary, self.student.vocabulary)

    def applies(self, term: BoundTerm, has_teacher: bool) -> bool:
        """Whether a term is computed for texts with or without a teacher."""
        return has_teacher or not self.needs_teacher or term.objective.needs == "nothing"

    @property
    def learns_alone(self) -> bool:
        """Whether an objective learns from sampled texts without a teacher."""
        return any(t.objective.needs == "nothing" and t.objective.name != "sft" for t in self.terms)

    @property
    def student_generates(self) -> bool:
        """Whether the student's model itself generates completions, in this process."""
        return isinstance(self.engine, HuggingFaceEngine) and self.engine.model is self.student

    @property
    def importance_cap(self) -> float | None:
        """The cap of importance weights; None if there are none: the student draws from its current weights itself, or
        not at temperature 1."""
        recipe = self.recipe
        older = recipe.staleness or recipe.policy == "initial"
        if not (older or self.engine.own_weights) or (recipe.temperature, recipe.top_p) != (1, 1):
            return None
        return recipe.importance_cap

    def weighs(self, term: BoundTerm) -> bool:
        """Whether importance weights correct a term. Completions of the initial student are the texts that a divergence
        is to be small on; only policy gradients need those of the policy that is trained."""
        return self.recipe.policy == "live" or find(term.objective.name).on_policy

    @property
    def uncorrected(self) -> str | None:
        """Why completions of an engine with weights of its own are learned from without importance weights, in one
        line; None if they have them, need none, or were asked to have none."""
        recipe = self.recipe
        if not self.engine.own_weights or recipe.importance_cap is None or recipe.policy == "initial":
            return None
        for key, value in (("temperature", recipe.temperature), ("top_p", recipe.top_p)):
            if value != 1:
                return f"no importance weights for the engine's completions: rollout.{key} is {value:g}, they need 1"
        if lost := [t.label for t in self.terms if not find(t.objective.name).weighted]:
            return f"no importance weights for the engine's completions: {', '.join(lost)} has none"
        return None

    @property
    def needs_reference(self) -> bool:
        """Whether any objective uses the student before training."""
        return any(t.objective.name == "reference_kl" for t in self.terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether any objective needs a teacher."""
        return any(t.objective.needs != "nothing" for t in self.terms)

    @property
    def mixes_bytes(self) -> bool:
        """Whether objectives mix several teachers byte by byte; else the teachers share one vocabulary."""
        return any(t.label.endswith("_bytes") for t in self.terms)

    @property
    def members(self) -> Mapping[str, Teacher]:
        """The teachers by name."""
        return self.teachers.members if self.teachers else {}

    @property
    def routes(self) -> tuple[str, ...]:
        """The teachers' names, if different prompts have different teachers."""
        return self.teachers.routes if self.teachers else ()


def completions_of(student: LanguageModel, folder: Path | None) -> Completions:
    """Where the completions of a student with these weights are kept."""
    digests = partial(of_model, student)
    found = digests() if student.shards_on is None else from_first(digests)
    return Completions(str(found["digests"]["weights"]), folder)


def first_places(order: PromptOrder, recipe: Recipe) -> dict[int, tuple[int, int]]:
    """Step and place at which the student first completes a prompt of a run, by the prompt's index."""
    found: dict[int, tuple[int, int]] = {}
    for step in range(recipe.steps):
        if len(found) == order.count:
            break
        for place, index in enumerate(order.batch(step, recipe.prompts_per_step)):
            if index not in found and recipe.student_writes(step, place):
                found[index] = step, place
    return found


def pairs_of(student: LanguageModel, teachers: Teachers | None) -> dict[str, VocabularyPair]:
    """The vocabularies of the student and each teacher, by the teacher's name; without teachers the student's twice."""
    own = student.vocabulary
    if teachers is None:
        return {"": VocabularyPair(own, own)}
    return {name: VocabularyPair(own, t.vocabulary.with_markers()) for name, t in teachers.members.items()}


def terms_of(
    recipe: Recipe, teachers: Teachers | None, pairs: Mapping[str, VocabularyPair]
) -> list[BoundTerm]:
    """The recipe's terms for these pairs; if all vocabularies are the same, divergences are token-level.

    Raises:
        ConfigError: no term, an unknown one, or options that it cannot take.
        TeacherError: a term needs more than a teacher provides.
    """
    same = all(pair.same for pair in pairs.values())
    if teachers is not None and teachers.mix is not None:
        # The known tokens of a partial row differ between teachers.
        same = same and all(t.gives == "rows" for t in teachers.members.values())
    terms = [_bound(term, teachers, pairs, same) for term in recipe.objectives if term.weight]
    labels = [t.label for t in terms]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"objective {twice[0]} is given twice; give it once, with the sum of its weights")
    if not terms:
        raise ConfigError("no objective with a weight above 0: nothing would be learned")
    return terms


def _bound(
    term: Term, teachers: Teachers | None, pairs: Mapping[str, VocabularyPair], same: bool
) -> BoundTerm:
    row = find(term.name)
    options, label = dict(term.options), term.name
    if isinstance(row, DivergenceRow):
        options = row.moved("tokens", options) if same else row.resolve(options)
        label = f"{term.name}_{options['support']}"
    mixed = teachers is not None and teachers.mix is not None
    if mixed and row.needs != "nothing" and options.get("support") not in ("bytes", "tokens"):
        raise ConfigError(
            f"objective {label} cannot be computed for a mix of teachers; choose a divergence on bytes, or a route"
        )
    check_one_vocabulary(term.name, same)
    if (top_k := options.get("top_k")) is not None:
        known = min(p.student.size if same else p.shared_ids[0].size + 1 for p in pairs.values())
        if top_k > known:
            raise ConfigError(
                f"objective {term.name}: top_k is {top_k}, and there are only {known:,} events that both "
                "vocabularies have; lower it"
            )
    bound = row(**options)
    for teacher in teachers.members.values() if teachers else (None,):
        gives = teacher.gives if teacher else "nothing"
        if NEEDS.index(bound.needs) > NEEDS.index(gives):
            raise TeacherError(
                f"objective {term.name} needs {_MEANING[bound.needs]} of a teacher, and "
                + (f"teacher {teacher.name} gives {gives}" if teacher else "there is no teacher")
            )
    return BoundTerm(bound, term.weight, label)
