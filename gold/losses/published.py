"""Published objectives, for comparison: each as defined in its paper, summed over the microbatch.

With a shared vocabulary, those that compare tokens are the plain token-level divergence that they extend. Other parts
of the papers' losses (cross-entropy on the text, weight schedules) are separate terms of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gold.align.batch import AlignedBatch
from gold.kernels import chunk_sums
from gold.kernels.chunked import (
    Chunks,
    Projected,
    mean_comparison,
    projected_divergence,
    scaled_comparison,
    sorted_distance,
)
from gold.kernels.lm_head import token_logp
from gold.kernels.logits import LazyLogits
from gold.kernels.shared import SharedEvents
from gold.losses.divergences import Share, form_of, forward_kl, jsd
from gold.losses.policy import Credit, Positive, policy_loss
from gold.losses.supports import states_divergence
from gold.losses.types import Loss, LossInputs, sequence_logp, student_target_logp, teacher_target_logp

EXCEPTIONS: Mapping[str, Mapping[str, str]] = {
    "uld": {
        "2": "probabilities are compared by rank: with one vocabulary too it is no divergence between tokens",
        "6": "tokens have no names: any permutation of a row has distance 0 from it",
        "8a": "row i is compared with row i: a source that is cut elsewhere is out of step with itself",
        "8b": "sorted rows say how sure the teacher is, not of what",
    },
    "gold": {
        "6": "unmatched tokens have no names; with β = 0 or 1 the matched term is a KL divergence between parts of "
        "distributions, which can be negative",
        "8a": "a chunk of several tokens is compared by its last row, and those of two ways to cut it are about "
        "different events",
        "8b": "with β = 1 the matched term is lowest where most of the student's mass has leaked to unmatched tokens",
    },
    "alm": {
        "2": "a chunk is a coin that shows what was sampled or not; what else the rows say is not compared",
        "6": "rows that agree on the sampled chunk, and on nothing else, have divergence 0",
        "8a": "the likelihood of a chunk's tokens is not that of its bytes, since longer tokens could cross its end",
    },
    "x_token": {
        "8a": "a token counts as pieces that a source that is cut elsewhere does not expect there",
    },
}
"""Clauses of the contract that an objective cannot hold by its nature, with the reason."""


def gkd(inputs: LossInputs, *, beta: Share = 0.5) -> Loss:
    """Generalised Jensen–Shannon divergence token by token, for models that share one vocabulary.

    β weighs the teacher in the mixture; 0 is forward KL, 1 reverse KL. Stop ids are ordinary tokens; all padding rows
    of the output matrix are one more.

    Source: Agarwal et al. 2306.13649, equations 1 and 2; at temperature 1.
    """
    return Loss(states_divergence(inputs, partial(jsd, beta=beta)).total)


def opd(inputs: LossInputs, *, clip: Positive | None = None, importance_cap: Positive | None = None) -> Loss:
    """On-policy distillation by policy gradient, for models that share one vocabulary: every sampled token has the
    advantage ``A = log q(a) − log π(a)``, its own negative reverse KL, without credit from later tokens.

    The loss is ``−Σ A log π(a)``, without gradient through A; the options are those of ``policy_loss``. The stop ids
    count as one event.

    Source: Lu, "On-Policy Distillation", Thinking Machines 2025; there A uses the sampling policy, here the current
    one.
    """
    batch = inputs.batch
    mine, theirs = student_target_logp(inputs), teacher_target_logp(inputs)
    with torch.no_grad():
        inside = batch.sampled_row_mask
        advantage = torch.where(inside, theirs.event.to(mine.event) - mine.event, 0.0)
        row = torch.arange(inside.numel(), device=inside.device)
        credit = Credit(advantage, advantage, torch.where(inside, row, -1))
    total = policy_loss(inputs, mine, credit, "opd", clip, "none", importance_cap, 0.0)
    logp = sequence_logp(batch, mine, theirs)
    return Loss(total, sequence_logp=logp, details={"reverse_kl": -advantage.sum()})


def uld(inputs: LossInputs) -> Loss:
    """Universal logit distillation: the L1 distance between both sides' sorted probabilities, token index by token
    index.

    Row i of the student's tokens is compared with row i of the teacher's, up to the shorter length, even if the two
    have read different text: detail ``out_of_step`` counts the positions where they have.

    Source: Boizard et al. 2402.12030, the Wasserstein term of the ULD loss in its closed form for uniform cost; at
    temperature 1. Their loss adds cross-entropy on the text; add an ``sft`` term for it.
    """
    rows_S, rows_T, in_step = _positions(inputs.batch)
    total = sorted_distance(inputs.student.select(rows_S), inputs.teacher_rows.select(rows_T))
    return Loss(total, details={"out_of_step": (~in_step).sum()})


def gold_hybrid(inputs: LossInputs, *, beta: Share = 0.5, matched_share: Share | None = None) -> Loss:
    """General on-policy logit distillation: per chunk, a JSD(β) on tokens of equal bytes plus the sorted L1 distance of
    all other probabilities.

    The row of a chunk with tokens t_1 … t_k is that of its last token times the probability of the tokens before it,
    ``p(t_1) ⋯ p(t_{k−1} | …) · p(· | t_{<k})``, unnormalised. ``matched_share`` weighs the first term, 1 −
    ``matched_share`` the second; default: the share of the teacher's vocabulary that is matched. The stop event is
    matched.

    Source: Patiño et al., "Unlocking On-Policy Distillation for Any Model Family", Hugging Face 2025, with the rows
    that predict the chunk's tokens. Tokens are matched by their bytes, there by their strings.
    """
    batch, pair, divergence = inputs.batch, inputs.batch.vocabularies, partial(jsd, beta=beta)
    if pair.same:
        loss = states_divergence(inputs, divergence)
        share = 1.0 if matched_share is None else matched_share
        return Loss(
            share * loss.total,
            details={"matched": loss.total.detach(), "unmatched": loss.total.detach() * 0.0},
        )
    events, chunks = batch.shared_events, _chunks(batch)
    if matched_share is None:
        matched_share = (events.ids_W.numel() + events.stops_W.numel()) / pair.teacher.size
    row_S, before_S = _last_rows(
        inputs.student, chunks.chunk_S, chunks.count, batch.student.targets, batch.student.stops
    )
    with torch.no_grad():
        row_T, before_T = _last_rows(
            inputs.teacher_rows,
            chunks.chunk_T,
            chunks.count,
            batch.teacher.targets,
            batch.teacher.stops,
        )
    total, matched, unmatched = scaled_comparison(
        inputs.student.select(row_S),
        inputs.teacher_rows.select(row_T),
        before_S,
        before_T,
        events,
        form_of(divergence) or divergence,
        matched_share,
    )
    return Loss(total, details={"matched": matched.sum(), "unmatched": unmatched.sum()})


def alm(inputs: LossInputs, *, temperature: Positive = 100.0) -> Loss:
    """Approximate likelihood matching: per chunk, the KL divergence between two Bernoulli variables whose probabilities
    are each side's likelihood of the chunk's tokens, to the power of 1 / temperature.

    With a the teacher's and b the student's, ``a log(a / b) + (1 − a) log((1 − a) / (1 − b))``. Both log-likelihoods,
    divided by the temperature, are lowered by 1e-6, so that a chunk of probability 1 stays finite. The stop event is a
    chunk.

    Source: Minixhofer et al. 2503.20083, the binarised f-divergence, with f that of KL; the 1e-6 is that of their
    implementation. Chunks are the finest that both tokenizers share, without debiasing for possible continuations.
    """
    batch, chunks = inputs.batch, _chunks(inputs.batch)
    mine, theirs = student_target_logp(inputs), teacher_target_logp(inputs)
    total_S = chunk_sums(mine.event, chunks.chunk_S, chunks.count)
    with torch.no_grad():
        total_T = chunk_sums(theirs.event, chunks.chunk_T, chunks.count).to(total_S)
        log_a = total_T.double() / temperature - _CERTAIN
        a, log_not_a = log_a.exp(), torch.log(-torch.expm1(log_a))
    log_b = total_S.double() / temperature - _CERTAIN
    value = a * (log_a - log_b) + (1.0 - a) * (log_not_a - torch.log(-torch.expm1(log_b)))
    logp = sequence_logp(batch, mine, theirs)
    details = {"log_ratio": (total_S.detach() - total_T).sum()}
    return Loss(value.sum().to(mine.event.dtype), sequence_logp=logp, details=details)


def x_token(inputs: LossInputs, *, variant: Literal["p_kl", "h_kl"] = "p_kl") -> Loss:
    """Forward KL through a sparse matrix from student tokens to teacher tokens, per chunk, between mean rows.

    ``p_kl``: the student's row is projected to the teacher's tokens by the matrix, the stop event to itself; both sides
    are conditioned on the projected tokens. ``h_kl``: each student token is matched with the teacher token of its
    largest weight, if that is at least 0.6; KL on matched tokens, unnormalised, plus the sorted L1 distance of all
    other probabilities. The matrix is ``gold.align.decomposition.token_weights``, and is not learned.

    Source: Sreenivas et al. 2605.21699, P-KL and H-KL, and section 3.2 for the matrix. Their implementation takes means
    over a chunk (of the teacher, of logarithms; here of probabilities on both sides) and keeps the teacher's 8192 most
    probable tokens of a batch; here all projected tokens count, so that a text's loss does not depend on its batch.
    """
    batch, pair = inputs.batch, inputs.batch.vocabularies
    if pair.same:
        return Loss(states_divergence(inputs, forward_kl).total)
    chunks = _chunks(batch)
    kept_S, kept_T = chunks.chunk_S >= 0, chunks.chunk_T >= 0
    sides = inputs.student.select(kept_S), inputs.teacher_rows.select(kept_T)
    rows = Chunks(chunks.chunk_S[kept_S], chunks.chunk_T[kept_T], chunks.count)
    if variant == "h_kl":
        events = SharedEvents(*_tensors(batch, *pair.relaxed_ids), batch.student.stops, batch.teacher.stops)
        total, matched, unmatched = mean_comparison(*sides, rows, events, forward_kl)
        return Loss(total, details={"matched": matched.sum(), "unmatched": unmatched.sum()})
    weights = pair.token_weights
    ids_V, ids_W = _tensors(batch, weights.ids_V, weights.ids_W)
    weight_E = torch.from_numpy(weights.weight_E).to(batch.device)
    projection = Projected(ids_V, ids_W, weight_E, batch.student.stops, batch.teacher.stops)
    total, mass = projected_divergence(*sides, rows, projection, forward_kl)
    return Loss(total, details={"reached": mass.sum()})


_CERTAIN = 1e-6


def paired_positions(batch: AlignedBatch) -> float:
    """Number of token indices that both sides have in each text, the stop event being the last one."""
    return float(_positions(batch)[0].numel())


def whole_chunks(batch: AlignedBatch) -> float:
    """Number of chunks in which both sides have tokens, including stop events."""
    return float(_chunks(batch).count)


def _positions(batch: AlignedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Row i of both sides of every text, up to the shorter length, and whether both have read the same bytes."""
    rows_S, rows_T, in_step = [], [], []
    for text, first_S, first_T in zip(
        batch.texts, batch.student.row_starts[:-1], batch.teacher.row_starts[:-1], strict=True
    ):
        number = np.arange(min(len(text.student), len(text.teacher)) + text.stopped)
        read_S, read_T = (np.append(0, s.ends)[number] for s in (text.student, text.teacher))
        rows_S.append(first_S + number)
        rows_T.append(first_T + number)
        in_step.append(read_S == read_T)
    mine, theirs, step = (
        torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int64)
        for parts in (rows_S, rows_T, in_step)
    )
    return mine.to(batch.device), theirs.to(batch.teacher.device), step.bool()


def _chunks(batch: AlignedBatch) -> Chunks:
    """The chunks in which both sides have tokens, renumbered; rows of other chunks, where one side has only special
    tokens, have −1."""
    chunk_S, chunk_T, count, _ = batch.chunk_index
    there_S, there_T = (torch.bincount(c, minlength=count).to(batch.device) > 0 for c in (chunk_S, chunk_T))
    both = there_S & there_T
    number = torch.where(both, torch.cumsum(both, 0) - 1, -1)
    return Chunks(number[chunk_S], number.to(chunk_T.device)[chunk_T], int(both.sum()))


def _last_rows(
    rows: LazyLogits, chunk: Tensor, count: int, target: Tensor, stops: Tensor
) -> tuple[Tensor, Tensor]:
    """The row of each chunk's last token, and the log-probability of the tokens before it, in nats: two [C]."""
    inside = chunk >= 0
    last = inside.clone()
    last[:-1] &= chunk[1:] != chunk[:-1]
    others = torch.nonzero(inside & ~last)[:, 0]
    logp, _ = token_logp(rows.select(others), target[others], stops)
    before = chunk_sums(logp, chunk[others], count)
    return torch.nonzero(last)[:, 0], before


def _tensors(
    batch: AlignedBatch, ids_V: NDArray[np.int32], ids_W: NDArray[np.int32]
) -> tuple[Tensor, Tensor]:
    """Ids of both sides on their devices."""
    mine, theirs = (torch.from_numpy(ids.astype(np.int64)) for ids in (ids_V, ids_W))
    return mine.to(batch.device), theirs.to(batch.teacher.device)
