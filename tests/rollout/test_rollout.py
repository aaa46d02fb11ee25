from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from gold.data import Prompt
from gold.demo.models import character_tokenizer, tiny_model, word_tokenizer
from gold.demo.running_sums import RunningSums
from gold.errors import DataError
from gold.models.hidden_states import lazy_logits
from gold.models.padding import PaddedStates
from gold.rollout.engine import completed, sample
from gold.rollout.hf import HuggingFaceEngine, nucleus
from gold.rollout.types import Sampling, group_advantages
from tests.contract.toys import CPU

PROMPTS = RunningSums().prompts("train", 6, 0)


@pytest.fixture(scope="module")
def model():
    texts = [f"{p.text}{p.completion}" for p in RunningSums().prompts("train", 300, 0)]
    return tiny_model(word_tokenizer(texts), "tiny", layers=1, seed=0)


def seeds(count, first=0):
    return [(7, n) for n in range(first, first + count)]


def draw(model, prompts, sampling, seeds, batch=32):
    return sample(HuggingFaceEngine(model, batch), model, prompts, sampling, seeds=seeds)


def next_logp(model, prompt_ids, ids):
    """Log-probability of each id given those before it, by one plain forward pass of the whole model."""
    whole = torch.tensor([[*prompt_ids, *ids]])
    logp = torch.log_softmax(model.lm(whole).logits[0].float(), -1)
    return [logp[len(prompt_ids) - 1 + k, i].item() for k, i in enumerate(ids)]


@torch.no_grad()
def test_rollouts_know_their_own_log_probability_and_why_they_stopped(model):
    rollouts = draw(model, PROMPTS, Sampling(max_new_tokens=12), seeds(6))
    stop = model.vocabulary.stop_ids[0]
    assert any(r.stopped for r in rollouts) or any(len(r.ids) == 12 for r in rollouts)
    for rollout in rollouts:
        assert rollout.stopped == (rollout.ids[-1] == stop)
        assert stop not in rollout.ids[:-1]
        assert rollout.stopped or len(rollout.ids) == 12
        kept = rollout.ids[:-1] if rollout.stopped else rollout.ids
        np.testing.assert_array_equal(rollout.tokenized.ids, kept)
        expected = next_logp(model, rollout.prompt_ids, rollout.ids.tolist())
        np.testing.assert_allclose(rollout.sampling_logprobs, expected, atol=1e-4)


def test_nothing_is_inherited_from_a_checkpoints_generation_settings(model):
    """generate fills what a call leaves out from the checkpoint and from its own defaults: top-k 50 for one."""
    plain = draw(model, PROMPTS, Sampling(max_new_tokens=8), seeds(6))
    own = model.lm.generation_config
    model.lm.generation_config = GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=5.0, max_length=3, num_beams=1
    )
    try:
        marked = draw(model, PROMPTS, Sampling(max_new_tokens=8), seeds(6))
        assert model.lm.generation_config.top_k == 1
    finally:
        model.lm.generation_config = own
    for a, b in zip(plain, marked, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.sampling_logprobs, b.sampling_logprobs)


def test_the_first_token_is_drawn_from_the_whole_distribution(model):
    """Frequencies of 4,000 draws against the model's probabilities, the rare tokens beyond any top-k included."""
    prompt = PROMPTS[0]
    count = 4000
    drawn = draw(model, [prompt] * count, Sampling(max_new_tokens=1), seeds(count), batch=1000)
    with torch.no_grad():
        prob = torch.softmax(model.lm(torch.tensor([drawn[0].prompt_ids])).logits[0, -1].double(), -1).numpy()
    frequency = np.bincount([r.ids[0] for r in drawn], minlength=prob.size)
    chi_square = ((frequency - count * prob) ** 2 / (count * prob)).sum()
    # Mean size − 1, standard deviation √(2 (size − 1)): six of them above would be a one-in-a-billion accident.
    assert chi_square < prob.size - 1 + 6 * np.sqrt(2 * (prob.size - 1))
    assert len(np.unique([r.ids[0] for r in drawn])) > 50


def test_what_is_drawn_depends_on_the_seed_alone(model):
    together = draw(model, PROMPTS, Sampling(max_new_tokens=8), seeds(6), batch=6)
    apart = draw(model, PROMPTS, Sampling(max_new_tokens=8), seeds(6), batch=2)
    turned = draw(model, PROMPTS[::-1], Sampling(max_new_tokens=8), seeds(6)[::-1], batch=4)[::-1]
    other = draw(model, PROMPTS, Sampling(max_new_tokens=8), seeds(6, 100))
    for a, b, c in zip(together, apart, turned, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.ids, c.ids)
    assert any(not np.array_equal(a.ids, b.ids) for a, b in zip(together, other, strict=True))


@torch.no_grad()
def test_temperature_and_top_p_are_those_of_the_log_probabilities(model):
    sampling = Sampling(temperature=0.5, top_p=0.6, max_new_tokens=1)
    rollouts = draw(model, [PROMPTS[0]] * 200, sampling, seeds(200))
    logits = model.lm(torch.tensor([rollouts[0].prompt_ids])).logits[0, -1].float()
    logp = torch.log_softmax(nucleus(logits[None] / 0.5, 0.6), -1)[0]
    for rollout in rollouts:
        assert rollout.sampling_logprobs[0] == pytest.approx(logp[rollout.ids[0]].item(), abs=1e-4)
    likeliest = draw(model, PROMPTS[:1], Sampling(temperature=0.0, max_new_tokens=1), seeds(1))
    assert likeliest[0].ids[0] == logits.argmax()


def test_the_nucleus_is_the_smallest_set_that_reaches_its_share():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    for top_p, kept in (
        (0.3, [1]),
        (0.4, [1]),
        (0.41, [1, 2]),
        (0.7, [1, 2]),
        (0.95, [0, 1, 2, 3]),
        (1e-9, [1]),
    ):
        assert torch.isfinite(nucleus(logits, top_p))[0].nonzero()[:, 0].tolist() == kept


def test_states_are_the_models_own_and_the_head_gives_its_logits(model):
    """One shift: state k has read the prompt and k tokens, whatever stands beside it in the batch."""
    prompts, completions = [[1, 5, 6], [1, 7]], [np.array([8, 9]), np.array([10, 11, 12, 2])]
    states = PaddedStates.of(prompts, completions, [2, 4], pad_id=0, device=CPU)
    with torch.no_grad():
        rows = lazy_logits(model.lm, states)
        logits = rows.logits()
        expected = []
        for prompt, completion, count in zip(prompts, completions, [2, 4], strict=True):
            whole = model.lm(torch.tensor([[*prompt, *completion.tolist()]])).logits[0]
            expected.append(whole[len(prompt) - 1 : len(prompt) - 1 + count])
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_a_completion_of_the_data_ends_with_the_stop_id_unless_it_is_cut(model):
    prompt = PROMPTS[0]
    whole = completed(model, prompt, 100)
    assert whole.stopped
    assert not whole.sampled
    assert whole.ids[-1] == model.vocabulary.stop_ids[0]
    assert whole.text == prompt.completion
    cut = completed(model, prompt, 1)
    assert not cut.stopped
    assert len(cut.ids) == 1
    with pytest.raises(DataError, match="has no completion"):
        completed(model, Prompt("x", text="1"), 10)


def test_a_prompt_that_leaves_no_room_is_named(model):
    with pytest.raises(DataError, match=r"prompt long: \d+ tokens and 8 new ones do not fit the 128 tokens"):
        draw(model, [Prompt("long", text=" 10" * 130)], Sampling(max_new_tokens=8), seeds(1))


def test_advantages_compare_a_group_with_itself():
    rewards = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    scaled = group_advantages(rewards, 4)
    np.testing.assert_allclose(scaled[:4].mean(), 0, atol=1e-12)
    np.testing.assert_allclose(scaled[:4].std(), 1)
    np.testing.assert_array_equal(scaled[4:], 0)


def test_both_tokenizers_of_the_demonstration_read_the_same_bytes():
    teacher = tiny_model(character_tokenizer(), "teacher", layers=1, seed=0)
    text = PROMPTS[0].completion
    assert len(teacher.vocabulary.encode(text).ids) == len(text)
