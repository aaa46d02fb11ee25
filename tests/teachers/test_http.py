"""Requests over the wire: what comes back instead of an answer, keys, URLs, proxies, certificates, pauses."""

from __future__ import annotations

import json
import math
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from support.server import OK_HEAD, ModelServer, Raw, served

from gold import ConfigError, Prompt, TeacherError
from gold.activity import Activity, Stopped, doing, listening, stoppable
from gold.http import Call, Server, _pause_s, _tls, is_near
from gold.models.language_model import LanguageModel
from gold.teachers.dialects import VLLM, ScoreRequest

IDS = (1, 5, 6)
KNOWN: list[dict[int, Any]] = [{5: -1.5, 4: -0.5}, {6: -0.25, 2: -2.0}]


def entries(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {str(i): {"logprob": v} for i, v in pairs}


GOOD = entries(*KNOWN[0].items()), entries(*KNOWN[1].items())


def completion(**choice: Any) -> bytes:
    known = {"choices": [{"prompt_logprobs": [None, *GOOD], "prompt_token_ids": [*IDS]}]}
    known["choices"][0] |= choice
    return json.dumps(known).encode()


def positions(*told: Any) -> bytes:
    return completion(prompt_logprobs=[None, *told])


BODIES = {
    "too few positions": (positions(GOOD[0]), "2 tokens where 3"),
    "too many positions": (positions(*GOOD, GOOD[1]), "4 tokens where 3"),
    "another order": (positions(*reversed(GOOD)), "token 5"),
    "another request's": (completion(prompt_token_ids=[1, 5, 7]), "other tokens"),
    "fewer than asked for": (positions(GOOD[0], entries((6, -0.25))), "--max-logprobs"),
    "an id in another way": (positions(GOOD[0], entries((6, -1), ("06", -2))), "'06'"),
    "an id of words": (positions(GOOD[0], entries((6, -1), ("six", -2))), "'six'"),
    "an id that is too large": (positions(GOOD[0], entries((6, -1), (2**31, -2))), "position 2"),
    "a number in quotes": (positions(GOOD[0], entries((6, "-1"), (2, -2))), "'-1'"),
    "NaN": (positions(GOOD[0], entries((6, math.nan), (2, -2))), "nan"),
    "∞": (positions(GOOD[0], entries((6, math.inf), (2, -2))), "inf"),
    "above 0": (positions(GOOD[0], entries((6, 0.1), (2, -2))), "0.1 at position 2"),
    "above 1 together": (positions(GOOD[0], entries((6, -0.1), (2, -0.1))), "1.81"),
    "a list for a number": (positions(GOOD[0], entries((6, [[-1]]), (2, -2))), "a list"),
    "an error in place of it": (b'{"error": {"message": "out of memory"}}', "out of memory"),
    "an error of words": (b'{"error": "overloaded"}', "overloaded"),
    "a part of it": (completion()[:90], "90 bytes"),
    "nothing": (b"", "0 bytes"),
    "deep JSON": (b"[" * 60_000, "JSON"),
    "deep and whole JSON": (b'{"choices": ' + b"[" * 900 + b"]" * 900 + b"}", "api"),
    "a number of 5,000 digits": (b'{"choices": ' + b"9" * 5000 + b"}", "JSON"),
    "a number of 4,000 digits": (completion(prompt_logprobs=10**4000), "api"),
    "no UTF-8": (b'{"choices": "\xff"}', "JSON"),
    "a number": (b"7", "api"),
    "null": (b"null", "api"),
    "no choices": (b'{"choices": []}', "api"),
    "a choice without": (b'{"choices": [{}]}', "api"),
    "a truth for a number": (positions(GOOD[0], entries((6, True), (2, -2))), "True"),
    "a list for a position": (positions(GOOD[0], [3]), "api"),
    "no position": (positions(GOOD[0], None), "token 6"),
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_an_answer_that_is_none_is_one_line_without_the_key(body: str) -> None:
    data, line = BODIES[body]
    with Raw(data) as raw:
        told = refusal(raw.url)
        assert raw.asked == 1 + 2  # others may answer the next time
    assert line in told
    assert "3 attempts" in told


def ask(url: str, **options: Any) -> list[Any]:
    server = Server(url, **{"retries": 2, "key": "sk-secret", "first_wait_s": 0.002} | options)
    return server.ask([VLLM().call("m", ScoreRequest(IDS, 1, 2))])


def refusal(url: str, **options: Any) -> str:
    with pytest.raises(TeacherError) as error:
        ask(url, **options)
    line = str(error.value)
    assert line.isprintable()
    assert len(line) < 700
    assert "secret" not in line
    assert line.startswith(f"server {url}: ")
    return line


WIRE: dict[str, tuple[bytes, str, int]] = {
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", "cannot be reached: ", 3),
    "cut short": (OK_HEAD + b"content-length: 900\r\n\r\n{", "cannot be reached: ", 3),
    "no number of bytes": (OK_HEAD + b"content-length: many\r\n\r\n{", "cannot be reached: ", 3),
    "no gzip": (OK_HEAD + b"content-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}", "cannot be decoded", 3),
    "control characters": (
        b"HTTP/1.1 400 Bad\r\ncontent-length: 12\r\n\r\na\x1b[31m\rb\x00\xe2\x80\xaec",
        "answers 400: a [31m b",
        1,
    ),
    "deep JSON of an error": (
        b"HTTP/1.1 400 Bad\r\ncontent-length: 2002\r\n\r\n" + b"[" * 2002,
        "answers 400: [[[",
        1,
    ),
    "redirect without an address": (
        b"HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n",
        "redirects to another path, which is not followed",
        1,
    ),
    "redirect to nowhere": (
        b"HTTP/1.1 302 Found\r\nlocation: http://[::1\r\ncontent-length: 0\r\n\r\n",
        "redirects to no address that can be read, which is not followed",
        1,
    ),
    "redirect to no port": (
        b"HTTP/1.1 302 Found\r\nlocation: http://h:port/\r\ncontent-length: 0\r\n\r\n",
        "which is not followed; set url to where the API is",
        1,
    ),
    "redirect with a password": (
        b"HTTP/1.1 302 Found\r\nlocation: http://me:sk-secret@h.example/\r\ncontent-length: 0\r\n\r\n",
        "redirects to h.example, which is not followed",
        1,
    ),
}


@pytest.mark.parametrize("wire", WIRE)
def test_what_is_no_answer_is_one_line_without_the_key(wire: str) -> None:
    data, line, asked = WIRE[wire]
    with Raw(data, head=False) as raw:
        assert line in refusal(raw.url)
        assert raw.asked == asked


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_key_is_never_sent_where_a_redirect_points(status: int) -> None:
    """Nor to the same host without encryption."""
    with Raw(completion()) as other:
        to = f"HTTP/1.1 {status} Moved\r\nlocation: {other.url}/v1/completions\r\ncontent-length: 0\r\n\r\n"
        with Raw(to.encode(), head=False) as raw:
            assert "redirects to 127.0.0.1, which is not followed" in refusal(raw.url)
        assert other.asked == 0


def test_an_answer_without_end_is_ended() -> None:
    endless = OK_HEAD + b"transfer-encoding: chunked\r\n\r\n"
    with Raw(endless, head=False, then=b"1\r\n \r\n", pause_s=0.02) as raw:
        assert "has not answered within 0.3 s" in refusal(raw.url, retries=0, timeout_s=0.3)
    with Raw(endless, head=False, then=b"fff0\r\n" + b" " * 0xFFF0 + b"\r\n") as raw:
        assert "sends more than the " in refusal(raw.url)
        assert raw.asked == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SSL_CERT_FILE", "/nowhere/at-all.pem"),
        ("SSL_CERT_FILE", __file__),
        ("ALL_PROXY", "ftp://h:1"),
        ("HTTPS_PROXY", "http://me:sk-secret@[::1"),
        ("HTTPS_PROXY", "http://h:port"),
    ],
)
def test_variables_that_cannot_be_used_are_one_line(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    _tls.cache_clear()
    try:
        assert name in refusal("https://h.example/v1")
        # What this machine serves itself is asked without a proxy, and without certificates where it has none.
        with Raw(completion()) as raw:
            assert ask(raw.url) == [KNOWN]
    finally:
        _tls.cache_clear()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_no_proxy_sees_what_this_machine_serves_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with Raw(b"{}") as proxy, Raw(completion()) as raw:
        monkeypatch.setenv(name, proxy.url)
        assert ask(raw.url) == [KNOWN]
        assert ask(raw.url.replace("127.0.0.1", "localhost")) == [KNOWN]
        assert proxy.asked == 0


@pytest.mark.parametrize(
    "url",
    [
        "http://ho st/v1", "http://host/v1\n", "http://host/\x1b[31m", "http://h\\sk-secret@host/v1", "http://host:0/v1",
        "http://host:99999/v1", "http://[::1", "http://[fe80::zz]/v1", "http://\u202ehost/v1", "//host/v1", "",
        "http://me:sk-secret@[::1/v1", "http:///v1", "localhost:8000/v1", "ftp://host/v1", "http://",
        "http://host:port/v1", "http://me:sk-secret@host/v1", "http://host/v1?key=sk-secret", "http://hostxn--/v1", "http://host:8a/v1",
    ],
)  # fmt: skip
def test_a_url_that_is_none_is_one_line(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^url: ") as error:
        Server(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "near"),
    [
        ("http://[::1]:8000/v1", True), ("http://127.0.0.5/v1", True), ("http://localhost/v1", True),
        ("http://a.localhost:1", True), ("http://0.0.0.0:8000", True), ("http://127.example/v1", False),
        ("http://10.0.0.1/v1", False), ("https://localhost.example/v1", False), ("http://[fe80::1]/v1", False),
    ],
)  # fmt: skip
def test_what_is_near(url: str, near: bool) -> None:
    assert Server(url).url == url
    assert is_near(url) == near


def test_pauses_that_a_server_asks_for() -> None:
    assert _pause_s("7") == 7.0
    assert _pause_s(None) == _pause_s("soon") == _pause_s("-3") == 0.0
    assert _pause_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert _pause_s("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_that_nobody_vouches_for_is_refused(
    teacher: LanguageModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out cert.pem "
    command += "-days 2 -subj /CN=here -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    text, prompt = teacher.vocabulary.encode("1"), Prompt("a", text="1")
    with ModelServer(teacher, tls=tls) as server:
        with pytest.raises(TeacherError, match=r"its certificate is not valid: self.signed certificate"):
            served(folder, server.url).score([prompt], [text], [True])
        assert not server.requests
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        _tls.cache_clear()
        try:
            assert len(served(folder, server.url).score([prompt], [text], [True])[0]) == 2
        finally:
            _tls.cache_clear()


def test_an_error_of_any_length_is_one_short_line(teacher: LanguageModel) -> None:
    with ModelServer(teacher) as server:
        call = Call("/v1/completions", {"model": "many\n\x1b[31mlines\n" * 2000}, lambda answer: answer)
        with pytest.raises(TeacherError) as error:
            Server(server.url).ask([call])
    assert "The model `many [31mlines many" in str(error.value)
    assert len(str(error.value)) < 500


def test_a_wait_for_an_answer_is_reported_and_can_be_left() -> None:
    """The server never answers; the listener asks to stop at its second report."""

    class Ear:
        heard = 0

        @property
        def stops(self) -> bool:
            return self.heard >= 2

        def hear(self, activity: Activity) -> None:
            assert (activity.done, activity.total, activity.unit) == (0, 1, "requests")
            self.heard += 1

    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = Server(f"http://127.0.0.1:{silent.getsockname()[1]}", 1, 60.0, 0, None)
        begun = time.monotonic()
        with pytest.raises(Stopped), doing("teacher"), listening(Ear()), stoppable():
            server.ask([Call("/", {}, lambda answer: answer)])
        assert time.monotonic() - begun < 20.0
