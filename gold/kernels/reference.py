"""The definition of every kernel in plain torch, for any device and float dtype.

The other back ends implement the same functions and are tested against these. A function with ``overwrite`` may write
the gradient to the memory of its first argument: nothing else may use that memory afterwards, and only one backward
pass is possible.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from gold.kernels.layout import ByteLayout, Columns, KeptEvents, Tokens

Unshared = Literal["bucket", "renormalise"]
"""How to treat probability outside the compared events: as one more event, or by conditioning on the compared
events."""
SMOOTHING = 1e-5
"""Share of every event that is moved to the bucket, on both sides alike."""


@dataclass(frozen=True)
class MixedKL:
    """A sum of two KL divergences to mixtures, ``student · KL(p ‖ m) + teacher · KL(q ‖ n)``, p the student's.

    ``student_mix``, ``teacher_mix`` are the teacher's shares of the mixtures: ``m = student_mix · q + (1 − student_mix)
    · p`` and n likewise. ``above_nats``: the second term counts only in rows with a teacher entropy above this.
    """

    student: float = 0.0
    student_mix: float = 1.0
    teacher: float = 0.0
    teacher_mix: float = 0.0
    above_nats: float = -math.inf

    def finite(self, student_alone: bool, teacher_alone: bool) -> bool:
        """Whether it stays finite where only the student, or only the teacher, gives an event a probability above 0."""
        return not (
            (student_alone and self.student and self.student_mix == 1.0)
            or (teacher_alone and self.teacher and self.teacher_mix == 0.0)
        )

    def __call__(self, logp: Tensor, logq: Tensor) -> Tensor:
        """The divergence per row, [N, events] → [N], in nats; an event with probability 0 contributes 0."""
        total = logp.new_zeros(logp.shape[:-1])
        if self.student:
            total = total + self.student * expected(logp, logp - mixture(logp, logq, self.student_mix))
        if self.teacher:
            term = self.teacher * expected(logq, logq - mixture(logp, logq, self.teacher_mix))
            if self.above_nats > -math.inf:
                term = torch.where(expected(logq, -logq) > self.above_nats, term, 0.0)
            total = total + term
        return total


def byte_masses(
    logits_NV: Tensor, layout: ByteLayout, first_row: int, *, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability mass of every token set of the layout, for the rows ``first_row …`` of the batch.

    For mass m of row n, with ids(m) the tokens in its set::

        log_mass[m]   = log Σ_{v in ids(m)} softmax(logits[n])[v]
        log_target[n] = log softmax(logits[n])[target[n]]        (0 where the row has no target)
        log_stop[n]   = log Σ_{v in stops} softmax(logits[n])[v]

    Returns:
        log_mass (masses of these rows, in the layout's order), log_target_N, log_stop_N, in nats, in the dtype of
        ``logits_NV`` widened to at least float32. An empty set has mass −inf.
    """
    rows = logits_NV.shape[0]
    logp_NV = torch.log_softmax(widened(logits_NV), dim=-1)
    ranges = layout.mass_ranges(first_row, rows, logits_NV.shape[1])
    size = ranges.high - ranges.low
    owner = torch.repeat_interleave(size)
    start = torch.cumsum(size, 0) - size
    member = torch.arange(owner.numel(), device=owner.device) - start[owner] + ranges.low[owner]
    ids = ranges.pool[member]
    row = ranges.row[owner]
    value = logp_NV[row, ids]
    skipped = ranges.skips_target[owner] & (ids == layout.target[first_row + row])
    value = value.masked_fill(skipped, -torch.inf)
    log_mass = segment_logsumexp(value, ranges.mass[owner], ranges.masses)

    target = layout.target[first_row : first_row + rows]
    picked = logp_NV.gather(1, target.clamp(min=0)[:, None])[:, 0]
    log_target_N = torch.where(target >= 0, picked, torch.zeros_like(picked))
    return log_mass, log_target_N, row_logsumexp(logp_NV[:, layout.stops])


def chunk_sums(logp_N: Tensor, chunk_N: Tensor, chunks: int) -> Tensor:
    """Sum of ``logp_N`` over the tokens of each chunk, in nats: ``out[c] = Σ_{i: chunk[i] = c} logp[i]``.

    ``chunk_N`` holds a chunk index per token; tokens with −1 are ignored. The gradient of a token is that of its chunk.
    """
    out_C = logp_N.new_zeros(chunks + 1)  # the last is for −1
    return out_C.index_add(0, torch.where(chunk_N < 0, chunks, chunk_N).long(), logp_N)[:chunks]


def row_statistics(
    logits_NV: Tensor, target_N: Tensor, stops: Tensor, *, overwrite: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-token statistics of each row, in nats: ``log Σ_v exp(logits[n, v])``, the log-probability of the target (0
    where it is −1), that of the stop event (−inf if there are no stop ids), and without gradient the entropy.

    All [N], in the dtype of the logits widened to at least float32.
    """
    logits_NV = widened(logits_NV)
    norm = row_logsumexp(logits_NV)
    picked = logits_NV.gather(1, target_N.clamp(min=0)[:, None])[:, 0] - norm
    stop = row_logsumexp(logits_NV[:, stops] - norm[:, None])
    with torch.no_grad():
        logp = logits_NV - norm[:, None]
        entropy = torch.where(torch.isneginf(norm), 0.0, expected(logp, -logp))
    return norm, torch.where(target_N >= 0, picked, torch.zeros_like(picked)), stop, entropy


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
    """Divergence between row n of both sides on their shared events, and the student's mass on these events: two [N].

    The events are the kept tokens, the stop event, and with ``unshared`` "bucket" all other columns together, after a
    share ``smoothing`` of every event has moved there (see ``smoothed``); with "renormalise" both sides are conditioned
    on the first two. ``only_common``: in each row, an event with probability 0 on one side joins the bucket on both
    sides.
    Gradient with respect to ``logits_NV`` only, through the divergence only.
    """
    logp = coarsened(logits_NV, kept_V)
    with torch.no_grad():
        logq = coarsened(logits_NW, kept_W).to(logp)
        common = torch.isfinite(logp[:, :-1]) & torch.isfinite(logq[:, :-1])
    return divergence_of(divergence, logp, logq, unshared, smoothing, common if only_common else None)


def divergence_of(
    divergence: Callable[[Tensor, Tensor], Tensor],
    logp: Tensor,
    logq: Tensor,
    unshared: Unshared,
    smoothing: float,
    apart: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``row_divergence`` of both sides' ``coarsened`` rows, with any divergence; events where ``apart`` is false join
    the bucket."""
    if apart is not None:
        logp, logq = bucketed(logp, apart), bucketed(logq, apart)
    mass = row_logsumexp(logp[:, :-1].detach()).exp()
    if unshared == "renormalise":
        logp, logq = (normalised(x[:, :-1]) for x in (logp, logq))
    elif smoothing:
        logp, logq = smoothed(logp, smoothing), smoothed(logq, smoothing)
    return divergence(logp, logq), mass


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
    """Row n of both sides, times ``exp(before[n])``: the divergence on the kept tokens and the stop event, not
    normalised, and ``sorted_l1`` of all other columns.

    Returns:
        ``matched_share`` · divergence + (1 − ``matched_share``) · distance, and without gradient each of the two: three
        [N]. Gradient with respect to ``logits_NV`` and ``before_N``.
    """
    return hybrid_of(
        sorted_l1, logits_NV, logits_NW, before_N, before_T_N, kept_V, kept_W, divergence, matched_share
    )


def hybrid_of(
    distance: Callable[[Tensor, Tensor], Tensor],
    logits_NV: Tensor,
    logits_NW: Tensor,
    before_N: Tensor,
    before_T_N: Tensor,
    kept_V: KeptEvents,
    kept_W: KeptEvents,
    divergence: Callable[[Tensor, Tensor], Tensor],
    matched_share: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``hybrid_distance`` with any divergence, and with the ``sorted_l1`` of a back end."""
    logp, other_p = (x + before_N.to(x)[:, None] for x in split(logits_NV, kept_V))
    with torch.no_grad():
        parts = split(logits_NW, kept_W)
        logq, other_q = ((x + before_T_N.to(x)[:, None]).to(logp) for x in parts)
    matched, unmatched = divergence(logp, logq), distance(other_p.exp(), other_q.exp())
    total = matched_share * matched + (1.0 - matched_share) * unmatched
    return total, matched.detach(), unmatched.detach()


def sorted_l1(p_NV: Tensor, q_NW: Tensor, *, overwrite: bool = False) -> Tensor:
    """``Σ_r |p_(r) − q_(r)|`` per row, both sides sorted in descending order, the shorter one padded with zeros.

    Entries are at least 0. The gradient, with respect to ``p_NV`` only, is the sign of an entry's difference, 0 where
    the difference is 0. Equal entries may be in any order, and so may exchange their signs.

    Source: Boizard et al. 2402.12030, the closed form of the Wasserstein distance that is ULD.
    """
    p, q = (torch.sort(x, dim=-1, descending=True).values for x in (p_NV, q_NW.detach()))
    short = q.shape[-1] - p.shape[-1]
    p, q = functional.pad(p, (0, max(0, short))), functional.pad(q, (0, max(0, -short)))
    return (p - q).abs().sum(-1)


def column_logsumexp(logits_NV: Tensor, columns: Columns, *, overwrite: bool = False) -> Tensor:
    """``out[n, e] = log Σ_{v: columns.event[v] = e} exp(logits[n, v])``, [N, events]; −inf for an event without
    columns."""
    logits_NV = widened(logits_NV)
    index = columns.event.expand_as(logits_NV)
    top = logits_NV.new_full((logits_NV.shape[0], columns.events), -torch.inf)
    top = top.scatter_reduce(1, index, logits_NV.detach(), "amax")
    top = torch.where(torch.isfinite(top), top, 0.0)
    total = torch.zeros_like(top).scatter_add(1, index, torch.exp(logits_NV - top.gather(1, index)))
    something = total != 0
    return torch.where(something, torch.log(torch.where(something, total, 1.0)) + top, -torch.inf)


def piece_masses(
    logits_NV: Tensor,
    target_N: Tensor,
    columns: Columns,
    whole_P: Tensor,
    tokens: Tokens,
    *,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities that a block of positions needs from its rows, in nats.

    With π the softmax of a row, and with ``moved`` tokens excluded from the sums of their rows::

        full[p, u] = log Σ_{v: columns.event[v] = u} π[whole[p]][v]
        value[t] = log π[row[t]][id[t]]
        step[n] = log π[n][target[n]]        (0 where it is −1)

    ``whole`` are distinct rows in ascending order.
    """
    logits_NV = widened(logits_NV)
    logp_NV = logits_NV - row_logsumexp(logits_NV)[:, None]
    picked = logp_NV.gather(1, target_N.clamp(min=0)[:, None])[:, 0]
    step_N = torch.where(target_N >= 0, picked, torch.zeros_like(picked))
    moved = tokens.row[tokens.moved], tokens.id[tokens.moved]
    without = logp_NV.index_put(moved, logp_NV.new_tensor(-torch.inf))
    return column_logsumexp(without[whole_P], columns), logp_NV[tokens.row, tokens.id], step_N


def segment_logsumexp(value: Tensor, segment: Tensor, segments: int) -> Tensor:
    """``out[s] = log Σ_{i: segment[i] = s} exp(value[i])``; −inf where a segment is empty or holds only −inf.

    The gradient is the softmax within the segment, and 0 where the result is −inf.
    """
    top = value.new_full((segments,), -torch.inf)
    top = top.scatter_reduce(0, segment, value.detach(), "amax", include_self=True)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    total = value.new_zeros(segments).index_add(0, segment, torch.exp(value - top[segment]))
    something = total != 0
    return torch.where(something, torch.log(torch.where(something, total, 1.0)) + top, -torch.inf)


def row_logsumexp(value: Tensor) -> Tensor:
    """``log Σ exp(value)`` over the last axis; −inf, with gradient 0, where all are −inf or the axis is empty: torch's
    own has a NaN gradient there."""
    if value.shape[-1] == 0:
        return value.new_full(value.shape[:-1], -torch.inf)
    top = value.detach().amax(-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    total = torch.exp(value - top).sum(-1)
    something = total != 0
    return torch.where(something, torch.log(torch.where(something, total, 1.0)) + top[..., 0], -torch.inf)


def coarsened(logits_NV: Tensor, kept: KeptEvents) -> Tensor:
    """Log-probabilities of the kept tokens, the stop event, and last all other columns together."""
    logits_NV = widened(logits_NV)
    joined = [row_logsumexp(logits_NV[:, columns])[:, None] for columns in (kept.stops, kept.left)]
    return torch.cat([logits_NV[:, kept.ids], *joined], dim=-1) - row_logsumexp(logits_NV)[:, None]


def split(logits: Tensor, kept: KeptEvents) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the kept tokens with the stop event last, and of every other column."""
    logits = widened(logits)
    norm = torch.logsumexp(logits, dim=-1, keepdim=True)
    events = torch.cat((logits[:, kept.ids], row_logsumexp(logits[:, kept.stops])[:, None]), dim=-1)
    return events - norm, logits[:, kept.left] - norm


def normalised(logp_NE: Tensor) -> Tensor:
    """The rows, each divided by its sum; rows of zeros stay as they are."""
    norm = row_logsumexp(logp_NE)[:, None]
    return logp_NE - torch.where(torch.isfinite(norm), norm, 0.0)


def bucketed(logp: Tensor, apart: Tensor) -> Tensor:
    """Moves events where ``apart`` is false into the bucket, the last column."""
    events = logp[:, :-1]
    bucket = row_logsumexp(torch.cat((events.masked_fill(apart, -torch.inf), logp[:, -1:]), dim=-1))
    return torch.cat((events.masked_fill(~apart, -torch.inf), bucket[:, None]), dim=-1)


def smoothed(logp_NE: Tensor, smoothing: float) -> Tensor:
    """The distributions with a share ``smoothing`` of every event moved to the last one; rows still sum to one."""
    last = torch.logaddexp(logp_NE[:, -1:] + math.log1p(-smoothing), logp_NE.new_tensor(smoothing).log())
    return torch.cat((logp_NE[:, :-1] + math.log1p(-smoothing), last), dim=-1)


RULED_OUT = -104.0
"""Log-probability, in nats, used for an event of probability 0 where the divergence would be infinite: no positive
single-precision number has a smaller logarithm."""


def finite_where_either_is(logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    """The distributions with ``RULED_OUT`` in place of −inf where the other side is finite."""
    out_p, out_q = torch.isneginf(logp), torch.isneginf(logq)
    return logp.masked_fill(out_p & ~out_q, RULED_OUT), logq.masked_fill(out_q & ~out_p, RULED_OUT)


def finite_divergence(divergence: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The divergence of distributions that ``finite_where_either_is`` has passed."""
    return lambda logp, logq: divergence(*finite_where_either_is(logp, logq))


def mixture(logp: Tensor, logq: Tensor, share: float) -> Tensor:
    """``log(share · q + (1 − share) · p)``, −inf where both are 0."""
    if share in (0.0, 1.0):
        return logq if share else logp
    weight = logp.new_tensor(share)
    nowhere = torch.isneginf(logp) & torch.isneginf(logq)
    p, q = (x.masked_fill(nowhere, 0.0) for x in (logp, logq))
    mixed = torch.logaddexp(p + torch.log1p(-weight), q + torch.log(weight))
    return mixed.masked_fill(nowhere, -torch.inf)


def expected(logw: Tensor, value: Tensor) -> Tensor:
    """``Σ exp(logw) · value`` over the last axis; terms with weight 0 are 0, whatever their value."""
    weight = torch.exp(logw)
    return (weight * torch.where(weight > 0, value, torch.zeros_like(value))).sum(-1)


def widened(logits: Tensor) -> Tensor:
    """The logits in float32, or in float64 if they are."""
    return logits if logits.dtype == torch.float64 else logits.float()
