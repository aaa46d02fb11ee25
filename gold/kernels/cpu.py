"""numba back end: the functions of ``reference`` on CPU tensors, in one pass over each row, forward and backward.

Rows are split over plain threads that run ``nogil`` kernels: numba's own thread pools do not survive a fork, and abort
when two threads enter them.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

import math
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gold.kernels.layout import ByteLayout
from gold.kernels.reference import (  # noqa: F401
    column_logsumexp,
    row_divergence,
    row_statistics,
    segment_logsumexp,
    sorted_l1,
    widened,
)

Array = NDArray[Any]


def byte_masses(
    logits_NV: Tensor, layout: ByteLayout, first_row: int, *, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.byte_masses``; arithmetic in float64, result in the widened dtype of the logits."""
    log_mass, log_target_N, log_stop_N = _ByteMasses.apply(widened(logits_NV).contiguous(), layout, first_row)
    return log_mass, log_target_N, log_stop_N


def chunk_sums(logp_N: Tensor, chunk_N: Tensor, chunks: int) -> Tensor:
    """See ``reference.chunk_sums``."""
    out: Tensor = _ChunkSums.apply(logp_N.contiguous(), chunk_N, chunks)
    return out


class _ByteMasses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, layout: ByteLayout, first_row: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = logits_NV.shape[0]
        low, high = layout.mass_range(first_row, rows)
        log_mass = np.empty(high - low, np.float64)
        row_stats = np.empty((rows, 3), np.float64)
        z = logits_NV.detach().numpy()
        _on_rows(_masses_forward, rows, z, *_arrays(layout, z.shape[1]), first_row, log_mass, row_stats)
        ctx.layout, ctx.first_row = layout, first_row
        ctx.log_mass, ctx.row_stats = log_mass, row_stats
        ctx.save_for_backward(logits_NV)
        results = (log_mass, row_stats[:, 1], row_stats[:, 2])
        log_mass_t, log_target, log_stop = (torch.from_numpy(r.copy()).to(logits_NV.dtype) for r in results)
        return log_mass_t, log_target, log_stop

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (logits_NV,) = ctx.saved_tensors
        grad_mass, grad_target, grad_stop = (g.double().contiguous().numpy() for g in grads)
        grad_logits = torch.empty_like(logits_NV)
        _on_rows(
            _masses_backward,
            logits_NV.shape[0],
            logits_NV.detach().numpy(),
            *_arrays(ctx.layout, logits_NV.shape[1]),
            ctx.first_row,
            ctx.log_mass,
            ctx.row_stats,
            grad_mass,
            grad_target,
            grad_stop,
            grad_logits.numpy(),
        )
        return grad_logits, None, None


class _ChunkSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp_N: Tensor, chunk_N: Tensor, chunks: int) -> Tensor:
        ctx.save_for_backward(chunk_N)
        out_C = torch.zeros(chunks, dtype=logp_N.dtype)
        _sum_chunks(logp_N.detach().numpy(), chunk_N.numpy(), out_C.numpy())
        return out_C

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (chunk_N,) = ctx.saved_tensors
        (grad_C,) = grads
        grad_N = torch.empty(chunk_N.shape, dtype=grad_C.dtype)
        _spread_chunks(grad_C.contiguous().numpy(), chunk_N.numpy(), grad_N.numpy())
        return grad_N, None, None


def _arrays(layout: ByteLayout, width: int) -> tuple[Array, ...]:
    trie, plan = layout.trie, layout.plan
    return (
        trie["order"],
        trie["low"],
        trie["high"],
        trie["own"],
        trie["first_child"],
        trie["children"],
        layout.outside(width),
        trie["stops"],
        np.array(layout.size),
        plan["visit_ptr"],
        plan["visit_node"],
        plan["visit_starts"],
        plan["visit_skips_target"],
        plan["mass_ptr"],
        plan["target"],
    )


_POOLS: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_POOLS.clear)


def _on_rows(kernel: Any, rows: int, *arguments: Any) -> None:
    """Runs ``kernel(lo, hi, *arguments)`` over all rows, a contiguous share on each of torch's threads."""
    threads = min(torch.get_num_threads(), rows)
    if threads <= 1:
        kernel(0, rows, *arguments)
        return
    pool = _POOLS.setdefault(threads, ThreadPoolExecutor(threads, thread_name_prefix="gold-rows"))
    edges = [rows * t // threads for t in range(threads + 1)]
    jobs = [pool.submit(kernel, lo, hi, *arguments) for lo, hi in pairwise(edges)]
    for job in jobs:
        job.result()


@numba.njit(cache=True, nogil=True)
def _log_sum(z, ids, lo, hi, top, skip):
    """log Σ exp(z[ids[i]] − top) over lo ≤ i < hi without id ``skip``; −inf when nothing is left."""
    total = 0.0
    for i in range(lo, hi):
        if ids[i] != skip:
            total += math.exp(z[ids[i]] - top)
    return total


@numba.njit(cache=True, nogil=True)
def _relog(z, ids, lo, hi, skip):
    """Log-sum-exp of a set whose probabilities underflowed against the row's maximum: against its own maximum."""
    top = -math.inf
    for i in range(lo, hi):
        if ids[i] != skip and z[ids[i]] > top:
            top = float(z[ids[i]])
    if top == -math.inf:
        return -math.inf
    return top + math.log(_log_sum(z, ids, lo, hi, top, skip))


@numba.njit(cache=True, nogil=True)
def _masses_forward(
    row_lo, row_hi, logits, order, low, high, own, first_child, children, outside, stops, size,
    visit_ptr, visit_node, visit_starts, visit_skips, mass_ptr, target, first_row, log_mass, row_stats,
):  # fmt: skip
    width, ids = logits.shape[1], size[()]
    base = mass_ptr[visit_ptr[first_row]]
    for n in range(row_lo, row_hi):
        z = logits[n]
        top = -math.inf
        for v in range(width):
            if z[v] > top:
                top = float(z[v])
        total = 0.0
        for v in range(width):
            total += math.exp(z[v] - top)
        lse = top + math.log(total)
        aim = target[first_row + n]
        row_stats[n, 0] = lse
        row_stats[n, 1] = z[aim] - lse if aim >= 0 else 0.0
        row_stats[n, 2] = _relog(z, stops, 0, stops.size, -1) - lse
        for visit in range(visit_ptr[first_row + n], visit_ptr[first_row + n + 1]):
            node = visit_node[visit]
            m = mass_ptr[visit] - base
            skip = aim if visit_skips[visit] else -1
            if visit_starts[visit]:
                ended = _log_sum(z, order, low[node], low[node] + own[node], top, skip)
                ended += _log_sum(z, outside, 0, outside.size, top, skip)
                for v in range(ids, width):
                    if v != skip:
                        ended += math.exp(z[v] - top)
                log_mass[m] = top + math.log(ended) - lse if ended > 0.0 else -math.inf
                log_mass[m + 1 + children[node]] = row_stats[n, 2]
            else:
                log_mass[m] = _relog(z, order, low[node], low[node] + own[node], skip) - lse
            for c in range(children[node]):
                child = first_child[node] + c
                mass = _log_sum(z, order, low[child], high[child], top, -1)
                if mass > 1e-280:
                    log_mass[m + 1 + c] = top + math.log(mass) - lse
                else:
                    log_mass[m + 1 + c] = _relog(z, order, low[child], high[child], -1) - lse


@numba.njit(cache=True, nogil=True)
def _add_set(grad, z, ids, lo, hi, scale, log_total, skip):
    """Adds scale · exp(z − log_total) to the gradient of every id of a set: its softmax within the set."""
    if scale == 0.0 or log_total == -math.inf:
        return
    for i in range(lo, hi):
        v = ids[i]
        if v != skip:
            grad[v] += scale * math.exp(z[v] - log_total)


@numba.njit(cache=True, nogil=True)
def _masses_backward(
    row_lo, row_hi, logits, order, low, high, own, first_child, children, outside, stops, size,
    visit_ptr, visit_node, visit_starts, visit_skips, mass_ptr, target, first_row, log_mass, row_stats,
    grad_mass, grad_target, grad_stop, grad_logits,
):  # fmt: skip
    width, ids = logits.shape[1], size[()]
    base = mass_ptr[visit_ptr[first_row]]
    grad = np.empty(width, np.float64)
    for n in range(row_lo, row_hi):
        z = logits[n]
        lse = row_stats[n, 0]
        aim = target[first_row + n]
        grad[:] = 0.0
        total = 0.0
        stop_share = grad_stop[n]
        if aim >= 0:
            grad[aim] += grad_target[n]
            total += grad_target[n]
        for visit in range(visit_ptr[first_row + n], visit_ptr[first_row + n + 1]):
            node = visit_node[visit]
            m = mass_ptr[visit] - base
            skip = aim if visit_skips[visit] else -1
            if log_mass[m] > -math.inf:
                g = grad_mass[m]
                total += g
                ended = log_mass[m] + lse
                _add_set(grad, z, order, low[node], low[node] + own[node], g, ended, skip)
                if visit_starts[visit]:
                    _add_set(grad, z, outside, 0, outside.size, g, ended, skip)
                    if g != 0.0:
                        for v in range(ids, width):
                            if v != skip:
                                grad[v] += g * math.exp(z[v] - ended)
            if visit_starts[visit]:
                stop_share += grad_mass[m + 1 + children[node]]
            for c in range(children[node]):
                if log_mass[m + 1 + c] > -math.inf:
                    child = first_child[node] + c
                    g = grad_mass[m + 1 + c]
                    total += g
                    _add_set(grad, z, order, low[child], high[child], g, log_mass[m + 1 + c] + lse, -1)
        if row_stats[n, 2] > -math.inf:
            total += stop_share
            _add_set(grad, z, stops, 0, stops.size, stop_share, row_stats[n, 2] + lse, -1)
        for v in range(width):
            grad_logits[n, v] = grad[v] - total * math.exp(z[v] - lse)


@numba.njit(cache=True, nogil=True)
def _sum_chunks(logp, chunk, out):
    for i in range(logp.size):
        if chunk[i] >= 0:
            out[chunk[i]] += logp[i]


@numba.njit(cache=True, nogil=True)
def _spread_chunks(grad_out, chunk, grad):
    for i in range(chunk.size):
        grad[i] = grad_out[chunk[i]] if chunk[i] >= 0 else 0.0
