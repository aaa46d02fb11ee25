"""Triton back end: the functions of ``reference`` on CUDA tensors, or on CPU tensors under Triton's interpreter.

A row is as wide as a vocabulary, so no program ever holds one: rows are read in tiles, each tile leaves a pair
(maximum, sum of exponentials below it), and pairs are joined. All arithmetic is in float32, or in float64 where the
logits are; no result depends on the order in which programs run.

Bytes moved are what counts, for a row has a few operations per byte. Sums over sets of columns read a row once, and the
columns at the edges of ranges again; divergences read both rows twice, since an event counts by its probability, which
the whole row decides; every gradient is one read and one write. An order of columns is an index array beside the row:
columns that stand in that order already are read as if there were none, and others cost a memory sector each.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gold.kernels.layout import ByteLayout, Columns, KeptEvents, Tokens
from gold.kernels.reference import SMOOTHING, MixedKL, Rest, hybrid_of, widened

# Sizes are powers of two. They were chosen by arithmetic and the compiler's register counts, not yet measured: 2,048
# float32 values are 16 a thread with 4 warps, and 64 registers leave room for 8 programs on a multiprocessor.
TILE = 2048
"""Columns per program where a row is gone through once."""
BACK_TILE = 1024
"""Columns per program in a backward pass, which takes up to twice the registers."""
LEAF = 128
"""Columns of an order that are summed once for all ranges of it: with more, the edges of ranges are longer."""
RANGES = 16
"""Ranges per program: most hold a handful of columns."""
STEP = 16
"""Columns of every range that a program reads at a time."""
JOIN = 1024
"""Pairs that a program joins at a time."""
WARPS = 4
"""Warps per program."""
SHIFT = 18
INTERVALS = 0x80000000 >> SHIFT
"""Intervals of numbers that are not negative: those with the same exponent and first five digits."""
IN_DOUBT = 2
"""The sign of an interval whose entries do not all have the same."""
VARYING = (
    "first_row", "first_mass", "end_mass", "rows", "segments", "stop_count", "other_stop_count", "texts", "stop_low"
)  # fmt: skip
"""Arguments whose divisors are nobody's business: kernels are not compiled again for them."""


def byte_masses(
    logits_NV: Tensor, layout: ByteLayout, first_row: int, *, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.byte_masses``."""
    log_mass, log_target_N, log_stop_N = _ByteMasses.apply(logits_NV, layout, first_row, overwrite)
    return log_mass, log_target_N, log_stop_N


def chunk_sums(logp_N: Tensor, chunk_N: Tensor, chunks: int) -> Tensor:
    """See ``reference.chunk_sums``."""
    out: Tensor = _ChunkSums.apply(logp_N, chunk_N, chunks)
    return out


def row_statistics(
    logits_NV: Tensor, target_N: Tensor, stops: Tensor, *, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.row_statistics``."""
    norm_N, log_target_N, log_stop_N, entropy_N = _RowStatistics.apply(logits_NV, target_N, stops, overwrite)
    return norm_N, log_target_N, log_stop_N, entropy_N


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
    """See ``reference.row_divergence``. Columns are gone through in the order of ``logits_NV``; the teacher's are read
    beside them, side by side where its events stand in the same order."""
    value_N, mass_N = _RowDivergence.apply(
        logits_NV, logits_NW.detach(), kept_V, kept_W, divergence, rest, smoothing, only_common, overwrite
    )
    return value_N, mass_N


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
    """See ``reference.hybrid_distance``."""
    return hybrid_of(
        sorted_l1, logits_NV, logits_NW, before_N, before_T_N, kept_V, kept_W, divergence, matched_share
    )


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
    logits_NV = widened(logits_NV)  # gradients of several kernels add up here, and are rounded once
    norm_N, step_N, _, _ = row_statistics(logits_NV, target_N, target_N[:0])
    value = logits_NV[tokens.row, tokens.id].to(norm_N) - norm_N[tokens.row]
    moved = torch.nonzero(tokens.moved)[:, 0]
    rows = logits_NV
    if moved.numel():
        rows = rows.index_put((tokens.row[moved], tokens.id[moved]), rows.new_tensor(-torch.inf))
    if whole_P.numel() < rows.shape[0]:
        rows, norm_N = (x.index_select(0, whole_P) for x in (rows, norm_N))
    return column_logsumexp(rows, columns) - norm_N[:, None], value, step_N


def sorted_l1(p_NV: Tensor, q_NW: Tensor, *, overwrite: bool = False) -> Tensor:
    """See ``reference.sorted_l1``; no row is sorted whole.

    Entries are counted by narrow intervals. Where one side is ahead in rank by all that the other holds in an interval,
    all entries in it have one sign; only what lies in other intervals is sorted. How much that is the host must know:
    it waits for the device once.
    """
    out: Tensor = _SortedL1.apply(p_NV, q_NW.detach().to(p_NV))
    return out


def column_logsumexp(logits_NV: Tensor, columns: Columns, *, overwrite: bool = False) -> Tensor:
    """See ``reference.column_logsumexp``."""
    out_NE: Tensor = _ColumnLogsumexp.apply(logits_NV, columns, overwrite)
    return out_NE


def segment_logsumexp(value: Tensor, segment: Tensor, segments: int) -> Tensor:
    """See ``reference.segment_logsumexp``."""
    return column_logsumexp(value[None], Columns(segment, segments))[0]


class _ByteMasses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, layout: ByteLayout, first_row: int, overwrite: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, width = logits_NV.shape
        trie, visits = layout.trie_on_device(width), layout.visits
        low, high = layout.mass_range(first_row, rows)
        dtype = _arithmetic(logits_NV)
        log_mass = logits_NV.new_empty(high - low, dtype=dtype)
        stats = logits_NV.new_empty((rows, 5), dtype=dtype)
        leaf_top, leaf_total = _leaves(logits_NV, trie.pool, LEAF)
        _run(
            _masses_of_rows, rows,
            logits_NV, trie.pool, trie.position, layout.target, leaf_top, leaf_total,
            visits.ptr, visits.skips, stats, first_row, *logits_NV.stride(), leaf_top.shape[1],
            trie.texts, trie.stop_low, width, JOIN=JOIN,
        )  # fmt: skip
        _run(
            _masses_of_ranges, triton.cdiv(high - low, RANGES),
            logits_NV, trie.pool, trie.position, trie.low, trie.high, trie.own, trie.first_child,
            trie.children, visits.node, visits.row, visits.starts, visits.skips, visits.mass_ptr,
            visits.of_mass, layout.target, leaf_top, leaf_total, stats, log_mass,
            first_row, low, high, *logits_NV.stride(), leaf_top.shape[1],
            LEAF=LEAF, RANGES=RANGES, STEP=STEP,
        )  # fmt: skip
        ctx.layout, ctx.first_row, ctx.overwrite = layout, first_row, overwrite
        ctx.save_for_backward(logits_NV, log_mass, stats)
        return log_mass, stats[:, 2].clone(), stats[:, 3].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, log_mass, stats = ctx.saved_tensors
        rows, width = logits_NV.shape
        trie, visits = ctx.layout.trie_on_device(width), ctx.layout.visits
        low, _ = ctx.layout.mass_range(ctx.first_row, rows)
        grad_mass, grad_target, grad_stop = (g.contiguous() for g in grads)
        grad_logits = logits_NV.detach() if ctx.overwrite else torch.empty_like(logits_NV)
        total = torch.empty_like(grad_target)
        _run(
            _total_of_rows, rows,
            log_mass, grad_mass, grad_target, grad_stop, ctx.layout.target, stats,
            visits.ptr, visits.mass_ptr, total, ctx.first_row, low, JOIN=JOIN,
        )  # fmt: skip
        _run(
            _masses_backward, rows * triton.cdiv(width, BACK_TILE),
            logits_NV, grad_logits, trie.pool, trie.position, trie.low, trie.high, trie.own,
            trie.first_child, trie.children, visits.ptr, visits.node, visits.starts, visits.skips,
            visits.mass_ptr, ctx.layout.target, log_mass, grad_mass, grad_target, grad_stop, stats,
            total, ctx.first_row, low, *logits_NV.stride(), *grad_logits.stride(),
            trie.texts, trie.stop_low, width, TILE=BACK_TILE,
        )  # fmt: skip
        return grad_logits, None, None, None


class _ChunkSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp_N: Tensor, chunk_N: Tensor, chunks: int) -> Tensor:
        ctx.save_for_backward(chunk_N)
        out_C = logp_N.new_empty(chunks)
        # Stable, so that every chunk is summed in the order of its tokens.
        chunk_N, order = torch.sort(chunk_N.long(), stable=True)
        starts = torch.searchsorted(chunk_N, torch.arange(chunks + 1, device=chunk_N.device))
        _run(
            _sums, triton.cdiv(chunks, RANGES),
            logp_N, order, starts, out_C, chunks, logp_N.stride(0),
            RANGES=RANGES, STEP=STEP,
        )  # fmt: skip
        return out_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (chunk_N,) = ctx.saved_tensors
        (grad_C,) = grads
        if not grad_C.numel():
            return grad_C.new_zeros(chunk_N.shape), None, None
        return torch.where(chunk_N >= 0, grad_C[chunk_N.clamp(min=0).long()], 0.0), None, None


class _RowStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, target_N: Tensor, stops: Tensor, overwrite: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = logits_NV.shape[0]
        stats = logits_NV.new_empty((5, rows), dtype=_arithmetic(logits_NV))
        leaf_moment = logits_NV.new_empty((rows, triton.cdiv(logits_NV.shape[1], TILE)), dtype=stats.dtype)
        leaf_top, leaf_total = _leaves(logits_NV, None, TILE, leaf_moment)
        _run(
            _statistics_of_rows, rows,
            logits_NV, target_N, stops, leaf_top, leaf_total, leaf_moment, stats, rows, *logits_NV.stride(),
            stops.numel(), leaf_top.shape[1], JOIN=JOIN,
        )  # fmt: skip
        ctx.overwrite = overwrite
        ctx.save_for_backward(logits_NV, target_N, stops, stats)
        entropy = stats[4].clone()
        ctx.mark_non_differentiable(entropy)
        return stats[0] + stats[1], stats[2].clone(), stats[3].clone(), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, target_N, stops, stats = ctx.saved_tensors
        rows, width = logits_NV.shape
        grad_logits = logits_NV.detach() if ctx.overwrite else torch.empty_like(logits_NV)
        _run(
            _statistics_backward, rows * triton.cdiv(width, BACK_TILE),
            logits_NV, grad_logits, target_N, stops, stats, *(g.contiguous() for g in grads[:3]), rows,
            *logits_NV.stride(), *grad_logits.stride(), stops.numel(), width, TILE=BACK_TILE,
        )  # fmt: skip
        return grad_logits, None, None, None


class _RowDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        logits_NW: Tensor,
        kept_V: KeptEvents,
        kept_W: KeptEvents,
        divergence: MixedKL,
        rest: Rest,
        smoothing: float,
        only_common: bool,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, width = logits_NV.shape
        dtype = _arithmetic(logits_NV)
        smoothing = smoothing if rest == "bucket" else 0.0
        form = {
            "STUDENT": divergence.student != 0,
            "TEACHER": divergence.teacher != 0,
            "STUDENT_MIX": divergence.student_mix,
            "TEACHER_MIX": divergence.teacher_mix,
        }
        partner_V, partner_W = _partners(kept_V, kept_W.ids), _partners(kept_W, kept_V.ids)
        mine, theirs = (logits_NV, kept_V, partner_V), (logits_NW, kept_W, partner_W)
        sides = []
        for (logits, kept, partner), (others, kept_there, _) in ((mine, theirs), (theirs, mine)):
            tiles = triton.cdiv(logits.shape[1], TILE)
            leaves = logits.new_empty((rows, tiles, 4), dtype=dtype)
            side = logits.new_empty((6, rows), dtype=dtype)
            _run(
                _event_leaves, rows * tiles,
                logits, others, partner, leaves, *logits.stride(), *others.stride(), logits.shape[1],
                COMMON=only_common, TILE=TILE,
            )  # fmt: skip
            _run(
                _side_of_rows, rows,
                logits, kept.stops, others, kept_there.stops, leaves, side, rows, *logits.stride(),
                *others.stride(), kept.stops.numel(), kept_there.stops.numel(), tiles,
                COMMON=only_common, BUCKET=rest == "bucket", SMOOTHING=smoothing, LOG_KEPT=math.log1p(-smoothing),
                JOIN=JOIN,
            )  # fmt: skip
            sides.append(side)
        tiles = triton.cdiv(width, TILE)
        sums = logits_NV.new_empty((rows, tiles, 5), dtype=dtype)
        value, slopes = logits_NV.new_empty(rows, dtype=dtype), logits_NV.new_empty((4, rows), dtype=dtype)
        _run(
            _divergence_of_tiles, rows * tiles,
            logits_NV, logits_NW, partner_V, *sides, sums, rows, *logits_NV.stride(),
            *logits_NW.stride(), width, **form, COMMON=only_common, TILE=TILE,
        )  # fmt: skip
        _run(
            _divergence_of_rows, rows,
            *sides, sums, value, slopes, rows, tiles, **form, STUDENT_WEIGHT=divergence.student,
            TEACHER_WEIGHT=divergence.teacher, ABOVE=divergence.above_nats, BUCKET=rest == "bucket",
            JOIN=JOIN,
        )  # fmt: skip
        ctx.form, ctx.weight, ctx.rest, ctx.smoothing = form, divergence.student, rest, smoothing
        ctx.only_common, ctx.overwrite = only_common, overwrite
        mass = sides[0][5].clone()
        ctx.mark_non_differentiable(mass)
        ctx.save_for_backward(logits_NV, logits_NW, partner_V, *sides, slopes)
        return value, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_NV, logits_NW, partner_V, *sides, slopes = ctx.saved_tensors
        rows, width = logits_NV.shape
        grad_logits = logits_NV.detach() if ctx.overwrite else torch.empty_like(logits_NV)
        _run(
            _divergence_backward, rows * triton.cdiv(width, BACK_TILE),
            logits_NV, logits_NW, grad_logits, partner_V, *sides, slopes, grads[0].contiguous(),
            rows, *logits_NV.stride(), *logits_NW.stride(), *grad_logits.stride(), width,
            **ctx.form, COMMON=ctx.only_common, STUDENT_WEIGHT=ctx.weight, BUCKET=ctx.rest == "bucket",
            LOG_KEPT=math.log1p(-ctx.smoothing), TILE=BACK_TILE,
        )  # fmt: skip
        return grad_logits, *(None,) * 8


class _SortedL1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p_NV: Tensor, q_NW: Tensor) -> Tensor:
        here_p, here_q = _counts(p_NV), _counts(q_NW)
        lead = _above(here_p) - _above(here_q)
        # What is 0 on one side is met by zeros.
        ahead = torch.where(torch.arange(INTERVALS, device=lead.device) > 0, 1, 0)
        sign = torch.where(lead >= here_q, ahead, torch.where(-lead >= here_p, -1, IN_DOUBT)).to(torch.int8)
        total_p, signs_p = _signed(p_NV, sign, p_NV.dtype)
        total_q, signs_q = _signed(q_NW, sign, torch.int8)
        total = total_p - total_q
        at_p, at_q = (torch.nonzero(signs == IN_DOUBT, as_tuple=True) for signs in (signs_p, signs_q))
        if at_p[0].numel() + at_q[0].numel():
            doubt = sign == IN_DOUBT
            mine = _Ranked.of(p_NV, at_p, here_p.masked_fill(~doubt, 0))
            theirs = _Ranked.of(q_NW, at_q, here_q.masked_fill(~doubt, 0))
            s, found = mine.signs(theirs, lead)
            signs_p[mine.row, mine.column] = s
            total = total + found + theirs.signs(mine, -lead)[1]
        ctx.save_for_backward(signs_p)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (signs_p,) = ctx.saved_tensors
        return signs_p * grads[0][:, None], None


@dataclass(frozen=True)
class _Ranked:
    """Entries of one side that are in doubt, row by row from the largest down: where they are, their values, intervals
    and ranks among those of their interval; ``start`` is where each row's interval begins, ``size`` what it holds."""

    row: Tensor
    column: Tensor
    value: Tensor
    interval: Tensor
    rank: Tensor
    start: Tensor
    size: Tensor

    @classmethod
    def of(cls, values: Tensor, at: tuple[Tensor, ...], size: Tensor) -> "_Ranked":
        """Entries at (row, column) of ``values``, of which each row's intervals hold ``size``."""
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
        """The sign of each entry's difference from the other side's entry of the same rank, of which this side's are
        ``lead`` before it, and the sum of signs times values of each row."""
        cell = self.row, self.interval
        rival = self.rank + lead[cell]
        there = (rival >= 0) & (rival < other.size[cell])
        other_value = torch.zeros_like(self.value)
        other_value[there] = other.value[(other.start[cell] + rival)[there]]
        s = torch.where(rival < 0, -1.0, torch.sign(self.value - other_value)).to(self.value.dtype)
        parts = torch.bincount(self.row, minlength=self.size.shape[0])
        return s, torch.segment_reduce(s * self.value, "sum", lengths=parts)


def _counts(values: Tensor) -> Tensor:
    """How many entries of each row each interval holds."""
    rows, width = values.shape
    counts = torch.zeros((rows, INTERVALS), dtype=torch.int32, device=values.device)
    _run(
        _count_intervals, rows * triton.cdiv(width, TILE),
        values, counts, *values.stride(), width, INTERVALS=INTERVALS, SHIFT=SHIFT, TILE=TILE,
    )  # fmt: skip
    return counts


def _above(counts: Tensor) -> Tensor:
    """How many entries lie in the intervals above each."""
    return torch.cumsum(counts.flip(1), 1, dtype=torch.int32).flip(1) - counts


def _signed(values: Tensor, sign: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Per row the sum of all entries that are not in doubt times the sign of their interval, and each entry's sign."""
    rows, width = values.shape
    tiles = triton.cdiv(width, TILE)
    sums = torch.empty((rows, tiles), dtype=_arithmetic(values), device=values.device)
    signs = torch.empty(values.shape, dtype=dtype, device=values.device)
    _run(
        _sign_entries, rows * tiles,
        values, sign, signs, sums, *values.stride(), width,
        INTERVALS=INTERVALS, SHIFT=SHIFT, IN_DOUBT=IN_DOUBT, TILE=TILE,
    )  # fmt: skip
    return sums.sum(1), signs


class _ColumnLogsumexp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, columns: Columns, overwrite: bool) -> Tensor:
        rows, events = logits_NV.shape[0], columns.events
        out_NE = logits_NV.new_empty((rows, events), dtype=_arithmetic(logits_NV))
        order = columns.order.int()
        leaf_top, leaf_total = _leaves(logits_NV, order, LEAF)
        _run(
            _columns_of_rows, rows * triton.cdiv(events, RANGES),
            logits_NV, order, columns.starts, leaf_top, leaf_total, out_NE, *logits_NV.stride(),
            leaf_top.shape[1], events, LEAF=LEAF, RANGES=RANGES, STEP=STEP,
        )  # fmt: skip
        ctx.overwrite = overwrite
        ctx.save_for_backward(logits_NV, columns.is_special.int(), out_NE)
        return out_NE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, is_special, out_NE = ctx.saved_tensors
        rows, width = logits_NV.shape
        grad_logits = logits_NV.detach() if ctx.overwrite else torch.empty_like(logits_NV)
        _run(
            _columns_backward, rows * triton.cdiv(width, BACK_TILE),
            logits_NV, grad_logits, is_special, out_NE, grads[0].contiguous(), *logits_NV.stride(),
            *grad_logits.stride(), width, out_NE.shape[1], TILE=BACK_TILE,
        )  # fmt: skip
        return grad_logits, None, None


def _run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launches a kernel on the device of its first argument, or on a CPU interprets it."""
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants, num_warps=WARPS)


def _arithmetic(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _partners(kept: KeptEvents, others: Tensor) -> Tensor:
    """For each column the other side's column of the same token; −1 for stops, −2 for what is left."""
    codes = torch.cat((others, torch.arange(-1, -3, -1, device=others.device))).int()
    return codes[kept.place]


def _leaves(
    logits_NV: Tensor, order: Tensor | None, leaf: int, moment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Maximum, and sum of the exponentials above it, of every ``leaf`` columns of an order: two [N, leaves].
    ``moment`` gets the same sum, each exponential times its exponent."""
    rows, width = logits_NV.shape
    shape = (rows, triton.cdiv(width, leaf))
    top, total = (logits_NV.new_empty(shape, dtype=_arithmetic(logits_NV)) for _ in range(2))
    leaves = max(1, TILE // leaf)
    _run(
        _sum_leaves, rows * triton.cdiv(shape[1], leaves),
        logits_NV, order, top, total, moment, *logits_NV.stride(), width, shape[1],
        LEAF=leaf, LEAVES=leaves,
    )  # fmt: skip
    return top, total


@triton.jit
def _finite(top):
    """The maximum to subtract: 0 where there is nothing, since −inf − −inf is not a number."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _join(top, total, more_top, more_total):
    """Two pairs as one."""
    both = tl.maximum(top, more_top)
    at = _finite(both)
    return both, total * tl.exp(top - at) + more_total * tl.exp(more_top - at)


@triton.jit
def _log(total):
    """−inf for 0, without a warning where the interpreter computes it."""
    return tl.where(total == 0.0, float("-inf"), tl.log(tl.where(total == 0.0, 1.0, total)))


@triton.jit(do_not_specialize=VARYING)
def _sum_leaves(
    logits, order, leaf_top, leaf_total, leaf_moment, stride_n, stride_v, width, leaves,
    LEAF: tl.constexpr, LEAVES: tl.constexpr,
):  # fmt: skip
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
    d = z - _finite(top)[:, None]
    total = tl.sum(tl.exp(d), 1)
    tl.store(leaf_top + row * leaves + leaf, top, mask=leaf < leaves)
    tl.store(leaf_total + row * leaves + leaf, total, mask=leaf < leaves)
    if leaf_moment is not None:
        moment = tl.sum(tl.exp(d) * tl.where(d > float("-inf"), d, 0.0), 1)
        tl.store(leaf_moment + row * leaves + leaf, moment, mask=leaf < leaves)


@triton.jit
def _join_leaves(leaf_top, leaf_total, leaves, stride, JOIN: tl.constexpr):
    """The pair of all leaves of a row."""
    top = tl.full((), float("-inf"), leaf_top.dtype.element_ty)
    total = tl.full((), 0.0, leaf_top.dtype.element_ty)
    for start in range(0, leaves, JOIN):
        at = start + tl.arange(0, JOIN)
        tops = tl.load(leaf_top + at * stride, mask=at < leaves, other=float("-inf"))
        totals = tl.load(leaf_total + at * stride, mask=at < leaves, other=0.0)
        here = tl.max(tops, 0)
        top, total = _join(top, total, here, tl.sum(totals * tl.exp(tops - _finite(here)), 0))
    return top, total


@triton.jit
def _sum_columns(row, columns, low, high, skip, stride_v, dtype: tl.constexpr, JOIN: tl.constexpr):
    """The pair of the columns that stand in a stretch of a list, without place ``skip``."""
    top = tl.full((), float("-inf"), dtype)
    total = tl.full((), 0.0, dtype)
    for start in range(low, high, JOIN):
        at = start + tl.arange(0, JOIN)
        inside = (at < high) & (at != skip)
        column = tl.load(columns + at, mask=inside, other=0).to(tl.int64)
        z = tl.load(row + column * stride_v, mask=inside, other=float("-inf")).to(dtype)
        here = tl.max(z, 0)
        top, total = _join(top, total, here, tl.sum(tl.exp(z - _finite(here)), 0))
    return top, total


@triton.jit(do_not_specialize=VARYING)
def _masses_of_rows(
    logits, pool, position, target, leaf_top, leaf_total, visit_ptr, visit_skips, stats,
    first_row, stride_n, stride_v, leaves, texts, stop_low, width,
    JOIN: tl.constexpr,
):  # fmt: skip
    """Of each row: maximum, log of the sum above it, log-probability of target, stops, and ids that are neither text
    nor stop (without the target where the row's first visit leaves it out)."""
    dtype: tl.constexpr = stats.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    top, total = _join_leaves(leaf_top + n * leaves, leaf_total + n * leaves, leaves, 1, JOIN)
    log_total = _log(total)

    row = logits + n * stride_n
    aim = tl.load(target + first_row + n)
    picked = tl.load(row + aim * stride_v, mask=aim >= 0, other=0.0).to(dtype)
    visit = tl.load(visit_ptr + first_row + n)
    visited = visit < tl.load(visit_ptr + first_row + n + 1)
    skips = (tl.load(visit_skips + visit, mask=visited, other=0) != 0) & (aim >= 0)
    skip = tl.load(position + aim, mask=skips, other=-1)
    stop_top, stop_total = _sum_columns(row, pool, stop_low, width, -1, stride_v, dtype, JOIN)
    rest_top, rest_total = _sum_columns(row, pool, texts, stop_low, skip, stride_v, dtype, JOIN)

    tl.store(stats + n * 5, top)
    tl.store(stats + n * 5 + 1, log_total)
    tl.store(stats + n * 5 + 2, tl.where(aim >= 0, picked - top - log_total, 0.0))
    tl.store(stats + n * 5 + 3, stop_top - top + _log(stop_total) - log_total)
    tl.store(stats + n * 5 + 4, rest_top - top + _log(rest_total) - log_total)


@triton.jit
def _sum_ranges(
    row, order, leaf_top, leaf_total, low, high, skip, whole, stride_v,
    LEAF: tl.constexpr, RANGES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The pairs of ranges of an order, each of a row of its own: leaves where ``whole`` and a range covers them, single
    columns (but ``skip``) at the edges."""
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
        top, total = _join(top, total, here, tl.sum(tl.exp(z - _finite(here)[:, None]), 1))
    covered = tl.where(whole, tl.maximum(high // LEAF - first_leaf, 0), 0)
    for step in range(0, tl.max(covered, 0), STEP):
        nth = step + lane[None, :]
        inside = nth < covered[:, None]
        at = first_leaf[:, None] + nth
        tops = tl.load(leaf_top[:, None] + at, mask=inside, other=float("-inf"))
        totals = tl.load(leaf_total[:, None] + at, mask=inside, other=0.0)
        here = tl.max(tops, 1)
        joined = tl.sum(totals * tl.exp(tops - _finite(here)[:, None]), 1)
        top, total = _join(top, total, here, joined)
    return top, total


@triton.jit(do_not_specialize=VARYING)
def _masses_of_ranges(
    logits, pool, position, trie_low, trie_high, trie_own, trie_first_child, trie_children,
    visit_node, visit_row, visit_starts, visit_skips, mass_ptr, mass_visit, target, leaf_top, leaf_total, stats,
    log_mass, first_row, first_mass, end_mass, stride_n, stride_v, leaves,
    LEAF: tl.constexpr, RANGES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    m = first_mass + tl.program_id(0).to(tl.int64) * RANGES + tl.arange(0, RANGES)
    here = m < end_mass
    visit = tl.load(mass_visit + m, mask=here, other=0)
    kth = (m - tl.load(mass_ptr + visit, mask=here, other=0)).to(tl.int32)
    node = tl.load(visit_node + visit, mask=here, other=0)
    starts = tl.load(visit_starts + visit, mask=here, other=0) != 0
    n = tl.load(visit_row + visit, mask=here, other=first_row).to(tl.int64) - first_row
    is_own = kth == 0
    is_stop = kth > tl.load(trie_children + node, mask=here, other=0)
    is_range = here & (is_stop == 0)
    node = tl.where(is_own, node, tl.load(trie_first_child + node, mask=here, other=0) + kth - 1)
    low = tl.load(trie_low + node, mask=is_range, other=0)
    own = tl.load(trie_own + node, mask=is_range & is_own, other=0)
    high = tl.where(is_own, low + own, tl.load(trie_high + node, mask=is_range, other=0))
    aim = tl.load(target + first_row + n, mask=is_own & here, other=-1)
    skips = tl.load(visit_skips + visit, mask=is_own & here, other=0) != 0
    skip = tl.load(position + aim, mask=skips & (aim >= 0), other=-1)

    row = logits + n * stride_n
    top, total = _sum_ranges(
        row, pool, leaf_top + n * leaves, leaf_total + n * leaves, low, high, skip, is_own == 0, stride_v,
        LEAF, RANGES, STEP,
    )  # fmt: skip
    row_top = tl.load(stats + n * 5, mask=here, other=0.0)
    row_log_total = tl.load(stats + n * 5 + 1, mask=here, other=0.0)
    value = top - row_top + _log(total) - row_log_total
    # At the start of a row its rest joins what ends there.
    rest = tl.load(stats + n * 5 + 4, mask=here & is_own & starts, other=float("-inf"))
    both = tl.maximum(value, rest)
    at = _finite(both)
    value = tl.where(is_own & starts, at + _log(tl.exp(value - at) + tl.exp(rest - at)), value)
    value = tl.where(is_stop, tl.load(stats + n * 5 + 3, mask=here & is_stop, other=0.0), value)
    tl.store(log_mass + m - first_mass, value, mask=here)


@triton.jit(do_not_specialize=VARYING)
def _total_of_rows(
    log_mass, grad_mass, grad_target, grad_stop, target, stats, visit_ptr, mass_ptr, total,
    first_row, first_mass, JOIN: tl.constexpr,
):  # fmt: skip
    """Of each row, the sum of the gradients of all that its probabilities make up."""
    n = tl.program_id(0).to(tl.int64)
    low = tl.load(mass_ptr + tl.load(visit_ptr + first_row + n)) - first_mass
    high = tl.load(mass_ptr + tl.load(visit_ptr + first_row + n + 1)) - first_mass
    sums = tl.zeros((JOIN,), log_mass.dtype.element_ty)
    for start in range(low, high, JOIN):
        at = start + tl.arange(0, JOIN)
        value = tl.load(log_mass + at, mask=at < high, other=float("-inf"))
        sums += tl.load(grad_mass + at, mask=value > float("-inf"), other=0.0)
    aimed = tl.load(target + first_row + n) >= 0
    stops = tl.load(stats + n * 5 + 3) > float("-inf")
    aside = tl.load(grad_target + n, mask=aimed, other=0.0) + tl.load(grad_stop + n, mask=stops, other=0.0)
    tl.store(total + n, tl.sum(sums, 0) + aside)


@triton.jit(do_not_specialize=VARYING)
def _masses_backward(
    logits, grad_logits, pool, position, trie_low, trie_high, trie_own, trie_first_child, trie_children,
    visit_ptr, visit_node, visit_starts, visit_skips, mass_ptr, target, log_mass, grad_mass, grad_target,
    grad_stop, stats, total, first_row, first_mass, stride_n, stride_v, grad_stride_n, grad_stride_v,
    texts, stop_low, width, TILE: tl.constexpr,
):  # fmt: skip
    """Each place of the pool belongs to at most one set of every visit: its share of all of them."""
    dtype: tl.constexpr = log_mass.dtype.element_ty
    tiles = tl.cdiv(width, TILE)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    begin = (tl.program_id(0) % tiles) * TILE
    at = begin + tl.arange(0, TILE)
    inside = at < width
    column = tl.load(pool + at, mask=inside, other=0).to(tl.int64)
    z = tl.load(logits + n * stride_n + column * stride_v, mask=inside, other=float("-inf")).to(dtype)
    logp = z - tl.load(stats + n * 5) - tl.load(stats + n * 5 + 1)
    grad = -tl.load(total + n) * tl.exp(logp)

    aim = tl.load(target + first_row + n)
    place = tl.load(position + aim, mask=aim >= 0, other=-1)
    grad += tl.where(at == place, tl.load(grad_target + n), 0.0)
    log_stop = tl.load(stats + n * 5 + 3)
    of_stops = tl.where((at >= stop_low) & inside, logp - _finite(log_stop), float("-inf"))
    grad += tl.load(grad_stop + n) * tl.exp(of_stops)

    for visit in range(tl.load(visit_ptr + first_row + n), tl.load(visit_ptr + first_row + n + 1)):
        node = tl.load(visit_node + visit)
        low, high = tl.load(trie_low + node), tl.load(trie_high + node)
        starts = tl.load(visit_starts + visit) != 0
        rest_low, ends_low = tl.where(starts, texts, width), tl.where(starts, stop_low, width)
        if ((begin < high) & (begin + TILE > low)) | (begin + TILE > rest_low):
            own_end = low + tl.load(trie_own + node)
            children, first_child = tl.load(trie_children + node), tl.load(trie_first_child + node)
            below = (at >= own_end) & (at < high)
            # The last child that begins at or before a place; a node has 256 at most.
            child, end = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int32) + children
            for _ in range(8):
                middle = (child + end) // 2
                before = tl.load(trie_low + first_child + middle, mask=below & (middle < end), other=0) <= at
                child, end = tl.where(before, middle, child), tl.where(before, end, middle)
            skip = tl.where(tl.load(visit_skips + visit) != 0, place, -1)
            is_own = ((at >= low) & (at < own_end)) | ((at >= rest_low) & (at < stop_low))
            ends = (at >= ends_low) & inside
            kth = tl.where(below, child + 1, tl.where(ends, children + 1, 0))
            counts = below | ends | (is_own & (at != skip))
            m = tl.load(mass_ptr + visit) - first_mass + kth
            mass = tl.load(log_mass + m, mask=counts, other=float("-inf"))
            g = tl.load(grad_mass + m, mask=mass > float("-inf"), other=0.0)
            grad += g * tl.exp(logp - _finite(mass))
    to = grad_logits + n * grad_stride_n + column * grad_stride_v
    tl.store(to, grad.to(grad_logits.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _sums(values, order, starts, out, segments, stride, RANGES: tl.constexpr, STEP: tl.constexpr):
    """Sums over ``values[order[starts[s]:starts[s + 1]]]``."""
    segment = tl.program_id(0) * RANGES + tl.arange(0, RANGES)
    low = tl.load(starts + segment, mask=segment < segments, other=0)
    high = tl.load(starts + segment + 1, mask=segment < segments, other=0)
    total = tl.zeros((RANGES,), out.dtype.element_ty)
    for step in range(0, tl.max(high - low, 0), STEP):
        at = (low + step)[:, None] + tl.arange(0, STEP)[None, :]
        inside = at < high[:, None]
        index = tl.load(order + at, mask=inside, other=0)
        total += tl.sum(tl.load(values + index * stride, mask=inside, other=0.0), 1)
    tl.store(out + segment, total, mask=segment < segments)


@triton.jit(do_not_specialize=VARYING)
def _statistics_of_rows(
    logits, target, stops, leaf_top, leaf_total, leaf_moment, stats, rows, stride_n, stride_v, stop_count, leaves,
    JOIN: tl.constexpr,
):  # fmt: skip
    """Of each row: maximum, log of the sum above it, log-probability of target and stops, entropy."""
    dtype: tl.constexpr = stats.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride_n
    top, total = _join_leaves(leaf_top + n * leaves, leaf_total + n * leaves, leaves, 1, JOIN)
    log_total = _log(total)
    stop_top, stop_total = _sum_columns(row, stops, 0, stop_count, -1, stride_v, dtype, JOIN)
    aim = tl.load(target + n)
    picked = tl.load(row + aim * stride_v, mask=aim >= 0, other=0.0).to(dtype)
    base = _finite(top) + _finite(log_total)
    tl.store(stats + n, top)
    tl.store(stats + rows + n, log_total)
    tl.store(stats + 2 * rows + n, tl.where(aim >= 0, picked - _finite(top) - _finite(log_total), 0.0))
    tl.store(stats + 3 * rows + n, stop_top + _log(stop_total) - base)
    moment = tl.full((), 0.0, dtype)
    for start in range(0, leaves, JOIN):
        at = n * leaves + start + tl.arange(0, JOIN)
        there = start + tl.arange(0, JOIN) < leaves
        d = tl.load(leaf_top + at, mask=there, other=float("-inf")) - _finite(top)
        totals = tl.load(leaf_total + at, mask=there, other=0.0)
        part = tl.load(leaf_moment + at, mask=there, other=0.0) + totals * tl.where(d > float("-inf"), d, 0.0)
        moment += tl.sum(tl.exp(d) * part, 0)
    entropy = tl.where(total == 0.0, 0.0, _finite(log_total) - moment / tl.where(total == 0.0, 1.0, total))
    tl.store(stats + 4 * rows + n, entropy)


@triton.jit(do_not_specialize=VARYING)
def _statistics_backward(
    logits, grad_logits, target, stops, stats, grad_norm, grad_target, grad_stop, rows, stride_n, stride_v,
    grad_stride_n, grad_stride_v, stop_count, width, TILE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = stats.dtype.element_ty
    tiles = tl.cdiv(width, TILE)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    at = ((tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = at < width
    z = tl.load(logits + n * stride_n + at * stride_v, mask=inside, other=float("-inf")).to(dtype)
    logp = z - _finite(tl.load(stats + n)) - _finite(tl.load(stats + rows + n))
    aim = tl.load(target + n)
    log_stop = tl.load(stats + 3 * rows + n)
    of_target = tl.load(grad_target + n, mask=aim >= 0, other=0.0)
    of_stop = tl.load(grad_stop + n, mask=log_stop > float("-inf"), other=0.0)
    grad = (tl.load(grad_norm + n) - of_target - of_stop) * tl.exp(logp)
    grad += tl.where(at == aim, of_target, 0.0)
    for k in range(stop_count):
        is_stop = at == tl.load(stops + k)
        grad += of_stop * tl.exp(tl.where(is_stop, logp - _finite(log_stop), float("-inf")))
    to = grad_logits + n * grad_stride_n + at * grad_stride_v
    tl.store(to, grad.to(grad_logits.dtype.element_ty), mask=inside)


@triton.jit
def _interval(x, SHIFT: tl.constexpr):
    return (x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> SHIFT


@triton.jit(do_not_specialize=VARYING)
def _count_intervals(
    values, counts, stride_n, stride_v, width, INTERVALS: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    tiles = tl.cdiv(width, TILE)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    at = ((tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)
    x = tl.load(values + n * stride_n + at * stride_v, mask=at < width, other=0.0)
    # Sums of whole numbers: the order in which programs add makes no difference.
    one = tl.full((TILE,), 1, tl.int32)
    tl.atomic_add(counts + n * INTERVALS + _interval(x, SHIFT), one, mask=at < width, sem="relaxed")


@triton.jit(do_not_specialize=VARYING)
def _sign_entries(
    values, sign, signs, sums, stride_n, stride_v, width,
    INTERVALS: tl.constexpr, SHIFT: tl.constexpr, IN_DOUBT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = sums.dtype.element_ty
    tiles = tl.cdiv(width, TILE)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    at = ((tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)
    x = tl.load(values + n * stride_n + at * stride_v, mask=at < width, other=0.0)
    s = tl.load(sign + n * INTERVALS + _interval(x, SHIFT), mask=at < width, other=0)
    tl.store(signs + n * width + at, s.to(signs.dtype.element_ty), mask=at < width)
    part = tl.where(s == IN_DOUBT, 0.0, s.to(dtype) * x.to(dtype))
    tl.store(sums + tl.program_id(0), tl.sum(part, 0))


@triton.jit(do_not_specialize=VARYING)
def _columns_of_rows(
    logits, order, starts, leaf_top, leaf_total, out, stride_n, stride_v, leaves, events,
    LEAF: tl.constexpr, RANGES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(events, RANGES)
    n = (tl.program_id(0) // groups).to(tl.int64)
    event = (tl.program_id(0) % groups) * RANGES + tl.arange(0, RANGES)
    low = tl.load(starts + event, mask=event < events, other=0).to(tl.int32)
    high = tl.load(starts + event + 1, mask=event < events, other=0).to(tl.int32)
    row = n + tl.zeros((RANGES,), tl.int64)
    top, total = _sum_ranges(
        logits + row * stride_n, order, leaf_top + row * leaves, leaf_total + row * leaves, low, high,
        low - 1, low >= 0, stride_v, LEAF, RANGES, STEP,
    )  # fmt: skip
    tl.store(out + n * events + event, top + _log(total), mask=event < events)


@triton.jit(do_not_specialize=VARYING)
def _columns_backward(
    logits, grad_logits, event_of, out, grad_out, stride_n, stride_v, grad_stride_n, grad_stride_v, width, events,
    TILE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    tiles = tl.cdiv(width, TILE)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    at = ((tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = at < width
    z = tl.load(logits + n * stride_n + at * stride_v, mask=inside, other=float("-inf")).to(dtype)
    event = n * events + tl.load(event_of + at, mask=inside, other=0)
    value = tl.load(out + event, mask=inside, other=0.0)
    g = tl.load(grad_out + event, mask=inside & (value > float("-inf")), other=0.0)
    grad = g * tl.exp(z - _finite(value))
    to = grad_logits + n * grad_stride_n + at * grad_stride_v
    tl.store(to, grad.to(grad_logits.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _event_leaves(
    logits, other_logits, partner, leaves, stride_n, stride_v, other_stride_n, other_stride_v, width,
    COMMON: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of each tile, the pair of the kept tokens and that of what is left."""
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
        tl.store(to + 2 * part + 1, tl.sum(tl.exp(mine - _finite(top)), 0))


@triton.jit
def _if_common(z, y, other):
    """The partners of a row's columns, those to whom one side gives nothing among what is left."""
    return tl.where((other >= 0) & ((z == float("-inf")) | (y == float("-inf"))), -2, other)


@triton.jit(do_not_specialize=VARYING)
def _side_of_rows(
    logits, stops, other_logits, other_stops, leaves, side, rows, stride_n, stride_v, other_stride_n,
    other_stride_v, stop_count, other_stop_count, tiles,
    COMMON: tl.constexpr, BUCKET: tl.constexpr, SMOOTHING: tl.constexpr, LOG_KEPT: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """Of each row: what is subtracted from a logit, first and second, for its event's log-probability (0, 1); that of
    the stop event and of the rest, if that is one (2, 3); of what is left, before the leak (4); and the probability of
    kept tokens and stops (5)."""
    dtype: tl.constexpr = side.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    row = leaves + n * tiles * 4
    top, total = _join_leaves(row, row + 1, tiles, 4, JOIN)
    left_top, left_total = _join_leaves(row + 2, row + 3, tiles, 4, JOIN)
    stop_top, stop_total = _sum_columns(
        logits + n * stride_n, stops, 0, stop_count, -1, stride_v, dtype, JOIN
    )
    if COMMON:
        other_row = other_logits + n * other_stride_n
        there, _ = _sum_columns(other_row, other_stops, 0, other_stop_count, -1, other_stride_v, dtype, JOIN)
        joined_top, joined_total = _join(left_top, left_total, stop_top, stop_total)
        alone = there == float("-inf")
        left_top = tl.where(alone, joined_top, left_top)
        left_total = tl.where(alone, joined_total, left_total)
        stop_top, stop_total = tl.where(alone, float("-inf"), stop_top), tl.where(alone, 0.0, stop_total)
    top, total = _join(top, total, stop_top, stop_total)
    every_top, every_total = _join(top, total, left_top, left_total)
    mass = tl.where(total == 0.0, 0.0, total * tl.exp(top - _finite(every_top)) / every_total)
    if BUCKET:
        base, log_base = _finite(every_top), _finite(_log(every_total)) - LOG_KEPT
    else:
        base, log_base = _finite(top), _finite(_log(total))
    left = left_top - base + _log(left_total) - log_base
    rest = tl.full((), float("-inf"), dtype)
    if BUCKET:
        rest = _log(tl.exp(left) + SMOOTHING)
    tl.store(side + n, base)
    tl.store(side + rows + n, log_base)
    tl.store(side + 2 * rows + n, stop_top - base + _log(stop_total) - log_base)
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
    """``p log(p / m) − p + m`` with ``m = SHARE · q + (1 − SHARE) · p``, and ``log(m / p)``, the share not 0.

    Summed over all events this is the divergence, since p and m both sum to 1, and each term is small where p and q are
    close: nothing cancels in rows near probability 1.
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
    """What an event adds to each of the two divergences, and the derivatives by ``logp`` up to one multiple of p; an
    event of probability 0 has none."""
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
    """Of some columns of a row: their partners, and the log-probabilities of both."""
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
def _divergence_of_tiles(
    logits, other_logits, partner, side, other_side, sums, rows, stride_n, stride_v, other_stride_n,
    other_stride_v, width,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, STUDENT_MIX: tl.constexpr, TEACHER_MIX: tl.constexpr,
    COMMON: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of each tile, sums over its kept tokens: both terms and their slopes, and the teacher's entropy."""
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
    tl.store(to + 4, tl.sum(tl.exp(logq) * -_finite(logq), 0))


@triton.jit
def _sum_tiles(sums, tiles, JOIN: tl.constexpr):
    total = tl.zeros((JOIN,), sums.dtype.element_ty)
    for start in range(0, tiles, JOIN):
        at = start + tl.arange(0, JOIN)
        total += tl.load(sums + at * 5, mask=at < tiles, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=VARYING)
def _divergence_of_rows(
    side, other_side, sums, value, slopes, rows, tiles,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, STUDENT_MIX: tl.constexpr, TEACHER_MIX: tl.constexpr,
    STUDENT_WEIGHT: tl.constexpr, TEACHER_WEIGHT: tl.constexpr, ABOVE: tl.constexpr,
    BUCKET: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """Of each row the divergence, and for its gradient: the weight of the second term (0), the slope by all events
    together (1), by the stop event (2), by what is left (3)."""
    n = tl.program_id(0).to(tl.int64)
    row = sums + n * tiles * 5
    first, first_slope = _sum_tiles(row, tiles, JOIN), _sum_tiles(row + 1, tiles, JOIN)
    second, second_slope = _sum_tiles(row + 2, tiles, JOIN), _sum_tiles(row + 3, tiles, JOIN)
    entropy = _sum_tiles(row + 4, tiles, JOIN)

    logq = tl.load(other_side + 2 * rows + n).to(value.dtype.element_ty)
    a, a_slope, b, b_slope = _terms(
        tl.load(side + 2 * rows + n), logq, STUDENT, TEACHER, STUDENT_MIX, TEACHER_MIX
    )
    first, second, entropy = first + a, second + b, entropy - tl.exp(logq) * _finite(logq)
    first_slope, second_slope = first_slope + a_slope, second_slope + b_slope
    left, left_slope = a * 0.0, a * 0.0
    if BUCKET:
        logp = tl.load(side + 3 * rows + n)
        logq = tl.load(other_side + 3 * rows + n).to(value.dtype.element_ty)
        c, c_slope, d, d_slope = _terms(logp, logq, STUDENT, TEACHER, STUDENT_MIX, TEACHER_MIX)
        first, second, entropy = first + c, second + d, entropy - tl.exp(logq) * _finite(logq)
        # The leak passes on only a part of what is left.
        part = tl.exp(tl.load(side + 4 * rows + n) - _finite(logp))
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
def _divergence_backward(
    logits, other_logits, grad_logits, partner, side, other_side, slopes, grad_value, rows, stride_n,
    stride_v, other_stride_n, other_stride_v, grad_stride_n, grad_stride_v, width,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, STUDENT_MIX: tl.constexpr, TEACHER_MIX: tl.constexpr,
    COMMON: tl.constexpr, STUDENT_WEIGHT: tl.constexpr, BUCKET: tl.constexpr, LOG_KEPT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
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
    of_stops = tl.exp(tl.where(other == -1, logp - _finite(log_stop), float("-inf")))
    slope += tl.load(slopes + 2 * rows + n) * of_stops
    if BUCKET:
        log_left = tl.load(side + 4 * rows + n)
        of_left = tl.exp(tl.where(other == -2, logp - _finite(log_left), float("-inf")))
        slope += tl.load(slopes + 3 * rows + n) * of_left
        prob = tl.exp(logp - LOG_KEPT)
    else:
        prob = tl.exp(tl.where(other >= -1, logp, float("-inf")))
    grad = tl.load(grad_value + n) * (slope - prob * tl.load(slopes + rows + n))
    to = grad_logits + n * grad_stride_n + at * grad_stride_v
    tl.store(to, grad.to(grad_logits.dtype.element_ty), mask=at < width)
