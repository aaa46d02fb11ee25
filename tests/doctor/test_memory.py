"""The memory of a run: counts and passes beside those of real models, plans by hand, changes that make a run fit."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny
import torch
from support.command import run_gold
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import memory as benchmark
from benchmarks import shapes
from gold.doctor import fit
from gold.doctor.fit import changes_to_fit
from gold.doctor.memory import KINDS as KINDS_OF_PARTS
from gold.doctor.memory import PHASES, Model, Plan, fits, memory_of
from gold.doctor.memory_table import Hardware, examine_memory, memory_json, memory_lines
from gold.doctor.step_time import work_of
from gold.errors import ModelError
from gold.models import footprint
from gold.models.footprint import (
    Adapters,
    model_sizes,
    reading_pass,
    trained_parameters,
    training_pass,
)

pytestmark = pytest.mark.slow

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 300}
KINDS = {
    "llama": LLAMA,
    "tied": LLAMA | {"tie_word_embeddings": True},
    "gemma3": LLAMA | {"model_type": "gemma3_text", "tie_word_embeddings": True, "sliding_window": 4},
    "qwen3": LLAMA | {"model_type": "qwen3"},
}
GIB = 2**30


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_model(kind: str) -> None:
    settings = {k: v for k, v in KINDS[kind].items() if k != "model_type"}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(KINDS[kind]["model_type"], **settings))
    sizes = model_sizes(KINDS[kind])
    assert sizes.parameters == sum(p.numel() for p in lm.parameters())
    assert sizes.layer == sum(p.numel() for p in lm.model.layers[0].parameters())
    assert (sizes.layers, sizes.head) == (6, 0 if kind in ("tied", "gemma3") else 300 * 32)


def test_published_shapes_have_the_published_numbers_of_parameters() -> None:
    for name in ("Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B-Instruct", "HuggingFaceTB/SmolLM3-3B"):
        settings, millions, _ = shapes.SHAPES[name]
        assert round(model_sizes(settings).parameters / 1e6) == millions


def test_adapters_by_hand() -> None:
    # Each of the seven matrices of a layer has rank × (inputs + outputs).
    of_layer = (32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64)
    assert trained_parameters(LLAMA, Adapters(4)) == 6 * 4 * of_layer
    assert trained_parameters(LLAMA, Adapters(4, ("q_proj",))) == 6 * 4 * 64
    with pytest.raises(ModelError, match="q_porj"):
        trained_parameters(LLAMA, Adapters(4, ("q_porj",)))


@pytest.mark.parametrize(
    "options",
    [
        {"autocast": True},
        pytest.param({"checkpointing": True, "adapters": Adapters(4)}, marks=pytest.mark.slow),
    ],
    ids=["autocast", "checkpointing, adapters"],
)
def test_few_layers_stand_for_all(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    few = training_pass(LLAMA, 2, 16, **options)
    monkeypatch.setattr(footprint, "_FEW", (6, 6))
    assert training_pass(LLAMA, 2, 16, **options) == few


def test_what_a_pass_keeps_is_what_autograd_saves() -> None:
    settings = {k: v for k, v in LLAMA.items() if k != "model_type"}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings))
    weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(2, 64, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # without padding there would be no mask
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        states = lm.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert states.requires_grad
    assert training_pass(LLAMA, 2, 64).held == pytest.approx(sum(saved.values()), rel=0.05)


def test_checkpointing_keeps_the_input_of_each_layer() -> None:
    plain, less = training_pass(LLAMA, 2, 64), training_pass(LLAMA, 2, 64, checkpointing=True)
    deeper = training_pass(LLAMA | {"num_hidden_layers": 7}, 2, 64, checkpointing=True)
    assert deeper.held - less.held == 2 * 64 * 32 * 4
    assert less.backward < plain.backward / 2


def test_the_cache_of_generation_by_hand() -> None:
    assert reading_pass(LLAMA, 3, 10, cache=True).held == 3 * 10 * 6 * 2 * 2 * 8 * 4


def test_a_pass_that_depends_on_numbers_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(Model("student", LLAMA), autocast=False, on_gpu=False, sequences=2, tokens=64)
    exact = memory_of(plan).of("activations")
    rough = memory_of(replace(plan, rough=True)).of("activations")
    monkeypatch.setattr("gold.doctor.memory.training_pass", _no_pass)
    assert memory_of(plan).of("activations") == rough == pytest.approx(exact, rel=0.5)
    unsized = Model("student", {k: v for k, v in LLAMA.items() if k != "intermediate_size"})
    with pytest.raises(ModelError, match="no intermediate_size"):
        memory_of(replace(plan, student=unsized))


def test_passes_are_followed_only_where_there_is_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    peak = memory_of(plan).peak
    assert fits(plan, peak)
    assert not fits(plan, peak - 1)
    monkeypatch.setattr("gold.doctor.memory.training_pass", _no_pass)
    monkeypatch.setattr("gold.doctor.memory.reading_pass", _no_pass)
    assert fits(plan, 8 * peak)
    unsized = plan_of(student=Model("student", GPT2), teachers=())
    with pytest.raises(ModelError, match="no num_hidden_layers"):
        fits(unsized, 2**40)
    monkeypatch.undo()
    assert fits(unsized, 2**40)


def _no_pass(*_: Any, **__: Any) -> Any:
    raise ModelError("it depends on numbers")


# Plans

ONE = LLAMA | {"num_hidden_layers": 1}


def plan_of(**changes: Any) -> Plan:
    student = Model("student", ONE)
    plan = Plan(student, (Model("teacher", ONE, "bfloat16"),), autocast=False, on_gpu=False, tokens=16)
    return replace(plan, **{"new_tokens": 8, **changes})


def test_weights_by_hand() -> None:
    count = model_sizes(ONE).parameters
    full = memory_of(plan_of())
    assert [full.of(f"student: {part}") for part in ("weights", "gradients", "AdamW")] == [
        4 * count,
        4 * count,
        8 * count,
    ]
    assert full.of("teacher: weights") == 2 * count
    half = memory_of(plan_of(student=Model("student", ONE, "bfloat16")))
    assert [half.of(f"student: {part}") for part in ("weights", "float32 masters", "AdamW")] == [
        2 * count,
        4 * count,
        8 * count,
    ]
    short = memory_of(plan_of(moments=2))  # adamw8bit
    assert 4 * short.of("student: AdamW") == full.of("student: AdamW")
    assert {part.kind for part in full.parts} <= set(KINDS_OF_PARTS)
    adapted = memory_of(plan_of(lora=Adapters(4)))
    trained = trained_parameters(ONE, Adapters(4))
    assert adapted.of("student: weights") == 4 * count + 4 * trained
    assert adapted.of("student: AdamW") == 8 * trained
    matrices = model_sizes(ONE).matrices
    four = memory_of(plan_of(teachers=(Model("teacher", ONE, "bfloat16", "nf4"),)))
    assert four.of("teacher: weights") == int(matrices * 4.127 / 8 + (count - matrices) * 2)


def test_shards_share_weights_gradients_and_moments() -> None:
    whole, shared = memory_of(plan_of(gpus=4)), memory_of(plan_of(gpus=4, sharding="fsdp"))
    for part in ("weights", "gradients", "AdamW"):
        assert shared.of(f"student: {part}") == pytest.approx(whole.of(f"student: {part}") / 4, abs=1)
    assert whole.of("student: gradients in transit") > 0
    assert shared.of("gathered for a time") > 0
    step = memory_of(plan_of(gpus=4, sharding="fsdp", gradient_sync="step"))
    assert step.of("gathered for a time") >= shared.of("gathered for a time")


def test_the_first_process_reads_what_all_of_them_shard() -> None:
    sharded = partial(plan_of, gpus=4, sharding="fsdp")
    student, teacher = (model.weight_bytes() for model in (sharded().student, sharded().teachers[0]))
    assert sharded().read_first == student + teacher
    assert sharded(lora=Adapters(4)).read_first == teacher
    assert plan_of(gpus=4).read_first == sharded(gpus=1).read_first == 0
    report = examine_memory(sharded(), Hardware(gpus=4, memory=2**30, on_gpu=True))
    assert memory_json(report)["main_memory_of_first"] == student + teacher
    assert any("main memory for the first process" in line for line in memory_lines(report))


def test_shards_of_frozen_weights_and_whole_adapters() -> None:
    whole = memory_of(plan_of(gpus=4, lora=Adapters(4)))
    shared = memory_of(plan_of(gpus=4, lora=Adapters(4), sharding="fsdp"))
    adapters = whole.of("student: AdamW") // 2
    for part in ("gradients", "AdamW"):
        assert shared.of(f"student: {part}") == whole.of(f"student: {part}") > 0
    assert shared.of("student: weights") == pytest.approx(
        (whole.of("student: weights") - adapters) / 4 + adapters, abs=2
    )
    assert shared.of("gathered for a time") < memory_of(plan_of(gpus=4, sharding="fsdp")).of(
        "gathered for a time"
    )


def test_less_memory_for_smaller_microbatches_and_less_time_without_checkpointing() -> None:
    sizes = [memory_of(plan_of(sequences=n)).peak for n in (1, 8)]
    assert sizes == sorted(sizes)
    (plain,), (again,) = (
        [w for w in work_of(plan_of(gradient_checkpointing=on)) if w.phase == "student"]
        for on in (False, True)
    )
    assert again.flops == pytest.approx(plain.flops * 4 / 3)
    assert plain.seconds(1.0, None) == pytest.approx(plain.flops / 1e12)
    assert work_of(plan_of())[0].seconds(1.0, None) is None
    assert [w.phase for w in work_of(plan_of(each_step=False))] == ["teacher", "student", "update"]


# Changes


def test_changes_that_make_a_run_fit() -> None:
    plan = plan_of(tokens=256)
    peak, fixed = memory_of(plan).peak, memory_of(plan).of("libraries, rounding")
    quarter = fixed + (peak - fixed) // 4
    assert changes_to_fit(plan, peak) == []
    found = changes_to_fit(plan, quarter)
    peaks = [peak, *(change.memory.peak for change in found)]
    assert peaks == sorted(peaks, reverse=True)
    assert found[0].settings == "train.gradient_checkpointing=true"
    assert peaks[-2] > quarter >= peaks[-1]
    never = changes_to_fit(plan, 1)
    assert never[-1].memory.peak > 1
    keys = [change.settings.partition("=")[0] for change in never]
    assert len(set(keys)) == len(keys)


@pytest.mark.slow
def test_sharding_is_proposed_where_there_are_gpus_and_no_quantized_weights() -> None:
    ((setting, _, sharded),) = fit._sharding(plan_of(gpus=2), 1)
    assert setting == "train.sharding=fsdp"
    assert [setting for setting, _, _ in fit._adapters(sharded, 1)] == ["student.lora={}"]
    assert list(fit._sharding(plan_of(gpus=2, lora=Adapters(4)), 1))
    quantized = replace(plan_of().student, quantization="nf4")
    assert not list(fit._sharding(plan_of(gpus=2, lora=Adapters(4), student=quantized), 1))
    assert not list(fit._more_gpus(plan_of(lora=Adapters(4), student=quantized), 1))


# The command


def test_the_table_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny.save_pair(tmp_path)
    prompts = "".join(json.dumps({"prompt": f"{n} +7"}) + "\n" for n in range(30))
    (tmp_path / "p.jsonl").write_text(prompts)
    (tmp_path / "run.yaml").write_text(
        "student: {path: student}\nteacher: {path: teacher}\ndata: {prompts: p.jsonl}\noutput: run\n"
    )
    monkeypatch.chdir(tmp_path)
    done = run_gold(monkeypatch, capfd, "doctor", "run.yaml", "--memory", "24", "--tflops", "50")
    assert "24.0 GiB: it fits" in done.out
    assert all(phase in done.out for phase in PHASES)
    done = run_gold(
        *(monkeypatch, capfd, "doctor", "run.yaml", "train.gradient_checkpointing=true", "--json"),
        *("--memory", "0.5", "--gpus", "2"),
    )
    found = json.loads(done.out)["memory"]
    assert (found["gpus"], found["fits"]) == (2, False)
    assert found["peak"] > found["available"] == GIB // 2
    assert {part["name"] for part in found["parts"]} >= {
        "student: weights",
        "teacher: weights",
        "activations",
    }


# Slow


@pytest.mark.slow
@pytest.mark.parametrize("case", ["float32", "bfloat16, checkpointing", "LoRA"])
def test_estimates_are_near_measured_peaks(case: str) -> None:
    assert abs(benchmark.in_own_process(case)["error"]) <= 0.15


@pytest.mark.slow
@pytest.mark.parametrize("name", shapes.CONFIGURATIONS)
def test_configurations_fit_the_gpus_that_they_name(name: str) -> None:
    gpus, memory = shapes.CONFIGURATIONS[name]
    report = shapes.report_of(name, gpus, memory)
    assert report.fits
    text = (shapes.ROOT / "configs" / f"{name}.yaml").read_text()
    assert f"--memory {memory}" in text
    if gpus > 1:
        assert f"--gpus {gpus}" in text
