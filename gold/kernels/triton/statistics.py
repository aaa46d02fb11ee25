"""Triton kernels: per-token statistics of a row, sums by the events of columns, and their gradients."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

import triton
import triton.language as tl

from gold.kernels.triton.pairs import VARYING, finite, join_leaves, log, sum_columns, sum_ranges


@triton.jit(do_not_specialize=VARYING)
def statistics_of_rows(
    logits, target, stops, leaf_top, leaf_total, leaf_moment, stats, rows, stride_n, stride_v, stop_count, leaves,
    JOIN: tl.constexpr,
):  # fmt: skip
    """Per row: maximum, log Σ exp(logit − maximum), log-probabilities of target and stops, entropy."""
    dtype: tl.constexpr = stats.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride_n
    top, total = join_leaves(leaf_top + n * leaves, leaf_total + n * leaves, leaves, 1, JOIN)
    log_total = log(total)
    stop_top, stop_total = sum_columns(row, stops, 0, stop_count, -1, stride_v, dtype, JOIN)
    aim = tl.load(target + n)
    picked = tl.load(row + aim * stride_v, mask=aim >= 0, other=0.0).to(dtype)
    base = finite(top) + finite(log_total)
    tl.store(stats + n, top)
    tl.store(stats + rows + n, log_total)
    tl.store(stats + 2 * rows + n, tl.where(aim >= 0, picked - finite(top) - finite(log_total), 0.0))
    tl.store(stats + 3 * rows + n, stop_top + log(stop_total) - base)
    moment = tl.full((), 0.0, dtype)
    for start in range(0, leaves, JOIN):
        at = n * leaves + start + tl.arange(0, JOIN)
        there = start + tl.arange(0, JOIN) < leaves
        d = tl.load(leaf_top + at, mask=there, other=float("-inf")) - finite(top)
        totals = tl.load(leaf_total + at, mask=there, other=0.0)
        part = tl.load(leaf_moment + at, mask=there, other=0.0) + totals * tl.where(d > float("-inf"), d, 0.0)
        moment += tl.sum(tl.exp(d) * part, 0)
    entropy = tl.where(total == 0.0, 0.0, finite(log_total) - moment / tl.where(total == 0.0, 1.0, total))
    tl.store(stats + 4 * rows + n, entropy)


@triton.jit(do_not_specialize=VARYING)
def statistics_backward(
    logits, grad_logits, target, stops, stats, grad_norm, grad_target, grad_stop, rows, stride_n, stride_v,
    grad_stride_n, grad_stride_v, stop_count, width, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of ``statistics_of_rows``, one tile of columns at a time."""
    dtype: tl.constexpr = stats.dtype.element_ty
    tiles = tl.cdiv(width, TILE)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    at = ((tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = at < width
    z = tl.load(logits + n * stride_n + at * stride_v, mask=inside, other=float("-inf")).to(dtype)
    logp = z - finite(tl.load(stats + n)) - finite(tl.load(stats + rows + n))
    aim = tl.load(target + n)
    log_stop = tl.load(stats + 3 * rows + n)
    of_target = tl.load(grad_target + n, mask=aim >= 0, other=0.0)
    of_stop = tl.load(grad_stop + n, mask=log_stop > float("-inf"), other=0.0)
    grad = (tl.load(grad_norm + n) - of_target - of_stop) * tl.exp(logp)
    grad += tl.where(at == aim, of_target, 0.0)
    for k in range(stop_count):
        is_stop = at == tl.load(stops + k)
        grad += of_stop * tl.exp(tl.where(is_stop, logp - finite(log_stop), float("-inf")))
    to = grad_logits + n * grad_stride_n + at * grad_stride_v
    tl.store(to, grad.to(grad_logits.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def columns_of_rows(
    logits, order, starts, leaf_top, leaf_total, out, stride_n, stride_v, leaves, events,
    LEAF: tl.constexpr, RANGES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a row's columns, for several events."""
    groups = tl.cdiv(events, RANGES)
    n = (tl.program_id(0) // groups).to(tl.int64)
    event = (tl.program_id(0) % groups) * RANGES + tl.arange(0, RANGES)
    low = tl.load(starts + event, mask=event < events, other=0).to(tl.int32)
    high = tl.load(starts + event + 1, mask=event < events, other=0).to(tl.int32)
    row = n + tl.zeros((RANGES,), tl.int64)
    top, total = sum_ranges(
        logits + row * stride_n, order, leaf_top + row * leaves, leaf_total + row * leaves, low, high,
        low - 1, low >= 0, stride_v, LEAF, RANGES, STEP,
    )  # fmt: skip
    tl.store(out + n * events + event, top + log(total), mask=event < events)


@triton.jit(do_not_specialize=VARYING)
def columns_backward(
    logits, grad_logits, event_of, out, grad_out, stride_n, stride_v, grad_stride_n, grad_stride_v, width, events,
    TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of ``columns_of_rows``, one tile of columns at a time."""
    dtype: tl.constexpr = out.dtype.element_ty
    tiles = tl.cdiv(width, TILE)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    at = ((tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = at < width
    z = tl.load(logits + n * stride_n + at * stride_v, mask=inside, other=float("-inf")).to(dtype)
    event = n * events + tl.load(event_of + at, mask=inside, other=0)
    value = tl.load(out + event, mask=inside, other=0.0)
    g = tl.load(grad_out + event, mask=inside & (value > float("-inf")), other=0.0)
    grad = g * tl.exp(z - finite(value))
    to = grad_logits + n * grad_stride_n + at * grad_stride_v
    tl.store(to, grad.to(grad_logits.dtype.element_ty), mask=inside)
