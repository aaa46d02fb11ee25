"""What a teacher is."""

from collections.abc import Sequence
from typing import Protocol

import torch

from gold.data import Prompt
from gold.kernels.lm_head import LazyLogits
from gold.losses import Need
from gold.tokenize.vocabulary import TokenizedText, Vocabulary


class Teacher(Protocol):
    """Reads each prompt in its own template and grades completions in its own tokens.

    One that asks again after failures counts them in ``retries``; the metrics of a run show them then. One that cannot
    read every text has a method ``misfit(prompt, tokenized)``, which says why it cannot read a completion behind its
    prompt, "" where it can: such a text is not sent to it, and counts for no objective (see ``reading.misfit``).
    """

    @property
    def name(self) -> str:
        """What to call it in a run's header."""
        ...

    @property
    def gives(self) -> Need:
        """The most it can give; an objective that needs more is refused before the run."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """Its own vocabulary."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its rows are."""
        ...

    def score(
        self, prompts: Sequence[Prompt], tokenized_texts: Sequence[TokenizedText], stopped: Sequence[bool]
    ) -> list[LazyLogits]:
        """The teacher's states over each completion: one per token of ``tokenized_texts`` (in the teacher's tokens),
        and one more for the stop event where the text ``stopped``; without gradient."""
        ...
