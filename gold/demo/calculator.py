"""A task of two turns with a tool: products that a small model cannot compute, and a calculator that it can call."""

from __future__ import annotations

import zlib

import numpy as np

from gold.data import Prompt
from gold.environments.protocol import Conversation
from gold.environments.tools import ToolEnvironment
from gold.errors import ConfigError


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return int(a) * int(b)


class Calculator(ToolEnvironment):
    """Products of two numbers from ``lowest`` to ``highest``: the question is `37 * 48`, the answer of the last turn
    `1776`, and the tool `multiply` must have been called with these numbers."""

    name = "calculator"

    def __init__(self, lowest: int = 11, highest: int = 99) -> None:
        super().__init__([multiply])
        if not 0 <= lowest < highest:
            raise ConfigError(f"calculator: needs 0 ≤ lowest < highest, got {lowest} and {highest}")
        self.lowest, self.highest = lowest, highest

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """``count`` different questions; no question is in both splits, for any seeds.

        Raises:
            ConfigError: an unknown split, or more questions than exist.
        """
        if split not in ("train", "heldout"):
            raise ConfigError(f"calculator: unknown split {split!r}; choose train or heldout")
        rng = np.random.default_rng((seed, int(split == "heldout")))
        found: dict[str, Prompt] = {}
        for _ in range(100 * count + 1000):
            a, b = (int(n) for n in rng.integers(self.lowest, self.highest + 1, 2))
            text = f"{a} * {b}"
            # The split of a question follows from its text: every eighth is held out.
            if (zlib.crc32(text.encode()) % 8 == 0) is (split == "heldout") and text not in found:
                message = {"role": "user", "content": text}
                found[text] = Prompt(text, messages=(message,), reference=[a, b])
                if len(found) == count:
                    return list(found.values())
        raise ConfigError(f"calculator: there are no {count} different {split} questions; ask for fewer")

    def score(self, conversation: Conversation | Prompt, completion: str | None = None) -> float:
        """1 if the last turn is the product and the tool was called with the numbers, else 0."""
        if isinstance(conversation, Prompt):  # a completion of one turn called nothing
            return 0.0
        a, b = conversation.prompt.reference
        called = any(
            call.name == "multiply" and dict(call.arguments) == {"a": a, "b": b}
            for turn in conversation.turns
            for call in turn.calls
        )
        right = conversation.ended == "done" and conversation.answer.strip() == str(a * b)
        return float(called and right)
