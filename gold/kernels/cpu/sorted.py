"""numba loops over rows: the L1 distance of two rows, each sorted, and its slopes."""

# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs

import math

import numpy as np

from gold.kernels.cpu.simd import (
    BLOCK,
    compiled,
    inlined,
    lane_dot,
    word_of,
)

SHIFT = 18
INTERVALS = 0x80000000 >> SHIFT
"""Intervals of non-negative numbers: those with the same exponent and leading five mantissa bits."""


@inlined
def _interval(x):
    return (word_of(np.float32(x)) & np.uint32(0x7FFFFFFF)) >> np.uint32(SHIFT)


@compiled
def _counted(x, counts):
    counts[:] = 0
    for v in range(x.size):
        counts[v & 3, _interval(x[v])] += 1
    for b in range(counts.shape[1]):
        counts[0, b] += counts[1, b] + counts[2, b] + counts[3, b]


@compiled
def _inside(x, flags, values, places):
    """The entries in flagged intervals, and their indices."""
    found = 0
    for v in range(x.size):
        if flags[_interval(x[v])]:
            values[found], places[found] = x[v], v
            found += 1
    return found


@compiled
def _signed_sum(x, sign, out):
    """``Σ sign[interval of x] · x``; the signs go to ``out``."""
    total = 0.0
    for v in range(x.size):
        out[v] = sign[_interval(x[v])]
    for first in range(0, x.size, BLOCK):
        total += lane_dot(x, out, first, min(first + BLOCK, x.size))
    return total


@compiled
def ranks_for(p, q):
    """Scratch memory of ``sorted_row``: counts, signs, flags and ranks of intervals, entries in unsure intervals."""
    return (
        np.empty((2, 4, INTERVALS), np.int32),
        np.empty(INTERVALS, p.dtype),
        np.empty(INTERVALS, np.bool_),
        np.empty((2, INTERVALS), np.int64),
        np.empty(q.size, p.dtype),
        np.empty(p.size, p.dtype),
        np.empty(q.size, p.dtype),
        np.empty(p.size, np.int64),
        np.empty(q.size, np.int64),
    )


@compiled
def sorted_row(p, q, ranks, signs_p):
    """``Σ_r |p_(r) − q_(r)|``; ``signs_p`` gets its slope with respect to each entry of p."""
    counts, sign, flags, above, signs_q, some_p, some_q, place_p, place_q = ranks
    counts_p, counts_q, above_p, above_q = counts[0], counts[1], above[0], above[1]
    _counted(p, counts_p)
    _counted(q, counts_q)
    ahead_p, ahead_q, unsure = 0, 0, 0
    for b in range(INTERVALS - 1, -1, -1):
        here_p, here_q = counts_p[0, b], counts_q[0, b]
        above_p[b], above_q[b] = ahead_p, ahead_q
        flags[b] = False
        sign[b] = 0.0
        if ahead_p - ahead_q >= here_q:
            sign[b] = 1.0 if b > 0 else 0.0  # zeros match the zero padding of the other side
        elif ahead_q - ahead_p >= here_p:
            sign[b] = -1.0
        else:
            flags[b] = True
            unsure += 1
        ahead_p += here_p
        ahead_q += here_q
    total = _signed_sum(p, sign, signs_p) - _signed_sum(q, sign, signs_q)
    if unsure and not math.isnan(total):
        found_p = _inside(p, flags, some_p, place_p)
        found_q = _inside(q, flags, some_q, place_q)
        order_p = np.argsort(-some_p[:found_p], kind="mergesort")
        sorted_q = np.sort(some_q[:found_q])[::-1]
        i, j = 0, 0
        while i < found_p or j < found_q:
            # One interval at a time, in descending order; both sides' entries of it by rank.
            first = some_p[order_p[i]] if i < found_p else p.dtype.type(-1.0)
            if j < found_q and sorted_q[j] > first:
                first = sorted_q[j]
            b = _interval(first)
            here_p, here_q = counts_p[0, b], counts_q[0, b]
            lead = above_p[b] - above_q[b]
            for k in range(here_p):
                entry = order_p[i + k]
                rival = k + lead
                s = 1.0 if some_p[entry] > 0.0 else 0.0
                if rival < 0:
                    s = -1.0
                elif rival < here_q:
                    other = sorted_q[j + rival]
                    s = 1.0 if some_p[entry] > other else (-1.0 if some_p[entry] < other else 0.0)
                signs_p[place_p[entry]] = s
                total += s * some_p[entry]
            for k in range(here_q):
                rival = k - lead
                s = 1.0
                if rival < 0:
                    s = -1.0
                elif rival < here_p:
                    other = some_p[order_p[i + rival]]
                    s = 1.0 if sorted_q[j + k] > other else (-1.0 if sorted_q[j + k] < other else 0.0)
                total += s * sorted_q[j + k]
            i += here_p
            j += here_q
    return total


@compiled
def sorted_distance(row_lo, row_hi, p, q, value, grad):
    """``reference.sorted_l1`` and its slopes."""
    ranks, signs = ranks_for(p[0], q[0]), np.empty(p.shape[1], p.dtype)
    for n in range(row_lo, row_hi):
        value[n] = sorted_row(p[n], q[n], ranks, signs)
        if grad.shape[0]:
            for v in range(p.shape[1]):
                grad[n, v] = signs[v]
