"""Next-token logits of a sequence of positions, computed on demand.

A row of logits is as wide as a vocabulary; the logits of a batch are by far the largest tensor of a training step. Only
their inputs (hidden states) are stored, and rows are selected before logits are computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from gold.kernels.reference import row_logsumexp, widened

BLOCK_BYTES = 128 * 2**20
"""Most bytes of one block of logits in float32; a block holds at least one row."""
ACCELERATED = 16
"""Factor on ``BLOCK_BYTES`` for accelerators, which small blocks leave idle."""

Index = slice | Tensor


class LazyLogits(ABC):
    """Rows of logits, [N, width], computed on demand from ``tensors``, each of which has N rows."""

    width: int
    """Columns of a row."""
    partial = False
    """Whether only some tokens of each row are known: see ``TopKLogits``."""
    weights: tuple[Any, ...] = ()
    """Parameters, besides ``tensors``, with respect to which the logits have gradients."""

    _by_row: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors from which the rows are computed."""
        return tuple(getattr(self, name) for name in self._by_row)

    def with_tensors(self, *tensors: Tensor) -> Self:
        """The same kind of rows, computed from other tensors."""
        rows: Any = self
        changed: Self = replace(rows, **dict(zip(self._by_row, tensors, strict=True)))
        return changed

    @abstractmethod
    def logits(self) -> Tensor:
        """The logits of all rows: [N, width]."""

    def __len__(self) -> int:
        return int(self.tensors[0].shape[0])

    @property
    def device(self) -> torch.device:
        """Where the logits are."""
        return self.tensors[0].device

    def select(self, index: Index) -> Self:
        """The rows ``index``, in that order."""
        return self.with_tensors(*(x[index] for x in self.tensors))

    @staticmethod
    def joined(parts: Sequence[LazyLogits]) -> LazyLogits:
        """The rows of several texts of one model, concatenated."""
        columns = zip(*(part.tensors for part in parts), strict=True)
        return parts[0].with_tensors(*(torch.cat(column) for column in columns))

    def split(self, sizes: list[int]) -> list[Self]:
        """The rows of several texts, ``sizes`` each."""
        parts = zip(*(x.split(sizes) for x in self.tensors), strict=True)
        return [self.with_tensors(*part) for part in parts]

    def in_turn(self) -> Self:
        """The same rows, for use one block at a time: without gradients, a block's logits may overwrite those of the
        last block."""
        return self

    def impossible(self, target_N: Tensor, stops: Tensor) -> Tensor:
        """Rows known without computation to give probability 0 to their target, the token of ``target_N`` or, for −1,
        the stop event: bool [N]. False for rows that must be computed first."""
        return torch.zeros_like(target_N, dtype=torch.bool)

    @property
    def block_rows(self) -> int:
        """Rows per block."""
        size = BLOCK_BYTES * (1 if self.device.type == "cpu" else ACCELERATED)
        return max(1, size // (4 * self.width))

    def may_overwrite(self, logits: Tensor) -> bool:
        """Whether a kernel may overwrite these logits: they do not share memory with ``tensors``."""
        return logits.data_ptr() != self.tensors[0].data_ptr()


@dataclass(frozen=True)
class HeadLogits(LazyLogits):
    """Logits of hidden states: ``head(hidden_ND[i:j], *weights)`` is [j − i, width].

    ``weights``: all parameters of the head that need a gradient; without them the head uses its own. In ``summed`` each
    is a ``SummedWeight``. ``reordered``: a function from columns to a head that returns these columns; only where that
    costs no more than a copy of the matrix. ``into``: ``head`` without gradient, with the logits written to a given
    output tensor; only where fresh memory is expensive.
    """

    hidden_ND: Tensor
    head: Callable[..., Tensor]
    width: int
    weights: tuple[Any, ...] = ()
    reordered: Callable[[Tensor], Callable[..., Tensor]] | None = None
    into: Callable[[Tensor, Tensor], Tensor] | None = None
    _by_row = ("hidden_ND",)

    def logits(self) -> Tensor:
        """See ``LazyLogits.logits``."""
        return self.head(self.hidden_ND, *self.weights)

    def in_turn(self) -> Self:
        """See ``LazyLogits.in_turn``."""
        into, before = self.into, list[Tensor]()
        if into is None:
            return self

        def head(hidden: Tensor, *weights: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return self.head(hidden, *weights)
            if before and len(before[0]) >= len(hidden):
                return into(hidden, before[0][: len(hidden)])
            before[:] = [self.head(hidden, *weights)]
            return before[0]

        return replace(self, head=head, into=None)


@dataclass(frozen=True)
class GivenLogits(LazyLogits):
    """Logits that exist already: for tests, and for models that return nothing else."""

    logits_NV: Tensor
    _by_row = ("logits_NV",)

    @property
    def width(self) -> int:  # type: ignore[override]
        """Columns of a row."""
        return int(self.logits_NV.shape[1])

    def logits(self) -> Tensor:
        """See ``LazyLogits.logits``."""
        return self.logits_NV


@dataclass(frozen=True)
class TopKLogits(LazyLogits):
    """Rows with the log-probabilities of some tokens only, in nats.

    ``ids_NK`` are below ``size``, the size of the vocabulary, each at most once a row; −1 is padding, whatever its
    ``logp_NK``. Logits of unknown tokens are −inf. The last column, which is no token, is the tail mass: the
    log-probability of all unknown tokens together.
    """

    ids_NK: Tensor
    logp_NK: Tensor
    size: int
    partial = True
    _by_row = ("ids_NK", "logp_NK")

    @property
    def width(self) -> int:  # type: ignore[override]
        """Columns of a row."""
        return self.size + 1

    def logits(self) -> Tensor:
        """See ``LazyLogits.logits``."""
        ids, size = self.ids_NK.long(), self.size
        known = ids >= 0
        logp = self.logp_NK.double().masked_fill(~known, -torch.inf)
        # A fully known row has no tail mass, whatever rounding says.
        tail = log_tail_mass(logp).masked_fill(known.sum(-1) >= size, -torch.inf)
        dense = logp.new_full((logp.shape[0], size + 1), -torch.inf)
        dense = dense.scatter(1, torch.where(known, ids, size), logp)
        dense[:, size] = tail
        return dense

    def impossible(self, target_N: Tensor, stops: Tensor) -> Tensor:
        """See ``LazyLogits.impossible``."""
        is_stop = (self.ids_NK[:, :, None] == stops).any(-1)
        own = torch.where(target_N[:, None] < 0, is_stop, self.ids_NK == target_N[:, None])
        return own.any(-1) & ~(own & (self.logp_NK > -torch.inf)).any(-1)


@dataclass(frozen=True)
class MixedLogits(LazyLogits):
    """Log-probabilities of a mixture of models with the same vocabulary, on the device of the first.

    ``mix`` turns the models' log-probabilities, [N, width] each, into one tensor; columns from ``width`` on are no
    tokens and are dropped first.
    """

    parts: tuple[LazyLogits, ...]
    mix: Callable[[list[Tensor]], Tensor]
    width: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all parts."""
        return tuple(x for part in self.parts for x in part.tensors)

    def with_tensors(self, *tensors: Tensor) -> Self:
        """The same kind of rows, computed from other tensors."""
        given, parts = list(tensors), []
        for part in self.parts:
            count = len(part.tensors)
            parts.append(part.with_tensors(*given[:count]))
            del given[:count]
        return replace(self, parts=tuple(parts))

    def select(self, index: Index) -> Self:
        """The rows ``index``, in that order."""

        def on(device: torch.device) -> Index:
            return index if isinstance(index, slice) else index.to(device)

        return replace(self, parts=tuple(part.select(on(part.device)) for part in self.parts))

    def logits(self) -> Tensor:
        """See ``LazyLogits.logits``."""
        logits = (widened(part.logits())[:, : self.width] for part in self.parts)
        return self.mix([torch.log_softmax(x, dim=-1).to(self.device) for x in logits])


class SummedWeight:
    """A weight of the head within ``lm_head.summed``: ``leaf`` is the detached weight in the dtype of the matrix
    product, ``total`` the sum of its gradients so far, in float32 or wider."""

    def __init__(self, weight: Tensor) -> None:
        leaf, device = weight.detach(), weight.device.type
        if weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
            leaf = leaf.to(torch.get_autocast_dtype(device))
        self.leaf = leaf.requires_grad_(weight.requires_grad)
        self._dtype = widened(weight[:0]).dtype
        self._total: Tensor | None = None

    def total(self) -> Tensor:
        """The sum of all gradients."""
        return torch.zeros_like(self.leaf, dtype=self._dtype) if self._total is None else self._total

    def add_grad(self) -> None:
        """Adds the gradient that autograd left on the leaf to the total, and clears it."""
        if self.leaf.grad is not None:
            grad, self.leaf.grad = self.leaf.grad, None
            self._total = grad.to(self._dtype) if self._total is None else self._total.add_(grad)

    def add_product(self, across: Tensor, hidden: Tensor) -> None:
        """Adds ``across @ hidden`` to the total, in place where the dtypes allow it."""
        if self._total is None:
            self._total = (across @ hidden).to(self._dtype)
        elif self._dtype == across.dtype:
            self._total.addmm_(across, hidden)
        else:
            self._total += across @ hidden


def leaf_of(weight: Tensor | SummedWeight) -> Tensor:
    """The weight as a tensor."""
    return weight.leaf if isinstance(weight, SummedWeight) else weight


def linear(
    hidden: Tensor, weight: Tensor | SummedWeight, bias: Tensor | SummedWeight | None = None
) -> Tensor:
    """``hidden @ weight.T + bias``; the gradient of a ``SummedWeight`` is added to its total in place."""
    bias = None if bias is None else leaf_of(bias)
    if not isinstance(weight, SummedWeight):
        return functional.linear(hidden, weight, bias)
    product: Tensor = _SummedLinear.apply(hidden, weight.leaf, weight)  # type: ignore[no-untyped-call]
    return product if bias is None else product + bias.to(product)


class _SummedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaf: Tensor, weight: SummedWeight) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.weight = weight
        return functional.linear(hidden, leaf)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (hidden,) = ctx.saved_tensors
        leaf = ctx.weight.leaf
        grad = grads[0].to(leaf.dtype)
        ctx.weight.add_product(grad.T, hidden.to(grad))
        return (grad @ leaf).to(hidden), None, None


def spans(rows: int, size: int) -> list[slice]:
    """Slices of at most ``size`` rows that cover ``rows`` rows, in order; one empty slice if there are no rows."""
    return [slice(first, min(first + size, rows)) for first in range(0, max(rows, 1), size)]


def log_tail_mass(logp_NK: Tensor) -> Tensor:
    """Tail mass of each row, ``1 − Σ exp(logp)``, as a log-probability: −∞ where it is 0 or less."""
    left = -torch.expm1(row_logsumexp(logp_NK))
    return torch.where(left > 0, torch.log(left.clamp(min=1e-300)), -torch.inf)


@torch.no_grad()
def likeliest(rows: LazyLogits, top_k: int, also_NA: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Some tokens of each row: those of ``also_NA`` (−1: none), then those of its ``top_k`` most probable below
    ``size`` that are not among them; for partial rows, all known tokens.

    Returns:
        ids_NK (−1 is padding), logp_NK, and the log-probability of all other tokens together [N], in nats, float64.
    """
    if isinstance(rows, TopKLogits):
        ids, logp = rows.ids_NK.long(), rows.logp_NK.double()
        return ids, logp, log_tail_mass(logp.masked_fill(ids < 0, -torch.inf))
    repeated = (also_NA[:, :, None] == also_NA[:, None, :]).tril(-1).any(-1)
    also_NA = also_NA.masked_fill(repeated, -1)
    parts = []
    for span in spans(len(rows), rows.block_rows):
        logits, also = widened(rows.select(span).logits()), also_NA[span]
        value, ranked = logits[:, :size].topk(min(top_k, size, logits.shape[1]), dim=-1)
        there = (ranked[:, :, None] == also[:, None, :]).any(-1) | torch.isneginf(value)
        ids = torch.cat((also, ranked.masked_fill(there, -1)), dim=-1)
        norm = torch.logsumexp(logits, dim=-1, keepdim=True)
        # Padding repeats another token of the row; in a row without tokens, one logit is set to its own value.
        some = ids.amax(-1, keepdim=True)
        gone = torch.where(some >= 0, -torch.inf, logits[:, :1])
        others = logits.scatter(1, torch.where(ids >= 0, ids, some.clamp(min=0)), gone.expand(ids.shape))
        tail = torch.logsumexp(others, dim=-1) - norm[:, 0]
        parts.append((ids, (logits.gather(1, ids.clamp(min=0)) - norm).double(), tail.double()))
    if not parts:
        none = also_NA.new_empty((0, also_NA.shape[1]))
        return none, none.double(), none[:, :0].sum(-1).double()
    ids_NK, logp_NK, tail_N = (torch.cat(each) for each in zip(*parts, strict=True))
    return ids_NK, logp_NK, tail_N
