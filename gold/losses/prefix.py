"""Divergences on pieces: the teacher's next token truncated to its longest prefix in the student's vocabulary."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from gold.align.batch import AlignedBatch
from gold.kernels.projection import piece_divergence
from gold.losses.divergences import Divergence, form_of
from gold.losses.supports import HalfLife, Where, fading
from gold.losses.types import Loss, LossInputs


def prefix_divergence(
    inputs: LossInputs,
    divergence: Divergence,
    *,
    interior: bool = True,
    white_space: Literal["keep", "mask"] = "keep",
    where: Where = "everywhere",
    half_life: HalfLife | None = None,
) -> Loss:
    """Divergence between next-token distributions over pieces, the student tokens that are the longest prefix of some
    teacher token: every token of either side counts as its longest prefix that is a piece.

    Tokens that began earlier and cross the state count with their remaining bytes. Where the student sampled a token
    for which the teacher needs several, the probability of these moves from the piece of the first to that token.
    ``interior``: also at student states inside the teacher's tokens; needed by a student with shorter tokens.
    ``white_space``: with ``mask``, states at which the teacher expects only white space add 0 to the sum but stay in
    the count. Part ``white_space_share`` counts them.

    Source: prefix marginals for distillation, 2607.22334; the pieces and the cover terms as derived in docs/method.md.
    """
    at = prefix_positions(inputs.batch, interior, where)
    pieces = inputs.batch.piece_batch(at)
    weight = None if half_life is None else fading(inputs.batch.byte_offsets[at], half_life)
    if inputs.importance is not None:
        # Which piece has the probability of the sampled token depends on that token.
        state = inputs.importance.of_positions(inputs.batch, own_token=True)[at]
        weight = state if weight is None else weight * state
    total, parts = piece_divergence(
        inputs.student,
        inputs.teacher_rows,
        pieces,
        form_of(divergence) or divergence,
        mask_white=white_space == "mask",
        weight=weight,
    )
    return Loss(total, {_METRICS[name]: part.sum() for name, part in parts.items()})


_METRICS = {
    "unresolved": "unresolved_mass",
    "residual": "teacher_unmatched_mass",
    "observed": "moved_to_sampled_mass",
    "white": "white_space_share",
}
"""Parts of ``piece_divergence`` by the name of their metric."""


def prefix_states(
    batch: AlignedBatch,
    interior: bool = True,
    where: Where = "everywhere",
    half_life: HalfLife | None = None,
    **_: Any,
) -> float:
    """Number of student states compared on pieces, weighted."""
    return float(fading(batch.byte_offsets[prefix_positions(batch, interior, where)], half_life).sum())


def prefix_positions(batch: AlignedBatch, interior: bool, where: Where) -> Tensor:
    """Byte positions, ascending, at which a student state is compared: where a teacher state begins too, or, with
    ``interior``, everywhere; ``one_to_one``: only where the next token is a one-to-one chunk, or the text ends."""
    mine, theirs = batch.row_positions
    if where == "one_to_one":
        return torch.nonzero(mine & theirs & batch.one_to_one_bytes)[:, 0]
    return torch.nonzero(mine if interior else mine & theirs)[:, 0]
