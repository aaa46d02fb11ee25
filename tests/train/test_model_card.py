"""The README.md beside a trained student: what the Hub reads of it, and what it tells a reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from gold.train.model_card import model_card
from gold.train.run_folder import RunFolder

CONFIG: dict[str, Any] = {
    "student": {"path": "org/small", "dtype": "float32", "device": "cuda:3", "lora": None},
    "teacher": {
        "path": "/home/me/secret place/large",
        "served": {"url": "http://inside.example:8000/v1", "model": "large", "key_env": "MY_KEY"},
    },
    "data": {"prompts": "/home/me/secret place/mine.jsonl"},
    "rollout": {"max_new_tokens": 48, "num_generations": 4, "temperature": 1.0},
    "objectives": [
        {"name": "reverse_kl", "weight": 1.0, "support": "bytes"},
        {"name": "sft", "weight": 0.1},
    ],
    "optimizer": {"lr": 3e-5, "schedule": "linear", "warmup_steps": 4},
    "train": {"steps": 30, "prompts_per_step": 8, "seed": 17},
    "output": "/home/me/secret place/run",
}
INPUTS = {
    "student": {"from": "org/small", "digests": {"weights": "0" * 64}},
    "training prompts": {
        "from": "/home/me/secret place/mine.jsonl",
        "digests": {"content": "ab12" * 16},
        "count": 2150,
    },
    "held-out prompts": {"from": "mine.jsonl", "digests": {"content": "cd34" * 16}, "count": 64},
}
EVALS = [
    {
        "step": 0,
        "reverse_kl_per_byte": 0.1977,
        "reverse_kl_per_byte_low": 0.169,
        "reverse_kl_per_byte_high": 0.227,
    },
    {"step": 15, "reverse_kl_per_byte": 0.1666},
    {
        "step": 30,
        "reverse_kl_per_byte": 0.1412,
        "reverse_kl_per_byte_low": 0.121,
        "reverse_kl_per_byte_high": 0.164,
    },
]


def card_of(
    place: Path, config: dict[str, Any] = CONFIG, evals: list[dict[str, Any]] = EVALS, **options: Any
) -> str:
    with RunFolder.create(place / "run", config, inputs=INPUTS) as run:
        for record in evals:
            run.log("eval", record)
        run.log("train", {"step": 30, "loss": 0.5})
        return model_card(run, **options)


def folder_with_card(place: Path, **metadata: str) -> str:
    """A model's folder whose card says something of its licence."""
    place.mkdir()
    lines = "".join(f"{key}: {value}\n" for key, value in metadata.items())
    (place / "README.md").write_text(f"---\n{lines}---\n# A model\n", "utf-8")
    return str(place)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", absent)


def test_the_hub_reads_its_metadata(tmp_path: Path) -> None:
    data = ModelCard(card_of(tmp_path)).data
    assert data.base_model == "org/small"
    assert data.base_model_relation == "finetune"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert "distillation" in data.tags
    assert data.license is None


def test_the_revision_of_the_base_model_is_told_and_no_part_of_its_id(tmp_path: Path) -> None:
    for number, student in enumerate(({"path": "org/small", "revision": "v2"}, {"path": "org/small@v2"})):
        text = card_of(tmp_path / str(number), {**CONFIG, "student": student})
        assert ModelCard(text).data.base_model == "org/small"
        assert "org/small@v2" in text


def test_that_of_an_adapter_is_for_peft(tmp_path: Path) -> None:
    config = {**CONFIG, "student": {**CONFIG["student"], "lora": {"rank": 8, "alpha": 16.0}}}
    text = card_of(tmp_path, config, adapter=True)
    data = ModelCard(text).data
    assert (data.library_name, data.base_model_relation) == ("peft", "adapter")
    assert "AutoPeftModelForCausalLM" in text
    assert "rank 8" in text


def test_it_tells_what_was_done_with_what_and_what_came_of_it(tmp_path: Path) -> None:
    text = card_of(tmp_path)
    for told in (
        "org/small",
        "large",
        "2,150 prompts",
        "ab12ab12",
        "cd34cd34",
        "`reverse_kl` (support bytes)",
        "0.1 × `sft`",
    ):
        assert told in text
    (measured,) = [line for line in text.splitlines() if line.startswith("| reverse KL")]
    assert measured.count("0.169 – 0.227") == measured.count("0.121 – 0.164") == 1
    assert "0.1666" not in measured
    assert "seed 17" in text
    assert "torch " in text


def test_it_does_not_tell_where_its_maker_works(tmp_path: Path) -> None:
    text = card_of(tmp_path)
    for private in ("secret", "inside.example", "MY_KEY", "cuda:3", str(tmp_path)):
        assert private not in text


def test_a_run_without_evaluations_and_one_from_python_have_a_card(tmp_path: Path) -> None:
    assert "No held-out prompts" in card_of(tmp_path / "a", evals=[])
    recipe = {"steps": 30, "lr": 1e-5, "seed": 3, "objectives": [{"name": "reverse_kl", "weight": 1.0}]}
    names = {"recipe": recipe, "student": "mine", "teacher": {"a": "large", "b": "larger"}}
    text = card_of(tmp_path / "b", names)
    assert "`large` and `larger`" in text
    assert ModelCard(text).data.base_model is None  # no name on the Hub


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"license": "apache-2.0"}, "apache-2.0"),
        ({"license": "other", "license_name": "own", "license_link": "https://a/b"}, "[own](https://a/b)"),
        ({"title": "x"}, "no licence is named"),
    ],
)
def test_the_licence_of_the_base_model_is_handed_on(
    tmp_path: Path, metadata: dict[str, str], told: str
) -> None:
    base = folder_with_card(tmp_path / "base", **metadata)
    teacher = folder_with_card(tmp_path / "teacher", license="gemma")
    config = {**CONFIG, "student": {"path": base}, "teacher": {"path": teacher}}
    text = card_of(tmp_path, config)
    assert ModelCard(text).data.to_dict().get("license") == metadata.get("license")
    assert told in text
    assert "gemma" in text


def test_a_base_that_is_a_folder_of_adapters_has_the_licence_of_its_base(tmp_path: Path) -> None:
    base = folder_with_card(tmp_path / "base", license="mit")
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}), "utf-8")
    text = card_of(tmp_path, {**CONFIG, "student": {"path": str(adapters)}})
    assert ModelCard(text).data.license == "mit"


def test_a_card_of_the_base_that_cannot_be_read_names_no_licence(tmp_path: Path) -> None:
    broken = folder_with_card(tmp_path / "base", license="[")
    assert ModelCard(card_of(tmp_path, {**CONFIG, "student": {"path": broken}})).data.license is None
