"""The KL divergence between the next bytes of two models along a text: its value, and a lower bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gold.bytes.events import STOP_EVENT
from gold.exact.closest import closest_completions, kl
from gold.exact.marginals import Floats, Marginals


@dataclass(frozen=True)
class ExactText:
    """Of one text, for each of its compared byte positions, in nats: ``value`` and ``bound`` of the divergence; each
    side's share of mass of which the next byte is unresolved at that byte, and its branches per token, rows of stop
    events counted as tokens."""

    value: Floats
    bound: Floats
    open_S: Floats
    open_T: Floats
    branches_S: float
    branches_T: float

    @classmethod
    def of(
        cls, student: Marginals, teacher: Marginals, *, forward: bool = False, teacher_stops: bool = True
    ) -> Self:
        """KL(student ‖ teacher) of the next event at every byte of a text at which both predict one; ``forward``:
        KL(teacher ‖ student).

        Both are divergences of the closest completions (``closest_completions``) of what is known: for the value, mass
        that was unresolved at an earlier byte has left the text; for the bound, it may have stayed. The bound is never
        above the divergence between the models' next bytes, summed over all tokenizations, and rises with every branch;
        where nothing is unresolved, both are that divergence. ``teacher_stops``: whether the teacher has a stop event.
        """
        at = student.known & teacher.known
        found = []
        for name in ("local_rest", "strict_rest"):
            mine, theirs = (
                _shares(side, getattr(side, name), at, teacher_stops) for side in (student, teacher)
            )
            p, q = closest_completions(mine[0], theirs[0])
            found.append((kl(q, p) if forward else kl(p, q), mine[1], theirs[1]))
        (value, open_S, open_T), (bound, _, _) = found
        per_token = (side.branches / max(1, side.rows) for side in (student, teacher))
        return cls(value, bound, open_S, open_T, *per_token)


def unresolved(texts: Sequence[ExactText]) -> dict[str, float]:
    """Measures of some texts: the mean share of unresolved mass of each side over all bytes, and its branches per
    token."""
    if not texts:
        return {}
    return {
        "unresolved_mass": float(np.concatenate([t.open_S for t in texts]).mean()),
        "teacher_unresolved_mass": float(np.concatenate([t.open_T for t in texts]).mean()),
        "branches_per_token": float(np.mean([t.branches_S for t in texts])),
        "teacher_branches_per_token": float(np.mean([t.branches_T for t in texts])),
    }


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
