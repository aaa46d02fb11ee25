"""`python -m benchmarks memory`: the doctor's estimate of a step's memory beside measured peaks, on this CPU.

Each case trains a random Llama with SmolLM2's tokenizer for two steps of two microbatches, in a process of its own,
graded by a random Qwen3 with that tokenizer. The texts are given (no rollouts), except in the cases that say so. The
peak is that of the process over what it held before the models were made, after a step with tiny ones; freed memory
goes back to the system at once (`MALLOC_MMAP_THRESHOLD_`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.meter import MIB, Meter
from benchmarks.record import device_name, write_record
from gold import Recipe, Term, distill
from gold.data import Prompt
from gold.doctor.memory import Memory, Model, Plan, memory_of
from gold.models.adapters import add_adapters
from gold.models.footprint import Adapters
from gold.models.language_model import LanguageModel
from gold.models.load import wrap_model
from gold.train.progress import Quiet

TOKENIZERS = {"llama": "assets/smollm2-135m-instruct", "qwen3": "assets/tokenizers/qwen3"}
ROWS = {"llama": 49152, "qwen3": 151936}
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, checkpointing": {"checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, checkpointing": {"dtype": "bfloat16", "checkpointing": True},
    "LoRA": {"lora": 16},
    "LoRA on bfloat16, checkpointing": {"lora": 16, "dtype": "bfloat16", "checkpointing": True},
    "float32, short texts": {"tokens": 64},
    "float32, long texts": {"tokens": 1024, "sequences": 1},
    "float32, long texts, checkpointing": {"tokens": 1024, "sequences": 1, "checkpointing": True},
    "float32, wide": {"hidden": 768, "layers": 6, "sequences": 2},
    "float32, rollouts": {"tokens": 128, "generate": True},
}


def main(arguments: Sequence[str]) -> int:
    """Exit status: 1 if an estimate is further from its peak than ``--within``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="names of cases (all)")
    parser.add_argument("--within", type=float, default=0.15, help="largest error (%(default)s)")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(list(arguments))
    if given.one:
        print(json.dumps(measured(**CASES[given.one])))
        return 0
    started, found = time.perf_counter(), []
    for name in given.cases:
        row = {"case": name, **in_own_process(name)}
        found.append(row)
        print(
            f"{name:<36} estimated {row['estimated_mib']:>6} MiB ({row['phase']}), measured "
            f"{row['measured_mib']:>6} MiB: {row['error']:+.0%}",
            flush=True,
        )
    if given.record:
        command = " ".join(["python -m benchmarks memory", *arguments])
        seconds = time.perf_counter() - started
        print(
            write_record(
                "memory", {"cases": found}, command=command, seconds=seconds, device=device_name("cpu", 1)
            )
        )
    return int(any(abs(row["error"]) > given.within for row in found))


def in_own_process(name: str) -> dict[str, Any]:
    """The result of a case."""
    command = [sys.executable, "-m", "benchmarks", "memory", "--one", name]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


def measured(
    *,
    hidden: int = 512,
    layers: int = 8,
    sequences: int = 4,
    tokens: int = 256,
    dtype: str = "float32",
    checkpointing: bool = False,
    lora: int | None = None,
    generate: bool = False,
) -> dict[str, Any]:
    """The estimate and the measured peak of one case, in MiB."""
    torch.set_num_threads(1)
    configs = [config_of("llama", hidden, layers, dtype), config_of("qwen3", 256, 4, "float32")]
    adapters = Adapters(lora) if lora else None
    recipe = recipe_of(sequences, tokens, checkpointing, generate)
    warm = recipe_of(1, 8, checkpointing, generate).replace(steps=1)
    trained(config_of("llama", 64, 1, dtype), config_of("qwen3", 64, 1, "float32"), adapters, warm)
    meter = Meter(torch.device("cpu"))
    peak = meter(lambda: trained(configs[0], configs[1], adapters, recipe)).peak_bytes
    if peak is None:
        raise SystemExit("this system does not count the memory of a process")
    plan = Plan(
        Model("student", configs[0], dtype),
        (Model("teacher", configs[1]),),
        adapters,
        sequences=sequences,
        tokens=tokens,
        new_tokens=recipe.max_new_tokens,
        step_sequences=2 * sequences,
        gradient_checkpointing=checkpointing,
        autocast=False,
        generates=generate,
        on_gpu=False,
    )
    estimate = memory_of(plan)
    return {
        "parameters": plan.student.sizes.parameters,
        "sequences": sequences,
        "tokens": tokens,
        "measured_mib": round(peak / MIB),
        "estimated_mib": round(estimate.peak / MIB),
        "error": estimate.peak / peak - 1.0,
        "phase": estimate.phase,
        "parts_mib": parts_of(estimate),
    }


def parts_of(memory: Memory) -> Mapping[str, int]:
    """The parts in the phase that needs most, in MiB."""
    return {part.name: round(getattr(part, memory.phase) / MIB) for part in memory.parts}


def config_of(kind: str, hidden: int, layers: int, dtype: str) -> dict[str, Any]:
    """A config.json."""
    return {
        "model_type": kind,
        "vocab_size": ROWS[kind],
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "head_dim": 64,
        "tie_word_embeddings": True,
        "dtype": dtype,
    }


def recipe_of(sequences: int, tokens: int, checkpointing: bool, generate: bool) -> Recipe:
    """Two steps of two microbatches."""
    return Recipe(
        (Term("reverse_kl", support="bytes"),),
        steps=2,
        prompts_per_step=2 * sequences,
        num_generations=1,
        micro_batch_size=sequences,
        max_new_tokens=tokens - 4,
        on_policy=1.0 if generate else 0.0,
        gradient_checkpointing=checkpointing,
    )


def trained(
    student: Mapping[str, Any], teacher: Mapping[str, Any], adapters: Adapters | None, recipe: Recipe
) -> None:
    """Makes both models and trains the student."""
    lines = Path("data/openings.jsonl").read_text(encoding="utf-8").splitlines()
    text = " ".join(json.loads(line)["prompt"] for line in lines)
    prompts = [
        Prompt(str(n), "So it", completion=f" {text[97 * n :]}") for n in range(recipe.prompts_per_step)
    ]
    mine = model_of(student)
    mine = mine if adapters is None else add_adapters(mine, rank=adapters.rank)
    distill(mine, model_of(teacher), prompts, recipe, progress=Quiet())


def model_of(settings: Mapping[str, Any]) -> LanguageModel:
    """A random model with a tokenizer."""
    kind = settings["model_type"]
    known = {k: v for k, v in settings.items() if k not in ("model_type", "dtype")}
    config = AutoConfig.for_model(kind, **known)
    lm = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings["dtype"]))
    return wrap_model(lm, AutoTokenizer.from_pretrained(TOKENIZERS[kind], trust_remote_code=False), name=kind)
