"""The requests and answers of servers that return log-probabilities of given tokens: vLLM, SGLang, OpenAI's echo."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from gold.teachers.http import BadAnswerError, Call, shown
from gold.tokenize.vocabulary import Vocabulary

TokenLogp = dict[int, float]
"""Log-probabilities of some tokens at one position, by id, in nats; only the token that was sent can have −∞."""
NEVER_NATS = -9999.0
"""What vLLM writes for −∞, which JSON cannot; this and everything below it, null and "-Infinity" mean that."""
MOST_ABOVE_ONE = 1e-3
"""How far rounding may take a probability, or the mass of several, above 1."""
MOST_APART = 0.1
"""How far apart two log-probabilities of one token in one answer may be, in nats."""
_LEAST = 2
"""The fewest likeliest tokens that are requested: where the first is certain, the second shows that it was computed."""
_ENTRY_BYTES = 256
"""Of the longest line of JSON for one token, whose text may have 64 bytes."""


@dataclass(frozen=True)
class ScoreRequest:
    """Token ids of a prompt and of the text after it, which begins at ``start`` and is to be scored.

    ``top_k`` likeliest tokens are wanted at each position and, where a server can be asked for those, the tokens of
    ``also``. With ``salt``, unique to this request, the server bypasses its prefix cache. Zeros at the beginning may
    stand for log-probabilities that the prefix cache lacks, unless they are ``trusted``.
    """

    ids: tuple[int, ...]
    start: int
    top_k: int
    also: tuple[int, ...] = ()
    salt: str = ""
    trusted: bool = False

    @property
    def text(self) -> tuple[int, ...]:
        """The ids that are scored."""
        return self.ids[self.start :]


class FromPrefixCache:
    """The result of an answer that has only zeros, or nothing, where it begins: the prefix cache has no more."""


Result = list[TokenLogp] | FromPrefixCache


class Dialect:
    """The requests that one kind of server understands."""

    advice: str
    """What to change on a server that gives too few of the likeliest tokens."""
    uncached: str
    """What switches its prefix cache off."""
    chosen = False
    """Whether it returns the tokens of ``also`` at every position."""

    def call(self, model: str, request: ScoreRequest) -> Call:
        """The request for the log-probabilities of ``request.text``; its result is one ``TokenLogp`` for each, or
        ``FromPrefixCache``, where there is neither salt nor trust."""
        raise NotImplementedError

    def tokenize(self, model: str, text: str) -> Call:
        """The request for the server's own tokens of a text: their ids, or their strings where it has no ids."""
        raise NotImplementedError

    def same_tokens(self, ids: Sequence[int], found: Sequence[Any]) -> bool:
        """Whether the result of ``tokenize`` can be these ids."""
        return list(ids) == list(found)

    def context(self, model: str) -> Call | None:
        """The request for the longest sequence in tokens that the server takes (None: it did not say), None where there
        is none."""
        return None

    def template(
        self, model: str, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any] | None = None
    ) -> Call | None:
        """The request for the ids that its chat template makes of messages, None where there is none."""
        return None

    def _result(
        self, found: Sequence[Mapping[Any, Any]], request: ScoreRequest, enough: bool = True
    ) -> Result:
        """The checked log-probabilities; ``enough``: each position must have ``top_k`` of them."""
        if _from_prefix_cache(found, request):
            return FromPrefixCache()
        result = checked(found, request, self.uncached)
        least = min(map(len, found), default=request.top_k)
        if enough and least < request.top_k:
            raise BadAnswerError(
                f"gives {least} tokens of a row where the {request.top_k} likeliest were asked for; {self.advice}"
            )
        return result


class VLLM(Dialect):
    """``prompt_logprobs`` of ``/v1/completions``; the first position has none. −∞ comes as −9999.

    With ``chosen`` the tokens of ``also`` come too, by ``prompt_logprob_token_ids`` of ``/inference/v1/generate``, a
    list for each position, which not every server has; see ``probe_chosen``.
    """

    advice = "start the server with a higher --max-logprobs"
    uncached = "--no-enable-prefix-caching"

    def __init__(self, chosen: bool = False) -> None:
        self.chosen = chosen

    def call(self, model: str, request: ScoreRequest) -> Call:
        """See ``Dialect.call``."""
        also, count = tuple(dict.fromkeys(request.also)), len(request.text)
        chosen = self.chosen and bool(also)
        params: dict[str, Any] = {"prompt_logprobs": max(_LEAST, request.top_k)}
        body: dict[str, Any]
        if chosen:
            params |= {"prompt_logprob_token_ids": [also] * count, "prompt_logprob_start": request.start - 1}
            params |= {"max_tokens": 1, "temperature": 1.0, "detokenize": False}
            body = {"model": model, "token_ids": list(request.ids), "sampling_params": params}
        else:
            body = _completion(model, list(request.ids)) | params
        body["return_token_ids"] = True

        def read(answer: Any) -> Result:
            choice = answer if chosen else _get(answer, "choices", 0)
            if (echoed := choice.get("prompt_token_ids")) is not None:
                _check_echo(list(echoed), list(request.ids))
            positions = _get(choice, "prompt_logprobs")
            _check_count(positions, len(request.ids))
            found = [
                {_id(key): entry["logprob"] for key, entry in (position or {}).items()}
                for position in positions[request.start :]
            ]
            result = self._result(found, request)
            if chosen and not isinstance(result, FromPrefixCache):
                _join(result, also, _matrix(_get(answer, "prompt_token_id_logprobs"), count, len(also)))
                result = checked(result, request)
            return result

        path = "/inference/v1/generate" if chosen else "/v1/completions"
        return Call(path, body | _salted("cache_salt", request), read, _limit(len(request.ids), request))

    def probe_chosen(self, model: str, request: ScoreRequest) -> Call:
        """The request whose result is whether the server returns chosen tokens as this dialect expects."""
        call = self.call(model, request)

        def read(answer: Any) -> bool:
            try:
                return isinstance(call.result(answer), list)
            except BadAnswerError:
                return False

        return replace(call, read=read, accepts_errors=True, final=frozenset({500}))

    def tokenize(self, model: str, text: str) -> Call:
        """See ``Dialect.tokenize``."""
        return self._tokenize(_token_ids, model=model, prompt=text)

    def context(self, model: str) -> Call | None:
        """See ``Dialect.context``."""

        def read(answer: Any) -> int | None:
            value = answer.get("max_model_len")
            return value if isinstance(value, int) and value > 0 else None

        return self._tokenize(read, model=model, prompt="a")

    def template(
        self, model: str, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any] | None = None
    ) -> Call | None:
        """See ``Dialect.template``."""
        given = {"chat_template_kwargs": dict(arguments)} if arguments else {}
        return self._tokenize(
            _token_ids, model=model, messages=list(messages), add_generation_prompt=True, **given
        )

    def _tokenize(self, read: Callable[[Any], Any], **body: Any) -> Call:
        return Call("/tokenize", body | {"add_special_tokens": False}, read)


class SGLang(Dialect):
    """``return_logprob`` of the native ``/generate``: [log-probability, id, text] of the tokens from
    ``logprob_start_len`` on, the first of which has no log-probability."""

    advice = "the server gives fewer than top_k tokens: lower teacher.served.top_k"
    uncached = "--disable-radix-cache"

    def __init__(self, bos_id: int | None) -> None:
        self._bos_id = bos_id

    def call(self, model: str, request: ScoreRequest) -> Call:
        """See ``Dialect.call``."""
        count = len(request.text)
        body = _generate(request.start - 1, input_ids=list(request.ids), top_logprobs_num=request.top_k)
        if request.also:
            body["token_ids_logprob"] = list(request.also)

        def read(answer: Any) -> Result:
            meta = _get(answer, "meta_info")
            own = _tail(meta, "input_token_logprobs", count)
            _check_echo([entry[1] for entry in own], list(request.text))
            found = [{entry[1]: entry[0]} for entry in own]
            for name, wanted in (
                ("input_top_logprobs", request.top_k),
                ("input_token_ids_logprobs", len(request.also)),
            ):
                for known, entries in zip(found, _tail(meta, name, count) if wanted else (), strict=False):
                    named = {index: logp for logp, index, *_ in entries or ()}
                    if len(named) < len(entries or ()):
                        raise BadAnswerError("names a token twice at one position")
                    known |= named | known
            return self._result(found, request)

        return Call("/generate", body | _salted("extra_key", request), read, _limit(count + 1, request))

    def tokenize(self, model: str, text: str) -> Call:
        """See ``Dialect.tokenize``; the tokens are those that it says it has read."""

        def read(answer: Any) -> list[int]:
            entries = _get(answer, "meta_info", "input_token_logprobs")
            ids: list[int] = _all(int, [entry[1] for entry in entries])
            return ids[1:] if ids[:1] == [self._bos_id] else ids

        return Call("/generate", _generate(0, text=text), read)


class OpenAI(Dialect):
    """``echo`` and ``logprobs`` of ``/v1/completions``, whose tokens are strings.

    A string counts as the one token whose text it is. Of a string that several tokens share, as U+FFFD often is, only
    the log-probability of the token that was sent is used.
    """

    advice = "the server limits logprobs: lower teacher.served.top_k to that"
    uncached = "--no-enable-prefix-caching, or what it calls that"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        ids_of: dict[str, list[int]] = {}
        for index in range(vocabulary.size):
            for text in self._strings(index):
                ids_of.setdefault(text, []).append(index)
        self._id_of = {text: ids[0] for text, ids in ids_of.items() if len(ids) == 1}

    def _strings(self, index: int) -> set[str]:
        """How a server may write a token: its number, as vLLM can be told to, and its text, or its name where it has
        none; a text that is no valid UTF-8 is written in many ways."""
        data = self._vocabulary.token_bytes(index)
        text = data.decode("utf-8", "replace") if data else self._vocabulary.label(index)
        return {f"token_id:{index}"} | ({text} if "\ufffd" not in text else set())

    def _reads_as(self, found: str, index: int) -> bool:
        """Whether a string of the server can be this token."""
        known = self._strings(index)
        if self._vocabulary.is_special[index]:
            return not found or found in known
        return len(known) == 1 or found in known

    def same_tokens(self, ids: Sequence[int], found: Sequence[Any]) -> bool:
        """See ``Dialect.same_tokens``."""
        return len(ids) == len(found) and all(map(self._reads_as, map(str, found), ids))

    def call(self, model: str, request: ScoreRequest) -> Call:
        """See ``Dialect.call``."""
        body = _completion(model, list(request.ids)) | {"echo": True, "logprobs": max(_LEAST, request.top_k)}

        def read(answer: Any) -> Result:
            logprobs = _get(answer, "choices", 0, "logprobs")
            tokens, own, top = (_get(logprobs, n) for n in ("tokens", "token_logprobs", "top_logprobs"))
            # The one token that was drawn may come after them.
            for each in (tokens, own, top):
                _check_count(each, len(request.ids), at_most=len(request.ids) + 1)
            found: list[dict[int, Any]] = []
            for place, index in enumerate(request.text, request.start):
                if not self._reads_as(tokens[place], index):
                    raise BadAnswerError(
                        f"has read {tokens[place]!r} where {self._vocabulary.label(index)!r} was sent"
                    )
                known = {index: own[place]}
                for text, logp in (top[place] or {}).items():
                    if (other := self._id_of.get(text)) is not None:
                        known.setdefault(other, logp)
                found.append(known)
            return self._result(found, request, enough=False)

        return Call(
            "/v1/completions",
            body | _salted("cache_salt", request),
            read,
            _limit(len(request.ids), request),
        )

    def tokenize(self, model: str, text: str) -> Call:
        """See ``Dialect.tokenize``; strings, as they are echoed."""
        bos = self._vocabulary.bos_id

        def read(answer: Any) -> list[str]:
            tokens: list[str] = _all(str, _get(answer, "choices", 0, "logprobs", "tokens"))[:-1]
            return tokens[1:] if bos is not None and tokens and tokens[0] in self._strings(bos) else tokens

        return Call("/v1/completions", _completion(model, text) | {"echo": True, "logprobs": 1}, read)


def checked(found: Sequence[Mapping[Any, Any]], request: ScoreRequest, uncached: str = "") -> list[TokenLogp]:
    """The log-probabilities of each position, the token that was sent first; of the others only those above −∞.

    ``uncached`` is the option that switches the prefix cache off, where an empty answer may be due to that.

    Raises:
        BadAnswerError: a token that was sent is missing; an id is none; a value is no number, NaN, or above 0; the mass
            of a position is above 1.
    """
    results = []
    for place, (index, known) in enumerate(zip(request.text, found, strict=True), request.start):
        hint = ""
        if uncached and not any(known.values()):  # nothing, nulls, zeros
            hint = f"; is that in its prefix cache? start it with {uncached}"
        if known.get(index) is None:
            raise BadAnswerError(
                f"has no log-probability of token {index}, which was sent at position {place}" + hint
            )
        kept = {index: math.nan}
        for other, value in known.items():
            if type(other) is not int or not 0 <= other < 2**31:
                raise BadAnswerError(f"gives {shown(other)} as a token id at position {place}")
            logp = _logp(value, place)
            if other == index or logp > -math.inf:
                kept[other] = logp
        mass = math.fsum(map(math.exp, kept.values()))
        if mass > 1 + MOST_ABOVE_ONE:
            raise BadAnswerError(f"gives tokens of {mass:.4g} probability together at position {place}{hint}")
        results.append(kept)
    return results


def _logp(value: Any, place: int) -> float:
    logp = -math.inf if value is None or value in ("-Infinity", "-inf") else value
    if type(logp) not in (int, float) or not logp < math.inf:
        raise BadAnswerError(f"gives {shown(value)} as a log-probability at position {place}")
    if logp > MOST_ABOVE_ONE:
        raise BadAnswerError(f"gives a log-probability of {logp:.4g} at position {place}, above 0")
    return logp if logp > NEVER_NATS else -math.inf


def _from_prefix_cache(found: Sequence[Mapping[Any, Any]], request: ScoreRequest) -> bool:
    """Whether the first position has nothing but zeros and nulls, as some servers write for what is in their prefix
    cache. Where a token is certain indeed, the others are far below 0."""
    if request.salt or request.trusted or not found:
        return False
    return all(value is None or (type(value) in (int, float) and value == 0) for value in found[0].values())


def _matrix(text: str, rows: int, width: int) -> npt.NDArray[np.float32]:
    """The float32 numbers of an array in NumPy's file format, in base64.

    Raises:
        ValueError: it is none, or has another shape or type.
    """
    file = BytesIO(base64.b64decode(text, validate=True))
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of the format")
    if np.lib.format.read_array_header_1_0(file) != ((rows, width), False, np.dtype("<f4")):
        raise ValueError("another array")
    return np.frombuffer(file.read(), "<f4").reshape(rows, width)


def _join(found: Sequence[TokenLogp], also: Sequence[int], logp: npt.NDArray[np.float32]) -> None:
    """Adds chosen tokens to each position.

    Raises:
        BadAnswerError: a token that was there already has another value: another position, or no logarithms.
    """
    for known, row in zip(found, logp.tolist(), strict=True):
        for index, value in zip(also, row, strict=True):
            before = known.setdefault(index, value)
            if abs(before - value) > MOST_APART and max(before, value) > NEVER_NATS:
                raise BadAnswerError(
                    f"gives log-probabilities of {before:.4g} and {value:.4g} of token {index}"
                )


def _completion(model: str, prompt: Any) -> dict[str, Any]:
    """The body of a completion; which token is drawn does not matter, and a temperature of 1 changes nothing."""
    return {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 1.0}


def _generate(start: int, **body: Any) -> dict[str, Any]:
    params = {"max_new_tokens": 0, "temperature": 1.0}
    return body | {"sampling_params": params, "return_logprob": True, "logprob_start_len": start}


def _salted(key: str, request: ScoreRequest) -> dict[str, str]:
    return {key: request.salt} if request.salt else {}


def _id(key: str) -> int:
    """The id that a key of JSON names, in the one way that numbers are written."""
    if not (key.isascii() and key.isdecimal()) or key != str(int(key)):
        raise BadAnswerError(f"gives {shown(key)} as a token id")
    return int(key)


def _get(value: Any, *path: str | int) -> Any:
    for key in path:
        value = value[key]
        if value is None:
            raise BadAnswerError(f"sends no {key}; look at api")
    return value


def _token_ids(answer: Any) -> Any:
    return _all(int, _get(answer, "tokens"))


def _all(kind: type, values: Any) -> Any:
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise BadAnswerError("sends something else than tokens; look at api")
    return values


def _check_echo(found: list[int], sent: list[int]) -> None:
    if found != sent:
        raise BadAnswerError("has read other tokens than were sent")


def _check_count(positions: Sequence[Any], count: int, at_most: int | None = None) -> None:
    if not count <= len(positions) <= (at_most or count):
        raise BadAnswerError(f"answers for {len(positions)} tokens where {count} were sent")


def _tail(meta: Any, name: str, count: int) -> list[Any]:
    """The entries of the tokens that are scored; the one before them may come first."""
    entries = _get(meta, name)
    if len(entries) not in (count, count + 1):
        raise BadAnswerError(f"answers for {len(entries)} tokens where {count + 1} were asked for")
    return list(entries[-count:])


def _limit(positions: int, request: ScoreRequest) -> int:
    return 2**20 + _ENTRY_BYTES * positions * (request.top_k + len(request.also) + 2)
