"""Thinking budgets: thinking that has used up its tokens is ended for the student, which goes on with its answer.

Thinking of N tokens without its closing marker gets that marker, as the student's template writes it. The marker is
given: no objective counts it, and it has no sampling probability. A completion is drawn in several requests, each after
the ids so far, so that no engine has to know of budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gold.errors import ConfigError
from gold.models.language_model import LanguageModel, output_width
from gold.tokenize.chat import PlainText
from gold.tokenize.conversation import TemplateForm
from gold.tokenize.templates import Rendering
from gold.tokenize.vocabulary import Vocabulary
from gold.turns import thinking_range

if TYPE_CHECKING:
    from gold.rollout.engine import Generation, Request

    Generate = Callable[[Sequence[Request]], list[Generation]]

_STREAM = 2**31
"""Begins what the seed of a later request of a completion has more than that of the first; no turn has this number."""


class ThinkingModel(Protocol):
    """A model, or its tokenizer and template alone."""

    @property
    def name(self) -> str:
        """Its name in messages."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, with the chat template."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """Its vocabulary, with its stop ids."""
        ...

    @property
    def rendering(self) -> Rendering:
        """The arguments of its chat template."""
        ...


@dataclass(frozen=True)
class ThinkingBudget:
    """How a model's thinking is ended: after ``tokens`` of it the ids ``closing`` follow.

    ``opening`` is the marker before it, which has ``opening_tokens``; ``opened``: the template writes it.
    """

    tokens: int
    opening: str
    opening_tokens: int
    closing: tuple[int, ...]
    opened: bool

    @classmethod
    def of(cls, model: ThinkingModel, tokens: int, max_new_tokens: int) -> ThinkingBudget:
        """The budget of a model.

        Raises:
            ConfigError: its chat template writes no thinking, or ``max_new_tokens`` leave no room for an answer.
        """
        form = TemplateForm.of(model.tokenizer, model.rendering)
        if form.thinking is None:
            raise ConfigError(
                f"rollout.thinking_budget: the chat template of {model.name} has no markers of thinking; set it to null"
            )
        encoded = PlainText(model.tokenizer)
        opening, closing = form.thinking[0].strip(), tuple(encoded.ids(form.thinking[1]))
        if stops := sorted(set(closing) & set(model.vocabulary.stop_ids)):
            raise ConfigError(
                f"rollout.thinking_budget: the chat template of {model.name} ends thinking with "
                f"{model.vocabulary.label(stops[0])}, which ends its turns; set it to null"
            )
        opened = form.opens_thinking
        budget = cls(tokens, opening, 0 if opened else len(encoded.ids(opening)), closing, opened)
        if (least := budget.first + len(closing) + 1) > max_new_tokens:
            raise ConfigError(
                f"rollout.thinking_budget: {tokens} tokens of thinking, its markers and an answer take {least}; raise "
                f"rollout.max_new_tokens, which is {max_new_tokens}, or lower the budget"
            )
        return budget

    @property
    def first(self) -> int:
        """The tokens of a completion after which its thinking may have used up its budget."""
        return self.opening_tokens + self.tokens


def check_thinking_budget(model: ThinkingModel, tokens: int | None, max_new_tokens: int) -> None:
    """Checks that a model's thinking can be ended after so many tokens; None is no budget.

    Raises:
        ConfigError: see ``ThinkingBudget.of``.
    """
    if tokens is not None:
        ThinkingBudget.of(model, tokens, max_new_tokens)


def within_budgets(model: LanguageModel, generate: Generate) -> Generate:
    """The same as ``generate``, with the model's thinking ended where a request's ``sampling.thinking_budget`` is used
    up."""

    def drawn(requests: Sequence[Request]) -> list[Generation]:
        budgets = {
            sampling: ThinkingBudget.of(model, sampling.thinking_budget, sampling.max_new_tokens)
            for sampling in {request.sampling for request in requests}
            if sampling.thinking_budget is not None
        }
        if not budgets:
            return generate(requests)
        texts = [_Text(model, request, budgets.get(request.sampling)) for request in requests]
        while waiting := [text for text in texts if text.target > len(text.ids)]:
            for text, more in zip(waiting, generate([text.request() for text in waiting]), strict=True):
                text.add(more)
        return [text.generation() for text in texts]

    return drawn


@dataclass
class _Text:
    """A completion under way: its ids so far, and the number of ids up to which it is drawn next."""

    model: LanguageModel
    asked: Request
    budget: ThinkingBudget | None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    parts: list[Generation] = field(default_factory=list)
    stopped: bool = False
    given: tuple[int, int] | None = None
    target: int = 0

    def __post_init__(self) -> None:
        self.target = self.most if self.budget is None else self.budget.first

    @property
    def most(self) -> int:
        """The most ids that it can have."""
        return self.asked.sampling.max_new_tokens

    def request(self) -> Request:
        """The next request; the first one has the seed of the completion, so that texts within the budget's first
        tokens are those that are drawn without a budget."""
        sampling = replace(
            self.asked.sampling, max_new_tokens=self.target - len(self.ids), thinking_budget=None
        )
        prompt = (*self.asked.prompt_ids, *self.ids)
        later = (_STREAM, len(self.parts)) if self.parts else ()
        return replace(self.asked, prompt_ids=prompt, seed=(*self.asked.seed, *later), sampling=sampling)

    def add(self, more: Generation) -> None:
        """Adds what was drawn, and decides how far to go on."""
        self.ids += more.ids.tolist()
        self.logprobs += more.logprobs.tolist()
        self.parts.append(more)
        self.stopped = more.stopped
        decided = self.target == self.most
        self.target = self.most if decided else self._next_target()
        if self.stopped:
            self.target = len(self.ids)

    def _next_target(self) -> int:
        """Up to how many ids the text is drawn next; ends thinking whose budget is used up."""
        assert self.budget is not None
        text = self.model.vocabulary.decode(
            np.array(self.ids[: len(self.ids) - self.stopped], np.int32), rows=output_width(self.model.lm)
        )
        opened, closing = self.budget.opened, self.budget.closing
        thinking = thinking_range(text.data, opened=opened)
        if thinking is None:
            begun = text.data.decode("utf-8", "replace").lstrip()
            undecided = len(begun) < len(self.budget.opening) and self.budget.opening.startswith(begun)
            return min(self.most, len(self.ids) + self.budget.first) if undecided else self.most
        end = int(np.searchsorted(text.starts, thinking[0])) + self.budget.tokens
        if end > text.ids.size:
            return self.most if thinking[1] is not None else min(self.most, end)
        within = thinking_range(text.data[: int(text.ends[end - 1])], opened=opened)
        ended = within is None or within[1] is not None
        if not ended and end + len(closing) < self.most:
            self.ids = [*self.ids[:end], *closing]
            self.logprobs = [*self.logprobs[:end], *(0.0 for _ in closing)]
            self.given, self.stopped = (end, end + len(closing)), False
        return self.most

    def generation(self) -> Generation:
        """The whole completion; its version is that of the oldest weights that wrote in it."""
        return replace(
            self.parts[0],
            ids=np.array(self.ids, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            stopped=self.stopped,
            version=min(part.version for part in self.parts),
            given=self.given,
        )
