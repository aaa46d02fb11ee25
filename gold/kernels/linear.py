"""From hidden states and an output matrix to log-probabilities and divergences, a block of rows at a time.

A row of logits is as wide as a vocabulary; a batch of them is the largest tensor of a training step by far. Here logits
exist for one block of rows only: the forward pass reduces a block to what the loss needs and drops it, the backward
pass makes it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gold.kernels import backend_for
from gold.kernels.layout import ByteLayout, KeptEvents
from gold.kernels.reference import LEAK, MixedKL, coarsened, leaked, row_logsumexp, widened
from gold.kernels.tables import byte_table, filled_table, joint_table

BLOCK_BYTES = 64 * 2**20
"""Logits of one block take at most this many bytes in float32, and a block holds at least one row."""


@dataclass(frozen=True)
class Rows:
    """Model states whose next-token logits can be computed on demand: ``head(hidden_ND[i:j])`` is [j − i, width].

    ``partial``: only some tokens of each row are known, the others are −inf, and the last column, which no token has,
    is the logit of all of them together.
    """

    hidden_ND: Tensor
    head: Callable[[Tensor], Tensor]
    width: int
    partial: bool = False

    @classmethod
    def of_logits(cls, logits_NV: Tensor) -> Rows:
        """States whose logits are given: for tests, and for models that hand out nothing else."""
        return cls(logits_NV, _same, logits_NV.shape[1])

    @classmethod
    def of_top_k(cls, ids_NK: Tensor, logp_NK: Tensor, size: int) -> Rows:
        """Rows of which only some tokens' log-probabilities are known, in nats; what is left of 1 is all the others'.

        ``ids_NK`` are below ``size``, the size of the vocabulary, each at most once a row; −1 pads a row, whatever its
        ``logp_NK`` there.
        """
        packed = torch.cat((ids_NK.to(torch.float64), logp_NK.to(torch.float64)), dim=-1)

        def unpack(packed: Tensor) -> Tensor:
            ids, logp = packed.chunk(2, dim=-1)
            known = ids >= 0
            rest = log_rest(logp.masked_fill(~known, -torch.inf))
            dense = logp.new_full((logp.shape[0], size + 1), -torch.inf)
            column = torch.where(known, ids, float(size)).long()
            dense = dense.scatter(1, column, logp.masked_fill(~known, -torch.inf))
            dense[:, size] = rest
            return dense

        return cls(packed, unpack, size + 1, partial=True)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of several texts of one model, one text after the other."""
        return replace(parts[0], hidden_ND=torch.cat([p.hidden_ND for p in parts]))

    def __len__(self) -> int:
        return int(self.hidden_ND.shape[0])

    def select(self, index: Tensor) -> Rows:
        """The rows ``index``, in that order."""
        return replace(self, hidden_ND=self.hidden_ND[index])

    @property
    def block_rows(self) -> int:
        """Rows per block."""
        return max(1, BLOCK_BYTES // (4 * self.width))


def _same(logits: Tensor) -> Tensor:
    return logits


def log_rest(logp_NK: Tensor) -> Tensor:
    """What is left of 1 in each row, as a log-probability: −∞ where nothing is."""
    left = -torch.expm1(row_logsumexp(logp_NK))
    return torch.where(left > 0, torch.log(left.clamp(min=1e-300)), -torch.inf)


@torch.no_grad()
def likeliest(rows: Rows, top_k: int, also_NA: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Some tokens of each row: those of ``also_NA`` (−1: none), then those of its ``top_k`` likeliest below ``size``
    that are not among them; of partial rows, all that are known.

    Returns:
        ids_NK (−1 pads), logp_NK, and the log-probability of all other tokens together [N], in nats, float64.
    """
    if rows.partial:
        ids, logp = rows.hidden_ND.chunk(2, dim=-1)
        return ids.long(), logp, log_rest(logp.masked_fill(ids < 0, -torch.inf))
    repeated = (also_NA[:, :, None] == also_NA[:, None, :]).tril(-1).any(-1)
    also_NA = also_NA.masked_fill(repeated, -1)
    parts = []
    for first in range(0, len(rows), rows.block_rows):
        logits = widened(rows.head(rows.hidden_ND[first : first + rows.block_rows]))
        also = also_NA[first : first + logits.shape[0]]
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


def remade(function: Callable[..., tuple[Tensor, ...]], *hidden: Tensor) -> tuple[Tensor, ...]:
    """``function(*hidden)``, whose inner tensors are dropped and made again in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*hidden)
    result: tuple[Tensor, ...] = checkpoint(function, *hidden, use_reentrant=False, preserve_rng_state=False)
    return result


def byte_tables(rows: Rows, layout: ByteLayout, backend: ModuleType) -> tuple[Tensor, Tensor, Tensor]:
    """Next-byte table of a batch, and what its rows say of the tokens themselves.

    Returns:
        table [positions, 258] (``tables.byte_table``), log_target_N, log_stop_N (``reference.byte_masses``), nats.
    """
    mass, target, stop, _ = _byte_masses(rows, layout, backend)
    return byte_table(mass, target, layout), target, stop


def filled_byte_tables(
    rows: Rows, layout: ByteLayout, backend: ModuleType, table_other: Tensor, log_path: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``byte_tables``, of rows that are partial: see ``tables.filled_table``."""
    mass, target, stop, untold = _byte_masses(rows, layout, backend)
    joint = joint_table(mass, target, layout)
    return filled_table(joint, untold, layout, table_other, log_path), target, stop


def _byte_masses(rows: Rows, layout: ByteLayout, backend: ModuleType) -> tuple[Tensor, ...]:
    """``reference.byte_masses`` of all rows, and the mass of the tokens that partial rows do not tell, which is no
    part of the others; in nats."""
    if len(rows) != layout.rows:
        raise ValueError(f"{len(rows)} rows of states for a plan of {layout.rows}")
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, len(rows), rows.block_rows):

        def reduce(hidden: Tensor, first: int = first) -> tuple[Tensor, ...]:
            logits = rows.head(hidden)
            if not rows.partial:
                return (*backend.byte_masses(logits, layout, first), logits.new_zeros(0))
            untold = logits[:, -1] - row_logsumexp(logits)
            told = torch.log1p(-untold.exp())
            masked = torch.cat((logits[:, :-1], torch.full_like(logits[:, -1:], -torch.inf)), dim=-1)
            mass, target, stop = backend.byte_masses(masked, layout, first)
            low, high = layout.mass_range(first, logits.shape[0])
            of_mass = told[layout.mass_row[low:high] - first].to(mass)
            is_token = layout.target[first : first + logits.shape[0]] >= 0
            of_target = torch.where(is_token, told, 0.0).to(target)
            return mass + of_mass, target + of_target, stop + told.to(stop), untold

        parts.append(remade(reduce, rows.hidden_ND[first : first + rows.block_rows]))
    if not parts:
        empty = rows.hidden_ND.new_zeros(0, dtype=torch.float32)
        return empty, empty, empty, empty
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def token_logp(
    rows: Rows, target_N: Tensor, stops: Tensor, backend: ModuleType | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target token (0 where it is −1), and of the stop event, in nats: two [N]."""
    backend = backend or backend_for(rows.hidden_ND.device)
    targets, stopped = [], []
    for first in range(0, len(rows), rows.block_rows):

        def reduce(hidden: Tensor, first: int = first) -> tuple[Tensor, ...]:
            logits = rows.head(hidden)
            aim = target_N[first : first + logits.shape[0]]
            _, target, stop = backend.row_statistics(logits, aim, stops)
            return target, stop

        target, stop = remade(reduce, rows.hidden_ND[first : first + rows.block_rows])
        targets.append(target)
        stopped.append(stop)
    if not targets:
        empty = rows.hidden_ND.new_zeros(0, dtype=torch.float32)
        return empty, empty
    return torch.cat(targets), torch.cat(stopped)


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
    student: Rows,
    teacher: Rows,
    events: SharedEvents,
    divergence: Callable[[Tensor, Tensor], Tensor],
    backend: ModuleType,
    renormalise: bool,
    top_k: int | None = None,
    top_k_of_teacher: bool = True,
) -> tuple[Tensor, Tensor]:
    """Divergence per pair of states (row n of both sides) on shared events, and the student's mass on them: two [N].

    ``renormalise``: condition both sides on the shared events; else all unshared mass is one more event, the bucket.
    A ``MixedKL`` is a kernel's; any other divergence is computed by torch.
    ``top_k``: only the likeliest shared events of one side in each row are events of their own, the others are
    unshared; so are those that a teacher's row does not know.

    Raises: ValueError if ``top_k`` is more than there are shared events.
    """
    kept, kept_teacher = events.kept(student.width, teacher.width)
    if top_k is not None and top_k > kept.ids.numel() + 1:
        raise ValueError(
            f"top_k is {top_k}, and the vocabularies share {kept.ids.numel()} tokens and the stop event"
        )
    values, masses = [], []
    leak = 0.0 if events.everything else LEAK
    whole = top_k is None and not teacher.partial and kept.ids.device == kept_teacher.ids.device
    block = min(student.block_rows, teacher.block_rows)
    for first in range(0, len(student), block):

        def reduce(hidden_S: Tensor, hidden_T: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                logits_T = teacher.head(hidden_T)
            if whole and isinstance(divergence, MixedKL):
                result: tuple[Tensor, ...] = backend.row_divergence(
                    student.head(hidden_S),
                    logits_T,
                    kept,
                    kept_teacher,
                    divergence,
                    rest="renormalise" if renormalise else "bucket",
                    leak=leak,
                )
                return result
            logp = coarsened(student.head(hidden_S), kept)
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
                logp, logq = (x[:, :-1] - row_logsumexp(x[:, :-1])[:, None] for x in (logp, logq))
            elif apart is not None or leak:
                # What one side has left, the other may give no probability at all.
                logp, logq = leaked(logp, LEAK), leaked(logq, LEAK)
            return divergence(logp, logq), mass

        value, mass = remade(
            reduce, student.hidden_ND[first : first + block], teacher.hidden_ND[first : first + block]
        )
        values.append(value)
        masses.append(mass)
    if not values:
        empty = student.hidden_ND.new_zeros(0, dtype=torch.float32)
        return empty, empty
    return torch.cat(values), torch.cat(masses)


def bucketed(logp: Tensor, apart: Tensor) -> Tensor:
    """The events that are not told apart join the bucket, which is the last column."""
    events = logp[:, :-1]
    bucket = row_logsumexp(torch.cat((events.masked_fill(apart, -torch.inf), logp[:, -1:]), dim=-1))
    return torch.cat((events.masked_fill(~apart, -torch.inf), bucket[:, None]), dim=-1)


def split(logits: Tensor, kept: KeptEvents) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the kept events, the stop event last, and of every column that is left."""
    logits = widened(logits)
    norm = torch.logsumexp(logits, dim=-1, keepdim=True)
    events = torch.cat((logits[:, kept.ids], row_logsumexp(logits[:, kept.stops])[:, None]), dim=-1)
    return events - norm, logits[:, kept.left] - norm
