"""A served teacher scores as the same model in this process does, whatever its server does meanwhile."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tiny_models as tiny
import torch
from support.server import APIS, PASSING, Faults, ModelServer, always, served
from support.server import answer as reply

from gold import (
    CachedTeacher,
    ConfigError,
    LocalTeacher,
    Prompt,
    ServedTeacher,
    TeacherError,
)
from gold.align.model_inputs import aligned_text, teacher_logits
from gold.align.vocabularies import VocabularyPair
from gold.doctor.server import examine_noise, examine_server
from gold.kernels.lm_head import token_logp
from gold.kernels.logits import LazyLogits, TopKLogits
from gold.models.language_model import LanguageModel
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling, Segment
from gold.teachers.dialects import ScoreRequest


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


def graded(
    teacher: Any, student: LanguageModel, rollouts: list[Any]
) -> list[tuple[LazyLogits, torch.Tensor]]:
    """The rows of each text, and its targets, −1 for the stop event."""
    pair = VocabularyPair(student.vocabulary, teacher.vocabulary)
    texts = [aligned_text(r, pair) for r in rollouts]
    targets = [torch.tensor([*t.teacher.ids.tolist(), *([-1] * t.stopped)]) for t in texts]
    return list(zip(teacher_logits(teacher, rollouts, texts), targets, strict=True))


def event_logp(teacher: Any, student: LanguageModel, rollouts: list[Any]) -> torch.Tensor:
    stops = torch.tensor(teacher.vocabulary.stop_ids)
    found = []
    for rows, target in graded(teacher, student, rollouts):
        token, stop = token_logp(rows, target, stops)
        found.append(torch.where(target < 0, stop, token))
    return torch.cat(found).double()


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
            (positions,) = there.token_logp([there.request(prompt, text.ids.tolist(), True)])
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
    asked = there.request(Prompt("a", messages=({"role": "user", "content": "1"},)), [5], True)
    assert asked.ids[-1] == 0
    assert there.request(Prompt("a", text="1"), [5], True).ids[-1] == 2


def once(fault: str, *numbers: int) -> Faults:
    return lambda n: fault if n in numbers else None


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("api", APIS)
def test_a_fault_that_passes_changes_nothing(
    fault: str, api: str, teacher: LanguageModel, folder: Path
) -> None:
    text, prompts = teacher.vocabulary.encode("12 +3"), [Prompt(str(n), text=f" {n} =") for n in range(4)]
    with ModelServer(teacher, faults=once(fault, 0, 1, 3)) as server:
        there = served(folder, server.url, api=api, top_k=2, timeout_s=0.4 if fault == "slow" else 20.0)
        asked = [there.request(p, text.ids.tolist(), True) for p in prompts]
        faulty = there.token_logp(asked)
        server.faults = lambda n: None
        assert faulty == there.token_logp(asked)
        # Only what failed was asked again.
        assert len(server.requests) == 4 + 3 + 4


LINES = {
    "429": "answers 429: slow down; .* 4 attempts",
    "429 for long": "answers 429: slow down; .* 86400 s",
    "500": "answers 500: CUDA error; .* 4 attempts",
    "drop": "cannot be reached",
    "slow": "0.3 s; .* 4 attempts",
    "truncated": "JSON",
    "not JSON": "20 bytes",
    "another shape": "api",
    "NaN": "nan .* position 5",
    "positive": "above 0",
    "mass": "position 5",
    "short": "9 tokens where 10",
    "other tokens": "other tokens",
    "oversized": "1,.* bytes",
    "redirect": "elsewhere.example.* url",
}


@pytest.mark.parametrize("fault", LINES)
def test_a_fault_that_stays_is_one_line(fault: str, teacher: LanguageModel, folder: Path) -> None:
    text = teacher.vocabulary.encode("12 +3")
    with ModelServer(teacher, faults=always(fault)) as server:
        there = served(folder, server.url, top_k=2, timeout_s=0.3 if fault == "slow" else 20.0)
        with pytest.raises(TeacherError, match=LINES[fault]) as error:
            there.score([Prompt("a", text=" 1 =")], [text], [False])
        tries = 1 if fault in ("429 for long", "oversized", "redirect") else 4
        assert len(server.requests) == tries
    line = str(error.value)
    assert line.startswith(f"server {server.url}: ")
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


def asking(there: ServedTeacher) -> list[ScoreRequest]:
    ids = there.vocabulary.encode("12 +3").ids.tolist()
    return [there.request(Prompt(text, text=text), ids, True) for text in (" 1 =", " 2 =")]


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
        first = there.token_logp(asking(there))
        server.forgets = True
        assert equal(there.token_logp(asking(there)), first)
        assert (there.bypasses_cache, there.retries) == (False, 0)
        # Now it has read them, and nothing else of them can be told.
        assert equal(there.token_logp(asking(there)), first)
        assert (there.bypasses_cache, there.retries) == (True, 2)
        count = len(server.requests)
        assert equal(there.token_logp(asking(there)), first)
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
        there.token_logp(asking(there))
        with pytest.raises(
            TeacherError, match=r"cache_salt: unknown; .* start it with --no-enable-prefix-caching"
        ):
            there.token_logp(asking(there))
    with Forgetful(teacher) as server:
        with pytest.raises(TeacherError, match=r"probability together .*--no-enable-prefix"):
            served(folder, server.url).token_logp(asking(there))
        there = served(folder, server.url, api="sglang")
        with pytest.raises(TeacherError, match=r"no log-probability of token .*--disable-radix-cache"):
            there.token_logp(asking(there))


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
            assert [
                next(iter(known.values())) for each in there.token_logp(asking(there)) for known in each
            ] == [0.0] * 12
            assert len(server.requests) == count
        assert not there.bypasses_cache


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
        found = there.token_logp(asking(there))
        assert len(server.requests) == 1 + 2
        there.token_logp(asking(there))
        assert len(server.requests) == 1 + 4
        (check,) = [c for c in examine_server(there, tiny.prompts(2)) if c.check == "server"]
        other = served(two_stops, server.url, top_k=top_k, api="sglang")
        server.chosen = False
        told = other.token_logp(asking(other))
        ends = [[[{i: k[i] for i in (2, 0)} for k in each] for each in answers] for answers in (found, told)]
        assert equal(*ends)
    assert check.status == "pass"
    assert "all stop ids" in check.found
    stops = [next(iter(each[-1])) for each in found]
    assert stops == [2, 2]


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
