"""Importance weights of texts that older weights of the student sampled, or the same weights in another precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gold.align.batch import AlignedBatch
from gold.kernels.lm_head import token_logp
from gold.kernels.logits import LazyLogits


@dataclass(frozen=True)
class ImportanceWeights:
    """Corrections of the sampling policy for each student row, without gradient.

    ``log_ratio`` [N] is log π(a) − log μ(a) of the row's own id a, in nats, with π the student and μ the policy that
    sampled it; 0 for ids that the student did not sample. A weight is a ratio, at most ``cap``.
    """

    log_ratio: Tensor
    cap: float

    @classmethod
    @torch.no_grad()
    def of(cls, batch: AlignedBatch, student: LazyLogits, cap: float) -> ImportanceWeights:
        """The weights of a batch under the student's current logits.

        Raises: ValueError if a sampled text lacks its sampling log-probabilities.
        """
        target, _ = token_logp(student, batch.student.targets, batch.student.stops)
        log_ratio = target.double() - batch.sampling_logprobs
        return cls(torch.where(batch.sampled_row_mask, log_ratio, 0.0), cap)

    def of_tokens(self) -> Tensor:
        """``min(π(a) / μ(a), cap)`` of each row, [N]: for policy gradients.

        It corrects the choice of the token. That the state before it was reached by another policy is not corrected,
        nor is the reward of later tokens.

        Source: Espeholt et al. 1802.01561, the truncated weights ρ of equation 1.
        """
        return self.log_ratio.exp().clamp(max=self.cap)

    def of_states(self, batch: AlignedBatch) -> Tensor:
        """``min(Π_{j < i} π(a_j) / μ(a_j), cap)`` of each row i, over the rows before it in its text: for divergences
        between next-token distributions.

        Without the cap the expectation over texts of μ of a weighted sum over states is that of the plain sum over
        texts of π, because a state depends only on the tokens before it.
        """
        return self._before(batch).exp().clamp(max=self.cap)

    def of_positions(self, batch: AlignedBatch, own_token: bool = False) -> Tensor:
        """As ``of_states`` for each byte position: over all rows that begin before it, since a byte inside a token
        depends on that token too. ``own_token``: also over the row that begins there, for what depends on its token.
        """
        begins = batch.student.begins
        counts = np.diff(batch.student.position_starts)
        text = np.repeat(np.arange(counts.size), counts)
        position = np.arange(text.size)
        row = np.searchsorted(begins, position, side="right") - 1
        has_row = row >= batch.student.row_starts[:-1][text]
        row = np.maximum(row, 0)
        if not begins.size:
            return torch.ones(text.size, dtype=torch.float64, device=batch.device)
        inside = has_row & (own_token | (begins[row] < position))
        row_P, inside_P, has_row_P = (torch.from_numpy(x).to(batch.device) for x in (row, inside, has_row))
        before = self._before(batch)
        summed = before[row_P] + torch.where(inside_P, self.log_ratio[row_P], 0.0)
        return torch.where(has_row_P, summed, 0.0).exp().clamp(max=self.cap)

    def _before(self, batch: AlignedBatch) -> Tensor:
        """The sum of the log-ratios of the rows before each row in its text, [N]."""
        if not self.log_ratio.numel():
            return self.log_ratio
        after = torch.cumsum(self.log_ratio, 0)
        first = torch.from_numpy(batch.student.row_starts[:-1]).to(batch.device)[batch.row_text]
        total = torch.cat((after.new_zeros(1), after))
        return total[:-1] - total[first]

    def statistics(self, batch: AlignedBatch) -> dict[str, Tensor]:
        """Sums over the sampled rows: |log-ratio|, k3 and the rows above the cap, and their number; and the largest
        ratio.

        k3, ``r − 1 − log r`` with r = π / μ, has the expectation KL(μ ‖ π) under μ.

        Source: Schulman, "Approximating KL Divergence", 2020.
        """
        log_ratio = self.log_ratio[batch.sampled_row_mask]
        ratio = log_ratio.exp()
        largest = ratio.max() if ratio.numel() else ratio.new_zeros(())
        return {
            "ratio_tokens": ratio.new_tensor(float(ratio.numel())),
            "log_ratio": log_ratio.abs().sum(),
            "ratio_k3": (ratio - 1.0 - log_ratio).sum(),
            "ratio_capped": (ratio > self.cap).double().sum(),
            "ratio_max": largest,
        }
