"""The rollout engine that draws from a vLLM server and keeps the student's weights there current."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import secrets
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.distributed.tensor import DTensor

from gold.data import Prompt
from gold.errors import EngineError, GoldError
from gold.http import BadAnswerError, Call, RefusedError, Server, environment_key, shown
from gold.models.language_model import LanguageModel, without_adapters
from gold.models.saved_names import saved_weights
from gold.rollout.engine import Generation, Request
from gold.rollout.stopping import length_and_stop
from gold.rollout.types import Seed
from gold.rollout.vllm_probe import probe
from gold.rollout.weight_transfer import SyncClient, WeightTransfer, save, transfer_of

logger = logging.getLogger(__name__)

ADAPTER = "gold-adapter"
"""The name of a student's adapter on the server."""
_TOKEN_BYTES = 512
"""More than an answer needs for each of its tokens."""


class VLLMEngine:
    """A rollout engine on a vLLM server (0.32 or later), which is started as docs/engines.md says.

    ``model`` is the model's name on the server, ``transfer`` the way of its weights: ``file`` (with ``folder``),
    ``nccl``, ``ipc``, or an object with that interface. A request has ``timeout_s``, waiting included, and is repeated
    up to ``retries`` times; a push that fails is repeated as a whole as often. ``key_env`` names the environment
    variable with the server's key. ``sleep``: on a GPU that is shared with the training, free its memory after each
    ``generate``: 1 moves the weights to the CPU, 2 drops them, and pushes them again. ``adapters``: push the adapter of
    a student that has one alone; the server then has the weights below it. ``pushes``: whether this process is the one
    of several that pushes.

    Raises:
        ConfigError: an invalid URL, or a variable that is not set.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str = "student",
        transfer: Literal["file", "nccl", "ipc"] | WeightTransfer = "file",
        folder: str | Path | None = None,
        concurrency: int = 256,
        timeout_s: float = 600.0,
        retries: int = 3,
        key_env: str | None = None,
        sleep: Literal[0, 1, 2] = 0,
        adapters: bool = False,
        pushes: bool = True,
    ) -> None:
        key = environment_key(key_env, "rollout.engine.vllm.key_env")
        self.server = Server(url, concurrency, timeout_s, retries, key, error=EngineError)
        self.model, self.sleep, self.adapters, self.pushes = model, sleep, adapters, pushes
        self._folder = folder
        self.transfer = transfer_of(transfer, folder) if isinstance(transfer, str) else transfer
        self.client = SyncClient(self.server, self.transfer.backend)
        self.version = -1
        self.own_weights = True
        self.where = f"server {url}"
        self.context: int | None = None
        """The longest sequence of the server in tokens, once it is known."""
        self.push_s = 0.0
        """Seconds that the last push took."""
        self._connected = False
        self._asleep = 0
        self._run = secrets.token_hex(4)
        self._adapter = False
        self._lm: Any = None
        self._pushed: Mapping[str, Tensor] = {}

    # drawing

    @property
    def description(self) -> str:
        """See ``DescribedEngine``."""
        return f"vLLM, {self.where}"

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """See ``RolloutEngine.generate``.

        Raises:
            EngineError: the server does not answer, or not as asked; it has other weights than the last ones pushed, or
                a shorter context than a request needs.
        """
        if self.version < 0:
            raise EngineError(f"{self.where}: it has no weights of this run: no push has succeeded")
        if not requests:
            return []
        self._wake()
        for request in requests:
            self.check_length(len(request.prompt_ids), request.sampling.max_new_tokens)
        # Longest first, so that the last running requests are short.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))
        answers = self.server.ask([self._call(requests[i]) for i in order])
        generations = dict(zip(order, answers, strict=True))
        if self.sleep:
            level = 1 if self._adapter else self.sleep  # the weights below an adapter are not pushed
            self.client.post(f"/sleep?level={level}&mode=wait")
            self._asleep = level
        return [generations[i] for i in range(len(requests))]

    def check_length(self, prompt: int, new: int) -> None:
        """See ``ProbedEngine.check_length``."""
        context = self.learn_context()
        if prompt + new > context:  # vLLM would draw fewer without a word
            raise EngineError(
                f"{self.where}: {prompt} tokens and {new} new ones do not fit its {context} tokens; "
                f"start it with --max-model-len {prompt + new} or more"
            )

    def learn_context(self) -> int:
        """The server's context length in tokens.

        Raises:
            EngineError: it does not answer, or serves another model.
        """
        if self.context is None:
            (served,) = self.server.ask([Call("/v1/models", {}, _contexts, method="GET")])
            if self.model not in served:
                raise EngineError(
                    f"{self.where}: it serves {', '.join(served) or 'nothing'}, not {self.model}; start it "
                    f"with --served-model-name {self.model}, or name the model in rollout.engine.vllm.model"
                )
            self.context = served[self.model]
        return self.context

    def _call(self, request: Request) -> Call:
        body = {
            "model": ADAPTER if self._adapter else self.model,
            "token_ids": list(request.prompt_ids),
            "return_token_ids": True,
            "sampling_params": sampling_params(request),
        }
        advice = {
            403: "start it with --enable-scale-out",
            404: f"start it with --enable-scale-out and --served-model-name {self.model}",
        }
        room = 2**16 + _TOKEN_BYTES * (request.sampling.max_new_tokens + len(request.prompt_ids))
        return Call("/inference/v1/generate", body, partial(self._read, request), room, advice=advice)

    def _read(self, request: Request, answer: Any) -> Generation:
        """The drawn ids of an answer.

        Raises:
            BadAnswerError: the answer is not to this request.
            EngineError: it was drawn from other weights.
        """
        (choice,) = answer["choices"]
        if (prompt := answer.get("prompt_token_ids")) is not None and prompt != list(request.prompt_ids):
            raise BadAnswerError("answers to other prompt ids than those sent")
        ids, logprobs, stopped = _drawn(choice, request)
        if request.sampling.temperature == 0.0:
            logprobs = np.zeros_like(logprobs)
        return Generation(ids, logprobs, stopped, self._oldest_version(choice, len(ids)))

    def _oldest_version(self, choice: Mapping[str, Any], size: int) -> int:
        """The oldest version of the weights that wrote a token."""
        spans = choice.get("weight_versions")
        if not spans:
            raise EngineError(
                f"{self.where}: it does not say which weights wrote a text; it takes vLLM 0.32 or later"
            )
        labels = {str(span["version"]) for span in spans}
        own = self._label(self.version)
        others = {label for label in labels if label.rpartition(":")[2] != str(self.version)}
        if others or (self.pushes and labels != {own}):
            raise EngineError(
                f"{self.where}: it drew from weights {', '.join(sorted(labels))} and not from {own}: it was "
                "started again, or another run pushes to it; give each run its own server and resume"
            )
        return self.version

    def _label(self, version: int) -> str:
        return f"{self._run}:{version}"

    # weights

    def push(self, weights: Mapping[str, Tensor], version: int) -> None:
        """See ``RolloutEngine.push``; a push that fails is repeated as a whole, and nothing is drawn in between.

        Raises:
            EngineError: no attempt succeeds; the server stays paused, until a later push succeeds.
        """
        self.version = -1
        if self.pushes:
            self._insist(partial(self._update, weights, self._label(version)))
        self._adapter = False
        self._pushed = weights if self.sleep == 2 else {}
        self.version = version

    def push_adapter(self, weights: Mapping[str, Tensor], version: int, config: Mapping[str, Any]) -> None:
        """See ``AdapterEngine.push_adapter``.

        Raises:
            EngineError: as for ``push``.
        """
        self.version = -1
        if self.pushes:
            with tempfile.TemporaryDirectory(prefix="gold-adapter-", dir=self._folder) as name:
                folder = Path(name)
                save(weights, folder / "adapter_model.safetensors")
                (folder / "adapter_config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
                self._insist(partial(self._load_adapter, folder, self._label(version)))
        self._adapter = True
        self.version = version

    def _insist(self, attempt: Any) -> None:
        started = time.perf_counter()
        server = self.server
        for number in range(server.retries + 1):
            try:
                attempt()
                break
            except EngineError as error:
                self._connected = False
                if number == server.retries or isinstance(error, RefusedError):
                    raise
                server.repeated += 1
                logger.info("push %d of %d failed: %s", number + 1, server.retries + 1, error)
                time.sleep(server.first_wait_s * 2**number)
        self.push_s = time.perf_counter() - started

    def _update(self, weights: Mapping[str, Tensor], label: str) -> None:
        client = self.client
        if not self._connected:
            self._disconnect()
            self.transfer.connect(client)
            self._connected = True
        if self._asleep:
            client.post("/wake_up?tags=weights")
        client.post("/pause?mode=wait")
        client.weight_version = label
        self.transfer.send(client, weights if self._lm is None else saved_weights(self._lm, weights))
        if self._asleep:
            client.post("/wake_up?tags=kv_cache")
            self._asleep = 0
        self._resume()

    def _load_adapter(self, folder: Path, label: str) -> None:
        self._wake()
        self.client.post("/pause?mode=wait")
        # Not in place of the last one (load_inplace): vLLM would then read the folder again for every token.
        with contextlib.suppress(RefusedError):  # there is none
            self.server.ask([Call("/v1/unload_lora_adapter", {"lora_name": ADAPTER}, str, as_text=True)])
        body = {"lora_name": ADAPTER, "lora_path": str(folder)}
        advice = {
            404: "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
        }
        call = Call("/v1/load_lora_adapter", body, str, advice=advice, as_text=True, retried=False)
        self.server.ask([call])
        self.client.post("/update_weight_version", new_version=label)
        self._resume()

    def _resume(self) -> None:
        """Forgets what the old weights computed for prompts, and goes on."""
        answer = self.client.post("/reset_prefix_cache")
        if not (isinstance(answer, dict) and answer.get("success") is True):
            raise EngineError(
                f"{self.where}: its prefix cache was not reset; is anything else drawing from it?"
            )
        self.client.post("/resume")

    def _wake(self) -> None:
        if self._asleep == 2:
            self.push(self._pushed, self.version)
        elif self._asleep:
            self.client.post("/wake_up")
            self._asleep = 0

    def _disconnect(self) -> None:
        try:
            self.transfer.disconnect(self.client)
        except GoldError as error:
            logger.info("%s", error)

    # before a run

    def probe(
        self,
        model: LanguageModel,
        prompts: Sequence[Prompt],
        weights: Mapping[str, Tensor],
        version: int,
        adapter: Mapping[str, Any] | None = None,
    ) -> None:
        """Checks by draws that the server does what a run relies on, and leaves it with ``weights``; see
        ``gold.rollout.vllm_probe.probe``. Of several processes the one that pushes does it. A sharded student cannot be
        recomputed for it: then the weights are pushed only. From then on they are pushed by the names that they have in
        a checkpoint of this model, which vLLM's loaders read."""
        self._lm = without_adapters(model.lm)
        push = partial(self.push_adapter, config=adapter) if adapter is not None else self.push
        sharded = any(isinstance(weight, DTensor) for weight in model.lm.parameters())
        if self.pushes and not sharded:
            probe(self, push, model, prompts, weights, version, alone=adapter is not None)
            return
        push(weights, version)
        if self.pushes:
            logger.warning("%s is not tried, since the student is sharded: gold doctor tries it", self.where)

    def close(self) -> None:
        """Disconnects; the server goes on with the last weights."""
        if self._connected:
            self._disconnect()
            self._connected = False


def sampling_params(request: Request) -> dict[str, Any]:
    """vLLM's sampling parameters of a request; all that a checkpoint's generation settings could change are given."""
    sampling = request.sampling
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "max_tokens": sampling.max_new_tokens,
        "ignore_eos": True,  # stop at these ids alone
        "stop_token_ids": list(request.stop_ids),
        "seed": seed_number(request.seed),
        "logprobs": 0,
        "detokenize": False,
    }


def seed_number(seed: Seed) -> int:
    """The seed of a request as one number below 2^63."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _drawn(choice: Mapping[str, Any], request: Request) -> tuple[np.ndarray, np.ndarray, bool]:
    """Ids, log-probabilities, and whether the text stopped."""
    ids, entries, reason = choice["token_ids"], choice["logprobs"]["content"], choice["finish_reason"]
    if reason not in ("stop", "length"):
        raise BadAnswerError(f"ends a text with {shown(reason)}")
    if [entry["token_id"] for entry in entries] != ids:
        raise BadAnswerError("gives log-probabilities of other tokens than those drawn")
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise BadAnswerError("draws what is no token id")
    drawn, most = np.array(ids, np.int32), request.sampling.max_new_tokens
    length, stopped = length_and_stop(drawn, request.stop_ids)
    if length < len(ids):
        raise BadAnswerError("goes on after a stop token")
    if length > most or (length < most and not stopped):
        raise BadAnswerError(f"ends a text after {length} of {most} tokens without a stop token")
    logprobs = [entry["logprob"] for entry in entries]
    if not all(isinstance(logp, int | float) and math.isfinite(logp) and logp <= 1e-3 for logp in logprobs):
        raise BadAnswerError("gives a log-probability that is none")
    return drawn, np.minimum(np.array(logprobs, np.float32), 0.0), stopped


def _contexts(answer: Any) -> dict[str, int]:
    """The context length of each served model."""
    # An adapter has no context of its own.
    return {str(model["id"]): int(model.get("max_model_len") or 2**31) for model in answer["data"]}
