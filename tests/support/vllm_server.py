"""A vLLM server in this process: it draws with a tiny model, takes new weights as vLLM does, and fails when told to."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import torch
from safetensors.torch import load_file
from support.server import _Http, answer
from torch import Tensor, nn

from gold.models.adapters import MergedWeights, load_adapters
from gold.models.language_model import LanguageModel
from gold.rollout.engine import Request
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.rollout.vllm import VLLMEngine

Faults = Callable[[str, int], str | None]
"""The fault of the n-th request for a path, from 0; None for none."""
LASTING = ("raw", "stale head", "unreset cache", "old weights", "other bos", "no transfer")
"""Faults of a whole server, in ``flaws``."""


class VLLMServer:
    """Serves while it is entered. ``calls`` are the requests in order, with their bodies; ``weights`` the current ones.

    As on vLLM's CPU build the output matrix is its own, and what was computed for a prompt is kept until the cache is
    reset.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        faults: Faults = lambda path, n: None,
        flaws: Sequence[str] = (),
        context: int = 64,
        name: str = "student",
        scale_out: bool = True,
        dev_mode: bool = True,
        versions: bool = True,
        port: int = 0,
    ) -> None:
        lm = copy.deepcopy(model.lm)
        lm.lm_head.weight = nn.Parameter(lm.lm_head.weight.detach().clone())
        self.model = LanguageModel("served", lm, model.tokenizer, model.vocabulary)
        self.faults, self.flaws, self.context, self.name = faults, set(flaws), context, name
        self.scale_out, self.dev_mode, self.versions = scale_out, dev_mode, versions
        self.calls: list[tuple[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.version, self.paused, self.updating, self.dirty, self.asleep = "default", False, False, False, 0
        self.violations: list[str] = []
        self.names: list[set[str]] = []
        """The names of the weights of each update."""
        self.wire: list[Tensor] = []
        """What arrives by GPU during an update."""
        self.adapter: dict[str, Tensor] | None = None
        self._cache: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", port), self._handler())
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.model.lm.state_dict().items()}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers["content-length"] or 0))
                outer.serve(self, self.path, None)

            def do_POST(self) -> None:
                outer.serve(self, self.path, json.loads(self.rfile.read(int(self.headers["content-length"]))))

        return Handler

    def serve(self, handler: BaseHTTPRequestHandler, url: str, body: Any) -> None:
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        with self._lock:
            number = self.counts[path]
            self.counts[path] += 1
            self.calls.append((url, body))
        fault = self.faults(path, number)
        if fault == "refused":
            handler.close_connection = True
            return None
        if (self.paused or self.dirty or self.asleep) and path == "/inference/v1/generate":
            self.violations.append(
                f"drawn while paused {self.paused}, dirty {self.dirty}, asleep {self.asleep}"
            )
        if fault == "hung":
            time.sleep(0.2)
        if path == "/v1/models":
            return answer(handler, 200, {"data": [{"id": self.name, "max_model_len": self.context}]})
        if path == "/inference/v1/generate":
            if not self.scale_out:
                return answer(handler, 403, {"error": {"message": "scale-out endpoints are disabled"}})
            if self._read_at_each_draw and not self._read_at_each_draw.exists():
                return answer(handler, 500, {"error": {"message": "EngineDeadError"}})
            with self._lock:
                return answer(handler, 200, self._drawn(body, fault))
        if path == "/v1/unload_lora_adapter":
            found, self.adapter = self.adapter is not None, None
            return answer(
                handler, 200 if found else 404, {} if found else {"error": {"message": "cannot be found"}}
            )
        if path == "/v1/load_lora_adapter":
            return answer(handler, 404, {}) if fault == "404" else self._load_adapter(handler, body)
        if not self.dev_mode:
            return answer(handler, 404, {"detail": "Not Found"})
        try:
            with self._lock:
                return answer(handler, 200, self._control(path, query, body, fault))
        except RuntimeError as error:
            return answer(handler, 500, {"error": {"message": str(error)}})

    def _control(
        self, path: str, query: dict[str, list[str]], body: Any, fault: str | None
    ) -> dict[str, Any]:
        """vLLM's calls for weights and memory."""
        if fault == "500" and path != "/update_weights":
            raise RuntimeError("CUDA error")
        if path == "/init_weight_transfer_engine" and "no transfer" in self.flaws:
            raise RuntimeError("Weight transfer not configured. Please set weight_transfer_config")
        if path in ("/pause", "/resume"):
            self.paused = path == "/pause"
        elif path == "/start_weight_update":
            if self.updating:
                raise RuntimeError("start_weight_update called while a weight update is already active")
            self.updating = self.dirty = True
        elif path == "/update_weights":
            self._update(body["update_info"], fault)
        elif path == "/finish_weight_update":
            if not self.updating:
                raise RuntimeError("finish_weight_update called without a matching start_weight_update")
            self.updating = self.dirty = False
            self.version = body.get("weight_version") or self.version
        elif path == "/reset_prefix_cache":
            if fault == "held":
                return {"success": False}
            if "unreset cache" not in self.flaws:
                self._cache.clear()
            return {"success": True}
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/get_world_size":
            return {"world_size": 2}
        elif path == "/sleep":
            self.asleep = int(query["level"][0])
            if self.asleep == 2:
                for weight in self.model.lm.parameters():
                    weight.data.zero_()
        elif path == "/wake_up" and query.get("tags") != ["weights"]:
            self.asleep = 0
        return {"message": "done"}

    def _update(self, info: dict[str, Any], fault: str | None) -> None:
        if not self.updating:
            raise RuntimeError("start_weight_update must be called before update_weights")
        if "path" in info:
            weights = load_file(info["path"])
            assert Path(info["path"]).stat().st_mode & 0o777 == 0o600
        else:
            weights = dict(zip(info["names"], self.wire, strict=True))
            kinds = [str(weight.dtype).rpartition(".")[2] for weight in self.wire]
            assert (info["dtype_names"], info["shapes"]) == (
                kinds,
                [list(weight.shape) for weight in self.wire],
            )
        self.names.append(set(weights))
        weights = _of_checkpoint(self.model.lm, weights)
        names = list(weights)
        if fault == "500":
            names = names[: len(names) // 2]
        if "stale head" in self.flaws:
            names.remove("lm_head.weight")
        if "old weights" not in self.flaws:
            self.model.lm.load_state_dict({name: weights[name] for name in names}, strict=False)
        if fault == "500":
            self.updating = False
            raise RuntimeError("EngineCore encountered an issue")

    adapter_config: Any = None
    _read_at_each_draw: Path | None = None
    _adapted: dict[str, Tensor] | None = None

    def _load_adapter(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if self.adapter is not None and not body.get("load_inplace"):
            return answer(handler, 400, {"error": {"message": "The lora adapter has already been loaded."}})
        self._read_at_each_draw = Path(body["lora_path"]) if body.get("load_inplace") else None
        self.adapter = load_file(Path(body["lora_path"]) / "adapter_model.safetensors")
        self.adapter_config = json.loads((Path(body["lora_path"]) / "adapter_config.json").read_text())
        if "peft_type" in self.adapter_config:
            below = copy.deepcopy(self.model.lm)
            self._adapted = dict(MergedWeights(load_adapters(below, body["lora_path"], "student", "student")))
        data = b"Success: LoRA adapter 'gold-adapter' added successfully."
        handler.send_response(200)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
        return None

    def _drawn(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        prompt, params = tuple(body["token_ids"]), body["sampling_params"]
        read = (prompt[0], *prompt) if "other bos" in self.flaws else prompt
        current = self.weights
        used = self._adapted if body["model"] != self.name and self._adapted is not None else current
        cached = self._cache.setdefault(read, used)
        self.model.lm.load_state_dict(cached)
        stops = tuple(params["stop_token_ids"])
        sampling = Sampling(params["max_tokens"], params["temperature"], params["top_p"])
        request = Request(read, (params["seed"],), sampling, stops)
        (drawn,) = HuggingFaceEngine(self.model).generate([request])
        logprobs = self._logprobs(read, drawn.ids, 1.0 if "raw" in self.flaws else sampling.temperature)
        self.model.lm.load_state_dict(current)
        ids = drawn.ids.tolist()
        if fault == "short":
            ids = ids[: len(ids) // 2]
        entries = [
            {"token_id": i + (fault == "other ids"), "logprob": value}
            for i, value in zip(ids, logprobs, strict=False)
        ]
        if fault == "no number":
            entries[0]["logprob"] = float("nan")
        choice: dict[str, Any] = {
            "index": 0,
            "token_ids": ids,
            "logprobs": {"content": entries},
            "finish_reason": "abort" if fault == "abort" else "stop" if drawn.stopped else "length",
            "weight_versions": [{"version": self.version, "start": 0, "end": len(ids)}]
            if self.versions
            else None,
        }
        if fault == "restarted":
            choice["weight_versions"] = [{"version": "default", "start": 0, "end": len(ids)}]
        return {"choices": [choice], "prompt_token_ids": list(prompt)}

    @torch.no_grad()
    def _logprobs(self, prompt: Sequence[int], ids: Any, temperature: float) -> list[float]:
        logits = (
            self.model.lm(torch.tensor([[*prompt, *ids.tolist()]])).logits[0, len(prompt) - 1 : -1].double()
        )
        logp = torch.log_softmax(logits / (temperature or 1.0), -1)
        values: list[float] = logp.gather(1, torch.from_numpy(ids).long()[:, None])[:, 0].tolist()
        return values


def engine_on(server: VLLMServer, **options: Any) -> VLLMEngine:
    """An engine that waits next to nothing before it asks again."""
    engine = VLLMEngine(server.url, **{"retries": 3, "timeout_s": 20.0} | options)
    engine.server.first_wait_s = 0.002
    return engine


def _of_checkpoint(lm: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the model's names, as transformers reads them from a checkpoint."""
    if weights.keys() <= lm.state_dict().keys():
        return weights
    read = type(lm).from_pretrained(None, config=lm.config, state_dict=weights)  # type: ignore[attr-defined]
    return dict(read.state_dict())
