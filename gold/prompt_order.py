"""The order in which a run draws its prompts: a function of the seed and the step."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gold.data import Prompt, weights_of
from gold.errors import ConfigError

Kind = Literal["shuffled", "kept"]


class PromptOrder:
    """The indices of each step's prompts, of ``count`` prompts: ``shuffled`` anew for every epoch, or ``kept``.

    It is stateless: ``batch`` depends only on the seed and the step, whatever the number of processes, so a resumed run
    needs no saved position.

    With ``weights`` an epoch still has ``count`` places, and a prompt has ``count · weight / Σ weights`` of them,
    rounded up or down at random: systematic sampling, each epoch from another starting point, then shuffled. Equal
    weights give every prompt one place.

    Raises:
        ConfigError: ``count`` is below 1 or ``seed`` below 0; weights of which none is above 0, or for a kept order.
    """

    def __init__(
        self, count: int, seed: int, kind: Kind = "shuffled", weights: NDArray[np.float64] | None = None
    ) -> None:
        if count < 1:
            raise ConfigError(f"an order needs at least one prompt, got {count}")
        if seed < 0:
            raise ConfigError(f"seed is {seed}; expected 0 or more")
        if weights is not None and kind == "kept":
            raise ConfigError(
                "data.weight: prompts in the order of the file have no weights: set data.order to shuffled, or leave "
                "the weights out"
            )
        if weights is not None and not weights.any():
            raise ConfigError("data.weight: all weights of the prompts are 0; expected one above 0")
        self.count, self.seed, self.kind = count, seed, kind
        self._epoch: Callable[[int], NDArray[np.int64]] = lru_cache(maxsize=2)(
            self._shuffled if weights is None else lambda epoch: self._weighted(epoch, np.cumsum(weights))
        )

    @classmethod
    def of(cls, prompts: Sequence[Prompt], seed: int, kind: Kind = "shuffled") -> "PromptOrder":
        """The order of these prompts, with their weights if they differ."""
        weights = weights_of(prompts)
        differ = bool(len(weights)) and bool((weights != weights[0]).any())
        return cls(len(prompts), seed, kind, weights if differ or not weights.any() else None)

    def batch(self, step: int, size: int) -> list[int]:
        """The indices of the ``size`` prompts of a step, counted from 0; a batch may span two epochs.

        The size must be the same for every step of a run: step n starts at position n·size.
        """
        if step < 0 or size < 1:
            raise ConfigError(
                f"a batch needs a step of 0 or more and a size of 1 or more, got {step} and {size}"
            )
        places = range(step * size, (step + 1) * size)
        if self.kind == "kept":
            return [place % self.count for place in places]
        return [int(self._epoch(place // self.count)[place % self.count]) for place in places]

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        # Sorts raw Philox words instead of calling Generator.permutation: only the former is promised to stay the same.
        words = np.random.Philox(np.random.SeedSequence((self.seed, epoch))).random_raw(self.count)
        return np.argsort(words, kind="stable")

    def _weighted(self, epoch: int, cumulative: NDArray[np.float64]) -> NDArray[np.int64]:
        word = np.random.Philox(np.random.SeedSequence((self.seed, epoch, 1))).random_raw(1)[0]
        start = float(word >> np.uint64(11)) / 2.0**53
        points = (np.arange(self.count) + start) * (cumulative[-1] / self.count)
        drawn = np.searchsorted(cumulative, points, side="right")
        last = np.searchsorted(cumulative, cumulative[-1])  # rounding may put a point behind all weights
        order: NDArray[np.int64] = np.minimum(drawn, last)[self._shuffled(epoch)]
        return order
