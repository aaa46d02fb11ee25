"""Tiny random models of every causal architecture that transformers knows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gold.demo.models import character_tokenizer
from gold.models.language_model import LanguageModel
from gold.models.load import wrap_model

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SIZE = character_tokenizer().get_vocab_size()

# By the names that configurations give to their sizes.
_NAMES = {
    "vocab_size vocab_size_per_layer_input": SIZE,
    "num_hidden_layers n_layer n_layers num_layers decoder_layers num_blocks": 2,
    "num_attention_heads n_head n_heads decoder_attention_heads num_heads num_experts num_local_experts": 4,
    "n_routed_experts linear_num_value_heads laurel_rank time_step_rank mamba_d_conv conv_kernel rotary_dim": 4,
    "hidden_size n_embd d_model word_embed_proj_dim embedding_size lru_width dim_model_base hidden_size_base": 32,
    "intermediate_size n_inner ffn_dim decoder_ffn_dim": 48,
    "max_position_embeddings n_positions max_seq_len": 128,
    "num_key_value_heads num_experts_per_tok linear_num_key_heads expand mamba_expand": 2,
    "head_dim kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim sliding_window": 8,
    "attention_window hidden_size_per_layer_input state_size mamba_d_state mamba_n_heads mamba_d_head": 8,
    "mamba_num_heads mamba_head_dim chunk_size linear_key_head_dim linear_value_head_dim": 8,
    "moe_intermediate_size shared_expert_intermediate_size": 16,
    "n_group topk_group n_groups first_k_dense_replace num_attention_groups": 1,
    "num_kv_shared_layers": 0,
}
_SIZES = {name: value for names, value in _NAMES.items() for name in names.split()}

_MLA = {"num_key_value_heads": 4}
_MIXED = ["linear_attention", "full_attention"]
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _MLA),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), _MLA),
    "bamba": {"attn_layer_indices": [1]},
    "bert": {"is_decoder": True},
    "falcon": {"head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": _MIXED},
    "qwen3_5_text": {"layer_types": _MIXED},
    "qwen3_next": {"layer_types": _MIXED},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
}


def tiny_lm(kind: str, **changes: Any) -> Any:
    """Random weights, three times as large as they would be, so that distributions are far from flat."""
    make = CONFIG_MAPPING[kind]
    known = make()
    sizes = {name: size for name, size in _SIZES.items() if getattr(known, name, None) is not None}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    sizes |= SPECIAL.get(kind, {}) | changes
    config = make(**{name: size for name, size in sizes.items() if size is not None})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in lm.parameters():
            if weight.dim() >= 2:
                weight.mul_(3.0)
    return lm


def wrapped(lm: Any, name: str = "tiny") -> LanguageModel:
    """With a tokenizer whose tokens are characters."""
    tokens = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return wrap_model(
        lm, PreTrainedTokenizerFast(tokenizer_object=character_tokenizer(), **tokens), name=name
    )
