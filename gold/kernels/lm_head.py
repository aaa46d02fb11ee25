"""Losses and gradients from lazy logits, one block of rows at a time.

Logits exist for one block of rows only. If a loss is a sum over blocks (``summed``), each block's gradient is computed
with its value and the logits are freed; if values of all rows are needed first (``recomputed``), the backward pass
computes the logits again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gold.kernels import reference
from gold.kernels.backends import kernel_for
from gold.kernels.logits import HeadLogits, Index, LazyLogits, SummedWeight, spans

Work = Callable[..., tuple[Tensor, ...]]


def recomputed(function: Callable[[LazyLogits], tuple[Tensor, ...]], rows: LazyLogits) -> tuple[Tensor, ...]:
    """``function(rows)``, with activation checkpointing: intermediate tensors are recomputed in the backward pass,
    maybe in another thread, so ``function`` uses kernels from ``kernel_for``."""
    if not torch.is_grad_enabled():
        return function(rows)

    def work(*tensors: Tensor) -> tuple[Tensor, ...]:
        return function(rows.with_tensors(*tensors))

    result: tuple[Tensor, ...] = checkpoint(
        work, *rows.tensors, use_reentrant=False, preserve_rng_state=False
    )
    return result


def summed(
    function: Work, rows: LazyLogits, blocks: Sequence[tuple[Index, Any]], *others_N: Tensor
) -> tuple[Tensor, ...]:
    """The sum over blocks of the first result of ``function``, with gradient; the other results concatenated, without.

    For each ``(index, part)`` of ``blocks``, ``function`` is called with ``(rows[index], part, *(x[index] for x in
    others_N))``. A block's gradients with respect to the rows, the head's weights and ``others_N`` are computed
    together with its value, so its logits are computed once and never stored. Only one backward pass is possible.

    Raises: ValueError if the head has parameters that need a gradient and are not in ``rows.weights``.
    """
    inputs = (*rows.tensors, *others_N, *rows.weights)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        if (
            _on(rows, [x[:0].detach() for x in rows.tensors], [w.detach() for w in rows.weights])
            .logits()
            .requires_grad
        ):
            raise ValueError(
                "the head has parameters that need a gradient and are not among the rows' weights"
            )
        result: tuple[Tensor, ...] = _Summed.apply(function, rows, blocks, *inputs)  # type: ignore[no-untyped-call]
        return result
    return _joined([function(rows.select(i), part, *(x[i] for x in others_N)) for i, part in blocks])


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Work, rows: LazyLogits, blocks: Sequence[tuple[Index, Any]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        by_row = inputs[: len(inputs) - len(rows.weights)]
        count = len(rows.tensors)
        weights = [SummedWeight(w) for w in rows.weights]
        totals = [torch.zeros_like(x) for x in by_row]
        values = []
        for index, part in blocks:
            leaves = [x[index].detach().requires_grad_(x.requires_grad) for x in by_row]
            with torch.enable_grad():
                value, *others = function(_on(rows, leaves[:count], weights), part, *leaves[count:])
                if value.requires_grad:
                    value.backward()
            values.append(tuple(x.detach() for x in (value, *others)))
            for total, leaf in zip(totals, leaves, strict=True):
                if leaf.grad is not None:
                    total[index] += leaf.grad
            for weight in weights:
                weight.add_grad()
        ctx.totals, ctx.dtypes = [*totals, *(w.total() for w in weights)], [x.dtype for x in inputs]
        total, *rest = _joined(values)
        ctx.mark_non_differentiable(*rest)
        return total, *rest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[3:]
        if ctx.totals is None:
            raise RuntimeError(
                "only one backward pass of this loss is possible: the first one used up its gradients"
            )
        totals, ctx.totals = ctx.totals, None
        grads = [
            total.mul_(grad.to(total)).to(dtype) if need else None
            for total, dtype, need in zip(totals, ctx.dtypes, needed, strict=True)
        ]
        return None, None, None, *grads


def _on(rows: LazyLogits, tensors: Sequence[Tensor], weights: Sequence[Any]) -> LazyLogits:
    """The rows with other tensors and other weights of the head."""
    rows = rows.with_tensors(*tensors)
    return replace(rows, weights=tuple(weights)) if isinstance(rows, HeadLogits) else rows


def _joined(values: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    first, *rest = zip(*values, strict=True)
    return torch.stack(first).sum(), *(torch.cat(column) for column in rest)


def token_logp(rows: LazyLogits, target_N: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target token (0 where the target is −1), and of the stop event, in nats: two
    [N]."""
    target, stop, _ = token_statistics(rows, target_N, stops)
    return target, stop


def token_statistics(rows: LazyLogits, target_N: Tensor, stops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``token_logp``, and without gradient the entropy of each row, in nats: three [N]."""
    row_statistics, parts = kernel_for(rows.device, reference.row_statistics), []
    for span in spans(len(rows), rows.block_rows):

        def reduce(block: LazyLogits, span: slice = span) -> tuple[Tensor, ...]:
            logits = block.logits()
            return row_statistics(logits, target_N[span], stops, overwrite=block.may_overwrite(logits))[1:]

        parts.append(recomputed(reduce, rows.select(span)))
    target, stop, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return target, stop, entropy


def token_loss(rows: LazyLogits, target_N: Tensor, weight_N: Tensor, stops: Tensor) -> Tensor:
    """``−Σ_n weight[n] log π(target[n])``, in nats."""
    row_statistics = kernel_for(rows.device, reference.row_statistics)

    def loss(block: LazyLogits, span: slice) -> tuple[Tensor, ...]:
        logits = block.logits()
        _, logp, *_ = row_statistics(logits, target_N[span], stops, overwrite=block.may_overwrite(logits))
        return (-(weight_N[span] * logp).sum(),)

    blocks = [(span, span) for span in spans(len(rows), rows.block_rows)]
    return summed(loss, rows, blocks)[0]
