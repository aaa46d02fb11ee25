"""Policy gradients: an advantage for each token that the student sampled, and nothing that it did not."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from gold.kernels.linear import byte_tables
from gold.losses.view import (
    Loss,
    Scores,
    View,
    possible,
    sequence_logp,
    student_scores,
    teacher_scores,
)

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Baseline = Literal["none", "others"]


def span_pg(
    view: View,
    *,
    clip: Positive | None = None,
    baseline: Baseline = "none",
    importance_cap: Positive | None = None,
    noncanonical_penalty: NotNegative = 0.0,
) -> Loss:
    """Policy gradient of the reverse KL from log-probabilities of given tokens alone, span by span.

    Every student token of span c gets the advantage ``A = L_T(c) − L_S(c)``, the difference of both sides' summed
    log-probabilities of the same bytes; the loss is ``−Σ A log π(a)``. No credit from later spans, no gradient through
    the advantage. Unbiased for the sum of the spans' reverse KL, because a span's end is known when it is reached.

    The options are those of ``policy_loss``.

    Source: Lu, "On-Policy Distillation", Thinking Machines 2025, for one token per span; Gu et al. 2306.08543.
    """
    batch = view.batch
    span_S, span_T, spans = batch.spans
    mine, theirs = student_scores(view), teacher_scores(view)
    with torch.no_grad():
        total_S = view.backend.chunk_sums(mine.event.detach(), span_S, spans)
        total_T = view.teacher_backend.chunk_sums(theirs.event, span_T, spans).to(total_S)
        advantage_C = total_T - total_S
        inside = span_S >= 0
        advantage = torch.where(inside, advantage_C[span_S.clamp(min=0)], 0.0) if spans else mine.event * 0.0
    total = policy_loss(view, mine, advantage, inside, clip, baseline, importance_cap, noncanonical_penalty)
    logp = sequence_logp(batch, mine, theirs)
    return Loss(total, {"span_reverse_kl": -advantage_C.sum()}, logp)


def token_pg(
    view: View,
    *,
    horizon: Literal["text", "span"] = "text",
    clip: Positive | None = None,
    baseline: Baseline = "none",
    importance_cap: Positive | None = None,
    noncanonical_penalty: NotNegative = 0.0,
) -> Loss:
    """Policy gradient of the reverse KL token by token, from the teacher's probability of the bytes that each adds.

    With P the teacher's probability that its text begins with given bytes, all tokens that reach across their end
    counted, token i has the reward ``r_i = log P(to its end) − log P(to its start) − log π(a_i)``, the stop event ``log
    P(text, stop) − log P(text) − log π(stop)``; the first two are sums over the teacher's byte table. An advantage is
    all reward from its token on, ``A_i = Σ_{j ≥ i} r_j``, to the end of the text or of its span; the loss is ``−Σ A log
    π(a)``. One reward alone is no divergence: prefixes are nested, so that short tokens would always seem better.

    The options are those of ``policy_loss``.

    Source: as for ``span_pg``; the probability of a prefix is that of Phan et al. 2410.09303.
    """
    batch = view.batch
    mine = student_scores(view)
    with torch.no_grad():
        table, log_target, log_stop = byte_tables(view.teacher_rows, batch.layout_T, view.teacher_backend)
        position, row, event = (x.to(table.device) for x in batch.path)
        rows = mine.event.shape[0]
        told = batch.told_path.to(table.device)
        step = torch.where(told, possible(table[position, event]), 0.0)
        gained = view.teacher_backend.chunk_sums(step, row, rows).to(mine.event)
        reward = gained - mine.event.detach()
        inside = batch.told_rows
        group = batch.row_text if horizon == "text" else batch.spans[0]
        inside = inside & (group >= 0)
        advantage = _reward_to_go(torch.where(inside, reward, 0.0), group)
    total = policy_loss(view, mine, advantage, inside, clip, baseline, importance_cap, noncanonical_penalty)
    theirs = Scores.of(log_target, log_stop, batch.target_T < 0)
    logp = sequence_logp(batch, mine, theirs)
    return Loss(total, {"span_reverse_kl": -torch.where(inside, reward, 0.0).sum()}, logp)


def reward(view: View, *, importance_cap: Positive | None = None) -> Loss:
    """Policy gradient of a task reward: ``−Σ A log π(a)`` over sampled tokens, the stop id included, with A the reward
    of the rollout less its group's mean, over the group's standard deviation.

    Source: Shao et al. 2402.03300, section 4.1, without clipping: rollouts are used once, by the policy that made them.
    """
    batch = view.batch
    mine = student_scores(view)
    given = torch.tensor([t.advantage for t in batch.texts], dtype=mine.event.dtype, device=mine.event.device)
    # The sampled id itself, of several stop ids the one that was drawn.
    mine = Scores(mine.target, mine.target)
    advantage = given[batch.row_text]
    return Loss(policy_loss(view, mine, advantage, batch.sampled_row_mask, None, "none", importance_cap, 0.0))


def policy_loss(
    view: View,
    mine: Scores,
    advantage: Tensor,
    inside: Tensor,
    clip: float | None,
    baseline: Baseline,
    importance_cap: float | None,
    noncanonical_penalty: float,
) -> Tensor:
    """``−Σ w A log π(a)`` over the rows ``inside``, without gradient through w and A.

    ``baseline`` "others": A less its mean over the other texts of the microbatch at the same token of theirs.
    ``noncanonical_penalty``: nats taken off A at tokens that the student's tokenizer would not have put there.
    ``clip``: A is kept within ± that. ``importance_cap``: w is π(a) over the probability that a was drawn with, at most
    that; else 1. The order is this one.
    """
    batch = view.batch
    with torch.no_grad():
        if baseline == "others":
            advantage = advantage - _mean_of_others(advantage, inside, view)
        if noncanonical_penalty:
            advantage = advantage - noncanonical_penalty * (~batch.canonical_rows).to(advantage)
        if clip is not None:
            advantage = advantage.clamp(-clip, clip)
        if importance_cap is not None:
            ratio = torch.exp(mine.target.detach() - batch.drawn_logp.to(advantage))
            advantage = advantage * ratio.clamp(max=importance_cap)
    return -(advantage[inside] * mine.event[inside]).sum()


def _mean_of_others(advantage: Tensor, inside: Tensor, view: View) -> Tensor:
    """For each row the mean over rows of other texts with the same number in their text; 0 where there is none."""
    number = view.batch.row_number
    size = int(number.max()) + 1 if number.numel() else 0
    weight = inside.to(advantage)
    count, total = (
        view.backend.chunk_sums(x, number, size)[number] - x for x in (weight, weight * advantage)
    )
    return torch.where(count > 0, total / count.clamp(min=1.0), 0.0)


def _reward_to_go(reward: Tensor, group: Tensor) -> Tensor:
    """``out[i] = Σ_{j ≥ i} reward[j]`` over the rows of one group, which are consecutive."""
    if not reward.numel():
        return reward
    after = torch.flip(torch.cumsum(torch.flip(reward.double(), (0,)), 0), (0,))
    last = torch.ones_like(group, dtype=torch.bool)
    last[:-1] = group[1:] != group[:-1]
    ends = torch.nonzero(last)[:, 0]
    beyond = torch.cat((after, after.new_zeros(1)))[ends + 1]
    which = torch.cumsum(last.long(), 0) - last.long()
    return (after - beyond[which]).to(reward)
