"""Divergences between rows of log-probabilities, [N, events] → [N] in nats: p the student's, q the teacher's.

Those in the table of objectives are sums of two KL divergences to mixtures, a form that the kernels implement; any
other function of two such rows also works as a divergence, and runs in torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated

from pydantic import Field
from torch import Tensor

from gold.kernels.reference import MixedKL

Share = Annotated[float, Field(ge=0, le=1)]
Divergence = Callable[[Tensor, Tensor], Tensor]


def reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p ‖ q) per row, p the student: ``Σ p (log p − log q)``. Events with probability 0 under p contribute 0."""
    return _FORMS[reverse_kl]()(logp, logq)


def forward_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(q ‖ p) per row, q the teacher: ``Σ q (log q − log p)``. Events with probability 0 under q contribute 0."""
    return _FORMS[forward_kl]()(logp, logq)


def jsd(logp: Tensor, logq: Tensor, beta: Share = 0.5) -> Tensor:
    """Generalised Jensen–Shannon divergence: ``β KL(q ‖ m) + (1 − β) KL(p ‖ m)`` with ``m = β q + (1 − β) p``.

    β = 0 and β = 1, where the formula is 0, give its limits: forward KL and reverse KL.

    Source: Agarwal et al. 2306.13649, equation 1.
    """
    return _FORMS[jsd](beta)(logp, logq)


def skew_kl(logp: Tensor, logq: Tensor, alpha: Share = 0.1) -> Tensor:
    """Skewed forward KL: ``KL(q ‖ α q + (1 − α) p)``; forward KL at α = 0, and 0 at α = 1. At most ``log 1/α``.

    Source: Ko et al. 2402.03898, section 3.1.
    """
    return _FORMS[skew_kl](alpha)(logp, logq)


def skew_reverse_kl(logp: Tensor, logq: Tensor, alpha: Share = 0.1) -> Tensor:
    """Skewed reverse KL: ``KL(p ‖ α p + (1 − α) q)``; reverse KL at α = 0, and 0 at α = 1. At most ``log 1/α``.

    Source: Ko et al. 2402.03898, section 3.1.
    """
    return _FORMS[skew_reverse_kl](alpha)(logp, logq)


def entropy_aware_kl(
    logp: Tensor, logq: Tensor, threshold: Annotated[float, Field(ge=0)] = 0.8, forward: Share = 1.0
) -> Tensor:
    """Reverse KL, plus ``forward`` times forward KL on rows where the teacher's entropy is above ``threshold`` nats.

    Where a teacher is uncertain, reverse KL concentrates on one of its options; forward KL restores the others.

    Source: Jin et al. 2603.07079; there the entropy is that of the teacher's tokens, here that of the events compared.
    """
    return _FORMS[entropy_aware_kl](threshold, forward)(logp, logq)


DIVERGENCES: Mapping[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "entropy_aware_kl": entropy_aware_kl,
}


def _jsd(beta: float) -> MixedKL:
    if beta in (0.0, 1.0):
        return MixedKL(student=beta, teacher=1.0 - beta)
    return MixedKL(student=1.0 - beta, student_mix=beta, teacher=beta, teacher_mix=beta)


_FORMS: Mapping[Callable[..., Tensor], Callable[..., MixedKL]] = {
    reverse_kl: lambda: MixedKL(student=1.0),
    forward_kl: lambda: MixedKL(teacher=1.0),
    jsd: _jsd,
    skew_kl: lambda alpha: MixedKL(teacher=1.0, teacher_mix=alpha),
    skew_reverse_kl: lambda alpha: MixedKL(student=1.0, student_mix=1.0 - alpha),
    entropy_aware_kl: lambda threshold, forward: MixedKL(student=1.0, teacher=forward, above_nats=threshold),
}


def form_of(divergence: Divergence) -> MixedKL | None:
    """The ``MixedKL`` form of a divergence of the table, with or without options; None for any other function."""
    function, options = divergence, {}
    if isinstance(divergence, partial):
        function, options = divergence.func, divergence.keywords
    if function not in _FORMS:
        return None
    defaults = {p.name: p.default for p in list(inspect.signature(function).parameters.values())[2:]}
    return _FORMS[function](**{**defaults, **options})
