"""Names of other trainers: refused with the name here, and every field of TRL's configuration has its answer."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import gold
from gold import Config, Recipe
from gold.errors import ConfigError
from gold.losses import OBJECTIVES
from gold.other_names import KEY_OF
from gold.schema import keys_of

PAGE = Path(gold.__file__).parents[1] / "docs" / "migrating-from-trl.md"
KEYS = {key for key, *_ in keys_of(Config)}
RUN = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"prompts": "p"}, "output": "o"}

# The fields that GOLDConfig of TRL 1.16 declares itself.
GOLD_FIELDS = {
    "learning_rate",
    "temperature",
    "top_p",
    "top_k",
    "lmbda",
    "beta",
    "max_completion_length",
    "teacher_model_name_or_path",
    "teacher_model_revision",
    "teacher_model_init_kwargs",
    "teacher_tokenizer_name_or_path",
    "disable_dropout",
    "seq_kd",
    "num_generations",
    "generation_batch_size",
    "use_uld_loss",
    "uld_token_merge_strategy",
    "use_extended_uld",
    "uld_use_hybrid_loss",
    "uld_hybrid_matched_weight",
    "uld_hybrid_unmatched_weight",
    "uld_crossentropy_weight",
    "uld_distillation_weight",
    "uld_student_temperature",
    "uld_teacher_temperature",
    "uld_skip_student_eos",
    "uld_skip_teacher_eos",
    "use_vllm",
    "vllm_mode",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
    "vllm_gpu_memory_utilization",
    "vllm_tensor_parallel_size",
    "vllm_max_model_length",
    "vllm_model_impl",
    "vllm_structured_outputs_regex",
    "vllm_sync_frequency",
    "vllm_enable_sleep_mode",
    "log_completions",
    "log_completions_steps",
    "num_completions_to_print",
    "wandb_log_unique_prompts",
    "callbacks",
}


def rows() -> list[tuple[list[str], str]]:
    """The fields and the answer of each row of the page's tables."""
    lines = [
        line.strip("| ").split(" | ")
        for line in PAGE.read_text("utf-8").splitlines()
        if line.startswith("| `")
    ]
    return [(re.findall(r"`([a-z_0-9]+)`", line[0]), " | ".join(line[1:])) for line in lines]


def test_every_field_has_its_answer_once() -> None:
    named = [field for found, _ in rows() for field in found]
    assert len(named) == len(set(named))
    assert set(named) >= GOLD_FIELDS


def test_the_fields_are_those_of_trl() -> None:
    config = pytest.importorskip("trl.experimental.gold.gold_config", exc_type=ImportError)
    own = set(config.GOLDConfig.__annotations__)
    assert own - {"_VALID_DICT_FIELDS"} == GOLD_FIELDS
    assert {field for found, _ in rows() for field in found} - {"peft_config"} <= {
        field.name for field in fields(config.GOLDConfig)
    }


def test_every_key_in_the_answers_is_a_key() -> None:
    for _, answer in rows():
        for key in re.findall(r"`([a-z]+(?:\.[a-z_0-9]+)+)`", answer):
            assert key in KEYS | {"objectives.0.beta", "report.html"}, key
        for name in re.findall(r"name: ([a-z_]+)", answer):
            assert name in OBJECTIVES


@pytest.mark.parametrize("name", KEY_OF)
def test_a_foreign_name_is_refused_with_the_key(name: str) -> None:
    key = KEY_OF[name]
    assert key in KEYS | {"objectives.0.beta"}
    assert name not in {known.split(".")[-1] for known in KEYS} or name == "model"
    with pytest.raises(ConfigError, match=re.escape(f"train.{name}: unknown key; did you mean {key}?")):
        Config.model_validate(RUN | {"train": {name: 1}})


def test_a_recipe_says_its_own_names() -> None:
    with pytest.raises(ConfigError, match=r"learning_rate: unknown key; did you mean lr\?"):
        Recipe(learning_rate=1.0)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="output_dir: unknown key; known here: "):
        Recipe(output_dir="o")  # type: ignore[call-arg]
