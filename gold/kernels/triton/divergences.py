"""Triton kernels: divergences between two rows on shared events, and their gradient."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

import triton
import triton.language as tl

from gold.kernels.triton.pairs import VARYING, finite, join, join_leaves, log, sum_columns


@triton.jit(do_not_specialize=VARYING)
def event_leaves(
    logits, other_logits, partner, leaves, stride_n, stride_v, other_stride_n, other_stride_v, width,
    COMMON: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Per tile, the pair of the kept tokens and that of the left columns."""
    tiles = tl.cdiv(width, TILE)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    at = ((tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)
    z = tl.load(logits + n * stride_n + at * stride_v, mask=at < width, other=float("-inf"))
    z = z.to(leaves.dtype.element_ty)
    other = tl.load(partner + at, mask=at < width, other=-1)
    if COMMON:
        y = other_logits + n * other_stride_n + other.to(tl.int64) * other_stride_v
        y = tl.load(y, mask=other >= 0, other=float("-inf"))
        other = _if_common(z, y, other)
    to = leaves + tl.program_id(0).to(tl.int64) * 4
    for part in tl.static_range(2):
        mine = tl.where(other >= 0 if part == 0 else other == -2, z, float("-inf"))
        top = tl.max(mine, 0)
        tl.store(to + 2 * part, top)
        tl.store(to + 2 * part + 1, tl.sum(tl.exp(mine - finite(top)), 0))


@triton.jit
def _if_common(z, y, other):
    """The partners of a row's columns; those with probability 0 on one side count as left columns."""
    return tl.where((other >= 0) & ((z == float("-inf")) | (y == float("-inf"))), -2, other)


@triton.jit(do_not_specialize=VARYING)
def side_of_rows(
    logits, stops, other_logits, other_stops, leaves, side, rows, stride_n, stride_v, other_stride_n,
    other_stride_v, stop_count, other_stop_count, tiles,
    COMMON: tl.constexpr, BUCKET: tl.constexpr, SMOOTHING: tl.constexpr, LOG_KEPT: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """Per row: the two numbers subtracted from a logit, one after the other, to get its event's log-probability (0, 1);
    the log-probabilities of the stop event and of the bucket, if any (2, 3); that of the left columns before smoothing
    (4); and the probability of kept tokens and stops (5)."""
    dtype: tl.constexpr = side.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    row = leaves + n * tiles * 4
    top, total = join_leaves(row, row + 1, tiles, 4, JOIN)
    left_top, left_total = join_leaves(row + 2, row + 3, tiles, 4, JOIN)
    stop_top, stop_total = sum_columns(logits + n * stride_n, stops, 0, stop_count, -1, stride_v, dtype, JOIN)
    if COMMON:
        other_row = other_logits + n * other_stride_n
        there, _ = sum_columns(other_row, other_stops, 0, other_stop_count, -1, other_stride_v, dtype, JOIN)
        joined_top, joined_total = join(left_top, left_total, stop_top, stop_total)
        alone = there == float("-inf")
        left_top = tl.where(alone, joined_top, left_top)
        left_total = tl.where(alone, joined_total, left_total)
        stop_top, stop_total = tl.where(alone, float("-inf"), stop_top), tl.where(alone, 0.0, stop_total)
    top, total = join(top, total, stop_top, stop_total)
    every_top, every_total = join(top, total, left_top, left_total)
    mass = tl.where(total == 0.0, 0.0, total * tl.exp(top - finite(every_top)) / every_total)
    if BUCKET:
        base, log_base = finite(every_top), finite(log(every_total)) - LOG_KEPT
    else:
        base, log_base = finite(top), finite(log(total))
    left = left_top - base + log(left_total) - log_base
    rest = tl.full((), float("-inf"), dtype)
    if BUCKET:
        rest = log(tl.exp(left) + SMOOTHING)
    tl.store(side + n, base)
    tl.store(side + rows + n, log_base)
    tl.store(side + 2 * rows + n, stop_top - base + log(stop_total) - log_base)
    tl.store(side + 3 * rows + n, rest)
    tl.store(side + 4 * rows + n, left)
    tl.store(side + 5 * rows + n, mass)


@triton.jit
def _excess(d, SHARE: tl.constexpr):
    """``w − log(1 + w)`` with ``w = SHARE · (e^d − 1)``, for d within 1/16 of 0, by the series of both."""
    TERMS: tl.constexpr = 13 if d.dtype == tl.float64 else 7
    growth = d * 0.0 + 1.0
    for k in tl.static_range(TERMS - 1):
        growth = 1.0 + growth * d / (TERMS - k)
    w = SHARE * d * growth
    tail = d * 0.0
    for k in tl.static_range(TERMS):
        tail = 1.0 / (TERMS + 1 - k) - w * tail
    return w * w * tail


@triton.jit
def _mixed_term(logp, logq, p, q, SHARE: tl.constexpr):
    """``p log(p / m) − p + m`` with ``m = SHARE · q + (1 − SHARE) · p``, and ``log(m / p)``; SHARE is not 0.

    Summed over all events this is the divergence, since p and m both sum to 1, and each term is small where p and q are
    close: no cancellation in rows near probability 1.
    """
    d = tl.minimum(tl.where(p > 0.0, logq - tl.where(p > 0.0, logp, 0.0), 0.0), 80.0)
    log_ratio = d
    if SHARE < 1.0:
        log_ratio = tl.log((1.0 - SHARE) + SHARE * tl.exp(d))
    near = (p > 0.0) & (tl.abs(d) < 0.0625)
    close = p * _excess(tl.where(near, d, 0.0), SHARE)
    return tl.where(near, close, SHARE * (q - p) - p * log_ratio), log_ratio


@triton.jit
def _terms(
    logp, logq,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, STUDENT_MIX: tl.constexpr, TEACHER_MIX: tl.constexpr,
):  # fmt: skip
    """An event's terms of the two divergences, and their derivatives with respect to ``logp`` up to one multiple of p;
    an event of probability 0 has none."""
    p, q = tl.exp(logp), tl.exp(logq)
    first, first_slope, second, second_slope = p * 0.0, p * 0.0, p * 0.0, p * 0.0
    if STUDENT and STUDENT_MIX > 0.0:
        first, log_ratio = _mixed_term(logp, logq, p, q, STUDENT_MIX)
        first_slope = -log_ratio
        if STUDENT_MIX < 1.0:
            first_slope -= (1.0 - STUDENT_MIX) * (tl.exp(-log_ratio) - 1.0)
        first_slope = tl.where(p > 0.0, p * tl.where(p > 0.0, first_slope, 0.0), 0.0)
    if TEACHER and TEACHER_MIX < 1.0:
        second, log_ratio = _mixed_term(logq, logp, q, p, 1.0 - TEACHER_MIX)
        across = q
        if TEACHER_MIX > 0.0:
            across = tl.where(q > 0.0, p * tl.exp(-log_ratio), 0.0)
        second_slope = (1.0 - TEACHER_MIX) * (p - across)
    return first, first_slope, second, second_slope


@triton.jit
def _event_logps(
    logits, other_logits, partner, side, other_side, n, at, rows, stride_n, stride_v, other_stride_n,
    other_stride_v, width, COMMON: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Partners of some columns of a row, and the log-probabilities of both sides."""
    inside = at < width
    z = tl.load(logits + n * stride_n + at * stride_v, mask=inside, other=float("-inf")).to(dtype)
    other = tl.load(partner + at, mask=inside, other=-1)
    y = other_logits + n * other_stride_n + other.to(tl.int64) * other_stride_v
    y = tl.load(y, mask=other >= 0, other=float("-inf")).to(dtype)
    if COMMON:
        other = _if_common(z, y, other)
        y = tl.where(other >= 0, y, float("-inf"))
    logp = z - tl.load(side + n).to(dtype) - tl.load(side + rows + n).to(dtype)
    logq = y - tl.load(other_side + n).to(dtype) - tl.load(other_side + rows + n).to(dtype)
    return other, logp, logq


@triton.jit(do_not_specialize=VARYING)
def divergence_of_tiles(
    logits, other_logits, partner, side, other_side, sums, rows, stride_n, stride_v, other_stride_n,
    other_stride_v, width,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, STUDENT_MIX: tl.constexpr, TEACHER_MIX: tl.constexpr,
    COMMON: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Per tile, sums over its kept tokens: both terms and their slopes, and the teacher's entropy."""
    dtype: tl.constexpr = sums.dtype.element_ty
    tiles = tl.cdiv(width, TILE)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    at = ((tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)
    other, logp, logq = _event_logps(
        logits, other_logits, partner, side, other_side, n, at, rows, stride_n, stride_v, other_stride_n,
        other_stride_v, width, COMMON, dtype,
    )  # fmt: skip
    logp = tl.where(other >= 0, logp, float("-inf"))
    first, first_slope, second, second_slope = _terms(logp, logq, STUDENT, TEACHER, STUDENT_MIX, TEACHER_MIX)
    to = sums + tl.program_id(0).to(tl.int64) * 5
    tl.store(to, tl.sum(first, 0))
    tl.store(to + 1, tl.sum(first_slope, 0))
    tl.store(to + 2, tl.sum(second, 0))
    tl.store(to + 3, tl.sum(second_slope, 0))
    tl.store(to + 4, tl.sum(tl.exp(logq) * -finite(logq), 0))


@triton.jit
def _sum_tiles(sums, tiles, JOIN: tl.constexpr):
    total = tl.zeros((JOIN,), sums.dtype.element_ty)
    for start in range(0, tiles, JOIN):
        at = start + tl.arange(0, JOIN)
        total += tl.load(sums + at * 5, mask=at < tiles, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=VARYING)
def divergence_of_rows(
    side, other_side, sums, value, slopes, rows, tiles,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, STUDENT_MIX: tl.constexpr, TEACHER_MIX: tl.constexpr,
    STUDENT_WEIGHT: tl.constexpr, TEACHER_WEIGHT: tl.constexpr, ABOVE: tl.constexpr,
    BUCKET: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """Per row the divergence, and for its gradient: the weight of the second term (0), the slopes with respect to all
    events together (1), the stop event (2), the left columns (3)."""
    n = tl.program_id(0).to(tl.int64)
    row = sums + n * tiles * 5
    first, first_slope = _sum_tiles(row, tiles, JOIN), _sum_tiles(row + 1, tiles, JOIN)
    second, second_slope = _sum_tiles(row + 2, tiles, JOIN), _sum_tiles(row + 3, tiles, JOIN)
    entropy = _sum_tiles(row + 4, tiles, JOIN)

    logq = tl.load(other_side + 2 * rows + n).to(value.dtype.element_ty)
    a, a_slope, b, b_slope = _terms(
        tl.load(side + 2 * rows + n), logq, STUDENT, TEACHER, STUDENT_MIX, TEACHER_MIX
    )
    first, second, entropy = first + a, second + b, entropy - tl.exp(logq) * finite(logq)
    first_slope, second_slope = first_slope + a_slope, second_slope + b_slope
    left, left_slope = a * 0.0, a * 0.0
    if BUCKET:
        logp = tl.load(side + 3 * rows + n)
        logq = tl.load(other_side + 3 * rows + n).to(value.dtype.element_ty)
        c, c_slope, d, d_slope = _terms(logp, logq, STUDENT, TEACHER, STUDENT_MIX, TEACHER_MIX)
        first, second, entropy = first + c, second + d, entropy - tl.exp(logq) * finite(logq)
        # Smoothing passes on only a part of the left columns.
        part = tl.exp(tl.load(side + 4 * rows + n) - finite(logp))
        left, left_slope = c_slope * part, d_slope * part
        first_slope, second_slope = first_slope + left, second_slope + left_slope
    weight = tl.where(entropy > ABOVE, tl.full((), TEACHER_WEIGHT, value.dtype.element_ty), 0.0)
    second = tl.where(entropy > ABOVE, second, 0.0)
    tl.store(value + n, STUDENT_WEIGHT * first + weight * second)
    tl.store(slopes + n, weight)
    tl.store(slopes + rows + n, STUDENT_WEIGHT * first_slope + weight * second_slope)
    tl.store(slopes + 2 * rows + n, STUDENT_WEIGHT * a_slope + weight * b_slope)
    tl.store(slopes + 3 * rows + n, STUDENT_WEIGHT * left + weight * left_slope)


@triton.jit(do_not_specialize=VARYING)
def divergence_backward(
    logits, other_logits, grad_logits, partner, side, other_side, slopes, grad_value, rows, stride_n,
    stride_v, other_stride_n, other_stride_v, grad_stride_n, grad_stride_v, width,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, STUDENT_MIX: tl.constexpr, TEACHER_MIX: tl.constexpr,
    COMMON: tl.constexpr, STUDENT_WEIGHT: tl.constexpr, BUCKET: tl.constexpr, LOG_KEPT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of ``divergence_of_rows``, one tile of columns at a time."""
    dtype: tl.constexpr = slopes.dtype.element_ty
    tiles = tl.cdiv(width, TILE)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    at = ((tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)
    other, logp, logq = _event_logps(
        logits, other_logits, partner, side, other_side, n, at, rows, stride_n, stride_v, other_stride_n,
        other_stride_v, width, COMMON, dtype,
    )  # fmt: skip
    known = tl.where(other >= 0, logp, float("-inf"))
    _, first_slope, _, second_slope = _terms(known, logq, STUDENT, TEACHER, STUDENT_MIX, TEACHER_MIX)
    slope = STUDENT_WEIGHT * first_slope + tl.load(slopes + n) * second_slope
    log_stop = tl.load(side + 2 * rows + n)
    if COMMON:
        other = tl.where(other == -1, tl.where(log_stop == float("-inf"), -2, -1), other)
    of_stops = tl.exp(tl.where(other == -1, logp - finite(log_stop), float("-inf")))
    slope += tl.load(slopes + 2 * rows + n) * of_stops
    if BUCKET:
        log_left = tl.load(side + 4 * rows + n)
        of_left = tl.exp(tl.where(other == -2, logp - finite(log_left), float("-inf")))
        slope += tl.load(slopes + 3 * rows + n) * of_left
        prob = tl.exp(logp - LOG_KEPT)
    else:
        prob = tl.exp(tl.where(other >= -1, logp, float("-inf")))
    grad = tl.load(grad_value + n) * (slope - prob * tl.load(slopes + rows + n))
    to = grad_logits + n * grad_stride_n + at * grad_stride_v
    tl.store(to, grad.to(grad_logits.dtype.element_ty), mask=at < width)
