"""``LanguageModel``: a transformers model with its tokenizer and the bytes of its vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import nn

from gold.data import Prompt
from gold.tokenize.chat import prompt_ids
from gold.tokenize.templates import Rendering
from gold.tokenize.vocabulary import Vocabulary

Batches = Literal["any lengths", "equal lengths", "one prompt"]


@dataclass(frozen=True)
class LanguageModel:
    """A causal model, its tokenizer, and that tokenizer's vocabulary.

    The vocabulary's stop ids come from tokenizer, configuration and generation settings together; thinking and tool
    markers count as text in it (see ``gold.tokenize.markers``). ``rendering`` holds the chat template's arguments.
    """

    name: str
    lm: Any
    tokenizer: Any
    vocabulary: Vocabulary
    generates: Batches = "any lengths"
    """The batches for which ``generate`` is correct: any lengths (left padding), equal lengths, or one prompt only."""
    generation_error: str | None = None
    """Why ``generate`` is wrong even for one prompt; None if it works."""
    rendering: Rendering = field(default_factory=Rendering, kw_only=True)
    saved_dtype: torch.dtype | None = field(default=None, kw_only=True)
    """The dtype of the weights that it was loaded from; None if they have none, as of a GGUF file."""
    shards_on: torch.device | None = field(default=None, kw_only=True)
    """The device of the weights once they are sharded. Until then the first process has them in main memory, and the
    others have none. None for a model that every process has loaded."""

    @property
    def runs_own_code(self) -> bool:
        """True if its class comes from its own folder or repository (``trust_remote_code``)."""
        return any(
            type(part).__module__.startswith("transformers_modules.") for part in (self.lm, self.tokenizer)
        )

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, see ``chat.prompt_ids``."""
        return prompt_ids(self.tokenizer, prompt, self.rendering)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self.shards_on or next(self.lm.parameters()).device
        return device

    @property
    def context(self) -> int:
        """The context length in tokens."""
        config = self.lm.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 2**31)

    @property
    def pad_id(self) -> int:
        """The id for padding batches; its value never matters, since attention masks it."""
        return pad_id(self.tokenizer, self.vocabulary)


def pad_id(tokenizer: Any, vocabulary: Vocabulary) -> int:
    """The tokenizer's pad id, or the first stop id, or 0."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else (*vocabulary.stop_ids, 0)[0])


def without_adapters(lm: Any) -> Any:
    """The transformers model inside an adapter wrapper, or the model itself."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def saved_module(module: Any) -> Any:
    """The copy in use of a module of an adapter's ``modules_to_save``, or the original where the adapter is disabled;
    None for any other module."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return None
    active = [name for name in module.active_adapters if name in copies]
    return copies[active[0]] if active and not module.disable_adapters else module.original_module


def output_matrix(lm: Any) -> Any:
    """The layer that makes logits of hidden states; the copy in use if an adapter trains one."""
    matrix: Any = without_adapters(lm).get_output_embeddings()
    saved = saved_module(matrix)
    return matrix if saved is None else saved


def output_width(lm: Any) -> int:
    """The number of rows of the output matrix, which may exceed the number of ids."""
    matrix = output_matrix(lm)
    return int(matrix.weight.shape[0] if matrix.weight.is_floating_point() else matrix.out_features)


def backbone(lm: Any) -> nn.Module:
    """The model without its output matrix."""
    model: Any = without_adapters(lm)
    module: nn.Module = model.base_model
    if module is model:  # base_model_prefix names no attribute, as in Llama4ForCausalLM
        return cast(nn.Module, model.model)
    return module
