"""Two tiny causal models with different tokenizers, and their training before distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gold.data import Prompt
from gold.models.language_model import LanguageModel
from gold.models.load import wrap_model
from gold.rollout.engine import completed

ALPHABET = "0123456789 +-="
SPECIAL = ("<pad>", "<bos>", "<eos>")


def character_tokenizer(alphabet: str = ALPHABET) -> Tokenizer:
    """One token per character of the alphabet: byte-level BPE without merges."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = sorted({symbol for c in alphabet for symbol in byte_level.pre_tokenize_str(c)[0][0]})
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *symbols))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return _with_bos(tokenizer)


def word_tokenizer(texts: Sequence[str], size: int = 160) -> Tokenizer:
    """Byte-level BPE trained on ``texts``: a number or a step, with its sign and the space before it, is one token."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return _with_bos(tokenizer)


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    bos = ("<bos>", tokenizer.token_to_id("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return tokenizer


def tiny_model(
    tokenizer: Tokenizer, name: str, *, layers: int, width: int = 64, seed: int, context: int = 128
) -> LanguageModel:
    """A randomly initialized Llama-like model for a tokenizer."""
    pad, bos, eos = (tokenizer.token_to_id(t) for t in SPECIAL)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        initializer_range=0.08,  # about 1/√width; 0.02 is for far wider models
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    torch.manual_seed(seed)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    return wrap_model(LlamaForCausalLM(config).eval(), wrapped, name=name)


def learn_answers(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    *,
    steps: int,
    lr: float = 3e-3,
    batch: int = 48,
    seed: int = 0,
    every: int = 0,
    watch: Callable[[int], bool] | None = None,
) -> int:
    """Supervised training on the prompts' own completions; returns the number of steps taken.

    ``watch(step)``, called every ``every`` steps, stops the training by returning True.
    """
    pad = model.pad_id
    given = [completed(model, p, 10**6) for p in prompts]
    whole = [np.concatenate((np.array(r.prompt_ids, np.int64), r.ids)) for r in given]
    longest = max(w.size for w in whole)
    ids = torch.full((len(whole), longest), pad, dtype=torch.int64)
    labels = torch.full((len(whole), longest), -100, dtype=torch.int64)
    for i, (w, r) in enumerate(zip(whole, given, strict=True)):
        ids[i, : w.size] = torch.from_numpy(w)
        labels[i, len(r.prompt_ids) : w.size] = torch.from_numpy(w[len(r.prompt_ids) :])
    ids, labels = ids.to(model.device), labels.to(model.device)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.lm.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    model.lm.train()
    for step in range(steps):
        chosen = torch.from_numpy(rng.integers(0, len(whole), batch)).to(model.device)
        # Padding is on the right and has no labels: attention needs no mask.
        loss: Any = model.lm(input_ids=ids[chosen], labels=labels[chosen], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.lm.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (1.0 - 0.95 * step / steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if watch is not None and (step + 1) % every == 0 and watch(step + 1):
            return step + 1
    model.lm.eval()
    return steps
