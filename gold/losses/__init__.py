"""Objectives: pure functions from a microbatch to a sum with named parts, and the table of them by name.

``reverse_kl`` is KL(student ‖ teacher), ``forward_kl`` is KL(teacher ‖ student).
"""

from gold.losses.divergences import (
    DIVERGENCES,
    Divergence,
    entropy_aware_kl,
    forward_kl,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
)
from gold.losses.table import OBJECTIVES, SUPPORTS, DivergenceRow, Objective, Row, find
from gold.losses.types import Loss, LossInputs, Need

__all__ = [
    "DIVERGENCES",
    "OBJECTIVES",
    "SUPPORTS",
    "Divergence",
    "DivergenceRow",
    "Loss",
    "LossInputs",
    "Need",
    "Objective",
    "Row",
    "entropy_aware_kl",
    "find",
    "forward_kl",
    "jsd",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
]
