"""Padding of sequences to one length: on the right for scoring, on the left for generation."""

from __future__ import annotations

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


@dataclass(frozen=True)
class PaddedStates:
    """Right-padded sequences, and the positions of the states that predict the completions' tokens.

    The one shift of the package is here: the state at position i − 1 predicts token i.
    """

    input_ids: Tensor
    attention_mask: Tensor
    sequence: Tensor
    position: Tensor

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
        chosen = (torch.from_numpy(a).to(device) for a in (sequence, position))
        return cls(*padded(texts, pad_id, device), *chosen)
