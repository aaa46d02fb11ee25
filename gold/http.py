"""HTTP requests with limits on concurrency, size and time, retries with backoff, and one-line errors."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import ssl
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cache
from ipaddress import ip_address
from time import time
from typing import Any
from urllib.parse import urlsplit

import httpx2

from gold.activity import report
from gold.errors import ConfigError, GoldError, TeacherError

logger = logging.getLogger(__name__)

MOST_WAIT_S = 300.0
"""A server that asks for a longer pause counts as unavailable."""
LONGEST_BACKOFF_S = 30.0
_REPORT_S = 0.2
"""Seconds after which a wait for answers is reported, and may be left."""
_QUOTED_BYTES = 65536
"""The number of bytes read of an error's body; one line of it is shown."""
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""Statuses after which a retry may succeed."""


class BadAnswerError(Exception):
    """An answer that does not match the request; the message completes a sentence about the server."""


class RefusedError(GoldError):
    """A request that the server understood and rejects; a retry would not help. It is raised as a subclass of the
    server's ``error`` too."""


def _refused(error: type[GoldError]) -> type[GoldError]:
    return type("RefusedError", (RefusedError, error), {})


class _FaultError(Exception):
    """A failed attempt that may be retried; the message completes a sentence about the server."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Call:
    """One request: the path below the server's root, its JSON body, and ``read``, which parses the answer.

    ``read`` raises ``BadAnswerError`` for an answer that cannot be used; the request is then repeated. A status in
    ``final`` is a rejection, even if it is usually retried. ``accepts_errors``: ``read`` also receives error answers.
    ``advice``: by status, what to do about a rejection. ``as_text``: the answer is text, not JSON. ``retried``: whether
    a failed attempt may be repeated by itself.
    """

    path: str
    body: Mapping[str, Any]
    read: Callable[[Any], Any]
    limit_bytes: int = 2**20
    final: frozenset[int] = frozenset()
    accepts_errors: bool = False
    advice: Mapping[int, str] = field(default_factory=dict)
    as_text: bool = False
    retried: bool = True
    method: str = "POST"

    def result(self, answer: Any) -> Any:
        """The result of an answer of any JSON type.

        Raises:
            BadAnswerError: it cannot be used.
        """
        if isinstance(answer, dict) and (error := answer.get("error")) and not self.accepts_errors:
            found = error.get("message") if isinstance(error, dict) else error
            line = found if isinstance(found, str) else shown(found)
            raise BadAnswerError(f"answers with an error in place of a result: {line}")
        try:
            return self.read(answer)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise BadAnswerError("sends JSON of another shape than this API's; look at api") from error


@dataclass
class Server:
    """A server by its URL (including ``/v1`` if it has that), with concurrency and retry settings.

    ``concurrency`` requests run at a time; each attempt has ``timeout_s`` in total. A failed attempt is repeated up to
    ``retries`` times, first after about ``first_wait_s``, then twice as long each time, or as long as the server asks
    for. ``key`` is sent as a bearer token and never shown. ``repeated`` counts repeated requests. ``error`` is raised
    for everything that goes wrong.

    Raises:
        ConfigError: an invalid URL, or one that contains a key.
    """

    url: str
    concurrency: int = 8
    timeout_s: float = 60.0
    retries: int = 5
    key: str | None = field(default=None, repr=False)
    first_wait_s: float = 0.5
    error: type[GoldError] = TeacherError
    repeated: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_url(self.url)

    @property
    def root(self) -> str:
        """The URL without ``/v1``."""
        return self.url.rstrip("/").removesuffix("/v1")

    def ask(self, calls: Sequence[Call]) -> list[Any]:
        """The result of each call, in order; they are sent in this order too.

        Only failed calls are repeated. Either all are answered or an error is raised: there is no partial result.

        Raises:
            RefusedError: a request that the server rejects.
            GoldError: ``error`` for no usable answer after all retries, an answer that is too long, an invalid
                certificate, a redirect, SSL_CERT_FILE or a proxy variable that cannot be used.
        """
        return _run(self._ask(calls)) if calls else []

    async def _ask(self, calls: Sequence[Call]) -> list[Any]:
        slots = asyncio.Semaphore(self.concurrency)
        async with self._client() as client:
            tasks = [asyncio.create_task(self._insist(client, slots, call)) for call in calls]
            try:
                return await _all(tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _client(self) -> httpx2.AsyncClient:
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        near = is_near(self.url)
        try:
            bare = near and urlsplit(self.url).scheme == "http"
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if bare else _tls()
        except (OSError, ValueError) as error:  # ssl errors are OSErrors
            raise self._error(
                f"SSL_CERT_FILE cannot be read as certificates: {self._line(str(error))}; correct or unset it"
            ) from error
        try:
            # The semaphore limits the connections, and one timeout around the whole attempt replaces those for its
            # parts, which a server that sends a byte at a time would never hit. Requests to this machine use no proxy.
            return httpx2.AsyncClient(
                headers=headers, limits=httpx2.Limits(), timeout=None, verify=tls, trust_env=not near
            )
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            what = type(error).__name__ if "@" in str(error) else self._line(str(error))
            raise self._error(
                f"HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or NO_PROXY cannot be used: {what}; correct or unset it"
            ) from error

    async def _insist(self, client: httpx2.AsyncClient, slots: asyncio.Semaphore, call: Call) -> Any:
        async with slots:
            retries = self.retries if call.retried else 0
            for attempt in range(retries + 1):
                try:
                    return await self._attempt(client, call)
                except _FaultError as fault:
                    if attempt == retries:
                        tries = f"{attempt + 1} attempts" if attempt else "1 attempt"
                        raise self._error(f"{fault}; no usable answer after {tries}") from fault
                    if fault.wait_s > MOST_WAIT_S:
                        raise self._error(f"{fault}; it asks for a pause of {fault.wait_s:.0f} s") from fault
                    backoff = min(LONGEST_BACKOFF_S, self.first_wait_s * 2**attempt)
                    self.repeated += 1
                    logger.info("%s: %s; attempt %d of %d failed", self.url, fault, attempt + 1, retries + 1)
                    # Jitter: requests rejected together must not be repeated together.
                    await asyncio.sleep(max(fault.wait_s, backoff * random.SystemRandom().uniform(0.5, 1.0)))
        raise AssertionError("unreachable")

    async def _attempt(self, client: httpx2.AsyncClient, call: Call) -> Any:
        data = json.dumps(call.body, separators=(",", ":")).encode()
        try:
            async with (
                asyncio.timeout(self.timeout_s),
                client.stream(call.method, self.root + call.path, content=data) as response,
            ):
                if response.status_code != 200:
                    await self._refuse(response, call)
                content = await _content(response, call.limit_bytes)
        except TimeoutError:
            raise _FaultError(f"has not answered within {self.timeout_s:g} s") from None
        except httpx2.DecodingError as error:
            raise _FaultError(f"sends an answer that cannot be decoded: {self._line(str(error))}") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError) as error:
            if invalid := _certificate_error(error):
                raise self._error(f"its certificate is not valid: {invalid}") from error
            if "location header" in str(error):  # parsed although it is not followed
                raise self._error(_redirected("")) from error
            raise _FaultError(
                f"cannot be reached: {self._line(str(error)) or type(error).__name__}"
            ) from error
        if len(content) > call.limit_bytes:
            raise self._error(f"sends more than the {call.limit_bytes:,} bytes that its answer can take")
        try:
            return call.result(content.decode() if call.as_text else json.loads(content))
        except BadAnswerError as error:
            raise _FaultError(self._line(str(error))) from error
        except (ValueError, RecursionError) as error:
            raise _FaultError(f"sends broken JSON ({len(content)} bytes)") from error

    async def _refuse(self, response: httpx2.Response, call: Call) -> None:
        status = response.status_code
        if 300 <= status < 400:
            raise self._error(self._line(_redirected(response.headers.get("location", "/"))))
        line = f"answers {status}"
        if message := self._line(_message(await _content(response, _QUOTED_BYTES))):
            line += f": {message}"
        if status in _PASSING - call.final:
            raise _FaultError(line, _pause_s(response.headers.get("retry-after")))
        advice = {
            401: "; name the variable that holds its key in key_env" if not self.key else "; look at the key",
            403: "; look at the key",
            404: f" for {call.path}; look at url, model and api",
        } | {known: f"; {what}" for known, what in call.advice.items()}
        raise _refused(self.error)(str(self._error(line + advice.get(status, ""))))

    def _error(self, fact: str) -> GoldError:
        return self.error(f"server {self.url}: {fact}")

    def _line(self, text: str) -> str:
        """A server's message on one short line, without the key, which some servers repeat."""
        if self.key:
            text = text.replace(self.key, "…")
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return line if len(line) <= 300 else f"{line[:299]}…"


def environment_key(variable: str | None, setting: str) -> str | None:
    """The key in an environment variable, if one is named; ``setting`` is the setting that names it.

    Raises:
        ConfigError: the variable is not set, or holds no key.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"{setting}: the environment has no variable of that name, or it is empty")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(f"{setting}: what the variable holds has characters that no key has")
    return key


def shown(value: Any) -> str:
    """A value of an answer for an error message, truncated; for nested values only the type."""
    if isinstance(value, str | int | float | bool | None):
        line = repr(value[:40] if isinstance(value, str) else value)
        return line if len(line) <= 50 else f"{line[:49]}…"
    return f"a {type(value).__name__}"


def is_near(url: str) -> bool:
    """True if a URL refers to this machine."""
    host = urlsplit(url).hostname or ""
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def check_url(url: str) -> None:
    """Checks that a URL is an HTTP URL without a key in it.

    Raises:
        ConfigError: it is not; the message does not repeat it, because of the key.
    """
    wrong = ConfigError("url: expected one such as http://localhost:8000/v1")
    if not url.isprintable() or " " in url or "\\" in url:
        raise wrong
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        if sound and "@" not in parts.netloc:
            httpx2.Request("POST", url)  # validates the characters of the host
    except (ValueError, httpx2.InvalidURL):
        raise wrong from None
    if not sound:
        raise wrong
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            "url: user, password, ? and # have no place in it; put a key into an environment variable and name that "
            "in key_env"
        )


@cache
def _tls() -> ssl.SSLContext:
    """The trusted certificates; loading them takes longer than a request."""
    return httpx2.create_ssl_context()


def _run(coroutine: Any) -> Any:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    # A notebook already has a running event loop, in which this must not block.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


async def _all(tasks: Sequence[asyncio.Task[Any]]) -> list[Any]:
    """The results of all tasks, or the first error; reports meanwhile how many are done."""
    waiting = set(tasks)
    while waiting:
        done, waiting = await asyncio.wait(waiting, timeout=_REPORT_S, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task in done:
                task.result()
        report(len(tasks) - len(waiting), len(tasks), "requests")
    return [task.result() for task in tasks]


async def _content(response: httpx2.Response, limit: int) -> bytes:
    """The body; reading stops when it exceeds the limit."""
    content = bytearray()
    async for part in response.aiter_bytes():
        content += part
        if len(content) > limit:
            break
    return bytes(content)


def _redirected(location: str) -> str:
    """The host of a redirect, to which the key would be sent too; the rest of the URL may contain secrets."""
    try:
        host = urlsplit(location).hostname or ("another path" if location else "no address that can be read")
    except ValueError:
        host = "no address that can be read"
    return f"redirects to {host}, which is not followed; set url to where the API is"


def _message(content: bytes) -> str:
    """The message in the body of an error, in the formats of the usual servers."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        for _ in range(3):
            if isinstance(found, dict):
                found = next((found[k] for k in ("error", "message", "detail") if found.get(k)), text)
        return found if isinstance(found, str) else json.dumps(found)
    except (ValueError, RecursionError):
        return text


def _pause_s(header: str | None) -> float:
    """The seconds of a Retry-After header; 0 if it is missing or invalid."""
    try:
        return max(0.0, float(header or 0.0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header or "").timestamp() - time())
    except (OverflowError, ValueError):
        return 0.0


def _certificate_error(error: BaseException) -> str:
    """The problem with a server's certificate; "" if something else failed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message or str(cause)
        cause = cause.__cause__ or cause.__context__
    return "" if "certificate" not in str(error).lower() else " ".join(str(error).split())
