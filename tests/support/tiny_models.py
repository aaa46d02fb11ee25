"""A tiny pair of models whose tokenizers differ, saved as folders, and runs of them that take seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from gold.data import Prompt
from gold.demo.models import character_tokenizer, tiny_model, word_tokenizer
from gold.demo.running_sums import RunningSums
from gold.models.language_model import LanguageModel
from gold.models.load import save_model

TASK = RunningSums(shortest=2, longest=3)


def texts(count: int = 200) -> list[str]:
    """Prompts of the task with their answers, to learn a tokenizer from."""
    return [f"{p.text}{p.completion}" for p in TASK.prompts("train", count, 3)]


def tiny_student(seed: int = 1, *, layers: int = 2, width: int = 32) -> LanguageModel:
    """Random weights; whole numbers are its tokens."""
    return tiny_model(word_tokenizer(texts(), 120), "student", layers=layers, width=width, seed=seed)


def tiny_teacher(seed: int = 2, *, layers: int = 2, width: int = 32) -> LanguageModel:
    """Random weights, sharpened; characters are its tokens."""
    model = tiny_model(character_tokenizer(), "teacher", layers=layers, width=width, seed=seed)
    with torch.no_grad():
        model.lm.get_output_embeddings().weight.mul_(20.0)
    return model


def prompts(count: int = 40, seed: int = 5) -> list[Prompt]:
    """Training prompts with completions."""
    return TASK.prompts("train", count, seed)


def heldout(count: int = 6, seed: int = 5) -> list[Prompt]:
    """Held-out prompts with completions."""
    return TASK.prompts("heldout", count, seed)


def save_pair(folder: Path) -> tuple[Path, Path]:
    """Folders of both models."""
    for name, model in (("student", tiny_student()), ("teacher", tiny_teacher())):
        save_model(model, folder / name)
    return folder / "student", folder / "teacher"


def write_prompts(path: Path, given: Sequence[Prompt]) -> Path:
    """The prompts as JSON lines."""
    lines = [json.dumps({"prompt": p.text, "completion": p.completion, "id": p.key}) for p in given]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run_settings(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """The configuration of a run of seconds with the models saved in ``folder``; changes as ``train__steps=3``."""
    settings: dict[str, Any] = {
        "student": {"path": str(folder / "student"), "device": "cpu"},
        "teacher": {"path": str(folder / "teacher"), "device": "cpu"},
        "data": {
            "task": {
                "name": "running_sums",
                "options": {"shortest": 2, "longest": 3},
                "train": 40,
                "heldout": 6,
            }
        },
        "rollout": {"max_new_tokens": 10, "num_generations": 2, "generation_batch_size": 8},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "train": {"steps": 8, "prompts_per_step": 4, "micro_batch_size": 4, "checkpoint_every": 2},
        "evaluate": {"every": 3, "prompts": 6, "samples": 2},
        "output": str(output),
    }
    for name, value in changes.items():
        *above, key = name.split("__")
        section = settings
        for part in above:
            section = section.setdefault(part, {})
        section[key] = value
    return settings


def write_settings(path: Path, settings: Mapping[str, Any]) -> Path:
    """The configuration as a YAML file."""
    path.write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
    return path


class Verify:
    """The task's own verifier, to inherit from."""

    def score(self, prompt: Prompt, completion: str) -> float:
        """See ``RunningSums.score``."""
        return TASK.score(prompt, completion)
