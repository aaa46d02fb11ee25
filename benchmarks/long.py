"""`python -m benchmarks long`: seconds and memory of one long completion, drawn, and learned from.

A tiny Llama (two layers, 64 wide) with SmolLM2's tokenizer draws one completion of so many tokens; then it takes a step
on a given text of about as many, graded by a Qwen3 of the same size with its own tokenizer. Each length has a process
of its own and one thread; memory is what is held at most over what was held before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims.figures import markdown
from benchmarks.memory import config_of, model_of
from benchmarks.meter import MIB, Meter
from benchmarks.record import device_name, write_record
from gold import Recipe, Term, distill
from gold.data import Prompt
from gold.models.language_model import LanguageModel
from gold.rollout.engine import Request
from gold.rollout.hf import HuggingFaceEngine
from gold.rollout.types import Sampling
from gold.train.progress import Quiet


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks long", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048, 4096, 8192])
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/results")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(list(arguments))
    if given.one:
        print(json.dumps(measured(given.one)))
        return 0
    started = time.perf_counter()
    data = {"rows": [in_own_process(tokens) for tokens in given.tokens]}
    print(table(data))
    if given.record:
        command = " ".join(["python -m benchmarks long", *arguments])
        seconds = time.perf_counter() - started
        print(write_record("long", data, command=command, seconds=seconds, device=device_name("cpu", 1)))
    return 0


def table(data: dict[str, Any]) -> str:
    """The record as Markdown."""
    rows = [
        [
            *(f"{r['tokens']:,}", f"{r['draw_s']:.1f} s", f"{r['draw_mib']:,} MiB"),
            *(f"{r['text_tokens']:,}", f"{r['step_s']:.1f} s", f"{r['step_mib']:,} MiB"),
        ]
        for r in data["rows"]
    ]
    return markdown(["tokens drawn", "", "memory", "tokens of a step", "", "memory"], rows)


def in_own_process(tokens: int) -> dict[str, Any]:
    """The result of a length."""
    command = [sys.executable, "-m", "benchmarks", "long", "--one", str(tokens)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


def measured(tokens: int) -> dict[str, Any]:
    """Seconds and MiB of a draw and of a step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher = (tiny_model(kind, tokens) for kind in ("llama", "qwen3"))
    learn(student, teacher, 64)  # compiles kernels
    meter = Meter(torch.device("cpu"))
    drawn = meter(lambda: draw(student, tokens))
    learned = meter(lambda: learn(student, teacher, tokens))
    if drawn.peak_bytes is None or learned.peak_bytes is None:
        raise SystemExit("this system does not count the memory of a process")
    return {
        "tokens": tokens,
        "draw_s": round(drawn.seconds, 1),
        "draw_mib": round(drawn.peak_bytes / MIB),
        "text_tokens": len(student.tokenizer(text_of(tokens)).input_ids),
        "step_s": round(learned.seconds, 1),
        "step_mib": round(learned.peak_bytes / MIB),
    }


def tiny_model(kind: str, tokens: int) -> LanguageModel:
    """A random model with room for these tokens, and for those of another tokenizer."""
    return model_of({**config_of(kind, 64, 2, "float32"), "max_position_embeddings": 2 * tokens + 256})


def draw(student: LanguageModel, tokens: int) -> None:
    """One completion of ``tokens`` tokens: without stop ids nothing ends it earlier."""
    request = Request((1, 2, 3, 4), (0, 0), Sampling(max_new_tokens=tokens), ())
    (drawn,) = HuggingFaceEngine(student, 1).generate([request])
    assert drawn.ids.size == tokens


def learn(student: LanguageModel, teacher: LanguageModel, tokens: int) -> None:
    """A step on one given text."""
    recipe = Recipe(
        (Term("reverse_kl", support="bytes"),),
        steps=1,
        prompts_per_step=1,
        num_generations=1,
        micro_batch_size=1,
        max_new_tokens=tokens,
        on_policy=0.0,
        gradient_checkpointing=False,
    )
    prompts = [Prompt("0", "So it", completion=text_of(tokens))]
    distill(student, teacher, prompts, recipe, progress=Quiet())


def text_of(tokens: int) -> str:
    """English words, in an order of no meaning, of at most ``tokens`` of the student's tokens."""
    lines = Path("data/openings.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(line)["prompt"] for line in lines).split()
    return " " + " ".join(random.Random(0).choices(words, k=3 * tokens // 4))
