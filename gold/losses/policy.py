"""Policy gradients: an advantage for each token that the student sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from gold.kernels import chunk_sums
from gold.kernels.tables import byte_tables
from gold.losses.types import (
    Loss,
    LossInputs,
    TargetLogp,
    possible,
    sequence_logp,
    student_target_logp,
    teacher_target_logp,
)

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Baseline = Literal["none", "others"]
Horizon = Literal["text", "span", "conversation"]


def span_pg(
    inputs: LossInputs,
    *,
    clip: Positive | None = None,
    baseline: Baseline = "none",
    importance_cap: Positive | None = None,
    noncanonical_penalty: NotNegative = 0.0,
) -> Loss:
    """Policy gradient of the reverse KL from log-probabilities of given tokens only, span by span.

    Every student token of span c gets the advantage ``A = L_T(c) − L_S(c)``, the difference of both sides' summed
    log-probabilities of the same bytes; the loss is ``−Σ A log π(a)``. No credit from later spans, no gradient through
    the advantage. Unbiased for the sum of the spans' reverse KL, because a span's end is known once it is reached.

    The options are those of ``policy_loss``.

    Source: Lu, "On-Policy Distillation", Thinking Machines 2025, for one token per span; Gu et al. 2306.08543.
    """
    mine, theirs = student_target_logp(inputs), teacher_target_logp(inputs)
    credit = span_credit(inputs, mine.event.detach(), theirs)
    total = policy_loss(inputs, mine, credit, "span_pg", clip, baseline, importance_cap, noncanonical_penalty)
    return Loss(total, {"span_reverse_kl": -credit.reward.sum()}, sequence_logp(inputs.batch, mine, theirs))


def token_pg(
    inputs: LossInputs,
    *,
    horizon: Horizon = "text",
    clip: Positive | None = None,
    baseline: Baseline = "none",
    importance_cap: Positive | None = None,
    noncanonical_penalty: NotNegative = 0.0,
) -> Loss:
    """Policy gradient of the reverse KL token by token, from the teacher's probability of the bytes that each token
    adds.

    With P the teacher's probability that its text begins with given bytes, including all tokens that cross their end,
    token i has the reward ``r_i = log P(to its end) − log P(to its start) − log π(a_i)``, the stop event ``log P(text,
    stop) − log P(text) − log π(stop)``; the first two are sums over the teacher's byte table. An advantage is the sum
    of rewards from its token on, ``A_i = Σ_{j ≥ i} r_j``, to the end of the text, of its span, or, in a conversation of
    several turns, of the last turn; the loss is ``−Σ A log π(a)``. A single reward is not a divergence: prefixes are
    nested, so short tokens would always seem better.

    The options are those of ``policy_loss``.

    Source: as for ``span_pg``; the probability of a prefix is that of Phan et al. 2410.09303.
    """
    mine = student_target_logp(inputs)
    credit, theirs = token_credit(inputs, mine.event.detach(), horizon)
    total = policy_loss(
        inputs, mine, credit, "token_pg", clip, baseline, importance_cap, noncanonical_penalty
    )
    return Loss(total, {"span_reverse_kl": -credit.reward.sum()}, sequence_logp(inputs.batch, mine, theirs))


def reward(inputs: LossInputs, *, importance_cap: Positive | None = None) -> Loss:
    """Policy gradient of a task reward: ``−Σ A log π(a)`` over sampled tokens, including the stop id, with A the reward
    of the rollout minus its group's mean, divided by the group's standard deviation.

    Source: Shao et al. 2402.03300, section 4.1, without clipping: rollouts are used once, by the policy that sampled
    them.
    """
    batch = inputs.batch
    mine = student_target_logp(inputs)
    given = torch.tensor([t.advantage for t in batch.texts], dtype=mine.event.dtype, device=mine.event.device)
    # The sampled id itself: of several stop ids the one that was drawn.
    mine = TargetLogp(mine.target, mine.target)
    inside = batch.sampled_row_mask
    advantage = torch.where(inside, given[batch.row_text], 0.0)
    credit = Credit(advantage, advantage, torch.where(inside, batch.row_text, -1))
    return Loss(policy_loss(inputs, mine, credit, "reward", None, "none", importance_cap, 0.0))


@dataclass(frozen=True)
class Credit:
    """Credit of each student row, [N] each: its ``advantage`` in nats, the ``reward`` of the row itself, and the
    ``horizon``, the number from 0 of the text or span that its advantage covers; −1: the row is not counted."""

    advantage: Tensor
    reward: Tensor
    horizon: Tensor

    @property
    def inside(self) -> Tensor:
        """Which rows are counted."""
        return self.horizon >= 0


@torch.no_grad()
def span_credit(inputs: LossInputs, event: Tensor, theirs: TargetLogp) -> Credit:
    """The credit of ``span_pg``, given the student's log-probability of each row's target; a span's reward is at its
    last row."""
    span_S, span_T, spans = inputs.batch.spans
    if not spans:
        return Credit(event * 0.0, event * 0.0, span_S)
    total_S = chunk_sums(event, span_S, spans)
    total_T = chunk_sums(theirs.event, span_T, spans).to(total_S)
    inside = span_S >= 0
    advantage = torch.where(inside, (total_T - total_S)[span_S.clamp(min=0)], 0.0)
    last = inside.clone()
    last[:-1] &= span_S[1:] != span_S[:-1]
    return Credit(advantage, torch.where(last, advantage, 0.0), span_S)


@torch.no_grad()
def token_credit(inputs: LossInputs, event: Tensor, horizon: Horizon) -> tuple[Credit, TargetLogp]:
    """The credit of ``token_pg``, given the student's log-probability of each row's target, and the teacher's scores.
    Rows that the teacher does not observe have no reward themselves, only that of later rows."""
    batch = inputs.batch
    table, target, stop = byte_tables(inputs.teacher_rows, batch.teacher.layout)
    position, row, happened = (x.to(table.device) for x in batch.path)
    step = torch.where(batch.observed_path.to(table.device), possible(table[position, happened]), 0.0)
    gained = chunk_sums(step, row, event.shape[0]).to(event)
    covered = batch.spans[0] if horizon == "span" else batch.row_text
    covered = torch.where(batch.sampled_row_mask, covered, -1)
    reward = torch.where(batch.observed_rows & (covered >= 0), gained - event, 0.0)
    advantage = reward_to_go(reward, covered)
    if horizon == "conversation" and inputs.later is not None:
        advantage = advantage + torch.where(covered >= 0, inputs.later.to(advantage)[batch.row_text], 0.0)
    credit = Credit(advantage, reward, covered)
    return credit, TargetLogp.of(target, stop, batch.teacher.targets < 0)


def sampled_credit(inputs: LossInputs, name: str, options: Mapping[str, Any]) -> Credit:
    """The credit of ``span_pg`` or ``token_pg`` under the sampling policy, used for baselines before the student's
    states are computed. ``inputs.student`` is not used."""
    event = inputs.batch.sampling_logprobs
    if name == "span_pg":
        return span_credit(inputs, event, teacher_target_logp(inputs))
    return token_credit(inputs, event, options["horizon"])[0]


def returns_of_texts(inputs: LossInputs) -> Tensor:
    """The summed rewards of ``token_pg`` of each text under the sampling policy, [texts] in nats."""
    credit = token_credit(inputs, inputs.batch.sampling_logprobs, "text")[0]
    return chunk_sums(credit.reward, inputs.batch.row_text, len(inputs.batch.texts))


def means_of_others(
    credits: Sequence[Credit], numbers: Sequence[Tensor], size: int, add_up: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """For each row of each microbatch, the mean advantage of the step's other texts at the same token index; 0 where
    there is none.

    ``numbers`` are the token indices of the rows in their texts, all below ``size``; ``add_up`` sums over processes.
    The baseline is independent of the text, so the expected gradient is unchanged.
    """
    sums = torch.zeros(2, size, dtype=torch.float64)
    given = [torch.stack((c.inside.double(), c.advantage.double() * c.inside)).cpu() for c in credits]
    places = [number.cpu() for number in numbers]
    for values, place in zip(given, places, strict=True):
        sums.index_add_(1, place, values)
    sums = add_up(sums)
    means = []
    for credit, values, place in zip(credits, given, places, strict=True):
        count, total = sums[:, place] - values
        means.append(torch.where(count > 0, total / count.clamp(min=1.0), 0.0).to(credit.advantage))
    return means


def policy_loss(
    inputs: LossInputs,
    mine: TargetLogp,
    credit: Credit,
    name: str,
    clip: float | None,
    baseline: Baseline,
    importance_cap: float | None,
    noncanonical_penalty: float,
) -> Tensor:
    """``−Σ w A log π(a)`` over the counted rows, without gradient through w and A.

    ``baseline`` "others": A minus its mean over the step's other texts at the same token index, ``inputs.baselines`` of
    this objective; without these the microbatch counts as the step. ``noncanonical_penalty``: nats subtracted from A at
    tokens that the student's tokenizer would not have produced. ``clip``: A is clamped to ± that. ``importance_cap``: w
    is the product, over the rows covered by A, of π(a) over the probability with which a was sampled, at most that;
    else the weight of the row's own token in ``inputs.importance``, or 1. Applied in this order.
    """
    batch, inside, advantage = inputs.batch, credit.inside, credit.advantage
    with torch.no_grad():
        if baseline == "others":
            others = inputs.baselines.get(name)
            if others is None:
                number = batch.row_number
                size = int(number.max()) + 1 if number.numel() else 0
                (others,) = means_of_others([credit], [number], size, lambda sums: sums)
            advantage = advantage - others
        if noncanonical_penalty:
            advantage = advantage - noncanonical_penalty * (~batch.canonical_rows).to(advantage)
        if clip is not None:
            advantage = advantage.clamp(-clip, clip)
        if importance_cap is not None:
            horizons = int(credit.horizon.max()) + 1 if credit.horizon.numel() else 0
            log_ratio = mine.target.detach().double() - batch.sampling_logprobs
            ratio = chunk_sums(log_ratio, credit.horizon, horizons).exp()
            ratio = torch.cat((ratio.clamp(max=importance_cap), ratio.new_zeros(1)))  # the last is for −1
            advantage = advantage * ratio[credit.horizon].to(advantage)
        elif inputs.importance is not None:
            advantage = advantage * inputs.importance.of_tokens().to(advantage)
    return -(advantage[inside] * mine.event[inside]).sum()


def reward_to_go(reward: Tensor, group: Tensor) -> Tensor:
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
