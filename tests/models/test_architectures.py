"""Loss, rollouts and the model itself are of one distribution, whatever the architecture and whatever stands beside a
text in its batch."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from support.architectures import KINDS, SIZE, tiny_lm, wrapped
from transformers import LogitsProcessor

from gold.align.model_inputs import student_states
from gold.data import Prompt
from gold.errors import ModelError
from gold.kernels.lm_head import token_logp
from gold.models.generate import generate
from gold.models.hidden_states import lazy_logits
from gold.models.language_model import LanguageModel
from gold.models.padding import PaddedStates
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Rollout, Sampling

PROMPTS = [Prompt(str(n), text=text) for n, text in enumerate(("1", "12+34-5", "7+8=15 12 13"))]
TOLERANCE = 2e-4

# What each can complete: prompts of several lengths together, of one length, or one at a time.
GENERATES = {
    "llama": "any lengths",  # rotary positions
    "gpt2": "any lengths",  # absolute positions, from the mask
    "bloom": "any lengths",  # ALiBi
    "opt": "any lengths",
    "gemma3_text": "any lengths",  # sliding windows
    "gpt_oss": "any lengths",  # sinks, experts
    "qwen3_moe": "any lengths",
    "deepseek_v3": "any lengths",  # latent attention
    "llama4_text": "any lengths",  # its base is the model itself
    "recurrent_gemma": "any lengths",  # a soft cap of another name
    "mamba": "any lengths",  # states
    "jamba": "any lengths",  # states and attention
    "qwen3_next": "any lengths",
    "bart": "equal lengths",  # absolute positions, which do not look at the mask
    "rwkv": "one prompt",  # states of a batch are mixed up
}


def plain_logp(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """By a forward pass of the whole model over one text alone."""
    with torch.no_grad():
        return torch.log_softmax(
            model.lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float(), -1
        )


def sampled(model: LanguageModel, batch: int) -> list[Rollout]:
    seeds = [(0, n) for n in range(len(PROMPTS))]
    return sample(HuggingFaceEngine(model, batch), model, PROMPTS, Sampling(max_new_tokens=4), seeds=seeds)


def is_one_distribution(model: LanguageModel) -> None:
    """The rows of a padded batch, and the log-probabilities that tokens were drawn with, are the plain model's."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, SIZE, (n,), generator=generator).tolist() for n in (12, 7, 10)]
    rest = [np.array(t[4:], np.int32) for t in texts]
    states = PaddedStates.of([t[:4] for t in texts], rest, [r.size + 1 for r in rest], 0, torch.device("cpu"))
    with torch.no_grad():
        got = torch.log_softmax(lazy_logits(model.lm, states).logits().float(), -1)
    torch.testing.assert_close(
        got, torch.cat([plain_logp(model, t)[3:] for t in texts]), atol=TOLERANCE, rtol=TOLERANCE
    )
    together, alone = sampled(model, 4), sampled(model, 1)
    with torch.no_grad():
        rows = lazy_logits(model.lm, student_states(model, together))
    target = torch.cat([torch.from_numpy(r.ids).long() for r in together])
    again = token_logp(rows, target, torch.tensor(model.vocabulary.stop_ids))[0]
    drawn = torch.cat([torch.from_numpy(r.sampling_logprobs) for r in together])
    torch.testing.assert_close(again, drawn, atol=TOLERANCE, rtol=TOLERANCE)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        expected = plain_logp(model, [*one.prompt_ids, *one.ids.tolist()])[len(one.prompt_ids) - 1 :]
        np.testing.assert_allclose(
            one.sampling_logprobs,
            expected[np.arange(one.ids.size), one.ids].numpy(),
            atol=TOLERANCE,
            rtol=TOLERANCE,
        )


@pytest.mark.parametrize("kind", GENERATES)
def test_loss_and_rollouts_are_of_the_models_distribution(kind: str) -> None:
    before = torch.get_rng_state()
    model = wrapped(tiny_lm(kind))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.generates == GENERATES[kind]
    assert model.generation_error is None
    is_one_distribution(model)


@pytest.mark.parametrize("kind", ["bart", "rwkv"])
def test_a_batch_of_several_lengths_would_be_another_distribution(kind: str) -> None:
    """What the table above guards against is there to be guarded against."""
    lm = tiny_lm(kind)

    kept = []

    class Keep(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            kept.append(scores.clone())
            return scores

    generate(lm, [[5, 6, 7, 8], [9]], 1, (), 0, Keep())
    expected = lm(input_ids=torch.tensor([[9]])).logits[0, -1]
    assert (torch.log_softmax(kept[0][1], -1) - torch.log_softmax(expected, -1)).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("bert", "output matrix"),
        ("rembert", "RemBertForCausalLM"),
        ("bert-generation", "is_decoder"),
        ("xlm", "is_decoder"),
    ],
)
def test_an_architecture_that_cannot_be_trained_is_one_line(kind: str, named: str) -> None:
    changes = {"is_decoder": False} if kind == "bert-generation" else {}
    with pytest.raises(ModelError, match=named) as refused:
        wrapped(tiny_lm(kind, **changes))
    assert "\n" not in str(refused.value)


def test_a_model_that_cannot_generate_can_teach_and_not_write(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")

    def broken(**_: Any) -> Any:
        raise NotImplementedError("no cache\nof this kind")

    monkeypatch.setattr(lm, "generate", broken)
    model = wrapped(lm)
    with pytest.raises(ModelError, match=r"NotImplementedError: no cache$"):
        sampled(model, 4)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("qwen3_moe", "output_router_logits"),
        ("mixtral", "output_router_logits"),
        ("llama", "output_hidden_states"),
        ("llama", "return_dict"),
    ],
)
def test_what_a_configuration_wishes_to_be_given_beside_the_states(kind: str, name: str) -> None:
    lm = tiny_lm(kind)
    model = wrapped(lm)
    expected = sampled(model, 4)
    wish = name != "return_dict"
    setattr(lm.config, name, wish)
    model = wrapped(lm)
    for one, other in zip(expected, sampled(model, 4), strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
    rows = lazy_logits(lm, student_states(model, expected))
    rows.logits().sum().backward()
    assert getattr(lm.config, name) is wish  # and so it is saved


def test_weights_are_what_they_were_after_an_evaluation() -> None:
    lm = tiny_lm("rwkv", rescale_every=1)
    before = {name: weight.clone() for name, weight in lm.state_dict().items()}
    sampled(wrapped(lm), 4)
    torch.testing.assert_close(lm.state_dict(), before, atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in GENERATES])
def test_every_other_architecture_is_right_or_refused(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in tiny_lm(kind).parameters())
            lm = tiny_lm(kind) if size < 8e6 else None
        except Exception as error:
            pytest.skip(f"no tiny one can be built from sizes alone: {type(error).__name__}")
        if lm is None:
            pytest.skip(f"{size:,} parameters")
        try:
            model = wrapped(lm, kind)
        except ModelError:
            return
        if kind == "moshi":
            pytest.xfail(
                "beyond its sliding window, longer than the text it is tried with, its cache is another model"
            )
        if model.generation_error is None:
            is_one_distribution(model)
