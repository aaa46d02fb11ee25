"""What is wrong with a model is told from its files alone, in one line that says what to give instead."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import support.tiny_models as tiny

from gold.errors import ModelError, VocabularyError
from gold.models.files import check_files, check_kind
from gold.models.load import load_model, save_model, wrap_model


def folder(path: Path, config: Any, name: str = "config.json") -> Path:
    (path / name).write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return path


def named(architecture: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": kind, **more}


@pytest.mark.parametrize(
    ("config", "kind", "remedy"),
    [
        (
            named("T5ForConditionalGeneration", "t5", is_encoder_decoder=True),
            "encoder-decoder",
            "decoder-only",
        ),
        (named("BartForConditionalGeneration", "bart"), "encoder-decoder", "decoder-only"),
        (named("BertForMaskedLM", "bert"), "an encoder", "decoder-only"),
        (named("ModernBertForMaskedLM", "modernbert"), "an encoder", "decoder-only"),
        (named("XLMRobertaModel", "xlm-roberta"), "an encoder", "decoder-only"),
        ({"model_type": "rembert"}, "an encoder", "decoder-only"),
        (named("LlamaForSequenceClassification", "llama"), "reward model", "that it was made from"),
        (named("Qwen2ForRewardModel", "qwen2"), "reward model", "that it was made from"),
        (named("Qwen2ForTokenClassification", "qwen2"), "classifier", "that it was made from"),
        (named("LlavaForConditionalGeneration", "llava", vision_config={}), "images", "text alone"),
        (named("WhisperForConditionalGeneration", "whisper", is_encoder_decoder=True), "encoder-decoder", ""),
    ],
)
def test_another_kind_of_model_is_named_with_its_remedy(
    tmp_path: Path, config: dict[str, Any], kind: str, remedy: str
) -> None:
    for check in (check_kind, check_files):
        with pytest.raises(ModelError) as refused:
            check(folder(tmp_path, config))
        line = str(refused.value)
        assert "\n" not in line
        assert str(tmp_path) in line
        assert kind in line
        assert remedy in line


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "llama"},
        {"architectures": None, "model_type": 7},
        {"architectures": [["LlamaForCausalLM"]]},
        named("LlamaForCausalLM", "llama", is_encoder_decoder=False),
        named("BartForCausalLM", "bart", is_encoder_decoder=True),
        named("BertLMHeadModel", "bert", is_decoder=True),
        named("GPT2LMHeadModel", "gpt2"),
        named("RwkvForCausalLM", "rwkv"),
        named("Gemma3ForConditionalGeneration", "gemma3", vision_config={}),
        named("SomethingNew", "own", auto_map={}),
    ],
)
def test_a_causal_model_and_what_nobody_knows_pass(tmp_path: Path, config: Any) -> None:
    check_kind(folder(tmp_path, config))
    check_kind(tmp_path / "nowhere")


def test_adapters_are_judged_by_their_base_model(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for each in (base, adapter):
        each.mkdir()
    folder(adapter, {"base_model_name_or_path": str(base), "peft_type": "LORA"}, "adapter_config.json")
    # transformers would read such a folder as its base model with the adapters, whatever else is in it
    folder(adapter, named("LlamaForCausalLM", "llama"))
    folder(base, named("BertForMaskedLM", "bert"))
    with pytest.raises(ModelError, match=r"adapter: its base model: .*base: it is an encoder"):
        check_kind(adapter)
    with pytest.raises(
        ModelError, match=r"no adapter_model\.safetensors in it; the adapters for .*base are missing"
    ):
        check_files(adapter)
    folder(base, named("LlamaForCausalLM", "llama"))
    check_kind(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"its base model: .*base: no weights in it"):
        check_files(adapter)
    folder(base, {"base_model_name_or_path": "other"}, "adapter_config.json")
    with pytest.raises(ModelError, match=r"its base model .*base is a folder of adapters too"):
        check_kind(adapter)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "{", "[]", "1", '{"a": ' * 100_000, "\ud800".encode("utf-8", "surrogatepass")]
)
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_configuration_that_is_none(tmp_path: Path, text: str | bytes, name: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match=name) as refused:
        check_kind(tmp_path)
    assert len(str(refused.value)) < 500


def header(length: int, text: bytes, rest: bytes = b"") -> bytes:
    return length.to_bytes(8, "little") + text + rest


@pytest.mark.parametrize(
    "content",
    [
        header(2**63, b"{}"),
        header(2**64 - 1, b""),
        header(200_000, b"[" * 200_000),
        header(2, b"[]"),
        header(4, b"null"),
        header(len(t := b'{"a":{"data_offsets":[0,"8"]}}'), t),
        header(len(t := b'{"a":{"data_offsets":[0,1e400]}}'), t),
        header(len(t := b'{"a":{"data_offsets":[0]}}'), t),
        header(len(t := b'{"a":{"data_offsets":[0,9223372036854775808]}}'), t),
        header(len(t := b'{"a":{"data_offsets":[0,true]}}'), t, b"."),
        b"",
        b"1234567",
    ],
)
def test_a_header_of_weights_that_cannot_be(tmp_path: Path, content: bytes) -> None:
    folder(tmp_path, named("LlamaForCausalLM", "llama"))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is broken"):
        check_files(tmp_path)


def test_asking_for_the_kind_loads_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    check_kind(folder(tmp_path, named("LlamaForCausalLM", "llama")))


NO_IDS = (-5, 10**20, 2**31, "abc", "1", 1.5, [[1]], True, {}, [None], [-1], float("inf"), [2, "abc"])


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ids_that_cannot_be(tmp_path: Path, file: str) -> None:
    save_model(tiny.tiny_student(), tmp_path)
    content = json.loads((tmp_path / file).read_text())
    wrong = [("eos_token_id", value) for value in NO_IDS]
    wrong += [
        (name, value) for name in ("pad_token_id", "bos_token_id") for value in ("abc", [1], -2, 10**20)
    ]
    for name, value in wrong:
        folder(tmp_path, content | {name: value}, file)
        with pytest.raises(
            ModelError, match=rf"{re.escape(str(tmp_path))}: {file}: {name} is .*no token id"
        ) as refused:
            load_model(tmp_path)
        assert len(str(refused.value)) < 500
    for fine in (None, [], [2], 2):
        folder(tmp_path, content | {"eos_token_id": fine, "pad_token_id": -1}, file)
        check_files(tmp_path)


def test_ids_of_a_model_in_memory(tmp_path: Path) -> None:
    model = tiny.tiny_student()
    for value in NO_IDS:
        model.lm.generation_config.eos_token_id = value
        with pytest.raises(ModelError, match=r"eos_token_id is .*no token id"):
            wrap_model(model.lm, model.tokenizer)
    model.lm.generation_config.eos_token_id = 1000
    with pytest.raises(VocabularyError, match="stop id 1000"):
        wrap_model(model.lm, model.tokenizer)


def test_a_model_saved_without_its_output_matrix(tmp_path: Path) -> None:
    model = tiny.tiny_student()
    save_model(model, tmp_path)
    model.lm.base_model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"output matrix \(LlamaModel\)"):
        load_model(tmp_path)
