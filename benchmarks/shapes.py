"""`python -m benchmarks shapes`: what `gold doctor` says of the configurations for GPUs, without their weights.

Each model is a folder with the sizes of its published config.json and a tokenizer from assets; a tokenizer that is not
there is replaced by another, which changes the checks of the pair and hardly the memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import device_name, write_record
from gold.diagnose import diagnose_run
from gold.doctor.memory_table import Hardware, MemoryReport, memory_json, memory_lines

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


def _shape(
    kind: str, rows: int, hidden: int, inner: int, layers: int, heads: int, keys: int, head: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": head,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }


# Sizes of the models' config.json, their parameters in millions, and the tokenizer in assets.
SHAPES: dict[str, tuple[dict[str, Any], int, str]] = {
    "Qwen/Qwen3-0.6B": (_shape("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True), 596, "qwen3"),
    "Qwen/Qwen3-4B": (_shape("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True), 4022, "qwen3"),
    "Qwen/Qwen3-8B": (_shape("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False), 8191, "qwen3"),
    "Qwen/Qwen3-32B": (_shape("qwen3", 151936, 5120, 25600, 64, 64, 8, 128, False), 32762, "qwen3"),
    "HuggingFaceTB/SmolLM3-3B": (
        _shape("smollm3", 128256, 2048, 11008, 36, 16, 4, 128, True),
        3075,
        "llama3_1",
    ),
    "meta-llama/Llama-3.2-1B-Instruct": (
        _shape("llama", 128256, 2048, 8192, 16, 32, 8, 64, True),
        1236,
        "llama3_1",
    ),
    "meta-llama/Llama-3.1-8B-Instruct": (
        _shape("llama", 128256, 4096, 14336, 32, 32, 8, 128, False),
        8030,
        "llama3_1",
    ),
    "microsoft/phi-4": (_shape("phi3", 100352, 5120, 17920, 40, 40, 10, 128, False), 14660, "llama2"),
}
# GPUs and the GiB of each.
CONFIGURATIONS = {
    "qwen3-0.6b-from-smollm3-3b": (1, 24),
    "llama3-1b-lora-from-qwen3-4b": (1, 24),
    "qwen3-4b-lora-from-phi4-14b": (1, 80),
    "llama3-8b-from-qwen3-32b": (8, 80),
    "countdown-llama3-1b-from-qwen3-4b": (1, 80),
}


def main(arguments: Sequence[str]) -> int:
    """Exit status: 1 if a configuration does not fit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks shapes", description=__doc__)
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/results")
    given = parser.parse_args(list(arguments))
    started, found = time.perf_counter(), {}
    for name, (gpus, memory) in CONFIGURATIONS.items():
        report = report_of(name, gpus, memory)
        found[name] = memory_json(report)
        print(f"\ngold doctor configs/{name}.yaml --gpus {gpus} --memory {memory}\n", flush=True)
        print("\n".join(memory_lines(report)), flush=True)
    if given.record:
        command = " ".join(["python -m benchmarks shapes", *arguments])
        seconds = time.perf_counter() - started
        print(write_record("shapes", found, command=command, seconds=seconds, device=device_name("cpu", 1)))
    return int(not all(each["fits"] for each in found.values()))


def report_of(name: str, gpus: int, memory: float, *overrides: str) -> MemoryReport:
    """The doctor's report on the memory of a configuration."""
    with tempfile.TemporaryDirectory() as folder:
        changes = []
        for role in ("student", "teacher"):
            model = folder_of(name, role, Path(folder))
            changes.append(f"{role}.path={model}")
        hardware = Hardware(memory=round(memory * GIB), gpus=gpus)
        report = diagnose_run(ROOT / "configs" / f"{name}.yaml", [*changes, *overrides], hardware=hardware)
    if report.of_run is None:
        raise SystemExit(f"{name}: {report.checks}")
    return report.of_run


def folder_of(name: str, role: str, inside: Path) -> Path:
    """A folder for a model of a configuration: its config.json, and a tokenizer."""
    from gold.config import Config

    config = Config.load(ROOT / "configs" / f"{name}.yaml")
    model = config.student.path if role == "student" else config.named_teachers["teacher"].path
    assert model is not None
    shape, _, tokenizer = SHAPES[model]
    folder = inside / model.replace("/", "--")
    shutil.copytree(ROOT / "assets" / "tokenizers" / tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(shape))
    return folder
