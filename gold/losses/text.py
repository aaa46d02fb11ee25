"""Supervised learning on texts that the student did not write."""

from __future__ import annotations

from gold.kernels.lm_head import token_loss
from gold.losses.types import Loss, LossInputs


def sft(inputs: LossInputs) -> Loss:
    """Negative log-likelihood of the tokens of completions from a data set, including the stop id.

    With texts of the teacher this is sequence-level distillation.

    Source: Kim and Rush 1606.07947, section 3.2, for the teacher's texts.
    """
    batch = inputs.batch
    given = (~batch.sampled_row_mask).float()
    return Loss(token_loss(inputs.student, batch.student.targets, given, batch.student.stops))
