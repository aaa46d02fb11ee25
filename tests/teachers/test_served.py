"""A served teacher grades as the same model in this process does, whatever its server does meanwhile."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tiny_models as tiny
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.command import run_gold
from support.server import Faults, ModelServer

import gold.build
from gold import ConfigError, DataError, LocalTeacher, Prompt, Recipe, ServedTeacher, TeacherError, Term
from gold.align.collate import read, teacher_rows
from gold.align.vocabularies import VocabularyPair
from gold.config import Config
from gold.doctor.server import examine_noise, examine_own, examine_server
from gold.evaluate import EvaluationPlan, evaluate
from gold.kernels.lm_head import token_logp
from gold.kernels.logits import LazyLogits
from gold.models.language_model import LanguageModel
from gold.models.load import save_model
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling, Segment
from gold.teachers.dialects import VLLM, Asked, OpenAI, SGLang
from gold.teachers.http import BadAnswerError, Call, Server, _pause_s, _tls
from gold.train.loop import Saving, distill
from gold.train.progress import step_summary

APIS = ("vllm", "sglang", "openai")


@pytest.fixture(scope="module")
def student() -> LanguageModel:
    return tiny.tiny_student()


@pytest.fixture(scope="module")
def teacher() -> LanguageModel:
    return tiny.tiny_teacher()


@pytest.fixture(scope="module")
def folder(teacher: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's tokenizer, and nothing else of it."""
    path = tmp_path_factory.mktemp("tokenizer")
    teacher.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def rollouts(student: LanguageModel) -> list[Any]:
    drawn = sample(
        HuggingFaceEngine(student),
        student,
        tiny.prompts(6),
        Sampling(max_new_tokens=12),
        seeds=[(n,) for n in range(6)],
    )
    # Ends that were sampled are rare with random weights; here every other text has one.
    ended = [_ended(r, student, bool(n % 2)) for n, r in enumerate(drawn)]
    return [
        replace(r, stopped=bool(n % 2), ids=ids, segments=(Segment(0, ids.size, True),))
        for n, (r, ids) in enumerate(zip(drawn, ended, strict=True))
    ]


def _ended(rollout: Any, student: LanguageModel, stopped: bool) -> Any:
    stop = np.array(student.vocabulary.stop_ids[:1], np.int32)
    return np.concatenate((rollout.tokenized.ids, stop)) if stopped else rollout.tokenized.ids


def served(folder: Path, url: str, **options: Any) -> ServedTeacher:
    quick = {"retries": 3, "timeout_s": 20.0, "model": "tiny"} | options
    first_wait_s = quick.pop("first_wait_s", 0.002)
    made = ServedTeacher(folder, url=url, **quick)
    made.server = replace(made.server, first_wait_s=first_wait_s)
    return made


def graded(
    teacher: Any, student: LanguageModel, rollouts: list[Any]
) -> list[tuple[LazyLogits, torch.Tensor]]:
    """The rows of each text, and its targets, −1 for the stop event."""
    pair = VocabularyPair(student.vocabulary, teacher.vocabulary)
    texts = [read(r, pair) for r in rollouts]
    targets = [torch.tensor([*t.teacher.ids.tolist(), *([-1] * t.stopped)]) for t in texts]
    return list(zip(teacher_rows(teacher, rollouts, texts), targets, strict=True))


def event_logp(teacher: Any, student: LanguageModel, rollouts: list[Any]) -> torch.Tensor:
    stops = torch.tensor(teacher.vocabulary.stop_ids)
    found = []
    for rows, target in graded(teacher, student, rollouts):
        token, stop = token_logp(rows, target, stops)
        found.append(torch.where(target < 0, stop, token))
    return torch.cat(found).double()


# The same grades


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("top_k", [0, 3])
def test_it_finds_texts_as_likely_as_the_model_itself(
    api: str, top_k: int, student: LanguageModel, teacher: LanguageModel, folder: Path, rollouts: list[Any]
) -> None:
    whole = event_logp(LocalTeacher(teacher), student, rollouts)
    with ModelServer(teacher) as server:
        there = served(folder, server.url, api=api, top_k=top_k)
        torch.testing.assert_close(event_logp(there, student, rollouts), whole, rtol=0, atol=2e-4)
        assert there.gives == ("top_k" if top_k else "tokens")


@pytest.mark.parametrize("api", APIS)
def test_with_every_token_known_its_rows_are_the_models_own(
    api: str, student: LanguageModel, teacher: LanguageModel, folder: Path, rollouts: list[Any]
) -> None:
    size = teacher.vocabulary.size
    with ModelServer(teacher) as server:
        there = served(folder, server.url, api=api, top_k=size)
        pairs = zip(
            graded(there, student, rollouts), graded(LocalTeacher(teacher), student, rollouts), strict=True
        )
        for (rows, _), (own, _) in pairs:
            assert rows.partial
            mine = rows.logits().exp()
            prob = torch.softmax(own.logits().double(), -1)
            torch.testing.assert_close(mine[:, :size], prob, rtol=0, atol=1e-5)
            assert mine[:, size].max() < 1e-5


def test_ids_are_sent_in_its_own_template_and_tokens(
    student: LanguageModel, teacher: LanguageModel, folder: Path, rollouts: list[Any]
) -> None:
    with ModelServer(teacher) as server:
        event_logp(served(folder, server.url, top_k=2), student, rollouts)
        sent = sorted(body["prompt"] for _, body in server.requests)
    encode = teacher.tokenizer.encode
    expected = [
        [
            *encode(r.prompt.text),
            *encode(r.text, add_special_tokens=False),
            *([teacher.tokenizer.eos_token_id] * r.stopped),
        ]
        for r in rollouts
    ]
    assert sent == sorted(expected)


def test_texts_of_no_tokens_are_not_asked_for(teacher: LanguageModel, folder: Path) -> None:
    empty = teacher.vocabulary.encode(b"")
    with ModelServer(teacher) as server:
        there = served(folder, server.url)
        rows = there.score([Prompt("a", text="1"), Prompt("b", text="2")], [empty, empty], [False, True])
        assert [len(r) for r in rows] == [0, 1]
        assert len(server.requests) == 1
        assert len(LazyLogits.joined(rows)) == 1


def test_several_stop_ids_are_one_event_as_far_as_they_are_known(
    teacher: LanguageModel, tmp_path: Path
) -> None:
    teacher.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    text, prompt = teacher.vocabulary.encode("12"), Prompt("a", text="1")
    with ModelServer(teacher) as server:
        for api, known in (("vllm", [2]), ("sglang", [2, 0])):
            there = served(tmp_path, server.url, api=api, top_k=0)
            assert there.vocabulary.stop_ids == (2, 0)
            (positions,) = there.known([there.asked(prompt, text.ids.tolist(), True)])
            assert set(known) <= set(positions[-1])
        (rows,) = there.score([prompt], [text], [True])
    stop = token_logp(rows, torch.tensor([-1] * 3), torch.tensor([2, 0]))[1][-1]
    both = math.exp(positions[-1][0]) + math.exp(positions[-1][2])
    assert float(stop) == pytest.approx(math.log(both), abs=1e-6)


def test_messages_end_with_the_stop_that_the_template_writes(teacher: LanguageModel, tmp_path: Path) -> None:
    tokenizer = teacher.tokenizer
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<pad>{% endif %}{% endfor %}="
    )
    there = served(tmp_path, "http://127.0.0.1:1/v1")
    asked = there.asked(Prompt("a", messages=({"role": "user", "content": "1"},)), [5], True)
    assert asked.ids[-1] == 0
    assert there.asked(Prompt("a", text="1"), [5], True).ids[-1] == 2


# Faults


def once(fault: str, *numbers: int) -> Faults:
    return lambda n: fault if n in numbers else None


def always(fault: str) -> Faults:
    return lambda n: fault


PASSING = (
    "429",
    "500",
    "drop",
    "slow",
    "truncated",
    "not JSON",
    "another shape",
    "NaN",
    "positive",
    "mass",
    "short",
)
"""Faults that a second request does not meet."""


@pytest.mark.parametrize("fault", [*PASSING, "other tokens"])
@pytest.mark.parametrize("api", APIS)
def test_a_fault_that_passes_changes_nothing(
    fault: str, api: str, teacher: LanguageModel, folder: Path
) -> None:
    text, prompts = teacher.vocabulary.encode("12 +3"), [Prompt(str(n), text=f" {n} =") for n in range(4)]
    with ModelServer(teacher, faults=once(fault, 0, 1, 3)) as server:
        there = served(folder, server.url, api=api, top_k=2, timeout_s=0.4 if fault == "slow" else 20.0)
        asked = [there.asked(p, text.ids.tolist(), True) for p in prompts]
        faulty = there.known(asked)
        server.faults = lambda n: None
        assert faulty == there.known(asked)
        # Only what failed was asked again.
        assert len(server.requests) == 4 + 3 + 4


LINES = {
    "429": "answers 429: slow down; no usable answer after 4 attempts",
    "429 for long": "answers 429: slow down; it asks for a pause of 86400 s",
    "500": "answers 500: CUDA error; no usable answer after 4 attempts",
    "drop": "cannot be reached: Server disconnected without sending a response",
    "slow": "has not answered within 0.3 s; no usable answer after 4 attempts",
    "truncated": "sends broken JSON (",
    "not JSON": "sends broken JSON (20 bytes)",
    "another shape": "look at api",
    "NaN": "gives nan as a log-probability at position 5",
    "positive": "above 0",
    "mass": "probability together at position 5",
    "short": "answers for 9 tokens where 10 were sent",
    "other tokens": "has read other tokens than were sent",
    "oversized": "sends more than the 1,",
    "redirect": "redirects to elsewhere.example, which is not followed; set url to where the API is",
}


@pytest.mark.parametrize("fault", LINES)
def test_a_fault_that_stays_is_one_line(fault: str, teacher: LanguageModel, folder: Path) -> None:
    text = teacher.vocabulary.encode("12 +3")
    with ModelServer(teacher, faults=always(fault)) as server:
        there = served(folder, server.url, top_k=2, timeout_s=0.3 if fault == "slow" else 20.0)
        with pytest.raises(TeacherError) as error:
            there.score([Prompt("a", text=" 1 =")], [text], [False])
        tries = 1 if fault in ("429 for long", "oversized", "redirect") else 4
        assert len(server.requests) == tries
    line = str(error.value)
    assert line.startswith(f"server {server.url}: ")
    assert LINES[fault] in line
    assert "\n" not in line


def test_nobody_there(teacher: LanguageModel, folder: Path) -> None:
    with socket.socket() as taken:  # bound, and listening to nobody
        taken.bind(("127.0.0.1", 0))
        there = served(folder, f"http://127.0.0.1:{taken.getsockname()[1]}/v1", retries=1)
        with pytest.raises(TeacherError, match=r"cannot be reached: .*; no usable answer after 2 attempts"):
            there.score([Prompt("a", text="1")], [teacher.vocabulary.encode("1")], [False])


def test_one_lost_text_stops_all_others(teacher: LanguageModel, folder: Path) -> None:
    """There is no partial answer, and nothing more is asked."""
    text, prompts = teacher.vocabulary.encode("12"), [Prompt(str(n), text=f" {n} =") for n in range(50)]
    with ModelServer(teacher, faults=always("500")) as server:
        there = served(folder, server.url, concurrency=2, retries=0)
        with pytest.raises(TeacherError, match="no usable answer after 1 attempt"):
            there.score(prompts, [text] * 50, [False] * 50)
        assert len(server.requests) <= 4


def test_no_more_requests_are_under_way_than_allowed(teacher: LanguageModel, folder: Path) -> None:
    under_way: list[int] = []
    most = 0

    def watch(n: int) -> None:
        nonlocal most
        under_way.append(n)
        most = max(most, len(under_way))
        time.sleep(0.01)
        under_way.remove(n)

    text, prompts = teacher.vocabulary.encode("12"), [Prompt(str(n), text=f" {n} =") for n in range(20)]
    with ModelServer(teacher, faults=watch) as server:
        served(folder, server.url, concurrency=3).score(prompts, [text] * 20, [True] * 20)
        lengths = [len(body["prompt"]) for _, body in server.requests]
    assert most <= 3
    assert len(lengths) == 20
    assert sum(lengths[:10]) >= sum(lengths[10:])  # the longest first, but for some that overtake each other


def test_it_can_be_asked_where_a_loop_is_running(teacher: LanguageModel, folder: Path) -> None:
    """As in a notebook."""

    async def cell() -> int:
        return len(there.score([Prompt("a", text="1")], [teacher.vocabulary.encode("1")], [True])[0])

    with ModelServer(teacher) as server:
        there = served(folder, server.url)
        assert asyncio.run(cell()) == 2


def test_a_server_is_given_the_pause_that_it_asks_for(teacher: LanguageModel, folder: Path) -> None:
    asked_at: list[float] = []

    def fault(n: int) -> str | None:
        asked_at.append(time.perf_counter())
        return None if n else "429 for a moment"

    with ModelServer(teacher, faults=fault) as server:
        served(folder, server.url).score([Prompt("a", text="1")], [teacher.vocabulary.encode("1")], [True])
    first, second = asked_at
    assert second - first >= 0.4


def test_pauses_that_a_server_asks_for() -> None:
    assert _pause_s("7") == 7.0
    assert _pause_s(None) == _pause_s("soon") == _pause_s("-3") == 0.0
    assert _pause_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert _pause_s("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9


# Keys and URLs


def test_a_key_is_sent_and_never_shown(
    teacher: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    text, prompt = teacher.vocabulary.encode("1"), Prompt("a", text="1")
    with ModelServer(teacher, key="sk-secret") as server:
        there = served(folder, server.url, key_env="TEACHER_KEY")
        there.score([prompt], [text], [True])
        assert server.keys == {"Bearer sk-secret"}
        assert "secret" not in repr(there.server) + there.name
        with pytest.raises(
            TeacherError, match=r"answers 401: Incorrect API key.*name the variable.*in key_env"
        ):
            served(folder, server.url).score([prompt], [text], [True])
        server.faults = always("quotes the key")
        with pytest.raises(TeacherError, match="answers 400: no good: Bearer …") as error:
            there.score([prompt], [text], [True])
        assert "secret" not in str(error.value)
    monkeypatch.setenv("TEACHER_KEY", " sk-secret\n")  # as a file ends
    assert served(folder, server.url, key_env="TEACHER_KEY").server.key == "sk-secret"
    monkeypatch.setenv("TEACHER_KEY", "sk\nsecret")
    with pytest.raises(ConfigError, match="characters that no key has") as refused:
        served(folder, server.url, key_env="TEACHER_KEY")
    assert "secret" not in str(refused.value)
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(ConfigError, match="key_env: the environment has no variable of that name"):
        served(folder, server.url, key_env="TEACHER_KEY")


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("localhost:8000/v1", "expected one such as"),
        ("ftp://host/v1", "expected one such as"),
        ("http://", "expected one such as"),
        ("http://host:port/v1", "expected one such as"),
        ("http://[::1/v1", "expected one such as"),
        ("http://me:sk-secret@host/v1", "have no place in it"),
        ("http://host/v1?key=sk-secret", "have no place in it"),
    ],
)
def test_a_url_that_cannot_be_used_is_not_repeated(url: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as error:
        Server(url)
    assert "secret" not in str(error.value)


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


# What a server may answer


def test_answers_are_taken_apart_without_trust() -> None:
    asked = Asked((1, 5, 6), 1, 2)
    read = VLLM().call("m", asked).read

    def entry(*pairs: tuple[int, Any]) -> dict[str, Any]:
        return {str(i): {"logprob": v} for i, v in pairs}

    def answer(*positions: Any) -> dict[str, Any]:
        return {"choices": [{"prompt_logprobs": [None, *positions]}]}

    good = read(answer(entry((4, -0.5), (5, -1.5)), entry((6, -9999.0), (4, 0))))
    assert good == [{5: -1.5, 4: -0.5}, {6: -math.inf, 4: 0}]
    assert [next(iter(known)) for known in good] == [5, 6]
    for bad, line in (
        (answer(entry((5, -1.0))), "answers for 2 tokens where 3 were sent"),
        (
            answer(entry((5, -1.0)), entry((7, -1.0))),
            "has no log-probability of token 6, which was sent at position 2",
        ),
        (answer(entry((5, -1.0)), entry((6, True))), "gives True as a log-probability"),
        (answer(entry((5, -1.0)), entry((6, "-1"))), "gives '-1' as a log-probability"),
        (answer(entry((5, -1.0)), entry((6, 0.1))), "above 0"),
        (answer(entry((5, -0.1)), entry((6, -0.5), (4, -0.5))), "gives tokens of 1.213 probability together"),
        (answer(entry((5, -1.0)), None), "has no log-probability of token 6"),
        (answer(entry((5, -1.0)), [3]), "another shape"),
        ({"choices": []}, "another shape"),
        ({"choices": [{}]}, "another shape"),
        ([], "another shape"),
        (None, "another shape"),
    ):
        with pytest.raises(BadAnswerError, match=line):
            read(bad)


IDS = (1, 5, 6)
KNOWN: list[dict[int, float]] = [{5: -1.5, 4: -0.5, 0: -9.0}, {6: -0.25, 2: -2.0, 7: -3.5}]


def answers(api: str) -> tuple[Any, Any]:
    """What reads an answer of this API, and one that says ``KNOWN`` of ``IDS``."""
    vocabulary = tiny.tiny_teacher().vocabulary
    asked = Asked(IDS, 1, 2, (0,), trusted=True)
    if api == "vllm":
        positions = [None, *({str(i): {"logprob": v} for i, v in known.items()} for known in KNOWN)]
        return VLLM().call("m", asked).read, {
            "choices": [{"prompt_logprobs": positions, "prompt_token_ids": [*IDS]}]
        }
    own = [known[i] for known, i in zip(KNOWN, IDS[1:], strict=True)]
    if api == "sglang":
        top = [[[v, i, None] for i, v in known.items()] for known in KNOWN]
        tokens = [[None, 1, None], *([v, i, None] for v, i in zip(own, IDS[1:], strict=True))]
        meta = {"input_token_logprobs": tokens, "input_top_logprobs": [None, *top]}
        return SGLang(1).call("m", asked).read, {
            "meta_info": meta | {"input_token_ids_logprobs": [None, [], []]}
        }
    dialect = OpenAI(vocabulary)
    text = [vocabulary.token_bytes(i).decode() or vocabulary.label(i) for i in range(8)]
    strings = {
        "tokens": [text[i] for i in IDS],
        "token_logprobs": [None, *own],
        "top_logprobs": [None, *({text[i]: v for i, v in known.items()} for known in KNOWN)],
    }
    return dialect.call("m", asked).read, {"choices": [{"logprobs": strings}]}


READERS = {api: answers(api) for api in APIS}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(10**400)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from places(child, (*path, key))


@pytest.mark.parametrize("api", APIS)
def test_a_sound_answer_is_what_it_says(api: str) -> None:
    read, answer = READERS[api]
    assert read(answer) == KNOWN


@pytest.mark.parametrize("api", APIS)
def test_an_answer_without_the_token_that_was_sent_is_refused(api: str) -> None:
    """It lies on the path: without it a text would have next to no probability."""
    read, sound = READERS[api]
    answer = json.loads(json.dumps(sound))
    if api == "vllm":
        del answer["choices"][0]["prompt_logprobs"][2]["6"]
    elif api == "sglang":
        answer["meta_info"]["input_token_logprobs"][2][0] = None
    else:
        answer["choices"][0]["logprobs"]["token_logprobs"][2] = None
    with pytest.raises(
        BadAnswerError, match=r"no log-probability of token 6|None as a log-probability"
    ) as error:
        read(answer)
    assert "at position 2" in str(error.value)


@pytest.mark.parametrize("api", APIS)
@given(data=st.data())
def test_an_answer_with_anything_in_it_is_refused_or_sound(api: str, data: st.DataObject) -> None:
    read, sound = READERS[api]
    answer = json.loads(json.dumps(sound))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(places(answer))))
        other = data.draw(ANYTHING)
        if not path:
            answer = other
        else:
            place = answer
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = other
    try:
        found = read(answer)
    except BadAnswerError:
        return
    assert len(found) == len(IDS) - 1
    for index, known in zip(IDS[1:], found, strict=True):
        assert next(iter(known)) == index
        assert all(type(i) is int and 0 <= i < 2**31 for i in known)
        assert all(math.isfinite(v) for i, v in known.items() if i != index)
        assert known[index] < math.inf
        assert sum(map(math.exp, known.values())) < 1.01


def test_an_error_of_any_length_is_one_short_line(teacher: LanguageModel) -> None:
    with ModelServer(teacher) as server:
        call = Call("/v1/completions", {"model": "many\n\x1b[31mlines\n" * 2000}, lambda answer: answer)
        with pytest.raises(TeacherError) as error:
            Server(server.url).ask([call])
    assert "The model `many [31mlines many" in str(error.value)
    assert len(str(error.value)) < 500


# Training


RECIPE = Recipe(
    (Term("reverse_kl"), Term("span_pg", weight=0.5)),
    max_new_tokens=10,
    steps=3,
    prompts_per_step=3,
    num_generations=2,
    lr=3e-3,
    warmup_steps=1,
)


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.lm.named_parameters()}


def trained(teacher: Any, recipe: Recipe = RECIPE) -> dict[str, torch.Tensor]:
    run = distill(tiny.tiny_student(), teacher, tiny.prompts(), recipe)
    return weights(run.student)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_survives_every_fault_that_passes_with_the_same_weights(
    teacher: LanguageModel, folder: Path
) -> None:
    with ModelServer(teacher) as server:
        whole = trained(served(folder, server.url))
        kinds = [*(kind for kind in PASSING if kind != "slow"), "other tokens"]
        # Every other request fails, each time in another way.
        server.scored, server.faults = 0, lambda n: kinds[n // 2 % len(kinds)] if n % 2 else None
        there = served(folder, server.url, retries=20)
        run = distill(tiny.tiny_student(), there, tiny.prompts(), RECIPE)
        faulty = weights(run.student)
        assert server.scored > 30
    assert_equal(whole, faulty)
    assert sum(step["teacher_retries"] for step in run.steps) == there.retries == server.scored - 18
    assert all(step["teacher_tokens_per_s"] > 0 for step in run.steps)
    assert " retries" in step_summary(run.steps[0])
    start = weights(tiny.tiny_student())
    assert any(not torch.equal(start[name], whole[name]) for name in start)


def test_a_run_waits_for_a_server_that_refuses_connections(teacher: LanguageModel, folder: Path) -> None:
    with ModelServer(teacher) as server:
        whole = trained(served(folder, server.url))
        url, port = server.url, server.port
    there = served(folder, url, retries=20, first_wait_s=0.05)
    opened: list[ModelServer] = []

    def open_late() -> None:
        while not there.retries:
            time.sleep(0.01)
        opened.append(ModelServer(teacher, port=port).__enter__())

    late = threading.Thread(target=open_late)
    late.start()
    try:
        assert_equal(whole, trained(there))
    finally:
        late.join()
        opened[0].__exit__(None, None, None)


def test_a_fault_that_stays_ends_a_run_in_one_line_with_what_it_had_learned(
    teacher: LanguageModel, folder: Path
) -> None:
    kept = []
    for fault in ("500", "NaN", "oversized", "redirect"):  # one of each kind
        student, recipe = tiny.tiny_student(), RECIPE.replace(steps=2)
        with ModelServer(teacher, faults=lambda n, fault=fault: fault if n >= 6 else None) as server:
            there = served(folder, server.url, retries=0)
            with pytest.raises(TeacherError, match=r"^after step 1: server http") as error:
                distill(student, there, tiny.prompts(), recipe)
        expected, line = (
            re.sub(r"\d+", "N", told) for told in (LINES[fault].split(";")[0], str(error.value))
        )
        assert expected in line
        assert "\n" not in str(error.value)
        kept.append(weights(student))
    for each in kept:
        assert_equal(kept[0], each)


def test_a_run_with_every_token_known_is_the_run_with_the_model_itself(
    teacher: LanguageModel, folder: Path
) -> None:
    with ModelServer(teacher) as server:
        there = trained(served(folder, server.url, top_k=teacher.vocabulary.size))
    here = trained(LocalTeacher(tiny.tiny_teacher()))
    for name in here:
        torch.testing.assert_close(there[name], here[name], rtol=0, atol=3e-4)


def test_an_objective_that_needs_more_is_refused(student: LanguageModel, folder: Path) -> None:
    there = served(folder, "http://127.0.0.1:1/v1", top_k=0)
    with pytest.raises(TeacherError, match="reverse_kl needs the likeliest tokens of each row"):
        distill(student, there, tiny.prompts(), Recipe((Term("reverse_kl"),)))
    there = served(folder, "http://127.0.0.1:1/v1", top_k=5)
    with pytest.raises(TeacherError, match="uld needs full rows"):
        distill(student, there, tiny.prompts(), Recipe((Term("uld"),)))


def test_a_prompt_that_it_cannot_read_is_named_before_the_run(
    student: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ raise_exception('no system prompt') }}")
    prompts = [Prompt("p7", messages=({"role": "user", "content": "1"},))]
    with pytest.raises(DataError, match=r"prompt p7: for teacher tiny at http.*no system prompt"):
        distill(student, served(tmp_path / "t", "http://127.0.0.1:1/v1"), prompts, RECIPE)


LOSSES = {
    "the first evaluation": 1,
    "the first step": 2 + 3,
    "the evaluation of step 2, which no checkpoint would be due after": 6 + 6 + 1,
    "step 4, and the evaluation of step 2 is there": 2 + 6 + 2,
    "the last evaluation": 6 + 1,
}
"""The server's requests until it is gone: 6 of a step, 2 of the evaluations after steps 0, 2 and 4."""


def test_a_run_whose_server_goes_away_again_and_again_is_the_run_of_one_that_stays(
    teacher: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    recipe, plan = RECIPE.replace(steps=4), EvaluationPlan(max_new_tokens=10)

    def run(output: Path, resume: bool) -> dict[str, torch.Tensor]:
        saving = Saving(output, resume=resume, evaluate_every=2, checkpoint_every=3)
        there = served(folder, server.url, retries=0)
        done = distill(
            tiny.tiny_student(), there, tiny.prompts(), recipe,
            heldout=tiny.heldout(2), evaluation=plan, saving=saving,
        )  # fmt: skip
        return weights(done.student)

    with ModelServer(teacher) as server:
        whole = run(tmp_path / "whole", resume=False)
        assert server.scored == 3 * 2 + 4 * 6
        steps = []
        for number, requests in enumerate(LOSSES.values()):
            server.scored, server.faults = 0, lambda n, last=requests: "500" if n >= last else None
            with pytest.raises(
                TeacherError, match=r"CUDA error.*; its checkpoint is kept, go on with --resume$"
            ) as lost:
                run(tmp_path / "run", resume=number > 0)
            steps.append(int(str(lost.value).split(":")[0].removeprefix("after step ")))
        assert steps == [0, 0, 2, 3, 4]
        server.faults = lambda n: None
        assert_equal(run(tmp_path / "run", resume=True), whole)
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("_s", "tokens_per_s"))} for line in lines]


def test_an_evaluation_has_what_a_served_teacher_can_tell(teacher: LanguageModel, folder: Path) -> None:
    plan = EvaluationPlan(max_new_tokens=10)
    with ModelServer(teacher) as server:
        there = evaluate(tiny.tiny_student(), served(folder, server.url), tiny.heldout(4), plan=plan).measures
    here = evaluate(
        tiny.tiny_student(), LocalTeacher(tiny.tiny_teacher()), tiny.heldout(4), plan=plan
    ).measures
    assert "forward_kl_per_byte" in here
    assert "forward_kl_per_byte" not in there
    assert there["reverse_kl_per_byte"] == pytest.approx(here["reverse_kl_per_byte"], abs=1e-4)


# The probe


def verdicts(checks: list[Any]) -> dict[str, str]:
    return {check.check: check.status for check in checks}


@pytest.mark.parametrize("api", APIS)
def test_a_good_server_passes(api: str, teacher: LanguageModel, student: LanguageModel, folder: Path) -> None:
    with ModelServer(teacher) as server:
        there = served(folder, server.url, api=api, top_k=5)
        assert verdicts(examine_server(there, tiny.prompts(5))) == {"server": "pass", "tokenization": "pass"}
        assert examine_noise(there, tiny.prompts(5), student).status == "pass"
        # Without texts of a run, its own.
        assert set(verdicts(examine_server(there)).values()) == {"pass"}


@pytest.mark.parametrize("api", APIS)
def test_another_tokenizer_is_found(
    api: str, teacher: LanguageModel, student: LanguageModel, folder: Path
) -> None:
    with ModelServer(teacher, tokenizer=student) as server:
        found = {c.check: c for c in examine_server(served(folder, server.url, api=api), tiny.prompts(5))}
    assert found["tokenization"].status == "fail"
    assert "teacher.path" in found["tokenization"].advice


@pytest.mark.parametrize("api", ["vllm", "openai"])
def test_too_few_log_probabilities_are_found(api: str, teacher: LanguageModel, folder: Path) -> None:
    with ModelServer(teacher, max_logprobs=4) as server:
        (check,) = examine_server(served(folder, server.url, api=api, top_k=5), tiny.prompts(5))
        assert examine_server(served(folder, server.url, api=api, top_k=4))[0].status == "pass"
    assert check.status == "fail"
    assert "greater than max allowed: 4" in check.found
    assert {"vllm": "--max-logprobs", "openai": "teacher.served.top_k"}[api] in check.advice


def test_the_servers_template_is_compared(teacher: LanguageModel, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %} ="
    )
    talk = Prompt("a", messages=({"role": "user", "content": "1"},), completion=" 2")
    with ModelServer(teacher) as server:
        there = served(tmp_path / "t", server.url)
        found = []
        for server.template in (None, there.prompt_ids(talk), [5]):
            check = examine_server(there, [talk])[-1]
            found.append((check.check, check.status, check.concerns))
    assert found == [
        ("template", "warn", ("messages",)),
        ("template", "pass", ()),
        ("template", "warn", ("messages",)),
    ]


def test_noise_is_measured(teacher: LanguageModel, student: LanguageModel, folder: Path) -> None:
    with ModelServer(teacher, faults=always("noise")) as server:
        there = served(folder, server.url)
        alone, beside = examine_noise(there, tiny.prompts(5)), examine_noise(there, tiny.prompts(5), student)
        itself = examine_noise(there, tiny.prompts(5), teacher)
    assert (alone.status, beside.status, itself.status) == ("warn", "warn", "fail")
    assert "student and teacher" in beside.found
    assert "let one replica answer" in beside.advice


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("top_k", [0, 3])
def test_a_student_is_its_own_served_self(
    api: str, top_k: int, student: LanguageModel, teacher: LanguageModel, folder: Path
) -> None:
    with ModelServer(teacher) as server:
        there = served(folder, server.url, api=api, top_k=top_k)
        own, talks = examine_own(there, tiny.prompts(5), teacher), [Prompt("a", text="1", completion=" 2")]
        assert own.status == examine_own(there, talks, teacher).status == "pass", own
        # Weights of another model behind the same tokenizer.
        server.model = tiny.tiny_teacher(seed=7)
        other = examine_own(there, tiny.prompts(5), teacher)
        # One that reads every token one place late.
        server.model, server.faults = teacher, always("late")
        late = examine_own(there, tiny.prompts(5), teacher)
    assert (other.status, late.status) == ("fail", "fail")
    assert f"serve the weights of {folder}" in other.advice


def test_a_key_without_encryption_is_warned_of(
    teacher: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gold.doctor.server import _key, _Served

    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    for url, warned in (
        ("http://far.example/v1", 1),
        ("https://far.example/v1", 0),
        ("http://localhost:1/v1", 0),
    ):
        there = served(folder, url, key_env="TEACHER_KEY")
        assert len(_key(_Served(there, [], []))) == warned


# As a user


class Bench:
    """A configuration with a served teacher, and commands on it."""

    def __init__(
        self, folder: Path, tokenizer: Path, url: str, capfd: pytest.CaptureFixture[str], patch: Any
    ) -> None:
        save_model(tiny.tiny_student(), folder / "student")
        self.folder, self.capfd, self.patch = folder, capfd, patch
        there = {"url": url, "model": "tiny", "top_k": 5, "retries": 0, "key_env": "TEACHER_KEY"}
        teacher = {"path": str(tokenizer), "served": there, "device": "cpu"}
        self.settings = tiny.run_settings(
            folder, folder / "run", teacher=teacher, train__steps=2, train__prompts_per_step=2,
            train__checkpoint_every=9, evaluate__every=9, evaluate__prompts=1,
        )  # fmt: skip

    def gold(self, *words: str) -> tuple[int, str, str]:
        file = tiny.write_settings(self.folder / "run.yaml", self.settings)
        return run_gold(self.patch, self.capfd, words[0], file, *words[1:])


@pytest.fixture
def server(teacher: LanguageModel) -> Iterator[ModelServer]:
    with ModelServer(teacher, key="sk-secret") as made:
        yield made


@pytest.fixture
def bench(
    server: ModelServer,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    monkeypatch.setattr(gold.build, "_draw", lambda *_: None)  # takes seconds
    return Bench(tmp_path, folder, server.url, capfd, monkeypatch)


def test_train_evaluate_and_doctor(bench: Bench, server: ModelServer) -> None:
    code, out, err = bench.gold("doctor")
    assert code == 0, out + err
    assert "tokenization" in out
    assert "noise" in out
    assert "--weights loads the student" in out
    out = bench.gold("doctor", "--weights")[1]
    assert "teacher served elsewhere" in out
    assert "student and teacher differ" in out
    assert "  self KL: " in out
    assert "served:" not in out  # another model than the student
    code, out, err = bench.gold("train")
    assert code == 0, err
    server.faults = always("500")
    code, out, err = bench.gold("eval")
    assert (code, err.count("\n")) == (1, 1)
    assert "answers 500: CUDA error; no usable answer after 1 attempt" in err
    server.faults = lambda n: None
    assert bench.gold("eval")[0] == 0
    for file in (bench.folder / "run").rglob("*"):
        assert not file.is_file() or b"sk-secret" not in file.read_bytes()
    assert yaml.safe_load((bench.folder / "run" / "config.yaml").read_text())["teacher"]["served"]["key_env"]


def test_a_run_stops_in_one_line_and_goes_on_at_another_address(
    bench: Bench, server: ModelServer, teacher: LanguageModel
) -> None:
    assert bench.gold("train", f"output={bench.folder / 'whole'}")[0] == 0
    # 13 requests of the probe, 1 of the evaluation, 4 of a step.
    server.faults, server.scored = (lambda n: "500" if n > 13 + 1 + 4 else None), 0
    code, _, err = bench.gold("train")
    (line,) = [line for line in err.splitlines() if not line.startswith("gold: ")]
    assert code == 1
    assert line.startswith("error: after step 1: server http")
    assert line.endswith("its checkpoint is kept, go on with --resume")
    with ModelServer(teacher) as other:
        code, _, err = bench.gold("train", "--resume", f"teacher.served.url={other.url}")
    assert code == 0, err
    one, other_one = (bench.folder / name / "student" / "model.safetensors" for name in ("run", "whole"))
    assert one.read_bytes() == other_one.read_bytes()


def test_another_tokenizer_and_replica_noise_are_named_before_the_first_step(
    server: ModelServer, bench: Bench, student: LanguageModel, teacher: LanguageModel
) -> None:
    server.tokenizer = student.vocabulary
    code, _, err = bench.gold("train")
    assert (code, err.count("\n")) == (1, 1)
    assert "tokenization: the server reads" in err
    server.tokenizer, server.faults = teacher.vocabulary, always("noise")
    code, out, err = bench.gold("train")
    assert code == 0, err
    (line,) = [line for line in (out + err).splitlines() if "noise: " in line]
    assert "answers to the same request" in line


def test_a_student_that_is_served_is_compared_with_itself(
    server: ModelServer, bench: Bench, tmp_path: Path
) -> None:
    """Its folder is named on both sides: what is served must be what is trained."""
    server.model = tiny.tiny_student()
    server.tokenizer = server.model.vocabulary
    bench.settings["teacher"]["path"] = bench.settings["student"]["path"]
    code, out, err = bench.gold("doctor", "--weights")
    assert "pass  self KL, served: " in out, out + err
    server.model = tiny.tiny_student(seed=9)
    code, out, err = bench.gold("doctor", "--weights")
    assert code == 1
    assert "fail  self KL, served: " in out
    code, _, err = bench.gold("train")
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "self KL, served: " in line
    assert not (bench.folder / "run").exists()


def test_a_server_that_cannot_serve_the_run_is_refused_before_a_model_is_loaded(
    bench: Bench, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_model(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(gold.build, "load_model", load_model)

    def refused(*words: str) -> str:
        code, _, err = bench.gold("train", *words)
        assert (code, err.count("\n")) == (1, 1), err
        return err

    server.max_logprobs = 3
    assert "server: server http://127.0.0.1" in (line := refused())
    assert "--max-logprobs" in line
    assert "does not exist" in refused("teacher.served.model=other")
    assert "needs top_k: it takes teacher.served.top_k above 0" in refused("teacher.served.top_k=0")
    assert "needs rows: it takes a teacher in this process" in refused("objectives.0.name=uld")
    assert "no variable of that name" in refused("teacher.served.key_env=NOT_SET")
    there = bench.settings["teacher"]["served"]
    for key, value in (("key_env", "sk-secret"), ("url", "http://me:sk-secret@b/v1")):
        before, there[key] = there[key], value
        assert f"teacher.served.{key}: " in (line := refused())
        assert "secret" not in line
        there[key] = before
    assert not (bench.folder / "run").exists()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "teacher.served.key_env=sk-secret",
            "override teacher.served.key_env=…: teacher.served.key_env: expected",
        ),
        ("teacher.served.key_env={sk-secret: 1}", "expected text, got something else"),
        ("teacher.served.key_env=[sk-secret", "override teacher.served.key_env=…: expected ',' or ']'"),
        ("teacher.served.key_env.x=sk-secret", "teacher.served.key_env is something else, which has no keys"),
        ("teacher.served.api_key=sk-secret", "teacher.served.api_key: unknown key"),
        ("teacher.served.url=http://me:sk-secret@h/v1", "user, password, ? and # have no place in it"),
        ("teacher.served=sk-secret", "teacher.served: expected keys and values, got something else"),
        ("teacher={path: t, served: {url: http://h, model: m, key_env: sk-secret}}", "override teacher=…: "),
        ("teacher.served.key_env:sk-secret", "override teacher…: expected section.key=value"),
    ],
)
def test_a_key_typed_into_an_override_is_not_repeated(override: str, line: str, tmp_path: Path) -> None:
    there = {"url": "http://h/v1", "model": "m", "key_env": "sk-secret2"}
    settings = tiny.run_settings(tmp_path, tmp_path / "run", teacher={"path": "t", "served": there})
    file = tiny.write_settings(tmp_path / "run.yaml", settings)
    with pytest.raises(ConfigError) as error:
        Config.load(file, [override])
    assert line in str(error.value)
    assert "secret" not in str(error.value)


def test_the_keys_of_a_configuration() -> None:
    text = Config.model_validate(
        {
            "student": {"path": "a"},
            "teacher": {"path": "b", "served": {"url": "http://h/v1", "model": "m"}},
            "data": {"prompts": "c"},
            "output": "d",
        }
    ).to_dict()["teacher"]["served"]
    assert text == {
        "url": "http://h/v1",
        "model": "m",
        "api": "vllm",
        "top_k": 20,
        "concurrency": 8,
        "timeout_s": 60.0,
        "retries": 5,
        "key_env": None,
        "context": None,
    }
