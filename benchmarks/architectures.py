"""`python -m benchmarks architectures`: which kinds of layers train and generate, each tried on a tiny random model.

Each model generates completions of prompts of unlike length, is trained on them for two steps by another tiny model
with another tokenizer, and completes prompts again; then the same with recomputed activations, and with packed texts.
A kind that is refused is told with the reason.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import device_name, write_record
from gold.data import Prompt
from gold.errors import GoldError
from gold.rollout.engine import sample
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.train.loop import distill
from gold.train.recipe import Recipe

KINDS: Mapping[str, str] = {
    "llama": "attention",
    "gemma3_text": "attention, windows in some layers",
    "gemma2": "attention with a soft cap, windows",
    "mistral": "attention, a window",
    "gpt_oss": "attention with sinks, windows, experts",
    "qwen3_moe": "attention, experts",
    "deepseek_v3": "latent attention, experts",
    "bloom": "attention, ALiBi",
    "mamba": "recurrent",
    "mamba2": "recurrent",
    "falcon_mamba": "recurrent",
    "rwkv": "recurrent",
    "recurrent_gemma": "recurrent and windowed attention",
    "jamba": "recurrent and attention, experts",
    "bamba": "recurrent and attention",
    "falcon_h1": "recurrent beside attention",
    "zamba2": "recurrent, shared attention",
    "granitemoehybrid": "recurrent and attention, experts",
    "qwen3_next": "linear and full attention, experts",
    "lfm2": "convolutions and attention",
}


def main(arguments: Sequence[str]) -> int:
    """Exit status: 1 if a kind neither works nor is refused in one line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks architectures", description=__doc__)
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), help="model types of transformers (%(default)s)"
    )
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/results")
    given = parser.parse_args(list(arguments))
    started = time.perf_counter()
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in given.kinds:
            found.append({"kind": kind, "layers": KINDS.get(kind, ""), **tried(kind)})
            print(line(found[-1]), flush=True)
    if given.record:
        command = " ".join(["python -m benchmarks architectures", *arguments])
        seconds = time.perf_counter() - started
        where = device_name("cpu", 1)
        print(write_record("architectures", {"kinds": found}, command=command, seconds=seconds, device=where))
    return int(any("fault" in row for row in found))


def tried(kind: str) -> dict[str, Any]:
    """What one kind of model does."""
    tiny_lm, wrapped, tiny_teacher = tiny_models()
    row: dict[str, Any] = {}
    try:
        model = wrapped(tiny_lm(kind), kind)
        row["prompts"] = model.generates
        prompts = [Prompt(str(n), text=text) for n, text in enumerate(("1", "12+34-5", "7+8=15 12 13", "9-"))]
        recipe = Recipe(
            steps=2, prompts_per_step=4, num_generations=1, max_new_tokens=24, lr=1e-3, warmup_steps=0
        )
        steps = distill(model, tiny_teacher(), prompts, recipe).steps
        row["loss"] = [step["loss"] for step in steps]
        seeds = [(0, n) for n in range(4)]
        sample(HuggingFaceEngine(model, 4), model, prompts, Sampling(max_new_tokens=24), seeds=seeds)
        for name, changes in (
            ("recomputed", {"gradient_checkpointing": True}),
            ("packed", {"packing": True}),
        ):
            row[name] = outcome(lambda changes=changes: again(kind, prompts, recipe.replace(**changes)))
    except GoldError as error:
        row["refused"] = str(error)
    except Exception as error:
        row["fault"] = f"{type(error).__name__}: {error}"
    return row


def again(kind: str, prompts: Sequence[Prompt], recipe: Recipe) -> None:
    """Two steps of a fresh model."""
    tiny_lm, wrapped, tiny_teacher = tiny_models()
    model = wrapped(tiny_lm(kind), kind)
    distill(model, tiny_teacher(), prompts, recipe)


def tiny_models() -> tuple[Any, Any, Any]:
    """The makers of the tests' tiny models."""
    architectures = import_module("support.architectures")
    return architectures.tiny_lm, architectures.wrapped, import_module("support.tiny_models").tiny_teacher


def outcome(work: Any) -> str:
    """ "" if it works, else why it is refused."""
    try:
        work()
    except GoldError as error:
        return str(error)
    return ""


def line(row: Mapping[str, Any]) -> str:
    """One row of a table in Markdown."""
    if said := row.get("refused") or row.get("fault"):
        return f"| `{row['kind']}` | {row['layers']} | {said} | | | |"
    recomputed, packed = ("yes" if not row[name] else "no" for name in ("recomputed", "packed"))
    return f"| `{row['kind']}` | {row['layers']} | yes | {row['prompts']} | {recomputed} | {packed} |"
