"""From hidden states and an output matrix to log-probabilities and divergences, a block of rows at a time.

A row of logits is as wide as a vocabulary; a batch of them is the largest tensor of a training step by far. Here logits
exist for one block of rows only. Where a loss is a sum over blocks (``summed``), each block's gradient is made with its
value, and the logits are dropped; where values of all rows are needed first (``remade``), the backward pass makes them
again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gold.kernels import backend_for
from gold.kernels.layout import ByteLayout, KeptEvents
from gold.kernels.reference import (
    SMOOTHING,
    MixedKL,
    bucketed,
    coarsened,
    finite_where_either_is,
    row_logsumexp,
    smoothed,
    widened,
)
from gold.kernels.tables import byte_table, filled_table, joint_table

BLOCK_BYTES = 128 * 2**20
"""Logits of one block take at most this many bytes in float32, and a block holds at least one row."""
ACCELERATED = 16
"""Times as much on an accelerator, which is idle in small blocks."""
SCATTERED = {"cuda"}
"""Where a number that is read alone costs as much as a whole sector of memory: there the rows of an output matrix that
is not trained are put in the order in which a loss reads the columns. On a CPU it would save a hundredth."""

Index = slice | Tensor


@dataclass(frozen=True)
class LazyLogits:
    """Model states whose next-token logits can be computed on demand: ``head(hidden_ND[i:j], *weights)`` is
    [j − i, width].

    ``weights``: all that the head has parameters of its own for that need a gradient; without them it uses its own.
    ``reordered``: from columns, a head that gives these alone; only where that takes no more than a copy of the matrix.
    ``into``: ``head`` without gradient, the logits being written into given memory of that shape; only where memory
    that was never used is dear.
    ``partial``: only some tokens of each row are known, the others are −inf, and the last column, which no token has,
    is the logit of all of them together.
    """

    hidden_ND: Tensor
    head: Callable[..., Tensor]
    width: int
    partial: bool = False
    weights: tuple[Tensor, ...] = ()
    reordered: Callable[[Tensor], Callable[..., Tensor]] | None = None
    into: Callable[[Tensor, Tensor], Tensor] | None = None

    @classmethod
    def of_logits(cls, logits_NV: Tensor) -> LazyLogits:
        """States whose logits are given: for tests, and for models that hand out nothing else."""
        return cls(logits_NV, _same, logits_NV.shape[1])

    @classmethod
    def of_top_k(cls, ids_NK: Tensor, logp_NK: Tensor, size: int) -> LazyLogits:
        """Rows of which only some tokens' log-probabilities are known, in nats; what is left of 1 is all the others'.

        ``ids_NK`` are below ``size``, the size of the vocabulary, each at most once a row; −1 pads a row, whatever its
        ``logp_NK`` there.
        """
        packed = torch.cat((ids_NK.to(torch.float64), logp_NK.to(torch.float64)), dim=-1)

        def unpack(packed: Tensor) -> Tensor:
            ids, logp = packed.chunk(2, dim=-1)
            known = ids >= 0
            rest = log_tail_mass(logp.masked_fill(~known, -torch.inf))
            # Of a row that is known as a whole nothing is left, whatever rounding says.
            rest = rest.masked_fill(known.sum(-1) >= size, -torch.inf)
            dense = logp.new_full((logp.shape[0], size + 1), -torch.inf)
            column = torch.where(known, ids, float(size)).long()
            dense = dense.scatter(1, column, logp.masked_fill(~known, -torch.inf))
            dense[:, size] = rest
            return dense

        return cls(packed, unpack, size + 1, partial=True)

    @classmethod
    def joined(cls, parts: Sequence[LazyLogits]) -> LazyLogits:
        """The rows of several texts of one model, one text after the other."""
        return replace(parts[0], hidden_ND=torch.cat([p.hidden_ND for p in parts]))

    def __len__(self) -> int:
        return int(self.hidden_ND.shape[0])

    def select(self, index: Index) -> LazyLogits:
        """The rows ``index``, in that order."""
        return replace(self, hidden_ND=self.hidden_ND[index])

    def logits(self) -> Tensor:
        """The logits of all rows: [N, width]."""
        return self.head(self.hidden_ND, *self.weights)

    def in_turn(self) -> LazyLogits:
        """The same rows for one block after the other: where gradients are off, logits may be written over those of the
        block before, which nobody reads any more."""
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

    @property
    def block_rows(self) -> int:
        """Rows per block."""
        size = BLOCK_BYTES * (1 if self.hidden_ND.device.type == "cpu" else ACCELERATED)
        return max(1, size // (4 * self.width))

    def spares(self, logits: Tensor) -> bool:
        """Whether nobody else reads these logits of all rows, so that a kernel may write over them."""
        return logits.data_ptr() != self.hidden_ND.data_ptr()


def _same(logits: Tensor) -> Tensor:
    return logits


def log_tail_mass(logp_NK: Tensor) -> Tensor:
    """What is left of 1 in each row, as a log-probability: −∞ where nothing is."""
    left = -torch.expm1(row_logsumexp(logp_NK))
    return torch.where(left > 0, torch.log(left.clamp(min=1e-300)), -torch.inf)


@torch.no_grad()
def likeliest(rows: LazyLogits, top_k: int, also_NA: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Some tokens of each row: those of ``also_NA`` (−1: none), then those of its ``top_k`` likeliest below ``size``
    that are not among them; of partial rows, all that are known.

    Returns:
        ids_NK (−1 pads), logp_NK, and the log-probability of all other tokens together [N], in nats, float64.
    """
    if rows.partial:
        ids, logp = rows.hidden_ND.chunk(2, dim=-1)
        return ids.long(), logp, log_tail_mass(logp.masked_fill(ids < 0, -torch.inf))
    repeated = (also_NA[:, :, None] == also_NA[:, None, :]).tril(-1).any(-1)
    also_NA = also_NA.masked_fill(repeated, -1)
    parts = []
    for span in spans(len(rows), rows.block_rows):
        logits, also = widened(rows.select(span).logits()), also_NA[span]
        value, ranked = logits[:, :size].topk(min(top_k, size, logits.shape[1]), dim=-1)
        there = (ranked[:, :, None] == also[:, None, :]).any(-1) | torch.isneginf(value)
        ids = torch.cat((also, ranked.masked_fill(there, -1)), dim=-1)
        norm = torch.logsumexp(logits, dim=-1, keepdim=True)
        # Pads stand for another of the row's tokens; in a row without any, one logit is set to what it is.
        some = ids.amax(-1, keepdim=True)
        gone = torch.where(some >= 0, -torch.inf, logits[:, :1])
        others = logits.scatter(1, torch.where(ids >= 0, ids, some.clamp(min=0)), gone.expand(ids.shape))
        rest = torch.logsumexp(others, dim=-1) - norm[:, 0]
        parts.append((ids, (logits.gather(1, ids.clamp(min=0)) - norm).double(), rest.double()))
    if not parts:
        none = also_NA.new_empty((0, also_NA.shape[1]))
        return none, none.double(), none[:, :0].sum(-1).double()
    ids_NK, logp_NK, rest_N = (torch.cat(each) for each in zip(*parts, strict=True))
    return ids_NK, logp_NK, rest_N


def impossible_rows(rows: LazyLogits, target_N: Tensor, stops: Tensor) -> Tensor:
    """Which of partial rows tell their own event, the token of ``target_N`` or, for −1, the stop ids, as one of
    probability 0: bool [N]."""
    ids, logp = rows.hidden_ND.chunk(2, dim=-1)
    is_stop = (ids[:, :, None] == stops).any(-1)
    own = torch.where(target_N[:, None] < 0, is_stop, ids == target_N[:, None])
    return own.any(-1) & ~(own & (logp > -torch.inf)).any(-1)


def spans(rows: int, size: int) -> list[slice]:
    """Slices of at most ``size`` of so many rows, in order; of no rows, one that is empty."""
    return [slice(first, min(first + size, rows)) for first in range(0, max(rows, 1), size)]


def remade(function: Callable[[LazyLogits], tuple[Tensor, ...]], rows: LazyLogits) -> tuple[Tensor, ...]:
    """``function(rows)``, whose inner tensors are dropped and made again in the backward pass."""
    if not torch.is_grad_enabled():
        return function(rows)
    result: tuple[Tensor, ...] = checkpoint(
        lambda hidden: function(replace(rows, hidden_ND=hidden)),
        rows.hidden_ND,
        use_reentrant=False,
        preserve_rng_state=False,
    )
    return result


Work = Callable[..., tuple[Tensor, ...]]


def summed(
    function: Work, rows: LazyLogits, blocks: Sequence[tuple[Index, Any]], *beside_N: Tensor
) -> tuple[Tensor, ...]:
    """The sum over blocks of the first of what ``function`` returns, with gradient, and all else joined, without.

    For each ``(index, part)`` of ``blocks`` it is called with ``(rows[index], part, *(x[index] for x in beside_N))``. A
    block's gradients with respect to the states, the head's weights and ``beside_N`` are made together with its value,
    so that its logits are made once and never kept. There is one backward pass, which hands them on.

    Raises: ValueError if the head has parameters that need a gradient and are not among ``rows.weights``.
    """
    inputs = (rows.hidden_ND, *beside_N, *rows.weights)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        bare = replace(
            rows, hidden_ND=rows.hidden_ND[:0].detach(), weights=tuple(w.detach() for w in rows.weights)
        )
        if bare.logits().requires_grad:
            raise ValueError(
                "the head has parameters that need a gradient and are not among the rows' weights"
            )
        result: tuple[Tensor, ...] = _Summed.apply(function, rows, blocks, *inputs)  # type: ignore[no-untyped-call]
        return result
    return _joined([function(rows.select(i), part, *(x[i] for x in beside_N)) for i, part in blocks])


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Work, rows: LazyLogits, blocks: Sequence[tuple[Index, Any]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        by_row = inputs[: len(inputs) - len(rows.weights)]
        leaves = tuple(_leaf(w) for w in rows.weights)
        totals = [torch.zeros_like(x) for x in by_row]
        values = []
        for index, part in blocks:
            block, *beside = (x[index].detach().requires_grad_(x.requires_grad) for x in by_row)
            with torch.enable_grad():
                value, *others = function(replace(rows, hidden_ND=block, weights=leaves), part, *beside)
                if value.requires_grad:
                    value.backward()
            values.append(tuple(x.detach() for x in (value, *others)))
            for total, x in zip(totals, (block, *beside), strict=False):
                if x.grad is not None:
                    total[index] += x.grad
            for leaf in leaves:
                if leaf.grad is not None:
                    leaf.total = leaf.grad.to(leaf.wide) if leaf.total is None else leaf.total.add_(leaf.grad)
                    leaf.grad = None
        of_weights = [torch.zeros_like(x, dtype=x.wide) if x.total is None else x.total for x in leaves]
        ctx.totals, ctx.dtypes = totals + of_weights, [x.dtype for x in inputs]
        total, *rest = _joined(values)
        ctx.mark_non_differentiable(*rest)
        return total, *rest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[3:]
        if ctx.totals is None:
            raise RuntimeError("the gradients of this loss were handed on by its first backward pass")
        totals, ctx.totals = ctx.totals, None
        grads = [
            total.mul_(grad.to(total)).to(dtype) if need else None
            for total, dtype, need in zip(totals, ctx.dtypes, needed, strict=True)
        ]
        return None, None, None, *grads


def _leaf(weight: Tensor) -> Any:
    """The weight cut off from its graph, as matrix products take it; its gradients add up in ``total``, of dtype
    ``wide``, which is None before the first."""
    leaf: Any = weight.detach()
    device = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
        leaf = leaf.to(torch.get_autocast_dtype(device))
    leaf.requires_grad_(weight.requires_grad)
    leaf.total, leaf.wide = None, widened(weight[:0]).dtype
    return leaf


def _joined(values: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    first, *rest = zip(*values, strict=True)
    return torch.stack(first).sum(), *(torch.cat(column) for column in rest)


def projected(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``hidden @ weight.T + bias``; within ``summed`` the gradient of ``weight`` is added up where it is kept, without
    a matrix of its own for each block."""
    if not hasattr(weight, "total"):
        return functional.linear(hidden, weight, bias)
    product: Tensor = _Projected.apply(hidden, weight)  # type: ignore[no-untyped-call]
    return product if bias is None else product + bias.to(product)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Any) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.weight = weight
        return functional.linear(hidden, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (hidden,) = ctx.saved_tensors
        (grad,) = grads
        weight, grad = ctx.weight, grad.to(ctx.weight.dtype)
        across = grad.T
        if weight.total is None:
            weight.total = (across @ hidden.to(grad)).to(weight.wide)
        elif weight.wide == grad.dtype:
            weight.total.addmm_(across, hidden.to(grad))
        else:
            weight.total += across @ hidden.to(grad)
        return (grad @ ctx.weight).to(hidden), None


def byte_tables(
    rows: LazyLogits, layout: ByteLayout, backend: ModuleType, *, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Next-byte table of a batch, and what its rows say of the tokens themselves.

    ``keep``: logits that are a single block are kept for the backward pass instead of made again.

    Returns:
        table [positions, 258] (``tables.byte_table``), log_target_N, log_stop_N (``reference.byte_masses``), nats.
    """
    mass, target, stop, _ = _byte_masses(rows, layout, backend, keep)
    return byte_table(mass, target, layout, backend), target, stop


def filled_byte_tables(
    rows: LazyLogits, layout: ByteLayout, backend: ModuleType, table_other: Tensor, log_path: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``byte_tables``, of rows that are partial: see ``tables.filled_table``."""
    mass, target, stop, untold = _byte_masses(rows, layout, backend, False)
    joint = joint_table(mass, target, layout, backend)
    return filled_table(joint, untold, layout, table_other, log_path), target, stop


@torch.no_grad()
def prefix_logp(
    rows: LazyLogits, layout: ByteLayout, begins: NDArray[np.int64], data: bytes, backend: ModuleType
) -> float:
    """Log-probability, in nats, that a text begins with ``data``, the first bytes of the only text of a layout: by its
    tokens up to some row, and any token of that row that reaches the end of ``data`` or runs across it.

    ``begins``: the byte at which each row begins. Of partial rows only what is told counts: a lower bound.
    """
    last = len(data) - 1
    first, until = np.searchsorted(begins, [last, last + 1]).tolist()
    cut, reading = layout.window(slice(last, last + 1), slice(first, until))
    mass, target, _, _ = _byte_masses(rows.select(reading), cut, backend, False)
    joint = joint_table(mass, target, cut, backend)[0, data[last]]
    row = reading.start + int(cut.position_row[0])
    before, _ = token_logp(rows.select(slice(row)), layout.target[:row], layout.stops, backend)
    return float(before.double().sum() + joint.double())


def in_byte_order(rows: LazyLogits, layout: ByteLayout) -> tuple[LazyLogits, ByteLayout]:
    """Rows whose columns stand in the order in which byte masses read them, where that pays, and their layout. The copy
    of the output matrix lives as long as these rows do."""
    if rows.reordered is None or rows.hidden_ND.device.type not in SCATTERED:
        return rows, layout
    columns, layout = layout.in_order(rows.width)
    return replace(rows, head=rows.reordered(columns), reordered=None), layout


def _byte_masses(rows: LazyLogits, layout: ByteLayout, backend: ModuleType, keep: bool) -> tuple[Tensor, ...]:
    """``reference.byte_masses`` of all rows, and the mass of the tokens that partial rows do not tell, which is no
    part of the others; in nats."""
    if len(rows) != layout.rows:
        raise ValueError(f"{len(rows)} rows of states for a plan of {layout.rows}")
    rows, layout = in_byte_order(rows, layout)
    rows = rows.in_turn()
    parts: list[tuple[Tensor, ...]] = []
    blocks = spans(len(rows), rows.block_rows)
    for span in blocks:

        def reduce(block: LazyLogits, span: slice = span) -> tuple[Tensor, ...]:
            logits, first = block.logits(), span.start
            if not block.partial:
                found = backend.byte_masses(logits, layout, first, overwrite=block.spares(logits))
                return (*found, logits.new_zeros(0))
            untold = logits[:, -1] - row_logsumexp(logits)
            told = torch.log1p(-untold.exp())
            masked = torch.cat((logits[:, :-1], torch.full_like(logits[:, -1:], -torch.inf)), dim=-1)
            mass, target, stop = backend.byte_masses(masked, layout, first)
            low, high = layout.mass_range(first, logits.shape[0])
            of_mass = told[layout.mass_row[low:high] - first].to(mass)
            is_token = layout.target[span] >= 0
            of_target = torch.where(is_token, told, 0.0).to(target)
            return mass + of_mass, target + of_target, stop + told.to(stop), untold

        block = rows.select(span)
        parts.append(reduce(block) if keep and len(blocks) == 1 else remade(reduce, block))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def token_logp(
    rows: LazyLogits, target_N: Tensor, stops: Tensor, backend: ModuleType | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target token (0 where it is −1), and of the stop event, in nats: two [N]."""
    target, stop, _ = token_statistics(rows, target_N, stops, backend)
    return target, stop


def token_statistics(
    rows: LazyLogits, target_N: Tensor, stops: Tensor, backend: ModuleType | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``token_logp``, and without gradient the entropy of each row, in nats: three [N]."""
    backend = backend or backend_for(rows.hidden_ND.device)
    parts = []
    for span in spans(len(rows), rows.block_rows):

        def reduce(block: LazyLogits, span: slice = span) -> tuple[Tensor, ...]:
            logits = block.logits()
            overwrite = block.spares(logits)
            return tuple(backend.row_statistics(logits, target_N[span], stops, overwrite=overwrite)[1:])

        parts.append(remade(reduce, rows.select(span)))
    target, stop, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return target, stop, entropy


def token_loss(
    rows: LazyLogits, target_N: Tensor, weight_N: Tensor, stops: Tensor, backend: ModuleType
) -> Tensor:
    """``−Σ_n weight[n] log π(target[n])``, in nats."""

    def loss(block: LazyLogits, span: slice) -> tuple[Tensor, ...]:
        logits = block.logits()
        _, logp, *_ = backend.row_statistics(logits, target_N[span], stops, overwrite=block.spares(logits))
        return (-(weight_N[span] * logp).sum(),)

    blocks = [(span, span) for span in spans(len(rows), rows.block_rows)]
    return summed(loss, rows, blocks)[0]


@dataclass(frozen=True)
class SharedEvents:
    """Events that two vocabularies both have: token ``ids_V[p]`` of the student is token ``ids_W[p]`` of the teacher;
    then the stop event; what is left on each side is one more event, or is left out. ``everything``: there are no text
    tokens left on either side."""

    ids_V: Tensor
    ids_W: Tensor
    stops_V: Tensor
    stops_W: Tensor
    everything: bool = False

    def kept(self, width_V: int, width_W: int) -> tuple[KeptEvents, KeptEvents]:
        """Both sides' columns; a vocabulary can have special ids that its model has no row for."""
        there = (self.ids_V < width_V) & (self.ids_W < width_W).to(self.ids_V.device)
        return (
            KeptEvents(self.ids_V[there], self.stops_V, width_V),
            KeptEvents(self.ids_W[there.to(self.ids_W.device)], self.stops_W, width_W),
        )


def shared_divergence(
    student: LazyLogits,
    teacher: LazyLogits,
    events: SharedEvents,
    divergence: Callable[[Tensor, Tensor], Tensor],
    backend: ModuleType,
    renormalise: bool,
    top_k: int | None = None,
    top_k_of_teacher: bool = True,
    weight_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the divergences between row n of both sides on shared events, each times its weight (1 without one), and
    the student's mass on these events, [N], without gradient.

    ``renormalise``: condition both sides on the shared events; else all unshared mass is one more event, the bucket.
    ``top_k``: only the likeliest shared events of one side in each row are events of their own, the others are
    unshared; so are those that a teacher's row does not know. A ``MixedKL`` is left to the kernel where it can do all
    that; any other divergence is computed by torch. Where only one side's matrix has rows beyond its vocabulary
    and that would cost infinitely much, both leak to what is left although ``everything`` is shared; where a divergence
    is infinite all the same, what is ruled out counts as ``reference.finite_where_either_is`` says.

    Raises: ValueError if ``top_k`` is more than there are shared events.
    """
    kept, kept_teacher = events.kept(student.width, teacher.width)
    if top_k is not None and top_k > kept.ids.numel() + 1:
        raise ValueError(
            f"top_k is {top_k}, and the vocabularies share {kept.ids.numel()} tokens and the stop event"
        )
    smoothing = SMOOTHING
    if events.everything:
        padded, padded_teacher = (bool(k.left.numel()) for k in (kept, kept_teacher))
        alone = padded and not padded_teacher, padded_teacher and not padded
        if not isinstance(divergence, MixedKL) or divergence.finite(*alone):
            smoothing = 0.0
    whole = top_k is None and not teacher.partial and kept.ids.device == kept_teacher.ids.device

    def compare(block: LazyLogits, span: slice) -> tuple[Tensor, ...]:
        with torch.no_grad():
            logits_T = teacher.select(span).logits()
        if whole and isinstance(divergence, MixedKL):
            logits = block.logits()
            value, mass = backend.row_divergence(
                logits,
                logits_T,
                kept,
                kept_teacher,
                divergence,
                rest="renormalise" if renormalise else "bucket",
                smoothing=smoothing,
                overwrite=block.spares(logits),
            )
        else:
            value, mass = in_torch(block.logits(), logits_T)
        infinite = torch.isinf(value.detach())
        if infinite.any():
            value, mass = in_torch(block.logits(), logits_T, finite=True)
        return (value if weight_N is None else value * weight_N[span].to(value)).sum(), mass

    def in_torch(logits_S: Tensor, logits_T: Tensor, finite: bool = False) -> tuple[Tensor, Tensor]:
        logp = coarsened(logits_S, kept)
        with torch.no_grad():
            logq = coarsened(logits_T, kept_teacher).to(logp)
            apart = torch.isfinite(logq[:, :-1]) if teacher.partial else None
            if top_k is not None:
                ranked = (logq if top_k_of_teacher else logp)[:, :-1].topk(top_k, dim=-1).indices
                chosen = torch.zeros_like(logp[:, :-1], dtype=torch.bool).scatter(1, ranked, True)
                apart = chosen if apart is None else apart & chosen
        if apart is not None:
            logp, logq = bucketed(logp, apart), bucketed(logq, apart)
        mass = row_logsumexp(logp[:, :-1].detach()).exp()
        if renormalise:
            logp, logq = (conditional(x[:, :-1]) for x in (logp, logq))
        elif apart is not None or smoothing:
            # What one side has left, the other may give no probability at all.
            logp, logq = smoothed(logp, SMOOTHING), smoothed(logq, SMOOTHING)
        if finite:
            logp, logq = finite_where_either_is(logp, logq)
        return divergence(logp, logq), mass

    def conditional(logp: Tensor) -> Tensor:
        norm = row_logsumexp(logp)[:, None]
        return logp - torch.where(torch.isneginf(norm), 0.0, norm)

    blocks = [(span, span) for span in spans(len(student), min(student.block_rows, teacher.block_rows))]
    total, mass = summed(compare, student, blocks)
    return total, mass
