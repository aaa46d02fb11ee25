"""Every objective: a pure function from a microbatch to a sum, its count, and its named parts; one table at the end.

``reverse_kl`` is KL(student ‖ teacher), ``forward_kl`` is KL(teacher ‖ student). An objective's value is a sum over the
unit that it declares; whoever calls it divides by the count of that unit in the whole optimizer step, so that
accumulation over microbatches and processes equals one large batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from gold.aligned import AlignedBatch
from gold.kernels.linear import Rows, byte_tables, shared_divergence, token_logp
from gold.kernels.tables import common_events

Divergence = Callable[[Tensor, Tensor], Tensor]
Need = Literal["nothing", "tokens", "rows"]
"""What an objective asks of a teacher: nothing, log-probabilities of given tokens, or full rows."""


@dataclass(frozen=True)
class View:
    """One microbatch as a loss sees it: the texts with their index arrays, and both models' states over them.

    ``teacher`` is None for objectives that need no teacher.
    """

    batch: AlignedBatch
    student: Rows
    teacher: Rows | None
    backend: ModuleType
    teacher_backend: ModuleType


@dataclass(frozen=True)
class Loss:
    """Sum of an objective over a microbatch in nats, with gradient.

    ``parts`` are sums over the same unit, without gradient, by name; ``sequence_logp`` both sides' summed
    log-probability of the sampled texts, stop events included, where the objective comes across it.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    sequence_logp: Mapping[str, Tensor] = field(default_factory=dict)


# Divergences between rows of log-probabilities [N, events] -> [N], in nats.


def reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p ‖ q) per row, p the student: ``Σ p (log p − log q)``. Events of probability 0 under p count 0."""
    return _expected(logp, logp - logq)


def forward_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(q ‖ p) per row, q the teacher: ``Σ q (log q − log p)``. Events of probability 0 under q count 0."""
    return _expected(logq, logq - logp)


def jsd(logp: Tensor, logq: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen–Shannon divergence: ``β KL(q ‖ m) + (1 − β) KL(p ‖ m)`` with ``m = β q + (1 − β) p``.

    β = 0 and β = 1, where the formula itself is 0, mean its limits forward KL and reverse KL.

    Source: Agarwal et al. 2306.13649, equation 1.
    """
    if beta == 0.0:
        return forward_kl(logp, logq)
    if beta == 1.0:
        return reverse_kl(logp, logq)
    weight = logp.new_tensor(beta)
    nowhere = torch.isneginf(logp) & torch.isneginf(logq)
    p, q = (x.masked_fill(nowhere, 0.0) for x in (logp, logq))
    logm = torch.logaddexp(p + torch.log1p(-weight), q + torch.log(weight)).masked_fill(nowhere, -torch.inf)
    return beta * _expected(logq, logq - logm) + (1.0 - beta) * _expected(logp, logp - logm)


def _expected(logw: Tensor, value: Tensor) -> Tensor:
    """``Σ exp(logw) · value`` over the last axis; where the weight is 0 the value does not count, whatever it is."""
    weight = torch.exp(logw)
    return (weight * torch.where(weight > 0, value, torch.zeros_like(value))).sum(-1)


# Objectives.


def bytes_divergence(view: View, divergence: Divergence) -> Loss:
    """Divergence between next-byte distributions at every byte of the texts, and at the stop event.

    Each model's rows become one table of byte events on their own; a row is compared on the events that both sides
    resolve, all else being one more event.
    """
    batch = view.batch
    table, log_target, log_stop = byte_tables(view.student, batch.layout_S, view.backend)
    with torch.no_grad():
        table_T, log_target_T, log_stop_T = byte_tables(_rows(view), batch.layout_T, view.teacher_backend)
    at = batch.supervised_bytes
    resolved, resolved_T = batch.layout_S.resolved[at], batch.layout_T.resolved.to(batch.device)[at]
    logp = common_events(table[at], resolved, resolved_T)
    logq = common_events(table_T.to(table)[at], resolved_T, resolved)
    value = divergence(logp, logq)
    with torch.no_grad():
        best = logq.argmax(-1, keepdim=True)
        wanted = logp.gather(1, best)[:, 0].exp()
        parts = {
            "wanted": wanted.sum(),
            "missed": (wanted < 0.01).sum(),
            "rest": logp[:, -1].exp().sum(),
        }
    logp_of_texts = _sequence_logp(batch, (log_target, log_stop), (log_target_T, log_stop_T))
    return Loss(value.sum(), parts, logp_of_texts)


def states_divergence(view: View, divergence: Divergence, rest: str = "bucket") -> Loss:
    """Divergence between next-token distributions at states that have read the same bytes, on the tokens that both
    vocabularies have and the stop event; ``rest``: what else there is is one more event (``bucket``) or is conditioned
    away (``renormalise``). Where both vocabularies are one this is the plain token-level objective of GKD.

    Source: Agarwal et al. 2306.13649, equation 2, for the plain form.
    """
    rows_S, rows_T = view.batch.synced_states
    value, mass = shared_divergence(
        view.student.select(rows_S),
        _rows(view).select(rows_T),
        view.batch.shared_events,
        divergence,
        renormalise=rest == "renormalise",
    )
    return Loss(value.sum(), {"shared_mass": mass.detach().sum()})


def span_pg(view: View) -> Loss:
    """Policy gradient of the reverse KL from log-probabilities of given tokens alone, span by span.

    Every student token of span c gets the advantage ``A = L_T(c) − L_S(c)``, the difference of both sides' summed
    log-probabilities of the same bytes; the loss is ``−Σ A log π(a)``. No credit from later spans, no gradient through
    the advantage. Unbiased for the sum of the spans' reverse KL, because a span's end is known when it is reached.

    Source: Lu, "On-Policy Distillation", Thinking Machines 2025, for one token per span; Gu et al. 2306.08543.
    """
    batch = view.batch
    span_S, span_T, spans = batch.spans
    logp, log_target, log_stop = _event_logp(view.student, batch.target_S, batch.stops_S, _stop_rows(batch))
    with torch.no_grad():
        logq, log_target_T, log_stop_T = _event_logp(
            _rows(view), batch.target_T, batch.stops_T, batch.target_T < 0
        )
        total_S = view.backend.chunk_sums(logp.detach(), span_S, spans)
        total_T = view.teacher_backend.chunk_sums(logq, span_T, spans).to(total_S)
        advantage_C = total_T - total_S
    inside = span_S >= 0
    advantage_S = advantage_C[span_S[inside]]
    logp_of_texts = _sequence_logp(batch, (log_target, log_stop), (log_target_T, log_stop_T))
    parts = {"span_reverse_kl": -advantage_C.sum()}
    return Loss(-(advantage_S * logp[inside]).sum(), parts, logp_of_texts)


def sft(view: View) -> Loss:
    """Negative log-likelihood of the tokens of completions that came from a data set, the stop id included."""
    logp, _ = token_logp(view.student, view.batch.target_S, view.batch.stops_S)
    return Loss(-logp[_rows_from(view.batch, sampled=False)].sum())


def reward(view: View) -> Loss:
    """Policy gradient of a task reward: ``−Σ A log π(a)`` over sampled tokens, the stop id included, with A the reward
    of the rollout less its group's mean, over the group's standard deviation.

    Source: Shao et al. 2402.03300, section 4.1, without clipping: rollouts are used once, by the policy that made them.
    """
    batch = view.batch
    logp, _ = token_logp(view.student, batch.target_S, batch.stops_S)
    advantage = torch.tensor([t.advantage for t in batch.texts], dtype=logp.dtype, device=logp.device)
    sampled = _rows_from(batch, sampled=True)
    return Loss(-(advantage[batch.row_text] * logp)[sampled].sum())


def _rows(view: View) -> Rows:
    if view.teacher is None:
        raise ValueError("this objective needs a teacher's rows, and the view has no teacher")
    return view.teacher


def _rows_from(batch: AlignedBatch, sampled: bool) -> Tensor:
    chosen = torch.tensor([t.sampled is sampled for t in batch.texts], dtype=torch.bool, device=batch.device)
    return chosen[batch.row_text]


def _stop_rows(batch: AlignedBatch) -> Tensor:
    """Which student rows predict the stop event."""
    stop = torch.zeros(int(batch.row_starts[-1]), dtype=torch.bool, device=batch.device)
    last = [int(end) - 1 for end, text in zip(batch.row_starts[1:], batch.texts, strict=True) if text.stopped]
    stop[last] = True
    return stop


def _event_logp(rows: Rows, target: Tensor, stops: Tensor, is_stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_target, log_stop = token_logp(rows, target, stops)
    return torch.where(is_stop, log_stop, log_target), log_target, log_stop


def _sequence_logp(
    batch: AlignedBatch, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Sums over sampled texts of both sides' log-probability, stop event included."""
    parts = {}
    for name, (log_target, log_stop), is_stop, starts in (
        ("student_logp", student, _stop_rows(batch), batch.row_starts),
        ("teacher_logp", teacher, batch.target_T < 0, batch.teacher_row_starts),
    ):
        logp = torch.where(is_stop, log_stop.detach(), log_target.detach())
        sums = [
            logp[int(lo) : int(hi)].sum()
            for lo, hi, text in zip(starts[:-1], starts[1:], batch.texts, strict=True)
            if text.sampled
        ]
        parts[name] = torch.stack(sums).sum() if sums else logp.new_zeros(())
    return parts


def supervised_bytes(batch: AlignedBatch) -> int:
    """Number of byte positions, stop events included, where both sides say what comes next."""
    return int(batch.supervised_bytes.numel())


def synced_states(batch: AlignedBatch) -> int:
    """Number of states at which both sides have read the same bytes."""
    return int(batch.synced_states[0].numel())


def span_tokens(batch: AlignedBatch) -> int:
    """Number of student tokens in spans, stop ids included."""
    return int((batch.spans[0] >= 0).sum())


def data_tokens(batch: AlignedBatch) -> int:
    """Number of student tokens of completions from a data set, stop ids included."""
    return sum(len(t.ids) for t in batch.texts if not t.sampled)


def sampled_tokens(batch: AlignedBatch) -> int:
    """Number of student tokens of sampled completions, stop ids included."""
    return sum(len(t.ids) for t in batch.texts if t.sampled)


@dataclass(frozen=True)
class Objective:
    """A row of the table: the function, what it needs of a teacher, the unit whose count divides its sum."""

    name: str
    loss: Callable[..., Loss]
    needs: Need
    unit: str
    count: Callable[[AlignedBatch], int]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, view: View) -> Loss:
        """The objective's sum over a microbatch."""
        return self.loss(view, **self.options)


DIVERGENCES: Mapping[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
}
SUPPORTS = ("bytes", "shared", "tokens")


def _on_support(
    name: str, support: str | None = None, beta: float | None = None, rest: str | None = None
) -> Objective:
    """A divergence on ``bytes`` (the default), on ``shared`` tokens, or on the ``tokens`` of one vocabulary."""
    function = DIVERGENCES[name]
    divergence = function if beta is None else partial(function, beta=beta)
    if support in (None, "bytes"):
        return Objective(name, bytes_divergence, "rows", "byte", supervised_bytes, {"divergence": divergence})
    if support not in SUPPORTS:
        raise KeyError(support)
    options = {"divergence": divergence, "rest": rest or "bucket"}
    return Objective(name, states_divergence, "rows", "state", synced_states, options)


OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    "reverse_kl": partial(_on_support, "reverse_kl"),
    "forward_kl": partial(_on_support, "forward_kl"),
    "jsd": partial(_on_support, "jsd"),
    "span_pg": partial(Objective, "span_pg", span_pg, "tokens", "token", span_tokens),
    "sft": partial(Objective, "sft", sft, "nothing", "token", data_tokens),
    "reward": partial(Objective, "reward", reward, "nothing", "token", sampled_tokens),
}
"""Every objective by name: call the entry, with options where it has some, for one that can be applied to a view."""
