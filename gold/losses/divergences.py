"""Divergences between rows of log-probabilities, [N, events] → [N] in nats: p the student's, q the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

Share = Annotated[float, Field(ge=0, le=1)]
Divergence = Callable[[Tensor, Tensor], Tensor]


def reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p ‖ q) per row, p the student: ``Σ p (log p − log q)``. Events of probability 0 under p count 0."""
    return _expected(logp, logp - logq)


def forward_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(q ‖ p) per row, q the teacher: ``Σ q (log q − log p)``. Events of probability 0 under q count 0."""
    return _expected(logq, logq - logp)


def jsd(logp: Tensor, logq: Tensor, beta: Share = 0.5) -> Tensor:
    """Generalised Jensen–Shannon divergence: ``β KL(q ‖ m) + (1 − β) KL(p ‖ m)`` with ``m = β q + (1 − β) p``.

    β = 0 and β = 1, where the formula itself is 0, mean its limits forward KL and reverse KL.

    Source: Agarwal et al. 2306.13649, equation 1.
    """
    if beta == 0.0:
        return forward_kl(logp, logq)
    if beta == 1.0:
        return reverse_kl(logp, logq)
    logm = _mixture(logp, logq, beta)
    return beta * _expected(logq, logq - logm) + (1.0 - beta) * _expected(logp, logp - logm)


def skew_kl(logp: Tensor, logq: Tensor, alpha: Share = 0.1) -> Tensor:
    """Skewed forward KL: ``KL(q ‖ α q + (1 − α) p)``; forward KL at α = 0, and 0 at α = 1. At most ``log 1/α``.

    Source: Ko et al. 2402.03898, section 3.1.
    """
    return _expected(logq, logq - _mixture(logp, logq, alpha))


def skew_reverse_kl(logp: Tensor, logq: Tensor, alpha: Share = 0.1) -> Tensor:
    """Skewed reverse KL: ``KL(p ‖ α p + (1 − α) q)``; reverse KL at α = 0, and 0 at α = 1. At most ``log 1/α``.

    Source: Ko et al. 2402.03898, section 3.1.
    """
    return _expected(logp, logp - _mixture(logp, logq, 1.0 - alpha))


def entropy_aware_kl(
    logp: Tensor, logq: Tensor, threshold: Annotated[float, Field(ge=0)] = 0.8, forward: Share = 1.0
) -> Tensor:
    """Reverse KL, and on rows where the teacher's entropy is above ``threshold`` nats ``forward`` times forward KL too.

    Where a teacher is unsure, reverse KL keeps to one of its choices; forward KL brings the others back.

    Source: Jin et al. 2603.07079; there the entropy is that of the teacher's tokens, here that of the events compared.
    """
    unsure = _expected(logq, -logq) > threshold
    return reverse_kl(logp, logq) + forward * torch.where(unsure, forward_kl(logp, logq), 0.0)


DIVERGENCES: Mapping[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "entropy_aware_kl": entropy_aware_kl,
}


def _mixture(logp: Tensor, logq: Tensor, share: float) -> Tensor:
    """``log(share · q + (1 − share) · p)``, −inf where both are 0."""
    if share in (0.0, 1.0):
        return logq if share else logp
    weight = logp.new_tensor(share)
    nowhere = torch.isneginf(logp) & torch.isneginf(logq)
    p, q = (x.masked_fill(nowhere, 0.0) for x in (logp, logq))
    mixed = torch.logaddexp(p + torch.log1p(-weight), q + torch.log(weight))
    return mixed.masked_fill(nowhere, -torch.inf)


def _expected(logw: Tensor, value: Tensor) -> Tensor:
    """``Σ exp(logw) · value`` over the last axis; where the weight is 0 the value does not count, whatever it is."""
    weight = torch.exp(logw)
    return (weight * torch.where(weight > 0, value, torch.zeros_like(value))).sum(-1)
