"""The definition of every kernel in plain torch: any device, any float dtype, short enough to check by eye.

The other back ends hold the same function names and are tested against these.
"""

import torch
from torch import Tensor

from gold.kernels.layout import ByteLayout


def byte_masses(logits_NV: Tensor, layout: ByteLayout, first_row: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability mass of every set of tokens that the layout names, for the rows ``first_row …`` of the batch.

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
    pieces = layout.pieces(first_row, rows, logits_NV.shape[1])
    size = pieces.high - pieces.low
    owner = torch.repeat_interleave(size)
    start = torch.cumsum(size, 0) - size
    member = torch.arange(owner.numel(), device=owner.device) - start[owner] + pieces.low[owner]
    ids = pieces.pool[member]
    row = pieces.row[owner]
    value = logp_NV[row, ids]
    skipped = pieces.skips_target[owner] & (ids == layout.target[first_row + row])
    value = value.masked_fill(skipped, -torch.inf)
    log_mass = segment_logsumexp(value, pieces.mass[owner], pieces.masses)

    target = layout.target[first_row : first_row + rows]
    picked = logp_NV.gather(1, target.clamp(min=0)[:, None])[:, 0]
    log_target_N = torch.where(target >= 0, picked, torch.zeros_like(picked))
    return log_mass, log_target_N, row_logsumexp(logp_NV[:, layout.stops])


def chunk_sums(logp_N: Tensor, chunk_N: Tensor, chunks: int) -> Tensor:
    """Sum of ``logp_N`` over the tokens of each chunk, in nats: ``out[c] = Σ_{i: chunk[i] = c} logp[i]``.

    ``chunk_N`` holds a chunk index per token; −1 counts nowhere. The gradient of a token is that of its chunk.
    """
    counted = chunk_N >= 0
    out_C = logp_N.new_zeros(chunks)
    return out_C.index_add(0, chunk_N.clamp(min=0).long(), logp_N.masked_fill(~counted, 0.0))


def segment_logsumexp(value: Tensor, segment: Tensor, segments: int) -> Tensor:
    """``out[s] = log Σ_{i: segment[i] = s} exp(value[i])``; −inf where a segment is empty or holds only −inf.

    The gradient is the softmax within the segment, and 0 where the result is −inf.
    """
    top = value.new_full((segments,), -torch.inf)
    top = top.scatter_reduce(0, segment, value.detach(), "amax", include_self=True)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    total = value.new_zeros(segments).index_add(0, segment, torch.exp(value - top[segment]))
    something = total > 0
    return torch.where(something, torch.log(torch.where(something, total, 1.0)) + top, -torch.inf)


def row_logsumexp(value: Tensor) -> Tensor:
    """``log Σ exp(value)`` over the last axis; −inf where all are −inf (or there is none), with gradient 0 there:
    torch's own has a NaN gradient."""
    if value.shape[-1] == 0:
        return value.new_full(value.shape[:-1], -torch.inf)
    top = value.detach().amax(-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    total = torch.exp(value - top).sum(-1)
    something = total > 0
    return torch.where(something, torch.log(torch.where(something, total, 1.0)) + top[..., 0], -torch.inf)


def widened(logits: Tensor) -> Tensor:
    """The logits in float32, or in float64 if that is what they are."""
    return logits if logits.dtype == torch.float64 else logits.float()
