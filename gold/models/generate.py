"""Generation by transformers, without the model's own generation settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from gold.models.hidden_states import states_only
from gold.models.language_model import without_adapters
from gold.models.padding import padded


def generate(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    processor: LogitsProcessor,
) -> Tensor:
    """The greedy continuation of each prompt, [B, new tokens], after ``processor`` has changed the logits.

    Prompts are padded on the left. The model's own generation settings are removed: ``generate`` would use them for
    unset arguments, top-k for example.
    """
    lm = without_adapters(lm)  # its layers hold the adapters; a wrapper would keep its own settings in it
    ids, mask = padded(prompts, pad_id, next(lm.parameters()).device, left=True)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    own = lm.generation_config
    lm.generation_config = GenerationConfig()
    try:
        with states_only(lm):
            whole: Tensor = lm.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([processor]),
                # Processes generate different numbers of tokens; what shards a model makes its passes equal.
                synced_gpus=False,
            )
    finally:
        lm.generation_config = own
    return whole[:, ids.shape[1] :]
