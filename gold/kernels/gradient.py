"""Autograd functions for kernels that compute their own gradients.

Both take a function that computes the results and returns its backward, so that each kernel is one function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Results = tuple[Tensor, ...]
Backward = Callable[..., None]


def with_backward(
    rows: Tensor, compute: Callable[[Tensor], tuple[Results, Backward]], overwrite: bool, constant: int = 0
) -> Any:
    """The results of ``compute(rows)``, differentiable with respect to ``rows``.

    ``compute`` returns the results and a backward function, called with the rows, the tensor to write the gradient to,
    and the gradients of the results. ``overwrite``: the gradient is written to the memory of the rows. The last
    ``constant`` results have no gradient.
    """
    results = _WithBackward.apply(rows, compute, overwrite, constant)  # type: ignore[no-untyped-call]
    return results if len(results) > 1 else results[0]


def with_gradient(compute: Callable[[bool], tuple[Results, tuple[Tensor, ...]]], *inputs: Tensor) -> Any:
    """The results of ``compute(wanted)``, the first of which is differentiable with respect to ``inputs``.

    ``compute`` returns the results and, where ``wanted``, the gradients of the sum of the first result with respect to
    each input, computed in the forward pass.
    """
    results = _WithGradient.apply(compute, *inputs)  # type: ignore[no-untyped-call]
    return results if len(results) > 1 else results[0]


class _WithBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, compute: Any, overwrite: bool, constant: int) -> Results:
        results: Results
        results, ctx.write_gradient = compute(rows.detach())
        ctx.overwrite, ctx.given = overwrite, len(results) - constant
        ctx.save_for_backward(rows)
        if constant:
            ctx.mark_non_differentiable(*results[-constant:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        out = rows.detach() if ctx.overwrite else torch.empty_like(rows)
        ctx.write_gradient(rows.detach(), out, *(g.contiguous() for g in grads[: ctx.given]))
        return out, None, None, None


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Any, *inputs: Tensor) -> Results:
        results: Results
        results, ctx.gradients = compute(any(ctx.needs_input_grad))
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if bool((scale == 1.0).all()):
            return None, *ctx.gradients
        wide = scale[:, None]
        return None, *(g * (wide if g.dim() > 1 else scale).to(g.dtype) for g in ctx.gradients)
