"""The interface of a teacher, as used by training, evaluation, the prompt checks and the run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gold.data import Prompt
from gold.errors import DataError, TeacherError
from gold.exact.marginals import States
from gold.kernels.logits import LazyLogits
from gold.losses import Need
from gold.teachers.branches import scored_states
from gold.tokenize.chat import prompt_ids
from gold.tokenize.templates import Rendering
from gold.tokenize.vocabulary import TokenizedText, Vocabulary

if TYPE_CHECKING:
    from gold.models.language_model import LanguageModel


class Teacher(Protocol):
    """A teacher renders prompts in its own chat template and scores completions in its own tokens.

    A subclass sets ``name``, ``gives``, ``vocabulary`` and ``device``, and implements ``score``; everything else has a
    default. With a ``tokenizer``, its prompts are checked before a run; with a ``model`` that gives full rows,
    evaluations also measure the forward KL on its samples.
    """

    name: str
    """The name in run headers and error messages."""
    gives: Need
    """The level of detail of its rows; an objective that needs more is rejected before the run."""
    vocabulary: Vocabulary
    device: torch.device
    """The device of its rows."""
    dtype: torch.dtype = torch.float32
    """The dtype of its rows."""
    top_k: int | None = None
    """The number of top tokens per row, if ``gives`` is not "rows"."""
    context: int | None = None
    """Its longest sequence in tokens; None if unknown."""
    tokenizer: Any = None
    """The tokenizer of its prompts, with its chat template."""
    rendering: Rendering | None = None
    """The arguments of its chat template."""
    model: LanguageModel | None = None
    """Its model, if it is in this process."""
    batch_tokens: int | None = None
    """Most tokens of one of its model's passes, if a bound was set."""
    packed: bool = False
    """Whether its model reads texts in one row without padding (``probe.check_packing``)."""
    pinned_date: date | None = None
    """The date that its chat template must print; None for any date."""
    complete: bool = True
    """True if it scores any text; a cache without a model scores only the texts that it holds."""

    @property
    def retries(self) -> int | None:
        """The number of repeated requests so far; None for a teacher that makes none."""
        return None

    def adapt_prompt(self, prompt: Prompt) -> Prompt:
        """The prompt for this teacher: by default with its teacher context."""
        return prompt.for_teacher

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt in its template.

        Raises:
            DataError: the prompt is empty or its template rejects it; the error names the prompt's key.
        """
        try:
            ids = prompt_ids(self.tokenizer, self.adapt_prompt(prompt), self.rendering)
        except DataError as error:
            raise DataError(f"prompt {prompt.key}: for teacher {self.name}: {error}") from error
        if not ids:
            raise DataError(f"prompt {prompt.key}: it is empty for teacher {self.name}")
        return ids

    def misfit(self, prompt: Prompt, tokens: int) -> str:
        """Why it cannot score a completion of this many tokens after a prompt; "" if it can.

        Such a text is not sent to it and counts for no objective.
        """
        if self.tokenizer is None:
            return ""
        try:
            length = len(self.prompt_ids(prompt)) + tokens
        except DataError as error:
            return str(error)
        if self.context is None or length <= self.context:
            return ""
        return (
            f"prompt {prompt.key}: with its completion it takes {length} tokens of teacher {self.name}, whose context "
            f"is {self.context}"
        )

    def score(
        self, prompts: Sequence[Prompt], tokenized_texts: Sequence[TokenizedText], stopped: Sequence[bool]
    ) -> list[LazyLogits]:
        """The teacher's logits for each completion, without gradient.

        There is one row per token of ``tokenized_texts`` (the teacher's tokens), and one more for the end if the text
        ``stopped``.

        Raises:
            DataError: a prompt that it cannot read.
            TeacherError: it cannot answer now; a run saves a checkpoint and ends.
        """
        raise TeacherError(f"teacher {self.name}: cannot be asked for scores")

    def states(self, prompt: Prompt, tokenized: TokenizedText, stopped: bool) -> States:
        """Its states along one completion, and behind other tokens than that completion's: for exact measures.

        By default every branch is scored as a text; a teacher that can continue from a prefix does less.

        Raises:
            DataError, TeacherError: as ``score``.
        """
        return scored_states(self, prompt, tokenized, stopped)

    def check_kept(
        self, prompts: Sequence[Prompt], tokenized_texts: Sequence[TokenizedText], stopped: Sequence[bool]
    ) -> None:
        """Checks that a teacher that is not ``complete`` can score all these texts.

        Raises:
            TeacherError: it lacks some.
        """
        return

    def check_before_asking(self, check: Callable[[], None]) -> None:
        """Calls ``check``, now or, if it has scores without asking for them, before it asks for the first others.

        Raises:
            ConfigError: that of ``check``, if it is called now; later it ends the run as a TeacherError.
        """
        check()

    def ema_update(self, student: Any, masters: Mapping[Tensor, Tensor]) -> None:
        """Called after each optimizer step, for teachers that average the student.

        ``student`` is the student's transformers model, ``masters`` the float32 master copies of its weights (by
        weight).
        """
        return

    def state(self) -> dict[str, Tensor] | None:
        """Its state for a checkpoint; None for a teacher that does not change."""
        return None

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what ``state`` returned."""
        return

    def cache_revision(self, given: str | None) -> str:
        """Identifies its weights in a cache; ``given`` is the configured revision."""
        return given or self.name

    def pin_date(self, day: date) -> None:
        """Fixes the date that its chat template prints, unless it already has one."""
        if self.rendering is not None:
            self.rendering.pin_day(self.pinned_date or day)
