"""Thinking budgets: where thinking is cut, what is given then, and that nothing given is learned from."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import ScriptedEngine
from support.turns import OPENED, OTHER, THINKING, Echo
from support.vllm_server import VLLMServer, engine_on

from gold.align.model_inputs import student_states
from gold.data import Prompt
from gold.demo.models import tiny_model
from gold.demo.talk import STUDENT_TEMPLATE, byte_tokenizer, with_template
from gold.errors import ConfigError
from gold.evaluate import EvaluationPlan, evaluate
from gold.rollout.completions import columns_of, generations_of
from gold.rollout.engine import Generation, request_for, sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.pieces import rows_of
from gold.rollout.thinking import ThinkingBudget, within_budgets
from gold.rollout.types import Sampling
from gold.tokenize.conversation import TemplateForm
from gold.train.loop import Saving, distill
from gold.train.recipe import Recipe, Term

CLOSING = "\n</think>\n\n"
PROMPT = Prompt("k", messages=({"role": "user", "content": "hm?"},))


def model_of(template, seed=1):
    model = tiny_model(byte_tokenizer(), "student", layers=1, width=32, context=256, seed=seed)
    return with_template(model, template)


FORMS = [TemplateForm.of(model_of(template).tokenizer) for template in (THINKING, OTHER, STUDENT_TEMPLATE)]
MODELS = {"written": model_of(THINKING), "opened": model_of(OPENED)}


def ids_of(model, text):
    return model.tokenizer.encode(text, add_special_tokens=False)


def scripted(model, text, answer, budget):
    """An engine that writes ``text``, and where its thinking was ended for it ``answer``; each with a stop id."""
    whole = [*ids_of(model, text), model.vocabulary.stop_ids[0]]
    begun = 0 if "opened" in budget else len("<think>")
    cut = begun + budget["tokens"]
    closed = [*whole[:cut], *ids_of(model, CLOSING)]
    after = [*ids_of(model, answer), model.vocabulary.stop_ids[0]]
    base = len(model.prompt_ids(PROMPT))

    def script(request):
        own = list(request.prompt_ids[base:])
        if own == whole[: len(own)]:
            return whole[len(own) :]
        assert own[: len(closed)] == closed, "continues what nobody wrote"
        return after[len(own) - len(closed) :]

    return ScriptedEngine(script)


WORDS = st.text("ab é\n", max_size=14)


@given(st.sampled_from(sorted(MODELS)), WORDS, WORDS, WORDS, st.integers(1, 40), st.integers(0, 30))
@settings(max_examples=120, deadline=None)
def test_thinking_is_cut_after_exactly_its_budget(name, thought, said, answer, tokens, room) -> None:
    """Against a reconstruction in bytes, each of which is a token here."""
    model = MODELS[name]
    opening = "" if name == "opened" else "<think>"
    text = f"{opening}{thought}</think>{said}"
    most = len(opening) + tokens + len(CLOSING) + 1 + room
    engine = scripted(model, text, answer, {"tokens": tokens} | ({"opened": 1} if not opening else {}))
    (found,) = sample(engine, model, [PROMPT], Sampling(most, thinking_budget=tokens), seeds=[(3,)])
    cut = len(f"{thought}</think>".encode()) > tokens
    end = len(opening) + tokens
    expected = text.encode()[:end] + (CLOSING + answer).encode() if cut else text.encode()
    assert found.tokenized.data == expected[:most]
    assert found.stopped == (len(expected) < most)
    assert found.thinking_cut == cut
    given_ids = np.zeros(found.ids.size, bool)
    given_ids[end : end + len(CLOSING)] = cut
    assert np.array_equal(found.sampled_mask, ~given_ids)
    assert np.array_equal(found.sampling_logprobs, np.where(given_ids, 0.0, -1.0).astype(np.float32))
    # No id is tokenized anew: what each request is asked after is what was drawn before it.
    for before, after in zip(engine.requests, engine.requests[1:], strict=False):
        assert after.prompt_ids[: len(before.prompt_ids)] == before.prompt_ids


@given(st.sampled_from(sorted(MODELS)), WORDS, WORDS, WORDS, st.integers(7, 30), st.integers(-6, 8))
@settings(max_examples=60, deadline=None)
def test_where_thinking_is_cut_does_not_follow_from_how_much_is_drawn_at_first(
    name, thought, said, answer, tokens, more
) -> None:
    """A student may write its marker in more tokens than its tokenizer, or in fewer."""
    model, opening = MODELS[name], "" if name == "opened" else "<think>"
    budget = ThinkingBudget.of(model, tokens, 90)
    found = []
    for at_first in (budget.opening_tokens, budget.opening_tokens + more):
        changed = replace(budget, opening_tokens=at_first)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ThinkingBudget, "of", lambda *given, changed=changed: changed)
            own = {"tokens": tokens} | ({"opened": 1} if not opening else {})
            engine = scripted(model, f"{opening}{thought}</think>{said}", answer, own)
            found += sample(engine, model, [PROMPT], Sampling(90, thinking_budget=tokens), seeds=[(3,)])
    one, other = found
    assert np.array_equal(one.ids, other.ids)
    assert np.array_equal(one.sampling_logprobs, other.sampling_logprobs)
    assert (one.thinking_cut, one.stopped) == (other.thinking_cut, other.stopped)


@given(
    st.sampled_from(sorted(MODELS)), WORDS, WORDS, st.integers(1, 12), st.sampled_from(["compare", "mask"])
)
@settings(max_examples=60, deadline=None)
def test_no_given_id_is_in_a_row(name, thought, answer, tokens, mode) -> None:
    model = MODELS[name]
    opening = "" if name == "opened" else "<think>"
    engine = scripted(
        model,
        opening + thought + "x" * 40,
        answer,
        {"tokens": tokens} | ({"opened": 1} if not opening else {}),
    )
    (found,) = sample(engine, model, [PROMPT], Sampling(90, thinking_budget=tokens), seeds=[(3,)])
    assert found.thinking_cut
    for form in FORMS:
        rows = rows_of([found], lambda r, form=form: [form], mode, opened=not opening)
        seen = np.zeros(found.ids.size, int)
        for row in [*rows.compared, *rows.others]:
            first = len(row.prompt_ids) - len(found.prompt_ids)
            assert row.prompt_ids == (*found.prompt_ids, *found.ids[:first].tolist())
            seen[first : first + row.ids.size] += 1
        assert np.array_equal(seen, found.sampled_mask)
        # The answer is compared as a text of its own, after thinking that each side ends in its own form.
        if answer.strip():
            last = rows.compared[-1]
            assert last.stopped
            assert last.prompt.begun is not None
            assert last.tokenized.data.strip(b"\n") == answer.encode().strip(b"\n")


def test_equal_requests_draw_equal_ids_however_they_are_batched() -> None:
    model, sampling = MODELS["opened"], Sampling(40, thinking_budget=5)
    requests = [request_for(model, PROMPT, sampling, (n,)) for n in range(6)]
    together = within_budgets(model, HuggingFaceEngine(model, 6).generate)(requests)
    alone = [within_budgets(model, HuggingFaceEngine(model, 1).generate)([r])[0] for r in requests]
    unlimited = HuggingFaceEngine(model, 6).generate(requests)
    assert any(each.given for each in together)
    for one, other, free in zip(together, alone, unlimited, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert (one.given, one.stopped) == (other.given, other.stopped)
        assert one.ids[:5].tolist() == free.ids[:5].tolist()


def test_a_vllm_server_ends_thinking_in_two_requests() -> None:
    model = model_of(OPENED)
    with VLLMServer(model, context=256) as server:
        engine = engine_on(server)
        engine.push(model.lm.state_dict(), 0)
        drawn = sample(
            engine, model, [PROMPT] * 3, Sampling(30, thinking_budget=6), seeds=[(n,) for n in range(3)]
        )
        asked = [body for path, body in server.calls if path.endswith("generate")]
    assert all(r.thinking_cut for r in drawn)
    assert [body["sampling_params"]["max_tokens"] for body in asked] == [6] * 3 + [30 - 6 - len(CLOSING)] * 3
    continued = {tuple(body["token_ids"]) for body in asked[3:]}
    assert continued == {(*r.prompt_ids, *r.ids[: 6 + len(CLOSING)].tolist()) for r in drawn}


def test_a_budget_that_a_model_cannot_keep_is_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"^rollout\.thinking_budget: the chat template of student has no markers"
    ):
        ThinkingBudget.of(model_of(STUDENT_TEMPLATE), 5, 100)
    with pytest.raises(ConfigError, match=r"take 24; raise rollout\.max_new_tokens, which is 20"):
        ThinkingBudget.of(MODELS["opened"], 12, 20)
    recipe = Recipe(steps=1, prompts_per_step=1, num_generations=1, max_new_tokens=40, thinking_budget=4)
    with pytest.raises(ConfigError, match="no markers of thinking; set it to null"):
        distill(model_of(STUDENT_TEMPLATE), model_of(THINKING, 2), [PROMPT], recipe)


def test_plain_texts_have_no_thinking_to_cut() -> None:
    model, prompt = MODELS["opened"], Prompt("k", text="hm")
    (found,) = sample(
        HuggingFaceEngine(model), model, [prompt], Sampling(20, thinking_budget=2), seeds=[(1,)]
    )
    assert not found.thinking_cut


def test_given_ids_are_kept_with_completions() -> None:
    drawn = [
        Generation(np.arange(n, dtype=np.int32), np.zeros(n, np.float32), False, 1, span)
        for n, span in ((3, None), (7, (2, 4)))
    ]
    kept = generations_of(columns_of(drawn))
    assert [g.given for g in kept] == [None, (2, 4)]
    old = {name: column for name, column in columns_of(drawn).items() if name != "given"}
    assert [g.given for g in generations_of(old)] == [None, None]


@pytest.mark.parametrize("name", ["reverse_kl", "token_pg", "reward"])
def test_a_step_learns_from_sampled_tokens_alone(name, monkeypatch) -> None:
    model, teacher, seen = model_of(OPENED), model_of(OTHER, 2), []

    def noted(student, rollouts, **more):
        seen.extend(rollouts)
        return student_states(student, rollouts, **more)

    monkeypatch.setattr("gold.train.step.student_states", noted)
    recipe = Recipe(
        objectives=(Term(name),),
        steps=1,
        prompts_per_step=1,
        num_generations=4,
        max_new_tokens=30,
        thinking_budget=4,
    )
    run = distill(model, teacher, [PROMPT], recipe, environment=Echo(2))
    assert run.steps[0]["thinking_cut_share"] == 1.0
    tokens = sum(row.ids.size for row in seen)
    turns = round(run.steps[0]["turns"] * 4)
    assert tokens == run.steps[0]["length_tokens"] * turns - turns * len(CLOSING)
    assert all(row.sampled_mask.all() and (row.sampling_logprobs < 0).all() for row in seen)


@pytest.mark.slow
def test_a_run_with_a_budget_resumes_bit_for_bit(tmp_path) -> None:
    recipe = Recipe(steps=4, prompts_per_step=2, num_generations=2, max_new_tokens=30, thinking_budget=4)

    def run(output, resume=False):
        saving = Saving(output, resume=resume, checkpoint_every=2, keep_last=9)
        prompts = [replace(PROMPT, key=str(n)) for n in range(4)]
        return distill(
            model_of(OPENED), model_of(OTHER, 2), prompts, recipe, environment=Echo(2), saving=saving
        )

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "student")
    shutil.rmtree(max((tmp_path / "half" / "checkpoints").iterdir(), key=lambda path: path.name))
    half = run(tmp_path / "half", resume=True)
    for one, other in zip(whole.steps, half.steps, strict=True):
        known = [k for k in one if k != "kind" and not k.endswith("_s")]
        assert {k: one[k] for k in known} == {k: other[k] for k in known}
        assert one["thinking_cut_share"] > 0


def test_an_evaluation_says_how_often_thinking_was_cut() -> None:
    model = MODELS["opened"]
    found = evaluate(model, None, [PROMPT] * 2, plan=EvaluationPlan(max_new_tokens=30, thinking_budget=4))
    assert found.measures["thinking_cut_share"] == 1.0
