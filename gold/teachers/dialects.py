"""How servers are asked for the log-probabilities of given tokens, and how they answer: vLLM, SGLang, OpenAI's echo."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gold.align.vocabulary import Vocabulary
from gold.teachers.http import BadAnswerError, Call

Known = dict[int, float]
"""Log-probabilities of some tokens at one position, by id, in nats."""
MOST_ABOVE_ONE = 1e-3
"""How far above 1 rounding may take a probability or the mass of several, and no further."""
# Every known entry is a line of JSON with the token's text; a text of 64 bytes is long.
_ENTRY_BYTES = 256


@dataclass(frozen=True)
class Asked:
    """Token ids of a prompt and of what comes after it, which begins at ``start`` and is to be scored.

    ``top_k`` likeliest tokens are wanted at each position, and, where that can be asked for, those of ``also``.
    """

    ids: tuple[int, ...]
    start: int
    top_k: int
    also: tuple[int, ...] = ()


class Dialect(Protocol):
    """What one kind of server understands."""

    def call(self, model: str, asked: Asked) -> Call:
        """The request for the log-probabilities of ``asked.ids[start:]``; it results in one ``Known`` for each."""
        ...

    def tokenize(self, model: str, text: str) -> Call:
        """The request for the server's own tokens of a text: their ids, or their strings where it has no ids."""
        ...

    def template(self, model: str, messages: Sequence[Mapping[str, str]]) -> Call | None:
        """The request for the ids that its template makes of messages, None where there is none."""
        ...

    @property
    def advice(self) -> str:
        """What to change on a server that gives too few of the likeliest tokens."""
        ...


@dataclass(frozen=True)
class VLLM:
    """``prompt_logprobs`` of ``/v1/completions``; the first position has none. −∞ comes as −9999."""

    advice = "start the server with a higher --max-logprobs"

    def call(self, model: str, asked: Asked) -> Call:
        """See ``Dialect.call``."""
        body = {
            "model": model,
            "prompt": list(asked.ids),
            "max_tokens": 1,
            # What would be drawn does not matter, and no server can change a distribution by a temperature of 1.
            "temperature": 1.0,
            "prompt_logprobs": max(1, asked.top_k),
            "return_token_ids": True,
        }

        def read(answer: Any) -> list[Known]:
            choice = _get(answer, "choices", 0)
            if (echoed := choice.get("prompt_token_ids")) is not None and list(echoed) != list(asked.ids):
                raise BadAnswerError("has read other tokens than were sent")
            positions = _get(choice, "prompt_logprobs")
            _check_count(positions, len(asked.ids))
            found = [
                {int(key): _get(entry, "logprob") for key, entry in _items(position)}
                for position in positions[asked.start :]
            ]
            return checked(found, asked)

        return Call("/v1/completions", body, _shaped(read), _limit(len(asked.ids), asked))

    def tokenize(self, model: str, text: str) -> Call:
        """See ``Dialect.tokenize``."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return Call("/tokenize", body, _shaped(lambda answer: _get(answer, "tokens")))

    def template(self, model: str, messages: Sequence[Mapping[str, str]]) -> Call | None:
        """See ``Dialect.template``."""
        body = {
            "model": model,
            "messages": list(messages),
            "add_generation_prompt": True,
            "add_special_tokens": False,
        }
        return Call("/tokenize", body, _shaped(lambda answer: _get(answer, "tokens")))


@dataclass(frozen=True)
class SGLang:
    """``return_logprob`` of the native ``/generate``: [log-probability, id, text] of the tokens from
    ``logprob_start_len`` on, the first of which has no log-probability."""

    bos_id: int | None
    advice = "the server gives fewer than top_k tokens: lower teacher.served.top_k"

    def call(self, model: str, asked: Asked) -> Call:
        """See ``Dialect.call``."""
        count = len(asked.ids) - asked.start
        body: dict[str, Any] = {
            "input_ids": list(asked.ids),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": asked.start - 1,
            "top_logprobs_num": asked.top_k,
        }
        if asked.also:
            body["token_ids_logprob"] = list(asked.also)

        def read(answer: Any) -> list[Known]:
            meta = _get(answer, "meta_info")
            own = _tail(meta, "input_token_logprobs", count)
            if [entry[1] for entry in own] != list(asked.ids[asked.start :]):
                raise BadAnswerError("has read other tokens than were sent")
            found = [{entry[1]: entry[0]} for entry in own]
            others = [("input_top_logprobs", asked.top_k), ("input_token_ids_logprobs", len(asked.also))]
            for name in [name for name, wanted in others if wanted]:
                for known, entries in zip(found, _tail(meta, name, count), strict=True):
                    for logp, index, *_ in entries or ():
                        if logp is not None:  # −∞ has no JSON
                            known.setdefault(index, logp)
            return checked(found, asked)

        return Call("/generate", body, _shaped(read), _limit(count + 1, asked))

    def tokenize(self, model: str, text: str) -> Call:
        """See ``Dialect.tokenize``; the tokens are those that it says it has read."""
        body = {
            "text": text,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }

        def read(answer: Any) -> list[int]:
            ids = [entry[1] for entry in _get(answer, "meta_info", "input_token_logprobs")]
            return ids[1:] if ids[:1] == [self.bos_id] else ids

        return Call("/generate", body, _shaped(read))

    def template(self, model: str, messages: Sequence[Mapping[str, str]]) -> Call | None:
        """See ``Dialect.template``: there is none."""
        return None


class OpenAI:
    """``echo`` and ``logprobs`` of ``/v1/completions``, whose tokens are strings.

    A string stands for the one token that is spelled so; what several tokens are spelled, as U+FFFD often is, tells
    nothing but the log-probability of the token that was sent.
    """

    advice = "the server limits logprobs: lower teacher.served.top_k to that"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        ids_of: dict[str, list[int]] = {}
        for index in range(vocabulary.size):
            for text in self.strings(index):
                ids_of.setdefault(text, []).append(index)
        self._id_of = {text: ids[0] for text, ids in ids_of.items() if len(ids) == 1}

    def strings(self, index: int) -> set[str]:
        """How a server may write a token: its number, as vLLM can be told to, and its text, or its name where it has
        none; a text that is no valid UTF-8 is written in many ways."""
        data = self._vocabulary.token_bytes(index)
        text = data.decode("utf-8", "replace") if data else self._vocabulary.label(index)
        return {f"token_id:{index}"} | ({text} if "\ufffd" not in text else set())

    def reads_as(self, shown: str, index: int) -> bool:
        """Whether what a server shows can be this token."""
        known = self.strings(index)
        if self._vocabulary.event_V[index]:
            return not shown or shown in known
        return len(known) == 1 or shown in known

    def call(self, model: str, asked: Asked) -> Call:
        """See ``Dialect.call``."""
        body = {
            "model": model,
            "prompt": list(asked.ids),
            "max_tokens": 1,
            "temperature": 1.0,
            "echo": True,
            "logprobs": max(1, asked.top_k),
        }

        def read(answer: Any) -> list[Known]:
            logprobs = _get(answer, "choices", 0, "logprobs")
            tokens, own, top = (_get(logprobs, n) for n in ("tokens", "token_logprobs", "top_logprobs"))
            # The one token that was drawn may stand behind them.
            for each in (tokens, own, top):
                _check_count(each, len(asked.ids), at_most=len(asked.ids) + 1)
            found: list[Known] = []
            for place in range(asked.start, len(asked.ids)):
                index = asked.ids[place]
                if not self.reads_as(tokens[place], index):
                    raise BadAnswerError(
                        f"has read {tokens[place]!r} where {self._vocabulary.label(index)!r} was sent"
                    )
                known = {index: own[place]}
                for text, logp in _items(top[place]):
                    if (other := self._id_of.get(text)) is not None and logp is not None:
                        known.setdefault(other, logp)
                found.append(known)
            return checked(found, asked)

        return Call("/v1/completions", body, _shaped(read), _limit(len(asked.ids), asked))

    def tokenize(self, model: str, text: str) -> Call:
        """See ``Dialect.tokenize``; strings, as they are echoed."""
        body = {
            "model": model,
            "prompt": text,
            "max_tokens": 1,
            "temperature": 1.0,
            "echo": True,
            "logprobs": 1,
        }
        bos = self._vocabulary.bos_id

        def read(answer: Any) -> list[str]:
            tokens = list(_get(answer, "choices", 0, "logprobs", "tokens"))[:-1]
            return tokens[1:] if bos is not None and tokens and tokens[0] in self.strings(bos) else tokens

        return Call("/v1/completions", body, _shaped(read))

    def template(self, model: str, messages: Sequence[Mapping[str, str]]) -> Call | None:
        """See ``Dialect.template``: there is none."""
        return None


def checked(found: Sequence[Known], asked: Asked) -> list[Known]:
    """The log-probabilities of each position, that of the token that was sent first.

    Raises:
        BadAnswerError: a token that was sent is missing; an id is none; a value is no number, not finite, or above 0;
            the mass of a position is above 1.
    """
    for place, (index, known) in enumerate(zip(asked.ids[asked.start :], found, strict=True), asked.start):
        if index not in known:
            raise BadAnswerError(
                f"has no log-probability of token {index}, which was sent at position {place}"
            )
        for other, logp in known.items():
            if type(other) is not int or not 0 <= other < 2**31:
                raise BadAnswerError(f"gives {other!r} as a token id at position {place}")
            if type(logp) not in (int, float) or not math.isfinite(logp):
                raise BadAnswerError(f"gives {logp!r} as a log-probability at position {place}")
            if logp > MOST_ABOVE_ONE:
                raise BadAnswerError(f"gives a log-probability of {logp:.4g} at position {place}, above 0")
        mass = math.fsum(map(math.exp, known.values()))
        if mass > 1 + MOST_ABOVE_ONE:
            raise BadAnswerError(f"gives tokens of {mass:.4g} probability together at position {place}")
    return [
        {index: known[index], **known} for index, known in zip(asked.ids[asked.start :], found, strict=True)
    ]


def _shaped(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``read`` of an answer that may have any shape."""

    def careful(answer: Any) -> Any:
        try:
            return read(answer)
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise BadAnswerError("sends JSON of another shape than this API's; look at api") from error

    return careful


def _get(value: Any, *path: str | int) -> Any:
    for key in path:
        value = value[key]
        if value is None:
            raise BadAnswerError(f"sends no {key}; look at api")
    return value


def _items(position: Any) -> Any:
    return (position or {}).items()


def _check_count(positions: Sequence[Any], count: int, at_most: int | None = None) -> None:
    if not count <= len(positions) <= (at_most or count):
        raise BadAnswerError(f"answers for {len(positions)} tokens where {count} were sent")


def _tail(meta: Any, name: str, count: int) -> list[Any]:
    entries = _get(meta, name)
    if len(entries) not in (count, count + 1):
        raise BadAnswerError(f"answers for {len(entries)} tokens where {count + 1} were asked for")
    return list(entries[-count:])


def _limit(positions: int, asked: Asked) -> int:
    return 2**20 + _ENTRY_BYTES * positions * (asked.top_k + len(asked.also) + 2)
