"""Next-byte distributions along a text, from lazy logits: masses of single rows, combined over rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gold.bytes.events import EVENTS, UNRESOLVED_EVENT
from gold.kernels import reference
from gold.kernels.backends import kernel_for, segment_logsumexp
from gold.kernels.layout import ByteLayout
from gold.kernels.lm_head import recomputed, token_logp
from gold.kernels.logits import HeadLogits, LazyLogits, spans
from gold.kernels.reference import SMOOTHING, normalised, row_logsumexp, smoothed

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCATTERED = {"cuda"}
"""Devices on which a random read costs a whole memory sector: there the rows of a frozen output matrix are permuted to
byte order. On a CPU it would save one percent."""


def byte_tables(rows: LazyLogits, layout: ByteLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Next-byte table of a batch, and the log-probabilities of its own tokens.

    Returns:
        table [positions, 258] (``byte_table``), log_target_N, log_stop_N (``reference.byte_masses``), nats.
    """
    mass, target, stop, _ = row_masses(rows, layout)
    return byte_table(mass, target, layout), target, stop


@torch.no_grad()
def prefix_logp(rows: LazyLogits, layout: ByteLayout, begins: NDArray[np.int64], data: bytes) -> float:
    """Log-probability, in nats, that a text begins with ``data``, the first bytes of the only text of a layout: by its
    tokens up to some row, and any token of that row that reaches or crosses the end of ``data``.

    ``begins``: the first byte of each row. For partial rows only known tokens count: a lower bound.
    """
    last = len(data) - 1
    first, until = np.searchsorted(begins, [last, last + 1]).tolist()
    part, reading = layout.window(slice(last, last + 1), slice(first, until))
    mass, target, _, _ = row_masses(rows.select(reading), part)
    joint = joint_table(mass, target, part)[0, data[last]]
    row = reading.start + int(part.position_row[0])
    before, _ = token_logp(rows.select(slice(row)), layout.target[:row], layout.stops)
    return float(before.double().sum() + joint.double())


def in_byte_order(rows: LazyLogits, layout: ByteLayout) -> tuple[LazyLogits, ByteLayout]:
    """Rows with their columns permuted to the order of the byte trie, where that pays, and their layout. The copy of
    the output matrix lives as long as these rows."""
    if not isinstance(rows, HeadLogits) or rows.reordered is None or rows.device.type not in SCATTERED:
        return rows, layout
    columns, layout = layout.in_order(rows.width)
    return replace(rows, head=rows.reordered(columns), reordered=None), layout


def row_masses(rows: LazyLogits, layout: ByteLayout, *, keep: bool = False) -> tuple[Tensor, ...]:
    """``reference.byte_masses`` of all rows, and the tail mass of partial rows as a fourth tensor, in nats.

    ``keep``: logits that fit in one block are stored for the backward pass instead of recomputed.
    """
    if len(rows) != layout.rows:
        raise ValueError(f"{len(rows)} rows of logits for a plan of {layout.rows}")
    rows, layout = in_byte_order(rows, layout)
    rows = rows.in_turn()
    byte_masses = kernel_for(rows.device, reference.byte_masses)
    parts: list[tuple[Tensor, ...]] = []
    blocks = spans(len(rows), rows.block_rows)
    direct = (keep and len(blocks) == 1) or not torch.is_grad_enabled()
    for span in blocks:

        def reduce(block: LazyLogits, span: slice = span) -> tuple[Tensor, ...]:
            logits, first = block.logits(), span.start
            if not block.partial:
                found = byte_masses(logits, layout, first, overwrite=block.may_overwrite(logits))
                return (*found, logits.new_zeros(0))
            tail = logits[:, -1] - row_logsumexp(logits)
            known = torch.log1p(-tail.exp())
            masked = torch.cat((logits[:, :-1], torch.full_like(logits[:, -1:], -torch.inf)), dim=-1)
            mass, target, stop = byte_masses(masked, layout, first)
            low, high = layout.mass_range(first, logits.shape[0])
            of_mass = known[layout.mass_row[low:high] - first].to(mass)
            is_token = layout.target[span] >= 0
            of_target = torch.where(is_token, known, 0.0).to(target)
            return mass + of_mass, target + of_target, stop + known.to(stop), tail

        block = rows.select(span)
        parts.append(reduce(block) if direct else recomputed(reduce, block))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def byte_table(log_mass: Tensor, log_target_N: Tensor, layout: ByteLayout) -> Tensor:
    """Log-probability of every byte event at every byte position of a batch: [positions, 258], in nats.

    With ``b_k`` the byte offset of state k, ``W_k = Π_{j<k} π(a_j)`` and r the text between ``b_k`` and e::

        table[e, y] ∝ Σ_{k: b_k ≤ e} W_k · π_k{tokens that start with r·y}         y a byte
        table[e, stop] ∝ Σ_{k: b_k = e} W_k · π_k(stop)
        table[e, unresolved] ∝ Σ_k W_k · π_k{tokens equal to r, special tokens, padding rows}

    States before the last one give the cover terms: tokens that would have crossed later token boundaries of the text.
    The sampled token that ends at e is excluded where the next state accounts for it. Events that no token reaches are
    −inf; rows of unsupervised positions are meaningless.

    Source: next-byte marginals of a token model, Hayase et al. 2506.14123; Phan et al. 2410.09303.
    """
    return normalised(joint_table(log_mass, log_target_N, layout))


def joint_table(log_mass: Tensor, log_target_N: Tensor, layout: ByteLayout) -> Tensor:
    """The sums of ``byte_table`` before normalisation, relative to ``W_k`` of each position's last state."""
    # Weights are relative to the position's own last state, and summed in float64: absolute values decrease without
    # bound. A token of probability 0 on the path would make them all −inf: the bound −1e4 keeps their order and stays
    # finite.
    step_N = log_target_N.double().clamp(min=-1e4)
    before = torch.cumsum(step_N, 0) - step_N
    weight = before[layout.mass_row] - before[layout.position_row[layout.mass_cell // EVENTS]]
    value = log_mass + weight.to(log_mass.dtype)
    joint = segment_logsumexp(value, layout.mass_cell, layout.positions * EVENTS)
    # A compiled sum treats NaN as nothing, so a model with NaN logits would seem to rule out every event.
    broken = torch.isnan(log_mass.detach()).any() | torch.isnan(log_target_N.detach()).any()
    return (joint + torch.where(broken, torch.nan, 0.0).to(joint)).view(-1, EVENTS)


def filled_table(
    joint: Tensor, log_tail_N: Tensor, layout: ByteLayout, table_other: Tensor, log_path: Tensor
) -> Tensor:
    """The byte table of a model with partial rows, whose tail mass is distributed like another model's prediction.

    A row with the tail mass ``exp(log_tail_N)`` counts as its known tokens plus that much of the other model's
    distribution over continuations from the row's own state (its table is ``table_other``)::

        table[e, y] ∝ joint[e, y] + tail_k · Π_{b_k ≤ e' < e} other[e', x_e'] · other[e, y]

    with k the last state before e. Nothing is assumed about unknown tokens: neither that they lie outside the path, nor
    that the known tokens are complete once the path has entered an improbable one. A model filled with itself stays
    close to itself. ``log_path`` is ``log other[e, x_e]``, 0 where the text has no event.
    """
    row, position = layout.position_row, torch.arange(layout.positions, device=joint.device)
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[1:] = (row[1:] != row[:-1]) | (layout.position_text[1:] != layout.position_text[:-1])
    start = torch.cummax(torch.where(begins, position, 0), 0).values
    step = log_path.double().clamp(min=-1e4)
    before = torch.cumsum(step, 0) - step
    written = (before - before[start])[:, None] + table_other.double()
    # Positions of a text without rows name the row after the last one; they are unused.
    tail = torch.cat((log_tail_N, log_tail_N.new_zeros(1))).double()[row][:, None]
    return normalised(torch.logaddexp(joint.double(), tail + written))


def common_events(table_E: Tensor, resolved_E: Tensor, other_E: Tensor) -> Tensor:
    """``table_E`` coarsened to the events that both sides resolve; all others join UNRESOLVED. Rows still sum to one.

    Columns that only one side resolves become −inf on both, their mass added to the unresolved column. Inside a token
    no prefix of which is a token, a side has no unresolved mass, and any mass of the other side there would make the
    divergence infinite; so both sides move a share ``SMOOTHING`` of every event to it. Both pass through the same
    channel: equal tables stay equal, and a divergence between them is still positive, and 0 only at equality.
    """
    common = resolved_E & other_E
    common[:, UNRESOLVED_EVENT] = False
    unresolved = row_logsumexp(table_E.masked_fill(common, -torch.inf))
    kept = table_E.masked_fill(~common, -torch.inf)
    return smoothed(torch.cat((kept[:, :UNRESOLVED_EVENT], unresolved[:, None]), dim=-1), SMOOTHING)
