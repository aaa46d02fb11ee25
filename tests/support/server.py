"""A server in this process that scores with a tiny model as vLLM, SGLang and OpenAI's echo do, and fails as told."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from gold.models.language_model import LanguageModel
from gold.teachers import ServedTeacher
from gold.teachers.dialects import DIALECTS

Faults = Callable[[int], str | None]
"""The fault of the n-th request for scores, from 0; None for none."""


APIS = tuple(DIALECTS)
PASSING = (
    "429", "500", "drop", "slow", "truncated", "not JSON", "another shape", "NaN", "positive", "mass", "short",
    "other tokens",
)  # fmt: skip
"""Faults that a second request does not meet."""
OK_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n"


def always(fault: str) -> Faults:
    """Every request fails in this way."""
    return lambda n: fault


class _Http(ThreadingHTTPServer):
    """A client may hang up while it is read or answered: a run that stops does, and its stderr is looked at."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class ModelServer:
    """Serves while it is entered; ``requests`` are the bodies that it got, by path, ``keys`` what it was shown."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        faults: Faults = lambda n: None,
        max_logprobs: int = 10**6,
        key: str | None = None,
        tokenizer: LanguageModel | None = None,
        tls: ssl.SSLContext | None = None,
        port: int = 0,
    ) -> None:
        self.model, self.faults, self.max_logprobs, self.key = model, faults, max_logprobs, key
        self.tokenizer = (tokenizer or model).vocabulary
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.keys: set[str | None] = set()
        self.scored = 0
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", port), self._handler())
        self._http.daemon_threads = True
        self._http.block_on_close = False
        if tls:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True)
        self._scheme = "https" if tls else "http"
        self.chosen = False
        """Whether ``/inference/v1/generate`` is there, which takes ids to be scored at each position."""
        self.forgets = False
        """Whether what was read before without salt is zeros the next time."""
        self._read: set[tuple[int, ...]] = set()
        self.template: list[int] | None = None
        """What ``/tokenize`` makes of messages."""
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def port(self) -> int:
        return int(self._http.server_port)

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._http.server_port}/v1"

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

            def do_POST(self) -> None:
                outer.serve(self, self.path, json.loads(self.rfile.read(int(self.headers["content-length"]))))

        return Handler

    def serve(self, handler: BaseHTTPRequestHandler, path: str, body: dict[str, Any]) -> None:
        if path == "/inference/v1/generate" and not self.chosen:
            return answer(handler, 404, {"detail": "Not Found"})
        scoring = path in ("/v1/completions", "/generate", "/inference/v1/generate")
        with self._lock:
            self.requests.append((path, body))
            self.keys.add(handler.headers.get("authorization"))
            number = self.scored
            self.scored += scoring
        fault = self.faults(number) if scoring else None
        if self.key and handler.headers.get("authorization") != f"Bearer {self.key}":
            return answer(handler, 401, {"error": {"message": "Incorrect API key provided: wrong"}})
        if fault in ("429", "429 for a moment", "429 for long"):
            pause = {"429": "0.01", "429 for a moment": "0.4"}.get(fault, "86400")
            return answer(handler, 429, {"error": {"message": "slow down"}}, {"Retry-After": pause})
        if fault == "500":
            return answer(handler, 500, {"detail": "CUDA error"})
        if fault == "quotes the key":
            return answer(
                handler, 400, {"error": {"message": f"no good: {handler.headers['authorization']}"}}
            )
        if fault == "redirect":
            return answer(handler, 307, {}, {"Location": "https://elsewhere.example/v1/completions"})
        if fault == "drop":
            handler.close_connection = True
            return None
        if fault == "slow":
            time.sleep(0.6)
        if path == "/tokenize" and "messages" in body:
            if self.template is None:
                return answer(handler, 400, {"error": {"message": "no chat template"}})
            return answer(handler, 200, {"tokens": self.template})
        if path == "/tokenize":
            return answer(handler, 200, {"tokens": self.tokenizer.encode(body["prompt"]).ids.tolist()})
        if path == "/generate":
            return answer(handler, 200, self._generate(body, fault), fault=fault)
        chosen = None
        if path == "/inference/v1/generate":
            params = body["sampling_params"]
            chosen = params["prompt_logprob_token_ids"]
            body = body | {"prompt": body["token_ids"]} | params
        elif path != "/v1/completions":
            return answer(handler, 404, {"detail": "Not Found"})
        if body["model"] != "tiny":
            message = f"The model `{body['model']}` does not exist."
            return answer(handler, 404, {"error": {"message": message, "code": 404}})
        if "prompt_logprobs" not in body and not body.get("echo"):
            return answer(handler, 200, self._next(body))
        asked = body["logprobs"] if body.get("echo") else body["prompt_logprobs"]
        if asked > self.max_logprobs:
            message = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {self.max_logprobs}"
            return answer(handler, 400, {"error": {"message": message, "code": 400}})
        told = self._completion(body, fault)
        if chosen is not None:
            told = told["choices"][0] | {"prompt_token_id_logprobs": self._scores(body, chosen, fault)}
        return answer(handler, 200, told, fault=fault)

    def _next(self, body: dict[str, Any]) -> dict[str, Any]:
        """The likeliest tokens behind a prompt, as vLLM names them."""
        with self._lock, torch.no_grad():
            logp = torch.log_softmax(self.model.lm(torch.tensor([body["prompt"]])).logits[0, -1].float(), -1)
        value, index = logp.topk(min(body["logprobs"], self.model.vocabulary.size))
        top = {f"token_id:{i}": v for i, v in zip(index.tolist(), value.tolist(), strict=True)}
        told = {"text": "x", "prompt_token_ids": body["prompt"], "logprobs": {"top_logprobs": [top]}}
        return {"choices": [told]}

    def _scores(self, body: dict[str, Any], chosen: list[Any], fault: str | None) -> str:
        """The log-probabilities of chosen ids, as vLLM sends them."""
        ids, start = body["prompt"], body["prompt_logprob_start"]
        logp = self.logp(ids, fault)[start:]
        told = [[float(row[i]) for i in each] for row, each in zip(logp, chosen, strict=True)]
        file = io.BytesIO()
        np.save(file, np.array(told, np.float32))
        return base64.b64encode(file.getvalue()).decode()

    def logp(self, ids: list[int], fault: str | None) -> torch.Tensor:
        """Log-probabilities of every id after each prefix of ``ids`` but the empty one and the whole."""
        with self._lock, torch.no_grad():
            logp = torch.log_softmax(self.model.lm(torch.tensor([ids])).logits[0, :-1].float(), -1)
        if fault == "noise":
            logp = torch.log_softmax(logp + torch.randn(logp.shape), -1)
        if fault == "positive":
            logp = logp + 12.0
        if fault == "NaN":
            logp = logp * float("nan")
        if fault == "late":
            logp = torch.cat((logp[:1], logp[:-1]))
        if fault == "mass":
            logp = logp.clamp(min=-0.1)
        return logp[:-1] if fault == "short" else logp

    def _completion(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        ids = body["prompt"]
        if isinstance(ids, str):
            ids = self.read(ids)
        logp = self.logp(ids, fault)
        seen = [i + 1 if fault == "other tokens" else i for i in ids]
        echo = body.get("echo")
        top = logp.topk(min(body["logprobs"] if echo else body["prompt_logprobs"], logp.shape[1]), -1)
        likeliest = [
            dict(zip(i, v, strict=True))
            for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        own = [float(row[i]) for row, i in zip(logp, ids[1:], strict=False)]
        if self.forgot(body, ids):
            own[:-1] = [0.0] * (len(own) - 1)
            likeliest[:-1] = [dict.fromkeys(each, 0.0) for each in likeliest[:-1]]
        known: list[Any] = [None]
        for index, value, others in zip(seen[1:], own, likeliest, strict=False):
            entries = {index: value, **others}
            known.append(
                {str(i): {"logprob": v, "rank": 1, "decoded_token": "?"} for i, v in entries.items()}
            )
        if not echo:
            return {"choices": [{"text": "x", "prompt_token_ids": seen, "prompt_logprobs": known}]}
        tokens = [*map(self.text, seen[: len(known)]), "x"]
        top_strings = [{self.text(i): v for i, v in others.items()} for others in likeliest]
        logprobs = {
            "tokens": tokens,
            "token_logprobs": [None, *own, -0.5],
            "top_logprobs": [None, *top_strings, {"x": -0.5}],
        }
        return {"choices": [{"text": "x", "logprobs": logprobs}]}

    def _generate(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        ids = body.get("input_ids") or self.read(body["text"])
        start = body["logprob_start_len"]
        seen = [i + 1 if fault == "other tokens" else i for i in ids]
        logp = self.logp(ids, fault)[start:]
        meta: dict[str, Any] = {"prompt_tokens": len(ids), "completion_tokens": 0}
        own = [
            [float(row[i]), j, None]
            for row, i, j in zip(logp, ids[start + 1 :], seen[start + 1 :], strict=False)
        ]
        forgot = self.forgot(body, ids)
        if forgot:
            own[:-1] = [[None, j, None] for _, j, _ in own[:-1]]
        meta["input_token_logprobs"] = [[None, seen[start], None], *own]
        if k := body.get("top_logprobs_num"):
            top = logp.topk(min(k, logp.shape[1]), -1)
            pairs = zip(top.values.tolist(), top.indices.tolist(), strict=True)
            meta["input_top_logprobs"] = [
                None,
                *([[v, i, None] for v, i in zip(*p, strict=True)] for p in pairs),
            ]
        if more := body.get("token_ids_logprob"):
            meta["input_token_ids_logprobs"] = [None, *([[float(r[i]), i, None] for i in more] for r in logp)]
        for name in meta if forgot else ():
            if name in ("input_top_logprobs", "input_token_ids_logprobs"):
                meta[name][:-1] = [None] * (len(meta[name]) - 1)
        return {"text": "", "meta_info": meta}

    def forgot(self, body: dict[str, Any], ids: list[int]) -> bool:
        """Whether these are in the prefix cache, of which nothing can be told."""
        if not self.forgets or body.get("cache_salt") or body.get("extra_key"):
            return False
        with self._lock:
            known = tuple(ids) in self._read
            self._read.add(tuple(ids))
        return known

    def read(self, text: str) -> list[int]:
        """The ids of a text behind a BOS, all of which the model has."""
        ids = self.tokenizer.encode(text).ids.clip(max=self.model.vocabulary.size - 1)
        return [self.model.vocabulary.bos_id or 0, *ids.tolist()]

    def text(self, index: int) -> str:
        """A token as an OpenAI-like server writes it."""
        vocabulary = self.model.vocabulary
        return vocabulary.token_bytes(index).decode("utf-8", "replace") or vocabulary.label(index)


def answer(
    handler: BaseHTTPRequestHandler,
    status: int,
    content: Any,
    headers: dict[str, str] | None = None,
    fault: str | None = None,
) -> None:
    data = json.dumps(content).encode()
    if fault == "truncated":
        data = data[: len(data) // 2]
    if fault == "not JSON":
        data = b"<html>gateway</html>"
    if fault == "another shape":
        data = b'{"choices": [{"text": "x"}], "meta_info": []}'
    if fault == "oversized":
        data = b'"' + b"x" * 2**22 + b'"'
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


class Raw:
    """Answers every request with the same bytes, ``then`` others without end; ``asked`` counts."""

    def __init__(self, data: bytes, *, head: bool = True, then: bytes = b"", pause_s: float = 0.0) -> None:
        self.data = OK_HEAD + b"content-length: %d\r\n\r\n" % len(data) + data if head else data
        self.then, self.pause_s, self.asked = then, pause_s, 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Raw:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                there, _ = self._socket.accept()
            except OSError:
                return
            with there, contextlib.suppress(OSError):
                got = b""
                while b"\r\n\r\n" not in got:
                    got += there.recv(65536)
                head, _, body = got.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                while len(body) < length:
                    body += there.recv(65536)
                self.asked += 1
                there.sendall(self.data)
                while self.then:
                    there.sendall(self.then)
                    time.sleep(self.pause_s)


def served(folder: Path, url: str, **options: Any) -> ServedTeacher:
    """A teacher that waits next to nothing before it asks again."""
    given = {"model": "tiny", "retries": 3, "timeout_s": 20.0, "first_wait_s": 0.002} | options
    first_wait_s = given.pop("first_wait_s")
    made = ServedTeacher(folder, url=url, **given)
    made.server.first_wait_s = first_wait_s
    return made
