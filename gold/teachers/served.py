"""A teacher on a server that returns log-probabilities of given token ids and of its top tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

import numpy as np
import torch

from gold.data import Prompt
from gold.errors import TeacherError
from gold.http import RefusedError, Server, environment_key
from gold.kernels.logits import LazyLogits, TopKLogits
from gold.teachers.absent import AbsentTeacher
from gold.teachers.branches import AskedStates, room_of
from gold.teachers.dialects import (
    VLLM,
    FromPrefixCache,
    ScoreRequest,
    TokenLogp,
    dialect_of,
)
from gold.teachers.following import following
from gold.tokenize.chat import has_chat_template
from gold.tokenize.templates import rendered
from gold.tokenize.vocabulary import TokenizedText

_CERTAIN = 3
"""After this many texts whose first token has probability 1 even without the prefix cache, such values are trusted."""


class ServedTeacher(AbsentTeacher):
    """A model on a server that scores completions.

    Prompts are rendered with the tokenizer files in ``path``, a folder or a Hub id, which must be those of the served
    model. Each row has ``top_k`` tokens in addition to the one that was sent; with 0 it gives only log-probabilities of
    given tokens. ``url`` and the following arguments: see ``Server``; ``key_env`` names the environment variable with
    the server's key. ``files`` are the options of ``AbsentTeacher``.

    The end of a text is sent as one stop id: the one that the chat template writes after messages, else the first. The
    other stop ids count where their probabilities are known: SGLang returns all of them, and so does vLLM from 0.33 on,
    where a client can choose tokens; other servers return those among the top tokens.

    Raises:
        ConfigError: an invalid URL, or a variable that is not set.
        VocabularyError: the tokenizer does not exist, or its tokens have no bytes.
        TeacherError: a tokenizer without a stop id.
    """

    complete = True
    top_k: int

    def __init__(
        self,
        path: str | Path,
        *,
        url: str,
        model: str,
        api: str = "vllm",
        top_k: int = 20,
        concurrency: int = 8,
        timeout_s: float = 60.0,
        retries: int = 5,
        key_env: str | None = None,
        **files: Any,
    ) -> None:
        self.server = Server(
            url, concurrency, timeout_s, retries, environment_key(key_env, "teacher.served.key_env")
        )
        super().__init__(path, **files)
        self.path, self.served_model, self.api, self.top_k = str(path), model, api, top_k
        self.name = f"{model} at {url}"
        self.gives = "top_k" if top_k else "tokens"
        if not self.vocabulary.stop_ids:
            raise TeacherError(
                f"tokenizer {path}: no stop id found in its files; name one in teacher.roles.stop"
            )
        self.dialect = dialect_of(api, self.vocabulary)
        self._turn_end = self._find_turn_end()
        self.bypasses_cache = False
        """True once it has sent zeros for tokens in its prefix cache; requests then bypass that."""
        self._certain = 0
        self._probed = False
        self._follows = isinstance(self.dialect, VLLM)

    @property
    def retries(self) -> int:
        """The number of repeated requests so far."""
        return self.server.repeated

    def cache_revision(self, given: str | None) -> str:
        """See ``Teacher.cache_revision``: the model's name on its server, and ``given``."""
        return f"served as {self.served_model}" + (f", {given}" if given else "")

    def learn_context(self) -> None:
        """Uses the server's own context length if it is lower than the known one; vLLM reports one.

        Raises:
            TeacherError: the server does not answer.
        """
        if (call := self.dialect.context(self.served_model)) is None:
            return
        with suppress(RefusedError):  # an older server
            (own,) = self.server.ask([call])
            if own is not None:
                self.context = own if self.context is None else min(own, self.context)

    def misfit(self, prompt: Prompt, tokens: int) -> str:
        """See ``Teacher.misfit``; the end is sent with a text, and servers need room for one more token."""
        return super().misfit(prompt, tokens + 2)

    def request(self, prompt: Prompt, ids: Sequence[int], stopped: bool) -> ScoreRequest:
        """The request for a completion's ids, and for its end if it ``stopped``."""
        before = self.prompt_ids(prompt)
        stops = self.vocabulary.stop_ids
        own_turn = self.adapt_prompt(prompt).messages is not None
        end = [self._turn_end if own_turn and self._turn_end is not None else stops[0]] if stopped else []
        top_k = min(self.top_k, self.vocabulary.size)
        return ScoreRequest((*before, *map(int, ids), *end), len(before), top_k, stops)

    def token_logp(self, requests: Sequence[ScoreRequest]) -> list[list[TokenLogp]]:
        """The log-probabilities at each position of each text, by token id, the text's own token first.

        Raises:
            TeacherError: the server does not answer, or the answer does not match the request; see ``Server.ask``.
        """
        # Longest first, so that the last running requests are short.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].ids), i))
        order = [i for i in order if requests[i].text]
        if order and not self._probed:
            self._probed = True
            self._probe_chosen(requests[order[-1]])
        results: list[list[TokenLogp]] = [[] for _ in requests]
        for i, answer in zip(order, self._ask([requests[i] for i in order]), strict=True):
            results[i] = answer
        return results

    def _probe_chosen(self, request: ScoreRequest) -> None:
        """Requests chosen tokens from vLLM from now on, if it returns them."""
        if isinstance(self.dialect, VLLM):
            chosen = VLLM(chosen=True)
            with suppress(RefusedError):
                if self.server.ask([chosen.probe_chosen(self.served_model, request)])[0]:
                    self.dialect = chosen

    def _ask(self, requests: Sequence[ScoreRequest]) -> list[list[TokenLogp]]:
        """The results; requests that the prefix cache left incomplete are repeated without it."""
        trusted = self._certain >= _CERTAIN
        answers = self._send([replace(r, trusted=trusted) for r in requests], self.bypasses_cache)
        lost = [n for n, answer in enumerate(answers) if isinstance(answer, FromPrefixCache)]
        if lost:
            self.server.repeated += len(lost)
            try:
                found = self._send([requests[n] for n in lost], True)
            except RefusedError as error:
                raise TeacherError(
                    f"{error}; its prefix cache has no log-probabilities: start it with "
                    f"{self.dialect.uncached}"
                ) from error
            for n, answer in zip(lost, found, strict=True):
                answers[n] = answer
                if any(answer[0].values()):
                    self.bypasses_cache = True
                else:
                    self._certain += 1
        return answers

    def _send(self, requests: Sequence[ScoreRequest], bypass_cache: bool) -> list[Any]:
        if bypass_cache:
            requests = [replace(request, salt=token_urlsafe()) for request in requests]
        return self.server.ask([self.dialect.call(self.served_model, request) for request in requests])

    def score(
        self, prompts: Sequence[Prompt], tokenized_texts: Sequence[TokenizedText], stopped: Sequence[bool]
    ) -> list[LazyLogits]:
        """See ``Teacher.score``; the rows are partial.

        Raises:
            DataError: a prompt that the teacher cannot read.
            TeacherError: the server does not answer, or the answer does not match the request; there is no partial
                result.
        """
        requests = [
            self.request(prompt, tokenized.ids.tolist(), bool(stop))
            for prompt, tokenized, stop in zip(prompts, tokenized_texts, stopped, strict=True)
        ]
        return [self._rows(positions) for positions in self.token_logp(requests)]

    def states(self, prompt: Prompt, tokenized: TokenizedText, stopped: bool) -> AskedStates:
        """See ``Teacher.states``: of a branch only the last row is asked for, behind a prefix that a server with a
        prefix cache has read already."""

        def after(branches: Sequence[list[int]]) -> LazyLogits:
            if self._follows:
                before = self.prompt_ids(prompt)
                top_k = min(max(1, self.top_k), self.vocabulary.size)
                calls = [following(self.served_model, [*before, *ids], top_k) for ids in branches]
                try:
                    return self._rows(self.server.ask(calls))
                except RefusedError:  # a server that does not know such a request
                    self._follows = False
            # What is asked for is the row of the stop event.
            whole = [self.request(prompt, ids, True) for ids in branches]
            last = [replace(request, start=len(request.ids) - 1) for request in whole]
            return self._rows([positions[0] for positions in self.token_logp(last)])

        room = room_of(self, prompt, tokenized.ids.size)
        return AskedStates(
            tokenized.ids, lambda: self.score([prompt], [tokenized], [stopped])[0], after, room
        )

    def _rows(self, positions: Sequence[TokenLogp]) -> LazyLogits:
        # Rows of several texts are concatenated, so all have the same width.
        width = max(1, self.top_k) + 1 + len(self.vocabulary.stop_ids)
        size = self.vocabulary.size
        counts = np.array([len(known) for known in positions], np.int64)
        ids = np.fromiter(chain.from_iterable(positions), np.int64, counts.sum())
        logp = np.fromiter(
            chain.from_iterable(known.values() for known in positions), np.float64, counts.sum()
        )
        row = np.repeat(np.arange(len(positions)), counts)
        column = np.arange(ids.size) - np.repeat(np.cumsum(counts) - counts, counts)
        # A model can have more rows than its tokenizer has ids; they belong to the tail mass.
        kept = (column < width) & (ids >= 0) & (ids < size)
        ids_NK = np.full((len(positions), width), -1, np.int64)
        logp_NK = np.zeros((len(positions), width))
        ids_NK[row[kept], column[kept]] = ids[kept]
        logp_NK[row[kept], column[kept]] = np.minimum(logp[kept], 0.0)
        known_ids, known_logp = (torch.from_numpy(a).to(self.device) for a in (ids_NK, logp_NK))
        return TopKLogits(known_ids, known_logp, size)

    def _find_turn_end(self) -> int | None:
        """The stop id that the chat template writes after an answer; None without one."""
        if not has_chat_template(self.tokenizer):
            return None
        turns = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]
        try:
            text = rendered(self.tokenizer, turns, self.rendering)
        except Exception:  # a template may raise any exception
            return None
        closing = text.rpartition("A1")[2].lstrip()
        ends = [i for i in self.vocabulary.stop_ids if closing.startswith(self.vocabulary.label(i))]
        return max(ends, key=lambda i: len(self.vocabulary.label(i)), default=None)
