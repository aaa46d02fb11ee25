"""What a rollout is: the ids of one completion, who wrote which of them, how likely they were, and their bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gold.data import Prompt
from gold.tokenize.vocabulary import TokenizedText

Seed = tuple[int, ...]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. The defaults draw from the model itself; ``temperature`` 0 is greedy decoding."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128


class Segment(NamedTuple):
    """A span of a rollout's ids, from ``start`` to ``end``: written by the student, or given to it."""

    start: int
    end: int
    sampled: bool


@dataclass(frozen=True)
class Rollout:
    """One completion of a prompt.

    ``ids`` includes the stop id last where the completion ``stopped``; ``tokenized`` holds the bytes of the ids without
    that stop id. ``segments`` cover ``ids`` in order: a completion that the student wrote is one sampled segment, a
    completion from a data set one given segment. ``sampling_logprobs`` is the log-probability of each id under the
    distribution that it was drawn from (temperature and top-p included), in nats; 0 for given ids.
    ``policy_version`` is the step whose weights drew it.
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

    @property
    def sampled(self) -> bool:
        """Whether the student wrote any of it."""
        return any(segment.sampled for segment in self.segments)

    @property
    def sampled_mask(self) -> NDArray[np.bool_]:
        """Which ids the student wrote."""
        mask = np.zeros(self.ids.size, np.bool_)
        for start, end, sampled in self.segments:
            mask[start:end] = sampled
        return mask

    @property
    def text(self) -> str:
        """The completion for display: bytes that are not valid UTF-8 show as U+FFFD."""
        return self.tokenized.data.decode("utf-8", "replace")

    def without_text(self, nothing: TokenizedText) -> Rollout:
        """The same rollout with no ids: nothing of it counts in any objective. ``nothing``: no bytes, tokenized."""
        return replace(
            self,
            ids=self.ids[:0],
            sampling_logprobs=self.sampling_logprobs[:0],
            tokenized=nothing,
            stopped=False,
            segments=(),
        )


def group_advantages(rewards: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    """Reward less its group's mean, over the group's standard deviation; 0 where a group's rewards are all equal.

    A group is ``group`` consecutive rollouts, all of one prompt.

    Source: Shao et al. 2402.03300, section 4.1.2.
    """
    grouped = rewards.reshape(-1, group)
    deviation = grouped.std(axis=1, keepdims=True)
    centred = grouped - grouped.mean(axis=1, keepdims=True)
    return np.where(deviation > 1e-8, centred / np.maximum(deviation, 1e-8), 0.0).reshape(-1)
