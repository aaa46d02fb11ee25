"""Divergences on the events shared by two vocabularies, row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gold.kernels.backends import row_divergence
from gold.kernels.layout import KeptEvents
from gold.kernels.lm_head import summed
from gold.kernels.logits import LazyLogits, spans
from gold.kernels.reference import (
    SMOOTHING,
    MixedKL,
    Unshared,
    coarsened,
    divergence_of,
    finite_divergence,
)

Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SharedEvents:
    """The events shared by two vocabularies: token ``ids_V[p]`` of the student is token ``ids_W[p]`` of the teacher,
    and the stop event; the other tokens of each side form one more event, or are left out. ``everything``: all text
    tokens of both sides are shared."""

    ids_V: Tensor
    ids_W: Tensor
    stops_V: Tensor
    stops_W: Tensor
    everything: bool = False

    def kept(self, width_V: int, width_W: int) -> tuple[KeptEvents, KeptEvents]:
        """Both sides' columns; a vocabulary can have special ids for which its model has no row."""
        there = (self.ids_V < width_V) & (self.ids_W < width_W).to(self.ids_V.device)
        return (
            KeptEvents(self.ids_V[there], self.stops_V, width_V),
            KeptEvents(self.ids_W[there.to(self.ids_W.device)], self.stops_W, width_W),
        )


def shared_divergence(
    student: LazyLogits,
    teacher: LazyLogits,
    events: SharedEvents,
    divergence: Divergence,
    unshared: Unshared = "bucket",
    top_k: int | None = None,
    top_k_of_teacher: bool = True,
    weight_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over rows n of the divergence between both sides on shared events, each times its weight (1 without one), and
    without gradient the student's mass on these events, [N].

    ``unshared``: all unshared mass is one more event, the bucket, or both sides are conditioned on the shared events.
    ``top_k``: only the most probable shared events of one side in each row are separate events, the others count as
    unshared; so do those unknown to a partial teacher row. A ``MixedKL`` runs in the kernel where it supports all
    options; any other divergence runs in torch. If ``everything`` is shared, smoothing applies only where one side's
    matrix has rows beyond its vocabulary, the other's has none, and the divergence would be infinite; where a
    divergence is infinite nevertheless, events of probability 0 count as in ``reference.finite_where_either_is``.

    Raises: ValueError if ``top_k`` is more than the number of shared events.
    """
    kept, kept_T = events.kept(student.width, teacher.width)
    if top_k is not None and top_k > kept.ids.numel() + 1:
        raise ValueError(
            f"top_k is {top_k}, and the vocabularies share {kept.ids.numel()} tokens and the stop event"
        )
    smoothing = _smoothing(divergence, kept, kept_T) if events.everything else SMOOTHING
    chosen = partial(_apart, teacher.partial, top_k, top_k_of_teacher)
    whole = top_k is None and not teacher.partial and kept.ids.device == kept_T.ids.device

    def compare(block: LazyLogits, span: slice) -> tuple[Tensor, ...]:
        with torch.no_grad():
            logits_T = teacher.select(span).logits()
        if whole and isinstance(divergence, MixedKL):
            logits = block.logits()
            given = logits, logits_T, kept, kept_T, divergence
            overwrite = block.may_overwrite(logits)
            value, mass = row_divergence(*given, unshared=unshared, smoothing=smoothing, overwrite=overwrite)
        else:
            value, mass = in_torch(block.logits(), logits_T, divergence)
        if torch.isinf(value.detach()).any():
            value, mass = in_torch(block.logits(), logits_T, finite_divergence(divergence))
        return (value if weight_N is None else value * weight_N[span].to(value)).sum(), mass

    def in_torch(logits_S: Tensor, logits_T: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
        logp = coarsened(logits_S, kept)
        with torch.no_grad():
            logq = coarsened(logits_T, kept_T).to(logp)
            apart = chosen(logp, logq)
        # Events chosen on one side may have probability 0 on the other.
        share = smoothing if apart is None else SMOOTHING
        return divergence_of(divergence, logp, logq, unshared, share, apart)

    blocks = [(span, span) for span in spans(len(student), min(student.block_rows, teacher.block_rows))]
    total, mass = summed(compare, student, blocks)
    return total, mass


def _smoothing(divergence: Divergence, kept: KeptEvents, kept_T: KeptEvents) -> float:
    """The share of ``smoothed`` where all text tokens are shared: 0 unless one side alone has padding columns and the
    divergence would be infinite."""
    padded, padded_T = (bool(k.left.numel()) for k in (kept, kept_T))
    alone = padded and not padded_T, padded_T and not padded
    return SMOOTHING if isinstance(divergence, MixedKL) and not divergence.finite(*alone) else 0.0


def _apart(partial_T: bool, top_k: int | None, of_teacher: bool, logp: Tensor, logq: Tensor) -> Tensor | None:
    """Which shared events of each row stay separate, given both sides' ``coarsened`` rows; None: all."""
    apart = torch.isfinite(logq[:, :-1]) if partial_T else None
    if top_k is not None:
        ranked = (logq if of_teacher else logp)[:, :-1].topk(top_k, dim=-1).indices
        chosen = torch.zeros_like(logp[:, :-1], dtype=torch.bool).scatter(1, ranked, True)
        apart = chosen if apart is None else apart & chosen
    return apart
