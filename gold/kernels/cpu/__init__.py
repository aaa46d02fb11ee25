"""numba back end: the functions of ``reference`` on CPU tensors, one row at a time, forward and backward.

Rows are split over plain threads that run ``nogil`` kernels: numba's own thread pools do not survive a fork, and abort
when two threads enter them. A kernel unpacks bfloat16 one row at a time.
"""

# mypy: allow-untyped-calls

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gold.kernels.cpu import divergences, masses, pieces, sorted, statistics
from gold.kernels.gradient import Backward, Results, with_backward, with_gradient
from gold.kernels.layout import ByteLayout, Columns, KeptEvents, Tokens
from gold.kernels.reference import SMOOTHING, MixedKL, Unshared
from gold.kernels.reference import chunk_sums as chunk_sums

Array = NDArray[Any]


def byte_masses(
    logits_NV: Tensor, layout: ByteLayout, first_row: int, *, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.byte_masses``."""
    rows, width = logits_NV.shape
    low, high = layout.mass_range(first_row, rows)
    trie, visits = layout.trie.on(layout.device, width), layout.visits
    plan = (
        trie.pool.numpy(),
        trie.position.numpy(),
        np.array([trie.texts, trie.stop_low]),
        tuple(x.numpy() for x in (trie.low, trie.high, trie.own, trie.first_child, trie.children)),
        (visits.ptr, visits.node, visits.starts, visits.skips_target, visits.mass_ptr),
        layout.target.numpy(),
        first_row,
    )

    def compute(logits: Tensor) -> tuple[Results, Backward]:
        log_mass, stats = np.empty(high - low, np.float64), np.empty((rows, 3), np.float64)
        _on_rows(masses.masses_forward, rows, *_arrays(logits), *plan, log_mass, stats)

        def backward(logits: Tensor, out: Tensor, *grads: Tensor) -> None:
            given = *_arrays(logits), *plan, log_mass, stats, *_doubles(*grads), _array(out)
            _on_rows(masses.masses_backward, rows, *given)

        return _tensors(logits, log_mass, stats[:, 1], stats[:, 2]), backward

    result: tuple[Tensor, Tensor, Tensor] = with_backward(_plain(logits_NV), compute, overwrite)
    return result


def row_statistics(
    logits_NV: Tensor, target_N: Tensor, stops: Tensor, *, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.row_statistics``."""
    rows = logits_NV.shape[0]
    given = target_N.contiguous().numpy(), stops.contiguous().numpy()

    def compute(logits: Tensor) -> tuple[Results, Backward]:
        stats = np.empty((rows, 4), np.float64)
        _on_rows(statistics.statistics_forward, rows, *_arrays(logits), *given, stats)

        def backward(logits: Tensor, out: Tensor, *grads: Tensor) -> None:
            arrays = *_arrays(logits), *given, stats, *_doubles(*grads), _array(out)
            _on_rows(statistics.statistics_backward, rows, *arrays)

        return _tensors(logits, *stats.T), backward

    result: tuple[Tensor, Tensor, Tensor, Tensor] = with_backward(_plain(logits_NV), compute, overwrite, 1)
    return result


def row_divergence(
    logits_NV: Tensor,
    logits_NW: Tensor,
    kept_V: KeptEvents,
    kept_W: KeptEvents,
    divergence: MixedKL,
    *,
    unshared: Unshared = "bucket",
    smoothing: float = SMOOTHING,
    only_common: bool = False,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """See ``reference.row_divergence``. With ``overwrite`` the forward pass already overwrites ``logits_NV``."""
    mine, theirs = _both_plain(logits_NV, logits_NW)
    bucket = unshared == "bucket"
    shape = _form(divergence), bucket, smoothing if bucket else 0.0, only_common

    def compute(wanted: bool) -> tuple[Results, tuple[Tensor, ...]]:
        results, grad = np.empty((len(mine), 2), np.float64), _room(mine, wanted, overwrite)
        given = *_arrays(mine), _array(theirs), _columns(kept_V), _columns(kept_W), *shape
        _on_rows(divergences.divergence, len(mine), *given, results, _array(grad))
        return _tensors(mine, *results.T), (grad,)

    result: tuple[Tensor, Tensor] = with_gradient(compute, mine)
    return result


def hybrid_distance(
    logits_NV: Tensor,
    logits_NW: Tensor,
    before_N: Tensor,
    before_T_N: Tensor,
    kept_V: KeptEvents,
    kept_W: KeptEvents,
    divergence: MixedKL,
    matched_share: float,
    *,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.hybrid_distance``, and ``sorted_l1``. With ``overwrite`` the forward pass already overwrites
    ``logits_NV``."""
    mine, theirs = _both_plain(logits_NV, logits_NW)
    before = _doubles(before_N.detach(), before_T_N.detach())
    shape = _columns(kept_V), _columns(kept_W), _form(divergence), matched_share

    def compute(wanted: bool) -> tuple[Results, tuple[Tensor, ...]]:
        results, grad = np.empty((len(mine), 4), np.float64), _room(mine, wanted, overwrite)
        given = *_arrays(mine), _array(theirs), *before, *shape
        _on_rows(divergences.hybrid, len(mine), *given, results, _array(grad))
        return _tensors(mine, *results.T[:3]), (grad, torch.from_numpy(results[:, 3].copy()))

    result: tuple[Tensor, Tensor, Tensor] = with_gradient(compute, mine, before_N)
    return result


def sorted_l1(p_NV: Tensor, q_NW: Tensor, *, overwrite: bool = False) -> Tensor:
    """See ``reference.sorted_l1``; no row is fully sorted.

    Entries are counted in narrow intervals. Where one side leads in rank by at least the other's count in an interval,
    all its entries there have the same sign; only entries of other intervals are sorted.
    """
    p = p_NV.contiguous() if p_NV.dtype == torch.float64 else p_NV.float().contiguous()
    q = q_NW.detach().to(p).contiguous()

    def compute(wanted: bool) -> tuple[Results, tuple[Tensor, ...]]:
        value, sign = np.empty(len(p), np.float64), _room(p, wanted, overwrite)
        _on_rows(sorted.sorted_distance, len(p), _array(p), _array(q), value, _array(sign))
        return _tensors(p, value), (sign,)

    result: Tensor = with_gradient(compute, p)
    return result


def piece_masses(
    logits_NV: Tensor,
    target_N: Tensor,
    columns: Columns,
    whole_P: Tensor,
    tokens: Tokens,
    *,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.piece_masses``."""
    rows = logits_NV.shape[0]
    position_N = np.full(rows, -1, np.int64)
    position_N[whole_P.numpy()] = np.arange(whole_P.numel())
    row, id_, moved = (x.numpy() for x in (tokens.row, tokens.id, tokens.moved))
    order = np.argsort(row, kind="stable")
    by_row = np.searchsorted(row[order], np.arange(rows + 1)), order, id_[order], moved[order]
    shape = columns.small.numpy(), columns.starts.numpy()
    given = target_N.contiguous().numpy(), *shape, position_N, *by_row

    def compute(logits: Tensor) -> tuple[Results, Backward]:
        full = np.empty((whole_P.numel(), columns.events), _real(logits))
        value, stats = np.empty(row.size, full.dtype), np.empty((rows, 2), np.float64)
        _on_rows(pieces.pieces_forward, rows, *_arrays(logits), *given, full, value, stats)

        def backward(logits: Tensor, out: Tensor, *grads: Tensor) -> None:
            arrays = *_arrays(logits), *given, full, stats, *(g.numpy() for g in grads), _array(out)
            _on_rows(pieces.pieces_backward, rows, *arrays)

        whole, single = torch.from_numpy(full), torch.from_numpy(value)
        return (whole, single, *_tensors(logits, stats[:, 1])), backward

    result: tuple[Tensor, Tensor, Tensor] = with_backward(_plain(logits_NV), compute, overwrite)
    return result


def segment_logsumexp(value: Tensor, segment: Tensor, segments: int) -> Tensor:
    """See ``reference.segment_logsumexp``."""
    index = segment.contiguous().numpy()

    def compute(value: Tensor) -> tuple[Results, Backward]:
        out = np.empty(segments, _real(value))
        pieces.segments_forward(value.numpy(), index, out)

        def backward(value: Tensor, grad: Tensor, of_out: Tensor) -> None:
            pieces.segments_backward(value.numpy(), index, out, of_out.numpy(), grad.numpy())

        return (torch.from_numpy(out),), backward

    result: Tensor = with_backward(value.contiguous(), compute, False)
    return result


def _plain(logits: Tensor) -> Tensor:
    """The logits, contiguous, in a dtype that kernels support: float64, float32 or bfloat16."""
    kept = logits.dtype in (torch.float64, torch.float32, torch.bfloat16)
    return (logits if kept else logits.float()).contiguous()


def _both_plain(logits_NV: Tensor, logits_NW: Tensor) -> tuple[Tensor, Tensor]:
    mine, theirs = _plain(logits_NV), _plain(logits_NW.detach())
    if _real(mine) != _real(theirs):
        theirs = theirs.to(mine.dtype if _real(mine) == np.float64 else torch.float32)
    return mine, theirs


def _form(form: MixedKL) -> tuple[float, ...]:
    return tuple(
        map(float, (form.student, form.student_mix, form.teacher, form.teacher_mix, form.above_nats))
    )


def _columns(kept: KeptEvents) -> tuple[Array, ...]:
    return kept.ids.numpy(), kept.stops.numpy(), kept.left.numpy()


def _array(tensor: Tensor) -> Array:
    """The tensor's memory; as 16-bit words for bfloat16."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _arrays(logits: Tensor) -> tuple[Array, Array]:
    """The memory of logits, and an empty array of the dtype in which rows are computed."""
    return _array(logits), np.empty(0, _real(logits))


def _real(tensor: Tensor) -> type[np.floating[Any]]:
    """The dtype in which rows are computed."""
    return np.float64 if tensor.dtype == torch.float64 else np.float32


def _tensors(like: Tensor, *arrays: Array) -> tuple[Tensor, ...]:
    """Results in the widened dtype of the logits."""
    return tuple(torch.from_numpy(array.astype(_real(like))) for array in arrays)


def _room(logits: Tensor, wanted: bool, overwrite: bool) -> Tensor:
    """The tensor for the gradient; without rows if it is not wanted."""
    if not wanted:
        return logits[:0].detach()
    return logits.detach() if overwrite else torch.empty_like(logits)


def _doubles(*grads: Tensor) -> tuple[Array, ...]:
    return tuple(g.double().contiguous().numpy() for g in grads)


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
