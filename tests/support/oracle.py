"""Slow, obvious second implementations: what the fast code is held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

STOP, REST = 256, 257


def byte_table(
    token_bytes: Sequence[bytes | None],
    stop_ids: Sequence[int],
    logits: Tensor,
    ids: Sequence[int],
    text: bytes,
    stopped: bool,
) -> Tensor:
    """Next-byte table [len(text) + 1, 258] of one text by the definition: every start, every token, one at a time.

    ``token_bytes[v]`` is None for ids that are no text; ``logits`` has a row per state.
    """
    prob = torch.softmax(logits.double(), -1)
    starts = [0]
    for token in ids:
        starts.append(starts[-1] + len(token_bytes[token] or b""))
    table = torch.zeros(len(text) + 1, 258, dtype=torch.float64)
    weight = torch.ones((), dtype=torch.float64)
    for k in range(logits.shape[0]):
        target = ids[k] if k < len(ids) else None
        for e in range(starts[k], len(text) + 1):
            if e == len(text) and not stopped:
                break
            read = text[starts[k] : e]
            for v in range(logits.shape[1]):
                mass = weight * prob[k, v]
                spelled = token_bytes[v] if v < len(token_bytes) else None
                counted_by_next_state = v == target and starts[k + 1] == e
                if v in stop_ids:
                    if e == starts[k]:
                        table[e, STOP] = table[e, STOP] + mass
                elif spelled is None:
                    if e == starts[k] and not counted_by_next_state:
                        table[e, REST] = table[e, REST] + mass
                elif spelled == read:
                    if not counted_by_next_state:
                        table[e, REST] = table[e, REST] + mass
                elif spelled.startswith(read):
                    table[e, spelled[len(read)]] = table[e, spelled[len(read)]] + mass
        if target is not None:
            weight = weight * prob[k, target]
    return table / table.sum(-1, keepdim=True).clamp(min=1e-300)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(p / q) of two vectors of probabilities."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(p, q, strict=True):
        if a > 0:
            total = total + a * torch.log(a / b)
    return total


def sequences(
    next_logp: Callable[[tuple[int, ...]], Tensor], stop_ids: Sequence[int], longest: int
) -> list[tuple[tuple[int, ...], Tensor]]:
    """Every sequence of ids that ends with a stop id, with its log-probability; all must stop by ``longest``."""
    done = []
    open_: list[tuple[tuple[int, ...], Tensor]] = [((), torch.zeros((), dtype=torch.float64))]
    for _ in range(longest):
        grown = []
        for ids, logp in open_:
            row = next_logp(ids)
            for v in range(row.shape[0]):
                if row[v].item() == -math.inf:
                    continue
                (done if v in stop_ids else grown).append(((*ids, v), logp + row[v]))
        open_ = grown
    assert not open_, "the toy model must stop by then"
    return done


Spelled = Sequence[bytes | None]
"""The bytes of each id, None for ids that are no text."""


def readings(
    next_prob: Callable[[tuple[int, ...]], Tensor], spelled: Spelled, text: bytes, stop_ids: Sequence[int]
) -> Iterator[tuple[float, tuple[int, ...], int]]:
    """Every way to read ``text`` and one event more: (probability, ids, offset at which the last of them begins).

    The ids before the last spell a beginning of the text, the last one runs across its end or is a stop id right there.
    So the probabilities add up to that of a text that begins with ``text``, by whatever segmentation.
    """
    open_: list[tuple[tuple[int, ...], float, int]] = [((), 1.0, 0)]
    while open_:
        ids, weight, begin = open_.pop()
        left = text[begin:]
        for v, prob in enumerate(next_prob(ids).tolist()):
            token = spelled[v] if v < len(spelled) else None
            if prob == 0.0 or (token is None and (v not in stop_ids or left)):
                continue
            if token is None or (len(token) > len(left) and token.startswith(left)):
                yield weight * prob, (*ids, v), begin
            elif left.startswith(token):
                open_.append(((*ids, v), weight * prob, begin + len(token)))


def longest(pieces: Iterable[bytes], text: bytes) -> bytes | None:
    """The longest of the pieces that the text begins with."""
    return max((u for u in pieces if text.startswith(u)), key=len, default=None)


def pieces(student: Spelled, teacher: Spelled) -> set[bytes]:
    """The student tokens that are the longest prefix of some teacher token."""
    tokens = {v for v in student if v}
    found = {longest(tokens, w) for w in teacher if w}
    return {u for u in found if u is not None}
