"""Prompts in, rollouts out: what the student wrote, as ids and bytes, how likely it found it, and why it stopped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor

from gold.data import Prompt
from gold.errors import DataError, ModelError
from gold.models.causal import LanguageModel, generate, output_width
from gold.tokenize.chat import begins_anew
from gold.tokenize.vocabulary import TokenizedText


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. The defaults draw from the model itself; at ``temperature`` 0 the likeliest token."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128


@dataclass(frozen=True)
class Rollout:
    """One completion of a prompt.

    ``ids`` as sampled, the stop id last where it ``stopped``; ``logp`` the log-probability of each under the
    distribution that it was drawn from, in nats (temperature and top-p included); ``tokenized`` the bytes of the ids
    but the stop id. ``sampled`` is False where the completion came from a data set, and ``logp`` is then zero.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    ids: NDArray[np.int32]
    logp: NDArray[np.float32]
    tokenized: TokenizedText
    stopped: bool
    sampled: bool = True
    reward: float | None = None
    advantage: float = 0.0

    @property
    def text(self) -> str:
        """The completion for people: bytes that are no valid UTF-8 show as U+FFFD."""
        return self.tokenized.data.decode("utf-8", "replace")

    def rewarded(self, reward: float, advantage: float) -> Rollout:
        """The same rollout with its task reward and its advantage over its group."""
        return replace(self, reward=reward, advantage=advantage)


@torch.no_grad()
def sample(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    seeds: Sequence[tuple[int, ...]],
    batch: int = 32,
) -> list[Rollout]:
    """One rollout per prompt, in order, drawn from ``model`` under its own template.

    ``seeds`` names the random stream of each rollout, so that what is drawn depends neither on how prompts are batched
    nor on which process draws it. ``batch`` sequences are generated together, prompts of like length side by side; of
    one length, or each alone, where the model is another else (``LanguageModel.completes``).

    Raises:
        DataError: a prompt that leaves no room in the model's context; the message names its key.
        ModelError: a model that can be read, and not written with; see ``LanguageModel.cannot_write``.
    """
    if model.cannot_write:
        raise ModelError(
            f"model {model.name}: it can be read, and teach, but generate does not work: {model.cannot_write}"
        )
    encoded = [encode_prompt(model, prompt, sampling.max_new_tokens) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (len(encoded[i]), i))
    rollouts: dict[int, Rollout] = {}
    was_training = model.lm.training
    model.lm.eval()
    try:
        for chosen in _batches(model, order, encoded, batch):
            drawn = _generate(model, [encoded[i] for i in chosen], sampling, [seeds[i] for i in chosen])
            for i, (ids, logp, stopped) in zip(chosen, drawn, strict=True):
                text, anew = ids[:-1] if stopped else ids, begins_anew(prompts[i])
                tokenized = model.vocabulary.decode(text, at_start=anew, rows=output_width(model.lm))
                rollouts[i] = Rollout(prompts[i], encoded[i], ids, logp, tokenized, stopped)
    finally:
        model.lm.train(was_training)
    return [rollouts[i] for i in range(len(prompts))]


def _batches(
    model: LanguageModel, order: Sequence[int], encoded: Sequence[Sequence[int]], size: int
) -> Iterator[list[int]]:
    """Prompts that the model completes together, at most ``size``."""
    mixed = model.completes == "together"
    size = 1 if model.completes == "one" else size
    for _, alike in itertools.groupby(order, key=lambda i: 0 if mixed else len(encoded[i])):
        together = list(alike)
        for first in range(0, len(together), size):
            yield together[first : first + size]


def completed(model: LanguageModel, prompt: Prompt, max_new_tokens: int) -> Rollout:
    """The data set's own completion of a prompt as a rollout: the model's ids of its bytes, then its first stop id.

    Raises:
        DataError: the prompt has no completion, or it is too long for the model.
    """
    if prompt.completion is None:
        raise DataError(f"prompt {prompt.key}: it has no completion; add one, or set rollout.on_policy to 1")
    anew = begins_anew(prompt)
    tokenized = model.vocabulary.encode(prompt.completion, at_start=anew)
    stopped = tokenized.ids.size < max_new_tokens
    if not stopped:
        tokenized = model.vocabulary.decode(tokenized.ids[:max_new_tokens], at_start=anew)
    stop = np.array(model.vocabulary.stop_ids[:1], np.int32)
    ids = np.concatenate((tokenized.ids, stop)) if stopped else tokenized.ids
    encoded = encode_prompt(model, prompt, ids.size)
    return Rollout(prompt, encoded, ids, np.zeros(ids.size, np.float32), tokenized, stopped, sampled=False)


def advantages(rewards: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    """Reward less its group's mean, over the group's standard deviation; 0 where a group's rewards are all equal.

    Groups are runs of ``group`` rollouts of one prompt.

    Source: Shao et al. 2402.03300, section 4.1.2.
    """
    grouped = rewards.reshape(-1, group)
    deviation = grouped.std(axis=1, keepdims=True)
    centred = grouped - grouped.mean(axis=1, keepdims=True)
    return np.where(deviation > 1e-8, centred / np.maximum(deviation, 1e-8), 0.0).reshape(-1)


class ReadsPrompts(Protocol):
    """A side that reads prompts up to so many tokens with their completions, as far as that is known."""

    @property
    def name(self) -> str:
        """What to call it."""
        ...

    @property
    def context(self) -> int | None:
        """Longest sequence in tokens."""
        ...

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids that it reads before a completion."""
        ...


def encode_prompt(model: ReadsPrompts, prompt: Prompt, room: int) -> tuple[int, ...]:
    """The ids that the model reads before a completion of up to ``room`` tokens.

    Raises:
        DataError: they leave no such room in the model's context, or there is none; the message names the prompt's key.
    """
    try:
        ids = model.prompt_ids(prompt)
    except DataError as error:
        raise DataError(f"prompt {prompt.key}: {error}") from error
    if not ids:
        raise DataError(
            f"prompt {prompt.key}: it is empty for model {model.name}, which has no token to begin a text with"
        )
    if model.context is not None and len(ids) + room > model.context:
        raise DataError(
            f"prompt {prompt.key}: {len(ids)} tokens and {room} new ones do not fit the {model.context} tokens of "
            f"model {model.name}; shorten the prompt or lower rollout.max_new_tokens"
        )
    return tuple(ids)


def _generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[tuple[int, ...]],
) -> list[tuple[NDArray[np.int32], NDArray[np.float32], bool]]:
    uniform = np.stack([np.random.default_rng(seed).random(sampling.max_new_tokens) for seed in seeds])
    draw = _Draw(torch.from_numpy(uniform).to(model.device), max(map(len, prompts)), sampling)
    stops = list(model.vocabulary.stop_ids)
    drawn = generate(model.lm, prompts, sampling.max_new_tokens, stops, model.pad_id, draw).cpu().numpy()
    logp = torch.stack(draw.logp, dim=1).float().cpu().numpy()
    is_stop = np.isin(drawn, stops)
    results = []
    for b in range(len(prompts)):
        stopped = bool(is_stop[b].any())
        n = int(is_stop[b].argmax()) + 1 if stopped else drawn.shape[1]
        results.append((drawn[b, :n].astype(np.int32), logp[b, :n], stopped))
    return results


class _Draw(LogitsProcessor):
    """Draws each sequence's next token from its own uniform number, and keeps the log-probability it was drawn with.

    Everything but the drawn token is masked, so that a greedy ``generate`` takes it; no [steps, V] tensor is kept.
    """

    def __init__(self, uniform: Tensor, prompt_length: int, sampling: Sampling) -> None:
        self.uniform, self.prompt_length, self.sampling = uniform, prompt_length, sampling
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        logits = scores.float()
        if self.sampling.temperature == 0.0:
            token = logits.argmax(-1, keepdim=True)
            logp = torch.zeros_like(logits[:, 0])
        else:
            logits = logits / self.sampling.temperature
            if self.sampling.top_p < 1.0:
                logits = nucleus(logits, self.sampling.top_p)
            prob = torch.softmax(logits, dim=-1)
            cumulative = torch.cumsum(prob, dim=-1, dtype=torch.float64)
            # The last positive entry is the end: a number that rounds to the total must not fall on a masked token.
            point = self.uniform[:, step : step + 1] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, point, right=True).clamp(max=logits.shape[1] - 1)
            token = torch.where(prob.gather(1, token) > 0, token, prob.argmax(-1, keepdim=True))
            logp = torch.log_softmax(logits, dim=-1).gather(1, token)[:, 0]
        self.logp.append(logp)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """``logits`` with −inf outside the smallest set of likeliest tokens whose probability reaches ``top_p``.

    Source: Holtzman et al. 1904.09751, section 3.1.
    """
    ordered, index = torch.sort(logits, dim=-1, descending=True)
    prob = torch.softmax(ordered, dim=-1)
    outside = torch.cumsum(prob, dim=-1) - prob >= top_p
    return logits.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), -torch.inf)


Seed = tuple[int, ...]


def rollout_seeds(seed: int, step: int, numbers: Sequence[int]) -> list[Seed]:
    """The random stream of each rollout: a function of the run's seed, the step, and the rollout's number in it."""
    return [(seed, step, int(n)) for n in numbers]
