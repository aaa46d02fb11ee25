"""numba loops over rows: sums of probabilities over the token sets of a byte plan, and their gradient.

``kernel(lo, hi, …)`` computes the rows lo … hi − 1 without the GIL. bfloat16 logits are 16-bit words, unpacked one row
at a time. A row is permuted once, so that tokens with a common prefix are a range.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs

import math

import numpy as np

from gold.kernels.cpu.simd import (
    compiled,
    exp_into,
    exps,
    log_sum,
    put_row,
    range_sum,
    row_max,
    row_of,
)

TINY = 1e-25
"""Sums of exponentials below this, relative to the row's maximum, are recomputed relative to their own maximum."""


@compiled
def gather(x, index, out):
    """``out[i] = x[index[i]]``."""
    for i in range(index.size):
        out[i] = x[index[i]]


@compiled
def _set_log_mass(z, e, g, pool, low, high, skip, top, total):
    """Log-probability of the tokens at places low … high − 1 of the pool except ``skip``, relative to the row's
    ``total``."""
    mass = range_sum(g, low, high)
    if low <= skip < high:
        # Not the difference, which could be pure rounding error.
        mass = range_sum(g, low, skip) + range_sum(g, skip + 1, high)
    if mass > TINY:
        return math.log(mass) - math.log(total)
    return log_sum(z, pool, low, high, skip) - top - math.log(total)


@compiled
def masses_forward(
    row_lo, row_hi, logits, like, pool, rank, edges, trie, visits, target, first_row, log_mass, row_stats
):
    """``reference.byte_masses``; ``row_stats`` gets each row's log-sum-exp, and its log-probabilities of target and
    stop. ``trie`` and ``visits`` are the arrays of ``ByteTrie`` and ``Visits``, in the order in which they are
    unpacked."""
    low, high, own, first_child, children = trie
    ptr, visit_node, starts, skips, mass_ptr = visits
    width = logits.shape[1]
    texts, events = edges[0], edges[1]
    base = mass_ptr[ptr[first_row]]
    room = np.empty((3, width), like.dtype)
    scratch, e, g = room[0], room[1], room[2]
    for n in range(row_lo, row_hi):
        z = row_of(logits, n, scratch)
        top = row_max(z)
        total = exp_into(z, top, e)
        gather(e, pool, g)
        row_stats[n, 0] = top + math.log(total)
        aim = target[first_row + n]
        at = rank[aim] if aim >= 0 else -1
        row_stats[n, 1] = float(z[aim] - top) - math.log(total) if aim >= 0 else 0.0
        row_stats[n, 2] = _set_log_mass(z, e, g, pool, events, width, -1, top, total)
        for visit in range(ptr[first_row + n], ptr[first_row + n + 1]):
            node = visit_node[visit]
            m = mass_ptr[visit] - base
            skip = at if skips[visit] else -1
            log_mass[m] = _set_log_mass(z, e, g, pool, low[node], low[node] + own[node], skip, top, total)
            if starts[visit]:
                other = _set_log_mass(z, e, g, pool, texts, events, skip, top, total)
                above, below = max(log_mass[m], other), min(log_mass[m], other)
                if below > -math.inf:
                    above += math.log1p(math.exp(below - above))
                log_mass[m] = above
                log_mass[m + 1 + children[node]] = row_stats[n, 2]
            for c in range(children[node]):
                child = first_child[node] + c
                log_mass[m + 1 + c] = _set_log_mass(z, e, g, pool, low[child], high[child], -1, top, total)


@compiled
def _add_share(coefficient, low, high, skip, share):
    single = coefficient.dtype.type(share)
    kept = coefficient[skip] if low <= skip < high else single
    for i in range(low, high):
        coefficient[i] += single
    if low <= skip < high:
        coefficient[skip] = kept


@compiled
def add_set(grad, z, pool, low, high, skip, scale, log_total):
    """Adds scale · exp(z − log_total) to the gradient of every token of a set: its softmax within the set."""
    for i in range(low, high):
        if i != skip:
            grad[pool[i]] += scale * math.exp(z[pool[i]] - log_total)


@compiled
def _shares(coefficient, at, edges, trie, visits, row, base, log_mass, grad_mass, total, stop_share):
    """Adds to each place's coefficient the factor of its probability in the gradient of the row's masses, except small
    ones.

    Returns the sum of all gradients, that of the stop event, and whether any mass is small.
    """
    low, high, own, first_child, children = trie
    ptr, visit_node, starts, skips, mass_ptr = visits
    log_tiny, small = math.log(TINY), False
    for visit in range(ptr[row], ptr[row + 1]):
        node = visit_node[visit]
        m = mass_ptr[visit] - base
        skip = at if skips[visit] else -1
        if log_mass[m] > -math.inf and grad_mass[m] != 0.0:
            total += grad_mass[m]
            if log_mass[m] > log_tiny:
                share = grad_mass[m] * math.exp(-log_mass[m])
                _add_share(coefficient, low[node], low[node] + own[node], skip, share)
                if starts[visit]:
                    _add_share(coefficient, edges[0], edges[1], skip, share)
            else:
                small = True
        if starts[visit]:
            stop_share += grad_mass[m + 1 + children[node]]
        for c in range(m + 1, m + 1 + children[node]):
            g = grad_mass[c]
            if log_mass[c] > -math.inf and g != 0.0:
                child = first_child[node] + c - m - 1
                total += g
                if log_mass[c] > log_tiny:
                    _add_share(coefficient, low[child], high[child], -1, g * math.exp(-log_mass[c]))
                else:
                    small = True
    return total, stop_share, small


@compiled
def _add_small(e, z, pool, at, edges, trie, visits, row, base, log_mass, grad_mass, lse):
    """Adds the gradient of the row's small masses."""
    low, high, own, first_child, children = trie
    ptr, visit_node, starts, skips, mass_ptr = visits
    log_tiny = math.log(TINY)
    for visit in range(ptr[row], ptr[row + 1]):
        node = visit_node[visit]
        m = mass_ptr[visit] - base
        skip = at if skips[visit] else -1
        if -math.inf < log_mass[m] <= log_tiny:
            shift = log_mass[m] + lse
            add_set(e, z, pool, low[node], low[node] + own[node], skip, grad_mass[m], shift)
            if starts[visit]:
                add_set(e, z, pool, edges[0], edges[1], skip, grad_mass[m], shift)
        for c in range(m + 1, m + 1 + children[node]):
            if -math.inf < log_mass[c] <= log_tiny:
                child = first_child[node] + c - m - 1
                add_set(e, z, pool, low[child], high[child], -1, grad_mass[c], log_mass[c] + lse)


@compiled
def masses_backward(
    row_lo, row_hi, logits, like, pool, rank, edges, trie, visits, target, first_row, log_mass, row_stats,
    grad_mass, grad_target, grad_stop, grad_logits,
):  # fmt: skip
    """The gradient of ``masses_forward`` with respect to the logits, from those of its three results."""
    width = logits.shape[1]
    base = visits[4][visits[0][first_row]]
    log_tiny = math.log(TINY)
    room = np.empty((3, width), like.dtype)
    scratch, e, coefficient = room[0], room[1], room[2]
    for n in range(row_lo, row_hi):
        z = row_of(logits, n, scratch)
        lse, log_stop = row_stats[n, 0], row_stats[n, 2]
        exps(z, z.dtype.type(lse), e)
        aim = target[first_row + n]
        at = rank[aim] if aim >= 0 else -1
        coefficient[:] = 0.0
        row = first_row + n
        total, stop_share, small = _shares(
            coefficient, at, edges, trie, visits, row, base, log_mass, grad_mass,
            grad_target[n] if aim >= 0 else 0.0, grad_stop[n],
        )  # fmt: skip
        if log_stop > -math.inf:
            total += stop_share
            if log_stop > log_tiny:
                _add_share(coefficient, edges[1], width, -1, stop_share * math.exp(-log_stop))
            else:
                small = True
        mean = like.dtype.type(total)
        for v in range(width):
            e[v] *= coefficient[rank[v]] - mean
        if aim >= 0:
            e[aim] += grad_target[n]
        if small:
            _add_small(e, z, pool, at, edges, trie, visits, row, base, log_mass, grad_mass, lse)
            if -math.inf < log_stop <= log_tiny:
                add_set(e, z, pool, edges[1], width, -1, stop_share, log_stop + lse)
        put_row(grad_logits, n, e)
