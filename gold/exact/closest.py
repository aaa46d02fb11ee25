"""The closest pair of distributions of which only parts are known: a lower bound on every f-divergence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gold.kernels.reference import RULED_OUT

Floats = NDArray[np.float64]


def closest_completions(a_NE: Floats, b_NE: Floats) -> tuple[Floats, Floats]:
    """The closest pair (p, q) with ``p ≥ a``, ``q ≥ b`` and sums of 1, row by row: closest in every f-divergence.

    ``a_NE``, ``b_NE`` are the known probabilities of each event, each row of at most 1 together; what is missing may
    belong to any event. Where the two sets meet, p = q; else, with c < d::

        p = max(a, c·b),  Σ (c·b − a)₊ = 1 − Σ a          q = max(b, a/d),  Σ (a/d − b)₊ = 1 − Σ b

    Source: the least favourable pair of two contamination neighbourhoods, Huber, Annals of Mathematical Statistics 36
    (1965), 1753–1758; Huber and Strassen, Annals of Statistics 1 (1973), 251–263.
    """
    c_N, inverse_d_N = _level(a_NE, b_NE), _level(b_NE, a_NE)
    p_NE = np.maximum(a_NE, _scaled(c_N, b_NE))
    q_NE = np.maximum(b_NE, _scaled(inverse_d_N, a_NE))
    with np.errstate(invalid="ignore", over="ignore"):  # a product that overflows is above 1
        meet = (np.maximum(a_NE, b_NE).sum(-1) <= 1.0) | (c_N * inverse_d_N >= 1.0)
    both_NE = _common(a_NE, b_NE)
    p_NE, q_NE = (np.where(meet[:, None], both_NE, x) for x in (p_NE, q_NE))
    return p_NE, q_NE


def _level(a_NE: Floats, b_NE: Floats) -> Floats:
    """The c of each row with ``Σ (c·b − a)₊ = 1 − Σ a``; ∞ where b is 0 everywhere and something is missing."""
    missing = np.maximum(1.0 - a_NE.sum(-1), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(b_NE > 0, a_NE / b_NE, np.inf)
        order = np.argsort(ratio, axis=-1)
        ratio, a, b = (np.take_along_axis(x, order, -1) for x in (ratio, a_NE, b_NE))
        # With the first m events raised to c·b: c = (missing + Σ a) / Σ b, which must lie between their ratios.
        level = (missing[:, None] + np.cumsum(a, -1)) / np.cumsum(b, -1)
        following = np.concatenate((ratio[:, 1:], np.full_like(ratio[:, :1], np.inf)), -1)
        fits = (level <= following) & (ratio < np.inf)
    first = np.argmax(fits, -1)
    found = np.take_along_axis(level, first[:, None], -1)[:, 0]
    level_N: Floats = np.where(fits.any(-1), found, np.where(missing > 0, np.inf, 0.0))
    return level_N


def _scaled(level_N: Floats, x_NE: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        scaled: Floats = np.where(x_NE > 0, level_N[:, None] * x_NE, 0.0)
    return scaled


def _common(a_NE: Floats, b_NE: Floats) -> Floats:
    """A distribution of both sets, where they meet: the larger of both, what is missing to 1 spread alike."""
    most = np.maximum(a_NE, b_NE)
    total = most.sum(-1, keepdims=True)
    shared: Floats = np.where(total > 0, most / np.maximum(total, 1e-300), 1.0 / most.shape[-1])
    return shared


def kl(p_NE: Floats, q_NE: Floats) -> Floats:
    """``Σ p log(p / q)`` of each row, in nats; an event that q rules out and p does not has the logarithm −104 in q, as
    in the objectives."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p, log_q = np.log(p_NE), np.maximum(np.log(q_NE), RULED_OUT)
        total: Floats = np.where(p_NE > 0, p_NE * (log_p - log_q), 0.0).sum(-1)
    return total
