"""numba loops over rows: per-token statistics of a row, and their gradient."""

# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs

import math

import numpy as np

from gold.kernels.cpu.masses import add_set
from gold.kernels.cpu.simd import (
    compiled,
    exp_moment,
    exps,
    log_sum,
    put_row,
    row_max,
    row_of,
)


@compiled
def statistics_forward(row_lo, row_hi, logits, like, target, stops, stats):
    """``reference.row_statistics`` into the four columns of ``stats``."""
    scratch, e = np.empty(logits.shape[1], like.dtype), np.empty(logits.shape[1], like.dtype)
    for n in range(row_lo, row_hi):
        z = row_of(logits, n, scratch)
        top = row_max(z)
        total, moment = exp_moment(z, top, e) if top > -math.inf else (0.0, 0.0)
        log_total = math.log(total)
        stats[n, 0] = top + log_total
        stats[n, 3] = log_total - moment / total if top > -math.inf else 0.0
        stats[n, 1] = float(z[target[n]] - top) - log_total if target[n] >= 0 else 0.0
        stats[n, 2] = log_sum(z, stops, 0, stops.size, -1) - top - log_total


@compiled
def statistics_backward(
    row_lo, row_hi, logits, like, target, stops, stats, grad_norm, grad_target, grad_stop, grad_logits
):
    """The gradient of ``statistics_forward`` through all results except the entropy."""
    scratch, e = np.empty(logits.shape[1], like.dtype), np.empty(logits.shape[1], like.dtype)
    for n in range(row_lo, row_hi):
        z = row_of(logits, n, scratch)
        scale = grad_norm[n]
        if target[n] >= 0:
            scale -= grad_target[n]
        if stats[n, 2] > -math.inf:
            scale -= grad_stop[n]
        if scale == 0.0 or stats[n, 0] == -math.inf:
            e[:] = 0.0
        else:
            exps(z, like.dtype.type(stats[n, 0]), e)
            single = like.dtype.type(scale)
            for v in range(e.size):
                e[v] *= single
        if target[n] >= 0:
            e[target[n]] += grad_target[n]
        if stats[n, 2] > -math.inf:
            add_set(e, z, stops, 0, stops.size, -1, grad_stop[n], stats[n, 2] + stats[n, 0])
        put_row(grad_logits, n, e)
