"""A teacher's states behind other tokens than a text's own, for teachers that can only score texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gold.kernels.logits import LazyLogits

if TYPE_CHECKING:
    from gold.data import Prompt
    from gold.teachers.protocol import Teacher
    from gold.tokenize.vocabulary import TokenizedText

Ints = NDArray[np.int64]


class AskedStates:
    """The states of a teacher along a text and behind branches, each of which is asked for by itself.

    ``path``: the rows along the text. ``after``: for some token sequences, each a beginning of the completion, the row
    behind each. ``room``: the most tokens that such a sequence may have.
    """

    def __init__(
        self,
        ids: NDArray[np.int32],
        path: Callable[[], LazyLogits],
        after: Callable[[Sequence[list[int]]], LazyLogits],
        room: int = 2**31,
    ) -> None:
        self.room = room
        self._ids, self._path, self._after = ids.tolist(), path, after
        self._branches: list[list[int]] = []

    def path(self) -> LazyLogits:
        """The rows along the text's own tokens."""
        return self._path()

    def behind(self, parents: Ints, tokens: Ints) -> LazyLogits:
        """The rows behind one more token each; see ``gold.exact.marginals.States``."""
        first = len(self._branches)
        for parent, token in zip(parents.tolist(), tokens.tolist(), strict=True):
            before = self._ids[: -1 - parent] if parent < 0 else self._branches[parent]
            self._branches.append([*before, token])
        return self._after(self._branches[first:])


def scored_states(teacher: Teacher, prompt: Prompt, text: TokenizedText, stopped: bool) -> AskedStates:
    """The states of any teacher: each branch is scored as a text that ends there, and its last row is that of its
    end."""

    def after(branches: Sequence[list[int]]) -> LazyLogits:
        texts = [teacher.vocabulary.decode(ids) for ids in branches]
        rows = teacher.score([prompt] * len(texts), texts, [True] * len(texts))
        return LazyLogits.joined([own.select(slice(len(own) - 1, None)) for own in rows])

    return AskedStates(
        text.ids,
        lambda: teacher.score([prompt], [text], [stopped])[0],
        after,
        room_of(teacher, prompt, text.ids.size),
    )


def room_of(teacher: Teacher, prompt: Prompt, tokens: int) -> int:
    """The most tokens of a completion that a teacher can score behind a prompt, if that is known, given that it can
    score so many."""
    if teacher.context is None or teacher.tokenizer is None:
        return 2**31
    used = len(teacher.prompt_ids(prompt))
    # The end of a text takes more than its tokens, of a served teacher.
    spare = next((n for n in range(3) if not teacher.misfit(prompt, teacher.context - used - n)), 0)
    return max(tokens, teacher.context - used - spare)
