"""What a vLLM server must do for a run, tried by draws: each failure is one line that names the setting to change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from gold.data import Prompt
from gold.errors import DataError, EngineError
from gold.models.language_model import LanguageModel, without_adapters
from gold.rollout.engine import Generation, Request, RolloutEngine
from gold.rollout.prompts import encode_prompt
from gold.rollout.types import Sampling

_TOKENS = 16
"""Tokens drawn in each trial."""
_PROMPT_TOKENS = 200
"""Above the block size of vLLM's prefix cache, which is 128 on a CPU."""
_SCALE = 1.2
_MOST_GAP_NATS = 0.25
"""Fail above: the mean distance of log-probabilities on the server from recomputed ones. A server in bfloat16 was at
0.034 from float32 weights, and at 0.11 after training steps that bfloat16 rounds away."""


class Server(RolloutEngine, Protocol):
    """What the probe uses of an engine on a server."""

    where: str
    """The server in messages."""

    def learn_context(self) -> int:
        """Its context length in tokens."""
        ...


def probe(
    engine: Server,
    push: Callable[[Mapping[str, Tensor], int], None],
    model: LanguageModel,
    prompts: Sequence[Prompt],
    weights: Mapping[str, Tensor],
    version: int,
    *,
    alone: bool = False,
) -> None:
    """Checks that the server takes ids as they are, stops where it is told to, gives log-probabilities of the
    distribution that it samples from, and has exactly the weights that were pushed last; it then has ``weights``.

    Visibly disturbed weights are pushed in between: a stale output matrix, or a prefix cache that was not reset, hides
    in the rounding of bfloat16 while weights change little. ``alone``: ``weights`` are an adapter's, by peft's names.

    Raises:
        EngineError: it does not; one line.
    """
    trials = _Trials.of(engine, model, prompts, alone)
    push(weights, version)
    trials.check_weights(weights)
    trials.check_stops()
    trials.check_sampling(weights)
    changed = disturbed_adapter(weights) if alone else disturbed(model, weights)
    push(changed, version)
    trials.check_new(changed, weights)
    push(weights, version)
    trials.check_weights(weights)


def disturbed_adapter(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter with every other row of each B, which is 0 at first, raised by a tenth."""
    changed = {name: weight.detach().clone() for name, weight in weights.items()}
    for name, weight in changed.items():
        if ".lora_B." in name or ".lora_embedding_B" in name:
            weight[::2] += 0.1
    return changed


def disturbed(model: LanguageModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with every other row of the input embeddings and of the output matrix, and all of a middle layer,
    scaled by 1.2."""
    lm = without_adapters(model.lm)
    matrices = _names_of(lm, lm.get_input_embeddings(), weights) | _head_names(lm, weights)
    layers = sorted({number for name in weights for number in _numbers(name)})
    middle = layers[len(layers) // 2] if layers else -1
    changed = dict(weights)
    for name, weight in changed.items():
        if name in matrices:
            changed[name] = weight.detach().clone()
            changed[name][::2] *= _SCALE
        elif middle in _numbers(name) and weight.is_floating_point():
            changed[name] = weight.detach() * _SCALE
    return changed


def _plain(name: str) -> str:
    """The name of a weight in a model without adapters."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _numbers(name: str) -> list[int]:
    """The number of the layer in a weight's name, if there is one."""
    return [int(part) for part in name.split(".") if part.isdecimal()][:1]


@dataclass(frozen=True)
class _Trials:
    """The same few draws, repeated for several weights. No earlier draw has begun as ``fresh`` does, so that nothing of
    it is in the server's prefix cache."""

    engine: Server
    model: LanguageModel
    prompt: tuple[int, ...]
    fresh: tuple[int, ...]
    alone: bool
    """Whether weights are an adapter's alone."""

    @classmethod
    def of(cls, engine: Server, model: LanguageModel, prompts: Sequence[Prompt], alone: bool) -> _Trials:
        """Prompts of a run, one after the other, as far as both contexts allow."""
        size = min(_PROMPT_TOKENS, min(engine.learn_context(), model.context) - _TOKENS)
        if size < 2:
            raise EngineError(
                f"{engine.where}: its sequences have {engine.learn_context()} tokens; start it with --max-model-len "
                f"{2 * _TOKENS} or more"
            )
        found = model.vocabulary.encode("a b").ids.tolist()
        for prompt in prompts:
            with contextlib.suppress(DataError):
                found += encode_prompt(model, prompt, 1)
            if len(found) >= size:
                break
        while len(found) < size:
            found += found
        return cls(engine, model, tuple(found[:size]), tuple(reversed(found[:size])), alone)

    def draw(
        self, prompt: tuple[int, ...], temperature: float = 1.0, stops: Sequence[int] = ()
    ) -> Generation:
        """A completion of a prompt."""
        sampling = Sampling(temperature=temperature, max_new_tokens=_TOKENS)
        return self.engine.generate([Request(prompt, (0, 0), sampling, tuple(stops))])[0]

    @torch.no_grad()
    def gap(
        self,
        drawn: Generation,
        weights: Mapping[str, Tensor],
        prompt: tuple[int, ...],
        temperature: float = 1.0,
    ) -> float:
        """Mean distance, in nats, of the drawn tokens' log-probabilities from those of the student with ``weights``."""
        text = torch.tensor([[*prompt, *drawn.ids.tolist()]], device=self.model.device)
        lm, used, context = self._own(weights)
        with context:
            # Not tied: a server may have one of the names of a tied matrix only.
            output = functional_call(lm, used, (), {"input_ids": text, "use_cache": False}, tie_weights=False)
        logits = output.logits
        logp = torch.log_softmax(logits[0, len(prompt) - 1 : -1].double() / temperature, -1)
        own = logp.gather(1, text[0, len(prompt) :, None])[:, 0].cpu().numpy()
        return float(np.abs(own - drawn.logprobs).mean())

    def _own(
        self, weights: Mapping[str, Tensor]
    ) -> tuple[Any, dict[str, Tensor], contextlib.AbstractContextManager[Any]]:
        """The module that computes with ``weights``, these by its names, and the context in which it does."""
        lm: Any = self.model.lm
        if self.alone:
            ending = f".{lm.active_adapter}.weight"
            names = {name.replace(ending, ".weight"): name for name in lm.state_dict()}
            return lm, {names[name]: weight for name, weight in weights.items()}, contextlib.nullcontext()
        base = without_adapters(lm)
        # Adapters are merged into ``weights``; the layers below them have these names.
        used = {name: weights[plain] for name in base.state_dict() if (plain := _plain(name)) in weights}
        return base, used, contextlib.nullcontext() if base is lm else lm.disable_adapter()

    def check_stops(self) -> None:
        """The likeliest first token ends a text that is told to stop there, and no other text."""
        first = int(self.draw(self.prompt, temperature=0.0).ids[0])
        short = self.draw(self.prompt, temperature=0.0, stops=(first,))
        if short.ids.tolist() != [first] or not short.stopped:
            raise EngineError(
                f"{self.engine.where}: it does not stop at the token that it is told to stop at; start it with "
                "--generation-config vllm"
            )

    def check_sampling(self, weights: Mapping[str, Tensor]) -> None:
        """Log-probabilities are those of the distribution that is sampled from."""
        drawn = self.draw(self.prompt, temperature=0.5)
        processed, raw = (self.gap(drawn, weights, self.prompt, temperature) for temperature in (0.5, 1.0))
        if raw < 0.5 * processed:
            raise EngineError(
                f"{self.engine.where}: its log-probabilities ignore the temperature; start it with --logprobs-mode "
                "processed_logprobs"
            )

    def check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Log-probabilities are those of these weights."""
        gap = self.gap(self.draw(self.prompt), weights, self.prompt)
        if not gap <= _MOST_GAP_NATS:
            raise EngineError(
                f"{self.engine.where}: its log-probabilities are {gap:.2g} nats a token off those of the weights that "
                "were pushed; start it with the student's model in --model, not quantised, and a --dtype of 16 bits or "
                "more"
            )

    def check_new(self, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
        """Log-probabilities are those of the new weights: of all of them, and for prompts that were read before."""
        drawn = self.draw(self.fresh)
        head = () if self.alone else _head_names(without_adapters(self.model.lm), old)
        old_head = {name: old[name] for name in head}
        gap, kept, stale = (self.gap(drawn, w, self.fresh) for w in (new, old, {**new, **old_head}))
        if stale < 0.5 * gap and stale < kept:
            raise EngineError(
                f"{self.engine.where}: it keeps the old output matrix when new weights are pushed; start it without "
                "--quantization, and transfer weights with rollout.engine.vllm.transfer: file"
            )
        if kept < gap or not gap <= _MOST_GAP_NATS:
            raise EngineError(
                f"{self.engine.where}: after new weights were pushed its log-probabilities are {gap:.2g} nats a token "
                f"off those, and {kept:.2g} off the old ones; start it anew, and for this run alone"
            )
        again = self.gap(self.draw(self.prompt), new, self.prompt)
        if again > 3 * gap + 0.02:
            raise EngineError(
                f"{self.engine.where}: its prefix cache keeps what old weights have computed ({again:.2g} nats a token "
                "off); start it with --no-enable-prefix-caching"
            )


def _head_names(lm: Any, weights: Mapping[str, Tensor]) -> set[str]:
    """The names of the output matrix's weights."""
    return _names_of(lm, lm.get_output_embeddings(), weights)


def _names_of(lm: Any, wanted: Any, weights: Mapping[str, Tensor]) -> set[str]:
    """The names of a module's own weights."""
    modules = {name for name, module in lm.named_modules(remove_duplicate=False) if module is wanted}
    return {name for name in weights if name.rpartition(".")[0] in modules}
