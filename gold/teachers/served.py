"""A teacher behind a server, which gives the log-probabilities of token ids and of its likeliest tokens beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from secrets import token_urlsafe
from typing import Any, Literal

import numpy as np
import torch

from gold.data import Prompt
from gold.errors import ConfigError, TeacherError
from gold.kernels.logits import LazyLogits, TopKLogits
from gold.teachers.dialects import VLLM, Asked, Dialect, Forgotten, Known, OpenAI, SGLang
from gold.teachers.http import RefusedError, Server
from gold.teachers.protocol import Teacher
from gold.tokenize.chat import has_chat_template
from gold.tokenize.roles import Roles
from gold.tokenize.templates import PromptTokenizer, Rendering, rendered
from gold.tokenize.vocabulary import TokenizedText, Vocabulary

Api = Literal["vllm", "sglang", "openai"]
_CERTAIN = 3
"""Texts that begin with a probability of 1 past the prefix cache too, after which that is believed."""


class ServedTeacher(Teacher):
    """A model behind a server that grades completions.

    It reads each prompt in its own template, by the tokenizer files in ``path``, a folder or a Hub id, which must be
    those of the model that is served. ``top_k`` tokens are known of each row beside the one that was sent; with 0 it
    gives log-probabilities of given tokens alone. ``url`` and what follows: see ``Server``; ``key_env`` names the
    environment variable that holds the server's key. ``rows`` of the model's output matrix and its ``context`` in
    tokens, where they are known; ``template_kwargs`` is what its template is given beside messages. Its rows of
    log-probabilities are made on ``device``.

    The end of a text is asked for as one stop id, the one that the chat template writes after messages, else the first.
    The other stop ids count where they are known: SGLang tells all of them, and so does vLLM from 0.33 on where it lets
    a client choose tokens; other servers those among the likeliest.

    Raises:
        ConfigError: a URL that is none, or a variable that is not set.
        VocabularyError: a tokenizer that is not there, or that cannot be spelled in bytes.
        TeacherError: a tokenizer without a stop id.
    """

    rendering: Rendering

    def __init__(
        self,
        path: str | Path,
        *,
        url: str,
        model: str,
        api: Api = "vllm",
        top_k: int = 20,
        concurrency: int = 8,
        timeout_s: float = 60.0,
        retries: int = 5,
        key_env: str | None = None,
        roles: Roles | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        rows: int | None = None,
        context: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.server = Server(url, concurrency, timeout_s, retries, _key(key_env))
        self.path, self.served_model, self.api, self.top_k = str(path), model, api, top_k
        self.name = f"{model} at {self.server.url}"
        self.context = context
        self.gives = "top_k" if top_k else "tokens"
        self.device = torch.device(device)
        self.vocabulary = Vocabulary.load(path, roles=roles).with_markers(rows)
        self.tokenizer = PromptTokenizer.of(self.vocabulary)
        self.rendering = Rendering(dict(template_kwargs or {}))
        if not self.vocabulary.stop_ids:
            raise TeacherError(
                f"tokenizer {path}: no stop id found in its files; name one in teacher.roles.stop"
            )
        self.dialect = _dialect(api, self.vocabulary)
        self._turn_end = _turn_end(self.tokenizer, self.vocabulary, self.rendering)
        self.forgets = False
        """Whether it has told zeros of what was in its prefix cache; it is then asked past that."""
        self._certain = 0
        self._looked = False

    @property
    def retries(self) -> int:
        """How many requests have been sent again so far."""
        return self.server.tally.retries

    def learn_context(self) -> None:
        """Takes the server's own limit of a sequence where that is lower than what is known, as vLLM tells it.

        Raises:
            TeacherError: the server does not answer.
        """
        call = self.dialect.context(self.served_model)
        if call is None:
            return
        with suppress(RefusedError):  # an older server
            (own,) = self.server.ask([call])
            if own is not None:
                self.context = own if self.context is None else min(own, self.context)

    def misfit(self, prompt: Prompt, tokens: int) -> str:
        """See ``Teacher.misfit``; the end is sent with a text, and servers want room for one token more."""
        return super().misfit(prompt, tokens + 2)

    def asked(self, prompt: Prompt, ids: Sequence[int], stopped: bool) -> Asked:
        """What a completion's ids, and its end where it ``stopped``, are asked as."""
        before = self.prompt_ids(prompt)
        stops = self.vocabulary.stop_ids
        own_turn = self.adapt_prompt(prompt).messages is not None and has_chat_template(self.tokenizer)
        end = [self._turn_end if own_turn and self._turn_end is not None else stops[0]] if stopped else []
        return Asked(
            (*before, *map(int, ids), *end), len(before), min(self.top_k, self.vocabulary.size), stops
        )

    def known(self, asked: Sequence[Asked]) -> list[list[Known]]:
        """What the server knows of each position that is to be scored, by token id.

        Raises:
            TeacherError: it does not answer, or not what was asked; see ``Server.ask``.
        """
        # Longest first, so that the last ones under way are short.
        order = sorted(range(len(asked)), key=lambda i: (-len(asked[i].ids), i))
        order = [i for i in order if len(asked[i].ids) > asked[i].start]
        if order and not self._looked:
            self._looked = True
            self.dialect = self._dialect_of(asked[order[-1]])
        answers = self._ask([asked[i] for i in order])
        results: list[list[Known]] = [[] for _ in asked]
        for i, answer in zip(order, answers, strict=True):
            results[i] = answer
        return results

    def _dialect_of(self, asked: Asked) -> Dialect:
        """The dialect, with chosen tokens where the server tells them."""
        if isinstance(self.dialect, VLLM):
            chosen = VLLM(chosen=True)
            with suppress(RefusedError):
                if self.server.ask([chosen.choices(self.served_model, asked)])[0]:
                    return chosen
        return self.dialect

    def _ask(self, asked: Sequence[Asked]) -> list[list[Known]]:
        """What the server knows of each; asked a second time past its prefix cache where it has forgotten."""
        answers = self.server.ask([self.dialect.call(self.served_model, self._past(a)) for a in asked])
        lost = [n for n, answer in enumerate(answers) if isinstance(answer, Forgotten)]
        if lost:
            again = [replace(asked[n], salt=token_urlsafe()) for n in lost]
            self.server.tally.retries += len(lost)
            try:
                found = self.server.ask([self.dialect.call(self.served_model, a) for a in again])
            except RefusedError as error:
                raise TeacherError(
                    f"{error}; it was asked past its prefix cache, of which it tells nothing: start it with "
                    f"{self.dialect.uncached}"
                ) from error
            for n, answer in zip(lost, found, strict=True):
                answers[n] = answer
                if any(answer[0].values()):
                    self.forgets = True
                else:
                    self._certain += 1
        return answers

    def _past(self, asked: Asked) -> Asked:
        if self.forgets:
            return replace(asked, salt=token_urlsafe())
        return replace(asked, trusted=self._certain >= _CERTAIN)

    def score(
        self, prompts: Sequence[Prompt], tokenized_texts: Sequence[TokenizedText], stopped: Sequence[bool]
    ) -> list[LazyLogits]:
        """See ``Teacher.score``; the rows are partial.

        Raises:
            DataError: a prompt that the teacher cannot read.
            TeacherError: the server does not answer, or not what was asked; there is no partial result.
        """
        asked = [
            self.asked(prompt, tokenized.ids.tolist(), bool(stop))
            for prompt, tokenized, stop in zip(prompts, tokenized_texts, stopped, strict=True)
        ]
        return [self._rows(positions) for positions in self.known(asked)]

    def _rows(self, positions: Sequence[Known]) -> LazyLogits:
        # Rows of several texts are joined, so all have the same width.
        width = max(1, self.top_k) + 1 + len(self.vocabulary.stop_ids)
        size = self.vocabulary.size
        counts = np.array([len(known) for known in positions], np.int64)
        ids = np.fromiter(chain.from_iterable(positions), np.int64, counts.sum())
        logp = np.fromiter(
            chain.from_iterable(known.values() for known in positions), np.float64, counts.sum()
        )
        row = np.repeat(np.arange(len(positions)), counts)
        column = np.arange(ids.size) - np.repeat(np.cumsum(counts) - counts, counts)
        # A model can have more rows than its tokenizer has ids; they are among what is left.
        kept = (column < width) & (ids >= 0) & (ids < size)
        ids_NK = np.full((len(positions), width), -1, np.int64)
        logp_NK = np.zeros((len(positions), width))
        ids_NK[row[kept], column[kept]] = ids[kept]
        logp_NK[row[kept], column[kept]] = np.minimum(logp[kept], 0.0)
        known_ids, known_logp = (torch.from_numpy(a).to(self.device) for a in (ids_NK, logp_NK))
        return TopKLogits(known_ids, known_logp, size)


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            "teacher.served.key_env: the environment has no variable of that name, or it is empty"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError("teacher.served.key_env: what the variable holds has characters that no key has")
    return key


def _dialect(api: str, vocabulary: Vocabulary) -> Dialect:
    if api == "vllm":
        return VLLM()
    if api == "sglang":
        return SGLang(vocabulary.bos_id)
    if api == "openai":
        return OpenAI(vocabulary)
    raise ConfigError(f"api: expected vllm, sglang or openai, got {api!r}")


def _turn_end(tokenizer: Any, vocabulary: Vocabulary, rendering: Rendering) -> int | None:
    """The stop id that the chat template writes after an answer, None without one."""
    if not has_chat_template(tokenizer):
        return None
    turns = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]
    try:
        text = rendered(tokenizer, turns, rendering)
    except Exception:  # a template is a program: it may raise anything
        return None
    closing = text.rpartition("A1")[2].lstrip()
    ends = [i for i in vocabulary.stop_ids if closing.startswith(vocabulary.label(i))]
    return max(ends, key=lambda i: len(vocabulary.label(i)), default=None)
