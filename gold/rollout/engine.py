"""The interface of rollout engines: gold encodes prompts and decodes completions, an engine only generates ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gold.data import Prompt
from gold.errors import DataError
from gold.models.language_model import LanguageModel, output_width
from gold.rollout.prompts import encode_prompt
from gold.rollout.stopping import fits_with_stop, with_stop, without_stop
from gold.rollout.thinking import within_budgets
from gold.rollout.types import Rollout, Sampling, Seed, Segment
from gold.tokenize.chat import starts_text
from gold.tokenize.vocabulary import TokenizedText


@dataclass(frozen=True)
class Request:
    """One completion to generate. ``seed`` selects its random stream: the same request with the same weights draws the
    same ids, however requests are batched."""

    prompt_ids: tuple[int, ...]
    seed: Seed
    sampling: Sampling
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """One generated completion: the ids drawn (ending with the stop id if it ``stopped``), the log-probability of each
    under its sampling distribution, in nats, and the version of the weights. ``given``: the range of ids that were not
    drawn but given, see ``gold.rollout.thinking``; their log-probability is 0."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    stopped: bool
    version: int
    given: tuple[int, int] | None = None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The ids as segments, drawn and given."""
        first, last = self.given or (self.ids.size, self.ids.size)
        each = Segment(0, first, True), Segment(first, last, False), Segment(last, self.ids.size, True)
        return tuple(s for s in each if s.end > s.start) or each[:1]


class RolloutEngine(Protocol):
    """Generates token ids with the student's weights.

    gold handles templates, token ids, stop ids, bytes, seeds and versions; the engine batching and transport. It stops
    at ``stop_ids`` only and ignores the model's generation config.
    """

    version: int
    """The training step of its weights."""
    own_weights: bool
    """Whether it holds a copy of the student's weights: then it may generate while the student is trained, and its
    probabilities may differ from the student's by rounding."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One result per request, in order.

        Raises: GoldError on failure; there are no partial results.
        """
        ...

    def push(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Loads the student's weights after a step: its state dict, tied matrices under each of their names. Returns
        once the next ``generate`` uses them."""
        ...

    def close(self) -> None:
        """Frees all resources. The engine is not used afterwards."""
        ...


@runtime_checkable
class DescribedEngine(RolloutEngine, Protocol):
    """A rollout engine that is named where a run begins."""

    @property
    def description(self) -> str:
        """What generates, and where, in a few words."""
        ...


@runtime_checkable
class ProbedEngine(RolloutEngine, Protocol):
    """A rollout engine that is tried before the first step of a run, and at every resumption."""

    def check_length(self, prompt: int, new: int) -> None:
        """Checks that a prompt of so many tokens and so many ``new`` ones fit.

        Raises:
            EngineError: they do not; one line that says what to change.
        """
        ...

    def probe(
        self,
        model: LanguageModel,
        prompts: Sequence[Prompt],
        weights: Mapping[str, Tensor],
        version: int,
        adapter: Mapping[str, Any] | None = None,
    ) -> None:
        """Checks the engine by draws, and leaves it with the student's ``weights``; with ``adapter``, its settings,
        these are an adapter's alone.

        Raises:
            EngineError: it does not do what a run relies on; one line that says what to change.
        """
        ...


@runtime_checkable
class AdapterEngine(RolloutEngine, Protocol):
    """A rollout engine that has the weights below a student's adapter, and takes the adapter alone if ``adapters``."""

    adapters: bool

    def push_adapter(self, weights: Mapping[str, Tensor], version: int, config: Mapping[str, Any]) -> None:
        """Loads the student's adapter after a step in place of the last one: its weights by peft's names, and the
        contents of its adapter_config.json."""
        ...


def sample(
    engine: RolloutEngine,
    model: LanguageModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    seeds: Sequence[Seed],
) -> list[Rollout]:
    """One rollout per prompt, in order, generated by ``engine`` under the template of ``model``.

    Raises:
        DataError: a prompt leaves no room in the model's context; the message names its key.
        GoldError: any error of the engine.
    """
    requests = [request_for(model, p, sampling, seed) for p, seed in zip(prompts, seeds, strict=True)]
    drawn = within_budgets(model, engine.generate)(requests)
    return [rollout_of(model, *each) for each in zip(prompts, requests, drawn, strict=True)]


def request_for(model: LanguageModel, prompt: Prompt, sampling: Sampling, seed: Seed) -> Request:
    """The request for a completion of a prompt under the template of ``model``.

    Raises:
        DataError: the prompt leaves no room in the model's context; the message names its key.
    """
    ids = encode_prompt(model, prompt, sampling.max_new_tokens)
    return Request(ids, seed, sampling.of(prompt), model.vocabulary.stop_ids)


def rollout_of(model: LanguageModel, prompt: Prompt, request: Request, drawn: Generation) -> Rollout:
    """The rollout of a prompt from an engine's answer."""
    text = without_stop(drawn.ids, drawn.stopped)
    tokenized = model.vocabulary.decode(text, at_start=starts_text(prompt), rows=output_width(model.lm))
    return Rollout(
        prompt,
        request.prompt_ids,
        drawn.ids,
        drawn.logprobs,
        tokenized,
        drawn.stopped,
        drawn.segments,
        drawn.version,
    )


def completed(model: LanguageModel, prompt: Prompt, max_new_tokens: int) -> Rollout:
    """The data set's completion of a prompt as a rollout: the model's ids of its bytes, then its first stop id.

    Raises:
        DataError: the prompt has no completion, or it is too long for the model.
    """
    if prompt.completion is None:
        raise DataError(f"prompt {prompt.key}: it has no completion; add one, or set rollout.on_policy to 1")
    anew = starts_text(prompt)
    tokenized = model.vocabulary.encode(prompt.completion, at_start=anew)
    stopped = fits_with_stop(tokenized.ids, max_new_tokens)
    if not stopped:
        tokenized = model.vocabulary.decode(tokenized.ids[:max_new_tokens], at_start=anew)
    return given_rollout(model, prompt, tokenized, stopped)


def given_rollout(model: LanguageModel, prompt: Prompt, tokenized: TokenizedText, stopped: bool) -> Rollout:
    """A text not written by the model as a rollout of a prompt, with the first stop id if it ``stopped``.

    Raises:
        DataError: prompt and text are too long for the model.
    """
    ids = with_stop(tokenized.ids, model.vocabulary.stop_ids, stopped)
    encoded = encode_prompt(model, prompt, ids.size)
    logprobs, segments = np.zeros(ids.size, np.float32), (Segment(0, ids.size, False),)
    return Rollout(prompt, encoded, ids, logprobs, tokenized, stopped, segments)
