"""Several teachers as one: a linear or a log-linear mixture of their distributions over the same events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gold.align.batch import AlignedBatch
from gold.kernels.logits import LazyLogits, MixedLogits

Rule = Literal["linear", "log_linear"]


@dataclass(frozen=True)
class OtherTeacher:
    """One more teacher of a microbatch: the same texts as it reads them, and its states over them."""

    batch: AlignedBatch
    rows: LazyLogits


@dataclass(frozen=True)
class Mix:
    """Which teachers become one distribution, by name, and how; the weights sum to one."""

    rule: Rule
    weights: dict[str, float]

    def of(self, logq: Sequence[Tensor]) -> Tensor:
        """The mixture of the teachers' log-probabilities, [N, events] each, in the order of the weights."""
        return mixture(logq, list(self.weights.values()), self.rule)


def mixture(logq: Sequence[Tensor], weights: Sequence[float], rule: Rule) -> Tensor:
    """Log-probabilities of a mixture of distributions over the same events, [N, events].

    ``linear``: ``log Σ_i w_i q_i``. ``log_linear``: ``Σ_i w_i log q_i``, normalised: what one of them rules out has
    probability 0. The weights are positive; only their ratios count.

    Raises: ValueError where a log-linear mixture leaves no event of a row.

    Source: Genest and Zidek, Statistical Science 1 (1986), 114–135: the linear and the logarithmic opinion pool.
    """
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    if rule == "linear":
        joint = torch.stack([q + float(w.log()) for q, w in zip(logq, share, strict=True)])
        return torch.logsumexp(joint, dim=0)
    pooled = torch.stack([q * float(w) for q, w in zip(logq, share, strict=True)]).sum(0)
    norm = torch.logsumexp(pooled, dim=-1, keepdim=True)
    if torch.isneginf(norm).any():
        raise ValueError("a log-linear mixture of distributions that share no event")
    return pooled - norm


def mixed_rows(rows: Sequence[LazyLogits], size: int, mix: Mix) -> LazyLogits:
    """Rows of teachers that share one vocabulary of ``size`` ids, as rows of their mixture.

    Each teacher's rows of the output matrix that no id has are left out first. Rows of the mixture are whole, and on
    the device of the first teacher's.
    """
    return MixedLogits(tuple(rows), mix.of, min(size, *(r.width for r in rows)))
