"""The HTTP APIs that return log-probabilities of given tokens: vLLM, SGLang, OpenAI's echo."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gold.errors import ConfigError
from gold.http import BadAnswerError, Call, shown
from gold.tokenize.vocabulary import Vocabulary

TokenLogp = dict[int, float]
"""Log-probabilities (nats) of some tokens at one position, by id; only the token that was sent can have −∞."""
NEVER_NATS = -9999.0
"""vLLM's substitute for −∞, which JSON cannot express; lower values, null and "-Infinity" also mean −∞."""
MOST_ABOVE_ONE = 1e-3
"""Rounding tolerance for a probability, or the mass of several, above 1."""
MOST_APART = 0.1
"""The largest difference between two log-probabilities of one token in one answer, in nats."""
_LEAST = 2
"""The minimum of requested top tokens: if the first has probability 1, the second shows that it was computed."""
_ENTRY_BYTES = 256
"""The longest line of JSON for one token, whose text may have 64 bytes."""


@dataclass(frozen=True)
class ScoreRequest:
    """Token ids of a prompt followed by the text to be scored, which begins at ``start``.

    Requests the ``top_k`` tokens of highest probability at each position and, if the server supports it, the tokens of
    ``also``. With ``salt``, unique to this request, the server bypasses its prefix cache. Zeros at the beginning can
    mean that the prefix cache has no log-probabilities there; with ``trusted`` they are taken as they are.
    """

    ids: tuple[int, ...]
    start: int
    top_k: int
    also: tuple[int, ...] = ()
    salt: str = ""
    trusted: bool = False

    @property
    def text(self) -> tuple[int, ...]:
        """The ids to be scored."""
        return self.ids[self.start :]


class FromPrefixCache:
    """The result of an answer that begins with zeros or nothing only: the prefix cache has no log-probabilities."""


Result = list[TokenLogp] | FromPrefixCache


class Dialect:
    """The API of one kind of server."""

    advice: str
    """The setting to change on a server that returns too few top tokens."""
    uncached: str
    """The option that disables its prefix cache."""
    chosen = False
    """True if it returns the tokens of ``also`` at every position."""

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Self:
        """The dialect for a server whose model has this vocabulary."""
        return cls()

    def call(self, model: str, request: ScoreRequest) -> Call:
        """The request for the log-probabilities of ``request.text``.

        Its result is one ``TokenLogp`` per token, or ``FromPrefixCache`` if the request has neither salt nor trust.
        """
        raise NotImplementedError

    def tokenize(self, model: str, text: str) -> Call:
        """The request for the server's tokenization of a text: ids, or strings if it has no ids."""
        raise NotImplementedError

    def same_tokens(self, ids: Sequence[int], found: Sequence[Any]) -> bool:
        """True if the result of ``tokenize`` is consistent with these ids."""
        return list(ids) == list(found)

    def context(self, model: str) -> Call | None:
        """The request for the server's context length in tokens (None: not reported); None if not supported."""
        return None

    def template(
        self, model: str, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any] | None = None
    ) -> Call | None:
        """The request for the ids of messages in the server's chat template; None if not supported."""
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
    """``prompt_logprobs`` of ``/v1/completions``; the first position has none. −∞ is returned as −9999.

    With ``chosen`` the tokens of ``also`` are returned too, by ``prompt_logprob_token_ids`` of
    ``/inference/v1/generate``, a list for each position, which not every server supports; see ``probe_chosen``.
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
        """The request that tests whether the server returns chosen tokens as this dialect expects."""
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
    """``return_logprob`` of the native ``/generate``.

    It returns [log-probability, id, text] of the tokens from ``logprob_start_len`` on, the first of which has no
    log-probability.
    """

    advice = "the server gives fewer than top_k tokens: lower teacher.served.top_k"
    uncached = "--disable-radix-cache"

    def __init__(self, bos_id: int | None) -> None:
        self._bos_id = bos_id

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Self:
        """See ``Dialect.of``."""
        return cls(vocabulary.bos_id)

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
        """See ``Dialect.tokenize``; the tokens are the input tokens that the server reports."""

        def read(answer: Any) -> list[int]:
            entries = _get(answer, "meta_info", "input_token_logprobs")
            ids: list[int] = _all(int, [entry[1] for entry in entries])
            return ids[1:] if ids[:1] == [self._bos_id] else ids

        return Call("/generate", _generate(0, text=text), read)


class OpenAI(Dialect):
    """``echo`` and ``logprobs`` of ``/v1/completions``, which identify tokens by strings.

    A string is matched to the one token with that text. If several tokens share a string, as is often the case for
    U+FFFD, only the log-probability of the token that was sent is used.
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

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Self:
        """See ``Dialect.of``."""
        return cls(vocabulary)

    def _strings(self, index: int) -> set[str]:
        """The strings by which a server may name a token: its id (an option of vLLM), its text, or its name without
        one.

        A text that is not valid UTF-8 is written in many ways.
        """
        data = self._vocabulary.token_bytes(index)
        text = data.decode("utf-8", "replace") if data else self._vocabulary.label(index)
        return {f"token_id:{index}"} | ({text} if "\ufffd" not in text else set())

    def _reads_as(self, found: str, index: int) -> bool:
        """True if a string of the server can be this token."""
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
            # The sampled token may follow them.
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
        """See ``Dialect.tokenize``; the echoed strings."""
        bos = self._vocabulary.bos_id

        def read(answer: Any) -> list[str]:
            tokens: list[str] = _all(str, _get(answer, "choices", 0, "logprobs", "tokens"))[:-1]
            return tokens[1:] if bos is not None and tokens and tokens[0] in self._strings(bos) else tokens

        return Call("/v1/completions", _completion(model, text) | {"echo": True, "logprobs": 1}, read)


DIALECTS: dict[str, type[Dialect]] = {"vllm": VLLM, "sglang": SGLang, "openai": OpenAI}
"""The dialects by the name that ``api`` of a configuration has; ``ServedConfig.api`` in ``gold/config.py`` lists the
same names."""


def dialect_of(api: str, vocabulary: Vocabulary) -> Dialect:
    """The dialect of this name for a server whose model has this vocabulary.

    Raises:
        ConfigError: there is none of this name.
    """
    if (kind := DIALECTS.get(api)) is None:
        *names, last = DIALECTS
        raise ConfigError(f"api: expected {', '.join(names)} or {last}, got {api!r}")
    return kind.of(vocabulary)


def checked(found: Sequence[Mapping[Any, Any]], request: ScoreRequest, uncached: str = "") -> list[TokenLogp]:
    """The log-probabilities of each position, the token that was sent first; of the others only those above −∞.

    ``uncached`` is the option that disables the prefix cache, which may be the reason for an empty answer.

    Raises:
        BadAnswerError: a token that was sent is missing; an id is invalid; a value is no number, NaN, or above 0; the
            mass
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
    """True if the first position has only zeros and nulls, which some servers write for tokens in their prefix cache.

    If a token really has probability 1, the others are far below 0.
    """
    if request.salt or request.trusted or not found:
        return False
    return all(value is None or (type(value) in (int, float) and value == 0) for value in found[0].values())


def _matrix(text: str, rows: int, width: int) -> npt.NDArray[np.float32]:
    """The float32 numbers of an array in NumPy's file format, in base64.

    Raises:
        ValueError: it is no such array, or has another shape or dtype.
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
        BadAnswerError: a token that is already present has another value: another position, or not log-probabilities.
    """
    for known, row in zip(found, logp.tolist(), strict=True):
        for index, value in zip(also, row, strict=True):
            before = known.setdefault(index, value)
            if abs(before - value) > MOST_APART and max(before, value) > NEVER_NATS:
                raise BadAnswerError(
                    f"gives log-probabilities of {before:.4g} and {value:.4g} of token {index}"
                )


def _completion(model: str, prompt: Any) -> dict[str, Any]:
    """The body of a completion request; the sampled token is ignored, and a temperature of 1 changes nothing."""
    return {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 1.0}


def _generate(start: int, **body: Any) -> dict[str, Any]:
    params = {"max_new_tokens": 0, "temperature": 1.0}
    return body | {"sampling_params": params, "return_logprob": True, "logprob_start_len": start}


def _salted(key: str, request: ScoreRequest) -> dict[str, str]:
    return {key: request.salt} if request.salt else {}


def _id(key: str) -> int:
    """The id in a key of a JSON object; only the canonical decimal form is accepted."""
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
    """The entries of the scored tokens; an entry for the token before them is dropped."""
    entries = _get(meta, name)
    if len(entries) not in (count, count + 1):
        raise BadAnswerError(f"answers for {len(entries)} tokens where {count + 1} were asked for")
    return list(entries[-count:])


def _limit(positions: int, request: ScoreRequest) -> int:
    return 2**20 + _ENTRY_BYTES * positions * (request.top_k + len(request.also) + 2)
