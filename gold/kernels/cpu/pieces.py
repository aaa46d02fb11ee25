"""numba loops over rows: sums of probabilities by the events of columns and over segments, and their gradients."""

# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs

import math

import numpy as np

from gold.kernels.cpu.masses import TINY
from gold.kernels.cpu.simd import (
    compiled,
    exp,
    exp_into,
    exps,
    log,
    put_row,
    range_sum,
    row_max,
    row_of,
)


@compiled
def _event_sums(z, e, top, log_total, event, starts, without, total, out):
    """``out[u] = log Σ exp(z[v] − top) − log_total`` over the columns of event u except ``without``, whose exponential
    in ``e`` is 0; ``total`` is scratch memory."""
    total[:] = 0.0
    for v in range(e.size):
        total[event[v]] += e[v]
    real = out.dtype.type
    shift = real(log_total)
    small = False
    for u in range(out.size):
        out[u] = log(real(total[u])) - shift
        small |= total[u] < TINY and starts[u + 1] > starts[u]
    if not small:
        return
    tops = np.full(out.size, -math.inf)
    for v in range(z.size):
        u = event[v]
        if total[u] < TINY and z[v] > tops[u] and v not in without:
            tops[u] = z[v]
    for u in range(out.size):
        if total[u] < TINY:
            total[u] = 0.0
            out[u] = -math.inf
    for v in range(z.size):
        u = event[v]
        if tops[u] > -math.inf and v not in without:
            total[u] += math.exp(z[v] - tops[u])
    for u in range(out.size):
        if tops[u] > -math.inf:
            out[u] = tops[u] - top - log_total + math.log(total[u])


@compiled
def pieces_forward(
    row_lo, row_hi, logits, like, target, event, starts, position, ptr, order, id_, moved, full, value, stats
):
    """``reference.piece_masses``, its tokens sorted by row; ``stats`` gets each row's log-sum-exp and its step."""
    scratch, e = np.empty(logits.shape[1], like.dtype), np.empty(logits.shape[1], like.dtype)
    total = np.empty(full.shape[1], np.float64)
    for n in range(row_lo, row_hi):
        z = row_of(logits, n, scratch)
        top = row_max(z)
        log_total = math.log(exp_into(z, top, e))
        stats[n, 0] = top + log_total
        stats[n, 1] = float(z[target[n]] - top) - log_total if target[n] >= 0 else 0.0
        for t in range(ptr[n], ptr[n + 1]):
            value[order[t]] = float(z[id_[t]] - top) - log_total
        if position[n] >= 0:
            mine = slice(ptr[n], ptr[n + 1])
            without = id_[mine][moved[mine]]
            for v in without:
                e[v] = 0.0
            _event_sums(z, e, top, log_total, event, starts, without, total, full[position[n]])


@compiled
def pieces_backward(
    row_lo, row_hi, logits, like, target, event, starts, position, ptr, order, id_, moved, full, stats,
    grad_full, grad_value, grad_step, grad,
):  # fmt: skip
    """The gradient of ``pieces_forward`` with respect to the logits, from those of its three results."""
    real = like.dtype.type
    log_tiny = math.log(TINY)
    scratch, e = np.empty(logits.shape[1], like.dtype), np.empty(logits.shape[1], like.dtype)
    slope = np.empty(full.shape[1], like.dtype)
    for n in range(row_lo, row_hi):
        z = row_of(logits, n, scratch)
        aim, p = target[n], position[n]
        mine = slice(ptr[n], ptr[n + 1])
        mean = float(grad_step[n]) if aim >= 0 else 0.0
        for t in range(ptr[n], ptr[n + 1]):
            mean += grad_value[order[t]]
        if p < 0 and mean == 0.0 and mine.start == mine.stop:
            e[:] = 0.0
            put_row(grad, n, e)
            continue
        exps(z, real(stats[n, 0]), e)
        without = id_[mine][moved[mine]]
        small = False
        if p >= 0:
            for u in range(slope.size):
                slope[u] = grad_full[p, u] if full[p, u] > -math.inf else real(0.0)
            mean += range_sum(slope, 0, slope.size)
            for u in range(slope.size):
                small |= full[p, u] <= log_tiny and slope[u] != 0.0
                slope[u] = slope[u] * exp(-full[p, u]) if full[p, u] > log_tiny else real(0.0)
            apart = e[without]
            single = real(mean)
            for v in range(e.size):
                e[v] *= slope[event[v]] - single
            for k in range(without.size):
                e[without[k]] = -apart[k] * single
        else:
            single = real(mean)
            for v in range(e.size):
                e[v] *= -single
        if small:
            for v in range(e.size):
                u = event[v]
                if -math.inf < full[p, u] <= log_tiny and v not in without:
                    e[v] += grad_full[p, u] * math.exp(z[v] - stats[n, 0] - full[p, u])
        for t in range(ptr[n], ptr[n + 1]):
            e[id_[t]] += grad_value[order[t]]
        if aim >= 0:
            e[aim] += grad_step[n]
        put_row(grad, n, e)


@compiled
def segments_forward(value, segment, out):
    """``reference.segment_logsumexp``."""
    total = np.zeros(out.size, np.float64)
    out[:] = -math.inf
    for i in range(value.size):
        if value[i] > out[segment[i]]:
            out[segment[i]] = value[i]
    for i in range(value.size):
        top = out[segment[i]]
        if top > -math.inf:
            total[segment[i]] += exp(value[i] - top)
    for s in range(out.size):
        if total[s] > 0.0:
            out[s] += math.log(total[s])


@compiled
def segments_backward(value, segment, out, grad_out, grad):
    """The gradient of ``segments_forward``."""
    for i in range(value.size):
        whole = out[segment[i]]
        grad[i] = grad_out[segment[i]] * exp(value[i] - whole) if whole > -math.inf else 0.0
