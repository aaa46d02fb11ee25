"""The prompts of a file in memory, and how prompts are divided into training and held-out ones."""

import json
import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from gold.data.facts import Facts
from gold.data.prompt import Message, Prompt, content_hash
from gold.errors import ConfigError, DataError


class LazyPrompts(Sequence[Prompt]):
    """Prompts that are made when they are asked for, by ``at``."""

    @abstractmethod
    def at(self, place: int) -> Prompt:
        """The prompt of a place, from 0 on."""

    @overload
    def __getitem__(self, place: int) -> Prompt: ...
    @overload
    def __getitem__(self, place: slice) -> list[Prompt]: ...
    def __getitem__(self, place: int | slice) -> Prompt | list[Prompt]:
        places = range(len(self))[place]
        return self.at(places) if isinstance(places, int) else [self.at(each) for each in places]


class PromptFile(LazyPrompts):
    """The prompts of a file or of another source, or some of them, in its order; ``facts`` says what was read.

    They are in memory as the bytes of `row_of`, and a prompt is made when it is asked for: a million take 200 MiB
    instead of over a gigabyte. For each there are `hashes` (the first 64 bits of its content's hash), `characters` (of
    its text or messages and its teacher context), `weights`, and whether it `has_completion` and `has_messages`.
    """

    def __init__(self, rows: bytes | bytearray, columns: tuple[NDArray[Any], ...], facts: Facts) -> None:
        self._rows, self._columns, self.facts = rows, columns, facts
        self._ends, self._sizes, self.hashes, self.characters, self.weights = columns[:5]
        self.has_completion, self.has_messages = columns[5:]

    def where(self, chosen: NDArray[np.bool_]) -> "PromptFile":
        """The prompts for which `chosen` is true."""
        return PromptFile(self._rows, tuple(column[chosen] for column in self._columns), self.facts)

    def __len__(self) -> int:
        return len(self._ends)

    def at(self, place: int) -> Prompt:
        """The prompt of a place."""
        key, text, messages, completion, reference, context, route, *weight = json.loads(self.row(place))
        turns = None if messages is None else _turns(messages)
        context = _turns(context) if isinstance(context, list) else context
        return Prompt(key, text, turns, completion, reference, context, route, *weight)

    def row(self, place: int) -> bytes:
        """The bytes of `row_of` of a prompt."""
        end = int(self._ends[place])
        return bytes(self._rows[end - int(self._sizes[place]) : end])


def _turns(messages: list[Message]) -> tuple[Message, ...]:
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def characters(prompt: Prompt) -> int:
    """The number of characters of a prompt, with its teacher context."""
    parts = (prompt.text, prompt.messages, prompt.teacher_context)
    return sum(
        len(part) if isinstance(part, str) else sum(len(message["content"]) for message in part)
        for part in parts
        if part is not None
    )


def characters_of(prompts: Sequence[Prompt]) -> NDArray[np.int64]:
    """The number of characters of each prompt, with its teacher context."""
    if isinstance(prompts, PromptFile):
        return prompts.characters
    return np.array([characters(prompt) for prompt in prompts], np.int64)


def weights_of(prompts: Sequence[Prompt]) -> NDArray[np.float64]:
    """The weight of each prompt."""
    if isinstance(prompts, PromptFile):
        return prompts.weights
    return np.array([prompt.weight for prompt in prompts], np.float64)


def lacking_completion(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """The prompts without a completion."""
    if isinstance(prompts, PromptFile):
        return prompts.where(~prompts.has_completion)
    return [prompt for prompt in prompts if prompt.completion is None]


def lacking_messages(prompts: Sequence[Prompt]) -> Prompt | None:
    """The first prompt that is a plain text; None if all are conversations."""
    if isinstance(prompts, PromptFile):
        texts = np.flatnonzero(~prompts.has_messages)
        return prompts[int(texts[0])] if texts.size else None
    return next((prompt for prompt in prompts if prompt.messages is None), None)


def any_messages(prompts: Sequence[Prompt]) -> bool:
    """Whether a prompt is a conversation."""
    if isinstance(prompts, PromptFile):
        return bool(prompts.has_messages.any())
    return any(prompt.messages is not None for prompt in prompts)


MOST_EXAMINED = 2000
"""Maximum number of examined prompts; of more, this many drawn with a fixed seed, plus the longest."""
LONGEST_EXAMINED = 200


def examined(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts to examine: all, or of very many some drawn with a fixed seed and the longest ones."""
    if len(prompts) <= MOST_EXAMINED:
        return list(prompts)
    drawn = random.Random(0).sample(range(len(prompts)), MOST_EXAMINED)
    longest = np.argsort(-characters_of(prompts), kind="stable")[:LONGEST_EXAMINED].tolist()
    return [prompts[i] for i in sorted({*drawn, *longest})]


def split_by_hash(
    prompts: Sequence[Prompt], heldout_share: float
) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """The training prompts and the held-out prompts, each in the given order.

    A prompt is held out if the hash of its content, as a number in [0, 1), is below `heldout_share`: adding or removing
    prompts never moves another one, and equal contents are never on both sides.

    Raises:
        ConfigError: `heldout_share` is not in [0, 1).
        DataError: a side that should have prompts has none.
    """
    if not 0.0 <= heldout_share < 1.0:
        raise ConfigError(f"heldout_share is {heldout_share}; expected a number from 0 to below 1")
    # 52 bits: an exact float, so the comparison is the same on every machine.
    train, heldout = _sides(prompts, (_hashes(prompts) >> np.uint64(12)) / 2.0**52 < heldout_share)
    if not train:
        raise DataError(
            f"none of the {len(prompts)} prompts is left to train on; add prompts or lower heldout_share"
        )
    if heldout_share > 0.0 and not heldout:
        raise DataError(
            f"none of the {len(prompts)} prompts is held out at a share of {heldout_share}; "
            "add prompts, raise heldout_share, or give a held-out file of their own"
        )
    return train, heldout


def hold_out(prompts: Sequence[Prompt], count: int) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """The training prompts and `count` held-out prompts, of few prompts at most a fifth, each in the given order.

    Those with the smallest hashes of their content are held out; prompts of equal content stay together, so that there
    may be more.

    Raises:
        DataError: none is left to train on.
    """
    hashes = _hashes(prompts)
    ordered = np.sort(hashes)
    count = min(count, max(1, len(prompts) // 5))
    train, heldout = _sides(prompts, hashes <= ordered[count - 1])
    if not train:
        raise DataError(
            f"none of the {len(prompts)} prompts is left to train on: some are held out, and equal ones with them; add "
            "prompts, or give a held-out file of their own"
        )
    return train, heldout


def _hashes(prompts: Sequence[Prompt]) -> NDArray[np.uint64]:
    """The first 64 bits of each content's hash."""
    if isinstance(prompts, PromptFile):
        return prompts.hashes
    return np.array([int(content_hash(prompt)[:16], 16) for prompt in prompts], np.uint64)


def _sides(
    prompts: Sequence[Prompt], heldout: NDArray[np.bool_]
) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    if isinstance(prompts, PromptFile):
        return prompts.where(~heldout), prompts.where(heldout)
    both: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt, is_heldout in zip(prompts, heldout.tolist(), strict=True):
        both[is_heldout].append(prompt)
    return both
