"""The KL divergence between the next bytes of two models along a text: its value, and a lower bound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gold.bytes.events import STOP_EVENT
from gold.exact.closest import closest_completions, kl
from gold.exact.marginals import Floats, Marginals


@dataclass(frozen=True)
class TextDivergence:
    """Of one text, for each of its compared byte positions, in nats: ``value`` and ``bound`` of the divergence, and
    each side's share of mass of which the next byte is unresolved: at that byte alone (``open``), and there or at any
    byte before it (``strict``)."""

    value: Floats
    bound: Floats
    open_S: Floats
    open_T: Floats
    strict_S: Floats
    strict_T: Floats


def text_divergence(
    student: Marginals, teacher: Marginals, *, forward: bool = False, teacher_stops: bool = True
) -> TextDivergence:
    """KL(student ‖ teacher) of the next event at every byte of a text at which both predict one; ``forward``:
    KL(teacher ‖ student).

    Both are divergences of the closest completions (``closest_completions``) of what is known: for the value, mass that
    was unresolved at an earlier byte has left the text; for the bound, it may have stayed. The bound is never above the
    divergence between the models' next bytes, summed over all tokenizations, and rises with every branch; where nothing
    is unresolved, both are that divergence. ``teacher_stops``: whether the teacher has a stop event.
    """
    at = student.known & teacher.known
    found = {}
    for name in ("local_rest", "strict_rest"):
        sides = [_shares(side, getattr(side, name), at, teacher_stops) for side in (student, teacher)]
        (a, rest_S), (b, rest_T) = sides
        p, q = closest_completions(a, b)
        found[name] = kl(q, p) if forward else kl(p, q), rest_S, rest_T
    (value, open_S, open_T), (bound, strict_S, strict_T) = found["local_rest"], found["strict_rest"]
    return TextDivergence(value, bound, open_S, open_T, strict_S, strict_T)


def _shares(side: Marginals, log_rest: Floats, at: NDArray[np.bool_], stops: bool) -> tuple[Floats, Floats]:
    """The share of each named event and of the rest, [positions, events] and [positions]."""
    named, rest = side.named[at], log_rest[at]
    if not stops:  # that the text ends here is no event of the teacher: it is compared with nothing
        rest = np.logaddexp(rest, named[:, STOP_EVENT])
        named = named.copy()
        named[:, STOP_EVENT] = -np.inf
    whole = np.logaddexp(np.logaddexp.reduce(named, axis=1), rest)
    whole = np.where(np.isfinite(whole), whole, 0.0)
    return np.exp(named - whole[:, None]), np.exp(rest - whole)
