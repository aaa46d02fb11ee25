"""Conversations of a step as rollouts: one for each of the student's turns, with the score of the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gold.data import Prompt, PromptFile, load_prompts
from gold.environments.protocol import Environment, tools_of
from gold.errors import ConfigError, DataError
from gold.evaluate import EvaluationPlan
from gold.rollout.conversations import DrawnConversation, TurnPrompts
from gold.rollout.thinking import check_thinking_budget
from gold.rollout.types import Rollout, group_advantages
from gold.train.recipe import Recipe

if TYPE_CHECKING:
    from gold.train.setup import Setup


@dataclass(frozen=True)
class Conversed:
    """The rollouts of a step's conversations, sums over the conversations for its metrics, and one that failed."""

    rollouts: list[Rollout] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    problem: str = ""


def conversed(drawn: Sequence[DrawnConversation], group: int) -> Conversed:
    """The turns of conversations with their advantages; a group is ``group`` consecutive ones of one prompt.

    The score is the reward of the last turn; its advantage is that of every turn.
    """
    advantages = advantages_of([found.score for found in drawn], group)
    rollouts: list[Rollout] = []
    counts: Counter[str] = Counter(conversations=len(drawn))
    for number, (found, advantage) in enumerate(zip(drawn, advantages, strict=True)):
        last = len(found.rollouts) - 1
        for rollout in found.rollouts:
            assert rollout.turn is not None
            rollouts.append(
                replace(
                    rollout,
                    turn=rollout.turn._replace(conversation=number),
                    reward=found.score if rollout.turn.number == last else None,
                    advantage=float(advantage),
                )
            )
        counts["turns"] += len(found.rollouts)
        counts[f"ended.{found.seen.ended}"] += 1
        counts.update({f"count.{name}": n for name, n in found.seen.counts.items()})
    problem = next((found.problem for found in drawn if found.problem), "")
    return Conversed(rollouts, {name: float(n) for name, n in counts.items()}, problem)


def advantages_of(scores: Sequence[float | None], group: int) -> NDArray[np.float64]:
    """As ``group_advantages`` over the conversations of each group that have a score; 0 for the others."""
    given = np.array([np.nan if score is None else score for score in scores], np.float64)
    if not np.isnan(given).any():
        return group_advantages(given, group)
    found = np.zeros(given.size)
    for first in range(0, given.size, group):
        own = first + np.flatnonzero(~np.isnan(given[first : first + group]))
        if own.size:
            found[own] = group_advantages(given[own], own.size)
    return found


def later_returns(
    rollouts: Sequence[Sequence[Rollout]], returns: Sequence[Sequence[float]]
) -> list[list[float]]:
    """For each rollout of each microbatch, the sum of the returns of what follows it in its conversation: the later
    pieces of its turn, and the later turns; 0 outside conversations."""

    def place(rollout: Rollout) -> tuple[int, int]:
        assert rollout.turn is not None
        return rollout.turn.number, len(rollout.prompt_ids)

    whole: dict[int, list[tuple[tuple[int, int], float]]] = {}
    for own, values in zip(rollouts, returns, strict=True):
        for rollout, value in zip(own, values, strict=True):
            if rollout.turn is not None:
                whole.setdefault(rollout.turn.conversation, []).append((place(rollout), value))
    return [
        [
            0.0
            if rollout.turn is None
            else sum(value for at, value in whole[rollout.turn.conversation] if at > place(rollout))
            for rollout in own
        ]
        for own in rollouts
    ]


def as_prompts(
    given: Sequence[Prompt | str | Mapping[str, Any]], environment: Environment | None
) -> Sequence[Prompt]:
    """Plain strings as prompts, numbered; rows as ``load_prompts`` reads them; with an environment, the prompts of its
    conversations.

    Raises:
        DataError: a row that cannot be read, a plain text for an environment, or what is no prompt.
    """
    found: Sequence[Prompt]
    if isinstance(given, str | Path):
        raise DataError(
            f"prompts: got the text {str(given)!r:.60}; gold.load_prompts reads a file, a list has prompts"
        )
    if isinstance(given, PromptFile | TurnPrompts):
        found = given
    elif hasattr(given, "with_format"):
        found = load_prompts(given)  # type: ignore[arg-type]
    else:
        each: list[Any] = list(given)
        if each and all(isinstance(row, Mapping) for row in each):
            found = load_prompts(each)
        else:
            found = each = [Prompt(str(n), text=p) if isinstance(p, str) else p for n, p in enumerate(each)]
            for wrong in (row for row in each if not isinstance(row, Prompt)):
                raise DataError(
                    f"prompts: expected texts, prompts or rows, all of one kind, got {wrong!r:.60}"
                )
    return found if environment is None else TurnPrompts(found, environment)


def plan_of(recipe: Recipe) -> EvaluationPlan:
    """The plan of a run's evaluations, unless it has another."""
    return EvaluationPlan(
        max_new_tokens=recipe.max_new_tokens,
        generation_batch_size=recipe.generation_batch_size,
        thinking=recipe.thinking,
        thinking_budget=recipe.thinking_budget,
    )


def check_conversations(setup: Setup) -> list[str]:
    """Checks that a run's environment and its thinking budget can be used with its models; returns notes about them.

    Raises:
        ConfigError: completions that are drawn ahead, a chat template that has no place for tools, or one without
            thinking.
    """
    recipe = setup.recipe
    check_thinking_budget(setup.student, recipe.thinking_budget, recipe.max_new_tokens)
    if setup.environment is None:
        return []
    if setup.recipe.staleness:
        raise ConfigError(
            "rollout.staleness: turns of a conversation follow one another, and are not drawn a step ahead: set it to 0"
        )
    if setup.recipe.policy == "initial":
        raise ConfigError("rollout.policy: an environment answers the student as it is: set it to live")
    sides = {f"student {setup.student.name}": setup.form}
    sides |= {f"teacher {setup.members[name].name}": form for name, form in setup.forms.items()}
    notes = []
    for side, form in sides.items():
        if form.lacking and tools_of(setup.environment):
            raise ConfigError(
                f"environment.tools: the chat template of {side} does not write {form.lacking}; give it another "
                "template, or set environment.tool_format to text"
            )
    if setup.form.strips:
        notes.append(
            "the student's chat template leaves thinking out of earlier turns: so do the prompts of later turns, as at "
            "inference"
        )
    for side, form in list(sides.items())[1:] if tools_of(setup.environment) else ():
        if form.calls != setup.form.calls:
            notes.append(
                f"the chat template of {side} writes tool calls in another form ({form.calls}) than the student's "
                f"({setup.form.calls}): of a turn with calls their names and arguments are compared, and the prose"
            )
    return notes


_ENDINGS = ("cut", "max_turns", "max_tokens", "error")


def conversation_record(sums: Mapping[str, float], taken: Set[str]) -> dict[str, float]:
    """The metrics of a step's conversations: turns per conversation, the share that ended in each way other than by the
    environment, and the environment's own counts; empty without conversations. A count whose name is ``taken`` by
    another metric has `environment.` before it."""
    if not (count := sums.get("conversations")):
        return {}
    record = {"turns": sums["turns"] / count}
    record |= {f"ended_{end}_share": n / count for end in _ENDINGS if (n := sums.get(f"ended.{end}"))}
    taken = taken | record.keys() | {"kind", "bad_steps"}
    own = {name.removeprefix("count."): n for name, n in sums.items() if name.startswith("count.")}
    return record | {f"environment.{name}" if name in taken else name: own[name] for name in sorted(own)}
