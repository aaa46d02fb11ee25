"""Rollouts: the ids of one completion, which of them the student sampled, their log-probabilities, and their bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gold.data import Prompt
from gold.tokenize.vocabulary import TokenizedText
from gold.turns import Written

Seed = tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. The defaults sample from the model's own distribution; ``temperature`` 0 is greedy
    decoding."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    thinking_budget: int | None = None
    """Most tokens of thinking in a turn, see ``gold.rollout.thinking``."""

    def of(self, prompt: Prompt) -> Sampling:
        """The parameters for a prompt: a plain text, which no template opens a turn for, has no thinking."""
        return self if prompt.messages is not None else replace(self, thinking_budget=None)


class Segment(NamedTuple):
    """A range of a rollout's ids, from ``start`` to ``end``: sampled by the student, or given."""

    start: int
    end: int
    sampled: bool


class Turn(NamedTuple):
    """The place of a rollout in a conversation: the number of the turn, from 0, what the student wrote in it, and the
    conversation, by its number in the step."""

    number: int
    written: Written
    conversation: int = 0


@dataclass(frozen=True)
class Rollout:
    """One completion of a prompt: in a conversation of several turns, one of the student's turns.

    ``ids`` ends with the stop id if the completion ``stopped``; ``tokenized`` holds the bytes of the ids without it.
    ``segments`` cover ``ids`` in order: a completion that the student wrote is one sampled segment, a completion from a
    data set one given segment; in one whose thinking was ended for it, the marker of that is given.
    ``sampling_logprobs`` is the log-probability of each id under its sampling distribution (temperature and top-p
    included), in nats; 0 for given ids. ``policy_version`` is the training step of the weights that sampled it.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    ids: NDArray[np.int32]
    sampling_logprobs: NDArray[np.float32]
    tokenized: TokenizedText
    stopped: bool
    segments: tuple[Segment, ...]
    policy_version: int = 0
    reward: float | None = None
    advantage: float = 0.0
    turn: Turn | None = None

    @property
    def sampled(self) -> bool:
        """Whether the student wrote any of it."""
        return any(segment.sampled for segment in self.segments)

    @property
    def thinking_cut(self) -> bool:
        """Whether the student's thinking was ended for it: some of the ids were given."""
        return self.sampled and not all(segment.sampled for segment in self.segments)

    @property
    def sampled_mask(self) -> NDArray[np.bool_]:
        """Which ids the student wrote."""
        mask = np.zeros(self.ids.size, np.bool_)
        for start, end, sampled in self.segments:
            mask[start:end] = sampled
        return mask

    @property
    def text(self) -> str:
        """The completion for display: invalid UTF-8 is shown as U+FFFD."""
        return self.tokenized.data.decode("utf-8", "replace")

    def without_text(self, nothing: TokenizedText) -> Rollout:
        """The same rollout without ids, which no objective counts. ``nothing``: an empty tokenized text."""
        return replace(
            self,
            ids=self.ids[:0],
            sampling_logprobs=self.sampling_logprobs[:0],
            tokenized=nothing,
            stopped=False,
            segments=(),
        )


def group_advantages(rewards: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    """Reward minus its group's mean, divided by the group's standard deviation; 0 where a group's rewards are all
    equal.

    A group is ``group`` consecutive rollouts of one prompt.

    Source: Shao et al. 2402.03300, section 4.1.2.
    """
    grouped = rewards.reshape(-1, group)
    deviation = grouped.std(axis=1, keepdims=True)
    centred = grouped - grouped.mean(axis=1, keepdims=True)
    return np.where(deviation > 1e-8, centred / np.maximum(deviation, 1e-8), 0.0).reshape(-1)
