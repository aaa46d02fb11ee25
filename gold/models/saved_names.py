"""Weights by the names that they have in a checkpoint, where these are not the names in the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gold.errors import ModelError
from gold.models.files import first_line


def saved_weights(lm: Any, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A transformers model's state dict by the names, and in the shapes, in which ``save_pretrained`` writes it: a
    checkpoint has a matrix for each expert, for one, and the model all experts in one tensor. Mostly views.

    ``weights`` may have several names of a tied matrix, which all stay. Where no name differs they are returned as they
    are; else all of them are read at once.

    Raises:
        ModelError: transformers cannot convert them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    own = lm.state_dict()
    try:
        # Shapes are enough for the names.
        shapes = {name: torch.empty_like(own[name], device="meta") for name in weights if name in own}
        if revert_weight_conversion(lm, shapes).keys() == shapes.keys():
            return weights
        return dict(revert_weight_conversion(lm, dict(weights)))
    except Exception as error:
        kind = type(lm).__name__
        raise ModelError(
            f"{kind}: its weights have other names in a checkpoint, and cannot be converted: {first_line(error)}; draw "
            "with rollout.engine hf"
        ) from error
