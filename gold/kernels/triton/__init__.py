"""Triton back end: the functions of ``reference`` on CUDA tensors, or on CPU tensors under Triton's interpreter.

A row is as wide as a vocabulary, so no program holds a whole row: rows are read in tiles, each tile yields a pair
(maximum, Σ exp(x − maximum)), and pairs are joined. All arithmetic is in float32, or in float64 for float64 logits; no
result depends on the order in which programs run.

Kernels are bound by memory traffic: a row takes a few operations per byte. Sums over column sets read a row once, and
the columns at range edges again; divergences read both rows twice, since an event is weighted by its probability,
which depends on the whole row; every gradient is one read and one write. An order of columns is a separate index
array: columns already in that order are read contiguously, others cost a memory sector each.
"""

# mypy: allow-untyped-calls

import math
from typing import Any

import torch
import triton
from torch import Tensor

from gold.kernels.gradient import Backward, Results, with_backward
from gold.kernels.layout import ByteLayout, Columns, KeptEvents, Tokens
from gold.kernels.reference import SMOOTHING, MixedKL, Unshared, hybrid_of, widened
from gold.kernels.triton import divergences, launch, masses, statistics
from gold.kernels.triton.sorted import sorted_l1 as sorted_l1


def byte_masses(
    logits_NV: Tensor, layout: ByteLayout, first_row: int, *, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.byte_masses``."""
    rows, width = logits_NV.shape
    trie, visits, target = layout.trie.on(layout.device, width), layout.device_visits, layout.target
    low, high = layout.mass_range(first_row, rows)
    order, nodes = (
        (trie.pool, trie.position),
        (trie.low, trie.high, trie.own, trie.first_child, trie.children),
    )

    def compute(logits: Tensor) -> tuple[Results, Backward]:
        log_mass = logits.new_empty(high - low, dtype=launch.arithmetic(logits))
        stats = logits.new_empty((rows, 5), dtype=log_mass.dtype)
        leaf_top, leaf_total = launch.leaves(logits, trie.pool, launch.LEAF)
        launch.run(
            masses.masses_of_rows, rows,
            logits, *order, target, leaf_top, leaf_total, visits.ptr, visits.skips, stats, first_row,
            *logits.stride(), leaf_top.shape[1], trie.texts, trie.stop_low, width, JOIN=launch.JOIN,
        )  # fmt: skip
        launch.run(
            masses.masses_of_ranges, triton.cdiv(high - low, launch.RANGES),
            logits, *order, *nodes, visits.node, visits.row, visits.starts, visits.skips, visits.mass_ptr,
            visits.of_mass, target, leaf_top, leaf_total, stats, log_mass, first_row, low, high,
            *logits.stride(), leaf_top.shape[1], LEAF=launch.LEAF, RANGES=launch.RANGES, STEP=launch.STEP,
        )  # fmt: skip
        mass = log_mass.detach()

        def backward(logits: Tensor, grad_logits: Tensor, *grads: Tensor) -> None:
            total = torch.empty_like(grads[1])
            launch.run(
                masses.total_of_rows, rows,
                mass, *grads, target, stats, visits.ptr, visits.mass_ptr, total, first_row, low, JOIN=launch.JOIN,
            )  # fmt: skip
            launch.run(
                masses.masses_backward, rows * triton.cdiv(width, launch.BACK_TILE),
                logits, grad_logits, *order, *nodes, visits.ptr, visits.node, visits.starts, visits.skips,
                visits.mass_ptr, target, mass, *grads, stats, total, first_row, low, *logits.stride(),
                *grad_logits.stride(), trie.texts, trie.stop_low, width, TILE=launch.BACK_TILE,
            )  # fmt: skip

        return (log_mass, stats[:, 2].clone(), stats[:, 3].clone()), backward

    result: tuple[Tensor, Tensor, Tensor] = with_backward(logits_NV, compute, overwrite)
    return result


def chunk_sums(logp_N: Tensor, chunk_N: Tensor, chunks: int) -> Tensor:
    """See ``reference.chunk_sums``: every chunk is summed in token order."""
    chunk_N, order = torch.sort(chunk_N.long(), stable=True)
    edges = torch.searchsorted(chunk_N, torch.arange(-1, chunks + 1, device=chunk_N.device))
    sums = torch.segment_reduce(logp_N.index_select(0, order), "sum", lengths=edges.diff(), unsafe=True)
    return sums[1:]


def row_statistics(
    logits_NV: Tensor, target_N: Tensor, stops: Tensor, *, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.row_statistics``."""
    rows, width = logits_NV.shape

    def compute(logits: Tensor) -> tuple[Results, Backward]:
        stats = logits.new_empty((5, rows), dtype=launch.arithmetic(logits))
        moment = logits.new_empty((rows, triton.cdiv(width, launch.TILE)), dtype=stats.dtype)
        leaf_top, leaf_total = launch.leaves(logits, None, launch.TILE, moment)
        launch.run(
            statistics.statistics_of_rows, rows,
            logits, target_N, stops, leaf_top, leaf_total, moment, stats, rows, *logits.stride(),
            stops.numel(), leaf_top.shape[1], JOIN=launch.JOIN,
        )  # fmt: skip

        def backward(logits: Tensor, grad_logits: Tensor, *grads: Tensor) -> None:
            launch.run(
                statistics.statistics_backward, rows * triton.cdiv(width, launch.BACK_TILE),
                logits, grad_logits, target_N, stops, stats, *grads, rows, *logits.stride(),
                *grad_logits.stride(), stops.numel(), width, TILE=launch.BACK_TILE,
            )  # fmt: skip

        return (stats[0] + stats[1], *(stats[i].clone() for i in (2, 3, 4))), backward

    result: tuple[Tensor, Tensor, Tensor, Tensor] = with_backward(logits_NV, compute, overwrite, 1)
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
    """See ``reference.row_divergence``. Columns are processed in the order of ``logits_NV``; the teacher's reads are
    contiguous where its events are in the same order."""
    (rows, width), others = logits_NV.shape, logits_NW.detach()
    partner = _partners(kept_V, kept_W.ids)
    smoothing = smoothing if unshared == "bucket" else 0.0
    form: dict[str, Any] = {
        "STUDENT": divergence.student != 0,
        "TEACHER": divergence.teacher != 0,
        "STUDENT_MIX": divergence.student_mix,
        "TEACHER_MIX": divergence.teacher_mix,
    }
    common, bucket = {"COMMON": only_common}, {"BUCKET": unshared == "bucket"}
    kept = {**common, **bucket, "SMOOTHING": smoothing, "LOG_KEPT": math.log1p(-smoothing)}

    def compute(logits: Tensor) -> tuple[Results, Backward]:
        sides = (
            _side((logits, kept_V, partner), (others, kept_W), kept),
            _side((others, kept_W, _partners(kept_W, kept_V.ids)), (logits, kept_V), kept),
        )
        tiles = triton.cdiv(width, launch.TILE)
        sums = logits.new_empty((rows, tiles, 5), dtype=launch.arithmetic(logits))
        value, slopes = sums.new_empty(rows), sums.new_empty((4, rows))
        launch.run(
            divergences.divergence_of_tiles, rows * tiles,
            logits, others, partner, *sides, sums, rows, *logits.stride(), *others.stride(), width,
            **form, **common, TILE=launch.TILE,
        )  # fmt: skip
        launch.run(
            divergences.divergence_of_rows, rows,
            *sides, sums, value, slopes, rows, tiles, **form, STUDENT_WEIGHT=divergence.student,
            TEACHER_WEIGHT=divergence.teacher, ABOVE=divergence.above_nats, **bucket, JOIN=launch.JOIN,
        )  # fmt: skip

        def backward(logits: Tensor, grad_logits: Tensor, grad_value: Tensor) -> None:
            launch.run(
                divergences.divergence_backward, rows * triton.cdiv(width, launch.BACK_TILE),
                logits, others, grad_logits, partner, *sides, slopes, grad_value, rows, *logits.stride(),
                *others.stride(), *grad_logits.stride(), width, **form, **common, **bucket,
                STUDENT_WEIGHT=divergence.student, LOG_KEPT=kept["LOG_KEPT"], TILE=launch.BACK_TILE,
            )  # fmt: skip

        return (value, sides[0][5].clone()), backward

    result: tuple[Tensor, Tensor] = with_backward(logits_NV, compute, overwrite, 1)
    return result


def _side(
    mine: tuple[Tensor, KeptEvents, Tensor], theirs: tuple[Tensor, KeptEvents], kept: dict[str, Any]
) -> Tensor:
    """The statistics of ``divergences.side_of_rows`` of one side: [6, rows]."""
    (logits, events, partner), (others, other_events) = mine, theirs
    rows, width = logits.shape
    tiles = triton.cdiv(width, launch.TILE)
    leaves = logits.new_empty((rows, tiles, 4), dtype=launch.arithmetic(logits))
    side = leaves.new_empty((6, rows))
    launch.run(
        divergences.event_leaves, rows * tiles,
        logits, others, partner, leaves, *logits.stride(), *others.stride(), width,
        COMMON=kept["COMMON"], TILE=launch.TILE,
    )  # fmt: skip
    launch.run(
        divergences.side_of_rows, rows,
        logits, events.stops, others, other_events.stops, leaves, side, rows, *logits.stride(),
        *others.stride(), events.stops.numel(), other_events.stops.numel(), tiles, **kept, JOIN=launch.JOIN,
    )  # fmt: skip
    return side


def _partners(kept: KeptEvents, others: Tensor) -> Tensor:
    """For each column the other side's column of the same token; −1 for stops, −2 for left columns."""
    codes = torch.cat((others, torch.arange(-1, -3, -1, device=others.device))).int()
    return codes[kept.event]


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
    logits_NV = widened(logits_NV)  # gradients of several kernels are summed here and rounded once
    norm_N, step_N, _, _ = row_statistics(logits_NV, target_N, target_N[:0])
    value = logits_NV[tokens.row, tokens.id].to(norm_N) - norm_N[tokens.row]
    moved = torch.nonzero(tokens.moved)[:, 0]
    rows = logits_NV
    if moved.numel():
        rows = rows.index_put((tokens.row[moved], tokens.id[moved]), rows.new_tensor(-torch.inf))
    if whole_P.numel() < rows.shape[0]:
        rows, norm_N = (x.index_select(0, whole_P) for x in (rows, norm_N))
    return column_logsumexp(rows, columns) - norm_N[:, None], value, step_N


def segment_logsumexp(value: Tensor, segment: Tensor, segments: int) -> Tensor:
    """See ``reference.segment_logsumexp``."""
    return column_logsumexp(value[None], Columns(segment, segments))[0]


def column_logsumexp(logits_NV: Tensor, columns: Columns) -> Tensor:
    """See ``reference.column_logsumexp``."""
    (rows, width), events = logits_NV.shape, columns.events

    def compute(logits: Tensor) -> tuple[Results, Backward]:
        out = logits.new_empty((rows, events), dtype=launch.arithmetic(logits))
        order = columns.order.int()
        leaf_top, leaf_total = launch.leaves(logits, order, launch.LEAF)
        launch.run(
            statistics.columns_of_rows, rows * triton.cdiv(events, launch.RANGES),
            logits, order, columns.starts, leaf_top, leaf_total, out, *logits.stride(), leaf_top.shape[1], events,
            LEAF=launch.LEAF, RANGES=launch.RANGES, STEP=launch.STEP,
        )  # fmt: skip
        sums = out.detach()

        def backward(logits: Tensor, grad_logits: Tensor, grad: Tensor) -> None:
            launch.run(
                statistics.columns_backward, rows * triton.cdiv(width, launch.BACK_TILE),
                logits, grad_logits, columns.small, sums, grad, *logits.stride(), *grad_logits.stride(),
                width, events, TILE=launch.BACK_TILE,
            )  # fmt: skip

        return (out,), backward

    result: Tensor = with_backward(logits_NV, compute, False)
    return result
