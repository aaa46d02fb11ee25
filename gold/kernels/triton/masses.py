"""Triton kernels: probabilities of the token sets of a byte plan, and their gradient."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

import triton
import triton.language as tl

from gold.kernels.triton.pairs import VARYING, finite, join_leaves, log, sum_columns, sum_ranges


@triton.jit(do_not_specialize=VARYING)
def masses_of_rows(
    logits, pool, position, target, leaf_top, leaf_total, visit_ptr, visit_skips, stats,
    first_row, stride_n, stride_v, leaves, texts, stop_low, width,
    JOIN: tl.constexpr,
):  # fmt: skip
    """Per row: maximum, log Σ exp(logit − maximum), log-probabilities of target, stops, and ids that are neither text
    nor stop (without the target where the row's first visit skips it)."""
    dtype: tl.constexpr = stats.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    top, total = join_leaves(leaf_top + n * leaves, leaf_total + n * leaves, leaves, 1, JOIN)
    log_total = log(total)

    row = logits + n * stride_n
    aim = tl.load(target + first_row + n)
    picked = tl.load(row + aim * stride_v, mask=aim >= 0, other=0.0).to(dtype)
    visit = tl.load(visit_ptr + first_row + n)
    visited = visit < tl.load(visit_ptr + first_row + n + 1)
    skips = (tl.load(visit_skips + visit, mask=visited, other=0) != 0) & (aim >= 0)
    skip = tl.load(position + aim, mask=skips, other=-1)
    stop_top, stop_total = sum_columns(row, pool, stop_low, width, -1, stride_v, dtype, JOIN)
    rest_top, rest_total = sum_columns(row, pool, texts, stop_low, skip, stride_v, dtype, JOIN)

    tl.store(stats + n * 5, top)
    tl.store(stats + n * 5 + 1, log_total)
    tl.store(stats + n * 5 + 2, tl.where(aim >= 0, picked - top - log_total, 0.0))
    tl.store(stats + n * 5 + 3, stop_top - top + log(stop_total) - log_total)
    tl.store(stats + n * 5 + 4, rest_top - top + log(rest_total) - log_total)


@triton.jit(do_not_specialize=VARYING)
def masses_of_ranges(
    logits, pool, position, trie_low, trie_high, trie_own, trie_first_child, trie_children,
    visit_node, visit_row, visit_starts, visit_skips, mass_ptr, mass_visit, target, leaf_top, leaf_total, stats,
    log_mass, first_row, first_mass, end_mass, stride_n, stride_v, leaves,
    LEAF: tl.constexpr, RANGES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Log-probabilities of ranges of the pool, several masses at a time."""
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
    top, total = sum_ranges(
        row, pool, leaf_top + n * leaves, leaf_total + n * leaves, low, high, skip, is_own == 0, stride_v,
        LEAF, RANGES, STEP,
    )  # fmt: skip
    row_top = tl.load(stats + n * 5, mask=here, other=0.0)
    row_log_total = tl.load(stats + n * 5 + 1, mask=here, other=0.0)
    value = top - row_top + log(total) - row_log_total
    # At the start of a row, ids that are neither text nor stop join the tokens that end there.
    rest = tl.load(stats + n * 5 + 4, mask=here & is_own & starts, other=float("-inf"))
    both = tl.maximum(value, rest)
    at = finite(both)
    value = tl.where(is_own & starts, at + log(tl.exp(value - at) + tl.exp(rest - at)), value)
    value = tl.where(is_stop, tl.load(stats + n * 5 + 3, mask=here & is_stop, other=0.0), value)
    tl.store(log_mass + m - first_mass, value, mask=here)


@triton.jit(do_not_specialize=VARYING)
def total_of_rows(
    log_mass, grad_mass, grad_target, grad_stop, target, stats, visit_ptr, mass_ptr, total,
    first_row, first_mass, JOIN: tl.constexpr,
):  # fmt: skip
    """Per row, the sum of the gradients of all masses of its probabilities."""
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
def masses_backward(
    logits, grad_logits, pool, position, trie_low, trie_high, trie_own, trie_first_child, trie_children,
    visit_ptr, visit_node, visit_starts, visit_skips, mass_ptr, target, log_mass, grad_mass, grad_target,
    grad_stop, stats, total, first_row, first_mass, stride_n, stride_v, grad_stride_n, grad_stride_v,
    texts, stop_low, width, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of the masses: each place of the pool belongs to at most one set of every visit, and gets its
    share."""
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
    of_stops = tl.where((at >= stop_low) & inside, logp - finite(log_stop), float("-inf"))
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
            # The last child that begins at or before a place; a node has at most 256.
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
            grad += g * tl.exp(logp - finite(mass))
    to = grad_logits + n * grad_stride_n + column * grad_stride_v
    tl.store(to, grad.to(grad_logits.dtype.element_ty), mask=inside)
