"""States behind branches of a text: of a model in this process, of a served one, and of any teacher that scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import support.tiny_models as tiny
from support.server import APIS, ModelServer, served

from gold import CachedTeacher, LocalTeacher, Prompt
from gold.bytes.trie import ByteTrie
from gold.exact.marginals import Marginals, marginals
from gold.kernels.layout import KernelTrie
from gold.models.language_model import LanguageModel
from gold.teachers import Teacher
from gold.teachers.branches import scored_states

PROMPT = Prompt("one", text=" 12 7 30 =")
TEXT = " 12 19 49"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Path]:
    """A model whose tokens are whole numbers, which can also be written digit by digit."""
    model = tiny.tiny_student()
    path = tmp_path_factory.mktemp("words")
    model.tokenizer.save_pretrained(path)
    return model, path


def found(teacher: Teacher, states: object = None, stopped: bool = True) -> Marginals:
    text = teacher.vocabulary.encode(TEXT)
    trie = KernelTrie(ByteTrie.of(teacher.vocabulary))
    states = states or teacher.states(PROMPT, text, stopped)
    return marginals(teacher.vocabulary, trie, text, stopped, states, 1e-3)  # type: ignore[arg-type]


def same(mine: Marginals, other: Marginals, tolerance: float) -> None:
    assert mine.branches == other.branches > 0
    for name in ("named", "open"):
        assert np.exp(getattr(other, name)) == pytest.approx(np.exp(getattr(mine, name)), abs=tolerance)


@pytest.mark.parametrize("stopped", [True, False])
def test_any_teacher_has_the_states_of_the_texts_that_it_scores(words, stopped):
    teacher = LocalTeacher(words[0])
    text = teacher.vocabulary.encode(TEXT)
    same(
        found(teacher, stopped=stopped),
        found(teacher, scored_states(teacher, PROMPT, text, stopped), stopped),
        1e-6,
    )


@pytest.mark.parametrize("api", APIS)
def test_a_served_teacher_tells_the_same(words, api):
    model, folder = words
    with ModelServer(model) as server:
        teacher = served(folder, server.url, api=api, top_k=model.vocabulary.size)
        told = found(teacher)
        if api != "openai":  # whose strings do not name every token
            same(found(LocalTeacher(model)), told, 1e-5)
        assert np.exp(told.named).sum(1).max() < 1 + 1e-5
        bodies = [body for path, body in server.requests if path in ("/v1/completions", "/generate")]
        if api == "vllm":  # which tells what is next where the prompt is in its prefix cache
            assert sum("prompt_logprobs" not in body for body in bodies) == told.branches
            assert all(body["max_tokens"] == 1 for body in bodies)
        if api == "sglang":  # of a branch, one position
            spans = [len(body["input_ids"]) - body["logprob_start_len"] for body in bodies]
            assert spans.count(2) == told.branches


def test_what_a_served_teacher_does_not_tell_is_unresolved(words):
    model, folder = words
    with ModelServer(model) as server:
        told = found(served(folder, server.url, top_k=5))
    whole = found(LocalTeacher(model))
    assert (told.named <= whole.named + 1e-5).all()
    assert np.exp(told.local_rest).sum() > np.exp(whole.local_rest).sum()


def test_a_cache_asks_its_teacher(words, tmp_path):
    teacher = LocalTeacher(words[0])
    cached = CachedTeacher(teacher, tmp_path / "cache")
    same(found(teacher), found(cached), 1e-9)
