"""numba back end: the functions of ``reference`` on CPU tensors, a row at a time, forward and backward.

Rows are split over plain threads that run ``nogil`` kernels: numba's own thread pools do not survive a fork, and abort
when two threads enter them. Of bfloat16 a kernel unpacks one row at a time.
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

from gold.kernels.cpu import loops
from gold.kernels.layout import ByteLayout, Columns, KeptEvents, Tokens
from gold.kernels.reference import SMOOTHING, MixedKL, Rest

Array = NDArray[Any]


def byte_masses(
    logits_NV: Tensor, layout: ByteLayout, first_row: int, *, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.byte_masses``."""
    result: tuple[Tensor, Tensor, Tensor] = _ByteMasses.apply(_plain(logits_NV), layout, first_row, overwrite)
    return result


def chunk_sums(logp_N: Tensor, chunk_N: Tensor, chunks: int) -> Tensor:
    """See ``reference.chunk_sums``."""
    out: Tensor = _ChunkSums.apply(logp_N.contiguous(), chunk_N, chunks)
    return out


def row_statistics(
    logits_NV: Tensor, target_N: Tensor, stops: Tensor, *, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.row_statistics``."""
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _RowStatistics.apply(
        _plain(logits_NV), target_N, stops, overwrite
    )
    return result


def row_divergence(
    logits_NV: Tensor,
    logits_NW: Tensor,
    kept_V: KeptEvents,
    kept_W: KeptEvents,
    divergence: MixedKL,
    *,
    rest: Rest = "bucket",
    smoothing: float = SMOOTHING,
    only_common: bool = False,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """See ``reference.row_divergence``. With ``overwrite`` the forward pass already leaves the gradient there."""
    mine, theirs = _both_plain(logits_NV, logits_NW)
    bucket = rest == "bucket"
    shape = (*_form(divergence), bucket, smoothing if bucket else 0.0, only_common)
    value, mass = _RowDivergence.apply(mine, theirs, kept_V, kept_W, shape, overwrite)
    return value, mass


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
    """See ``reference.hybrid_distance``; as ``sorted_l1``. With ``overwrite`` the forward pass already leaves the
    gradient there."""
    mine, theirs = _both_plain(logits_NV, logits_NW)
    shape = (*_form(divergence), matched_share)
    total, matched, unmatched = _HybridDistance.apply(
        mine, theirs, before_N, before_T_N, kept_V, kept_W, shape, overwrite
    )
    return total, matched, unmatched


def sorted_l1(p_NV: Tensor, q_NW: Tensor, *, overwrite: bool = False) -> Tensor:
    """See ``reference.sorted_l1``; no row is sorted whole.

    Entries fall into narrow intervals. Where one side is ahead in rank by more than an interval of the other's holds,
    all entries in it have the same sign; only what lies in other intervals is sorted.
    """
    p = p_NV.contiguous() if p_NV.dtype == torch.float64 else p_NV.float().contiguous()
    out: Tensor = _SortedL1.apply(p, q_NW.detach().to(p).contiguous(), overwrite)
    return out


def column_logsumexp(logits_NV: Tensor, columns: Columns, *, overwrite: bool = False) -> Tensor:
    """See ``reference.column_logsumexp``."""
    out: Tensor = _ColumnLogSumExp.apply(_plain(logits_NV), columns, overwrite)
    return out


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
    full, value, step = _PieceMasses.apply(_plain(logits_NV), target_N, columns, whole_P, tokens, overwrite)
    return full, value, step


def segment_logsumexp(value: Tensor, segment: Tensor, segments: int) -> Tensor:
    """See ``reference.segment_logsumexp``."""
    out: Tensor = _SegmentLogSumExp.apply(value.contiguous(), segment.contiguous(), segments)
    return out


def _plain(logits: Tensor) -> Tensor:
    """Contiguous, in a dtype that kernels read: float64, float32 or bfloat16."""
    kept = logits.dtype in (torch.float64, torch.float32, torch.bfloat16)
    return (logits if kept else logits.float()).contiguous()


def _both_plain(logits_NV: Tensor, logits_NW: Tensor) -> tuple[Tensor, Tensor]:
    mine, theirs = _plain(logits_NV), _plain(logits_NW.detach())
    if _real(mine) != _real(theirs):
        theirs = theirs.to(mine.dtype if _real(mine) == np.float64 else torch.float32)
    return mine, theirs


def _form(divergence: MixedKL) -> tuple[float, ...]:
    form = divergence
    return form.student, form.student_mix, form.teacher, form.teacher_mix, form.above_nats


def _array(tensor: Tensor) -> Array:
    """The tensor's memory; words of 16 bits where it holds bfloat16."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _real(tensor: Tensor) -> type[np.floating[Any]]:
    """The type that a row is computed in."""
    return np.float64 if tensor.dtype == torch.float64 else np.float32


def _tensor(array: Array, like: Tensor) -> Tensor:
    """A result in the widened dtype of the logits."""
    return torch.from_numpy(array.astype(_real(like)))


def _room(ctx: Any, logits: Tensor) -> Tensor:
    """Where the gradient goes."""
    return logits.detach() if ctx.overwrite else torch.empty_like(logits)


def _doubles(*grads: Tensor) -> tuple[Array, ...]:
    return tuple(g.double().contiguous().numpy() for g in grads)


class _ByteMasses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, layout: ByteLayout, first_row: int, overwrite: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, width = logits_NV.shape
        low, high = layout.mass_range(first_row, rows)
        log_mass = np.empty(high - low, np.float64)
        row_stats = np.empty((rows, 3), np.float64)
        plan = _arrays(layout, width)
        scratch = np.empty(0, _real(logits_NV))
        _on_rows(
            loops.masses_forward, rows, _array(logits_NV), scratch, *plan, first_row, log_mass, row_stats
        )
        ctx.plan, ctx.first_row, ctx.overwrite = plan, first_row, overwrite
        ctx.log_mass, ctx.row_stats = log_mass, row_stats
        ctx.save_for_backward(logits_NV)
        mass, target, stop = (_tensor(r, logits_NV) for r in (log_mass, row_stats[:, 1], row_stats[:, 2]))
        return mass, target, stop

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (logits_NV,) = ctx.saved_tensors
        out = _room(ctx, logits_NV)
        scratch = np.empty(0, _real(logits_NV))
        _on_rows(
            loops.masses_backward,
            logits_NV.shape[0],
            _array(logits_NV),
            scratch,
            *ctx.plan,
            ctx.first_row,
            ctx.log_mass,
            ctx.row_stats,
            *_doubles(*grads),
            _array(out),
        )
        return out, None, None, None


class _ChunkSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp_N: Tensor, chunk_N: Tensor, chunks: int) -> Tensor:
        ctx.save_for_backward(chunk_N)
        out_C = torch.zeros(chunks, dtype=logp_N.dtype)
        loops.sum_chunks(logp_N.detach().numpy(), chunk_N.numpy(), out_C.numpy())
        return out_C

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (chunk_N,) = ctx.saved_tensors
        (grad_C,) = grads
        grad_N = torch.empty(chunk_N.shape, dtype=grad_C.dtype)
        loops.spread_chunks(grad_C.contiguous().numpy(), chunk_N.numpy(), grad_N.numpy())
        return grad_N, None, None


class _RowStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, target_N: Tensor, stops: Tensor, overwrite: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = logits_NV.shape[0]
        stats = np.empty((rows, 4), np.float64)
        given = target_N.contiguous().numpy(), stops.contiguous().numpy()
        _on_rows(
            loops.statistics_forward, rows, _array(logits_NV), np.empty(0, _real(logits_NV)), *given, stats
        )
        ctx.save_for_backward(logits_NV)
        ctx.given, ctx.stats, ctx.overwrite = given, stats, overwrite
        norm, target, stop, entropy = (_tensor(stats[:, i], logits_NV) for i in range(4))
        ctx.mark_non_differentiable(entropy)
        return norm, target, stop, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (logits_NV,) = ctx.saved_tensors
        out = _room(ctx, logits_NV)
        scratch = np.empty(0, _real(logits_NV))
        _on_rows(
            loops.statistics_backward,
            logits_NV.shape[0],
            _array(logits_NV),
            scratch,
            *ctx.given,
            ctx.stats,
            *_doubles(*grads[:3]),
            _array(out),
        )
        return out, None, None, None


class _RowDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        logits_NW: Tensor,
        kept_V: KeptEvents,
        kept_W: KeptEvents,
        shape: Any,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = logits_NV.shape[0]
        results = np.empty((rows, 2), np.float64)
        wanted = ctx.needs_input_grad[0]
        grad = (
            (logits_NV.detach() if overwrite else torch.empty_like(logits_NV))
            if wanted
            else logits_NV[:0].detach()
        )
        columns = (x.numpy() for kept in (kept_V, kept_W) for x in (kept.ids, kept.stops, kept.left))
        scratch = np.empty(0, _real(logits_NV))
        _on_rows(
            loops.divergence,
            rows,
            _array(logits_NV),
            _array(logits_NW),
            scratch,
            *columns,
            *shape,
            results,
            _array(grad),
        )
        ctx.grad = grad
        value, mass = (_tensor(results[:, i], logits_NV) for i in range(2))
        ctx.mark_non_differentiable(mass)
        return value, mass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        grad = ctx.grad if bool((scale == 1.0).all()) else ctx.grad * scale[:, None].to(ctx.grad.dtype)
        return grad, None, None, None, None, None


class _SortedL1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p_NV: Tensor, q_NW: Tensor, overwrite: bool) -> Tensor:
        rows = p_NV.shape[0]
        value = np.empty(rows, np.float64)
        wanted = ctx.needs_input_grad[0]
        sign = (p_NV.detach() if overwrite else torch.empty_like(p_NV)) if wanted else p_NV[:0].detach()
        _on_rows(loops.sorted_distance, rows, p_NV.detach().numpy(), q_NW.numpy(), value, sign.numpy())
        ctx.sign = sign
        return _tensor(value, p_NV)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.sign * grads[0][:, None], None, None


class _ColumnLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, columns: Columns, overwrite: bool) -> Tensor:
        rows = logits_NV.shape[0]
        event, starts = columns.is_special.numpy(), columns.starts.numpy()
        out = np.empty((rows, columns.events), _real(logits_NV))
        _on_rows(loops.columns_forward, rows, _array(logits_NV), out[0:0, 0], event, starts, out)
        result = torch.from_numpy(out)
        ctx.save_for_backward(logits_NV, result)
        ctx.event, ctx.overwrite = event, overwrite
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, result = ctx.saved_tensors
        grad = _room(ctx, logits_NV)
        total = grads[0].contiguous().numpy()
        _on_rows(
            loops.columns_backward,
            logits_NV.shape[0],
            _array(logits_NV),
            total[0:0, 0].copy(),
            ctx.event,
            result.detach().numpy(),
            total,
            _array(grad),
        )
        return grad, None, None


class _PieceMasses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        target_N: Tensor,
        columns: Columns,
        whole_P: Tensor,
        tokens: Tokens,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = logits_NV.shape[0]
        logits, like = _array(logits_NV), np.empty(0, _real(logits_NV))
        position_N = np.full(rows, -1, np.int64)
        position_N[whole_P.numpy()] = np.arange(whole_P.numel())
        row, id_, moved = (x.numpy() for x in (tokens.row, tokens.id, tokens.moved))
        order = np.argsort(row, kind="stable")
        ptr = np.searchsorted(row[order], np.arange(rows + 1))
        by_row = ptr, order, id_[order], moved[order]
        shape = columns.small.numpy(), columns.starts.numpy()
        given = target_N.contiguous().numpy(), *shape, position_N, *by_row
        full = np.empty((whole_P.numel(), columns.events), like.dtype)
        value = np.empty(row.size, like.dtype)
        stats = np.empty((rows, 2), np.float64)
        _on_rows(loops.pieces_forward, rows, logits, like, *given, full, value, stats)
        result = torch.from_numpy(full), torch.from_numpy(value), _tensor(stats[:, 1], logits_NV)
        ctx.save_for_backward(logits_NV, result[0])
        ctx.given, ctx.stats, ctx.overwrite = given, stats, overwrite
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, full = ctx.saved_tensors
        out = _room(ctx, logits_NV)
        _on_rows(
            loops.pieces_backward,
            logits_NV.shape[0],
            _array(logits_NV),
            np.empty(0, _real(logits_NV)),
            *ctx.given,
            full.detach().numpy(),
            ctx.stats,
            *(g.contiguous().numpy() for g in grads),
            _array(out),
        )
        return out, None, None, None, None, None


class _HybridDistance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        logits_NW: Tensor,
        before_N: Tensor,
        before_T_N: Tensor,
        kept_V: KeptEvents,
        kept_W: KeptEvents,
        shape: Any,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = logits_NV.shape[0]
        results = np.empty((rows, 4), np.float64)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        none = logits_NV[:0].detach()
        grad = (logits_NV.detach() if overwrite else torch.empty_like(logits_NV)) if wanted else none
        columns = (x.numpy() for kept in (kept_V, kept_W) for x in (kept.ids, kept.stops, kept.left))
        _on_rows(
            loops.hybrid,
            rows,
            _array(logits_NV),
            _array(logits_NW),
            np.empty(0, _real(logits_NV)),
            *_doubles(before_N.detach(), before_T_N.detach()),
            *columns,
            *shape,
            results,
            _array(grad),
        )
        ctx.grad, ctx.grad_before = grad, torch.from_numpy(results[:, 3].copy())
        total, matched, unmatched = (_tensor(results[:, i], logits_NV) for i in range(3))
        ctx.mark_non_differentiable(matched, unmatched)
        return total, matched, unmatched

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        grad = ctx.grad if bool((scale == 1.0).all()) else ctx.grad * scale[:, None].to(ctx.grad.dtype)
        return grad, None, (ctx.grad_before * scale).to(scale), *(None,) * 5


class _SegmentLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, segment: Tensor, segments: int) -> Tensor:
        out = torch.empty(segments, dtype=value.dtype)
        loops.segments_forward(value.detach().numpy(), segment.numpy(), out.numpy())
        ctx.save_for_backward(value, segment, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        value, segment, out = ctx.saved_tensors
        grad = torch.empty_like(value)
        total = grads[0].contiguous().numpy()
        loops.segments_backward(
            value.detach().numpy(), segment.numpy(), out.detach().numpy(), total, grad.numpy()
        )
        return grad, None, None


def _arrays(layout: ByteLayout, width: int) -> tuple[Array, ...]:
    trie, plan = layout.trie, layout.plan
    shared = layout.trie_on_device(width)
    return (
        shared.pool.numpy(),
        shared.position.numpy(),
        np.array([shared.texts, shared.stop_low]),
        trie["low"],
        trie["high"],
        trie["own"],
        trie["first_child"],
        trie["children"],
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
