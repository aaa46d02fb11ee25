"""`python -m benchmarks NAME …`: runs one benchmark of the table below."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from gold.errors import GoldError

# name: (module whose main(arguments) runs it and returns the exit status, what it does)
BENCHMARKS = {
    "assets": ("benchmarks.assets", "fetch the real models and tokenizers that the others need"),
    "align": ("benchmarks.align", "time from ids to chunks, beside plain Python and TRL"),
    "loss": ("benchmarks.loss", "time and memory of losses, beside plain torch, TRL and Liger"),
    "step": ("benchmarks.step", "one whole on-policy step by phase, beside TRL's GOLD trainer"),
    "architectures": ("benchmarks.architectures", "which kinds of layers train and generate, on tiny models"),
    "memory": ("benchmarks.memory", "the doctor's estimate of memory, beside measured peaks"),
    "long": ("benchmarks.long", "seconds and memory of completions of thousands of tokens"),
    "shapes": ("benchmarks.shapes", "the doctor's memory tables of the configurations for GPUs"),
    "padding": ("benchmarks.padding", "time, memory and share of padding of microbatches of ragged texts"),
    "gpu": ("benchmarks.gpu", "on a GPU: its tests, loss and step, in one call of nine minutes"),
    "fuzz": ("benchmarks.fuzz", "check alignments of random texts by every tokenizer"),
    "exactness": (
        "benchmarks.exactness",
        "byte tables and prefix targets beside sums over all segmentations",
    ),
    "objectives": ("benchmarks.objectives", "every objective on the demonstration task, with seeds"),
    "inside": ("benchmarks.inside", "a real pair: every byte, or one-to-one chunks alone, with seeds"),
    "adapters": (
        "benchmarks.adapters",
        "full training, LoRA and QLoRA of a real pair in equal time, with seeds",
    ),
    "informed": ("benchmarks.informed", "teachers that see more, and teachers of two families, with seeds"),
    "turns": ("benchmarks.turns", "conversations with a tool: distilled and imitated, with seeds"),
    "tails": ("benchmarks.tails", "a teacher that tells its likeliest tokens alone, beside all of its rows"),
    "branches": ("benchmarks.branches", "a real pair: the teacher's exact tables beside the bucket"),
    "claims": ("benchmarks.claims", "what on-policy distillation promises, one part per claim, with seeds"),
    "contract": ("benchmarks.contract", "put every objective, and losses of peers, to the contract"),
    "run": ("benchmarks.run", "train as a configuration says, and record the evaluations"),
    "served": ("benchmarks.served", "learn from a live server; what the client costs beside it"),
    "engine": ("benchmarks.engine", "rollouts from vLLM beside Hugging Face generate, and a run with it"),
    "rollouts": (
        "benchmarks.rollouts",
        "completions of the initial student beside live ones; cut ones kept or left out",
    ),
    "demo": ("benchmarks.demo", "the demonstration with three seeds"),
    "bits": ("benchmarks.bits", "whether the code computes what it computed before, bit for bit"),
    "release": ("benchmarks.release", "build the archives, install the wheel, and use it as the README says"),
}


def main(arguments: Sequence[str]) -> int:
    """Exit status of the benchmark that the first argument names; 2 if it names none."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m benchmarks NAME …\n")
        for name, (_, does) in BENCHMARKS.items():
            print(f"  {name:<12} {does}")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in BENCHMARKS:
        print(f"error: no benchmark {name!r}; known are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    try:
        return int(import_module(BENCHMARKS[name][0]).main(rest))
    except GoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
