"""`python -m benchmarks padding`: what padding costs where completions differ in length.

Forward and backward passes of a random Llama over one step of texts whose lengths are log-normal, in microbatches of so
many texts in the order given, of so many texts of like length (`train.micro_batch_size`), of at most so many padded
tokens, each filled or with little padding (`train.micro_batch_tokens`), and of so many tokens packed into one row
(`train.packing`): time, peak memory, share of padding, and the distance of the gradient from that of one text at a
time. The ways take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.meter import MIB, Meter, Sample
from benchmarks.record import device_name, write_record
from gold.kernels.lm_head import token_logp
from gold.models.hidden_states import lazy_logits
from gold.models.padding import PaddedStates, batches_by_length, packed_batches, ragged_batches
from gold.models.probe import check_packing

Batches = list[list[int]]
_PACKED = "packed"


def main(arguments: Sequence[str]) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks padding", description=__doc__)
    parser.add_argument("--texts", type=int, default=32, help="texts of a step (%(default)s)")
    parser.add_argument("--median", type=int, default=150, help="their median length in tokens (%(default)s)")
    parser.add_argument("--longest", type=int, default=1024, help="where longer ones end (%(default)s)")
    parser.add_argument("--spread", type=float, default=0.8, help="deviation of the lengths' logarithm")
    parser.add_argument("--size", type=int, default=8, help="texts of a microbatch (%(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096], help="tokens of a microbatch")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each way (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of lengths and ids (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--record", action="store_true", help="keep the result in benchmarks/results")
    given = parser.parse_args(list(arguments))
    started = time.perf_counter()
    torch.set_num_threads(1)
    device = torch.device(given.device)
    step = Step(texts_of(given), device)
    ways = step.ways(given.size, given.tokens)
    exact = step.gradient([[i] for i in range(given.texts)])
    errors = {
        name: float((step.gradient(way, _PACKED in name) - exact).norm() / exact.norm())
        for name, way in ways.items()
    }
    samples: dict[str, list[Sample]] = {name: [] for name in ways}
    meter = Meter(device)
    for _ in range(given.rounds):
        for name, way in ways.items():
            samples[name].append(meter(partial(step.gradient, way, _PACKED in name)))
    found = [step.row(name, way, samples[name], errors[name]) for name, way in ways.items()]
    for row in found:
        print(
            f"{row['way']:<24} {row['microbatches']:>3} microbatches, {row['padding_share']:6.1%} padding, "
            f"{row['seconds']:6.2f} s, peak {row['peak_mib']} MiB, gradient off by {row['gradient_error']:.1e}"
        )
    if given.record:
        data = {"lengths": step.lengths, "clock": meter.clock, "rounds": given.rounds, "ways": found}
        command = " ".join(["python -m benchmarks padding", *arguments])
        seconds = time.perf_counter() - started
        where = device_name(given.device, 1 if device.type == "cpu" else None)
        print(write_record("padding", data, command=command, seconds=seconds, device=where))
    return 0


def texts_of(given: Any) -> list[np.ndarray]:
    """Random ids, of log-normal lengths."""
    rng = np.random.default_rng(given.seed)
    lengths = np.exp(np.log(given.median) + given.spread * rng.standard_normal(given.texts))
    sizes = np.clip(lengths, 8, given.longest).astype(int)
    return [rng.integers(3, 4096, size).astype(np.int32) for size in sizes]


class Step:
    """The texts of a step and a model that learns them."""

    def __init__(self, texts: list[np.ndarray], device: torch.device) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
        )
        self.lm = LlamaForCausalLM(config).eval().to(device)
        check_packing(self.lm, "random")
        self.texts, self.device = texts, device
        self.lengths = [1 + text.size for text in texts]

    def ways(self, size: int, tokens: Sequence[int]) -> dict[str, Batches]:
        """The microbatches of each way."""
        given = list(range(len(self.texts)))
        ordered = sorted(given, key=lambda i: -self.lengths[i])
        sizes = range(0, len(given), size)
        ways = {f"{size} texts as given": [given[first : first + size] for first in sizes]}
        ways[f"{size} of like length"] = [ordered[first : first + size] for first in sizes]
        for most in tokens:
            ways[f"{most} tokens, filled"] = batches_by_length(self.lengths, most)
            ways[f"{most} tokens"] = ragged_batches(self.lengths, most)
            ways[f"{most} tokens, {_PACKED}"] = packed_batches(self.lengths, most)
        return ways

    def gradient(self, batches: Batches, packed: bool = False) -> Tensor:
        """The gradient of the texts' negative log-probability per token."""
        self.lm.zero_grad(set_to_none=True)
        count = sum(text.size for text in self.texts)
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        for batch in batches:
            texts = [self.texts[i] for i in batch]
            given = [[1]] * len(batch), texts, [t.size for t in texts]
            states = (
                PaddedStates.packed(*given, self.device)
                if packed
                else PaddedStates.of(*given, 0, self.device)
            )
            target = torch.from_numpy(np.concatenate(texts).astype(np.int64)).to(self.device)
            logp, _ = token_logp(lazy_logits(self.lm, states), target, none)
            (-logp.sum() / count).backward()
        return torch.cat([p.grad.flatten() for p in self.lm.parameters() if p.grad is not None])

    def row(self, name: str, batches: Batches, samples: Sequence[Sample], error: float) -> dict[str, Any]:
        """What is recorded of a way: medians, and the seconds of each round."""
        padded = sum(len(batch) * max(self.lengths[i] for i in batch) for batch in batches)
        padded = sum(self.lengths) if _PACKED in name else padded
        peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
        return {
            "way": name,
            "microbatches": len(batches),
            "padding_share": 1.0 - sum(self.lengths) / padded,
            "seconds": statistics.median(sample.seconds for sample in samples),
            "seconds_of_rounds": [round(sample.seconds, 3) for sample in samples],
            "peak_mib": round(statistics.median(peaks) / MIB) if peaks else None,
            "gradient_error": error,
        }
