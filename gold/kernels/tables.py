"""From the masses of single rows to next-byte distributions along the text: the step that joins the cover terms."""

from types import ModuleType

import torch
from torch import Tensor

from gold.kernels.layout import EVENTS, REST_EVENT, ByteLayout
from gold.kernels.reference import SMOOTHING, row_logsumexp, smoothed


def byte_table(log_mass: Tensor, log_target_N: Tensor, layout: ByteLayout, backend: ModuleType) -> Tensor:
    """Log-probability of every byte event at every byte position of a batch: [positions, 258], in nats.

    With ``b_k`` the byte offset of state k, ``W_k = Π_{j<k} π(a_j)`` and r the text between ``b_k`` and e::

        table[e, y] ∝ Σ_{k: b_k ≤ e} W_k · π_k{tokens that start with r·y}         y a byte
        table[e, stop] ∝ Σ_{k: b_k = e} W_k · π_k(stop)
        table[e, rest] ∝ Σ_k W_k · π_k{tokens equal to r, special tokens, padding rows}

    States earlier than the last one give the cover terms: tokens that would have run across later boundaries of the
    text. The token that was sampled and ends at e is left out where the next state counts it. Events that no token
    reaches are −inf, and rows of positions that are not supervised carry no meaning.

    Source: next-byte marginals of a token model, Hayase et al. 2506.14123; Phan et al. 2410.09303.
    """
    return normalised(joint_table(log_mass, log_target_N, layout, backend))


def joint_table(log_mass: Tensor, log_target_N: Tensor, layout: ByteLayout, backend: ModuleType) -> Tensor:
    """The sums of ``byte_table``, relative to ``W_k`` of each position's last state, before they are normalised."""
    # Weights relative to the position's own last state, summed in float64: their absolute values fall without bound.
    # A token of probability 0 on the path would make them all −inf: 1e-4000 keeps their order and stays finite.
    step_N = log_target_N.double().clamp(min=-1e4)
    before = torch.cumsum(step_N, 0) - step_N
    weight = before[layout.mass_row] - before[layout.position_row[layout.mass_cell // EVENTS]]
    value = log_mass + weight.to(log_mass.dtype)
    joint: Tensor = backend.segment_logsumexp(value, layout.mass_cell, layout.positions * EVENTS)
    # A compiled sum takes NaN for nothing, and a model that gives no numbers would seem to rule everything out.
    broken = torch.isnan(log_mass.detach()).any() | torch.isnan(log_target_N.detach()).any()
    return (joint + torch.where(broken, torch.nan, 0.0).to(joint)).view(-1, EVENTS)


def normalised(joint: Tensor) -> Tensor:
    """The rows, each divided by its sum; rows of nothing stay as they are."""
    norm = row_logsumexp(joint)[:, None]
    return joint - torch.where(torch.isfinite(norm), norm, 0.0)


def filled_table(
    joint: Tensor, log_untold_N: Tensor, layout: ByteLayout, table_other: Tensor, log_path: Tensor
) -> Tensor:
    """The byte table of a model whose rows tell some tokens only: the untold mass is where another model puts it.

    A row that leaves ``exp(log_untold_N)`` untold stands for its told tokens and that much of what the other model,
    whose table is ``table_other``, writes from the row's own state on::

        table[e, y] ∝ joint[e, y] + untold_k · Π_{b_k ≤ e' < e} other[e', x_e'] · other[e, y]

    with k the last state before e. So nothing is claimed of what was not told: neither that it lies outside the path,
    nor that told tokens are all there is once the path has entered an unlikely one. A model that is filled with itself
    stays near itself. ``log_path`` is ``log other[e, x_e]``, 0 where the text has no event.
    """
    row, place = layout.position_row, torch.arange(layout.positions, device=joint.device)
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[1:] = (row[1:] != row[:-1]) | (layout.position_text[1:] != layout.position_text[:-1])
    start = torch.cummax(torch.where(begins, place, 0), 0).values
    step = log_path.double().clamp(min=-1e4)
    before = torch.cumsum(step, 0) - step
    written = (before - before[start])[:, None] + table_other.double()
    # The positions of a text that has no row name the row after the last one; they carry no meaning.
    untold = torch.cat((log_untold_N, log_untold_N.new_zeros(1))).double()[row][:, None]
    return normalised(torch.logaddexp(joint.double(), untold + written))


def common_events(table_E: Tensor, resolved_E: Tensor, other_E: Tensor) -> Tensor:
    """``table_E`` coarsened to the events that both sides resolve; all else joins the rest. Rows still sum to one.

    Columns that only one side resolves become −inf on both, their mass part of column ``rest``. Inside a token no
    prefix of which is a token, a side has no rest at all, and what the other side has there would cost infinitely
    much; so both sides report a share ``SMOOTHING`` of every event as rest. Both pass through the same channel: equal
    tables stay equal, and a divergence between them is still positive, and 0 only at equality.
    """
    common = resolved_E & other_E
    common[:, REST_EVENT] = False
    rest = row_logsumexp(table_E.masked_fill(common, -torch.inf))
    kept = table_E.masked_fill(~common, -torch.inf)
    return smoothed(torch.cat((kept[:, :REST_EVENT], rest[:, None]), dim=-1), SMOOTHING)
