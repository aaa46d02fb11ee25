"""numba loops over rows: divergences between two rows on shared events, and their gradients."""

# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs

import math

import numpy as np

from gold.kernels.cpu.masses import gather
from gold.kernels.cpu.simd import (
    as_is,
    compiled,
    excess,
    exp,
    exp_into,
    fused,
    inlined,
    lane_sum,
    log,
    log_sum,
    put_row,
    range_sum,
    row_max,
    row_of,
)
from gold.kernels.cpu.sorted import ranks_for, sorted_row


@inlined
def _kl_term(lp, lq, p, q):
    """``p log(p / q) − p + q``, and ``log(q / p)``.

    Summed over all events this is the divergence, since p and q both sum to 1, and each term is small where p and q are
    close: no cancellation in rows near probability 1. If p underflows to 0 the term is q, also for q = 0.
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
    """Log-probabilities of the kept tokens and the stop event into ``out``; maximum, total, and mass of the left
    columns."""
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


# Each loop is branch-free, since a branch prevents vectorization. ``out`` holds the slopes and then the terms in one
# array: the compiler checks at run time whether two arrays overlap, but for no more than eight pairs.

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
def _bucketed(lp, lq, rest, rest_T, smoothing):
    """Smooths all events but the last in place; the last becomes the bucket."""
    events = lp.size - 1
    shift = lp.dtype.type(math.log1p(-smoothing))
    for k in range(events):
        lp[k] += shift
        lq[k] += shift
    lp[events] = math.log((1.0 - smoothing) * rest + smoothing) if rest + smoothing > 0.0 else -math.inf
    lq[events] = math.log((1.0 - smoothing) * rest_T + smoothing) if rest_T + smoothing > 0.0 else -math.inf


@compiled
def _condition(lp, p):
    """Conditions log-probabilities on the events, in place, relative to their own maximum, since all may be near 0."""
    top = row_max(lp)
    shift = top + lp.dtype.type(math.log(exp_into(lp, top, p)))
    for k in range(lp.size):
        lp[k] -= shift
    return top


@compiled
def _join_rest(lp, lq, rest, rest_T):
    """Moves events with probability 0 on one side into the bucket of both."""
    for k in range(lp.size):
        if lp[k] == -math.inf or lq[k] == -math.inf:
            rest += math.exp(lp[k])
            rest_T += math.exp(lq[k])
            lp[k] = lq[k] = -math.inf
    return rest, rest_T


@compiled
def _put_nan(row, n, results, grad):
    results[n] = math.nan
    if grad.shape[0]:
        row[:] = math.nan
        put_row(grad, n, row)


@compiled
def _spread(z, e, ids, stops, left, lp, p, out, scale, single, top, only_common):
    """The gradient of a row in place of its exponentials ``e``: ``out`` are the slopes of the kept events, ``scale``
    the factor of the left columns, ``single`` what every event loses in proportion to its probability."""
    events = ids.size + 1
    stop_log = log_sum(z, stops, 0, stops.size, -1)
    # Rows may share memory with their gradients: read first.
    for i in range(stops.size):
        if stop_log > -math.inf:
            part = math.exp(z[stops[i]] - stop_log)
            e[stops[i]] = part
    for v in range(left.size):
        e[left[v]] *= scale
    for k in range(ids.size):
        named = not only_common or lp[k] > -math.inf
        e[ids[k]] = out[k] - p[k] * single if named else e[ids[k]] * scale
    of_stops = out[events - 1] - p[events - 1] * single
    if only_common and lp[events - 1] == -math.inf:
        of_stops = lp.dtype.type(math.exp(stop_log - top)) * scale
    for i in range(stops.size):
        if stop_log > -math.inf:
            e[stops[i]] *= of_stops
        else:
            e[stops[i]] = 0.0


@compiled
def divergence(
    row_lo,
    row_hi,
    logits,
    like,
    logits_T,
    columns,
    columns_T,
    form,
    bucket,
    smoothing,
    only_common,
    results,
    grad,
):
    """``reference.row_divergence``: value and mass into ``results``, and the value's gradient into ``grad`` if it has
    rows. ``columns``: ids, stops and other columns of a side; ``form``: the numbers of a ``MixedKL``."""
    ids_V, stops_V, left_V = columns
    student, student_mix, teacher, teacher_mix, above = form
    real = like.dtype.type
    events = ids_V.size + 1
    scratch, e = np.empty(logits.shape[1], like.dtype), np.empty(logits.shape[1], like.dtype)
    scratch_T, e_T = np.empty(logits_T.shape[1], like.dtype), np.empty(logits_T.shape[1], like.dtype)
    room = np.empty((5, events + 1 if bucket else events), like.dtype)
    lp, lq, p, q, out = room[0], room[1], room[2], room[3], room[4]
    for n in range(row_lo, row_hi):
        z, z_T = row_of(logits, n, scratch), row_of(logits_T, n, scratch_T)
        top, total, rest = _row_side(z, e, *columns, lp)
        _, total_T, rest_T = _row_side(z_T, e_T, *columns_T, lq)
        if only_common:
            rest, rest_T = _join_rest(lp[:events], lq[:events], rest, rest_T)
        results[n, 1] = _exp_all(lp[:events], p[:events])
        if math.isnan(total + total_T):
            _put_nan(e, n, results, grad)
            continue
        if bucket:
            _bucketed(lp, lq, rest, rest_T, smoothing)
        else:
            top = _condition(lp, p)
            _condition(lq, q)
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
        _spread(z, e, ids_V, stops_V, left_V, lp, p, out, scale, single, top, only_common)
        put_row(grad, n, e)


@compiled
def _matched(lp, lq, p, q, shift, shift_T, form, out):
    """The divergence of events that sum to less than one, from log-probabilities and shifts of both sides; their slopes
    are ``out`` plus the second result times p.

    Terms are computed as if both summed to one; the difference is then subtracted.
    """
    student, student_mix, teacher, teacher_mix, above = form
    real = lp.dtype.type
    for k in range(lp.size):
        lp[k] += shift
        lq[k] += shift_T
    kept, kept_T = _exp_all(lp, p), _exp_all(lq, q)
    weight = teacher if above == -math.inf or _entropy(lq, q, out) > above else 0.0
    taken_back = real(student * student_mix - weight * (1.0 - teacher_mix))
    total = _terms(lp, lq, p, q, real(student), real(student_mix), real(weight), real(teacher_mix), out)
    return total - taken_back * (kept_T - kept), taken_back


@compiled
def _scaled(e, index, scale, out):
    gather(e, index, out)
    for v in range(out.size):
        out[v] *= scale


@compiled
def hybrid(
    row_lo, row_hi, logits, like, logits_T, before, before_T, columns, columns_T, form, share, results, grad
):
    """``reference.hybrid_distance``: its three results and the slope with respect to ``before``, and the logits'
    gradient."""
    ids_V, stops_V, left_V = columns
    ids_W, stops_W, left_W = columns_T
    real = like.dtype.type
    events = ids_V.size + 1
    scratch, e = np.empty(logits.shape[1], like.dtype), np.empty(logits.shape[1], like.dtype)
    scratch_T, e_T = np.empty(logits_T.shape[1], like.dtype), np.empty(logits_T.shape[1], like.dtype)
    room = np.empty((5, events), like.dtype)
    lp, lq, p, q, out = room[0], room[1], room[2], room[3], room[4]
    others, signs = np.empty(left_V.size, like.dtype), np.empty(left_V.size, like.dtype)
    others_T, of_stop = np.empty(left_W.size, like.dtype), np.empty(stops_V.size, like.dtype)
    ranks = ranks_for(others, others_T)
    for n in range(row_lo, row_hi):
        z, z_T = row_of(logits, n, scratch), row_of(logits_T, n, scratch_T)
        _, total, _ = _row_side(z, e, ids_V, stops_V, left_V[:0], lp)
        _, total_T, _ = _row_side(z_T, e_T, ids_W, stops_W, left_W[:0], lq)
        if math.isnan(total + total_T):
            _put_nan(e, n, results, grad)
            continue
        matched, taken_back = _matched(lp, lq, p, q, real(before[n]), real(before_T[n]), form, out)
        _scaled(e, left_V, real(math.exp(before[n]) / total), others)
        _scaled(e_T, left_W, real(math.exp(before_T[n]) / total_T), others_T)
        unmatched = sorted_row(others, others_T, ranks, signs)
        results[n, 0] = share * matched + (1.0 - share) * unmatched
        results[n, 1], results[n, 2] = matched, unmatched
        if grad.shape[0] == 0:
            continue
        of_matched, of_other = real(share), real(1.0 - share)
        for k in range(events):
            out[k] = of_matched * (out[k] + taken_back * p[k])
        for v in range(others.size):
            signs[v] *= of_other * others[v]
        mean = range_sum(out, 0, events) + range_sum(signs, 0, signs.size)
        results[n, 3] = mean
        stop_log = log_sum(z, stops_V, 0, stops_V.size, -1)
        for i in range(stops_V.size):
            of_stop[i] = math.exp(z[stops_V[i]] - stop_log) if stop_log > -math.inf else 0.0
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
