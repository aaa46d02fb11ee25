"""The in-process rollout engine: transformers' ``generate`` on the student model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from gold.activity import report
from gold.errors import ModelError
from gold.models.generate import generate
from gold.models.language_model import LanguageModel
from gold.rollout.engine import Generation, Request
from gold.rollout.stopping import length_and_stop
from gold.rollout.types import Sampling
from gold.sections import CompletionSettings


class HuggingFaceEngine:
    """A rollout engine that generates with ``model`` itself, ``batch`` sequences at a time, grouped by prompt length. A
    model that handles padding wrongly gets prompts of equal length, or one at a time (``LanguageModel.generates``)."""

    def __init__(self, model: LanguageModel, batch: int = CompletionSettings().generation_batch_size) -> None:
        self.model, self.batch, self.version = model, batch, 0
        self.own_weights = False

    def push(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Stores the version only: the model is the trained one, so it has the weights already."""
        self.version = version

    def close(self) -> None:
        """Does nothing: the engine does not own the model."""

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """See ``RolloutEngine.generate``.

        Raises:
            ModelError: the model does not generate correctly; see ``LanguageModel.generation_error``.
        """
        model = self.model
        if model.generation_error:
            raise ModelError(
                f"model {model.name}: it can score texts as a teacher, but not generate: {model.generation_error}"
            )
        generations: dict[int, Generation] = {}
        was_training = model.lm.training
        model.lm.eval()
        try:
            for chosen in self._batches(requests):
                progress = _Progress(
                    len(generations), len(requests), sum(g.ids.size for g in generations.values())
                )
                drawn = _generate(model, [requests[i] for i in chosen], progress)
                generations.update(
                    zip(chosen, (Generation(*each, self.version) for each in drawn), strict=True)
                )
        finally:
            model.lm.train(was_training)
        return [generations[i] for i in range(len(requests))]

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of the requests that are generated together."""
        size = 1 if self.model.generates == "one prompt" else self.batch
        padded = self.model.generates == "any lengths"
        groups: dict[object, list[int]] = {}
        for i in sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i)):
            r = requests[i]
            key = r.sampling, r.stop_ids, None if padded else len(r.prompt_ids)
            groups.setdefault(key, []).append(i)
        return [g[first : first + size] for g in groups.values() for first in range(0, len(g), size)]


@dataclass(frozen=True)
class _Progress:
    """Completions and tokens before a batch, of so many completions."""

    done: int
    total: int
    tokens: int


def _generate(
    model: LanguageModel, requests: Sequence[Request], progress: _Progress
) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    sampling, stops = requests[0].sampling, list(requests[0].stop_ids)
    uniform = np.stack([np.random.default_rng(r.seed).random(sampling.max_new_tokens) for r in requests])
    prompts = [r.prompt_ids for r in requests]
    draw = _Draw(torch.from_numpy(uniform).to(model.device), sampling, progress)
    drawn = generate(model.lm, prompts, sampling.max_new_tokens, stops, model.pad_id, draw).cpu().numpy()
    logp = torch.stack(draw.logp, dim=1).float().cpu().numpy()
    results = []
    for b in range(len(prompts)):
        n, stopped = length_and_stop(drawn[b], stops)
        results.append((drawn[b, :n].astype(np.int32), logp[b, :n], stopped))
    return results


class _Draw(LogitsProcessor):
    """Samples each sequence's next token from its own uniform number, and stores its log-probability.

    It is called once for each step of ``generate``, however prompts are padded. All other tokens are masked, so that a
    greedy ``generate`` selects it; no [steps, V] tensor is stored.
    """

    def __init__(self, uniform: Tensor, sampling: Sampling, progress: _Progress) -> None:
        self.uniform, self.sampling, self.progress = uniform, sampling, progress
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = len(self.logp)
        # What has stopped already counts too, until the batch is complete: to look would wait for the device.
        before = self.progress
        report(before.done, before.total, "completions", before.tokens + step * len(scores))
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
            # Rounding may select a token of probability 0 (masked): then the most probable one is taken.
            point = self.uniform[:, step : step + 1] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, point, right=True).clamp(max=logits.shape[1] - 1)
            token = torch.where(prob.gather(1, token) > 0, token, prob.argmax(-1, keepdim=True))
            logp = torch.log_softmax(logits, dim=-1).gather(1, token)[:, 0]
        self.logp.append(logp)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """``logits`` with −inf outside the smallest set of most probable tokens whose probability reaches ``top_p``.

    Source: Holtzman et al. 1904.09751, section 3.1.
    """
    ordered, index = torch.sort(logits, dim=-1, descending=True)
    prob = torch.softmax(ordered, dim=-1)
    outside = torch.cumsum(prob, dim=-1) - prob >= top_p
    return logits.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), -torch.inf)
