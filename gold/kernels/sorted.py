"""Rows compared without names: by their probabilities in falling order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gold.kernels.linear import Rows, remade
from gold.kernels.reference import widened


def sorted_l1(p_NV: Tensor, q_NW: Tensor) -> Tensor:
    """``Σ_i |p_(i) − q_(i)|`` per row, each side from its largest entry down, the shorter one continued with zeros.

    The gradient of an entry is the sign of its difference, 0 where there is none. Any order of equal entries is right.

    Source: Boizard et al. 2402.12030, the closed form of the Wasserstein distance that is ULD.
    """
    p, q = (torch.sort(x, dim=-1, descending=True).values for x in (p_NV, q_NW))
    short = q.shape[-1] - p.shape[-1]
    p, q = functional.pad(p, (0, max(0, short))), functional.pad(q, (0, max(0, -short)))
    return (p - q).abs().sum(-1)


def sorted_distance(student: Rows, teacher: Rows) -> Tensor:
    """``sorted_l1`` of the probabilities of row n of both sides: [N]."""
    values: list[Tensor] = []
    block = min(student.block_rows, teacher.block_rows)
    for first in range(0, len(student), block):

        def reduce(hidden_S: Tensor, hidden_T: Tensor) -> tuple[Tensor, ...]:
            p = torch.softmax(widened(student.head(hidden_S)), dim=-1)
            with torch.no_grad():
                q = torch.softmax(widened(teacher.head(hidden_T)), dim=-1).to(p)
            return (sorted_l1(p, q),)

        span = slice(first, first + block)
        values += remade(reduce, student.hidden_ND[span], teacher.hidden_ND[span])
    return torch.cat(values) if values else student.hidden_ND.new_zeros(0, dtype=torch.float32)
