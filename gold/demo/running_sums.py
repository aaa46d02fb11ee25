"""The demonstration's task: running sums, which a program can check.

A prompt is a number and some steps, `` 24 +7 -3 +8 =``; the answer is every intermediate value, `` 31 28 36``.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from gold.data import Prompt
from gold.errors import ConfigError

HELDOUT_STREAM = 1


@dataclass(frozen=True)
class RunningSums:
    """Running sums within ``lowest`` … ``highest``, of ``shortest`` to ``longest`` steps up to ``largest``."""

    lowest: int = 10
    highest: int = 49
    shortest: int = 2
    longest: int = 4
    largest: int = 5

    name = "running_sums"

    def __post_init__(self) -> None:
        if not (0 <= self.lowest < self.highest and self.largest > 0 and 1 <= self.shortest <= self.longest):
            raise ConfigError(
                "running_sums: needs 0 ≤ lowest < highest, largest > 0 and 1 ≤ shortest ≤ longest, got lowest "
                f"{self.lowest}, highest {self.highest}, largest {self.largest}, shortest {self.shortest}, longest "
                f"{self.longest}"
            )

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """``count`` different prompts; no prompt is in both splits, for any seeds.

        Raises:
            ConfigError: an unknown split, or more prompts than exist.
        """
        if split not in ("train", "heldout"):
            raise ConfigError(f"running_sums: unknown split {split!r}; choose train or heldout")
        heldout = split == "heldout"
        rng = np.random.default_rng((seed, HELDOUT_STREAM if heldout else 0))
        made: dict[str, Prompt] = {}
        tries = 0
        while len(made) < count:
            tries += 1
            if tries > 100 * count + 1000:
                raise ConfigError(f"running_sums: cannot make {count} different prompts; ask for fewer")
            text, values = self._draw(rng)
            # The split of a prompt follows from its text: every eighth is held out.
            if (zlib.crc32(text.encode()) % 8 == 0) is heldout:
                answer = "".join(f" {v}" for v in values)
                made.setdefault(
                    text, Prompt(key=text.strip(), text=text, completion=answer, reference=answer)
                )
        return list(made.values())

    def score(self, prompt: Prompt, completion: str) -> float:
        """1 if every value is right and nothing else is written, else 0."""
        return float(completion == prompt.reference)

    def _draw(self, rng: np.random.Generator) -> tuple[str, list[int]]:
        value = int(rng.integers(self.lowest, self.highest + 1))
        text, values = f" {value}", []
        for _ in range(int(rng.integers(self.shortest, self.longest + 1))):
            step = 0
            while step == 0 or not self.lowest <= value + step <= self.highest:
                step = int(rng.integers(-self.largest, self.largest + 1))
            value += step
            values.append(value)
            text += f" {step:+d}"
        return f"{text} =", values
