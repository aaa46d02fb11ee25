"""Triton functions on pairs (maximum, Σ exp(x − maximum)): of tiles, leaves, lists and ranges of columns."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

import triton
import triton.language as tl

VARYING = (
    "first_row", "first_mass", "end_mass", "rows", "segments", "stop_count", "other_stop_count", "texts", "stop_low"
)  # fmt: skip
"""Arguments for whose divisibility kernels are not specialized (compiled again)."""


@triton.jit
def finite(top):
    """The maximum to subtract: 0 instead of −inf, since −inf − −inf is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def join(top, total, more_top, more_total):
    """The pair of the union of two pairs."""
    both = tl.maximum(top, more_top)
    at = finite(both)
    return both, total * tl.exp(top - at) + more_total * tl.exp(more_top - at)


@triton.jit
def log(total):
    """Logarithm, −inf for 0; without a warning in the interpreter."""
    return tl.where(total == 0.0, float("-inf"), tl.log(tl.where(total == 0.0, 1.0, total)))


@triton.jit(do_not_specialize=VARYING)
def sum_leaves(
    logits, order, leaf_top, leaf_total, leaf_moment, stride_n, stride_v, width, leaves,
    LEAF: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
    """The pair of every leaf of an order of columns; ``leaf_moment``: the sum with each exponential times its
    exponent."""
    groups = tl.cdiv(leaves, LEAVES)
    row = (tl.program_id(0) // groups).to(tl.int64)
    leaf = (tl.program_id(0) % groups) * LEAVES + tl.arange(0, LEAVES)
    at = leaf[:, None] * LEAF + tl.arange(0, LEAF)[None, :]
    inside = at < width
    column = at.to(tl.int64)
    if order is not None:
        column = tl.load(order + at, mask=inside, other=0).to(tl.int64)
    z = tl.load(logits + row * stride_n + column * stride_v, mask=inside, other=float("-inf"))
    z = z.to(leaf_top.dtype.element_ty)
    top = tl.max(z, 1)
    d = z - finite(top)[:, None]
    total = tl.sum(tl.exp(d), 1)
    tl.store(leaf_top + row * leaves + leaf, top, mask=leaf < leaves)
    tl.store(leaf_total + row * leaves + leaf, total, mask=leaf < leaves)
    if leaf_moment is not None:
        moment = tl.sum(tl.exp(d) * tl.where(d > float("-inf"), d, 0.0), 1)
        tl.store(leaf_moment + row * leaves + leaf, moment, mask=leaf < leaves)


@triton.jit
def join_leaves(leaf_top, leaf_total, leaves, stride, JOIN: tl.constexpr):
    """The pair of all leaves of a row."""
    top = tl.full((), float("-inf"), leaf_top.dtype.element_ty)
    total = tl.full((), 0.0, leaf_top.dtype.element_ty)
    for start in range(0, leaves, JOIN):
        at = start + tl.arange(0, JOIN)
        tops = tl.load(leaf_top + at * stride, mask=at < leaves, other=float("-inf"))
        totals = tl.load(leaf_total + at * stride, mask=at < leaves, other=0.0)
        here = tl.max(tops, 0)
        top, total = join(top, total, here, tl.sum(totals * tl.exp(tops - finite(here)), 0))
    return top, total


@triton.jit
def sum_columns(row, columns, low, high, skip, stride_v, dtype: tl.constexpr, JOIN: tl.constexpr):
    """The pair of the columns in a range of a list, without place ``skip``."""
    top = tl.full((), float("-inf"), dtype)
    total = tl.full((), 0.0, dtype)
    for start in range(low, high, JOIN):
        at = start + tl.arange(0, JOIN)
        inside = (at < high) & (at != skip)
        column = tl.load(columns + at, mask=inside, other=0).to(tl.int64)
        z = tl.load(row + column * stride_v, mask=inside, other=float("-inf")).to(dtype)
        here = tl.max(z, 0)
        top, total = join(top, total, here, tl.sum(tl.exp(z - finite(here)), 0))
    return top, total


@triton.jit
def sum_ranges(
    row, order, leaf_top, leaf_total, low, high, skip, whole, stride_v,
    LEAF: tl.constexpr, RANGES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The pairs of ranges of an order, each with its own row: leaves where ``whole`` and a range covers them, single
    columns (except ``skip``) at the edges."""
    dtype: tl.constexpr = leaf_top.dtype.element_ty
    top = tl.full((RANGES,), float("-inf"), dtype)
    total = tl.full((RANGES,), 0.0, dtype)
    lane = tl.arange(0, STEP)
    first_leaf = (low + LEAF - 1) // LEAF
    head_end = tl.where(whole, tl.minimum(high, first_leaf * LEAF), high)
    tail_start = tl.maximum(high // LEAF * LEAF, head_end)
    at_head = tl.maximum(head_end - low, 0)
    singles = at_head + tl.maximum(high - tail_start, 0)
    for step in range(0, tl.max(singles, 0), STEP):
        nth = step + lane[None, :]
        at = tl.where(nth < at_head[:, None], low[:, None], (tail_start - at_head)[:, None]) + nth
        inside = (nth < singles[:, None]) & (at != skip[:, None])
        column = tl.load(order + at, mask=inside, other=0).to(tl.int64)
        z = tl.load(row[:, None] + column * stride_v, mask=inside, other=float("-inf")).to(dtype)
        here = tl.max(z, 1)
        top, total = join(top, total, here, tl.sum(tl.exp(z - finite(here)[:, None]), 1))
    covered = tl.where(whole, tl.maximum(high // LEAF - first_leaf, 0), 0)
    for step in range(0, tl.max(covered, 0), STEP):
        nth = step + lane[None, :]
        inside = nth < covered[:, None]
        at = first_leaf[:, None] + nth
        tops = tl.load(leaf_top[:, None] + at, mask=inside, other=float("-inf"))
        totals = tl.load(leaf_total[:, None] + at, mask=inside, other=0.0)
        here = tl.max(tops, 1)
        joined = tl.sum(totals * tl.exp(tops - finite(here)[:, None]), 1)
        top, total = join(top, total, here, joined)
    return top, total
