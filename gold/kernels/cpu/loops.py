"""numba loops over rows: ``kernel(lo, hi, …)`` does the rows lo … hi − 1, without Python's lock.

A loop without a call and without a choice in it becomes vector instructions, but not one that adds up: a sum of more
than a few numbers is made by ``lanes``, single within a block and double across. Where logits are bfloat16, words of 16
bits stand for them, and a row is unpacked at a time.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs

import math

import numpy as np

from gold.kernels.cpu.simd import (
    BLOCK,
    as_is,
    compiled,
    excess,
    exp,
    exp_into,
    exp_moment,
    exps,
    fused,
    inlined,
    lane_dot,
    lane_sum,
    log,
    log_sum,
    put_row,
    range_sum,
    row_max,
    row_of,
    word_of,
)

TINY = 1e-25
"""Sums of exponentials below this, relative to the row's largest, are made again against their own largest."""


# Bytes. A row is permuted once, so that every set of tokens that begin alike is a range.


@compiled
def _gather(x, index, out):
    for i in range(index.size):
        out[i] = x[index[i]]


@compiled
def _set_log_mass(z, e, g, pool, low, high, skip, top, total):
    """Log-probability of the tokens at places low … high − 1 of the pool but ``skip``, of the row's ``total``."""
    mass = range_sum(g, low, high)
    if low <= skip < high:
        # Not the difference, which could be nothing but rounding.
        mass = range_sum(g, low, skip) + range_sum(g, skip + 1, high)
    if mass > TINY:
        return math.log(mass) - math.log(total)
    return log_sum(z, pool, low, high, skip) - top - math.log(total)


@compiled
def masses_forward(
    row_lo, row_hi, logits, like, pool, rank, edges, low, high, own, first_child, children,
    visit_ptr, visit_node, visit_starts, visit_skips, mass_ptr, target, first_row, log_mass, row_stats,
):  # fmt: skip
    """``reference.byte_masses``; ``row_stats`` gets each row's log-sum-exp, and what it says of target and stop."""
    width = logits.shape[1]
    texts, events = edges[0], edges[1]
    base = mass_ptr[visit_ptr[first_row]]
    room = np.empty((3, width), like.dtype)
    scratch, e, g = room[0], room[1], room[2]
    for n in range(row_lo, row_hi):
        z = row_of(logits, n, scratch)
        top = row_max(z)
        total = exp_into(z, top, e)
        _gather(e, pool, g)
        row_stats[n, 0] = top + math.log(total)
        aim = target[first_row + n]
        at = rank[aim] if aim >= 0 else -1
        row_stats[n, 1] = float(z[aim] - top) - math.log(total) if aim >= 0 else 0.0
        row_stats[n, 2] = _set_log_mass(z, e, g, pool, events, width, -1, top, total)
        for visit in range(visit_ptr[first_row + n], visit_ptr[first_row + n + 1]):
            node = visit_node[visit]
            m = mass_ptr[visit] - base
            skip = at if visit_skips[visit] else -1
            log_mass[m] = _set_log_mass(z, e, g, pool, low[node], low[node] + own[node], skip, top, total)
            if visit_starts[visit]:
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
def _add_set(grad, z, pool, low, high, skip, scale, log_total):
    """Adds scale · exp(z − log_total) to the gradient of every token of a set: its softmax within the set."""
    for i in range(low, high):
        if i != skip:
            grad[pool[i]] += scale * math.exp(z[pool[i]] - log_total)


@compiled
def masses_backward(
    row_lo, row_hi, logits, like, pool, rank, edges, low, high, own, first_child, children,
    visit_ptr, visit_node, visit_starts, visit_skips, mass_ptr, target, first_row, log_mass, row_stats,
    grad_mass, grad_target, grad_stop, grad_logits,
):  # fmt: skip
    """The gradient of ``masses_forward`` by its three results."""
    width = logits.shape[1]
    texts, events = edges[0], edges[1]
    base = mass_ptr[visit_ptr[first_row]]
    log_tiny = math.log(TINY)
    room = np.empty((3, width), like.dtype)
    scratch, e, coefficient = room[0], room[1], room[2]
    for n in range(row_lo, row_hi):
        z = row_of(logits, n, scratch)
        lse = row_stats[n, 0]
        exps(z, z.dtype.type(lse), e)
        aim = target[first_row + n]
        at = rank[aim] if aim >= 0 else -1
        coefficient[:] = 0.0
        total = grad_target[n] if aim >= 0 else 0.0
        stop_share = grad_stop[n]
        small = False
        for visit in range(visit_ptr[first_row + n], visit_ptr[first_row + n + 1]):
            node = visit_node[visit]
            m = mass_ptr[visit] - base
            skip = at if visit_skips[visit] else -1
            if log_mass[m] > -math.inf and grad_mass[m] != 0.0:
                total += grad_mass[m]
                if log_mass[m] > log_tiny:
                    share = grad_mass[m] * math.exp(-log_mass[m])
                    _add_share(coefficient, low[node], low[node] + own[node], skip, share)
                    if visit_starts[visit]:
                        _add_share(coefficient, texts, events, skip, share)
                else:
                    small = True
            if visit_starts[visit]:
                stop_share += grad_mass[m + 1 + children[node]]
            for c in range(children[node]):
                g = grad_mass[m + 1 + c]
                if log_mass[m + 1 + c] > -math.inf and g != 0.0:
                    child = first_child[node] + c
                    total += g
                    if log_mass[m + 1 + c] > log_tiny:
                        _add_share(
                            coefficient, low[child], high[child], -1, g * math.exp(-log_mass[m + 1 + c])
                        )
                    else:
                        small = True
        if row_stats[n, 2] > -math.inf:
            total += stop_share
            if row_stats[n, 2] > log_tiny:
                _add_share(coefficient, events, width, -1, stop_share * math.exp(-row_stats[n, 2]))
            else:
                small = True
        mean = like.dtype.type(total)
        for v in range(width):
            e[v] *= coefficient[rank[v]] - mean
        if aim >= 0:
            e[aim] += grad_target[n]
        if small:
            for visit in range(visit_ptr[first_row + n], visit_ptr[first_row + n + 1]):
                node = visit_node[visit]
                m = mass_ptr[visit] - base
                skip = at if visit_skips[visit] else -1
                if -math.inf < log_mass[m] <= log_tiny:
                    shift = log_mass[m] + lse
                    _add_set(e, z, pool, low[node], low[node] + own[node], skip, grad_mass[m], shift)
                    if visit_starts[visit]:
                        _add_set(e, z, pool, texts, events, skip, grad_mass[m], shift)
                for c in range(children[node]):
                    if -math.inf < log_mass[m + 1 + c] <= log_tiny:
                        child, shift = first_child[node] + c, log_mass[m + 1 + c] + lse
                        _add_set(e, z, pool, low[child], high[child], -1, grad_mass[m + 1 + c], shift)
            if -math.inf < row_stats[n, 2] <= log_tiny:
                _add_set(e, z, pool, events, width, -1, stop_share, row_stats[n, 2] + lse)
        put_row(grad_logits, n, e)


# Single tokens.


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
    """The gradient of ``statistics_forward`` by all but the entropy."""
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
            _add_set(e, z, stops, 0, stops.size, -1, grad_stop[n], stats[n, 2] + stats[n, 0])
        put_row(grad_logits, n, e)


# Divergences on shared events.


@inlined
def _kl_term(lp, lq, p, q):
    """``p log(p / q) − p + q``, and ``log(q / p)``.

    Summed over all events this is the divergence, since p and q both sum to 1, and each term is small where p and q are
    close: nothing cancels in rows near probability 1. What is 0 in this precision costs q, also where q is 0.
    """
    one, nothing, near_by = as_is(1.0, p), as_is(0.0, p), as_is(0.0625, p)
    d = lq - lp
    d = d if d < as_is(80.0, p) else as_is(80.0, p)
    d = d if lp > -math.inf else nothing
    near = p * excess(d if abs(d) < near_by else nothing, one)
    far = fused(-p, d, q - p)
    value = near if abs(d) < near_by else far
    return (value if p > nothing else q), d


@inlined
def _mixed_term(lp, lq, p, q, share):
    """As ``_kl_term`` with ``m = share · q + (1 − share) · p`` in place of q, and ``m / p`` with its logarithm."""
    one, nothing, near_by = as_is(1.0, p), as_is(0.0, p), as_is(0.0625, p)
    d = lq - lp
    d = d if d < as_is(80.0, p) else as_is(80.0, p)
    d = d if lp > -math.inf else nothing
    ratio = fused(share, exp(d), one - share)
    log_ratio = log(ratio)
    near = p * excess(d if abs(d) < near_by else nothing, share)
    far = fused(-p, log_ratio, share * (q - p))
    value = near if abs(d) < near_by else far
    return (value if p > nothing else share * q), ratio, log_ratio


@compiled
def _row_side(z, e, ids, stops, left, out):
    """Log-probabilities of the kept events and the stop event into ``out``, all masses relative to the row's total."""
    top = row_max(z)
    total = exp_into(z, top, e)
    shift = z.dtype.type(math.log(total))
    for k in range(ids.size):
        out[k] = (z[ids[k]] - top) - shift
    out[ids.size] = log_sum(z, stops, 0, stops.size, -1) - top - math.log(total)
    return top, total, _sum_at(e, left) / total


@compiled
def _sum_at(x, index):
    """``Σ x[index[i]]``, in four lanes."""
    whole = index.size - index.size % 4
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    for i in range(0, whole, 4):
        a += x[index[i]]
        b += x[index[i + 1]]
        c += x[index[i + 2]]
        d += x[index[i + 3]]
    for i in range(whole, index.size):
        a += x[index[i]]
    return (a + b) + (c + d)


@compiled
def _exp_all(x, out):
    return exp_into(x, x.dtype.type(0.0), out)


@compiled
def _entropy(lq, q, room):
    nothing = q.dtype.type(0.0)
    for k in range(lq.size):
        room[k] = q[k] * lq[k] if lq[k] > -math.inf else nothing
    return -range_sum(room, 0, lq.size)


# One loop each, without a choice in it: what is left of a choice keeps a loop out of lanes. ``out`` has the terms
# behind the slopes, in one array: the compiler asks at run time whether two arrays overlap, but not of more than eight
# pairs.

TERMS = 1024


@compiled
def _student_kl(lp, lq, p, q, weight, out):
    nothing = p.dtype.type(0.0)
    for k in range(lp.size):
        value, log_ratio = _kl_term(lp[k], lq[k], p[k], q[k])
        out[TERMS + k] = value
        out[k] = weight * (p[k] * -log_ratio) if p[k] > nothing else nothing
    return weight * lane_sum(out, TERMS, TERMS + lp.size)


@compiled
def _student_mixed(lp, lq, p, q, weight, share, out):
    nothing, one = p.dtype.type(0.0), p.dtype.type(1.0)
    for k in range(lp.size):
        value, ratio, log_ratio = _mixed_term(lp[k], lq[k], p[k], q[k], share)
        out[TERMS + k] = value
        slope = -log_ratio - (one - share) * (one / ratio - one)
        out[k] = weight * (p[k] * slope) if p[k] > nothing else nothing
    return weight * lane_sum(out, TERMS, TERMS + lp.size)


@compiled
def _teacher_kl(lp, lq, p, q, weight, out):
    for k in range(lp.size):
        value, _ = _kl_term(lq[k], lp[k], q[k], p[k])
        out[TERMS + k] = value
        out[k] += weight * (p[k] - q[k])
    return weight * lane_sum(out, TERMS, TERMS + lp.size)


@compiled
def _teacher_mixed(lp, lq, p, q, weight, kept, out):
    nothing = p.dtype.type(0.0)
    for k in range(lp.size):
        value, ratio, _ = _mixed_term(lq[k], lp[k], q[k], p[k], kept)
        out[TERMS + k] = value
        # q · p / n, with the ratio n / q.
        across = p[k] / ratio
        across = across if lq[k] > -math.inf else nothing
        out[k] += weight * kept * (p[k] - across)
    return weight * lane_sum(out, TERMS, TERMS + lp.size)


@compiled
def _terms(lp, lq, p, q, student, student_mix, teacher, teacher_mix, out):
    """The divergence of some events; ``out`` gets its derivative with respect to p, times p, up to a multiple of p."""
    one, nothing = p.dtype.type(1.0), p.dtype.type(0.0)
    total = 0.0
    room = np.empty(2 * TERMS, p.dtype)
    for first in range(0, lp.size, TERMS):
        some = slice(first, min(first + TERMS, lp.size))
        given = lp[some], lq[some], p[some], q[some]
        room[:] = nothing
        if student != nothing and student_mix == one:
            total += _student_kl(*given, student, room)
        elif student != nothing:
            total += _student_mixed(*given, student, student_mix, room)
        if teacher != nothing and teacher_mix == nothing:
            total += _teacher_kl(*given, teacher, room)
        elif teacher != nothing:
            total += _teacher_mixed(*given, teacher, one - teacher_mix, room)
        slope = out[some]
        for k in range(slope.size):
            slope[k] = room[k]
    return total


@compiled
def divergence(
    row_lo, row_hi, logits, logits_T, like, ids_V, stops_V, left_V, ids_W, stops_W, left_W,
    student, student_mix, teacher, teacher_mix, above, bucket, smoothing, only_common, results, grad,
):  # fmt: skip
    """``reference.row_divergence``: value and mass into ``results``, and the value's gradient, if that has rows."""
    real = like.dtype.type
    events = ids_V.size + 1
    size = events + 1 if bucket else events
    scratch, e = np.empty(logits.shape[1], like.dtype), np.empty(logits.shape[1], like.dtype)
    scratch_T, e_T = np.empty(logits_T.shape[1], like.dtype), np.empty(logits_T.shape[1], like.dtype)
    room = np.empty((5, size), like.dtype)
    lp, lq, p, q, out = room[0], room[1], room[2], room[3], room[4]
    for n in range(row_lo, row_hi):
        z, z_T = row_of(logits, n, scratch), row_of(logits_T, n, scratch_T)
        top, total, rest = _row_side(z, e, ids_V, stops_V, left_V, lp)
        _, total_T, rest_T = _row_side(z_T, e_T, ids_W, stops_W, left_W, lq)
        if only_common:
            rest, rest_T = _join_rest(lp[:events], lq[:events], rest, rest_T)
        results[n, 1] = _exp_all(lp[:events], p[:events])
        if math.isnan(total + total_T):
            results[n] = math.nan
            if grad.shape[0]:
                e[:] = math.nan
                put_row(grad, n, e)
            continue
        if bucket:
            shift = real(math.log1p(-smoothing))
            for k in range(events):
                lp[k] += shift
                lq[k] += shift
            lp[events] = (
                math.log((1.0 - smoothing) * rest + smoothing) if rest + smoothing > 0.0 else -math.inf
            )
            lq[events] = (
                math.log((1.0 - smoothing) * rest_T + smoothing) if rest_T + smoothing > 0.0 else -math.inf
            )
        else:
            # Against their own largest: all that is kept may be next to nothing of the row.
            top, top_T = row_max(lp), row_max(lq)
            shift = top + real(math.log(exp_into(lp, top, p)))
            shift_T = top_T + real(math.log(exp_into(lq, top_T, q)))
            for k in range(events):
                lp[k] -= shift
                lq[k] -= shift_T
        _exp_all(lp, p)
        _exp_all(lq, q)
        weight = teacher if above == -math.inf or _entropy(lq, q, out) > above else 0.0
        results[n, 0] = _terms(
            lp, lq, p, q, real(student), real(student_mix), real(weight), real(teacher_mix), out
        )
        if grad.shape[0] == 0:
            continue
        if bucket:
            slope = out[events] / p[events] * real(1.0 - smoothing) if p[events] > 0.0 else real(0.0)
            mean = range_sum(out, 0, events) + rest * slope
            over, rest_slope = real(1.0 / total), slope - real(mean)
            scale = over * rest_slope
            single = real(mean) / real(1.0 - smoothing)
        else:
            mean = range_sum(out, 0, events)
            scale, single = real(0.0), real(mean)
        stop_log = log_sum(z, stops_V, 0, stops_V.size, -1)
        # Rows may share memory with their gradients: what is read of them is read before.
        for i in range(stops_V.size):
            if stop_log > -math.inf:
                part = math.exp(z[stops_V[i]] - stop_log)
                e[stops_V[i]] = part
        for v in range(left_V.size):
            e[left_V[v]] *= scale
        for k in range(ids_V.size):
            told = not only_common or lp[k] > -math.inf
            e[ids_V[k]] = out[k] - p[k] * single if told else e[ids_V[k]] * scale
        of_stops = out[events - 1] - p[events - 1] * single
        if only_common and lp[events - 1] == -math.inf:
            of_stops = real(math.exp(stop_log - top)) * scale
        for i in range(stops_V.size):
            if stop_log > -math.inf:
                e[stops_V[i]] *= of_stops
            else:
                e[stops_V[i]] = 0.0
        put_row(grad, n, e)


@compiled
def _join_rest(lp, lq, rest, rest_T):
    """Events that one side gives nothing, joined to the rest of both."""
    for k in range(lp.size):
        if lp[k] == -math.inf or lq[k] == -math.inf:
            rest += math.exp(lp[k])
            rest_T += math.exp(lq[k])
            lp[k] = lq[k] = -math.inf
    return rest, rest_T


@compiled
def hybrid(
    row_lo, row_hi, logits, logits_T, like, before, before_T, ids_V, stops_V, left_V, ids_W, stops_W, left_W,
    student, student_mix, teacher, teacher_mix, above, share, results, grad,
):  # fmt: skip
    """``reference.hybrid_distance``: its three results and the slope by ``before``, and the gradient by the logits."""
    real = like.dtype.type
    events = ids_V.size + 1
    scratch, e = np.empty(logits.shape[1], like.dtype), np.empty(logits.shape[1], like.dtype)
    scratch_T, e_T = np.empty(logits_T.shape[1], like.dtype), np.empty(logits_T.shape[1], like.dtype)
    room = np.empty((5, events), like.dtype)
    lp, lq, p, q, out = room[0], room[1], room[2], room[3], room[4]
    others, signs = np.empty(left_V.size, like.dtype), np.empty(left_V.size, like.dtype)
    others_T, of_stop = np.empty(left_W.size, like.dtype), np.empty(stops_V.size, like.dtype)
    ranks = _ranks(others, others_T)
    # Terms are as of distributions that sum to one; what these sums are less than one is taken back.
    excess_share = real(student * student_mix - teacher * (1.0 - teacher_mix))
    for n in range(row_lo, row_hi):
        z, z_T = row_of(logits, n, scratch), row_of(logits_T, n, scratch_T)
        _, total, _ = _row_side(z, e, ids_V, stops_V, left_V[:0], lp)
        _, total_T, _ = _row_side(z_T, e_T, ids_W, stops_W, left_W[:0], lq)
        if math.isnan(total + total_T):
            results[n] = math.nan
            if grad.shape[0]:
                e[:] = math.nan
                put_row(grad, n, e)
            continue
        shift, shift_T = real(before[n]), real(before_T[n])
        for k in range(events):
            lp[k] += shift
            lq[k] += shift_T
        kept, kept_T = _exp_all(lp, p), _exp_all(lq, q)
        over, over_T = real(math.exp(before[n]) / total), real(math.exp(before_T[n]) / total_T)
        _gather(e, left_V, others)
        _gather(e_T, left_W, others_T)
        for v in range(others.size):
            others[v] *= over
        for v in range(others_T.size):
            others_T[v] *= over_T
        weight = teacher if above == -math.inf or _entropy(lq, q, out) > above else 0.0
        taken_back = excess_share if weight == teacher else real(student * student_mix)
        matched = _terms(lp, lq, p, q, real(student), real(student_mix), real(weight), real(teacher_mix), out)
        matched -= taken_back * (kept_T - kept)
        unmatched = _sorted_row(others, others_T, ranks, signs)
        results[n, 0] = share * matched + (1.0 - share) * unmatched
        results[n, 1], results[n, 2] = matched, unmatched
        if grad.shape[0] == 0:
            continue
        of_matched, of_other = real(share), real(1.0 - share)
        mean = 0.0
        for k in range(events):
            out[k] = of_matched * (out[k] + taken_back * p[k])
        mean += range_sum(out, 0, events)
        for v in range(others.size):
            signs[v] *= of_other * others[v]
        mean += range_sum(signs, 0, signs.size)
        results[n, 3] = mean
        stop_log = log_sum(z, stops_V, 0, stops_V.size, -1)
        for i in range(stops_V.size):
            if stop_log > -math.inf:
                of_stop[i] = math.exp(z[stops_V[i]] - stop_log)
        scale = real(mean / total)
        for v in range(e.size):
            e[v] *= -scale
        for k in range(ids_V.size):
            e[ids_V[k]] += out[k]
        for v in range(left_V.size):
            e[left_V[v]] += signs[v]
        for i in range(stops_V.size):
            if stop_log > -math.inf:
                e[stops_V[i]] += out[events - 1] * of_stop[i]
        put_row(grad, n, e)


# Sorted distances.

SHIFT = 18
INTERVALS = 0x80000000 >> SHIFT
"""Intervals of numbers that are not negative: those with the same exponent and first five digits."""


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
    """The entries in flagged intervals, and where they are."""
    found = 0
    for v in range(x.size):
        if flags[_interval(x[v])]:
            values[found], places[found] = x[v], v
            found += 1
    return found


@compiled
def _signed_sum(x, sign, out):
    """``Σ sign[interval of x] · x`` and the signs themselves."""
    total = 0.0
    for v in range(x.size):
        out[v] = sign[_interval(x[v])]
    for first in range(0, x.size, BLOCK):
        total += lane_dot(x, out, first, min(first + BLOCK, x.size))
    return total


@compiled
def _ranks(p, q):
    """Room for ``_sorted_row``: counts, signs, flags and ranks of intervals, entries that are in doubt."""
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
def _sorted_row(p, q, ranks, signs_p):
    """``Σ_r |p_(r) − q_(r)|``; ``signs_p`` gets its slope by each entry of p."""
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
            sign[b] = 1.0 if b > 0 else 0.0  # what is 0 on one side is met by zeros
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
            # One interval at a time, from the top; both sides' entries of it by rank.
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
    ranks, signs = _ranks(p[0], q[0]), np.empty(p.shape[1], p.dtype)
    for n in range(row_lo, row_hi):
        value[n] = _sorted_row(p[n], q[n], ranks, signs)
        if grad.shape[0]:
            for v in range(p.shape[1]):
                grad[n, v] = signs[v]


# Columns and segments.


@compiled
def _event_sums(z, e, top, log_total, event, starts, without, total, out):
    """``out[u] = log Σ exp(z[v] − top) − log_total`` over the columns of event u but those of ``without``, whose e, the
    exponential, is 0; ``total`` is room."""
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
    """``reference.piece_masses``, its tokens row by row; ``stats`` gets each row's log-sum-exp and its step."""
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
    """The gradient of ``pieces_forward`` by its three results."""
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
def columns_forward(row_lo, row_hi, logits, like, event, starts, out):
    """``reference.column_logsumexp``; event u has ``starts[u + 1] − starts[u]`` columns."""
    real = like.dtype.type
    events = out.shape[1]
    scratch, e = np.empty(logits.shape[1], like.dtype), np.empty(logits.shape[1], like.dtype)
    total, tops = np.empty(events, np.float64), np.empty(events, np.float64)
    for n in range(row_lo, row_hi):
        z = row_of(logits, n, scratch)
        top = row_max(z)
        if top == -math.inf:
            out[n] = -math.inf
            continue
        exp_into(z, top, e)
        total[:] = 0.0
        for v in range(e.size):
            total[event[v]] += e[v]
        small = False
        for u in range(events):
            out[n, u] = log(real(total[u])) + top
            small |= total[u] < TINY and starts[u + 1] > starts[u]
        if small:
            tops[:] = -math.inf
            for v in range(z.size):
                if total[event[v]] < TINY and z[v] > tops[event[v]]:
                    tops[event[v]] = z[v]
            for u in range(events):
                if total[u] < TINY:
                    total[u] = 0.0
                    out[n, u] = -math.inf
            for v in range(z.size):
                u = event[v]
                if tops[u] > -math.inf:
                    total[u] += math.exp(z[v] - tops[u])
            for u in range(events):
                if tops[u] > -math.inf:
                    out[n, u] = tops[u] + math.log(total[u])


@compiled
def columns_backward(row_lo, row_hi, logits, like, event, result, grad_result, grad):
    """The gradient of ``columns_forward``."""
    real = like.dtype.type
    difference = np.empty(logits.shape[1], like.dtype)
    scratch, e = np.empty(logits.shape[1], like.dtype), np.empty(logits.shape[1], like.dtype)
    for n in range(row_lo, row_hi):
        z = row_of(logits, n, scratch)
        for v in range(e.size):
            whole = result[n, event[v]]
            difference[v] = z[v] - whole if whole > -math.inf else -math.inf
        exps(difference, real(0.0), e)
        for v in range(e.size):
            e[v] *= grad_result[n, event[v]]
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


@compiled
def sum_chunks(logp, chunk, out):
    """``reference.chunk_sums``."""
    for i in range(logp.size):
        if chunk[i] >= 0:
            out[chunk[i]] += logp[i]


@compiled
def spread_chunks(grad_out, chunk, grad):
    """The gradient of ``sum_chunks``."""
    for i in range(chunk.size):
        grad[i] = grad_out[chunk[i]] if chunk[i] >= 0 else 0.0
