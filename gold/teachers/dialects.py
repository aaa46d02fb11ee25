"""How servers are asked for the log-probabilities of given tokens, and how they answer: vLLM, SGLang, OpenAI's echo."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from gold.teachers.http import BadAnswerError, Call
from gold.tokenize.vocabulary import Vocabulary

T = TypeVar("T")
Known = dict[int, float]
"""Log-probabilities of some tokens at one position, by id, in nats; −∞ is told of the token that was sent alone."""
NEVER_NATS = -9999.0
"""What vLLM writes for −∞, which JSON has no number for; so this and all below it, null and "-Infinity" mean that."""
MOST_ABOVE_ONE = 1e-3
"""How far above 1 rounding may take a probability or the mass of several, and no further."""
MOST_APART = 0.1
"""How far apart two log-probabilities may be that one answer tells of one token, in nats."""
_LEAST = 2
"""Likeliest tokens that are asked for at least: where the first is certain, the second shows that it was looked at."""
# Every known entry is a line of JSON with the token's text; a text of 64 bytes is long.
_ENTRY_BYTES = 256


@dataclass(frozen=True)
class Asked:
    """Token ids of a prompt and of what comes after it, which begins at ``start`` and is to be scored.

    ``top_k`` likeliest tokens are wanted at each position, and, where that can be asked for, those of ``also``. A
    server is to answer past its prefix cache where ``salt``, which no other request has, is not empty; zeros at the
    beginning may be what that cache holds in place of log-probabilities, unless they are ``trusted``.
    """

    ids: tuple[int, ...]
    start: int
    top_k: int
    also: tuple[int, ...] = ()
    salt: str = ""
    trusted: bool = False


class Forgotten:
    """The result of an answer that tells nothing of where it begins: zeros, or nothing at all."""


class Dialect(Protocol):
    """What one kind of server understands."""

    def call(self, model: str, asked: Asked) -> Call:
        """The request for the log-probabilities of ``asked.ids[start:]``; it results in one ``Known`` for each, or in
        ``Forgotten``, where there is neither salt nor trust."""
        ...

    def tokenize(self, model: str, text: str) -> Call:
        """The request for the server's own tokens of a text: their ids, or their strings where it has no ids."""
        ...

    def context(self, model: str) -> Call | None:
        """The request for the longest sequence in tokens that the server takes (None: it did not say), None where there
        is none."""
        ...

    def template(
        self, model: str, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any] | None = None
    ) -> Call | None:
        """The request for the ids that its template makes of messages, None where there is none."""
        ...

    @property
    def advice(self) -> str:
        """What to change on a server that gives too few of the likeliest tokens."""
        ...

    @property
    def uncached(self) -> str:
        """What keeps a server from reading its prefix cache."""
        ...


@dataclass(frozen=True)
class VLLM:
    """``prompt_logprobs`` of ``/v1/completions``; the first position has none. −∞ comes as −9999.

    ``chosen``: the tokens ``also`` are told too, by ``prompt_logprob_token_ids`` of ``/inference/v1/generate``, a list
    for each position, which not every server has; see ``choices``.
    """

    chosen: bool = False
    advice = "start the server with a higher --max-logprobs"
    uncached = "--no-enable-prefix-caching"

    def call(self, model: str, asked: Asked) -> Call:
        """See ``Dialect.call``."""
        # What would be drawn does not matter, and no server can change a distribution by a temperature of 1.
        params: dict[str, Any] = {
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": max(_LEAST, asked.top_k),
        }
        also = tuple(dict.fromkeys(asked.also))
        count = len(asked.ids) - asked.start
        chosen = self.chosen and bool(also)
        body: dict[str, Any]
        if chosen:
            params |= {"prompt_logprob_token_ids": [also] * count, "prompt_logprob_start": asked.start - 1}
            params["detokenize"] = False
            body = {"model": model, "token_ids": list(asked.ids), "sampling_params": params}
        else:
            body = {"model": model, "prompt": list(asked.ids), **params}
        body["return_token_ids"] = True
        if asked.salt:
            body["cache_salt"] = asked.salt

        def read(answer: Any) -> list[Known] | Forgotten:
            choice = answer if chosen else _get(answer, "choices", 0)
            if (echoed := choice.get("prompt_token_ids")) is not None and list(echoed) != list(asked.ids):
                raise BadAnswerError("has read other tokens than were sent")
            positions = _get(choice, "prompt_logprobs")
            _check_count(positions, len(asked.ids))
            found = [
                {_id(key): entry["logprob"] for key, entry in _items(position)}
                for position in positions[asked.start :]
            ]
            if _forgotten(found, asked):
                return Forgotten()
            result = checked(found, asked, self.uncached)
            _check_enough(found, asked, self.advice)
            if chosen:
                _join(result, also, _matrix(_get(answer, "prompt_token_id_logprobs"), count, len(also)))
                result = checked(result, asked)
            return result

        path = "/inference/v1/generate" if chosen else "/v1/completions"
        return Call(path, body, _shaped(read), _limit(len(asked.ids), asked))

    def choices(self, model: str, asked: Asked) -> Call:
        """The request by which a server shows whether it tells chosen tokens as this does: it results in that."""
        call = self.call(model, asked)

        def read(answer: Any) -> bool:
            try:
                return isinstance(call.read(answer), list)
            except BadAnswerError:
                return False

        return replace(call, read=read, final=frozenset({500}))

    def tokenize(self, model: str, text: str) -> Call:
        """See ``Dialect.tokenize``."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return Call("/tokenize", body, _shaped(lambda answer: _all(int, _get(answer, "tokens"))))

    def context(self, model: str) -> Call | None:
        """See ``Dialect.context``."""
        body = {"model": model, "prompt": "a", "add_special_tokens": False}
        return Call("/tokenize", body, _shaped(lambda answer: _whole(answer.get("max_model_len"))))

    def template(
        self, model: str, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any] | None = None
    ) -> Call | None:
        """See ``Dialect.template``."""
        body = {
            "model": model,
            "messages": list(messages),
            "add_generation_prompt": True,
            "add_special_tokens": False,
            **({"chat_template_kwargs": dict(arguments)} if arguments else {}),
        }
        return Call("/tokenize", body, _shaped(lambda answer: _all(int, _get(answer, "tokens"))))


@dataclass(frozen=True)
class SGLang:
    """``return_logprob`` of the native ``/generate``: [log-probability, id, text] of the tokens from
    ``logprob_start_len`` on, the first of which has no log-probability."""

    bos_id: int | None
    advice = "the server gives fewer than top_k tokens: lower teacher.served.top_k"
    uncached = "--disable-radix-cache"

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
        if asked.salt:
            body["extra_key"] = asked.salt

        def read(answer: Any) -> list[Known] | Forgotten:
            meta = _get(answer, "meta_info")
            own = _tail(meta, "input_token_logprobs", count)
            if [entry[1] for entry in own] != list(asked.ids[asked.start :]):
                raise BadAnswerError("has read other tokens than were sent")
            found = [{entry[1]: entry[0]} for entry in own]
            others = [("input_top_logprobs", asked.top_k), ("input_token_ids_logprobs", len(asked.also))]
            for name in [name for name, wanted in others if wanted]:
                for known, entries in zip(found, _tail(meta, name, count), strict=True):
                    named = {index: logp for logp, index, *_ in entries or ()}
                    if len(named) < len(entries or ()):
                        raise BadAnswerError("names a token twice at one position")
                    for index, logp in named.items():
                        known.setdefault(index, logp)
            if _forgotten(found, asked):
                return Forgotten()
            result = checked(found, asked, self.uncached)
            _check_enough(found, asked, self.advice)
            return result

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
            entries = _get(answer, "meta_info", "input_token_logprobs")
            ids = _all(int, [entry[1] for entry in entries])
            return ids[1:] if ids[:1] == [self.bos_id] else ids

        return Call("/generate", body, _shaped(read))

    def context(self, model: str) -> Call | None:
        """See ``Dialect.context``: it does not say."""
        return None

    def template(
        self, model: str, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any] | None = None
    ) -> Call | None:
        """See ``Dialect.template``: there is none."""
        return None


class OpenAI:
    """``echo`` and ``logprobs`` of ``/v1/completions``, whose tokens are strings.

    A string stands for the one token that is spelled so; what several tokens are spelled, as U+FFFD often is, tells
    nothing but the log-probability of the token that was sent.
    """

    advice = "the server limits logprobs: lower teacher.served.top_k to that"
    uncached = "--no-enable-prefix-caching, or what it calls that"

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
        if self._vocabulary.is_special[index]:
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
            "logprobs": max(_LEAST, asked.top_k),
        }
        if asked.salt:
            body["cache_salt"] = asked.salt

        def read(answer: Any) -> list[Known] | Forgotten:
            logprobs = _get(answer, "choices", 0, "logprobs")
            tokens, own, top = (_get(logprobs, n) for n in ("tokens", "token_logprobs", "top_logprobs"))
            # The one token that was drawn may stand behind them.
            for each in (tokens, own, top):
                _check_count(each, len(asked.ids), at_most=len(asked.ids) + 1)
            found: list[dict[int, Any]] = []
            for place in range(asked.start, len(asked.ids)):
                index = asked.ids[place]
                if not self.reads_as(tokens[place], index):
                    raise BadAnswerError(
                        f"has read {tokens[place]!r} where {self._vocabulary.label(index)!r} was sent"
                    )
                known = {index: own[place]}
                for text, logp in _items(top[place]):
                    if (other := self._id_of.get(text)) is not None:
                        known.setdefault(other, logp)
                found.append(known)
            return Forgotten() if _forgotten(found, asked) else checked(found, asked, self.uncached)

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
            tokens = _all(str, _get(answer, "choices", 0, "logprobs", "tokens"))[:-1]
            return tokens[1:] if bos is not None and tokens and tokens[0] in self.strings(bos) else tokens

        return Call("/v1/completions", body, _shaped(read))

    def context(self, model: str) -> Call | None:
        """See ``Dialect.context``: it does not say."""
        return None

    def template(
        self, model: str, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any] | None = None
    ) -> Call | None:
        """See ``Dialect.template``: there is none."""
        return None


def checked(found: Sequence[Mapping[Any, Any]], asked: Asked, uncached: str = "") -> list[Known]:
    """The log-probabilities of each position, that of the token that was sent first; those above −∞, but for it.

    A token that has probability 0 need not be told apart from all others; the one that was sent stands in the text.

    ``uncached`` is what to start a server with that has nothing to say of its prefix cache.

    Raises:
        BadAnswerError: a token that was sent is missing; an id is none; a value is no number, NaN, or above 0; the mass
            of a position is above 1.
    """
    results = []
    for place, (index, known) in enumerate(zip(asked.ids[asked.start :], found, strict=True), asked.start):
        hint = ""
        if uncached and not any(known.values()):  # nothing, nulls, zeros
            hint = f"; is that in its prefix cache? start it with {uncached}"
        if known.get(index) is None:
            raise BadAnswerError(
                f"has no log-probability of token {index}, which was sent at position {place}" + hint
            )
        told = {index: math.nan}
        for other, value in known.items():
            if type(other) is not int or not 0 <= other < 2**31:
                raise BadAnswerError(f"gives {_shown(other)} as a token id at position {place}")
            logp = -math.inf if value is None or value in ("-Infinity", "-inf") else value
            if type(logp) not in (int, float) or not logp < math.inf:
                raise BadAnswerError(f"gives {_shown(value)} as a log-probability at position {place}")
            if logp > MOST_ABOVE_ONE:
                raise BadAnswerError(f"gives a log-probability of {logp:.4g} at position {place}, above 0")
            if logp <= NEVER_NATS:
                logp = -math.inf
            if other == index or logp > -math.inf:
                told[other] = logp
        mass = math.fsum(map(math.exp, told.values()))
        if mass > 1 + MOST_ABOVE_ONE:
            raise BadAnswerError(f"gives tokens of {mass:.4g} probability together at position {place}{hint}")
        results.append(told)
    return results


def _forgotten(found: Sequence[Mapping[Any, Any]], asked: Asked) -> bool:
    """Whether the first position tells nothing but zeros and nulls, as some do of what is in their prefix cache.

    Where a token is certain indeed, others beside it are far below 0.
    """
    if asked.salt or asked.trusted or not found:
        return False
    return all(value is None or (type(value) in (int, float) and value == 0) for value in found[0].values())


def _matrix(text: str, rows: int, width: int) -> npt.NDArray[np.float32]:
    """The numbers of an array in NumPy's file format, in base64.

    Raises:
        ValueError: it is none of float32, or has another shape.
    """
    file = BytesIO(base64.b64decode(text, validate=True))
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of the format")
    shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
    if shape != (rows, width) or by_column or dtype != np.dtype("<f4"):
        raise ValueError("another array")
    return np.frombuffer(file.read(), "<f4").reshape(shape)


def _join(found: Sequence[Known], also: Sequence[int], logp: npt.NDArray[np.float32]) -> None:
    """Adds chosen tokens to what is known of each position.

    Raises:
        BadAnswerError: of a token that was known already something else is told: another position, or no logarithms.
    """
    for known, row in zip(found, logp.tolist(), strict=True):
        for index, value in zip(also, row, strict=True):
            before = known.setdefault(index, value)
            if abs(before - value) > MOST_APART and max(before, value) > NEVER_NATS:
                raise BadAnswerError(
                    f"gives log-probabilities of {before:.4g} and {value:.4g} of token {index}"
                )


def _id(key: str) -> int:
    """The id that a key of JSON names, in the one way that numbers are written."""
    if not (key.isascii() and key.isdecimal()) or key != str(int(key)):
        raise BadAnswerError(f"gives {_shown(key)} as a token id")
    return int(key)


def _check_enough(found: Sequence[Mapping[int, Any]], asked: Asked, advice: str) -> None:
    least = min(map(len, found), default=asked.top_k)
    if least < asked.top_k:
        raise BadAnswerError(
            f"gives {least} tokens of a row where the {asked.top_k} likeliest were asked for; {advice}"
        )


def _shown(value: Any) -> str:
    """What a server gave for a number, cut short; of anything nested, its kind alone."""
    if isinstance(value, str | int | float | bool | None):
        shown = repr(value[:40] if isinstance(value, str) else value)
        return shown if len(shown) <= 50 else f"{shown[:49]}…"
    return f"a {type(value).__name__}"


def _shaped(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``read`` of an answer that may have any shape."""

    def careful(answer: Any) -> Any:
        if isinstance(answer, dict) and (told := answer.get("error")):
            found = told.get("message") if isinstance(told, dict) else told
            shown = found if isinstance(found, str) else _shown(found)
            raise BadAnswerError(f"answers with an error in place of a result: {shown}")
        try:
            return read(answer)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise BadAnswerError("sends JSON of another shape than this API's; look at api") from error

    return careful


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _get(value: Any, *path: str | int) -> Any:
    for key in path:
        value = value[key]
        if value is None:
            raise BadAnswerError(f"sends no {key}; look at api")
    return value


def _all(kind: type[T], values: Any) -> list[T]:
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise BadAnswerError("sends something else than tokens; look at api")
    return values


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
