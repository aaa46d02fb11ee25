"""Triton kernels and torch: the L1 distance of two rows, each sorted, and its slopes."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gold.kernels.gradient import Results, with_gradient
from gold.kernels.triton import launch
from gold.kernels.triton.pairs import VARYING

SHIFT = 18
INTERVALS = 0x80000000 >> SHIFT
"""Intervals of non-negative numbers: those with the same exponent and leading five mantissa bits."""
IN_DOUBT = 2
"""The sign of an interval whose entries may have different signs."""


def sorted_l1(p_NV: Tensor, q_NW: Tensor, *, overwrite: bool = False) -> Tensor:
    """See ``reference.sorted_l1``; no row is fully sorted.

    Entries are counted in narrow intervals. Where one side leads in rank by at least the other's count in an interval,
    all entries there have one sign; only entries of other intervals are sorted. Their number is needed on the host: one
    device synchronization.
    """
    p, q = p_NV.detach(), q_NW.detach().to(p_NV)

    def compute(wanted: bool) -> tuple[Results, tuple[Tensor, ...]]:
        here_p, here_q = _counts(p), _counts(q)
        lead = _above(here_p) - _above(here_q)
        # Zeros of one side are matched with the zero padding of the other.
        ahead = torch.where(torch.arange(INTERVALS, device=lead.device) > 0, 1, 0)
        sign = torch.where(lead >= here_q, ahead, torch.where(-lead >= here_p, -1, IN_DOUBT)).to(torch.int8)
        total_p, signs_p = _signed(p, sign, p.dtype)
        total_q, signs_q = _signed(q, sign, torch.int8)
        total = total_p - total_q
        at_p, at_q = (torch.nonzero(signs == IN_DOUBT, as_tuple=True) for signs in (signs_p, signs_q))
        if at_p[0].numel() + at_q[0].numel():
            doubt = sign == IN_DOUBT
            mine = _Ranked.of(p, at_p, here_p.masked_fill(~doubt, 0))
            theirs = _Ranked.of(q, at_q, here_q.masked_fill(~doubt, 0))
            s, found = mine.signs(theirs, lead)
            signs_p[mine.row, mine.column] = s
            total = total + found + theirs.signs(mine, -lead)[1]
        return (total,), (signs_p,)

    result: Tensor = with_gradient(compute, p_NV)
    return result


@dataclass(frozen=True)
class _Ranked:
    """Entries of one side in unsure intervals, row by row in descending order: indices, values, intervals and ranks
    within their interval; ``start`` and ``size`` of each row's intervals."""

    row: Tensor
    column: Tensor
    value: Tensor
    interval: Tensor
    rank: Tensor
    start: Tensor
    size: Tensor

    @classmethod
    def of(cls, values: Tensor, at: tuple[Tensor, ...], size: Tensor) -> "_Ranked":
        """Entries at (row, column) of ``values``; ``size`` counts the entries of each row's intervals."""
        order = torch.argsort(values[at], descending=True, stable=True)
        order = order[torch.argsort(at[0][order], stable=True)]
        row, column = at[0][order], at[1][order]
        value = values[row, column]
        interval = (value.float().view(torch.int32) & 0x7FFFFFFF) >> SHIFT
        counts = size.flip(1).flatten().long()
        start = (torch.cumsum(counts, 0) - counts).view(size.shape).flip(1)
        rank = torch.arange(row.numel(), device=row.device) - start[row, interval]
        return cls(row, column, value, interval, rank, start, size)

    def signs(self, other: "_Ranked", lead: Tensor) -> tuple[Tensor, Tensor]:
        """The sign of each entry's difference from the other side's entry of the same rank, of which this side is
        ``lead`` entries ahead, and per row the sum of signs times values."""
        cell = self.row, self.interval
        rival = self.rank + lead[cell]
        there = (rival >= 0) & (rival < other.size[cell])
        other_value = torch.zeros_like(self.value)
        other_value[there] = other.value[(other.start[cell] + rival)[there]]
        s = torch.where(rival < 0, -1.0, torch.sign(self.value - other_value)).to(self.value.dtype)
        parts = torch.bincount(self.row, minlength=self.size.shape[0])
        return s, torch.segment_reduce(s * self.value, "sum", lengths=parts)


def _counts(values: Tensor) -> Tensor:
    """Number of entries per row and interval."""
    rows, width = values.shape
    counts = torch.zeros((rows, INTERVALS), dtype=torch.int32, device=values.device)
    launch.run(
        count_intervals, rows * triton.cdiv(width, launch.TILE),
        values, counts, *values.stride(), width, INTERVALS=INTERVALS, SHIFT=SHIFT, TILE=launch.TILE,
    )  # fmt: skip
    return counts


def _above(counts: Tensor) -> Tensor:
    """Number of entries in the intervals above each."""
    return torch.cumsum(counts.flip(1), 1, dtype=torch.int32).flip(1) - counts


def _signed(values: Tensor, sign: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Per row the sum of entries in sure intervals times the sign of their interval, and each entry's sign."""
    rows, width = values.shape
    tiles = triton.cdiv(width, launch.TILE)
    sums = torch.empty((rows, tiles), dtype=launch.arithmetic(values), device=values.device)
    signs = torch.empty(values.shape, dtype=dtype, device=values.device)
    launch.run(
        sign_entries, rows * tiles,
        values, sign, signs, sums, *values.stride(), width,
        INTERVALS=INTERVALS, SHIFT=SHIFT, IN_DOUBT=IN_DOUBT, TILE=launch.TILE,
    )  # fmt: skip
    return sums.sum(1), signs


@triton.jit
def _interval(x, SHIFT: tl.constexpr):
    return (x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> SHIFT


@triton.jit(do_not_specialize=VARYING)
def count_intervals(
    values, counts, stride_n, stride_v, width, INTERVALS: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Number of entries of a tile in each interval."""
    tiles = tl.cdiv(width, TILE)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    at = ((tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)
    x = tl.load(values + n * stride_n + at * stride_v, mask=at < width, other=0.0)
    # Integer sums: independent of the order in which programs add.
    one = tl.full((TILE,), 1, tl.int32)
    tl.atomic_add(counts + n * INTERVALS + _interval(x, SHIFT), one, mask=at < width, sem="relaxed")


@triton.jit(do_not_specialize=VARYING)
def sign_entries(
    values, sign, signs, sums, stride_n, stride_v, width,
    INTERVALS: tl.constexpr, SHIFT: tl.constexpr, IN_DOUBT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each entry's sign, and the sum of a tile's entries in sure intervals times their signs."""
    dtype: tl.constexpr = sums.dtype.element_ty
    tiles = tl.cdiv(width, TILE)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    at = ((tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)
    x = tl.load(values + n * stride_n + at * stride_v, mask=at < width, other=0.0)
    s = tl.load(sign + n * INTERVALS + _interval(x, SHIFT), mask=at < width, other=0)
    tl.store(signs + n * width + at, s.to(signs.dtype.element_ty), mask=at < width)
    part = tl.where(s == IN_DOUBT, 0.0, s.to(dtype) * x.to(dtype))
    tl.store(sums + tl.program_id(0), tl.sum(part, 0))
