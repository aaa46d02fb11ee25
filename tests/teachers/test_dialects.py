"""Answers of each kind of server: log-probabilities that they can mean, and everything that they cannot."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import support.tiny_models as tiny
from hypothesis import given
from hypothesis import strategies as st
from support.server import APIS

from gold.config import ServedConfig
from gold.errors import ConfigError
from gold.http import BadAnswerError, Call
from gold.models.language_model import LanguageModel
from gold.teachers.dialects import DIALECTS, VLLM, Dialect, OpenAI, ScoreRequest, SGLang, dialect_of

IDS = (1, 5, 6)


KNOWN: list[dict[int, Any]] = [{5: -1.5, 4: -0.5}, {6: -0.25, 2: -2.0}]


def dialect(api: str, vocabulary: Any) -> Dialect:
    return {"vllm": VLLM(), "sglang": SGLang(1), "openai": OpenAI(vocabulary)}[api]


def test_a_configuration_can_name_every_dialect() -> None:
    assert typing.get_args(ServedConfig.model_fields["api"].annotation) == tuple(DIALECTS)


def test_a_dialect_is_found_by_its_name(teacher: LanguageModel) -> None:
    assert {api: type(dialect_of(api, teacher.vocabulary)) for api in DIALECTS} == DIALECTS
    with pytest.raises(ConfigError, match="api: expected vllm, sglang or openai, got 'triton'"):
        dialect_of("triton", teacher.vocabulary)


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
    call = dialect(api, vocabulary).call("m", ScoreRequest(IDS, 1, 2))
    found: list[dict[int, float]] = call.result(json.loads(json.dumps(answer(api, vocabulary, *told))))
    return found


def call_and_answer(api: str) -> tuple[Call, Any]:
    """A call of this API that wants other tokens too, and an answer that says ``KNOWN`` of ``IDS``."""
    vocabulary = tiny.tiny_teacher().vocabulary
    sound = answer(api, vocabulary, KNOWN)
    if api == "sglang":
        sound["meta_info"]["input_token_ids_logprobs"] = [None, [], []]
    request = ScoreRequest(IDS, 1, 2, (0,), trusted=True)
    return dialect(api, vocabulary).call("m", request), sound


READERS = {api: call_and_answer(api) for api in APIS}
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
            call.result(json.loads(json.dumps(told)))


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
    assert read(api, tiny.tiny_teacher().vocabulary, KNOWN) == KNOWN


@pytest.mark.parametrize("api", APIS)
def test_an_answer_without_the_token_that_was_sent_is_refused(api: str) -> None:
    """It lies on the path: without it a text would have next to no probability."""
    call, sound = READERS[api]
    answer = copy.deepcopy(sound)
    if api == "vllm":
        del answer["choices"][0]["prompt_logprobs"][2]["6"]
    elif api == "sglang":
        answer["meta_info"]["input_token_logprobs"][2][0] = None
    else:
        answer["choices"][0]["logprobs"]["token_logprobs"][2] = None
    with pytest.raises(BadAnswerError, match=r"token 6.*position 2"):
        call.result(answer)


@pytest.mark.parametrize("api", APIS)
@given(data=st.data())
def test_an_answer_with_anything_in_it_is_refused_or_sound(api: str, data: st.DataObject) -> None:
    call, sound = READERS[api]
    answer = copy.deepcopy(sound)
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
        found = call.result(answer)
    except BadAnswerError:
        return
    assert len(found) == len(IDS) - 1
    for index, known in zip(IDS[1:], found, strict=True):
        assert next(iter(known)) == index
        assert all(type(i) is int and 0 <= i < 2**31 for i in known)
        assert all(math.isfinite(v) for i, v in known.items() if i != index)
        assert known[index] < math.inf
        assert sum(map(math.exp, known.values())) < 1.01


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
    asked = ScoreRequest(IDS, 1, 2, (0, 2))
    told = answer("vllm", None, KNOWN)["choices"][0]
    read = VLLM(chosen=True).call("m", asked).result
    sound = read(told | {"prompt_token_id_logprobs": matrix(CHOSEN)})
    assert sound == [{**KNOWN[0], 0: -9.0, 2: -2.0}, {**KNOWN[1], 0: -9.0}]
    never = matrix(np.array([[-np.inf, -2.0], [-9.0, -2.0]], np.float32))
    assert 0 not in read(told | {"prompt_token_id_logprobs": never})[0]
    with pytest.raises(BadAnswerError):
        read(told | {"prompt_token_id_logprobs": MATRICES[kind]})
    probe = VLLM(chosen=True).probe_chosen("m", asked)
    assert probe.result(told | {"prompt_token_id_logprobs": matrix(CHOSEN)}) is True
    assert probe.result(told | {"prompt_token_id_logprobs": MATRICES[kind]}) is False
    assert probe.result({"choices": []}) is False
