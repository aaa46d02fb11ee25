"""Sizes of the Triton programs, and how they are launched."""

# mypy: allow-untyped-calls

from typing import Any

import torch
import triton
from torch import Tensor

from gold.kernels.triton.pairs import sum_leaves

# Sizes are powers of two, chosen from arithmetic and the compiler's register counts, not yet measured: 2,048 float32
# values are 16 a thread with 4 warps, and 64 registers allow 8 programs on a multiprocessor.
TILE = 2048
"""Columns per program in kernels that read a row once."""
BACK_TILE = 1024
"""Columns per program in a backward pass, which takes up to twice the registers."""
LEAF = 128
"""Columns of an order that are summed once for all ranges: with more, range edges are longer."""
RANGES = 16
"""Ranges per program: most hold a handful of columns."""
STEP = 16
"""Columns of every range that a program reads at a time."""
JOIN = 1024
"""Pairs that a program joins at a time."""
WARPS = 4
"""Warps per program."""


def run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launches a kernel on the device of its first argument, or on a CPU interprets it."""
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants, num_warps=WARPS)


def arithmetic(logits: Tensor) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def leaves(
    logits_NV: Tensor, order: Tensor | None, leaf: int, moment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Maximum and Σ exp(logit − maximum) of every ``leaf`` columns of an order: two [N, leaves]. ``moment`` gets the
    same sum with each exponential times its exponent."""
    rows, width = logits_NV.shape
    shape = (rows, triton.cdiv(width, leaf))
    top, total = (logits_NV.new_empty(shape, dtype=arithmetic(logits_NV)) for _ in range(2))
    count = max(1, TILE // leaf)
    run(
        sum_leaves, rows * triton.cdiv(shape[1], count),
        logits_NV, order, top, total, moment, *logits_NV.stride(), width, shape[1],
        LEAF=leaf, LEAVES=count,
    )  # fmt: skip
    return top, total
