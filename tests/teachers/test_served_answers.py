"""What a server answers is taken for what it can be: probabilities of 0, counts, ids, sizes, times."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tiny_models as tiny
import torch
from support.server import ModelServer
from support.server import answer as reply

from gold import CachedTeacher, ConfigError, Prompt, Recipe, ServedTeacher, TeacherError, Term
from gold.doctor.server import examine_noise, examine_server
from gold.errors import TrainingError
from gold.evaluate import EvaluationPlan, evaluate
from gold.kernels.logits import LazyLogits, TopKLogits
from gold.models.language_model import LanguageModel
from gold.teachers.dialects import VLLM, Asked, Dialect, OpenAI, SGLang
from gold.teachers.http import BadAnswerError, Server, _tls, is_near
from gold.train.loop import distill

APIS = ("vllm", "sglang", "openai")
IDS = (1, 5, 6)
KNOWN: list[dict[int, Any]] = [{5: -1.5, 4: -0.5}, {6: -0.25, 2: -2.0}]
RECIPE = Recipe(
    (Term("reverse_kl"),),
    max_new_tokens=6,
    steps=1,
    prompts_per_step=2,
    num_generations=2,
    lr=3e-3,
    warmup_steps=1,
)


@pytest.fixture(scope="module")
def teacher() -> LanguageModel:
    return tiny.tiny_teacher()


@pytest.fixture(scope="module")
def folder(teacher: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's tokenizer, and nothing else of it."""
    path = tmp_path_factory.mktemp("tokenizer")
    teacher.tokenizer.save_pretrained(path)
    return path


def served(folder: Path, url: str, **options: Any) -> ServedTeacher:
    made = ServedTeacher(folder, url=url, **{"model": "tiny", "retries": 0, "top_k": 3} | options)
    made.server = replace(made.server, first_wait_s=0.002)
    return made


def dialect(api: str, vocabulary: Any) -> Dialect:
    return {"vllm": VLLM(), "sglang": SGLang(1), "openai": OpenAI(vocabulary)}[api]


def answer(api: str, vocabulary: Any, known: list[dict[int, Any]], top: Any = None) -> dict[str, Any]:
    """One that says this of ``IDS``, the token that was sent first; ``top``: the likeliest apart from that."""
    top = known if top is None else top
    own = [each[i] for each, i in zip(known, IDS[1:], strict=True)]
    if api == "vllm":
        positions = [None, *({str(i): {"logprob": v} for i, v in each.items()} for each in top)]
        return {"choices": [{"prompt_logprobs": positions, "prompt_token_ids": [*IDS]}]}
    if api == "sglang":
        pairs = [[[v, i, None] for i, v in each.items()] for each in top]
        tokens = [[None, 1, None], *([v, i, None] for v, i in zip(own, IDS[1:], strict=True))]
        return {"meta_info": {"input_token_logprobs": tokens, "input_top_logprobs": [None, *pairs]}}
    text = [vocabulary.token_bytes(i).decode() or vocabulary.label(i) for i in range(8)]
    strings = {
        "tokens": [text[i] for i in IDS],
        "token_logprobs": [None, *own],
        "top_logprobs": [None, *({text[i]: v for i, v in each.items()} for each in top)],
    }
    return {"choices": [{"logprobs": strings}]}


def read(api: str, vocabulary: Any, *told: Any) -> list[dict[int, float]]:
    call = dialect(api, vocabulary).call("m", Asked(IDS, 1, 2))
    found: list[dict[int, float]] = call.read(json.loads(json.dumps(answer(api, vocabulary, *told))))
    return found


# Probabilities of 0

ZEROS = (-9999.0, -9999, -1e9, -math.inf, "-Infinity", "-inf", -(10**400))


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("zero", [*ZEROS, None])
def test_another_token_of_probability_0_is_among_the_rest(
    api: str, zero: Any, teacher: LanguageModel
) -> None:
    assert read(api, teacher.vocabulary, [KNOWN[0], {6: -0.25, 2: zero}]) == [KNOWN[0], {6: -0.25}]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("zero", ZEROS)
def test_the_token_that_was_sent_keeps_its_probability_of_0(
    api: str, zero: Any, teacher: LanguageModel
) -> None:
    found = read(api, teacher.vocabulary, [KNOWN[0], {6: zero, 2: -2.0}])
    assert found == [KNOWN[0], {6: -math.inf, 2: -2.0}]
    assert [next(iter(known)) for known in found] == [5, 6]


@pytest.mark.parametrize("value", [-100.0, -9998.0, 0.0, 0])
def test_what_is_a_number_stays_one(value: float, teacher: LanguageModel) -> None:
    known = [KNOWN[0], {6: -800.0, 2: value}]
    assert read("vllm", teacher.vocabulary, known) == known


class Cutting(ModelServer):
    """Writes −9999 for all but the likeliest tokens of some requests, as vLLM does where it cuts them off."""

    cut: Any = staticmethod(lambda ids: True)
    likeliest = 3

    def _completion(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        told = super()._completion(body, fault)
        for entries in told["choices"][0]["prompt_logprobs"] if self.cut(body["prompt"]) else ():
            values = sorted((e["logprob"] for e in (entries or {}).values()), reverse=True)
            for entry in (entries or {}).values():
                left = math.log(sum(map(math.exp, values[: self.likeliest])))
                least = values[: self.likeliest][-1]
                entry["logprob"] = entry["logprob"] - left if entry["logprob"] >= least else -9999.0
        return told


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.lm.named_parameters()}


def test_a_text_of_probability_0_is_counted_told_of_and_left_out(
    teacher: LanguageModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objectives = (Term("reverse_kl"), Term("span_pg", weight=0.5))
    recipe = RECIPE.replace(objectives=objectives)
    with Cutting(teacher) as server:
        lost: list[tuple[int, ...]] = []

        def cut(ids: list[int]) -> bool:
            lost[:] = lost or [tuple(ids)]
            return tuple(ids) in lost

        server.cut = cut
        run = distill(tiny.tiny_student(), served(folder, server.url), tiny.prompts(), recipe)
    (step,) = run.steps
    assert step["teacher_impossible"] == 1
    assert step["applied"]
    assert 0.0 < step["loss"] < 100.0
    told = capsys.readouterr().err
    assert "probability 0" in told
    assert "tiny at http://127.0.0.1" in told
    assert "that of prompt " in told
    assert "token '" in told


def test_where_no_text_is_possible_no_step_is_taken(
    teacher: LanguageModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = tiny.tiny_student()
    before = weights(student)
    with Cutting(teacher) as server:
        server.likeliest = 1
        with pytest.raises(
            TrainingError, match="no text that the teacher finds possible and were not applied"
        ):
            distill(student, served(folder, server.url), tiny.prompts(), RECIPE)
        plan = EvaluationPlan(max_new_tokens=6)
        measures = evaluate(student, served(folder, server.url), tiny.heldout(2), plan=plan).measures
    assert "nothing is learned from 4 texts" in capsys.readouterr().err
    assert all(torch.equal(before[name], p) for name, p in weights(student).items())
    assert measures["impossible_share"] == 1.0
    assert "reverse_kl_per_byte" not in measures


def test_an_evaluation_is_over_the_texts_that_are_possible(teacher: LanguageModel, folder: Path) -> None:
    plan = EvaluationPlan(max_new_tokens=6)
    with Cutting(teacher) as server:
        server.cut = lambda ids, first=[]: tuple(ids) in (first or first.append(tuple(ids)) or first)
        measures = evaluate(
            tiny.tiny_student(), served(folder, server.url), tiny.heldout(2), plan=plan
        ).measures
    assert measures["impossible_share"] == 0.5
    assert 0.0 < measures["reverse_kl_per_byte"] < 50.0


def test_a_server_that_cuts_off_what_is_unlikely_is_found(teacher: LanguageModel, folder: Path) -> None:
    with Cutting(teacher) as server:
        there = served(folder, server.url, top_k=6)
        found = {c.check: c for c in examine_server(there, tiny.prompts(2))}["server"]
        assert examine_noise(there, tiny.prompts(2)).status == "pass"
    assert found.status == "fail"
    assert "probability 0" in found.found
    assert "processed_logprobs" in found.advice


def test_rows_that_tell_their_own_event_as_impossible() -> None:
    never = -math.inf
    ids = torch.tensor([[3, 4], [3, 4], [3, 4], [7, 8], [7, 8], [7, -1]])
    logp = torch.tensor([[-1, never], [never, -1], [-1, -1], [never, -1], [never, never], [-1, never]])
    target, stops = torch.tensor([3, 3, 5, -1, -1, -1]), torch.tensor([7, 8])
    rows = TopKLogits(ids, logp, 10)
    # A token that is not told of may be anything.
    assert rows.impossible(target, stops).tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize("zero", [-9999.0, -math.inf])
def test_a_cache_gives_back_probabilities_of_0(
    zero: float, teacher: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    """Also one of before, which holds them as servers write them."""
    vocabulary = teacher.vocabulary
    text, prompt = vocabulary.encode("12"), Prompt("a", text="1")

    class Served(ServedTeacher):
        def score(self, prompts: Any, tokenized_texts: Any, stopped: Any) -> list[LazyLogits]:
            ids = torch.tensor([[int(text.ids[0]), 9, 8], [int(text.ids[1]), 9, 8]])
            return [TopKLogits(ids, torch.tensor([[-0.5, -2.0, zero], [zero, -2.0, -0.5]]), vocabulary.size)]

    plain = Served(folder, url="http://127.0.0.1:1/v1", model="m", top_k=2)
    cached = CachedTeacher(plain, tmp_path)
    asked = [prompt], [text], [False]
    for rows in (cached.score(*asked)[0], CachedTeacher(plain, tmp_path).score(*asked)[0]):
        told = rows.logits()
        assert torch.isneginf(told[0, 8])
        assert torch.isneginf(told[1, int(text.ids[1])])
        target = torch.from_numpy(text.ids.astype(np.int64))
        assert rows.impossible(target, torch.tensor(vocabulary.stop_ids)).tolist() == [False, True]


# Whatever else comes back


def completion(**choice: Any) -> bytes:
    known = answer("vllm", None, KNOWN)
    known["choices"][0] |= choice
    return json.dumps(known).encode()


def positions(*told: Any) -> bytes:
    return completion(prompt_logprobs=[None, *told])


def entries(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {str(i): {"logprob": v} for i, v in pairs}


GOOD = entries(*KNOWN[0].items()), entries(*KNOWN[1].items())
BODIES = {
    "too few positions": (positions(GOOD[0]), "answers for 2 tokens where 3 were sent"),
    "too many positions": (positions(*GOOD, GOOD[1]), "answers for 4 tokens where 3 were sent"),
    "another order": (positions(*reversed(GOOD)), "no log-probability of token 5, which was sent at position 1"),
    "another request's": (completion(prompt_token_ids=[1, 5, 7]), "has read other tokens than were sent"),
    "fewer than asked for": (positions(GOOD[0], entries((6, -0.25))), "gives 1 tokens of a row where the 2"),
    "an id in another way": (positions(GOOD[0], entries((6, -1), ("06", -2))), "gives '06' as a token id"),
    "an id of words": (positions(GOOD[0], entries((6, -1), ("six", -2))), "gives 'six' as a token id"),
    "an id that is too large": (positions(GOOD[0], entries((6, -1), (2**31, -2))), "as a token id at position 2"),
    "a number in quotes": (positions(GOOD[0], entries((6, "-1"), (2, -2))), "gives '-1' as a log-probability"),
    "NaN": (positions(GOOD[0], entries((6, math.nan), (2, -2))), "gives nan as a log-probability at position 2"),
    "∞": (positions(GOOD[0], entries((6, math.inf), (2, -2))), "gives inf as a log-probability"),
    "above 0": (positions(GOOD[0], entries((6, 0.1), (2, -2))), "log-probability of 0.1 at position 2, above 0"),
    "above 1 together": (positions(GOOD[0], entries((6, -0.1), (2, -0.1))), "tokens of 1.81 probability together"),
    "a list for a number": (positions(GOOD[0], entries((6, [[-1]]), (2, -2))), "gives a list as a log-probability"),
    "an error in place of it": (b'{"error": {"message": "out of memory"}}', "in place of a result: out of memory"),
    "an error of words": (b'{"error": "overloaded"}', "in place of a result: overloaded"),
    "a part of it": (completion()[:90], "sends broken JSON (90 bytes)"),
    "nothing": (b"", "sends broken JSON (0 bytes)"),
    "deep JSON": (b"[" * 60_000, "sends broken JSON"),
    "deep and whole JSON": (b'{"choices": ' + b"[" * 900 + b"]" * 900 + b"}", "another shape"),
    "a number of 5,000 digits": (b'{"choices": ' + b"9" * 5000 + b"}", "sends broken JSON"),
    "a number of 4,000 digits": (completion(prompt_logprobs=10**4000), "another shape"),
    "no UTF-8": (b'{"choices": "\xff"}', "sends broken JSON"),
    "a number": (b"7", "another shape"),
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_an_answer_that_is_none_is_one_line_without_the_key(body: str) -> None:
    data, line = BODIES[body]
    with Raw(data) as raw:
        told = refusal(raw.url)
        assert raw.asked == 1 + 2  # others may answer the next time
    assert line in told
    assert told.endswith("; no usable answer after 3 attempts")


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("tokens", [7, None, "12", {"1": 2}, [[1]], [1.5], [True], [None, 1], [10**400, "x"]])
def test_tokens_that_are_none_are_one_line(api: str, tokens: Any, teacher: LanguageModel) -> None:
    """They are what a tokenizer here is compared with."""
    there = dialect(api, teacher.vocabulary)
    told = {
        "tokens": tokens,
        "meta_info": {
            "input_token_logprobs": [[None, t] for t in tokens] if isinstance(tokens, list) else tokens
        },
        "choices": [{"logprobs": {"tokens": tokens}}],
    }
    calls = there.tokenize("m", "12"), there.template("m", [])
    for call in filter(None, calls):
        with pytest.raises(BadAnswerError):
            call.read(json.loads(json.dumps(told)))


def test_a_sound_answer_passes() -> None:
    with Raw(completion()) as raw:
        assert ask(raw.url) == [KNOWN]


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n"
WIRE: dict[str, tuple[bytes, str, int]] = {
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", "cannot be reached: ", 3),
    "cut short": (HEAD + b"content-length: 900\r\n\r\n{", "cannot be reached: ", 3),
    "no number of bytes": (HEAD + b"content-length: many\r\n\r\n{", "cannot be reached: ", 3),
    "no gzip": (HEAD + b"content-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}", "cannot be decoded", 3),
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
    endless = HEAD + b"transfer-encoding: chunked\r\n\r\n"
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
        "http://me:sk-secret@[::1/v1", "http:///v1", "http://hostxn--/v1", "http://host:8a/v1",
    ],
)  # fmt: skip
def test_a_url_that_is_none_is_one_line(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        Server(url)
    assert "secret" not in str(error.value)
    assert str(error.value).startswith("url: ")


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


# What a server has in its prefix cache


def asking(there: ServedTeacher) -> list[Asked]:
    ids = there.vocabulary.encode("12 +3").ids.tolist()
    return [there.asked(Prompt(text, text=text), ids, True) for text in (" 1 =", " 2 =")]


def equal(one: Any, other: Any) -> bool:
    """Within what one token's length changes."""
    return bool(
        len(one) == len(other)
        and all(
            a.keys() == b.keys() and all(abs(a[i] - b[i]) < 1e-4 for i in a)
            for each, more in zip(one, other, strict=True)
            for a, b in zip(each, more, strict=True)
        )
    )


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("top_k", [0, 3])
def test_what_a_server_has_forgotten_is_asked_for_past_its_prefix_cache(
    api: str, top_k: int, teacher: LanguageModel, folder: Path
) -> None:
    with ModelServer(teacher) as server:
        there = served(folder, server.url, api=api, top_k=top_k)
        first = there.known(asking(there))
        server.forgets = True
        assert equal(there.known(asking(there)), first)
        assert (there.forgets, there.retries) == (False, 0)
        # Now it has read them, and nothing else of them can be told.
        assert equal(there.known(asking(there)), first)
        assert (there.forgets, there.retries) == (True, 2)
        count = len(server.requests)
        assert equal(there.known(asking(there)), first)
        assert len(server.requests) == count + 2
        found = examine_noise(there, tiny.prompts(2))
    salts = [body.get("cache_salt") or body.get("extra_key") for _, body in server.requests[-2:]]
    assert len(set(salts) - {None}) == 2
    assert found.status == "warn"
    assert there.dialect.uncached in found.advice


def test_a_server_that_forgets_whatever_it_is_asked_is_one_line(teacher: LanguageModel, folder: Path) -> None:
    class Forgetful(ModelServer):
        def forgot(self, body: dict[str, Any], ids: list[int]) -> bool:
            return True

    class Strict(ModelServer):
        def serve(self, handler: Any, path: str, body: dict[str, Any]) -> None:
            if "cache_salt" in body:
                return reply(handler, 400, {"error": {"message": "cache_salt: unknown"}})
            return super().serve(handler, path, body)

    with Strict(teacher) as server:
        server.forgets = True
        there = served(folder, server.url)
        there.known(asking(there))
        with pytest.raises(
            TeacherError, match=r"cache_salt: unknown; .* start it with --no-enable-prefix-caching"
        ):
            there.known(asking(there))
    with Forgetful(teacher) as server:
        with pytest.raises(TeacherError, match=r"probability together .*--no-enable-prefix"):
            served(folder, server.url).known(asking(there))
        there = served(folder, server.url, api="sglang")
        with pytest.raises(TeacherError, match=r"no log-probability of token .*--disable-radix-cache"):
            there.known(asking(there))


def test_a_token_that_is_certain_is_believed_in_the_end(teacher: LanguageModel, folder: Path) -> None:
    class Certain(ModelServer):
        def _completion(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
            told = super()._completion(body, fault)
            ids = body["prompt"]
            told["choices"][0]["prompt_logprobs"][1:] = [{str(i): {"logprob": 0.0}} for i in ids[1:]]
            return told

    with Certain(teacher) as server:
        there = served(folder, server.url, top_k=0)
        for count in (4, 8, 10, 12):
            assert [next(iter(known.values())) for each in there.known(asking(there)) for known in each] == [
                0.0
            ] * 12
            assert len(server.requests) == count
        assert not there.forgets


# Tokens that the client chooses


@pytest.fixture
def two_stops(teacher: LanguageModel, tmp_path: Path) -> Path:
    teacher.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return tmp_path


@pytest.mark.parametrize("top_k", [0, 3])
def test_all_stop_ids_are_told_where_a_server_lets_them_be_chosen(
    top_k: int, teacher: LanguageModel, two_stops: Path
) -> None:
    with ModelServer(teacher) as server:
        server.chosen = True
        there = served(two_stops, server.url, top_k=top_k)
        found = there.known(asking(there))
        assert len(server.requests) == 1 + 2
        there.known(asking(there))
        assert len(server.requests) == 1 + 4
        (check,) = [c for c in examine_server(there, tiny.prompts(2)) if c.check == "server"]
        other = served(two_stops, server.url, top_k=top_k, api="sglang")
        server.chosen = False
        assert equal([[{i: k[i] for i in (2, 0)} for k in each] for each in found],
                     [[{i: k[i] for i in (2, 0)} for k in each] for each in other.known(asking(other))])  # fmt: skip
    assert check.status == "pass"
    assert "all stop ids" in check.found
    stops = [next(iter(each[-1])) for each in found]
    assert stops == [2, 2]


def matrix(array: Any) -> str:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return base64.b64encode(file.getvalue()).decode()


def huge() -> str:
    head = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**40)}
    np.lib.format.write_array_header_1_0(head, shape)
    return base64.b64encode(head.getvalue()).decode()


CHOSEN = np.array([[-9.0, -2.0], [-9.0, -2.0]], np.float32)
MATRICES = {
    "none": None,
    "a number": 7,
    "no base64": "…",
    "no array": base64.b64encode(b"no array").decode(),
    "cut short": matrix(CHOSEN)[:-8],
    "too long": matrix(CHOSEN) + "AAAA",
    "another shape": matrix(CHOSEN[:1]),
    "turned": matrix(np.zeros((2, 3), np.float32).T),
    "another type": matrix(CHOSEN.astype(np.float64)),
    "objects": matrix(np.array([[{}, {}], [{}, {}]], object)),
    "a shape of 2^80": huge(),
    "NaN": matrix(CHOSEN * np.float32(math.nan)),
    "above 0": matrix(-CHOSEN),
    "above 1 together": matrix(CHOSEN * 0),
    "another position": matrix(CHOSEN - np.float32(1.0)),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_chosen_tokens_are_taken_apart_without_trust(kind: str) -> None:
    asked = Asked(IDS, 1, 2, (0, 2))
    told = answer("vllm", None, KNOWN)["choices"][0]
    read = VLLM(chosen=True).call("m", asked).read
    sound = read(told | {"prompt_token_id_logprobs": matrix(CHOSEN)})
    assert sound == [{**KNOWN[0], 0: -9.0, 2: -2.0}, {**KNOWN[1], 0: -9.0}]
    never = matrix(np.array([[-np.inf, -2.0], [-9.0, -2.0]], np.float32))
    assert 0 not in read(told | {"prompt_token_id_logprobs": never})[0]
    with pytest.raises(BadAnswerError):
        read(told | {"prompt_token_id_logprobs": MATRICES[kind]})
    probe = VLLM(chosen=True).choices("m", asked)
    assert probe.read(told | {"prompt_token_id_logprobs": matrix(CHOSEN)}) is True
    assert probe.read(told | {"prompt_token_id_logprobs": MATRICES[kind]}) is False
    assert probe.read({"choices": []}) is False


class Raw:
    """Answers every request with the same bytes, ``then`` others without end; ``asked`` counts."""

    def __init__(self, data: bytes, *, head: bool = True, then: bytes = b"", pause_s: float = 0.0) -> None:
        self.data = HEAD + b"content-length: %d\r\n\r\n" % len(data) + data if head else data
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


def ask(url: str, **options: Any) -> list[Any]:
    server = Server(url, **{"retries": 2, "key": "sk-secret", "first_wait_s": 0.002} | options)
    return server.ask([VLLM().call("m", Asked(IDS, 1, 2))])


def refusal(url: str, **options: Any) -> str:
    with pytest.raises(TeacherError) as error:
        ask(url, **options)
    line = str(error.value)
    assert line.isprintable()
    assert len(line) < 700
    assert "secret" not in line
    assert line.startswith(f"server {url}: ")
    return line
