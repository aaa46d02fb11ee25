"""Tests a model on five tokens: whether the loss sees its logits, and which batches it generates right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from gold.errors import GoldError, ModelError
from gold.models.files import first_line
from gold.models.generate import generate
from gold.models.hidden_states import lazy_logits, states_only
from gold.models.language_model import Batches, output_width, without_adapters
from gold.models.packing import allow_packing, forbid_packing
from gold.models.padding import PaddedStates
from gold.models.quantization import quantization_of

_LENGTH = 5
_SHORT = 3
_PREFIXES: dict[Batches, tuple[int, ...]] = {
    "any lengths": (3, 2),
    "equal lengths": (2, 2),
    "one prompt": (2,),
}


@torch.no_grad()
def examine(lm: Any, name: str, pad_id: int) -> tuple[Batches, str | None]:
    """The prompts for which ``generate`` is correct in one call, and the error if it is not correct even for one.

    One text of five tokens is read by the whole model, and as padded states together with a shorter text: the logits
    must be the same, else the loss would train another model. Then ``generate`` is forced to write it after its
    prefixes.

    Raises:
        ModelError: it is no causal model whose logits are its output matrix applied to its last hidden states.
    """
    kind = type(without_adapters(lm)).__name__
    was_training = lm.training
    lm.eval()
    try:
        if without_adapters(lm).get_output_embeddings() is None:
            raise ModelError(f"model {name}: it has no output matrix; gold needs a causal language model")
        text = _Text.read(lm, name)
        _check_states(lm, name, kind, text, pad_id)
        fault = None
        for batches, prefixes in _PREFIXES.items():
            if (fault := _generation_fault(lm, text, prefixes, pad_id)) is None:
                return batches, None
        return "one prompt", fault
    except GoldError:
        raise
    except Exception as error:
        raise ModelError(
            f"model {name}: gold cannot run this architecture ({kind}): {type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        lm.train(was_training)


def check_packing(lm: Any, name: str) -> None:
    """Sets up a model for texts that are packed into one row, and checks that it then reads each as if it were alone.

    Raises:
        ModelError: it does not.
    """
    refused = f"train.packing: model {name} cannot read packed texts"
    try:
        allow_packing(lm)
        with torch.no_grad():
            text = _Text.read(lm, name)
            first, rest = text.ids[:1], np.array(text.ids[1:])
            device = next(lm.parameters()).device
            rows = [_SHORT, _LENGTH, _SHORT]
            states = PaddedStates.packed([first] * 3, [rest[: n - 1] for n in rows], rows, device)
            parts = lazy_logits(lm, states).logits().float().split(rows)
        if not all(text.agrees(logits, range(len(logits))) for logits in parts):
            forbid_packing(lm)
            raise ModelError(f"{type(without_adapters(lm)).__name__} reads a text differently after another")
    except GoldError as error:
        raise ModelError(f"{refused}: {error}; set it to false") from error
    except Exception as error:
        forbid_packing(lm)
        raise ModelError(
            f"{refused} ({type(error).__name__}: {first_line(error)}); set it to false"
        ) from error


@dataclass(frozen=True)
class _Text:
    """The five ids, and the logits of a plain forward pass over them."""

    ids: list[int]
    logits: Tensor
    tolerance: float

    @classmethod
    def read(cls, lm: Any, name: str) -> _Text:
        # From the middle of the vocabulary, where there are no special tokens.
        width = output_width(lm)
        ids = [(width // 2 + 3 * k) % width for k in range(_LENGTH)]
        given = torch.tensor([ids], device=next(lm.parameters()).device)
        with states_only(lm):
            logits = (
                lm(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False).logits[0].float()
            )
        if not logits.isfinite().all():
            raise ModelError(f"model {name}: its logits are NaN or infinite; its weights may be damaged")
        # The products of 8-bit weights are rounded by the row, and by what else is in the batch.
        coarse = lm.dtype.itemsize < 4 or quantization_of(lm) == "int8"
        return cls(ids, logits, 6e-2 if coarse else 1e-3)

    def agrees(self, logits: Tensor, positions: Sequence[int]) -> bool:
        """True if these equal, up to rounding, the logits at these positions."""
        own = torch.log_softmax(self.logits[list(positions)], -1)
        difference = (torch.log_softmax(logits, -1) - own).abs().max()
        return bool(difference <= self.tolerance * (1.0 + self.logits.abs().max()))


def _check_states(lm: Any, name: str, kind: str, text: _Text, pad_id: int) -> None:
    """Raises an error if the logits of padded states differ from those of the plain forward pass."""
    first, rest = text.ids[:1], np.array(text.ids[1:])
    device = next(lm.parameters()).device
    states = PaddedStates.of([first, first], [rest, rest[: _SHORT - 1]], [_LENGTH, _SHORT], pad_id, device)
    logits = lazy_logits(lm, states).logits().float()
    if not text.agrees(logits[:_LENGTH], range(_LENGTH)):
        raise ModelError(
            f"model {name}: its logits are not its output matrix applied to its last hidden states; this architecture "
            f"({kind}) does something more"
        )
    if not text.agrees(logits[_LENGTH:], range(_SHORT)):
        raise ModelError(
            f"model {name}: its logits at a token depend on the tokens after it ({kind} is no causal model, or not set "
            "up as one: is_decoder)"
        )


def _generation_fault(lm: Any, text: _Text, prefixes: Sequence[int], pad_id: int) -> str | None:
    """The error of ``generate``, forced to continue prefixes of these lengths with the text; None if it is correct.

    Its logits are compared with the text's, in its first step and in the next, which uses its cache.
    """
    forced = _Forced([text.ids[n] for n in prefixes])
    try:
        generate(lm, [text.ids[:n] for n in prefixes], 2, (), pad_id, forced)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    first, second = forced.logits
    if text.agrees(first, [n - 1 for n in prefixes]) and text.agrees(second, prefixes):
        return None
    return "its logits there are not those of its forward pass"


class _Forced(LogitsProcessor):
    """Keeps each step's logits, and forces given ids."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self.logits = ids, list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.float().clone())
        chosen = torch.tensor(self.ids, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)
