"""Supervised learning on texts that the student did not write."""

from __future__ import annotations

import torch

from gold.kernels.linear import token_logp
from gold.losses.view import Loss, View


def sft(view: View) -> Loss:
    """Negative log-likelihood of the tokens of completions that came from a data set, the stop id included. With texts
    of the teacher this is sequence-level distillation.

    Source: Kim and Rush 1606.07947, section 3.2, for the teacher's texts.
    """
    logp, _ = token_logp(view.student, view.batch.target_S, view.batch.stops_S, view.backend)
    return Loss(-torch.where(view.batch.sampled_row_mask, 0.0, logp).sum())
