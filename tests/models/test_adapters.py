"""Adapters: what they add is in the loss, in what is saved, and nowhere else."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from support.architectures import KINDS, tiny_lm, wrapped
from torch.nn import functional
from transformers import AutoModelForCausalLM

from gold.errors import ModelError
from gold.models.adapters import (
    MergedWeights,
    adapter_config,
    adapter_state,
    add_adapters,
    check_trained,
    copy_of,
    describe,
    load_adapter_weights,
    save_adapters,
)
from gold.models.language_model import LanguageModel, without_adapters
from gold.models.load import load_model, save_model, wrap_model
from gold.models.quantization import dense_weight

IDS = torch.tensor([[3, 4, 5, 6]])
WHERE: dict[str, dict[str, Any]] = {
    "layers": {},
    "head": {"targets": ["q_proj", "lm_head"]},
    "head, whole": {"modules_to_save": ["lm_head"]},
    "embeddings": {"targets": ["v_proj", "embed_tokens"]},
    "embeddings, whole": {"targets": ["v_proj"], "modules_to_save": ["embed_tokens", "norm"]},
}

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def scrambled(model: LanguageModel) -> LanguageModel:
    """With adapters that do something."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for weight in model.lm.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    return model


def adapted(folder: Path, where: str = "layers", *, tied: bool = False, **options: Any) -> LanguageModel:
    save_model(wrapped(tiny_lm("llama", tie_word_embeddings=tied)), folder)
    return scrambled(add_adapters(load_model(folder, **options), rank=4, **WHERE[where]))


@torch.no_grad()
def logits(lm: Any) -> torch.Tensor:
    found: torch.Tensor = lm(input_ids=IDS).logits
    return found


QUICK = {("layers", False, "nf4"), ("head", True, None), ("embeddings, whole", True, None)}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(WHERE, (False, True), (None, "nf4"))
]


@pytest.mark.parametrize(("where", "tied", "quantization"), CASES)
def test_the_merged_model_computes_what_the_adapted_one_does(
    tmp_path: Path, where: str, tied: bool, quantization: str | None
) -> None:
    model = adapted(tmp_path / "base", where, tied=tied, quantization=quantization)
    check_trained(model.lm, "tiny")
    save_model(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model.lm), atol=1e-4, rtol=1e-4)
    assert not hasattr(merged.config, "quantization_config")
    assert merged.config.tie_word_embeddings == (
        tied and "targets" not in where and where not in ("head", "embeddings")
    )
    # nothing of it has touched the model in memory
    plain = load_model(tmp_path / "base", quantization=quantization)
    with model.lm.disable_adapter():
        assert torch.equal(logits(model.lm), logits(plain.lm))
    # names are those of the base model, tied ones under each
    names = set(MergedWeights(model.lm))
    assert names == {
        n for n in plain.lm.state_dict() if ".absmax" not in n and ".quant" not in n and ".nested" not in n
    }


@pytest.mark.parametrize(("where", "tied"), [("layers", False), ("embeddings, whole", True)])
def test_a_folder_of_adapters_is_the_adapted_model(tmp_path: Path, where: str, tied: bool) -> None:
    model = adapted(tmp_path / "base", where, tied=tied)
    save_adapters(model.lm, tmp_path / "adapter")
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = load_model(tmp_path / "adapter")
    assert again.name == str(tmp_path / "adapter")
    assert torch.equal(logits(again.lm), logits(model.lm))
    assert [p.shape for p in again.lm.parameters() if p.requires_grad] == [
        p.shape for p in model.lm.parameters() if p.requires_grad
    ]
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(alone), logits(model.lm))
    assert adapter_config(again.lm)["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_base_beside_its_adapters_is_found_after_a_move(tmp_path: Path) -> None:
    model = adapted(tmp_path / "here" / "base")
    save_adapters(model.lm, tmp_path / "here" / "adapter")
    file = tmp_path / "here" / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": "../base"}
    file.write_text(json.dumps(settings))
    (tmp_path / "here").rename(tmp_path / "there")
    again = load_model(tmp_path / "there" / "adapter")
    assert torch.equal(logits(again.lm), logits(model.lm))


def test_weights_are_loaded_bit_for_bit_and_another_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted(tmp_path / "base")
    save_adapters(model.lm, tmp_path / "adapter")
    other = add_adapters(load_model(tmp_path / "base"), rank=4, seed=1)
    assert not torch.equal(logits(other.lm), logits(model.lm))
    load_adapter_weights(other.lm, tmp_path / "adapter")
    for name, tensor in adapter_state(model.lm).items():
        assert torch.equal(tensor, adapter_state(other.lm)[name])
    wider = add_adapters(load_model(tmp_path / "base"), rank=5)
    with pytest.raises(ModelError, match=r"holds another adapter: 28 weights differ"):
        load_adapter_weights(wider.lm, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"1234567")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors could not be loaded"):
        load_adapter_weights(other.lm, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is broken"):
        load_model(tmp_path / "adapter")


def test_new_adapters_change_nothing_and_follow_from_their_seed(tmp_path: Path) -> None:
    save_model(tiny.tiny_student(), tmp_path)
    before = torch.get_rng_state()
    models = [add_adapters(load_model(tmp_path), rank=2, alpha=8.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    states = [adapter_state(model.lm) for model in models]
    same = [
        all(torch.equal(a, b) for a, b in zip(states[0].values(), s.values(), strict=True)) for s in states
    ]
    assert same == [True, True, False]
    assert torch.equal(logits(models[0].lm), logits(load_model(tmp_path).lm))
    found = "LORA, rank 2, alpha 8 on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj: "
    assert describe(models[0].lm).startswith(found)


def test_a_copy_shares_what_is_frozen(tmp_path: Path) -> None:
    model = adapted(tmp_path, "head, whole", quantization="nf4")
    twin = copy_of(model.lm)
    assert torch.equal(logits(twin), logits(model.lm))
    for mine, theirs in zip(twin.parameters(), model.lm.parameters(), strict=True):
        assert (mine is theirs) == (not theirs.requires_grad)
        assert torch.equal(mine, theirs)
    before = logits(twin)
    scrambled(model)
    assert torch.equal(logits(twin), before)
    assert not torch.equal(logits(model.lm), before)


def test_merged_weights_of_16_bits_are_rounded_once(tmp_path: Path) -> None:
    save_model(tiny.tiny_student(), tmp_path)
    model = scrambled(add_adapters(load_model(tmp_path, dtype="bfloat16"), rank=4))
    layer = without_adapters(model.lm).model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.dtype == torch.float32
    exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    assert torch.equal(MergedWeights(model.lm)["model.layers.0.self_attn.q_proj.weight"], exact.bfloat16())


def test_dora_is_merged_by_its_own_rule(tmp_path: Path) -> None:
    plain = wrapped(tiny_lm("llama"))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", use_dora=True)
    model = scrambled(wrap_model(get_peft_model(plain.lm, config).eval(), plain.tokenizer))
    save_model(model, tmp_path)
    torch.testing.assert_close(logits(load_model(tmp_path).lm), logits(model.lm), atol=1e-5, rtol=1e-4)


# What cannot be used is one line


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"targets": ["q_prj"]},
            "student.lora.targets: no module of tiny is called q_prj; did you mean q_proj?",
        ),
        ({"modules_to_save": ["lmhead"]}, "student.lora.modules_to_save: no module .* did you mean lm_head?"),
    ],
)
def test_a_layer_that_is_not_there(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ModelError, match=line) as refused:
        add_adapters(wrapped(tiny_lm("llama")), **options)
    assert "\n" not in str(refused.value)


def test_adapters_that_the_loss_would_not_see() -> None:
    plain = wrapped(tiny_lm("llama"))
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ModelError, match="PROMPT_TUNING adds virtual tokens"):
        wrap_model(get_peft_model(copy.deepcopy(plain.lm), prompts), plain.tokenizer)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    inside = copy.deepcopy(plain.lm)
    inside.add_adapter(lora)
    with pytest.raises(ModelError, match="transformers has put adapters into it itself"):
        wrap_model(inside, plain.tokenizer)
    twice = get_peft_model(
        copy.deepcopy(plain.lm), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    twice.merge_adapter()
    with pytest.raises(ModelError, match="merged already"):
        wrap_model(twice, plain.tokenizer)
    model = add_adapters(plain, rank=2)
    with pytest.raises(ModelError, match="it has adapters already"):
        add_adapters(model)
    without_adapters(model.lm).model.norm.requires_grad_(True)
    with pytest.raises(ModelError, match=r"1 weights beside its adapter are trained, such as .*norm\.weight"):
        check_trained(model.lm, "tiny")


def test_a_base_that_is_missing(tmp_path: Path) -> None:
    model = adapted(tmp_path / "base")
    save_adapters(model.lm, tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "away")
    with pytest.raises(
        ModelError, match=r"adapter: its base model: .*base: no such folder.*moved"
    ) as refused:
        load_model(tmp_path / "adapter")
    assert "\n" not in str(refused.value)
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="names no base model"):
        load_model(tmp_path / "adapter")


def test_adapters_of_another_base(tmp_path: Path) -> None:
    model = adapted(tmp_path / "base")
    save_adapters(model.lm, tmp_path / "adapter")
    save_model(tiny.tiny_student(width=64), tmp_path / "base")
    with pytest.raises(
        ModelError, match=r"its adapters for .*base cannot be used: .*size mismatch"
    ) as refused:
        load_model(tmp_path / "adapter")
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.assets("smollm2-135m-instruct", "gemma3-270m")
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma3-270m"])
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_real_weights(
    name: str, quantization: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.assets import assets_folder

    if quantization == "int8":
        # Its own products round the states to 8 bits too, each processor in its way: by up to 0.1 nats here.
        import bitsandbytes

        monkeypatch.setattr(
            bitsandbytes.nn.Linear8bitLt,
            "forward",
            lambda layer, states: functional.linear(states, dense_weight(layer).to(states), layer.bias),
        )
    model = add_adapters(load_model(assets_folder() / name, quantization=quantization), rank=8)
    with torch.no_grad():
        for weight in model.lm.parameters():
            if weight.requires_grad:
                weight.add_(2e-3 * torch.randn_like(weight))
    save_model(model, tmp_path / "merged")
    save_adapters(model.lm, tmp_path / "adapter")
    expected = torch.log_softmax(logits(model.lm), -1)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    found = torch.log_softmax(logits(merged), -1)
    kl = float((expected.exp() * (expected - found)).sum(-1).max())
    assert kl < 1e-5
    again = load_model(tmp_path / "adapter", quantization=quantization)
    assert torch.equal(logits(again.lm), logits(model.lm))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    try:
        plain = wrapped(tiny_lm(kind))
    except Exception as error:
        pytest.skip(f"{type(error).__name__}: not a student")
    model = scrambled(add_adapters(plain, rank=2))
    save_model(model, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(saved), logits(model.lm), atol=1e-3, rtol=1e-3)
