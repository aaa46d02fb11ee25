"""Sequences as the input of a model: padded to one length, on the right for scoring, on the left for generation, or
packed into one row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def padded(
    texts: Sequence[Sequence[int] | NDArray[np.integer[Any]]], pad_id: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ids and attention mask: [B, longest] each, int64, with ``pad_id`` and 0 at the padding."""
    longest = max(map(len, texts))
    ids = np.full((len(texts), longest), pad_id, np.int64)
    mask = np.zeros((len(texts), longest), np.int64)
    for b, text in enumerate(texts):
        own = slice(longest - len(text), longest) if left else slice(len(text))
        ids[b, own] = text
        mask[b, own] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in groups of at most ``batch_tokens`` tokens, padded to the longest text; longest first.

    A single text always fits.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * max(1, lengths[groups[-1][0]]) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def ragged_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in groups of like length with little padding, of at most ``batch_tokens`` tokens each, padded to the
    longest text; longest first. A single text always fits.

    Of all ways to cut the texts, ordered by length, the one with the fewest padded tokens, where a group more counts as
    ``batch_tokens / 16``: it takes another pass through the model.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    costs, begins = [0.0], [0]  # of the best cut of the first texts, and where its last group begins
    for end in range(1, len(order) + 1):
        best, begin = math.inf, end - 1
        for first in range(end - 1, -1, -1):
            padded_tokens = (end - first) * lengths[order[first]]
            if padded_tokens > batch_tokens and first < end - 1:
                break
            if (cost := costs[first] + padded_tokens + batch_tokens / 16) < best:
                best, begin = cost, first
        costs.append(best)
        begins.append(begin)
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]


def packed_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in groups of at most ``batch_tokens`` tokens without padding: from the longest on, each goes to the first
    group with room. A single text always fits."""
    groups: list[list[int]] = []
    filled: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((n for n, size in enumerate(filled) if size + lengths[i] <= batch_tokens), len(groups))
        if place == len(groups):
            groups.append([])
            filled.append(0)
        groups[place].append(i)
        filled[place] += lengths[i]
    return groups


@dataclass(frozen=True)
class PaddedStates:
    """Right-padded sequences, and the positions of the states that predict the completions' tokens.

    Packed ones are one row without padding: they have ``lengths`` and ``position_ids``, and no mask. The one shift of
    the package is here: the state at position i − 1 predicts token i.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    sequence: Tensor
    position: Tensor
    position_ids: Tensor | None = None
    lengths: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], completions: Sequence[NDArray[np.integer[Any]]], rows: Sequence[int],
        pad_id: int, device: torch.device,
    ) -> PaddedStates:  # fmt: skip
        """States ``0 … rows[b] − 1`` of each completion: state k has seen the prompt and k tokens of the completion."""
        texts = [
            np.concatenate((np.asarray(p, np.int64), c)) for p, c in zip(prompts, completions, strict=True)
        ]
        sequence = np.repeat(np.arange(len(texts)), rows)
        position = np.concatenate([len(p) - 1 + np.arange(r) for p, r in zip(prompts, rows, strict=True)])
        chosen = [torch.from_numpy(a).to(device) for a in (sequence, position)]
        return cls(*padded(texts, pad_id, device), chosen[0], chosen[1])

    @classmethod
    def packed(
        cls, prompts: Sequence[Sequence[int]], completions: Sequence[NDArray[np.integer[Any]]], rows: Sequence[int],
        device: torch.device,
    ) -> PaddedStates:  # fmt: skip
        """The states of ``of``, in the same order, of sequences in one row."""
        texts = [
            np.concatenate((np.asarray(p, np.int64), c)) for p, c in zip(prompts, completions, strict=True)
        ]
        lengths = [len(text) for text in texts]
        starts = np.cumsum([0, *lengths[:-1]])
        position = np.concatenate(
            [s + len(p) - 1 + np.arange(r) for s, p, r in zip(starts, prompts, rows, strict=True)]
        )
        places = np.concatenate([np.arange(n) for n in lengths])
        ids, chosen, within = (
            torch.from_numpy(a).to(device) for a in (np.concatenate(texts), position, places)
        )
        return cls(ids[None], None, torch.zeros_like(chosen), chosen, within[None], tuple(lengths))
