"""Policy and gradient are of one distribution: nothing that is random in train mode takes part in a distillation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.tiny_models import TASK
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from gold.demo.models import character_tokenizer
from gold.errors import ModelError
from gold.models.hidden_states import lazy_logits, recompute_activations
from gold.models.language_model import LanguageModel
from gold.models.load import wrap_model
from gold.models.padding import PaddedStates
from gold.teachers.several import Teachers
from gold.train.recipe import Recipe, Term
from gold.train.setup import Setup
from gold.train.state import TrainState
from gold.train.step import train_step

SIZE = character_tokenizer().get_vocab_size()
IDS = {"vocab_size": SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> Any:
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**IDS, **shape, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3))


def opt() -> Any:
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 48,
        "init_std": 0.3,
    }
    noise = {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.9}
    return OPTForCausalLM(
        OPTConfig(**IDS, **shape, **noise, word_embed_proj_dim=32, max_position_embeddings=64)
    )


def mixtral() -> Any:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 64}
    noise = {"router_jitter_noise": 0.9, "attention_dropout": 0.3, "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(**IDS, **shape, **more, **noise, initializer_range=0.3))


def made(make: Any) -> LanguageModel:
    torch.manual_seed(0)
    tokens = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    # Models from Python may come in train mode.
    return wrap_model(
        make().train(), PreTrainedTokenizerFast(tokenizer_object=character_tokenizer(), **tokens)
    )


def losses(make: Any, checkpointing: bool = False) -> list[dict[str, Any]]:
    student, teacher = made(make), made(make)
    teachers = Teachers({"teacher": teacher})
    recipe = Recipe(
        objectives=(Term("reverse_kl"), Term("opd"), Term("reference_kl")),
        max_new_tokens=12,
        num_generations=2,
        prompts_per_step=2,
        lr=1e-30,  # below the resolution of the weights
        gradient_checkpointing=checkpointing,
    )
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    setup = Setup.of(student, teachers, TASK.prompts("train", 4, 0), recipe)
    state = TrainState(student, teachers, recipe, accelerator, keep_reference=True)
    return [train_step(state, setup).metrics for _ in range(2)]


@pytest.mark.parametrize("make", [gpt2, opt, mixtral])
@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(make: Any, checkpointing: bool) -> None:
    for record in losses(make, checkpointing):
        assert abs(record["loss"]) < 1e-6
        assert record["grad_norm"] < 1e-4
        assert abs(record["sampled_reverse_kl_per_byte"]) < 1e-6


@pytest.mark.parametrize("make", [gpt2, opt, mixtral])
def test_activations_are_made_again_and_the_gradient_is_the_same(make: Any) -> None:
    ids = torch.randint(3, SIZE, (2, 7), generator=torch.Generator().manual_seed(0))
    states = PaddedStates(ids, torch.ones_like(ids), torch.tensor([0, 1, 1]), torch.tensor([6, 3, 6]))
    gradients, calls = [], []
    for checkpointing in (False, True):
        lm = made(make).lm.eval()
        if checkpointing:
            recompute_activations(lm)
            recompute_activations(lm)  # a second run of the same model
        count: list[int] = []
        attention = next(m for n, m in lm.named_modules() if n.endswith(("attn", "self_attn")))
        attention.register_forward_hook(lambda *_, count=count: count.append(1))
        lazy_logits(lm, states).logits().logsumexp(-1).sum().backward()
        gradients.append({n: p.grad for n, p in lm.named_parameters() if p.grad is not None})
        calls.append(len(count))
        assert not lm.training
    assert calls == [1, 2]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_layers_that_nobody_knows_to_make_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LlamaForCausalLM(LlamaConfig(**IDS, hidden_size=64, intermediate_size=8, num_hidden_layers=1))
    monkeypatch.setattr("gold.models.hidden_states.GradientCheckpointingLayer", torch.nn.LSTM)
    with pytest.raises(ModelError, match=r"train\.gradient_checkpointing: LlamaForCausalLM has no layers"):
        recompute_activations(lm)
