"""From the masses of single rows to next-byte distributions along the text: the step that joins the cover terms."""

import torch
from torch import Tensor

from gold.kernels.layout import EVENTS, REST_EVENT, ByteLayout
from gold.kernels.reference import LEAK, leaked, row_logsumexp, segment_logsumexp


def byte_table(log_mass: Tensor, log_target_N: Tensor, layout: ByteLayout) -> Tensor:
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
    # Weights relative to the position's own last state, summed in float64: their absolute values fall without bound.
    # A token of probability 0 on the path would make them all −inf: 1e-4000 keeps their order and stays finite.
    step_N = log_target_N.double().clamp(min=-1e4)
    before = torch.cumsum(step_N, 0) - step_N
    weight = before[layout.mass_row] - before[layout.position_row[layout.mass_cell // EVENTS]]
    value = log_mass + weight.to(log_mass.dtype)
    joint = segment_logsumexp(value, layout.mass_cell, layout.positions * EVENTS).view(-1, EVENTS)
    norm = row_logsumexp(joint)[:, None]
    return joint - torch.where(torch.isfinite(norm), norm, 0.0)


def common_events(table_E: Tensor, resolved_E: Tensor, other_E: Tensor) -> Tensor:
    """``table_E`` coarsened to the events that both sides resolve; all else joins the rest. Rows still sum to one.

    Columns that only one side resolves become −inf on both, their mass part of column ``rest``. Inside a token no
    prefix of which is a token, a side has no rest at all, and what the other side has there would cost infinitely
    much; so both sides report a share ``LEAK`` of every event as rest. Both pass through the same channel: equal tables
    stay equal, and a divergence between them is still positive, and 0 only at equality.
    """
    common = resolved_E & other_E
    common[:, REST_EVENT] = False
    rest = row_logsumexp(table_E.masked_fill(common, -torch.inf))
    kept = table_E.masked_fill(~common, -torch.inf)
    return leaked(torch.cat((kept[:, :REST_EVENT], rest[:, None]), dim=-1), LEAK)
