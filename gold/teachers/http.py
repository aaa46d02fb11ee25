"""Asking a server: bounded concurrency, size and time, retries that wait, and one clear line where it cannot be had."""

from __future__ import annotations

import asyncio
import json
import logging
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

from gold.errors import ConfigError, TeacherError

logger = logging.getLogger(__name__)

MOST_WAIT_S = 300.0
"""A server that asks for a longer pause than this is taken to be gone."""
LONGEST_BACKOFF_S = 30.0
_QUOTED_BYTES = 65536
"""Read of an answer that is an error; a line of it is shown."""
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""Statuses of a server that may answer the same request later."""


class BadAnswerError(Exception):
    """An answer that is not what was asked for; the message says how, as the end of a sentence."""


@dataclass(frozen=True)
class Call:
    """One request: the path below the server's root, its JSON, and what makes the result of the answer's.

    ``read`` raises ``BadAnswerError`` for an answer that cannot be used; it is then asked for again. A status in
    ``final`` is a refusal, also where others would pass.
    """

    path: str
    body: Mapping[str, Any]
    read: Callable[[Any], Any]
    limit_bytes: int = 2**20
    final: frozenset[int] = frozenset()


class RefusedError(TeacherError):
    """A request that the server understood and refuses; asking again would not help."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Tally:
    """What has happened to a server's requests so far."""

    retries: int = 0


class _FaultError(Exception):
    """An attempt that failed in a way that may pass; the message says how, as the end of a sentence."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Server:
    """A server by its URL, as far as ``/v1`` where it has that, and how it is asked.

    ``concurrency`` requests are under way at a time; each is given ``timeout_s`` in all, and after a fault asked again
    up to ``retries`` times, the first time after about ``first_wait_s``, then twice as long each time, or as long as
    the server says. ``key`` is sent as a bearer token and shown nowhere. ``tally`` counts.

    Raises:
        ConfigError: a URL that is none, or that holds a key.
    """

    url: str
    concurrency: int = 8
    timeout_s: float = 60.0
    retries: int = 5
    key: str | None = field(default=None, repr=False)
    first_wait_s: float = 0.5
    tally: Tally = field(default_factory=Tally, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_url(self.url)

    @property
    def root(self) -> str:
        """The URL without ``/v1``."""
        return self.url.rstrip("/").removesuffix("/v1")

    def ask(self, calls: Sequence[Call]) -> list[Any]:
        """What each call's ``read`` makes of its answer, in their order; they are sent in this order too.

        Only what failed is asked again. Either all is answered or an error is raised: there is no partial result.

        Raises:
            RefusedError: a request that the server refuses.
            TeacherError: no usable answer after all retries, an answer that is too long, a certificate that is not
                valid, a redirect, SSL_CERT_FILE or a proxy variable that cannot be used.
        """
        return _run(self._all(calls)) if calls else []

    async def _all(self, calls: Sequence[Call]) -> list[Any]:
        slots = asyncio.Semaphore(self.concurrency)
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        limits = httpx2.Limits(
            max_connections=self.concurrency,
            max_keepalive_connections=self.concurrency,
            keepalive_expiry=60.0,
        )
        near = is_near(self.url)
        bare = near and urlsplit(self.url).scheme == "http"
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if bare else self._tls()
        try:
            # One bound on the whole attempt, below, stands for those on its parts: a server that drips would pass them.
            # A proxy has no part in what this machine asks itself.
            client = httpx2.AsyncClient(
                headers=headers, limits=limits, timeout=None, verify=tls, trust_env=not near
            )
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            what = f"{type(error).__name__}" if "@" in str(error) else self._line(str(error))
            raise self._error(
                f"HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or NO_PROXY cannot be used: {what}; correct or unset it"
            ) from error
        async with client:
            tasks = [asyncio.create_task(self._insist(client, slots, call)) for call in calls]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _insist(self, client: httpx2.AsyncClient, slots: asyncio.Semaphore, call: Call) -> Any:
        async with slots:
            for attempt in range(self.retries + 1):
                try:
                    return await self._attempt(client, call)
                except _FaultError as fault:
                    if attempt == self.retries:
                        tries = f"{attempt + 1} attempts" if attempt else "1 attempt"
                        raise self._error(f"{fault}; no usable answer after {tries}") from fault
                    if fault.wait_s > MOST_WAIT_S:
                        raise self._error(f"{fault}; it asks for a pause of {fault.wait_s:.0f} s") from fault
                    backoff = min(LONGEST_BACKOFF_S, self.first_wait_s * 2**attempt)
                    self.tally.retries += 1
                    logger.info(
                        "%s: %s; attempt %d of %d failed", self.url, fault, attempt + 1, self.retries + 1
                    )
                    # Whoever was refused together must not come back together.
                    await asyncio.sleep(max(fault.wait_s, backoff * random.SystemRandom().uniform(0.5, 1.0)))
        raise AssertionError("unreachable")

    async def _attempt(self, client: httpx2.AsyncClient, call: Call) -> Any:
        data = json.dumps(call.body, separators=(",", ":")).encode()
        try:
            async with (
                asyncio.timeout(self.timeout_s),
                client.stream("POST", self.root + call.path, content=data) as response,
            ):
                if response.status_code != 200:
                    await self._refuse(response, call)
                content = await self._content(response, call.limit_bytes)
        except TimeoutError:
            raise _FaultError(f"has not answered within {self.timeout_s:g} s") from None
        except httpx2.DecodingError as error:
            raise _FaultError(f"sends an answer that cannot be decoded: {self._line(str(error))}") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError) as error:
            if invalid := _certificate_error(error):
                raise self._error(f"its certificate is not valid: {invalid}") from error
            if "location header" in str(error):  # looked at though it is not followed
                raise self._error(_redirected("")) from error
            raise _FaultError(
                f"cannot be reached: {self._line(str(error)) or type(error).__name__}"
            ) from error
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _FaultError(f"sends broken JSON ({len(content)} bytes)") from error
        try:
            return call.read(answer)
        except BadAnswerError as error:
            raise _FaultError(self._line(str(error))) from error

    async def _content(self, response: httpx2.Response, limit: int) -> bytes:
        content = bytearray()
        async for part in response.aiter_bytes():
            content += part
            if len(content) > limit:
                raise self._error(f"sends more than the {limit:,} bytes that its answer can take")
        return bytes(content)

    async def _refuse(self, response: httpx2.Response, call: Call) -> None:
        status = response.status_code
        if 300 <= status < 400:
            raise self._error(self._line(_redirected(response.headers.get("location", "/"))))
        shown = f"answers {status}"
        told = b""
        async for part in response.aiter_bytes():
            told += part
            if len(told) > _QUOTED_BYTES:
                break
        if message := self._line(_message(told)):
            shown += f": {message}"
        if status in _PASSING - call.final:
            raise _FaultError(shown, _pause_s(response.headers.get("retry-after")))
        advice = {
            401: "; name the variable that holds its key in key_env" if not self.key else "; look at the key",
            403: "; look at the key",
            404: f" for {call.path}; look at url, model and api",
        }.get(status, "")
        raise RefusedError(str(self._error(shown + advice)), status)

    def _tls(self) -> ssl.SSLContext:
        try:
            return _tls()
        except (OSError, ValueError) as error:  # what ssl raises is an OSError
            raise self._error(
                f"SSL_CERT_FILE cannot be read as certificates: {self._line(str(error))}; correct or unset it"
            ) from error

    def _error(self, fact: str) -> TeacherError:
        return TeacherError(f"server {self.url}: {fact}")

    def _line(self, text: str) -> str:
        """A server's own words on one short line, without the key, which some servers repeat."""
        if self.key:
            text = text.replace(self.key, "…")
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return line if len(line) <= 300 else f"{line[:299]}…"


@cache
def _tls() -> ssl.SSLContext:
    """The certificates that are trusted; reading them takes longer than a request."""
    return httpx2.create_ssl_context()


def _redirected(location: str) -> str:
    """Where an answer would send a request, and with it the key: the host alone, since the rest may hold secrets."""
    try:
        host = urlsplit(location).hostname or ("another path" if location else "no address that can be read")
    except ValueError:
        host = "no address that can be read"
    return f"redirects to {host}, which is not followed; set url to where the API is"


def is_near(url: str) -> bool:
    """Whether a URL names this machine itself."""
    host = urlsplit(url).hostname or ""
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def check_url(url: str) -> None:
    """Nothing, where a URL is one of HTTP without a key in it.

    Raises:
        ConfigError: it is not; the message does not repeat it, because of the key.
    """
    wrong = "url: expected one such as http://localhost:8000/v1"
    if not url.isprintable() or " " in url or "\\" in url:
        raise ConfigError(wrong)
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        if sound and "@" not in parts.netloc:
            httpx2.Request("POST", url)  # what names a host is looked at no earlier
    except (ValueError, httpx2.InvalidURL):
        raise ConfigError(wrong) from None
    if not sound:
        raise ConfigError(wrong)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            "url: user, password, ? and # have no place in it; put a key into an environment variable and name that "
            "in key_env"
        )


def _run(coroutine: Any) -> Any:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    # In a notebook a loop is running already, which must not be waited in.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def _message(content: bytes) -> str:
    """What the body of an error says, where the usual servers put it."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for _ in range(3):
        if not isinstance(found, dict):
            break
        found = next((found[k] for k in ("error", "message", "detail") if found.get(k)), text)
    try:
        return found if isinstance(found, str) else json.dumps(found)
    except RecursionError:
        return text


def _pause_s(header: str | None) -> float:
    """Seconds that a Retry-After asks for, 0 for none or one that cannot be read."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time())
    except (OverflowError, ValueError):
        return 0.0


def _certificate_error(error: BaseException) -> str:
    """What is wrong with a server's certificate, "" where that is not what failed."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return seen.verify_message or str(seen)
        seen = seen.__cause__ or seen.__context__
    return "" if "certificate" not in str(error).lower() else " ".join(str(error).split())
