"""Training of adapters: the loss is the model's own, and only the adapter moves and is saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.architectures import tiny_lm, wrapped
from transformers import AutoModelForCausalLM

import gold.run
from gold.config import Config
from gold.errors import ModelError
from gold.kernels import logits as blocks
from gold.kernels.lm_head import token_loss
from gold.models.adapters import add_adapters
from gold.models.hidden_states import lazy_logits
from gold.models.language_model import LanguageModel, without_adapters
from gold.models.load import load_model, save_model, wrap_model
from gold.models.padding import PaddedStates
from gold.teachers.ema import SelfTeacher
from gold.teachers.several import Teachers
from gold.train.loop import Saving, distill
from gold.train.recipe import Recipe, Term
from gold.train.setup import Setup
from gold.train.state import TrainState
from gold.train.step import train_step

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WHERE: dict[str, dict[str, Any]] = {
    "layers": {},
    "head": {"targets": ["q_proj", "lm_head"]},
    "head, whole": {"modules_to_save": ["lm_head"]},
    "embeddings, whole": {"targets": ["v_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    "embeddings": {"targets": ["embed_tokens"]},
}
QUICK = {
    ("layers", "nf4"),
    ("head", "tied"),
    ("head, whole", "apart"),
    ("embeddings, whole", "tied"),
}


def moved(lm: Any) -> None:
    """Adapters that do something."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for weight in lm.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))


@pytest.mark.parametrize(
    ("where", "base"),
    [
        pytest.param(w, b, marks=() if (w, b) in QUICK else pytest.mark.slow)
        for w in WHERE
        for b in ("tied", "apart", "nf4")
    ],
)
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_loss_and_gradient_are_those_of_all_logits_at_once(
    where: str, base: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(tiny_lm("llama", tie_word_embeddings=base == "tied"))
    if base == "nf4":
        save_model(model, tmp_path)
        model = load_model(tmp_path, quantization="nf4")
    model = add_adapters(model, rank=3, **WHERE[where])
    moved(model.lm)
    width = without_adapters(model.lm).config.vocab_size
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4 * width * 2)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    target, weight = torch.tensor([4, 5, 6, 7]), torch.linspace(0.5, 2.0, 4)
    states = PaddedStates.of([[3]], [ids[0, 1:].numpy()], [4], 0, torch.device("cpu"))
    trained = [p for p in model.lm.parameters() if p.requires_grad]

    logp = torch.log_softmax(model.lm(input_ids=ids).logits[0, :4], -1)
    expected = -(weight * logp.gather(1, target[:, None])[:, 0]).sum()
    expected_grads = torch.autograd.grad(expected, trained)
    if checkpointing:
        TrainState(model, None, Recipe((Term("sft"),), gradient_checkpointing=True), Accelerator(cpu=True))
    found = token_loss(lazy_logits(model.lm, states), target, weight, torch.tensor([2]))
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(torch.autograd.grad(found, trained), expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def student_of(folder: Path, **options: Any) -> LanguageModel:
    if not folder.exists():
        save_model(tiny.tiny_student(), folder)
    return load_model(folder, **options)


def steps_of(student: LanguageModel, teacher: Any, *terms: str, **settings: Any) -> Any:
    recipe = Recipe(
        tuple(Term(name) for name in terms),
        **{
            "max_new_tokens": 8,
            "prompts_per_step": 3,
            "num_generations": 1,
            "lr": 1e-2,
            "warmup_steps": 0,
            **settings,
        },
    )
    teachers = Teachers({"teacher": teacher})
    setup = Setup.of(student, teachers, tiny.prompts(), recipe)
    state = TrainState(
        student,
        teachers,
        recipe,
        Accelerator(cpu=True, mixed_precision="no"),
        keep_reference=setup.needs_reference,
    )
    return state, lambda: train_step(state, setup).metrics


def test_reference_and_average_hold_the_adapter_alone(tmp_path: Path) -> None:
    student = add_adapters(
        student_of(tmp_path / "s", quantization="nf4"), rank=2, modules_to_save=["lm_head"]
    )
    teacher = SelfTeacher(student, 0.5)
    state, take = steps_of(student, teacher, "sft", "reference_kl", on_policy=0.5)
    for lm in (teacher.model.lm, state.reference):
        own = [
            (a, b) for a, b in zip(lm.parameters(), student.lm.parameters(), strict=True) if b.requires_grad
        ]
        assert all(a is not b and torch.equal(a, b) for a, b in own)
        frozen = [
            (a, b)
            for a, b in zip(lm.parameters(), student.lm.parameters(), strict=True)
            if not b.requires_grad
        ]
        assert frozen
        assert all(a is b for a, b in frozen)
    before = [p.clone() for p in state.reference.parameters()]
    weights = [p for p in student.lm.parameters() if p.requires_grad]
    averages = [p.clone() for p in weights]
    for _ in range(2):
        take()
        averages = [torch.lerp(a, w.detach(), 0.5) for a, w in zip(averages, weights, strict=True)]
    found = list(teacher.state().values())
    assert len(found) == len(weights)
    for mine, theirs in zip(found, averages, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert all(torch.equal(a, b) for a, b in zip(before, state.reference.parameters(), strict=True))
    assert any(not torch.equal(a, w) for a, w in zip(found, weights, strict=True))


def test_an_average_of_16_bits_is_kept_in_single(tmp_path: Path) -> None:
    student = student_of(tmp_path / "s", dtype="bfloat16")
    student = add_adapters(student, rank=2, modules_to_save=["lm_head"])
    teacher = SelfTeacher(student, 0.999)
    state, take = steps_of(student, teacher, "sft", on_policy=0.0, lr=1e-3)
    assert {m.dtype for m in state.masters.values()} == {torch.float32}
    assert len(state.masters) == 1  # the head's copy; the adapters are float32
    take()
    kept = {name: t.clone() for name, t in teacher.state().items()}
    assert {t.dtype for t in kept.values()} == {torch.float32}
    again = SelfTeacher(student, 0.999)
    again.load_state(kept)
    assert all(torch.equal(t, again.state()[name]) for name, t in kept.items())
    with pytest.raises(ValueError, match="another adapter"):
        again.load_state({})


def test_weights_for_an_engine_are_merged_when_they_are_read(tmp_path: Path) -> None:
    student = add_adapters(student_of(tmp_path / "s"), rank=2)
    state, take = steps_of(student, tiny.tiny_teacher(), "sft", on_policy=0.0)
    take()
    weights = state.gather()
    plain = student_of(tmp_path / "s").lm
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(dict(weights))
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(plain(ids).logits, student.lm(ids).logits)
    found, config = state.gather_adapter()
    assert config["r"] == 2
    assert json.dumps(config)
    assert all(name.startswith("base_model.model.") for name in found)
    assert (
        steps_of(student_of(tmp_path / "s"), tiny.tiny_teacher(), "sft", on_policy=0.0)[0].gather_adapter()
        is None
    )


def test_what_cannot_be_trained_is_one_line(tmp_path: Path) -> None:
    student = student_of(tmp_path / "s", quantization="nf4")
    with pytest.raises(ModelError, match=r"quantized \(nf4\) and cannot be trained; train adapters"):
        distill(student, tiny.tiny_teacher(), tiny.prompts(), Recipe(steps=1, max_new_tokens=6))


# Runs


def settings(folder: Path, output: Path, **changes: Any) -> Config:
    changed = {
        "student__lora": {"rank": 4, "alpha": 8},
        "train__steps": 4,
        "evaluate__prompts": 2,
        "evaluate__samples": 0,
        "optimizer__lr": 1e-2,
        **changes,
    }
    return Config.model_validate(tiny.run_settings(folder, output, **changed))


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("_s", "_per_s"))} for line in lines]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gold.run, "plot_run", lambda folder: [])


SELF = {
    "teacher": {"self": "ema", "decay": 0.5},
    "objectives": [{"name": "sft"}, {"name": "reference_kl", "weight": 0.1}],
    "rollout__on_policy": 0.5,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"student__lora__modules_to_save": ["lm_head"], **SELF},
        pytest.param(
            {"student__quantization": "nf4", "student__lora__modules_to_save": ["lm_head"], **SELF},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"student__quantization": "int8", "teacher__quantization": "int8"}, marks=pytest.mark.slow
        ),
        pytest.param({"student__dtype": "bfloat16", **SELF}, marks=pytest.mark.slow),
    ],
)
def test_a_run_is_resumed_bit_for_bit_and_leaves_two_models(tmp_path: Path, changes: dict[str, Any]) -> None:
    tiny.save_pair(tmp_path)
    whole, run = tmp_path / "whole", tmp_path / "run"
    gold.run.train(settings(tmp_path, whole, **changes))
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    for name in ("student", "adapter"):
        shutil.rmtree(run / name)
    gold.run.train(settings(tmp_path, run, **changes), resume=True)
    assert metrics(run) == metrics(whole)
    saved = ("student/model.safetensors", "adapter/adapter_model.safetensors")
    for name in saved:
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    # a checkpoint holds no base model
    checkpoint = whole / "checkpoints" / "step-000004"
    assert not list(checkpoint.glob("**/model*.safetensors"))
    assert (checkpoint / "adapter" / "adapter_model.safetensors").read_bytes() == (
        whole / saved[1]
    ).read_bytes()
    # merged for transformers alone, and the adapter for peft alone
    ids = torch.tensor([[3, 4, 5]])
    student = load_model(whole / "student")
    plain = AutoModelForCausalLM.from_pretrained(whole / "student", dtype=torch.float32)
    assert torch.equal(plain(ids).logits, student.lm(ids).logits)
    if "student__quantization" not in changes and "student__dtype" not in changes:
        alone = AutoPeftModelForCausalLM.from_pretrained(whole / "adapter")
        torch.testing.assert_close(alone(ids).logits, plain(ids).logits)
    own = load_file(whole / "student" / "model.safetensors")
    base = load_file(tmp_path / "student" / "model.safetensors")
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in base.items()}
    assert any(not torch.equal(own[n].float(), base[n].float()) for n in own)


@pytest.mark.slow
def test_an_adapter_is_trained_further_and_evaluated(tmp_path: Path) -> None:
    tiny.save_pair(tmp_path)
    gold.run.train(settings(tmp_path, tmp_path / "one"))
    trained = gold.run.evaluate_source(tmp_path / "one").measures
    last = [line for line in metrics(tmp_path / "one") if line["kind"] == "eval"][-1]
    assert trained["reverse_kl_per_byte"] == pytest.approx(last["reverse_kl_per_byte"], rel=1e-4)
    further = settings(
        tmp_path, tmp_path / "two", student__lora=None, student__path=str(tmp_path / "one" / "adapter")
    )
    gold.run.train(further)
    first = next(line for line in metrics(tmp_path / "two") if line["kind"] == "eval")
    assert first["reverse_kl_per_byte"] == pytest.approx(last["reverse_kl_per_byte"], rel=1e-4)
    base = json.loads((tmp_path / "two" / "adapter" / "adapter_config.json").read_text())
    assert base["base_model_name_or_path"] == str(tmp_path / "student")
    twice = settings(tmp_path, tmp_path / "three", student__path=str(tmp_path / "one" / "adapter"))
    with pytest.raises(ModelError, match=r"trained further: leave student\.lora out"):
        gold.run.train(twice)


def test_a_peft_student_from_python(tmp_path: Path) -> None:
    plain = student_of(tmp_path / "s", quantization="nf4")
    torch.manual_seed(0)
    lm = get_peft_model(plain.lm, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    student = wrap_model(lm, plain.tokenizer, name="mine")
    frozen = {n: p.clone() for n, p in lm.named_parameters() if not p.requires_grad}
    recipe = Recipe(steps=1, prompts_per_step=2, num_generations=1, max_new_tokens=6, lr=1e-2, warmup_steps=0)
    run = distill(student, tiny.tiny_teacher(), tiny.prompts(), recipe, saving=Saving(tmp_path / "run"))
    assert run.steps[0]["applied"]
    assert all(torch.equal(p, frozen[n]) for n, p in lm.named_parameters() if not p.requires_grad)
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"student", "adapter"}
    ids = torch.tensor([[3, 4, 5]])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    torch.testing.assert_close(saved(ids).logits, lm(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
