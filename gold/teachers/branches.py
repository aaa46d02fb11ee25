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
    behind each; one row in all of them.
    """

    def __init__(
        self,
        ids: NDArray[np.int32],
        path: Callable[[], LazyLogits],
        after: Callable[[Sequence[list[int]]], LazyLogits],
    ) -> None:
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

    return AskedStates(text.ids, lambda: teacher.score([prompt], [text], [stopped])[0], after)
