"""Several teachers as one: a linear or log-linear mixture of their distributions over the same events."""

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
    """One more teacher of a microbatch: the same texts in its tokens, and its states."""

    batch: AlignedBatch
    rows: LazyLogits


@dataclass(frozen=True)
class Mix:
    """The names, weights and rule of a mixture of teachers; the weights sum to one."""

    rule: Rule
    weights: dict[str, float]

    def of(self, logq: Sequence[Tensor]) -> Tensor:
        """The mixture of the teachers' log-probabilities, [N, events] each, in the order of the weights."""
        return mixture(logq, list(self.weights.values()), self.rule)


def mixture(logq: Sequence[Tensor], weights: Sequence[float], rule: Rule) -> Tensor:
    """Log-probabilities of a mixture of distributions over the same events, [N, events].

    ``linear``: ``log Σ_i w_i q_i``. ``log_linear``: ``Σ_i w_i log q_i``, normalised: an event with probability 0 under
    one of them has probability 0. The weights are positive; only their ratios matter.

    Raises: ValueError where a log-linear mixture gives every event of a row probability 0.

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

    Padding rows of each teacher's output matrix are dropped first. Rows of the mixture are complete, and on the device
    of the first teacher.
    """
    return MixedLogits(tuple(rows), mix.of, min(size, *(r.width for r in rows)))
